"""Training on CUDA: the same numbers as on the CPU, by one graph a step."""

from __future__ import annotations

import cupy
import numpy as np
import pytest

import nnxp
from conftest import draw
from nnxp.backend import cuda
from nnxp.backend._device import Unrecordable
from nnxp.backend._recording import StepRecording, recorded
from nnxp.training import _chunks, trainer
from nnxp.training.trainer import Trainer

pytestmark = pytest.mark.parametrize("gpu", [True], ids=["as late as possible"], indirect=True)

NETS = {
    "dense": nnxp.Sequential(
        nnxp.Dense(6, 8, "tanh", rng=0), nnxp.LayerNorm(8), nnxp.Dense(8, 3, rng=1)
    ),
    "drops at random": nnxp.Sequential(
        nnxp.Dense(6, 8, rng=0), nnxp.BatchNorm(8), nnxp.Dropout(0.3), nnxp.Dense(8, 3, rng=1)
    ),
    "attention": nnxp.Sequential(
        nnxp.TransformerEncoderLayer(6, 2, 8, rng=0), nnxp.Dense(6, 3, rng=1)
    ),
}
ROWS = 44  # six batches of eight, of which the last is ragged


def fitted(net, x, target, **options):
    options = {"epochs": 3, "batch": 8, "rng": 0, "loss": "mean_square"} | options
    # Not Adam, which makes steps of what is but rounding: of a bias before a norm, or of keys.
    return nnxp.fit(net, x, target, optimizer=nnxp.Momentum(0.05), **options)


def rows_for(name):
    shape = (ROWS, 5) if name == "attention" else (ROWS,)
    return draw((*shape, 6)), draw((*shape, 3), seed=1)


