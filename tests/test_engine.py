"""Rows in, rows out: sources, sinks, types, budgets, and what is left as it was found."""

from __future__ import annotations

import gc
import io
import pickle
import signal
import sys
import threading
import time
import tracemalloc
import types
import weakref

import numpy as np
import pytest
from threadpoolctl import threadpool_info

import nnxp
from conftest import at_work, draw, every_backend
from nnxp.testing import assert_parity

RNG = np.random.default_rng(0)
NET = nnxp.Sequential(
    nnxp.Dense(20, 32, "relu", rng=RNG), nnxp.LayerNorm(32), nnxp.Dense(32, 5, "softmax", rng=RNG)
)
X = draw((5000, 20))


def close(actual, expected):
    """Equal but for the order of summation; parity proper is judged elsewhere."""
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@every_backend
@pytest.mark.parametrize("rows", [0, 1, 2, 255, 256, 257, 4999])
def test_any_number_of_rows(backend, rows):
    y = nnxp.predict(NET, X[:rows], backend)
    assert y.shape == (rows, 5)
    assert y.dtype == np.float32
    close(y, NET(X[:rows]))


@every_backend
@pytest.mark.parametrize("dtype", ["uint8", "bool", "int64", "float16", "float64", ">f4"])
def test_rows_of_any_numeric_type_are_converted(backend, dtype):
    x = (X[:300] * 3 + 5).clip(0, 200).astype(dtype)
    close(nnxp.predict(NET, x, backend), NET(x.astype("float32")))


def test_bfloat16_rows_are_converted():
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="bfloat16 is optional")
    x = X[:100].astype(ml_dtypes.bfloat16)
    close(nnxp.predict(NET, x, "cpu"), NET(x.astype("float32")))


@pytest.mark.parametrize(
    "x", [np.array([["a"] * 20]), np.array([[None] * 20]), np.ones((2, 20), complex)]
)
def test_objects_strings_and_complex_numbers_are_refused(x):
    with pytest.raises(nnxp.DtypeMismatch, match="real numbers"):
        nnxp.predict(NET, x)


class Rows:
    """The least that an engine needs: a shape, and slices that become arrays."""

    def __init__(self, x):
        self.shape, self._x, self.asked = x.shape, x, []

    def __getitem__(self, rows):
        self.asked.append(rows)
        return self._x[rows].tolist()


@every_backend
def test_anything_with_a_shape_and_slices_is_a_source(backend):
    rows = Rows(X)
    close(nnxp.predict(NET, rows, backend), NET(X))
    assert sum(each.stop - each.start for each in rows.asked) == len(X)


def test_lists_are_rows():
    close(nnxp.predict(NET, X[:3].tolist()), NET(X[:3]))


@every_backend
def test_results_go_into_out_which_may_be_a_memory_map(backend, tmp_path):
    out = np.lib.format.open_memmap(tmp_path / "y.npy", "w+", "float32", (len(X), 5))
    assert nnxp.Engine(NET, backend)(X, out) is out
    close(out, NET(X))
    wide = np.full((len(X), 9), np.nan)
    nnxp.predict(NET, X, backend, out=wide[:, 2:7])  # strided, float64
    close(wide[:, 2:7], NET(X))
    assert np.isnan(wide[:, :2]).all()


def test_results_go_into_memory_that_begins_anywhere():
    class Sums(nnxp.Layer):
        def __call__(self, x):
            return x.sum(axis=1)

    x, memory = draw((200, 4)), np.empty(801, "uint8")
    out = memory[1:].view("float32")
    for _ in range(2):
        nnxp.Engine(Sums(), "cpu")(x, out=out)
        np.testing.assert_allclose(out, x.sum(axis=1), 1e-6, 1e-6)


def test_out_must_fit():
    engine = nnxp.Engine(NET, "cpu")
    with pytest.raises(nnxp.ShapeError, match=r"out is \(3, 5\) but the output is \(2, 5\)"):
        engine(X[:2], np.empty((3, 5), "float32"))
    with pytest.raises(nnxp.DtypeMismatch, match="out is int64"):
        engine(X[:2], np.empty((2, 5), "int64"))
    with pytest.raises(nnxp.OptionError, match="out is a NumPy array"):
        engine(X[:2], [[0.0] * 5] * 2)
    frozen = np.empty((2, 5), "float32")
    frozen.flags.writeable = False
    with pytest.raises(nnxp.OptionError, match="read-only"):
        engine(X[:2], frozen)


