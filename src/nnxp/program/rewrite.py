"""Programs made into other programs that answer the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from nnxp import kernels
from nnxp._arrays import HostArray, is_array, is_floating
from nnxp.program.program import Program, replay, trace
from nnxp.program.recording import again
from nnxp.program.traced import Step, Value, current_tape, ndarray, record

CENTRING = (kernels.standardize, kernels.batch_norm)
"""Kernels that take away from the rows what is large in them."""


def repeated(step: Step, arrays: tuple[Any, ...]) -> Any:
    """The step noted again."""
    if isinstance(step.function, str | kernels.Kernel):
        return record(step.function, arrays, step.options)
    return again(step, arrays)


def with_precision(program: Program, precision: str) -> Program:
    """The program with products of this precision."""

    def change(step: Step, arrays: tuple[Any, ...]) -> Any:
        if step.function in (kernels.linear, kernels.matmul):
            return record(step.function, arrays, step.options | {"precision": precision})
        return repeated(step, arrays)

    return rewritten(program, change, program.inputs)


def rewritten(program: Program, change: Callable[..., Any], inputs: Sequence[Value]) -> Program:
    """The program with `change(step, arrays)` for each of its steps, for inputs like these."""
    values = [Value(v.shape, v.dtype, name=v.name) for v in inputs]
    made = trace(lambda *given: tuple(replay(program, given, change)), *values)
    return Program(made.inputs, made.outputs, made.steps, program.calls, program.several)


def in_their_own_type(program: Program, dtype: np.dtype[Any]) -> Program:
    """The program for rows of this type, if it is wider and the first thing is to centre them.

    What is left after a large mean was subtracted is rounded to the program's type, not the rows
    themselves. Whole numbers of which the program's type may not hold all are taken as float64. A
    program that does something else with its rows stays as it is.
    """
    (x,) = program.inputs
    if dtype.kind in "iu" and dtype.itemsize >= x.dtype.itemsize:
        dtype = np.dtype("float64")
    if not is_floating(dtype) or dtype.itemsize <= x.dtype.itemsize:
        return program
    uses = [step for step in program.steps if x in step.values]
    if len(uses) != 1 or uses[0].function not in CENTRING or uses[0].inputs[0] is not x:
        return program
    narrow = x.dtype

    def change(step: Step, arrays: tuple[Any, ...]) -> Any:
        made = repeated(step, arrays)
        return made.astype(narrow) if step is uses[0] else made

    return rewritten(program, change, [Value(x.shape, np.dtype(dtype), name=x.name)])


def merged(program: Program) -> Program:
    """The program with what is computed twice computed once."""
    made: dict[Any, Any] = {}

    def change(step: Step, arrays: tuple[Any, ...]) -> Any:
        current_tape().path = step.path
        key = _key(step, arrays)
        if step.name in ("reshape", "broadcast_to") and step.outputs[0].shape == arrays[0].shape:
            return arrays[0]
        if key is None:
            return repeated(step, arrays)
        if key not in made:
            made[key] = arrays, repeated(step, arrays)  # arrays live on: an id is not used again
        return made[key][1]

    inputs = [Value(v.shape, v.dtype, name=v.name) for v in program.inputs]
    new = trace(lambda *given: tuple(replay(program, given, change)), *inputs)
    return Program(new.inputs, new.outputs, new.steps, program.calls, program.several)


def _key(step: Step, arrays: tuple[Any, ...]) -> Any:
    """What a step's results follow from, to be looked up; None for what cannot be."""
    if not isinstance(step.function, str | kernels.Kernel):
        return None
    inputs = tuple(
        id(_same_numbers(each)) if isinstance(each, ndarray) else (type(each), repr(each))
        for each in arrays
    )
    options = tuple(step.options.items())
    if any(is_array(each) for _, option in options for each in _leaves(option)):
        return None
    return step.function, inputs, repr(options)


def _same_numbers(x: ndarray) -> Any:
    return x.value if x.value.numbers is None else x.value.numbers


def _leaves(option: Any) -> Any:
    if isinstance(option, tuple | list):
        for each in option:
            yield from _leaves(each)
    else:
        yield option


def placed(program: Program, move: Callable[[HostArray], Any]) -> Program:
    """The program with its host constants as `move` makes them: for arrays that are elsewhere."""
    moved: dict[int, Any] = {}

    def at(x: Any) -> Any:
        if isinstance(x, np.ndarray):
            if id(x) not in moved:
                moved[id(x)] = x, move(x)  # x lives on: its id is not used again
            return moved[id(x)][1]
        if isinstance(x, Value) and type(x.numbers) is np.ndarray:
            return Value(x.shape, x.dtype, at(x.numbers), x.name)
        if isinstance(x, tuple | list):
            return type(x)(map(at, x))
        return x

    steps = tuple(
        replace(
            step,
            inputs=tuple(map(at, step.inputs)),
            options={name: at(option) for name, option in step.options.items()},
        )
        for step in program.steps
    )
    outputs = tuple(map(at, program.outputs))
    return Program(program.inputs, outputs, steps, program.calls, program.several)
