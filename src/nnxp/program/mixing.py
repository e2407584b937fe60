"""Does a program treat each row on its own? Only then can rows go through it in blocks."""

from __future__ import annotations

from math import prod
from typing import Any

from nnxp._arrays import Shape
from nnxp._library import KINDS
from nnxp.kernels._dispatch import Kernel
from nnxp.kernels.functions import einsum_terms, met_axes
from nnxp.program.program import Program, expanded
from nnxp.program.traced import (
    ROWS,
    Step,
    Value,
    axes_of,
    counts_rows,
    full_index,
    record,
    shape_text,
)


def mixing(program: Program) -> str:
    """What mixes rows, in words; empty if each row is treated on its own.

    Kernels are to be expanded, by `expanded_as_needed`, but for those that are known to treat each
    row on its own.
    """
    outer = dict.fromkeys(program.inputs, 1)
    for step in program.steps:
        outside = {outer[v] for v in step.values if v in outer and _counts(v)} or {1}
        mixed = len(outside) > 1 or (isinstance(step.function, str | Kernel) and _mixes(step))
        around = 0 if mixed else _around(step, outside.pop())
        if not around:
            return f"{step.path or 'the model'} mixes rows: {step.name} along the rows"
        outer.update(dict.fromkeys(step.outputs, around))
    for value in program.outputs:
        if not value.shape or value.shape[0] != ROWS or outer.get(value, 1) != 1:
            shape = shape_text(value.shape)
            return f"the model answers {shape} for (rows, ...): not a row for a row"
    return ""


def expanded_as_needed(program: Program) -> Program:
    """The program with those kernels expanded that are not known to treat each row on its own."""

    def noted(kernel: Kernel, arrays: tuple[Any, ...], options: dict[str, Any]) -> Any:
        known = kernel.outlines is not None or kernel.on_library("numpy") is not None
        return record(kernel, arrays, options) if known else kernel.widened(*arrays, **options)

    return expanded(program, noted)


def _counts(value: Value) -> bool:
    return any(map(counts_rows, value.shape))


def _around(step: Step, outer: int) -> int:
    """How many times the rows lie one after the other in the axis that counts them; 0 if cut.

    An axis of 6 * rows may be six groups of all rows, or for each row six of something. Only a
    reshape makes it another: what lies before the rows in memory stays before them.
    """
    if step.name != "reshape" or not _counts(step.values[0]):
        return outer
    (x, y) = step.values[0].shape, step.outputs[0].shape
    before = prod(x[: _axis(x)]) * outer
    axis = _axis(y)
    around, left = divmod(before, prod(y[:axis]))
    return 0 if left or y[axis] % (around * ROWS) else around


def _axis(shape: Shape) -> int:
    """The axis that counts rows."""
    return next(i for i, size in enumerate(shape) if counts_rows(size))


def _mixes(step: Step) -> bool:
    """Whether a step's results for one row may depend on another row, or on which row it is."""
    if any(_rows_squared(value.shape) for value in step.outputs):
        return True  # every row meets every other one
    if isinstance(step.function, Kernel) and step.function.outlines is not None:
        return any(map(counts_rows, [n for value in step.values for n in value.shape[1:]]))
    if not step.values:
        return step.name == "arange" and counts_rows(prod(step.outputs[0].shape))
    rule = _RULES.get(step.name) or _RULES.get(KINDS.get(step.name, ""))
    return rule is not None and bool(rule(step))


def _rows_squared(shape: Shape) -> bool:
    axes = [size for size in shape if counts_rows(size)]
    return len(axes) > 1 or any(size // ROWS % ROWS == 0 for size in axes)


def _along(default: Any) -> Any:
    """The rule for a function along its `axis=`, or along this one."""

    def rule(step: Step) -> bool:
        shape = step.values[0].shape
        axes = axes_of(step.options.get("axis", default), len(shape))
        return any(counts_rows(shape[axis]) for axis in axes)

    return rule


def _index_mixes(step: Step) -> bool:
    """Whether an index or an assignment tells one row from another."""
    shape = step.values[0].shape
    sizes = iter(shape)
    for k in full_index(step.options["key"], len(shape)):
        if k is not None and counts_rows(size := next(sizes)):
            whole = isinstance(k, slice) and k.indices(size) == (0, size, 1)
            if not whole:
                return True
    return False


def _concatenate_mixes(step: Step) -> bool:
    axis = step.options.get("axis", 0)
    return any(counts_rows(value.shape[axis]) for value in step.values)


def _take_mixes(step: Step) -> bool:
    """Rows may pick from a constant table, but nobody may pick rows."""
    return step.values[0].numbers is None and _along(None)(step)


def _einsum_mixes(step: Step) -> bool:
    parts = step.values
    terms, result = einsum_terms(step.options["subscripts"], [len(v.shape) for v in parts])
    return any(
        counts_rows(size) and letter not in result
        for letters, part in zip(terms, parts, strict=True)
        for letter, size in zip(letters, part.shape, strict=True)
    )


def _tensordot_mixes(step: Step) -> bool:
    a, b = (value.shape for value in step.values)
    met, _ = met_axes(step.options.get("axes", 2), len(a), len(b))
    return any(counts_rows(a[axis]) for axis in met)


def _tile_mixes(step: Step) -> bool:
    """Whether the rows themselves are repeated as a whole."""
    before, after = step.values[0].shape, step.outputs[0].shape
    pairs = zip(reversed(before), reversed(after), strict=False)
    return any(counts_rows(a) and a != b for a, b in pairs)


def _triangle_mixes(step: Step) -> bool:
    return any(map(counts_rows, step.values[0].shape[-2:]))


_RULES = {
    "reduction": _along(None), "sort": _along(-1), "argsort": _along(-1),
    "cumsum": _along(None), "cumprod": _along(None), "flip": _along(None), "roll": _along(None),
    "diff": _along(-1), "take_along_axis": _along(None), "take": _take_mixes,
    "getitem": _index_mixes, "assign": _index_mixes, "concatenate": _concatenate_mixes,
    "matmul": lambda step: counts_rows(step.values[0].shape[-1]),
    "dot": lambda step: counts_rows(step.values[0].shape[-1]),
    "einsum": _einsum_mixes, "tensordot": _tensordot_mixes, "tile": _tile_mixes,
    "tril": _triangle_mixes, "triu": _triangle_mixes, "diagonal": _triangle_mixes,
    "sliding_window_view": lambda step: step.values[0].shape[0] != step.outputs[0].shape[0],
}  # fmt: skip