def test_wrong_shapes_fail_before_any_work():
    rows = Rows(X[:, :7])
    with pytest.raises(nnxp.ShapeError, match=r"layers\.0 Dense\(20, 32, relu\) takes"):
        nnxp.predict(NET, rows)
    assert rows.asked == []
    with pytest.raises(nnxp.ShapeError, match=r"x\[None\]"):
        nnxp.predict(NET, X[0])
    with pytest.raises(nnxp.ShapeError, match="no axis"):
        nnxp.predict(NET, 3.0)


def test_rows_on_a_device_are_refused_by_the_engine():
    with pytest.raises(nnxp.DeviceMismatch, match="host memory"):
        nnxp.predict(NET, nnxp.to_backend(X[:3], "sim"))


@every_backend
def test_nan_and_infinity_stay_in_their_rows(backend):
    x = X[:1000].copy()
    x[3, 4], x[500, 0] = np.nan, np.inf
    with np.errstate(invalid="ignore"):
        y = nnxp.predict(NET, x, backend)
    assert np.isnan(y[[3, 500]]).all()
    others = np.delete(np.arange(1000), [3, 500])
    close(y[others], NET(X[:1000])[others])


@pytest.mark.parametrize("model", [1, None, lambda x: x])
def test_an_engine_takes_models(model):
    with pytest.raises(nnxp.OptionError, match="made of nnxp layers"):
        nnxp.Engine(model)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("workers", 0),
        ("workers", "two"),
        ("memory_limit", 0),
        ("memory_limit", -5),
        ("memory_limit", "lots"),
        ("memory_limit", 1.5),
        ("precision", "bf16"),
    ],
)
def test_options_that_mean_nothing_are_refused(option, value):
    with pytest.raises(nnxp.OptionError, match=str(value)):
        nnxp.Engine(NET, "cpu", **{option: value})


def test_sizes_are_read_as_people_write_them():
    from nnxp.engine import parse_bytes

    said = {"256 MiB": 2**28, "2GB": 2 * 10**9, "1k": 1000, "1.5 KiB": 1536, "77": 77, 5: 5}
    assert {size: parse_bytes(size) for size in said} == said


def test_a_bad_number_of_workers_in_the_environment_is_named(monkeypatch):
    monkeypatch.setenv("NNXP_WORKERS", "many")
    with pytest.raises(nnxp.BackendUnavailable, match="NNXP_WORKERS='many'"):
        nnxp.predict(NET, X, "cpu")


@pytest.mark.parametrize("workers", [1, 2, 3, 16])
def test_results_do_not_depend_on_the_number_of_workers(workers):
    x = np.tile(X, (8, 1))
    assert nnxp.Engine(NET, "cpu", workers=workers).plan(x.shape).workers == min(workers, 5)
    one = nnxp.predict(NET, x, "cpu", workers=1)
    np.testing.assert_array_equal(nnxp.predict(NET, x, "cpu", workers=workers), one)


@pytest.mark.parametrize("limit", ["20 KiB", "300 KiB", "1 GiB"])
@every_backend
def test_a_memory_limit_changes_the_blocks_and_not_the_result(backend, limit):
    close(nnxp.predict(NET, X, backend, memory_limit=limit), NET(X))


