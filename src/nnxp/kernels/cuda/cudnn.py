"""Convolutions through NVIDIA's cuDNN, where the extra `cudnn` is installed.

Each is a graph of cuDNN's, planned once for its shapes and then launched with pointers, in the
workspace of its stream. Both ways are timed when a kind of convolution first comes, and the faster
one is kept; where cuDNN has nothing, or fails, our own kernels do it.

Of the ways that cuDNN proposes those are left out that round more than the type says: float32
factors to TF32 unless that is asked for, inputs to fewer bits, sums of 16 bits, and transformed
windows (Winograd, Fourier), of whose error the bound of the parity kit knows nothing. For the same
reason attention does not come here: cuDNN rounds its weights to 16 bits before their product.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from math import prod
from typing import Any

import cupy
import numpy as np
from cupy.cuda import get_current_stream
from cupy.cuda.device import get_device_id

from nnxp._arrays import Array, Shape
from nnxp.kernels._dispatch import Kernel
from nnxp.kernels._windows import Windows
from nnxp.kernels.activations import identity, relu
from nnxp.kernels.cuda.lt.bindings import loaded
from nnxp.kernels.cuda.lt.call import MOST_PLANS
from nnxp.kernels.cuda.lt.descriptors import FLOAT32, WORKSPACE, workspace
from nnxp.kernels.cuda.lt.passes import finished
from nnxp.kernels.cuda.lt.plans import MOST_CHOICES, Lately, making
from nnxp.kernels.cuda.lt.tuning import keeps_nan, milliseconds

TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BFLOAT16"}
LEFT_OUT = """DOWN_CONVERT_INPUTS REDUCED_PRECISION_REDUCTION FFT WINOGRAD WINOGRAD_TILE_4x4
    WINOGRAD_TILE_6x6 WINOGRAD_TILE_13x13""".split()

handles: dict[int, Any] = {}
failures: dict[str, str] = {}
"""What cuDNN said, last, of what it could not do."""
_launching = threading.Lock()  # a handle is for one thread, and on one stream, at a time
_off = False


def why_not() -> str | None:
    """Why nothing goes through cuDNN; None if it can be asked."""
    return library()[1]


@cache
def library() -> tuple[Any, str | None]:
    """NVIDIA's frontend of cuDNN, or why there is none."""

    def load() -> Any:
        import cudnn

        cudnn.backend_version()  # asks the library itself
        return cudnn

    return loaded("cuDNN", "cudnn", "nvidia-cudnn-frontend", load)


@contextmanager
def unused() -> Iterator[None]:
    """Our own kernels only, in all threads: to compare them."""
    global _off
    before, _off = _off, True
    try:
        yield
    finally:
        _off = before


class Plan:
    """A graph that cuDNN has planned; may be launched from several threads at once."""

    def __init__(self, cudnn: Any, graph: Any, handle: Any) -> None:
        self.cudnn, self.graph, self.handle = cudnn, graph, handle
        self.size = int(graph.get_workspace_size())

    def __call__(self, *arrays: Array) -> None:
        """Enqueue it on the current stream: arrays are numbered from 1 on, the result is last."""
        stream = get_current_stream().ptr
        space = workspace(self.size, stream) if self.size else None
        pointers = {i: array.data.ptr for i, array in enumerate(arrays, 1)}
        with _launching:
            self.cudnn.set_stream(handle=self.handle, stream=stream)
            self.graph.execute(pointers, None if space is None else space.ptr, handle=self.handle)


def new_graph(cudnn: Any, dtype: np.dtype[Any], **where: Any) -> Any:
    """A graph between arrays of a type, which computes in float32; `where` is a handle."""
    types = cudnn.data_type
    return cudnn.pygraph(
        io_data_type=getattr(types, TYPES[dtype.name]),
        intermediate_data_type=types.FLOAT,
        compute_data_type=types.FLOAT,
        **where,
    )


def built(cudnn: Any, graph: Any, dtype: np.dtype[Any], tf32: bool) -> Any:
    """The graph, planned in the way that cuDNN thinks best of those that round as they should."""
    notes = [*LEFT_OUT, *(["TENSOR_CORE"] if dtype == FLOAT32 and not tf32 else [])]
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.deselect_numeric_notes([getattr(cudnn.numerical_note, note) for note in notes])
    graph.deselect_workspace_greater_than(WORKSPACE)
    graph.check_support()
    graph.build_plans()
    return graph


def planned(dtype: np.dtype[Any], tf32: bool, drawn: Callable[..., None], *arguments: Any) -> Plan:
    """The plan of a graph that `drawn(graph, *arguments)` draws, for the current device."""
    cudnn, device = library()[0], get_device_id()
    with _launching:  # it plans with the handle, too
        if device not in handles:
            handles[device] = cudnn.create_handle()
        graph = new_graph(cudnn, dtype, handle=handles[device])
        drawn(graph, *arguments)
        return Plan(cudnn, built(cudnn, graph, dtype, tf32), handles[device])


Run = Callable[..., Array]
plans = Lately[Run | bool](MOST_PLANS)
"""By form and rows, what cuDNN does; False for what our own kernels do."""
choices = Lately[bool](MOST_CHOICES)
"""Whether cuDNN is faster, for a form and about so many rows."""


