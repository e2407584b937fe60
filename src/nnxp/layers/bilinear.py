"""The bilinear layer."""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt

from nnxp import kernels
from nnxp._arrays import Array, float_dtype
from nnxp.layers._layer import Example, Layer, Rng, check_weight, uniform, whole, zero_bias
from nnxp.layers.activation import named


class Bilinear(Layer):
    """z_o = activation(sum over i, j of x_i weight[i, j, o] y_j + bias_o), of two inputs.

    x (rows, ..., left), y (rows, ..., right) -> z (rows, ..., outputs); weight (left, right,
    outputs), bias (outputs,). Weights start uniform in ±1 / sqrt(left), biases at zero.
    """

    weight: Array
    bias: Array | None = None
    activation: str = "identity"

    def __init__(
        self,
        left: int,
        right: int,
        outputs: int,
        activation: kernels.ActivationName = "identity",
        *,
        bias: bool = True,
        rng: Rng = None,
        dtype: object = "float32",
    ) -> None:
        left, right = whole("Bilinear's left", left), whole("Bilinear's right", right)
        outputs, kind = whole("Bilinear's outputs", outputs), float_dtype(dtype)
        self.weight = uniform((left, right, outputs), 1 / sqrt(left), rng, kind)
        self.bias = zero_bias("Bilinear", bias, outputs, kind)
        self.activation = activation

    def validate(self) -> None:
        check_weight(self, "(left, right, outputs)", (3,))
        self.activation = named(self.activation).__name__

    def __call__(self, x: Array, y: Array) -> Array:
        activation = kernels.ACTIVATIONS[self.activation]
        return kernels.bilinear(x, y, self.weight, self.bias, activation=activation)

    def __repr__(self) -> str:
        left, right, outputs = self.weight.shape
        return f"Bilinear({left}, {right}, {outputs}, {self.activation})"

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield cls(3, 4, 5, rng=0), [(2, 3), (2, 4)]
        yield cls(2, 3, 4, "tanh", bias=False, rng=1), [(2, 5, 2), (2, 5, 3)]
