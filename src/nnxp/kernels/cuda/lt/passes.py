"""What is done without cuBLASLt: passes over a product, and products that it does not cover."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cupy
import numpy as np

from nnxp._arrays import Array
from nnxp.kernels._dispatch import Kernel
from nnxp.kernels.activations import ACTIVATIONS, identity
from nnxp.kernels.cuda._compiled import unfused
from nnxp.kernels.cuda.activations import bias_act
from nnxp.kernels.cuda.lt.bindings import BIAS
from nnxp.kernels.cuda.lt.descriptors import PASS
from nnxp.kernels.linear import linear

Run = Callable[[Array, Array, Array | None, Kernel], Array]
"""A way to do a product: x, weight, bias, activation -> y."""

_ONE_PASS = frozenset(ACTIVATIONS.values())  # those known when bias_act was: not a user's own


def finished(y: Array, bias: Array | None, activation: Kernel, dtype: np.dtype[Any]) -> Array:
    """activation(y + bias) in the given type: in place, if that is the type of y.

    Else y is float32 so as to be rounded once, which is when the result is stored.
    """
    if bias is None and activation is identity:
        return y  # a product alone is made in its type
    if activation in _ONE_PASS:
        return bias_act(y, bias, activation, y if y.dtype == dtype else cupy.empty(y.shape, dtype))
    if bias is not None:
        bias_act(y, converted(bias, y.dtype), identity, y)
    return converted(activation(y, out=y), dtype)


def rest(way: int, y: Array, bias: Array | None, activation: Kernel, dtype: np.dtype[Any]) -> Array:
    """What a product made in this way leaves to do."""
    if way == PASS:
        return finished(y, bias, activation, dtype)
    if way == BIAS:  # of a relu: it may come after the rounding, for it rounds nothing
        return finished(y, None, activation, dtype)
    return y


def converted(x: Array, dtype: np.dtype[Any]) -> Array:
    """x in another type: itself, if it is of it."""
    if x.dtype == dtype:
        return x
    y = cupy.empty(x.shape, dtype)
    cupy.copyto(y, x, casting="unsafe")
    return y


def uncovered(x: Array, weight: Array, bias: Array | None, activation: Kernel) -> Array:
    """For other types, and for what does not fit together: CuPy computes it, or says why not."""
    return unfused(linear, x, weight, bias, activation=activation)


def nothing(x: Array, weight: Array, bias: Array | None, activation: Kernel) -> Array:
    """For a sum without terms, or no sums at all."""
    y = cupy.zeros((x.shape[0], weight.shape[1]), x.dtype)
    return finished(y, bias, activation, y.dtype) if y.size else y


def by_cupy(x: Array, weight: Array, bias: Array | None, activation: Kernel) -> Array:
    """Where there is no cuBLASLt, or it does not offer this product.

    In 16 bits CuPy rounds the product before a bias or an activation could come to it, and sums
    in 16 bits where there is only one number to sum; so those go by way of float32.
    """
    y = cupy.empty((x.shape[0], weight.shape[1]), x.dtype)
    alone = bias is None and activation is identity and y.size > 1
    if y.itemsize == 2 and not alone:
        return uncovered(x, weight, bias, activation)
    cupy.matmul(x, weight, out=y)
    return finished(y, bias, activation, y.dtype)
