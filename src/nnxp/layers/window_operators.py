"""ONNX operators that look through windows or at space: convolutions, pools, resizing, their norms.

x is (n, c, *space), as ONNX has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from math import ceil, floor, prod
from typing import Any, NamedTuple

import numpy as np

from nnxp._arrays import Array, HostArray
from nnxp._errors import OptionError, ShapeError
from nnxp.layers.operators import beside, ints, library_of_shape, operator, xp_of

Pairs = tuple[tuple[int, int], ...]


class Window(NamedTuple):
    """How a window moves over space: per axis its size, stride, dilation and padding on both sides.

    `over` is what a last window reaches beyond the padding, with ceil_mode.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: Pairs
    over: tuple[int, ...]

    @classmethod
    def of(
        cls,
        space: Sequence[int],
        size: Sequence[int],
        strides: Any,
        dilations: Any,
        pads: Any,
        auto_pad: str,
        ceil_mode: int = 0,
    ) -> Window:
        n = len(size)
        if len(space) != n:
            raise ShapeError(f"a window {tuple(size)} moves over {n} axes, not over {tuple(space)}")
        stride, dilation = tuple(strides or [1] * n), tuple(dilations or [1] * n)
        reach = [(w - 1) * d + 1 for w, d in zip(size, dilation, strict=True)]
        if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            both = []
            for length, s, r in zip(space, stride, reach, strict=True):
                total = max(0, (-(-length // s) - 1) * s + r - length)
                less, more = total // 2, total - total // 2
                both.append((less, more) if auto_pad == "SAME_UPPER" else (more, less))
        else:
            given = list(pads or [0] * 2 * n)
            both = list(zip(given[:n], given[n:], strict=True))
        over = [0] * n
        if ceil_mode:
            for i, (length, s, r) in enumerate(zip(space, stride, reach, strict=True)):
                a, b = both[i]
                count = -(-(length + a + b - r) // s) + 1
                if (count - 1) * s >= length + a:  # a window may not start in the padding behind
                    count -= 1
                over[i] = max(0, (count - 1) * s + r - length - a - b)
        return cls(tuple(size), stride, dilation, tuple(both), tuple(over))

    def padded(self, x: Array, fill: float, over: bool = True) -> Array:
        """x with its padding, and what the last window reaches beyond it."""
        pads = [(a, b + o * over) for (a, b), o in zip(self.padding, self.over, strict=True)]
        if not any(map(any, pads)):
            return x
        widths = ((0, 0),) * (x.ndim - len(pads)) + tuple(pads)
        return xp_of(x).pad(x, widths, mode="constant", constant_values=fill)

    def places(self, space: Sequence[int]) -> tuple[int, ...]:
        """How many places the window has in space that is padded already."""
        return tuple(
            (n - (w - 1) * d - 1) // s + 1
            for n, w, s, d in zip(space, self.size, self.stride, self.dilation, strict=True)
        )

    def shifts(self, x: Array) -> Iterator[tuple[tuple[int, ...], Array]]:
        """For each place in the window, what is seen there, over all places of the window."""
        n = len(self.size)
        places = self.places(x.shape[-n:])
        for at in product(*map(range, self.size)):
            key = tuple(
                slice(i * d, i * d + (k - 1) * s + 1, s)
                for i, d, k, s in zip(at, self.dilation, places, self.stride, strict=True)
            )
            yield at, x[(..., *key)]


@operator("Conv")
def conv(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    kernel_shape: Any = None,
    strides: Any = None,
    dilations: Any = None,
    pads: Any = None,
    group: int = 1,
    auto_pad: str = "NOTSET",
) -> Array:
    window = Window.of(x.shape[2:], weight.shape[2:], strides, dilations, pads, auto_pad)
    if x.shape[1] != weight.shape[1] * group or weight.shape[0] % group:
        raise ShapeError(f"Conv of {x.shape} with {weight.shape} in {group} groups")
    x = window.padded(x, 0)
    if group == x.shape[1] == weight.shape[0]:
        y = _depthwise(x, weight, window)
    else:
        parts = [
            _conv(*each, window)
            for each in zip(_halves(x, 1, group), _halves(weight, 0, group), strict=True)
        ]
        y = parts[0] if group == 1 else xp_of(x).concatenate(parts, axis=1)
    return y if bias is None else y + _along_channels(bias, x.ndim)


def _halves(x: Array, axis: int, group: int) -> list[Array]:
    n = x.shape[axis] // group
    return [x[(slice(None),) * axis + (slice(i * n, (i + 1) * n),)] for i in range(group)]


def _along_channels(bias: Array, ndim: int) -> Array:
    return bias.reshape((-1, *(1,) * (ndim - 2)))


def _depthwise(x: Array, weight: Array, window: Window) -> Array:
    y = None
    for at, seen in window.shifts(x):
        part = seen * _along_channels(weight[(slice(None), 0, *at)], x.ndim)
        y = part if y is None else y + part
    assert y is not None
    return y


def _conv(x: Array, weight: Array, window: Window) -> Array:
    """All that the window sees, as rows of one product; the result lies channels last."""
    xp, axes = xp_of(x), tuple(range(2, x.ndim))
    if prod(window.size) == 1:
        seen = x[(..., *(slice(None, None, s) for s in window.stride))]
        rows = xp.moveaxis(seen, 1, -1)
    else:
        reach = tuple((w - 1) * d + 1 for w, d in zip(window.size, window.dilation, strict=True))
        seen = xp.lib.stride_tricks.sliding_window_view(x, reach, axis=axes)
        key = (slice(None),) * 2 + tuple(slice(None, None, s) for s in window.stride)
        seen = seen[key + tuple(slice(None, None, d) for d in window.dilation)]
        rows = xp.moveaxis(seen, 1, len(axes) + 1)  # (n, *places, c, *window)
    lead = rows.shape[: len(axes) + 1]
    flat = rows.reshape(prod(lead), weight.size // weight.shape[0])
    y = xp.matmul(flat, weight.reshape(weight.shape[0], -1).T)
    return xp.moveaxis(y.reshape(*lead, weight.shape[0]), -1, 1)


@operator("ConvTranspose")
def conv_transpose(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    kernel_shape: Any = None,
    strides: Any = None,
    dilations: Any = None,
    pads: Any = None,
    group: int = 1,
    auto_pad: str = "NOTSET",
    output_padding: Any = None,
    output_shape: Any = None,
) -> Array:
    """Zeros between the places of x, then a convolution with the window turned over."""
    xp, size = xp_of(x), weight.shape[2:]
    n = len(size)
    s, d, extra = (
        list(v or [default] * n)
        for v, default in ((strides, 1), (dilations, 1), (output_padding, 0))
    )
    full = [
        (length - 1) * a + (w - 1) * b + 1 + e
        for length, a, w, b, e in zip(x.shape[2:], s, size, d, extra, strict=True)
    ]
    begin, end = (list(pads or [0] * 2 * n)[i * n : (i + 1) * n] for i in (0, 1))
    if output_shape or auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        wanted = list(output_shape or [])[-n:] or [
            k * a for k, a in zip(x.shape[2:], s, strict=True)
        ]
        total = [f - w for f, w in zip(full, wanted, strict=True)]
        less = [t // 2 for t in total]
        more = [t - h for t, h in zip(total, less, strict=True)]
        begin, end = (less, more) if auto_pad != "SAME_LOWER" else (more, less)
        if auto_pad == "NOTSET":
            begin, end = more, less
    spread = _spread(x, s)
    reach = [(w - 1) * b for w, b in zip(size, d, strict=True)]
    widths = [(r - a, r - b + e) for r, a, b, e in zip(reach, begin, end, extra, strict=True)]
    spread = xp.pad(
        spread,
        ((0, 0), (0, 0), *((max(0, a), max(0, b)) for a, b in widths)),
        mode="constant",
        constant_values=0,
    )
    spread = spread[
        (
            ...,
            *(
                slice(max(0, -a), k - max(0, -b))
                for k, (a, b) in zip(spread.shape[2:], widths, strict=True)
            ),
        )
    ]
    turned = xp.flip(weight, tuple(range(2, x.ndim)))
    window = Window(size, (1,) * n, tuple(d), ((0, 0),) * n, (0,) * n)
    parts = [
        _conv(part, w.swapaxes(0, 1), window)
        for part, w in zip(_halves(spread, 1, group), _halves(turned, 0, group), strict=True)
    ]
    y = parts[0] if group == 1 else xp.concatenate(parts, axis=1)
    return y if bias is None else y + _along_channels(bias, x.ndim)


def _spread(x: Array, stride: Sequence[int]) -> Array:
    """x with stride - 1 zeros between neighbours in space."""
    xp = xp_of(x)
    for axis, s in enumerate(stride, 2):
        if s > 1:
            one = xp.expand_dims(x, axis + 1)
            widths = ((0, 0),) * (axis + 1) + ((0, s - 1),) + ((0, 0),) * (x.ndim - axis - 1)
            wide = xp.pad(one, widths, mode="constant", constant_values=0)
            sizes = (*x.shape[:axis], x.shape[axis] * s, *x.shape[axis + 1 :])
            x = wide.reshape(sizes)[(slice(None),) * axis + (slice(0, sizes[axis] - s + 1),)]
    return x


@operator("MaxPool")
def max_pool(
    x: Array,
    *,
    kernel_shape: Sequence[int],
    strides: Any = None,
    dilations: Any = None,
    pads: Any = None,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    storage_order: int = 0,
    count: int,
) -> Any:
    window = Window.of(x.shape[2:], kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    least = -np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min
    xp, wide = xp_of(x), window.padded(x, least)
    y, best = None, None
    for at, seen in window.shifts(wide):
        if count > 1:
            here = _flat_places(x, window, seen.shape, at, storage_order)
            best = here if y is None else xp.where(seen > y, here, best)
        y = seen if y is None else xp.maximum(y, seen)
    return y if count == 1 else (y, best)


def _flat_places(
    x: Array, window: Window, shape: Sequence[int], at: Sequence[int], order: int
) -> Array:
    """For each place of the window, where in x it looks at `at`, counted over all of x."""
    n = len(window.size)
    space, total = x.shape[2:], np.zeros((1,) * (n + 2), "int64")
    weights = [prod(space[i + 1 :]) if not order else prod(space[:i]) for i in range(n)]
    for i in range(n):
        along = (
            at[i] * window.dilation[i]
            - window.padding[i][0]
            + np.arange(shape[2 + i]) * window.stride[i]
        )
        total = total + (along * weights[i]).reshape(
            [-1 if j == i + 2 else 1 for j in range(n + 2)]
        )
    planes = np.arange(prod(x.shape[:2])).reshape((*x.shape[:2], *(1,) * n)) * prod(space)
    return beside(np.ascontiguousarray(np.broadcast_to(planes + total, shape)), x)


@operator("AveragePool LpPool")
def average_pool(
    x: Array,
    *,
    kernel_shape: Sequence[int],
    strides: Any = None,
    dilations: Any = None,
    pads: Any = None,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    p: int = 2,
    op: str,
) -> Array:
    window = Window.of(x.shape[2:], kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    xp = xp_of(x)
    if op == "LpPool":
        x = xp.power(xp.absolute(x), p)
    y = None
    for _, seen in window.shifts(window.padded(x, 0)):
        y = seen if y is None else y + seen
    assert y is not None
    if op == "LpPool":
        return xp.power(y, 1 / p)
    ones = np.ones((1, 1, *x.shape[2:]))
    if count_include_pad:
        ones = np.ones((1, 1, *window.padded(ones, 0, over=False).shape[2:]))
        pads_over = [(0, 0), (0, 0), *((0, o) for o in window.over)]
        seen_ones = np.pad(ones, pads_over)
    else:
        seen_ones = window.padded(ones, 0)
    counts = sum(seen for _, seen in window.shifts(seen_ones))
    return y / beside(np.asarray(counts).astype(x.dtype), x)


@operator("GlobalAveragePool GlobalMaxPool")
def global_pool(x: Array, *, op: str) -> Array:
    axes = tuple(range(2, x.ndim))
    pool = x.max if op == "GlobalMaxPool" else x.mean
    return pool(axis=axes, keepdims=True)


@operator("GlobalLpPool")
def global_lp_pool(x: Array, *, p: int = 2) -> Array:
    xp, axes = xp_of(x), tuple(range(2, x.ndim))
    return xp.power(xp.power(xp.absolute(x), p).sum(axis=axes, keepdims=True), 1 / p)


# Norms over space


@operator("InstanceNormalization")
def instance_norm(x: Array, gain: Array, bias: Array, *, epsilon: float = 1e-5) -> Array:
    xp, axes = xp_of(x), tuple(range(2, x.ndim))
    y = x - x.mean(axis=axes, keepdims=True)
    y = y / xp.sqrt(xp.square(y).mean(axis=axes, keepdims=True) + epsilon)
    return y * _along_channels(gain, x.ndim) + _along_channels(bias, x.ndim)


@operator("GroupNormalization")
def group_norm(
    x: Array,
    gain: Array,
    bias: Array,
    *,
    num_groups: int,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> Array:
    xp = xp_of(x)
    y = x.reshape(x.shape[0], num_groups, prod(x.shape[1:]) // num_groups)
    y = y - y.mean(axis=2, keepdims=True)
    y = (y / xp.sqrt(xp.square(y).mean(axis=2, keepdims=True) + epsilon)).reshape(x.shape)
    return y * _along_channels(gain, x.ndim) + _along_channels(bias, x.ndim)


@operator("LRN")
def local_response_norm(
    x: Array, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0
) -> Array:
    xp, before = xp_of(x), (size - 1) // 2
    widths = ((0, 0), (before, size - 1 - before), *((0, 0),) * (x.ndim - 2))
    squares = xp.pad(xp.square(x), widths, mode="constant", constant_values=0)
    total = squares[:, : x.shape[1]]
    for i in range(1, size):
        total = total + squares[:, i : i + x.shape[1]]
    return x / xp.power(bias + (alpha / size) * total, beta)


# Resizing: one product with an (out, in) matrix for each axis

_TO_INPUT: dict[str, Callable[..., HostArray]] = {
    "half_pixel": lambda i, scale, n, size, roi: (i + 0.5) / scale - 0.5,
    "half_pixel_symmetric": lambda i, scale, n, size, roi: (
        n / 2 * (1 - size / (n * scale)) + (i + 0.5) / scale - 0.5
    ),
    "pytorch_half_pixel": lambda i, scale, n, size, roi: (
        (i + 0.5) / scale - 0.5 if size > 1 else 0 * i
    ),
    "align_corners": lambda i, scale, n, size, roi: i * (n - 1) / (size - 1) if size > 1 else 0 * i,
    "asymmetric": lambda i, scale, n, size, roi: i / scale,
    "tf_crop_and_resize": lambda i, scale, n, size, roi: (
        roi[0] * (n - 1) + i * (roi[1] - roi[0]) * (n - 1) / (size - 1)
        if size > 1
        else 0 * i + 0.5 * (roi[0] + roi[1]) * (n - 1)
    ),
}
_NEAREST: dict[str, Callable[[HostArray], HostArray]] = {
    "round_prefer_floor": lambda at: np.ceil(at - 0.5),
    "round_prefer_ceil": lambda at: np.floor(at + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


@operator("Resize", numbers="roi scales sizes")
def resize(
    x: Array,
    roi: HostArray | None = None,
    scales: HostArray | None = None,
    sizes: HostArray | None = None,
    *,
    antialias: int = 0,
    axes: Any = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Array:
    along = list(range(x.ndim)) if axes is None else [a % x.ndim for a in axes]
    if sizes is not None and sizes.size:
        wanted = ints(sizes) or []
        factor = [w / x.shape[a] for w, a in zip(wanted, along, strict=True)]
        if keep_aspect_ratio_policy != "stretch":
            same = (min if keep_aspect_ratio_policy == "not_larger" else max)(factor)
            factor = [same] * len(along)
            wanted = [floor(same * x.shape[a] + 0.5) for a in along]
    elif scales is not None and scales.size:
        factor = [float(s) for s in scales.ravel()]
        wanted = [floor(s * x.shape[a]) for s, a in zip(factor, along, strict=True)]
    else:
        raise OptionError("Resize takes scales or sizes")
    regions = np.asarray(
        [0.0] * len(along) + [1.0] * len(along) if roi is None or not roi.size else roi
    )
    for i, (axis, size, scale) in enumerate(zip(along, wanted, factor, strict=True)):
        n = x.shape[axis]
        crops = coordinate_transformation_mode == "tf_crop_and_resize"
        region = (regions[i], regions[i + len(along)]) if crops else (0.0, 1.0)
        library_of_shape((*x.shape[:axis], max(size, 0), *x.shape[axis + 1 :]))
        if size == n and scale == 1 and region == (0.0, 1.0):
            continue
        at = _TO_INPUT[coordinate_transformation_mode](
            np.arange(size, dtype="float64"), scale, n, size, region
        )
        outside = (at < 0) | (at > n - 1) if crops else None
        if mode == "nearest":
            ids = np.clip(_NEAREST[nearest_mode](at), 0, n - 1).astype("int64")
            x = xp_of(x).take(x, beside(ids, x), axis=axis)
        else:
            stretch = max(1.0, 1 / scale) if antialias else 1.0
            a = cubic_coeff_a if mode == "cubic" else None
            matrix = _interpolation(
                at,
                n,
                a,
                stretch,
                bool(exclude_outside or (antialias and a is not None and exclude_outside)),
            )
            x = _along_axis(x, matrix, axis)
        if outside is not None and outside.any():
            here = outside.reshape([-1 if j == axis else 1 for j in range(x.ndim)])
            fill = np.asarray(extrapolation_value, x.dtype)
            x = xp_of(x).where(beside(here, x), beside(fill, x), x)
    return x


def _interpolation(
    at: HostArray, n: int, a: float | None, stretch: float, exclude: bool
) -> HostArray:
    """The weights (out, in) of a linear filter, or of a cubic one with this coefficient."""
    reach = (1 if a is None else 2) * stretch
    matrix = np.zeros((len(at), n))
    for i, place in enumerate(at):
        first = floor(place) - ceil(reach) + 1 if stretch == 1 else floor(place - reach) + 1
        last = floor(place) + ceil(reach) if stretch == 1 else ceil(place + reach) - 1
        ids = np.arange(first, last + 1)
        distance = np.abs(ids - place) / stretch
        weights = np.maximum(0, 1 - distance) if a is None else _cubic(distance, a)
        if exclude:
            weights = np.where((ids >= 0) & (ids < n), weights, 0)
        if exclude or stretch != 1:
            weights = weights / weights.sum()
        np.add.at(matrix[i], np.clip(ids, 0, n - 1), weights)
    return matrix


def _cubic(t: HostArray, a: float) -> HostArray:
    """[Keys 1981, doi:10.1109/TASSP.1981.1163711]"""
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    return np.where(t <= 1, near, np.where(t < 2, far, 0))


def _along_axis(x: Array, matrix: HostArray, axis: int) -> Array:
    """The matrix (out, in) times x along an axis."""
    xp = xp_of(x)
    weights = matrix.astype(x.dtype if x.dtype.kind == "f" else "float32").T
    y = xp.matmul(xp.moveaxis(x, axis, -1), beside(np.ascontiguousarray(weights), x))
    y = xp.moveaxis(y, -1, axis)
    return y if x.dtype.kind == "f" else xp.rint(y).astype(x.dtype)
