"""Are the results of a sweep whole, and right? Sums, counts, and rows of every block in float64."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nnxp._errors import CheckpointError, RowsError
from nnxp._printed import Printed
from nnxp.cluster import folder as folders
from nnxp.cluster.plan import Plan, sha256
from nnxp.layers._layer import Layer, whole

TF32 = 2.0**13
"""How many times as coarse as float32 factors are in TF32."""


@dataclass(frozen=True)
class Verified(Printed):
    """What was found: how many blocks and rows are there, and what is wrong, by block.

    `judged` rows were computed anew in float64; `largest` is the largest error of theirs in units
    of its bound.
    """

    folder: str
    blocks: int
    rows: int
    rows_found: int
    judged: int
    largest: float
    problems: dict[int, str]

    @property
    def ok(self) -> bool:
        """Whether every block is there, whole and right, and no row is too many or missing."""
        return not self.problems and self.rows == self.rows_found

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; an infinite error is None."""
        largest = self.largest if np.isfinite(self.largest) else None
        return {**asdict(self), "largest": largest, "ok": self.ok}

    def __str__(self) -> str:
        lines = [
            f"{self.folder}: {self.rows_found:,} of {self.rows:,} rows in {self.blocks:,} blocks; "
            f"{self.judged:,} rows judged against float64, largest error {self.largest:.2f} units"
        ]
        lines += [
            f"block {block}: {problem}" for block, problem in list(self.problems.items())[:20]
        ]
        if len(self.problems) > 20:
            lines.append(f"and {len(self.problems) - 20} more")
        return "\n".join([*lines, "all is whole and right" if self.ok else "NOT VERIFIED"])


def verify(folder: str | os.PathLike[str], *, rows: int = 4) -> Verified:
    """Check every block of a sweep: its file's sum, its rows in and out, `rows` of them in float64.

    Raises OptionError if the folder holds no sweep, CheckpointError if the model is not the one
    that was swept any more.
    """
    from nnxp.io.checkpoint import load

    plan, count = Plan.load(folder), whole("rows, those to judge in a block,", rows)
    if sha256(plan.model) != plan.model_sha256:
        raise CheckpointError(f"{plan.model} is not the model of this sweep any more")
    model, records = load(plan.model), folders.whole(plan)
    recorded = set(folders.recorded(plan))
    problems: dict[int, str] = {}
    largest, judged, rows_found = 0.0, 0, 0
    for block in range(len(plan)):
        if block not in records:
            damaged = "damaged: not what was recorded" if block in recorded else "missing"
            problems[block] = damaged
            continue
        try:
            results = folders.read_part(plan, block)
            rows_found += len(results)
            chosen = np.unique(np.linspace(0, len(results) - 1, count).astype(int))
            ratio, problem = _judged(plan, model, block, results, chosen)
        except (RowsError, OSError) as error:
            problems[block] = str(error)
            continue
        largest, judged = max(largest, ratio), judged + len(chosen)
        if problem:
            problems[block] = problem
    return Verified(plan.folder, len(plan), plan.rows, rows_found, judged, largest, problems)


def _judged(plan: Plan, model: Layer, block: int, results: Any, chosen: Any) -> tuple[float, str]:
    """The error of some rows of a block in units of its bound, and what is wrong with them."""
    from nnxp.testing.parity import compare, error_bound

    start = plan.span(block)[0]
    x = np.concatenate([plan.read(start + int(i), start + int(i) + 1) for i in chosen])
    value, bound = error_bound(model, x)
    if plan.precision == "tf32":
        bound = bound * TF32
    check = compare(f"block {block}", "rows", "files", np.asarray(results[chosen]), value, bound)
    nothing = check.problem.startswith("nothing was compared")
    return check.ratio, "" if nothing else check.problem
