"""NumPy and CuPy as one writes it down."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import numpy as np

from contenders import Array, Built
from networks import Task

MODULES = ("numpy", "cupy")


def naive(task: Task) -> Built:
    """A product, a bias and an activation, layer by layer; BLAS' own threads."""
    xp = importlib.import_module({"sim": "nnxp.sim"}.get(task.backend, task.backend))
    activations: dict[str, Callable[[Array], Array]] = {
        "relu": lambda h: xp.maximum(h, h.dtype.type(0)),
        "sigmoid": lambda h: 1 / (1 + xp.exp(-h)),
        "tanh": lambda h: xp.tanh(h),
        "identity": lambda h: h,
    }
    x = xp.asarray(task.rows)
    layers = [(xp.asarray(w), xp.asarray(b), activations[name]) for w, b, name in task.layers]

    def run() -> Array:
        h = x
        for weight, bias, activation in layers:
            h = activation(h @ weight + bias)
        return h

    def wait(y: Array) -> None:
        if task.backend == "cupy":
            xp.cuda.Device().synchronize()

    return Built(run, "", wait, lambda y: y if isinstance(y, np.ndarray) else y.get())


CPU = GPU = {"naive": naive}
