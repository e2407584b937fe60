"""Graphs from ONNX files: what they take, how their rows are found, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import nnxp
from conftest import draw
from nnxp import CheckpointError, ConversionError, DtypeMismatch, ShapeError, load_onnx
from nnxp.io import onnx as reader
from nnxp.program.mixing import mixing
from nnxp.testing import assert_parity

onnx = pytest.importorskip("onnx", reason="onnx is not installed: it reads the files")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

FLOAT, INT, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
W, B = draw((6, 4), seed=1), draw(4, seed=2)


def info(name, shape, kind=FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def proto(nodes, inputs, outputs=("y",), arrays=None, opset=17, domains=(), **options):
    """A model of these nodes: ("MatMul", "x w", "y", attributes)."""
    made = [helper.make_node(op, takes.split(" "), gives.split(" "), **dict(*rest))
            for op, takes, gives, *rest in nodes]  # fmt: skip
    held = [numpy_helper.from_array(np.asarray(a), name) for name, a in (arrays or {}).items()]
    ends = [info(y, None) if isinstance(y, str) else y for y in outputs]
    starts = [x if not isinstance(x, tuple) else info(*x) for x in inputs]
    graph = helper.make_graph(made, "g", starts, ends, held)
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 3) for d in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=options.get("ir", 8))


def dense(rows="n", **options):
    nodes = [("MatMul", "x w", "p"), ("Add", "p b", "s"), ("Relu", "s", "y")]
    return proto(nodes, [("x", [rows, 6])], [info("y", [rows, 4])], {"w": W, "b": B}, **options)


def answer(x):
    return np.maximum(x @ W + B, 0)


# What comes in


def test_a_model_is_read_from_a_path_bytes_or_a_proto(tmp_path):
    x, path = draw((5, 6)), tmp_path / "dense.onnx"
    path.write_bytes(dense().SerializeToString())
    for source in (path, str(path), path.read_bytes(), dense()):
        model = load_onnx(source)
        np.testing.assert_allclose(model(x), answer(x), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(nnxp.predict(model, x), answer(x), rtol=1e-6, atol=1e-6)


def test_reading_leaves_the_proto_as_it_is():
    source = dense()
    before = source.SerializeToString()
    load_onnx(source)
    assert source.SerializeToString() == before


def test_a_model_is_gone_through_as_often_however_many_arrays_it_has(monkeypatch):
    walks = []
    monkeypatch.setattr(reader, "_nodes", lambda g, n=reader._nodes: walks.append(g) or n(g))
    counts = []
    for layers in (2, 20):
        nodes = [("MatMul", f"x{i} w{i}", f"x{i + 1}") for i in range(layers)]
        arrays = {f"w{i}": draw((6, 6)) for i in range(layers)}
        load_onnx(proto(nodes, [("x0", ["n", 6])], [f"x{layers}"], arrays))
        counts.append(len(walks))
        walks.clear()
    assert counts[0] == counts[1]


def test_initialisers_that_are_inputs_too_are_no_inputs():
    nodes = [("MatMul", "x w", "y")]
    model = load_onnx(proto(nodes, [("x", ["n", 6]), ("w", [6, 4])], arrays={"w": W}, ir=3))
    assert model.input_names == ("x",)


def test_optional_inputs_are_left_out():
    model = load_onnx(proto([("Clip", "x  high", "y")], [("x", ["n", 6])],
                            arrays={"high": np.float32(0.5)}))  # fmt: skip
    x = draw((3, 6))
    np.testing.assert_array_equal(model(x), np.minimum(x, np.float32(0.5)))


def test_a_scalar_is_an_input_and_constants_are_nodes():
    two = numpy_helper.from_array(np.float32(2), "two")
    nodes = [("Constant", "", "two", {"value": two}), ("Mul", "x s", "p"), ("Mul", "p two", "y")]
    nodes = [(op, takes, gives, *rest) for op, takes, gives, *rest in nodes]
    model = load_onnx(proto(nodes[1:], [("x", ["n", 6]), ("s", [])], arrays={"two": np.float32(2)}))
    constants = proto(nodes[1:], [("x", ["n", 6]), ("s", [])])
    constants.graph.node.insert(0, helper.make_node("Constant", [], ["two"], value=two))
    x, s = draw((3, 6)), np.asarray(3, "float32")
    np.testing.assert_allclose(model(x, s), 6 * x)
    np.testing.assert_allclose(load_onnx(constants)(x, s), 6 * x)


def test_an_output_may_be_an_input_or_several_things():
    model = load_onnx(proto([("Add", "x x", "y")], [("x", ["n", 6])], ["y", "x", "y"]))
    x = draw((3, 6))
    twice, same, again = model(x)
    np.testing.assert_array_equal(twice, 2 * x)
    np.testing.assert_array_equal(same, x)
    np.testing.assert_array_equal(again, twice)


@pytest.mark.parametrize("chosen", [True, False])
def test_a_branch_is_chosen_by_a_constant(chosen):
    branches = {}
    for name, op in (("then_branch", "Relu"), ("else_branch", "Neg")):
        nodes = [helper.make_node(op, ["x"], [f"{op}_y"])]
        branches[name] = helper.make_graph(nodes, name, [], [info(f"{op}_y", None)])
    model = load_onnx(proto([("If", "c", "y", branches)], [("x", ["n", 6])],
                            arrays={"c": np.asarray(chosen)}))  # fmt: skip
    x = draw((3, 6))
    wanted = np.maximum(x, 0) if chosen else -x
    np.testing.assert_array_equal(model(x), wanted)
    np.testing.assert_array_equal(nnxp.predict(model, x), wanted)


def test_what_does_not_fit_is_refused_by_the_input_s_name():
    model, x = load_onnx(dense()), draw((5, 6))
    with pytest.raises(ShapeError, match=r"input x is \(any, 6\), not \(5, 7\)"):
        model(draw((5, 7)))
    with pytest.raises(DtypeMismatch, match="input x is float32, not float64"):
        model(x.astype("float64"))
    with pytest.raises(ShapeError, match=r"takes 1 inputs \(x\), not 2"):
        model(x, x)


def test_errors_name_the_node():
    model = load_onnx(
        proto([("Reshape", "x s", "y")], [("x", None)], arrays={"s": np.array([5, 5])})
    )
    with pytest.raises(
        ShapeError, match=r"Reshape 'y' of \(2, 6\), \(2\)|Reshape 'y' of \(2, 6\), \(2,\)"
    ):
        model(draw((2, 6)))


# Rows


def flattened(batch):
    """x (batch, 2, 3) as vectors, by arithmetic on its shape, as exporters write it."""
    nodes = [("Shape", "x", "shape"), ("Gather", "shape zero", "rows", {"axis": 0}),
             ("Unsqueeze", "rows axes", "lead"), ("Concat", "lead rest", "flat", {"axis": 0}),
             ("Reshape", "x flat", "v"), ("Gemm", "v w b", "y")]  # fmt: skip
    arrays = {"zero": np.array(0), "axes": np.array([0]), "rest": np.array([6]), "w": W, "b": B}
    return proto(nodes, [("x", [batch, 2, 3])], [info("y", [batch, 4])], arrays)


def test_arithmetic_on_shapes_folds_whatever_the_number_of_rows():
    model, x = load_onnx(flattened("n")), draw((7, 2, 3))
    program = model.program((1, 2, 3))
    assert [step.name for step in program.steps] == ["reshape", "linear"]
    assert mixing(program) == ""
    np.testing.assert_allclose(program(x), x.reshape(7, 6) @ W + B, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(nnxp.predict(model, x), model(x), rtol=1e-6, atol=1e-6)


def test_a_constant_is_laid_beside_every_row():
    nodes = [("Shape", "x", "n", {"end": 1}), ("Concat", "n rest", "s", {"axis": 0}),
             ("Expand", "token s", "tokens"), ("Concat", "tokens x", "y", {"axis": 1})]  # fmt: skip
    token = draw((1, 1, 3))
    model = load_onnx(proto(nodes, [("x", ["n", 2, 3])],
                            arrays={"rest": np.array([1, 3]), "token": token}))  # fmt: skip
    x = draw((5, 2, 3), seed=4)
    wanted = np.concatenate([np.repeat(token, 5, axis=0), x], axis=1)
    np.testing.assert_array_equal(model(x), wanted)
    np.testing.assert_array_equal(nnxp.predict(model, x), wanted)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("known", [True, False])
def test_what_a_row_picks_by_its_own_number_is_its_own(flat, known):
    """x[arange(rows), k], as exporters write it: by places in what is flat, or by pairs of ids."""
    nodes = [("Shape", "x", "n", {"end": 1}), ("Squeeze", "n", "rows"),
             ("Range", "zero rows one", "r"), ("Unsqueeze", "r last", "column")]  # fmt: skip
    if flat:
        nodes += [("Mul", "column five", "first"), ("Add", "k first", "at"),
                  ("Reshape", "x all", "flat"), ("Gather", "flat at", "y")]  # fmt: skip
    else:
        nodes += [("Add", "column k", "like"), ("Shape", "like", "s"),
                  ("Expand", "column s", "a"), ("Expand", "k s", "b"),
                  ("Unsqueeze", "a last", "a1"), ("Unsqueeze", "b last", "b1"),
                  ("Concat", "a1 b1", "ab", {"axis": -1}), ("GatherND", "x ab", "y")]  # fmt: skip
    arrays = {"zero": np.array(0), "one": np.array(1), "last": np.array([-1]),
              "five": np.array([5]), "all": np.array([-1, 3])}  # fmt: skip
    picks = np.array([[4, 0]]) if known else np.random.default_rng(0).integers(0, 5, (7, 2))
    inputs = [("x", ["n", 5, 3])] + ([] if known else [("k", ["n", 2], INT)])
    model = load_onnx(proto(nodes, inputs, arrays=arrays | ({"k": picks} if known else {})))
    x = draw((7, 5, 3))
    xs = (x,) if known else (x, picks)
    wanted = x[np.arange(7)[:, None], picks]
    np.testing.assert_array_equal(model(*xs), wanted)
    y = nnxp.predict(model, x if known else xs, memory_limit=2000)
    np.testing.assert_array_equal(y, wanted)


@pytest.mark.parametrize("wrong", [-1, 5])
def test_a_place_of_another_row_is_refused_in_an_engine(wrong):
    """x.flat[5 row + k], where k is a place beyond its row: to take one of the row is no answer."""
    nodes = [("Shape", "x", "n", {"end": 1}), ("Squeeze", "n", "rows"),
             ("Range", "zero rows one", "r"), ("Mul", "r five", "first"), ("Add", "first k", "at"),
             ("Reshape", "x ends", "flat"), ("Gather", "flat at", "y")]  # fmt: skip
    arrays = {"zero": np.array(0), "one": np.array(1), "five": np.array([5]),
              "ends": np.array([-1, 3])}  # fmt: skip
    model = load_onnx(proto(nodes, [("x", ["n", 5, 3]), ("k", ["n"], INT)], arrays=arrays))
    x, k = draw((4, 5, 3)), np.array([1, 0, 4, 2])
    np.testing.assert_array_equal(nnxp.predict(model, (x, k)), x[np.arange(4), k])
    k[1] = wrong
    with pytest.raises(IndexError, match="out of bounds"):
        nnxp.predict(model, (x, k))


@pytest.mark.parametrize("wrong", [2, -3])
def test_gather_nd_refuses_ids_beyond_their_axis(wrong):
    arrays = {"w": draw((2, 5, 3))}
    model = load_onnx(proto([("GatherND", "w k", "y")], [("k", ["n", 2], INT)], arrays=arrays))
    k = np.array([[1, 4], [-2, -5]])
    np.testing.assert_array_equal(nnxp.predict(model, k), arrays["w"][k[:, 0], k[:, 1]])
    k[1, 0] = wrong
    for run in (model, lambda k: nnxp.predict(model, k)):
        with pytest.raises((IndexError, ShapeError), match="out of bounds"):
            run(k)


def test_gather_nd_with_rows_as_its_batch_goes_through_an_engine():
    model = load_onnx(proto([("GatherND", "x k", "y", {"batch_dims": 1})],
                            [("x", ["n", 5, 3]), ("k", ["n", 2, 1], INT)]))  # fmt: skip
    x, k = draw((7, 5, 3)), np.random.default_rng(0).integers(-5, 5, (7, 2, 1))
    wanted = np.take_along_axis(x, k, axis=1)
    np.testing.assert_array_equal(model(x, k), wanted)
    np.testing.assert_array_equal(nnxp.predict(model, (x, k)), wanted)


@pytest.mark.parametrize("place", [[("Add", "first five", "at")],  # that of the next row
                                   [("Sub", "most first", "at")],  # the rows from the last one on
                                   [("Mul", "first first", "at")],
                                   [("Unsqueeze", "r last", "column"),  # each, five times over
                                    ("Add", "column none", "wide"),
                                    ("Reshape", "wide last", "at")]])  # fmt: skip
def test_what_a_row_picks_from_others_does_not_go_through_an_engine(place):
    nodes = [("Shape", "x", "n", {"end": 1}), ("Squeeze", "n", "rows"),
             ("Range", "zero rows one", "r"), ("Mul", "r five", "first"),
             ("Mul", "rows five", "all"), ("Sub", "all five", "most"), *place,
             ("Reshape", "x ends", "flat"), ("Gather", "flat at", "y")]  # fmt: skip
    arrays = {"zero": np.array(0), "one": np.array(1), "five": np.array([5]),
              "ends": np.array([-1, 3]), "last": np.array([-1]),
              "none": np.zeros((1, 5), "int64")}  # fmt: skip
    model = load_onnx(proto(nodes, [("x", ["n", 5, 3])], arrays=arrays))
    with pytest.raises(ShapeError, match="rows"):
        nnxp.predict(model, draw((4, 5, 3)))


def test_a_graph_for_one_row_is_written_out_for_any_number():
    arrays = {"s": np.array([1, 6]), "w": W, "b": B, "token": draw((1, 2))}
    nodes = [
        ("Reshape", "x s", "v"),
        ("Gemm", "v w b", "p"),
        ("Concat", "token p", "y", {"axis": 1}),
    ]
    model = load_onnx(proto(nodes, [("x", [1, 2, 3])], [info("y", [1, 6])], arrays))
    x = draw((5, 2, 3))
    wanted = np.concatenate([model(row[None]) for row in x])
    assert model.program((1, 2, 3)).opaque == ()
    np.testing.assert_allclose(model(x), wanted, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(nnxp.predict(model, x), wanted, rtol=1e-6, atol=1e-6)


def test_one_number_that_a_graph_for_one_row_picks_is_not_read_while_it_is_written_out():
    """There are no numbers yet, and reading them ended the process."""
    nodes = [("Reshape", "x all", "flat"), ("Gather", "flat last", "one"),
             ("Reshape", "one row", "r"), ("Reshape", "r row", "y")]  # fmt: skip
    arrays = {"all": np.array([-1]), "last": np.array(-2), "row": np.array([1, -1])}
    x = draw((4, 3000))
    y = nnxp.predict(load_onnx(proto(nodes, [("x", [1, 3000])], arrays=arrays)), x)
    np.testing.assert_array_equal(y, x[:, -2:-1])


@pytest.mark.parametrize("flat", [True, False])
def test_what_a_graph_for_one_row_picks_along_axis_0_it_picks_from_each(flat):
    """A mask of keys as exporters pick it: by places in what is flat, or by pairs of ids."""
    places = np.array([[[4, 0, 2]]])
    if flat:
        nodes = [("Reshape", "x all", "flat"), ("Gather", "flat at", "y")]
        arrays = {"all": np.array([-1, 2]), "at": places}
    else:
        nodes = [("GatherND", "x at", "y")]
        arrays = {"at": np.stack([np.zeros_like(places), places], axis=-1)}
    model = load_onnx(proto(nodes, [("x", [1, 5, 2])], arrays=arrays))
    x = draw((7, 5, 2))
    wanted = x[:, [4, 0, 2]][:, None]
    assert model.program((1, 5, 2)).opaque == ()
    np.testing.assert_array_equal(model(x), wanted)
    np.testing.assert_array_equal(nnxp.predict(model, x), wanted)
    np.testing.assert_array_equal(model(x[:1]), wanted[:1])


@pytest.mark.parametrize("size", [1, 3])
def test_a_graph_that_mixes_its_rows_takes_them_in_groups_of_its_own_size(size):
    nodes = [("ReduceMean", "x", "m", {"axes": [0]}), ("Sub", "x m", "d"), ("Gemm", "d w b", "y")]
    model = load_onnx(proto(nodes, [("x", [size, 6])], [info("y", [size, 4])], {"w": W, "b": B}))
    x = draw((6, 6))
    wanted = np.concatenate([model(x[i : i + size]) for i in range(0, 6, size)])
    np.testing.assert_allclose(model(x), wanted, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(nnxp.predict(model, x), wanted, rtol=1e-6, atol=1e-6)
    assert nnxp.predict(model, x[:5]).shape == (5, 4)  # a last group that is not full


def test_a_network_that_goes_along_axis_0_does_not_go_through_an_engine():
    w, r = draw((1, 9, 5), seed=1), draw((1, 9, 3), seed=2)
    model = load_onnx(proto([("GRU", "x w r", "y", {"hidden_size": 3})], [("x", ["t", 2, 5])],
                            arrays={"w": w, "r": r}))  # fmt: skip
    assert model(draw((4, 2, 5))).shape == (4, 1, 2, 3)
    with pytest.raises(ShapeError, match="GRU 'y': it goes along axis 0"):
        nnxp.predict(model, draw((4, 2, 5)))


def test_shapes_that_depend_on_numbers_run_as_they_are_and_an_engine_names_the_node():
    model = load_onnx(proto([("NonZero", "x", "y")], [("x", ["n", 6])], [info("y", None, INT)]))
    x = draw((3, 6))
    x[x < 0] = 0
    np.testing.assert_array_equal(model(x), np.stack(np.nonzero(x)))
    with pytest.raises(ShapeError, match="NonZero 'y'"):
        nnxp.predict(model, x)


# A layer like any other


def test_a_saved_graph_predicts_without_onnx(tmp_path):
    path, x = tmp_path / "net.safetensors", draw((5, 2, 3))
    model = load_onnx(flattened("n"))
    nnxp.save(model, path)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", model(x))
    code = (
        "import sys; sys.modules['onnx'] = None\n"
        "import numpy as np, nnxp\n"
        "model = nnxp.load('net.safetensors')\n"
        "np.testing.assert_array_equal(model(np.load('x.npy')), np.load('y.npy'))\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=100,
                   env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})  # fmt: skip


def test_a_graph_moves_changes_its_type_and_is_judged(sim):
    model, x = load_onnx(flattened("n")), draw((5, 2, 3))
    there = model.to("sim")
    y = there(nnxp.to_backend(x, "sim"))
    np.testing.assert_allclose(nnxp.asnumpy(y), model(x), rtol=1e-6, atol=1e-6)
    wide = model.astype("float64")
    assert wide(x.astype("float64")).dtype == np.float64
    assert model.parameters().keys() == {"weights.0.value", "weights.1.value"}
    assert_parity(model, x)


def test_half_precision_is_summed_in_float32():
    n = 4096
    nodes = [("ReduceSum", "x axes", "y", {"keepdims": 0})]
    model = load_onnx(proto(nodes, [("x", ["n", n], TensorProto.FLOAT16)],
                            [info("y", ["n"], TensorProto.FLOAT16)],
                            {"axes": np.array([1])}))  # fmt: skip
    x = np.full((2, n), 1.001, "float16")
    np.testing.assert_allclose(model(x), x.astype("float64").sum(1), rtol=1e-3)


# What older versions and others' words mean


def test_a_softmax_before_opset_13_is_of_all_axes_from_its_own():
    x = draw((3, 2, 4))
    model = load_onnx(proto([("Softmax", "x", "y")], [("x", [3, 2, 4])], opset=11))
    flat = np.exp(x.reshape(3, 8).astype("float64"))
    np.testing.assert_allclose(model(x).reshape(3, 8), flat / flat.sum(1, keepdims=True), rtol=1e-5)


def test_a_slice_backwards_from_before_the_first_is_the_first():
    ends = {"s": [-8, 9], "e": [-(2**40), 1], "a": [1, 2], "d": [-2, -3]}
    arrays = {name: np.array(value, "int64") for name, value in ends.items()}
    net = load_onnx(proto([("Slice", "x s e a d", "y")], [info("x", ["n", 7, 5])], arrays=arrays))
    x = draw((3, 7, 5))
    np.testing.assert_array_equal(net(x), x[:, :1, 4:1:-3])


def test_scales_that_are_put_together_are_no_parameters_and_their_model_trains():
    nodes = [("Conv", "x w", "c"), ("Concat", "ones twos", "s", {"axis": 0}),
             ("Resize", "c  s", "y", {"mode": "linear"})]  # fmt: skip
    arrays = {"w": draw((2, 3, 1, 1)), "ones": [1.0, 1.0], "twos": [2.0, 2.0]}
    arrays = {name: np.asarray(value, "float32") for name, value in arrays.items()}
    net = load_onnx(proto(nodes, [info("x", ["n", 3, 4, 5])], arrays=arrays))
    assert list(net.parameters()) == ["weights.0.value"]
    x = draw((2, 3, 4, 5))
    y = net(x)
    _, gradients = nnxp.value_and_gradients(nnxp.losses.mean_square)(net, x, np.zeros_like(y))
    assert gradients["weights.0.value"].shape == (2, 3, 1, 1)


@pytest.mark.parametrize("p", [1, 2])
def test_a_norm_of_zeros_has_a_gradient(p):
    nodes = [("Mul", "x w", "s"), ("LpNormalization", "s", "y", {"p": p})]
    net = load_onnx(proto(nodes, [info("x", ["n", 4])], arrays={"w": np.ones(4, "float32")}))
    x = np.zeros((2, 4), "float32")
    x[0] = [1, 2, 2, 0]
    np.testing.assert_allclose(net(x)[0], x[0] / (5 if p == 1 else 3), rtol=1e-6)
    assert not net(x)[1].any()
    _, gradients = nnxp.value_and_gradients(nnxp.losses.mean_square)(net, x, np.ones((2, 4), "f4"))
    assert np.isfinite(gradients["weights.0.value"]).all()


def test_of_equals_the_first_are_the_largest_in_an_engine_too():
    k = np.array([5], "int64")
    outputs = [info("y", None, INT)]
    net = load_onnx(proto([("TopK", "x k", "v y")], [info("x", ["n", 40])], outputs, {"k": k}))
    x = np.sign(draw((9, 40)))
    first = np.argsort(-x, axis=1, kind="stable")[:, :5]
    engine = nnxp.Engine(net, "cpu")
    for y in (net(x), engine(x), engine(x)):
        np.testing.assert_array_equal(y, first)


def test_a_picture_that_keeps_its_proportions_stays_in_the_middle():
    options = {"axes": [2, 3], "keep_aspect_ratio_policy": "not_larger", "mode": "linear",
               "coordinate_transformation_mode": "half_pixel_symmetric"}  # fmt: skip
    nodes = [("Resize", "x   sizes", "y", options)]
    arrays = {"sizes": np.array([5, 3], "int64")}
    net = load_onnx(proto(nodes, [info("x", ["n", 1, 5, 8])], arrays=arrays, opset=19))
    y = net(np.arange(40, dtype="float32").reshape(1, 1, 5, 8))[0, 0]
    assert y.shape == (2, 3)  # 1.875 and 3 by the scale of 3 / 8
    np.testing.assert_allclose((y + y[::-1, ::-1]) / 2, 19.5, rtol=1e-6)


@pytest.mark.parametrize("opset", [6, 7, 8, 9])
def test_slopes_before_opset_9_are_for_channels(opset):
    slope = np.array([0.1, 0.2, 0.3], "float32")
    given = slope if opset < 7 else slope.reshape(3, 1, 1)
    ends = [("x", [2, 3, 4, 5])], [info("y", [2, 3, 4, 5])]
    model = load_onnx(proto([("PRelu", "x s", "y")], *ends, {"s": given}, opset=opset))
    x = draw((2, 3, 4, 5))
    np.testing.assert_allclose(model(x), np.where(x < 0, x * slope.reshape(3, 1, 1), x), rtol=1e-6)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize(("op", "opset"), [("Upsample", 7), ("Upsample", 9), ("Resize", 10)])
def test_places_before_opset_11_are_at_multiples(op, opset, mode):
    x, ort = draw((2, 3, 10, 7)), pytest.importorskip("onnxruntime")
    for scales in [(1.5, 2.6), (0.6, 0.45)][: 1 + (op == "Resize")]:
        scales = np.array([1, 1, *scales], "float32")
        more = {"scales": scales.tolist()} if opset < 9 else {}
        takes, arrays = ("x", {}) if more else ("x s", {"s": scales})
        source = proto([(op, takes, "y", {"mode": mode, **more})], [("x", ["n", 3, 10, 7])],
                       arrays=arrays, opset=opset, ir=4)  # fmt: skip
        (wanted,) = ort.InferenceSession(source.SerializeToString()).run(None, {"x": x})
        np.testing.assert_allclose(load_onnx(source)(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["linear", "nearest", "cubic"])
def test_points_are_looked_up_in_a_picture_row_by_row(mode):
    x, grid, ort = draw((3, 2, 5, 6)), draw((3, 4, 7, 2)) * 1.2, pytest.importorskip("onnxruntime")
    nodes = [("GridSample", "x g", f"y{i}", {"mode": mode, "padding_mode": pad, "align_corners": i})
             for i, pad in enumerate(["border", "reflection"])]  # fmt: skip
    nodes.append(("GridSample", "x g", "y2", {"mode": mode}))
    shapes = [("x", ["n", 2, 5, 6]), ("g", ["n", 4, 7, 2])]
    source = proto(nodes, shapes, ["y0", "y1", "y2"], opset=20, ir=9)
    session = ort.InferenceSession(source.SerializeToString())
    wanted = session.run(None, {"x": x, "g": grid})
    model = load_onnx(source)
    for made in (model(x, grid), nnxp.predict(model, (x, grid), memory_limit="1MB")):
        for y, right in zip(made, wanted, strict=True):
            np.testing.assert_allclose(y, right, rtol=1e-4, atol=1e-5)


def test_boxes_that_share_too_much_are_left_out():
    ort, rng = pytest.importorskip("onnxruntime"), np.random.default_rng(0)
    scores = rng.random((2, 3, 40), "float32")
    boxes = rng.random((2, 40, 4), "float32") * np.array([9, 9, 4, 4], "float32")
    limits = {"k": np.array([6]), "o": np.float32(0.2), "t": np.float32(0.4)}
    for centre in (0, 1):
        nodes = [("NonMaxSuppression", "b s k o t", "y", {"center_point_box": centre})]
        source = proto(
            nodes, [("b", [2, 40, 4]), ("s", [2, 3, 40])], [info("y", None, INT)], limits
        )
        session = ort.InferenceSession(source.SerializeToString())
        (wanted,) = session.run(None, {"b": boxes, "s": scores})
        np.testing.assert_array_equal(load_onnx(source)(boxes, scores), wanted)


def test_whole_numbers_divide_towards_zero():
    a, b = np.array([7, -7, 7, -7]), np.array([2, 2, -2, -2])
    model = load_onnx(proto([("Div", "a b", "y")], [("a", [4], INT), ("b", [4], INT)]))
    np.testing.assert_array_equal(model(a, b), [3, -3, -3, 3])


def test_ids_may_be_counted_from_the_end():
    model = load_onnx(proto([("Gather", "table ids", "y")], [("ids", ["n", 2], INT)],
                            arrays={"table": W}))  # fmt: skip
    np.testing.assert_array_equal(model(np.array([[0, -1], [-6, 5]])), W[[[0, 5], [0, 5]]])


def test_scalers_normalizers_and_labels_of_classical_models():
    ml = "ai.onnx.ml"
    model = proto(
        [("Scaler", "x", "s", {"offset": [1.0, 2.0], "scale": [0.5, 2.0], "domain": ml}),
         ("Normalizer", "s", "n", {"norm": "L2", "domain": ml}),
         ("ArgMax", "n", "a", {"axis": 1, "keepdims": 0}),
         ("LabelEncoder", "a", "y",
          {"keys_int64s": [0, 1], "values_int64s": [7, 9], "domain": ml})],
        [("x", ["n", 2])], ["n", info("y", ["n"], INT)], domains=[ml],
    )  # fmt: skip
    x = draw((5, 2))
    scaled = (x - [1, 2]) * [0.5, 2]
    n, y = load_onnx(model)(x)
    wanted = scaled / np.linalg.norm(scaled, axis=1, keepdims=True)
    np.testing.assert_allclose(n, wanted, rtol=1e-5)
    np.testing.assert_array_equal(y, np.array([7, 9])[wanted.argmax(1)])


def test_a_small_network_agrees_with_onnx_runtime():
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    kernel, scale = draw((8, 3, 3, 3), seed=1) / 5, np.abs(draw((4, 8), seed=2)) + 0.5
    nodes = [
        ("Conv", "x k", "c", {"strides": [2, 2], "auto_pad": "SAME_LOWER"}),
        ("BatchNormalization", "c g0 g1 g2 g3", "n"), ("Relu", "n", "r"),
        ("MaxPool", "r", "m", {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
        ("GlobalAveragePool", "m", "p"), ("Flatten", "p", "f"), ("Gemm", "f w", "l"),
        ("Softmax", "l", "y"),
    ]  # fmt: skip
    arrays = {"k": kernel, "w": draw((8, 5), seed=3)} | {
        f"g{i}": row for i, row in enumerate(scale)
    }
    source = proto(nodes, [("x", ["n", 3, 15, 15])], [info("y", ["n", 5])], arrays)
    x = draw((4, 3, 15, 15))
    session = runtime.InferenceSession(source.SerializeToString())
    (wanted,) = session.run(None, {"x": x})
    model = load_onnx(source)
    np.testing.assert_allclose(model(x), wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(nnxp.predict(model, x), wanted, rtol=1e-5, atol=1e-6)


# What is refused


def test_operators_that_are_not_known_are_all_named_at_once():
    nodes = [("Multinomial", "x", "a"), ("Det", "a", "b"), ("Multinomial", "b", "y")]
    with pytest.raises(
        ConversionError, match=r"Det \(1; first: 'b'\), Multinomial \(2; first: 'a'\)"
    ):
        load_onnx(proto(nodes, [("x", ["n", 6])]))


def test_newer_versions_and_strings_are_refused():
    with pytest.raises(ConversionError, match="opset 99"):
        load_onnx(dense(opset=99))
    with pytest.raises(ConversionError, match="'x' is of the type string"):
        load_onnx(proto([("Identity", "x", "y")], [("x", [2], TensorProto.STRING)]))


@pytest.mark.parametrize("source", [b"", b"not a model", b"\x08\x08", b"\xff" * 100])
def test_what_is_no_model_is_refused(source):
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_onnx(source)


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (b"\x10\x01\0\0\0\0\0\0" + b'{"a": {}}', "a safetensors file: nnxp.load reads it"),
        (b"PK\x03\x04" + bytes(22) + b"\x0f\0\0\0archive/data.pkl", "a PyTorch file"),
        (b"weights are numbers\n" * 9, "it is text, not a model"),
        (b"\xff" * 100, "no whole ONNX file"),
        (b"a,b\n1,2\n", "it is text, not a model"),
        (dense().SerializeToString()[:60], "no whole ONNX file"),
    ],
)
def test_files_of_other_kinds_are_named(start, said, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(start)
    with pytest.raises(CheckpointError, match=f"^{path} cannot be loaded: .*{said}"):
        load_onnx(path)


def test_files_that_cannot_be_read_say_why(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_onnx(tmp_path / "nothing.onnx")
    with pytest.raises(OSError, match=r"directory|folder"):
        load_onnx(tmp_path)
    with pytest.raises(ConversionError, match="takes a path, bytes or a ModelProto, not int"):
        load_onnx(3)


def test_damaged_files_are_refused_or_are_other_models():
    """Cut short, bits flipped, parts doubled: an error of ours, or another model."""
    rng, sources = (
        np.random.default_rng(0),
        [m.SerializeToString() for m in (dense(), flattened("n"))],
    )
    refused = 0
    for i in range(400):
        data = bytearray(sources[i % 2])
        at = int(rng.integers(len(data)))
        match i % 3:
            case 0:
                del data[at:]
            case 1:
                data[at] ^= 1 << int(rng.integers(8))
            case 2:
                data[at:at] = data[at : at + 9]
        try:
            model = load_onnx(bytes(data))
            model(*(np.zeros([n or 2 for n in each["shape"] or ()], each["dtype"])
                    for each in model.inputs))  # fmt: skip
        except nnxp.NnxpError:
            refused += 1
    assert refused > 300


def outside(location, **places):
    source = dense()
    tensor = source.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **places}.items():
        tensor.external_data.add(key=key, value=str(value))
    return source.SerializeToString()


def test_data_beside_the_model_are_read(tmp_path):
    path, x = tmp_path / "sub.onnx", draw((5, 6))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "w.bin").write_bytes(b"12345678" + W.tobytes())
    path.write_bytes(outside("data/w.bin", offset=8, length=W.nbytes))
    np.testing.assert_allclose(load_onnx(path)(x), answer(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("location", "places"),
    [
        ("../w.bin", {}),
        ("/etc/hostname", {}),
        ("data/../../w.bin", {}),
        ("..\\w.bin", {}),
        ("link.bin", {}),
        ("linked/w.bin", {}),
        ("folder/../w.bin", {}),
        ("", {}),
        ("folder", {}),
        ("pipe", {}),
        ("short.bin", {}),
        ("w.bin", {"offset": -8}),
        ("w.bin", {"offset": 1 << 60}),
        ("w.bin", {"length": 1 << 60}),
        ("w.bin", {"offset": "x"}),
        ("w.bin\0", {}),
    ],
)
def test_data_elsewhere_or_of_another_size_are_not_touched(tmp_path, location, places):
    inside = tmp_path / "model"
    inside.mkdir()
    (tmp_path / "w.bin").write_bytes(W.tobytes())
    (inside / "w.bin").write_bytes(W.tobytes())
    (inside / "short.bin").write_bytes(W.tobytes()[:-1])
    (inside / "link.bin").symlink_to(tmp_path / "w.bin")
    (inside / "linked").symlink_to(tmp_path)
    (inside / "folder").mkdir()
    os.mkfifo(inside / "pipe")
    path = inside / "net.onnx"
    path.write_bytes(outside(location, **places))
    with pytest.raises(CheckpointError, match="the data of 'w'"):
        load_onnx(path)
    with pytest.raises(CheckpointError, match="load the model by its path"):
        load_onnx(path.read_bytes())


@pytest.mark.parametrize("dims", [[1 << 40, 1 << 20], [6, 5], [-6, 4], [1 << 62, 4, 0]])
def test_a_shape_that_its_numbers_do_not_fill_is_refused_before_memory_is_taken(dims):
    source = dense()
    tensor = source.graph.initializer[0]
    del tensor.dims[:]
    tensor.dims.extend(dims)
    with pytest.raises(CheckpointError):
        load_onnx(source)


@pytest.mark.parametrize(
    ("op", "takes", "value"),
    [("ConstantOfShape", "s", [1 << 20, 1 << 20]), ("Tile", "x s", [1 << 20, 1 << 20]),
     ("Range", "zero s one", 1 << 40), ("OneHot", "zero s two", 1 << 40)],
)  # fmt: skip
def test_few_numbers_do_not_make_many(op, takes, value):
    arrays = {
        "s": np.array(value),
        "zero": np.array(0),
        "one": np.array(1),
        "two": np.array([0, 1]),
    }
    model = load_onnx(
        proto([("Identity", "x", "z"), (op, takes, "y")], [("x", [2, 2])], ["y"], arrays)
    )
    with pytest.raises(ShapeError):
        model(draw((2, 2)))


@pytest.mark.parametrize(
    ("depth", "values", "said"),
    [(-1, [0, 1], "not -1"), (0, [0, 1], "not 0"), ([3, 4], [0, 1], r"not \[3, 4\]"),
     ([], [0, 1], r"not \[\]"), (3, [0, 1, 2], r"two, off and on, not \(3,\)")],
)  # fmt: skip
def test_a_one_hot_of_no_depth_is_refused(depth, values, said):
    arrays = {"depth": np.array(depth, "int64"), "values": np.array(values, "float32")}
    model = load_onnx(proto([("OneHot", "ids depth values", "y")], [("ids", ["n"], INT)], ["y"],
                            arrays))  # fmt: skip
    with pytest.raises(ShapeError, match=said):
        model(np.array([0, 1]))


def test_a_one_hot_counts_from_the_end_and_is_zeros_beyond():
    arrays = {"depth": np.array([3]), "values": np.array([0, 1], "float32")}
    model = load_onnx(proto([("OneHot", "ids depth values", "y")], [("ids", ["n"], INT)], ["y"],
                            arrays))  # fmt: skip
    due = [[0, 0, 1], [1, 0, 0], [0, 0, 0], [0, 0, 0]]
    np.testing.assert_array_equal(model(np.array([-1, -3, 3, -4])), due)


def test_a_folder_is_refused_by_name(tmp_path):
    with pytest.raises(IsADirectoryError, match="a folder, not a model's file"):
        load_onnx(tmp_path)


def test_nodes_out_of_order_are_refused():
    source = proto([("Relu", "a", "b"), ("Relu", "b", "a")], [("x", ["n", 6])], ["a"])
    with pytest.raises(CheckpointError):
        load_onnx(source)


@pytest.mark.parametrize(
    ("old", "new"),
    [('"op":"Gemm"', '"op":"Exit"'), ('"inputs":["x"]', '"inputs":["q"]'),
     ('"dtype":"int64"', '"dtype":"object"'), ('"shape":[1]', '"shape":[9]'),
     ('"axis":0', '"axes":0'), ('"outputs":["y"]', '"outputs":[]'),
     ('"kind":"float32"', '"kind":"int8"')],
)  # fmt: skip
def test_a_checkpoint_of_a_graph_is_checked_as_any_other(tmp_path, old, new):
    path = tmp_path / "net.safetensors"
    nnxp.save(load_onnx(flattened("n")), path)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    text = header["__metadata__"]["nnxp"]
    assert old in text
    header["__metadata__"]["nnxp"] = text.replace(old, new)
    changed = json.dumps(header).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + data[8 + size :])
    with pytest.raises(CheckpointError):
        nnxp.load(path)


def test_without_onnx_it_says_what_brings_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ConversionError, match=r"pip install \"nnxp\[onnx\]\""):
        load_onnx(b"")
    with pytest.raises(ConversionError, match=r"pip install \"nnxp\[onnx\]\""):
        nnxp.save_onnx(nnxp.Dense(2, 3, rng=0), tmp_path / "net.onnx")


# Graphs within the graph, and sequences


def body(nodes, inputs, outputs):
    made = [helper.make_node(op, takes.split(" "), gives.split(" "), **dict(*rest))
            for op, takes, gives, *rest in nodes]  # fmt: skip
    return helper.make_graph(made, "body", [info(*x) for x in inputs], [info(*y) for y in outputs])


def powers():
    """x @ w, over and over; each of them is an output, too."""
    return body(
        [("Identity", "on", "still"), ("MatMul", "v w", "u"), ("Identity", "u", "each")],
        [("i", [], INT), ("on", [], BOOL), ("v", ["n", 6])],
        [("still", [], BOOL), ("u", ["n", 6]), ("each", ["n", 6])],
    )  # fmt: skip


def test_a_loop_of_a_known_number_of_steps_is_written_out(tmp_path):
    arrays = {"w": draw((6, 6), seed=1), "times": np.array(3)}
    nodes = [("Loop", "times  x", "last every", {"body": powers()}),
             ("Transpose", "every", "y", {"perm": [1, 0, 2]})]  # fmt: skip
    model, x = load_onnx(proto(nodes, [("x", ["n", 6])], ["y"], arrays)), draw((5, 6))
    first = x @ arrays["w"]
    wanted = np.stack([first, first @ arrays["w"], first @ arrays["w"] @ arrays["w"]], axis=1)
    np.testing.assert_allclose(model(x), wanted, rtol=1e-5, atol=1e-5)
    program = model.program((1, 6))
    assert [step.name for step in program.steps].count("matmul") == 3
    assert program.opaque == ()
    np.testing.assert_allclose(nnxp.predict(model, x), wanted, rtol=1e-5, atol=1e-5)
    nnxp.save(model, tmp_path / "net.safetensors")
    np.testing.assert_array_equal(nnxp.load(tmp_path / "net.safetensors")(x), model(x))
    assert_parity(model, x)


def test_a_loop_that_looks_at_numbers_runs_as_it_is_and_an_engine_names_it():
    doubled = body(
        [("Add", "v v", "u"), ("ReduceMax", "u", "top", {"keepdims": 0}),
         ("Less", "top far", "still")],
        [("i", [], INT), ("on", [], BOOL), ("v", ["n", 6])],
        [("still", [], BOOL), ("u", ["n", 6])],
    )  # fmt: skip
    model = load_onnx(proto([("Loop", " yes x", "y", {"body": doubled})], [("x", ["n", 6])], ["y"],
                            {"yes": np.array(True), "far": np.float32(100)}))  # fmt: skip
    np.testing.assert_array_equal(model(np.full((2, 6), 3, "float32")), np.full((2, 6), 192))
    with pytest.raises(ShapeError, match="Loop 'y'"):
        nnxp.predict(model, draw((2, 6)))
    with pytest.raises(ShapeError, match="loops make more than 131,072 steps"):
        model(np.zeros((2, 6), "float32"))


@pytest.mark.parametrize("backward", [0, 1])
def test_a_scan_goes_along_an_axis_that_holds_no_rows(backward):
    sums = body([("Add", "s x", "t"), ("Identity", "t", "each")],
                [("s", ["n"]), ("x", ["n"])], [("t", ["n"]), ("each", ["n"])])  # fmt: skip
    options = {"body": sums, "num_scan_inputs": 1, "scan_input_axes": [1], "scan_output_axes": [1],
               "scan_input_directions": [backward]}  # fmt: skip
    nodes = [("ReduceSum", "x one", "zero", {"keepdims": 0}), ("Sub", "zero zero", "start"),
             ("Scan", "start x", "last y", options)]  # fmt: skip
    model = load_onnx(proto(nodes, [("x", ["n", 6])], ["y"], {"one": np.array([1])}))
    x = draw((5, 6))
    wanted = np.cumsum(x[:, ::-1] if backward else x, axis=1)
    np.testing.assert_allclose(model(x), wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(nnxp.predict(model, x), wanted, rtol=1e-5, atol=1e-6)
    rows = {"body": sums, "num_scan_inputs": 1}
    model = load_onnx(proto([("Scan", "s x", "last y", rows)], [("x", ["n", 6])], ["y"],
                            {"s": np.zeros(6, "float32")}))  # fmt: skip
    np.testing.assert_allclose(model(x), np.cumsum(x, axis=0), rtol=1e-5, atol=1e-6)
    with pytest.raises(ShapeError, match="Scan 'last': it goes along axis 0"):
        nnxp.predict(model, x)


def test_a_sequence_is_as_long_as_when_it_was_written_out():
    arrays = {"two": np.array(2), "first": np.array(0), "last": np.array(-1)}
    nodes = [
        ("SplitToSequence", "x two", "parts", {"axis": 1}), ("SequenceAt", "parts last", "end"),
        ("SequenceErase", "parts first", "rest"), ("SequenceInsert", "rest end first", "turned"),
        ("SequenceLength", "turned", "count"), ("Optional", "turned", "perhaps"),
        ("OptionalGetElement", "perhaps", "there"),
        ("ConcatFromSequence", "there", "joined", {"axis": 1}),
        ("Cast", "count", "three", {"to": FLOAT}), ("Mul", "joined three", "y"),
    ]  # fmt: skip
    model, x = load_onnx(proto(nodes, [("x", ["n", 6])], ["y"], arrays, opset=18)), draw((5, 6))
    wanted = 3 * x[:, [4, 5, 2, 3, 4, 5]]
    np.testing.assert_array_equal(model(x), wanted)
    assert model.program((1, 6)).opaque == ()
    np.testing.assert_array_equal(nnxp.predict(model, x), wanted)
    np.testing.assert_array_equal(nnxp.asnumpy(model.to("sim")(nnxp.to_backend(x, "sim"))), wanted)


@pytest.mark.parametrize(
    ("nodes", "said"),
    [([("SplitToSequence", "x", "s"), ("SequenceAt", "s nine", "y")], "item 9 of a sequence of 5"),
     ([("SplitToSequence", "x nines", "y")], r"of 5 into \[9\]"),
     ([("Optional", "", "o", {"type": helper.make_tensor_type_proto(FLOAT, None)}),
       ("OptionalGetElement", "o", "y")], "what is not there")],
)  # fmt: skip
def test_items_that_are_not_there_are_named(nodes, said):
    model = load_onnx(proto(nodes, [("x", [5, 6])], ["y"],
                            {"nine": np.array(9), "nines": np.array([9])}, opset=18))  # fmt: skip
    with pytest.raises(ShapeError, match=said):
        model(draw((5, 6)))


@pytest.mark.parametrize("count", [0, 2])
def test_what_a_body_takes_and_answers_is_checked(count):
    nodes = [("Loop", "times  x", "y", {"body": powers()})]
    source = proto(nodes, [("x", ["n", 6])], ["y"], {"w": W[:, :1], "times": np.array(count)})
    del source.graph.node[0].attribute[0].g.input[2]
    with pytest.raises(CheckpointError):
        load_onnx(source)


def test_a_scan_of_old_is_refused():
    with pytest.raises(ConversionError, match="Scan of opset 8"):
        load_onnx(proto([("Scan", "x", "y")], [("x", ["n", 6])], opset=8))


# Operators that are kernels


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize(
    ("op", "gates", "options"),
    [("RNN", 1, {}), ("RNN", 1, {"activations": ["Relu"]}), ("GRU", 3, {}),
     ("GRU", 3, {"linear_before_reset": 1}), ("LSTM", 4, {}), ("LSTM", 4, {"clip": 0.5})],
)  # fmt: skip
def test_a_recurrent_network_is_a_kernel_and_agrees_with_onnx_runtime(
    op, gates, options, direction
):
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    ways = 1 + (direction == "bidirectional")
    if "activations" in options:
        options = {"activations": options["activations"] * ways}
    arrays = {"w": draw((ways, gates * 4, 5), seed=1), "r": draw((ways, gates * 4, 4), seed=2),
              "b": draw((ways, 2 * gates * 4), seed=3), "l": np.array([7, 2, 4], "int32"),
              "h": draw((ways, 3, 4), seed=4), "c": draw((ways, 3, 4), seed=5)}  # fmt: skip
    outputs = ["y", "yh", "yc"][: 3 if op == "LSTM" else 2]
    takes = "x w r b l h" + (" c" if op == "LSTM" else "")
    options = {"hidden_size": 4, "direction": direction, **options}
    source = proto([(op, takes, " ".join(outputs), options)], [("x", [7, 3, 5])], outputs, arrays)
    x = draw((7, 3, 5))
    wanted = runtime.InferenceSession(source.SerializeToString()).run(None, {"x": x})
    made = load_onnx(source)(x)
    for y, right in zip(made, wanted, strict=True):
        assert y.shape == right.shape
        np.testing.assert_allclose(y, right, rtol=1e-4, atol=1e-5)
    nodes = [("Transpose", "x", "t", {"perm": [1, 0, 2]}),
             (op, takes.replace("x", "t", 1).replace(" l h", "").replace(" c", ""), "y", options),
             ("Transpose", "y", "z", {"perm": [2, 0, 1, 3]})]  # fmt: skip
    program = load_onnx(proto(nodes, [("x", ["n", 7, 5])], ["z"], arrays)).program((1, 7, 5))
    count = [step.name for step in program.steps].count(op.lower())
    assert count == (0 if "clip" in options else ways)


@pytest.mark.parametrize(
    ("options", "kernel"),
    [({}, True), ({"is_causal": 1}, True), ({"is_causal": 1, "left_window_size": 2}, True),
     ({"softcap": 2.0}, False)],
)  # fmt: skip
def test_attention_is_a_kernel(options, kernel):
    ends = [("q", ["n", 4, 6, 8]), ("k", ["n", 2, 6, 8]), ("v", ["n", 2, 6, 8])]
    nodes = [("Attention", "q k v", "y", options)]
    version = 25 if "left_window_size" in options else 23
    if version == 25 and onnx.defs.onnx_opset_version() < version:
        pytest.skip("this onnx does not know the attribute")
    model = load_onnx(proto(nodes, ends, ["y"], opset=version, ir=11))
    q, k, v = draw((3, 4, 6, 8)), draw((3, 2, 6, 8), seed=1), draw((3, 2, 6, 8), seed=2)
    program = model.program((1, 4, 6, 8), (1, 2, 6, 8), (1, 2, 6, 8))
    assert ("attention" in [step.name for step in program.steps]) == kernel
    k, v = np.repeat(k, 2, axis=1), np.repeat(v, 2, axis=1)
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(8)
    scores = 2 * np.tanh(scores / 2) if "softcap" in options else scores
    far = np.subtract.outer(np.arange(6), np.arange(6))
    hidden = (far < 0) & bool(options.get("is_causal")) | (far > options.get("left_window_size", 9))
    weights = np.exp(np.where(hidden, -np.inf, scores))
    wanted = weights / weights.sum(-1, keepdims=True) @ v
    np.testing.assert_allclose(model(q, k[:, ::2], v[:, ::2]), wanted, rtol=1e-4, atol=1e-5)
