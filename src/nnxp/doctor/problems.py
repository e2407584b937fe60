"""The problems that the facts show, and what fixes each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from nnxp.doctor.facts import SIMD, Facts, one_line, variable

Severity: TypeAlias = Literal["broken", "slow", "note"]


@dataclass(frozen=True)
class Problem:
    """Something wrong, and the command, or the sentence, that fixes it.

    "broken": what was asked for does not work; "slow": it works, but less well than this machine
    can; "note": it would matter elsewhere, or later.
    """

    severity: Severity
    what: str
    fix: str


def problems_in(facts: Facts) -> tuple[Problem, ...]:
    """The problems that the facts show, the worst first."""
    problems: list[Problem] = []
    for topic, look in TOPICS.items():
        try:
            problems += look(facts)
        except Exception as error:  # a fact is missing
            what = f"{topic}: not all facts could be found out ({one_line(error)})"
            problems.append(Problem("note", what, "nnxp doctor --json"))
    problems.sort(key=lambda problem: ("broken", "slow", "note").index(problem.severity))
    return tuple(problems)


def _asked_for(facts: Facts) -> Iterator[Problem]:
    for name, answer in facts["chosen"].items():
        if answer is None or answer["ok"]:
            continue
        reason, hint = answer["reason"], answer["hint"]
        if name == "workers":
            yield Problem("broken", reason, "unset NNXP_WORKERS")
        elif reason.startswith("NNXP_WORKERS="):
            continue  # the same again: it keeps the CPU from being chosen, too
        elif name == "NNXP_BACKEND" or reason.startswith("NNXP_BACKEND="):
            reason = reason.replace(f"backend={answer['asked']!r}", f"{name}={answer['asked']}", 1)
            yield Problem("broken", f"{reason}. {hint}", "unset NNXP_BACKEND")
        else:
            yield Problem("broken", reason, hint)


def _cuda(facts: Facts) -> Iterator[Problem]:
    """Every cause for which CUDA cannot be used; what the probe itself said if none is known."""
    cuda, cupy = facts["cuda"], facts["backends"]["cupy"]
    refused = [answer for answer in facts["chosen"].values() if answer and not answer["ok"]]
    asked = [answer.get("asked", "") for answer in refused]
    severity: Severity = "note"
    if (cupy is None or not cupy["ok"]) and cuda["traces"]:
        severity = "slow"
        if any(str(name).lower().startswith(("cupy", "cuda")) for name in asked):
            severity = "broken"
    causes = list(_causes(cuda) if cuda["traces"] else _no_card(cuda))
    if not causes and cuda["traces"]:
        answers = [cupy, *(cuda["devices"] or {}).values()]
        causes = [
            (answer["reason"], answer["hint"]) for answer in answers if answer and not answer["ok"]
        ]
    for what, fix in dict.fromkeys(causes):
        yield Problem(severity, what, fix)


def _no_card(cuda: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Without a card nothing is wrong, and nothing is to be installed."""
    wheels = list(cuda["wheels"] or {})
    if len(wheels) > 1:
        yield _several(wheels), f"pip uninstall -y {' '.join(wheels)}"
    elif wheels or cuda["cupy"]:
        yield (
            "CuPy is installed, but no NVIDIA card is seen here",
            "In a container on a machine that has one: --gpus all",
        )


def _several(wheels: list[str]) -> str:
    return (
        f"{len(wheels)} CuPy wheels are installed ({', '.join(wheels)}), and each has overwritten "
        "files of the others"
    )


