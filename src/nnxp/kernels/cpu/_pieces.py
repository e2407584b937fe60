"""Pieces of arrays that stay in cache while something is done to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from math import prod
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakValueDictionary

import numpy as np

from nnxp._arrays import HostArray, Shape
from nnxp.backend._blas import openblas_function
from nnxp.kernels._dispatch import Kernel, Operand
from nnxp.kernels.activations import identity, relu

PIECE = 256 << 10
"""Bytes: so much, and what is made of it, stays in a core's second cache."""

PASSES = 3
"""Pieces that an activation may hold at once besides its own, as its reference body makes them."""

LINE = 64  # bytes that lie in cache together
SAMPLE = 4096  # numbers, by which arrays are told apart before all are compared
FEW = 4  # elements of a last axis: of so few NumPy takes longer to start than to copy
LONG = 8192  # elements: what NumPy's buffers hold

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


class Finish:
    """activation(y + bias) in place, for y (lines, outputs), by pieces.

    The bias is repeated to LONG elements: NumPy takes twice as long to add shorter lines.
    """

    def __init__(self, bias: HostArray | None, activation: Kernel, dtype: Any) -> None:
        self.activation = activation
        self.bias = None if bias is None else np.tile(bias, -(-LONG // max(1, bias.size)))

    def room(self, nbytes: int) -> int:
        """The bytes that an activation makes anew for y of so many, at most."""
        simple = self.activation is identity or self.activation is relu
        return 0 if simple else PASSES * min(PIECE, nbytes)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return self.bias is None and self.activation is identity

    def bound(self, y: HostArray) -> list[Callable[[], object]]:
        """The calls that finish y, as long as it is there."""
        least = zeros(y.shape, y.dtype)
        if self.bias is None and self.activation is relu and least is not None:
            return [partial(np.maximum, y, least, out=y)]
        return [] if self.idle else [partial(self, y)]

    def __call__(self, y: HostArray) -> None:
        if self.idle:
            return
        if y.nbytes <= PIECE:
            self._piece(y)
            return
        lines, outputs = y.shape
        step = max(1, PIECE // (outputs * y.itemsize))
        for start in range(0, lines, step):
            self._piece(y[start : start + step])

    def _piece(self, y: HostArray) -> None:
        if self.bias is not None:
            rest, size = y.reshape(-1), self.bias.size
            if rest.size >= size:
                whole = rest.size - rest.size % size
                long, rest = rest[:whole].reshape(-1, size), rest[whole:]
                np.add(long, self.bias, long)
            np.add(rest, self.bias[: rest.size], rest)
        if self.activation is relu:
            least = zeros(y.shape, y.dtype)
            if least is None:
                np.clip(y, 0, np.inf, out=y)
            else:
                np.maximum(y, least, out=y)
        elif self.activation is not identity:
            self.activation.reference(y, out=y)
