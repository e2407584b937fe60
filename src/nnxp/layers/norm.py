"""Normalisations."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from typing import Any, ClassVar

import numpy as np

from nnxp import kernels
from nnxp._arrays import Array, float_dtype, xp_of
from nnxp._errors import OptionError, ShapeError
from nnxp.layers._layer import Example, Layer, array_shape, generator, whole
from nnxp.program import traced


class _Norm(Layer):
    """A normalisation over the last axis, whose size its first parameter has."""

    def _fitting(self, x: Array) -> Array:
        """x, if it is (rows, ..., channels): others would be broadcast."""
        (first, *_) = self.parameters().values()
        if x.ndim < 2 or x.shape[-1] != first.shape[0]:
            raise ValueError("the last axis is that of the channels")
        return x

    def validate(self) -> None:
        names = [name for name, _ in self._fields() if name != "eps"]
        shapes = [array_shape(self, name) for name in names]
        if len(set(shapes)) != 1 or len(shapes[0]) != 1 or shapes[0][0] < 1:
            wanted, came = ", ".join(names), ", ".join(map(str, shapes))
            raise ShapeError(f"{type(self).__name__} takes (channels,) for {wanted}; got {came}")
        eps = getattr(self, "eps", 0.0)
        if not (isinstance(eps, int | float) and 0 <= eps < inf):
            raise OptionError(f"eps is zero or a little more, not {eps!r:.60}")


class LayerNorm(_Norm):
    """y = (x - mean) / sqrt(var + eps) * gain + bias, over each row's last axis.

    x (rows, ..., channels) -> y like x; gain (channels,) starts at one, bias (channels,) at zero.
    [Ba, Kiros, Hinton 2016, arXiv:1607.06450]
    """

    gain: Array
    bias: Array
    eps: float

    def __init__(self, channels: int, *, eps: float = 1e-5, dtype: object = "float32") -> None:
        kind, channels = float_dtype(dtype), whole("a normalisation's channels", channels)
        self.gain = np.ones(channels, kind)
        self.bias = np.zeros(channels, kind)
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        return kernels.layer_norm(self._fitting(x), self.gain, self.bias, eps=self.eps)

    @classmethod
    def examples(cls) -> Iterator[Example]:
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
        channels = whole("a normalisation's channels", channels)
        self.gain = np.ones(channels, float_dtype(dtype))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        return kernels.rms_norm(self._fitting(x), self.gain, eps=self.eps)

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield _drawn(cls(6, eps=1e-3)), (4, 6)
        yield _drawn(cls(33)), (2, 3, 33)


class BatchNorm(_Norm):
    """y = (x - mean) / sqrt(var + eps) * gain + bias, with the statistics that training recorded.

    x (rows, ..., channels) -> y like x; mean, var, gain and bias are (channels,) and start at
    0, 1, 1 and 0.   [Ioffe & Szegedy 2015, arXiv:1502.03167]

    In training, mean and var are those of the batch, over all axes but the last, and the running
    ones move a tenth of the way to them; var then is the unbiased one, as in torch.
    """

    fixed = ("mean", "var")
    momentum: ClassVar[float] = 0.1
    """How much of the running statistics a batch replaces in training."""

    mean: Array
    var: Array
    gain: Array
    bias: Array
    eps: float

    def __init__(self, channels: int, *, eps: float = 1e-5, dtype: object = "float32") -> None:
        kind, channels = float_dtype(dtype), whole("a normalisation's channels", channels)
        self.mean = np.zeros(channels, kind)
        self.var = np.ones(channels, kind)
        self.gain = np.ones(channels, kind)
        self.bias = np.zeros(channels, kind)
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        return kernels.batch_norm(self._fitting(x), self.mean, self.var, self.gain, self.bias, eps=self.eps)

    def training(self) -> Any:
        return _BatchNormInTraining.of(**dict(self._fields()))

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield _drawn(cls(6, eps=1e-3)), (4, 6)
        yield _drawn(cls(5)), (2, 3, 5)


class _BatchNormInTraining(BatchNorm):
    """BatchNorm by the batch's own mean and variance; tells the running ones."""

    def __call__(self, x: Array) -> Array:
        self._fitting(x)
        if not isinstance(x, traced.ndarray):
            raise OptionError(traced.ONLY_IN_TRAINING.format(self))
        axes = tuple(range(x.ndim - 1))
        count = x.size // x.shape[-1]
        if count < 2:
            raise ShapeError(f"{self}: one row has no variance; train on batches of two or more")
        mean = x.mean(axis=axes)
        y = x - mean
        var = (y * y).mean(axis=axes)
        traced.tell("mean", self.mean + (mean - self.mean) * self.momentum)
        traced.tell("var", self.var + (var * (count / (count - 1)) - self.var) * self.momentum)
        return y * (self.gain / xp_of(var).sqrt(var + self.eps)) + self.bias

    def training(self) -> _BatchNormInTraining:
        return self


class Standardize(_Norm):
    """y = (x - mean) / scale: the inputs in units of their spread, as scikit-learn's scaler.

    x (rows, ..., channels) -> y like x; mean and scale are (channels,), the scale without zeros.
    They stay in float64 whatever the type of x: a mean that is large beside the scale, as of times
    in seconds since 1970, would lose in float32 what the subtraction is to leave.
    """

    wide = ("mean", "scale")
    fixed = ("mean", "scale")

    mean: Array
    scale: Array

    def __init__(self, mean: Array, scale: Array) -> None:
        self.mean = np.asarray(mean) if isinstance(mean, list | tuple) else mean
        self.scale = np.asarray(scale) if isinstance(scale, list | tuple) else scale
        if type(self.scale) is np.ndarray and not (np.abs(self.scale) > 0).all():
            raise OptionError(
                "scale of Standardize has zeros or NaN: a column that never changes has scale 1"
            )

    def __call__(self, x: Array) -> Array:
        return kernels.standardize(self._fitting(x), self.mean, self.scale)

    @classmethod
    def examples(cls) -> Iterator[Example]:
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
