"""The facts that decide where and how fast nnxp runs, each found on its own."""

from __future__ import annotations

import ctypes
import importlib.util
import io
import os
import platform
import re
import sys
import tempfile
import timeit
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from threadpoolctl import threadpool_info

from nnxp._errors import BackendUnavailable
from nnxp.backend import TABLE, available_backends, get_backend
from nnxp.backend._machine import core_quota, cores, in_proc, meminfo, memory_limit, processor
from nnxp.backend._probe import cupy_wheels, libcuda, nvidia, probe
from nnxp.backend.cpu import worker_count

VARIABLES = """
    NNXP_BACKEND NNXP_WORKERS OPENBLAS_CORETYPE OPENBLAS_NUM_THREADS GOTO_NUM_THREADS
    OMP_NUM_THREADS MKL_NUM_THREADS BLIS_NUM_THREADS CUDA_VISIBLE_DEVICES CUDA_PATH LD_LIBRARY_PATH
    CUPY_TF32 NVIDIA_TF32_OVERRIDE CUPY_CACHE_DIR CUPY_CACHE_IN_MEMORY
""".split()
# What a CPU has, oldest first: NumPy's names for it (before 2.4, and since), and the BLAS kernels
# that make use of it.
SIMD = {
    "SSE": ("SSE2 X86_V2", "generic prescott core2 penryn nehalem barcelona atom"),
    "AVX": ("AVX", "sandybridge bulldozer piledriver steamroller"),
    "AVX2": ("AVX2 X86_V3", "haswell zen zen2 zen3 excavator"),
    "AVX-512": ("AVX512_SKX X86_V4", "skylakex skx cooperlake sapphirerapids zen4 zen5"),
}

NVIDIAS = "nvmath-python", "cuda-bindings", "nvidia-cudnn-frontend"

Facts: TypeAlias = dict[str, dict[str, Any]]
Answer: TypeAlias = dict[str, Any]
"""Whether something is as it should be: {"ok": bool, "reason": str, ...}."""


class Bytes(int):
    """A number of bytes, which reads as one: 22.5 GiB."""

    def __str__(self) -> str:
        return f"{self / 2**30:,.1f} GiB" if self >= 2**30 else f"{self / 2**20:,.0f} MiB"


def find(backend: str) -> tuple[Facts, dict[str, str]]:
    """The facts by section and name, and why those that are None could not be found out."""
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
                    unknown[f"{section}.{name}"] = one_line(error)
    return facts, unknown


def _questions(backend: str) -> dict[str, dict[str, Callable[[], Any]]]:
    chosen: dict[str, Callable[[], Any]] = {"backend": partial(_chosen, backend)}
    by_variable = variable("NNXP_BACKEND")
    if backend != "auto" and by_variable:
        chosen["NNXP_BACKEND"] = partial(_chosen, by_variable)
    return {
        "system": {
            "nnxp": lambda: import_module("nnxp").__version__,
            "python": lambda: f"{platform.python_version()} ({sys.executable})",
            "platform": platform.platform,
            "cpu": processor,
            "simd": _simd,
            "cores": cores,
            "core_quota": core_quota,
            "memory": partial(_memory, "total", "MemTotal"),
            "free_memory": partial(_memory, "available", "MemAvailable"),
            "memory_limit": lambda: (limit := memory_limit()) and Bytes(limit),
        },
        "numpy": {
            "numpy": lambda: np.__version__,
            "built_with": _blas_of_the_build,
            "blas": partial(_blas, "internal_api"),
            "blas_version": partial(_blas, "version"),
            "kernels": partial(_blas, "architecture"),
            "threads": partial(_blas, "num_threads"),
            "threading": partial(_blas, "threading_layer"),
            "float32_gflops": _gflops,
            "onednn": _onednn,
        },
        "cuda": {
            "traces": nvidia,
            "driver": _driver,
            "driver_cuda": _driver_cuda,
            "wheels": cupy_wheels,
            "cupy": lambda: (cupy := _cupy()) and str(cupy.__version__),
            "cupy_cuda": _cupy_cuda,
            "nvrtc": _nvrtc,
            "cublas": _cublas,
            "cublaslt": partial(_used, "lt", "products go through it"),
            "cudnn": partial(_used, "cudnn", "convolutions go through it where it is faster"),
            "kernel_cache": _kernel_cache,
            "devices": _devices,
            **{name: partial(_version, name) for name in NVIDIAS},
        },
        "packages": {
            name: partial(_version, name)
            for name in ("safetensors", "threadpoolctl", "typer", "ml_dtypes", "scikit-learn")
        },
        "environment": {
            name: partial(variable, name)
            for name in VARIABLES
            if name in os.environ and (name != "LD_LIBRARY_PATH" or "cuda" in os.environ[name])
        },
        "backends": {name: partial(_availability, name) for name, _, _ in TABLE},
        "chosen": {**chosen, "workers": _workers},
    }


def variable(name: str) -> str | None:
    """The value of a variable of the environment; None if it is not set."""
    value = os.environ.get(name)
    return None if value is None else value.strip()


def one_line(error: Exception) -> str:
    """The error's kind and words."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


# the machine


def _simd() -> str | None:
    """The newest of SIMD that NumPy has found in the CPU; None if that is not x86."""
    with redirect_stdout(io.StringIO()) as text:
        np.show_runtime()
    features = set(re.findall(r"'(\w+)'", text.getvalue().partition("'not_found'")[0]))
    return next((name for name in reversed(SIMD) if features & {*SIMD[name][0].split()}), None)


def _memory(psutils: str, linux: str) -> Bytes:
    if importlib.util.find_spec("psutil"):
        return Bytes(getattr(import_module("psutil").virtual_memory(), psutils))
    size = meminfo(linux)
    if size is None:
        raise LookupError("the package psutil would tell")
    return Bytes(size)


# NumPy


def blas() -> list[dict[str, Any]]:
    """What threadpoolctl tells of every BLAS in this process, NumPy's own first."""
    libraries = [library for library in threadpool_info() if library["user_api"] == "blas"]
    return sorted(libraries, key=lambda library: "numpy" not in library["filepath"])


