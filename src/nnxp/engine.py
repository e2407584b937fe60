"""Rows in, rows out: any number of them, from host memory to host memory, within a memory limit."""

from __future__ import annotations

import re
import sys
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from math import prod
from operator import is_
from typing import Any, NamedTuple, TypeAlias, overload

import numpy as np

from nnxp import kernels
from nnxp._arrays import (
    Array,
    HostArray,
    Shape,
    dtype_of,
    is_array,
    is_floating,
    is_numeric,
    place_of,
)
from nnxp._errors import CheckpointError, DeviceMismatch, DtypeMismatch, OptionError, ShapeError
from nnxp._exchange import host_rows, in_order, is_by_name, shares_memory, source_of
from nnxp._progress import Progress, reported
from nnxp.backend import Backend, Budget, Plan, Sweep, asnumpy, get_backend, to_backend
from nnxp.backend._base import Cursor, Source
from nnxp.backend._device import BLOCK_ROWS, DeviceBackend, fits
from nnxp.backend._lanes import LanePool
from nnxp.backend._recording import DeviceRecording, recorded
from nnxp.backend._threads import one_ahead, together
from nnxp.kernels import Kernel
from nnxp.kernels._dispatch import check_precision
from nnxp.layers._layer import Layer, check_model, row_count, whole
from nnxp.program.fused import as_counted, fused
from nnxp.program.mixing import expanded_as_needed, mixing
from nnxp.program.program import Costs, Outline, Program, expanded
from nnxp.program.recording import bodied, costs
from nnxp.program.recordings import IDLE_BYTES, HostRecording, Recordings
from nnxp.program.rewrite import (
    by_outputs,
    in_their_own_type,
    optimized,
    placed,
    with_products,
    written_out,
)
from nnxp.program.traced import Untraceable

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}

MOST_ENGINES = 4  # that a process keeps for tasks that bring their model: mostly it is one
MOST_TYPES = 256  # kinds of rows that an engine remembers
MOST_RECORDED = 32  # on a device, where each holds buffers
FEW_NUMBERS = 16  # in an input that decides what a model does
FEW_ROWS = 512  # at most, to be recorded on a device: with more, starting the work is little of it


Ready: TypeAlias = "HostRecording | DeviceRecording"


class InputType(NamedTuple):
    """What an input's rows are: their shape, the type they come in, and the one computed in."""

    row: Shape
    source_dtype: np.dtype[Any]
    dtype: np.dtype[Any]


InputTypes: TypeAlias = tuple[InputType | None, ...]
"""Of all inputs; None for one that is left out."""


