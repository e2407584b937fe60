"""Who computes it on a GPU: nnxp, its floor, and the others, each at the best setting known to us.

A contender is a function of a task that gives `run`, which computes its rows once, and may come
back before the device is done, and `wait`, which is then waited for. It takes part in a race as
bench/contenders.py says; this is its process:

    python bench/gpu_contenders.py NAME "784-4096-4096-10 relu 65536 fp16 stream cupy"

"stream": calls follow each other, and a turn is timed from one wait to another, by the same clock
for all: JAX lends nobody its stream to put events into. "each": every call is waited for.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np

import nnxp
from contenders import torch_net
from networks import Network, parse
from nnxp import kernels
from nnxp._arrays import float_dtype
from nnxp.kernels import ACTIVATIONS
from nnxp.kernels.linear import precision
from nnxp.race import FLOOR, Run, expected, serve
from nnxp.testing import bounded
from nnxp.testing.parity import Expected

Array = Any

PRECISIONS = {
    "fp32": ("float32", None),
    "tf32": ("float32", "tf32"),
    "fp16": ("float16", None),
    "bf16": ("bfloat16", None),
}
"""The type of rows, parameters and results, and what nnxp is told of the products."""

TF32_ROUNDOFF = 2.0**-11
CHECKED = 256  # rows of a task that are held against float64
BATCH = 0.03  # seconds of calls that are waited for together


@dataclass(frozen=True)
class Task:
    """A network and its rows, how exact it is computed, and on which of nnxp's backends."""

    network: Network
    precision: str
    waits: str = "stream"
    backend: str = "cupy"

    def __str__(self) -> str:
        return f"{self.network} {self.network.rows} {self.precision} {self.waits} {self.backend}"

    @classmethod
    def parse(cls, text: str) -> Task:
        *network, kind, waits, backend = text.split()
        return cls(parse(" ".join(network)), kind, waits, backend)

    @property
    def dtype(self) -> np.dtype[Any]:
        return float_dtype(PRECISIONS[self.precision][0])

    @property
    def tf32(self) -> str | None:
        return PRECISIONS[self.precision][1]

    @cached_property
    def rows(self) -> Array:
        return self.network.draw().astype(self.dtype, copy=False)

    def checked(self, rows: Array) -> Array:
        """Those of the rows that are held against float64."""
        return rows[:: max(1, len(rows) // CHECKED)]

    @cached_property
    def layers(self) -> list[tuple[Array, Array, str]]:
        return [
            (weight.astype(self.dtype, copy=False), bias.astype(self.dtype, copy=False), activation)
            for weight, bias, activation in self.network.layers()
        ]

    def model(self) -> nnxp.Sequential:
        return nnxp.Sequential(*(nnxp.Dense.of(*layer) for layer in self.layers))

    def expected(self, name: str) -> Expected:
        """What a contender of this name is to make of the rows that are checked."""
        rows = self.checked(self.rows)
        if name == "copy":
            sent = rows[:, : self.network.sizes[-1]]
            return Expected(sent.astype("float64"), np.zeros(sent.shape), self.dtype)
        return expected(partial(self._forward, bare=name == FLOOR), rows)

    def _forward(self, h: Array, bare: bool) -> Array:
        for weight, bias, activation in self.layers:
            w = bounded.asarray(weight)
            if self.tf32:
                h, w = _as_tf32(h), _as_tf32(w)
            if bare:
                h = kernels.matmul(h, w)
            else:
                b = bounded.asarray(bias)
                h = kernels.linear(h, w, b, activation=ACTIVATIONS[activation])
        return h


def _as_tf32(x: bounded.ndarray) -> bounded.ndarray:
    """x with the error that rounding it to TF32 may add."""
    return bounded.ndarray(x.value, np.hypot(x.error, TF32_ROUNDOFF * np.abs(x.value)), x.dtype)


class Built(NamedTuple):
    """What computes the task, what waits for a result, what brings it to the host, a setting."""

    run: Callable[[], Array]
    wait: Callable[[Array], object]
    host: Callable[[Array], Array]
    setting: str = ""


# nnxp and its floor


def ours(task: Task, way: str = "resident") -> Built:
    """An Engine, on rows on the device, or as NumPy has them on the "host", and back there.

    "eager": the model itself, called without an engine, which replays nothing.
    """
    engine = nnxp.Engine(task.model(), task.backend, precision=task.tf32)
    backend = engine.backend
    x = task.rows if way == "host" else backend.put(task.rows)
    run = engine.model if way == "eager" else engine
    return Built(lambda: run(x), lambda y: backend.synchronize(), nnxp.asnumpy)


def floor(task: Task) -> Built:
    """The bare products, each with the layout of its weight that is the faster here."""
    precision.set(task.tf32)  # for as long as this process lives
    backend = nnxp.get_backend(task.backend)

    def wait(y: Array) -> None:
        backend.synchronize()

    x = h = backend.put(task.rows)
    weights, chosen = [], []
    for weight, _, _ in task.layers:
        turned = np.ascontiguousarray(weight.T)
        ways = {"(in, out)": backend.put(weight), "(out, in)": backend.put(turned).T}
        took = {name: seconds(partial(kernels.matmul, h, w), wait) for name, w in ways.items()}
        chosen.append(min(took, key=lambda name: took[name]))
        weights.append(ways[chosen[-1]])
        h = kernels.matmul(h, weights[-1])

    def run() -> Array:
        h = x
        for weight in weights:
            h = kernels.matmul(h, weight)
        return h

    return Built(run, wait, nnxp.asnumpy, f"{_products(task)}; weights {', '.join(chosen)}")


def _products(task: Task) -> str:
    """Whose products the floor is made of."""
    if task.backend != "cupy":
        return f"products of {task.backend}"
    from nnxp.kernels.cuda._lt import why_not

    why = why_not()
    return "cuBLASLt" if why is None else f"cupy.matmul, because {why}"


def copy(task: Task) -> Built:
    """No computing: the rows to the device and as much as the result back, from pinned memory."""
    backend, outputs = nnxp.get_backend(task.backend), task.network.sizes[-1]
    if task.backend != "cupy":
        return Built(
            lambda: backend.get(backend.put(task.rows)[:, :outputs]), lambda y: None, np.asarray
        )
    import cupyx

    def pinned(shape: tuple[int, ...]) -> Array:
        size = math.prod(shape) * task.dtype.itemsize
        return cupyx.empty_pinned(size, "uint8").view(task.dtype).reshape(shape)

    sent, back = pinned(task.rows.shape), pinned((len(task.rows), outputs))
    sent[...] = task.rows
    there = backend.put(task.rows)

    def run() -> Array:
        there.set(sent)
        there[:, :outputs].copy().get(out=back)
        return back

    return Built(run, lambda y: backend.synchronize(), np.asarray)


def seconds(
    run: Callable[[], Array], wait: Callable[[Array], object], least: float = BATCH
) -> float:
    """What one of many calls takes, the best of three times."""
    wait(run())
    calls = _calls(run, wait, least)
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(calls):
            y = run()
        wait(y)
        best = min(best, (time.perf_counter() - start) / calls)
    return best


def _calls(run: Callable[[], Array], wait: Callable[[Array], object], least: float) -> int:
    """How many calls take so many seconds."""
    start = time.perf_counter()
    wait(run())
    return max(1, min(10_000, math.ceil(least / (time.perf_counter() - start))))


# the others


def naive(task: Task) -> Built:
    """CuPy as one writes it down."""
    xp = importlib.import_module({"sim": "nnxp.sim"}.get(task.backend, task.backend))
    ways: dict[str, Callable[[Array], Array]] = {
        "relu": lambda h: xp.maximum(h, h.dtype.type(0)),
        "identity": lambda h: h,
    }
    x = xp.asarray(task.rows)
    layers = [(xp.asarray(w), xp.asarray(b), ways[name]) for w, b, name in task.layers]

    def run() -> Array:
        h = x
        for weight, bias, activation in layers:
            h = activation(h @ weight + bias)
        return h

    def wait(y: Array) -> None:
        if task.backend == "cupy":
            xp.cuda.Device().synchronize()

    return Built(run, wait, lambda y: y if isinstance(y, np.ndarray) else y.get())


def torch(task: Task, way: str = "eager") -> Built:
    """A module on rows that are there: as it is, compiled, or recorded in a CUDA graph.

    "host": rows in pinned memory, results in the host's.
    """
    import torch

    torch.set_float32_matmul_precision("high" if task.tf32 else "highest")
    torch.inference_mode().__enter__()  # for as long as this process lives
    device = "cuda" if task.backend == "cupy" else "cpu"
    dtype = getattr(torch, PRECISIONS[task.precision][0])
    net = torch_net(task.network).to(device, dtype)
    here = torch.from_numpy(task.network.draw()).to(dtype)
    rows = here.to(device)

    def wait(y: Array) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def host(y: Array) -> Array:
        return y.float().cpu().numpy().astype(task.dtype)

    if way == "host":
        sent = here.pin_memory() if device == "cuda" else here
        return Built(lambda: net(sent.to(device, non_blocking=True)).cpu(), wait, host)
    if way == "graph":
        return Built(_recorded(torch, net, rows), wait, host)
    if way != "eager":
        net = torch.compile(net, fullgraph=True, dynamic=False, mode=way)
    return Built(lambda: net(rows), wait, host)


def _recorded(torch: Any, net: Any, rows: Any) -> Callable[[], Array]:
    """One launch for all of it, once the rows are in its buffer, where new ones would go, too."""
    x, stream = rows.clone(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            net(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = net(x)

    def run() -> Array:
        x.copy_(rows)
        graph.replay()
        return y

    return run


def jax(task: Task) -> Built:
    """One function, jitted; rows and weights are on the device."""
    import jax
    import jax.numpy as jnp

    if task.backend == "cupy" and jax.default_backend() != "gpu":
        raise RuntimeError(f"JAX computes on {jax.default_backend()} here")
    jax.config.update("jax_default_matmul_precision", "tensorfloat32" if task.tf32 else "highest")
    weights = jax.device_put([layer[:2] for layer in task.layers])
    x = jax.device_put(task.rows)

    def forward(weights: Any, h: Any) -> Any:
        for (weight, bias), (_, _, activation) in zip(weights, task.layers, strict=True):
            h = h @ weight + bias
            h = jnp.maximum(h, 0) if activation == "relu" else h
        return h

    jitted = jax.jit(forward)
    return Built(lambda: jitted(weights, x), lambda y: y.block_until_ready(), np.asarray)


@dataclass(frozen=True)
class Rival:
    """How a contender is built, and the modules that it needs, of which versions matter."""

    build: Callable[[Task], Built]
    modules: tuple[str, ...]


CONTENDERS = {
    FLOOR: Rival(floor, ("cupy",)),
    "nnxp": Rival(ours, ("nnxp", "numpy", "cupy")),
    "nnxp-host": Rival(partial(ours, way="host"), ("nnxp", "numpy", "cupy")),
    "nnxp-eager": Rival(partial(ours, way="eager"), ("nnxp", "numpy", "cupy")),
    "naive": Rival(naive, ("cupy",)),
    "torch": Rival(torch, ("torch",)),
    "torch-host": Rival(partial(torch, way="host"), ("torch",)),
    "torch-graph": Rival(partial(torch, way="graph"), ("torch",)),
    "torch-compile": Rival(partial(torch, way="default"), ("torch",)),
    "torch-max-autotune": Rival(partial(torch, way="max-autotune"), ("torch",)),
    "jax": Rival(jax, ("jax",)),
    "copy": Rival(copy, ("cupy",)),
}


# its process


class Answer:
    """A result that is still where it was computed; as an array it is the rows that are checked."""

    def __init__(self, task: Task, built: Built, y: Array) -> None:
        self.task, self.built, self.y = task, built, y

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return self.task.checked(self.built.host(self.y))


def timed(task: Task, built: Built) -> tuple[Run, int]:
    """What a race calls: one call of the contender or many, waited for, and how many they are."""
    built.wait(built.run())  # compiles, and tries what there is to be tried
    calls = _calls(built.run, built.wait, BATCH) if task.waits == "stream" else 1

    def run() -> Array:
        for _ in range(calls):
            y = built.run()
        built.wait(y)
        return Answer(task, built, y)

    return run, calls


def main() -> None:
    name, text = sys.argv[1:]
    rival, task = CONTENDERS[name], Task.parse(text)
    if name == "naive" and task.tf32:
        os.environ["CUPY_TF32"] = "1"  # read once, when CuPy is loaded
    names = [each for each in rival.modules if each != "cupy" or task.backend == "cupy"]
    problem: ImportError | None = None
    try:  # before the race hears of us, so that all load at the same time
        modules = [importlib.import_module(each) for each in names]
    except ImportError as error:
        problem = error
    _ = task.rows, task.layers

    def build() -> tuple[Run, dict[str, Any]]:
        if problem is not None:
            raise problem
        built = rival.build(task)
        run, calls = timed(task, built)
        versions = {each.__name__: each.__version__ for each in modules}
        return run, {"versions": versions, "setting": built.setting, "calls": calls}

    serve(build)


if __name__ == "__main__":
    main()
