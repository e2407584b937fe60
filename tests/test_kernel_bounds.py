"""The bound of every kernel: another correct formula stays within it, and faults do not."""

from __future__ import annotations

import math

import numpy as np
import pytest

import test_space
from nnxp import kernels
from nnxp.testing import LIMIT, error_bound
from nnxp.testing.parity import compare
from test_torch_oracle import CASES, Draw

ROOT = math.sqrt(2 / math.pi)
SELU = kernels.activations.SELU_ALPHA, kernels.activations.SELU_SCALE


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


CORRECT = {  # other formulas, or other orders of summation, in NumPy and in the type of x
    "identity": lambda x: x + 0,
    "relu": lambda x: np.where(x > 0, x, 0),
    "leaky_relu": lambda x, negative_slope: np.where(x > 0, x, x * negative_slope),
    "elu": lambda x, alpha: np.where(x > 0, x, alpha * np.expm1(x)),
    "selu": lambda x: SELU[1] * np.where(x > 0, x, SELU[0] * np.expm1(x)),
    "softplus": lambda x: np.logaddexp(x, 0),
    "softsign": lambda x: x * (1 / (1 + np.abs(x))),
    "sigmoid": lambda x: logistic(x),
    "hard_sigmoid": lambda x: np.clip(x * (1 / 6) + 0.5, 0, 1),
    "tanh": lambda x: np.expm1(2 * x) / (np.expm1(2 * x) + 2),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (0.5 * erfc(-x / math.sqrt(2))).astype(x.dtype),
    "gelu_tanh": lambda x: x * logistic(2 * ROOT * (x + 0.044715 * x**3)),
    "mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
    "softmax": lambda x: np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True),
    "log_softmax": lambda x: x - np.log(np.exp(x).sum(axis=-1, keepdims=True)),
    "matmul": lambda x, w: np.einsum("mk,kn->mn", x, w),
    "linear": lambda x, w, b: np.c_[x, np.ones_like(x[:, :1])] @ np.r_[w, b[None]],
    "layer_norm": lambda x, gain, bias, eps: (
        centered(x) * (gain / np.sqrt(mean_square(x) - x.mean(-1, keepdims=True) ** 2 + eps)) + bias
    ),
    "rms_norm": lambda x, gain, eps: x * (gain / np.sqrt(mean_square(x) + eps)),
    "batch_norm": lambda x, mean, var, gain, bias, eps: (
        (x - mean) / np.sqrt(var + eps) * gain + bias
    ),
    "standardize": lambda x, mean, scale: (x - mean) * (1 / scale),
}

WRONG = {  # what each kernel could be mistaken for
    "identity": [np.abs],
    "relu": [np.abs, lambda x: np.maximum(x, 1e-3)],
    "leaky_relu": [lambda x, negative_slope: kernels.leaky_relu(x)],
    "elu": [lambda x, alpha: kernels.elu(x), lambda x, alpha: np.where(x > 0, x, alpha * x)],
    "selu": [kernels.elu],
    "softplus": [kernels.relu, lambda x: np.logaddexp(x, 0) / math.log(2)],
    "softsign": [np.tanh, lambda x: x / np.sqrt(1 + x * x)],
    "sigmoid": [kernels.hard_sigmoid, lambda x: 1 / (1 + np.exp(-1.0001 * x))],
    "hard_sigmoid": [lambda x: np.clip(0.2 * x + 0.5, 0, 1)],  # as it was in Keras 2
    "tanh": [kernels.softsign, lambda x: x - x**3 / 3],
    "silu": [kernels.gelu, lambda x: kernels.sigmoid(1.702 * x) * x],
    "gelu": [kernels.gelu_tanh, lambda x: kernels.sigmoid(1.702 * x) * x],
    "gelu_tanh": [kernels.gelu],
    "mish": [kernels.silu],
    "softmax": [
        lambda x: kernels.softmax(x.T).T,
        lambda x: np.exp(x) / (1 + np.exp(x).sum(-1, keepdims=True)),
    ],
    "log_softmax": [lambda x: kernels.log_softmax(x.T).T],
    "matmul": [
        lambda x, w: x[:, 1:] @ w[1:],
        lambda x, w: tf32(x) @ tf32(w),
        lambda x, w: (x.astype("float16") @ w.astype("float16")).astype(x.dtype),
    ],
    "linear": [lambda x, w, b: x @ w, lambda x, w, b: x @ w - b],
    "layer_norm": [
        lambda x, gain, bias, eps: kernels.layer_norm(x, gain, bias, eps=0.0),
        lambda x, gain, bias, eps: kernels.layer_norm(x, gain, eps=eps),
        lambda x, gain, bias, eps: centered(x) / np.sqrt(spread(x, ddof=1) + eps) * gain + bias,
        lambda x, gain, bias, eps: centered(x) / (np.sqrt(spread(x)) + eps) * gain + bias,
    ],
    "rms_norm": [
        lambda x, gain, eps: kernels.rms_norm(x, gain, eps=0.0),
        lambda x, gain, eps: kernels.rms_norm(x, eps=eps),
        lambda x, gain, eps: kernels.layer_norm(x, gain, eps=eps),
    ],
    "batch_norm": [
        lambda x, *others, eps: kernels.batch_norm(x, *others, eps=0.0),
        lambda x, mean, var, gain, bias, eps: kernels.batch_norm(x, mean, var, gain, eps=eps),
        lambda x, mean, var, gain, bias, eps: (x - mean) / (var + eps) * gain + bias,
    ],
    "standardize": [lambda x, mean, scale: x / scale, lambda x, mean, scale: (x - mean) / scale**2],
}

