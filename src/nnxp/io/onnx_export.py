"""Models of ours in ONNX files: a program, written in ONNX's words."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from inspect import signature
from math import e, log2, log10, prod
from typing import Any

import numpy as np

from nnxp._arrays import Array, Shape, is_array
from nnxp._errors import ConversionError, OptionError, ShapeError
from nnxp._library import KINDS, compute
from nnxp.backend import asnumpy
from nnxp.io._atomic import path_of, written_beside
from nnxp.kernels import Kernel
from nnxp.kernels._windows import per_axis, windows
from nnxp.kernels.conv import transposed_ways
from nnxp.kernels.functions import einsum_terms
from nnxp.kernels.linear import linear
from nnxp.layers._layer import Layer, check_model
from nnxp.layers.operators import ELEMENTWISE
from nnxp.program import traced
from nnxp.program.program import Program
from nnxp.program.traced import (
    ROWS,
    Step,
    Tape,
    Value,
    axes_of,
    counts_rows,
    full_index,
    lifted,
    value_of,
    writing,
)

OPSET, IR = 20, 9
"""What is written: the first version that knows Gelu."""
LARGEST = (1 << 31) - (1 << 20)
"""Bytes of parameters in one file; larger ones are written beside it, as onnx does."""


def save_onnx(model: Layer, path: str | os.PathLike[str], row: Any = None) -> None:
    """Write a model to an ONNX file, of opset 20, that takes any number of rows.

    Kernels that ONNX has no name for are written out as what they do. Inputs are named as the
    formula names them, outputs "y", or "y0", "y1", ....

        nnxp.save_onnx(net, "net.onnx", row=(784,))

    Args:
        model: any layer whose formula can be written out.
        path: of the file.
        row: the shape of one row, such as (784,); a list of shapes for several inputs, a pair
            (shape, dtype) for one that is not of the type the model says, as a mask of booleans,
            and None for one that is left out; None where the parameters tell.

    Raises:
        ConversionError: a layer looks at numbers, or does what ONNX has not, by the layer's path.
        ShapeError: rows do not fit.
        OSError: the file cannot be written.
    """
    try:
        import onnx
    except ImportError as error:
        raise ConversionError(
            f'save_onnx needs the package onnx ({error}); pip install "nnxp[onnx]" brings it'
        ) from error

    check_model(model, "save_onnx")
    if path_of(path).lower().endswith(".safetensors"):
        raise OptionError("save_onnx writes ONNX; nnxp.save(model, path) writes safetensors")
    rows = [model.row_shape()] if row is None else row if isinstance(row, list) else [row]
    outlines = map(_outline, rows, model.input_dtypes(len(rows)))
    program = model.to("numpy").program(*outlines)
    proto = _Writer(onnx, program).model()
    onnx.checker.check_model(proto)
    size = sum(tensor.ByteSize() for tensor in proto.graph.initializer)
    if size > LARGEST:
        onnx.save_model(proto, os.fspath(path), save_as_external_data=True)
        return
    with written_beside(path) as beside, open(beside, "wb") as file:
        file.write(proto.SerializeToString())


def _outline(row: Any, dtype: Any) -> Any:
    """Of an input, whose rows are of this shape, or (shape, dtype), or that is left out."""
    if row is None:
        return None
    if not isinstance(row, tuple | list):
        raise ShapeError(f"row is the shape of one row, such as (784,), not {row!r:.60}")
    if len(row) == 2 and isinstance(row[0], tuple | list):
        row, dtype = row
    return (1, *row), dtype


# What has a name in ONNX

SAME = {function: op for op, function in ELEMENTWISE.items()} | {
    "copy": "Identity", "positive": "Identity", "divide": "Div", "maximum": "Max",
    "minimum": "Min", "power": "Pow", "remainder": "Mod", "matmul": "MatMul", "dot": "MatMul",
    "isinf": "IsInf", "tanh": "Tanh",
}  # fmt: skip
"""Functions of the dialect that are one operator."""
OF_TRUTHS = {"bitwise_and": "And", "bitwise_or": "Or", "bitwise_xor": "Xor", "invert": "Not"}
"""Those that have another name in ONNX where they are of booleans."""

KERNELS: dict[str, tuple[str, dict[str, Any]]] = {
    "relu": ("Relu", {}), "sigmoid": ("Sigmoid", {}), "tanh": ("Tanh", {}),
    "softplus": ("Softplus", {}), "softsign": ("Softsign", {}), "mish": ("Mish", {}),
    "elu": ("Elu", {}), "leaky_relu": ("LeakyRelu", {}), "gelu": ("Gelu", {}),
    "gelu_tanh": ("Gelu", {"approximate": "tanh"}), "softmax": ("Softmax", {"axis": -1}),
    "log_softmax": ("LogSoftmax", {"axis": -1}),
    "hard_sigmoid": ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}),
    "identity": ("Identity", {}), "matmul": ("MatMul", {}),
}  # fmt: skip
"""Kernels that are one operator, with its attributes."""
RECURRENT = {"rnn": ("RNN", (0,)), "gru": ("GRU", (1, 0, 2)), "lstm": ("LSTM", (0, 2, 1, 3))}
"""Kernels that go through time, and where ONNX's gates are among theirs."""
MOST = np.iinfo("int64").max
OPTIONS = {"alpha": "alpha", "negative_slope": "alpha"}


