"""Bodies in place, which recordings on NumPy run, answer what the reference bodies do."""

import gc
import os
import platform
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

import nnxp
from nnxp import kernels
from nnxp._arrays import Array
from nnxp.backend._blas import one_blas_thread
from nnxp.kernels._dispatch import Operand
from nnxp.kernels.cpu import _finish, _pieces, _small, conv, onednn, pool, recurrent
from nnxp.kernels.cpu._gelu import gelu_in_place, takes
from nnxp.kernels.cpu._pieces import blas_threads
from nnxp.program.program import trace
from nnxp.program.recording import Bodied, Recording, bodied, costs
from nnxp.program.rewrite import optimized
from nnxp.program.traced import ROWS
from nnxp.testing.parity import compare, error_bound
from nnxp.training.differentiate import LossRunner, write_out


@pytest.fixture(autouse=True, params=["NumPy", "oneDNN"])
def library(request):
    """Which library the bodies ask for products and convolutions."""
    if request.param == "oneDNN":
        if onednn.why_not() is not None:
            pytest.skip(onednn.why_not())
        yield request.param
    else:
        with onednn.unused():
            yield request.param


only_numpy = pytest.mark.parametrize("library", ["NumPy"], indirect=True)
only_onednn = pytest.mark.parametrize("library", ["oneDNN"], indirect=True)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, "float32")


def recorded(layer, *arrays):
    """What a recording makes of the arrays, which has to run a body in place."""
    program = layer
    if not isinstance(layer, Bodied):
        program = bodied(layer.program(*((x.shape, x.dtype) for x in arrays)))
    assert program.bodies, layer
    outlines = program.outline(len(arrays[0]))
    made = [np.full(shape, np.nan, dtype) for shape, dtype in outlines]
    with np.errstate(all="ignore"):
        Recording(program, len(arrays[0]), [x.dtype for x in arrays])(arrays, made)
    return made if program.several else made[0]


def agrees(layer, *arrays):
    made = recorded(layer, *arrays)
    with np.errstate(all="ignore"):
        value, error = error_bound(layer, *arrays)
    check = compare("", "", "cpu", made, value, error)
    assert check.ok, f"{layer}: {check.problem}"


WINDOWS = [
    pytest.param(window, stride, padding, dilation, id=f"{window} {stride} {padding} {dilation}")
    for window, stride, padding, dilation in product(
        [(3, 3), (1, 1), (2, 5), (4,)], [1, 2], [0, "same", 1], [1, 2]
    )
    if not (window == (1, 1) and dilation == 2)
]


@pytest.mark.parametrize(("window", "stride", "padding", "dilation"), WINDOWS)
def test_convolutions_in_place_agree_with_float64(window, stride, padding, dilation):
    space = (11, 9)[: len(window)]
    options = {"stride": stride, "padding": padding, "dilation": dilation, "rng": 0}
    for channels, outputs, groups, activation in [
        (1, 5, 1, "relu"), (12, 8, 1, "gelu"), (6, 6, 6, "hard_swish")
    ]:  # fmt: skip
        layer = nnxp.Conv(channels, outputs, window, activation, groups=groups, **options)
        layer = layer.with_parameters({"weight": layer.weight, "bias": draw(outputs)})
        agrees(layer, draw(7, *space, channels))


def test_a_stride_that_differs_by_axis_and_pads_that_differ_by_side():
    options = {"stride": (2, 3), "padding": ((2, 0), (0, 1)), "rng": 0}
    for groups in (1, 8):
        agrees(nnxp.Conv(8, 8, (3, 2), groups=groups, **options), draw(3, 13, 10, 8))


