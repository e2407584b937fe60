"""How the CUDA sources beside this file become kernels, and how these are launched.

Each instance of a template is compiled by NVRTC when it is first launched: a fraction of a second,
once per kind of device, for CuPy keeps the binaries on disk. After that a launch neither waits
nor allocates, so that it may be captured in a CUDA graph.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import cupy
import numpy as np

from nnxp._arrays import Array
from nnxp.kernels._dispatch import Kernel

OPTIONS = ("-std=c++17",)
TYPES = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}
"""What CUDA calls the types that have fused bodies; the others go to the reference body."""


@cache
def source(file: str) -> str:
    """A source with device.cuh in its place: one text, so that CuPy's cache sees every change."""
    here = Path(__file__).parent
    return (
        (here / file)
        .read_text()
        .replace('#include "device.cuh"', (here / "device.cuh").read_text())
    )


@cache
def kernel(file: str, name: str) -> Any:
    """The instance of a template by its C++ name, as `bias_act<float, act::relu, 4>`.

    A RawKernel looks up the binary of the current device, and loads it there at its first launch.
    Threads that ask at the same time may each compile it; CuPy keeps one of the results.
    """
    module = cupy.RawModule(code=source(file), options=OPTIONS, name_expressions=(name,))
    return module.get_function(name)


def launch(
    file: str, name: str, grid: tuple[int, ...], block: tuple[int, ...], *args: Array | float | None
) -> None:
    """Launch on the current stream. Integers go as long long, floats as float, None as nullptr."""
    here = cupy.cuda.runtime.getDevice()
    for each in args:
        if isinstance(each, cupy.ndarray) and each.data.device_id != here:
            raise ValueError(
                "Array device must be same as the current device: "
                f"array device = {each.data.device_id} while current = {here}"
            )
    kernel(file, name)(grid, block, tuple(map(_argument, args)))


def _argument(value: Array | float | None) -> Any:
    if isinstance(value, int):
        return np.int64(value)
    return np.float32(value) if isinstance(value, float) else value


def pack(cols: int, *arrays: Array | None) -> int:
    """How many neighbours of a row move at once: 16 bytes of them, if every row allows it, else 1.

    arrays: (rows, cols) or (cols,), of one type, each row without gaps.
    """
    given = [each for each in arrays if each is not None]
    size = int(given[0].itemsize)
    starts = [each.data.ptr for each in given]
    strides = [each.strides[0] for each in given if each.ndim == 2 and len(each) > 1]
    return 1 if any(n % 16 for n in (cols * size, *starts, *strides)) else 16 // size


def stride(x: Array) -> int:
    """From a row of x (rows, cols) to the next, in elements."""
    return int(x.strides[0]) // int(x.itemsize)


def next_power(n: int) -> int:
    """The smallest power of two that is n or more, for n >= 1."""
    return 1 << (n - 1).bit_length()


def fusable(x: Array, out: Array | None = None) -> bool:
    """Whether a kernel here can fill `out`, or a new array, from x."""
    return (
        x.dtype.name in TYPES
        and x.size > 0
        and (
            out is None
            or (out.dtype == x.dtype and out.shape == x.shape and bool(out.flags.c_contiguous))
        )
    )


def unfused(kernel: Kernel, x: Array, *arrays: Array | None, **options: Any) -> Array:
    """What the kernel does for a library without a fused body."""
    if x.dtype.itemsize == 2:
        return kernel._widened(x, *arrays, **options)
    return kernel.reference(x, *arrays, **options)
