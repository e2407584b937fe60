"""Sweeps that are interrupted at random moments: what is left afterwards?

Run as a program of its own: `python tests/interrupts.py SECONDS`. A thread sends signals, one or
several at a time, during and around every sweep; their handler raises wherever the main thread is
inside nnxp. After each sweep no worker may be at work, BLAS must be as it was, and the next sweep
right. Prints the counts as JSON, and ends with 1 if one of them is wrong.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import signal
import sys
import threading
import time

import numpy as np
from threadpoolctl import ThreadpoolController

import nnxp
from nnxp.backend import _threads

WORKERS = 3
BLAS = ThreadpoolController().select(user_api="blas")


class Busy(nnxp.Layer):
    """Counts the tiles that are at work at this moment."""

    now = 0
    lock = threading.Lock()

    def __call__(self, x):
        assert x.flags.c_contiguous  # which only Python can tell: it is run for every tile
        Busy.now += 1
        try:
            return x + x
        finally:
            Busy.now -= 1

    @classmethod
    def examples(cls):
        yield cls(), (2, 2)


class Interrupt(BaseException):
    """What a handler raises, as Ctrl-C does."""


def at_work():
    """How many threads there are, but for those that wait for work."""
    return threading.active_count() - len(_threads._idle)


def blas():
    return [each["num_threads"] for each in BLAS.info()]


def main(seconds: float) -> int:
    net = nnxp.Sequential(nnxp.Dense(32, 64, "relu", rng=0), Busy(), nnxp.Dense(64, 8, rng=1))
    x = np.random.default_rng(0).random((24_000, 32), "float32")
    engine = nnxp.Engine(net, "cpu", workers=WORKERS)
    assert engine.plan(x.shape).workers == WORKERS
    expected, before = engine(x), blas()
    start = time.perf_counter()
    engine(x)
    usual = time.perf_counter() - start
    counts = dict.fromkeys(("sweeps", "signals", "raised", "interrupted"), 0)
    wrong = dict.fromkeys(("at work", "threads", "blas", "rows", "no answer"), 0)
    inside = nnxp.Engine.__call__.__code__

    def heard(number, frame):
        counts["signals"] += 1
        while frame is not None:
            if frame.f_code is inside:
                counts["raised"] += 1
                raise Interrupt
            frame = frame.f_back

    for number in (signal.SIGINT, signal.SIGALRM):
        signal.signal(number, heard)
    rng = random.Random(0)
    go, sent = threading.Semaphore(0), threading.Semaphore(0)

    def send():
        while go.acquire():
            time.sleep(rng.random() * rng.choice((0.0005, 2 * usual)))
            for _ in range(rng.choice((1, 1, 1, 2, 5, 20))):
                os.kill(os.getpid(), rng.choice((signal.SIGINT, signal.SIGALRM)))
                time.sleep(rng.random() * 0.0002)
            sent.release()

    threading.Thread(target=send, daemon=True).start()
    alone = at_work()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        faulthandler.dump_traceback_later(30, exit=True)  # what a deadlock would show
        counts["sweeps"] += 1
        go.release()
        try:
            y = engine(x)
        except Interrupt:
            counts["interrupted"] += 1
        else:
            wrong["rows"] += not np.array_equal(y, expected)
        wrong["at work"] += Busy.now != 0
        wrong["threads"] += at_work() != alone
        wrong["blas"] += blas() != before
        sent.acquire()
        for _ in range(100):  # the last signals may be on their way
            try:
                wrong["no answer"] += not np.array_equal(engine(x), expected)
                break
            except Interrupt:
                counts["interrupted"] += 1
        else:
            wrong["no answer"] += 1
    left = [s for s in (signal.SIGINT, signal.SIGALRM) if signal.getsignal(s) != heard]
    print(json.dumps({**counts, "wrong": wrong, "handlers left": len(left)}))
    faulthandler.cancel_dump_traceback_later()
    return int(any(wrong.values()))


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) if sys.argv[1:] else 5.0))
