"""Elementwise formulas as kernels whose text is written from their lines."""

from __future__ import annotations

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
MOST_PLANS = 1024
PACKED, ONE, EACH = "packed", "one", "each"
"""How a thread reads an array: its neighbours at once, one number for them all, or one by one."""

_KERNEL = """
// A formula for each element of y (rows, cols), V neighbours of a row at a time.
template <int V>
__global__ void __launch_bounds__(256)
NAME(PARAMETERS) {
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
    """Arrays as rows and columns of a result of y's shape: the elements between those of each."""

    rows: int
    cols: int
    steps: tuple[tuple[int, int], ...]


class Plan(NamedTuple):
    """How a formula is launched for arrays that lie in some way; without a layout it is not."""

    text: str
    shape: Shape
    layout: Layout
    pack: int
    numbers: tuple[np.float32, ...]

    def __call__(self, arrays: tuple[Array, ...]) -> Array:
        (rows, cols, steps), v = self.layout, self.pack
        y = cupy.empty(self.shape, arrays[0].dtype)
        across = min(THREADS, next_power(cols // v))
        down = THREADS // across
        launch(
            (self.text, "formula", v),
            (-(-cols // (v * across)), min(65535, -(-rows // down))),  # 65535: all CUDA allows
            (across, down),
            (*arrays, y),
            rows,
            cols,
            *(each for pair in steps for each in pair),
            *self.numbers,
        )
        return y


plans = Lately[Plan | None](MOST_PLANS)


@elementwise.on("cupy")
def elementwise_compiled(x: Array, *arrays: Array, formula: Formula) -> Array:
    """y = formula(x, *arrays), in one launch if they lie as rows and columns."""
    both = x, *arrays
    key = formula, *((a.shape, a.strides, a.dtype, a.data.ptr % 16) for a in both)
    plan = plans.get(key)
    if plan is None:
        plan = _planned(formula, both)
        if plan is None:
            return unfused(elementwise, x, *arrays, formula=formula)
        plans.keep(key, plan)
    return plan(both)


def _planned(formula: Formula, arrays: tuple[Array, ...]) -> Plan | None:
    x = arrays[0]
    if x.size == 0 or type_name(x.dtype) is None:
        return None
    if any(a.dtype not in (x.dtype, BOOL) for a in arrays):  # where CuPy has other types than NumPy
        return None
    layout = laid_out(x.shape, arrays)
    if layout is None:
        return None
    v = 16 // x.itemsize
    v = 1 if layout.cols % v else v
    reads = [_read(a, steps, x.dtype, v) for a, steps in zip(arrays, layout.steps, strict=True)]
    code, numbers = text(formula, [a.dtype for a in arrays], reads)
    return Plan(source("activations.cu") + code, x.shape, layout, v, numbers)


def laid_out(shape: Shape, arrays: tuple[Array, ...]) -> Layout | None:
    """Axes that follow each other in every array as one; None if more than two are left."""
    spread = [cupy.broadcast_to(a, shape) for a in arrays]
    axes: list[list[int]] = []  # the size of each, and the steps of the arrays, the last axis first
    for i in reversed(range(len(shape))):
        steps = [a.strides[i] // a.itemsize for a in spread]
        if shape[i] == 1:
            continue
        inner = axes[-1] if axes else None
        if inner and all(s == inner[0] * t for s, t in zip(steps, inner[1:], strict=True)):
            inner[0] *= shape[i]
        else:
            axes.append([shape[i], *steps])
    if len(axes) > 2:
        return None
    axes += [[1, *[0] * len(arrays)]] * (2 - len(axes))
    (cols, *across), (rows, *down) = axes
    return Layout(rows, cols, tuple(zip(down, across, strict=True)))


def _read(x: Array, steps: tuple[int, int], dtype: np.dtype[Any], v: int) -> str:
    """How a thread reads V neighbours of an array."""
    down, across = steps
    if across == 0:
        return ONE
    whole = (x.data.ptr | down * x.itemsize) % (v * x.itemsize) == 0
    return PACKED if across == 1 and x.dtype == dtype and whole else EACH


def text(
    formula: Formula, dtypes: list[np.dtype[Any]], reads: list[str], name: str = "formula"
) -> tuple[str, tuple[np.float32, ...]]:
    """The kernel of a formula for arrays of these types, read so; the numbers that it is given.

    It stands behind activations.cu, whose functions it calls. Numbers are arguments: formulas that
    differ in them only have one text.
    """
    boolean = [dtype.kind == "b" for dtype in dtypes]
    types = ["bool" if dtype.kind == "b" else type_name(dtype) for dtype in dtypes]
    numbers: list[np.float32] = []
    loads, lines = [], []
    for i, (kind, how) in enumerate(zip(types, reads, strict=True)):
        at = f"x{i}[r * down{i}"
        if how == PACKED:
            loads.append(f"const Pack<{kind}, V> p{i} = load<V>(x{i} + r * down{i} + c);")
            value = f"p{i}.at[k]"
        elif how == ONE:
            loads.append(f"const {kind} p{i} = {at}];")
            value = f"p{i}"
        else:
            value = f"{at} + (c + k) * across{i}]"
        lines.append(
            f"const bool v{i} = {value};" if boolean[i] else f"const float v{i} = wide({value});"
        )

    def said(x: Place | float, as_boolean: bool = False) -> str:
        if isinstance(x, Place):
            return f"v{x.at}" if boolean[x.at] == as_boolean else f"float(v{x.at})"
        with np.errstate(over="ignore"):
            numbers.append(np.float32(x))
        return f"(n{len(numbers) - 1} != 0.f)" if as_boolean else f"n{len(numbers) - 1}"

    for function, inputs, options in formula.lines:
        answers = False
        if isinstance(function, Kernel):
            both = DEFAULTS[function.__name__] | dict(options)
            given = [*map(said, (*inputs, *both.values())), "0.f", "0.f"][:3]
            made = f"act::{function.__name__}::of({', '.join(given)})"
        elif function == CHOICE:
            made = f"{said(inputs[0], True)} ? {said(inputs[1])} : {said(inputs[2])}"
        elif function in OF_BOOLEANS:
            answers = True
            made = OF_BOOLEANS[function].format(*(said(x, True) for x in inputs))
        else:
            answers = function in OF_COMPARISONS
            words = OF_COMPARISONS[function] if answers else OF_FLOATS[function]
            made = words.format(*map(said, inputs))
        kind = "bool" if answers else "float"
        lines.append(f"const {kind} v{len(boolean)} = {made};")
        boolean.append(answers)
    arrays = [f"const {kind}* x{i}" for i, kind in enumerate(types)]
    steps = [f"Index down{i}, Index across{i}" for i in range(len(types))]
    parameters = [*arrays, f"{types[0]}* y", "Index rows", "Index cols", *steps]
    parameters += [f"float n{i}" for i in range(len(numbers))]
    parts = {
        "NAME": name,
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
