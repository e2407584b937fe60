"""Elementwise formulas as kernels whose text is written from their lines."""

from __future__ import annotations

import sys
from itertools import chain
from math import prod
from typing import Any, NamedTuple

import cupy
import numpy as np

from nnxp._arrays import Array, Shape
from nnxp.kernels._dispatch import Kernel
from nnxp.kernels.cuda._compiled import launch, next_power, source, type_name, unfused
from nnxp.kernels.cuda.activations import DEFAULTS
from nnxp.kernels.cuda.lt.plans import Lately
from nnxp.kernels.formula import (
    CHOICE,
    OF_BOOLEANS,
    OF_COMPARISONS,
    OF_FLOATS,
    Formula,
    Place,
    elementwise,
)

THREADS = 256  # a block
BOOL = np.dtype(bool)
MOST_AXES = 4  # before the last: what is left where axes that follow each other are one
MOST_PLANS = 1024
PACKED, ONE, STRIDED = "packed", "one", "strided"
"""How a thread reads an array: its neighbours at once, one number for them all, or one by one."""

_KERNEL = """
// A formula for each element of y (rows, cols), V neighbours of a row at a time.
template <int V>
__global__ void __launch_bounds__(256)
formula(PARAMETERS) {
    const Index c = (Index(blockIdx.x) * blockDim.x + threadIdx.x) * V;
    if (c >= cols) return;
    const Index step = Index(gridDim.y) * blockDim.y;
    for (Index r = Index(blockIdx.y) * blockDim.y + threadIdx.y; r < rows; r += step) {
        READS
        Pack<TYPE, V> pack;
        #pragma unroll
        for (int k = 0; k < V; ++k) {
            LINES
            pack.at[k] = narrow<TYPE>(RESULT);
        }
        store(y + r * cols + c, pack);
    }
}
"""


class Layout(NamedTuple):
    """Arrays as y (*sizes, cols), without gaps: the elements between their own, along each axis.

    `order` is that of y's axes in memory.
    """

    order: tuple[int, ...]
    sizes: tuple[int, ...]
    cols: int
    steps: tuple[tuple[int, ...], ...]


