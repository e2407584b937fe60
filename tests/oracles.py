"""One entry for each kernel: what it is, said from outside, and what it could be mistaken for.

A new kernel has its entry here, and every test of all kernels takes it up: against mpmath, torch,
another formula for the same function, faults, limits at infinity and published values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import nnxp
from nnxp import kernels

try:
    import torch
    from torch.nn import functional as F
except ImportError:
    torch = F = None
try:
    from mpmath import mp
except ImportError:
    mp = None

inf = math.inf


class Draw:
    """Random arrays of multiples of 1/64: exact in float32, and short in a file."""

    def __init__(self, seed, rows=5, channels=7):
        self.rng = np.random.default_rng(seed)
        self.rows, self.channels = rows, channels

    def x(self, scale=3, times=1):
        return self._exact(self.rng.normal(size=(self.rows, times * self.channels)) * scale)

    def weight(self):
        return self._exact(self.rng.normal(size=(self.channels, 4)))

    def vector(self, size=None):
        return self._exact(self.rng.normal(size=size or self.channels))

    def positive(self):
        return self._exact(self.rng.uniform(0.1, 3, self.channels))

    def exact(self, values):
        return self._exact(values)

    def option(self, low, high):
        return round(float(self.rng.uniform(low, high)), 4)

    @staticmethod
    def _exact(values):
        return np.round(values * 64) / 64


class AnyDraw(Draw):
    """With all digits, so that rounding has something to round."""

    @staticmethod
    def _exact(values):
        return values


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """A kernel as others say it.

    `draw` gives arrays and options to ask it with, `torch` says the same in torch, `correct` is
    another formula, or another order of summation, in NumPy and in the type of x; `wrong` are
    faults. `rounded` is torch's formula on arrays of ours, where it rounds more than ours does.

    Of an elementwise kernel `exact` is the formula in numbers of mpmath, `ulp` how many units in
    the last place of the result it may be off, for every x of every type, and `tail` how many more
    at an x, where the smallest normal number is `tiny`. `limits` are those at minus and plus
    infinity, where the formula has them, `published` pairs of x and y, and `most` what part of the
    largest number still has a result.
    """

    draw: Callable[[Draw], tuple[list[Any], dict[str, Any]]] = lambda d: ([d.x()], {})
    torch: Callable[..., Any]
    correct: Callable[..., Any]
    wrong: tuple[Callable[..., Any], ...]
    rounded: Callable[..., Any] | None = None
    exact: Callable[..., Any] | None = None
    ulp: float = 0
    tail: Callable[[Any, float], Any] = lambda x, tiny: 0
    limits: tuple[float, float] | None = None
    published: dict[float, float] = field(default_factory=dict)
    most: float = 1


def with_options(**ranges):
    """Ask with x, and with options from these ranges."""
    return lambda d: ([d.x()], {name: d.option(*each) for name, each in ranges.items()})


# Formulas that several entries share


def centered(x):
    return x - x.mean(axis=-1, keepdims=True)


def spread(x, **options):
    return np.var(x, axis=-1, keepdims=True, **options)


def mean_square(x):
    return (x * x).mean(axis=-1, keepdims=True)


def erfc(x):
    return np.array([math.erfc(each) for each in x.ravel().tolist()]).reshape(x.shape)


def logistic(x):
    return np.exp(np.minimum(x, 0)) / (1 + np.exp(-np.abs(x)))


def tf32(x):
    if x.dtype != np.float32:
        return x.astype("float32").astype(x.dtype)  # for float64: rounded to float32
    return (x.view("uint32") + np.uint32(0x1000) & np.uint32(0xFFFFE000)).view("float32")


def of_selu(x, expm1, larger):
    """alpha and scale from the paper's appendix, to the digits printed there."""
    scale, alpha = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717
    return scale * larger(x > 0, x, alpha * expm1(x))


def either(condition, x, y):
    return x if condition else y


def area_of_square(x):
    """x - tanh(x), the integral of tanh(t)^2 from 0 to x, by Gauss and Legendre."""
    points, weights = np.polynomial.legendre.leggauss(40)
    t = np.multiply.outer(x, (points / 2 + 0.5).astype(x.dtype))
    return np.where(
        np.abs(x) < 2, (np.tanh(t) ** 2 @ (weights / 2).astype(x.dtype)) * x, x - np.tanh(x)
    )


def exact_tanh_shrink(x):
    if abs(x) < 1e-6:
        return x**3 / 3 * (1 - 2 * x**2 / 5 + 17 * x**4 / 105)
    return x - mp.tanh(x)


