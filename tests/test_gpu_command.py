"""ci/gpu, as far as a machine without a GPU can tell: its steps on a simulated device, on tiny
arrays, and what it makes of steps that fail, hang or are ended."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import nnxp
from nnxp import kernels
from nnxp.floor import FLOOR
from nnxp.testing import LIMIT

ROOT = Path(__file__).parents[1]
CUPY = nnxp.available_backends()["cupy"]

STEP = """
import json, os, subprocess, sys, time
name, folder, path, backend = sys.argv[1:]
report = f"{folder}/report.json"
known = len(json.load(open(report))["steps"]) if os.path.exists(report) else 0
figures = {"seen": {"steps before": known}}
if name == "wrong":
    figures["a table"] = {"a row": {"problem": "not what was due"}}
json.dump(figures, open(path, "w"))
print("hello from", name)
if name == "crash":
    raise ValueError("bad")
if name == "killed":
    os.kill(os.getpid(), 9)
if name == "hang":
    child = subprocess.Popen(["sleep", "600"])
    open(f"{folder}/pid", "w").write(str(child.pid))
    time.sleep(600)
"""


@pytest.fixture
def bench(monkeypatch):
    """The modules in bench/."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    steps = (
        "where verify parity goldens replays nan products network host fused models training "
        "graphs memory blocks compiled"
    )
    return SimpleNamespace(
        gpu=importlib.import_module("gpu.__main__"),
        report=importlib.import_module("gpu.report"),
        here=importlib.import_module("gpu.here"),
        races=importlib.import_module("gpu.races"),
        ours=importlib.import_module("contenders.ours"),
        networks=importlib.import_module("networks"),
        **{name: importlib.import_module(f"gpu.{name}") for name in steps.split()},
    )


@pytest.fixture
def command(bench, tmp_path, monkeypatch, capsys):
    """ci/gpu with made-up steps: command(steps, options) -> exit code, report, table, output."""
    (tmp_path / "step.py").write_text(STEP)
    monkeypatch.setattr(bench.gpu, "PROCESS", (tmp_path / "step.py",))
    monkeypatch.setattr(bench.gpu, "PATIENCE", 0.5)
    monkeypatch.setattr(bench.gpu, "LEAST", 0.5)

    def run(steps, *options):
        monkeypatch.setattr(bench.gpu, "STEPS", steps)
        out = tmp_path / "out"
        args = ["gpu", "--backend", "sim", "--out", str(out), *options]
        monkeypatch.setattr(sys, "argv", args)
        code = bench.gpu.main()
        found = json.loads((out / "report.json").read_text())
        return code, found, (out / "report.md").read_text(), capsys.readouterr().out

    return run


def states(found):
    return {each["name"]: each["state"] for each in found["steps"]}


# what it makes of its steps


def test_a_step_that_fails_or_hangs_leaves_the_others_and_what_it_found(command, tmp_path):
    steps = {"one": 60, "crash": 60, "wrong": 60, "killed": 60, "hang": 2, "last": 60}
    start = time.monotonic()
    code, found, table, said = command(steps)
    assert time.monotonic() - start < 30
    assert code == 1
    assert states(found) == {
        "one": "ok",
        "crash": "failed",
        "wrong": "failed",
        "killed": "failed",
        "hang": "cut",
        "last": "ok",
    }
    by_name = {each["name"]: each for each in found["steps"]}
    # The report is there, whole, when the next step begins.
    assert [each["figures"]["seen"]["steps before"] for each in found["steps"]] == [*range(6)]
    assert by_name["crash"]["problem"] == "its process ended with code 1"
    assert "ValueError: bad" in by_name["crash"]["output"]
    assert "ValueError: bad" in table
    assert by_name["wrong"]["problem"] == "a table a row: not what was due"
    assert by_name["killed"]["problem"] == "its process ended with code -9"
    assert "longer than the 2 s" in by_name["hang"]["problem"]
    assert by_name["last"]["output"] == ""
    assert "hang: cut" in said
    child = int((tmp_path / "out/pid").read_text())
    until = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and "\nState:\tZ" not in status(child):
        assert time.monotonic() < until, "what the step had started goes on"
        time.sleep(0.05)


