"""What bench/gpu.py runs, each step in a process of its own:

    python bench/gpu_steps.py NAME FOLDER FIGURES.json [BACKEND]

A step yields figures under a title: {name: value}, or {row: {column: value}} for a table. They are
written down at once, so that a step that is ended leaves what it has found. A "problem" among them
is what makes a step fail; "out" is why another contender is not there, which is no fault of ours.

On another backend than "cupy" all is done once on tiny arrays: that it runs, not what it measures.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np

import nnxp
from gpu_contenders import PRECISIONS, TF32_ROUNDOFF, Task, seconds
from networks import Network
from nnxp import kernels, race
from nnxp._arrays import float_dtype
from nnxp.kernels.linear import precision as products_precision
from nnxp.race import FLOOR, Contender
from nnxp.testing import LIMIT, error_bound, goldens
from nnxp.testing.parity import compare, product_bound
from nnxp.verify import Found, Verification, record_goldens, verify, write_receipt

ROOT = Path(__file__).parents[1]
PROCESS = Path(__file__).with_name("gpu_contenders.py")

Array = Any
Values = dict[str, Any]
Figures = Iterator[tuple[str, Values]]
Size = TypeVar("Size")

OURS = (FLOOR, "nnxp", "nnxp-host", "nnxp-eager", "copy")
DTYPES = ("float32", "float16", "bfloat16")
LATENCY = (1, 16, 64, 512)


@dataclass(frozen=True)
class Here:
    """Where the steps run, and the folder for what they leave."""

    backend: str
    out: Path

    @property
    def on_gpu(self) -> bool:
        return self.backend == "cupy"

    def sized(self, there: Size, small: Size) -> Size:
        """What is meant for a GPU, or the small one for a try without."""
        return there if self.on_gpu else small

    @cached_property
    def device(self) -> nnxp.Backend:
        return nnxp.get_backend(self.backend)

    def wait(self, y: object = None) -> None:
        self.device.synchronize()

    def draw(self, *shape: int, dtype: str = "float32", seed: int = 0) -> Array:
        """Normal numbers on the host."""
        host = np.random.default_rng(seed).standard_normal(shape, "float32")
        return host.astype(float_dtype(dtype), copy=False)

    @property
    def large(self) -> Network:
        return self.sized(
            Network((784, 4096, 4096, 10), "relu", 65536), Network((20, 32, 10), "relu", 300)
        )

    @property
    def narrow(self) -> Network:
        return self.sized(
            Network((784, 128, 64, 10), "relu", 65536), Network((20, 16, 10), "relu", 300)
        )


# where it runs, and whether it is right


def where(here: Here) -> Figures:
    """The machine, as nnxp doctor sees it."""
    from nnxp.doctor import diagnose

    found = diagnose(here.backend).to_dict()
    card = (found["cuda"].get("devices") or {}).get("cuda:0", {})
    system, cuda = found["system"], found["cuda"]
    yield (
        "machine",
        {
            "gpu": card.get("name"),
            "compute capability": card.get("compute_capability"),
            "memory": card.get("memory"),
            "driver": cuda.get("driver"),
            "driver's CUDA": cuda.get("driver_cuda"),
            "CuPy": cuda.get("cupy"),
            "CuPy's CUDA": cuda.get("cupy_cuda"),
            "cuBLASLt": (cuda.get("cublaslt") or {}).get("reason"),
            "cpu": system["cpu"],
            "cores": system["cores"],
            "python": system["python"],
            "nnxp": nnxp.__version__,
            "sources": goldens.source_hash(),
        },
    )
    names = """numpy cupy-cuda13x cupy-cuda12x nvmath-python cuda-bindings nvidia-cublas torch
        triton jax jaxlib ml_dtypes safetensors pytest""".split()
    yield "versions", {name: there for name in names if (there := _version(name))}
    yield "doctor's problems", {str(i): each for i, each in enumerate(found["problems"], 1)}
    yield "doctor", {"all": [found]}
    yield "nvidia-smi", {"lines": _lines_of("nvidia-smi")}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _lines_of(*command: str) -> list[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [str(error)]
    return (done.stdout + done.stderr).splitlines()


def verified(here: Here) -> Figures:
    """nnxp verify with the GPU required: every layer in every type; leaves a receipt."""
    found = verify(backends=[here.backend], required=[here.backend])
    write_receipt(found, here.out / "receipt.json")
    for each in found.found:
        yield (
            each.name,
            {
                "device": each.device,
                "checks": each.checks,
                "failed": each.failed,
                "largest error in units of the bound": each.largest,
                "float32 product in units of the bound": each.product,
                "float32 is float32": not each.tf32,
                "seconds": each.seconds,
            },
        )
    if not found.ok:
        failures = [f"{each.name} {each.what}: {each.problem}" for each in found.failures]
        yield "failures", {"problem": f"{len(failures)} checks failed", "which": failures[:100]}
        for line in failures[:20]:
            print(line)


def _lt_in_use(here: Here) -> str:
    if not here.on_gpu:
        return "only on CUDA"
    from nnxp.kernels.cuda._lt import why_not

    return why_not() or "in use"


def parity(here: Here) -> Figures:
    """The tests that run on a GPU, with the GPU required."""
    command = [sys.executable, "-m", "pytest", "-p", "nnxp_pytest", "-p", "no:cacheprovider"]
    command += [f"--nnxp-require={here.backend}", "-k", f"{here.backend} or nnxp_gpu"]
    command += ["-v", "-rfE", "--tb=short", "--durations=10", "--no-header", "--color=no"]
    command += ["--continue-on-collection-errors"]
    # No other plugins: this machine's may warn of things, and warnings are errors here.
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    failed, ran, last = [], {}, ""
    with subprocess.Popen(
        [*command, str(ROOT / "tests")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip("= \n") or last
            if line.startswith(("FAILED ", "ERROR ")):
                failed.append(line.strip())
            if match := re.match(r"nnxp: (\w+): (.*)", line):
                ran[match[1]] = match[2]
    code = process.returncode
    figures: Values = {"summary": last, **ran, "cuBLASLt": _lt_in_use(here)}
    if code != 0:
        figures["problem"] = f"pytest ended with {code}"
    yield "pytest", figures
    yield "failed", {"which": failed}


def recorded(here: Here) -> Figures:
    """A golden of what this GPU answers, and whether it holds against float64."""
    from nnxp.testing.goldens import provenance

    folder, backend = here.out / "goldens", here.device
    found = Found(backend.name, backend.device, True, backend.why, about=provenance(backend))
    record_goldens(Verification("goldens", (found,), ()), folder)
    for path in sorted(folder.glob("*.safetensors")):
        report = goldens.check(path)
        values: Values = {"cases": len(report.checks), "bytes": path.stat().st_size}
        values["largest error in units of the bound"] = report.largest
        if not report.ok:
            values["problem"] = str(report.first_failure)
        yield path.name, values


# parts of the floor


def products(here: Here) -> Figures:
    """What memory and products reach here, and whether float32 products are in float32."""
    yield "bandwidth, GB/s", _bandwidths(here)
    n = here.sized(8192, 64)
    factors = here.draw(n, n, seed=1), here.draw(n, n, seed=2)
    for name, (dtype, tf32) in PRECISIONS.items():
        a, b = (here.device.put(each.astype(float_dtype(dtype))) for each in factors)
        values: Values = {}
        for who, make in PRODUCTS.items():
            values |= attempt(who, partial(_flops, here, make, a, b, tf32, 2 * n**3))
        yield f"{name} product of {n} x {n}, TFLOP/s", values
    n = here.sized(1024, 32)
    x, weight = here.draw(n, n, seed=3), here.draw(n, n, seed=4)
    exact = x.astype("float64") @ weight
    unit = product_bound(x, weight)
    rounded = TF32_ROUNDOFF * np.sqrt(np.square(x, dtype="float64") @ np.square(weight))
    for name, bound in (("fp32", unit), ("tf32", unit + rounded)):
        there = here.device.put(x), here.device.put(weight)
        errors: Values = {}
        for who, make in PRODUCTS.items():
            errors |= attempt(who, partial(_error, here, make, there, name, exact, bound))
        if "nnxp" in errors and not errors["nnxp"] <= LIMIT:
            errors["problem"] = f"nnxp's {name} product is off by {errors['nnxp']:.3g} units"
        yield f"{name} product, error in units of its bound ({LIMIT:g} are allowed)", errors


def attempt(name: str, measure: Callable[[], Any]) -> Values:
    """What is measured under its name, or why that failed: our fault only if it is ours."""
    try:
        return {name: measure()}
    except Exception as error:
        key = "problem" if name == "nnxp" else f"{name} is out"
        return {key: f"{name}: {type(error).__name__}: {error}"[:300]}


def _bandwidths(here: Here) -> Values:
    size = here.sized(1 << 28, 1 << 16)
    host, device = np.ones(size, "uint8"), here.device
    there = device.put(host)
    found = {"on the card, read and written": _copied(here, 4 * size)}

    def measure(run: Callable[[], object]) -> float:
        return size / seconds(run, here.wait) / 1e9

    found["to the device, from pageable memory"] = measure(lambda: device.put(host))
    found["to the host, into pageable memory"] = measure(lambda: device.get(there))
    if here.on_gpu:
        import cupyx

        pinned = cupyx.empty_pinned(size, "uint8")
        pinned[:] = 1
        found["to the device, from pinned memory"] = measure(lambda: there.set(pinned))
        found["to the host, into pinned memory"] = measure(lambda: there.get(out=pinned))
    return found


def _copied(here: Here, size: int) -> float:
    """GB/s of a copy of so many bytes on the card: each is read and written."""
    xp = here.device.xp
    x = here.device.put(np.ones(size // 4, "float32"))
    y = x * 0
    return 2 * size / seconds(lambda: xp.copyto(y, x), here.wait) / 1e9


def _ours(here: Here, a: Array, b: Array, tf32: str | None) -> Callable[[], Array]:
    def run() -> Array:
        return kernels.linear(a, b)

    return run


def _cupys(here: Here, a: Array, b: Array, tf32: str | None) -> Callable[[], Array]:
    if tf32:
        raise RuntimeError("CuPy is told to use TF32 before it is loaded, or not at all")
    out = here.device.xp.empty((a.shape[0], b.shape[1]), a.dtype)
    return lambda: here.device.xp.matmul(a, b, out=out)


def _torchs(here: Here, a: Array, b: Array, tf32: str | None) -> Callable[[], Array]:
    import torch

    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    left, right = torch.from_dlpack(a), torch.from_dlpack(b)
    return lambda: torch.matmul(left, right)


PRODUCTS = {"nnxp": _ours, "cupy.matmul": _cupys, "torch": _torchs}


@contextmanager
def rounding_to(tf32: str | None) -> Iterator[None]:
    """Within the block nnxp's products may round their factors to TF32."""
    token = products_precision.set(tf32)
    try:
        yield
    finally:
        products_precision.reset(token)


