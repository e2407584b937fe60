"""The fused CUDA bodies, without a GPU: they compile, and compute what they should on the host.

The CUDA sources are compiled twice. Once for GPUs, by the compiler that CuPy uses, to see that they
compile and keep to registers. And once for the host, by g++ with cuda_on_host.h, which runs the
same kernels thread by thread: CuPy arrays are made on host memory, and the fused bodies launch
there what they would launch on a GPU. What stays for the hardware is that the GPU does as it is
told, and how fast.
"""

from __future__ import annotations

import ctypes
import hashlib
import inspect
import io
import mmap
import os
import re
import shutil
import subprocess
import sys
from functools import cache, partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from nnxp import kernels
from nnxp._arrays import float_dtype, xp_of
from nnxp.testing import LIMIT, error_bound
from oracles import ORACLES, Draw, two_u

cupy = pytest.importorskip("cupy", reason="CuPy is not installed: it launches the CUDA kernels")

from nnxp.kernels._windows import padded as with_zeros  # noqa: E402
from nnxp.kernels._windows import patches, windows  # noqa: E402
from nnxp.kernels.cuda import _compiled, cudnn  # noqa: E402  (only where there is CuPy)
from nnxp.kernels.cuda._compiled import OPTIONS, TYPES, cpp_name, source  # noqa: E402
from nnxp.kernels.cuda._rows import over_rows, over_scores  # noqa: E402
from nnxp.kernels.cuda._windows import Seen, laid_out  # noqa: E402
from nnxp.kernels.cuda.activations import bias_act  # noqa: E402
from nnxp.kernels.cuda.lt import tuning  # noqa: E402
from nnxp.program.fused import fused  # noqa: E402
from nnxp.program.program import trace  # noqa: E402

SOURCES = "activations.cu", "rows.cu", "spin.cu", "windows.cu"
SOFTMAXES = "softmax", "softmin", "log_softmax"
NORMS = "layer_norm", "rms_norm"
ELEMENTWISE = sorted(set(kernels.ACTIVATIONS) - set(SOFTMAXES))
POOLS = "max_pool", "average_pool"
BY_CHANNEL = "identity", "relu", "hard_swish"  # the others are compiled with activations.cu

FUSED = [name for name, each in kernels.KERNELS.items() if "cupy" in each._fused]
OURS = [*ELEMENTWISE, *SOFTMAXES, *NORMS]

every_type = pytest.mark.parametrize("dtype", TYPES)

# Of x, and of what is computed from it: the same, or rounded from float32.
PAIRS = [*zip(TYPES, TYPES, strict=True), ("float32", "float16"), ("float32", "bfloat16")]
every_pair = pytest.mark.parametrize(("wide", "dtype"), PAIRS)


# CuPy arrays on host memory


