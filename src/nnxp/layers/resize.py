"""Layers that make space larger or smaller."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY
from math import isfinite
from typing import Any

from nnxp import kernels
from nnxp._arrays import Array
from nnxp._errors import OptionError
from nnxp.kernels._windows import Padding, PerAxis, is_whole, pairs, per_axis
from nnxp.kernels.resize import COORDINATES, METHODS, NEAREST, ORDERS, PAD_MODES
from nnxp.layers._layer import Example, Layer


def _one_of(what: str, name: Any, names: Any) -> None:
    if not (isinstance(name, str) and name in names):
        raise OptionError(f"{what} is one of {', '.join(names)}, not {name!r:.60}")


def _axes_of(option: Any) -> int:
    """How many axes of space an option is for, as far as it tells: one, or more alike."""
    return len(option) or 1 if isinstance(option, tuple | list) else 1


class Pad(Layer):
    """y = x with more before and behind each axis of space.

    x (rows, *space, channels) -> y (rows, *larger, channels). `padding` is a number, or for each
    axis a number or a pair (before, behind); a negative one cuts off. `mode` says what is added:
    "constant", of `value`; "reflect", x mirrored about its ends, which are not repeated; "edge",
    the ends themselves; "wrap", x from its other end.
    """

    padding: Padding
    mode: str = "constant"
    value: float = 0.0

    def validate(self) -> None:
        _one_of("mode of Pad", self.mode, PAD_MODES)
        around = pairs("padding of Pad", self.padding, _axes_of(self.padding), None)
        if isinstance(self.padding, tuple | list):
            self.padding = around

    def __call__(self, x: Array) -> Array:
        return kernels.pad(x, padding=self.padding, mode=self.mode, value=self.value)

    def __repr__(self) -> str:
        return f"Pad({self.padding}, {self.mode!r}{f', {self.value}' if self.value else ''})"

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield cls(2), (3, 4, 2)
        yield cls(((1, 2), (-1, 0)), value=0.5), (2, 4, 5, 2)
        yield cls(((1, 2), 1), "reflect"), (2, 4, 5, 2)
        yield cls((0, (2, 0)), "edge"), (2, 4, 5, 2)
        yield cls((3, 1), "wrap"), (2, 4, 5, 2)


class Resize(Layer):
    """y = x with its space resampled.

    x (rows, *space, channels) -> y (rows, *size, channels). Give the `size` of y, or the `scale`,
    for which it is floor(scale * space): one for all axes of space, or one for each. `method` is
    "nearest", "linear" or "cubic"; `coordinates`, `nearest`, `cubic`, `exclude_outside` and
    `antialias` say where outputs are in x and what is around them, in ONNX's words: see
    nnxp.kernels.resize. PyTorch's interpolate is, by its mode,

        nearest             nnxp.Resize(scale=2, coordinates="asymmetric", nearest="floor")
        bilinear            nnxp.Resize(scale=2, method="linear")
        ... align_corners   nnxp.Resize(scale=2, method="linear", coordinates="align_corners")
    """

    size: tuple[int | None, ...] | None = None
    _: KW_ONLY
    scale: float | tuple[float, ...] | None = None
    method: str = "nearest"
    coordinates: str = "half_pixel"
    nearest: str = "round_prefer_floor"
    cubic: float = -0.75
    exclude_outside: bool = False
    antialias: bool = False

    def validate(self) -> None:
        _one_of("method of Resize", self.method, METHODS)
        _one_of("coordinates of Resize", self.coordinates, COORDINATES)
        _one_of("nearest of Resize", self.nearest, NEAREST)
        if (self.size is None) == (self.scale is None):
            raise OptionError("Resize takes either a size, such as (64, 64), or scale=2")
        size = self.size if isinstance(self.size, tuple | list) else (self.size,)
        if not all(m is None or is_whole(m, 1) for m in size):
            raise OptionError(
                "size of Resize is a whole number for each axis of space, or None for an axis "
                f"that stays, not {self.size!r:.60}"
            )
        scales = self.scale if isinstance(self.scale, tuple | list) else (self.scale or 1.0,)
        if not all(isinstance(s, int | float) and s > 0 and isfinite(s) for s in scales):
            raise OptionError(f"scale of Resize is above zero, not {self.scale!r:.60}")
        for name in ("size", "scale"):
            if isinstance(getattr(self, name), list):
                self.__dict__[name] = tuple(getattr(self, name))

    def __call__(self, x: Array) -> Array:
        return kernels.resize(x, **dict(self._fields()))

    def __repr__(self) -> str:
        what = f"{self.size}" if self.scale is None else f"scale={self.scale}"
        return f"Resize({what}, {self.method}, {self.coordinates})"

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield cls(scale=2, coordinates="asymmetric", nearest="floor"), (2, 3, 4, 2)
        yield cls((5, 3)), (2, 3, 4, 2)
        yield cls((5, None), method="linear"), (2, 3, 4, 2)
        yield cls(scale=(0.5, 1.7), method="linear", antialias=True), (2, 6, 4, 2)
        yield cls((7, 5), method="cubic", coordinates="align_corners"), (2, 4, 4, 2)
        yield cls((5,), method="cubic", exclude_outside=True), (3, 4, 2)


class PixelShuffle(Layer):
    """Channels laid out as space   [Shi et al. 2016, arXiv:1609.05158]

    x (rows, *space, channels * prod(factor)) -> y (rows, *(space * factor), channels). In the order
    "channels first" the channel is c * prod(factor) + position, as in PyTorch (ONNX: CRD); in
    "channels last" it is position * channels + c, as in TensorFlow (ONNX: DCR).
    """

    factor: PerAxis
    order: str = "channels first"

    def validate(self) -> None:
        name = type(self).__name__
        _one_of(f"order of {name}", self.order, ORDERS)
        factors = per_axis(f"factor of {name}", self.factor, _axes_of(self.factor))
        if isinstance(self.factor, tuple | list):
            self.factor = factors

    def __call__(self, x: Array) -> Array:
        return kernels.pixel_shuffle(x, factor=self.factor, order=self.order)

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield cls(2), (2, 3, 4, 8)
        yield cls((1, 3), "channels last"), (2, 3, 4, 6)


class PixelUnshuffle(PixelShuffle):
    """Space laid out as channels: what PixelShuffle undoes.

    x (rows, *space, channels) -> y (rows, *(space / factor), channels * prod(factor)).
    """

    def __call__(self, x: Array) -> Array:
        return kernels.pixel_unshuffle(x, factor=self.factor, order=self.order)

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield cls(2, "channels first"), (2, 6, 4, 3)
        yield cls((1, 3), "channels last"), (2, 3, 6, 2)
