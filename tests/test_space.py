"""Kernels over space: against loops written from their formulas, and against PyTorch."""

from __future__ import annotations

import re

import numpy as np
import pytest

import naive
import nnxp
from nnxp import kernels
from nnxp.layers import MODULES
from nnxp.program.mixing import mixing
from nnxp.program.program import expanded
from nnxp.program.recording import Recording, costs

try:
    import torch
except ImportError:
    torch = None

needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed")


class Draws:
    """Geometries drawn at random: few elements, many kinds."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def one(self, *choices):
        return choices[int(self.rng.integers(len(choices)))]

    def ints(self, low, high, count):
        return tuple(int(each) for each in self.rng.integers(low, high, count))

    def numbers(self, *shape):
        return self.rng.normal(size=shape)

    def pairs(self, high, axes):
        return tuple(self.ints(0, high, 2) for _ in range(axes))

    def image(self, axes, channels=None, least=1, most=7):
        channels = channels or int(self.rng.integers(1, 4))
        return self.numbers(2, *self.ints(least, most if axes < 3 else 5, axes), channels)

    def axes(self):
        return int(self.rng.integers(1, 4))


def drawn_conv(draw):
    axes, groups = draw.axes(), draw.one(1, 1, 2, 3)
    inner, per = draw.one((1, 1), (1, 2), draw.ints(1, 4, 2))
    x = draw.image(axes, groups * inner)
    weight = draw.numbers(*draw.ints(1, 4, axes), inner, groups * per)
    options = {
        "stride": draw.one(draw.ints(1, 4, axes), 2),
        "dilation": draw.one(1, draw.ints(1, 4, axes)),
        "padding": draw.one(0, draw.ints(0, 3, axes), draw.pairs(3, axes), "same", "same_lower"),
        "groups": groups,
    }
    return [x, weight, draw.numbers(groups * per)], options


def drawn_transpose(draw):
    (x, weight, bias), options = drawn_conv(draw)
    axes = x.ndim - 2
    most = [
        max(s, d)
        for s, d in zip(
            naive.each(options["stride"], axes), naive.each(options["dilation"], axes), strict=True
        )
    ]
    options["output_padding"] = tuple(int(draw.rng.integers(0, m)) for m in most)
    options["padding"] = draw.one(0, draw.ints(0, 2, axes), draw.pairs(2, axes))
    if draw.one(True, False, False):
        options |= {"padding": "same", "output_padding": 0}
    return [x, weight, bias], options


def drawn_pool(draw, **more):
    axes = draw.axes()
    window, dilation = draw.ints(1, 4, axes), draw.one(1, draw.ints(1, 3, axes))
    reach = [(w - 1) * d + 1 for w, d in zip(window, naive.each(dilation, axes), strict=True)]
    options = {
        "window": window,
        "dilation": dilation,
        "stride": draw.one(None, draw.ints(1, 4, axes)),
        "padding": draw.one(0, "same", tuple(int(draw.rng.integers(0, r // 2 + 1)) for r in reach)),
        "ceil_mode": draw.one(True, False),
    }
    return [draw.image(axes)], options | more


def drawn_weight_gradient(draw):
    (x, weight, _), options = drawn_conv(draw)
    options["window"] = weight.shape[:-2]
    return [x, draw.numbers(len(x), *positions(x, **options), weight.shape[-1])], options


def drawn_max_pool_gradient(draw):
    (x,), options = drawn_pool(draw)
    return [draw.numbers(len(x), *positions(x, **options), x.shape[-1]), x], options


def positions(x, *, window, stride, padding, dilation, ceil_mode=False, **_):
    """How many windows stand along each axis of x."""
    axes = len(window)
    steps = naive.each(window if stride is None else stride, axes)
    apart = naive.each(dilation, axes)
    pairs = naive.named_sides(padding, x.shape[1:-1], window, steps, apart)
    return naive.counts(x.shape[1:-1], window, steps, pairs, apart, ceil_mode)


def drawn_conv_and_pool(draw):
    (x, weight, bias), options = drawn_conv(draw)
    return [x, weight, bias], options | {"window": draw.ints(1, 3, x.ndim - 2)}


def drawn_resize(draw):
    axes, method = draw.axes(), draw.one("nearest", "linear", "cubic")
    x = draw.image(axes, least=2)
    coordinates = draw.one("half_pixel", "align_corners", "asymmetric", draw.one(*COORDINATES))
    options = {"method": method, "coordinates": coordinates}
    if draw.one(True, False):
        options["size"] = tuple(draw.one(None, *draw.ints(1, 9, 9)) for _ in range(axes))
    else:
        options["scale"] = draw.one(2, 0.5, tuple(draw.one(1.5, 0.75, 1, 3) for _ in range(axes)))
    if method == "nearest":
        options["nearest"] = draw.one("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
    else:
        options |= {"exclude_outside": draw.one(True, False, False)}
        options |= {"antialias": draw.one(options["exclude_outside"], False, True)}
        options["cubic"] = draw.one(-0.75, -0.5)
    return [x], options


COORDINATES = (
    "half_pixel half_pixel_symmetric pytorch_half_pixel align_corners asymmetric "
    "tf_half_pixel_for_nn"
).split()


def drawn_pad(draw):
    x, mode = draw.image(draw.axes(), least=2), draw.one("constant", "reflect", "edge", "wrap")
    pairs = []
    for n in x.shape[1:-1]:
        before = int(draw.rng.integers(-1, n))
        left = n + min(0, before)
        pairs.append((before, int(draw.rng.integers(0, max(1, left)))))
    return [x], {"padding": tuple(pairs), "mode": mode} | (
        {"value": 0.5} if mode == "constant" else {}
    )


def drawn_shuffle(draw):
    axes = draw.one(1, 2)
    factor = draw.ints(1, 4, axes)
    order = draw.one("channels first", "channels last")
    return [draw.image(axes, 2 * int(np.prod(factor)))], {"factor": factor, "order": order}


def drawn_unshuffle(draw):
    axes = draw.one(1, 2)
    factor = draw.ints(1, 4, axes)
    space = [n * f for n, f in zip(draw.ints(1, 4, axes), factor, strict=True)]
    order = draw.one("channels first", "channels last")
    return [draw.numbers(2, *space, 2)], {"factor": factor, "order": order}


def drawn_norm(draw, **options):
    x = draw.image(draw.axes(), 6)
    return [x, draw.numbers(6), draw.numbers(6)], {"eps": draw.one(1e-5, 0.3)} | options


def drawn_adaptive(draw):
    x = draw.image(draw.axes())
    return [x], {"size": tuple(draw.one(None, *draw.ints(1, 9, 2)) for _ in x.shape[1:-1])}


def drawn_bilinear(draw):
    rows = draw.ints(1, 4, draw.axes())
    left, right, outputs = draw.ints(1, 5, 3)
    weight, bias = draw.numbers(left, right, outputs), draw.numbers(outputs)
    return [draw.numbers(*rows, left), draw.numbers(*rows, right), weight, bias], {}


DRAWN = {
    "conv": drawn_conv,
    "conv_transpose": drawn_transpose,
    "conv_weight_gradient": drawn_weight_gradient,
    "conv_max_pool": drawn_conv_and_pool,
    "max_pool": drawn_pool,
    "max_pool_gradient": drawn_max_pool_gradient,
    "average_pool": lambda draw: drawn_pool(draw, count_include_pad=draw.one(True, False)),
    "lp_pool": lambda draw: drawn_pool(draw, p=draw.one(1.0, 2.0, 3.0, 1.5)),
    "global_average_pool": lambda draw: (
        [draw.image(draw.axes())],
        {"keepdims": draw.one(True, False)},
    ),
    "global_max_pool": lambda draw: (
        [draw.image(draw.axes())],
        {"keepdims": draw.one(True, False)},
    ),
    "adaptive_average_pool": drawn_adaptive,
    "adaptive_max_pool": drawn_adaptive,
    "pad": drawn_pad,
    "resize": drawn_resize,
    "pixel_shuffle": drawn_shuffle,
    "pixel_unshuffle": drawn_unshuffle,
    "group_norm": lambda draw: drawn_norm(draw, groups=draw.one(1, 2, 3, 6)),
    "instance_norm": drawn_norm,
    "mean_variance_norm": lambda draw: drawn_norm(draw, axes=draw.one((-1,), (1,), (1, -1))),
    "local_response_norm": lambda draw: (
        drawn_norm(draw)[0][:1],
        {"size": draw.one(1, 2, 3, 5, 8), "alpha": 0.3, "beta": draw.one(0.5, 0.75), "k": 0.7},
    ),
    "bilinear": drawn_bilinear,
}


@pytest.mark.parametrize("name", DRAWN)
def test_kernels_over_space_say_what_loops_say(name):
    compared = 0
    for seed in range(60):
        arrays, options = DRAWN[name](Draws(seed))
        try:
            y = kernels.KERNELS[name](*arrays, **options)
        except nnxp.ShapeError as error:
            assert str(error).split()[0] in name  # noqa: PT017 (only where there is one)
            continue
        expected = getattr(naive, name)(*arrays, **options)
        assert y.shape == expected.shape, (seed, options)
        np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-10, err_msg=f"{seed} {options}")
        compared += y.size > 0
    assert compared >= 30


# torch


def first(x):
    """Channels first, as torch has them."""
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def last(y):
    return np.moveaxis(y.numpy(), 1, -1)


def torch_conv(x, weight, bias, *, stride, padding, dilation, groups):
    axes, window = x.ndim - 2, weight.shape[:-2]
    steps, apart = naive.each(stride, axes), naive.each(dilation, axes)
    pairs = naive.named_sides(padding, x.shape[1:-1], window, steps, apart)
    x = torch.nn.functional.pad(first(x), [p for pair in reversed(pairs) for p in pair])
    turned = torch.from_numpy(np.moveaxis(weight, (-1, -2), (0, 1)).copy())
    bias = None if bias is None else torch.from_numpy(bias)
    run = getattr(torch.nn.functional, f"conv{axes}d")
    return last(run(x, turned, bias, stride, 0, dilation, groups))


def torch_transpose(x, weight, bias, *, stride, padding, output_padding, dilation, groups):
    axes, (inner, outputs) = x.ndim - 2, weight.shape[-2:]
    split = weight.reshape(*weight.shape[:-1], groups, outputs // groups)
    turned = np.moveaxis(split, (-2, -3, -1), (0, 1, 2))
    turned = turned.reshape(groups * inner, outputs // groups, *weight.shape[:-2])
    turned, bias = torch.from_numpy(turned.copy()), None if bias is None else torch.from_numpy(bias)
    run = getattr(torch.nn.functional, f"conv_transpose{axes}d")
    more = output_padding, groups, dilation
    if isinstance(padding, int) or (padding != "same" and isinstance(padding[0], int)):
        return last(run(first(x), turned, bias, stride, padding, *more))
    y = last(run(first(x), turned, bias, stride, 0, *more))  # torch takes no pairs: cut off
    surplus = [
        m - n * s
        for m, n, s in zip(y.shape[1:-1], x.shape[1:-1], naive.each(stride, axes), strict=True)
    ]
    pairs = [(s // 2, s - s // 2) for s in surplus] if padding == "same" else padding
    if padding == "same" and min(surplus) < 0:
        raise ValueError("torch makes less than that")
    kept = (slice(a, m - b) for m, (a, b) in zip(y.shape[1:-1], pairs, strict=True))
    return y[:, *kept]


def torch_max_pool(x, *, window, dilation, stride, padding, ceil_mode):
    axes = x.ndim - 2
    stride = window if stride is None else stride
    run = getattr(torch.nn.functional, f"max_pool{axes}d")
    if np.ndim(padding) < 2 and padding != "same":
        return last(run(first(x), window, stride, padding, dilation, ceil_mode))
    if ceil_mode and padding == "same":
        raise ValueError("torch would begin another window in that padding")
    steps, apart = naive.each(stride, axes), naive.each(dilation, axes)
    pairs = naive.named_sides(padding, x.shape[1:-1], window, steps, apart)
    flat = [p for pair in reversed(pairs) for p in pair]
    x = torch.nn.functional.pad(first(x), flat, value=-np.inf)
    return last(run(x, window, stride, 0, dilation, ceil_mode))


def torch_max_pool_gradient(dy, x, *, window, dilation, stride, padding, ceil_mode):
    there = first(x).requires_grad_()
    run = getattr(torch.nn.functional, f"max_pool{x.ndim - 2}d")
    stride = window if stride is None else stride
    run(there, window, stride, symmetric(padding), dilation, ceil_mode).backward(first(dy))
    return last(there.grad)


def torch_weight_gradient(x, dy, *, window, stride, padding, dilation, groups):
    axes = len(window)
    steps, apart = naive.each(stride, axes), naive.each(dilation, axes)
    pairs = naive.named_sides(padding, x.shape[1:-1], window, steps, apart)
    x = torch.nn.functional.pad(first(x), [p for pair in reversed(pairs) for p in pair])
    run = getattr(torch.nn.grad, f"conv{axes}d_weight")
    shape = dy.shape[-1], x.shape[1] // groups, *window
    return np.moveaxis(run(x, shape, first(dy), steps, 0, apart, groups).numpy(), (0, 1), (-1, -2))


def symmetric(padding):
    """The padding as torch takes it: one number for both sides of each axis."""
    if padding != "same" and np.ndim(padding) < 2:
        return padding
    if padding == "same" or any(a != b for a, b in padding):
        raise ValueError("torch has no such padding")
    return tuple(a for a, _ in padding)


def torch_average_pool(x, *, window, dilation, stride, padding, ceil_mode, count_include_pad):
    if np.any(np.array(dilation) > 1):
        raise ValueError("torch has no such pool")
    run = getattr(torch.nn.functional, f"avg_pool{x.ndim - 2}d")
    return last(run(first(x), window, stride, symmetric(padding), ceil_mode, count_include_pad))


def torch_conv_and_pool(x, weight, bias, *, window, **options):
    y = torch_conv(x, weight, bias, **options)
    pool = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False}
    return torch_max_pool(y, window=window, **pool)


def torch_resize(
    x, *, method, coordinates, size=None, antialias=False, exclude_outside=False, **rest
):
    axes = x.ndim - 2
    if (
        size is None
        or None in size
        or (antialias, exclude_outside) not in ((False, False), (True, True))
    ):
        raise ValueError("torch does not say the same")
    if coordinates == "asymmetric" and method == "nearest" and rest.get("nearest") == "floor":
        return last(torch.nn.functional.interpolate(first(x), size))
    if method == "nearest" or (method == "cubic" and axes != 2) or (antialias and axes != 2):
        raise ValueError("torch has no such resize")
    if coordinates not in ("half_pixel", "align_corners") or size[-1] == 1:
        raise ValueError("torch has no such coordinates")
    if antialias and coordinates == "align_corners":
        raise ValueError("torch forgets to align them")
    if method == "cubic" and rest["cubic"] != (-0.5 if antialias else -0.75):
        raise ValueError("torch has another cubic")
    modes = {"linear": ["linear", "bilinear", "trilinear"], "cubic": ["", "bicubic"]}
    mode, corners = modes[method][axes - 1], coordinates == "align_corners"
    return last(torch.nn.functional.interpolate(first(x), size, mode=mode, align_corners=corners,
                                                antialias=antialias))  # fmt: skip


def torch_pad(x, *, padding, mode, value=0.0):
    modes = {"edge": "replicate", "wrap": "circular"}
    padding = naive.sides(padding, x.ndim - 2)
    flat = [p for pair in reversed(padding) for p in pair]
    if min(flat) < 0 and mode != "constant":
        raise ValueError("torch cuts off otherwise")
    more = {"value": value} if mode == "constant" else {}
    return last(torch.nn.functional.pad(first(x), flat, mode=modes.get(mode, mode), **more))


def torch_shuffle(name):
    def shuffle(x, *, factor, order):
        factor = naive.each(factor, x.ndim - 2)
        if order == "channels last" or len(set(factor)) > 1 or len(factor) != 2:
            raise ValueError("torch has one factor for two axes")
        return last(getattr(torch.nn.functional, name)(first(x), factor[0]))

    return shuffle


def torch_norm(name, *names):
    def norm(x, gain, bias, *, eps, **options):
        given = [options[each] for each in names]
        run, tensors = getattr(torch.nn.functional, name), map(torch.from_numpy, (gain, bias))
        if name == "instance_norm":
            return last(run(first(x), None, None, *tensors, eps=eps))
        return last(run(first(x), *given, *tensors, eps))

    return norm


def torch_bilinear(x, y, weight, bias):
    turned = torch.from_numpy(np.moveaxis(weight, -1, 0).copy())
    x, y, bias = map(torch.from_numpy, (x, y, bias))
    return torch.nn.functional.bilinear(x, y, turned, bias).numpy()


def torch_adaptive(kind):
    def pool(x, *, size):
        run = getattr(torch.nn.functional, f"adaptive_{kind}_pool{x.ndim - 2}d")
        return last(
            run(first(x), [n if m is None else m for n, m in zip(x.shape[1:-1], size, strict=True)])
        )

    return pool


def torch_lp_pool(x, *, p, **options):
    """By torch's average_pool: its lp_pool takes no padding, nor odd powers below zero."""
    count = np.prod(options["window"])
    mean = torch_average_pool(np.abs(x) ** p, **options, count_include_pad=True)
    if options["ceil_mode"]:
        raise ValueError("torch would count less")
    return (mean * x.dtype.type(count)) ** x.dtype.type(1 / p)


