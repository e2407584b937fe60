"""Elementwise activations in one pass over memory, with a bias before them if there is one."""

from __future__ import annotations

from inspect import signature

import cupy

from nnxp import kernels
from nnxp._arrays import Array
from nnxp.kernels._dispatch import Kernel
from nnxp.kernels.cuda._compiled import (
    TYPES,
    fusable,
    launch,
    next_power,
    pack,
    stride,
    unfused,
)
from nnxp.kernels.cuda._rows import OPS, over_rows

THREADS = 256  # a block
IN_FLIGHT = 16  # values for each thread of `activate`


def bias_act(x: Array, bias: Array | None, activation: Kernel, out: Array) -> Array:
    """out = activation(x + bias) in one pass, for any of nnxp.kernels.ACTIVATIONS

    x, out (rows, cols) of one of TYPES, bias (cols,) of the same. Rows have no gaps but may have
    some between them, as in padded[:, :10]; out may be x. Nothing is allocated.
    """
    if x.size == 0:
        return out
    if activation.__name__ in OPS:
        return over_rows(activation.__name__, x, out, before=bias)
    return _fill(activation, x, bias, out, _OPTION[activation.__name__])


def _option(activation: Kernel) -> float:
    """The default of an activation's option; 0 if it has none, for then it is not looked at."""
    _, *options, _ = signature(activation.reference).parameters.values()
    return float(options[0].default) if options else 0.0


_OPTION = {name: _option(each) for name, each in kernels.ACTIVATIONS.items()}


def _fill(activation: Kernel, x: Array, bias: Array | None, out: Array, option: float) -> Array:
    """bias_act for an elementwise activation; without a bias, of arrays of any shape, too."""
    kind = f"{TYPES[x.dtype.name]}, act::{activation.__name__}"
    flat = bias is None and x.flags.c_contiguous and out.flags.c_contiguous
    if flat and x.data.ptr % 16 == 0 and out.data.ptr % 16 == 0:
        blocks = -(-x.size // (THREADS * IN_FLIGHT))
        launch("activations.cu", f"activate<{kind}>", (blocks,), (THREADS,), x, out, x.size, option)
        return out
    if flat:
        _fill_rows(kind, x.reshape(1, -1), None, out.reshape(1, -1), option)
    else:
        _fill_rows(kind, x, bias, out, option)
    return out


def _fill_rows(kind: str, x: Array, bias: Array | None, out: Array, option: float) -> None:
    rows, cols = x.shape
    v = pack(cols, x, bias, out)
    across = min(THREADS, next_power(cols // v))
    down = THREADS // across
    launch(
        "activations.cu",
        f"bias_act<{kind}, {v}>",
        (-(-cols // (v * across)), min(65535, -(-rows // (4 * down)))),  # 65535: all CUDA allows
        (across, down),
        x,
        bias,
        out,
        rows,
        cols,
        stride(x),
        stride(out),
        option,
    )


def _elementwise(activation: Kernel, x: Array, out: Array | None, **options: float) -> Array:
    if not fusable(x, out):
        return unfused(activation, x, out=out, **options)
    if not x.flags.c_contiguous:
        x = x.copy()
    y = cupy.empty(x.shape, x.dtype) if out is None else out
    return _fill(activation, x, None, y, float(next(iter(options.values()), 0.0)))


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
