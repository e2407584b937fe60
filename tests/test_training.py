"""Training: losses and optimisers against their formulas and torch, and runs that can go on."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import nnxp
from conftest import draw
from nnxp._errors import CheckpointError, NotDifferentiable, OptionError, ShapeError, TrainingError
from nnxp.training import _chunks, checkpoint, losses, optimizers, schedules, trainer
from nnxp.training.batches import Rows, batches_of, order_of
from nnxp.training.trainer import Trainer

LABELS = np.array([0, 2, 1, 1, 0, 2, 2])


def net(last="identity", outputs=3, dtype="float64"):
    return nnxp.Sequential(
        nnxp.Dense(5, 8, "tanh", rng=0, dtype=dtype),
        nnxp.Dense(8, outputs, last, rng=1, dtype=dtype),
    )


def rows(dtype="float64", count=7):
    return draw((count, 5), dtype)


# losses


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def test_losses_are_their_formulas():
    y, t = draw((7, 3), "float64"), draw((7, 3), "float64", 1)
    d, p = y - t, softmax(y)
    one = np.eye(3)[LABELS]
    np.testing.assert_allclose(losses.mean_square.rows(y, t), (d * d).mean(1))
    np.testing.assert_allclose(losses.mean_absolute.rows(y, t), abs(d).mean(1))
    huber = np.where(abs(d) <= 0.5, d * d / 2, 0.5 * (abs(d) - 0.25))
    np.testing.assert_allclose(losses.Huber(0.5).rows(y, t), huber.mean(1))
    np.testing.assert_allclose(losses.cross_entropy.rows(y, LABELS), -np.log(p)[one == 1])
    np.testing.assert_allclose(losses.cross_entropy.rows(y, p), -(p * np.log(p)).sum(1))
    smooth = -((0.9 * one + 0.1 / 3) * np.log(p)).sum(1)
    np.testing.assert_allclose(losses.CrossEntropy(smoothing=0.1).rows(y, LABELS), smooth)
    s = 1 / (1 + np.exp(-y))
    wanted = -(one * np.log(s) + (1 - one) * np.log(1 - s))
    np.testing.assert_allclose(losses.binary_cross_entropy.rows(y, one), wanted.mean(1))
    wanted = -(2 * one * np.log(s) + (1 - one) * np.log(1 - s))
    np.testing.assert_allclose(losses.BinaryCrossEntropy(2.0).rows(y, one), wanted.mean(1))


@pytest.mark.parametrize("last", ["softmax", "log_softmax"])
def test_a_model_that_ends_in_a_softmax_is_met_at_its_logits(last):
    plain, ends = net(), net(last)
    for model in (ends, nnxp.Sequential(plain, nnxp.Activation(last))):
        step = nnxp.value_and_gradients(losses.cross_entropy)
        y, found = step(model, rows(), LABELS)
        y2, wanted = step(plain, rows(), LABELS)
        np.testing.assert_allclose(y, y2, rtol=1e-14)
        for g, g2 in zip(found.values(), wanted.values(), strict=True):
            np.testing.assert_allclose(g, g2, rtol=1e-13)
        np.testing.assert_allclose(losses.cross_entropy(model, rows(), LABELS), y, rtol=1e-14)


def test_a_loss_is_finite_where_a_probability_is_rounded_to_zero():
    far = nnxp.Sequential(nnxp.Dense.of(np.float32([[1000.0, -1000.0]]), None, "softmax"))
    step = nnxp.value_and_gradients(losses.cross_entropy)
    y, found = step(far, np.float32([[1.0]]), np.array([1]))
    assert y == 2000
    np.testing.assert_array_equal(found["layers.0.weight"], [[1, -1]])
    far = nnxp.Dense.of(np.float32([[1000.0]]), None, "sigmoid")
    assert losses.binary_cross_entropy(far, np.float32([[1.0]]), np.float32([[0]])) == 1000


def test_losses_refuse_what_does_not_fit():
    with pytest.raises(OptionError, match="that is binary_cross_entropy's"):
        losses.cross_entropy(net("sigmoid"), rows(), LABELS)
    with pytest.raises(OptionError, match="that is cross_entropy's"):
        losses.binary_cross_entropy(net("softmax"), rows(), rows()[:, :3])
    with pytest.raises(ShapeError, match="broadcast"):
        losses.mean_square(net(outputs=7), rows(), rows()[:, 0])
    with pytest.raises(ShapeError, match="one label for each"):
        losses.cross_entropy(net(), rows(), LABELS[:, None])
    for kind in ("float64", "bool"):
        with pytest.raises(ShapeError, match="no whole numbers: labels are those") as error:
            nnxp.fit(net(), rows(), LABELS.astype(kind), loss="cross_entropy", epochs=1)
        assert "float32" not in str(error.value)  # to which fit has converted it


def test_a_column_of_targets_may_lack_its_axis():
    t = rows()[:, 0]
    y = losses.mean_square(net(outputs=1), rows(), t)
    np.testing.assert_allclose(y, losses.mean_square(net(outputs=1), rows(), t[:, None]))


def test_weights_of_rows_and_of_classes():
    w = np.arange(1.0, 8.0)
    each = losses.cross_entropy.rows(net()(rows()), LABELS)
    made = losses.cross_entropy(net(), rows(), LABELS, w)
    np.testing.assert_allclose(made, (each * w).sum() / w.sum())
    own = np.array([1.0, 2.0, 5.0])[LABELS]
    loss = losses.CrossEntropy(class_weights=(1.0, 2.0, 5.0))
    np.testing.assert_allclose(loss(net(), rows(), LABELS), (each * own).sum() / own.sum())
    y, _ = nnxp.value_and_gradients(loss)(
        net().astype("float32").to("sim"),
        *(nnxp.to_backend(a, "sim") for a in (rows("float32"), LABELS)),
    )
    np.testing.assert_allclose(float(nnxp.asnumpy(y)), (each * own).sum() / own.sum(), rtol=1e-5)


def test_losses_agree_with_torch():
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    y, t = draw((7, 3), "float64"), draw((7, 3), "float64", 1)
    one, labels, ty, tt = np.eye(3)[LABELS], torch.tensor(LABELS), torch.tensor(y), torch.tensor(t)
    weights = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    pairs = [
        (losses.mean_square.rows(y, t).mean(), F.mse_loss(ty, tt)),
        (losses.mean_absolute.rows(y, t).mean(), F.l1_loss(ty, tt)),
        (losses.Huber(0.5).rows(y, t).mean(), F.huber_loss(ty, tt, delta=0.5)),
        (losses.CrossEntropy(0.1).rows(y, LABELS).mean(),
         F.cross_entropy(ty, labels, label_smoothing=0.1)),
        (losses.BinaryCrossEntropy(2.0).rows(y, one).mean(),
         F.binary_cross_entropy_with_logits(ty, torch.tensor(one), pos_weight=torch.tensor(2.0))),
        (losses.CrossEntropy(class_weights=(1.0, 2.0, 5.0))(_Given(y), y, LABELS),
         F.cross_entropy(ty, labels, weights)),
    ]  # fmt: skip
    for made, wanted in pairs:
        np.testing.assert_allclose(made, wanted.item(), rtol=1e-12)


class _Given(nnxp.Layer):
    y: np.ndarray

    def __call__(self, x):
        return x + 0 * self.y


# optimisers

OPTIMIZERS = [
    optimizers.SGD(0.1), optimizers.Momentum(0.1), optimizers.Nesterov(0.1, decay=0.01),
    optimizers.Adagrad(0.1), optimizers.RMSProp(0.01), optimizers.Adam(0.1), optimizers.AdamW(0.1),
    optimizers.Lion(0.01, decay=0.1), optimizers.Adam(0.1, eps_hat=True, eps=1e-3),
]  # fmt: skip
THEIRS = {
    "SGD": lambda t, p: t.optim.SGD(p, 0.1),
    "Momentum": lambda t, p: t.optim.SGD(p, 0.1, 0.9),
    "Nesterov": lambda t, p: t.optim.SGD(p, 0.1, 0.9, nesterov=True, weight_decay=0.01),
    "Adagrad": lambda t, p: t.optim.Adagrad(p, 0.1),
    "RMSProp": lambda t, p: t.optim.RMSprop(p, 0.01),
    "Adam": lambda t, p: t.optim.Adam(p, 0.1),
    "AdamW": lambda t, p: t.optim.AdamW(p, 0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS[:7], ids=lambda o: type(o).__name__)
def test_optimizers_agree_with_torch(optimizer):
    torch = pytest.importorskip("torch")
    p = {"a": draw((3, 4), "float64"), "b": draw((5,), "float64", 1)}
    theirs = [torch.tensor(x.copy(), requires_grad=True) for x in p.values()]
    other = THEIRS[type(optimizer).__name__](torch, theirs)
    state = optimizer.init(p)
    for t in range(5):
        g = {n: draw(x.shape, "float64", 10 + t) * (1 + t) for n, x in p.items()}
        before = {n: x.copy() for n, x in g.items()}
        optimizer.update(p, g, state)
        assert all((g[n] == before[n]).all() for n in g), "the gradients were changed"
        for x, own in zip(theirs, g.values(), strict=True):
            x.grad = torch.tensor(own)
        other.step()
    for x, wanted in zip(p.values(), theirs, strict=True):
        np.testing.assert_allclose(x, wanted.detach().numpy(), rtol=1e-10)


def test_lion_and_the_other_adam_are_their_formulas():
    p, g = {"a": np.array([1.0, -2.0])}, {"a": np.array([0.5, 0.0])}
    lion = optimizers.Lion(0.01, decay=0.1)
    state = lion.init(p)
    lion.update(p, g, state)
    np.testing.assert_allclose(p["a"], [0.999 - 0.01, -1.998])
    np.testing.assert_allclose(state["m.a"], [0.005, 0])
    p = {"a": np.array([1.0])}
    adam = optimizers.Adam(0.1, eps_hat=True, eps=1e-3)
    adam.update(p, {"a": np.array([0.5])}, adam.init(p))
    root = np.sqrt(0.001)
    move = 0.1 * root / 0.1 * (0.1 * 0.5) / (root * 0.5 + 1e-3)
    np.testing.assert_allclose(p["a"], 1 - move)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_optimizers_change_long_vectors_in_pieces_and_in_their_own_type(
    optimizer, monkeypatch, sim
):
    p, g = draw((100,)), draw((100,), seed=1)
    whole, state = {"p": p.copy()}, optimizer.init({"p": p})
    optimizer.update(whole, {"p": g}, state)
    monkeypatch.setattr(_chunks, "CHUNK", 7)
    pieces, state = {"p": p.copy()}, optimizer.init({"p": p})
    optimizer.update(pieces, {"p": g}, state)
    np.testing.assert_array_equal(pieces["p"], whole["p"])
    assert pieces["p"].dtype == np.float32
    there = {"p": nnxp.to_backend(p, "sim")}
    state = optimizer.init(there)
    optimizer.update(there, {"p": nnxp.to_backend(g, "sim")}, state)
    np.testing.assert_allclose(nnxp.asnumpy(there["p"]), whole["p"], rtol=1e-6)


def test_schedules():
    cosine = schedules.Cosine(1.0, 10, last=0.2)
    assert (cosine(0), cosine(10), cosine(99)) == (1.0, pytest.approx(0.2), pytest.approx(0.2))
    assert cosine(5) == pytest.approx(0.6)
    warm = schedules.Warmup(4, cosine)
    assert [warm(i) for i in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert schedules.Linear(1.0, 4)(3) == 0.25
    assert schedules.Exponential(1.0, 0.5, 2)(4) == 0.25
    assert schedules.Steps(1.0, (2, 4))(4) == pytest.approx(0.01)
    assert optimizers.SGD(warm).rate_at(1) == 0.25
    with pytest.raises(OptionError, match="0 or more"):
        optimizers.SGD(-1.0)


def test_a_rate_falls_where_the_loss_does_not_as_torchs():
    torch = pytest.importorskip("torch")
    p = [torch.zeros(1, requires_grad=True)]
    other = torch.optim.SGD(p, 1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(other, factor=0.5, patience=2, min_lr=0.1)
    ours = schedules.Plateau(1.0, patience=2, decay=0.5, least=0.1)
    seen = np.random.default_rng(0).random(60).tolist()
    rates = []
    for i, loss in enumerate(seen):
        theirs.step(loss)
        rates.append(ours.after(seen[: i + 1]))
        assert rates[-1] == other.param_groups[0]["lr"]
    assert rates[0] == 1.0 > 0.1 == rates[-1]


def test_a_run_by_plateaus_steps_at_the_rate_of_its_losses(tmp_path):
    x, y = data(60)
    rate = schedules.Plateau(0.5, patience=0, decay=0.0, tolerance=0.9)  # no epoch is as good
    whole = fit(deep(), x, y, epochs=4, optimizer=nnxp.SGD(rate), fixed=["layers.2"])
    short = fit(deep(), x, y, epochs=2, optimizer=nnxp.SGD(rate), fixed=["layers.2"])
    learned = [n for n in whole.model.parameters() if not n.startswith("layers.2")]
    for name in learned:  # from the third epoch on the rate is 0
        np.testing.assert_array_equal(
            whole.model.parameters()[name], short.model.parameters()[name]
        )
    options = {"optimizer": nnxp.SGD(dataclasses.replace(rate, decay=0.5)), "fixed": ["layers.2"]}
    whole = fit(deep(), x, y, epochs=5, **options)
    path = tmp_path / "run.safetensors"
    fit(deep(), x, y, epochs=3, checkpoint=path, **options)
    assert_same_bits(fit(deep(), x, y, epochs=5, checkpoint=path, **options).model, whole.model)


def narrow(dtype):
    return nnxp.Sequential(nnxp.Dense(5, 16, "relu", rng=0), nnxp.Dense(16, 3, rng=1)).astype(dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_small_steps_add_up_in_16_bits(dtype, tmp_path):
    """Each step is smaller than half a unit of the parameters: only float32 masters keep them."""
    x, y = data()
    options = {"epochs": 12, "optimizer": nnxp.SGD(2e-4)}
    wide = fit(narrow(dtype).astype("float32"), x, y, **options).model
    model = narrow(dtype)
    found = fit(model, x, y, **options).model
    start = model.parameters()["layers.0.weight"].astype("float32")
    moved = found.parameters()["layers.0.weight"].astype("float32") - start
    wanted = wide.parameters()["layers.0.weight"] - start
    assert found.dtype == model.dtype
    assert abs(moved - wanted).mean() < 0.5 * abs(wanted).mean()
    path = tmp_path / "run.safetensors"
    fit(model, x, y, **options | {"epochs": 5, "checkpoint": path})
    assert_same_bits(fit(model, x, y, **options | {"checkpoint": path}).model, found)


def test_gradients_that_float16_does_not_hold_are_scaled():
    x, y = data()
    small = losses.MeanSquare()
    target = np.zeros((200, 3), "float32")

    def tiny(model, x, t):
        return small(model, x, t) * 2e-6  # its gradients are below the smallest number of float16

    options = {"loss": tiny, "epochs": 2, "optimizer": nnxp.SGD(1e4)}
    found = fit(narrow("float16"), x, target, **options).model
    wide = fit(narrow("float16").astype("float32"), x, target, **options).model
    for name, p in found.parameters().items():
        np.testing.assert_allclose(p, wide.parameters()[name], atol=4e-3, err_msg=name)
    trainer = Trainer(narrow("float16"), losses.cross_entropy, nnxp.SGD(0.1))
    before = trainer.vector.copy()
    scaled = x.astype("float16") * 30
    for _ in range(20):
        trainer.step((scaled, y), None)
    assert 1 <= trainer.state["scale"] < 2**15  # too large a scale is halved
    assert np.isfinite(trainer.vector).all()
    assert (trainer.vector != before).any()


def test_clipping_is_by_the_norm_of_all_gradients_together():
    g = {"a": np.array([3.0]), "b": np.array([[4.0]])}
    clipped = optimizers.clip_by_norm(g, 1.0)
    np.testing.assert_allclose([clipped["a"][0], clipped["b"][0, 0]], [0.6, 0.8])
    assert optimizers.clip_by_norm(g, 10.0)["a"] == 3


def test_fit_clips_by_the_norm_of_all_gradients_together():
    x, y = data()
    model = nnxp.Sequential(nnxp.Dense(5, 8, rng=0), nnxp.Dense(8, 3, rng=1))
    for clip, moved in ((1e-3, 1e-3), (None, 1e-2)):
        fitted = fit(model, x, y, epochs=1, batch=200, clip=clip, optimizer=nnxp.SGD(1.0))
        pairs = zip(fitted.model.parameters().values(), model.parameters().values(), strict=True)
        norm = np.sqrt(sum(((a - b) ** 2).sum() for a, b in pairs))
        assert norm == pytest.approx(moved, rel=1e-3) if clip else norm > moved


# training forms


def test_dropout_drops_in_training_and_nowhere_else():
    model = nnxp.Sequential(nnxp.Dropout(0.25), nnxp.Dense.of(np.eye(4, dtype="float32"), None))
    form = model.training()
    assert form.training() is form
    assert form.parameters().keys() == model.parameters().keys()
    x = np.ones((2000, 4), "float32")
    with pytest.raises(OptionError, match="training form"):
        form(x)
    step = nnxp.value_and_gradients(lambda m, x: m(x).mean())
    with pytest.raises(OptionError, match="rng="):
        step(form, x)
    y, found = step(form, x, rng=0)
    assert y != step(form, x, rng=1)[0]
    assert y == step(form, x, rng=0)[0]
    assert abs(y - 1) < 0.05
    kept = np.unique(found["layers.1.weight"])
    assert len(kept) == 4  # another number of rows was kept in each column
    assert step(model, x)[0] == 1


def test_batch_norm_normalises_by_the_batch_and_tells_running_statistics():
    torch = pytest.importorskip("torch")
    x = draw((6, 4, 3), "float64") * 2 + 1
    ours, theirs = nnxp.BatchNorm(3, dtype="float64"), torch.nn.BatchNorm1d(3).double()
    y = theirs(torch.tensor(x.reshape(-1, 3)))
    (y**3).mean().backward()
    form = ours.training()
    loss, found = nnxp.value_and_gradients(lambda m, x: (m(x) ** 3).mean())(form, x)
    np.testing.assert_allclose(loss, (y**3).mean().item(), atol=1e-14)
    np.testing.assert_allclose(found["gain"], theirs.weight.grad.numpy(), rtol=1e-10)
    np.testing.assert_allclose(found["bias"], theirs.bias.grad.numpy(), rtol=1e-10)
    trainer = Trainer(ours, lambda m, x, t: (m(x) ** 3).mean(), optimizers.SGD(0.0))
    trainer.step((x, x[:, 0]), None)
    after = trainer.model_now()
    np.testing.assert_allclose(after.mean, theirs.running_mean.numpy(), rtol=1e-12)
    np.testing.assert_allclose(after.var, theirs.running_var.numpy(), rtol=1e-12)
    assert (ours.mean == 0).all()


# runs


def data(count=200, dtype="float32"):
    x = draw((count, 5), dtype)
    return x, (x @ draw((5, 3), dtype, 5)).argmax(axis=1)


def deep(dtype="float32"):
    return nnxp.Sequential(
        nnxp.Standardize(np.full(5, 0.1), np.full(5, 1.5)),
        nnxp.Dense(5, 16, "relu", rng=0, dtype=dtype),
        nnxp.BatchNorm(16, dtype=dtype),
        nnxp.Dropout(0.1),
        nnxp.Dense(16, 3, "softmax", rng=1, dtype=dtype),
    )


def fit(model, *args, **options):
    return nnxp.fit(model, *args, **{"loss": "cross_entropy", "batch": 32, "rng": 3} | options)


def assert_same_bits(a, b):
    for name, p in a.parameters().items():
        np.testing.assert_array_equal(p, b.parameters()[name], err_msg=name)


def test_fit_learns_and_leaves_the_model_as_it_is():
    x, y = data()
    model = deep()
    before = {n: p.copy() for n, p in model.parameters().items()}
    told = []
    fitted = fit(model, x, y, epochs=30, optimizer=nnxp.Adam(1e-2), validation=(x, y),
                 callback=told.append)  # fmt: skip
    assert (fitted.model(x).argmax(axis=1) == y).mean() > 0.95
    assert fitted.history[-1]["loss"] < fitted.history[0]["loss"] / 3
    assert [entry["epoch"] for entry in told] == list(range(1, 31))
    assert fitted.history == told
    np.testing.assert_allclose(
        fitted.history[-1]["validation"], losses.cross_entropy(fitted.model, x, y), rtol=1e-5
    )
    for name, p in model.parameters().items():
        np.testing.assert_array_equal(p, before[name])
    statistics = fitted.model.layers[0].mean, fitted.model.layers[2].mean
    np.testing.assert_array_equal(statistics[0], before["layers.0.mean"])  # it does not learn
    assert statistics[1].any()  # it was recorded


def test_the_same_rng_gives_the_same_bits_and_another_others():
    x, y = data()
    one, two, other = (fit(deep(), x, y, epochs=2, rng=rng).model for rng in (3, 3, 4))
    assert_same_bits(one, two)
    assert (one.parameters()["layers.1.weight"] != other.parameters()["layers.1.weight"]).any()


def test_numpy_and_the_simulated_device_train_alike(sim):
    x, y = data()
    here = fit(deep(), x, y, epochs=3, validation=(x, y), clip=0.5)
    there = fit(deep().to("sim"), x, y, epochs=3, validation=(x, y), clip=0.5)
    assert there.model.place == "sim:0"
    for a, b in zip(here.history, there.history, strict=True):
        np.testing.assert_allclose([a["loss"], a["validation"]], [b["loss"], b["validation"]], 1e-4)
    for name, p in here.model.parameters().items():
        moved = nnxp.asnumpy(there.model.parameters()[name])
        np.testing.assert_allclose(moved, p, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("optimizer", [nnxp.Adam(1e-2), nnxp.SGD(1e-2)], ids=["Adam", "SGD"])
@pytest.mark.parametrize("stopped", [1, 9])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path, monkeypatch, optimizer, stopped):
    x, y = data()
    options = {"epochs": 3, "optimizer": optimizer, "validation": (x, y), "patience": 9}
    whole = fit(deep(), x, y, **options)
    steps = 0

    def interrupted(self, *args):
        nonlocal steps
        steps += 1
        if steps > stopped:
            raise KeyboardInterrupt
        return step(self, *args)

    step, path = Trainer.step, tmp_path / "run.safetensors"
    options |= {"checkpoint": path, "checkpoint_seconds": 0.0}
    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(deep(), x, y, **options)
    monkeypatch.setattr(Trainer, "step", step)
    resumed = fit(deep(), x, y, **options | {"rng": None})
    assert_same_bits(whole.model, resumed.model)
    assert [e["loss"] for e in whole.history] == [e["loss"] for e in resumed.history]
    more = fit(deep(), x, y, **options | {"epochs": 4})
    assert len(more.history) == 4
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    x, y = data()
    path = tmp_path / "run.safetensors"
    fit(deep(), x, y, epochs=1, checkpoint=path)
    others = [
        (nnxp.Sequential(nnxp.Dense(5, 3, rng=0)), x, y, {}, "another model"),
        (deep(), x + 1, y, {}, "another data"),
        (deep(), x, y, {"optimizer": nnxp.SGD()}, "another optimizer"),
        (deep(), x, y, {"batch": 16}, "another batch"),
        (deep(), x, y, {"rng": 4}, "another rng"),
        (deep(), x, y, {"loss": losses.CrossEntropy(0.1)}, "another loss"),
    ]
    for model, a, b, options, said in others:
        with pytest.raises(CheckpointError, match=said):
            fit(model, a, b, epochs=2, checkpoint=path, **options)
    nnxp.save(deep(), path)
    with pytest.raises(CheckpointError, match=r"nnxp\.load"):
        fit(deep(), x, y, epochs=2, checkpoint=path)
    path.write_bytes(b"no file of ours")
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        fit(deep(), x, y, epochs=2, checkpoint=path)


def test_training_ends_when_validation_gets_no_better_and_the_best_model_is_kept():
    x, y = data(60)
    other = (x, np.roll(y, 1))
    fitted = fit(deep(), x, y, epochs=200, optimizer=nnxp.Adam(3e-2), validation=other, patience=4)
    seen = [entry["validation"] for entry in fitted.history]
    assert len(seen) == int(np.argmin(seen)) + 1 + 4 < 200
    np.testing.assert_allclose(losses.cross_entropy(fitted.model, *other), min(seen), rtol=1e-5)


def test_a_loss_that_is_no_number_stops_the_run_with_epoch_and_batch():
    x, y = data()
    x[np.sort(order_of(len(x), 3, 0)[64:65])] = np.nan
    with pytest.raises(TrainingError, match="epoch 1, batch 3"):
        fit(nnxp.Sequential(nnxp.Dense(5, 3, rng=0)), x, y)


@pytest.mark.parametrize("options", [{}, {"workers": 2}, {"memory_limit": 9000}])
@pytest.mark.parametrize("scale", [1e30, 1e39, 1e300])
def test_rows_beyond_the_type_end_in_that_error_and_not_in_warnings(scale, options):
    x, _ = data(dtype="float64")
    model = nnxp.Sequential(nnxp.Dense(5, 3, rng=0))
    with pytest.raises(TrainingError, match=r"the loss is (inf|nan) in epoch 1, batch 1"):
        fit(model, x * scale, x[:, :3], loss="mean_square", **options)
    fitted = fit(model, x, x[:, :3], loss="mean_square", validation=(x * scale, x[:, :3]), epochs=1)
    assert not np.isfinite(fitted.history[0]["validation"])


def test_some_parameters_do_not_learn():
    x, y = data()
    model = deep()
    fitted = fit(model, x, y, epochs=1, fixed=["layers.1", "layers.4.bias"])
    same = [n for n, p in fitted.model.parameters().items() if (p == model.parameters()[n]).all()]
    assert same == ["layers.0.mean", "layers.0.scale", "layers.1.weight", "layers.1.bias",
                    "layers.4.bias"]  # fmt: skip
    with pytest.raises(OptionError, match=r"no 'layers\.9'"):
        fit(model, x, y, fixed=["layers.9"])


def test_fit_refuses_what_it_cannot_use():
    x, y = data()
    for options, said in (
        ({"loss": "cross entropy"}, "the names are mean_square"),
        ({"optimizer": "adam"}, "nnxp.Adam"),
        ({"patience": 3}, "validation="),
        ({"clip": 0}, "above zero"),
        ({"epochs": -1}, "whole number"),
    ):
        with pytest.raises(OptionError, match=said):
            fit(deep(), x, y, **options)
    with pytest.raises(ShapeError, match="go together"):
        fit(deep(), x, y[:-1])
    with pytest.raises(OptionError, match="labels go from 0 to 3, but the model has 3 outputs"):
        fit(deep(), x, y + (y == 2))
    with pytest.raises(OptionError, match="no parameters that learn"):
        fit(nnxp.Sequential(nnxp.Flatten()), x, y)
    with pytest.raises(NotDifferentiable):
        fit(nnxp.Dense(5, 3, rng=0), x, y, loss=lambda m, x, t: float(m(x).mean()))


def test_the_order_of_rows_follows_from_seed_and_epoch():
    one = order_of(1000, 3, 0)
    assert sorted(one) == list(range(1000))
    np.testing.assert_array_equal(one, order_of(1000, 3, 0))
    assert (one != order_of(1000, 3, 1)).any()
    blocks = order_of(5000, 3, 0, block=64)
    assert sorted(blocks) == list(range(5000))
    assert np.ptp(blocks[: 16 * 64]) > 64
    assert len(np.unique(blocks[: 16 * 64] // 64)) <= 17  # blocks of 64 rows stay together,
    assert (np.diff(blocks) == 1).mean() < 0.05  # and their rows are mixed
    assert [len(each) for each in batches_of(np.arange(10), 4)] == [4, 4, 2]
    assert [len(each) for each in batches_of(np.arange(9), 4)] == [4, 5]  # never a single row


def test_rows_come_from_a_file_and_of_any_type(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 255, (300, 5), dtype="uint8"), rng.integers(0, 3, 300)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    model = nnxp.Sequential(
        nnxp.Standardize(np.full(5, 127.0), np.full(5, 74.0)), nnxp.Dense(5, 3, rng=0)
    )
    assert Rows(model, x, y).in_memory > Rows(model, mapped, y).in_memory
    assert_same_bits(fit(model, mapped, y, epochs=2).model, fit(model, mapped, y, epochs=2).model)
    fitted = fit(model, list(x), y, epochs=1, weights=np.ones(300))
    assert_same_bits(fitted.model, fit(model, x, y, epochs=1, weights=np.ones(300)).model)


def test_rows_are_rounded_behind_a_first_standardize_and_not_before():
    """float32 holds seconds since 1970 to two minutes: what is 3600 apart is not to be lost."""
    x, y = data(200, "float64")
    times = x * 3600 + 1.6e9
    model = nnxp.Sequential(
        nnxp.Sequential(nnxp.Standardize(np.full(5, 1.6e9), np.full(5, 3600.0))), *deep().layers[1:]
    )
    plain = deep().with_parameters(
        deep().parameters() | {"layers.0.mean": np.zeros(5), "layers.0.scale": np.ones(5)}
    )
    one = fit(model, times, y, epochs=3, validation=(times, y))
    two = fit(plain, x.astype("float32"), y, epochs=3, validation=(x, y))
    np.testing.assert_allclose(one.history[-1]["loss"], two.history[-1]["loss"], rtol=1e-4)
    seconds = np.rint(times).astype("int64")
    three = fit(model, seconds, y, epochs=3, validation=(seconds, y))
    np.testing.assert_allclose(three.history[-1]["loss"], two.history[-1]["loss"], rtol=1e-3)
    assert one.model.parameters().keys() == model.parameters().keys()
    assert type(one.model.layers[0].layers[0]) is nnxp.Standardize


class Sum(nnxp.Layer):
    a: nnxp.Dense
    b: nnxp.Dense

    def __call__(self, left, right):
        return self.a(left) + self.b(right)


def test_a_model_of_several_inputs_learns_from_a_tuple_or_a_dict():
    model = Sum.of(nnxp.Dense(5, 3, rng=0), nnxp.Dense(2, 3, rng=1))
    x, y = data()
    more = draw((200, 2), seed=2)
    one = fit(model, (x, more), y, epochs=2, loss=losses.cross_entropy)
    two = fit(model, {"right": more, "left": x}, y, epochs=2, loss=losses.cross_entropy)
    assert_same_bits(one.model, two.model)


def test_public_names_are_there():
    assert {"fit", "Fitted", "Adam", "losses"} <= {*dir(nnxp)}
    assert dataclasses.is_dataclass(nnxp.Fitted)


KILLED = """
import os, signal, sys, test_training as t
from nnxp.training.trainer import Trainer

