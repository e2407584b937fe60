"""A device as CUDA describes it to programs: memory, streams, events, graphs, and rules."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import Counter, deque

import numpy as np

ALIGNED = 512  # bytes, as all of CUDA's memory is
OUT_OF_MEMORY, INVALID_HANDLE, NOT_READY, NOT_CAPTURABLE = 2, 400, 600, 900  # of cudaError


class Refused(Exception):
    """What CUDA answers with an error. Where that is not foreseen, it is a broken rule, too."""

    def __init__(self, status):
        super().__init__(status)
        self.status = status


class Broken(Exception):
    """Work that a rule forbids, and that cannot be done."""


class Blocks:
    """Memory by address. What was given back is kept, full of NaN, for who still reads it."""

    def __init__(self):
        self._starts, self._blocks, self._ended = [], {}, []

    def __len__(self):
        return len(self._blocks)

    def take(self, size, alignment=ALIGNED):
        raw = np.full(size + alignment, 0xFF, "uint8")  # NaN in every type
        start = -(-raw.ctypes.data // alignment) * alignment
        self._starts.insert(bisect_right(self._starts, start), start)
        self._blocks[start] = size, raw
        return start

    def give_back(self, start):
        """The bytes that it was; None for what is no start of a block."""
        size, raw = self._blocks.pop(start, (None, None))
        if raw is not None:
            self._starts.remove(start)
            raw[:] = 0xFF
            self._ended.append(raw)
        return size

    def hold(self, at, size):
        i = bisect_right(self._starts, at) - 1
        return i >= 0 and at + size <= self._starts[i] + self._blocks[self._starts[i]][0]


class Stream:
    def __init__(self, pointer, device, blocking):
        self.pointer, self.device, self.blocking = pointer, device, blocking
        self.queue = deque()
        self.captured, self.held, self.strict = None, [], False


class Event:
    def __init__(self, timed):
        self.timed, self.stream, self.token, self.at = timed, None, None, None


class Graph:
    """The work that was captured, and the memory that was taken meanwhile."""

    def __init__(self, work, held):
        self.work, self.held = work, held


class Machine:
    """Two devices, of which each has memory and streams of its own.

    `done` counts what was done, by kind and stream, and `moved` the bytes of copies; `broken` has
    the rules that were broken.
    Everything is done under one lock: what is at the same time on a device is one after another
    here, and only the order tells.
    """

    DEVICES = 2

    def __init__(self):
        self.lock, self._local = threading.RLock(), threading.local()
        self.serial = 0x7000_0000_0000
        self.memory = [Blocks() for _ in range(self.DEVICES)]
        self.pinned = Blocks()
        self.streams = {
            (0, device): Stream(0, device, blocking=True) for device in range(self.DEVICES)
        }
        self.events, self.graphs = {}, {}
        self.lives = {}  # what CuPy's pools have handed out: address -> bytes, stream
        self.watched = None  # the thread of which that is known
        self.restart(lazy=False)

    def restart(self, lazy):
        """As it is for a new test, which finds the memory that is still in use."""
        self.lazy, self.clock, self.done, self.broken = lazy, 0, Counter(), []
        self.moved = Counter()
        self.free, self.pinnable = 1 << 28, 1 << 28

    def rule(self, kept, said):
        if not kept:
            self.broken.append(said)

    def new(self):
        self.serial += 0x1000
        return self.serial

    # devices and memory

    @property
    def device(self):
        return getattr(self._local, "device", 0)

    @device.setter
    def device(self, index):
        self._local.device = index

    def malloc(self, size):
        forbidden = any(each.captured is not None and each.strict for each in self.streams.values())
        if forbidden:
            self.rule(False, "memory from the device while a graph is captured")
            raise Refused(NOT_CAPTURABLE)
        if size > self.free:
            raise Refused(OUT_OF_MEMORY)
        self.free -= size
        return self.memory[self.device].take(size)

    def give_back(self, start):
        self.finish()  # as cudaFree does
        size = next(filter(None, (each.give_back(start) for each in self.memory)), None)
        self.rule(size is not None, f"{start:#x} is given back, but is no memory of a device")
        self.free += size or 0

    def pin(self, size):
        if size > self.pinnable:
            raise Refused(OUT_OF_MEMORY)
        self.pinnable -= size
        return self.pinned.take(size, 4096)

    def unpin(self, start):
        self.finish()
        self.pinnable += self.pinned.give_back(start) or 0

    def span(self, at, size):
        """The bytes are to be memory of the device when work on them is done."""
        if size and not self.memory[self.device].hold(at, size):
            raise Broken(f"{size} bytes at {at:#x} are no memory of device {self.device}")

    def device_of(self, at):
        """Whose memory it is; None for the host's."""
        return next((i for i, each in enumerate(self.memory) if each.hold(at, 1)), None)

    def alive(self, at):
        """An address is to belong to an array, when work on it is given to the device."""
        if threading.get_ident() == self.watched:
            self.rule(
                any(start <= at < start + size for start, (size, _) in self.lives.items()),
                f"{at:#x} belongs to no array any more",
            )

    def handed_out(self, at, size, stream):
        self.lives[at] = size, stream
        owner = self.streams.get(stream)
        if owner is not None and owner.captured is not None:
            owner.held.append((at, size))
            return
        self.rule(
            not any(
                at < start + length and start < at + size
                for graph in self.graphs.values()
                for start, length in graph.held
            ),
            "memory that a graph holds was handed out",
        )

    # streams

    def stream(self, pointer):
        pointer = 0 if pointer == 1 else pointer  # cudaStreamLegacy
        key = (0, self.device) if pointer == 0 else pointer
        if pointer == 2:  # cudaStreamPerThread
            key = (2, self.device, threading.get_ident())
            self.streams.setdefault(key, Stream(2, self.device, blocking=True))
        if key not in self.streams:
            self.rule(False, f"there is no stream {pointer:#x} any more")
            raise Refused(INVALID_HANDLE)
        return self.streams[key]

    def give(self, pointer, kind, work):
        """Work for a stream, to be done now or later."""
        stream = self.stream(pointer)
        if stream.device != self.device:
            self.rule(False, f"{kind} on device {self.device}, by a stream of {stream.device}")
            raise Refused(INVALID_HANDLE)
        if stream.captured is not None:
            stream.captured.append((kind, work))
            return
        self._in_order_of_the_default(stream)
        stream.queue.append((kind, work))
        if not self.lazy:
            self.run(stream)

    def _in_order_of_the_default(self, stream):
        """The default stream waits for all that are blocking, and they wait for it."""
        for other in list(self.streams.values()):
            both = stream.blocking and other.blocking and stream.device == other.device
            if both and (stream.pointer == 0) != (other.pointer == 0):
                self.run(other)

    def step(self, stream):
        kind, work = stream.queue.popleft()
        self.clock += 1
        self.done[kind, stream.pointer] += 1
        before, self.device = self.device, stream.device
        try:
            work()
        except Exception as error:
            self.rule(False, f"{kind}: {type(error).__name__}: {error}")
        finally:
            self.device = before

    def run(self, stream):
        while stream.queue:
            self.step(stream)

    def finish(self):
        """All there is to do: streams that nobody ordered take turns, the last one made first.

        Those that somebody has given up do what they were given all the same, and then are gone.
        """
        while any(stream.queue for stream in self.streams.values()):
            for stream in list(reversed(self.streams.values())):
                if stream.queue:
                    self.step(stream)
        for key in [key for key in self.streams if isinstance(key, tuple) and key[0] == "ended"]:
            del self.streams[key]

    def wait_for(self, stream):
        if stream.captured is not None:
            self.rule(False, "somebody waits for a stream that is captured")
            raise Refused(NOT_CAPTURABLE)
        self._in_order_of_the_default(stream)
        self.run(stream)

    def own(self):
        """The streams that are not the caller's."""
        return {each.pointer for each in self.streams.values()} - {0}

    def copies(self):
        """How often something was copied from or to the host."""
        self.finish()
        return sum(n for (kind, _), n in self.done.items() if kind in ("set", "get"))

    def capture(self, stream, strict):
        """Begin a graph. `strict`, as every mode is but "relaxed": no memory is taken meanwhile."""
        if stream.pointer == 0 or stream.captured is not None:
            self.rule(False, "this stream cannot be captured")
            raise Refused(NOT_CAPTURABLE)
        stream.captured, stream.held, stream.strict = [], [], strict

    def captured(self, stream):
        """The number of the graph that the stream was told since `capture`."""
        work, stream.captured = stream.captured, None
        return self.keep(Graph(work, stream.held))

    def keep(self, graph):
        number = self.new()
        self.graphs[number] = graph
        return number

    # events

    def record(self, event, pointer):
        stream, token = self.stream(pointer), object()
        self.rule(stream.captured is None, "an event is recorded while a graph is captured")
        event.stream, event.token, event.at = stream, token, None

        def reached():
            if event.token is token:
                event.at = self.clock

        reached.token = token
        self.give(pointer, "event", reached)

    def reach(self, stream, token):
        """Do what a stream was given before a mark. None may have been made yet."""
        while any(getattr(work, "token", self) is token for _, work in stream.queue):
            self.step(stream)

    def passed(self, event):
        return event.token is None or event.at is not None


machine = Machine()
