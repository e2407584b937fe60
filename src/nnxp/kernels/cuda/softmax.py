"""Softmaxes that read a short row once, and keep it in registers until it is written."""

from __future__ import annotations

import cupy

from nnxp import kernels
from nnxp._arrays import Array
from nnxp.kernels._dispatch import Kernel
from nnxp.kernels.cuda._compiled import fusable, unfused
from nnxp.kernels.cuda._rows import as_rows, over_rows


@kernels.softmax.on("cupy")
def softmax(x: Array, *, out: Array | None = None) -> Array:
    return _over_last_axis(kernels.softmax, x, out)


@kernels.softmin.on("cupy")
def softmin(x: Array, *, out: Array | None = None) -> Array:
    return _over_last_axis(kernels.softmin, x, out)


@kernels.log_softmax.on("cupy")
def log_softmax(x: Array, *, out: Array | None = None) -> Array:
    return _over_last_axis(kernels.log_softmax, x, out)


def _over_last_axis(kernel: Kernel, x: Array, out: Array | None) -> Array:
    if x.ndim == 0 or not fusable(x, out):
        return unfused(kernel, x, out=out)
    y = cupy.empty(x.shape, x.dtype) if out is None else out
    over_rows(kernel.__name__, as_rows(x), as_rows(y))
    return y
