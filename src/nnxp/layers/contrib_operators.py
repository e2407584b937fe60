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
from nnxp.layers.operators import concat, leaky_relu, operator, softmax, xp_of
from nnxp.layers.quantized_operators import dequantize, dynamic_quantize, exact, quantize, saturated
from nnxp.layers.sequence_operators import lstm_step, recurrent
from nnxp.layers.window_operators import average_pool


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


@operator("com.microsoft.QLinearSigmoid")
def qlinear_sigmoid(
    x: Array, x_scale: Array, x_zero: Array | None, y_scale: Array, y_zero: Array | None = None
) -> Array:
    return quantize(kernels.sigmoid(dequantize(x, x_scale, x_zero)), y_scale, y_zero)


@operator("com.microsoft.QLinearLeakyRelu")
def qlinear_leaky_relu(
    x: Array,
    x_scale: Array,
    x_zero: Array | None,
    y_scale: Array,
    y_zero: Array | None = None,
    *,
    alpha: float = 0.01,
) -> Array:
    return quantize(leaky_relu(dequantize(x, x_scale, x_zero), alpha=alpha), y_scale, y_zero)


@operator("com.microsoft.QLinearSoftmax")
def qlinear_softmax(
    x: Array,
    x_scale: Array,
    x_zero: Array | None,
    y_scale: Array,
    y_zero: Array | None = None,
    *,
    axis: int = -1,
    opset: int,
) -> Array:
    """Before opset 13, of all axes from its own."""
    y, axis = dequantize(x, x_scale, x_zero), axis % max(x.ndim, 1)
    if opset < 13:
        y = y.reshape((*x.shape[:axis], -1))
    y = softmax(y, axis=axis, op="Softmax").reshape(x.shape)
    return quantize(y, y_scale, y_zero)


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


def _channels(pool: Callable[[Array], Array], x: Array, channels_last: int) -> Array:
    if not channels_last:
        return pool(x)
    xp = xp_of(x)
    return xp.moveaxis(pool(xp.moveaxis(x, -1, 1)), 1, -1)


@operator("com.microsoft.QLinearGlobalAveragePool")
def qlinear_global_average_pool(
    x: Array,
    x_scale: Array,
    x_zero: Array,
    y_scale: Array,
    y_zero: Array,
    *,
    channels_last: int = 0,
) -> Array:
    def pool(x: Array) -> Array:
        return x.mean(axis=tuple(range(2, x.ndim)), keepdims=True)

    y = _channels(pool, dequantize(x, x_scale, x_zero), channels_last)
    return quantize(y, y_scale, y_zero)


@operator("com.microsoft.QLinearAveragePool")
def qlinear_average_pool(
    x: Array,
    x_scale: Array,
    x_zero: Array | None,
    y_scale: Array,
    y_zero: Array | None = None,
    *,
    channels_last: int = 0,
    kernel_shape: Any,
    strides: Any = None,
    dilations: Any = None,
    pads: Any = None,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
) -> Array:
    def pool(x: Array) -> Array:
        return average_pool(
            x,
            kernel_shape=kernel_shape,
            strides=strides,
            dilations=dilations,
            pads=pads,
            auto_pad=auto_pad,
            ceil_mode=ceil_mode,
            count_include_pad=count_include_pad,
        )

    y = _channels(pool, dequantize(x, x_scale, x_zero), channels_last)
    return quantize(y, y_scale, y_zero)


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
    y = xp_of(y).rint(y / y_scale.astype("float64"))
    zero = np.zeros((), a.dtype) if y_zero is None else y_zero.astype("float64")
    return saturated(y + zero, (a if y_zero is None else y_zero).dtype)


@operator("com.microsoft.DynamicQuantizeLSTM")
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
    hidden_size: int | None = None,
    direction: str = "forward",
    activations: Any = None,
    activation_alpha: Any = None,
    activation_beta: Any = None,
    clip: float | None = None,
    input_forget: int = 0,
) -> tuple[Array, ...]:
    """Its products are of whole numbers: x, and the state before each step, are rounded to a
    255th of what all of their numbers span."""
    w, r = (
        (part.astype("float32") - (0 if zero is None else _sided(zero, part))) * _sided(scale, part)
        for part, scale, zero in ((w, w_scale, w_zero), (r, r_scale, r_zero))
    )
    w, r, n = w.swapaxes(1, 2), r.swapaxes(1, 2), r.shape[1]
    more = activation_alpha, activation_beta, clip, input_forget
    step = lstm_step(n, p, activations, *more, seen=_rounded)
    return recurrent(step, [h, c], _rounded(x), w, r, b, lengths, direction, 0, n)


def _rounded(x: Array) -> Array:
    return dequantize(*dynamic_quantize(x))


def _sided(scale: Array, weight: Array) -> Array:
    """A scale (directions,) or (directions, 4 hidden) beside (directions, inputs, 4 hidden)."""
    return scale.astype("float32").reshape((weight.shape[0], 1, -1))
