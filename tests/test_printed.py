"""What is printed in a terminal is shown in a notebook, and nothing in it is taken for HTML."""

from __future__ import annotations

import importlib
import inspect
from html import unescape
from pathlib import Path

import numpy as np
import pytest

import nnxp
from nnxp._printed import Printed

NET = nnxp.Sequential(nnxp.Dense(6, 4, "relu", rng=0), nnxp.Dense(4, 3, rng=1))
X = np.random.default_rng(0).normal(size=(20, 6)).astype("float32")
ROOT = Path(nnxp.__file__).parent
OF_OTHERS = ("backend/cuda", "cluster/dask", "kernels/cuda", "sklearn", "__main__")


def classes():
    """Every class of nnxp, but for those that need other packages."""
    for path in ROOT.rglob("*.py"):
        name = path.relative_to(ROOT).with_suffix("").as_posix().removesuffix("/__init__")
        if not name.startswith((*OF_OTHERS, "__init__")):
            module = importlib.import_module(f"nnxp.{name.replace('/', '.')}")
            for _, found in inspect.getmembers(module, inspect.isclass):
                if found.__module__ == module.__name__:
                    yield found


def test_whatever_has_a_text_for_people_shows_it_in_a_notebook():
    reports = {each for each in classes() if "__str__" in vars(each) and "to_dict" in vars(each)}
    reports |= {nnxp.Fitted, type(NET.program((1, 6)))}
    assert reports == set(Printed.__subclasses__())
    assert len(reports) == 12
    assert [each for each in classes() if "_repr_html_" in vars(each)] == [Printed]


@pytest.mark.parametrize(
    "report",
    [
        NET.summary(),
        NET.program((1, 6)),
        nnxp.testing.parity_report(NET, X, backends=["numpy"]),
        nnxp.fit(NET, X, X[:, :3], loss="mean_square", epochs=2, validation=(X, X[:, :3]), rng=0),
    ],
    ids=lambda report: type(report).__name__,
)
def test_a_notebook_shows_what_a_terminal_prints(report):
    assert unescape(report._repr_html_()) == f"<pre>{report}</pre>"
    assert "<" not in report._repr_html_()[5:-6]


def test_names_from_elsewhere_are_text_in_a_notebook():
    def f(x):
        return x

    f.__name__ = "<script>alert(1)</script>"
    report = nnxp.testing.parity_report(f, X, backends=["numpy"])
    assert "<script>" in str(report)
    assert "&lt;script&gt;" in report._repr_html_()
    assert "<script>" not in report._repr_html_()


def test_what_training_came_to_is_told_in_lines():
    speed = {"seconds": 1.5, "rows_per_second": 1e6}
    losses = [(2.0, 1.5), (1.0, 0.5), (0.75, 1.25)]
    history = [
        {"epoch": i + 1, "loss": loss, "validation": validation, **speed}
        for i, (loss, validation) in enumerate(losses)
    ]
    assert str(nnxp.Fitted(NET, history)).splitlines() == [
        "epochs      3 in 4.5 s; 1,000,000 rows/s in the last",
        "loss        2 in the first epoch, 0.75 in the last",
        "validation  1.25 after the last epoch; the least was 0.5, after epoch 2",
    ]
    del history[0]["validation"]
    assert "validation" not in str(nnxp.Fitted(NET, history[:1]))
    assert str(nnxp.Fitted(NET, [])) == "epochs      0"
