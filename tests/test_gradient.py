"""Gradients of programs: every rule against central differences, torch, and the reference bodies."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import draw, every_layer

import nnxp
from nnxp import kernels
from nnxp._errors import NotDifferentiable
from nnxp.kernels.functions import RULES
from nnxp.program import traced as xp
from nnxp.program.gradient import gradient, pullback
from nnxp.program.program import trace

STEP = 1e-5
BITS = np.array([[True, False, True], [False, False, True]])


def positive(shape, seed=0):
    return np.abs(draw(shape, "float64", seed)) + 0.5


def unit(shape, seed=0):
    return np.tanh(draw(shape, "float64", seed)) * 0.9


def normal(*shape, seed=0):
    return draw(shape, "float64", seed)


ids = np.array([[2, 0], [2, 1]])
with_zeros = np.array([[2.0, 0.0, -1.5], [0.0, 0.0, 3.0]])
# a formula for every rule, with the arrays by which it is differentiated
CASES = {
    **{name: (getattr(xp, name), [normal(2, 3)]) for name in
       """exp exp2 expm1 absolute sin cos tan arctan sinh cosh tanh arcsinh square negative positive
       reciprocal nan_to_num copy tril triu""".split()},
    **{name: (getattr(xp, name), [positive((2, 3))]) for name in "log log2 log10 log1p sqrt".split()},
    **{name: (getattr(xp, name), [unit((2, 3))]) for name in "arcsin arccos arctanh".split()},
    "arccosh": (xp.arccosh, [positive((2, 3)) + 1]),
    **{name: (getattr(xp, name), [normal(2, 3), normal(3, seed=1)]) for name in
       """add subtract multiply divide arctan2 hypot logaddexp maximum minimum fmax fmin""".split()},
    **{name: (getattr(xp, name), [normal(2, 3), positive(3, seed=1)]) for name in
       "remainder fmod".split()},
    "power": (xp.power, [positive((2, 3)), normal(2, 1, seed=1)]),
    "power of 3": (lambda x: x**3, [normal(2, 3)]),
    "power of 2 by x": (lambda x: 2.0**x, [normal(2, 3)]),
    "astype": (lambda x: x.astype("float64"), [normal(2, 3)]),
    "where": (lambda x, y: xp.where(BITS, x, y), [normal(2, 3), normal(3, seed=1)]),
    "clip": (lambda x: xp.clip(x, -0.5, 0.5), [normal(2, 3)]),
    "clip low": (lambda x: xp.clip(x, None, 0.5), [normal(2, 3)]),
    "assign": (lambda x, y: _assigned(x, y), [normal(3, 4), normal(4, seed=1)]),
    "in place": (lambda x, y: _in_place(x, y), [normal(3, 4), normal(3, 2, seed=1)]),
    "sum": (lambda x: xp.sum(x, axis=(0, 2)), [normal(2, 3, 4)]),
    "mean": (lambda x: xp.mean(x, axis=-1, keepdims=True), [normal(2, 3)]),
    "var": (lambda x: xp.var(x, axis=0, ddof=1), [normal(4, 3)]),
    "std": (lambda x: xp.std(x), [normal(4, 3)]),
    "max": (lambda x: x.max(axis=1), [normal(4, 3)]),
    "min": (lambda x: x.min(), [normal(4, 3)]),
    "ptp": (lambda x: xp.ptp(x, axis=1), [normal(4, 3)]),
    "prod": (lambda x: xp.prod(x, axis=1), [with_zeros]),
    "prod of all": (lambda x: xp.prod(x, axis=(0, 2)), [normal(2, 3, 2)]),
    "median": (lambda x: xp.median(x, axis=1), [normal(3, 4)]),
    "median of all": (lambda x: xp.median(x), [normal(3, 5)]),
    "norm": (lambda x: xp.linalg.norm(x, axis=1), [normal(3, 4)]),
    "norm 1": (lambda x: xp.linalg.norm(x, 1, axis=1), [normal(3, 4)]),
    "cumsum": (lambda x: xp.cumsum(x, axis=1), [normal(3, 4)]),
    "cumsum of all": (xp.cumsum, [normal(3, 4)]),
    "cumprod": (lambda x: xp.cumprod(x, axis=1), [with_zeros]),
    "cumprod of all": (xp.cumprod, [normal(2, 3)]),
    "sort": (lambda x: xp.sort(x, axis=0), [normal(4, 3)]),
    "reshape": (lambda x: x.reshape(3, 2), [normal(2, 3)]),
    "expand_dims": (lambda x: xp.expand_dims(x, 1), [normal(2, 3)]),
    "squeeze": (xp.squeeze, [normal(2, 1, 3)]),
    "broadcast_to": (lambda x: xp.broadcast_to(x, (4, 2, 3)), [normal(2, 1)]),
    "swapaxes": (lambda x: x.swapaxes(0, 2), [normal(2, 3, 4)]),
    "moveaxis": (lambda x: xp.moveaxis(x, (0, 1), (2, 0)), [normal(2, 3, 4)]),
    "transpose": (lambda x: x.transpose(2, 0, 1), [normal(2, 3, 4)]),
    "T": (lambda x: x.T, [normal(2, 3, 4)]),
    "flip": (lambda x: xp.flip(x, 1), [normal(2, 3)]),
    "roll": (lambda x: xp.roll(x, (1, 2), (0, 1)), [normal(2, 3)]),
    "concatenate": (lambda x, y: xp.concatenate([x, y], axis=1), [normal(2, 3), normal(2, 1)]),
    "stack": (lambda x, y: xp.stack([x, y, x], axis=1), [normal(2, 3), normal(2, 3)]),
    "split": (lambda x: xp.split(x, [1, 3], axis=1)[1], [normal(2, 4)]),
    "getitem": (lambda x: x[1, ::-2] * x[0, 1:3], [normal(2, 4)]),
    "getitem by ids": (lambda x: x[:, ids], [normal(2, 3)]),
    "pad": (lambda x: xp.pad(x, ((1, 0), (2, 1)), constant_values=7), [normal(2, 3)]),
    "pad reflect": (lambda x: xp.pad(x, ((1, 0), (2, 1)), mode="reflect"), [normal(2, 3)]),
    "pad edge": (lambda x: xp.pad(x, 1, mode="edge"), [normal(2, 3)]),
    "repeat": (lambda x: xp.repeat(x, 2, axis=1), [normal(2, 3)]),
    "repeat some": (lambda x: xp.repeat(x, [1, 0, 3], axis=1), [normal(2, 3)]),
    "repeat all": (lambda x: xp.repeat(x, 2), [normal(2, 3)]),
    "tile": (lambda x: xp.tile(x, (2, 1, 3)), [normal(2, 3)]),
    "diagonal": (lambda x: xp.diagonal(x, 1, 1, 0), [normal(4, 3, 2)]),
    "sliding_window_view": (
        lambda x: xp.lib.stride_tricks.sliding_window_view(x, (2, 3), (1, 2))[:, ::2],
        [normal(2, 5, 6)],
    ),
    "take": (lambda x: xp.take(x, ids, axis=1), [normal(2, 3, 2)]),
    "take of all": (lambda x: xp.take(x, ids), [normal(2, 3)]),
    "take_along_axis": (lambda x: xp.take_along_axis(x, ids, axis=1), [normal(2, 3)]),
    "take one along": (lambda x: xp.take_along_axis(x, ids[:, :1], axis=1), [normal(2, 3)]),
    "diff": (lambda x: xp.diff(x, 2, axis=0), [normal(5, 2)]),
    "matmul": (xp.matmul, [normal(2, 3, 4), normal(4, 5, seed=1)]),
    "matmul broadcast": (xp.matmul, [normal(3, 4), normal(2, 4, 5, seed=1)]),
    "matmul batched": (xp.matmul, [normal(2, 1, 3, 4), normal(5, 4, 2, seed=1)]),
    "matmul of vectors": (xp.matmul, [normal(4), normal(4, seed=1)]),
    "matmul vector": (xp.matmul, [normal(2, 3, 4), normal(4, seed=1)]),
    "vector matmul": (xp.matmul, [normal(4), normal(2, 4, 3, seed=1)]),
    "dot": (xp.dot, [normal(3, 4), normal(4, seed=1)]),
    "outer": (xp.outer, [normal(3), normal(2, 2, seed=1)]),
    "tensordot": (lambda a, b: xp.tensordot(a, b, ((2, 0), (1, 2))),
                  [normal(2, 3, 4), normal(5, 4, 2, seed=1)]),
    "tensordot 2": (xp.tensordot, [normal(2, 3, 4), normal(3, 4, 5, seed=1)]),
    "einsum": (lambda a, b: xp.einsum("bij,bjk->ik", a, b), [normal(2, 3, 4), normal(2, 4, 2)]),
    "einsum sums": (lambda a, b: xp.einsum("ij,k->i", a, b), [normal(2, 3), normal(4)]),
    "einsum trace": (lambda a: xp.einsum("...ii->...", a), [normal(2, 3, 3)]),
}  # fmt: skip


def _assigned(x, y):
    z = x * 1.0
    z[1:2] = y
    z[0, ::2] = 0.0
    return z


def _in_place(x, y):
    z = x + 0.0
    z *= 2
    z[:, 1:3] = z[:, 1:3] + y * z[:, 2:4]
    np.maximum(z, y[:, :1], out=z)
    z -= z.mean(axis=0)
    return z


def worth_of(shape):
    return draw(shape, "float64", 9)


def gradients(function, arrays):
    """By reverse mode: the gradients of sum(worth * function(*arrays))."""
    program = trace(function, *((x.shape, x.dtype) for x in arrays))
    worth = [worth_of(v.shape) for v in program.outputs]
    made = pullback(program, program.inputs).run([*arrays, *worth])
    return made[len(worth) :]


def differences(function, arrays):
    """By central differences, one element after the other."""
    program = trace(function, *((x.shape, x.dtype) for x in arrays))

    def weighed(*given):
        return sum((worth_of(y.shape) * y).sum() for y in program.run(given))

    for i, x in enumerate(arrays):
        slope = np.zeros_like(x)
        for at in np.ndindex(x.shape):
            ends = []
            for step in (STEP, -STEP):
                moved = [each.copy() for each in arrays]
                moved[i][at] += step
                ends.append(weighed(*moved))
            slope[at] = (ends[0] - ends[1]) / (2 * STEP)
        yield slope


def assert_right(function, arrays, rtol=1e-7):
    for made, wanted in zip(
        gradients(function, arrays), differences(function, arrays), strict=True
    ):
        assert made.shape == wanted.shape
        np.testing.assert_allclose(made, wanted, rtol=rtol, atol=rtol * max(1, abs(wanted).max()))


@pytest.mark.parametrize("name", CASES)
def test_every_rule_agrees_with_central_differences(name):
    assert_right(*CASES[name])


def test_every_rule_has_a_case():
    assert set(RULES) == {name.partition(" ")[0] for name in CASES} - {"T", "in", "vector"}
