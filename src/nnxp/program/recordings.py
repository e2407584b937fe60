"""What is recorded of a program on the CPU, kept by the number of rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from nnxp._arrays import HostArray
from nnxp.program.program import Program
from nnxp.program.recording import Recording

MOST_IDLE = 32  # numbers of rows that recordings wait for
MOST_KEYS = 256  # that are remembered
IDLE_BYTES = 64 << 20  # of their buffers; beyond, those of other numbers are let go


class Recordings:
    """A program for host rows of any number: `recordings(rows, out)` fills `out`.

    It may be called by several threads at once: each takes a recording of its own. Where memory is
    to be spared, one is kept only while blocks go on being of one size.
    """

    def __init__(self, program: Program, sparing: bool = False) -> None:
        self._program, self._sparing = program, sparing
        self.outputs = program.outline(1)
        self.several = program.several
        self._idle: dict[Any, list[Recording]] = {}

    def __call__(self, rows: tuple[HostArray, ...], out: tuple[HostArray, ...]) -> None:
        into = tuple(
            array if array.flags.carray and array.dtype == dtype
            else np.empty(array.shape, dtype)
            for array, (_, dtype) in zip(out, self.outputs, strict=True)
        )  # fmt: skip
        self.answer((len(rows[0]), *(x.dtype for x in rows)), *rows, *into)
        for array, result in zip(out, into, strict=True):
            if result is not array:
                with np.errstate(all="ignore"):
                    np.copyto(array, result, casting="same_kind")

    def answer(self, key: tuple[Any, ...], *arrays: HostArray) -> Any:
        """The results for these inputs, in the arrays behind them, or in new ones.

        The key is the number of rows, and the types of the inputs.
        """
        idle = self.waiting(key)
        recording = self.take(idle, key)
        results = recording.answer(*arrays)
        idle.append(recording)
        return results

    @property
    def idle(self) -> int:
        """The bytes that recordings hold which wait for the next call."""
        kept = [list(recordings) for recordings in list(self._idle.values())]
        return sum(recording.nbytes for recordings in kept for recording in recordings)

    def spare(self, most: int) -> None:
        """Keep no recordings that hold more bytes than so many."""
        for kept in list(self._idle.values()):
            kept[:] = [recording for recording in kept if recording.nbytes <= most]

    def waiting(self, key: tuple[Any, ...]) -> list[Recording]:
        """The recordings for this key that nobody runs; who takes one out puts it back."""
        return self._idle.setdefault(key, [])

    def take(self, idle: list[Recording], key: tuple[Any, ...]) -> Recording:
        """A recording for this caller alone; if it is new, those for other keys may be let go."""
        try:
            return idle.pop()
        except IndexError:
            pass
        others = [kept for other, kept in list(self._idle.items()) if kept and other != key]
        held = sum(recording.nbytes for kept in others for recording in list(kept))
        if self._sparing or held > IDLE_BYTES or len(others) >= MOST_IDLE:
            for kept in others:
                kept.clear()
        if len(self._idle) > MOST_KEYS:
            self._idle = {key: idle}
        return Recording(self._program, key[0], key[1:])


class HostRecording:
    """Host rows of one type and shape, answered without asking anything: `host(x)`."""

    def __init__(self, recordings: Recordings, like: HostArray) -> None:
        self._recordings, self._key = recordings, (len(like), like.dtype)
        self._idle: list[Recording] = []

    def host(self, x: HostArray) -> Any:
        """The answer, a new array, or a tuple of several."""
        idle = self._idle
        try:
            recording = idle.pop()
        except IndexError:
            self._idle = idle = self._recordings.waiting(self._key)
            recording = self._recordings.take(idle, self._key)
        y = recording.answer(x)
        idle.append(recording)
        return y
