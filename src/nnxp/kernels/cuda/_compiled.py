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
    """A source with what it includes in its place: CuPy's cache then sees every change.

    What is a text already, of more than one line, is that, with what it includes.
    """
    here = Path(__file__).parent
    text = file if "\n" in file else (here / file).read_text()
    for header in ("device.cuh", "act.cuh"):
        text = text.replace(f'#include "{header}"', (here / header).read_text())
    return text


@cache
def type_name(dtype: np.dtype[Any]) -> str | None:
    """What CUDA calls a type that has fused bodies. NumPy takes 2 µs to say what it calls it."""
    return TYPES.get(dtype.name)


Part = str | int | np.dtype[Any]
"""Of what says which kernel: a source, a template in it, then the arguments of the template."""


def cpp_name(template: str, *arguments: Part) -> str:
    """An instance of a template in C++: `bias_act<float, __half, act::relu, 8>`."""
    names = map(str, arguments)
    return f"{template}<{', '.join(TYPES.get(name, name) for name in names)}>"


@cache
def kernel(file: str, template: str, *arguments: Part) -> Any:
    """An instance of a template in a source.

    A RawKernel looks up the binary of the current device, and loads it there at its first launch.
    Threads that ask at the same time may each compile it; CuPy keeps one of the results.
    """
    name = cpp_name(template, *arguments)
    module = cupy.RawModule(code=source(file), options=OPTIONS, name_expressions=(name,))
    return module.get_function(name)


def launch(
    instance: tuple[Part, ...],
    grid: tuple[int, ...],
    block: tuple[int, ...],
    arrays: tuple[Array | None, ...],
    *numbers: int | np.float32 | np.ndarray[Any, Any],
) -> None:
    """Launch on the current stream. CuPy passes an int as long long, None as nullptr, and an array
    of the host, of one element, by value: as a struct."""
    here = cupy.cuda.runtime.getDevice()
    for array in arrays:
        if array is not None and array.data.device_id != here:
            raise ValueError(
                "Array device must be same as the current device: "
                f"array device = {array.data.device_id} while current = {here}"
            )
    kernel(*instance)(grid, block, arrays + numbers)


def pack(x: Array, out: Array, *vectors: Array | None) -> int:
    """How many neighbours of a row move at once: 16 bytes of out, if every row allows it, else 1.

    x, out (rows, cols), vectors (cols,), each row without gaps, none narrower than out.
    """
    rows, cols = x.shape
    v: int = 16 // out.itemsize
    if cols % v:
        return 1
    places = x.data.ptr | out.data.ptr
    if rows > 1:
        places |= x.strides[0] | out.strides[0]
    for vector in vectors:
        if vector is not None:
            places |= vector.data.ptr
    return 1 if places % 16 else v


def next_power(n: int) -> int:
    """The smallest power of two that is n or more, for n >= 1."""
    return 1 << (n - 1).bit_length()


def fusable(x: Array, out: Array | None = None) -> bool:
    """Whether a kernel here can fill `out`, or a new array, from x."""
    return (
        type_name(x.dtype) is not None
        and x.size > 0
        and (
            out is None
            or (out.dtype == x.dtype and out.shape == x.shape and bool(out.flags.c_contiguous))
        )
    )


def unfused(kernel: Kernel, x: Array, *arrays: Array | None, **options: Any) -> Array:
    """What the kernel does for a library without a fused body."""
    return kernel.widened(x, *arrays, **options)
