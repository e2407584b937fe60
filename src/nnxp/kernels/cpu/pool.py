"""Pools by pieces of a few pictures."""

from __future__ import annotations

from math import inf, prod

import numpy as np

from nnxp._arrays import HostArray, Shape
from nnxp.kernels._dispatch import Given, InPlace
from nnxp.kernels._windows import Padding, PerAxis
from nnxp.kernels.cpu._pieces import PIECE, carved, plain, room
from nnxp.kernels.pool import _pooled, max_pool


@max_pool.in_place
def max_pool_in_place(
    x: Given,
    *,
    window: tuple[int, ...],
    stride: PerAxis | None = None,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    ceil_mode: bool = False,
) -> InPlace | None:
    """For two axes of space: the largest of lines first, which are whole stretches of memory."""
    if not plain(x) or x.ndim != 4:
        return None
    options = {"stride": window if stride is None else stride, "padding": padding}
    over = _pooled("max_pool", x, window, options | {"dilation": dilation, "ceil_mode": ceil_mode})
    if any(each < 0 for pair in over.pads for each in pair):
        return None
    (top, bottom), (left, right) = over.pads
    _, tall, broad, channels = x.shape
    (height, width), (down, across), (apart, beside) = over.positions, over.stride, over.dilation
    needs_copy = any(map(any, over.pads))
    around = (tall + top + bottom, broad + left + right, channels)
    pictures = max(1, PIECE // (prod(around) * x.dtype.itemsize))

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


def largest(seen: list[HostArray], out: HostArray) -> None:
    """The largest of some arrays, element by element."""
    first, *others = seen
    if not others:
        np.copyto(out, first)
        return
    np.maximum(first, others[0], out=out)
    for other in others[1:]:
        np.maximum(out, other, out=out)
