"""Some of the columns of a row, and bounds for their values."""

from __future__ import annotations

from collections.abc import Iterator
from math import isnan

from nnxp._arrays import Array
from nnxp._errors import OptionError, ShapeError
from nnxp.kernels._windows import is_whole
from nnxp.layers._layer import Example, Layer


class Take(Layer):
    """y = x[..., indices]: some columns of the last axis, or one of them without the axis.

    x (rows, ..., channels) -> y (rows, ..., len(indices)), or (rows, ...) for a single number.

        net = nnxp.Sequential(nnxp.Take((0, 3)), nnxp.Dense(2, 1), nnxp.Take(0))    # y is (rows,)
    """

    indices: tuple[int, ...] | int

    def __init__(self, indices: tuple[int, ...] | int) -> None:
        self.indices = indices

    def validate(self) -> None:
        indices = self.indices if isinstance(self.indices, tuple | list) else (self.indices,)
        if not indices or not all(is_whole(index, 0) for index in indices):
            raise OptionError(
                f"Take takes a whole number from 0, or some of them, not {self.indices!r:.60}"
            )
        whole = tuple(map(int, indices))
        self.indices = whole if indices is self.indices else whole[0]

    def __call__(self, x: Array) -> Array:
        key = self.indices if isinstance(self.indices, int) else list(self.indices)
        size = 1 + (key if isinstance(key, int) else max(key))
        if x.ndim < 2 or x.shape[-1] < size:
            raise ShapeError(f"{self} takes (rows, ..., {size} or more) but got {x.shape}")
        return x[..., key]

    def __repr__(self) -> str:
        return f"Take({self.indices!r:.60})"

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield cls((0, 3, 1)), (5, 4)
        yield cls((2,)), (2, 3, 4)
        yield cls(1), (5, 3)


class Clip(Layer):
    """y = min(max(x, low), high): values beyond the bounds become the bounds, NaN stays NaN.

    x (rows, ...) -> y like x.
    """

    low: float
    high: float

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def validate(self) -> None:
        numbers = all(type(bound) in (int, float) for bound in (self.low, self.high))
        if not numbers or isnan(self.low) or not self.low <= self.high:
            raise OptionError(
                "Clip takes two numbers, the lower one first, not "
                f"{self.low!r:.30} and {self.high!r:.30}"
            )

    def __call__(self, x: Array) -> Array:
        return x.clip(self.low, self.high).astype(x.dtype, copy=False)  # bfloat16 promotes

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield cls(-0.5, 1.0), (5, 4)
        yield cls(0.0, 1.0), (2, 3, 4)
