"""Races on the device: a table of how the contenders did, and what they say of it."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import pairwise
from statistics import median

import numpy as np

import race
from gpu.here import ROOT, Figures, Here, Values
from networks import Task
from nnxp.floor import FLOOR

PROCESS = ROOT / "bench/entrant.py"
OURS = (FLOOR, "nnxp", "nnxp-host", "nnxp-eager", "copy")


def raced(here: Here, names: Iterable[str], task: Task) -> tuple[Values, Values, Values]:
    """A table of how the contenders did, their seconds in each round, and what they say of it."""
    due = {name: task.expected(name) for name in ("", FLOOR, "copy") if name in ("", *names)}
    found = race.race(
        [
            race.Contender(name, (sys.executable, PROCESS, name, str(task)), due.get(name, due[""]))
            for name in names
        ],
        title=str(task),
        rows=task.network.rows,
        rounds=here.sized(7, 1),
        turn=here.sized(0.1, 0.001),
        pause=here.sized(0.02, 0.0),
        patience=90.0,
        settings={"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        say=lambda line: print(line, flush=True),
    )
    rounds = {
        each.name: [second / each.about["calls"] for second in each.seconds]
        for each in found.results
        if each.seconds
    }
    sizes = task.network.sizes
    work = 2 * task.network.rows * sum(a * b for a, b in pairwise(sizes))
    table: Values = {}
    for each in found.results:
        if each.problem:
            table[each.name] = {"problem" if each.name in OURS else "out": each.problem}
            continue
        low, middle, high = np.percentile(rounds[each.name], [25, 50, 75]).tolist()
        row = {"µs": middle * 1e6, "lower": low * 1e6, "upper": high * 1e6}
        row["TFLOP/s"] = work / middle / 1e12
        if FLOOR in rounds:
            row["of the floor"] = ratio(rounds[FLOOR], rounds[each.name])
        table[each.name] = row | {"error": each.error}
    said = {
        each.name: {"setting": each.about.get("setting"), **each.about.get("versions", {})}
        for each in found.results
        if each.about
    }
    return table, rounds, said


def ratio(ones: Iterable[float], others: Iterable[float]) -> float:
    """The median of the quotients of the same rounds."""
    return median(a / b for a, b in zip(ones, others, strict=True))


def races(here: Here, names: Iterable[str], tasks: dict[str, Task]) -> Figures:
    """A race for each task."""
    for title, task in tasks.items():
        table, rounds, said = raced(here, names, task)
        yield title, table
        yield f"{title}: seconds by rounds", rounds
        yield f"{title}: settings", {"all": [said]}


def resident(here: Here, names: Iterable[str]) -> Figures:
    """The large network in all precisions, on rows that are on the device."""
    kinds = ("fp32", "bf16", "tf32", "fp16")  # the ones that most is to be learnt of come first
    tasks = {each: Task(here.large, each, "stream", here.backend) for each in kinds}
    yield from races(here, names, tasks)
