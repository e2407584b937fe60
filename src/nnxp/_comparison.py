"""What comes of a comparison: the seconds of each in every round, and the place, for people and
programs. `nnxp bench` and the races of bench/ say it in the same way."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from textwrap import fill
from typing import Any

import numpy as np

from nnxp._printed import Printed, aligned
from nnxp.backend._machine import core_quota, cores, processor
from nnxp.doctor.facts import blas

PINS = (
    *("OPENBLAS_", "GOTO_", "MKL_", "BLIS_", "VECLIB_", "DNNL_", "ONEDNN_"),
    *("OMP_", "GOMP_", "KMP_", "NUMEXPR_", "NPY_", "XLA_FLAGS", "ATEN_CPU_CAPABILITY"),
    *("NNXP_WORKERS", "NNXP_BACKEND"),
)
"""Variables that begin like these tell libraries which code and how many threads to run."""

MEANING = "floor: the bare matrix products of the same network, no bias, no activation"


@dataclass(frozen=True)
class Result:
    """How one did: the seconds of one call in each round, or the problem it had.

    `floor` are the floor's seconds in the same rounds, `error` is the largest difference from
    float64 in units of the computed bound. Of a process of its own: the memory it held before its
    first call, the most it ever held, what it says of itself, and the seconds that its threads were
    at work in one call of each round, all together.
    """

    name: str
    seconds: tuple[float, ...] = ()
    floor: tuple[float, ...] = ()
    error: float | None = None
    problem: str = ""
    rest_bytes: int | None = None
    peak_bytes: int | None = None
    about: dict[str, Any] = field(default_factory=dict)
    cpu: tuple[float, ...] = ()

    @property
    def quartiles(self) -> tuple[float, float, float] | None:
        """The lower quartile, the median and the upper quartile of the seconds."""
        return _quartiles(self.seconds)

    @property
    def share(self) -> tuple[float, float, float] | None:
        """The same of the floor's time in its own, by rounds."""
        pairs = zip(self.floor, self.seconds, strict=False)
        return _quartiles([floor / own for floor, own in pairs])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        low, median, high = self.quartiles or (None, None, None)
        share_low, share, share_high = self.share or (None, None, None)
        values = asdict(self) | {"median": median, "quartiles": (low, high)}
        del values["floor"]
        shares = {"share": share, "share_quartiles": (share_low, share_high)}
        return values | shares | {"least": min(self.seconds, default=None)}


@dataclass(frozen=True)
class Comparison(Printed):
    """All results for the same rows, and the place where they were measured; print it."""

    title: str
    rows: int
    rounds: int
    place: dict[str, Any]
    results: tuple[Result, ...]

    def __getitem__(self, name: str) -> Result:
        return next(result for result in self.results if result.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**vars(self), "results": [result.to_dict() for result in self.results]}

    def __str__(self) -> str:
        from nnxp.testing import LIMIT

        header = ("", "median [quartiles]", "of the floor", "rows/s", "error", "peak MiB")
        table = [header, *(self._cells(result) for result in self.results if result.seconds)]
        shown = [i for i in range(len(header)) if i == 0 or any(line[i] for line in table[1:])]
        title = f"{self.title}, {count(self.rows, 'row')}"
        lines = [fill(line, 80) for line in (title, *_where(self.place))]
        lines += aligned([[line[i] for i in shown] for line in table])
        lines += [f"{result.name}: {result.problem}" for result in self.results if result.problem]
        lines += [f"{count(self.rounds, 'round')}, in turns", MEANING]
        lines.append(f"error: of float64, in units of the computed bound; {LIMIT:g} are allowed")
        return "\n".join(lines)

    def _cells(self, result: Result) -> tuple[str, ...]:
        low, median, high = result.quartiles or (0.0, 0.0, 0.0)
        unit, scale = next(unit for unit in _UNITS if median * unit[1] < 1000 or unit[1] == 1)
        first, middle, last = (figures(seconds * scale) for seconds in (low, median, high))
        share, peak = result.share, result.peak_bytes
        return (
            result.name,
            f"{middle} {unit} [{first}, {last}]",
            "{1:.0%} [{0:.0%}, {2:.0%}]".format(*share) if share else "",
            f"{self.rows / median:,.0f}",
            "" if result.error is None else f"{result.error:.2f}",
            "" if peak is None else f"{peak / 2**20:,.0f}",
        )


_UNITS = (("µs", 1e6), ("ms", 1e3), ("s", 1.0))


def figures(value: float) -> str:
    """Three of them, and never an exponent."""
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def count(number: int, what: str) -> str:
    """So many of these, in words."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _quartiles(values: Sequence[float]) -> tuple[float, float, float] | None:
    return tuple(np.percentile(values, [25, 50, 75]).tolist()) if values else None


def pins() -> dict[str, str]:
    """The variables of PINS that are set here, but for the one that threadpoolctl sets."""
    harmless = "KMP_DUPLICATE_LIB_OK"
    return {k: v for k, v in os.environ.items() if k.startswith(PINS) and k != harmless}


def here() -> dict[str, Any]:
    """The place where this process runs."""
    return {
        "device": "cpu",
        "cpu": processor(),
        "cores": cores(),
        "core_quota": core_quota(),
        "blas": [
            {
                "name": library["internal_api"].replace("openblas", "OpenBLAS"),
                "version": library["version"],
                "kernels": library.get("architecture"),
                "threads": library["num_threads"],
            }
            for library in blas()
        ],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "settings": pins(),
    }


def _where(place: dict[str, Any]) -> list[str]:
    """The place in words: one line, and one more for the variables that decide how it runs."""
    quota = place["core_quota"]
    cores = f"{place['cores']} cores" + (f" (the time of {quota:g} of them)" if quota else "")
    libraries = ["{name} {version} {kernels}".format(**library) for library in place["blas"]]
    lines = [f"ran on cpu: {place['cpu']}, {cores}, {[*libraries, 'no BLAS that is known'][0]}"]
    for words, key in (("with {}", "settings"), ("without {}, which are set here", "unset")):
        if place.get(key):
            lines.append(words.format(", ".join(f"{k}={v}" for k, v in place[key].items())))
    return lines
