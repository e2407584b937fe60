"""What every device with a memory of its own shares: the sweep over blocks, lane by lane."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import numpy as np

from nnxp._arrays import Array, HostArray, Shape
from nnxp._errors import OutOfMemory
from nnxp.backend._base import Backend, Budget, ForkGuard, Plan, Sweep, rows_within
from nnxp.backend._lanes import Kept, Lane, Lanes, Pool, Stream

LANES = 3  # one travels in, one computes, one travels out
BLOCK_ROWS = 4096, 16384  # at least, where there are so many; at most
LANE_ROWS = 256  # a block that a limit makes smaller than this is not worth another lane
BLOCKS = 12  # so that what nothing overlaps, the first way in and the last way out, is little
ROUND = 2048  # rows: what cards work on at once then comes out even
BLOCK_BYTES = 1 << 30  # at most, for rows that are very wide
MARGIN = 0.8  # of the free memory: allocators round up, and others use the device too

# Not every library says with a MemoryError that the device's memory is full.
_FULL = ("CUBLAS_STATUS_ALLOC_FAILED", "cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY")


class BlockBackend(Backend):
    """A device that takes blocks of rows: one copy in, one copy out for each."""

    guard: ForkGuard
    dlpack: int  # what DLPack calls this kind of device

    @property
    def index(self) -> int:
        """The device's number."""
        return int(self.device.partition(":")[2])

    @abstractmethod
    def current(self) -> Any: ...

    @abstractmethod
    def stream(self) -> Stream:
        """A new stream, which waits for no other."""

    @abstractmethod
    def current_stream(self) -> Stream:
        """The stream that the caller works on."""

    @abstractmethod
    def mark(self, stream: Stream) -> Any:
        """A mark behind what this stream was given until now, to be waited for."""

    @abstractmethod
    def wait(self, stream: Stream, mark: Any) -> None:
        """What this stream is given from now on waits for the mark."""

    @abstractmethod
    def pool(self) -> Pool:
        """New memory, set aside."""

    @abstractmethod
    def pinned(self, size: int) -> HostArray:
        """So many bytes of host memory, to and from which copies need not be waited for."""

    @abstractmethod
    def record(self, fn: Callable[[], Array], stream: Stream) -> Callable[[], Array]:
        """fn(), to be repeated on the current stream at less cost than by calling it."""

    def plan(self, rows: int, budget: Budget) -> Plan:
        """Blocks that fit into the limit, and into a fair part of what is free."""
        least, most = BLOCK_ROWS
        worth = max(least, -(-rows // BLOCKS // ROUND) * ROUND)
        wide = max(1, BLOCK_BYTES // max(budget.row_bytes, 1))
        ceiling = budget.most_rows or rows
        block = min(rows, worth, most, wide, ceiling)
        rows_within(budget)  # raises if the limit holds not one row
        free = int((self.memory().free + budget.held) * MARGIN)
        room = replace(budget, limit=min(free, budget.limit or free))
        lanes = min(LANES, -(-rows // block))
        while lanes > 1 and _each(room, lanes) < min(block, LANE_ROWS):
            lanes -= 1
        block = max(1, min(block, _each(room, lanes)))
        lanes = min(lanes, -(-rows // block))
        return Plan(block, lanes, lanes * (block * budget.row_bytes + budget.fixed_bytes))

    def sweep(self, sweep: Sweep) -> int | None:
        """Block by block, each in the next lane; halves the block when the device is full."""
        self.guard.check()
        block = sweep.plan.rows
        with ExitStack() as stack:
            stack.enter_context(self.current())
            kept = sweep.kept or stack.enter_context(closing(Kept()))
            lanes = stack.enter_context(kept.lanes(self))
            stack.enter_context(lanes.pool.use())
            turns = deque(lanes.first(sweep.plan.workers))
            stack.callback(_abandon, turns)
            mark = self.mark(self.current_stream())
            for lane in turns:
                self.wait(lane.stream, mark)
            while (rows := sweep.cursor.take(block)) is not None:
                block = self._through(sweep, rows, block, turns, lanes)
            for lane in turns:
                lane.finish()
        return block if block < sweep.plan.rows else None

    def _through(
        self, sweep: Sweep, rows: slice, block: int, turns: deque[Lane], lanes: Lanes
    ) -> int:
        """These rows on their way, in blocks that fit; answers with what was found to fit."""
        start, released = rows.start, False
        while start < rows.stop:
            part = slice(start, min(start + block, rows.stop))
            turns[0].finish()
            read = sweep.read(part)
            if _fits(partial(turns[0].start, sweep, part, read)):
                turns.rotate(-1)
                start = part.stop
                continue
            for lane in turns:
                lane.finish()  # the first one waits for what it was given before memory ran out
            lanes.pool.release()
            if released:
                block = self._half(block)
            released = True  # once the same again: there may be room for it now
        return block

    def through(
        self,
        fn: Callable[[Array], Array],
        x: Array,
        out: Array | None,
        shape: Shape,
        dtype: np.dtype[Any],
        plan: Plan,
        kept: Kept,
        fresh: bool = False,
    ) -> Array:
        """fn of rows that are on this device already, block by block, on the current stream.

        The result is `out`, or a new array of this shape and type. `fresh` says that fn answers
        with arrays that nobody else holds, unless it is x or a view: others are copied.
        """
        block, start = min(len(x), plan.rows * plan.workers), 0  # nothing is under way beside it
        made: list[Array] = []
        if out is None and block == len(x):
            if _fits(lambda: made.append(fn(x))):
                y = made.pop()
                return y if fresh and y.base is None and y is not x else y.copy()
            kept.release()
        if out is None:
            if not _fits(lambda: made.append(self.xp.empty(shape, dtype))):
                size = prod(shape) * dtype.itemsize
                raise OutOfMemory(f"{self.device} has no memory for the result, {size:,} bytes")
            out = made.pop()
        while start < len(x):
            part = slice(start, min(start + block, len(x)))
            if _fits(partial(_fill, out, part, fn, x)):
                start = part.stop
            else:
                kept.release()
                block = self._half(block)
        return out

    def _half(self, block: int) -> int:
        """Half of a block for which there was no memory. Raises OutOfMemory for a single row."""
        if block == 1:
            raise OutOfMemory(
                f"{self.device} has no memory for even one row: "
                f"{self.memory().free:,} bytes are free"
            )
        return block // 2


def _fits(work: Callable[[], object]) -> bool:
    """Whether there was memory for the work. The except clause is left before anything else is
    tried: while an exception is alive, its traceback keeps the arrays of the failed attempt."""
    try:
        work()
    except Exception as error:
        full = isinstance(error, MemoryError) or any(word in str(error) for word in _FULL)
        if isinstance(error, OutOfMemory) or not full:
            raise
        return False
    return True


def _fill(out: Array, rows: slice, fn: Callable[[Array], Array], x: Array) -> None:
    out[rows] = fn(x[rows])


def _each(room: Budget, lanes: int) -> int:
    """The rows that fit into each of so many lanes; none, where not even one does."""
    assert room.limit is not None
    return max(0, room.limit // lanes - room.fixed_bytes) // max(room.row_bytes, 1)


def _abandon(lanes: deque[Lane]) -> None:
    with ExitStack() as stack:  # each, even if one of them fails
        for lane in lanes:
            stack.callback(lane.abandon)
