"""A model written out: the steps that make the outputs of the inputs, in their order."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from math import prod
from typing import Any, NamedTuple

import numpy as np

from nnxp._arrays import Array, Shape, is_array, xp_of
from nnxp._errors import ShapeError, located
from nnxp._library import KINDS, WITH_OUT, compute
from nnxp._printed import Printed
from nnxp.kernels import Kernel
from nnxp.kernels.functions import einsum_terms
from nnxp.program.traced import (
    ROWS,
    Step,
    Tape,
    Untraceable,
    Value,
    again,
    counts_rows,
    current_tape,
    lifted,
    ndarray,
    perform,
    shape_text,
    value_of,
    writing,
)


class Outline(NamedTuple):
    """The shape and type of an array."""

    shape: Shape
    dtype: np.dtype[Any]


class Call(NamedTuple):
    """A layer at work in a program: its path in the model, what went in and what came out."""

    path: str
    inputs: tuple[Any, ...]
    outputs: tuple[Value, ...]


class Costs(NamedTuple):
    """What a program takes: bytes for each row and besides, and multiply-adds for each row.

    `row_lines` is how many lines of a product a row makes: one in dense layers, one for each
    position in convolutions; the harmonic mean, by work.
    """

    row_bytes: int
    fixed_bytes: int
    row_work: int
    row_lines: float = 1.0


@dataclass(frozen=True, eq=False)
class Program(Printed):
    """Steps from inputs to outputs; print it.

    A program counts its rows: called on arrays, it runs for as many as they have. `calls` tells
    which layers were at work, `several` whether the formula answered one array or several.
    """

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    steps: tuple[Step, ...]
    calls: tuple[Call, ...] = ()
    several: bool = False

    def __call__(self, *arrays: Array) -> Any:
        """The outputs for these inputs: an array, or a tuple where the formula answers several."""
        results = self.run(arrays)
        return tuple(results) if self.several else results[0]

    def run(self, arrays: Sequence[Array], wanted: Sequence[Value] | None = None) -> list[Any]:
        """The outputs, or the `wanted` values, as a list; others are freed after their last use."""
        xp = xp_of(arrays[0]) if arrays else np
        rows = self._rows(arrays)
        known: dict[Value, Any] = dict(zip(self.inputs, arrays, strict=True))
        goals = self.outputs if wanted is None else tuple(wanted)
        lives = self.lives if wanted is None else Lives(self, goals)
        for step, reused, ended in zip(self.steps, lives.reused, lives.ended, strict=True):
            inputs = [_array_for(x, known, xp) for x in step.inputs]
            now = step if rows is None else scaled(step, rows)
            try:
                if reused is not None and not isinstance(known[reused], np.generic):
                    options = now.options | {"out": known[reused]}
                    results = compute(xp, step.name, tuple(inputs), options)
                else:
                    results = perform(xp, now, inputs)
                    if _is_opaque(step):
                        as_said(step, results, rows)
            except Exception as error:
                located(error, step.path)
                raise
            del inputs
            known.update(zip(step.outputs, results if step.several else (results,), strict=True))
            for value in ended:
                known.pop(value, None)
        return [_array_for(value, known, xp) for value in goals]

    @cached_property
    def lives(self) -> Lives:
        """How long each value is needed."""
        return Lives(self, self.outputs)

    def _rows(self, arrays: Sequence[Array]) -> int | None:
        """How many rows the arrays have; None if this program does not count them."""
        for value, array in zip(self.inputs, arrays, strict=True):
            for size, real in zip(value.shape, array.shape, strict=True):
                if counts_rows(size):
                    return int(real) // (size // ROWS)
        return None

    def outline(self, rows: int) -> tuple[Outline, ...]:
        """The shapes and types of the outputs for so many rows."""
        return tuple(Outline(sized(v.shape, rows), v.dtype) for v in self.outputs)

    @cached_property
    def leaves(self) -> tuple[Call, ...]:
        """The layers at work that call no other layer."""
        above = {"" for call in self.calls if call.path}
        for call in self.calls:
            path = call.path
            while path := path.rpartition(".")[0]:
                above.add(path)
        return tuple(call for call in self.calls if call.path not in above)

    @cached_property
    def borrowed(self) -> tuple[bool, ...]:
        """Of each output, whether it may lie in memory that is an input's or a constant's.

        What a layer that is run as Python answers may be anybody's. Kernels are to be written out.
        """
        made_by = (value.root.step for value in self.outputs)
        return tuple(step is None or _is_opaque(step) for step in made_by)

    @cached_property
    def opaque(self) -> tuple[str, ...]:
        """The paths of the layers that are run as Python."""
        return tuple(step.path for step in self.steps if _is_opaque(step))

    def __str__(self) -> str:
        names = {value: value.name or f"x{i}" for i, value in enumerate(self.inputs)}
        values = (value for step in self.steps for value in step.outputs)
        names |= {value: f"v{i}" for i, value in enumerate(values)}
        lines = [f"{names[v]}: {v.dtype}{shape_text(v.shape)}" for v in self.inputs]
        for step in self.steps:
            inputs = [_value_text(x, names) for x in step.inputs]
            options = [f"{name}={_option(v)}" for name, v in step.options.items()]
            results = ", ".join(names[value] for value in step.outputs)
            shape = ", ".join(shape_text(value.shape) for value in step.outputs)
            text = f"{results} = {step.name}({', '.join(inputs + options)})"
            lines.append(f"{text:<60}  # {shape} {step.path}".rstrip())
        return "\n".join(
            [*lines, "return " + ", ".join(_value_text(v, names) for v in self.outputs)]
        )


class Lives:
    """The liveness of a program's values, until it has these `goals`.

    `ended` has, for each step, the values whose last use it is, and `reused` the one of them in
    whose memory its result may be written.
    """

    def __init__(self, program: Program, goals: Sequence[Value]) -> None:
        steps = program.steps
        last: dict[Value, int] = {}  # of the memory: a view keeps what it looks at
        for i, step in enumerate(steps):
            for value in (*step.values, *step.outputs):
                last[value.root] = i
        for value in goals:
            last[value.root] = len(steps)
        self.ended: list[list[Value]] = [[] for _ in steps]
        for value in dict.fromkeys(v for step in steps for v in (*step.values, *step.outputs)):
            if value.numbers is None and last[value.root] < len(steps):
                self.ended[last[value.root]].append(value)
        self.reused = [_reused(step, i, last) for i, step in enumerate(steps)]


def _reused(step: Step, i: int, last: Mapping[Value, int]) -> Value | None:
    """The input in whose memory the result of step i may be written."""
    if KINDS.get(step.name) != "elementwise" or step.name not in WITH_OUT or _is_opaque(step):
        return None
    for value in step.values:
        maker, y = value.step, step.outputs[0]
        own = maker is not None and value.root is value and isinstance(maker.function, str)
        if own and (value.shape, value.dtype) == (y.shape, y.dtype) and last[value] == i:
            return value
    return None


def trace(
    function: Callable[..., Any],
    *outlines: Any,
    layers: Mapping[int, tuple[str, Any]] | None = None,
    rows: int | None = None,
    expands: bool | Callable[..., Any] = False,
) -> Program:
    """The program of a function of arrays, for inputs of these (shape, dtype).

    `layers`, `rows` and `expands` are as for a Tape. Raises Untraceable if the function looks at
    numbers, and what it itself raises for arrays that do not fit.
    """
    inputs = tuple(
        outline if isinstance(outline, Value) else Value(tuple(outline[0]), np.dtype(outline[1]))
        for outline in outlines
    )
    tape = Tape(layers={} if layers is None else layers, rows=rows, expands=expands)
    with _uncollected(), writing(tape):
        results = function(*map(lifted, inputs))
        several = isinstance(results, tuple | list)
        outputs = tuple(map(value_of, results if several else (results,)))
    for value in outputs or ((),):
        if not isinstance(value, Value):
            raise ShapeError(f"a formula answers arrays, not {value!r:.60}")
    return Program(inputs, outputs, _needed(tape.steps, outputs), tuple(_calls(tape)), several)


@contextmanager
def _uncollected() -> Iterator[None]:
    """A block without garbage collection: a long program is many objects, none of them garbage."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _calls(tape: Tape) -> Iterator[Call]:
    for path, inputs, outputs in tape.calls:
        results = map(value_of, outputs if isinstance(outputs, tuple | list) else (outputs,))
        yield Call(path, inputs, tuple(results))


