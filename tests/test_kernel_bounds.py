"""The bound of every kernel: another correct formula stays within it, and faults do not."""

from __future__ import annotations

import numpy as np
import pytest

import test_space
from nnxp import kernels
from nnxp.testing import LIMIT, error_bound
from nnxp.testing.parity import compare
from oracles import ORACLES, AnyDraw
from test_torch_oracle import CASES

CORRECT = {name: oracle.correct for name, oracle in ORACLES.items()} | test_space.CORRECT
WRONG = {name: oracle.wrong for name, oracle in ORACLES.items()} | test_space.WRONG


def judged(name, function, dtype, seed):
    arrays, options = CASES[name][0](AnyDraw(seed, 40, 60))
    given = [each.astype(dtype) for each in arrays]
    value, error = error_bound(kernels.KERNELS[name], *given, **options)
    y = np.asarray(function(*given, **options), dtype)
    return compare(name, "", "cpu", y, value, error)


@pytest.mark.parametrize("name", CORRECT)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_another_correct_formula_stays_within_the_bound(name, dtype):
    for seed in range(5):
        check = judged(name, CORRECT[name], dtype, seed)
        assert check.ok, check.problem


@pytest.mark.parametrize(
    ("name", "fault"),
    [(name, i) for name, faults in WRONG.items() for i in range(len(faults))],
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


def test_one_error_for_all_elements_is_told_where_something_is_off():
    due = np.zeros(3)
    check = compare("y", "", "cpu", np.array([0, 1, 0], "float32"), due, np.array(1e-3))
    assert check.where == (1,)
    assert "± 0.006 was due" in check.problem
