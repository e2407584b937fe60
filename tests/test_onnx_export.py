"""What is written as ONNX is what the model computes: by ONNX Runtime, and read back."""

from __future__ import annotations

import numpy as np
import pytest

import nnxp
from conftest import OTHERS, draw, draw_inputs, every_swept_layer, results
from nnxp import ConversionError, ShapeError
from nnxp._arrays import xp_of
from nnxp.program.mixing import mixing
from nnxp.testing import LIMIT, assert_close, bounded, error_bound

onnx = pytest.importorskip("onnx", reason="onnx is not installed: it writes the files")


def run(path, *inputs):
    """What ONNX Runtime answers."""
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    session = runtime.InferenceSession(str(path))
    names = [each.name for each in session.get_inputs()]
    return session.run(None, dict(zip(names, inputs, strict=True)))


@every_swept_layer
def test_every_swept_layer_goes_out_and_comes_back(layer, shape, tmp_path):
    path, x = tmp_path / "net.onnx", draw(shape)
    nnxp.save_onnx(layer, path, row=shape[1:])
    value, unit = error_bound(layer, x)
    back = nnxp.load_onnx(path)
    assert_close(back(x), value, bound=LIMIT * unit)
    assert mixing(back.program(shape)) == ""
    (y,) = run(path, x)
    assert_close(y, value, bound=LIMIT * unit)


@pytest.mark.parametrize("number", range(len(OTHERS)))
def test_every_other_layer_goes_out_and_comes_back(number, tmp_path):
    """Those that take ids, a mask, a state or several arrays, or answer several."""
    (layer, shape), path = OTHERS[number], tmp_path / "net.onnx"
    inputs = draw_inputs(layer, shape)
    rows = [None if x is None else (x.shape[1:], x.dtype) for x in inputs]
    nnxp.save_onnx(layer, path, row=rows)
    given = [x for x in inputs if x is not None]
    back, theirs = results(nnxp.load_onnx(path)(*given)), run(path, *given)
    lifted = layer.map_arrays(lambda name, value: bounded.asarray(value))
    for i, pair in enumerate(zip(back, theirs, strict=True)):
        value, unit = error_bound(lambda *xs, i=i: results(lifted(*xs))[i], *inputs)
        for y in pair:
            assert_close(y, value, bound=LIMIT * unit)


RECURRENT = [
    nnxp.RNN(3, 4, "relu", layers=2, rng=0),
    nnxp.RNN(3, 4, "sigmoid", bidirectional=True, returns="states", bias=False, rng=0),
    nnxp.GRU(3, 4, bidirectional=True, returns="last", rng=1),
    nnxp.GRU(3, 4, reset_after=False, returns="states", rng=1),
    nnxp.LSTM(3, 4, layers=2, bidirectional=True, returns="states", rng=2),
    nnxp.LSTM(3, 4, bias=False, returns="last", rng=2),
]


@pytest.mark.parametrize("layer", RECURRENT, ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("ragged", [False, True])
def test_a_recurrence_is_one_operator_for_each_layer_and_direction(layer, ragged, tmp_path):
    path, x = tmp_path / "net.onnx", draw((5, 6, 3))
    rows, given = [(6, 3)], [x]
    if ragged:
        rows.append(((), "int64"))
        given.append(np.array([6, 1, 0, 9, -2]))
    nnxp.save_onnx(layer, path, row=rows)
    ops = [node.op_type for node in onnx.load(path).graph.node]
    assert ops.count(type(layer).__name__) == len(layer.cells)
    assert not {"Sigmoid", "Tanh", "Gemm", "MatMul"} & set(ops)
    back, theirs = results(nnxp.load_onnx(path)(*given)), run(path, *given)
    for y, ours, wanted in zip(theirs, back, results(layer(*given)), strict=True):
        np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-6)
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-6)


class _Broadcast(nnxp.Layer):
    weight_x: np.ndarray
    weight: np.ndarray
    one: np.ndarray

    what: str

    def __init__(self, what):
        self.weight_x, self.weight = draw((3, 12)), draw((4, 12))
        self.one = draw((1, 4 if what == "h" else 12))
        self.what = what

    def __call__(self, x):
        options = {"bias_x": None, "bias": None, "h": None} | {self.what: self.one}
        product = nnxp.kernels.linear(x, self.weight_x, options["bias_x"])
        return nnxp.kernels.gru(product, self.weight, options["bias"], options["h"])


