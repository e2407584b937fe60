"""A model over the chunks of a Dask array: for people whose rows are one already."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from nnxp._arrays import HostArray
from nnxp._errors import DtypeMismatch, ShapeError
from nnxp.cluster.blocks import Setting, computed, engine_of, result_of_zeros
from nnxp.cluster.plan import Plan, sha256
from nnxp.io._atomic import path_of


def predict(model: str | os.PathLike[str], x: Any, *, precision: str | None = None) -> Any:
    """The model's output for every row of a Dask array, as a Dask array with the same chunks.

    model: a file, as `nnxp.save` writes it, that all workers see by this name; each worker process
    loads it once. x (rows, ...): its chunks are whole rows, or are made so.

    Nothing is computed here but the shape of a row of the result. `nnxp.cluster.sweep` is for what
    has to outlive a kill.

        y = nnxp.cluster.dask.predict("net.safetensors", dask.array.from_zarr("x.zarr"))

    Raises ShapeError or DtypeMismatch if the rows do not fit the model, OptionError for a model of
    several results.
    """
    from nnxp.io.checkpoint import load

    if not (hasattr(x, "map_blocks") and hasattr(x, "rechunk")):
        raise DtypeMismatch(f"x is a Dask array, not {type(x).__name__}; nnxp.predict takes others")
    if x.ndim == 0:
        raise ShapeError("x is (rows, ...) but has no axis at all")
    path = os.path.abspath(path_of(model))
    example = result_of_zeros(load(path), x.shape[1:], x.dtype)
    x = x.rechunk(dict.fromkeys(range(1, x.ndim), -1))
    plan = Plan("", path, sha256(path), (), example.shape[1:], example.dtype.name, 1, precision)
    row = example.shape[1:]
    return x.map_blocks(
        _answer, plan, dtype=example.dtype, drop_axis=list(range(1, x.ndim)),
        new_axis=list(range(1, 1 + len(row))), chunks=(x.chunks[0], *((n,) for n in row)),
        meta=np.empty((0, *row), example.dtype),
    )  # fmt: skip


def _answer(rows: HostArray, plan: Plan) -> Any:
    return computed(engine_of(plan, Setting()), rows)
