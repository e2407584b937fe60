"""Layers that change the shape and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from nnxp._arrays import Array, Shape
from nnxp._errors import ShapeError
from nnxp.layers._layer import Layer


class Flatten(Layer):
    """Each row as one vector: x (rows, a, b, ...) -> y (rows, a * b * ...)."""

    def __call__(self, x: Array) -> Array:
        return x.reshape(self.output_shape(x.shape))

    def output_shape(self, shape: Shape) -> Shape:
        if not shape:
            raise ShapeError("Flatten takes (rows, ...) but got ()")
        return shape[0], prod(shape[1:])

    @classmethod
    def examples(cls) -> Iterator[tuple[Layer, Shape]]:
        yield cls(), (3, 2, 4)
        yield cls(), (3, 5)
