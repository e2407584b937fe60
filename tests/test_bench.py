"""The clock and the benchmark: who is wrong is not timed, who hangs does not stop the others."""

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

from nnxp.floor import FLOOR
from nnxp.testing.parity import LIMIT, Output

BENCH = Path(__file__).parents[1] / "bench"
TILED = "floor-tiled"
ONES = np.ones((3, 2), "float32")
RIGHT = Output(ONES.astype("float64"), np.full((3, 2), 1e-7), ONES.dtype)

# A contender without a library: it sleeps, and hands in what it was given.
FAKE = """
import json, os, shutil, subprocess, sys, time
START
name, folder, seconds, result = sys.argv[1:]

def run():
    with open(f"{folder}/diary", "a") as diary:
        print(name, file=diary)
    RUN
    time.sleep(float(seconds))

def answer(**values):
    print(json.dumps(values), flush=True)

answer()
for line in sys.stdin:
    order, _, rest = line.strip().partition(" ")
    if order == "build":
        BUILD
        answer()
    elif order == "check":
        run()
        shutil.copy(result, rest)
        answer(about={})
    else:
        start = time.perf_counter()
        calls = int(float(rest)) if order == "time" else 1
        if order == "time":
            run()
            start = time.perf_counter()
        for _ in range(calls):
            run()
        answer(seconds=(time.perf_counter() - start) / calls)
"""

SERVED = """
import os, sys
sys.path.insert(0, BENCH)
import numpy as np
from race import serve

def build():
    BUILD
    return lambda: RESULT, {}

serve(build)
"""


