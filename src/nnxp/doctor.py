"""What decides where and how fast nnxp runs here, what is wrong with it, and what mends it.

First facts are found, each on its own, so that a question without an answer takes no other with
it. Then the problems are read off the facts alone.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import platform
import re
import shutil
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from threadpoolctl import threadpool_info

from nnxp._errors import BackendUnavailable
from nnxp.backend import TABLE, available_backends, get_backend
from nnxp.backend._machine import (
    available_memory,
    core_quota,
    cores,
    memory_limit,
    physical_memory,
)
from nnxp.backend._probe import cupy_wheels, probe
from nnxp.backend.cpu import worker_count

PROC, DEV = Path("/proc"), Path("/dev")

VARIABLES = (
    "NNXP_BACKEND",
    "NNXP_WORKERS",
    "OPENBLAS_CORETYPE",
    "OPENBLAS_NUM_THREADS",
    "GOTO_NUM_THREADS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_PATH",
    "LD_LIBRARY_PATH",
    "CUPY_TF32",
    "NVIDIA_TF32_OVERRIDE",
    "CUPY_CACHE_DIR",
    "CUPY_CACHE_IN_MEMORY",
)
# What a CPU has, oldest first: the flags that tell, and the BLAS kernels that make use of it.
SIMD = {
    "SSE": ({"sse2"}, {"generic", "prescott", "core2", "penryn", "nehalem", "barcelona", "atom"}),
    "AVX": ({"avx"}, {"sandybridge", "bulldozer", "piledriver", "steamroller"}),
    "AVX2": ({"avx2", "fma"}, {"haswell", "zen", "zen2", "zen3", "excavator"}),
    "AVX-512": (
        {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
        {"skylakex", "skx", "cooperlake", "sapphirerapids", "zen4", "zen5"},
    ),
}

Facts: TypeAlias = dict[str, dict[str, Any]]
Severity: TypeAlias = Literal["broken", "slow", "note"]
Answer: TypeAlias = dict[str, Any]
"""Whether something is as it should be: {"ok": bool, "reason": str, ...}."""


class Bytes(int):
    """A number of bytes, which reads as one: 22.5 GiB."""

    def __str__(self) -> str:
        return f"{self / 2**30:,.1f} GiB" if self >= 2**30 else f"{self / 2**20:,.0f} MiB"


@dataclass(frozen=True)
class Problem:
    """Something wrong, and the command or line that mends it.

    "broken": what was asked for does not work; "slow": it works, but less well than this machine
    can; "note": it would matter elsewhere, or later.
    """

    severity: Severity
    what: str
    mend: str


@dataclass(frozen=True)
class Diagnosis:
    """The facts by section and name, what could not be found out, and the problems."""

    facts: Facts
    unknown: dict[str, str]
    problems: tuple[Problem, ...]

    @property
    def broken(self) -> bool:
        """Whether something that was asked for does not work."""
        return any(each.severity == "broken" for each in self.problems)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; a fact that could not be found out is None, and in `unknown`."""
        problems = [asdict(each) for each in self.problems]
        return {"ok": not self.broken, "problems": problems, **self.facts, "unknown": self.unknown}

    def __str__(self) -> str:
        width = max(len(name) for section in self.facts.values() for name in section) + 4
        lines = []
        for section, facts in self.facts.items():
            lines.append(section if facts else f"{section}: nothing set")
            for name, value in facts.items():
                missing = self.unknown.get(f"{section}.{name}")
                said = f"could not be found out ({missing})" if missing else _said(value)
                lines += _hanging(f"  {name}".ljust(width), said)
        lines.append("problems" if self.problems else "problems: none")
        for each in self.problems:
            lines += _hanging(f"  {each.severity}".ljust(width), each.what)
            lines.append(f"{'  mend'.ljust(width)}{each.mend}")  # in one piece, to be copied
        return "\n".join(lines)


