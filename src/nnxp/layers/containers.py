"""Layers made of layers."""

from __future__ import annotations

from collections.abc import Iterator

from nnxp._arrays import Array, Shape
from nnxp._errors import OptionError, ShapeError, name_layer
from nnxp.layers._layer import Layer
from nnxp.layers.dense import Dense
from nnxp.layers.norm import LayerNorm


class Sequential(Layer):
    """y = last(... second(first(x))): one layer after the other."""

    layers: tuple[Layer, ...]

    def __init__(self, *layers: Layer) -> None:
        for i, layer in enumerate(layers):
            if not isinstance(layer, Layer):
                raise OptionError(f"Sequential takes layers, but argument {i} is {layer!r}")
        self._set(layers=layers)

    def __call__(self, x: Array) -> Array:
        i = 0
        try:
            for i, layer in enumerate(self.layers):  # noqa: B007 (an error asks for i)
                x = layer._bare(x)
        except Exception as error:
            name_layer(error, f"layers.{i}")
            raise
        return x

    def output_shape(self, shape: Shape) -> Shape:
        i = 0
        try:
            for i, layer in enumerate(self.layers):  # noqa: B007 (an error asks for i)
                shape = layer.output_shape(shape)
        except Exception as error:
            name_layer(error, f"layers.{i}")
            raise
        return shape

    def __repr__(self) -> str:
        return f"Sequential({', '.join(map(repr, self.layers))})"

    @classmethod
    def examples(cls) -> Iterator[tuple[Layer, Shape]]:
        yield cls(), (3, 2)
        yield (
            cls(
                Dense(8, 16, "relu", rng=0),
                LayerNorm(16),
                cls(Dense(16, 16, "gelu", rng=1)),
                Dense(16, 4, "softmax", rng=2),
            ),
            (9, 8),
        )


class Residual(Layer):
    """y = x + inner(x)   [He, Zhang, Ren, Sun 2015, arXiv:1512.03385]

    x (rows, ...) -> y like x; inner keeps the shape. Several layers stand for their Sequential.
    """

    inner: Layer

    def __init__(self, *layers: Layer) -> None:
        inner = layers[0] if len(layers) == 1 else Sequential(*layers)
        if not isinstance(inner, Layer):
            raise OptionError(f"Residual takes layers, not {inner!r}")
        self._set(inner=inner)

    def __call__(self, x: Array) -> Array:
        try:
            return x + self.inner._bare(x)
        except Exception as error:
            name_layer(error, "inner")
            raise

    def output_shape(self, shape: Shape) -> Shape:
        try:
            made = self.inner.output_shape(shape)
        except Exception as error:
            name_layer(error, "inner")
            raise
        if made != shape:
            raise ShapeError(f"{self} adds its input {shape} to {made}: inner must keep the shape")
        return shape

    def __repr__(self) -> str:
        return f"Residual({self.inner!r})"

    @classmethod
    def examples(cls) -> Iterator[tuple[Layer, Shape]]:
        yield cls(Dense(6, 6, "tanh", rng=0)), (4, 6)
        yield cls(Dense(6, 12, "gelu", rng=1), Dense(12, 6, rng=2)), (2, 3, 6)
