"""Few rows are recorded, and what is replayed is what is computed anew."""

from __future__ import annotations

from typing import Any

import numpy as np

import nnxp
from gpu.here import DTYPES, Array, Figures, Here, Values
from networks import Task
from nnxp.testing import LIMIT, error_bound
from nnxp.testing.parity import compare


def figures(here: Here) -> Figures:
    for dtype in DTYPES:
        yield dtype, replayed(here, dtype)


def replayed(here: Here, dtype: str) -> Values:
    model = Task(here.narrow).model().astype(dtype)
    engine = nnxp.Engine(model, here.backend)
    calls = same = 0
    largest = 0.0
    for rows in (1, 64):
        for seed in range(6):
            x = here.draw(rows, here.narrow.sizes[0], dtype=dtype, seed=seed)
            there = here.device.put(x)
            anew = nnxp.asnumpy(engine.model(there))
            value, bound = error_bound(model, x)
            made = [engine(x)]
            engine(-x)  # so that what is left of other rows is seen
            made.append(nnxp.asnumpy(engine(there)))
            for y in made:
                calls += 1
                same += np.array_equal(y, anew)
                largest = max(largest, compare("", "", "", y, value, bound).ratio)
    values: Values = {"calls": calls, "same bits as anew": same}
    values["error in units of the bound"] = largest
    if largest > LIMIT:
        values["problem"] = "what is replayed is wrong"
    replica = engine._replicas[0]
    values["recorded"] = len(replica.ready)
    if here.on_gpu and not replica.ready:
        values["problem"] = f"nothing was recorded: {_why_not_recorded(engine, there)}"
    return values


def _why_not_recorded(engine: Any, x: Array) -> str:
    """The engine goes on without a recording; this is what kept it from making one."""
    from nnxp.backend._recording import DeviceRecording
    from nnxp.engine import Kind

    try:
        prepared = engine._replicas[0].prepared((Kind(x.shape[1:], x.dtype, x.dtype),))
        DeviceRecording(engine.backend, prepared.run, x.shape, x.dtype, engine.backend.pool())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "though it can be"
