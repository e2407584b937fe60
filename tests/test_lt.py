"""Products on CUDA without a GPU: a stand-in for cuBLASLt carries out what it is told, on the host.

The arrays are CuPy's own, laid over memory of the host, and the stand-in reads and writes that
memory as NVIDIA's documents say cuBLASLt would: by columns, with leading dimensions, operations,
epilogue and bias from the descriptors. A wrong number anywhere gives wrong results, reads outside
an array, or needs an alignment that is not there. Everything that CuPy itself would have to launch
on a GPU raises here, so a hidden copy cannot pass.
"""

from __future__ import annotations

import ctypes
import gc
import inspect
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import draw
from nnxp import kernels
from nnxp._arrays import float_dtype
from nnxp.testing import LIMIT, error_bound
from nnxp.testing.parity import compare

cupy = pytest.importorskip("cupy", reason="CuPy is not installed: there are no arrays of CUDA")
from nnxp.kernels.cuda import attention as cuda_attention  # noqa: E402
from nnxp.kernels.cuda import linear as cuda_linear  # noqa: E402
from nnxp.kernels.cuda.lt import (  # noqa: E402
    bindings,
    call,
    descriptors,
    passes,
    plans,
    stacks,
    tuning,
)

TYPES = {number: float_dtype(name) for name, number in bindings.DATA_TYPES.items()}
STREAM = 77


class CublasLtError(Exception):
    def __init__(self, status):
        super().__init__(f"status {status}")
        self.status = status


