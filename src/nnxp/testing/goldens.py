"""Goldens: what a backend once computed, in a small file that any machine can check.

A machine with a GPU records the outputs of layers; one without holds them against float64, within
the same computed bound as its own. A golden says where it was made and from which sources. It is a
safetensors file without code: its models are described as in a checkpoint, and whoever changes
an input, a parameter or an output by more than rounding is found out by the check itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info

from nnxp._arrays import HostArray, Shape
from nnxp._errors import CheckpointError, OptionError
from nnxp.backend import Backend, asnumpy, get_backend
from nnxp.backend._machine import processor
from nnxp.io._atomic import path_of, written_beside
from nnxp.io.checkpoint import _from_json, _to_json, opened
from nnxp.layers import MODULES
from nnxp.layers._layer import Layer
from nnxp.testing.parity import (
    Check,
    ParityReport,
    _expected,
    _run,
    compare,
    comparisons,
    failed,
    listed,
)

VERSION = 1
PACKAGE = Path(__file__).parents[1]
SOURCES = {".py", ".cu", ".cuh"}


def layer_examples() -> list[tuple[Layer, Shape]]:
    """The examples of every layer of the library that takes one array of floats and answers one.

    With the shapes of rows they take.
    """
    classes = [
        getattr(import_module(f"nnxp.layers.{module}"), name)
        for name, module in sorted(MODULES.items())
    ]
    return [
        (layer, shape)
        for cls in classes
        for layer, shape in cls.examples()
        if not isinstance(shape, list) and layer.takes[:1] != ("int",)
        if type(layer.output_shape(shape)[0]) is int
    ]


def source_hash() -> str:
    """A hash of all the sources of the package, CUDA's too: it changes when any of them does."""
    digest = hashlib.sha256()
    for path in sorted(file for file in PACKAGE.rglob("*") if file.suffix in SOURCES):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def provenance(backend: Backend) -> dict[str, Any]:
    """Where and from what something is computed: date, versions, sources, device, driver."""
    from nnxp import __version__

    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "nnxp": __version__,
        "sources": source_hash(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "numpy": np.__version__,
        "backend": backend.name,
        "device": backend.device,
    }
    if backend.name == "cupy":
        return facts | _cuda(backend)
    blas = [library for library in threadpool_info() if library.get("user_api") == "blas"]
    return facts | {
        "hardware": processor(),
        "blas": " ".join(str(library.get("internal_api")) for library in blas),
        "kernels": " ".join(str(library.get("architecture")) for library in blas),
    }


def _cuda(backend: Backend) -> dict[str, Any]:
    runtime = backend.xp.cuda.runtime
    about = runtime.getDeviceProperties(int(backend.device.partition(":")[2]))
    driver = Path("/proc/driver/nvidia/version")
    return {
        "hardware": about["name"].decode(),
        "compute_capability": f"{about['major']}.{about['minor']}",
        "cupy": backend.xp.__version__,
        "cuda": runtime.runtimeGetVersion(),
        "driver_cuda": runtime.driverGetVersion(),
        "driver": driver.read_text().partition("\n")[0] if driver.exists() else None,
    }


def record(
    path: str | os.PathLike[str],
    backend: str | Backend = "auto",
    cases: Iterable[tuple[Layer, HostArray]] | None = None,
    *,
    dtypes: Sequence[str] = ("float32", "float16"),
) -> int:
    """Write a golden: what each model answers to its rows on this backend; says how many.

    `cases` are models with rows; without them, every layer's examples in each of these dtypes.
    Raises BackendUnavailable, CheckpointError for a model that no file can hold, and OSError.
    """
    from safetensors.numpy import save_file

    path_of(path)
    where = get_backend(backend)
    tensors: dict[str, HostArray] = {}
    models = []
    for i, (model, rows) in enumerate(_examples(dtypes) if cases is None else _pairs(cases)):
        host = model.to("cpu")
        tensors |= {f"{i}.p.{name}": value for name, value in host.parameters().items()}
        with where.current(), np.errstate(all="ignore"):
            tensors[f"{i}.y"] = where.get(host.to(where)(where.put(rows)))
        tensors[f"{i}.x"] = rows
        models.append(_to_json(host))
    about = provenance(where) | {"precision": "as the dtype: no TF32"}
    text = json.dumps({"version": VERSION, "about": about, "models": models})
    with written_beside(path) as beside:
        whole = {name: np.asarray(value, order="C") for name, value in tensors.items()}
        save_file(whole, beside, metadata={"nnxp-golden": text})
    return len(models)


def _pairs(cases: Any) -> Iterator[tuple[Layer, HostArray]]:
    """The cases, if they are models with their rows."""
    for case in cases if isinstance(cases, Iterable) else [cases]:
        if not (isinstance(case, tuple) and len(case) == 2 and isinstance(case[0], Layer)):
            raise OptionError(f"cases are pairs (model, rows), but one of them is {case!r:.60}")
        yield case[0], asnumpy(case[1])


def _examples(dtypes: Sequence[str]) -> Iterable[tuple[Layer, HostArray]]:
    rng = np.random.default_rng(0)
    for dtype in [dtypes] if isinstance(dtypes, str) else dtypes:
        for layer, shape in layer_examples():
            model = layer.astype(dtype)
            yield model, rng.normal(size=shape).astype(model.dtype or dtype)


def about(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Where and from what a golden was recorded; CheckpointError for a file that is none."""
    return _opened(path)[0]["about"]  # type: ignore[no-any-return]


def check(
    path: str | os.PathLike[str], backends: Sequence[str | Backend] = ("numpy",)
) -> ParityReport:
    """Hold a golden against float64, and what these backends compute from its inputs, too.

    In the report the golden's own outputs are on "recorded <device>". Raises CheckpointError for a
    file that is not a golden, or holds a layer that is not known here; nothing in it is run.
    """
    entry, tensors = _opened(path)
    where = f"recorded {entry['about']['device']}"
    chosen = [get_backend(backend) for backend in listed(backends)]
    checks: list[Check] = []
    for i, described in enumerate(entry["models"]):
        try:
            model = _from_json(described, lambda name, i=i: tensors[f"{i}.p.{name}"])  # type: ignore[misc]
            x, y = tensors[f"{i}.x"], tensors[f"{i}.y"]
        except KeyError as error:
            raise CheckpointError(f"{os.fspath(path)}: the tensor {error} is missing") from None
        expected = _expected(model, [x])
        name, what = f"case {i}", f"{model!r} {x.dtype}"
        value, bound, dtype = expected[0]
        if y.dtype == dtype:
            checks.append(compare(name, what, where, y, value, bound))
        else:
            problem = f"the result is {y.dtype}, not {dtype}"
            checks.append(failed(name, what, where, problem))
        checks += [_run(name, what, model, [x], backend, expected) for backend in chosen]
    comparisons.update(
        entry.backend for entry in checks if not entry.backend.startswith("recorded")
    )
    return ParityReport(tuple(checks))


def _opened(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, HostArray]]:
    """The description and the tensors in a golden."""
    with opened(path) as file:
        entry = json.loads((file.metadata() or {}).get("nnxp-golden", "{}"))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    whole = (
        isinstance(entry, dict)
        and entry.get("version") == VERSION
        and isinstance(entry.get("about"), dict)
        and isinstance(entry["about"].get("device"), str)
        and isinstance(entry.get("models"), list)
        and entry["models"]
    )
    if not whole:
        raise CheckpointError(f"{os.fspath(path)} is not a golden of version {VERSION}")
    return entry, tensors
