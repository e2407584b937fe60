"""A trained network, the digits it reads, and a million rows through it: what nnxp does, at once.

`nnxp.demo.train` says where network and digits come from; LICENSE-digits.txt is the digits'.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnxp._arrays import HostArray
from nnxp._printed import Printed, beside
from nnxp.engine import Engine
from nnxp.io.checkpoint import load
from nnxp.layers._layer import Layer, whole
from nnxp.testing import LIMIT, parity_report

_HERE = Path(__file__).parent
_WARM_UP = 20_000  # rows: enough for every worker and lane to have had some
DIGITS = 1797
PLAIN = 100_000  # rows that plain NumPy takes, all at once
_SAMPLE = 256  # rows that are judged against float64


@dataclass(frozen=True)
class DemoReport(Printed):
    """A sweep of the digits: where it ran and why, how fast, and how right.

    `accuracy` is that of this run on the digits that the network was not trained on.
    `largest_ratio` is the largest difference from float64, of all layers, in units of the bound
    that `nnxp.testing` computes; correct results stay below 6. `plain_rows_per_second` is what the
    same formulas make in plain NumPy on this CPU.
    """

    backend: str
    device: str
    why: str
    rows: int
    seconds: float
    rows_per_second: float
    multiply_adds_per_second: float
    plain_rows_per_second: float
    accuracy: float
    largest_ratio: float

    @property
    def ok(self) -> bool:
        """Whether the network computed what it should, as far as so many rows can show."""
        right = self.accuracy >= 0.95 or self.rows < DIGITS
        return self.largest_ratio <= LIMIT and right

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        times = self.rows_per_second / self.plain_rows_per_second
        lines = {
            "what": f"a trained network read {self.rows:,} pictures of handwritten digits",
            "where": f"on {self.backend}, {self.device}: {self.why}",
            "speed": f"{self.seconds:.3g} s: {self.rows_per_second:,.0f} rows/s, "
            f"{self.multiply_adds_per_second / 1e9:,.1f} billion multiply-adds/s",
            "NumPy": f"{self.plain_rows_per_second:,.0f} rows/s by the same formulas in plain "
            f"NumPy on this CPU: nnxp is {times:.1f} times as fast",
            "right": f"{self.accuracy:.1%} of the digits it was not trained on",
            "agrees": f"with float64: the largest error is {self.largest_ratio:.2f} units of what "
            f"rounding may do; {LIMIT:g} are allowed",
            **({} if self.ok else {"WRONG": "this is not what the network computes"}),
            "next": "nnxp predict MODEL ROWS -o ANSWERS runs a model of yours, nnxp bench times "
            "one, nnxp doctor says what could make it faster here",
        }
        return "\n".join(beside(label, text, 8, width=79) for label, text in lines.items())


def load_digits() -> tuple[Layer, HostArray, HostArray, HostArray]:
    """(model, pixels, labels, unseen): a network and all that it was trained and tested on.

    pixels (1797, 64) and labels (1797,) are uint8; unseen (1797,) is True where the network was
    not trained. The model takes pixels and gives the probabilities of the ten digits.
    """
    with np.load(_HERE / "digits.npz") as file:
        pixels, labels, unseen = file["pixels"], file["labels"], file["unseen"]
    return load(_HERE / "digits.safetensors"), pixels, labels, unseen


def run(rows: int = 1_000_000, backend: str = "auto", progress: bool = False) -> DemoReport:
    """Sweep the digits, repeated up to this number of rows, through the network, and judge it."""
    rows = whole("rows of the demo", rows)
    model, pixels, labels, unseen = load_digits()
    which = np.arange(rows) % len(pixels)
    x = pixels[which]
    engine = Engine(model, backend)
    engine(x[:_WARM_UP])
    start = time.perf_counter()
    y = engine(x, progress=progress)
    seconds = time.perf_counter() - start
    judged = unseen[which]  # the first digit is unseen, so there is always one
    right = y[judged].argmax(axis=1) == labels[which][judged]
    work = model.summary((1, *pixels.shape[1:])).multiply_adds
    return DemoReport(
        backend=engine.backend.name,
        device=engine.backend.device,
        why=engine.backend.why,
        rows=rows,
        seconds=seconds,
        rows_per_second=rows / seconds,
        multiply_adds_per_second=rows * work / seconds,
        plain_rows_per_second=plain_speed(model, x[:PLAIN]),
        accuracy=float(right.mean()),
        largest_ratio=largest_ratio(model, pixels, engine.backend.device),
    )


def plain_speed(model: Layer, rows: HostArray) -> float:
    """The rows a second of the model's formulas, one after the other on all rows, in NumPy."""
    seconds = []
    for _ in range(3):  # the best counts: the first wakes the threads
        start = time.perf_counter()
        model(rows.astype(model.dtype or "float32"))
        seconds.append(time.perf_counter() - start)
    return len(rows) / min(seconds)


def largest_ratio(model: Layer, rows: HostArray, device: str) -> float:
    """The largest error of any layer on this device, on a sample, in units of its bound."""
    sample = rows[:: max(1, len(rows) // _SAMPLE)][:_SAMPLE].astype(model.dtype or "float32")
    return parity_report(model, sample, backends=(device,)).largest
