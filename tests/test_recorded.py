"""What a program must know of memory: which reshapes are copies, and where constants live."""

from __future__ import annotations

import tracemalloc
from contextvars import ContextVar
from itertools import pairwise

import numpy as np
import pytest

import nnxp
from conftest import draw
from nnxp import Activation, BatchNorm, Dense, LayerNorm, Residual, Sequential
from nnxp._arrays import Array, xp_of
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
    """tracemalloc between 1,000 rows and 2,000: what a recording takes whatever its rows is out."""
    net, row, dtype = COUNTED[name]
    program = bodied(net.program((1, *row)))
    given = [np.dtype(dtype)]
    peaks = []
    for rows in (1, 1000, 2000):  # the first warms what is made once
        x = draw((rows, *row), dtype)
        results = [np.empty(*outline) for outline in program.outline(rows)]
        tracemalloc.start()
        try:
            Recording(program, rows, given)([x], results)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert costs(program, given).row_bytes == pytest.approx((peaks[2] - peaks[1]) / 1000, rel=0.05)
