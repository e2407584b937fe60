"""Matrix products."""

from __future__ import annotations

from contextvars import ContextVar
from math import prod
from typing import Any

from nnxp._arrays import Array, xp_of
from nnxp.kernels._dispatch import Kernel, kernel
from nnxp.kernels.activations import identity

precision: ContextVar[str | None] = ContextVar("nnxp_precision", default=None)
"""How exact products of float32 arrays are, for the thread or task that sets it.

None: float32 is float32. "tf32": on CUDA the factors may first be rounded to TF32, 11 significant
bits instead of 24, with sums in float32 as before. Other types and the CPU take no notice.
"""


@kernel
def matmul(x: Array, weight: Array) -> Array:
    """y = x @ weight

    x (..., i), weight (i, o) -> y (..., o). All leading axes together are the rows of one
    product: NumPy and CuPy would otherwise run one product for each index of the outer axes.
    """
    if x.ndim == 2:
        return xp_of(x).matmul(x, weight)
    return xp_of(x).matmul(_rows(x), weight).reshape(*x.shape[:-1], weight.shape[-1])


@matmul.vjp
def _matmul(dy: Array, y: Array, x: Array, weight: Array, **options: Any) -> tuple[Array, ...]:
    rows, worth = _rows(x), _rows(dy)
    return xp_of(x).matmul(worth, weight.T).reshape(x.shape), xp_of(x).matmul(rows.T, worth)


def _rows(x: Array) -> Array:
    """All leading axes together."""
    return x if x.ndim == 2 else x.reshape(prod(x.shape[:-1]), x.shape[-1])


@kernel
def linear(
    x: Array, weight: Array, bias: Array | None = None, *, activation: Kernel = identity
) -> Array:
    """y = activation(x @ weight + bias)

    x (..., i), weight (i, o), bias (o,) -> y (..., o), dtype of x. Bias and activation are
    applied where the product lies, while it is still in cache.
    """
    y = matmul.reference(x, weight)  # the types are settled: no need to ask again
    if bias is not None:
        y += bias
    return y if activation is identity else activation.reference(y, out=y)


@linear.vjp
def _linear(
    dy: Array, y: Array, x: Array, weight: Array, bias: Array | None = None, **options: Any
) -> tuple[Array, ...]:
    """Without an activation: one is differentiated as a step of its own."""
    return *_matmul(dy, y, x, weight), dy
