"""Space made larger or smaller: padding, resampling, and channels laid out as space."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import ceil, floor, prod
from typing import Any, NamedTuple

from nnxp._arrays import Array, Shape, xp_of
from nnxp._errors import OptionError, ShapeError
from nnxp.kernels._dispatch import kernel
from nnxp.kernels._windows import padded as with_padding
from nnxp.kernels._windows import pairs, per_axis

PAD_MODES = ("constant", "reflect", "edge", "wrap")


@kernel
def pad(x: Array, *, padding: Any, mode: str = "constant", value: float = 0.0) -> Array:
    """x with so much before and behind each axis of space: of `value`, of x mirrored about its ends
    (which are not repeated), of the ends themselves, or of x begun anew.

    x (n, *space, c) -> y (n, *larger, c). `padding` is a number, or for each axis a number or a
    pair (before, behind); a negative one cuts off.
    """
    axes = x.ndim - 2
    if axes < 1:
        raise ShapeError(f"pad takes (rows, *space, channels) but got {x.ndim} axes")
    around = pairs("padding of pad", padding, axes, None)
    if mode not in PAD_MODES:
        raise OptionError(f"mode of pad is one of {', '.join(PAD_MODES)}, not {mode!r:.60}")
    for n, (before, behind) in zip(x.shape[1:-1], around, strict=True):
        left = n + min(0, before) + min(0, behind)  # what is not cut off
        most = {"reflect": left - 1, "wrap": left}.get(mode, max(before, behind) if left else 0)
        if n + before + behind < 0 or (
            mode != "constant" and max(before, behind, 0) > max(0, most)
        ):
            raise ShapeError(
                f"pad by {around} in mode {mode!r} does not fit (rows, *{x.shape[1:-1]}, "
                "channels): there is not so much to take from"
            )
    if mode == "constant":
        return with_padding(x, around, value)
    x = with_padding(x, [(min(0, a), min(0, b)) for a, b in around])
    more = [(max(0, a), max(0, b)) for a, b in around]
    return xp_of(x).pad(x, ((0, 0), *more, (0, 0)), mode=mode)


@kernel
def pixel_shuffle(x: Array, *, factor: Any, order: str = "channels first") -> Array:
    """Channels laid out as space: x (n, *space, c * prod(factor)) -> y (n, *(space * factor), c)

    [Shi et al. 2016, arXiv:1609.05158]. In the order "channels first" the channel is
    c * prod(factor) + position, as in PyTorch (ONNX: CRD); in "channels last" it is
    position * channels + c, as in TensorFlow (ONNX: DCR).
    """
    factors, axes = _factors("pixel_shuffle", x, factor, order)
    channels, left = divmod(x.shape[-1], prod(factors))
    if left or not channels:
        raise ShapeError(
            f"pixel_shuffle by {factors} takes a multiple of {prod(factors)} channels, not "
            f"{x.shape[-1]}"
        )
    first = order == "channels first"
    tail = (channels, *factors) if first else (*factors, channels)
    y = x.reshape(*x.shape[:-1], *tail)
    inner = axes + 1 + first
    woven = [axis for i in range(axes) for axis in (1 + i, inner + i)]
    y = y.transpose(0, *woven, axes + 1 if first else 2 * axes + 1)
    space = (n * f for n, f in zip(x.shape[1:-1], factors, strict=True))
    return y.reshape(x.shape[0], *space, channels)


@kernel
def pixel_unshuffle(x: Array, *, factor: Any, order: str = "channels first") -> Array:
    """Space laid out as channels: x (n, *space, c) -> y (n, *(space / factor), c * prod(factor))

    What pixel_shuffle undoes.
    """
    factors, axes = _factors("pixel_unshuffle", x, factor, order)
    space = x.shape[1:-1]
    if any(n % f for n, f in zip(space, factors, strict=True)):
        raise ShapeError(f"pixel_unshuffle by {factors} takes multiples of that, not {space}")
    less = [n // f for n, f in zip(space, factors, strict=True)]
    split = [size for pair in zip(less, factors, strict=True) for size in pair]
    y = x.reshape(x.shape[0], *split, x.shape[-1])
    outer, inner = range(1, 2 * axes, 2), range(2, 2 * axes + 1, 2)
    last = 2 * axes + 1
    tail = (last, *inner) if order == "channels first" else (*inner, last)
    return y.transpose(0, *outer, *tail).reshape(x.shape[0], *less, prod(factors) * x.shape[-1])


ORDERS = ("channels first", "channels last")


def _factors(who: str, x: Array, factor: Any, order: str) -> tuple[Shape, int]:
    axes = x.ndim - 2
    if axes < 1:
        raise ShapeError(f"{who} takes (rows, *space, channels) but got {x.ndim} axes")
    if order not in ORDERS:
        raise OptionError(f"order of {who} is one of {', '.join(ORDERS)}, not {order!r:.60}")
    return per_axis(f"factor of {who}", factor, axes), axes


METHODS = ("nearest", "linear", "cubic")
NEAREST: dict[str, Callable[[float], int]] = {
    "round_prefer_floor": lambda u: ceil(u - 0.5),
    "round_prefer_ceil": lambda u: floor(u + 0.5),
    "floor": floor,
    "ceil": ceil,
}


class Line(NamedTuple):
    """Where outputs are in x: output o at (a o + b) / d, which is rounded once."""

    a: float
    b: float
    d: float

    def at(self, output: int) -> float:
        return (self.a * output + self.b) / self.d


COORDINATES: dict[str, Callable[[int, float, int], Line]] = {
    "half_pixel": lambda n, m, _: Line(2 * n, n - m, 2 * m),
    "half_pixel_symmetric": lambda n, m, whole: Line(2 * n, n - m + n * (m - whole), 2 * m),
    "pytorch_half_pixel": lambda n, m, _: Line(2 * n, n - m, 2 * m) if m > 1 else Line(0, 0, 1),
    "align_corners": lambda n, m, _: Line(n - 1, 0, m - 1) if m != 1 else Line(0, 0, 1),
    "asymmetric": lambda n, m, _: Line(n, 0, m),
    "tf_half_pixel_for_nn": lambda n, m, _: Line(2 * n, n, 2 * m),
}
"""Where the outputs are in an axis of n that becomes m long, or would, by its scale; and a whole
number of elements."""


@kernel
def resize(
    x: Array,
    *,
    size: tuple[int | None, ...] | None = None,
    scale: float | tuple[float, ...] | None = None,
    method: str = "nearest",
    coordinates: str = "half_pixel",
    nearest: str = "round_prefer_floor",
    cubic: float = -0.75,
    exclude_outside: bool = False,
    antialias: bool = False,
    region: tuple[tuple[float, float], ...] | None = None,
    outside: float = 0.0,
) -> Array:
    """Space resampled: x (n, *space, c) -> y (n, *size, c)

    Give the `size`, or the `scale`, for which it is floor(scale * space), or both, which are not
    each other's where it is rounded otherwise. Output o along an axis is
    at u of x, and is the nearest element, or the sum of those around it weighted by the triangle
    1 - |d| ("linear") or by the cubic of [Keys 1981] with parameter `cubic`. Beyond its ends x goes
    on as it ends, or with `exclude_outside` is left out. `antialias` widens the weights where y is
    the smaller one. From n elements to m, s = m / n or the scale, and coordinates

        half_pixel            u = (o + 1/2) / s - 1/2
        half_pixel_symmetric  the same, the middle of y being that of x if s n is no whole number
        pytorch_half_pixel    the same, but 0 for m = 1
        align_corners         u = o (n - 1) / (m - 1), but 0 for m = 1
        asymmetric            u = o / s
        tf_half_pixel_for_nn  u = (o + 1/2) / s

    as ONNX's Resize has them; with a `region` (start, end) for each axis, in units of n - 1, u runs
    from its start to its end (tf_crop_and_resize), and y is `outside` where u is not in x.
    PyTorch's "nearest" is asymmetric with nearest="floor", its "nearest-exact" half_pixel with
    "round_prefer_ceil".
    """
    _known("method", method, METHODS)
    _known("coordinates", coordinates, COORDINATES)
    _known("nearest", nearest, NEAREST)
    around = []
    for axis, (length, m) in enumerate(_lengths(x, size, scale), 1):
        n = x.shape[axis]
        if length is None:
            around.append((0, 0))
            continue
        if region is None:
            line = COORDINATES[coordinates](n, length, m)
        else:
            line = _within(*region[axis - 1], n, length)
        first, last = _inside(line, n, m) if region is not None else (0, m)
        around.append((first, m - last))
        if n == m and line.a == line.d and line.b == 0:
            continue
        if method == "nearest":
            places = (NEAREST[nearest](line.at(o)) for o in range(first, last))
            x = _taken(x, axis, [min(max(0, i), n - 1) for i in places])
        else:
            shrink = min(1.0, length / n) if antialias else 1.0
            steepness = cubic if method == "cubic" else None
            weight = _weights(xp_of(x), line, (first, last), n, shrink, steepness, exclude_outside)
            x = _along(x, axis, weight.astype(x.dtype))
    return with_padding(x, around, outside)


def _known(what: str, name: str, names: Iterable[str]) -> None:
    if name not in names:
        raise OptionError(f"{what} of resize is one of {', '.join(names)}, not {name!r:.60}")


def _lengths(x: Array, size: Any, scale: Any) -> list[tuple[float | None, int]]:
    """How long each axis of space becomes: as the scale or the size says, and in whole elements.

    None if it stays. Where both are given, coordinates are those of the scale.
    """
    space = x.shape[1:-1]
    if not space or 0 in space:
        raise ShapeError(f"resize takes (rows, *space, channels) but got (rows, *{x.shape[1:]})")
    if size is None and scale is None:
        raise OptionError("resize takes a size or a scale")

    def listed(option: Any, single: int) -> list[Any]:
        return list(option) if isinstance(option, tuple | list) else [option] * single

    sizes = [None] * len(space) if size is None else listed(size, 1)
    scales = [None] * len(space) if scale is None else listed(scale, len(space))
    lengths: list[tuple[float | None, int]] = []
    for n, m, s in zip(space, sizes, scales, strict=False):
        length = m if s is None else n * s
        lengths.append((length, n if length is None else floor(length) if m is None else m))
    if not len(sizes) == len(scales) == len(space) or any(m < 1 for _, m in lengths):
        raise ShapeError(
            f"resize takes a size or a scale for each axis of space, {space}, of which something "
            f"is left; got size={size}, scale={scale}"
        )
    return lengths


def _within(start: float, end: float, n: int, m: float) -> Line:
    if m <= 1:
        return Line(0, (start + end) * (n - 1), 2)
    return Line((end - start) * (n - 1), start * (n - 1) * (m - 1), m - 1)


def _inside(line: Line, n: int, m: int) -> tuple[int, int]:
    """The first output that is in x, and the one behind the last."""
    within = [o for o in range(m) if 0 <= line.at(o) <= n - 1]
    return (within[0], within[-1] + 1) if within else (0, 0)


def _taken(x: Array, axis: int, places: list[int]) -> Array:
    """These elements along an axis."""
    times, left = divmod(len(places), x.shape[axis])
    if not left and places == [i // times for i in range(len(places))]:
        return xp_of(x).repeat(x, times, axis=axis)
    return xp_of(x).take(x, places, axis=axis)


def _weights(
    xp: Any, line: Line, outputs: tuple[int, int], n: int, shrink: float, cubic: float | None,
    exclude_outside: bool,
) -> Array:  # fmt: skip
    """What each element of x (n,) is to each of the outputs: (outputs, n), in float64."""
    support = (1 if cubic is None else 2) / shrink
    ends = line.at(outputs[0]), line.at(outputs[1] - 1)
    low = min(0, floor(min(ends) - support))
    high = max(n, ceil(max(ends) + support) + 1)
    at = (xp.arange(*outputs, dtype="float64") * line.a + line.b) / line.d
    far = xp.abs(at[:, None] - xp.arange(low, high, dtype="float64"))
    weight = _triangle(xp, far * shrink) if cubic is None else keys_weight(xp, far * shrink, cubic)
    inside = weight[:, -low : n - low]
    if exclude_outside:
        weight = inside
    elif low < 0 or high > n:
        before = weight[:, : 1 - low].sum(axis=1, keepdims=True)
        behind = weight[:, n - 1 - low :].sum(axis=1, keepdims=True)
        whole = weight.sum(axis=1, keepdims=True)
        parts = [before, inside[:, 1:-1], behind] if n > 1 else [whole]
        weight = xp.concatenate(parts, axis=1)
    if exclude_outside or shrink < 1:
        weight = weight / weight.sum(axis=1, keepdims=True)
    return weight


def _triangle(xp: Any, d: Array) -> Array:
    """1 - d where that is positive."""
    return xp.maximum(1 - d, 0)


def keys_weight(xp: Any, d: Array, a: float) -> Array:
    """((a + 2) d - (a + 3)) d^2 + 1 up to 1, a (((d - 5) d + 8) d - 4) up to 2

    [Keys 1981, doi:10.1109/TASSP.1981.1163711] Each is 0 where the other begins or ends, so that
    they can be added.
    """
    near, far = xp.minimum(d, 1), xp.clip(d, 1, 2)
    return ((a + 2) * near - (a + 3)) * near * near + 1 + a * (((far - 5) * far + 8) * far - 4)


def _along(x: Array, axis: int, weight: Array) -> Array:
    """weight (m, n) along an axis of n of x: one product, of which this is a view."""
    xp = xp_of(x)
    first = xp.moveaxis(x, axis, 0)
    y = xp.matmul(weight, first.reshape(first.shape[0], prod(first.shape[1:])))
    return xp.moveaxis(y.reshape(weight.shape[0], *first.shape[1:]), 0, axis)
