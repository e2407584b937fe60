"""Layers that change the shape and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from nnxp._arrays import Array
from nnxp.layers._layer import Example, Layer


class Flatten(Layer):
    """Each row as one vector: x (rows, a, b, ...) -> y (rows, a * b * ...)."""

    def __call__(self, x: Array) -> Array:
        return x.reshape(x.shape[0], prod(x.shape[1:]))

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield cls(), (3, 2, 4)
        yield cls(), (3, 5)
