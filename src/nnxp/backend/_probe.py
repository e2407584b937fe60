"""Is this GPU usable, and if not, why, and what fixes it?

A device count above zero proves little: NVRTC may be missing, the card too old for the wheel, or
the results wrong without an error. So a GPU is usable when it has compiled and run an elementwise
kernel, a matrix product and a reduction over negative numbers, and all three came back right.

Where there is nothing of NVIDIA, nobody is told to install anything for it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
from contextlib import suppress
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from nnxp.backend._base import Availability, ForkGuard

PROC, DEV, PCI = Path("/proc"), Path("/dev"), Path("/sys/bus/pci/devices")

guard = ForkGuard("CUDA")
_answers: dict[tuple[int, int], Availability] = {}

INSTALL = 'pip install "cupy-cuda13x[ctk]" (or "cupy-cuda12x[ctk]" for an older driver)'
NO_CARD = (
    "No NVIDIA card is seen here (a container sees one with --gpus all): use the backend numpy"
)


def nvidia() -> list[str]:
    """What there is of NVIDIA on this machine: a card, its driver, the driver's library."""
    files = [PROC / "driver/nvidia/version", DEV / "nvidiactl"]
    signs = [str(file) for file in files if file.exists()]
    signs += filter(None, [shutil.which("nvidia-smi")])
    with suppress(OSError):
        for vendor in PCI.glob("*/vendor"):
            kind = vendor.with_name("class").read_text()
            if vendor.read_text().strip() == "0x10de" and kind.startswith("0x03"):  # a display
                signs.append(f"the card {vendor.parent.name}")
    return signs + (["libcuda"] if libcuda() else [])


def libcuda() -> Any:
    """The library of the driver; None if it cannot be loaded."""
    try:
        return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return None


def cupy_wheels() -> dict[str, str]:
    """The installed distributions that bring the package cupy, with their versions."""
    wheels = {}
    for distribution in distributions():
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        if name == "cupy" or re.fullmatch(r"cupy-(cuda|rocm).*", name):
            wheels[name] = distribution.version
    return wheels


def probe(index: int = 0) -> Availability:
    """Whether the CUDA device `index` is usable; asked once per process and device."""
    guard.check()
    key = os.getpid(), index
    if key not in _answers:
        _answers[key] = _ask(index)
    return _answers[key]


def _ask(index: int) -> Availability:
    if importlib.util.find_spec("cupy") is None:
        return _unusable("CuPy is not installed", INSTALL + " brings it")
    try:
        import cupy
    except Exception as error:
        return _unusable(*_failure("CuPy is installed but cannot be imported", error))
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        return _no_device(cupy, error)
    if count == 0:
        return _unusable("CuPy is installed, but there is no CUDA device", _VISIBLE + _OR_NUMPY)
    guard.mark()  # counting devices has started CUDA
    if index >= count:
        return Availability(
            False,
            f"there is no cuda:{index}: this process sees {count} CUDA device(s)",
            f"Use cuda:0 to cuda:{count - 1}, or look at CUDA_VISIBLE_DEVICES",
        )
    try:
        with cupy.cuda.Device(index):
            wrong = _wrong_answers(cupy)
            name = cupy.cuda.runtime.getDeviceProperties(index)["name"].decode()
    except Exception as error:
        return Availability(False, *_failure(f"cuda:{index} is there, but does not compute", error))
    if wrong:
        return Availability(
            False,
            f"{name} (cuda:{index}) computes wrong numbers: {', '.join(wrong)}",
            "The card may be too old for this CuPy wheel: try another (cupy-cuda12x)" + _OR_NUMPY,
        )
    return Availability(True, name)


def _unusable(reason: str, hint: str) -> Availability:
    """No GPU answers: the hint is for those who have one."""
    return Availability(False, reason, hint if nvidia() else NO_CARD)


_OR_NUMPY = ", or use the backend numpy"
_VISIBLE = "Look at nvidia-smi and CUDA_VISIBLE_DEVICES"


def _wrong_answers(cupy: Any) -> list[str]:
    """The names of the questions that the current device answers wrongly."""
    x = cupy.asarray([[-1.0, -2.0], [-3.0, -4.0]], dtype="float32")
    answers = {
        "elementwise": (cupy.exp(x * 0) - x).get().ravel().tolist() == [2, 3, 4, 5],
        "product": cupy.matmul(x, x).get().ravel().tolist() == [7, 10, 15, 22],
        "reduction": (float(x.max()), float(x.sum())) == (-1.0, -10.0),
    }
    return [question for question, right in answers.items() if not right]


def _no_device(cupy: Any, error: Exception) -> Availability:
    message = str(error)
    if "InsufficientDriver" in message:
        cuda = cupy.cuda.runtime.runtimeGetVersion() // 1000
        return _unusable(
            f"CuPy {cupy.__version__} is installed, but no GPU answers: the CUDA driver is missing "
            f"or older than CUDA {cuda} (cudaErrorInsufficientDriver)",
            f"Install or update the NVIDIA driver, install a CuPy for an older CUDA{_OR_NUMPY}",
        )
    if "NoDevice" in message:
        return _unusable(
            "CuPy and a driver are installed, but no CUDA device is visible (cudaErrorNoDevice)",
            _VISIBLE + _OR_NUMPY,
        )
    return _unusable(*_failure("CuPy is installed, but CUDA does not start", error))


# What NVRTC, CUDA and cuBLAS say of a generation of cards that they do not know any more.
_TOO_OLD = ("--gpu-architecture", "NoKernelImage", "NO_BINARY_FOR_GPU", "ARCH_MISMATCH")


def _failure(what: str, error: Exception) -> tuple[str, str]:
    """The reason, and the hint that fits the error."""
    message = f"{type(error).__name__}: {' '.join(str(error).split())}"
    hint = "Reinstall CuPy: " + INSTALL
    if any(word in message for word in _TOO_OLD):
        hint = "The card is too old for this CuPy wheel: try an older one (cupy-cuda12x)"
    elif "nvrtc" in message.lower() or "cuda_fp16" in message or "vector_types" in message:
        hint = "A part of the CUDA toolkit is missing: " + INSTALL + " brings all of it"
    elif len(cupy_wheels()) > 1:
        hint = f"Two CuPy wheels are installed ({', '.join(cupy_wheels())}): uninstall all but one"
    elif "ermission" in message:
        hint = "Set CUPY_CACHE_DIR to a folder that can be written"
    return f"{what} ({message[:300]})", hint + _OR_NUMPY
