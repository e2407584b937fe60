"""The command line: what it answers and where, and how it fails: in one line, with a code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import nnxp
from conftest import draw
from nnxp.cli import _Counting, app
from nnxp.io.rows import Passing

FILES = ["x.npy", "x.npz", "x.csv"]
ENDINGS = [".npy", ".npz", ".csv"]


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A folder with a network, 6 -> 3, and 50 rows for it in every kind of file; we are in it."""
    monkeypatch.chdir(tmp_path)
    net = nnxp.Sequential(nnxp.Dense(6, 8, "relu", rng=0), nnxp.Dense(8, 3, "softmax", rng=1))
    nnxp.save(net, "net.safetensors")
    x = draw((50, 6))
    np.save("x.npy", x)
    np.savez("x.npz", x)
    np.savetxt("x.csv", x, delimiter=",", header="a,b,c,d,e,f", comments="", fmt="%.9g")
    return tmp_path


def nnxp_(*args):
    return CliRunner().invoke(app, [str(each) for each in args])


def run(*args, **options):
    """The same in a process of its own."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "nnxp", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def fails(done, code, *words):
    """The command failed as promised: a code, one line on stderr, and no word on stdout."""
    assert done.exit_code == code, done.output
    assert done.stdout == ""
    assert done.stderr.startswith("nnxp: error: ")
    assert len(done.stderr.splitlines()) == 1
    for word in words:
        assert word in done.stderr


def read(path):
    if path.suffix == ".csv":
        assert path.read_text().splitlines()[0] == "y0,y1,y2"
        return np.loadtxt(path, delimiter=",", dtype="float32", skiprows=1)
    return np.load(path) if path.suffix == ".npy" else np.load(path)["output"]


# help, version, usage


@pytest.mark.parametrize("command", [[], ["demo"], ["predict"], ["summary"], ["doctor"]])
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_every_command_has_help(command, option):
    done = nnxp_(*command, option)
    assert done.exit_code == 0
    assert "Usage: " in done.stdout


def test_the_version_is_the_packages():
    assert nnxp_("--version").stdout == f"nnxp {nnxp.__version__}\n"


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["predikt"],
        ["doctor", "--fast"],
        ["predict", "net.safetensors"],
        ["predict", "net.safetensors", "x.npy"],
        ["predict", "net.safetensors", "x.npy", "-o", "y.npy", "--workers", "0"],
        ["summary", "net.safetensors", "--rows", "many"],
        ["demo", "--rows", "0"],
    ],
)
def test_wrong_usage_is_code_2(args):
    done = nnxp_(*args)
    assert done.exit_code == 2
    assert "Usage: " in done.output


@pytest.mark.parametrize(
    ("missing", "args", "brings"),
    [
        ("cupy", "predict net.safetensors x.npy -o y.npy --backend cupy", "cupy"),
        ("pyarrow.parquet", "predict net.safetensors x.parquet -o y.npy", "nnxp[tables]"),
        ("matplotlib.figure", "summary net.safetensors --plot net.svg", "nnxp[plots]"),
        ("matplotlib.backend_bases", "summary net.safetensors --plot net.svg", "nnxp[plots]"),
        ("distributed", "sweep net.safetensors x.npy -o w --dask tcp://::1", "nnxp[cluster]"),
        ("h5py", "sweep net.safetensors x.h5 -o w", "pip install h5py"),
    ],
)
def test_what_is_not_installed_is_code_1(room, monkeypatch, missing, args, brings):
    monkeypatch.setitem(sys.modules, missing, None)
    (room / "x.parquet").write_bytes(b"")
    (room / "x.h5").write_bytes(b"")
    fails(nnxp_(*args.split()), 1, brings)


def test_help_loads_nothing_that_only_a_command_needs():
    code = (
        "import sys\nfrom nnxp.cli import main\nsys.argv = ['nnxp', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = 'cupy safetensors sklearn scipy ml_dtypes rich.markup nnxp.doctor nnxp.demo'\n"
        "print([name for name in heavy.split() if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# predict


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("name", FILES)
def test_predict_writes_what_nnxp_predicts(room, name, ending):
    done = nnxp_("predict", "net.safetensors", name, "-o", f"y{ending}", "--backend", "numpy")
    assert (done.exit_code, done.stderr) == (0, "")
    assert f"y{ending}: 50 rows" in done.stdout
    assert "ran on cpu: NumPy" in done.stdout
    net = nnxp.load("net.safetensors")
    wanted = nnxp.predict(net, np.load("x.npy"), "numpy")
    assert read(room / f"y{ending}").dtype == np.float32
    assert np.array_equal(read(room / f"y{ending}"), wanted)


def test_predict_in_a_process_of_its_own_says_as_json_what_it_did(room):
    done = run("predict", "net.safetensors", "x.npy", "-o", "y.npy", "--backend=sim", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    assert 0 < said.pop("seconds") < 60
    assert said == {
        "output": "y.npy",
        "rows": 50,
        "shape": [50, 3],
        "dtype": "float32",
        "backend": "sim",
        "device": "sim:0",
        "why": "simulated in host memory; backend='sim'",
    }


def test_predict_replaces_an_older_output_and_leaves_nothing_else(room):
    before = {each.name for each in room.iterdir()}
    (room / "y.npy").write_text("old")
    assert nnxp_("predict", "net.safetensors", "x.npy", "-o", "y.npy").exit_code == 0
    assert read(room / "y.npy").shape == (50, 3)
    assert {each.name for each in room.iterdir()} == before | {"y.npy"}


def test_predict_takes_the_array_with_the_key(room):
    np.savez("two.npz", a=np.load("x.npy"), b=np.load("x.npy")[:7])
    done = nnxp_("predict", "net.safetensors", "two.npz", "--key", "b", "-o", "y.npy")
    assert done.exit_code == 0, done.output
    assert read(room / "y.npy").shape == (7, 3)
    fails(nnxp_("predict", "net.safetensors", "two.npz", "-o", "z.npy"), 2, "(a, b)")


def test_predict_keeps_within_limits_and_threads_that_are_asked_for(room, monkeypatch):
    seen = {}

    def spy(engine, x, out, progress):
        seen.update(limit=engine.memory_limit, workers=engine.workers, progress=progress)

    monkeypatch.setattr(nnxp.Engine, "__call__", spy)
    done = nnxp_(
        *("predict", "net.safetensors", "x.npy", "-o", "y.npy"),
        *("--memory-limit", "2 MiB", "--workers", "3"),
    )
    assert done.exit_code == 0, done.output
    assert seen == {"limit": 2 << 20, "workers": 3, "progress": True}


def test_predict_of_no_rows_is_no_rows(room):
    np.save("none.npy", np.empty((0, 6)))
    assert nnxp_("predict", "net.safetensors", "none.npy", "-o", "y.npy").exit_code == 0
    assert read(room / "y.npy").shape == (0, 3)


def test_predict_writes_bfloat16_as_float32(room):
    pytest.importorskip("ml_dtypes", reason="there is no bfloat16 without ml_dtypes")
    net = nnxp.load("net.safetensors").astype("bfloat16")
    nnxp.save(net, "half.safetensors")
    done = nnxp_("predict", "half.safetensors", "x.npy", "-o", "y.npy", "--backend", "numpy")
    assert done.exit_code == 0, done.output
    wanted = nnxp.predict(net, np.load("x.npy"), "numpy").astype("float32")
    assert np.array_equal(read(room / "y.npy"), wanted)


def test_predict_of_a_model_without_parameters_keeps_the_type_of_the_rows(room):
    nnxp.save(nnxp.Activation("relu"), "relu.safetensors")
    np.save("double.npy", np.load("x.npy").astype("float64"))
    done = nnxp_("predict", "relu.safetensors", "double.npy", "-o", "y.npy")
    assert done.exit_code == 0, done.output
    assert read(room / "y.npy").dtype == np.float64


def test_names_of_files_need_not_be_text(room):
    name = os.fsdecode(b"y\xff.npy")
    try:
        Path(name).touch()
    except OSError:
        pytest.skip("this file system takes only names that are text")
    done = run("predict", "net.safetensors", "x.npy", "-o", name)
    assert (done.returncode, done.stderr) == (0, "")
    assert read(room / name).shape == (50, 3)
    done = run("predict", "net.safetensors", "x.npy", "-o", name + "x")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


BAD_ROWS = {
    "wide.npy": lambda path: np.save(path, np.ones((5, 7))),
    "flat.npy": lambda path: np.save(path, np.ones(6)),
    "scalar.npy": lambda path: np.save(path, 1.0),
    "objects.npy": lambda path: np.save(path, np.array([[{}] * 6])),
    "strings.npy": lambda path: np.save(path, np.array([["a"] * 6])),
    "complex.npy": lambda path: np.save(path, np.ones((5, 6), "complex64")),
    "empty.npy": lambda path: path.write_bytes(b""),
    "truncated.npy": lambda path: path.write_bytes(Path("x.npy").read_bytes()[:-1]),
    "junk.npy": lambda path: path.write_text("1,2,3,4,5,6"),
    "junk.npz": lambda path: path.write_text("1,2,3,4,5,6"),
    "empty.csv": lambda path: path.write_text(""),
    "ragged.csv": lambda path: path.write_text("1,2,3,4,5,6\n1,2,3,4,5\n"),
    "words.csv": lambda path: path.write_text("1,2,3,4,5,6\n1,2,3,4,5,six\n"),
    "binary.csv": lambda path: path.write_bytes(b"\xff\x00"),
    "missing.npy": lambda path: None,
    "missing.csv": lambda path: None,
    "folder.npy": lambda path: path.mkdir(),
    "folder.csv": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_rows_that_cannot_be_read_or_do_not_fit_are_one_clear_line(room, name):
    BAD_ROWS[name](room / name)
    before = set(room.iterdir())
    done = nnxp_("predict", "net.safetensors", name, "-o", "y.npy")
    fails(done, 1, "(5, 7)" if name == "wide.npy" else "(6,)" if name == "flat.npy" else name)
    assert set(room.iterdir()) == before
    if name in ("ragged.csv", "words.csv"):
        assert "line 2" in done.stderr


@pytest.mark.parametrize(
    ("content", "word"),
    [(None, "No such file"), (b"", "cannot be loaded"), (b"\x80\x04}.", "cannot be loaded")],
)
@pytest.mark.parametrize("command", ["predict", "summary"])
def test_a_model_that_cannot_be_read_is_one_clear_line(room, command, content, word):
    if content is not None:
        (room / "bad.safetensors").write_bytes(content)
    rest = ["x.npy", "-o", "y.npy"] if command == "predict" else []
    fails(nnxp_(command, "bad.safetensors", *rest), 1, "bad.safetensors", word)
    assert not (room / "y.npy").exists()


@pytest.mark.parametrize(
    ("args", "code", "word"),
    [
        (["x.npy", "-o", "y.txt"], 2, ".npy, .npz, .csv"),
        (["x.npy", "-o", "y"], 2, ".npy, .npz, .csv"),
        (["x.dat", "-o", "y.npy"], 2, ".npy, .npz, .csv"),
        (["x.npy", "-o", "x.npy"], 2, "would replace"),
        (["x.npy", "-o", "link.npy"], 2, "would replace"),
        (["x.npy", "-o", "hard.npy"], 2, "would replace"),
        (["x.npy", "-o", "net.npy"], 2, "would replace"),
        (["x.npy", "-o", "y.npy", "--key", "a"], 2, "'a'"),
        (["x.npz", "-o", "y.npy", "--key", "b"], 2, "'b'"),
        (["x.npy", "-o", "y.npy", "--memory-limit", "lots"], 2, "'lots'"),
        (["x.npy", "-o", "y.npy", "--memory-limit", "-1"], 2, "'-1'"),
        (["x.npy", "-o", "y.npy", "--memory-limit", "8 B", "--backend=cpu"], 1, "memory"),
        (["x.npy", "-o", "y.npy", "--backend", "cuda:99"], 1, "cuda:99"),
        (["x.npy", "-o", "y.npy", "--backend", "nimpy"], 2, "'nimpy'"),
        (["x.npy", "-o", "nowhere/y.npy"], 1, "nowhere"),
        (["x.npy", "-o", "folder.npy"], 1, "folder.npy"),
    ],
)
def test_what_cannot_be_done_is_one_clear_line_and_writes_nothing(room, args, code, word):
    (room / "link.npy").symlink_to("x.npy")
    (room / "hard.npy").hardlink_to("x.npy")
    (room / "net.npy").hardlink_to("net.safetensors")
    (room / "folder.npy").mkdir()
    before = {each: each.read_bytes() for each in room.iterdir() if each.is_file()}
    fails(nnxp_("predict", "net.safetensors", *args), code, word)
    assert before == {each: each.read_bytes() for each in room.iterdir() if each.is_file()}


def test_a_wrong_ending_is_found_before_the_model_is_read(room):
    fails(nnxp_("predict", "missing", "x.npy", "-o", "y.txt"), 2, "y.txt")
    fails(nnxp_("predict", "missing", "x.txt", "-o", "y.npy"), 2, "x.txt")


def test_a_backend_from_the_environment_that_cannot_be_had_is_one_clear_line(room, monkeypatch):
    monkeypatch.setenv("NNXP_BACKEND", "cuda:99")
    fails(nnxp_("predict", "net.safetensors", "x.npy", "-o", "y.npy"), 1, "NNXP_BACKEND=cuda:99")


def test_workers_from_the_environment_that_are_no_number_are_one_clear_line(room, monkeypatch):
    monkeypatch.setenv("NNXP_WORKERS", "all")
    done = nnxp_("predict", "net.safetensors", "x.npy", "-o", "y.npy", "--backend", "numpy")
    fails(done, 1, "NNXP_WORKERS='all'")
    assert not (room / "y.npy").exists()


def test_an_output_that_may_not_be_written_is_one_clear_line(room):
    if not Path("/sys").is_dir():
        pytest.skip("there is no folder here in which not even root may make a file")
    fails(nnxp_("predict", "net.safetensors", "x.npy", "-o", "/sys/y.npy"), 1, "/sys")


def test_an_output_of_three_axes_does_not_go_into_a_csv_file(room):
    np.save("deep.npy", np.ones((5, 4, 6)))
    fails(nnxp_("predict", "net.safetensors", "deep.npy", "-o", "y.csv"), 2, "(5, 4, 3)")
    assert nnxp_("predict", "net.safetensors", "deep.npy", "-o", "y.npz").exit_code == 0


# what comes from outside, half-way


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "not enough memory"),
        (OSError(5, "Input/output error", "x.npy"), 1, "x.npy: Input/output error"),
        (OSError("odd"), 1, "odd"),
        (nnxp.OutOfMemory("two\nlines"), 1, "not enough memory. two lines"),
    ],
)
@pytest.mark.parametrize("ending", ENDINGS)
def test_what_fails_half_way_is_one_line_and_leaves_nothing(
    room, monkeypatch, ending, error, code, said
):
    def fail(self, x, out, progress):
        out[:10] = 1
        raise error

    monkeypatch.setattr(nnxp.Engine, "__call__", fail)
    before = set(room.iterdir())
    done = nnxp_("predict", "net.safetensors", "x.npy", "-o", f"y{ending}")
    fails(done, code)
    assert done.stderr == f"nnxp: error: {said}\n"
    assert set(room.iterdir()) == before


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_while_predicting_leaves_nothing_behind(room, name, code):
    if not hasattr(signal, name):
        pytest.skip(f"this system has no {name}")
    layers = [nnxp.Dense(512, 512, rng=i) for i in range(8)]
    nnxp.save(nnxp.Sequential(*layers, nnxp.Dense(512, 1, rng=8)), "slow.safetensors")
    np.lib.format.open_memmap("long.npy", mode="w+", dtype="f4", shape=(1_000_000, 512))  # sparse
    before = set(room.iterdir())
    command = [sys.executable, "-m", "nnxp", "predict", "slow.safetensors", "long.npy"]
    number = getattr(signal, name)
    going = subprocess.Popen(
        [*command, "-o", "y.npy", "--backend", "numpy"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # a parent may ignore it
    )
    until = time.monotonic() + 60
    while set(room.iterdir()) == before:
        assert time.monotonic() < until, "it never began to write"
        time.sleep(0.01)
    time.sleep(0.2)  # well into the work, which takes many seconds
    going.send_signal(number)
    out, err = going.communicate(timeout=60)
    assert going.returncode == code, err
    assert (out, err) == ("", "nnxp: error: interrupted\n" if name == "SIGINT" else "")
    assert set(room.iterdir()) == before


BUFFERED = {**os.environ, "PYTHONUNBUFFERED": ""}  # as for most people: not for many containers


@pytest.mark.parametrize("args", [["doctor"], ["doctor", "--json"], ["summary", "net.safetensors"]])
def test_whoever_stops_reading_is_not_complained_to(room, args):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "nnxp", *args]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, timeout=60, env=BUFFERED)
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.parametrize("args", [["doctor"], ["--version"], ["summary", "net.safetensors"]])
def test_a_full_disk_under_stdout_is_one_clear_line(room, args):
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "nnxp", *args]
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, env=BUFFERED
        )
    assert (done.returncode, done.stderr) == (1, "nnxp: error: No space left on device\n")


# summary


MODELS = {
    "dense": (lambda: nnxp.Sequential(nnxp.Dense(6, 8, rng=0), nnxp.Dense(8, 3, rng=1)), 6),
    "norm": (lambda: nnxp.Sequential(nnxp.LayerNorm(6), nnxp.Dense(6, 3, rng=0)), 6),
    "bare": (lambda: nnxp.Dense(4, 4, rng=0), 4),
    "flatten": (lambda: nnxp.Sequential(nnxp.Flatten(), nnxp.Dense(12, 3, rng=0)), 12),
    "deep": (lambda: nnxp.Sequential(nnxp.Residual(nnxp.Sequential(nnxp.RMSNorm(5)))), 5),
    "later": (lambda: nnxp.Sequential(nnxp.Activation("relu"), nnxp.Dense(7, 7, rng=0)), 7),
}


@pytest.mark.parametrize("name", MODELS)
def test_summary_finds_out_the_shape_of_a_row(room, name):
    make, inputs = MODELS[name]
    nnxp.save(make(), "m.safetensors")
    done = nnxp_("summary", "m.safetensors", "--rows", "4", "--backend", "cpu")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{make().summary((4, inputs))}\n")
    assert "4 rows on cpu: 4 at a time on 1 workers" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_summary_as_json_is_the_summary(room):
    done = nnxp_("summary", "net.safetensors", "--json", "--shape", "6", "--backend", "cpu")
    net = nnxp.load("net.safetensors")
    found = json.loads(done.stdout)
    plan = nnxp.Engine(net, "cpu").plan((1, 6))
    assert found.pop("plan")["working_set"] == plan.working_set
    assert found == json.loads(json.dumps(net.summary((1, 6)).to_dict()))


@pytest.mark.parametrize("shape", ["2,6", "2x6", " 2 , 6 "])
def test_summary_takes_a_shape_of_several_axes(room, shape):
    done = nnxp_("summary", "net.safetensors", "--shape", shape)
    assert "(1, 2, 6) -> (1, 2, 3)" in done.stdout


class Scaled(nnxp.Layer):
    """y = factor * x: takes rows of any size."""

    factor: np.ndarray

    def __call__(self, x):
        return self.factor * x


class Either(Scaled):
    """The same for rows of the two sizes that its factor happens to have."""

    def __call__(self, x):
        if x.shape[-1] not in (1, 3):
            raise nnxp.ShapeError("no")
        return x * self.factor.max()


@pytest.mark.parametrize(
    "make",
    [
        lambda: nnxp.Sequential(),
        lambda: nnxp.Activation("relu"),
        lambda: nnxp.Flatten(),
        lambda: Scaled(np.ones(1, "float32")),
        lambda: Either(np.ones((3, 1), "float32")),
    ],
    ids=["empty", "activation", "flatten", "scaled", "either"],
)
def test_summary_asks_for_the_shape_where_a_model_takes_any(room, make):
    nnxp.save(make(), "m.safetensors")
    fails(nnxp_("summary", "m.safetensors"), 2, "--shape")
    assert nnxp_("summary", "m.safetensors", "--shape", "3").exit_code == 0


@pytest.mark.parametrize(
    "shape", ["5", "six", "0", "-6", "6,", "", "²", pytest.param("9" * 5000, id="9999...")]
)
def test_a_shape_that_does_not_fit_or_is_none_is_one_clear_line(room, shape):
    fails(nnxp_("summary", "net.safetensors", f"--shape={shape}"), 2)


# demo and doctor


def test_demo_says_where_it_ran_and_how_fast():
    done = nnxp_("demo", "--rows", "2000", "--backend", "numpy", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert (said["rows"], said["device"]) == (2000, "cpu")
    text = nnxp_("demo", "--rows", "2000", "--backend", "numpy").stdout
    assert "cpu" in text
    assert "2,000" in text


def test_demo_on_a_backend_that_cannot_be_had_is_one_clear_line():
    fails(nnxp_("demo", "--backend", "cuda:99"), 1, "cuda:99")


def test_doctor_is_content_unless_something_that_was_asked_for_is_broken(monkeypatch):
    assert nnxp_("doctor").exit_code == 0
    done = nnxp_("doctor", "--backend", "cuda:99")
    assert (done.exit_code, done.stderr) == (1, "")
    for name in ("NNXP_BACKEND", "NNXP_WORKERS"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "nonsense")
            assert nnxp_("doctor").exit_code == 1


def test_doctor_in_a_process_of_its_own_answers_in_json_alone():
    done = run("doctor", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    assert said["ok"] is True
    assert said["numpy"]["numpy"] == np.__version__


# tables


@pytest.mark.parametrize("ending", [".csv", ".tsv.gz", ".parquet", ".arrow"])
def test_predict_reads_tables_and_names_what_it_writes(room, ending):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from nnxp.io.rows import open_rows, read_rows, written_rows

    x = np.load("x.npy")
    with written_rows(f"t{ending}", x.shape, x.dtype, list("abcdef")) as out:
        out[...] = x
    y = nnxp.predict(nnxp.load("net.safetensors"), x, "cpu")
    for output in ("y.npy", "y.npz", "y.csv", "y.parquet"):
        done = nnxp_("predict", "net.safetensors", f"t{ending}", "-o", output, "--backend", "cpu")
        assert (done.exit_code, done.stderr) == (0, "")
        assert done.stdout.startswith(f"{output}: 50 rows, float32 (50, 3), in ")
        np.testing.assert_allclose(read_rows(output), y, rtol=1e-6)
    assert open_rows("y.parquet").columns == ("y0", "y1", "y2")


def test_predict_takes_what_is_asked_of_a_table(room):
    x = np.load("x.npy").astype(str)
    x[3, 2] = "NA"
    lines = ["f;text;e;d;c;b;a", *(";".join([r[5], "t", *r[4::-1]]) for r in x)]
    Path("t.csv").write_text("\n".join(lines))
    args = ["predict", "net.safetensors", "t.csv", "-o", "y.npy", "--columns", "a,b,c,d,e,0"]
    fails(nnxp_(*args, "--delimiter", ";"), 1, "line 5", "column 5 (c)", "--missing 0")
    done = nnxp_(*args, "--missing", "nan", "--backend", "cpu")
    assert done.exit_code == 0
    assert done.stderr.splitlines() == [
        "nnxp: note: t.csv: the delimiter is ';', by what the lines look like",
        "nnxp: note: 1 of 50 rows hold NaN or infinity",
    ]
    same = np.load("x.npy")
    same[3, 2] = np.nan
    y = nnxp.predict(nnxp.load("net.safetensors"), same, "cpu")
    np.testing.assert_allclose(np.load("y.npy"), y, rtol=1e-6)


@pytest.mark.parametrize(
    ("args", "code", "word"),
    [
        (["--columns", "a,z"], 2, "no column 'z'"),
        (["--missing", "none"], 2, "--missing"),
        (["--delimiter", "::"], 2, "delimiter"),
        (["--no-header"], 1, "line 1"),
        (["--columns", "a"], 1, "(50, 1)"),
    ],
)
def test_wrong_options_for_a_table_are_one_clear_line(room, args, code, word):
    done = nnxp_("predict", "net.safetensors", "x.csv", "-o", "y.npy", *args)
    fails(done, code, word)
    assert not (room / "y.npy").exists()


def test_a_header_of_numbers_is_said_and_can_be_a_row(room):
    text = "0,1,2,3,4,5\n1,1,1,1,1,1\n"
    Path("t.csv").write_text(text)
    args = "predict", "net.safetensors", "t.csv", "-o", "y.npy"
    done = nnxp_(*args)
    assert "1 rows" in done.stdout
    assert "0 to 5 are taken as names" in done.stderr
    assert "2 rows" in nnxp_(*args, "--no-header").stdout


def test_the_next_run_says_what_a_killed_one_left(room):
    Path("y.npy.part").write_bytes(b"half")
    done = nnxp_("predict", "net.safetensors", "x.npy", "-o", "y.npy")
    assert done.exit_code == 0
    assert done.stderr.endswith("y.npy.part was left by a run that did not end; it is replaced\n")
    assert not Path("y.npy.part").exists()


def test_a_mapped_output_is_let_go_of_before_it_is_renamed(room, monkeypatch):
    if not Path("/proc/self/maps").exists():
        pytest.skip("only Linux shows what is mapped")
    replace = os.replace

    def strict(source, target):
        assert str(source) not in Path("/proc/self/maps").read_text()
        replace(source, target)

    monkeypatch.setattr(os, "replace", strict)
    done = nnxp_("predict", "net.safetensors", "x.npy", "-o", "y.npy", "--backend", "cpu")
    assert done.exit_code == 0, done.output


def test_verify_reads_tables(room):
    done = nnxp_("verify", "net.safetensors", "x.csv", "--columns", "f,e,d,c,b,a")
    assert done.exit_code == 0, done.output
    fails(nnxp_("verify", "net.safetensors", "x.csv", "--no-header"), 1, "line 1")


# wrong calls, models of a user's own, rows that are not finite, narrow terminals


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["demo", "--backend", "nope"], ["no backend 'nope'", "auto, cupy"]),
        (["doctor", "--backend", "nope"], ["no backend 'nope'"]),
        (["doctor", "--backend", "cuda:x"], ["no backend 'cuda:x'"]),
        (["predict", "net.safetensors", "x.npy", "-o", "y.npy", "--backend", "tpu"], ["'tpu'"]),
        (["predict", "net.safetensors", "x.npy", "-o", "y.npy", "--backend", "cpu,tpu"], ["'tpu'"]),
        (["summary", "net.safetensors", "--backend", "auto:1"], ["'auto:1'"]),
        (["verify", "net.safetensors", "x.npy", "--backend", "nope"], ["'nope'"]),
        (["verify", "net.safetensors", "x.npy", "--require", "nope"], ["'nope'"]),
        (["verify", "net.safetensors"], ["give both"]),
        (["summary", "net.safetensors", "--shape", "7"], ["--shape 7", "takes (rows, 6)"]),
        (["summary", "net.safetensors", "--shape", "6.0"], ["'6.0'"]),
        (["bench", "net.safetensors", "--shape", "7"], ["--shape 7", "takes (rows, 6)"]),
        (["summary", "net.safetensors", "--import", "no_such_module"], ["no_such_module"]),
        (["summary", "net.safetensors", "--import", "own.py"], ["--import own names the module"]),
        (["summary", "net.safetensors", "--import", "broken"], ["broken", "ZeroDivisionError"]),
    ],
)
def test_a_wrong_call_is_code_2_in_every_command(room, monkeypatch, args, words):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (room / "broken.py").write_text("1 / 0\n")
    fails(nnxp_(*args), 2, *words)
    assert not (room / "y.npy").exists()


OWN = """
import numpy as np
import nnxp

