"""CuPy on a CUDA device: "cupy", "cuda" or "cuda:1".

Importing this module needs no CuPy: it is imported when a device is asked for. `put` and `get`
work on the caller's current stream, a sweep on streams of its own; the caller's device and stream
are the current ones afterwards.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import numpy as np

from nnxp._arrays import Array, HostArray
from nnxp._errors import BackendUnavailable, DtypeMismatch
from nnxp.backend._base import Backend, Memory
from nnxp.backend._device import DeviceBackend, Unrecordable
from nnxp.backend._lanes import Stream
from nnxp.backend._probe import guard
from nnxp.backend._probe import probe as availability

__all__ = ["CudaBackend", "availability", "connect"]


def connect(index: int, why: str) -> Backend:
    """The backend for a CUDA device that the probe has found usable."""
    for name in ("CUPY_TF32", "NVIDIA_TF32_OVERRIDE"):
        if os.environ.get(name, "0") not in ("", "0"):
            raise BackendUnavailable(
                f"{name}={os.environ[name]} rounds float32 products to TF32, a thousand times the "
                "error of float32",
                f"unset {name}: float32 is float32 here",
            )
    guard.mark()
    return CudaBackend("cupy", f"cuda:{index}", why)


class CudaBackend(DeviceBackend):
    """CuPy arrays in the memory of one CUDA device."""

    guard = guard
    dlpack = 2  # kDLCUDA

    @property
    def xp(self) -> Any:
        import cupy

        return cupy

    def put(self, x: HostArray) -> Array:
        """Copied by ndarray.set: cupy.asarray would pin up to twice the bytes and keep them."""
        guard.check()
        if x.dtype.kind == "f" and x.dtype.itemsize > 8:
            raise DtypeMismatch(f"CUDA has no {x.dtype}; x.astype('float64') converts it")
        with self.current():
            array = self.xp.empty(x.shape, x.dtype.newbyteorder("="))
            array.set(x.astype(array.dtype, copy=False))
            return array

    def get(self, x: Array) -> HostArray:
        guard.check()
        with self.current():
            host: HostArray = x.get()  # waits for the copy
            return host

    def synchronize(self) -> None:
        self.current().synchronize()

    def memory(self) -> Memory:
        with self.current():
            free, total = self.xp.cuda.runtime.memGetInfo()
            pool = self.xp.get_default_memory_pool()
            return Memory(free + pool.free_bytes(), total, pool.used_bytes())

    def current(self) -> Any:
        return self.xp.cuda.Device(self.index)

    def stream(self) -> Stream:
        stream: Stream = self.xp.cuda.Stream(non_blocking=True)
        return stream

    def current_stream(self) -> Stream:
        stream: Stream = self.xp.cuda.get_current_stream()
        return stream

    def mark(self, stream: Any) -> Any:
        return stream.record(self.xp.cuda.Event(disable_timing=True))

    def wait(self, stream: Any, mark: Any) -> None:
        stream.wait_event(mark)

    def pool(self) -> _Pool:
        return _Pool(self.xp, self.current())

    def release(self) -> None:
        with self.current():
            self.xp.get_default_memory_pool().free_all_blocks()

    def pinned(self, size: int) -> HostArray:
        """Exactly so many bytes: cupyx.empty_pinned takes up to twice as many, and keeps them.

        Where no more can be pinned it is memory like any other: copies are waited for then.
        """
        if size == 0:
            return np.empty(0, "uint8")
        cuda = self.xp.cuda
        try:
            memory = cuda.PinnedMemoryPointer(cuda.PinnedMemory(size), 0)
        except cuda.runtime.CUDARuntimeError:
            return np.empty(size, "uint8")
        return np.frombuffer(memory, "uint8", size)

    def fill(self, into: Array, x: Array) -> None:
        """By a plain copy where both lie alike: CuPy takes 8 µs longer to start one itself."""
        alike = into.dtype == x.dtype and into.shape == x.shape
        if alike and into.flags.c_contiguous and x.flags.c_contiguous:
            stream = self.xp.cuda.get_current_stream()
            into.data.copy_from_device_async(x.data, x.nbytes, stream)
        else:
            into[...] = x

    def record(
        self,
        fn: Callable[[], tuple[Array, ...]],
        stream: Any,
        trial: Callable[[], object] | None = None,
    ) -> Callable[[], tuple[Array, ...]]:
        """As a CUDA graph.

        Run once more, or `trial` in its place, before it is captured, so that all is compiled and
        the pool holds about what the graph will need. It may cut that otherwise and take some more:
        CuPy captures in the mode in which CUDA allows that.
        """
        (trial or fn)()
        try:
            stream.begin_capture()
            try:
                y = fn()
            except BaseException:
                with suppress(Exception):  # it says that the capture failed, not why
                    stream.end_capture()
                raise
            graph = stream.end_capture()
        except Exception as error:
            raise Unrecordable(str(error)) from error

        def replay() -> tuple[Array, ...]:
            graph.launch()
            return y

        return replay


workspaces: ContextVar[dict[int, Any] | None] = ContextVar("workspaces", default=None)
"""By stream, the memory that products work in; without it they take new memory each time."""


class _Pool:
    """A memory pool of CuPy's beside its default one; a chunk is used again on its own stream only.

    The default pool is the caller's, and what a graph uses must go to nobody else. CuPy asks which
    device is the current one whatever it is asked of a pool.

    What cuBLASLt works in is kept here too, one workspace for each stream: given back after each
    product it would be cut up for small arrays, and the next product would need another one.
    """

    def __init__(self, cupy: Any, device: Any) -> None:
        self._cupy, self._pool, self._device = cupy, cupy.cuda.MemoryPool(), device
        self._workspaces: dict[int, Any] = {}
        weakref.finalize(self, _emptied, self._pool, self._workspaces, device).atexit = False

    @contextmanager
    def use(self) -> Iterator[None]:
        before = workspaces.set(self._workspaces)
        try:
            with self._cupy.cuda.using_allocator(self._pool.malloc):
                yield
        finally:
            workspaces.reset(before)

    def release(self) -> None:
        if guard.inherited():
            return
        self._workspaces.clear()
        with self._device:
            self._pool.free_all_blocks()

    def unused(self) -> int:
        with self._device:
            kept = sum(int(space.mem.size) for space in list(self._workspaces.values()))
            return int(self._pool.free_bytes()) + kept


_leaving: deque[tuple[Any, Any]] = deque()


def _emptied(pool: Any, workspaces: dict[int, Any], device: Any) -> None:
    """Empty a pool that nobody has any more, now or when the last array in it is gone.

    CuPy's pools lose the memory that they hold unused when they are dropped, and an exception may
    keep arrays alive beyond their pool.
    """
    if guard.inherited():
        return
    workspaces.clear()
    _leaving.append((pool, device))
    for _ in range(len(_leaving)):
        with suppress(IndexError):  # another thread had it
            pool, device = _leaving.popleft()
            with device:
                pool.free_all_blocks()
                if pool.used_bytes():
                    _leaving.append((pool, device))
