"""All blocks of a plan through whatever runs calls: this process, others, other machines."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from nnxp._errors import BackendUnavailable, OptionError, ShapeError, SweepError
from nnxp._printed import Printed
from nnxp._progress import Progress, reported
from nnxp.backend._machine import usable_cores
from nnxp.cluster import folder as folders
from nnxp.cluster.blocks import Setting, loads, release, result_of_zeros, task
from nnxp.cluster.plan import FORMATS, Plan, read_anew, rows_per_block, sha256
from nnxp.cluster.sources import Source, source
from nnxp.io._atomic import path_of
from nnxp.layers._layer import Layer, whole

TRIES = 2  # of a block, before it is given up
HOPELESS = 8  # blocks that are given up while none has ended well: it is not the blocks
QUEUED = 512  # blocks that an executor is given at once, if it does not say how many it does
MOST_READ = 1.25  # rows for one, because of chunks, before it is said
PATIENCE = 300.0  # seconds in which no block ends, before it is said who does what

Say = Callable[[str], object]


@dataclass(frozen=True)
class Report(Printed):
    """What a sweep has done.

    kept: blocks that were done before. seconds: from the first block to the last, checks included.
    read, compute, write: seconds of all workers together. overhead: the seconds of all workers for
    one of that work; what is above 1 is starting and waiting. hardware: blocks by the kind of
    machine, those that were kept included; on more than one kind the last bits may differ. workers:
    the processes that did blocks, and loads the models that they loaded. peak_memory: bytes of the
    largest of them. failed: by block, what went wrong.
    """

    folder: str
    rows: int
    blocks: int
    kept: int
    nonfinite: int
    seconds: float
    rows_per_second: float
    read: float
    compute: float
    write: float
    overhead: float
    workers: int
    loads: int
    peak_memory: int
    hardware: dict[str, int]
    failed: dict[int, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        total = self.read + self.compute + self.write or 1.0
        shares = ", ".join(
            f"{name} {100 * part / total:.0f} %"
            for name, part in (("reading", self.read), ("computing", self.compute),
                               ("writing", self.write))
        )  # fmt: skip
        lines = [
            f"{self.folder}: {self.rows:,} rows in {self.blocks:,} blocks, of which {self.kept:,} "
            f"were there; {self.seconds:.3g} s, {self.rows_per_second:,.0f} rows a second"
        ]
        if self.workers:
            lines.append(
                f"processes at work: {self.workers}, which loaded {self.loads} models; at most "
                f"{self.peak_memory >> 20:,} MiB each; {shares}; overhead {self.overhead:.2f}"
            )
        lines += [f"ran on {name}: {count:,} blocks" for name, count in self.hardware.items()]
        if len(self.hardware) > 1:
            lines.append("these are of several kinds: the last bits may depend on who did a block")
        if self.nonfinite:
            lines.append(f"{self.nonfinite:,} of {self.rows:,} rows hold NaN or infinity")
        return "\n".join(lines)


def sweep(
    model: str | os.PathLike[str] | Layer,
    rows: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    *,
    executor: Executor | None = None,
    processes: int | None = None,
    key: str | None = None,
    block_rows: int | None = None,
    format: str = "npy",
    precision: str | None = None,
    devices: Sequence[str] = (),
    per_device: int = 1,
    threads: int | None = None,
    imports: Sequence[str] = (),
    restart: bool = False,
    progress: Progress = False,
    patience: float = PATIENCE,
    say: Say | None = None,
) -> Report:
    """The model's output for every row of some files, into a folder, block by block.

        nnxp.cluster.sweep("net.safetensors", "rows.npy", "answers", processes=4)
        y = nnxp.cluster.open("answers")

    Run again, it does what is missing or damaged, and nothing else. The results are those of
    `nnxp.predict` on each block, and the same bits whoever does it, on one kind of machine.

    model: a file, or a model, which is then saved in the folder.
    rows: one or several files (.npy, .h5, .zarr, .parquet), which all workers see by this name;
    `key` names an array or columns in them.
    executor: any of concurrent.futures' kind, such as `ProcessPoolExecutor` (with spawn) or Dask's
    `client.get_executor()`. `processes` starts so many here. With neither, this process does it.
    block_rows: rows of a block; some 32 MiB if None. format: of the files, "npy", "parquet" or
    "zarr", where `parts` is a Zarr array and each block one chunk of it.
    precision: "tf32" as for an Engine. devices: such as ["cuda:0", "cuda:1"], each claimed by at
    most `per_device` processes; without them, the best there is.
    threads: of a process on the CPU; its share of the cores if None. imports: modules that workers
    import first, with layers of your own. restart: throw away what another sweep left there.
    progress: as for an Engine. After `patience` seconds without a block, `say` hears who does what,
    and before the first row, whether blocks cut through the chunks of a file.

    Raises OptionError if the folder belongs to another sweep (it names what differs), RowsError or
    ShapeError if the rows do not fit, BackendUnavailable if no device is free, and SweepError, with
    a `report`, if blocks failed twice: the others are done.
    """
    if isinstance(patience, bool) or not isinstance(patience, int | float) or not patience > 0:
        raise OptionError(f"patience is a number of seconds above 0, not {patience!r:.60}")
    if executor is not None and processes is not None:
        raise OptionError("give an executor, or a number of processes to start here, not both")
    if executor is not None and not callable(getattr(executor, "submit", None)):
        raise OptionError(
            f"executor={executor!r:.60} has no submit; Dask's client.get_executor() gives one"
        )
    processes = None if processes is None else whole("processes", processes)
    devices, imports = _names("devices", devices), _names("imports", imports)
    per_device = whole("per_device", per_device)
    if devices and devices != ("cpu",) and (processes or 1) > len(devices) * per_device:
        raise OptionError(
            f"{processes} processes are more than {len(devices)} devices with {per_device} each "
            "take; start fewer, or allow more of them on each (per_device)"
        )
    size = getattr(executor, "_max_workers", None) if executor else processes or 1
    if threads is None and isinstance(size, int) and (executor or processes):
        threads = max(1, usable_cores() // size)
    setting = Setting(
        None if threads is None else whole("threads", threads), devices, per_device, imports
    )
    sources = _sources(rows, key)
    home = Path(path_of(folder)).absolute()
    if home.exists() and not home.is_dir():
        raise OptionError(f"{home} is a file; the results of a sweep go into a folder")
    home.mkdir(parents=True, exist_ok=True)
    with folders.locked(home):
        plan = _planned(model, sources, home, block_rows, precision, format, restart)
        say = say or _to_stderr
        _check_chunks(plan, say)
        pool = _Pool(executor, processes, size)
        try:
            return _Run(plan, setting, pool, patience, say).all(progress)
        finally:
            pool.close()
            folders.forget_workers(plan)
            if executor is None and processes is None:
                release()


def _names(option: str, names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise OptionError(f"{option} is a list of names, not {names!r:.60}")
    return tuple(names)


def _to_stderr(message: str) -> None:
    print(f"nnxp: note: {message}", file=sys.stderr)


# planning


def _sources(rows: Any, key: str | None) -> tuple[Source, ...]:
    """The files of rows, which must fit each other."""
    if hasattr(rows, "shape"):
        raise OptionError(
            "a sweep reads rows from files, which every worker sees; numpy.save(path, rows) makes "
            "one, and nnxp.predict takes arrays"
        )
    paths = [rows] if isinstance(rows, str | bytes | os.PathLike) else rows
    if not isinstance(paths, Iterable):
        raise OptionError(f"rows are a file, or a list of files, not {rows!r:.60}")
    sources = tuple(source(path_of(path), key) for path in paths)
    if not sources or not sum(file.rows for file in sources):
        raise OptionError("there are no rows to sweep")
    first = sources[0]
    for file in sources:
        if (file.row, file.dtype) != (first.row, first.dtype):
            raise ShapeError(
                f"{file.path} has rows {file.row} of {file.dtype}, but {first.path} {first.row} "
                f"of {first.dtype}"
            )
    return sources


def _planned(
    model: str | os.PathLike[str] | Layer,
    sources: tuple[Source, ...],
    home: Path,
    block_rows: int | None,
    precision: str | None,
    format: str,
    restart: bool,
) -> Plan:
    """The plan, in its folder; what cannot go well is refused before the first row is read."""
    if format not in FORMATS:
        raise OptionError(f"format={format!r:.60} is not offered; {', '.join(FORMATS)} are")
    if format == "parquet":
        from nnxp.io.tables import required_pyarrow

        required_pyarrow("part.parquet")
    path, loaded, saved = _model_file(model, home)
    try:
        result = result_of_zeros(loaded, sources[0].row, sources[0].dtype, precision)
        output = result.shape[1:]
        dtype = np.dtype("float32") if result.dtype.name == "bfloat16" else result.dtype
        if block_rows is None:
            rows = rows_per_block(sources, output, dtype.itemsize)
        else:
            rows = whole("block_rows, the rows of a block,", block_rows)
        plan = Plan(
            str(home), str(path), sha256(path), sources, output, dtype.name, rows, precision, format
        )
        folders.prepare(plan, restart=restart)
        if saved:
            final = home / "model.safetensors"
            os.replace(path, final)
            plan = replace(plan, model=str(final))
            plan.save()
        return plan
    finally:
        if saved:
            path.unlink(missing_ok=True)


def _check_chunks(plan: Plan, say: Say) -> None:
    """Say before the first row if much is read more than once, and how it is not."""
    times, chunk = read_anew(plan.sources, plan.block_rows), max(s.chunk for s in plan.sources)
    if times < MOST_READ:
        return
    better = -(-plan.block_rows // chunk) * chunk
    fits = read_anew(plan.sources, better) < MOST_READ
    advice = f"; with block_rows={better} (--block-rows {better}) they would not" if fits else ""
    say(
        f"blocks of {plan.block_rows:,} rows cut through the file's chunks of {chunk:,}, so that "
        f"each row is read {times:.1f} times{advice}"
    )


def _model_file(model: str | os.PathLike[str] | Layer, home: Path) -> tuple[Path, Layer, bool]:
    """The file that workers load, the model in it, and whether the file was made for them."""
    from nnxp.io.checkpoint import load, save
    from nnxp.io.onnx import load_onnx

    if not isinstance(model, Layer):
        path = Path(path_of(model)).absolute()
        if path.suffix.lower() != ".onnx":
            return path, load(path), False
        model = load_onnx(path)
    path = home.parent / f".{home.name}.{uuid.uuid4().hex}.safetensors"
    save(model, path)
    return path, model, True


# running


class _InThisThread(Executor):
    """Calls are made in this thread, at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **options))
        except Exception as error:
            future.set_exception(error)
        return future


