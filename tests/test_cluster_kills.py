"""SIGKILL at random moments, of a worker, of the client and of the whole command: equal bits after.

`NNXP_KILLS=20` kills more often.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pytest

import nnxp
from nnxp import cluster
from nnxp.backend._blas import one_blas_thread

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="it looks for processes in /proc"
)

KILLS = int(os.environ.get("NNXP_KILLS", "4"))
ROWS, BLOCK = 1500, 25
LOGGED = """
import os, time
from nnxp.cluster import blocks

do, write = blocks._done, blocks.write

def in_two(path, results, plan):  # most kills come between
    write(path, results[: len(results) // 2], plan)
    time.sleep(0.05)
    write(path, results, plan)

def logged(plan, block, setting):
    record = do(plan, block, setting)
    with open(plan.folder + ".log", "a") as file:
        file.write(f"{block}\\n")
    return record

blocks._done, blocks.write = logged, in_two
"""


def net():
    return nnxp.Sequential(nnxp.Dense(12, 64, "relu", rng=0), nnxp.Dense(64, 5, "softmax", rng=1))


def rows():
    return np.random.default_rng(0).normal(size=(ROWS, 12)).astype("float32")


class Sweeps:
    """A command that is started again whenever it was killed, in a new folder once it was done."""

    def __init__(self, expected):
        self.expected, self.count, self.run, self.seen = expected, 0, None, set()

    @property
    def folder(self):
        return f"y{self.count}"

    def start(self, *options):
        """Begin, or go on, with these options, unless that is under way."""
        if self.run is not None and self.run.poll() is None:
            if self.options == options:
                return
            self.kill()
        elif self.run is not None and self.run.returncode == 0:
            self.ends()
            self.count += 1
        self.options = options
        self.run = subprocess.Popen(
            [sys.executable, "-m", "nnxp", "sweep", "net.safetensors", "x.npy", "-o", self.folder,
             "--block-rows", str(BLOCK), "--devices", "cpu", "--import", "logged_block", *options],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def goes_on(self):
        """Wait until a block more is done; begin anew if all are."""
        before = self.recorded()
        end = time.monotonic() + 60
        while self.recorded() == before:
            assert time.monotonic() < end, "it took too long"
            if self.run.poll() is not None:
                assert self.run.returncode == 0, self.run.communicate()[1]
                before = 0
                self.start(*self.options)
            time.sleep(0.02)

    def ends(self):
        said = self.run.communicate(timeout=60)[1]
        assert self.run.returncode == 0, said
        results = np.asarray(cluster.open(self.folder))
        assert results.tobytes() == self.expected.tobytes()
        self.is_whole()
        times = Counter(Path(self.folder + ".log").read_text().split())
        assert max(times.values()) == 1, f"blocks were done again: {times}"
        assert not list(Path(self.folder).rglob("*.part"))
        assert not list(Path(self.folder, "workers").iterdir())

    def is_whole(self):
        """Whatever has its name is whole, at any moment; and what has a record has its part."""
        records = {path.stem for path in Path(self.folder, "records").glob("*.json")}
        parts = {path.stem: path for path in Path(self.folder, "parts").glob("*.npy")}
        assert records <= parts.keys()
        for block, path in parts.items():
            first = int(block) * BLOCK
            assert np.array_equal(np.load(path), self.expected[first : first + BLOCK]), path

    def recorded(self):
        return len(list(Path(self.folder, "records").glob("*.json")))

    def kill_a_worker(self, draw):
        pids = self.workers()
        while not pids and self.run.poll() is None:
            time.sleep(0.02)
            pids = self.workers()
        if pids:
            kill(draw.choice(pids))
            self.is_whole()

    def kill(self):
        children = children_of(self.run.pid)
        self.run.kill()
        self.is_whole()
        self.run.stderr.close()  # not read to its end: orphans would hold it open
        self.run.wait()
        wait_for(lambda: not any(map(alive, children)), "orphans go on")
        assert cluster.status(self.folder).running is False

    def workers(self):
        return [worker["pid"] for worker in cluster.status(self.folder).at_work]


def kill(pid):
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def wait_for(condition, problem):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, problem
        time.sleep(0.01)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children_of(pid):
    try:
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except FileNotFoundError:
        return []


@pytest.fixture
def room(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Many processes start here: what one of them has compiled the others take as it is.
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    Path("logged_block.py").write_text(LOGGED)
    search = [str(tmp_path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, search)))
    monkeypatch.syspath_prepend(tmp_path)
    nnxp.save(net(), "net.safetensors")
    np.save("x.npy", rows())


@pytest.mark.filterwarnings("default")  # Dask's own
def test_whoever_is_killed_at_whatever_moment_the_bits_are_the_same(room):
    distributed = pytest.importorskip("distributed")
    import dask

    x = rows()
    with one_blas_thread():
        sweeps = Sweeps(
            np.concatenate([nnxp.predict(net(), x[i : i + BLOCK]) for i in range(0, ROWS, BLOCK)])
        )
    draw = random.Random(seed := random.randrange(1 << 32))
    print("seed", seed)
    with (
        dask.config.set({"distributed.worker.multiprocessing-method": "spawn"}),
        distributed.LocalCluster(
            n_workers=3, threads_per_worker=1, dashboard_address=None, silence_logs=50
        ) as workers,
    ):
        pool, address = ("--processes", "3"), ("--dask", workers.scheduler_address)
        victims = ("worker", pool), ("command", pool), ("worker", address), ("client", address)
        for victim, by in islice(cycle(victims), KILLS):
            sweeps.start(*by)
            sweeps.goes_on()
            time.sleep(draw.uniform(0, 0.3))
            if victim == "worker":
                sweeps.kill_a_worker(draw)
            else:
                sweeps.kill()
        sweeps.start(*address)
        sweeps.ends()
