"""GELU in a few passes over memory, of which oneDNN does many operations in one."""

from __future__ import annotations

import numpy as np

from nnxp._arrays import HostArray
from nnxp.kernels.cpu import onednn
from nnxp.kernels.cpu._pieces import PIECE, aligned, zeros

K = 3.25
RATIO = (  # by ascending powers; bench/fit_erf.py found them
    1.625,
    -2.5888264179229736,
    1.7793142795562744,
    -0.10555612295866013,
    -0.42957258224487305,
    0.024346115067601204,
    0.0016270511550828815,
    0.2634854316711426,
    -0.22788561880588531,
    0.0569770373404026,
)


def _passes(size: int) -> tuple[onednn.Plan, onednn.Plan]:
    """What makes v of x, and max(x, 0) - d v R(v) of v, d and max(x, 0)."""
    line, times = onednn.ON_A_LINE, onednn.MULTIPLY
    x, v = 0, 1
    share = onednn.in_one_pass(
        size, (onednn.LARGER, x, x), (onednn.ABSOLUTE, 0, 0), (line, 1, K), (onednn.POWER, 1, -1),
        (times, x), (onednn.ABSOLUTE, 0, 0), (onednn.CLIPPED, 0, 1), result=v,
    )  # fmt: skip
    *lower, next_one, highest = RATIO
    v, density, y = 0, 1, 2
    steps = (step for r in reversed(lower) for step in ((times, v), (line, 1, -r)))
    whole = onednn.in_one_pass(
        size, (onednn.ADD, v, v), (line, -highest / 2, -next_one), *steps,
        (times, v), (times, density), (onednn.ADD, y), result=y,
    )  # fmt: skip
    return share, whole


_planned = onednn.Planned(_passes)


def takes(y: HostArray) -> bool:
    """Whether y is worth oneDNN, and may go through it."""
    return y.size >= onednn.MANY and y.flags.c_contiguous and onednn.has(y.dtype)


def gelu_in_place(y: HostArray) -> None:
    """y = gelu(y), as max(x, 0) - |x| (1 - Phi(|x|)), by pieces

    The second term is exp(-x^2 / 2) v R(v), v = |x| / (|x| + K). Where x is infinite v is 0, and
    where it is no number max(x, 0) is none.
    """
    x = y.reshape(-1)
    size = min(x.size, PIECE // x.itemsize)
    v, density = aligned((size,), x.dtype), aligned((size,), x.dtype)
    threads = onednn.threads_for(size * onednn.A_PASS)
    with np.errstate(over="ignore"):  # of x^2, and exp(-inf) is right
        for start in range(0, x.size, size):
            part = x[start : start + size]
            piece = part, v[: part.size], density[: part.size]
            onednn.limited_to(threads, _piece, *piece, threads)


def _piece(x: HostArray, v: HostArray, density: HostArray, threads: int) -> None:
    plans, least = _planned(threads, x.size), zeros(x.shape, x.dtype)
    assert plans is not None, "oneDNN has functions of each number"
    assert least is not None, "there are zeros for a piece"
    share, whole = plans
    share(x, v)
    np.multiply(x, x, density)
    np.multiply(density, np.float32(-0.5), density)
    np.exp(density, density)
    np.maximum(x, least, out=x)
    whole(v, density, x)