def exact_gelu(x):
    """Left of -100 it is 0 in every type, and mpmath's erfc overflows."""
    return x * mp.erfc(-x / mp.sqrt(2)) / 2 if x > -100 else 0


def gelu_of_torch(x):
    """x/2 * (1 + erf(x / sqrt(2))), which cancels on the left, where ours does not."""
    return x * 0.5 * (nnxp.get_array_module(x).erf(x * 0.7071067811865476) + 1)


def gelu_tanh_of_torch(x):
    """x/2 * (1 + tanh(u)), which cancels on the left, where ours does not."""
    xp = nnxp.get_array_module(x)
    return x * 0.5 * (xp.tanh((x * x * x * 0.044715 + x) * 0.7978845608028654) + 1)


def tanh_shrink_of_torch(x):
    """x - tanh(x), which cancels near 0, where ours does not."""
    return x - nnxp.get_array_module(x).tanh(x)


def batch_norm_of_torch(x, mean, var, gain, bias, *, eps):
    """x * scale + offset, which cancels where x is near the mean."""
    scale = gain / nnxp.get_array_module(x).sqrt(var + eps)
    return x * scale + (bias - mean * scale)


ROOT = math.sqrt(2 / math.pi)


def two_u(x):
    """The argument of gelu_tanh's exponential."""
    return 2 * ROOT * (x + 0.044715 * x**3)


def subnormal_factor(x, tiny):
    """exp(x) has lost half a unit of the smallest number there, and x times that is off."""
    return -x / 2 if x < 0 and mp.exp(x) < tiny else 0


