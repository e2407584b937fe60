"""NaN and infinity come out where the reference has them, of every kernel in every type."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from gpu.here import DTYPES, Array, Figures, Here, Values
from nnxp import kernels


def figures(here: Here) -> Figures:
    shapes = here.sized([(1, 64, 64), (2048, 64, 48), (2048, 33, 10)], [(9, 8, 6)])
    for dtype in DTYPES:
        checked, wrong = 0, []
        for rows, inner, cols in shapes:
            for name, compute, arrays in _odd_cases(here, dtype, rows, inner, cols):
                with np.errstate(all="ignore"):
                    due = compute(*arrays)
                    made = here.device.get(compute(*map(here.device.put, arrays)))
                off = int((_kinds(made) != _kinds(due)).sum())
                checked += 1
                if off:
                    wrong.append(f"{name} {(rows, inner, cols)}: {off} of {due.size}")
        values: Values = {"checked": checked, "wrong": len(wrong), "which": wrong}
        if wrong:
            values["problem"] = "; ".join(wrong[:10])
        yield dtype, values


def _odd_cases(
    here: Here, dtype: str, rows: int, inner: int, cols: int
) -> Iterator[tuple[str, Callable[..., Array], tuple[Array, ...]]]:
    x = here.draw(rows, inner, dtype=dtype, seed=5)
    infinity = float("inf")
    for row, odd in enumerate(([np.nan], [infinity], [-infinity], [infinity, -infinity], [0.0])):
        x[row::7, inner // 2 : inner // 2 + len(odd)] = odd
    x[5::7] = -infinity
    weight = here.draw(inner, cols, dtype=dtype, seed=6)
    bias = here.draw(cols, dtype=dtype, seed=7)
    odd_bias = bias.copy()
    odd_bias[:3] = np.nan, infinity, -infinity
    for name, activation in kernels.ACTIVATIONS.items():
        yield name, activation, (x,)
        fused = partial(kernels.linear, activation=activation)
        yield f"linear, {name}", fused, (x, weight, bias)
        yield f"linear, odd bias, {name}", fused, (x, weight, odd_bias)
    for name in ("softmax", "log_softmax", "layer_norm", "rms_norm"):
        yield name, kernels.KERNELS[name], (x,)


def _kinds(y: Array) -> Array:
    """0 where y is finite, 1 and -1 for the infinities, 2 for NaN."""
    y = y.astype("float32")
    return np.where(np.isnan(y), 2, np.where(np.isinf(y), np.sign(y), 0))
