"""The smallest network of the tutorials, 2 inputs, 2 hidden neurons, 1 output, in nnxp.

The tutorial that this project started from prints hidden values [0.545, 0.442] and the output 0.488
for it. Its code, run as it is given, yields others: the printed ones cannot be reproduced.
"""

from __future__ import annotations

import numpy as np
import pytest

import nnxp
from conftest import every_backend


def tutorial():
    """The tutorial's code as it is given: its weights, its input, and what that yields."""
    legacy = np.random.RandomState(42)  # the stream of np.random.seed(42), without the global state
    w1, w2 = legacy.randn(2, 2), legacy.randn(2, 1)
    b1, b2 = np.zeros((1, 2)), np.zeros((1, 1))
    x = np.array([[0.5, 0.8]])
    hidden = 1 / (1 + np.exp(-(np.dot(x, w1) + b1)))
    output = 1 / (1 + np.exp(-(np.dot(hidden, w2) + b2)))
    return w1, b1, w2, b2, x, hidden, output


def test_the_tutorial_s_code_yields_these_values_and_not_the_ones_it_prints():
    *_, hidden, output = tutorial()
    np.testing.assert_allclose(hidden, [[0.683, 0.759]], atol=5e-4)
    np.testing.assert_allclose(output, [[0.416]], atol=5e-4)
    assert not np.allclose(hidden, [[0.545, 0.442]], atol=0.1)
    assert not np.allclose(output, [[0.488]], atol=0.05)


@every_backend
def test_nnxp_yields_what_the_tutorial_s_code_yields(backend):
    w1, b1, w2, b2, x, hidden, output = tutorial()
    net = nnxp.Sequential(
        nnxp.Dense.of(w1, b1[0], "sigmoid"), nnxp.Dense.of(w2, b2[0], "sigmoid")
    ).to(backend)
    seen = net.activations(nnxp.to_backend(x, backend))
    np.testing.assert_allclose(nnxp.asnumpy(seen["layers.0"]), hidden, rtol=1e-14)
    np.testing.assert_allclose(nnxp.asnumpy(seen["output"]), output, rtol=1e-14)
    assert nnxp.predict(net, x, backend) == pytest.approx(output, rel=1e-14)
