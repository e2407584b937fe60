"""Wrong calls: each ends in an error of nnxp's own that says what was wanted and what came.

An argument that is missing or has no such name is Python's own TypeError, which says as much.
"""

from __future__ import annotations

import io
import pathlib
import pickle

import numpy as np
import pytest

import nnxp
from nnxp import kernels, testing
from nnxp._errors import (
    BackendUnavailable,
    CheckpointError,
    ConversionError,
    DeviceMismatch,
    DtypeMismatch,
    OptionError,
    OutOfMemory,
    ShapeError,
)
from nnxp.demo import run as demo
from nnxp.floor import against_floor
from nnxp.io.rows import read_rows, written_rows
from nnxp.testing import goldens
from nnxp.verify import verify

NUMBER, MODEL, SHAPE = "a whole number, at least 1", "made of nnxp layers", "is whole numbers"
NAMES, FLOAT, FILE = "The names are auto, cupy", "float32, float64, not", "a file has a name"
REAL, ROWS = "real numbers", r"takes \(rows, 6\) but got"
SEED, BYTES = "rng is a seed", 'not a size in bytes; "256 MiB" is one'

WRONG = [
    # making layers
    ("Dense(2.5, 3)", OptionError, f"inputs is {NUMBER}, not 2.5"),
    ("Dense('a', 3)", OptionError, f"{NUMBER}, not 'a'"),
    ("Dense(None, 3)", OptionError, f"{NUMBER}, not None"),
    ("Dense(-1, 3)", OptionError, f"{NUMBER}, not -1"),
    ("Dense(0, 3)", OptionError, f"{NUMBER}, not 0"),
    ("Dense(3, True)", OptionError, f"outputs is {NUMBER}, not True"),
    ("Dense(3, [2])", OptionError, NUMBER),
    ("Dense((3, 2), 2)", OptionError, NUMBER),
    ("Dense(np.zeros((3, 2)), np.zeros(2))", OptionError, f"{NUMBER}, not array"),
    ("Dense(3, 2, 'sigmiod')", OptionError, "no activation 'sigmiod'; did you mean sigmoid"),
    ("Dense(3, 2, None)", OptionError, "no activation None. The names are"),
    ("Dense(3, 2, np.tanh)", OptionError, "no activation <ufunc 'tanh'>. The names are"),
    ("Dense(3, 2, ['relu'])", OptionError, "The names are"),
    ("Dense(3, 2, bias=np.zeros(2))", OptionError, r"True or False, not array.*Dense.of\("),
    ("Dense(3, 2, bias=None)", OptionError, "True or False, not None"),
    ("Dense(3, 2, bias='no')", OptionError, "True or False, not 'no'"),
    (
        "Bilinear(3, 4, 2, bias=np.zeros(2))",
        OptionError,
        r"True or False, not array.*Bilinear.of\(",
    ),
    ("Dense(3, 2, rng='seed')", OptionError, f"{SEED}.*not 'seed'"),
    ("Dense(3, 2, rng=-1)", OptionError, f"{SEED}.*not -1"),
    ("Dense(3, 2, rng=1.5)", OptionError, f"{SEED}.*not 1.5"),
    ("Dense(3, 2, rng=np.random)", OptionError, SEED),
    ("Dense(3, 2, dtype='int32')", DtypeMismatch, f"{FLOAT} 'int32'"),
    ("Dense(3, 2, dtype='floaty')", DtypeMismatch, f"{FLOAT} 'floaty'"),
    ("Dense(3, 2, dtype=None)", DtypeMismatch, f"{FLOAT} None"),
    ("Dense(3, 2, dtype=np.zeros(2))", DtypeMismatch, FLOAT),
    ("Dense.of()", OptionError, "Dense has no weight"),
    ("Dense.of(np.zeros((3, 2)), np.zeros(3))", ShapeError, r"got \(3, 2\) and \(3,\)"),
    ("Dense.of(np.zeros(3), np.zeros(3))", ShapeError, r"weight \(inputs, outputs\)"),
    ("Dense.of(np.zeros((0, 3)))", ShapeError, r"got \(0, 3\)"),
    ("Dense.of([[1.0, 2.0]], [0.0, 0.0])", ShapeError, r"an array, not \[\[1"),
    ("Dense.of(3, 2)", ShapeError, "an array, not 3"),
    ("Dense.of(np.zeros((3, 2), int))", DtypeMismatch, "weight of Dense is int64.*floats"),
    ("Dense.of(np.zeros((3, 2), complex))", DtypeMismatch, "complex128"),
    ("Dense.of(np.zeros((3, 2), 'U3'))", DtypeMismatch, "<U3"),
    ("Dense.of(np.ma.masked_array(np.zeros((3, 2))))", ShapeError, "an array, not masked_array"),
    ("Dense.of(np.zeros((3, 2)), weights=1)", OptionError, "weight, bias, activation.*weights"),
    ("Dense.of(np.zeros((3, 2)), None, 'relu', 5)", OptionError, "4 values"),
    ("Dense.of(np.zeros((3, 2)), weight=np.zeros((3, 2)))", OptionError, "once"),
    ("LayerNorm('a')", OptionError, f"channels is {NUMBER}, not 'a'"),
    ("LayerNorm(2.0)", OptionError, f"{NUMBER}, not 2.0"),
    ("LayerNorm((6, 0))", OptionError, NUMBER),
    ("LayerNorm(6, eps=-1)", OptionError, "eps is zero or a little more, not -1"),
    ("LayerNorm(6, eps='small')", OptionError, "not 'small'"),
    ("LayerNorm(6, eps=None)", OptionError, "not None"),
    ("LayerNorm(6, eps=True)", OptionError, "not True"),
    ("LayerNorm(6, eps=float('nan'))", OptionError, "not nan"),
    ("RMSNorm(None)", OptionError, NUMBER),
    ("BatchNorm('a')", OptionError, f"{NUMBER}, not 'a'"),
    ("BatchNorm(np.zeros(3))", OptionError, f"{NUMBER}, not array"),
    ("BatchNorm(3, eps=float('inf'))", OptionError, "not inf"),
    ("BatchNorm.of(np.zeros(3))", OptionError, "BatchNorm has no var"),
    ("BatchNorm.of(*np.zeros((4, 3, 3)), 1e-5)", ShapeError, r"\(channels,\) for mean, var"),
    ("Standardize(np.zeros(3), np.zeros(3))", OptionError, "scale of Standardize has zeros"),
    ("Standardize([0, 1], [1, float('nan')])", OptionError, "NaN"),
    ("Standardize([0, 1], [1, float('inf')])", OptionError, "infinity"),
    ("Standardize(np.zeros(3), np.ones(4))", ShapeError, r"\(3,\), \(4,\)"),
    ("Standardize(0.0, 1.0)", ShapeError, "an array, not 0.0"),
    ("Standardize(['a'], ['b'])", DtypeMismatch, r"one real number a column, not \['a'\]"),
    ("Standardize([[1, 2], [3]], [1, 2])", DtypeMismatch, "one real number a column"),
    ("Standardize([0, 1], [1j, 2])", DtypeMismatch, "scale of Standardize"),
    ("Standardize([0, 1], np.array(['1', '2']))", DtypeMismatch, "one real number a column"),
    ("Activation('foo')", OptionError, "no activation 'foo'"),
    ("Activation(3)", OptionError, "no activation 3"),
    ("Activation('relu', slope=2)", OptionError, "relu has no options, not slope"),
    ("Activation('relu', out=3)", OptionError, "relu has no options, not out"),
    ("Activation('elu', slope=2)", OptionError, "options alpha, not slope"),
    ("Activation('elu', alpha='a')", OptionError, "alpha of elu is a number, not 'a'"),
    ("Activation('elu', alpha=None)", OptionError, "a number, not None"),
    ("Activation('elu', alpha=float('nan'))", OptionError, "a number, not nan"),
    ("Dropout('half')", OptionError, "at least 0 and below 1, not 'half'"),
    ("Dropout(None)", OptionError, "not None"),
    ("Dropout(50)", OptionError, "not 50"),
    ("Dropout(True)", OptionError, "not True"),
    ("Sequential(3)", OptionError, "takes layers, but argument 0 is 3"),
    ("Sequential([Dense(3, 2)])", OptionError, r"Sequential\(\*layers\)"),
    ("Sequential(Dense(3, 2), None)", OptionError, "argument 1 is None"),
    ("Sequential(Dense(3, 2), np.tanh)", OptionError, "argument 1 is <ufunc"),
    ("Sequential(Dense, Dense)", OptionError, "argument 0 is <class"),
    ("Sequential.of(3)", OptionError, "takes layers, not 3"),
    ("Sequential.of('ab')", OptionError, "takes layers, not 'ab'"),
    ("Sequential.of((3, 4))", OptionError, "argument 0 is 3"),
    ("Residual()", OptionError, "none came"),
    ("Residual(3)", OptionError, "takes layers, not 3"),
    ("Residual.of(np.zeros(3))", OptionError, "takes layers, not array"),
    ("Layer()", OptionError, "derive a class"),
    ("Layer.of(3)", OptionError, "derive a class"),
    ("Scale([np.ones(3)])", OptionError, "a field is an array, a layer, or a tuple of layers"),
    ("Scale({'a': np.ones(3)})", OptionError, "factor of Scale holds arrays"),
    ("Graph()", OptionError, r"made by nnxp\.load_onnx"),
    ("TorchGraph(3)", OptionError, r"made by nnxp\.from_torch"),
    # training
    ("fit(net, x, x[:, 0])", OptionError, 'none is given: loss="cross_entropy" is for labels'),
    ("fit(net, x, x[:, 0], loss=3)", OptionError, "a name or a function.*not 3"),
    ("fit(3, x, x, loss='mean_square')", OptionError, f"nnxp.fit takes a model {MODEL}, not 3"),
    ("fit(net, x, x[:, :3], loss='mean_square', memory_limit='much')", OptionError, BYTES),
    ("fit(net, x, x[:, :3], loss='mean_square', memory_limit=9)", OutOfMemory, "needs"),
    ("fit(net, iter([x]), x, loss='mean_square')", ShapeError, "without y, fit takes batches"),
    ("fit(net, x, loss='mean_square')", OptionError, r"no y, and x is ndarray \(5, 6\)"),
    ("fit(net, iter([(x, x)]), loss='mean_square')", OptionError, "epochs=1 and not 10"),
    ("fit(net, x, np.array(['a'] * 5), loss='cross_entropy')", DtypeMismatch, "numpy.unique"),
    ("value_and_gradients(nnxp.losses.mean_square)(net, x.tolist(), x)", DtypeMismatch, "asarray"),
    ("SGD('fast')", OptionError, "a learning rate is 0 or more, not 'fast'"),
    ("value_and_gradients('mean_square')", OptionError, "a function.*not 'mean_square'"),
    ("vjp(3, x)", OptionError, "a layer or a function of arrays, not 3"),
    ("vjp(net)", OptionError, "but none came"),
    ("vjp(net, [[1.0]])", OptionError, r"arrays of NumPy or CuPy.*not \[\[1.0\]\]"),
    ("vjp(net, x)[1](3)", OptionError, r"1 arrays, one for each result, not \(3,\)"),
    ("vjp(net, x)[1](x, x)", OptionError, "1 arrays, one for each result"),
    # calling a model
    ("net(None)", ShapeError, r"takes \(rows, ...\) but got None"),
    ("net(3)", ShapeError, "but got 3"),
    ("net('rows.npy')", DtypeMismatch, r"str is not an array.*numpy.load\(x\)"),
    ("net(pathlib.Path('rows.npy'))", DtypeMismatch, r"PosixPath.*numpy.load\(x\)"),
    ("net([[1, 2, 3]])", DtypeMismatch, r"list is not an array.*numpy.asarray\(x\)"),
    ("net((x,))", DtypeMismatch, "tuple is not an array"),
    ("net({'x': x})", DtypeMismatch, "dict is not an array"),
    ("net(net)", DtypeMismatch, "Sequential is not an array"),
    ("net(x, x)", ShapeError, "takes x: too many"),
    ("net(rows=x)", ShapeError, "takes x: missing"),
    ("net(x[0])", ShapeError, rf"{ROWS} \(6,\); x\[None\]"),
    ("net(x.T)", ShapeError, rf"{ROWS} \(6, 5\); x.T"),
    ("net(x[:, :4])", ShapeError, rf"layers.0 Dense.*{ROWS} \(5, 4\)"),
    ("net(np.zeros((), 'float32'))", ShapeError, "a single number"),
    ("net(x.astype('float64'))", DtypeMismatch, "computes in float32 but x is float64"),
    ("net(x.astype(int))", DtypeMismatch, "but x is int64"),
    ("net(x + 1j)", DtypeMismatch, "but x is complex64"),
    ("net(x.astype('U3'))", DtypeMismatch, "but x is <U3"),
    ("net(np.ma.masked_array(x))", DtypeMismatch, "MaskedArray is not an array"),
    ("net(there)", DeviceMismatch, r"on cpu but x is on sim:0.*\.to\("),
    ("LayerNorm(6)(x[:, :1])", ShapeError, rf"{ROWS} \(5, 1\)"),
    ("Scale(np.ones(6, 'float32'))(x[:, :4])", ShapeError, rf"{ROWS} \(5, 4\)"),
    ("Activation('softmax')(x[0])", ShapeError, r"\(rows, ..., classes\) but got 1 axis"),
    # what a model can do
    ("net.to(3)", BackendUnavailable, f"no backend '3'. {NAMES}"),
    ("net.to(None)", BackendUnavailable, f"no backend 'None'. {NAMES}"),
    ("net.to('tpu')", BackendUnavailable, f"no backend 'tpu'. {NAMES}"),
    ("net.to('sim:7')", BackendUnavailable, "devices are 0 to 1"),
    ("net.to(['cpu'])", BackendUnavailable, NAMES),
    ("net.astype('int32')", DtypeMismatch, f"{FLOAT} 'int32'"),
    ("net.astype(None)", DtypeMismatch, f"{FLOAT} None"),
    ("net.with_parameters(None)", OptionError, "a dict of arrays by name, not None"),
    ("net.with_parameters(list(parameters))", OptionError, "a dict of arrays by name"),
    ("net.with_parameters(net)", OptionError, "a dict of arrays by name, not Sequential"),
    ("net.with_parameters({})", ShapeError, "missing: layers.0.bias"),
    ("net.with_parameters({**parameters, 'b': x})", ShapeError, "unknown: b"),
    ("net.with_parameters({**parameters, 3: x})", ShapeError, "unknown: 3"),
    ("net.with_parameters(changed(None))", DtypeMismatch, "an array of NumPy or CuPy, not"),
    ("net.with_parameters(changed([1.0]))", DtypeMismatch, r"list; numpy.asarray\(value\)"),
    ("net.with_parameters(changed(Foreign()))", DtypeMismatch, "Foreign; numpy.asarray"),
    ("net.with_parameters(changed(np.zeros(7)))", ShapeError, r"is \(8,\), not \(7,\)"),
    ("net.with_parameters(changed(np.zeros(8, int)))", DtypeMismatch, "int64; parameters are"),
    ("net.with_parameters(changed(np.zeros(8)))", DtypeMismatch, "float32 but .* float64"),
    ("net.map_arrays(3)", OptionError, "a function of name and array, not 3"),
    ("net.map_layers(None)", OptionError, "a function of name and layer, not None"),
    ("net.map_layers(lambda name, layer: None)", OptionError, "layers.0 becomes a layer, not None"),
    ("net.program()", ShapeError, r"\(1, 784\)"),
    ("net.program(5)", ShapeError, f"{SHAPE}.*not 5"),
    ("net.program('784')", ShapeError, f"{SHAPE}.*not '784'"),
    ("net.program(x)", ShapeError, f"{SHAPE}.*not array"),
    ("net.program(None)", ShapeError, "takes x, which cannot be left out"),
    ("net.program('ab', whole=True)", ShapeError, f"{SHAPE}.*not 'ab'"),
    ("net.program(5, whole=True)", ShapeError, f"{SHAPE}.*not 5"),
    ("net.program((1, 6.0))", ShapeError, rf"{SHAPE}.*not \(1, 6.0\)"),
    ("net.program((1, -6))", ShapeError, f"{SHAPE}.*-6"),
    ("net.program((1, 7))", ShapeError, rf"{ROWS} \(1, 7\)"),
    ("net.program((1, 6), (1, 6))", ShapeError, "takes x: too many"),
    ("net.program(((1, 6), 'floaty'))", DtypeMismatch, "NumPy's, not 'floaty'"),
    ("net.program(((1, 6), 'int32'))", DtypeMismatch, "but x is int32"),
    ("net.output_shape()", ShapeError, "no shape"),
    ("net.output_shape(5)", ShapeError, f"{SHAPE}.*not 5"),
    ("net.output_shape(1, 6)", ShapeError, f"{SHAPE}.*not 1"),
    ("net.output_shape((-1, 6))", ShapeError, f"{SHAPE}.*-1"),
    ("net.output_shape(('a', 6))", ShapeError, f"{SHAPE}.*'a'"),
    ("net.output_shape((2.5, 6))", ShapeError, f"{SHAPE}.*2.5"),
    ("net.output_shape((5, 7))", ShapeError, rf"{ROWS} \(5, 7\)"),
    ("net.summary(5)", ShapeError, f"{SHAPE}.*not 5"),
    ("net.summary(x)", ShapeError, f"{SHAPE}.*not array"),
    ("net.summary((0.5, 6))", ShapeError, f"{SHAPE}.*0.5"),
    ("Flatten().summary()", OptionError, r"does not tell the shape.*\(1, 784\)"),
    ("Flatten().row_shape()", OptionError, "does not tell the shape"),
    ("net.activations()", ShapeError, "got nothing"),
    ("net.activations('x.npy')", DtypeMismatch, r"numpy.load\(x\)"),
    ("net.activations(x, x)", ShapeError, "too many"),
    ("net.activations(there)", DeviceMismatch, "x is on sim:0"),
    ("setattr(net, 'layers', ())", OptionError, "fixed once it is made"),
    ("setattr(net, 'foo', 3)", OptionError, "fixed once it is made"),
    ("delattr(net, 'layers')", OptionError, "fixed once it is made"),
    # engines
    ("Engine(None)", OptionError, f"{MODEL}, not None"),
    ("Engine('net.safetensors')", OptionError, f"{MODEL}, not 'net.safetensors'"),
    ("Engine(x, net)", OptionError, f"{MODEL}, not array"),
    ("Engine(Dense)", OptionError, f"{MODEL}, not <class"),
    ("Engine(net, 3)", BackendUnavailable, NAMES),
    ("Engine(net, x)", BackendUnavailable, NAMES),
    ("Engine(net, [])", OptionError, r"different devices, not \[\]"),
    ("Engine(net, ['cpu', 'cpu'])", OptionError, "different devices"),
    ("Engine(net, ['cpu', 'sim'])", OptionError, "the CPU is none"),
    ("Engine(net, memory_limit='lots')", OptionError, f"'lots' is {BYTES}"),
    ("Engine(net, memory_limit='1 TB')", OptionError, f"'1 TB' is {BYTES}"),
    ("Engine(net, memory_limit=0)", OptionError, f"{NUMBER}, not 0"),
    ("Engine(net, memory_limit=1.5)", OptionError, f"{NUMBER}, not 1.5"),
    ("Engine(net, memory_limit=True)", OptionError, f"{NUMBER}, not True"),
    ("Engine(net, memory_limit=x)", OptionError, f"{NUMBER}, not array"),
    ("Engine(net, 'cpu', memory_limit=10)(x)", OutOfMemory, "=10 bytes does not hold one row"),
    ("Engine(net, workers=0)", OptionError, f"threads.*{NUMBER}, not 0"),
    ("Engine(net, workers='2')", OptionError, f"{NUMBER}, not '2'"),
    ("Engine(net, workers=True)", OptionError, f"{NUMBER}, not True"),
    ("Engine(net, workers=x)", OptionError, f"{NUMBER}, not array"),
    ("Engine(net, precision='fp8')", OptionError, "'fp8' is not offered"),
    ("Engine(net, precision=x)", OptionError, "not offered"),
    ("kernels.matmul(x, x.T, precision='fp8')", OptionError, "'fp8' is not offered"),
    ("kernels.linear(x, x.T, precision=x)", OptionError, "not offered"),
    ("kernels.conv(x[..., None], x[0, None, None], precision=16)", OptionError, "16 is not"),
    ("kernels.attention(x[None], x[None], x[None], precision='')", OptionError, "'' is not"),
    ("Engine(net.astype('float64'), precision='tf32')", OptionError, "is float64"),
    ("engine(None)", OptionError, "takes x, but x is None"),
    ("engine(3)", ShapeError, r"x\[None\] makes it one row"),
    ("engine('x.npy')", DtypeMismatch, "not the name of a file: 'x.npy'; numpy.load"),
    ("engine(pathlib.Path('x.npy'))", DtypeMismatch, "not the name of a file"),
    ("engine([])", ShapeError, rf"{ROWS} \(0,\)"),
    ("engine([['a'] * 6])", DtypeMismatch, f"{REAL}, but x is <U1"),
    ("engine([[1, 2], [3]])", ShapeError, "no array of rows"),
    ("engine([x])", ShapeError, r"x\[0\] are its rows"),
    ("engine({'x': x, 'y': x})", nnxp.NnxpError, "x"),
    ("engine(iter([x]))", ShapeError, "predict_iter takes batches"),
    ("engine(lambda: x)", ShapeError, "function is no array"),
    ("engine(engine)", ShapeError, "Engine is no array"),
    ("engine(x[0])", ShapeError, rf"{ROWS} \(6,\)"),
    ("engine(x.T)", ShapeError, rf"{ROWS} \(6, 5\)"),
    ("engine(x[:, :0])", ShapeError, rf"{ROWS} \(5, 0\)"),
    ("engine(x + 1j)", DtypeMismatch, f"{REAL}, but x is complex64; x.real"),
    ("engine(x.astype('U3'))", DtypeMismatch, f"{REAL}, but x is <U3"),
    ("engine(np.array([[None] * 6]))", DtypeMismatch, "None"),
    ("engine(np.zeros(5, [('a', 'f4')]))", DtypeMismatch, "structured_to_unstructured"),
    ("engine(there)", DeviceMismatch, "on cpu takes rows.*x is on sim:0"),
    ("engine(x, 3)", OptionError, "out is a.* array.*, not int"),
    ("engine(x, 'y.npy')", OptionError, "out is a.* array.*, not str"),
    ("engine(x, x)", ShapeError, r"out is \(5, 6\) but the output is \(5, 3\)"),
    ("engine(x, np.zeros((5, 3), int))", DtypeMismatch, "out is int64 but"),
    ("engine(x, np.broadcast_to(np.float32(0), (5, 3)))", OptionError, "read-only"),
    ("engine(x, progress='yes')", OptionError, "progress is True, False, or a function.*'yes'"),
    ("engine(x, progress=3)", OptionError, "progress is True, False, or a function.*3"),
    ("engine.plan(8)", OptionError, r"\(1000, 784\), not 8"),
    ("engine.plan('a')", OptionError, r"\(1000, 784\), not 'a'"),
    ("engine.plan(x)", OptionError, r"\(1000, 784\), not array"),
    ("engine.plan((8, 7))", ShapeError, rf"{ROWS} \(\w+, 7\)"),
    ("closed(x)", OptionError, "closed"),
    ("closed.plan((3, 6))", OptionError, "closed"),
    ("closed.model", OptionError, "closed"),
    ("predict(x, net)", OptionError, f"{MODEL}, not array"),
    ("predict(engine, x)", OptionError, f"{MODEL}, not .*; its .model is one"),
    ("predict(Fitted(net, []), x)", OptionError, f"{MODEL}, not Fitted.*; its .model is one"),
    ("predict('net.safetensors', x)", OptionError, f"{MODEL}, not 'net.safetensors'"),
    ("predict(net, 'x.npy')", DtypeMismatch, "not the name of a file"),
    ("predict(net, x, 'nope')", BackendUnavailable, f"no backend 'nope'. {NAMES}"),
    ("predict(net, x, x)", BackendUnavailable, NAMES),
    ("predict(net, x, out='y.npy')", OptionError, "not str"),
    ("predict(net, x, out=net(x).astype('U9'))", DtypeMismatch, "out is <U9 but"),
    ("predict(net, x, workers='many')", OptionError, f"{NUMBER}, not 'many'"),
    ("predict_iter(net, 3)", OptionError, "batches of rows, one by one, not 3"),
    ("predict_iter(net, None)", OptionError, "batches of rows, one by one, not None"),
    ("predict_iter(net, 'x.npy')", OptionError, "not 'x.npy'"),
    ("predict_iter(x, net)", OptionError, "not Sequential"),
    ("predict_iter(3, [x])", OptionError, f"{MODEL}, not 3"),
    ("list(predict_iter(net, ['x.npy']))", DtypeMismatch, "not the name of a file: 'x.npy'"),
    ("list(predict_iter(net, [x, x[:, :3]]))", ShapeError, rf"{ROWS} \(\w+, 3\)"),
    # backends
    ("get_backend('gpu')", BackendUnavailable, f"no backend 'gpu'. {NAMES}"),
    ("get_backend('')", BackendUnavailable, NAMES),
    ("get_backend('cuda:')", BackendUnavailable, NAMES),
    ("get_backend('cpu:1')", BackendUnavailable, "no cpu:1"),
    ("get_backend(np)", BackendUnavailable, NAMES),
    ("get_backend(x)", BackendUnavailable, NAMES),
    ("set_backend('nope')", BackendUnavailable, NAMES),
    ("set_backend(None)", BackendUnavailable, NAMES),
    ("set_backend(x)", BackendUnavailable, NAMES),
    ("use_backend(3).__enter__()", BackendUnavailable, NAMES),
    ("use_backend(x).__enter__()", BackendUnavailable, NAMES),
    ("to_backend('sim', x)", BackendUnavailable, NAMES),
    ("to_backend(None, 'sim')", DtypeMismatch, "None"),
    ("to_backend(net, 'sim')", DtypeMismatch, f"{REAL}.*Sequential"),
    ("to_backend(['a'], 'sim')", DtypeMismatch, f"{REAL}.*<U1"),
    ("to_backend([[1], [2, 3]], 'sim')", ShapeError, "no array"),
    ("to_backend(np.zeros(3, 'M8[s]'), 'sim')", DtypeMismatch, "datetime64"),
    ("asnumpy('x.npy')", DtypeMismatch, "not the name of a file"),
    ("asnumpy(None)", DtypeMismatch, "None"),
    ("asnumpy({'a': 3})", DtypeMismatch, "dict"),
    ("asnumpy([[1], [2, 3]])", ShapeError, "no array"),
    ("get_array_module(x, there)", DeviceMismatch, "cpu and sim:0"),
    ("nnxp.sim.Device(7)", OptionError, "0 to 1, not 7"),
    ("nnxp.sim.Device('a')", OptionError, "0 to 1, not 'a'"),
    # files
    ("save(x, 'a.safetensors')", OptionError, f"{MODEL}, not array"),
    ("save('a.safetensors', net)", OptionError, f"{MODEL}, not 'a.safetensors'"),
    ("save(net.parameters(), 'a')", OptionError, MODEL),
    ("nnxp.save_onnx(net, 'a.safetensors')", OptionError, r"nnxp.save\(model, path\) writes"),
    ("save(net, 3)", OptionError, f"{FILE}.*not 3"),
    ("save(net, None)", OptionError, f"{FILE}.*not None"),
    ("save(net, '')", OptionError, f"{FILE}.*not ''"),
    ("save(net, io.BytesIO())", OptionError, f"{FILE}.*BytesIO"),
    ("save(net, 'a\\0b')", OptionError, FILE),
    ("load(0)", OptionError, f"{FILE}.*not 0"),
    ("load(True)", OptionError, f"{FILE}.*not True"),
    ("load(None)", OptionError, f"{FILE}.*not None"),
    ("load(x)", OptionError, f"{FILE}.*not array"),
    ("load(net)", OptionError, f"{FILE}.*not Sequential"),
    ("load(io.BytesIO(b''))", OptionError, FILE),
    ("load(['net.safetensors'])", OptionError, FILE),
    ("load('a\\0b')", OptionError, FILE),
    ("load('m.pt')", CheckpointError, "a PyTorch file, a pickle.*nnxp.from_torch.*nnxp.save"),
    ("load('m.pkl')", CheckpointError, "a pickle, which may run anything.*nnxp.save"),
    ("load('old.pkl')", CheckpointError, "a pickle"),
    ("load('x.npy')", CheckpointError, "a .npy file of NumPy's"),
    ("load('x.npz')", CheckpointError, "a .npz file of NumPy's"),
    ("load('k.h5')", CheckpointError, "an HDF5 file"),
    ("load('m.onnx')", CheckpointError, "an ONNX file: nnxp.load_onnx reads it"),
    ("load('t.txt')", CheckpointError, "it is text, not a model"),
    ("read_rows(3)", OptionError, f"{FILE}.*not 3"),
    ("read_rows(x)", OptionError, f"{FILE}.*not array"),
    ("read_rows('x')", OptionError, "files ending in .npy"),
    ("read_rows('x.npz')", OptionError, r"2 arrays \(a, b\): name one"),
    ("read_rows('x.npz', 'c')", OptionError, "no 'c'; it holds a, b"),
    ("read_rows('x.npy', 'c')", OptionError, "only a .npz file"),
    ("written_rows(3, (3, 2), x.dtype).__enter__()", OptionError, f"{FILE}.*not 3"),
    ("written_rows('y.foo', (3, 2), x.dtype).__enter__()", OptionError, "files ending in"),
    ("Columns()", ShapeError, r"takes inputs \(rows, columns\)"),
    ("Columns(3)", ShapeError, r"takes inputs \(rows, columns\)"),
    ("Columns(x, x[:3])", ShapeError, r"share axis 0; got \[\(5, 6\), \(3, 6\)\]"),
    ("Columns(np.zeros((5, 2, 3)))", ShapeError, r"\(5, 2, 3\)"),
    ("Columns(x, np.zeros(5, 'U3'))", DtypeMismatch, f"{REAL}, but x is <U3"),
    ("Columns(x)[3]", OptionError, r"slices of rows, not \[3\]"),
    # the parity kit, and what judges a machine
    ("assert_parity(x, net)", OptionError, "judged, not array.*comes first"),
    ("assert_parity('net.safetensors', x)", OptionError, "judged, not 'net.safetensors'"),
    ("assert_parity(engine, x)", OptionError, "judged, not Engine.*; its .model is one"),
    ("parity_report(Fitted(net, []), x)", OptionError, "judged, not Fitted.*; its .model is one"),
    ("assert_parity(None, x)", OptionError, "judged, not None"),
    ("assert_parity(Dense, x)", OptionError, "judged, not <class"),
    ("assert_parity(net)", OptionError, "takes x, but got no input"),
    ("assert_parity(net, None)", OptionError, "takes x, but x is None"),
    ("assert_parity(net, 'x.npy')", DtypeMismatch, "not the name of a file"),
    ("assert_parity(net, x[:, :4])", ShapeError, rf"{ROWS} \(5, 4\)"),
    ("assert_parity(net, x + 1j)", DtypeMismatch, f"{REAL}.*complex64"),
    ("assert_parity(np.abs, x + 1j)", DtypeMismatch, f"{REAL}.*complex64"),
    ("assert_parity(np.abs, np.array(['a']))", DtypeMismatch, f"{REAL}.*<U1"),
    ("assert_parity(net, x, backends=[])", OptionError, "name at least one"),
    ("assert_parity(net, x, backends='nope')", BackendUnavailable, NAMES),
    ("assert_parity(net, x, backends=3)", OptionError, r"\['numpy', 'sim'\], not 3"),
    ("assert_parity(net, x, backends=x)", OptionError, r"\['numpy', 'sim'\], not array"),
    ("assert_parity(lambda x: ['x'], x)", OptionError, "returns str, not an array"),
    ("parity_report(x, net)", OptionError, "judged, not array"),
    ("error_bound(x, net)", OptionError, "judged, not array"),
    ("error_bound(net, 3)", ShapeError, "but got 3"),
    ("product_bound(x, x)", ShapeError, r"do not fit: \(5, 6\) and \(5, 6\)"),
    ("product_bound(x, 3)", ShapeError, r"do not fit: \(5, 6\) and \(\)"),
    ("product_bound(x, x.T, dtype='int32')", DtypeMismatch, f"{FLOAT} 'int32'"),
    ("product_bound('a', 'b')", DtypeMismatch, "not the name of a file"),
    ("assert_close(x, x, bound=-1)", OptionError, "zero or more, not -1"),
    ("assert_close(x, x, bound=float('nan'))", OptionError, "zero or more, not nan"),
    ("assert_close(x, x, bound=np.ones(3))", ShapeError, r"\(3,\) does not fit \(5, 6\)"),
    ("assert_close(x, None, bound=1)", DtypeMismatch, "None"),
    ("assert_close(x, [[1], [2, 3]], bound=1)", ShapeError, "no array"),
    ("goldens.record(3)", OptionError, f"{FILE}.*not 3"),
    ("goldens.record('g', 'nope')", BackendUnavailable, NAMES),
    ("goldens.record('g', 'cpu', 3)", OptionError, r"pairs \(model, rows\).*3"),
    ("goldens.record('g', 'cpu', [(x, net)])", OptionError, r"pairs \(model, rows\)"),
    ("goldens.record('g', 'cpu', [(net, 'x.npy')])", DtypeMismatch, "not the name of a file"),
    ("goldens.check(3)", OptionError, f"{FILE}.*not 3"),
    ("goldens.check('t.txt')", CheckpointError, "it is text, not a model"),
    ("goldens.check('g.golden', 3)", OptionError, r"\['numpy', 'sim'\], not 3"),
    ("verify(net)", OptionError, "give both"),
    ("verify(x, net)", OptionError, f"{MODEL}, not array"),
    ("verify('net.safetensors', 'x.npy')", OptionError, f"{MODEL}, not 'net.safetensors'"),
    ("verify(net, 'x.npy')", DtypeMismatch, "not the name of a file"),
    ("verify(net, 3)", ShapeError, r"x\[None\]"),
    ("verify(net, x[:0])", OptionError, "there are no rows"),
    ("verify(net, x, 'nope')", BackendUnavailable, NAMES),
    ("verify(net, x, 3)", OptionError, r"\['numpy', 'sim'\], not 3"),
    ("against_floor(x, (6,))", OptionError, f"{MODEL}, not array"),
    ("against_floor(net, 6)", ShapeError, f"{SHAPE}.*not 6"),
    ("against_floor(net, (6.0,))", ShapeError, f"{SHAPE}.*6.0"),
    ("against_floor(net, (6,), rows=0)", OptionError, f"{NUMBER}, not 0"),
    ("against_floor(net, (6,), rounds=1.5)", OptionError, f"{NUMBER}, not 1.5"),
    ("against_floor(Flatten(), (6,))", OptionError, "no Dense layer"),
    ("demo(0)", OptionError, f"{NUMBER}, not 0"),
    ("demo('a')", OptionError, f"{NUMBER}, not 'a'"),
    ("demo(1.5)", OptionError, f"{NUMBER}, not 1.5"),
]

