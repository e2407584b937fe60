"""A CUDA device without a GPU: what CuPy is asked for, by engine, lanes, graphs and kernels.

The stand-in obeys the rules of streams. Work is done in the order of its stream: at once, or as
late as the program allows, when somebody waits for it. What is captured is kept as it
was told, with its addresses, and done again at each launch of the graph. Memory holds NaN when it
is handed out and again when it is given back; it is the host's, so that the kernels compiled for
the host and the stand-in for cuBLASLt compute in it. What CUDA forbids raises Broken, which no
`except Exception` hides.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import weakref
from collections import Counter, defaultdict, deque
from types import SimpleNamespace

import numpy as np
import pytest

from nnxp import _arrays
from nnxp.backend import Availability, _device, cuda

cupy = pytest.importorskip("cupy", reason="CuPy is not installed: there are no arrays of CUDA")
from nnxp.kernels.cuda import _compiled  # noqa: E402
from nnxp.kernels.cuda.lt import bindings, call, descriptors, plans  # noqa: E402
from test_cuda_sources import HostGpu, libraries  # noqa: E402, F401
from test_lt import STREAM, Lt, host  # noqa: E402

FENCE = 512


class Broken(BaseException):
    """A rule of CUDA was broken."""


def rule(kept, said):
    if not kept:
        machine.broken.append(said)
        raise Broken(said)


# The device


class Machine:
    """The state of all: the current device and streams, memory, what was done, and how often."""

    def __init__(self):
        self.lazy, self.clock, self.done = False, 0, Counter()
        self.devices, self.streams, self.made = [0], defaultdict(list), []
        self.blocks, self.ended, self.room, self.pinned = {}, [], 1 << 28, []
        self.broken, self.lost = [], 0

    def stream(self):
        own = self.streams[self.devices[-1]]
        if not own:
            own.append(Stream())
        return own[-1]

    def give(self, kind, work):
        """Work for the current stream."""
        rule(self.devices[-1] == 0, f"{kind} on another device than that of its arrays")
        self.stream().give(kind, work)

    def finish(self):
        """All there is to do: streams that nobody ordered take turns."""
        while any(stream.queue for stream in self.made):
            for stream in reversed(self.made):
                if stream.queue:
                    stream.step()

    def own(self):
        """The addresses of streams that are not the caller's."""
        return {each.ptr for each in self.made} - {0}

    def copies(self):
        """How often something was copied from or to the host."""
        self.finish()
        return sum(n for (kind, _), n in self.done.items() if kind in ("set", "get"))

    def malloc(self, size):
        """Memory on 512 bytes, as CUDA's is, with a fence behind it."""
        raw = np.full(size + 2 * FENCE, 0xA5, "uint8")
        at = -raw.ctypes.data % FENCE
        address = raw.ctypes.data + at
        self.blocks[address] = size, raw, raw[at + size :]
        self.room -= size
        return address

    def free(self, address):
        if address not in self.blocks:
            return  # of the test before
        size, raw, fence = self.blocks.pop(address)
        rule((fence == 0xA5).all(), "something was written behind an array")
        raw[:] = 0xFF
        self.ended.append(raw)  # not used again for anything: who reads it gets NaN
        self.room += size

    def span(self, at, size):
        inside = any(a <= at and at + size <= a + n for a, (n, *_) in self.blocks.items())
        rule(inside, f"{size} bytes at {at} are no memory of the device")


machine = Machine()


class Stream:
    def __init__(self, non_blocking=False):
        self.ptr = 1000 + len(machine.made) if non_blocking else 0
        self.queue, self.captured, self.device = deque(), None, machine.devices[-1]
        self.pools = set()
        machine.made.append(self)

    def __enter__(self):
        rule(self.device == machine.devices[-1], "the stream is of another device")
        machine.stream()
        machine.streams[self.device].append(self)
        return self

    def __exit__(self, *error):
        rule(machine.streams[self.device].pop() is self, "streams are left in disorder")

    def give(self, kind, work):
        if self.captured is not None:
            self.captured.append((kind, work))
            return
        self.queue.append((kind, work))
        if not machine.lazy:
            self.run()

    def step(self):
        kind, work = self.queue.popleft()
        machine.clock += 1
        machine.done[kind, self.ptr] += 1
        try:
            work()
        except AssertionError as error:
            rule(False, f"{kind}: {error}")

    def run(self):
        while self.queue:
            self.step()

    def synchronize(self):
        rule(self.captured is None, "nothing may wait for a stream that is captured")
        self.run()

    def record(self, event):
        event.record(self)
        return event

    def wait_event(self, event):
        self.give("wait", event.reach)

    def is_capturing(self):
        return self.captured is not None

    def begin_capture(self):
        rule(self.ptr and not self.is_capturing(), "this stream cannot be captured")
        self.captured = []

    def end_capture(self):
        graph, self.captured = SimpleNamespace(work=self.captured), None
        while self.pools:
            self.pools.pop().graph = graph

        def launch():
            for kind, work in graph.work:
                machine.stream().give(f"graph's {kind}", work)

        return SimpleNamespace(launch=launch, graph=graph)


