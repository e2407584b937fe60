"""Products of stacks of matrices, one with one: all of them in one call of cuBLASLt."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import cupy
import numpy as np
from cupy.cuda import get_current_stream
from cupy.cuda.device import get_device_id

from nnxp._arrays import Array
from nnxp.kernels.cuda.lt import bindings
from nnxp.kernels.cuda.lt.bindings import COMPUTE_FLOAT32, COMPUTE_TF32, DEFAULT
from nnxp.kernels.cuda.lt.call import MOST_ELEMENTS, MOST_PLANS, MOST_ROWS
from nnxp.kernels.cuda.lt.descriptors import FLOAT32, PASS, Algorithm, Form, Product, leading
from nnxp.kernels.cuda.lt.passes import converted
from nnxp.kernels.cuda.lt.plans import TIMED_ROWS, Lately, choices
from nnxp.kernels.cuda.lt.tuning import Choice, fastest

MOST_MATRICES = 65535  # that one launch may have on CUDA's third axis

Run = Callable[[Array, Array], Array]
"""A way to do a product of stacks: x, weight -> y."""

plans = Lately[Run](MOST_PLANS)


def on_this_device(*arrays: Any) -> bool:
    """Whether all are arrays of the current device."""
    device = get_device_id()
    return all(isinstance(x, cupy.ndarray) and x.data.device_id == device for x in arrays)


def stacked(x: Array, weight: Array, dtype: np.dtype[Any], precision: str | None = None) -> Array:
    """y[i] = x[i] @ weight[i]

    x (b, m, k), weight (b, k, n) of one of DATA_TYPES -> y (b, m, n), not empty, of their type or
    of float32, on the current stream of the current device. Matrices may lie by rows or by columns,
    and at any distance: the same one b times is read where it is.
    """
    pointers = x.data.ptr | weight.data.ptr | 256
    key = (
        get_device_id(),
        precision,
        dtype,
        pointers & -pointers,  # the largest power of two, to 256, that divides them all
        x.dtype,
        x.shape,
        x.strides,
        weight.shape,
        weight.strides,
    )
    plan = plans.young.get(key) or plans.planned(key, partial(_way, x, weight, dtype, precision))
    return plan(x, weight)


def _way(x: Array, weight: Array, dtype: np.dtype[Any], precision: str | None) -> Run:
    lt = bindings.library()[0]
    (batch, rows, inner), cols = x.shape, weight.shape[2]
    if lt is None or rows > MOST_ROWS:
        return partial(_by_cupy, dtype=dtype)
    if not (_lies(x) and _lies(weight)):
        return partial(_with_copies, dtype=dtype, precision=precision)
    x_turned, turned = leading(x) is None, leading(weight) is None
    ldx = leading(x.swapaxes(1, 2) if x_turned else x) or 0
    ldw = leading(weight.swapaxes(1, 2) if turned else weight) or 0
    of_x, of_weight = (inner if x_turned else rows) * ldx, (cols if turned else inner) * ldw
    if max(of_x, of_weight, rows * cols) > MOST_ELEMENTS:
        return partial(_by_cupy, dtype=dtype)
    if batch > MOST_MATRICES:
        return partial(_in_parts, dtype=dtype, precision=precision)
    pointers = 256 | x.data.ptr | weight.data.ptr
    tf32 = precision == "tf32" and x.dtype == FLOAT32
    form = Form(
        device=get_device_id(),
        dtype=x.dtype,
        compute=COMPUTE_TF32 if tf32 else COMPUTE_FLOAT32,
        inner=inner,
        cols=cols,
        ldx=ldx,
        ldw=ldw,
        turned=turned,
        alignment=pointers & -pointers,
        x_turned=x_turned,
        x_step=x.strides[0] // x.itemsize if batch > 1 else 0,
        weight_step=weight.strides[0] // weight.itemsize if batch > 1 else 0,
    )
    return _planned(lt, form, x, weight, DEFAULT if dtype == x.dtype else PASS)


def _planned(lt: Any, form: Form, x: Array, weight: Array, way: int) -> Run:
    """By the algorithm that was chosen for about as many matrices and rows, or is chosen now."""
    batch, rows = x.shape[:2]
    key = form, (rows - 1).bit_length(), (batch - 1).bit_length(), way
    choice = choices.get(key)
    if choice is None and not get_current_stream().is_capturing():
        timed = Product(lt, form, rows, way, min(batch, -(-TIMED_ROWS // rows)))
        y = cupy.empty((batch, rows, form.cols), timed.dtype)
        best = fastest(timed, x.data.ptr, weight.data.ptr, 0, y.data.ptr)
        if best is not None:
            choice = Choice(way, best)
            choices.keep(key, choice)
    product = Product(lt, form, rows, way, batch)
    algorithm = product.working(None if choice is None else choice.algorithm)
    if algorithm is None:
        return partial(_by_cupy, dtype=product.dtype)
    return StackPlan(product, algorithm, batch)


class StackPlan:
    """A product of stacks through cuBLASLt: one launch."""

    def __init__(self, product: Product, algorithm: Algorithm, batch: int) -> None:
        self.product, self.algorithm = product, algorithm
        self.shape = batch, product.rows, product.form.cols

    def __call__(self, x: Array, weight: Array) -> Array:
        y = cupy.empty(self.shape, self.product.dtype)
        self.product.launch(self.algorithm, x.data.ptr, weight.data.ptr, 0, y.data.ptr)
        return y


def _lies(x: Array) -> bool:
    """Whether matrices lie by rows or columns, in one order, or all in the same place."""
    step = x.strides[0] if len(x) > 1 else 0
    led = leading(x) or leading(x.swapaxes(1, 2))
    return led is not None and step >= 0 and step % x.itemsize == 0


def _with_copies(x: Array, weight: Array, dtype: np.dtype[Any], precision: str | None) -> Array:
    """For rows with gaps between neighbours, or in reverse: those stacks are copied first."""
    if not _lies(x):
        x = cupy.ascontiguousarray(x)
    if not _lies(weight):
        weight = cupy.ascontiguousarray(weight)
    return stacked(x, weight, dtype, precision)


def _in_parts(x: Array, weight: Array, dtype: np.dtype[Any], precision: str | None) -> Array:
    """For more matrices than a launch may have."""
    y = cupy.empty((*x.shape[:2], weight.shape[2]), dtype)
    for start in range(0, len(x), MOST_MATRICES):
        part = slice(start, start + MOST_MATRICES)
        cupy.copyto(y[part], stacked(x[part], weight[part], dtype, precision))
    return y


def _by_cupy(x: Array, weight: Array, dtype: np.dtype[Any]) -> Array:
    """Where there is no cuBLASLt, or it does not offer this product; 16 bits by way of float32."""
    y = cupy.empty((*x.shape[:2], weight.shape[2]), FLOAT32)
    cupy.matmul(converted(x, FLOAT32), converted(weight, FLOAT32), out=y)
    return converted(y, dtype)
