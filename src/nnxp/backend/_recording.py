"""Few rows that come again to a device: their work is recorded once and then only replayed."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import prod
from typing import Any, TypeVar

import numpy as np

from nnxp._arrays import Array, HostArray, Shape
from nnxp.backend._device import DeviceBackend, Unrecordable, fits
from nnxp.backend._lanes import Pool, Stream, view


class DeviceRecording:
    """Few rows of one shape and type: the same buffers and the same recorded work at each call.

    Work goes to the caller's current stream. Calls may come from any thread and stream; they follow
    each other. All it has on the device is in `pool`, which is only ever used while recording:
    afterwards what it holds belongs to what was recorded. What is tried before is made in a pool
    that is given up then.
    `run` keeps alive the parameters that it reads where they lie.
    """

    def __init__(
        self,
        backend: DeviceBackend,
        run: Callable[[tuple[Array, ...]], tuple[Array, ...]],
        shape: Shape,
        dtype: np.dtype[Any],
        pool: Pool,
    ) -> None:
        self._backend, self._lock, self._run = backend, threading.Lock(), run
        self._on_device: list[Any] = []  # the rows, and what replays: all that uses the pool
        weakref.finalize(self, _let_go, self._on_device, pool).atexit = False
        with backend.current():
            stream = backend.stream()
            backend.wait(stream, backend.mark(backend.current_stream()))
            with stream:
                with pool.use():
                    x = backend.xp.zeros(shape, dtype)

                def answer() -> tuple[Array, ...]:
                    outputs = run((x,))
                    return tuple(y if y.flags.c_contiguous else y.copy() for y in outputs)

                with backend.pool().use():  # what is compiled and tried out need not be kept
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
            results = tuple(result.copy() for result in self._results)
        return results if len(results) > 1 else results[0]

    def device(self, rows: Array) -> Any:
        """Rows on the device in, results on the device out."""
        self._backend.guard.check()
        with self._lock, self._backend.current():
            stream, (x, replay) = self._follow(), self._on_device
            self._backend.fill(x, rows)
            results = tuple(map(self._backend.copied, replay()))
            self._mark = self._backend.mark(stream)
        return results if len(results) > 1 else results[0]

    def _follow(self) -> Stream:
        """The caller's stream, made to wait for the call before if that was on another one."""
        stream = self._backend.current_stream()
        here = threading.get_ident(), stream  # a default stream may be another in each thread
        if here != self._last:
            self._backend.wait(stream, self._mark)
            self._last = here
        return stream


class StepRecording:
    """Work that was done before with arrays like these, recorded: `step(arrays)` does it again.

    `trial` is as `run`, but may be called once more.
    What else it reads and writes stays where it is, and is kept alive by `run`. One caller at a
    time, who stays on a stream.
    """

    def __init__(
        self,
        backend: DeviceBackend,
        run: Callable[[list[Array]], tuple[Array, ...]],
        trial: Callable[[list[Array]], object],
        arrays: Sequence[Array],
        pool: Pool,
    ) -> None:
        self._backend = backend
        self._on_device: list[Any] = []  # the arrays, and what replays: all that uses the pool
        weakref.finalize(self, _let_go, self._on_device, pool).atexit = False
        with backend.current():
            stream, callers = backend.stream(), backend.current_stream()
            backend.wait(stream, backend.mark(callers))
            with stream, pool.use():
                own = [x.copy() for x in arrays]
                self._on_device += own, backend.record(lambda: run(own), stream, lambda: trial(own))
            backend.wait(callers, backend.mark(stream))

    def __call__(self, arrays: Sequence[Array]) -> tuple[Array, ...]:
        """The results, which are the caller's."""
        own, replay = self._on_device
        with self._backend.current():
            for into, x in zip(own, arrays, strict=True):
                self._backend.fill(into, x)
            return tuple(map(self._backend.copied, replay()))


T = TypeVar("T")


def recorded(kind: Callable[..., T], backend: DeviceBackend, *arguments: Any) -> T | None:
    """A recording of this kind, whose pool is made here; None if none can be made.

    There was no memory just now, or the work cannot be recorded. The pool is emptied when nothing
    of the attempt is left, its exception neither.
    """
    pool = backend.pool()
    recordings: list[T] = []

    def make() -> None:
        with suppress(Unrecordable):
            recordings.append(kind(backend, *arguments, pool))

    try:
        fits(make)
    finally:
        if not recordings:
            pool.release()
    return recordings[0] if recordings else None


def _let_go(on_device: list[Any], pool: Pool) -> None:
    """First what uses the pool, then the pool."""
    on_device.clear()
    pool.release()


def _pinned(backend: DeviceBackend, shape: Shape, dtype: np.dtype[Any]) -> HostArray:
    return view(backend.pinned(prod(shape) * dtype.itemsize), shape, dtype)
