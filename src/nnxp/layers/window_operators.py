"""ONNX operators that look through windows or at space: convolutions, pools, resizing, their norms.

x is (n, c, *space), as ONNX has it: kernels look at it channels last, and what they make is handed
on as a view.
"""

from __future__ import annotations

from functools import reduce
from itertools import product
from math import floor, inf, prod
from typing import Any

import numpy as np

from nnxp import kernels
from nnxp._arrays import Array, HostArray, is_floating
from nnxp._errors import OptionError, ShapeError
from nnxp.kernels import Kernel
from nnxp.kernels._windows import Windows, padded, patches, windows
from nnxp.kernels.resize import keys_weight
from nnxp.layers.conv import window_of_conv, window_of_conv_transpose
from nnxp.layers.operators import beside, ints, library_of_shape, operator, xp_of
from nnxp.layers.shape import channels_last

_NAMED = {"SAME_UPPER": "same", "SAME_LOWER": "same_lower", "VALID": "valid"}


MOVES = "strides dilations pads auto_pad"
"""The attributes of what looks through windows."""


def _moved(
    axes: int,
    *,
    strides: Any = None,
    dilations: Any = None,
    pads: Any = None,
    auto_pad: str = "NOTSET",
) -> dict[str, Any]:
    """How windows move over space, as options of a kernel."""
    ends = list(pads or [0] * 2 * axes)
    return {
        "stride": tuple(strides or [1] * axes),
        "dilation": tuple(dilations or [1] * axes),
        "padding": _NAMED.get(auto_pad) or tuple(zip(ends[:axes], ends[axes:], strict=True)),
    }


@operator("Conv", attributes=MOVES, as_is=True)
def conv(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    kernel_shape: Any = None,
    group: int = 1,
    **moves: Any,
) -> Array:
    if x.shape[1] != weight.shape[1] * group or weight.shape[0] % group:
        raise ShapeError(f"Conv of {x.shape} with {weight.shape} in {group} groups")
    window = window_of_conv(weight)
    options = _moved(weight.ndim - 2, **moves) | {"groups": group}
    return channels_last(lambda x: kernels.conv(x, window, bias, **options), x)


@operator("ConvTranspose", attributes=MOVES, as_is=True)
def conv_transpose(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    kernel_shape: Any = None,
    group: int = 1,
    auto_pad: str = "NOTSET",
    output_padding: Any = None,
    output_shape: Any = None,
    **moves: Any,
) -> Array:
    c, _, *size = weight.shape
    if x.shape[1] != c or c % group:
        raise ShapeError(f"ConvTranspose of {x.shape} with {weight.shape} in {group} groups")
    axes = len(size)
    options = _moved(axes, auto_pad=auto_pad, **moves)
    more = list(output_padding or [0] * axes)
    if output_shape or auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        steps = options["stride"]
        wanted = list(output_shape or [])[-axes:]
        wanted = wanted or [n * s for n, s in zip(x.shape[2:], steps, strict=True)]
        ends = []
        for i, (n, w, s, d) in enumerate(
            zip(x.shape[2:], size, steps, options["dilation"], strict=True)
        ):
            surplus = (n - 1) * s + (w - 1) * d + 1 + more[i] - wanted[i]
            more[i] += max(0, -surplus)
            less, rest = max(0, surplus) // 2, (max(0, surplus) + 1) // 2
            ends.append((less, rest) if auto_pad == "SAME_UPPER" else (rest, less))
        options["padding"] = tuple(ends)
    options |= {"groups": group, "output_padding": tuple(more)}
    window = window_of_conv_transpose(weight, group)
    return channels_last(lambda x: kernels.conv_transpose(x, window, bias, **options), x)


# Pools


POOL = f"kernel_shape ceil_mode {MOVES}"


def _over(*, kernel_shape: Any, ceil_mode: int = 0, **moves: Any) -> dict[str, Any]:
    """The windows of a pool, and how they move, as options of a kernel."""
    size = tuple(kernel_shape)
    return {"window": size, "ceil_mode": bool(ceil_mode), **_moved(len(size), **moves)}


def _pooled(kernel: Kernel, x: Array, **options: Any) -> Array:
    """What a pool makes of x; of whole numbers as of floats that hold them."""
    if is_floating(x.dtype):
        return channels_last(lambda x: kernel(x, **options), x)
    return _pooled(kernel, x.astype("float64"), **options).astype(x.dtype)