class Plan(NamedTuple):
    """How a formula is launched for arrays that lie in some way."""

    text: str
    shape: Shape
    layout: Layout
    pack: int
    numbers: tuple[np.float32, ...]

    def __call__(self, arrays: tuple[Array, ...]) -> Array:
        (order, sizes, cols, steps), v = self.layout, self.pack
        y = cupy.empty([self.shape[axis] for axis in order], arrays[0].dtype)
        across, rows = min(THREADS, next_power(cols // v)), prod(sizes)
        down = THREADS // across
        launch(
            (self.text, "formula", v),
            (-(-cols // (v * across)), min(65535, -(-rows // down))),  # 65535: all CUDA allows
            (across, down),
            (*arrays, y),
            rows,
            cols,
            *sizes[1:],
            *chain.from_iterable(steps),
            *self.numbers,
        )
        return (
            y if order == tuple(range(y.ndim)) else y.transpose(tuple(map(int, np.argsort(order))))
        )


plans = Lately[Plan | bool](MOST_PLANS)
"""False for what the reference body does."""


@elementwise.on("cupy")
def elementwise_compiled(x: Array, *arrays: Array, formula: Formula) -> Array:
    """y = formula(x, *arrays), in one launch; y lies as x does, as from a ufunc."""
    both = x, *arrays
    key = formula, *((a.shape, a.strides, a.dtype, a.data.ptr % 16) for a in both)
    plan = plans.get(key)
    if plan is None:
        plan = _planned(formula, both) or False
        plans.keep(key, plan)
    if isinstance(plan, Plan):
        return plan(both)
    return unfused(elementwise, x, *arrays, formula=formula)


def _planned(formula: Formula, arrays: tuple[Array, ...]) -> Plan | None:
    x = arrays[0]
    if x.size == 0 or type_name(x.dtype) is None:
        return None
    if any(a.dtype not in (x.dtype, BOOL) for a in arrays):  # where CuPy has other types than NumPy
        return None
    layout = laid_out(x, arrays)
    if len(layout.sizes) > MOST_AXES:
        return None
    v = 16 // x.itemsize
    v = 1 if layout.cols % v else v
    reads = [_read(a, steps, x.dtype, v) for a, steps in zip(arrays, layout.steps, strict=True)]
    code, numbers = text(formula, [a.dtype for a in arrays], reads, len(layout.sizes))
    code = sys.intern(source("activations.cu") + code)  # to be looked up by each launch
    return Plan(code, x.shape, layout, v, numbers)


def laid_out(x: Array, arrays: tuple[Array, ...]) -> Layout:
    """Arrays broadcast to the shape of x, of which axes that follow each other are taken as one."""
    spread = [cupy.broadcast_to(a, x.shape) for a in arrays]
    order = list(range(x.ndim))
    if 0 not in x.strides:
        order.sort(key=lambda axis: -abs(x.strides[axis]))
    axes: list[list[int]] = []  # the size of each, and the steps of the arrays, the last axis first
    for axis in reversed(order):
        steps = [a.strides[axis] // a.itemsize for a in spread]
        inner = axes[-1] if axes else None
        if x.shape[axis] == 1:
            continue
        if inner and all(s == inner[0] * t for s, t in zip(steps, inner[1:], strict=True)):
            inner[0] *= x.shape[axis]
        else:
            axes.append([x.shape[axis], *steps])
    while len(axes) < 2:
        axes.append([1, *[0] * len(arrays)])
    sizes, *steps = zip(*reversed(axes), strict=True)
    return Layout(tuple(order), sizes[:-1], sizes[-1], tuple(steps))


def _read(x: Array, steps: tuple[int, ...], dtype: np.dtype[Any], v: int) -> str:
    """How a thread reads V neighbours of an array."""
    *down, across = steps
    if across == 0:
        return ONE
    places = x.data.ptr
    for step in down:
        places |= step * x.itemsize
    whole = places % (v * x.itemsize) == 0
    return PACKED if across == 1 and x.dtype == dtype and whole else STRIDED


def text(
    formula: Formula, dtypes: list[np.dtype[Any]], reads: list[str], axes: int = 1
) -> tuple[str, tuple[np.float32, ...]]:
    """The kernel of a formula for arrays of these types, read so; the numbers that it is given.

    `axes` is how many there are before the columns. The text stands behind activations.cu, whose
    functions it calls. Numbers are arguments: formulas that differ in them only have one text.
    """
    boolean = [dtype.kind == "b" for dtype in dtypes]
    types = ["bool" if dtype.kind == "b" else type_name(dtype) for dtype in dtypes]
    numbers: list[np.float32] = []
    loads, lines = [], []
    for axis in reversed(range(1, axes)):
        rest = "r" if axis == axes - 1 else f"rest{axis}"
        loads += [
            f"const Index i{axis} = {rest} % size{axis};",
            f"const Index rest{axis - 1} = {rest} / size{axis};",
        ]
    place = ["r" if axes == 1 else "rest0", *(f"i{axis}" for axis in range(1, axes))]
    for i, (kind, how) in enumerate(zip(types, reads, strict=True)):
        at = " + ".join(f"{one} * down{i}_{axis}" for axis, one in enumerate(place))
        loads.append(f"const {kind}* a{i} = x{i} + {at};")
        if how == PACKED:
            loads.append(f"const Pack<{kind}, V> p{i} = load<V>(a{i} + c);")
            value = f"p{i}.at[k]"
        elif how == ONE:
            loads.append(f"const {kind} p{i} = *a{i};")
            value = f"p{i}"
        else:
            value = f"a{i}[(c + k) * across{i}]"
        lines.append(
            f"const bool v{i} = {value};" if boolean[i] else f"const float v{i} = wide({value});"
        )

    def operand(x: Place | float, as_boolean: bool = False) -> str:
        if isinstance(x, Place):
            return f"v{x.at}" if boolean[x.at] == as_boolean else f"float(v{x.at})"
        with np.errstate(over="ignore"):
            numbers.append(np.float32(x))
        return f"(n{len(numbers) - 1} != 0.f)" if as_boolean else f"n{len(numbers) - 1}"

    for function, inputs, options in formula.lines:
        answers = False
        if function == "power" and inputs[1] == 2:  # as NumPy does it, exact where powf is not
            function, inputs = "square", inputs[:1]
        if isinstance(function, Kernel):
            both = DEFAULTS[function.__name__] | dict(options)
            arguments = [*map(operand, (*inputs, *both.values())), "0.f", "0.f"][:3]
            expression = f"act::{function.__name__}::of({', '.join(arguments)})"
        elif function == CHOICE:
            expression = f"{operand(inputs[0], True)} ? {operand(inputs[1])} : {operand(inputs[2])}"
        elif function in OF_BOOLEANS:
            answers = True
            expression = OF_BOOLEANS[function].format(*(operand(x, True) for x in inputs))
        else:
            answers = function in OF_COMPARISONS
            words = OF_COMPARISONS[function] if answers else OF_FLOATS[function]
            expression = words.format(*map(operand, inputs))
        kind = "bool" if answers else "float"
        lines.append(f"const {kind} v{len(boolean)} = {expression};")
        boolean.append(answers)
    arrays = [f"const {kind}* x{i}" for i, kind in enumerate(types)]
    names = ["rows", "cols", *(f"size{axis}" for axis in range(1, axes))]
    for i in range(len(types)):
        names += [*(f"down{i}_{axis}" for axis in range(axes)), f"across{i}"]
    parameters = [*arrays, f"{types[0]}* y", *(f"Index {name}" for name in names)]
    parameters += [f"float n{i}" for i in range(len(numbers))]
    parts = {
        "PARAMETERS": ", ".join(parameters),
        "READS": "\n        ".join(loads),
        "LINES": "\n            ".join(lines),
        "RESULT": f"v{len(boolean) - 1}",
        "TYPE": str(types[0]),
    }
    code = _KERNEL
    for part, words in parts.items():
        code = code.replace(part, words)
    return code, tuple(numbers)
