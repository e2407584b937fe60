"""How far a sweep is: told by a bar, or to a function of the caller's."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from nnxp._errors import OptionError

Progress = bool | Callable[[int, Any], object]


@contextmanager
def reported(rows: int | None, progress: Progress) -> Iterator[Callable[..., None]]:
    """What hears of finished rows, from any thread, while so many rows are swept, None for any.

    With True it moves a bar on stderr, where somebody looks at it: on a terminal and in a notebook;
    numbers by name stand behind it. A bar that cannot be drawn ends no work. A function is called
    with the rows done and the rows in all, by one thread at a time; what it raises ends the sweep.
    """
    if not (isinstance(progress, bool) or progress is None or callable(progress)):
        raise OptionError(
            "progress is True, False, or a function of the rows done and the rows in all, "
            f"not {progress!r:.60}"
        )
    lock, finished = threading.Lock(), 0
    bar = _bar(rows) if progress is True else None

    def done(count: int, **numbers: float) -> None:
        nonlocal finished
        with lock:
            finished += count
            if bar is not None:
                with suppress(Exception):
                    bar.set_postfix(numbers, refresh=False)
                    bar.update(count)
            else:
                progress(finished, rows)  # type: ignore[operator]

    try:
        yield (lambda count, **numbers: None) if bar is None and not callable(progress) else done
    finally:
        if bar is not None:
            with suppress(Exception):
                bar.close()


def _bar(rows: int | None) -> Any:
    """A bar of tqdm's; None where nobody would see it."""
    try:
        if not ("ipykernel" in sys.modules or sys.stderr.isatty()):
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a notebook without widgets gets a bar of text
            from tqdm.auto import tqdm

        class Bar(tqdm):  # type: ignore[misc]
            monitor_interval = 0  # without a thread of its own,
            _lock = threading.RLock()  # and without a lock among processes

        return Bar(total=rows, unit=" rows", unit_scale=True)
    except Exception:  # stderr is None, closed, or unlike a file
        return None
