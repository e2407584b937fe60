"""CuPy on a CUDA device: "cupy", "cuda" or "cuda:1".

Importing this module needs no CuPy: it is imported when a device is asked for. Everything runs on
the caller's current stream, so copies and kernels are in order, and that stream stays the current
one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nnxp._arrays import Array, HostArray
from nnxp.backend._base import Backend, Budget, Memory, Plan, Sweep
from nnxp.backend._blocks import plan_blocks, sweep_blocks
from nnxp.backend._probe import guard
from nnxp.backend._probe import probe as availability

__all__ = ["CudaBackend", "availability", "connect"]


def connect(index: int, why: str) -> Backend:
    """The backend for a CUDA device that the probe has found usable."""
    guard.mark()
    return CudaBackend("cupy", f"cuda:{index}", why)


class CudaBackend(Backend):
    """CuPy arrays in the memory of one CUDA device."""

    @property
    def xp(self) -> Any:
        import cupy

        return cupy

    @property
    def _device(self) -> Any:
        return self.xp.cuda.Device(int(self.device.partition(":")[2]))

    def put(self, x: HostArray) -> Array:
        """Copied by ndarray.set: cupy.asarray would pin up to twice the bytes and keep them."""
        guard.check()
        with self._device:
            array = self.xp.empty(x.shape, x.dtype)
            array.set(np.ascontiguousarray(x))
            return array

    def get(self, x: Array) -> HostArray:
        guard.check()
        with self._device:
            host: HostArray = x.get()  # waits for the copy
            return host

    def synchronize(self) -> None:
        self._device.synchronize()

    def memory(self) -> Memory:
        with self._device:
            free, total = self.xp.cuda.runtime.memGetInfo()
            pool = self.xp.get_default_memory_pool()
            return Memory(free + pool.free_bytes(), total, pool.used_bytes())

    def current(self) -> Any:
        return self._device

    def plan(self, rows: int, budget: Budget) -> Plan:
        return plan_blocks(rows, budget, self.memory().free)

    def sweep(self, sweep: Sweep) -> int:
        guard.check()
        with self._device:
            return sweep_blocks(self, sweep)
