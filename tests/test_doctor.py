"""The doctor: finds every known trouble, names the line that mends it, and never falls ill itself.

Problems are read off facts alone, so most of this is done on the facts of machines made up here.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from threadpoolctl import threadpool_info

import nnxp
from nnxp import doctor
from nnxp.backend import _machine
from nnxp.doctor import diagnose, problems_in

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
    },
    "cuda": {
        "traces": ["/proc/driver/nvidia/version", "libcuda"],
        "driver_cuda": "13.0",
        "wheels": {"cupy-cuda13x": "14.2.0"},
        "cupy": "14.2.0",
        "cupy_cuda": "13.2",
        "nvrtc": {"ok": True, "reason": "13.0"},
        "cublaslt": {"ok": True, "reason": "products go through it"},
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
FAILED = {"ok": False, "reason": "it failed", "hint": "mend it"}
NO_GPU = {"backends.cupy": FAILED}
NO_CUPY = {
    "cuda.wheels": {},
    "cuda.cupy": None,
    "cuda.cupy_cuda": None,
    "cuda.nvrtc": None,
    "cuda.cublaslt": None,
    "cuda.devices": {},
}
NO_DRIVER = {"cuda.traces": [], "cuda.driver_cuda": None, "cuda.devices": {}}
TWO_WHEELS = {"cuda.wheels": {"cupy-cuda12x": "13.6.0", "cupy-cuda13x": "14.2.0"}}


@pytest.fixture(autouse=True)
def _no_variable_of_the_person_who_runs_this(monkeypatch):
    for name in doctor.VARIABLES:
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
    """The problems of that machine, as (severity, mend)."""
    return [(each.severity, each.mend) for each in problems_in(machine(*changes))]


def run(*args, python=(), **environment):
    """`nnxp doctor --json` in a process of its own: (exit code, what it said)."""
    variables = {name: v for name, v in os.environ.items() if name not in doctor.VARIABLES}
    done = subprocess.run(
        [sys.executable, *python, "-m", "nnxp", "doctor", "--json", *args],
        env=variables | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def mends(said):
    return {each["mend"]: each["severity"] for each in said["problems"]}


# problems, on machines made up here


def test_a_healthy_machine_has_no_problems():
    assert found() == []


@pytest.mark.parametrize(
    ("changes", "severity", "mend"),
    [
        ([NO_CUPY, NO_DRIVER], "note", 'pip install "cupy-cuda13x[ctk]"'),
        ([NO_CUPY], "slow", 'pip install "cupy-cuda13x[ctk]"'),
        ([NO_CUPY, {"cuda.driver_cuda": "12.4"}], "slow", 'pip install "cupy-cuda12x[ctk]"'),
        (
            [NO_CUPY, NO_DRIVER, {"cuda.traces": ["nvidia-smi"]}],
            "slow",
            'pip install "cupy-cuda13x[ctk]"',
        ),
        (
            [NO_DRIVER],
            "note",
            "Where there is an NVIDIA GPU, install its driver (in a container: --gpus all)",
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
        ([{"cuda.driver_cuda": None}], "slow", "mend it"),  # libcuda is there, but says nothing
        (
            [TWO_WHEELS, {"cuda.nvrtc": FAILED}],
            "slow",
            'pip uninstall -y cupy-cuda12x cupy-cuda13x && pip install "cupy-cuda13x[ctk]"',
        ),
        ([{"cuda.kernel_cache": FAILED}], "slow", 'export CUPY_CACHE_DIR="$(mktemp -d)"'),
        ([{"cuda.cupy": None, "cuda.cupy_cuda": None}], "slow", "mend it"),  # as the probe says
        ([{"cuda.devices": {"cuda:0": FAILED}}], "slow", "mend it"),
    ],
)
def test_each_reason_for_which_cuda_cannot_be_used_has_the_line_that_mends_it(
    changes, severity, mend
):
    assert found(NO_GPU, *changes) == [(severity, mend)]
    asked = {"chosen.backend": {"asked": "cuda", **FAILED}}
    assert ("broken", mend) in found(NO_GPU, asked, *changes)


def test_what_could_hurt_a_gpu_that_works_is_a_note():
    assert found(TWO_WHEELS)[0][0] == "note"
    assert found({"cuda.kernel_cache": FAILED})[0][0] == "note"
    cards = {"cuda:0": HEALTHY["cuda"]["devices"]["cuda:0"], "cuda:1": FAILED}
    assert found({"cuda.devices": cards}) == [("note", "mend it")]


@pytest.mark.parametrize(
    ("cupy_cuda", "bindings"), [("12.9", ">=12.9.2,<13"), ("13.2", ">=13.0.1,<14")]
)
def test_bindings_that_are_missing_are_a_matter_of_speed_where_a_gpu_works(cupy_cuda, bindings):
    reason = "nvmath-python is not installed; pip install nvmath-python brings it"
    missing = {"cuda.cublaslt": {"ok": False, "reason": reason}, "cuda.cupy_cuda": cupy_cuda}
    mend = f'pip install nvmath-python "cuda-bindings{bindings}"'
    assert found(missing) == [("slow", mend)]
    (problem,) = problems_in(machine(missing))
    assert problem.what.endswith(": nvmath-python is not installed")
    without = found(NO_GPU, NO_DRIVER, missing)
    assert mend not in [each for _, each in without]


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
    monkeypatch.setattr(doctor, "PROC", tmp_path / "proc")
    monkeypatch.setattr(_machine, "PROC", tmp_path / "proc")
    monkeypatch.setattr(_machine, "CGROUPS", tmp_path / "cgroup")


@pytest.mark.parametrize(
    ("flags", "simd"),
    [
        ("fpu sse2 avx avx2 fma avx512f avx512bw avx512dq avx512vl", "AVX-512"),
        ("fpu sse2 avx avx2 fma avx512f", "AVX2"),  # Xeon Phi: OpenBLAS has Haswell for it
        ("fpu sse2 avx", "AVX"),
        ("fpu sse2", "SSE"),
        ("", None),
    ],
)
def test_the_cpu_is_read_from_the_kernel(monkeypatch, tmp_path, flags, simd):
    cpuinfo = f"processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: {flags}\n\nprocessor\t: 1\n"
    fake_proc(monkeypatch, tmp_path, cpuinfo=cpuinfo)
    assert (doctor._cpu(), doctor._simd()) == ("Some CPU", simd)


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
    assert doctor._driver() == release
    assert str(tmp_path / "proc/driver/nvidia/version") in doctor._traces()


def driver_library(status, number):
    def version(reference):
        reference._obj.value = number
        return status

    return SimpleNamespace(cuDriverGetVersion=version)


def test_the_drivers_cuda_is_asked_of_the_driver_itself(monkeypatch):
    monkeypatch.setattr(doctor, "_libcuda", lambda: driver_library(0, 12040))
    assert doctor._driver_cuda() == "12.4"
    assert "libcuda" in doctor._traces()
    monkeypatch.setattr(doctor, "_libcuda", lambda: driver_library(999, 0))
    with pytest.raises(RuntimeError, match="999"):
        doctor._driver_cuda()


def test_a_cache_is_writable_if_a_file_can_be_made_there(monkeypatch, tmp_path):
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "not/yet/there"))
    assert doctor._kernel_cache() == {"ok": True, "reason": str(tmp_path / "not/yet/there")}
    assert not any(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "file/cache"))
    assert not doctor._kernel_cache()["ok"]  # a file cannot hold one: this holds for root too
    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "1")
    assert doctor._kernel_cache()["ok"]


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
        monkeypatch.setattr(doctor, "_cupy", lambda cupy=cupy: cupy)
        assert doctor._cublas() == version
    for cupy in (started(None), None):
        monkeypatch.setattr(doctor, "_cupy", lambda cupy=cupy: cupy)
        assert doctor._cublas() is None


@pytest.mark.parametrize("why", [None, "nvmath-python is not installed; pip install it"])
def test_whether_products_go_through_cublaslt_is_asked_of_the_products(monkeypatch, why):
    lt = SimpleNamespace(why_not=lambda: why)
    monkeypatch.setitem(sys.modules, "nnxp.kernels.cuda", SimpleNamespace(_lt=lt))
    monkeypatch.setitem(sys.modules, "nnxp.kernels.cuda._lt", lt)
    monkeypatch.setattr(doctor, "_cupy", lambda: started(None))
    assert doctor._cublaslt() == {"ok": why is None, "reason": why or "products go through it"}
    monkeypatch.setattr(doctor, "_cupy", lambda: None)
    assert doctor._cublaslt() is None


class Card:
    """CuPy as it is on a machine with two cards, the second of them ill."""

    __version__ = "14.2.0"

    class CUDARuntimeError(RuntimeError):
        pass

    def __init__(self, count):
        self.count = count
        self.cuda = SimpleNamespace(runtime=self, Device=lambda index: self)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def getDeviceCount(self):
        if self.count == 0:
            raise self.CUDARuntimeError("cudaErrorNoDevice")
        return self.count

    def getDeviceProperties(self, index):
        if index:
            raise self.CUDARuntimeError("cudaErrorECCUncorrectable")
        return {"name": b"NVIDIA H100", "major": 9, "minor": 0}

    def memGetInfo(self):
        return 79 << 30, 80 << 30


def test_every_card_is_listed_with_its_memory_or_with_what_ails_it(monkeypatch):
    answers = [nnxp.Availability(True, "NVIDIA H100"), nnxp.Availability(False, "ill", "cure")]
    monkeypatch.setattr(doctor, "probe", answers.__getitem__)
    monkeypatch.setattr(doctor, "_cupy", lambda: Card(2))
    devices = doctor._devices()
    assert devices["cuda:0"]["compute_capability"] == "9.0"
    assert (devices["cuda:0"]["free"], devices["cuda:0"]["memory"]) == (79 << 30, 80 << 30)
    assert "79.0 GiB" in doctor._said(devices)
    assert devices["cuda:1"]["reason"] == "ill"
    assert "cudaErrorECCUncorrectable" in devices["cuda:1"]["unknown"]
    monkeypatch.setattr(doctor, "_cupy", lambda: Card(0))
    assert doctor._devices() == {}


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
        monkeypatch.setattr(doctor, "_questions", lambda backend, asks=questions: asks)
        ill = diagnose()
        assert ill.unknown == {f"{section}.{name}": "RuntimeError: two lines"}
        assert "could not be found out (RuntimeError: two lines)" in " ".join(str(ill).split())
        assert not ill.broken
        json.dumps(ill.to_dict())
    nothing = {section: dict.fromkeys(facts, fail) for section, facts in answers.items()}
    monkeypatch.setattr(doctor, "_questions", lambda backend: nothing)
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
        assert f" mend {each.mend}\n" in re.sub(" +", " ", str(diagnosis)) + "\n"
    assert "unset CUPY_TF32" in mends(said)
    assert diagnosis.unknown == {}


@pytest.mark.parametrize(
    ("asked", "variables", "mend"),
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
def test_what_is_asked_for_and_cannot_be_had_is_broken(monkeypatch, asked, variables, mend):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    diagnosis = diagnose(asked)
    assert diagnosis.broken
    worst = diagnosis.problems[0]
    assert worst.severity == "broken"
    assert mend in (None, worst.mend)
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
    if not HAS_CUPY:
        assert mends(said)['pip install "cupy-cuda13x[ctk]"'] == ("slow" if traces else "note")
    elif not traces:
        assert any("driver" in mend for mend in mends(said))
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
    (mend,) = (each for each in mends(said) if each.startswith("pip uninstall -y "))
    assert "cupy-cuda11x" in mend
    assert "cupy-cuda12x" in mend


@pytest.mark.skipif(not OPENBLAS, reason="NumPy's BLAS here is not OpenBLAS")
def test_a_pin_to_old_kernels_is_found_in_the_running_blas():
    if doctor._simd() not in ("AVX2", "AVX-512"):
        pytest.skip("this CPU has nothing newer than the kernels that it would be pinned to")
    _, said = run(OPENBLAS_CORETYPE="Nehalem")
    assert said["numpy"]["kernels"] == "Nehalem"
    assert mends(said)["unset OPENBLAS_CORETYPE"] == "slow"
    assert said["environment"] == {"OPENBLAS_CORETYPE": "Nehalem"}


@pytest.mark.skipif(not OPENBLAS, reason="NumPy's BLAS here is not OpenBLAS")
def test_a_pin_of_threads_is_found_in_the_running_blas():
    if _machine.cores() == 1:
        pytest.skip("with one core, one thread is all there should be")
    _, said = run(OPENBLAS_NUM_THREADS="1")
    assert said["numpy"]["threads"] == 1
    assert mends(said)["unset OPENBLAS_NUM_THREADS"] == "slow"


def test_a_cache_that_cannot_be_written_is_found(tmp_path):
    (tmp_path / "file").write_text("")
    _, said = run(CUPY_CACHE_DIR=str(tmp_path / "file/cache"))
    assert not said["cuda"]["kernel_cache"]["ok"]
    assert ('export CUPY_CACHE_DIR="$(mktemp -d)"' in mends(said)) == HAS_CUPY


def test_warnings_as_errors_and_warnings_from_cupy_do_not_disturb_it(tmp_path):
    code, said = run(python=["-W", "error"])
    assert (code, said["unknown"]) == (0, {})


def test_importing_nnxp_does_not_load_the_doctor():
    code = "import sys, nnxp; print({'nnxp.doctor', 'nnxp.cli', 'typer'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
