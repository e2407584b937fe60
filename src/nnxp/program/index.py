"""x[key] with arrays of whole numbers in the key, which may not be known yet.

What a row picks by its own number, as in `x[arange(rows), ids]`, is its own: that is written as
what each row picks from itself, so that rows can still go through in blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from math import prod
from typing import Any, NamedTuple

import numpy as np

from nnxp._arrays import Array, Shape, is_array, xp_of
from nnxp.program.traced import (
    Step,
    Value,
    counts_rows,
    full_index,
    lifted,
    ndarray,
    record,
    value_of,
)


def indexed(x: Array, key: Any) -> Array:
    """x[key] as torch means it: whole numbers in the key come before its arrays.

    With a mask in the key, x[key] as it is.
    """
    keys = tuple(key) if isinstance(key, tuple) else (key,)
    keys = tuple(_array(k, x) if isinstance(k, tuple | list) else k for k in keys)
    arrays = [k for k in keys if is_array(k) and k.ndim]
    if not arrays or any(k.dtype == np.bool_ for k in arrays):
        return x[keys]
    entries = full_index(keys, x.ndim)
    picks = [is_array(k) and k.ndim > 0 for k in entries]
    x = x[tuple(slice(None) if pick else k for k, pick in zip(entries, picks, strict=True))]
    left = [pick for k, pick in zip(entries, picks, strict=True) if k is None or not _is_number(k)]
    axes = [axis for axis, pick in enumerate(left) if pick]
    if axes[-1] - axes[0] >= len(axes):  # not next to each other: what they pick comes first
        x, axes = xp_of(x).moveaxis(x, axes, range(len(axes))), list(range(len(axes)))
    if not isinstance(x, ndarray) and not any(isinstance(k, ndarray) for k in arrays):
        return x[(slice(None),) * axes[0] + tuple(arrays)]
    return _picked(x, arrays, axes[0])


def own_places(x: Array, ids: Array) -> Array | None:
    """x[ids], of an x (rows * n, ...) whose ids are the number of their row, times n, and a place
    below n: what each row picks among its own. None for other ids."""
    step = _step(ids)
    if step is not None and step.name == "reshape" and ids.ndim == 1:
        inner = lifted(step.inputs[0])
        own = own_places(x, inner) if inner.ndim > 1 else None
        return None if own is None else own.reshape(*ids.shape, *x.shape[1:])
    numbering = _numbering(ids)
    if numbering is None or x.shape[0] != ids.shape[0] * numbering.times:
        return None
    times, rest = numbering
    known = _numbers(rest)
    if known is None:  # those below 0 are places of another row, which are refused as those beyond
        rest = xp_of(rest).where(rest < 0, times, rest)
    elif known.size and (known.min() < 0 or known.max() >= times):
        return None
    return _own(x.reshape(ids.shape[0], times, *x.shape[1:]), rest, ids.shape)


def on_one_axis(ids: Sequence[Any], sizes: Shape) -> Any:
    """The places, on one axis instead of several of these sizes, of what ids on each of them pick.

    An id beyond its own axis is beyond the one axis, too, so that it is refused there.
    """
    at: Any = 0
    for k, n in zip(ids, sizes, strict=True):
        at = at * n + k % n + prod(sizes) * ((k < -n) | (k >= n))
    return at


def last_axis(ids: Array) -> list[Array]:
    """The arrays that lie beside each other along the last axis."""
    step = _step(ids)
    if step is not None and step.name == "concatenate" and len(step.inputs) == ids.shape[-1]:
        parts = [lifted(x) for x in step.inputs]
        if step.options.get("axis", 0) in (-1, ids.ndim - 1):
            return [x.reshape(x.shape[:-1]) for x in parts]
    return [ids[..., i] for i in range(ids.shape[-1])]


def _array(x: Any, like: Array) -> Array:
    """Whole numbers in a tuple, or in a tuple of tuples, as an array of the library of `like`."""
    return xp_of(like).asarray(np.asarray(x))


def _is_number(key: Any) -> bool:
    return not isinstance(key, slice) and not (is_array(key) and key.ndim)


def _picked(x: Array, ids: Sequence[Array], axis: int) -> Array:
    """x[..., *ids], the first of them along this axis: what lies on several axes as on one."""
    placed = own_places(x, ids[0]) if axis == 0 and len(ids) == 1 else None
    if placed is not None:
        return placed
    shape = np.broadcast_shapes(*(k.shape for k in ids))
    own = axis == 0 and _is_row(ids[0]) and shape[0] == x.shape[0] and ids[0].ndim == len(shape)
    if own:
        ids, axis = ids[1:], 1
    sizes = x.shape[axis : axis + len(ids)]
    x = x.reshape(*x.shape[:axis], prod(sizes), *x.shape[axis + len(sizes) :])
    at = ids[0] if len(ids) == 1 else on_one_axis(ids, sizes)
    return _own(x, at, shape) if own else xp_of(x).take(x, at, axis=axis)


def _own(x: Array, ids: Any, shape: Shape) -> Array:
    """x[r, ids[r]] of each row r, for ids that broadcast to this shape.

    x (rows, n, ...), shape (rows, ...) -> (*shape, ...)
    """
    xp, inner, items = xp_of(x), shape[1:], x.shape[2:]
    at = ids if is_array(ids) else np.asarray(ids, "int64")
    if at.ndim == len(shape) and at.shape[0] == 1:
        at = at.reshape(at.shape[1:])
    at = lifted(at)
    if at.ndim < len(shape):  # the same for all rows
        return xp.take(x, xp.broadcast_to(at, inner), axis=1)
    at = xp.broadcast_to(at, shape).reshape(shape[0], prod(inner), *(1,) * len(items))
    return xp.take_along_axis(x, at, axis=1).reshape(*shape, *items)


class _Numbering(NamedTuple):
    """Whole numbers that are so many times the number of the row on axis 0, and the rest."""

    times: int
    rest: Any  # an array, or a number


def _numbering(x: Any) -> _Numbering | None:
    """How whole numbers follow from the number of their row; None for those that do not."""
    step = _step(x)
    if step is None or x.dtype.kind not in "iu" or not x.shape or not counts_rows(x.shape[0]):
        return None
    if step.name == "arange":
        start, stop, by = (step.options.get(name) for name in ("start", "stop", "step"))
        bounds = (0, start) if stop is None else (start, stop)
        return _Numbering(1, 0) if bounds == (0, x.shape[0]) and by in (None, 1) else None
    if step.name in _MOVING or _inserts_axes(step):
        (inner,) = map(lifted, step.inputs)
        numbering = _numbering(inner) if inner.shape[:1] == x.shape[:1] else None
        if numbering is None or not isinstance(numbering.rest, ndarray):
            return numbering
        rest = record("broadcast_to", (numbering.rest,), {"shape": inner.shape})
        return _Numbering(numbering.times, record(step.name, (rest,), step.options))
    if step.name not in ("add", "multiply"):
        return None
    for x, other in permutations(map(lifted, step.inputs)):
        numbering = _numbering(x) if getattr(x, "ndim", -1) == len(step.outputs[0].shape) else None
        if numbering is not None:
            return _sum(numbering, other) if step.name == "add" else _product(numbering, other)
    return None


def _sum(numbering: _Numbering, other: Any) -> _Numbering:
    return _Numbering(numbering.times, numbering.rest + other)


def _product(numbering: _Numbering, other: Any) -> _Numbering | None:
    """The numbering times a whole number above 0 that is known; None for another factor."""
    factor = _numbers(other)
    if factor is None or factor.size != 1 or factor.dtype.kind not in "iu" or factor.item() < 1:
        return None
    return _Numbering(numbering.times * int(factor.item()), numbering.rest * int(factor.item()))


def _is_row(x: Any) -> bool:
    """Whether x is the number of the row, and nothing else."""
    times, rest = _numbering(x) or (0, 0)
    return times == 1 and isinstance(rest, int) and rest == 0


def _inserts_axes(step: Step) -> bool:
    """Whether a step is x[:, None] or the like."""
    keys = full_index(step.options["key"], 0) if step.name == "getitem" else [0]
    return all(k is None or (isinstance(k, slice) and k == slice(None)) for k in keys)


_MOVING = frozenset(["astype", "broadcast_to", "copy", "expand_dims", "reshape", "squeeze"])
"""Functions that leave whole numbers as they are, and axis 0 where it is if it stays as long."""


def _step(x: Any) -> Step | None:
    value = value_of(x)
    return value.step if isinstance(value, Value) else None


def _numbers(x: Any) -> Any:
    """The numbers in x, if they are known."""
    value = value_of(x)
    return value.numbers if isinstance(value, Value) else np.asarray(value)