CORRECT |= test_space.CORRECT
WRONG |= test_space.WRONG


class AnyDraw(Draw):
    """With all digits, so that rounding has something to round."""

    @staticmethod
    def _exact(values):
        return values


def judged(name, function, dtype, seed):
    arrays, options = CASES[name][0](AnyDraw(seed, 40, 60))
    given = [each.astype(dtype) for each in arrays]
    value, error = error_bound(kernels.KERNELS[name], *given, **options)
    y = np.asarray(function(*given, **options), dtype)
    return compare(name, "", "cpu", y, value, error)


def test_every_kernel_has_a_correct_variant_and_faults_here():
    assert sorted(set(kernels.KERNELS) - set(CORRECT)) == []
    assert sorted(set(kernels.KERNELS) - set(WRONG)) == []


@pytest.mark.parametrize("name", CORRECT)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_another_correct_formula_stays_within_the_bound(name, dtype):
    for seed in range(5):
        check = judged(name, CORRECT[name], dtype, seed)
        assert check.ok, check.problem


@pytest.mark.parametrize(
    ("name", "fault"), [(name, i) for name in WRONG for i in range(len(WRONG[name]))]
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_fault_does_not(name, fault, dtype):
    for seed in range(5):
        assert judged(name, WRONG[name][fault], dtype, seed).ratio > 2 * LIMIT


@pytest.mark.parametrize("name", CORRECT)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_kernel_itself_stays_far_within_and_64_units_off_does_not(name, dtype):
    right = judged(name, kernels.KERNELS[name], dtype, 0)
    assert right.ratio < LIMIT / 2
    if name in kernels.ACTIVATIONS:
        off = 1 + 64 * float(np.finfo(dtype).eps)
        wrong = judged(name, lambda x, **o: kernels.KERNELS[name](x, **o) * off, dtype, 0)
        assert not wrong.ok


def test_a_product_may_start_from_its_bias():
    rng = np.random.default_rng(0)
    x, w = (rng.normal(size=(20, 2000)) * 1e-3).astype("float32"), rng.normal(size=(2000, 30))
    w, bias = w.astype("float32"), (rng.normal(size=30) + 3).astype("float32")
    y = np.tile(bias, (20, 1))
    for k in range(2000):
        y += x[:, k : k + 1] * w[k]
    value, error = error_bound(kernels.linear, x, w, bias)
    assert compare("", "", "cpu", y, value, error).ratio < LIMIT / 2
    _, added_last = error_bound(lambda x, w, bias: kernels.matmul(x, w) + bias, x, w, bias)
    assert compare("", "", "cpu", y, value, added_last).ratio > LIMIT
