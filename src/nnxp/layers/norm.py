"""Normalisations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import KW_ONLY
from typing import Any, ClassVar

import numpy as np

from nnxp import kernels
from nnxp._arrays import Array, float_dtype, is_numeric, xp_of
from nnxp._errors import DtypeMismatch, OptionError, ShapeError
from nnxp.layers._layer import Example, Layer, array_shape, generator, is_real, whole
from nnxp.program import traced


class _Norm(Layer):
    """A normalisation over the last axis, whose size its first parameter has."""

    _several_axes = False

    def _fitting(self, x: Array) -> Array:
        """x, if it is (rows, ..., channels): others would be broadcast."""
        (first, *_) = self.parameters().values()
        if x.ndim < 2 or x.shape[-1] != first.shape[0]:
            raise ValueError("the last axis is that of the channels")
        return x

    def validate(self) -> None:
        names = [name for name, _ in self._fields() if name not in ("eps", "groups", "rounded_to")]
        shapes = [array_shape(self, name) for name in names]
        axes = len(shapes[0]) if self._several_axes else 1
        if len(set(shapes)) != 1 or len(shapes[0]) != max(1, axes) or 0 in shapes[0]:
            wanted, came = ", ".join(names), ", ".join(map(str, shapes))
            raise ShapeError(f"{type(self).__name__} takes (channels,) for {wanted}; got {came}")
        eps = getattr(self, "eps", 0.0)
        if not (is_real(eps) and eps >= 0):
            raise OptionError(f"eps is zero or a little more, not {eps!r:.60}")


class LayerNorm(_Norm):
    """y = (x - mean) / sqrt(var + eps) * gain + bias, over each row's last axis, or last axes.

    x (rows, ..., channels) -> y like x; gain (channels,) starts at one, bias (channels,) at zero.
    Several sizes, as in LayerNorm((7, 7, 64)), stand for as many last axes, which are normalised
    together. [Ba, Kiros, Hinton 2016, arXiv:1607.06450]
    """

    _several_axes = True

    gain: Array
    bias: Array
    eps: float

    def __init__(
        self, channels: int | tuple[int, ...], *, eps: float = 1e-5, dtype: object = "float32"
    ) -> None:
        kind = float_dtype(dtype)
        sizes = channels if isinstance(channels, tuple | list) else (channels,)
        shape = tuple(whole("a normalisation's channels", size) for size in sizes)
        self.gain = np.ones(shape, kind)
        self.bias = np.zeros(shape, kind)
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        axes = self.gain.ndim
        if axes == 1:
            return kernels.layer_norm(self._fitting(x), self.gain, self.bias, eps=self.eps)
        if x.shape[-axes:] != self.gain.shape or x.ndim <= axes:
            raise ValueError(f"the last axes are {self.gain.shape}")
        last = tuple(range(-axes, 0))
        return kernels.mean_variance_norm(x, self.gain, self.bias, axes=last, eps=self.eps)

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield _drawn(cls(6, eps=1e-3)), (4, 6)
        yield _drawn(cls(33)), (2, 3, 33)
        yield _drawn(cls((3, 4))), (2, 2, 3, 4)


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
        return kernels.batch_norm(
            self._fitting(x), self.mean, self.var, self.gain, self.bias, eps=self.eps
        )

    def training(self) -> Any:
        return _BatchNormInTraining.of(**dict(self._fields()))

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield _drawn(cls(6, eps=1e-3)), (4, 6)
        yield _drawn(cls(5)), (2, 3, 5)


class _BatchNormInTraining(BatchNorm):
    """BatchNorm by the batch's own mean and variance; tells the running ones."""

    in_training = True

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


