"""What is computed: networks of dense layers, with the same weights and rows for everybody."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import nnxp

Array = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Network:
    """Dense layers of these sizes; all but the last have the activation. `rows` go through it."""

    sizes: tuple[int, ...]
    activation: str
    rows: int

    def __str__(self) -> str:
        return f"{'-'.join(map(str, self.sizes))} {self.activation}"

    def layers(self) -> list[tuple[Array, Array, str]]:
        """(weight (inputs, outputs), bias (outputs,), activation) of each layer, always the same.

        Glorot's weights, so that the activations keep their size; small biases.
        """
        rng = np.random.default_rng(0)
        made = []
        for inputs, outputs in zip(self.sizes, self.sizes[1:], strict=False):
            weight = rng.standard_normal((inputs, outputs), "float32")
            weight *= np.float32((2 / (inputs + outputs)) ** 0.5)
            bias = rng.standard_normal(outputs, "float32") / 10
            made.append((weight, bias.astype("float32"), self.activation))
        made[-1] = (*made[-1][:2], "identity")
        return made

    def draw(self) -> Array:
        """Its rows, normal numbers, always the same."""
        return np.random.default_rng(1).standard_normal((self.rows, self.sizes[0]), "float32")

    def model(self) -> nnxp.Sequential:
        """The same as nnxp has it."""
        return nnxp.Sequential(*(nnxp.Dense.of(*layer) for layer in self.layers()))

    def of(self, rows: int) -> Network:
        """The same for another number of rows."""
        return replace(self, rows=rows)


NETWORKS = [
    Network((784, 128, 64, 10), "relu", 65536),
    Network((784, 512, 256, 10), "sigmoid", 32768),
    Network((784, 1024, 1024, 10), "relu", 8192),
    Network((784, 1024, 1024, 10), "tanh", 8192),
    Network((64, 64, 64, 64, 64, 10), "tanh", 131072),
    Network((2048, 4096, 4096, 1000), "relu", 2048),
]
LATENCY = [NETWORKS[0].of(rows) for rows in (1, 16, 64, 512)]
MEMORY = [NETWORKS[1].of(rows) for rows in (8192, 32768, 131072)]

SMALL = [Network((20, 16, 4), "sigmoid", 600)]
SMALL_LATENCY = [Network((20, 16, 8, 4), "relu", 1)]
SMALL_MEMORY = [Network((20, 16, 4), "tanh", 300)]


def parse(text: str) -> Network:
    """The network of "784-128-64-10 relu 65536"."""
    sizes, activation, rows = text.split()
    return Network(tuple(int(size) for size in sizes.split("-")), activation, int(rows))