def check(made, expected):
    """Measured: 1e-7 off at most, of parameters and losses about 1."""
    losses = [[epoch["loss"] for epoch in each.history] for each in (made, expected)]
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-6)
    parameters = made.model.parameters()
    for name, p in expected.model.parameters().items():
        np.testing.assert_allclose(parameters[name].get(), p, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", NETS)
def test_a_step_is_a_graph_from_the_third_batch_of_a_size_on(gpu, name):
    x, target = rows_for(name)
    expected = fitted(NETS[name], x, target)
    gpu.done.clear()
    check(fitted(NETS[name].to("cuda"), x, target), expected)
    gpu.finish()
    kinds = {kind for kind, _ in gpu.done}
    assert "graph's product" in kinds
    assert "cuBLAS" not in kinds


LOSSES = {
    "labels": nnxp.losses.CrossEntropy(),
    "smoothed": nnxp.losses.CrossEntropy(smoothing=0.1, class_weights=(1.0, 2.0, 0.5)),
    "probabilities": nnxp.losses.CrossEntropy(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_classes_are_learnt_as_on_the_cpu(gpu, name):
    x, target = draw((ROWS, 6)), np.random.default_rng(0).integers(0, 3, ROWS)
    if name == "probabilities":
        target = np.eye(3, dtype="float32")[target] * 0.8 + np.float32(0.2 / 3)
    expected = fitted(NETS["dense"], x, target, loss=LOSSES[name])
    gpu.done.clear()
    check(fitted(NETS["dense"].to("cuda"), x, target, loss=LOSSES[name]), expected)
    gpu.finish()
    assert "graph's product" in {kind for kind, _ in gpu.done}


def test_with_a_memory_limit_or_large_batches_nothing_is_recorded(gpu, monkeypatch):
    x, target = rows_for("dense")
    expected = fitted(NETS["dense"], x, target)
    check(fitted(NETS["dense"].to("cuda"), x, target, memory_limit="1 MiB"), expected)
    monkeypatch.setattr(nnxp.training.differentiate, "FEW_ROWS", 3)
    check(fitted(NETS["dense"].to("cuda"), x, target), expected)
    gpu.finish()
    assert not any(kind.startswith("graph") for kind, _ in gpu.done)


def test_what_cannot_be_recorded_is_trained_all_the_same(gpu, monkeypatch):
    tried = []

    def refuse(*_):
        tried.append(1)
        raise Unrecordable("no")

    monkeypatch.setattr(cuda.CudaBackend, "record", refuse)
    x, target = rows_for("dense")
    check(fitted(NETS["dense"].to("cuda"), x, target), fitted(NETS["dense"], x, target))
    assert len(tried) == 2  # once for each size of a batch


@pytest.mark.parametrize("by_turns", [False, True])
def test_a_step_is_recorded_in_the_order_of_the_caller_s_stream(gpu, by_turns):
    p, into = (nnxp.to_backend(np.zeros(4, "float32"), "cuda") for _ in range(2))
    x = nnxp.to_backend(draw((4,)), "cuda")
    gpu.finish()

    def run(own):
        into[...] = p * 2
        return (p + own[0],)

    for _ in range(100):  # streams that are not ordered take turns
        gpu.give(0, "yet to do", lambda: None)
    p += 1
    step = recorded(StepRecording, nnxp.get_backend("cuda"), run, run, [x])
    if by_turns:
        gpu.finish()
    np.testing.assert_array_equal(into.get(), [2] * 4)  # which waits for the caller's stream only
    for value in (3, 5):
        x[...] = value
        (y,) = step([x])
        np.testing.assert_array_equal(y.get(), [value + 1] * 4)
    step([x * 2])
    np.testing.assert_array_equal(x.get(), [5] * 4)  # it is the caller's


def test_gradients_that_are_asked_for_by_name_are_the_caller_s(gpu):
    net, (x, target) = NETS["dense"], rows_for("dense")
    there = [nnxp.to_backend(each, "cuda") for each in (x, target)]
    both = nnxp.value_and_gradients(nnxp.losses.mean_square)
    moved, first = net.to("cuda"), None
    for _ in range(4):
        _, gradients = both(moved, *there)
        kept = {name: g.get() for name, g in gradients.items()}
        assert first is None or all((first[name] == kept[name]).all() for name in kept)
        first = kept
        for g in gradients.values():
            g[...] = 0
    _, expected = both(net, x, target)
    for name, g in expected.items():
        np.testing.assert_allclose(first[name], g, rtol=0, atol=1e-6)


def test_an_optimiser_takes_a_vector_whole(gpu, monkeypatch):
    """In pieces that fit a core's cache, a device would wait for starts."""
    counts = []
    for chunk in (1 << 19, 16):
        monkeypatch.setattr(_chunks, "CHUNK", chunk)
        p, g = cupy.zeros(100, "float32"), cupy.ones(100, "float32")
        rule = nnxp.Adam(1e-2)
        state = rule.init({"p": p})
        gpu.finish()
        gpu.done.clear()
        rule.update({"p": p}, {"p": g}, state)
        gpu.finish()
        counts.append(sum(n for (kind, _), n in gpu.done.items() if kind == "CuPy's kernel"))
    assert counts[0] == counts[1]


RULES = [
    nnxp.SGD(nnxp.schedules.Linear(0.1, 30)),
    nnxp.Momentum(nnxp.schedules.Plateau(0.05, patience=0, tolerance=0.5), decay=0.01),
    nnxp.Nesterov(0.05),
    nnxp.Adagrad(0.05),
    nnxp.RMSProp(1e-3),
    nnxp.Adam(nnxp.schedules.Exponential(1e-2, 0.5, 10)),
    nnxp.Adam(1e-2, eps_hat=True),
    nnxp.AdamW(1e-2, decay=0.1),
    nnxp.Lion(1e-3, decay=0.1),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("clip", [None, 0.05])
def test_the_rule_of_an_optimiser_is_part_of_the_graph(gpu, monkeypatch, rule, clip):
    """And comes to the same bits as outside of it, with the numbers of each step."""
    x, target = rows_for("dense")
    options = {"loss": "mean_square", "epochs": 3, "batch": 8, "rng": 0, "clip": clip}
    results, outside = [], []
    for most in (0, trainer.RECORDED):
        monkeypatch.setattr(trainer, "RECORDED", most)
        gpu.done.clear()
        results.append(nnxp.fit(NETS["dense"].to("cuda"), x, target, optimizer=rule, **options))
        gpu.finish()
        outside.append(sum(n for (kind, _), n in gpu.done.items() if kind == "CuPy's kernel"))
    for name, p in results[0].model.parameters().items():
        np.testing.assert_array_equal(results[1].model.parameters()[name].get(), p.get())
    steps, recorded_ones = 3 * 6, 3 * 6 - 2 * 2  # of two sizes, each without a graph twice at first
    assert outside[0] - outside[1] >= recorded_ones
    assert steps > recorded_ones


def test_a_rule_of_one_s_own_and_16_bits_are_not_part_of_it(gpu):
    class Signs(nnxp.Optimizer):
        def step(self, p, g, *, t):
            p -= self.rate_at(t) * 0.9**t * cupy.sign(g)

    x, target = rows_for("dense")
    options = {"loss": "mean_square", "epochs": 3, "batch": 8, "rng": 0}
    for net, rule in ((NETS["dense"], Signs(1e-3)), (NETS["dense"].astype("float16"), nnxp.SGD())):
        trainer = Trainer(net.to("cuda"), nnxp.losses.mean_square, rule)
        assert trainer._numbers is None
        losses = nnxp.fit(net.to("cuda"), x, target, optimizer=rule, **options).history
        assert losses[-1]["loss"] < losses[0]["loss"]
