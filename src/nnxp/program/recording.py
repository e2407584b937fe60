"""A program bound to NumPy and a number of rows: memory set aside, operands bound, calls in order.

Kernels are written out as what their reference bodies do, so that every pass over a tile is one
call of a NumPy function that writes where it should: `for call in calls: call()`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from functools import partial
from math import inf, prod
from typing import Any

import numpy as np

from nnxp._arrays import HostArray, Shape
from nnxp._errors import located
from nnxp._library import KINDS, WITH_OUT
from nnxp.kernels._dispatch import Given, InPlace, Kernel
from nnxp.kernels.cpu._pieces import zeros
from nnxp.program.program import (
    Costs,
    Program,
    as_said,
    expanded,
    multiply_adds,
    scaled,
    sized,
)
from nnxp.program.traced import ROWS, Step, Value, axes_of, perform, record, value_of

Call = Callable[[], object]

SPREAD = 4096  # elements: the broadcast of so few costs more to start than to do

MANY_ROWS, FEW_COLUMNS = 64, 16
"""From so many rows, and up to so many columns, the largest of each row is found by columns."""

PIECE = 1024  # rows that are transposed at once, so that they stay in the cache

_SAME_ORDER = frozenset("reshape expand_dims squeeze".split())
"""Views of all of their input, in the order of its memory."""


@dataclass(frozen=True, eq=False)
class Bodied(Program):
    """A program of which some steps are kernels that have a body in place, and the rest written
    out."""

    bodies: Mapping[Step, InPlace] = field(default_factory=dict)


def bodied(program: Program) -> Bodied:
    """The program with kernels written out, but for those that have a body in place."""
    if isinstance(program, Bodied):
        return program
    bodies: dict[Step, InPlace] = {}

    def body_or_reference(kernel: Kernel, arrays: tuple[Any, ...], options: dict[str, Any]) -> Any:
        values = [None if each is None else value_of(each) for each in arrays]
        plain = all(each is None or isinstance(each, Value) for each in values)
        body = None
        if plain and values[0] is not None and values[0].numbers is None:
            given = (None if v is None else Given(v.shape, v.dtype, v.numbers) for v in values)
            body = kernel.in_place_for(*given, **options)
            body = body and _counting(body, values[0].shape[:1])
        if body is None and kernel.on_library("numpy") is None:
            return kernel.widened(*arrays, **options)
        made = record(kernel, arrays, options)
        if body is not None:
            first = made[0] if isinstance(made, list) else made
            bodies[first.value.step] = body
        return made

    made = expanded(program, body_or_reference)
    return Bodied(made.inputs, made.outputs, made.steps, (), program.several, bodies)


def _counting(body: InPlace, length: Shape) -> InPlace:
    """The body, whose room is that for the length of its axis 0, not for the program's rows."""
    return body._replace(room=lambda rows: body.room(*sized(length, rows)))


