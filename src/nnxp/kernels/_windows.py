"""Where windows stand: strides, padding and dilation along any number of axes, channels last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, TypeAlias

from nnxp._arrays import Array, Shape, xp_of
from nnxp._errors import OptionError, ShapeError

PerAxis: TypeAlias = "int | tuple[int, ...]"
"""A whole number for every axis alike, or one for each."""

Pairs: TypeAlias = tuple[tuple[int, int], ...]
"""What is added before and behind each axis."""

Padding: TypeAlias = "str | int | tuple[int | tuple[int, int], ...]"
"""A number for every side; for each axis a number, or a pair (before, behind); or a name:
"valid" for none, "same" for as much as makes ceil(size / stride) positions, the odd one behind,
"same_lower" with the odd one before.
"""

PADDINGS = ("valid", "same", "same_lower")


def is_whole(value: Any, least: int | None) -> bool:
    """Whether a value is a whole number of at least so much."""
    try:
        number = index(value)
    except TypeError:
        return False
    return not isinstance(value, bool) and (least is None or number >= least)


def per_axis(what: str, value: Any, axes: int, least: int = 1) -> Shape:
    """A whole number for each axis; OptionError for what is none."""
    numbers = (value,) * axes if is_whole(value, least) else value
    good = isinstance(numbers, tuple | list) and all(is_whole(number, least) for number in numbers)
    if not good or len(numbers) != axes:
        raise OptionError(
            f"{what} is a whole number, at least {least}, or one for each of {axes} axes, "
            f"not {value!r:.60}"
        )
    return tuple(map(int, numbers))


def window_option(who: str, window: Any) -> Shape:
    """A size for each axis of space; OptionError for what does not say so."""
    if not isinstance(window, tuple | list) or not window:
        raise OptionError(
            f"window of {who} has a size for each axis of space, such as (2, 2), not {window!r:.60}"
        )
    return per_axis(f"window of {who}", window, len(window))


def pairs(what: str, value: Any, axes: int, least: int | None = 0) -> Pairs:
    """What is added before and behind each axis; OptionError for what does not say so."""
    sides = (value,) * axes if is_whole(value, least) else value
    good = isinstance(sides, tuple | list) and len(sides) == axes
    spread = [(side, side) if is_whole(side, least) else side for side in sides] if good else []
    if not good or not all(_is_pair(pair, least) for pair in spread):
        raise OptionError(
            f"{what} is a whole number, or for each of {axes} axes a number or a pair (before, "
            f"behind){'' if least is None else f', at least {least}'}, not {value!r:.60}"
        )
    return tuple((int(before), int(behind)) for before, behind in spread)


def _is_pair(value: Any, least: int | None) -> bool:
    pair = isinstance(value, tuple | list) and len(value) == 2
    return pair and all(is_whole(number, least) for number in value)


def padding_option(what: str, value: Any, axes: int) -> str | Pairs:
    """The padding of windows as a name or as pairs; OptionError for what is neither."""
    if isinstance(value, str):
        if value not in PADDINGS:
            raise OptionError(f"{what} is one of {', '.join(PADDINGS)}, or numbers, not {value!r}")
        return value
    return pairs(what, value, axes)


@dataclass(frozen=True)
class Windows:
    """Windows over the axes between rows and channels: `window` elements, `dilation` apart.

    `positions` is how many there are along each axis, `pads` what is added to x for them, and
    `beyond` what of it nobody asked for: what windows lack that `ceil_mode` lets begin.
    """

    window: Shape
    stride: Shape
    dilation: Shape
    pads: Pairs
    positions: Shape
    beyond: Pairs

    @property
    def reach(self) -> Shape:
        """From the first element of a window to its last."""
        return reach_of(self.window, self.dilation)


def reach_of(window: Shape, dilation: Shape) -> Shape:
    """From the first element of a window to its last."""
    return tuple((w - 1) * d + 1 for w, d in zip(window, dilation, strict=True))


def windows(
    who: str,
    x: Array,
    window: Shape,
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Windows:
    """The windows over x (n, *space, c); ShapeError if there is no room for one.

    Along an axis of n with padding a before and b behind there are (n + a + b - reach) / stride + 1
    of them, rounded down; up with `ceil_mode`, unless the last would begin behind x. What such a
    window lacks is added to the padding.
    """
    axes = len(window)
    if x.ndim != axes + 2:
        raise ShapeError(
            f"{who} with a window of {axes} axes takes (rows, {', '.join('hwd'[:axes])}, channels)"
            f" but got {x.ndim} axes"
            if axes <= 2
            else f"{who} with a window of {axes} axes takes (rows, *space, channels), "
            f"{axes + 2} axes, but got {x.ndim}"
        )
    space = x.shape[1:-1]
    strides = per_axis(f"stride of {who}", stride, axes)
    apart = per_axis(f"dilation of {who}", dilation, axes)
    reach = reach_of(window, apart)
    option = padding_option(f"padding of {who}", padding, axes)
    if isinstance(option, str):
        option = tuple(map(_named, [option] * axes, space, reach, strides))
    pads, positions, beyond = [], [], []
    for n, r, s, (before, behind) in zip(space, reach, strides, option, strict=True):
        room = n + before + behind - r
        count = (-(-room // s) if ceil_mode else room // s) + 1
        if ceil_mode and (count - 1) * s >= n + before:
            count -= 1
        if n < 1 or count < 1:
            raise ShapeError(
                f"{who} has windows that reach over {reach}, but x with its padding is only "
                f"{tuple(n + a + b for n, (a, b) in zip(space, option, strict=True))}"
            )
        lacking = max(0, (count - 1) * s + r - n - before - behind)
        pads.append((before, behind + lacking))
        beyond.append((0, lacking))
        positions.append(count)
    return Windows(tuple(window), strides, apart, tuple(pads), tuple(positions), tuple(beyond))


def _named(name: str, n: int, reach: int, stride: int) -> tuple[int, int]:
    """The padding that a name asks for, along one axis."""
    return in_two(name, max(0, (-(-n // stride) - 1) * stride + reach - n))


def in_two(name: str, total: int) -> tuple[int, int]:
    """What is added, or cut off, before and behind, by the name of a padding."""
    half = total // 2
    return {"valid": (0, 0), "same": (half, total - half), "same_lower": (total - half, half)}[name]


def padded(x: Array, pads: Sequence[tuple[int, int]], fill: float = 0.0) -> Array:
    """x with so much of `fill` around the axes between rows and channels; less than none is cut
    off."""
    if any(before < 0 or behind < 0 for before, behind in pads):
        x, pads = cut(x, pads)
    if not any(map(any, pads)):
        return x
    return xp_of(x).pad(x, ((0, 0), *pads, (0, 0)), constant_values=fill)


def cut(x: Array, pads: Sequence[tuple[int, int]]) -> tuple[Array, Pairs]:
    """x without what negative padding cuts off, and the padding that is left to do."""
    kept, rest = [], []
    for n, (before, behind) in zip(x.shape[1:-1], pads, strict=True):
        start = min(max(0, -before), n)
        stop = max(start, n - max(0, -behind))
        size, front = n + before + behind, max(0, before)
        kept.append(slice(start, stop))
        rest.append((min(front, size), max(0, size - front - (stop - start))))
    return x[(slice(None), *kept)], tuple(rest)


def patches(x: Array, over: Windows) -> Array:
    """What each window sees: x (n, *space, c), padded -> (n, *positions, *window, c), a view."""
    axes = len(over.window)
    xp = xp_of(x)
    seen = xp.lib.stride_tricks.sliding_window_view(x, over.reach, axis=tuple(range(1, axes + 1)))
    steps = (slice(0, (p - 1) * s + 1, s) for p, s in zip(over.positions, over.stride, strict=True))
    inner = (slice(None, None, d) for d in over.dilation)
    return xp.moveaxis(seen[(slice(None), *steps, slice(None), *inner)], axes + 1, -1)


def places_along(over: Windows, axis: int) -> list[slice]:
    """Along one axis of x, padded, where each element of the windows lies."""
    i = axis - 1
    last = (over.positions[i] - 1) * over.stride[i] + 1
    starts = range(0, over.reach[i], over.dilation[i])
    return [slice(k, k + last, over.stride[i]) for k in starts]


def seen_along(x: Array, over: Windows, axis: int) -> list[Array]:
    """What the windows see along one axis of x, padded: a view for each of their elements."""
    before = (slice(None),) * axis
    return [x[(*before, place)] for place in places_along(over, axis)]
