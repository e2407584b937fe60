"""A model on this CPU, against its floor and against plain NumPy.

The floor is the bare matrix products of the same network: no bias, no activation, all rows at
once, results into memory that is set aside, BLAS with its own threads. Plain NumPy is the model
called, formula by formula, on all rows at once. All have turns in this process, a pause between
them, so that idle threads of BLAS have gone to sleep; bench/ has the race with other libraries.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from nnxp._arrays import HostArray, Shape
from nnxp._comparison import Comparison, Result, count, here
from nnxp._errors import OptionError
from nnxp.engine import Engine
from nnxp.layers._layer import Layer, check_model, whole
from nnxp.program.program import expanded
from nnxp.program.traced import ROWS

FLOOR, PLAIN = "floor", "plain NumPy"
TURN = 0.2  # seconds of work in a turn: short calls are timed many at once
PAUSE = 0.25  # between turns; idle threads of BLAS and OpenMP were seen to spin for up to 0.15 s
CHECKED = 256  # rows that are compared with float64

Run = Callable[[], Any]
"""Computes the network for the rows that it was built for."""


# the products


def products_of(model: Layer, row: Shape) -> list[tuple[HostArray, int]]:
    """The weight of each product in the model, and how many lines of it a row makes."""
    program = expanded(model.program((1, *row)))
    products = [step for step in program.steps if step.name == "matmul"]
    return [
        (step.values[1].numbers, prod(step.values[0].shape[:-1]) // ROWS)
        for step in products
        if step.values[1].numbers is not None and len(step.values[1].shape) == 2
    ]


class Products:
    """The bare products of a model, for up to `most` rows of this shape.

    Each takes the output of the one before or, where that has another size, numbers of its own.
    16-bit weights are widened, as the engine does.
    """

    def __init__(self, model: Layer, row: Shape, most: int) -> None:
        dtype = model.dtype or np.dtype("float32")
        self.dtype = np.dtype("float32") if dtype.itemsize == 2 else dtype
        self.steps: list[tuple[HostArray | None, HostArray, int, HostArray]] = []
        size = prod(row)
        for weight, lines in products_of(model, row):
            inputs, outputs = weight.shape
            own = None if lines * inputs == size else draw((most, lines, inputs), self.dtype)
            out = np.empty((most * lines, outputs), self.dtype)
            self.steps.append((own, weight.astype(self.dtype), lines, out))
            size = lines * outputs

    def over(self, x: HostArray, last: HostArray | None = None) -> Run:
        """The products for these rows, with nothing left to do but them; the last into `last`."""
        rows, left, calls = len(x), x, []
        for i, (own, weight, lines, memory) in enumerate(self.steps):
            left = (left if own is None else own[:rows]).reshape(rows * lines, len(weight))
            out = memory[: rows * lines]
            if last is not None and i == len(self.steps) - 1:
                out = last
            calls.append((left, weight, out))
            left = out

        def run() -> HostArray:
            for left, weight, out in calls:
                np.matmul(left, weight, out=out)
            return out

        return run

    def __str__(self) -> str:
        weights = [weight for _, weight, _, _ in self.steps]
        return "-".join(str(size) for size in (*map(len, weights), weights[-1].shape[1]))


def draw(shape: Shape, dtype: Any, seed: int = 0) -> HostArray:
    """Normal numbers."""
    numbers = np.random.default_rng(seed).standard_normal(shape, "float32")
    return numbers.astype(dtype, copy=False)


# the clock


def fastest(run: Run, seconds: float) -> float:
    """The seconds of the fastest of as many calls as fill so many seconds."""
    end, least = time.perf_counter() + seconds, float("inf")
    while least == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        least = min(least, time.perf_counter() - start)
    return least


def calls_in(turn: float, seconds: float) -> int:
    """How many calls that take so many seconds make a turn."""
    return max(1, min(100_000, int(turn / seconds)))


def timed(run: Run, calls: int) -> float:
    """The seconds of one of so many calls, after one that does not count."""
    run()  # wakes the threads and brings the weights into cache
    gc.disable()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    seconds = time.perf_counter() - start
    gc.enable()
    return seconds / calls


# the comparison


def against_floor(
    model: Layer,
    row: Shape,
    *,
    title: str = "model",
    rows: int | None = None,
    rounds: int = 15,
    say: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """The model on normal numbers, against its bare products and against plain NumPy.

    Without `rows`, as many as make about 10^10 multiply-adds. OptionError if there is no product.
    """
    from nnxp.testing.parity import compare, error_bound

    check_model(model, "against_floor")
    rows = None if rows is None else whole("rows", rows)
    rounds, row = whole("rounds", rounds), model._shape(row)
    work = sum(weight.size * lines for weight, lines in products_of(model, row))
    if not work:
        raise OptionError(f"{title}: the model has no Dense layer, so no products to compare with")
    if rows is None:  # at most a quarter of a GiB of them
        rows = max(1, min(10**10 // work, 2**28 // (4 * prod(row)), 2**17))
    x = draw((rows, *row), model.dtype or "float32")
    products = Products(model, row, rows)
    title = f"{title}: {products} {x.dtype}"
    engine = Engine(model, "numpy")
    runs: dict[str, Run] = {
        "nnxp": lambda: engine(x),
        PLAIN: lambda: model(x),
        FLOOR: products.over(x.astype(products.dtype, copy=False)),
    }
    say(f"{title}, {count(rows, 'row')}: what is due, in float64")
    some = slice(None, None, max(1, rows // CHECKED))
    value, bound = error_bound(model, x[some])
    problems, errors = {}, {}
    for name in ("nnxp", PLAIN):
        check = compare(name, "", "cpu", runs[name]()[some], value, bound)
        errors[name] = check.ratio
        problems[name] = "" if check.ok else f"its result is wrong: {check.problem}"
    runs = {name: run for name, run in runs.items() if not problems.get(name)}
    calls = {name: calls_in(TURN, fastest(run, TURN)) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in (*problems, FLOOR)}
    for number in range(rounds):
        say(f"{title}, {count(rows, 'row')}: round {number + 1} of {rounds}")
        order = np.random.default_rng(number).permutation(list(runs))
        for name in order.tolist():
            time.sleep(PAUSE)
            seconds[name].append(timed(runs[name], calls[name]))
    floor = tuple(seconds[FLOOR])
    results = [
        Result(name, tuple(own), floor, errors.get(name), problems.get(name, ""))
        for name, own in seconds.items()
    ]
    return Comparison(title, rows, rounds, here(), tuple(results))
