"""Sweeps of many blocks: the same bytes whoever does them, and whoever is killed meanwhile."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import nnxp
from nnxp import cluster
from nnxp.backend._blas import one_blas_thread
from nnxp.cli import app
from nnxp.cluster import blocks
from nnxp.cluster import folder as folders
from nnxp.cluster.plan import read_anew
from nnxp.cluster.sources import Source, _of_columns

ROWS, BLOCK = 1050, 100

SLOW = """
import os, time
from nnxp.cluster import blocks
write = blocks.write

def slow(*args):
    time.sleep(float(os.environ.get("SECONDS_A_BLOCK", 0.2)))
    write(*args)

blocks.write = slow
"""

DEADLY = """
import os
from nnxp.cluster import blocks
write = blocks.write

def deadly(path, results, plan):
    if "00000003" in str(path):
        os._exit(1)
    write(path, results, plan)

blocks.write = deadly
"""


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """A folder of modules that workers import, and then go wrong."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "slow_disk.py").write_text(SLOW)
    (folder / "deadly_block.py").write_text(DEADLY)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


@pytest.fixture
def room(tmp_path, monkeypatch, faults):
    """A folder with a model and rows, where one is."""
    monkeypatch.chdir(tmp_path)
    search = [str(faults), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, search)))
    nnxp.save(net(), "net.safetensors")
    np.save("x.npy", rows())
    yield tmp_path
    blocks.release()


def net(seed=0):
    return nnxp.Sequential(
        nnxp.Dense(12, 64, "relu", rng=seed), nnxp.Dense(64, 5, "softmax", rng=seed + 1)
    )


def rows():
    return np.random.default_rng(0).normal(size=(ROWS, 12)).astype("float32")


def sweep(folder="y", **options):
    return cluster.sweep("net.safetensors", "x.npy", folder, **{"block_rows": BLOCK} | options)


def expected():
    x = rows()
    with one_blas_thread():
        return np.concatenate(
            [nnxp.predict(net(), x[start : start + BLOCK]) for start in range(0, ROWS, BLOCK)]
        )


def parts(folder="y"):
    """The bytes of all results, by name."""
    return {path.name: path.read_bytes() for path in sorted(Path(folder, "parts").iterdir())}


def assert_right(folder="y"):
    """All rows, in order, the bits that predict gives; and nothing half-written is left."""
    assert np.asarray(cluster.open(folder)).tobytes() == expected().tobytes()
    assert len(parts(folder)) == 11
    assert not list(Path(folder).rglob("*.part"))
    assert not list(Path(folder, "workers").iterdir())


# the same bits, in order


def test_a_sweep_gives_what_predict_gives_in_order(room):
    heard = []
    report = sweep(progress=lambda done, all_: heard.append((done, all_)))
    assert_right()
    assert (report.rows, report.blocks, report.kept, report.loads) == (ROWS, 11, 0, 1)
    assert heard[-1] == (ROWS, ROWS)
    assert cluster.status("y").complete
    assert "ran on cpu" in str(report)
    assert report.overhead >= 1
    assert re.search(r"reading \d+ %, computing \d+ %, writing \d+ %; overhead \d", str(report))


def test_bits_do_not_depend_on_who_does_a_block_or_in_which_order(room):
    sweep("here")
    with ThreadPoolExecutor(3) as threads:
        report = sweep("threads", executor=threads)
    assert (report.workers, report.loads) == (1, 1)
    sweep("four", threads=4)
    plan = cluster.Plan.load("here")
    for path in (*Path("here/parts").iterdir(), *Path("here/records").iterdir()):
        path.unlink()
    assert parts("threads") == parts("four")
    for block in reversed(range(len(plan))):
        cluster.run_block(plan, block)
    assert parts("here") == parts("threads")
    assert_right("here")


