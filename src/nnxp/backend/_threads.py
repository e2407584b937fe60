"""Worker threads: as many as can be had, and none at work any more when the caller goes on.

Between calls they are kept idle, up to MOST_IDLE of them, rather than started anew.

Threads are an offer. Where no thread can be started (a limit of the system, an interpreter that
shuts down), the caller's own does the work.

Ctrl-C raises KeyboardInterrupt in the main thread, between any two instructions: also between
starting a thread and noting that it runs. So while workers are started, awaited and cleaned up
after, the handlers of signals are run at once, but what they raise is held back until all is done.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from contextvars import Context, copy_context
from functools import partial
from types import FrameType
from typing import Any

PATIENCE = 5.0  # seconds after a first interrupt; then a further one leaves busy workers behind
MOST_IDLE = 2 * (os.cpu_count() or 1)  # threads that wait for work
SIGNALS = "SIGINT SIGBREAK SIGTERM SIGHUP SIGALRM SIGVTALRM SIGPROF SIGUSR1 SIGUSR2".split()


def together(
    works: list[Callable[[], object]],
    stop: Callable[[], object],
    within: Callable[[], AbstractContextManager[object]] | None = None,
) -> None:
    """Run all at once, the first in this thread; when one fails, `stop` takes the others' work.

    Each runs in a copy of the caller's context, so that its np.errstate holds in all of them, and
    in a block of `within()`. What finds no thread runs in this one, after the first. Interrupts are
    let into the first alone.
    """
    if len(works) == 1 and within is None:
        works[0]()
        return
    failures: list[BaseException] = []

    def run(work: Callable[[], object], interrupts: Interrupts | None = None) -> None:
        try:
            with within() if within else nullcontext():
                try:
                    if interrupts:
                        interrupts.open = True
                    work()
                finally:
                    if interrupts:
                        interrupts.open = False
        except BaseException as error:
            failures.append(error)
            stop()

    with Interrupts(stop) as interrupts:
        others = [_idle_or_new() for _ in works[1:]]
        try:
            for other, work in zip(others, works[1:], strict=True):
                other.start(run, work)
            run(works[0], interrupts=interrupts)
            while others:
                others[-1].wait()
                _keep(others.pop())
        finally:
            for other in others:  # that a late interrupt leaves at work
                other.end()
    try:
        if failures:
            raise failures[0]
    finally:
        failures.clear()  # they hold this frame


def one_ahead(function: Callable[[Any], Any], batches: Iterator[Any]) -> Iterator[Any]:
    """What function makes of each batch: one is computed in a thread while the next is read here.

    Nothing is at work while the caller has the answer. An error of the batches comes when it is
    their turn.
    """
    end = object()
    failure: Exception | None = None

    def read() -> Any:
        nonlocal failure
        try:
            return next(batches, end)
        except Exception as error:
            failure = error
            return end

    aside = Aside()
    try:
        batch = read()
        while batch is not end:
            with Interrupts() as interrupts:
                aside.start(function, batch)
                try:
                    interrupts.open = True
                    batch = read()
                finally:
                    interrupts.open = False
                    aside.wait()
            yield aside.result()
        if failure is not None:
            raise failure
    finally:
        failure = None
        aside.close()


class Aside:
    """A thread that makes one call after the other; this one, if no other can be had."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self.cores: Any = None  # that its thread may use, as whoever started it might
        self._asked, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._call: Callable[[], Any] | None = None
        self._value: Any = None
        self._error: BaseException | None = None

    def start(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Begin a call, in a copy of the caller's context."""
        self._call = partial(copy_context().run, function, *arguments)
        self._asked.release()
        if self._thread is None:
            self._thread = started(self._serve)
            self.cores = _cores()

    def wait(self) -> None:
        """Until the call has ended."""
        if self._thread is None:
            self._asked.acquire()
            self._make()
        self._done.acquire()

    def result(self) -> Any:
        """What the call has answered, once; or what it has raised."""
        value, error, self._value, self._error = self._value, self._error, None, None
        try:
            if error is not None:
                raise error
            return value
        finally:
            del error

    def end(self) -> None:
        """No further calls: the thread ends, now or when it is done."""
        self._call = None
        self._asked.release()

    def close(self) -> None:
        """No further calls, and no thread any more, unless it was left at work."""
        self.end()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(0.1)

    def _serve(self) -> None:
        while self._asked.acquire() and self._call is not None:
            self._make()

    def _make(self) -> None:
        call, self._call = self._call, None
        try:
            self._value = call() if call else None
        except BaseException as error:
            self._error = error
        finally:
            del call
            self._done.release()


_idle: list[Aside] = []
"""Those that wait for the next call of `together`: to start a thread takes longer than many a
tile."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.clear)  # a forked child has none of the threads


def _idle_or_new() -> Aside:
    cores = _cores()
    while _idle and not sys.is_finalizing():  # an ending one runs no other threads
        with suppress(IndexError):
            aside = _idle.pop()
            if aside.cores == cores:
                return aside
            aside.end()
    return Aside()


def _cores() -> Any:
    """The cores that this thread may use, where the system tells."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None


def _keep(aside: Aside) -> None:
    """Let it wait for the next call, unless many do."""
    if len(_idle) < MOST_IDLE:
        _idle.append(aside)
    else:
        aside.end()


def started(function: Callable[[], object]) -> threading.Thread | None:
    """A thread that runs the function, and keeps nothing of the caller's context; None if none can
    be had.

    A daemon: whoever was left behind at work keeps no program from its end. While that ends, a
    thread would not come to run.
    """
    if sys.is_finalizing():
        return None
    run = partial(Context().run, function)
    thread = threading.Thread(target=run, name="nnxp", daemon=True)
    try:
        thread.start()
    except (RuntimeError, MemoryError):  # no more threads, or none at this stage of the program
        return None
    return thread


class Interrupts:
    """A block in which signals are heard, but raise nothing until its end.

    Their handlers run as ever; what one raises is kept, `stop` is called, and the end of the block
    raises it. While `open`, one exception may pass at once, into what is running here. So may a
    signal that comes when the block has not ended PATIENCE seconds after a first exception.

    Only the main thread runs handlers; in any other one the block does nothing.
    """

    def __init__(self, stop: Callable[[], object] | None = None) -> None:
        self.open = False
        self._stop = stop
        self._active = False  # while it is not, signals pass as if we were not there
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._held: BaseException | None = None
        self._since: float | None = None

    def __enter__(self) -> Interrupts:
        if threading.get_ident() == threading.main_thread().ident:
            for number in (getattr(signal, name) for name in SIGNALS if hasattr(signal, name)):
                handler = signal.getsignal(number)
                owner = getattr(handler, "__self__", None)
                if isinstance(owner, Interrupts) and not owner._active:
                    handler = owner._handlers[number]  # an exception kept it from being taken away
                if callable(handler):
                    self._handlers[number] = handler
                    with suppress(ValueError):  # not the main interpreter
                        signal.signal(number, self._hear)
        self._active = True  # from here on, and all at once
        return self

    def __exit__(self, *error: object) -> None:
        self._active = False
        self._stop = None
        if self._handlers:
            for number, handler in self._handlers.items():
                if signal.getsignal(number) == self._hear:
                    signal.signal(number, handler)
        held, self._held = self._held, None
        try:
            if held is not None:
                raise held
        finally:
            del held  # else its traceback, which holds this frame, would hold all others for longer

    def _hear(self, number: int, frame: FrameType | None) -> None:
        handler = self._handlers[number]
        late = self._since is not None and time.monotonic() - self._since > PATIENCE
        if not self._active or late:
            handler(number, frame)
            return
        passes, self.open = self.open, False
        try:
            handler(number, frame)
        except BaseException as error:
            self._since = self._since or time.monotonic()
            if passes:
                raise
            self._held = self._held or error
            if self._stop is not None:
                self._stop()
        else:
            self.open = passes
