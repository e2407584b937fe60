"""The process of one contender in a race:

python bench/entrant.py NAME "784-4096-4096-10 relu 65536 fp16 stream cupy 0.5"
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from contenders import Array, Built, Run, rivals
from networks import Task
from race import serve


class Answer:
    """A result that is still where it was computed; as an array it is the rows that are checked."""

    def __init__(self, task: Task, built: Built, y: Array) -> None:
        self.task, self.built, self.y = task, built, y

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return self.task.checked(self.built.host(self.y))


def turn(task: Task, built: Built) -> tuple[Run, int]:
    """What a race calls: one call of the contender or many, waited for, and how many they are.

    Calls of a "stream" follow each other, and are timed from one wait to another, by the same
    clock for all: JAX lends nobody its stream to put events into.
    """
    if task.on_cpu:
        return built.run, 1
    calls = built.calls() if task.waits == "stream" else 1
    return lambda: Answer(task, built, built.many(calls)), calls


def prepare(name: str, task: Task) -> None:
    """The variables that are read once, when a library is loaded."""
    if task.on_cpu:
        os.environ |= {"JAX_PLATFORMS": "cpu", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    if name == "naive" and task.tf32:
        os.environ["CUPY_TF32"] = "1"


def main() -> None:
    name, task = sys.argv[1], Task.parse(sys.argv[2])
    prepare(name, task)
    rival = rivals(task.on_cpu)[name]
    problem: ImportError | None = None
    try:  # before the race hears of us, so that all load at the same time
        needed = [each for each in rival.modules if each != "cupy" or task.backend == "cupy"]
        modules = [importlib.import_module(each) for each in needed]
    except ImportError as error:
        problem = error
    _ = task.rows, task.layers

    def build() -> tuple[Run, dict[str, Any]]:
        if problem is not None:
            raise problem
        built = rival.build(task)
        run, calls = turn(task, built)
        versions = {each.__name__: getattr(each, "__version__", "") for each in modules}
        return run, {"versions": versions, "setting": built.setting, "calls": calls}

    serve(build)


if __name__ == "__main__":
    main()
