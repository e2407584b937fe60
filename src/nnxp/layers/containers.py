"""Layers made of layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nnxp._arrays import Array, Shape, xp_of
from nnxp._errors import NnxpError, OptionError, ShapeError
from nnxp.layers._layer import Example, Layer
from nnxp.layers._names import class_names, column_names
from nnxp.layers.dense import Dense


class Sequential(Layer):
    """y = last(... second(first(x))): one layer after the other.

        net = nnxp.Sequential(nnxp.Dense(784, 128, "relu"), nnxp.Dense(128, 10, "softmax"))

    Args:
        layers: one after the other, each a layer.
        columns: names of the columns that the model was trained with: tables are put in their
            order, or refused (`nnxp.predict`).
        classes: what the outputs stand for, one each, or two for a single output. Without them,
            and without columns, those of the last and of the first layer count, if these are
            Sequential. All are saved with the model.

    Raises:
        ShapeError: a layer cannot take what the one before it answers, or names or classes are more
            or fewer than there are columns or outputs.
        OptionError: an argument is no layer.
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
        if len(layers) == 1 and isinstance(layers[0], list | tuple):
            raise OptionError("Sequential takes layers, not a list of them: Sequential(*layers)")
        self.layers = layers
        self.columns, self.classes = columns, classes  # type: ignore[assignment]  # made tuples

    @property
    def takes(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.layers[0].takes if self.layers else ()

    def validate(self) -> None:
        if not isinstance(self.layers, tuple):
            raise OptionError(f"Sequential takes layers, not {self.layers!r:.60}")
        for i, layer in enumerate(self.layers):
            if not isinstance(layer, Layer):
                raise OptionError(f"Sequential takes layers, but argument {i} is {layer!r:.60}")
        row: Shape | None = None  # what the next layer gets, as far as that is certain
        for i, layer in enumerate(self.layers):
            if row is None or not layer._takes((1, *row)):
                own = _row_of(layer)
                if row is not None and own is not None and _answer(layer, own) is not None:
                    raise ShapeError(
                        f"layers.{i} {layer!r:.80} takes {_rows(own)}, but layers.{i - 1} "
                        f"{self.layers[i - 1]!r:.80} answers {_rows(row)}"
                    )
                row = own
            row = None if row is None else _answer(layer, row)
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
        from nnxp.layers.norm import LayerNorm

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


class Add(Layer):
    """y = x0 + x1 + ...: branches that meet.

    Inputs of one shape, or of shapes that broadcast, (rows, ...) -> y (rows, ...).
    """

    def __call__(self, *inputs: Array) -> Array:
        y = inputs[0]
        for x in inputs[1:]:
            y = y + x
        return y

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield cls(), [(4, 3), (4, 3)]
        yield cls(), [(2, 3, 4), (2, 1, 4), (2, 3, 4)]


class Concatenate(Layer):
    """y = the inputs side by side along an axis: branches that meet.

    Inputs (rows, ...), of one shape but for that axis, which is not that of the rows -> y.
    """

    axis: int = -1

    def validate(self) -> None:
        if type(self.axis) is not int or self.axis == 0:
            raise OptionError(
                f"axis is a whole number, and not 0, that of the rows: {self.axis!r:.60}"
            )

    def __call__(self, *inputs: Array) -> Array:
        return xp_of(inputs[0]).concatenate(list(inputs), axis=self.axis)

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield cls(), [(4, 3), (4, 2)]
        yield cls(1), [(2, 3, 4), (2, 1, 4), (2, 2, 4)]


class Residual(Layer):
    """y = x + inner(x)   [He, Zhang, Ren, Sun 2015, arXiv:1512.03385]

    x (rows, ...) -> y like x; inner keeps the shape. Several layers stand for their Sequential.
    """

    inner: Layer

    def __init__(self, *layers: Layer) -> None:
        if not layers:
            raise OptionError("Residual takes the layers whose answer is added to x, but none came")
        self.inner = layers[0] if len(layers) == 1 else Sequential(*layers)

    def validate(self) -> None:
        if not isinstance(self.inner, Layer):
            raise OptionError(f"Residual takes layers, not {self.inner!r:.60}")
        row = _row_of(self.inner)
        answer = None if row is None else _answer(self.inner, row)
        if row is not None and answer is not None and answer != row:
            raise ShapeError(
                f"Residual adds x to inner(x), but {self.inner!r:.80} takes {_rows(row)} and "
                f"answers {_rows(answer)}"
            )

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


def _row_of(layer: Layer) -> Shape | None:
    """The shape of a row that the layer takes; None if its parameters do not tell."""
    try:
        return layer.row_shape()
    except NnxpError:
        return None


MANY = 1009  # an axis that nobody takes for one of the layer's own


def _answer(layer: Layer, row: Shape) -> Shape | None:
    """What the layer makes of such a row, if it does so with any axes before it; else None.

    A layer that folds axes into one another, as Flatten does, may be given rows of more axes than
    the parameters of another layer tell, and nothing is certain of what follows it.
    """
    try:
        programs = [layer.program((1, *before, *row)) for before in ((), (MANY,))]
        (plain,), (deep,) = (program.outline(1) for program in programs)
    except Exception:  # a ShapeError, or whatever a formula says to a shape of other axes
        return None
    if programs[0].opaque or deep.shape[:2] != (1, MANY) or deep.shape[2:] != plain.shape[1:]:
        return None
    return plain.shape[1:]


def _rows(row: Shape) -> str:
    return f"(rows, {', '.join(map(str, row))})"
