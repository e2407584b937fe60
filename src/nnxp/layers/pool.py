"""Pooling: windows of space, or all of it, as one number for each channel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY
from math import inf
from typing import Any

from nnxp import kernels
from nnxp._arrays import Array
from nnxp._errors import OptionError
from nnxp.kernels._windows import (
    Padding,
    PerAxis,
    padding_option,
    per_axis,
    reach_of,
    window_option,
)
from nnxp.layers._layer import Example, Layer


class _Pool(Layer):
    """What pools over windows share: their options."""

    window: tuple[int, ...]
    _: KW_ONLY
    stride: PerAxis | None = None
    padding: Padding = 0
    dilation: PerAxis = 1
    ceil_mode: bool = False

    def validate(self) -> None:
        name = type(self).__name__
        window = self.window = window_option(name, self.window)
        stride = window if self.stride is None else self.stride
        axes = len(window)
        self.stride = per_axis(f"stride of {name}", stride, axes)
        padding = self.padding = padding_option(f"padding of {name}", self.padding, axes)
        dilation = self.dilation = per_axis(f"dilation of {name}", self.dilation, axes)
        reach = reach_of(window, dilation)
        if not isinstance(padding, str) and any(
            max(pair) >= r for pair, r in zip(padding, reach, strict=True)
        ):
            raise OptionError(
                f"padding of {name} is smaller than its windows, which reach over {reach}, not "
                f"{padding}: some would see nothing of x"
            )

    def _options(self) -> dict[str, Any]:
        return dict(self._fields())

    def __repr__(self) -> str:
        axes = len(self.window)
        plain: dict[str, Any] = {"window": self.window, "ceil_mode": False}
        plain |= {"stride": self.window, "padding": ((0, 0),) * axes, "dilation": (1,) * axes}
        plain |= {"count_include_pad": False}
        options = [f"{n}={v}" for n, v in self._fields() if plain.get(n, ()) != v]
        return f"{type(self).__name__}({', '.join([str(self.window), *options])})"


class MaxPool(_Pool):
    """y = the largest of each window of x, channel by channel.

    x (rows, *space, channels) -> y (rows, *positions, channels). The stride is the window's size
    unless given. Padding never is the largest; with `ceil_mode` a last window may reach beyond it.

        nnxp.MaxPool((3, 3), stride=2, padding=1)
    """

    def __call__(self, x: Array) -> Array:
        return kernels.max_pool(x, **self._options())

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield cls((2, 2)), (3, 4, 5, 2)
        yield cls((3, 2), stride=2, padding=1, ceil_mode=True), (2, 4, 6, 3)
        yield cls((2,), stride=1, dilation=2, padding="same"), (3, 6, 2)


class AveragePool(_Pool):
    """y = the mean of each window of x, channel by channel.

    x (rows, *space, channels) -> y (rows, *positions, channels). The stride is the window's size
    unless given. The mean is over what a window sees of x, or with `count_include_pad` of x and its
    padding (PyTorch's default).

        nnxp.AveragePool((2, 2))
    """

    _: KW_ONLY
    count_include_pad: bool = False

    def __call__(self, x: Array) -> Array:
        return kernels.average_pool(x, **self._options())

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield cls((2, 2)), (3, 4, 5, 2)
        yield cls((3, 2), stride=2, padding=1, ceil_mode=True), (2, 4, 6, 3)
        yield cls((3,), stride=2, padding=1, ceil_mode=True, count_include_pad=True), (3, 6, 2)


class LpPool(_Pool):
    """y = (sum of |x|^p over each window)^(1/p), channel by channel.

    x (rows, *space, channels) -> y (rows, *positions, channels); windows as in MaxPool.
    """

    _: KW_ONLY
    p: float = 2.0

    def validate(self) -> None:
        super().validate()
        if not (isinstance(self.p, int | float) and 0 < self.p < inf):
            raise OptionError(f"p of LpPool is a number above zero, not {self.p!r:.60}")

    def __call__(self, x: Array) -> Array:
        return kernels.lp_pool(x, **self._options())

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield cls((2, 2)), (3, 4, 5, 2)
        yield cls((3,), p=1, stride=2, padding=1), (3, 6, 2)
        yield cls((2, 2), p=3.5, stride=1), (2, 3, 4, 2)


class _Global(Layer):
    keepdims: bool

    def __init__(self, *, keepdims: bool = False) -> None:
        self.keepdims = keepdims

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield cls(), (3, 4, 5, 2)
        yield cls(keepdims=True), (3, 7, 2)


class GlobalAveragePool(_Global):
    """y = the mean of each channel over all of space   [Lin, Chen, Yan 2013, arXiv:1312.4400]

    x (rows, *space, channels) -> y (rows, channels), or (rows, 1, ..., channels) with `keepdims`.
    """

    def __call__(self, x: Array) -> Array:
        return kernels.global_average_pool(x, keepdims=self.keepdims)


class GlobalMaxPool(_Global):
    """y = the largest of each channel over all of space.

    x (rows, *space, channels) -> y (rows, channels), or (rows, 1, ..., channels) with `keepdims`.
    """

    def __call__(self, x: Array) -> Array:
        return kernels.global_max_pool(x, keepdims=self.keepdims)


class _Adaptive(Layer):
    size: tuple[int | None, ...]

    def __init__(self, size: tuple[int | None, ...]) -> None:
        self.size = size

    def validate(self) -> None:
        name = type(self).__name__
        window_option(name, tuple(1 if m is None else m for m in self.size)
                  if isinstance(self.size, tuple | list) else self.size)  # fmt: skip
        self.size = tuple(self.size)


class AdaptiveAveragePool(_Adaptive):
    """y = the mean of each of `size` parts of space, which are equal or overlap by an element.

    x (rows, *space, channels) -> y (rows, *size, channels). Part i of m along an axis of n is from
    floor(i n / m) to ceil((i + 1) n / m), as in PyTorch; None keeps an axis as it is.
    """

    def __call__(self, x: Array) -> Array:
        return kernels.adaptive_average_pool(x, size=self.size)

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield cls((2, 3)), (2, 6, 7, 2)
        yield cls((1, None)), (2, 4, 3, 2)


class AdaptiveMaxPool(_Adaptive):
    """y = the largest of each of `size` parts of space: the parts of AdaptiveAveragePool.

    x (rows, *space, channels) -> y (rows, *size, channels).
    """

    def __call__(self, x: Array) -> Array:
        return kernels.adaptive_max_pool(x, size=self.size)

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield cls((2, 3)), (2, 6, 7, 2)
        yield cls((5,)), (2, 3, 2)
