"""Training on rows that are not in memory, and on batches from iterables."""

from __future__ import annotations

import importlib
import sys
import threading
import tracemalloc
import weakref
from itertools import pairwise

import numpy as np
import pytest

import nnxp
from conftest import draw
from nnxp._errors import CheckpointError, DtypeMismatch, OptionError, ShapeError, TrainingError
from nnxp.training import trainer
from nnxp.training.batches import BLOCK, Rows, batches_of, order_of
from nnxp.training.trainer import Trainer
from test_training import assert_same_bits, data, deep, fit, net

fitting = importlib.import_module("nnxp.training.fit")  # which the function of this name hides


def shuffled(*arrays, size=32, seed=3):
    """A function of the epoch that gives these arrays in batches, in the order of `fit`."""

    def batches(epoch):
        for ids in batches_of(order_of(len(arrays[0]), seed, epoch - 1), size):
            yield tuple(array[ids] for array in arrays)

    return batches


def fit_batches(model, batches, **options):
    return fit(model, batches, **{"batch": None} | options)


# rows that are not in memory


def hdf5(x, folder):
    h5py = pytest.importorskip("h5py")
    file = h5py.File(folder / "x.h5", "w")
    return file.create_dataset("x", data=x, chunks=(50, x.shape[1]), compression="gzip")


def zarr(x, folder):
    rows = pytest.importorskip("zarr").create_array(
        folder / "x.zarr", shape=x.shape, chunks=(50, x.shape[1]), dtype=x.dtype.str[1:]
    )
    rows[:] = x
    return rows


def mapped(x, folder):
    np.save(folder / "x.npy", x)
    return np.load(folder / "x.npy", mmap_mode="r")


def frame(x, folder):
    return pytest.importorskip("pandas").DataFrame(x)


def arrow(x, folder):
    return pytest.importorskip("pyarrow").table({f"c{i}": x[:, i] for i in range(x.shape[1])})


@pytest.mark.parametrize("options", [{}, {"workers": 2}, {"memory_limit": 9000}])
@pytest.mark.parametrize("kind", [hdf5, zarr, mapped, frame, arrow])
def test_rows_of_any_source_train_as_those_in_memory(kind, options, tmp_path):
    """In an order by blocks, in which a function gives those in memory."""
    x, y = data(3000)
    source = kind(x, tmp_path)
    model = net(dtype="float32")
    rows = Rows(model, source, y, memory_limit=options.get("memory_limit"))
    block, mixed = rows.block, rows.mixed
    chunked = kind in (hdf5, zarr)
    if "memory_limit" not in options or kind is mapped:
        assert (block, mixed) == (100 if chunked else BLOCK, 16)
    else:
        assert (block, mixed) == ((37, 2) if chunked else (6, 16))

    def batches(epoch):
        for ids in batches_of(order_of(len(x), 3, epoch - 1, block, mixed), 200):
            yield x[ids], y[ids]

    one = fit(model, source, y, epochs=2, batch=200, **options)
    two = fit_batches(model, batches, epochs=2, **options)
    rounding = 1e-5 if "memory_limit" in options else 0  # the blocks that are kept take of its room
    for name, p in one.model.parameters().items():
        np.testing.assert_allclose(p, two.model.parameters()[name], rtol=rounding, atol=rounding)


def test_a_chunk_of_a_file_is_read_once_in_an_epoch(tmp_path):
    x, y = data(3000)
    rows, slices = zarr(x, tmp_path), []

    class Noted(Spied):
        chunks = rows.chunks

    source = Noted(x, slices.append)
    fit(net(dtype="float32"), source, y, epochs=1, batch=7, rng=0)
    read = sorted(part.start for part in slices if part.start is not None)
    assert read == [0, *range(0, 3000, 100)]  # the first row is looked at before


def test_whole_numbers_of_which_some_blocks_miss_one_are_no_others(tmp_path):
    pandas = pytest.importorskip("pandas")
    column = [None if i == 900 else 1000 + i for i in range(1000)]
    rows = Rows(net(), pandas.DataFrame({"a": column}, dtype="Int64"), np.zeros(1000, "int64"))
    x, _ = rows.at(np.array([5, 900, 999, 64]))
    np.testing.assert_array_equal(x, [[1005], [np.nan], [1999], [1064]])


