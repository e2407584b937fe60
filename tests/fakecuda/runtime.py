"""The functions of CUDA's runtime and driver that CuPy calls, as the machine answers them.

The runtime is linked into CuPy, so its functions cannot be replaced by a library of our own:
`redirect` writes a jump to ours over the beginning of each. The driver CuPy loads by name.
"""

import ctypes
import re
import struct
import subprocess
from ctypes import CFUNCTYPE, c_char_p, c_float, c_int, c_size_t, c_uint
from pathlib import Path

from fakecuda import kernels
from fakecuda.machine import (
    INVALID_HANDLE,
    NOT_CAPTURABLE,
    NOT_READY,
    Event,
    Refused,
    Stream,
    machine,
)

P = c_size_t  # an address
NOT_SUPPORTED, UNKNOWN = 801, 999
TO_DEVICE, TO_HOST, ON_DEVICE, AS_ADDRESSES_SAY = 1, 2, 3, 4  # cudaMemcpyKind
ATTRIBUTES = {75: 9, 76: 0, 16: 132, 1: 1024}  # compute capability 9.0, processors, threads a block

functions = {}


def function(answer):
    """A function of CUDA, with the types of its arguments. What it returns is its status."""

    def called(*args):
        with machine.lock:
            try:
                return answer(*args) or 0
            except Refused as refused:
                return refused.status
            except Exception as error:
                machine.rule(False, f"{answer.__name__}: {type(error).__name__}: {error}")
                return UNKNOWN

    types = answer.__annotations__.values()
    functions[answer.__name__] = CFUNCTYPE(c_int, *types)(called)
    return answer


def missing(name):
    def called():
        machine.rule(False, f"{name} is not pretended")
        return NOT_SUPPORTED

    return functions.setdefault(name, CFUNCTYPE(c_int)(called))


def put(at, kind, value):
    kind.from_address(at).value = value


# Devices


@function
def cudaGetDeviceCount(count: P):
    put(count, c_int, machine.DEVICES)


@function
def cudaGetDevice(device: P):
    put(device, c_int, machine.device)


@function
def cudaSetDevice(device: c_int):
    machine.device = device


@function
def cudaDeviceSynchronize():
    machine.finish()


@function
def cudaDeviceGetAttribute(value: P, attribute: c_int, device: c_int):
    put(value, c_int, ATTRIBUTES.get(attribute, 1))


@function
def cudaGetDeviceProperties(properties: P, device: c_int):
    ctypes.memmove(properties, b"a pretended device".ljust(256, b"\0"), 256)


@function
def cudaDeviceGetPCIBusId(into: P, size: c_int, device: c_int):
    ctypes.memmove(into, b"0000:00:00.0\0", 13)


@function
def cudaDeviceCanAccessPeer(can: P, device: c_int, peer: c_int):
    put(can, c_int, 0)


@function
def cudaDriverGetVersion(version: P):
    put(version, c_int, 13020)


@function
def cudaRuntimeGetVersion(version: P):
    put(version, c_int, 13020)


@function
def cudaGetLastError():
    return 0


# Memory


@function
def cudaMemGetInfo(free: P, total: P):
    put(free, c_size_t, 1 << 28)  # whatever is really free: it may be gone before it is asked for
    put(total, c_size_t, 1 << 28)


@function
def cudaMalloc(address: P, size: c_size_t):
    put(address, P, 0)
    put(address, P, machine.malloc(size))


@function
def cudaFree(address: P):
    if address:
        machine.give_back(address)


@function
def cudaHostAlloc(address: P, size: c_size_t, flags: c_uint):
    put(address, P, 0)
    put(address, P, machine.pin(size))


@function
def cudaFreeHost(address: P):
    machine.unpin(address)


@function
def cudaPointerGetAttributes(attributes: P, address: P):
    device = machine.device_of(address)
    pinned = machine.pinned.hold(address, 1)
    put(attributes, c_int, 2 if device is not None else int(pinned))  # cudaMemoryType
    put(attributes + 4, c_int, device or 0)
    put(attributes + 8, P, address)


@function
def cudaMemcpyAsync(to: P, source: P, size: c_size_t, kind: c_int, stream: P):
    """A copy from pageable memory has read it before it returns; one to it has written it."""
    if kind == AS_ADDRESSES_SAY:
        into, out_of = (machine.device_of(each) is not None for each in (to, source))
        kind = {(True, False): TO_DEVICE, (False, True): TO_HOST}.get((into, out_of), ON_DEVICE)
    on_host = {TO_DEVICE: source, TO_HOST: to}.get(kind)
    pageable = on_host is not None and not machine.pinned.hold(on_host, size)
    name = {TO_DEVICE: "set", TO_HOST: "get", ON_DEVICE: "copy"}[kind]
    if machine.stream(stream).captured is not None and on_host is not None:
        machine.rule(False, f"{name}: a copy from or to the host while a graph is captured")
        raise Refused(NOT_CAPTURABLE)
    staged = ctypes.string_at(source, size) if pageable and kind == TO_DEVICE else source

    def work():
        for at in ((to,) if kind != TO_HOST else ()) + ((source,) if kind != TO_DEVICE else ()):
            machine.span(at, size)
        ctypes.memmove(to, staged, size)

    machine.give(stream, name, work)
    machine.moved[name] += size
    if pageable:
        machine.done["pageable " + name, stream] += 1
        if kind == TO_HOST:
            machine.run(machine.stream(stream))


@function
def cudaMemsetAsync(at: P, value: c_int, size: c_size_t, stream: P):
    def work():
        machine.span(at, size)
        ctypes.memset(at, value, size)

    machine.give(stream, "memset", work)


