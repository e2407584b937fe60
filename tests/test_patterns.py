"""Kernels that a formula writes out in steps are seen, and nothing else is taken for one."""

from math import pi, sqrt

import numpy as np
import pytest

import nnxp
from conftest import draw
from nnxp import kernels
from nnxp._arrays import Array, xp_of
from nnxp.program import patterns
from nnxp.program.rewrite import optimized
from test_rewrite import judge

ROOT, TANH = sqrt(2), sqrt(2 / pi)


def layer_of(formula):
    class Formula(nnxp.Layer):
        """What is written: y = formula(x)"""

        def __call__(self, *inputs):
            return formula(*inputs)

    return Formula()


def programs(formula, *inputs):
    layer = layer_of(formula)
    outlines = [(x.shape, x.dtype) for x in inputs]
    judge(layer, inputs, program := optimized(layer.program(*outlines)))
    return program


def functions(formula, *inputs):
    """The functions of what is left of a formula, whose results are judged first."""
    return [step.name for step in programs(formula, *inputs).steps]


def tanh(x):
    return xp_of(x).tanh(x)


def clip(x):
    return xp_of(x).clip(x, 0, 6)


erf, sigmoid = kernels.erf, kernels.sigmoid

GATED = {
    "gelu": [
        lambda x: x * 0.5 * (1 + erf(x / ROOT)),
        lambda x: 0.5 * x * (erf(x * (1 / ROOT)) + 1.0),
        lambda x: x * (0.5 * (1 + erf(x / ROOT))),
        lambda x: (x * (erf(x / ROOT) + 1)) / 2,
        lambda x: (x / 2) * (1 + erf(x / np.float32(ROOT))),
        lambda x: 0.5 * (x + x * erf(x / ROOT)),
    ],
    "gelu_tanh": [
        lambda x: 0.5 * x * (1 + tanh(TANH * (x + 0.044715 * x**3))),
        lambda x: x * 0.5 * (1 + kernels.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))),
    ],
    "silu": [lambda x: x * sigmoid(x), lambda x: sigmoid(x) * x],
    "hard_swish": [
        lambda x: x * kernels.hard_sigmoid(x),
        lambda x: x * clip(x + 3) / 6,
        lambda x: x * (clip(x + 3) / 6),
        lambda x: x * kernels.relu6(3 + x) * (1 / 6),
    ],
}
ROUNDED = GATED["gelu"][4], GATED["gelu_tanh"][1]
"""Whose constants are not those of float64."""


@pytest.mark.parametrize(("name", "formula"), [(n, f) for n, fs in GATED.items() for f in fs])
def test_what_is_gated_by_a_function_of_itself_is_one_kernel(name, formula):
    x = draw((5, 7)) * 3
    assert functions(formula, x) == [name]
    if formula not in ROUNDED:
        assert functions(formula, x.astype("float64")) == [name]


@pytest.mark.parametrize(
    "formula",
    [
        lambda x: x * 0.5 * (1 + erf(x * 0.7)),
        lambda x: x * 0.6 * (1 + erf(x / ROOT)),
        lambda x: x * 0.5 * (1.5 + erf(x / ROOT)),
        lambda x: x * 0.5 * (1 + erf(x[:, ::-1] / ROOT)),
        lambda x: 0.5 * x * (1 + tanh(TANH * (x + 0.04 * x**3))),
        lambda x: 0.5 * x * (1 + tanh(TANH * (x + 0.044715 * x**2))),
        lambda x: x * sigmoid(1.702 * x),
        lambda x: (x + 1) * sigmoid(x),
        lambda x: x * xp_of(x).clip(x + 3, 0, 5) / 6,
        lambda x: x * clip(x + 2) / 6,
        lambda x: sigmoid(x) / x,
    ],
)
def test_what_is_gated_otherwise_stays_as_it_is(formula):
    kept = functions(formula, draw((5, 7)) + np.float32(4))
    assert not {"gelu", "gelu_tanh", "silu", "hard_swish"} & set(kept)


