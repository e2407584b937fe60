"""Rows in, rows out: any number of them, from host memory to host memory, within a budget."""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np

from nnxp._arrays import Array, HostArray, Shape, is_array, is_floating, is_numeric, place_of
from nnxp._errors import DeviceMismatch, DtypeMismatch, OptionError, ShapeError
from nnxp._exchange import in_order, shares_memory, source_of
from nnxp._progress import Progress, told
from nnxp.backend import Backend, Budget, Plan, Sweep, get_backend
from nnxp.backend._base import Cursor, Source
from nnxp.backend._blocks import BLOCK_ROWS, BlockBackend
from nnxp.backend._lanes import Kept, Recorded
from nnxp.backend._threads import one_ahead, together
from nnxp.kernels.linear import precision as _precision
from nnxp.layers._layer import Layer
from nnxp.program.program import Costs, Outline, Program
from nnxp.program.recording import Recording, costs, expanded
from nnxp.program.rewrite import in_their_own_type
from nnxp.program.traced import Untraceable

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


MOST_KINDS = 256  # shapes of rows that an engine remembers
MOST_RECORDED = 32  # of which each holds buffers on a device
FEW_ROWS = 512  # at most, to be recorded: with more of them, starting the work is little of it


@dataclass
class _Kind:
    """Rows of one type and shape: the program for them, what it costs, and what fits together."""

    program: Program
    output: Outline
    costs: Costs
    most_rows: int | None = None


