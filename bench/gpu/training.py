"""Steps of plain gradient descent on one batch that is on the device, against others' steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

import training
from gpu.here import Figures, Here, Values

TASKS = ("784-512-256-10 128", "784-1024-1024-10 1024", "cnn 128")


def figures(here: Here) -> Figures:
    for text in here.sized(TASKS, tuple(training.SMALL)):
        yield text, _raced(here, training.Task(text))


def _raced(here: Here, task: training.Task) -> Values:
    place = {"cupy": "cuda"}.get(here.backend, here.backend)
    builders: dict[str, Callable[[training.Task], training.Run]] = {
        "nnxp": partial(training.ours, place=place)
    }
    if here.on_gpu:
        builders |= {
            "torch": partial(training.in_torch, device="cuda"),
            "torch-compile": partial(training.in_torch, device="cuda", compiled=True),
            "jax": training.in_jax,
        }
    table: Values = {}
    for who, build in builders.items():
        try:
            run = build(task)
            off = float(np.max(np.asarray(run())))
        except Exception as error:
            said = f"{type(error).__name__}: {error}"[:300]
            table[who] = {"problem" if who == "nnxp" else "out": said}
            continue
        table[who] = {"error": off}
        if not off <= 6 * training.ERROR:
            table[who]["problem" if who == "nnxp" else "out"] = f"off by {off:.1e} of its way"
            continue
        seconds = here.seconds(run) / training.STEPS
        table[who] |= {"µs": seconds * 1e6, "rows/s": task.rows / seconds}
    return table
