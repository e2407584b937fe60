"""Reverse mode: behind a program, the steps that make the gradients of what it answers.

A step passes what its result is worth back to what went in, as its rule says: for the functions of
the dialect `kernels.functions.RULES`, for a kernel `Kernel.vjp`. A kernel without a rule is written
out as what its reference body does. So a gradient is a program like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from nnxp._arrays import is_floating
from nnxp._errors import NotDifferentiable
from nnxp.kernels import Kernel, identity, max_pool, relu
from nnxp.kernels.functions import FLAT, RULES, Part, scattered
from nnxp.kernels.pool import sees_padding
from nnxp.program import traced as xp
from nnxp.program.program import Program, replay, trace
from nnxp.program.rewrite import merged
from nnxp.program.traced import (
    Step,
    Value,
    counts_rows,
    current_tape,
    lifted,
    ndarray,
    record,
)


def gradient(program: Program, of: Value, wrt: Sequence[Value], scale: float = 1.0) -> Program:
    """The program that answers what `program` does, and then the gradient of `of` by each of `wrt`.

    `of` is one of the outputs and a single number, `wrt` are inputs; a gradient has the shape and
    type of its input, and is `scale` times as large, so that 16 bits hold small ones. Raises
    NotDifferentiable, with the layer's path, for arithmetic without a gradient: a layer that looks
    at numbers, or a function without a rule.
    """
    if prod(of.shape) != 1:
        raise NotDifferentiable(
            f"the gradient is that of one number, such as a loss, not of {list(of.shape)}; "
            "x.mean() makes one of them, and nnxp.vjp takes what each of them is worth"
        )
    seed = np.full(of.shape, scale, of.dtype)
    return _differentiated(program, {of: seed}, wrt)


def pullback(program: Program, wrt: Sequence[Value]) -> Program:
    """The program that answers what `program` does, and then the gradients by each of `wrt`.

    Its inputs are those of `program`, and then, for each output, what a change of it is worth.
    """
    worth = {value: Value(value.shape, value.dtype) for value in program.outputs}
    return _differentiated(program, worth, wrt)


def _differentiated(program: Program, worth: dict[Value, Any], wrt: Sequence[Value]) -> Program:
    inputs = [Value(v.shape, v.dtype, name=v.name) for v in program.inputs]
    more = [value for value in worth.values() if isinstance(value, Value)]
    places = [program.inputs.index(value) for value in wrt]

    def both(*arrays: ndarray) -> tuple[ndarray, ...]:
        outputs = replay(program, arrays[: len(inputs)])
        ends = dict(zip(program.outputs, outputs, strict=True))
        dys = [(ends[value], lifted(dy)) for value, dy in worth.items()]
        sources = [arrays[i] for i in places]
        with np.errstate(all="ignore"):  # constants are computed with here
            return *outputs, *_reverse(list(current_tape().steps), dys, sources)

    whole = merged(trace(both, *inputs, *more, expands=_kernel))
    for step in whole.steps:
        if any(counts_rows(x) for x in step.inputs):
            raise NotDifferentiable(
                f"{step.path or 'the gradient'} computes with the number of rows, at {step.name}: "
                "write the formula out for a number of rows"
            )
    return Program(whole.inputs, whole.outputs, whole.steps, (), True)


def _kernel(kernel: Kernel, arrays: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """A kernel as one step, or as several where it has no rule or its activation is apart."""
    if kernel.rule is None:
        return kernel.widened(*arrays, **options)
    if kernel is max_pool:
        return _pooled(arrays[0], options)
    if not kernel.activates_last:
        return record(kernel, arrays, options)
    options = dict(options)
    activation = options.pop("activation", identity)
    if activation is identity:
        return record(kernel, arrays, options)
    z = record(kernel, tuple(map(_wide, arrays)), options)
    return _kernel(activation, (z,), {}).astype(arrays[0].dtype, copy=False)


def _pooled(x: ndarray, options: dict[str, Any]) -> Any:
    """max_pool(relu(x)) as relu(max_pool(x)), of which the gradients are the same, for fewer
    numbers; not where a window sees padding, which is -inf to a pool and 0 behind relu."""
    step = x.value.step
    if step is None or step.function is not relu or sees_padding(x, **options):
        return record(max_pool, (x,), options)
    return record(relu, (_pooled(lifted(step.inputs[0]), options),), {})


def _wide(x: Any) -> Any:
    """x in the type that kernels compute in."""
    narrow = isinstance(x, ndarray) and is_floating(x.dtype) and x.dtype.itemsize == 2
    return x.astype("float32") if narrow else x


def _reverse(
    steps: Sequence[Step], ends: Sequence[tuple[ndarray, ndarray]], wrt: Sequence[ndarray]
) -> list[ndarray]:
    """The gradients by each of `wrt` of what the ends, each with its worth, come to in all."""
    active = {x.value for x in wrt}
    for step in steps:
        if active.intersection(step.values):
            active.update(v for v in step.outputs if is_floating(v.dtype))
    known: dict[Value, list[Any]] = {}
    for y, dy in ends:
        known.setdefault(y.value, []).append(dy)
    for step in reversed(steps):
        if not active.intersection(step.outputs):
            continue
        dys = [_total(v, known.pop(v, [])) for v in step.outputs]
        if all(dy is None for dy in dys):
            continue
        current_tape().path = step.path
        for x, dx in zip(step.inputs, _passed_back(step, dys), strict=False):
            if isinstance(x, Value) and dx is not None and x in active:
                known.setdefault(x, []).append(dx)
    return [_gradient_of(x, known.get(x.value, [])) for x in wrt]


def _gradient_of(x: ndarray, dxs: list[Any]) -> ndarray:
    dx = _total(x.value, dxs)
    return xp.zeros(x.shape, x.dtype) if dx is None else dx


def _passed_back(step: Step, dys: list[Any]) -> Sequence[Any]:
    """What the inputs of a step get from what its results are worth."""
    if isinstance(step.function, str):
        if step.name in FLAT:
            return ()
        rule = RULES.get(step.name)
    else:
        rule = step.function.rule if isinstance(step.function, Kernel) else None
    if rule is None:
        raise NotDifferentiable(_no_gradient(step))
    dys = [
        xp.zeros(v.shape, v.dtype) if dy is None else dy
        for v, dy in zip(step.outputs, dys, strict=True)
    ]
    ys = [lifted(v) for v in step.outputs]
    inputs = tuple(lifted(x) for x in step.inputs)
    if isinstance(step.function, Kernel):
        dys, ys, inputs = list(map(_wide, dys)), list(map(_wide, ys)), tuple(map(_wide, inputs))
    several = step.several
    dxs = rule(dys if several else dys[0], ys if several else ys[0], *inputs, **step.options)
    if dxs is None:
        raise NotDifferentiable(_no_gradient(step))
    return dxs  # type: ignore[no-any-return]


def _no_gradient(step: Step) -> str:
    who = step.path or "the formula"
    if step.reason:
        return f"{who} has no gradient, because it is run as Python: {step.reason}"
    options = "".join(f", {name}={value!r:.40}" for name, value in step.options.items())
    return (
        f"{who}: nnxp knows no gradient of {step.name}(...{options}); write it with other "
        "functions, or as a kernel with a gradient rule, Kernel.vjp"
    )


def _total(value: Value, dxs: list[Any]) -> ndarray | None:
    """The sum of what a value got from each of its uses; None if that is nothing."""
    parts = [dx for dx in dxs if isinstance(dx, Part)]
    whole = [_fitted(dx, value) for dx in dxs if not isinstance(dx, Part)]
    if parts:
        gradients = [part.gradient.astype(value.dtype, copy=False) for part in parts]
        whole.append(scattered(gradients, value.shape, [part.key for part in parts]))
    if not whole:
        return None
    return sum(whole[1:], start=whole[0])


def _fitted(dx: ndarray, value: Value) -> ndarray:
    """dx summed over the axes along which the value was repeated, in its type."""
    shape = value.shape
    if dx.shape != shape:
        lead = dx.ndim - len(shape)
        if (
            lead
            and shape == dx.shape[-1:]
            and dx.dtype.itemsize >= 4
            and not any(map(counts_rows, dx.shape))
        ):
            rows = dx.reshape(-1, shape[0])  # BLAS adds rows up faster than a reduction does
            dx = xp.matmul(np.ones(rows.shape[0], dx.dtype), rows)
        else:
            axes = tuple(i for i in range(dx.ndim)
                         if i < lead or (shape[i - lead] == 1 != dx.shape[i]))  # fmt: skip
            dx = dx.sum(axis=axes).reshape(shape) if axes else dx
        if dx.shape != shape:  # a number that was given as what it would be repeated to
            dx = xp.broadcast_to(dx, shape)
    return dx.astype(value.dtype, copy=False)  # type: ignore[no-any-return]
