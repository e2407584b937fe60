"""Products and convolutions by oneDNN, where its library is installed: the extra `onednn`.

It is called with the arrays of NumPy as they lie. Only weights of convolutions, and constant ones,
are laid out anew, as it wants them: constant ones once, others at each call. float32 is float32: it
is told not to round factors, and of its ways that with transformed windows (Winograd), of whose
error the bound of the parity kit knows nothing, is not asked for. Of activations it has those that
let NaN through: its relu makes 0 of it.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_char,
    c_char_p,
    c_float,
    c_int,
    c_int64,
    c_size_t,
    c_void_p,
)
from functools import cache, partial
from math import prod
from sysconfig import get_default_scheme, get_path, get_preferred_scheme
from typing import Any, Generic, TypeVar

import numpy as np

from nnxp._arrays import HostArray, Shape
from nnxp.backend._blas import one_blas_thread
from nnxp.kernels._dispatch import Kernel
from nnxp.kernels._windows import Windows
from nnxp.kernels.activations import hard_swish, identity
from nnxp.kernels.cpu import _pieces
from nnxp.kernels.cpu._pieces import ByContent, aligned, blas_threads

FILE = "libdnnl.so.3"

# As in oneDNN's headers, dnnl_types.h and dnnl_common_types.h
CPU, FLOAT32, BYTES, ANY_LAYOUT, IN_ORDER = 1, 3, 6, 1, 1
ADD, MULTIPLY, LARGER = 0x1FFF0, 0x1FFF1, 0x1FFF2  # of two numbers
ABSOLUTE, ON_A_LINE, CLIPPED, POWER = 0x24, 0x26, 0x2E, 0x30  # of one, with two parameters
AFTERWARDS = 1 << 15  # the operands of what is done to a result, of one thing after the other
FORWARD_TRAINING, FORWARD_INFERENCE, DIRECT = 64, 96, 1
FROM_FIRST, FROM_LAST = 1, 2  # step of time
MEAN_WITH_PADDING, MEAN = 0x2FF, 0x3FF
SOFTMAX = 0x30000
SCRATCHPAD_OF_THE_USER, STRICT = 1, 0
SOURCE, SECOND, RESULT, WEIGHTS, BIAS, SCRATCHPAD = 1, 2, 17, 33, 41, 80  # what an operand is
STATE, CELL, LAST_STATE, LAST_CELL, STATE_WEIGHTS = 2, 3, 18, 19, 34  # of a recurrence's
GAIN, SHIFT = 51, 52  # of those of a norm, and what says that there are any:
USE_GAIN, USE_SHIFT = 2, 4
RESULT_GRADIENT, WEIGHT_GRADIENT = 145, 161  # of those of a gradient: dy and dw
NAME, WEIGHTS_LAYOUT, WEIGHT_GRADIENT_LAYOUT = 8, 131, 132  # what a primitive is asked for
SCRATCHPAD_LAYOUT = 136
SEQUENTIAL, OPENMP = 1, 2  # how it is built
SSE41, AVX512 = 0x1, 0x20  # sets of instructions: all that it uses, and one among them

MOST_SCRATCH = 1 << 20  # bytes: a way that wants more copies what it is given, as ours do
MOST_PLANS = 64  # of one constant, for other numbers of rows
SHARED, SHARED_ALONE, ALSO_SHARED = 1 << 21, 1 << 20, 1 << 19
"""Multiply-adds: fewer are not worth waking threads, which takes longer where BLAS has to be told;
fewer than the last, while they are awake, not worth waiting for them."""

A_PASS = 32  # multiply-adds that take as long as passing over one number that another core has made
FURTHER_ROWS = 1, 32, 256  # of a recurrence, by which the memory for one more is told: at most
STATISTICS = 8  # bytes that a norm keeps of a line: mean and variance
MANY = 1 << 14  # numbers: to ask oneDNN to copy fewer takes longer than what it saves
MOST_AXES = 12

SIZE = 4  # bytes of a number

_Dims = c_int64 * MOST_AXES
_off = False
_forked = False  # OpenMP's threads are those of the parent
_creating = threading.RLock()
"""Held while oneDNN is loaded, or creates something, for which it has locks of its own: so no
process is forked meanwhile, whose child would wait for them for ever."""


def _after_fork() -> None:
    global _forked
    _forked = True
    _creating.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_creating.acquire, after_in_parent=_creating.release, after_in_child=_after_fork
    )


class OneDNNError(RuntimeError):
    """oneDNN refused something that it was asked; the message has the function and the status."""


class _Version(Structure):
    _fields_ = [
        *((name, c_int) for name in ("major", "minor", "patch")),
        ("hash", c_char_p),
        ("cpu_runtime", ctypes.c_uint),
        ("gpu_runtime", ctypes.c_uint),
    ]


class _Operand(Structure):
    _fields_ = [("what", c_int), ("memory", c_void_p)]


_FUNCTIONS: dict[str, list[Any]] = {
    "engine_create": [POINTER(c_void_p), c_int, c_size_t],
    "stream_create": [POINTER(c_void_p), c_void_p, c_int],
    "memory_desc_create_with_strides": [POINTER(c_void_p), c_int, _Dims, c_int, _Dims],
    "memory_desc_create_with_tag": [POINTER(c_void_p), c_int, _Dims, c_int, c_int],
    "memory_create": [POINTER(c_void_p), c_void_p, c_void_p, c_void_p],
    "memory_set_data_handle": [c_void_p, c_void_p],
    "memory_get_memory_desc": [c_void_p, POINTER(c_void_p)],
    "primitive_attr_create": [POINTER(c_void_p)],
    "primitive_attr_set_scratchpad_mode": [c_void_p, c_int],
    "primitive_attr_set_fpmath_mode": [c_void_p, c_int],
    "primitive_attr_set_post_ops": [c_void_p, c_void_p],
    "post_ops_create": [POINTER(c_void_p)],
    "post_ops_append_eltwise": [c_void_p, c_int, c_float, c_float],
    "post_ops_append_binary": [c_void_p, c_int, c_void_p],
    "matmul_primitive_desc_create": [POINTER(c_void_p), *[c_void_p] * 6],
    "binary_primitive_desc_create": [POINTER(c_void_p), c_void_p, c_int, *[c_void_p] * 4],
    "convolution_forward_primitive_desc_create": [
        *(POINTER(c_void_p), c_void_p, c_int, c_int, *[c_void_p] * 4, *[_Dims] * 4, c_void_p)
    ],
    "convolution_backward_weights_primitive_desc_create": [
        *(POINTER(c_void_p), c_void_p, c_int, *[c_void_p] * 4, *[_Dims] * 4, c_void_p, c_void_p)
    ],
    "lstm_forward_primitive_desc_create": [
        *(POINTER(c_void_p), c_void_p, c_int, c_int, *[c_void_p] * 11, ctypes.c_uint, c_void_p)
    ],
    **{f"{kind}_forward_primitive_desc_create": [
        *(POINTER(c_void_p), c_void_p, c_int, c_int, *[c_void_p] * 7, ctypes.c_uint, c_void_p)
    ] for kind in ("gru", "lbr_gru")},
    "layer_normalization_forward_primitive_desc_create": [
        *(POINTER(c_void_p), c_void_p, c_int, *[c_void_p] * 3, c_float, ctypes.c_uint, c_void_p)
    ],
    "softmax_forward_primitive_desc_create": [
        *(POINTER(c_void_p), c_void_p, c_int, c_int, *[c_void_p] * 2, c_int, c_void_p)
    ],
    "pooling_forward_primitive_desc_create": [
        *(POINTER(c_void_p), c_void_p, c_int, c_int, *[c_void_p] * 2, *[_Dims] * 5, c_void_p)
    ],
    "reorder_primitive_desc_create": [POINTER(c_void_p), *[c_void_p] * 5],
    "primitive_desc_query": [c_void_p, c_int, c_int, c_void_p],
    "primitive_create": [POINTER(c_void_p), c_void_p],
    "primitive_execute": [],  # called often, with what need not be converted
    **{f"{name}_destroy": [c_void_p] for name in
       ("memory_desc", "memory", "post_ops", "primitive_attr", "primitive_desc", "primitive")},
}  # fmt: skip


def why_not() -> str | None:
    """Why nothing goes through oneDNN; None if it does."""
    return "it is turned off" if _off else library()[1]


def has(dtype: np.dtype[Any]) -> bool:
    """Whether numbers of this type go through oneDNN."""
    return dtype == np.float32 and why_not() is None


def wide_vectors() -> bool:
    """Whether it is used, with vectors of AVX-512."""
    return why_not() is None and bool(library()[0].dnnl_get_effective_cpu_isa() & AVX512)


@contextmanager
def unused() -> Iterator[None]:
    """Our own bodies only, in what is recorded meanwhile: to compare them."""
    global _off
    before, _off = _off, True
    try:
        yield
    finally:
        _off = before


def library() -> tuple[Any, str | None]:
    """The library with its functions declared, or why there is none."""
    with _creating:
        return _loaded()


@cache
def _loaded() -> tuple[Any, str | None]:
    path = _installed()
    try:
        dnnl: Any = ctypes.CDLL(path or FILE)
        dnnl.dnnl_version.restype = POINTER(_Version)
        about = dnnl.dnnl_version().contents
        if about.cpu_runtime not in (SEQUENTIAL, OPENMP):
            return None, f"{FILE} is built with threads that cannot be limited"
        if dnnl.dnnl_get_effective_cpu_isa() == SSE41:  # which want arrays that begin at 16 bytes
            return None, "oneDNN is used with AVX, which this processor lacks"
        for name, types in _FUNCTIONS.items():
            function = getattr(dnnl, f"dnnl_{name}")
            function.argtypes = types
            function.restype = _Answers(name).__getitem__
        dnnl.dnnl_primitive_desc_query_md.argtypes = [c_void_p, c_int, c_int]
        dnnl.dnnl_primitive_desc_query_md.restype = c_void_p
        dnnl.dnnl_memory_desc_get_size.argtypes = [c_void_p]
        dnnl.dnnl_memory_desc_get_size.restype = c_size_t
        dnnl.dnnl_memory_desc_equal.argtypes = [c_void_p, c_void_p]
        dnnl.version = f"{about.major}.{about.minor}.{about.patch}"
        if about.cpu_runtime == SEQUENTIAL:
            dnnl.omp_set_num_threads = dnnl.omp_get_max_threads = lambda *_: 1
        dnnl.set_threads, dnnl.threads = dnnl.omp_set_num_threads, dnnl.omp_get_max_threads
        dnnl.engine = _created(dnnl.dnnl_engine_create, CPU, 0)
        dnnl.stream = _created(dnnl.dnnl_stream_create, dnnl.engine, IN_ORDER)
        return dnnl, None
    except (OSError, AttributeError, OneDNNError) as error:
        if path or not isinstance(error, OSError):
            return None, f"oneDNN cannot be loaded ({' '.join(str(error).split())[:300]})"
        return None, "onednn-cpu-gomp is not installed"


def _installed() -> str | None:
    """The library's file where pip puts it, for this environment or this user."""
    for scheme in (get_default_scheme(), get_preferred_scheme("user")):
        path = os.path.join(get_path("data", scheme), "lib", FILE)
        if os.path.exists(path):
            return path
    return None


