"""Programs with less to do answer the same, within the error bound of the model as it is."""

import numpy as np
import pytest

import nnxp
from conftest import draw_inputs, every_layer, results
from nnxp.layers.graph import Graph, Weight, node
from nnxp.program.program import trace
from nnxp.program.rewrite import ORDERS, optimized
from nnxp.testing import bounded, error_bound
from nnxp.testing.parity import compare


def judge(model, inputs, program):
    """The program's results are within the bound of the model's."""
    lifted = model.map_arrays(lambda name, value: bounded.asarray(value))
    given = [x for x in inputs if x is not None]
    for i, y in enumerate(program.run(given)):
        value, bound = error_bound(lambda *xs, i=i: results(lifted(*xs))[i], *inputs)
        check = compare("rewritten", "", "cpu", np.asarray(y), value, bound)
        assert check.ok, check.problem


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@every_layer
def test_every_layer_rewritten_is_within_its_bound(layer, shape):
    inputs = draw_inputs(layer, shape)
    outlines = [None if x is None else (x.shape, x.dtype) for x in inputs]
    judge(layer, inputs, optimized(layer.program(*outlines)))


def residual(rng, *, looked_at_twice=False):
    """conv, norm, relu; conv, norm, added to a 1 x 1 convolution, relu; channels put together"""

    def normal(*shape):
        return rng.normal(size=shape).astype("float32")

    weights = {"w1": normal(4, 3, 3, 3), "b1": normal(4), "w2": normal(4, 4, 3, 3),
               "w3": normal(4, 3, 1, 1)}  # fmt: skip
    norms = ("gain", "shift", "mean", "var")
    for k in "12":
        weights |= {name + k: normal(4) for name in norms}
        weights["var" + k] = np.abs(weights["var" + k]) + np.float32(0.5)
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["a"], pads=(1, 1, 1, 1)),
        node("BatchNormalization", ["a", *(n + "1" for n in norms)], ["b"]),
        node("Relu", ["b"], ["c"]),
        node("Conv", ["c", "w2"], ["d"], pads=(1, 1, 1, 1)),
        node("BatchNormalization", ["d", *(n + "2" for n in norms)], ["e"]),
        node("Conv", ["x", "w3"], ["f"]),
        node("Add", ["e", "f"], ["g"]),
        node("Relu", ["g"], ["h"]),
        node("Concat", ["h", "a" if looked_at_twice else "f"], ["i"], axis=1),
        node("GlobalAveragePool", ["i"], ["j"]),
        node("Flatten", ["j"], ["y"]),
    ]
    return Graph.of(
        nodes=tuple(nodes),
        inputs=({"name": "x", "dtype": "float32", "shape": (None, 3, 8, 8)},),
        outputs=("y",), constants={}, names=tuple(weights),
        weights=tuple(map(Weight, weights.values())), kind="float32",
    )  # fmt: skip


@pytest.mark.parametrize("twice", [False, True])
def test_a_network_that_is_channels_first_keeps_one_order_of_axes(rng, twice):
    graph = residual(rng, looked_at_twice=twice)
    x = rng.normal(size=(5, 3, 8, 8)).astype("float32")
    program = optimized(graph.program((x.shape, x.dtype)))
    judge(graph, [x], program)
    names = [step.name for step in program.steps]
    assert sum(name in ORDERS for name in names) <= 3  # in, perhaps twice, and out
    assert names.count("batch_norm") == twice  # what others look at, too, is left as it is
    assert names.count("conv") == 3
    assert names.count("relu") == 1 + twice


def test_a_bias_and_an_activation_go_into_the_product(rng):
    w, b = rng.normal(size=(4, 6)).astype("float32"), rng.normal(size=6).astype("float32")

    def formula(x):
        return nnxp.kernels.relu(nnxp.kernels.matmul(x, w) + b)

    x = rng.normal(size=(7, 4)).astype("float32")
    program = optimized(trace(formula, (x.shape, x.dtype)))
    assert [step.name for step in program.steps] == ["linear"]
    np.testing.assert_allclose(program(x), formula(x), rtol=1e-6, atol=1e-6)


def test_what_is_computed_twice_is_computed_once(rng):
    w = rng.normal(size=(4, 6)).astype("float32")

    def formula(x):
        return nnxp.kernels.softmax(x @ w) * (x @ w).sum(axis=-1, keepdims=True)

    x = rng.normal(size=(7, 4)).astype("float32")
    program = optimized(trace(formula, (x.shape, x.dtype)))
    assert [step.name for step in program.steps] == ["matmul", "softmax", "sum", "multiply"]
    np.testing.assert_array_equal(program(x), formula(x))


@pytest.mark.parametrize(
    ("options", "joined"),
    [
        ({}, True),
        ({"stride": [2, 2]}, True),
        ({"ceil_mode": True}, False),
        ({"stride": 1}, False),
        ({"padding": 1}, False),
    ],
)
def test_a_pool_goes_into_the_convolution_if_its_windows_lie_one_next_to_another(options, joined):
    net = nnxp.Sequential(
        nnxp.Conv(3, 4, (3, 3), "relu", rng=0), nnxp.MaxPool((2, 2), **options), nnxp.Flatten()
    )
    x = np.random.default_rng(0).normal(size=(3, 9, 8, 3)).astype("float32")
    program = optimized(net.program(x.shape))
    assert ("conv_max_pool" in [step.name for step in program.steps]) == joined
    judge(net, [x], program)
    half = optimized(net.astype("float16").program((x.shape, np.dtype("float16"))))
    assert "conv" in [step.name for step in half.steps]