def _needed(steps: Sequence[Step], outputs: Sequence[Value]) -> tuple[Step, ...]:
    """The steps without dead ones, whose results are not used."""
    wanted, kept = set(outputs), []
    for step in reversed(steps):
        if wanted.intersection(step.outputs):
            kept.append(step)
            wanted.update(step.values)
    return tuple(reversed(kept))


def same_for_any_rows(program: Program, doubled: Program) -> None:
    """Raise Untraceable unless a program says the same as the one for twice as many rows.

    A formula that computes with the number of rows, as a mean over all of them does, has it in its
    constants, where no program would see it.
    """
    names: dict[Value, Value] = dict(zip(program.inputs, doubled.inputs, strict=True))
    same = len(program.steps) == len(doubled.steps)
    for one, two in zip(program.steps, doubled.steps, strict=False):
        same = same and one.name == two.name and len(one.inputs) == len(two.inputs)
        same = same and _same(scaled(one, 2 * ROWS).options, two.options)
        pairs = zip(one.inputs, two.inputs, strict=False)
        if not (same and all(_same(a, b, names) for a, b in pairs)):
            raise Untraceable(
                f"{one.path or 'the model'} computes with the number of rows, at {one.name}: rows "
                "are not treated each on its own"
            )
        names.update(zip(one.outputs, two.outputs, strict=True))
    if not same:
        raise Untraceable("the model does other things for another number of rows")


def _same(a: Any, b: Any, names: Mapping[Value, Value] | None = None) -> bool:
    if isinstance(a, Value) and isinstance(b, Value):
        if a.numbers is None or b.numbers is None:
            return (names or {}).get(a) is b
        return a.numbers is b.numbers or _same(a.numbers, b.numbers)
    if is_array(a) and is_array(b):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        equal = (a == b) | ((a != a) & (b != b))
        return bool(getattr(equal, "value", equal).all())
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b) or (a != a and b != b)


