"""The cores have one owner, whatever else goes on; and what a system does not tell ends nothing."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from contextvars import ContextVar, copy_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController, threadpool_limits

import nnxp
from conftest import at_work, draw
from nnxp.backend import _blas, _machine, _threads
from nnxp.backend._threads import together
from nnxp.backend.cpu import worker_count

NET = nnxp.Sequential(nnxp.Dense(32, 64, "relu", rng=0), nnxp.Dense(64, 8, rng=1))
X = draw((20_000, 32))
BLAS = ThreadpoolController().select(user_api="blas")


def blas():
    """What threadpoolctl says of the threads of BLAS."""
    return [each["num_threads"] for each in BLAS.info()]


def bare():
    """What BLAS itself says."""
    return [library.get() for library in _blas._shared.libraries()]


more_than_one = pytest.mark.skipif(
    not bare() or min(bare()) < 2, reason="BLAS has one thread, or is not one that can be asked"
)


class Pauses(nnxp.Layer):
    """Stops in every tile after the first until it may go on, and notes what it sees.

    It asks how x lies, and so is run as Python for every tile.
    """

    seen: list
    at_work: threading.Event
    go_on: threading.Event

    def __init__(self):
        self.seen, self.at_work, self.go_on = [], threading.Event(), threading.Event()

    def __call__(self, x):
        assert x.flags.c_contiguous
        self.seen.append((blas(), bare()))
        self.at_work.set()
        assert self.go_on.wait(20)
        return x

    @classmethod
    def examples(cls):
        yield cls(), (2, 2)


class Sweeping:
    """A sweep under way in another thread."""

    def __init__(self):
        self.layer = Pauses()
        options = {"workers": 2}
        self.thread = threading.Thread(
            target=nnxp.predict, args=(self.layer, X, "cpu"), kwargs=options
        )
        self.thread.start()
        assert self.layer.at_work.wait(20)

    def end(self):
        self.layer.go_on.set()
        self.thread.join()


@more_than_one
def test_a_sweep_of_any_thread_has_blas_at_one_thread():
    before = bare()
    with threadpool_limits(2, user_api="blas"):  # from here on, this is the first thread
        sweep = Sweeping()
        assert set(bare()) == {1}
        sweep.end()
        ones = [1] * len(before)
        assert sweep.layer.seen == [(ones, ones)] * len(sweep.layer.seen)
    assert bare() == blas() == before


@more_than_one
@pytest.mark.parametrize("first", ["sweep", "limit"])
@pytest.mark.parametrize("last", ["sweep", "limit"])
@pytest.mark.parametrize("limit", [1, 2])
def test_two_owners_of_blas_may_come_and_go_in_any_order(first, last, limit):
    before = bare()
    if first == "sweep":
        sweep, other = Sweeping(), threadpool_limits(limit, user_api="blas")
    else:
        other, sweep = threadpool_limits(limit, user_api="blas"), Sweeping()
    with other:
        assert blas() == [limit] * len(before)
        assert set(bare()) == {1}
        if last == "limit":
            sweep.end()
            assert bare() == [limit] * len(before)
    if last == "sweep":
        assert blas() == before
        assert set(bare()) == {1}
        sweep.end()
    assert bare() == blas() == before


@more_than_one
def test_what_sets_blas_past_everybody_is_left_in_force():
    before, sweep = bare(), Sweeping()
    for library in _blas._shared.libraries():
        library.set(3)
    sweep.end()
    assert bare() == [3] * len(before)
    for library, number in zip(_blas._shared.libraries(), before, strict=True):
        library.set(number)


def test_a_library_with_a_number_for_each_thread_is_set_by_each_worker():
    own = threading.local()

    class Mkl:
        """As threadpoolctl's controller of MKL: what is set is this thread's, 0 for nothing."""

        internal_api, filepath, threading_layer = "mkl", "libmkl_rt.so", "intel"

        def get_num_threads(self):
            return getattr(own, "number", 0) or 8

        def set_num_threads(self, number):
            before, own.number = getattr(own, "number", 0), number
            return before

    mkl, seen = Mkl(), []
    library = _blas._Library(mkl, _blas._shared)
    assert library.for_each_thread

    def work():
        undo = library.limit()
        seen.append(mkl.get_num_threads())
        undo()
        seen.append(own.number)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [1, 0]  # afterwards the thread has no number of its own, as before
    assert mkl.get_num_threads() == 8


def no_threads(*args):
    raise RuntimeError("can't start new thread")


def test_without_further_threads_the_caller_s_own_does_the_work(monkeypatch):
    monkeypatch.setattr(_threads, "_idle", [])
    expected, before = NET(X), bare()
    monkeypatch.setattr(threading.Thread, "start", no_threads)
    np.testing.assert_allclose(nnxp.predict(NET, X, "cpu", workers=4), expected, 1e-5, 1e-6)
    answers = nnxp.predict_iter(NET, [X[:9000], X[9000:]], "cpu", workers=4)
    np.testing.assert_allclose(np.concatenate(list(answers)), expected, 1e-5, 1e-6)
    with pytest.raises(nnxp.ShapeError):
        list(nnxp.predict_iter(NET, [X[:, :3]], "cpu"))
    assert bare() == before


def test_a_thread_that_can_be_had_later_is_used_then(monkeypatch):
    start, tries = threading.Thread.start, []

    def later(thread):
        tries.append(thread)
        if len(tries) < 3:
            no_threads()
        start(thread)

    threads = at_work()
    monkeypatch.setattr(threading.Thread, "start", later)
    answers = nnxp.predict_iter(NET, [X[i : i + 9] for i in range(6)], "cpu")
    for i, y in enumerate(answers):
        np.testing.assert_allclose(y, NET(X[i : i + 9]), 1e-5, 1e-6)
    assert len(tries) == 3
    assert at_work() == threads


def test_as_many_threads_as_can_be_had_are_used(monkeypatch):
    start, left = threading.Thread.start, [2]

    def some(thread):
        if left[0] == 0:
            no_threads()
        left[0] -= 1
        start(thread)

    monkeypatch.setattr(_threads, "_idle", [])
    expected, threads = NET(X), at_work()
    monkeypatch.setattr(threading.Thread, "start", some)
    np.testing.assert_allclose(nnxp.predict(NET, X, "cpu", workers=6), expected, 1e-5, 1e-6)
    assert left == [0]
    assert at_work() == threads


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no thread is bound to cores")
def test_workers_that_waited_use_the_cores_of_who_calls_and_keep_nothing_of_a_call():
    seen, given = set(), ContextVar("given")
    tokens = [type("Token", (), {})()]
    kept = weakref.ref(tokens[0])
    before = os.sched_getaffinity(0)

    def look():
        seen.add(frozenset(os.sched_getaffinity(0)))

    copy_context().run(lambda: (given.set(tokens.pop()), together([look] * 3, lambda: None)))
    assert seen == {frozenset(before)}
    gc.collect()
    assert kept() is None
    seen.clear()
    try:
        os.sched_setaffinity(0, {min(before)})
        together([look] * 3, lambda: None)
    finally:
        os.sched_setaffinity(0, before)
    assert seen == {frozenset({min(before)})}


def run(code, *arguments, **variables):
    """What a program of its own prints; it has to end well."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NNXP_WORKERS")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    ran = subprocess.run(
        [sys.executable, *(("-c", code) if isinstance(code, str) else (code,)), *arguments],
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


START = """
import atexit, os, sys, threading, time
import numpy as np
import nnxp
net = nnxp.Sequential(nnxp.Dense(32, 64, "relu", rng=0), nnxp.Dense(64, 8, rng=1))
x = np.random.default_rng(0).random((20_000, 32), "float32")
expected = net(x)
engine = nnxp.Engine(net, "cpu", workers=4)

def check():
    assert np.allclose(engine(x), expected, atol=1e-5)
    assert np.allclose(next(nnxp.predict_iter(net, [x], "cpu", workers=4)), expected, atol=1e-5)
    print("right", flush=True)
"""
AT_THE_END = {
    "when the main thread has ended": """
def serve():
    threading.main_thread().join()
    check()

threading.Thread(target=serve).start()
""",
    "when the interpreter shuts down": "atexit.register(check)",
    "when modules are taken away": """
class Last:
    def __del__(self, engine=engine, x=x, write=os.write):
        try:
            engine(x)
        finally:  # or it is told that Python shuts down
            write(1, b"right")

engine(x)
sys.modules["last"] = Last()
""",
    "in a child that is forked": """
engine(x)
child = os.fork() if hasattr(os, "fork") else check()
if child == 0:
    check()
    os._exit(0)
if child:
    assert os.waitpid(child, 0)[1] == 0
""",
    "where the system allows no further thread": """
import resource
engine(x)  # by now OpenBLAS has its threads; where it gets none it raises SIGINT itself
if os.getuid() == 0:
    os.setuid(65534)  # the limit is not for root
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
try:
    threading.Thread(target=check).start()
except RuntimeError:
    check()
""",
}


@pytest.mark.parametrize("when", AT_THE_END)
def test_a_sweep_goes_on(when):
    assert "right" in run(START + AT_THE_END[when])


def test_the_share_of_the_cores_that_was_given_is_kept(monkeypatch):
    monkeypatch.setattr(_machine, "cores", lambda: 8)
    monkeypatch.setattr(_machine, "core_quota", lambda: None)
    monkeypatch.delenv("NNXP_WORKERS", raising=False)
    shares = {"": 8, "3": 3, "4,2": 4, " 2 ": 2, "64": 8, "0": 8, "x": 8}
    for given, workers in shares.items():
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert worker_count() == workers, given
    monkeypatch.setattr(_machine, "core_quota", lambda: 1.5)
    assert worker_count() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert worker_count() == 1
    shape = (2_000_000, 32)
    assert nnxp.Engine(NET, "cpu").plan(shape).workers == 1
    assert nnxp.Engine(NET, "cpu", workers=5).plan(shape).workers == 5
    monkeypatch.setenv("NNXP_WORKERS", "3")
    assert nnxp.Engine(NET, "cpu").plan(shape).workers == 3


def test_joblib_s_workers_have_the_share_that_joblib_gives_them():
    pytest.importorskip("joblib", reason="joblib comes with scikit-learn")
    code = (
        START
        + """
import joblib
def workers(net):
    return nnxp.Engine(net, "cpu").plan((2_000_000, 32)).workers
with joblib.parallel_config("loky", inner_max_num_threads=1):
    print(joblib.Parallel(n_jobs=2)(joblib.delayed(workers)(net) for _ in range(2)))
"""
    )
    assert "[1, 1]" in run(code)


NOT_LINUX = (
    """
import os
for name in ("sysconf sysconf_names fork register_at_fork sched_getaffinity sched_setaffinity "
             "process_cpu_count").split():
    if hasattr(os, name):
        delattr(os, name)
import nnxp.backend._machine
nnxp.backend._machine.PROC = nnxp.backend._machine.CGROUPS = "/not/here"

def replace(source, target, rename=os.replace):
    maps = open("/proc/self/maps").read()
    for path in (source, target):
        if os.path.realpath(path) in maps:
            raise PermissionError(13, "mapped", str(path))
    rename(source, target)

os.replace = os.rename = replace
"""
    + START
    + """
memory = nnxp.get_backend("cpu").memory()
assert (memory.free, memory.total) == (0, 0), memory
check()
os.chdir(sys.argv[1])
nnxp.save(net, "net.safetensors")
nnxp.save(nnxp.load("net.safetensors"), "net.safetensors")
np.save("x.npy", x)
from nnxp.cli import main
for command in ("predict net.safetensors x.npy -o y.npy", "predict net.safetensors x.npy -o y.npy",
                "doctor --backend numpy"):
    sys.argv = ["nnxp", *command.split()]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
assert np.allclose(np.load("y.npy"), expected, atol=1e-5)
"""
)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="asks Linux for what is mapped")
def test_another_system_tells_less_and_renames_no_mapped_file(tmp_path):
    assert "right" in run(NOT_LINUX, str(tmp_path))


