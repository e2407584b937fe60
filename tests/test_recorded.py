"""What a program must know of memory: which reshapes are copies, and where constants live."""

from __future__ import annotations

import tracemalloc
from contextvars import ContextVar
from itertools import pairwise, product

import numpy as np
import pytest

import nnxp
from conftest import draw
from nnxp import Activation, BatchNorm, Dense, LayerNorm, Residual, Sequential, kernels
from nnxp._arrays import Array, xp_of
from nnxp.kernels.cpu import _small, onednn
from nnxp.program import recordings
from nnxp.program.program import trace
from nnxp.program.recording import Recording, bodied, costs


class Turned(nnxp.Layer):
    """Each row, seen as (2, 3), turned over."""

    def __call__(self, x):
        return x.reshape(len(x), 2, 3).transpose(0, 2, 1).reshape(len(x), 6)


class Numbered(nnxp.Layer):
    """y = x * (0, 1, 2, ...)"""

    def __call__(self, x):
        return x * xp_of(x).arange(x.shape[1], dtype="float32")


def test_a_reshape_of_what_does_not_lie_in_order_is_computed_at_every_call():
    net = nnxp.Sequential(nnxp.Dense(5, 6, "tanh", rng=0), Turned(), nnxp.Dense(6, 2, rng=1))
    recording = Recording(net.program((1, 5)), 4, [np.dtype("float32")])
    for seed in range(3):
        x, y = draw((4, 5), seed=seed), np.empty((4, 2), "float32")
        recording([x], [y])
        np.testing.assert_allclose(y, net(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [63, 64, 1024, 2500])
@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("name", ["max", "min"])
def test_the_largest_of_few_columns_is_what_numpy_finds_for_any_number_of_rows(
    name, keepdims, rows
):
    class Extreme(nnxp.Layer):
        def __call__(self, x: Array) -> Array:
            return getattr(xp_of(x), name)(x, axis=-1, keepdims=keepdims) * 2

    x = draw((rows, 10))
    x[rows // 2, 3] = np.nan
    x[rows - 1] = np.inf
    recording = Recording(bodied(Extreme().program((1, 10))), rows, [x.dtype])
    y = np.empty((rows, 1) if keepdims else rows, "float32")
    recording([x], [y])
    np.testing.assert_array_equal(y, getattr(np, name)(x, axis=-1, keepdims=keepdims) * 2)


def test_a_layer_that_runs_as_python_sees_the_context_of_its_caller():
    said = ContextVar("said", default=0)

    class Telling(nnxp.Layer):
        """y = x + what the caller said"""

        def __call__(self, x):
            return x + said.get() if float(x.sum()) > 0 else x

    engine = nnxp.Engine(nnxp.Sequential(nnxp.Dense(3, 3, rng=0), Telling()), "numpy")
    dense = engine.model.layers[0]
    x = np.sign(dense(np.ones((1, 3), "float32")).sum()) * np.ones((1, 3), "float32")
    for number in (0, 1, 2):  # the first call makes the recording that the others take
        said.set(number)
        np.testing.assert_allclose(engine(x), dense(x) + number, rtol=1e-6)


def test_only_a_reshape_that_must_copy_is_noted_as_one():
    def copies(formula):
        class Formula(nnxp.Layer):
            def __call__(self, x):
                return formula(x)

        program = Formula().program((1, 4, 6))
        return [step.name for step in program.steps].count("copy")

    assert copies(lambda x: x.reshape(len(x), 24)) == 0
    assert copies(lambda x: x[:, 1:3].reshape(len(x), 12)) == 0
    assert copies(lambda x: x[:, :, None].reshape(len(x), -1)) == 0
    assert copies(lambda x: x[:, :, 1:].reshape(len(x), 20)) == 1
    assert copies(lambda x: x.transpose(0, 2, 1).reshape(len(x), 24)) == 1


def test_constants_of_a_program_meet_the_arrays_of_a_device():
    x = draw((4, 6))
    y = Numbered().program((1, 6))(nnxp.to_backend(x, "sim"))
    np.testing.assert_array_equal(nnxp.asnumpy(y), x * np.arange(6, dtype="float32"))


class Bumps(nnxp.Layer):
    """y = exp(-(x weight)²) + x, of a user's own."""

    weight: Array

    def __init__(self, size):
        self.weight = draw((size, size))

    def __call__(self, x):
        h = x @ self.weight
        return xp_of(x).exp(-h * h) + x


def dense(*sizes, activation="relu", dtype="float32"):
    layers = [Dense(a, b, activation, dtype=dtype, rng=0) for a, b in pairwise(sizes)]
    return Sequential(*layers)


COUNTED = {
    "dense": (dense(784, 128, 64, 10), (784,), "float32"),
    "gelu": (dense(100, 200, 50, activation="gelu"), (100,), "float32"),
    "softmax": (dense(20, 300, activation="softmax"), (20,), "float32"),
    "residual": (Sequential(Residual(dense(64, 256, 64)), Dense(64, 3, rng=0)), (64,), "float32"),
    "layer norm": (
        Sequential(Dense(64, 256, rng=0), LayerNorm(256), Activation("silu"), Dense(256, 8, rng=1)),
        (64,),
        "float32",
    ),
    "batch norm": (
        Sequential(Dense(64, 256, rng=0), BatchNorm(256), Activation("tanh"), Dense(256, 8, rng=1)),
        (64,),
        "float32",
    ),
    "16-bit": (dense(64, 256, 8, dtype="float16"), (64,), "float16"),
    "wide rows": (dense(784, 128, 10), (784,), "float64"),
    "own layer": (Sequential(Dense(30, 64, "relu", rng=0), Bumps(64)), (30,), "float32"),
    "recurrent": (nnxp.LSTM(8, 16, rng=0), (12, 8), "float32"),
    "attention": (nnxp.TransformerEncoderLayer(16, 4, 32, rng=0), (10, 16), "float32"),
}


@pytest.mark.parametrize("name", COUNTED)
def test_the_bytes_of_a_row_are_counted_within_five_in_a_hundred(name):
    """tracemalloc between 4,000 rows and 8,000: what a recording takes whatever its rows is out."""
    net, row, dtype = COUNTED[name]
    program = bodied(net.program((1, *row)))
    given = [np.dtype(dtype)]
    peaks = []
    for rows in (4000, 4000, 8000):  # the first warms what is made once
        x = draw((rows, *row), dtype)
        results = [np.empty(*outline) for outline in program.outline(rows)]
        tracemalloc.start()
        try:
            recording = Recording(program, rows, given)
            tracemalloc.reset_peak()  # without what writing its text took for a moment
            recording([x], results)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert costs(program, given).row_bytes == pytest.approx((peaks[2] - peaks[1]) / 4000, rel=0.05)


def test_a_single_number_of_few_is_read_at_each_call():
    program = trace(lambda x, y: x * y[1] + (y * 2)[0], ((3,), "float32"), ((2,), "float32"))
    recording = Recording(program, 1, [np.dtype("float32")] * 2)
    for seed in range(2):
        x, y = draw((3,), seed=seed), draw((2,), seed=seed + 5)
        np.testing.assert_allclose(recording.answer(x, y), x * y[1] + y[0] * 2, rtol=1e-6)


def test_a_recording_is_a_function_whose_text_can_be_read():
    net = dense(5, 4, 3)
    recording = Recording(net.program((1, 5)), 2, [np.dtype("float32")])
    lines = [line.strip() for line in recording.text.splitlines()]
    assert lines[0] == "def run(x0, y0=None):"
    operands = [line.partition("(")[2] for line in lines[lines.index("try:") + 1 :]]
    assert operands[:2] == ["x0, c0, c1)", "c1, c3, c4)"]  # a product, then its bias
    x = draw((2, 5))
    np.testing.assert_array_equal(recording.answer(x), net(x))


def test_an_error_of_a_recording_tells_the_layer_whose_line_failed():
    class Picky(nnxp.Layer):
        """y = x, or ValueError for a negative number"""

        def __call__(self, x):
            if float(x.min()) < 0:
                raise ValueError("a negative number")
            return x

    net = Sequential(Dense(3, 3, "relu", rng=0), Picky(), Dense(3, 3, rng=1), Picky())
    recording = Recording(net.program((1, 3)), 2, [np.dtype("float32")])
    with pytest.raises(ValueError, match="a negative number") as caught:
        recording.answer(np.array([[1, 1, 1], [-1, -1, -1]], "float32"))
    assert caught.value.__notes__ == ["raised in layer layers.3"]


def test_what_is_made_anew_is_let_go_where_it_ends():
    """Of sorted copies of the rows, one after the other, two are there at most."""

    class Sorts(nnxp.Layer):
        def __call__(self, x):
            for _ in range(6):
                x = xp_of(x).sort(x, axis=-1)
            return x

    x = draw((1000, 100))
    recording = Recording(Sorts().program((1, 100)), 1000, [x.dtype])
    recording.answer(x)
    tracemalloc.start()
    try:
        recording.answer(x)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3.5 * x.nbytes  # with the result


def test_a_second_call_runs_what_the_first_one_recorded(monkeypatch):
    made = []

    class Counted(Recording):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(recordings, "Recording", Counted)
    engine, x = nnxp.Engine(dense(5, 4, 3), "numpy"), draw((2, 5))
    first = engine(x)
    for _ in range(3):
        np.testing.assert_array_equal(engine(x), first)
    assert len(made) == 1


def test_recordings_for_many_numbers_of_rows_are_not_all_kept():
    engine = nnxp.Engine(dense(5, 4, 3), "numpy")
    for rows in range(1, recordings.MOST_KEYS + 40):
        for _ in range(2):
            engine(draw((rows, 5)))
    (prepared,) = engine._replicas[0]._prepared.values()
    kept = prepared.run._idle
    assert sum(map(bool, kept.values())) <= recordings.MOST_IDLE + 1
    assert len(kept) <= recordings.MOST_KEYS + 1


WEIGHTS = draw((4, 12)), draw((12,)), draw((3, 12))
CONV = nnxp.Conv(3, 2, (1,), "sigmoid", rng=0)


def stepped(x, state):
    """What looks at parts of its inputs, and joins what bodies in place make of them."""
    y, h, c = kernels.linear_lstm(x, *WEIGHTS, state[0], state[1])
    return CONV(y), xp_of(x).stack((h, c)), xp_of(x).stack((h,), axis=1)


def test_few_numbers_are_copied_so_that_bodies_are_bound_to_where_they_lie():
    x, state = draw((2, 5, 4)), draw((2, 2, 3))
    program = trace(stepped, (x.shape, x.dtype), (state.shape, x.dtype))
    recording = Recording(program, 1, [x.dtype, x.dtype])
    lines = recording.text.partition(" try:")[2]
    if onednn.why_not() is None:  # else no body reads them
        assert lines.count("x0") == lines.count("x1") == 1  # where it is copied
    kept = recording.answer(x, state)
    first = [np.copy(y) for y in kept]
    for y, expected in zip(first, stepped(x, state), strict=True):
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    assert not np.array_equal(recording.answer(-x, -state)[0], first[0])
    frozen, fortran = x.copy(), np.asfortranarray(state)
    frozen.flags.writeable = False
    into = [np.empty_like(y) for y in first]
    recording([frozen, fortran], into)
    for before, once, again in zip(first, kept, into, strict=True):
        np.testing.assert_array_equal(once, before)
        np.testing.assert_array_equal(again, before)


def test_many_numbers_are_not_copied():
    net = nnxp.Conv(4, 2, (3,), rng=0)
    recording = Recording(net.program((1, 600, 4)), 3, [np.dtype("float32")])
    lines = recording.text.partition(" try:")[2].splitlines()
    assert any("x0" in line and "y0" in line for line in lines)


@pytest.mark.parametrize("mode", ["constant", "edge", "reflect", "wrap", "symmetric"])
def test_what_is_padded_in_a_recording_is_what_numpy_pads(mode):
    around = ((0, 0), (2, 1), (0, 3), (4, 4))
    options = {"constant_values": 7} if mode == "constant" else {}

    class Pads(nnxp.Layer):
        def __call__(self, x):
            y = xp_of(x).pad(x + 1, around, mode=mode, **options)
            return y * 2

    x = draw((3, 3, 4, 5))
    expected = np.pad(x + 1, around, mode, **options) * 2
    recording = Recording(Pads().program((1, 3, 4, 5)), 3, [x.dtype])
    for _ in range(2):
        np.testing.assert_array_equal(recording.answer(x), expected)
    assert (" = " in recording.text.partition("try:")[2]) == (mode == "symmetric")  # made anew


@pytest.mark.parametrize("rows", [1, 2, 9, 16, 20, 21])
def test_products_of_few_rows_are_made_in_parts_where_that_starts_sooner(rows, monkeypatch):
    monkeypatch.setattr(_small, "small_kernels", lambda: True)
    net, x = dense(784, 200, 100, 3), draw((rows, 784))
    with onednn.unused():
        recording = Recording(net.program((1, 784)), rows, [x.dtype])
    value, error = nnxp.testing.error_bound(net, x)
    assert (np.abs(recording.answer(x) - value) <= 6 * error).all()
    products = recording.text.count("x0")  # of the first layer, beside the head
    assert (products > 2) == (rows in (9, 16, 20))


def test_parts_of_a_product_are_all_of_its_columns(monkeypatch):
    monkeypatch.setattr(_small, "small_kernels", lambda: True)
    for rows, inner, columns in product(range(1, 23), (50, 784, 1500), (7, 64, 100, 257, 1000)):
        parts = _small.columns_at_once(rows, inner, columns, np.dtype("float32"))
        taken = [i for part in parts for i in range(columns)[part]]
        assert taken == list(range(columns))
        widths = [part.stop - part.start for part in parts]
        assert len(parts) == 1 or rows * inner * max(widths) <= _small.SMALL
