"""One product as cuBLASLt has it described: layouts, epilogue, algorithms, launch."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import cupy
import numpy as np
from cupy.cuda import get_current_stream

from nnxp._arrays import Array
from nnxp.backend.cuda import workspaces
from nnxp.kernels.cuda.lt.bindings import (
    BATCH_COUNT,
    BATCH_STEP,
    BIAS_POINTER,
    DATA_TYPES,
    DEFAULT,
    EPILOGUE,
    MAX_WORKSPACE,
    MIN_ALIGNMENTS,
    REDUCE_IN_COMPUTE_TYPE,
    REDUCTION_SCHEMES,
    STATUS,
    TRANSPOSE_A,
    TRANSPOSE_B,
    LtError,
    handle,
)

PASS = 0  # of our own: the product alone, and a pass over it
PROPOSALS = 8
WORKSPACE = 32 << 20  # bytes an algorithm may ask for: what NVIDIA advises for Hopper

FLOAT32 = np.dtype(np.float32)
_ONE, _ZERO = ctypes.c_float(1), ctypes.c_float(0)
_ONE_AT, _ZERO_AT = ctypes.addressof(_ONE), ctypes.addressof(_ZERO)


class Form(NamedTuple):
    """All that cuBLASLt knows of a product but its rows: x (m, inner) @ weight (inner, cols).

    Of stacks of matrices, of which the product's `batch` says how many there are, the steps are
    the elements from one matrix to the next.
    """

    device: int
    dtype: np.dtype[Any]
    compute: int
    inner: int
    cols: int
    ldx: int
    ldw: int
    turned: bool  # the weight lies by columns
    alignment: int
    x_turned: bool = False
    x_step: int = 0
    weight_step: int = 0


class Algorithm(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = [
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int32),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int32 * 4),
    ]


class Product:
    """One product as cuBLASLt has it described; may be launched from several threads at once."""

    def __init__(self, lt: Any, form: Form, rows: int, way: int, batch: int = 1) -> None:
        self.lt, self.form, self.rows = lt, form, rows
        # What a pass of ours goes on with is not rounded to 16 bits before.
        self.dtype = FLOAT32 if way == PASS else form.dtype
        self.epilogue = DEFAULT if way == PASS else way
        self.handle = handle(lt, form.device)
        many = f"{batch} times " if batch > 1 else ""
        self.what = f"{many}({rows}, {form.inner}) @ ({form.inner}, {form.cols}) of {form.dtype}"
        inner, cols, kind = form.inner, form.cols, DATA_TYPES[form.dtype.name]
        self.product = lt.matmul_desc_create(form.compute, DATA_TYPES["float32"])
        weight = (inner, cols) if form.turned else (cols, inner)
        self.weight = lt.matrix_layout_create(kind, *weight, form.ldw)
        x = (rows, inner) if form.x_turned else (inner, rows)
        self.x = lt.matrix_layout_create(kind, *x, form.ldx)
        self.y = lt.matrix_layout_create(DATA_TYPES[self.dtype.name], cols, rows, cols)
        weakref.finalize(
            self, _destroy, lt, self.product, (self.weight, self.x, self.y)
        ).atexit = False
        if batch > 1:
            steps = form.weight_step, form.x_step, rows * cols
            for layout, step in zip((self.weight, self.x, self.y), steps, strict=True):
                _set(lt.matrix_layout_set_attribute, layout, BATCH_COUNT, ctypes.c_int32(batch))
                _set(lt.matrix_layout_set_attribute, layout, BATCH_STEP, ctypes.c_int64(step))
        self._set(TRANSPOSE_A, ctypes.c_int32(form.turned))
        self._set(TRANSPOSE_B, ctypes.c_int32(form.x_turned))
        self._set(EPILOGUE, ctypes.c_uint32(self.epilogue))
        # The descriptor holds the bias, so a launch with one is two steps that belong together.
        self.lock = threading.Lock()
        self.bias = 0
        if self.epilogue != DEFAULT:  # before there is a bias, an address as good as any of them
            self.bias = form.alignment
            self._set(BIAS_POINTER, ctypes.c_int64(self.bias))

    def _set(self, attribute: int, value: Any) -> None:
        _set(self.lt.matmul_desc_set_attribute, self.product, attribute, value)

    def proposals(self) -> list[Algorithm]:
        """The algorithms that cuBLASLt thinks best, the best first; none if it has none."""
        lt, algorithms, count = self.lt, (Algorithm * PROPOSALS)(), ctypes.c_int32()
        wishes: list[tuple[int, Any]] = [(MAX_WORKSPACE, ctypes.c_uint64(WORKSPACE))]
        alignment = ctypes.c_uint32(self.form.alignment)
        wishes += [(attribute, alignment) for attribute in MIN_ALIGNMENTS]
        if self.form.dtype.itemsize == 2:  # partial sums are not to be rounded to 16 bits
            wishes += [(REDUCTION_SCHEMES, ctypes.c_uint32(REDUCE_IN_COMPUTE_TYPE))]
        preference = lt.matmul_preference_create()
        try:
            for attribute, value in wishes:
                _set(lt.matmul_preference_set_attribute, preference, attribute, value)
            lt.matmul_algo_get_heuristic(
                *(self.handle, self.product, self.weight, self.x, self.y, self.y, preference),
                *(PROPOSALS, ctypes.addressof(algorithms), ctypes.addressof(count)),
            )
        except lt.cuBLASLtError as error:
            refusal = self._refused(error)
            if "NOT_SUPPORTED" in str(refusal):
                return []
            raise refusal from error
        finally:
            lt.matmul_preference_destroy(preference)
        return [algorithm for algorithm in algorithms[: count.value] if algorithm.state == 0]

    def working(self, algorithm: Algorithm | None) -> Algorithm | None:
        """An algorithm chosen for other rows, if there is one and it works here; else the one that
        cuBLASLt thinks best; None if it has none."""
        here = None if algorithm is None else self._checked(algorithm)
        return next(iter(self.proposals()), None) if here is None else here

    def _checked(self, algorithm: Algorithm) -> Algorithm | None:
        """The algorithm with the workspace it takes here, if it works here."""
        here = Algorithm()
        try:
            self.lt.matmul_algo_check(
                *(self.handle, self.product, self.weight, self.x, self.y, self.y),
                *(ctypes.addressof(algorithm), ctypes.addressof(here)),
            )
        except self.lt.cuBLASLtError:
            return None
        here.algorithm = algorithm.algorithm
        return here if here.workspace <= WORKSPACE else None

    def launch(self, algorithm: Algorithm, x: int, weight: int, bias: int, y: int) -> None:
        """Enqueue it on the current stream, for these addresses; bias is 0 if there is none.

        The workspace may go back to CuPy's pool while the kernel still waits: the pool hands it
        out again on this stream only, after the kernel.
        """
        size, stream = algorithm.workspace, get_current_stream().ptr
        space = workspace(size, stream) if size else None
        lt, product = self.lt, self.product
        try:
            with self.lock:
                if bias != self.bias:
                    self._set(BIAS_POINTER, ctypes.c_int64(bias))
                    self.bias = bias
                lt.matmul(
                    self.handle,
                    product,
                    _ONE_AT,
                    weight,
                    self.weight,
                    x,
                    self.x,
                    _ZERO_AT,
                    y,
                    self.y,
                    y,
                    self.y,
                    ctypes.addressof(algorithm),
                    0 if space is None else space.ptr,
                    size,
                    stream,
                )
        except lt.cuBLASLtError as error:
            raise self._refused(error) from error

    def _refused(self, error: Any) -> LtError:
        status = getattr(error, "status", None)
        name = f"CUBLAS_STATUS_{STATUS[status]}" if status in STATUS else str(error)
        return LtError(f"cuBLASLt: {name} for {self.what}, epilogue {self.epilogue}")


def workspace(size: int, stream: int) -> Any:
    """So much memory at least, for what is next on the stream: an engine keeps one for each."""
    kept = workspaces.get()
    space = None if kept is None else kept.get(stream)
    if space is None or space.mem.size < size:
        space = cupy.cuda.alloc(size)
        if kept is not None:
            kept[stream] = space
    return space


def _set(setter: Callable[..., None], described: int, attribute: int, value: Any) -> None:
    setter(described, attribute, ctypes.addressof(value), ctypes.sizeof(value))


def _destroy(lt: Any, product: int, layouts: tuple[int, ...]) -> None:
    lt.matmul_desc_destroy(product)
    for layout in layouts:
        lt.matrix_layout_destroy(layout)


def leading(x: Array) -> int | None:
    """The elements from one row to the next; None if a row is not one piece, or rows overlap.

    x (rows, cols), or a stack of such.
    """
    (rows, cols), (down, across), size = x.shape[-2:], x.strides[-2:], x.itemsize
    if cols > 1 and across != size:
        return None
    if rows == 1:
        return int(cols)
    return int(down) // int(size) if down >= cols * size and down % size == 0 else None


def packed(bias: Array) -> bool:
    return bool(bias.flags.c_contiguous)
