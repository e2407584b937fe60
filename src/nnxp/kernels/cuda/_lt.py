"""Matrix products through cuBLASLt: pointers in, nothing copied, bias and relu in the same kernel.

CuPy's own products copy what is not contiguous and cannot be captured in a CUDA graph. cuBLASLt
reads matrices by columns, so y = x @ weight is told to it as the transposed product
y' (N, M) = weight' (N, K) x' (K, M), of which nothing has to be moved; the bias then belongs to
the rows of y', which is how cuBLASLt adds one.

How a product is done is settled when it is first asked for: the algorithms that cuBLASLt proposes
are timed, and its epilogues against a pass of our own. One choice serves all products that differ
only in the number of rows, within a factor of two, so that few ragged blocks cost a new timing,
and the same product gives the same bits for as long as the process remembers it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import cupy
import numpy as np
from cupy.cuda import get_current_stream
from cupy.cuda.device import get_device_id

from nnxp._arrays import Array, Shape
from nnxp.kernels._dispatch import Kernel
from nnxp.kernels.activations import ACTIVATIONS, identity, relu
from nnxp.kernels.cuda._compiled import unfused
from nnxp.kernels.cuda.activations import bias_act
from nnxp.kernels.linear import linear, precision

# cuBLASLt's numbers, as in NVIDIA's headers
DATA_TYPES = {"float32": 0, "float16": 2, "bfloat16": 14}
COMPUTE_FLOAT32, COMPUTE_TF32 = 68, 77
TRANSPOSE_A, EPILOGUE, BIAS_POINTER = 3, 7, 8  # attributes of a product
MAX_WORKSPACE, REDUCTION_SCHEMES, MIN_ALIGNMENTS = 1, 3, (5, 6, 7, 8)  # and of a preference
REDUCE_IN_COMPUTE_TYPE = 2
DEFAULT, BIAS, RELU_BIAS = 1, 4, 6  # epilogues
STATUS = {
    1: "NOT_INITIALIZED",
    3: "ALLOC_FAILED",
    7: "INVALID_VALUE",
    8: "ARCH_MISMATCH",
    11: "MAPPING_ERROR",
    13: "EXECUTION_FAILED",
    14: "INTERNAL_ERROR",
    15: "NOT_SUPPORTED",
    16: "LICENSE_ERROR",
}

PASS = 0  # of our own: the product alone, and a pass over it

# GELU_BIAS is left out: it is the tanh form, and NVIDIA does not say how exact its tanh is.
_EPILOGUES = {identity: BIAS, relu: RELU_BIAS}
_WAYS = {  # by what is wished for, the ways that are tried
    DEFAULT: (DEFAULT,),
    PASS: (PASS,),
    BIAS: (PASS, BIAS),
    RELU_BIAS: (PASS, BIAS, RELU_BIAS),
}
_FLOAT32 = np.dtype(np.float32)
_ONE, _ZERO = ctypes.c_float(1), ctypes.c_float(0)
_ONE_AT, _ZERO_AT = ctypes.addressof(_ONE), ctypes.addressof(_ZERO)

PROPOSALS = 8
WORKSPACE = 32 << 20  # bytes an algorithm may ask for: what NVIDIA advises for Hopper
TIMED_ROWS = 8192  # more make no difference to which algorithm is best, and take longer to time
MOST_PLANS, MOST_CHOICES = 256, 1024
MOST_ROWS, MOST_ELEMENTS, PART = 1 << 20, (1 << 31) - 1, 1 << 28
PAD_FROM_ROWS = 1024

Run = Callable[[Array, Array, Array | None, Kernel], Array]
"""A way to do a product: x, weight, bias, activation -> y."""

_plans: dict[Hashable, Run] = {}
_choices: dict[Hashable, _Choice] = {}
_handles: dict[int, int] = {}
_making = threading.Lock()  # one plan at a time, so that none disturbs the timing of another


class LtError(RuntimeError):
    """cuBLASLt refused a product: the message has the status and the shapes."""


def why_not() -> str | None:
    """Why products do not go through cuBLASLt; None if they do."""
    return _library()[1]


@cache
def _library() -> tuple[Any, str | None]:
    """NVIDIA's bindings, or why there are none."""
    if importlib.util.find_spec("nvmath") is None:
        return None, "nvmath-python is not installed"
    try:
        with warnings.catch_warnings():  # of others' code, which may be errors here
            warnings.simplefilter("ignore")
            from nvmath.bindings import cublasLt

            cublasLt.get_version()  # loads the library itself
    except Exception as error:  # whatever it is, CuPy's products are still there
        said = " ".join(str(error).split())[:300]
        return None, f"cuBLASLt cannot be loaded ({type(error).__name__}: {said})"
    return cublasLt, None


