"""Pooling: what windows see, or all of space, as one number for each channel."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, prod
from typing import Any

from nnxp._arrays import Array, Shape, xp_of
from nnxp._errors import OptionError, ShapeError
from nnxp.kernels._dispatch import kernel
from nnxp.kernels._windows import (
    Padding,
    PerAxis,
    Windows,
    padded,
    places_along,
    seen_along,
    window_option,
    windows,
)
from nnxp.kernels.functions import scattered


def _pooled(who: str, x: Array, window: Any, options: dict[str, Any]) -> Windows:
    """The windows of a pool; OptionError for padding in which a window would see nothing of x."""
    window = window_option(who, window)
    if options.get("stride") is None:
        options = options | {"stride": window}
    over, padding = windows(who, x, window, **options), options.get("padding", 0)
    blind = any(before >= n for n, (before, _) in zip(over.reach, over.pads, strict=True))
    if blind and not isinstance(padding, str):
        raise OptionError(
            f"padding of {who}, {padding!r:.60}, is not smaller than its windows, which reach over "
            f"{over.reach}: some would see nothing of x"
        )
    return over


def sees_padding(x: Array, *, window: tuple[int, ...], **options: Any) -> bool:
    """Whether a window of such a pool sees anything but x."""
    return any(map(any, _pooled("a pool", x, window, options).pads))


def _reduced(x: Array, over: Windows, combine: Callable[..., Array]) -> Array:
    """Along one axis after the other, what the windows see of x, padded, combined two by two."""
    for axis in range(1, len(over.window) + 1):
        first, *others = seen_along(x, over, axis)
        x = combine(first, others[0]) if others else first
        for other in others[1:]:
            combine(x, other, out=x)
    return x


@kernel
def max_pool(
    x: Array,
    *,
    window: tuple[int, ...],
    stride: PerAxis | None = None,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    ceil_mode: bool = False,
) -> Array:
    """y[n, p, c] = max over k of x[n, stride p + dilation k - padding, c]

    x (n, *space, c) -> y (n, *positions, c). The stride is the window's own size unless given;
    padding is never the largest. With `ceil_mode` a last window may reach beyond x and its padding,
    if it begins before their end, as in PyTorch and ONNX.
    """
    options = {"stride": stride, "padding": padding, "dilation": dilation, "ceil_mode": ceil_mode}
    over = _pooled("max_pool", x, window, options)
    return _reduced(padded(x, over.pads, -inf), over, xp_of(x).maximum)


@max_pool.vjp
def _max_pool(
    dy: Array, y: Array, x: Array, *, window: tuple[int, ...], **options: Any
) -> tuple[Array]:
    return (max_pool_gradient(dy, x, window=window, **options),)


@kernel
def max_pool_gradient(
    dy: Array,
    x: Array,
    *,
    window: tuple[int, ...],
    stride: PerAxis | None = None,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    ceil_mode: bool = False,
) -> Array:
    """dx[k] = sum of dy over the windows of which element k is the first of the largest

    dy (n, *positions, c), x (n, *space, c) -> dx (n, *space, c): the gradient of
    sum(dy * max_pool(x)); the first in row-major order, as in PyTorch. The options are those of
    `max_pool`.
    """
    options = {"stride": stride, "padding": padding, "dilation": dilation, "ceil_mode": ceil_mode}
    over = _pooled("max_pool_gradient", x, window, options)
    if dy.shape != (expected := (x.shape[0], *over.positions, x.shape[-1])):
        raise ShapeError(
            f"max_pool_gradient takes dy like what max_pool makes of x {x.shape}, {expected}, but "
            f"got {dy.shape}"
        )
    largest, stages = padded(x, over.pads, -inf), []
    for axis in reversed(range(1, len(over.window) + 1)):
        first, *others = seen_along(largest, over, axis)
        above, shape = [], largest.shape
        largest = first
        for other in others:
            above.append(xp_of(x).greater(other, largest))
            largest = xp_of(x).maximum(largest, other)
        stages.append((axis, shape, above))
    for axis, shape, above in reversed(stages):
        values = []
        for later in reversed(above):
            values.append(dy * later)
            dy = dy - values[-1]
        keys = [((slice(None),) * axis + (place,)) for place in places_along(over, axis)]
        dy = scattered([dy, *values[::-1]], shape, keys)
    return padded(dy, [(-before, -behind) for before, behind in over.pads])


@max_pool_gradient.vjp
def _max_pool_gradient(
    d: Array, dx: Array, dy: Array, x: Array, **options: Any
) -> tuple[Array, None] | None:
    """By dy what d is where dx is not 0; of windows that overlap that is not to be seen."""
    over = _pooled("max_pool", x, options.pop("window"), options)
    if any(s < r for s, r in zip(over.stride, over.reach, strict=True)):
        return None
    picked = max_pool_gradient(xp_of(dy).ones_like(dy), x, window=over.window, **options)
    return _reduced(padded(d * picked, over.pads), over, xp_of(d).add), None


@kernel
def average_pool(
    x: Array,
    *,
    window: tuple[int, ...],
    stride: PerAxis | None = None,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    ceil_mode: bool = False,
    count_include_pad: bool = False,
) -> Array:
    """y[n, p, c] = mean over k of x[n, stride p + dilation k - padding, c]

    x (n, *space, c) -> y (n, *positions, c). The mean is over what a window sees of x; with
    `count_include_pad` over its zeros from padding as well (PyTorch's default), though not over
    what `ceil_mode` lets it reach beyond them. Of nothing, as between `dilation`, it is 0.
    """
    options = {"stride": stride, "padding": padding, "dilation": dilation, "ceil_mode": ceil_mode}
    over = _pooled("average_pool", x, window, options)
    return _reduced(padded(x, over.pads), over, xp_of(x).add) / counted(x, over, count_include_pad)


def counted(x: Array, over: Windows, count_include_pad: bool) -> Any:
    """What average_pool divides by: a number, or an array (1, *positions, 1)."""
    beyond = over.beyond if count_include_pad else over.pads
    if not any(map(any, beyond)):
        return prod(over.window)
    xp = xp_of(x)
    whole = (n + a + b for n, (a, b) in zip(x.shape[1:-1], over.pads, strict=True))
    counting = [n - a - b for n, (a, b) in zip(whole, beyond, strict=True)]
    ones = xp.ones((1, *counting, 1), x.dtype)
    return xp.maximum(_reduced(padded(ones, beyond), over, xp.add), 1)


@kernel
def lp_pool(
    x: Array,
    *,
    window: tuple[int, ...],
    stride: PerAxis | None = None,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    ceil_mode: bool = False,
    p: float = 2.0,
) -> Array:
    """y[n, q, c] = (sum over k of |x[n, stride q + dilation k - padding, c]|^p)^(1/p)

    x (n, *space, c) -> y (n, *positions, c); the windows are those of max_pool. (PyTorch takes no
    absolute value: its result for negative numbers and odd p is another.)
    """
    options = {"stride": stride, "padding": padding, "dilation": dilation, "ceil_mode": ceil_mode}
    over = _pooled("lp_pool", x, window, options)
    xp = xp_of(x)
    if p == 2:
        return xp.sqrt(_reduced(padded(xp.square(x), over.pads), over, xp.add))
    size = xp.abs(x)
    if p == 1:
        return _reduced(padded(size, over.pads), over, xp.add)
    return _reduced(padded(size**p, over.pads), over, xp.add) ** (1 / p)


@kernel
def global_average_pool(x: Array, *, keepdims: bool = False) -> Array:
    """y[n, c] = mean over all of space of x[n, :, c]   [Lin, Chen, Yan 2013, arXiv:1312.4400]

    x (n, *space, c) -> y (n, c), or (n, 1, ..., 1, c) with `keepdims`.
    """
    return x.mean(axis=_space("global_average_pool", x), keepdims=keepdims)


@kernel
def global_max_pool(x: Array, *, keepdims: bool = False) -> Array:
    """y[n, c] = max over all of space of x[n, :, c]

    x (n, *space, c) -> y (n, c), or (n, 1, ..., 1, c) with `keepdims`.
    """
    return x.max(axis=_space("global_max_pool", x), keepdims=keepdims)


def _space(who: str, x: Array) -> Shape:
    """The axes between rows and channels; ShapeError if there are none, or nothing along them."""
    if x.ndim < 3 or 0 in x.shape[1:]:
        raise ShapeError(f"{who} takes (rows, *space, channels) but got (rows, *{x.shape[1:]})")
    return tuple(range(1, x.ndim - 1))


@kernel
def adaptive_average_pool(x: Array, *, size: tuple[int | None, ...]) -> Array:
    """The mean of each of `size` parts of space, which are equal or overlap by an element.

    x (n, *space, c) -> y (n, *size, c). Along an axis of n, part i of m is from floor(i n / m) to
    ceil((i + 1) n / m), as in PyTorch. None keeps an axis as it is.
    """
    return _by_parts("adaptive_average_pool", x, size, "mean")


@kernel
def adaptive_max_pool(x: Array, *, size: tuple[int | None, ...]) -> Array:
    """The largest of each of `size` parts of space: the parts of adaptive_average_pool.

    x (n, *space, c) -> y (n, *size, c).
    """
    return _by_parts("adaptive_max_pool", x, size, "max")


def _by_parts(who: str, x: Array, size: tuple[int | None, ...], reduce: str) -> Array:
    if len(_space(who, x)) != len(size):
        raise ShapeError(
            f"{who} to {size} takes (rows, *space, channels), {len(size) + 2} axes, but got "
            f"{x.ndim}"
        )
    for axis, m in enumerate(size, 1):
        n = x.shape[axis]
        if m is None or m == n:
            continue
        if n % m == 0:
            parts = x.reshape(*x.shape[:axis], m, n // m, *x.shape[axis + 1 :])
            x = getattr(parts, reduce)(axis=axis + 1)
            continue
        before = (slice(None),) * axis
        spans = (slice(i * n // m, -(-(i + 1) * n // m)) for i in range(m))
        parts = [getattr(x[(*before, span)], reduce)(axis=axis, keepdims=True) for span in spans]
        x = xp_of(x).concatenate(parts, axis=axis)
    return x
