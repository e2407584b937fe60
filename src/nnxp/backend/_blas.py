"""BLAS at one thread for each worker, whichever thread asks; afterwards as its owners want it.

Some BLAS libraries count their threads for each thread that calls them (MKL, and those built on
OpenMP): there a worker sets its own. OpenBLAS on plain threads, which is in NumPy's wheels, has one
number for the whole process. (So does its `openblas_set_num_threads_local`: measured with 0.3.31,
a worker that called it took the main thread's products to one core, too.) Two things follow:

- threadpoolctl lets only the first thread set that number, and says nothing to the others. So we
  set it ourselves, whichever thread it is.
- Whoever else limits BLAS for a while, with threadpoolctl, would see our 1, and bring it back when
  we are gone. So while workers are at work, we answer in its place: others see, and set, the number
  that BLAS has when the last worker has left. The workers themselves see the 1 that they have.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

from threadpoolctl import ThreadpoolController


class SharedNumber:
    """The number of threads of the BLAS libraries that have one for the whole process."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal's handler may come in while its thread is here
        self._libraries: list[_Library] | None = None
        self._afterwards: dict[str, int] = {}  # by file: what each has when the last has left
        self._workers = 0
        self._inside = threading.local()

    def libraries(self) -> list[_Library]:
        """NumPy's BLAS, and what else has been loaded by the time of the first sweep."""
        with self._lock:
            if self._libraries is None:
                loaded = ThreadpoolController().select(user_api="blas").lib_controllers
                self._libraries = [_Library(blas, self) for blas in loaded]
            return self._libraries

    def enter(self) -> None:
        with self._lock:
            if self._workers == 0:
                shared = [library for library in self.libraries() if not library.for_each_thread]
                self._afterwards = {library.file: library.get() for library in shared}
                for library in shared:
                    library.set(1)
            self._workers += 1
            self._inside.depth = getattr(self._inside, "depth", 0) + 1

    def leave(self) -> None:
        with self._lock:
            if not getattr(self._inside, "depth", 0):
                return  # it entered in the parent of a forked child
            self._inside.depth -= 1
            self._workers -= 1
            if self._workers == 0:
                self._restore()

    def forked(self) -> None:
        """In a forked child none of the parent's workers goes on."""
        self._lock, self._inside, self._workers = threading.RLock(), threading.local(), 0
        self._restore()

    def _restore(self) -> None:
        for library in self._libraries or []:
            number = self._afterwards.get(library.file)
            if number is not None and library.get() == 1:  # else somebody has set it past us
                library.set(number)
        self._afterwards = {}

    def seen(self, file: str) -> int | None:
        """What others than workers see of this library; None when it is what it is."""
        with self._lock:
            own = getattr(self._inside, "depth", 0)
            return None if own else self._afterwards.get(file)

    def postpone(self, file: str, number: int) -> bool:
        """Whether what others than workers set has to wait until the last worker has left."""
        with self._lock:
            waits = self.seen(file) is not None
            if waits:
                self._afterwards[file] = number
            return waits


class _Library:
    """A BLAS library as threadpoolctl found it, with its own functions below what that allows."""

    def __init__(self, blas: Any, shared: SharedNumber) -> None:
        kind = type(blas)
        self.file: str = blas.filepath
        self._mkl = blas.internal_api == "mkl"
        openmp = getattr(blas, "threading_layer", "") == "openmp"
        self.for_each_thread = self._mkl or openmp
        if not self.for_each_thread:
            _answer_in_place_of(kind, shared)
        get, put = getattr(kind, "_nnxp", (kind.get_num_threads, kind.set_num_threads))
        own = partial(openblas_function, blas)
        self.get: Callable[[], int] = own("openblas_get_num_threads") or (lambda: get(blas))
        self.set: Callable[[int], Any] = own("openblas_set_num_threads") or (lambda n: put(blas, n))

    def limit(self) -> Callable[[], object]:
        """One thread for calls from this thread; what undoes it."""
        number = self.get()
        before = self.set(1)
        if self._mkl:  # it answers with what this thread had of its own, 0 for nothing
            number = before
        return lambda: self.set(number)


def openblas_function(blas: Any, name: str) -> Callable[..., Any] | None:
    """OpenBLAS' own function, as it is called in this build: in a tenth of threadpoolctl's time."""
    if blas.internal_api != "openblas" or getattr(blas, "threading_layer", "") == "openmp":
        return None
    names = ("".join(parts) for parts in product(("", "scipy_"), [name], ("", "64_", "_64")))
    return next((getattr(blas.dynlib, name) for name in names if hasattr(blas.dynlib, name)), None)


def _answer_in_place_of(kind: Any, shared: SharedNumber) -> None:
    """From now on threadpoolctl's controller of such libraries asks us first."""
    if hasattr(kind, "_nnxp"):
        return
    # Since 3.8 there is one below the rule of the first thread, which we leave in force.
    setter = (
        "_real_set_num_threads" if hasattr(kind, "_real_set_num_threads") else "set_num_threads"
    )
    get, put = kind.get_num_threads, getattr(kind, setter)

    def get_num_threads(library: Any) -> Any:
        number = shared.seen(library.filepath)
        return get(library) if number is None else number

    def set_num_threads(library: Any, num_threads: int) -> Any:
        if not shared.postpone(library.filepath, num_threads):
            return put(library, num_threads)
        return None

    kind._nnxp = get, put
    kind.get_num_threads = get_num_threads
    setattr(kind, setter, set_num_threads)


_shared = SharedNumber()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_shared.forked)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """BLAS takes one thread for each product of this thread.

    Where the library has one number for all threads, it holds for all until the last such block is
    left.
    """
    _shared.enter()
    undo: list[Callable[[], object]] = []
    try:
        undo += [library.limit() for library in _shared.libraries() if library.for_each_thread]
        yield
    finally:
        for restore in reversed(undo):
            restore()
        _shared.leave()