def test_windows_is_asked_for_its_memory(monkeypatch):
    import ctypes

    def fill(reference):
        status = reference._obj
        assert status.dwLength == ctypes.sizeof(status) == 64
        status.ullTotalPhys, status.ullAvailPhys = 16 << 30, 5 << 30
        return 1

    kernel32 = SimpleNamespace(GlobalMemoryStatusEx=fill)
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel32), raising=False)
    monkeypatch.setattr(_machine, "PROC", "/not/here")
    monkeypatch.delattr(os, "sysconf", raising=False)
    assert _machine.physical_memory() == 16 << 30
    assert _machine.available_memory() == 5 << 30


def test_a_late_interrupt_leaves_behind_a_worker_that_does_not_end(monkeypatch):
    class Interrupted(BaseException):
        pass

    def heard(number, frame):
        raise Interrupted

    stuck, go_on = threading.Event(), threading.Event()

    class Sticks(Pauses):
        """Is stuck, in all threads but the caller's."""

        def __call__(self, x):
            assert x.flags.c_contiguous
            if threading.current_thread() is not threading.main_thread():
                stuck.set()
                assert go_on.wait(20)
            elif stuck.wait(20):
                signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
            return x

    before, threads = bare(), at_work()
    monkeypatch.setattr(_threads, "PATIENCE", 0.2)
    old = signal.signal(signal.SIGALRM, heard)
    try:
        with pytest.raises(Interrupted):
            nnxp.predict(Sticks(), draw((200_000, 32)), "cpu", workers=2)
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert signal.getsignal(signal.SIGALRM) is heard
        assert at_work() == threads + 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
        go_on.set()
    until = time.monotonic() + 20
    while at_work() != threads and time.monotonic() < until:
        time.sleep(0.01)
    assert at_work() == threads
    assert bare() == before  # the last one to leave has seen to it


