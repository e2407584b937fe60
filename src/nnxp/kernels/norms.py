"""Normalisation, by the row's own statistics or by recorded ones."""

from __future__ import annotations

from nnxp._arrays import Array, xp_of
from nnxp._errors import OptionError, ShapeError
from nnxp.kernels._dispatch import kernel


@kernel
def layer_norm(
    x: Array, gain: Array | None = None, bias: Array | None = None, *, eps: float = 1e-5
) -> Array:
    """y = (x - mean) / sqrt(var + eps) * gain + bias   [Ba, Kiros, Hinton 2016, arXiv:1607.06450]

    x (..., c), gain (c,), bias (c,) -> y like x. Mean and variance run over the last axis in two
    passes, so a large common offset in x does not cancel the variance away. Squares overflow
    beyond the root of the largest number (1.8e19 in float32): there y is 0, with a warning.
    """
    xp = xp_of(x)
    y = x - x.mean(axis=-1, keepdims=True)
    scale = xp.square(y).mean(axis=-1, keepdims=True)
    scale += eps
    y /= xp.sqrt(scale, out=scale)
    return _gain_and_bias(y, gain, bias)


@layer_norm.vjp
def _layer_norm(
    dy: Array,
    y: Array,
    x: Array,
    gain: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[Array, ...]:
    """dx = (d - mean(d) - h mean(d h)) / s with d = dy gain and h = (x - mean) / s"""
    xp = xp_of(x)
    h = x - x.mean(axis=-1, keepdims=True)
    s = xp.sqrt(xp.square(h).mean(axis=-1, keepdims=True) + eps)
    h = h / s
    d = dy if gain is None else dy * gain
    along = h * (d * h).mean(axis=-1, keepdims=True)
    return (d - d.mean(axis=-1, keepdims=True) - along) / s, dy * h, dy


@kernel
def rms_norm(x: Array, gain: Array | None = None, *, eps: float = 1e-6) -> Array:
    """y = x / sqrt(mean(x^2) + eps) * gain   [Zhang & Sennrich 2019, arXiv:1910.07467]

    x (..., c), gain (c,) -> y like x; the mean runs over the last axis.
    """
    xp = xp_of(x)
    scale = xp.square(x).mean(axis=-1, keepdims=True)
    scale += eps
    return _gain_and_bias(x / xp.sqrt(scale, out=scale), gain, None)


@rms_norm.vjp
def _rms_norm(
    dy: Array, y: Array, x: Array, gain: Array | None = None, *, eps: float = 1e-6
) -> tuple[Array, ...]:
    """dx = (d - h mean(d h)) / s, for y = h gain, h = x / s, d = dy gain"""
    xp = xp_of(x)
    s = xp.sqrt(xp.square(x).mean(axis=-1, keepdims=True) + eps)
    h = x / s
    d = dy if gain is None else dy * gain
    return (d - h * (d * h).mean(axis=-1, keepdims=True)) / s, dy * h


@kernel
def batch_norm(
    x: Array,
    mean: Array,
    var: Array,
    gain: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
) -> Array:
    """y = (x - mean) / sqrt(var + eps) * gain + bias   [Ioffe & Szegedy 2015, arXiv:1502.03167]

    x (..., c), the others (c,) -> y like x. Inference: mean and var are the running statistics
    that training recorded.
    """
    scale = xp_of(x).sqrt(var + eps)
    y = x - mean
    y *= (1 if gain is None else gain) / scale
    return _gain_and_bias(y, None, bias)


@kernel
def standardize(x: Array, mean: Array, scale: Array) -> Array:
    """y = (x - mean) / scale, for x (..., c), mean (c,), scale (c,) -> y like x

    In float64 if mean and scale are: what is left of a large mean is small, and then rounded.
    """
    y = x - mean
    y /= scale
    return y.astype(x.dtype, copy=False)


def _gain_and_bias(y: Array, gain: Array | None, bias: Array | None) -> Array:
    """y * gain + bias, in place"""
    if gain is not None:
        y *= gain
    if bias is not None:
        y += bias
    return y


@kernel
def mean_variance_norm(
    x: Array,
    gain: Array | None = None,
    bias: Array | None = None,
    *,
    axes: tuple[int, ...],
    eps: float = 1e-5,
) -> Array:
    """y = (x - mean) / sqrt(var + eps) * gain + bias, with mean and variance over these axes

    x (n, ...) -> y like x; gain and bias are of shapes that broadcast with x, and the axes are any
    but that of rows.
    """
    if any(axis % x.ndim == 0 for axis in axes):
        raise OptionError(f"axes of mean_variance_norm are not those of rows: {axes}")
    return _gain_and_bias(_centred_and_scaled(x, tuple(axes), eps), gain, bias)


def _centred_and_scaled(x: Array, axes: tuple[int, ...], eps: float) -> Array:
    """(x - mean) / sqrt(var + eps), in two passes."""
    xp = xp_of(x)
    y = x - x.mean(axis=axes, keepdims=True)
    scale = xp.square(y).mean(axis=axes, keepdims=True)
    scale += eps
    y /= xp.sqrt(scale, out=scale)
    return y


@kernel
def group_norm(
    x: Array,
    gain: Array | None = None,
    bias: Array | None = None,
    *,
    groups: int,
    eps: float = 1e-5,
) -> Array:
    """y = (x - mean) / sqrt(var + eps) * gain + bias   [Wu & He 2018, arXiv:1803.08494]

    x (n, *space, c), gain (c,), bias (c,) -> y like x. Mean and variance of each row run over all
    of space and over the c / groups channels of a group, in two passes.
    """
    channels = x.shape[-1]
    if x.ndim < 2 or groups < 1 or channels % groups:
        raise ShapeError(
            f"group_norm with {groups} groups takes (rows, *space, channels), the channels a "
            f"multiple of {groups}, but got (rows, *{x.shape[1:]})"
        )
    space = tuple(range(1, x.ndim - 1))

    def mean(a: Array) -> Array:
        """The mean of each group, for each of its channels: over space first, then over
        channels."""
        by_channel = a.mean(axis=space, keepdims=True) if space else a
        parts = by_channel.reshape(*by_channel.shape[:-1], groups, channels // groups)
        return xp.repeat(parts.mean(axis=-1), channels // groups, axis=-1)

    xp = xp_of(x)
    y = x - mean(x)
    scale = mean(xp.square(y))
    scale += eps
    y /= xp.sqrt(scale, out=scale)
    return _gain_and_bias(y, gain, bias)


@kernel
def instance_norm(
    x: Array, gain: Array | None = None, bias: Array | None = None, *, eps: float = 1e-5
) -> Array:
    """y = (x - mean) / sqrt(var + eps) * gain + bias   [Ulyanov, Vedaldi, Lempitsky 2016,
    arXiv:1607.08022]

    x (n, *space, c), gain (c,), bias (c,) -> y like x. Mean and variance of each row and channel
    run over space, in two passes.
    """
    if x.ndim < 3:
        raise ShapeError(f"instance_norm takes (rows, *space, channels) but got {x.ndim} axes")
    y = _centred_and_scaled(x, tuple(range(1, x.ndim - 1)), eps)
    return _gain_and_bias(y, gain, bias)


@kernel
def local_response_norm(
    x: Array, *, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Array:
    """y_c = x_c / (k + alpha / size * sum of x_j^2 for the `size` channels j around c)^beta

    [Krizhevsky, Sutskever, Hinton 2012]. x (n, ..., c) -> y like x. Where the size is even, one
    more of the channels is before c than behind it, as in PyTorch.
    """
    if size < 1:
        raise OptionError(f"size of local_response_norm is at least 1, not {size}")
    xp = xp_of(x)
    channels = x.shape[-1]
    around = ((0, 0),) * (x.ndim - 1) + ((size // 2, (size - 1) // 2),)
    squares = xp.pad(xp.square(x), around)
    total = squares[..., :channels].copy()
    for j in range(1, size):
        total += squares[..., j : j + channels]
    total *= alpha / size
    total += k
    return x / total**beta
