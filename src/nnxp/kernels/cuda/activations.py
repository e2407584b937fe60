"""Elementwise activations in one pass over memory, with a bias before them if there is one."""

from __future__ import annotations

from functools import wraps
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
    return _fill(name, x, bias, out, option_numbers(DEFAULTS[name]))


def _defaults(activation: Kernel) -> dict[str, float]:
    """The options of an activation, in their order, and what they are unless they are given."""
    parameters = signature(activation.reference).parameters
    return {name: p.default for name, p in parameters.items() if name not in ("x", "out")}


DEFAULTS = {name: _defaults(activation) for name, activation in kernels.ACTIVATIONS.items()}


def option_numbers(options: dict[str, float]) -> tuple[np.float32, np.float32]:
    """The options as the kernels take them: two, of which those that are not there are 0."""
    a, b = (*options.values(), 0, 0)[:2]
    return np.float32(a), np.float32(b)


def _fill(
    name: str,
    x: Array,
    bias: Array | None,
    out: Array,
    numbers: tuple[np.float32, np.float32],
) -> Array:
    """bias_act for an elementwise activation; without a bias, of arrays of any shape, too."""
    kind = x.dtype, out.dtype, f"act::{name}"
    y = out
    if bias is None and x.flags.c_contiguous and out.flags.c_contiguous:
        if (x.data.ptr | out.data.ptr) % 16 == 0:
            instance = "activations.cu", "activate", *kind
            blocks = -(-x.size // (THREADS * IN_FLIGHT))
            launch(instance, (blocks,), (THREADS,), (x, out), x.size, *numbers)
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
        *numbers,
    )
    return out


kernels.identity.on("cupy")(kernels.identity.reference)


def _fuse(activation: Kernel) -> None:
    name = activation.__name__
    defaults = DEFAULTS[name]

    @activation.on("cupy")
    @wraps(activation.reference)
    def fused(x: Array, *, out: Array | None = None, **chosen: float) -> Array:
        options = defaults | chosen
        if options.keys() != defaults.keys() or not fusable(x, out):
            return unfused(activation, x, out=out, **chosen)
        if not x.flags.c_contiguous:
            x = x.copy()
        y = cupy.empty(x.shape, x.dtype) if out is None else out
        return _fill(name, x, None, y, option_numbers(options))


for _name in kernels.ACTIVATIONS.keys() - {"identity", *OPS}:
    _fuse(kernels.ACTIVATIONS[_name])
