"""Who computes it: nnxp, its floor, and everybody else, each at the best setting known to us.

A contender is a function of a network and its rows that gives `run`, which computes them, host
array in and host array out, and a word on its setting. Where the best setting depends on the
machine, it is found by trial before the race. Run as a program, this is the process of one of them:

    python bench/contenders.py NAME "784-128-64-10 relu 65536" [TRIAL]

TRIAL is the seconds that each setting is tried for; 0 takes the first, for a trial takes memory.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np

from networks import Array, Network, parse
from nnxp.backend._machine import usable_cores
from nnxp.race import FLOOR, PAUSE, TILED, Run, _warm, entrant, serve

Built = tuple[Run, str]


@dataclass(frozen=True)
class Rival:
    """How a contender is built, and the packages whose versions matter."""

    build: Callable[[Network, Array], Built]
    packages: tuple[str, ...]


TRIAL = 0.5


def fastest(settings: dict[str, Callable[[], Run]]) -> Built:
    """The setting that is the fastest here; one that fails is not taken."""
    if TRIAL == 0:
        first, prepare = next(iter(settings.items()))
        return prepare(), first
    seconds: dict[str, float] = {}
    failed: Exception | None = None
    for name, prepare in settings.items():
        try:
            run = prepare()
            run()  # compiles, where there is something to compile
            time.sleep(PAUSE)
            seconds[name] = _warm(run, TRIAL)
        except ModuleNotFoundError:
            raise
        except Exception as error:
            print(f"{name}: {error!r}", file=sys.stderr)
            failed = error
    if failed is not None and not seconds:
        raise failed
    best = min(seconds, key=lambda name: seconds[name])
    tried = "; ".join(f"{name} {took * 1e3:.3g} ms" for name, took in seconds.items())
    return settings[best](), f"{best} (tried: {tried})"


def naive(network: Network, x: Array) -> Built:
    """NumPy as one writes it down."""
    activations: dict[str, Callable[[Array], Array]] = {
        "relu": lambda h: np.maximum(h, 0),
        "sigmoid": lambda h: 1 / (1 + np.exp(-h)),
        "tanh": np.tanh,
        "identity": lambda h: h,
    }
    layers = network.layers()

    def run() -> Array:
        h = x
        for weight, bias, activation in layers:
            h = activations[activation](h @ weight + bias)
        return h

    return run, "BLAS' own threads"


# PyTorch


def torch_net(network: Network) -> Any:
    import torch

    torch.set_grad_enabled(False)
    names = {"relu": "ReLU", "sigmoid": "Sigmoid", "tanh": "Tanh", "identity": "Identity"}
    modules: list[Any] = []
    for weight, bias, activation in network.layers():
        dense = torch.nn.utils.skip_init(torch.nn.Linear, *weight.shape)
        dense.weight = torch.nn.Parameter(torch.from_numpy(np.ascontiguousarray(weight.T)))
        dense.bias = torch.nn.Parameter(torch.from_numpy(bias))
        modules.append(dense)
        if activation != "identity":
            modules.append(getattr(torch.nn, names[activation])())
    return torch.nn.Sequential(*modules).eval()


def with_torch_threads(prepare: Callable[[], Run]) -> dict[str, Callable[[], Run]]:
    """All cores, or one: which is better depends on how much there is to do."""
    import torch

    def threads(count: int) -> Run:
        torch.set_num_threads(count)
        return prepare()

    return {
        f"{count} threads": partial(threads, count) for count in sorted({usable_cores(), 1})[::-1]
    }


def torch_eager(network: Network, x: Array) -> Built:
    """A module, called: its products are MKL's."""
    import torch

    net, rows = torch_net(network), torch.from_numpy(x)

    def run() -> Array:
        with torch.inference_mode():
            made: Array = net(rows).numpy()
        return made

    return fastest(with_torch_threads(lambda: run))