def test_the_working_set_on_the_cpu_stays_within_the_limit():
    net = nnxp.Sequential(nnxp.Dense(64, 2048, "tanh", rng=0), nnxp.Dense(2048, 4, rng=1))
    x, limit = draw((20000, 64)), 8 << 20
    out = np.empty((20000, 4), "float32")
    engine = nnxp.Engine(net, "cpu", memory_limit=limit, workers=2)
    tracemalloc.start()
    engine(x, out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < limit + (1 << 20)  # a megabyte for Python itself
    assert peak > limit // 8  # the limit is what bounded it: it was used


@every_backend
def test_a_limit_below_one_row_says_what_a_row_needs(backend):
    with pytest.raises(nnxp.OutOfMemory, match="does not hold one row"):
        nnxp.predict(NET, X, backend, memory_limit=8)


def test_the_device_sees_one_copy_in_and_one_out_for_each_block(sim):
    engine = nnxp.Engine(NET, "sim", memory_limit="300 KiB")
    sim.reset()
    rows = Rows(X)
    engine(rows)
    blocks = len(rows.asked)
    assert blocks > 5
    assert sim.count == nnxp.sim.Count(put=blocks, get=blocks, synchronize=blocks)


def test_blocks_are_planned_by_what_is_free_when_they_are(sim):
    engine = nnxp.Engine(NET, "sim")
    sim.limit = sim.used + 400_000
    rows = Rows(X)
    close(engine(rows), NET(X))
    assert len(rows.asked) > 1
    sim.limit = None
    again = Rows(X)
    engine(again)
    assert len(again.asked) < len(rows.asked)


def test_a_device_that_is_fuller_than_planned_is_recovered_from(sim):
    class Greedy(nnxp.Layer):
        """Takes forty times what its shapes say, for it looks at numbers and nobody sees inside."""

        def __call__(self, x):
            waste = [x + i for i in range(40)]
            return waste[0] if bool((x[:1] == x[:1]).all()) else x

        @classmethod
        def examples(cls):
            yield cls(), (2, 2)

    x = draw((3000, 16))
    sim.limit = sim.used + 2_000_000
    rows = Rows(x)
    engine = nnxp.Engine(Greedy(), "sim")
    np.testing.assert_array_equal(engine(rows), x.astype("float32"))
    failed = len(rows.asked) - len({each.start for each in rows.asked})
    assert 0 < failed < 8  # halved, not nibbled at
    again = Rows(x)
    engine(again)
    assert len(again.asked) == len({each.start for each in again.asked})  # the ceiling was kept
    assert sim.used < 500_000


def test_a_device_without_room_for_one_row_is_a_clear_error(sim):
    engine = nnxp.Engine(NET, "sim")
    sim.limit = sim.used + 50
    with pytest.raises(nnxp.OutOfMemory, match="no memory for even one row"):
        engine(X)
    sim.limit = None
    close(engine(X[:10]), NET(X[:10]))


def blas_threads():
    return [each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"]


def test_blas_threads_are_as_they_were_found():
    before = blas_threads()
    nnxp.predict(NET, X, "cpu")
    assert blas_threads() == before


def test_blas_has_one_thread_for_each_worker_while_tiles_are_at_work():
    seen = []

    class Looks(nnxp.Layer):
        """Notes how many threads BLAS may use while a tile is at work."""

        def __call__(self, x):
            if float(x[0, 0]) == 0:
                seen.extend(blas_threads())
            return x

        @classmethod
        def examples(cls):
            yield cls(), (2, 2)

    nnxp.predict(Looks(), np.zeros((50_000, 64), "float32"), "cpu", workers=2)
    assert len(seen) > 4
    assert set(seen) == {1}


class Answers(nnxp.Layer):
    """Answers with what it was told; run as Python if it looks at its numbers first."""

    answer: object
    looks: bool = False

    def __call__(self, x):
        if self.looks:
            float(x.sum())
        return self.answer(x)

    @classmethod
    def examples(cls):
        yield cls(lambda x: x), (2, 2)


@every_backend
@pytest.mark.parametrize(
    "answer",
    [
        lambda x: x.sum(axis=1, keepdims=True),
        lambda x: x.mean(axis=0, keepdims=True),
        lambda x: x[:1],
        lambda x: x[:, :1],
    ],
)
def test_a_layer_run_as_python_that_answers_in_another_shape_is_refused_at_every_call(
    answer, backend
):
    engine = nnxp.Engine(Answers(answer, looks=True), backend)
    for _ in range(2):
        with pytest.raises(nnxp.ShapeError, match="where its output_shape says"):
            engine(X[:50])


@every_backend
def test_shapes_are_read_off_the_formula(backend):
    np.testing.assert_array_equal(
        nnxp.predict(Answers(lambda x: x[:, :1]), X[:50], backend), X[:50, :1]
    )
    close(
        nnxp.predict(Answers(lambda x: x.sum(axis=1, keepdims=True)), X[:50], backend),
        X[:50].sum(axis=1, keepdims=True),
    )


@every_backend
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda x: x.mean(axis=0, keepdims=True), "mixes rows: mean along the rows"),
        (lambda x: x - x.max(axis=0), "mixes rows: max along the rows"),
        (lambda x: x[:1], "mixes rows: getitem along the rows"),
        (lambda x: x.T, "not a row for a row"),
        (lambda x: x.reshape(20, -1).T, "mixes rows: reshape|not a row for a row"),
        (lambda x: (x.T.reshape(-1) + x.reshape(-1)).reshape(-1, 20), "mixes rows: add"),
        (lambda x: x.T.reshape(-1, 20), "mixes rows: reshape"),
        (lambda x: x @ x.T @ x, "mixes rows: matmul along the rows"),
        (lambda x: x + np.arange(len(x))[:, None], "mixes rows|computes with the number of rows"),
        (lambda x: x / len(x), "computes with the number of rows"),
        (lambda x: x[::-1], "mixes rows"),
    ],
)
def test_a_formula_that_mixes_rows_is_refused_with_the_reason(answer, words, backend):
    engine = nnxp.Engine(Answers(answer), backend)
    for _ in range(2):
        with pytest.raises(nnxp.ShapeError, match=words):
            engine(X[:50])