class Engine:
    """A model on a backend, ready to take rows: `y = engine(x)`.

    The parameters are moved there once, here, and engines of one model on one device share them:
    change them with `model.with_parameters`, not in place. What an engine holds on a device
    between two calls, `engine.close()` gives back, and so does the end of a `with` block or of the
    engine's life.

        with nnxp.Engine(net, memory_limit="256 MiB") as engine:
            y = engine(x)                       # host rows in, host results out, any number
            print(engine.backend)               # where, and why there
            print(engine.plan((1_000_000, 64)))  # how so many rows would be cut

    Engines pickle. However often one comes to a process, with each of many tasks, it is one engine
    there, known by the sha256 of its model: the last four are kept until they are closed.

    Args:
        model: a layer, mostly a `Sequential`, or what `load`, `load_onnx` and `from_...` answer.
        backend: a name as for `nnxp.get_backend`; `engine.backend.why` says how it was chosen. A
            list of devices, such as `["cuda:0", "cuda:1"]`, shares the rows out among them.
        memory_limit: of the rows at work in one call, parameters and result aside: a number of
            bytes, or a string such as "256 MiB". On CUDA, cuBLASLt may take 32 MiB for each of
            three lanes beside it, and a first product some for trying out how it is done best.
            Without a limit few rows that come again are recorded, up to 32 kinds of them, and each
            recording keeps what its rows take, and a workspace of cuBLASLt's.
        workers: threads on the CPU; without it as many as this process may use.
        precision: "tf32" allows a GPU to round the factors of float32 products to ten bits, which
            is several times as fast; a CPU has no use for the permission. Without it float32 is
            float32.
        rewrite: False runs the model's steps as it has them, without a batch norm in the weights
            before it and the like: to find a difference.

    Attributes:
        backend: where it runs, of several devices on the first; printed, it says why there.

    Raises:
        BackendUnavailable: the backend cannot be used here.
        OptionError: an option means nothing here, or the model is no model.
    """

    def __init__(
        self,
        model: Layer,
        backend: str | Backend | Sequence[str | Backend] = "auto",
        *,
        memory_limit: int | str | None = None,
        workers: int | None = None,
        precision: str | None = None,
        rewrite: bool = True,
    ) -> None:
        check_model(model, "an Engine")
        check_precision(precision)
        if precision and model.dtype != np.float32:
            raise OptionError(
                f'precision="tf32" is for float32 models, but {model} is {model.dtype}'
            )
        self.memory_limit = None if memory_limit is None else parse_bytes(memory_limit)
        self.workers = None if workers is None else whole("workers, a number of threads,", workers)
        self.precision, self.rewrite = precision, rewrite
        sparing = self.memory_limit is not None
        self._replicas = [
            Replica(model, device, precision, sparing, rewrite) for device in _backends(backend)
        ]
        self.backend = self._replicas[0].backend

    @property
    def backends(self) -> list[Backend]:
        """Where the rows go: one backend, or all of several devices. None, once it is closed."""
        return [replica.backend for replica in self._replicas]

    @property
    def model(self) -> Layer:
        """The model, on the (first) backend."""
        return self._first().model

    def _first(self) -> Replica:
        return self._open()[0]

    def _open(self) -> list[Replica]:
        """The replicas, to be asked for once in a call: it may be closed meanwhile."""
        replicas = self._replicas
        if not replicas:
            raise OptionError("this engine is closed")
        return replicas

    @overload
    def __call__(
        self, x: HostArray, out: HostArray | None = None, *, progress: Progress = False
    ) -> HostArray: ...
    @overload
    def __call__(self, x: Any, out: Any = None, *, progress: Progress = False) -> Any: ...
    def __call__(self, x: Any, out: Any = None, *, progress: Progress = False) -> Any:
        """The model's output for every row of x, as a host array; into `out` if it is given.

        Rows that are on the engine's device already, in a CuPy array or in a tensor of any library
        that speaks DLPack, stay there: the answer is an array of the same library, computed in
        blocks that fit, on CuPy's current stream; who reads it on another stream orders the two.

        Args:
            x: (rows, ...): an array, a memory map, a list, a table, or anything with `shape` and
                slicing, of real numbers of any type. A block of it at a time is converted to the
                model's type; without parameters, to that of the rows, or float32 for whole numbers.
                A model of several inputs takes a tuple of them, or a dict by the names of its
                formula, all with as many rows.
            out: an array or memory map of the output's shape to write into.
            progress: True shows a bar on a terminal and in a notebook; a function is called
                with the rows done and the rows in all.

        Returns:
            (rows, ...), in the model's type; `out` if it was given. Of a model of several outputs a
            tuple, which takes one as `out`.

        Raises:
            ShapeError, DtypeMismatch: x or `out` does not fit; before any work is done.
            DeviceMismatch: x is on another device.
            OutOfMemory: not even one row fits.
        """
        replicas = self._replicas
        if type(x) is np.ndarray and out is None and not progress and replicas:
            recording = replicas[0].ready.get((x.dtype, x.shape))
            if recording is not None:
                return recording.host(x)
        elif out is None and not progress and replicas and (answers := replicas[0].replayed(x)):
            return answers[0]
        inputs = inputs_of(self.model, x)
        present = tuple(x for x in inputs if x is not None)
        replica, arrays = self._replica_of(present)
        if replica is not None:
            convert = _to_library_of(present[0])
            answers = self._resident(replica, inputs, arrays, out)
            return tuple(map(convert, answers)) if isinstance(answers, tuple) else convert(answers)
        columns = getattr(self.model, "columns", None)
        sources = tuple(in_order(source_of(x), columns) for x in present)
        rows = row_count(self.model, sources)
        input_types = _input_types(self.model, inputs, sources)
        prepared = self._first().prepared(input_types, rows)
        results = _results(out, rows, prepared, sources)
        if rows:
            self._sweep(sources, results, input_types, progress)
        if rows and out is None and len(sources) == 1 and type(sources[0]) is np.ndarray:
            self._record(sources[0], prepared)
        return results if prepared.program.several else results[0]

    def whole(self, *inputs: Any) -> Any:
        """The model's output for these inputs as they are: no axis of theirs need be rows.

        For what is no sweep of rows: a recurrent model with its state, a batch axis elsewhere, a
        formula that mixes rows. The program for inputs of these shapes is kept for the next call.
        A model that looks at numbers runs as it is; where those are a few whole numbers that are an
        input, such as a rate, it is written out for them when they come again. All goes through at
        once, on the first device: a memory limit bounds what is kept for the next call, not what
        this one takes.

            y = engine.whole(x[:3])

        Args:
            inputs: one array for each input of the model, in their order, or a dict by their names;
                all of them together go through at once, in the model's types.

        Returns:
            A host array, or a tuple of them where the model answers several.

        Raises:
            ShapeError, DtypeMismatch: the inputs do not fit.
        """
        replica, kinds = self._first(), None
        if {*map(type, inputs)} == {np.ndarray}:
            kinds = tuple((x.dtype, x.shape) for x in inputs)
            if (known := replica.outlines.get(kinds)) is not None:
                return replica.whole(known, inputs)(inputs)
        if len(inputs) > 1 == replica.model.most_inputs:
            raise ShapeError(f"{replica.model!r:.200} takes one input, not {len(inputs)}")
        inputs = inputs_of(replica.model, inputs if len(inputs) != 1 else inputs[0])
        arrays = [host_rows(x) for x in inputs if x is not None]
        input_types = _input_types(replica.model, inputs, arrays)
        shapes = iter(arrays)
        outlines = tuple(t and Outline(next(shapes).shape, t.dtype) for t in input_types)
        if kinds is not None and all(map(is_, arrays, inputs)):
            if len(replica.outlines) >= MOST_TYPES:
                replica.outlines.clear()
            replica.outlines[kinds] = outlines
        return replica.whole(outlines, arrays)(arrays)

    def _sweep(
        self,
        sources: tuple[Source, ...],
        results: tuple[HostArray, ...],
        input_types: InputTypes,
        progress: Progress,
    ) -> None:
        """All rows through the model, on every device that has a part in them."""
        rows = sources[0].shape[0]
        replicas, plans = self._plans(rows, input_types)
        cursor = Cursor(rows)
        with reported(rows, progress) as done:

            def sweep(replica: Replica, plan: Plan) -> None:
                prepared = replica.prepared(input_types)
                dtypes = tuple(value.dtype for value in prepared.program.inputs)
                fitted = replica.backend.sweep(
                    Sweep(
                        prepared.run, sources, results, dtypes, plan, done, cursor, replica.lanes
                    )
                )  # fmt: skip
                if fitted is not None:
                    prepared.most_rows = fitted

            parts = zip(replicas, plans, strict=True)
            together([partial(sweep, *part) for part in parts], cursor.stop)

    def _record(self, x: HostArray, prepared: Prepared) -> None:
        """Make the next call with such rows a short one, if they are few enough for one tile."""
        for replica in self._replicas[:1]:  # none, if it was closed meanwhile
            budget = self._budget(replica, prepared)
            if self.memory_limit is None and len(x) <= replica.backend.plan(len(x), budget).rows:
                replica.record(x, prepared)

    def _replica_of(self, inputs: tuple[Any, ...]) -> tuple[Replica | None, tuple[Array, ...]]:
        """The replica where all inputs are already, and they as arrays of ours; None for the host.

        Raises DeviceMismatch for what is on a device that is not the engine's.
        """
        places = [self._place(x) for x in inputs]
        replicas = {id(replica) for replica, _ in places}
        if len(replicas) > 1:
            raise DeviceMismatch(
                "the inputs are in several places; bring them all to the host or to one device"
            )
        return places[0][0], tuple(array for _, array in places)

    def _place(self, x: Any) -> tuple[Replica | None, Array]:
        if is_array(x):
            device = place_of(x)
            if device == "cpu":
                return None, x
            for replica in self._open():
                if device == replica.backend.device:
                    return replica, x
        elif hasattr(x, "__dlpack_device__"):
            code, index = x.__dlpack_device__()
            if code in _HOST:
                return None, x
            for replica in self._open():
                at = replica.backend
                if isinstance(at, DeviceBackend) and (at.dlpack, at.index) == (code, index):
                    return replica, _from_dlpack(at.xp, x)
            device = f"device {index} of kind {code.real} in DLPack's count"
        else:
            return None, x
        places = " and ".join(replica.backend.device for replica in self._open())
        raise DeviceMismatch(
            f"an engine on {places} takes rows that are there or in host memory, but x is on "
            f"{device}; bring it to the host, with nnxp.asnumpy(x) if it is an array of CuPy"
        )

    def _resident(
        self, replica: Replica, inputs: tuple[Any, ...], arrays: tuple[Array, ...], out: Any
    ) -> Any:
        """Rows that are on the device, through the model, there."""
        x, backend = arrays[0], replica.backend
        assert isinstance(backend, DeviceBackend)
        if out is None and len(arrays) == 1 and (answers := replica.replayed(x)):
            return answers[0]  # of an array that was taken over, or on another of several devices
        for array in arrays:
            if array.ndim == 0:
                raise ShapeError(
                    "x is (rows, ...) but has no axis at all; x[None] makes it one row"
                )
            if not is_numeric(array.dtype):
                raise DtypeMismatch(f"rows are real numbers, but x is {array.dtype}")
        rows = row_count(replica.model, arrays)
        prepared = replica.prepared(_input_types(replica.model, inputs, arrays), rows)
        outlines = prepared.program.outline(rows)
        outs = _device_results(out, outlines, prepared, backend)
        with backend.current():
            if rows == 0:
                results = outs or tuple(backend.xp.empty(*outline) for outline in outlines)
            else:
                block = rows
                if self.memory_limit is not None or rows > BLOCK_ROWS[0]:  # to ask takes long
                    block = backend.together(rows, self._budget(replica, prepared))
                results = backend.through(
                    prepared.run, arrays, outs, outlines, block, replica.lanes,
                    prepared.borrowed,
                )  # fmt: skip
        if out is None and rows and self.memory_limit is None and len(arrays) == 1:
            replica.record(x, prepared)
        return results if prepared.program.several else results[0]

    def plan(self, *shapes: Shape | None) -> Plan:
        """How an x of this shape would be cut: rows together, workers, and the working set.

        Several devices have the largest of their blocks, and all their workers and working sets.

        Args:
            shapes: (rows, ...), one for each input, and None for one that is left out.

        Returns:
            A Plan: `rows` that go together, `workers`, and `working_set`, the bytes of the rows at
            work, parameters and result aside.

        Raises:
            ShapeError: such an x does not fit.
            OutOfMemory: the limit holds not one row.
        """
        present = [shape for shape in shapes if shape is not None]
        for shape in present:
            whole = isinstance(shape, tuple | list) and all(hasattr(n, "__index__") for n in shape)
            if not whole or not shape:
                raise OptionError(
                    f"plan takes the shape of x, such as (1000, 784), not {shape!r:.60}"
                )
        if not present or shapes[0] is None:
            raise OptionError("plan takes the shape of x, such as (1000, 784)")
        dtypes = map(np.dtype, self.model.input_dtypes(len(shapes)))
        input_types = [
            None if shape is None else InputType(tuple(shape[1:]), dtype, dtype)
            for shape, dtype in zip(shapes, dtypes, strict=True)
        ]
        plans = self._plans(present[0][0], tuple(input_types))[1]
        return Plan(
            max(plan.rows for plan in plans),
            sum(plan.workers for plan in plans),
            sum(plan.working_set for plan in plans),
        )

    def _plans(self, rows: int, input_types: InputTypes) -> tuple[list[Replica], list[Plan]]:
        """The replicas that have a part in so many rows, and how each would cut its part."""

        def plan(replica: Replica, rows: int) -> Plan:
            budget = self._budget(replica, replica.prepared(input_types))
            return replica.backend.plan(rows, budget)

        replicas = self._open()
        first = plan(replicas[0], rows)
        if len(replicas) == 1 or rows <= first.rows:
            return replicas[:1], [first]
        return replicas, [plan(replica, -(-rows // len(replicas))) for replica in replicas]

    def _budget(self, replica: Replica, prepared: Prepared) -> Budget:
        held = replica.lanes.unused()
        return Budget(*prepared.costs, self.memory_limit, self.workers, prepared.most_rows, held)

    def close(self) -> None:
        """Give back what is held on the device; the engine takes no more rows."""
        replicas, self._replicas = self._replicas, []
        for replica in replicas:
            replica.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @cached_property
    def _sha256(self) -> str | None:
        """The sha256 of the model; None if it has fields that no file could hold."""
        from nnxp.io.checkpoint import model_sha256

        try:
            return model_sha256(self.model)
        except CheckpointError:
            return None

    def __reduce__(self) -> Any:
        devices = tuple(backend.device for backend in self.backends)
        options = devices, self.memory_limit, self.workers, self.precision, self.rewrite
        return _unpickled, (self._sha256, self.model.to("numpy"), *options)

    def __repr__(self) -> str:
        if not self._replicas:
            return "Engine(closed)"
        devices = " and ".join(backend.device for backend in self.backends)
        return f"Engine({self.model!r} on {devices})"


_kept: dict[Hashable, Engine] = {}
_keeping = threading.RLock()


def kept_engine(key: Hashable, make: Callable[[], Engine]) -> Engine:
    """This process's engine for a key: made when it is first asked for, or after it was closed."""
    with _keeping:
        engine = _kept.pop(key, None)
        if engine is None or not engine.backends:
            engine = make()
        _kept[key] = engine  # behind those that were asked for before
        while len(_kept) > MOST_ENGINES:
            del _kept[next(iter(_kept))]
        return engine


def forget_engines() -> None:
    """Keep none of them any longer."""
    with _keeping:
        _kept.clear()


def _unpickled(
    sha256: str | None,
    model: Layer,
    devices: tuple[str, ...],
    memory_limit: int | None,
    workers: int | None,
    precision: str | None,
    rewrite: bool,
) -> Engine:
    """An engine that was pickled: on the devices that it was on, and the one that is here already.

    The same class may have been defined anew in between, with another formula: classes count, too.
    """

    def new_engine() -> Engine:
        return Engine(
            model, devices, memory_limit=memory_limit, workers=workers, precision=precision,
            rewrite=rewrite,
        )  # fmt: skip

    if sha256 is None:
        return new_engine()
    classes = type(model), *(type(layer) for _, layer in model.walk())
    return kept_engine(
        (sha256, classes, devices, memory_limit, workers, precision, rewrite), new_engine
    )


class Replica:
    """The model on one device, with what an engine keeps and knows there.

    `ready` has the recordings for rows of one type and shape, which ask nothing. `outlines` has
    what the model takes for inputs as a whole, by the types and shapes that they came with.
    """

    def __init__(
        self, model: Layer, backend: Backend, precision: str | None, sparing: bool, rewrite: bool
    ) -> None:
        self.backend, self.model = backend, _shared(model, backend)
        self.precision, self.sparing, self.rewrite = precision, sparing, rewrite
        self.lanes = LanePool()
        self.ready: dict[tuple[np.dtype[Any], Shape], Ready] = {}
        self.outlines: dict[
            tuple[tuple[np.dtype[Any], Shape], ...], tuple[Outline | None, ...]
        ] = {}
        self._prepared: dict[InputTypes, Prepared] = {}
        self._laid_out: dict[int, Any] = {}  # weights output by output, for all that is prepared
        self._wholes: dict[Any, Whole] = {}
        self._asked: set[Any] = set()  # for models without a program: few whole numbers that came
        self._seen: dict[tuple[np.dtype[Any], Shape], int] = {}
        self._close = weakref.finalize(self, self.lanes.close)
        self._close.atexit = False

    def replayed(self, x: Any) -> list[Any]:
        """What a recording answers for rows on this device; nothing where there is none, or no
        memory for the answer: the long way makes some, or says so."""
        answers: list[Any] = []
        device = isinstance(self.backend, DeviceBackend)
        if not (device and is_array(x) and place_of(x) == self.backend.device):
            return answers
        recording = self.ready.get((x.dtype, x.shape))
        if isinstance(recording, DeviceRecording):
            fits(lambda: answers.append(recording.device(x)))
        return answers

    def prepared(self, input_types: InputTypes, rows: int = 1) -> Prepared:
        """The program for such rows; so many of them, for what errors say.

        Raises ShapeError for rows that do not fit, and for a model that mixes rows.
        """
        prepared = self._prepared.get(input_types)
        if prepared is None:
            program = self._program(input_types, rows)
            prepared = Prepared(program, input_types, self.backend, self.sparing, self._by_outputs)
            if len(self._prepared) >= MOST_TYPES:
                self._prepared.clear()
                self._laid_out.clear()
            self._prepared[input_types] = prepared
        return prepared

    def _program(self, input_types: InputTypes, rows: int) -> Program:
        try:
            outlines = (t and ((rows, *t.row), t.dtype) for t in input_types)
            program = self.model.program(*outlines)
        except Untraceable as error:
            raise ShapeError(
                f"{self.model!r:.200} does not go through an engine: {error}"
            ) from None
        first = next(filter(None, input_types))
        if len(program.inputs) == 1:
            program = in_their_own_type(program, first.source_dtype)
        return self._rewritten(program)

    def _rewritten(self, program: Program) -> Program:
        if isinstance(self.backend, DeviceBackend):
            program = with_products(program, self.precision)
        if not self.rewrite:
            return program
        program = optimized(program)
        if self.backend.name == "cupy":
            program = fused(with_products(written_out(program, "cupy"), self.precision))
        return program

    def _by_outputs(self, program: Program) -> Program:
        """The program with weights output by output where they had better lie so.

        Tensor cores take float32 factors in no other order, nor does cuDNN take a window's.
        """
        if self.backend.name != "cupy" or not self.rewrite:
            return program
        from nnxp.kernels.cuda import cudnn

        liked: tuple[Kernel, ...] = kernels.conv, kernels.conv_max_pool
        if self.precision == "tf32":
            liked = kernels.linear, kernels.matmul, *liked
        elif cudnn.why_not():
            return program
        return by_outputs(program, liked, self._laid_out)

    def whole(self, outlines: tuple[Outline | None, ...], arrays: Sequence[HostArray]) -> Whole:
        """What answers inputs of these outlines, and of these few numbers, as they are."""
        whole = self._whole(outlines, outlines)
        if whole.written:
            return whole
        rest = iter(arrays)
        few = [
            None if outline is None else _few_whole_numbers(next(rest), outline.dtype)
            for outline in outlines
        ]
        if not any(x is not None for x in few):
            return whole
        key = outlines, tuple(None if x is None else x.tobytes() for x in few)
        if key not in self._asked:  # what is another number every time is not written out for it
            if len(self._asked) >= MOST_RECORDED:
                self._asked.clear()
            self._asked.add(key)
            return whole
        known = (one if x is None else x for one, x in zip(outlines, few, strict=True))
        return self._whole(key, tuple(known))

    def _whole(self, key: Any, outlines: tuple[Any, ...]) -> Whole:
        whole = self._wholes.get(key)
        if whole is None:
            most = 0 if self.sparing else IDLE_BYTES
            whole = Whole(self.model, outlines, self.backend, self._rewritten, most)
            others = list(self._wholes.values())
            if len(others) >= MOST_RECORDED or sum(other.idle for other in others) > IDLE_BYTES:
                self._wholes.clear()
            self._wholes[key] = whole
        return whole

    def record(self, x: Array, prepared: Prepared) -> None:
        """Have a recording ready for the next call with such rows.

        On a device few rows are recorded when they have come twice, unless layers are run as
        Python: a recording cannot know whether these would do something else the next time.
        """
        key = x.dtype, x.shape
        if not x.dtype.isnative:
            return
        if isinstance(prepared.run, Recordings):
            if len(self.ready) >= MOST_TYPES:
                self.ready.clear()
            self.ready[key] = HostRecording(prepared.run, x)
            return
        assert isinstance(self.backend, DeviceBackend)
        if (
            not self._close.alive
            or not 0 < len(x) <= FEW_ROWS
            or len(self._seen) > MOST_TYPES
            or prepared.program.opaque
        ):
            return
        count = self._seen[key] = self._seen.get(key, 0) + 1
        if count < 2 or count & (count - 1):
            return
        recording = recorded(DeviceRecording, self.backend, prepared.run, x.shape, x.dtype)
        if recording is None:
            return  # it goes the long way, as it did so far
        for oldest in list(self.ready)[: max(0, len(self.ready) - MOST_RECORDED + 1)]:
            self.ready.pop(oldest, None)
        self.ready[key] = recording
        if not self._close.alive:  # closed meanwhile
            self._forget()  # type: ignore[unreachable]

    def close(self) -> None:
        self._close()
        self._forget()

    def _forget(self) -> None:
        self.outlines.clear()
        for kept in (self.ready, self._prepared, self._laid_out, self._wholes, self._asked):
            kept.clear()


def _by_cublaslt() -> bool:
    from nnxp.kernels.cuda.lt import why_not

    return why_not() is None


class Prepared:
    """A model's program for rows of one kind, what it costs, and what is recorded of it.

    It holds the model's parameters, as constants, but not the replica.
    """

    def __init__(
        self,
        program: Program,
        input_types: InputTypes,
        backend: Backend,
        sparing: bool,
        lay_out: Callable[[Program], Program],
    ) -> None:
        if mixed := mixing(expanded_as_needed(program)):
            raise ShapeError(
                f"an engine takes rows in blocks, but {mixed}; call the model on all of them"
            )
        self.borrowed: tuple[bool, ...] = ()  # of what a device answers
        if backend.device == "cpu":
            at_work: Program = bodied(program)
            self.program = at_work
            self.run: Callable[..., Any] = Recordings(at_work, sparing)
        else:  # CUDA fuses kernels
            counted = as_counted if backend.name == "cupy" and _by_cublaslt() else True
            at_work = expanded(program, counted)
            self.borrowed = at_work.borrowed
            at_home = program if backend.name == "cupy" else at_work
            program = placed(at_home, partial(to_backend, backend=backend))
            with backend.current():
                self.program = lay_out(program)
            self.run = partial(_run, self.program)
        self.outputs = tuple(Outline(shape[1:], dtype) for shape, dtype in self.program.outline(1))
        self.costs = _costs(at_work, input_types, self.outputs, backend)
        self.most_rows: int | None = None


def _few_whole_numbers(x: HostArray, dtype: np.dtype[Any]) -> HostArray | None:
    """An input of a few whole numbers, which may decide what a model does; None for any other."""
    return x.astype(dtype) if dtype.kind in "iub" and x.size <= FEW_NUMBERS else None


class Whole:
    """A model's program for inputs of these outlines, none of whose axes counts rows.

    Without a program, because the formula looks at numbers, the model runs as it is.
    """

    def __init__(
        self,
        model: Layer,
        outlines: tuple[Outline | HostArray | None, ...],
        backend: Backend,
        rewritten: Callable[[Program], Program],
        most_idle: int,
    ) -> None:
        self._most_idle = most_idle  # bytes of buffers that wait for the next call
        self._model, self._backend, self._outlines = model, backend, outlines
        self._recordings: Recordings | None = None
        self._program: Program | None = None
        try:
            program = model.program(*outlines, whole=True)
        except (Untraceable, ShapeError):
            return  # what does not fit, the model says itself
        program = rewritten(program)
        if backend.device == "cpu":
            self._recordings = Recordings(bodied(program))
        else:
            self._program = placed(program, partial(to_backend, backend=backend))

    @property
    def idle(self) -> int:
        """Bytes of buffers that wait for the next call."""
        return 0 if self._recordings is None else self._recordings.idle

    @property
    def written(self) -> bool:
        """Whether there is a program."""
        return self._recordings is not None or self._program is not None

    def __call__(self, arrays: Sequence[HostArray]) -> Any:
        if self._recordings is not None:
            results = self._recordings.answer((1, *(x.dtype for x in arrays)), *arrays)
            self._recordings.spare(self._most_idle)
            return results
        host = iter(arrays)
        inputs = [
            None
            if outline is None
            else to_backend(next(host).astype(outline.dtype, copy=False), self._backend)
            for outline in self._outlines
        ]
        with self._backend.current(), np.errstate(all="ignore"):
            if self._program is None:
                results = self._model(*inputs)
            else:
                results = self._program(*(x for x in inputs if x is not None))
        return tuple(map(asnumpy, results)) if isinstance(results, tuple) else asnumpy(results)


def _run(program: Program, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    """Rows on a device through a program, there."""
    inputs = zip(arrays, program.inputs, strict=True)
    return tuple(program.run([x if x.dtype == v.dtype else x.astype(v.dtype) for x, v in inputs]))


def _costs(
    program: Program, input_types: InputTypes, outputs: tuple[Outline, ...], backend: Backend
) -> Costs:
    """What rows cost where they are at work, as they are read and as they are answered."""
    at_work = [t for t in input_types if t]
    counted = costs(program, [t.source_dtype for t in at_work])
    own = sum(prod(t.row) * t.source_dtype.itemsize for t in at_work)
    if isinstance(backend, DeviceBackend):
        own += sum(prod(shape) * dtype.itemsize for shape, dtype in outputs)
    return counted._replace(row_bytes=counted.row_bytes + own)


def inputs_of(model: Layer, x: Any) -> tuple[Any, ...]:
    """The inputs in the order of the formula: of one array, a tuple, or a dict by name."""
    names, required, most = model.input_names, model.required_inputs, model.most_inputs
    if isinstance(x, tuple) and not x:
        raise OptionError(f"{model!r:.200} takes {', '.join(names)}, but got no input")
    named = is_by_name(x)
    if named and set(x) <= set(names):
        count = max(names.index(name) for name in x) + 1 if x else 0
        missing = [name for name in names[:required] if name not in x]
        if missing:
            raise ShapeError(
                f"{model!r:.200} takes {', '.join(names)}; without {', '.join(missing)}"
            )
        return tuple(x.get(name) for name in names[: max(count, required)])
    if named and len(names) > 1:
        raise ShapeError(f"{model!r:.200} takes {', '.join(names)}, not {', '.join(map(str, x))}")
    inputs: tuple[Any, ...] = x if isinstance(x, tuple) and most != 1 else (x,)
    if not required <= len(inputs) <= (most or len(inputs)):
        raise ShapeError(
            f"{model!r:.200} takes {', '.join(names)}: {len(inputs)} inputs are not so many; "
            "give a tuple of them, or a dict"
        )
    if inputs[0] is None:
        raise OptionError(f"{model!r:.200} takes {', '.join(names)}, but {names[0]} is None")
    return inputs


def _input_types(model: Layer, inputs: Sequence[Any], sources: Sequence[Any]) -> InputTypes:
    """What the rows of each input are; None for one that is left out."""
    rows = iter(sources)
    return tuple(
        None if x is None else _input_type(model, i, next(rows)) for i, x in enumerate(inputs)
    )


def _input_type(model: Layer, index: int, rows: Any) -> InputType:
    """What the rows of one input are, and what they are computed in."""
    own = getattr(rows, "dtype", None)
    own = own.newbyteorder("=") if isinstance(own, np.dtype) else None
    takes = model.takes[index] if index < len(model.takes) else "float"
    if takes == "float":
        dtype = model.dtype or float_type(rows)
    elif takes == "int":
        if own is not None and own.kind not in "iub":
            raise DtypeMismatch(f"{model!r:.200} takes whole numbers, but the rows are {own}")
        dtype = np.dtype("int64")
    elif takes == "any":
        dtype = own or np.dtype("float32")
    else:
        dtype = dtype_of(takes)
    unsaid = np.dtype("float64") if dtype.kind == "f" else dtype  # it may be as wide as that
    return InputType(tuple(map(int, rows.shape[1:])), own or unsaid, dtype)


def _backends(backend: str | Backend | Sequence[str | Backend]) -> list[Backend]:
    """The backend, or all of a list of devices. OptionError for a list that names none or two."""
    if isinstance(backend, str) or not isinstance(backend, Sequence):
        return [get_backend(backend)]
    backends = [get_backend(name) for name in backend]
    devices = [backend.device for backend in backends]
    if not backends or len(set(devices)) < len(devices):
        raise OptionError(f"several backends are different devices, not {devices}")
    if len(backends) > 1 and "cpu" in devices:
        raise OptionError(f"rows are shared among devices, and the CPU is none: {devices}")
    return backends


def _shared(model: Layer, backend: Backend) -> Layer:
    """The model on this backend; whoever asks while it is there gets the same one."""
    if backend.device == "cpu":
        return model.to(backend)
    copies = model.__dict__.setdefault("_copies", weakref.WeakValueDictionary())
    copy: Layer | None = copies.get(backend.device)
    if copy is None:
        copy = model.to(backend)
        if copy is not model:
            copies[backend.device] = copy
    return copy


_HOST = (1, 3)  # DLPack's kDLCPU and kDLCUDAHost: a slice becomes a NumPy array


def _from_dlpack(xp: Any, x: Any) -> Array:
    """Another library's array on our device, as one of ours, sharing its memory."""
    try:
        return xp.from_dlpack(x)
    except BufferError as error:
        raise DtypeMismatch(f"x cannot be lent ({error}); x.detach() may help") from None


def _to_library_of(x: Any) -> Callable[[Array], Any]:
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

        y = nnxp.predict(net, x, memory_limit="64 MiB")
        labels = y.argmax(axis=1)

    Args:
        model: any layer.
        x: (rows, ...), as `Engine.__call__` takes it: arrays, memory maps, tables, lists.
        backend: a name as for `nnxp.get_backend`, or a list of devices.
        out: an array or memory map to write into, of the output's shape.
        memory_limit: bytes of the rows at work, a number or a string such as "256 MiB".
        workers: threads on the CPU.
        precision: "tf32" lets a GPU round the factors of float32 products.
        progress: True for a bar, or a function of the rows done and the rows in all.

    Returns:
        (rows, ...), a host array in the model's type; `out` if it was given.

    Raises:
        ShapeError, DtypeMismatch, DeviceMismatch, OutOfMemory: as `Engine.__call__`.
        BackendUnavailable, OptionError: as `Engine`.
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
    for the answer to the one before it (for such a dialogue call an Engine).

        batches = (x[i : i + 2] for i in range(0, len(x), 2))
        y = np.concatenate(list(nnxp.predict_iter(net, batches)))

    Args:
        model: any layer.
        batches: each (rows, ...), of any number of rows.
        backend: a name as for `nnxp.get_backend`, or a list of devices.
        options: those of `Engine`.

    Yields:
        (rows, ...) for each batch, a host array.

    Raises:
        OptionError: `batches` is not iterable. What `Engine` raises, at the first batch.
    """
    if not isinstance(batches, Iterable) or isinstance(batches, str | bytes):
        raise OptionError(f"predict_iter takes batches of rows, one by one, not {batches!r:.60}")
    return one_ahead(Engine(model, backend, **options), iter(batches))


def parse_bytes(size: int | str) -> int:
    """A number of bytes, from a number or from a string such as "256 MiB" or "2GB"."""
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*([kmg]i?)?b?\s*", size.lower())
        if match is None:
            raise OptionError(f'{size!r:.60} is not a size in bytes; "256 MiB" is one')
        digits, _, part = match[1].partition(".")
        unit = _UNITS[match[2] or ""]
        size = int(digits) * unit + int(float(f"0.{part or 0}") * unit)
    return whole("a size in bytes", size)


def float_type(rows: Source) -> np.dtype[Any]:
    """What a model without parameters computes in: the type of the rows if it is a float's."""
    dtype = getattr(rows, "dtype", None)
    if isinstance(dtype, np.dtype) and is_floating(dtype):
        return dtype.newbyteorder("=")
    wide = isinstance(dtype, np.dtype) and dtype.kind == "f"  # longdouble: as near as may be
    return np.dtype("float64" if wide else "float32")


def _results(
    out: Any, rows: int, prepared: Prepared, sources: tuple[Source, ...]
) -> tuple[HostArray, ...]:
    """The host arrays to be filled: new ones, or those given as `out`, if they fit."""
    outlines = [((rows, *shape), dtype) for shape, dtype in prepared.outputs]
    if out is None:
        return tuple(np.empty(shape, dtype) for shape, dtype in outlines)
    outs = _outs(out, prepared)
    for array, (shape, dtype) in zip(outs, outlines, strict=True):
        if not isinstance(array, np.ndarray):
            raise OptionError(f"out is a NumPy array or memory map, not {type(array).__name__}")
        if array.shape != shape:
            raise ShapeError(f"out is {array.shape} but the output is {shape}")
        if not (is_numeric(array.dtype) and np.can_cast(dtype, array.dtype, "same_kind")):
            raise DtypeMismatch(f"out is {array.dtype} but the output is {dtype}")
        if not array.flags.writeable:
            raise OptionError("out is read-only")
        if any(shares_memory(source, array) for source in sources):
            raise OptionError(
                "out overlaps x, whose rows would be overwritten before they are read"
            )
    return outs


def _device_results(
    out: Any, outlines: tuple[Outline, ...], prepared: Prepared, backend: Backend
) -> tuple[Array, ...] | None:
    """The device arrays given as `out`, if they fit; None without."""
    if out is None:
        return None
    outs = _outs(out, prepared)
    for array, (shape, dtype) in zip(outs, outlines, strict=True):
        if not (is_array(array) and place_of(array) == backend.device):
            raise OptionError(f"x is on {backend.device}, so out is an array there, too")
        if array.shape != shape:
            raise ShapeError(f"out is {array.shape} but the output is {shape}")
        if array.dtype != dtype:
            raise DtypeMismatch(f"out is {array.dtype} but the output is {dtype}")
    return outs


def _outs(out: Any, prepared: Prepared) -> tuple[Any, ...]:
    """`out` as a tuple, one for each output."""
    outs = tuple(out) if prepared.program.several and isinstance(out, tuple | list) else (out,)
    if len(outs) != len(prepared.outputs):
        raise OptionError(f"out is a tuple of {len(prepared.outputs)} arrays, one for each output")
    return outs