def _blas(what: str) -> Any:
    return blas()[0].get(what) if blas() else None


def _blas_of_the_build() -> str | None:
    config: Any = np.show_config(mode="dicts")
    return config["Build Dependencies"]["blas"].get("name")  # type: ignore[no-any-return]


def _gflops() -> float:
    """Billions of floating-point operations a second, measured: the best of ten products."""
    x = np.full((1024, 1024), 0.5, "float32")
    out = np.empty_like(x)
    seconds = min(timeit.repeat(lambda: np.matmul(x, x, out=out), number=1, repeat=10))
    return round(2 * 1024**3 / seconds / 1e9, 1)


# CUDA


def _driver() -> str | None:
    """The release of the kernel's driver, such as 580.65.06."""
    return in_proc("driver/nvidia/version", r"Kernel Module.*?\s(\d{3,}\.[\d.]+)\s")


def _driver_cuda() -> str | None:
    """The newest CUDA that the driver runs; None without a driver."""
    library, number = libcuda(), ctypes.c_int()
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
    return import_module("cupy") if importlib.util.find_spec("cupy") else None


def _cupy_cuda() -> str | None:
    """The CUDA that CuPy was built for."""
    cupy = _cupy()
    return cupy and _dotted(cupy.cuda.runtime.runtimeGetVersion())


def _nvrtc() -> Answer | None:
    """NVRTC's version and, where NVIDIA's finder is installed, what it was found by."""
    cupy = _cupy()
    if cupy is None:
        return None
    try:
        reason = ".".join(map(str, cupy.cuda.nvrtc.getVersion()))
        if _version("cuda-pathfinder"):
            library = import_module("cuda.pathfinder").load_nvidia_dynamic_lib("nvrtc")
            reason += f", from {library.found_via}"
        return {"ok": True, "reason": reason}
    except Exception as error:
        return {"ok": False, "reason": one_line(error)}


def _onednn() -> Answer:
    """Whether products and convolutions of float32 go through oneDNN, which is an extra."""
    from nnxp.kernels.cpu import onednn

    if why := onednn.why_not():
        return {"ok": False, "reason": why}
    number = onednn.library()[0].version
    return {"ok": True, "reason": f"{number}, for products and convolutions of float32"}


def _cublas() -> str | None:
    """The version of cuBLAS; None without a device, for it tells only where it has been started."""
    cupy = _cupy()
    if cupy is None or not cupy.cuda.is_available():
        return None
    number = cupy.cuda.cublas.getVersion(cupy.cuda.device.get_cublas_handle())
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def _used(library: str, work: str) -> Answer | None:
    """Whether this library of NVIDIA's does the work of kernels, or CuPy alone."""
    if _cupy() is None:
        return None
    why = import_module(f"nnxp.kernels.cuda.{library}").why_not()
    return {"ok": why is None, "reason": why or work}


def _kernel_cache() -> Answer:
    """Whether CuPy may write where it keeps the kernels that it has compiled."""
    if variable("CUPY_CACHE_IN_MEMORY") not in (None, "", "0"):
        return {"ok": True, "reason": "in memory"}
    folder = Path(os.environ.get("CUPY_CACHE_DIR") or "~/.cupy/kernel_cache").expanduser()
    try:
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        with tempfile.TemporaryFile(dir=nearest):  # asking for permissions tells root nothing
            return {"ok": True, "reason": str(folder)}
    except OSError as error:
        return {"ok": False, "reason": f"{folder}: {error.strerror}"}


def _devices() -> dict[str, Answer]:
    cupy = _cupy()
    if cupy is None or not cupy.cuda.is_available():
        return {}  # the backend's own reason tells why
    count = cupy.cuda.runtime.getDeviceCount()
    return {f"cuda:{index}": _device(cupy, index) for index in range(count)}


def _device(cupy: Any, index: int) -> Answer:
    facts = {**asdict(probe(index)), "name": None}
    try:
        properties = cupy.cuda.runtime.getDeviceProperties(index)
        facts["name"] = properties["name"].decode()
        facts["compute_capability"] = f"{properties['major']}.{properties['minor']}"
        with cupy.cuda.Device(index):
            facts["free"], facts["memory"] = map(Bytes, cupy.cuda.runtime.memGetInfo())
    except Exception as error:
        facts["unknown"] = one_line(error)
    return facts


# nnxp


def _availability(name: str) -> Answer:
    return asdict(available_backends()[name])


def _chosen(name: str) -> Answer:
    """The backend that this name leads to."""
    asked = name if name != "auto" else variable("NNXP_BACKEND") or "auto"
    try:
        backend = get_backend(name)
    except BackendUnavailable as error:
        return {"asked": asked, "ok": False, "reason": error.reason, "hint": error.hint}
    where = {"backend": backend.name, "device": backend.device}
    return {"asked": asked, "ok": True, "reason": f"{backend.device}: {backend.why}", **where}


def _workers() -> Answer:
    try:
        count = worker_count()
    except BackendUnavailable as error:
        return {"ok": False, "reason": error.reason, "hint": error.hint}
    return {"ok": True, "reason": f"{count} threads on the CPU", "count": count}
