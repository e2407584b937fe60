"""Programs made into other programs that answer the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple, TypeVar

import numpy as np

from nnxp import kernels
from nnxp._arrays import HostArray, Shape, is_array, is_floating, xp_of
from nnxp._library import KINDS
from nnxp.kernels._windows import windows
from nnxp.kernels.activations import ELEMENTWISE
from nnxp.program.patterns import kernel_for
from nnxp.program.program import Program, expanded, multiply_adds, replay, trace
from nnxp.program.traced import (
    Step,
    Value,
    again,
    current_tape,
    is_constant,
    lifted,
    ndarray,
    perform,
    record,
    value_of,
)

CENTRING = (kernels.standardize, kernels.batch_norm)
"""Kernels that take away from the rows what is large in them."""


def with_products(program: Program, precision: str | None = None) -> Program:
    """The program with products of matrices, and of stacks of them, as kernels of this precision.

    With a precision kernels that have products are written out, unless they have one, too.
    """

    def noted(kernel: kernels.Kernel, arrays: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if kernel.takes_precision:
            return record(kernel, arrays, options | chosen)
        step = Step(kernel, tuple(map(value_of, arrays)), options, "")
        if multiply_adds(step):
            return kernel.widened(*arrays, **options)
        return record(kernel, arrays, options)

    def change(step: Step, arrays: tuple[Any, ...]) -> Any:
        if step.name == "matmul" and isinstance(step.function, str):
            x, weight = arrays
            kernel = (weight.ndim == 2 and x.ndim > 0) or min(x.ndim, weight.ndim) > 2
            if kernel and x.dtype == weight.dtype and is_floating(x.dtype):
                return record(kernels.matmul, arrays, step.options | chosen)
        return again(step, arrays)

    chosen = {} if precision is None else {"precision": precision}
    if precision is not None:
        program = expanded(program, noted)
    elif not any(step.function == "matmul" for step in program.steps):
        return program
    return rewritten(program, change, program.inputs)


def written_out(program: Program, library: str) -> Program:
    """The program with what kernels do that have no body for an array library.

    In 16 bits they stay: written out they would keep their parameters in float32.
    """

    def noted(kernel: kernels.Kernel, arrays: tuple[Any, ...], options: dict[str, Any]) -> Any:
        narrow = any(getattr(x, "dtype", None) and x.dtype.itemsize == 2 for x in arrays)
        if narrow or kernel.on_library(library) is not None:
            return record(kernel, arrays, options)
        return kernel.widened(*arrays, **options)

    return expanded(program, noted)


def rewritten(
    program: Program,
    change: Callable[..., Any],
    inputs: Sequence[Value],
    answered: Callable[[Any], Any] = tuple,
) -> Program:
    """The program with `change(step, arrays)` for each of its steps, for inputs like these.

    The outputs are what `answered` makes of them. Which layers were at work is not known of it.
    """
    values = [Value(v.shape, v.dtype, name=v.name) for v in inputs]
    new = trace(lambda *arrays: answered(replay(program, arrays, change)), *values)
    return Program(new.inputs, new.outputs, new.steps, (), program.several)


def optimized(program: Program) -> Program:
    """The program without what it need not do, the same up to rounding.

    What is computed twice is computed once, and kernels that are written out are seen. Orders of
    axes go behind what does not mind them, element by element, and end where they undo each other.
    What is done to each output of a product goes into it: a batch norm into its weights, a bias and
    an activation to where it lies.
    """
    program = merged(program, _seen)
    uses = Counter(v for step in program.steps for v in step.values)
    uses.update(program.outputs)

    def lone(value: Value) -> bool:
        """Whether nobody else looks at a value, or at what it is another order of."""
        while uses[value] == 1 and value.step is not None and value.step.name in ORDERS:
            value = value.step.values[0]
        return uses[value] == 1

    def change(step: Step, arrays: tuple[Any, ...]) -> Any:
        changed = _reordered(step, arrays)
        if changed is None and step.function in RULES:
            for i in (0, 1) if step.function == "add" else (0,):
                x = step.inputs[i]
                product = _product(arrays[i]) if isinstance(x, Value) and lone(x) else None
                if product is not None and changed is None:
                    others = arrays[:i] + arrays[i + 1 :]
                    changed = RULES[step.function](product, step, *others)
        return again(step, arrays) if changed is None else changed

    def moved(step: Step, arrays: tuple[Any, ...]) -> Any:
        """The step on arrays whose axes are in the order of what they were made of."""
        if step.name == "copy":
            return arrays[0]  # a reshape that needs one notes it
        if step.name == "reshape":
            regrouped = _regrouped(arrays[0], step.outputs[0].shape)
            return change(step, arrays) if regrouped is None else regrouped
        axes = next((order[1] for order in map(_order, arrays) if order), None)
        if axes is None or not _commutes(step):
            return change(step, arrays)
        parts = [_undone(x, axes) for x in arrays]
        if any(part is NotImplemented for part in parts):
            return change(step, arrays)
        if step.name == "concatenate":
            along = {"axis": axes[step.options.get("axis", 0)]}
            result = record("concatenate", tuple(parts), along)
        else:
            result = change(step, tuple(parts))
        return record("transpose", (result,), {"axes": axes})

    return rewritten(program, moved, program.inputs)


def _seen(step: Step, arrays: tuple[Any, ...]) -> Any:
    """The step, or the kernel that is written out by it and by what is before it."""
    result = kernel_for(step, arrays)
    return again(step, arrays) if result is None else result


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
        return step.function in ELEMENTWISE and len(step.inputs) == 1
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


def _regrouped(x: Any, shape: Shape) -> Any:
    """x.reshape(shape), of x that is another order of axes, as another order of a reshape; None
    where none is better.

    Axes that become one are put together first. What lies together in memory stays last, so that
    channels that are shuffled go on lying behind the others.
    """
    order = _order(x)
    if order is None or 0 in x.shape:
        return None
    memory, axes = order
    groups = [([axes[axis] for axis in taken], new) for taken, new in _factors(x.shape, shape)]
    groups.sort(key=lambda group: max(group[0], default=-1))
    together = tuple(axis for taken, _ in groups for axis in taken)
    if together == axes:
        return None
    if together != tuple(range(memory.ndim)):
        memory = memory.transpose(together)
    new_axes = [axis for _, new in groups for axis in new]
    regrouped = record("reshape", (memory,), {"shape": tuple(shape[axis] for axis in new_axes)})
    if new_axes == sorted(new_axes):
        return regrouped
    return record("transpose", (regrouped,), {"axes": tuple(int(i) for i in np.argsort(new_axes))})


def _factors(before: Shape, after: Shape) -> Iterator[tuple[range, range]]:
    """The axes of a shape, in order, and the axes that a reshape makes of them, as few as can be at
    a time: none of those of one element at the end."""
    i = j = 0
    while i < len(before) or j < len(after):
        first = i, j
        i, j = min(i + 1, len(before)), min(j + 1, len(after))
        while (left := prod(before[first[0] : i])) != (right := prod(after[first[1] : j])):
            i, j = (i + 1, j) if left < right else (i, j + 1)
        yield range(first[0], i), range(first[1], j)


def _reordered(step: Step, arrays: tuple[Any, ...]) -> Any:
    """One order of axes for two, and none for what is left as it was."""
    if step.name not in ORDERS:
        return None
    reordered = again(step, arrays)
    order, before = _order(reordered), _order(arrays[0])
    if order is None:
        return reordered
    x, axes = order
    if before is not None:
        x, axes = before[0], tuple(before[1][axis] for axis in axes)
    if axes == tuple(range(len(axes))):
        return x
    return reordered if before is None else record("transpose", (x,), {"axes": axes})


class Product(NamedTuple):
    """A product with a weight: of a kernel with outputs last, weights (..., outputs) and a bias."""

    function: kernels.Kernel
    x: Any
    weight: Any
    bias: Any
    options: dict[str, Any]

    def having(self, weight: Any, bias: Any, **options: Any) -> Any:
        """It noted anew, with these; None if its activation comes between."""
        if self.options.get("activation", kernels.identity) is not kernels.identity:
            return None
        return record(self.function, (self.x, weight, bias), self.options | options)


def _product(x: Any) -> Product | None:
    """The product whose outputs x is; None for what is something else."""
    step = x.value.step if isinstance(x, ndarray) else None
    if step is None or step.function not in (*PRODUCTS, kernels.matmul, "matmul"):
        return None
    if step.function is kernels.matmul and step.values[1].shape[2:]:
        return None  # of stacks
    x, weight, bias = (*map(lifted, step.inputs), None)[:3]
    if step.function == "matmul" and not _of_a_layer(x, weight):
        return None
    function = step.function if step.function in PRODUCTS else kernels.linear
    assert isinstance(function, kernels.Kernel)
    return Product(function, x, weight, bias, step.options)


def _of_a_layer(x: Any, weight: Any) -> bool:
    """Whether x @ weight, in a formula, is what `linear` does."""
    shapes = x.ndim > 1 and weight.ndim == 2 and is_constant(weight)
    return shapes and x.dtype == weight.dtype and is_floating(x.dtype)


RULES: dict[Any, Callable[..., Any]] = {}
"""By function or kernel: how what it does to the outputs of a product goes into the product."""

Rule = TypeVar("Rule", bound=Callable[..., Any])


def rule(*functions: str | kernels.Kernel) -> Callable[[Rule], Rule]:
    """Decorator: what these do to the outputs of a product, this rule puts into the product.

    `rule(product, step, *others)`, with the step's other arrays, answers what the step does, or
    None where it must be left as it is.
    """

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions, function))
        return function

    return register


@rule(*kernels.ACTIVATIONS.values())
def _activation(product: Product, step: Step, *others: Any) -> Any:
    if others or step.options:
        return None
    return product.having(product.weight, product.bias, activation=step.function)


@rule("add")
def _bias(product: Product, step: Step, added: Any) -> Any:
    weight, bias = product.weight, product.bias
    narrow = step.outputs[0].dtype.itemsize <= 2
    if narrow or not is_constant(added) or added.dtype != weight.dtype:
        return None
    if added.shape[-1:] != weight.shape[-1:] or prod(added.shape) != weight.shape[-1]:
        return None
    if len(step.outputs[0].shape) > product.x.ndim:
        return None  # with axes more than the product has
    added = added.reshape(weight.shape[-1:])
    return product.having(weight, added if bias is None else bias + added)


@rule(kernels.batch_norm)
def _norm(product: Product, step: Step, *others: Any) -> Any:
    _, _, weight, bias, _ = product
    parameters = [array for array in (weight, *others) if array is not None]
    of_products = [step.outputs[0]] if bias is None else [step.outputs[0], bias]
    types = {array.dtype for array in (*parameters, *of_products)}
    if not all(map(is_constant, parameters)) or len(types) > 1 or weight.dtype.itemsize <= 2:
        return None
    mean, var, gain, shift = (*others, None, None)[:4]
    scale = (var + step.options.get("eps", 1e-5)) ** -0.5
    scale = scale if gain is None else scale * gain
    moved = -mean * scale if bias is None else (bias - mean) * scale
    return product.having(weight * scale, moved if shift is None else moved + shift)


@rule(kernels.max_pool)
def _pool(product: Product, step: Step) -> Any:
    """If its windows lie one next to another."""
    options = {name: option for name, option in step.options.items() if option is not None}
    window = tuple(options.pop("window"))
    over = windows("max_pool", lifted(step.inputs[0]), window, **{"stride": window} | options)
    if over.stride != window or any(map(any, over.pads)) or max(over.dilation) > 1:
        return None
    if product.function is not kernels.conv or product.x.dtype.itemsize == 2:
        return None  # what bodies do with 16 bits themselves is not to be widened
    arrays = product.x, product.weight, product.bias
    return record(kernels.conv_max_pool, arrays, product.options | {"window": window})


@rule(kernels.lstm)
def _lstm(
    product: Product, step: Step, weight: Any, projection: Any = None,
    h: Any = None, c: Any = None, lengths: Any = None,
) -> Any:  # fmt: skip
    if projection is not None or lengths is not None:
        return None
    return _recurrence(product, step, kernels.linear_lstm, (weight,), (h, c))


@rule(kernels.gru)
def _gru(
    product: Product, step: Step, weight: Any, bias: Any = None, h: Any = None, lengths: Any = None
) -> Any:
    if lengths is not None:
        return None
    return _recurrence(product, step, kernels.linear_gru, (weight, bias), (h,))


def _recurrence(
    product: Product, step: Step, kernel: kernels.Kernel, own: tuple[Any, ...],
    states: tuple[Any, ...],
) -> Any:  # fmt: skip
    """Of constant weights in float32 on the host, which oneDNN lays out once."""
    constants = product.weight, product.bias, *own
    numbers = [value_of(x).numbers for x in constants if x is not None]
    if not all(isinstance(x, np.ndarray) for x in numbers) or product.x.dtype != "float32":
        return None
    if product.function is not kernels.linear or product.options:
        return None
    return record(kernel, (product.x, *constants, *states), step.options)


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
        result = again(step, arrays)
        return result.astype(narrow) if step is uses[0] else result

    return rewritten(program, change, [Value(x.shape, np.dtype(dtype), name=x.name)])


def merged(program: Program, note: Callable[..., Any] = again) -> Program:
    """The program with what is computed twice computed once.

    `note(step, arrays)` notes what is computed.
    """
    noted: dict[Any, Any] = {}

    def change(step: Step, arrays: tuple[Any, ...]) -> Any:
        current_tape().path = step.path
        key = _key(step, arrays)
        if step.name in ("reshape", "broadcast_to") and step.outputs[0].shape == arrays[0].shape:
            return arrays[0]
        if key is None:
            return again(step, arrays)
        if key not in noted:
            noted[key] = arrays, note(step, arrays)  # arrays live on: an id is not used again
        return noted[key][1]

    return rewritten(program, change, program.inputs)


def _key(step: Step, arrays: tuple[Any, ...]) -> Any:
    """What a step's results follow from, to be looked up; None for what cannot be."""
    if not isinstance(step.function, str | kernels.Kernel):
        return None
    inputs = tuple(
        id(_same_numbers(array)) if isinstance(array, ndarray) else (type(array), repr(array))
        for array in arrays
    )
    options = tuple(step.options.items())
    if any(is_array(leaf) for _, option in options for leaf in _leaves(option)):
        return None
    return step.function, inputs, repr(options)