ORACLES = {
    # Exact: they choose among x and numbers.
    "identity": Oracle(
        torch=lambda x: x,
        correct=lambda x: x + 0,
        wrong=(np.abs,),
        exact=lambda x: x,
        limits=(-inf, inf),
    ),
    "relu": Oracle(
        torch=lambda x: F.relu(x),
        correct=lambda x: np.where(x > 0, x, 0),
        wrong=(np.abs, lambda x: np.maximum(x, 1e-3)),
        exact=lambda x: max(x, 0),
        limits=(0, inf),
    ),
    "relu6": Oracle(
        torch=lambda x: F.relu6(x),
        correct=lambda x: np.minimum(np.where(x > 0, x, 0), 6),
        wrong=(kernels.relu, lambda x: np.minimum(x, 6)),
        exact=lambda x: min(max(x, 0), 6),
        limits=(0, 6),
    ),
    "threshold": Oracle(
        draw=with_options(threshold=(-1, 1), value=(-2, 2)),
        torch=lambda x, **options: F.threshold(x, **options),
        correct=lambda x, threshold, value: np.where(x > threshold, x, x.dtype.type(value)),
        wrong=(
            lambda x, **options: kernels.threshold(x),
            lambda x, threshold, value: np.maximum(x, threshold),
        ),
        exact=lambda x, threshold=0, value=0: x if x > threshold else value,
        limits=(0, inf),
    ),
    "hard_tanh": Oracle(
        draw=with_options(min_val=(-2, -0.1), max_val=(0.1, 2)),
        torch=lambda x, **options: F.hardtanh(x, **options),
        correct=lambda x, min_val, max_val: np.minimum(np.maximum(x, min_val), max_val),
        wrong=(
            lambda x, **options: kernels.hard_tanh(x),
            lambda x, min_val, max_val: np.maximum(x, min_val),
        ),
        exact=lambda x, min_val=-1, max_val=1: min(max(x, min_val), max_val),
        limits=(-1, 1),
    ),
    "hard_shrink": Oracle(
        draw=with_options(lambd=(0.1, 2)),
        torch=lambda x, lambd: F.hardshrink(x, lambd),
        correct=lambda x, lambd: x * (np.abs(x) > x.dtype.type(lambd)),
        wrong=(lambda x, lambd: kernels.hard_shrink(x), kernels.soft_shrink),
        exact=lambda x, lambd=0.5: x if abs(x) > lambd else 0,
        limits=(-inf, inf),
    ),
    # A rounding or two.
    "leaky_relu": Oracle(
        draw=with_options(negative_slope=(0.01, 0.9)),
        torch=lambda x, negative_slope: F.leaky_relu(x, negative_slope),
        correct=lambda x, negative_slope: np.where(x > 0, x, x * negative_slope),
        wrong=(lambda x, negative_slope: kernels.leaky_relu(x),),
        exact=lambda x, negative_slope=0.01: x if x > 0 else negative_slope * x,
        ulp=1.5,  # the slope is rounded, and the product
        limits=(-inf, inf),
    ),
    "soft_shrink": Oracle(
        draw=with_options(lambd=(0.1, 2)),
        torch=lambda x, lambd: F.softshrink(x, lambd),
        correct=lambda x, lambd: np.sign(x) * np.maximum(np.abs(x) - lambd, 0),
        wrong=(lambda x, lambd: kernels.soft_shrink(x), kernels.hard_shrink),
        exact=lambda x, lambd=0.5: x - min(max(x, -lambd), lambd),
        ulp=0.5,
        limits=(-inf, inf),
    ),
    "hard_sigmoid": Oracle(
        torch=lambda x: F.hardsigmoid(x),
        correct=lambda x: np.clip(x + 3, 0, 6) * (1 / 6),
        wrong=(lambda x: np.clip(0.2 * x + 0.5, 0, 1),),  # as it was in Keras 2
        exact=lambda x: min(max(x + 3, 0), 6) / 6,
        ulp=1.5,
        limits=(0, 1),
        published={-1.0: 0.33333333},
    ),
    "hard_swish": Oracle(
        torch=lambda x: F.hardswish(x),
        correct=lambda x: x * np.clip(x + 3, 0, 6) * (1 / 6),
        wrong=(kernels.silu, kernels.hard_sigmoid),
        exact=lambda x: x * min(max(x + 3, 0), 6) / 6,
        ulp=2.5,
        published={-1.0: -0.3333333, 3.0: 3.0},
    ),
    "softsign": Oracle(
        torch=lambda x: F.softsign(x),
        correct=lambda x: x * (1 / (1 + np.abs(x))),
        wrong=(np.tanh, lambda x: x / np.sqrt(1 + x * x)),
        exact=lambda x: x / (1 + abs(x)),
        ulp=1.5,
        published={-1.0: -0.5},
    ),
    "prelu": Oracle(
        draw=lambda d: ([d.x(), d.vector()], {}),
        torch=lambda x, slope: F.prelu(x, slope),
        correct=lambda x, slope: np.where(x > 0, x, x * slope),
        wrong=(lambda x, slope: kernels.leaky_relu(x), lambda x, slope: x * slope),
        exact=lambda x, slope: x if x > 0 else slope * x,
        ulp=0.5,
        most=0.1,  # the slope may be larger than 1
    ),
    "standardize": Oracle(
        draw=lambda d: ([d.x(), d.vector(), d.positive()], {}),
        torch=lambda x, mean, scale: torch.div(torch.sub(x, mean), scale),
        correct=lambda x, mean, scale: (x - mean) * (1 / scale),
        wrong=(lambda x, mean, scale: x / scale, lambda x, mean, scale: (x - mean) / scale**2),
        exact=lambda x, mean, scale: (x - mean) / scale,
        ulp=1.5,
        most=0.05,  # the scale may be as small as 0.1
    ),
    # Of NumPy's exp, expm1, log1p and tanh, which are off by up to 2.5 units, on some machines.
    "elu": Oracle(
        draw=with_options(alpha=(0.1, 2)),
        torch=lambda x, alpha: F.elu(x, alpha),
        correct=lambda x, alpha: np.where(x > 0, x, alpha * np.expm1(x)),
        wrong=(
            lambda x, alpha: kernels.elu(x),
            lambda x, alpha: np.where(x > 0, x, alpha * x),
        ),
        exact=lambda x, alpha=1: x if x > 0 else alpha * mp.expm1(x),
        ulp=2,
        limits=(-1, inf),
        published={-1.0: -0.6321205588285577},
    ),
    "selu": Oracle(
        torch=lambda x: F.selu(x),
        correct=lambda x: of_selu(x, np.expm1, np.where).astype(x.dtype),
        wrong=(kernels.elu,),
        exact=lambda x: of_selu(x, mp.expm1, either),
        ulp=3,
        limits=(-1.7580993408473766, inf),
        published={-1.0: -1.1113307378125625},
        most=0.5,  # beyond, the true answer is too large for the type, and a warning is due
    ),
    "celu": Oracle(
        draw=with_options(alpha=(0.1, 2)),
        torch=lambda x, alpha: F.celu(x, alpha),
        correct=lambda x, alpha: np.where(x > 0, x, alpha * np.expm1(x / alpha)),
        wrong=(lambda x, alpha: kernels.celu(x), lambda x, alpha: kernels.elu(x, alpha=alpha)),
        exact=lambda x, alpha=1: x if x > 0 else alpha * mp.expm1(x / alpha),
        ulp=3,
        limits=(-1, inf),
        published={-1.0: -0.6321205588285577},
    ),
    "softplus": Oracle(
        # torch is linear beyond a threshold, by default 20, where float64 still sees the difference
        torch=lambda x: F.softplus(x, threshold=80),
        correct=lambda x: np.logaddexp(x, 0),
        wrong=(kernels.relu, lambda x: np.logaddexp(x, 0) / math.log(2)),
        exact=lambda x: mp.log1p(mp.exp(x)),
        ulp=4,
        limits=(0, inf),
        published={0.0: 0.6931471805599453},
    ),
    "log_sigmoid": Oracle(
        torch=lambda x: F.logsigmoid(x),
        correct=lambda x: -np.logaddexp(-x, 0),
        wrong=(kernels.sigmoid, kernels.softplus),
        exact=lambda x: -mp.log1p(mp.exp(-x)),
        ulp=4,
        limits=(-inf, 0),
        published={-0.541391: -1.0000418, 5.0: -0.00671535},
    ),
    "sigmoid": Oracle(
        torch=lambda x: torch.sigmoid(x),
        correct=lambda x: logistic(x),
        wrong=(kernels.hard_sigmoid, lambda x: 1 / (1 + np.exp(-1.0001 * x))),
        exact=lambda x: 1 / (1 + mp.exp(-x)),
        ulp=4,
        limits=(0, 1),
    ),
    "tanh": Oracle(
        torch=lambda x: torch.tanh(x),
        correct=lambda x: np.expm1(2 * x) / (np.expm1(2 * x) + 2),
        wrong=(kernels.softsign, lambda x: x - x**3 / 3),
        exact=lambda x: mp.tanh(x),
        ulp=4,
        limits=(-1, 1),
    ),
    "tanh_shrink": Oracle(
        torch=lambda x: F.tanhshrink(x),
        correct=area_of_square,
        wrong=(kernels.soft_shrink, kernels.tanh),
        rounded=tanh_shrink_of_torch,
        exact=exact_tanh_shrink,
        ulp=5,
        limits=(-inf, inf),
        published={1.0: 0.23840584},
    ),
    # x times a factor of exponentials.
    "silu": Oracle(
        torch=lambda x: F.silu(x),
        correct=lambda x: x / (1 + np.exp(-x)),
        wrong=(kernels.gelu, lambda x: kernels.sigmoid(1.702 * x) * x),
        exact=lambda x: x / (1 + mp.exp(-x)),
        ulp=5,
        tail=subnormal_factor,
        published={-1.0: -0.26894143},
    ),
    "gelu": Oracle(
        torch=lambda x: F.gelu(x),
        correct=lambda x: x * (0.5 * erfc(-x / math.sqrt(2))).astype(x.dtype),
        wrong=(kernels.gelu_tanh, lambda x: kernels.sigmoid(1.702 * x) * x),
        rounded=gelu_of_torch,
        exact=exact_gelu,
        ulp=6,
        tail=lambda x, tiny: x**2 / 2 if x < 0 else 0,  # x^2 / 2 is rounded, and exp of it off
        limits=(0, inf),
        published={-3.0: -0.00404951, -1.0: -0.15865525, 1.0: 0.8413447, 3.0: 2.9959507},
    ),
    "gelu_tanh": Oracle(
        torch=lambda x: F.gelu(x, approximate="tanh"),
        correct=lambda x: x * logistic(two_u(x)),
        wrong=(kernels.gelu,),
        rounded=gelu_tanh_of_torch,
        exact=lambda x: x / (1 + mp.exp(-2 * mp.sqrt(2 / mp.pi) * (x + 0.044715 * x**3))),
        ulp=6,
        tail=lambda x, tiny: -3 * two_u(x) if x < 0 else 0,  # 2 u is off by 3 units, and exp of it
        published={-3.0: -0.00363752, -1.0: -0.15880796, 1.0: 0.841192, 3.0: 2.9963627},
    ),
    "mish": Oracle(
        torch=lambda x: F.mish(x),
        correct=lambda x: x * np.tanh(np.log1p(np.exp(x))),
        wrong=(kernels.silu,),
        exact=lambda x: x * mp.tanh(mp.log1p(mp.exp(x))),
        ulp=5,
        tail=subnormal_factor,
        published={1.0: 0.865098},
    ),
    "glu": Oracle(
        draw=lambda d: ([d.x(times=2)], {}),
        torch=lambda x: F.glu(x, -1),
        correct=lambda x: x[:, : x.shape[1] // 2] / (1 + np.exp(-x[:, x.shape[1] // 2 :])),
        wrong=(
            lambda x: kernels.glu(np.roll(x, x.shape[1] // 2, axis=1)),
            lambda x: kernels.silu(x[:, : x.shape[1] // 2]),
        ),
    ),
    "erf": Oracle(
        torch=lambda x: torch.erf(x),
        correct=lambda x: np.array(list(map(math.erf, x.ravel().tolist())), x.dtype).reshape(
            x.shape
        ),
        wrong=(kernels.tanh, lambda x: kernels.erf(x * 0.7071067811865476)),
    ),
    # Over rows
    "softmax": Oracle(
        torch=lambda x: torch.softmax(x, -1),
        correct=lambda x: np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True),
        wrong=(
            lambda x: kernels.softmax(x.T).T,
            lambda x: np.exp(x) / (1 + np.exp(x).sum(-1, keepdims=True)),
        ),
    ),
    "softmin": Oracle(
        torch=lambda x: F.softmin(x, -1),
        correct=lambda x: np.exp(-x) / np.exp(-x).sum(axis=-1, keepdims=True),
        wrong=(kernels.softmax, lambda x: kernels.softmin(x.T).T),
    ),
    "log_softmax": Oracle(
        torch=lambda x: torch.log_softmax(x, -1),
        correct=lambda x: x - np.log(np.exp(x).sum(axis=-1, keepdims=True)),
        wrong=(lambda x: kernels.log_softmax(x.T).T,),
        most=0.5,
    ),
    "layer_norm": Oracle(
        draw=lambda d: ([d.x(), d.vector(), d.vector()], {"eps": d.option(0.001, 1)}),
        torch=lambda x, gain, bias, eps: F.layer_norm(x, (x.shape[-1],), gain, bias, eps),
        correct=lambda x, gain, bias, eps: (
            centered(x) * (gain / np.sqrt(mean_square(x) - x.mean(-1, keepdims=True) ** 2 + eps))
            + bias
        ),
        wrong=(
            lambda x, gain, bias, eps: kernels.layer_norm(x, gain, bias, eps=0.0),
            lambda x, gain, bias, eps: kernels.layer_norm(x, gain, eps=eps),
            lambda x, gain, bias, eps: centered(x) / np.sqrt(spread(x, ddof=1) + eps) * gain + bias,
            lambda x, gain, bias, eps: centered(x) / (np.sqrt(spread(x)) + eps) * gain + bias,
        ),
    ),
    "rms_norm": Oracle(
        draw=lambda d: ([d.x(), d.vector()], {"eps": d.option(0.001, 1)}),
        torch=lambda x, gain, eps: F.rms_norm(x, (x.shape[-1],), gain, eps),
        correct=lambda x, gain, eps: x * (gain / np.sqrt(mean_square(x) + eps)),
        wrong=(
            lambda x, gain, eps: kernels.rms_norm(x, gain, eps=0.0),
            lambda x, gain, eps: kernels.rms_norm(x, eps=eps),
            lambda x, gain, eps: kernels.layer_norm(x, gain, eps=eps),
        ),
    ),
    "batch_norm": Oracle(
        draw=lambda d: (
            [d.x(), d.vector(), d.positive(), d.vector(), d.vector()],
            {"eps": d.option(0.001, 1)},
        ),
        torch=lambda x, mean, var, gain, bias, eps: F.batch_norm(
            x, mean, var, gain, bias, training=False, eps=eps
        ),
        correct=lambda x, mean, var, gain, bias, eps: (x - mean) / np.sqrt(var + eps) * gain + bias,
        wrong=(
            lambda x, *others, eps: kernels.batch_norm(x, *others, eps=0.0),
            lambda x, mean, var, gain, bias, eps: kernels.batch_norm(x, mean, var, gain, eps=eps),
            lambda x, mean, var, gain, bias, eps: (x - mean) / (var + eps) * gain + bias,
        ),
        rounded=batch_norm_of_torch,
    ),
    # Products
    "matmul": Oracle(
        draw=lambda d: ([d.x(), d.weight()], {}),
        torch=lambda x, w: x @ w,
        correct=lambda x, w: np.einsum("mk,kn->mn", x, w),
        wrong=(
            lambda x, w: x[:, 1:] @ w[1:],
            lambda x, w: tf32(x) @ tf32(w),
            lambda x, w: (x.astype("float16") @ w.astype("float16")).astype(x.dtype),
        ),
    ),
    "linear": Oracle(
        draw=lambda d: ([d.x(), d.weight(), d.vector(4)], {}),
        torch=lambda x, w, b: F.linear(x, w.T, b),
        correct=lambda x, w, b: np.c_[x, np.ones_like(x[:, :1])] @ np.r_[w, b[None]],
        wrong=(lambda x, w, b: x @ w, lambda x, w, b: x @ w - b),
    ),
}