def product(x: Array, weight: Array, bias: Array | None, activation: Kernel) -> Array:
    """y = activation(x @ weight + bias)

    x (m, k), weight (k, n), bias (n,) -> y (m, n), on the current stream of the current device.
    Everything that decides how it is done is in the key, so that what was done before takes one
    look into a dictionary.
    """
    wish = DEFAULT if activation is identity else PASS
    try:
        x_at, weight_at = x.data, weight.data
        pointers = x_at.ptr | weight_at.ptr | 256
        about_bias = None
        if bias is not None:
            wish = _EPILOGUES.get(activation, PASS)
            bias_at = bias.data
            pointers |= bias_at.ptr
            about_bias = bias.dtype, bias.shape, bias.strides, bias_at.device_id
        key = (
            get_device_id(),
            precision.get(),
            wish,
            pointers & -pointers,  # the largest power of two, to 256, that divides them all
            x.dtype,
            x.shape,
            x.strides,
            x_at.device_id,
            weight.dtype,
            weight.shape,
            weight.strides,
            weight_at.device_id,
            about_bias,
        )
    except AttributeError:  # an array of the host among them: CuPy says so
        return _unfused(x, weight, bias, activation)
    plan = _plans.get(key) or _plan(key, wish, x, weight, bias, activation)
    return plan(x, weight, bias, activation)


def _plan(
    key: Hashable, wish: int, x: Array, weight: Array, bias: Array | None, activation: Kernel
) -> Run:
    with _making:
        if key not in _plans:
            _remember(_plans, key, _made(wish, x, weight, bias, activation), MOST_PLANS)
        return _plans[key]


def _remember(memory: dict[Hashable, Any], key: Hashable, value: object, most: int) -> None:
    """Keeps the `most` that were made last. What is forgotten goes when its last user is done."""
    memory[key] = value
    if len(memory) > most:
        del memory[next(iter(memory))]


# The ways to do a product


def _made(wish: int, x: Array, weight: Array, bias: Array | None, activation: Kernel) -> Run:
    """The way to do such a product; the wish is the epilogue that would leave nothing to do."""
    given = [each for each in (x, weight, bias) if each is not None]
    dtype, device = x.dtype, get_device_id()
    if (
        dtype.name not in DATA_TYPES
        or any(each.dtype != dtype or each.data.device_id != device for each in given)
        or weight.shape[:-1] != x.shape[1:]
        or (bias is not None and bias.shape != weight.shape[1:])
    ):
        return _unfused
    (rows, inner), cols = x.shape, weight.shape[1]
    if 0 in (rows, cols, inner):
        return _nothing
    lt = _library()[0]
    if lt is None:
        return _by_cupy
    ldx, ldw, ldw_turned = _leading(x), _leading(weight), _leading(weight.T)
    if ldx is None or (ldw or ldw_turned) is None or (bias is not None and not _packed(bias)):
        return _with_copies
    if rows > 1 and (rows > MOST_ROWS or rows * max(ldx, cols) > MOST_ELEMENTS):
        return _in_parts
    return _lt_plan(lt, wish, x, weight, bias, activation, ldx, ldw, ldw_turned)


def _unfused(x: Array, weight: Array, bias: Array | None, activation: Kernel) -> Array:
    """For other types, and for what does not fit together: CuPy computes it, or says why not."""
    return unfused(linear, x, weight, bias, activation=activation)


