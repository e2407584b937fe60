"""Recurrent layers: their cells, and stacks of them that go through time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import sqrt
from typing import Any, ClassVar, TypeVar

from nnxp import kernels
from nnxp._arrays import Array, float_dtype, xp_of
from nnxp._errors import OptionError, ShapeError
from nnxp.layers._layer import Example, Layer, Rng, array_shape, generator, uniform, whole
from nnxp.layers.activation import named
from nnxp.program.traced import counts_rows

S = TypeVar("S", bound="_Stack")

RETURNS = ("sequence", "last", "states")


class _Cell(Layer):
    """One step in time, of weight_x (inputs, gates), weight_h (states, gates) and a bias."""

    gates: ClassVar[int]
    weight_x: Array
    weight_h: Array
    bias: Array | None = None

    def _draw(
        self, inputs: int, size: int, bias: bool, rng: Rng, dtype: object, states: int
    ) -> Any:
        """Parameters uniform in ±1 / sqrt(size), as torch's; answers what draws more of them."""
        kind = float_dtype(dtype)
        random, limit = generator(rng), 1 / sqrt(size)

        def draw(*shape: int) -> Array:
            return uniform(shape, limit, random, kind)

        self.weight_x = draw(inputs, self.gates * size)
        self.weight_h = draw(states, self.gates * size)
        self.bias = draw(self.gates * size) if bias else None
        return draw

    def validate(self) -> None:
        x, h = array_shape(self, "weight_x"), array_shape(self, "weight_h")
        bias = None if self.bias is None else array_shape(self, "bias")
        size, left = divmod(x[-1] if x else 0, self.gates)
        fits = len(x) == len(h) == 2 and x[1] == h[1] and not left and 0 not in (*x, *h)
        if not fits or bias not in (None, x[1:]) or self._state_size(size) != h[0]:
            raise ShapeError(
                f"{type(self).__name__} takes weight_x (inputs, {self.gates} * size), weight_h "
                f"(size, {self.gates} * size) and bias ({self.gates} * size,); "
                f"got {x}, {h} and {bias}"
            )

    def _state_size(self, size: int) -> int:
        return size

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of the states, that of the output first."""
        return (self.weight_h.shape[0],)

    def through(
        self, x: Array, states: Sequence[Array | None], lengths: Array | None, reverse: bool
    ) -> tuple[Array, ...]:
        """All outputs for x (rows, time, inputs), and the last states."""
        raise NotImplementedError

    def __call__(self, x: Array, h: Array | None = None) -> Any:
        return self._once(x, h)[0]

    def _once(self, x: Array, *states: Array | None) -> tuple[Array, ...]:
        if x.ndim != 2:
            raise ValueError("a cell takes x (rows, inputs)")
        return self.through(x[:, None], states, None, False)[1:]

    def _inputs(self, x: Array) -> Array:
        if x.shape[-1] != (inputs := self.weight_x.shape[0]):
            raise ShapeError(f"{self} takes {inputs} numbers at a time, but got {x.shape[-1]}")
        return kernels.linear(x, self.weight_x, self.bias)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.weight_x.shape[0]}, {self.sizes[0]})"


class RNNCell(_Cell):
    """h' = activation(x @ weight_x + bias + h @ weight_h)   [Elman 1990]

    x (rows, inputs), h (rows, size), zeros if it is left out, -> h' (rows, size). `activation` is
    "tanh" or another name from `nnxp.kernels.ACTIVATIONS`.
    """

    gates = 1

    activation: str = "tanh"

    def __init__(
        self,
        inputs: int,
        size: int,
        activation: kernels.ActivationName = "tanh",
        *,
        bias: bool = True,
        rng: Rng = None,
        dtype: object = "float32",
    ) -> None:
        inputs, size = whole("inputs", inputs), whole("size", size)
        self._draw(inputs, size, bias, rng, dtype, size)
        self.activation = activation

    def validate(self) -> None:
        super().validate()
        self.activation = named(self.activation).__name__

    def through(
        self, x: Array, states: Sequence[Array | None], lengths: Array | None, reverse: bool
    ) -> tuple[Array, ...]:
        activation = kernels.ACTIVATIONS[self.activation]
        return kernels.rnn(  # type: ignore[no-any-return]
            self._inputs(x), self.weight_h, *states, lengths, activation=activation, reverse=reverse
        )

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield cls(3, 4, rng=0), (5, 3)
        yield cls(3, 2, "relu", bias=False, rng=1), [(5, 3), (5, 2)]


class GRUCell(_Cell):
    """h' = z h + (1 - z) n, with gates r, z and new values n   [Cho et al. 2014, arXiv:1406.1078]

    r, z = sigmoid(x @ weight_x + bias + h @ weight_h + bias_h), each of its columns, and
    n = tanh(x W + b + r (h V + b_h)), as cuDNN and torch have it; without `reset_after`, as in the
    paper, n = tanh(x W + b + (r h) V + b_h).

    x (rows, inputs), h (rows, size), zeros if it is left out, -> h' (rows, size). The columns of
    weight_x (inputs, 3 * size), weight_h (size, 3 * size), bias and bias_h (3 * size,) are those of
    r, z, n.
    """

    gates = 3

    bias_h: Array | None = None
    reset_after: bool = True

    def __init__(
        self,
        inputs: int,
        size: int,
        *,
        reset_after: bool = True,
        bias: bool = True,
        rng: Rng = None,
        dtype: object = "float32",
    ) -> None:
        inputs, size = whole("inputs", inputs), whole("size", size)
        draw = self._draw(inputs, size, bias, rng, dtype, size)
        self.bias_h = draw(3 * size) if bias else None
        self.reset_after = reset_after

    def validate(self) -> None:
        super().validate()
        if self.bias_h is not None and array_shape(self, "bias_h") != self.weight_h.shape[1:]:
            raise ShapeError(f"bias_h of GRUCell is (3 * size,), not {self.bias_h.shape}")

    def through(
        self, x: Array, states: Sequence[Array | None], lengths: Array | None, reverse: bool
    ) -> tuple[Array, ...]:
        return kernels.gru(  # type: ignore[no-any-return]
            self._inputs(x), self.weight_h, self.bias_h, *states, lengths,
            reset_after=self.reset_after, reverse=reverse,
        )  # fmt: skip

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield cls(3, 4, rng=0), (5, 3)
        yield cls(3, 2, reset_after=False, rng=1), [(5, 3), (5, 2)]


class LSTMCell(_Cell):
    """c' = f c + i g, h' = o tanh(c')   [Hochreiter & Schmidhuber 1997; Gers et al. 2000]

    i, f, o = sigmoid(x @ weight_x + bias + h @ weight_h), each of its columns, and g = tanh of its.
    With a projection (size, projected), h' = (o tanh(c')) @ projection   [Sak et al. 2014].

    x (rows, inputs), h (rows, size or projected), c (rows, size), zeros if they are left out,
    -> h', c'. The columns of weight_x (inputs, 4 * size), weight_h (size or projected, 4 * size)
    and bias (4 * size,) are those of i, f, o, g.
    """

    gates = 4

    projection: Array | None = None

    def __init__(
        self,
        inputs: int,
        size: int,
        projected: int | None = None,
        *,
        bias: bool = True,
        rng: Rng = None,
        dtype: object = "float32",
    ) -> None:
        inputs, size = whole("inputs", inputs), whole("size", size)
        states = size if projected is None else whole("projected", projected)
        draw = self._draw(inputs, size, bias, rng, dtype, states)
        self.projection = None if projected is None else draw(size, states)

    def validate(self) -> None:
        if self.projection is not None:
            shape = array_shape(self, "projection")
            size, projected = array_shape(self, "weight_h")[::-1]
            if shape != (size // 4, projected):
                raise ShapeError(
                    f"projection of LSTMCell is (size, projected), by weight_h (projected, 4 * "
                    f"size) {(size // 4, projected)}, but got {shape}"
                )
        super().validate()

    def _state_size(self, size: int) -> int:
        return size if self.projection is None else int(self.projection.shape[1])

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.weight_h.shape[0], self.weight_h.shape[1] // 4

    def __call__(
        self, x: Array, h: Array | None = None, c: Array | None = None
    ) -> tuple[Array, ...]:
        return self._once(x, h, c)

    def through(
        self, x: Array, states: Sequence[Array | None], lengths: Array | None, reverse: bool
    ) -> tuple[Array, ...]:
        return kernels.lstm(  # type: ignore[no-any-return]
            self._inputs(x), self.weight_h, self.projection, *states, lengths, reverse=reverse
        )

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield cls(3, 4, rng=0), (5, 3)
        yield cls(3, 4, 2, bias=False, rng=1), [(5, 3), (5, 2), (5, 4)]


class _Stack(Layer):
    """Cells through time, in layers, each in one direction or in both."""

    cells: tuple[Layer, ...]
    bidirectional: bool = False
    returns: str = "sequence"

    def __call__(self, x: Array, lengths: Array | None = None, h: Array | None = None) -> Any:
        return self._through(x, lengths, h)

    def _assign(
        self, make: Any, inputs: int, layers: int, bidirectional: bool, returns: str, rng: Rng
    ) -> None:
        """Cells for each layer: those behind the first take what the one before answers."""
        rng, cells = generator(rng), []
        directions = 1 + bool(bidirectional)
        for _ in range(whole("layers", layers)):
            cells += [make(inputs, rng) for _ in range(directions)]
            inputs = directions * cells[-1].sizes[0]
        self.cells, self.bidirectional, self.returns = tuple(cells), bidirectional, returns

    def validate(self) -> None:
        if self.returns not in RETURNS:
            raise OptionError(f"returns is one of {', '.join(RETURNS)}, not {self.returns!r:.60}")
        if not self.cells or not all(isinstance(cell, _Cell) for cell in self.cells):
            raise OptionError(f"cells of {type(self).__name__} are cells, at least one")
        if len(self.cells) % (1 + self.bidirectional):
            raise OptionError(f"{len(self.cells)} cells do not make layers of two directions")
        if len({cell.sizes for cell in self.cells}) > 1:  # type: ignore[attr-defined]
            raise ShapeError(f"the cells of {type(self).__name__} have states of one size")

    def _through(self, x: Array, lengths: Array | None, *initial: Array | None) -> Any:
        """The outputs of the last layer, and the last states of every layer and direction."""
        if x.ndim != 3 or counts_rows(x.shape[1]):
            raise ValueError("x is (rows, time, inputs)")
        xp, directions = xp_of(x), 1 + self.bidirectional
        last: list[Sequence[Array]] = []
        for first in range(0, len(self.cells), directions):
            outputs = []
            for i in range(first, first + directions):
                cell: Any = self.cells[i]
                states = [None if state is None else state[:, i] for state in initial]
                y, *after = cell.through(x, states, lengths, i > first)
                outputs.append(y)
                last.append(after)
            x = outputs[0] if directions == 1 else xp.concatenate(outputs, axis=-1)
        if self.returns == "sequence":
            return x
        if self.returns == "last":
            ends = [h for h, *_ in last[-directions:]]
            return ends[0] if directions == 1 else xp.concatenate(ends, axis=-1)
        return (x, *(xp.stack(list(states), axis=1) for states in zip(*last, strict=True)))

    def __repr__(self) -> str:
        cell: Any = self.cells[0]
        layers = len(self.cells) // (1 + self.bidirectional)
        both = ", bidirectional=True" if self.bidirectional else ""
        more = f", layers={layers}" if layers > 1 else ""
        inputs = cell.weight_x.shape[0]
        return f"{type(self).__name__}({inputs}, {cell.sizes[-1]}{more}{both}, {self.returns!r})"


_STACK = """

    x (rows, time, inputs) -> y (rows, time, size), twice the size if `bidirectional`: the second
    half goes through time from its end. Each of the `layers` takes what the one before answers.

    `lengths` (rows,), whole numbers, are the steps of each row, for rows of unequal length: beyond
    them outputs are zero, and states are as they were at the end. Initial states are (rows,
    layers * directions, size), layer by layer, forwards before backwards; zeros if left out.

    `returns` is "sequence" for y; "last" for the last layer's states at the end of its way through
    time (rows, size), of both directions side by side; "states" for y and the last states of all
    layers and directions, shaped as the initial ones.
