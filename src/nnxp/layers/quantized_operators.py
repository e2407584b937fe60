"""ONNX operators on whole numbers that stand for others, and those of classical machine learning.

Products of small whole numbers are computed in float64, where they and their sums are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nnxp import kernels
from nnxp._arrays import Array
from nnxp._errors import ShapeError
from nnxp.layers.operators import beside, dtype_of, operator, xp_of
from nnxp.layers.window_operators import MOVES, conv


def _along(scale: Array, x: Array, axis: int, block: int) -> Array:
    """A scale for all, for each place along an axis, or for blocks along it, shaped to meet x."""
    if scale.size == 1 and not block:
        return scale.reshape(())
    axis %= x.ndim
    if block:
        wide = xp_of(scale).repeat(scale, block, axis=axis)
        return wide[(slice(None),) * axis + (slice(0, x.shape[axis]),)]
    return scale.reshape([-1 if i == axis else 1 for i in range(x.ndim)])


def saturated(y: Array, dtype: np.dtype[Any]) -> Array:
    """y in a type of whole numbers, at its ends where y is beyond them."""
    limits, xp = np.iinfo(dtype), xp_of(y)
    return xp.minimum(xp.maximum(y, float(limits.min)), float(limits.max)).astype(dtype)


@operator("QuantizeLinear com.microsoft.QuantizeLinear")
def quantize(
    x: Array,
    scale: Array,
    zero: Array | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: str | None = None,
    precision: Any = None,
    saturate: int = 1,
) -> Array:
    dtype = zero.dtype if zero is not None else dtype_of(output_dtype or "uint8")
    y = xp_of(x).rint(x / _along(scale, x, axis, block_size).astype(x.dtype))
    if zero is not None:
        y = y + _along(zero, x, axis, block_size).astype(y.dtype)
    return saturated(y, dtype)


@operator("DequantizeLinear com.microsoft.DequantizeLinear")
def dequantize(
    x: Array,
    scale: Array,
    zero: Array | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: str | None = None,
) -> Array:
    y = x.astype("int32" if x.dtype.kind in "iu" else scale.dtype)
    if zero is not None:
        y = y - _along(zero, x, axis, block_size).astype(y.dtype)
    y = y.astype(scale.dtype) * _along(scale, x, axis, block_size)
    return y.astype(dtype_of(output_dtype)) if output_dtype else y


@operator("DynamicQuantizeLinear")
def dynamic_quantize(x: Array) -> tuple[Array, Array, Array]:
    xp = xp_of(x)
    flat = x.reshape(-1)
    low = xp.minimum(xp.min(flat, axis=0, keepdims=True), 0)
    high = xp.maximum(xp.max(flat, axis=0, keepdims=True), 0)
    scale = (high - low) / 255
    scale = xp.where(scale == 0, xp.ones_like(scale), scale).astype(x.dtype)
    zero = saturated(xp.rint(-low / scale), np.dtype("uint8"))
    y = saturated(xp.rint(x / scale) + zero.astype(x.dtype), np.dtype("uint8"))
    return y, scale.reshape(()), zero.reshape(())


def rounded(y: Array, zero: Array) -> Array:
    """y to whole numbers about this zero, in its type."""
    return saturated(xp_of(y).rint(y) + zero.astype("float64"), zero.dtype)


def exact(x: Array, zero: Array | None, axis: int) -> Array:
    """x without its zero, which is one for all or for each place along an axis, in float64."""
    y = x.astype("float64")
    if zero is None:
        return y
    if zero.size == 1:
        return y - zero.reshape(()).astype("float64")
    if zero.ndim == x.ndim:
        return y - zero.astype("float64")
    return y - _along(zero, x, axis, 0).astype("float64")


@operator("MatMulInteger")
def matmul_integer(
    a: Array, b: Array, a_zero: Array | None = None, b_zero: Array | None = None
) -> Array:
    y = xp_of(a).matmul(exact(a, a_zero, -2), exact(b, b_zero, -1))
    return y.astype("int32")


@operator("QLinearMatMul")
def qlinear_matmul(
    a: Array,
    a_scale: Array,
    a_zero: Array,
    b: Array,
    b_scale: Array,
    b_zero: Array,
    y_scale: Array,
    y_zero: Array,
) -> Array:
    y = xp_of(a).matmul(exact(a, a_zero, -2), exact(b, b_zero, -1))
    y = y * (_matrix(a_scale, a, -2) * _matrix(b_scale, b, -1)) / _matrix(y_scale, y, -2)
    return rounded(y, _matrix(y_zero, y, -2))


def _matrix(scale: Array, x: Array, axis: int) -> Array:
    scale = scale.astype("float64") if scale.dtype.kind == "f" else scale
    return scale if scale.ndim == x.ndim and scale.size > 1 else _along(scale, x, axis, 0)


@operator("ConvInteger", attributes=f"kernel_shape group {MOVES}")
def conv_integer(
    x: Array, weight: Array, x_zero: Array | None = None, w_zero: Array | None = None, **how: Any
) -> Array:
    return conv(exact(x, x_zero, 1), exact(weight, w_zero, 0), **how).astype("int32")


@operator("QLinearConv", attributes=f"kernel_shape group {MOVES}")
def qlinear_conv(
    x: Array,
    x_scale: Array,
    x_zero: Array,
    weight: Array,
    w_scale: Array,
    w_zero: Array,
    y_scale: Array,
    y_zero: Array,
    bias: Array | None = None,
    **how: Any,
) -> Array:
    bias = None if bias is None else bias.astype("float64")
    y = conv(exact(x, x_zero, 1), exact(weight, w_zero, 0), bias, **how)
    scale = x_scale.astype("float64").reshape(()) / y_scale.astype("float64").reshape(())
    y = y * (scale * _along(w_scale.astype("float64"), y, 1, 0))
    return rounded(y, y_zero.reshape(()))


# ai.onnx.ml


@operator("ai.onnx.ml.Scaler")
def scaler(x: Array, *, offset: Sequence[float] = (), scale: Sequence[float] = ()) -> Array:
    kind = "float64" if x.dtype == np.float64 else "float32"
    y = x.astype(kind, copy=False)
    y = y - beside(np.asarray(offset, kind), x)
    return y * beside(np.asarray(scale, kind), x)


@operator("ai.onnx.ml.Normalizer")
def normalizer(x: Array, *, norm: str = "MAX") -> Array:
    xp = xp_of(x)
    y = x.astype("float32", copy=False)
    if norm == "L2":
        size = xp.sqrt(xp.square(y).sum(axis=-1, keepdims=True))
    else:
        measure = xp.max if norm == "MAX" else xp.sum
        size = measure(xp.absolute(y), axis=-1, keepdims=True)
    return y / xp.where(size == 0, xp.ones_like(size), size)


@operator("ai.onnx.ml.Binarizer")
def binarizer(x: Array, *, threshold: float = 0.0) -> Array:
    return (x > threshold).astype(x.dtype)


@operator("ai.onnx.ml.ArrayFeatureExtractor", as_is=True)
def array_feature_extractor(x: Array, ids: Array) -> Array:
    return xp_of(x).take(x, ids.reshape(-1), axis=-1)


@operator("ai.onnx.ml.LabelEncoder")
def label_encoder(
    x: Array,
    *,
    keys_int64s: Any = None,
    keys_floats: Any = None,
    values_int64s: Any = None,
    values_floats: Any = None,
    keys_tensor: Any = None,
    values_tensor: Any = None,
    default_int64: int = -1,
    default_float: float = -0.0,
    default_tensor: Any = None,
) -> Array:
    """The value whose key x is; one comparison for each key."""
    keys = next(k for k in (keys_int64s, keys_floats, keys_tensor) if k is not None)
    if values_tensor is not None:
        values, default = values_tensor, default_tensor
    elif values_int64s is not None:
        values, default = np.asarray(values_int64s, "int64"), default_int64
    else:
        values, default = np.asarray(values_floats, "float32"), default_float
    keys, xp = np.asarray(keys, x.dtype), xp_of(x)
    if keys.size != values.size:
        raise ShapeError(f"LabelEncoder with {keys.size} keys and {values.size} values")
    y = xp.full_like(x, np.asarray(default).ravel()[0].item(), dtype=values.dtype)
    for key, value in zip(keys.ravel(), values.ravel(), strict=True):
        here = xp.isnan(x) if key != key else x == key.item()
        y = xp.where(here, xp.full_like(y, value.item()), y)
    return y


@operator("ai.onnx.ml.LinearRegressor")
def linear_regressor(
    x: Array,
    *,
    coefficients: Sequence[float] = (),
    intercepts: Sequence[float] = (),
    post_transform: str = "NONE",
    targets: int = 1,
) -> Array:
    if post_transform != "NONE":
        raise ShapeError(f"LinearRegressor with post_transform {post_transform}")
    return _scores(x, coefficients, intercepts, targets)


def _scores(
    x: Array, coefficients: Sequence[float], intercepts: Sequence[float], outputs: int
) -> Array:
    """x @ weight + bias in float32, of coefficients (outputs, inputs) in one row."""
    weight = np.asarray(coefficients, "float32").reshape(outputs, -1).T
    y = xp_of(x).matmul(x.astype("float32", copy=False), beside(np.ascontiguousarray(weight), x))
    return y + beside(np.asarray(intercepts, "float32"), x) if len(intercepts) else y


@operator("ai.onnx.ml.LinearClassifier")
def linear_classifier(
    x: Array,
    *,
    coefficients: Sequence[float],
    intercepts: Sequence[float] = (),
    classlabels_ints: Sequence[int],
    multi_class: int = 0,
    post_transform: str = "NONE",
) -> tuple[Array, Array]:
    """The label of the largest score, and the scores.

    Of two classes one may be left out, whose score is what the other's is to 1.
    """
    xp, labels = xp_of(x), beside(np.asarray(classlabels_ints, "int64"), x)
    y = _scores(x, coefficients, intercepts, len(coefficients) // max(1, x.shape[-1]))
    alone = y.shape[-1] == 1 and len(classlabels_ints) == 2
    best = (y[..., 0] > 0).astype("int64") if alone else y.argmax(axis=-1)
    if post_transform == "LOGISTIC":
        y = kernels.sigmoid(y)
    elif post_transform == "SOFTMAX":
        y = y if alone else kernels.softmax(y)
    elif post_transform != "NONE":
        raise ShapeError(f"LinearClassifier with post_transform {post_transform}")
    y = xp.concatenate([1 - y, y], axis=-1) if alone else y
    return xp.take(labels, best, axis=0), y


@operator("ai.onnx.ml.ZipMap", as_is=True)
def zip_map(
    x: Array, *, classlabels_int64s: Sequence[int] = (), classlabels_strings: Sequence[str] = ()
) -> Array:
    """A map from labels to numbers for each row: here an array, a label a column."""
    return x


@operator("ai.onnx.ml.Imputer")
def imputer(
    x: Array,
    *,
    imputed_value_floats: Sequence[float] = (),
    imputed_value_int64s: Sequence[int] = (),
    replaced_value_float: float = 0.0,
    replaced_value_int64: int = 0,
) -> Array:
    if x.dtype.kind == "f":
        values, old = imputed_value_floats, replaced_value_float
    else:
        values, old = imputed_value_int64s, replaced_value_int64
    xp, new = xp_of(x), beside(np.asarray(values, x.dtype), x)
    missing = xp.isnan(x) if old != old else x == old
    return xp.where(missing, new, x)


@operator("ai.onnx.ml.OneHotEncoder")
def one_hot_encoder(x: Array, *, cats_int64s: Sequence[int], zeros: int = 1) -> Array:
    """A column for each number; one that is none of them has none, whatever `zeros` says."""
    categories = beside(np.asarray(cats_int64s, "int64"), x)
    return (xp_of(x).expand_dims(x.astype("int64"), -1) == categories).astype("float32")


@operator("ai.onnx.ml.FeatureVectorizer")
def feature_vectorizer(*arrays: Array, inputdimensions: Any = None) -> Array:
    flat = [x.reshape(x.shape[0], -1).astype("float32") for x in arrays]
    return xp_of(flat[0]).concatenate(flat, axis=-1)
