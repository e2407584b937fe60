"""Normalisation by the row's own statistics, in one kernel.

batch_norm and standardize keep their reference bodies: plain elementwise passes, which few networks
wait for.
"""

from __future__ import annotations

import cupy
import numpy as np

from nnxp import kernels
from nnxp._arrays import Array
from nnxp.kernels._dispatch import Kernel
from nnxp.kernels.cuda._compiled import fusable, unfused
from nnxp.kernels.cuda._rows import as_rows, over_rows


@kernels.layer_norm.on("cupy")
def layer_norm(
    x: Array, gain: Array | None = None, bias: Array | None = None, *, eps: float = 1e-5
) -> Array:
    return _normalized(kernels.layer_norm, x, gain, bias, eps=eps)


@kernels.rms_norm.on("cupy")
def rms_norm(x: Array, gain: Array | None = None, *, eps: float = 1e-6) -> Array:
    return _normalized(kernels.rms_norm, x, gain, eps=eps)


def _normalized(
    kernel: Kernel, x: Array, gain: Array | None, bias: Array | None = None, *, eps: float
) -> Array:
    fits = x.ndim > 0 and all(
        vector is None or (vector.dtype == x.dtype and vector.shape == x.shape[-1:])
        for vector in (gain, bias)
    )
    if not fits or not fusable(x):
        arrays = (gain,) if kernel is kernels.rms_norm else (gain, bias)
        return unfused(kernel, x, *arrays, eps=eps)
    y = cupy.empty(x.shape, x.dtype)
    gain = gain if gain is None else cupy.ascontiguousarray(gain)
    bias = bias if bias is None else cupy.ascontiguousarray(bias)
    small = np.float32(eps)
    over_rows(kernel.__name__, as_rows(x), as_rows(y), gain=gain, after=bias, eps=small)
    return y
