"""Matrix products on CUDA: one call of cuBLASLt for product, bias and relu where it can."""

from __future__ import annotations

from math import prod

from nnxp._arrays import Array
from nnxp.kernels._dispatch import Kernel
from nnxp.kernels.activations import identity
from nnxp.kernels.cuda.lt import product
from nnxp.kernels.linear import linear, matmul


@linear.on("cupy")
def linear_lt(
    x: Array, weight: Array, bias: Array | None = None, *, activation: Kernel = identity
) -> Array:
    """y = activation(x @ weight + bias)

    x (..., i), weight (i, o), bias (o,) -> y (..., o), dtype of x. What cuBLASLt leaves to do of
    bias and activation is done in one pass, where the product lies. The rows of y may lie further
    apart than o, where that makes the product faster.
    """
    if x.ndim == 2:
        return product(x, weight, bias, activation)
    rows = x.reshape(prod(x.shape[:-1]), x.shape[-1])
    y = product(rows, weight, bias, activation)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@matmul.on("cupy")
def matmul_lt(x: Array, weight: Array) -> Array:
    """y = x @ weight: a linear layer without bias."""
    return linear_lt(x, weight)
