"""Attention: a query looks at all keys and takes the mean of their values, weighted by likeness."""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np

from nnxp._arrays import Array, xp_of
from nnxp._errors import DtypeMismatch, ShapeError
from nnxp.kernels._dispatch import kernel


@kernel
def attention(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    precision: str | None = None,
) -> Array:
    """y = softmax(scale q kᵀ + mask) v   [Vaswani et al. 2017, arXiv:1706.03762]

    q (..., heads, queries, c), k (..., groups, keys, c), v (..., groups, keys, d)
    -> y (..., heads, queries, d); scale is 1 / sqrt(c) unless it is given. Each group of keys and
    values serves heads / groups heads that follow each other [Ainslie et al. 2023,
    arXiv:2305.13245].

    `mask` broadcasts to (..., heads, queries, keys). A boolean one is True where a query may look;
    one of floats is added. `causal` lets query i look at the keys 0 to i only. A query that may
    look nowhere gets zeros, as from torch's scaled_dot_product_attention. `precision` is as for
    matmul.

    Raises ShapeError for arrays that do not fit, DtypeMismatch for a mask of whole numbers.
    """
    xp = xp_of(q)
    if not fit(q, k, v):
        raise ShapeError(
            "attention takes q (..., heads, queries, c), k (..., groups, keys, c) and v (..., "
            "groups, keys, d), with heads a multiple of groups; got "
            f"{q.shape}, {k.shape}, {v.shape}"
        )
    shape, groups = (*q.shape[:-1], v.shape[-1]), k.shape[-3]
    if groups != q.shape[-3]:
        q, k, v = _in_groups(q, groups), k[..., None, :, :], v[..., None, :, :]
        mask = None if mask is None else _in_groups(mask, groups)
    scale = 1 / sqrt(q.shape[-1]) if scale is None else scale
    scores = xp.matmul(q * scale, k.swapaxes(-1, -2))
    with np.errstate(over="ignore"):  # beyond the largest number: minus infinity, whose exp is 0
        if mask is not None:
            scores = _masked(scores, mask)
        if causal:
            scores = xp.where(_at_or_before(xp, *scores.shape[-2:]), scores, -np.inf)
        # The largest gives exp(0) = 1, so that the sum is at least 1, unless all is masked.
        largest = xp.maximum(scores.max(axis=-1, keepdims=True), float(np.finfo(q.dtype).min))
        scores -= largest
    xp.exp(scores, out=scores)
    y = xp.matmul(scores, v)
    y /= xp.maximum(scores.sum(axis=-1, keepdims=True), 1)
    return y.reshape(shape)


def fit(q: Array, k: Array, v: Array) -> bool:
    """Whether queries, keys and values fit each other."""
    if min(q.ndim, k.ndim, v.ndim) < 3 or 0 in (q.shape[-1], k.shape[-3]):
        return False
    groups, keys, c = k.shape[-3:]
    return bool(q.shape[-3] % groups == 0) and q.shape[-1] == c and v.shape[-3:-1] == (groups, keys)


def _in_groups(x: Array, groups: int) -> Array:
    """x (..., heads, a, b) as (..., groups, heads / groups, a, b); one for all heads as it is"""
    if x.ndim < 3:
        return x
    heads = x.shape[-3]
    if heads == 1:
        return x[..., None, :, :]
    return x.reshape(*x.shape[:-3], groups, heads // groups, *x.shape[-2:])


def _masked(scores: Array, mask: Array) -> Array:
    """The scores where they count, minus infinity elsewhere."""
    if mask.dtype.kind == "b":
        return xp_of(scores).where(mask, scores, -np.inf)
    if mask.dtype.kind in "iu":
        raise DtypeMismatch(
            f"a mask of attention is boolean, True where a query may look, or of floats, which are "
            f"added; not {mask.dtype}: mask.astype(bool) makes it boolean"
        )
    return scores + mask.astype(scores.dtype, copy=False)


def _at_or_before(xp: Any, queries: int, keys: int) -> Array:
    """(queries, keys), True where the key's place is not behind the query's"""
    return xp.arange(keys) <= xp.arange(queries)[:, None]
