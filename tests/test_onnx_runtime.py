"""Operators that ONNX Runtime's quantizer and converters of classical models write, beside it."""

from __future__ import annotations

import numpy as np
import pytest

import nnxp

onnx = pytest.importorskip("onnx", reason="onnx is not installed: it reads the files")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: it is the judge")
from onnx import helper, numpy_helper  # noqa: E402

BYTES, SIGNED = np.uint8, np.int8
"""Signed weights are halved: without VNNI, ONNX Runtime's sums of two products saturate."""


def judge(op, inputs, outputs=1, domain="com.microsoft", apart=0.0, **attributes):
    """A model of one node, for inputs of which the first is no constant, beside ONNX Runtime."""
    names = ["" if x is None else f"x{i}" for i, x in enumerate(inputs)]
    made = [f"y{i}" for i in range(outputs)]
    x = np.asarray(inputs[0])
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    graph = helper.make_graph(
        [helper.make_node(op, names, made, domain=domain, **attributes)], "g",
        [helper.make_tensor_value_info("x0", kind, ["n", *x.shape[1:]] if x.ndim else [])],
        [helper.make_empty_tensor_value_info(name) for name in made],
        [numpy_helper.from_array(np.asarray(a), name)
         for name, a in list(zip(names, inputs, strict=True))[1:] if name],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(domain, 3 if "ml" in domain else 1)]
    source = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1  # with more, each rounds an LSTM's rows on its own
    session = ort.InferenceSession(source.SerializeToString(), options)
    wanted = session.run(None, {"x0": x})
    model = nnxp.load_onnx(source)
    made = model(x)
    for y, right in zip(made if isinstance(made, tuple) else (made,), wanted, strict=True):
        assert (y.dtype, y.shape) == (right.dtype, right.shape)
        np.testing.assert_allclose(y.astype("float64"), right, rtol=1e-5, atol=apart or 1e-5)
    return model


def drawn(*shape, dtype=BYTES, seed=0):
    limits = np.iinfo(dtype)
    rng = np.random.default_rng(seed)
    return rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)


def scale(value, zero, dtype=BYTES):
    return np.float32(value), dtype(zero)


X, OUT = drawn(3, 4, 6, 6), scale(0.02, 100)
IN = scale(0.03, 120)
CASES = [
    ("QLinearAdd", [X, *IN, drawn(4, 1, 1), *scale(0.01, 3), *OUT], {}),
    ("QLinearMul", [X, *IN, drawn(3, 4, 6, 6, seed=1), *scale(0.01, 3), *OUT], {}),
    ("QLinearSigmoid", [X, *IN, *scale(1 / 256, 0)], {}),
    ("QLinearLeakyRelu", [X, *IN, *OUT], {"alpha": 0.2}),
    ("QLinearSoftmax", [X, *IN, *scale(1 / 256, 0)], {"axis": -1, "opset": 13}),
    ("QLinearSoftmax", [X, *IN, *scale(1 / 256, 0)], {"axis": 2, "opset": 12}),
    ("QLinearWhere", [X > 99, X, *IN, drawn(4, 1, 6), *scale(0.01, 3), *OUT], {}),
    ("QLinearGlobalAveragePool", [X, *IN, *OUT], {}),
    ("QLinearGlobalAveragePool", [X, *IN, *OUT], {"channels_last": 1}),
    ("QLinearAveragePool", [X, *IN, *OUT],
     {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 0, 0], "ceil_mode": 1}),
    ("QGemm", [drawn(5, 7), *IN, drawn(7, 4, dtype=SIGNED) // 2, *scale(0.02, 0, SIGNED),
               np.arange(4, dtype="int32") * 50, *scale(0.3, 110)], {}),
    ("QGemm", [drawn(5, 7), *IN, drawn(4, 7, dtype=SIGNED) // 2,
               np.full(4, 0.02, "float32"), np.zeros(4, "int8"), None],
     {"transB": 1, "alpha": 0.5}),
]  # fmt: skip


@pytest.mark.parametrize(("op", "inputs", "options"), CASES)
def test_whole_numbers_that_stand_for_floats(op, inputs, options):
    judge(
        op, inputs, apart=1.0 if inputs[-1] is not None else 0, **options
    )  # a half may go either way


def test_parts_of_several_scales_are_joined():
    parts = [X, *IN, drawn(3, 2, 6, 6), *scale(0.01, 5)]
    judge("QLinearConcat", [*OUT, *parts], apart=1.0, axis=1)


