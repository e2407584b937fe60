"""What memory and products reach here, and whether float32 products are in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

import nnxp
from gpu.here import Array, Figures, Here, Values
from networks import PRECISIONS, TF32_ROUNDOFF
from nnxp import kernels
from nnxp._arrays import float_dtype
from nnxp.kernels.linear import precision
from nnxp.testing import LIMIT
from nnxp.testing.parity import compare, product_bound


def figures(here: Here) -> Figures:
    yield "bandwidth, GB/s", _bandwidths(here)
    n = here.sized(8192, 64)
    factors = here.draw(n, n, seed=1), here.draw(n, n, seed=2)
    for name, (dtype, tf32) in PRECISIONS.items():
        a, b = (here.device.put(each.astype(float_dtype(dtype))) for each in factors)
        values: Values = {}
        for who, make in PRODUCTS.items():
            values |= attempt(who, partial(_flops, here, make, a, b, tf32, 2 * n**3))
        yield f"{name} product of {n} x {n}, TFLOP/s", values
    n = here.sized(1024, 32)
    x, weight = here.draw(n, n, seed=3), here.draw(n, n, seed=4)
    exact = x.astype("float64") @ weight
    unit = product_bound(x, weight)
    rounded = TF32_ROUNDOFF * np.sqrt(np.square(x, dtype="float64") @ np.square(weight))
    for name, bound in (("fp32", unit), ("tf32", unit + rounded)):
        there = here.device.put(x), here.device.put(weight)
        errors: Values = {}
        for who, make in PRODUCTS.items():
            errors |= attempt(who, partial(_error, here, make, there, name, exact, bound))
        if "nnxp" in errors and not errors["nnxp"] <= LIMIT:
            errors["problem"] = f"nnxp's {name} product is off by {errors['nnxp']:.3g} units"
        yield f"{name} product, error in units of its bound ({LIMIT:g} are allowed)", errors


def attempt(name: str, measure: Callable[[], Any]) -> Values:
    """What is measured under its name, or why that failed: our fault only if it is ours."""
    try:
        return {name: measure()}
    except Exception as error:
        key = "problem" if name == "nnxp" else f"{name} is out"
        return {key: f"{name}: {type(error).__name__}: {error}"[:300]}


def _bandwidths(here: Here) -> Values:
    size = here.sized(1 << 28, 1 << 16)
    host, device = np.ones(size, "uint8"), here.device
    there = device.put(host)
    found = {"on the card, read and written": here.copied(4 * size)}

    def measure(run: Callable[[], object]) -> float:
        return size / here.seconds(run) / 1e9

    found["to the device, from pageable memory"] = measure(lambda: device.put(host))
    found["to the host, into pageable memory"] = measure(lambda: device.get(there))
    if here.on_gpu:
        import cupyx

        pinned = cupyx.empty_pinned(size, "uint8")
        pinned[:] = 1
        found["to the device, from pinned memory"] = measure(lambda: there.set(pinned))
        found["to the host, into pinned memory"] = measure(lambda: there.get(out=pinned))
    return found


def _ours(here: Here, a: Array, b: Array, tf32: str | None) -> Callable[[], Array]:
    def run() -> Array:
        return kernels.linear(a, b)

    return run


def _cupys(here: Here, a: Array, b: Array, tf32: str | None) -> Callable[[], Array]:
    if tf32:
        raise RuntimeError("CuPy is told to use TF32 before it is loaded, or not at all")
    out = here.device.xp.empty((a.shape[0], b.shape[1]), a.dtype)
    return lambda: here.device.xp.matmul(a, b, out=out)


def _torchs(here: Here, a: Array, b: Array, tf32: str | None) -> Callable[[], Array]:
    import torch

    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    left, right = torch.from_dlpack(a), torch.from_dlpack(b)
    return lambda: torch.matmul(left, right)


PRODUCTS = {"nnxp": _ours, "cupy.matmul": _cupys, "torch": _torchs}


@contextmanager
def rounding_to(tf32: str | None) -> Iterator[None]:
    """Within the block nnxp's products may round their factors to TF32."""
    token = precision.set(tf32)
    try:
        yield
    finally:
        precision.reset(token)


def _flops(here: Here, make: Any, a: Array, b: Array, tf32: str | None, work: int) -> float:
    with rounding_to(tf32):
        return float(work / here.seconds(make(here, a, b, tf32), 0.1) / 1e12)


def _error(here: Here, make: Any, there: Any, name: str, exact: Array, bound: Array) -> float:
    tf32 = PRECISIONS[name][1]
    with rounding_to(tf32):
        y = make(here, *there, tf32)()
    y = y.cpu().numpy() if type(y).__module__ == "torch" else nnxp.asnumpy(y)
    return compare("", "", "", y, exact, bound).ratio