SKLEARN = [
    ("from_sklearn(None)", ConversionError, "None is empty.*MLPClassifier"),
    ("from_sklearn(3)", ConversionError, "int has no counterpart"),
    ("from_sklearn('mlp')", ConversionError, "str has no counterpart"),
    ("from_sklearn(net)", ConversionError, "Sequential has no counterpart"),
    ("from_sklearn(MLPClassifier())", ConversionError, "not fitted"),
    ("from_sklearn(LinearRegression())", ConversionError, "LinearRegression is not fitted"),
]


class Foreign:
    """An array of another library."""

    shape, dtype = (8,), np.dtype("float32")


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the calls name: a model 6 -> 3, rows for it, and files of many kinds around us."""
    x = np.linspace(-1, 1, 30, dtype="float32").reshape(5, 6)
    net = nnxp.Sequential(nnxp.Dense(6, 8, "relu", rng=0), nnxp.Dense(8, 3, "softmax", rng=1))
    closed = nnxp.Engine(net, "cpu")
    closed.close()
    parameters = net.parameters()
    room = tmp_path_factory.mktemp("room")
    nnxp.save(net, room / "net.safetensors")
    goldens.record(room / "g.golden", "cpu", [(net, x)])
    np.save(room / "x.npy", x)
    np.savez(room / "x.npz", a=x, b=x)
    head = b"PK\x03\x04" + bytes(22) + b"\x0f\0\0\0"
    (room / "m.pt").write_bytes(head + b"archive/data.pkl" + bytes(100))
    (room / "m.pkl").write_bytes(pickle.dumps({"a": 1}))
    (room / "old.pkl").write_bytes(pickle.dumps({"a": 1}, protocol=0))
    (room / "k.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    (room / "m.onnx").write_bytes(b"\x08\x08\x12\x07pytorch" + bytes(100))
    (room / "t.txt").write_text("weights are numbers\n" * 10)

    class Scale(nnxp.Layer):
        factor: np.ndarray

        def __call__(self, x):
            return x * self.factor

    own = {
        "np": np, "nnxp": nnxp, "io": io, "pathlib": pathlib, "kernels": kernels, "x": x,
        "net": net, "Scale": Scale, "Foreign": Foreign, "engine": nnxp.Engine(net, "cpu"),
        "closed": closed, "parameters": parameters, "there": nnxp.to_backend(x, "sim"),
        "changed": lambda value: {**parameters, "layers.0.bias": value},
        "goldens": goldens, "verify": verify, "demo": demo, "against_floor": against_floor,
        "read_rows": read_rows, "written_rows": written_rows, "room": room,
    }  # fmt: skip
    public = {name: getattr(nnxp, name) for name in {*dir(nnxp)} - {*nnxp._PACKAGES}}
    yield public | vars(testing) | own
    nnxp.Layer.known.pop("Scale", None)


def ends(call, error, words, names, monkeypatch):
    monkeypatch.chdir(names["room"])
    with pytest.raises(error, match=f"(?s){words}") as raised:
        eval(call, dict(names))
    assert isinstance(raised.value, nnxp.NnxpError)
    assert isinstance(raised.value, ValueError | TypeError | RuntimeError | MemoryError)


@pytest.mark.parametrize(("call", "error", "words"), WRONG, ids=[each[0][:70] for each in WRONG])
def test_a_wrong_call_says_what_was_wanted_and_what_came(call, error, words, names, monkeypatch):
    ends(call, error, words, names, monkeypatch)


@pytest.mark.parametrize(("call", "error", "words"), SKLEARN, ids=[each[0] for each in SKLEARN])
def test_what_is_no_network_of_scikit_learn_s_is_named(call, error, words, names, monkeypatch):
    network = pytest.importorskip("sklearn.neural_network")  # optional
    linear = pytest.importorskip("sklearn.linear_model")
    more = {
        "MLPClassifier": network.MLPClassifier,
        "LinearRegression": linear.LinearRegression,
    }
    ends(call, error, words, names | more, monkeypatch)


def test_the_default_backend_is_as_it_was_after_wrong_choices():
    for wrong in ("nope", None, np.zeros(3)):
        with pytest.raises(BackendUnavailable):
            nnxp.set_backend(wrong)
    assert nnxp.get_backend("numpy").device == "cpu"
    assert nnxp.backend._set == "auto"


def test_files_of_torch_s_are_named(tmp_path):
    torch = pytest.importorskip("torch")  # optional
    torch.save({"weight": torch.zeros(3)}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="a PyTorch file"):
        nnxp.load(tmp_path / "m.pt")
    assert nnxp.asnumpy(torch.ones(2, requires_grad=True)).tolist() == [1, 1]
    assert nnxp.to_backend(torch.ones(2, dtype=torch.bfloat16), "sim").dtype == "float32"


def test_a_checkpoint_whose_first_bytes_look_like_a_pickle_s_is_no_pickle(tmp_path):
    """The length of a header may begin with the bytes 80 02, as pickles do."""
    (tmp_path / "net").write_bytes((0x0280).to_bytes(8, "little") + b"{" + bytes(0x27F))
    with pytest.raises(CheckpointError, match="no whole safetensors file"):
        nnxp.load(tmp_path / "net")


X, IMAGES = np.ones((2, 5, 9), "float32"), np.ones((2, 8, 8, 3), "float32")
WORDS = {
    "dy that conv does not make": (
        lambda: kernels.conv_weight_gradient(IMAGES, np.ones((2, 4, 9, 4), "f4"), window=(3, 3)),
        nnxp.ShapeError, r"\(2, 6, 6, outputs\), but got \(2, 4, 9, 4\)",
    ),
    "dy of other rows": (
        lambda: kernels.conv_weight_gradient(
            IMAGES, np.ones((1, 6, 6, 3), "f4"), window=(3, 3), groups=3
        ),
        nnxp.ShapeError, "dy like what conv makes",
    ),
    "a window that is a number": (
        lambda: kernels.conv_weight_gradient(IMAGES, IMAGES, window=3),
        nnxp.OptionError, "window of conv_weight_gradient has a size for each axis",
    ),
    "no groups": (
        lambda: kernels.conv_weight_gradient(IMAGES, IMAGES, window=(1, 1), groups=0),
        nnxp.OptionError, "groups of conv_weight_gradient",
    ),
    "dy that a pool does not make": (
        lambda: kernels.max_pool_gradient(np.ones((1, 1, 1, 3), "f4"), IMAGES, window=(2, 2)),
        nnxp.ShapeError, r"\(2, 4, 4, 3\), but got \(1, 1, 1, 3\)",
    ),
    "an activation by name": (
        lambda: kernels.linear(X, np.ones((9, 4), "f4"), activation="relu"),
        nnxp.OptionError, "such as nnxp.kernels.relu, not 'relu'",
    ),
    "an activation of NumPy": (
        lambda: kernels.conv(X, np.ones((1, 9, 4), "f4"), activation=np.tanh),
        nnxp.OptionError, "activation of conv is a kernel",
    ),
    "another width of a recurrence": (
        lambda: nnxp.LSTM(8, 16, rng=0)(X), nnxp.ShapeError, "takes 8 numbers at a time, but got 9",
    ),
    "a file of ONNX": (
        lambda: nnxp.save(nnxp.Dense(2, 3, rng=0), "net.ONNX"), nnxp.OptionError, "save_onnx",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WORDS)
def test_a_wrong_call_is_refused_in_words(name):
    call, error, words = WORDS[name]
    with pytest.raises(error, match=words):
        call()


def test_rows_are_named_where_products_do_not_fit():
    class Product(nnxp.Layer):
        def __call__(self, x):
            return x.reshape(-1, 9) @ np.ones((8, 2), x.dtype)

    with pytest.raises(nnxp.ShapeError, match=r"\(5\*rows, 9\), \(8, 2\)"):
        Product()(X)
