"""The fully connected layer."""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt

from nnxp import kernels
from nnxp._arrays import Array, float_dtype
from nnxp.layers._layer import Example, Layer, Rng, check_weight, uniform, whole, zero_bias
from nnxp.layers.activation import named


class Dense(Layer):
    """y = activation(x @ weight + bias): every output sees every input.

    x (rows, ..., inputs) -> y (rows, ..., outputs); weight (inputs, outputs), bias (outputs,).
    Weights start uniform in ±sqrt(6 / (inputs + outputs)), biases at zero [Glorot & Bengio 2010].

        layer = nnxp.Dense(64, 10, "relu", rng=0)
        layer(x).shape == (4, 10)
        layer = nnxp.Dense.of(np.ones((64, 10), "float32"), None, "relu")

    Args:
        inputs: columns of x.
        outputs: columns of y.
        activation: a name from `nnxp.kernels.ACTIVATIONS`, in any spelling.
        bias: False for none.
        rng: a seed or a Generator; None draws other weights each time.
        dtype: of weight and bias.

    Raises:
        OptionError: a size that is no whole number from 1, or an unknown activation.
    """

    weight: Array
    bias: Array | None = None
    activation: str = "identity"

    def __init__(
        self,
        inputs: int,
        outputs: int,
        activation: kernels.ActivationName = "identity",
        *,
        bias: bool = True,
        rng: Rng = None,
        dtype: object = "float32",
    ) -> None:
        inputs, outputs = whole("Dense's inputs", inputs), whole("Dense's outputs", outputs)
        limit = sqrt(6 / (inputs + outputs))
        kind = float_dtype(dtype)
        self.weight = uniform((inputs, outputs), limit, rng, kind)
        self.bias = zero_bias("Dense", bias, outputs, kind)
        self.activation = activation

    def validate(self) -> None:
        check_weight(self, "(inputs, outputs)", (2,))
        self.activation = named(self.activation).__name__

    def __call__(self, x: Array) -> Array:
        activation = kernels.ACTIVATIONS[self.activation]
        return kernels.linear(x, self.weight, self.bias, activation=activation)

    def __repr__(self) -> str:
        inputs, outputs = self.weight.shape
        return f"Dense({inputs}, {outputs}, {self.activation})"

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield cls(5, 3, rng=0), (4, 5)
        yield cls(1, 1, "sigmoid", rng=1), (7, 1)
        yield cls(6, 17, "relu", bias=False, rng=2), (2, 3, 6)
        yield cls(64, 10, "softmax", rng=3), (33, 64)
