"""How near our own kernels come to a copy of the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from gpu.here import DTYPES, Array, Figures, Here, Values
from nnxp import kernels


def figures(here: Here) -> Figures:
    rows, cols = here.sized((65536, 4096), (64, 32))
    device = here.device
    for dtype in DTYPES:
        x = device.put(np.tile(here.draw(rows // 64, cols, dtype=dtype), (64, 1)))
        bias, out = device.put(here.draw(cols, dtype=dtype)), device.xp.empty(x.shape, x.dtype)
        copied = here.copied(x.nbytes)
        values: Values = {"copy": {"GB/s": copied, "of the copy": 1.0}}
        for name, run in _passes(here, x, bias, out).items():
            try:
                rate = 2 * x.nbytes / here.seconds(run) / 1e9
                values[name] = {"GB/s": rate, "of the copy": rate / copied}
            except Exception as error:
                values[name] = {"problem": f"{type(error).__name__}: {error}"[:300]}
        yield dtype, values


def _passes(here: Here, x: Array, bias: Array, out: Array) -> dict[str, Callable[[], Array]]:
    if here.on_gpu:
        from nnxp.kernels.cuda.activations import bias_act
    else:

        def bias_act(x: Array, bias: Any | None, activation: kernels.Kernel, out: Array) -> Any:
            return activation(x + bias, out=out)

    passes: dict[str, Callable[[], Array]] = {
        f"bias and {name}": partial(bias_act, x, bias, kernels.ACTIVATIONS[name], out)
        for name in ("relu", "gelu", "tanh", "silu")
    }
    passes["softmax"] = partial(kernels.softmax, x, out=out)
    passes["log_softmax"] = partial(kernels.log_softmax, x, out=out)
    passes["layer_norm"] = partial(kernels.layer_norm, x, bias, bias)
    passes["rms_norm"] = partial(kernels.rms_norm, x, bias)
    return passes
