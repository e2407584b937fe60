"""Normalisation over the last axis, by the row's own statistics or by recorded ones."""

from __future__ import annotations

from nnxp._arrays import Array, xp_of
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


@kernel
def rms_norm(x: Array, gain: Array | None = None, *, eps: float = 1e-6) -> Array:
    """y = x / sqrt(mean(x^2) + eps) * gain   [Zhang & Sennrich 2019, arXiv:1910.07467]

    x (..., c), gain (c,) -> y like x; the mean runs over the last axis.
    """
    xp = xp_of(x)
    scale = xp.square(x).mean(axis=-1, keepdims=True)
    scale += eps
    return _gain_and_bias(x / xp.sqrt(scale, out=scale), gain, None)


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
    """y = (x - mean) / scale, for x (..., c), mean (c,), scale (c,) -> y like x"""
    y = x - mean
    y /= scale
    return y


def _gain_and_bias(y: Array, gain: Array | None, bias: Array | None) -> Array:
    """y * gain + bias, in place"""
    if gain is not None:
        y *= gain
    if bias is not None:
        y += bias
    return y
