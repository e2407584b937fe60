"""What every device with a memory of its own shares: the sweep over blocks, in, through and out."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from nnxp._errors import OutOfMemory
from nnxp.backend._base import Backend, Budget, ForkGuard, Plan, Sweep, rows_within

MOST_ROWS = 65536
MARGIN = 0.8  # of the free memory: allocators round up, and others use the device too

# Not every library says with a MemoryError that the device's memory is full.
_FULL = ("CUBLAS_STATUS_ALLOC_FAILED", "cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY")


class BlockBackend(Backend):
    """A device that takes blocks of rows: one copy in, one copy out for each."""

    guard: ForkGuard

    @property
    def index(self) -> int:
        """The device's number."""
        return int(self.device.partition(":")[2])

    @abstractmethod
    def current(self) -> Any: ...

    def plan(self, rows: int, budget: Budget) -> Plan:
        """What fits into the limit, and into a fair part of what is free."""
        free = int(self.memory().free * MARGIN) - budget.fixed_bytes
        fits = free // max(budget.row_bytes, 1)
        bounds = [rows, fits, rows_within(budget), budget.most_rows, MOST_ROWS]
        block = max(1, min(bound for bound in bounds if bound is not None))
        return Plan(block, 1, block * budget.row_bytes + budget.fixed_bytes)

    def sweep(self, sweep: Sweep) -> int | None:
        """Block by block; halves the block when the device is full."""
        self.guard.check()
        block, start = sweep.plan.rows, 0
        with self.current():
            while start < len(sweep):
                rows = slice(start, min(start + block, len(sweep)))
                if self._one_block(sweep, rows):
                    sweep.done(rows.stop - rows.start)
                    start = rows.stop
                elif block == 1:
                    raise OutOfMemory(
                        f"{self.device} has no memory for even one row: "
                        f"{self.memory().free:,} bytes are free"
                    )
                else:
                    block = max(1, block // 2)
        return block if block < sweep.plan.rows else None

    def _one_block(self, sweep: Sweep, rows: slice) -> bool:
        """Whether the block went through. The except clause is left before anything else is tried:
        while an exception is alive, its traceback keeps the arrays of the failed attempt alive."""
        host = sweep.read(rows)
        try:
            sweep.out[rows] = self.get(sweep.fn(self.put(host)))
        except Exception as error:
            full = isinstance(error, MemoryError) or any(word in str(error) for word in _FULL)
            if isinstance(error, OutOfMemory) or not full:
                raise
            return False
        return True