def test_an_lstm_of_whole_numbers_rounds_its_state_at_every_step():
    rng = np.random.default_rng(0)
    weight, recurrent = (drawn(2, n, 32, dtype=SIGNED, seed=n) // 2 for n in (5, 8))
    bias = rng.normal(size=(2, 64)).astype("float32")
    scales = [np.array([0.01, 0.02], "float32"), np.zeros(2, "int8")] * 2
    x = rng.normal(size=(7, 3, 5)).astype("float32")
    inputs = [x, weight, recurrent, bias, None, None, None, None, *scales]
    judge("DynamicQuantizeLSTM", inputs, 3, apart=1e-4, hidden_size=8, direction="bidirectional")


FEATURES = np.random.default_rng(0).normal(size=(9, 4)).astype("float32")
WEIGHTS = np.random.default_rng(1).normal(size=(3, 4)).astype("float32")


@pytest.mark.parametrize("classes", [1, 2, 3])  # of two classes one may be left out
@pytest.mark.parametrize("transform", ["NONE", "LOGISTIC", "SOFTMAX"])
def test_linear_classifiers(transform, classes):
    options = {"intercepts": [0.1, -0.2, 0.3][:classes],
               "classlabels_ints": [7, 3, 5][: max(2, classes)],
               "coefficients": WEIGHTS[:classes].ravel().tolist(), "post_transform": transform,
               "multi_class": 1}  # fmt: skip
    judge("LinearClassifier", [FEATURES], 2, "ai.onnx.ml", **options)


def test_features_of_classical_models():
    holes = FEATURES.copy()
    holes[2, 1] = np.nan
    options = {"imputed_value_floats": [1.0, 2.0, 3.0, 4.0], "replaced_value_float": np.nan}
    judge("Imputer", [holes], domain="ai.onnx.ml", **options)
    ids = np.array([[1, 4], [2, 9]])
    judge("OneHotEncoder", [ids], domain="ai.onnx.ml", cats_int64s=[1, 2, 4])
    judge("FeatureVectorizer", [FEATURES], domain="ai.onnx.ml", inputdimensions=[4])


@pytest.mark.parametrize("kind", ["INT4", "UINT4"])
@pytest.mark.parametrize("shape", [(6, 5), (3, 5)])
def test_weights_of_four_bits_are_read_where_they_are_dequantized(kind, shape):
    """As ONNX Runtime's quantizer writes them: two in a byte, in its own operators, with 16 bits
    for what is no constant."""
    low = -8 if kind == "INT4" else 0
    rng = np.random.default_rng(0)
    numbers = rng.integers(low, low + 16, shape)
    zeros = rng.integers(low, low + 16, shape[1])
    code = getattr(onnx.TensorProto, kind)
    raw = helper.make_tensor("w", code, shape, _halves(numbers), raw=True)
    constants = [
        raw,
        helper.make_tensor("zero", code, zeros.shape, zeros),
        numpy_helper.from_array(np.linspace(0.1, 0.3, shape[1], dtype="float32"), "scale"),
        numpy_helper.from_array(np.float32(1e-4), "fine"),
        numpy_helper.from_array(np.int16(7), "middle"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "fine", "middle"], ["q"], domain="com.microsoft"),
        helper.make_node(
            "DequantizeLinear", ["q", "fine", "middle"], ["r"], domain="com.microsoft"
        ),
        helper.make_node(
            "DequantizeLinear", ["w", "scale", "zero"], ["v"], axis=1, domain="com.microsoft"
        ),
        helper.make_node("MatMul", ["r", "v"], ["y"]),
    ]
    ends = [
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", size])]
        for name, size in (("x", shape[0]), ("y", shape[1]))
    ]
    graph = helper.make_graph(nodes, "g", *ends, constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    source = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    x = rng.standard_normal((4, shape[0]), "float32")
    options = ort.SessionOptions()  # as written: else it multiplies the whole numbers
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(source.SerializeToString(), options)
    wanted = session.run(None, {"x": x})[0]
    np.testing.assert_allclose(nnxp.load_onnx(source)(x), wanted, rtol=1e-5, atol=1e-5)
    raw.raw_data = raw.raw_data[:-1]
    with pytest.raises(nnxp.CheckpointError, match="bytes"):
        nnxp.load_onnx(helper.make_model(
            helper.make_graph(nodes, "g", *ends, constants), opset_imports=opsets, ir_version=10
        ))  # fmt: skip


def _halves(numbers):
    """Four bits each, the first one low."""
    flat = np.append(numbers.reshape(-1), 0).astype("uint8") & 15
    return (flat[0:-1:2] | flat[1::2][: (numbers.size + 1) // 2] << 4).tobytes()