@pytest.mark.parametrize("what", ["bias_x", "bias", "h"])
def test_what_a_recurrence_broadcasts_is_written_out(what, tmp_path):
    layer, path, x = _Broadcast(what), tmp_path / "net.onnx", draw((5, 6, 3))
    nnxp.save_onnx(layer, path, row=(6, 3))
    for y, wanted in zip(run(path, x), layer(x), strict=True):
        np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 5])
def test_any_number_of_rows_goes_in(rows, tmp_path):
    net = nnxp.Sequential(nnxp.Flatten(), nnxp.Dense(6, 3, "gelu", rng=0), nnxp.LayerNorm(3))
    path, x = tmp_path / "net.onnx", draw((rows, 2, 3))
    nnxp.save_onnx(net, path, row=(2, 3))
    (y,) = run(path, x)
    np.testing.assert_allclose(y, net(x), rtol=1e-5, atol=1e-6)
    (said,) = onnx.load(path).graph.input
    assert said.type.tensor_type.shape.dim[0].dim_param == "rows"


def test_the_shape_of_a_row_is_found_where_the_parameters_tell(tmp_path):
    net, path = nnxp.Dense(4, 2, rng=0), tmp_path / "net.onnx"
    nnxp.save_onnx(net, path)
    assert nnxp.load_onnx(path).row_shape() == (4,)
    with pytest.raises(ShapeError, match=r"takes \(rows, 4\)"):
        nnxp.save_onnx(net, path, row=(5,))
    with pytest.raises(ShapeError, match=r"such as \(784,\), not 3"):
        nnxp.save_onnx(net, tmp_path / "net.onnx", row=3)
    with pytest.raises(ShapeError, match="takes x, which cannot be left out"):
        nnxp.save_onnx(net, tmp_path / "net.onnx", row=[None])
    with pytest.raises(nnxp.OptionError, match="made of nnxp layers"):
        nnxp.save_onnx(abs, path)


def test_half_precision_and_a_device_go_out(tmp_path, sim):
    net, path = nnxp.Dense(4, 2, "relu", rng=0), tmp_path / "net.onnx"
    for model in (net.astype("float16"), net.astype("float64"), net.to("sim")):
        nnxp.save_onnx(model, path)
        back, host = nnxp.load_onnx(path), model.to("numpy")
        assert back.dtype == host.dtype
        x = draw((3, 4)).astype(host.dtype)
        np.testing.assert_allclose(back(x), host(x), rtol=1e-2 if x.dtype == "float16" else 1e-6)


@pytest.mark.parametrize("window", [(2, 2), (3, 2), (4, 5)])
@pytest.mark.parametrize(
    "options",
    [{"stride": 2, "padding": "same"}, {"stride": (3, 1), "padding": "same_lower"},
     {"stride": 3, "padding": "same"},
     {"stride": 2, "padding": ((1, 0), (0, 1)), "output_padding": 1},
     {"stride": 2, "dilation": 2, "groups": 2, "activation": "relu"}],
)  # fmt: skip
def test_a_transposed_convolution_of_any_stride_goes_out(window, options, tmp_path):
    layer, path = nnxp.ConvTranspose(4, 6, window, rng=0, **options), tmp_path / "net.onnx"
    x = draw((2, 5, 6, 4))
    value, unit = error_bound(layer, x)
    nnxp.save_onnx(layer, path, row=x.shape[1:])
    assert_close(nnxp.load_onnx(path)(x), value, bound=LIMIT * unit)
    (y,) = run(path, x)
    assert_close(y, value, bound=LIMIT * unit)
    zeros_first = min(window) < 3 and options == {"stride": 3, "padding": "same"}
    made = [node.op_type for node in onnx.load(path).graph.node].count("ConvTranspose")
    assert made == (0 if zeros_first else 1)  # which ONNX cannot say, so it is written out