def _nothing(x: Array, weight: Array, bias: Array | None, activation: Kernel) -> Array:
    """For a sum without terms, or no sums at all."""
    y = cupy.zeros((x.shape[0], weight.shape[1]), x.dtype)
    return _finished(y, bias, activation, y.dtype) if y.size else y


def _by_cupy(x: Array, weight: Array, bias: Array | None, activation: Kernel) -> Array:
    """Where there is no cuBLASLt, or it does not offer this product.

    In 16 bits CuPy rounds the product before a bias or an activation could come to it, and sums
    in 16 bits where there is only one number to sum; so those go by way of float32.
    """
    y = cupy.empty((x.shape[0], weight.shape[1]), x.dtype)
    alone = bias is None and activation is identity and y.size > 1
    if y.itemsize == 2 and not alone:
        return _unfused(x, weight, bias, activation)
    cupy.matmul(x, weight, out=y)
    return _finished(y, bias, activation, y.dtype)


def _with_copies(x: Array, weight: Array, bias: Array | None, activation: Kernel) -> Array:
    """For rows with gaps between neighbours, or in reverse: those arrays are copied first."""
    if _leading(x) is None:
        x = cupy.ascontiguousarray(x)
    if (_leading(weight) or _leading(weight.T)) is None:
        weight = cupy.ascontiguousarray(weight)
    if bias is not None and not _packed(bias):
        bias = cupy.ascontiguousarray(bias)
    return product(x, weight, bias, activation)