class Engine:
    """A model on a backend, ready to take rows: `y = engine(x)`.

    The parameters are moved there once, here, and engines of one model on one device share them:
    change them with `model.with_parameters`, not in place.

    `backend` is a name as for `nnxp.get_backend`; `engine.backend.why` says how it was chosen. A
    list of devices, such as `["cuda:0", "cuda:1"]`, shares the rows out among them.

    `memory_limit` bounds the bytes of the rows at work in one call, parameters and result aside: a
    number, or a string such as "256 MiB". On CUDA, cuBLASLt may take 32 MiB for each of three lanes
    beside it, and a first product some for trying out how it is done best.

    `workers` is the number of threads on the CPU. `precision="tf32"` allows a GPU to round the
    factors of float32 products to ten bits, which is several times as fast; a CPU has no use for
    the permission. Without it float32 is float32.

    What an engine holds on a device between two calls, `engine.close()` gives back, and so does
    the end of a `with` block or of the engine's life.

    Raises BackendUnavailable if the backend cannot be used, OptionError for a bad option.
    """

    def __init__(
        self,
        model: Layer,
        backend: str | Backend | Sequence[str | Backend] = "auto",
        *,
        memory_limit: int | str | None = None,
        workers: int | None = None,
        precision: str | None = None,
    ) -> None:
        if not isinstance(model, Layer):
            raise OptionError(f"an Engine takes a model made of nnxp layers, not {model!r}")
        if precision not in (None, "tf32"):
            raise OptionError(f'precision={precision!r} is not offered; "tf32" is, and None')
        if precision and model.dtype != np.float32:
            raise OptionError(
                f'precision="tf32" is for float32 models, but {model} is {model.dtype}'
            )
        if workers is not None and not (hasattr(workers, "__index__") and workers >= 1):
            raise OptionError(f"workers is a number of threads, at least 1, not {workers!r}")
        self.memory_limit = None if memory_limit is None else parse_bytes(memory_limit)
        self.workers = None if workers is None else int(workers)
        self.precision = precision
        self._places = [Replica(model, each) for each in _backends(backend)]
        self.backend = self._places[0].backend

    @property
    def backends(self) -> list[Backend]:
        """Where the rows go: one backend, or all of several devices. None, once it is closed."""
        return [place.backend for place in self._places]

    @property
    def model(self) -> Layer:
        """The model, on the (first) backend."""
        if not self._places:
            raise OptionError("this engine is closed")
        return self._places[0].model

    def __call__(self, x: Any, out: Any = None, *, progress: Progress = False) -> Any:
        """The model's output for every row of x, as a host array; into `out` if it is given.

        x (rows, ...) is an array, a memory map, a list, or anything with `shape` and slicing, of
        real numbers of any type. A block of it at a time is converted to the model's type; without
        parameters, to that of the rows, or float32 for whole numbers. `out` is an array or memory
        map of the output's shape. `progress` shows a bar on a terminal
        and in a notebook, or is called with the rows done and the rows in all.

        Rows that are on the engine's device already, in a CuPy array or in a tensor of any library
        that speaks DLPack, stay there: the answer is an array of the same library, computed in
        blocks that fit, on CuPy's current stream; who reads it on another stream orders the two.

        Raises ShapeError or DtypeMismatch before any work is done, DeviceMismatch for rows that
        are on another device, and OutOfMemory if not even one row fits.
        """
        if out is None and type(x) is np.ndarray and self._places:
            idle = self._places[0].ready.get((x.dtype, x.shape))
            if idle is not None:
                return idle(x)
        model = self.model
        place, there = self._at_home(x)
        if place is not None:
            in_kind = _in_kind(x)
            return in_kind(self._resident(place, there, out))
        rows: Source = in_order(source_of(x), getattr(model, "columns", None))
        shape = tuple(rows.shape)
        dtype = model.dtype or float_type(rows)
        given = getattr(rows, "dtype", None)
        travels = given.newbyteorder("=") if isinstance(given, np.dtype) else np.dtype("float64")
        kind = self._places[0].kind(shape, travels, dtype)
        output, dtype = (shape[0], *kind.output.shape), kind.output.dtype
        fresh = out is None
        out = _result(out, output, dtype, rows)
        if shape[0] == 0:
            return out
        plans = self._plans(shape, travels, dtype)
        cursor = Cursor(shape[0])
        with told(shape[0], progress) as done:

            def sweep(place: Replica, plan: Plan) -> None:
                kind = place.kind(shape, travels, dtype)
                fn = partial(place.forward, kind, self.precision)
                fill = partial(place.fill, kind, dtype, self.memory_limit is not None)
                taken = kind.program.inputs[0].dtype  # wider than the model's, where it centres first
                sweep = Sweep(fn, fill, rows, out, taken, plan, done, cursor, place.kept)
                found = place.backend.sweep(sweep)
                if found is not None:
                    kind.most_rows = found

            together([partial(sweep, *each) for each in zip(*plans, strict=True)], cursor.stop)
        if type(rows) is np.ndarray and fresh and not self.memory_limit:
            few = shape[0] <= plans[1][0].rows
            for place in self._places[:1] if few else []:  # none, if it was closed meanwhile
                place.meet(rows, kind, dtype, self.precision)
        return out

    def _at_home(self, x: Any) -> tuple[Replica | None, Array]:
        """The place where x is already, and x as an array of ours; None if it is in host memory.

        Raises DeviceMismatch for what is on a device that is not the engine's.
        """
        if is_array(x):
            device = place_of(x)
            if device == "cpu":
                return None, x
            for place in self._places:
                if device == place.backend.device:
                    return place, x
        elif hasattr(x, "__dlpack_device__"):
            kind, index = x.__dlpack_device__()
            if kind in _HOST:
                return None, x
            for place in self._places:
                at = place.backend
                if isinstance(at, BlockBackend) and (at.dlpack, at.index) == (kind, index):
                    return place, _taken(at.xp, x)
            device = f"device {index} of kind {kind.real} in DLPack's count"
        else:
            return None, x
        places = " and ".join(each.device for each in self.backends)
        raise DeviceMismatch(
            f"an engine on {places} takes rows that are there or in host memory, but x is on "
            f"{device}; bring it to the host, with nnxp.asnumpy(x) if it is an array of CuPy"
        )

    def _resident(self, place: Replica, x: Array, out: Array | None) -> Array:
        """Rows that are on the device, through the model, there."""
        recorded = place.recorded.get((x.dtype, x.shape)) if out is None else None
        if recorded is not None:
            return recorded.device(x)
        backend, model = place.backend, place.model
        assert isinstance(backend, BlockBackend)
        if x.ndim == 0:
            raise ShapeError("x is (rows, ...) but has no axis at all; x[None] makes it one row")
        if not is_numeric(x.dtype):
            raise DtypeMismatch(f"rows are real numbers, but x is {x.dtype}")
        kind = place.kind(x.shape, x.dtype, model.dtype or float_type(x))
        output, dtype = (len(x), *kind.output.shape), kind.output.dtype
        fn = partial(place.forward, kind, self.precision)
        if out is not None and not (is_array(out) and place_of(out) == backend.device):
            raise OptionError(f"x is on {backend.device}, so out is an array there, too")
        if out is not None and out.shape != output:
            raise ShapeError(f"out is {out.shape} but the output is {output}")
        if out is not None and out.dtype != dtype:
            raise DtypeMismatch(f"out is {out.dtype} but the output is {dtype}")
        with backend.current():
            if len(x) == 0:
                return backend.xp.empty(output, dtype) if out is None else out
            few = self.memory_limit is None and len(x) <= BLOCK_ROWS[0]
            plan = Plan(len(x), 1, 0) if few else self._plan(place, kind, len(x))  # to ask takes long
            made = backend.through(fn, x, out, output, dtype, plan, place.kept)
        if out is None and self.memory_limit is None:
            place.meet(x, kind, dtype, self.precision)
        return made

    def plan(self, shape: Shape) -> Plan:
        """How an x of this shape would be cut: rows together, workers, and the working set.

        Several devices have the largest of their blocks, and all their workers and working sets.
        Raises ShapeError if such an x does not fit, OutOfMemory if the limit holds not one row.
        """
        if not (isinstance(shape, tuple | list) and all(hasattr(n, "__index__") for n in shape)):
            raise OptionError(f"plan takes the shape of x, such as (1000, 784), not {shape!r:.60}")
        dtype = self.model.dtype or np.dtype("float32")
        plans = self._plans(tuple(shape), dtype, dtype)[1]
        return Plan(
            max(each.rows for each in plans),
            sum(each.workers for each in plans),
            sum(each.working_set for each in plans),
        )

    def _plans(
        self, shape: Shape, travels: np.dtype[Any], dtype: np.dtype[Any]
    ) -> tuple[list[Replica], list[Plan]]:
        """The places that have a part in so many rows, and how each would cut its part."""
        kinds = [place.kind(shape, travels, dtype) for place in self._places]
        first = self._plan(self._places[0], kinds[0], shape[0])
        if len(self._places) == 1 or shape[0] <= first.rows:
            return self._places[:1], [first]
        part = -(-shape[0] // len(self._places))
        return self._places, [
            self._plan(place, kind, part) for place, kind in zip(self._places, kinds, strict=True)
        ]

    def _plan(self, place: Replica, kind: _Kind, rows: int) -> Plan:
        held = place.kept.unused()
        budget = Budget(*kind.costs, self.memory_limit, self.workers, kind.most_rows, held)
        return place.backend.plan(rows, budget)

    def close(self) -> None:
        """Give back what is held on the device; the engine takes no more rows."""
        places, self._places = self._places, []
        for place in places:
            place.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        devices = [each.device for each in self.backends]
        options = devices, self.memory_limit, self.workers, self.precision
        return _engine, (self.model.to("numpy"), *options)

    def __repr__(self) -> str:
        if not self._places:
            return "Engine(closed)"
        devices = " and ".join(each.device for each in self.backends)
        return f"Engine({self.model!r} on {devices})"


def _engine(
    model: Layer,
    devices: list[str],
    memory_limit: int | None,
    workers: int | None,
    precision: str | None,
) -> Engine:
    """An engine that was pickled: on the devices that it was on."""
    return Engine(model, devices, memory_limit=memory_limit, workers=workers, precision=precision)


class Replica:
    """The model on one device, with what an engine keeps and knows there."""

    def __init__(self, model: Layer, backend: Backend) -> None:
        self.backend, self.model = backend, _shared(model, backend)
        self.kept = Kept()
        self.ready: dict[tuple[np.dtype[Any], Shape], Callable[[Array], Array]] = {}
        self.recorded: dict[tuple[np.dtype[Any], Shape], Recorded] = {}
        self._kinds: dict[tuple[Shape, np.dtype[Any], np.dtype[Any]], _Kind] = {}
        self._idle: dict[tuple[np.dtype[Any], Shape], list[Recording]] = {}
        self._met: dict[tuple[np.dtype[Any], Shape], int] = {}
        self._close = weakref.finalize(self, self.kept.close)
        self._close.atexit = False

    def kind(self, shape: Shape, travels: np.dtype[Any], dtype: np.dtype[Any]) -> _Kind:
        """What is known of rows like these, that come in one type and are computed in another.

        Raises ShapeError for rows that do not fit, and for a model that mixes rows.
        """
        key = shape[1:], travels, dtype
        kind = self._kinds.get(key)
        if kind is None:
            made = _Kind(*self._written(shape, travels, dtype))
            if len(self._kinds) >= MOST_KINDS:
                self._kinds.clear()
            kind = self._kinds[key] = made
        return kind

    def _written(
        self, shape: Shape, travels: np.dtype[Any], dtype: np.dtype[Any]
    ) -> tuple[Program, Outline, Costs]:
        try:
            program = self.model.program((shape, dtype))
        except Untraceable as error:
            raise ShapeError(f"{self.model!r:.200} does not go through an engine: {error}") from None
        if program.mixing:
            raise ShapeError(
                f"an engine takes rows in blocks, but {program.mixing}; call the model on all of them"
            )
        program = in_their_own_type(program, travels)
        if program.several:
            raise ShapeError(f"{self.model!r:.200} answers several arrays: an engine takes one")
        if self.backend.name != "cupy":
            program = expanded(program)  # on CUDA kernels have bodies of their own
        (output,) = program.outline(1)
        counted = costs(program, travels)
        row = prod(shape[1:]) * travels.itemsize  # a block of rows, as it is read
        result = prod(output.shape) * output.dtype.itemsize
        own = row if self.backend.name == "numpy" else row + result
        return (
            program,
            Outline(output.shape[1:], output.dtype),
            Costs(counted.row_bytes + own, counted.fixed_bytes, counted.row_work),
        )

    def forward(self, kind: _Kind, precision: str | None, rows: Array) -> Array:
        """Rows on the device through the model, there."""
        token = _precision.set(precision)
        try:
            dtype = kind.program.inputs[0].dtype
            return kind.program(rows if rows.dtype == dtype else rows.astype(dtype))
        finally:
            _precision.reset(token)

    def fill(
        self, kind: _Kind, dtype: np.dtype[Any], sparing: bool, rows: HostArray, out: HostArray
    ) -> None:
        """Host rows through the model on the CPU, into `out`.

        What is recorded for such a block is kept for the next one, unless memory is to be spared:
        then only while blocks go on being of one size.
        """
        key = rows.dtype, rows.shape
        idle = self._idle.get(key)
        if idle is None:
            if sparing or len(self._idle) >= MOST_RECORDED:
                self._idle.clear()
            idle = self._idle[key] = []
        try:
            recording = idle.pop()
        except IndexError:
            recording = Recording(kind.program, len(rows), [rows.dtype])
        whole = out.flags.c_contiguous and out.dtype == dtype
        into = out if whole else np.empty(out.shape, dtype)
        with np.errstate(all="ignore"):
            recording((rows,), (into,))
            if not whole:
                np.copyto(out, into, casting="same_kind")
        idle.append(recording)

    def meet(
        self, x: Array, kind: _Kind, dtype: np.dtype[Any], precision: str | None
    ) -> None:
        """Make the next call with such rows a short one.

        On a device few rows are recorded when they have come twice, unless layers are run as
        Python: a recording cannot know whether these would do something else the next time.
        """
        key = x.dtype, x.shape
        if len(self.ready) >= MOST_KINDS:
            self.ready.clear()
        if self.backend.device == "cpu":
            if x.dtype.isnative:
                output = kind.output.shape

                def short(rows: HostArray) -> HostArray:
                    y = np.empty((len(rows), *output), dtype)
                    self.fill(kind, dtype, False, rows, y)
                    return y

                self.ready[key] = short
            return
        if not 0 < len(x) <= FEW_ROWS or len(self._met) > MOST_KINDS or kind.program.opaque:
            return
        count = self._met[key] = self._met.get(key, 0) + 1
        if count < 2 or count & (count - 1) or not isinstance(self.backend, BlockBackend):
            return
        fn = partial(self.forward, kind, precision)
        try:
            recorded = Recorded(self.backend, fn, x.shape, x.dtype)
        except Exception:
            return  # it goes the long way, as it did so far; perhaps there was no memory just now
        recorded.model = self.model  # whose parameters it reads where they lie
        while len(self.recorded) >= MOST_RECORDED:
            gone = next(iter(self.recorded), None)
            self.recorded.pop(gone, None)  # type: ignore[arg-type]
            self.ready.pop(gone, None)  # type: ignore[arg-type]
        self.recorded[key] = recorded
        self.ready[key] = recorded.host

    def close(self) -> None:
        self._close()
        self.recorded.clear()
        self.ready.clear()
        self._idle.clear()


def _backends(
    backend: str | Backend | Sequence[str | Backend],
) -> list[Backend]:
    """The backend, or all of a list of devices. OptionError for a list that names none or two."""
    if isinstance(backend, str) or not isinstance(backend, Sequence):
        return [get_backend(backend)]
    found = [get_backend(each) for each in backend]
    devices = [each.device for each in found]
    if not found or len(set(devices)) < len(devices):
        raise OptionError(f"several backends are different devices, not {devices}")
    if len(found) > 1 and "cpu" in devices:
        raise OptionError(f"rows are shared among devices, and the CPU is none: {devices}")
    return found


def _shared(model: Layer, backend: Backend) -> Layer:
    """The model on this backend; whoever asks while it is there gets the same one."""
    if backend.device == "cpu":
        return model.to(backend)
    copies = model.__dict__.setdefault("_copies", weakref.WeakValueDictionary())
    there: Layer | None = copies.get(backend.device)
    if there is None:
        there = model.to(backend)
        if there is not model:
            copies[backend.device] = there
    return there


_HOST = (1, 3)  # DLPack's kDLCPU and kDLCUDAHost: a slice becomes a NumPy array


def _taken(xp: Any, x: Any) -> Array:
    """Another library's array on our device, as one of ours, sharing its memory."""
    try:
        return xp.from_dlpack(x)
    except BufferError as error:
        raise DtypeMismatch(f"x cannot be lent ({error}); x.detach() may help") from None


def _in_kind(x: Any) -> Callable[[Array], Any]:
    """What makes an array of ours one of the library of x, sharing its memory."""
    if is_array(x):
        return lambda y: y
    if hasattr(x, "__array_namespace__"):
        library = x.__array_namespace__()
    else:
        library = sys.modules.get(type(x).__module__.partition(".")[0])
    take: Callable[[Array], Any] | None = getattr(library, "from_dlpack", None)
    if take is None:
        raise DtypeMismatch(
            f"{type(x).__module__}.{type(x).__qualname__} cannot be answered in kind, for its "
            "library has no from_dlpack; cupy.from_dlpack(x) is taken, and answered"
        )
    return take


def predict(
    model: Layer,
    x: Any,
    backend: str | Backend | Sequence[str | Backend] = "auto",
    *,
    out: HostArray | None = None,
    memory_limit: int | str | None = None,
    workers: int | None = None,
    precision: str | None = None,
    progress: Progress = False,
) -> HostArray:
    """The model's output for every row of x: host in, host out, on the best backend there is.

    `Engine(model, backend, ...)(x, out, ...)` in one call; keep an Engine to call it often.
    """
    with Engine(
        model, backend, memory_limit=memory_limit, workers=workers, precision=precision
    ) as engine:
        return engine(x, out, progress=progress)  # type: ignore[no-any-return]


def predict_iter(
    model: Layer,
    batches: Iterable[Any],
    backend: str | Backend | Sequence[str | Backend] = "auto",
    **options: Any,
) -> Iterator[HostArray]:
    """The model's output for each batch of rows, one after the other, as each is asked for.

    While one batch is computed in a thread, the next one is read in the caller's, and no further
    ones: so every batch is an array of its own, not a buffer that is filled anew, and none waits
    for the answer to the one before it (for such a dialogue call an Engine). `options` are those
    of Engine.
    """
    return one_ahead(Engine(model, backend, **options), iter(batches))


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
    if shares_memory(rows, out):
        raise OptionError("out overlaps x, whose rows would be overwritten before they are read")
    return out