class Stretched(nnxp.Layer):
    factor: np.ndarray

    def __init__(self, size):
        self.factor = np.full(size, 2, "float32")

    def __call__(self, x):
        return x * self.factor
"""
MAKE = """
import nnxp, own_layers

nnxp.save(nnxp.Sequential(own_layers.Stretched(6), nnxp.Dense(6, 3)), "own")
"""


@pytest.mark.parametrize(
    "command",
    [
        ["predict", "own", "x.npy", "-o", "y.npy", "--backend", "numpy"],
        ["summary", "own", "--backend", "numpy"],
        ["verify", "own", "x.npy", "--backend", "numpy"],
        ["bench", "own", "--rows", "2", "--rounds", "1"],
    ],
    ids=lambda command: command[0],
)
def test_every_command_imports_the_module_of_a_model_s_own_layers(room, command):
    (room / "own_layers.py").write_text(OWN)
    subprocess.run([sys.executable, "-c", MAKE], check=True)
    without = run(*command)
    assert without.returncode == 1
    assert "'Stretched' that is not known here" in without.stderr
    assert "--import" in without.stderr
    imported = subprocess.run(
        [sys.executable, "-m", "nnxp", *command, "--import", "json", "--import", "own_layers"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert imported.returncode == 0, imported.stderr


@pytest.mark.parametrize("backend", ["numpy", "sim"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_predict_says_once_how_many_rows_are_not_finite(room, ending, backend):
    x = np.load("x.npy")
    large = np.inf if backend == "numpy" else np.nan  # of which the sim's NumPy warns
    x[3, 1], x[7, 0], x[7, 2], x[49, 5] = np.nan, large, np.nan, -large
    np.save("odd.npy", x)
    np.savez("odd.npz", x)
    np.savetxt("odd.csv", x, delimiter=",", header="a,b,c,d,e,f", comments="")
    done = nnxp_(
        "predict", "net.safetensors", f"odd{ending}", "-o", "y.npy", "--backend", backend,
        "--missing" if ending == ".csv" else "--workers", "nan" if ending == ".csv" else "2",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert done.stderr == "nnxp: note: 3 of 50 rows hold NaN or infinity\n"


def test_rows_that_are_read_again_after_a_device_ran_out_of_memory_are_counted_once():
    x = np.full((10, 2), np.nan, "float32")
    x[::2] = 1
    counting = _Counting(Passing(x))
    for start, stop in ((0, 4), (4, 10), (4, 7), (7, 10)):  # for 4:10 there was no room
        assert np.array_equal(counting[start:stop], x[start:stop], equal_nan=True)
    assert counting.nonfinite == 5


def test_verify_says_once_how_many_rows_are_not_finite(room):
    x = np.load("x.npy")
    x[3, 1] = np.nan
    np.save("odd.npy", x)
    done = nnxp_("verify", "net.safetensors", "odd.npy", "--backend", "sim")
    assert done.exit_code == 0, done.output
    assert done.output.count("NaN") == 1
    assert "on 50 of 50 rows, 1 of which hold NaN or infinity" in done.output


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
@pytest.mark.parametrize("width", [80, 50])
def test_a_terminal_shows_no_line_that_is_broken_within_a_word(room, width):
    import fcntl
    import pty
    import struct
    import termios

    plain = {name: value for name, value in os.environ.items() if name != "COLUMNS"}

    def shown(*args):
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
        process = subprocess.Popen(
            [sys.executable, "-m", "nnxp", *args], stdout=theirs, stderr=theirs, env=plain
        )
        os.close(theirs)
        text = b""
        try:
            while block := os.read(ours, 1 << 16):
                text += block
        except OSError:
            pass  # Linux says so when the other end is closed
        process.wait(60)
        os.close(ours)
        return text.decode().replace("\r\n", "\n")

    wide = nnxp_("predict", "net.safetensors", "x.npy", "-o", "y.npy").stdout
    narrow = shown("predict", "net.safetensors", "x.npy", "-o", "y.npy")
    for text in (narrow, shown("verify", "net.safetensors", "nope.foo")):
        lines = [line.rpartition("\r")[2] for line in text.rstrip("\n").split("\n")]
        assert all(len(line) <= width or " " not in line.strip() for line in lines), lines
    assert narrow.split()[-1] == wide.split()[-1]
    assert "error: nope.foo: rows are in files" in " ".join(text.split())


@pytest.mark.parametrize("command", ["", *(c.callback.__name__ for c in app.registered_commands)])
def test_every_line_of_a_help_text_fits_on_a_terminal(command):
    ran = CliRunner().invoke(app, [*filter(None, [command]), "--help"], env={"COLUMNS": "80"})
    assert ran.exit_code == 0
    assert max(map(len, ran.output.splitlines())) <= 80
    assert "range>" not in ran.output  # a number is a number


def test_a_shell_can_complete_the_commands():
    ran = CliRunner().invoke(
        app, [], prog_name="nnxp",
        env={"_NNXP_COMPLETE": "complete_bash", "COMP_WORDS": "nnxp su", "COMP_CWORD": "1"},
    )  # fmt: skip
    assert ran.output.split() == ["summary"]
