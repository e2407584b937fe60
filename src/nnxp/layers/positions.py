"""Ids as vectors, and the places of a sequence told apart."""

from __future__ import annotations

from collections.abc import Iterator
from math import log
from typing import Any, ClassVar

import numpy as np

from nnxp import kernels
from nnxp._arrays import Array, float_dtype, xp_of
from nnxp._errors import OptionError, ShapeError
from nnxp.layers._layer import Example, Layer, Rng, array_shape, generator, whole


class _Vectors(Layer):
    """A vector for each of what is `counted`."""

    counted: ClassVar[str]
    weight: Array

    def validate(self) -> None:
        name, shape = type(self).__name__, array_shape(self, "weight")
        if len(shape) != 2 or 0 in shape:
            raise ShapeError(f"{name} takes weight ({self.counted}, channels), not {shape}")

    def __repr__(self) -> str:
        count, channels = self.weight.shape
        return f"{type(self).__name__}({count}, {channels})"


class Embedding(_Vectors):
    """y = weight[ids]: a vector of its own for each id.

    ids (rows, ...), whole numbers from 0 to count - 1, -> y (rows, ..., channels); weight (count,
    channels) starts normal, with deviation 1.

    An id outside is never another's vector: on the CPU it raises IdError, on a device its vector is
    NaN.
    """

    takes = ("int",)
    counted = "count"

    def __init__(
        self, count: int, channels: int, *, rng: Rng = None, dtype: object = "float32"
    ) -> None:
        self.weight = _normal((whole("count", count), whole("channels", channels)), rng, dtype)

    def __call__(self, ids: Array) -> Array:
        return kernels.embedding(ids.astype("int64", copy=False), self.weight)

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield cls(5, 4, rng=0), (3, 6)
        yield cls(3, 1, rng=1), (7,)


class PositionEmbedding(_Vectors):
    """y = x + weight[0], x + weight[1], ...: each place of a sequence has a vector of its own.

    x (rows, time, channels), time at most `places`, -> y like x; weight (places, channels) starts
    normal, with deviation 0.02.   [Gehring et al. 2017, arXiv:1705.03122; as in BERT and GPT-2]
    """

    counted = "places"

    def __init__(
        self, places: int, channels: int, *, rng: Rng = None, dtype: object = "float32"
    ) -> None:
        self.weight = _normal(
            (whole("places", places), whole("channels", channels)), rng, dtype, 0.02
        )

    def __call__(self, x: Array) -> Array:
        places, channels = self.weight.shape
        if x.ndim != 3 or x.shape[1] > places or x.shape[2] != channels:
            raise ValueError(f"x is (rows, time, {channels}), with time at most {places}")
        return kernels.add_positions(x, self.weight)

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield cls(6, 4, rng=0), (3, 5, 4)


class SinusoidalEncoding(Layer):
    """y = x + P, P[t, 2i] = sin(t w_i), P[t, 2i + 1] = cos(t w_i), w_i = base^(-2i / channels)

    x (rows, time, channels) -> y like x; an odd last channel is a sine. The angles are computed in
    float64, whatever the type of x.   [Vaswani et al. 2017, arXiv:1706.03762]
    """

    base: float

    def __init__(self, *, base: float = 10000.0) -> None:
        self.base = base

    def validate(self) -> None:
        _check_base(self.base)

    def __call__(self, x: Array) -> Array:
        if x.ndim != 3:
            raise ValueError("x is (rows, time, channels)")
        xp, (time, channels) = xp_of(x), x.shape[1:]
        angles = _angles(xp, time, channels, self.base)
        waves = xp.stack([xp.sin(angles), xp.cos(angles)], axis=-1).reshape(time, -1)
        return x + waves[:, :channels].astype(x.dtype)

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield cls(), (3, 5, 6)
        yield cls(base=100.0), (2, 4, 3)


class RotaryEmbedding(Layer):
    """Pairs of channels turned by t w_i at place t, w_i = base^(-2i / channels)   [Su et al. 2021]

    x (..., time, c) -> y like x, of which the first `channels` are turned: pairs i and i + channels
    / 2, as in GPT-NeoX and Llama, or 2i and 2i + 1 if `interleaved`, as in the paper
    (arXiv:2104.09864). The product of two vectors so turned depends on how far apart they are.
    """

    channels: int
    base: float
    interleaved: bool

    def __init__(self, channels: int, *, base: float = 10000.0, interleaved: bool = False) -> None:
        self.channels, self.base, self.interleaved = channels, base, interleaved

    def validate(self) -> None:
        if whole("channels", self.channels) % 2:
            raise OptionError(
                f"channels are turned in pairs, so they are even, not {self.channels}"
            )
        _check_base(self.base)

    def __call__(self, x: Array) -> Array:
        if x.ndim < 3 or x.shape[-1] < self.channels:
            raise ValueError(f"x is (rows, ..., time, channels), {self.channels} or more of them")
        xp = xp_of(x)
        angles = _angles(xp, x.shape[-2], self.channels, self.base)
        cos, sin = xp.cos(angles).astype(x.dtype), xp.sin(angles).astype(x.dtype)
        return kernels.rotary(x, cos, sin, interleaved=self.interleaved)

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield cls(4), (3, 5, 4)
        yield cls(2, base=50.0, interleaved=True), (2, 3, 4, 5)


def _angles(xp: Any, time: int, channels: int, base: float) -> Array:
    """(time, channels / 2, rounded up): place times frequency"""
    frequencies = xp.exp(xp.arange(0, channels, 2, dtype="float64") * (-log(base) / channels))
    return xp.arange(time, dtype="float64")[:, None] * frequencies


def _check_base(base: float) -> None:
    if not (isinstance(base, int | float) and 0 < base < float("inf")):
        raise OptionError(f"the base of the frequencies is a number above 0, not {base!r:.60}")


def _normal(shape: tuple[int, int], rng: Rng, dtype: object, deviation: float = 1.0) -> Array:
    kind = float_dtype(dtype)
    drawn = generator(rng).standard_normal(
        shape, dtype=np.float64 if kind == np.float64 else np.float32
    )
    return (drawn * drawn.dtype.type(deviation)).astype(kind, copy=False)
