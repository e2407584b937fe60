"""ONNX models that are made to do harm: well formed as protobuf, and wrong in what they say.

`hostile(rng, model)` makes one. What lies in other files is to be refused before it is opened, a
number that names a shape before anything of that shape is made.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HUGE = (1 << 20, 1 << 31, 1 << 40, (1 << 63) - 1, -1, -(1 << 62), 0)
AWAY = ("/etc/hostname", "../sound.onnx", "a/../../x", "link.bin", "..\\x", "", "\0", ".",
        "x" * 5000, "pipe")  # fmt: skip


def value(name: str, shape: Any = None, kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def sound() -> Any:
    """x (rows, 3) through shape arithmetic, a convolution, a product, a branch and a reduction."""
    rng = np.random.default_rng(0)

    def branch(op: str) -> Any:
        return helper.make_graph([helper.make_node(op, ["p"], [op])], op, [], [value(op)])

    nodes = [
        helper.make_node("Shape", ["x"], ["n"], start=0, end=1),
        helper.make_node("Concat", ["n", "rest"], ["s"], axis=0),
        helper.make_node("Reshape", ["x", "s"], ["images"]),
        helper.make_node("Conv", ["images", "k"], ["c"], kernel_shape=[2, 1], pads=[1, 0, 0, 0]),
        helper.make_node("Resize", ["c", "", "scales"], ["z"], mode="nearest"),
        helper.make_node("ReduceMean", ["z", "axes"], ["m"], keepdims=0),
        helper.make_node("Gemm", ["m", "w", "b"], ["p"], alpha=0.5),
        helper.make_node("If", ["c0"], ["q"],
                         then_branch=branch("Relu"), else_branch=branch("Neg")),
        helper.make_node("Constant", [], ["one"], value=numpy_helper.from_array(np.float32([1]))),
        helper.make_node("Add", ["q", "one"], ["y"]),
    ]  # fmt: skip
    arrays = {
        "rest": np.array([1, 3, 1]), "k": rng.normal(size=(4, 1, 2, 1)).astype("float32"),
        "scales": np.float32([1, 1, 2, 1]), "axes": np.array([2, 3]), "c0": np.array(True),
        "w": rng.normal(size=(4, 2)).astype("float32"), "b": np.float32([1, 2]),
    }  # fmt: skip
    held = [numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items()]
    graph = helper.make_graph(nodes, "g", [value("x", ["n", 3])], [value("y")], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def pick(rng: np.random.Generator, things: Any) -> Any:
    return things[int(rng.integers(len(things)))]


# What is done to a model


def absurd_shape(rng: Any, model: Any) -> None:
    pick(rng, model.graph.initializer).dims.extend([int(pick(rng, HUGE)), 2])


def absurd_input(rng: Any, model: Any) -> None:
    shape = model.graph.input[0].type.tensor_type.shape
    pick(rng, shape.dim).dim_value = int(pick(rng, HUGE))
    for _ in range(int(rng.integers(3))):
        shape.dim.add().dim_value = int(pick(rng, HUGE))


def unknown_type(rng: Any, model: Any) -> None:
    kind = int(pick(rng, (0, 8, 14, 17, 22, 26, 999)))
    if rng.integers(2):
        pick(rng, model.graph.initializer).data_type = kind
    else:
        model.graph.input[0].type.tensor_type.elem_type = kind


def data_elsewhere(rng: Any, model: Any) -> None:
    tensor = pick(rng, model.graph.initializer)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    places = {"location": pick(rng, (*AWAY, "beside.bin", "beside.bin"))}
    places |= {key: str(pick(rng, (*HUGE, "x", 0, 8))) for key in ("offset", "length")
               if rng.integers(2)}  # fmt: skip
    for key, said in places.items():
        tensor.external_data.add(key=key, value=said)


def cycle(rng: Any, model: Any) -> None:
    a, b = pick(rng, model.graph.node), pick(rng, model.graph.node)
    a.input.append(b.output[0])
    if a.input:
        a.input[0] = b.output[0]


def other_names(rng: Any, model: Any) -> None:
    each = pick(rng, model.graph.node)
    names = each.output if rng.integers(2) or not each.input else each.input
    names[int(rng.integers(len(names)))] = pick(rng, ("", "x", "y", "w", "none", "n" * 100_000))


def other_operator(rng: Any, model: Any) -> None:
    each = pick(rng, model.graph.node)
    each.op_type = pick(rng, ("Loop", "Scan", "If", "Exit", "", "Tile", "Expand", "Range", "OneHot",
                              "ConstantOfShape", "Pad", "Upsample", "Split", "GRU", "Attention",
                              "Gather", "Einsum", "CumSum", "TopK", "ConvTranspose", "Flatten",
                              "Identity", "Pow", "Unsqueeze", "DepthToSpace"))  # fmt: skip
    each.domain = pick(rng, ("", "", "", "ai.onnx.ml", "evil"))
    if rng.integers(2):
        del each.attribute[:]


def other_attribute(rng: Any, model: Any) -> None:
    each = pick(rng, model.graph.node)
    names = ("axis", "kernel_shape", "pads", "strides", "dilations", "group", "to", "mode", "alpha",
             "start", "end", "keepdims", "value", "equation", "hidden_size", "auto_pad", "perm",
             "then_branch", "blocksize", "num_outputs", "output_shape", "ceil_mode")  # fmt: skip
    values = (int(pick(rng, HUGE)), [int(pick(rng, HUGE)) for _ in range(int(rng.integers(5)))],
              float(pick(rng, (np.nan, np.inf, 1e38, 0))), "SAME_LOWER", b"\xff\xfe",
              [0, 0], [1 << 20] * 2, [1.5, 2.5], numpy_helper.from_array(np.arange(3)))  # fmt: skip
    made = helper.make_attribute("value", 1)
    said = pick(rng, values)
    if said != []:
        made = helper.make_attribute("value", said)
    made.name = pick(rng, names)
    if each.attribute and rng.integers(2):
        made.name = each.attribute[0].name
        del each.attribute[0]
    each.attribute.append(made)


def few_numbers_for_many(rng: Any, model: Any) -> None:
    """A node that makes an array of any size out of numbers that name its shape."""
    sizes = [
        int(pick(rng, (*HUGE, 3, 2, 1 << 14, 1 << 27))) for _ in range(int(rng.integers(1, 4)))
    ]
    ints = np.array(sizes)
    op, takes, arrays = pick(rng, (
        ("ConstantOfShape", ["big"], {}),
        ("Tile", ["x", "big"], {}),
        ("Expand", ["x", "big"], {}),
        ("Range", ["zero", "big", "zero"], {"zero": np.array(1)}),
        ("OneHot", ["ids", "big", "two"], {"ids": np.array([0, 1]), "two": np.array([0.0, 1.0])}),
        ("Pad", ["x", "big"], {}),
        ("Reshape", ["x", "big"], {}),
        ("Resize", ["x", "", "big"], {}),
        ("Resize", ["x", "", "", "big"], {}),
        ("TopK", ["x", "big"], {}),
        ("Gather", ["x", "big"], {}),
        ("Slice", ["x", "big", "big", "big", "big"], {}),
        ("Split", ["x", "big"], {}),
        ("Trilu", ["x", "big"], {}),
        ("EyeLike", ["x"], {}),
    ))  # fmt: skip
    if op == "Range" and rng.integers(2):
        ints = ints[:1].reshape(())
    if op == "Pad" or rng.integers(3) == 0:
        ints = np.resize(ints, 4)
    arrays = {
        "big": ints.astype("float32") if op == "Resize" and rng.integers(2) else ints
    } | arrays
    for name, array in arrays.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    model.graph.node.append(helper.make_node(op, takes, ["many"]))
    model.graph.node.append(helper.make_node("ReduceMax", ["many"], ["top"], keepdims=0))
    model.graph.output[0].name = pick(rng, ("many", "top"))


def huge_window(rng: Any, model: Any) -> None:
    """A window, stride or dilation of any size."""
    conv = model.graph.node[3]
    if rng.integers(2):
        conv.op_type = pick(rng, ("MaxPool", "AveragePool", "LpPool", "ConvTranspose"))
        if conv.op_type != "ConvTranspose":
            del conv.input[1:]
    for name in ("pads", "strides", "dilations", "kernel_shape", "output_padding"):
        if rng.integers(3) == 0:
            for i, each in enumerate(conv.attribute):
                if each.name == name:
                    del conv.attribute[i]
                    break
            sizes = [
                int(pick(rng, (*HUGE, 1, 2, 1 << 14))) for _ in range(4 if name == "pads" else 2)
            ]
            conv.attribute.append(helper.make_attribute(name, sizes))


def deep(rng: Any, model: Any) -> bytes:
    """Branches within branches, by the bytes: protobuf itself writes them only so deep."""
    inner = helper.make_node("Relu", ["p"], ["r"]).SerializeToString()
    outer = helper.make_node("If", ["c0"], ["r"]).SerializeToString()
    for _ in range(int(pick(rng, (3, 19, 25, 60, 300, 20_000)))):
        graph = _field(1, inner) + _field(12, value("r").SerializeToString())
        inner = outer
        for name in (b"then_branch", b"else_branch")[: int(rng.integers(4) > 0) + 1]:
            small = graph if len(graph) < 10_000 or name[:1] == b"t" else graph[:0]
            inner += _field(5, _field(1, name) + _field(6, small) + b"\xa0\x01\x05")
    return _field(7, _field(1, inner))


def _field(number: int, data: bytes) -> bytes:
    """Bytes as a field of a message."""
    size, said = len(data), b""
    while size > 127:
        said, size = said + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + said + bytes([size]) + data


def endless(rng: Any, model: Any) -> None:
    """A loop that does not end, or loops in loops."""
    body = [helper.make_node("Identity", ["on"], ["still"]), helper.make_node("Neg", ["v"], ["u"])]
    state = [value("i", [], TensorProto.INT64), value("on", [], TensorProto.BOOL), value("v")]
    ends = [value("still", [], TensorProto.BOOL), value("u")]
    graph = helper.make_graph(body, "body", state, ends)
    for depth in range(int(rng.integers(1, 4))):
        node = helper.make_node(
            "Loop", [pick(rng, ("", "times")), "", "p"], [f"l{depth}"], body=graph
        )
        inner = [each for each in state if each.name != "v"] + [value(f"v{depth}")]
        for each in inner[:2]:
            each.name += str(depth)
        keep = helper.make_node("Identity", [inner[1].name], [f"s{depth}"])
        ends = [value(f"s{depth}", [], TensorProto.BOOL), value(f"l{depth}")]
        graph = helper.make_graph([node, keep], "b", inner, ends)
    model.graph.initializer.append(
        numpy_helper.from_array(np.array(pick(rng, (*HUGE, 3, 50, 1000))), "times")
    )
    model.graph.node.append(node)
    model.graph.output[0].name = node.output[0]


def long_chain(rng: Any, model: Any) -> None:
    """Each node doubles what the one before it has made."""
    last = "y"
    op = pick(rng, ("Concat", "Add", "Tile"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 2]), "double"))
    for i in range(int(pick(rng, (40, 200, 2000)))):
        takes = [last, "double"] if op == "Tile" else [last, last]
        options = {"axis": 1} if op == "Concat" else {}
        model.graph.node.append(helper.make_node(op, takes, [f"d{i}"], **options))
        last = f"d{i}"
    model.graph.output[0].name = last


def functions(rng: Any, model: Any) -> None:
    """A function that calls itself, or each the next one twice."""
    many = int(pick(rng, (1, 2, 12, 40)))
    around = bool(rng.integers(2))
    for i in range(many):
        to = (i + 1) % many if around else i + 1
        ends = not around and i == many - 1
        inner = [helper.make_node("Relu", ["a"], ["b"])] if ends else [
            helper.make_node(f"f{to}", ["a"], ["c"], domain="own"),
            helper.make_node(f"f{to}", ["c"], ["b"], domain="own"),
        ]  # fmt: skip
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
        model.functions.append(helper.make_function("own", f"f{i}", ["a"], ["b"], inner, opsets))
    model.opset_import.append(helper.make_opsetid("own", 1))
    model.graph.node.append(helper.make_node("f0", ["y"], ["z"], domain="own"))
    model.graph.output[0].name = "z"


def versions(rng: Any, model: Any) -> None:
    model.opset_import[0].version = int(pick(rng, (*HUGE, 1, 5, 7, 9, 11, 13, 28)))
    if rng.integers(2):
        model.ir_version = int(pick(rng, (*HUGE, 1, 3, 4, 99)))
    if rng.integers(3) == 0:
        model.opset_import.append(helper.make_opsetid(pick(rng, ("", "ai.onnx.ml", "x")), 3))


def wrong_numbers(rng: Any, model: Any) -> None:
    """More or fewer numbers than the shape says, or in another field."""
    tensor = pick(rng, model.graph.initializer)
    tensor.raw_data = tensor.raw_data[: int(rng.integers(9))] * int(pick(rng, (0, 1, 3, 1000)))
    if rng.integers(2):
        tensor.ClearField("raw_data")
        tensor.float_data.extend([1.0] * int(rng.integers(9)))


def other_values(rng: Any, model: Any) -> None:
    """Other numbers of the right count, where they name shapes, axes and scales."""
    tensor = pick(rng, model.graph.initializer)
    array = numpy_helper.to_array(tensor)
    if array.dtype == np.int64:
        array = np.array([pick(rng, HUGE) for _ in range(array.size)]).reshape(array.shape)
    elif array.dtype == np.float32:
        array = np.full_like(array, pick(rng, (np.nan, np.inf, -1, 0, 1e30, 1e5, 1e-30)))
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def twice(rng: Any, model: Any) -> None:
    graph = model.graph
    part = pick(rng, (graph.initializer, graph.node, graph.input, graph.output))
    part.append(pick(rng, part))


def sparse(rng: Any, model: Any) -> None:
    made = helper.make_sparse_tensor(
        numpy_helper.from_array(np.float32([1.0]), "sparse"),
        numpy_helper.from_array(np.array([1 << 40])), [1 << 50],
    )  # fmt: skip
    model.graph.sparse_initializer.append(made)


HARMS: tuple[Callable[[Any, Any], bytes | None], ...] = (
    absurd_shape, absurd_input, unknown_type, data_elsewhere, cycle, other_names, other_operator,
    other_attribute, few_numbers_for_many, huge_window, deep, long_chain, functions, versions,
    endless,    wrong_numbers, other_values, twice, sparse,
)  # fmt: skip


def hostile(rng: np.random.Generator, whole: bytes) -> bytes:
    """The model with one harm, or two."""
    model = onnx.ModelProto.FromString(whole)
    more = pick(rng, HARMS)(rng, model) or b""
    if rng.integers(4) == 0:
        with suppress(ValueError, TypeError):  # of numbers that are not there any more
            more += pick(rng, HARMS)(rng, model) or b""
    return model.SerializeToString() + more