"""


class RNN(_Stack):
    __doc__ = (
        "h_t = activation(x_t W + b + h_(t-1) V), step by step through time   [Elman 1990]" + _STACK
    )
    takes = ("float", "int", "float")

    def __init__(
        self,
        inputs: int,
        size: int,
        activation: kernels.ActivationName = "tanh",
        *,
        layers: int = 1,
        bidirectional: bool = False,
        returns: str = "sequence",
        bias: bool = True,
        rng: Rng = None,
        dtype: object = "float32",
    ) -> None:
        def cell(inputs: int, rng: Rng) -> RNNCell:
            return RNNCell(inputs, size, activation, bias=bias, rng=rng, dtype=dtype)

        self._assign(cell, inputs, layers, bidirectional, returns, rng)

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield cls(3, 4, rng=0), (4, 3, 3)
        both = cls(2, 3, "relu", layers=2, bidirectional=True, returns="last", rng=1)
        yield both, [(4, 3, 2), (4,)]


class GRU(_Stack):
    __doc__ = (
        "h_t = z h_(t-1) + (1 - z) n, step by step through time   [Cho et al. 2014; see GRUCell]"
        + _STACK
    )
    takes = ("float", "int", "float")

    def __init__(
        self,
        inputs: int,
        size: int,
        *,
        layers: int = 1,
        bidirectional: bool = False,
        returns: str = "sequence",
        reset_after: bool = True,
        bias: bool = True,
        rng: Rng = None,
        dtype: object = "float32",
    ) -> None:
        def cell(inputs: int, rng: Rng) -> GRUCell:
            return GRUCell(inputs, size, reset_after=reset_after, bias=bias, rng=rng, dtype=dtype)

        self._assign(cell, inputs, layers, bidirectional, returns, rng)

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield cls(3, 4, layers=2, rng=0), (4, 3, 3)
        both = cls(2, 3, bidirectional=True, returns="states", reset_after=False, rng=1)
        yield both, [(4, 3, 2), (4,), (4, 2, 3)]


class LSTM(_Stack):
    __doc__ = (
        "c_t = f c_(t-1) + i g, h_t = o tanh(c_t), step by step through time   [see LSTMCell]"
        + _STACK
    )
    takes = ("float", "int", "float", "float")

    def __init__(
        self,
        inputs: int,
        size: int,
        projected: int | None = None,
        *,
        layers: int = 1,
        bidirectional: bool = False,
        returns: str = "sequence",
        bias: bool = True,
        rng: Rng = None,
        dtype: object = "float32",
    ) -> None:
        def cell(inputs: int, rng: Rng) -> LSTMCell:
            return LSTMCell(inputs, size, projected, bias=bias, rng=rng, dtype=dtype)

        self._assign(cell, inputs, layers, bidirectional, returns, rng)

    def __call__(
        self, x: Array, lengths: Array | None = None, h: Array | None = None, c: Array | None = None
    ) -> Any:
        return self._through(x, lengths, h, c)

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield cls(3, 4, rng=0), (4, 3, 3)
        both = cls(2, 4, 3, layers=2, bidirectional=True, returns="states", rng=1)
        yield both, [(4, 3, 2), (4,), (4, 4, 3), (4, 4, 4)]
