"""Matrix products on CUDA: one call of cuBLASLt for product, bias and relu where it can."""

from __future__ import annotations

from math import prod

import cupy
import numpy as np

from nnxp._arrays import Array
from nnxp.kernels._dispatch import Kernel
from nnxp.kernels.activations import identity
from nnxp.kernels.cuda._compiled import fusable, unfused
from nnxp.kernels.cuda.lt import on_this_device, product, stacked
from nnxp.kernels.linear import linear, matmul


@linear.on("cupy")
def linear_lt(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    activation: Kernel = identity,
    precision: str | None = None,
) -> Array:
    """y = activation(x @ weight + bias)

    x (..., i), weight (i, o), bias (o,) -> y (..., o), dtype of x. What cuBLASLt leaves to do of
    bias and activation is done in one pass, where the product lies. The rows of y may lie further
    apart than o, where that makes the product faster.
    """
    if x.ndim == 2:
        return product(x, weight, bias, activation, precision)
    rows = x.reshape(prod(x.shape[:-1]), x.shape[-1])
    y = product(rows, weight, bias, activation, precision)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@matmul.on("cupy")
def matmul_lt(x: Array, weight: Array, *, precision: str | None = None) -> Array:
    """y = x @ weight: a linear layer without bias, or a product of stacks."""
    if weight.ndim < 3 or x.ndim < 3:
        return linear_lt(x, weight, precision=precision)
    if not (
        on_this_device(x, weight)
        and fusable(x)
        and weight.dtype == x.dtype
        and x.shape[-1] == weight.shape[-2]
        and weight.size
    ):
        return unfused(matmul, x, weight, precision=precision)
    lead = np.broadcast_shapes(x.shape[:-2], weight.shape[:-2])
    both = [
        cupy.broadcast_to(array, (*lead, *array.shape[-2:])).reshape(prod(lead), *array.shape[-2:])
        for array in (x, weight)
    ]
    y = stacked(both[0], both[1], x.dtype, precision)
    return y.reshape(*lead, *y.shape[1:])
