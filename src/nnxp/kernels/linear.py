"""Matrix products."""

from __future__ import annotations

from math import prod

from nnxp._arrays import Array, xp_of
from nnxp.kernels._dispatch import Kernel, kernel
from nnxp.kernels.activations import identity


@kernel
def matmul(x: Array, weight: Array, *, precision: str | None = None) -> Array:
    """y = x @ weight

    x (..., i), weight (i, o) -> y (..., o). All leading axes together are the rows of one
    product: NumPy and CuPy would otherwise run one product for each index of the outer axes.

    With precision="tf32" CUDA may round the factors of float32 products to TF32 first, 11
    significant bits instead of 24, with sums in float32 as before. Others take no notice.
    """
    if x.ndim == 2:
        return xp_of(x).matmul(x, weight)
    rows = x.reshape(prod(x.shape[:-1]), x.shape[-1])
    return xp_of(x).matmul(rows, weight).reshape(*x.shape[:-1], weight.shape[-1])


@kernel
def linear(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    activation: Kernel = identity,
    precision: str | None = None,
) -> Array:
    """y = activation(x @ weight + bias)

    x (..., i), weight (i, o), bias (o,) -> y (..., o), dtype of x. Bias and activation are
    applied where the product lies, while it is still in cache. `precision` is as for matmul.
    """
    y = matmul.reference(x, weight)  # the types are settled: no need to ask again
    if bias is not None:
        y += bias
    return y if activation is identity else activation.reference(y, out=y)