def test_another_number_of_rows_in_a_block_is_another_plan(room):
    sweep()
    assert len(cluster.Plan.load("y")) == 11
    with pytest.raises(nnxp.OptionError, match="rows of a block was 100 and is 50"):
        sweep(block_rows=50)


def test_as_many_loads_as_processes(room):
    report = sweep(block_rows=26, processes=2)
    assert report.blocks == 41
    assert report.loads == report.workers <= 2
    assert sum(report.hardware.values()) == 41


def test_an_executor_of_ones_own(room):
    from multiprocessing import get_context

    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert sweep(executor=pool).workers == 1
    assert_right()


def test_a_model_is_saved_for_the_workers(room):
    cluster.sweep(net(), "x.npy", "y", block_rows=BLOCK)
    assert_right()
    assert nnxp.load("y/model.safetensors") is not None
    assert cluster.sweep(net(), "x.npy", "y", block_rows=BLOCK).kept == 11
    with pytest.raises(nnxp.OptionError, match="another sweep: the model"):
        cluster.sweep(net(5), "x.npy", "y", block_rows=BLOCK)
    assert cluster.verify("y").ok
    assert sorted(path.name for path in room.glob(".*")) == []


def test_many_tasks_that_bring_their_model_are_as_many_loads_as_workers(room):
    from multiprocessing import get_context

    engine = nnxp.Engine(net(), "cpu", workers=1)
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        done = list(pool.map(through, [engine] * 40, np.array_split(rows(), 40)))
    assert np.concatenate([y for y, _, _ in done]).shape == (ROWS, 5)
    engines = {(pid, identity) for _, pid, identity in done}
    assert len(engines) == len({pid for pid, _ in engines}) <= 2


def through(engine, x):
    return engine(x), os.getpid(), id(engine)


# killed, and started again


def finished(folder="y"):
    return len(list(Path(folder, "records").glob("*.json")))


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)


def started(*options):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:  # what runs in the background of a shell ignores Ctrl-C, and so would its children
        return subprocess.Popen(
            [sys.executable, "-m", "nnxp", "sweep", "net.safetensors", "x.npy", "-o", "y",
             "--block-rows", str(BLOCK), "--import", "slow_disk", *options],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
            env=os.environ | {"SECONDS_A_BLOCK": "1"},  # the signal comes before the end
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)


def workers(folder="y"):
    """What workers say that they do; {} of one that is just saying it."""
    said = []
    for path in Path(folder, "workers").glob("*.json"):
        with suppress(FileNotFoundError):
            said.append(json.loads(path.read_text() or "{}"))
    return said


def test_one_at_a_time_drives_a_sweep(room):
    Path("y").mkdir()
    refused = pytest.raises(nnxp.OptionError, match="another process drives a sweep here")
    with folders.locked("y"), refused:
        sweep()
    sweep()
    with folders.locked("y"):
        assert cluster.status("y").running
    assert cluster.status("y").running is False


def test_a_block_that_somebody_does_is_waited_for_and_not_done_again(room, monkeypatch):
    sweep()
    plan = cluster.Plan.load("y")
    plan.record(3).unlink()
    write, written = blocks.write, []

    def slow(path, results, plan):
        written.append(path)
        time.sleep(0.2)
        write(path, results, plan)

    monkeypatch.setattr(blocks, "write", slow)
    with ThreadPoolExecutor(3) as threads:
        records = list(threads.map(cluster.run_block, [plan] * 3, [3] * 3))
    assert len(written) == 1
    assert records[0] == records[1] == records[2]
    assert_right()


def test_a_new_start_does_not_meet_workers_of_the_old_one(room):
    sweep()
    plan = cluster.Plan.load("y")
    with blocks._claimed_block(plan, 5):
        assert [(each["block"], each["pid"]) for each in cluster.status("y").at_work] == [
            (5, os.getpid())
        ]
        with pytest.raises(nnxp.OptionError, match=r"still at work.*\n.*block 5 for"):
            sweep(block_rows=50, restart=True)
        assert finished() == 11
    sweep(block_rows=50, restart=True)
    assert cluster.verify("y").ok