def torch_global_average_pool(x, *, keepdims):
    return torch.from_numpy(x).mean(tuple(range(1, x.ndim - 1)), keepdim=keepdims).numpy()


def torch_global_max_pool(x, *, keepdims):
    return torch.from_numpy(x).amax(tuple(range(1, x.ndim - 1)), keepdim=keepdims).numpy()


def torch_mean_variance_norm(x, gain, bias, *, axes, eps):
    """By torch's layer_norm, which knows last axes only."""
    moved = torch.from_numpy(np.moveaxis(x, axes, range(-len(axes), 0)).copy())
    y = torch.nn.functional.layer_norm(moved, moved.shape[-len(axes) :], eps=eps).numpy()
    return np.moveaxis(y, range(-len(axes), 0), axes) * gain + bias


TORCH = {
    "lp_pool": torch_lp_pool,
    "global_average_pool": torch_global_average_pool,
    "global_max_pool": torch_global_max_pool,
    "mean_variance_norm": torch_mean_variance_norm,
    "conv": torch_conv,
    "conv_transpose": torch_transpose,
    "conv_weight_gradient": torch_weight_gradient,
    "conv_max_pool": torch_conv_and_pool,
    "max_pool": torch_max_pool,
    "max_pool_gradient": torch_max_pool_gradient,
    "average_pool": torch_average_pool,
    "adaptive_average_pool": torch_adaptive("avg"),
    "adaptive_max_pool": torch_adaptive("max"),
    "pad": torch_pad,
    "resize": torch_resize,
    "pixel_shuffle": torch_shuffle("pixel_shuffle"),
    "pixel_unshuffle": torch_shuffle("pixel_unshuffle"),
    "group_norm": torch_norm("group_norm", "groups"),
    "instance_norm": torch_norm("instance_norm"),
    "local_response_norm": lambda x, *, size, alpha, beta, k: last(
        torch.nn.functional.local_response_norm(first(x), size, alpha, beta, k)
    ),
    "bilinear": torch_bilinear,
}


