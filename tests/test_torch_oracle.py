"""PyTorch as an oracle: what our float64 reference says, another library says too.

Parity only shows that backends agree with the reference; a formula that ignores its own eps agrees
with itself everywhere. So torch's answers, in float64 and in float32, must lie within the bound
around the reference, with every parameter and option drawn at random. Where torch is not installed
the answers that it once gave are read from torch_cases.json, which this writes:

    python tests/test_torch_oracle.py
"""

from __future__ import annotations

import json
from inspect import signature
from pathlib import Path

import numpy as np
import pytest

import nnxp
import test_space
from conftest import SEQUENCES, every_swept_layer
from nnxp import kernels
from nnxp.testing import LIMIT, error_bound
from nnxp.testing.parity import compare
from oracles import ORACLES, Draw, batch_norm_of_torch, torch

FROZEN = Path(__file__).with_name("torch_cases.json")
needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed")
every_float = pytest.mark.parametrize("dtype", ["float32", "float64"])


# Every kernel: what arrays and options it is asked with, and how torch says the same.
CASES = {name: (oracle.draw, oracle.torch) for name, oracle in ORACLES.items()} | test_space.CASES


def by_torch(name, arrays, options, dtype):
    tensors = [torch.from_numpy(each.astype(dtype)) for each in arrays]
    return CASES[name][1](*tensors, **options).numpy()


def reference(name, arrays, options, dtype):
    """What our reference says, and the unit of doubt of a computation in dtype."""
    given = [each.astype(dtype) for each in arrays]
    value, error = error_bound(kernels.KERNELS[name], *given, **options)
    rounded = ORACLES[name].rounded if name in ORACLES else None
    if rounded is not None:
        error = np.maximum(error, error_bound(rounded, *given, **options)[1])
    return value, error


def test_every_kernel_is_asked():
    frozen = {case["kernel"] for case in json.loads(FROZEN.read_text())["cases"]}
    assert frozen == set(kernels.KERNELS) - SEQUENCES
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


def as_tuple(option):
    """What JSON has made a list of."""
    return tuple(map(as_tuple, option)) if isinstance(option, list) else option


@pytest.mark.parametrize("name", CASES)
@every_float
def test_torch_once_said_the_same_of_every_kernel(name, dtype):
    found = json.loads(FROZEN.read_text())
    for case in found["cases"]:
        if case["kernel"] == name:
            arrays = [np.array(each) for each in case["arrays"]]
            options = {key: as_tuple(option) for key, option in case["options"].items()}
            value, error = reference(name, arrays, options, dtype)
            frozen = compare(name, "", "torch", np.array(case["answer"]), value, error)
            assert frozen.ok, f"torch {found['torch']}: {frozen.problem}"
            given = [each.astype(dtype) for each in arrays]
            ours = kernels.KERNELS[name](*given, **options)
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


class Sloped(torch.nn.Module if torch else object):
    def __init__(self, layer):
        super().__init__()
        self.slope = torch.from_numpy(layer.slope)

    def forward(self, x):
        return torch.where(x > 0, x, x * self.slope)


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
        parameters = signature(kernels.KERNELS[self.name].reference).parameters
        usual = {
            name: each.default for name, each in parameters.items() if name not in ("x", "out")
        }
        return ORACLES[self.name].torch(x, **usual | self.options)


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
    "GLU": lambda layer: torch.nn.GLU(-1),
    "PReLU": lambda layer: Sloped(layer),
    "Flatten": lambda layer: torch.nn.Flatten(),
    "Dropout": lambda layer: torch.nn.Dropout(layer.rate).eval(),
    "Residual": lambda layer: Plus(layer),
    "Sequential": lambda layer: torch.nn.Sequential(*map(as_module, layer.layers)),
}
MODULES |= test_space.MODULES_OF_TORCH


# Layers that are made of torch's modules in test_from_torch.py, of ONNX's operators in
# test_onnx*.py, of scikit-learn's steps in test_sklearn.py, or of kernels in test_space.py.
TURNED_ROUND = "attention positions recurrent torch_graph graph columns resize".split()


def as_module(layer):
    """The torch module that a layer stands for, with the same parameters."""
    return MODULES[type(layer).__name__](layer)


@needs_torch
@every_swept_layer
@every_float
def test_torch_s_module_says_the_same_of_every_layer(layer, shape, dtype):
    if type(layer).__module__.rpartition(".")[2] in TURNED_ROUND:
        return
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
    elif isinstance(layer, nnxp.Activation) and ORACLES[layer.activation].rounded is not None:
        rounded = ORACLES[layer.activation].rounded
        error = np.maximum(error, error_bound(rounded, x, **layer.options)[1])
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
