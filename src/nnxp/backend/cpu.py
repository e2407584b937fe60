"""NumPy on the CPU: rows are cut into tiles, and tiles are spread over worker threads.

A tile goes through the whole network while it is in cache. During a sweep BLAS runs one thread
for each worker, so that every core has one owner; afterwards its threads are as they were found.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

from nnxp._arrays import Array, HostArray
from nnxp._errors import BackendUnavailable, OutOfMemory
from nnxp.backend._base import Availability, Backend, Memory, Sweep

TILE_WORK = 25_000_000  # multiply-adds: about half a millisecond on one core
TILE_ROWS = 256, 4096  # fewer rows waste the product's start-up, more fall out of cache


def availability(index: int) -> Availability:
    """NumPy is always there."""
    if index:
        return Availability(False, f"there is no cpu:{index}", 'All cores together are one "cpu"')
    return Availability(True, f"NumPy {np.__version__}")


def connect(index: int, why: str) -> Backend:
    """The backend for the CPU."""
    return CpuBackend("numpy", "cpu", why)


class CpuBackend(Backend):
    """NumPy arrays in host memory."""

    @property
    def xp(self) -> ModuleType:
        return np

    def put(self, x: HostArray) -> Array:
        return x

    def get(self, x: Array) -> HostArray:
        return x  # type: ignore[no-any-return]

    def synchronize(self) -> None:
        pass

    def memory(self) -> Memory:
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = os.sysconf("SC_PHYS_PAGES") * page, os.sysconf("SC_AVPHYS_PAGES") * page
        return Memory(free, total, 0)

    def current(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def sweep(self, sweep: Sweep) -> int:
        workers = min(sweep.workers or cores(), max(1, len(sweep)))
        tile, workers = plan(sweep, workers)
        starts = iter(range(0, len(sweep), tile))

        def work() -> None:
            for start in starts:  # shared: whoever is free takes the next tile
                rows = slice(start, min(start + tile, len(sweep)))
                sweep.out[rows] = sweep.fn(sweep.read(rows))
                sweep.done(rows.stop - rows.start)

        tiles = -(-len(sweep) // tile)
        if tiles <= 1:
            work()  # too few rows to share out: BLAS may have the cores
        else:
            with one_blas_thread():
                _run(work, min(workers, tiles), stop=lambda: list(starts))
        return tile


def plan(sweep: Sweep, workers: int) -> tuple[int, int]:
    """Rows in a tile, and workers, so that workers × tile × bytes a row stay within the limit.

    Without a limit the tile depends on the network alone, never on the number of workers or
    rows: then the same row meets the same product, and gives the same bits, on every run.
    """
    least, most = TILE_ROWS
    tile = min(most, max(least, TILE_WORK // max(sweep.row_work, 1)))
    if sweep.limit is not None:
        fits = sweep.limit // max(sweep.row_bytes, 1)
        if fits < 1:
            raise OutOfMemory(
                f"memory_limit={sweep.limit:,} bytes does not hold one row, which needs "
                f"{sweep.row_bytes:,}; raise the limit"
            )
        workers = min(workers, fits)
        tile = min(tile, fits // workers)
    return tile, workers


def cores() -> int:
    """The worker threads to use: NNXP_WORKERS if set, else the cores this process may use."""
    asked = os.environ.get("NNXP_WORKERS", "").strip()
    if asked:
        if not (asked.isdecimal() and int(asked) > 0):
            raise BackendUnavailable(
                f"NNXP_WORKERS={asked!r} is not a number of worker threads",
                "Set it to 1 or more, or unset it",
            )
        return int(asked)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _run(work: Callable[[], None], workers: int, stop: Callable[[], object]) -> None:
    """work() in this thread and in workers - 1 others; the first error stops them all."""

    def guarded() -> None:
        try:
            work()
        except BaseException:
            stop()  # takes the remaining tiles away from the others
            raise

    with ThreadPoolExecutor(max(1, workers - 1), "nnxp") as pool:
        others = [pool.submit(guarded) for _ in range(workers - 1)]
        guarded()
        for other in others:
            other.result()


class _OneThread:
    """Counts the sweeps that want BLAS at one thread: the first sets it, the last restores it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.sweeps = 0
        self.blas: ThreadpoolController | None = None
        self.limit: Any = None

    def enter(self) -> None:
        with self.lock:
            if self.sweeps == 0:
                if self.blas is None:
                    self.blas = ThreadpoolController().select(user_api="blas")
                self.limit = self.blas.limit(limits=1)
            self.sweeps += 1

    def leave(self) -> None:
        with self.lock:
            self.sweeps -= 1
            if self.sweeps == 0:
                self.limit.restore_original_limits()

    def forked(self) -> None:
        """In a forked child none of the parent's sweeps goes on."""
        self.lock = threading.Lock()
        if self.sweeps:
            self.sweeps = 0
            self.limit.restore_original_limits()


_one_thread = _OneThread()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_one_thread.forked)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """BLAS at one thread per caller, in all threads, until the last such block is left."""
    _one_thread.enter()
    try:
        yield
    finally:
        _one_thread.leave()
