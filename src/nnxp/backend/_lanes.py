"""How rows travel through a device: in lanes, each a stream with host buffers of its own.

While one lane computes, the rows of the next travel in and the results of the last travel out. In
a lane all is in order, so that nothing has to wait for another lane; only the host waits, before it
touches a lane's buffers again.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import copy_context
from functools import cache, partial
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from nnxp._arrays import Array, HostArray, Shape
from nnxp.backend._base import Sweep, travels_as

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

    from nnxp.backend._device import DeviceBackend

COPY_BYTES = 1 << 20  # what is worth a thread of its own to be copied by
COPY_THREADS = 8  # about as many as fill the way to a GPU: one moves some 10 GB/s


class Stream(Protocol):
    """A queue of work on a device; within `with stream:` it is the current one."""

    def __enter__(self) -> Any: ...
    def __exit__(self, *error: Any) -> Any: ...
    def synchronize(self) -> None: ...


class Pool(Protocol):
    """Memory of a device that is set aside: within `with pool.use():` arrays are made in it."""

    def use(self) -> AbstractContextManager[Any]: ...
    def release(self) -> None:
        """Give back what is not in use."""

    def unused(self) -> int: ...


class Lane:
    """Takes one block at a time: in, through the model and out."""

    def __init__(self, backend: DeviceBackend) -> None:
        self._backend = backend
        self.stream = backend.stream()
        self._buffers: dict[tuple[str, int], HostArray] = {}
        self._busy = False
        self._under_way: tuple[Sweep, slice, list[HostArray]] | None = None

    def start(self, sweep: Sweep, rows: slice, blocks: tuple[HostArray, ...]) -> None:
        """Send a block of each input on its way: these rows of the sweep."""
        self._busy = True
        staged = []
        for i, (block, wanted) in enumerate(zip(blocks, sweep.dtypes, strict=True)):
            dtype = travels_as(block.dtype, wanted)
            staged.append(self._buffer("in", i, block.shape, dtype))
            copy(staged[-1], block)
        results = []
        with self.stream:
            arrays = []
            for host in staged:
                arrays.append(self._backend.xp.empty(host.shape, host.dtype))
                arrays[-1].set(host)
            outputs = sweep.forward(tuple(arrays))
            for i, y in enumerate(outputs):
                results.append(self._buffer("out", i, y.shape, y.dtype))
                y.get(out=results[-1], blocking=False)
        self._under_way = sweep, rows, results

    def finish(self) -> None:
        """Wait for the block under way, if there is one, and deliver its results."""
        under_way = self._under_way
        self.abandon()
        if under_way is not None:
            sweep, rows, results = under_way
            for into, result in zip(sweep.results(rows), results, strict=True):
                copy(into, result)
            sweep.done(rows.stop - rows.start)

    def abandon(self) -> None:
        """Wait for whatever the lane was given, and forget it."""
        self._under_way = None
        if self._busy:
            self._busy = False
            self.stream.synchronize()

    def _buffer(self, way: str, index: int, shape: Shape, dtype: np.dtype[Any]) -> HostArray:
        """Pinned memory for an array that goes in or out; a larger one if it is too small."""
        size = prod(shape) * dtype.itemsize
        buffer = self._buffers.get((way, index))
        if buffer is None or buffer.nbytes < size:
            buffer = self._buffers[way, index] = self._backend.pinned(size)
        return _view(buffer, shape, dtype)


class Lanes:
    """The lanes of one sweep at a time, with the device memory that they use."""

    def __init__(self, backend: DeviceBackend) -> None:
        self._backend = backend
        self.pool = backend.pool()
        self._lanes: list[Lane] = []

    def first(self, count: int) -> list[Lane]:
        while len(self._lanes) < count:
            self._lanes.append(Lane(self._backend))
        return self._lanes[:count]


class LanePool:
    """What an engine keeps on a device from one sweep to the next; any number may go on at once."""

    def __init__(self) -> None:
        self._idle: list[Lanes] = []
        self._lock = threading.Lock()
        self._closed = False

    @contextmanager
    def lanes(self, backend: DeviceBackend) -> Iterator[Lanes]:
        """Lanes for one sweep."""
        with self._lock:
            lanes = self._idle.pop() if self._idle else None
        if lanes is None:
            lanes = Lanes(backend)
        try:
            yield lanes
        finally:
            with self._lock:
                if not self._closed:
                    self._idle.append(lanes)
            if self._closed:
                lanes.pool.release()

    def unused(self) -> int:
        """The bytes of the device that are held and not in use."""
        with self._lock:
            return sum(lanes.pool.unused() for lanes in self._idle)

    def release(self) -> None:
        """Give back what no sweep uses just now, to be taken anew."""
        with self._lock:
            idle = list(self._idle)
        for lanes in idle:
            lanes.pool.release()

    def close(self) -> None:
        """Give everything back; what is under way elsewhere is given back when it ends."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for lanes in idle:
            lanes.pool.release()


