"""Pools by pieces of a few pictures."""

from __future__ import annotations

from math import inf, prod
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from nnxp._arrays import HostArray, Shape
from nnxp.kernels._dispatch import InPlace, Operand
from nnxp.kernels._windows import Padding, PerAxis
from nnxp.kernels.cpu import onednn
from nnxp.kernels.cpu._pieces import carved, plain, room
from nnxp.kernels.pool import _pooled, average_pool, max_pool, max_pool_gradient

PICTURES = 1 << 20
"""Bytes of pictures at once: with fewer, threads that work side by side wait for one another."""


@max_pool.in_place
def max_pool_in_place(
    x: Operand,
    *,
    window: tuple[int, ...],
    stride: PerAxis | None = None,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    ceil_mode: bool = False,
) -> InPlace | None:
    """For two axes of space: the largest of lines first, which are whole stretches of memory."""
    if not plain(x) or x.ndim != 4 or 0 in x.shape[1:]:
        return None
    options = {"stride": window if stride is None else stride, "padding": padding}
    over = _pooled("max_pool", x, window, options | {"dilation": dilation, "ceil_mode": ceil_mode})
    if any(pad < 0 for pair in over.pads for pad in pair):
        return None
    (top, bottom), (left, right) = over.pads
    _, tall, broad, channels = x.shape
    (height, width), (down, across), (apart, beside) = over.positions, over.stride, over.dilation
    needs_copy = any(map(any, over.pads))
    around = (tall + top + bottom, broad + left + right, channels)
    pictures = max(1, PICTURES // (prod(around) * x.dtype.itemsize))

    def shapes(rows: int) -> tuple[Shape, Shape]:
        together = min(rows, pictures)
        lines = (together, height, around[1], channels)
        return lines, (together, *around) if needs_copy else (0,)

    def run(out: HostArray, scratch: HostArray, x: HostArray) -> None:
        memory, own = carved(scratch, x.dtype, *shapes(len(x)))
        if needs_copy:
            own[...] = -inf
        for start in range(0, len(x), pictures):
            part, y = x[start : start + pictures], out[start : start + pictures]
            high = memory[: len(part)]
            if needs_copy:
                own[: len(part), top : top + tall, left : left + broad] = part
                part = own[: len(part)]
            ends = (k * apart + (height - 1) * down + 1 for k in range(over.window[0]))
            largest([part[:, k * apart : end : down] for k, end in enumerate(ends)], high)
            ends = (k * beside + (width - 1) * across + 1 for k in range(over.window[1]))
            largest([high[:, :, k * beside : end : across] for k, end in enumerate(ends)], y)

    return InPlace(run, lambda rows: room(x.dtype, *shapes(rows)))


@average_pool.in_place
def average_pool_in_place(
    x: Operand, *, window: tuple[int, ...], count_include_pad: bool = False, **options: Any
) -> InPlace | None:
    """By oneDNN."""
    if not plain(x) or 0 in x.shape[1:] or not onednn.has(x.dtype):
        return None
    over = _pooled("average_pool", x, window, options)
    counts_beyond = count_include_pad and any(map(any, over.beyond))
    if counts_beyond or any(pad < 0 for pair in over.pads for pad in pair):
        return None
    mean = onednn.mean(x.shape[1:-1], x.shape[-1], over, count_include_pad)
    if mean is None:
        return None

    def run(out: HostArray, scratch: HostArray, x: HostArray) -> None:
        if not x.flags.c_contiguous:
            (own,) = carved(scratch, x.dtype, x.shape)
            onednn.copy(x, own)
            x = own
        if len(x):
            mean(x, out)

    size = prod(x.shape[1:])
    return InPlace(run, lambda rows: room(x.dtype, (rows, size)), lambda rows: rows * size)


@max_pool_gradient.in_place
def max_pool_gradient_in_place(
    dy: Operand, x: Operand, *, window: tuple[int, ...], **options: Any
) -> InPlace | None:
    """For two axes of space whose windows do not overlap: each element of them in memory of its
    own, for NumPy takes three times as long for short stretches of memory."""
    if not plain(dy, x) or x.ndim != 4 or 0 in x.shape[1:]:
        return None
    over = _pooled("max_pool", x, window, options)
    if over.stride != over.window or over.dilation != (1, 1) or any(map(any, over.pads)):
        return None
    (height, width), (down, across) = over.positions, over.window
    channels, dtype = x.shape[-1], x.dtype
    pictures = max(1, PICTURES // (prod(x.shape[1:]) * dtype.itemsize))
    everywhere = x.shape[1:3] == (height * down, width * across)

    def shape(rows: int) -> Shape:
        """Of the elements, and of which of them are above those before."""
        return down, across, min(rows, pictures), height, width, channels

    def run(out: HostArray, scratch: HostArray, dy: HostArray, x: HostArray) -> None:
        (memory,) = carved(scratch, dtype, shape(len(x)))
        (masks,) = carved(scratch[room(dtype, memory.shape) :], bool, memory.shape)
        if not everywhere:
            out[...] = 0
        for start in range(0, len(x), pictures):
            part, worth = x[start : start + pictures], dy[start : start + pictures]
            grid, above = memory[:, :, : len(part)], masks[:, :, : len(part)]
            np.copyto(grid, _taps(part, (height, width), over.window))
            for line, beside in zip(grid, above, strict=True):
                _compared(line, beside)
            _compared(grid[:, 0], above[:, 0])
            _shared(worth, grid[:, 0], above[:, 0])
            for line, beside in zip(grid, above, strict=True):
                _shared(line[0], line, beside)
            np.copyto(_taps(out[start : start + pictures], (height, width), over.window), grid)

    return InPlace(run, lambda rows: room(dtype, shape(rows)) + room(bool, shape(rows)))


def _taps(x: HostArray, positions: Shape, window: Shape) -> HostArray:
    """x (n, *space, c) -> (*window, n, *positions, c): a view of each element of windows that
    stand next to each other."""
    (height, width), (down, across) = positions, window
    seen = x[:, : height * down, : width * across]
    n, h, w, c = seen.strides
    shape = down, across, len(x), height, width, x.shape[-1]
    return as_strided(seen, shape, (h, w, n, h * down, w * across, c))


def _compared(x: HostArray, above: HostArray) -> None:
    """Which of x (k, ...) is above all before it; the largest is in x[0] then."""
    for later, mask in zip(x[1:], above[1:], strict=True):
        np.greater(later, x[0], mask)
        np.maximum(x[0], later, out=x[0])


def _shared(worth: HostArray, x: HostArray, above: HostArray) -> None:
    """`worth` to the last of x (k, ...) that is above all before it; 0 to the others."""
    for later, mask in zip(x[:0:-1], above[:0:-1], strict=True):
        np.multiply(worth, mask, later)
        np.subtract(worth, later, x[0])
        worth = x[0]
    if len(x) == 1 and worth is not x[0]:
        np.copyto(x[0], worth)


def largest(seen: list[HostArray], out: HostArray) -> None:
    """The largest of some arrays, element by element."""
    first, *others = seen
    if not others:
        np.copyto(out, first)
        return
    np.maximum(first, others[0], out=out)
    for other in others[1:]:
        np.maximum(out, other, out=out)
