"""What every device with a memory of its own shares: the sweep over blocks, lane by lane."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import numpy as np

from nnxp._arrays import Array, HostArray, Shape
from nnxp._errors import OutOfMemory
from nnxp.backend._base import Backend, Budget, ForkGuard, Plan, Sweep, rows_within
from nnxp.backend._lanes import Lane, LanePool, Lanes, Pool, Stream

LANES = 3  # one travels in, one computes, one travels out
BLOCK_ROWS = 4096, 16384  # at least, where there are so many; at most
LANE_ROWS = 256  # a block that a limit makes smaller than this is not worth another lane
BLOCKS = 12  # so that what nothing overlaps, the first way in and the last way out, is little
ROUND = 2048  # rows: what cards work on at once then comes out even
BLOCK_BYTES = 1 << 30  # at most, for rows that are very wide
MARGIN = 0.8  # of the free memory: allocators round up, and others use the device too

# Not every library says with a MemoryError that the device's memory is full.
_FULL = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "cudaErrorMemoryAllocation",
    "CUDA_ERROR_OUT_OF_MEMORY",
)


class Unrecordable(Exception):
    """Work ran when it was called, but not while it was recorded."""


class DeviceBackend(Backend):
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

    def release(self) -> None:
        """Give back what the library itself holds unused: a full device has no use for it there."""

    @abstractmethod
    def pinned(self, size: int) -> HostArray:
        """So many bytes of host memory, to and from which copies need not be waited for."""

    def fill(self, into: Array, x: Array) -> None:
        """into[...] = x, both on this device, the current one."""
        into[...] = x

    def copied(self, x: Array) -> Array:
        """x in memory of its own, on this device, the current one."""
        y: Array = self.xp.empty(x.shape, x.dtype)
        self.fill(y, x)
        return y

    @abstractmethod
    def record(
        self,
        fn: Callable[[], tuple[Array, ...]],
        stream: Stream,
        trial: Callable[[], object] | None = None,
    ) -> Callable[[], tuple[Array, ...]]:
        """fn(), to be repeated on the current stream at less cost than by calling it.

        Where it may be called only as often as it is asked for, `trial` is what is like it.
        Raises Unrecordable if fn does what can only be called.
        """

    def plan(self, rows: int, budget: Budget) -> Plan:
        """Blocks that fit into the limit, and into a fair part of what is free."""
        least, most = BLOCK_ROWS
        worth = max(least, -(-rows // BLOCKS // ROUND) * ROUND)
        wide = max(1, BLOCK_BYTES // max(budget.row_bytes, 1))
        ceiling = budget.most_rows or rows
        block = min(rows, worth, most, wide, ceiling)
        room = self._room(budget)
        lanes = min(LANES, -(-rows // block))
        while lanes > 1 and _rows_of_a_lane(room, lanes) < min(block, LANE_ROWS):
            lanes -= 1
        block = max(1, min(block, _rows_of_a_lane(room, lanes)))
        lanes = min(lanes, -(-rows // block))
        return Plan(block, lanes, lanes * (block * budget.row_bytes + budget.fixed_bytes))

    def together(self, rows: int, budget: Budget) -> int:
        """How many rows that are on this device already go through the model at once.

        Nothing travels beside them, so that blocks are cut for the sake of memory alone.
        """
        worth = max(1, BLOCK_BYTES // max(budget.row_bytes, 1))
        ceiling = (budget.most_rows or rows) * LANES  # which was found for one lane of several
        return max(1, min(rows, worth, ceiling, _rows_of_a_lane(self._room(budget), 1)))

    def _room(self, budget: Budget) -> Budget:
        """The limit, or a fair part of what is free. OutOfMemory if a limit holds not one row."""
        rows_within(budget)
        free = int((self.memory().free + budget.held) * MARGIN)
        return replace(budget, limit=min(free, budget.limit or free))

    def sweep(self, sweep: Sweep) -> int | None:
        """Block by block, each in the next lane; halves the block when the device is full."""
        self.guard.check()
        block = sweep.plan.rows
        with ExitStack() as stack:
            stack.enter_context(self.current())
            pool = sweep.lanes or stack.enter_context(closing(LanePool()))
            lanes = stack.enter_context(pool.lanes(self))
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
            deliver = partial(sweep.deliver, part)
            if fits(partial(turns[0].start, sweep.run, read, sweep.dtypes, deliver)):
                turns.rotate(-1)
                start = part.stop
                continue
            for lane in turns:
                lane.finish()  # the first one waits for what it was given before memory ran out
            lanes.pool.release()
            self.release()
            if released:
                block = self._half(block)
            released = True  # once the same again: there may be room for it now
        return block

    def through(
        self,
        run: Callable[[tuple[Array, ...]], tuple[Array, ...]],
        inputs: tuple[Array, ...],
        out: tuple[Array, ...] | None,
        outlines: Sequence[tuple[Shape, np.dtype[Any]]],
        block: int,
        pool: LanePool,
        borrowed: Sequence[bool],
    ) -> tuple[Array, ...]:
        """Rows that are on this device already, so many at once, on the current stream.

        The results are `out`, or new arrays of these outlines. `borrowed` says of each result of
        run whether it may be somebody's memory, and is to be copied.
        """
        self.guard.check()
        count = len(inputs[0])
        start = 0
        results: list[Array] = []
        if out is None and block == count:
            if fits(lambda: results.extend(run(inputs))):
                return tuple(  # a product's rows may lie further apart than they are long
                    y.copy() if others or not y.flags.c_contiguous else y
                    for y, others in zip(results, borrowed, strict=True)
                )
            results.clear()
            pool.release()
            self.release()
        if out is None:
            for shape, dtype in outlines:
                if not fits(partial(_append_empty, results, self.xp, shape, dtype)):
                    size = prod(shape) * dtype.itemsize
                    raise OutOfMemory(f"{self.device} has no memory for the result, {size:,} bytes")
            out = tuple(results)
        while start < count:
            part = slice(start, min(start + block, count))
            if fits(partial(_fill, out, part, run, inputs)):
                start = part.stop
            else:
                pool.release()
                self.release()
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


def fits(work: Callable[[], object]) -> bool:
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


def _append_empty(arrays: list[Array], xp: Any, shape: Shape, dtype: np.dtype[Any]) -> None:
    arrays.append(xp.empty(shape, dtype))


def _fill(
    out: tuple[Array, ...],
    rows: slice,
    run: Callable[[tuple[Array, ...]], tuple[Array, ...]],
    inputs: tuple[Array, ...],
) -> None:
    results = run(tuple(x[rows] for x in inputs))
    for into, result in zip(out, results, strict=True):
        into[rows] = result


def _rows_of_a_lane(room: Budget, lanes: int) -> int:
    """The rows that fit into each of so many lanes; none, where not even one does."""
    assert room.limit is not None
    return max(0, room.limit // lanes - room.fixed_bytes) // max(room.row_bytes, 1)


def _abandon(lanes: deque[Lane]) -> None:
    with ExitStack() as stack:  # each, even if one of them fails
        for lane in lanes:
            stack.callback(lane.abandon)