def _same_numbers(x: ndarray) -> Any:
    return x.value if x.value.numbers is None else x.value.numbers


def _leaves(option: Any) -> Any:
    if isinstance(option, tuple | list):
        for part in option:
            yield from _leaves(part)
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
        if isinstance(x, ndarray) and type(x.value.numbers) is np.ndarray:
            return lifted(at(x.value.numbers), x.value.name)
        if isinstance(x, tuple | list):
            return type(x)(map(at, x))
        return x

    def change(step: Step, arrays: tuple[Any, ...]) -> Any:
        options = {name: at(option) for name, option in step.options.items()}
        return again(replace(step, options=options), at(arrays))

    return rewritten(program, change, program.inputs, at)


def by_outputs(
    program: Program, liked: Collection[kernels.Kernel], laid_out: dict[int, Any]
) -> Program:
    """The program with constant weights of these kernels that lie output by output, as (o, ..., i).

    They keep their shapes, (..., i, o). What is `laid_out`, by the id of the weight, is taken from
    there, the rest is added to it. One input a group stays.
    """

    def change(step: Step, arrays: tuple[Any, ...]) -> Any:
        if step.function in liked and isinstance(arrays[1], ndarray):
            weight = arrays[1].value.numbers
            stack = step.function is kernels.matmul and weight is not None and weight.ndim > 2
            if weight is not None and weight.ndim > 1 and weight.shape[-2] > 1 and not stack:
                if id(weight) not in laid_out:
                    xp = xp_of(weight)
                    laid = xp.ascontiguousarray(xp.moveaxis(weight, -1, 0))
                    laid_out[id(weight)] = weight, xp.moveaxis(laid, 0, -1)
                arrays = arrays[0], lifted(laid_out[id(weight)][1]), *arrays[2:]
        return again(step, arrays)

    return rewritten(program, change, program.inputs)
