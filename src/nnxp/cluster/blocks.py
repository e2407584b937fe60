"""One block: its rows read, computed and written, by any process that sees the files.

A process loads a model once, however many blocks it does, and has one device for itself.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache, lru_cache
from itertools import pairwise
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import threadpool_info

from nnxp._arrays import HostArray, Shape, nonfinite_rows
from nnxp._errors import BackendUnavailable, CheckpointError, OptionError, RowsError
from nnxp.backend import Backend, get_backend
from nnxp.backend._blas import one_blas_thread
from nnxp.backend._machine import processor
from nnxp.cluster.plan import Plan, sha256
from nnxp.engine import Engine, forget_engines, kept_engine
from nnxp.io._atomic import _is_at as is_at
from nnxp.io._atomic import _lock as lock
from nnxp.io._atomic import written_beside
from nnxp.io.rows import appending
from nnxp.layers._layer import Layer

WAITING = 0.05  # seconds, until it is asked again whether a block is free


class Setting(NamedTuple):
    """How a process works, which does not show in the results.

    threads: on the CPU; None for the cores that it may use. devices: those to choose from, of
    which a process claims one, shared by at most `per_device` processes; none is the best there is.
    imports: modules to import first, which define layers of your own.
    """

    threads: int | None = None
    devices: tuple[str, ...] = ()
    per_device: int = 1
    imports: tuple[str, ...] = ()


DEFAULT = Setting()


def run_block(plan: Plan, block: int, setting: Setting = DEFAULT) -> dict[str, Any]:
    """Do one block of a plan, unless it is done already, and answer its record.

    The file is written beside its place, synced and renamed, and then its record; so a block is
    done, or not at all. Of two processes that are asked for the same block one does it, and the
    other waits and answers the same record.

    Raises RowsError if the rows, CheckpointError if the model's file is not the one that was
    planned for, BackendUnavailable if no device is free, OSError if the disk is full.
    """
    if not isinstance(plan, Plan):
        raise OptionError(f"run_block takes a plan, as Plan.load(folder) gives, not {plan!r:.60}")
    with _claimed_block(plan, block):
        return done_record(plan, block) or _done(plan, block, setting)


def _done(plan: Plan, block: int, setting: Setting) -> dict[str, Any]:
    engine = engine_of(plan, setting)
    device, (start, stop) = engine.backend.device, plan.span(block)
    times = [perf_counter()]
    rows = plan.read(start, stop)
    times.append(perf_counter())
    results = computed(engine, rows)
    times.append(perf_counter())
    if results.shape != (stop - start, *plan.output):
        raise RowsError(f"block {block} gave {results.shape}, not {(stop - start, *plan.output)}")
    path = plan.part(block)
    with written_beside(path, lambda message: None) as beside:
        write(beside, results.astype(plan.output_dtype, copy=False), plan)
        digest, size = sha256(beside), beside.stat().st_size
    times.append(perf_counter())
    read, compute, wrote = (after - before for before, after in pairwise(times))
    record = {
        "plan": plan.digest, "block": block, "start": start, "stop": stop,
        "file": path.name, "bytes": size, "sha256": digest,
        "nonfinite": nonfinite_rows(rows),
        "host": socket.gethostname(), "pid": os.getpid(),
        "thread": threading.get_ident(), "loads": loads(),
        "device": device, "hardware": hardware(device),
        "read": read, "compute": compute, "write": wrote, "peak_memory": peak_memory(),
    }  # fmt: skip
    with written_beside(plan.record(block), lambda message: None) as beside:
        beside.write_text(json.dumps(record) + "\n")
    return record


def computed(engine: Engine, rows: HostArray) -> Any:
    """What the engine makes of rows.

    By one BLAS thread on the CPU, whoever works here beside us: the same products, whatever the
    machine.
    """
    with one_blas_thread() if engine.backend.device == "cpu" else nullcontext():
        return engine(rows)


def result_of_zeros(
    model: Layer, row: Shape, dtype: Any, precision: str | None = None
) -> HostArray:
    """What a model makes of a row of zeros, (1, ...): the shape and type of its results.

    Raises OptionError for a model of several results.
    """
    result = Engine(model, "cpu", precision=precision)(np.zeros((1, *row), dtype))
    if not isinstance(result, np.ndarray):
        raise OptionError(f"{model!r:.200} has {len(result)} results; this is for one")
    return result


def task(folder: str, digest: str, block: int, setting: Setting, attempt: str) -> dict[str, Any]:
    """What is sent to an executor: some hundred bytes. `attempt` tells one try from the next, for
    executors that remember what a call answered."""
    return run_block(_plan(folder, digest), block, setting)


@lru_cache(4)
def _plan(folder: str, digest: str) -> Plan:
    plan = Plan.load(folder)
    if plan.digest != digest:
        raise RowsError(f"{folder} has another plan than this sweep: was it restarted meanwhile?")
    return plan


def done_record(plan: Plan, block: int) -> dict[str, Any] | None:
    """The record of a block whose file is there and whole; None otherwise."""
    record = read_record(plan, block)
    if record is None:
        return None
    try:
        path = plan.part(block)
        whole = path.stat().st_size == record["bytes"] and sha256(path) == record["sha256"]
    except OSError:
        return None
    return record if whole else None


def read_record(plan: Plan, block: int) -> dict[str, Any] | None:
    """The record of a block of this plan, if it has one; its file is not looked at."""
    try:
        record = json.loads(plan.record(block).read_text())
        fits = (record["plan"], record["block"]) == (plan.digest, block)
        return record if fits and {"bytes", "sha256"} <= set(record) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def _claimed_block(plan: Plan, block: int) -> Iterator[None]:
    """A stretch in which nobody else does this block, and the folder says who does it.

    The system lets go of the lock when the process ends, however that happens.
    """
    path = Path(plan.folder, "workers", f"{block:08}.json")
    path.parent.mkdir(exist_ok=True)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if lock(handle) and is_at(handle, path):
            break
        os.close(handle)
        time.sleep(WAITING)
    try:
        who = {"host": socket.gethostname(), "pid": os.getpid(), "block": block}
        with suppress(OSError):  # it informs, no more
            os.ftruncate(handle, 0)
            os.write(handle, json.dumps({**who, "since": time.time()}).encode())
        yield
    finally:
        with suppress(OSError):
            os.unlink(path)
        os.close(handle)


def write(path: Path, results: HostArray, plan: Plan) -> None:
    """Write the results of a block."""
    if plan.format != "zarr":
        columns = prod(plan.output) if plan.format == "parquet" else 0
        names, kind = [f"y{i}" for i in range(columns)], f"part.{plan.format}"
        with appending(kind, path, plan.output, results.dtype, names) as append:
            append(results)
        return
    chunk = np.ascontiguousarray(results, results.dtype.newbyteorder("<"))
    with open(path, "wb") as file:  # no `tofile`: it does not say that a disk is full
        file.write(chunk.reshape(-1).view("uint8").data)
        # all rows of a chunk, also where the array ends before
        file.truncate(plan.block_rows * chunk.nbytes // len(chunk))


# what a process keeps


_lock = threading.RLock()
_claims: dict[str, int] = {}
_loads = 0


def loads() -> int:
    """How many models this process has loaded for blocks."""
    return _loads


def engine_of(plan: Plan, setting: Setting) -> Engine:
    """This process's engine for the plan's model, which is loaded when it is first asked for."""
    with _lock:
        key = plan.model_sha256, plan.precision, setting
        return kept_engine(key, lambda: _loaded(plan, setting))


def _loaded(plan: Plan, setting: Setting) -> Engine:
    global _loads
    for name in setting.imports:
        importlib.import_module(name)
    backend = claimed_backend(setting)
    digest = sha256(plan.model)
    if digest != plan.model_sha256:
        raise CheckpointError(
            f"{plan.model} is another model than was planned for: its sha256 begins with "
            f"{digest[:12]}, not {plan.model_sha256[:12]}"
        )
    from nnxp.io.checkpoint import load

    _loads += 1
    precision = plan.precision if backend.device != "cpu" else None
    return Engine(load(plan.model), backend, workers=setting.threads, precision=precision)


def release() -> None:
    """Let go of the engines and devices of this process."""
    with _lock:
        forget_engines()
        for handle in _claims.values():
            os.close(handle)
        _claims.clear()


def claimed_backend(setting: Setting) -> Backend:
    """The device of this process: the one it has, or the first that nobody else has.

    The CPU needs no claim. A claim is a lock on a file of the host's temporary folder, of which the
    system lets go when the process ends. Raises BackendUnavailable if all are taken.
    """
    if not setting.devices:
        best = get_backend("auto")
        names = ["cpu"] if best.device == "cpu" else _siblings(best)
    else:
        names = [get_backend(name).device for name in setting.devices]
    if "cpu" in names:
        return get_backend("cpu" if len(names) == 1 else next(n for n in names if n != "cpu"))
    for name in names:
        if name in _claims:
            return get_backend(name)
    holders = []
    for name in names:
        for place in range(setting.per_device):
            handle, holder = _claim(f"{name.replace(':', '-')}-{place}")
            if handle is not None:
                _claims[name] = handle
                return get_backend(name)
            holders.append(f"{name} by process {holder}")
    raise BackendUnavailable(
        f"every device is taken on {socket.gethostname()}: {', '.join(holders)}",
        "Start fewer processes, name more devices, or allow several processes on each (per_device)",
    )


def _siblings(backend: Backend) -> list[str]:
    """All devices of the kind of this one."""
    kind, names = backend.device.partition(":")[0], []
    for index in range(64):
        try:
            names.append(get_backend(f"{kind}:{index}").device)
        except BackendUnavailable:
            break
    return names or [backend.device]


def _claim(name: str) -> tuple[int | None, str]:
    """A locked file, or None and who has locked it."""
    path = os.path.join(tempfile.gettempdir(), f"nnxp-{socket.gethostname()}-{name}.lock")
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    handle = os.open(path, flags, 0o666)
    if not lock(handle):
        holder = os.read(handle, 20).decode(errors="replace").strip()
        os.close(handle)
        return None, holder or "another"
    os.ftruncate(handle, 0)
    os.write(handle, f"{os.getpid()}\n".encode())
    return handle, ""


@cache
def hardware(device: str) -> str:
    """The kind of machine: on one kind the same rows give the same bits."""
    from nnxp.testing.goldens import provenance

    if device != "cpu":
        return str(provenance(get_backend(device)).get("hardware", device))
    of_numpy = [library for library in threadpool_info() if "numpy" in library["filepath"]]
    kernels = [str(library["architecture"]) for library in of_numpy if library.get("architecture")]
    return ", ".join([processor(), *kernels[:1]])


def peak_memory() -> int:
    """The most memory that this process had so far, in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if os.uname().sysname == "Darwin" else 1024)
