"""Matrix products."""

from __future__ import annotations

from math import prod
from typing import Any

from nnxp._arrays import Array, xp_of
from nnxp._errors import ShapeError
from nnxp.kernels._dispatch import Kernel, kernel
from nnxp.kernels.activations import identity


@kernel
def matmul(x: Array, weight: Array, *, precision: str | None = None) -> Array:
    """y = x @ weight

    x (..., i), weight (i, o) -> y (..., o). All leading axes together are the rows of one
    product: NumPy and CuPy would otherwise run one product for each index of the outer axes. Of
    stacks, x (..., m, i), weight (..., i, o) -> y (..., m, o), both of more than two axes, each
    matrix is multiplied by one.

    With precision="tf32" CUDA may round the factors of float32 products to TF32 first, 11
    significant bits instead of 24, with sums in float32 as before. Others take no notice.
    """
    if weight.ndim > 2 and x.ndim > 2:
        return xp_of(x).matmul(x, weight)
    _is_matrix("matmul", weight)
    if x.ndim == 2:
        return xp_of(x).matmul(x, weight)
    return xp_of(x).matmul(_rows(x), weight).reshape(*x.shape[:-1], weight.shape[-1])


def _is_matrix(who: str, weight: Array) -> None:
    if weight.ndim != 2:
        raise ShapeError(
            f"{who} takes a weight of two axes, (inputs, outputs), but got {weight.shape}"
        )


@matmul.vjp
def _matmul(dy: Array, y: Array, x: Array, weight: Array, **options: Any) -> tuple[Array, ...]:
    if weight.ndim > 2:
        matmul = xp_of(x).matmul
        return matmul(dy, weight.swapaxes(-1, -2)), matmul(x.swapaxes(-1, -2), dy)
    rows, worth = _rows(x), _rows(dy)
    return xp_of(x).matmul(worth, weight.T).reshape(x.shape), xp_of(x).matmul(rows.T, worth)


def _rows(x: Array) -> Array:
    """All leading axes together."""
    return x if x.ndim == 2 else x.reshape(prod(x.shape[:-1]), x.shape[-1])


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
    _is_matrix("linear", weight)
    y = xp_of(x).matmul(_rows(x), weight)
    if bias is not None:
        y += bias
    if activation is not identity:
        y = activation.reference(y, out=y)
    return y if x.ndim == 2 else y.reshape(*x.shape[:-1], weight.shape[-1])


@linear.vjp
def _linear(
    dy: Array, y: Array, x: Array, weight: Array, bias: Array | None = None, **options: Any
) -> tuple[Array, ...]:
    """Without an activation: one is differentiated as a step of its own."""
    return *_matmul(dy, y, x, weight), dy


@kernel
def bilinear(
    x: Array, y: Array, weight: Array, bias: Array | None = None, *, activation: Kernel = identity
) -> Array:
    """z_o = activation(sum over i, j of x_i weight[i, j, o] y_j + bias_o)

    x (..., i), y (..., j), weight (i, j, o), bias (o,) -> z (..., o): a product with the weight as
    (i, j o), and of what it makes of each row with y.
    """
    left, right, outputs = weight.shape
    if x.shape[-1] != left or y.shape[-1] != right or x.shape[:-1] != y.shape[:-1]:
        raise ShapeError(
            f"bilinear takes x (..., {left}) and y (..., {right}) with the same axes before, but "
            f"got (rows, *{x.shape[1:]}) and (rows, *{y.shape[1:]})"
        )
    products = matmul(x, weight.reshape(left, right * outputs))
    products = products.reshape(*x.shape[:-1], right, outputs)
    z = xp_of(x).matmul(y[..., None, :], products)[..., 0, :]
    if bias is not None:
        z = z + bias
    return z if activation is identity else activation(z)
