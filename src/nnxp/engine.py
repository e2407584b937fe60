"""Rows in, rows out: any number of them, from host memory to host memory, within a budget."""

from __future__ import annotations

import queue
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from nnxp._arrays import Array, HostArray, Shape, is_array, is_floating, is_numeric, place_of
from nnxp._errors import DeviceMismatch, DtypeMismatch, OptionError, ShapeError
from nnxp.backend import Backend, Budget, Plan, Sweep, get_backend
from nnxp.backend._base import Source
from nnxp.layers._layer import Layer
from nnxp.layers._summary import costs

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


MOST_KINDS = 256  # shapes of rows that an engine remembers


@dataclass
class _Known:
    """What rows of one shape cost, and how many fit where memory ran out."""

    row_bytes: int
    fixed_bytes: int
    row_work: int
    most_rows: int | None = None


class _Direct(NamedTuple):
    """A kind of rows that need no planning: what they become, the most of them, what comes out."""

    dtype: np.dtype[Any]
    rows: int
    output: Shape


class Engine:
    """A model on a backend, ready to take rows: `y = engine(x)`.

    The parameters are moved there once, here. `backend` is a name as for `nnxp.get_backend`;
    `engine.backend.why` says how it was chosen. `memory_limit` bounds the bytes of the rows at
    work, parameters and result aside: a number, or a string such as "256 MiB". `workers` is the
    number of threads on the CPU. `precision` is for "tf32" on a GPU, which this version does not
    offer: float32 is float32.

    Raises BackendUnavailable if the backend cannot be used, OptionError for a bad option.
    """

    def __init__(
        self,
        model: Layer,
        backend: str | Backend = "auto",
        *,
        memory_limit: int | str | None = None,
        workers: int | None = None,
        precision: str | None = None,
    ) -> None:
        if not isinstance(model, Layer):
            raise OptionError(f"an Engine takes a model made of nnxp layers, not {model!r}")
        if precision is not None:
            raise OptionError(f"precision={precision!r} is not offered; None means full float32")
        if workers is not None and not (hasattr(workers, "__index__") and workers >= 1):
            raise OptionError(f"workers is a number of threads, at least 1, not {workers!r}")
        self.backend = get_backend(backend)
        self.memory_limit = None if memory_limit is None else parse_bytes(memory_limit)
        self.workers = None if workers is None else int(workers)
        self.model = model.to(self.backend)
        self._known: dict[Shape, _Known] = {}
        self._direct: dict[tuple[np.dtype[Any], Shape], _Direct] = {}

    def __call__(
        self, x: Any, out: HostArray | None = None, *, progress: bool = False
    ) -> HostArray:
        """The model's output for every row of x, as a host array; into `out` if it is given.

        x (rows, ...) is an array, a memory map, a list, or anything with `shape` and slicing, of
        real numbers of any type. A block of it at a time is converted to the model's type; without
        parameters, to that of the rows, or float32 for whole numbers. `out` is an array or memory
        map of the output's shape. `progress` shows a bar on a terminal.

        Raises ShapeError or DtypeMismatch before any work is done, DeviceMismatch for rows that
        are on a device, and OutOfMemory if not even one row fits.
        """
        few = self._few(x) if out is None else None
        if few is not None:
            return few
        rows = _source(x)
        shape = tuple(rows.shape)
        output = self.model.output_shape(shape)
        dtype = self.model.dtype or float_type(rows)
        out = _result(out, output, dtype, rows)
        if shape[0] == 0:
            return out
        plan = self.plan(shape)
        with _bar(shape[0], progress) as done:
            sweep = Sweep(
                fn=lambda block: self._forward(block, dtype, output[1:]),
                rows=rows,
                out=out,
                dtype=dtype,
                plan=plan,
                done=done,
            )
            found = self.backend.sweep(sweep)
        if found is not None:
            self._known[shape[1:]].most_rows = found
        if self.backend.device == "cpu" and self.memory_limit is None:
            if len(self._direct) >= MOST_KINDS:
                self._direct.clear()
            if type(rows) is np.ndarray and rows.dtype.isnative:
                self._direct[rows.dtype, shape[1:]] = _Direct(dtype, plan.rows, output[1:])
        return out

    def _few(self, x: Any) -> HostArray | None:
        """The output for an array of no more rows than a tile, of a kind that was swept before.

        With so few rows the time goes to asking and planning, so it is done once for each kind.
        """
        if type(x) is not np.ndarray or not self._direct or x.ndim == 0:
            return None
        known = self._direct.get((x.dtype, x.shape[1:]))
        if known is None or not 0 < len(x) <= known.rows:
            return None
        try:  # without the door, for all that it asks is known
            y: HostArray = self.model._bare(x if x.dtype == known.dtype else x.astype(known.dtype))
        except Exception:
            return None  # the long way says what is wrong, and where
        if y.shape[1:] != known.output or len(y) != len(x):
            return None
        own = y.base is None and sys.getrefcount(y) <= 2  # nobody holds it but us
        return y if own else y.copy()

    def _forward(self, rows: Array, dtype: np.dtype[Any], output: Shape) -> Array:
        y = self.model(rows if rows.dtype == dtype else rows.astype(dtype))
        if y.shape[1:] != output or len(y) != len(rows):
            raise ShapeError(
                f"{self.model} answers {y.shape} for {len(rows)} rows, where its output_shape "
                f"says {(len(rows), *output)}"
            )
        return y

    def plan(self, shape: Shape) -> Plan:
        """How an x of this shape would be cut: rows together, workers, and the working set.

        Raises ShapeError if such an x does not fit, OutOfMemory if the limit holds not one row.
        """
        self.model.output_shape(shape)
        known = self._known.get(shape[1:])
        if known is None:
            if len(self._known) >= MOST_KINDS:
                self._known.clear()
            known = self._known[shape[1:]] = _Known(*costs(self.model, shape[1:]))
        costs_ = known.row_bytes, known.fixed_bytes, known.row_work
        budget = Budget(*costs_, self.memory_limit, self.workers, known.most_rows)
        return self.backend.plan(shape[0], budget)

    def __reduce__(self) -> Any:
        options = self.backend.device, self.memory_limit, self.workers
        return _engine, (self.model.to("numpy"), *options)

    def __repr__(self) -> str:
        return f"Engine({self.model!r} on {self.backend.device})"