@pytest.mark.parametrize(
    ("number", "options"), [(signal.SIGTERM, []), (signal.SIGINT, ["--processes", "2"])]
)
def test_a_request_to_end_leaves_what_can_go_on(room, number, options):
    run = started(*options)
    wait_for(lambda: finished() >= 2)
    os.killpg(run.pid, number)  # as Ctrl-C and batch systems do: to all of its processes
    with run.stderr:
        assert run.wait(60) == 128 + number
        assert b"Traceback" not in run.stderr.read()
    before = finished()
    assert before < 11
    assert not list(Path("y").rglob("*.part"))
    assert sweep().kept == before
    assert_right()


def test_a_block_that_ends_its_process_is_named_and_the_others_are_done(room):
    with pytest.raises(
        nnxp.SweepError, match=r"block 3 \(rows 300 to 399\): its process died"
    ) as e:
        sweep(processes=2, imports=["deadly_block"])
    assert list(e.value.report.failed) == [3]
    assert finished() == 10
    assert sweep().kept == 10
    assert_right()


def test_an_executor_that_breaks_is_said_to_be_broken(room):
    class Breaks(Executor):
        def submit(self, *call):
            future = Future()
            future.set_exception(BrokenProcessPool("a process died"))
            return future

    with pytest.raises(nnxp.SweepError, match="run the sweep again with a new one"):
        sweep(executor=Breaks())
    sweep()
    assert_right()


@pytest.mark.parametrize(
    "damage", ["truncated", "one bit", "missing", "no record", "half a record"]
)
def test_a_damaged_part_is_done_again_and_no_other(room, damage):
    sweep()
    part, record = Path("y/parts/00000004.npy"), Path("y/records/00000004.json")
    whole = part.read_bytes()
    if damage == "truncated":
        part.write_bytes(whole[:-7])
    elif damage == "one bit":
        part.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "missing":
        part.unlink()
    elif damage == "no record":
        record.unlink()
    else:
        record.write_text(record.read_text()[:40])
    found = cluster.verify("y")
    assert not found.ok
    assert list(found.problems) == [4]
    report = sweep()
    assert (report.kept, report.blocks) == (10, 11)
    assert_right()


def test_a_disk_that_is_full_is_reported_and_the_rest_is_done(room, monkeypatch):
    write = blocks.write

    def full(path, results, plan):
        if "00000002" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, results, plan)

    monkeypatch.setattr(blocks, "write", full)
    with pytest.raises(nnxp.SweepError, match=r"block 2 .*No space left"):
        sweep()
    assert finished() == 10
    assert not list(Path("y").rglob("*.part"))
    monkeypatch.undo()
    os.chdir(room)
    sweep()
    assert_right()


def test_a_block_that_fails_once_is_tried_again(room, monkeypatch):
    write, failed = blocks.write, []

    def flaky(path, results, plan):
        if not failed:
            failed.append(path)
            raise OSError(errno.EIO, "Input/output error")
        write(path, results, plan)

    monkeypatch.setattr(blocks, "write", flaky)
    assert not sweep().failed
    assert_right()


def test_a_disk_that_stays_full_ends_it_before_all_is_computed_for_nothing(room, monkeypatch):
    write, tried = blocks.write, []

    def full(path, results, plan):
        tried.append(path)
        if len(tried) > 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, results, plan)

    monkeypatch.setattr(blocks, "write", full)
    with pytest.raises(nnxp.SweepError, match=r"No space left.* 3 blocks were done; make room"):
        sweep(block_rows=10)
    assert len(tried) < 20
    monkeypatch.setattr(blocks, "write", write)
    assert sweep(block_rows=10).kept == 3
    assert cluster.verify("y").ok


