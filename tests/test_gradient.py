"""Gradients of programs: every rule against differences, torch, and the reference bodies."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest

import nnxp
from conftest import draw, every_layer
from nnxp import kernels
from nnxp._arrays import Array, xp_of
from nnxp._errors import NotDifferentiable
from nnxp.kernels.functions import RULES, scattered
from nnxp.program import traced as xp
from nnxp.program.gradient import gradient, pullback
from nnxp.program.program import expanded, trace
from nnxp.testing import bounded

STEP = 1e-5
BITS = np.array([[True, False, True], [False, False, True]])


def positive(shape, seed=0):
    return np.abs(draw(shape, "float64", seed)) + 0.5


def unit(shape, seed=0):
    return np.tanh(draw(shape, "float64", seed)) * 0.9


def normal(*shape, seed=0):
    return draw(shape, "float64", seed)


ids = np.array([[2, 0], [2, 1]])
with_zeros = np.array([[2.0, 0.0, -1.5], [0.0, 0.0, 3.0]])
# a formula for every rule, with the arrays by which it is differentiated
CASES = {
    **{name: (getattr(xp, name), [normal(2, 3)]) for name in
       """exp exp2 expm1 absolute sin cos tan arctan sinh cosh tanh arcsinh square negative positive
       reciprocal nan_to_num copy tril triu""".split()},
    **{name: (getattr(xp, name), [positive((2, 3))]) for name in
       "log log2 log10 log1p sqrt".split()},
    **{name: (getattr(xp, name), [unit((2, 3))]) for name in "arcsin arccos arctanh".split()},
    "arccosh": (xp.arccosh, [positive((2, 3)) + 1]),
    **{name: (getattr(xp, name), [normal(2, 3), normal(3, seed=1)]) for name in
       """add subtract multiply divide arctan2 hypot logaddexp maximum minimum fmax
       fmin""".split()},
    **{name: (getattr(xp, name), [normal(2, 3), positive(3, seed=1)]) for name in
       "remainder fmod".split()},
    "power": (xp.power, [positive((2, 3)), normal(2, 1, seed=1)]),
    "power of zeros": (lambda x: xp.power(x, np.array([0.0, 2.0, 1.0])), [with_zeros]),
    "power of 3": (lambda x: x**3, [normal(2, 3)]),
    "power of 2 by x": (lambda x: 2.0**x, [normal(2, 3)]),
    "astype": (lambda x: x.astype("float64"), [normal(2, 3)]),
    "where": (lambda x, y: xp.where(BITS, x, y), [normal(2, 3), normal(3, seed=1)]),
    "clip": (lambda x: xp.clip(x, -0.5, 0.5), [normal(2, 3)]),
    "clip low": (lambda x: xp.clip(x, None, 0.5), [normal(2, 3)]),
    "assign": (lambda x, y: _assigned(x, y), [normal(3, 4), normal(4, seed=1)]),
    "in place": (lambda x, y: _in_place(x, y), [normal(3, 4), normal(3, 2, seed=1)]),
    "sum": (lambda x: xp.sum(x, axis=(0, 2)), [normal(2, 3, 4)]),
    "mean": (lambda x: xp.mean(x, axis=-1, keepdims=True), [normal(2, 3)]),
    "var": (lambda x: xp.var(x, axis=0, ddof=1), [normal(4, 3)]),
    "std": (lambda x: xp.std(x), [normal(4, 3)]),
    "max": (lambda x: x.max(axis=1), [normal(4, 3)]),
    "min": (lambda x: x.min(), [normal(4, 3)]),
    "ptp": (lambda x: xp.ptp(x, axis=1), [normal(4, 3)]),
    "prod": (lambda x: xp.prod(x, axis=1), [with_zeros]),
    "prod of all": (lambda x: xp.prod(x, axis=(0, 2)), [normal(2, 3, 2)]),
    "median": (lambda x: xp.median(x, axis=1), [normal(3, 4)]),
    "median of all": (lambda x: xp.median(x), [normal(3, 5)]),
    "norm": (lambda x: xp.linalg.norm(x, axis=1), [normal(3, 4)]),
    "norm 1": (lambda x: xp.linalg.norm(x, 1, axis=1), [normal(3, 4)]),
    "cumsum": (lambda x: xp.cumsum(x, axis=1), [normal(3, 4)]),
    "cumsum of all": (xp.cumsum, [normal(3, 4)]),
    "cumprod": (lambda x: xp.cumprod(x, axis=1), [with_zeros]),
    "cumprod of all": (xp.cumprod, [normal(2, 3)]),
    "sort": (lambda x: xp.sort(x, axis=0), [normal(4, 3)]),
    "reshape": (lambda x: x.reshape(3, 2), [normal(2, 3)]),
    "expand_dims": (lambda x: xp.expand_dims(x, 1), [normal(2, 3)]),
    "squeeze": (xp.squeeze, [normal(2, 1, 3)]),
    "broadcast_to": (lambda x: xp.broadcast_to(x, (4, 2, 3)), [normal(2, 1)]),
    "swapaxes": (lambda x: x.swapaxes(0, 2), [normal(2, 3, 4)]),
    "moveaxis": (lambda x: xp.moveaxis(x, (0, 1), (2, 0)), [normal(2, 3, 4)]),
    "transpose": (lambda x: x.transpose(2, 0, 1), [normal(2, 3, 4)]),
    "T": (lambda x: x.T, [normal(2, 3, 4)]),
    "flip": (lambda x: xp.flip(x, 1), [normal(2, 3)]),
    "roll": (lambda x: xp.roll(x, (1, 2), (0, 1)), [normal(2, 3)]),
    "concatenate": (lambda x, y: xp.concatenate([x, y], axis=1), [normal(2, 3), normal(2, 1)]),
    "stack": (lambda x, y: xp.stack([x, y, x], axis=1), [normal(2, 3), normal(2, 3)]),
    "split": (lambda x: xp.split(x, [1, 3], axis=1)[1], [normal(2, 4)]),
    "getitem": (lambda x: x[1, ::-2] * x[0, 1:3], [normal(2, 4)]),
    "getitem by ids": (lambda x: x[:, ids], [normal(2, 3)]),
    "scatter": (
        lambda x, y: scattered([x, y], (3, 4), [(slice(2), slice(3)), (slice(1, 3), slice(1, 4))]),
        [normal(2, 3), normal(2, 3)],
    ),
    "pad": (lambda x: xp.pad(x, ((1, 0), (2, 1)), constant_values=7), [normal(2, 3)]),
    "pad reflect": (lambda x: xp.pad(x, ((1, 0), (2, 1)), mode="reflect"), [normal(2, 3)]),
    "pad edge": (lambda x: xp.pad(x, 1, mode="edge"), [normal(2, 3)]),
    "repeat": (lambda x: xp.repeat(x, 2, axis=1), [normal(2, 3)]),
    "repeat some": (lambda x: xp.repeat(x, [1, 0, 3], axis=1), [normal(2, 3)]),
    "repeat all": (lambda x: xp.repeat(x, 2), [normal(2, 3)]),
    "tile": (lambda x: xp.tile(x, (2, 1, 3)), [normal(2, 3)]),
    "diagonal": (lambda x: xp.diagonal(x, 1, 1, 0), [normal(4, 3, 2)]),
    "sliding_window_view": (
        lambda x: xp.lib.stride_tricks.sliding_window_view(x, (2, 3), (1, 2))[:, ::2],
        [normal(2, 5, 6)],
    ),
    "take": (lambda x: xp.take(x, ids, axis=1), [normal(2, 3, 2)]),
    "take of all": (lambda x: xp.take(x, ids), [normal(2, 3)]),
    "take_along_axis": (lambda x: xp.take_along_axis(x, ids, axis=1), [normal(2, 3)]),
    "take one along": (lambda x: xp.take_along_axis(x, ids[:, :1], axis=1), [normal(2, 3)]),
    "diff": (lambda x: xp.diff(x, 2, axis=0), [normal(5, 2)]),
    "matmul": (xp.matmul, [normal(2, 3, 4), normal(4, 5, seed=1)]),
    "matmul broadcast": (xp.matmul, [normal(3, 4), normal(2, 4, 5, seed=1)]),
    "matmul batched": (xp.matmul, [normal(2, 1, 3, 4), normal(5, 4, 2, seed=1)]),
    "matmul of vectors": (xp.matmul, [normal(4), normal(4, seed=1)]),
    "matmul vector": (xp.matmul, [normal(2, 3, 4), normal(4, seed=1)]),
    "vector matmul": (xp.matmul, [normal(4), normal(2, 4, 3, seed=1)]),
    "dot": (xp.dot, [normal(3, 4), normal(4, seed=1)]),
    "outer": (xp.outer, [normal(3), normal(2, 2, seed=1)]),
    "tensordot": (lambda a, b: xp.tensordot(a, b, ((2, 0), (1, 2))),
                  [normal(2, 3, 4), normal(5, 4, 2, seed=1)]),
    "tensordot 2": (xp.tensordot, [normal(2, 3, 4), normal(3, 4, 5, seed=1)]),
    "einsum": (lambda a, b: xp.einsum("bij,bjk->ik", a, b), [normal(2, 3, 4), normal(2, 4, 2)]),
    "einsum sums": (lambda a, b: xp.einsum("ij,k->i", a, b), [normal(2, 3), normal(4)]),
    "einsum trace": (lambda a: xp.einsum("...ii->...", a), [normal(2, 3, 3)]),
}  # fmt: skip


def _assigned(x, y):
    z = x * 1.0
    z[1:2] = y
    z[0, ::2] = 0.0
    return z


def _in_place(x, y):
    z = x + 0.0
    z *= 2
    z[:, 1:3] = z[:, 1:3] + y * z[:, 2:4]
    np.maximum(z, y[:, :1], out=z)
    z -= z.mean(axis=0)
    return z


def worth_of(shape):
    return draw(shape, "float64", 9)


def gradients(function, arrays):
    """By reverse mode: the gradients of sum(worth * function(*arrays))."""
    program = trace(function, *((x.shape, x.dtype) for x in arrays))
    worth = [worth_of(v.shape) for v in program.outputs]
    made = pullback(program, program.inputs).run([*arrays, *worth])
    return made[len(worth) :]


def differences(function, arrays):
    """By central differences, one element after the other."""
    program = trace(function, *((x.shape, x.dtype) for x in arrays))

    def weighed(*given):
        return sum((worth_of(y.shape) * y).sum() for y in program.run(given))

    for i, x in enumerate(arrays):
        slope = np.zeros_like(x)
        for at in np.ndindex(x.shape):
            ends = []
            for step in (STEP, -STEP):
                moved = [each.copy() for each in arrays]
                moved[i][at] += step
                ends.append(weighed(*moved))
            slope[at] = (ends[0] - ends[1]) / (2 * STEP)
        yield slope


def assert_right(function, arrays, rtol=1e-7):
    for made, wanted in zip(
        gradients(function, arrays), differences(function, arrays), strict=True
    ):
        assert made.shape == wanted.shape
        np.testing.assert_allclose(made, wanted, rtol=rtol, atol=rtol * max(1, abs(wanted).max()))


@pytest.mark.parametrize("name", CASES)
def test_every_rule_agrees_with_central_differences(name):
    assert_right(*CASES[name])


def test_every_rule_has_a_case():
    assert set(RULES) == {name.partition(" ")[0] for name in CASES} - {"T", "in", "vector"}


# kernels: a rule says what the reference body does

KERNELS_WITH_RULES = [
    kernel for kernel in kernels.KERNELS.values() if kernel.rule and kernel is not kernels.identity
]
ARRAYS = {"linear": [(4, 5), (5, 3), (3,)], "matmul": [(2, 4, 5), (5, 3)],
          "layer_norm": [(4, 6), (6,), (6,)], "rms_norm": [(4, 6), (6,)],
          "max_pool": [(2, 6, 7, 3)], "max_pool_gradient": [(2, 3, 2, 3), (2, 6, 7, 3)],
          "conv": [(2, 5, 6, 4), (3, 2, 2, 6), (6,)],
          "conv_weight_gradient": [(2, 5, 6, 4), (2, 2, 5, 6)]}  # fmt: skip
CONV = {"stride": (3, 1), "padding": ((1, 2), (0, 0)), "groups": 2}
OPTIONS = {"max_pool": {"window": (3, 2), "stride": (1, 2), "padding": 1},
           "max_pool_gradient": {"window": (2, 2), "stride": (2, 3)},
           "conv": CONV, "conv_weight_gradient": {"window": (3, 2)} | CONV}  # fmt: skip


@pytest.mark.parametrize("kernel", KERNELS_WITH_RULES, ids=lambda kernel: kernel.__name__)
def test_the_rule_of_a_kernel_is_the_gradient_of_its_reference_body(kernel):
    arrays = [normal(*shape, seed=i) for i, shape in
              enumerate(ARRAYS.get(kernel.__name__, [(4, 7)]))]  # fmt: skip
    options = OPTIONS.get(kernel.__name__, {})
    by_rule = gradients(partial(kernel, **options), arrays)
    by_body = gradients(partial(kernel.reference, **options), arrays)
    for made, wanted in zip(by_rule, by_body, strict=True):
        np.testing.assert_allclose(made, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "options",
    [
        {"window": (2, 2)}, {"window": (1, 1)}, {"window": (2, 2), "ceil_mode": True},
        {"window": (3, 3), "stride": 2, "padding": 1}, {"window": (2, 3), "stride": 4},
        {"window": (3, 2), "stride": (1, 2), "dilation": (2, 1)},
    ],
    ids=str,
)  # fmt: skip
def test_of_equals_the_first_in_a_window_takes_it_all_as_in_torch(options):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).integers(0, 3, (3, 7, 9, 4)).astype("float64")
    y, back = nnxp.vjp(partial(kernels.max_pool, **options), x)
    dy = normal(*y.shape)
    rest = {name: value for name, value in options.items() if name != "window"}
    there = torch.from_numpy(x).permute(0, 3, 1, 2).requires_grad_()
    pooled = torch.nn.functional.max_pool2d(there, options["window"], **rest)
    pooled.backward(torch.from_numpy(dy).permute(0, 3, 1, 2))
    np.testing.assert_allclose(back(dy), there.grad.permute(0, 2, 3, 1).numpy(), atol=1e-14)


@pytest.mark.parametrize(
    "options", [{}, {"stride": (1, 3)}, {"padding": 1}, {"ceil_mode": True}], ids=str
)
def test_a_pool_behind_relu_passes_back_what_torch_passes(options):
    """relu is applied behind it, where nothing is padded."""
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).integers(-3, 3, (3, 7, 8, 4)).astype("float64")
    run = partial(kernels.max_pool, window=(2, 2), **options)
    y, back = nnxp.vjp(lambda x: run(kernels.relu(x)), x)
    dy = normal(*y.shape)
    there = torch.from_numpy(x).permute(0, 3, 1, 2).requires_grad_()
    torch.nn.functional.max_pool2d(torch.relu(there), 2, **options).backward(
        torch.from_numpy(dy).permute(0, 3, 1, 2)
    )
    np.testing.assert_array_equal(back(dy), there.grad.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("lead", [((2,), (2,)), ((3, 1), (2,)), ((1,), (4,))], ids=str)
def test_the_rule_of_a_product_holds_for_stacks(lead):
    arrays = [normal(*lead[0], 4, 5), normal(*lead[1], 5, 3, seed=1)]
    by_rule, by_body = gradients(kernels.matmul, arrays), gradients(xp.matmul, arrays)
    for made, wanted in zip(by_rule, by_body, strict=True):
        np.testing.assert_allclose(made, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", kernels.ACTIVATIONS)
def test_gradients_of_activations_are_finite_far_out_and_pass_nan_on(name):
    far = np.float32([[-1e30, -1e4, -100, -40, -1e-30, 0, 1e-30, 40, 100, 1e4, 1e30]])
    program = trace(kernels.ACTIVATIONS[name], (far.shape, "float32"))
    back = pullback(program, program.inputs)
    _, dx = back.run([far, np.ones_like(far)])
    assert dx.dtype == np.float32
    assert np.isfinite(dx).all()
    bad = np.float32([[np.nan, 1.0]])
    program = trace(kernels.ACTIVATIONS[name], (bad.shape, "float32"))
    y, dx = pullback(program, program.inputs).run([bad, np.float32([[1, 1]])])
    straight = "identity relu hard_sigmoid leaky_relu relu6 threshold hard_tanh".split()
    if name not in [*straight, "hard_shrink", "soft_shrink"]:  # flat or straight in pieces
        assert np.isnan(dx[0, 0])
    assert np.isnan(y[0, 0])


def test_slopes_at_kinks_are_as_documented():
    zero = np.zeros((1, 1))
    for name, slope in (("relu", 0), ("leaky_relu", 0.01), ("elu", 1), ("softplus", 0.5),
                        ("selu", 1.6732632423543772 * 1.0507009873554805)):  # fmt: skip
        (dx,) = gradients(lambda x, n=name: kernels.ACTIVATIONS[n](x) / worth_of((1, 1)), [zero])
        np.testing.assert_allclose(dx, slope)
    ties = np.array([1.0, 3.0, 3.0])
    (dx,) = gradients(lambda x: x.max() / worth_of(()), [ties])
    np.testing.assert_array_equal(dx, [0, 0.5, 0.5])
    (dx,) = gradients(lambda x: xp.maximum(x, 3.0) / worth_of((3,)), [ties])
    np.testing.assert_array_equal(dx, [0, 0.5, 0.5])
    (dx,) = gradients(lambda x: xp.clip(x, 1.0, 2.0) / worth_of((3,)), [ties])
    np.testing.assert_array_equal(dx, [1, 0, 0])
    (dx,) = gradients(lambda x: (abs(x) + xp.sqrt(x * 0 + 4)) / worth_of((1, 1)), [zero])
    np.testing.assert_array_equal(dx, 0)


@kernels.kernel
def twice_linear(x, weight, *, activation):
    """A kernel without a rule that calls one with a rule and an activation."""
    return kernels.linear(x, weight, activation=activation) * 2


del kernels.KERNELS["twice_linear"]  # the other tests know every kernel


@pytest.mark.parametrize("name", ["relu", "gelu", "softmax"])
def test_an_activation_within_a_kernel_without_a_rule_is_not_forgotten(name):
    activation = kernels.ACTIVATIONS[name]
    arrays = [normal(4, 5), normal(5, 3, seed=1)]
    assert_right(lambda x, w: twice_linear(x, w, activation=activation), arrays)


# layers


def inputs_of(layer, shapes, dtype="float32"):
    """What a layer takes: numbers, ids from 0 to 2, True and False, None for what is left out."""
    rng, made = np.random.default_rng(0), []
    for i, shape in enumerate(shapes if isinstance(shapes, list) else [shapes]):
        kind = layer.takes[i] if i < len(layer.takes) else "float"
        if shape is None:
            made.append(None)
        elif "float" in kind:
            made.append(draw(shape, layer.dtype or dtype, i))
        else:
            made.append(rng.integers(0, 3, shape) if "int" in kind else rng.random(shape) < 0.7)
    return made


def results_of(made):
    return made if isinstance(made, tuple | list) else (made,)


def worths_of(layer, inputs):
    made = results_of(layer(*inputs))
    return tuple(draw(y.shape, y.dtype, 9 + i) for i, y in enumerate(made))


def weighed(model, inputs, worths):
    """sum(worth * result) over all results"""
    made = results_of(model(*inputs))
    return sum((y * w).sum() for y, w in zip(made, worths, strict=True))


def floats_in(inputs):
    return [i for i, x in enumerate(inputs) if x is not None and x.dtype.kind == "f"]


def layer_gradients(layer, inputs, worths):
    """Of `weighed`, by every input of numbers and by every parameter."""
    _, found = nnxp.value_and_gradients(weighed)(layer, tuple(inputs), worths)
    places = floats_in(inputs)
    if not places:
        return found

    def function(*floats):
        given = dict(zip(places, floats, strict=True))
        return layer(*(given.get(i, x) for i, x in enumerate(inputs)))

    _, back = nnxp.vjp(function, *(inputs[i] for i in places))
    made = back(*worths)
    made = made if isinstance(made, tuple) else (made,)
    return found | dict(zip(places, made, strict=True))


@every_layer
@pytest.mark.filterwarnings("ignore:no gradient")
def test_every_layer_s_gradients_agree_with_central_differences(layer, shape):
    layer = layer.astype("float64")
    inputs = inputs_of(layer, shape, "float64")
    worths = worths_of(layer, inputs)
    arrays = layer.parameters() | {i: inputs[i] for i in floats_in(inputs)}
    found = layer_gradients(layer, inputs, worths)
    assert found.keys() == arrays.keys()
    rng = np.random.default_rng(1)
    for name, array in arrays.items():
        way = rng.normal(size=array.shape)
        way /= np.linalg.norm(way)
        ends = []
        for step in (STEP, -STEP):
            moved = arrays | {name: array + step * way}
            own = {n: p for n, p in moved.items() if isinstance(n, str)}
            model = layer.with_parameters(own) if own else layer
            ends.append(weighed(model, [moved.get(i, x) for i, x in enumerate(inputs)], worths))
        slope = (ends[0] - ends[1]) / (2 * STEP)
        assert found[name].shape == array.shape
        np.testing.assert_allclose((found[name] * way).sum(), slope, rtol=1e-6, atol=1e-7)


@every_layer
@pytest.mark.filterwarnings("ignore:no gradient")
def test_every_layer_s_gradients_are_the_same_on_the_simulated_device(layer, shape, sim):
    inputs = inputs_of(layer, shape)
    worths = worths_of(layer, inputs)
    step = nnxp.value_and_gradients(weighed)
    y, found = step(layer, tuple(inputs), worths)

    def there(arrays):
        return tuple(None if x is None else nnxp.to_backend(x, "sim") for x in arrays)

    moved = layer.to("sim"), there(inputs), there(worths)
    step(*moved)
    sim.reset()
    y2, found2 = step(*moved)
    assert (sim.count.put, sim.count.get, sim.count.implicit) == (0, 0, 0)
    np.testing.assert_allclose(nnxp.asnumpy(y2), y, rtol=1e-4, atol=1e-5)
    for name, g in found.items():
        assert found2[name].dtype == g.dtype == layer.parameters()[name].dtype
        np.testing.assert_allclose(nnxp.asnumpy(found2[name]), g, rtol=1e-4, atol=1e-5)


def differentiated(layer, inputs, parameters):
    """The program of the gradients by the inputs and the parameters."""
    places = floats_in(inputs)
    count = len(places)

    def function(*arrays):
        given = dict(zip(places, arrays, strict=False))
        named = dict(zip(parameters, arrays[count:], strict=True))
        model = layer.map_arrays(lambda name, _: named[name]) if named else layer
        return model(*(given.get(i, x) for i, x in enumerate(inputs)))

    arrays = [*(inputs[i] for i in places), *parameters.values()]
    program = trace(function, *((x.shape, x.dtype) for x in arrays))
    return pullback(program, program.inputs), arrays, len(program.outputs)


@every_layer
def test_every_layer_s_gradients_are_within_the_bound_of_float64(layer, shape):
    """The gradient program on arrays that know their error judges the one on NumPy."""
    inputs = inputs_of(layer, shape)
    back, arrays, count = differentiated(layer, inputs, layer.parameters())
    given = [*arrays, *worths_of(layer, inputs)]
    made = back.run(given)[count:]
    sure = back.run([bounded.asarray(each) for each in given])[count:]
    seen = []
    for y, limit in zip(made, sure, strict=True):
        if isinstance(limit, bounded.ndarray):
            off = np.abs(y.astype("float64") - limit.value)
            assert (off <= bounded.LIMIT * limit.error).all(), (off / limit.error).max()
            wrong = np.abs(y * 1.01 - limit.value) > bounded.LIMIT * limit.error
            seen.append(wrong.any() or y.size < 8 or not np.abs(y).max())
    assert any(seen) or not seen, "a hundredth too much would not be seen anywhere"


@every_layer
def test_no_step_of_a_float32_gradient_is_in_float64(layer, shape):
    if any(each.wide for each in layers_in(layer)):
        pytest.skip("it computes in float64 on purpose")
    back, _, _ = differentiated(layer, inputs_of(layer, shape), layer.parameters())
    wide = [s for s in expanded(back).steps for v in s.outputs if v.dtype == np.float64]
    assert not wide, wide[0].name


def layers_in(layer):
    return [layer, *(each for _, child in layer.children() for each in layers_in(child))]


# what has no gradient


class LooksAtNumbers(nnxp.Layer):
    weight: np.ndarray

    def __call__(self, x):
        if float(x.max()) > 0:
            return x * self.weight
        return x


def mean(model, x):
    return model(x).mean()


def test_a_layer_that_looks_at_numbers_is_refused_by_its_path_and_line():
    net = nnxp.Sequential(nnxp.Dense(3, 3, rng=0), LooksAtNumbers.of(np.ones(3, "float32")))
    x = draw((4, 3))
    with pytest.raises(
        NotDifferentiable, match=r"layers\.1 has no gradient.*test_gradient.py line"
    ):
        nnxp.value_and_gradients(mean)(net, x)


def test_a_loss_that_looks_at_numbers_is_refused_by_its_line():
    def loss(model, x):
        return model(x).mean() * float(x.max())

    with pytest.raises(NotDifferentiable, match=r"line \d+: return model\(x\)"):
        nnxp.value_and_gradients(loss)(nnxp.Dense(3, 2, rng=0), draw((4, 3)))


def test_a_function_without_a_rule_is_refused_by_name():
    def loss(model, x):
        return xp.linalg.norm(model(x), 3, axis=1).mean()

    with pytest.raises(NotDifferentiable, match="no gradient of norm"):
        nnxp.value_and_gradients(loss)(nnxp.Dense(3, 2, rng=0), draw((4, 3)))


def test_a_gradient_of_many_numbers_is_refused():
    with pytest.raises(NotDifferentiable, match="one number"):
        nnxp.value_and_gradients(lambda m, x: m(x))(nnxp.Dense(3, 2, rng=0), draw((4, 3)))


def test_a_gradient_that_counts_rows_wants_a_number_of_them():
    program = nnxp.Dense(3, 2, rng=0).program((1, 3))
    back = pullback(program, program.inputs)  # each row for itself: any number of them
    _, dx = back.run([draw((7, 3)), draw((7, 2))])
    assert dx.shape == (7, 3)
    program = trace(lambda x: x.mean(axis=0), ((xp.ROWS, 3), "float64"))
    with pytest.raises(NotDifferentiable, match="number of rows"):
        pullback(program, program.inputs)


def test_a_parameter_without_a_gradient_is_told_once():
    net = nnxp.Sequential(nnxp.Dense(3, 2, rng=0), nnxp.Dense(2, 1, rng=1))
    step = nnxp.value_and_gradients(lambda m, x: m.layers[0](x).mean())
    with pytest.warns(UserWarning, match=r"does not depend on layers\.1\.weight, layers\.1\.bias"):
        _, found = step(net, draw((4, 3)))
    assert not found["layers.1.weight"].any()
    step(net, draw((4, 3)))  # a warning would be an error


def test_a_model_elsewhere_is_refused(sim):
    with pytest.raises(nnxp.DeviceMismatch, match="different places"):
        nnxp.value_and_gradients(mean)(nnxp.Dense(3, 2, rng=0).to("sim"), draw((4, 3)))


def test_an_array_that_layers_share_gets_the_whole_gradient():
    shared = nnxp.Dense(3, 3, "tanh", rng=0, dtype="float64")
    twice = nnxp.Sequential(shared, nnxp.Dense.of(shared.weight, shared.bias))
    x = normal(4, 3)
    _, found = nnxp.value_and_gradients(mean)(twice, x)
    moved = {n: p.copy() for n, p in twice.parameters().items()}
    _, apart = nnxp.value_and_gradients(mean)(twice.with_parameters(moved), x)
    total = apart["layers.0.weight"] + apart["layers.1.weight"]
    np.testing.assert_allclose(found["layers.0.weight"], total)
    np.testing.assert_array_equal(found["layers.0.weight"], found["layers.1.weight"])


def test_a_gradient_is_nobody_else_s_memory():
    step = nnxp.value_and_gradients(lambda m, x: (m.weight * x).sum())
    scale = LooksAtNumbers.of(np.ones(3, "float32"))
    x = draw((3,))
    _, found = step(scale, x)
    found["weight"][...] = 7
    assert not (x == 7).any()
    np.testing.assert_array_equal(step(scale, x)[1]["weight"], x)
    _, back = nnxp.vjp(lambda x: x.reshape(3, 1), x)
    worth = np.ones((3, 1), "float32")
    back(worth)[...] = 7
    assert (worth == 1).all()


def test_vjp_of_several_arrays_and_results():
    a, b = normal(3, 4), normal(4, 2, seed=1)
    (y, _), back = nnxp.vjp(lambda a, b: (a @ b, a.sum()), a, b)
    da, db = back(np.ones_like(y), np.asarray(2.0))
    np.testing.assert_allclose(da, np.ones_like(y) @ b.T + 2)
    np.testing.assert_allclose(db, a.T @ np.ones_like(y))


# formulas as people write them


def convolved(x, w):
    """x (rows, time, channels), w (window, channels, outputs)"""
    views = xp.lib.stride_tricks.sliding_window_view(xp.pad(x, ((0, 0), (1, 1), (0, 0))), 3, axis=1)
    return xp.tensordot(views[:, ::2], w, ((3, 2), (0, 1)))


def recurrent(x, w, u):
    """The state after each step, (rows, time, units)"""
    h = xp.zeros((x.shape[0], u.shape[0]), x.dtype)
    states = xp.empty((x.shape[0], x.shape[1], u.shape[0]), x.dtype)
    for t in range(x.shape[1]):
        h = xp.tanh(x[:, t] @ w + h @ u)
        states[:, t] = h
    return states


def last_state(x, w, u):
    h = xp.zeros((x.shape[0], u.shape[0]), x.dtype)
    for t in range(x.shape[1]):
        h = xp.tanh(x[:, t] @ w + h @ u)
    return h


def attended(q, k, v):
    scores = xp.einsum("bid,bjd->bij", q, k) / 2.0
    mask = np.tril(np.ones(scores.shape[-2:], bool))
    return kernels.softmax(xp.where(mask, scores, -np.inf)) @ v


def pooled(x):
    views = xp.lib.stride_tricks.sliding_window_view(x, (2, 2), (1, 2))[:, ::2, ::2]
    return views.max(axis=(-1, -2))


@pytest.mark.parametrize(
    ("function", "arrays"),
    [
        (convolved, [normal(2, 6, 3), normal(3, 3, 4, seed=1)]),
        (recurrent, [normal(2, 5, 3), normal(3, 4, seed=1), normal(4, 4, seed=2)]),
        (attended, [normal(2, 4, 3), normal(2, 4, 3, seed=1), normal(2, 4, 3, seed=2)]),
        (pooled, [normal(2, 4, 6, 3)]),
    ],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_formulas_as_people_write_them_have_gradients(function, arrays):
    assert_right(function, arrays)


def test_the_gradient_of_a_loop_over_time_grows_with_time_and_not_with_its_square():
    def elements(steps):
        shapes = [(2, steps, 3), (3, 4), (4, 4)]
        program = trace(lambda *a: last_state(*a).sum(), *((s, "float64") for s in shapes))
        made = gradient(program, program.outputs[0], program.inputs[:1])
        return sum(math.prod(v.shape) for step in made.steps for v in step.outputs)

    assert elements(80) < 6 * elements(20)


# torch, as a second oracle


@pytest.mark.parametrize(
    "name",
    """exp log1p tanh maximum clip logaddexp std prod cumprod sort median matmul einsum pad
    take_along_axis""".split(),
)
def test_rules_agree_with_torch(name):
    torch = pytest.importorskip("torch")
    theirs = {
        "maximum": lambda a, b: torch.maximum(*torch.broadcast_tensors(a, b)),
        "clip": lambda x: torch.clamp(x, -0.5, 0.5), "std": lambda x: torch.std(x, unbiased=False),
        "prod": lambda x: torch.prod(x, 1), "cumprod": lambda x: torch.cumprod(x, 1),
        "sort": lambda x: torch.sort(x, 0).values,
        "median": lambda x: torch.quantile(x, 0.5, dim=1),
        "einsum": lambda a, b: torch.einsum("bij,bjk->ik", a, b),
        "pad": lambda x: torch.nn.functional.pad(x, (2, 1, 1, 0), value=7),
        "take_along_axis": lambda x: torch.take_along_dim(x, torch.tensor(ids), 1),
    }  # fmt: skip
    function, arrays = CASES[name]
    given = [torch.tensor(x, requires_grad=True) for x in arrays]
    y = theirs.get(name, getattr(torch, name, None))(*given)
    y.backward(torch.tensor(worth_of(tuple(y.shape))))
    for made, x in zip(gradients(function, arrays), given, strict=True):
        np.testing.assert_allclose(made, x.grad.numpy(), rtol=1e-12, atol=1e-12)


PICKED = {
    "each element once": lambda x: (x[:, ::2] * x[:, 1::2]).sum(),
    "not all of them": lambda x: (x[:, 1:3] ** 2).sum(),
    "some of them twice": lambda x: (x[:, :3] * x[:, 1:]).sum() + (x[2:] ** 3).sum(),
    "all of them": lambda x: (x[:, :] ** 2).sum(),
    "in turn": lambda x: (x[::-1] * x).sum(),
    "windows": lambda x: (windows(x, (2, 3), axis=(0, 1)) ** 2).sum(),
    "windows twice along an axis": lambda x: (windows(x, (2, 2), axis=(1, 1)) ** 2).sum(),
}  # fmt: skip


def windows(x, shape, axis):
    return xp_of(x).lib.stride_tricks.sliding_window_view(x, shape, axis=axis)


@pytest.mark.parametrize("name", PICKED)
def test_what_was_picked_gets_its_gradient_back_at_every_call(name):
    """A step of training writes it where it lies, over what was there before."""

    class Own(nnxp.Layer):
        weight: Array

        def __init__(self, weight):
            self.weight = weight

        def __call__(self, x):
            return x * self.weight

    step = nnxp.value_and_gradients(lambda model, x: PICKED[name](model(x)))
    x = draw((5, 4), seed=1).astype("float64")
    for seed in (2, 3):
        model = Own(draw((5, 4), seed=seed).astype("float64"))
        _, gradients = step(model, x)
        for at in np.ndindex(x.shape):
            moved = []
            for h in (1e-6, -1e-6):
                own = model.weight.copy()
                own[at] += h
                moved.append(float(PICKED[name](own * x)))
            slope = (moved[0] - moved[1]) / 2e-6
            assert abs(gradients["weight"][at] - slope) < 1e-7 * max(1, abs(slope)), at


def test_one_function_of_gradients_may_be_called_by_several_threads():
    step = nnxp.value_and_gradients(lambda model, x: (model(x) ** 2).mean())
    model = nnxp.Sequential(nnxp.Dense(3, 4, "tanh", rng=0), nnxp.Dense(4, 2, rng=1))
    batches = [normal(5, 3, seed=i).astype("float32") for i in range(4)]
    alone = [step(model, x) for x in batches]

    def often(i):
        return [step(model, batches[i]) for _ in range(50)]

    with ThreadPoolExecutor(4) as threads:
        for (loss, gradients), made in zip(alone, threads.map(often, range(4)), strict=True):
            for y, by_name in made:
                assert y == loss
                for name, gradient in gradients.items():
                    np.testing.assert_array_equal(by_name[name], gradient)
