"""nnxp, and its floor: the bare matrix products of the same network."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from threadpoolctl import ThreadpoolController

import nnxp
from contenders import Array, Built
from networks import Task
from nnxp import kernels
from nnxp.backend.cpu import worker_count
from nnxp.floor import FLOOR, TURN, Products, Run, fastest
from nnxp.kernels.linear import precision

TILED = "floor-tiled"
MODULES = ("nnxp", "numpy", "cupy")


def engine(task: Task, way: str = "resident") -> Built:
    """An Engine, on rows on the device, or as NumPy has them on the "host", and back there.

    "eager": the model itself, called without an engine, which replays nothing.
    """
    made = nnxp.Engine(task.model(), task.backend, precision=task.tf32)
    backend = made.backend
    x = task.rows if way == "host" else backend.put(task.rows)
    run = made.model if way == "eager" else made
    return Built(lambda: run(x), "", lambda y: backend.synchronize(), nnxp.asnumpy)


def floor(task: Task) -> Built:
    """All rows at once, BLAS' own threads, into memory that is there already."""
    products = Products(task.model(), task.rows.shape[1:], len(task.rows))
    return Built(products.over(task.rows))


def tiled(task: Task) -> Built:
    """On tiles of rows that stay in cache, one BLAS thread for each worker; the best of five."""
    x, workers = task.rows, worker_count()
    sizes = [size for size in (256, 512, 1024, 2048, 4096) if size * workers <= len(x)]
    sizes = sizes or [-(-len(x) // workers)]
    ThreadpoolController().limit(limits=1, user_api="blas")
    pool = ThreadPoolExecutor(workers)
    own = [Products(task.model(), x.shape[1:], max(sizes)) for _ in range(workers)]
    out = np.empty((len(x), task.network.sizes[-1]), x.dtype)

    def prepare(size: int) -> Run:
        parts = [slice(i, i + size) for i in range(0, len(x), size)]
        runs = [[owner.over(x[part], out[part]) for part in parts] for owner in own]

        def run() -> Array:
            tiles = iter(range(len(parts)))

            def work(mine: list[Run]) -> None:
                for tile in tiles:
                    mine[tile]()

            list(pool.map(work, runs))
            return out

        return run

    runs = {size: prepare(size) for size in sizes}
    best = min(sizes, key=lambda size: fastest(runs[size], TURN / 4))
    return Built(runs[best], f"tiles of {best} rows")


def floor_on_device(task: Task) -> Built:
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
        took = {
            name: Built(partial(kernels.matmul, h, w), wait=wait).seconds()
            for name, w in ways.items()
        }
        chosen.append(min(took, key=lambda name: took[name]))
        weights.append(ways[chosen[-1]])
        h = kernels.matmul(h, weights[-1])

    def run() -> Array:
        h = x
        for weight in weights:
            h = kernels.matmul(h, weight)
        return h

    setting = f"{_products(task)}; weights {', '.join(chosen)}"
    return Built(run, setting, wait, nnxp.asnumpy)


def _products(task: Task) -> str:
    """Whose products the floor is made of."""
    if task.backend != "cupy":
        return f"products of {task.backend}"
    from nnxp.kernels.cuda.lt import why_not

    why = why_not()
    return "cuBLASLt" if why is None else f"cupy.matmul, because {why}"


def copy(task: Task) -> Built:
    """No computing: the rows to the device and as much as the result back, from pinned memory."""
    backend, outputs = nnxp.get_backend(task.backend), task.network.sizes[-1]
    if task.backend != "cupy":
        return Built(lambda: backend.get(backend.put(task.rows)[:, :outputs]), host=np.asarray)
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

    return Built(run, "", lambda y: backend.synchronize(), np.asarray)


CPU = {"nnxp": engine, FLOOR: floor, TILED: tiled}
GPU = {
    FLOOR: floor_on_device,
    "nnxp": engine,
    "nnxp-host": partial(engine, way="host"),
    "nnxp-eager": partial(engine, way="eager"),
    "copy": copy,
}
