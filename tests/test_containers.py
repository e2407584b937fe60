"""Which layers can follow each other is known when a model is made, where it is certain."""

from __future__ import annotations

import re

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import nnxp
from conftest import draw
from nnxp import (
    Activation,
    BatchNorm,
    Dense,
    Dropout,
    Flatten,
    LayerNorm,
    OptionError,
    Residual,
    Sequential,
    ShapeError,
    Standardize,
)


class Halves(nnxp.Layer):
    """x (rows, n) -> y (rows, 2, n / 2), and (rows, 2, n) -> (rows, 2 n)."""

    def __call__(self, x):
        return x.reshape(len(x), 2, -1) if x.ndim == 2 else x.reshape(len(x), -1)


class Peeks(nnxp.Layer):
    """The first half of x; looks at a number, so that it is not written out."""

    def __call__(self, x):
        return x[:, : x.shape[1] // 2] if float(x.max()) < 1e9 else x

    def output_shape(self, shape):
        return (shape[0], shape[1] // 2)


@pytest.fixture(autouse=True, scope="module")
def _no_layer_stays_known():
    yield
    for name in ("Halves", "Peeks"):
        nnxp.Layer.known.pop(name, None)


@pytest.mark.parametrize(
    ("make", "shape", "answer"),
    [
        (lambda: Sequential(), (3, 2), (3, 2)),
        (lambda: Sequential(Flatten(), Dense(8, 2)), (3, 2, 4), (3, 2)),
        (lambda: Sequential(Dense(4, 6), Flatten(), Dense(12, 2)), (3, 2, 4), (3, 2)),
        (lambda: Sequential(Dense(4, 6), Sequential(Flatten(), Dense(12, 2))), (3, 2, 4), (3, 2)),
        (lambda: Sequential(Sequential(Dense(4, 6), Flatten()), Dense(12, 2)), (3, 2, 4), (3, 2)),
        (lambda: Sequential(LayerNorm(4), Dense(4, 6), Dropout(0.5), Flatten(), BatchNorm(12)),
         (3, 2, 4), (3, 12)),
        (lambda: Sequential(Residual(Dense(4, 4)), Flatten(), Dense(8, 2)), (3, 2, 4), (3, 2)),
        (lambda: Sequential(Residual(Dense(4, 6), Dense(6, 4)), Flatten(), Residual(Dense(8, 8))),
         (3, 2, 4), (3, 8)),
        (lambda: Sequential(Dense(3, 6), Halves(), Dense(3, 5)), (4, 3), (4, 2, 5)),
        (lambda: Residual(Halves(), Dense(6, 6), Halves()), (4, 2, 3), (4, 2, 3)),
        (lambda: Sequential(Dense(3, 4), Peeks(), Dense(2, 5)), (4, 3), (4, 5)),
        (lambda: Sequential(Dense(3, 4), Activation("softmax"), Dense(4, 5)), (6, 2, 3), (6, 2, 5)),
    ],
)  # fmt: skip
def test_layers_that_can_follow_each_other_are_accepted(make, shape, answer):
    assert make()(draw(shape)).shape == answer


@pytest.mark.parametrize(
    ("make", "wanted", "came"),
    [
        (lambda: Sequential(Dense(3, 4), Dense(5, 6)), r"layers.1 Dense.*5\)", r"0 Dense.*4\)"),
        (lambda: Sequential(Dense(3, 4), LayerNorm(3)), r"layers.1 LayerNorm.*3\)", r"4\)"),
        (lambda: Sequential(Standardize([0, 1, 2], [1, 1, 1]), Dense(4, 3)), r"4\)", r"3\)"),
        (lambda: Sequential(Dense(3, 4), Activation("relu"), Dropout(0.1), LayerNorm(4),
                            Dense(5, 6)), r"layers.4 Dense.*5\)", r"layers.3 LayerNorm.*4\)"),
        (lambda: Sequential(Dense(3, 4), Sequential(Dense(5, 6))), r"layers.1 Seq.*5\)", r"4\)"),
        (lambda: Sequential(Sequential(Dense(3, 4)), Residual(Dense(5, 5))), r"5\)", r"4\)"),
        (lambda: Sequential(Residual(Dense(3, 4), Dense(4, 3)), Dense(4, 3)), r"4\)", r"3\)"),
        (lambda: Sequential(Flatten(), Dense(8, 2), Dense(8, 2)), r"layers.2.*8\)", r"1 .*2\)"),
        (lambda: Sequential(Dense(4, 6), Flatten(), Dense(12, 2), Dense(3, 2)),
         r"layers.3.*3\)", r"layers.2.*2\)"),
    ],
)  # fmt: skip
def test_a_layer_that_cannot_follow_the_one_before_it_is_refused(make, wanted, came):
    with pytest.raises(ShapeError, match=r"takes \(rows, .*but layers.*answers \(rows, ") as error:
        make()
    takes, answers = str(error.value).split(", but ")
    assert re.search(wanted, takes)
    assert re.search(came, answers)


@pytest.mark.parametrize(
    ("inner", "takes", "answers"),
    [((Dense(3, 4),), 3, 4), ((Dense(3, 4), Dense(4, 5)), 3, 5)],
    ids=["one", "two"],
)
def test_a_residual_whose_layers_change_the_shape_is_refused(inner, takes, answers):
    with pytest.raises(ShapeError, match=rf"\(rows, {takes}\) and answers \(rows, {answers}\)"):
        Residual(*inner)
    with pytest.raises(ShapeError, match="another shape"):  # where it was not certain
        Residual(Flatten())(np.zeros((3, 2, 4), "float32"))


def test_what_a_file_makes_is_asked_the_same(tmp_path):
    nnxp.save(Sequential(Dense(3, 4), Dense(4, 5)), tmp_path / "net")
    tensors = load_file(tmp_path / "net")
    with safe_open(tmp_path / "net", framework="numpy") as file:
        about = file.metadata()
    tensors["layers.1.weight"] = np.zeros((6, 5), "float32")
    save_file(tensors, tmp_path / "net", metadata=about)
    with pytest.raises(nnxp.CheckpointError, match=r"takes \(rows, 6\), but layers.0"):
        nnxp.load(tmp_path / "net")


def test_layers_and_nothing_else():
    with pytest.raises(OptionError, match=r"Sequential\(\*layers\)"):
        Sequential((Dense(3, 4),))
