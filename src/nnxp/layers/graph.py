"""An ONNX graph as a layer: nodes, each with an operator's name, its inputs and its outputs."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from math import prod
from typing import Any, TypeAlias

import numpy as np

from nnxp._arrays import Array, Shape, dtype_of, is_array, is_floating, xp_of
from nnxp._errors import (
    ConversionError,
    DtypeMismatch,
    NnxpError,
    OptionError,
    ShapeError,
    UnsupportedFunction,
)
from nnxp.backend import home_of
from nnxp.layers import (  # noqa: F401  (these make their operators known)
    contrib_operators,
    item_operators,
    quantized_operators,
    sequence_operators,
    window_operators,
)
from nnxp.layers._layer import Example, Layer, shape_and_dtype
from nnxp.layers.operators import OPERATORS, Items, Operator, beside, home, numbers, row_by_row
from nnxp.program import traced
from nnxp.program.mixing import mixing
from nnxp.program.program import Program
from nnxp.program.traced import Untraceable, shape_text

DTYPES = frozenset(
    """bool int8 int16 int32 int64 uint8 uint16 uint32 uint64
    float16 float32 float64 bfloat16""".split()
)
"""The types that a graph computes with."""
DTYPE_ATTRIBUTES = frozenset(["to", "dtype", "output_dtype"])
DEEPEST = 20
"""Graphs within graphs, as the branches of `If`."""
BODIES = {
    "If": ("then_branch", "else_branch"),
    "Loop": ("body",),
    "Scan": ("body",),
    "SequenceMap": ("body",),
}
"""Nodes that hold graphs, by the names of their attributes."""


class Weight(Layer):
    """An array of a graph that can be trained: a field that holds many arrays holds these."""

    value: Array

    def __init__(self, value: Array) -> None:
        self.value = value

    def validate(self) -> None:
        if not is_array(self.value):
            raise OptionError(f"a weight is an array, not {self.value!r:.60}")

    def __call__(self, x: Array) -> Array:
        return x * self.value


class Graph(Layer):
    """The nodes of an ONNX graph, one after the other; `nnxp.load_onnx` makes it.

    `y = graph(*inputs)` takes arrays in the order of the graph's inputs and answers an array, or a
    tuple where the graph has several outputs. Axis 0 of an input is mostly rows, but need not be: a
    graph whose rows are found goes through an engine, others run as they are.

    Fields: `nodes` (dicts with op, name, inputs, outputs, attributes), `inputs` (dicts with name,
    dtype, shape; None for a size that is free), `outputs` (names), `constants` (arrays that are no
    parameters, packed), `weights` and their `names`, and `kind`, the type of floats in the file.
    A file may hold all of them, so the machine that predicts needs no onnx.
    """

    nodes: tuple[dict[str, Any], ...]
    inputs: tuple[dict[str, Any], ...]
    outputs: tuple[str, ...]
    constants: dict[str, Any]
    names: tuple[str, ...]
    weights: tuple[Weight, ...]
    kind: str

    by_rows = False  # what fits is asked here, not of a program

    def __init__(self, *_: Any, **__: Any) -> None:
        raise OptionError(
            'a Graph is made by nnxp.load_onnx("model.onnx"), and comes back by nnxp.load(...)'
        )

    @cached_property
    def takes(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(str(self._retyped(entry["dtype"])) for entry in self.inputs)

    @property
    def input_names(self) -> tuple[str, ...]:
        """The names of the inputs, in their order."""
        return tuple(entry["name"] for entry in self.inputs)

    @property
    def most_inputs(self) -> int:
        return len(self.inputs)

    @property
    def required_inputs(self) -> int:
        """How many inputs must be given: all."""
        return len(self.inputs)

    def program(self, *outlines: Any, whole: bool = False) -> Program:
        """The graph written out, for inputs of these shapes, in the types that it says."""
        kinds = self.input_dtypes(len(outlines))
        pairs: list[Any] = []
        for outline, kind in zip(outlines, kinds, strict=True):
            shape, dtype = shape_and_dtype(outline)
            pairs.append(outline if is_array(outline) else (shape, dtype or kind))
        shapes = [pair.shape if is_array(pair) else pair[0] for pair in pairs[:1]]
        if whole and self.fixed_rows not in (None, *(shape[0] for shape in shapes if shape)):
            raise Untraceable(f"the graph is made for {self.fixed_rows} rows at a time")
        return super().program(*pairs, whole=whole)

    def input_dtypes(self, count: int) -> list[Any]:
        self._check_count(count)
        return [self._retyped(entry["dtype"]) for entry in self.inputs]

    def _check_count(self, count: int) -> None:
        if count != len(self.inputs):
            names = ", ".join(self.input_names)
            raise ShapeError(f"the graph takes {len(self.inputs)} inputs ({names}), not {count}")

    def row_shape(self) -> Shape:
        """The shape of a row of the only input, if the graph says it."""
        shapes = [entry["shape"] for entry in self.inputs]
        if len(shapes) != 1 or not shapes[0] or None in shapes[0][1:]:
            raise OptionError(
                f"{self} does not tell the shape of its rows: name it, as in (1, 784)"
            )
        return tuple(shapes[0][1:])

    @property
    def fixed_rows(self) -> int | None:
        """The number of rows that the graph was made for, if it was made for one number only."""
        first = {entry["shape"][0] if entry["shape"] else None for entry in self.inputs}
        size = first.pop() if len(first) == 1 else None
        return size or None

    def validate(self) -> None:
        if len(self.names) != len(self.weights) or len(set(self.names)) != len(self.names):
            raise OptionError("a Graph has one name for each weight")
        if self.kind not in DTYPES or self.kind[0] not in "bf" or self.kind == "bool":
            raise OptionError(f"kind of a Graph is a type of floats, not {self.kind!r:.40}")
        for entry in self.inputs:
            _check_input(entry)
        for constant in self.constants.values():
            _packed(constant)
        if not self.outputs:
            raise OptionError("a Graph has no outputs")
        known = {*self.input_names, *self.constants, *self.names}
        _check_nodes(self.nodes, self.outputs, known)

    @cached_property
    def _compiled(self) -> _Nodes:
        return _Nodes.of({"nodes": self.nodes, "outputs": self.outputs}, self._retyped)

    @cached_property
    def _numbers(self) -> dict[str, Any]:
        """The constants, in the type of the model where they were in the type of the file."""
        arrays = {}
        for name, constant in self.constants.items():
            array = unpacked(constant)
            arrays[name] = array.astype(self._retyped(str(array.dtype)), copy=False)
        return arrays

    def _retyped(self, dtype: str) -> Any:
        """A type of the file, as it is in this model: `astype` changes that of the floats."""
        return self.dtype if dtype == self.kind and self.dtype is not None else dtype_of(dtype)

    def __call__(self, *inputs: Array) -> Any:
        self._check_count(len(inputs))
        inputs = tuple(self._fitting(i, x) for i, x in enumerate(inputs))
        if any(type(x) is traced.ndarray for x in inputs):
            try:
                outputs = self._traced(inputs)
            except (Untraceable, UnsupportedFunction) as error:
                raise ShapeError(
                    f"the graph is not the same for any number of rows: {error}; call it as it is"
                ) from error
        elif self.fixed_rows and inputs and len(inputs[0]) != self.fixed_rows:
            program = self.program(*((x.shape, x.dtype) for x in inputs))
            outputs = program.run(inputs)
        else:
            outputs = self._run(inputs)
        return tuple(outputs) if len(outputs) > 1 else outputs[0]

    def _fitting(self, i: int, x: Array) -> Array:
        """Input i, if it is of the type and has as many axes as the graph says."""
        entry = self.inputs[i]
        shape, dtype = entry["shape"], self._retyped(entry["dtype"])
        who = f"input {entry['name']}"
        if shape is not None:
            fits = len(shape) == x.ndim and all(
                n is None or n == m or (axis == 0 and self.fixed_rows)
                for axis, (n, m) in enumerate(zip(shape, x.shape, strict=True))
            )
            if not fits:
                wanted = ", ".join("any" if n is None else str(n) for n in shape)
                raise ShapeError(f"{who} is ({wanted}), not {shape_text(x.shape)}")
        free = self.dtype is None and entry["dtype"] == self.kind  # without weights, of any width
        if x.dtype == dtype or (free and is_floating(x.dtype)):
            return x
        if x.dtype.kind in "iu" and dtype.kind in "iu":
            return x.astype(dtype)
        raise DtypeMismatch(
            f"{who} is {dtype}, not {x.dtype}; x.astype({str(dtype)!r}) converts it"
        )

    def _run(self, inputs: Sequence[Array]) -> list[Array]:
        """The outputs, node by node."""
        values = {
            **self._numbers,
            **dict(zip(self.names, (w.value for w in self.weights), strict=True)),
        }
        values.update(zip(self.input_names, inputs, strict=True))
        written = any(isinstance(x, traced.ndarray) for x in inputs)
        most = MOST_WRITTEN if written else MOST_STEPS
        with self._at_home(), _counted_steps(most), np.errstate(all="ignore"):
            self._compiled.run(values)  # infinity and NaN are answers here
            like = next((x for x in inputs if not isinstance(x, np.ndarray)), None)
            results = [values[name] for name in self.outputs]
            return results if like is None else [beside(y, like) for y in results]

    @contextmanager
    def _at_home(self) -> Iterator[None]:
        """A block in which constants go to where the weights are, if they must."""
        held = self.weights[0].value if self.weights else None
        held = held.value.numbers if isinstance(held, traced.ndarray) else held
        token = home.set(np if held is None else xp_of(held))
        place = self.place if held is not None else None
        try:
            with home_of(place).current() if place not in (None, "cpu") else nullcontext():
                yield
        finally:
            home.reset(token)

    # rows

    def _traced(self, inputs: tuple[Any, ...]) -> list[Any]:
        """The outputs for arrays without numbers, whose axis 0 counts rows.

        A graph that was made for one row is written out for any number of them: what it says of
        axis 0, it says of each row. If that does not do, rows go through it in groups, as Python.
        """
        tape, fixed = traced.current_tape(), self.fixed_rows
        if not all(x.shape and traced.counts_rows(x.shape[0]) for x in inputs):
            return self._run(inputs)
        mark = len(tape.steps)
        token = row_by_row.set(inputs[0].shape[0] if fixed == 1 else 0)
        try:
            outputs = self._run(inputs)
            if fixed is None:
                return outputs
            row_for_row = all(y.shape and y.shape[0] == inputs[0].shape[0] for y in outputs)
            if row_for_row and not mixing(Program((), (), tuple(tape.steps[mark:]))):
                return outputs
        except (NnxpError, ValueError, TypeError, IndexError):
            if fixed is None:
                raise
        finally:
            row_by_row.reset(token)
        del tape.steps[mark:]
        return self._in_groups(inputs, fixed)

    def _in_groups(self, inputs: tuple[Any, ...], size: int) -> list[Any]:
        """One step that sends rows through the graph in groups of the size it was made for."""
        tape = traced.current_tape()
        _, original = tape.layers.get(id(self), ("", self))
        rows = inputs[0].shape[0]
        with traced.writing(traced.Tape()):
            group = self._run(
                [traced.ndarray(traced.Value((size, *x.shape[1:]), x.dtype)) for x in inputs]
            )
        outlines = []
        for y in group:
            if not y.shape or y.shape[0] % size:
                raise Untraceable(
                    f"the graph answers {y.shape} for {size} rows: not a row for a row"
                )
            outlines.append(((y.shape[0] // size * rows, *y.shape[1:]), y.dtype))
        reason = f"the graph is made for {size} rows at a time"
        outputs = traced.opaque(Groups(original, size), inputs, outlines, reason)
        return list(outputs) if isinstance(outputs, tuple) else [outputs]

    def __repr__(self) -> str:
        counts = Counter(node["op"] for node in self.nodes).most_common(3)
        most = ", ".join(f"{n} {name}" for name, n in counts)
        ends = f"{', '.join(self.input_names)} -> {', '.join(self.outputs)}"
        return f"Graph({ends}; {len(self.nodes)} nodes: {most})"

    @classmethod
    def examples(cls) -> Iterator[Example]:
        rng = np.random.default_rng(0)
        weight, bias = (rng.normal(size=size).astype("float32") for size in ((6, 4), 4))
        yield cls.of(
            nodes=(
                node("Shape", ["x"], ["shape"]),
                node("Gather", ["shape", "zero"], ["rows"]),
                node("Concat", ["rows", "rest"], ["flat"], axis=0),
                node("Reshape", ["x", "flat"], ["vectors"]),
                node("Gemm", ["vectors", "weight", "bias"], ["sums"]),
                node("Softmax", ["sums"], ["y"]),
            ),
            inputs=({"name": "x", "dtype": "float32", "shape": (None, 2, 3)},),
            outputs=("y",),
            constants={"zero": packed(np.array([0])), "rest": packed(np.array([-1]))},
            names=("weight", "bias"),
            weights=(Weight(weight), Weight(bias)),
            kind="float32",
        ), (5, 2, 3)  # fmt: skip


def node(
    op: str, inputs: Iterable[str], outputs: Iterable[str], **attributes: Any
) -> dict[str, Any]:
    """A node of a Graph."""
    return {"op": op, "name": "", "inputs": tuple(inputs), "outputs": tuple(outputs),
            "attributes": attributes}  # fmt: skip


class Groups:
    """Rows through a graph that takes so many at a time; its last row fills up the last group."""

    def __init__(self, graph: Graph, size: int) -> None:
        self.graph, self.size = graph, size

    def __call__(self, *inputs: Array) -> Any:
        rows, parts = len(inputs[0]), []
        for start in range(0, max(rows, 1), self.size):
            group = [x[start : start + self.size] for x in inputs]
            if missing := self.size - len(group[0]):
                group = [self._filled(x, missing) for x in group]
            parts.append(self.graph._run(group))
        joined = []
        for pieces in zip(*parts, strict=True):
            per_row = pieces[0].shape[0] // self.size
            joined.append(xp_of(pieces[0]).concatenate(list(pieces), axis=0)[: rows * per_row])
        return tuple(joined) if len(joined) > 1 else joined[0]

    @staticmethod
    def _filled(x: Array, missing: int) -> Array:
        xp = xp_of(x)
        last = x[-1:] if len(x) else xp.zeros((1, *x.shape[1:]), dtype=x.dtype)
        return xp.concatenate([x, *[last] * missing], axis=0)

    def __repr__(self) -> str:
        return f"{self.graph!r} on {self.size} rows at a time"


# Running


@dataclass(frozen=True)
class _Node:
    operator: Operator | None
    op: str
    label: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    bodies: tuple[_Nodes, ...]
    ended: tuple[str, ...]

    def run(self, values: dict[str, Any]) -> None:
        inputs = [values[name] if name else None for name in self.inputs]
        if self.bodies:
            run = {"If": _branch, "Loop": _loop, "Scan": _scan, "SequenceMap": _map}[self.op]
            outputs = run(self, [partial(body, values) for body in self.bodies], inputs)
        else:
            assert self.operator is not None
            outputs = self.operator(inputs, self.attributes, self.op, len(self.outputs))
        values.update((name, y) for name, y in zip(self.outputs, outputs, strict=False) if name)


Body: TypeAlias = Callable[..., tuple[Any, ...]]
"""A graph within the graph, as a function of its inputs."""


def _branch(node: _Node, branches: list[Body], inputs: list[Any]) -> tuple[Any, ...]:
    """If: one of two graphs."""
    (condition,) = inputs
    return branches[0 if bool(numbers(condition).all()) else 1]()


def _loop(node: _Node, bodies: list[Body], inputs: list[Any]) -> tuple[Any, ...]:
    """Loop: the body is run on the iteration's number and on the state that the last one left.

    At most so many times, and while its condition holds. Its other outputs are stacked.
    """
    (body,), (most, on, *state) = bodies, inputs
    count, step, stacks = len(state), 0, []
    limit = None if most is None else int(numbers(most).item())
    while (limit is None or step < limit) and (on is None or bool(numbers(on).all())):
        _count_step()
        on, *answers = body(np.array(step), np.array(True), *state)
        state = answers[:count]
        stacks.append(answers[count:])
        step += 1
    return (*state, *_stacked(node, stacks, len(node.outputs) - count))


def _scan(node: _Node, bodies: list[Body], inputs: list[Any]) -> tuple[Any, ...]:
    """Scan: the body is run on slices of arrays, and on the state that the last run left."""
    (body,), options = bodies, node.attributes
    count = len(inputs) - options["num_scan_inputs"]
    state, arrays = inputs[:count], inputs[count:]
    axes = options.get("scan_input_axes") or [0] * len(arrays)
    backward = options.get("scan_input_directions") or [0] * len(arrays)
    arrays = [xp_of(x).moveaxis(x, axis, 0) for x, axis in zip(arrays, axes, strict=True)]
    lengths = {len(x) for x in arrays}
    if len(lengths) != 1:
        raise ShapeError(f"it goes along axes of {sorted(lengths)}, not of one length")
    (length,) = lengths
    sequence_operators.refuse_rows(length)
    stacks = []
    for step in range(length):
        _count_step()
        slices = [
            x[length - 1 - step if b else step] for x, b in zip(arrays, backward, strict=True)
        ]
        answers = body(*state, *slices)
        state = list(answers[:count])
        stacks.append(answers[count:])
    results = _stacked(node, stacks, len(node.outputs) - count)
    axes = options.get("scan_output_axes") or [0] * len(results)
    backward = options.get("scan_output_directions") or [0] * len(results)
    results = [xp_of(y).flip(y, 0) if b else y for y, b in zip(results, backward, strict=True)]
    moved = [xp_of(y).moveaxis(y, 0, axis) for y, axis in zip(results, axes, strict=True)]
    return (*state, *moved)


def _map(node: _Node, bodies: list[Body], inputs: list[Any]) -> tuple[Any, ...]:
    """SequenceMap: the body is run on each item of a sequence, and on arrays or other items."""
    (body,), (items, *others) = bodies, inputs
    results = []
    for i, x in enumerate(items):
        _count_step()
        arguments = (other[i] if isinstance(other, Items) else other for other in others)
        results.append(body(x, *arguments))
    if not results:
        return (Items(),) * len(node.outputs)
    return tuple(map(Items, zip(*results, strict=True)))


def _stacked(node: _Node, steps: list[Any], count: int) -> list[Any]:
    """What so many outputs are in every step, each along a new axis 0."""
    if count and not steps:
        raise ShapeError("no step is made, so the shapes of what is stacked are not known")
    like = next((x for x in chain(*steps) if not isinstance(x, np.ndarray)), None)
    columns = list(zip(*steps, strict=True))[:count]
    if like is not None:
        columns = [tuple(beside(x, like) for x in column) for column in columns]
    return [xp_of(column[0]).stack(list(column)) for column in columns]


@contextmanager
def _counted_steps(most: int) -> Iterator[None]:
    token = _steps_left.set([most])
    try:
        yield
    finally:
        _steps_left.reset(token)


def _count_step() -> None:
    """Refuse to go on where bodies of loops have run too often in one call."""
    left = _steps_left.get()
    left[0] -= 1
    if left[0] < 0:
        raise ShapeError(
            f"loops make more than {MOST_STEPS:,} steps, or {MOST_WRITTEN:,} that are written out"
        )


MOST_STEPS, MOST_WRITTEN = 1 << 17, 1 << 12
"""Steps of the loops in one call, and of those that are written out."""
_steps_left: ContextVar[list[int]] = ContextVar("nnxp_steps_left")


@dataclass(frozen=True)
class _Nodes:
    nodes: tuple[_Node, ...]
    outputs: tuple[str, ...]
    inputs: tuple[str, ...] = ()

    @classmethod
    def of(cls, graph: Mapping[str, Any], retyped: Any) -> _Nodes:
        """The nodes as they are run, each with the names of values whose last use it is."""
        wanted, compiled = set(graph["outputs"]), []
        for node in reversed(graph["nodes"]):
            uses = set(_uses(node))
            ended = tuple({*uses, *node["outputs"]} - wanted)
            wanted |= uses
            attributes = {
                name: _attribute(name, v, retyped) for name, v in node["attributes"].items()
            }
            names = BODIES.get(node["op"], ())
            bodies = tuple(cls.of(attributes.pop(name), retyped) for name in names)
            label = f"{node['op']} {node['name'] or node['outputs'][0]!r}"
            formula, short = OPERATORS.get(node["op"]), node["op"].rpartition(".")[2]
            ends = node["inputs"], node["outputs"]
            compiled.append(_Node(formula, short, label, *ends, attributes, bodies, ended))
        return cls(
            tuple(reversed(compiled)), tuple(graph["outputs"]), tuple(graph.get("inputs", ()))
        )

    def __call__(self, values: Mapping[str, Any], *inputs: Any) -> tuple[Any, ...]:
        """The outputs of a graph that is within another, which has these values."""
        inner = dict(values)
        inner.update(zip(self.inputs, inputs, strict=True))
        self.run(inner, keep=True)
        return tuple(inner[name] for name in self.outputs)

    def run(self, values: dict[str, Any], keep: bool = False) -> None:
        for node in self.nodes:
            try:
                node.run(values)
            except (
                Untraceable,
                UnsupportedFunction,
                OptionError,
                ShapeError,
                DtypeMismatch,
            ) as error:
                raise type(error)(f"{node.label}: {error}") from error
            except (ValueError, IndexError, TypeError, ArithmeticError, AttributeError) as error:
                if isinstance(error, NnxpError):
                    raise
                shapes = [shape_text(getattr(values.get(n), "shape", ())) for n in node.inputs if n]
                raise ShapeError(f"{node.label} of {', '.join(shapes)}: {error}") from error
            for name in () if keep else node.ended:
                values.pop(name, None)


def _uses(node: Mapping[str, Any]) -> Iterator[str]:
    """The names that a node looks at, those within its branches included."""
    yield from (name for name in node["inputs"] if name)
    for value in node["attributes"].values():
        if isinstance(value, dict) and "nodes" in value:
            for inner in value["nodes"]:
                yield from _uses(inner)
            yield from value["outputs"]


def known_beforehand(nodes: Sequence[Mapping[str, Any]]) -> set[str]:
    """The names of values that decide a shape or an axis, and of what those are made of."""
    names: set[str] = set()
    for node in reversed(nodes):
        for value in node["attributes"].values():
            if isinstance(value, dict) and "nodes" in value:
                names |= known_beforehand(value["nodes"])
        operator, inputs = OPERATORS.get(node["op"]), node["inputs"]
        if operator is not None:
            names |= {inputs[i] for i in operator.numbers if i < len(inputs)}
        if node["op"] not in ("Shape", "Size") and not names.isdisjoint(node["outputs"]):
            names.update(inputs)
    return names - {""}


# Constants and attributes, as a file holds them


def packed(array: Any) -> dict[str, Any]:
    """An array that is no parameter, as plain values."""
    array = np.asarray(array)
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"dtype": str(array.dtype), "shape": tuple(array.shape), "data": data}


def unpacked(constant: Mapping[str, Any]) -> Any:
    """The array that `packed` put away."""
    data = base64.b64decode(constant["data"])
    return np.frombuffer(data, dtype_of(constant["dtype"])).reshape(constant["shape"])


def _packed(constant: Any) -> None:
    """Refuse what `packed` cannot have made."""
    if not (isinstance(constant, dict) and constant.keys() == {"dtype", "shape", "data"}):
        raise OptionError(f"a constant is dtype, shape and data, not {constant!r:.60}")
    shape, dtype, data = constant["shape"], constant["dtype"], constant["data"]
    if dtype not in DTYPES or not isinstance(data, str) or not isinstance(shape, tuple):
        raise OptionError(f"a constant of type {dtype!r:.40} is not known")
    if not all(type(n) is int and n >= 0 for n in shape):
        raise OptionError(f"a constant has the shape {shape!r:.60}")
    size = prod(shape) * dtype_of(dtype).itemsize
    if len(data) != -(-size // 3) * 4:
        raise OptionError(f"a constant of {size} bytes has {len(data)} characters")
    try:
        length = len(base64.b64decode(data, validate=True))
    except ValueError as error:
        raise OptionError(f"a constant's data: {error}") from None
    if length != size:
        raise OptionError(f"a constant of {size} bytes has {length}")


def _attribute(name: str, value: Any, retyped: Any) -> Any:
    if name in DTYPE_ATTRIBUTES and isinstance(value, str):
        return str(retyped(value))
    if isinstance(value, dict) and value.keys() == {"dtype", "shape", "data"}:
        array = unpacked(value)
        return array.astype(retyped(str(array.dtype)), copy=False)
    if isinstance(value, dict) and value.keys() == {"float"}:
        return float(value["float"])
    return value


# What a graph must be


def _check_input(entry: Any) -> None:
    if not (isinstance(entry, dict) and entry.keys() == {"name", "dtype", "shape"}):
        raise OptionError(f"an input is name, dtype and shape, not {entry!r:.60}")
    sizes = entry["shape"]
    sound = sizes is None or (
        isinstance(sizes, tuple) and all(n is None or (type(n) is int and n >= 0) for n in sizes)
    )
    if not isinstance(entry["name"], str) or entry["dtype"] not in DTYPES or not sound:
        raise OptionError(f"no input of a graph: {entry!r:.80}")


def _check_nodes(nodes: Any, outputs: Any, known: set[str], depth: int = 0) -> None:
    """Refuse nodes that are not known, do not fit, or take what no node before them has made."""
    if depth > DEEPEST:
        raise OptionError(f"graphs within graphs, more than {DEEPEST} deep")
    _check_known(nodes)
    for node in nodes:
        label = f"{node['op']} {node['name'] or ', '.join(node['outputs'])!r}"
        missing = [name for name in node["inputs"] if name and name not in known]
        if missing:
            raise OptionError(f"{label} takes {missing[0]!r}, which nothing before it makes")
        attributes = node["attributes"]
        if node["op"] in BODIES:
            _check_bodies(node, label)
            for name in BODIES[node["op"]]:
                part = attributes[name]
                inner = {*known, *part.get("inputs", ())}
                _check_nodes(part["nodes"], part["outputs"], inner, depth + 1)
        else:
            OPERATORS[node["op"]].check(label, node["inputs"], attributes)
            for name, value in attributes.items():
                if name in DTYPE_ATTRIBUTES and value not in DTYPES:
                    raise OptionError(f"{label}: the type {value!r:.40} is not known")
                if isinstance(value, dict):
                    if value.keys() == {"float"} and value["float"] in ("inf", "-inf", "nan"):
                        continue
                    _packed(value)
        twice = [name for name in node["outputs"] if name in known]
        if twice:
            raise OptionError(f"{label} makes {twice[0]!r}, which is there already")
        known.update(name for name in node["outputs"] if name)
    for name in outputs:
        if name not in known:
            raise OptionError(f"the output {name!r} is made by no node")


def _check_bodies(node: Mapping[str, Any], label: str) -> None:
    """Refuse graphs within the graph that do not take or answer what their node does."""
    op, names, attributes = node["op"], BODIES[node["op"]], node["attributes"]
    options = set(attributes) - set(names)
    if not all(_is_graph(attributes.get(name)) for name in names) or options - _OPTIONS[op]:
        raise OptionError(f"{label} has {', '.join(names)} and no other attributes that are known")
    inputs, outputs = len(node["inputs"]), len(node["outputs"])
    for name in names:
        takes = len(attributes[name].get("inputs", ()))
        answers = len(attributes[name]["outputs"]) - (op == "Loop")
        fits = answers >= outputs if op == "Loop" else answers == outputs
        wanted = 0 if op == "If" else inputs
        if (
            not fits
            or takes != wanted
            or (op == "If" and inputs != 1)
            or (op == "Loop" and inputs < 2)
        ):
            raise OptionError(
                f"{label}: {name} takes {takes} and answers {answers}, not {wanted} and {outputs}"
            )
    if op == "Scan":
        scanned = attributes.get("num_scan_inputs")
        if type(scanned) is not int or not 0 < scanned <= inputs:
            raise OptionError(f"{label} scans {scanned!r:.40} of {inputs} inputs")
        for name in _OPTIONS[op] - {"num_scan_inputs"} & options:
            if not all(type(n) is int for n in attributes[name]):
                raise OptionError(f"{label}: {name} are whole numbers")


_OPTIONS = {
    "If": frozenset[str](),
    "Loop": frozenset[str](),
    "SequenceMap": frozenset[str](),
    "Scan": frozenset(
        """num_scan_inputs scan_input_axes scan_input_directions scan_output_axes
        scan_output_directions""".split()
    ),
}
"""What nodes that hold graphs have besides."""


def _is_graph(graph: Any) -> bool:
    return (
        isinstance(graph, dict)
        and graph.keys() - {"inputs"} == {"nodes", "outputs"}
        and all(isinstance(part, tuple) for part in graph.values())
        and all(isinstance(name, str) for name in (*graph["outputs"], *graph.get("inputs", ())))
    )


_NODE_KEYS = frozenset("op name inputs outputs attributes".split())


def _check_known(nodes: Any) -> None:
    """Refuse operators that are not known, all of them at once."""
    for node in nodes:
        sound = isinstance(node, dict) and node.keys() == _NODE_KEYS
        sound = sound and isinstance(node["op"], str) and isinstance(node["name"], str)
        sound = sound and isinstance(node["attributes"], dict) and all(
            isinstance(node[part], tuple) and all(isinstance(name, str) for name in node[part])
            for part in ("inputs", "outputs")
        )  # fmt: skip
        if not sound or not node["outputs"]:
            raise OptionError(f"no node of a graph: {node!r:.80}")
    unknown = [node for node in nodes if node["op"] not in {*OPERATORS, *BODIES}]
    if unknown:
        raise ConversionError(unknown_operators(unknown))


def unknown_operators(nodes: Sequence[Mapping[str, Any]]) -> str:
    """What is said of a graph with operators that are not known."""
    counts = Counter(node["op"] for node in nodes)
    first = {node["op"]: node for node in reversed(nodes)}
    listed = ", ".join(
        f"{name} ({n}; first: {first[name]['name'] or first[name]['outputs'][0]!r})"
        for name, n in sorted(counts.items())
    )
    return f"the graph has operators that nnxp does not know: {listed}"