def test_a_source_that_gives_other_rows_than_it_was_asked_for_is_refused():
    class Short(Rows):
        def __getitem__(self, rows):
            return self._x[rows][:1]

    for backend in ("cpu", "sim"):
        with pytest.raises(nnxp.ShapeError, match="x gave 1 rows"):
            nnxp.predict(NET, Short(X), backend)


def test_out_may_be_x_itself_but_may_not_overlap_it_otherwise():
    net = nnxp.Sequential(nnxp.Dense(8, 8, rng=0))
    buffer = draw((50_001, 8))
    expected = net(buffer[:-1].copy())
    for out in (buffer[1:], buffer[:-1][::-1]):
        with pytest.raises(nnxp.OptionError, match="overlaps"):
            nnxp.predict(net, buffer[:-1], "cpu", out=out)
    close(nnxp.predict(net, buffer[:-1], "cpu", out=buffer[:-1]), expected)


@every_backend
@pytest.mark.parametrize("looks", [False, True])
def test_an_answer_is_never_the_caller_s_nor_the_model_s_own_array(looks, backend):
    where = nnxp.get_backend(backend)
    table = where.put(np.ones((3, 4), "float32"))
    x = np.zeros((3, 4), "float32")
    engine = nnxp.Engine(Answers(lambda x: x[:, ::-1], looks), backend)
    for rows in (x, where.put(x)) * 3:
        y = engine(rows)
        y[...] = 9
    assert not x.any()
    assert not nnxp.asnumpy(rows).any()
    if looks:
        engine = nnxp.Engine(Answers(lambda x: table, looks), backend)
        for rows in (x, where.put(x)) * 3:
            y = engine(rows)
            y[...] = 9
        assert (nnxp.asnumpy(table) == 1).all()


@every_backend
def test_what_an_engine_holds_goes_with_it_without_the_cycle_collector(backend):
    gc.collect()
    gc.disable()
    try:
        net = nnxp.Sequential(nnxp.Dense(20, 8, "gelu", rng=0), Answers(lambda x: x, looks=True))
        engine = nnxp.Engine(net, backend)
        held = [weakref.ref(value) for value in engine.model.parameters().values()]
        for rows in (5, 5, 5, 3000):
            engine(X[:rows])
        del net, engine
        assert not any(each() is not None for each in held)
    finally:
        gc.enable()