class Layout:
    """Which buffer each value of a program lies in: the memory that a recording sets aside.

    `sizes` are the buffers' bytes, and `scratch` those that bodies in place work in. A value that
    is a view, a constant, an input, or made anew at each call lies in none. Results lie in the
    caller's arrays, numbered from -1 downwards.
    """

    def __init__(self, program: Bodied, rows: int) -> None:
        self.bodies = program.bodies
        self.scratch = max((each.room(rows) for each in self.bodies.values()), default=0)
        self.sizes: list[int] = []
        self.of: dict[Value, int] = {}
        self.anew = 0  # bytes of what is made anew at each call, at most at once
        lives = program.lives
        for i, value in enumerate(program.outputs):
            self._claim(program, value, -1 - i)
        free: list[int] = []
        now = 0
        for step, reused, ended in zip(program.steps, lives.reused, lives.ended, strict=True):
            for value in step.outputs:
                size = prod(sized(value.shape, rows)) * value.dtype.itemsize
                if value.root is not value or value in self.of:
                    continue
                if not self._writes(step):
                    now += size
                    self.anew = max(self.anew, now)
                elif reused is not None and self.of.get(reused, -1) >= 0:
                    self.of[value] = self.of[reused]
                else:
                    self.of[value] = self._best(free, size)
            for value in ended:
                held = self.of.get(value)
                moved = reused is value and held == self.of.get(step.outputs[0])
                if held is not None and held >= 0 and not moved:
                    free.append(held)
                elif held is None and value.root is value and value.step is not None:
                    now -= prod(sized(value.shape, rows)) * value.dtype.itemsize

    def _claim(self, program: Program, value: Value, number: int) -> None:
        """Let a result, and what is overwritten by it on the way, lie in the caller's array."""
        while value.root is not value:
            if value.step is None or value.step.name not in _SAME_ORDER:
                return
            value = value.step.values[0]
        reused = dict(zip(program.steps, program.lives.reused, strict=True))
        while value.step is not None and value not in self.of and self._writes(value.step):
            self.of[value] = number
            before = reused[value.step]
            if before is None:
                return
            value = before

    def _writes(self, step: Step) -> bool:
        """Whether a step's result can be written where it is wanted."""
        return step in self.bodies or (isinstance(step.function, str) and step.name in _WRITES)

    def _best(self, free: list[int], size: int) -> int:
        """The smallest free buffer that holds so much, or a new one."""
        fits = [number for number in free if self.sizes[number] >= size]
        if fits:
            best = min(fits, key=lambda number: self.sizes[number])
            free.remove(best)
            return best
        self.sizes.append(size)
        return len(self.sizes) - 1


MANY = 1 << 14  # elements: of fewer, calling np.clip takes longer than what it saves
_WRITES = WITH_OUT | {"astype", "copy", "concatenate", "where"}


