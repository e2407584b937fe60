"""The clock: contenders in processes of their own, found right first, and then timed in turns.

A contender is a command. Its process obeys the lines on its stdin, and answers each, and its own
start, with a line of JSON on its stdout:

    (start)        {}
    build          builds its network: {} or {"absent": what is not installed}
    check PATH     computes once and leaves the result in PATH (.npy)
    warm SECONDS   computes for that long; "seconds" are those of the fastest call
    time CALLS     one call that does not count, then CALLS that do; "seconds" are those of one
    (end of file)  ends

`serve` is all of that for a contender written in Python, and loads nothing that could get in its
way: the parent alone loads the parity kit. `python -m nnxp.race WHO MODEL ROWS SHAPE` is the
process of nnxp itself, or of its floor, the bare matrix products of the same network.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import queue
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from math import isfinite, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from threadpoolctl import ThreadpoolController, threadpool_info

from nnxp import kernels
from nnxp._arrays import Array, HostArray, Shape
from nnxp._errors import OptionError
from nnxp.backend._share import core_quota, cores
from nnxp.backend.cpu import one_blas_thread, worker_count
from nnxp.engine import Engine
from nnxp.io.checkpoint import load
from nnxp.layers._layer import Layer
from nnxp.layers._trace import trace_shapes
from nnxp.layers.dense import Dense

if TYPE_CHECKING:
    from nnxp.testing.parity import Expected

PINS = (
    *("OPENBLAS_", "GOTO_", "MKL_", "BLIS_", "VECLIB_", "DNNL_", "ONEDNN_"),
    *("OMP_", "GOMP_", "KMP_", "NUMEXPR_", "NPY_", "XLA_FLAGS", "ATEN_CPU_CAPABILITY"),
    *("NNXP_WORKERS", "NNXP_BACKEND"),
)
"""Variables that begin like these tell libraries which code and how many threads to run: each
contender's process starts without them, so that all run at their best."""

FLOOR, TILED = "floor", "floor-tiled"
"""The bare products, over all rows with BLAS' own threads; and on tiles, one thread a worker."""

_FLOORS = (
    f"{FLOOR}: the bare matrix products of the same network, all rows at once, BLAS' own threads",
    f"{TILED}: the same on tiles of rows, with one BLAS thread for each worker",
)

TURN = 0.2  # seconds of work in a turn: short calls are timed many at once
PAUSE = 0.25  # between turns; idle threads of BLAS and OpenMP were seen to spin for up to 0.15 s

_ABSENT = "not installed"

Run: TypeAlias = Callable[[], HostArray]
"""Computes the network for the rows that it was built for."""


@dataclass(frozen=True)
class Contender:
    """Who takes part: a name, the command of its process, and the result that is due."""

    name: str
    command: Sequence[str | Path]
    expected: Expected


@dataclass(frozen=True)
class Result:
    """How one contender did: the seconds of one call in each round, or the problem it had.

    `share` is the floor's time in its own, by rounds: lower quartile, median, upper quartile.
    `error` is its largest difference from float64 in units of the computed bound, `rest_bytes` the
    memory that its process held before its first call, `peak_bytes` the most it ever held, `about`
    what it says of itself.
    """

    name: str
    seconds: tuple[float, ...]
    share: tuple[float, float, float] | None
    error: float | None
    rest_bytes: int | None
    peak_bytes: int | None
    about: dict[str, Any]
    problem: str

    @property
    def absent(self) -> bool:
        """Whether it is not there, which is no fault of its own."""
        return self.problem.startswith(_ABSENT)

    @property
    def quartiles(self) -> tuple[float, float, float] | None:
        """The lower quartile, the median and the upper quartile of the seconds."""
        return _quartiles(self.seconds) if self.seconds else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        low, median, high = self.quartiles or (None, None, None)
        of_low, of_median, of_high = self.share or (None, None, None)
        return {
            **asdict(self),
            "median": median,
            "quartiles": (low, high),
            "least": min(self.seconds, default=None),
            "share": of_median,
            "share_quartiles": (of_low, of_high),
        }


