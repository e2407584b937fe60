"""Processes that leave nothing behind: each has a group of its own, and is ended with it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any


def start(command: Sequence[str | Path], **options: Any) -> subprocess.Popen[Any]:
    """The command, in a group of its own."""
    words = [str(word) for word in command]
    return subprocess.Popen(words, start_new_session=True, **options)


def end(process: subprocess.Popen[Any], patience: float = 0.0) -> None:
    """End the process and what it has started; for so long it may end by itself, when asked to."""
    if not hasattr(os, "killpg"):
        process.kill()
        process.wait()
        return
    for number in (signal.SIGTERM, signal.SIGKILL) if patience else (signal.SIGKILL,):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience or None)
