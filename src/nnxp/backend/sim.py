"""The simulated devices as a backend: "sim" or "sim:1"."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import nnxp.sim
from nnxp._arrays import Array, HostArray
from nnxp.backend._base import Availability, Backend, Budget, ForkGuard, Memory, Plan, Sweep
from nnxp.backend._blocks import plan_blocks, sweep_blocks

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


class SimBackend(Backend):
    """Host memory that behaves like a GPU's, to test the rules on any machine."""

    @property
    def _device(self) -> nnxp.sim.Device:
        return nnxp.sim.Device(int(self.device.partition(":")[2]))

    @property
    def xp(self) -> ModuleType:
        return nnxp.sim

    def put(self, x: HostArray) -> Array:
        _guard.check()
        with self._device:
            return nnxp.sim.asarray(x)

    def get(self, x: Array) -> HostArray:
        _guard.check()
        host: HostArray = x.get()
        return host

    def synchronize(self) -> None:
        self._device.synchronize()

    def memory(self) -> Memory:
        total = _TOTAL if self._device.limit is None else self._device.limit
        return Memory(max(0, total - self._device.used), total, self._device.used)

    def current(self) -> Any:
        return self._device

    def plan(self, rows: int, budget: Budget) -> Plan:
        return plan_blocks(rows, budget, self.memory().free)

    def sweep(self, sweep: Sweep) -> int:
        _guard.check()
        with self._device:
            return sweep_blocks(self, sweep)
