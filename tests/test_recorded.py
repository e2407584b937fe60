"""What a program must know of memory: which reshapes are copies, and where constants live."""

from __future__ import annotations

import numpy as np

import nnxp
from conftest import draw
from nnxp._arrays import xp_of
from nnxp.program.recording import Recording


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