def diagnose(backend: str = "auto") -> Diagnosis:
    """Everything that decides where and how fast nnxp runs in this process, and what is wrong.

    `backend` is a name as for `nnxp.get_backend`; one that cannot be used is a problem. Looks at
    CUDA even if NNXP_BACKEND=numpy says not to use it. Never raises.
    """
    facts: Facts = {}
    unknown: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what CuPy warns of at import is found here by itself
        for section, questions in _questions(backend).items():
            facts[section] = {}
            for name, ask in questions.items():
                try:
                    facts[section][name] = ask()
                except Exception as error:
                    facts[section][name] = None
                    unknown[f"{section}.{name}"] = _one_line(error)
    return Diagnosis(facts, unknown, problems_in(facts))


def problems_in(facts: Facts) -> tuple[Problem, ...]:
    """The problems that the facts show, the worst first."""
    found: list[Problem] = []
    for find in (
        *(_asked_for, _about_cuda, _about_products),
        *(_about_kernels, _about_threads, _about_tf32),
    ):
        try:
            found += find(facts)
        except Exception as error:  # a fact is missing
            what = f"{find.__name__.strip('_').replace('_', ' ')}: not all facts could be found out"
            found.append(Problem("note", f"{what} ({_one_line(error)})", "nnxp doctor --json"))
    found.sort(key=lambda each: ("broken", "slow", "note").index(each.severity))
    return tuple(found)


def _questions(backend: str) -> dict[str, dict[str, Callable[[], Any]]]:
    chosen: dict[str, Callable[[], Any]] = {"backend": partial(_chosen, backend)}
    if backend != "auto" and _variable("NNXP_BACKEND"):
        chosen["NNXP_BACKEND"] = partial(_chosen, _variable("NNXP_BACKEND"))
    return {
        "system": {
            "nnxp": _own_version,
            "python": lambda: f"{platform.python_version()} ({sys.executable})",
            "platform": platform.platform,
            "cpu": _cpu,
            "simd": _simd,
            "cores": cores,
            "core_quota": core_quota,
            "memory": lambda: _bytes(physical_memory()),
            "free_memory": lambda: _bytes(available_memory()),
            "memory_limit": lambda: _bytes(memory_limit()),
        },
        "numpy": {
            "numpy": lambda: np.__version__,
            "built_with": _blas_of_the_build,
            "blas": lambda: _blas().get("internal_api"),
            "blas_version": lambda: _blas().get("version"),
            "kernels": lambda: _blas().get("architecture"),
            "threads": lambda: _blas().get("num_threads"),
            "threading": lambda: _blas().get("threading_layer"),
            "float32_gflops": _gflops,
        },
        "cuda": {
            "traces": _traces,
            "driver": _driver,
            "driver_cuda": _driver_cuda,
            "wheels": cupy_wheels,
            "cupy": _cupy_version,
            "cupy_cuda": _cupy_cuda,
            "nvrtc": _nvrtc,
            "cublas": _cublas,
            "cublaslt": _cublaslt,
            "kernel_cache": _kernel_cache,
            "devices": _devices,
            "nvmath-python": partial(_version, "nvmath-python"),
            "cuda-bindings": partial(_version, "cuda-bindings"),
        },
        "packages": {
            name: partial(_version, name)
            for name in ("safetensors", "threadpoolctl", "typer", "ml_dtypes", "scikit-learn")
        },
        "environment": {
            name: partial(_variable, name)
            for name in VARIABLES
            if name in os.environ and (name != "LD_LIBRARY_PATH" or "cuda" in _variable(name))
        },
        "backends": {name: partial(_availability, name) for name, _, _ in TABLE},
        "chosen": {**chosen, "workers": _workers},
    }


# The facts


def _own_version() -> str:
    import nnxp

    return nnxp.__version__


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _variable(name: str) -> str:
    return os.environ.get(name, "").strip()


def _in_proc(file: str, pattern: str) -> str | None:
    """What the pattern's group finds in a file of the kernel's, if that is there."""
    path = PROC / file
    found = re.search(pattern, path.read_text(), re.MULTILINE) if path.exists() else None
    return found[1] if found else None


