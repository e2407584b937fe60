"""Elementwise activations in one pass over memory, with a bias before them if there is one."""

from __future__ import annotations

from inspect import signature

import cupy
import numpy as np

from nnxp import kernels
from nnxp._arrays import Array
from nnxp.kernels._dispatch import Kernel
from nnxp.kernels.cuda._compiled import fusable, launch, next_power, pack, unfused
from nnxp.kernels.cuda._rows import OPS, over_rows

THREADS = 256  # a block
IN_FLIGHT = 16  # values for each thread of `activate`


def bias_act(x: Array, bias: Array | None, activation: Kernel, out: Array) -> Array:
    """out = activation(x + bias) in one pass, for any of nnxp.kernels.ACTIVATIONS

    out (rows, cols) of one of TYPES, bias (cols,) of the same, x (rows, cols) of the same or
    float32, rounded once to be stored. Rows have no gaps but may have some between them, as in
    padded[:, :10]; out may be x. Nothing is allocated.
    """
    if x.size == 0:
        return out
    name = activation.__name__
    if name in OPS:
        return over_rows(name, x, out, before=bias)
    return _fill(name, x, bias, out, _OPTION[name])


def _option(activation: Kernel) -> np.float32:
    """The default of an activation's option; 0 if it has none, for then it is not looked at."""
    _, *options, _ = signature(activation.reference).parameters.values()
    return np.float32(options[0].default if options else 0)


_OPTION = {name: _option(each) for name, each in kernels.ACTIVATIONS.items()}


def _fill(name: str, x: Array, bias: Array | None, out: Array, option: np.float32) -> Array:
    """bias_act for an elementwise activation; without a bias, of arrays of any shape, too."""
    kind = x.dtype, out.dtype, f"act::{name}"
    y = out
    if bias is None and x.flags.c_contiguous and out.flags.c_contiguous:
        if (x.data.ptr | out.data.ptr) % 16 == 0:
            instance = "activations.cu", "activate", *kind
            blocks = -(-x.size // (THREADS * IN_FLIGHT))
            launch(instance, (blocks,), (THREADS,), (x, out), x.size, option)
            return out
        x, y = x.reshape(1, -1), out.reshape(1, -1)
    rows, cols = x.shape
    v = pack(x, y, bias)
    across = min(THREADS, next_power(cols // v))
    down = THREADS // across
    launch(
        ("activations.cu", "bias_act", *kind, v),
        (-(-cols // (v * across)), min(65535, -(-rows // (4 * down)))),  # 65535: all CUDA allows
        (across, down),
        (x, bias, y),
        rows,
        cols,
        x.strides[0] // x.itemsize,
        y.strides[0] // y.itemsize,
        option,
    )
    return out


def _elementwise(activation: Kernel, x: Array, out: Array | None, **options: float) -> Array:
    if not fusable(x, out):
        return unfused(activation, x, out=out, **options)
    if not x.flags.c_contiguous:
        x = x.copy()
    y = cupy.empty(x.shape, x.dtype) if out is None else out
    option = np.float32(next(iter(options.values()), 0))
    return _fill(activation.__name__, x, None, y, option)


kernels.identity.on("cupy")(kernels.identity.reference)


def _fuse(activation: Kernel) -> None:
    @activation.on("cupy")
    def fused(x: Array, *, out: Array | None = None) -> Array:
        return _elementwise(activation, x, out)


for _name in """relu selu softplus softsign sigmoid hard_sigmoid tanh silu gelu gelu_tanh
    mish""".split():
    _fuse(kernels.ACTIVATIONS[_name])


@kernels.leaky_relu.on("cupy")
def leaky_relu(x: Array, *, negative_slope: float = 0.01, out: Array | None = None) -> Array:
    return _elementwise(kernels.leaky_relu, x, out, negative_slope=negative_slope)


@kernels.elu.on("cupy")
def elu(x: Array, *, alpha: float = 1.0, out: Array | None = None) -> Array:
    return _elementwise(kernels.elu, x, out, alpha=alpha)
