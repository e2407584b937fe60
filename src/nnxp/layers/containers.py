"""Layers made of layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nnxp._arrays import Array, Shape
from nnxp._errors import OptionError, ShapeError
from nnxp.layers._layer import Example, Layer
from nnxp.layers._names import class_names, column_names
from nnxp.layers.dense import Dense
from nnxp.layers.norm import LayerNorm


class Sequential(Layer):
    """y = last(... second(first(x))): one layer after the other.

    `columns` are the names of the columns that the model was trained with: tables are put in their
    order, or refused (`nnxp.predict`). `classes` are what the outputs stand for, one each, or two
    for a single output. Without them, those of the first and of the last layer count, if these are
    Sequential. Both are saved with the model.

    Raises ShapeError for a layer that cannot take what the one before it answers, and for names or
    classes that are more or fewer than there are columns or outputs.

        net = nnxp.Sequential(nnxp.Dense(784, 128, "relu"), nnxp.Dense(128, 10, "softmax"))
    """

    layers: tuple[Layer, ...]
    columns: tuple[str, ...] | None = None
    classes: tuple[str | int | float | bool, ...] | None = None

    def __init__(
        self,
        *layers: Layer,
        columns: Sequence[str] | None = None,
        classes: Sequence[str | int | float | bool] | None = None,
    ) -> None:
        for i, layer in enumerate(layers):
            if not isinstance(layer, Layer):
                raise OptionError(f"Sequential takes layers, but argument {i} is {layer!r:.60}")
        self.layers = layers
        self.columns, self.classes = columns, classes  # type: ignore[assignment]  # made tuples

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
        self._name(row)

    def _name(self, row: Shape | None) -> None:
        """Check the names that were given, and take over those of the first and last layer."""
        first, last = (*self.layers[:1], *self.layers[-1:]) or (None, None)
        columns, classes = self.columns, self.classes
        if columns is not None and first is not None:
            columns = column_names(columns, first)
        elif isinstance(first, Sequential):
            columns = first.columns
        if classes is not None:
            classes = class_names(classes, row)
        elif isinstance(last, Sequential):
            classes = last.classes
        self.__dict__.update(columns=columns, classes=classes)

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
        yield cls(Dense(2, 3, rng=3), columns=("a", "b"), classes=("x", "y", "z")), (4, 2)


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