class Memory:
    """Memory of the host that CuPy takes for memory of a device."""

    def __init__(self, size=1 << 24):
        self.bytes = np.zeros(size + 512, np.uint8)
        self.start = self.end = -(-self.bytes.ctypes.data // 512) * 512
        self.blocks = {}
        self.room = size

    def alloc(self, size):
        size = -(-size // 512) * 512
        if size > self.room:
            raise cupy.cuda.memory.OutOfMemoryError(size, 0, 0)
        self.room -= size
        at, self.end = self.end, self.end + size
        self.blocks[at] = size
        ctypes.memset(at, 0xFF, size)  # NaN in every type: what is read must have been written
        return cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(at, size, self, 0), 0)

    def empty(self, shape, dtype):
        shape = tuple(map(int, shape)) if isinstance(shape, tuple) else (shape,)
        dtype = np.dtype(dtype)
        size = max(1, int(np.prod(shape)) * dtype.itemsize)
        return cupy.ndarray(shape, dtype, memptr=self.alloc(size))

    def put(self, values):
        x = self.empty(values.shape, values.dtype)
        host(x)[...] = values
        return x

    def span(self, at, size):
        """Asserts that the bytes lie within one block."""
        inside = [a for a, n in self.blocks.items() if a <= at and at + size <= a + n]
        assert inside, f"{size} bytes at {at} belong to no array"


def host(x):
    """NumPy's view of an array."""
    if x.size == 0:
        return np.zeros(x.shape, x.dtype)
    low = sum(min(0, (n - 1) * s) for n, s in zip(x.shape, x.strides, strict=True))
    high = sum(max(0, (n - 1) * s) for n, s in zip(x.shape, x.strides, strict=True)) + x.itemsize
    memory = (ctypes.c_char * (high - low)).from_address(x.data.ptr + low)
    return np.ndarray(x.shape, x.dtype, buffer=memory, offset=-low, strides=x.strides)


class Lt:
    """cuBLASLt, on the host. Keeps what it was told in `calls`."""

    cuBLASLtError = CublasLtError

    def __init__(self, memory):
        self.memory, self.things, self.serial, self.calls = memory, {}, 1000, []
        self.clock = 0.0
        self.algorithms = [(1, 0), (2, 4096), (3, 0)]  # number, bytes of workspace
        self.cost = lambda algorithm, epilogue, rows: 0.1
        self.offers = {bindings.DEFAULT, bindings.BIAS, bindings.RELU_BIAS}
        self.relu = np.maximum
        self.fails = {}  # status for an algorithm
        self.check_refuses = False
        self.preferences = []
        self.made = self.pause = 0

    def _new(self, **what):
        self.serial += 1
        self.things[self.serial] = SimpleNamespace(**what)
        return self.serial

    def create(self):
        return self._new(kind="handle")

    def matmul_desc_create(self, compute, scale):
        self.made += 1
        return self._new(kind="product", compute=compute, scale=scale, settings={})

    def matmul_desc_set_attribute(self, product, attribute, at, size):
        sizes = {
            bindings.TRANSPOSE_A: 4,
            bindings.TRANSPOSE_B: 4,
            bindings.EPILOGUE: 4,
            bindings.BIAS_POINTER: 8,
        }
        assert size == sizes[attribute]
        settings = self.things[product].settings
        settings[attribute] = int.from_bytes(ctypes.string_at(at, size), "little")
        assert attribute != bindings.BIAS_POINTER or settings[bindings.EPILOGUE] & bindings.BIAS
        if self.pause:
            time.sleep(self.pause)

    def matrix_layout_create(self, kind, rows, cols, ld):
        assert ld >= rows > 0
        assert cols > 0
        layout = {"type": TYPES[kind], "rows": rows, "cols": cols, "ld": ld}
        return self._new(kind="layout", **layout, batch={})

    def matrix_layout_set_attribute(self, layout, attribute, at, size):
        assert size == {bindings.BATCH_COUNT: 4, bindings.BATCH_STEP: 8}[attribute]
        value = int.from_bytes(ctypes.string_at(at, size), "little", signed=True)
        self.things[layout].batch[attribute] = value

    def matmul_preference_create(self):
        return self._new(kind="preference", settings={})

    def matmul_preference_set_attribute(self, preference, attribute, at, size):
        assert size == (8 if attribute == bindings.MAX_WORKSPACE else 4)
        value = int.from_bytes(ctypes.string_at(at, size), "little")
        self.things[preference].settings[attribute] = value

    def _destroy(self, thing, kind):
        assert self.things.pop(thing).kind == kind

    def matmul_desc_destroy(self, product):
        self._destroy(product, "product")

    def matrix_layout_destroy(self, layout):
        self._destroy(layout, "layout")

    def matmul_preference_destroy(self, preference):
        self._destroy(preference, "preference")

    def matmul_algo_get_heuristic(
        self, handle, product, a, b, c, d, preference, most, results, count
    ):
        assert self.things[handle].kind == "handle"
        assert c == d
        settings, wishes = self.things[product].settings, self.things[preference].settings
        self.preferences.append(wishes)
        if settings[bindings.EPILOGUE] not in self.offers:
            raise CublasLtError(15)
        alignment = wishes[bindings.MIN_ALIGNMENTS[0]]
        found = (descriptors.Algorithm * most).from_address(results)
        fitting = [each for each in self.algorithms if each[1] <= wishes[bindings.MAX_WORKSPACE]]
        for result, (number, workspace) in zip(found, fitting, strict=False):
            result.algorithm[0], result.algorithm[1] = number, alignment
            result.workspace = workspace
        ctypes.c_int32.from_address(count).value = len(fitting)

    def matmul_algo_check(self, handle, product, a, b, c, d, algorithm, result):
        number = ctypes.c_uint64.from_address(algorithm).value
        if self.check_refuses:
            raise CublasLtError(15)
        descriptors.Algorithm.from_address(result).workspace = dict(self.algorithms)[number]

    def _matrices(self, at, layout, alignment):
        """A stack of matrices, of one mostly."""
        assert at % alignment == 0, f"{at} is not on {alignment} bytes"
        size = layout.type.itemsize
        count = layout.batch.get(bindings.BATCH_COUNT, 1)
        step = layout.batch.get(bindings.BATCH_STEP, 0)
        assert count > 0 <= step
        span = ((count - 1) * step + (layout.cols - 1) * layout.ld + layout.rows) * size
        self.memory.span(at, span)
        memory = (ctypes.c_char * span).from_address(at)
        shape = count, layout.rows, layout.cols
        strides = step * size, size, layout.ld * size
        return np.ndarray(shape, layout.type, buffer=memory, strides=strides)

    def matmul(self, *told):
        """D = epilogue(alpha op(A) op(B) + beta C + bias), all by columns."""
        handle, product, alpha, a, a_like, b, b_like, beta, c, c_like, d, d_like = told[:12]
        algorithm, workspace, size, stream = told[12:]
        number, alignment = (ctypes.c_uint64 * 2).from_address(algorithm)
        settings = dict(self.things[product].settings)
        epilogue, turned = settings[bindings.EPILOGUE], settings[bindings.TRANSPOSE_A]
        x_turned = settings[bindings.TRANSPOSE_B]
        likes = [self.things[each] for each in (a_like, b_like, d_like)]
        call = SimpleNamespace(algorithm=number, epilogue=epilogue, turned=turned, size=size)
        call.compute, call.alignment = self.things[product].compute, alignment
        call.rows, call.lds = likes[2].cols, [each.ld for each in likes]
        call.batch = likes[2].batch.get(bindings.BATCH_COUNT, 1)
        call.factors, call.result = likes[0].type.name, likes[2].type.name
        self.calls.append(call)
        if number in self.fails:
            raise CublasLtError(self.fails[number])
        assert self.things[handle].kind == "handle"
        assert (c, c_like) == (d, d_like)
        assert stream == STREAM
        assert size == dict(self.algorithms)[number]
        if size:
            self.memory.span(workspace, size)
        one, zero = (ctypes.c_float.from_address(each).value for each in (alpha, beta))
        A, B, D = map(self._matrices, (a, b, d), likes, [alignment] * 3)
        A, B = A.swapaxes(1, 2) if turned else A, B.swapaxes(1, 2) if x_turned else B
        assert len(A) == len(B) == len(D)
        assert len(D) == 1 or D.strides[0] >= D.shape[2] * D.strides[2], "results overlap"
        assert self.things[product].scale == 0
        y = one * A.astype("f8") @ B.astype("f8")
        assert zero == 0
        if epilogue & bindings.BIAS:
            at = settings[bindings.BIAS_POINTER]
            assert at % alignment == 0
            assert len(D) == 1
            size = D.shape[1] * D.itemsize
            self.memory.span(at, size)
            memory = (ctypes.c_char * size).from_address(at)
            y += np.frombuffer(memory, D.dtype).astype("f8")[:, None]
        if epilogue == bindings.RELU_BIAS:
            y = self.relu(y, 0)
        D[...] = y
        self.clock += self.cost(number, epilogue, D.shape[2])


class Cupy(SimpleNamespace):
    """What the code takes from CuPy, on the host; `copies` counts what is copied."""

    ndarray = cupy.ndarray
    broadcast_to = staticmethod(cupy.broadcast_to)

    def __init__(self, memory, lt):
        self.memory, self.lt, self.copies, self.capturing = memory, lt, [], False
        self.products, self.events, self.passes, self.pass_cost = 0, 0, 0, 0.05
        self.recorded, self.spun = 0, []
        self.cuda = SimpleNamespace(
            alloc=memory.alloc, Event=self._event, get_elapsed_time=lambda a, b: b.at - a.at
        )

    def _event(self):
        assert not self.capturing, "no timing while a graph is captured"
        self.events += 1
        event = SimpleNamespace(synchronize=lambda: None)

        def record():
            event.at = self.lt.clock
            self.recorded += 1

        event.record = record
        return event

    def stream(self):
        return SimpleNamespace(ptr=STREAM, is_capturing=lambda: self.capturing)

    def empty(self, shape, dtype):
        return self.memory.empty(shape, dtype)

    def zeros(self, shape, dtype):
        return self.memory.put(np.zeros(shape, dtype))

    def full(self, shape, value, dtype):
        return self.memory.put(np.full(shape, value, dtype))

    def copyto(self, to, x, casting="same_kind"):
        self.copies.append("copyto")
        host(to)[...] = host(x).astype(to.dtype)

    def ascontiguousarray(self, x):
        self.copies.append("ascontiguousarray")
        return self.memory.put(np.ascontiguousarray(host(x)))

    def asnumpy(self, x):
        assert not self.capturing
        return host(x).copy()

    def matmul(self, x, weight, out):
        self.products += 1
        host(out)[...] = host(x).astype("f8") @ host(weight).astype("f8")

    def over_scores(self, scores, mask, *, causal, scale):
        """The kernel of nnxp.kernels.cuda._rows, on the host: attention to one key each."""
        assert scores.dtype == "float32"
        assert scores.flags.c_contiguous
        assert mask is None or (mask.shape == scores.shape and mask.dtype in ("bool", "f4"))
        keys = scores.shape[-1]
        mask = mask if mask is None else host(mask)
        q, one = (
            host(scores),
            np.broadcast_to(np.eye(keys, dtype="f4"), (*scores.shape[:2], keys, keys)),
        )
        options = {"causal": causal, "scale": scale}
        q[...] = kernels.attention.reference(q.copy(), one, one, mask, **options)
        self.passes += 1

    def bias_act(self, x, bias, activation, out):
        """The kernel of nnxp.kernels.cuda.activations, on the host."""
        assert (x.data.ptr == out.data.ptr) == (x.dtype == out.dtype)
        assert x.dtype in (out.dtype, "float32")
        assert x.shape == out.shape
        assert all(each.shape[1] == 1 or each.strides[1] == each.itemsize for each in (x, out))
        y = host(x).astype("f4")
        if bias is not None:
            assert bias.dtype == out.dtype
            y = y + host(bias).astype("f4")
        host(out)[...] = activation.reference(y)
        self.passes += 1
        self.lt.clock += self.pass_cost
        return out


@pytest.fixture
def lab(monkeypatch):
    """CuPy and cuBLASLt on the host, and nothing remembered from before."""
    memory = Memory()
    lt = Lt(memory)
    made = Cupy(memory, lt)
    stand_ins = {
        "cupy": made,
        "get_device_id": lambda: 0,
        "get_current_stream": made.stream,
        "bias_act": made.bias_act,
        "over_scores": made.over_scores,
        "spin": lambda: made.spun.append(made.recorded),
    }
    ours = bindings, descriptors, passes, tuning, plans, call, stacks, cuda_attention, cuda_linear
    for module in ours:
        for name, stand_in in stand_ins.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, stand_in)
    monkeypatch.setattr(bindings, "library", lambda: (lt, None))
    monkeypatch.setattr(call, "plans", plans.Lately(call.MOST_PLANS))
    monkeypatch.setattr(stacks, "plans", plans.Lately(call.MOST_PLANS))
    choices = plans.Lately(plans.MOST_CHOICES)
    for module in (plans, stacks):
        monkeypatch.setattr(module, "choices", choices)
    monkeypatch.setattr(bindings, "handles", {})
    return made