def _engine(model: Layer, device: str, memory_limit: int | None, workers: int | None) -> Engine:
    """An engine that was pickled: on the device that it was on."""
    return Engine(model, device, memory_limit=memory_limit, workers=workers)


def predict(
    model: Layer,
    x: Any,
    backend: str | Backend = "auto",
    *,
    out: HostArray | None = None,
    memory_limit: int | str | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> HostArray:
    """The model's output for every row of x: host in, host out, on the best backend there is.

    `Engine(model, backend, ...)(x, out, ...)` in one call; keep an Engine to call it often.
    """
    engine = Engine(model, backend, memory_limit=memory_limit, workers=workers)
    return engine(x, out, progress=progress)


def predict_iter(
    model: Layer, batches: Iterable[Any], backend: str | Backend = "auto", **options: Any
) -> Iterator[HostArray]:
    """The model's output for each batch of rows, one after the other, as each is asked for.

    While one batch is computed, the next one is read in a thread, and no further ones: so every
    batch is an array of its own, not a buffer that is filled anew. `options` are those of Engine.
    """
    return _one_ahead(Engine(model, backend, **options), iter(batches))


def _one_ahead(engine: Engine, batches: Iterator[Any]) -> Iterator[HostArray]:
    asked, read = threading.Semaphore(0), queue.SimpleQueue[Any]()
    end = object()

    def reader() -> None:
        while asked.acquire():
            if over:
                return
            try:
                read.put((next(batches, end), None))
            except BaseException as error:
                read.put((end, error))

    over: list[bool] = []
    # A daemon: if the batches never come, whoever stops asking for them is not kept waiting.
    thread = threading.Thread(target=copy_context().run, args=(reader,), daemon=True)
    thread.start()
    try:
        asked.release()
        while True:
            batch, error = read.get()
            if error is not None:
                raise error
            if batch is end:
                return
            asked.release()
            yield engine(batch)
    finally:
        over.append(True)
        asked.release()
        thread.join(0.1)  # it ends at once, unless it is waiting for a batch


def parse_bytes(size: int | str) -> int:
    """A number of bytes, from a number or from a string such as "256 MiB" or "2GB"."""
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*([kmg]i?)?b?\s*", size.lower())
        if match is None:
            raise OptionError(f'{size!r} is not a size in bytes; "256 MiB" is one')
        whole, _, part = match[1].partition(".")
        unit = _UNITS[match[2] or ""]
        size = int(whole) * unit + int(float(f"0.{part or 0}") * unit)
    if isinstance(size, bool) or not hasattr(size, "__index__") or size < 1:
        raise OptionError(f"a size in bytes is a whole number above zero, not {size!r}")
    return int(size)


def _source(x: Any) -> Source:
    if is_array(x) and place_of(x) != "cpu":
        raise DeviceMismatch(
            f"an engine takes rows in host memory, but x is on {place_of(x)}; call the model "
            "itself, model(x), or bring the rows to the host with nnxp.asnumpy(x)"
        )
    if isinstance(x, np.ma.MaskedArray):
        raise DtypeMismatch("rows have no mask; x.filled(...) says what stands in its places")
    if not (hasattr(x, "shape") and hasattr(x, "__getitem__")):
        try:
            x = np.asarray(x)
        except ValueError as error:
            raise ShapeError(f"x is no array of rows: {error}") from None
    dtype = getattr(x, "dtype", None)
    if isinstance(dtype, np.dtype) and not is_numeric(dtype):
        raise DtypeMismatch(f"rows are real numbers, but x is {dtype}")
    if len(x.shape) == 0:
        raise ShapeError("x is (rows, ...) but has no axis at all; x[None] makes it one row")
    return x  # type: ignore[no-any-return]


def float_type(rows: Source) -> np.dtype[Any]:
    """What a model without parameters computes in: the type of the rows if it is a float's."""
    dtype = getattr(rows, "dtype", None)
    if isinstance(dtype, np.dtype) and is_floating(dtype):
        return dtype.newbyteorder("=")
    wide = isinstance(dtype, np.dtype) and dtype.kind == "f"  # longdouble: as near as may be
    return np.dtype("float64" if wide else "float32")


def _result(out: HostArray | None, shape: Shape, dtype: np.dtype[Any], rows: Source) -> HostArray:
    if out is None:
        return np.empty(shape, dtype)
    if not isinstance(out, np.ndarray):
        raise OptionError(f"out is a NumPy array or memory map, not {type(out).__name__}")
    if out.shape != shape:
        raise ShapeError(f"out is {out.shape} but the output is {shape}")
    if not np.can_cast(dtype, out.dtype, "same_kind"):
        raise DtypeMismatch(f"out is {out.dtype} but the output is {dtype}")
    if not out.flags.writeable:
        raise OptionError("out is read-only")
    if isinstance(rows, np.ndarray) and np.may_share_memory(rows, out):
        layout = (rows.ctypes.data, rows.strides, rows.dtype)
        if layout != (out.ctypes.data, out.strides, out.dtype):
            raise OptionError(
                "out overlaps x, whose rows would be overwritten before they are read"
            )
    return out


@contextmanager
def _bar(rows: int, wanted: bool) -> Iterator[Callable[[int], None]]:
    """What hears of finished rows: a progress bar if one is wanted and stderr is a terminal."""
    if not (wanted and sys.stderr.isatty()):
        yield lambda done: None
        return
    import typer

    lock = threading.Lock()
    with typer.progressbar(length=rows, file=sys.stderr, width=0) as bar:

        def done(count: int) -> None:
            with lock:
                bar.update(count)

        yield done