@pytest.mark.parametrize("window", [(1, 1), (1,)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("groups", "channels", "outputs"), [(2, 6, 4), (4, 4, 8), (3, 96, 120)])
def test_groups_of_windows_of_one_element_agree_with_float64(
    monkeypatch, window, stride, groups, channels, outputs
):
    monkeypatch.setattr(_small, "small_kernels", lambda: True)
    monkeypatch.setattr(_small, "TINY", 1)
    layer = nnxp.Conv(channels, outputs, window, "relu", stride=stride, groups=groups, rng=0)
    layer = layer.with_parameters({"weight": layer.weight, "bias": draw(outputs)})
    space = (11, 9)[: len(window)]
    agrees(layer, draw(5, *space, channels))
    agrees(layer, np.moveaxis(draw(5, channels, *space), 1, -1)[:, ::2])
    assert recorded(layer, draw(0, *space, channels)).shape[0] == 0


def test_a_bias_reaches_all_of_many_lines_and_of_few():
    """Of pieces, of whole buffers of NumPy's, and of what is left of each."""
    for outputs in (5, 64, 9000):
        layer = nnxp.Conv(3, outputs, (1, 1), "relu", rng=0)
        layer = layer.with_parameters({"weight": layer.weight, "bias": draw(outputs)})
        agrees(layer, draw(2, 2 + 60_000 // outputs, 3, 3))


class Pooled(nnxp.Layer):
    """A convolution and a pool in one, as a program has it when it is rewritten."""

    inner: nnxp.Conv
    window: tuple[int, ...]

    def __init__(self, inner, window):
        self.inner, self.window = inner, window

    def __call__(self, x):
        inner = self.inner
        options = {"stride": inner.stride, "padding": inner.padding, "dilation": inner.dilation}
        arrays = x, inner.weight, inner.bias
        activation = kernels.ACTIVATIONS[inner.activation]
        return kernels.conv_max_pool(
            *arrays, window=self.window, activation=activation, groups=inner.groups, **options
        )


@pytest.mark.parametrize("window", [(2, 2), (1, 3), (1, 1)])
@pytest.mark.parametrize("patches", [1 << 20, 1 << 12])
def test_what_a_pool_leaves_of_a_convolution_agrees_with_float64(monkeypatch, window, patches):
    """Of whole pictures at once, and of few lines."""
    monkeypatch.setattr(conv, "PATCHES", patches)
    monkeypatch.setattr(conv, "LINES", 16)
    for channels, options in [
        (1, {"padding": 1}), (12, {"stride": (2, 1)}), (4, {"dilation": 2, "padding": "same"}),
        (96, {}), (6, {"groups": 6}),
    ]:  # fmt: skip
        for activation in ("relu", "identity", "gelu"):
            inner = nnxp.Conv(
                channels, 96 if channels == 96 else 6, (3, 3), activation, rng=0, **options
            )
            inner = inner.with_parameters({"weight": inner.weight, "bias": draw(*inner.bias.shape)})
            agrees(Pooled(inner, window), draw(5, 9, 8, channels))


def test_a_number_that_is_none_goes_through_a_pool_behind_a_convolution():
    layer, x = Pooled(nnxp.Conv(2, 3, (3, 3), "relu", rng=0), (2, 2)), draw(3, 8, 8, 2)
    x[1, 4, 4, 1] = np.nan
    np.testing.assert_array_equal(np.isnan(recorded(layer, x)), np.isnan(layer(x)))


PHASES = [
    (1, (2, 2), {"padding": 1}), (3, (2, 2), {"padding": "same", "dilation": 2}),
    (4, (2, 2), {"padding": 2, "stride": (2, 1)}), (6, (2, 1), {"padding": 1, "groups": 6}),
    (2, (3, 3), {"padding": 2}), (1, (1, 2), {"padding": ((0, 1), (2, 1))}),
]  # fmt: skip


@only_onednn
@pytest.mark.parametrize(("channels", "window", "options"), PHASES, ids=str)
def test_a_pool_is_the_largest_of_several_convolutions(monkeypatch, channels, window, options):
    monkeypatch.setattr(conv, "_by_onednn", None)
    for together in (1, conv.TOGETHER):
        monkeypatch.setattr(conv, "TOGETHER", together)
        for activation in ("relu", "identity"):
            inner = nnxp.Conv(channels, 6, (3, 3), activation, rng=0, **options)
            inner = inner.with_parameters({"weight": inner.weight, "bias": draw(6)})
            layer, x = Pooled(inner, window), draw(5, 11, 8, channels)
            agrees(layer, x)
            agrees(layer, np.moveaxis(np.moveaxis(x, -1, 1).copy(), 1, -1))
            assert recorded(layer, x[:0]).shape[0] == 0
            x[1, 4, 4, 0], x[2, 0, 0, 0], x[3, 10, 7, 0] = np.nan, np.inf, -np.inf
            with np.errstate(all="ignore"):
                expected = layer(x)
            answer = recorded(layer, x)
            np.testing.assert_array_equal(np.isnan(answer), np.isnan(expected))
            np.testing.assert_array_equal(np.isinf(answer), np.isinf(expected))


@only_onednn
def test_a_pool_follows_where_windows_begin_inside_or_see_much(monkeypatch):
    followed, by_onednn = [], conv._by_onednn
    monkeypatch.setattr(
        conv, "_by_onednn", lambda *args: followed.append(args[0]) or by_onednn(*args)
    )
    for channels, options in ((4, {}), (60, {"padding": 1}), (4, {"padding": ((0, 1), (1, 0))})):
        agrees(
            Pooled(nnxp.Conv(channels, 6, (3, 3), rng=0, **options), (2, 2)),
            draw(3, 9, 8, channels),
        )
    assert followed == [(9, 8)] * 3


def test_pictures_that_lie_by_channels_are_taken_as_they_are():
    class Turned(nnxp.Layer):
        inner: nnxp.Layer

        def __init__(self, inner):
            self.inner = inner

        def __call__(self, x):
            return self.inner(kernels.layer_norm(x.swapaxes(1, 3)))

    for window, channels, groups in [((3, 3), 3, 1), ((1, 1), 3, 1), ((3, 3), 3, 3)]:
        agrees(Turned(nnxp.Conv(channels, 6, window, groups=groups, rng=0)), draw(4, 3, 9, 8))


@pytest.mark.parametrize("groups", [2, 3, 6])
def test_channels_that_are_shuffled_are_the_same(groups):
    class Shuffled(nnxp.Layer):
        inner: nnxp.Layer

        def __init__(self, inner):
            self.inner = inner

        def __call__(self, x):
            y = self.inner(x)
            return y.reshape(*y.shape[:-1], groups, -1).swapaxes(-1, -2).reshape(y.shape)

    agrees(Shuffled(nnxp.Conv(6, 12, (1, 1), rng=0)), draw(4, 9, 8, 6))


# Winograd's


def loud(x):
    x[:, 6, 5] *= 1e5


def quiet(x):
    x[:, :, 8:] = 0


def one(x):
    x[:, 6, 5, 3] = 1e5


def faint(x):
    one(x)
    x *= np.float32(1e-17)  # whose fourth powers are 0


def steep(x):
    np.exp(3 * x, out=x)


def infinite(x):
    x[0, 5, 6, 1], x[1, 3, 3, 0] = np.inf, np.nan


def plain(x):
    pass


@pytest.mark.parametrize("change", [plain, loud, quiet, one, faint, steep, infinite])
def test_convolutions_by_transforms_agree_with_float64_whatever_lies_next_to_each_other(change):
    layer = nnxp.Conv(96, 96, (3, 3), "relu", padding=1, rng=0)
    x = draw(4, 13, 14, 96)
    change(x)
    agrees(layer, x)


@only_numpy
def test_transforms_are_what_is_run(monkeypatch):
    """A transform that is wrong shows: else the tests above would compare patches."""
    monkeypatch.setattr(conv, "_LEFT", conv._LEFT * 2)
    layer, x = nnxp.Conv(96, 96, (3, 3), rng=0), draw(4, 14, 14, 96)
    assert not np.allclose(recorded(layer, x), layer(x), rtol=0.1)
    few = x[:1, :6, :6]  # too few tiles: patches
    np.testing.assert_allclose(recorded(layer, few), layer(few), rtol=1e-4, atol=1e-4)


# others


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("padding", [0, 1, ((1, 0), (0, 1))])
@pytest.mark.parametrize(("window", "stride"), [((2, 2), None), ((3, 2), 2), ((3, 3), (1, 2))])
def test_the_largest_in_windows_is_the_same_to_the_bit(window, stride, padding, ceil_mode):
    layer = nnxp.MaxPool(window, stride=stride, padding=padding, ceil_mode=ceil_mode)
    x = draw(5, 9, 8, 3)
    x[2, 4, 4, 1] = np.nan
    np.testing.assert_array_equal(recorded(layer, x), layer(x))


class Norm(nnxp.Layer):
    gain: np.ndarray | None
    bias: np.ndarray | None

    def __init__(self, size=24, vectors=("gain", "bias")):
        self.gain = draw(size, seed=1) if "gain" in vectors else None
        self.bias = draw(size, seed=2) if "bias" in vectors else None

    def __call__(self, x):
        return kernels.layer_norm(x, self.gain, self.bias)


def test_norms_in_place_agree_with_float64_beside_a_large_offset():
    agrees(Norm(), draw(3, 3000, 24) + 1000)


@pytest.mark.parametrize("size", [1, 3, 16, 100, 384])
@pytest.mark.parametrize("vectors", [(), ("gain",), ("bias",), ("gain", "bias")])
def test_norms_in_place_of_any_size_agree_with_float64(size, vectors):
    agrees(Norm(size, vectors), draw(3, 7, size) * 3 + 2)


def test_norms_in_place_let_through_what_is_no_number():
    x = draw(4, 3, 16)
    x[0, 1, 5], x[1, 2, 7], x[2, 0] = np.nan, np.inf, 1e30
    y = recorded(Norm(16), x)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(np.isnan(y), np.isnan(Norm(16)(x)))


@only_onednn
@pytest.mark.parametrize("size", [3, 16, 384])
def test_the_memory_of_a_norm_is_enough_for_any_number_of_lines(size):
    planned = onednn.layer_norm(size, None, None, 1e-5)
    for lines in (1, 2, 7, 64, 513, 20000):
        needed = planned.scratch + planned.further * lines
        assert needed - 1024 < planned(1, lines).scratch_size <= needed
    x = draw(513, size)
    y, less = np.empty_like(x), np.empty(8, "uint8")
    onednn.normalize(planned, x, y, less)
    np.testing.assert_allclose(y, kernels.layer_norm(x), atol=1e-5)


@only_onednn
def test_norms_and_masks_take_the_threads_that_they_may(monkeypatch):
    threads, run = [], onednn.Plan.__call__

    def noted(plan, *arrays):
        threads.append(onednn.library()[0].threads())
        run(plan, *arrays)

    monkeypatch.setattr(onednn.Plan, "__call__", noted)
    x = draw(6, 50, 24)
    kept, masked, results = x > 0, np.empty_like(x), []
    for count in (1, 2):
        monkeypatch.setattr(onednn, "threads_for", lambda work, count=count: count)
        results.append(onednn.limited_to(3, recorded, Norm(), x))
        onednn.limited_to(3, onednn.masked, x, kept, masked)
        assert threads[-2:] == [count, count]
        np.testing.assert_array_equal(masked, x * kept)
    np.testing.assert_array_equal(*results)


def test_many_gelus_behind_a_product_agree_with_float64(library, monkeypatch):
    by_onednn = []
    noted = lambda y: by_onednn.append(y.shape) or gelu_in_place(y)  # noqa: E731
    monkeypatch.setattr(_finish, "gelu_in_place", noted)
    agrees(nnxp.Dense(20, 96, "gelu", rng=0), draw(3, 300, 20) * 3)
    assert by_onednn == ([(900, 96)] if library == "oneDNN" else [])


@only_onednn
def test_gelu_is_the_same_wherever_a_number_lies_and_for_any_number_of_threads(monkeypatch):
    x = draw(_pieces.PIECE // 4 + onednn.MANY + 3) * 4
    x[5], x[-5:-2] = np.nan, (np.inf, -np.inf, np.nan)
    results = []
    for count, start in (1, 0), (1, 7), (2, 7):
        monkeypatch.setattr(onednn, "threads_for", lambda work, count=count: count)
        threads, run = [], onednn.Plan.__call__

        def noted(plan, *arrays, threads=threads, run=run):
            threads.append(onednn.library()[0].threads())
            run(plan, *arrays)

        y = x[start:].copy()
        with monkeypatch.context() as patch:
            patch.setattr(onednn.Plan, "__call__", noted)
            onednn.limited_to(3, gelu_in_place, y)
        assert threads == [count] * 4  # two passes over two pieces
        results.append(y[7 - start :])
    for y in results[1:]:
        np.testing.assert_array_equal(y, results[0])
    np.testing.assert_array_equal(results[0][-5:-2], [np.inf, 0, np.nan])
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(results[0], kernels.gelu(x[7:]), rtol=2e-5, atol=1e-37)


@only_onednn
def test_gelus_that_are_few_or_apart_are_numpys():
    assert takes(draw(2, onednn.MANY))
    assert not takes(draw(onednn.MANY - 1))
    assert not takes(draw(2, onednn.MANY)[:, ::2])
    assert not takes(draw(2, onednn.MANY).astype("float64"))


class Attention(nnxp.Layer):
    takes = ("float", "float", "float", "any")
    causal: bool
    mask: np.ndarray | None

    def __init__(self, causal=False, mask=None):
        self.causal, self.mask = causal, mask

    def __call__(self, q, k, v, mask=None):
        mask = self.mask if mask is None else mask
        return kernels.attention(q, k, v, mask, causal=self.causal)


@only_onednn
@pytest.mark.parametrize("masked", [False, True])
def test_attention_by_queries_is_what_it_is_by_keys(masked, monkeypatch):
    """NaN and infinity, and queries that may look at no key, included."""
    shape, softmaxes = (3, 2, 96, 8), []
    q, k, v = (draw(*shape, seed=seed) for seed in range(3))
    q[0, 0, 3, 2], k[0, 1, 5], v[1, 0, 7, 1] = np.inf, np.nan, -np.inf
    q[1, 1, 4], k[1, 1, 9] = -np.inf, 0
    arrays = [q, k, v]
    if masked:
        mask = draw(3, 1, 96, 96, seed=3)
        mask[..., 70:], mask[:, :, 20:30] = -np.inf, -np.inf
        arrays.append(mask)
    run = onednn.softmax
    monkeypatch.setattr(onednn, "softmax", lambda x: softmaxes.append(x.shape) or run(x))
    threads, call = set(), onednn.Plan.__call__

    def noted(plan, *operands):
        threads.add(onednn.library()[0].threads())
        call(plan, *operands)

    with monkeypatch.context() as patch:
        patch.setattr(onednn.Plan, "__call__", noted)
        y = onednn.limited_to(3, recorded, Attention(), *arrays)
    assert threads == {1}  # not those that OpenMP would take
    assert softmaxes == [(2, 96, 96)] * 3
    monkeypatch.setattr(onednn, "MANY", 1 << 30)
    expected = recorded(Attention(), *arrays)
    assert len(softmaxes) == 3
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    with np.errstate(all="ignore"):
        reference = kernels.attention.reference(*arrays)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(reference))
    assert not masked or (y[2, :, 20:30] == 0).all()


def test_attention_in_place_agrees_with_float64_for_large_scores_too():
    k, v = draw(3, 4, 9, 8, seed=1), draw(3, 4, 9, 5, seed=2)
    for scale in (1, 1e3):
        agrees(Attention(), draw(3, 4, 7, 8) * np.float32(scale), k, v)


@pytest.mark.parametrize("shape", [(3, 1, 1, 9), (3, 1, 7, 9), (3, 4, 7, 9), (3, 4, 7, 1)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["boolean", "added"])
def test_attention_in_place_looks_where_a_mask_lets_it(shape, causal, kind):
    q, k, v = draw(3, 4, 7, 8), draw(3, 4, 9, 8, seed=1), draw(3, 4, 9, 5, seed=2)
    mask = np.random.default_rng(4).random(shape) < 0.7
    mask[1] = False  # a row that looks nowhere has zeros
    if kind == "added":
        mask = np.where(mask, draw(*shape, seed=5), np.float32(-np.inf)).astype("float32")
        agrees(Attention(causal, mask[0]), q, k, v)
    agrees(Attention(causal), q, k, v, mask)


def test_what_a_mask_hides_may_be_no_number_and_what_it_shows_is_seen():
    q, k, v = draw(3, 2, 7, 8), draw(3, 2, 9, 8, seed=1), draw(3, 2, 9, 5, seed=2)
    for mask in (np.ones((3, 1, 1, 9), bool), np.ones((3, 1, 7, 9), bool)):
        mask[..., 4] = False
        k[0, 0, 4], k[1, 1, 5, 0], k[2, 0, 3, 2] = np.nan, np.nan, np.inf
        for causal in (False, True):
            layer = Attention(causal)
            with np.errstate(all="ignore"):
                expected = layer(q, k, v, mask)
            np.testing.assert_allclose(
                recorded(layer, q, k, v, mask), expected, rtol=1e-5, atol=1e-6
            )
            assert np.isfinite(expected[0]).all()


@pytest.mark.parametrize("options", [{}, {"layers": 2}, {"bidirectional": True}])
@pytest.mark.parametrize(
    "kind",
    [
        nnxp.LSTM, nnxp.GRU, partial(nnxp.GRU, reset_after=False), nnxp.RNN,
        partial(nnxp.RNN, activation="relu"),
    ],
    ids=["LSTM", "GRU", "GRU with the reset before", "RNN", "RNN with relu"],
)  # fmt: skip
def test_recurrences_in_place_agree_with_float64(kind, options):
    def drawn(**more):
        return kind(6, 5, **options, **more).map_arrays(lambda _, v: draw(*v.shape) / 2)

    agrees(drawn(), draw(4, 7, 6) * 4)
    layer, x = drawn(returns="states"), draw(4, 7, 6)
    for made, expected in zip(recorded(layer, x), layer(x), strict=True):
        np.testing.assert_allclose(made, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kernel", "gates"), [("rnn", 1), ("gru", 3), ("lstm", 4)])
def test_recurrences_in_place_begin_at_zero_where_nothing_else_is_given(kernel, gates):
    class Formula(nnxp.Layer):
        weight: Array

        def __init__(self):
            self.weight = draw(3, 3 * gates)

        def __call__(self, x):
            return kernels.KERNELS[kernel](x, self.weight)[0]

    agrees(Formula(), draw(4, 6, 3 * gates))


def joined(formula, *arrays):
    """A formula's program, whose recurrences have their inputs' products."""
    outlines = [((ROWS, *x.shape[1:]), x.dtype) for x in arrays]
    program = bodied(optimized(trace(formula, *outlines)))
    assert {step.name for step in program.bodies} <= {"linear_lstm", "linear_gru"}
    return program


GATED = {"LSTM": {}, "GRU": {}, "GRU with the reset before": {"reset_after": False}}


@only_onednn
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("size", "biased"), [(5, True), (16, False), (40, True)])
@pytest.mark.parametrize("name", GATED)
def test_recurrences_with_the_product_of_their_inputs_agree_with_float64(
    name, size, biased, reverse, started
):
    gates, states = (4, 2) if name == "LSTM" else (3, 1)
    weight_x, weight = draw(6, gates * size) / 2, draw(size, gates * size) / 4
    bias_x, bias = (draw(gates * size, seed=seed) if biased else None for seed in (3, 4))
    own = [None] if name == "LSTM" else [bias]
    first = [draw(9, size, seed=seed) for seed in range(states)] if started else []

    def formula(x, *states):
        part = kernels.linear(x, weight_x, bias_x)
        kernel = kernels.lstm if name == "LSTM" else kernels.gru
        return kernel(part, weight, *own, *states, reverse=reverse, **GATED[name])

    def backwards(x, *states):  # of arrays that do not lie in one piece
        return formula(x[:, ::-1], *(state[::-1] for state in states))

    for x in (draw(9, 7, 6) * 4, draw(7, 9, 6).swapaxes(0, 1), draw(9, 1, 6)):
        for fn in (formula, backwards):
            for i, made in enumerate(recorded(joined(fn, x, *first), x, *first)):
                value, error = error_bound(lambda *a, i=i, fn=fn: fn(*a)[i], x, *first)
                check = compare("", "", "cpu", made, value, error)
                assert check.ok, check.problem


def gated(name, inputs, size, **more):
    """A layer of GATED."""
    return getattr(nnxp, name.split()[0])(inputs, size, rng=0, **GATED[name], **more)


@only_onednn
@pytest.mark.parametrize("name", GATED)
def test_what_is_no_number_goes_through_a_recurrence_in_its_own_row(name):
    net, x = gated(name, 6, 16, returns="states"), draw(5, 4, 6)
    expected = net(x)
    x[1, 2, 3], x[3, 0, 0] = np.nan, np.inf
    with np.errstate(all="ignore"):
        answers = recorded(joined(net, x), x), net(x)
    for made, due, before in zip(*answers, expected, strict=True):
        np.testing.assert_allclose(made, due, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(made[[0, 2, 4]], before[[0, 2, 4]], rtol=1e-5, atol=1e-6)
    assert np.isnan(answers[0][0][1, 2:]).all()
    assert recorded(joined(net, x), x[:0])[0].shape == (0, 4, 16)


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize(("inputs", "size"), [(0, 4), (6, 0)])
def test_recurrences_of_no_inputs_and_of_no_states_are_computed(name, inputs, size):
    gates, kernel = (4, kernels.lstm) if name == "LSTM" else (3, kernels.gru)
    weight_x, bias, weight = (
        draw(inputs, gates * size),
        draw(gates * size),
        draw(size, gates * size),
    )

    class Formula(nnxp.Layer):
        def __call__(self, x):
            return kernel(kernels.linear(x, weight_x, bias), weight, **GATED[name])

    x = draw(5, 3, inputs)
    for answer, expected in zip(nnxp.Engine(Formula(), "cpu")(x), Formula()(x), strict=True):
        np.testing.assert_allclose(answer, expected, rtol=1e-5)


@only_onednn
def test_tiles_do_not_depend_on_where_the_product_of_an_lstm_s_inputs_is_made():
    net = nnxp.LSTM(64, 96, rng=0)
    apart = costs(net.program(((ROWS, 9, 64), np.dtype("float32"))))
    assert 1 < apart.row_lines < 2  # of nine lines at once, and of one after the other
    assert costs(joined(net, draw(2, 9, 64))).row_lines == apart.row_lines


@only_onednn
@pytest.mark.parametrize("name", GATED)
def test_a_recurrence_is_the_same_for_any_number_of_threads(name, monkeypatch):
    net, x = gated(name, 64, 96), draw(37, 9, 64)
    whole = recorded(joined(net, x), x)
    threads, run = [], onednn.Plan.__call__

    def noted(plan, *arrays):
        threads.append(onednn.library()[0].threads())
        if onednn.SCRATCHPAD in plan.operands:
            assert arrays[-1].nbytes >= plan.scratch_size
        run(plan, *arrays)

    monkeypatch.setattr(onednn.Plan, "__call__", noted)
    for count in (1, 2, 64):
        monkeypatch.setattr(onednn, "threads_for", lambda work, count=count: count)
        answer = onednn.limited_to(3, recorded, joined(net, x), x)
        np.testing.assert_array_equal(answer, whole)
        small = joined(gated(name, 1, 1), x[:1, :2, :1])
        onednn.limited_to(3, recorded, small, x[:1, :2, :1])
        assert threads[-1] == count


@only_numpy
def test_what_a_body_in_place_does_not_do_is_left_to_the_reference():
    f = np.dtype("float32")

    def operand(*shape, constant=False):
        return Operand(shape, f, np.zeros(shape, f) if constant else None)

    x, weight = operand(5, 8, 8, 4), operand(3, 3, 4, 6, constant=True)
    assert kernels.conv.in_place_for(x, weight) is not None
    assert kernels.conv.in_place_for(x, operand(3, 3, 4, 6)) is None  # whose weight may change
    assert kernels.conv.in_place_for(x, operand(3, 3, 2, 6, constant=True), groups=2) is None
    half = Operand(x.shape, np.dtype("float16"), None)
    assert kernels.conv.in_place_for(half, weight) is None
    assert kernels.max_pool.in_place_for(operand(5, 8, 4), window=(2,)) is None
    q, groups = operand(3, 2, 5, 4), operand(3, 1, 5, 4)
    assert kernels.attention.in_place_for(q, groups, groups) is None
    wide = Operand((3, 1, 1, 5), np.dtype("float64"), None)
    assert kernels.attention.in_place_for(q, q, q, wide) is None
    assert kernels.lstm.in_place_for(operand(3, 5, 8), operand(2, 8)) is None
    assert kernels.gru.in_place_for(operand(3, 5, 6), operand(2, 6)) is None
    weight = operand(2, 2, constant=True)
    assert kernels.rnn.in_place_for(operand(3, 5, 2), weight) is not None
    assert kernels.rnn.in_place_for(operand(3, 5, 2), weight, activation=kernels.gelu) is None
    assert kernels.rnn.in_place_for(operand(3, 5, 2), weight, None, operand(3)) is None


def test_what_bodies_work_in_is_counted_and_a_limit_is_kept():
    net = nnxp.Sequential(
        nnxp.Conv(3, 96, (3, 3), "relu", padding=1, rng=0),
        nnxp.Conv(96, 96, (3, 3), "gelu", padding=1, rng=0),
        nnxp.MaxPool((2, 2)),
    )
    x = draw(24, 16, 16, 3)
    program = bodied(net.program(x.shape))
    counted = costs(program)
    assert counted.fixed_bytes >= max(body.room(1) for body in program.bodies.values()) > 1 << 18
    for rows in (1, 2, 7, 24, 300):
        recording = Recording(program, rows, [x.dtype])
        assert recording.nbytes <= counted.fixed_bytes + rows * counted.row_bytes
    limit = counted.fixed_bytes + 40 * counted.row_bytes // 10
    engine = nnxp.Engine(net, "numpy", memory_limit=limit)
    plan = engine.plan(x.shape)
    assert plan.working_set <= limit
    assert plan.rows < 24
    np.testing.assert_allclose(engine(x), net(x), rtol=1e-4, atol=1e-5)


def test_rows_that_are_few_and_heavy_are_cut_so_that_workers_end_together():
    net = nnxp.Conv(64, 128, (3, 3), padding=1, rng=0)
    engine = nnxp.Engine(net, "numpy", workers=2)
    plan = engine.plan((8, 14, 14, 64))
    assert (plan.rows, plan.workers) == (4, 2)
    assert engine.plan((1, 14, 14, 64)).workers == 1
    assert engine.plan((100, 14, 14, 64)).rows == 4
    assert engine.plan((8, 56, 56, 64)).rows == 1  # one makes lines enough


# products in blocks


@only_numpy
@pytest.mark.parametrize("lines", [0, 1, 2, 13, 130, 1000])
@pytest.mark.parametrize("shape", [(1, 1), (3, 10), (64, 64), (100, 130), (700, 70), (2, 40, 65)])
def test_products_in_blocks_are_products(monkeypatch, lines, shape):
    """Of contiguous lines, of columns, and of every second line; with stacks of matrices."""
    monkeypatch.setattr(_small, "small_kernels", lambda: True)
    monkeypatch.setattr(_small, "TINY", 1)
    *stack, inputs, outputs = shape
    matrix = draw(*shape)
    weight = _small.Weight(matrix)
    assert weight.lines
    for x in (
        draw(*stack, lines, inputs),
        draw(*stack, inputs, lines).swapaxes(-1, -2),
        draw(*stack, 2 * lines, inputs)[..., ::2, :],
    ):
        out = np.full((*stack, lines, outputs), np.nan, "float32")
        weight(x, out)
        exact = x.astype("float64") @ matrix.astype("float64")
        bound = inputs * np.finfo("float32").eps * (np.abs(x) @ np.abs(matrix))
        assert np.all(np.abs(out - exact) <= bound)


@pytest.mark.parametrize("lines", [1, 2, 300])
def test_a_bias_is_added_whoever_multiplies(lines):
    x, matrix, bias = draw(lines, 200), draw(200, 100), draw(100)
    weight, out = _small.Weight(matrix, bias), np.empty((lines, 100), "float32")
    weight(x, out)
    np.testing.assert_allclose(out, x @ matrix + bias, rtol=1e-4, atol=1e-4)
    out[...] = np.nan
    for call in weight.bound(x, out):
        call()
    np.testing.assert_allclose(out, x @ matrix + bias, rtol=1e-4, atol=1e-4)


@only_numpy
def test_products_that_are_not_cut_are_products_too(monkeypatch):
    monkeypatch.setattr(_small, "small_kernels", lambda: True)
    monkeypatch.setattr(_small, "blas_threads", lambda: 2)
    x, narrow, long = draw(300, 400), draw(400, 200), draw(20_000, 7)
    for factor, matrix, limit in (
        (x, narrow, 0),
        (x, narrow, 1 << 30),
        (long.T[:5], long, 1 << 30),
    ):
        monkeypatch.setattr(_small, "IN_CACHE", limit)
        out = np.empty((len(factor), matrix.shape[1]), "float32")
        _small.Weight(matrix)(factor, out)
        np.testing.assert_array_equal(out, np.dot(factor, matrix))


def test_the_same_rows_have_the_same_bits_whoever_works():
    layer = nnxp.LSTM(20, 96, rng=0)
    x = draw(40, 30, 20)
    one, two = (nnxp.Engine(layer, "numpy", workers=n)(x) for n in (1, 2))
    np.testing.assert_array_equal(one, two)


@only_numpy
def test_the_same_weights_are_laid_out_once_for_all_shapes_of_a_row():
    """Programs for other lengths of a sequence have recordings of their own."""
    if not _small.small_kernels():
        pytest.skip("this BLAS multiplies matrices as a whole")
    numbers = np.random.default_rng(0).normal(size=(128, 192)).astype("float32")
    one, two, other = (_small.Weight(x) for x in (numbers, numbers.copy(), -numbers))
    x, out = draw(50, 128), np.empty((50, 192), "float32")
    for weight in (one, two, other):
        weight(x, out)
    assert one._blocks is two._blocks
    np.testing.assert_array_equal(other._blocks[0][1], -one._blocks[0][1])


# oneDNN


@only_onednn
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 16])
def test_onednn_convolves_over_up_to_three_axes_in_any_groups(axes, groups):
    layer = nnxp.Conv(
        16, 32, (3, 2, 2)[:axes], "relu", stride=(1, 2, 1)[:axes], groups=groups, rng=0,
        padding=((2, 0), (0, 1), (1, 1))[:axes], dilation=(2, 1, 1)[:axes],
    )  # fmt: skip
    layer = layer.with_parameters({"weight": layer.weight, "bias": draw(32)})
    assert kernels.conv.in_place_for(
        Operand((5, *(9, 8, 7)[:axes], 16), np.dtype("float32"), None),
        *(Operand(x.shape, x.dtype, x) for x in (layer.weight, layer.bias)),
        groups=groups,
    )
    for rows in (5, 1, 0):
        x = draw(rows, *(9, 8, 7)[:axes], 16)
        agrees(layer, x) if rows else recorded(layer, x)


@only_onednn
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("order", ["outputs first", "backwards", "repeated", "apart"])
def test_weights_are_not_copied_for_onednn_where_they_are_in_one_piece(monkeypatch, order, groups):
    weight = {
        "outputs first": draw(8, 6, 3, 3).transpose(2, 3, 1, 0),
        "backwards": draw(3, 3, 6, 8)[..., ::-1],
        "repeated": np.broadcast_to(draw(3, 3, 1, 8), (3, 3, 6, 8)),
        "apart": draw(3, 3, 6, 16)[..., ::2],
    }[order]
    known = _pieces.ByContent(onednn.Constant)
    monkeypatch.setattr(onednn, "constants", known)
    x = draw(4, 9, 7, 6 * groups)
    operands = (Operand(array.shape, array.dtype, array) for array in (weight, draw(8)))
    body = kernels.conv.in_place_for(Operand(x.shape, x.dtype, None), *operands, groups=groups)
    y = np.full((4, 7, 5, 8), np.nan, "float32")
    body.run(y, np.empty(body.room(4), "uint8"), x)
    np.testing.assert_allclose(
        y, kernels.conv(x, weight, draw(8), groups=groups), rtol=1e-4, atol=1e-4
    )
    (constant,) = known._known.values()
    assert np.shares_memory(constant.numbers, weight) == (order == "outputs first")


@only_onednn
@pytest.mark.parametrize("space", [(9, 1), (1, 9), (1, 1)])
def test_axes_of_one_element_are_left_out_for_onednn(space):
    window = tuple(min(n, 3) for n in space)
    agrees(nnxp.Conv(6, 16, window, "relu", rng=0), draw(4, *space, 6))
    agrees(nnxp.Conv(6, 16, window, padding=1, rng=0), draw(4, *space, 6))


@only_onednn
def test_convolutions_are_bound_to_their_arrays_which_stay():
    conv = partial(nnxp.Conv, 8, 8, (3, 3), padding=1)
    net = nnxp.Sequential(conv(rng=0), conv(rng=1, groups=8), conv("relu", rng=2), conv(rng=3))
    x, y = draw(2, 9, 9, 8), np.full((2, 9, 9, 8), np.nan, "float32")  # too many to be copied
    recording = Recording(net.program((x.shape, x.dtype)), 2, [x.dtype])
    others = [np.full_like(y, np.nan) for _ in range(50)]
    recording([x], [y])
    assert np.isnan(others).all()  # nobody has got its memory
    np.testing.assert_allclose(y, net(x), rtol=1e-4, atol=1e-4)
    calls = [line for line in recording.text.splitlines() if line.endswith("()")]
    assert len(calls) == 3  # with a relu; the first and the last have the caller's arrays


@only_onednn
def test_what_is_bound_runs_in_as_many_threads_as_there_are_then(monkeypatch):
    conv = partial(nnxp.Conv, 32, 32, (3, 3), "relu", padding=1)
    net = nnxp.Sequential(conv(rng=0), conv(rng=1), conv(rng=2))
    x, threads = draw(2, 24, 24, 32), []
    planned = onednn.Planned.__call__

    def noting(self, count, *key):
        threads.append(count)
        return planned(self, count, *key)

    monkeypatch.setattr(onednn.Planned, "__call__", noting)
    recording = Recording(net.program((x.shape, x.dtype)), 2, [x.dtype])
    assert not threads
    for count in (2, 1, 2, 1):
        monkeypatch.setattr(onednn, "blas_threads", lambda count=count: count)
        np.testing.assert_allclose(recording.answer(x), net(x), rtol=1e-4, atol=1e-4)
    # the one between the others asks once; they have the caller's arrays, other ones at each call
    assert (threads.count(1), threads.count(2)) == (2 * 2 + 1, 2 * 2 + 1)


@only_onednn
def test_no_number_goes_through_onednn_and_relu():
    layer = nnxp.Conv(8, 8, (3, 3), "relu", rng=0)
    x = draw(2, 9, 9, 8)
    x[0, 3, 3, 2], x[1, 4, 4, 1], x[1, 8, 8, 0] = np.nan, np.inf, -np.inf
    with np.errstate(all="ignore"):
        expected = layer(x)
    np.testing.assert_array_equal(np.isnan(recorded(layer, x)), np.isnan(expected))
    np.testing.assert_array_equal(np.isinf(recorded(layer, x)), np.isinf(expected))


@only_onednn
def test_products_by_onednn_are_products_however_matrices_lie():
    def check(x, matrix, out, multiply, bias=0):
        out[...] = np.nan
        multiply(x, matrix, out)
        exact = x.astype("float64") @ matrix.astype("float64") + bias
        sizes = np.abs(x) @ np.abs(matrix) + np.abs(bias)
        bound = (x.shape[1] + 1) * np.finfo("float32").eps * sizes
        assert np.all(np.abs(out - exact) <= bound)

    for lines, inner, columns in ((2, 300, 70), (130, 65, 33), (1000, 64, 10), (64, 1, 64)):
        x, matrix = draw(lines, inner), draw(inner, columns)
        out = np.empty((lines, columns), "float32")
        wide = np.empty((lines, 2 * columns), "float32")
        lefts = (
            x, draw(inner, lines).T, draw(2 * lines, inner)[::2], draw(lines, 2 * inner)[:, ::2],
            x[::-1], np.broadcast_to(x[0], x.shape),
            sliding_window_view(draw(lines + inner - 1), inner),
        )  # fmt: skip
        rights = matrix, draw(columns, inner).T, draw(inner, 3 * columns)[:, 5 : 5 + columns]
        for left, right in product(lefts, rights):
            check(left, right, out, onednn.multiply)
            check(left, right, wide[:, :columns], onednn.multiply)
            for bias in (
                draw(columns),
                draw(2 * columns)[::2],
                np.broadcast_to(left[0, 0], columns),
            ):
                check(left, right, out, partial(onednn.multiply, bias=bias), bias)
            weight = _small.Weight(right)
            check(left, right, out, lambda x, _, out, weight=weight: weight(x, out))
            (bound,) = weight.bound(left, out)
            check(left, right, out, lambda *_, bound=bound: bound())


@only_onednn
def test_onednn_does_not_round_factors_where_a_variable_says_it_may():
    code = """
import numpy as np
from nnxp.kernels.cpu import onednn
x = np.random.default_rng(0).standard_normal((256, 512), "float32")
y = np.random.default_rng(1).standard_normal((512, 256), "float32")
out = np.empty((256, 256), "float32")
onednn.multiply(x, y, out)
exact = x.astype("float64") @ y.astype("float64")
assert np.all(np.abs(out - exact) <= 512 * np.finfo("float32").eps * (np.abs(x) @ np.abs(y)))
"""
    allowed = os.environ | {
        "ONEDNN_DEFAULT_FPMATH_MODE": "BF16",
        "DNNL_DEFAULT_FPMATH_MODE": "BF16",
    }
    assert subprocess.run([sys.executable, "-c", code], timeout=60, env=allowed).returncode == 0


@only_onednn
def test_a_product_goes_on_when_who_made_it_is_gone():
    x, matrix, out = draw(64, 200), draw(200, 100), np.empty((64, 100), "float32")
    (multiply,) = _small.Weight(matrix).bound(x, out)
    gc.collect()
    spoilt = [np.full((200, 100), np.nan, "float32") for _ in range(50)]
    multiply()
    np.testing.assert_allclose(out, x @ matrix, rtol=1e-4, atol=1e-4)
    assert len(spoilt) == 50


@only_onednn
def test_the_same_plan_multiplies_other_arrays():
    matrix = draw(128, 96)
    weight = _small.Weight(matrix)
    for seed in range(3):
        x, outs = draw(64, 128, seed=seed), [np.empty((64, 96), "float32") for _ in range(2)]
        weight(x, outs[0])
        onednn.multiply(x, matrix, outs[1])
        for out in outs:
            np.testing.assert_allclose(out, x @ matrix, rtol=1e-4, atol=1e-4)


@only_onednn
def test_weights_that_are_the_same_are_laid_out_once():
    matrix = draw(128, 192)
    constants = [
        onednn.constants.of(x, x.shape, (192, 1)) for x in (matrix, matrix.copy(), -matrix)
    ]
    assert constants[0] is constants[1] is not constants[2]


@only_onednn
def test_a_forked_child_multiplies_in_its_own_thread():
    """OpenMP's threads are those of the parent: a child that called them would wait for ever."""
    code = """
import os, sys
import numpy as np
from nnxp.kernels.cpu import onednn
x = np.ones((512, 512), "float32")
out = np.empty_like(x)
def check():
    onednn.sharing_threads(True, onednn.multiply, x, x, out)
    assert (out == 512).all()
check()
child = os.fork()
if not child:
    check()
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    if not hasattr(os, "fork"):
        pytest.skip("nothing forks here")
    done = subprocess.run(
        [sys.executable, "-c", code], timeout=60, env=os.environ | {"OPENBLAS_NUM_THREADS": "2"}
    )
    assert done.returncode == 0


@only_onednn
@pytest.mark.skipif(platform.machine() != "x86_64", reason="sets of instructions of x86-64")
@pytest.mark.parametrize(("instructions", "used"), [("SSE41", False), ("AVX", True)])
def test_onednn_is_not_used_without_avx(instructions, used):
    """Its pools ended the process with arrays that begin anywhere, and its GRUs in a child."""
    code = "from nnxp.kernels.cpu import onednn; print(onednn.why_not())"
    limited = os.environ | {"ONEDNN_MAX_CPU_ISA": instructions}
    done = subprocess.run(
        [sys.executable, "-c", code], timeout=60, env=limited, capture_output=True, text=True
    )
    assert (done.stdout.strip() == "None") is used
    assert used or "AVX" in done.stdout


@only_onednn
def test_a_child_that_is_forked_while_a_thread_plans_may_plan():
    """Whoever holds a lock at a fork never lets it go in the child."""
    code = """
import os, signal, sys, threading, time
import numpy as np
from nnxp.kernels.cpu import onednn
matrix, x = np.ones((64, 96), "float32"), np.ones((256, 64), "float32")
plans, out = onednn.product(matrix, None), np.empty((256, 96), "float32")
planning, change = threading.Event(), onednn._change
def slowly(*layouts):
    planning.set()
    time.sleep(0.5)
    return change(*layouts)
onednn._change = slowly
def run():
    plans(1, x.shape, x.strides, out.strides)(x, out)
thread = threading.Thread(target=run)
thread.start()
planning.wait()
child = os.fork()
if not child:
    signal.alarm(20)
    run()
    os._exit(0 if (out == 64).all() else 1)
thread.join()
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    if not hasattr(os, "fork"):
        pytest.skip("nothing forks here")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], timeout=60)
    assert done.returncode == 0


def reloaded(monkeypatch, installed=None):
    """Why there is no oneDNN, asked anew."""
    load = getattr(onednn._loaded, "__wrapped__", onednn._loaded)
    monkeypatch.setattr(onednn, "_loaded", load)  # without what is remembered
    monkeypatch.setattr(onednn, "_installed", lambda: installed)
    return onednn.library()[1]


@only_numpy
def test_why_there_is_no_onednn_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(onednn, "FILE", "libdnnl-of-nobody.so.3")
    assert reloaded(monkeypatch) == "onednn-cpu-gomp is not installed"
    broken = tmp_path / "libdnnl.so.3"
    broken.write_bytes(b"no library")
    assert str(broken) in reloaded(monkeypatch, str(broken))
    other = Path(np.linalg._umath_linalg.__file__)
    assert "dnnl_version" in reloaded(monkeypatch, str(other))


@only_onednn
@pytest.mark.parametrize("last", ["identity", "relu"])
def test_a_bias_is_added_by_the_product(last):
    layer, x = nnxp.Dense(64, 64, last, rng=0), draw(300, 64)
    layer = layer.with_parameters({"weight": layer.weight, "bias": draw(64)})
    program = layer.program(x.shape)
    assert "add" in [step.name for step in bodied(program).steps]
    lines = Recording(program, len(x), [x.dtype])
    calls = lines.text.split(" except")[0].count("\n  c")
    assert calls == (1 if last == "identity" else 2), lines.text
    value, error = error_bound(layer, x)
    assert np.all(np.abs(lines.answer(x) - value) <= 6 * error)


@only_onednn
@pytest.mark.parametrize("size", [(1,), (300, 70), (1000, 1000)])
def test_numbers_are_masked_as_numpy_multiplies_them(size):
    x, mask = draw(*size), draw(*size, seed=1) > 0
    x.flat[:: max(1, x.size // 9)] = np.nan
    x.flat[3 :: max(4, x.size // 7)] = -np.inf
    for left, right, out in (
        (x, mask, np.empty_like(x)), (x.copy(), mask, None), (x.T, mask.T, np.empty_like(x.T)),
        (x, mask, np.empty((*size[:-1], 2 * size[-1]), "float32")[..., ::2]),
    ):  # fmt: skip
        with np.errstate(invalid="ignore"):
            expected = np.multiply(left, right)
            out = left if out is None else out
            onednn.masked(left, right, out)
        np.testing.assert_array_equal(out, expected)
        np.testing.assert_array_equal(np.signbit(out), np.signbit(expected))


@only_onednn
@pytest.mark.parametrize("threads", [1, 2])
def test_numbers_are_added_as_numpy_adds_them(monkeypatch, threads):
    monkeypatch.setattr(onednn, "blas_threads", lambda: threads)
    x, y = draw(300, 100), draw(300, 100, seed=1)
    x[0, 0], x[0, 1], x[0, 2], y[0, 2] = np.nan, np.inf, np.inf, -np.inf
    for left, right, out in (
        (x, y, np.empty_like(x)), (x.copy(), y, None), (x.T, y.T, np.empty_like(x.T)),
        (x, x, np.empty((300, 200), "float32")[:, ::2]),
    ):  # fmt: skip
        with np.errstate(invalid="ignore"):
            expected = left + right
            out = left if out is None else out
            onednn.sharing_threads(True, onednn.add, left, right, out)
        np.testing.assert_array_equal(out, expected)


@only_onednn
def test_sums_of_many_numbers_are_shared(monkeypatch):
    class Twice(nnxp.Layer):
        def __call__(self, x):
            y = kernels.tanh(x)
            return y + x, y + 1, y + y[:, :1]

    seen = []
    monkeypatch.setattr(onednn, "add", lambda x, y, out: seen.append(x.shape) or np.add(x, y, out))
    for x in (draw(300, 100), draw(3, 100), draw(300, 100).astype("float64")):
        recording = Recording(Twice().program((x.shape, x.dtype)), len(x), [x.dtype])
        for answer, expected in zip(recording.answer(x), Twice()(x), strict=True):
            np.testing.assert_allclose(answer, expected, rtol=1e-6)
    assert seen == [(300, 100)]


def unevenly(x):
    """The same numbers, five bytes apart."""
    wide = np.zeros(x.shape, [("number", x.dtype), ("more", "uint8")])
    wide["number"] = x
    return wide["number"]


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64"])
def test_numbers_are_copied_however_they_lie(dtype):
    x = (100 * draw(4, 3, 50, 60)).astype(dtype)
    if dtype == "float32":
        x[0, 0, 0, :3] = np.nan, np.inf, -0.0
    many = x[0, 0, :48].reshape(2, 2, 2, 2, 3, 60)
    for some in (
        x, x.transpose(0, 2, 3, 1), x.transpose(3, 2, 1, 0), x[..., ::2].transpose(0, 2, 3, 1),
        x[:, :, ::-1].transpose(0, 2, 3, 1), np.broadcast_to(x[:1], x.shape).transpose(0, 2, 3, 1),
        sliding_window_view(x, (3, 3), (2, 3)).transpose(0, 2, 3, 4, 5, 1), unevenly(x).T,
        x.reshape(4, 3, 2, 25, 2, 30).swapaxes(2, 3), x[:, :, :2, :2].transpose(0, 2, 3, 1),
        many.reshape(2, 2, 2, 2, 3, 1, 1, 1, 2, 2, 3, 5)[..., None].swapaxes(0, 11), x[:0].T,
    ):  # fmt: skip
        wide = np.zeros((*some.shape[:-1], 2 * some.shape[-1]), dtype)
        for out in (
            np.empty_like(some, order="C"),
            np.zeros(some.shape, dtype).T.T,
            wide[..., ::2],
        ):
            onednn.copy(some, out)
            np.testing.assert_array_equal(out, some)
            np.testing.assert_array_equal(np.signbit(out), np.signbit(some))
        assert not wide[..., 1::2].any()


@only_onednn
def test_channels_are_put_last_by_onednn(monkeypatch):
    monkeypatch.setattr(_pieces, "copy", None)
    x = draw(2, 3, 70, 60)
    out = np.empty((2, 70, 60, 3), "float32")
    onednn.copy(np.moveaxis(x, 1, -1), out)
    np.testing.assert_array_equal(out, np.moveaxis(x, 1, -1))


MEANS = [
    ((2, 2), {}), ((3, 3), {"stride": 2, "padding": 1}), ((3,), {"stride": 1, "padding": "same"}),
    ((3, 2), {"stride": (2, 3), "padding": ((2, 0), (0, 1)), "count_include_pad": True}),
    ((3, 3), {"stride": 2, "ceil_mode": True}), ((2, 1, 3), {"stride": 1}), ((5, 5), {"stride": 1}),
]  # fmt: skip


@only_onednn
@pytest.mark.parametrize(("window", "options"), MEANS, ids=str)
def test_means_of_windows_agree_with_float64(window, options):
    x = draw(7, *(11, 9, 5)[: len(window)], 19)
    layer = nnxp.AveragePool(window, **options)
    agrees(layer, x)
    agrees(layer, np.moveaxis(np.moveaxis(x, -1, 1).copy(), 1, -1))
    assert recorded(layer, x[:0]).shape[0] == 0
    x[0, 3], x[1, 4], x[2, 5], x[2, 6] = np.nan, np.inf, -np.inf, np.inf
    with np.errstate(all="ignore"):
        expected = layer(x)
    answer = recorded(layer, x)
    np.testing.assert_array_equal(np.isnan(answer), np.isnan(expected))
    np.testing.assert_array_equal(answer[np.isinf(expected)], expected[np.isinf(expected)])


@only_onednn
def test_means_that_onednn_does_not_know_are_left_to_numpy():
    operand = Operand((3, 12, 12, 8), np.dtype("float32"), None)
    mean = partial(kernels.average_pool.in_place_for, window=(3, 3))
    assert mean(operand, stride=2, ceil_mode=True)
    assert mean(operand, stride=2, ceil_mode=True, count_include_pad=True) is None
    assert mean(operand, dilation=2) is None
    assert mean(operand._replace(dtype=np.dtype("float64"))) is None


@only_onednn
def test_a_pool_runs_in_as_many_threads_as_it_may(monkeypatch):
    monkeypatch.setattr(onednn, "blas_threads", lambda: 2)
    before, seen = onednn.library()[0].threads(), []
    call = onednn.Plan.__call__

    def noting(plan, *arrays):
        seen.append(onednn.library()[0].threads())
        call(plan, *arrays)

    monkeypatch.setattr(onednn.Plan, "__call__", noting)
    x, y = draw(4, 64, 64, 8), np.empty((4, 32, 32, 8), "float32")
    body = kernels.average_pool.in_place_for(Operand(x.shape, x.dtype, None), window=(2, 2))
    scratch = np.empty(body.room(4), "uint8")
    body.run(y, scratch, x)
    onednn.sharing_threads(True, body.run, y, scratch, x)
    onednn.sharing_threads(True, body.run, y[:1], scratch, x[:1, :32, :32])
    assert seen == [1, 2, 1]
    assert onednn.library()[0].threads() == before


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rows", [3, 64, 1000])
@pytest.mark.parametrize("columns", [1, 2, 10, 17])
def test_short_rows_are_summed(rows, columns, dtype):
    class Sums(nnxp.Layer):
        def __call__(self, x):
            return x.sum(axis=1), x.sum(axis=1, keepdims=True)

    x = draw(rows, columns).astype(dtype)
    x[1, 0], x[2, 0] = np.nan, np.inf
    program = Sums().program((x.shape, x.dtype))
    flat, kept = Recording(program, rows, [x.dtype]).answer(x)
    exact = x.astype("longdouble").sum(axis=1)
    np.testing.assert_allclose(flat, exact, rtol=0, atol=20 * np.finfo(dtype).eps)
    np.testing.assert_array_equal(kept[:, 0], flat)


@only_onednn
def test_onednn_with_threads_of_another_kind_is_not_used(monkeypatch):
    monkeypatch.setattr(onednn, "OPENMP", -1)
    assert "threads that cannot be limited" in reloaded(monkeypatch, onednn._installed())


@only_onednn
def test_threads_are_shared_only_while_blas_has_one(monkeypatch):
    monkeypatch.setattr(onednn, "blas_threads", lambda: 2)
    seen = []
    monkeypatch.setattr(onednn, "one_blas_thread", lambda: seen.append("entered") or nullcontext())
    many = 1 << 40
    assert onednn.threads_for(many) == 1
    assert onednn.sharing_threads(True, onednn.threads_for, many) == 2
    assert onednn.sharing_threads(True, onednn.threads_for, 1) == 1
    assert onednn.threads_for(many) == 1
    assert seen == ["entered"] * 2
    assert onednn.sharing_threads(False, onednn.threads_for, many) == 2
    assert seen == ["entered"] * 2
    with pytest.raises(ZeroDivisionError):
        onednn.sharing_threads(True, lambda: 1 // 0)
    assert onednn.threads_for(many) == 1
    monkeypatch.setattr(onednn, "_forked", True)
    assert onednn.sharing_threads(True, onednn.threads_for, many) == 1


@pytest.mark.parametrize("rows", [1, 16, 64])
def test_a_product_of_one_array_after_the_other_is_that_of_each(monkeypatch, rows):
    monkeypatch.setattr(onednn, "blas_threads", lambda: 2)
    weight, out = _small.Weight(draw(256, 192), draw(192)), np.empty((rows, 192), "float32")
    multiply, expected = weight.into(out), np.empty_like(out)
    x, other, frozen = draw(rows, 256), draw(rows, 256, seed=1), draw(rows, 256, seed=2)
    frozen.flags.writeable = False
    apart = draw(rows, 512)[:, ::2], draw(rows, 512)[:, :256], draw(256, rows).T
    for array in (x, other, x, frozen, *apart, x, draw(rows, 256, seed=3)):
        weight(array, expected)
        multiply(array)
        np.testing.assert_array_equal(out, expected)
        onednn.sharing_threads(True, weight, array, expected)
        onednn.sharing_threads(True, multiply, array)
        np.testing.assert_array_equal(out, expected)


def test_the_limit_of_others_is_none_of_this_threads():
    before = blas_threads()
    with ThreadPoolExecutor(1) as pool, one_blas_thread():
        assert blas_threads() == 1
        assert pool.submit(blas_threads).result() == before
    assert blas_threads() == before


@only_onednn
def test_what_onednn_refuses_to_run_is_an_error():
    dnnl = onednn.library()[0]
    plan = onednn._change(onednn.outline((2, 3), (3, 1)), onednn.outline((2, 3), (1, 2)))
    with pytest.raises(onednn.OneDNNError, match="dnnl_primitive_execute answered status"):
        dnnl.dnnl_primitive_execute(plan.primitive._as_parameter_, dnnl.stream, 0, None)


@only_onednn
def test_products_that_are_worth_several_threads_share_them(monkeypatch):
    entered = []

    def sharing(blas, run, *arrays):
        entered.append(blas)
        return run(*arrays)

    monkeypatch.setattr(onednn, "sharing_threads", sharing)
    small, large = nnxp.Dense(8, 8, rng=0), nnxp.Dense(512, 512, rng=0)
    pictures = nnxp.Conv(64, 64, (3, 3), rng=0)
    both = nnxp.Sequential(large, nnxp.Dense(512, 16, rng=0))  # of which BLAS makes the second
    for layer, x, shares in (
        (small, draw(4, 8), []), (large, draw(4, 512), []), (large, draw(5, 512), [False]),
        (large, draw(64, 512), [False]), (large, draw(2, 32, 512), [True]),
        (both, draw(16, 512), [False]), (both, draw(48, 512), [True]),
        (pictures, draw(2, 5, 5, 64), []), (pictures, draw(2, 40, 40, 64), [True]),
        (large, draw(64, 512).astype("float64"), []),
    ):  # fmt: skip
        entered.clear()
        program = layer.astype(x.dtype.name).program((x.shape, x.dtype))
        Recording(program, len(x), [x.dtype]).answer(x)
        assert entered == shares, (layer, x.shape)


# gradients, and weights that change


def run_in_place(kernel, *arrays, **options):
    """What the body in place makes of arrays none of which is constant, and that it is right."""
    body = kernel.in_place_for(*(Operand(x.shape, x.dtype, None) for x in arrays), **options)
    assert body is not None
    value, error = error_bound(partial(kernel, **options), *arrays)
    out = np.full(value.shape, np.nan, "float32")
    for _ in range(2):
        body.run(out, np.empty(body.room(len(arrays[0])), "uint8"), *arrays)
        check = compare(kernel.__name__, "", "cpu", out, value, error)
        assert check.ok, f"{options}: {check.problem}"
    return out


CHANGING = [
    ((3, 3), 1, 1, {"padding": 1}),
    ((3, 2), 1, 1, {"stride": (2, 3), "padding": ((2, 0), (0, 1)), "dilation": (1, 2)}),
    ((3, 3), 4, 1, {"padding": "same"}),
    ((3, 3), 8, 8, {"stride": 2, "padding": 1}),
    ((1, 1), 1, 1, {"stride": 2}),
    ((4,), 2, 2, {"padding": 3}),
    ((2, 1, 3), 1, 1, {}),
]


@only_onednn
@pytest.mark.parametrize(("window", "groups", "per", "options"), CHANGING, ids=str)
def test_convolutions_whose_weights_change_and_their_gradients(window, groups, per, options):
    space = (11, 9, 5)[: len(window)]
    x, weight, bias = draw(7, *space, 8), draw(*window, 8 // groups, 16), draw(16, seed=1)
    for activation in (kernels.identity, kernels.relu):
        how = options | {"groups": groups, "activation": activation}
        y = run_in_place(kernels.conv, x, weight, bias, **how)
        run_in_place(kernels.conv, x, weight[::-1], **how)
    dy = draw(*y.shape, seed=2)
    how = options | {"window": window, "groups": groups}
    run_in_place(kernels.conv_weight_gradient, x, dy, **how)
    run_in_place(kernels.conv_weight_gradient, x[::-1], np.asfortranarray(dy), **how)
    run_in_place(kernels.conv_weight_gradient, x[:0], dy[:0], **how)


@only_onednn
def test_weights_that_change_are_those_of_their_thread(monkeypatch):
    """In threads of oneDNN's, and in several callers at once."""
    monkeypatch.setattr(onednn, "ALSO_SHARED", 1)
    x, dy = draw(33, 12, 12, 16), draw(33, 12, 12, 24, seed=1)
    operands = [Operand(a.shape, a.dtype, None) for a in (x, draw(3, 3, 16, 24))]
    body = kernels.conv.in_place_for(*operands, padding=1)
    back = kernels.conv_weight_gradient.in_place_for(
        operands[0], Operand(dy.shape, dy.dtype, None), window=(3, 3), padding=1
    )

    def both(seed):
        weight = draw(3, 3, 16, 24, seed=seed)
        y, dw = np.empty_like(dy), np.empty_like(weight)
        for _ in range(10):
            run = partial(onednn.sharing_threads, True) if seed % 2 else lambda f, *args: f(*args)
            run(body.run, y, np.empty(body.room(33), "uint8"), x, weight)
            run(back.run, dw, np.empty(back.room(33), "uint8"), x, dy * np.float32(seed + 1))
        return weight, y, dw

    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(both, range(4)))
    whole = kernels.conv_weight_gradient(x, dy, window=(3, 3), padding=1)
    for seed, (weight, y, dw) in enumerate(made):
        wanted = kernels.conv(x, weight, padding=1)
        np.testing.assert_allclose(y, wanted, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(dw, whole * (seed + 1), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("window", [(2, 2), (3, 2), (1, 3), (1, 1)])
@pytest.mark.parametrize("pictures", [1, 1 << 20])
def test_the_gradient_of_a_max_pool_in_place_is_that_of_its_formula(monkeypatch, window, pictures):
    """Bit by bit: also of equals, of what no window sees, and of what is no number."""
    monkeypatch.setattr(pool, "PICTURES", pictures)
    x = np.random.default_rng(0).integers(0, 3, (5, 9, 8, 6)).astype("float32")
    x[1, 2, 3] = np.nan
    dy = draw(5, 9 // window[0], 8 // window[1], 6)
    dy[2, 1, 1] = np.inf
    operands = [Operand(a.shape, a.dtype, None) for a in (dy, x)]
    body = kernels.max_pool_gradient.in_place_for(*operands, window=window)
    out = np.full_like(x, np.nan)
    with np.errstate(all="ignore"):
        body.run(out, np.empty(body.room(5), "uint8"), dy, x)
        np.testing.assert_array_equal(out, kernels.max_pool_gradient(dy, x, window=window))
    for more in ({"stride": 1}, {"padding": 1}, {"dilation": 2}):
        assert kernels.max_pool_gradient.in_place_for(*operands, window=(4, 4), **more) is None


@only_onednn
def test_a_training_step_runs_convolutions_and_pools_by_bodies_in_place():
    conv_layer = nnxp.Conv(2, 4, (3, 3), "relu", padding=1, rng=0)
    model = nnxp.Sequential(conv_layer, nnxp.MaxPool((2, 2)), nnxp.Conv(4, 4, (3, 3), rng=0))
    given = draw(8, 9, 8, 2), draw(8, 2, 2, 4)
    written = write_out(loss_of, model, given, lambda name: True)
    names = [step.name for step in written.bodied.bodies]
    assert names.count("conv") == 3  # the gradient by x of the second one is a convolution
    assert names.count("conv_weight_gradient") == 2
    assert names.count("max_pool_gradient") == 1
    order = [step.name for step in written.program.steps]
    assert order.index("max_pool") < order.index("relu")


def loss_of(model, x, y):
    return ((model(x) - y) ** 2).mean()


@pytest.mark.parametrize(
    ("channels", "outputs", "size", "order"),
    [(256, 512, 8, (0, 1, 2, 3)), (64, 8, 64, (0, 2, 3, 1))],
)
def test_a_training_step_takes_the_memory_that_it_says(channels, outputs, size, order):
    """Where weights are laid out anew, and where pictures are copied to lie in one piece."""

    def loss(model, x):
        return (model(x.transpose(order)) ** 2).mean()

    layer = nnxp.Conv(channels, outputs, (3, 3), stride=2, padding=1, rng=0)
    shape = [4, 0, 0, 0]
    for at, n in zip(order, (4, size, size, channels), strict=True):
        shape[at] = n
    x = draw(*shape)
    written = write_out(loss, layer, (x,), lambda name: True)
    assert written.bodied.bodies or onednn.why_not() is not None
    parameters = [layer.parameters()[name] for name in written.inputs]
    gradients = [np.empty_like(parameters[written.inputs.index(n)]) for n in written.learned]
    tracemalloc.start()
    try:
        runner = LossRunner(written, "cpu")
        runner(parameters, [x], None, gradients)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1.05 * written.working_set + (400 << 10)  # Python's objects, and a plan's own


@pytest.mark.parametrize("groups", [1, 2])
def test_no_channels_have_gradients_of_none(groups):
    def run(x, weight):
        return kernels.max_pool(kernels.conv(x, weight, groups=groups), window=(2, 2))

    x, weight = draw(2, 6, 6, 0), draw(3, 3, 0, 4)
    y, back = nnxp.vjp(run, x, weight)
    dx, dw = back(np.ones_like(y))
    assert (dx.shape, dw.shape) == (x.shape, weight.shape)
    pooled, back = nnxp.vjp(partial(kernels.max_pool, window=(2, 2)), x)
    assert back(pooled).shape == x.shape
    assert nnxp.Engine(nnxp.MaxPool((2, 2)), "cpu")(x).shape == (2, 3, 3, 0)


class OfWeight(nnxp.Layer):
    """A convolution by a weight that lies as it is given."""

    weight: Array

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, x):
        return kernels.conv(x, self.weight)


@pytest.mark.parametrize("strides", [(8, 4, 8), (4, 4, 4), (0, 0, 0), (-8, 4, -4)])
def test_constant_weights_may_lie_in_any_way_in_memory(strides):
    """Their elements may overlap, also so that they span as much as they hold."""
    memory = draw(64)[32:]
    weight = np.lib.stride_tricks.as_strided(memory, (3, 1, 3), strides)
    layer, x = OfWeight(weight), draw(2, 9, 1)
    np.testing.assert_allclose(recorded(layer, x), layer(x), rtol=1e-5, atol=1e-5)


@only_onednn
@pytest.mark.parametrize("kind", ["lstm", "gru", "lbr_gru"])
@pytest.mark.parametrize(("inputs", "size", "time"), [(2, 3, 5), (20, 20, 20), (64, 48, 12)])
def test_the_memory_of_a_recurrence_is_told_for_any_number_of_rows(kind, inputs, size, time):
    gates = len(recurrent.GATES[kind])
    inner, outer = draw(inputs, gates, size), draw(size, gates, size)
    bias = draw(gates + (kind == "lbr_gru"), size)
    planned = onednn.recurrence(kind, inner, outer, bias, time, begun=False, reverse=False)
    for rows in (1, 2, 17, 65, 257, 1000, 30_000):
        wanted = planned(1, rows).scratch_size
        assert wanted <= planned.scratch + (rows - 1) * planned.further <= 1.4 * wanted