def whole(shape, dtype, seed):
    """Small whole numbers: their products and sums are exact in every type."""
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(float_dtype(dtype))


def inside(lab, values, above, left, right, below=0):
    """An array laid within a wider one, whose other elements are NaN."""
    rows, cols = values.shape
    wide = lab.memory.empty((rows + above + below, left + cols + right), values.dtype)
    x = wide[above : above + rows, left : left + cols]
    host(x)[...] = values
    return x


def alternate(lab, values, axis):
    """An array that takes every second row or column of another."""
    shape = [n * (1 + (i == axis)) for i, n in enumerate(values.shape)]
    twice = lab.memory.empty(tuple(shape), values.dtype)
    x = twice[:, ::2] if axis else twice[::2]
    host(x)[...] = values
    return x


LAYOUTS = {  # how an array may lie, and whether it must be copied when it is x, or the weight
    "as it comes": (lambda lab, v: lab.memory.put(v), False, False),
    "columns of a wider one": (lambda lab, v: inside(lab, v, 0, 3, 2), False, False),
    "a part of a larger one": (lambda lab, v: inside(lab, v, 2, 4, 4, 1), False, False),
    "every second row": (lambda lab, v: alternate(lab, v, 0), False, False),
    "by columns": (lambda lab, v: lab.memory.put(np.ascontiguousarray(v.T)).T, False, False),
    "by columns, a part": (lambda lab, v: inside(lab, v.T.copy(), 1, 1, 2).T, False, False),
    "every second column": (lambda lab, v: alternate(lab, v, 1), True, True),
    "upside down": (lambda lab, v: lab.memory.put(v[::-1].copy())[::-1], True, True),
    "every row the same": (None, True, False),
}
BIASES = {
    "none": lambda lab, v: None,
    "bias": lambda lab, v: lab.memory.put(v),
    "bias on an odd place": lambda lab, v: inside(lab, v[None], 0, 1, 0)[0],
    "every second": lambda lab, v: alternate(lab, v, 0),
}
ACTIVATIONS = [kernels.identity, kernels.relu, kernels.tanh, kernels.softmax]
DTYPES = ("float32", "float16", "bfloat16")


def right(x, weight, bias, activation):
    """The result by NumPy: rounded after the product, and at the end."""
    y = host(x).astype("f8") @ host(weight).astype("f8")
    if bias is not None:
        y += host(bias).astype("f8")
    return activation.reference(y.astype("f4")).astype(x.dtype)


def check(x, weight, bias, activation, precision=None):
    arrays = [each for each in (x, weight, bias) if each is not None]
    before = [host(each).tobytes() for each in arrays]
    y = kernels.linear(x, weight, bias, activation=activation, precision=precision)
    assert [host(each).tobytes() for each in arrays] == before
    assert y.dtype == x.dtype
    wanted = right(x, weight, bias, activation)
    np.testing.assert_array_equal(host(y).astype("f8"), wanted.astype("f8"))
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 8, 16), (1, 8, 3), (3, 1, 4), (6, 7, 1), (1, 1, 1)], ids=str)
def test_x_may_lie_in_any_way(lab, dtype, layout, shape):
    m, k, n = shape
    lay, copied, _ = LAYOUTS[layout]
    values = whole((m, k), dtype, 0)
    if lay is None:
        row = lab.memory.put(values[:1])
        x = cupy.lib.stride_tricks.as_strided(row, (m, k), (0, row.strides[1]))
    else:
        x = lay(lab, values)
    weight = lab.memory.put(whole((k, n), dtype, 1))
    bias = lab.memory.put(whole((n,), dtype, 2))
    check(x, weight, bias, kernels.relu)
    if min(shape) > 1:
        assert bool(lab.copies) == copied
        assert lab.products == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if LAYOUTS[name][0]])
@pytest.mark.parametrize("shape", [(5, 8, 16), (1, 8, 3), (3, 1, 4), (6, 7, 1), (1, 1, 1)], ids=str)
def test_the_weight_may_lie_in_any_way(lab, dtype, layout, shape):
    m, k, n = shape
    lay, _, copied = LAYOUTS[layout]
    x, weight = lab.memory.put(whole((m, k), dtype, 0)), lay(lab, whole((k, n), dtype, 1))
    check(x, weight, lab.memory.put(whole((n,), dtype, 2)), kernels.identity)
    if min(shape) > 1:
        assert bool(lab.copies) == copied
        assert {bool(call.turned) for call in lab.lt.calls} == {layout.startswith("by columns")}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
@pytest.mark.parametrize("fused_is_faster", [True, False])
def test_bias_and_activation(lab, dtype, bias, activation, fused_is_faster):
    lab.pass_cost = 0.05 if fused_is_faster else -0.05
    x, weight = lab.memory.put(whole((6, 8), dtype, 0)), lab.memory.put(whole((8, 12), dtype, 1))
    there = BIASES[bias](lab, whole((12,), dtype, 2))
    for _ in range(2):
        check(x, weight, there, activation)
    fusable = there is not None and activation in (kernels.identity, kernels.relu)
    left = {bindings.RELU_BIAS, bindings.BIAS} if fusable else set()
    if not fused_is_faster:
        left -= {tuning.EPILOGUES.get(activation)}  # a bias alone may go before a relu of ours
    used = lab.lt.calls[-1].epilogue
    assert used in (left if fusable and fused_is_faster else left | {bindings.DEFAULT})
    assert lab.lt.calls[-1].result == (
        dtype if used != bindings.DEFAULT or not lab.passes else "float32"
    )
    assert bool(lab.copies) == (bias == "every second")
    if bias == "bias on an odd place":
        assert lab.lt.calls[-1].alignment == (x.itemsize if fusable else 256)


def test_one_row_is_never_copied(lab):
    wide, weight, bias = arrays(lab, 3, 8)
    for x in (wide[1][None], wide[1:2], wide[::2][1:]):
        check(x, weight, bias, kernels.relu)
    assert lab.copies == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_leading_axes_are_rows(lab, dtype):
    x = lab.memory.put(whole((4, 3, 8), dtype, 0))
    weight = lab.memory.put(whole((8, 5), dtype, 1))
    y = kernels.matmul(x, weight)
    assert y.shape == (4, 3, 5)
    np.testing.assert_array_equal(host(y), host(x).astype("f4") @ host(weight).astype("f4"))
    assert kernels.linear(x[0, 0], weight).shape == (5,)
    assert kernels.linear(x[:0], weight).shape == (0, 3, 5)
    assert {call.rows for call in lab.lt.calls} == {12, 1}