@operator("MaxPool", attributes=POOL, as_is=True)
def max_pool(x: Array, *, storage_order: int = 0, count: int, **how: Any) -> Any:
    options = _over(**how)
    y = _pooled(kernels.max_pool, x, **options)
    if count == 1:
        return y
    last = xp_of(x).moveaxis(x if is_floating(x.dtype) else x.astype("float64"), 1, -1)
    over = windows("MaxPool", last, options.pop("window"), **options)
    return y, xp_of(x).moveaxis(_largest(last, over, storage_order), -1, 1)


def _largest(x: Array, over: Windows, storage_order: int) -> Array:
    """Where in x (n, *space, c) each window's largest element is, counted over all of (n, c,
    *space): the axes of space in their order or, with a storage order, the last one slowest."""
    n, *space, c = x.shape
    axes = len(space)
    seen = patches(padded(x, over.pads, -inf), over)
    at = seen.reshape(n, *over.positions, prod(over.window), c).argmax(axis=-2)
    steps = [prod(space[:i] if storage_order else space[i + 1 :]) for i in range(axes)]
    apart = np.multiply(steps, over.dilation).reshape(-1, *(1,) * axes)
    inner = (np.indices(over.window) * apart).sum(axis=0).ravel()
    starts = [
        (np.arange(over.positions[i]) * over.stride[i] - over.pads[i][0]) * steps[i]
        for i in range(axes)
    ]
    planes = np.arange(n * c).reshape(n, *(1,) * axes, c) * prod(space)
    outer = planes + reduce(np.add.outer, starts)[..., None]
    return xp_of(x).take(beside(inner, x), at, axis=0) + beside(outer, x)


@operator("AveragePool", attributes=POOL, as_is=True)
def average_pool(x: Array, *, count_include_pad: int = 0, **how: Any) -> Array:
    counted = bool(count_include_pad)
    return _pooled(kernels.average_pool, x, count_include_pad=counted, **_over(**how))


@operator("LpPool", attributes=POOL, as_is=True)
def lp_pool(x: Array, *, p: int = 2, **how: Any) -> Array:
    return _pooled(kernels.lp_pool, x, p=p, **_over(**how))


@operator("GlobalAveragePool GlobalMaxPool", as_is=True)
def global_pool(x: Array, *, op: str) -> Array:
    kernel = kernels.global_max_pool if op == "GlobalMaxPool" else kernels.global_average_pool
    return _pooled(kernel, x, keepdims=True)


@operator("GlobalLpPool")
def global_lp_pool(x: Array, *, p: int = 2) -> Array:
    xp, axes = xp_of(x), tuple(range(2, x.ndim))
    return xp.power(xp.power(xp.absolute(x), p).sum(axis=axes, keepdims=True), 1 / p)


# Norms over space


@operator("InstanceNormalization", as_is=True)
def instance_norm(x: Array, gain: Array, bias: Array, *, epsilon: float = 1e-5) -> Array:
    return channels_last(lambda x: kernels.instance_norm(x, gain, bias, eps=epsilon), x)


