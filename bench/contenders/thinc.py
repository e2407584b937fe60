"""thinc: a chain of its layers."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from contenders import Built, Run, tried
from networks import Task

MODULES = ("thinc", "numpy", "blis")


def chain(task: Task) -> Built:
    """With its own products (BLIS, one thread) or NumPy's."""
    from thinc import api

    def tanh(model: Any, given: Any, is_train: bool) -> Any:
        made = model.ops.affine(given, model.get_param("W"), model.get_param("b"))
        return model.ops.xp.tanh(made, out=made), lambda gradient: gradient

    def tanh_layer(outputs: int, inputs: int) -> Any:  # thinc has none
        dims = {"nO": outputs, "nI": inputs}
        return api.Model("tanh", tanh, dims=dims, params={"W": None, "b": None})

    kinds = {
        "relu": api.Relu,
        "sigmoid": api.Sigmoid,
        "tanh": tanh_layer,
        "identity": api.Linear,
    }

    def prepare(use_blis: bool) -> Run:
        api.set_current_ops(api.NumpyOps(use_blis=use_blis))
        layers = []
        for weight, bias, activation in task.network.layers():
            inputs, outputs = weight.shape
            layer = kinds[activation](outputs, inputs)
            layer.set_param("W", np.ascontiguousarray(weight.T))
            layer.set_param("b", bias)
            layers.append(layer)
        net, x = api.chain(*layers), task.rows
        return lambda: net.predict(x)

    return tried(task, {"NumPy's BLAS": partial(prepare, False), "BLIS": partial(prepare, True)})


CPU, GPU = {"thinc": chain}, {}
