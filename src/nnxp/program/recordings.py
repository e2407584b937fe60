"""What is recorded of a program on the CPU, kept by the number of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nnxp._arrays import HostArray
from nnxp.program.program import Program
from nnxp.program.recording import Recording

MOST_IDLE = 32  # numbers of rows that recordings wait for
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
            array if array.flags.c_contiguous and array.dtype == dtype
            else np.empty(array.shape, dtype)
            for array, (_, dtype) in zip(out, self.outputs, strict=True)
        )  # fmt: skip
        self.fill((len(rows[0]), *(each.dtype for each in rows)), rows, into)
        for array, result in zip(out, into, strict=True):
            if result is not array:
                with np.errstate(all="ignore"):
                    np.copyto(array, result, casting="same_kind")

    def fill(
        self, key: tuple[Any, ...], inputs: Sequence[HostArray], results: Sequence[HostArray]
    ) -> None:
        """The results, new arrays of the program's types, by a recording for this key.

        The key is the number of rows, and the types of the inputs.
        """
        idle, recording = self._take(key)
        recording(inputs, results)
        idle.append(recording)

    @property
    def idle(self) -> int:
        """The bytes that recordings hold which wait for the next call."""
        return sum(each.nbytes for kept in list(self._idle.values()) for each in list(kept))

    def spare(self, most: int) -> None:
        """Keep no recordings that hold more bytes than so many."""
        for kept in list(self._idle.values()):
            kept[:] = [each for each in kept if each.nbytes <= most]

    def _take(self, key: tuple[Any, ...]) -> tuple[list[Recording], Recording]:
        """A recording for this caller alone, and the list to put it into afterwards."""
        idle = self._idle.setdefault(key, [])
        try:
            return idle, idle.pop()
        except IndexError:
            pass
        others = [kept for other, kept in list(self._idle.items()) if other != key]
        held = sum(each.nbytes for kept in others for each in list(kept))
        if self._sparing or held > IDLE_BYTES or len(others) >= MOST_IDLE:
            self._idle = {key: idle}
            for kept in others:
                kept.clear()
        return idle, Recording(self._program, key[0], key[1:])


class HostRecording:
    """Host rows of one type and shape, answered without asking anything: `host(x)`."""

    def __init__(self, recordings: Recordings, like: HostArray) -> None:
        self._recordings, self._key = recordings, (len(like), like.dtype)
        self._outlines = [((len(like), *shape[1:]), dtype) for shape, dtype in recordings.outputs]

    def host(self, x: HostArray) -> Any:
        """The answer, a new array, or a tuple of several."""
        results = [np.empty(*outline) for outline in self._outlines]
        self._recordings.fill(self._key, (x,), results)
        return tuple(results) if self._recordings.several else results[0]