def _in_parts(x: Array, weight: Array, bias: Array | None, activation: Kernel) -> Array:
    """For more than cuBLASLt counts in 32 bits: a gigabyte or so of rows at a time."""
    rows, cols = x.shape[0], weight.shape[1]
    y = cupy.empty((rows, cols), x.dtype)
    step = min(MOST_ROWS, max(1, PART // max(x.strides[0] // x.itemsize, cols)))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        cupy.copyto(y[part], product(x[part], weight, bias, activation))
    return y


_ONE_PASS = frozenset(ACTIVATIONS.values())  # those known when bias_act was: not a user's own


def _finished(y: Array, bias: Array | None, activation: Kernel, dtype: np.dtype[Any]) -> Array:
    """activation(y + bias) in the given type: in place, if that is the type of y.

    Else y is float32 so as to be rounded once, which is when the result is stored.
    """
    if bias is None and activation is identity:
        return y  # a product alone is made in its type
    if activation in _ONE_PASS:
        return bias_act(y, bias, activation, y if y.dtype == dtype else cupy.empty(y.shape, dtype))
    if bias is not None:
        bias_act(y, _converted(bias, y.dtype), identity, y)
    return _converted(activation(y, out=y), dtype)


def _rest(
    way: int, y: Array, bias: Array | None, activation: Kernel, dtype: np.dtype[Any]
) -> Array:
    """What a product made in this way leaves to do."""
    if way == PASS:
        return _finished(y, bias, activation, dtype)
    if way == BIAS:  # of a relu: it may come after the rounding, for it rounds nothing
        return _finished(y, None, activation, dtype)
    return y


def _converted(x: Array, dtype: np.dtype[Any]) -> Array:
    if x.dtype == dtype:
        return x
    y = cupy.empty(x.shape, dtype)
    cupy.copyto(y, x, casting="unsafe")
    return y


def _leading(x: Array) -> int | None:
    """The elements from one row to the next; None if a row is not one piece, or rows overlap."""
    (rows, cols), (down, across), size = x.shape, x.strides, x.itemsize
    if cols > 1 and across != size:
        return None
    if rows == 1:
        return int(cols)
    return int(down) // int(size) if down >= cols * size and down % size == 0 else None


def _packed(bias: Array) -> bool:
    return bool(bias.flags.c_contiguous)


# cuBLASLt


class _Form(NamedTuple):
    """All that cuBLASLt knows of a product but its rows: x (m, inner) @ weight (inner, cols)."""

    device: int
    dtype: np.dtype[Any]
    compute: int
    inner: int
    cols: int
    ldx: int
    ldw: int
    turned: bool  # the weight lies by columns
    alignment: int


class _Algorithm(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = [
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int32),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int32 * 4),
    ]


class _Choice(NamedTuple):
    """What was found best for a form and a wish: one of its ways."""

    way: int
    algorithm: _Algorithm


class _Product:
    """One product as cuBLASLt has it described; may be launched from several threads at once."""

    def __init__(self, lt: Any, form: _Form, rows: int, way: int) -> None:
        self.lt, self.form, self.rows = lt, form, rows
        # What a pass of ours goes on with is not rounded to 16 bits before.
        self.dtype = _FLOAT32 if way == PASS else form.dtype
        self.epilogue = DEFAULT if way == PASS else way
        self.handle = _handle(lt, form.device)
        self.what = f"({rows}, {form.inner}) @ ({form.inner}, {form.cols}) of {form.dtype}"
        inner, cols, kind = form.inner, form.cols, DATA_TYPES[form.dtype.name]
        self.product = lt.matmul_desc_create(form.compute, DATA_TYPES["float32"])
        weight = (inner, cols) if form.turned else (cols, inner)
        self.weight = lt.matrix_layout_create(kind, *weight, form.ldw)
        self.x = lt.matrix_layout_create(kind, inner, rows, form.ldx)
        self.y = lt.matrix_layout_create(DATA_TYPES[self.dtype.name], cols, rows, cols)
        weakref.finalize(
            self, _destroy, lt, self.product, (self.weight, self.x, self.y)
        ).atexit = False
        self._set(TRANSPOSE_A, ctypes.c_int32(form.turned))
        self._set(EPILOGUE, ctypes.c_uint32(self.epilogue))
        # The descriptor holds the bias, so a launch with one is two steps that belong together.
        self.lock = threading.Lock()
        self.bias = 0
        if self.epilogue != DEFAULT:  # before there is a bias, an address as good as any of them
            self.bias = form.alignment
            self._set(BIAS_POINTER, ctypes.c_int64(self.bias))

    def _set(self, attribute: int, value: Any) -> None:
        self.lt.matmul_desc_set_attribute(
            self.product, attribute, ctypes.addressof(value), ctypes.sizeof(value)
        )

    def proposals(self) -> list[_Algorithm]:
        """The algorithms that cuBLASLt thinks best, the best first; none if it has none."""
        lt, found, count = self.lt, (_Algorithm * PROPOSALS)(), ctypes.c_int32()
        wishes: list[tuple[int, Any]] = [(MAX_WORKSPACE, ctypes.c_uint64(WORKSPACE))]
        wishes += [(each, ctypes.c_uint32(self.form.alignment)) for each in MIN_ALIGNMENTS]
        if self.form.dtype.itemsize == 2:  # partial sums are not to be rounded to 16 bits
            wishes += [(REDUCTION_SCHEMES, ctypes.c_uint32(REDUCE_IN_COMPUTE_TYPE))]
        preference = lt.matmul_preference_create()
        try:
            for attribute, value in wishes:
                lt.matmul_preference_set_attribute(
                    preference, attribute, ctypes.addressof(value), ctypes.sizeof(value)
                )
            lt.matmul_algo_get_heuristic(
                *(self.handle, self.product, self.weight, self.x, self.y, self.y, preference),
                *(PROPOSALS, ctypes.addressof(found), ctypes.addressof(count)),
            )
        except lt.cuBLASLtError as error:
            said = self._said(error)
            if "NOT_SUPPORTED" in str(said):
                return []
            raise said from error
        finally:
            lt.matmul_preference_destroy(preference)
        return [each for each in found[: count.value] if each.state == 0]

    def checked(self, algorithm: _Algorithm) -> _Algorithm | None:
        """An algorithm found for other rows, with the workspace it takes here, if it works here."""
        here = _Algorithm()
        try:
            self.lt.matmul_algo_check(
                *(self.handle, self.product, self.weight, self.x, self.y, self.y),
                *(ctypes.addressof(algorithm), ctypes.addressof(here)),
            )
        except self.lt.cuBLASLtError:
            return None
        here.algorithm = algorithm.algorithm
        return here if here.workspace <= WORKSPACE else None

    def launch(self, algorithm: _Algorithm, x: int, weight: int, bias: int, y: int) -> None:
        """Enqueue it on the current stream, for these addresses; bias is 0 if there is none.

        The workspace goes back to CuPy's pool while the kernel may still wait: the pool hands it
        out again on this stream only, after the kernel.
        """
        size = algorithm.workspace
        space = cupy.cuda.alloc(size) if size else None
        lt, product, stream = self.lt, self.product, get_current_stream().ptr
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
            raise self._said(error) from error

    def _said(self, error: Any) -> LtError:
        status = getattr(error, "status", None)
        name = f"CUBLAS_STATUS_{STATUS[status]}" if status in STATUS else str(error)
        return LtError(f"cuBLASLt: {name} for {self.what}, epilogue {self.epilogue}")


def _handle(lt: Any, device: int) -> int:
    """cuBLASLt on the current device, which this is; called by one thread at a time."""
    if device not in _handles:
        _handles[device] = lt.create()
    return _handles[device]


def _destroy(lt: Any, product: int, layouts: tuple[int, ...]) -> None:
    lt.matmul_desc_destroy(product)
    for each in layouts:
        lt.matrix_layout_destroy(each)


class _Plan:
    """A product through cuBLASLt: one launch, and one pass over what that leaves to do."""

    def __init__(self, product: _Product, algorithm: _Algorithm, way: int, cols: int) -> None:
        self.product, self.algorithm, self.way, self.cols = product, algorithm, way, cols
        self.shape: Shape = product.rows, product.form.cols
        self.dtype = product.dtype

    def __call__(self, x: Array, weight: Array, bias: Array | None, activation: Kernel) -> Array:
        cols = self.shape[1]
        if cols != self.cols:
            weight = _widened(weight, cols)
        y = cupy.empty(self.shape, self.dtype)
        fused_bias = bias.data.ptr if self.way > DEFAULT and bias is not None else 0
        self.product.launch(self.algorithm, x.data.ptr, weight.data.ptr, fused_bias, y.data.ptr)
        if cols != self.cols:
            y = y[:, : self.cols]
        return _rest(self.way, y, bias, activation, x.dtype)


def _widened(weight: Array, cols: int) -> Array:
    """The weight with more columns, of which no one looks at the results: they are not even set.

    Made anew each time, because the weight may have been changed in place.
    """
    wide = cupy.empty((weight.shape[0], cols), weight.dtype)
    cupy.copyto(wide[:, : weight.shape[1]], weight)
    return wide


def _lt_plan(
    lt: Any,
    wish: int,
    x: Array,
    weight: Array,
    bias: Array | None,
    activation: Kernel,
    ldx: int,
    ldw: int | None,
    ldw_turned: int | None,
) -> Run:
    (rows, inner), cols, size = x.shape, weight.shape[1], x.itemsize
    wide = cols
    if (
        rows >= PAD_FROM_ROWS
        and cols * size % 16
        and not any(each % 16 for each in (inner * size, ldx * size, x.data.ptr))
    ):  # tensor cores and wide accesses want rows of 16 bytes: of x, of the weight and of y
        wide = -(-cols // 16) * 16
        wish = wish if wish == DEFAULT else PASS  # rather than a bias that is padded, too
    pointers = 256 | x.data.ptr
    if wide == cols:
        pointers |= weight.data.ptr
    if wish > DEFAULT and bias is not None:
        pointers |= bias.data.ptr
    tf32 = precision.get() == "tf32" and x.dtype == np.float32
    form = _Form(
        device=get_device_id(),
        dtype=x.dtype,
        compute=COMPUTE_TF32 if tf32 else COMPUTE_FLOAT32,
        inner=inner,
        cols=wide,
        ldx=ldx,
        ldw=wide if wide != cols else ldw or ldw_turned or 0,
        turned=wide == cols and ldw is None,
        alignment=pointers & -pointers,
    )
    timed = min(rows, TIMED_ROWS)
    key = form, (timed - 1).bit_length(), wish
    choice = _choices.get(key)
    if choice is None and not get_current_stream().is_capturing():
        weight = weight if wide == cols else _widened(weight, wide)
        choice = _chosen(lt, form, timed, wish, x, weight, bias, activation)
        if choice is not None:
            _remember(_choices, key, choice, MOST_CHOICES)
    way = choice.way if choice is not None else DEFAULT if wish == DEFAULT else PASS
    found = _Product(lt, form, rows, way)
    algorithm = None if choice is None else found.checked(choice.algorithm)
    if algorithm is None:
        proposals = found.proposals()
        if not proposals:
            return _by_cupy
        algorithm = proposals[0]
    return _Plan(found, algorithm, way, cols)


# Choosing


def _chosen(
    lt: Any,
    form: _Form,
    rows: int,
    wish: int,
    x: Array,
    weight: Array,
    bias: Array | None,
    activation: Kernel,
) -> _Choice | None:
    """The fastest way for the first rows of x; None if nothing ran, and so nothing is known."""
    best, shortest = None, float("inf")
    for way in _WAYS[wish]:
        product = _Product(lt, form, rows, way)
        # As large as the result will be: the pool then has a place for it.
        y = cupy.empty((x.shape[0], form.cols), product.dtype)[:rows]
        bias_at = bias.data.ptr if way > DEFAULT and bias is not None else 0
        pointers = x.data.ptr, weight.data.ptr, bias_at, y.data.ptr
        algorithm = _fastest(product, *pointers)
        if algorithm is None or (
            way == RELU_BIAS and not _keeps_nan(product, algorithm, x, weight, y)
        ):
            continue

        steps = (
            partial(product.launch, algorithm, *pointers),
            partial(_rest, way, y, bias, activation, form.dtype),
        )
        took = _milliseconds(*steps) if len(_WAYS[wish]) > 1 else 0.0
        if took < shortest:
            best, shortest = _Choice(way, algorithm), took
    return best


def _fastest(product: _Product, x: int, weight: int, bias: int, y: int) -> _Algorithm | None:
    """The fastest of the algorithms that cuBLASLt proposes; of equals the one it likes better."""
    best, shortest = None, float("inf")
    for each in product.proposals():
        try:
            took = _milliseconds(partial(product.launch, each, x, weight, bias, y))
        except (LtError, MemoryError):  # not this one, then: the next may need no workspace
            continue
        if took < 0.97 * shortest:
            best, shortest = each, took
    return best


def _milliseconds(*steps: Callable[[], object]) -> float:
    """What the steps take on the device: the mean of 5 after 3, or of 1 after 1 if it is long."""
    _timed(steps, 1)
    once = _timed(steps, 1)
    if once > 1:
        return once
    _timed(steps, 1)
    return _timed(steps, 5)


def _timed(steps: Sequence[Callable[[], object]], times: int) -> float:
    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    start.record()
    for _ in range(times):
        for step in steps:
            step()
    stop.record()
    stop.synchronize()
    return float(cupy.cuda.get_elapsed_time(start, stop)) / times


def _keeps_nan(fused: _Product, algorithm: _Algorithm, x: Array, weight: Array, y: Array) -> bool:
    """Whether relu leaves NaN what is NaN: asked of the very kernel, with NaN for a bias.

    NVIDIA writes max(x, 0), which on the device may drop NaN. All bits set are NaN in every type.
    """
    nan = cupy.full(y.shape[1] * y.itemsize, 0xFF, "uint8").view(y.dtype)
    fused.launch(algorithm, x.data.ptr, weight.data.ptr, nan.data.ptr, y.data.ptr)
    ends = [cupy.asnumpy(y[row]).astype("float32") for row in (0, -1)]
    return all(bool(np.isnan(each).all()) for each in ends)
