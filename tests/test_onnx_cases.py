"""ONNX's own cases: what each operator must answer, on every library and written out as a program.

All of them run on NumPy, every fourth elsewhere; NNXP_ONNX_CASES=all runs all of them everywhere.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import nnxp
from nnxp.layers.operators import OPERATORS
from nnxp.program.program import trace
from nnxp.program.recording import Recording

onnx = pytest.importorskip("onnx", reason="onnx is not installed: its cases are the judge")

EVERY = 1 if os.environ.get("NNXP_ONNX_CASES") == "all" else 4
DATA = Path(onnx.__file__).parent / "backend/test/data"
NOT_OURS = {
    "test_batchnorm_example_training_mode": "training",
    "test_batchnorm_epsilon_training_mode": "training",
    "test_training_dropout_default": "training",
    "test_training_dropout_default_mask": "training",
    "test_training_dropout": "training",
    "test_training_dropout_mask": "training",
    "test_resize_downsample_scales_linear_align_corners": "ONNX Runtime answers as we do",
    "test_resize_downsample_scales_cubic_align_corners": "ONNX Runtime answers as we do",
}
ON_NUMPY_ONLY = ("scatter_elements_with_reduction", "scatter_elements_with_dup", "scatternd_a",
                 "scatternd_m", "nonzero")  # fmt: skip


class Case:
    """A model with inputs and what they must give."""

    def __init__(self, name, source, inputs, outputs, rtol, atol):
        self.name, self.source, self.rtol, self.atol = name, source, rtol, atol
        self.inputs, self.outputs = [array(x) for x in inputs if x is not None], outputs

    def judge(self, made):
        made, outputs = made if isinstance(made, tuple) else (made,), self.outputs
        if len(outputs) == 1 and isinstance(outputs[0], list):  # a sequence
            (outputs,) = outputs
        assert len(made) == len(outputs)
        for y, wanted in zip(map(nnxp.asnumpy, made), map(array, outputs), strict=True):
            wanted = wanted.astype(y.dtype) if wanted.dtype == object else wanted
            assert (y.dtype, y.shape) == (wanted.dtype, wanted.shape)
            if y.dtype.kind == "b":
                np.testing.assert_array_equal(y, wanted)
                continue
            half = y.dtype.itemsize == 2 and y.dtype.kind not in "iu"
            np.testing.assert_allclose(
                y.astype("float64"), wanted.astype("float64"),
                rtol=max(self.rtol, 1e-2 * half), atol=max(self.atol, 1e-3 * half),
            )  # fmt: skip


def array(x):
    return onnx.numpy_helper.to_array(x) if isinstance(x, onnx.TensorProto) else np.asarray(x)


SKIPS = {
    "an operator that is not known": "operators that nnxp does not know",
    "a type that is not computed with": "nnxp does not compute with",
    "an input that is a sequence or an optional": "is no tensor",
    "a Scan of opset 8": "Scan of opset 8",
}
"""Why a case is skipped, and what is said of its model."""


@cache
def node_cases():
    """The cases whose operators and types are known, with models; and how many are not, and why."""
    from onnx.backend.test.loader import load_node_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # onnx's, while it makes its cases
        found = load_node_model_tests()
    cases, skipped = [], Counter(NOT_OURS[each.name] for each in found if each.name in NOT_OURS)
    for each in found:
        if each.name in NOT_OURS:
            continue
        try:
            model = nnxp.load_onnx(each.model)
        except nnxp.ConversionError as error:
            skipped[next(why for why, said in SKIPS.items() if said in str(error))] += 1
            continue
        for inputs, outputs in each.data_sets:
            case = Case(each.name, each.model, inputs, outputs, each.rtol, each.atol)
            cases.append((case, model))
    return cases, skipped


def failures(cases, run):
    """What run(case, model) raises, by the case's name."""
    found = {}
    for case, model in cases:
        try:
            run(case, model)
        except Exception as error:
            found[case.name] = f"{type(error).__name__}: {error}"[:300]
    return found


