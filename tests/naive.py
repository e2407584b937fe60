"""What the kernels over space mean, in loops: slow, plain, and written from their formulas alone.

In NumPy and in the type of x. Positions are visited one by one; what a window sees outside of x is
nothing, where the kernels pad.
"""

from __future__ import annotations

from itertools import product
from math import ceil, floor, prod

import numpy as np


def each(value, axes):
    return (value,) * axes if isinstance(value, int | float) else tuple(value)


def sides(padding, axes):
    return [(p, p) if isinstance(p, int) else tuple(p) for p in each(padding, axes)]


def named_sides(padding, space, window, stride, dilation):
    """The padding as pairs; "same" as what makes ceil(n / stride) positions."""
    if not isinstance(padding, str):
        return sides(padding, len(space))
    pairs = []
    for n, k, s, d in zip(space, window, stride, dilation, strict=True):
        total = max(0, (ceil(n / s) - 1) * s + (k - 1) * d + 1 - n) if padding != "valid" else 0
        less, more = total // 2, total - total // 2
        pairs.append((less, more) if padding != "same_lower" else (more, less))
    return pairs


def counts(space, window, stride, pairs, dilation, ceil_mode=False):
    """How many positions there are, found by trying one after the other."""
    made = []
    for n, k, s, (a, b), d in zip(space, window, stride, pairs, dilation, strict=True):
        count = 0
        while True:
            start, end = count * s - a, count * s - a + (k - 1) * d
            if not (end < n + b or (ceil_mode and end < n + b + s - 1 and start < n)):
                break
            count += 1
        made.append(count)
    return made


def seen(x, at, window, stride, pairs, dilation):
    """The elements of its window that a position sees: (place in the window, place in x)."""
    for tap in product(*map(range, window)):
        place = tuple(
            p * s - a + k * d
            for p, s, (a, _), k, d in zip(at, stride, pairs, tap, dilation, strict=True)
        )
        if all(0 <= i < n for i, n in zip(place, x.shape[1:-1], strict=True)):
            yield tap, place


def conv(x, weight, bias=None, *, stride=1, padding=0, dilation=1, groups=1):
    window, (inner, outputs) = weight.shape[:-2], weight.shape[-2:]
    axes = len(window)
    stride, dilation = each(stride, axes), each(dilation, axes)
    pairs = named_sides(padding, x.shape[1:-1], window, stride, dilation)
    positions = counts(x.shape[1:-1], window, stride, pairs, dilation)
    y = np.zeros((len(x), *positions, outputs), x.dtype)
    per = outputs // groups
    for at in np.ndindex(*positions):
        for tap, place in seen(x, at, window, stride, pairs, dilation):
            for g in range(groups):
                channels, made = slice(g * inner, (g + 1) * inner), slice(g * per, (g + 1) * per)
                y[:, *at, made] += x[:, *place, channels] @ weight[(*tap, slice(None), made)]
    return y if bias is None else y + bias


def conv_weight_gradient(x, dy, *, window, stride=1, padding=0, dilation=1, groups=1):
    axes, inner, per = len(window), x.shape[-1] // groups, dy.shape[-1] // groups
    stride, dilation = each(stride, axes), each(dilation, axes)
    pairs = named_sides(padding, x.shape[1:-1], window, stride, dilation)
    dw = np.zeros((*window, inner, groups * per), x.dtype)
    for at in np.ndindex(*counts(x.shape[1:-1], window, stride, pairs, dilation)):
        for tap, place in seen(x, at, window, stride, pairs, dilation):
            for g in range(groups):
                channels, made = slice(g * inner, (g + 1) * inner), slice(g * per, (g + 1) * per)
                dw[(*tap, slice(None), made)] += x[:, *place, channels].T @ dy[:, *at, made]
    return dw