class _Answers(dict[int, None]):
    """What a status of a function means: None for success, OneDNNError for any other. To look it up
    takes less time than to call a function of Python's."""

    def __init__(self, name: str) -> None:
        super().__init__({0: None})
        self._name = name

    def __missing__(self, status: int) -> None:
        raise OneDNNError(f"dnnl_{self._name} answered status {status}")


def _created(create: Any, *arguments: Any) -> c_void_p:
    handle = c_void_p()
    create(byref(handle), *arguments)
    return handle


class _Owned:
    """What oneDNN has made, until nobody refers to it."""

    def __init__(self, kind: str, create: str, *arguments: Any) -> None:
        dnnl = library()[0]
        self._destroy = getattr(dnnl, f"dnnl_{kind}_destroy")
        with _creating:
            self._as_parameter_ = _created(getattr(dnnl, f"dnnl_{create}"), *arguments)

    def __del__(self) -> None:
        if hasattr(self, "_as_parameter_"):
            self._destroy(self._as_parameter_)


def outline(shape: Sequence[int], strides: Sequence[int] | None, dtype: int = FLOAT32) -> _Owned:
    """An array of this shape; strides are in elements, None for those that oneDNN likes."""
    how = ("tag", ANY_LAYOUT) if strides is None else ("strides", _Dims(*strides))
    create = f"memory_desc_create_with_{how[0]}"
    return _Owned("memory_desc", create, len(shape), _Dims(*shape), dtype, how[1])