def through(
    form: tuple[Hashable, ...],
    rows: int,
    make: Callable[[], Run],
    arrays: tuple[Any, ...],
    own: Callable[[], Array],
) -> Array:
    """What `make()` makes of the arrays, by cuDNN, or what `own()` answers, which is as good.

    Everything that decides how it is done is in the form and in the number of rows.
    """
    key = (*form, get_device_id()), rows
    run = plans.young.get(key)
    if run is None:
        with making:
            run = plans.get(key)
            if run is None and not get_current_stream().is_capturing():
                run = _chosen((key[0], (rows - 1).bit_length()), make, arrays, own)
                plans.keep(key, run)
    if callable(run):
        try:
            return run(*arrays)
        except MemoryError:
            raise
        except Exception as error:  # of several kinds: what cuDNN cannot do, our kernels can
            _note(error)
            plans.keep(key, False)
    return own()


def _chosen(
    key: Hashable, make: Callable[[], Run], arrays: tuple[Any, ...], own: Callable[[], Array]
) -> Run | bool:
    """The way through cuDNN, if it has one, which runs and is faster than our own."""
    faster = choices.get(key)
    if faster is False:
        return False
    try:
        run = make()
        if faster is None:
            took = milliseconds(partial(run, *arrays))
            faster = took < milliseconds(own)
            choices.keep(key, faster)
    except MemoryError:
        raise
    except Exception as error:
        _note(error)
        return False
    return run if faster else False


def _note(error: Exception) -> None:
    failures[type(error).__name__] = " ".join(str(error).split())[:300]


def usable(*arrays: Array | None) -> bool:
    """Whether cuDNN may be asked about arrays that lie like these."""
    return not (_off or library()[0] is None) and not any(
        array is not None and array.data.ptr % 16 for array in arrays
    )


# Convolutions

ALONE, BIAS, RELU_BIAS = 0, 1, 2
"""What of a convolution, its bias and a relu is one graph."""


def convolution(
    x: Array,
    weight: Array,
    bias: Array | None,
    over: Windows,
    activation: Kernel,
    precision: str | None,
    own: Callable[[], Array],
) -> Array:
    """y = activation(conv(x, weight) + bias), as kernels.conv says, or what `own` makes of them."""
    way = ALONE if bias is None else {identity: BIAS, relu: RELU_BIAS}.get(activation, ALONE)
    rest = bias is not None or activation not in (identity, relu)
    if (
        not usable(x, weight, bias)
        or not x.flags.c_contiguous
        or (bias is not None and not bias.flags.c_contiguous)
        or (way == ALONE and rest and x.dtype != FLOAT32)  # what is rounded would go on
    ):
        return own()
    form = (x.dtype, x.shape[1:], weight.shape, weight.strides, over, way, activation)
    make = partial(Convolution, x, weight, over, way, precision == "tf32")
    arrays = x, weight, bias, activation
    return through((*form, bias is None, precision), len(x), make, arrays, own)


class Convolution:
    """A convolution by cuDNN, and a pass over what that leaves to do."""

    def __init__(self, x: Array, weight: Array, over: Windows, way: int, tf32: bool) -> None:
        self.shape: Shape = x.shape[0], *over.positions, weight.shape[-1]
        plan = partial(planned, x.dtype, tf32, draw_convolution, x.shape, weight.shape, over)
        self.way, self.plan = way, plan(way)
        if way == RELU_BIAS and not keeps_nan(self._relu_of, x, weight):
            self.way, self.plan = BIAS, plan(BIAS)

    def _relu_of(self, x: Array, weight: Array, bias: Array) -> Array:
        return self(x, weight, bias, relu).reshape(-1, self.shape[-1])

    def __call__(self, x: Array, weight: Array, bias: Array | None, activation: Kernel) -> Array:
        y = cupy.empty(self.shape, x.dtype)
        by_outputs = cupy.ascontiguousarray(cupy.moveaxis(weight, -1, 0))
        self.plan(x, by_outputs, *([] if self.way == ALONE else [bias]), y)
        if self.way == RELU_BIAS:
            return y
        lines, rest = y.reshape(-1, self.shape[-1]), bias if self.way == ALONE else None
        return finished(lines, rest, activation, x.dtype).reshape(self.shape)


def draw_convolution(graph: Any, x: Shape, weight: Shape, over: Windows, way: int) -> None:
    """The graph of a convolution, with what the way says.

    x (n, *space, c), weight (*window, c / groups, o); in memory that is (o, *window, c / groups).
    cuDNN knows no fewer than two axes of space.
    """
    more = (1,) * (2 - len(over.window))
    none = (0,) * len(more)
    image = graph.tensor(uid=1, **channels_last((x[0], *more, *x[1:])))
    filters = (weight[-1], *more, *over.window, weight[-2])
    y = graph.conv_fprop(
        image=image,
        weight=graph.tensor(uid=2, **channels_last(filters)),
        pre_padding=[*none, *(before for before, _ in over.pads)],
        post_padding=[*none, *(behind for _, behind in over.pads)],
        stride=[*more, *over.stride],
        dilation=[*more, *over.dilation],
    )
    if way != ALONE:
        ones = (1,) * (len(filters) - 1)
        y = graph.bias(input=y, bias=graph.tensor(uid=3, **channels_last((*ones, weight[-1]))))
    if way == RELU_BIAS:
        y = graph.relu(input=y)
    outline = channels_last((x[0], *more, *over.positions, weight[-1]))
    y.set_output(True).set_uid(3 if way == ALONE else 4)
    y.set_dim(outline["dim"]).set_stride(outline["stride"])


def channels_last(shape: Sequence[int]) -> dict[str, list[int]]:
    """An array (n, *space, c) as cuDNN counts its axes, (n, c, *space)."""
    rows, *space, channels = shape
    first, *steps, last = (prod(shape[i + 1 :]) for i in range(len(shape)))
    return {"dim": [rows, channels, *space], "stride": [first, last, *steps]}
