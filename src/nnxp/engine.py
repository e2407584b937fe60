"""Rows in, rows out: any number of them, from host memory to host memory, within a budget."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from nnxp._arrays import Array, HostArray, Shape, is_array, is_floating, is_numeric, place_of
from nnxp._errors import DeviceMismatch, DtypeMismatch, OptionError, ShapeError
from nnxp.backend import Backend, Budget, Plan, Sweep, get_backend
from nnxp.backend._base import Source
from nnxp.layers._layer import Layer
from nnxp.layers._summary import row_bytes, summarize

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


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
        if workers is not None and (type(workers) is not int or workers < 1):
            raise OptionError(f"workers is a number of threads, at least 1, not {workers!r}")
        self.backend = get_backend(backend)
        self.memory_limit = None if memory_limit is None else parse_bytes(memory_limit)
        self.workers = workers
        self.model = model.to(self.backend)
        self._costs: dict[Shape, tuple[int, int]] = {}
        self._direct: dict[tuple[np.dtype[Any], Shape], tuple[np.dtype[Any], int]] = {}
        self._most_rows: int | None = None  # what the device's memory was found to hold

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
        out = _result(out, output, dtype)
        if shape[0] == 0:
            return out
        with _bar(shape[0], progress) as done:
            used = self.backend.sweep(
                Sweep(
                    fn=lambda block: self._forward(block, dtype),
                    rows=rows,
                    out=out,
                    budget=self._budget(shape[1:]),
                    done=done,
                )
            )
        if self.backend.device != "cpu":
            if used < shape[0]:
                self._most_rows = used
        elif type(rows) is np.ndarray and self.memory_limit is None:
            self._direct[rows.dtype, shape[1:]] = dtype, used
        return out

    def _few(self, x: Any) -> HostArray | None:
        """The output for an array of no more rows than a tile, of a kind that was swept before.

        With so few rows the time goes to asking and planning, so it is done once for each kind.
        """
        if type(x) is not np.ndarray or not self._direct or x.ndim == 0:
            return None
        dtype, most = self._direct.get((x.dtype, x.shape[1:]), (None, 0))
        if not 0 < len(x) <= most:
            return None
        y: HostArray = self.model(x if x.dtype == dtype else x.astype(dtype))
        return y if y.base is None and y is not x else y.copy()

    def _forward(self, rows: Array, dtype: np.dtype[Any]) -> Array:
        if not is_numeric(rows.dtype):
            raise DtypeMismatch(f"rows are real numbers, not {rows.dtype}")
        return self.model(rows.astype(dtype, copy=False))

    def plan(self, shape: Shape) -> Plan:
        """How an x of this shape would be cut: rows together, workers, and the working set.

        Raises ShapeError if such an x does not fit, OutOfMemory if the limit holds not one row.
        """
        self.model.output_shape(shape)
        return self.backend.plan(shape[0], self._budget(shape[1:]))

    def _budget(self, row: Shape) -> Budget:
        """What rows of this shape cost and may cost."""
        if row not in self._costs:
            bytes_ = row_bytes(self.model, row)
            # A byte that is passed over takes about as long as a multiply-add in a product.
            self._costs[row] = bytes_, bytes_ + summarize(self.model, (1, *row)).multiply_adds
        return Budget(*self._costs[row], self.memory_limit, self.workers, self._most_rows)

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

    While one batch is computed, the next one is read in a thread, and no further ones. `options`
    are those of Engine.
    """
    return _one_ahead(Engine(model, backend, **options), iter(batches))


def _one_ahead(engine: Engine, batches: Iterator[Any]) -> Iterator[HostArray]:
    from concurrent.futures import ThreadPoolExecutor  # brings logging: not for every import

    end = object()
    with ThreadPoolExecutor(1, "nnxp-read") as reader:
        ahead = reader.submit(next, batches, end)
        while (batch := ahead.result()) is not end:
            ahead = reader.submit(next, batches, end)
            yield engine(batch)


def parse_bytes(size: int | str) -> int:
    """A number of bytes, from a number or from a string such as "256 MiB" or "2GB"."""
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*([kmg]i?)?b?\s*", size.lower())
        if match is None:
            raise OptionError(f'{size!r} is not a size in bytes; "256 MiB" is one')
        whole, _, part = match[1].partition(".")
        unit = _UNITS[match[2] or ""]
        size = int(whole) * unit + int(float(f"0.{part or 0}") * unit)
    if type(size) is not int or size < 1:
        raise OptionError(f"a size in bytes is a whole number above zero, not {size!r}")
    return size


def _source(x: Any) -> Source:
    if is_array(x) and place_of(x) != "cpu":
        raise DeviceMismatch(
            f"an engine takes rows in host memory, but x is on {place_of(x)}; call the model "
            "itself, model(x), or bring the rows to the host with nnxp.asnumpy(x)"
        )
    if not (hasattr(x, "shape") and hasattr(x, "__getitem__")):
        x = np.asarray(x)
    if len(x.shape) == 0:
        raise ShapeError("x is (rows, ...) but has no axis at all; x[None] makes it one row")
    dtype = getattr(x, "dtype", None)
    if isinstance(dtype, np.dtype) and not is_numeric(dtype):
        raise DtypeMismatch(f"rows are real numbers, but x is {dtype}; x.astype('float32')")
    return x  # type: ignore[no-any-return]


def float_type(rows: Source) -> np.dtype[Any]:
    """What a model without parameters computes in: the type of the rows if it is a float's."""
    dtype = getattr(rows, "dtype", None)
    floating = isinstance(dtype, np.dtype) and is_floating(dtype)
    return dtype if floating else np.dtype("float32")  # type: ignore[return-value]


def _result(out: HostArray | None, shape: Shape, dtype: np.dtype[Any]) -> HostArray:
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
