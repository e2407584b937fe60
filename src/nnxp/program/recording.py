"""A program bound to NumPy and a number of rows: memory set aside, and a function that runs it.

Kernels are written out as what their reference bodies do, so that every pass over a tile is one
call of a NumPy function that writes where it should: one line of Python each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from functools import lru_cache, partial
from math import inf, prod
from types import CodeType
from typing import Any

import numpy as np

from nnxp._arrays import HostArray, Shape
from nnxp._errors import located
from nnxp._library import KINDS, WITH_OUT
from nnxp.kernels._dispatch import InPlace, Kernel, Operand
from nnxp.kernels.cpu import onednn
from nnxp.kernels.cpu._pieces import aligned, zeros
from nnxp.kernels.cpu._small import TINY, Weight, columns_at_once
from nnxp.program.program import (
    Costs,
    Program,
    as_said,
    expanded,
    multiply_adds,
    scaled,
    sized,
    steps_of,
)
from nnxp.program.traced import ROWS, Step, Value, axes_of, perform, record, value_of

SPREAD = 4096  # elements: the broadcast of so few costs more to start than to do

MANY_ROWS, FEW_COLUMNS = 64, 16
"""From so many rows, and up to so many columns, the largest of each row is found by columns."""

ALONE = 1 << 18  # multiply-adds that OpenBLAS makes in one thread: interface/gemm.c
ANY_LAYOUT = 1 << 20  # multiply-adds of matrices that change, from which oneDNN is asked
FEW_BYTES = 1 << 12  # of an input or a result, to be copied where bodies can be bound to the copy
PIECE = 1024  # rows that are transposed at once, so that they stay in the cache

_METHODS = frozenset("astype copy reshape swapaxes transpose".split())
"""Of an array, that take the options of the dialect's function, in their order."""

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
        values = [None if x is None else value_of(x) for x in arrays]
        plain = all(v is None or isinstance(v, Value) for v in values)
        body = None
        if plain and values[0] is not None and values[0].numbers is None:
            operands = (None if v is None else Operand(v.shape, v.dtype, v.numbers) for v in values)
            body = kernel.in_place_for(*operands, **options)
            body = body and _counting(body, values[0].shape[:1])
        if body is None and kernel.on_library("numpy") is None:
            return kernel.widened(*arrays, **options)
        results = record(kernel, arrays, options)
        if body is not None:
            first = results[0] if isinstance(results, list) else results
            bodies[first.value.step] = body
        return results

    flat = expanded(program, body_or_reference)
    return Bodied(flat.inputs, flat.outputs, flat.steps, (), program.several, bodies)


def _counting(body: InPlace, length: Shape) -> InPlace:
    """The body, which counts for the length of its axis 0, not for the program's rows."""
    return body._replace(
        room=lambda rows: body.room(*sized(length, rows)),
        work=lambda rows: body.work(*sized(length, rows)),
    )


class Layout:
    """Which buffer each value of a program lies in: the memory that a recording sets aside.

    `sizes` are the buffers' bytes, and `scratch` those that bodies in place work in. A value that
    is a view, a constant, an input, or made anew at each call lies in none. Results lie in the
    caller's arrays, numbered from -1 downwards.
    """

    def __init__(self, program: Bodied, rows: int) -> None:
        self.bodies = program.bodies
        self.scratch = max((body.room(rows) for body in self.bodies.values()), default=0)
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
                number = self.of.get(value)
                moved = reused is value and number == self.of.get(step.outputs[0])
                if number is not None and number >= 0 and not moved:
                    free.append(number)
                elif number is None and value.root is value and value.step is not None:
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
        if step.name == "pad":
            return _around(step) is not None
        if step.name == "scatter":
            return all(map(_is_plain, step.options["keys"]))
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


