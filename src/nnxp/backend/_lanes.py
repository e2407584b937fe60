"""How rows travel through a device: in lanes, each a stream with host buffers of its own.

While one lane computes, the rows of the next travel in and the results of the last travel out. In
a lane all is in order, so that nothing has to wait for another lane; only the host waits, before it
touches a lane's buffers again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import copy_context
from functools import cache, partial
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from nnxp._arrays import HostArray, Shape

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

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


class Device(Protocol):
    """What lanes want of a device."""

    @property
    def xp(self) -> Any: ...
    def stream(self) -> Stream: ...
    def pool(self) -> Pool: ...
    def pinned(self, size: int) -> HostArray: ...


Deliver = Callable[[Sequence[HostArray]], object]


class Lane:
    """Takes one block at a time: in, through the model and out."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.stream = device.stream()
        self._buffers: dict[tuple[str, int], HostArray] = {}
        self._busy = False
        self._under_way: tuple[Deliver, list[HostArray]] | None = None

    def start(
        self,
        run: Callable[..., Any],
        blocks: Sequence[HostArray],
        dtypes: Sequence[np.dtype[Any]],
        deliver: Deliver,
    ) -> None:
        """Send a block of each input on its way, to become these types; `deliver` what is made."""
        self._busy = True
        staged = []
        for i, (block, wanted) in enumerate(zip(blocks, dtypes, strict=True)):
            dtype = travels_as(block.dtype, wanted)
            staged.append(self._buffer("in", i, block.shape, dtype))
            copy(staged[-1], block)
        results = []
        with self.stream:
            arrays = []
            for host in staged:
                arrays.append(self._device.xp.empty(host.shape, host.dtype))
                arrays[-1].set(host)
            outputs = run(tuple(arrays))
            for i, y in enumerate(outputs):
                results.append(self._buffer("out", i, y.shape, y.dtype))
                y.get(out=results[-1], blocking=False)
        self._under_way = deliver, results

    def finish(self) -> None:
        """Wait for the block under way, if there is one, and deliver its results."""
        under_way = self._under_way
        self.abandon()
        if under_way is not None:
            deliver, results = under_way
            deliver(results)

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
            buffer = self._buffers[way, index] = self._device.pinned(size)
        return view(buffer, shape, dtype)


class Lanes:
    """The lanes of one sweep at a time, with the device memory that they use."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.pool = device.pool()
        self._lanes: list[Lane] = []

    def first(self, count: int) -> list[Lane]:
        while len(self._lanes) < count:
            self._lanes.append(Lane(self._device))
        return self._lanes[:count]


class LanePool:
    """What an engine keeps on a device from one sweep to the next; any number may go on at once."""

    def __init__(self) -> None:
        self._idle: list[Lanes] = []
        self._lock = threading.Lock()
        self._closed = False

    @contextmanager
    def lanes(self, device: Device) -> Iterator[Lanes]:
        """Lanes for one sweep."""
        with self._lock:
            lanes = self._idle.pop() if self._idle else None
        if lanes is None:
            lanes = Lanes(device)
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
    copies = [_threads().submit(copy_context().run, work) for work in others]
    first()
    for future in copies:
        future.result()


def travels_as(dtype: np.dtype[Any], wanted: np.dtype[Any]) -> np.dtype[Any]:
    """The type in which rows travel to a device where they become `wanted`.

    Small types travel as they are and are converted where the model is, float32 for 16 bits too:
    a core of the host takes longer to round a number than twice the bytes take to travel. Other
    types that are wider than the model's are converted on the way.
    """
    small = dtype.itemsize <= wanted.itemsize or (dtype == np.float32 and wanted.itemsize == 2)
    return dtype if small else wanted


def view(buffer: HostArray, shape: Shape, dtype: np.dtype[Any]) -> HostArray:
    """The beginning of the buffer, as an array."""
    return buffer[: prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


@cache
def _threads() -> ThreadPoolExecutor:
    from concurrent.futures import ThreadPoolExecutor  # brings logging: not for every import

    from nnxp.backend._machine import usable_cores

    return ThreadPoolExecutor(min(COPY_THREADS, usable_cores()), "nnxp-copy")
