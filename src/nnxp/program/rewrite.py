"""Programs made into other programs that answer the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nnxp import kernels
from nnxp.program.program import Program, replay, trace
from nnxp.program.recording import again
from nnxp.program.traced import Step, Value, record

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
    """The program for rows of a wider type, if the first thing it does is to centre them.

    What is left after a large mean was subtracted is rounded to the program's type, not the rows
    themselves. A program that does something else with its rows stays as it is.
    """
    (x,) = program.inputs
    uses = [step for step in program.steps if x in step.values]
    if len(uses) != 1 or uses[0].function not in CENTRING or uses[0].inputs[0] is not x:
        return program
    narrow = x.dtype

    def change(step: Step, arrays: tuple[Any, ...]) -> Any:
        made = repeated(step, arrays)
        return made.astype(narrow) if step is uses[0] else made

    return rewritten(program, change, [Value(x.shape, np.dtype(dtype), name=x.name)])
