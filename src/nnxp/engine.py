"""Rows in, rows out: any number of them, from host memory to host memory, within a budget."""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from nnxp._arrays import Array, HostArray, Shape, is_array, is_floating, is_numeric, place_of
from nnxp._errors import DeviceMismatch, DtypeMismatch, OptionError, ShapeError
from nnxp._exchange import shares_memory, source_of
from nnxp._progress import Progress, told
from nnxp.backend import Backend, Budget, Plan, Sweep, get_backend
from nnxp.backend._base import Cursor, Source
from nnxp.backend._blocks import BLOCK_ROWS, BlockBackend
from nnxp.backend._lanes import Kept, Recorded
from nnxp.backend._threads import one_ahead, together
from nnxp.kernels.linear import precision as _precision
from nnxp.layers._layer import Layer
from nnxp.layers._summary import costs

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


MOST_KINDS = 256  # shapes of rows that an engine remembers
MOST_RECORDED = 32  # of which each holds buffers on a device
FEW_ROWS = 512  # at most, to be recorded: with more of them, starting the work is little of it


@dataclass
class _Known:
    """What rows of one shape cost, and how many fit where memory ran out."""

    row_bytes: int
    fixed_bytes: int
    row_work: int
    most_rows: int | None = None


class _Direct(NamedTuple):
    """A kind of rows that need no planning: what they become, the most of them, what comes out.

    `fresh` says that a result is an array that nobody else holds, unless it is x or a view.
    """

    model: Layer
    dtype: np.dtype[Any]
    rows: int
    output: Shape
    fresh: bool


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
        self._places = [_Place(model, each) for each in _backends(backend)]
        self.backend = self._places[0].backend
        self._direct: dict[tuple[np.dtype[Any], Shape], _Direct] = {}

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
        if out is None and type(x) is np.ndarray:
            few = self._few(x)
            if few is not None:
                return few
        model = self.model
        place, there = self._at_home(x)
        if place is not None:
            in_kind = _in_kind(x)
            return in_kind(self._resident(place, there, out))
        rows: Source = source_of(x)
        shape = tuple(rows.shape)
        output = model.output_shape(shape)
        dtype = model.dtype or float_type(rows)
        given = out is not None
        out = _result(out, output, dtype, rows)
        if shape[0] == 0:
            return out
        plans = self._plans(shape)
        cursor = Cursor(shape[0])
        with told(shape[0], progress) as done:

            def sweep(place: _Place, plan: Plan) -> None:
                fn = partial(self._forward, place.model, dtype=dtype, output=output[1:])
                sweep = Sweep(fn, rows, out, dtype, plan, done, cursor, place.kept)
                found = place.backend.sweep(sweep)
                if found is not None:
                    place.known[shape[1:]].most_rows = found

            together([partial(sweep, *each) for each in zip(*plans, strict=True)], cursor.stop)
        if type(rows) is np.ndarray and rows.dtype.isnative and not given and not self.memory_limit:
            self._remember(rows, dtype, plans[1][0], output)
        return out

    def _few(self, x: HostArray) -> HostArray | None:
        """The output for few rows of a kind that was met before, None for others.

        With so few rows the time goes to asking and planning, so it is done once for each kind: on
        the CPU for all numbers of rows up to a tile, on a device for each, with a recording.
        """
        shape, dtype = x.shape, x.dtype
        if not self._direct or not shape:
            recorded = self._places and self._places[0].recorded.get((dtype, shape))
            return recorded.host(x) if recorded else None
        known = self._direct.get((dtype, shape[1:]))
        if known is None or not 0 < shape[0] <= known.rows:
            return None
        try:  # without the door, for all that it asks is known
            with np.errstate(under="ignore"):  # as at the door of the model
                rows = x if dtype == known.dtype else x.astype(known.dtype)
                y: HostArray = known.model._bare(rows)
        except Exception:
            return None  # the long way says what is wrong, and where
        if y.shape != (shape[0], *known.output):
            return None
        return y if known.fresh and y.base is None and y is not x else y.copy()

    def _remember(self, x: HostArray, dtype: np.dtype[Any], plan: Plan, output: Shape) -> None:
        """Make the next call with such rows a short one."""
        if self.backend.device != "cpu":
            for place in self._places[:1]:  # none, if it was closed meanwhile
                place.meet(x, partial(self._forward, dtype=dtype, output=output[1:]))
        else:
            if len(self._direct) >= MOST_KINDS:
                self._direct.clear()
            self._direct[x.dtype, x.shape[1:]] = _Direct(
                self.model, dtype, plan.rows, output[1:], _ours(self.model)
            )

    def _at_home(self, x: Any) -> tuple[_Place | None, Array]:
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

    def _resident(self, place: _Place, x: Array, out: Array | None) -> Array:
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
        output = model.output_shape(x.shape)
        dtype = model.dtype or float_type(x)
        fn = partial(self._forward, dtype=dtype, output=output[1:])
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
            plan = Plan(len(x), 1, 0) if few else self._plan(place, x.shape)  # to ask takes long
            made = backend.through(
                partial(fn, model), x, out, output, dtype, plan, place.kept, _ours(model)
            )
        if out is None and self.memory_limit is None:
            place.meet(x, fn)
        return made

    def _forward(self, model: Layer, rows: Array, dtype: np.dtype[Any], output: Shape) -> Array:
        token = _precision.set(self.precision)
        try:
            y = model(rows if rows.dtype == dtype else rows.astype(dtype))
        finally:
            _precision.reset(token)
        if y.shape[1:] != output or len(y) != len(rows):
            raise ShapeError(
                f"{model} answers {y.shape} for {len(rows)} rows, where its output_shape "
                f"says {(len(rows), *output)}"
            )
        return y

    def plan(self, shape: Shape) -> Plan:
        """How an x of this shape would be cut: rows together, workers, and the working set.

        Several devices have the largest of their blocks, and all their workers and working sets.
        Raises ShapeError if such an x does not fit, OutOfMemory if the limit holds not one row.
        """
        self.model.output_shape(shape)
        plans = self._plans(shape)[1]
        return Plan(
            max(each.rows for each in plans),
            sum(each.workers for each in plans),
            sum(each.working_set for each in plans),
        )

    def _plans(self, shape: Shape) -> tuple[list[_Place], list[Plan]]:
        """The places that have a part in so many rows, and how each would cut its part."""
        first = self._plan(self._places[0], shape)
        if len(self._places) == 1 or shape[0] <= first.rows:
            return self._places[:1], [first]
        part = -(-shape[0] // len(self._places))
        return self._places, [self._plan(place, (part, *shape[1:])) for place in self._places]

    def _plan(self, place: _Place, shape: Shape) -> Plan:
        known = place.known.get(shape[1:])
        if known is None:
            if len(place.known) >= MOST_KINDS:
                place.known.clear()
            known = place.known[shape[1:]] = _Known(*costs(place.model, shape[1:]))
        costs_ = known.row_bytes, known.fixed_bytes, known.row_work
        held = place.kept.unused()
        budget = Budget(*costs_, self.memory_limit, self.workers, known.most_rows, held)
        return place.backend.plan(shape[0], budget)

    def close(self) -> None:
        """Give back what is held on the device; the engine takes no more rows."""
        places, self._places = self._places, []
        for place in places:
            place.close()
        self._direct.clear()

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


class _Place:
    """The model on one device, with what an engine keeps and knows there."""

    def __init__(self, model: Layer, backend: Backend) -> None:
        self.backend, self.model = backend, _shared(model, backend)
        self.known: dict[Shape, _Known] = {}
        self.kept = Kept()
        self.recorded: dict[tuple[np.dtype[Any], Shape], Recorded] = {}
        self._met: dict[tuple[np.dtype[Any], Shape], int] = {}
        self._close = weakref.finalize(self, self.kept.close)
        self._close.atexit = False

    def meet(self, x: Array, fn: Callable[[Layer, Array], Array]) -> None:
        """Few rows of one shape and type are recorded when they have come twice.

        Only for models of our own layers: a recording repeats what the device did, and cannot know
        whether another layer would do something else the next time.
        """
        kind = x.dtype, x.shape
        if not 0 < len(x) <= FEW_ROWS or len(self._met) > MOST_KINDS:
            return
        count = self._met[kind] = self._met.get(kind, 0) + 1
        if count < 2 or count & (count - 1) or not isinstance(self.backend, BlockBackend):
            return
        if not _ours(self.model):
            return
        try:
            made = Recorded(self.backend, partial(fn, self.model), x.shape, x.dtype)
        except Exception:
            return  # it goes the long way, as it did so far; perhaps there was no memory just now
        made.model = self.model  # whose parameters it reads where they lie
        while len(self.recorded) >= MOST_RECORDED:
            self.recorded.pop(next(iter(self.recorded)), None)
        self.recorded[kind] = made

    def close(self) -> None:
        self._close()
        self.recorded.clear()


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


def _ours(model: Layer) -> bool:
    """Whether all layers of the model are nnxp's own."""
    inner = all(_ours(child) for _, child in model.children())
    return inner and type(model).__module__.startswith("nnxp.")


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
