"""The fully connected layer."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod, sqrt

import numpy as np

from nnxp import kernels
from nnxp._arrays import Array, Shape, float_dtype
from nnxp._errors import ShapeError
from nnxp.layers._layer import Layer, Rng, array_shape, generator, last_axis
from nnxp.layers.activation import named


class Dense(Layer):
    """y = activation(x @ weight + bias): every output sees every input.

    x (rows, ..., inputs) -> y (rows, ..., outputs); weight (inputs, outputs), bias (outputs,).
    Weights start uniform in ±sqrt(6 / (inputs + outputs)), biases at zero [Glorot & Bengio 2010].
    `activation` is a name from `nnxp.kernels.ACTIVATIONS`.
    """

    weight: Array
    bias: Array | None
    activation: str

    def __init__(
        self,
        inputs: int,
        outputs: int,
        activation: str = "identity",
        *,
        bias: bool = True,
        rng: Rng = None,
        dtype: object = "float32",
    ) -> None:
        if inputs < 1 or outputs < 1:
            raise ShapeError(f"Dense takes at least one input and output: {inputs}, {outputs}")
        limit = sqrt(6 / (inputs + outputs))
        kind = float_dtype(dtype)
        drawn = np.float64 if kind == np.float64 else np.float32
        weight = generator(rng).random((inputs, outputs), dtype=drawn)
        weight *= 2 * limit
        weight -= limit
        self._set(
            weight=weight.astype(kind, copy=False),
            bias=np.zeros(outputs, kind) if bias else None,
            activation=named(activation).__name__,
        )

    @classmethod
    def of(cls, weight: Array, bias: Array | None = None, activation: str = "identity") -> Dense:
        """The layer with these parameters: weight (inputs, outputs), bias (outputs,) or None."""
        return cls._made(weight=weight, bias=bias, activation=named(activation).__name__)

    def _validate(self) -> None:
        weight = array_shape(self, "weight")
        bias = None if self.bias is None else array_shape(self, "bias")
        if len(weight) != 2 or 0 in weight or bias not in (None, weight[1:]):
            raise ShapeError(
                f"Dense takes weight (inputs, outputs), bias (outputs,); got {weight} and {bias}"
            )
        named(self.activation)

    def __call__(self, x: Array) -> Array:
        activation = kernels.ACTIVATIONS[self.activation]
        return kernels.linear(x, self.weight, self.bias, activation=activation)

    def output_shape(self, shape: Shape) -> Shape:
        inputs, outputs = self.weight.shape
        last_axis(self, shape, inputs)
        return (*shape[:-1], outputs)

    def multiply_adds(self, shape: Shape) -> int:
        return prod(shape) * int(self.weight.shape[1])

    @property
    def temporaries(self) -> int:
        return kernels.ACTIVATIONS[self.activation].temporaries

    def __repr__(self) -> str:
        inputs, outputs = self.weight.shape
        return f"Dense({inputs}, {outputs}, {self.activation})"

    @classmethod
    def examples(cls) -> Iterator[tuple[Layer, Shape]]:
        yield cls(5, 3, rng=0), (4, 5)
        yield cls(1, 1, "sigmoid", rng=1), (7, 1)
        yield cls(6, 17, "relu", bias=False, rng=2), (2, 3, 6)
        yield cls(64, 10, "softmax", rng=3), (33, 64)
