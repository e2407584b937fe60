"""Where the steps run.

On another backend than "cupy" all is done once on tiny arrays: that it runs, not what it measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

import nnxp
from contenders import BATCH, Built
from networks import Network
from nnxp._arrays import float_dtype

ROOT = Path(__file__).parents[2]
DTYPES = ("float32", "float16", "bfloat16")

Array = Any
Values = dict[str, Any]
Figures = Iterator[tuple[str, Values]]
Size = TypeVar("Size")


@dataclass(frozen=True)
class Here:
    """Where the steps run, and the folder for what they leave."""

    backend: str
    out: Path

    @property
    def on_gpu(self) -> bool:
        return self.backend == "cupy"

    def sized(self, there: Size, small: Size) -> Size:
        """What is meant for a GPU, or the small one for a try without."""
        return there if self.on_gpu else small

    @cached_property
    def device(self) -> nnxp.Backend:
        return nnxp.get_backend(self.backend)

    def wait(self, y: object = None) -> None:
        self.device.synchronize()

    def seconds(self, run: Callable[[], Any], least: float = BATCH) -> float:
        """What one of many calls takes, which are waited for together."""
        return Built(run, wait=self.wait).seconds(least)

    def copied(self, size: int) -> float:
        """GB/s of a copy of so many bytes on the card: each is read and written."""
        xp = self.device.xp
        x = self.device.put(np.ones(size // 4, "float32"))
        y = x * 0
        return 2 * size / self.seconds(lambda: xp.copyto(y, x)) / 1e9

    def draw(self, *shape: int, dtype: str = "float32", seed: int = 0) -> Array:
        """Normal numbers on the host."""
        host = np.random.default_rng(seed).standard_normal(shape, "float32")
        return host.astype(float_dtype(dtype), copy=False)

    @property
    def large(self) -> Network:
        return self.sized(
            Network((784, 4096, 4096, 10), "relu", 65536), Network((20, 32, 10), "relu", 300)
        )

    @property
    def narrow(self) -> Network:
        return self.sized(
            Network((784, 128, 64, 10), "relu", 65536), Network((20, 16, 10), "relu", 300)
        )


def by_cudnn() -> Values:
    """How many kinds of convolutions went through cuDNN here, and how many did not."""
    from nnxp.kernels.cuda import cudnn

    if why := cudnn.why_not():
        return {"all": {"out": why}}
    faster = list(cudnn.choices.values())
    said = {kind: {"out": why} for kind, why in cudnn.failures.items()}
    return {"cuDNN": {"faster": sum(faster), "of": len(faster)}, **said}


def why_no_lt() -> str | None:
    """Why products on the GPU do not go through cuBLASLt; None if they do."""
    from nnxp.kernels.cuda.lt import why_not

    return why_not()