def test_sums_of_nothing(lab):
    bias = lab.memory.put(whole((3,), "float32", 0))
    for m, k, n in [(4, 0, 3), (0, 5, 3), (4, 5, 0), (0, 0, 0)]:
        x, weight = lab.memory.empty((m, k), "f4"), lab.memory.empty((k, n), "f4")
        y = kernels.linear(x, weight, bias if n else None, activation=kernels.sigmoid)
        assert y.shape == (m, n)
        if n:
            wanted = np.tile(kernels.sigmoid(host(bias)), (m, 1))
            np.testing.assert_array_equal(host(y), wanted)
    assert lab.lt.calls == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
@pytest.mark.parametrize("layout", ["as it comes", "by columns", "every second row"])
def test_a_narrow_head_is_padded_to_rows_of_16_bytes(lab, dtype, activation, layout):
    x = lab.memory.put(whole((1024, 16), dtype, 0))
    weight = LAYOUTS[layout][0](lab, whole((16, 10), dtype, 1))
    bias = lab.memory.put(whole((10,), dtype, 2))
    y = check(x, weight, bias, activation)
    across = 16 if dtype == "float32" else 10  # rounded to 16 bits, it is an array of its own
    assert (y.shape, y.strides) == ((1024, 10), (across * y.itemsize, y.itemsize))
    assert lab.lt.calls[-1].lds == [16, 16, 16]
    deep = kernels.linear(x.reshape(32, 32, 16), weight, bias, activation=activation)
    np.testing.assert_array_equal(host(deep).reshape(1024, 10), host(y))
    host(weight)[...] = -host(weight)  # no one keeps the padded weight
    check(x, weight, bias, activation)


@pytest.mark.parametrize(("m", "k", "n"), [(1023, 16, 10), (1024, 15, 10), (1024, 16, 12)], ids=str)
def test_what_gains_nothing_is_not_padded(lab, m, k, n):
    x, weight = lab.memory.put(whole((m, k), "f4", 0)), lab.memory.put(whole((k, n), "f4", 1))
    assert check(x, weight, None, kernels.identity).flags.c_contiguous
    assert lab.copies == []


def test_float32_is_float32_unless_tf32_is_asked_for(lab):
    def compute(dtype, precision=None):
        x, weight = lab.memory.put(whole((4, 8), dtype, 0)), lab.memory.put(whole((8, 8), dtype, 1))
        check(x, weight, None, kernels.identity, precision=precision)
        return lab.lt.calls[-1].compute

    assert [compute(each) for each in DTYPES] == [68, 68, 68]
    assert [compute(each, "tf32") for each in DTYPES] == [77, 68, 68]
    assert compute("float32") == 68


def arrays(lab, m=4, k=8, n=8, dtype="float32"):
    x, weight = lab.memory.put(whole((m, k), dtype, 0)), lab.memory.put(whole((k, n), dtype, 1))
    return x, weight, lab.memory.put(whole((n,), dtype, 2))


def test_the_fastest_algorithm_is_taken_and_kept(lab):
    lab.lt.cost = lambda algorithm, epilogue, rows: {1: 0.3, 2: 0.1, 3: 0.2}[algorithm]
    x, weight, bias = arrays(lab)
    check(x, weight, bias, kernels.identity)
    last, events = lab.lt.calls[-1], lab.events
    assert (last.algorithm, last.size) == (2, 4096)
    assert events
    lab.lt.calls.clear()
    check(x, weight, bias, kernels.identity)
    assert [(call.algorithm, call.size) for call in lab.lt.calls] == [(2, 4096)]
    assert lab.events == events


def test_of_equals_the_first_proposal_is_taken(lab):
    lab.lt.cost = lambda algorithm, epilogue, rows: 0.1 - 0.001 * algorithm
    check(*arrays(lab)[:2], None, kernels.identity)
    assert lab.lt.calls[-1].algorithm == 1


def test_the_fused_kernel_is_taken_only_where_it_is_faster_than_two(lab):
    lab.lt.cost = lambda algorithm, epilogue, rows: 0.16 if epilogue == bindings.BIAS else 0.1
    x, weight, bias = arrays(lab)
    check(x, weight, bias, kernels.identity)
    assert lab.lt.calls[-1].epilogue == bindings.DEFAULT
    check(x, weight, bias, kernels.relu)
    assert lab.lt.calls[-1].epilogue == bindings.RELU_BIAS


def test_long_products_are_timed_once_and_no_more_rows_than_tell(lab):
    lab.lt.cost = lambda algorithm, epilogue, rows: 5.0
    x, weight, _ = arrays(lab, 10000, 4, 4)
    check(x, weight, None, kernels.identity)
    assert [call.rows for call in lab.lt.calls] == [8192] * 2 * 3 + [10000]


def test_the_device_waits_before_short_products_are_timed(lab):
    """So that they are launched by then: the time between launches is none of theirs."""
    lab.spun.clear()
    check(*arrays(lab)[:2], None, kernels.identity)
    assert len(lab.spun) == 3  # algorithms, of which each is timed once, after three tries
    assert all(recorded % 2 == 0 for recorded in lab.spun)  # before the event that begins it
    lab.spun.clear()
    lab.lt.cost = lambda algorithm, epilogue, rows: 5.0
    check(arrays(lab, 1000)[0], arrays(lab)[1], None, kernels.identity)
    assert not lab.spun


def test_a_ragged_tail_is_not_timed_again(lab):
    weight, bias = arrays(lab)[1:]
    check(arrays(lab, 128)[0], weight, bias, kernels.relu)
    events = lab.events
    for m in (127, 100, 65):
        lab.lt.calls.clear()
        check(arrays(lab, m)[0], weight, bias, kernels.relu)
        assert [call.rows for call in lab.lt.calls] == [m]
    assert lab.events == events
    check(arrays(lab, 64)[0], weight, bias, kernels.relu)
    assert lab.events > events


def test_an_algorithm_that_does_not_fit_other_rows_gives_way_to_a_proposal(lab):
    lab.lt.cost = lambda algorithm, epilogue, rows: 1 / algorithm
    weight = arrays(lab)[1]
    check(arrays(lab, 128)[0], weight, None, kernels.identity)
    assert lab.lt.calls[-1].algorithm == 3
    lab.lt.check_refuses = True
    check(arrays(lab, 127)[0], weight, None, kernels.identity)
    assert lab.lt.calls[-1].algorithm == 1


def test_other_rows_get_the_workspace_that_they_take(lab):
    weight = arrays(lab)[1]
    lab.lt.algorithms = [(2, 4096)]
    check(arrays(lab, 128)[0], weight, None, kernels.identity)
    lab.lt.algorithms = [(2, 8192)]
    check(arrays(lab, 127)[0], weight, None, kernels.identity)
    assert [(call.rows, call.size) for call in lab.lt.calls[-1:]] == [(127, 8192)]
    lab.lt.algorithms = [(2, 64 << 20), (1, 0)]  # more than may be taken
    check(arrays(lab, 126)[0], weight, None, kernels.identity)
    assert lab.lt.calls[-1].algorithm == 1


def test_nothing_is_timed_or_asked_during_capture(lab):
    lab.capturing = True
    lab.lt.cost = lambda algorithm, epilogue, rows: 1 / algorithm
    x, weight, bias = arrays(lab)
    check(x, weight, bias, kernels.relu)
    assert [(call.algorithm, call.epilogue) for call in lab.lt.calls] == [(1, bindings.DEFAULT)]


