"""Milliseconds from host memory by the rows of a block: what BLOCK_ROWS should be."""

from __future__ import annotations

import time
from statistics import median
from unittest.mock import patch

import nnxp
from gpu.here import Figures, Here, Values
from networks import Task
from nnxp.backend import _blocks


def figures(here: Here) -> Figures:
    sizes = here.sized([2048 << i for i in range(7)], [64, 128])
    rows = here.sized(262144, 300)
    for title, net, kind in (
        ("large, bf16", here.large.of(rows), "bf16"),
        ("narrow, fp32", here.narrow.of(rows), "fp32"),
        ("large, fp32", here.large.of(rows // 2), "fp32"),
    ):
        task = Task(net, kind, "each", here.backend)
        table: Values = {"as it is": _through(here, task)}
        for size in sizes:
            with patch.multiple(_blocks, BLOCK_ROWS=(size, size), BLOCK_BYTES=1 << 40):
                table[str(size)] = _through(here, task)
        yield title, table


def _through(here: Here, task: Task) -> Values:
    """How long the rows of a task take from host memory and back, and how they are cut."""
    try:
        with nnxp.Engine(task.model(), here.backend) as engine:
            plan = engine.plan(task.rows.shape)
            took = []
            for _ in range(4):
                start = time.perf_counter()
                engine(task.rows)
                took.append(time.perf_counter() - start)
    except Exception as error:
        return {"problem": f"{type(error).__name__}: {error}"[:300]}
    times = {"ms": median(took[1:]) * 1e3, "least": min(took[1:]) * 1e3}
    return times | {"rows": plan.rows, "lanes": plan.workers}
