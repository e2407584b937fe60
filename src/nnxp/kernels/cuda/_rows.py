"""Launching what runs over rows: rows.cu says how."""

from __future__ import annotations

import numpy as np

from nnxp._arrays import Array
from nnxp.kernels.cuda._compiled import launch, next_power, pack

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
    how, lanes, blocks, threads = _spread(rows, cols, v)
    launch(
        ("rows.cu", how, *kind, *lanes),
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


def over_scores(scores: Array, mask: Array | None, *, causal: bool, scale: float) -> None:
    """Attention's softmax(scale scores + mask) over the keys, in place

    scores (n, heads, queries, keys) float32, without gaps and not empty; mask of that shape, of any
    strides, boolean, True where a query may look, or float32, added. `causal` lets query i look at
    the keys 0 to i. A query that may look nowhere gets zeros.
    """
    n, heads, queries, keys = scores.shape
    rows = n * heads * queries
    v = pack(flat := scores.reshape(rows, keys), flat)
    how, lanes, blocks, threads = _spread(rows, keys, v)
    steps = (0, 0, 0, 0) if mask is None else [step // mask.itemsize for step in mask.strides]
    boolean = mask is not None and mask.dtype == bool
    launch(
        ("rows.cu", f"{how}_scores", v, *lanes),
        (blocks,),
        (threads,),
        (scores, mask if boolean else None, None if boolean else mask),
        rows,
        keys,
        heads,
        queries,
        *steps,
        int(causal),
        np.float32(scale),
    )


def _spread(rows: int, cols: int, v: int) -> tuple[str, tuple[int, ...], int, int]:
    """Whether rows are held or streamed, by how many lanes and packs in each; blocks, threads."""
    packs = -(-cols // v)
    lanes = min(32, max(8, next_power(packs)))
    held = next((n for n in HELD[v] if packs <= n * lanes), None)
    if held is None:
        return "streamed", (), rows, 256 if packs <= 4096 else 1024
    return "held", (lanes, held), -(-rows * lanes // HELD_THREADS), HELD_THREADS
