"""Recurrences whose steps write into memory that is set aside."""

from __future__ import annotations

from typing import Any

import numpy as np

from nnxp._arrays import HostArray
from nnxp.kernels._dispatch import Given, InPlace
from nnxp.kernels.cpu._pieces import carved, plain, room
from nnxp.kernels.recurrent import lstm


@lstm.in_place
def lstm_in_place(
    x: Given,
    weight: Given,
    projection: Given | None = None,
    h: Given | None = None,
    c: Given | None = None,
    lengths: Given | None = None,
    *,
    reverse: bool = False,
) -> InPlace | None:
    """Without a projection or lengths: the gates of a step are made apart from the new values, so
    that each lie in one piece."""
    if projection is not None or lengths is not None or weight.numbers is None:
        return None
    if not plain(x, weight, h, c) or x.ndim != 3 or not x.shape[1]:
        return None
    numbers = weight.numbers
    size = numbers.shape[0]
    gating, making = map(np.ascontiguousarray, (numbers[:, : 3 * size], numbers[:, 3 * size :]))
    dtype, time = x.dtype, x.shape[1]
    order = range(time)[::-1] if reverse else range(time)

    def run(
        y: HostArray, h: HostArray, c: HostArray, scratch: HostArray, x: HostArray, *given: Any
    ) -> None:
        rows = len(x)
        gates, new = carved(scratch, dtype, (rows, 3 * size), (rows, size))
        for state, first in zip((h, c), given[2:4], strict=True):
            np.copyto(state, 0 if first is None else first)
        for t in order:
            np.dot(h, gating, out=gates)
            np.dot(h, making, out=new)
            gates += x[:, t, : 3 * size]
            new += x[:, t, 3 * size :]
            np.negative(gates, out=gates)
            with np.errstate(over="ignore"):  # infinite, of which the reciprocal is 0
                np.exp(gates, out=gates)
            gates += 1
            np.reciprocal(gates, out=gates)
            np.tanh(new, out=new)
            new *= gates[:, :size]
            c *= gates[:, size : 2 * size]
            c += new
            np.tanh(c, out=h)
            h *= gates[:, 2 * size :]
            y[:, t] = h

    return InPlace(run, lambda rows: room(dtype, (rows, 3 * size), (rows, size)))
