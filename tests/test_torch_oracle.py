"""PyTorch as an oracle: what our float64 reference says, another library says too.

Parity only shows that backends agree with the reference; a formula that ignores its own eps agrees
with itself everywhere. So torch's answers, in float64 and in float32, must lie within the bound
around the reference, with every parameter and option drawn at random. Where torch is not installed
the answers that it once gave are read from torch_cases.json, which this writes:

    python tests/test_torch_oracle.py
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import nnxp
import test_space
from conftest import every_layer
from nnxp import kernels
from nnxp.testing import LIMIT, error_bound
from nnxp.testing.parity import compare

try:
    import torch
except ImportError:
    torch = None

FROZEN = Path(__file__).with_name("torch_cases.json")
needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed")
every_float = pytest.mark.parametrize("dtype", ["float32", "float64"])


class Draw:
    """Random arrays of multiples of 1/64: exact in float32, and short in a file."""

    def __init__(self, seed, rows=5, channels=7):
        self.rng = np.random.default_rng(seed)
        self.rows, self.channels = rows, channels

    def x(self, scale=3):
        return self._exact(self.rng.normal(size=(self.rows, self.channels)) * scale)

    def weight(self):
        return self._exact(self.rng.normal(size=(self.channels, 4)))

    def exact(self, values):
        return self._exact(values)

    def vector(self, size=None):
        return self._exact(self.rng.normal(size=size or self.channels))

    def positive(self):
        return self._exact(self.rng.uniform(0.1, 3, self.channels))

    def option(self, low, high):
        return round(float(self.rng.uniform(low, high)), 4)

    @staticmethod
    def _exact(values):
        return np.round(values * 64) / 64


def plain(name):
    """A function of torch.nn.functional that takes only x."""
    return lambda x: getattr(torch.nn.functional, name)(x)


# Every kernel: what arrays and options it is asked with, and how torch says the same.
CASES = {
    "identity": (lambda d: ([d.x()], {}), lambda x: x),
    "relu": (lambda d: ([d.x()], {}), plain("relu")),
    "leaky_relu": (
        lambda d: ([d.x()], {"negative_slope": d.option(0.01, 0.9)}),
        lambda x, negative_slope: torch.nn.functional.leaky_relu(x, negative_slope),
    ),
    "elu": (
        lambda d: ([d.x()], {"alpha": d.option(0.1, 2)}),
        lambda x, alpha: torch.nn.functional.elu(x, alpha),
    ),
    "selu": (lambda d: ([d.x()], {}), plain("selu")),
    # torch is linear beyond a threshold, by default 20, where float64 still sees the difference
    "softplus": (
        lambda d: ([d.x()], {}),
        lambda x: torch.nn.functional.softplus(x, threshold=80),
    ),
    "softsign": (lambda d: ([d.x()], {}), plain("softsign")),
    "sigmoid": (lambda d: ([d.x()], {}), lambda x: torch.sigmoid(x)),
    "hard_sigmoid": (lambda d: ([d.x()], {}), plain("hardsigmoid")),
    "tanh": (lambda d: ([d.x()], {}), lambda x: torch.tanh(x)),
    "silu": (lambda d: ([d.x()], {}), plain("silu")),
    "gelu": (lambda d: ([d.x()], {}), plain("gelu")),
    "gelu_tanh": (
        lambda d: ([d.x()], {}),
        lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    ),
    "mish": (lambda d: ([d.x()], {}), plain("mish")),
    "softmax": (lambda d: ([d.x()], {}), lambda x: torch.softmax(x, -1)),
    "log_softmax": (lambda d: ([d.x()], {}), lambda x: torch.log_softmax(x, -1)),
    "matmul": (lambda d: ([d.x(), d.weight()], {}), lambda x, w: x @ w),
    "linear": (
        lambda d: ([d.x(), d.weight(), d.vector(4)], {}),
        lambda x, w, b: torch.nn.functional.linear(x, w.T, b),
    ),
    "layer_norm": (
        lambda d: ([d.x(), d.vector(), d.vector()], {"eps": d.option(0.001, 1)}),
        lambda x, gain, bias, eps: torch.nn.functional.layer_norm(
            x, (x.shape[-1],), gain, bias, eps
        ),
    ),
    "rms_norm": (
        lambda d: ([d.x(), d.vector()], {"eps": d.option(0.001, 1)}),
        lambda x, gain, eps: torch.nn.functional.rms_norm(x, (x.shape[-1],), gain, eps),
    ),
    "batch_norm": (
        lambda d: (
            [d.x(), d.vector(), d.positive(), d.vector(), d.vector()],
            {"eps": d.option(0.001, 1)},
        ),
        lambda x, mean, var, gain, bias, eps: torch.nn.functional.batch_norm(
            x, mean, var, gain, bias, training=False, eps=eps
        ),
    ),
    "standardize": (
        lambda d: ([d.x(), d.vector(), d.positive()], {}),
        lambda x, mean, scale: torch.div(torch.sub(x, mean), scale),
    ),
}

CASES |= test_space.CASES


def gelu_tanh_of_torch(x):
    """x/2 * (1 + tanh(u)), which cancels on the left, where ours does not."""
    xp = nnxp.get_array_module(x)
    return x * 0.5 * (xp.tanh((x * x * x * 0.044715 + x) * 0.7978845608028654) + 1)


def batch_norm_of_torch(x, mean, var, gain, bias, *, eps):
    """x * scale + offset, which cancels where x is near the mean."""
    scale = gain / nnxp.get_array_module(x).sqrt(var + eps)
    return x * scale + (bias - mean * scale)


# Where torch evaluates another formula for the same function, rounding may add what either allows.
THEIR_FORMULAS = {"gelu_tanh": gelu_tanh_of_torch, "batch_norm": batch_norm_of_torch}


def by_torch(name, arrays, options, dtype):
    tensors = [torch.from_numpy(each.astype(dtype)) for each in arrays]
    return CASES[name][1](*tensors, **options).numpy()


def reference(name, arrays, options, dtype):
    """What our reference says, and the unit of doubt of a computation in dtype."""
    given = [each.astype(dtype) for each in arrays]
    value, error = error_bound(kernels.KERNELS[name], *given, **options)
    if name in THEIR_FORMULAS:
        error = np.maximum(error, error_bound(THEIR_FORMULAS[name], *given, **options)[1])
    return value, error


def test_every_kernel_is_asked():
    assert set(CASES) == set(kernels.KERNELS)
    frozen = {case["kernel"] for case in json.loads(FROZEN.read_text())["cases"]}
    assert frozen == set(kernels.KERNELS)
    assert FROZEN.stat().st_size < 50_000


@needs_torch
@pytest.mark.parametrize("name", CASES)
@every_float
def test_torch_says_the_same_of_every_kernel(name, dtype):
    for seed in range(20):
        size = np.random.default_rng(seed).integers(1, 100, 2)
        arrays, options = CASES[name][0](Draw(seed, *size))
        value, error = reference(name, arrays, options, dtype)
        check = compare(name, "", "torch", by_torch(name, arrays, options, dtype), value, error)
        assert check.ok, f"seed {seed}: {check.problem}"


@pytest.mark.parametrize("name", CASES)
@every_float
def test_torch_once_said_the_same_of_every_kernel(name, dtype):
    found = json.loads(FROZEN.read_text())
    for case in found["cases"]:
        if case["kernel"] == name:
            arrays = [np.array(each) for each in case["arrays"]]
            value, error = reference(name, arrays, case["options"], dtype)
            frozen = compare(name, "", "torch", np.array(case["answer"]), value, error)
            assert frozen.ok, f"torch {found['torch']}: {frozen.problem}"
            given = [each.astype(dtype) for each in arrays]
            ours = kernels.KERNELS[name](*given, **case["options"])
            assert compare(name, "", "cpu", ours, np.array(case["answer"]), error, 2 * LIMIT).ok


def parameter(x):
    return torch.nn.Parameter(torch.from_numpy(x.copy()))


def torch_norm(kind, layer, **names):
    shape = next(iter(layer.parameters().values())).shape
    module = kind(shape if len(shape) > 1 else shape[0], eps=layer.eps)
    module = module.to(parameter(layer.gain).dtype)
    for ours, theirs in names.items():
        getattr(module, theirs).data = torch.from_numpy(getattr(layer, ours).copy())
    return module.eval()


class ChannelsLast(torch.nn.Module if torch else object):
    """BatchNorm1d takes the channels second."""

    def __init__(self, layer):
        super().__init__()
        self.norm = torch_norm(
            torch.nn.BatchNorm1d,
            layer,
            gain="weight",
            bias="bias",
            mean="running_mean",
            var="running_var",
        )

    def forward(self, x):
        return self.norm(x.reshape(-1, x.shape[-1])).reshape(x.shape)


class Standardized(ChannelsLast):
    def __init__(self, layer):
        torch.nn.Module.__init__(self)
        self.mean, self.scale = parameter(layer.mean), parameter(layer.scale)

    def forward(self, x):
        return (x - self.mean) / self.scale


class Plus(ChannelsLast):
    def __init__(self, layer):
        torch.nn.Module.__init__(self)
        self.inner = as_module(layer.inner)

    def forward(self, x):
        return x + self.inner(x)


class Function(ChannelsLast):
    def __init__(self, name, **options):
        torch.nn.Module.__init__(self)
        self.name, self.options = name, options

    def forward(self, x):
        known = {"leaky_relu": {"negative_slope": 0.01}, "elu": {"alpha": 1.0}}
        return CASES[self.name][1](x, **known.get(self.name, {}) | self.options)


def as_dense(layer):
    linear = torch.nn.Linear(*layer.weight.shape, bias=layer.bias is not None)
    linear.weight = parameter(layer.weight.T)
    if layer.bias is not None:
        linear.bias = parameter(layer.bias)
    return torch.nn.Sequential(linear, Function(layer.activation))


MODULES = {
    "Dense": as_dense,
    "Activation": lambda layer: Function(layer.activation, **layer.options),
    "LayerNorm": lambda layer: torch_norm(torch.nn.LayerNorm, layer, gain="weight", bias="bias"),
    "RMSNorm": lambda layer: torch_norm(torch.nn.RMSNorm, layer, gain="weight"),
    "BatchNorm": lambda layer: ChannelsLast(layer),
    "Standardize": lambda layer: Standardized(layer),
    "Flatten": lambda layer: torch.nn.Flatten(),
    "Dropout": lambda layer: torch.nn.Dropout(layer.rate).eval(),
    "Residual": lambda layer: Plus(layer),
    "Sequential": lambda layer: torch.nn.Sequential(*map(as_module, layer.layers)),
}
MODULES |= test_space.MODULES_OF_TORCH


def as_module(layer):
    """The torch module that a layer stands for, with the same parameters."""
    return MODULES[type(layer).__name__](layer)


@needs_torch
@every_layer
@every_float
def test_torch_s_module_says_the_same_of_every_layer(layer, shape, dtype):
    rng = np.random.default_rng(3)
    drawn = {
        name: (
            rng.uniform(0.1, 3, value.shape)
            if name.endswith(("var", "scale"))
            else rng.normal(size=value.shape)
        ).astype(dtype)
        for name, value in layer.parameters().items()
    }
    layer = layer.with_parameters(drawn)
    x = rng.normal(size=shape).astype(dtype)
    value, error = error_bound(layer, x)
    if isinstance(layer, nnxp.BatchNorm):
        options = layer.mean, layer.var, layer.gain, layer.bias
        error = np.maximum(error, error_bound(batch_norm_of_torch, x, *options, eps=layer.eps)[1])
    with torch.no_grad():
        y = as_module(layer)(torch.from_numpy(x)).numpy()
    check = compare("", "", "torch", y, value, error)
    assert check.ok, check.problem


def freeze():
    """Write what the torch that is installed says, in float64, of small cases of every kernel."""
    cases = []
    for name in CASES:
        arrays, options = CASES[name][0](Draw(1, 4, 5))
        answer = by_torch(name, arrays, options, "float64")
        given = [each.tolist() for each in arrays]
        cases.append(
            {"kernel": name, "options": options, "arrays": given, "answer": answer.tolist()}
        )
    lines = ",\n".join(json.dumps(case) for case in cases)
    FROZEN.write_text(f'{{"torch": "{torch.__version__}", "cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    freeze()
