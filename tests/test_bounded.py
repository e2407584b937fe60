"""The bounds: correct variants stay within them, planted faults do not, and the walk is derived."""

from __future__ import annotations

import numpy as np
import pytest

import nnxp
from conftest import draw
from nnxp import kernels
from nnxp.testing import (
    LIMIT,
    NoBound,
    assert_close,
    assert_parity,
    bounded,
    error_bound,
    parity_report,
    product_bound,
)


def ratio(actual, value, error):
    """The largest difference in units of the bound."""
    off = np.abs(np.asarray(actual, "float64") - value)
    return float(np.max(np.where(off == 0, 0, off / np.maximum(error, 1e-300))))


FAMILIES = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "uniform": lambda rng, shape: rng.uniform(size=shape),
    "lognormal": lambda rng, shape: rng.lognormal(size=shape),
    "sparse": lambda rng, shape: rng.normal(size=shape) * (rng.uniform(size=shape) < 0.05),
    "badly scaled": lambda rng, shape: rng.normal(size=shape) * 10 ** rng.uniform(-6, 6, shape),
}


def orders_of_summation(x, w):
    """The same product, summed in other ways: all correct."""
    half = x.shape[1] // 2
    yield "blas", x @ w
    yield "transposed", np.ascontiguousarray((w.T @ x.T).T)
    yield "einsum", np.einsum("mk,kn->mn", x, w)
    yield "split in two", x[:, :half] @ w[:half] + x[:, half:] @ w[half:]
    yield "reversed", np.ascontiguousarray(x[:, ::-1]) @ np.ascontiguousarray(w[::-1])
    y = np.zeros((x.shape[0], w.shape[1]), x.dtype)
    for k in range(x.shape[1]):
        y += x[:, k : k + 1] * w[k]
    yield "one term after the other", y


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("terms", [1, 16, 500, 4096])
def test_every_order_of_summation_stays_within_half_the_limit(family, terms):
    rng = np.random.default_rng(terms)
    x = FAMILIES[family](rng, (20, terms)).astype("float32")
    w = FAMILIES[family](rng, (terms, 20)).astype("float32")
    value, error = x.astype("float64") @ w.astype("float64"), product_bound(x, w)
    for name, y in orders_of_summation(x, w):
        assert ratio(y, value, error) < LIMIT / 2, name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dropped_term_is_far_outside_the_bound(family):
    rng = np.random.default_rng(1)
    x = FAMILIES[family](rng, (20, 512)).astype("float32")
    w = FAMILIES[family](rng, (512, 20)).astype("float32")
    value, error = x.astype("float64") @ w.astype("float64"), product_bound(x, w)
    term = int((np.abs(x).max(axis=0) * np.abs(w).max(axis=1)).argmax())  # one that is not zero
    dropped = np.delete(x, term, axis=1) @ np.delete(w, term, axis=0)
    assert ratio(dropped, value, error) > 10 * LIMIT


def test_the_product_bound_is_the_formula_of_its_docstring():
    x, w = draw((3, 50)), draw((50, 4), seed=1)
    y, u = x.astype("float64") @ w, 2.0**-24
    spread = np.sqrt((x.astype("float64") ** 2) @ (w.astype("float64") ** 2))
    walk = u * np.sqrt(50) * (np.abs(y) / np.sqrt(3) + spread / np.sqrt(2)) + u * np.abs(y)
    np.testing.assert_allclose(product_bound(x, w), walk, rtol=1e-6)
    proof = u * 50 * np.abs(x).astype("float64") @ np.abs(w) + u * np.abs(y)
    np.testing.assert_allclose(product_bound(x, w, rigorous=True), proof, rtol=1e-6)


def test_rows_of_zeros_have_no_error_and_say_nothing():
    x = np.zeros((2, 8), "float32")
    assert product_bound(x, draw((8, 3))).max() < 1e-37  # what flushing to zero may do
    with pytest.raises(AssertionError, match="rows of zeros give zeros"):
        assert_parity(nnxp.Dense(8, 3, bias=False, rng=0), x)
    x[1] = 1
    assert_parity(nnxp.Dense(8, 3, bias=False, rng=0), x)


@pytest.mark.parametrize("name", sorted(kernels.ACTIVATIONS))
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_activations_stay_within_half_the_limit_and_a_fault_does_not(name, dtype):
    x = (draw((64, 100)) * 4).astype(dtype)
    kernel = kernels.ACTIVATIONS[name]
    value, error = error_bound(kernel, x)
    right = kernel(x)
    assert ratio(right, value, error) < LIMIT / 2
    wrong = right * np.array(1 + 64 * np.finfo(dtype).eps, dtype)
    assert ratio(wrong, value, error) > LIMIT


def softmax_without_maximum(x):
    y = np.exp(x)
    return y / y.sum(axis=-1, keepdims=True)


def layer_norm_in_one_pass(x):
    mean = x.mean(axis=-1, keepdims=True)
    var = (x * x).mean(axis=-1, keepdims=True) - mean * mean
    return (x - mean) / np.sqrt(var + np.float32(1e-5))


@pytest.mark.parametrize(
    ("kernel", "variant"),
    [
        (kernels.softmax, softmax_without_maximum),
        (kernels.layer_norm, layer_norm_in_one_pass),
        (kernels.sigmoid, lambda x: np.exp(np.minimum(x, 0)) / (1 + np.exp(-np.abs(x)))),
        (kernels.silu, lambda x: x / (1 + np.exp(-x))),
        (kernels.softplus, lambda x: np.logaddexp(x, np.float32(0))),
        (kernels.mish, lambda x: x * np.tanh(np.log1p(np.exp(x)))),
    ],
)
def test_other_correct_formulas_stay_within_the_bound(kernel, variant):
    x = draw((64, 200))
    value, error = error_bound(kernel, x)
    assert ratio(variant(x), value, error) < LIMIT


