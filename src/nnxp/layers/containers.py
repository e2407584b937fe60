"""Layers made of layers."""

from __future__ import annotations

from collections.abc import Iterator

from nnxp._arrays import Array, Shape
from nnxp._errors import OptionError, ShapeError
from nnxp.layers._layer import Example, Layer
from nnxp.layers.dense import Dense
from nnxp.layers.norm import LayerNorm


class Sequential(Layer):
    """y = last(... second(first(x))): one layer after the other.

    Raises ShapeError for a layer that cannot take what the one before it answers.

        net = nnxp.Sequential(nnxp.Dense(784, 128, "relu"), nnxp.Dense(128, 10, "softmax"))
    """

    layers: tuple[Layer, ...]

    def __init__(self, *layers: Layer) -> None:
        for i, layer in enumerate(layers):
            if not isinstance(layer, Layer):
                raise OptionError(f"Sequential takes layers, but argument {i} is {layer!r:.60}")
        self.layers = layers

    @property
    def takes(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.layers[0].takes if self.layers else ()

    def validate(self) -> None:
        row: Shape | None = None
        for i, layer in enumerate(self.layers):
            if row is None or not layer._takes((1, *row)):
                try:
                    size = layer.row_shape()
                except OptionError:
                    row = None
                    continue
                if row is not None and len(row) == 1:
                    before = self.layers[i - 1]
                    raise ShapeError(
                        f"layers.{i} {layer!r:.80} takes (rows, {size[0]}), but layers.{i - 1} "
                        f"{before!r:.80} answers (rows, {row[0]})"
                    )
                row = size
            made = layer.output_shape((1, *row))
            row = made[1:] if isinstance(made[0], int) else None
            if row is not None and not layer.parameters() and not _keeps_last_axis(layer, row):
                row = None  # a row of more axes, of which only the last is known, is another size

    def __call__(self, x: Array) -> Array:
        for layer in self.layers:
            x = layer(x)
        return x

    def __repr__(self) -> str:
        return f"Sequential({', '.join(map(repr, self.layers))})"

    @classmethod
    def examples(cls) -> Iterator[Example]:
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


def _keeps_last_axis(layer: Layer, row: Shape) -> bool:
    """Whether rows with one more axis before the last leave a layer with the same last axis."""
    made = layer._takes((1, 2, *row)) and layer.output_shape((1, 2, *row))
    return bool(made) and made[-1] == row[-1]


class Residual(Layer):
    """y = x + inner(x)   [He, Zhang, Ren, Sun 2015, arXiv:1512.03385]

    x (rows, ...) -> y like x; inner keeps the shape. Several layers stand for their Sequential.
    """

    inner: Layer

    def __init__(self, *layers: Layer) -> None:
        inner = layers[0] if len(layers) == 1 else Sequential(*layers)
        if not isinstance(inner, Layer):
            raise OptionError(f"Residual takes layers, not {inner!r:.60}")
        self.inner = inner

    def __call__(self, x: Array) -> Array:
        y = self.inner(x)
        if y.shape != x.shape:
            raise ShapeError(f"{self} adds x to inner(x), which has another shape")
        return x + y

    def __repr__(self) -> str:
        return f"Residual({self.inner!r})"

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield cls(Dense(6, 6, "tanh", rng=0)), (4, 6)
        yield cls(Dense(6, 12, "gelu", rng=1), Dense(12, 6, rng=2)), (2, 3, 6)