@pytest.mark.parametrize("rows", ["float32", "float64", "uint8"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("name", ["relu", "gelu", "mish", "softplus", "softmax"])
def test_what_a_limit_allows_is_not_exceeded_on_the_device(name, dtype, rows, sim):
    net = nnxp.Sequential(
        nnxp.Dense(64, 256, name, rng=0), nnxp.Residual(nnxp.Dense(256, 256, rng=1))
    ).astype(dtype)
    engine = nnxp.Engine(net, "sim", memory_limit=3 << 20)
    x = (X[:, :1] + np.arange(64)).astype(rows)
    sim.reset()
    before = sim.used
    engine(x)
    assert sim.peak - before <= 3 << 20
    assert sim.peak - before > (3 << 20) // 8  # the limit is what bounded it: it was used


class Fails(nnxp.Layer):
    """Raises for a row that holds the number it was told to fear."""

    feared: float = 1e9

    def __call__(self, x):
        if (x == self.feared).any():
            raise ArithmeticError("the feared number")
        return x

    @classmethod
    def examples(cls):
        yield cls(), (2, 2)


def test_an_error_in_a_worker_reaches_the_caller_names_the_layer_and_leaves_no_trace():
    net = nnxp.Sequential(nnxp.Dropout(0.1), nnxp.Residual(Fails()))
    x = np.ones((20000, 3), "float32")
    x[15000, 1] = 1e9
    before, threads = blas_threads(), at_work()
    with pytest.raises(ArithmeticError, match="feared") as caught:
        nnxp.predict(net, x, "cpu", workers=3)
    assert any("layers.1.inner" in note for note in caught.value.__notes__)
    assert blas_threads() == before
    assert at_work() == threads
    nnxp.predict(net, x[:15000], "cpu", workers=3)


def test_an_interrupt_ends_the_sweep_and_leaves_no_trace():
    class Interrupted(Rows):
        def __getitem__(self, rows):
            if rows.start and threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt
            return super().__getitem__(rows)

    before, threads = blas_threads(), at_work()
    with pytest.raises(KeyboardInterrupt):
        nnxp.predict(NET, Interrupted(draw((60000, 20))), "cpu", workers=2)
    assert blas_threads() == before
    assert at_work() == threads


def test_engines_in_many_threads_give_right_rows_and_restore_blas():
    before, expected, wrong = blas_threads(), NET(X), []

    def work(seed):
        engine = nnxp.Engine(NET, "cpu", workers=2)
        answers = [engine(X) for _ in range(10)]
        wrong.extend(seed for y in answers if not np.allclose(y, expected, rtol=1e-5, atol=1e-6))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert blas_threads() == before


def test_engines_nest():
    class Inner(nnxp.Layer):
        """Runs an engine of its own for every tile."""

        def __call__(self, x):
            return nnxp.predict(NET, x, "cpu")

        def output_shape(self, shape):
            return NET.output_shape(shape)

        @classmethod
        def examples(cls):
            yield cls(), (2, 20)

    before = blas_threads()
    close(nnxp.predict(Inner(), X, "cpu"), NET(X))
    assert blas_threads() == before


def test_predict_iter_reads_one_batch_ahead_and_no_more():
    asked = []

    def batches():
        for i in range(3):
            asked.append(i)
            yield X[i * 10 : i * 10 + 10]

    answers = nnxp.predict_iter(NET, batches(), "cpu")
    assert asked == []
    close(next(answers), NET(X[:10]))
    close(next(answers), NET(X[10:20]))
    assert asked[:2] == [0, 1]
    assert len(asked) <= 3
    assert len(list(answers)) == 1
    assert asked == [0, 1, 2]


def test_batches_are_read_in_the_caller_s_thread_and_computed_in_another():
    read, computed = [], []

    class Looks(nnxp.Layer):
        """Notes the thread that it runs in."""

        def __call__(self, x):
            computed.append((threading.get_ident(), np.geterr()["over"]))
            return x

        @classmethod
        def examples(cls):
            yield cls(), (2, 2)

    def batches():
        for i in range(5):
            read.append(threading.get_ident())
            yield X[i * 10 : i * 10 + 10]

    with np.errstate(over="raise"):
        answers = list(nnxp.predict_iter(Looks(), batches(), "cpu"))
    np.testing.assert_array_equal(np.concatenate(answers), X[:50])
    assert set(read) == {threading.get_ident()}
    assert len(set(computed)) == 1
    assert computed[0][0] != threading.get_ident()
    assert computed[0][1] == "raise"


def test_one_batch_is_computed_while_the_next_is_read():
    at_work, read = threading.Event(), threading.Event()

    class Waits(nnxp.Layer):
        """Waits for the next batch."""

        def __call__(self, x):
            at_work.set()
            assert read.wait(20)
            return x

        def output_shape(self, shape):
            return shape

        @classmethod
        def examples(cls):
            yield cls(), (2, 2)

    def batches():
        yield X[:10]
        assert at_work.wait(20)
        read.set()
        yield X[10:20]

    assert len(list(nnxp.predict_iter(Waits(), batches(), "cpu"))) == 2


def test_an_error_in_the_batches_comes_in_its_turn_and_the_thread_ends():
    def batches():
        yield X[:10]
        raise OSError("the disk is gone")

    threads = at_work()
    answers = nnxp.predict_iter(NET, batches(), "cpu")
    close(next(answers), NET(X[:10]))
    with pytest.raises(OSError, match="the disk is gone"):
        next(answers)
    assert at_work() == threads
    abandoned = nnxp.predict_iter(NET, iter([X[:10]] * 5), "cpu")
    next(abandoned)
    abandoned.close()
    assert at_work() == threads
    wrong = nnxp.predict_iter(NET, [X[:10], X[:10, :3]], "cpu")
    next(wrong)
    with pytest.raises(nnxp.ShapeError):
        next(wrong)
    assert at_work() == threads


def test_whoever_waits_for_a_batch_that_never_comes_can_be_interrupted():
    class Interrupted(BaseException):
        pass

    def heard(number, frame):
        raise Interrupted

    def batches():
        yield X[:10]
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        threading.Event().wait(20)

    threads = at_work()
    before = signal.signal(signal.SIGALRM, heard)
    try:
        start = time.monotonic()
        with pytest.raises(Interrupted):
            next(nnxp.predict_iter(NET, batches(), "cpu"))
        assert time.monotonic() - start < 5
        assert signal.getsignal(signal.SIGALRM) is heard
    finally:
        signal.signal(signal.SIGALRM, before)
    assert at_work() == threads


def test_batches_are_read_in_the_caller_s_context():
    seen = []

    def batches():
        seen.append(nnxp.get_backend().device)
        yield X[:10]

    with nnxp.use_backend("sim"):
        list(nnxp.predict_iter(NET, batches(), "cpu"))
    assert seen == ["sim:0"]


def test_predict_iter_refuses_bad_options_at_once():
    with pytest.raises(nnxp.OptionError):
        nnxp.predict_iter(NET, [], "cpu", workers=0)


@every_backend
def test_engines_pickle(backend):
    engine = pickle.loads(pickle.dumps(nnxp.Engine(NET, backend, memory_limit="1 MiB", workers=2)))
    assert engine.backend == nnxp.get_backend(backend)
    assert (engine.memory_limit, engine.workers) == (1 << 20, 2)
    close(engine(X), NET(X))


def test_an_engine_that_comes_often_is_one_engine_until_it_is_closed():
    def come(model=NET, **options):
        return pickle.loads(pickle.dumps(nnxp.Engine(model, "cpu", **options)))

    first = come()
    assert come() is first
    assert come(NET.map_arrays(lambda name, value: value.copy())) is first
    for other in (
        come(workers=1), come(NET.astype("float64")),
        come(NET.map_arrays(lambda name, value: value * np.float32(1.001))),
    ):  # fmt: skip
        assert other is not first
    assert come() is first  # the last four are kept
    first.close()
    again = come()
    assert again is not first
    close(again(X), NET(X))


def test_an_engine_of_a_class_that_was_defined_anew_is_another(monkeypatch):
    def defined(factor):
        class Times(nnxp.Layer):
            def __call__(self, x):
                return x * factor

            @classmethod
            def examples(cls):
                yield cls(), (2, 2)

        Times.__qualname__ = "Times"  # found in this module, as one of a notebook's would be
        monkeypatch.setitem(globals(), "Times", Times)
        return Times

    for factor in (2, 3):
        engine = pickle.loads(pickle.dumps(nnxp.Engine(defined(factor)(), "cpu")))
        assert (engine(X) == factor * X).all()


def test_a_plan_says_what_would_be_used():
    plan = nnxp.Engine(NET, "cpu", workers=3).plan((100_000, 20))
    assert plan.workers == 3
    assert plan.working_set >= plan.rows * 3 * (20 + 32) * 4
    limited = nnxp.Engine(NET, "cpu", workers=3, memory_limit=plan.working_set // 4)
    assert limited.plan((100_000, 20)).working_set <= plan.working_set // 4
    with pytest.raises(nnxp.ShapeError):
        limited.plan((10, 21))


def test_a_few_rows_of_a_known_kind_give_the_same_bits_and_arrays_of_their_own():
    engine = nnxp.Engine(NET, "cpu")
    for rows in (1, 2, 100):
        first, again = engine(X[:rows]), engine(X[:rows])
        np.testing.assert_array_equal(first, again)
        assert again.base is None
    same = nnxp.Engine(nnxp.Dropout(0.5), "cpu")
    x = X[:2].copy()
    same(x)
    y = same(x)
    y[:] = 0
    np.testing.assert_array_equal(x, X[:2])
    with pytest.raises(nnxp.ShapeError):
        engine(X[0])
    with pytest.raises(nnxp.ShapeError):
        engine(X[:2, :5])


def test_the_parameters_move_once(sim):
    engine = nnxp.Engine(NET, "sim")
    sim.reset()
    for _ in range(3):
        engine(X[:10])
    assert sim.count.put == 3


def test_a_deep_network_agrees_layer_by_layer():
    rng = np.random.default_rng(1)
    net = nnxp.Sequential(
        *(nnxp.Residual(nnxp.LayerNorm(24), nnxp.Dense(24, 24, "gelu", rng=rng)) for _ in range(12))
    )
    report = assert_parity(net, draw((700, 24)))
    assert report.largest < 3


def test_progress_may_be_a_function_of_the_rows_done_and_in_all():
    heard = []
    nnxp.predict(NET, X, "cpu", workers=3, progress=lambda done, rows: heard.append((done, rows)))
    nnxp.predict(NET, X[:10], "sim", progress=lambda done, rows: heard.append((done, rows)))
    assert heard[-1] == (10, 10)
    assert heard[-2] == (5000, 5000)
    assert sorted(heard[:-1]) == heard[:-1]

    class Enough(Exception):
        pass

    def enough(done, rows):
        raise Enough

    with pytest.raises(Enough):
        nnxp.predict(NET, X, "cpu", workers=3, progress=enough)


def closed():
    file = io.StringIO()
    file.close()
    return file


class Full:
    """A terminal that takes so much and no more."""

    encoding = "utf-8"

    def __init__(self, writes):
        self.writes = writes

    def isatty(self):
        return True

    def write(self, text):
        self.writes -= 1
        if self.writes < 0:
            raise OSError(28, "No space left on device")

    def flush(self):
        self.write("")


@pytest.mark.parametrize("stderr", [None, object(), closed(), Full(0), Full(2), Full(3)])
def test_a_bar_that_cannot_be_drawn_ends_no_work(monkeypatch, stderr):
    monkeypatch.setattr(sys, "stderr", stderr)
    close(nnxp.predict(NET, X, "cpu", progress=True), NET(X))


def test_a_notebook_shows_a_bar(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    threads = at_work()
    nnxp.predict(NET, X, "cpu", progress=True)
    assert "5.00k/5.00k" in capfd.readouterr().err
    assert at_work() == threads


def test_progress_is_silent_away_from_a_terminal(capfd):
    nnxp.predict(NET, X, "cpu", progress=True)
    assert capfd.readouterr() == ("", "")


def test_progress_on_a_terminal_reaches_the_end(monkeypatch, capfd):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    nnxp.predict(NET, X, "cpu", progress=True)
    said = capfd.readouterr().err
    assert "100%" in said