def _described(primitive: _Owned, what: int, number: int = 0) -> c_void_p:
    """The layout of an operand of a primitive, to which it belongs; of its weights, those of a
    number."""
    return c_void_p(library()[0].dnnl_primitive_desc_query_md(primitive, what, number))


class _Memory(_Owned):
    """oneDNN's view of an array, which it keeps; of none yet, without one."""

    def __init__(self, description: Any, array: HostArray | None = None) -> None:
        address = None if array is None else _address(array)
        super().__init__("memory", "memory_create", description, library()[0].engine, address)
        self.array = array


def _address(array: HostArray) -> int:
    try:  # a third of the time that the array's own interface takes
        return ctypes.addressof(c_char.from_buffer(array))  # type: ignore[arg-type]
    except (TypeError, ValueError):  # it is read-only, or not in one piece
        return int(array.__array_interface__["data"][0])


class Constant:
    """A constant array, laid out as plans want it, once for all that want the same.

    `shape` and `strides`, in elements, say how oneDNN is to look at it.
    """

    def __init__(self, numbers: HostArray, shape: Shape, strides: Shape) -> None:
        self.numbers = numbers
        self._shape, self._strides = shape, strides
        self._laid_out: list[_Memory] = []

    def any_layout(self) -> _Owned:
        """What a plan is told that may want the array as it likes."""
        return outline(self._shape, None)

    def memory(self, description: _Owned, number: int = 0) -> _Memory:
        """The memory that holds the array as a plan of this description wants its weights, or those
        of a number."""
        dnnl, wanted = library()[0], _described(description, WEIGHTS_LAYOUT, number)
        with _creating:
            for memory in self._laid_out:
                layout = c_void_p()
                dnnl.dnnl_memory_get_memory_desc(memory, byref(layout))
                if dnnl.dnnl_memory_desc_equal(layout, wanted):
                    return memory
            array = aligned((_size(wanted),), "uint8")
            memory = _Memory(wanted, array)
            _change(outline(self._shape, self._strides), wanted)(self.numbers, array)
            self._laid_out.append(memory)
            return memory


constants = ByContent(Constant)


class Plan:
    """What oneDNN has planned for certain shapes: several threads may call it at once.

    `constants` and `operands` say by what an operand is, SOURCE for one, in which memory it lies,
    or what the arrays look like that are given at each call, in order. Memory to work in is each
    thread's own, unless it is one of them. `again` says what else an operand is.
    """

    def __init__(
        self,
        description: _Owned,
        constants: dict[int, _Memory],
        operands: dict[int, Any],
        again: dict[int, int] | None = None,
    ) -> None:
        self.primitive = _Owned("primitive", "primitive_create", description)
        self.constants, self.operands, self.again = constants, operands, again or {}
        self.scratch = _described(description, SCRATCHPAD_LAYOUT)
        self.scratch_size = _size(self.scratch)
        self._description = description  # which has the scratchpad's layout
        self._calls = threading.local()

    def __call__(self, *arrays: HostArray) -> None:
        """Run it with these arrays."""
        try:
            call = self._calls.here
        except AttributeError:
            call = self._calls.here = _Call(self)
        call(*arrays)

    def bound(self, *arrays: HostArray) -> Callable[[], object]:
        """What runs it with these arrays, as long as they are there; for one thread at a time."""
        return _Call(self, *arrays).run

    def changing(self, *arrays: HostArray) -> Callable[..., object]:
        """The same, called with those of the first arrays that may be others by then."""
        return _Call(self, *arrays)


