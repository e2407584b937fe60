"""The large network on rows in host memory, against the larger of copying and computing."""

from __future__ import annotations

from gpu.here import Figures, Here
from gpu.races import raced, ratio
from networks import Task
from nnxp.floor import FLOOR


def figures(here: Here) -> Figures:
    for each in ("fp32", "bf16"):
        task = Task(here.large, each, "stream", here.backend)
        table, rounds, said = raced(here, (FLOOR, "copy", "nnxp-host", "torch-host"), task)
        for name in rounds:
            if {FLOOR, "copy"} <= rounds.keys():
                larger = map(max, rounds[FLOOR], rounds["copy"])
                table[name]["of the larger of floor and copy"] = ratio(larger, rounds[name])
        yield each, table
        yield f"{each}: seconds by rounds", rounds
        yield f"{each}: settings", {"all": [said]}
