"""What the system tells: cores, their time, and memory, and which share of them this process has.

Systems differ in what they tell. What one does not tell is None here, and limits nothing.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import suppress

PROC, CGROUPS = "/proc", "/sys/fs/cgroup"


def cores() -> int:
    """The cores that this process may run on."""
    if hasattr(os, "process_cpu_count"):  # Python 3.13; it knows PYTHON_CPU_COUNT too
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_cores() -> int:
    """The cores whose whole time this process may have.

    A container may be given less than all, and so may one of several processes side by side:
    OMP_NUM_THREADS is how joblib, Dask and batch systems tell each of them its share.
    """
    shares = (cores(), core_quota(), threads_given())
    return max(1, math.ceil(min(share for share in shares if share is not None)))


def threads_given() -> int | None:
    """OMP_NUM_THREADS, at the outermost level of what may be a list; None if it is no number."""
    threads = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(threads) if threads.isdecimal() and int(threads) else None


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


def physical_memory() -> int | None:
    """The bytes of memory that the machine has; None where the system does not tell."""
    return meminfo("MemTotal") or _pages("SC_PHYS_PAGES") or _windows_memory("ullTotalPhys")


def available_memory() -> int | None:
    """The bytes of memory that are free for new arrays, files kept in memory included.

    All of it where the system tells no more than that; None where it does not tell even that.
    """
    free = meminfo("MemAvailable") or _pages("SC_AVPHYS_PAGES")
    return free or _windows_memory("ullAvailPhys") or physical_memory()


def processor() -> str:
    """The name of the CPU."""
    import platform  # not for every import of nnxp

    name = in_proc("cpuinfo", r"^model name\s*:\s*(.+)$")
    return name or platform.processor() or platform.machine()


def in_proc(file: str, pattern: str) -> str | None:
    """What the pattern's group matches in a file of the kernel's; None without such a file."""
    path = f"{PROC}/{file}"
    if not os.path.exists(path):
        return None
    with open(path) as text:
        match = re.search(pattern, text.read(), re.MULTILINE)
    return match[1] if match else None


def meminfo(name: str) -> int | None:
    """A line of Linux' own account of its memory, in bytes."""
    with suppress(OSError):
        kibibytes = in_proc("meminfo", rf"^{name}:\s*(\d+) kB")
        return int(kibibytes) * 1024 if kibibytes else None
    return None


def _pages(name: str) -> int | None:
    """A number of pages that sysconf tells, in bytes. Not on Windows; not every name on macOS."""
    with suppress(AttributeError, ValueError, OSError):
        bytes_ = os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
        return bytes_ if bytes_ > 0 else None
    return None


def _windows_memory(field: str) -> int | None:
    """A field of Windows' MEMORYSTATUSEX, in bytes; None elsewhere."""
    import ctypes

    windows = getattr(ctypes, "windll", None)
    if windows is None:
        return None
    halves = ("dwLength", "dwMemoryLoad")
    wholes = (
        *("ullTotalPhys", "ullAvailPhys", "ullTotalPageFile", "ullAvailPageFile"),
        *("ullTotalVirtual", "ullAvailVirtual", "ullAvailExtendedVirtual"),
    )

    class Status(ctypes.Structure):
        _fields_ = [(name, ctypes.c_uint32) for name in halves] + [
            (name, ctypes.c_uint64) for name in wholes
        ]

    status = Status(dwLength=ctypes.sizeof(Status))
    succeeded = windows.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
    return int(getattr(status, field)) if succeeded else None


def _control(file: str, controller: str = "") -> list[str]:
    """What this file says in the control group of this process and in those around it.

    Without a controller, of the unified hierarchy (version 2), else of that controller's own.
    """
    with suppress(OSError, ValueError):  # what cannot be read limits nothing that we know of
        return list(_levels(file, controller))
    return []


def _levels(file: str, controller: str) -> Iterator[str]:
    from pathlib import Path  # not for every import of nnxp

    groups = Path(PROC) / "self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else []:
        _, controllers, group = line.split(":", 2)
        if controller in controllers.split(","):
            top = Path(CGROUPS) / controller
            here = top / group.lstrip("/")
            levels = [level for level in (here, *here.parents) if level.is_relative_to(top)]
            yield from (
                (level / file).read_text().strip() for level in levels if (level / file).exists()
            )
