"""Layers that change the shape and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod

from nnxp._arrays import Array, xp_of
from nnxp._errors import OptionError, ShapeError
from nnxp.kernels._windows import is_whole
from nnxp.layers._layer import Example, Layer


class Flatten(Layer):
    """Each row as one vector: x (rows, a, b, ...) -> y (rows, a * b * ...)."""

    def __call__(self, x: Array) -> Array:
        return x.reshape(x.shape[0], prod(x.shape[1:]))

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield cls(), (3, 2, 4)
        yield cls(), (3, 5)


class Reshape(Layer):
    """Each row in another shape: x (rows, ...) -> y (rows, *shape), its numbers in their order.

    One of the sizes may be -1: whatever the others leave.
    """

    shape: tuple[int, ...]

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def validate(self) -> None:
        shape = self.shape if isinstance(self.shape, tuple | list) else (self.shape,)
        known = [n for n in shape if is_whole(n, -1) and n]
        if len(known) != len(shape) or known.count(-1) > 1:
            raise OptionError(
                "shape of Reshape is the sizes of a row, one of them perhaps -1, not "
                f"{self.shape!r:.60}"
            )
        self.shape = tuple(map(int, shape))

    def __call__(self, x: Array) -> Array:
        size, known = prod(x.shape[1:]), prod(n for n in self.shape if n != -1)
        fits = size % known == 0 if -1 in self.shape else size == known
        if not fits:
            raise ShapeError(
                f"{self} takes rows of {known} numbers, but got (rows, *{x.shape[1:]})"
            )
        return x.reshape(x.shape[0], *(size // known if n == -1 else n for n in self.shape))

    def __repr__(self) -> str:
        return f"Reshape({self.shape})"

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield cls((2, 6)), (3, 4, 3)
        yield cls((3, -1, 2)), (3, 12)


class Transpose(Layer):
    """The axes of x in another order: x (rows, ...) -> y = x.transpose(axes).

    `axes` begins with 0, the rows: `Transpose((0, 3, 1, 2))` puts channels before space.
    """

    axes: tuple[int, ...]

    def __init__(self, axes: tuple[int, ...]) -> None:
        self.axes = axes

    def validate(self) -> None:
        axes = tuple(self.axes) if isinstance(self.axes, tuple | list) else ()
        if axes[:1] != (0,) or sorted(axes) != list(range(len(axes))):
            raise OptionError(
                f"axes of Transpose are 0, 1, 2, ... in some order that begins with 0, the rows, "
                f"not {self.axes!r:.60}"
            )
        self.axes = tuple(map(int, axes))

    def __call__(self, x: Array) -> Array:
        if x.ndim != len(self.axes):
            raise ShapeError(f"{self} takes {len(self.axes)} axes, but got {x.ndim}")
        return x.transpose(self.axes)

    def __repr__(self) -> str:
        return f"Transpose({self.axes})"

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield cls((0, 2, 1)), (3, 4, 5)
        yield cls((0, 3, 1, 2)), (3, 2, 4, 5)


def channels_last(function: Callable[[Array], Array], x: Array) -> Array:
    """function of x (rows, channels, ...), which takes and answers the channels last: a view."""
    if x.ndim < 3:
        return function(x)
    xp = xp_of(x)
    return xp.moveaxis(function(xp.moveaxis(x, 1, -1)), -1, 1)
