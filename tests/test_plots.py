"""Pictures show the numbers that they were given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import nnxp

pytest.importorskip("matplotlib", reason="pictures need matplotlib, the extra plots")
from nnxp import plots
from nnxp.cli import app

NET = nnxp.Sequential(
    nnxp.Dense(6, 4, "relu", rng=0), nnxp.Residual(nnxp.Dense(4, 4, rng=1)), nnxp.Dense(4, 3, rng=2)
)
X = np.random.default_rng(0).normal(size=(20, 6)).astype("float32")


def texts(axes):
    return [each.get_text() for each in axes.texts if each.get_text()]


def test_a_learning_curve_has_the_losses_by_epoch():
    history = [{"epoch": e, "loss": 1 / e, "validation": 2 / e} for e in (1, 2, 3)]
    (axes,) = plots.learning_curve(history).axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert drawn["loss"] == [[e, 1 / e] for e in (1, 2, 3)]
    assert drawn["validation"] == [[e, 2 / e] for e in (1, 2, 3)]
    with pytest.raises(nnxp.OptionError, match="no epoch"):
        plots.learning_curve([])


def test_weights_are_a_picture_for_each_neuron():
    weight = NET.layers[0].weight
    figure = plots.weights(weight, (2, 3))
    shown = [axes.images[0].get_array() for axes in figure.axes]
    np.testing.assert_array_equal(shown, weight.T.reshape(4, 2, 3))
    assert figure.axes[0].images[0].norm.vmax == -figure.axes[3].images[0].norm.vmin > 0
    with pytest.raises(nnxp.ShapeError, match=r"\(2, 2\)"):
        plots.weights(weight)


def test_activations_are_a_box_for_each_layer_with_all_its_numbers():
    (axes,) = plots.activations(NET, X).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[::-1] == list(NET.activations(X))
    output = NET(X)
    ends = {x for line in axes.lines for x in line.get_xdata()}
    assert {float(output.min()), float(output.max())} <= ends


def test_the_bars_of_a_parity_report_are_its_checks_and_a_failure_is_red():
    def third(x):
        return x * (1.001 if type(x).__module__ == "nnxp.sim" else 1.0) / 3

    report = nnxp.testing.parity_report(third, X, backends=["numpy", "sim"])
    assert [check.ok for check in report.checks] == [True, False]
    (axes,) = plots.parity(report).axes
    bars = axes.patches[::-1]
    ratios = [max(check.ratio, plots.LEAST) for check in report.checks]
    assert [bar.get_width() for bar in bars] == pytest.approx(ratios)
    assert bars[0].get_facecolor() != bars[1].get_facecolor()
    assert "NOT all agree" in axes.get_xlabel()


def test_the_report_itself_writes_its_picture(tmp_path):
    nnxp.testing.parity_report(NET, X, backends=["numpy"]).plot(tmp_path / "report.svg")
    assert "<svg" in (tmp_path / "report.svg").read_text()


def test_a_program_shows_every_step_and_what_goes_where():
    program = NET.program((1, 6))
    (axes,) = plots.program(program).axes
    shown = texts(axes)
    assert shown[0] == "x  (rows, 6)"
    assert shown[1:] == [
        f"{s.name}  (rows, {s.outputs[0].shape[1]})\n{s.path}" for s in program.steps
    ]
    arrows = [each for each in axes.texts if not each.get_text()]
    assert len(arrows) == 5  # four in a row, and one past the inner layer of the residual


def test_confusion_counts_each_pair():
    figure = plots.confusion([0, 1, 1, 2], np.array([0, 1, 2, 2]), ["a", "b", "c"])
    (axes,) = figure.axes
    np.testing.assert_array_equal(axes.images[0].get_array(), [[1, 0, 0], [0, 1, 1], [0, 0, 1]])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c"]
    with pytest.raises(nnxp.ShapeError, match=r"\(2,\) and \(3,\)"):
        plots.confusion([0, 1], [0, 1, 1])
    with pytest.raises(nnxp.OptionError, match="2 names, but class 2"):
        plots.confusion([0, 2], [0, 1], ["a", "b"])
    with pytest.raises(nnxp.OptionError, match="whole numbers"):
        plots.confusion([0.5], [1.0])


def test_summary_draws_the_model(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    monkeypatch.chdir(tmp_path)
    nnxp.save(NET, "net.safetensors")
    ran = CliRunner().invoke(app, ["summary", "net.safetensors", "--plot", "net.svg"])
    assert ran.exit_code == 0, ran.output
    assert "<svg" in Path("net.svg").read_text()
    ran = CliRunner().invoke(app, ["summary", "net.safetensors", "--plot", "net.txt"])
    assert ran.exit_code == 2
    assert "a picture ends in" in ran.output


def test_without_matplotlib_it_is_said_what_brings_it(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(nnxp.BackendUnavailable, match=r"pip install \"nnxp\[plots\]\""):
        plots.program(NET.program((1, 6)))