def test_large_chunks_are_read_whole_and_two_are_mixed_at_least():
    class Large:
        shape, dtype, chunks = (10_000, 250_000), np.dtype("float32"), (50, 250_000)

        def __getitem__(self, rows):
            return np.broadcast_to(np.float32(0), (len(range(*rows.indices(10_000))), 250_000))

    model = nnxp.Dense(250_000, 1, rng=0)
    rows = Rows(model, Large(), np.zeros(10_000))
    assert (rows.block, rows.mixed) == (44, 2)  # 128 MiB do not hold three chunks
    for chunk, expected in ((40, (40, 2)), (20, (20, 5)), (5, (5, 16)), (2, (6, 16)), (1, (7, 16))):
        Large.chunks = chunk, 250_000
        rows = Rows(model, Large(), np.zeros(10_000))
        assert (rows.block, rows.mixed) == expected


class Spied:
    """Rows that note when they are read."""

    def __init__(self, x, note):
        self.x, self.shape, self.dtype, self.note = x, x.shape, x.dtype, note

    def __getitem__(self, rows):
        self.note(rows)
        return self.x[rows]


@pytest.mark.parametrize("options", [{}, {"workers": 2}])
def test_the_next_batch_is_read_here_while_a_step_is_computed(monkeypatch, options):
    x, y = data(320)
    asked, ahead, here, step = threading.Semaphore(0), [], threading.get_ident(), Trainer.step

    def batches(epoch):
        for batch in (*shuffled(x, y, size=160)(epoch), None):
            assert threading.get_ident() == here  # a database may be read by one thread alone
            asked.release()
            if batch:
                yield batch

    def waiting(self, *batch):
        if not ahead:
            asked.acquire(timeout=5)  # its own
        ahead.append(asked.acquire(timeout=5))
        return step(self, *batch)

    monkeypatch.setattr(Trainer, "step", waiting)
    fit_batches(net(dtype="float32"), batches, epochs=1, **options)
    assert ahead == [True, True]


def test_nothing_is_read_ahead_within_a_memory_limit(monkeypatch):
    x, y = data(320)
    events, step = [], Trainer.step

    def batches(epoch):
        for batch in shuffled(x, y, size=160)(epoch):
            events.append("read")
            yield batch

    def noted(self, *batch):
        events.append("step")
        return step(self, *batch)

    monkeypatch.setattr(Trainer, "step", noted)
    fit_batches(net(dtype="float32"), batches, epochs=1, memory_limit="1 MB")
    assert events == ["read", "step"] * 2


def test_more_rows_read_in_slices_than_a_limit_holds_train_within_it():
    x = draw((20_000, 100))
    source, y = Spied(x, lambda rows: None), np.arange(20_000) % 3
    model = nnxp.Sequential(nnxp.Dense(100, 64, "relu", rng=0), nnxp.Dense(64, 3, rng=0))
    rows = Rows(model, source, y, memory_limit=2_000_000)
    assert 0 < rows.kept_bytes <= 500_000
    for _ in range(2):  # once for what is kept for ever
        tracemalloc.start()
        try:
            fit(model, source, y, epochs=1, batch=8192, memory_limit="2 MB", validation=(source, y))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    aside = 20_000 * 16 + 5 * sum(p.nbytes for p in model.parameters().values())
    assert peak < 2_000_000 + aside < 8192 * 400  # the bytes of a batch


# batches from an iterable


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("options", [{}, {"workers": 2}, {"memory_limit": 9000}])
def test_batches_in_the_order_of_fit_come_to_its_bits(options, weighted):
    x, y = data()
    weights = [np.arange(1.0, 201)] if weighted else []
    one = fit(net(dtype="float32"), x, y, epochs=3, weights=weights[0] if weights else None,
              validation=(x, y), **options)  # fmt: skip
    two = fit_batches(net(dtype="float32"), shuffled(x, y, *weights), epochs=3, validation=(x, y),
                      **options)  # fmt: skip
    assert_same_bits(one.model, two.model)
    for a, b in zip(one.history, two.history, strict=True):
        assert a["loss"] == b["loss"]
        np.testing.assert_allclose(a["validation"], b["validation"], rtol=1e-6)


def test_batches_train_on_a_device_as_on_the_host(sim):
    x, y = data()
    here = fit(deep().to("sim"), x, y, epochs=2)
    there = fit_batches(deep().to("sim"), shuffled(x, y), epochs=2)
    assert there.model.place == "sim:0"
    for name, p in here.model.parameters().items():
        same = nnxp.asnumpy(there.model.parameters()[name]) == nnxp.asnumpy(p)
        assert same.all(), name


