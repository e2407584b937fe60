"""What each ONNX operator does, as a formula in the dialect.   https://onnx.ai/onnx/operators

Inputs are positional, None where one is left out; attributes are keywords under their own names,
with the defaults of the standard. `count` is how many outputs are wanted, `op` which of several
operators a formula stands for. Formulas are those of opset 21 and above: older models are brought
to it first. They write into nothing that they are given.

Inputs that decide a shape or an axis are `numbers`: they are in host memory before anything runs.
Operators take 16-bit floats in float32 and round what they make, but for those that take them
`as_is`: they move numbers, or are one function or kernel, which does so itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from nnxp import _arrays, kernels
from nnxp._arrays import Array, HostArray, is_floating
from nnxp._arrays import dtype_of as dtype_of
from nnxp._errors import OptionError, ShapeError
from nnxp.backend import asnumpy
from nnxp.kernels._erf import erf
from nnxp.kernels.softmax import log_sum_exp
from nnxp.layers.shape import channels_last
from nnxp.program import traced
from nnxp.program.index import indexed, last_axis, on_one_axis, own_places

home: ContextVar[Any] = ContextVar("nnxp_home_of_constants", default=np)
"""The library that constants are brought to, when they meet arrays without numbers."""

row_by_row: ContextVar[int] = ContextVar("nnxp_row_by_row", default=0)
"""How many rows go through a graph that was made for a single one: what it says of axis 0, it says
of each of them. 0 for graphs that say it of all."""

MOST_NUMBERS = 1 << 26
"""What one operator may make of a row, or at all, out of a few numbers that name a shape."""


class Items(tuple[Any, ...]):
    """A sequence: one value of a graph that is several arrays."""

    __slots__ = ()


@dataclass(frozen=True)
class Operator:
    """A formula, and how it is called: `operator(inputs, attributes, op=..., count=...)`."""

    function: Callable[..., Any]
    numbers: frozenset[int]
    loose: frozenset[int]
    as_is: bool
    options: frozenset[str]
    least_inputs: int
    most_inputs: int | None

    def check(self, label: str, inputs: Sequence[str], attributes: Mapping[str, Any]) -> None:
        """Refuse inputs and attributes that the formula does not have."""
        least, most = self.least_inputs, self.most_inputs
        if "" in inputs[:least] or len(inputs) < least or (most is not None and len(inputs) > most):
            wanted = f"at least {least}" if most is None else f"{least} to {most}"
            raise OptionError(f"{label} has {len(inputs)} inputs; it takes {wanted}")
        unknown = attributes.keys() - self.options | attributes.keys() & {"op", "count"}
        if unknown:
            raise OptionError(f"{label} has an attribute {min(unknown)!r}, which is not known")

    def __call__(
        self, inputs: Sequence[Any], attributes: Mapping[str, Any], op: str, count: int
    ) -> tuple[Any, ...]:
        arrays: list[Any] = list(inputs)
        for i in self.numbers:
            if i < len(arrays) and arrays[i] is not None:
                arrays[i] = numbers(arrays[i])
        if not all(type(x) is np.ndarray or x is None for x in arrays):
            self._bring_together(arrays)
        options = dict(attributes)
        options |= {k: v for k, v in (("op", op), ("count", count)) if k in self.options}
        call = self.function if self.as_is else in_float32(self.function)
        answer = call(*arrays, **options)
        several = isinstance(answer, tuple | list) and not isinstance(answer, Items)
        results = tuple(answer) if several else (answer,)
        return tuple(np.asarray(y) if isinstance(y, np.generic) else y for y in results)

    def _bring_together(self, arrays: list[Any]) -> None:
        """Bring the arrays that may not stay on the host to where the first of them is."""
        free = [
            i
            for i, x in enumerate(arrays)
            if x is not None and i not in self.numbers and not isinstance(x, Items)
        ]
        like = next((arrays[i] for i in free if not isinstance(arrays[i], np.ndarray)), None)
        for i in free:
            if like is not None and i not in self.loose:
                arrays[i] = beside(arrays[i], like)


OPERATORS: dict[str, Operator] = {}
"""Every operator by name; those of another domain as `domain.name`."""


def operator(
    names: str, *, numbers: str = "", loose: str = "", attributes: str = "", as_is: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: this function is the formula of these operators.

    `numbers` are the inputs that are known on the host, `loose` those that may stay there.
    `attributes` are those that it takes as `**options`, besides its own keywords.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        parameters = list(inspect.signature(function).parameters.values())
        places = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        entry = Operator(
            function,
            frozenset(places.index(name) for name in numbers.split()),
            frozenset(places.index(name) for name in loose.split()),
            as_is,
            frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
            | frozenset(attributes.split()),
            sum(p.default is p.empty for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
            + variadic,
            None if variadic else len(places),
        )
        for name in names.split():
            OPERATORS[name] = entry
        return function

    return register


# Arrays: on the host, beside others, widened


def xp_of(x: Any) -> Any:
    """The library of an array; NumPy for the numbers that its functions answer without axes."""
    return np if isinstance(x, np.generic) else _arrays.xp_of(x)


def numbers(x: Any) -> HostArray:
    """An array in host memory. Untraceable for one that has no numbers yet."""
    if isinstance(x, np.ndarray):
        return x
    if isinstance(x, traced.ndarray):
        held = x.value.numbers
        if held is None:
            raise traced.Untraceable("a shape or an axis depends on numbers that are not known yet")
        return held if isinstance(held, np.ndarray) else asnumpy(held)
    if xp_of(x).__name__.endswith("bounded"):
        return np.asarray(x.tolist(), x.dtype).reshape(x.shape)
    return asnumpy(x)


def ints(x: HostArray | None) -> list[int]:
    """Whole numbers that decide a shape; none if they are left out."""
    return [] if x is None else [int(n) for n in x.ravel()]


def beside(x: Any, like: Array) -> Any:
    """x in the library of `like`, if it is a host array; a sequence's arrays each."""
    if isinstance(x, Items):
        return Items(beside(item, like) for item in x)
    if not isinstance(x, np.ndarray):
        return x
    if not isinstance(like, traced.ndarray):
        return xp_of(like).asarray(x)
    at = home.get()
    return traced.lifted(x if at is np else at.asarray(x))