def torch_onednn(network: Network, x: Array) -> Built:
    """The same module moved to oneDNN, or traced and frozen with oneDNN's fusions."""
    import torch
    from torch.utils import mkldnn

    net, rows = torch_net(network), torch.from_numpy(x)

    def moved() -> Run:
        there = mkldnn.to_mkldnn(net)

        def run() -> Array:
            with torch.inference_mode():
                made: Array = there(rows.to_mkldnn()).to_dense().numpy()
            return made

        return run

    def frozen() -> Run:
        torch.jit.enable_onednn_fusion(True)
        traced = torch.jit.freeze(torch.jit.trace(net, rows))

        def run() -> Array:
            with torch.inference_mode():
                made: Array = traced(rows).numpy()
            return made

        run()  # the first two calls are those that the fusion learns from
        return run

    settings = {
        f"{name}, {threads}": prepare
        for name, way in {"to_mkldnn": moved, "jit": frozen}.items()
        for threads, prepare in with_torch_threads(way).items()
    }
    return fastest(settings)


def torch_compile(network: Network, x: Array) -> Built:
    """torch.compile, with the weights frozen, with tuning, or as it is."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no helpers that stay
    import torch

    net, rows = torch_net(network), torch.from_numpy(x)

    def compiled(**options: Any) -> Run:
        torch._dynamo.reset()
        made = torch.compile(net, fullgraph=True, dynamic=False, options=options or None)

        def run() -> Array:
            with torch.inference_mode():
                result: Array = made(rows).numpy()
            return result

        return run

    ways = {
        "default": compiled,
        "freezing": partial(compiled, freezing=True),
        "max_autotune": partial(compiled, max_autotune=True),
        "freezing and max_autotune": partial(compiled, freezing=True, max_autotune=True),
    }
    return fastest(
        {
            f"{name}, {threads}": prepare
            for name, way in ways.items()
            for threads, prepare in with_torch_threads(way).items()
            if len(x) <= 512 or threads != "1 threads"  # compiling takes long: where it may help
        }
    )


# ONNX


def onnx_model(network: Network) -> Any:
    from onnx import TensorProto, helper, numpy_helper

    names = {"relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh"}
    nodes, weights, last = [], [], "x"
    for i, (weight, bias, activation) in enumerate(network.layers()):
        weights += [
            numpy_helper.from_array(weight, f"weight{i}"),
            numpy_helper.from_array(bias, f"bias{i}"),
        ]
        nodes.append(helper.make_node("Gemm", [last, f"weight{i}", f"bias{i}"], [f"sum{i}"]))
        last = f"sum{i}"
        if activation != "identity":
            nodes.append(helper.make_node(names[activation], [last], [f"y{i}"]))
            last = f"y{i}"
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, network.sizes[0]])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, [None, network.sizes[-1]])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def onnxruntime(network: Network, x: Array) -> Built:
    """A session with all optimizations, on all cores or on one."""
    import onnxruntime as ort

    model = onnx_model(network).SerializeToString()

    def session(threads: int) -> Run:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        made = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

        def run() -> Array:
            (y,) = made.run(None, {"x": x})
            return y  # type: ignore[no-any-return]

        return run

    counts = sorted({usable_cores(), 1})[::-1]
    return fastest({f"{count} threads": partial(session, count) for count in counts})


def onnx_reference(network: Network, x: Array) -> Built:
    """onnx's own evaluator: NumPy, node by node."""
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(onnx_model(network))
    return lambda: evaluator.run(None, {"x": x})[0], "BLAS' own threads"


# the others


