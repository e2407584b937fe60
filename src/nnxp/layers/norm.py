"""Normalisations."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf

import numpy as np

from nnxp import kernels
from nnxp._arrays import Array, Shape, float_dtype
from nnxp._errors import OptionError, ShapeError
from nnxp.layers._layer import Layer, array_shape, generator, last_axis


class _Norm(Layer):
    """A normalisation over the last axis, whose size its first parameter has."""

    def output_shape(self, shape: Shape) -> Shape:
        (first, *_) = self.parameters().values()
        last_axis(self, shape, first.shape[0])
        return shape

    def _validate(self) -> None:
        names = [name for name, _ in self._fields() if name != "eps"]
        shapes = [array_shape(self, name) for name in names]
        if len(set(shapes)) != 1 or len(shapes[0]) != 1 or shapes[0][0] < 1:
            wanted, came = ", ".join(names), ", ".join(map(str, shapes))
            raise ShapeError(f"{type(self).__name__} takes (channels,) for {wanted}; got {came}")
        if not 0 <= getattr(self, "eps", 0) < inf:
            raise OptionError(f"eps is zero or a little more, not {getattr(self, 'eps', 0)}")


def _channels(channels: int) -> int:
    if channels < 1:
        raise ShapeError(f"a normalisation takes at least one channel, not {channels}")
    return channels


class LayerNorm(_Norm):
    """y = (x - mean) / sqrt(var + eps) * gain + bias, over each row's last axis.

    x (rows, ..., channels) -> y like x; gain (channels,) starts at one, bias (channels,) at zero.
    [Ba, Kiros, Hinton 2016, arXiv:1607.06450]
    """

    gain: Array
    bias: Array
    eps: float

    def __init__(self, channels: int, *, eps: float = 1e-5, dtype: object = "float32") -> None:
        kind = float_dtype(dtype)
        self._set(
            gain=np.ones(_channels(channels), kind),
            bias=np.zeros(channels, kind),
            eps=float(eps),
        )

    def __call__(self, x: Array) -> Array:
        return kernels.layer_norm(x, self.gain, self.bias, eps=self.eps)

    @classmethod
    def examples(cls) -> Iterator[tuple[Layer, Shape]]:
        yield _drawn(cls(6, eps=1e-3)), (4, 6)
        yield _drawn(cls(33)), (2, 3, 33)


class RMSNorm(_Norm):
    """y = x / sqrt(mean(x²) + eps) * gain, over each row's last axis.

    x (rows, ..., channels) -> y like x; gain (channels,) starts at one.
    [Zhang & Sennrich 2019, arXiv:1910.07467]
    """

    gain: Array
    eps: float

    def __init__(self, channels: int, *, eps: float = 1e-6, dtype: object = "float32") -> None:
        self._set(
            gain=np.ones(_channels(channels), float_dtype(dtype)),
            eps=float(eps),
        )

    def __call__(self, x: Array) -> Array:
        return kernels.rms_norm(x, self.gain, eps=self.eps)

    @classmethod
    def examples(cls) -> Iterator[tuple[Layer, Shape]]:
        yield _drawn(cls(6, eps=1e-3)), (4, 6)
        yield _drawn(cls(33)), (2, 3, 33)


class BatchNorm(_Norm):
    """y = (x - mean) / sqrt(var + eps) * gain + bias, with the statistics that training recorded.

    x (rows, ..., channels) -> y like x; mean, var, gain and bias are (channels,) and start at
    0, 1, 1 and 0.   [Ioffe & Szegedy 2015, arXiv:1502.03167]
    """

    mean: Array
    var: Array
    gain: Array
    bias: Array
    eps: float

    def __init__(self, channels: int, *, eps: float = 1e-5, dtype: object = "float32") -> None:
        kind = float_dtype(dtype)
        self._set(
            mean=np.zeros(_channels(channels), kind),
            var=np.ones(channels, kind),
            gain=np.ones(channels, kind),
            bias=np.zeros(channels, kind),
            eps=float(eps),
        )

    def __call__(self, x: Array) -> Array:
        return kernels.batch_norm(x, self.mean, self.var, self.gain, self.bias, eps=self.eps)

    @classmethod
    def examples(cls) -> Iterator[tuple[Layer, Shape]]:
        yield _drawn(cls(6, eps=1e-3)), (4, 6)
        yield _drawn(cls(5)), (2, 3, 5)


class Standardize(_Norm):
    """y = (x - mean) / scale: the inputs in units of their spread, as scikit-learn's scaler.

    x (rows, ..., channels) -> y like x; mean and scale are (channels,), the scale without zeros.
    """

    mean: Array
    scale: Array

    def __init__(self, mean: Array, scale: Array) -> None:
        self._set(
            mean=mean,
            scale=scale,
        )

    def __call__(self, x: Array) -> Array:
        return kernels.standardize(x, self.mean, self.scale)

    @classmethod
    def examples(cls) -> Iterator[tuple[Layer, Shape]]:
        rng = np.random.default_rng(0)
        mean, scale = rng.normal(size=(2, 6)).astype("float32")
        yield cls(mean, np.abs(scale) + 0.1), (4, 6)


def _drawn(norm: Layer) -> Layer:
    """The layer with parameters drawn at random, so that none of them can be forgotten unseen."""
    rng = generator(0)
    return norm.with_parameters(
        {
            name: rng.uniform(0.5, 2, value.shape).astype(value.dtype)
            for name, value in norm.parameters().items()
        }
    )
