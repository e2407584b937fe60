"""The doctor: finds every known trouble, names the line that fixes it, and never falls ill itself.

Problems are read off facts alone, so most of this is done on the facts of machines made up here.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from threadpoolctl import threadpool_info

import nnxp
from nnxp.backend import _machine, _probe
from nnxp.doctor import Diagnosis, Problem, diagnose, problems_in
from nnxp.doctor import facts as looked_up
from nnxp.doctor.facts import VARIABLES
from nnxp.doctor.words import in_words

BLAS = next((each for each in threadpool_info() if each["user_api"] == "blas"), {})
OPENBLAS = BLAS.get("internal_api") == "openblas"
CUPY = nnxp.available_backends()["cupy"]
HAS_CUPY = importlib.util.find_spec("cupy") is not None

HEALTHY = {  # a machine with a GPU, and all in order
    "system": {"simd": "AVX-512", "cores": 8, "core_quota": None},
    "numpy": {
        "numpy": "2.4.6",
        "built_with": "scipy-openblas",
        "blas": "openblas",
        "kernels": "SkylakeX",
        "threads": 8,
        "onednn": {"ok": False, "reason": "onednn-cpu-gomp is not installed"},
    },
    "cuda": {
        "traces": ["/proc/driver/nvidia/version", "libcuda"],
        "driver_cuda": "13.0",
        "wheels": {"cupy-cuda13x": "14.2.0"},
        "cupy": "14.2.0",
        "cupy_cuda": "13.2",
        "nvrtc": {"ok": True, "reason": "13.0"},
        "cublaslt": {"ok": True, "reason": "products go through it"},
        "cudnn": {"ok": False, "reason": "nvidia-cudnn-frontend is not installed"},
        "nvidia-cudnn-frontend": None,
        "kernel_cache": {"ok": True, "reason": "/root/.cupy/kernel_cache"},
        "devices": {"cuda:0": {"ok": True, "reason": "NVIDIA H100", "hint": ""}},
    },
    "backends": {
        "cupy": {"ok": True, "reason": "NVIDIA H100", "hint": ""},
        "numpy": {"ok": True, "reason": "NumPy 2.4.6", "hint": ""},
    },
    "chosen": {
        "backend": {"asked": "auto", "ok": True, "reason": "cuda:0: NVIDIA H100"},
        "workers": {"ok": True, "reason": "8 threads", "count": 8},
    },
}
FAILED = {"ok": False, "reason": "it failed", "hint": "fix it"}
NO_GPU = {"backends.cupy": FAILED}
NO_CUPY = {
    "cuda.wheels": {},
    "cuda.cupy": None,
    "cuda.cupy_cuda": None,
    "cuda.nvrtc": None,
    "cuda.cublaslt": None,
    "cuda.cudnn": None,
    "cuda.devices": {},
}
NO_DRIVER = {"cuda.traces": [], "cuda.driver_cuda": None, "cuda.devices": {}}
TWO_WHEELS = {"cuda.wheels": {"cupy-cuda12x": "13.6.0", "cupy-cuda13x": "14.2.0"}}


@pytest.fixture(autouse=True)
def _no_variable_of_the_person_who_runs_this(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def machine(*changes):
    """The healthy machine with these facts instead."""
    facts = copy.deepcopy(HEALTHY)
    for change in changes:
        for name, value in change.items():
            section, _, fact = name.partition(".")
            facts[section][fact] = value
    return facts


def found(*changes):
    """The problems of that machine, as (severity, fix)."""
    return [(each.severity, each.fix) for each in problems_in(machine(*changes))]


def run(*args, python=(), **environment):
    """`nnxp doctor --json` in a process of its own: (exit code, what it said)."""
    variables = {name: v for name, v in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        [sys.executable, *python, "-m", "nnxp", "doctor", "--json", *args],
        env=variables | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def fixes(said):
    return {each["fix"]: each["severity"] for each in said["problems"]}


# problems, on machines made up here


def test_a_healthy_machine_has_no_problems():
    assert found() == []


@pytest.mark.parametrize(
    ("changes", "severity", "fix"),
    [
        ([NO_CUPY], "slow", 'pip install "cupy-cuda13x[ctk]"'),
        ([NO_CUPY, {"cuda.driver_cuda": "12.4"}], "slow", 'pip install "cupy-cuda12x[ctk]"'),
        (
            [NO_CUPY, NO_DRIVER, {"cuda.traces": ["nvidia-smi"]}],
            "slow",
            'pip install "cupy-cuda13x[ctk]"',
        ),
        (
            [NO_DRIVER, {"cuda.traces": ["/dev/nvidiactl"]}],
            "slow",
            "Install the NVIDIA driver (in a container: --gpus all)",
        ),
        (
            [{"cuda.driver_cuda": "12.4"}],
            "slow",
            'pip uninstall -y cupy-cuda13x && pip install "cupy-cuda12x[ctk]"',
        ),
        (
            [{"cuda.driver_cuda": "12.4", "cuda.nvrtc": FAILED}],  # the other wheel brings its own
            "slow",
            'pip uninstall -y cupy-cuda13x && pip install "cupy-cuda12x[ctk]"',
        ),
        (
            [TWO_WHEELS, {"cuda.driver_cuda": "12.4"}],
            "slow",
            'pip uninstall -y cupy-cuda12x cupy-cuda13x && pip install "cupy-cuda12x[ctk]"',
        ),
        (
            [{"cuda.driver_cuda": "11.4"}],
            "slow",
            "Update the NVIDIA driver: 525 is the first for CUDA 12, 580 for CUDA 13",
        ),
        (
            [TWO_WHEELS],
            "slow",
            'pip uninstall -y cupy-cuda12x cupy-cuda13x && pip install "cupy-cuda13x[ctk]"',
        ),
        (
            [TWO_WHEELS, {"cuda.driver_cuda": "12.4", "cuda.cupy": None, "cuda.cupy_cuda": None}],
            "slow",
            'pip uninstall -y cupy-cuda12x cupy-cuda13x && pip install "cupy-cuda12x[ctk]"',
        ),
        ([{"cuda.nvrtc": FAILED}], "slow", 'pip install "cupy-cuda13x[ctk]"'),
        (
            [{"cuda.nvrtc": FAILED, "cuda.wheels": {"cupy": "14.2.0"}}],
            "slow",
            "Install the CUDA toolkit 13.2, and set CUDA_PATH to it",
        ),
        ([{"cuda.driver_cuda": None}], "slow", "fix it"),  # libcuda is there, but says nothing
        (
            [TWO_WHEELS, {"cuda.nvrtc": FAILED}],
            "slow",
            'pip uninstall -y cupy-cuda12x cupy-cuda13x && pip install "cupy-cuda13x[ctk]"',
        ),
        ([{"cuda.kernel_cache": FAILED}], "slow", 'export CUPY_CACHE_DIR="$(mktemp -d)"'),
        ([{"cuda.cupy": None, "cuda.cupy_cuda": None}], "slow", "fix it"),  # as the probe says
        ([{"cuda.devices": {"cuda:0": FAILED}}], "slow", "fix it"),
    ],
)
def test_each_reason_for_which_cuda_cannot_be_used_has_the_line_that_fixs_it(
    changes, severity, fix
):
    assert found(NO_GPU, *changes) == [(severity, fix)]
    asked = {"chosen.backend": {"asked": "cuda", **FAILED}}
    assert ("broken", fix) in found(NO_GPU, asked, *changes)


NO_CARD = "No NVIDIA card is seen here (a container sees one with --gpus all): use numpy"


@pytest.mark.parametrize(
    ("changes", "fixes"),
    [
        ([NO_CUPY], []),
        ([], ["In a container on a machine that has one: --gpus all"]),
        ([{"cuda.nvrtc": FAILED}], ["In a container on a machine that has one: --gpus all"]),
        ([TWO_WHEELS], ["pip uninstall -y cupy-cuda12x cupy-cuda13x"]),
        ([{"cuda.kernel_cache": FAILED}, NO_CUPY], []),
    ],
)
def test_without_a_card_nothing_is_to_be_installed(changes, fixes):
    answer = {"ok": False, "reason": "CuPy is not there", "hint": NO_CARD}
    changes = [NO_DRIVER, {"backends.cupy": answer}, *changes]
    assert found(*changes) == [("note", fix) for fix in fixes]
    asked = {"chosen.backend": {"asked": "cuda", **answer}}
    assert found(asked, *changes) == [("broken", NO_CARD), *(("note", fix) for fix in fixes)]


def test_what_could_hurt_a_gpu_that_works_is_a_note():
    assert found(TWO_WHEELS)[0][0] == "note"
    assert found({"cuda.kernel_cache": FAILED})[0][0] == "note"
    cards = {"cuda:0": HEALTHY["cuda"]["devices"]["cuda:0"], "cuda:1": FAILED}
    assert found({"cuda.devices": cards}) == [("note", "fix it")]


@pytest.mark.parametrize(
    ("cupy_cuda", "bindings"), [("12.9", ">=12.9.2,<13"), ("13.2", ">=13.0.1,<14")]
)
def test_bindings_that_are_missing_are_a_matter_of_speed_where_a_gpu_works(cupy_cuda, bindings):
    reason = "nvmath-python is not installed"
    missing = {"cuda.cublaslt": {"ok": False, "reason": reason}, "cuda.cupy_cuda": cupy_cuda}
    fix = f'pip install nvmath-python "cuda-bindings{bindings}"'
    assert found(missing) == [("slow", fix)]
    (problem,) = problems_in(machine(missing))
    assert problem.what.endswith(": nvmath-python is not installed")
    without = found(NO_GPU, NO_DRIVER, missing)
    assert fix not in [each for _, each in without]


@pytest.mark.parametrize(("cupy_cuda", "major"), [("13.2", 13), ("12.9", 12)])
def test_the_library_of_cudnn_is_missed_only_by_who_has_its_frontend(cupy_cuda, major):
    reason = "cuDNN cannot be loaded (RuntimeError: no libcudnn.so.9)"
    missing = {"cuda.cudnn": {"ok": False, "reason": reason}, "cuda.cupy_cuda": cupy_cuda}
    there = {"cuda.nvidia-cudnn-frontend": "1.28.0"}
    fix = f"pip install nvidia-cudnn-cu{major}"
    assert found(missing | there) == [("slow", fix)]
    assert found(missing) == found(there | {"cuda.cudnn": {"ok": True, "reason": ""}}) == []
    assert fix not in [each for _, each in found(NO_GPU, NO_DRIVER, missing | there)]


def test_gpus_that_a_variable_hides_are_found(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert found(NO_GPU, {"cuda.devices": {}}) == [("slow", "unset CUDA_VISIBLE_DEVICES")]


@pytest.mark.parametrize(
    ("simd", "kernels", "slow"),
    [
        ("AVX-512", "Haswell", True),
        ("AVX-512", "Zen", True),
        ("AVX2", "Sandybridge", True),
        ("AVX2", "Prescott", True),
        ("AVX-512", "SkylakeX", False),
        ("AVX-512", "Cooperlake", False),
        ("AVX2", "Zen", False),
        ("AVX2", "Haswell", False),
        (None, "neoversev1", False),
        ("AVX-512", None, False),
    ],
)
def test_kernels_older_than_the_cpu_are_found(monkeypatch, simd, kernels, slow):
    change = {"system.simd": simd, "numpy.kernels": kernels}
    assert found(change) == [("slow", "pip install --upgrade numpy")] * slow
    monkeypatch.setenv("OPENBLAS_CORETYPE", str(kernels))
    assert found(change) == [("slow", "unset OPENBLAS_CORETYPE")] * slow


@pytest.mark.parametrize(
    ("reason", "fix"),
    [
        ("oneDNN cannot be loaded (libgomp.so.1: cannot open ...)", "apt install libgomp1"),
        ("libdnnl.so.3 is built with threads that cannot be limited", 'pip install "nnxp[onednn]"'),
    ],
)
def test_onednn_that_is_there_and_cannot_be_used_is_found(reason, fix):
    assert found({"numpy.onednn": {"ok": False, "reason": reason}}) == [("slow", fix)]
    assert found({"numpy.onednn": {"ok": True, "reason": "3.2.0"}}) == []


@pytest.mark.parametrize("name", ["OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"])
@pytest.mark.parametrize(("threads", "slow"), [(1, True), (64, True), (8, False)])
def test_threads_that_a_variable_pins_are_found(monkeypatch, name, threads, slow):
    monkeypatch.setenv(name, str(threads))
    assert found({"numpy.threads": threads}) == [("slow", f"unset {name}")] * slow


def test_variables_of_another_blas_are_not_blamed(monkeypatch):
    monkeypatch.setenv("MKL_NUM_THREADS", "1")
    assert found({"numpy.threads": 7}) == []
    assert found({"numpy.threads": 1, "numpy.blas": "mkl", "numpy.kernels": None}) == [
        ("slow", "unset MKL_NUM_THREADS")
    ]


@pytest.mark.parametrize("built_with", [None, "none", "blas", "lapack_lite"])
def test_numpy_without_a_blas_is_found(built_with):
    assert found({"numpy.blas": None, "numpy.built_with": built_with}) == [
        ("slow", "pip install --force-reinstall --only-binary=numpy numpy")
    ]
    assert found({"numpy.blas": None, "numpy.built_with": "accelerate"}) == []


def test_a_quota_of_cores_below_the_cores_that_are_seen_is_found(monkeypatch):
    quota = {"system.core_quota": 1.5}
    assert found(quota) == [("slow", "export NNXP_WORKERS=2")]
    workers = {"chosen.workers": {"ok": True, "reason": "", "count": 2}}
    monkeypatch.setenv("NNXP_WORKERS", "2")
    assert found(quota, workers) == []


def test_workers_that_do_not_fit_the_cores_are_found(monkeypatch):
    monkeypatch.setenv("NNXP_WORKERS", "1")
    workers = {"chosen.workers": {"ok": True, "reason": "", "count": 1}}
    assert found(workers) == [("slow", "unset NNXP_WORKERS")]


@pytest.mark.parametrize("name", ["CUPY_TF32", "NVIDIA_TF32_OVERRIDE"])
def test_float32_that_is_not_float32_is_found(monkeypatch, name):
    monkeypatch.setenv(name, "0")
    assert found() == []
    monkeypatch.setenv(name, "1")
    assert found() == [("note", f"unset {name}")]


def test_the_worst_comes_first():
    workers = {"chosen.workers": {"ok": False, "reason": "bad", "hint": ""}}
    changes = TWO_WHEELS, {"numpy.kernels": "Haswell"}, workers
    assert [severity for severity, _ in found(*changes)] == ["broken", "slow", "note"]


def test_problems_are_found_even_if_facts_are_missing():
    for section, facts in HEALTHY.items():
        for name in facts:
            assert all(severity == "note" for severity, _ in found({f"{section}.{name}": None}))
    nothing = {section: dict.fromkeys(facts) for section, facts in HEALTHY.items()}
    assert {each.severity for each in problems_in(nothing)} <= {"note", "slow"}
    assert {each.severity for each in problems_in({})} == {"note"}


# facts


def fake_proc(monkeypatch, tmp_path, **files):
    for name, text in files.items():
        path = tmp_path / "proc" / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for module in (_machine, _probe):
        monkeypatch.setattr(module, "PROC", tmp_path / "proc")
    monkeypatch.setattr(_machine, "CGROUPS", tmp_path / "cgroup")


def test_the_name_of_the_cpu_is_read_from_the_kernel(monkeypatch, tmp_path):
    cpuinfo = "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu\n\nprocessor\t: 1\n"
    fake_proc(monkeypatch, tmp_path, cpuinfo=cpuinfo)
    assert _machine.processor() == "Some CPU"


@pytest.mark.parametrize(
    ("baseline", "dispatched", "simd"),
    [
        (["X86_V2"], ["X86_V3", "X86_V4", "AVX512_ICL"], "AVX-512"),
        (["X86_V2"], ["X86_V3"], "AVX2"),
        (["X86_V2"], [], "SSE"),
        (["X86_V3"], [], "AVX2"),
        (["SSE", "SSE2"], ["AVX", "AVX2", "AVX512F", "AVX512CD", "AVX512_SKX"], "AVX-512"),
        (["SSE", "SSE2"], ["AVX", "AVX2", "AVX512F"], "AVX2"),  # Xeon Phi: OpenBLAS has Haswell
        (["SSE", "SSE2"], ["AVX"], "AVX"),
        (["NEON", "ASIMD"], [], None),
    ],
)
def test_what_the_cpu_has_is_asked_of_numpy(monkeypatch, baseline, dispatched, simd):
    there = {"baseline": baseline, "found": dispatched, "not_found": ["AVX512_SPR", "AVX512_SKX"]}
    monkeypatch.setattr(np, "show_runtime", lambda: print([{"simd_extensions": there}]))
    assert looked_up._simd() == simd


def test_memory_is_told_by_psutil_or_by_linux_or_it_is_said_what_would(monkeypatch, tmp_path):
    fake_proc(monkeypatch, tmp_path, meminfo="MemTotal:  2048 kB\nMemAvailable:   1024 kB\n")
    memory = SimpleNamespace(total=7 << 30, available=3 << 30)
    monkeypatch.setitem(sys.modules, "psutil", SimpleNamespace(virtual_memory=lambda: memory))
    for installed, total, free in ((True, 7 << 30, 3 << 30), (False, 2 << 20, 1 << 20)):
        found = {"psutil": installed}.get
        monkeypatch.setattr(looked_up.importlib.util, "find_spec", found)
        assert looked_up._memory("total", "MemTotal") == total
        assert looked_up._memory("available", "MemAvailable") == free
    (tmp_path / "proc/meminfo").unlink()
    with pytest.raises(LookupError, match="psutil"):
        looked_up._memory("total", "MemTotal")


def test_quota_and_limit_are_the_tightest_of_all_groups_around_us(monkeypatch, tmp_path):
    fake_proc(monkeypatch, tmp_path, self__cgroup="0::/a/b\n")
    inner = tmp_path / "cgroup/a/b"
    inner.mkdir(parents=True)
    assert (_machine.core_quota(), _machine.memory_limit()) == (None, None)
    (inner / "cpu.max").write_text("max 100000\n")
    (inner / "memory.max").write_text("max\n")
    assert (_machine.core_quota(), _machine.memory_limit()) == (None, None)
    (inner / "cpu.max").write_text("300000 100000\n")
    (inner / "memory.max").write_text(f"{1 << 31}\n")
    assert (_machine.core_quota(), _machine.memory_limit()) == (3.0, 1 << 31)
    (inner.parent / "cpu.max").write_text("150000 100000\n")
    (inner.parent / "memory.max").write_text(f"{1 << 30}\n")
    assert (_machine.core_quota(), _machine.memory_limit()) == (1.5, 1 << 30)


def test_quota_and_limit_of_the_older_control_groups_are_read_too(monkeypatch, tmp_path):
    fake_proc(monkeypatch, tmp_path, self__cgroup="4:memory:/a\n2:cpu,cpuacct:/a\n0::/\n")
    for name, text in {
        "cpu/a/cpu.cfs_quota_us": "200000",
        "cpu/a/cpu.cfs_period_us": "100000",
        "cpu/cpu.cfs_quota_us": "-1",
        "cpu/cpu.cfs_period_us": "100000",
        "memory/a/memory.limit_in_bytes": "9223372036854771712",
    }.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert (_machine.core_quota(), _machine.memory_limit()) == (2.0, None)


@pytest.mark.parametrize(
    ("text", "release"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 2023\n"
            "GCC version:  gcc version 12.3.0\n",
            "535.104.05",
        ),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release",
            "580.65.06",
        ),
        ("something new", None),
    ],
)
def test_the_driver_is_read_from_the_kernel(monkeypatch, tmp_path, text, release):
    fake_proc(monkeypatch, tmp_path, driver__nvidia__version=text)
    assert looked_up._driver() == release
    assert str(tmp_path / "proc/driver/nvidia/version") in _probe.nvidia()


def driver_library(status, number):
    def version(reference):
        reference._obj.value = number
        return status

    return SimpleNamespace(cuDriverGetVersion=version)


def test_the_drivers_cuda_is_asked_of_the_driver_itself(monkeypatch):
    monkeypatch.setattr(looked_up, "libcuda", lambda: driver_library(0, 12040))
    assert looked_up._driver_cuda() == "12.4"
    monkeypatch.setattr(looked_up, "libcuda", lambda: driver_library(999, 0))
    with pytest.raises(RuntimeError, match="999"):
        looked_up._driver_cuda()


def test_a_cache_is_writable_if_a_file_can_be_made_there(monkeypatch, tmp_path):
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "not/yet/there"))
    assert looked_up._kernel_cache() == {"ok": True, "reason": str(tmp_path / "not/yet/there")}
    assert not any(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "file/cache"))
    assert not looked_up._kernel_cache()["ok"]  # a file cannot hold one: this holds for root too
    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "1")
    assert looked_up._kernel_cache()["ok"]


def started(number):
    """CuPy on a machine where cuBLAS gives this number for its version."""
    return SimpleNamespace(
        cuda=SimpleNamespace(
            is_available=lambda: number is not None,
            device=SimpleNamespace(get_cublas_handle=lambda: 7),
            cublas=SimpleNamespace(getVersion=lambda handle: number if handle == 7 else 0),
        )
    )


def test_cublas_tells_its_version_where_it_can_be_started(monkeypatch):
    for cupy, version in ((started(120103), "12.1.3"), (started(131000), "13.10.0")):
        monkeypatch.setattr(looked_up, "_cupy", lambda cupy=cupy: cupy)
        assert looked_up._cublas() == version
    for cupy in (started(None), None):
        monkeypatch.setattr(looked_up, "_cupy", lambda cupy=cupy: cupy)
        assert looked_up._cublas() is None


@pytest.mark.parametrize("why", [None, "nvmath-python is not installed"])
def test_whether_products_go_through_cublaslt_is_asked_of_the_products(monkeypatch, why):
    lt = SimpleNamespace(why_not=lambda: why)
    monkeypatch.setitem(sys.modules, "nnxp.kernels.cuda", SimpleNamespace(lt=lt))
    monkeypatch.setitem(sys.modules, "nnxp.kernels.cuda.lt", lt)
    monkeypatch.setattr(looked_up, "_cupy", lambda: started(None))
    answer = {"ok": why is None, "reason": why or "products go through it"}
    assert looked_up._used("lt", "products go through it") == answer
    monkeypatch.setattr(looked_up, "_cupy", lambda: None)
    assert looked_up._used("lt", "products go through it") is None


@pytest.mark.parametrize("why", [None, "nvidia-cudnn-frontend is not installed"])
def test_whether_convolutions_go_through_cudnn_is_asked_of_them(monkeypatch, why):
    cudnn = SimpleNamespace(why_not=lambda: why)
    monkeypatch.setitem(sys.modules, "nnxp.kernels.cuda", SimpleNamespace(cudnn=cudnn))
    monkeypatch.setitem(sys.modules, "nnxp.kernels.cuda.cudnn", cudnn)
    monkeypatch.setattr(looked_up, "_cupy", lambda: started(None))
    answer = looked_up._used("cudnn", "yes")
    assert (answer["ok"], answer["reason"] == why) == (why is None, why is not None)
    monkeypatch.setattr(looked_up, "_cupy", lambda: None)
    assert looked_up._used("cudnn", "yes") is None


class Card:
    """CuPy as it is on a machine with two cards, the second of them ill."""

    __version__ = "14.2.0"

    class CUDARuntimeError(RuntimeError):
        pass

    def __init__(self, count):
        self.count = count
        self.cuda = SimpleNamespace(runtime=self, Device=lambda index: self)
        self.cuda.is_available = lambda: count > 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def getDeviceCount(self):
        return self.count

    def getDeviceProperties(self, index):
        if index:
            raise self.CUDARuntimeError("cudaErrorECCUncorrectable")
        return {"name": b"NVIDIA H100", "major": 9, "minor": 0}

    def memGetInfo(self):
        return 79 << 30, 80 << 30


def test_every_card_is_listed_with_its_memory_or_with_what_ails_it(monkeypatch):
    answers = [nnxp.Availability(True, "NVIDIA H100"), nnxp.Availability(False, "ill", "cure")]
    monkeypatch.setattr(looked_up, "probe", answers.__getitem__)
    monkeypatch.setattr(looked_up, "_cupy", lambda: Card(2))
    devices = looked_up._devices()
    assert devices["cuda:0"]["compute_capability"] == "9.0"
    assert (devices["cuda:0"]["free"], devices["cuda:0"]["memory"]) == (79 << 30, 80 << 30)
    assert "79.0 GiB" in in_words(devices)
    assert devices["cuda:1"]["reason"] == "ill"
    assert "cudaErrorECCUncorrectable" in devices["cuda:1"]["unknown"]
    monkeypatch.setattr(looked_up, "_cupy", lambda: Card(0))
    assert looked_up._devices() == {}


# the whole, on this machine


def test_no_question_can_take_the_diagnosis_down(monkeypatch):
    def fail():
        raise RuntimeError("two\nlines")

    answers = diagnose().facts
    for section, name in [(each, fact) for each, facts in answers.items() for fact in facts]:
        questions = {
            each: {fact: (lambda value=value: value) for fact, value in facts.items()}
            for each, facts in answers.items()
        }
        questions[section][name] = fail
        monkeypatch.setattr(looked_up, "_questions", lambda backend, asks=questions: asks)
        ill = diagnose()
        assert ill.unknown == {f"{section}.{name}": "RuntimeError: two lines"}
        assert "could not be found out (RuntimeError: two lines)" in " ".join(str(ill).split())
        assert not ill.broken
        json.dumps(ill.to_dict())
    nothing = {section: dict.fromkeys(facts, fail) for section, facts in answers.items()}
    monkeypatch.setattr(looked_up, "_questions", lambda backend: nothing)
    assert len(diagnose().unknown) == sum(map(len, answers.values()))


def test_text_and_json_hold_every_fact_and_every_problem(monkeypatch):
    monkeypatch.setenv("CUPY_TF32", "1")
    diagnosis = diagnose()
    said = json.loads(json.dumps(diagnosis.to_dict()))
    words = " ".join(str(diagnosis).split())
    for section, facts in diagnosis.facts.items():
        assert said[section].keys() == facts.keys()
        for name in facts:
            assert f" {name} " in words
    for each in diagnosis.problems:
        assert f"{each.severity} {' '.join(each.what.split())}" in words
        assert f" fix {each.fix}" in words.replace(" \\", "")
    assert "unset CUPY_TF32" in fixes(said)
    assert diagnosis.unknown == {}


@pytest.mark.parametrize(
    ("asked", "variables", "fix"),
    [
        ("cuda:99", {}, None),
        ("nimpy", {}, None),
        ("auto", {"NNXP_BACKEND": "cuda:99"}, "unset NNXP_BACKEND"),
        ("auto", {"NNXP_BACKEND": "nimpy"}, "unset NNXP_BACKEND"),
        ("numpy", {"NNXP_BACKEND": "nimpy"}, "unset NNXP_BACKEND"),
        ("auto", {"NNXP_WORKERS": "all"}, "unset NNXP_WORKERS"),
        ("numpy", {"NNXP_WORKERS": "0"}, "unset NNXP_WORKERS"),
    ],
)
def test_what_is_asked_for_and_cannot_be_had_is_broken(monkeypatch, asked, variables, fix):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    diagnosis = diagnose(asked)
    assert diagnosis.broken
    worst = diagnosis.problems[0]
    assert worst.severity == "broken"
    assert fix in (None, worst.fix)
    for name, value in variables.items():
        assert name in worst.what
        assert value in worst.what


def test_what_is_asked_for_and_can_be_had_is_not_broken(monkeypatch):
    monkeypatch.setenv("NNXP_BACKEND", " numpy ")
    diagnosis = diagnose("sim")
    assert not diagnosis.broken
    assert diagnosis.facts["chosen"]["backend"]["device"] == "sim:0"
    assert diagnosis.facts["chosen"]["NNXP_BACKEND"]["device"] == "cpu"


@pytest.mark.skipif(CUPY.ok, reason="CUDA can be used here: there is nothing to fall back from")
def test_without_cuda_auto_is_content_and_cupy_is_broken():
    """The state of most machines: no CuPy, or CuPy without a driver."""
    code, said = run()
    assert (code, said["ok"]) == (0, True)
    assert said["chosen"]["backend"]["device"] == "cpu"
    assert not {each["severity"] for each in said["problems"]} & {"broken"}
    traces = said["cuda"]["traces"]
    if not traces:
        commands = " ".join([*fixes(said), said["backends"]["cupy"]["hint"]])
        assert "install" not in commands
    elif not HAS_CUPY:
        assert fixes(said)['pip install "cupy-cuda13x[ctk]"'] == "slow"
    code, said = run("--backend", "cupy")
    assert (code, said["ok"]) == (1, False)
    assert said["backends"]["cupy"]["reason"] in said["problems"][0]["what"]


@pytest.mark.nnxp_gpu
def test_with_cuda_the_card_and_its_memory_are_told():
    code, said = run("--backend", "cupy")
    assert (code, said["chosen"]["backend"]["device"]) == (0, "cuda:0")
    assert said["cuda"]["devices"]["cuda:0"]["memory"] > 0


def test_two_cupy_wheels_are_found_where_packages_are_installed(tmp_path):
    for name in ("cupy_cuda11x", "CuPy_CUDA12x"):
        folder = tmp_path / f"{name}-13.6.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 13.6.0\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    code, said = run(PYTHONPATH=path)
    assert code == 0
    assert {"cupy-cuda11x", "cupy-cuda12x"} <= said["cuda"]["wheels"].keys()
    (fix,) = (each for each in fixes(said) if each.startswith("pip uninstall -y "))
    assert "cupy-cuda11x" in fix
    assert "cupy-cuda12x" in fix


@pytest.mark.skipif(not OPENBLAS, reason="NumPy's BLAS here is not OpenBLAS")
def test_a_pin_to_old_kernels_is_found_in_the_running_blas():
    if looked_up._simd() not in ("AVX2", "AVX-512"):
        pytest.skip("this CPU has nothing newer than the kernels that it would be pinned to")
    _, said = run(OPENBLAS_CORETYPE="Nehalem")
    assert said["numpy"]["kernels"] == "Nehalem"
    assert fixes(said)["unset OPENBLAS_CORETYPE"] == "slow"
    assert said["environment"] == {"OPENBLAS_CORETYPE": "Nehalem"}


@pytest.mark.skipif(not OPENBLAS, reason="NumPy's BLAS here is not OpenBLAS")
def test_a_pin_of_threads_is_found_in_the_running_blas():
    if _machine.cores() == 1:
        pytest.skip("with one core, one thread is all there should be")
    _, said = run(OPENBLAS_NUM_THREADS="1")
    assert said["numpy"]["threads"] == 1
    assert fixes(said)["unset OPENBLAS_NUM_THREADS"] == "slow"


def test_a_cache_that_cannot_be_written_is_found(tmp_path):
    (tmp_path / "file").write_text("")
    _, said = run(CUPY_CACHE_DIR=str(tmp_path / "file/cache"))
    assert not said["cuda"]["kernel_cache"]["ok"]
    told = HAS_CUPY and bool(said["cuda"]["traces"])
    assert ('export CUPY_CACHE_DIR="$(mktemp -d)"' in fixes(said)) == told


def test_warnings_as_errors_and_warnings_from_cupy_do_not_disturb_it(tmp_path):
    code, said = run(python=["-W", "error"])
    assert (code, said["unknown"]) == (0, {})


LONG = "pip uninstall -y cupy-cuda12x cupy-cuda13x && pip install 'cupy-cuda12x[ctk]'"


def test_the_text_keeps_to_80_columns_and_commands_stay_whole_for_a_shell():
    reason = "a sentence that goes on for longer than a line holds, " * 4
    made_up = machine({"system.cpu": reason, "chosen.workers": {"ok": True, "reason": reason}})
    problems = (Problem("slow", reason, LONG), Problem("note", reason, reason.capitalize()))
    text = str(Diagnosis(made_up, {"cuda.driver": reason}, problems))
    assert max(map(len, text.splitlines())) <= 80
    told = text.partition("  fix     ")[2].partition("\n  note")[0]
    assert "\\\n" in told
    assert told.replace("\\\n", "").split() == LONG.split()
    assert reason.split() == text.partition("cpu")[2].split()[: len(reason.split())]


def test_importing_nnxp_does_not_load_the_doctor():
    code = "import sys, nnxp; print({'nnxp.doctor', 'nnxp.cli', 'typer'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
