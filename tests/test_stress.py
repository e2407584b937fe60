"""Eight threads call engines at once while faults are injected: no wrong row, no deadlock.
And processes are forked while threads are at work.

Three seconds in the suite; NNXP_STRESS_SECONDS=60 for the minute that a release is owed.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time
from collections import Counter

import numpy as np
import pytest
from threadpoolctl import threadpool_info

import nnxp
from conftest import at_work, draw

SECONDS = float(os.environ.get("NNXP_STRESS_SECONDS", "3"))
NET = nnxp.Sequential(
    nnxp.Dense(32, 64, "relu", rng=0), nnxp.LayerNorm(64), nnxp.Dense(64, 8, "softmax", rng=1)
)
X = draw((20_000, 32))


class Injected(Exception):
    """A fault that was planted, and is expected to arrive."""


class Failing:
    """Rows of which some cannot be read."""

    def __init__(self, x, at):
        self.shape, self.dtype, self._x, self._at = x.shape, x.dtype, x, at

    def __getitem__(self, rows):
        if rows.start <= self._at < rows.stop:
            raise Injected
        return self._x[rows]


class FailingLayer(nnxp.Layer):
    """A layer that now and then fails."""

    def __call__(self, x):
        if abs(float(x[0, 0]) - float(X[7777, 0])) < 1e-12 or len(x) == 777:
            raise Injected
        return x

    @classmethod
    def examples(cls):
        yield cls(), (2, 2)


def blas():
    return [each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"]


def test_eight_threads_with_injected_faults_give_no_wrong_row_and_no_deadlock():
    faulthandler.dump_traceback_later(SECONDS * 4 + 120, exit=True)  # what a deadlock would show
    before, threads_before = blas(), at_work()
    expected = nnxp.predict(NET, X, "cpu")
    fragile = nnxp.Sequential(FailingLayer(), *NET.layers)
    end = time.monotonic() + SECONDS
    wrong, counts = [], dict.fromkeys(("right", "injected"), 0)
    lock = threading.Lock()

    def work(seed):
        rng = np.random.default_rng(seed)
        engine = nnxp.Engine(NET, "cpu", workers=int(rng.integers(1, 4)))
        while time.monotonic() < end:
            start = int(rng.integers(0, 10_000))
            stop = start + int(rng.choice([1, 3, 777, 5_000, 10_000]))
            fault = rng.choice(["none", "none", "source", "layer"])
            try:
                if fault == "source":
                    y = engine(Failing(X[start:stop], at=(stop - start) // 2))
                elif fault == "layer":
                    y = nnxp.predict(fragile, X[start:stop], "cpu", workers=2)
                else:
                    y = engine(X[start:stop])
            except Injected:
                kind = "injected"
            except BaseException as error:
                kind = "right"
                wrong.append(repr(error))
            else:
                kind = "right"
                if fault == "source" or not np.allclose(y, expected[start:stop], atol=1e-6):
                    wrong.append((fault, start, stop))
            with lock:
                counts[kind] += 1

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    faulthandler.cancel_dump_traceback_later()
    print(counts)
    assert not wrong
    assert min(counts.values()) > 10, counts
    assert blas() == before
    until = time.monotonic() + 20
    while at_work() != threads_before and time.monotonic() < until:
        time.sleep(0.01)  # of many that waited some end
    assert at_work() == threads_before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_children_forked_while_sweeps_are_under_way_answer_right():
    before, expected, end = blas(), nnxp.predict(NET, X, "cpu"), time.monotonic() + SECONDS
    engine = nnxp.Engine(NET, "cpu", workers=2)

    def work():
        while time.monotonic() < end:
            engine(X)

    def child():
        signal.alarm(60)  # what hangs is ended, and counted
        if blas() != before:
            return 2
        ok = np.allclose(engine(X), expected, atol=1e-6) and blas() == before
        return 0 if ok else 3

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    ends = Counter()
    while time.monotonic() < end:
        process = os.fork()
        if process == 0:
            try:
                os._exit(child())
            finally:
                os._exit(4)
        ends[os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])] += 1
    for thread in threads:
        thread.join()
    print(dict(ends))
    assert set(ends) == {0}
    assert ends[0] > 2
    assert blas() == before
