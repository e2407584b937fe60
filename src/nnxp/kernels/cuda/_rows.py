"""Launching what runs over rows: rows.cu says how."""

from __future__ import annotations

from nnxp._arrays import Array
from nnxp.kernels.cuda._compiled import TYPES, launch, next_power, pack, stride

OPS = ("softmax", "log_softmax")  # of the ops of rows.cu, those that are activations

# How many packs of V values a lane may hold, by V: up to 32 values, for more would be spilled.
HELD = {1: (1, 4, 16), 4: (1, 4, 8), 8: (1, 4)}
HELD_THREADS = 128  # a block


def as_rows(x: Array) -> Array:
    """x as a matrix of its rows: a view if x has no gaps, else a copy; not empty."""
    return (x if x.flags.c_contiguous else x.copy()).reshape(-1, x.shape[-1])


def over_rows(
    op: str,
    x: Array,
    out: Array,
    *,
    before: Array | None = None,
    gain: Array | None = None,
    after: Array | None = None,
    eps: float = 0.0,
) -> Array:
    """out = op(x + before) * gain + after, any of the three left out

    x, out (rows, cols) of one of TYPES, the others (cols,) of the same; rows have no gaps but may
    have some between them; out may be x; not empty.
    """
    rows, cols = x.shape
    v = pack(cols, x, out, before, gain, after)
    kind = f"{TYPES[x.dtype.name]}, op::{op}, {v}"
    packs = -(-cols // v)
    lanes = min(32, max(8, next_power(packs)))
    each = next((n for n in HELD[v] if packs <= n * lanes), None)
    if each is not None:
        name = f"held<{kind}, {lanes}, {each}>"
        blocks, threads = -(-rows * lanes // HELD_THREADS), HELD_THREADS
    else:
        name = f"streamed<{kind}>"
        blocks, threads = rows, 256 if packs <= 4096 else 1024
    launch(
        "rows.cu",
        name,
        (blocks,),
        (threads,),
        x,
        before,
        gain,
        after,
        out,
        rows,
        cols,
        stride(x),
        stride(out),
        float(eps),
    )
    return out
