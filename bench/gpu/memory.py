"""More rows than the card has memory for: the memory in use does not grow."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

import nnxp
from gpu.here import Array, Figures, Here, Values
from networks import Network, Task
from nnxp.testing import LIMIT, error_bound
from nnxp.testing.parity import compare


class Endless:
    """More rows of bytes than any memory holds: the same ones, over and over, until time is up."""

    PERIOD = 4099  # no power of two, so that blocks begin with different rows

    def __init__(self, rows: int, width: int, block: int, until: float) -> None:
        self.shape, self.dtype, self.until, self.sent = (rows, width), np.dtype("uint8"), until, 0
        some = np.random.default_rng(0).integers(0, 256, (self.PERIOD, width), "uint8")
        self.rows = np.resize(some, (self.PERIOD + block, width))

    def __getitem__(self, rows: slice) -> Array:
        if time.perf_counter() > self.until:
            raise TimeUp
        self.sent = rows.stop
        start = rows.start % self.PERIOD
        return self.rows[start : start + rows.stop - rows.start]


class TimeUp(Exception):
    """The rows are not all through, and no more time is left for them."""


def figures(here: Here) -> Figures:
    width, total = here.sized(8192, 16), here.device.memory().total
    rows = here.sized(int(1.1 * total) // width, 20_000)
    net = Network((width, here.sized(256, 8), 10), "relu", rows)
    with nnxp.Engine(Task(net).model(), here.backend) as engine:
        limit = here.sized(20.0, 5.0)
        plan = engine.plan((rows, width))
        source = Endless(rows, width, plan.rows, time.perf_counter() + limit)
        engine(source.rows[: 2 * plan.rows])  # compiles and tries
        source.until = time.perf_counter() + limit
        out = np.full((rows, 10), np.nan, "float32")
        start = time.perf_counter()
        with sampled(here) as used:
            try:
                engine(source, out)
            except TimeUp:
                print(f"time was up after {source.sent:,} of {rows:,} rows", flush=True)
        took = time.perf_counter() - start
    through = source.sent * width
    settled = used[len(used) // 5 :] or used
    values: Values = {
        "rows": rows,
        "rows sent": source.sent,
        "GB sent": through / 1e9,
        "of the card's memory": through / total,
        "GB/s": through / took / 1e9,
        "memory samples": len(used),
        "MiB in use, least": min(settled) / 2**20,
        "MiB in use, most": max(settled) / 2**20,
        "constant": max(settled) - min(settled) <= total // 100,
    }
    # When time is up, the blocks in the lanes are given up.
    done = (
        out[: max(0, source.sent - (plan.workers + 1) * plan.rows)] if source.sent < rows else out
    )
    last = np.arange(max(0, len(done) - 256), len(done))
    if len(last):
        x = source.rows[last % source.PERIOD].astype("float32")
        value, bound = error_bound(Task(net).model(), x)
        values["error in units of the bound"] = compare("", "", "", done[last], value, bound).ratio
        if not values["error in units of the bound"] <= LIMIT or np.isnan(done).any():
            values["problem"] = "rows are wrong or missing"
    if not values["constant"]:
        values["problem"] = "the memory in use grows"
    yield "stream", values


@contextmanager
def sampled(here: Here) -> Iterator[list[int]]:
    """The bytes of the device that are in use, looked at again and again within the block."""
    used: list[int] = []
    over = threading.Event()

    def look() -> None:
        while True:
            found = here.device.memory()
            used.append(found.total - found.free)
            if over.wait(0.05):
                return

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield used
    finally:
        over.set()
        thread.join(5)
