"""Networks of several kinds on rows that are on the device, and in host memory, against torch, with
its pictures in the order that its convolutions like best; and how near what looks through windows
comes to a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np

import nnxp
from gpu.here import Array, Figures, Here, Values, by_cudnn
from models import drawn, due, rows_of
from nnxp import kernels
from nnxp._arrays import float_dtype

NETWORKS = ("resnet50", "minilm", "lstm", "mobilenet")
ROWS = {"resnet50": 64, "mobilenet": 64, "minilm": 64, "lstm": 1024}
CHECKED = 4  # rows, against float64 on the host
KINDS = {"fp32": "float32", "bf16": "bfloat16", "tf32": "float32", "fp16": "float16"}

Run = Callable[[Any], Any]
"""For rows of the host, what it makes of them there; for None, all of its own on the device."""

Rival = Callable[[Here, Any, str, Array], tuple[Run | None, str]]
"""Of a torch module, a key of KINDS and rows: what runs it, or None and why not."""


def figures(here: Here) -> Figures:
    yield "windows", _windows(here)
    yield from networks(here, {"torch": in_torch})
    if here.on_gpu:
        yield "convolutions by cuDNN", by_cudnn()


def networks(here: Here, rivals: dict[str, Rival]) -> Figures:
    """Each network in each type, against others."""
    try:
        import torch  # noqa: F401
    except ImportError:
        yield "networks", {"all": {"out": "torch is not installed, which draws the weights"}}
        return
    for kind in here.sized(tuple(KINDS), ("fp32",)):
        for name in NETWORKS:
            yield f"{name} {kind}", _raced(here, name, kind, rivals)


def _windows(here: Here) -> Values:
    """Bytes of x and of y in a second, of one layer of 64 channels."""
    n, size, channels = here.sized((256, 56, 64), (2, 6, 8))
    x = here.device.put(here.draw(n, size, size, channels))
    each = here.device.put(here.draw(3, 3, 1, channels))
    whole = here.device.put(here.draw(3, 3, channels, channels))
    passes: dict[str, Callable[[], Array]] = {
        "depthwise and relu": partial(
            kernels.conv, x, each, groups=channels, padding=1, activation=kernels.relu
        ),
        "max_pool": partial(kernels.max_pool, x, window=(3, 3), stride=2, padding=1),
        "average_pool": partial(kernels.average_pool, x, window=(2, 2)),
        "patches and product": partial(kernels.conv, x, whole, padding=1),
    }
    copied = here.copied(x.nbytes)
    values: Values = {"copy": {"GB/s": copied, "of the copy": 1.0}}
    for name, run in passes.items():
        rate = (x.nbytes + run().nbytes) / here.seconds(run) / 1e9
        values[name] = {"GB/s": rate, "of the copy": rate / copied}
    return values


def _raced(here: Here, name: str, kind: str, rivals: dict[str, Rival]) -> Values:
    small = here.sized(False, True)
    x = rows_of(name, ROWS[name], small)
    expected = due(name, CHECKED, small).value
    runs = {
        "nnxp": _nnxp(here, drawn(name, small), kind, x),
        **{who: built(here, drawn(name, small), kind, x) for who, built in rivals.items()},
    }
    if here.on_gpu and x.ndim == 4:
        runs["nnxp without cuDNN"] = _nnxp(here, drawn(name, small), kind, x, without_cudnn=True)
    table: Values = {}
    for who, (run, why) in runs.items():
        if run is None:
            table[who] = {"out": why}
            continue
        y = run(x)[: len(expected)]  # all rows, so that a compiler sees one shape
        off = float(np.abs(y - expected).max() / np.abs(expected).max())
        table[who] = {"error": off}
        if kind == "fp32" and not off <= 2e-5:  # as in models.py
            table[who]["problem"] = f"off by {off:.1e} of the largest"
    for who, (run, _) in runs.items():
        if run is not None and "problem" not in table[who]:
            seconds = here.seconds(partial(run, None))
            table[who] |= {"µs": seconds * 1e6, "rows/s": len(x) / seconds}
            table[who] |= {"rows/s from the host": len(x) / here.seconds(partial(run, x))}
    return table


def _nnxp(
    here: Here, module: Any, kind: str, x: Array, without_cudnn: bool = False
) -> tuple[Run | None, str]:
    dtype = float_dtype(KINDS[kind])
    model = nnxp.from_torch(module).astype(dtype)
    precision = "tf32" if kind == "tf32" else None
    engine = nnxp.Engine(model, here.backend, precision=precision)
    there = here.device.put(x.astype(dtype))

    def run(rows: Any) -> Any:
        with _without_cudnn() if without_cudnn else nullcontext():
            return engine(there) if rows is None else engine(rows.astype(dtype)).astype("float32")

    return run, ""


def _without_cudnn() -> Any:
    from nnxp.kernels.cuda import cudnn

    return cudnn.unused()


def in_torch(
    here: Here, module: Any, kind: str, x: Array, compiled: bool = False
) -> tuple[Run | None, str]:
    import torch

    if not (here.on_gpu and torch.cuda.is_available()):
        return None, "torch finds no GPU"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = kind == "tf32"
    torch.backends.cudnn.benchmark = True
    there = {"device": "cuda", "dtype": getattr(torch, KINDS[kind])}
    order = {"memory_format": torch.channels_last} if x.ndim == 4 else {}
    module = module.to(**there, **order)
    if compiled:
        module = torch.compile(module)
    own = torch.from_numpy(x).to(**there, **order)

    def run(rows: Any) -> Any:
        with torch.inference_mode():
            if rows is None:
                module(own)
                return None
            return module(torch.from_numpy(rows).to(**there, **order)).float().cpu().numpy()

    return run, ""


def in_jax(here: Here, module: Any, kind: str, x: Array) -> tuple[Run | None, str]:
    try:
        import jax

        import models_jax
    except ImportError:
        return None, "jax is not installed"
    if here.on_gpu and jax.default_backend() != "gpu":
        return None, f"JAX computes on {jax.default_backend()} here"
    jax.config.update(
        "jax_default_matmul_precision", "tensorfloat32" if kind == "tf32" else "highest"
    )
    jitted = jax.jit(models_jax.forward(module, KINDS[kind]))
    own = jax.device_put(x).astype(KINDS[kind])

    def run(rows: Any) -> Any:
        if rows is None:
            return jitted(own).block_until_ready()
        return np.asarray(jitted(jax.device_put(rows).astype(KINDS[kind])).astype("float32"))

    return run, ""
