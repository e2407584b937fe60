"""The folder of a sweep: what is done of it, and its results as one array."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnxp._arrays import HostArray, Shape
from nnxp._errors import IdError, OptionError, RowsError, ShapeError
from nnxp._printed import Printed
from nnxp.backend._machine import usable_cores
from nnxp.cluster.blocks import done_record
from nnxp.cluster.plan import NAME, Plan
from nnxp.io._atomic import _lock as lock

OWN = ("parts", "records", "workers")


@dataclass(frozen=True)
class Status(Printed):
    """How far a sweep is, by its records; sums are not checked.

    `running` says whether somebody drives it at this moment, None where the file system does not
    tell. `at_work` are the blocks that are being done: host, pid, block, seconds.
    """

    folder: str
    rows: int
    rows_done: int
    blocks: int
    blocks_done: int
    running: bool | None
    at_work: tuple[dict[str, Any], ...]

    @property
    def complete(self) -> bool:
        """Whether every block has a record."""
        return self.blocks_done == self.blocks

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "complete": self.complete}

    def __str__(self) -> str:
        share = 100 * self.rows_done / self.rows if self.rows else 100
        state = {True: "running", False: "not running", None: "running or not"}[self.running]
        lines = [
            f"{self.rows_done:,} of {self.rows:,} rows ({share:.1f} %), {self.blocks_done:,} of "
            f"{self.blocks:,} blocks; {'complete' if self.complete else state}"
        ]
        return "\n".join([*lines, *map(at_work_line, self.at_work)])


def at_work_line(worker: dict[str, Any]) -> str:
    """What one worker does, in words."""
    return (
        f"  {worker['host']} process {worker['pid']}: block {worker['block']} for "
        f"{worker['seconds']:.1f} s"
    )


def status(folder: str | os.PathLike[str]) -> Status:
    """How far the sweep in this folder is, whoever does it. OptionError if it holds none."""
    plan = Plan.load(folder)
    done = recorded(plan)
    rows = sum(stop - start for start, stop in map(plan.span, done))
    running = _is_locked(plan.folder)
    return Status(plan.folder, plan.rows, rows, len(plan), len(done), running, at_work(plan))


def recorded(plan: Plan) -> list[int]:
    """The blocks that have a record."""
    names = {path.name for path in Path(plan.folder, "records").glob("*.json")}
    return [block for block in range(len(plan)) if plan.record(block).name in names]


def at_work(plan: Plan) -> tuple[dict[str, Any], ...]:
    """What workers say that they do; those of this host only if they are alive."""
    workers = []
    for path in Path(plan.folder, "workers").glob("*.json"):
        with suppress(OSError, ValueError, KeyError):
            worker = json.loads(path.read_text())
            if worker["host"] == socket.gethostname() and not _is_alive(worker["pid"]):
                continue
            workers.append({**worker, "seconds": max(0.0, time.time() - worker["since"])})
    return tuple(sorted(workers, key=lambda worker: worker["block"]))


def _is_alive(pid: int) -> bool:
    if os.name == "nt":
        return True  # there, to ask is to kill
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def whole(plan: Plan) -> dict[int, dict[str, Any]]:
    """The records of the blocks whose files are there and have the sum that was recorded."""
    with ThreadPoolExecutor(usable_cores()) as threads:
        records = threads.map(lambda block: done_record(plan, block), range(len(plan)))
        return {block: record for block, record in enumerate(records) if record is not None}


@contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """A block in which nobody else drives a sweep in this folder; OptionError if somebody does."""
    handle = os.open(Path(folder, "lock"), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not lock(handle):
            raise OptionError(
                f"{folder}: another process drives a sweep here; nnxp sweep status shows it"
            )
        yield
    finally:
        os.close(handle)


def _is_locked(folder: str) -> bool | None:
    try:
        handle = os.open(Path(folder, "lock"), os.O_RDWR)
    except OSError:
        return None if Path(folder, "lock").exists() else False
    try:
        return not lock(handle)
    finally:
        os.close(handle)


def prepare(plan: Plan, *, restart: bool) -> None:
    """Make the folder that of this plan, or find that it is already.

    Raises OptionError, with what differs, if it is that of another plan, unless that one is to be
    thrown away, and if it holds anything else.
    """
    folder = Path(plan.folder)
    if Path(folder, NAME).exists():
        if restart:
            clear(Plan.load(folder))
        elif differences := Plan.load(folder).differences(plan):
            raise OptionError(
                f"{folder} holds another sweep: {'; '.join(differences)}. Choose another folder, "
                "or restart=True (--restart) to throw its results away"
            )
    elif foreign := [
        path.name for path in folder.iterdir() if path.name not in ("lock", "model.safetensors")
    ]:
        raise OptionError(f"{folder} holds other files ({foreign[0]}); choose an empty one")
    for name in OWN:
        Path(folder, name).mkdir(exist_ok=True)
    if plan.format == "zarr":
        Path(folder, "parts", "zarr.json").write_text(json.dumps(plan.zarr) + "\n")
    plan.save()
    forget_workers(plan)


def clear(plan: Plan) -> None:
    """Throw away what a sweep has left in its folder, the plan first.

    Raises OptionError if a worker still does a block of it: that one would come in between.
    """
    forget_workers(plan)
    if still := at_work(plan):
        raise OptionError(
            f"{plan.folder}: workers of an earlier run are still at work. Wait for them, or end "
            "them\n" + "\n".join(map(at_work_line, still))
        )
    Path(plan.folder, NAME).unlink()
    for name in OWN:
        shutil.rmtree(Path(plan.folder, name), ignore_errors=True)


def forget_workers(plan: Plan) -> None:
    """Remove what workers that were killed have left behind; those that still work go on."""
    from nnxp.io._atomic import _removed

    for name, kind in (("workers", "*.json"), ("parts", "*.part"), ("records", "*.part")):
        for path in Path(plan.folder, name).glob(kind):
            _removed(path)


class Parts:
    """The results of a sweep as one array: shape, dtype, and rows by slicing, read when asked for.

        y = nnxp.cluster.open("folder")
        y.shape, y[1_000_000:1_000_010], numpy.asarray(y)

    It goes into an Engine, or into whatever else takes rows by slicing.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.shape: Shape = (plan.rows, *plan.output)
        self.dtype = np.dtype(plan.output_dtype)
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        """Rows by a number, a slice, or an array of numbers; further axes as in NumPy."""
        first, *rest = index if isinstance(index, tuple) else (index,)
        if isinstance(first, slice):
            rows = self._slice(*first.indices(len(self)))
            return rows[(slice(None), *rest)] if rest else rows
        wanted = np.asarray(first)
        if wanted.ndim > 1 or first is Ellipsis or first is None:
            raise ShapeError("rows come first, by a number, a slice or a list, such as y[10:20, 0]")
        rows = self._rows(wanted)
        return rows[(*((slice(None),) * wanted.ndim), *rest)] if rest else rows

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> HostArray:
        whole: HostArray = np.asarray(self._slice(0, len(self), 1), dtype)
        return whole

    def _slice(self, start: int, stop: int, step: int) -> HostArray:
        if step != 1:
            picked: HostArray = self._rows(np.arange(start, stop, step))
            return picked
        size = self.plan.block_rows
        parts = [
            read_part(self.plan, block)[max(start - block * size, 0) : stop - block * size]
            for block in range(start // size, -(-stop // size)) if start < stop
        ]  # fmt: skip
        if not parts:
            return np.empty((0, *self.shape[1:]), self.dtype)
        rows: HostArray = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return rows

    def _rows(self, wanted: HostArray) -> Any:
        if wanted.dtype == bool:
            if wanted.shape != self.shape[:1]:
                raise ShapeError(f"a mask of {wanted.shape} does not fit {len(self):,} rows")
            wanted = np.flatnonzero(wanted)
        if wanted.dtype.kind not in "iu" and wanted.size:
            raise ShapeError(f"rows are chosen by whole numbers, not by {wanted.dtype}")
        numbers = wanted.astype("int64")
        numbers = np.where(numbers < 0, numbers + len(self), numbers)
        if numbers.size and (numbers.min() < 0 or numbers.max() >= len(self)):
            raise IdError(f"there are {len(self):,} rows; {wanted.max()} is none of them")
        blocks, places = np.divmod(numbers, self.plan.block_rows)
        out = np.empty((*numbers.shape, *self.shape[1:]), self.dtype)
        for block in np.unique(blocks):
            out[blocks == block] = read_part(self.plan, int(block))[places[blocks == block]]
        return out

    def __repr__(self) -> str:
        return f"Parts({self.shape}, {self.dtype}, {len(self.plan):,} blocks in {self.plan.folder})"


def read_part(plan: Plan, block: int) -> HostArray:
    """The results of one block: a memory map, or from Parquet. RowsError if they do not fit."""
    from nnxp.io.rows import read_rows

    (start, stop), path = plan.span(block), plan.part(block)
    if plan.format == "zarr":
        rows = _chunk(plan, path)[: stop - start]
    else:
        rows = read_rows(path)
    if plan.format == "parquet":
        rows = rows.reshape(len(rows), *plan.output)
    if rows.shape != (stop - start, *plan.output) or rows.dtype != plan.output_dtype:
        raise RowsError(f"{path} holds {rows.dtype} {rows.shape}: it is damaged")
    return rows


def _chunk(plan: Plan, path: Path) -> HostArray:
    shape, dtype = (plan.block_rows, *plan.output), np.dtype(plan.output_dtype).newbyteorder("<")
    try:
        return np.memmap(path, dtype, "r", shape=shape)
    except ValueError as error:
        raise RowsError(f"{path} is no whole chunk of {dtype} {shape}: {error}") from None


def open(folder: str | os.PathLike[str]) -> Parts:
    """The results of a sweep that is complete, as one array. RowsError if blocks are missing."""
    plan = Plan.load(folder)
    done = set(recorded(plan))
    missing = [block for block in range(len(plan)) if block not in done]
    if missing:
        raise RowsError(
            f"{folder} lacks {len(missing):,} of {len(plan):,} blocks, such as {missing[0]}; run "
            "the sweep again and only these are done"
        )
    return Parts(plan)