def status(pid):
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "\nState:\tZ"


def test_all_steps_right_is_zero_and_only_what_is_spare_may_be_missing(command, bench, monkeypatch):
    assert command({"one": 60, "two": 60})[0] == 0
    monkeypatch.setattr(bench.gpu, "SPARE", ("crash",))
    code, found, _, _ = command({"one": 60, "crash": 60})
    assert (code, states(found)) == (0, {"one": "ok", "crash": "failed"})


def test_when_time_is_up_the_rest_is_skipped_and_that_is_told(command):
    code, found, table, _ = command({"hang": 60, "one": 60}, "--minutes", "0.05")
    assert code == 1
    assert states(found) == {"hang": "cut", "one": "skipped"}
    assert "| one | skipped | 0 | no time was left |" in table
    assert found["steps"][0]["seconds"] < 10


def test_some_steps_only_in_the_order_of_their_importance(command):
    _, found, _, _ = command({"one": 60, "two": 60, "three": 60}, "--steps", "three", "one")
    assert list(states(found)) == ["one", "three"]


@pytest.mark.parametrize("options", [["--steps", "none"], ["--minutes", "0"], ["--backend", "tpu"]])
def test_a_wrong_call_ends_with_two(options):
    done = ci_gpu(*options)
    assert done.returncode == 2
    assert "usage" in done.stderr


