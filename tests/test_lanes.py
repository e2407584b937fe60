"""Devices: lanes, buffers that are used again, several devices, rows that are there already."""

from __future__ import annotations

import gc
import sys
import threading
import types
from contextlib import nullcontext

import numpy as np
import pytest

import nnxp
from conftest import draw
from nnxp import sim
from nnxp.backend import _lanes
from nnxp.backend._device import Unrecordable
from nnxp.backend.cuda import CudaBackend
from nnxp.program.rewrite import with_products

RNG = np.random.default_rng(0)
NET = nnxp.Sequential(
    nnxp.Dense(20, 32, "relu", rng=RNG), nnxp.LayerNorm(32), nnxp.Dense(32, 5, "softmax", rng=RNG)
)
X = draw((9000, 20))
EXPECTED = NET(X)
SMALL = "300 KiB"  # makes many blocks of it


def only(things):
    """The only value of a dict."""
    (thing,) = things.values()
    return thing


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def devices():
    gc.collect()
    both = [sim.Device(i) for i in range(2)]
    for each in both:
        each.reset()
    yield both
    for each in both:
        each.reset()


class Noted(nnxp.Layer):
    """Tells what it sees of each block; it looks at how x lies, and so is run as Python."""

    tell: object

    def __call__(self, x):
        if x.flags.c_contiguous is not None:
            self.tell(x)
        return x

    @classmethod
    def examples(cls):
        yield cls(lambda x: None), (2, 2)


# lanes


@pytest.mark.parametrize("limit", [SMALL, None])
def test_buffers_are_not_touched_while_a_copy_may_use_them(devices, limit):
    devices[0].lazy = True
    engine = nnxp.Engine(NET, "sim", memory_limit=limit)
    for _ in range(2):  # the second time with the buffers of the first
        close(engine(X), EXPECTED)


def test_three_blocks_are_under_way_at_once(devices):
    devices[0].lazy = True
    waiting = []
    net = nnxp.Sequential(Noted(lambda x: waiting.append(len(devices[0]._under_way))), NET)
    nnxp.predict(net, X, "sim", memory_limit="600 KiB")
    assert max(waiting) == 5  # in and out of two blocks, and in of the third


def test_what_a_failed_attempt_was_given_is_waited_for(devices):
    """Its rows may still be read when the buffer is filled for the next attempt."""
    devices[0].lazy = True
    engine = nnxp.Engine(nnxp.Sequential(Noted(lambda x: [x + i for i in range(60)]), NET), "sim")
    devices[0].limit = devices[0].used + 2_000_000
    close(engine(X), EXPECTED)
    assert only(engine._replicas[0]._prepared).most_rows is not None


def test_an_error_in_one_block_leaves_nothing_under_way_and_lanes_that_work(devices):
    devices[0].lazy = True
    left = []

    def tell(x):
        if left and not left.pop():
            raise ArithmeticError("on purpose")

    engine = nnxp.Engine(nnxp.Sequential(Noted(tell), NET), "sim", memory_limit="600 KiB")
    for fails in (False, True, False):
        out = np.zeros_like(EXPECTED)
        if fails:
            left += [False, True, True, True, True, True]
            with pytest.raises(ArithmeticError):
                engine(X, out)
            assert not devices[0]._under_way
            delivered = out.copy()
        else:
            close(engine(X, out), EXPECTED)
    np.testing.assert_array_equal(delivered[-1000:], 0)


