"""Commands on ONNX files: each takes them as nnxp's own; convert turns one into the other."""

from __future__ import annotations

import json

import numpy as np
import pytest

import nnxp
from conftest import draw
from test_cli import fails, nnxp_

pytest.importorskip("onnx", reason="onnx is not installed: it reads the files")
from test_onnx import INT, info, proto

TWO = {"ids": np.arange(20).reshape(10, 2) % 6, "x": draw((10, 4))}


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A folder with ONNX models of one and two inputs, one and two outputs, and rows for them."""
    monkeypatch.chdir(tmp_path)
    net = nnxp.Sequential(nnxp.Dense(6, 8, "relu", rng=0), nnxp.Dense(8, 3, "softmax", rng=1))
    nnxp.save(net, "net.safetensors")
    nnxp.save_onnx(net, "net.onnx")
    np.save("x.npy", draw((50, 6)))
    np.savetxt("x.csv", draw((50, 6)), delimiter=",", header="a,b,c,d,e,f", comments="")
    arrays = {"table": draw((6, 4)), "two": np.array([1])}
    nodes = [("Gather", "table ids", "rows"), ("ReduceSum", "rows two", "sums", {"keepdims": 0}),
             ("Add", "sums x", "y")]  # fmt: skip
    inputs = [("ids", ["n", 2], INT), ("x", ["n", 4])]
    (tmp_path / "two.onnx").write_bytes(
        proto(nodes, inputs, [info("y", ["n", 4])], arrays).SerializeToString()
    )
    nodes = [("ArgMax", "x", "file", {"axis": 1, "keepdims": 0}), ("Relu", "x", "y")]
    ends = [info("file", ["n"], INT), info("y", ["n", 6])]
    for name, some in (("outputs.onnx", ends), ("labels.onnx", ends[:1])):
        (tmp_path / name).write_bytes(proto(nodes, [("x", ["n", 6])], some).SerializeToString())
    np.savez("two.npz", **TWO)
    return tmp_path


def done(*args):
    result = nnxp_(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("rows", ["x.npy", "x.csv"])
def test_predict_takes_an_onnx_file(room, rows):
    done("predict", "net.onnx", rows, "-o", "y.npy")
    wanted = nnxp.load("net.safetensors")(draw((50, 6)))
    np.testing.assert_allclose(np.load("y.npy"), wanted, rtol=1e-5, atol=1e-6)


def test_several_inputs_come_from_an_npz_file_by_their_names(room):
    wanted = nnxp.load_onnx("two.onnx")(TWO["ids"], TWO["x"])
    done("predict", "two.onnx", "two.npz", "-o", "y.csv")
    y = np.loadtxt("y.csv", delimiter=",", skiprows=1, dtype="float32")
    np.testing.assert_array_equal(y, wanted)
    assert "all agree with float64" in done(
        "verify", "two.onnx", "two.npz", "--backend", "numpy,sim"
    )
    said = done("summary", "two.onnx", "--shape", "2", "--shape", "4")
    assert "10 rows on" in done("summary", "two.onnx", "--shape=2", "--shape=4", "--rows=10")
    assert "Graph" in said


@pytest.mark.parametrize(
    ("arrays", "words"),
    [({"ids": TWO["ids"]}, "without x"),
     ({"ids": TWO["ids"], "y": TWO["x"]}, "takes ids, x, not ids, y"),
     ({"ids": TWO["ids"], "x": TWO["x"][:3]}, "as many rows each"),
     ({"ids": TWO["ids"], "x": np.array(3.0)}, "a single number"),
     ({"ids": TWO["ids"], "x": np.array(["a"])}, "rows are real numbers")],
)  # fmt: skip
def test_inputs_that_do_not_fit_are_named(room, arrays, words):
    np.savez("bad.npz", **arrays)
    fails(nnxp_("predict", "two.onnx", "bad.npz", "-o", "y.npy"), 1, words)


def test_several_inputs_are_in_no_other_file_and_have_shapes_each(room):
    fails(nnxp_("predict", "two.onnx", "x.npy", "-o", "y.npy"), 2, "takes ids, x: give them in")
    fails(nnxp_("predict", "two.onnx", "two.npz", "-o", "y.npy", "--labels"), 2, "one input")
    fails(nnxp_("summary", "two.onnx"), 2, "of each of ids, x, in this order", "--shape")
    fails(nnxp_("bench", "two.onnx", "--shape", "2", "--shape", "4"), 2, "one input")


def test_several_outputs_go_to_an_npz_file_by_their_names(room):
    x = np.load("x.npy")
    done("predict", "outputs.onnx", "x.npy", "-o", "y.npz")
    with np.load("y.npz") as made:
        np.testing.assert_array_equal(made["file"], x.argmax(1))
        np.testing.assert_array_equal(made["y"], np.maximum(x, 0))
    fails(nnxp_("predict", "outputs.onnx", "x.npy", "-o", "y.npy"), 2, "2 outputs (file, y)")
    fails(nnxp_("predict", "outputs.onnx", "x.csv", "-o", "y.npz"), 2, "2 outputs")
    assert not (room / "y.npy").exists()


@pytest.mark.parametrize("rows", ["x.npy", "x.csv"])
def test_whole_numbers_are_written_as_such(room, rows):
    done("predict", "labels.onnx", rows, "-o", "y.npy")
    made = np.load("y.npy")
    assert made.dtype == np.int64
    np.testing.assert_array_equal(made, draw((50, 6)).argmax(1))


def test_summary_verify_and_bench_take_an_onnx_file(room):
    assert "83 parameters" in done("summary", "net.onnx")
    assert "all agree with float64" in done("verify", "net.onnx", "x.npy", "--backend", "numpy,sim")
    assert "6-8-3" in done("bench", "net.onnx", "--rows", "64", "--rounds", "1")


# convert


def test_convert_turns_either_kind_into_the_other(room):
    x, wanted = np.load("x.npy"), nnxp.load("net.safetensors")(np.load("x.npy"))
    said = done("convert", "net.onnx", "from.safetensors")
    assert "from.safetensors: Graph(x -> y" in said
    assert "83 parameters" in said
    np.testing.assert_allclose(nnxp.load("from.safetensors")(x), wanted, rtol=1e-5, atol=1e-6)
    assert "83 parameters" in done("convert", "net.safetensors", "from.onnx")
    np.testing.assert_allclose(nnxp.load_onnx("from.onnx")(x), wanted, rtol=1e-5, atol=1e-6)
    said = json.loads(done("convert", "from.safetensors", "again.onnx", "--json"))
    assert said == {
        "output": "again.onnx",
        "parameters": 83,
        "bytes": (room / "again.onnx").stat().st_size,
    }


def test_convert_takes_the_shape_of_each_input(room):
    nnxp.save(nnxp.Flatten(), "flatten.safetensors")
    fails(nnxp_("convert", "flatten.safetensors", "flat.onnx"), 2, "give it with --shape")
    done("convert", "flatten.safetensors", "flat.onnx", "--shape", "2,3")
    assert nnxp.load_onnx("flat.onnx")(draw((5, 2, 3))).shape == (5, 6)
    done("convert", "two.onnx", "again.onnx", "--shape", "2", "--shape", "4")
    wanted = nnxp.load_onnx("two.onnx")(*TWO.values())
    np.testing.assert_array_equal(nnxp.load_onnx("again.onnx")(*TWO.values()), wanted)


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [(["net.onnx", "net.pt"], 2, "a .safetensors or an .onnx file"),
     (["net.onnx", "net.onnx"], 2, "would replace net.onnx"),
     (["net.onnx", "no/net.safetensors"], 1, "no such folder"),
     (["net.onnx", "y.safetensors", "--shape", "6"], 2, "--shape is for an .onnx file"),
     (["net.safetensors", "y.onnx", "--shape", "7"], 2, "takes (rows, 6)"),
     (["net.safetensors", "y.onnx", "--shape", "x"], 2, "is not the shape of a row"),
     (["none.onnx", "y.safetensors"], 1, "none.onnx: No such file"),
     (["x.npy", "y.onnx"], 1, "x.npy")],
)  # fmt: skip
def test_convert_refuses_in_one_line(room, args, code, words):
    before = sorted(room.iterdir())
    fails(nnxp_("convert", *args), code, words)
    assert sorted(room.iterdir()) == before