class Everything(nnxp.Layer):
    """Functions of the dialect that are more than an operator's name."""

    def __call__(self, x):
        xp = xp_of(x)
        n, c = x.shape[0], x.shape[1]
        y = xp.concatenate([x[:, ::-1], x[:, 1:2], xp.expand_dims(x[:, -1], 1)], axis=1)
        z = xp.stack([xp.log1p(xp.abs(x)), xp.expm1(x), xp.log2(xp.square(x) + 1)], axis=-1)
        z = xp.roll(xp.roll(z, (1, 2), axis=(2, 1)), 1, axis=(1, 2))
        w = xp.moveaxis(z, -1, 1).reshape(n, 3 * c)
        v = xp.where(x > 0, x, xp.full_like(x, -2)) + x.var(axis=1, keepdims=True)
        pads = xp.pad(v, ((0, 0), (1, 2)), mode="constant", constant_values=0.5)
        sums = xp.cumsum(x, axis=1) * xp.isfinite(x) + xp.not_equal(x, 0)
        first, second = xp.split(xp.tile(x, (1, 2)), 2, axis=1)
        picked = xp.take(x, np.array([1, 0, -1]), axis=1) if xp is np else x[:, [1, 0, -1]]
        spread = xp.broadcast_to(x.max(axis=1, keepdims=True), (n, 2)) * xp.ones((n, 2))
        parts = [y, w, pads, sums, first * second, picked, spread, xp.clip(x, -0.5, 0.5)]
        parts += [xp.flip(x, 1), xp.log10(xp.abs(x) + 1), x.std(axis=1, ddof=1, keepdims=True)]
        parts += [xp.linalg.norm(x, ord=p, axis=1, keepdims=True) for p in (None, 1, 2)]
        parts += [xp.exp2(x), xp.round(x, 1), xp.take_along_axis(x, xp.argsort(-x), axis=1)]
        parts += [xp.trunc(3 * x), xp.roll(x, -1, axis=1), xp.roll(x, (2, 5), axis=(1, -1))]
        parts += [f(x > 0, axis=1, keepdims=True).astype(x.dtype) for f in (xp.any, xp.all)]
        products = xp.einsum("...i,...j->...ij", x, x).reshape(n, c * c)
        return xp.concatenate([*parts, products, xp.repeat(x, 2, axis=1)], axis=1)


def test_functions_of_the_dialect_go_out(tmp_path):
    path, x = tmp_path / "net.onnx", draw((5, 4))
    nnxp.save_onnx(Everything(), path, row=(4,))
    wanted = Everything()(x)
    (y,) = run(path, x)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(nnxp.load_onnx(path)(x), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        lambda xp, x: x + xp.argmax(x).astype(x.dtype),
        lambda xp, x: x + xp.argmin(x, keepdims=True).astype(x.dtype),
        lambda xp, x: xp.cumsum(x).reshape(x.shape),
        lambda xp, x: x + xp.var(x, ddof=1) + xp.std(x, axis=0) + xp.linalg.norm(x),
        lambda xp, x: xp.swapaxes(xp.moveaxis(x.reshape(-1, 2, 2, 1), (1, 3), (3, 2)), 1, 2),
    ],
)
def test_functions_along_no_axis_go_out_along_all_of_them(function, tmp_path):
    class Along(nnxp.Layer):
        def __call__(self, x):
            return function(xp_of(x), x)

    path, x = tmp_path / "net.onnx", draw((5, 4))
    nnxp.save_onnx(Along(), path, row=(4,))
    np.testing.assert_allclose(run(path, x)[0], Along()(x), rtol=1e-5, atol=1e-6)


class Looks(nnxp.Layer):
    def __call__(self, x):
        return x * 2 if float(x.max()) > 1 else x


class Rolls(nnxp.Layer):
    def __call__(self, x):
        return xp_of(x).roll(x, 1, axis=0)


class Hypotenuse(nnxp.Layer):
    def __call__(self, x):
        return xp_of(x).hypot(x, 1)


@pytest.mark.parametrize(
    ("layer", "said"),
    [(Looks(), r"layers\.1 cannot be written: it is run as Python \(float\(x\)"),
     (Hypotenuse(), r"layers\.1 cannot be written: ONNX has no hypot"),
     (Rolls(), "ONNX has no roll of rows")],
)  # fmt: skip
def test_what_onnx_has_no_words_for_is_refused_with_the_layer_s_path(layer, said, tmp_path):
    path = tmp_path / "net.onnx"
    net = nnxp.Sequential(nnxp.Dense(4, 4, rng=0), layer)
    with pytest.raises(ConversionError, match=said):
        nnxp.save_onnx(net, path, row=(4,))
    assert not path.exists()
