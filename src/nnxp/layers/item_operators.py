"""ONNX operators over sequences of arrays, and over what may be there or not.

A sequence has as many items in a program as it had when that was written out.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nnxp._arrays import Array, HostArray
from nnxp._errors import ShapeError
from nnxp.layers.operators import Items, beside, ints, operator, xp_of


def _place(position: HostArray | None, count: int, what: str) -> int:
    """The place of an item, counted from the front; the last one without a position."""
    at = count - 1 if position is None else int(position.item())
    if not -count <= at < count:
        raise ShapeError(f"{what} {at} of a sequence of {count}")
    return at % count


@operator("SequenceConstruct", as_is=True)
def sequence_construct(*arrays: Array) -> Items:
    return Items(arrays)


@operator("SequenceEmpty", as_is=True)
def sequence_empty(*, dtype: str = "float32") -> Items:
    return Items()


@operator("SequenceAt", numbers="position", as_is=True)
def sequence_at(items: Items, position: HostArray) -> Array:
    return items[_place(position, len(items), "item")]


@operator("SequenceInsert", numbers="position", as_is=True)
def sequence_insert(items: Items, x: Array, position: HostArray | None = None) -> Items:
    at = len(items) if position is None else _place(position, len(items) + 1, "place")
    if position is not None and int(position.item()) < 0:
        at = _place(position, len(items), "place")
    return Items((*items[:at], x, *items[at:]))


@operator("SequenceErase", numbers="position", as_is=True)
def sequence_erase(items: Items, position: HostArray | None = None) -> Items:
    at = _place(position, len(items), "item")
    return Items(items[:at] + items[at + 1 :])


@operator("SequenceLength", as_is=True)
def sequence_length(items: Items) -> Array:
    return np.array(len(items))


@operator("SplitToSequence", numbers="split", as_is=True)
def split_to_sequence(
    x: Array, split: HostArray | None = None, *, axis: int = 0, keepdims: int = 1
) -> Items:
    """Parts of x along an axis: of these lengths, of one length, or single places."""
    xp, n, sizes = xp_of(x), x.shape[axis], ints(split)
    if split is None or split.ndim == 0:
        (size,) = sizes or [1]
        if size < 1:
            raise ShapeError(f"SplitToSequence into parts of {size}")
        sizes = [min(size, n - start) for start in range(0, n, size)]
    if sum(sizes) != n:
        raise ShapeError(f"SplitToSequence of {n} into {sizes}")
    parts = xp.split(x, [int(end) for end in np.cumsum(sizes)[:-1]], axis=axis)
    if split is None and not keepdims:
        parts = [xp.squeeze(part, axis) for part in parts]
    return Items(parts)


@operator("ConcatFromSequence", as_is=True)
def concat_from_sequence(items: Items, *, axis: int, new_axis: int = 0) -> Array:
    like = next((x for x in items if not isinstance(x, np.ndarray)), None)
    arrays = [x if like is None else beside(x, like) for x in items]
    if not arrays:
        raise ShapeError("ConcatFromSequence of no items")
    xp = xp_of(arrays[0])
    return xp.stack(arrays, axis=axis) if new_axis else xp.concatenate(arrays, axis=axis)


@operator("Optional", as_is=True)
def optional(x: Any = None, *, type: Any = None) -> Any:
    return x


@operator("OptionalHasElement", as_is=True)
def optional_has_element(x: Any = None) -> Array:
    return np.array(x is not None)


@operator("OptionalGetElement", as_is=True)
def optional_get_element(x: Any) -> Any:
    if x is None:
        raise ShapeError("OptionalGetElement of what is not there")
    return x
