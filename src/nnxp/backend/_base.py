"""What every backend is: an array library on a device, and how rows are swept through it."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from nnxp._arrays import Array, HostArray, Shape
from nnxp._errors import BackendUnavailable, DtypeMismatch, OutOfMemory, ShapeError
from nnxp._exchange import host_rows
from nnxp.backend._lanes import LanePool, copy


class Source(Protocol):
    """Rows to be read: an array, a memory map, or anything with `shape` and slicing."""

    @property
    def shape(self) -> Shape: ...

    def __getitem__(self, rows: slice, /) -> Any: ...


@dataclass(frozen=True)
class Availability:
    """Whether a backend can be used here; if not, why, and what fixes it.

        found = nnxp.available_backends()["cupy"]
        print("yes" if found.ok else f"no: {found.reason}. {found.hint}")

    Attributes:
        ok: whether it can be used; so is the truth of the object itself.
        reason: what was found, such as its version, or why it cannot be used.
        hint: what fixes it; empty where nothing is to be fixed.
    """

    ok: bool
    reason: str
    hint: str = ""

    def __bool__(self) -> bool:
        return self.ok


@dataclass(frozen=True)
class Memory:
    """Bytes of a device's memory: `free` for new arrays, `total`, and `used` by our library.

    The CPU's are 0 where the system does not tell.
    """

    free: int
    total: int
    used: int


@dataclass(frozen=True)
class Budget:
    """What rows cost, and what they may cost.

    `row_bytes` is what a row takes on the device at the widest point, `fixed_bytes` what each
    worker takes besides, `row_work` about how many multiply-adds a row is, and `row_lines` how many
    lines of a product it makes. `limit` bounds the bytes in use, `workers` the threads on the CPU,
    and `most_rows` the rows that go together, where a device was found to hold no more. `held` is
    what is set aside on the device already, unused.
    """

    row_bytes: int
    fixed_bytes: int
    row_work: int
    row_lines: float = 1.0
    limit: int | None = None
    workers: int | None = None
    most_rows: int | None = None
    held: int = 0


@dataclass(frozen=True)
class Plan:
    """How a sweep is cut: `rows` go through the model together, on each of `workers`.

    Workers are threads on the CPU and lanes on a device.

    `working_set` is the bytes of the rows at work, parameters and result aside.
    """

    rows: int
    workers: int
    working_set: int


class Cursor:
    """Hands out rows from the first to the last, to whoever asks: tiles and blocks of any size."""

    def __init__(self, rows: int) -> None:
        self._next, self._end, self._lock = 0, rows, threading.Lock()

    def take(self, most: int) -> slice | None:
        """The next rows, at most so many; None when there are no more."""
        with self._lock:
            start, self._next = self._next, min(self._next + most, self._end)
            return slice(start, self._next) if start < self._next else None

    def stop(self) -> None:
        """There are no more rows, for anybody.

        Without the lock: the handler of a signal may call this while its thread holds it.
        """
        self._end = 0


@dataclass(frozen=True, eq=False, repr=False)
class Sweep:
    """One sweep of rows through a model: what an engine asks of a backend.

    `run` takes the inputs on the device and answers the outputs there; on the CPU it fills
    `run(inputs, outputs)`. `rows` are what the inputs are read from, `out` the host arrays to fill,
    `dtypes` what the inputs become, and `done` hears how many rows were finished. Several backends
    may share the `cursor` of one sweep. `lanes` are what an engine keeps on its device between
    sweeps.
    """

    run: Callable[..., Any]
    rows: tuple[Source, ...]
    out: tuple[HostArray, ...]
    dtypes: tuple[np.dtype[Any], ...]
    plan: Plan
    done: Callable[[int], None]
    cursor: Cursor
    lanes: LanePool | None = None

    def __len__(self) -> int:
        return self.rows[0].shape[0]

    def read(self, rows: slice) -> tuple[HostArray, ...]:
        """These rows of every input as host arrays of real numbers, whatever holds them."""
        return tuple(
            _block(source, rows, dtype)
            for source, dtype in zip(self.rows, self.dtypes, strict=True)
        )

    def results(self, rows: slice) -> tuple[HostArray, ...]:
        """Where the results of these rows belong."""
        return tuple(array[rows] for array in self.out)

    def deliver(self, rows: slice, results: Sequence[HostArray]) -> None:
        """Bring the results of these rows to where they belong."""
        for into, result in zip(self.results(rows), results, strict=True):
            copy(into, result)
        self.done(rows.stop - rows.start)


def _block(source: Source, rows: slice, dtype: np.dtype[Any]) -> HostArray:
    block = host_rows(source[rows])
    if block.shape[:1] != (rows.stop - rows.start,):
        count = f"{len(block)} rows" if block.ndim else "a single number"
        raise ShapeError(
            f"x gave {count} for [{rows.start}:{rows.stop}]; its shape says {source.shape}"
        )
    if dtype.kind in "iu" and block.dtype.kind not in "iub":
        raise DtypeMismatch(
            f"the model takes whole numbers, but x gave {block.dtype} for "
            f"[{rows.start}:{rows.stop}]"
        )
    return block


@dataclass(frozen=True)
class Backend(ABC):
    """An array library on a device.

        backend = nnxp.get_backend("numpy")
        y = backend.xp.tanh(backend.put(x))

    Attributes:
        name: the library, "numpy", "cupy" or "sim".
        device: the place, such as "cpu" or "cuda:0".
        why: how the choice was made.
    """

    name: str
    device: str
    why: str = field(compare=False)

    @property
    @abstractmethod
    def xp(self) -> Any:
        """The array library as a module: numpy, cupy or nnxp.sim."""

    @abstractmethod
    def put(self, x: HostArray) -> Array:
        """A host array, as an array of this backend."""

    @abstractmethod
    def get(self, x: Array) -> HostArray:
        """An array of this backend, as a host array."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the device has done all it was given."""

    @abstractmethod
    def memory(self) -> Memory:
        """How much memory the device has, and has left."""

    @abstractmethod
    def current(self) -> AbstractContextManager[Any]:
        """A block in which this device is the current one; afterwards the caller's is again."""

    @abstractmethod
    def plan(self, rows: int, budget: Budget) -> Plan:
        """How so many rows would be cut. Raises OutOfMemory if the limit holds not even one."""

    @abstractmethod
    def sweep(self, sweep: Sweep) -> int | None:
        """Push all rows through the model into sweep.results.

        Answers with the rows that fit together, if memory ran out on the way, else None. Raises
        OutOfMemory if not even one row fits.
        """

    def __repr__(self) -> str:
        return f"Backend({self.name!r}, {self.device!r}, {self.why!r})"


