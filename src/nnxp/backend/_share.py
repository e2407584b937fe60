"""The share of the machine that this process may use: cores, their time, and memory."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def cores() -> int:
    """The cores that this process may run on."""
    if hasattr(os, "process_cpu_count"):  # Python 3.13; it knows PYTHON_CPU_COUNT too
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_cores() -> int:
    """The cores whose whole time this process may have: a container may be given less than all."""
    quota = core_quota()
    return cores() if quota is None else max(1, min(cores(), math.ceil(quota)))


def core_quota() -> float | None:
    """How many cores' time the control groups let this process have; None for no limit."""
    quotas, periods = _control("cpu.cfs_quota_us", "cpu"), _control("cpu.cfs_period_us", "cpu")
    shares = [*map(str.split, _control("cpu.max")), *zip(quotas, periods, strict=True)]
    limits = [int(quota) / int(period) for quota, period in shares if quota not in ("max", "-1")]
    return min(limits, default=None)


def memory_limit() -> int | None:
    """How many bytes the control groups let this process have; None for no limit."""
    texts = [*_control("memory.max"), *_control("memory.limit_in_bytes", "memory")]
    limits = [int(text) for text in texts if text.strip() != "max"]
    least = min(limits, default=1 << 62)
    return least if least < 1 << 60 else None  # no limit is written as a huge one


def _control(file: str, controller: str = "") -> list[str]:
    """What this file says in the control group of this process and in those around it.

    Without a controller, of the unified hierarchy (version 2), else of that controller's own.
    """
    with suppress(OSError, ValueError):  # what cannot be read limits nothing that we know of
        return list(_levels(file, controller))
    return []


def _levels(file: str, controller: str) -> Iterator[str]:
    groups = PROC / "self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else []:
        _, controllers, group = line.split(":", 2)
        if controller in controllers.split(","):
            top = CGROUPS / controller
            here = top / group.lstrip("/")
            levels = [each for each in (here, *here.parents) if each.is_relative_to(top)]
            yield from (
                (each / file).read_text().strip() for each in levels if (each / file).exists()
            )
