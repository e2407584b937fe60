"""CuPy on a CUDA device: "cupy", "cuda" or "cuda:1".

Importing this module needs no CuPy: it is imported when a device is asked for. Everything runs on
the caller's current stream, so copies and kernels are in order, and that stream stays the current
one.
"""

from __future__ import annotations

import os
from typing import Any

from nnxp._arrays import Array, HostArray
from nnxp._errors import BackendUnavailable, DtypeMismatch
from nnxp.backend._base import Backend, Memory, Sweep
from nnxp.backend._blocks import BlockBackend
from nnxp.backend._probe import guard
from nnxp.backend._probe import probe as availability

__all__ = ["CudaBackend", "availability", "connect"]


def connect(index: int, why: str) -> Backend:
    """The backend for a CUDA device that the probe has found usable."""
    for name in ("CUPY_TF32", "NVIDIA_TF32_OVERRIDE"):
        if os.environ.get(name, "0") not in ("", "0"):
            raise BackendUnavailable(
                f"{name}={os.environ[name]} rounds float32 products to TF32, a thousand times the "
                "error of float32",
                f"unset {name}: float32 is float32 here",
            )
    guard.mark()
    return CudaBackend("cupy", f"cuda:{index}", why)


class CudaBackend(BlockBackend):
    """CuPy arrays in the memory of one CUDA device."""

    guard = guard

    @property
    def xp(self) -> Any:
        import cupy

        return cupy

    def put(self, x: HostArray) -> Array:
        """Copied by ndarray.set: cupy.asarray would pin up to twice the bytes and keep them."""
        guard.check()
        if x.dtype.kind == "f" and x.dtype.itemsize > 8:
            raise DtypeMismatch(f"CUDA has no {x.dtype}; x.astype('float64') converts it")
        with self.current():
            array = self.xp.empty(x.shape, x.dtype.newbyteorder("="))
            array.set(x.astype(array.dtype, copy=False))
            return array

    def get(self, x: Array) -> HostArray:
        guard.check()
        with self.current():
            host: HostArray = x.get()  # waits for the copy
            return host

    def synchronize(self) -> None:
        self.current().synchronize()

    def memory(self) -> Memory:
        with self.current():
            free, total = self.xp.cuda.runtime.memGetInfo()
            pool = self.xp.get_default_memory_pool()
            return Memory(free + pool.free_bytes(), total, pool.used_bytes())

    def current(self) -> Any:
        return self.xp.cuda.Device(self.index)

    def sweep(self, sweep: Sweep) -> int | None:
        """Block by block; afterwards CuPy's pool gives back what it holds unused."""
        try:
            return super().sweep(sweep)
        finally:
            with self.current():
                self.xp.get_default_memory_pool().free_all_blocks()
