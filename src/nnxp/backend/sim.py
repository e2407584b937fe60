"""The simulated devices as a backend: "sim" or "sim:1"."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import numpy as np

import nnxp.sim
from nnxp._arrays import Array, HostArray
from nnxp.backend._base import Availability, Backend, ForkGuard, Memory
from nnxp.backend._device import DeviceBackend
from nnxp.backend._lanes import Stream

_guard = ForkGuard("a simulated device")
_TOTAL = 1 << 34  # what a device without a limit says it has


def availability(index: int) -> Availability:
    """Always there, for the devices that there are."""
    if index >= nnxp.sim.DEVICES:
        return Availability(
            False,
            f"there is no sim:{index}",
            f"The simulated devices are 0 to {nnxp.sim.DEVICES - 1}",
        )
    return Availability(True, "simulated in host memory")


def connect(index: int, why: str) -> Backend:
    """The backend for a simulated device."""
    _guard.mark()
    return SimBackend("sim", f"sim:{index}", why)


class SimBackend(DeviceBackend):
    """Host memory that behaves like a GPU's, to test the rules on any machine."""

    guard = _guard
    dlpack = nnxp.sim.DLPACK

    @property
    def xp(self) -> ModuleType:
        return nnxp.sim

    def put(self, x: HostArray) -> Array:
        _guard.check()
        with self.current():
            return nnxp.sim.asarray(x)

    def get(self, x: Array) -> HostArray:
        _guard.check()
        host: HostArray = x.get()
        return host

    def synchronize(self) -> None:
        self.current().synchronize()

    def memory(self) -> Memory:
        device = self.current()
        total = _TOTAL if device.limit is None else device.limit
        return Memory(max(0, total - device.used), total, device.used)

    def current(self) -> nnxp.sim.Device:
        return nnxp.sim.Device(self.index)

    def stream(self) -> Stream:
        return nnxp.sim.Stream()

    def current_stream(self) -> Stream:
        return nnxp.sim.Stream.current()

    def mark(self, stream: Stream) -> None:
        """Nothing: all but copies is done at once here."""

    def wait(self, stream: Stream, mark: Any) -> None:
        pass

    def pool(self) -> _Pool:
        return _Pool()

    def pinned(self, size: int) -> HostArray:
        return np.empty(size, "uint8")

    def record(
        self,
        fn: Callable[[], tuple[Array, ...]],
        stream: Stream,
        trial: Callable[[], object] | None = None,
    ) -> Callable[[], tuple[Array, ...]]:
        return fn


class _Pool:
    """Nothing is set aside: arrays are made and given back at once."""

    def use(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def release(self) -> None:
        pass

    def unused(self) -> int:
        return 0