def memory(size, shift=0):
    """Bytes from 16 bytes' boundary plus `shift` on, all 0xff: in every type that is NaN.

    Right behind them is memory that ends the process of who reads it, kernel or test.
    """
    room = -(-(size + 80) // mmap.PAGESIZE) * mmap.PAGESIZE
    raw = np.frombuffer(mmap.mmap(-1, room + mmap.PAGESIZE), "uint8")
    ctypes.CDLL(None).mprotect(ctypes.c_void_p(raw.ctypes.data + room), mmap.PAGESIZE, 0)
    raw = raw[:room]
    raw[:] = 255
    start = room - -(-(size + shift) // 16) * 16 + shift
    return raw[start : start + size]


def fences(part):
    """What lies before and behind some memory."""
    room = -(-(part.nbytes + 80) // mmap.PAGESIZE) * mmap.PAGESIZE
    start = part.ctypes.data - part.base.ctypes.data
    return np.concatenate([part.base[:start], part.base[start + part.nbytes : room]])


def pointer(address, size, owner=None):
    return cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(address, size, owner, 0), 0)


class Place:
    """Host memory for a matrix: rows `width` apart, of which cols are used, between fences."""

    def __init__(self, rows, cols, dtype, width=None, shift=0):
        width = width or cols
        kind = np.dtype(dtype) if dtype == "bool" else float_dtype(dtype)
        self.bytes = memory(rows * width * kind.itemsize, shift * kind.itemsize)
        self.host = self.bytes.view(kind).reshape(rows, width)[:, :cols]
        self.gaps = self.bytes.view(kind).reshape(rows, width)[:, cols:]
        self.device = cupy.ndarray(
            self.host.shape,
            kind,
            pointer(self.bytes.ctypes.data, self.bytes.nbytes, self.bytes),
            strides=self.host.strides,
        )

    def filled(self, values):
        self.host[...] = values
        return self

    def untouched_around(self):
        outside = [self.gaps.tobytes(), fences(self.bytes).tobytes()]
        return all(set(each) <= {255} for each in outside)


def on_device(host):
    """A CuPy array with the values of a NumPy array, in host memory."""
    flat = Place(1, host.size, host.dtype.name).filled(host.reshape(1, -1))
    return flat.device.reshape(host.shape)


def on_host(x):
    """A copy of a CuPy array that has no gaps."""
    raw = (ctypes.c_uint8 * x.nbytes).from_address(x.data.ptr)
    return np.frombuffer(raw, x.dtype).reshape(x.shape).copy()


@pytest.fixture
def host_allocator(monkeypatch):
    """CuPy takes its memory from the host."""
    before = cupy.cuda.get_allocator()
    taken = []

    def allocate(size):
        taken.append(memory(size))
        return pointer(taken[-1].ctypes.data, size, taken[-1])

    cupy.cuda.set_allocator(allocate)
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: 0)
    yield taken
    cupy.cuda.set_allocator(before)
    for each in taken:
        assert set(fences(each).tolist()) == {255}, "something was written outside of a result"


# What Python can ask for


class Launches(list):
    """Records launches as (file, name, grid, block, args) instead of making them."""

    def kernel(self, file, *instance):
        name = cpp_name(*instance)
        return lambda grid, block, args: self.append((file, name, grid, block, args))


@pytest.fixture
def launches(monkeypatch, host_allocator):
    made = Launches()
    monkeypatch.setattr(_compiled, "kernel", made.kernel)
    return made


def nowhere(rows, cols, dtype, shift=0, width=None):
    """A CuPy array on no memory at all: good for being launched with."""
    kind = float_dtype(dtype)
    width = width or cols
    return cupy.ndarray(
        (rows, cols),
        kind,
        pointer((1 << 40) + shift * kind.itemsize, 1 << 50),
        strides=(width * kind.itemsize, kind.itemsize),
    )


@pytest.fixture(autouse=True)
def our_own_kernels():
    with cudnn.unused():
        yield


@cache
def instances():
    """Every instance of a template that Python can ask for, by source: what it asks is recorded."""
    asked = Launches()
    somewhere = partial(pointer, 1 << 40)
    with (
        pytest.MonkeyPatch.context() as patch,
        cupy.cuda.using_allocator(somewhere),
        cudnn.unused(),
    ):
        patch.setattr(_compiled, "kernel", asked.kernel)
        patch.setattr(cupy.cuda.runtime, "getDevice", lambda: 0)
        for (wide, dtype), shift in product(PAIRS, (0, 1)):
            x, y = (nowhere(8, 4096, each, shift) for each in (wide, dtype))
            for each in map(kernels.ACTIVATIONS.get, ELEMENTWISE):
                bias_act(x, None, each, y)
                bias_act(x, nowhere(1, 4096, dtype)[0], each, y)
            ops = (*SOFTMAXES, *NORMS) if wide == dtype else SOFTMAXES
            for op, cols in product(ops, [*range(1, 1100), 5000]):
                over_rows(op, *(nowhere(8, cols, each, shift) for each in (wide, dtype)))
        for dtype, shift in product(TYPES, (0, 1)):
            x = nowhere(2 * 25, 16, dtype, shift).reshape(2, 5, 5, 16)
            weight = nowhere(9, 16, dtype).reshape(3, 3, 1, 16)
            laid_out(Seen(x, windows("conv", x, (3, 3))), 0, 18, 144)
            for each in BY_CHANNEL:
                kernels.conv(x, weight, groups=16, activation=kernels.ACTIVATIONS[each])
            for each in POOLS:
                kernels.KERNELS[each](x, window=(2, 2))
        for shift, cols in product((0, 1), [*range(1, 1100), 5000]):
            scores = nowhere(8, cols, "float32", shift).reshape(1, 2, 4, cols)
            over_scores(scores, None, causal=False, scale=1.0)
        tuning.spin()
    return {file: sorted({name for f, name, *_ in asked if f == file}) for file in SOURCES}


# For the GPU


def compiled(code, names=(), method="cubin", arch="sm_90"):
    """What NVRTC makes of a source with CuPy's options, and what the assembler says about it."""
    pathfinder = pytest.importorskip("cuda.pathfinder", reason="CuPy brings it since version 14")
    include = pathfinder.find_nvidia_header_directory("cudart")
    if include is None:
        pytest.skip("CUDA's headers are not installed: pip install nvidia-cuda-runtime")
    try:
        program = cupy.cuda.compiler._NVRTCProgram(
            code, "a.cu", name_expressions=names, method=method
        )
    except RuntimeError as error:
        pytest.skip(f"NVRTC is not installed, pip install nvidia-cuda-nvrtc brings it: {error}")
    options = f"-arch={arch}", "-I" + include, "-ftz=true", "--device-as-default-execution-space"
    said = io.StringIO()
    if method == "cubin":
        options += ("--ptxas-options=-v",)
    binary, _ = program.compile((*OPTIONS, *options), said)
    return binary, said.getvalue()


def outside_registers(log):
    """Of every kernel that the assembler speaks of, the bytes on the stack and spilled."""
    found = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", log)
    return [sum(map(int, each)) for each in found]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("file", SOURCES)
def test_every_instance_compiles_and_keeps_to_registers(file, arch):
    names = instances()[file]
    binary, log = compiled(source(file), names, arch=arch)
    assert binary.startswith(b"\x7fELF")
    assert outside_registers(log) == [0] * len(names)


def test_an_array_that_leaves_the_registers_is_seen():
    code = """extern "C" __global__ void at(float* x, int i) {
        float v[64];
        for (int k = 0; k < 64; ++k) v[k] = x[k];
        for (int k = 0; k < 64; ++k) v[(k * i) & 63] += v[k];
        x[0] = v[i];
    }"""
    _, log = compiled(code)
    assert outside_registers(log) == [256]


@pytest.mark.parametrize("file", SOURCES)
def test_packs_move_by_16_bytes_and_only_they(file):
    some = r"relu|softmax|scores|patches|pooled"
    names = [name for name in instances()[file] if re.search(some, name)]
    ptx, _ = compiled(source(file), names, "ptx", "compute_90")
    bodies = ptx.decode().split(".entry ")[1:]
    assert len(bodies) == len(names)
    for body in bodies:
        pack = re.search(r"Li(\d+)E", body[: body.index("(")])  # the first number of a template
        wide = pack is None or pack[1] != "1"  # activate<> has none: it moves packs alone
        assert bool(re.search(r"ld\.global(\.nc)?\.v4", body)) == wide
        assert ("st.global.v4" in body) == wide


# On the host


def built(file, folder):
    """The path of a library with every instance of a source for the host."""
    header = (Path(__file__).parent / "cuda_on_host.h").read_text()
    lines = [f"KERNEL(kernel_{i}, {name})" for i, name in enumerate(instances()[file])]
    code = "\n".join([header, source(file), *lines])
    library = folder / f"{file}-{hashlib.sha256(code.encode()).hexdigest()}.so"
    if not library.exists():
        for outdated in set(folder.glob(f"{file}-*.so")) - {library}:
            outdated.unlink(missing_ok=True)
        # Another worker may be at it, too: so the name is given at the end.
        compile_for_host(code, library.with_suffix(f".{os.getpid()}")).rename(library)
    return library


def built_alone(code, name, folder):
    """A library with one instance of a source for the host, `kernel_0`."""
    header = (Path(__file__).parent / "cuda_on_host.h").read_text()
    code = f"{header}\n{code}\nKERNEL(kernel_0, {name})\n"
    library = folder / f"alone-{hashlib.sha256(code.encode()).hexdigest()}.so"
    if not library.exists():
        compile_for_host(code, library.with_suffix(f".{os.getpid()}")).rename(library)
    return ctypes.CDLL(str(library))


def compile_for_host(code, library):
    command = ["g++", "-std=c++17", "-O1", "-w", "-fno-strict-aliasing", "-shared", "-fPIC"]
    command += ["-x", "c++", "-", "-o", str(library)]
    run = subprocess.run(command, input=code, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[:3000]
    return library


def understands_half():
    """Whether there is a g++, and it has 16-bit floats: since version 12."""
    if shutil.which("g++") is None:
        return False
    code = "_Float16 half; int main() {}"
    command = ["g++", "-x", "c++", "-fsyntax-only", "-"]
    return subprocess.run(command, input=code, text=True, capture_output=True).returncode == 0


@pytest.fixture(scope="session")
def libraries(request):
    if not understands_half():
        pytest.skip("there is no g++ of version 12 or newer to compile the kernels for the host")
    folder = request.config.cache.mkdir("cuda_on_host")
    return {file: ctypes.CDLL(str(built(file, folder))) for file in SOURCES}


def c_argument(value):
    if value is None or isinstance(value, cupy.ndarray):
        return ctypes.c_void_p(value.data.ptr if value is not None else None)
    if isinstance(value, np.ndarray):  # a struct, by value
        return (ctypes.c_char * value.nbytes).from_buffer_copy(value.tobytes())
    return {int: ctypes.c_longlong, np.float32: ctypes.c_float}[type(value)](value)


class HostGpu:
    """Runs what is launched; `backwards`, the last block, warp and lane come first."""

    def __init__(self, libraries, backwards=False, most_blocks=None):
        self.libraries, self.backwards, self.most_blocks = libraries, backwards, most_blocks

    def run(self, file, name):
        return self.libraries[file][f"kernel_{instances()[file].index(name)}"]

    def kernel(self, file, *instance):
        run = self.run(file, cpp_name(*instance))
        run.restype = ctypes.c_char_p

        def launch(grid, block, args):
            x, y, z = (*grid, 1, 1)[:3]
            shape = (ctypes.c_uint32 * 6)(x, min(y, self.most_blocks or y), z, *(*block, 1, 1)[:3])
            values = [c_argument(each) for each in args]
            places = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
            error = run(shape, places, int(self.backwards))
            assert error is None, error.decode()

        return launch


@pytest.fixture(params=[False, True], ids=["forwards", "backwards"])
def gpu(request, libraries, monkeypatch, host_allocator):
    """CuPy arrays live in host memory, and launches run on the host."""
    made = HostGpu(libraries, request.param)
    monkeypatch.setattr(_compiled, "kernel", made.kernel)
    return made


def every_number(dtype):
    """All numbers of a 16-bit type; of float32 one in 40009, and those that are special."""
    if dtype != "float32":
        return np.arange(1 << 16, dtype="uint16").view(float_dtype(dtype))
    points = np.arange(0, 1 << 32, 40009, dtype="uint64").astype("uint32").view("float32")
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 1e-38, -1e-38, -88.8, -104]
    return np.concatenate([points, np.array([*special, *np.linspace(-30, 30, 40001)], "float32")])


def unit(dtype):
    """Half the distance between 1 and the next number."""
    return {"float32": 2**-24, "float16": 2**-11, "bfloat16": 2**-8}[dtype]


def least(dtype):
    """What a result may be off because it is small: halves are rounded, the others flushed to 0."""
    return {"float32": 2**-126, "float16": 2**-25, "bfloat16": 2**-126}[dtype]


# By how many units of float32 an activation may be off, relative to y: 5.6 are the most measured,
# and as many more as the rounded argument of an exponential makes it.
UNITS = 6
TAILS = {"gelu": lambda x: x**2, "gelu_tanh": lambda x: 3 * np.abs(two_u(x))}


@every_type
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_activations_are_right_for_every_kind_of_number(name, dtype, gpu):
    activation, x = kernels.ACTIVATIONS[name], every_number(dtype)
    with np.errstate(all="ignore"):  # among the numbers are all that overflow, and NaN that signal
        wide = x.astype("float64")
        truth = activation.reference(wide)
        y = on_host(activation(on_device(x))).astype("float64")
        stored = truth.astype(x.dtype).astype("float64")
        off = np.abs(y - truth)
        units = UNITS + TAILS.get(name, np.zeros_like)(np.minimum(wide, 0))
        allowed = (
            unit("float32") * units * np.abs(truth)
            + (dtype != "float32") * unit(dtype) * np.abs(truth)
            + 2 * least(dtype) * np.maximum(1, np.abs(wide))
        )
    np.testing.assert_array_equal(np.isnan(y), np.isnan(truth))
    right = (off <= allowed) | np.isnan(truth) | (y == stored)  # both infinite
    assert right.all(), (wide[~right][:5], y[~right][:5], truth[~right][:5])


def near(y, function, *arrays, dtype):
    """y is function(*arrays), computed in float32 within the bound, and rounded once."""
    value, error = error_bound(function, *(each.astype("float32") for each in arrays))
    allowed = LIMIT * error + 1.01 * unit(dtype) * np.abs(value) + least(dtype)
    off = np.abs(y.astype("float64") - value)
    assert (off <= allowed).all(), f"{np.nanmax(off / allowed)} of what is allowed"


def drawn(shape, dtype, seed=0):
    return (3 * np.random.default_rng(seed).normal(size=shape)).astype(float_dtype(dtype))


# rows, cols, width, shift of x and shift of out: packs, tails, gaps, a start off the 16 bytes
MATRICES = [
    (1, 1, 1, 0, 0),
    (3, 16, 16, 0, 0),
    (37, 10, 16, 0, 0),
    (37, 24, 40, 0, 0),
    (300, 8, 8, 0, 0),
    (9, 100, 100, 0, 0),
    (9, 104, 104, 1, 0),
    (9, 104, 104, 0, 1),
    (9, 104, 107, 0, 0),
    (2, 5000, 5000, 0, 0),
]


@every_pair
@pytest.mark.parametrize(("rows", "cols", "width", "shift", "out_shift"), MATRICES)
@pytest.mark.parametrize("name", ["identity", "sigmoid", *SOFTMAXES])
def test_bias_and_activation_in_one_pass(
    name, rows, cols, width, shift, out_shift, wide, dtype, gpu
):
    activation = kernels.ACTIVATIONS[name]
    values, bias = drawn((rows, cols), wide), drawn(cols, dtype, 1)
    x = Place(rows, cols, wide, width, shift).filled(values)
    out = Place(rows, cols, dtype, None, out_shift)
    assert bias_act(x.device, on_device(bias), activation, out.device) is out.device
    near(out.host, lambda x, b: activation(x + b), values, bias, dtype=dtype)
    np.testing.assert_array_equal(x.host, values)
    last = x if wide == dtype else Place(rows, cols, dtype, width, out_shift)
    assert bias_act(x.device, None, activation, last.device) is last.device
    near(last.host, activation, values, dtype=dtype)
    assert x.untouched_around()
    assert out.untouched_around()
    assert last.untouched_around()


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_float32_is_rounded_to_16_bits_once_and_with_nothing_lost_before(name, dtype, gpu):
    activation, x = kernels.ACTIVATIONS[name], every_number("float32")[None]
    exact, once = Place(*x.shape, "float32"), Place(*x.shape, dtype)
    for bias in (None, drawn(x.size, dtype)):
        given = on_device(x)
        bias_act(given, bias if bias is None else on_device(bias), activation, once.device)
        wider = bias if bias is None else on_device(bias.astype("float32"))
        bias_act(given, wider, activation, exact.device)
        with np.errstate(over="ignore"):
            wanted = exact.host.astype(once.host.dtype).astype("float32")
        np.testing.assert_array_equal(once.host.astype("float32"), wanted)


def test_a_grid_shorter_than_the_rows_goes_on_until_all_are_done(gpu):
    gpu.most_blocks = 2
    values, bias = drawn((5000, 20), "float32"), drawn(20, "float32", 1)
    x = Place(5000, 20, "float32").filled(values)
    bias_act(x.device, on_device(bias), kernels.identity, x.device)
    np.testing.assert_array_equal(x.host, values + bias)


@pytest.mark.skipif(os.name != "posix" or sys.maxsize < 1 << 40, reason="needs sparse memory")
@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
def test_rows_may_lie_further_apart_than_32_bits_can_say(name, gpu):
    apart = (1 << 31) + 8
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE: 9 GB of addresses
    raw = np.frombuffer(mmap.mmap(-1, 5 * apart, flags=flags), "float16")
    strides = 2 * apart, 2
    x = cupy.ndarray((3, 16), "float16", pointer(raw.ctypes.data, raw.nbytes, raw), strides=strides)
    host = np.lib.stride_tricks.as_strided(raw, (3, 16), strides)
    values, bias = drawn((3, 16), "float16"), drawn(16, "float16", 1)
    host[...] = values
    activation = kernels.ACTIVATIONS[name]
    bias_act(x, on_device(bias), activation, x)
    near(host, lambda x, b: activation(x + b), values, bias, dtype="float16")


COLUMNS = (
    1,
    7,
    8,
    10,
    16,
    31,
    32,
    33,
    64,
    100,
    128,
    256,
    500,
    512,
    513,
    1000,
    1024,
    1032,
    3001,
    20000,
)


@every_type
@pytest.mark.parametrize("cols", COLUMNS)
@pytest.mark.parametrize("name", [*SOFTMAXES, *NORMS])
def test_rows_of_every_length(name, cols, dtype, gpu):
    kernel, rows = kernels.KERNELS[name], 21 if cols < 2000 else 2
    x = drawn((rows, cols), dtype)
    y = kernel(on_device(x))
    assert y.dtype == x.dtype
    near(on_host(y), kernel, x, dtype=dtype)
    if name in NORMS:
        more = [drawn(cols, dtype, 1), drawn(cols, dtype, 2)][: 1 + (name == "layer_norm")]
        y = kernel(on_device(x), *map(on_device, more), eps=0.5)
        near(on_host(y), lambda *arrays: kernel(*arrays, eps=0.5), x, *more, dtype=dtype)


SPECIAL = {
    "nan": [(3, np.nan)],
    "infinity": [(3, np.inf)],
    "one masked": [(3, -np.inf)],
    "all masked": [(slice(None), -np.inf)],
    "both infinities": [(3, np.inf), (5, -np.inf)],
    "huge": [(3, 3e38), (5, -3e38)],
    "squares overflow": [(3, 1e25), (5, -1e20)],
    "constant": [(slice(None), 0.5)],
    "nothing": [(slice(None), 0.0)],
}


@pytest.mark.parametrize("cols", [9, 64, 400, 1000, 5000])
@pytest.mark.parametrize("case", SPECIAL)
@pytest.mark.parametrize("name", [*SOFTMAXES, *NORMS])
def test_nan_and_infinity_in_a_row_are_what_they_are_on_numpy(name, case, cols, gpu):
    x = drawn((3, cols), "float32")
    for where, value in SPECIAL[case]:
        x[1, where] = value
    kernel = kernels.KERNELS[name]
    options = {"eps": 0.0} if name in NORMS else {}
    with np.errstate(all="ignore"):
        expected = kernel(x, **options)
    np.testing.assert_allclose(
        on_host(kernel(on_device(x), **options)), expected, rtol=2e-5, atol=1e-6
    )


# No thread there looks at what another has written, in whichever order they run
forwards = pytest.mark.parametrize("gpu", [False], ids=["forwards"], indirect=True)

# rows, space, channels: packs, and what is too odd for them; then options
CONVOLUTIONS = [
    ((2, 6, 5, 8), (3, 3), {"dilation": 2, "padding": (0, 1)}),
    ((3, 7, 6, 3), (3, 2), {"stride": (2, 1), "padding": ((1, 2), (0, 1))}),
    ((2, 9, 8), (3,), {"stride": 2, "padding": "same", "dilation": 2}),
    (
        (1, 4, 5, 3, 16),
        (2, 3, 2),
        {"stride": (1, 2, 1), "dilation": (2, 1, 1), "padding": (1, 0, 1)},
    ),
    ((1, 5, 3, 2, 3), (2, 2, 1), {}),
    ((2, 5, 5, 8), (1, 1), {"stride": 2}),
    ((2, 1, 1, 8), (3, 3), {"padding": 1}),
]
CONVOLUTION_IDS = [
    *("packs", "odd", "one axis", "three axes", "three odd axes", "one element", "mostly padding")
]
every_convolution = pytest.mark.parametrize(
    ("shape", "window", "options"), CONVOLUTIONS, ids=CONVOLUTION_IDS
)


def lain(x, way):
    """A CuPy array with these values, that lies in memory in this way."""
    if way == "channels first":
        return on_device(np.ascontiguousarray(np.moveaxis(x, -1, 1))).transpose(
            0, *range(2, x.ndim), 1
        )
    if way == "turned":
        return lain(np.ascontiguousarray(x[:, ::-1]), "dense")[:, ::-1]
    lines = x.reshape(-1, x.shape[-1])
    width = x.shape[-1] + (16 if way == "gaps" else 0)
    place = Place(*lines.shape, x.dtype.name, width, shift=1 if way == "askew" else 0)
    steps = [width * x.itemsize * int(np.prod(x.shape[i + 1 : -1])) for i in range(x.ndim - 1)]
    place.filled(lines)
    base = pointer(place.bytes.ctypes.data, place.bytes.nbytes, place.bytes)
    return cupy.ndarray(x.shape, x.dtype, base, strides=(*steps, x.itemsize))


WAYS = "dense", "gaps", "askew", "channels first", "turned"
every_way = pytest.mark.parametrize("way", WAYS)


@every_type
@every_way
@every_convolution
def test_patches_are_what_windows_see_and_zeros(shape, window, options, way, dtype, gpu):
    x = drawn(shape, dtype)
    over = windows("conv", x, window, **options)
    wide = with_zeros(x.astype("float32"), over.pads)
    expected = patches(wide, over).reshape(-1, np.prod(window) * shape[-1]).astype(x.dtype)
    seen = Seen(lain(x, way), over)
    count, columns = expected.shape
    for first, lines in ((0, count), (1, count - 1), (count - 1, 1)):
        y = on_host(laid_out(seen, first, lines, columns))
        np.testing.assert_array_equal(y, expected[first : first + lines])
    more = -(-columns // 8) * 8
    y = on_host(laid_out(seen, 0, count, more))
    np.testing.assert_array_equal(y, np.pad(expected, ((0, 0), (0, more - columns))))


@forwards
@every_type
@every_way
@every_convolution
@pytest.mark.parametrize("each", [1, 2])
def test_channels_by_themselves(shape, window, options, way, each, dtype, gpu):
    x, outputs = drawn(shape, dtype), each * shape[-1]
    weight, bias = drawn((*window, 1, outputs), dtype, 1), drawn(outputs, dtype, 2)
    options = options | {"groups": shape[-1]}
    y = kernels.conv(lain(x, way), on_device(weight), **options)
    near(on_host(y), partial(kernels.conv, **options), x, weight, dtype=dtype)
    options["activation"] = kernels.hard_swish
    y = kernels.conv(lain(x, way), on_device(weight), on_device(bias), **options)
    near(on_host(y), partial(kernels.conv, **options), x, weight, bias, dtype=dtype)


POOLING = [
    ((2, 6, 4, 8), (2, 2), {}),
    ((3, 7, 6, 3), (3, 2), {"stride": (2, 1), "padding": ((1, 2), (0, 1))}),
    ((2, 9, 8), (3,), {"stride": 2, "padding": "same"}),
    (
        (1, 5, 5, 4, 16),
        (2, 3, 2),
        {"stride": (1, 2, 3), "dilation": (2, 1, 1), "padding": (1, 0, 1)},
    ),
    ((2, 8, 7, 8), (3, 2), {"stride": 2, "padding": 1, "ceil_mode": True}),
    ((2, 9, 9, 5), (2, 3), {"stride": 1, "dilation": (3, 2), "padding": (2, 1)}),
    ((2, 2, 2, 8), (2, 2), {"stride": 1, "dilation": 4, "padding": 2}),  # some see nothing
]
every_pooling = pytest.mark.parametrize(("shape", "window", "options"), POOLING)


@forwards
@every_type
@every_way
@every_pooling
@pytest.mark.parametrize("name", [*POOLS, "counting padding"])
def test_pools(name, shape, window, options, way, dtype, gpu):
    x = drawn(shape, dtype)
    if name == "counting padding":
        name, options = "average_pool", options | {"count_include_pad": True}
    pool = partial(kernels.KERNELS[name], window=window, **options)
    y = on_host(pool(lain(x, way)))
    if name == "max_pool":
        np.testing.assert_array_equal(y, pool(x))
    else:
        near(y, pool, x, dtype=dtype)


def same_specials(y, expected):
    """NaN and the infinities are at the same places, and there are some."""
    y, expected = (np.where(np.isfinite(each), 0, each).astype("float32") for each in (y, expected))
    np.testing.assert_array_equal(y, expected)
    assert np.isnan(y).any()
    assert np.isinf(y).any()


@every_type
def test_nan_goes_through_pools_and_convolutions_and_infinity_too(dtype, gpu):
    x = drawn((1, 6, 6, 8), dtype)
    x[0, 1, 1], x[0, 3, 4], x[0, 5, 0], x[0, 0, 5] = np.nan, np.inf, -np.inf, -np.inf
    weight = drawn((3, 3, 1, 8), dtype)
    weight[0, 0, 0, 1] = np.inf  # times a zero of the padding it is NaN
    with np.errstate(all="ignore"):
        for name in POOLS:
            for options in ({}, {"stride": 1, "padding": 1}):
                pool = partial(kernels.KERNELS[name], window=(2, 2), **options)
                same_specials(on_host(pool(on_device(x))), pool(x))
        conv = partial(kernels.conv, groups=8, padding=1)
        same_specials(on_host(conv(on_device(x), on_device(weight))), conv(x, weight))


def test_a_grid_shorter_than_the_lines_goes_on_through_windows(gpu):
    gpu.most_blocks = 2
    x = drawn((40, 30, 3, 1), "float32")
    over = windows("conv", x, (2, 2))
    y = on_host(laid_out(Seen(on_device(x), over), 0, 40 * 29 * 2, 4))
    np.testing.assert_array_equal(y, patches(x, over).reshape(y.shape))
    y = kernels.max_pool(on_device(x), window=(1, 2), stride=1)
    np.testing.assert_array_equal(on_host(y), kernels.max_pool(x, window=(1, 2), stride=1))


def weights(scores, mask=None, *, causal=False, scale=1.0):
    """What attention makes of its scores, by the formula of its reference body."""
    xp = xp_of(scores)
    scores = scores * scale
    if mask is not None:
        boolean = mask.dtype == bool
        scores = xp.where(mask, scores, -np.inf) if boolean else scores + mask
    if causal:
        queries, keys = scores.shape[-2:]
        scores = xp.where(np.arange(keys) <= np.arange(queries)[:, None], scores, -np.inf)
    largest = xp.maximum(scores.max(axis=-1, keepdims=True), float(np.finfo("float32").min))
    y = xp.exp(scores - largest)
    return y / xp.maximum(y.sum(axis=-1, keepdims=True), 1)


def weighted(scores, mask, *, shift=0, **options):
    """The same by the kernel, from scores and a mask between fences."""
    *lead, keys = scores.shape
    place = Place(int(np.prod(lead)), keys, "float32", shift=shift)
    place.filled(scores.reshape(-1, keys))
    there = None
    if mask is not None:
        there = cupy.broadcast_to(on_device(mask), scores.shape)
    over_scores(place.device.reshape(scores.shape), there, **options)
    assert place.untouched_around()
    return place.host.reshape(scores.shape)


def near_weights(y, scores, mask, **options):
    given = [scores] if mask is None else [scores, mask]
    value, error = error_bound(lambda *arrays: weights(*arrays, **options), *given)
    off = np.abs(y.astype("float64") - value)
    assert (off <= LIMIT * error + least("float32")).all(), np.nanmax(off / error)


def seen(shape, seed=0):
    """A mask that leaves no key to one query, one to another."""
    mask = np.random.default_rng(seed).random(shape) < 0.6
    mask[..., 0, :] = False
    mask[..., -1, :] = False
    mask[..., -1, -1] = True
    return mask


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("keys", [1, 7, 8, 33, 64, 130, 256, 513, 1000, 1032, 3001])
def test_the_weights_of_attention_for_rows_of_every_length(keys, shift, gpu):
    scores = drawn((2, 3, 5, keys), "float32")
    masks = [
        None,
        seen(scores.shape),
        np.where(seen(scores.shape), drawn(keys, "float32"), -np.inf),
    ]
    for mask, causal in product(masks[: 1 if keys > 2000 else 3], (False, True)):
        mask = mask if mask is None or mask.dtype == bool else mask.astype("float32")
        y = weighted(scores, mask, causal=causal, scale=0.7, shift=shift)
        near_weights(y, scores, mask, causal=causal, scale=0.7)
        assert mask is None or not y[..., 0, :].any()


@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize("shape", list(product((1, 2), (1, 3), (1, 5), (1, 9))), ids=str)
def test_a_mask_of_every_shape_that_broadcasts_to_the_scores(shape, boolean, gpu):
    scores = drawn((2, 3, 5, 9), "float32")
    mask = np.random.default_rng(1).random(shape) < 0.5
    mask = mask if boolean else (drawn(shape, "float32", 2) * 3)
    y = weighted(scores, mask, causal=shape[0] == 2, scale=0.25)
    near_weights(y, scores, mask, causal=shape[0] == 2, scale=0.25)


def test_a_mask_may_lie_in_any_way(gpu):
    scores, mask = drawn((2, 3, 5, 9), "float32"), seen((2, 3, 5, 9))
    turned = on_device(np.ascontiguousarray(mask.transpose(3, 1, 0, 2))).transpose(2, 1, 3, 0)
    there = on_device(scores)
    over_scores(there, turned, causal=False, scale=1.0)
    near_weights(on_host(there), scores, mask)
    there = on_device(scores)
    over_scores(there, on_device(mask)[:, ::-1, :, ::-1], causal=False, scale=1.0)
    near_weights(on_host(there), scores, mask[:, ::-1, :, ::-1])


@pytest.mark.parametrize("queries", [1, 4, 12])
def test_causal_queries_that_are_not_as_many_as_keys(queries, gpu):
    scores = drawn((2, 1, queries, 8), "float32")
    y = weighted(scores, None, causal=True, scale=1.0)
    near_weights(y, scores, None, causal=True)
    np.testing.assert_array_equal(y[:, :, 0, 1:], 0)
    np.testing.assert_array_equal(y[:, :, 0, 0], 1)


@pytest.mark.parametrize("keys", [9, 64, 1032])
@pytest.mark.parametrize("case", SPECIAL)
def test_nan_and_infinity_in_the_scores_are_what_they_are_on_numpy(case, keys, gpu):
    scores = drawn((1, 1, 3, keys), "float32")
    for where, value in SPECIAL[case]:
        scores[..., 1, where] = value
    hides_nan = np.ones((1, 1, 3, keys), bool)
    hides_nan[..., 3:6] = False
    for mask in (None, hides_nan, np.where(hides_nan, 0, -np.inf).astype("float32")):
        with np.errstate(all="ignore"):
            expected = weights(scores, mask)
        y = weighted(scores, mask, causal=False, scale=1.0)
        np.testing.assert_allclose(y, expected, rtol=2e-5, atol=1e-6)


def test_any_number_of_axes_and_an_array_to_fill(gpu):
    x = drawn((2, 3, 4), "float32")
    for kernel in (kernels.tanh, kernels.softmax, kernels.layer_norm):
        y = kernel(on_device(x))
        assert y.shape == x.shape
        near(on_host(y), kernel, x, dtype="float32")
    for name in set(OURS) - {"identity", *NORMS}:  # identity is a copy, CuPy's own
        activation = kernels.ACTIVATIONS[name]
        filled, given = on_device(np.zeros_like(x)), on_device(x)
        assert activation(given, out=filled) is filled
        np.testing.assert_array_equal(on_host(filled), on_host(activation(given)))
        np.testing.assert_array_equal(on_host(given), x)
        assert activation(given, out=given) is given
        np.testing.assert_array_equal(on_host(given), on_host(filled))
    assert kernels.tanh(on_device(np.float32(0.5).reshape(()))).shape == ()
    near(on_host(kernels.softmax(on_device(x[0, 0]))), kernels.softmax, x[0, 0], dtype="float32")


def test_options_reach_the_kernels(gpu):
    x = np.array([-2.0, 3.0], "float32")
    for slope in (0.25, np.float64(0.25), np.float32(0.25)):
        y = kernels.leaky_relu(on_device(x), negative_slope=slope)
        np.testing.assert_array_equal(on_host(y), [-0.5, 3])
    for name in ELEMENTWISE:
        (x,), options = ORACLES[name].draw(Draw(0, 9, 20))
        if options:
            kernel, x = kernels.KERNELS[name], x.astype("float32")
            y = on_host(kernel(on_device(x), **options))
            np.testing.assert_allclose(y, kernel(x, **options), rtol=1e-6)
            assert (y != on_host(kernel(on_device(x)))).any()
    with pytest.raises(TypeError, match="no_such"):
        kernels.hard_tanh(on_device(x), no_such=1.0)
    x = np.array([-2.0, 3.0], "float32")
    y = Place(1, 2, "float32")
    bias_act(on_device(x).reshape(1, 2), None, kernels.leaky_relu, y.device)
    np.testing.assert_allclose(y.host, [[-0.02, 3]], rtol=1e-6)
    bias_act(on_device(x).reshape(1, 2), None, kernels.elu, y.device)
    np.testing.assert_allclose(y.host, [[np.expm1(-2), 3]], rtol=1e-6)


# Formulas: kernels whose text is written from the steps of a program


def number(x, value):
    """A number that leaves the type of x as it is: NumPy makes float32 of bfloat16 times 2.0."""
    return np.array(value, x.dtype) if x.dtype == float_dtype("bfloat16") else value


def clipped(x, low, high):
    """By NumPy's clip, if it has one for the type: for bfloat16 it answers float32."""
    xp = xp_of(x)
    if x.dtype == float_dtype("bfloat16"):
        return xp.minimum(xp.maximum(x, number(x, low)), number(x, high))
    return xp.clip(x, low, high)


def chain(seed):
    """A function of arrays that can be x (rows, cols), y like it, a vector, a column and a mask."""
    binary = "add subtract multiply maximum minimum divide".split()
    unary = "exp tanh square absolute negative sqrt log1p expm1 floor".split()
    activations = [kernels.ACTIVATIONS[name] for name in "silu gelu relu leaky_relu elu".split()]

    def function(*arrays):
        draws, (*floats, mask) = np.random.default_rng(seed), arrays
        xp, made = xp_of(arrays[0]), list(floats)
        y = made[0]
        for _ in range(draws.integers(3, 9)):
            other = [*made, *(number(y, c) for c in (0.75, -2.0))][draws.integers(len(made) + 2)]
            kind = draws.integers(6)
            if kind < 3:
                name = binary[draws.integers(len(binary))]
                left = (y, other) if draws.integers(2) else (other, y)
                y = (
                    left[0] / (abs(left[1]) + number(y, 1.0))
                    if name == "divide"
                    else getattr(xp, name)(*left)
                )
            elif kind == 3:
                name = unary[draws.integers(len(unary))]
                small = clipped(y, -3, 3)
                y = getattr(xp, name)(abs(small) if name in ("sqrt", "log1p") else small)
            elif kind == 4:
                y = activations[draws.integers(len(activations))](y)
            else:
                condition = y > number(y, 0.1) if draws.integers(2) else mask
                y = xp.where(xp.logical_or(condition, y != y), y, other)
            made.append(y)
        return y

    return function


def bracket(x, y, vector, column, mask):
    """What NaN goes through, or not."""
    xp = xp_of(x)
    z = xp.maximum(x, y) + xp.minimum(vector, x) + xp.minimum(clipped(y, -1.0, 2.0), column)
    return xp.where(xp.isnan(z), number(x, 7.0), kernels.threshold(z, threshold=-1.5, value=-2.5))


def straight(x, y, vector, column, mask):
    return xp_of(x).where(mask, x * number(x, 2.0) + vector - y, column - x)


def powers(x, y, vector, column, mask):
    return x ** number(x, 2.0) + abs(y) ** number(x, 0.7) - abs(x) ** vector


def gated(x, y, vector, column, mask):
    return kernels.silu(x) * y


FORMULAS = [straight, bracket, gated, powers, *map(chain, range(12))]


def runs(dtype):
    """The formulas of FORMULAS as programs, and as they were put together."""
    for function in FORMULAS:
        kinds = [(shape, float_dtype(dtype)) for shape in ((6, 8), (6, 8), (8,), (6, 1))]
        program = trace(function, *kinds, ((6, 1), "bool"))
        joined = fused(program)
        assert [step.name for step in joined.steps] == ["elementwise"], str(joined)
        yield program, joined


def given(dtype, rows, cols, seed=0, lay=on_device):
    """Arrays of the host for a formula, and the same on the device."""
    shapes = (rows, cols), (rows, cols), (cols,), (rows, 1)
    arrays = [drawn(shape, dtype, seed + i) for i, shape in enumerate(shapes)]
    arrays[0][rows // 2, cols // 2] = np.nan
    arrays[1][0, 0], arrays[2][-1] = np.inf, np.nan
    arrays.append(np.random.default_rng(seed).random((rows, 1)) < 0.5)
    return arrays, [lay(x) for x in arrays]


def padded(x):
    """An array whose rows do not follow each other; a vector that starts off the 16 bytes."""
    if x.ndim == 1:
        return Place(1, x.size, x.dtype.name, shift=1).filled(x).device.reshape(x.shape)
    return Place(*x.shape, x.dtype.name, x.shape[1] + 8).filled(x).device


LAID = [
    (6, 8, on_device),
    (5, 7, on_device),
    (7, 16, padded),
    (70, 5, padded),  # three blocks of rows
    (300, 8, on_device),
]


class Formulas(HostGpu):
    """Compiles the formulas that are asked for, all at once: `asked` has them."""

    def __init__(self, folder, asked):
        self.asked = sorted(set(asked))
        header = (Path(__file__).parent / "cuda_on_host.h").read_text()
        parts = [header, source("activations.cu")]
        for i, (file, name) in enumerate(self.asked):
            code = file.removeprefix(source("activations.cu"))
            parts.append(f"namespace n{i} {{ {code} }}\nKERNEL(kernel_{i}, n{i}::{name})\n")
        code = "".join(parts)
        library = folder / f"formulas-{hashlib.sha256(code.encode()).hexdigest()}.so"
        if not library.exists():
            compile_for_host(code, library.with_suffix(f".{os.getpid()}")).rename(library)
        self.library, self.launched = ctypes.CDLL(str(library)), 0
        self.backwards, self.most_blocks = False, None

    def run(self, file, name):
        self.launched += 1
        return self.library[f"kernel_{self.asked.index((file, name))}"]


@every_type
def test_formulas_are_what_their_steps_are(dtype, request, libraries, monkeypatch, host_allocator):
    """Random chains and a few of each kind, for arrays that lie in every way."""
    made, asked = list(runs(dtype)), Launches()
    monkeypatch.setattr(cupy, "asarray", on_device)  # of numbers in a formula
    monkeypatch.setattr(_compiled, "kernel", asked.kernel)
    for (_, joined), laid in product(made, LAID):
        joined(*given(dtype, *laid[:2], lay=laid[2])[1])
    assert len(asked) == len(made) * len(LAID)
    gpu = Formulas(request.config.cache.mkdir("cuda_on_host"), [each[:2] for each in asked])
    monkeypatch.setattr(_compiled, "kernel", gpu.kernel)
    finite = 0
    for ((program, joined), (rows, cols, lay)), (gpu.backwards, gpu.most_blocks) in product(
        product(made, LAID), ((False, None), (True, 2))
    ):
        arrays, there = given(dtype, rows, cols, lay=lay)
        y = on_host(joined(*there)).astype("float64")
        wide = [x if x.dtype == bool else x.astype("float32") for x in arrays]
        with np.errstate(all="ignore"):
            plain = program(*wide)
            value, error = error_bound(program, *wide)
            allowed = LIMIT * error + 1.01 * unit(dtype) * np.abs(value) + least(dtype)
            right = np.abs(y - value) <= allowed
            exact = y == plain.astype(arrays[0].dtype).astype(y.dtype)
        np.testing.assert_array_equal(np.isnan(y), np.isnan(plain))
        finite += np.isfinite(allowed).mean()
        assert (right | exact | ~np.isfinite(value)).all()
    assert gpu.launched == 2 * len(asked)
    assert finite > 0.8 * gpu.launched


def channels_last(x):
    """(n, c, ...) as a view of (n, ..., c)."""
    return on_device(np.ascontiguousarray(np.moveaxis(x, 1, -1))).transpose(0, 3, 1, 2)


def by_heads(x):
    """(n, heads, time, c) as a part of (n, time, heads, c + 4)."""
    wide = np.concatenate([x, x[..., :4] * 0 + 99], -1).swapaxes(1, 2)
    return on_device(np.ascontiguousarray(wide)).transpose(0, 2, 1, 3)[..., :-4]


def every_second(x):
    return on_device(np.repeat(x, 2, -1))[..., ::2]


SHAPES = [  # of x and y, of the vector, the column and the mask
    ((2, 3, 4, 8), (3, 1, 1), (4, 1), (2, 1, 1, 8), on_device),
    ((2, 3, 4, 8), (3, 1, 1), (2, 1, 1, 1), (), channels_last),
    ((2, 3, 4, 8), (4, 8), (4, 1), (2, 1, 4, 1), by_heads),
    ((2, 3, 2, 3, 2), (3, 1, 3, 1), (2, 1, 2, 1, 1), (3, 1, 1, 1), on_device),
    ((3, 5, 8), (5, 1), (8,), (3, 1, 1), every_second),
    ((3, 1, 8), (), (1,), (3, 1, 1), on_device),
    ((7,), (1,), (), (7,), on_device),
    ((), (), (), (), on_device),
]


def test_formulas_of_any_number_of_axes_in_any_order(
    request, libraries, monkeypatch, host_allocator
):
    cases, asked = [], Launches()
    for like, vector, column, mask, lay in SHAPES:
        shapes = like, like, vector, column
        program = trace(straight, *((shape, "float32") for shape in shapes), (mask, "bool"))
        arrays = [np.array(drawn(shape, "float32", i)) for i, shape in enumerate(shapes)]
        arrays.append(np.random.default_rng(0).random(mask) < 0.5)
        there = [*map(lay, arrays[:2]), *(on_device(np.array(x)) for x in arrays[2:])]
        cases.append((program, fused(program), arrays, there))
    monkeypatch.setattr(_compiled, "kernel", asked.kernel)
    for _, joined, _, there in cases:
        joined(*there)
    assert len(asked) == len(cases)
    gpu = Formulas(request.config.cache.mkdir("cuda_on_host"), [each[:2] for each in asked])
    monkeypatch.setattr(_compiled, "kernel", gpu.kernel)
    for program, joined, arrays, there in cases:
        y = joined(*there)
        assert np.argsort(y.strides)[::-1].tolist() == np.argsort(there[0].strides)[::-1].tolist()
        dense = np.argsort([-each for each in y.strides], kind="stable").tolist()
        y = on_host(y.transpose(dense)).transpose(np.argsort(dense)) if y.ndim else on_host(y)
        np.testing.assert_array_equal(y, program(*arrays))


@every_type
def test_formulas_read_packs_only_where_they_lie_on_16_bytes(dtype, host_allocator, launches):
    full = 16 // float_dtype(dtype).itemsize
    program = fused(trace(lambda x, y: kernels.silu(x) * y, *[((9, 64), dtype)] * 2))
    x = nowhere(9, 64, dtype)
    for y, packed in [
        (nowhere(9, 64, dtype), True),
        (nowhere(9, 64, dtype, width=64 + full), True),
        (nowhere(9, 64, dtype, shift=full), True),
        (nowhere(9, 64, dtype, width=65), False),
        (nowhere(9, 64, dtype, shift=1), False),
        (nowhere(9, 64, dtype, width=64 + full)[:, ::-1], False),
        (nowhere(64, 9, dtype).T, False),
    ]:
        launches.clear()
        program(x, y)
        [(text, name, *_)] = launches
        assert name == f"formula<{full}>"
        assert "load<V>(a0 + c)" in text
        assert ("load<V>(a1 + c)" in text) == packed
    launches.clear()
    program(x[:, :63], x[:, :63])
    assert launches[0][1] == "formula<1>"


def test_formulas_compile_for_a_gpu_and_keep_to_registers(host_allocator, monkeypatch):
    asked = Launches()
    monkeypatch.setattr(_compiled, "kernel", asked.kernel)
    for _, joined in runs("float16"):
        joined(*given("float16", 6, 8)[1])
    head = source("activations.cu")
    code = head + "".join(
        f"namespace n{i} {{ {each[0].removeprefix(head)} }}\n" for i, each in enumerate(asked)
    )
    binary, log = compiled(code, [f"n{i}::{each[1]}" for i, each in enumerate(asked)])
    assert binary.startswith(b"\x7fELF")
    assert outside_registers(log) == [0] * len(FORMULAS)


BROKEN = {
    "lanes": ("if (threadIdx.x == 3) return; __syncthreads();", b"the lanes of a warp parted"),
    "warps": ("if (threadIdx.x < 32) return; __syncthreads();", b"warps parted at a barrier"),
    "mask": ("__shfl_xor_sync(0xffffu, 1.f, 1);", b"a shuffle's mask leaves out a lane"),
    "mask across": ("__shfl_xor_sync(0x55555555u, 1.f, 1);", b"a shuffle's mask leaves out a lane"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_threads_that_miss_a_barrier_or_a_mask_are_seen(kind, tmp_path, libraries):
    code, complaint = BROKEN[kind]
    header = (Path(__file__).parent / "cuda_on_host.h").read_text()
    code = header + "__global__ void broken() { " + code + " }\nKERNEL(kernel_0, broken)\n"
    library = compile_for_host(code, tmp_path / "broken.so")
    run = ctypes.CDLL(str(library)).kernel_0
    run.restype = ctypes.c_char_p
    assert run((ctypes.c_uint32 * 6)(1, 1, 1, 64, 1, 1), None, 0).startswith(complaint)


# What Python asks for


@pytest.mark.parametrize("name", FUSED)
def test_fused_bodies_have_the_signature_of_their_reference(name):
    """But for what it hands on as `**options`."""

    def plain(body):
        parameters = inspect.signature(body).parameters.values()
        return {(p.name, p.kind, p.default) for p in parameters}

    kernel = kernels.KERNELS[name]
    fused, reference = plain(kernel._fused["cupy"]), plain(kernel.reference)
    hands_on = {p for p in fused if p[1] is inspect.Parameter.VAR_KEYWORD}
    assert fused - hands_on <= reference
    assert hands_on or fused == reference


def test_these_kernels_have_fused_bodies():
    assert sorted(set(OURS) - set(FUSED)) == []


@every_pair
def test_packs_are_asked_for_only_where_every_row_allows_them(wide, dtype, launches):
    full, fits = 16 // float_dtype(dtype).itemsize, wide == "float32"  # 68 of these
    bias, askew = nowhere(1, 64, dtype)[0], nowhere(1, 64, dtype, shift=1)[0]
    for x, out, b, wanted in [
        (nowhere(9, 64, wide), nowhere(9, 64, dtype), bias, full),
        (nowhere(9, 64, wide, width=72), nowhere(9, 64, dtype), bias, full),
        (nowhere(9, 64, wide, width=72), nowhere(9, 64, dtype), None, full),
        (nowhere(9, 64, wide, shift=full), nowhere(9, 64, dtype), bias, full),
        (nowhere(1, 64, wide, width=65), nowhere(1, 64, dtype), bias, full),
        (nowhere(9, 64, wide, width=65), nowhere(9, 64, dtype), bias, 1),
        (nowhere(9, 64, wide), nowhere(9, 64, dtype, width=65), bias, 1),
        (nowhere(9, 64, wide, width=68), nowhere(9, 64, dtype), bias, full if fits else 1),
        (nowhere(9, 60, wide), nowhere(9, 60, dtype), bias[:60], 4 if full == 4 else 1),
        (nowhere(9, 64, wide, shift=1), nowhere(9, 64, dtype), bias, 1),
        (nowhere(9, 64, wide), nowhere(9, 64, dtype, shift=1), bias, 1),
        (nowhere(9, 64, wide), nowhere(9, 64, dtype), askew, 1),
        (nowhere(9, 62, wide, width=64), nowhere(9, 62, dtype, width=64), bias[:62], 1),
    ]:
        for activation in (kernels.relu, kernels.softmax):
            launches.clear()
            bias_act(x, b, activation, out)
            name = launches[0][1]
            assert re.split("[,>] ?", name)[3] == str(wanted), name


@every_type
def test_windows_take_packs_only_where_x_allows_them(dtype, launches):
    full = 16 // float_dtype(dtype).itemsize

    def lines(channels=16, shift=0, width=None):
        flat = nowhere(2 * 30, channels, dtype, shift, width)
        steps = [flat.strides[0] * each for each in (30, 5, 1)]
        return cupy.ndarray((2, 6, 5, channels), flat.dtype, flat.data, (*steps, flat.itemsize))

    for x, wanted in [
        (lines(), full),
        (lines(width=24), full),
        (lines(width=17), 1),
        (lines(shift=full), full),
        (lines(shift=1), 1),
        (lines(channels=12), 4 if full == 4 else 1),
        (lines(channels=7), 1),
        (lines(width=17)[:1, :1, :1], full),  # one line, and nothing behind it
        (lines()[:, ::-1, ::2], full),
        (lines().transpose(0, 3, 1, 2), 1),
        (nowhere(2 * 16, 30, dtype).reshape(2, 16, 6, 5).transpose(0, 2, 3, 1), 1),
    ]:
        assert Seen(x, windows("conv", x, (1, 1))).v == wanted
        launches.clear()
        kernels.max_pool(x, window=(1, 1))
        [(_, name, _, _, _)] = launches
        assert name == cpp_name("pooled", dtype, "pool::maximum", wanted)
    x, weight, bias = lines(), nowhere(9, 16, dtype), nowhere(1, 16, dtype)[0]
    askew = nowhere(9, 16, dtype, shift=1), nowhere(1, 16, dtype, shift=1)[0]
    for given, wanted in (
        ((weight, bias), full),
        ((askew[0], bias), 1),
        ((weight, askew[1]), 1),
        ((nowhere(9, 32, dtype), None), 1),
    ):
        launches.clear()
        outputs = given[0].shape[1]
        kernels.conv(x, given[0].reshape(3, 3, 1, outputs), given[1], groups=16)
        assert launches[-1][1] == cpp_name("by_channel", dtype, "act::identity", wanted)


def test_one_long_row_when_nothing_stands_between_the_rows(launches):
    x = nowhere(1000, 50, "float32")
    bias_act(x, None, kernels.relu, x)
    [(file, name, grid, block, args)] = launches
    assert (file, name) == ("activations.cu", "activate<float, float, act::relu>")
    assert (grid, block) == ((13,), (256,))
    assert args[:2] == (x, x)
    assert args[2:] == (50000, 0.0, 0.0)
    assert [type(each) for each in args[2:]] == [int, np.float32, np.float32]


@every_pair
@pytest.mark.parametrize("shift", [0, 1, 8])
@pytest.mark.parametrize("out_shift", [0, 1, 8])
def test_one_long_row_moves_in_packs_only_if_both_ends_allow_it(
    wide, dtype, shift, out_shift, launches
):
    bias_act(nowhere(9, 24, wide, shift), None, kernels.relu, nowhere(9, 24, dtype, out_shift))
    [(_, name, _, _, args)] = launches
    if 1 in (shift, out_shift):
        assert name == cpp_name("bias_act", wide, dtype, "act::relu", 1)
        assert args[3:5] == (1, 216)
    else:
        assert name == cpp_name("activate", wide, dtype, "act::relu")


@pytest.mark.parametrize(
    ("rows", "cols", "width", "grid", "block"),
    [
        (1000, 50, 50, (1, 63), (64, 4)),
        (1000, 10, 16, (1, 16), (16, 16)),
        (1000, 64, 64, (1, 16), (16, 16)),
        (1000, 4096, 4096, (4, 250), (256, 1)),
        (10_000_000, 4096, 4096, (4, 65535), (256, 1)),
        (3, 1, 1, (1, 1), (1, 256)),
    ],
)
def test_what_a_launch_is_given(rows, cols, width, grid, block, launches):
    x, y = nowhere(rows, cols, "float32", width=width), nowhere(rows, cols, "float32")
    bias = nowhere(1, cols, "float32")[0]
    bias_act(x, bias, kernels.hard_tanh, y)
    [(_, _, made_grid, made_block, args)] = launches
    assert (made_grid, made_block) == (grid, block)
    assert [each.data.ptr for each in args[:3]] == [x.data.ptr, bias.data.ptr, y.data.ptr]
    assert args[3:] == (rows, cols, width, cols, -1.0, 1.0)
    assert [type(each) for each in args[3:]] == [int] * 4 + [np.float32] * 2


@pytest.mark.parametrize(
    ("rows", "cols", "shift", "name", "grid", "block"),
    [
        (1000, 10, 0, "held<float, float, op::softmax, 1, 16, 1>", (125,), (128,)),
        (1000, 32, 0, "held<float, float, op::softmax, 4, 8, 1>", (63,), (128,)),
        (1000, 1000, 0, "held<float, float, op::softmax, 4, 32, 8>", (250,), (128,)),
        (1000, 500, 1, "held<float, float, op::softmax, 1, 32, 16>", (250,), (128,)),
        (1000, 1028, 0, "streamed<float, float, op::softmax, 4>", (1000,), (256,)),
        (70000, 100000, 0, "streamed<float, float, op::softmax, 4>", (70000,), (1024,)),
    ],
)
def test_what_a_launch_over_rows_is_given(rows, cols, shift, name, grid, block, launches):
    x = nowhere(rows, cols, "float32", shift)
    over_rows("softmax", x, x)
    [(file, made_name, made_grid, made_block, args)] = launches
    assert (file, made_name, made_grid, made_block) == ("rows.cu", name, grid, block)
    assert args[1:4] == (None, None, None)
    assert args[5:] == (rows, cols, cols, cols, 0.0)
    assert [type(each) for each in args[5:]] == [int] * 4 + [np.float32]


def test_nothing_is_launched_for_an_array_of_another_device(launches, monkeypatch):
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: 1)
    x = nowhere(3, 4, "float32")
    with pytest.raises(ValueError, match="array device = 0 while current = 1"):
        bias_act(x, None, kernels.relu, x)
    assert not launches


def handed_back(monkeypatch, kernel, body="reference"):
    """What arrives at the reference body of a kernel, or before it is widened for that."""
    arrived = []

    def reference(*arrays, **options):
        arrived.append((arrays, options))
        return "the reference"

    monkeypatch.setattr(kernel, body, reference)
    return arrived


@pytest.mark.parametrize("name", sorted(set(OURS) - {"identity"}))
def test_what_is_not_fused_goes_to_the_reference_body(name, launches, monkeypatch):
    kernel = kernels.KERNELS[name]
    arrived = handed_back(monkeypatch, kernel)
    empty, double = nowhere(0, 4, "float32"), nowhere(3, 4, "float64")
    assert [kernel(each) for each in (empty, double)] == ["the reference"] * 2
    if name in kernels.ACTIVATIONS:
        x, gaps = nowhere(3, 4, "float32"), nowhere(3, 4, "float32", width=8)
        kernel(x, out=gaps)
        kernel(x, out=nowhere(3, 4, "float64"))
        assert arrived[2][1]["out"] is gaps
    else:
        x, gain = nowhere(3, 4, "float32"), nowhere(1, 4, "float64")[0]
        kernel(x, gain, eps=0.5)
        kernel(x, nowhere(1, 1, "float32")[0])
        assert arrived[2] == ((x, gain, None)[: 2 + (name == "layer_norm")], {"eps": 0.5})
    assert len(arrived) == 4
    assert not launches


def test_windows_that_the_kernels_cannot_look_through_go_to_the_reference_body(
    launches, monkeypatch
):
    def some(*shape, dtype="float32"):
        return nowhere(int(np.prod(shape)), 1, dtype).reshape(shape)

    arrived = {
        name: handed_back(monkeypatch, kernels.KERNELS[name], "widened")
        for name in (*POOLS, "conv")
    }
    wrong = [some(3, 4, 4, 2, dtype="float64"), some(0, 4, 4, 2), some(1, 2, 2, 2, 2, 2)]
    huge = nowhere(2, 1 << 31, "float16").reshape(2, 1 << 16, 1 << 14, 2)
    for x in (*wrong, huge):
        window = (2,) * (x.ndim - 2)
        for name in POOLS:
            kernels.KERNELS[name](x, window=window, ceil_mode=True)
        kernels.conv(x, some(*window, 2, 3, dtype=x.dtype.name), stride=2)
    x, weight = some(3, 4, 4, 2), some(2, 2, 2, 4)
    kernels.conv(x, weight, padding=1 << 15)
    kernels.conv(x, some(2, 2, 2, 4, dtype="float64"))
    kernels.conv(x, weight, some(4, dtype="float16"))
    kernels.conv(x, np.zeros((2, 2, 2, 4), "float32"))  # nothing moves by itself: CuPy says so
    kernels.conv(x, some(2, 2, 1, 4), some(3), groups=2)  # CuPy says what is wrong
    kernels.conv(x, some(2, 2, 1, 4), some(1), groups=2)
    half = some(3, 4, 4, 2, dtype="float16"), some(2, 2, 1, 2, dtype="float16")
    kernels.conv(*half, groups=2, activation=kernels.softmax)  # 16 bits would be rounded twice
    assert [len(each) for each in arrived.values()] == [4, 4, 11]
    assert arrived["average_pool"][0][1]["ceil_mode"]
    assert not arrived["average_pool"][0][1]["count_include_pad"]
    assert arrived["conv"][0][1]["stride"] == 2
    assert not launches
