"""The command `nnxp sweep`, below its options."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnxp._errors import BackendUnavailable, OptionError
from nnxp.cluster.folder import Status, status
from nnxp.cluster.sweeping import Report, sweep
from nnxp.cluster.verifying import Verified, verify


def run(
    model: Path, rows: Sequence[Path], output: Path | None, dask: str | None, **options: Any
) -> Report | Status | Verified:
    """A sweep, or, without an output, what `status FOLDER` and `verify FOLDER` find."""
    if output is None:
        if len(rows) == 1 and str(model) == "status":
            return status(rows[0])
        if len(rows) == 1 and str(model) == "verify":
            return verify(rows[0])
        raise OptionError(
            "a sweep needs a folder for its results, -o FOLDER; nnxp sweep status FOLDER and "
            "nnxp sweep verify FOLDER tell about one"
        )
    if dask is None:
        return sweep(model, rows, output, progress=True, **options)
    if options.pop("processes", None) is not None:
        raise OptionError("give --dask, whose workers do the blocks, or --processes, not both")
    with _executor(dask) as executor:
        return sweep(model, rows, output, executor=executor, progress=True, **options)


@contextmanager
def _executor(address: str) -> Iterator[Executor]:
    """The workers of a Dask scheduler."""
    try:
        from importlib import import_module

        distributed: Any = import_module("distributed")
    except ImportError:
        raise BackendUnavailable(
            "--dask needs Dask", "pip install 'nnxp[cluster]' brings it"
        ) from None
    try:
        client: Any = distributed.Client(address, timeout=20)
    except (OSError, ValueError) as error:
        raise BackendUnavailable(f"--dask {address}: no scheduler answers there: {error}") from None
    with client:
        if not client.scheduler_info().get("workers"):
            raise BackendUnavailable(
                f"--dask {address}: this scheduler has no workers", "Start some first"
            )
        yield client.get_executor()
