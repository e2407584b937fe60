"""Programs made into other programs that answer the same."""

from __future__ import annotations

from typing import Any

import numpy as np

from nnxp import kernels
from nnxp._arrays import is_floating
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

    wide = Value(x.shape, np.dtype(dtype), name=x.name)
    made = trace(lambda *inputs: tuple(replay(program, inputs, change)), wide)
    return Program(made.inputs, made.outputs, made.steps, program.calls, program.several)