class GroupNorm(_Norm):
    """y = (x - mean) / sqrt(var + eps) * gain + bias, over space and each group's channels.

    x (rows, *space, channels) -> y like x; gain (channels,) starts at one, bias (channels,) at
    zero. [Wu & He 2018, arXiv:1803.08494]
    """

    gain: Array
    bias: Array
    groups: int
    eps: float

    def __init__(
        self, groups: int, channels: int, *, eps: float = 1e-5, dtype: object = "float32"
    ) -> None:
        kind, channels = float_dtype(dtype), whole("a normalisation's channels", channels)
        self.gain = np.ones(channels, kind)
        self.bias = np.zeros(channels, kind)
        self.groups, self.eps = groups, eps

    def validate(self) -> None:
        super().validate()
        channels = self.gain.shape[0]
        if channels % whole("GroupNorm's groups", self.groups):
            raise OptionError(
                f"groups of GroupNorm divides its {channels} channels, not {self.groups}"
            )

    def __call__(self, x: Array) -> Array:
        x = self._fitting(x)
        return kernels.group_norm(x, self.gain, self.bias, groups=self.groups, eps=self.eps)

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield _drawn(cls(2, 6, eps=1e-3)), (3, 4, 5, 6)
        yield _drawn(cls(3, 6)), (4, 6)


class InstanceNorm(_Norm):
    """y = (x - mean) / sqrt(var + eps) * gain + bias, over each row's space, channel by channel.

    x (rows, *space, channels) -> y like x; gain (channels,) starts at one, bias (channels,) at
    zero. [Ulyanov, Vedaldi, Lempitsky 2016, arXiv:1607.08022]
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
        return kernels.instance_norm(self._fitting(x), self.gain, self.bias, eps=self.eps)

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield _drawn(cls(3, eps=1e-3)), (3, 4, 5, 3)
        yield _drawn(cls(4)), (2, 7, 4)


class LocalResponseNorm(Layer):
    """y_c = x_c / (k + alpha / size * sum of x_j^2 for the `size` channels j around c)^beta

    x (rows, ..., channels) -> y like x. [Krizhevsky, Sutskever, Hinton 2012]
    """

    size: int
    _: KW_ONLY
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 1.0

    def validate(self) -> None:
        whole("LocalResponseNorm's size", self.size)

    def __call__(self, x: Array) -> Array:
        return kernels.local_response_norm(x, **dict(self._fields()))

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield cls(5, alpha=0.5), (3, 2, 7)
        yield cls(2, alpha=0.1, beta=0.5, k=2.0), (3, 4)


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
        self.mean, self.scale = _numbers("mean", mean), _numbers("scale", scale)
        scale = self.scale
        if type(scale) is np.ndarray and not (np.isfinite(scale) & (scale != 0)).all():
            raise OptionError(
                "scale of Standardize has zeros, NaN or infinity: a column that never changes has "
                "scale 1"
            )

    def __call__(self, x: Array) -> Array:
        return kernels.standardize(self._fitting(x), self.mean, self.scale)

    @classmethod
    def examples(cls) -> Iterator[Example]:
        rng = np.random.default_rng(0)
        mean, scale = rng.normal(size=(2, 6)).astype("float32")
        yield cls(mean, np.abs(scale) + 0.1), (4, 6)


class _StandardizeInTraining(Standardize):
    """Standardize that rounds to a model's type, behind which no large mean is in the rows."""

    takes = ("any",)
    rounded_to: str

    def __call__(self, x: Array) -> Array:
        return super().__call__(x).astype(self.rounded_to, copy=False)


def rounding(layer: Standardize, dtype: np.dtype[Any]) -> Standardize:
    """The same layer, which rounds what it answers to this type: for rows that are wider."""
    return _StandardizeInTraining.of(mean=layer.mean, scale=layer.scale, rounded_to=dtype.name)


def _numbers(name: str, values: Any) -> Array:
    """Real numbers as an array, if they are host numbers; what else came is for `validate`."""
    if not isinstance(values, list | tuple | np.ndarray):
        return values
    with suppress(ValueError, TypeError):
        array = np.asarray(values)
        if is_numeric(array.dtype):
            return array.astype("float64", copy=False)
    raise DtypeMismatch(f"{name} of Standardize is one real number a column, not {values!r:.60}")


def _drawn(norm: Layer) -> Layer:
    """The layer with parameters drawn at random, so that none of them can be forgotten unseen."""
    rng = generator(0)
    return norm.with_parameters(
        {
            name: rng.uniform(0.5, 2, value.shape).astype(value.dtype)
            for name, value in norm.parameters().items()
        }
    )