def costs(program: Program, given: Sequence[np.dtype[Any]] | None = None) -> Costs:
    """What a program takes of memory and work, counted from the lives of its values.

    `given` are the types of the rows, if they are to be converted first. Beside the products, a
    byte that is passed over takes about as long as a multiply-add, so both are work.
    """
    flat = bodied(program)
    layout = Layout(flat, ROWS)
    total = sum(layout.sizes) + layout.anew
    for value, dtype in zip(flat.inputs, given or [v.dtype for v in flat.inputs], strict=True):
        if dtype != value.dtype:
            total += prod(value.shape) * value.dtype.itemsize
    passed = sum(prod(v.shape) * v.dtype.itemsize for step in flat.steps for v in step.outputs)
    products = [(multiply_adds(step), step) for step in flat.steps]
    work = sum(each for each, _ in products)
    by_lines = sum(each / _lines(step) for each, step in products)
    lines = work / by_lines if by_lines else 1.0
    row_work = (work + passed) // ROWS
    rooms = [(each.room(1), each.room(2)) for each in flat.bodies.values()]
    scratch = max((one for one, _ in rooms), default=0)
    row_scratch = max((two - one for one, two in rooms), default=0)
    fixed = total % ROWS + scratch
    return Costs(total // ROWS + row_scratch, fixed, row_work, lines)


def _lines(step: Step) -> float:
    """How many lines of a product a step makes of a row; a recurrence makes one at a time."""
    return 1.0 if step.several else max(1.0, prod(step.outputs[0].shape[:-1]) / ROWS)


class Recording:
    """A program for so many rows on NumPy, with its memory: `recording(inputs, results)`.

    The inputs are host arrays of the types `given`; the results are C-contiguous arrays to fill.
    One caller at a time.
    """

    def __init__(self, program: Program, rows: int, given: Sequence[np.dtype[Any]]) -> None:
        program = bodied(program)
        layout = Layout(program, rows)
        self.rows = rows
        ours = all(isinstance(s.function, str) or s in program.bodies for s in program.steps)
        self._quiet = _without_warnings() if ours else None  # others may read their own context
        self._slots: list[Any] = [None] * (len(program.inputs) + len(program.outputs))
        self._places: dict[Value, tuple[bool, Any]] = {}  # (in a slot?, its number or the array)
        self._calls: list[Call] = []
        buffers = [np.empty(size, "uint8") for size in layout.sizes]
        scratch = np.empty(layout.scratch, "uint8")
        self.nbytes = sum(layout.sizes) + scratch.nbytes
        for i, (value, dtype) in enumerate(zip(program.inputs, given, strict=True)):
            self._places[value] = True, i
            if dtype != value.dtype:
                own = np.empty(sized(value.shape, rows), value.dtype)
                self._calls.append(self._bound(np.copyto, (own, value), {"casting": "unsafe"}))
                self._places[value] = False, own
                self.nbytes += own.nbytes
        first_result = len(program.inputs)
        for step in program.steps:
            now = scaled(step, rows)
            if any(value not in layout.of for value in step.outputs):
                self._compute(now)
                continue
            for value in step.outputs:
                shape, held = sized(value.shape, rows), layout.of[value]
                if held < 0:
                    number = first_result - 1 - held
                    target = self._result(program.outputs[-1 - held], value, number, shape)
                else:
                    whole = buffers[held][: prod(shape) * value.dtype.itemsize]
                    target = False, whole.view(value.dtype).reshape(shape)
                self._places[value] = target
            if step in program.bodies:
                operands = (*step.outputs, scratch, *step.inputs)
                self._calls.append(self._bound(program.bodies[step].run, operands, {}))
            else:
                self._calls += self._written(now, step.outputs[0])
        for i, value in enumerate(program.outputs):
            if layout.of.get(_in_order(value)) != -1 - i:
                self._places[value] = self._place(value)
                number = first_result + i
                self._places[mark := Value(value.shape, value.dtype)] = True, number
                self._calls.append(self._bound(np.copyto, (mark, value), {"casting": "unsafe"}))

    def __call__(self, inputs: Sequence[HostArray], results: Sequence[HostArray]) -> None:
        slots = self._slots
        slots[: len(inputs)] = inputs
        slots[len(inputs) : len(inputs) + len(results)] = results
        try:
            if self._quiet is None:
                with np.errstate(all="ignore"):
                    self._run()
            else:
                self._quiet.run(self._run)
        finally:
            slots[:] = [None] * len(slots)  # the caller's arrays are not held

    def _run(self) -> None:
        for call in self._calls:
            call()

    # binding

    def _place(self, x: Any) -> tuple[bool, Any]:
        """Where an operand is: in a slot, or an array or scalar that stays."""
        if not isinstance(x, Value):
            return False, x
        if x in self._places:
            return self._places[x]
        return False, x.numbers

    def _slot(self, value: Value) -> int:
        """A new slot for a value that is another array at each call."""
        self._slots.append(None)
        self._places[value] = True, len(self._slots) - 1
        return len(self._slots) - 1

    def _bound(
        self, fn: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]
    ) -> Call:
        """fn of these operands, as a call without arguments."""
        if options:
            fn = partial(fn, **options)
        places = [self._place(each) for each in args]
        operands = [each for _, each in places]
        moving = [i for i, (moves, _) in enumerate(places) if moves]
        if not moving:
            return partial(fn, *operands)
        slots = self._slots
        if moving == [0]:  # what follows would do for all; these take half as long for few rows
            slot, *behind = operands
            return lambda: fn(slots[slot], *behind)
        if moving == [len(operands) - 1]:
            *before, slot = operands
            begun = partial(fn, *before)
            return lambda: begun(slots[slot])
        if moving == [0, 2] and len(operands) == 3:
            first, between, last = operands
            return lambda: fn(slots[first], between, slots[last])
        return lambda: fn(*[slots[each] if moves else each for moves, each in places])

    def _bound_ufunc(self, fn: np.ufunc, inputs: tuple[Any, ...], out: Value) -> Call:
        """A ufunc that writes into `out`: by that name where NumPy takes no third argument."""
        spread = inputs if fn.signature else [self._spread(each, out) for each in inputs]
        if fn not in (np.maximum, np.minimum):
            return self._bound(fn, (*spread, out), {})
        moves, into = self._place(out)
        if moves:
            return self._bound(partial(_into, fn, {}), (out, *spread), {})
        return self._bound(fn, tuple(spread), {"out": into})

    def _spread(self, x: Any, out: Value) -> Any:
        """A small constant, such as a bias, once for each row: to start a broadcast takes long."""
        shape = sized(out.shape, self.rows)
        if isinstance(x, np.ndarray) and x.ndim == 0 and x == 0 and not np.signbit(x):
            whole = zeros(shape, x.dtype)
            return x if whole is None else whole
        if not isinstance(x, Value) or x.numbers is None or x in self._places:
            return x
        if not x.shape or x.shape == shape or prod(shape) > SPREAD:
            return x
        whole = np.broadcast_to(x.numbers, shape).copy()
        self.nbytes += whole.nbytes
        return whole

    def _result(self, output: Value, value: Value, number: int, shape: Shape) -> tuple[bool, Any]:
        """Where a value is that lies in the caller's array for `output`."""
        if output is value or sized(output.shape, self.rows) == shape:
            return True, number
        slot = self._slot(value)
        slots = self._slots

        def reshaped() -> None:
            slots[slot] = slots[number].reshape(shape)

        self._calls.append(reshaped)
        return True, slot

    def _compute(self, step: Step) -> None:
        """A step whose result is a view, or made anew at each call."""
        places = [self._place(each) for each in step.inputs]
        view = step.outputs[0].root is not step.outputs[0]
        if view and not any(moves for moves, _ in places):
            made = perform(np, step, [each for _, each in places])
            results = made if step.several else (made,)
            for value, array in zip(step.outputs, results, strict=True):
                self._places[value] = False, array
            return
        numbers = [self._slot(value) for value in step.outputs]
        slots, rows = self._slots, self.rows
        opaque = not isinstance(step.function, str)

        def call() -> None:
            try:
                made = perform(np, step, [slots[each] if moves else each for moves, each in places])
                results = made if step.several else (made,)
                if opaque:
                    as_said(step, made, rows)
            except Exception as error:
                located(error, step.path)
                raise
            for number, array in zip(numbers, results, strict=True):
                slots[number] = array

        self._calls.append(call)

    def _written(self, step: Step, out: Value) -> list[Call]:
        """The calls that write a step's result where it lies."""
        name, inputs, options = step.name, step.inputs, step.options
        if name in ("astype", "copy"):
            return [self._bound(np.copyto, (out, inputs[0]), {"casting": "unsafe"})]
        if name == "where":
            condition, x, y = inputs
            places = [self._place(each) for each in (out, condition, x, y)]
            slots = self._slots

            def choose() -> None:
                into, test, a, b = (slots[each] if moves else each for moves, each in places)
                np.copyto(into, b, casting="unsafe")
                np.copyto(into, a, casting="unsafe", where=test)

            return [choose]
        if name in ("concatenate", "stack"):
            join: Any = getattr(np, name)
            axis = options.get("axis", 0)

            def joined(into: HostArray, *parts: HostArray) -> None:
                join(parts, axis, out=into)

            return [self._bound(joined, (out, *inputs), {})]
        if KINDS[name] == "reduction" and name in _REDUCES:
            return self._reduced(step, out)
        if name == "clip":
            x, low, high = (*inputs, None, None)[:3]
            return [self._clipped(x, low, high, out)]
        if name in ("maximum", "minimum") and prod(sized(out.shape, self.rows)) >= MANY:
            x, bound = inputs
            if isinstance(x, Value) and out.dtype.kind == "f" and isinstance(bound, int | float):
                low, high = (bound, None) if name == "maximum" else (None, bound)
                return [self._clipped(x, low, high, out)]
        if name == "matmul" and _flat(inputs):
            return [self._bound(np.dot, (*inputs, out), {})]
        fn: Any = getattr(np, name)
        if isinstance(fn, np.ufunc) and not options:
            scalars = tuple(self._scalar(each, inputs[0]) for each in inputs)
            return [self._bound_ufunc(fn, scalars, out)]
        return [self._bound(partial(_into, fn, options), (out, *inputs), {})]

    def _scalar(self, x: Any, like: Any) -> Any:
        """A Python scalar as an array of the type that it would be given."""
        if isinstance(x, bool | int | float) and isinstance(like, Value) and like.dtype.kind == "f":
            return np.asarray(x, like.dtype)
        return x

    def _clipped(self, x: Any, low: Any, high: Any, out: Value) -> Call:
        """x between limits, by a ufunc that takes a third of what maximum takes with a scalar."""
        if out.dtype.kind == "f":
            low, high = -inf if low is None else low, inf if high is None else high
        limits = [self._scalar(each, out) for each in (low, high)]
        return self._bound(partial(_into, np.clip, {}), (out, x, *limits), {})

    def _reduced(self, step: Step, out: Value) -> list[Call]:
        (x,) = step.inputs
        axes = axes_of(step.options.get("axis"), len(x.shape))
        options = {"axis": axes, "keepdims": step.options.get("keepdims", False)}
        if step.name == "mean":
            if x.dtype.kind != "f" or x.dtype.itemsize < 4 or "dtype" in step.options:
                return [self._bound(partial(_into, np.mean, step.options), (out, x), {})]
            shape = sized(x.shape, self.rows)
            count = np.asarray(max(1, prod(shape[axis] for axis in axes)), x.dtype)
            into = self._bound(partial(_into, np.add.reduce, options), (out, x), {})
            return [into, self._bound(np.true_divide, (out, count, out), {})]
        if "dtype" in step.options:
            return [self._bound(partial(_into, getattr(np, step.name), step.options), (out, x), {})]
        fn = _REDUCES[step.name]
        shape = sized(x.shape, self.rows)
        slow = axes == (1,) and len(shape) == 2 and 1 < shape[1] <= FEW_COLUMNS
        if slow and step.name in ("max", "min") and x.dtype.kind == "f" and shape[0] >= MANY_ROWS:
            return [self._bound(partial(_over_columns, fn), (out, x), {})]
        return [self._bound(partial(_into, fn, options), (out, x), {})]