def test_few_large_batches_are_kept_until_the_losses_of_a_device_are_read(sim, monkeypatch):
    batches, y, alive = [], np.zeros(100, "int64"), []

    def large(epoch):
        for seed in range(20):
            x = draw((100, 5), "float32", seed=seed)
            batches.append(weakref.ref(x))
            alive.append(sum(batch() is not None for batch in batches))
            yield x, y

    fit_batches(deep().to("sim"), large, epochs=1)
    assert max(alive) == 20
    monkeypatch.setattr(fitting, "HELD", 20_000)  # of which a batch and its labels take 8,400
    batches.clear(), alive.clear()
    fit_batches(deep().to("sim"), large, epochs=1)
    assert max(alive) <= 5


def test_an_iterable_is_gone_through_in_each_epoch_and_an_iterator_once():
    x, y = data()
    batches = list(shuffled(x, y)(1))
    again = fit_batches(deep(), batches, epochs=2, validation=(x, y))
    twice = fit_batches(deep(), lambda epoch: iter(batches), epochs=2)
    assert_same_bits(again.model, twice.model)
    once = fit_batches(deep(), iter(batches), epochs=1)
    assert_same_bits(once.model, fit_batches(deep(), batches, epochs=1).model)
    with pytest.raises(OptionError, match="an iterator gives its batches once, which is epochs=1"):
        fit_batches(deep(), iter(batches))
    spent = iter(batches)
    with pytest.raises(ShapeError, match="epoch 2 has no batches"):
        fit_batches(deep(), lambda epoch: spent, epochs=2)
    with pytest.raises(ShapeError, match="epoch 1 has no batches"):
        fit_batches(deep(), [], epochs=2)


def test_batches_come_from_a_loader_of_torch():
    torch = pytest.importorskip("torch")
    x, y = data()
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.from_numpy(x), torch.from_numpy(y)), batch_size=32
    )
    same = [(x[i : i + 32], y[i : i + 32]) for i in range(0, 200, 32)]
    assert_same_bits(
        fit_batches(deep(), loader, epochs=2).model, fit_batches(deep(), same, epochs=2).model
    )


def test_a_model_of_several_inputs_takes_batches_of_them():
    from test_training import Sum

    a, b, y = draw((60, 4)), draw((60, 3), seed=2), draw((60, 2), seed=3)
    model = Sum(nnxp.Dense(4, 2, rng=0), nnxp.Dense(3, 2, rng=1))
    one = fit(model, (a, b), y, loss="mean_square", epochs=2, batch=30)

    def batches(epoch):
        for ids in batches_of(order_of(60, 3, epoch - 1), 30):
            yield {"right": b[ids], "left": a[ids]}, y[ids]

    two = fit_batches(model, batches, loss="mean_square", epochs=2)
    assert_same_bits(one.model, two.model)


@pytest.mark.parametrize("widths", [(4, 3), (4, 4)])
def test_several_inputs_come_from_a_loader_of_torch(widths):
    """Which makes a list of a tuple."""
    torch = pytest.importorskip("torch")
    from test_training import Sum

    a, b, y = draw((8, widths[0])), draw((8, widths[1]), seed=2), draw((8, 2), seed=3)
    model = Sum(nnxp.Dense(widths[0], 2, rng=0), nnxp.Dense(widths[1], 2, rng=1))
    rows = [((a[i], b[i]), y[i]) for i in range(8)]
    loader = torch.utils.data.DataLoader(rows, batch_size=2)  # as many rows as inputs
    same = [((a[i : i + 2], b[i : i + 2]), y[i : i + 2]) for i in range(0, 8, 2)]
    one, two = (
        fit_batches(model, batches, loss="mean_square", epochs=2) for batches in (loader, same)
    )
    assert_same_bits(one.model, two.model)


class Scaled(nnxp.Layer):
    """y = inner(x) * factor"""

    inner: nnxp.Dense

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, x, factor=None):
        y = self.inner(x)[:, 0]
        return y if factor is None else y * factor


