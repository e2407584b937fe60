"""NumPy on the CPU: rows are cut into tiles, and tiles are spread over worker threads.

A tile goes through the whole network while it is in cache. During a sweep BLAS runs one thread
for each worker, so that every core has one owner; afterwards its threads are as they were found.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from math import ceil
from types import ModuleType
from typing import Any

import numpy as np

from nnxp._arrays import Array, HostArray
from nnxp._errors import BackendUnavailable
from nnxp.backend._base import Availability, Backend, Budget, Memory, Plan, Sweep, rows_within
from nnxp.backend._blas import one_blas_thread
from nnxp.backend._machine import available_memory, physical_memory, usable_cores
from nnxp.backend._threads import together

TILE_WORK = 50_000_000  # multiply-adds: about a millisecond on one core
FEW_TILES = 8  # so much work goes to BLAS as one tile
TILE_ROWS = 512, 1024, 8192  # at least; at most in wide networks; at most in narrow ones
LEAST_ROWS = 32  # a tile that a limit makes smaller than this is not worth another worker
TILE_BYTES = 256 << 20  # at most, for rows that are very wide
LINES = 512  # of a product, that are to be had together: fewer are slower


def availability(index: int) -> Availability:
    """NumPy is always there."""
    if index:
        return Availability(False, f"there is no cpu:{index}", 'All cores together are one "cpu"')
    return Availability(True, f"NumPy {np.__version__}")


def connect(index: int, why: str) -> Backend:
    """The backend for the CPU."""
    asked_workers()  # a bad NNXP_WORKERS is named here, before any work
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
        return Memory(available_memory() or 0, physical_memory() or 0, 0)

    def current(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def plan(self, rows: int, budget: Budget) -> Plan:
        tile = tile_rows(rows, budget)
        workers = 1 if tile >= rows else min(budget.workers or worker_count(), -(-rows // tile))
        fits = rows_within(budget, workers)
        while fits is not None and workers > 1 and fits // workers < min(tile, LEAST_ROWS):
            workers -= 1  # fewer workers with tiles that are worth their start
            fits = rows_within(budget, workers)
        if fits is not None:
            tile = min(tile, max(1, fits // workers))
            workers = max(1, min(workers, fits // tile))
        return Plan(tile, workers, workers * (tile * budget.row_bytes + budget.fixed_bytes))

    def sweep(self, sweep: Sweep) -> None:
        plan = sweep.plan
        _keep_freed_memory()

        def work() -> None:  # whoever is free takes the next tile
            while (rows := sweep.cursor.take(plan.rows)) is not None:
                sweep.run(sweep.read(rows), sweep.results(rows))
                sweep.done(rows.stop - rows.start)

        if len(sweep) <= plan.rows:
            work()  # too few rows to share out: BLAS may have the cores
        else:
            together([work] * plan.workers, sweep.cursor.stop, one_blas_thread)


@cache
def _keep_freed_memory() -> None:
    """Let malloc keep blocks of up to 31 MiB for the next tile, rather than give them back.

    glibc raises the size above which it returns memory to the system whenever a larger block is
    freed. Without this every tile faults its pages in anew: on a network five layers of 64 deep
    that took 28 % of the time. The block is never touched, so it costs nothing.
    """
    np.empty(31 << 20, "uint8")


def tile_rows(rows: int, budget: Budget) -> int:
    """Rows in a tile: enough work to be worth its start, enough tiles to be shared out.

    It depends on the network and the number of rows, never on the number of workers: so the same
    rows meet the same products, and give the same bits, however many cores share the tiles.
    """
    least, wide, narrow = TILE_ROWS
    work = max(budget.row_work, 1)
    enough = ceil(LINES / budget.row_lines)
    if enough < least:
        tile = _few_heavy_rows(rows, work, enough)
    elif rows * work <= FEW_TILES * TILE_WORK and rows <= narrow:
        tile = rows  # a few milliseconds in all: BLAS' own threads share them out at less cost
    else:
        worth = min(narrow, max(least, TILE_WORK // work // least * least))
        tile = min(max(wide, worth), max(worth, rows // 8 // least * least))
    return max(1, min(tile, TILE_BYTES // max(budget.row_bytes, 1)))


def _few_heavy_rows(rows: int, work: int, enough: int) -> int:
    """Rows in a tile where a row makes many lines of a product: of some, as many are enough.

    The tiles are two, four, or any number from eight on, so that workers end together.
    """
    if rows * work <= TILE_WORK:
        return rows
    count = rows // max(enough, TILE_WORK // work)
    if count >= 8:
        return -(-rows // count)
    return -(-rows // (4 if count >= 4 else 2))


def worker_count() -> int:
    """The worker threads to use: NNXP_WORKERS if set, else the cores that may be used."""
    return asked_workers() or usable_cores()


def asked_workers() -> int | None:
    """NNXP_WORKERS, if it is set. Raises BackendUnavailable if it is no number of threads."""
    asked = os.environ.get("NNXP_WORKERS", "").strip()
    if asked and not (asked.isdecimal() and int(asked) > 0):
        raise BackendUnavailable(
            f"NNXP_WORKERS={asked!r} is not a number of worker threads",
            "Set it to 1 or more, or unset it",
        )
    return int(asked) if asked else None