def in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, of 16-bit floats in float32, its results rounded."""

    def is_narrow(x: Any) -> bool:
        return x is not None and is_floating(x.dtype) and x.dtype.itemsize == 2

    def call(*arrays: Any, **options: Any) -> Any:
        narrow = next((x.dtype for x in arrays if is_narrow(x)), None)
        if narrow is None:
            return function(*arrays, **options)

        def rounded(y: Any) -> Any:
            return y.astype(narrow) if y is not None and y.dtype == np.float32 else y

        results = function(*(x.astype("float32") if is_narrow(x) else x for x in arrays), **options)
        if isinstance(results, tuple | list):
            return tuple(map(rounded, results))
        return rounded(results)

    return call


def library_of_shape(shape: Sequence[int]) -> Any:
    """NumPy for what is made out of a shape, unless it counts rows that are not there yet."""
    counted = [traced.counts_rows(n) for n in shape]
    row = [n // traced.ROWS if of_rows else n for n, of_rows in zip(shape, counted, strict=True)]
    if prod(map(int, row)) > MOST_NUMBERS:
        wanted = tuple("rows" if of_rows else n for n, of_rows in zip(shape, counted, strict=True))
        raise ShapeError(f"{wanted} out of a few numbers is more than {MOST_NUMBERS:,} to a row")
    return traced if any(counted) else np


def _axes(axes: HostArray | Sequence[int] | None, ndim: int) -> list[int]:
    """Axes counted from the front; all of them if they are left out."""
    if axes is None:
        return list(range(ndim))
    numbered = [int(axis) for axis in np.ravel(np.asarray(axes))]
    for axis in numbered:
        if not -ndim <= axis < max(ndim, 1):
            raise ShapeError(f"there is no axis {axis} of an array with {ndim} axes")
    return [axis % ndim if ndim else 0 for axis in numbered]


def axis_of(axis: int, ndim: int) -> int:
    """An axis counted from the front."""
    return _axes([axis], ndim)[0]


def with_axis_last(function: Callable[[Array], Array], x: Array, axis: int) -> Array:
    """function of x, which works along the last axis, along another one."""
    axis = axis_of(axis, x.ndim)
    if axis == x.ndim - 1:
        return function(x)
    return function(x.swapaxes(axis, -1)).swapaxes(axis, -1)


# Elementwise


def _function(name: str) -> Callable[..., Any]:
    def formula(*arrays: Array) -> Array:
        return getattr(xp_of(arrays[0]), name)(*arrays)

    return formula


ELEMENTWISE = {
    "Abs": "absolute", "Acos": "arccos", "Acosh": "arccosh", "Add": "add", "And": "logical_and",
    "Asin": "arcsin", "Asinh": "arcsinh", "Atan": "arctan", "Atanh": "arctanh",
    "BitwiseAnd": "bitwise_and", "BitwiseNot": "invert", "BitwiseOr": "bitwise_or",
    "BitwiseXor": "bitwise_xor", "Ceil": "ceil", "Cos": "cos", "Cosh": "cosh", "Equal": "equal",
    "Exp": "exp", "Floor": "floor", "Greater": "greater", "GreaterOrEqual": "greater_equal",
    "IsNaN": "isnan", "Less": "less", "LessOrEqual": "less_equal", "Log": "log", "Mul": "multiply",
    "Neg": "negative", "Not": "logical_not", "Or": "logical_or", "Reciprocal": "reciprocal",
    "Round": "rint", "Sign": "sign", "Sin": "sin", "Sinh": "sinh", "Sqrt": "sqrt",
    "Sub": "subtract", "Tan": "tan", "Where": "where", "Xor": "logical_xor",
}  # fmt: skip
"""Operators that are one function of the dialect."""

for _name, _spelt in ELEMENTWISE.items():
    operator(_name, as_is=True)(_function(_spelt))


def _activation(kernel: Any) -> Callable[..., Any]:
    def formula(x: Array) -> Array:
        if x.dtype.kind != "f":  # relu of whole numbers
            return xp_of(x).maximum(x, 0)
        return kernel(x)

    return formula


for _name in "Mish Relu Sigmoid Softplus Softsign Tanh".split():
    operator(_name, as_is=True)(_activation(getattr(kernels, _name.lower())))


@operator("Erf")
def _erf(x: Array) -> Array:
    return erf(x) if x.dtype.kind == "f" else erf(x.astype("float64")).astype(x.dtype)


@operator("Identity", as_is=True)
def identity(x: Array) -> Array:
    return x


@operator("Div", as_is=True)
def div(a: Array, b: Array) -> Array:
    if a.dtype.kind not in "iu":
        return a / b
    if a.dtype.kind == "u":
        return a // b
    xp = xp_of(a)  # towards zero
    quotient = xp.absolute(a) // xp.absolute(b)
    return xp.where((a < 0) != (b < 0), -quotient, quotient)


@operator("Mod", as_is=True)
def mod(a: Array, b: Array, *, fmod: int = 0) -> Array:
    return xp_of(a).fmod(a, b) if fmod else xp_of(a).remainder(a, b)


@operator("Pow")
def power(x: Array, n: Array) -> Array:
    if x.dtype.kind in "iu" and n.dtype.kind == "f":
        return xp_of(x).power(x.astype("float64"), n.astype("float64")).astype(x.dtype)
    return xp_of(x).power(x, n.astype(x.dtype, copy=False))


@operator("Max Min Sum Mean")
def fold(*arrays: Array, op: str) -> Array:
    xp, y = xp_of(arrays[0]), arrays[0]
    combine = {"Max": xp.maximum, "Min": xp.minimum}.get(op, xp.add)
    for x in arrays[1:]:
        y = combine(y, x)
    return y / len(arrays) if op == "Mean" else y


@operator("Clip", as_is=True)
def clip(x: Array, low: Array | None = None, high: Array | None = None) -> Array:
    xp = xp_of(x)
    if low is not None:
        x = xp.maximum(x, low)
    return x if high is None else xp.minimum(x, high)


@operator("LeakyRelu", as_is=True)
def leaky_relu(x: Array, *, alpha: float = 0.01) -> Array:
    return kernels.leaky_relu(x, negative_slope=alpha)


@operator("Elu", as_is=True)
def elu(x: Array, *, alpha: float = 1.0) -> Array:
    return kernels.elu(x, alpha=alpha)


@operator("Celu")
def celu(x: Array, *, alpha: float = 1.0) -> Array:
    xp = xp_of(x)
    return xp.maximum(x, 0) + alpha * xp.expm1(xp.minimum(x, 0) / alpha)


@operator("Selu")
def selu(
    x: Array, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875
) -> Array:
    return kernels.elu(x, alpha=alpha) * gamma


@operator("PRelu", as_is=True)
def prelu(x: Array, slope: Array) -> Array:
    xp = xp_of(x)
    return xp.where(x < 0, slope * x, x)


@operator("ThresholdedRelu")
def thresholded_relu(x: Array, *, alpha: float = 1.0) -> Array:
    return xp_of(x).where(x > alpha, x, xp_of(x).zeros_like(x))


@operator("Shrink")
def shrink(x: Array, *, bias: float = 0.0, lambd: float = 0.5) -> Array:
    xp = xp_of(x)
    inner = xp.where(x > lambd, x - bias, xp.zeros_like(x))
    return xp.where(x < -lambd, x + bias, inner).astype(x.dtype, copy=False)


@operator("HardSigmoid")
def hard_sigmoid(x: Array, *, alpha: float = 0.2, beta: float = 0.5) -> Array:
    xp = xp_of(x)
    return xp.minimum(xp.maximum(alpha * x + beta, 0), 1)


@operator("HardSwish")
def hard_swish(x: Array) -> Array:
    return x * kernels.hard_sigmoid(x)


@operator("Swish")
def swish(x: Array, *, alpha: float = 1.0) -> Array:
    return kernels.silu(x) if alpha == 1 else x * kernels.sigmoid(x * alpha)


@operator("SwiGLU")
def swiglu(gate: Array, x: Array, *, alpha: float = 1.0) -> Array:
    return swish(gate, alpha=alpha) * x


@operator("Gelu", as_is=True)
def gelu(x: Array, *, approximate: str = "none") -> Array:
    kernel = kernels.gelu_tanh if approximate == "tanh" else kernels.gelu
    return kernel(x) if x.ndim else kernel(x.reshape(1)).reshape(())


@operator("IsInf", as_is=True)
def is_inf(x: Array, *, detect_negative: int = 1, detect_positive: int = 1) -> Array:
    y = xp_of(x).isinf(x)
    if not detect_negative:
        y = y & (x > 0)
    return y if detect_positive else y & (x < 0)


@operator("BitShift")
def bit_shift(x: Array, n: Array, *, direction: str) -> Array:
    """Times a power of two; a shift by all bits, or by a negative number, leaves the sign alone."""
    xp, bits = xp_of(x), x.dtype.itemsize * 8
    far = (n < 0) | (n >= bits)
    two, near = xp.full_like(n, 2), xp.where(far, xp.zeros_like(n), n)
    if direction == "LEFT":
        return xp.where(far, xp.zeros_like(x), x * xp.power(two, near))
    out = xp.minimum(xp.sign(x), 0).astype(x.dtype) if x.dtype.kind == "i" else xp.zeros_like(x)
    most = bits - 1 if x.dtype.kind == "u" else bits - 2  # what a power of two fits
    once = xp.minimum(near, most)
    y = x // xp.power(two, once) // xp.power(two, near - once)
    return xp.where(far, out, y)


@operator("Cast", as_is=True)
def cast(x: Array, *, to: str, saturate: int = 1, round_mode: str = "up") -> Array:
    return x.astype(dtype_of(to))


@operator("CastLike", as_is=True)
def cast_like(x: Array, like: Array, *, saturate: int = 1, round_mode: str = "up") -> Array:
    return x.astype(like.dtype)


# Along axes


@operator("Softmax LogSoftmax", as_is=True)
def softmax(x: Array, *, axis: int = -1, op: str) -> Array:
    kernel = kernels.softmax if op == "Softmax" else kernels.log_softmax
    return with_axis_last(kernel, x, axis)


@operator("Hardmax")
def hardmax(x: Array, *, axis: int = -1) -> Array:
    def largest(x: Array) -> Array:
        first = xp_of(x).expand_dims(x.argmax(axis=-1), -1)
        return (first == beside(np.arange(x.shape[-1]), x)).astype(x.dtype)

    return with_axis_last(largest, x, axis)


_REDUCTIONS: dict[str, Callable[..., Array]] = {
    "Sum": lambda xp, x, **o: xp.sum(x, **o),
    "Mean": lambda xp, x, **o: xp.mean(x, **o),
    "Max": lambda xp, x, **o: xp.max(x, **o),
    "Min": lambda xp, x, **o: xp.min(x, **o),
    "Prod": lambda xp, x, **o: x.prod(**o),
    "L1": lambda xp, x, **o: xp.sum(xp.absolute(x), **o),
    "L2": lambda xp, x, **o: xp.sqrt(xp.sum(xp.square(x), **o)),
    "SumSquare": lambda xp, x, **o: xp.sum(xp.square(x), **o),
    "LogSum": lambda xp, x, **o: xp.log(xp.sum(x, **o)),
}


@operator(
    "ReduceSum ReduceMean ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceSumSquare "
    "ReduceLogSum ReduceLogSumExp",
    numbers="axes",
)
def reduce(
    x: Array,
    axes: HostArray | None = None,
    *,
    keepdims: int = 1,
    noop_with_empty_axes: int = 0,
    op: str,
) -> Array:
    kind, xp, keep = op.removeprefix("Reduce"), xp_of(x), bool(keepdims)
    axis: tuple[int, ...] | None = () if noop_with_empty_axes else None
    if axes is not None and axes.size:
        axis = tuple(_axes(axes, x.ndim))
    over = range(x.ndim) if axis is None else axis
    if kind in ("Max", "Min") and 0 in [x.shape[a] for a in over]:
        return _extreme_of_nothing(x, kind, over, keep)
    if kind == "LogSumExp" and x.size:
        return log_sum_exp(x, axis=axis, keepdims=keep).astype(x.dtype, copy=False)
    if kind == "LogSumExp":
        kind, x = "LogSum", xp.exp(x)
    if kind in ("Max", "Min") and x.dtype == np.bool_:
        return (xp.any if kind == "Max" else xp.all)(x, axis=axis, keepdims=keep)
    return _REDUCTIONS[kind](xp, x, axis=axis, keepdims=keep).astype(x.dtype, copy=False)


def _extreme_of_nothing(x: Array, kind: str, over: Sequence[int], keep: bool) -> Array:
    sizes = [1 if i in over else n for i, n in enumerate(x.shape) if keep or i not in over]
    if x.dtype.kind == "f":
        least = np.inf
    else:
        least = True if x.dtype.kind == "b" else np.iinfo(x.dtype).max
    most = -np.inf if x.dtype.kind == "f" else 0 if x.dtype.kind in "bu" else -least - 1
    return xp_of(x).full(tuple(sizes), most if kind == "Max" else least, dtype=x.dtype)


@operator("ArgMax ArgMin")
def arg_extreme(
    x: Array, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0, op: str
) -> Array:
    xp, axis = xp_of(x), axis_of(axis, x.ndim)
    find = xp.argmax if op == "ArgMax" else xp.argmin
    if select_last_index:
        y = x.shape[axis] - 1 - find(xp.flip(x, axis), axis=axis)
    else:
        y = find(x, axis=axis)
    y = y.astype("int64", copy=False)
    return xp.expand_dims(y, axis) if keepdims else y


@operator("TopK", numbers="k", as_is=True)
def top_k(
    x: Array, k: HostArray, *, axis: int = -1, largest: int = 1, sorted: int = 1
) -> tuple[Array, Array]:
    xp, axis = xp_of(x), axis_of(axis, x.ndim)
    key = (xp.invert(x) if x.dtype.kind in "iub" else -x) if largest else x
    order = xp.argsort(key, axis=axis, kind="stable")  # of equals the first comes first
    order = cut(order, axis, 0, int(k.ravel()[0]))
    return xp.take_along_axis(x, order, axis=axis), order.astype("int64", copy=False)


@operator("CumSum CumProd", numbers="axis")
def scan(x: Array, axis: HostArray, *, exclusive: int = 0, reverse: int = 0, op: str) -> Array:
    xp, along = xp_of(x), axis_of(int(axis.ravel()[0]), x.ndim)
    x = xp.flip(x, along) if reverse else x
    y = (xp.cumsum if op == "CumSum" else xp.cumprod)(x, axis=along).astype(x.dtype, copy=False)
    if exclusive:
        first = xp.zeros_like(cut(y, along, 0, 1)) + (op == "CumProd")
        y = xp.concatenate(
            [first.astype(x.dtype), cut(y, along, 0, x.shape[along] - 1)], axis=along
        )
    return xp.flip(y, along) if reverse else y


def cut(x: Array, axis: int, start: int | None, stop: int | None) -> Array:
    """x from start to stop along an axis, counted from the front."""
    return x[(slice(None),) * axis + (slice(start, stop),)]


# Shapes


@operator("Shape", as_is=True)
def shape(x: Array, *, start: int = 0, end: int | None = None) -> Array:
    return np.array(x.shape[start:end], "int64")


@operator("Size", as_is=True)
def size(x: Array) -> Array:
    return np.array(x.size, "int64")


@operator("Reshape", numbers="shape", as_is=True)
def reshape(x: Array, shape: HostArray, *, allowzero: int = 0) -> Array:
    wanted, own = ints(shape), x.shape
    rows = row_by_row.get()
    one_row = bool(rows and wanted and own and own[0] and own[0] % rows == 0)
    one_row = one_row and not any(map(traced.counts_rows, wanted))
    if one_row:
        own = (own[0] // rows, *own[1:])
    if not allowzero:
        wanted = [own[i] if n == 0 else n for i, n in enumerate(wanted)]
    if one_row:
        if -1 in wanted:
            wanted[wanted.index(-1)] = prod(own) // max(1, -prod(wanted))
        wanted[0] *= rows
    if -1 in wanted and 0 in wanted:  # no rows: what is left out is as large as with some
        known = prod(n for n in wanted if n > 0)
        wanted[wanted.index(-1)] = prod(n for n in x.shape if n) // known
    return x.reshape(tuple(wanted))


@operator("Flatten", as_is=True)
def flatten(x: Array, *, axis: int = 1) -> Array:
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(prod(x.shape[:axis]), prod(x.shape[axis:]))


@operator("Transpose", as_is=True)
def transpose(x: Array, *, perm: Sequence[int] | None = None) -> Array:
    return x.transpose(tuple(range(x.ndim))[::-1] if perm is None else tuple(perm))


@operator("Squeeze", numbers="axes", as_is=True)
def squeeze(x: Array, axes: HostArray | None = None) -> Array:
    ones = [i for i, n in enumerate(x.shape) if n == 1]
    gone = ones if axes is None else _axes(axes, x.ndim)
    if any(x.shape[i] != 1 for i in gone):
        raise ShapeError(f"Squeeze of axes {gone} of {x.shape}: they are not all 1")
    return x.reshape(tuple(n for i, n in enumerate(x.shape) if i not in gone))


@operator("Unsqueeze", numbers="axes", as_is=True)
def unsqueeze(x: Array, axes: HostArray) -> Array:
    sizes = list(x.shape)
    for axis in sorted(_axes(axes, x.ndim + axes.size)):
        sizes.insert(axis, 1)
    return x.reshape(tuple(sizes))


@operator("Concat", as_is=True)
def concat(*arrays: Array, axis: int) -> Array:
    rows = row_by_row.get()
    if rows and axis % arrays[0].ndim and any(x.shape[0] == rows for x in arrays):
        arrays = tuple(
            expand(x, np.array([rows, *x.shape[1:]])) if x.shape[0] == 1 else x for x in arrays
        )
    return xp_of(arrays[0]).concatenate(list(arrays), axis=axis)


@operator("Split", numbers="sizes", as_is=True)
def split(
    x: Array,
    sizes: HostArray | None = None,
    *,
    axis: int = 0,
    num_outputs: int | None = None,
    count: int,
) -> tuple[Array, ...]:
    axis, parts = axis_of(axis, x.ndim), ints(sizes)
    if sizes is None:
        parts = [-(-x.shape[axis] // (num_outputs or count))] * (num_outputs or count)
        parts[-1] = x.shape[axis] - sum(parts[:-1])
    if sum(parts) != x.shape[axis]:
        raise ShapeError(f"Split of {x.shape[axis]} into {parts}")
    ends = [int(end) for end in np.cumsum(parts)]
    return tuple(cut(x, axis, end - n, end) for n, end in zip(parts, ends, strict=True))


@operator("Slice", numbers="starts ends axes steps", as_is=True)
def slice_(
    x: Array,
    starts: HostArray,
    ends: HostArray,
    axes: HostArray | None = None,
    steps: HostArray | None = None,
) -> Array:
    begin, end = ints(starts), ints(ends)
    along = list(range(len(begin))) if axes is None else _axes(axes, x.ndim)
    by = ints(steps) or [1] * len(begin)
    key = [slice(None)] * x.ndim
    for axis, a, b, step in zip(along, begin, end, by, strict=True):
        n = x.shape[axis]
        a, b = (a + n if a < 0 else a), (b + n if b < 0 else b)
        if step < 0:
            a, b = min(max(a, 0), n - 1), max(b, -1)
            key[axis] = slice(a, None if b < 0 else b, step)
        else:
            key[axis] = slice(min(max(a, 0), n), min(max(b, 0), n), step)
    return x[tuple(key)]


@operator("Expand", numbers="shape", as_is=True)
def expand(x: Array, shape: HostArray) -> Array:
    sizes = np.broadcast_shapes(x.shape, tuple(ints(shape)))
    made_of_rows = any(map(traced.counts_rows, sizes))
    if made_of_rows and numbers_known(x):  # so many rows of a constant
        rows = traced.zeros(sizes, dtype=x.dtype)
        x = beside(x, rows)
        return traced.logical_or(rows, x) if x.dtype == np.bool_ else rows + x
    return xp_of(x).broadcast_to(x, tuple(map(int, sizes)))


def numbers_known(x: Array) -> bool:
    """Whether an array is a constant of a program, or of the host."""
    return isinstance(x, np.ndarray) or (
        isinstance(x, traced.ndarray) and x.value.numbers is not None
    )


@operator("Tile", numbers="repeats", as_is=True)
def tile(x: Array, repeats: HostArray) -> Array:
    reps = ints(repeats)
    library_of_shape([n * r for n, r in zip(x.shape, reps, strict=True)])
    return xp_of(x).tile(x, tuple(reps))


@operator("Pad", numbers="pads fill axes", as_is=True)
def pad(
    x: Array,
    pads: HostArray,
    fill: HostArray | None = None,
    axes: HostArray | None = None,
    *,
    mode: str = "constant",
) -> Array:
    along = _axes(axes, x.ndim)
    amounts, widths = ints(pads), [(0, 0)] * x.ndim
    for i, axis in enumerate(along):
        widths[axis] = amounts[i], amounts[i + len(along)]
    library_of_shape([n + a + b for n, (a, b) in zip(x.shape, widths, strict=True)])
    return padded(x, widths, mode, 0 if fill is None else fill.ravel()[0].item())


def padded(x: Array, widths: Sequence[tuple[int, int]], mode: str, fill: float) -> Array:
    """x with so much before and behind each axis; less than none is cut off."""
    if any(min(width) < 0 for width in widths):
        sizes = zip(x.shape, widths, strict=True)
        x = x[tuple(slice(max(0, -a), n - max(0, -b)) for n, (a, b) in sizes)]
        widths = [(max(0, a), max(0, b)) for a, b in widths]
    if not any(map(any, widths)):
        return x
    filled = {"constant_values": fill} if mode == "constant" else {}
    return xp_of(x).pad(x, tuple(widths), mode=mode, **filled)


@operator("CenterCropPad", numbers="shape", as_is=True)
def center_crop_pad(x: Array, shape: HostArray, *, axes: Sequence[int] | None = None) -> Array:
    widths = [(0, 0)] * x.ndim
    for axis, wanted in zip(_axes(axes, x.ndim), ints(shape), strict=True):
        more = wanted - x.shape[axis]
        before = int(more / 2)  # of an odd number less before than behind
        widths[axis] = before, more - before
    library_of_shape([n + a + b for n, (a, b) in zip(x.shape, widths, strict=True)])
    return padded(x, widths, "constant", 0)


@operator("Trilu", numbers="k", as_is=True)
def trilu(x: Array, k: HostArray | None = None, *, upper: int = 1) -> Array:
    offset = 0 if k is None else int(k.ravel()[0])
    return xp_of(x).triu(x, offset) if upper else xp_of(x).tril(x, offset)


@operator("DepthToSpace", as_is=True)
def depth_to_space(x: Array, *, blocksize: int, mode: str = "DCR") -> Array:
    n, c, h, w = x.shape
    b, c = blocksize, c // blocksize**2
    if mode == "DCR":
        y = x.reshape(n, b, b, c, h, w).transpose(0, 3, 4, 1, 5, 2)
    else:
        y = x.reshape(n, c, b, b, h, w).transpose(0, 1, 4, 2, 5, 3)
    return y.reshape(n, c, h * b, w * b)


@operator("SpaceToDepth", as_is=True)
def space_to_depth(x: Array, *, blocksize: int, mode: str = "DCR") -> Array:
    n, c, h, w = x.shape
    b = blocksize
    y = x.reshape(n, c, h // b, b, w // b, b)
    y = y.transpose(0, 3, 5, 1, 2, 4) if mode == "DCR" else y.transpose(0, 1, 3, 5, 2, 4)
    return y.reshape(n, c * b * b, h // b, w // b)


@operator("ReverseSequence", numbers="lengths", as_is=True)
def reverse_sequence(
    x: Array, lengths: HostArray, *, batch_axis: int = 1, time_axis: int = 0
) -> Array:
    xp, parts = xp_of(x), []
    for i, n in enumerate(ints(lengths)):
        row = cut(x, batch_axis, i, i + 1)
        turned = xp.flip(cut(row, time_axis, 0, n), time_axis)
        parts.append(xp.concatenate([turned, cut(row, time_axis, n, None)], axis=time_axis))
    return xp.concatenate(parts, axis=batch_axis)


# Made out of a shape


@operator("Constant", as_is=True)
def constant(
    *,
    value: Any = None,
    value_float: Any = None,
    value_int: Any = None,
    value_floats: Any = None,
    value_ints: Any = None,
) -> Array:
    if value is not None:
        return value
    for plain, dtype in (
        (value_float, "float32"), (value_floats, "float32"),
        (value_int, "int64"), (value_ints, "int64"),
    ):  # fmt: skip
        if plain is not None:
            return np.asarray(plain, dtype)
    raise OptionError("Constant without a value")


@operator("ConstantOfShape", numbers="shape", as_is=True)
def constant_of_shape(shape: HostArray, *, value: HostArray | None = None) -> Array:
    fill = np.zeros(1, "float32") if value is None else value
    sizes = tuple(ints(shape))
    xp = library_of_shape(sizes)
    return xp.full(sizes, fill.ravel()[0].item(), dtype=fill.dtype)


@operator("Range", numbers="start limit delta", as_is=True)
def range_(start: HostArray, limit: HostArray, delta: HostArray) -> Array:
    a, b, step = (x.ravel()[0].item() for x in (start, limit, delta))
    if not step or (b - a) / step > MOST_NUMBERS:
        raise ShapeError(f"Range from {a} to {b} by {step}")
    xp = traced if traced.counts_rows(b - a) else np
    return xp.arange(a, b, step).astype(start.dtype)


@operator("EyeLike", as_is=True)
def eye_like(x: Array, *, dtype: str | None = None, k: int = 0) -> Array:
    return xp_of(x).eye(*x.shape, k=k, dtype=dtype_of(dtype) if dtype else x.dtype)


@operator("OneHot", numbers="depth", as_is=True)
def one_hot(ids: Array, depth: HostArray, values: Array, *, axis: int = -1) -> Array:
    if depth.size != 1 or not 1 <= depth.ravel()[0] < np.inf:
        raise ShapeError(f"depth of OneHot is a number from 1 on, not {depth.tolist()!r:.60}")
    if values.shape != (2,):
        raise ShapeError(f"values of OneHot are two, off and on, not {values.shape}")
    xp, n = xp_of(ids), int(depth.ravel()[0])
    library_of_shape((*ids.shape, n))
    ids = xp.where(ids < 0, ids + n, ids)
    hot = xp.expand_dims(ids, -1) == beside(np.arange(n).astype(ids.dtype), ids)
    y = xp.where(hot, values[1], values[0])
    return xp.moveaxis(y, -1, axis)


# Picked by ids


@operator("Gather", loose="ids", as_is=True)
def gather(x: Array, ids: Array, *, axis: int = 0) -> Array:
    axis = axis_of(axis, x.ndim)
    if isinstance(ids, np.ndarray) and ids.ndim == 0:
        at, n = int(ids), x.shape[axis]
        if not -n <= at < n:
            raise ShapeError(f"Gather of number {at} of {n}")
        return x[(slice(None),) * axis + (at,)]
    if axis == 0 and ids.ndim and _says_it_of_each_row(x, ids):
        return _taken_from_each_row(x, ids)
    own = own_places(x, ids) if axis == 0 else None
    return xp_of(x).take(x, beside(ids, x), axis=axis) if own is None else own


@operator("GatherElements", as_is=True)
def gather_elements(x: Array, ids: Array, *, axis: int = 0) -> Array:
    axis = axis_of(axis, x.ndim)
    for i, n in enumerate(ids.shape):
        if i != axis and n != x.shape[i]:
            x = cut(x, i, 0, n)
    return xp_of(x).take_along_axis(x, ids % x.shape[axis], axis=axis)


@operator("GatherND", as_is=True)
def gather_nd(x: Array, ids: Array, *, batch_dims: int = 0) -> Array:
    """The leading axes as one, of which each tuple of ids picks a place."""
    each_row = ids.ndim > 1 and not batch_dims and _says_it_of_each_row(x, ids)
    if traced.counts_rows(x.shape[0]) and not each_row:
        return _picked_from_rows(x, ids, batch_dims)
    deep = batch_dims + ids.shape[-1]
    sizes = (x.shape[0] // row_by_row.get(), *x.shape[1:]) if each_row else x.shape
    places = []
    for i in range(deep):
        if i < batch_dims:
            along = np.arange(x.shape[i]).reshape(
                [-1 if j == i else 1 for j in range(ids.ndim - 1)]
            )
            places.append(beside(along, ids))
        else:
            places.append(ids[..., i - batch_dims])
    at = on_one_axis(places, sizes[:deep])
    flat = x.reshape((prod(x.shape[:deep]), *x.shape[deep:]))
    return _taken_from_each_row(flat, at) if each_row else xp_of(x).take(flat, at, axis=0)


def _says_it_of_each_row(x: Array, ids: Array) -> bool:
    """Whether known places along axis 0 are those in each row, of a graph for a single one."""
    rows = row_by_row.get()
    return bool(rows and x.shape[0] and x.shape[0] % rows == 0 and numbers_known(ids))


def _taken_from_each_row(x: Array, ids: Array) -> Array:
    """x[ids] of each row: (rows * n, ...) -> (rows * m, ...)"""
    rows = row_by_row.get()
    apart = x.reshape(rows, x.shape[0] // rows, *x.shape[1:])
    y: Array = xp_of(x).take(apart, beside(ids, x), axis=1)
    return y.reshape(rows * ids.shape[0], *ids.shape[1:], *x.shape[1:])


def _picked_from_rows(x: Array, ids: Array, batch_dims: int) -> Array:
    """GatherND of an x whose axis 0 counts rows."""
    ndim = ids.ndim - 1
    batch = [
        beside(np.arange(x.shape[i]), x) if i else traced.arange(x.shape[0])
        for i in range(batch_dims)
    ]
    own = [at.reshape([-1 if j == i else 1 for j in range(ndim)]) for i, at in enumerate(batch)]
    return indexed(x, (*own, *last_axis(ids)))


@operator("Compress", numbers="condition", as_is=True)
def compress(x: Array, condition: HostArray, *, axis: int | None = None) -> Array:
    ids = np.flatnonzero(condition)
    return xp_of(x).take(x if axis is not None else x.reshape(-1), beside(ids, x), axis=axis or 0)


@operator("NonZero", as_is=True)
def non_zero(x: Array) -> Array:
    return np.stack(np.nonzero(x)) if isinstance(x, np.ndarray) else xp_of(x).nonzero(x)


_COMBINE = {"add": "add", "mul": "multiply", "max": "maximum", "min": "minimum"}


def _scattered(x: Array, key: tuple[Array, ...], updates: Array, reduction: str) -> Array:
    y = x.copy()
    if reduction == "none":
        y[key] = updates
    elif isinstance(y, np.ndarray):
        getattr(np, _COMBINE[reduction]).at(y, key, updates)
    else:
        raise OptionError(f"scattering with reduction={reduction!r} runs on NumPy only")
    return y


@operator("ScatterND", as_is=True)
def scatter_nd(x: Array, ids: Array, updates: Array, *, reduction: str = "none") -> Array:
    key = tuple(ids[..., i] for i in range(ids.shape[-1]))
    return _scattered(x, key, updates, reduction)


@operator("ScatterElements", as_is=True)
def scatter_elements(
    x: Array, ids: Array, updates: Array, *, axis: int = 0, reduction: str = "none"
) -> Array:
    axis = axis_of(axis, x.ndim)
    grid = np.ogrid[tuple(slice(n) for n in ids.shape)]
    key = tuple(ids % x.shape[axis] if i == axis else beside(g, ids) for i, g in enumerate(grid))
    return _scattered(x, key, updates, reduction)


# Products


@operator("MatMul", as_is=True)
def matmul(a: Array, b: Array) -> Array:
    if b.ndim == 2 and a.ndim >= 2:
        return kernels.matmul(a, b)
    return in_float32(xp_of(a).matmul)(a, b)


@operator("Gemm", as_is=True)
def gemm(
    a: Array,
    b: Array,
    c: Array | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Array:
    a, b = (a.T if transA else a), (b.T if transB else b)
    if alpha == beta == 1 and c is not None and c.ndim == 1 and c.shape[0] == b.shape[1]:
        return kernels.linear(a, b, c)

    def product(a: Array, b: Array, c: Array | None) -> Array:
        y = kernels.matmul(a, b)
        y = (y if alpha == 1 else y * alpha).astype(a.dtype, copy=False)
        if c is None or beta == 0:
            return y
        return y + (c if beta == 1 else c * beta).astype(a.dtype, copy=False)

    return in_float32(product)(a, b, c)


@operator("Einsum")
def einsum(*arrays: Array, equation: str) -> Array:
    return xp_of(arrays[0]).einsum(equation.replace(" ", ""), *arrays)


# Norms


@operator("BatchNormalization", as_is=True)
def batch_norm(
    x: Array,
    gain: Array,
    bias: Array,
    mean: Array,
    var: Array,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
) -> Array:
    if training_mode:
        raise OptionError(
            "BatchNormalization with training_mode=1 is for training: export it for inference"
        )
    return channels_last(lambda x: kernels.batch_norm(x, mean, var, gain, bias, eps=epsilon), x)


@operator("LayerNormalization", as_is=True)
def layer_norm(
    x: Array,
    gain: Array,
    bias: Array | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    count: int,
) -> Any:
    axis = axis_of(axis, x.ndim)
    if axis == x.ndim - 1 and count == 1 and gain.ndim == 1 and (bias is None or bias.ndim == 1):
        return kernels.layer_norm(x, gain, bias, eps=epsilon)
    axes = tuple(range(axis, x.ndim))

    def norm(x: Array, gain: Array, bias: Array | None) -> tuple[Array, ...]:
        xp, mean = xp_of(x), x.mean(axis=axes, keepdims=True)
        y = x - mean
        inverse = 1 / xp.sqrt(xp.square(y).mean(axis=axes, keepdims=True) + epsilon)
        y = y * inverse * gain
        return (y if bias is None else y + bias, mean, inverse)

    return in_float32(norm)(x, gain, bias)


@operator("RMSNormalization", as_is=True)
def rms_norm(
    x: Array, gain: Array, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Array:
    axis = axis_of(axis, x.ndim)
    if axis == x.ndim - 1 and gain.ndim == 1:
        return kernels.rms_norm(x, gain, eps=epsilon)
    axes = tuple(range(axis, x.ndim))

    def norm(x: Array, gain: Array) -> Array:
        xp = xp_of(x)
        return x / xp.sqrt(xp.square(x).mean(axis=axes, keepdims=True) + epsilon) * gain

    return in_float32(norm)(x, gain)


@operator("MeanVarianceNormalization")
def mean_variance_norm(x: Array, *, axes: Sequence[int] = (0, 2, 3)) -> Array:
    xp, along = xp_of(x), tuple(axes)
    y = x - x.mean(axis=along, keepdims=True)
    return y / (xp.sqrt(xp.square(y).mean(axis=along, keepdims=True)) + 1e-9)


@operator("LpNormalization")
def lp_norm(x: Array, *, axis: int = -1, p: int = 2) -> Array:
    xp = xp_of(x)
    total = (xp.absolute(x) if p == 1 else xp.square(x)).sum(axis=axis, keepdims=True)
    total = xp.where(total == 0, xp.ones_like(total), total)  # zeros stay zeros, with a gradient
    return x / (total if p == 1 else xp.sqrt(total))


@operator("Dropout", numbers="ratio training_mode", as_is=True)
def dropout(
    x: Array,
    ratio: HostArray | None = None,
    training_mode: HostArray | None = None,
    *,
    seed: int | None = None,
    count: int,
) -> Any:
    drops = ratio is None or bool((ratio != 0).any())
    if training_mode is not None and training_mode.any() and drops:
        raise OptionError("Dropout in training mode: export the model for inference")
    return (x, xp_of(x).ones(x.shape, dtype=np.dtype(bool))) if count > 1 else x