class _Call:
    """The operands of a plan, for one thread at a time."""

    def __init__(self, plan: Plan, *arrays: HostArray) -> None:
        dnnl = library()[0]
        own = [_Memory(description) for description in plan.operands.values()]
        self._set = [
            partial(dnnl.dnnl_memory_set_data_handle, memory._as_parameter_) for memory in own
        ]
        self._addresses = [0] * len(own)
        memories = plan.constants | dict(zip(plan.operands, own, strict=True))
        memories |= {what: memories[operand] for what, operand in plan.again.items()}
        if SCRATCHPAD not in memories:
            memories[SCRATCHPAD] = _Memory(plan.scratch, aligned((plan.scratch_size,), "uint8"))
        operands: Any = (_Operand * len(memories))(
            *(_Operand(what, memory._as_parameter_) for what, memory in memories.items())
        )
        operands.kept = plan.primitive, memories  # as long as somebody may run it
        self.run = partial(
            dnnl.dnnl_primitive_execute,
            plan.primitive._as_parameter_, dnnl.stream, c_int(len(memories)), operands,
        )  # fmt: skip
        self._look_at(arrays)

    def _look_at(self, arrays: Sequence[HostArray]) -> None:
        for i, array in enumerate(arrays):
            address = _address(array)
            if address != self._addresses[i]:
                self._set[i](address)
                self._addresses[i] = address

    def __call__(self, *arrays: HostArray) -> None:
        self._look_at(arrays)
        self.run()


def _change(layout: Any, into: Any) -> Plan:
    """The plan that copies an array of one layout into another."""
    engine = library()[0].engine
    between = layout, engine, into, engine, None
    change = _Owned("primitive_desc", "reorder_primitive_desc_create", *between)
    return Plan(change, {}, {SOURCE: layout, RESULT: into})


class Relaid:
    """A plan that wants one of its arrays, `what`, laid out in its own way: it is changed at each
    call from the `layout` that NumPy has, or into that if it is the result."""

    def __init__(self, plan: Plan, what: int, layout: _Owned) -> None:
        own = plan.operands[what]
        self._plan, self._place = plan, list(plan.operands).index(what)
        self._makes = self._place == len(plan.operands) - 1
        self._change = _change(own, layout) if self._makes else _change(layout, own)
        self._nbytes = _size(own)

    def __call__(self, scratch: HostArray, *arrays: HostArray) -> None:
        """Run it with these arrays; it lies in `scratch` meanwhile, if that is large enough."""
        array, own = arrays[self._place], scratch[: self._nbytes]
        if own.nbytes < self._nbytes:
            own = aligned((self._nbytes,), "uint8")
        if not self._makes:
            self._change(array, own)
        self._plan(*arrays[: self._place], own, *arrays[self._place + 1 :])
        if self._makes:
            self._change(own, array)


AnyPlan = TypeVar("AnyPlan", bound="Plan | Relaid | tuple[Plan, ...]")
Result = TypeVar("Result")


class Planned(Generic[AnyPlan]):
    """Plans by what decides them, such as the number of rows, and by the number of threads; `make`
    makes one that is new. None where oneDNN has none. `scratch` is the bytes that one of them wants
    to be called with, that of one row where it is more for each `further` one."""

    def __init__(
        self, make: Callable[..., AnyPlan | None], scratch: int = 0, further: int = 0
    ) -> None:
        self._make, self.scratch, self.further = make, scratch, further
        self._plans: dict[Hashable, AnyPlan | None] = {}

    def __call__(self, threads: int, *key: Hashable) -> AnyPlan | None:
        try:
            return self._plans[threads, key]
        except KeyError:
            try:
                plan = limited_to(threads, self._make, *key)
            except OneDNNError:
                plan = None
            while len(self._plans) >= MOST_PLANS:
                self._plans.pop(next(iter(self._plans)), None)
            self._plans[threads, key] = plan
            return plan


_sharing = threading.local()


def threads_for(work: int) -> int:
    """The threads for so many multiply-adds: those of `sharing_threads`, if they are many."""
    return getattr(_sharing, "threads", 1) if work > ALSO_SHARED else 1


def bound(
    planned: Planned[Plan], work: int, key: Sequence[Hashable], *arrays: HostArray
) -> Callable[[], object]:
    """What runs the plan for a key, of so many multiply-adds, with these arrays, as long as they
    are there, by as many threads as there are then; for one caller at a time."""
    calls: dict[int, Callable[[], object]] = {}

    def call_of(threads: int) -> Callable[[], object]:
        plan = planned(threads, *key)
        assert plan is not None, "oneDNN planned it for one row"
        return plan.bound(*arrays)

    def run() -> None:
        threads = threads_for(work)
        if threads not in calls:
            calls[threads] = call_of(threads)
        calls[threads]()

    return run if work > ALSO_SHARED else call_of(1)


def sharing_threads(blas: bool, run: Callable[..., Any], *arrays: HostArray) -> Any:
    """run(*arrays), whose products are shared among as many threads as BLAS would take.

    BLAS itself takes one meanwhile, if it may be asked at all, because its threads, which wait for
    more work at full speed, would keep the cores from OpenMP's.
    """
    threads = 1 if _forked else blas_threads()
    if threads == 1:
        return run(*arrays)
    before, _sharing.threads = getattr(_sharing, "threads", 1), threads
    try:
        if not blas:
            return run(*arrays)
        with one_blas_thread():
            return run(*arrays)
    finally:
        _sharing.threads = before


def limited_to(threads: int, run: Callable[..., Result], *arguments: Any) -> Result:
    """run(*arguments): what it plans runs in so many threads, and so do a pool, a norm, a
    softmax, a product of stacks, what goes element by element, and what a recurrence copies, that
    it runs."""
    dnnl = library()[0]
    before = dnnl.threads()
    dnnl.set_threads(threads)
    try:
        return run(*arguments)
    finally:
        dnnl.set_threads(before)


FUSED: dict[Kernel, tuple[int, float, float]] = {hard_swish: (0x34, 1 / 6, 1 / 2)}
"""The activations that oneDNN applies to what it has made, as its headers number them."""


