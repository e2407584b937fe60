"""The machine, as nnxp doctor sees it."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version

import nnxp
from gpu.here import Figures, Here, why_no_lt
from nnxp.doctor import diagnose
from nnxp.testing import goldens


def figures(here: Here) -> Figures:
    found = diagnose(here.backend).to_dict()
    card = (found["cuda"].get("devices") or {}).get("cuda:0", {})
    system, cuda = found["system"], found["cuda"]
    yield (
        "machine",
        {
            "gpu": card.get("name"),
            "compute capability": card.get("compute_capability"),
            "memory": card.get("memory"),
            "driver": cuda.get("driver"),
            "driver's CUDA": cuda.get("driver_cuda"),
            "CuPy": cuda.get("cupy"),
            "CuPy's CUDA": cuda.get("cupy_cuda"),
            "cuBLASLt": (cuda.get("cublaslt") or {}).get("reason"),
            "cpu": system["cpu"],
            "cores": system["cores"],
            "python": system["python"],
            "nnxp": nnxp.__version__,
            "sources": goldens.source_hash(),
        },
    )
    if here.on_gpu:
        yield "products", {"not through cuBLASLt, because": why_no_lt()}
    names = """numpy cupy-cuda13x cupy-cuda12x nvmath-python cuda-bindings nvidia-cublas torch
        triton jax jaxlib ml_dtypes safetensors pytest""".split()
    yield "versions", {name: there for name in names if (there := _version(name))}
    yield "doctor's problems", {str(i): each for i, each in enumerate(found["problems"], 1)}
    yield "doctor", {"all": [found]}
    yield "nvidia-smi", {"lines": _lines_of("nvidia-smi")}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _lines_of(*command: str) -> list[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [str(error)]
    return (done.stdout + done.stderr).splitlines()