def test_a_handler_that_raises_nothing_ends_no_sweep():
    heard, started = [], threading.Event()

    class Starts(Pauses):
        """Sets a timer when it is called first."""

        def __call__(self, x):
            if not started.is_set():
                started.set()
                signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
            return x

    old = signal.signal(signal.SIGALRM, lambda *event: heard.append(event))
    try:
        x = draw((500_000, 32))
        np.testing.assert_array_equal(nnxp.predict(Starts(), x, "cpu", workers=3), x)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert heard


def test_an_interrupt_that_had_to_wait_keeps_nothing_of_the_work_alive():
    """Not even until the next collection: what gave its rows has a file open, or processes."""
    kept = []

    def interrupted():
        rows = np.zeros(1)
        kept.append(weakref.ref(rows))
        with _threads.Interrupts():
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.disable()
    try:
        try:
            interrupted()
        except KeyboardInterrupt:
            kept.append("interrupted")
        assert kept[1:] == ["interrupted"]
        assert kept[0]() is None
    finally:
        gc.enable()
        signal.signal(signal.SIGINT, before)


def test_interrupts_leave_no_worker_no_limit_and_no_handler_behind():
    """Ctrl-C at any moment, thousands of times. NNXP_STRESS_SECONDS=600 for a long run."""
    seconds = os.environ.get("NNXP_STRESS_SECONDS", "6")
    counts = json.loads(run(Path(__file__).parent / "interrupts.py", seconds))
    print(counts)
    assert min(counts[name] for name in ("sweeps", "raised", "interrupted")) > 50
    assert counts["handlers left"] == 0
    assert set(counts["wrong"].values()) == {0}
