"""PyTorch: a module, called, moved to oneDNN, compiled, or recorded in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from contenders import Array, Built, Run, by_threads, tried
from networks import PRECISIONS, Task

MODULES = ("torch",)


def module(task: Task) -> Any:
    """The network in float32 on the host."""
    import torch

    names = {"relu": "ReLU", "sigmoid": "Sigmoid", "tanh": "Tanh", "identity": "Identity"}
    torch.set_grad_enabled(False)
    modules: list[Any] = []
    for weight, bias, activation in task.network.layers():
        dense = torch.nn.utils.skip_init(torch.nn.Linear, *weight.shape)
        dense.weight = torch.nn.Parameter(torch.from_numpy(np.ascontiguousarray(weight.T)))
        dense.bias = torch.nn.Parameter(torch.from_numpy(bias))
        modules.append(dense)
        if activation != "identity":
            modules.append(getattr(torch.nn, names[activation])())
    return torch.nn.Sequential(*modules).eval()


# on the CPU, from NumPy's rows to NumPy's results


def _called(net: Any, x: Array) -> Run:
    import torch

    rows = torch.from_numpy(x)

    def run() -> Array:
        with torch.inference_mode():
            made: Array = net(rows).numpy()
        return made

    return run


def _with_threads(prepare: Callable[[], Run]) -> dict[str, Callable[[], Run]]:
    import torch

    def threads(count: int) -> Run:
        torch.set_num_threads(count)
        return prepare()

    return by_threads(threads)


def eager(task: Task) -> Built:
    """A module, called: its products are MKL's."""
    run = _called(module(task), task.rows)
    return tried(task, _with_threads(lambda: run))


def onednn(task: Task) -> Built:
    """The same module moved to oneDNN, or traced and frozen with oneDNN's fusions."""
    import torch
    from torch.utils import mkldnn

    net = module(task)

    def moved() -> Run:
        there = mkldnn.to_mkldnn(net)
        return _called(lambda rows: there(rows.to_mkldnn()).to_dense(), task.rows)

    def frozen() -> Run:
        torch.jit.enable_onednn_fusion(True)
        traced = torch.jit.freeze(torch.jit.trace(net, torch.from_numpy(task.rows)))
        run = _called(traced, task.rows)
        run()  # the first two calls are those that the fusion learns from
        return run

    settings = {
        f"{name}, {threads}": prepare
        for name, way in {"to_mkldnn": moved, "jit": frozen}.items()
        for threads, prepare in _with_threads(way).items()
    }
    return tried(task, settings)


def compiled(task: Task) -> Built:
    """torch.compile, with the weights frozen, with tuning, or as it is."""
    import torch

    net = module(task)

    def way(**options: Any) -> Run:
        torch._dynamo.reset()
        made = torch.compile(net, fullgraph=True, dynamic=False, options=options or None)
        return _called(made, task.rows)

    ways = {
        "default": way,
        "freezing": partial(way, freezing=True),
        "max_autotune": partial(way, max_autotune=True),
        "freezing and max_autotune": partial(way, freezing=True, max_autotune=True),
    }
    settings = {
        f"{name}, {threads}": prepare
        for name, compile in ways.items()
        for threads, prepare in _with_threads(compile).items()
        if len(task.rows) <= 512
        or threads != "1 threads"  # compiling takes long: where it may help
    }
    return tried(task, settings)


# on rows that are on the device


def resident(task: Task, way: str = "eager") -> Built:
    """The module as it is, compiled, or recorded in a CUDA graph.

    "host": rows in pinned memory, results in the host's.
    """
    import torch

    torch.set_float32_matmul_precision("high" if task.tf32 else "highest")
    torch.inference_mode().__enter__()  # for as long as this process lives
    device = "cuda" if task.backend == "cupy" else "cpu"
    dtype = getattr(torch, PRECISIONS[task.precision][0])
    net = module(task).to(device, dtype)
    here = torch.from_numpy(task.network.draw()).to(dtype)
    rows = here.to(device)

    def wait(y: Array) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def host(y: Array) -> Array:
        return y.float().cpu().numpy().astype(task.dtype)

    if way == "host":
        sent = here.pin_memory() if device == "cuda" else here
        return Built(lambda: net(sent.to(device, non_blocking=True)).cpu(), "", wait, host)
    if way == "graph":
        return Built(_recorded(torch, net, rows), "", wait, host)
    if way != "eager":
        net = torch.compile(net, fullgraph=True, dynamic=False, mode=way)
    return Built(lambda: net(rows), "", wait, host)


def _recorded(torch: Any, net: Any, rows: Any) -> Run:
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


CPU = {"torch": eager, "torch-onednn": onednn, "torch-compile": compiled}
GPU = {
    "torch": resident,
    "torch-host": partial(resident, way="host"),
    "torch-graph": partial(resident, way="graph"),
    "torch-compile": partial(resident, way="default"),
    "torch-max-autotune": partial(resident, way="max-autotune"),
}
