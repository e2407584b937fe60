"""The gradient rules of the dialect's functions: what a change of a result says of the arguments.

`rule(dy, y, *arrays, **options)` answers, for each of the arrays, the gradient of sum(dy * y): None
where there is none, a `Part` where only a part of the array was looked at. An array that was
repeated by broadcasting may get its gradient unsummed. Rules are written with the dialect alone, so
that the gradient of a formula is a formula.

Where a slope has two values, it is as torch has it: 0 for |x| at 0 and norm(x) at 0, half each for
the two sides of maximum and minimum at a tie, even shares among equal largest elements along an
axis, 1 for clip at its bounds. Round, floor, sign and the like are flat. NaN goes on where the
result looks at it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log, prod
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.array_utils import normalize_axis_tuple

from nnxp._arrays import Array, Shape, xp_of
from nnxp._library import compute

RULES: dict[str, Callable[..., Any]] = {}
"""The rule of each function by its name."""

FLAT = frozenset(
    """ceil floor floor_divide invert rint round sign trunc empty_like full_like ones_like
    zeros_like""".split()
)
"""Functions whose slope is zero wherever there is one."""


class Part(NamedTuple):
    """The gradient of x[key]: zero elsewhere in x."""

    gradient: Array
    key: Any


def _rule(names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(rule: Callable[..., Any]) -> Callable[..., Any]:
        RULES.update(dict.fromkeys(names.split(), rule))
        return rule

    return register


def scattered(values: Sequence[Array], shape: Shape, keys: Sequence[Any]) -> Array:
    """Zeros of this shape, with each value added at its key."""
    options = {"shape": shape, "keys": tuple(keys)}
    return compute(xp_of(values[0]), "scatter", tuple(values), options)


def segment_sum(values: Array, ids: Array, size: int) -> Array:
    """y[i] is the sum of the values whose id is i."""
    return type(values).apply("segment_sum", (values, ids), {"size": size}, None)


# elementwise

_SLOPES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "exp": lambda xp, x, y: y,
    "exp2": lambda xp, x, y: y * log(2),
    "expm1": lambda xp, x, y: y + 1,
    "log": lambda xp, x, y: 1 / x,
    "log2": lambda xp, x, y: 1 / log(2) / x,
    "log10": lambda xp, x, y: 1 / log(10) / x,
    "log1p": lambda xp, x, y: 1 / (x + 1),
    "sqrt": lambda xp, x, y: 0.5 / y,
    "square": lambda xp, x, y: x * 2,
    "reciprocal": lambda xp, x, y: -y * y,
    "absolute": lambda xp, x, y: xp.sign(x),
    "sin": lambda xp, x, y: xp.cos(x),
    "cos": lambda xp, x, y: -xp.sin(x),
    "tan": lambda xp, x, y: y * y + 1,
    "arcsin": lambda xp, x, y: 1 / xp.sqrt(1 - x * x),
    "arccos": lambda xp, x, y: -1 / xp.sqrt(1 - x * x),
    "arctan": lambda xp, x, y: 1 / (x * x + 1),
    "sinh": lambda xp, x, y: xp.cosh(x),
    "cosh": lambda xp, x, y: xp.sinh(x),
    "tanh": lambda xp, x, y: 1 - y * y,
    "arcsinh": lambda xp, x, y: 1 / xp.sqrt(x * x + 1),
    "arccosh": lambda xp, x, y: 1 / xp.sqrt(x * x - 1),
    "arctanh": lambda xp, x, y: 1 / (1 - x * x),
    "nan_to_num": lambda xp, x, y: xp.isfinite(x),
}


def _elementwise(slope: Callable[[Any, Any, Any], Any]) -> Callable[..., Any]:
    return lambda dy, y, x, **options: (dy * slope(xp_of(dy), x, y),)


RULES.update({name: _elementwise(slope) for name, slope in _SLOPES.items()})
RULES |= {
    "positive": lambda dy, y, x: (dy,),
    "negative": lambda dy, y, x: (-dy,),
    "copy": lambda dy, y, x: (dy,),
    "astype": lambda dy, y, x, dtype: (dy,),
    "add": lambda dy, y, a, b: (dy, dy),
    "subtract": lambda dy, y, a, b: (dy, -dy),
    "multiply": lambda dy, y, a, b: (dy * b, dy * a),
    "remainder": lambda dy, y, a, b: (dy, -dy * xp_of(dy).floor_divide(a, b)),
    "fmod": lambda dy, y, a, b: (dy, -dy * xp_of(dy).trunc(a / b)),
    "tril": lambda dy, y, x, k=0: (xp_of(dy).tril(dy, k),),
    "triu": lambda dy, y, x, k=0: (xp_of(dy).triu(dy, k),),
}


@_rule("divide")
def _divide(dy: Array, y: Array, a: Any, b: Any) -> tuple[Any, ...]:
    da = dy / b
    return da, -da * y


@_rule("power")
def _power(dy: Array, y: Array, a: Any, n: Any) -> tuple[Any, ...]:
    xp = xp_of(dy)
    if isinstance(n, int | float):
        return dy * (xp.power(a, n - 1) * n) if n else None, None
    base = xp.where(xp.equal(a, 0), 1, a)  # 0 to the power of n does not change with n
    less = xp.where(xp.equal(n, 0), 1, n - 1)  # nor is there a slope of a to the power of 0
    return dy * n * xp.power(a, less), dy * y * xp.log(base)


@_rule("arctan2")
def _arctan2(dy: Array, y: Array, a: Any, b: Any) -> tuple[Any, ...]:
    d = dy / (a * a + b * b)
    return d * b, -d * a


@_rule("hypot")
def _hypot(dy: Array, y: Array, a: Any, b: Any) -> tuple[Any, ...]:
    d = dy / _nonzero(y)
    return d * a, d * b


def _nonzero(y: Array) -> Array:
    """y, or 1 where it is 0."""
    return xp_of(y).where(xp_of(y).equal(y, 0), 1, y)


@_rule("logaddexp")
def _logaddexp(dy: Array, y: Array, a: Any, b: Any) -> tuple[Any, ...]:
    xp = xp_of(dy)
    return dy * xp.exp(a - y), dy * xp.exp(b - y)


def _extreme(name: str) -> Callable[..., Any]:
    """dy where an operand is the result, half of it where both are."""

    def rule(dy: Array, y: Array, a: Any, b: Any) -> tuple[Any, ...]:
        xp = xp_of(dy)
        first = xp.greater(a, b) if name.endswith("max") or name == "maximum" else xp.less(a, b)
        if name.startswith("f"):  # the other one, where one is NaN
            first = xp.logical_or(first, xp.isnan(b))
        share = first + 0.5 * xp.equal(a, b).astype(dy.dtype)
        return dy * share, dy * (1 - share)

    return rule


RULES.update({name: _extreme(name) for name in "maximum minimum fmax fmin".split()})


@_rule("where")
def _where(dy: Array, y: Array, condition: Any, a: Any, b: Any) -> tuple[Any, ...]:
    xp = xp_of(dy)
    chosen = (
        condition
        if isinstance(condition, bool) or condition.dtype.kind == "b"
        else xp.not_equal(condition, 0)
    )
    return None, dy * chosen, dy * xp.logical_not(chosen)


@_rule("clip")
def _clip(dy: Array, y: Array, x: Any, low: Any = None, high: Any = None) -> tuple[Any, ...]:
    xp = xp_of(dy)
    below = None if low is None else xp.less(x, low)
    above = None if high is None else xp.greater(x, high)
    beyond = [side for side in (below, above) if side is not None]
    inside = xp.logical_not(beyond[0] if len(beyond) == 1 else xp.logical_or(*beyond))
    return dy * inside, *(None if side is None else dy * side for side in (below, above))


@_rule("assign")
def _assign(dy: Array, y: Array, x: Any, value: Any, key: Any) -> tuple[Any, ...]:
    return type(dy).apply("assign", (dy, 0), {"key": key}, None), dy[key]


# reductions


def _axes(axis: Any, ndim: int) -> tuple[int, ...]:
    return tuple(range(ndim)) if axis is None else tuple(sorted(normalize_axis_tuple(axis, ndim)))


def _kept(y: Array, x: Array, axis: Any) -> Array:
    """A reduction of x along the axes, with these as axes of size 1."""
    axes = _axes(axis, x.ndim)
    return y.reshape(tuple(1 if i in axes else n for i, n in enumerate(x.shape)))


def _repeated(dy: Array, x: Array, axis: Any) -> Array:
    return xp_of(dy).broadcast_to(_kept(dy, x, axis), x.shape)


@_rule("sum")
def _sum(dy: Array, y: Array, x: Array, axis: Any = None, **options: Any) -> tuple[Any, ...]:
    return (_repeated(dy, x, axis),)


def _count(x: Array, axis: Any) -> int:
    return prod(x.shape[i] for i in _axes(axis, x.ndim))


@_rule("mean")
def _mean(dy: Array, y: Array, x: Array, axis: Any = None, **options: Any) -> tuple[Any, ...]:
    return (_repeated(dy / _count(x, axis), x, axis),)


@_rule("var")
def _var(
    dy: Array, y: Array, x: Array, axis: Any = None, ddof: int = 0, **options: Any
) -> tuple[Any, ...]:
    centred = x - x.mean(axis=axis, keepdims=True)
    return (_kept(dy * (2 / (_count(x, axis) - ddof)), x, axis) * centred,)


@_rule("std")
def _std(
    dy: Array, y: Array, x: Array, axis: Any = None, ddof: int = 0, **options: Any
) -> tuple[Any, ...]:
    centred = x - x.mean(axis=axis, keepdims=True)
    return (_kept(dy / _nonzero(y) / (_count(x, axis) - ddof), x, axis) * centred,)


@_rule("max min")
def _most(dy: Array, y: Array, x: Array, axis: Any = None, **options: Any) -> tuple[Any, ...]:
    hit = xp_of(dy).equal(x, _kept(y, x, axis)).astype(dy.dtype)
    return (hit * (_kept(dy, x, axis) / hit.sum(axis=axis, keepdims=True)),)


@_rule("ptp")
def _ptp(dy: Array, y: Array, x: Array, axis: Any = None, **options: Any) -> tuple[Any, ...]:
    (high,) = _most(dy, x.max(axis=axis), x, axis)
    (low,) = _most(dy, x.min(axis=axis), x, axis)
    return (high - low,)


@_rule("prod")
def _prod(dy: Array, y: Array, x: Array, axis: Any = None, **options: Any) -> tuple[Any, ...]:
    """The product of all the others, which dividing y would not give where x is 0."""
    axes = _axes(axis, x.ndim)
    rest = tuple(i for i in range(x.ndim) if i not in axes)
    flat = x.transpose(*rest, *axes).reshape(*(x.shape[i] for i in rest), _count(x, axis))
    others = _before(flat) * xp_of(dy).flip(_before(xp_of(dy).flip(flat, -1)), -1)
    others = others.reshape(tuple(x.shape[i] for i in (*rest, *axes)))
    others = others.transpose(*(int(i) for i in np.argsort((*rest, *axes))))
    return (others * _kept(dy, x, axis),)


def _before(x: Array) -> Array:
    """The products of all that stands before each element of the last axis."""
    xp = xp_of(x)
    pad = [(0, 0)] * (x.ndim - 1) + [(1, 0)]
    return xp.cumprod(xp.pad(x[..., :-1], pad, constant_values=1), axis=-1)


@_rule("median")
def _median(dy: Array, y: Array, x: Array, axis: Any = None, **options: Any) -> tuple[Any, ...]:
    """The mean of the one or two in the middle."""
    xp, axes = xp_of(dy), _axes(axis, x.ndim)
    if len(axes) != 1:
        rest = tuple(i for i in range(x.ndim) if i not in axes)
        flat = x.transpose(*rest, *axes).reshape(*(x.shape[i] for i in rest), _count(x, axis))
        (back,) = _median(dy, y, flat, axis=-1)
        back = back.reshape(tuple(x.shape[i] for i in (*rest, *axes)))
        return (back.transpose(*(int(i) for i in np.argsort((*rest, *axes)))),)
    size = x.shape[axes[0]]
    rank = xp.argsort(xp.argsort(x, axis=axes[0]), axis=axes[0])
    low, high = xp.equal(rank, (size - 1) // 2), xp.equal(rank, size // 2)
    half = _kept(dy * 0.5, x, axis)
    return (half * low + half * high,)


@_rule("norm")
def _norm(
    dy: Array, y: Array, x: Array, ord: Any = None, axis: Any = None, **options: Any
) -> tuple[Any, ...] | None:
    vector = isinstance(axis, int) or (axis is None and x.ndim == 1)
    if ord is None or (ord == 2 and vector) or ord == "fro":
        return (x * _kept(dy / _nonzero(y), x, axis),)
    if ord == 1 and vector:
        return (xp_of(dy).sign(x) * _kept(dy, x, axis),)
    return None


# scans


def _reverse_sum(x: Array, axis: int) -> Array:
    xp = xp_of(x)
    return xp.flip(xp.cumsum(xp.flip(x, axis), axis=axis), axis)


@_rule("cumsum")
def _cumsum(dy: Array, y: Array, x: Array, axis: Any = None, **options: Any) -> tuple[Any, ...]:
    return (_reverse_sum(dy, 0 if axis is None else axis).reshape(x.shape),)


@_rule("cumprod")
def _cumprod(dy: Array, y: Array, x: Array, axis: Any = None, **options: Any) -> tuple[Any, ...]:
    """sum_i dy_i * (product of x_k, k <= i, k != j): right where some x are 0, in n^2 for n."""
    xp = xp_of(dy)
    flat = x.reshape(-1) if axis is None else xp.moveaxis(x, axis, -1)
    dy = dy if axis is None else xp.moveaxis(dy, axis, -1)
    n = flat.shape[-1]
    rows, columns = np.arange(n)[:, None], np.arange(n)
    later = xp.where(columns > rows, flat.reshape(*flat.shape[:-1], 1, n), 1)
    between = xp.cumprod(later, axis=-1) * (columns >= rows)
    dx = (between * dy.reshape(*dy.shape[:-1], 1, n)).sum(axis=-1) * _before(flat)
    return (dx.reshape(x.shape) if axis is None else xp.moveaxis(dx, -1, axis),)


@_rule("sort")
def _sort(dy: Array, y: Array, x: Array, axis: Any = -1) -> tuple[Any, ...]:
    xp = xp_of(dy)
    if axis is None:
        (dx,) = _sort(dy, y, x.reshape(-1))
        return (dx.reshape(x.shape),)
    places = xp.argsort(xp.argsort(x, axis=axis), axis=axis)
    return (xp.take_along_axis(dy, places, axis),)


# movement

RULES |= {
    "reshape": lambda dy, y, x, shape: (dy.reshape(x.shape),),
    "expand_dims": lambda dy, y, x, axis: (dy.reshape(x.shape),),
    "squeeze": lambda dy, y, x, axis=None: (dy.reshape(x.shape),),
    "broadcast_to": lambda dy, y, x, shape: (dy,),
    "swapaxes": lambda dy, y, x, axis1, axis2: (dy.swapaxes(axis1, axis2),),
    "moveaxis": lambda dy, y, x, source, destination: (
        xp_of(dy).moveaxis(dy, destination, source),
    ),
    "flip": lambda dy, y, x, axis=None: (xp_of(dy).flip(dy, axis),),
    "getitem": lambda dy, y, x, key: (dy if _is_all(x, key) else Part(dy, key),),
}


@_rule("transpose")
def _transpose(dy: Array, y: Array, x: Array, axes: Any = None) -> tuple[Any, ...]:
    if not axes:
        return (dy.transpose(),)
    order = np.argsort([axis % x.ndim for axis in axes])
    return (dy.transpose(*(int(axis) for axis in order)),)


@_rule("roll")
def _roll(dy: Array, y: Array, x: Array, shift: Any, axis: Any = None) -> tuple[Any, ...]:
    back = tuple(-n for n in shift) if isinstance(shift, tuple | list) else -shift
    return (xp_of(dy).roll(dy, back, axis),)


def _is_all(x: Array, key: Any) -> bool:
    """Whether x[key] is x."""
    keys = key if isinstance(key, tuple) else (key,)
    return len(keys) <= x.ndim and all(
        isinstance(own, slice) and own.indices(n) == (0, n, 1)
        for own, n in zip(keys, x.shape, strict=False)
    )


def _along(axis: int, start: int, stop: int) -> tuple[slice, ...]:
    return (*(slice(None),) * axis, slice(start, stop))


@_rule("concatenate")
def _concatenate(dy: Array, y: Array, *parts: Array, axis: Any = 0) -> tuple[Any, ...]:
    if axis is None:
        flat = _concatenate(dy, y, *(part.reshape(-1) for part in parts))
        return tuple(d.reshape(part.shape) for d, part in zip(flat, parts, strict=True))
    (axis,) = _axes(axis, dy.ndim)
    ends = [int(end) for end in np.cumsum([part.shape[axis] for part in parts])]
    return tuple(dy[_along(axis, start, end)] for start, end in zip([0, *ends], ends, strict=False))


@_rule("stack")
def _stack(dy: Array, y: Array, *parts: Array, axis: int = 0) -> tuple[Any, ...]:
    (axis,) = _axes(axis, dy.ndim)
    return tuple(dy[(*(slice(None),) * axis, i)] for i in range(len(parts)))


@_rule("split")
def _split(
    dys: list[Array], y: Any, x: Array, indices_or_sections: Any, axis: int = 0
) -> tuple[Any, ...]:
    return (xp_of(dys[0]).concatenate(dys, axis=axis),)


@_rule("pad")
def _pad(
    dy: Array, y: Array, x: Array, pad_width: Any, mode: str = "constant", **options: Any
) -> tuple[Any, ...]:
    widths = np.broadcast_to(np.asarray(pad_width), (x.ndim, 2)).tolist()
    sizes = list(zip(x.shape, widths, strict=True))
    if mode == "constant":
        return (dy[tuple(slice(before, before + n) for n, (before, _) in sizes)],)
    for axis, (n, width) in enumerate(sizes):  # what each element was taken from
        if any(width):
            dy = _added_along(dy, np.pad(np.arange(n), width, mode=mode), n, axis)  # type: ignore[call-overload]
    return (dy,)


def _added_along(dy: Array, ids: Any, size: int, axis: int) -> Array:
    """dy summed along an axis into places by their ids: the gradient of taking them."""
    xp = xp_of(dy)
    return xp.moveaxis(segment_sum(xp.moveaxis(dy, axis, 0), ids, size), 0, axis)


@_rule("repeat")
def _repeat(dy: Array, y: Array, x: Array, repeats: Any, axis: Any = None) -> tuple[Any, ...]:
    if axis is None:
        (dx,) = _repeat(dy, y, x.reshape(-1), repeats, 0)
        return (dx.reshape(x.shape),)
    (axis,) = _axes(axis, x.ndim)
    n, times = x.shape[axis], np.asarray(repeats)
    if times.size == 1:
        split = dy.reshape(*x.shape[: axis + 1], int(times.reshape(())), *x.shape[axis + 1 :])
        return (split.sum(axis=axis + 1),)
    return (_added_along(dy, np.repeat(np.arange(n), times), n, axis),)


@_rule("tile")
def _tile(dy: Array, y: Array, x: Array, reps: Any) -> tuple[Any, ...]:
    times = tuple(int(n) for n in np.atleast_1d(reps))
    ndim = max(len(times), x.ndim)
    times = (1,) * (ndim - len(times)) + times
    shape = (1,) * (ndim - x.ndim) + x.shape
    split = dy.reshape(tuple(n for pair in zip(times, shape, strict=True) for n in pair))
    return (split.sum(axis=tuple(range(0, 2 * ndim, 2))).reshape(x.shape),)


@_rule("diagonal")
def _diagonal(
    dy: Array, y: Array, x: Array, offset: int = 0, axis1: int = 0, axis2: int = 1
) -> tuple[Any, ...]:
    xp = xp_of(dy)
    rest = tuple(n for i, n in enumerate(x.shape) if i not in _axes((axis1, axis2), x.ndim))
    i = np.arange(dy.shape[-1])
    key = (Ellipsis, i + max(0, -offset), i + max(0, offset))
    dx = scattered([dy], (*rest, x.shape[axis1], x.shape[axis2]), [key])
    return (xp.moveaxis(dx, (-2, -1), (axis1, axis2)),)


@_rule("sliding_window_view")
def _windows(dy: Array, y: Array, x: Array, window_shape: Any, axis: Any = None) -> tuple[Any, ...]:
    """Each window is added back where it came from, one axis after the other; what is left of the
    windows comes before the rest, so that their elements lie far apart and the others together."""
    sizes = window_shape if isinstance(window_shape, tuple | list) else (window_shape,)
    axes = (
        range(x.ndim)
        if axis is None
        else [int(i) % x.ndim for i in (axis if isinstance(axis, tuple | list) else (axis,))]
    )
    count = len(sizes)
    dy = xp_of(dy).moveaxis(dy, tuple(range(-count, 0)), tuple(range(count)))
    for i, size in reversed(list(enumerate(map(int, sizes)))):
        axis, before = i + axes[i], (slice(None),) * i
        shape = [*dy.shape[:i], *dy.shape[i + 1 :]]
        views = shape[axis]
        shape[axis] = views + size - 1
        keys = [_along(axis, k, k + views) for k in range(size)]
        dy = scattered([dy[(*before, k)] for k in range(size)], tuple(shape), keys)
    return (dy,)


@_rule("scatter")
def _scatter(dy: Array, y: Array, *values: Array, shape: Shape, keys: Any) -> tuple[Any, ...]:
    return tuple(dy[key] for key in keys)


@_rule("take")
def _take(dy: Array, y: Array, x: Array, ids: Any, axis: Any = None) -> tuple[Any, ...]:
    if axis is None:
        dx, _ = _take(dy, y, x.reshape(-1), ids, 0)
        return dx.reshape(x.shape), None
    (axis,) = _axes(axis, x.ndim)
    xp, ids = xp_of(dy), np.asarray(ids) if isinstance(ids, int | list | tuple) else ids
    first = xp.moveaxis(dy, tuple(range(axis, axis + ids.ndim)), tuple(range(ids.ndim)))
    return xp.moveaxis(segment_sum(first, ids, x.shape[axis]), 0, axis), None


@_rule("take_along_axis")
def _take_along_axis(dy: Array, y: Array, x: Array, ids: Array, axis: Any) -> tuple[Any, ...]:
    xp = xp_of(dy)
    if axis is None:
        (dx, _) = _take_along_axis(dy, y, x.reshape(-1), ids, 0)
        return dx.reshape(x.shape), None
    (axis,) = _axes(axis, x.ndim)
    n = x.shape[axis]
    if ids.shape[axis] == 1:
        places = np.arange(n).reshape((n,) + (1,) * (x.ndim - axis - 1))
        return dy * xp.equal(xp.remainder(ids, n), places), None
    last = xp.moveaxis(dy, axis, -1)
    at = xp.broadcast_to(xp.moveaxis(ids, axis, -1), last.shape)
    lead = last.shape[:-1]
    at = xp.remainder(at, n) + np.arange(prod(lead)).reshape(*lead, 1) * n
    dx = segment_sum(last.reshape(-1), at.reshape(-1), prod(lead) * n)
    return xp.moveaxis(dx.reshape(*lead, n), -1, axis), None


@_rule("diff")
def _diff(dy: Array, y: Array, x: Array, n: int = 1, axis: int = -1) -> tuple[Any, ...]:
    (axis,) = _axes(axis, x.ndim)
    xp = xp_of(dy)
    for _ in range(n):
        before, after = ([(0, 0)] * axis + [w] + [(0, 0)] * (x.ndim - axis - 1)
                         for w in ((1, 0), (0, 1)))  # fmt: skip
        dy = xp.pad(dy, before) - xp.pad(dy, after)
    return (dy,)


# products


@_rule("matmul dot")
def _matmul(dy: Array, y: Array, a: Array, b: Array) -> tuple[Any, ...]:
    """dy @ b', a' @ dy; a vector is a matrix of one row or column."""
    xp = xp_of(dy)
    left = a.reshape(1, *a.shape) if a.ndim == 1 else a
    right = b.reshape(*b.shape, 1) if b.ndim == 1 else b
    if a.ndim == 1:
        dy = xp.expand_dims(dy, -1 if b.ndim == 1 else -2)
    if b.ndim == 1:
        dy = xp.expand_dims(dy, -1)
    da = xp.matmul(dy, right.swapaxes(-1, -2))
    if right.ndim == 2 and left.ndim > 2:  # all leading axes together are rows of one product
        left, dy = left.reshape(-1, left.shape[-1]), dy.reshape(-1, dy.shape[-1])
    db = xp.matmul(left.swapaxes(-1, -2), dy)
    return da, db.reshape(db.shape[:-1]) if b.ndim == 1 else db


@_rule("outer")
def _outer(dy: Array, y: Array, a: Array, b: Array) -> tuple[Any, ...]:
    xp = xp_of(dy)
    da, db = xp.matmul(dy, b.reshape(-1)), xp.matmul(a.reshape(-1), dy)
    return da.reshape(a.shape), db.reshape(b.shape)


@_rule("tensordot")
def _tensordot(dy: Array, y: Array, a: Array, b: Array, axes: Any = 2) -> tuple[Any, ...]:
    """As the product of the matrices that a and b are when their axes are in order."""
    met = met_axes(axes, a.ndim, b.ndim)
    own = [[i for i in range(x.ndim) if i not in m] for x, m in zip((a, b), met, strict=True)]
    orders = own[0] + met[0], met[1] + own[1]
    rows = prod(a.shape[i] for i in own[0])
    left = a.transpose(*orders[0]).reshape(rows, -1)
    right = b.transpose(*orders[1]).reshape(left.shape[1], -1)
    flat = dy.reshape(rows, right.shape[1])
    gradients = xp_of(dy).matmul(flat, right.T), xp_of(dy).matmul(left.T, flat)
    return tuple(
        gradient.reshape(tuple(x.shape[i] for i in order)).transpose(
            *(int(i) for i in np.argsort(order))
        )
        for gradient, x, order in zip(gradients, (a, b), orders, strict=True)
    )


def met_axes(axes: Any, *ndims: int) -> list[list[int]]:
    """The axes that tensordot sums over, of its one operand and of the other."""
    if isinstance(axes, int | np.integer):
        axes = range(-int(axes), 0), range(int(axes))
    return [[int(i) % n for i in np.atleast_1d(of_x)] for n, of_x in zip(ndims, axes, strict=True)]


@_rule("einsum")
def _einsum(dy: Array, y: Array, *arrays: Array, subscripts: str) -> tuple[Any, ...]:
    """The same sum with dy in the place of an operand, for that operand."""
    terms, result = einsum_terms(subscripts, [array.ndim for array in arrays])
    return tuple(_einsum_back(dy, arrays, terms, result, i) for i in range(len(arrays)))


def _einsum_back(
    dy: Array, arrays: Sequence[Array], terms: list[str], result: str, i: int
) -> Array:
    xp, x = xp_of(dy), arrays[i]
    others = [j for j in range(len(arrays)) if j != i]
    known = {*result, *(c for j in others for c in terms[j])}
    wanted, spare = "", [c for c in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
                         if c not in "".join(terms)]  # fmt: skip
    operands = [(result, dy), *((terms[j], arrays[j]) for j in others)]
    for c, n in zip(terms[i], x.shape, strict=True):
        if c in wanted:  # a diagonal: what is not on it has no gradient
            other = spare.pop()
            operands.append((c + other, xp.eye(n, dtype=dy.dtype)))
            c = other
        elif c not in known:  # summed over in x alone
            operands.append((c, xp.ones(n, dy.dtype)))
        wanted += c
    text = f"{','.join(letters for letters, _ in operands)}->{wanted}"
    return xp.einsum(text, *(array for _, array in operands))


def einsum_terms(subscripts: str, ndims: Sequence[int]) -> tuple[list[str], str]:
    """The letters of each operand and of the result, ellipses and implicit results spelt out."""
    terms, arrow, result = subscripts.replace(" ", "").partition("->")
    letters = terms.split(",")
    spare = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in subscripts]
    most = max((n - len(t) + 3 for t, n in zip(letters, ndims, strict=True) if "..." in t),
               default=0)  # fmt: skip
    lead = "".join(spare[:most])
    spelt = [t.replace("...", lead[most - (n - len(t) + 3) :] if "..." in t else "")
             for t, n in zip(letters, ndims, strict=True)]  # fmt: skip
    if arrow:
        return spelt, result.replace("...", lead)
    once = sorted(c for c in set("".join(letters)) - {"."} if "".join(letters).count(c) == 1)
    return spelt, lead + "".join(once)