@pytest.mark.parametrize(("name", "formula"), [(n, f) for n, fs in GATED.items() for f in fs])
def test_a_gate_is_seen_behind_another_one(name, formula):
    x = draw((5, 7)) * 3

    def behind(x):
        return formula(kernels.relu6(x + 1) * sigmoid(x * 2))

    assert functions(behind, x).count(name) == 1


def test_a_recurrence_that_is_written_out_is_not_looked_through_again_and_again(monkeypatch):
    looks, polynomial = [], patterns._polynomial
    monkeypatch.setattr(patterns, "_polynomial", lambda *of: looks.append(of) or polynomial(*of))
    steps, weight = 10, draw((4, 16)) / 4

    def recurrence(x):
        h = c = x[:, 0, :4]
        for t in range(steps):
            i, f, g, o = ((x[:, t] + h @ weight)[:, 4 * k : 4 * k + 4] for k in range(4))
            c = sigmoid(f) * c + sigmoid(i) * tanh(g)
            h = sigmoid(o) * tanh(c)
        return h

    kept = functions(recurrence, draw((3, steps, 16)))
    assert kept.count("sigmoid") == 3 * steps
    assert len(looks) < 100 * steps


def mean(x):
    return x.mean(axis=-1, keepdims=True)


def centred(x):
    return x - mean(x)


GAIN, SHIFT = draw((7,), seed=1), draw((7,), seed=2)
NORMS = {
    "layer_norm": [
        lambda x: centred(x) / xp_of(x).sqrt(mean(centred(x) ** 2) + 1e-3),
        lambda x: GAIN * (centred(x) / xp_of(x).sqrt(1e-3 + mean(xp_of(x).square(centred(x))))),
        lambda x: centred(x) / xp_of(x).sqrt(mean(centred(x) * centred(x)) + 1e-3) * GAIN + SHIFT,
        lambda x: SHIFT + centred(x) * (1 / xp_of(x).sqrt(mean(centred(x) ** 2) + 1e-3)) * GAIN,
    ],
    "rms_norm": [
        lambda x: x / xp_of(x).sqrt(mean(x**2) + 1e-3),
        lambda x: GAIN * (x * (1 / xp_of(x).sqrt(mean(x * x) + 1e-3))),
        lambda x: x * xp_of(x).reciprocal(xp_of(x).sqrt(mean(x * x) + 1e-3)) * GAIN,
    ],
}


@pytest.mark.parametrize(("name", "formula"), [(n, f) for n, fs in NORMS.items() for f in fs])
def test_a_norm_over_the_last_axis_is_one_kernel_with_its_gain_and_bias(name, formula):
    assert functions(formula, draw((5, 7))) == [name]
    assert functions(formula, draw((5, 3, 7))) == [name]


@pytest.mark.parametrize(
    "formula",
    [
        lambda x: centred(x) / xp_of(x).sqrt(mean(x**2) + 1e-3),
        lambda x: (x - x.mean(axis=1, keepdims=True)) / xp_of(x).sqrt(mean(centred(x) ** 2) + 1e-3),
        lambda x: x / xp_of(x).sqrt(x.mean(axis=1, keepdims=True) ** 2 + 1e-3),
        lambda x: x / xp_of(x).sqrt((x * x).mean(axis=1, keepdims=True) + 1e-3),
        lambda x: x / xp_of(x).sqrt(2 * mean(x * x) + 1e-3),
        lambda x: (1 / xp_of(x).sqrt(mean(x * x) + 1e-3)) / x,
    ],
)
def test_what_is_divided_by_another_root_is_no_norm(formula):
    assert not {"layer_norm", "rms_norm"} & set(functions(formula, draw((5, 3, 7))))


def heads(x):
    """(n, time, 6) as (n, 2 heads, time, 3)"""
    return x.reshape(len(x), x.shape[1], 2, 3).transpose(0, 2, 1, 3)


