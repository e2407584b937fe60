"""Programs made into other programs that answer the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from nnxp import kernels
from nnxp._arrays import HostArray, is_array, is_floating
from nnxp._library import KINDS
from nnxp.program.program import Program, replay, trace
from nnxp.program.recording import again
from nnxp.program.traced import (
    Step,
    Value,
    current_tape,
    is_constant,
    lifted,
    ndarray,
    perform,
    record,
)

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


def optimized(program: Program) -> Program:
    """The program without what it need not do, the same up to rounding.

    Orders of axes go behind what does not mind them, element by element, and end where they undo
    each other. What is done to each output of a product goes into it: a batch norm into its
    weights, a bias and an activation to where it lies.
    """
    uses = Counter(v for step in program.steps for v in step.values)
    uses.update(program.outputs)

    def lone(value: Value) -> bool:
        """Whether nobody else looks at a value, or at what it is another order of."""
        while uses[value] == 1 and value.step is not None and value.step.name in ORDERS:
            value = value.step.values[0]
        return uses[value] == 1

    def change(step: Step, arrays: tuple[Any, ...]) -> Any:
        made = _reordered(step, arrays)
        if made is None and step.values and lone(step.values[0]):
            made = _joined(step, arrays)
        return repeated(step, arrays) if made is None else made

    def moved(step: Step, arrays: tuple[Any, ...]) -> Any:
        """The step on arrays whose axes are in the order of what they were made of."""
        axes = next((order[1] for order in map(_order, arrays) if order), None)
        if axes is None or not _commutes(step):
            return change(step, arrays)
        parts = [_undone(x, axes) for x in arrays]
        if any(part is NotImplemented for part in parts):
            return change(step, arrays)
        if step.name == "concatenate":
            along = {"axis": axes[step.options.get("axis", 0)]}
            made = record("concatenate", tuple(parts), along)
        else:
            made = change(step, tuple(parts))
        return record("transpose", (made,), {"axes": axes})

    return rewritten(program, moved, program.inputs)


ORDERS = ("transpose", "moveaxis", "swapaxes")
"""Functions that order axes otherwise."""
PRODUCTS = (kernels.linear, kernels.conv, kernels.conv_transpose)
"""Kernels with outputs last, weights (..., outputs), a bias and an activation."""


def _order(x: Any) -> tuple[Any, tuple[int, ...]] | None:
    """What x is only another order of, and the places of its axes there."""
    step = x.value.step if isinstance(x, ndarray) else None
    if step is None or step.name not in ORDERS:
        return None
    places = np.broadcast_to(np.float32(0), tuple(range(x.ndim)))
    return lifted(step.inputs[0]), perform(np, step, [places]).shape


def _commutes(step: Step) -> bool:
    """Whether a step does the same to each element, wherever it is, or only joins arrays."""
    if isinstance(step.function, kernels.Kernel):
        return step.name in kernels.ACTIVATIONS and len(step.inputs) == 1
    if KINDS.get(step.name) not in ("elementwise", "comparison"):
        return step.name == "concatenate"
    return step.name not in ("assign", "tril", "triu")


def _undone(x: Any, axes: tuple[int, ...]) -> Any:
    """x in the order of axes before they were put into this one; NotImplemented if that is work."""
    order = _order(x)
    if order and order[1] == axes:
        return order[0]
    if not isinstance(x, ndarray) or x.ndim == 0:
        return x
    if not is_constant(x) or x.ndim > len(axes):
        return NotImplemented
    full = x.reshape((1,) * (len(axes) - x.ndim) + x.shape)
    return full.transpose(tuple(int(at) for at in np.argsort(axes)))


def _reordered(step: Step, arrays: tuple[Any, ...]) -> Any:
    """One order of axes for two, and none for what is left as it was."""
    if step.name not in ORDERS:
        return None
    made = repeated(step, arrays)
    order, before = _order(made), _order(arrays[0])
    if order is None:
        return made
    x, axes = order
    if before is not None:
        x, axes = before[0], tuple(before[1][axis] for axis in axes)
    if axes == tuple(range(len(axes))):
        return x
    return made if before is None else record("transpose", (x,), {"axes": axes})


def _joined(step: Step, arrays: tuple[Any, ...]) -> Any:
    """A product with what is done to its outputs; None for what cannot go into it."""
    product = arrays[0].value.step if isinstance(arrays[0], ndarray) else None
    if product is None or product.function not in (*PRODUCTS, kernels.matmul):
        return None
    options = dict(product.options)
    if step.function is kernels.max_pool and product.function is kernels.conv:
        return _pooled(step, product)
    if options.get("activation", kernels.identity) is not kernels.identity:
        return None
    x, weight, bias = (*map(lifted, product.inputs), None)[:3]
    function: Any = kernels.linear if product.function is kernels.matmul else product.function
    if isinstance(step.function, kernels.Kernel) and _commutes(step) and not step.options:
        return record(function, (x, weight, bias), options | {"activation": step.function})
    if not all(each is None or is_constant(each) for each in arrays[1:]):
        return None
    if step.name == "add" and len(arrays[1].shape) == 1 and arrays[0].dtype.itemsize > 2:
        if arrays[1].shape != weight.shape[-1:] or arrays[1].dtype != weight.dtype:
            return None
        return record(
            function, (x, weight, arrays[1] if bias is None else bias + arrays[1]), options
        )
    types = {each.dtype for each in (weight, *arrays) if each is not None}
    wide = len(types) == 1 and weight.dtype.itemsize > 2
    if step.function is kernels.batch_norm and is_constant(weight) and wide:
        mean, var, gain, shift = (*arrays[1:], None, None)[:4]
        scale = (var + step.options.get("eps", 1e-5)) ** -0.5
        scale = scale if gain is None else scale * gain
        moved = -mean * scale if bias is None else (bias - mean) * scale
        moved = moved if shift is None else moved + shift
        return record(function, (x, weight * scale, moved), options)
    return None


def _pooled(step: Step, product: Step) -> Any:
    """A convolution with the pool behind it, if its windows lie one next to another."""
    options, window = step.options, step.options["window"]
    axes = len(window)
    plain = {
        "stride": (None, window),
        "padding": (0, "valid", ((0, 0),) * axes),
        "dilation": (1, (1,) * axes),
        "ceil_mode": (False,),
    }
    if any(name in options and options[name] not in values for name, values in plain.items()):
        return None
    if "precision" in product.options or product.inputs[0].dtype.itemsize == 2:
        return None  # what bodies do with 16 bits themselves is not to be widened
    arrays = tuple(map(lifted, product.inputs))
    return record(kernels.conv_max_pool, arrays, product.options | {"window": window})


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
