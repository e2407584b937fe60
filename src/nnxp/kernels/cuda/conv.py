"""Convolutions: patches laid out for cuBLASLt, and channels that are groups of their own."""

from __future__ import annotations

from functools import partial
from math import ceil
from typing import Any

import cupy

from nnxp import kernels
from nnxp._arrays import Array
from nnxp.kernels._dispatch import Kernel
from nnxp.kernels._windows import Windows, windows
from nnxp.kernels.activations import ELEMENTWISE, identity
from nnxp.kernels.conv import _fitting
from nnxp.kernels.cuda import cudnn
from nnxp.kernels.cuda._compiled import unfused
from nnxp.kernels.cuda._windows import Seen, fits, laid_out, over_lines
from nnxp.kernels.cuda.activations import DEFAULTS, option_numbers
from nnxp.kernels.cuda.lt import product

PATCHES = 64 << 20  # bytes that are laid out at once
PAD_FROM_LINES = 1024
LINES = 256  # lines of a piece are a multiple: so every piece of y is aligned as y is


@kernels.conv.on("cupy")
def conv(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    groups: int = 1,
    activation: Kernel = identity,
    precision: str | None = None,
    **options: Any,
) -> Array:
    """As its reference; what is laid out of patches takes at most PATCHES bytes at a time, or LINES
    lines. Groups of several channels are convolutions one after the other."""
    _fitting("conv", x, weight, groups)
    over = windows("conv", x, weight.shape[:-2], **options)
    alike = all(
        isinstance(array, cupy.ndarray) and array.dtype == x.dtype and array.size > 0
        for array in (weight, bias)
        if array is not None
    )
    outputs = weight.shape[-1]
    alike = alike and (bias is None or bias.shape == (outputs,))
    apart = groups > 1 and activation not in ELEMENTWISE
    if not alike or not fits(x, over, outputs) or (apart and x.itemsize == 2):
        options |= {"groups": groups, "activation": activation, "precision": precision}
        return unfused(kernels.conv, x, weight, bias, **options)
    if apart:  # the activation sees all groups at once
        options |= {"groups": groups, "precision": precision}
        y = conv(x, weight, bias, **options)
        return activation(y, out=y)
    own = partial(_own, x, weight, bias, over, options, groups, activation, precision)
    return cudnn.convolution(x, weight, bias, over, activation, precision, own)


def _own(
    x: Array,
    weight: Array,
    bias: Array | None,
    over: Windows,
    options: dict[str, Any],
    groups: int,
    activation: Kernel,
    precision: str | None,
) -> Array:
    """By our own kernels: patches, single channels, or group by group."""
    if groups == 1:
        return _by_patches(Seen(x, over), weight, bias, activation, precision)
    if weight.shape[-2] == 1:
        return _by_channel(Seen(x, over), weight, bias, activation)
    y = cupy.empty((x.shape[0], *over.positions, weight.shape[-1]), x.dtype)
    inner, own_outputs = weight.shape[-2], weight.shape[-1] // groups
    options = options | {"activation": activation, "precision": precision}
    for group in range(groups):
        own = slice(group * own_outputs, (group + 1) * own_outputs)
        part = x[..., group * inner : (group + 1) * inner]
        y[..., own] = conv(part, weight[..., own], None if bias is None else bias[own], **options)
    return y


def _by_patches(
    seen: Seen, weight: Array, bias: Array | None, activation: Kernel, precision: str | None
) -> Array:
    """Products of pieces of patches, no larger than those that the reference body lays out at once,
    in float32, and an engine counts."""
    x, over, outputs = seen.x, seen.over, weight.shape[-1]
    matrix = weight.reshape(-1, outputs)
    lines, inner, size = x.shape[0] * seen.positions, len(matrix), x.itemsize
    if seen.whole:
        y = product(x.reshape(lines, inner), matrix, bias, activation, precision)
        return y.reshape(x.shape[0], *over.positions, outputs)
    columns = inner
    if lines >= PAD_FROM_LINES and (size == 2 or precision == "tf32"):
        columns = -(-inner * size // 16) * 16 // size  # tensor cores want rows of 16 bytes
    if columns > inner:
        matrix = cupy.zeros((columns, outputs), x.dtype)
        cupy.copyto(matrix[:inner], weight.reshape(-1, outputs))
    most = min(PATCHES, 4 * lines * inner) // (columns * size)
    together = max(LINES, most // LINES * LINES)
    if lines <= most:
        y = product(laid_out(seen, 0, lines, columns), matrix, bias, activation, precision)
    else:
        y = cupy.empty((lines, outputs), x.dtype)
        step = ceil(ceil(lines / ceil(lines / together)) / LINES) * LINES
        for first in range(0, lines, step):
            part = y[first : first + step]
            product(  # without a name for the patches, which would hold them beside the next ones
                laid_out(seen, first, len(part), columns),
                *(matrix, bias, activation, precision),
                out=part,
            )
    return y.reshape(x.shape[0], *over.positions, outputs)


def _by_channel(seen: Seen, weight: Array, bias: Array | None, activation: Kernel) -> Array:
    x, outputs, name = seen.x, weight.shape[-1], activation.__name__
    weight = cupy.ascontiguousarray(weight)
    bias = bias if bias is None else cupy.ascontiguousarray(bias)
    places = weight.data.ptr | (0 if bias is None else bias.data.ptr)
    v = seen.v if outputs == x.shape[-1] and places % 16 == 0 else 1
    arrays = weight, bias
    more = outputs, *option_numbers(DEFAULTS[name])
    return over_lines(("by_channel", f"act::{name}"), seen, outputs, v, arrays, *more)


# Around convolutions these only move numbers, or find the largest: nothing is rounded twice.
kernels.conv_max_pool.on("cupy")(kernels.conv_max_pool.reference)
kernels.conv_transpose.on("cupy")(kernels.conv_transpose.reference)