def test_weights_of_a_batch_are_no_second_input_of_another():
    x, factor, y, weights = draw((8, 4)), *(abs(draw((8,), seed=seed)) for seed in (1, 2, 3))
    batches = [((x, factor), y), (x, y, weights)]
    model = Scaled(nnxp.Dense(4, 1, rng=0))
    options = {"loss": "mean_square", "optimizer": nnxp.SGD(0.1), "epochs": 1}
    both = fit_batches(model, batches, **options).model
    for batch in batches:
        model = fit_batches(model, [batch], **options).model
    assert_same_bits(both, model)


def test_rows_in_all_are_not_known_of_batches():
    x, y = data()
    told = []
    fit_batches(
        deep(), shuffled(x, y), epochs=2, progress=lambda done, rows: told.append((done, rows))
    )
    assert told[-1] == (400, None)


def test_a_bar_tells_the_loss_of_the_epoch_so_far(monkeypatch, capfd):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    x, y = data()
    for rows in (x, y), (shuffled(x, y),):
        fitted = fit(deep(), *rows, batch=None, epochs=2, progress=True)
        last = capfd.readouterr().err.split("\r")[-1]
        assert f"loss={fitted.history[-1]['loss']:.3g}" in last
        assert "400" in last


def test_a_bar_tells_no_loss_of_a_device_that_is_not_read_yet(sim, monkeypatch, capfd):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    x, y = data()
    fit(deep().to("sim"), x, y, epochs=1, progress=True)
    bar = capfd.readouterr().err
    assert "200/200" in bar
    assert "nan" not in bar


@pytest.mark.parametrize("options", [{}, {"workers": 2}, {"memory_limit": 9000}])
def test_batches_of_ever_new_sizes_keep_few_programs(options, monkeypatch):
    x, y = data(700)
    ends = np.cumsum([0, *range(10, 37)])
    batches = [(x[a:b], y[a:b]) for a, b in pairwise(ends)]
    many = fit_batches(net(dtype="float32"), batches, epochs=2, **options)
    monkeypatch.setattr(trainer, "KEPT", 3)
    held = set()
    program = Trainer._program

    def counted(self, *given):
        written = program(self, *given)
        held.add(max(len(self._written), len({key[:2] for key in self._runners})))
        return written

    monkeypatch.setattr(Trainer, "_program", counted)
    few = fit_batches(net(dtype="float32"), batches, epochs=2, **options)
    assert max(held) <= 3
    assert_same_bits(many.model, few.model)


def interrupted(after, step=Trainer.step):
    """Trainer.step that is interrupted after so many."""
    steps = 0

    def stopping(self, *args):
        nonlocal steps
        steps += 1
        if steps > after:
            raise KeyboardInterrupt
        return step(self, *args)

    return stopping


@pytest.mark.parametrize("stopped", [1, 7, 9])
@pytest.mark.parametrize("options", [{}, {"workers": 2}])
def test_a_run_over_batches_goes_on_to_the_same_bits(tmp_path, monkeypatch, stopped, options):
    x, y = data()
    batches, path = shuffled(x, y), tmp_path / "run.safetensors"
    options = options | {"epochs": 3, "validation": (x, y), "patience": 9}
    whole = fit_batches(deep(), batches, **options)
    options |= {"checkpoint": path, "checkpoint_seconds": 0.0}
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted(stopped))
        with pytest.raises(KeyboardInterrupt):
            fit_batches(deep(), batches, **options)
    resumed = fit_batches(deep(), batches, **options)
    assert_same_bits(whole.model, resumed.model)
    assert [e["loss"] for e in whole.history] == [e["loss"] for e in resumed.history]


def test_a_run_does_not_go_on_over_other_batches(tmp_path, monkeypatch):
    x, y = data()
    path = tmp_path / "run.safetensors"
    options = {"epochs": 3, "checkpoint": path, "checkpoint_seconds": 0.0}
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted(10))  # the fourth of the second epoch
        with pytest.raises(KeyboardInterrupt):
            fit_batches(deep(), shuffled(x, y), **options)
    with pytest.raises(CheckpointError, match="batch 3 of epoch 2 by other batches than come now"):
        fit_batches(deep(), shuffled(x, y, seed=4), **options)
    with pytest.raises(CheckpointError, match="stands at batch 3 of epoch 2, which has 2"):
        fit_batches(deep(), lambda epoch: [(x, y), (x, y)], **options)
    with pytest.raises(CheckpointError, match="another data"):
        fit(deep(), x, y, **options | {"batch": 128})