def _without_warnings() -> Context:
    """A context in which NumPy warns of nothing; np.errstate takes ten times as long to enter."""
    context = Context()
    context.run(np.seterr, all="ignore")
    return context


_REDUCES: dict[str, Any] = {
    "sum": np.add.reduce, "max": np.maximum.reduce, "min": np.minimum.reduce,
    "prod": np.multiply.reduce, "any": np.logical_or.reduce, "all": np.logical_and.reduce,
    "mean": np.add.reduce,
}  # fmt: skip


def _into(fn: Callable[..., Any], options: dict[str, Any], out: HostArray, *inputs: Any) -> None:
    fn(*inputs, out=out, **options)


def _over_columns(fn: Callable[..., Any], out: HostArray, x: HostArray) -> None:
    """fn(x, axis=1), of x transposed: NumPy starts anew for each row, which takes ten times as long
    for rows of ten numbers."""
    flat = out[:, 0] if out.ndim == 2 else out
    for start in range(0, len(x), PIECE):
        fn(x[start : start + PIECE].T.copy(), axis=0, out=flat[start : start + PIECE])


def _flat(inputs: tuple[Any, ...]) -> bool:
    """Whether a product is of two matrices of one type, which np.dot starts sooner."""
    a, b = inputs
    kinds = all(isinstance(each, Value) and len(each.shape) == 2 for each in inputs)
    return kinds and a.dtype == b.dtype and a.dtype.name in ("float32", "float64")


def _in_order(value: Value) -> Value:
    """What a result lies in, if it is only another shape of it."""
    while value.memory is not None and value.step is not None and value.step.name in _SAME_ORDER:
        value = value.memory
    return value