def _causes(cuda: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Why a card that is there cannot be used."""
    driver, built_for = _major(cuda["driver_cuda"]), _major(cuda["cupy_cuda"])
    traces, wheels, cache = cuda["traces"], list(cuda["wheels"] or {}), cuda["kernel_cache"]
    install = f'pip install "cupy-cuda{12 if driver == 12 else 13}x[ctk]"'
    other_wheel = f"pip uninstall -y {' '.join(wheels)} && {install}"
    too_new = driver is not None and built_for is not None and driver < built_for
    if len(wheels) > 1:
        yield _several(wheels), other_wheel
    if not wheels and cuda["cupy"] is None:
        yield f"CuPy is not installed, and NVIDIA is here: {', '.join(traces)}", install
        return
    if cache and not cache["ok"]:
        yield (
            f"CuPy cannot keep compiled kernels in {cache['reason']}",
            'export CUPY_CACHE_DIR="$(mktemp -d)"',
        )
    elif cuda["cupy"] is None and len(wheels) == 1:
        return  # it cannot be imported, and the probe says why
    at_most = f"the NVIDIA driver runs CUDA {cuda['driver_cuda']} at most"
    if driver is None:
        if "libcuda" not in traces:
            yield (
                f"NVIDIA is here ({', '.join(traces)}), but the driver's library libcuda cannot be "
                "loaded",
                "Install the NVIDIA driver (in a container: --gpus all)",
            )
    elif driver < 12:
        yield (
            f"{at_most}, and CuPy needs 12",
            "Update the NVIDIA driver: 525 is the first for CUDA 12, 580 for CUDA 13",
        )
    elif too_new and len(wheels) < 2:
        yield f"{at_most}, and CuPy was built for {cuda['cupy_cuda']}", other_wheel
    elif not cuda["devices"] and (hidden := variable("CUDA_VISIBLE_DEVICES")) is not None:
        yield (
            f"no GPU is visible, and CUDA_VISIBLE_DEVICES={hidden!r} decides which are",
            "unset CUDA_VISIBLE_DEVICES",
        )
    if cuda["nvrtc"] and not cuda["nvrtc"]["ok"] and not too_new and len(wheels) < 2:
        # Without a wheel, CuPy was built here, or by conda: a wheel would be a second CuPy.
        wheel = next((name for name in wheels if name != "cupy"), None)
        toolkit = f"Install the CUDA toolkit {cuda['cupy_cuda']}, and set CUDA_PATH to it"
        fix = f'pip install "{wheel}[ctk]"' if wheel else toolkit
        yield "NVRTC, which compiles CuPy's kernels, cannot be loaded", fix


def _products(facts: Facts) -> Iterator[Problem]:
    """A GPU that works, without the bindings that make the most of it."""
    cuda, cupy = facts["cuda"], facts["backends"]["cupy"]
    if not (cupy and cupy["ok"]) or cuda["cublaslt"] is None or cuda["cublaslt"]["ok"]:
        return
    bindings = ">=12.9.2,<13" if _major(cuda["cupy_cuda"]) == 12 else ">=13.0.1,<14"
    yield Problem(
        "slow",
        "products on the GPU go through CuPy, which adds passes over memory and cannot replay few "
        f"rows as a CUDA graph: {cuda['cublaslt']['reason']}",
        f'pip install nvmath-python "cuda-bindings{bindings}"',
    )


def _convolutions(facts: Facts) -> Iterator[Problem]:
    """A GPU that works, and the frontend of cuDNN without its library."""
    cuda, cupy = facts["cuda"], facts["backends"]["cupy"]
    asked_for = (cupy and cupy["ok"]) and cuda["cudnn"] and cuda["nvidia-cudnn-frontend"]
    if asked_for and not cuda["cudnn"]["ok"]:
        yield Problem(
            "slow",
            "nvidia-cudnn-frontend is installed, but cuDNN makes no convolutions on the GPU: "
            f"{cuda['cudnn']['reason']}",
            f"pip install nvidia-cudnn-cu{_major(cuda['cupy_cuda'])}",
        )


def _kernels(facts: Facts) -> Iterator[Problem]:
    """NumPy without a fast BLAS, or a BLAS that does not use what the CPU has."""
    blas, simd = facts["numpy"], facts["system"]["simd"]
    if blas["blas"] is None:
        made_with = str(blas["built_with"] or "no BLAS").lower()
        if not any(name in made_with for name in ("openblas", "mkl", "blis", "accelerate")):
            yield Problem(
                "slow",
                f"NumPy {blas['numpy']} was built with {made_with}, which is none of the fast ones",
                "pip install --force-reinstall --only-binary=numpy numpy",
            )
        return
    kernels, ranks = blas["kernels"] or "", list(SIMD)
    made_for = next((name for name in SIMD if kernels.lower() in SIMD[name][1].split()), None)
    if simd is None or made_for is None or ranks.index(made_for) >= ranks.index(simd):
        return
    what = f"this CPU has {simd}, but {blas['blas']} uses its {kernels} kernels, for {made_for}"
    if blas.get("float32_gflops"):
        what += f" ({blas['float32_gflops']} GF/s measured)"
    fix = "pip install --upgrade numpy"
    if (pin := variable("OPENBLAS_CORETYPE")) is not None:
        what += f", because OPENBLAS_CORETYPE={pin} says so"
        fix = "unset OPENBLAS_CORETYPE"
    yield Problem("slow", what, fix)


def _onednn(facts: Facts) -> Iterator[Problem]:
    """The library of the extra is there, and cannot be used."""
    onednn = facts["numpy"]["onednn"]
    if onednn and not onednn["ok"] and not onednn["reason"].endswith("not installed"):
        fix = (
            "apt install libgomp1"
            if "libgomp" in onednn["reason"]
            else 'pip install "nnxp[onednn]"'
        )
        yield Problem("slow", f"nothing goes through oneDNN: {onednn['reason']}", fix)


def _threads(facts: Facts) -> Iterator[Problem]:
    """More or fewer threads than there are cores to use."""
    system, blas, workers = facts["system"], facts["numpy"], facts["chosen"]["workers"]
    quota = system["core_quota"]
    usable = min(system["cores"], math.ceil(quota or system["cores"]))
    pinned = [name for name in _PINS.get(blas["blas"], ()) if variable(name)]
    if pinned and blas["threads"] not in (usable, None):
        settings = ", ".join(f"{name}={variable(name)}" for name in pinned)
        yield Problem(
            "slow",
            f"{settings}: the threads of BLAS are {blas['threads']}, and {usable} cores may be "
            "used. model(x) is slower for it; an Engine over many rows has its own threads",
            f"unset {' '.join(pinned)}",
        )
    if workers and workers["ok"] and workers["count"] != usable:
        by = "NNXP_WORKERS says so" if variable("NNXP_WORKERS") else "so many cores are seen"
        limited = quota and system["cores"] > usable
        yield Problem(
            "slow",
            f"an Engine takes {workers['count']} threads because {by}, where the time of {usable} "
            "cores may be used",
            f"export NNXP_WORKERS={usable}" if limited else "unset NNXP_WORKERS",
        )


_PINS = {
    "openblas": ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS"),
    "mkl": ("MKL_NUM_THREADS", "OMP_NUM_THREADS"),
    "blis": ("BLIS_NUM_THREADS", "OMP_NUM_THREADS"),
}


def _tf32(facts: Facts) -> Iterator[Problem]:
    for name in ("CUPY_TF32", "NVIDIA_TF32_OVERRIDE"):
        if variable(name) not in (None, "", "0"):
            yield Problem(
                "note",
                f"{name}={variable(name)}: on a GPU float32 products are rounded to TF32, a "
                "thousand times less exact",
                f"unset {name}",
            )


def _major(dotted: str | None) -> int | None:
    return int(dotted.partition(".")[0]) if dotted else None


TOPICS = {
    "what was asked for": _asked_for,
    "CUDA": _cuda,
    "products on the GPU": _products,
    "convolutions on the GPU": _convolutions,
    "the kernels of BLAS": _kernels,
    "oneDNN": _onednn,
    "threads": _threads,
    "TF32": _tf32,
}