class _Writer:
    """Writes a program as an ONNX model."""

    def __init__(self, onnx: Any, program: Program) -> None:
        self.onnx, self.program = onnx, program
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.names: dict[Value, str] = {}
        self.shared: dict[tuple[str, Shape, bytes], str] = {}
        self.taken: set[str] = set()
        self.path = ""

    def model(self) -> Any:
        program, helper = self.program, self.onnx.helper
        for i, value in enumerate(program.inputs):
            self.names[value] = self._fresh(value.name or f"x{i}")
        for step in program.steps:
            self.write(step)
        several = len(program.outputs) > 1
        outputs = []
        for i, value in enumerate(program.outputs):
            name = self._fresh(f"y{i}" if several else "y")
            self.nodes.append(helper.make_node("Identity", [self.name(value)], [name]))
            outputs.append(self._info(name, value))
        inputs = [self._info(self.names[value], value) for value in program.inputs]
        nodes, constants = self._needed(outputs)
        graph = helper.make_graph(nodes, "nnxp", inputs, outputs, constants)
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR,
            producer_name="nnxp",
        )  # fmt: skip

    def _info(self, name: str, value: Value) -> Any:
        sizes = [
            ("rows" if n == ROWS else f"rows_{n // ROWS}") if counts_rows(n) else n
            for n in value.shape
        ]
        code = self.onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
        return self.onnx.helper.make_tensor_value_info(name, code, sizes)

    def _needed(self, outputs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """The nodes and constants that the outputs come from."""
        needed, nodes = {output.name for output in outputs}, []
        for node in reversed(self.nodes):
            if not needed.isdisjoint(node.output):
                needed.update(node.input)
                nodes.append(node)
        return nodes[::-1], [constant for constant in self.constants if constant.name in needed]

    # names, nodes and constants

    def _fresh(self, name: str) -> str:
        unused, i = name, 0
        while unused in self.taken:
            i += 1
            unused = f"{name}_{i}"
        self.taken.add(unused)
        return unused

    def name(self, x: Any, dtype: Any = None) -> str:
        """The name of a value, as this type; numbers become constants."""
        if not isinstance(x, Value):
            return self.constant(np.asarray(x, dtype))
        if x not in self.names:
            assert x.numbers is not None
            self.names[x] = self.constant(np.asarray(asnumpy(x.numbers)), x.name)
        name = self.names[x]
        if dtype is not None and x.dtype != dtype:
            return self.cast(name, np.dtype(dtype))
        return name

    def names_of(self, *values: Any) -> list[str]:
        """The names of those that are not left out."""
        return [self.name(x) for x in values if x is not None]

    def constant(self, array: Any, name: str = "") -> str:
        array = np.asarray(array, order="C")
        key = (str(array.dtype), array.shape, array.tobytes()) if array.size < 100 else None
        if key is not None and not name and key in self.shared:
            return self.shared[key]
        unused = self._fresh(name or "constant")
        if key is not None and not name:
            self.shared[key] = unused
        self.constants.append(self.onnx.numpy_helper.from_array(array, unused))
        return unused

    def ints(self, *values: Any) -> str:
        return self.constant(np.asarray(values, "int64"))

    def node(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        """The output of a new node, which has one."""
        return self.operator(op, inputs, 1, **attributes)[0]

    def operator(self, op: str, inputs: Sequence[str], count: int, **attributes: Any) -> list[str]:
        """The outputs of a new node, so many."""
        outputs = [self._fresh(op.lower()) for _ in range(count)]
        self.nodes.append(self.onnx.helper.make_node(op, list(inputs), outputs, **attributes))
        return outputs

    def cast(self, name: str, dtype: np.dtype[Any]) -> str:
        return self.node("Cast", [name], to=self.onnx.helper.np_dtype_to_tensor_dtype(dtype))

    def sizes(self, shape: Sequence[int]) -> str:
        """A shape as whole numbers, those that count rows computed from the first input."""
        if not any(map(counts_rows, shape)):
            return self.ints(*shape)
        first = self.program.inputs[0]
        rows = self.node("Shape", [self.names[first]], start=0, end=1)
        parts = [
            (self.node("Mul", [rows, self.ints(n // ROWS)]) if n != ROWS else rows)
            if counts_rows(n)
            else self.ints(n)
            for n in shape
        ]
        return self.node("Concat", parts, axis=0) if len(parts) > 1 else parts[0]

    # steps

    def write(self, step: Step) -> None:
        self.path = step.path or self.path
        if isinstance(step.function, Kernel):
            self._kernel(step, step.function)
            return
        if not isinstance(step.function, str):
            raise _refusal(step, f"it is run as Python ({step.reason})")
        if step.name in FORMULAS:
            self._written_out(step, FORMULAS[step.name])
            return
        special = _SPECIAL.get(step.name)
        if special is not None:
            results = special(self, step)
        elif step.name in SAME:
            truths = step.outputs[0].dtype == np.bool_
            name = OF_TRUTHS.get(step.name) if truths else None
            results = self.node(name or SAME[step.name], self._inputs_of_one_type(step))
        else:
            raise _refusal(step, f"ONNX has no {step.name}")
        names = results if isinstance(results, list) else [results]
        self.names.update(zip(step.outputs, names, strict=True))

    def _inputs_of_one_type(self, step: Step) -> list[str]:
        """The inputs, brought to one type as the library does."""
        dtypes = [v.dtype for v in step.values]
        if step.name == "where":
            condition, *others = step.inputs
            result_dtype = step.outputs[0].dtype
            return [self.name(condition, "bool"), *(self.name(x, result_dtype) for x in others)]
        compares = KINDS[step.name] == "comparison"
        if step.name.startswith("logical"):
            dtype: Any = np.dtype("bool")
        elif compares:
            scalars = [x for x in step.inputs if isinstance(x, int | float)]
            dtype = np.result_type(*dtypes, *scalars)
        else:
            dtype = step.outputs[0].dtype
        return [self.name(x, dtype) for x in step.inputs if x is not None]

    def _kernel(self, step: Step, kernel: Kernel) -> None:
        named, options = KERNELS.get(kernel.__name__), step.options
        x = step.values[0]
        if kernel.__name__ in RECURRENT and self._recurrence(step, kernel):
            return
        if kernel.__name__ == "linear" and len(x.shape) >= 2 and _one_type(step):
            y = self._linear(step)
        elif kernel.__name__ == "conv" and _one_type(step):
            y = self._conv(step)
        elif kernel.__name__ == "conv_transpose" and _one_type(step) and _cut_off(step) is not None:
            y = self._conv_transpose(step)
        elif kernel.__name__ == "layer_norm" and _one_type(step):
            _, gain, bias = (*step.inputs, None, None)[:3]
            gain = np.ones(x.shape[-1:], x.dtype) if gain is None else gain
            names = self.names_of(x, gain, bias)
            y = self.node("LayerNormalization", names, axis=-1, epsilon=options.get("eps", 1e-5))
        elif kernel.__name__ == "batch_norm" and len(x.shape) == 2 and _one_type(step):
            _, mean, var, gain, bias = (*step.inputs, None, None)[:5]
            gain = np.ones(x.shape[1], x.dtype) if gain is None else gain
            bias = np.zeros(x.shape[1], x.dtype) if bias is None else bias
            names = self.names_of(x, gain, bias, mean, var)
            y = self.node("BatchNormalization", names, epsilon=options.get("eps", 1e-5))
        elif named and x.dtype.kind == "f" and options.keys() <= OPTIONS.keys():
            attributes = named[1] | {OPTIONS[key]: float(v) for key, v in options.items()}
            if kernel.__name__ == "leaky_relu":
                attributes = {"alpha": 0.01} | attributes
            y = self.node(named[0], self.names_of(*step.values), **attributes)
        else:
            self._written_out(step, kernel.widened)
            return
        self.names[step.outputs[0]] = y

    def _linear(self, step: Step) -> str:
        x, weight, bias = (*step.inputs, None)[:3]
        if len(x.shape) == 2:
            y = self.node("Gemm", self.names_of(x, weight, bias))
        else:
            y = self.node("MatMul", self.names_of(x, weight))
            y = y if bias is None else self.node("Add", [y, self.name(bias)])
        return self._activated(step, y)

    def _conv(self, step: Step) -> str:
        """ONNX has channels first, and weights (outputs, channels / groups, *window)."""
        x, weight, bias = (*step.inputs, None)[:3]
        window, options = weight.shape[:-2], step.options
        n, plain = len(window), {k: v for k, v in options.items() if k in _WINDOW_OPTIONS}
        over = windows("conv", lifted(x), window, **plain)
        first = self._channels_first(x)
        turned = self.node("Transpose", [self.name(weight)], perm=[n + 1, n, *range(n)])
        names = [first, turned, *self.names_of(bias)]
        y = self.node(
            "Conv",
            names,
            strides=list(over.stride),
            dilations=list(over.dilation),
            pads=[before for before, _ in over.pads] + [after for _, after in over.pads],
            group=options.get("groups", 1),
        )
        return self._activated(step, self._channels_last(y, n))

    def _conv_transpose(self, step: Step) -> str:
        """ONNX has channels first, and weights (channels, outputs / groups, *window)."""
        x, weight, bias = (*step.inputs, None)[:3]
        *window, c, o = weight.shape
        n, options, groups = len(window), step.options, step.options.get("groups", 1)
        pads = _cut_off(step)
        assert pads is not None
        first = self._channels_first(x)
        parts = self.node(
            "Reshape", [self.name(weight), self.ints(*window, c, groups, o // groups)]
        )
        parts = self.node("Transpose", [parts], perm=[n + 1, n, n + 2, *range(n)])
        turned = self.node("Reshape", [parts, self.ints(c * groups, o // groups, *window)])
        names = [first, turned, *self.names_of(bias)]
        more = per_axis("output_padding", options.get("output_padding", 0), n, 0)
        y = self.node(
            "ConvTranspose",
            names,
            strides=list(per_axis("stride", options.get("stride", 1), n)),
            dilations=list(per_axis("dilation", options.get("dilation", 1), n)),
            pads=[before for before, _ in pads] + [max(0, after) for _, after in pads],
            output_padding=[m - min(0, after) for m, (_, after) in zip(more, pads, strict=True)],
            group=groups,
        )
        return self._activated(step, self._channels_last(y, n))

    def _recurrence(self, step: Step, kernel: Kernel) -> bool:
        """All steps in time as one operator, which takes the product of the inputs in; whether that
        is one that ONNX Runtime computes, of float32 and without a projection."""
        op, order = RECURRENT[kernel.__name__]
        arrays = dict(zip(signature(kernel.reference).parameters, step.inputs, strict=False))
        x, weight, options = arrays["x"], arrays["weight"], step.options
        product, n = x.step, weight.shape[0]
        if (
            product is None
            or product.function is not linear
            or product.options
            or arrays.get("projection") is not None
            or x.dtype != np.float32
        ):
            return False
        inputs, weight_x, bias_x = (*product.inputs, None)[:3]
        biases, lengths = [bias_x, arrays.get("bias")], arrays.get("lengths")
        states = [arrays.get("h"), *([arrays.get("c")] if op == "LSTM" else [])]
        shapes = [weight.shape[1:]] * 2 + [(x.shape[0], n)] * len(states)
        if any(
            array is not None and np.shape(array) != shape
            for array, shape in zip(biases + states, shapes, strict=True)
        ):
            return False  # ONNX broadcasts none of them
        attributes: dict[str, Any] = {"hidden_size": n}
        if options.get("reverse"):
            attributes["direction"] = "reverse"
        if op == "GRU":
            attributes["linear_before_reset"] = int(options.get("reset_after", True))
        if op == "RNN" and "activation" in options:
            named = KERNELS.get(options["activation"].__name__)
            if named is None or named[0] not in ("Tanh", "Relu", "Sigmoid"):
                return False
            attributes["activations"] = [named[0]]
        gates = self.ints(*(k * n + i for k in order for i in range(n)))

        def ordered(parameter: Any) -> str:
            name = self.name(parameter)
            return name if len(order) == 1 else self.node("Gather", [name, gates], axis=-1)

        def weights(parameter: Value) -> str:
            turned = self.node("Transpose", [ordered(parameter)], perm=[1, 0])
            return self.node("Unsqueeze", [turned, self.ints(0)])

        zeros = np.zeros(weight.shape[1], x.dtype)
        bias = self.node("Concat", [ordered(zeros if b is None else b) for b in biases], axis=0)
        counts, steps = "", ""
        if lengths is not None:  # ONNX Runtime refuses those below 0 and beyond the time
            bounds = [self.name(bound, "int64") for bound in (0, x.shape[1])]
            counts = self.node("Clip", [self.name(lengths, "int64"), *bounds])
            steps = self.cast(counts, np.dtype("int32"))
        names = [
            self.node("Transpose", [self.name(inputs)], perm=[1, 0, 2]),
            weights(weight_x),
            weights(weight),
            self.node("Unsqueeze", [bias, self.ints(0)]),
            steps,
            *(
                h if h is None else self.node("Unsqueeze", [self.name(h), self.ints(0)])
                for h in states
            ),
        ]
        y, *last = self.operator(op, [name or "" for name in names], 1 + len(states), **attributes)
        y = self.node("Transpose", [self.node("Squeeze", [y, self.ints(1)])], perm=[1, 0, 2])
        last = [self.node("Squeeze", [state, self.ints(0)]) for state in last]
        if counts:  # the state of a row without steps is its first; ONNX Runtime answers zeros
            empty = self.node(
                "Unsqueeze", [self.node("Equal", [counts, self.ints(0)]), self.ints(1)]
            )
            last = [
                end if h is None else self.node("Where", [empty, self.name(h), end])
                for h, end in zip(states, last, strict=True)
            ]
        self.names.update(zip(step.outputs, [y, *last], strict=True))
        return True

    def _channels_first(self, x: Value) -> str:
        n = len(x.shape)
        return self.node("Transpose", [self.name(x)], perm=[0, n - 1, *range(1, n - 1)])

    def _channels_last(self, y: str, axes: int) -> str:
        return self.node("Transpose", [y], perm=[0, *range(2, axes + 2), 1])

    def _activated(self, step: Step, y: str) -> str:
        """The activation of a step's options, of what it has made."""
        x = step.values[0]
        activation = step.options.get("activation")
        if activation is None or activation.__name__ == "identity":
            return y
        sums, out = Value(step.outputs[0].shape, x.dtype), Value(step.outputs[0].shape, x.dtype)
        self.names[sums] = y
        inner = Step(activation, (sums,), {}, step.path, (out,))
        self._kernel(inner, activation)
        return self.names[out]

    def _written_out(self, step: Step, formula: Callable[..., Any]) -> None:
        """A step as what a formula does with its inputs."""
        with writing(Tape(expands=True, path=step.path)) as tape:
            answer = formula(*map(lifted, step.inputs), **step.options)
        for inner in tape.steps:
            self.write(inner)
        results = answer if isinstance(answer, tuple | list) else (answer,)
        for value, result in zip(step.outputs, results, strict=True):
            self.names[value] = self.name(value_of(result))


_WINDOW_OPTIONS = ("stride", "padding", "dilation")


def _cut_off(step: Step) -> list[tuple[int, int]] | None:
    """What a transposed convolution cuts off around each axis; None if it adds something before."""
    x, weight = step.values[:2]
    names = "stride", "padding", "output_padding", "dilation"
    plain = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1}
    options = [step.options.get(name, plain[name]) for name in names]
    pads = [way.pads for way in transposed_ways(x.shape[1:-1], weight.shape[:-2], *options)]
    return None if min(before for before, _ in pads) < 0 else pads


def _one_type(step: Step) -> bool:
    return len({value.dtype for value in step.values}) == 1


def _refusal(step: Step, reason: str) -> ConversionError:
    return ConversionError(f"{step.path or 'the model'} cannot be written: {reason}")


def _axis(step: Step, default: Any, ndim: int) -> int:
    (axis,) = axes_of(step.options.get("axis", default), ndim)
    return axis


# Functions for which ONNX has no name, but a few words


def _variance(
    x: Array, axis: Any = None, dtype: Any = None, ddof: int = 0, keepdims: bool = False
) -> Array:
    x = x if dtype is None else x.astype(dtype)
    off = x - x.mean(axis=axis, keepdims=True)
    axes = axes_of(axis, x.ndim)
    count: Any = prod(x.shape[i] for i in axes)
    if any(counts_rows(x.shape[i]) for i in axes):  # as many as there will be
        count = xp.ones_like(x).sum(axis=axis, keepdims=keepdims)
    return (off * off).sum(axis=axis, keepdims=keepdims) / (count - ddof)


def _norm(x: Array, ord: Any = None, axis: Any = None, keepdims: bool = False) -> Array:
    if ord not in (None, 1, 2) or (ord is not None and len(axes_of(axis, x.ndim)) > 1):
        raise ConversionError(f"the model cannot be written: ONNX has no norm of order {ord}")
    if ord == 1:
        return xp.abs(x).sum(axis=axis, keepdims=keepdims)
    return xp.sqrt((x * x).sum(axis=axis, keepdims=keepdims))


def _flipped(x: Array, axis: Any = None) -> Array:
    turned = axes_of(axis, x.ndim)
    return x[tuple(slice(None, None, -1 if i in turned else None) for i in range(x.ndim))]


def _rolled(x: Array, shift: Any, axis: Any = None) -> Array:
    axes = [] if axis is None else [int(i) % x.ndim for i in np.atleast_1d(axis)]
    if axis is None or any(counts_rows(x.shape[i]) for i in axes):
        raise ConversionError("the model cannot be written: ONNX has no roll of rows")
    for by, i in zip(np.broadcast_to(shift, len(axes)), axes, strict=True):
        cut, before = x.shape[i] - int(by) % x.shape[i], (slice(None),) * i
        parts = x[(*before, slice(cut, None))], x[(*before, slice(cut))]
        x = xp.concatenate(parts, axis=i)
    return x


xp: Any = traced
FORMULAS: dict[str, Callable[..., Any]] = {
    "all": lambda x, **over: x.astype("bool").astype("int32").min(**over).astype("bool"),
    "any": lambda x, **over: x.astype("bool").astype("int32").max(**over).astype("bool"),
    "exp2": lambda x: xp.power(2.0, x),
    "expm1": lambda x: xp.exp(x) - 1,
    "flip": _flipped,
    "isfinite": lambda x: xp.logical_not(xp.logical_or(xp.isinf(x), xp.isnan(x))),
    "log10": lambda x: xp.log(x) * log10(e),
    "log1p": lambda x: xp.log(x + 1),
    "log2": lambda x: xp.log(x) * log2(e),
    "norm": _norm,
    "not_equal": lambda x, y: xp.logical_not(xp.equal(x, y)),
    "round": lambda x, decimals=0: xp.rint(x * 10.0**decimals) / 10.0**decimals,
    "roll": _rolled,
    "square": lambda x: x * x,
    "std": lambda x, **over: xp.sqrt(_variance(x, **over)),
    "trunc": lambda x: xp.sign(x) * xp.floor(xp.abs(x)),
    "var": _variance,
}


# Functions that take more than their name


def _reduction(op: str) -> Callable[[_Writer, Step], str]:
    def write(w: _Writer, step: Step) -> str:
        (x,), options = step.values, step.options
        dtype = step.outputs[0].dtype
        axes = axes_of(options.get("axis"), len(x.shape))
        names = [w.name(x, dtype if dtype.kind == "f" or op == "ReduceSum" else None)]
        return w.node(op, [*names, w.ints(*axes)], keepdims=int(options.get("keepdims", False)))

    return write


def _flat(w: _Writer, step: Step, dtype: Any = None) -> tuple[str, int]:
    """The input of a function along one axis, and the axis: the only one where none is named."""
    (x,) = step.values
    if step.options.get("axis") is None:
        return w.node("Reshape", [w.name(x, dtype), w.ints(-1)]), 0
    return w.name(x, dtype), _axis(step, None, len(x.shape))


def _arg(op: str) -> Callable[[_Writer, Step], str]:
    def write(w: _Writer, step: Step) -> str:
        name, axis = _flat(w, step)
        y = w.node(op, [name], axis=axis, keepdims=0)
        keeps = step.options.get("keepdims", False)
        return w.node("Reshape", [y, w.sizes(step.outputs[0].shape)]) if keeps else y

    return write


def _argsort(w: _Writer, step: Step) -> str:
    """Of equals ONNX takes the first first."""
    (x,) = step.values
    axis = _axis(step, -1, len(x.shape))
    names = [w.name(x), w.sizes(x.shape[axis : axis + 1])]
    return w.operator("TopK", names, 2, axis=axis, largest=0)[1]


def _reshape(w: _Writer, step: Step) -> str:
    """To the shape of the result: reshape, expand_dims and squeeze."""
    shape = step.outputs[0].shape
    counted = [i for i, n in enumerate(shape) if counts_rows(n)]
    if len(counted) == 1 and 0 not in shape:
        sizes = w.ints(*(-1 if i in counted else n for i, n in enumerate(shape)))
        return w.node("Reshape", [w.name(step.values[0]), sizes])
    return w.node("Reshape", [w.name(step.values[0]), w.sizes(shape)], allowzero=1)


def _transpose(w: _Writer, step: Step) -> str:
    (x,) = step.values
    numbered = np.empty(range(len(x.shape)))  # an axis is as long as its number: it takes no memory
    perm = compute(np, step.name, (numbered,), step.options).shape
    return w.node("Transpose", [w.name(x)], perm=list(perm))


def _concatenate(w: _Writer, step: Step) -> str:
    dtype = step.outputs[0].dtype
    names = [w.name(x, dtype) for x in step.values]
    axis = _axis(step, 0, len(step.outputs[0].shape))
    if step.name == "stack":
        names = [w.node("Unsqueeze", [name, w.ints(axis)]) for name in names]
    return w.node("Concat", names, axis=axis)


def _getitem(w: _Writer, step: Step) -> str:
    """Slices, then single places, then new axes; or one array of places."""
    (x,) = step.values
    key = step.options["key"]
    keys = [np.asarray(k) if isinstance(k, list) else k for k in full_index(key, len(x.shape))]
    name, axis, position = w.name(x), 0, 0
    gone: list[int] = []
    new: list[int] = []
    slices: list[tuple[int, int, int, int]] = []
    arrays = sum(map(is_array, keys))
    for k in keys:
        if k is None:
            new.append(position)
            position += 1
            continue
        n = x.shape[axis]
        if isinstance(k, slice):
            if k not in (slice(None), slice(0, n)):
                step_by = k.step or 1
                start = (0 if step_by > 0 else MOST) if k.start is None else k.start
                stop = (MOST if step_by > 0 else -MOST) if k.stop is None else k.stop
                if counts_rows(start) or (counts_rows(stop) and stop != n):
                    raise _refusal(step, f"{key} of rows")
                slices.append((axis, start, MOST if counts_rows(stop) else stop, step_by))
            position += 1
        elif isinstance(k, int | np.integer):
            index = int(k)
            slices.append((axis, index, MOST if index == -1 else index + 1, 1))
            gone.append(axis)
        elif is_array(k) and len(keys) - len(new) == len(x.shape) and arrays == 1:
            places = np.asarray(asnumpy(k))
            places = np.flatnonzero(places) if places.dtype == np.bool_ else places
            name = w.node("Gather", [name, w.constant(places.astype("int64"))], axis=axis)
            position += places.ndim
        else:
            raise _refusal(step, f"x[{key!r:.60}]")
        axis += 1
    if slices:
        axes, starts, stops, steps = zip(*slices, strict=True)
        name = w.node(
            "Slice", [name, *(w.ints(*values) for values in (starts, stops, axes, steps))]
        )
    if gone:
        name = w.node("Squeeze", [name, w.ints(*gone)])
    return w.node("Unsqueeze", [name, w.ints(*new)]) if new else name


def _split(w: _Writer, step: Step) -> Any:
    (x,) = step.values
    axis = _axis(step, 0, len(x.shape))
    sizes = [value.shape[axis] for value in step.outputs]
    return w.operator("Split", [w.name(x), w.sizes(sizes)], len(sizes), axis=axis)


def _pad(w: _Writer, step: Step) -> str:
    (x,), options = step.values, step.options
    widths = np.broadcast_to(np.asarray(options["pad_width"]), (len(x.shape), 2))
    names = [w.name(x), w.ints(*widths[:, 0], *widths[:, 1])]
    mode = options.get("mode", "constant")
    if mode == "constant":
        names.append(w.constant(np.asarray(options.get("constant_values", 0), x.dtype)))
    return w.node("Pad", names, mode=mode)


def _clip(w: _Writer, step: Step) -> str:
    x, low, high = (*step.inputs, None)[:3]
    dtype = step.outputs[0].dtype
    name = w.name(x, dtype)
    name = name if low is None else w.node("Max", [name, w.name(low, dtype)])
    return name if high is None else w.node("Min", [name, w.name(high, dtype)])


def _take(w: _Writer, step: Step) -> str:
    x, ids = step.inputs
    axis, name = step.options.get("axis"), w.name(x)
    if axis is None:
        axis, name = 0, w.node("Reshape", [name, w.ints(-1)])
    return w.node("Gather", [name, w.name(ids, "int64")], axis=int(axis))


def _einsum(w: _Writer, step: Step) -> str:
    dtype, parts = step.outputs[0].dtype, step.values
    terms, result = einsum_terms(step.options["subscripts"], [len(v.shape) for v in parts])
    equation = f"{','.join(terms)}->{result}"
    return w.node("Einsum", [w.name(v, dtype) for v in parts], equation=equation)


def _creation(w: _Writer, step: Step) -> str:
    out = step.outputs[0]
    fill = {"ones": 1, "zeros": 0, "empty": 0}.get(step.name.removesuffix("_like"))
    fill = step.options["fill_value"] if fill is None else fill
    value = w.onnx.numpy_helper.from_array(np.asarray([fill], out.dtype).reshape(1), "value")
    return w.node("ConstantOfShape", [w.sizes(out.shape)], value=value)


def _cumsum(w: _Writer, step: Step) -> str:
    name, axis = _flat(w, step, step.outputs[0].dtype)
    return w.node("CumSum", [name, w.ints(axis)])


def _repeat(w: _Writer, step: Step) -> str:
    (x,) = step.values
    axis = step.options.get("axis")
    if axis is None or counts_rows(x.shape[axis]):
        raise _refusal(step, "repeat of rows")
    ids = np.repeat(np.arange(x.shape[axis]), step.options["repeats"])
    return w.node("Gather", [w.name(x), w.ints(*ids)], axis=int(axis))


def _tile(w: _Writer, step: Step) -> str:
    (x,) = step.values
    reps = list(np.atleast_1d(step.options["reps"]))
    name, lead = w.name(x), len(step.outputs[0].shape) - len(x.shape)
    if lead:
        name = w.node("Unsqueeze", [name, w.ints(*range(lead))])
    reps = [1] * (len(step.outputs[0].shape) - len(reps)) + reps
    return w.node("Tile", [name, w.ints(*reps)])


def _triangle(upper: int) -> Callable[[_Writer, Step], str]:
    def write(w: _Writer, step: Step) -> str:
        names = [w.name(step.values[0]), w.ints(step.options.get("k", 0))]
        return w.node("Trilu", names, upper=upper)

    return write


_SPECIAL: dict[str, Callable[[_Writer, Step], Any]] = {
    "sum": _reduction("ReduceSum"), "mean": _reduction("ReduceMean"),
    "max": _reduction("ReduceMax"),
    "min": _reduction("ReduceMin"), "prod": _reduction("ReduceProd"),
    "argmax": _arg("ArgMax"), "argmin": _arg("ArgMin"), "argsort": _argsort, "reshape": _reshape,
    "expand_dims": _reshape, "squeeze": _reshape, "transpose": _transpose, "swapaxes": _transpose,
    "moveaxis": _transpose, "concatenate": _concatenate, "stack": _concatenate,
    "getitem": _getitem, "split": _split, "pad": _pad, "clip": _clip, "take": _take,
    "einsum": _einsum, "cumsum": _cumsum,
    "repeat": _repeat, "tile": _tile,
    "astype": lambda w, step: w.cast(w.name(step.values[0]), step.outputs[0].dtype),
    "broadcast_to": lambda w, step: w.node(
        "Expand", [w.name(step.values[0]), w.sizes(step.outputs[0].shape)]
    ),
    "take_along_axis": lambda w, step: w.node(
        "GatherElements", [w.name(step.inputs[0]), w.name(step.inputs[1], "int64")],
        axis=_axis(step, -1, len(step.values[0].shape)),
    ),
    "tril": _triangle(upper=0), "triu": _triangle(upper=1),
    **dict.fromkeys(
        ["zeros", "ones", "full", "empty", "zeros_like", "ones_like", "full_like", "empty_like"],
        _creation,
    ),
}  # fmt: skip
