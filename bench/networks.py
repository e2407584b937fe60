"""What is computed: networks of dense layers, with the same weights and rows for everybody."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

import nnxp
from nnxp import kernels
from nnxp._arrays import float_dtype
from nnxp.backend.cpu import one_blas_thread, worker_count
from nnxp.floor import FLOOR
from nnxp.testing import bounded, error_bound
from nnxp.testing.parity import Expected

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


PRECISIONS = {
    "fp32": ("float32", None),
    "tf32": ("float32", "tf32"),
    "fp16": ("float16", None),
    "bf16": ("bfloat16", None),
}
"""The type of rows, parameters and results, and what nnxp is told of the products."""

TF32_ROUNDOFF = 2.0**-11
CHECKED = 256  # rows of a task on a GPU that are held against float64
BLOCK = 512  # rows that float64 takes together


@dataclass(frozen=True)
class Task:
    """A network and its rows, how exact it is computed, on which of nnxp's backends, and how.

    On "numpy" everything is in host memory. Elsewhere rows are on the device, and of the results
    some are compared. waits: "each" call is waited for, or those of a "stream" together. trial:
    the seconds that each setting is tried for; 0 takes the first, for a trial takes memory.
    """

    network: Network
    precision: str = "fp32"
    waits: str = "each"
    backend: str = "numpy"
    trial: float = 0.5

    def __str__(self) -> str:
        how = f"{self.precision} {self.waits} {self.backend} {self.trial:g}"
        return f"{self.network} {self.network.rows} {how}"

    @classmethod
    def parse(cls, text: str) -> Task:
        """The task of "784-4096-4096-10 relu 65536 fp16 stream cupy 0.5"."""
        sizes, activation, rows, precision, waits, backend, trial = text.split()
        network = Network(tuple(map(int, sizes.split("-"))), activation, int(rows))
        return cls(network, precision, waits, backend, float(trial))

    @property
    def on_cpu(self) -> bool:
        return self.backend == "numpy"

    @property
    def dtype(self) -> np.dtype[Any]:
        return float_dtype(PRECISIONS[self.precision][0])

    @property
    def tf32(self) -> str | None:
        return PRECISIONS[self.precision][1]

    @cached_property
    def rows(self) -> Any:
        return self.network.draw().astype(self.dtype, copy=False)

    def checked(self, rows: Any) -> Any:
        """Those of the rows that are held against float64."""
        return rows if self.on_cpu else rows[:: max(1, len(rows) // CHECKED)]

    @cached_property
    def layers(self) -> list[tuple[Any, Any, str]]:
        return [
            (weight.astype(self.dtype, copy=False), bias.astype(self.dtype, copy=False), activation)
            for weight, bias, activation in self.network.layers()
        ]

    def model(self) -> nnxp.Sequential:
        """The same as nnxp has it."""
        return nnxp.Sequential(*(nnxp.Dense.of(*layer) for layer in self.layers))

    def expected(self, name: str) -> Expected:
        """What a contender of this name is to make of the rows that are checked, in float64."""
        x = self.checked(self.rows)
        if name == "copy":
            sent = x[:, : self.network.sizes[-1]]
            return Expected(sent.astype("float64"), np.zeros(sent.shape), self.dtype)
        forward = partial(self._forward, bare=name.startswith(FLOOR))
        blocks = [x[i : i + BLOCK] for i in range(0, len(x), BLOCK)]
        with one_blas_thread(), ThreadPoolExecutor(worker_count()) as pool:
            values, errors = zip(*pool.map(partial(error_bound, forward), blocks), strict=True)
        return Expected(np.concatenate(values), np.concatenate(errors), x.dtype)

    def _forward(self, h: Any, bare: bool) -> Any:
        for weight, bias, activation in self.layers:
            w = bounded.asarray(weight)
            if self.tf32:
                h, w = _as_tf32(h), _as_tf32(w)
            if bare:
                h = kernels.matmul(h, w)
            else:
                b = bounded.asarray(bias)
                h = kernels.linear(h, w, b, activation=kernels.ACTIVATIONS[activation])
        return h


def _as_tf32(x: bounded.ndarray) -> bounded.ndarray:
    """x with the error that rounding it to TF32 may add."""
    return bounded.ndarray(x.value, np.hypot(x.error, TF32_ROUNDOFF * np.abs(x.value)), x.dtype)
