"""Softmax and its kin, over the last axis; all take `out=`, which may be their input."""

from __future__ import annotations

from typing import Any

import numpy as np

from nnxp._arrays import Array, xp_of
from nnxp.kernels.activations import activation


@activation
def softmax(x: Array, *, out: Array | None = None) -> Array:
    """y_i = exp(x_i - m) / sum_j exp(x_j - m), m = max_j x_j   [Bridle 1990]

    x (..., c) -> y (..., c), every row positive with sum 1. Subtracting the largest keeps exp
    from overflowing, as analysed by [Blanchard, Higham, Higham 2021, doi:10.1093/imanum/draa038].
    """
    xp = xp_of(x)
    with np.errstate(over="ignore"):  # x - m beyond the largest number: exp makes it the right 0
        y = xp.subtract(x, x.max(axis=-1, keepdims=True), out=out)
    xp.exp(y, out=y)
    y /= y.sum(axis=-1, keepdims=True)
    return y


@activation
def softmin(x: Array, *, out: Array | None = None) -> Array:
    """y_i = exp(m - x_i) / sum_j exp(m - x_j), m = min_j x_j: softmax of -x

    x (..., c) -> y (..., c).
    """
    y = xp_of(x).negative(x, out=out)
    return softmax.reference(y, out=y)


@activation
def log_softmax(x: Array, *, out: Array | None = None) -> Array:
    """y_i = (x_i - m) - log(sum_j exp(x_j - m)), m = max_j x_j   [as softmax]

    x (..., c) -> y (..., c).
    """
    xp = xp_of(x)
    with np.errstate(over="ignore"):  # x - m beyond the largest number is minus infinity, rightly
        y = xp.subtract(x, x.max(axis=-1, keepdims=True), out=out)
    y -= xp.log(xp.exp(y).sum(axis=-1, keepdims=True))
    return y


def log_sum_exp(x: Array, *, axis: Any = None, keepdims: bool = False) -> Array:
    """y = log(sum exp(x - m)) + m, m = max x, along one axis or several   [as softmax]"""
    xp = xp_of(x)
    top = x.max(axis=axis, keepdims=True)
    top = xp.where(xp.isfinite(top), top, xp.zeros_like(top))
    with np.errstate(divide="ignore"):  # the log of 0, of minus infinities alone, is right
        y = xp.log(xp.exp(x - top).sum(axis=axis, keepdims=True)) + top
    return y if keepdims else y.sum(axis=axis)


@softmax.vjp
def _softmax(dy: Array, y: Array, x: Array) -> tuple[Array]:
    worth = dy * y
    return (worth - y * worth.sum(axis=-1, keepdims=True),)


@log_softmax.vjp
def _log_softmax(dy: Array, y: Array, x: Array) -> tuple[Array]:
    return (dy - xp_of(y).exp(y) * dy.sum(axis=-1, keepdims=True),)
