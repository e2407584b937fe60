"""Runs of elementwise steps as one: the same results, and nothing lost that others look at."""

import numpy as np
import pytest

import nnxp
from conftest import draw, draw_inputs, every_layer
from nnxp import kernels
from nnxp.program.fused import fused
from nnxp.program.program import expanded, trace
from nnxp.program.rewrite import optimized

X = ((4, 8), "float32")


def names(program):
    return [step.name for step in program.steps]


def joined(function, *outlines, expect):
    """The program of a formula put together, which answers what it answered."""
    outlines = outlines or (X,)
    program = trace(function, *outlines)
    made = fused(program)
    assert names(made) == expect.split()
    inputs = [(draw(shape, seed=i) * 3).astype(kind) for i, (shape, kind) in enumerate(outlines)]
    for a, b in zip(program.run(inputs), made.run(inputs), strict=True):
        np.testing.assert_array_equal(a, b)
    return made


@every_layer
def test_every_layer_put_together_answers_the_same(layer, shape):
    inputs = draw_inputs(layer, shape)
    outlines = [None if x is None else (x.shape, x.dtype) for x in inputs]
    given = [x for x in inputs if x is not None]
    for program in (layer.program(*outlines), expanded(optimized(layer.program(*outlines)))):
        made = fused(program)
        assert len(made.steps) <= len(program.steps)
        with np.errstate(all="ignore"):
            for a, b in zip(program.run(given), made.run(given), strict=True):
                assert a.dtype == b.dtype
                if a.dtype.itemsize > 2:
                    np.testing.assert_array_equal(a, b)
        assert sorted(names(expanded(made))) == sorted(names(expanded(program)))


def test_a_run_goes_as_far_as_the_shape_is_the_same():
    joined(lambda x: (x * 2 + 1) ** 2, expect="elementwise")
    joined(lambda x: x - (x * x).sum(axis=1, keepdims=True) / 3,
           expect="multiply sum divide subtract")  # fmt: skip
    joined(lambda x: (abs(x * 2).T + 1) * 2, expect="elementwise transpose elementwise")


def test_what_somebody_else_looks_at_is_made_as_it_was():
    joined(lambda x: (x + 1, (x + 1) * 2), expect="add elementwise")

    def looked_at(x):
        y = x + 1
        return y * 2 - y, y.sum(axis=1)

    joined(looked_at, expect="add elementwise sum")

    def answered(x):
        y = x + 1
        return y, y * 2 - 3

    joined(answered, expect="add elementwise")


def test_a_value_that_a_run_looks_at_twice_is_within_it():
    def both(x):
        y = x * 2
        return y * y + y

    made = joined(both, expect="elementwise")
    assert len(made.steps[0].values) == 1


def test_two_runs_that_meet_only_in_what_they_read_are_two():
    def two(x):
        y = kernels.softmax(x)
        return y * 2 + 1, y * 3 - x

    joined(two, expect="softmax elementwise elementwise")


def test_others_types_and_shapes_stay_out_of_a_run():
    joined(lambda x: x.astype("float64") * 2 + 1, expect="astype multiply add")
    joined(lambda x: (x * 2).astype("float64") + 1, expect="multiply astype add")
    joined(lambda x: x * 2 + 1, ((4, 8), "float64"), expect="multiply add")
    joined(lambda x, y: x * y + 1, ((4, 8), "float32"), ((4, 8), "int64"), expect="multiply add")
    joined(lambda x: x + x[:1] * 2, expect="getitem multiply add")
    joined(lambda x, y: x * y + 1, ((4, 1), "float32"), ((1, 8), "float32"), expect="multiply add")
    joined(lambda x: nnxp.get_array_module(x).sin(x) * 2, expect="sin multiply")
    joined(lambda x: kernels.softmax(x * 2) * 3, expect="multiply softmax multiply")
    joined(lambda x: (x > 0) * 2 + x, expect="greater multiply add")


def test_equal_formulas_are_one():
    def four(x):
        y = kernels.softmax(x * 2 + 1)
        return kernels.softmax(y * 2 + 1), y * 3 + 1, (y + 4) * -0.0, (y + 4) * 0.0

    program = fused(trace(four, X))
    formulas = [step.options["formula"] for step in program.steps if step.name == "elementwise"]
    assert formulas[0] is formulas[1]
    assert len(set(formulas)) == len(formulas) - 1 == 4


def test_comparisons_and_choices_are_within_a_run():
    xp = nnxp.get_array_module

    def choice(x, mask):
        seen = xp(x).logical_and(mask, xp(x).logical_not(x > 1))
        return xp(x).where(seen, kernels.leaky_relu(x, negative_slope=0.3), x / 2)

    joined(choice, X, ((8,), "bool"), expect="elementwise")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_16_bits_are_rounded_once(dtype):
    program = fused(trace(lambda x: (x * 3 + 1000) - 1000, ((4, 8), dtype)))
    x = draw((4, 8), dtype)
    y = program(x)
    assert y.dtype == dtype
    wide = (x.astype("float32") * 3 + 1000) - 1000
    np.testing.assert_array_equal(y, wide.astype(dtype))


def test_only_programs_for_cupy_are_put_together():
    class Twice(nnxp.Layer):
        def __call__(self, x):
            return x * 2 + 1

    for place in ("cpu", "sim"):
        engine = nnxp.Engine(Twice(), place)
        np.testing.assert_array_equal(engine(draw((3, 4))), draw((3, 4)) * 2 + 1)
        (prepared,) = engine._first()._prepared.values()
        assert "elementwise" not in names(prepared.program)