@pytest.mark.parametrize("capturing", [True, False])
@pytest.mark.parametrize("m", [4, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_alone_is_rounded_where_it_is_made(lab, dtype, m, capturing):
    lab.capturing = capturing
    check(*arrays(lab, m, 16, 10, dtype)[:2], None, kernels.identity)
    assert {call.result for call in lab.lt.calls} == {dtype}


def test_what_was_chosen_before_is_used_during_capture(lab):
    lab.lt.cost = lambda algorithm, epilogue, rows: 1 / algorithm
    x, weight, bias = arrays(lab)
    check(x, weight, bias, kernels.relu)
    lab.capturing = True
    for m in (4, 3):  # the same rows, and another number of them
        check(arrays(lab, m)[0], weight, bias, kernels.relu)
        assert (lab.lt.calls[-1].algorithm, lab.lt.calls[-1].epilogue) == (3, bindings.RELU_BIAS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("drops", [True, False])
def test_an_epilogue_that_drops_nan_is_not_used(lab, dtype, drops):
    if drops:
        lab.lt.relu = np.fmax
    x, weight, bias = arrays(lab, dtype=dtype)
    host(x)[2, 3] = np.nan
    y = check(x, weight, bias, kernels.relu)
    assert np.isnan(host(y)[2].astype("f4")).all()
    assert (lab.lt.calls[-1].epilogue != bindings.RELU_BIAS) == drops


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_relu_of_our_own_may_follow_a_bias_of_cublaslt(lab, dtype):
    """It rounds nothing, so that 16-bit results may be stored before it, in half the bytes."""
    lab.lt.relu, lab.pass_cost = np.fmax, 0.05
    lab.lt.cost = lambda number, epilogue, rows: 0.1 if epilogue == bindings.BIAS else 0.3
    x, weight, bias = arrays(lab, dtype=dtype)
    host(x)[2, 3] = np.nan
    y = check(x, weight, bias, kernels.relu)
    assert np.isnan(host(y)[2].astype("f4")).all()
    assert (lab.lt.calls[-1].epilogue, lab.lt.calls[-1].result) == (bindings.BIAS, dtype)


def test_partial_sums_of_16_bits_are_not_rounded_to_16_bits(lab):
    for dtype in DTYPES:
        check(*arrays(lab, dtype=dtype)[:2], None, kernels.identity)
    schemes = [each.get(bindings.REDUCTION_SCHEMES) for each in lab.lt.preferences]
    assert schemes == [None, 2, 2]
    assert {each[bindings.MAX_WORKSPACE] for each in lab.lt.preferences} == {32 << 20}


def test_plans_are_bounded_and_what_they_hold_is_destroyed(lab, monkeypatch):
    monkeypatch.setattr(call, "plans", plans.Lately(6))
    monkeypatch.setattr(plans, "choices", plans.Lately(4))
    weight, bias = arrays(lab)[1:]
    for m in range(1, 40):
        check(arrays(lab, m)[0], weight, bias, kernels.relu)
    gc.collect()
    assert (len(call.plans), len(plans.choices)) == (6, 3)
    kinds = [each.kind for each in lab.lt.things.values()]
    assert (kinds.count("product"), kinds.count("layout")) == (6, 18)
    assert (kinds.count("handle"), kinds.count("preference")) == (1, 0)
    made = lab.lt.serial
    for m in range(37, 40):  # it is the oldest that went
        check(arrays(lab, m)[0], weight, bias, kernels.relu)
    assert lab.lt.serial == made


def test_what_is_asked_for_again_and_again_is_not_forgotten(lab, monkeypatch):
    monkeypatch.setattr(call, "plans", plans.Lately(6))
    x, weight, bias = arrays(lab, 3)
    check(x, weight, bias, kernels.relu)
    for m in range(4, 40):
        check(arrays(lab, m)[0], weight, bias, kernels.relu)
        made = lab.lt.serial
        check(x, weight, bias, kernels.relu)
        assert lab.lt.serial == made


def test_a_thread_gets_its_own_bias_from_a_plan_that_two_share(lab):
    x, weight, another = arrays(lab)
    check(x, weight, another, kernels.identity)
    assert lab.lt.calls[-1].epilogue == bindings.BIAS
    biases = [lab.memory.put(np.full(8, 100.0 * i, "f4")) for i in range(2)]
    ready, wrong = threading.Barrier(2), []
    lab.lt.pause = 0.02  # between the step that sets the bias and the one that launches

    def work(bias):
        for _ in range(5):
            ready.wait()
            y = kernels.linear(x, weight, bias)
            wrong.append(not np.array_equal(host(y), right(x, weight, bias, kernels.identity)))

    threads = [threading.Thread(target=work, args=(each,)) for each in biases]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert wrong == [False] * 10
    assert len(call.plans) == 1


def test_threads_that_ask_at_once_make_one_plan(lab):
    lab.lt.pause = 0.003
    x, weight, bias = arrays(lab)
    ready, failed = threading.Barrier(4), []

    def work():
        ready.wait()
        try:
            check(x, weight, bias, kernels.relu)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert failed == []
    gc.collect()
    assert [each.kind for each in lab.lt.things.values()].count("product") == 1
    assert len(bindings.handles) == 1
    assert lab.lt.made == 4  # the product alone, with a bias, with relu, and the one that stays


def test_a_full_device_says_so_in_words_that_the_engine_knows(lab):
    x, weight, _ = arrays(lab)
    check(x, weight, None, kernels.identity)
    lab.lt.fails = dict.fromkeys((1, 2, 3), 3)
    with pytest.raises(
        bindings.LtError, match=r"CUBLAS_STATUS_ALLOC_FAILED for \(4, 8\) @ \(8, 8\)"
    ):
        kernels.linear(x, weight)


@pytest.mark.parametrize("room", [0, 512])
def test_no_memory_for_a_result_or_a_workspace_is_cupys_own_error(lab, room):
    lab.lt.algorithms = [(2, 4096)]
    x, weight, _ = arrays(lab)
    lab.memory.room = room
    with pytest.raises(cupy.cuda.memory.OutOfMemoryError):
        kernels.linear(x, weight)


def test_an_algorithm_whose_workspace_does_not_fit_is_passed_over(lab):
    lab.lt.cost = lambda algorithm, epilogue, rows: {1: 0.3, 2: 0.1, 3: 0.2}[algorithm]
    x, weight, _ = arrays(lab)
    lab.memory.room = 4096
    check(x, weight, None, kernels.identity)
    assert lab.lt.calls[-1].algorithm == 3


def test_an_algorithm_that_fails_is_passed_over(lab):
    lab.lt.fails = {1: 13}
    x, weight, bias = arrays(lab)
    check(x, weight, bias, kernels.relu)
    assert lab.lt.calls[-1].algorithm == 2


def test_what_cublaslt_does_not_offer_goes_to_cupy_for_good(lab):
    lab.lt.offers = set()
    x, weight, bias = arrays(lab)
    check(x, weight, bias, kernels.tanh)
    asked = len(lab.lt.preferences)
    check(x, weight, bias, kernels.tanh)
    assert (lab.products, lab.lt.calls) == (2, [])
    assert len(lab.lt.preferences) == asked


def test_an_epilogue_that_cublaslt_does_not_offer_is_a_pass_of_its_own(lab):
    lab.lt.offers = {bindings.DEFAULT}
    check(*arrays(lab), kernels.relu)
    assert (lab.products, lab.lt.calls[-1].epilogue) == (0, bindings.DEFAULT)


def test_more_rows_than_cublaslt_counts_go_in_parts(lab, monkeypatch):
    monkeypatch.setattr(call, "MOST_ELEMENTS", 1000)
    monkeypatch.setattr(call, "PART", 400)
    x, weight, bias = arrays(lab, 130)
    check(x, weight, bias, kernels.relu)
    assert {call.rows for call in lab.lt.calls} == {50, 30}
    monkeypatch.setattr(call, "MOST_ELEMENTS", 1 << 31)
    monkeypatch.setattr(call, "MOST_ROWS", 100)
    lab.lt.calls.clear()
    check(arrays(lab, 131)[0], weight, bias, kernels.relu)
    assert {call.rows for call in lab.lt.calls} == {50, 31}
    monkeypatch.setattr(call, "MOST_ROWS", 1 << 20)
    monkeypatch.setattr(call, "MOST_ELEMENTS", 1100)
    lab.lt.calls.clear()
    for m, copied in ((137, False), (138, True)):  # by columns, of which there are 8
        lab.copies.clear()
        turned = lab.memory.put(whole((8, m), "float32", 0)).T
        weight = lab.memory.put(whole((8, 4), "float32", 1))
        check(turned, weight, None, kernels.identity)
        assert ("ascontiguousarray" in lab.copies) == copied


# stacks of matrices


def stack(lab, shape, dtype, seed, layout="as it comes"):
    """(b, rows, cols) in one of STACKS."""
    return STACKS[layout](lab, whole(shape, dtype, seed))


def by_matrices(lay):
    """How matrices that lie in this way follow each other."""

    def laid(lab, values):
        one = lay(lab, values.reshape(-1, values.shape[2]))
        return one.reshape(values.shape)

    return laid


def between(lab, values):
    """Matrices side by side: as (heads, time, c) lie in (time, heads, c)."""
    return lab.memory.put(np.ascontiguousarray(values.swapaxes(0, 1))).swapaxes(0, 1)


def turned(lab, values):
    return lab.memory.put(np.ascontiguousarray(values.swapaxes(1, 2))).swapaxes(1, 2)


def all_the_same(lab, values):
    return cupy.broadcast_to(lab.memory.put(values[0]), values.shape)


STACKS = {
    "as it comes": lambda lab, v: lab.memory.put(v),
    "columns of wider ones": by_matrices(lambda lab, v: inside(lab, v, 0, 3, 2)),
    "side by side": between,
    "all the same": all_the_same,
    "turned": turned,
    "backwards": lambda lab, v: lab.memory.put(v[::-1].copy())[::-1],
    "every second column": by_matrices(lambda lab, v: alternate(lab, v, 1)),
}
COPIED = {"backwards", "every second column"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", STACKS)
@pytest.mark.parametrize(
    "shape", [(3, 5, 8, 16), (1, 4, 3, 2), (6, 1, 7, 1), (2, 3, 1, 4)], ids=str
)
def test_stacks_may_lie_in_any_way(lab, dtype, layout, shape):
    b, m, k, n = shape
    lies = [("as it comes", layout), (layout, "as it comes"), (layout, layout)]
    for of_weight, of_x in lies:
        x = stack(lab, (b, m, k), dtype, 0, of_x)
        weight = stack(lab, (b, k, n), dtype, 1, of_weight)
        before, lab.copies[:] = [host(each).tobytes() for each in (x, weight)], []
        for _ in range(2):
            y = kernels.matmul(x, weight)
        assert [host(each).tobytes() for each in (x, weight)] == before
        assert y.dtype == x.dtype
        wanted = host(x).astype("f8") @ host(weight).astype("f8")
        np.testing.assert_array_equal(host(y).astype("f8"), wanted.astype(x.dtype).astype("f8"))
        assert lab.lt.calls[-1].batch == b
        if min(shape) > 1:
            assert bool(lab.copies) == (layout in COPIED)
    assert lab.products == 0


def test_axes_before_those_of_the_matrices_are_repeated_where_they_are(lab):
    for left, right in [((2, 3), (2, 3)), ((3,), ()), ((2, 1), (2, 1)), ((1,), (4,))]:
        x, weight = (
            lab.memory.put(whole(shape, "f4", 0)) for shape in [(*left, 5, 8), (*right, 8, 4)]
        )
        y = kernels.matmul(x, weight)
        np.testing.assert_array_equal(host(y), host(x) @ host(weight))
    assert lab.copies == []
    assert lab.products == 0


def test_one_choice_serves_stacks_of_about_as_many(lab):
    lab.lt.cost = lambda algorithm, epilogue, rows: {1: 0.3, 2: 0.1, 3: 0.2}[algorithm]
    for batch in (20, 24, 32):
        x, weight = stack(lab, (batch, 4, 8), "f4", 0), stack(lab, (batch, 8, 4), "f4", 1)
        y = kernels.matmul(x, weight)
        np.testing.assert_array_equal(host(y), host(x) @ host(weight))
        assert (lab.lt.calls[-1].algorithm, lab.lt.calls[-1].batch) == (2, batch)
        events, lab.events = lab.events, 0
        assert bool(events) == (batch == 20)
    lab.capturing = True
    kernels.matmul(x[:3], weight[:3])  # the first that is proposed
    assert lab.lt.calls[-1].algorithm == 1


def test_of_many_rows_in_a_stack_a_part_is_timed(lab):
    x, weight = stack(lab, (40, 1000, 2), "f4", 0), stack(lab, (40, 2, 2), "f4", 1)
    kernels.matmul(x, weight)
    assert {call.batch for call in lab.lt.calls[:-1]} == {9}
    assert lab.lt.calls[-1].batch == 40


def test_more_matrices_than_a_launch_may_have_go_in_parts(lab, monkeypatch):
    monkeypatch.setattr(stacks, "MOST_MATRICES", 4)
    x, weight = stack(lab, (10, 3, 8), "f4", 0), stack(lab, (10, 8, 5), "f4", 1)
    np.testing.assert_array_equal(host(kernels.matmul(x, weight)), host(x) @ host(weight))
    assert {call.batch for call in lab.lt.calls} == {4, 2}


def test_tf32_reaches_stacks_that_ask_for_it(lab):
    q = stack(lab, (6, 4, 8), "f4", 0).reshape(2, 3, 4, 8)
    for precision, compute in ((None, 68), ("tf32", 77), (None, 68)):
        lab.lt.calls.clear()
        kernels.matmul(q, q.swapaxes(2, 3), precision=precision)
        kernels.attention(q, q, q, precision=precision)
        assert {call.compute for call in lab.lt.calls} == {compute}


@pytest.mark.parametrize("offers", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_cublaslt_stacks_are_multiplied_by_cupy_in_float32(lab, dtype, offers, monkeypatch):
    if offers:
        lab.lt.offers = set()
    else:
        monkeypatch.setattr(bindings, "library", lambda: (None, "nvmath-python is not installed"))
    x, weight = stack(lab, (3, 4, 8), dtype, 0), stack(lab, (3, 8, 5), dtype, 1)
    y = kernels.matmul(x, weight)
    assert y.dtype == dtype
    np.testing.assert_array_equal(host(y), (host(x).astype("f8") @ host(weight)).astype(dtype))
    assert (lab.products, lab.lt.calls) == (1, [])


HEADS = [(2, 3, 3), (2, 6, 2), (1, 4, 1), (3, 1, 1)]
MASKS = {
    "none": None,
    "of keys": lambda n, heads: (n, 1, 1, 7),
    "of queries and keys": lambda n, heads: (5, 7),
    "of heads": lambda n, heads: (1, heads, 5, 7),
    "of all": lambda n, heads: (n, heads, 5, 7),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_attention_is_two_products_of_stacks_and_one_pass(lab, dtype, heads, mask):
    (n, heads, groups), shape = heads, MASKS[mask]
    q, k, v = (
        draw(shape, dtype, seed)
        for seed, shape in enumerate([(n, heads, 5, 8), (n, groups, 7, 8), (n, groups, 7, 4)])
    )
    seen = None
    if shape is not None:
        seen = np.random.default_rng(3).random(shape(n, heads)) < 0.6
        if mask == "of heads":
            seen = np.where(seen, 0, -np.inf).astype(dtype)
    put = [None if each is None else lab.memory.put(each) for each in (q, k, v, seen)]
    options = {"causal": mask == "of queries and keys"}
    y = kernels.attention(*put, **options)
    assert lab.passes == 1 + (dtype != "float32")
    last = lab.lt.calls[-1]
    assert (last.batch, last.rows, last.result) == (n * groups, heads // groups * 5, "float32")
    assert lab.products == 0
    value, error = error_bound(kernels.attention, q, k, v, seen, **options)
    assert compare("attention", "", "cpu", host(y), value, error).ratio < LIMIT / 2
    assert host(y).dtype == dtype


def test_keys_and_values_are_read_where_they_lie(lab):
    """As a layer hands them over: heads side by side, in the order of time, of one row."""
    q, k, v = (between(lab, whole((3, n, 8), "f4", n)[:, :, :8])[None] for n in (5, 7, 7))
    y = kernels.attention(q, k, v)
    np.testing.assert_allclose(
        host(y), kernels.attention.reference(*map(host, (q, k, v))), rtol=1e-5, atol=1e-5
    )
    assert lab.copies == []
    assert lab.lt.calls[0].turned


def test_attention_of_more_axes_and_of_fewer(lab):
    for lead in ((), (2, 2)):
        q, k = (lab.memory.put(whole((*lead, 2, n, 8), "f4", n)) for n in (5, 7))
        mask = lab.memory.put(np.random.default_rng(0).random((*lead, 1, 5, 7)) < 0.7)
        y = kernels.attention(q, k, k, mask, scale=0.5)
        wanted = kernels.attention.reference(host(q), host(k), host(k), host(mask), scale=0.5)
        np.testing.assert_allclose(host(y), wanted, rtol=1e-5, atol=1e-5)


def test_what_is_no_attention_of_ours_goes_to_the_reference(lab, monkeypatch):
    given = []
    monkeypatch.setattr(cuda_attention, "unfused", lambda *all, **options: given.append(all[0]))
    monkeypatch.setattr(cuda_linear, "unfused", lambda *all, **options: given.append(all[0]))
    put = lab.memory.put
    q = put(np.ones((2, 3, 4, 8), "f4"))
    double, half = put(np.ones(q.shape)), put(np.ones(q.shape, "f2"))
    whole_numbers = put(np.ones((4, 4), "i8"))
    other = cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(q.data.ptr, q.nbytes, None, 1), 0)
    elsewhere = cupy.ndarray(q.shape, q.dtype, memptr=other)
    cases = [
        (double, double, double),
        (q, half, q),
        (q[:0], q[:0], q[:0]),
        (q, q[:1], q[:1]),
        (q, q[:, :2], q[:, :2]),
        (q, q, q[..., :0]),
        (q, q[:, :, :0], q[:, :, :0]),
        (q, q, q, whole_numbers),
        (q, host(q), q),
        (q, elsewhere, q),
    ]
    for case in cases:
        kernels.attention(*case)
    assert given == [kernels.attention] * len(cases)
    given.clear()
    cases = [(double, double), (q, half), (q, q), (q[:0], q), (q, elsewhere)]
    for case in cases:
        kernels.matmul(*case)
    assert given == [kernels.matmul] * len(cases)
    assert lab.lt.calls == []


@pytest.fixture
def unfused(monkeypatch):
    """What the reference body is given."""
    given = []

    def reference(*arrays, **options):
        given.append((arrays, options))
        return "unfused"

    monkeypatch.setattr(passes, "unfused", reference)
    return given


@pytest.fixture
def without_nvmath(monkeypatch):
    monkeypatch.setattr(bindings, "library", lambda: (None, "nvmath-python is not installed"))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_without_nvmath_cupy_multiplies(lab, activation, without_nvmath):
    check(*arrays(lab), activation, precision="tf32")
    for dtype in DTYPES:
        check(*arrays(lab, dtype=dtype)[:2], None, kernels.identity)
    assert lab.products == 4
    assert lab.lt.calls == []


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_without_nvmath_16_bits_are_widened_before_they_would_be_rounded_twice(
    lab, dtype, unfused, without_nvmath
):
    x, weight, bias = arrays(lab, dtype=dtype)
    assert kernels.linear(x, weight, bias) == "unfused"
    assert kernels.linear(x, weight, activation=kernels.relu) == "unfused"
    one = weight[:, :1]
    assert kernels.matmul(x[:1], one) == "unfused"  # this one CuPy would sum in 16 bits
    assert unfused[0] == ((kernels.linear, x, weight, bias), {"activation": kernels.identity})
    assert lab.products == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("fused_is_faster", [True, False])
@pytest.mark.parametrize("m", [64, 1024])
def test_results_are_rounded_once(lab, dtype, activation, there, fused_is_faster, m):
    lab.pass_cost = 0.05 if fused_is_faster else -0.05
    x, weight, bias = (draw(shape, dtype, i) for i, shape in enumerate([(m, 64), (64, 10), (10,)]))
    given = (x, weight, bias * 5) if there else (x, weight)
    y = kernels.linear(*map(lab.memory.put, given), activation=activation)
    value, error = error_bound(kernels.linear, *given, activation=activation)
    assert compare("linear", "", "cpu", host(y), value, error).ratio < LIMIT / 2


def test_what_has_no_fused_body_is_left_to_the_reference(lab, unfused, monkeypatch):
    x, weight, bias = arrays(lab)
    put = lab.memory.put
    double = [put(np.ones(shape)) for shape in ((4, 8), (8, 8), (8,))]
    cases = [
        double,
        [x, double[1], None],
        [x, put(whole((8, 8), "float16", 0)), None],
        [x, put(whole((7, 8), "float32", 0)), None],
        [x, weight, put(whole((1,), "float32", 0))],
        [x, weight, double[2]],
        [x, host(weight), None],
        [x, weight, host(bias)],
    ]
    for case in cases:
        assert kernels.linear(*case) == "unfused"
    check(x, weight, None, kernels.identity)  # a plan for these shapes is no plan for two devices
    lab.lt.calls.clear()
    other = cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(x.data.ptr, x.nbytes, None, 1), 0)
    assert kernels.linear(cupy.ndarray(x.shape, x.dtype, memptr=other), weight) == "unfused"
    for module in (call, plans):
        monkeypatch.setattr(module, "get_device_id", lambda: 1)
    assert kernels.linear(x, weight) == "unfused"
    assert len(unfused) == len(cases) + 2
    assert lab.lt.calls == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("there", [True, False])
def test_a_users_own_activation_is_called_on_the_product(lab, dtype, there, monkeypatch):
    monkeypatch.setattr(kernels._dispatch, "KERNELS", dict(kernels.KERNELS))

    @kernels.kernel
    def doubled(y, *, out=None):
        raise NotImplementedError

    @doubled.on("cupy")
    def doubled_on_the_host(y, *, out=None):
        assert out is y
        assert y.dtype == "float32"
        host(y)[...] *= 2
        return y

    x, weight, bias = arrays(lab, dtype=dtype)
    bias = bias if there else None
    y = kernels.linear(x, weight, bias, activation=doubled)
    assert y.dtype == dtype
    assert len(lab.copies) == (0 if dtype == "float32" else 1 + there)  # conversions
    np.testing.assert_array_equal(host(y), 2 * right(x, weight, bias, kernels.identity))


def test_an_activation_with_products_of_its_own_is_timed_too(lab, monkeypatch):
    """While one plan is made, another is asked for, by the same thread."""
    monkeypatch.setattr(kernels._dispatch, "KERNELS", dict(kernels.KERNELS))
    x, weight, bias = arrays(lab)

    @kernels.kernel
    def mixed(y, *, out=None):
        raise NotImplementedError

    @mixed.on("cupy")
    def mixed_by_a_product(y, *, out=None):
        return kernels.matmul(y, weight)

    answers = []
    asking = threading.Thread(
        target=lambda: answers.append(kernels.linear(x, weight, bias, activation=mixed)),
        daemon=True,  # it may wait for itself, forever
    )
    asking.start()
    asking.join(20)
    assert answers, "the thread waits for itself"
    y = right(x, weight, bias, kernels.identity).astype("f8") @ host(weight).astype("f8")
    np.testing.assert_array_equal(host(answers[0]), y)


def test_fused_bodies_have_the_signatures_of_the_references():
    for kernel, fused in [
        (kernels.linear, cuda_linear.linear_lt),
        (kernels.matmul, cuda_linear.matmul_lt),
        (kernels.attention, cuda_attention.attention_lt),
    ]:
        assert inspect.signature(fused) == inspect.signature(kernel.reference)


def test_why_not_says_what_is_missing(monkeypatch):
    ask = bindings.library.__wrapped__
    monkeypatch.setattr(bindings.importlib.util, "find_spec", lambda name: None)
    library, why = ask()
    assert library is None
    assert why == "nvmath-python is not installed"
    monkeypatch.setattr(bindings, "library", lambda: (None, why))
    assert bindings.why_not() == why


def test_a_library_that_does_not_load_is_told_of(monkeypatch):
    pytest.importorskip("nvmath", reason="nvmath-python is not installed")
    from nvmath.bindings import cublasLt

    def broken():
        raise OSError("libcublasLt.so.13:\n cannot open shared object file")

    monkeypatch.setattr(cublasLt, "get_version", broken)
    library, why = bindings.library.__wrapped__()
    assert library is None
    assert why.startswith(
        "cuBLASLt cannot be loaded (OSError: libcublasLt.so.13: cannot open shared object file)"
    )


def test_the_numbers_are_those_of_nvidias_bindings():
    pytest.importorskip("nvmath", reason="nvmath-python is not installed")
    from nvmath import CudaDataType
    from nvmath.bindings import cublas, cublasLt

    names = {"float32": "CUDA_R_32F", "float16": "CUDA_R_16F", "bfloat16": "CUDA_R_16BF"}
    assert {name: CudaDataType[names[name]] for name in names} == bindings.DATA_TYPES
    assert bindings.COMPUTE_FLOAT32 == cublas.ComputeType.COMPUTE_32F
    assert bindings.COMPUTE_TF32 == cublas.ComputeType.COMPUTE_32F_FAST_TF32
    attribute = cublasLt.MatmulDescAttribute
    assert bindings.TRANSPOSE_A == attribute.TRANSA
    assert bindings.TRANSPOSE_B == attribute.TRANSB
    assert bindings.EPILOGUE == attribute.EPILOGUE
    assert bindings.BIAS_POINTER == attribute.BIAS_POINTER
    layout = cublasLt.MatrixLayoutAttribute
    assert bindings.BATCH_COUNT == layout.BATCH_COUNT
    assert bindings.BATCH_STEP == layout.STRIDED_BATCH_OFFSET
    wish = cublasLt.MatmulPreferenceAttribute
    assert bindings.MAX_WORKSPACE == wish.MAX_WORKSPACE_BYTES
    assert bindings.REDUCTION_SCHEMES == wish.REDUCTION_SCHEME_MASK
    assert tuple(wish[f"MIN_ALIGNMENT_{each}_BYTES"] for each in "ABCD") == bindings.MIN_ALIGNMENTS
    assert bindings.REDUCE_IN_COMPUTE_TYPE == cublasLt.ReductionScheme.COMPUTE_TYPE
    epilogue = cublasLt.Epilogue
    assert (bindings.DEFAULT, bindings.BIAS, bindings.RELU_BIAS) == (
        epilogue.DEFAULT,
        epilogue.BIAS,
        epilogue.RELU_BIAS,
    )
    assert {
        value: name for name, value in cublas.Status.__members__.items() if value
    } == bindings.STATUS
    assert (cublas.Operation.N, cublas.Operation.T) == (False, True)
    theirs = np.dtype(cublasLt.matmul_heuristic_result_dtype)
    ours = descriptors.Algorithm
    assert theirs.itemsize == ctypes.sizeof(ours)
    assert [theirs.fields[name][1] for name in ("algo", "workspace_size", "state")] == [
        each.offset for each in (ours.algorithm, ours.workspace, ours.state)
    ]


@pytest.mark.parametrize(
    "name", [name for name in vars(Lt) if not name.startswith("_") and name != "cuBLASLtError"]
)
def test_the_stand_in_takes_what_the_bindings_take(name):
    pytest.importorskip("nvmath", reason="nvmath-python is not installed")
    from nvmath.bindings import cublasLt

    declared = getattr(cublasLt, name).__doc__.partition("(")[2].partition(")")[0]
    count = len(declared.split(",")) if declared else 0
    kinds = [each.kind for each in inspect.signature(getattr(Lt, name)).parameters.values()]
    many = inspect.Parameter.VAR_POSITIONAL
    assert len(kinds) - 1 == count or (many in kinds and count == 16)
    assert hasattr(cublasLt, "cuBLASLtError")