@operator("GroupNormalization", as_is=True)
def group_norm(
    x: Array,
    gain: Array,
    bias: Array,
    *,
    num_groups: int,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> Array:
    options = {"groups": num_groups, "eps": epsilon}
    return channels_last(lambda x: kernels.group_norm(x, gain, bias, **options), x)


@operator("LRN", as_is=True)
def local_response_norm(
    x: Array, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0
) -> Array:
    options = {"size": size, "alpha": alpha, "beta": beta, "k": bias}

    def norm(x: Array) -> Array:
        """Of an even size, the kernel sees one more channel before than behind, ONNX one less."""
        if size % 2:
            return kernels.local_response_norm(x, **options)
        xp = xp_of(x)
        return xp.flip(kernels.local_response_norm(xp.flip(x, -1), **options), -1)

    return channels_last(norm, x)


LONGEST = 1 << 22
"""Places along an axis that is resized: each is computed on its own beforehand."""


@operator("Resize", numbers="roi scales sizes", as_is=True)
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
    crops = coordinate_transformation_mode == "tf_crop_and_resize"
    by_size = crops or coordinate_transformation_mode == "align_corners"
    along = list(range(x.ndim)) if axes is None else [a % x.ndim for a in axes]
    size, scale, region = list(x.shape), [1.0] * x.ndim, [(0.0, 1.0)] * x.ndim
    if sizes is not None and sizes.size:
        wanted = ints(sizes)
        factors = [w / x.shape[a] for w, a in zip(wanted, along, strict=True)]
        if keep_aspect_ratio_policy == "stretch":
            by_size = True
        else:
            same = (min if keep_aspect_ratio_policy == "not_larger" else max)(factors)
            factors = [same] * len(along)
            wanted = [floor(same * x.shape[a] + 0.5) for a in along]
    elif scales is not None and scales.size:
        factors = [float(s) for s in scales.ravel()]
        wanted = [floor(s * x.shape[a]) for s, a in zip(factors, along, strict=True)]
    else:
        raise OptionError("Resize takes scales or sizes")
    corners = [] if roi is None else np.ravel(roi).tolist()
    for i, (axis, w, factor) in enumerate(zip(along, wanted, factors, strict=True)):
        size[axis], scale[axis] = w, factor
        if corners:
            region[axis] = corners[i], corners[i + len(along)]
    if nearest_mode == "simple":  # that of the time before opset 11
        if min(factors) < 1 < max(factors) and mode == "nearest":
            raise OptionError(f"Resize of before opset 11 by {factors}, both larger and smaller")
        nearest_mode = "ceil" if min(factors) < 1 else "floor"
    library_of_shape(tuple(max(0, w) for w in size))
    if max(wanted) > LONGEST:
        raise ShapeError(f"Resize to an axis of {max(wanted):,}: it makes up to {LONGEST:,}")
    options: dict[str, Any] = {
        "method": mode, "nearest": nearest_mode, "cubic": cubic_coeff_a,
        "exclude_outside": bool(exclude_outside), "antialias": bool(antialias),
        "outside": extrapolation_value,
    }  # fmt: skip
    if not crops:
        options["coordinates"] = coordinate_transformation_mode

    def resized(x: Array, axes: slice) -> Array:
        """x (n, *space, c), whose axes of space are these."""
        return kernels.resize(
            x,
            size=tuple(size[axes]),
            scale=None if by_size else tuple(scale[axes]),
            region=tuple(region[axes]) if crops else None,
            **options,
        )

    dtype, rounds = x.dtype, not is_floating(x.dtype) and mode != "nearest"
    if not is_floating(dtype):
        x = x.astype("float64" if rounds else "int64")
    if (size[:2], scale[:2], region[:2]) == (list(x.shape[:2]), [1.0] * 2, [(0.0, 1.0)] * 2):
        y = channels_last(lambda x: resized(x, slice(2, None)), x)
    else:  # all axes as space
        y = resized(x.reshape((1, *x.shape, 1)), slice(None))
        y = y.reshape(y.shape[1:-1])
    return (xp_of(y).rint(y) if rounds else y).astype(dtype, copy=False)


@operator("AffineGrid", numbers="size")
def affine_grid(theta: Array, size: HostArray, *, align_corners: int = 0) -> Array:
    """theta (n, axes, axes + 1), of points from -1 to 1 -> (n, *space, axes), the last axis first

    [Jaderberg et al. 2015, arXiv:1506.02025]
    """
    space = ints(size)[2:]
    library_of_shape(space)
    places = []
    for n in space:
        at = np.arange(n)
        ends = 2 * at / max(n - 1, 1) - 1 if n > 1 else np.zeros(1)
        places.append(ends if align_corners else (2 * at + 1) / n - 1)
    around = np.meshgrid(*places, indexing="ij")[::-1]
    points = np.stack([*around, np.ones(space)], axis=-1).reshape(-1, len(space) + 1)
    y = xp_of(theta).matmul(beside(points.astype(theta.dtype), theta), theta.swapaxes(1, 2))
    return y.reshape((theta.shape[0], *space, len(space)))


@operator("GridSample")
def grid_sample(
    x: Array,
    grid: Array,
    *,
    align_corners: int = 0,
    mode: str = "linear",
    padding_mode: str = "zeros",
) -> Array:
    """x (n, c, *space) at grid (n, *out, axes), -1 to 1, the last axis first -> (n, c, *out)"""
    xp, (n, c, *space) = xp_of(x), x.shape
    flat, taps = x.reshape((n, c, prod(space))), []
    for i, size in enumerate(space):
        at = (grid[..., len(space) - 1 - i] + 1) / 2
        at = at * (size - 1) if align_corners else at * size - 0.5
        low, high = (0.0, size - 1.0) if align_corners else (-0.5, size - 0.5)
        taps.append(_taps(at, size, low, high, mode.removeprefix("bi"), padding_mode))
    y = xp.zeros((), dtype=x.dtype)
    for tap in product(*taps):
        place, weight, _ = reduce(_next, tap)
        seen = place.reshape((n, 1, -1))
        values = xp.take_along_axis(flat, xp.broadcast_to(seen, (n, c, seen.shape[-1])), axis=2)
        y = values * weight.reshape(seen.shape) + y
    return y.reshape((n, c, *grid.shape[1:-1]))


def _next(one: tuple[Any, Any, int], two: tuple[Any, Any, int]) -> tuple[Any, Any, int]:
    """A place along two axes of so many places, and its weight."""
    return one[0] * two[2] + two[0], one[1] * two[1], one[2] * two[2]


def _taps(
    at: Array, size: int, low: float, high: float, mode: str, padding: str
) -> list[tuple[Array, Array, int]]:
    """The places along an axis that a point sees, with their weights; 0 for those outside."""
    xp = xp_of(at)
    if mode == "nearest":
        at = xp.rint(at)
    if padding == "border" and mode != "cubic":  # of which each place seen is moved inside
        at = xp.clip(at, 0, size - 1)
    elif padding == "reflection":
        at = _reflected(at, low, high)
    first = xp.floor(at)
    apart = at - first
    if mode == "nearest":
        weights = {0: xp.ones_like(at)}
    elif mode == "linear":
        weights = {0: 1 - apart, 1: apart}
    else:
        weights = {k: keys_weight(xp, xp.absolute(apart - k), -0.75) for k in (-1, 0, 1, 2)}
    taps = []
    for k, weight in weights.items():
        place = first + k
        if padding == "zeros":
            weight = xp.where((place >= 0) & (place <= size - 1), weight, xp.zeros_like(weight))
        elif padding == "reflection":
            place = _reflected(place, low, high)
        taps.append((xp.clip(place, 0, size - 1).astype("int64"), weight, size))
    return taps


def _reflected(at: Array, low: float, high: float) -> Array:
    """A place beyond the ends, as far on this side of them."""
    xp, span = xp_of(at), high - low
    if span == 0:
        return xp.full_like(at, low)
    way = xp.remainder(at - low, 2 * span)
    return xp.minimum(way, 2 * span - way) + low


@operator("NonMaxSuppression", numbers="boxes scores most overlap least")
def non_max_suppression(
    boxes: HostArray,
    scores: HostArray,
    most: HostArray | None = None,
    overlap: HostArray | None = None,
    least: HostArray | None = None,
    *,
    center_point_box: int = 0,
) -> HostArray:
    """boxes (n, k, 4), scores (n, classes, k) -> (kept, 3) of row, class and box, on the host"""
    limit = 0 if most is None else int(most.item())
    shared = 0.0 if overlap is None else float(overlap.item())
    kept: list[tuple[int, int, int]] = []
    for row, corners in enumerate(_corners(boxes, center_point_box)):
        for kind, score in enumerate(scores[row]):
            order = np.argsort(-score, kind="stable")
            left = order if least is None else order[score[order] > least.item()]
            for _ in range(limit):
                if not left.size:
                    break
                kept.append((row, kind, int(left[0])))
                left = left[1:][_shared(corners[left[0]], corners[left[1:]]) <= shared]
    return np.array(kept, "int64").reshape(-1, 3)


def _corners(boxes: HostArray, by_centre: int) -> HostArray:
    """Boxes as (y, x) of the lower and of the upper corner."""
    if by_centre:
        x, y, width, height = np.moveaxis(boxes, -1, 0)
        sides = (y - height / 2, x - width / 2, y + height / 2, x + width / 2)
        return np.stack(sides, axis=-1)
    one, two = boxes[..., :2], boxes[..., 2:]
    return np.concatenate([np.minimum(one, two), np.maximum(one, two)], axis=-1)


def _shared(box: HostArray, others: HostArray) -> HostArray:
    """What a box and each of others share, of what they cover together."""
    low = np.maximum(box[:2], others[:, :2])
    both = np.maximum(np.minimum(box[2:], others[:, 2:]) - low, 0).prod(axis=1)
    area = (others[:, 2:] - others[:, :2]).prod(axis=1) + (box[2:] - box[:2]).prod()
    together = area - both
    share: HostArray = np.divide(both, together, out=np.zeros_like(both), where=together > 0)
    return share
