"""Pools in one pass: each result from what its window sees."""

from __future__ import annotations

from typing import Any

from nnxp import kernels
from nnxp._arrays import Array
from nnxp.kernels.cuda._compiled import unfused
from nnxp.kernels.cuda._windows import Seen, fits, over_lines
from nnxp.kernels.pool import _pooled


@kernels.max_pool.on("cupy")
def max_pool(x: Array, *, window: tuple[int, ...], **options: Any) -> Array:
    over = _pooled("max_pool", x, window, options)
    if not fits(x, over):
        return unfused(kernels.max_pool, x, window=window, **options)
    seen = Seen(x, over)
    return over_lines(("pooled", "pool::maximum"), seen, x.shape[-1], seen.v, ())


@kernels.average_pool.on("cupy")
def average_pool(
    x: Array, *, window: tuple[int, ...], count_include_pad: bool = False, **options: Any
) -> Array:
    over = _pooled("average_pool", x, window, options)
    if not fits(x, over):
        options["count_include_pad"] = count_include_pad
        return unfused(kernels.average_pool, x, window=window, **options)
    counted = None
    if count_include_pad:
        asked = zip(over.pads, over.beyond, strict=True)
        counted = [(before, behind - more) for (before, behind), (_, more) in asked]
    seen = Seen(x, over, counted)
    return over_lines(("pooled", "pool::mean"), seen, x.shape[-1], seen.v, ())