def conv_transpose(
    x, weight, bias=None, *, stride=1, padding=0, output_padding=0, dilation=1, groups=1
):
    window, (inner, outputs) = weight.shape[:-2], weight.shape[-2:]
    axes = len(window)
    stride, dilation, more = (each(v, axes) for v in (stride, dilation, output_padding))
    full = [
        (n - 1) * s + (k - 1) * d + 1 + m
        for n, s, k, d, m in zip(x.shape[1:-1], stride, window, dilation, more, strict=True)
    ]
    if padding == "same":
        surplus = [f - n * s for f, n, s in zip(full, x.shape[1:-1], stride, strict=True)]
        pairs = [(s // 2, s - s // 2) for s in surplus]
    else:
        pairs = sides(padding, axes)
    lengths = [f - a - b for f, (a, b) in zip(full, pairs, strict=True)]
    y = np.zeros((len(x), *lengths, outputs), x.dtype)
    per = outputs // groups
    for at in np.ndindex(*x.shape[1:-1]):
        for tap in product(*map(range, window)):
            place = tuple(
                p * s + k * d - a
                for p, s, k, d, (a, _) in zip(at, stride, tap, dilation, pairs, strict=True)
            )
            if not all(0 <= i < n for i, n in zip(place, lengths, strict=True)):
                continue
            for g in range(groups):
                channels, made = slice(g * inner, (g + 1) * inner), slice(g * per, (g + 1) * per)
                y[:, *place, made] += x[:, *at, channels] @ weight[(*tap, slice(None), made)]
    return y if bias is None else y + bias


def pooled(x, window, stride, padding, dilation, ceil_mode, reduce, nothing=0.0):
    axes = len(window)
    stride, dilation = each(window if stride is None else stride, axes), each(dilation, axes)
    pairs = named_sides(padding, x.shape[1:-1], window, stride, dilation)
    positions = counts(x.shape[1:-1], window, stride, pairs, dilation, ceil_mode)
    y = np.empty((len(x), *positions, x.shape[-1]), x.dtype)
    for at in np.ndindex(*positions):
        places = [place for _, place in seen(x, at, window, stride, pairs, dilation)]
        padded = 0  # elements of the window in x or in its padding
        for tap in product(*map(range, window)):
            ends = zip(at, stride, pairs, tap, dilation, x.shape[1:-1], strict=True)
            padded += all(-a <= p * s - a + k * d < n + b for p, s, (a, b), k, d, n in ends)
        values = [x[:, *place] for place in places]
        y[:, *at] = reduce(np.stack(values), padded) if values else nothing
    return y


def max_pool(x, *, window, stride=None, padding=0, dilation=1, ceil_mode=False):
    return pooled(x, window, stride, padding, dilation, ceil_mode, lambda v, _: v.max(0), -np.inf)


def max_pool_gradient(dy, x, *, window, stride=None, padding=0, dilation=1, ceil_mode=False):
    axes = len(window)
    stride, dilation = each(window if stride is None else stride, axes), each(dilation, axes)
    pairs = named_sides(padding, x.shape[1:-1], window, stride, dilation)
    dx = np.zeros_like(x)
    for at in np.ndindex(*counts(x.shape[1:-1], window, stride, pairs, dilation, ceil_mode)):
        places = [place for _, place in seen(x, at, window, stride, pairs, dilation)]
        values = np.stack([x[:, *place] for place in places])
        for row, channel in np.ndindex(*values.shape[1:]):
            first = places[int(values[:, row, channel].argmax())]
            dx[row, *first, channel] += dy[row, *at, channel]
    return dx


def conv_max_pool(x, weight, bias=None, *, window, **options):
    return max_pool(conv(x, weight, bias, **options), window=window)


def average_pool(
    x, *, window, stride=None, padding=0, dilation=1, ceil_mode=False, count_include_pad=False
):
    def mean(values, padded):
        return values.sum(0) / (padded if count_include_pad else len(values))

    return pooled(x, window, stride, padding, dilation, ceil_mode, mean)


def lp_pool(x, *, window, stride=None, padding=0, dilation=1, ceil_mode=False, p=2.0):
    def norm(values, _):
        return (np.abs(values) ** p).sum(0) ** (1 / p)

    return pooled(x, window, stride, padding, dilation, ceil_mode, norm)


def global_average_pool(x, *, keepdims=False):
    y = x.reshape(len(x), -1, x.shape[-1]).sum(1) / prod(x.shape[1:-1])
    return y.reshape(len(x), *(1,) * (x.ndim - 2), -1) if keepdims else y


def global_max_pool(x, *, keepdims=False):
    y = x.reshape(len(x), -1, x.shape[-1]).max(1)
    return y.reshape(len(x), *(1,) * (x.ndim - 2), -1) if keepdims else y


def adaptive(x, size, reduce):
    size = [n if m is None else m for n, m in zip(x.shape[1:-1], size, strict=True)]
    y = np.empty((len(x), *size, x.shape[-1]), x.dtype)
    for at in np.ndindex(*size):
        part = tuple(
            slice(floor(i * n / m), ceil((i + 1) * n / m))
            for i, n, m in zip(at, x.shape[1:-1], size, strict=True)
        )
        y[:, *at] = reduce(x[:, *part].reshape(len(x), -1, x.shape[-1]))
    return y


def adaptive_average_pool(x, *, size):
    return adaptive(x, size, lambda part: part.sum(1) / part.shape[1])


def adaptive_max_pool(x, *, size):
    return adaptive(x, size, lambda part: part.max(1))


def pad(x, *, padding, mode="constant", value=0.0):
    pairs = sides(padding, x.ndim - 2)
    size = [n + a + b for n, (a, b) in zip(x.shape[1:-1], pairs, strict=True)]
    y = np.full((len(x), *size, x.shape[-1]), value, x.dtype)
    for at in np.ndindex(*size):
        place = []
        for i, n, (a, b) in zip(at, x.shape[1:-1], pairs, strict=True):
            first, last = max(0, -a), n - 1 - max(0, -b)  # of what is not cut off
            i -= a
            if mode == "reflect":
                i = 2 * first - i if i < first else 2 * last - i if i > last else i
            elif mode == "edge":
                i = min(max(i, first), last)
            elif mode == "wrap":
                i = first + (i - first) % (last - first + 1)
            place.append(i)
        if all(0 <= i < n for i, n in zip(place, x.shape[1:-1], strict=True)):
            y[:, *at] = x[:, *place]
    return y


def shuffled(x, factor, order):
    """(place and channel in the shuffled array, those in the other) for every element."""
    axes = x.ndim - 2
    factor = each(factor, axes)
    channels = x.shape[-1] // prod(factor)
    for at in np.ndindex(*x.shape[1:-1]):
        for c in range(channels):
            for inner in np.ndindex(*factor):
                position = int(np.ravel_multi_index(inner, factor))
                first = order == "channels first"
                channel = c * prod(factor) + position if first else position * channels + c
                place = tuple(p * f + i for p, f, i in zip(at, factor, inner, strict=True))
                yield (*place, c), (*at, channel)


def pixel_shuffle(x, *, factor, order="channels first"):
    factors = each(factor, x.ndim - 2)
    space = [n * f for n, f in zip(x.shape[1:-1], factors, strict=True)]
    y = np.empty((len(x), *space, x.shape[-1] // prod(factors)), x.dtype)
    for shuffled_place, place in shuffled(x, factors, order):
        y[:, *shuffled_place] = x[:, *place]
    return y


def pixel_unshuffle(x, *, factor, order="channels first"):
    factors = each(factor, x.ndim - 2)
    space = [n // f for n, f in zip(x.shape[1:-1], factors, strict=True)]
    y = np.empty((len(x), *space, x.shape[-1] * prod(factors)), x.dtype)
    for shuffled_place, place in shuffled(y, factors, order):
        y[:, *place] = x[:, *shuffled_place]
    return y


def triangle(d, _):
    return max(0.0, 1 - abs(d))


def keys(d, a):
    d = abs(d)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


def place_in_x(o, n, m, length, coordinates):
    scale = length / n
    half = (o + 0.5) / scale - 0.5
    return {
        "half_pixel": half,
        "half_pixel_symmetric": n / 2 * (1 - m / length) + half,
        "pytorch_half_pixel": half if length > 1 else 0.0,
        "align_corners": o * (n - 1) / (length - 1) if length != 1 else 0.0,
        "asymmetric": o / scale,
        "tf_half_pixel_for_nn": (o + 0.5) / scale,
    }[coordinates]


def resize(
    x, *, size=None, scale=None, method="nearest", coordinates="half_pixel",
    nearest="round_prefer_floor", cubic=-0.75, exclude_outside=False, antialias=False,
):  # fmt: skip
    space = x.shape[1:-1]
    scales = each(scale, len(space)) if scale is not None else [None] * len(space)
    sizes = size if size is not None else [None] * len(space)
    for axis, (n, m, s) in enumerate(zip(space, sizes, scales, strict=True), 1):
        if m is None and s is None:
            continue
        length = float(m) if m is not None else n * s
        m = floor(length)
        shrink = min(1.0, length / n) if antialias else 1.0
        made = []
        for o in range(m):
            u = place_in_x(o, n, m, length, coordinates)
            if method == "nearest":
                u = round(u, 9)  # what the division left over
                low, high = ceil(u - 0.5), floor(u + 0.5)
                i = {"round_prefer_floor": low, "round_prefer_ceil": high, "floor": floor(u),
                     "ceil": ceil(u)}[nearest]  # fmt: skip
                weights = {min(max(0, i), n - 1): 1.0}
            else:
                kind, reach = (triangle, 1) if method == "linear" else (keys, 2)
                weights, total = {}, 0.0
                for i in range(floor(u - reach / shrink), ceil(u + reach / shrink) + 1):
                    w = kind((u - i) * shrink, cubic)
                    if exclude_outside and not 0 <= i < n:
                        continue
                    total += w
                    at = min(max(0, i), n - 1)
                    weights[at] = weights.get(at, 0.0) + w
                if exclude_outside or shrink < 1:
                    weights = {i: w / total for i, w in weights.items()}
            made.append(sum(x.take(i, axis) * x.dtype.type(w) for i, w in weights.items()))
        x = np.stack(made, axis)
    return x


def group_norm(x, gain=None, bias=None, *, groups, eps=1e-5):
    y, per = np.empty_like(x), x.shape[-1] // groups
    for g in range(groups):
        part = x[..., g * per : (g + 1) * per]
        flat = part.reshape(len(x), -1)
        mean = flat.mean(1).reshape(-1, *(1,) * (x.ndim - 1))
        var = ((part - mean) ** 2).reshape(len(x), -1).mean(1).reshape(mean.shape)
        y[..., g * per : (g + 1) * per] = (part - mean) / np.sqrt(var + eps)
    return y * (1 if gain is None else gain) + (0 if bias is None else bias)


def instance_norm(x, gain=None, bias=None, *, eps=1e-5):
    return group_norm(x, gain, bias, groups=x.shape[-1], eps=eps)


def mean_variance_norm(x, gain=None, bias=None, *, axes, eps=1e-5):
    moved = np.moveaxis(x, axes, range(-len(axes), 0))
    flat = moved.reshape(*moved.shape[: -len(axes)], -1)
    far = flat - flat.mean(-1, keepdims=True)
    y = far / np.sqrt((far**2).mean(-1, keepdims=True) + eps)
    y = np.moveaxis(y.reshape(moved.shape), range(-len(axes), 0), axes)
    return y * (1 if gain is None else gain) + (0 if bias is None else bias)


def local_response_norm(x, *, size, alpha=1e-4, beta=0.75, k=1.0):
    y = np.empty_like(x)
    for c in range(x.shape[-1]):
        around = x[..., max(0, c - size // 2) : c + (size - 1) // 2 + 1]
        y[..., c] = x[..., c] / (k + alpha * (around**2).sum(-1) / size) ** beta
    return y


def bilinear(x, y, weight, bias=None):
    left, right, outputs = weight.shape
    z = np.zeros((*x.shape[:-1], outputs), x.dtype)
    for i, j, o in product(range(left), range(right), range(outputs)):
        z[..., o] += x[..., i] * weight[i, j, o] * y[..., j]
    return z if bias is None else z + bias
