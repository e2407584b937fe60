"""Every public name says what it is by a formula or an example, and the examples run."""

from __future__ import annotations

import ast
import inspect
import re
from textwrap import dedent
from typing import get_args

import numpy as np
import pytest

import nnxp
from nnxp import kernels, plots, testing
from nnxp.training import losses, optimizers, schedules

FORMULA = re.compile(r"\S (?:[-+*]?=) \S|->")
EXAMPLE = re.compile(r"^ {4}\S.*\n(?:^(?: {4}.*)?\n)*", re.MULTILINE)

SECTION = re.compile(r"^(Args|Attributes|Raises|Returns|Yields):\n(?: {4}.*\n|\n)*", re.MULTILINE)

HOMES = {
    "nnxp": nnxp,
    "nnxp.kernels": kernels,
    "nnxp.plots": plots,
    "nnxp.losses": losses,
    "nnxp.optimizers": optimizers,
    "nnxp.schedules": schedules,
    "nnxp.testing": testing,
}
INSIDE = {
    "applied",
    "arrays_in",
    "before",
    "chunks",
    "evaluated",
    "is_array",
    "is_floating",
    "is_number",
    "is_real",
    "of_step",
    "owners",
    "rate_at",
    "xp_of",
}  # what modules use themselves
THINGS = {f"{home}.{n}": getattr(HOMES[home], n) for home in HOMES for n in dir(HOMES[home])}
PUBLIC = {
    name: thing
    for name, thing in THINGS.items()
    if callable(thing) and getattr(thing, "__module__", "").startswith("nnxp")
    if not (word := name.rpartition(".")[2]).startswith("_") and word not in INSIDE
}

NOT_RUN = {
    "nnxp.from_torch": "needs torch",
    "nnxp.load_state": "needs a file of torch's",
    "nnxp.TorchGraph": "needs torch",
    "nnxp.from_sklearn": "needs an estimator",
    "nnxp.load_onnx": "needs a file in ONNX",
    "nnxp.Resize": "a table",
    "nnxp.kernels.resize": "a table",
    "nnxp.kernels.kernel": "would be a kernel in all other tests, too",
}


def docstring(thing: object) -> str:
    """The docstring without its sections, whose lines are indented as an example's are."""
    return SECTION.sub("", inspect.cleandoc(thing.__doc__ or "") + "\n")


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_a_public_name_has_a_formula_or_an_example(name):
    text = docstring(PUBLIC[name])
    if inspect.isclass(PUBLIC[name]) and issubclass(PUBLIC[name], nnxp.NnxpError):
        assert len(text.split()) > 5  # what went wrong is a sentence
        return
    assert FORMULA.search(text) or EXAMPLE.search(text), text


EXAMPLES = [
    pytest.param(text, id=name)
    for name, thing in sorted(PUBLIC.items())
    if name not in NOT_RUN
    for text in EXAMPLE.findall(docstring(thing))
]


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What examples call by a short name: a small network, and rows for it."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    net = nnxp.Sequential(nnxp.Dense(64, 16, "relu", rng=0), nnxp.Dense(16, 10, "softmax", rng=1))
    nnxp.save(net, "net.safetensors")
    x = rng.normal(size=(4, 64)).astype("float32")
    return {
        "nnxp": nnxp, "np": np, "net": net, "layer": net, "x": x, "labels": np.arange(4),
        "target": rng.random((4, 10), dtype="float32"), "dy": np.ones((4, 10), "float32"),
        "engine": nnxp.Engine(net, "numpy"), "table": x[:, :40], "embeddings": x[:, 40:63],
        "age": x[:, 63], "lengths": np.array([3, 5, 1, 2]),
    }  # fmt: skip


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_runs(example, names, request):
    if "MultiHeadAttention" in request.node.name:
        names["x"] = np.zeros((4, 5, 64), "float32")
    if "save_onnx" in request.node.name:
        pytest.importorskip("onnx", reason="onnx is optional")
        names["net"] = nnxp.Sequential(nnxp.Dense(784, 4, rng=0))
    *before, last = ast.parse(dedent(example)).body
    exec(compile(ast.Module(before, []), "example", "exec"), names)
    if isinstance(last, ast.Expr) and isinstance(last.value, ast.Compare):
        assert eval(compile(ast.Expression(last.value), "example", "eval"), names)
    else:
        exec(compile(ast.Module([last], []), "example", "exec"), names)


ARGUMENTS = [n for n, t in PUBLIC.items() if inspect.isfunction(t) and not n.startswith("nnxp.k")]


@pytest.mark.parametrize("name", [*ARGUMENTS, "nnxp.Engine", "nnxp.Sequential", "nnxp.Dense"])
def test_a_docstring_lists_all_arguments(name):
    listed = re.search(r"^ *Args:\n((?: {4,}.*\n)+)", PUBLIC[name].__doc__ or "", re.MULTILINE)
    wanted = set(inspect.signature(PUBLIC[name]).parameters)
    if not wanted:
        return
    assert listed, f"{name} says nothing of its arguments"
    depth = len(re.match(" *", listed[1])[0])
    lines = re.findall(rf"^ {{{depth}}}(\w[\w, ]*):", listed[1], re.MULTILINE)
    told = {word for line in lines for word in line.split(", ")}
    assert told == wanted


def test_the_names_that_a_type_checker_knows_are_those_of_the_activations():
    assert set(get_args(kernels.ActivationName)) == set(kernels.ACTIVATIONS)
    for takes in (nnxp.Dense, nnxp.Conv, nnxp.Activation, nnxp.LSTM, nnxp.RNN, nnxp.Bilinear):
        named = inspect.signature(takes).parameters.get("activation")
        assert named is None or named.annotation == "kernels.ActivationName"


def test_what_help_shows_of_the_front_door():
    assert {"cluster", "plots", "sim", "testing"} <= {*dir(nnxp)}
    assert "TYPE_CHECKING" not in dir(nnxp)
    for name in dir(nnxp):
        assert getattr(nnxp, name) is not None, name
    assert list(inspect.signature(nnxp.Dense).parameters)[:3] == ["inputs", "outputs", "activation"]
