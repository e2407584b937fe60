"""Attention row by row, and softmax and norms by pieces."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat
from math import prod, sqrt
from typing import Any

import numpy as np

from nnxp._arrays import HostArray, Shape
from nnxp.kernels._dispatch import InPlace, Operand
from nnxp.kernels.attention import attention
from nnxp.kernels.cpu import onednn
from nnxp.kernels.cpu._pieces import PIECE, carved, plain, room
from nnxp.kernels.norms import layer_norm


@attention.in_place
def attention_in_place(
    q: Operand,
    k: Operand,
    v: Operand,
    mask: Operand | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    precision: str | None = None,
) -> InPlace | None:
    """With as many groups as heads: the scores of one row at a time.

    The scores lie by keys, so that the largest are found, and taken away, along all queries at
    once; they are summed by a product with ones, and what they make of the values is divided. A
    key that a mask hides from all is one stretch of them. By oneDNN, unless a mask of booleans or
    the order hides keys, they lie by queries.
    """
    if not plain(q, k, v) or {q.ndim, k.ndim, v.ndim} != {4}:
        return None
    heads, queries, channels = q.shape[1:]
    keys = k.shape[2]
    if k.shape[1:] != (heads, keys, channels) or v.shape[1:3] != (heads, keys) or not keys:
        return None
    if mask is not None and (mask.ndim > 4 or mask.dtype not in (q.dtype, np.dtype("bool"))):
        return None
    seen: Shape = (1,) * 4 if mask is None else (1,) * (4 - mask.ndim) + mask.shape
    if any(n not in (1, most) for n, most in zip(seen[1:], (heads, queries, keys), strict=True)):
        return None  # the reference body says what is wrong
    factor = 1 / sqrt(channels) if scale is None else scale
    ones = np.ones((1, keys), q.dtype)
    lowest = np.finfo(q.dtype).min
    shapes = (heads, keys, queries), (heads, queries, channels), (heads, 1, queries)
    limits_of = (seen[1], seen[3], seen[2]), (1, keys if causal else 0, queries)
    needed = room(q.dtype, *shapes, *limits_of)
    by_onednn = (
        onednn.has(q.dtype)
        and heads * queries * keys >= onednn.MANY
        and not causal
        and (mask is None or mask.dtype == q.dtype)
    )

    def hide(scores: HostArray, limits: HostArray, allowed: HostArray) -> None:
        """Minus infinity where a mask, (heads, keys, queries) or 1 for any of them, is False."""
        if allowed.size == keys:
            scores[:, ~allowed[0, :, 0]] = -np.inf
            return
        _limits(limits, allowed)
        np.fmin(scores, limits, out=scores)

    def run(
        out: HostArray, scratch: HostArray, q: HostArray, k: HostArray, v: HostArray, *masks: Any
    ) -> None:
        scores, scaled, sums, limits, before = carved(scratch, q.dtype, *shapes, *limits_of)
        row_masks: Iterable[HostArray | None] = repeat(None)
        if mask is not None:
            row_masks = np.broadcast_to(masks[0].reshape(-1, *seen[1:]), (len(q), *seen[1:]))
        if causal:
            _limits(before, np.arange(keys)[:, None] <= np.arange(queries))
        for one, other, values, own, y in zip(q, k, v, row_masks, out, strict=False):
            np.multiply(one, factor, out=scaled)
            if by_onednn:
                weights = scores.reshape(heads, queries, keys)
                onednn.multiply(scaled, other.swapaxes(1, 2), weights)
                if own is not None:
                    with np.errstate(invalid="ignore"):  # of infinity and minus infinity
                        np.add(weights, own, out=weights)
                onednn.softmax(weights)
                onednn.multiply(weights, values, y)
                if not np.isnan(y).any():  # as of a query that may look at no key
                    continue
            np.matmul(other, scaled.swapaxes(1, 2), out=scores)
            with np.errstate(over="ignore", invalid="ignore"):  # minus infinity, whose exp is 0
                if own is not None and own.dtype == "bool":
                    hide(scores, limits, own.swapaxes(1, 2))
                elif own is not None:
                    np.add(scores, own.swapaxes(1, 2), out=scores)
                if causal:
                    np.fmin(scores, before, out=scores)
                np.maximum.reduce(scores, axis=1, keepdims=True, out=sums)
                np.maximum(sums, lowest, out=sums)
                np.subtract(scores, sums, out=scores)
            np.exp(scores, out=scores)
            np.matmul(ones, scores, out=sums)
            np.maximum(sums, 1, out=sums)
            np.matmul(scores.swapaxes(1, 2), values, out=y)
            np.divide(y, sums.swapaxes(1, 2), out=y)

    made_anew = (prod(limits_of[1]) if causal else 0) + keys
    return InPlace(run, lambda rows: needed + made_anew)


def _limits(limits: HostArray, allowed: HostArray) -> None:
    """What scores are to be at most, by fmin: a fourth of the time that a copy `where` takes.

    A score that is no number is infinite then, and makes its query none all the same.
    """
    limits.fill(-np.inf)
    np.copyto(limits, np.inf, where=allowed)


@layer_norm.in_place
def layer_norm_in_place(
    x: Operand, gain: Operand | None = None, bias: Operand | None = None, *, eps: float = 1e-5
) -> InPlace | None:
    """By oneDNN, or by pieces, each of whose sums are a product with ones."""
    size = x.shape[-1]
    constant = all(operand is None or operand.numbers is not None for operand in (gain, bias))
    if not constant or not plain(x, gain, bias) or x.ndim < 3 or not size:
        return None
    by_onednn = None
    if onednn.has(x.dtype):
        by_onednn = onednn.layer_norm(size, gain and gain.numbers, bias and bias.numbers, eps)
    step = max(1, PIECE // (size * x.dtype.itemsize))
    ones = np.ones((size, 1), x.dtype)
    lines_of_row = prod(x.shape[1:-1])

    def shapes(rows: int) -> tuple[Shape, Shape]:
        lines = min(step, rows * lines_of_row)
        return (lines, size), (lines, 1)

    def bytes_for(rows: int) -> int:
        if by_onednn is None:
            return room(x.dtype, *shapes(rows))
        return by_onednn.scratch + by_onednn.further * rows * lines_of_row

    def run(out: HostArray, scratch: HostArray, x: HostArray, *_: Any) -> None:
        y = out.reshape(-1, size)
        flat = x.reshape(-1, size) if x.flags.c_contiguous else None
        if flat is None:
            np.copyto(out, x)
            flat = y
        if by_onednn is not None:
            onednn.normalize(by_onednn, flat, y, scratch)
            return
        squares, means = carved(scratch, x.dtype, *shapes(len(x)))
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

    return InPlace(run, bytes_for)