class Event:
    def __init__(self, disable_timing=False):
        rule(not machine.stream().is_capturing(), "no event while a graph is captured")
        self.timed, self.at = not disable_timing, None

    def record(self, stream=None):
        self.stream, self.at = stream or machine.stream(), None
        self.stream.give("event", lambda: setattr(self, "at", machine.clock))

    def reach(self):
        while self.at is None:
            self.stream.step()

    synchronize = reach


def elapsed(start, stop):
    rule(start.timed and stop.timed, "an event without a clock")
    return stop.at - start.at  # so long that the tuner is content with two runs


class Device:
    def __init__(self, index):
        self.id = index

    def __enter__(self):
        machine.devices.append(self.id)

    def __exit__(self, *error):
        machine.devices.pop()

    def synchronize(self):
        machine.finish()


class Pool:
    """As CuPy's: what is given back on a stream is handed out again on that stream only.

    A pool that is dropped loses what it holds unused: nobody ever gives that back.
    """

    def __init__(self):
        self.idle, self.size, self.limit, self.graph = defaultdict(list), 0, None, None

    def malloc(self, size):
        size, stream = max(1, -(-size // 512)) * 512, machine.stream()
        rule(machine.devices[-1] == 0, "memory from another device")
        rule(self.graph is None, "memory that a graph holds was handed out")
        idle = self.idle[stream, size]
        at = idle.pop() if idle else self._more(size, stream)
        if stream.is_capturing():
            stream.pools.add(self)
        chunk = Chunk(self, stream, size, at)
        chunk.poison()
        return cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(at, size, chunk, 0), 0)

    def _more(self, size, stream):
        rule(not stream.is_capturing(), "memory from the device while a graph is captured")
        for _ in range(2):
            if size <= machine.room and self.size + size <= (self.limit or 1 << 60):
                self.size += size
                return machine.malloc(size)
            self.free_all_blocks()
        raise cupy.cuda.memory.OutOfMemoryError(size, self.size, self.limit or 0)

    def free_all_blocks(self):
        machine.finish()  # as cudaFree does
        for (_, size), idle in self.idle.items():
            while idle:
                machine.free(idle.pop())
                self.size -= size

    def __del__(self):
        machine.lost += sum(size * len(idle) for (_, size), idle in self.idle.items())

    def stranded(self):
        """The bytes that were given back on streams which are not the caller's."""
        return sum(size * len(idle) for (by, size), idle in self.idle.items() if by.ptr)

    def set_limit(self, size):
        self.limit = size

    def free_bytes(self):
        rule(machine.devices[-1] == 0, "a pool is asked about another device")
        return sum(size * len(idle) for (_, size), idle in self.idle.items())

    def used_bytes(self):
        return self.size - self.free_bytes()


class Chunk:
    def __init__(self, pool, *what):
        self.pool, (self.stream, self.size, self.at) = weakref.ref(pool), what

    def poison(self):
        at, size = self.at, self.size
        self.stream.give("poison", lambda: at in machine.blocks and ctypes.memset(at, 255, size))

    def __del__(self):
        self.poison()
        pool = self.pool()
        if pool is None:
            machine.finish()
            machine.free(self.at)
        else:
            pool.idle[self.stream, self.size].append(self.at)


def pinned(size):
    machine.pinned.append(np.full(size, 255, "uint8"))
    return machine.pinned[-1]


# Arrays


def compute(kind, function, to, *given):
    """to[...] = function(*given), when its turn comes, at the addresses that they have now."""
    into, *views = (host(each) if isinstance(each, Nd) else each for each in (to, *given))
    places = [each.data.ptr for each in (to, *given) if isinstance(each, Nd) and each.size]

    def work():
        for each in places:
            machine.span(each, 1)
        into[...] = function(*views)

    machine.give(kind, work)
    return to


class Nd(cupy.ndarray):
    """CuPy's array, with NumPy for what CuPy would launch a kernel for, or ask the driver."""

    def set(self, rows):
        rule((rows.dtype, rows.shape) == (self.dtype, self.shape), "set takes the same type")
        rule(not machine.stream().is_capturing(), "a copy from the host in a graph")
        rows = np.ascontiguousarray(rows)
        lasting = any(np.may_share_memory(rows, each) for each in machine.pinned)
        compute("set", lambda x: x, self, rows if lasting else rows.copy())

    def get(self, out=None, blocking=True):
        rule(not machine.stream().is_capturing(), "a copy to the host in a graph")
        lasting = any(np.may_share_memory(out, each) for each in machine.pinned if out is not None)
        rule(blocking or lasting, "what is not waited for goes to pinned memory")
        out = np.empty(self.shape, self.dtype) if out is None else out
        compute("get", lambda x: x, out, self if self.flags.c_contiguous else self.copy())
        if blocking:
            machine.stream().synchronize()
        return out

    def astype(self, dtype):
        return compute("astype", lambda x: x.astype(dtype), Nd(self.shape, dtype), self)

    def copy(self):
        return compute("copy", lambda x: x, Nd(self.shape, self.dtype), self)

    def __setitem__(self, key, value):
        compute("copy", lambda x: x, self[key], value)


def add(x, y, out=None):
    return compute("add", np.add, Nd(x.shape, x.dtype) if out is None else out, x, y)


def filled(shape, value, dtype):
    return compute("fill", lambda x: x, Nd(shape, dtype), value)


def copyto(to, x, casting="same_kind"):
    dtype = to.dtype  # the work must not keep the array
    compute("copyto", lambda x: x.astype(dtype, casting=casting), to, x)


class LaterLt(Lt):
    """cuBLASLt, which is told now, and computes when its turn comes.

    `told` is called with the stream and the workspace of each product.
    """

    told = None

    def matmul(self, *told):
        rule(told[-1] == machine.stream().ptr, "a product on another stream")
        if self.told is not None:
            self.told(told[-1], told[13])
        then, algorithm = copy.copy(self), (ctypes.c_uint64 * 8)()
        ctypes.memmove(algorithm, told[12], 64)
        then.things = {i: copy.deepcopy(self.things[i]) for i in told if i in self.things}

        def work():
            Lt.matmul(then, *told[:12], ctypes.addressof(algorithm), *told[13:15], STREAM)

        machine.give("product", work)


def bare(x):
    """An array at the same address that keeps no memory alive."""
    if not isinstance(x, Nd):
        return x
    memory = cupy.cuda.UnownedMemory(x.data.ptr, x.nbytes, None, 0)
    return Nd(x.shape, x.dtype, cupy.cuda.MemoryPointer(memory, 0), x.strides)


@pytest.fixture(name="gpu", params=[False, True], ids=["at once", "as late as possible"])
def pretended_gpu(request, libraries, monkeypatch):  # noqa: F811
    """The device that nnxp finds as cuda:0."""
    vars(machine).update(vars(Machine()))
    machine.lazy = request.param
    pool, lt, kernels = Pool(), LaterLt(machine), HostGpu(libraries)
    machine.lt = lt

    def kernel(file, *instance):
        run = kernels.kernel(file, *instance)

        def launch(grid, block, args):
            given = [bare(each) for each in args]

            def work():
                for each in given:
                    if isinstance(each, Nd):
                        machine.span(each.data.ptr, 1)
                run(grid, block, given)

            machine.give("kernel", work)

        return launch

    def patch(where, **stand_ins):
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(where, name, stand_in)

    patch(cupy, add=add, empty=Nd, full=filled, copyto=copyto, get_default_memory_pool=lambda: pool)
    patch(cupy, zeros=lambda shape, dtype: filled(shape, 0, dtype), asnumpy=Nd.get)
    patch(
        cupy,
        ascontiguousarray=lambda x: x if x.flags.c_contiguous else x.copy(),
        matmul=lambda *_, **__: rule(False, "cuBLAS"),
    )
    patch(cupy.cuda, Stream=Stream, Event=Event, Device=Device, MemoryPool=Pool)
    patch(cupy.cuda, get_current_stream=machine.stream, get_elapsed_time=elapsed)
    patch(cupy.cuda, PinnedMemory=pinned, PinnedMemoryPointer=lambda memory, at: memory)
    patch(cupy.cuda.runtime, getDevice=lambda: machine.devices[-1])
    patch(cupy.cuda.runtime, memGetInfo=lambda: (1 << 28, 1 << 28))
    for module in (call, plans):
        patch(module, get_device_id=lambda: machine.devices[-1])
    for module in (descriptors, plans):
        patch(module, get_current_stream=machine.stream)
    patch(bindings, library=lambda: (lt, None), handles={})
    patch(plans, choices={})
    patch(call, plans={})
    patch(_compiled, kernel=kernel)
    patch(_device, BLOCK_ROWS=(64, 64))
    patch(plans, PAD_FROM_ROWS=64)
    patch(cuda, availability=lambda index: Availability(True, "a stand-in"))
    patch(cuda.guard, pid=None)
    monkeypatch.setitem(_arrays._MODULES, Nd, cupy)
    with cupy.cuda.using_allocator(pool.malloc):
        try:
            yield machine
            machine.finish()
        finally:
            for stream in machine.made:
                stream.queue.clear()
    gc.collect()
    pool.free_all_blocks()
    assert not machine.broken
    assert not machine.lost
    assert all((fence == 0xA5).all() for _, _, fence in machine.blocks.values())