Operation = tuple[int, float, float] | tuple[int, int]
"""What is done to each number: a function of it with two parameters; or of it and of the number in
an array, which is named by its place among some."""


def _attributes(*then: Operation, arrays: _Owned | None = None) -> _Owned:
    """float32 that is not rounded, memory to work in that is ours, and what is done to the result,
    of these `arrays`."""
    attributes, dnnl = _Owned("primitive_attr", "primitive_attr_create"), library()[0]
    if then:
        post_ops = _Owned("post_ops", "post_ops_create")
        for kind, *how in then:
            if len(how) == 1:
                dnnl.dnnl_post_ops_append_binary(post_ops, kind, arrays)
            else:
                dnnl.dnnl_post_ops_append_eltwise(post_ops, kind, *how)
        dnnl.dnnl_primitive_attr_set_post_ops(attributes, post_ops)
    dnnl.dnnl_primitive_attr_set_scratchpad_mode(attributes, SCRATCHPAD_OF_THE_USER)
    dnnl.dnnl_primitive_attr_set_fpmath_mode(attributes, STRICT)
    return attributes


def _product(x: _Owned, matrix: _Owned, bias: _Owned | None, out: _Owned) -> _Owned:
    """The description of a product of matrices, or of stacks of them."""
    operands = x, matrix, bias, out, _attributes()
    return _Owned("primitive_desc", "matmul_primitive_desc_create", library()[0].engine, *operands)