@pytest.fixture
def clock(monkeypatch):
    """The module of the race."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("race")


@pytest.fixture
def fake(tmp_path, clock):
    """A contender that takes so long; code for its START, BUILD or RUN may spoil it."""

    def made(name, seconds=0.0, result=ONES, **code):
        script = FAKE
        for place in ("START", "BUILD", "RUN"):
            script = script.replace(place, code.get(place, "pass"))
        (tmp_path / f"{name}.py").write_text(script)
        np.save(tmp_path / f"{name}.npy", result)
        command = (sys.executable, "-I", "-S", tmp_path / f"{name}.py", name, tmp_path)
        return clock.Contender(name, (*command, str(seconds), tmp_path / f"{name}.npy"), RIGHT)

    made.diary = lambda: (tmp_path / "diary").read_text().split()
    return made


@pytest.fixture
def served(tmp_path, clock):
    """A contender that leaves the talking to nnxp."""

    def made(name, result='np.ones((3, 2), "f4")', build="pass"):
        script = SERVED.replace("BENCH", repr(str(BENCH)))
        script = script.replace("BUILD", build).replace("RESULT", result)
        (tmp_path / f"{name}.py").write_text(script)
        return clock.Contender(name, (sys.executable, tmp_path / f"{name}.py"), RIGHT)

    return made


def run(*contenders, rounds=3, **options):
    from race import race

    options = {"pause": 0.0, "turn": 0.001, "patience": 60.0, **options}
    return race(contenders, title="a race", rows=3, rounds=rounds, **options)


# the clock


def test_the_faster_of_two_is_faster_and_everybody_has_a_turn_in_each_round(fake):
    found = run(fake("floor", 0.01), fake("slow", 0.03), rounds=6)
    fast, slow = found.results
    assert 0.01 <= fast.quartiles[1] < slow.quartiles[1]
    assert fast.share == (1, 1, 1)
    assert slow.share[1] == pytest.approx(1 / 3, rel=0.3)
    assert len(fast.seconds) == len(slow.seconds) == 6
    # Each is checked with one call and warmed with one; a turn is a call that does not count and
    # one that does.
    turns = fake.diary()[-24:]
    assert turns[::2] == turns[1::2]
    pairs = [sorted(turns[i : i + 4]) for i in range(0, 24, 4)]
    assert pairs == [["floor", "floor", "slow", "slow"]] * 6
    firsts = turns[::4]
    assert set(firsts) == {"floor", "slow"}, "nobody goes first in every round"


def test_short_calls_are_timed_many_at_once(fake):
    (found,) = run(fake("short", 0.001), turn=0.1, rounds=2).results
    assert 0.001 <= found.quartiles[1] < 0.01
    assert len(fake.diary()) > 2 * 20


def test_a_wrong_result_is_refused_before_anything_is_timed(fake):
    wrong = fake("wrong", result=np.full((3, 2), 1.00001, "float32"))
    found = run(wrong, fake("right"))
    assert "6 of 6 elements are off" in found["wrong"].problem
    assert found["wrong"].seconds == ()
    assert len(found["right"].seconds) == 3
    assert fake.diary().count("wrong") == 1


@pytest.mark.parametrize(
    ("result", "word"),
    [
        (np.ones((3, 2)), "float64, not float32"),
        (np.ones((3, 3), "float32"), "shape"),
        (np.full((3, 2), np.nan, "float32"), "6 of 6 elements are off"),
        (np.array([{}]), "no result"),
    ],
)
def test_a_result_of_another_kind_is_refused(fake, result, word):
    found = run(fake("odd", result=result))
    assert word in found["odd"].problem
    assert found["odd"].seconds == ()
    assert json.dumps(found.to_dict(), allow_nan=False)


CRASHES = {
    "at its start": ("START", "raise SystemExit('no')", "code 1: no"),
    "when it builds": ("BUILD", "raise ValueError('bad')", "code 1: ValueError: bad"),
    "when it computes": ("RUN", "1 / 0", "code 1: ZeroDivisionError"),
    "without a word": ("RUN", "os._exit(7)", "code 7"),
    "in the race": ("RUN", "open(f'{folder}/diary').read().count(name) < 5 or os._exit(9)", "9"),
    "with nonsense": ("START", "print('hello', flush=True); time.sleep(60)", "'hello'"),
    "without seconds": ("RUN", "'warm' in line and answer()", "answer to 'warm 0.001' is {}"),
}


@pytest.mark.parametrize("when", CRASHES)
def test_a_contender_that_crashes_is_reported_and_the_others_race_on(fake, when):
    place, code, word = CRASHES[when]
    found = run(fake("bad", 0.01, **{place: code}), fake("good"))
    assert word in found["bad"].problem
    assert found["bad"].seconds == ()
    assert len(found["good"].seconds) == 3
    assert found["bad"].problem in str(found)


def test_a_contender_that_hangs_is_ended_with_what_it_started(fake, tmp_path):
    note = tmp_path / "pid"
    code = (
        "child = subprocess.Popen(['sleep', '600']); "
        f"open({str(note)!r}, 'w').write(str(child.pid)); time.sleep(600)"
    )
    start = time.monotonic()
    found = run(fake("stuck", BUILD=code), fake("good"), patience=2.0)
    assert time.monotonic() - start < 30
    assert found["stuck"].problem == "no answer to 'build' within 2 s"
    assert len(found["good"].seconds) == 3
    until = time.monotonic() + 10
    while _alive(int(note.read_text())):
        assert time.monotonic() < until, "what the contender started goes on"
        time.sleep(0.05)


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")  # one that has ended, and that nobody has asked for, is Z
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_contender_that_is_not_installed_is_no_failure(fake, served):
    found = run(served("away", build="import no_such_library"), fake("good"))
    assert found["away"].problem == "not installed: No module named 'no_such_library'"


def test_what_a_library_prints_is_no_answer(served):
    loud = served("loud", build="print('loading ...'); os.system('echo from below')")
    assert run(loud)["loud"].problem == ""


def test_an_error_in_the_race_itself_leaves_no_process_behind(fake, tmp_path):
    note = tmp_path / "pid"
    code = f"open({str(note)!r}, 'w').write(str(os.getpid()))"

    def stop(line):
        if "round" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(fake("one", BUILD=code), say=stop)
    assert not _alive(int(note.read_text()))


def test_contenders_start_without_pins_and_with_the_settings_that_are_asked_for(fake, monkeypatch):
    for name in ("OPENBLAS_CORETYPE", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NNXP_WORKERS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("KEPT", "1")
    names = ["OPENBLAS_CORETYPE", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NNXP_WORKERS", "KEPT"]
    code = f"[{{n: os.environ[n] for n in {names} if n in os.environ}}] == [WANTED] or 1 / 0"
    free = fake("free", START=code.replace("WANTED", "{'KEPT': '1'}"))
    found = run(free)
    assert found["free"].problem == ""
    assert found.place["unset"].keys() >= {"OMP_NUM_THREADS", "OPENBLAS_CORETYPE"}
    assert "without" in str(found)
    kept = "{'KEPT': '1', 'OPENBLAS_CORETYPE': 'Haswell'}"
    pinned = fake("pinned", START=code.replace("WANTED", kept))
    found = run(pinned, settings={"OPENBLAS_CORETYPE": "Haswell"})
    assert found["pinned"].problem == ""
    assert "OPENBLAS_CORETYPE" not in found.place["unset"]
    assert "with OPENBLAS_CORETYPE=Haswell" in str(found)


def test_the_peak_of_a_process_is_its_own_and_not_its_parents(served):
    if not Path("/proc/self/status").exists():
        pytest.skip("only Linux tells what a process holds")
    ballast = np.ones(25_000_000)  # 200 MB, here and not there
    small, large = run(
        served("small"), served("large", '(np.ones(12_500_000), np.ones((3, 2), "f4"))[1]')
    ).results
    assert small.peak_bytes < ballast.nbytes
    assert small.peak_bytes - small.rest_bytes < 20e6
    assert 95e6 < large.peak_bytes - large.rest_bytes < 120e6


# the commands


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """What bench/run.py makes of tiny networks."""
    output = tmp_path_factory.mktemp("bench") / "small.json"
    done = program(
        *("run.py", "--small", "--latency", "--memory", "--rounds", 1, "-o", output),
        *("--contenders", "nnxp", FLOOR, "naive", "sklearn"),
    )
    return SimpleNamespace(done=done, output=output, found=json.loads(output.read_text()))


def program(name, *args):
    command = [sys.executable, "-W", "error", BENCH / name, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def test_the_benchmark_runs_from_end_to_end(small):
    assert small.found["small"]
    races = {kind: small.found[kind] for kind in ("throughput", "latency", "memory")}
    assert {kind: len(found) for kind, found in races.items()} == {
        "throughput": 1,
        "latency": 1,
        "memory": 1,
    }
    for found in races.values():
        for each in found:
            assert [one["name"] for one in each["results"]] == ["nnxp", FLOOR, "naive", "sklearn"]
            for one in each["results"]:
                assert not one["problem"]
                assert one["error"] <= LIMIT


def test_the_benchmark_of_training_runs_and_finds_who_is_wrong(tmp_path, monkeypatch):
    output = tmp_path / "training.json"
    program("training.py", "--small", "--rounds", 1, "-o", output,
            "--contenders", "nnxp", FLOOR, "sklearn")  # fmt: skip
    found = json.loads(output.read_text())
    names = [[each["name"] for each in one["results"]] for one in found]
    assert names == [["nnxp", FLOOR, "sklearn"], ["nnxp", FLOOR]]  # the second is a CNN
    for each in (each for one in found for each in one["results"]):
        assert not each["problem"]
        assert each["error"] <= LIMIT
    monkeypatch.syspath_prepend(str(BENCH))
    training = importlib.import_module("training")
    for text in ("12-8-4 128", "tiny-cnn 128"):
        task = training.Task(text)
        right = training.ours(task)()
        assert np.all(np.asarray(right) < training.ERROR)
        task.labels[0] = (task.labels[0] + 1) % 4  # one row of 128 is wrong
        assert np.any(np.asarray(right) > LIMIT * training.ERROR)


def test_the_report_puts_tables_into_the_marked_region_and_nowhere_else(small, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n")
    done = program("report.py", small.output, "--readme", readme, "--plots", tmp_path / "plots")
    text = readme.read_text()
    assert text.startswith("before\n<!-- bench -->\n")
    assert text.endswith("\n<!-- /bench -->\nafter\n")
    assert "old" not in text
    assert "| 20-16-4 sigmoid (600) |" in text
    assert "measures nothing" in text
    drawn = sorted(each.name for each in tmp_path.glob("plots/*"))
    if "matplotlib" in done.stderr:  # it is no need of the tests
        assert drawn == []
    else:
        assert drawn == ["latency.svg", "share.svg"]
        assert all(each.stat().st_size < 200_000 for each in tmp_path.glob("plots/*"))


def test_the_report_leaves_a_readme_without_the_region_alone(small, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("mine\n")
    done = program("report.py", small.output, "--readme", readme, "--plots", tmp_path)
    assert readme.read_text() == "mine\n"
    assert "| 20-16-4 sigmoid (600) |" in done.stdout


def nowhere(folder):
    """Where a report may write without harm: its default is the repository's own pictures."""
    return ("--readme", folder / "none.md", "--plots", folder)


