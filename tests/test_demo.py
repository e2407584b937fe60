"""The demo's network reads digits it has not seen, and says truly where and how fast it ran."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits as scikit_learn_s_digits

import nnxp
from nnxp import demo

HERE = Path(demo.__file__).parent


def test_the_digits_are_scikit_learn_s_and_every_fifth_is_unseen():
    _, pixels, labels, unseen = demo.load_digits()
    x, y = scikit_learn_s_digits(return_X_y=True)
    np.testing.assert_array_equal(pixels, x)
    np.testing.assert_array_equal(labels, y)
    np.testing.assert_array_equal(np.flatnonzero(unseen), np.arange(0, 1797, 5))
    assert pixels.dtype == labels.dtype == np.uint8


def test_the_network_reads_at_least_95_percent_of_the_unseen_digits():
    model, pixels, labels, unseen = demo.load_digits()
    y = nnxp.predict(model, pixels, "numpy")
    np.testing.assert_allclose(y.sum(axis=1), 1, atol=1e-5)
    right = y.argmax(axis=1) == labels
    assert right[unseen].mean() >= 0.95
    assert right[~unseen].mean() >= right[unseen].mean()  # those it was trained on


def test_the_files_are_small_and_the_digits_licence_stands_beside_them():
    sizes = {each.name: each.stat().st_size for each in HERE.iterdir() if each.is_file()}
    assert sizes["digits.npz"] + sizes["digits.safetensors"] < 200_000
    licence = (HERE / "LICENSE-digits.txt").read_text()
    for said in ("CC BY 4.0", "Alpaydin", "10.24432/C50P49", "BSD 3-Clause"):
        assert said in licence


def test_training_again_makes_a_network_that_reads_as_well(tmp_path):
    command = [sys.executable, "-W", "error", "-m", "nnxp.demo.train", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    model, pixels, labels, unseen = demo.load_digits()
    with np.load(tmp_path / "digits.npz") as file:
        for name, value in [("pixels", pixels), ("labels", labels), ("unseen", unseen)]:
            np.testing.assert_array_equal(file[name], value)
    again = nnxp.load(tmp_path / "digits.safetensors")
    assert repr(again) == repr(model)
    # Other versions of scikit-learn and NumPy train other weights, of about the same worth.
    found = again(pixels[unseen].astype("float32")).argmax(axis=1)
    assert (found == labels[unseen]).mean() >= 0.95


@pytest.mark.parametrize("backend", ["numpy", "sim"])
def test_the_report_says_what_ran_and_where(backend):
    report = demo.run(5000, backend)
    assert (report.rows, report.backend) == (5000, backend)
    assert report.device == nnxp.get_backend(backend).device
    assert report.why
    assert report.rows_per_second == pytest.approx(5000 / report.seconds)
    work = 64 * 128 + 128 * 64 + 64 * 10  # multiply-adds a row; the scaling is none
    assert report.multiply_adds_per_second == pytest.approx(report.rows_per_second * work)
    assert report.accuracy >= 0.95
    assert 0 < report.largest_ratio < 6
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    assert report.plain_rows_per_second > 0
    text = " ".join(str(report).split())
    for said in (
        report.device,
        report.why,
        "5,000",
        "digits it was not trained on",
        "nnxp predict",
    ):
        assert said in text
    assert all(len(line) <= 80 for line in str(report).splitlines())


def test_the_accuracy_is_that_of_the_run_and_of_its_unseen_rows_alone(monkeypatch):
    model, pixels, labels, unseen = demo.load_digits()
    right = model(pixels.astype("float32")).argmax(axis=1) == labels
    assert demo.run(1797, "numpy").accuracy == right[unseen].mean()
    assert demo.run(1000, "numpy").accuracy == right[:1000][unseen[:1000]].mean()
    wrong = labels.copy()
    wrong[unseen] = (wrong[unseen] + 1) % 10
    monkeypatch.setattr(demo, "load_digits", lambda: (model, pixels, wrong, unseen))
    assert demo.run(1797, "numpy").accuracy < 0.05


@pytest.mark.parametrize("rows", [1, 2, 255, 1798])
def test_any_number_of_rows_can_be_asked_for(rows):
    report = demo.run(rows, "numpy")
    assert report.rows == rows
    assert 0 <= report.accuracy <= 1


@pytest.mark.parametrize("rows", [0, -1])
def test_less_than_a_row_is_refused(rows):
    with pytest.raises(nnxp.OptionError, match="rows of the demo is a whole number, at least 1"):
        demo.run(rows)


def test_a_device_that_forgets_the_bias_shows_in_the_ratio(monkeypatch, sim):
    model, pixels, *_ = demo.load_digits()
    linear = nnxp.kernels.linear

    def forgetful(x, weight, bias=None, **options):
        return linear.reference(x, weight, None, **options)

    monkeypatch.setitem(linear._fused, "sim", forgetful)
    monkeypatch.setattr(linear, "_body", {})
    assert demo.largest_ratio(model, pixels, "sim:0") > 6
    assert demo.largest_ratio(model, pixels, "cpu") < 6


def test_a_network_that_computes_something_else_fails_the_demo(monkeypatch):
    assert demo.run(2000, "numpy").ok
    monkeypatch.setattr(demo, "largest_ratio", lambda *_: 7.0)
    report = demo.run(2000, "numpy")
    assert not report.ok
    assert "WRONG" in str(report)
    assert report.to_dict()["ok"] is False
