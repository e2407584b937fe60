"""Vectors in pieces that stay in a core's cache from pass to pass."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from nnxp._arrays import Array

CHUNK = 1 << 16
"""Numbers that are worked on at once by NumPy: in float32 an array of them is 256 KiB, and those of
Adam stay in the cache."""


def chunks(p: Array, *like: Array) -> Iterator[tuple[Array, ...]]:
    """Vectors of the host in pieces that fit the cache; others whole: a device waits for starts."""
    if p.ndim != 1 or p.size <= CHUNK or not isinstance(p, np.ndarray):
        yield p, *like
        return
    for start in range(0, p.size, CHUNK):
        yield tuple(x[start : start + CHUNK] for x in (p, *like))