def test_memory_that_was_set_aside_is_given_back(devices, monkeypatch):
    released = []

    class Pool:
        def use(self):
            return nullcontext()

        def release(self):
            released.append(self)

        def unused(self):
            return 0

    monkeypatch.setattr(type(nnxp.get_backend("sim")), "pool", lambda self: Pool())
    engine = nnxp.Engine(nnxp.Sequential(Noted(lambda x: [x + i for i in range(60)]), NET), "sim")
    engine(X)
    assert not released
    devices[0].limit = devices[0].used + 2_000_000
    planned = engine.plan(X.shape).rows
    engine(X)
    halvings = (planned // only(engine._replicas[0]._prepared).most_rows).bit_length() - 1
    assert halvings
    assert len(released) == 1 + halvings  # once the same again, and then each half
    del engine
    gc.collect()
    assert len(released) == 2 + halvings


def test_an_engine_that_is_closed_during_a_sweep_gives_back_what_the_sweep_used(
    devices, monkeypatch
):
    released = []
    pool = types.SimpleNamespace(
        use=nullcontext, release=lambda: released.append(1), unused=lambda: 0
    )
    monkeypatch.setattr(type(nnxp.get_backend("sim")), "pool", lambda self: pool)
    engine = nnxp.Engine(nnxp.Sequential(Noted(lambda x: engine.close()), NET), "sim")
    close(engine(X), EXPECTED)
    assert released == [1]


def test_engines_are_called_by_several_threads_at_once(devices):
    devices[0].lazy = True
    engine, wrong = nnxp.Engine(NET, "sim", memory_limit=SMALL), []

    def work(i):
        for rows in (1, 3000 + i, 1, 7):
            y, expected = engine(X[i : i + rows]), EXPECTED[i : i + rows]
            wrong.extend([] if np.allclose(y, expected, rtol=1e-5, atol=1e-6) else [(i, rows)])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not wrong


@pytest.mark.parametrize(
    ("rows", "travel"),
    [("uint8", "uint8"), ("float16", "float16"), ("float64", "float32"), (">f4", "float32")],
)
def test_rows_travel_in_their_own_type_unless_it_is_wider(devices, monkeypatch, rows, travel):
    seen, right = set(), sim.ndarray.set
    monkeypatch.setattr(sim.ndarray, "set", lambda x, host: (seen.add(x.dtype.str), right(x, host)))
    x = (X * 3 + 5).clip(0, 200).astype(rows)
    close(nnxp.predict(NET, x, "sim"), NET(x.astype("float32")))
    assert seen == {np.dtype(travel).str}


@pytest.mark.parametrize("shape", [(1, 3), (3, 2_000_000), (1_000_001, 7), (0, 4)])
def test_much_is_copied_by_several_threads_and_converted_on_the_way(shape):
    rows = np.arange(np.prod(shape), dtype="float64").reshape(shape)[:, ::-1]
    into = np.empty(shape, "float32")
    _lanes.copy(into, rows)
    np.testing.assert_array_equal(into, rows.astype("float32"))


def test_small_sweeps_take_one_lane_and_large_ones_three():
    engine = nnxp.Engine(NET, "sim")
    assert engine.plan((100, 20)).workers == 1
    assert engine.plan((10**6, 20)).workers == 3
    assert engine.plan((10**6, 20)).rows == 16384
    assert engine.plan((65536, 20)).rows < 65536 // 8  # enough blocks to overlap


def test_a_limit_is_for_all_lanes_together():
    for limit in (2**14, 2**17, 2**20, 2**26):
        plan = nnxp.Engine(NET, "sim", memory_limit=limit).plan((10**6, 20))
        assert limit // 2 < plan.working_set <= limit or plan.rows == 16384


# several devices


def test_two_devices_share_the_rows(devices):
    engine = nnxp.Engine(NET, ["sim:0", "sim:1"], memory_limit=SMALL)
    for each in devices:
        each.reset()
        each.lazy = True
    close(engine(X), EXPECTED)
    assert all(each.count.put > 3 and each.count.put == each.count.get for each in devices)
    assert repr(engine).endswith("on sim:0 and sim:1)")


def test_two_devices_give_the_bits_of_one_for_the_same_blocks(devices):
    two = nnxp.Engine(NET, ["sim:0", "sim:1"], memory_limit=SMALL)
    one = nnxp.Engine(NET, "sim:1", memory_limit=SMALL)
    x = np.tile(X, (3, 1))
    assert two.plan(x.shape).rows == one.plan(x.shape).rows
    np.testing.assert_array_equal(two(x), one(x))


def test_a_device_with_less_memory_does_its_part(devices):
    engine = nnxp.Engine(nnxp.Sequential(Noted(lambda x: [x + i for i in range(60)]), NET),
                         ["sim:0", "sim:1"])  # fmt: skip
    devices[1].limit = devices[1].used + 500_000
    devices[0].lazy = devices[1].lazy = True
    close(engine(X), EXPECTED)
    assert all(each.count.put for each in devices)
    assert only(engine._replicas[0]._prepared).most_rows is None
    assert only(engine._replicas[1]._prepared).most_rows is not None


def test_an_error_on_one_device_stops_the_other_and_reaches_the_caller(devices):
    def tell(x):
        if x.device.id == 1:
            raise ArithmeticError("on purpose")

    engine = nnxp.Engine(nnxp.Sequential(Noted(tell), NET), ["sim:0", "sim:1"], memory_limit=SMALL)
    threads = threading.active_count()
    with pytest.raises(ArithmeticError):
        engine(np.tile(X, (20, 1)))
    assert threading.active_count() == threads
    assert devices[0].count.put < 20 * 9000 * 20 * 4 // 300_000


def test_few_rows_go_to_one_device(devices):
    engine = nnxp.Engine(NET, ["sim:0", "sim:1"])
    devices[1].reset()
    close(engine(X[:3]), EXPECTED[:3])
    assert devices[1].count.put == 0


@pytest.mark.parametrize("several", [[], ["sim", "sim:0"], ["cpu", "sim"]])
def test_several_backends_are_different_devices(several):
    with pytest.raises(nnxp.OptionError, match="devices"):
        nnxp.Engine(NET, several)


@pytest.mark.parametrize("backend", [None, 3, ["sim", 3]])
def test_what_names_no_backend_is_refused_with_the_names(backend):
    with pytest.raises(nnxp.BackendUnavailable, match="The names are auto"):
        nnxp.Engine(NET, backend)


def test_the_command_line_takes_several_devices_too(tmp_path, capsys):
    from nnxp.cli import app

    nnxp.save(NET, tmp_path / "net.safetensors")
    np.save(tmp_path / "x.npy", X)
    files = [str(tmp_path / name) for name in ("net.safetensors", "x.npy", "y.npy")]
    options = ["--backend", "sim:0,sim:1", "--precision", "tf32"]
    with pytest.raises(SystemExit) as end:
        app(["predict", *files[:2], "-o", files[2], *options])
    assert end.value.code == 0
    assert "ran on sim:0 and sim:1" in capsys.readouterr().out
    close(np.load(files[2]), EXPECTED)


# rows that are on the device already


@pytest.mark.parametrize("limit", [SMALL, None])
def test_rows_on_the_device_stay_there(devices, limit):
    engine = nnxp.Engine(NET, "sim:1", memory_limit=limit)
    x = nnxp.to_backend(X, "sim:1")
    devices[1].reset()
    y = engine(x)
    assert isinstance(y, sim.ndarray)
    assert y.device is devices[1]
    assert devices[1].count == sim.Count()
    close(y.get(), EXPECTED)
    with devices[1]:
        out = sim.empty(EXPECTED.shape, "float32")
    assert engine(x, out) is out
    close(out.get(), EXPECTED)
    with devices[1]:
        assert len(engine(x[:0]).get()) == 0
        close(
            engine((x[:9] * 9).astype("uint8")).get(), NET((X[:9] * 9).astype("uint8").astype("f4"))
        )


def test_rows_on_the_device_go_in_smaller_blocks_when_it_is_full(devices):
    net = nnxp.Sequential(Noted(lambda x: [x + i for i in range(60)]), NET)
    engine, x = nnxp.Engine(net, "sim"), nnxp.to_backend(X, "sim")
    devices[0].limit = devices[0].used + 2_000_000
    close(engine(x).get(), EXPECTED)
    devices[0].limit = devices[0].used + 50
    with pytest.raises(nnxp.OutOfMemory):
        engine(x)


def test_rows_on_the_device_must_fit_like_any_others(devices):
    engine, x = nnxp.Engine(NET, "sim"), nnxp.to_backend(X[:9], "sim")
    with pytest.raises(nnxp.ShapeError):
        engine(x[:, :3])
    with pytest.raises(nnxp.ShapeError, match="no axis"):
        engine(x.sum())
    with pytest.raises(nnxp.OptionError, match="out is an array there"):
        engine(x, np.empty((9, 5), "float32"))
    with pytest.raises(nnxp.ShapeError, match=r"out is \(9, 20\)"):
        engine(x, x)
    with pytest.raises(nnxp.DtypeMismatch, match="out is float64"):
        engine(x, nnxp.to_backend(np.empty((9, 5)), "sim"))
    with pytest.raises(nnxp.DeviceMismatch, match=r"on sim:0 .* x is on sim:1"):
        engine(nnxp.to_backend(X[:9], "sim:1"))


def test_an_answer_on_the_device_is_the_caller_s_own(devices):
    engine, x = nnxp.Engine(nnxp.Dropout(0.5), "sim"), nnxp.to_backend(X[:9], "sim")
    for _ in range(4):
        y = engine(x)
        y.fill(0)
    np.testing.assert_array_equal(x.get(), X[:9])


class Tensor:
    """Another library's tensor, which nnxp has never heard of."""

    def __init__(self, x):
        self.x = x
        self.shape = x.shape

    def __dlpack__(self, **options):
        return self.x.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.x.__dlpack_device__()


def test_tensors_of_other_libraries_are_answered_in_kind(devices, monkeypatch):
    library = types.ModuleType("tensors")
    library.from_dlpack = lambda x: Tensor(sim.from_dlpack(x))
    monkeypatch.setitem(sys.modules, "tensors", library)
    monkeypatch.setattr(Tensor, "__module__", "tensors.inner")
    engine = nnxp.Engine(NET, ["sim:0", "sim:1"])
    for device in ("sim:0", "sim:1"):
        x = nnxp.to_backend(X[:50], device)
        for each in devices:
            each.reset()
        for _ in range(4):
            y = engine(Tensor(x))
            assert isinstance(y, Tensor)
            assert str(y.x.device) == device
        for each in devices:
            assert (each.count.put, each.count.get, each.count.implicit) == (0, 0, 0)
        close(y.x.get(), EXPECTED[:50])


def test_tensors_that_cannot_be_lent_or_answered_in_kind_are_refused(devices, monkeypatch):
    engine, x = nnxp.Engine(NET, "sim"), Tensor(nnxp.to_backend(X[:5], "sim"))
    with pytest.raises(nnxp.DtypeMismatch, match="in kind"):  # this module has no from_dlpack
        engine(x)
    space = types.SimpleNamespace(from_dlpack=lambda y: ("theirs", y))
    monkeypatch.setattr(Tensor, "__array_namespace__", lambda self: space, raising=False)
    assert engine(x)[0] == "theirs"

    def refuse(self, **options):
        raise BufferError("it requires grad")

    monkeypatch.setattr(Tensor, "__dlpack__", refuse)
    with pytest.raises(nnxp.DtypeMismatch, match=r"requires grad\); x\.detach"):
        engine(x)


def test_a_recording_keeps_the_parameters_that_it_reads(devices):
    engine = nnxp.Engine(nnxp.Dense(20, 4, rng=0), "sim")
    for _ in range(3):
        expected = engine(X[:3])
    (recorded,) = engine._replicas[0].ready.values()
    engine.close()
    gc.collect()
    np.testing.assert_array_equal(recorded.host(X[:3]), expected)


def test_a_recording_that_failed_is_tried_again_but_not_at_every_call(devices, monkeypatch):
    tried = []

    def fails(self, fn, stream):
        tried.append(1)
        raise MemoryError

    monkeypatch.setattr(type(nnxp.get_backend("sim")), "record", fails)
    engine = nnxp.Engine(NET, "sim")
    for _ in range(64):
        close(engine(X[:3]), EXPECTED[:3])
    assert len(tried) == 6  # at 2, 4, 8, 16, 32, 64


class Weighted(nnxp.Layer):
    def __call__(self, x):
        xp = nnxp.get_array_module(x)
        return x * xp.where(xp.arange(20) < 10, 0.5, 2.0).astype("float32")


def test_constants_of_a_formula_are_brought_to_the_device_once(devices):
    engine = nnxp.Engine(Weighted(), "sim", memory_limit=SMALL)
    engine(X[:3])
    devices[0].reset()
    close(engine(X[:3]), X[:3] * np.repeat(np.float32([0.5, 2]), 10))
    assert devices[0].count.put == 1


def test_what_is_no_want_of_memory_is_not_passed_over_when_it_is_recorded(devices, monkeypatch):
    def fails(self, fn, stream):
        raise error

    monkeypatch.setattr(type(nnxp.get_backend("sim")), "record", fails)
    engine, error = nnxp.Engine(NET, "sim"), Unrecordable("it looks at numbers")
    for _ in range(4):
        close(engine(X[:3]), EXPECTED[:3])
    engine, error = nnxp.Engine(NET, "sim"), ArithmeticError("a fault of ours")
    engine(X[:3])
    with pytest.raises(ArithmeticError, match="a fault of ours"):
        engine(X[:3])


def test_tensors_elsewhere_are_refused_and_those_on_the_host_are_rows(devices):
    class Host(Tensor):
        def __getitem__(self, rows):
            return self.x[rows]

    close(nnxp.Engine(NET, "sim")(Host(X)), EXPECTED)
    with pytest.raises(nnxp.DeviceMismatch, match="device 0 of kind 12"):
        nnxp.Engine(NET, "cpu")(Tensor(nnxp.to_backend(X, "sim")))


# few rows, recorded


@pytest.mark.parametrize("rows", [1, 7, 512])
def test_few_rows_that_come_again_are_recorded_and_replayed_on_new_rows(devices, rows):
    engine = nnxp.Engine(NET, "sim")
    devices[0].lazy = True
    for i in range(5):
        y = engine(X[i : i + rows])
        close(y, EXPECTED[i : i + rows])
        assert y.base is None
    assert list(engine._replicas[0].ready) == [(np.dtype("float32"), (rows, 20))]
    devices[0].reset()
    engine(X[:rows])
    assert (devices[0].count.put, devices[0].count.get) == (1, 1)
    there = nnxp.to_backend(X[9 : 9 + rows], "sim")
    devices[0].reset()
    y = engine(there)
    assert devices[0].count == sim.Count()
    close(y.get(), EXPECTED[9 : 9 + rows])


def test_a_recording_sees_parameters_that_change_in_place():
    net = nnxp.Dense(20, 4, rng=0).to("sim")
    engine = nnxp.Engine(net, "sim")
    for _ in range(4):
        before = engine(X[:3])
    net.weight[...] = net.weight * 2
    close(engine(X[:3]), before * 2)  # there is no bias yet


def test_a_recording_serves_one_caller_at_a_time(devices):
    devices[0].lazy = True
    engine, wrong = nnxp.Engine(NET, "sim"), []
    for _ in range(3):
        engine(X[:400])

    def work(i):
        for _ in range(60):
            y = engine(X[i : i + 400])
            wrong.extend([] if np.allclose(y, EXPECTED[i : i + 400], atol=1e-6) else [i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(0, 8000, 1000)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not wrong


def test_layers_that_are_not_ours_are_not_recorded():
    seen = []
    engine = nnxp.Engine(nnxp.Sequential(Noted(seen.append), NET), "sim")
    for _ in range(5):
        engine(X[:3])
    assert len(seen) == 5
    assert not engine._replicas[0].ready


def test_nothing_is_recorded_beside_what_a_limit_allows(devices):
    engine, x = nnxp.Engine(NET, "sim", memory_limit=SMALL), nnxp.to_backend(X[:3], "sim")
    for _ in range(5):
        engine(X[:3])
        engine(x)
    assert not engine._replicas[0].ready


def test_recordings_are_bounded():
    engine = nnxp.Engine(NET, "sim")
    for rows in range(1, 60):
        for _ in range(3):
            close(engine(X[:rows]), EXPECTED[:rows])
    assert len(engine._replicas[0].ready) == 32


def test_the_caller_s_device_and_stream_are_as_they_were(devices):
    engine, x = nnxp.Engine(NET, "sim:0", memory_limit=SMALL), nnxp.to_backend(X[:7], "sim:0")
    with devices[1], sim.Stream() as mine:
        for rows in (X, X[:7], X[:7], X[:7], x, x, x):
            engine(rows)
            assert sim.Device.current() is devices[1]
            assert sim.Stream.current() is mine
        with pytest.raises(nnxp.ShapeError):
            engine(X[:, :3])
        assert sim.Stream.current() is mine


# what is kept, and given back


def test_engines_of_one_model_share_its_parameters(devices):
    net = nnxp.Dense(500, 500, rng=0)
    before = devices[0].used
    first, second = nnxp.Engine(net, "sim"), nnxp.Engine(net, "sim")
    assert first.model is second.model
    assert devices[0].used - before < 1.5 * 500 * 500 * 4
    del first
    gc.collect()
    assert devices[0].used > before
    second.close()
    del second
    gc.collect()
    assert devices[0].used == before


def test_a_closed_engine_says_so_and_holds_nothing(devices):
    before = devices[0].used
    with nnxp.Engine(nnxp.Dense(500, 500, rng=0), "sim") as engine:
        for _ in range(4):
            engine(np.ones((3, 500), "float32"))
        assert devices[0].used > before
    gc.collect()
    assert devices[0].used == before
    with pytest.raises(nnxp.OptionError, match="closed"):
        engine(np.ones((3, 500), "float32"))
    assert "closed" in repr(engine)
    engine.close()


# precision


def test_tf32_is_a_permission_that_every_product_of_the_engine_is_given(devices, monkeypatch):
    seen, reference = [], nnxp.kernels.linear.reference

    def linear(*arrays, precision=None, **options):
        seen.append(precision)
        return reference(*arrays, **options)

    monkeypatch.setattr(nnxp.kernels.linear, "reference", linear)
    for precision in ("tf32", None):
        seen.clear()
        close(nnxp.Engine(NET, "sim", precision=precision)(X), EXPECTED)
        assert precision in seen
    with pytest.raises(nnxp.OptionError, match="float32 models"):
        nnxp.Engine(NET.astype("float16"), "cpu", precision="tf32")


class Multiplied(nnxp.Layer):
    weight: object

    def __call__(self, x):
        return x @ self.weight


class Gram(nnxp.Layer):
    def __call__(self, x):
        return x @ x.swapaxes(1, 2)


@pytest.mark.parametrize(
    ("model", "row", "products"),
    [
        (NET, (20,), 2),
        (Multiplied.of(weight=np.ones((5, 4), "float32")), (5,), 1),
        (nnxp.Conv(3, 4, (3, 3), "relu", rng=0), (8, 8, 3), 1),
        (nnxp.ConvTranspose(3, 4, (2, 2), stride=2, rng=0), (4, 4, 3), 1),
        (nnxp.LSTM(3, 4, rng=0), (5, 3), 6),
        (nnxp.GRU(3, 4, rng=0), (5, 3), 6),
        (nnxp.MultiHeadAttention(4, 2, rng=0), (5, 4), 5),
        (Gram(), (5, 4), 1),
    ],
    ids=lambda each: type(each).__name__,
)
def test_tf32_reaches_the_products_inside_kernels(model, row, products):
    program = with_products(model.program(((7, *row), "float32")), "tf32")
    noted = [step for step in program.steps if getattr(step.function, "takes_precision", False)]
    assert [step.options["precision"] for step in noted] == ["tf32"] * products
    assert not any(
        step.name == "matmul" for step in program.steps if isinstance(step.function, str)
    )
    x = draw((7, *row))
    np.testing.assert_allclose(program(x), model(x), rtol=1e-5, atol=1e-6)


# CUDA, as far as it goes without a GPU: what is asked of CuPy


class Cuda:
    """Stands for cupy.cuda and notes what it is asked."""

    def __init__(self):
        self.asked = []

    def stream(self):
        note = self.asked.append
        return types.SimpleNamespace(
            begin_capture=lambda: note("begin"),
            end_capture=lambda: note("end") or types.SimpleNamespace(launch=lambda: note("launch")),
            record=lambda event: note("record") or event,
            wait_event=lambda event: note(f"wait {event}"),
        )


@pytest.fixture
def cuda(monkeypatch):
    fake = Cuda()
    fake.Event = lambda disable_timing: f"event {disable_timing}"
    monkeypatch.setattr(
        CudaBackend,
        "xp",
        types.SimpleNamespace(
            cuda=fake,
            get_default_memory_pool=lambda: types.SimpleNamespace(
                free_all_blocks=lambda: fake.asked.append("free default")
            ),
        ),
    )
    return fake


def test_a_graph_is_captured_after_a_run_and_launched_at_each_replay(cuda):
    backend = CudaBackend("cupy", "cuda:0", "")
    replay = backend.record(lambda: cuda.asked.append("fn") or "y", cuda.stream())
    assert cuda.asked == ["fn", "begin", "fn", "end"]
    assert replay() == replay() == "y"
    assert cuda.asked[4:] == ["launch", "launch"]


def test_a_capture_that_fails_is_ended(cuda):
    def fn():
        if "begin" in cuda.asked:
            raise ArithmeticError

    with pytest.raises(Unrecordable) as raised:
        CudaBackend("cupy", "cuda:0", "").record(fn, cuda.stream())
    assert isinstance(raised.value.__cause__, ArithmeticError)
    assert cuda.asked[-1] == "end"


def test_a_pool_is_asked_on_its_own_device(cuda):
    note = cuda.asked.append

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            note(f"on {self.index}")

        def __exit__(self, *error):
            note("off")

    cuda.Device, cuda.using_allocator = Device, nullcontext
    cuda.MemoryPool = lambda: types.SimpleNamespace(
        free_all_blocks=lambda: note("free"),
        free_bytes=lambda: note("bytes") or 7,
        used_bytes=lambda: used.pop(),
    )
    backend, used = CudaBackend("cupy", "cuda:1", ""), [0, 0, 512]
    pool = backend.pool()
    pool.release()
    pool.unused()
    backend.release()
    assert " ".join(cuda.asked) == "on 1 free off on 1 bytes off on 1 free default off"
    cuda.asked.clear()
    del pool  # with an array that an exception keeps, say: it is emptied again with the next one
    assert cuda.asked == ["on 1", "free", "off"]
    del [backend.pool()][0]
    assert cuda.asked == 3 * ["on 1", "free", "off"]
    assert not used


def test_where_no_more_memory_can_be_pinned_it_is_memory_like_any_other(cuda):
    class Full(Exception):
        pass

    def refuse(size):
        raise Full

    cuda.runtime, cuda.PinnedMemory = types.SimpleNamespace(CUDARuntimeError=Full), refuse
    cuda.PinnedMemoryPointer = None
    buffer = CudaBackend("cupy", "cuda:0", "").pinned(24)
    assert (buffer.nbytes, buffer.flags.writeable) == (24, True)


def test_one_stream_waits_for_another_by_an_event_without_a_clock(cuda):
    backend = CudaBackend("cupy", "cuda:0", "")
    backend.wait(cuda.stream(), backend.mark(cuda.stream()))
    assert cuda.asked == ["record", "wait event True"]
