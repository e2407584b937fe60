"""Who computes it, each at the best setting known to us: a file a contender, CPU and GPU together.

A file has `CPU` and `GPU`: by name, a function of a task that gives `Built`; and `MODULES`, what
must be installed. On the CPU `run` takes the host's rows and gives the host's results. On a GPU
the rows are there already, and `run` may come back before the device is done. Where the best
setting depends on the machine, it is found by trial before the race. A further contender is one
file, and its name in FILES.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

from networks import Task
from nnxp.backend._machine import usable_cores
from nnxp.floor import PAUSE, fastest

FILES = "ours numpy torch onnxruntime jax sklearn thinc onnx".split()
BATCH = 0.03  # seconds of calls that are waited for together

Array = Any
Run = Callable[[], Array]


@dataclass(frozen=True)
class Built:
    """What computes a task, a word on its setting, what waits for a result, what brings it back."""

    run: Run
    setting: str = ""
    wait: Callable[[Array], object] = lambda y: None
    host: Callable[[Array], Array] = lambda y: y

    def calls(self, least: float = BATCH) -> int:
        """How many calls take so many seconds."""
        self.wait(self.run())  # compiles, and tries what there is to be tried
        start = time.perf_counter()
        self.wait(self.run())
        return max(1, min(10_000, math.ceil(least / (time.perf_counter() - start))))

    def many(self, calls: int) -> Array:
        """So many calls, waited for once."""
        for _ in range(calls):
            y = self.run()
        self.wait(y)
        return y

    def seconds(self, least: float = BATCH) -> float:
        """What one of many calls takes, the best of three times."""
        calls = self.calls(least)
        return min(fastest(partial(self.many, calls), 0) for _ in range(3)) / calls


@dataclass(frozen=True)
class Rival:
    """How a contender is built, and the modules that it needs, of which versions matter."""

    build: Callable[[Task], Built]
    modules: tuple[str, ...]


def rivals(on_cpu: bool) -> dict[str, Rival]:
    """The contenders by name."""
    files = [import_module(f"contenders.{name}") for name in FILES]
    return {
        name: Rival(build, file.MODULES)
        for file in files
        for name, build in (file.CPU if on_cpu else file.GPU).items()
    }


def tried(task: Task, settings: dict[str, Callable[[], Run]]) -> Built:
    """The setting that is the fastest here; one that fails is not taken."""
    if task.trial == 0:
        first, prepare = next(iter(settings.items()))
        return Built(prepare(), first)
    seconds: dict[str, float] = {}
    failed: Exception | None = None
    for name, prepare in settings.items():
        try:
            run = prepare()
            run()  # compiles, where there is something to compile
            time.sleep(PAUSE)
            seconds[name] = fastest(run, task.trial)
        except ModuleNotFoundError:
            raise
        except Exception as error:
            print(f"{name}: {error!r}", file=sys.stderr)
            failed = error
    if failed is not None and not seconds:
        raise failed
    best = min(seconds, key=lambda name: seconds[name])
    all_tried = "; ".join(f"{name} {took * 1e3:.3g} ms" for name, took in seconds.items())
    return Built(settings[best](), f"{best} (tried: {all_tried})")


def by_threads(prepare: Callable[[int], Run]) -> dict[str, Callable[[], Run]]:
    """All cores, or one: which is better depends on how much there is to do."""
    counts = sorted({usable_cores(), 1})[::-1]
    return {f"{count} threads": partial(prepare, count) for count in counts}
