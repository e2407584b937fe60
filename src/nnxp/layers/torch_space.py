"""What torch's functions of images and signals do: convolutions, pools, resizing, norms by channel.

x is (rows, channels, *space), as torch has it: kernels look at it channels last, and what they make
is handed on as a view.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import floor, prod
from typing import Any

import numpy as np

from nnxp import kernels
from nnxp._arrays import Array, xp_of
from nnxp._errors import OptionError
from nnxp.layers import window_operators
from nnxp.layers.conv import window_of_conv, window_of_conv_transpose
from nnxp.layers.operators import in_float32
from nnxp.layers.shape import channels_last
from nnxp.layers.torch_functions import CHOICES, check_choices, function


def by_axes(name: str) -> Callable[[Callable[..., Array]], Callable[..., Array]]:
    """Decorator: what torch means by the name with "1d", "2d" or "3d" behind it, of so many axes of
    space, which come first."""

    def register(fn: Callable[..., Array]) -> Callable[..., Array]:
        for axes in (1, 2, 3):
            function(f"{name}{axes}d")(partial(fn, axes))
        return fn

    return register


def _per_axis(value: Any, axes: int) -> tuple[Any, ...]:
    """An option for each axis; of a single one torch makes all."""
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    return values * axes if len(values) == 1 else values


def _moved(axes: int, **options: Any) -> dict[str, Any]:
    """How windows move, for each axis; a padding may be a name."""
    return {n: v if isinstance(v, str) else _per_axis(v, axes) for n, v in options.items()}


# Convolutions


@by_axes("conv")
def conv(
    axes: int, x: Array, weight: Array, bias: Array | None = None, stride: Any = 1,
    padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Array:  # fmt: skip
    moves = _moved(axes, stride=stride, padding=padding, dilation=dilation)
    window = window_of_conv(weight)
    return channels_last(lambda x: kernels.conv(x, window, bias, groups=groups, **moves), x)


@by_axes("conv_transpose")
def conv_transpose(
    axes: int, x: Array, weight: Array, bias: Array | None = None, stride: Any = 1,
    padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Array:  # fmt: skip
    moves = _moved(axes, stride=stride, padding=padding, dilation=dilation)
    options = moves | _moved(axes, output_padding=output_padding) | {"groups": groups}
    window = window_of_conv_transpose(weight, groups)
    return channels_last(lambda x: kernels.conv_transpose(x, window, bias, **options), x)


# Pools


def _pooled(
    kernel: kernels.Kernel, axes: int, x: Array, size: Any, stride: Any, padding: Any = 0,
    **options: Any,
) -> Array:  # fmt: skip
    """What a pool makes of x, by windows of this size, which are their own stride unless given."""
    moves = _moved(axes, window=size, stride=stride or size, padding=padding)
    return channels_last(lambda x: kernel(x, **moves, **options), x)


@by_axes("max_pool")
def max_pool(
    axes: int, x: Array, kernel_size: Any, stride: Any = None, padding: Any = 0,
    dilation: Any = 1, ceil_mode: bool = False, return_indices: bool = False,
) -> Array:  # fmt: skip
    options = {"dilation": _per_axis(dilation, axes), "ceil_mode": ceil_mode}
    return _pooled(kernels.max_pool, axes, x, kernel_size, stride, padding, **options)


@by_axes("avg_pool")
def average_pool(
    axes: int, x: Array, kernel_size: Any, stride: Any = None, padding: Any = 0,
    ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: Any = None,
) -> Array:  # fmt: skip
    options = {"ceil_mode": ceil_mode, "count_include_pad": count_include_pad}
    return _pooled(kernels.average_pool, axes, x, kernel_size, stride, padding, **options)


@by_axes("lp_pool")
def lp_pool(
    axes: int, x: Array, norm_type: float, kernel_size: Any, stride: Any = None,
    ceil_mode: bool = False,
) -> Array:  # fmt: skip
    """(k mean(x^p))^(1/p), over windows of k elements; a sum below zero has no such root."""
    options = {"ceil_mode": ceil_mode, "count_include_pad": True}
    mean = _pooled(kernels.average_pool, axes, x**norm_type, kernel_size, stride, **options)
    return (mean * prod(_per_axis(kernel_size, axes))) ** (1 / norm_type)


@by_axes("adaptive_avg_pool")
def adaptive_average_pool(axes: int, x: Array, output_size: Any) -> Array:
    size = _per_axis(output_size, axes)
    return channels_last(lambda x: kernels.adaptive_average_pool(x, size=size), x)


@by_axes("adaptive_max_pool")
def adaptive_max_pool(axes: int, x: Array, output_size: Any, return_indices: bool = False) -> Array:
    size = _per_axis(output_size, axes)
    return channels_last(lambda x: kernels.adaptive_max_pool(x, size=size), x)


# Space made larger or smaller


LINEAR = {"method": "linear"}
MODES: dict[str, dict[str, Any]] = {
    "nearest": {"coordinates": "asymmetric", "nearest": "floor"},
    "nearest-exact": {"nearest": "round_prefer_ceil"},
    "linear": LINEAR, "bilinear": LINEAR, "trilinear": LINEAR,
    "bicubic": {"method": "cubic"},
}  # fmt: skip
"""What torch's modes are in the words of kernels.resize."""

CHOICES["interpolate"] = {"mode": (*MODES, "area")}

AXES = {"linear": 1, "bilinear": 2, "trilinear": 3, "bicubic": 2}
"""Of how many axes of space these are."""


