"""JAX: one function, jitted."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from contenders import Built, Run, tried
from networks import Task

MODULES = ("jax", "jaxlib")


def _forward(task: Task, weights: Any, h: Any) -> Any:
    import jax
    import jax.numpy as jnp

    activations = {
        "relu": jax.nn.relu,
        "sigmoid": jax.nn.sigmoid,
        "tanh": jnp.tanh,
        "identity": lambda h: h,
    }
    for (weight, bias), (_, _, activation) in zip(weights, task.layers, strict=True):
        h = activations[activation](h @ weight + bias)
    return h


def on_cpu(task: Task) -> Built:
    """The rows come from NumPy, the weights are on the device, or are part of the program."""
    import jax

    weights = jax.device_put([layer[:2] for layer in task.layers])
    forward, x = partial(_forward, task), task.rows

    def arguments() -> Run:
        jitted = jax.jit(forward)
        return lambda: np.asarray(jitted(weights, x).block_until_ready())

    def constants() -> Run:
        jitted = jax.jit(partial(forward, weights))
        return lambda: np.asarray(jitted(x).block_until_ready())

    return tried(task, {"weights as arguments": arguments, "weights as constants": constants})


def resident(task: Task) -> Built:
    """Rows and weights are on the device."""
    import jax

    if task.backend == "cupy" and jax.default_backend() != "gpu":
        raise RuntimeError(f"JAX computes on {jax.default_backend()} here")
    jax.config.update("jax_default_matmul_precision", "tensorfloat32" if task.tf32 else "highest")
    weights = jax.device_put([layer[:2] for layer in task.layers])
    x = jax.device_put(task.rows)
    jitted = jax.jit(partial(_forward, task))
    return Built(lambda: jitted(weights, x), "", lambda y: y.block_until_ready(), np.asarray)


CPU, GPU = {"jax": on_cpu}, {"jax": resident}