def replay(
    program: Program, arrays: Sequence[Any], change: Callable[..., Any] = again
) -> list[Any]:
    """The program run anew on traced arrays; `change(step, arrays)` says what a step becomes."""
    known = {value: lifted(array) for value, array in zip(program.inputs, arrays, strict=True)}

    def now(x: Any) -> Any:
        return known[x] if isinstance(x, Value) and x in known else lifted(x)

    tape = current_tape()
    for step in program.steps:
        tape.path = step.path
        results = change(step, tuple(map(now, step.inputs)))
        several = isinstance(results, tuple | list)
        known.update(zip(step.outputs, results if several else (results,), strict=True))
    return [now(value) for value in program.outputs]


def expanded(program: Program, expands: bool | Callable[..., Any] = True) -> Program:
    """The program with every kernel replaced by the steps of its reference body.

    `expands` is as for a Tape.
    """
    inputs = [Value(v.shape, v.dtype, name=v.name) for v in program.inputs]
    written_out = trace(lambda *arrays: tuple(replay(program, arrays)), *inputs, expands=expands)
    return Program(written_out.inputs, written_out.outputs, written_out.steps, (), program.several)


def _array_for(x: Any, known: Mapping[Value, Any], xp: Any) -> Any:
    """The array for a step's input; a constant that tracing made is moved to the library xp."""
    if not isinstance(x, Value):
        return x
    if x in known:
        return known[x]
    return xp.asarray(x.numbers) if xp is not np and type(x.numbers) is np.ndarray else x.numbers


# rows


def sized(shape: Shape, rows: int) -> Shape:
    """A shape for so many rows."""
    return tuple(size // ROWS * rows if counts_rows(size) else size for size in shape)


def scaled(step: Step, rows: int) -> Step:
    """The step for so many rows: numbers of rows in its options are replaced."""
    options = {name: _scaled(value, rows) for name, value in step.options.items()}
    if options == step.options:
        return step
    return Step(step.function, step.inputs, options, step.path, step.outputs, step.several)


def _scaled(option: Any, rows: int) -> Any:
    if isinstance(option, tuple | list):
        return type(option)(_scaled(part, rows) for part in option)
    if isinstance(option, slice):
        return slice(*(_scaled(bound, rows) for bound in (option.start, option.stop, option.step)))
    return int(option) // ROWS * rows if counts_rows(option) else option


def steps_of(step: Step) -> list[Step]:
    """What a step that is a kernel does, step by step; any other step itself."""
    if not isinstance(step.function, Kernel):
        return [step]
    with writing(Tape(expands=True)) as tape:
        step.function.widened(*map(lifted, step.inputs), **step.options)
    return tape.steps


def multiply_adds(step: Step) -> int:
    """The multiply-adds of a step that is a product, or a kernel that has some; 0 for others."""
    if isinstance(step.function, Kernel):
        return sum(map(multiply_adds, steps_of(step)))
    if not step.values:
        return 0
    name, first = step.name, step.values[0]
    if name in ("matmul", "dot"):
        return prod(step.outputs[0].shape) * first.shape[-1]
    if name == "outer":
        return prod(step.outputs[0].shape)
    if name == "tensordot":
        kept = prod(step.outputs[0].shape)
        met = prod(first.shape) * prod(step.values[1].shape) // max(1, kept)
        return kept * int(met**0.5)
    if name == "einsum":
        ndims = [len(v.shape) for v in step.values]
        terms, _ = einsum_terms(step.options["subscripts"], ndims)
        shapes = (v.shape for v in step.values)
        pairs = (zip(*pair, strict=True) for pair in zip(terms, shapes, strict=True))
        return prod(dict(chain(*pairs)).values())
    return 0


def as_said(step: Step, results: Any, rows: int | None) -> None:
    """Raise ShapeError unless a layer that was run as Python has answered as it was taken to."""
    for value, array in zip(step.outputs, results if step.several else (results,), strict=True):
        shape = value.shape if rows is None else sized(value.shape, rows)
        if getattr(array, "shape", None) != shape:
            raise ShapeError(
                f"{step.function!r:.200} answers {getattr(array, 'shape', array)} where its "
                f"output_shape says {shape}"
            )


def _is_opaque(step: Step) -> bool:
    return not isinstance(step.function, str | Kernel)


# words


def _value_text(x: Any, names: Mapping[Value, str]) -> str:
    if not isinstance(x, Value):
        return f"{x!r:.40}"
    if x in names:
        return names[x]
    return x.name or f"{x.dtype}{shape_text(x.shape)}"


def _option(value: Any) -> str:
    if is_array(value):
        return f"{value.dtype}{list(value.shape)}"
    return getattr(value, "__name__", None) or f"{value!r:.60}".replace(str(ROWS), "rows")


__all__ = [
    "WITH_OUT", "Call", "Costs", "Outline", "Program", "Untraceable", "multiply_adds", "ndarray",
    "replay", "scaled", "sized", "trace",
]  # fmt: skip
