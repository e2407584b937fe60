"""A run of elementwise functions as one kernel, which passes over memory once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from nnxp._arrays import Array, xp_of
from nnxp._library import compute
from nnxp.kernels._dispatch import KERNELS, Kernel, kernel

_BINARY = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}
_UNARY = """ceil exp exp2 expm1 floor log log10 log1p log2 rint sqrt tanh trunc"""
_COMPARED = {
    "equal": "==", "greater": ">", "greater_equal": ">=", "less": "<", "less_equal": "<=",
    "not_equal": "!=",
}  # fmt: skip
OF_FLOATS: Mapping[str, str] = {
    **{name: f"{{0}} {sign} {{1}}" for name, sign in _BINARY.items()},
    **{name: f"{name}f({{0}})" for name in _UNARY.split()},
    "absolute": "fabsf({0})",
    "maximum": "larger({0}, {1})",
    "minimum": "smaller({0}, {1})",
    "negative": "-{0}",
    "positive": "{0}",
    "power": "powf({0}, {1})",
    "reciprocal": "1.f / {0}",
    "square": "{0} * {0}",
    "clip": "smaller(larger({0}, {1}), {2})",
}
"""What functions are in C++, of floats: NaN goes through them as it does in NumPy."""
OF_COMPARISONS: Mapping[str, str] = {
    **{name: f"{{0}} {sign} {{1}}" for name, sign in _COMPARED.items()},
    "isnan": "{0} != {0}",
}
"""Those that answer whether something is so."""
OF_BOOLEANS: Mapping[str, str] = {
    "logical_and": "{0} && {1}",
    "logical_not": "!{0}",
    "logical_or": "{0} || {1}",
}
"""Those that answer so of what is boolean itself."""
CHOICE = "where"


class Place(NamedTuple):
    """An array of a formula, or, counted behind these, what an earlier line of it makes."""

    at: int


class Line(NamedTuple):
    """A function of places and numbers."""

    function: str | Kernel
    inputs: tuple[Place | float, ...]
    options: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Formula:
    """Lines, of which the last makes the result: `formula(*arrays)` runs them one by one."""

    lines: tuple[Line, ...]

    def __call__(self, *arrays: Array) -> Array:
        xp, known = xp_of(arrays[0]), [*arrays]
        for (function, inputs, options), ended in zip(self.lines, self._ended, strict=True):
            operands = tuple(known[x.at] if isinstance(x, Place) else x for x in inputs)
            if isinstance(function, Kernel):
                known.append(function(*operands, **options))
            else:
                known.append(compute(xp, function, operands, dict(options)))
            del operands
            for at in ended:
                known[at] = None
        return known[-1]

    @cached_property
    def _ended(self) -> list[list[int]]:
        """For each line, what no later one looks at: it is let go."""
        last = {
            x.at: i
            for i, line in enumerate(self.lines)
            for x in line.inputs
            if isinstance(x, Place)
        }
        return [[at for at, end in last.items() if end == i] for i in range(len(self.lines))]

    def __repr__(self) -> str:
        return " ".join(
            str(getattr(line.function, "__name__", line.function)) for line in self.lines
        )


@kernel
def elementwise(x: Array, *arrays: Array, formula: Formula) -> Array:
    """y = formula(x, *arrays)

    x of y's shape and type, the others of its type or boolean, broadcast to it. In 16 bits it is
    computed in float32 and rounded once, where its lines one by one would round each time.
    """
    return formula(x, *arrays)


del KERNELS["elementwise"]  # no word of models, but what steps of programs on CUDA become