def test_when_nothing_goes_well_it_ends(room, monkeypatch):
    tried = []

    def broken(path, results, plan):
        tried.append(path)
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(blocks, "write", broken)
    with pytest.raises(nnxp.SweepError, match="nothing goes well"):
        sweep(block_rows=10)
    assert len(tried) < 200


def test_who_does_what_is_said_when_nothing_ends(room):
    heard = []
    with ThreadPoolExecutor(1) as pool:
        pool.submit(time.sleep, 0.5)
        sweep(executor=pool, patience=0.2, say=heard.append)
    assert heard
    assert "no block has ended for 0.2 s" in heard[0]


def test_a_device_without_memory_for_a_block_does_it_in_halves(room):
    class Greedy(nnxp.Layer):
        """Takes forty times what its shapes say, for it looks at numbers."""

        def __call__(self, x):
            waste = [x + i for i in range(40)]
            return waste[0] if bool((x[:1] == x[:1]).all()) else x

        @classmethod
        def examples(cls):
            yield cls(), (2, 2)

    device = nnxp.sim.Device(0)
    x = np.random.default_rng(0).normal(size=(3000, 16)).astype("float32")
    np.save("x.npy", x)
    device.limit = device.used + 2_000_000
    try:
        report = cluster.sweep(Greedy(), "x.npy", "y", devices=["sim:0"], block_rows=1500)
    finally:
        device.reset()
    assert not report.failed
    assert np.array_equal(np.asarray(cluster.open("y")), x)


# what is refused


def test_another_model_precision_or_source_is_refused_by_name(room):
    sweep()
    nnxp.save(net(7), "other.safetensors")
    with pytest.raises(nnxp.OptionError, match=r"the model \(sha256\) was \w{12} and is \w{12}"):
        cluster.sweep("other.safetensors", "x.npy", "y", block_rows=BLOCK)
    with pytest.raises(nnxp.OptionError, match="precision was None and is tf32"):
        sweep(precision="tf32")
    np.save("z.npy", rows())
    with pytest.raises(nnxp.OptionError, match=r"sources was x\.npy .* and is z\.npy"):
        cluster.sweep("net.safetensors", "z.npy", "y", block_rows=BLOCK)
    assert_right()
    cluster.sweep("other.safetensors", "x.npy", "y", block_rows=BLOCK, restart=True)
    assert (np.asarray(cluster.open("y")) != expected()).any()
    assert cluster.verify("y").ok


def test_a_model_or_rows_that_were_changed_meanwhile_are_refused(room):
    sweep()
    plan = cluster.Plan.load("y")
    plan.record(1).unlink()
    np.save("x.npy", rows()[::-1])
    with pytest.raises(nnxp.RowsError, match="was changed since this sweep was planned"):
        cluster.run_block(plan, 1)
    nnxp.save(net(7), "net.safetensors")
    blocks.release()
    with pytest.raises(nnxp.CheckpointError, match="another model than was planned for"):
        cluster.run_block(plan, 1)
    with pytest.raises(nnxp.CheckpointError, match="not the model of this sweep"):
        cluster.verify("y")