@pytest.fixture(autouse=True)
def _one_thread_is_enough_for_so_little():
    if torch is None:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# One case of each kernel, small and with few digits, for the tests that ask all kernels the same.


def plain_case(name, draw):
    """Arrays, drawn by an object like `test_torch_oracle.Draw`, and options."""
    rows = min(max(1, draw.rows // 2), 3)

    def image(*sizes):
        return draw.exact(draw.rng.normal(size=(rows, *sizes)))

    def numbers(*sizes):
        return draw.exact(draw.rng.normal(size=sizes))

    window = {"window": (2, 2), "stride": (2, 1), "dilation": 1}
    norm = [image(2, 3, 4), numbers(4), numbers(4)]
    cases = {
        "conv": (
            [image(3, 4, 4), numbers(2, 3, 2, 2), numbers(2)],
            {"stride": (1, 2), "padding": (1, 0), "dilation": 1, "groups": 2},
        ),
        "conv_transpose": (
            [image(2, 3, 2), numbers(2, 2, 2, 3), numbers(3)],
            {
                "stride": (2, 1),
                "padding": (1, 0),
                "output_padding": (1, 0),
                "dilation": 1,
                "groups": 1,
            },
        ),
        "conv_weight_gradient": (
            [image(3, 4, 2), image(4, 1, 2)],
            {
                "window": (2, 3),
                "stride": (1, 2),
                "padding": (1, 0),
                "dilation": 1,
                "groups": 2,
            },
        ),
        "max_pool_gradient": (
            [image(2, 3, 1), image(3, 4, 1)],
            window | {"padding": (1, 0), "ceil_mode": False},
        ),
        "max_pool": ([image(4, 4, 2)], window | {"padding": (1, 0), "ceil_mode": True}),
        "average_pool": (
            [image(4, 4, 2)],
            window | {"padding": (1, 0), "ceil_mode": True, "count_include_pad": False},
        ),
        "lp_pool": ([image(4, 4, 2)], window | {"padding": 0, "ceil_mode": False, "p": 3.0}),
        "global_average_pool": ([image(3, 4, 2)], {"keepdims": False}),
        "global_max_pool": ([image(3, 4, 2)], {"keepdims": True}),
        "adaptive_average_pool": ([image(3, 4, 2)], {"size": (2, 2)}),
        "adaptive_max_pool": ([image(3, 4, 2)], {"size": (2, 2)}),
        "pad": ([image(3, 3, 2)], {"padding": ((1, 0), (0, 2)), "mode": "reflect"}),
        "pixel_shuffle": ([image(2, 3, 8)], {"factor": (2, 2), "order": "channels first"}),
        "pixel_unshuffle": ([image(4, 2, 2)], {"factor": (2, 2), "order": "channels first"}),
        "resize": (
            [image(2, 3, 2)],
            {"size": (4, 6), "method": "linear", "coordinates": "half_pixel"},
        ),
        "group_norm": (norm, {"groups": 2, "eps": draw.option(0.001, 1)}),
        "instance_norm": (norm, {"eps": draw.option(0.001, 1)}),
        "mean_variance_norm": (norm, {"axes": (1, 2), "eps": draw.option(0.001, 1)}),
        "local_response_norm": ([image(2, 5)], {"size": 3, "alpha": 0.5, "beta": 0.75, "k": 0.5}),
        "bilinear": ([image(4), image(3), numbers(4, 3, 2), numbers(2)], {}),
        "conv_max_pool": (
            [image(4, 5, 2), numbers(2, 2, 2, 3), numbers(3)],
            {"window": (2, 1), "stride": 1, "padding": (1, 0), "dilation": 1, "groups": 1},
        ),
    }
    return cases[name]


def turned(x, weight, bias, **options):
    return kernels.conv(x, weight[::-1, ::-1], bias, **options)


def dropped_tap(x, weight, bias, **options):
    weight = weight.copy()
    weight[0, 0, 0] = 0
    return kernels.conv(x, weight, bias, **options)


CORRECT = {name: getattr(naive, name) for name in DRAWN}
WRONG = {  # what each kernel could be mistaken for
    "conv": [
        turned,
        dropped_tap,
        lambda x, w, b, **options: kernels.conv(x, w, **options),
    ],
    "conv_transpose": [
        lambda x, w, b, **options: kernels.conv_transpose(x, w[::-1, ::-1], b, **options),
        lambda x, w, b, **options: kernels.conv_transpose(x, w, **options),
    ],
    "conv_max_pool": [
        lambda x, w, b, **options: kernels.conv_max_pool(x, w[::-1], b, **options),
        lambda x, w, b, window, **options: kernels.average_pool(
            kernels.conv(x, w, b, **options), window=window
        ),
    ],
    "conv_weight_gradient": [
        lambda x, dy, **options: kernels.conv_weight_gradient(x, dy, **options)[::-1],
        lambda x, dy, **options: kernels.conv_weight_gradient(x, dy[:, ::-1], **options),
        lambda x, dy, **options: kernels.conv_weight_gradient(x[:-1], dy[:-1], **options),
    ],
    "max_pool_gradient": [
        lambda dy, x, **options: kernels.max_pool_gradient(dy, -x, **options),
        lambda dy, x, **options: kernels.max_pool_gradient(dy[:, ::-1], x, **options),
    ],
    "max_pool": [lambda x, **options: kernels.average_pool(x, **options)],
    "average_pool": [
        lambda x, **options: kernels.average_pool(x, **options | {"count_include_pad": True}),
        lambda x, count_include_pad, **options: kernels.max_pool(x, **options),
    ],
    "lp_pool": [
        lambda x, p, **options: kernels.lp_pool(x, p=2.0, **options),
        lambda x, p, **options: kernels.average_pool(np.abs(x) ** p, **options) ** (1 / p),
    ],
    "global_average_pool": [lambda x, keepdims: x.sum((1, 2)), lambda x, keepdims: x.max((1, 2))],
    "global_max_pool": [lambda x, keepdims: np.abs(x).max((1, 2), keepdims=True)],
    "adaptive_average_pool": [lambda x, size: kernels.adaptive_max_pool(x, size=size)],
    "adaptive_max_pool": [lambda x, size: kernels.adaptive_average_pool(x, size=size)],
    "pad": [lambda x, padding, mode: kernels.pad(x, padding=padding, mode="edge")],
    "pixel_shuffle": [
        lambda x, factor, order: kernels.pixel_shuffle(x, factor=factor, order="channels last")
    ],
    "pixel_unshuffle": [
        lambda x, factor, order: kernels.pixel_unshuffle(x, factor=factor, order="channels last")
    ],
    "resize": [
        lambda x, coordinates, **options: kernels.resize(x, coordinates="align_corners", **options),
        lambda x, method, **options: kernels.resize(x, method="cubic", **options),
    ],
    "group_norm": [
        lambda x, gain, bias, groups, eps: kernels.group_norm(
            x, gain, bias, groups=groups, eps=0.0
        ),
        lambda x, gain, bias, groups, eps: kernels.group_norm(x, gain, groups=groups, eps=eps),
        lambda x, gain, bias, groups, eps: kernels.instance_norm(x, gain, bias, eps=eps),
    ],
    "instance_norm": [
        lambda x, gain, bias, eps: kernels.instance_norm(x, gain, bias, eps=0.0),
        lambda x, gain, bias, eps: kernels.layer_norm(x, gain, bias, eps=eps),
    ],
    "mean_variance_norm": [
        lambda x, gain, bias, axes, eps: kernels.mean_variance_norm(
            x, gain, bias, axes=axes, eps=0.0
        ),
        lambda x, gain, bias, axes, eps: kernels.layer_norm(x, gain, bias, eps=eps),
    ],
    "local_response_norm": [
        lambda x, size, **options: kernels.local_response_norm(x, size=size + 2, **options),
        lambda x, alpha, **options: kernels.local_response_norm(x, alpha=alpha * 3, **options),
    ],
    "bilinear": [
        lambda x, y, w, b: kernels.bilinear(x, y, w),
        lambda x, y, w, b: kernels.bilinear(x, np.abs(y), w, b),
    ],
}


def torch_on_tensors(name):
    """What TORCH says, from tensors to a tensor."""

    def run(*tensors, **options):
        return torch.from_numpy(TORCH[name](*(each.numpy() for each in tensors), **options).copy())

    return run


CASES = {
    name: (lambda draw, name=name: plain_case(name, draw), torch_on_tensors(name)) for name in DRAWN
}


# The same of layers: what a layer asks of its kernel, asked of torch.

KERNEL_OF = {
    "Conv": ("conv", "weight", "bias"),
    "ConvTranspose": ("conv_transpose", "weight", "bias"),
    "Bilinear": ("bilinear", "weight", "bias"),
    "GroupNorm": ("group_norm", "gain", "bias"),
    "InstanceNorm": ("instance_norm", "gain", "bias"),
    "LocalResponseNorm": ("local_response_norm",),
    "MaxPool": ("max_pool",),
    "AveragePool": ("average_pool",),
    "LpPool": ("lp_pool",),
    "GlobalAveragePool": ("global_average_pool",),
    "GlobalMaxPool": ("global_max_pool",),
    "AdaptiveAveragePool": ("adaptive_average_pool",),
    "AdaptiveMaxPool": ("adaptive_max_pool",),
    "PixelShuffle": ("pixel_shuffle",),
    "PixelUnshuffle": ("pixel_unshuffle",),
    "Pad": ("pad",),
    "Resize": ("resize",),
}


class OverSpace(torch.nn.Module if torch else object):
    """What torch says in place of a layer's kernel."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        kernel, *parameters = KERNEL_OF[type(self.layer).__name__]
        fields = dict(self.layer._fields())
        given = [fields.pop(name) for name in parameters]
        activation = fields.pop("activation", "identity")
        try:
            y = TORCH[kernel](x.numpy(), *given, **fields)
        except ValueError:  # torch has no such thing: loops
            y = getattr(naive, kernel)(x.numpy(), *given, **fields)
        return torch.from_numpy(kernels.ACTIVATIONS[activation](y.astype(x.numpy().dtype)))


class Permuted(OverSpace):
    def forward(self, x):
        return x.permute(self.layer.axes)


MODULES_OF_TORCH = dict.fromkeys(KERNEL_OF, OverSpace)
if torch:
    MODULES_OF_TORCH["Reshape"] = lambda layer: torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Unflatten(1, layer.shape)
    )
    MODULES_OF_TORCH["Transpose"] = Permuted


@needs_torch
@pytest.mark.parametrize("name", TORCH)
def test_torch_says_the_same_of_kernels_over_space(name):
    compared = 0
    for seed in range(1000, 1400):
        arrays, options = DRAWN[name](Draws(seed))
        try:
            expected = TORCH[name](*arrays, **options)
        except (ValueError, RuntimeError):  # what torch does not have, or does not take
            continue
        if not expected.size:  # of which torch makes nothing: here it is refused
            continue
        y = kernels.KERNELS[name](*arrays, **options)
        assert y.shape == expected.shape, (seed, options)
        np.testing.assert_allclose(y, expected, rtol=1e-9, atol=1e-10, err_msg=f"{seed} {options}")
        compared += 1
        if compared == 100:
            return
    assert compared >= 20


# what is refused


REFUSED = {
    "conv takes 3 channels on the last axis, but got 4": lambda: kernels.conv(
        np.ones((2, 5, 5, 4)), np.ones((3, 3, 3, 2))
    ),
    r"got 5; x.moveaxis\(1, -1\) brings them there": lambda: kernels.conv(
        np.ones((2, 3, 5, 5)), np.ones((3, 3, 3, 2))
    ),
    r"reach over \(5, 5\), but x with its padding is only \(4, 6\)": lambda: kernels.conv(
        np.ones((2, 4, 4, 1)), np.ones((3, 3, 1, 1)), padding=(0, 1), dilation=2
    ),
    r"as its weight \(3, 3, 1, 1\) has, but got 3 axes": lambda: kernels.conv(
        np.ones((2, 4, 1)), np.ones((3, 3, 1, 1))
    ),
    "divides the outputs, 4, not 3": lambda: kernels.conv(
        np.ones((2, 4, 6)), np.ones((3, 2, 4)), groups=3
    ),
    "stride of conv is a whole number, at least 1, or one for each of 2 axes": lambda: kernels.conv(
        np.ones((2, 4, 4, 1)), np.ones((3, 3, 1, 1)), stride=(1, 0)
    ),
    "padding of conv is one of valid, same, same_lower": lambda: kernels.conv(
        np.ones((2, 4, 4, 1)), np.ones((3, 3, 1, 1)), padding="SAME"
    ),
    "conv_transpose makes nothing": lambda: kernels.conv_transpose(
        np.ones((2, 1, 1)), np.ones((2, 1, 1)), padding=1
    ),
    "some would see nothing of x": lambda: kernels.max_pool(
        np.ones((2, 4, 4, 1)), window=(2, 2), padding=2
    ),
    "max_pool has windows that reach": lambda: kernels.max_pool(np.ones((2, 4, 1)), window=(5,)),
    "window of max_pool has a size for each axis": lambda: kernels.max_pool(
        np.ones((2, 4, 1)), window=2
    ),
    "global_average_pool takes": lambda: kernels.global_average_pool(np.ones((2, 4))),
    "adaptive_max_pool to": lambda: kernels.adaptive_max_pool(np.ones((2, 4, 1)), size=(1, 1)),
    "there is not so much to take from": lambda: kernels.pad(
        np.ones((2, 4, 1)), padding=4, mode="reflect"
    ),
    "mode of pad is one of": lambda: kernels.pad(np.ones((2, 4, 1)), padding=1, mode="mirror"),
    "resize takes a size or a scale": lambda: kernels.resize(np.ones((2, 4, 1))),
    "of which something is left": lambda: kernels.resize(np.ones((2, 4, 1)), scale=0.2),
    "multiple of 4 channels, not 6": lambda: kernels.pixel_shuffle(np.ones((2, 4, 4, 6)), factor=2),
    "multiples of that": lambda: kernels.pixel_unshuffle(np.ones((2, 3, 4, 6)), factor=2),
    "group_norm with 4 groups": lambda: kernels.group_norm(np.ones((2, 4, 6)), groups=4),
    "not those of rows": lambda: kernels.mean_variance_norm(np.ones((2, 3)), axes=(-2,)),
    "bilinear takes": lambda: kernels.bilinear(
        np.ones((2, 3)), np.ones((2, 4)), np.ones((4, 3, 1))
    ),
    r"Conv has a size for each axis of space, such as \(2, 2\), not 3": lambda: nnxp.Conv(3, 4, 3),
    "groups of Conv divides its inputs and outputs, 3 and 4": lambda: nnxp.Conv(
        3, 4, (3,), groups=3
    ),
    "padding of MaxPool is smaller": lambda: nnxp.MaxPool((2, 2), padding=2),
    "Pad is a whole number": lambda: nnxp.Pad(0.5),
    "a pair .* not array": lambda: nnxp.Pad(np.array([1, 2])),
    "stride of Conv .* not array": lambda: nnxp.Conv(2, 3, (3, 3), stride=np.array([1, 2])),
    "method of Resize is one of": lambda: nnxp.Resize(scale=2, method="bilinear"),
    "begins with 0, the rows": lambda: nnxp.Transpose((1, 0)),
    "perhaps -1": lambda: nnxp.Reshape((-1, -1)),
    "takes rows of 6 numbers": lambda: nnxp.Reshape((2, 3))(np.ones((2, 5), "float32")),
    "groups of GroupNorm divides its 6 channels": lambda: nnxp.GroupNorm(4, 6),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_does_not_fit_is_refused_in_words(words):
    with pytest.raises(nnxp.NnxpError) as refused:
        REFUSED[words]()
    assert re.search(words, str(refused.value)), refused.value


@pytest.mark.parametrize(
    "options", [{}, {"stride": (2, 1), "padding": ((1, 0), 2)}, {"dilation": 2, "groups": 2}]
)
def test_a_convolution_says_itself_what_it_makes(options):
    rng = np.random.default_rng(0)
    x, bias = rng.normal(size=(2, 7, 6, 4)), rng.normal(size=6)
    weight = rng.normal(size=(3, 2, 4 // options.get("groups", 1), 6))
    y = kernels.conv(x, weight, bias, **options)
    assert kernels.conv.outlines(x, weight, bias, **options) == (y.shape, y.dtype)
    for call in (kernels.conv, kernels.conv.outlines):
        with pytest.raises(nnxp.ShapeError, match="conv takes"):
            call(x[..., :3], weight, bias, **options)
        with pytest.raises(nnxp.OptionError, match="padding of conv"):
            call(x, weight, bias, **options | {"padding": "SAME"})
    for odd in (bias[:5], bias.astype("float32")):
        assert kernels.conv.outlines(x, weight, odd, **options) is None
    assert kernels.conv.outlines(x.astype("float32"), weight, bias, **options) is None


def test_a_convolution_is_not_looked_into_for_the_shape_of_its_result(monkeypatch):
    """Its reference body would lay out the weights anew."""
    monkeypatch.setattr(kernels.conv, "reference", lambda *_, **__: pytest.fail("looked into"))
    net = nnxp.Sequential(nnxp.Conv(3, 4, (3, 3), rng=0), nnxp.Flatten())
    assert net.program((1, 8, 8, 3)).outputs[0].shape[1:] == (144,)


def test_a_model_says_which_of_its_layers_does_not_fit():
    net = nnxp.Sequential(nnxp.Conv(3, 4, (3, 3), rng=0), nnxp.Conv(5, 4, (3, 3), rng=1))
    with pytest.raises(nnxp.ShapeError, match=r"layers\.1 conv takes 5 channels"):
        net.program((1, 8, 8, 3))
    with pytest.raises(nnxp.ShapeError, match=r"Conv.*does not take|conv takes"):
        net(np.ones((2, 3, 8, 8), "float32"))


# programs


OF_SPACE = "bilinear conv norm pool resize shape".split()
SPACE = [
    pytest.param(layer, shape, id=f"{layer!r}")
    for name, module in MODULES.items()
    if module in OF_SPACE
    for layer, shape in getattr(nnxp, name).examples()
]


@pytest.mark.parametrize(("layer", "shape"), SPACE)
def test_every_program_is_plain_and_a_recording_of_it_answers_the_same(layer, shape):
    shapes = shape if isinstance(shape, list) else [shape]
    program = layer.program(*shapes)
    assert program.opaque == ()
    assert mixing(expanded(program)) == ""
    rows = shapes[0][0]
    recording = Recording(program, rows, [v.dtype for v in program.inputs])
    for seed in range(2):
        rng = np.random.default_rng(seed)
        arrays = [rng.normal(size=each).astype("float32") for each in shapes]
        expected = layer(*arrays)
        np.testing.assert_array_equal(program(*arrays), expected)
        np.testing.assert_array_equal(expanded(program)(*arrays), expected)
        y = np.empty_like(expected)
        recording(arrays, [y])
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_multiply_adds_of_convolutions_are_those_of_their_windows():
    for layer, shape, work in [
        (nnxp.Conv(8, 16, (3, 3), padding=1), (1, 6, 7, 8), 6 * 7 * 9 * 8 * 16),
        (nnxp.Conv(8, 16, (3, 3), padding=1, groups=4), (1, 6, 7, 8), 6 * 7 * 9 * 2 * 16),
        (nnxp.Conv(8, 8, (3, 3), padding=1, groups=8), (1, 6, 7, 8), 6 * 7 * 9 * 8),
        (nnxp.ConvTranspose(8, 4, (4, 4), stride=2, padding=1), (1, 6, 7, 8), 6 * 7 * 16 * 8 * 4),
        (nnxp.MaxPool((2, 2)), (1, 6, 7, 8), 0),
        (nnxp.Dense(5, 3), (1, 5), 15),
    ]:
        assert layer.summary(shape).multiply_adds == work


def test_the_bytes_counted_for_a_convolution_are_those_that_it_takes():
    tracemalloc = pytest.importorskip("tracemalloc")
    layer, x = (
        nnxp.Conv(8, 16, (3, 3), "tanh", padding=1, rng=0),
        np.ones((40, 20, 20, 8), "float32"),
    )
    program = expanded(layer.program(x.shape))
    program(x)
    tracemalloc.start()
    program(x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    counted = costs(program)
    result = 20 * 20 * 16 * 4 * len(x)
    assert 0.9 * peak <= counted.row_bytes * len(x) + counted.fixed_bytes + result <= 1.5 * peak


def test_a_network_of_convolutions_is_made_saved_and_swept(tmp_path):
    net = nnxp.Sequential(
        nnxp.Conv(1, 4, (3, 3), "relu", padding="same", rng=0),
        nnxp.BatchNorm(4),
        nnxp.MaxPool((2, 2)),
        nnxp.Conv(4, 8, (3, 3), "relu", stride=2, rng=1),
        nnxp.GroupNorm(2, 8),
        nnxp.Flatten(),
        nnxp.Dense(72, 10, "softmax", rng=2),
    )
    x = np.random.default_rng(0).normal(size=(9, 16, 16, 1)).astype("float32")
    y = net(x)
    nnxp.save(net, tmp_path / "net.safetensors")
    np.testing.assert_array_equal(nnxp.load(tmp_path / "net.safetensors")(x), y)
    assert y.shape == net.output_shape(x.shape) == (9, 10)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bilinear_takes_two_inputs(dtype):
    for layer, shapes in nnxp.Bilinear.examples():
        layer = layer.astype(dtype)
        x, y = (np.random.default_rng(i).normal(size=s).astype(dtype) for i, s in enumerate(shapes))
        z = layer(x, y)
        value, error = nnxp.testing.error_bound(layer, x, y)
        assert z.dtype == dtype
        assert (np.abs(z - value) <= 6 * error).all()
        there = layer.to("sim")(*(nnxp.to_backend(each, "sim") for each in (x, y)))
        np.testing.assert_allclose(nnxp.asnumpy(there), z, rtol=1e-6, atol=1e-6)
    with pytest.raises(nnxp.ShapeError, match="bilinear takes"):
        layer(y, x)
