"""Faults planted on one backend: each must be caught there, and the layer that has it be named.

What parity cannot see, because all backends share it, is left to truth from outside: the last test
shows one such fault, and tests/test_torch_oracle.py catches it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import nnxp
from conftest import draw
from nnxp import kernels, sim
from nnxp.program import traced
from nnxp.program.rewrite import rewritten
from nnxp.program.traced import again
from nnxp.testing import LIMIT, assert_parity, parity_report, product_bound
from nnxp.training import losses
from nnxp.training.differentiate import write_out


def elsewhere(layer, formula):
    """A layer like this one, that has another formula on the simulated device."""

    def call(self, x):
        return formula(self, x) if isinstance(x, sim.ndarray) else type(layer).__call__(self, x)

    kind = type("Wrong" + type(layer).__name__, (type(layer),), {"__call__": call})
    return kind.of(**dict(layer._fields()))


def dense():
    layer = nnxp.Dense(32, 32, "relu", rng=3)
    return layer.with_parameters({"weight": layer.weight, "bias": draw((32,), seed=4)})


def norm(kind):
    layer = kind(32)
    rng = np.random.default_rng(5)
    drawn = {name: rng.uniform(0.5, 2, 32).astype("float32") for name in layer.parameters()}
    return layer.with_parameters(drawn)


def tf32(x):
    """Rounded to the 10 bits of fraction that TF32 keeps, on the device or on the host."""
    host = x.get() if isinstance(x, sim.ndarray) else x
    rounded = (host.view("uint32") + np.uint32(0x1000) & np.uint32(0xFFFFE000)).view("float32")
    return sim.asarray(rounded) if isinstance(x, sim.ndarray) else rounded


def in_float16(self, x):
    """Partial sums are kept in float16."""
    total = sim.zeros((len(x), 32), "float16")
    for k in range(32):
        total = total + (x[:, k : k + 1] * self.weight[k]).astype("float16")
    return kernels.relu(total.astype("float32") + self.bias)


def linear(self, x):
    return kernels.linear(x, self.weight, self.bias, activation=kernels.relu)


HOST_WEIGHT = dense().weight

FAULTS = {  # name: (layer, what it computes on the simulated device, what the kit says)
    "missing bias": (dense, lambda self, x: kernels.relu(x @ self.weight), "elements are off"),
    "transposed weight": (
        dense,
        lambda self, x: kernels.relu(x @ self.weight.T + self.bias),
        "elements are off",
    ),
    "float16 accumulation": (dense, in_float16, "elements are off"),
    "TF32-rounded inputs": (
        dense,
        lambda self, x: kernels.relu(tf32(x) @ tf32(self.weight) + self.bias),
        "elements are off",
    ),
    "tile off by one": (
        dense,
        lambda self, x: sim.concatenate([linear(self, x[:20]), linear(self, x[19:-1])]),
        "elements are off",
    ),
    "LayerNorm ignores eps": (
        lambda: norm(nnxp.LayerNorm),
        lambda self, x: kernels.layer_norm(x, self.gain, self.bias, eps=0.0),
        "elements are off",
    ),
    "BatchNorm ignores eps": (
        lambda: norm(nnxp.BatchNorm),
        lambda self, x: kernels.batch_norm(x, self.mean, self.var, self.gain, self.bias, eps=0.0),
        "elements are off",
    ),
    "NaN swallowed by relu": (
        lambda: nnxp.Activation("relu"),
        lambda self, x: sim.where(x > 0, x, sim.zeros(x.shape, x.dtype)),
        "where nan",
    ),
    "stale parameter on the host": (
        dense,
        lambda self, x: kernels.relu(sim.matmul(x, HOST_WEIGHT) + self.bias),
        "raises TypeError: Unsupported type <class 'numpy.ndarray'>",
    ),
    "stale parameter on the other device": (
        dense,
        lambda self, x: kernels.relu(x @ nnxp.to_backend(HOST_WEIGHT, "sim:1")),
        "raises ValueError: .*current device",
    ),
    "result in float64": (dense, lambda self, x: linear(self, x).astype("float64"), "is float64"),
    "result in float16": (
        dense,
        lambda self, x: linear(self, x).astype("float16").astype("float32"),
        "elements are off",
    ),
    "input changed": (dense, lambda self, x: (linear(self, x), x.fill(0))[0], "changed its input"),
    "wrong shape": (dense, lambda self, x: linear(self, x)[:, :-1], "shape"),
    "raises": (dense, lambda self, x: 1 / 0, "raises ZeroDivisionError"),
    "result on the host": (dense, lambda self, x: linear(self, x).get(), "the result is on cpu"),
    "no array": (dense, lambda self, x: 1.0, "returns float"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_on_one_backend_is_caught_and_its_layer_and_backend_are_named(fault):
    layer, formula, said = FAULTS[fault]
    net = nnxp.Sequential(
        nnxp.Dense(20, 32, "tanh", rng=0), elsewhere(layer(), formula), nnxp.Dense(32, 5, rng=1)
    )
    x = draw((40, 20))
    if "NaN" in fault:
        x[7, 3] = np.nan
    assert parity_report(net, x, backends=["numpy"]).ok  # the fault is not there
    report = parity_report(net, x, backends=["numpy", "sim"])
    first = report.first_failure
    assert (first.name, first.backend) == ("layers.1", "sim:0")
    with pytest.raises(AssertionError, match=rf"first to diverge: layers\.1 .*{said}"):
        assert_parity(net, x, backends=["numpy", "sim"])
    # and no other layer is blamed
    assert {each.name for each in report.checks if not each.ok} <= {"layers.1", "engine"}
    assert report.to_dict()["ok"] is False
    assert "layers.1" in report.to_markdown()
    assert '"ok": false' in report.to_json()


def test_of_a_layer_of_many_steps_the_kernel_that_is_wrong_is_named(monkeypatch):
    def slow(x, weight, *rest, **options):
        return kernels.lstm.reference(x, weight * 0.99, *rest, **options)

    monkeypatch.setitem(kernels.lstm._fused, "sim", slow)
    monkeypatch.setattr(kernels.lstm, "_body", {})
    net = nnxp.Sequential(nnxp.LSTM(8, 4, rng=0), nnxp.LayerNorm(4))
    first = parity_report(net, draw((6, 5, 8)), backends=["numpy", "sim"]).first_failure
    assert (first.name, first.backend) == ("layers.0", "sim:0")
    assert "LSTM" in first.what
    assert first.problem.startswith("lstm: ")


def test_a_mask_of_booleans_is_judged_as_one_and_other_inputs_may_be_left_out(monkeypatch):
    model, mask = nnxp.MultiHeadAttention(6, 3, rng=0), np.ones((4, 1, 1, 5), bool)
    mask[:, :, :, 3:] = False
    inputs = {"x": draw((4, 5, 6)), "mask": mask}
    assert_parity(model, inputs, backends=["numpy", "sim"])

    def open_to_all(q, k, v, mask, **options):
        return kernels.attention.reference(q, k, v, None, **options)

    monkeypatch.setitem(kernels.attention._fused, "sim", open_to_all)
    monkeypatch.setattr(kernels.attention, "_body", {})
    first = parity_report(model, inputs, backends=["numpy", "sim"]).first_failure
    assert (first.what, first.backend) == ("attention", "sim:0")


class Shifted:
    """Rows of which every block but the first begins one row too early."""

    def __init__(self, rows):
        self.rows, self.shape, self.dtype = rows, rows.shape, rows.dtype

    def __getitem__(self, rows):
        off = 1 if rows.start else 0
        return self.rows[rows.start - off : rows.stop - off]


@pytest.mark.parametrize("backend", ["numpy", "sim"])
@pytest.mark.parametrize("fault", ["a block is never written", "a block is off by one"])
def test_a_fault_of_the_sweep_is_caught_on_the_backend_that_has_it(monkeypatch, backend, fault):
    net, x = nnxp.Dense(20, 8, rng=0), draw((9000, 20))
    kind = type(nnxp.get_backend(backend))
    right = kind.sweep

    def wrong(self, sweep):
        if "off by one" in fault:
            plan = replace(sweep.plan, rows=1000)
            return right(self, replace(sweep, rows=(Shifted(sweep.rows[0]),), plan=plan))
        kept = sweep.out[0][-10:].copy()
        rows = right(self, sweep)
        sweep.out[0][-10:] = kept
        return rows

    assert parity_report(net, x, backends=["numpy", "sim"]).ok
    monkeypatch.setattr(kind, "sweep", wrong)
    report = parity_report(net, x, backends=["numpy", "sim"])
    failed = [each for each in report.checks if not each.ok]
    assert [each.name for each in failed] == ["engine"]
    assert failed[0].backend == nnxp.get_backend(backend).device
    assert "elements are off" in failed[0].problem


def test_inputs_rounded_to_tf32_are_seen_on_zero_mean_data():
    x, w = draw((30, 512)), draw((512, 30), seed=1)
    off = np.abs(tf32(x) @ tf32(w) - x.astype("float64") @ w)
    assert (off / product_bound(x, w)).max() > 10 * LIMIT


def test_a_fault_in_a_function_of_arrays_is_caught_too():
    def softmax(x):
        xp = nnxp.get_array_module(x)
        e = xp.exp(x - x.max(axis=1 if xp is not sim else 0, keepdims=True))
        return e / e.sum(axis=1 if xp is not sim else 0, keepdims=True)

    report = parity_report(softmax, draw((8, 8)), backends=["numpy", "sim"])
    assert (report.first_failure.name, report.first_failure.backend) == ("softmax", "sim:0")


def test_less_precision_on_every_library_but_numpy_is_not_excused():
    """The reference runs where numpy is not, too, and would take the same branch."""

    def half_there(x):
        xp = nnxp.get_array_module(x)
        z = xp.exp(x)
        return (z if xp is np else z.astype("float16").astype("float32")) * 2

    report = parity_report(half_there, draw((9, 9)), backends=["numpy", "sim"])
    assert report.first_failure.backend == "sim:0"
    assert_parity(lambda x: nnxp.get_array_module(x).exp(x).astype("float16"), draw((9, 9)))
    assert_parity(lambda x: nnxp.get_array_module(x).exp(x), draw((9, 9), "float16"))


def test_another_formula_on_every_library_but_numpy_is_caught():
    def forgets(x):
        xp = nnxp.get_array_module(x)
        return x * 2 + 1 if xp is np else x * 2

    assert not parity_report(forgets, draw((9, 9)), backends=["numpy", "sim"]).ok


def test_a_fault_that_all_backends_share_is_not_seen_by_parity():
    class IgnoresEps(nnxp.LayerNorm):
        def __call__(self, x):
            return kernels.layer_norm(x, self.gain, self.bias, eps=0.0)

    wrong = IgnoresEps.of(**dict(nnxp.LayerNorm(8, eps=0.1)._fields()))
    assert parity_report(wrong, draw((5, 8))).ok


# the backward pass


def forgotten_row(xp, step, arrays):
    """The gradient of the last weight is summed over all rows but one."""
    if step.path == "layers.1" and step.name == "matmul" and arrays[0].shape == (8, 24):
        return xp.matmul(arrays[0][:, :-1], arrays[1][:-1])
    return None


def one_row_less(xp, step, arrays):
    """The mean over n rows is divided by n - 1."""
    return arrays[0] * (24 / 23) * arrays[1] if step.name == "multiply" and not step.path else None


def rounded_products(xp, step, arrays):
    """The product that makes the gradient of the first weight is of TF32 numbers."""
    if step.path != "layers.0" or step.name != "matmul" or arrays[0].shape != (16, 24):
        return None
    parts = [(x * 8193.0, x) for x in arrays]  # c - (c - x) has 11 bits   [Dekker 1971]
    return xp.matmul(*(c - (c - x) for c, x in parts))


def stale_mask(xp, step, arrays):
    """Where relu was at work is what it was for other rows."""
    return xp.roll(xp.not_equal(*arrays), 1, axis=0) if step.name == "not_equal" else None


FIRST, LAST = ["layers.0.weight", "layers.0.bias"], ["layers.1.weight", "layers.1.bias"]


@pytest.mark.parametrize(
    ("fault", "wrong"),
    [
        (lambda xp, step, arrays: None, []),
        (forgotten_row, ["layers.1.weight"]),
        (one_row_less, [*FIRST, *LAST]),
        (rounded_products, ["layers.0.weight"]),
        (stale_mask, FIRST),
    ],
    ids=lambda each: getattr(each, "__name__", None),
)
def test_a_fault_in_the_backward_pass_is_caught_in_the_gradients_that_have_it(fault, wrong):
    net = nnxp.Sequential(nnxp.Dense(16, 8, "relu", rng=0), nnxp.Dense(8, 4, rng=1))
    arrays = [*net.parameters().values(), draw((24, 16)), np.arange(24) % 4]
    written = write_out(losses.cross_entropy, net, arrays[-2:], lambda name: True)

    def change(step, given):
        made = fault(traced, step, given)
        return again(step, given) if made is None else made

    there = rewritten(written.program, change, written.program.inputs)
    found = []
    for i, name in enumerate(written.learned, 1):

        def of_gradient(*arrays, i=i):
            planted = isinstance(arrays[0], sim.ndarray)
            return (there if planted else written.program).run(list(arrays))[i]

        of_gradient.__name__ = name
        report = parity_report(of_gradient, *arrays, backends=["numpy", "sim"])
        assert all(check.ok for check in report.checks if check.backend != "sim:0")
        if not report.ok:
            assert name in str(report)
            found.append(name)
    assert sorted(found) == sorted(wrong)
