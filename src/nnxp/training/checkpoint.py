"""A run in a file, so that it can go on: one safetensors file with all that changes in it.

The header's metadata has one entry, "nnxp.run": JSON that says how far the run is, and of what.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from nnxp._arrays import HostArray
from nnxp._errors import CheckpointError
from nnxp.io._atomic import written_beside

VERSION = 1
_KINDS = {
    "of": dict, "seed": int, "epoch": int, "batch": int, "total": float, "seconds": float,
    "history": list, "lowest_epoch": int,
}  # fmt: skip


_ENTRY = {"epoch", "loss", "seconds", "rows_per_second"}
"""What each epoch of a history has, all numbers."""


def _possible(about: Mapping[str, Any]) -> bool:
    """Whether a run can stand there."""
    history = about["history"]
    numbers = [about["lowest"] if about.get("lowest") is not None else 0.0]
    for entry in history:
        if not (isinstance(entry, dict) and entry.keys() >= _ENTRY):
            return False
        numbers += entry.values()
    return (
        all(type(x) in (int, float) for x in numbers)
        and isfinite(about["total"])
        and isinstance(about.get("batches", ""), str)
        and min(about["epoch"], about["batch"], about["seed"], about["lowest_epoch"]) >= 0
        and about["epoch"] == len(history) >= about["lowest_epoch"]
    )


def write_run(path: Path, arrays: Mapping[str, HostArray], about: Mapping[str, Any]) -> None:
    """Write a run: the file is the old one or the new one, whole."""
    from safetensors.numpy import save_file

    text = json.dumps({"version": VERSION, **about})
    with written_beside(path) as beside:
        save_file(
            {name: array.copy() for name, array in arrays.items()}, beside, {"nnxp.run": text}
        )


def read_run(path: Path) -> tuple[dict[str, HostArray], dict[str, Any]]:
    """The arrays of a run, and what is said of it; CheckpointError for any other file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="numpy", backend="pread") as file:
            text = (file.metadata() or {}).get("nnxp.run")
            if text is None:
                raise CheckpointError(
                    f"{path} is not a checkpoint of nnxp.fit; a model is loaded by nnxp.load"
                )
            about = json.loads(text)
            sound = isinstance(about, dict) and about.get("version") == VERSION
            sound = sound and all(type(about.get(k)) is kind for k, kind in _KINDS.items())
            if not (sound and _possible(about)):
                raise CheckpointError(f"{path} says nothing that this nnxp understands")
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118
    except (SafetensorError, ValueError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is no whole checkpoint: {error}") from error