def jax(network: Network, x: Array) -> Built:
    """One function, jitted; the rows come from NumPy, the weights are on the device."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax.numpy as jnp

    activations = {
        "relu": jax.nn.relu,
        "sigmoid": jax.nn.sigmoid,
        "tanh": jnp.tanh,
        "identity": lambda h: h,
    }
    layers = network.layers()
    weights = jax.device_put([layer[:2] for layer in layers])

    def forward(weights: Any, h: Any) -> Any:
        for (weight, bias), (_, _, activation) in zip(weights, layers, strict=True):
            h = activations[activation](h @ weight + bias)
        return h

    def arguments() -> Run:
        jitted = jax.jit(forward)
        return lambda: np.asarray(jitted(weights, x).block_until_ready())

    def constants() -> Run:
        jitted = jax.jit(partial(forward, weights))
        return lambda: np.asarray(jitted(x).block_until_ready())

    return fastest({"weights as arguments": arguments, "weights as constants": constants})


def sklearn(network: Network, x: Array) -> Built:
    """An MLPRegressor with our weights, that does not look for NaN in its input."""
    from sklearn import set_config
    from sklearn.neural_network import MLPRegressor

    set_config(assume_finite=True)
    names = {"relu": "relu", "sigmoid": "logistic", "tanh": "tanh"}
    weights, biases, _ = zip(*network.layers(), strict=True)
    # One step of training on two rows of nothing makes all that predict needs; then the weights.
    hidden = (1,) * (len(weights) - 1)
    net = MLPRegressor(hidden_layer_sizes=hidden, activation=names[network.activation])
    zeros = np.zeros((2, network.sizes[0]), "float32")
    net.partial_fit(zeros, np.zeros((2, network.sizes[-1]), "float32"))
    net.coefs_, net.intercepts_ = list(weights), list(biases)
    net.hidden_layer_sizes = network.sizes[1:-1]
    return lambda: net.predict(x), "predict of an MLPRegressor, assume_finite"


def thinc(network: Network, x: Array) -> Built:
    """A chain of its layers, with its own products (BLIS, one thread) or NumPy's."""
    from thinc import api

    def tanh(model: Any, given: Any, is_train: bool) -> Any:
        made = model.ops.affine(given, model.get_param("W"), model.get_param("b"))
        return model.ops.xp.tanh(made, out=made), lambda gradient: gradient

    def tanh_layer(outputs: int, inputs: int) -> Any:  # thinc has none
        dims = {"nO": outputs, "nI": inputs}
        return api.Model("tanh", tanh, dims=dims, params={"W": None, "b": None})

    kinds = {
        "relu": api.Relu,
        "sigmoid": api.Sigmoid,
        "tanh": tanh_layer,
        "identity": api.Linear,
    }

    def chain(use_blis: bool) -> Run:
        api.set_current_ops(api.NumpyOps(use_blis=use_blis))
        layers = []
        for weight, bias, activation in network.layers():
            inputs, outputs = weight.shape
            layer = kinds[activation](outputs, inputs)
            layer.set_param("W", np.ascontiguousarray(weight.T))
            layer.set_param("b", bias)
            layers.append(layer)
        net = api.chain(*layers)
        return lambda: net.predict(x)

    return fastest({"NumPy's BLAS": partial(chain, False), "BLIS": partial(chain, True)})


def our(name: str) -> Callable[[Network, Array], Built]:
    """nnxp or one of its floors."""

    def build(network: Network, x: Array) -> Built:
        run, about = entrant(name, network.model(), x)
        return run, about.get("setting", "")

    return build


CONTENDERS = {
    "nnxp": Rival(our("nnxp"), ("nnxp", "numpy")),
    FLOOR: Rival(our(FLOOR), ("numpy",)),
    TILED: Rival(our(TILED), ("numpy",)),
    "naive": Rival(naive, ("numpy",)),
    "torch": Rival(torch_eager, ("torch",)),
    "torch-onednn": Rival(torch_onednn, ("torch",)),
    "torch-compile": Rival(torch_compile, ("torch",)),
    "onnxruntime": Rival(onnxruntime, ("onnxruntime",)),
    "jax": Rival(jax, ("jax", "jaxlib")),
    "sklearn": Rival(sklearn, ("scikit-learn", "numpy")),
    "thinc": Rival(thinc, ("thinc", "numpy", "blis")),
    "onnx": Rival(onnx_reference, ("onnx", "numpy")),
}


def main() -> None:
    global TRIAL
    name, text, *trial = sys.argv[1:]
    TRIAL = float(trial[0]) if trial else TRIAL
    rival, network = CONTENDERS[name], parse(text)

    def build() -> tuple[Run, dict[str, Any]]:
        run, setting = rival.build(network, network.draw())
        versions = {package: version(package) for package in rival.packages}
        return run, {"versions": versions, "setting": setting}

    serve(build)


if __name__ == "__main__":
    main()