def weighed(scores, v):
    return xp_of(v).matmul(kernels.softmax(scores), heads(v))


def scores(q, k, scale=1.0):
    return xp_of(q).matmul(heads(q) * scale, heads(k).swapaxes(-1, -2))


MASK = np.where(np.tri(4), np.float32(0), np.float32(-1e4))
ATTENTION = [
    lambda q, k, v: weighed(scores(q, k) / sqrt(3), v),
    lambda q, k, v: weighed(scores(q, k) * 0.7 + MASK, v),
    lambda q, k, v: weighed(MASK + 0.5 * scores(q, k), v),
    lambda q, k, v: weighed(scores(q, k, 0.3), v),
]


@pytest.mark.parametrize("formula", ATTENTION)
def test_attention_is_one_kernel(formula):
    q, k, v = (draw((3, 4, 6), seed=seed) for seed in range(3))
    left = functions(formula, q, k, v)
    assert left.count("attention") == 1
    assert not {"matmul", "softmax", "copy", "divide"} & set(left)


@pytest.mark.parametrize(
    "formula",
    [
        lambda q, k, v: xp_of(q).matmul(kernels.softmax(scores(q, k)).swapaxes(-1, -2), heads(v)),
        lambda q, k, v: xp_of(q).matmul(kernels.softmax(scores(q, k)), heads(v)[:, :1]),
        lambda q, k, v: weighed(scores(q, k) * scores(k, q), v),
        lambda q, k, v: weighed(1 / scores(q, k), v),
    ],
)
def test_other_products_with_a_softmax_are_no_attention(formula):
    q, k, v = (draw((3, 4, 6), seed=seed) for seed in range(3))
    assert "attention" not in functions(formula, q, k, v)


class Biased(nnxp.Layer):
    """y = gelu(bias + x weight), as exporters write it"""

    weight: Array
    bias: Array

    def __init__(self):
        self.weight, self.bias = draw((7, 5)), draw((5,), seed=1)

    def __call__(self, x):
        y = self.bias.reshape(1, 5) + x @ self.weight
        return y * 0.5 * (1 + erf(y / ROOT))


def test_a_bias_before_its_product_and_what_is_seen_behind_it_go_into_it():
    x = draw((6, 7))
    program = optimized(Biased().program((x.shape, x.dtype)))
    judge(Biased(), [x], program)
    (step,) = program.steps
    assert step.name == "linear"
    assert step.options["activation"] is kernels.gelu


def test_what_is_centred_by_something_else_is_no_layer_norm():
    def formula(x):
        c = x - x.max(axis=-1, keepdims=True)
        return c / xp_of(x).sqrt(mean(c * c) + 1e-3)

    assert functions(formula, draw((5, 7)))[-1] == "rms_norm"


@pytest.mark.parametrize("shape", [(1,), (3, 1), (3, 7)])
def test_a_factor_that_is_none_of_channels_stays_behind_its_norm(shape):
    factor = draw(shape)
    formula = NORMS["layer_norm"][0]
    assert functions(lambda x: formula(x) * factor, draw((5, 3, 7))) == ["layer_norm", "multiply"]


def test_attention_that_looks_nowhere_is_zero_in_an_engine():
    q, k, v = (draw((3, 4, 6), seed=seed) for seed in range(3))
    hidden = np.where(np.arange(4)[:, None] == 2, np.float32(-np.inf), MASK)
    layer = layer_of(lambda q, k, v: weighed(scores(q, k) + hidden, v))
    with np.errstate(invalid="ignore"):
        expected = layer(q, k, v)
    assert np.isnan(expected[:, :, 2]).all()
    y = nnxp.Engine(layer, "numpy").whole(q, k, v)
    assert (y[:, :, 2] == 0).all()
    np.testing.assert_allclose(y[:, :, 3], expected[:, :, 3], rtol=1e-5, atol=1e-6)
    exact = nnxp.Engine(layer, "numpy", rewrite=False).whole(q, k, v)
    assert np.isnan(exact[:, :, 2]).all()