@function("interpolate")
def interpolate(
    x: Array,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Array:
    check_choices("interpolate", {"mode": mode})
    if (size is None) == (scale_factor is None):
        raise OptionError("interpolate takes a size or a scale_factor, one of them")
    axes = x.ndim - 2
    scale = None if scale_factor is None else _per_axis(scale_factor, axes)
    if scale and (align_corners or recompute_scale_factor or mode == "area"):
        size = tuple(floor(n * s) for n, s in zip(x.shape[2:], scale, strict=True))
        scale = None
    size = None if size is None else _per_axis(size, axes)
    if mode == "area":
        return adaptive_average_pool(axes, x, size)
    if mode in AXES and axes != AXES[mode]:
        raise OptionError(f"{mode} is over {AXES[mode]} axes of space, but {x.shape} has {axes}")
    if align_corners and mode.startswith("nearest"):
        raise OptionError(f"align_corners is not for the mode {mode}")
    options = MODES[mode] | ({"coordinates": "align_corners"} if align_corners else {})
    if antialias and align_corners:
        raise OptionError("interpolate takes antialias or align_corners, not both")
    if antialias:
        options = options | {"antialias": True, "exclude_outside": True, "cubic": -0.5}
    return channels_last(lambda x: kernels.resize(x, size=size, scale=scale, **options), x)


@function("unfold")
def unfold(
    x: Array, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1
) -> Array:
    """Windows of images as columns: (n, c, h, w) -> (n, c * window, windows)."""
    window, dilation, padding, stride = (
        _per_axis(option, 2) for option in (kernel_size, dilation, padding, stride)
    )
    x = xp_of(x).pad(x, [(0, 0), (0, 0), *((n, n) for n in padding)])
    reach = [d * (k - 1) for d, k in zip(dilation, window, strict=True)]
    places = [range(0, d * k, d) for d, k in zip(dilation, window, strict=True)]
    parts = [
        x[
            :,
            :,
            i : x.shape[2] - reach[0] + i : stride[0],
            j : x.shape[3] - reach[1] + j : stride[1],
        ]
        for i in places[0]
        for j in places[1]
    ]
    n, c = x.shape[:2]
    return xp_of(x).stack(parts, axis=2).reshape(n, c * len(parts), -1)


@function("pixel_shuffle")
def pixel_shuffle(x: Array, upscale_factor: int) -> Array:
    factor = upscale_factor, upscale_factor
    return channels_last(lambda x: kernels.pixel_shuffle(x, factor=factor), x)


@function("pixel_unshuffle")
def pixel_unshuffle(x: Array, downscale_factor: int) -> Array:
    factor = downscale_factor, downscale_factor
    return channels_last(lambda x: kernels.pixel_unshuffle(x, factor=factor), x)


@function("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(x: Array, groups: int) -> Array:
    rows, channels, *space = x.shape
    parts = x.reshape(rows, groups, channels // groups, *space)
    return parts.swapaxes(1, 2).reshape(x.shape)


CHOICES["grid_sample"] = {
    "mode": ("bilinear", "nearest", "bicubic"),
    "padding_mode": ("zeros", "border", "reflection"),
}


@function("grid_sample")
def grid_sample(
    x: Array, grid: Array, mode: str = "bilinear", padding_mode: str = "zeros",
    align_corners: bool | None = None,
) -> Array:  # fmt: skip
    """x (n, c, *space) at grid (n, *out, axes), -1 to 1, the last axis first -> (n, c, *out)"""
    check_choices("grid_sample", {"mode": mode, "padding_mode": padding_mode})
    options = {
        "mode": mode,
        "padding_mode": padding_mode,
        "align_corners": int(bool(align_corners)),
    }
    sampled: Array = in_float32(window_operators.grid_sample)(x, grid, **options)
    return sampled


@function("affine_grid")
def affine_grid(theta: Array, size: Any, align_corners: bool | None = None) -> Array:
    return window_operators.affine_grid(
        theta, np.array(size), align_corners=int(bool(align_corners))
    )


# Norms, and what has a number for each channel


@function("batch_norm")
def batch_norm(
    x: Array, running_mean: Array | None, running_var: Array | None, weight: Array | None = None,
    bias: Array | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Array:  # fmt: skip
    """In training by the statistics of x, as weights are standardized where they are used."""
    if training or running_mean is None:
        others = tuple(axis for axis in range(x.ndim) if axis != 1)
        running_mean, running_var = x.mean(axis=others), x.var(axis=others)
    parameters = running_mean, running_var, weight, bias
    return channels_last(lambda x: kernels.batch_norm(x, *parameters, eps=eps), x)


@function("instance_norm")
def instance_norm(
    x: Array, running_mean: Array | None = None, running_var: Array | None = None,
    weight: Array | None = None, bias: Array | None = None, use_input_stats: bool = True,
    momentum: float = 0.1, eps: float = 1e-5,
) -> Array:  # fmt: skip
    return channels_last(lambda x: kernels.instance_norm(x, weight, bias, eps=eps), x)


@function("group_norm")
def group_norm(
    x: Array, num_groups: int, weight: Array | None = None, bias: Array | None = None,
    eps: float = 1e-5,
) -> Array:  # fmt: skip
    options = {"groups": num_groups, "eps": eps}
    return channels_last(lambda x: kernels.group_norm(x, weight, bias, **options), x)


@function("local_response_norm")
def local_response_norm(
    x: Array, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Array:
    options = {"size": size, "alpha": alpha, "beta": beta, "k": k}
    return channels_last(lambda x: kernels.local_response_norm(x, **options), x)


@function("prelu")
def prelu(x: Array, weight: Array) -> Array:
    return channels_last(lambda x: kernels.prelu(x, weight), x)