class _Pool:
    """An executor, which is started anew when it breaks, if it is ours.

    `width` is how many blocks it is given at once.
    """

    def __init__(self, executor: Executor | None, processes: int | None, size: Any) -> None:
        self._callers, self._processes = executor, processes
        self._executor = executor or self._started()
        known = isinstance(size, int)
        self.width = QUEUED if not known else 2 * size if executor or processes else 1

    def _started(self) -> Executor:
        if self._processes is None:
            return _InThisThread()
        return ProcessPoolExecutor(
            self._processes, multiprocessing.get_context("spawn"), _end_with_parent
        )

    def submit(self, *call: Any) -> Future[Any]:
        return self._executor.submit(*call)

    def renew(self, error: BaseException) -> None:
        if self._callers is not None:
            raise SweepError(
                f"the executor broke ({error}); run the sweep again with a new one, and it goes on "
                "where this one ended"
            ) from error
        self.close()
        self._executor = self._started()

    def close(self) -> None:
        if self._callers is None:
            self._executor.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """In a worker: Ctrl-C is the parent's to answer; without a parent it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="nnxp parent", daemon=True).start()


class _Run:
    """One run over the blocks that are missing.

    When a process dies, nobody says at which block. So all that were under way are suspects, and
    each of them is tried again alone, until it is known which one ends its process.
    """

    def __init__(
        self, plan: Plan, setting: Setting, pool: _Pool, patience: float, say: Say
    ) -> None:
        self.plan, self.setting, self.pool = plan, setting, pool
        self.patience, self.say = patience, say
        self.id = uuid.uuid4().hex
        self.queue: deque[int] = deque()
        self.running: dict[Future[Any], int] = {}
        self.suspects: set[int] = set()
        self.tries: dict[int, int] = {}
        self.failed: dict[int, str] = {}
        self.full = 0  # how often in a row the disk was full
        self.records: dict[int, dict[str, Any]] = {}

    def all(self, progress: Progress) -> Report:
        start, before = perf_counter(), loads()
        kept = folders.whole(self.plan)
        self.queue.extend(block for block in range(len(self.plan)) if block not in kept)
        with reported(self.plan.rows, progress) as done:
            for block in kept:
                done(self._rows(block))
            try:
                while self.queue or self.running:
                    self._fill()
                    self._collect(done)
            except BaseException:
                wait([future for future in self.running if not future.cancel()])
                raise
        report = self._report(kept, perf_counter() - start, before)
        if self.failed:
            error = SweepError(self._failures_text())
            error.report = report
            raise error
        return report

    def _rows(self, block: int) -> int:
        start, stop = self.plan.span(block)
        return stop - start

    def _fill(self) -> None:
        """Give the pool as much as it takes; a suspect nothing beside it."""
        while self.queue and len(self.running) < self.pool.width:
            alone = self.queue[0] in self.suspects
            if self.running and (alone or self.suspects.intersection(self.running.values())):
                return
            block = self.queue.popleft()
            attempt = f"{self.id} {self.tries.get(block, 0)}"
            call = task, self.plan.folder, self.plan.digest, block, self.setting, attempt
            try:
                self.running[self.pool.submit(*call)] = block
            except BrokenExecutor as error:
                self._executor_broke([block], error)

    def _collect(self, done: Callable[[int], None]) -> None:
        """Take in what has ended."""
        finished, _ = wait(self.running, self.patience, FIRST_COMPLETED)
        if not finished and self.running:
            self.say(self._workers_text())
        broken: list[int] = []
        cause: BaseException | None = None
        for future in finished:
            block = self.running.pop(future)
            try:
                self.records[block] = future.result()
            except BrokenExecutor as error:
                broken.append(block)
                cause = error
            except BackendUnavailable:
                raise  # no fault of the block: whoever works there has no device
            except Exception as error:
                self._check_room(error)
                self._block_failed(block, f"{type(error).__name__}: {error}")
            else:
                self.full = 0
                self.suspects.discard(block)
                done(self._rows(block))
        if cause is not None:
            self._executor_broke(broken, cause)

    def _executor_broke(self, blocks: list[int], error: BaseException) -> None:
        """A process died, and the pool with it."""
        blocks = sorted({*blocks, *self.running.values()})
        self.running.clear()
        self.pool.renew(error)
        if len(blocks) == 1 and blocks[0] in self.suspects:
            self._block_failed(blocks[0], "its process died: killed, or out of memory?")
            return
        self.suspects.update(blocks)
        self.queue.extendleft(reversed(blocks))

    def _block_failed(self, block: int, problem: str) -> None:
        self.tries[block] = self.tries.get(block, 0) + 1
        if self.tries[block] < TRIES:
            self.queue.append(block)
            return
        self.failed[block] = problem
        self.suspects.discard(block)
        if len(self.failed) >= HOPELESS and not self.records:
            raise SweepError(f"nothing goes well, so it ends here: {self._failures_text()}")

    def _check_room(self, error: Exception) -> None:
        """End it if the disk is full, and stays so: blocks would be computed for nothing."""
        if not (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
            return
        self.full += 1
        if self.full >= HOPELESS:
            raise SweepError(
                f"{self.plan.folder}: {error.strerror}, {self.full} times in a row. "
                f"{len(self.records):,} blocks were done; make room and run again, and it goes on"
            ) from error

    def _failures_text(self) -> str:
        block, problem = next(iter(self.failed.items()))
        start, stop = self.plan.span(block)
        others = [str(other) for other in self.failed if other != block]
        more = f"; so did {', '.join(others[:20])}" if others else ""
        return (
            f"{len(self.failed)} of {len(self.plan):,} blocks failed {TRIES} times: block {block} "
            f"(rows {start} to {stop - 1}): {problem}{more}. Run again to try only these"
        )

    def _workers_text(self) -> str:
        workers = map(folders.at_work_line, folders.at_work(self.plan))
        listed = "\n".join(workers) or "  nobody says that it is at work"
        return f"no block has ended for {self.patience:g} s\n{listed}"

    def _report(self, kept: dict[int, Any], seconds: float, before: int) -> Report:
        records = list(self.records.values())
        workers: dict[tuple[str, int], int] = {}
        for record in records:
            worker = record["host"], record["pid"]
            workers[worker] = max(workers.get(worker, 0), record["loads"])
        here = (records[0]["host"] if records else "", os.getpid())
        if here in workers:
            workers[here] -= before
        hardware: dict[str, int] = {}
        for record in [*kept.values(), *records]:
            name = f"{record['device'].partition(':')[0]}: {record['hardware']}"
            hardware[name] = hardware.get(name, 0) + 1
        rows = sum(map(self._rows, self.records))
        threads = len({(record["host"], record["pid"], record["thread"]) for record in records})
        work = sum(record[part] for record in records for part in ("read", "compute", "write"))
        return Report(
            folder=self.plan.folder,
            rows=self.plan.rows,
            blocks=len(self.plan),
            kept=len(kept),
            nonfinite=sum(record["nonfinite"] for record in [*kept.values(), *records]),
            seconds=seconds,
            rows_per_second=rows / seconds,
            read=sum(record["read"] for record in records),
            compute=sum(record["compute"] for record in records),
            write=sum(record["write"] for record in records),
            overhead=threads * seconds / work if work else 1.0,
            workers=len(workers),
            loads=sum(workers.values()),
            peak_memory=max((record["peak_memory"] for record in records), default=0),
            hardware=hardware,
            failed=self.failed,
        )
