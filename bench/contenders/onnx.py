"""ONNX: the network as a model, and onnx's own evaluator."""

from __future__ import annotations

from typing import Any

from contenders import Built
from networks import Network, Task

MODULES = ("onnx", "numpy")


def model(network: Network) -> Any:
    """The network as ONNX has it: a Gemm and an activation for each layer."""
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


def reference(task: Task) -> Built:
    """onnx's own evaluator: NumPy, node by node."""
    from onnx.reference import ReferenceEvaluator

    evaluator, x = ReferenceEvaluator(model(task.network)), task.rows
    return Built(lambda: evaluator.run(None, {"x": x})[0], "BLAS' own threads")


CPU, GPU = {"onnx": reference}, {}
