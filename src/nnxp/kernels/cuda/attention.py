"""Attention as two products of stacks, and one pass over the scores between them."""

from __future__ import annotations

from math import prod, sqrt

import cupy

from nnxp._arrays import Array, is_floating
from nnxp.kernels.activations import identity
from nnxp.kernels.attention import attention, fit
from nnxp.kernels.cuda._compiled import fusable, unfused
from nnxp.kernels.cuda._rows import over_scores
from nnxp.kernels.cuda.activations import bias_act
from nnxp.kernels.cuda.lt import converted, on_this_device, stacked
from nnxp.kernels.cuda.lt.descriptors import FLOAT32


@attention.on("cupy")
def attention_lt(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    precision: str | None = None,
) -> Array:
    """y = softmax(scale q kᵀ + mask) v

    q (..., heads, queries, c), k (..., groups, keys, c), v (..., groups, keys, d)
    -> y (..., heads, queries, d). The queries of all heads of a group are rows of one product.
    Scores and weights are float32 in every type, so that 16 bits are rounded once, at the end; the
    second product is of float32, too.
    """
    if not _covered(q, k, v, mask):
        options = {"causal": causal, "scale": scale, "precision": precision}
        return unfused(attention, q, k, v, mask, **options)
    *lead, heads, queries, c = q.shape
    groups, keys, d = v.shape[-3:]
    n = prod(lead)
    stack = n * groups, heads // groups * queries
    scores = stacked(
        q.reshape(*stack, c), k.reshape(n * groups, keys, c).swapaxes(1, 2), FLOAT32, precision
    ).reshape(n, heads, queries, keys)
    if mask is not None:
        mask = mask if mask.dtype == bool else converted(mask, FLOAT32)
        mask = cupy.broadcast_to(mask, (*lead, heads, queries, keys)).reshape(scores.shape)
    over_scores(scores, mask, causal=causal, scale=1 / sqrt(c) if scale is None else scale)
    values = converted(v.reshape(n * groups, keys, d), FLOAT32)
    y = stacked(scores.reshape(*stack, keys), values, FLOAT32, precision)
    if q.dtype != FLOAT32:
        y = y.reshape(-1, d)
        y = bias_act(y, None, identity, cupy.empty(y.shape, q.dtype))
    return y.reshape(*lead, heads, queries, d)


def _covered(q: Array, k: Array, v: Array, mask: Array | None) -> bool:
    """Whether the arrays are of one type and here, with the same axes before the heads."""
    arrays = [q, k, v, *([] if mask is None else [mask])]
    return (
        on_this_device(*arrays)
        and fit(q, k, v)
        and fusable(q)
        and q.dtype == k.dtype == v.dtype
        and q.shape[:-3] == k.shape[:-3] == v.shape[:-3]
        and v.size > 0
        and (mask is None or mask.dtype == bool or is_floating(mask.dtype))
    )