def test_what_cannot_be_swept_is_refused_before_any_work(room):
    np.save("narrow.npy", rows()[:, :5])
    Path("text.csv").write_text("1,2\n")
    Path("full").mkdir()
    Path("full/thesis.tex").touch()
    for kind, message, call in (
        (nnxp.ShapeError, "takes", lambda: cluster.sweep("net.safetensors", "narrow.npy", "y")),
        (nnxp.ShapeError, "narrow.npy has rows",
         lambda: cluster.sweep("net.safetensors", ["x.npy", "narrow.npy"], "y")),
        (nnxp.OptionError, "files ending in",
         lambda: cluster.sweep("net.safetensors", "text.csv", "y")),
        (nnxp.OptionError, "numpy.save", lambda: cluster.sweep("net.safetensors", rows(), "y")),
        (nnxp.OptionError, "holds other files", lambda: sweep("full")),
        (nnxp.OptionError, "not both", lambda: sweep(executor=_NONE, processes=1)),
        (nnxp.OptionError, "3 processes are more than 2 devices",
         lambda: sweep(devices=["sim:0", "sim:1"], processes=3)),
        (nnxp.OptionError, "format='hdf'", lambda: sweep(format="hdf")),
        (nnxp.OptionError, "block_rows", lambda: sweep(block_rows=0)),
        (nnxp.OptionError, "patience", lambda: sweep(patience=0)),
        (nnxp.OptionError, "is a file", lambda: sweep("x.npy")),
        (nnxp.OptionError, "Plan.load", lambda: cluster.run_block("y", 1)),
        (nnxp.OptionError, "a file has a name", lambda: cluster.status(3)),
        (nnxp.OptionError, "a file has a name", lambda: cluster.dask.predict(net(), _Lazy())),
        (nnxp.OptionError, "is no folder of a sweep", lambda: cluster.status("full")),
    ):  # fmt: skip
        with pytest.raises(kind, match=message):
            call()
    assert {path.name for path in Path("full").iterdir()} == {"lock", "thesis.tex"}
    assert not finished()


_NONE = ThreadPoolExecutor(1)


class _Lazy:
    """What looks like an array of Dask's."""

    ndim, shape, map_blocks, rechunk = 2, (3, 12), None, None


# devices


def test_a_device_is_claimed_by_one_process_and_the_next_is_refused(room):
    devices = tuple(f"sim:{index}" for index in range(nnxp.sim.DEVICES))
    held = [blocks._claim(f"sim-{index}-0")[0] for index in range(nnxp.sim.DEVICES)]
    try:
        assert None not in held
        with pytest.raises(nnxp.BackendUnavailable, match=f"sim:0 by process {os.getpid()}"):
            sweep(devices=devices)
        report = sweep(devices=devices, per_device=2)  # two on one only if that is asked for
        assert report.blocks == 11
        blocks.release()
        os.close(held.pop())
        sweep("free", devices=devices)
        last = json.loads(Path("free/records/00000000.json").read_text())
        assert last["device"] == devices[-1]
    finally:
        for handle in held:
            os.close(handle)
    assert cluster.verify("free").ok


CLAIM = """
import sys, nnxp
from nnxp.cluster.blocks import Setting, claimed_backend
nnxp.sim.DEVICES = 3
try:
    print(claimed_backend(Setting(devices=("sim:0", "sim:1", "sim:2"))).device, flush=True)
    sys.stdin.read()
except nnxp.BackendUnavailable as error:
    print(error, flush=True)
"""


def test_three_devices_are_for_three_processes_and_the_fourth_is_refused(room):
    def claim():
        return stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", CLAIM], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                text=True,
            )
        )  # fmt: skip

    with ExitStack() as stack:
        three = [claim() for _ in range(3)]
        try:
            assert {each.stdout.readline().strip() for each in three} == {"sim:0", "sim:1", "sim:2"}
            fourth = claim().communicate()[0]
            assert "every device is taken" in fourth
            assert all(f"by process {each.pid}" in fourth for each in three)
            three[1].kill()
            three[1].wait()
            assert claim().communicate()[0].startswith("sim:")  # that of the one that was killed
        finally:
            for each in three:
                each.kill()


def test_results_of_several_kinds_of_machine_are_named(room):
    sweep()
    Path("y/records/00000004.json").unlink()
    report = sweep(devices=["sim:0"])
    assert len(report.hardware) == 2
    assert "of several kinds" in str(report)


# sources and results


def test_rows_in_several_files_are_one_after_the_other(room):
    x = rows()
    np.save("a.npy", x[:37])
    np.save("b.npy", np.asfortranarray(x[37:905]))
    np.save("c.npy", x[905:])
    cluster.sweep("net.safetensors", ["a.npy", "b.npy", "c.npy"], "y", block_rows=BLOCK)
    assert_right()
    assert cluster.verify("y").ok