def test_every_case_of_the_standard_is_answered_as_it_must_be():
    cases, skipped = node_cases()
    assert failures(cases, lambda case, model: case.judge(model(*case.inputs))) == {}
    if tuple(map(int, onnx.__version__.split(".")[:2])) >= (1, 23):
        assert len(cases) >= 1451
        assert skipped == {
            "an operator that is not known": 230, "a type that is not computed with": 170,
            "an input that is a sequence or an optional": 24, "a Scan of opset 8": 1,
            "training": 6, "ONNX Runtime answers as we do": 2,
        }  # fmt: skip


def test_cases_run_on_a_device_without_a_way_back():
    def run(case, model):
        inputs = [nnxp.to_backend(x, "sim") for x in case.inputs]
        case.judge(model.to("sim")(*inputs))

    cases = [(case, model) for case, model in node_cases()[0][::EVERY]
             if not any(part in case.name for part in ON_NUMPY_ONLY)]  # fmt: skip
    assert failures(cases, run) == {}


def with_shapes_known(case, model):
    """The case with what decides shapes, and which places are written to, as constants."""
    numbers = set()
    for node in model.nodes:
        known = OPERATORS[node["op"]].numbers if node["op"] in OPERATORS else ()
        known = {1} if node["op"].startswith("Scatter") else known
        numbers |= {name for i, name in enumerate(node["inputs"]) if i in known}
    names = model.input_names
    if not numbers.intersection(names):
        return model, case.inputs
    source, free = onnx.ModelProto(), []
    source.CopyFrom(case.source)
    del source.graph.input[:]
    for name, value, info in zip(names, case.inputs, case.source.graph.input, strict=True):
        if name in numbers:
            source.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
        else:
            source.graph.input.append(info)
            free.append(value)
    return nnxp.load_onnx(source), free


DEPENDS_ON_NUMBERS = ("_expanded", "test_if", "nonzero", "test_loop")
"""Their shapes, or what they do, depend on numbers in the inputs."""


def test_cases_written_out_say_the_same():
    traced = 0

    def run(case, model):
        nonlocal traced
        model, inputs = with_shapes_known(case, model)
        if not inputs:
            return
        wanted = model(*inputs)
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        try:
            program = trace(lambda *x: model(*x), *((x.shape, x.dtype) for x in inputs))
        except nnxp.ShapeError:
            assert any(part in case.name for part in DEPENDS_ON_NUMBERS)
            return
        traced += 1
        results = [np.empty(y.shape, y.dtype) for y in wanted]
        with np.errstate(all="ignore"):  # infinity and NaN are answers here
            Recording(program, 1, [x.dtype for x in inputs])(inputs, results)
            made = program.run(inputs)
        for y, recorded, right in zip(made, results, wanted, strict=True):
            assert (np.asarray(y).dtype, np.shape(y)) == (right.dtype, right.shape)
            np.testing.assert_array_equal(y, right)
            case = right.astype("float64"), recorded.astype("float64")
            np.testing.assert_allclose(*case, rtol=1e-5, atol=1e-6)

    cases = [each for each in node_cases()[0][::EVERY]
             if not any(part in each[0].name for part in ON_NUMPY_ONLY)
             and "BFLOAT16" not in each[0].name]  # NumPy cannot compare its NaNs  # fmt: skip
    assert failures(cases, run) == {}
    assert traced > 0.9 * len(cases)


@pytest.mark.parametrize("kind", ["pytorch-converted", "pytorch-operator", "simple"])
def test_stored_models_of_old_versions_are_brought_to_ours(kind):
    cases = []
    for folder in sorted((DATA / kind).glob("*/")):
        try:
            model = nnxp.load_onnx(folder / "model.onnx")
        except nnxp.ConversionError:  # sequences, strings
            assert kind == "simple"
            continue
        for data in folder.glob("test_data_set*"):
            inputs, outputs = (
                [onnx.load_tensor(str(path)) for path in
                 sorted(data.glob(f"{part}_*.pb"), key=lambda path: int(path.stem.split("_")[1]))]
                for part in ("input", "output")
            )  # fmt: skip
            cases.append((Case(folder.name, None, inputs, outputs, 1e-3, 1e-5), model))
    assert failures(cases, lambda case, model: case.judge(model(*case.inputs))) == {}
    assert len(cases) >= {"pytorch-converted": 82, "pytorch-operator": 35, "simple": 7}[kind]
