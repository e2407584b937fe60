"""Kernels against truth from outside: definitions in plain Python, SciPy, and hand-computed cases.

Parity shows that backends agree with one another and with float64; these tests show that what they
agree on is right.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

import nnxp
from conftest import draw
from nnxp import kernels
from nnxp.kernels._erf import erf
from nnxp.testing import bounded

ACTIVATIONS = sorted(kernels.ACTIVATIONS)
ELEMENTWISE = sorted(set(ACTIVATIONS) - {"softmax", "log_softmax"})


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def softplus(x):
    return x if x > 700 else math.log1p(math.exp(x))


DEFINITIONS = {
    "identity": lambda x: x,
    "relu": lambda x: max(x, 0.0),
    "leaky_relu": lambda x: x if x > 0 else 0.01 * x,
    "elu": lambda x: x if x > 0 else math.expm1(x),
    # alpha and scale from the paper's appendix, to the digits printed there
    "selu": lambda x: (
        1.0507009873554804934193349852946
        * (x if x > 0 else 1.6732632423543772848170429916717 * math.expm1(x))
    ),
    "softplus": softplus,
    "softsign": lambda x: x / (1 + abs(x)),
    "sigmoid": sigmoid,
    "hard_sigmoid": lambda x: min(max(x / 6 + 0.5, 0.0), 1.0),
    "tanh": math.tanh,
    "silu": lambda x: x * sigmoid(x),
    "gelu": lambda x: x * 0.5 * math.erfc(-x / math.sqrt(2)),
    "gelu_tanh": lambda x: (
        0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "mish": lambda x: x * math.tanh(softplus(x)),
}
POINTS = np.concatenate(
    [np.linspace(-12, 12, 481), [-80.0, -30.5, -1e-3, -1e-7, 1e-7, 1e-3, 30.5, 80.0]]
)


def test_every_activation_has_its_definition_here():
    assert set(DEFINITIONS) == set(ELEMENTWISE)


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_activations_are_what_they_are_defined_to_be(name, dtype):
    x = POINTS.astype(dtype)
    expected = np.array([DEFINITIONS[name](float(each)) for each in x])
    # gelu and its kin subtract nearly equal numbers on the left: an error of a few u * |x|
    unit = np.finfo(dtype).eps * np.maximum(np.abs(expected), np.abs(x) if "gelu" in name else 0)
    off = np.abs(kernels.ACTIVATIONS[name](x) - expected)
    assert (off <= 4 * unit + 1e-37).all(), (x[off.argmax()], off.max())


# Printed in the documentation of Keras 3 (keras.activations) and PyTorch, and in DLMF 7.2 for erf.
PUBLISHED = [
    ("softplus", 0.0, 0.6931471805599453),
    ("softsign", -1.0, -0.5),
    ("hard_sigmoid", -1.0, 0.33333333),
    ("elu", -1.0, -0.6321205588285577),
    ("selu", -1.0, -1.1113307378125625),
    ("gelu", -3.0, -0.00404951),
    ("gelu", -1.0, -0.15865525),
    ("gelu", 1.0, 0.8413447),
    ("gelu", 3.0, 2.9959507),
    ("gelu_tanh", -3.0, -0.00363752),
    ("gelu_tanh", -1.0, -0.15880796),
    ("gelu_tanh", 1.0, 0.841192),
    ("gelu_tanh", 3.0, 2.9963627),
    ("silu", -1.0, -0.26894143),
    ("mish", 1.0, 0.865098),
]


@pytest.mark.parametrize(("name", "x", "y"), PUBLISHED)
def test_activations_have_their_published_values(name, x, y):
    got = kernels.ACTIVATIONS[name](np.array([x], "float64"))[0]
    # They were computed and printed in float32, where the gelus are off by a few u * |x|.
    assert got == pytest.approx(y, rel=1e-6, abs=4 * 2**-24 * abs(x) if "gelu" in name else 0)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_no_finite_number_raises_a_warning_or_becomes_nan(name, dtype):
    kind = nnxp._arrays.float_dtype(dtype)
    most = float(bounded._finfo(kind).max)
    if name in ("selu", "log_softmax"):
        most /= 2  # beyond it the true answer is too large for the type, and the warning is due
    x = np.array([[0.0, -0.0, 1e-8, 1, -1, 50, -50, 1e4, -1e4, most, -most]]).clip(-most, most)
    y = kernels.ACTIVATIONS[name](x.astype(kind))
    assert not np.isnan(y.astype("float64")).any()


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_nan_goes_through_as_nan_and_only_where_it_was(name):
    y = kernels.ACTIVATIONS[name](np.array([1.0, np.nan, -1.0], "float32"))
    assert np.isnan(y).tolist() == [False, True, False]


INFINITIES = {  # the limits at minus and plus infinity, where the formula has them
    "identity": (-np.inf, np.inf),
    "relu": (0, np.inf),
    "leaky_relu": (-np.inf, np.inf),
    "elu": (-1, np.inf),
    "selu": (-1.7580993408473766, np.inf),
    "softplus": (0, np.inf),
    "sigmoid": (0, 1),
    "hard_sigmoid": (0, 1),
    "tanh": (-1, 1),
}


@pytest.mark.parametrize("name", INFINITIES)
def test_infinity_has_its_limit(name):
    y = kernels.ACTIVATIONS[name](np.array([-np.inf, np.inf], "float32"))
    np.testing.assert_allclose(y, INFINITIES[name], rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_work_in_place_or_leave_their_input_alone(name):
    x = draw((6, 9)) * 3
    kept = x.copy()
    y = kernels.ACTIVATIONS[name](x)
    np.testing.assert_array_equal(x, kept)
    again = x.copy()
    assert kernels.ACTIVATIONS[name](again, out=again) is again
    np.testing.assert_array_equal(again, y)


def test_options_change_the_slope():
    x = np.array([-2.0, 3.0], "float32")
    np.testing.assert_allclose(kernels.leaky_relu(x, negative_slope=0.25), [-0.5, 3])
    np.testing.assert_allclose(kernels.elu(x, alpha=2.0), [2 * math.expm1(-2), 3], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_erf_agrees_with_the_standard_library_within_four_ulp(dtype):
    x = np.concatenate([np.linspace(-6.5, 6.5, 20001), [0.0, 1e-30, -1e-7, 1e30]]).astype(dtype)
    expected = np.array([math.erf(float(each)) for each in x])
    off = np.abs(erf(x) - expected) / np.spacing(np.abs(expected).astype(dtype))
    assert off.max() <= 4
    limits = erf(np.array([-np.inf, np.inf, np.nan], dtype))
    np.testing.assert_array_equal(limits, [-1, 1, np.nan])


def test_softmax_is_a_probability_and_survives_large_numbers():
    np.testing.assert_allclose(
        kernels.softmax(np.array([[1.0, 2.0, 3.0]])),
        [[0.09003057317038046, 0.24472847105479764, 0.6652409557748218]],
        rtol=1e-15,
    )
    y = kernels.softmax(np.array([[1e4, 1e4, -1e4], [-3e38, 3e38, 0]], "float32") / 2)
    np.testing.assert_array_equal(y, [[0.5, 0.5, 0], [0, 1, 0]])
    masked = kernels.softmax(np.array([[-np.inf, 0.0, 0.0]], "float32"))
    np.testing.assert_array_equal(masked, [[0, 0.5, 0.5]])


def test_softmaxes_agree_with_scipy():
    special = pytest.importorskip("scipy.special", reason="SciPy comes with scikit-learn")
    x = draw((50, 30), "float64") * 20
    np.testing.assert_allclose(kernels.softmax(x), special.softmax(x, axis=-1), rtol=1e-13)
    np.testing.assert_allclose(kernels.log_softmax(x), special.log_softmax(x, axis=-1), rtol=1e-13)


def test_layer_norm_by_hand():
    x = np.array([[1.0, 2.0, 3.0, 6.0]])  # mean 3, variance 3.5
    gain, bias = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 0.0, 1.0, 0.0])
    root = math.sqrt(3.5 + 0.5)
    np.testing.assert_allclose(
        kernels.layer_norm(x, gain, bias, eps=0.5), [[-2 / root, -2 / root, 1, 12 / root]]
    )


def test_layer_norm_keeps_its_variance_under_a_large_offset():
    x = draw((3, 64), "float64")
    expected = kernels.layer_norm(x)
    np.testing.assert_allclose(kernels.layer_norm(x + 1e9), expected, atol=1e-5)


def test_rms_norm_by_hand():
    x = np.array([[3.0, 4.0]])  # mean square 12.5
    gain = np.array([1.0, 2.0])
    np.testing.assert_allclose(
        kernels.rms_norm(x, gain, eps=0.5), [[3 / math.sqrt(13), 8 / math.sqrt(13)]]
    )


def test_batch_norm_by_hand():
    x, mean, var = np.array([[5.0, 1.0]]), np.array([1.0, 2.0]), np.array([3.0, 0.0])
    gain, bias = np.array([2.0, 1.0]), np.array([0.5, -1.0])
    np.testing.assert_allclose(kernels.batch_norm(x, mean, var, gain, bias, eps=1.0), [[4.5, -2.0]])


def test_standardize_by_hand():
    got = kernels.standardize(np.array([[5.0, 1.0]]), np.array([1.0, 2.0]), np.array([2.0, 4.0]))
    np.testing.assert_array_equal(got, [[2, -0.25]])


def test_linear_by_hand():
    x, weight = np.array([[1.0, 2.0]]), np.array([[1.0, -1.0, 0.0], [2.0, 0.0, -3.0]])
    bias = np.array([0.5, 0.5, 0.5])
    got = kernels.linear(x, weight, bias, activation=kernels.relu)
    np.testing.assert_array_equal(got, [[5.5, 0, 0]])
    np.testing.assert_array_equal(kernels.matmul(x, weight), [[5, -1, -6]])


def test_products_of_more_than_two_axes_are_those_of_einsum():
    x, weight = draw((3, 4, 5), "float64"), draw((5, 2), "float64")
    np.testing.assert_allclose(kernels.linear(x, weight), np.einsum("abi,io->abo", x, weight))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bit_types_accumulate_in_float32(dtype):
    kind = nnxp._arrays.float_dtype(dtype)
    ones = np.ones((1, 60000), kind)
    np.testing.assert_array_equal(kernels.rms_norm(ones, eps=0.0).astype("float32"), 1)
    # 4096 terms of 1/4096 each: 16-bit partial sums would stop growing on the way
    got = kernels.matmul(np.ones((1, 4096), kind), np.full((4096, 1), 1 / 4096, kind))
    assert got.dtype == kind
    assert float(got[0, 0]) == 1


def test_a_fused_body_takes_the_place_of_the_reference_for_its_library_only():
    @kernels.Kernel
    def doubled(x):
        """y = 2 x"""
        return x * 2

    @doubled.on("sim")
    def doubled_there(x):
        return x + x + 0.5

    try:
        assert doubled(np.ones(2)).tolist() == [2, 2]
        assert nnxp.asnumpy(doubled(nnxp.to_backend(np.ones(2), "sim"))).tolist() == [2.5, 2.5]
    finally:
        del kernels.KERNELS["doubled"]


def test_kernels_pickle_by_name_and_say_what_they_are():
    import pickle

    assert repr(kernels.relu) == "<kernel relu>"
    assert pickle.loads(pickle.dumps(nnxp.Dense(2, 3, "relu", rng=0))).activation == "relu"


def test_what_is_no_array_is_refused_by_name():
    with pytest.raises(nnxp.DtypeMismatch, match="list is not an array"):
        kernels.relu([1, 2])
