"""Softmaxes that read a short row once, and keep it in registers until it is written."""

from __future__ import annotations

from functools import wraps

import cupy

from nnxp import kernels
from nnxp._arrays import Array
from nnxp.kernels._dispatch import Kernel
from nnxp.kernels.cuda._compiled import fusable, unfused
from nnxp.kernels.cuda._rows import OPS, as_rows, over_rows


def _fuse(activation: Kernel) -> None:
    @activation.on("cupy")
    @wraps(activation.reference)
    def fused(x: Array, *, out: Array | None = None) -> Array:
        if x.ndim == 0 or not fusable(x, out):
            return unfused(activation, x, out=out)
        y = cupy.empty(x.shape, x.dtype) if out is None else out
        over_rows(activation.__name__, as_rows(x), as_rows(y))
        return y


for _name in OPS:
    _fuse(kernels.ACTIVATIONS[_name])
