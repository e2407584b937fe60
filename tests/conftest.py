"""What every test may use: every example of every layer, the backends, and rows drawn at random."""

from __future__ import annotations

import numpy as np
import pytest

import nnxp

BACKENDS = [name for name, found in nnxp.available_backends().items() if found.ok]
DTYPES = ("float16", "bfloat16", "float32", "float64")
LAYERS = [
    each
    for each in vars(nnxp).values()
    if isinstance(each, type) and issubclass(each, nnxp.Layer) and each is not nnxp.Layer
]
EXAMPLES = [
    pytest.param(layer, shape, id=f"{layer!r}-{'x'.join(map(str, shape))}"[:60])
    for kind in LAYERS
    for layer, shape in kind.examples()
    if isinstance(shape, tuple)  # layers of several inputs have tests of their own
]

every_layer = pytest.mark.parametrize(("layer", "shape"), EXAMPLES)
every_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True)  # the plugin's fixture
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def draw(shape, dtype="float32", seed=0):
    """Normal numbers, the same ones each time."""
    return np.random.default_rng(seed).normal(size=shape).astype(nnxp._arrays.float_dtype(dtype))


@pytest.fixture
def sim():
    """The first simulated device, its counters at zero."""
    device = nnxp.sim.Device(0)
    device.reset()
    yield device
    device.reset()


@pytest.fixture(autouse=True)
def _the_environment_of_the_caller_is_not_seen(monkeypatch):
    monkeypatch.delenv("NNXP_BACKEND", raising=False)
    monkeypatch.delenv("NNXP_WORKERS", raising=False)
