"""What every test may use: every example of every layer, the backends, and rows drawn at random."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import nnxp
from nnxp.backend import _threads
from nnxp.layers import MODULES

BACKENDS = [name for name, found in nnxp.available_backends().items() if found.ok]
DTYPES = ("float16", "bfloat16", "float32", "float64")
LAYERS = [getattr(nnxp, name) for name in MODULES]
SEQUENCES = set(
    "attention rnn gru lstm linear_gru linear_lstm embedding rotary add_positions".split()
)
"""Kernels that have their outside truth, and their faults, in test_sequences.py."""
PAIRS = [pair for kind in LAYERS for pair in kind.examples()]


def _named(pairs):
    return [
        pytest.param(layer, shape, id=f"{layer!r}-{'x'.join(map(str, shape))}"[:60])
        for layer, shape in pairs
    ]


def _swept(layer, shape):
    """Whether an engine takes it: one array of floats, and one answered."""
    floats = not isinstance(shape, list) and layer.takes[:1] != ("int",)
    return floats and type(layer.output_shape(shape)[0]) is int


OTHERS = [pair for pair in PAIRS if not _swept(*pair)]
every_layer = pytest.mark.parametrize(("layer", "shape"), _named(PAIRS))
every_swept_layer = pytest.mark.parametrize(
    ("layer", "shape"), _named(pair for pair in PAIRS if _swept(*pair))
)
every_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True)  # the plugin's fixture
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def at_work():
    """How many threads there are, but for those of ours that wait for work."""
    waiting = {aside._thread for aside in _threads._idle}
    return len([thread for thread in threading.enumerate() if thread not in waiting])


def draw(shape, dtype="float32", seed=0):
    """Normal numbers, the same ones each time."""
    return np.random.default_rng(seed).normal(size=shape).astype(nnxp._arrays.float_dtype(dtype))


def draw_inputs(layer, shapes, dtype="float32", rows=None):
    """What a layer takes: numbers, ids from 0 to 2, True and False, None for what is left out."""
    rng, drawn = np.random.default_rng(0), []
    for i, shape in enumerate(shapes if isinstance(shapes, list) else [shapes]):
        kind = layer.takes[i] if i < len(layer.takes) else "float"
        kind = "float" if kind.startswith("float") else "int" if kind.startswith("int") else kind
        if shape is not None and rows is not None:
            shape = (rows, *shape[1:])
        if shape is None:
            drawn.append(None)
        elif kind == "int":
            drawn.append(rng.integers(0, 3, shape))
        elif kind == "any":
            drawn.append(rng.random(shape) < 0.7)
        else:
            drawn.append(draw(shape, layer.dtype or dtype, i))
    return tuple(drawn)


def results(y):
    """What a layer answers, as a tuple."""
    return y if isinstance(y, tuple) else (y,)


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