@pytest.mark.parametrize(
    ("kind", "options"),
    [(nnxp.LSTM, {}), (nnxp.GRU, {}), (nnxp.GRU, {"reset_after": False})],
    ids=["LSTM", "GRU", "GRU with the reset before"],
)
def test_the_product_of_a_recurrence_s_inputs_goes_into_it(kind, options):
    def names(net, *shapes, dtype="float32"):
        outlines = [(shape, np.dtype(dtype if len(shape) > 1 else "int64")) for shape in shapes]
        return [step.name for step in optimized(net.program(*outlines)).steps]

    net = kind(3, 4, layers=2, bidirectional=True, rng=0, **options)
    kernel = f"linear_{kind.__name__.lower()}"
    assert names(net, (5, 6, 3)).count(kernel) == 4
    x = np.random.default_rng(0).normal(size=(5, 6, 3)).astype("float32")
    judge(net, [x], optimized(net.program(x.shape)))
    assert kernel not in names(net, (5, 6, 3), (5,))  # whose rows have lengths
    assert kernel not in names(net.astype("float16"), (5, 6, 3), dtype="float16")
    if kind is nnxp.LSTM:
        assert kernel not in names(nnxp.LSTM(3, 4, 2, rng=0), (5, 6, 3))  # with a projection


def test_a_product_that_others_look_at_stays_where_it_is(rng):
    w, v = (rng.normal(size=shape).astype("float32") for shape in ((3, 8), (2, 8)))

    def formula(x):
        part = nnxp.kernels.linear(x, w)
        return nnxp.kernels.lstm(part, v)[0], part

    program = optimized(trace(formula, ((4, 5, 3), np.dtype("float32"))))
    assert [step.name for step in program.steps] == ["linear", "lstm"]


def test_orders_that_do_not_cancel_become_one(rng):
    def formula(x):
        return np.float32(2) * x.transpose(0, 2, 3, 1).transpose(0, 3, 1, 2).swapaxes(1, 3) + 1

    x = rng.normal(size=(2, 3, 4, 5)).astype("float32")
    program = optimized(trace(formula, (x.shape, x.dtype)))
    assert sum(step.name in ORDERS for step in program.steps) == 1
    np.testing.assert_array_equal(program(x), formula(x))


def test_channels_that_are_shuffled_go_on_lying_behind_the_others(rng):
    first, second = (rng.normal(size=(1, 1, n, 6)).astype("float32") for n in (3, 2))

    def formula(x):
        y = nnxp.kernels.conv(x.transpose(0, 2, 3, 1), first, groups=2).transpose(0, 3, 1, 2)
        y = y.reshape(len(x), 2, 3, 4, 5).swapaxes(1, 2).reshape(len(x), 6, 4, 5)
        return nnxp.kernels.conv(y.transpose(0, 2, 3, 1), second, groups=3)

    x = rng.normal(size=(7, 6, 4, 5)).astype("float32")
    program = optimized(trace(formula, (x.shape, x.dtype)))
    names = [step.name for step in program.steps]
    assert names == ["transpose", "conv", "reshape", "transpose", "copy", "reshape", "conv"]
    assert program.steps[3].outputs[0].shape[1:] == (4, 5, 3, 2)
    np.testing.assert_allclose(program(x), formula(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("axes", "shape", "copied"),
    [
        ((0, 3, 1, 2), (7, -1), True),  # channels before space
        ((0, 2, 1, 3), (7, 4, 15), True),  # heads put together
        ((0, 3, 1, 2), (7, 5, 12), False),  # space alone
        ((0, 3, 1, 2), (7, 5, 1, 3, 2, 2), False),  # taken apart
        ((2, 0, 3, 1), (4, 35, 3), True),
        ((3, 2, 1, 0), (5, 2, 2, 21), True),
        ((1, 0, 2, 3), (1, 21, 20, 1, 1), True),
    ],
)
def test_another_shape_of_another_order_is_the_same(rng, axes, shape, copied):
    def formula(x):
        return x.transpose(axes).reshape(shape) * np.float32(2)

    x = rng.normal(size=(7, 3, 4, 5)).astype("float32")
    program = optimized(trace(formula, (x.shape, x.dtype)))
    assert ("copy" in [step.name for step in program.steps]) == copied
    np.testing.assert_array_equal(program(x), formula(x))


def test_steps_that_look_alike_are_told_apart():
    def formula(x):
        return x * 2, x * 2.0, x * 2, x[:, 0:1], x[:, 0:2], x.sum(axis=0), x.sum(axis=0, keepdims=1)

    x = np.arange(6).reshape(2, 3)
    program = trace(formula, (x.shape, x.dtype))
    said = [(value.shape, value.dtype) for value in program.outputs]
    assert said == [(y.shape, y.dtype) for y in formula(x)]
    assert said == [(v.shape, v.dtype) for v in optimized(program).outputs]


def test_orders_stay_before_what_works_along_an_axis(rng):
    x = rng.normal(size=(2, 3, 4)).astype("float32")
    for name, activation in nnxp.kernels.ACTIVATIONS.items():

        def formula(x, activation=activation):
            return activation(x.transpose(0, 2, 1)) * np.float32(2)

        program = optimized(trace(formula, (x.shape, x.dtype)))
        np.testing.assert_array_equal(program(x), formula(x), err_msg=name)


def test_an_engine_leaves_the_model_as_it_is_where_it_is_told_so(rng):
    graph = residual(rng)
    x = rng.normal(size=(5, 3, 8, 8)).astype("float32")
    as_is = nnxp.Engine(graph, "numpy", rewrite=False)
    np.testing.assert_allclose(as_is(x), graph.program((x.shape, x.dtype))(x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(nnxp.Engine(graph, "numpy")(x), as_is(x), rtol=1e-4, atol=1e-4)