# Streams and events


@function
def cudaStreamCreateWithPriority(stream: P, flags: c_uint, priority: c_int):
    made = Stream(machine.new(), machine.device, blocking=not flags & 1)
    machine.streams[made.pointer] = made
    put(stream, P, made.pointer)


@function
def cudaStreamDestroy(stream: P):
    machine.streams["ended", machine.new()] = machine.streams.pop(stream)


@function
def cudaStreamSynchronize(stream: P):
    machine.wait_for(machine.stream(stream))


@function
def cudaStreamQuery(stream: P):
    return NOT_READY if machine.stream(stream).queue else 0


@function
def cudaStreamWaitEvent(stream: P, event: P, flags: c_uint):
    made = machine.events[event]
    before, token = made.stream, made.token
    if token is not None:
        machine.give(stream, "wait", lambda: machine.reach(before, token))


@function
def cudaEventCreateWithFlags(event: P, flags: c_uint):
    number = machine.new()
    machine.events[number] = Event(timed=not flags & 2)
    put(event, P, number)


@function
def cudaEventDestroy(event: P):
    del machine.events[event]


@function
def cudaEventRecord(event: P, stream: P):
    machine.record(machine.events[event], stream)


@function
def cudaEventSynchronize(event: P):
    made = machine.events[event]
    if made.token is not None:
        machine.reach(made.stream, made.token)


@function
def cudaEventQuery(event: P):
    return 0 if machine.passed(machine.events[event]) else NOT_READY


@function
def cudaEventElapsedTime(milliseconds: P, start: P, stop: P):
    events = machine.events[start], machine.events[stop]
    if not all(each.timed for each in events):
        raise Refused(INVALID_HANDLE)
    if not all(map(machine.passed, events)):
        raise Refused(NOT_READY)
    put(milliseconds, c_float, events[1].at - events[0].at)  # so long that the tuner is content


# Graphs


@function
def cudaStreamIsCapturing(stream: P, status: P):
    put(status, c_int, machine.stream(stream).captured is not None)


@function
def cudaStreamBeginCapture(stream: P, mode: c_int):
    machine.capture(machine.stream(stream), strict=mode != 2)  # cudaStreamCaptureModeRelaxed


@function
def cudaStreamEndCapture(stream: P, graph: P):
    put(graph, P, machine.captured(machine.stream(stream)))


@function
def cudaGraphInstantiate(executable: P, graph: P, flags: c_size_t):
    put(executable, P, machine.keep(machine.graphs[graph]))


@function
def cudaGraphLaunch(executable: P, stream: P):
    for kind, work in machine.graphs[executable].work:
        machine.give(stream, f"graph's {kind}", work)


@function
def cudaGraphDestroy(graph: P):
    del machine.graphs[graph]


@function
def cudaGraphExecDestroy(executable: P):
    del machine.graphs[executable]


# The driver


@function
def cuCtxGetCurrent(context: P):
    put(context, P, 1)


@function
def cuModuleLoadData(module: P, image: c_char_p):
    put(module, P, kernels.load(image.decode()))


@function
def cuModuleUnload(module: P):
    kernels.unload(module)


@function
def cuModuleGetFunction(kernel: P, module: P, name: c_char_p):
    put(kernel, P, kernels.function(module, name.decode()))


@function
def cuLaunchKernel(
    kernel: P,
    grid_x: c_uint,
    grid_y: c_uint,
    grid_z: c_uint,
    block_x: c_uint,
    block_y: c_uint,
    block_z: c_uint,
    shared: c_uint,
    stream: P,
    parameters: P,
    extra: P,
):
    shape = grid_x, grid_y, grid_z, block_x, block_y, block_z
    allowed = grid_x < 1 << 31 and max(grid_y, grid_z) < 1 << 16
    allowed = allowed and block_x * block_y * block_z <= 1024
    machine.rule(allowed, f"no launch may be so large: {shape}")
    machine.give(stream, *kernels.work(kernel, shape, parameters))


class Driver:
    """libcuda.so.1, as far as CuPy looks into it."""

    def __getattr__(self, name):
        return functions.get(name) or missing(name)


def redirect():
    """Let CuPy call these functions from now on, in this process."""
    from cupy_backends.cuda.api import runtime

    path = runtime.__file__
    maps = Path("/proc/self/maps").read_text().splitlines()
    base = next(int(line.split("-")[0], 16) for line in maps if line.endswith(path))
    listed = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout
    libc = ctypes.CDLL(None)
    for offset, symbol in re.findall(r"^(\w+) [tT] (cuda[A-Z]\w*)$", listed, re.MULTILINE):
        name = re.sub(r"_v\d+$", "", symbol)
        if name.startswith("cudaGetError") or name.endswith(("_ptsz", "_ptds")):
            continue
        at = base + int(offset, 16)
        target = ctypes.cast(functions.get(name) or missing(name), ctypes.c_void_p).value
        page = at & -4096
        if libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(8192), 7):
            raise OSError(f"the code of {symbol} cannot be written")
        jump = b"\x48\xb8" + struct.pack("<Q", target) + b"\xff\xe0"  # movabs rax; jmp rax
        ctypes.memmove(at, jump, len(jump))

    from cupy_backends.cuda.api import driver

    real = ctypes.CDLL
    ctypes.CDLL = lambda name, *args, **options: (
        Driver() if name == "libcuda.so.1" else real(name, *args, **options)
    )
    try:
        driver.ctxGetCurrent()  # which loads the driver
    finally:
        ctypes.CDLL = real
