"""The clock: contenders in processes of their own, found right first, and then timed in turns.

A contender is a command. Its process obeys the lines on its stdin, and answers each, and its own
start, with a line of JSON on its stdout:

    (start)        {}
    build          builds its network: {} or {"absent": what is not installed}
    check PATH     computes once and leaves the result in PATH (.npy)
    warm SECONDS   computes for that long; "seconds" are those of the fastest call
    time CALLS     one call that does not count, then CALLS that do; "seconds" are those of one,
                   "cpu" those that all threads were at work in all of the calls
    (end of file)  ends

`serve` is all of that for a contender written in Python, and loads nothing that could get in its
way: the parent alone loads the parity kit.
"""

from __future__ import annotations

import json
import os
import queue
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nnxp._comparison import Comparison, Result, count, here, pins
from nnxp.floor import FLOOR, PAUSE, TURN, Run, calls_in, fastest, timed
from process import end, start

if TYPE_CHECKING:
    from nnxp.testing.parity import Output

ABSENT = "not installed"


@dataclass(frozen=True)
class Contender:
    """Who takes part: a name, the command of its process, and the result that is due."""

    name: str
    command: Sequence[str | Path]
    expected: Output


def race(
    contenders: Sequence[Contender],
    *,
    title: str,
    rows: int,
    rounds: int = 15,
    turn: float = TURN,
    pause: float = PAUSE,
    patience: float = 600.0,
    seed: int = 0,
    settings: Mapping[str, str] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Start every contender, check what each computes, then time those that are right, in turns.

    A turn is about `turn` seconds of one contender's work, and comes `pause` seconds after the
    one before, when idle threads have gone to sleep; in each round everybody has one, in an order
    drawn with `seed`. Whoever crashes, is wrong, or does not answer within `patience` seconds is
    out, and the result says why. Whoever is called FLOOR is the floor of the others. `settings`
    are variables for the contenders' processes, which start without PINS. `say` hears what goes on.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nnxp-race-")))
        settings = dict(settings or {})
        unset = {name: value for name, value in pins().items() if name not in settings}
        kept = {name: value for name, value in os.environ.items() if name not in pins()}
        children = [
            stack.enter_context(_running(each, {**kept, **settings}, folder / str(i), patience))
            for i, each in enumerate(contenders)
        ]
        say(f"{title}, {count(rows, 'row')}: who is there, and right?")
        for step in (_Child.start, _Child.build, _Child.check, lambda child: child.warm(turn)):
            for child in children:  # they start together; the rest is one after the other
                child.attempt(step)
        order = random.Random(seed)
        for number in range(rounds):
            say(f"{title}, {count(rows, 'row')}: round {number + 1} of {rounds}")
            racing = [child for child in children if not child.problem]
            for child in order.sample(racing, len(racing)):
                time.sleep(pause)
                child.attempt(_Child.take_turn)
        floor = next((child for child in children if child.contender.name == FLOOR), None)
        results = tuple(child.result(floor) for child in children)
    place = here() | {"settings": settings, "unset": unset}
    place["blas"] = next((each.about["blas"] for each in results if each.about.get("blas")), [])
    return Comparison(title, rows, rounds, place, results)


class _Out(Exception):
    """A contender that is out of the race, and why."""


class _Child:
    """A contender's process."""

    def __init__(
        self, contender: Contender, environment: dict[str, str], path: Path, patience: float
    ) -> None:
        self.contender, self.path, self.patience = contender, path, patience
        self.problem = ""
        self.error: float | None = None
        self.seconds: list[float] = []
        self.cpu: list[float] = []
        self.calls = 1
        self.said: dict[str, Any] = {}
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        with open(path.with_suffix(".err"), "wb") as errors:
            self.process = start(
                contender.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                encoding="utf-8",
                errors="replace",
                env=environment,
            )
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self.lines.put(line)
        self.lines.put("")

    def attempt(self, step: Callable[[_Child], None]) -> None:
        """One step of the race; whoever fails in it is out."""
        if not self.problem:
            try:
                step(self)
            except _Out as out:
                self.problem = str(out)
                self.kill()

    def start(self) -> None:
        """Wait until it has started."""
        self._answer("its start")

    def build(self) -> None:
        """Let it build its network, or find by trial how it is best built."""
        self.said |= self._ask("build")
        if "absent" in self.said:
            raise _Out(f"{ABSENT}: {self.said['absent']}")

    def check(self) -> None:
        """Compare its result with what is due."""
        from nnxp.testing.parity import compare

        path, due = self.path.with_suffix(".npy"), self.contender.expected
        self.said |= self._ask(f"check {path}")
        try:
            made = np.load(path)
        except (OSError, ValueError) as error:
            raise _Out(f"it left no result: {error}") from None
        path.unlink()
        if made.dtype.kind == "V":  # a .npy file has no name for bfloat16
            made = made.view(due.dtype)
        if made.dtype != due.dtype:
            raise _Out(f"its result is {made.dtype}, not {due.dtype}")
        judged = compare("", "", "cpu", made, due.value, due.error)
        self.error = judged.ratio if isfinite(judged.ratio) else None  # JSON knows no infinity
        if not judged.ok:
            raise _Out(f"its result is wrong: {judged.problem}")

    def warm(self, turn: float) -> None:
        """Compute for a turn, and find out how many calls make one."""
        self.calls = calls_in(turn, self._seconds(f"warm {turn}"))

    def take_turn(self) -> None:
        """One turn on the clock."""
        self.seconds.append(self._seconds(f"time {self.calls}"))
        if "cpu" in self.said:
            self.cpu.append(self.said["cpu"] / (self.calls + 1))

    def _seconds(self, line: str) -> float:
        answer = self._ask(line)
        seconds = answer.get("seconds")
        if not (isinstance(seconds, float) and seconds > 0):
            raise _Out(f"its answer to {line!r} is {answer!r:.100}")
        self.said |= answer
        return seconds

    def _ask(self, line: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        with suppress(OSError):  # if it has ended, there is no answer either, and that says why
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()
        return self._answer(repr(line))

    def _answer(self, asked: str) -> dict[str, Any]:
        try:
            line = self.lines.get(timeout=self.patience)
        except queue.Empty:
            raise _Out(f"no answer to {asked} within {self.patience:g} s") from None
        if not line:
            raise _Out(f"its process ended with code {self.process.wait()}{self._last_words()}")
        try:
            answer = json.loads(line)
            return {str(key): value for key, value in answer.items()}
        except (ValueError, AttributeError):
            raise _Out(f"its answer to {asked} is {line.strip()!r:.100}") from None

    def _last_words(self) -> str:
        lines = self.path.with_suffix(".err").read_text(errors="replace").strip().splitlines()
        return f": {lines[-1].strip():.300}" if lines else ""

    def kill(self) -> None:
        """End the process and all that it started."""
        assert self.process.stdin is not None
        with suppress(OSError):  # a line may still have been on its way
            self.process.stdin.close()
        end(self.process)

    def close(self) -> None:
        """Let it end by itself, or end it."""
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        self.kill()

    def result(self, floor: _Child | None) -> Result:
        if self.problem:
            return Result(self.contender.name, (), (), self.error, self.problem)
        return Result(
            name=self.contender.name,
            seconds=tuple(self.seconds),
            floor=() if floor is None or floor.problem else tuple(floor.seconds),
            error=self.error,
            rest_bytes=self.said.get("rest_bytes"),
            peak_bytes=self.said.get("peak_bytes"),
            about=self.said.get("about", {}),
            cpu=tuple(self.cpu),
        )


@contextmanager
def _running(
    contender: Contender, environment: dict[str, str], path: Path, patience: float
) -> Iterator[_Child]:
    child = _Child(contender, environment, path, patience)
    try:
        yield child
    except BaseException:
        child.kill()
        raise
    child.close()


# a contender's side


def serve(build: Callable[[], tuple[Run, Mapping[str, Any]]]) -> None:
    """Take part in a race: build, then obey stdin until it ends.

    `build` gives what is to be timed, and what there is to say about it, for JSON; a module that
    it does not find is not installed. Whatever else the process prints goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    answer()
    for line in sys.stdin:
        order, _, rest = line.strip().partition(" ")
        if order == "build":
            try:
                run, about = build()
            except ModuleNotFoundError as error:
                answer(absent=str(error))
                return
            answer(rest_bytes=_memory("VmRSS"))
        elif order == "check":
            np.save(rest, run())
            answer(about={**about, "blas": here()["blas"]}, peak_bytes=_memory("VmHWM"))
        else:
            before = time.process_time()
            seconds = {"warm": fastest, "time": timed}[order](run, json.loads(rest))
            cpu = time.process_time() - before
            answer(seconds=seconds, cpu=cpu, peak_bytes=_memory("VmHWM"))


def _memory(name: str) -> int | None:
    """VmRSS, the bytes that this process holds, or VmHWM, the most it has held.

    Linux alone tells. ru_maxrss does not: in a child it begins with what the parent held.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)