def test_layer_norm_in_one_pass_is_seen_where_it_loses_its_digits():
    x = draw((64, 200)) + np.float32(300)
    value, error = error_bound(kernels.layer_norm, x)
    assert ratio(kernels.layer_norm(x), value, error) < LIMIT
    assert ratio(layer_norm_in_one_pass(x), value, error) > LIMIT


def attention(q, k, v):
    """A function that is not made of our layers."""
    xp = nnxp.get_array_module(q)
    scores = xp.matmul(q, k.swapaxes(-1, -2)) / 4
    weights = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
    return xp.matmul(weights / xp.sum(weights, axis=-1, keepdims=True), v)


def test_any_function_written_with_xp_is_judged_too():
    q, k, v = draw((3, 10, 16)), draw((3, 12, 16), seed=1), draw((3, 12, 5), seed=2)
    report = assert_parity(attention, q, k, v)
    assert {check.backend for check in report.checks} >= {"cpu", "sim:0"}
    assert report.largest < 3


def test_functions_that_answer_with_indices_are_compared_exactly():
    assert_parity(lambda x: x.argmax(axis=1), draw((9, 4)), backends=["numpy", "sim"])


def test_a_function_without_a_known_bound_says_so():
    with pytest.raises(NoBound, match="nextafter"):
        parity_report(lambda x: np.nextafter(x, x), draw((3, 3)))
    with pytest.raises(NoBound, match="bounded has no fft"):
        bounded.fft  # noqa: B018


def test_rigorous_bounds_are_wider_and_hold():
    net = nnxp.Sequential(nnxp.Dense(300, 40, "tanh", rng=0), nnxp.Dense(40, 5, "softmax", rng=1))
    x = draw((50, 300))
    proven = assert_parity(net, x, rigorous=True)
    assert proven.limit == 1
    assert proven.largest < 1


def test_assert_close_takes_any_bound():
    expected = np.array([1.0, np.nan, np.inf, 0.0])
    assert_close(np.array([1 + 0.9e-7, np.nan, np.inf, 0.0]), expected, bound=1e-7)
    for wrong in ([1 + 1.1e-7, np.nan, np.inf, 0.0], [1, 1, np.inf, 0], [1, np.nan, -np.inf, 0]):
        with pytest.raises(AssertionError, match="elements are off"):
            assert_close(np.array(wrong), expected, bound=1e-7)
    with pytest.raises(AssertionError, match="shape"):
        assert_close(np.ones(3), expected, bound=1e-7)


def test_a_backend_that_cannot_be_used_raises_rather_than_being_skipped():
    if nnxp.available_backends()["cupy"].ok:
        pytest.skip("this machine has a usable GPU")
    with pytest.raises(nnxp.BackendUnavailable):
        assert_parity(nnxp.Dense(2, 2), np.ones((1, 2)), backends=["numpy", "cupy"])
    with pytest.raises(nnxp.OptionError, match="backends is empty"):
        parity_report(nnxp.Dense(2, 2), np.ones((1, 2)), backends=[])


def test_assert_close_refuses_what_means_nothing():
    ones = np.ones(3)
    with pytest.raises(nnxp.OptionError, match="zero or more"):
        assert_close(ones, ones, bound=-1.0)
    for odd in (np.array(["1"] * 3), ones * 1j):
        with pytest.raises(nnxp.DtypeMismatch, match="real numbers"):
            assert_close(odd, ones, bound=1.0)
    with pytest.raises(AssertionError, match="off"):
        assert_close(np.array([1]), np.array([1.5]), bound=1e-9)
    assert_close(ones, 1.0, bound=1e-9)


@pytest.mark.parametrize("name", ["max", "min"])
def test_what_cannot_be_the_extreme_has_no_part_in_its_bound(name):
    sign = np.float32(1 if name == "max" else -1)
    rows = sign * np.array([[1, 2, -3e38], [1, 1.0001, 0.9999]], "float32")
    mask = np.array([[0.1, 0.1, 0.1], [0.1, 0.1, 0.1]], "float32")
    _, unit = error_bound(lambda x, m: getattr(nnxp.get_array_module(x), name)(x * (1 + m), axis=1),
                          rows, mask)  # fmt: skip
    assert (unit < 1e-6).all()
    wide = np.array([[1.0, 1.0, 1.0]], "float32")

    def close(x):  # 1e6 + 1 - 1e6: as large as the others, within its error
        xp = nnxp.get_array_module(x)
        return getattr(xp, name)(x + (x * 1e6 - x * 1e6) * np.array([0, 0, 1], "float32"), axis=1)

    _, unit = error_bound(close, wide)
    assert (unit > 1e-2).all()


def test_scores_that_are_masked_by_the_least_number_have_a_bound():
    """As exporters write attention: (1 - mask) times the least number is added."""
    least = float(np.finfo("float32").min)

    def weights(scores, mask):
        return kernels.softmax(scores + (1.0 - mask) * least)

    mask = np.array([[1, 1, 0], [1, 1, 1]], "float32")
    value, unit = error_bound(weights, draw((2, 3)), mask)
    assert (unit < 1e-5).all()
    assert_close(weights(draw((2, 3)), mask), value, bound=LIMIT * unit)


def test_products_take_a_precision_and_no_notice_of_it():
    x, w = bounded.asarray(draw((3, 4))), bounded.asarray(draw((4, 2)))
    for kernel in (kernels.linear, kernels.matmul):
        rounded, plain = kernel(x, w, precision="tf32"), kernel(x, w)
        np.testing.assert_array_equal(rounded.error, plain.error)