def test_a_run_that_is_written_after_epochs_goes_on_over_other_batches(tmp_path, monkeypatch):
    x, y = data()
    options = {"checkpoint": tmp_path / "run.safetensors", "checkpoint_seconds": float("inf")}
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted(10))  # the fourth of the second epoch
        with pytest.raises(KeyboardInterrupt):
            fit_batches(deep(), shuffled(x, y), epochs=3, **options)
    resumed = fit_batches(deep(), shuffled(x, y, seed=4), epochs=3, **options)
    assert len(resumed.history) == 3


def test_what_gives_no_batches_is_refused_by_name():
    x, y = data()
    for wrong, said in (
        (x, r"there is no y, and x is ndarray \(200, 5\)"),
        ("x.npy", "there is no y, and x is 'x.npy'"),
        ({"x": x}, "there is no y"),
        (3, "there is no y, and x is 3"),
        (lambda: [(x, y)], "called with the epoch, from 1, which"),
        (lambda epoch: 3, "answers an iterable, not 3"),
    ):
        with pytest.raises(OptionError, match=said):
            fit_batches(deep(), wrong, epochs=1)
    for options in ({"batch": 32}, {"weights": y}):
        with pytest.raises(OptionError, match="without y, x gives batches of its own sizes"):
            fit_batches(deep(), [(x, y)], **options)
    for wrong, error, said in (
        (
            [(x, y), x],
            ShapeError,
            r"epoch 1, batch 2: a batch is \(x, y\).* not ndarray \(200, 5\)",
        ),
        ([(x, y[:-1])], ShapeError, "epoch 1, batch 1: .* go together"),
        ([(x, y), (x[:, :3], y)], ShapeError, r"^epoch 1, batch 2: layers\.0 Dense"),
        ([(x, y), (x[:0], y[:0])], ShapeError, "epoch 1, batch 2: there are no rows"),
        ([(x, np.array(["a"] * 200))], DtypeMismatch, "epoch 1, batch 1: the target"),
        ([(x, y), (x, y + 1)], OptionError, "epoch 1, batch 2: the labels go from 1 to 3"),
        ([(x, y), (x, y, -y)], OptionError, "epoch 1, batch 2: weights of rows are"),
        ([(x, y), (x[:, :3], y)], ShapeError, "epoch 1, batch 2: layers.0"),
        ([(x, y), (x, y + 0.5)], ShapeError, "epoch 1, batch 2: the target is"),
        ([(x, y), (x * np.nan, y)], TrainingError, "epoch 1, batch 2: its rows hold NaN"),
    ):
        with pytest.raises(error, match=said):
            fit_batches(net(dtype="float32"), wrong, epochs=1)
    with pytest.raises(OptionError, match=r"target, weights\)"):
        fit_batches(deep(), [(x, y, y + 1)], loss=lambda m, x, t: m(x).mean(), epochs=1)
    with pytest.raises(ShapeError, match=r"x is an iterator.* without y, fit takes batches"):
        fit(deep(), iter(x), y)
    with pytest.raises(ShapeError, match="the target is an iterator"):
        fit(deep(), x, iter(y))


def test_batches_may_share_an_array_that_is_filled_anew():
    x, y = data()
    shared, labels = np.empty((50, 5)), np.empty(50, y.dtype)

    def batches(epoch, factor=(1, 1, 1, 1)):
        for i in range(4):
            shared[...], labels[...] = x[50 * i :][:50] * factor[i], y[50 * i :][:50]
            yield shared, labels

    apart = [(x[i : i + 50], y[i : i + 50]) for i in range(0, 200, 50)]
    one, two = (fit_batches(deep(), source, epochs=2) for source in (batches, apart))
    assert_same_bits(one.model, two.model)
    with pytest.raises(TrainingError, match="epoch 1, batch 2: its rows hold NaN"):
        fit_batches(deep(), lambda epoch: batches(epoch, (1, np.nan, 1, 1)), epochs=1)


def test_an_error_of_the_batches_comes_as_it_is_when_it_is_their_turn():
    x, y = data()

    def failing(epoch):
        yield x, y
        raise ZeroDivisionError("of the user's own")

    steps = []
    with pytest.raises(ZeroDivisionError, match="of the user's own"):
        fit_batches(deep(), failing, epochs=1, progress=lambda done, rows: steps.append(done))
    assert steps[-1] == 200