def costs(program: Program, dtypes: Sequence[np.dtype[Any]] | None = None) -> Costs:
    """What a program takes of memory and work, counted from the lives of its values.

    `dtypes` are those of the rows, if they are to be converted first. Beside the products, a byte
    that is passed over takes about as long as a multiply-add, so both are work.
    """
    flat = bodied(program)
    layout = Layout(flat, ROWS)
    total = sum(layout.sizes) + layout.anew
    for value, dtype in zip(flat.inputs, dtypes or [v.dtype for v in flat.inputs], strict=True):
        if dtype != value.dtype:
            total += prod(value.shape) * value.dtype.itemsize
    passed = sum(prod(v.shape) * v.dtype.itemsize for step in flat.steps for v in step.outputs)
    parts = (part for step in flat.steps for part in (steps_of(step) if step.several else [step]))
    products = [(multiply_adds(part), part) for part in parts]
    work = sum(count for count, _ in products)
    by_lines = sum(count / _lines(step) for count, step in products)
    lines = work / by_lines if by_lines else 1.0
    row_work = (work + passed) // ROWS
    rooms = [(body.room(1), body.room(2)) for body in flat.bodies.values()]
    scratch = max((one for one, _ in rooms), default=0)
    row_scratch = max((two - one for one, two in rooms), default=0)
    fixed = total % ROWS + scratch
    return Costs(total // ROWS + row_scratch, fixed, row_work, lines)


def _lines(step: Step) -> float:
    """How many lines of a product a step makes of a row."""
    return max(1.0, prod(step.outputs[0].shape[:-1]) / ROWS)


class Recording:
    """A program for so many rows on NumPy, with its memory: `recording(inputs, results)`.

    The inputs are host arrays of these `dtypes`; the results are C-contiguous arrays to fill, or
    new ones from `answer`. One caller at a time. `text` is what runs: a function of inputs and
    results, a line for each call of NumPy or of a kernel's body. `nbytes` are those of its buffers.
    """

    def __init__(self, program: Program, rows: int, dtypes: Sequence[np.dtype[Any]]) -> None:
        program = bodied(program)
        lines = _Lines(program, rows, dtypes)
        self.text, self.nbytes = lines.text, lines.nbytes
        exec(_compiled(self.text), lines.names)
        self.answer: Callable[..., Any] = lines.names.pop("run")
        """The result of these inputs, or a tuple of several."""
        if all(isinstance(s.function, str) or s in program.bodies for s in program.steps):
            self.answer = partial(_without_warnings().run, self.answer)
        worth = onednn.SHARED if lines.blas else onednn.SHARED_ALONE
        if lines.work > worth and onednn.why_not() is None:
            self.answer = partial(onednn.sharing_threads, lines.blas, self.answer)

    def __call__(self, inputs: Sequence[HostArray], results: Sequence[HostArray]) -> None:
        self.answer(*inputs, *results)


class _Lines:
    """What a recording runs, while it is written: `text`, and the `names` that it reads."""

    def __init__(self, program: Bodied, rows: int, dtypes: Sequence[np.dtype[Any]]) -> None:
        self.rows = rows
        self.names: dict[str, Any] = {}
        self.work = 0  # the most multiply-adds of a product that oneDNN may share among threads
        self.blas = False  # whether NumPy's BLAS may be asked for what it shares among threads
        self._known: dict[int, str] = {}  # what is in `names`, by its id
        self._places: dict[Value, Any] = {}  # where a value lies: an array, or the name of a local
        self._lines: list[str] = []
        self._paths: list[str] = []  # of the layer that each line belongs to
        self._path = ""
        inputs = [Local(f"x{i}") for i in range(len(program.inputs))]
        results = [Local(f"y{i}") for i in range(len(program.outputs))]
        layout = Layout(program, rows)
        buffers = [np.empty(size, "uint8") for size in layout.sizes]
        scratch = aligned((layout.scratch,), "uint8")
        self.names["memory"] = scratch, *buffers  # a call that is bound to it does not keep it
        self.nbytes = sum(layout.sizes) + scratch.nbytes
        for value, dtype, name in zip(program.inputs, dtypes, inputs, strict=True):
            self._places[value] = name
            if dtype != value.dtype or (self._are_few(value) and _worth_binding(program, value)):
                own = self._own(value)
                self._line(np.copyto, own, value, casting="unsafe")
                self._places[value] = own
        of_bodies = {layout.of.get(value) for step in program.bodies for value in step.outputs}
        into = [
            self._own(value) if -1 - i in of_bodies and self._are_few(value) else name
            for i, (value, name) in enumerate(zip(program.outputs, results, strict=True))
        ]
        added: Step | None = None  # what the product before it has done
        following = (*program.steps, None)[1:]
        for step, after, ended in zip(program.steps, following, program.lives.ended, strict=True):
            now, self._path = scaled(step, rows), step.path
            if any(value not in layout.of for value in step.outputs):
                self._computed(now)
            else:
                for value in step.outputs:
                    shape, number = sized(value.shape, rows), layout.of[value]
                    if number < 0:
                        output, place = program.outputs[-1 - number], into[-1 - number]
                        self._places[value] = self._result(output, value, place, shape)
                    else:
                        whole = buffers[number][: prod(shape) * value.dtype.itemsize]
                        self._places[value] = whole.view(value.dtype).reshape(shape)
                if step in program.bodies:
                    self.blas = True
                    self.work = max(self.work, program.bodies[step].work(rows))
                    self._body(program.bodies[step], *step.outputs, scratch, *step.inputs)
                elif step.name == "matmul" and _flat(step.inputs):
                    (x, weight), y = step.values, step.outputs[0]
                    bias = None if after is None else _bias(step, after, layout)
                    if self._product(x, weight, y, bias):
                        added = after
                elif step is not added:
                    self._written(now, step.outputs[0])
            self._end(ended)
        self._path = ""
        for i, (value, name) in enumerate(zip(program.outputs, results, strict=True)):
            if layout.of.get(_in_order(value)) != -1 - i or into[i] is not name:
                self._line(np.copyto, name, value, casting="unsafe")
        self.text = self._function(inputs, results, program)

    def _function(self, inputs: list[Local], results: list[Local], program: Program) -> str:
        """The text of the function: results that are left out are new arrays, errors say where."""
        arguments = [*inputs, *(f"{name}=None" for name in results)]
        new = [
            f"{name} = {self._named(np.empty)}({self._named(shape)}, {self._named(value.dtype)})"
            for name, value in zip(results, program.outputs, strict=True)
            for shape in [sized(value.shape, self.rows)]
        ]
        head = [f"def run({', '.join(arguments)}):", f" if {results[0]} is None:"]
        head += [f"  {line}" for line in new] + [" try:"]
        located = self._named(partial(_located, len(head), self._paths))
        answer = f"({', '.join(results)},)" if program.several else results[0]
        tail = [f" except Exception as error:\n  {located}(error)\n  raise\n return {answer}\n"]
        return "\n".join([*head, *(f"  {line}" for line in [*self._lines, "pass"]), *tail])

    def _body(self, body: InPlace, *operands: Any) -> None:
        """The lines of a body in place: bound to its arrays if they are the same at each call."""
        places = [self._place(operand) for operand in operands]
        if any(isinstance(place, Local) for place in places):
            self._line(body.run, *operands)
            return
        for call in body.bound(*places):
            self._line(call)

    def _line(self, fn: Callable[..., Any], *operands: Any, **options: Any) -> None:
        """A line that calls fn, with values and what else is given."""
        arguments = [*map(self._named, operands)]
        arguments += [f"{name}={self._named(option)}" for name, option in options.items()]
        self._add(f"{self._named(fn)}({', '.join(arguments)})")

    def _add(self, line: str) -> None:
        self._lines.append(line)
        self._paths.append(self._path)

    def _named(self, x: Any) -> str:
        """What a line says for a value, or for anything else."""
        x = self._place(x)
        if isinstance(x, Local):
            return x
        if isinstance(x, tuple) and any(isinstance(item, Value) for item in x):
            return f"({', '.join(map(self._named, x))},)"
        name = self._known.setdefault(id(x), f"c{len(self._known)}")
        self.names[name] = x
        return name

    def _place(self, x: Any) -> Any:
        """Where a value lies; anything else as it is."""
        if not isinstance(x, Value):
            return x
        return self._places.get(x, x.numbers)

    def _local(self, value: Value) -> Local:
        """A new name for a value that is another array at each call."""
        self._places[value] = name = Local(f"v{len(self._places)}")
        return name

    def _end(self, values: Sequence[Value]) -> None:
        """Let go of what was made anew, and is needed no more."""
        names = [self._places.get(value) for value in values if value.step is not None]
        ended = [name for name in names if isinstance(name, Local) and name[0] == "v"]
        if ended:
            self._add(f"del {', '.join(ended)}")

    def _ufunc(self, fn: np.ufunc, inputs: tuple[Any, ...], out: Value) -> None:
        """A ufunc that writes into `out`: by that name where NumPy takes no third argument."""
        spread = inputs if fn.signature else [self._spread(x, out) for x in inputs]
        if fn in (np.maximum, np.minimum):
            self._line(fn, *spread, out=out)
        elif fn is np.multiply and self._are_many(inputs, "float32", "bool"):
            self._line(onednn.masked, *inputs, out)
        elif fn is np.add and self._are_many(inputs, "float32", "float32"):
            self._line(onednn.add, *inputs, out)
        else:
            self._line(fn, *spread, out)

    def _are_many(self, inputs: tuple[Any, ...], *dtypes: str) -> bool:
        """Whether inputs are many numbers of one shape and of these types, for oneDNN."""
        if not all(isinstance(x, Value) for x in inputs) or onednn.why_not() is not None:
            return False
        shapes = {sized(x.shape, self.rows) for x in inputs}
        many = len(shapes) == 1 and prod(shapes.pop()) >= MANY
        return many and tuple(x.dtype.name for x in inputs) == dtypes

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

    def _own(self, value: Value) -> HostArray:
        """Memory for a value alone."""
        own = aligned(sized(value.shape, self.rows), value.dtype)
        self.nbytes += own.nbytes
        return own

    def _are_few(self, value: Value) -> bool:
        """Whether a value's numbers are so few that to copy them takes less than to tell a body at
        each call where they are."""
        return prod(sized(value.shape, self.rows)) * value.dtype.itemsize <= FEW_BYTES

    def _result(self, output: Value, value: Value, place: Any, shape: Shape) -> Any:
        """Where a value is that lies in `place`, which is for `output`."""
        if output is value or sized(output.shape, self.rows) == shape:
            return place
        if isinstance(place, np.ndarray):
            return place.reshape(shape)
        local = self._local(value)
        self._add(f"{local} = {place}.reshape({self._named(shape)})")
        return local

    def _computed(self, step: Step) -> None:
        """A step whose result is a view, or made anew at each call."""
        places = [self._place(x) for x in step.inputs]
        view = step.outputs[0].root is not step.outputs[0]
        self.blas |= not view
        if view and not any(isinstance(place, Local) for place in places):
            results = perform(np, step, places)
            views = results if step.several else (results,)
            if all(isinstance(one, np.ndarray) for one in views):  # NumPy gives a number for x[0]
                self._places.update(zip(step.outputs, views, strict=True))
                return
        arguments = [*map(self._named, step.inputs)]
        if step.name in _METHODS:
            first, *rest = (*arguments, *map(self._named, step.options.values()))
            call = f"{first}.{step.name}({', '.join(rest)})"
        else:
            run = partial(_performed, step, self.rows)
            call = f"{self._named(run)}({', '.join(arguments)})"
        targets = "".join(f"{self._local(value)}, " for value in step.outputs)
        self._add(f"{targets if step.several else targets[:-2]} = {call}")

    def _written(self, step: Step, out: Value) -> None:
        """The lines that write a step's result where it lies."""
        name, inputs, options = step.name, step.inputs, step.options
        self.blas |= KINDS[name] in ("contraction", "reduction")
        fn: Any = getattr(np, name, None)
        if name == "copy":
            self._line(onednn.copy, inputs[0], out)
        elif name == "astype":
            self._line(np.copyto, out, inputs[0], casting="unsafe")
        elif name == "where":
            condition, x, y = inputs
            self._line(np.copyto, out, y, casting="unsafe")
            self._line(np.copyto, out, x, casting="unsafe", where=condition)
        elif name == "pad":
            mode, value = options.get("mode", "constant"), options.get("constant_values", 0)
            around, place = _around(step), self._place(out)
            assert around is not None, "a pad without it is made anew"
            if isinstance(place, Local):
                self._line(_pad, out, inputs[0], around, mode, value)
            else:
                for part, source in _padded(place, inputs[0], around, mode, value):
                    self._line(np.copyto, part, source, casting="unsafe")
        elif name == "scatter":
            keys = options["keys"]
            self._line(
                _scatter, out, keys, _picked_once(sized(out.shape, self.rows), keys), *inputs
            )
        elif name in ("concatenate", "stack"):
            self._joined(fn, inputs, options.get("axis", 0), out)
        elif KINDS[name] == "reduction" and name in _REDUCES:
            self._reduced(step, out)
        elif name == "clip":
            x, low, high = (*inputs, None, None)[:3]
            self._clipped(x, low, high, out)
        elif _bounds_many(name, inputs, sized(out.shape, self.rows), out.dtype):
            x, bound = inputs
            low, high = (bound, None) if name == "maximum" else (None, bound)
            self._clipped(x, low, high, out)
        elif isinstance(fn, np.ufunc) and not options:
            self._ufunc(fn, tuple(self._scalar(x, inputs[0]) for x in inputs), out)
        else:
            self._line(fn, *inputs, out=out, **options)

    def _joined(self, fn: Any, inputs: tuple[Any, ...], axis: int, out: Value) -> None:
        """np.concatenate or np.stack, which is slower because Python looks at each array."""
        places = [self._place(x) for x in inputs]
        if fn is np.stack and not any(isinstance(place, Local) for place in places):
            fn, inputs = np.concatenate, tuple(np.expand_dims(place, axis) for place in places)
        if fn is np.concatenate and len(inputs) == 1:
            self._line(np.copyto, out, inputs[0])
        else:
            self._line(fn, inputs, axis, out=out)

    def _product(self, x: Value, weight: Value, out: Value, bias: Value | None) -> bool:
        """A product of two matrices; by oneDNN, or of few rows with a constant in parts. Whether
        the bias was added."""
        left, into = self._place(x), self._place(out)
        (inner, columns), (rows, _) = (sized(v.shape, self.rows) for v in (weight, out))
        known = isinstance(left, np.ndarray) and isinstance(into, np.ndarray)
        if out.dtype == "float32" and rows > 1 and onednn.why_not() is None:
            work = rows * inner * columns
            self.work = max(self.work, work)
            if weight.numbers is not None and work >= TINY:
                shift = None if bias is None else bias.numbers
                matrix = Weight(weight.numbers, None if shift is None else shift.copy())
                if known:
                    for multiply in matrix.bound(left, into):
                        self._line(multiply)
                elif isinstance(into, np.ndarray):
                    self._line(matrix.into(into), x)
                else:
                    self._line(matrix, x, out)
                return shift is not None
            if work >= ANY_LAYOUT:
                self._line(onednn.multiply, x, weight, out, *([] if bias is None else [bias]))
                return bias is not None
        self.blas |= rows * inner * columns > ALONE
        parts = columns_at_once(rows, inner, columns, out.dtype)
        if weight.numbers is None or isinstance(into, Local) or len(parts) == 1:
            self._line(np.dot, x, weight, out)
            return False
        for part in parts:
            self._line(np.matmul, x, weight.numbers[:, part], into[:, part])
        return False

    def _scalar(self, x: Any, like: Any) -> Any:
        """A Python scalar as an array, in the type that it would become."""
        if isinstance(x, bool | int | float) and isinstance(like, Value) and like.dtype.kind == "f":
            return np.asarray(x, like.dtype)
        return x

    def _clipped(self, x: Any, low: Any, high: Any, out: Value) -> None:
        """x between limits, by a ufunc that takes a third of what maximum takes with a scalar."""
        if out.dtype.kind == "f":
            low, high = -inf if low is None else low, inf if high is None else high
        self._line(np.clip, x, *(self._scalar(bound, out) for bound in (low, high)), out=out)

    def _reduced(self, step: Step, out: Value) -> None:
        (x,) = step.inputs
        axes = axes_of(step.options.get("axis"), len(x.shape))
        options = {"axis": axes, "keepdims": step.options.get("keepdims", False)}
        if "dtype" in step.options:
            self._line(getattr(np, step.name), x, out=out, **step.options)
        elif step.name != "mean":
            fn, shape = _REDUCES[step.name], sized(x.shape, self.rows)
            few = axes == (1,) and len(shape) == 2 and 1 < shape[1] <= FEW_COLUMNS
            slow = few and shape[0] >= MANY_ROWS and x.dtype.name in ("float32", "float64")
            if slow and step.name in ("max", "min"):
                self._line(_over_columns, fn, out, x)
            elif slow and step.name == "sum":
                self._line(_summed_columns, out, x, np.ones(shape[1], x.dtype))
            else:
                self._line(fn, x, out=out, **options)
        elif x.dtype.kind != "f" or x.dtype.itemsize < 4:
            self._line(np.mean, x, out=out, **step.options)
        else:
            shape = sized(x.shape, self.rows)
            count = np.asarray(max(1, prod(shape[axis] for axis in axes)), x.dtype)
            self._line(np.add.reduce, x, out=out, **options)
            self._line(np.true_divide, out, count, out)


class Local(str):
    """The name of what is another array at each call."""

    __slots__ = ()


@lru_cache(maxsize=64)
def _compiled(text: str) -> CodeType:
    """The code of a text; recordings for other numbers of rows mostly have the same one."""
    return compile(text, "<recording>", "exec")


def _located(first: int, paths: Sequence[str], error: Exception) -> None:
    """Say in an error of a recording's line which layer's it is; the first has this number."""
    assert error.__traceback__ is not None
    number = error.__traceback__.tb_lineno - first - 1
    if number < len(paths):
        located(error, paths[number])


def _performed(step: Step, rows: int, *arrays: Any) -> Any:
    """A step on NumPy; a layer that runs as Python must answer as it said."""
    results = perform(np, step, arrays)
    if not isinstance(step.function, str):
        as_said(step, results, rows)
    return results


_REACH = {"constant": None, "edge": None, "reflect": -1, "wrap": 0}
"""How many elements more than an axis has may be put before it, or behind; None for any number."""


def _around(step: Step) -> list[tuple[int, int]] | None:
    """What a pad puts before and behind each axis; None where `_pad` does not do it."""
    mode, shape = step.options.get("mode", "constant"), step.values[0].shape
    if mode not in _REACH or np.ndim(step.options.get("constant_values", 0)):
        return None
    widths = np.broadcast_to(step.options["pad_width"], (len(shape), 2)).tolist()
    more = _REACH[mode]
    fits = all(more is None or max(pair) <= n + more for n, pair in zip(shape, widths, strict=True))
    return [(before, behind) for before, behind in widths] if fits and all(shape) else None


def _pad(
    out: HostArray, x: HostArray, around: Sequence[tuple[int, int]], mode: str, value: Any
) -> None:
    """np.pad into `out`, in a sixth of its time for little x."""
    for part, source in _padded(out, x, around, mode, value):
        part[...] = source


def _padded(
    out: HostArray, x: Any, around: Sequence[tuple[int, int]], mode: str, value: Any
) -> Iterator[tuple[HostArray, Any]]:
    """The parts of what np.pad makes, in order, and what is to be copied into each: x, parts that
    were copied before, or the value."""
    sizes = [n - sum(pair) for n, pair in zip(out.shape, around, strict=True)]
    inside = (slice(before, before + n) for n, (before, _) in zip(sizes, around, strict=True))
    yield out[tuple(inside)], x
    for axis, (n, (before, behind)) in enumerate(zip(sizes, around, strict=True)):
        y, end = out.swapaxes(0, axis), before + n
        first, last = {
            "edge": (y[before : before + 1], y[end - 1 : end]),
            "reflect": (y[before + 1 : 2 * before + 1][::-1], y[end - 1 - behind : end - 1][::-1]),
            "wrap": (y[n : n + before], y[before : before + behind]),
        }.get(mode, (value, value))
        if before:
            yield y[:before], first
        if behind:
            yield y[end:], last


def _is_plain(key: Any) -> bool:
    return isinstance(key, tuple) and all(isinstance(part, slice) for part in key)


def _picked_once(shape: Shape, keys: Sequence[tuple[slice, ...]]) -> tuple[bool, bool]:
    """Whether keys of slices pick no element twice, and whether they pick all of them."""
    counts = np.zeros((1,) * len(shape), "int32")
    for i, n in enumerate(shape):  # an axis that no key cuts counts as one element
        if any(key[i].indices(n) != (0, n, 1) for key in keys if i < len(key)):
            counts = np.repeat(counts, n, axis=i)
    for key in keys:
        counts[key] += 1
    return bool((counts <= 1).all()), bool((counts >= 1).all())


def _scatter(
    out: HostArray, keys: Sequence[Any], picked_once: tuple[bool, bool], *values: HostArray
) -> None:
    """Each value added at its key in zeros, which are read and written only where they have to."""
    apart, everywhere = picked_once
    if not (apart and everywhere):
        out[...] = 0
    for key, value in zip(keys, values, strict=True):
        if apart:
            out[key] = value
        else:
            np.add(out[key], value, out=out[key])


def _bounds_many(name: str, inputs: tuple[Any, ...], shape: Shape, dtype: np.dtype[Any]) -> bool:
    """Whether a step is maximum or minimum of many floats and one number."""
    if name not in ("maximum", "minimum") or prod(shape) < MANY or dtype.kind != "f":
        return False
    return isinstance(inputs[0], Value) and isinstance(inputs[1], int | float)


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


def _over_columns(fn: Callable[..., Any], out: HostArray, x: HostArray) -> None:
    """fn(x, axis=1), of x transposed: NumPy starts anew for each row, which takes ten times as long
    for rows of ten numbers."""
    flat = out[:, 0] if out.ndim == 2 else out
    for start in range(0, len(x), PIECE):
        fn(x[start : start + PIECE].T.copy(), axis=0, out=flat[start : start + PIECE])


def _bias(product: Step, after: Step, layout: Layout) -> Value | None:
    """What the step after a product adds to each of its lines, in place."""
    y, total = product.outputs[0], after.outputs[0]
    if after.name != "add" or after.inputs[0] is not y or layout.of.get(total) != layout.of[y]:
        return None
    bias = after.inputs[1]
    fits = isinstance(bias, Value) and (bias.shape, bias.dtype) == (y.shape[-1:], y.dtype)
    return bias if fits else None


def _summed_columns(out: HostArray, x: HostArray, ones: HostArray) -> None:
    """The sum of each row as a product, in a tenth of the time that NumPy takes for short rows."""
    np.dot(x, ones, out=out.reshape(-1))


def _worth_binding(program: Bodied, value: Value) -> bool:
    """Whether bodies read an input, or it is looked at by what is no method of an array."""
    for step in program.steps:
        view = step.outputs[0].root is value and step.name not in _METHODS
        if view or (step in program.bodies and any(v.root is value for v in step.values)):
            return True
    return False


def _flat(inputs: tuple[Any, ...]) -> bool:
    """Whether a product is of two matrices of one type, which np.dot starts sooner."""
    a, b = inputs
    matrices = all(isinstance(x, Value) and len(x.shape) == 2 for x in inputs)
    return matrices and a.dtype == b.dtype and a.dtype.name in ("float32", "float64")


def _in_order(value: Value) -> Value:
    """What a result lies in, if it is only another shape of it."""
    while value.memory is not None and value.step is not None and value.step.name in _SAME_ORDER:
        value = value.memory
    return value