def test_rows_in_hdf5(room):
    h5py = pytest.importorskip("h5py")
    with h5py.File("x.h5", "w") as file:
        file["x"] = rows()
        file["labels"] = np.arange(3)
    with pytest.raises(nnxp.OptionError, match="name one of"):
        cluster.sweep("net.safetensors", "x.h5", "y")
    cluster.sweep("net.safetensors", "x.h5", "y", key="x", block_rows=BLOCK)
    assert_right()


def test_rows_in_zarr_are_cut_where_its_chunks_end(room):
    zarr = pytest.importorskip("zarr")
    array = zarr.open_array("x.zarr", mode="w", shape=(ROWS, 12), chunks=(70, 12), dtype="float32")
    array[:] = rows()
    cluster.sweep("net.safetensors", "x.zarr", "y", block_rows=BLOCK, say=lambda message: None)
    assert_right()
    cluster.sweep("net.safetensors", "x.zarr", "own")
    assert cluster.Plan.load("own").block_rows % 70 == 0


@pytest.mark.parametrize(
    ("chunks", "block"),
    [([70], 100), ([70], 140), ([2000], 100), ([1], 7), ([100, 100], 100), ([100, 100], 30)],
)
def test_how_often_rows_are_read_because_of_chunks_is_known_before(chunks, block):
    made = tuple(
        Source("x", None, ROWS // len(chunks), (12,), "float32", chunk, 0, 0) for chunk in chunks
    )
    read, first = 0, 0
    for source in made:  # row by row
        mine = range(first, first + source.rows)
        for start in range(0, ROWS, block):
            touched = {
                (row - first) // source.chunk for row in range(start, start + block) if row in mine
            }
            read += sum(min(source.chunk, source.rows - at * source.chunk) for at in touched)
        first += source.rows
    assert read_anew(made, block) == read / ROWS


def test_blocks_that_cut_through_chunks_are_named_before_the_first_row(room):
    zarr, heard = pytest.importorskip("zarr"), []
    array = zarr.open_array("x.zarr", mode="w", shape=(ROWS, 12), chunks=(70, 12), dtype="float32")
    array[:] = rows()
    cluster.sweep("net.safetensors", "x.zarr", "y", block_rows=BLOCK, say=heard.append)
    assert [re.sub(r"\d+\.\d", "#", said) for said in heard] == [
        "blocks of 100 rows cut through the file's chunks of 70, so that each row is read # times; "
        "with block_rows=140 (--block-rows 140) they would not"
    ]
    cluster.sweep("net.safetensors", "x.zarr", "z", block_rows=140, say=heard.append)
    assert len(heard) == 1


@pytest.mark.parametrize("kind", ["list", "columns"])
def test_rows_in_parquet(room, kind):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    x = rows()
    columns = [arrow.array(x[:, i]) for i in range(12)]
    if kind == "list":
        columns = [arrow.FixedSizeListArray.from_arrays(arrow.array(x.ravel()), 12)]
    table = arrow.table(columns, [f"x{i}" for i in range(len(columns))])
    parquet.write_table(table, "x.parquet", row_group_size=130)
    cluster.sweep("net.safetensors", "x.parquet", "y", block_rows=BLOCK)
    assert_right()


def test_bytes_in_parquet_are_rows_of_bytes(room):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    x = np.random.default_rng(0).integers(0, 256, (230, 12)).astype("uint8")
    column = arrow.array([row.tobytes() for row in x], arrow.binary(12))
    parquet.write_table(arrow.table({"pixels": column}), "x.parquet", row_group_size=60)
    cluster.sweep("net.safetensors", "x.parquet", "y", block_rows=BLOCK)
    with one_blas_thread():
        whole = [nnxp.predict(net(), x[start : start + BLOCK]) for start in range(0, 230, BLOCK)]
    assert np.asarray(cluster.open("y")).tobytes() == np.concatenate(whole).tobytes()


@pytest.mark.parametrize("kind", ["list", "bytes"])
def test_rows_of_one_size_in_arrow_are_not_copied(kind):
    arrow = pytest.importorskip("pyarrow")
    x = np.arange(600, dtype="uint8" if kind == "bytes" else "float32").reshape(50, 12)
    held = arrow.py_buffer(x)
    if kind == "bytes":
        column = arrow.Array.from_buffers(arrow.binary(12), 50, [None, held])
    else:
        column = arrow.FixedSizeListArray.from_arrays(arrow.array(x.ravel()), 12)
        held = column.flatten().buffers()[1]
    taken = _of_columns("x.parquet", arrow.table({"x": column}).slice(7, 30))
    assert np.array_equal(taken, x[7:37])
    assert taken.ctypes.data == held.address + 7 * 12 * x.itemsize


def test_results_in_parquet(room):
    parquet = pytest.importorskip("pyarrow.parquet")
    sweep(format="parquet")
    assert np.asarray(cluster.open("y")).tobytes() == expected().tobytes()
    assert parquet.read_table("y/parts").num_rows == ROWS
    assert cluster.verify("y").ok


@pytest.mark.parametrize("block", [BLOCK, 2000])
def test_results_in_zarr_are_one_array_whose_chunks_are_the_blocks(room, block):
    zarr = pytest.importorskip("zarr")
    sweep("npy", block_rows=block)
    sweep(format="zarr", block_rows=block)
    y = np.asarray(cluster.open("npy"))
    array = zarr.open_array("y/parts", mode="r")
    assert (array.shape, array.dtype, array.chunks) == ((ROWS, 5), np.float32, (block, 5))
    assert array[:].tobytes() == np.asarray(cluster.open("y")).tobytes() == y.tobytes()
    assert cluster.verify("y").ok
    last = cluster.Plan.load("y").part(len(cluster.Plan.load("y")) - 1)
    last.write_bytes(last.read_bytes()[:-4])
    assert len(cluster.verify("y").problems) == 1
    assert sweep(format="zarr", block_rows=block).kept == len(cluster.Plan.load("y")) - 1
    assert zarr.open_array("y/parts", mode="r")[:].tobytes() == y.tobytes()


def test_results_are_one_array(room):
    sweep()
    parts, y = cluster.open("y"), expected()
    assert (parts.shape, parts.dtype, len(parts)) == (y.shape, y.dtype, len(y))
    for index in (
        0, -1, 399, slice(None), slice(95, 305), slice(400, 400), slice(2000, None),
        slice(9, 900, 7), slice(None, None, -1), [3, 1049, -1, 3], np.arange(ROWS) % 5 == 0,
        (slice(90, 110), 2), (5, 1), (slice(None), slice(1, 3)),
    ):  # fmt: skip
        assert np.array_equal(parts[index], y[index]), index
    with pytest.raises(nnxp.IdError):
        parts[ROWS]
    assert nnxp.predict(nnxp.Dense(5, 2, rng=0), parts).shape == (ROWS, 2)
    Path("y/records/00000007.json").unlink()
    with pytest.raises(nnxp.RowsError, match="lacks 1 of 11 blocks, such as 7"):
        cluster.open("y")


def test_verify_sees_numbers_that_are_wrong_though_their_sums_are_right(room):
    sweep()
    plan = cluster.Plan.load("y")
    part, record = plan.part(5), json.loads(plan.record(5).read_text())
    wrong = np.load(part)
    wrong[0] += np.float32(1e-4)
    np.save(part, wrong)
    record |= {"sha256": cluster.plan.sha256(part), "bytes": part.stat().st_size}
    plan.record(5).write_text(json.dumps(record))
    found = cluster.verify("y")
    assert list(found.problems) == [5]
    assert "off" in found.problems[5]
    assert "NOT VERIFIED" in str(found)


# the command


def test_the_command(room):
    def nnxp_(*args):
        return CliRunner().invoke(app, ["sweep", *map(str, args)])

    done = nnxp_("net.safetensors", "x.npy", "-o", "y", "--block-rows", BLOCK)
    assert done.exit_code == 0
    assert "1,050 rows in 11 blocks" in done.stdout
    assert_right()
    assert "1,050 of 1,050 rows (100.0 %)" in nnxp_("status", "y").stdout
    assert json.loads(nnxp_("verify", "y", "--json").stdout)["ok"]
    Path("y/parts/00000002.npy").unlink()
    assert nnxp_("verify", "y").exit_code == 1
    wrong = nnxp_("net.safetensors", "x.npy", "-o", "y", "--block-rows", 50)
    assert wrong.exit_code == 2
    assert "--restart" in wrong.stderr
    assert nnxp_("net.safetensors", "x.npy").exit_code == 2
    poisoned = nnxp_("net.safetensors", "x.npy", "-o", "z", "--processes", 1, "--block-rows", BLOCK,
                     "--import", "deadly_block")  # fmt: skip
    assert poisoned.exit_code == 1
    assert "block 3 (rows 300 to 399)" in poisoned.stderr


def test_import_nnxp_loads_nothing_of_it():
    names = "('nnxp.cluster', 'dask', 'distributed')"
    code = f"import sys, nnxp; print([n for n in sys.modules if n.startswith({names})])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


# Dask


@pytest.fixture(scope="module")
def scheduler(faults):
    """Two worker processes of Dask, and their scheduler, over real sockets."""
    distributed = pytest.importorskip("distributed")
    import dask

    with (
        dask.config.set({"distributed.worker.multiprocessing-method": "spawn"}),
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50
        ) as made,
    ):
        yield made