def ci_gpu(*options, **variables):
    return subprocess.run(
        [ROOT / "ci/gpu", *map(str, options)],
        env=os.environ | {"PYTHON": sys.executable} | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.skipif(CUPY.ok, reason="a GPU can be used here")
@pytest.mark.parametrize("variables", [{}, {"NNXP_BACKEND": "numpy", "CUPY_TF32": "1"}])
def test_without_a_gpu_it_says_why_and_ends_with_three(tmp_path, variables):
    done = ci_gpu("--out", tmp_path / "out", **variables)
    assert done.returncode == 3, done.stderr
    assert CUPY.reason in done.stderr
    assert CUPY.hint in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_sources_come_first_and_what_was_on_the_path_stays(bench, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/wheels")
    monkeypatch.setenv("CUPY_TF32", "1")
    found = bench.gpu.environment()
    ours = [str(ROOT / "src"), str(ROOT / "bench")]
    assert found["PYTHONPATH"].split(os.pathsep) == [*ours, "/wheels"]
    assert "CUPY_TF32" not in found
    monkeypatch.delenv("PYTHONPATH")
    assert bench.gpu.environment()["PYTHONPATH"].split(os.pathsep) == ours


def test_every_step_has_a_time_and_a_file(bench):
    parts = {"__init__", "__main__", "here", "races", "report", "step"}
    files = {path.stem for path in (ROOT / "bench/gpu").glob("*.py")}
    assert set(bench.gpu.STEPS) == files - parts
    assert all(
        callable(getattr(bench, name).figures) for name in files & vars(bench).keys() - parts
    )
    assert set(bench.gpu.SPARE) < set(bench.gpu.STEPS)


# the report

NETWORK = {
    FLOOR: {"µs": 90.0},
    "nnxp": {"µs": 100.0, "of the floor": 0.9},
    "torch": {"µs": 109.0},
    "torch-compile": {"µs": 101.0},
    "jax": {"out": "not installed"},
}


def test_goals_are_read_off_the_figures(bench):
    steps = [
        bench.report.Step("network", figures={"fp16": NETWORK, "fp16: seconds by rounds": {}}),
        bench.report.Step("host", figures={}),
        bench.report.Step("memory", figures={"stream": {"constant": True}}),
    ]
    found = {what: (value, met) for what, _, value, met in bench.report.goals(steps)}
    assert found["fp16, resident: share of the bare products"] == (0.9, True)
    assert found["fp16, resident: times as fast as torch-compile"] == (pytest.approx(1.01), True)
    assert found["fp16, resident: times as fast as torch"] == (pytest.approx(1.09), False)
    assert found["fp16, resident: times as fast as jax"] == (None, False)
    assert not any(what.startswith("fp32") for what in found)
    text = bench.report.markdown(bench.report.report(steps, {"backend": "cupy"}))
    assert "times as fast as torch | 1.1 or more | 1.09 | MISSED |" in text
    assert "times as fast as jax | 1 or more | – |  |" in text
    assert "| nnxp | 100 | 0.9 | – |" in text


def test_the_first_line_says_that_products_do_not_go_through_cublaslt(bench):
    figures = {"products": {"not through cuBLASLt, because": "nvmath-python is not installed"}}
    step = bench.report.Step("where", figures=figures)
    text = bench.report.markdown(bench.report.report([step], {"backend": "cupy"}))
    due = "**PRODUCTS DO NOT GO THROUGH cuBLASLt: nvmath-python is not installed**"
    assert text.splitlines()[0] == due
    figures["products"] = {"not through cuBLASLt, because": None}
    text = bench.report.markdown(bench.report.report([step], {"backend": "cupy"}))
    assert text.splitlines()[0] == "# nnxp on a GPU"


def test_what_is_right_is_asked_before_what_is_fast(bench):
    steps = list(bench.gpu.STEPS)
    right, fast = "verify parity goldens replays nan", "products network host fused graphs blocks"
    assert max(map(steps.index, right.split())) < min(map(steps.index, fast.split()))


def test_numbers_are_rounded_and_infinity_is_none(bench):
    made = bench.report.plain({"a": [1.23456789, float("nan")], "b": {"c": float("inf"), "d": 7}})
    assert made == {"a": [1.2346, None], "b": {"c": None, "d": 7}}


# the steps, on a simulated device


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    """What all steps but the slowest make of a simulated device."""
    out = tmp_path_factory.mktemp("gpu")
    steps = "where verify goldens replays nan products network host fused graphs memory blocks"
    steps = steps.split()
    done = ci_gpu("--backend", "sim", "--out", out, "--steps", *steps)
    found = json.loads((out / "report.json").read_text())
    figures = {each["name"]: each["figures"] for each in found["steps"]}
    return SimpleNamespace(done=done, out=out, found=found, figures=figures, steps=steps)


def test_every_step_runs_on_a_simulated_device(tried):
    assert tried.done.returncode == 0, tried.done.stdout
    assert states(tried.found) == dict.fromkeys(tried.steps, "ok")
    files = sorted(str(each.relative_to(tried.out)) for each in tried.out.rglob("*.*"))
    assert files[1:] == ["receipt.json", "report.json", "report.md"]
    assert files[0].startswith("goldens/sim-")
    text = (tried.out / "report.md").read_text()
    assert "it measures nothing" in text
    assert all(f"\n## {name}\n" in text for name in tried.steps)


def test_the_figures_are_those_that_are_wanted(tried):
    figures = tried.figures
    assert figures["verify"]["sim"]["failed"] == 0
    assert 0 < figures["verify"]["sim"]["largest error in units of the bound"] < LIMIT
    for kind in ("fp32", "tf32", "fp16", "bf16"):
        assert figures["products"][f"{kind} product of 64 x 64, TFLOP/s"]["nnxp"] > 0
        table = figures["network"][kind]
        for name in (FLOOR, "nnxp"):
            assert table[name]["error"] <= LIMIT
            assert table[name]["lower"] <= table[name]["µs"] <= table[name]["upper"]
        assert table[FLOOR]["of the floor"] == 1
    for kind in ("fp32", "bf16"):
        table, rounds = figures["host"][kind], figures["host"][f"{kind}: seconds by rounds"]
        larger = max(rounds[FLOOR][0], rounds["copy"][0])
        share = table["nnxp-host"]["of the larger of floor and copy"]
        assert share == pytest.approx(larger / rounds["nnxp-host"][0], rel=1e-3)
        assert table["copy"]["error"] == 0
    for dtype in ("float32", "float16", "bfloat16"):
        assert figures["nan"][dtype]["checked"] == 3 * len(kernels.ACTIVATIONS) + 4
        assert figures["fused"][dtype]["softmax"]["GB/s"] > 0
        replayed = figures["replays"][dtype]
        assert (replayed["calls"], replayed["recorded"]) == (24, 2)
    assert figures["graphs"]["1 row"]["nnxp"]["µs"] > 0
    assert figures["memory"]["stream"]["rows sent"] == 20_000
    assert figures["blocks"]["narrow, fp32"]["64"]["rows"] == 64
    assert figures["blocks"]["narrow, fp32"]["as it is"]["rows"] > 64


def test_the_floor_is_right_or_it_is_told(bench, tmp_path):
    """The bare products of a task, as TF32 may round them, against numbers computed here."""
    task = bench.networks.Task(bench.here.Here("sim", tmp_path).large, "tf32", "stream", "sim")
    assert bench.networks.Task.parse(str(task)) == task
    exact = task.checked(task.rows).astype("float64")
    for weight, _, _ in task.layers:
        exact = exact @ weight
    due = task.expected(FLOOR)
    np.testing.assert_allclose(due.value, exact, rtol=1e-12)
    rounded = task.checked(task.rows)
    for weight, _, _ in task.layers:
        rounded = tf32(rounded) @ tf32(weight)
    assert np.all(np.abs(rounded - exact) <= LIMIT * due.error)
    as_float32 = bench.networks.Task(task.network, "fp32", "stream", "sim").expected(FLOOR)
    assert not np.all(np.abs(rounded - exact) <= LIMIT * as_float32.error)


def tf32(x):
    """Cut to the ten bits of a TF32 number."""
    bits = np.ascontiguousarray(x).view("uint32") & np.uint32(0xFFFFE000)
    return bits.view("float32")


def test_what_only_a_gpu_has_is_asked_of_it_as_the_sim_would_be(bench, tmp_path, monkeypatch):
    """The lines for CuPy alone, with the simulated device in its place."""
    pinned = SimpleNamespace(empty_pinned=lambda shape, dtype: np.empty(shape, dtype))
    monkeypatch.setitem(sys.modules, "cupyx", pinned)
    here = bench.here.Here("sim", tmp_path)
    assert here.device.name == "sim"
    task = bench.networks.Task(here.large, "bf16", "stream", "cupy")
    with monkeypatch.context() as patch:
        patch.setattr(nnxp, "get_backend", lambda name: here.device)
        built = bench.ours.copy(task)
    made = task.checked(built.host(built.run()))
    assert made.dtype == task.dtype
    assert np.array_equal(made.astype("float64"), task.expected("copy").value)
    monkeypatch.setattr(bench.here.Here, "on_gpu", True)
    monkeypatch.setattr(bench.here.Here, "sized", lambda self, there, small: small)
    found = bench.products._bandwidths(here)
    assert [name for name in found if "pinned" in name] == [
        "to the device, from pinned memory",
        "to the host, into pinned memory",
    ]


# faults that the steps are there to find


@pytest.fixture
def here(bench, tmp_path):
    return bench.here.Here("sim", tmp_path)


@pytest.fixture
def fused(monkeypatch):
    """fused(kernel, body): the simulated device has this body for the kernel, during the test."""

    def register(kernel, body):
        monkeypatch.setitem(kernel._fused, "sim", body)
        monkeypatch.setattr(kernel, "_body", {})

    return register


def problems(bench, figures):
    return list(bench.report.problems(dict(figures)))


def test_a_nan_that_is_swallowed_is_found(bench, here, fused):
    assert problems(bench, bench.nan.figures(here)) == []
    fused(kernels.relu, lambda x, out=None: nnxp.sim.where(x > 0, x, x.dtype.type(0)))
    found = problems(bench, bench.nan.figures(here))
    assert [each.partition(": relu ")[0] for each in found] == ["float32", "float16", "bfloat16"]


def test_a_float32_product_that_is_none_is_found(bench, here, fused):
    def rounded(x, weight, bias=None, *, activation=None, precision=None):
        there = [each.astype("float16").astype("float32") for each in (x, weight)]
        return nnxp.sim.matmul(*there)

    assert problems(bench, bench.products.figures(here)) == []
    fused(kernels.linear, rounded)
    (found,) = (each for each in problems(bench, bench.products.figures(here)) if "fp32" in each)
    assert "nnxp's fp32 product is off by" in found


def test_a_replay_of_old_rows_is_found(bench, here, monkeypatch):
    from nnxp.backend._recording import DeviceRecording

    right = DeviceRecording.host

    def stale(self, rows):
        return right(self, np.zeros_like(rows))

    monkeypatch.setattr(DeviceRecording, "host", stale)
    found = bench.replays.replayed(here, "float32")
    assert found["problem"] == "what is replayed is wrong"
    assert found["same bits as anew"] < found["calls"]


def test_memory_that_grows_and_rows_that_are_lost_are_found(bench, here, monkeypatch, sim):
    sim.limit = 1 << 30  # a hundredth of it is what the memory in use may vary
    kept = []

    class Leaking(bench.memory.Endless):
        def __getitem__(self, rows):
            kept.append(nnxp.sim.zeros((10 << 20,), "float32"))
            time.sleep(0.1)
            return super().__getitem__(rows)

    class Repeating(bench.memory.Endless):
        def __getitem__(self, rows):
            found = super().__getitem__(slice(0, rows.stop - rows.start))
            self.sent = rows.stop
            return found

    for kind, word in ((Leaking, "grows"), (Repeating, "wrong or missing")):
        with monkeypatch.context() as patch:
            patch.setattr(bench.memory, "Endless", kind)
            (found,) = problems(bench, bench.memory.figures(here))
            assert word in found
    kept.clear()


def test_a_stream_that_takes_too_long_says_how_far_it_came(bench, here, monkeypatch):
    class Slow(bench.memory.Endless):
        def __getitem__(self, rows):
            if rows.start > self.shape[0] // 2:
                self.until = 0
            return super().__getitem__(rows)

    monkeypatch.setattr(bench.memory, "Endless", Slow)
    ((_, found),) = bench.memory.figures(here)
    assert "problem" not in found
    assert 0 < found["rows sent"] < found["rows"]


TESTS = """
import pytest, nnxp

def test_right(xp): assert xp.zeros(3).shape == (3,)
def test_wrong(backend): assert backend.name != "sim"
"""


def test_the_tests_on_a_gpu_are_counted_and_those_that_fail_are_named(
    bench, here, monkeypatch, capfd
):
    tests = here.out / "tests"
    tests.mkdir()
    (tests / "test_some.py").write_text(TESTS)
    monkeypatch.setattr(bench.parity, "ROOT", here.out)
    found = dict(bench.parity.figures(here))
    assert found["pytest"]["sim"] == "2 tests"
    assert "1 failed, 1 passed" in found["pytest"]["summary"]
    assert found["failed"]["which"][0].startswith("FAILED tests/test_some.py::test_wrong[sim]")
    assert problems(bench, found.items()) == ["pytest: pytest ended with 1"]
    (tests / "test_some.py").write_text("def test_nothing(): pass\n")
    assert problems(bench, bench.parity.figures(here)) != []


def test_a_contender_of_ours_that_is_out_is_a_problem_and_another_is_not(bench, here, monkeypatch):
    def result(name, problem=""):
        seconds = () if problem else (0.2, 0.4)
        about = {} if problem else {"calls": 2}
        return SimpleNamespace(name=name, problem=problem, seconds=seconds, about=about, error=0.5)

    results = [result(FLOOR), result("nnxp", "it is wrong"), result("torch", "it is wrong")]
    monkeypatch.setattr(
        bench.races.race, "race", lambda *args, **options: SimpleNamespace(results=results)
    )
    task = bench.networks.Task(here.large, "fp32", "stream", "sim")
    table, rounds, _ = bench.races.raced(here, [FLOOR, "nnxp", "torch"], task)
    assert rounds == {FLOOR: [0.1, 0.2]}
    assert problems(bench, [("fp32", table)]) == ["fp32 nnxp: it is wrong"]
    assert table["torch"] == {"out": "it is wrong"}
