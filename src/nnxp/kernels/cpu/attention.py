"""Attention row by row, and softmax and norms by pieces."""

from __future__ import annotations

from math import prod, sqrt
from typing import Any

import numpy as np

from nnxp._arrays import HostArray, Shape
from nnxp.kernels._dispatch import Given, InPlace
from nnxp.kernels.attention import attention
from nnxp.kernels.cpu._pieces import PIECE, carved, plain, room
from nnxp.kernels.norms import layer_norm


@attention.in_place
def attention_in_place(
    q: Given,
    k: Given,
    v: Given,
    mask: Given | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> InPlace | None:
    """Without a mask, with as many groups as heads: the scores of one row at a time.

    The scores lie by keys, so that the largest are found, and taken away, along all queries at
    once; they are summed by a product with ones, and what they make of the values is divided.
    """
    if mask is not None or causal or not plain(q, k, v) or {q.ndim, k.ndim, v.ndim} != {4}:
        return None
    heads, queries, channels = q.shape[1:]
    keys = k.shape[2]
    if k.shape[1:] != (heads, keys, channels) or v.shape[1:3] != (heads, keys) or not keys:
        return None
    factor = 1 / sqrt(channels) if scale is None else scale
    ones = np.ones((1, keys), q.dtype)
    lowest = np.finfo(q.dtype).min
    shapes = (heads, keys, queries), (heads, queries, channels), (heads, 1, queries)

    def run(
        out: HostArray, scratch: HostArray, q: HostArray, k: HostArray, v: HostArray, *_: Any
    ) -> None:
        scores, scaled, sums = carved(scratch, q.dtype, *shapes)
        for one, other, values, y in zip(q, k, v, out, strict=True):
            np.multiply(one, factor, out=scaled)
            np.matmul(other, scaled.swapaxes(1, 2), out=scores)
            np.maximum.reduce(scores, axis=1, keepdims=True, out=sums)
            np.maximum(sums, lowest, out=sums)
            np.subtract(scores, sums, out=scores)
            np.exp(scores, out=scores)
            np.matmul(ones, scores, out=sums)
            np.maximum(sums, 1, out=sums)
            np.matmul(scores.swapaxes(1, 2), values, out=y)
            np.divide(y, sums.swapaxes(1, 2), out=y)

    return InPlace(run, lambda rows: room(q.dtype, *shapes))


@layer_norm.in_place
def layer_norm_in_place(
    x: Given, gain: Given | None = None, bias: Given | None = None, *, eps: float = 1e-5
) -> InPlace | None:
    """By pieces, each of whose sums are a product with ones."""
    size = x.shape[-1]
    constant = all(each is None or each.numbers is not None for each in (gain, bias))
    if not constant or not plain(x, gain, bias) or x.ndim < 3 or not size:
        return None
    step = max(1, PIECE // (size * x.dtype.itemsize))
    ones = np.ones((size, 1), x.dtype)
    each = prod(x.shape[1:-1])

    def shapes(rows: int) -> tuple[Shape, Shape]:
        lines = min(step, rows * each)
        return (lines, size), (lines, 1)

    def run(out: HostArray, scratch: HostArray, x: HostArray, *_: Any) -> None:
        squares, means = carved(scratch, x.dtype, *shapes(len(x)))
        y = out.reshape(-1, size)
        flat = x.reshape(-1, size) if x.flags.c_contiguous else None
        if flat is None:
            np.copyto(out, x)
            flat = y
        for start in range(0, len(y), step):
            part, into = flat[start : start + step], y[start : start + step]
            square, scale = squares[: len(into)], means[: len(into)]
            np.matmul(part, ones, out=scale)
            np.divide(scale, size, out=scale)
            np.subtract(part, scale, out=into)
            np.multiply(into, into, out=square)
            np.matmul(square, ones, out=scale)
            np.divide(scale, size, out=scale)
            np.add(scale, eps, out=scale)
            np.sqrt(scale, out=scale)
            np.divide(into, scale, out=into)
            if gain is not None:
                into *= gain.numbers
            if bias is not None:
                into += bias.numbers

    return InPlace(run, lambda rows: room(x.dtype, *shapes(rows)))