@pytest.mark.filterwarnings("default")  # Dask's own
def test_workers_of_dask(room, scheduler):
    with scheduler.get_client() as client:
        report = sweep(executor=client.get_executor())
        assert_right()
        assert report.loads == report.workers <= 2
        Path("y/parts/00000006.npy").unlink()
        again = sweep(executor=client.get_executor())
        assert (again.kept, again.blocks) == (10, 11)
        with ThreadPoolExecutor(1) as aside:
            slow = aside.submit(
                sweep, "z", executor=client.get_executor(), threads=1, imports=["slow_disk"]
            )
            wait_for(lambda: finished("z") >= 2)
            wait_for(lambda: any(worker.get("pid") for worker in workers("z")))
            os.kill(next(w["pid"] for w in workers("z") if w.get("pid")), signal.SIGKILL)
            assert not slow.result(120).failed
        assert_right("z")
    done = CliRunner().invoke(
        app, ["sweep", "net.safetensors", "x.npy", "-o", "w", "--dask", scheduler.scheduler_address]
    )
    assert done.exit_code == 0, done.output
    assert (np.asarray(cluster.open("w")).shape) == (ROWS, 5)


@pytest.mark.filterwarnings("default")
def test_dask_arrays(room):
    array = pytest.importorskip("dask.array")
    from nnxp.cluster import dask

    x = array.from_array(rows(), chunks=(BLOCK, 7))
    y = dask.predict("net.safetensors", x)
    assert (y.shape, y.dtype) == ((ROWS, 5), np.float32)
    before = blocks.loads()
    assert y.compute(scheduler="threads").tobytes() == expected().tobytes()
    assert blocks.loads() == before + 1


def test_wide_results_are_written_without_names_for_their_columns(tmp_path):
    plan = cluster.Plan("", "", "", (), (200_000,), "float32", 1, None)
    tracemalloc.start()
    try:
        blocks.write(tmp_path / "y.npy", np.ones((1, 200_000), "float32"), plan)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert np.load(tmp_path / "y.npy").shape == (1, 200_000)