def _flops(here: Here, make: Any, a: Array, b: Array, tf32: str | None, work: int) -> float:
    with rounding_to(tf32):
        return float(work / seconds(make(here, a, b, tf32), here.wait, 0.1) / 1e12)


def _error(here: Here, make: Any, there: Any, name: str, exact: Array, bound: Array) -> float:
    tf32 = PRECISIONS[name][1]
    with rounding_to(tf32):
        y = make(here, *there, tf32)()
    y = y.cpu().numpy() if type(y).__module__ == "torch" else nnxp.asnumpy(y)
    return compare("", "", "", y, exact, bound).ratio


# races


def raced(here: Here, names: Iterable[str], task: Task) -> tuple[Values, Values, Values]:
    """A table of how the contenders did, their seconds in each round, and what they say of it."""
    due = {name: task.expected(name) for name in ("", FLOOR, "copy") if name in ("", *names)}
    found = race.race(
        [
            Contender(name, (sys.executable, PROCESS, name, str(task)), due.get(name, due[""]))
            for name in names
        ],
        title=str(task),
        rows=task.network.rows,
        rounds=here.sized(7, 1),
        turn=here.sized(0.1, 0.001),
        pause=here.sized(0.02, 0.0),
        patience=90.0,
        settings={"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        say=lambda line: print(line, flush=True),
    )
    rounds = {
        each.name: [second / each.about["calls"] for second in each.seconds]
        for each in found.results
        if each.seconds
    }
    sizes = task.network.sizes
    work = 2 * task.network.rows * sum(a * b for a, b in pairwise(sizes))
    table: Values = {}
    for each in found.results:
        if each.problem:
            table[each.name] = {"problem" if each.name in OURS else "out": each.problem}
            continue
        low, middle, high = np.percentile(rounds[each.name], [25, 50, 75]).tolist()
        row = {"µs": middle * 1e6, "lower": low * 1e6, "upper": high * 1e6}
        row["TFLOP/s"] = work / middle / 1e12
        if FLOOR in rounds:
            row["of the floor"] = ratio(rounds[FLOOR], rounds[each.name])
        table[each.name] = row | {"error": each.error}
    said = {
        each.name: {"setting": each.about.get("setting"), **each.about.get("versions", {})}
        for each in found.results
        if each.about
    }
    return table, rounds, said


def ratio(ones: Iterable[float], others: Iterable[float]) -> float:
    """The median of the quotients of the same rounds."""
    return median(a / b for a, b in zip(ones, others, strict=True))


def _races(here: Here, names: Iterable[str], tasks: dict[str, Task]) -> Figures:
    for title, task in tasks.items():
        table, rounds, said = raced(here, names, task)
        yield title, table
        yield f"{title}: seconds by rounds", rounds
        yield f"{title}: settings", {"all": [said]}


def network(here: Here) -> Figures:
    """The large network on rows that are on the device."""
    yield from _resident(here, (FLOOR, "nnxp", "torch", "torch-compile", "jax", "naive"))


def autotune(here: Here) -> Figures:
    """The same against torch.compile when it may try for longer."""
    yield from _resident(here, (FLOOR, "nnxp", "torch-max-autotune"))


def _resident(here: Here, names: Iterable[str]) -> Figures:
    kinds = ("fp32", "bf16", "tf32", "fp16")  # the ones that most is to be learnt of come first
    tasks = {each: Task(here.large, each, "stream", here.backend) for each in kinds}
    yield from _races(here, names, tasks)


def host(here: Here) -> Figures:
    """The large network on rows in host memory, against the larger of copying and computing."""
    for each in ("fp32", "bf16"):
        task = Task(here.large, each, "stream", here.backend)
        table, rounds, said = raced(here, (FLOOR, "copy", "nnxp-host", "torch-host"), task)
        for name in rounds:
            if {FLOOR, "copy"} <= rounds.keys():
                larger = map(max, rounds[FLOOR], rounds["copy"])
                table[name]["of the larger of floor and copy"] = ratio(larger, rounds[name])
        yield each, table
        yield f"{each}: seconds by rounds", rounds
        yield f"{each}: settings", {"all": [said]}


def graphs(here: Here) -> Figures:
    """Few rows: what is replayed gives what is computed anew, and how long it takes."""
    for dtype in DTYPES:
        yield f"replayed, {dtype}", _replayed(here, dtype)
    names = ("nnxp", "nnxp-host", "nnxp-eager", "torch", "torch-host", "torch-graph", "jax")
    tasks = {
        f"{rows} row{'s' * (rows > 1)}": Task(here.narrow.of(rows), "fp32", "each", here.backend)
        for rows in here.sized(LATENCY, (1, 16))
    }
    yield from _races(here, names, tasks)


def _replayed(here: Here, dtype: str) -> Values:
    model = here.narrow.model().astype(dtype)
    engine = nnxp.Engine(model, here.backend)
    calls = same = 0
    largest = 0.0
    for rows in (1, 64):
        for seed in range(6):
            x = here.draw(rows, here.narrow.sizes[0], dtype=dtype, seed=seed)
            there = here.device.put(x)
            anew = nnxp.asnumpy(engine.model(there))
            value, bound = error_bound(model, x)
            for y in (engine(x), nnxp.asnumpy(engine(there))):
                calls += 1
                same += np.array_equal(y, anew)
                largest = max(largest, compare("", "", "", y, value, bound).ratio)
    values: Values = {"calls": calls, "same bits as anew": same}
    values["error in units of the bound"] = largest
    if largest > LIMIT:
        values["problem"] = "what is replayed is wrong"
    place = engine._places[0]
    values["recorded"] = len(place.recorded)
    if here.on_gpu and not place.recorded:
        values["problem"] = f"nothing was recorded: {_why_not_recorded(engine, there)}"
    return values


def _why_not_recorded(engine: Any, x: Array) -> str:
    """The engine goes on without a recording; this is what kept it from making one."""
    from nnxp.backend._lanes import Recorded

    try:
        Recorded(engine.backend, engine.model, x.shape, x.dtype)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "though it can be"


# what passes through, and at what rate


def nan(here: Here) -> Figures:
    """NaN and infinity come out where the reference has them, of every kernel in every type."""
    shapes = here.sized([(1, 64, 64), (2048, 64, 48), (2048, 33, 10)], [(9, 8, 6)])
    for dtype in DTYPES:
        checked, wrong = 0, []
        for rows, inner, cols in shapes:
            for name, compute, arrays in _odd_cases(here, dtype, rows, inner, cols):
                with np.errstate(all="ignore"):
                    due = compute(*arrays)
                    made = here.device.get(compute(*map(here.device.put, arrays)))
                off = int((_kinds(made) != _kinds(due)).sum())
                checked += 1
                if off:
                    wrong.append(f"{name} {(rows, inner, cols)}: {off} of {due.size}")
        values: Values = {"checked": checked, "wrong": len(wrong), "which": wrong}
        if wrong:
            values["problem"] = "; ".join(wrong[:10])
        yield dtype, values


def _odd_cases(
    here: Here, dtype: str, rows: int, inner: int, cols: int
) -> Iterator[tuple[str, Callable[..., Array], tuple[Array, ...]]]:
    x = here.draw(rows, inner, dtype=dtype, seed=5)
    infinity = float("inf")
    for row, odd in enumerate(([np.nan], [infinity], [-infinity], [infinity, -infinity], [0.0])):
        x[row::7, inner // 2 : inner // 2 + len(odd)] = odd
    x[5::7] = -infinity
    weight = here.draw(inner, cols, dtype=dtype, seed=6)
    bias = here.draw(cols, dtype=dtype, seed=7)
    odd_bias = bias.copy()
    odd_bias[:3] = np.nan, infinity, -infinity
    for name, activation in kernels.ACTIVATIONS.items():
        yield name, activation, (x,)
        fused = partial(kernels.linear, activation=activation)
        yield f"linear, {name}", fused, (x, weight, bias)
        yield f"linear, odd bias, {name}", fused, (x, weight, odd_bias)
    for name in ("softmax", "log_softmax", "layer_norm", "rms_norm"):
        yield name, kernels.KERNELS[name], (x,)


def _kinds(y: Array) -> Array:
    """0 where y is finite, 1 and -1 for the infinities, 2 for NaN."""
    y = y.astype("float32")
    return np.where(np.isnan(y), 2, np.where(np.isinf(y), np.sign(y), 0))


def fused(here: Here) -> Figures:
    """How near our own kernels come to a copy of the same bytes."""
    rows, cols = here.sized((65536, 4096), (64, 32))
    device = here.device
    for dtype in DTYPES:
        x = device.put(np.tile(here.draw(rows // 64, cols, dtype=dtype), (64, 1)))
        bias, out = device.put(here.draw(cols, dtype=dtype)), device.xp.empty(x.shape, x.dtype)
        copied = _copied(here, x.nbytes)
        values: Values = {"copy": {"GB/s": copied, "of the copy": 1.0}}
        for name, run in _passes(here, x, bias, out).items():
            try:
                rate = 2 * x.nbytes / seconds(run, here.wait) / 1e9
                values[name] = {"GB/s": rate, "of the copy": rate / copied}
            except Exception as error:
                values[name] = {"problem": f"{type(error).__name__}: {error}"[:300]}
        yield dtype, values


def _passes(here: Here, x: Array, bias: Array, out: Array) -> dict[str, Callable[[], Array]]:
    if here.on_gpu:
        from nnxp.kernels.cuda.activations import bias_act
    else:

        def bias_act(x: Array, bias: Any | None, activation: kernels.Kernel, out: Array) -> Any:
            return activation(x + bias, out=out)

    passes: dict[str, Callable[[], Array]] = {
        f"bias and {name}": partial(bias_act, x, bias, kernels.ACTIVATIONS[name], out)
        for name in ("relu", "gelu", "tanh", "silu")
    }
    passes["softmax"] = partial(kernels.softmax, x, out=out)
    passes["log_softmax"] = partial(kernels.log_softmax, x, out=out)
    passes["layer_norm"] = partial(kernels.layer_norm, x, bias, bias)
    passes["rms_norm"] = partial(kernels.rms_norm, x, bias)
    return passes


def blocks(here: Here) -> Figures:
    """Milliseconds from host memory by the rows of a block: what BLOCK_ROWS should be."""
    from nnxp.backend import _blocks

    sizes = here.sized([2048 << i for i in range(7)], [64, 128])
    rows = here.sized(262144, 300)
    for title, net, kind in (
        ("large, bf16", here.large.of(rows), "bf16"),
        ("narrow, fp32", here.narrow.of(rows), "fp32"),
        ("large, fp32", here.large.of(rows // 2), "fp32"),
    ):
        task = Task(net, kind, "each", here.backend)
        table: Values = {"as it is": _through(here, task)}
        for size in sizes:
            with patch.multiple(_blocks, BLOCK_ROWS=(size, size), BLOCK_BYTES=1 << 40):
                table[str(size)] = _through(here, task)
        yield title, table


def _through(here: Here, task: Task) -> Values:
    """How long the rows of a task take from host memory and back, and how they are cut."""
    try:
        with nnxp.Engine(task.model(), here.backend) as engine:
            plan = engine.plan(task.rows.shape)
            took = []
            for _ in range(4):
                start = time.perf_counter()
                engine(task.rows)
                took.append(time.perf_counter() - start)
    except Exception as error:
        return {"problem": f"{type(error).__name__}: {error}"[:300]}
    times = {"ms": median(took[1:]) * 1e3, "least": min(took[1:]) * 1e3}
    return times | {"rows": plan.rows, "lanes": plan.workers}


class Endless:
    """More rows of bytes than any memory holds: the same ones, over and over, until time is up."""

    PERIOD = 4099  # no power of two, so that blocks begin with different rows

    def __init__(self, rows: int, width: int, block: int, until: float) -> None:
        self.shape, self.dtype, self.until, self.sent = (rows, width), np.dtype("uint8"), until, 0
        some = np.random.default_rng(0).integers(0, 256, (self.PERIOD, width), "uint8")
        self.rows = np.resize(some, (self.PERIOD + block, width))

    def __getitem__(self, rows: slice) -> Array:
        if time.perf_counter() > self.until:
            raise TimeUp
        self.sent = rows.stop
        start = rows.start % self.PERIOD
        return self.rows[start : start + rows.stop - rows.start]


class TimeUp(Exception):
    """The rows are not all through, and no more time is left for them."""


def memory(here: Here) -> Figures:
    """More rows than the card has memory for: the memory in use does not grow."""
    width, total = here.sized(8192, 16), here.device.memory().total
    rows = here.sized(int(1.1 * total) // width, 20_000)
    net = Network((width, here.sized(256, 8), 10), "relu", rows)
    with nnxp.Engine(net.model(), here.backend) as engine:
        limit = here.sized(20.0, 5.0)
        plan = engine.plan((rows, width))
        source = Endless(rows, width, plan.rows, time.perf_counter() + limit)
        engine(source.rows[: 2 * plan.rows])  # compiles and tries
        source.until = time.perf_counter() + limit
        out = np.full((rows, 10), np.nan, "float32")
        start = time.perf_counter()
        with sampled(here) as used:
            try:
                engine(source, out)
            except TimeUp:
                print(f"time was up after {source.sent:,} of {rows:,} rows", flush=True)
        took = time.perf_counter() - start
    through = source.sent * width
    settled = used[len(used) // 5 :] or used
    values: Values = {
        "rows": rows,
        "rows sent": source.sent,
        "GB sent": through / 1e9,
        "of the card's memory": through / total,
        "GB/s": through / took / 1e9,
        "memory samples": len(used),
        "MiB in use, least": min(settled) / 2**20,
        "MiB in use, most": max(settled) / 2**20,
        "constant": max(settled) - min(settled) <= total // 100,
    }
    # When time is up, the blocks in the lanes are given up.
    done = (
        out[: max(0, source.sent - (plan.workers + 1) * plan.rows)] if source.sent < rows else out
    )
    last = np.arange(max(0, len(done) - 256), len(done))
    if len(last):
        x = source.rows[last % source.PERIOD].astype("float32")
        value, bound = error_bound(net.model(), x)
        values["error in units of the bound"] = compare("", "", "", done[last], value, bound).ratio
        if not values["error in units of the bound"] <= LIMIT or np.isnan(done).any():
            values["problem"] = "rows are wrong or missing"
    if not values["constant"]:
        values["problem"] = "the memory in use grows"
    yield "stream", values


@contextmanager
def sampled(here: Here) -> Iterator[list[int]]:
    """The bytes of the device that are in use, looked at again and again within the block."""
    used: list[int] = []
    over = threading.Event()

    def look() -> None:
        while True:
            found = here.device.memory()
            used.append(found.total - found.free)
            if over.wait(0.05):
                return

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield used
    finally:
        over.set()
        thread.join(5)


# the process of a step

STEPS: dict[str, Callable[[Here], Figures]] = {
    "where": where,
    "verify": verified,
    "parity": parity,
    "goldens": recorded,
    "products": products,
    "network": network,
    "host": host,
    "nan": nan,
    "fused": fused,
    "graphs": graphs,
    "memory": memory,
    "blocks": blocks,
    "autotune": autotune,
}


def main() -> None:
    name, folder, path, *backend = sys.argv[1:]
    # Ended by a signal, a step still ends what it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
    here = Here(backend[0] if backend else "cupy", Path(folder))
    found: Values = {}
    for title, values in STEPS[name](here):
        found[title] = values
        print(title, flush=True)
        beside = Path(f"{path}.new")
        beside.write_text(json.dumps(found, default=str))
        beside.replace(path)


if __name__ == "__main__":
    main()