def test_a_part_of_the_races_makes_a_part_of_the_report(tmp_path):
    args = ["--small", "--networks", "--latency", "--rounds", 1, "--contenders", FLOOR]
    program("run.py", *args, "-o", tmp_path / "part.json")
    done = program("report.py", tmp_path / "part.json", *nowhere(tmp_path))
    assert "|  | 1 row |" in done.stdout
    assert "Share of the floor" not in done.stdout
    assert "Memory" not in done.stdout


def test_results_of_other_benchmarks_are_passed_over(small, tmp_path):
    (tmp_path / "training.json").write_text(json.dumps([{"title": "5 steps", "results": []}]))
    (tmp_path / "other.json").write_text(json.dumps({"what": "damaged files"}))
    files = (tmp_path / "training.json", tmp_path / "other.json", small.output)
    done = program("report.py", *files, *nowhere(tmp_path))
    assert "| 20-16-4 sigmoid (600) |" in done.stdout


def test_a_contender_that_is_not_there_is_named_in_the_report(small, tmp_path):
    found = small.found
    for each in found["throughput"]:
        missing = each["results"][2] | {"seconds": [], "median": None, "share": None}
        each["results"][2] = missing | {"problem": "not installed: No module named 'naive'"}
    (tmp_path / "some.json").write_text(json.dumps(found))
    done = program("report.py", tmp_path / "some.json", *nowhere(tmp_path))
    assert "- naive NumPy: not installed: No module named 'naive'" in done.stdout