class DeviceRecording:
    """Few rows of one shape and type: the same buffers and the same recorded work at each call.

    Work goes to the caller's current stream. Calls may come from any thread and stream; they follow
    each other. All it has on the device is in `pool`, which is only ever used while recording:
    afterwards what it holds belongs to what was recorded. What is tried before is made in `trial`.
    `forward` keeps alive the parameters that it reads where they lie.
    """

    def __init__(
        self,
        backend: DeviceBackend,
        forward: Callable[[tuple[Array, ...]], tuple[Array, ...]],
        shape: Shape,
        dtype: np.dtype[Any],
        trial: Pool,
        pool: Pool,
    ) -> None:
        self._backend, self._lock, self._forward = backend, threading.Lock(), forward
        self._on_device: list[Any] = []  # the rows, and what replays: all that uses the pool
        weakref.finalize(self, _let_go, self._on_device, pool).atexit = False
        with backend.current():
            stream = backend.stream()
            backend.wait(stream, backend.mark(backend.current_stream()))
            with stream:
                with pool.use():
                    x = backend.xp.zeros(shape, dtype)

                def answer() -> tuple[Array, ...]:
                    outputs = forward((x,))
                    return tuple(y if y.flags.c_contiguous else y.copy() for y in outputs)

                with trial.use():  # what is compiled and tried out need not be kept
                    outlines = [(y.shape, y.dtype) for y in answer()]
                with pool.use():
                    self._on_device += x, backend.record(answer, stream)
            self._staged = _pinned(backend, shape, dtype)
            self._results = tuple(_pinned(backend, *outline) for outline in outlines)
            self._mark = backend.mark(stream)
        self._last: tuple[int, Stream] = threading.get_ident(), stream

    def host(self, rows: HostArray) -> Any:
        """Host rows in, host results out: an array, or a tuple of several."""
        self._backend.guard.check()  # before a lock that nobody in a forked child gives back
        with self._lock, self._backend.current():
            stream, (x, replay) = self._follow(), self._on_device
            self._staged[...] = rows
            x.set(self._staged)
            for y, result in zip(replay(), self._results, strict=True):
                y.get(out=result, blocking=False)
            stream.synchronize()
            made = tuple(result.copy() for result in self._results)
        return made if len(made) > 1 else made[0]

    def device(self, rows: Array) -> Any:
        """Rows on the device in, results on the device out."""
        self._backend.guard.check()
        with self._lock, self._backend.current():
            stream, (x, replay) = self._follow(), self._on_device
            x[...] = rows
            made = tuple(y.copy() for y in replay())
            self._mark = self._backend.mark(stream)
        return made if len(made) > 1 else made[0]

    def _follow(self) -> Stream:
        """The caller's stream, made to wait for the call before if that was on another one."""
        stream = self._backend.current_stream()
        here = threading.get_ident(), stream  # a default stream may be another in each thread
        if here != self._last:
            self._backend.wait(stream, self._mark)
            self._last = here
        return stream


def recorded(
    backend: DeviceBackend,
    forward: Callable[[tuple[Array, ...]], tuple[Array, ...]],
    shape: Shape,
    dtype: np.dtype[Any],
) -> DeviceRecording | None:
    """A recording for such rows; None if none can be made: perhaps there was no memory just now.

    The pools are emptied when nothing of the attempt is left, its exception neither.
    """
    trial, pool = backend.pool(), backend.pool()
    recording = None
    with suppress(Exception):
        recording = DeviceRecording(backend, forward, shape, dtype, trial, pool)
    trial.release()
    if recording is None:
        pool.release()
    return recording


def _let_go(on_device: list[Any], pool: Pool) -> None:
    """First what uses the pool, then the pool."""
    on_device.clear()
    pool.release()


def _pinned(backend: DeviceBackend, shape: Shape, dtype: np.dtype[Any]) -> HostArray:
    return _view(backend.pinned(prod(shape) * dtype.itemsize), shape, dtype)


def copy(into: HostArray, rows: HostArray) -> None:
    """into[...] = rows, by several threads where there is much of it; other types are converted."""
    parts = min(COPY_THREADS, rows.nbytes // COPY_BYTES, len(rows))
    if parts < 2:
        np.copyto(into, rows, casting="unsafe")
        return
    bounds = [len(rows) * i // parts for i in range(parts + 1)]
    first, *others = (
        partial(np.copyto, into[a:b], rows[a:b], casting="unsafe") for a, b in pairwise(bounds)
    )
    copies = [_threads().submit(copy_context().run, each) for each in others]
    first()
    for each in copies:
        each.result()


def _view(buffer: HostArray, shape: Shape, dtype: np.dtype[Any]) -> HostArray:
    """The beginning of the buffer, as an array."""
    return buffer[: prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


@cache
def _threads() -> ThreadPoolExecutor:
    from concurrent.futures import ThreadPoolExecutor  # brings logging: not for every import

    from nnxp.backend._machine import usable_cores

    return ThreadPoolExecutor(min(COPY_THREADS, usable_cores()), "nnxp-copy")