def _cpu() -> str:
    name = _in_proc("cpuinfo", r"^model name\s*:\s*(.+)$")
    return name or platform.processor() or platform.machine()


def _simd() -> str | None:
    """The newest of SIMD that the CPU has; None if its flags are not those of x86."""
    flags = set((_in_proc("cpuinfo", r"^flags\s*:\s*(.+)$") or "").split())
    return next((name for name, (own, _) in reversed(SIMD.items()) if own <= flags), None)


def _bytes(number: int | None) -> Bytes | None:
    return None if number is None else Bytes(number)


def _blas() -> dict[str, Any]:
    """What threadpoolctl tells of NumPy's BLAS; empty if it knows none."""
    found = [each for each in threadpool_info() if each.get("user_api") == "blas"]
    found.sort(key=lambda each: "numpy" not in each.get("filepath", ""))  # SciPy may have its own
    return found[0] if found else {}


def _gflops() -> float:
    """Billions of floating-point operations a second, measured: the best of ten products."""
    x = np.full((1024, 1024), 0.5, "float32")
    out = np.empty_like(x)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        np.matmul(x, x, out=out)
        seconds.append(time.perf_counter() - start)
    return round(2 * 1024**3 / min(seconds) / 1e9, 1)


def _blas_of_the_build() -> str | None:
    config: Any = np.show_config(mode="dicts")
    name: str | None = config["Build Dependencies"]["blas"].get("name")
    return name


def _traces() -> list[str]:
    """What there is of NVIDIA on this machine."""
    files = [PROC / "driver/nvidia/version", DEV / "nvidiactl"]
    found = [str(file) for file in files if file.exists()]
    found += filter(None, [shutil.which("nvidia-smi")])
    return found + (["libcuda"] if _libcuda() else [])


def _libcuda() -> Any:
    try:
        return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return None


def _driver() -> str | None:
    """The release of the kernel's driver, such as 580.65.06."""
    return _in_proc("driver/nvidia/version", r"Kernel Module.*?\s(\d{3,}\.[\d.]+)\s")


def _driver_cuda() -> str | None:
    """The newest CUDA that the driver runs; None without a driver."""
    library, number = _libcuda(), ctypes.c_int()
    if library is None:
        return None
    status = library.cuDriverGetVersion(ctypes.byref(number))
    if status != 0:
        raise RuntimeError(f"cuDriverGetVersion gave error {status}")
    return _dotted(number.value)