def product(matrix: HostArray, bias: HostArray | None) -> Planned[Plan]:
    """Plans of out = x @ matrix + bias, (..., lines, inputs) @ (..., inputs, outputs), by the shape
    of x and the strides, in bytes, of x and of out; None where lines have gaps or overlap.

    A bias is for a matrix, not for a stack of them.
    """
    steps = [step // SIZE for step in matrix.strides]
    constant = constants.of(matrix, matrix.shape, tuple(steps))
    shift = None if bias is None else outline((1, bias.size), (bias.size, 1))
    biases = {} if shift is None else {BIAS: _Memory(shift, bias)}

    def make(shape: Shape, strides: Shape, out_strides: Shape) -> Plan | None:
        if not _plain(shape, strides):
            return None
        x = outline(shape, [step // SIZE for step in strides])
        out_shape = *shape[:-1], matrix.shape[-1]
        out = outline(out_shape, [step // SIZE for step in out_strides])
        description = _product(x, constant.any_layout(), shift, out)
        weights = {WEIGHTS: constant.memory(description)}
        return Plan(description, weights | biases, {SOURCE: x, RESULT: out})

    return Planned(make)


def _plain(shape: Shape, strides: Shape) -> bool:
    """Whether the numbers of each line lie together, and lines one behind the other."""
    long = strides[-2] >= shape[-1] * SIZE or shape[-2] == 1
    return strides[-1] == SIZE and long and min(strides) >= 0


def _product_of(shapes: Sequence[Shape], strides: Sequence[Shape], biased: bool) -> Plan | None:
    """The plan of a product of matrices, or of stacks of them, whose strides are in bytes, and of a
    bias if there is one; None where one has gaps both ways."""
    if not all(
        _plain(*both) or _plain(*((*t[:-2], t[-1], t[-2]) for t in both))
        for both in zip(shapes, strides, strict=True)
    ):
        return None
    steps = [tuple(step // SIZE for step in along) for along in strides]
    x, matrix, out = map(outline, shapes, steps)
    columns = shapes[-1][-1]
    biases = {BIAS: outline((1, columns), (columns, 1))} if biased else {}
    operands: dict[int, Any] = {SOURCE: x, WEIGHTS: matrix, **biases, RESULT: out}
    return Plan(_product(x, matrix, biases.get(BIAS), out), {}, operands)


_products = Planned(_product_of)


def multiply(
    x: HostArray, matrix: HostArray, out: HostArray, bias: HostArray | None = None
) -> None:
    """out = x @ matrix + bias, for float32 matrices, or without a bias for stacks of them."""
    shapes, strides = (x.shape, matrix.shape, out.shape), (x.strides, matrix.strides, out.strides)
    biases = [] if bias is None else [np.ascontiguousarray(bias)]
    threads = threads_for(x.size * out.shape[-1])
    plan = _products(threads, shapes, strides, bool(biases))
    if plan is not None:
        limited_to(threads, plan, x, matrix, *biases, out)  # a product of stacks asks anew
        return
    np.matmul(x, matrix, out)
    for added in biases:
        np.add(out, added, out)


def _combining_of(kind: int, size: int, second: int) -> Plan:
    """The plan of x + y or x * y, element by element, of float32 and of numbers of a second type,
    of which BYTES are 0 or 1."""
    x, y = outline((size,), (1,)), outline((size,), (1,), second)
    description = _Owned(
        "primitive_desc", "binary_primitive_desc_create", library()[0].engine, kind, x, y, x,
        _attributes(),
    )  # fmt: skip
    return Plan(description, {}, {SOURCE: x, SECOND: y, RESULT: x})


_combinings = Planned(_combining_of)


def masked(x: HostArray, mask: HostArray, out: HostArray) -> None:
    """out = x * mask, for float32 x and bool: NumPy converts the mask first, bit by bit."""
    plan = None
    if _in_one_piece(x, mask, out):
        threads = threads_for(x.size * A_PASS)
        plan = _combinings(threads, MULTIPLY, x.size, BYTES)
    if plan is None:
        np.multiply(x, mask, out)
    else:
        limited_to(threads, plan, x, mask, out)


def add(x: HostArray, y: HostArray, out: HostArray) -> None:
    """out = x + y, for float32 arrays of one shape; by NumPy where there is one thread."""
    plan, threads = None, threads_for(x.size * A_PASS)
    if threads > 1 and _in_one_piece(x, y, out):
        plan = _combinings(threads, ADD, x.size, FLOAT32)
    if plan is None:
        np.add(x, y, out)
    else:
        plan(x, y, out)


def in_one_pass(size: int, first: tuple[int, int, int], *then: Operation, result: int) -> Plan:
    """The plan of a formula for each number of float32 arrays of this size, in one piece, which are
    named by their place in `plan(*arrays)`: `first` is a function of two, `then` what is done to
    its result, and the last result fills one."""
    kind, *pair = first
    line = outline((size,), (1,))
    description = _Owned(
        "primitive_desc", "binary_primitive_desc_create", library()[0].engine, kind, line, line,
        line, _attributes(*then, arrays=line),
    )  # fmt: skip
    further = [(AFTERWARDS * i | SECOND, how) for i, (_, *how) in enumerate(then, 1)]
    places = [
        *zip((SOURCE, SECOND), pair, strict=True),
        *((what, how[0]) for what, how in further if len(how) == 1),
        (RESULT, result),
    ]
    operands = {place: what for what, place in reversed(places)}
    again = {what: operands[place] for what, place in places if operands[place] != what}
    return Plan(description, {}, {operands[i]: line for i in sorted(operands)}, again)


def _in_one_piece(*arrays: HostArray) -> bool:
    return all(array.flags.c_contiguous for array in arrays)


def _copying_of(shape: Shape, strides: Shape, out_strides: Shape) -> Plan | None:
    """The plan of a copy, by the strides in bytes; None where they are not in whole numbers."""
    if len(shape) > MOST_AXES or any(step % SIZE for step in (*strides, *out_strides)):
        return None
    x, out = (outline(shape, [step // SIZE for step in steps]) for steps in (strides, out_strides))
    return _change(x, out)


_copyings = Planned(_copying_of)


def copy(x: HostArray, out: HostArray) -> None:
    """out[...] = x; in a third of the time that NumPy takes where many float32 numbers lie in
    another order, as the channels of a picture that lies by channels."""
    plan = None
    many = x.size >= MANY and x.dtype == out.dtype and x.shape == out.shape
    if many and x.strides[-1] != out.strides[-1] and has(x.dtype):
        plan = _copyings(threads_for(x.size * A_PASS), x.shape, x.strides, out.strides)
    if plan is None:
        _pieces.copy(x, out)
    else:
        plan(x, out)


def contiguous(x: HostArray, spare: HostArray) -> HostArray:
    """x, or its copy in `spare` if its numbers do not lie in order and in one piece."""
    if x.flags.c_contiguous:
        return x
    copy(x, spare)
    return spare


class Convolution:
    """What a convolution takes and makes, as oneDNN is to look at it: x (rows, *space, channels)
    and a weight of the shape (*window, channels / groups, outputs)."""

    def __init__(self, space: Shape, weight: Shape, over: Windows, groups: int) -> None:
        space, over = _without_single_elements(space, over)
        channels, outputs = weight[-2:]
        self._groups, self._weight = groups, (*over.window, channels, outputs)
        self._x, self._y = (*space, channels * groups), (*over.positions, outputs)
        self.shape: Shape = (outputs, channels, *over.window)
        if groups > 1:
            self.shape = groups, outputs // groups, *self.shape[1:]
        self.bias = outline((outputs,), (1,))
        before, behind = zip(*over.pads, strict=True)
        dilation = [n - 1 for n in over.dilation]
        self._sizes = [_Dims(*sizes) for sizes in (over.stride, dilation, before, behind)]

    def x(self, rows: int) -> _Owned:
        return _channels_last((rows, *self._x))

    def y(self, rows: int) -> _Owned:
        return _channels_last((rows, *self._y))

    def weight(self) -> _Owned:
        """A weight in one piece."""
        return outline(self.shape, self._in_order(_strides(self._weight)))

    def strides(self, weight: HostArray) -> Shape:
        """Those of a weight without gaps, in elements."""
        view = weight.reshape(self._weight)  # without axes of one element
        return self._in_order([step // SIZE for step in view.strides])

    def _in_order(self, steps: Sequence[int]) -> Shape:
        """The strides of (*window, channels, outputs) in the order of `shape`."""
        *window, inner, outer = steps
        groups = (self.shape[1] * outer,) if self._groups > 1 else ()
        return *groups, outer, inner, *window

    def forward(
        self, rows: int, bias: bool, activation: Kernel = identity, kind: int = FORWARD_INFERENCE
    ) -> _Owned:
        """The description of y = conv(x, weight) + bias."""
        return _Owned(
            "primitive_desc", "convolution_forward_primitive_desc_create",
            library()[0].engine, kind, DIRECT,
            self.x(rows), outline(self.shape, None), self.bias if bias else None, self.y(rows),
            *self._sizes, _attributes(*([FUSED[activation]] if activation in FUSED else [])),
        )  # fmt: skip

    def weight_gradient(self, rows: int) -> _Owned:
        """The description of dw, of x and dy."""
        return _Owned(
            "primitive_desc", "convolution_backward_weights_primitive_desc_create",
            library()[0].engine, DIRECT,
            self.x(rows), outline(self.shape, None), None, self.y(rows),
            *self._sizes, self.forward(rows, False, kind=FORWARD_TRAINING), _attributes(),
        )  # fmt: skip


def convolution(
    problem: Convolution, weight: HostArray, bias: HostArray | None, activation: Kernel
) -> Planned[Plan] | None:
    """Plans of y = conv(x, weight) + bias, by the rows, with the activation if it is one of FUSED:
    `plan(x, y)`. None where oneDNN has no fast way."""
    if not _fast(problem.forward, bias is not None, activation):
        return None
    order = np.argsort(weight.strides)[::-1]
    if not weight.transpose(order).flags.c_contiguous:  # with gaps, overlapping, or backwards
        weight = np.ascontiguousarray(weight)
    constant = constants.of(weight, problem.shape, problem.strides(weight))
    biases = {} if bias is None else {BIAS: _Memory(problem.bias, bias)}

    def make(rows: int) -> Plan:
        description = problem.forward(rows, bias is not None, activation)
        weights = {WEIGHTS: constant.memory(description)}
        operands = {SOURCE: problem.x(rows), RESULT: problem.y(rows)}
        return Plan(description, biases | weights, operands)

    return Planned(make)


def changing_convolution(
    problem: Convolution, bias: bool, activation: Kernel
) -> Planned[Relaid] | None:
    """The same with another weight, and another bias if there is one, at each call: `plan(scratch,
    x, weight, y)`, or `plan(scratch, x, weight, bias, y)`."""
    description = _fast(problem.forward, bias, activation)
    if description is None:
        return None

    def make(rows: int) -> Relaid:
        description = problem.forward(rows, bias, activation)
        wanted = _described(description, WEIGHTS_LAYOUT)
        biases = {BIAS: problem.bias} if bias else {}
        operands: dict[int, Any] = {
            SOURCE: problem.x(rows),
            WEIGHTS: wanted,
            **biases,
            RESULT: problem.y(rows),
        }
        return Relaid(Plan(description, {}, operands), WEIGHTS, problem.weight())

    return Planned(make, _size(_described(description, WEIGHTS_LAYOUT)))


def weight_gradient(problem: Convolution) -> Planned[Relaid] | None:
    """Plans of the gradient by the weight, by the rows: `plan(scratch, x, dy, dw)`; None where
    oneDNN has no fast way."""
    description = _fast(problem.weight_gradient)
    if description is None:
        return None

    def make(rows: int) -> Relaid:
        description = problem.weight_gradient(rows)
        layout = _described(description, WEIGHT_GRADIENT_LAYOUT)
        operands = {
            SOURCE: problem.x(rows),
            RESULT_GRADIENT: problem.y(rows),
            WEIGHT_GRADIENT: layout,
        }
        return Relaid(Plan(description, {}, operands), WEIGHT_GRADIENT, problem.weight())

    return Planned(make, _size(_described(description, WEIGHT_GRADIENT_LAYOUT)))


def recurrence(
    kind: str,
    weight_x: HostArray,
    weight: HostArray,
    bias: HostArray,
    time: int,
    *,
    begun: bool,
    reverse: bool,
) -> Planned[Plan] | None:
    """Plans of an "lstm", "gru" or "lbr_gru" through time, by the rows: `plan(x, *states, y,
    *states, scratch)`, those of the beginning only if they have `begun`. Arrays lie in one piece.

    weight_x (inputs, gates, n), weight (n, gates, n) and bias (gates, n) are in oneDNN's order of
    gates. `scratch` is bytes. None where it does not do it.
    """
    inputs, size = len(weight_x), len(weight)
    inner, outer = (
        constants.of(gates, (1, 1, *gates.shape), _strides((1, 1, *gates.shape)))
        for gates in (weight_x, weight)
    )
    shifts = outline((1, 1, *bias.shape), _strides((1, 1, *bias.shape)))
    biases = {BIAS: _Memory(shifts, bias)}
    cell = kind == "lstm"
    first, last = (STATE, CELL)[: 1 + cell], (LAST_STATE, LAST_CELL)[: 1 + cell]

    def operands(rows: int) -> dict[int, Any]:
        x, y = (outline((time, rows, n), (n, time * n, 1)) for n in (inputs, size))
        state = outline((1, 1, rows, size), _strides((1, 1, rows, size)))
        beginning = dict.fromkeys(first, state) if begun else {}
        return {SOURCE: x, **beginning, RESULT: y, **dict.fromkeys(last, state)}

    def describe(rows: int) -> _Owned:
        of = operands(rows)
        return _Owned(
            "primitive_desc", f"{kind}_forward_primitive_desc_create", library()[0].engine,
            FORWARD_INFERENCE, FROM_LAST if reverse else FROM_FIRST,
            of[SOURCE], *map(of.get, first), inner.any_layout(), outer.any_layout(),
            *([None] * 2 * cell),  # peepholes and a projection
            shifts, of[RESULT], *map(of.get, last), 0, _attributes(),
        )  # fmt: skip

    def make(rows: int) -> Plan:
        description = describe(rows)
        weights = {WEIGHTS: inner.memory(description), STATE_WEIGHTS: outer.memory(description, 1)}
        scratch = {SCRATCHPAD: _described(description, SCRATCHPAD_LAYOUT)}
        return Plan(description, weights | biases, operands(rows) | scratch)

    def scratch_size(rows: int) -> int:
        return _size(_described(describe(rows), SCRATCHPAD_LAYOUT))

    try:
        one, *more = (limited_to(1, scratch_size, 1 + n) for n in (0, *FURTHER_ROWS))
    except OneDNNError:
        return None
    growths = (-(-(size - one) // n) for size, n in zip(more, FURTHER_ROWS, strict=True))
    return Planned(make, one, max(growths))


def mean(
    space: Shape, channels: int, over: Windows, with_padding: bool
) -> Callable[[HostArray, HostArray], None] | None:
    """What makes y, the mean of what windows see of x (rows, *space, channels): `run(x, y)`; None
    where oneDNN has no fast way."""
    before, behind = zip(*over.pads, strict=True)
    apart = [n - 1 for n in over.dilation]
    sizes = [_Dims(*along) for along in (over.stride, over.window, apart, before, behind)]
    kind = MEAN_WITH_PADDING if with_padding else MEAN

    def describe(rows: int) -> _Owned:
        x, y = (_channels_last((rows, *along, channels)) for along in (space, over.positions))
        return _Owned(
            "primitive_desc", "pooling_forward_primitive_desc_create",
            library()[0].engine, FORWARD_INFERENCE, kind, x, y, *sizes, _attributes(),
        )  # fmt: skip

    def make(rows: int) -> Plan:
        x, y = (_channels_last((rows, *along, channels)) for along in (space, over.positions))
        return Plan(describe(rows), {}, {SOURCE: x, RESULT: y})

    planned = Planned(make)

    def run(x: HostArray, y: HostArray) -> None:
        threads = threads_for(x.size * A_PASS)
        plan = planned(threads, len(x))
        assert plan is not None, "oneDNN planned it for one row"
        limited_to(threads, plan, x, y)  # a pool asks anew at each call

    return run if _fast(describe) else None


def layer_norm(
    size: int, gain: HostArray | None, bias: HostArray | None, eps: float
) -> Planned[Plan] | None:
    """Plans of y, the layer norm over the last axis of x (lines, size), which may be y, by the
    lines: `plan(x, y, scratch)`, for arrays in one piece; None where oneDNN has no fast way."""
    vector = outline((size,), (1,))
    vectors = {
        what: _Memory(vector, np.ascontiguousarray(numbers))
        for what, numbers in ((GAIN, gain), (SHIFT, bias))
        if numbers is not None
    }
    flags = USE_GAIN * (GAIN in vectors) + USE_SHIFT * (SHIFT in vectors)

    def describe(lines: int) -> _Owned:
        x = outline((lines, size), (size, 1))
        return _Owned(
            "primitive_desc", "layer_normalization_forward_primitive_desc_create",
            library()[0].engine, FORWARD_INFERENCE, x, x, None, eps, flags, _attributes(),
        )  # fmt: skip

    def make(lines: int) -> Plan:
        x, description = outline((lines, size), (size, 1)), describe(lines)
        scratch = {SCRATCHPAD: _described(description, SCRATCHPAD_LAYOUT)}
        return Plan(description, vectors, {SOURCE: x, RESULT: x} | scratch)

    one = _fast(describe)
    if one is None:
        return None
    return Planned(make, _size(_described(one, SCRATCHPAD_LAYOUT)), STATISTICS)


def normalize(planned: Planned[Plan], x: HostArray, y: HostArray, scratch: HostArray) -> None:
    """Make y by a plan of `layer_norm`."""
    threads = threads_for(x.size * A_PASS)
    plan = planned(threads, len(x))
    assert plan is not None, "oneDNN planned it for one line"
    if scratch.nbytes < plan.scratch_size:
        scratch = aligned((plan.scratch_size,), "uint8")
    limited_to(threads, plan, x, y, scratch)  # a norm asks anew at each call


def _softmax_of(lines: int, size: int) -> Plan:
    x = outline((lines, size), (size, 1))
    description = _Owned(
        "primitive_desc", "softmax_forward_primitive_desc_create",
        library()[0].engine, FORWARD_INFERENCE, SOFTMAX, x, x, 1, _attributes(),
    )  # fmt: skip
    return Plan(description, {}, {SOURCE: x, RESULT: x})


_softmaxes = Planned(_softmax_of)


def softmax(x: HostArray) -> None:
    """x = softmax(x) over its last axis, for float32 in one piece; a line of nothing but minus
    infinity becomes NaN."""
    lines = x.reshape(-1, x.shape[-1])
    threads = threads_for(x.size * A_PASS)
    plan = _softmaxes(threads, *lines.shape)
    assert plan is not None, "oneDNN has a softmax over lines of any length"
    limited_to(threads, plan, lines, lines)


def _without_single_elements(space: Shape, over: Windows) -> tuple[Shape, Windows]:
    """The space, and the windows over it, without axes of one element that a window sees alone.

    oneDNN makes the outputs along the last axis at once.
    """
    sizes = zip(space, over.window, over.pads, strict=True)
    kept = [axis for axis, size in enumerate(sizes) if size != (1, 1, (0, 0))] or [0]
    fields = {name: tuple(along[axis] for axis in kept) for name, along in vars(over).items()}
    return tuple(space[axis] for axis in kept), Windows(**fields)


def _fast(describe: Callable[..., _Owned], *how: Any) -> _Owned | None:
    """What oneDNN would run for one row, if it is made for this CPU and works on arrays as they
    lie."""
    dnnl, name = library()[0], c_char_p()
    try:
        description = limited_to(1, describe, 1, *how)
    except OneDNNError:
        return None
    dnnl.dnnl_primitive_desc_query(description, NAME, 0, byref(name))
    slow = (name.value or b"").startswith((b"ref", b"gemm"))
    copies = _size(_described(description, SCRATCHPAD_LAYOUT)) > MOST_SCRATCH
    return None if slow or copies else description


def _size(layout: Any) -> int:
    """The bytes of an array of a layout."""
    return int(library()[0].dnnl_memory_desc_get_size(layout))


def _strides(shape: Sequence[int]) -> Shape:
    """The strides of an array in one piece, in elements."""
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _channels_last(shape: Shape) -> _Owned:
    """An array (rows, *space, channels) in one piece; oneDNN names channels before space."""
    strides = _strides(shape)
    return outline((shape[0], shape[-1], *shape[1:-1]), (strides[0], strides[-1], *strides[1:-1]))
