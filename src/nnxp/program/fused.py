"""Runs of elementwise steps as one step each: on CUDA one launch, and one pass over memory."""

from __future__ import annotations

from collections import defaultdict
from math import prod
from typing import Any

import numpy as np

from nnxp import kernels
from nnxp._arrays import is_floating, xp_of
from nnxp.kernels._windows import windows
from nnxp.kernels.activations import ELEMENTWISE
from nnxp.kernels.formula import (
    CHOICE,
    OF_BOOLEANS,
    OF_COMPARISONS,
    OF_FLOATS,
    Formula,
    Line,
    Place,
    elementwise,
)
from nnxp.program.program import Program
from nnxp.program.rewrite import rewritten
from nnxp.program.traced import Step, Value, again, record

BOOL = np.dtype(bool)
MOST_ARRAYS = 24  # that a run reads: a kernel has room for so many arguments


def fused(program: Program) -> Program:
    """The program with each run of two elementwise steps or more as one.

    A run has one result, and what its steps make besides is looked at in the run only; all have its
    shape, and what they read is broadcast to it.
    """
    runs = _runs(program)
    if not runs:
        return program
    member = {step for run in runs.values() for step in run}
    arrays_of: dict[Step, tuple[Any, ...]] = {}
    formulas: dict[str, Formula] = {}  # equal ones are one, as those of a recurrence are

    def change(step: Step, arrays: tuple[Any, ...]) -> Any:
        if step in member:
            arrays_of[step] = arrays
        if step not in runs:
            return again(step, arrays)
        read, lines = _written(runs[step], arrays_of)
        formula = formulas.setdefault(repr(lines), Formula(lines))
        return record(elementwise, read, {"formula": formula})

    return rewritten(program, change, program.inputs)


def _runs(program: Program) -> dict[Step, list[Step]]:
    """By its last step, the steps of each run, in their order."""
    users: dict[Value, set[Step]] = defaultdict(set)
    for step in program.steps:
        for value in step.values:
            users[value].add(step)
    place = {step: i for i, step in enumerate(program.steps)}
    runs: dict[Step, list[Step]] = {}
    taken: set[Step] = set()
    for last in reversed(program.steps):
        if last in taken or not _fits(last, last):
            continue
        run, waiting = {last}, [last]
        while waiting:
            for value in waiting.pop().values:
                maker = value.step
                if (
                    maker is not None
                    and maker in place
                    and maker not in run
                    and maker not in taken
                    and value not in program.outputs
                    and users[value] <= run
                    and _fits(maker, last)
                ):
                    run.add(maker)
                    waiting = list(run)  # what another step of it reads, too, may fit now
        in_order = sorted(run, key=place.__getitem__)
        if len(run) > 1 and _reads(in_order, last):
            runs[last] = in_order
            taken |= run
    return runs


def _fits(step: Step, last: Step) -> bool:
    """Whether a step may be in a run that ends with this one."""
    (result,), of = step.outputs[:1], last.outputs[0]
    if (
        step.several
        or result.shape != of.shape
        or not is_floating(of.dtype)
        or of.dtype.itemsize > 4
    ):
        return False
    if any(value.dtype not in (of.dtype, BOOL) for value in (result, *step.values)):
        return False
    if not all(isinstance(x, Value | int | float) for x in step.inputs):
        return False
    function, boolean = step.function, [_is_boolean(x) for x in step.inputs]
    if function in ELEMENTWISE:
        numbers = all(isinstance(x, int | float) for x in step.options.values())
        return numbers and len(step.inputs) == 1 and not any(boolean)
    if step.options or not isinstance(function, str):
        return False
    if function == CHOICE:
        return boolean[0] and result.dtype == of.dtype
    if function in OF_BOOLEANS:
        return all(boolean)
    if function in OF_COMPARISONS:
        return not all(boolean)
    return function in OF_FLOATS and result.dtype == of.dtype


def _is_boolean(x: Any) -> bool:
    return x.dtype == BOOL if isinstance(x, Value) else isinstance(x, bool)


