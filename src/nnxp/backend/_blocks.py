"""The sweep over blocks that every device shares: in, through, out, and smaller if it must be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnxp._errors import OutOfMemory
from nnxp.backend._base import Plan, rows_within

if TYPE_CHECKING:
    from nnxp.backend._base import Backend, Budget, Sweep

MOST_ROWS = 65536
MARGIN = 0.8  # of the free memory: allocators round up, and others use the device too


def plan_blocks(rows: int, budget: Budget, free: int) -> Plan:
    """Rows to begin with: what fits into the limit, and into a fair part of what is free."""
    fits = int(free * MARGIN) // max(budget.row_bytes, 1)
    bounds = [rows, fits, rows_within(budget), budget.most_rows, MOST_ROWS]
    block = max(1, min(bound for bound in bounds if bound is not None))
    return Plan(block, 1, budget.row_bytes)


def sweep_blocks(backend: Backend, sweep: Sweep) -> int:
    """Block by block: one copy in, one copy out. Halves the block when the device is full."""
    block, start = backend.plan(len(sweep), sweep.budget).rows, 0
    while start < len(sweep):
        rows = slice(start, min(start + block, len(sweep)))
        if _one_block(backend, sweep, rows):
            sweep.done(rows.stop - rows.start)
            start = rows.stop
        elif block == 1:
            raise OutOfMemory(
                f"{backend.device} has no memory for even one row, which needs about "
                f"{sweep.budget.row_bytes:,} bytes; {backend.memory().free:,} are free"
            )
        else:
            block = max(1, block // 2)
    return block


def _one_block(backend: Backend, sweep: Sweep, rows: slice) -> bool:
    """Whether the block went through. The except clause is left before anything else is tried:
    while an exception is alive, its traceback keeps the arrays of the failed attempt alive."""
    try:
        sweep.out[rows] = backend.get(sweep.fn(backend.put(sweep.read(rows))))
    except MemoryError as error:
        if isinstance(error, OutOfMemory):
            raise
        return False
    return True