def test_networks_of_other_kinds_race_from_end_to_end():
    pytest.importorskip("torch")
    command = [sys.executable, BENCH / "models.py", "lstm", "--small", "--contenders", "nnxp"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert said.splitlines()[-1].startswith("lstm       nnxp ")


@pytest.mark.parametrize("name", "resnet50 vgg16 mobilenet cnn minilm lstm".split())
def test_a_network_in_jax_is_that_of_torch(monkeypatch, name):
    pytest.importorskip("torch")
    jax = pytest.importorskip("jax")
    monkeypatch.syspath_prepend(str(BENCH))
    models, models_jax = map(importlib.import_module, ("models", "models_jax"))
    expected = models.due(name, 3, True).value
    forward = models_jax.forward(models.drawn(name, True))
    y = np.asarray(jax.jit(forward)(models.rows_of(name, 3, True)))
    assert np.abs(y - expected).max() <= 1e-6 * np.abs(expected).max()


def test_mnist_1d_is_learned_by_a_linear_network_as_published(monkeypatch):
    pytest.importorskip("mnist1d", reason="the package that makes the rows")
    monkeypatch.syspath_prepend(str(BENCH))
    mnist_1d = importlib.import_module("mnist_1d")
    score = mnist_1d.ours("linear", 0, mnist_1d.data(), steps=1000)
    assert abs(score - mnist_1d.PUBLISHED["linear"]) < 4


def test_a_real_model_is_compared_with_onnx_runtime(tmp_path):
    pytest.importorskip("onnxruntime")
    words = ["squeezenet", "--no-race", "--rows", "1", "--folder", tmp_path]
    command = [sys.executable, BENCH / "real.py", *map(str, words)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "squeezenet       loaded in " in said
    assert "of the largest apart" in said