def _reads(run: list[Step], last: Step) -> bool:
    """Whether one of the arrays that a run reads is as large as its result, and they are few."""
    read = set(_read(run))
    result = last.outputs[0]
    like = any((x.shape, x.dtype) == (result.shape, result.dtype) for x in read)
    return like and len(read) <= MOST_ARRAYS


def _read(run: list[Step]) -> list[Value]:
    """What a run reads, each once."""
    results = {step.outputs[0] for step in run}
    return [x for x in dict.fromkeys(x for step in run for x in step.values) if x not in results]


def _written(
    run: list[Step], arrays_of: dict[Step, tuple[Any, ...]]
) -> tuple[tuple[Any, ...], tuple[Line, ...]]:
    """What a run reads, of the arrays that its steps were given, and its lines."""
    result = run[-1].outputs[0]
    now = {
        value: array
        for step in run
        for value, array in zip(step.inputs, arrays_of[step], strict=True)
        if isinstance(value, Value)
    }
    read = _read(run)
    read.sort(key=lambda x: (x.shape, x.dtype) != (result.shape, result.dtype))
    places = {value: Place(i) for i, value in enumerate([*read, *(s.outputs[0] for s in run)])}
    lines = tuple(
        Line(step.function, tuple(places.get(x, x) for x in step.inputs), step.options)  # type: ignore[arg-type]
        for step in run
    )
    return tuple(now[x] for x in read), lines


WINDOWED = kernels.conv, kernels.max_pool, kernels.average_pool
TYPES = "float32", "float16", "bfloat16"


def as_counted(kernel: kernels.Kernel, arrays: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """For a Tape: a kernel as arrays of the sizes that it takes on CUDA, to count their memory.

    What looks through windows is not padded there, and 16 bits stay 16 bits until a product is
    made; any other kernel takes what its reference body does.
    """
    x, weight = (*arrays, None)[:2]
    if kernel not in WINDOWED or x.dtype.name not in TYPES or x.ndim > 5:
        return kernel.widened(*arrays, **options)
    window = options["window"] if weight is None else weight.shape[:-2]
    chosen = {k: v for k, v in options.items() if k in ("padding", "dilation", "ceil_mode")}
    stride = options.get("stride") or (window if weight is None else 1)
    over = windows(kernel.__name__, x, window, stride=stride, **chosen)
    activation = options.get("activation", kernels.identity)
    if min(map(min, over.pads)) < 0:
        return kernel.widened(*arrays, **options)
    if weight is None:
        return _new(x, (x.shape[0], *over.positions, x.shape[-1]), x.dtype)
    outputs, groups = weight.shape[-1], options.get("groups", 1)
    if groups > 1 and (weight.shape[-2] > 1 or activation not in ELEMENTWISE):
        return kernel.widened(*arrays, **options)
    if groups > 1:
        return _new(x, (x.shape[0], *over.positions, outputs), x.dtype)
    inner, size, lead = prod(weight.shape[:-1]), x.dtype.itemsize, (x.shape[0], *over.positions)
    columns = inner
    if set(over.window + over.stride) != {1} or any(map(any, over.pads)):
        columns = -(-inner * size // 16) * 16 // size  # as tensor cores want them
        lines = _new(x, (*lead, columns), x.dtype)
    else:
        lines = x.reshape(*lead, inner)
    wide = outputs if outputs * size % 16 == 0 else -(-outputs // 16) * 16
    one = x[(slice(0, 1),) * x.ndim].reshape(1, 1)
    twice = _new(one, (columns, 2 * wide), "float32")  # weights that are widened, in both ways
    y = xp_of(x).matmul(lines, twice[:, :wide])
    y = y if wide == outputs else y[..., :outputs]
    return y if size > 2 else y.astype(x.dtype)


def _new(x: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """A new array of the first element of each row of x, which is there until it is made."""
    first = x[:, *(slice(0, 1) for _ in shape[1:])]
    repeated = xp_of(x).broadcast_to(first, shape)
    return repeated.copy() if x.dtype == dtype else repeated.astype(dtype)