class ForkGuard:
    """Knows whether a device was in use before this process was forked from its parent.

    A device's state does not survive a fork: the child must not touch it.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.pid: int | None = None

    def check(self) -> None:
        """Raise in a child forked from a process that has used the device."""
        if self.inherited():
            raise BackendUnavailable(
                f"this process was forked from one that had already used {self.what}, "
                "whose state does not survive a fork",
                'Start workers with multiprocessing.get_context("spawn"), or use '
                'backend="numpy" in them',
            )

    def inherited(self) -> bool:
        """Whether this is such a child."""
        return self.pid is not None and self.pid != os.getpid()

    def mark(self) -> None:
        """Remember that this process uses the device."""
        self.check()
        self.pid = os.getpid()


def rows_within(budget: Budget, workers: int = 1) -> int | None:
    """How many rows the limit holds, None without one. Raises OutOfMemory if it holds none."""
    if budget.limit is None:
        return None
    rows = (budget.limit - workers * budget.fixed_bytes) // max(budget.row_bytes, 1)
    if rows >= workers:
        return rows
    if workers > 1:
        return rows_within(budget, workers - 1)
    raise OutOfMemory(
        f"memory_limit={budget.limit:,} bytes does not hold one row, which needs "
        f"{budget.row_bytes + budget.fixed_bytes:,}; raise the limit"
    )
