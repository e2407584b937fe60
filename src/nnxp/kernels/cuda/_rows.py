"""Launching what runs over rows: rows.cu says how."""

from __future__ import annotations

import numpy as np

from nnxp._arrays import Array
from nnxp.kernels.cuda._compiled import Part, launch, next_power, pack

OPS = ("softmax", "softmin", "log_softmax")  # of the ops of rows.cu, those that are activations

# How many packs of V values a lane may hold, by V: up to 32 values, for more would be spilled.
HELD = {1: (1, 4, 16), 4: (1, 4, 8), 8: (1, 4)}
HELD_THREADS = 128  # a block
ZERO = np.float32(0)


def as_rows(x: Array) -> Array:
    """x as a matrix of its rows: a view if x has no gaps, else a copy; not empty."""
    if not x.flags.c_contiguous:
        x = x.copy()
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def over_rows(
    op: str,
    x: Array,
    out: Array,
    *,
    before: Array | None = None,
    gain: Array | None = None,
    after: Array | None = None,
    eps: np.float32 = ZERO,
) -> Array:
    """out = op(x + before) * gain + after, any of the three left out

    out (rows, cols) of one of TYPES, the others (cols,) of the same; x (rows, cols) of the same or
    float32. Rows have no gaps but may have some between them; out may be x; not empty.
    """
    rows, cols = x.shape
    v = pack(x, out, before, gain, after)
    kind = x.dtype, out.dtype, f"op::{op}", v
    packs = -(-cols // v)
    lanes = min(32, max(8, next_power(packs)))
    each = next((n for n in HELD[v] if packs <= n * lanes), None)
    instance: tuple[Part, ...]
    if each is not None:
        instance = "rows.cu", "held", *kind, lanes, each
        blocks, threads = -(-rows * lanes // HELD_THREADS), HELD_THREADS
    else:
        instance = "rows.cu", "streamed", *kind
        blocks, threads = rows, 256 if packs <= 4096 else 1024
    launch(
        instance,
        (blocks,),
        (threads,),
        (x, before, gain, after, out),
        rows,
        cols,
        x.strides[0] // x.itemsize,
        out.strides[0] // out.itemsize,
        eps,
    )
    return out