def _dotted(number: int) -> str:
    """CUDA's way to number its versions: 13020 is 13.2."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _cupy() -> Any:
    """CuPy; None if it is not installed."""
    if importlib.util.find_spec("cupy") is None:
        return None
    return importlib.import_module("cupy")


def _cupy_version() -> str | None:
    cupy = _cupy()
    return cupy and str(cupy.__version__)


def _cupy_cuda() -> str | None:
    """The CUDA that CuPy was built for."""
    cupy = _cupy()
    return cupy and _dotted(cupy.cuda.runtime.runtimeGetVersion())


def _nvrtc() -> Answer | None:
    cupy = _cupy()
    if cupy is None:
        return None
    try:
        return {"ok": True, "reason": ".".join(map(str, cupy.cuda.nvrtc.getVersion()))}
    except Exception as error:
        return {"ok": False, "reason": _one_line(error)}


def _cublas() -> str | None:
    """The version of cuBLAS; None without a device, for it tells only where it has been started."""
    cupy = _cupy()
    if cupy is None or not cupy.cuda.is_available():
        return None
    number = cupy.cuda.cublas.getVersion(cupy.cuda.device.get_cublas_handle())
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def _cublaslt() -> Answer | None:
    """Whether products go through cuBLASLt, by NVIDIA's bindings, or through CuPy's matmul."""
    if _cupy() is None:
        return None
    from nnxp.kernels.cuda._lt import why_not

    why = why_not()
    return {"ok": why is None, "reason": why or "products go through it"}


def _kernel_cache() -> Answer:
    """Whether CuPy may write where it keeps the kernels that it has compiled."""
    if _variable("CUPY_CACHE_IN_MEMORY") not in ("", "0"):
        return {"ok": True, "reason": "in memory"}
    folder = Path(os.environ.get("CUPY_CACHE_DIR") or "~/.cupy/kernel_cache").expanduser()
    try:
        nearest = next(each for each in (folder, *folder.parents) if each.exists())
        with tempfile.TemporaryFile(dir=nearest):  # asking for permissions tells root nothing
            return {"ok": True, "reason": str(folder)}
    except OSError as error:
        return {"ok": False, "reason": f"{folder}: {error.strerror}"}


def _devices() -> dict[str, Answer]:
    cupy = _cupy()
    if cupy is None:
        return {}
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError:
        return {}  # the backend's own reason tells why
    return {f"cuda:{index}": _device(cupy, index) for index in range(count)}


def _device(cupy: Any, index: int) -> Answer:
    found = {**asdict(probe(index)), "name": None}
    try:
        properties = cupy.cuda.runtime.getDeviceProperties(index)
        found["name"] = properties["name"].decode()
        found["compute_capability"] = f"{properties['major']}.{properties['minor']}"
        with cupy.cuda.Device(index):
            found["free"], found["memory"] = map(Bytes, cupy.cuda.runtime.memGetInfo())
    except Exception as error:
        found["unknown"] = _one_line(error)
    return found


def _availability(name: str) -> Answer:
    return asdict(available_backends()[name])


def _chosen(name: str) -> Answer:
    """The backend that this name leads to."""
    asked = name if name != "auto" else _variable("NNXP_BACKEND") or "auto"
    try:
        found = get_backend(name)
    except BackendUnavailable as error:
        return {"asked": asked, "ok": False, "reason": error.reason, "hint": error.hint}
    where = {"backend": found.name, "device": found.device}
    return {"asked": asked, "ok": True, "reason": f"{found.device}: {found.why}", **where}


def _workers() -> Answer:
    try:
        return {
            "ok": True,
            "reason": f"{worker_count()} threads on the CPU",
            "count": worker_count(),
        }
    except BackendUnavailable as error:
        return {"ok": False, "reason": error.reason, "hint": error.hint}


# The problems


def _asked_for(facts: Facts) -> Iterator[Problem]:
    for name, answer in facts["chosen"].items():
        if answer is None or answer["ok"]:
            continue
        reason, hint = answer["reason"], answer["hint"]
        if reason.startswith("NNXP_WORKERS=") and name != "workers":
            continue  # the same again: it keeps the CPU from being chosen, too
        if name == "workers":
            yield Problem("broken", reason, "unset NNXP_WORKERS")
        elif name == "NNXP_BACKEND" or reason.startswith("NNXP_BACKEND="):
            reason = reason.replace(f"backend={answer['asked']!r}", f"{name}={answer['asked']}", 1)
            yield Problem("broken", f"{reason}. {hint}", "unset NNXP_BACKEND")
        else:
            yield Problem("broken", reason, hint)


def _about_cuda(facts: Facts) -> Iterator[Problem]:
    """Every cause for which CUDA cannot be used; what the probe itself said if none is known."""
    cuda, found = facts["cuda"], facts["backends"]["cupy"]
    asked = [each.get("asked", "") for each in facts["chosen"].values() if each and not each["ok"]]
    severity: Severity = "note"
    if found is None or not found["ok"]:
        if cuda["traces"]:
            severity = "slow"
        if any(str(name).lower().startswith(("cupy", "cuda")) for name in asked):
            severity = "broken"
    causes = list(_cuda_causes(cuda))
    if not causes:
        answers = [found, *(cuda["devices"] or {}).values()]
        causes = [(each["reason"], each["hint"]) for each in answers if each and not each["ok"]]
    for what, mend in dict.fromkeys(causes):
        yield Problem(severity, what, mend)


def _cuda_causes(cuda: dict[str, Any]) -> Iterator[tuple[str, str]]:
    driver, built_for = _major(cuda["driver_cuda"]), _major(cuda["cupy_cuda"])
    traces, wheels, cache = cuda["traces"] or [], list(cuda["wheels"] or {}), cuda["kernel_cache"]
    install = f'pip install "cupy-cuda{12 if driver == 12 else 13}x[ctk]"'
    other_wheel = f"pip uninstall -y {' '.join(wheels)} && {install}"
    too_new = driver is not None and built_for is not None and driver < built_for
    if len(wheels) > 1:
        yield (
            f"{len(wheels)} CuPy wheels are installed ({', '.join(wheels)}), and each has "
            "overwritten files of the others",
            other_wheel,
        )
    if not wheels and cuda["cupy"] is None:
        here = f", and there are traces of NVIDIA here: {', '.join(traces)}" if traces else ""
        yield f"CuPy is not installed{here}", install
        return
    if cache and not cache["ok"]:
        yield (
            f"CuPy cannot keep compiled kernels in {cache['reason']}",
            'export CUPY_CACHE_DIR="$(mktemp -d)"',
        )
    elif cuda["cupy"] is None and len(wheels) == 1:
        return  # it cannot be imported, and the probe says why
    at_most = f"the NVIDIA driver runs CUDA {cuda['driver_cuda']} at most"
    if driver is None:
        if "libcuda" not in traces:
            yield _no_driver(traces)
    elif driver < 12:
        yield (
            f"{at_most}, and CuPy needs 12",
            "Update the NVIDIA driver: 525 is the first for CUDA 12, 580 for CUDA 13",
        )
    elif too_new and len(wheels) < 2:
        yield f"{at_most}, and CuPy was built for {cuda['cupy_cuda']}", other_wheel
    elif not cuda["devices"] and "CUDA_VISIBLE_DEVICES" in os.environ:
        yield (
            f"no GPU is visible, and CUDA_VISIBLE_DEVICES={_variable('CUDA_VISIBLE_DEVICES')!r} "
            "decides which are",
            "unset CUDA_VISIBLE_DEVICES",
        )
    if cuda["nvrtc"] and not cuda["nvrtc"]["ok"] and not too_new and len(wheels) < 2:
        # Without a wheel, CuPy was built here, or by conda: a wheel would be a second CuPy.
        wheel = next((name for name in wheels if name != "cupy"), None)
        toolkit = f"Install the CUDA toolkit {cuda['cupy_cuda']}, and set CUDA_PATH to it"
        mend = f'pip install "{wheel}[ctk]"' if wheel else toolkit
        yield "NVRTC, which compiles CuPy's kernels, cannot be loaded", mend


def _no_driver(traces: list[str]) -> tuple[str, str]:
    if traces:
        return (
            f"there are traces of NVIDIA here ({', '.join(traces)}), but the driver's library "
            "libcuda cannot be loaded",
            "Install the NVIDIA driver (in a container: --gpus all)",
        )
    return (
        "CuPy is installed, but there is no NVIDIA driver",
        "Where there is an NVIDIA GPU, install its driver (in a container: --gpus all)",
    )


def _about_products(facts: Facts) -> Iterator[Problem]:
    """A GPU that works, without the bindings that make the most of it."""
    cuda, found = facts["cuda"], facts["backends"]["cupy"]
    if not (found and found["ok"]) or cuda["cublaslt"] is None or cuda["cublaslt"]["ok"]:
        return
    bindings = ">=12.9.2,<13" if _major(cuda["cupy_cuda"]) == 12 else ">=13.0.1,<14"
    why = cuda["cublaslt"]["reason"].partition("; pip install")[0]
    yield Problem(
        "slow",
        f"products on the GPU go through CuPy, which adds passes over memory and cannot replay few "
        f"rows as a CUDA graph: {why}",
        f'pip install nvmath-python "cuda-bindings{bindings}"',
    )


def _about_kernels(facts: Facts) -> Iterator[Problem]:
    blas, simd = facts["numpy"], facts["system"]["simd"]
    if blas["blas"] is None:
        made_with = str(blas["built_with"] or "no BLAS").lower()
        if not any(name in made_with for name in ("openblas", "mkl", "blis", "accelerate")):
            yield Problem(
                "slow",
                f"NumPy {blas['numpy']} was built with {made_with}, which is none of the fast ones",
                "pip install --force-reinstall --only-binary=numpy numpy",
            )
        return
    kernels = blas["kernels"] or ""
    made_for = next((name for name, (_, known) in SIMD.items() if kernels.lower() in known), None)
    ranks = list(SIMD)
    if simd is None or made_for is None or ranks.index(made_for) >= ranks.index(simd):
        return
    what = f"this CPU has {simd}, but {blas['blas']} uses its {kernels} kernels, for {made_for}"
    if blas.get("float32_gflops"):
        what += f" ({blas['float32_gflops']} GF/s measured)"
    if "OPENBLAS_CORETYPE" in os.environ:
        what += f", because OPENBLAS_CORETYPE={_variable('OPENBLAS_CORETYPE')} says so"
        yield Problem("slow", what, "unset OPENBLAS_CORETYPE")
    else:
        yield Problem("slow", what, "pip install --upgrade numpy")


def _about_threads(facts: Facts) -> Iterator[Problem]:
    system, blas, workers = facts["system"], facts["numpy"], facts["chosen"]["workers"]
    quota = system["core_quota"]
    usable = min(system["cores"], math.ceil(quota or system["cores"]))
    pinned = [name for name in _PINS.get(blas["blas"], ()) if _variable(name)]
    if pinned and blas["threads"] not in (usable, None):
        settings = ", ".join(f"{name}={_variable(name)}" for name in pinned)
        yield Problem(
            "slow",
            f"{settings}: the threads of BLAS are {blas['threads']}, and {usable} cores may be "
            "used. model(x) is slower for it; an Engine over many rows has its own threads",
            f"unset {' '.join(pinned)}",
        )
    if workers and workers["ok"] and workers["count"] != usable:
        by = "NNXP_WORKERS says so" if _variable("NNXP_WORKERS") else "so many cores are seen"
        line = "unset NNXP_WORKERS"
        if quota and system["cores"] > usable:
            line = f"export NNXP_WORKERS={usable}"
        yield Problem(
            "slow",
            f"an Engine takes {workers['count']} threads because {by}, where the time of {usable} "
            "cores may be used",
            line,
        )


_PINS = {
    "openblas": ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS"),
    "mkl": ("MKL_NUM_THREADS", "OMP_NUM_THREADS"),
    "blis": ("BLIS_NUM_THREADS", "OMP_NUM_THREADS"),
}


def _about_tf32(facts: Facts) -> Iterator[Problem]:
    for name in ("CUPY_TF32", "NVIDIA_TF32_OVERRIDE"):
        if _variable(name) not in ("", "0"):
            yield Problem(
                "note",
                f"{name}={_variable(name)}: on a GPU float32 products are rounded to TF32, a "
                "thousand times less exact",
                f"unset {name}",
            )


# The words


def _major(dotted: str | None) -> int | None:
    return int(dotted.partition(".")[0]) if dotted else None


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _said(value: Any) -> str:
    if value is None or value in ([], {}):
        return "none"
    if isinstance(value, list):
        return ", ".join(value)
    if not isinstance(value, dict):
        return str(value)
    if "ok" not in value:
        return "; ".join(f"{name} {_said(each)}" for name, each in value.items())
    silent = ("ok", "reason", "hint", "asked", "backend", "device", "count", "name")
    more = [f"{name} {each}" for name, each in value.items() if name not in silent]
    return ", ".join([("" if value["ok"] else "not usable: ") + value["reason"], *more])


def _hanging(label: str, text: str) -> list[str]:
    """The text beside its label, and its further lines under the first."""
    return textwrap.wrap(
        text,
        100,
        initial_indent=label,
        subsequent_indent=" " * len(label),
        break_long_words=False,
        break_on_hyphens=False,
    )
