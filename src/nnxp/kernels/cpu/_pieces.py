"""Pieces of arrays that stay in cache while something is done to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from math import prod
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakValueDictionary

import numpy as np

from nnxp._arrays import HostArray, Shape
from nnxp.backend._blas import openblas_function
from nnxp.kernels._dispatch import Operand

PIECE = 256 << 10
"""Bytes: so much, and what is made of it, stays in a core's second cache."""

LINE = 64  # bytes that lie in cache together
SAMPLE = 4096  # numbers, by which arrays are told apart before all are compared
FEW = 4  # elements of a last axis: of so few NumPy takes longer to start than to copy

_ZEROS = {np.dtype(name): np.zeros(PIECE // 4, name) for name in ("float32", "float64")}
for _zeros in _ZEROS.values():
    _zeros.flags.writeable = False


def zeros(shape: Shape, dtype: np.dtype[Any]) -> HostArray | None:
    """Zeros that everybody shares, or None of so many: with as many on both sides, maximum takes a
    quarter of what it takes with one number."""
    shared, size = _ZEROS.get(dtype), prod(shape)
    return None if shared is None or size > shared.size else shared[:size].reshape(shape)


def plain(*operands: Operand | None) -> bool:
    """Whether all are of one type, of 32 or 64 bits, as bodies in place take them."""
    types = {operand.dtype for operand in operands if operand is not None}
    return len(types) == 1 and next(iter(types)) in _ZEROS


def carved(scratch: HostArray, dtype: Any, *shapes: Shape) -> Iterator[HostArray]:
    """Arrays of these shapes, one behind the other in memory of bytes."""
    start, size = 0, np.dtype(dtype).itemsize
    for shape in shapes:
        yield np.ndarray(shape, dtype, scratch, start)
        start += -(-prod(shape) * size // 64) * 64


def room(dtype: Any, *shapes: Shape) -> int:
    """The bytes that `carved` takes."""
    return sum(-(-prod(shape) * np.dtype(dtype).itemsize // 64) * 64 for shape in shapes)


def copy(x: HostArray, out: HostArray) -> None:
    """out[...] = x, in a third of NumPy's time where the last axis is short, and lies far apart in
    x, as the channels of a picture that lies by channels."""
    if out.ndim > 1 and 1 < out.shape[-1] <= FEW and x.strides[-1] != x.itemsize:
        for k in range(out.shape[-1]):
            np.copyto(out[..., k], x[..., k])
    else:
        np.copyto(out, x)


def aligned(shape: Shape, dtype: Any) -> HostArray:
    """New memory that begins with a line of the cache: NumPy's own begins anywhere."""
    memory = np.empty(prod(shape) * np.dtype(dtype).itemsize + LINE, "uint8")
    return np.ndarray(shape, dtype, memory, -memory.ctypes.data % LINE)


@cache
def blas() -> list[Any]:
    """The BLAS libraries that are loaded: what threadpoolctl has of them."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas").lib_controllers  # type: ignore[no-any-return]


@cache
def _own_numbers() -> list[Callable[[], int]]:
    """OpenBLAS' own functions that tell its threads: they are asked before each small call."""
    functions = (openblas_function(library, "openblas_get_num_threads") for library in blas())
    return [function for function in functions if function is not None]


def blas_threads() -> int:
    """The threads that a product of this thread takes."""
    most = max([number() for number in _own_numbers()], default=1)
    if most == 1:  # perhaps while others are at work, which threadpoolctl's answer leaves out
        most = max((library.num_threads or 1 for library in blas()), default=1)
    return most


class OfNumbers(Protocol):
    """What was made of an array."""

    @property
    def numbers(self) -> HostArray: ...


Packed = TypeVar("Packed", bound=OfNumbers)


class ByContent(Generic[Packed]):
    """What was made of constant arrays, once for all that hold the same numbers: programs for other
    lengths of a row have the same weights. It goes with the last who uses it.

    `make(numbers, *how)` makes it.
    """

    def __init__(self, make: Callable[..., Packed]) -> None:
        self._make = make
        self._known: WeakValueDictionary[Any, Packed] = WeakValueDictionary()

    def of(self, numbers: HostArray, *how: Any) -> Packed:
        sample = numbers.ravel("K")[:: max(1, numbers.size // SAMPLE)]
        key = numbers.shape, how, hash(sample.tobytes())
        packed = self._known.get(key)
        if packed is None or not np.array_equal(packed.numbers, numbers):
            packed = self._known[key] = self._make(numbers, *how)
        return packed