@dataclass(frozen=True)
class Race:
    """All contenders of one race, and the place where it was run; print it."""

    title: str
    rows: int
    rounds: int
    place: dict[str, Any]
    results: tuple[Result, ...]

    def __getitem__(self, name: str) -> Result:
        return next(each for each in self.results if each.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        results = [each.to_dict() for each in self.results]
        return {**asdict(self), "results": results}

    def __str__(self) -> str:
        from nnxp.testing import LIMIT

        header = ("", "median [quartiles]", "of the floor", "rows/s", "peak MiB", "error")
        lines = [header, *(self._line(each) for each in self.results if not each.problem)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        return "\n".join(
            [
                f"{self.title}, {_count(self.rows, 'row')}",
                *_said_place(self.place, self.results),
                *table,
                *(f"{each.name}: {each.problem}" for each in self.results if each.problem),
                f"{_count(self.rounds, 'round')}, in turns; error is the largest difference from "
                f"float64, in units of the computed bound; {LIMIT:g} are allowed",
                *(_FLOORS if any(each.name == TILED for each in self.results) else ()),
            ]
        )

    def _line(self, result: Result) -> tuple[str, ...]:
        if result.quartiles is None:
            return (result.name, *[""] * 5)
        low, median, high = result.quartiles
        unit, scale = next(each for each in _UNITS if median * each[1] < 1000 or each[1] == 1)
        first, middle, last = (_figures(each * scale) for each in (low, median, high))
        share = ""
        if result.share is not None:
            share = "{1:.0%} [{0:.0%}, {2:.0%}]".format(*result.share)
        return (
            result.name,
            f"{middle} {unit} [{first}, {last}]",
            share,
            f"{self.rows / median:,.0f}",
            "" if result.peak_bytes is None else f"{result.peak_bytes / 2**20:,.0f}",
            f"{result.error:.2f}",
        )


_UNITS = (("µs", 1e6), ("ms", 1e3), ("s", 1.0))


def race(
    contenders: Sequence[Contender],
    *,
    title: str,
    rows: int,
    rounds: int = 15,
    turn: float = TURN,
    pause: float = PAUSE,
    patience: float = 600.0,
    seed: int = 0,
    settings: Mapping[str, str] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Race:
    """Start every contender, check what each computes, then time those that are right, in turns.

    A turn is about `turn` seconds of one contender's work, and comes `pause` seconds after the
    one before, when idle threads have gone to sleep; in each round everybody has one, in an order
    drawn with `seed`. Whoever crashes, is wrong, or does not answer within `patience` seconds is
    out, and the result says why. Whoever is called FLOOR is the floor of the others. `settings`
    are variables for the contenders' processes, which start without PINS. `say` hears what goes on.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nnxp-race-")))
        environment, unset = _environment(settings or {})
        place = _place() | {"unset": unset, "settings": dict(settings or {})}
        children = [
            stack.enter_context(_running(each, environment, folder / str(i), patience))
            for i, each in enumerate(contenders)
        ]
        say(f"{title}, {_count(rows, 'row')}: who is there, and right?")
        for step in (_Child.start, _Child.build, _Child.check, lambda child: child.warm(turn)):
            for child in children:  # they start together; the rest is one after the other
                child.attempt(step)
        order = random.Random(seed)
        for number in range(rounds):
            say(f"{title}, {_count(rows, 'row')}: round {number + 1} of {rounds}")
            racing = [child for child in children if not child.problem]
            for child in order.sample(racing, len(racing)):
                time.sleep(pause)
                child.attempt(_Child.take_turn)
        floor = next((child for child in children if child.contender.name == FLOOR), None)
        results = tuple(child.result(floor) for child in children)
    return Race(title, rows, rounds, place, results)


class _Out(Exception):
    """A contender that is out of the race, and why."""


class _Child:
    """A contender's process."""

    def __init__(
        self, contender: Contender, environment: dict[str, str], path: Path, patience: float
    ) -> None:
        self.contender, self.path, self.patience = contender, path, patience
        self.problem = ""
        self.error: float | None = None
        self.seconds: list[float] = []
        self.calls = 1
        self.said: dict[str, Any] = {}
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        with open(path.with_suffix(".err"), "wb") as errors:
            self.process = subprocess.Popen(
                [str(word) for word in contender.command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                encoding="utf-8",
                errors="replace",
                env=environment,
                start_new_session=True,  # so that what it starts can be ended with it
            )
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self.lines.put(line)
        self.lines.put("")

    def attempt(self, step: Callable[[_Child], None]) -> None:
        """One step of the race; whoever fails in it is out."""
        if not self.problem:
            try:
                step(self)
            except _Out as out:
                self.problem = str(out)
                self.kill()

    def start(self) -> None:
        """Wait until it has started."""
        self._answer("its start")

    def build(self) -> None:
        """Let it build its network, or find by trial how it is best built."""
        self.said |= self._ask("build")
        if "absent" in self.said:
            raise _Out(f"{_ABSENT}: {self.said['absent']}")

    def check(self) -> None:
        """Compare its result with what is due."""
        from nnxp.testing.parity import compare

        path, due = self.path.with_suffix(".npy"), self.contender.expected
        self.said |= self._ask(f"check {path}")
        try:
            made = np.load(path)
        except (OSError, ValueError) as error:
            raise _Out(f"it left no result: {error}") from None
        path.unlink()
        if made.dtype.kind == "V":  # a .npy file has no name for bfloat16
            made = made.view(due.dtype)
        if made.dtype != due.dtype:
            raise _Out(f"its result is {made.dtype}, not {due.dtype}")
        judged = compare("", "", "cpu", made, due.value, due.error)
        self.error = judged.ratio if isfinite(judged.ratio) else None  # JSON knows no infinity
        if not judged.ok:
            raise _Out(f"its result is wrong: {judged.problem}")

    def warm(self, turn: float) -> None:
        """Compute for a turn, and find out how many calls make one."""
        fastest = self._seconds(f"warm {turn}")
        self.calls = max(1, min(100_000, int(turn / fastest)))

    def take_turn(self) -> None:
        """One turn on the clock."""
        self.seconds.append(self._seconds(f"time {self.calls}"))

    def _seconds(self, line: str) -> float:
        answer = self._ask(line)
        seconds = answer.get("seconds")
        if not (isinstance(seconds, float) and seconds > 0):
            raise _Out(f"its answer to {line!r} is {answer!r:.100}")
        self.said |= answer
        return seconds

    def _ask(self, line: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        with suppress(OSError):  # if it has ended, there is no answer either, and that says why
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()
        return self._answer(repr(line))

    def _answer(self, asked: str) -> dict[str, Any]:
        try:
            line = self.lines.get(timeout=self.patience)
        except queue.Empty:
            raise _Out(f"no answer to {asked} within {self.patience:g} s") from None
        if not line:
            raise _Out(f"its process ended with code {self.process.wait()}{self._last_words()}")
        try:
            answer = json.loads(line)
            return {str(key): value for key, value in answer.items()}
        except (ValueError, AttributeError):
            raise _Out(f"its answer to {asked} is {line.strip()!r:.100}") from None

    def _last_words(self) -> str:
        lines = self.path.with_suffix(".err").read_text(errors="replace").strip().splitlines()
        return f": {lines[-1].strip():.300}" if lines else ""

    def kill(self) -> None:
        """End the process and all that it started."""
        assert self.process.stdin is not None
        with suppress(OSError):  # a line may still have been on its way
            self.process.stdin.close()
        if self.process.poll() is None:
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """Let it end by itself, or end it."""
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        self.kill()

    def result(self, floor: _Child | None) -> Result:
        share = None
        if floor is not None and not (floor.problem or self.problem) and self.seconds:
            pairs = zip(floor.seconds, self.seconds, strict=True)  # of the same rounds
            share = _quartiles([of_floor / own for of_floor, own in pairs])
        return Result(
            name=self.contender.name,
            seconds=() if self.problem else tuple(self.seconds),
            share=share,
            error=self.error,
            rest_bytes=self.said.get("rest_bytes"),
            peak_bytes=self.said.get("peak_bytes"),
            about=self.said.get("about", {}),
            problem=self.problem,
        )


@contextmanager
def _running(
    contender: Contender, environment: dict[str, str], path: Path, patience: float
) -> Iterator[_Child]:
    child = _Child(contender, environment, path, patience)
    try:
        yield child
    except BaseException:
        child.kill()
        raise
    child.close()


def _figures(value: float) -> str:
    """Three of them, and never an exponent."""
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, median, high = np.percentile(values, [25, 50, 75]).tolist()
    return low, median, high


def _environment(settings: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """The variables for the contenders' processes, and those of ours that they go without."""
    harmless = "KMP_DUPLICATE_LIB_OK"  # threadpoolctl sets it
    unset = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(PINS) and name != harmless
    }
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    return {**kept, **settings}, {name: unset[name] for name in unset if name not in settings}


# the place


def _place() -> dict[str, Any]:
    from nnxp.doctor.facts import cpu

    return {
        "device": "cpu",
        "cpu": cpu(),
        "cores": cores(),
        "core_quota": core_quota(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _said_place(place: Mapping[str, Any], results: Sequence[Result]) -> Iterator[str]:
    """Where a race was run, in words: one line, and one more for what was left aside."""
    quota = place["core_quota"]
    limited = f" (of which it may use the time of {quota:g})" if quota else ""
    found = [each.about["blas"][0] for each in results if each.about.get("blas")]
    blas = "{name} {version} {kernels}".format(**found[0]) if found else "no BLAS that is known"
    yield f"ran on cpu: {place['cpu']}, {place['cores']} cores{limited}, {blas}"
    if place["settings"]:
        yield "with " + ", ".join(f"{name}={value}" for name, value in place["settings"].items())
    if place["unset"]:
        without = ", ".join(f"{name}={value}" for name, value in place["unset"].items())
        yield f"without {without}, which are set here"


# a contender's side


def serve(build: Callable[[], tuple[Run, Mapping[str, Any]]]) -> None:
    """Take part in a race: build, then obey stdin until it ends.

    `build` gives what is to be timed, and what there is to say about it, for JSON; a module that
    it does not find is not installed. Whatever else the process prints goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    answer()
    for line in sys.stdin:
        order, _, rest = line.strip().partition(" ")
        if order == "build":
            try:
                run, about = build()
            except ModuleNotFoundError as error:
                answer(absent=str(error))
                return
            answer(rest_bytes=_memory("VmRSS"))
        elif order == "check":
            np.save(rest, run())
            answer(about={**about, "blas": _blas()}, peak_bytes=_memory("VmHWM"))
        else:
            seconds = {"warm": _warm, "time": _time}[order](run, float(rest))
            answer(seconds=seconds, peak_bytes=_memory("VmHWM"))


def _warm(run: Run, seconds: float) -> float:
    end = time.perf_counter() + seconds
    fastest = float("inf")
    while fastest == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


def _time(run: Run, calls: float) -> float:
    run()  # wakes the threads and brings the weights into cache
    gc.disable()
    start = time.perf_counter()
    for _ in range(int(calls)):
        run()
    seconds = time.perf_counter() - start
    gc.enable()
    return seconds / int(calls)


def _memory(name: str) -> int | None:
    """VmRSS, the bytes that this process holds, or VmHWM, the most it has held.

    Linux alone tells. ru_maxrss does not: in a child it begins with what the parent held.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)


def _blas() -> list[dict[str, Any]]:
    """Every BLAS in this process, NumPy's own first: which one, which kernels, how many threads."""
    found = [each for each in threadpool_info() if each["user_api"] == "blas"]
    found.sort(key=lambda each: "numpy" not in each["filepath"])
    return [
        {
            "name": {"openblas": "OpenBLAS"}.get(each["internal_api"], each["internal_api"]),
            "version": each["version"],
            "kernels": each.get("architecture"),
            "threads": each["num_threads"],
        }
        for each in found
    ]


# nnxp and its floor


class Products:
    """The matrix products in a model, for rows of this shape, and nothing else: its floor.

    Each takes the output of the one before, or, where that has another size, numbers of its own,
    the same for each row. The outputs of up to `most` rows have their place, so that no call
    allocates any.
    """

    def __init__(self, model: Layer, row: Shape, most: int) -> None:
        self.dtype = model.dtype or np.dtype("float32")
        if self.dtype.itemsize == 2:
            self.dtype = np.dtype("float32")  # as nnxp computes
        layers = [
            (step.input, step.layer.weight)
            for step in trace_shapes(model, (1, *row))
            if isinstance(step.layer, Dense)
        ]
        self.weights = [weight.astype(self.dtype) for _, weight in layers]
        self.heights = [prod(shape[:-1]) for shape, _ in layers]  # lines of the product, for a row
        rng = np.random.default_rng(0)
        self.own: dict[int, HostArray] = {}
        size = prod(row)
        for i, (shape, weight) in enumerate(layers):
            if prod(shape) != size:
                self.own[i] = np.repeat(draw(rng, shape, self.dtype), most, axis=0)
            size = prod(shape[:-1]) * weight.shape[1]
        self.memory = [
            np.empty((most * height, weight.shape[1]), self.dtype)
            for height, weight in zip(self.heights, self.weights, strict=True)
        ]

    def __call__(self, x: HostArray, out: HostArray) -> None:
        """The products for x (rows, ...), the last into `out`."""
        memory = [*self.memory[:-1], out]
        self._chain(x, lambda left, weight, i: np.matmul(left, weight, out=memory[i][: len(left)]))

    def over(self, x: HostArray) -> Run:
        """The same for these rows, again and again, with nothing left to do but the products."""
        steps: list[tuple[HostArray, HostArray, HostArray]] = []

        def product(left: HostArray, weight: HostArray, i: int) -> HostArray:
            steps.append((left, weight, self.memory[i][: len(left)]))
            return steps[-1][2]

        last: HostArray = self._chain(x, product)

        def run() -> HostArray:
            for left, weight, out in steps:
                np.matmul(left, weight, out=out)
            return last

        return run

    def expected(self, x: HostArray) -> Expected:
        """What the last product should be."""
        from nnxp.testing import bounded

        def last(x: Array) -> Array:
            return self._chain(x, lambda left, w, i: kernels.matmul(bounded.asarray(left), w))

        return expected(last, x)

    def _chain(self, x: Array, product: Callable[[Any, HostArray, int], Any]) -> Any:
        rows = x.shape[0]
        for i, (weight, height) in enumerate(zip(self.weights, self.heights, strict=True)):
            left = self.own[i][:rows] if i in self.own else x
            x = product(left.reshape(rows * height, weight.shape[0]), weight, i)
        return x


BLOCK = 512  # rows that the reference takes together


def expected(function: Layer | Callable[[Array], Array], x: HostArray) -> Expected:
    """What the function should make of these rows, in float64, and the bound of doubt."""
    from nnxp.testing.parity import Expected, error_bound

    blocks = [x[i : i + BLOCK] for i in range(0, len(x), BLOCK)]
    with one_blas_thread(), ThreadPoolExecutor(worker_count()) as pool:
        values, errors = zip(*pool.map(partial(error_bound, function), blocks), strict=True)
    return Expected(np.concatenate(values), np.concatenate(errors), x.dtype)


def draw(rng: np.random.Generator, shape: Shape, dtype: Any) -> HostArray:
    """Normal numbers."""
    return rng.standard_normal(shape, "float32").astype(dtype, copy=False)


def entrant(who: str, model: Layer, x: HostArray) -> tuple[Run, dict[str, Any]]:
    """What `serve` wants of "nnxp", "floor" and "floor-tiled" for these rows."""
    from nnxp import __version__

    about = {"versions": {"nnxp": __version__, "numpy": np.__version__}}
    if who == "nnxp":
        engine = Engine(model, "numpy")
        return lambda: engine(x), about
    products = Products(model, x.shape[1:], len(x))
    x = x.astype(products.dtype, copy=False)
    if who == FLOOR:
        return products.over(x), about
    return _tiled(model, x, about)


def _tiled(model: Layer, x: HostArray, about: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    """The products on tiles, with the tile that is the fastest here."""
    workers = worker_count()
    sizes = [size for size in (256, 512, 1024, 2048, 4096) if size * workers <= len(x)]
    sizes = sizes or [-(-len(x) // workers)]
    ThreadpoolController().limit(limits=1, user_api="blas")
    pool = ThreadPoolExecutor(workers)
    own = [Products(model, x.shape[1:], max(sizes)) for _ in range(workers)]
    height, width = own[0].heights[-1], own[0].weights[-1].shape[1]
    out = np.empty((len(x) * height, width), own[0].dtype)

    def run(tile: int) -> HostArray:
        starts = iter(range(0, len(x), tile))

        def work(products: Products) -> None:
            for i in starts:
                rows = x[i : i + tile]
                products(rows, out[i * height : (i + len(rows)) * height])

        list(pool.map(work, own))
        return out

    fastest = min(sizes, key=lambda size: _warm(lambda: run(size), TURN / 4))
    return lambda: run(fastest), {**about, "setting": f"tiles of {fastest} rows"}


def against_floor(
    path: Path,
    row: Shape,
    *,
    rows: int | None = None,
    rounds: int = 15,
    say: Callable[[str], None] = lambda line: None,
) -> Race:
    """The model in a file against the bare products of its own layers, on the CPU here.

    Rows are normal numbers, as many as make about 10^10 multiply-adds if `rows` is None.
    """
    model = load(path)
    products = Products(model, row, BLOCK)
    if not products.weights:
        raise OptionError(f"{path}: the model has no Dense layer: it has no floor to measure")
    if rows is None:
        work = sum(h * w.size for h, w in zip(products.heights, products.weights, strict=True))
        most = 2**28 // (4 * prod(row))  # a quarter of a GiB of rows
        rows = max(1, min(10**10 // work, most, 2**17))
    x = _rows(model, rows, row)
    title = f"{path.name}: " + "-".join(str(w.shape[0]) for w in products.weights)
    title += f"-{products.weights[-1].shape[1]} {x.dtype}"
    say(f"{title}, {_count(rows, 'row')}: what is due, in float64")
    due = expected(model, x)
    bare = products.expected(x.astype(products.dtype, copy=False))
    command = (sys.executable, "-P", "-m", "nnxp.race")
    given = (path, str(rows), ",".join(map(str, row)))
    contenders = [
        Contender(name, (*command, name, *given), due if name == "nnxp" else bare)
        for name in ("nnxp", FLOOR, TILED)
    ]
    return race(contenders, title=title, rows=rows, rounds=rounds, turn=TURN, pause=PAUSE, say=say)


def _rows(model: Layer, rows: int, row: Shape) -> HostArray:
    return draw(np.random.default_rng(0), (rows, *row), model.dtype or "float32")


def main() -> None:
    """The process of one contender: WHO MODEL ROWS SHAPE."""
    who, path, rows, row = sys.argv[1:]
    shape = tuple(int(size) for size in row.split(","))

    def build() -> tuple[Run, dict[str, Any]]:
        model = load(path)
        return entrant(who, model, _rows(model, int(rows), shape))

    serve(build)


if __name__ == "__main__":
    main()
