"""ONNX Runtime's own operators that its quantizer writes.

https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md: each does to whole
numbers what an operator of ONNX does to the floats that they stand for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from nnxp import kernels
from nnxp._arrays import Array
from nnxp.layers.operators import beside, concat, leaky_relu, operator, softmax, xp_of
from nnxp.layers.quantized_operators import dequantize, dynamic_quantize, exact, quantize, rounded
from nnxp.layers.sequence_operators import CHOSEN, by_steps, lstm_step, recurrent
from nnxp.layers.window_operators import POOL, average_pool


@operator("com.microsoft.QLinearAdd com.microsoft.QLinearMul")
def qlinear_arithmetic(
    a: Array,
    a_scale: Array,
    a_zero: Array | None,
    b: Array,
    b_scale: Array,
    b_zero: Array | None,
    y_scale: Array,
    y_zero: Array | None = None,
    *,
    op: str,
) -> Array:
    a, b = dequantize(a, a_scale, a_zero), dequantize(b, b_scale, b_zero)
    return quantize(a + b if op == "QLinearAdd" else a * b, y_scale, y_zero)


def _of_floats(formula: Callable[..., Array]) -> Callable[..., Array]:
    """The formula, on the floats that x stands for; what it makes is quantized again."""

    def call(
        x: Array,
        x_scale: Array,
        x_zero: Array | None,
        y_scale: Array,
        y_zero: Array | None = None,
        **options: Any,
    ) -> Array:
        return quantize(formula(dequantize(x, x_scale, x_zero), **options), y_scale, y_zero)

    return call


operator("com.microsoft.QLinearSigmoid")(_of_floats(kernels.sigmoid))
operator("com.microsoft.QLinearLeakyRelu", attributes="alpha")(_of_floats(leaky_relu))


@operator("com.microsoft.QLinearSoftmax", attributes="axis opset")
@_of_floats
def qlinear_softmax(x: Array, *, axis: int = -1, opset: int) -> Array:
    """Before opset 13, of all axes from its own."""
    axis %= max(x.ndim, 1)
    flat = x.reshape((*x.shape[:axis], -1)) if opset < 13 else x
    return softmax(flat, axis=axis, op="Softmax").reshape(x.shape)


@operator("com.microsoft.QLinearConcat")
def qlinear_concat(y_scale: Array, y_zero: Array, *parts: Array, axis: int) -> Array:
    real = [dequantize(*parts[i : i + 3]) for i in range(0, len(parts), 3)]
    return quantize(concat(*real, axis=axis), y_scale, y_zero)


@operator("com.microsoft.QLinearWhere", as_is=True)
def qlinear_where(
    condition: Array,
    a: Array,
    a_scale: Array,
    a_zero: Array,
    b: Array,
    b_scale: Array,
    b_zero: Array,
    y_scale: Array,
    y_zero: Array,
) -> Array:
    a, b = dequantize(a, a_scale, a_zero), dequantize(b, b_scale, b_zero)
    return quantize(xp_of(condition).where(condition, a, b), y_scale, y_zero)


@operator("com.microsoft.QLinearGlobalAveragePool", attributes="channels_last")
@_of_floats
def qlinear_global_average_pool(x: Array, *, channels_last: int = 0) -> Array:
    first, last = (1, x.ndim - 1) if channels_last else (2, x.ndim)
    return x.mean(axis=tuple(range(first, last)), keepdims=True)


@operator("com.microsoft.QLinearAveragePool", attributes=f"channels_last count_include_pad {POOL}")
@_of_floats
def qlinear_average_pool(x: Array, *, channels_last: int = 0, **how: Any) -> Array:
    if not channels_last:
        return average_pool(x, **how)
    xp = xp_of(x)
    return xp.moveaxis(average_pool(xp.moveaxis(x, -1, 1), **how), 1, -1)


@operator("com.microsoft.QGemm")
def qgemm(
    a: Array,
    a_scale: Array,
    a_zero: Array,
    b: Array,
    b_scale: Array,
    b_zero: Array,
    bias: Array | None = None,
    y_scale: Array | None = None,
    y_zero: Array | None = None,
    *,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Array:
    """The bias is of the scale of the products; without a scale y is float32."""
    x = exact(a, a_zero, -2).T if transA else exact(a, a_zero, -2)
    weight = exact(b, b_zero, -2).T if transB else exact(b, b_zero, -1)
    y = xp_of(a).matmul(x, weight)
    y = y if bias is None else y + bias.astype("float64")
    y = y * (alpha * a_scale.astype("float64") * b_scale.astype("float64"))
    if y_scale is None:
        return y.astype("float32")
    zero = beside(np.zeros((), a.dtype), y) if y_zero is None else y_zero
    return rounded(y / y_scale.astype("float64"), zero)


@operator("com.microsoft.DynamicQuantizeLSTM", attributes=CHOSEN)
def dynamic_quantize_lstm(
    x: Array,
    w: Array,
    r: Array,
    b: Array | None = None,
    lengths: Array | None = None,
    h: Array | None = None,
    c: Array | None = None,
    p: Array | None = None,
    w_scale: Any = None,
    w_zero: Array | None = None,
    r_scale: Any = None,
    r_zero: Array | None = None,
    *,
    direction: str = "forward",
    clip: float | None = None,
    input_forget: int = 0,
    **chosen: Any,
) -> tuple[Array, ...]:
    """Its products are of whole numbers: x, and the state before each step, are rounded to a
    255th of what all of their numbers span."""
    w, r = (
        (part.astype("float32") - (0 if zero is None else _sided(zero, part))) * _sided(scale, part)
        for part, scale, zero in ((w, w_scale, w_zero), (r, r_scale, r_zero))
    )
    step_of = lstm_step(r.shape[1], p, len(w), clip, input_forget, _rounded, **chosen)
    run = by_steps(step_of, lengths)
    w, r = w.swapaxes(1, 2), r.swapaxes(1, 2)
    return recurrent(run, [], [h, c], _rounded(x), w, r, b, direction, 0)


def _rounded(x: Array) -> Array:
    return dequantize(*dynamic_quantize(x))


def _sided(scale: Array, weight: Array) -> Array:
    """A scale (directions,) or (directions, 4 hidden) beside (directions, inputs, 4 hidden)."""
    return scale.astype("float32").reshape((weight.shape[0], 1, -1))
