"""How long few rows take, replayed and computed anew."""

from __future__ import annotations

from gpu.here import Figures, Here
from gpu.races import races
from networks import Task

LATENCY = (1, 16, 64, 512)


def figures(here: Here) -> Figures:
    names = ("nnxp", "nnxp-host", "nnxp-eager", "torch", "torch-host", "torch-graph", "jax")
    tasks = {
        f"{rows} row{'s' * (rows > 1)}": Task(here.narrow.of(rows), "fp32", "each", here.backend)
        for rows in here.sized(LATENCY, (1, 16))
    }
    yield from races(here, names, tasks)