step, steps = Trainer.step, 0

def killed(self, *given):
    global steps
    steps += 1
    if steps > 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *given)

options = {"epochs": 5, "optimizer": t.nnxp.Adam(1e-2), "validation": t.data(), "patience": 9}
run = options | {"checkpoint": "run.safetensors", "checkpoint_seconds": 0.0}
for _ in range(10):
    if not (child := os.fork()):
        Trainer.step = killed
        t.fit(t.deep(), *t.data(), **run)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
Trainer.step = killed
steps = -2                                  # 5 of the 35 steps are left
t.assert_same_bits(t.fit(t.deep(), *t.data(), **run).model,
                   (setattr(Trainer, "step", step), t.fit(t.deep(), *t.data(), **options))[1].model)
print("the same")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked, to be killed")
def test_a_run_that_was_killed_ten_times_ends_with_the_same_bits(tmp_path):
    paths = [str(Path(__file__).parent), str(Path(nnxp.__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-c", KILLED], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout == "the same\n", done.stderr


def test_more_rows_than_memory_are_read_a_batch_at_a_time(tmp_path):
    x = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", "float32", (40_000, 100))
    x[:] = draw((100,))
    y = np.arange(40_000) % 3
    tracemalloc.start()
    try:
        fit(nnxp.Sequential(nnxp.Dense(100, 3, rng=0)), x, y, epochs=1, batch=1024)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < x.nbytes / 4


# what networks can do


def error_of_width(width):
    """The largest error of one hidden layer on a continuous function, in units of one."""
    x = np.linspace(-1, 1, 256, dtype="float32")[:, None]
    y = np.sin(3 * np.pi * x[:, 0]) + abs(x[:, 0])
    rng = np.random.default_rng(0)
    slopes = rng.uniform(3, 12, (1, width)) * rng.choice([-1, 1], (1, width))
    first = nnxp.Dense.of(
        slopes.astype("float32"), (-slopes[0] * np.linspace(-1, 1, width)).astype("float32"), "tanh"
    )
    net = nnxp.Sequential(first, nnxp.Dense(width, 1, rng=rng))
    rate = nnxp.schedules.Cosine(0.02, 1000)
    fitted = fit(net, x, y, loss="mean_square", optimizer=nnxp.Adam(rate), epochs=1000, batch=256)
    return float(abs(fitted.model(x)[:, 0] - y).max())


def test_the_error_of_one_hidden_layer_falls_with_its_width():
    """[Cybenko 1989; Hornik 1991]"""
    errors = [error_of_width(width) for width in (2, 8, 32, 128)]
    assert errors[0] > 1.0
    assert all(wider < 0.9 * narrower for narrower, wider in pairwise(errors))
    assert errors[-1] < 0.06


def test_depth_does_with_few_parameters_what_width_does_not():
    """A tent folded five times has 32 slopes: five layers of two units make it exactly, while one
    layer of as many parameters has too few slopes, however it is trained   [Telgarsky 2016]."""
    fold = nnxp.Dense.of(np.float32([[1, 1]]), np.float32([0, -0.5]), "relu")
    again = [
        nnxp.Dense.of(np.float32([[2, 2], [-4, -4]]), np.float32([0, -0.5]), "relu")
        for _ in range(4)
    ]
    deep = nnxp.Sequential(fold, *again, nnxp.Dense.of(np.float32([[2], [-4]])))
    x = np.linspace(0, 1, 1025, dtype="float32")[:, None]
    y = x[:, 0]
    for _ in range(5):
        y = 1 - abs(2 * y - 1)
    assert abs(deep(x)[:, 0] - y).max() < 1e-5
    width = (deep.parameter_count - 1) // 3 + 1
    knots = np.linspace(0, 1, width, endpoint=False, dtype="float32")
    wide = nnxp.Sequential(
        nnxp.Dense.of(np.ones((1, width), "float32"), -knots, "relu"), nnxp.Dense(width, 1, rng=0)
    )
    assert wide.parameter_count >= deep.parameter_count
    trained = fit(wide, x, y, loss="mean_square", optimizer=nnxp.Adam(0.01), epochs=100, batch=257)
    assert abs(trained.model(x)[:, 0] - y).max() > 0.3
    learned = fit(deep, x, y, loss="mean_square", optimizer=nnxp.SGD(1e-4), epochs=1).model
    assert abs(learned(x)[:, 0] - y).max() < 1e-3  # and stays there


# workers


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("uses", [trainer.PIECE_USES, 1])  # two pieces, and four
def test_any_number_of_workers_gives_the_same_bits(weighted, uses, monkeypatch):
    monkeypatch.setattr(trainer, "PIECE_USES", uses)
    monkeypatch.setattr(trainer, "ADDED", 10)  # so that threads share these few numbers, too
    x, y = data(700)
    weights = np.arange(700) % 3 + 1.0 if weighted else None
    options = {"epochs": 2, "batch": 300, "weights": weights, "clip": 0.5}
    options["loss"] = losses.CrossEntropy(class_weights=(1.0, 2.0, 5.0))
    found = [fit(deep(), x, y, workers=n, **options) for n in (1, 2, 5)]
    for each in found[1:]:
        assert_same_bits(each.model, found[0].model)
        assert [e["loss"] for e in each.history] == [e["loss"] for e in found[0].history]


def test_workers_come_to_the_gradients_of_the_whole_batch():
    """By rows, and by their weights, where pieces differ in both."""
    x, y = data(300, "float64")
    for weights in ((), (np.arange(300.0) ** 2,), (np.maximum(np.arange(300.0) - 200, 0),)):
        loss = losses.CrossEntropy(class_weights=(1.0, 2.0, 5.0))
        one, two = (Trainer(net(), loss, nnxp.SGD(0.1), workers=n) for n in (None, 2))
        pair = [float(each.step((x, y, *weights), None)) for each in (one, two)]
        np.testing.assert_allclose(pair[1], pair[0], rtol=1e-12)
        np.testing.assert_allclose(two.slopes, one.slopes, rtol=1e-9, atol=1e-14)
        np.testing.assert_allclose(two.vector, one.vector, rtol=1e-9)


def test_a_batch_without_weight_is_told_with_workers_as_without():
    x, y = data(300)
    for workers in (None, 2):
        with pytest.raises(TrainingError, match="epoch 1"):
            fit(net(), x, y, weights=np.zeros(300), batch=300, workers=workers)


def test_a_run_that_cut_its_batches_otherwise_is_not_gone_on_with(tmp_path, monkeypatch):
    x, y = data(300)
    options = {"batch": 150, "workers": 2, "checkpoint": tmp_path / "run.nnxp", "rng": 0}
    fit(net(), x, y, epochs=1, **options)
    fit(net(), x, y, epochs=2, **options)
    monkeypatch.setattr(trainer, "PIECE_USES", 7)
    with pytest.raises(CheckpointError, match="pieces"):
        fit(net(), x, y, epochs=3, **options)


def test_pieces_are_smaller_where_a_row_uses_a_weight_more_often():
    def pieces(model, rows):
        trainer = Trainer(model, losses.mean_square, nnxp.SGD(), workers=2)
        shape = trainer.model.output_shape((1, 8, 8, 3))[1:]
        batch = [np.zeros((rows, *each), "float32") for each in ((8, 8, 3), shape)]
        return len(trainer._cuts(batch)) - 1

    dense = nnxp.Sequential(nnxp.Flatten(), nnxp.Dense(192, 4, rng=0))
    conv = nnxp.Sequential(nnxp.Conv(3, 4, (3, 3), rng=0), nnxp.Flatten())
    assert [pieces(dense, rows) for rows in (127, 128, 3000, 5000, 50_000)] == [1, 2, 2, 4, 16]
    assert [pieces(conv, rows) for rows in (127, 128, 200, 300, 1024, 5000)] == [1, 2, 3, 4, 16, 16]


def test_workers_of_a_device_and_none_are_refused(sim):
    x, y = data()
    with pytest.raises(OptionError, match="threads of the CPU"):
        fit(net(dtype="float32").to("sim"), x, y, workers=2)
    with pytest.raises(OptionError, match="workers"):
        fit(net(dtype="float32"), x, y, workers=0)
    failing = Trainer(net(), losses.mean_square, nnxp.SGD(), workers=2)
    with pytest.raises(ShapeError):
        failing.step((rows(count=200), rows(count=200)[:, :2]), None)


# a memory limit


@pytest.mark.parametrize("weighted", [None, np.arange(300.0) ** 2, np.arange(300.0) // 299])
@pytest.mark.parametrize("workers", [None, 2])
def test_parts_that_a_limit_holds_come_to_the_gradients_of_the_whole_batch(weighted, workers):
    x, y = data(300, "float64")
    rows, ids = Rows(net(), x, y, weighted), np.arange(300)
    loss = losses.CrossEntropy(class_weights=(1.0, 2.0, 5.0))
    whole, parted = (
        Trainer(net(), loss, nnxp.SGD(0.1), workers=workers, memory_limit=limit)
        for limit in (None, "24 kB")
    )
    pair = [float(each.step_on(rows, ids, None)) for each in (whole, parted)]
    assert 3 < len(parted._cut(rows, ids, True)) < 30
    np.testing.assert_allclose(pair[1], pair[0], rtol=1e-12)
    np.testing.assert_allclose(parted.slopes, whole.slopes, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(parted.vector, whole.vector, rtol=1e-9)
    pair = [each.evaluate_on(rows, [ids]) for each in (whole, parted)]
    np.testing.assert_allclose(pair[1], pair[0], rtol=1e-9)


def test_a_limit_that_holds_no_row_is_refused_with_what_one_takes():
    x, y = data()
    model = nnxp.Sequential(nnxp.Dense(5, 3, rng=0))
    with pytest.raises(nnxp.OutOfMemory, match="parameters and gradients aside") as refused:
        fit(model, x, y, memory_limit=100)
    needs = int(re.search(r"needs ([\d,]+)", str(refused.value))[1].replace(",", ""))
    fit(model, x, y, epochs=1, memory_limit=needs)  # a row at a time
    with pytest.raises(nnxp.OutOfMemory):
        fit(model, x, y, epochs=1, memory_limit=needs - 1)


def test_a_batch_is_not_cut_whose_statistics_are_learned():
    x, y = data()
    whole = fit(deep(), x, y, epochs=1)
    assert_same_bits(fit(deep(), x, y, epochs=1, memory_limit="1 MB").model, whole.model)
    with pytest.raises(OptionError, match=r"layers\.2\.mean, layers\.2\.var are learned"):
        fit(deep(), x, y, memory_limit="4 kB")


def test_the_same_limit_gives_the_same_bits_and_goes_on_to_them(tmp_path):
    x, y = data()
    model = nnxp.Sequential(
        nnxp.Dense(5, 8, "tanh", rng=0), nnxp.Dropout(0.2), nnxp.Dense(8, 3, rng=1)
    )
    options = {"memory_limit": 4000, "validation": (x, y)}
    whole = fit(model, x, y, epochs=3, **options)
    options["checkpoint"] = tmp_path / "run.safetensors"
    fit(model, x, y, epochs=1, **options)
    assert_same_bits(fit(model, x, y, epochs=3, **options).model, whole.model)
    with pytest.raises(CheckpointError, match="another batch: 32 within 4000 bytes, not 32"):
        fit(model, x, y, epochs=4, **options | {"memory_limit": None})


def test_a_limit_is_kept_on_a_device_and_by_16_bits(sim):
    x, y = data()
    model = net(dtype="float32")
    wanted = fit(model, x, y, epochs=2)
    there = fit(model.to("sim"), x, y, epochs=2, memory_limit=4000)
    np.testing.assert_allclose(there.history[1]["loss"], wanted.history[1]["loss"], rtol=1e-4)
    half = fit(model.astype("float16"), x, y, epochs=2, memory_limit=4000)
    np.testing.assert_allclose(half.history[1]["loss"], wanted.history[1]["loss"], rtol=1e-2)


def test_more_rows_than_a_limit_holds_train_within_it(tmp_path):
    x = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", "float32", (20_000, 100))
    x[:] = draw((100,))
    y = np.arange(20_000) % 3
    model = nnxp.Sequential(nnxp.Dense(100, 64, "relu", rng=0), nnxp.Dense(64, 3, rng=0))
    tracemalloc.start()
    try:
        fit(model, x, y, epochs=1, batch=8192, memory_limit="2 MB", validation=(x[:5000], y[:5000]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    aside = 20_000 * 16 + 5 * sum(p.nbytes for p in model.parameters().values())
    assert peak < 2_000_000 + aside < 8192 * 400  # the bytes of a batch


def test_a_device_holds_what_a_limit_allows(sim):
    x, y = draw((2000, 100)), np.arange(2000) % 3
    model = nnxp.Sequential(nnxp.Dense(100, 64, "relu", rng=0), nnxp.Dense(64, 3, rng=0)).to("sim")
    peaks = []
    for limit in (None, "300 kB"):
        sim.peak = before = sim.used
        fit(model, x, y, epochs=1, batch=1000, memory_limit=limit)
        peaks.append(sim.peak - before)
    aside = 6 * sum(p.nbytes for p in model.parameters().values())
    assert peaks[1] < 300_000 + aside < peaks[0] / 2


# what does not fit is refused, or told why


def saved(folder, name, rows):
    """Rows in a file, read as they are asked for."""
    np.save(folder / f"{name}.npy", rows)
    return np.load(folder / f"{name}.npy", mmap_mode="r")


def test_targets_that_mean_nothing_to_their_loss_are_refused(tmp_path):
    x, y = data()
    one = np.eye(3)[y]
    for loss, target, said in (
        ("cross_entropy", y - 1, "labels go from -1 to 1"),
        ("cross_entropy", y + 1, "labels go from 1 to 3"),
        ("cross_entropy", saved(tmp_path, "below", y - 1), "labels go from -1 to"),
        ("cross_entropy", saved(tmp_path, "above", y + 1), "labels go from . to 3"),
        ("cross_entropy", -one, "probabilities of the classes go from -1"),
        ("cross_entropy", 10 * one, "sum to up to 10, not to 1"),
        ("cross_entropy", one + one[:, ::-1], "binary_cross_entropy"),
        ("cross_entropy", np.where(one, np.nan, 0), "nan"),
        ("binary_cross_entropy", 2 * one - 1, "go from -1 to 1"),
        ("binary_cross_entropy", 2 * one, "go from 0 to 2"),
        ("binary_cross_entropy", np.where(one, np.nan, 0), "go from nan"),
    ):
        with pytest.raises(OptionError, match=said):
            fit(net(), x, target, loss=loss)
        with pytest.raises(OptionError, match=said):
            fit(net(), x, one if loss[0] == "b" else y, loss=loss, validation=(x, target))
    for target in (y.astype("float64"), y > 0):
        with pytest.raises(ShapeError, match=r"y\.astype\('int64'\)"):
            fit(net(), x, target)
    for target in (y[:, None], one.astype("int64")):
        with pytest.raises(ShapeError, match="argmax"):
            fit(net(), x, target)
    with pytest.raises(OptionError, match="with one output it is 0"):
        fit(net(outputs=1), x, y > 0)
    with pytest.raises(nnxp.DtypeMismatch, match="the target: rows are real numbers"):
        fit(net(), x, np.array(list("abc"))[y])


def test_losses_outside_of_fit_refuse_labels_that_no_class_has(sim):
    x, y = data(dtype="float64")
    for gradients in (losses.cross_entropy, nnxp.value_and_gradients(losses.cross_entropy)):
        with pytest.raises(OptionError, match="labels go from -1 to 1"):
            gradients(net(), x, y - 1)
        with pytest.raises(nnxp.IdError, match="names nothing"):
            gradients(net(), x, y + 1)
        with pytest.raises(OptionError, match=r"numpy\.asarray"):
            gradients(net(), x, y.tolist())
        with pytest.raises(ShapeError, match="no rows"):
            gradients(net(), x[:0], y[:0])


def test_targets_of_a_loss_may_be_constants_of_a_formula():
    x, y = data(dtype="float64")
    loss, gradients = nnxp.value_and_gradients(lambda m, x: losses.cross_entropy(m, x, y))(net(), x)
    wanted = nnxp.value_and_gradients(losses.cross_entropy)(net(), x, y)
    np.testing.assert_allclose(loss, wanted[0], rtol=1e-12)
    for name, g in gradients.items():
        np.testing.assert_allclose(g, wanted[1][name], rtol=1e-12)


def test_weights_are_one_number_of_0_or_more_for_each_row(tmp_path):
    x, y = data()
    for weights, said in (
        (np.ones((200, 1)), r"one number for each row, not \[200, 1\]"),
        (np.ones((200, 3)), "one number for each row"),
    ):
        with pytest.raises(ShapeError, match=said):
            fit(net(), x, y, weights=weights)
        with pytest.raises(ShapeError, match="one number for each row"):
            losses.cross_entropy(net(), x.astype("float64"), y, weights)
    for wrong in (-1.0, np.nan, np.inf):
        weights = np.where(y == 0, wrong, 1)
        for given in (weights, saved(tmp_path, "weights", weights)):
            with pytest.raises(OptionError, match="finite numbers, 0 or more"):
                fit(net(), x, y, weights=given)


def test_validation_counts_rows_by_their_weights_whatever_the_batch():
    x, y = data(dtype="float64")
    order = np.argsort(y)  # batches differ in what they count
    x, y = x[order], y[order]
    weights, loss = np.arange(200.0) ** 2, losses.CrossEntropy(class_weights=[1, 20, 3])
    for given in ((), (weights,)):
        for limit in (None, "24 kB"):
            fitted = fit(net(), x, y, loss=loss, validation=(x, y, *given), batch=64, epochs=1,
                         memory_limit=limit)  # fmt: skip
            due = loss(fitted.model, x, y, *given)
            np.testing.assert_allclose(fitted.history[0]["validation"], due, rtol=1e-10)


@pytest.mark.parametrize("options", [{}, {"workers": 2}, {"memory_limit": 9000}])
def test_a_loss_that_is_no_number_is_told_with_its_reason(options):
    x, y = data()
    bad, target = x.copy(), np.eye(3, dtype="float32")[y]
    bad[7, 2], target[9, 1] = np.inf, np.nan
    ids = np.arange(1000).reshape(200, 5) % 9
    named = nnxp.Sequential(nnxp.Embedding(8, 4, rng=0), nnxp.Flatten(), nnxp.Dense(20, 3, rng=1))
    one = nnxp.Sequential(nnxp.Dense(5, 3, rng=0))
    for model, rows, due, more, said in (
        (one, bad, y, {}, "its rows hold NaN, or what is infinite in float32"),
        (one, x, target, {"loss": "mean_square"}, "its targets hold NaN"),
        (named, ids, y, {}, r"ids are 0 to 7, but .* such as 8"),
        (one, x, y, {"weights": np.zeros(200)}, "sample weights are all 0"),
        (one, x, y, {"weights": np.arange(200) == 3}, "sample weights are all 0"),
        (one, x, y * 0, {"loss": losses.CrossEntropy(class_weights=(0, 1, 1))},
         "class weights are all 0"),
    ):  # fmt: skip
        with pytest.raises(TrainingError, match=rf"in epoch 1, batch \d: .*{said}"):
            fit(model, rows, due, **{"batch": 150} | options | more)


def test_weights_of_classes_count_in_parts_on_a_device(sim):
    x, y = data()
    options = {"loss": losses.CrossEntropy(class_weights=(1, 2, 3)), "validation": (x, y)}
    one = fit(net(dtype="float32"), x, y, epochs=2, **options)
    two = fit(net(dtype="float32").to("sim"), x, y, epochs=2, memory_limit=6000, **options)
    for name in ("loss", "validation"):
        np.testing.assert_allclose(two.history[1][name], one.history[1][name], rtol=1e-5)


def test_options_of_fit_that_mean_nothing_are_refused_before_it_trains(tmp_path, sim):
    x, y = data()
    for options, said in (
        ({"validation": x}, r"validation is \(x, y\)"),
        ({"validation": 0.1}, r"validation is \(x, y\)"),
        ({"validation": (x, y), "patience": "a"}, "patience is a whole number"),
        ({"validation": (x, y), "patience": -1}, "patience is a whole number"),
        ({"clip": "1"}, "above zero"),
        ({"fixed": None}, "fixed are names"),
        ({"checkpoint": tmp_path}, "is a folder"),
        ({"checkpoint": tmp_path / "none" / "run"}, "there is no folder"),
        ({"checkpoint": 3}, "the path of a file"),
        ({"checkpoint_seconds": "a"}, "0 or more"),
        ({"callback": "a"}, "a function"),
        ({"loss": lambda y, target: abs(y - target).mean()}, r"called with \(model, x, target\)"),
        ({"loss": losses.CrossEntropy}, "a class is to be called first"),
        ({"loss": lambda m, x, t: m(x).mean(), "weights": y}, r"target, weights\)"),
    ):
        with pytest.raises(OptionError, match=said):
            fit(net(), x, y, **options)
    with pytest.raises(ShapeError, match="targets are one array"):
        fit(net(), x, (y, y))
    with pytest.raises(nnxp.DeviceMismatch, match="model is on the CPU, but x on sim:0"):
        fit(net(dtype="float32"), nnxp.to_backend(x, sim), y)


def test_sparse_rows_are_dense_where_they_are_read():
    sparse = pytest.importorskip("scipy.sparse")
    x, y = data()
    x[x < 0.5] = 0
    one, two = (fit(net(dtype="float32"), sparse.csr_matrix(x), y, epochs=1) for _ in range(2))
    assert_same_bits(one.model, two.model)
    np.testing.assert_allclose(
        fit(net(), sparse.csr_matrix(x), y, epochs=1, batch=200).history[0]["loss"],
        losses.cross_entropy(net(), x.astype("float64"), y), rtol=1e-12,
    )  # fmt: skip


class Gain(nnxp.Layer):
    """x * gain, which looks at its numbers."""

    gain: nnxp.Array

    def __init__(self):
        self.gain = np.ones(5)

    def __call__(self, x):
        return x * self.gain if float(x.max()) > 1 else x


class Shifted(Gain):
    """A layer whose training form is a mistake."""

    def __call__(self, x):
        return x * self.gain

    def training(self):
        return Shift.of(self.gain)


class Shift(nnxp.Layer):
    shift: nnxp.Array

    def __call__(self, x):
        return x + self.shift


class Formless(Shifted):
    def training(self):
        return None


def test_parameters_of_a_layer_that_is_run_as_python_do_not_pass_for_learned():
    x, y = data(dtype="float64")
    model = nnxp.Sequential(Gain(), *net().layers)
    for train in (fit, nnxp.value_and_gradients(losses.cross_entropy)):
        with pytest.raises(NotDifferentiable, match=r"layers\.0\.gain cannot learn.*float\(x\)"):
            train(model, x, y)
    fit(model, x, y, epochs=1, fixed="layers.0")


def test_training_forms_that_are_none_are_refused():
    x, y = data()
    with pytest.raises(OptionError, match=r"layers\.2 is in its training form already"):
        fit(deep().training(), x, y)
    with pytest.raises(OptionError, match=r"other names: layers\.0\.shift"):
        fit(nnxp.Sequential(Shifted(), *net().layers), x, y)
    with pytest.raises(OptionError, match=r"layers\.0 .* answers a layer, not None"):
        fit(nnxp.Sequential(Formless(), *net().layers), x, y)


def test_losses_refuse_numbers_out_of_their_range():
    for make in (
        lambda: losses.CrossEntropy(smoothing="a"),
        lambda: losses.CrossEntropy(class_weights={0: 1, 1: 2}),
        lambda: losses.CrossEntropy(class_weights="balanced"),
        lambda: losses.CrossEntropy(class_weights=(1, -1)),
        lambda: losses.CrossEntropy(class_weights=(0, 0)),
        lambda: losses.BinaryCrossEntropy(positive_weight=-1),
        lambda: losses.BinaryCrossEntropy(positive_weight="a"),
        lambda: losses.Huber("a"),
    ):
        with pytest.raises(OptionError):
            make()
    assert hash(losses.CrossEntropy(class_weights=np.ones(3)))
    with pytest.raises(ShapeError, match="2 class_weights for 3 classes"):
        losses.CrossEntropy(class_weights=(1, 2))(net(), rows(), LABELS)

    class Heads(nnxp.Layer):
        one: nnxp.Dense

        def __call__(self, x):
            return self.one(x), x

    with pytest.raises(OptionError, match="answers 2 results, but CrossEntropy is of one"):
        losses.cross_entropy(Heads.of(nnxp.Dense(5, 3, rng=0)), rows("float32"), LABELS)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nnxp.SGD("0.1"), lambda: nnxp.SGD(np.inf), lambda: nnxp.SGD(-1),
        lambda: nnxp.SGD(decay=np.nan), lambda: nnxp.SGD(decay=None),
        lambda: nnxp.Momentum(momentum=1.5), lambda: nnxp.Nesterov(momentum="a"),
        lambda: nnxp.RMSProp(beta=1), lambda: nnxp.RMSProp(eps=-1), lambda: nnxp.Adagrad(eps=-1),
        lambda: nnxp.Adam(beta1="a"), lambda: nnxp.Adam(eps=-1), lambda: nnxp.Lion(beta2=-1),
        nnxp.Optimizer,
        lambda: schedules.Warmup(-1, 0.1), lambda: schedules.Warmup(3, None),
        lambda: schedules.Cosine(0.1, 0), lambda: schedules.Cosine("a", 3),
        lambda: schedules.Cosine(0.1, 3, last=-1), lambda: schedules.Linear(0.1, 0),
        lambda: schedules.Exponential(0.1, -0.5), lambda: schedules.Exponential(0.1, 0.5, 0),
        lambda: schedules.Steps(0.1, 5), lambda: schedules.Steps(0.1, (1,), -1),
        lambda: schedules.Plateau("a"), lambda: schedules.Plateau(0.1, -1),
        lambda: optimizers.clip_by_norm({}, 1.0),
        lambda: optimizers.clip_by_norm({"p": np.ones(3)}, "a"),
    ],
)  # fmt: skip
def test_numbers_of_optimizers_and_schedules_have_their_range(make):
    with pytest.raises(OptionError):
        make()


def test_an_update_refuses_what_it_would_broadcast_or_cannot_change():
    adam, p = nnxp.Adam(), np.ones((3, 3))
    fixed = p.copy()
    fixed.setflags(write=False)
    for parameter, gradient, state, wanted in (
        (p, np.ones(3), adam.init({"p": p}), ShapeError),
        (p, p, nnxp.SGD().init({"p": p}), OptionError),
        (fixed, p, adam.init({"p": p}), OptionError),
        (np.ones((3, 3), "int64"), p, adam.init({"p": p}), nnxp.DtypeMismatch),
        ([1.0], p, adam.init({"p": p}), nnxp.DtypeMismatch),
    ):
        with pytest.raises(wanted):
            adam.update({"p": parameter}, {"p": gradient}, state)
    assert (p == 1).all()


def test_a_checkpoint_that_says_or_holds_something_else_is_refused(tmp_path):
    x, y = data()
    path = tmp_path / "run.safetensors"
    options = {"checkpoint": path, "validation": (x, y), "patience": 9}
    fit(deep(), x, y, epochs=2, **options)
    arrays, about = checkpoint.read_run(path)
    for change in (
        {"epoch": 7}, {"epoch": True}, {"batch": 10**9}, {"history": [1, 2]}, {"history": [{}, {}]},
        {"lowest": "a"}, {"lowest_epoch": 99}, {"total": np.nan}, {"history": []},
    ):  # fmt: skip
        checkpoint.write_run(path, arrays, about | change)
        with pytest.raises(CheckpointError):
            fit(deep(), x, y, epochs=3, **options)
    for name, array in arrays.items():
        others = {n: a for n, a in arrays.items() if n != name}
        for more in ({}, {name: np.zeros((3, 3))}, {name: array.astype("int8")}):
            checkpoint.write_run(path, others | more, about)
            with pytest.raises(CheckpointError, match="does not hold this run"):
                fit(deep(), x, y, epochs=3, **options)
    checkpoint.write_run(path, arrays | {"state.more": np.zeros(3)}, about)
    with pytest.raises(CheckpointError, match=r"state\.more"):
        fit(deep(), x, y, epochs=3, **options)
    checkpoint.write_run(path, arrays, about)
    assert len(fit(deep(), x, y, epochs=3, **options).history) == 3


class Weighted:
    """A loss, and a rate, that lies elsewhere in the memory of each process."""

    def __call__(self, model, x, target):
        return losses.cross_entropy(model, x, target)

    def rate(self, step):
        return 0.1 / (1 + step)


def test_functions_in_a_run_are_known_again_in_another_process(tmp_path):
    x, y = data()
    path = tmp_path / "run.safetensors"
    one, two = Weighted(), Weighted()
    fit(deep(), x, y, epochs=1, checkpoint=path, loss=one, optimizer=nnxp.SGD(one.rate))
    fit(deep(), x, y, epochs=2, checkpoint=path, loss=two, optimizer=nnxp.SGD(two.rate))
