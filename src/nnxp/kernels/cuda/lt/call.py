"""A product is asked for: what was done before is done again, else the way to do it is found."""

from __future__ import annotations

from functools import partial

import cupy
from cupy.cuda.device import get_device_id

from nnxp._arrays import Array
from nnxp.kernels._dispatch import Kernel
from nnxp.kernels.activations import identity
from nnxp.kernels.cuda.lt import bindings
from nnxp.kernels.cuda.lt.bindings import DATA_TYPES, DEFAULT
from nnxp.kernels.cuda.lt.descriptors import PASS, leading, packed
from nnxp.kernels.cuda.lt.passes import Run, by_cupy, nothing, uncovered
from nnxp.kernels.cuda.lt.plans import Lately, Plan, planned
from nnxp.kernels.cuda.lt.tuning import EPILOGUES

MOST_PLANS = 1024  # a network of a hundred convolutions has some, for each size of a block
MOST_ROWS, MOST_ELEMENTS, PART = 1 << 20, (1 << 31) - 1, 1 << 28

plans = Lately[Run](MOST_PLANS)


def product(
    x: Array,
    weight: Array,
    bias: Array | None,
    activation: Kernel,
    precision: str | None = None,
    out: Array | None = None,
) -> Array:
    """y = activation(x @ weight + bias)

    x (m, k), weight (k, n), bias (n,) -> y (m, n), on the current stream of the current device.
    Everything that decides how it is done is in the key, so that what was done before takes one
    look into a dictionary. `out`, without gaps, is filled, in place if it lies as a new y would.
    """
    wish = DEFAULT if activation is identity else PASS
    try:
        x_at, weight_at = x.data, weight.data
        pointers = x_at.ptr | weight_at.ptr | 256
        about_bias = None
        if bias is not None:
            wish = EPILOGUES.get(activation, PASS)
            bias_at = bias.data
            pointers |= bias_at.ptr
            about_bias = bias.dtype, bias.shape, bias.strides, bias_at.device_id
        key = (
            get_device_id(),
            precision,
            wish,
            pointers & -pointers,  # the largest power of two, to 256, that divides them all
            x.dtype,
            x.shape,
            x.strides,
            x_at.device_id,
            weight.dtype,
            weight.shape,
            weight.strides,
            weight_at.device_id,
            about_bias,
        )
    except AttributeError:  # an array of the host among them: CuPy says so
        return uncovered(x, weight, bias, activation)
    plan = plans.young.get(key) or plans.planned(
        key, partial(_way, wish, x, weight, bias, activation, precision)
    )
    if out is None:
        return plan(x, weight, bias, activation)
    into = (out,) if isinstance(plan, Plan) else ()
    y = plan(x, weight, bias, activation, *into)
    if y is not out:
        cupy.copyto(out, y)
    return out


def _way(
    wish: int,
    x: Array,
    weight: Array,
    bias: Array | None,
    activation: Kernel,
    precision: str | None,
) -> Run:
    """The way to do such a product; the wish is the epilogue that would leave nothing to do."""
    arrays = [x, weight] if bias is None else [x, weight, bias]
    dtype, device = x.dtype, get_device_id()
    if (
        dtype.name not in DATA_TYPES
        or any(a.dtype != dtype or a.data.device_id != device for a in arrays)
        or weight.shape[:-1] != x.shape[1:]
        or (bias is not None and bias.shape != weight.shape[1:])
    ):
        return uncovered
    (rows, inner), cols = x.shape, weight.shape[1]
    if 0 in (rows, cols, inner):
        return nothing
    lt = bindings.library()[0]
    if lt is None:
        return by_cupy
    ldx, ldw = leading(x), leading(weight) or leading(weight.T)
    if not _lies(x) or ldw is None or (bias is not None and not packed(bias)):
        return partial(_with_copies, precision=precision)
    if rows > 1 and (rows > MOST_ROWS or rows * max(ldx or 0, cols) > MOST_ELEMENTS):
        return partial(_in_parts, precision=precision)
    return planned(lt, wish, x, weight, bias, activation, precision)


def _lies(x: Array) -> bool:
    """Whether x lies by rows, or by columns that cuBLASLt can count."""
    ld = leading(x.T)
    return leading(x) is not None or (ld is not None and x.shape[1] * ld <= MOST_ELEMENTS)


def _with_copies(
    x: Array, weight: Array, bias: Array | None, activation: Kernel, precision: str | None
) -> Array:
    """For rows with gaps between neighbours, or in reverse: those arrays are copied first."""
    if not _lies(x):
        x = cupy.ascontiguousarray(x)
    if (leading(weight) or leading(weight.T)) is None:
        weight = cupy.ascontiguousarray(weight)
    if bias is not None and not packed(bias):
        bias = cupy.ascontiguousarray(bias)
    return product(x, weight, bias, activation, precision)


def _in_parts(
    x: Array, weight: Array, bias: Array | None, activation: Kernel, precision: str | None
) -> Array:
    """For more than cuBLASLt counts in 32 bits: a gigabyte or so of rows at a time."""
    rows, cols = x.shape[0], weight.shape[1]
    y = cupy.empty((rows, cols), x.dtype)
    step = min(MOST_ROWS, max(1, PART // max(x.strides[0] // x.itemsize, cols)))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        cupy.copyto(y[part], product(x[part], weight, bias, activation, precision))
    return y
