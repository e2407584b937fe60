"""What a formula, or who exported it, wrote out in several steps, seen as the kernel that it is.

`kernel_for(step, arrays)` looks from a step back at what its arrays were made by. What it finds is
noted in its place; the steps that nobody needs any more are left out as any others are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product
from math import pi, prod, sqrt
from typing import Any, TypeAlias, TypeVar

import numpy as np

from nnxp import kernels
from nnxp.program.traced import Step, axes_of, is_constant, lifted, ndarray

DEPTH = 6  # steps that are looked at behind each other
MOST_TERMS = 8

Pattern = TypeVar("Pattern", bound=Callable[..., Any])
Polynomial: TypeAlias = dict[tuple[int, ...], float]
"""Coefficients by the powers of each variable."""

_PATTERNS: dict[Any, list[Callable[..., Any]]] = {}


def pattern(*functions: str | kernels.Kernel) -> Callable[[Pattern], Pattern]:
    """Decorator: this function of (step, *arrays) answers what ends in one of these functions as a
    kernel, or None where it is something else."""

    def register(function: Pattern) -> Pattern:
        for name in functions:
            _PATTERNS.setdefault(name, []).append(function)
        return function

    return register


def kernel_for(step: Step, arrays: tuple[Any, ...]) -> Any:
    """The kernel whose result is that of this step, noted; None if there is none."""
    if not isinstance(step.function, str | kernels.Kernel) or step.outputs[0].dtype.kind != "f":
        return None
    for seen in _PATTERNS.get(step.function, ()):
        result = seen(step, *arrays)
        if result is not None:
            return result
    return None


# looking back


def _inputs_by(x: Any, *functions: Any) -> tuple[Any, ...] | None:
    """The inputs of the step that made x, if it is one of these functions."""
    step = _step(x)
    return tuple(map(lifted, step.inputs)) if step and step.function in functions else None


def _step(x: Any) -> Step | None:
    return x.value.step if isinstance(x, ndarray) else None


def _number(x: Any) -> float | None:
    """A Python number, or a constant of one element, as a float."""
    if isinstance(x, int | float) and not isinstance(x, bool):
        return float(x)
    if is_constant(x) and prod(x.shape) == 1:
        return float(x.value.numbers.reshape(-1)[0])
    return None


def _same(x: Any, y: Any) -> bool:
    return isinstance(x, ndarray) and isinstance(y, ndarray) and x.value is y.value


def _polynomial(y: Any, variables: tuple[Any, ...], depth: int = DEPTH) -> Polynomial | None:
    """y as a polynomial of the variables; None if it is none, or one of many terms."""
    for i, x in enumerate(variables):
        if _same(y, x):
            return {tuple(int(i == j) for j in range(len(variables))): 1.0}
    number = _number(y)
    if number is not None:
        return {(0,) * len(variables): number}
    step = _step(y)
    if step is None or depth == 0 or step.function not in _ALGEBRA:
        return None
    return _combined(step.function, map(lifted, step.inputs), variables, depth - 1)


def _combined(
    function: Any, arrays: Iterable[Any], variables: tuple[Any, ...], depth: int = DEPTH
) -> Polynomial | None:
    """What a function makes of polynomials; None as soon as an array is none."""
    parts = []
    for array in arrays:
        part = _polynomial(array, variables, depth)
        if part is None:
            return None
        parts.append(part)
    polynomial = _ALGEBRA[function](*parts)
    return polynomial if polynomial is not None and len(polynomial) <= MOST_TERMS else None


def _sum(a: Polynomial, b: Polynomial, sign: float = 1.0) -> Polynomial:
    return a | {powers: a.get(powers, 0.0) + sign * value for powers, value in b.items()}


def _times(a: Polynomial, b: Polynomial) -> Polynomial:
    polynomial: Polynomial = {}
    for (p, x), (q, y) in product(a.items(), b.items()):
        powers = tuple(i + j for i, j in zip(p, q, strict=True))
        polynomial[powers] = polynomial.get(powers, 0.0) + x * y
    return polynomial


def _constant(a: Polynomial) -> float:
    return next(iter(a.values())) if not any(map(any, a)) else 0.0


def _over(a: Polynomial, b: Polynomial) -> Polynomial | None:
    number = _constant(b)
    return {powers: value / number for powers, value in a.items()} if number else None


def _power(a: Polynomial, b: Polynomial) -> Polynomial | None:
    return {2.0: _times(a, a), 3.0: _times(a, _times(a, a))}.get(_constant(b))


_ALGEBRA: dict[Any, Callable[..., Polynomial | None]] = {
    "add": _sum,
    "subtract": partial(_sum, sign=-1.0),
    "multiply": _times,
    "divide": _over,
    "power": _power,
    "square": lambda a: _times(a, a),
}


def _is(polynomial: Polynomial | None, wanted: Polynomial, dtype: np.dtype[Any]) -> bool:
    """Whether a polynomial is this one, up to a rounding of its coefficients."""
    if polynomial is None:
        return False
    rounding = 4 * float(np.finfo(dtype).eps)
    return all(
        abs(polynomial.get(term, 0.0) - wanted.get(term, 0.0))
        <= rounding * abs(wanted.get(term, 0.0))
        for term in polynomial.keys() | wanted.keys()
    )


def _behind(x: Any, depth: int = DEPTH) -> Iterator[Any]:
    """x, and what it is made of by sums, products and powers, the nearest first."""
    layer = [x]
    for _ in range(depth):
        yield from layer
        steps = [step for step in map(_step, layer) if step and step.function in _ALGEBRA]
        layer = [lifted(value) for step in steps for value in step.values if value.numbers is None]
        if len(layer) > MOST_TERMS:
            return


# gated by a function of itself

_LINE: Polynomial = {(1,): 1.0}
_CUBIC: Polynomial = {(1,): sqrt(2 / pi), (3,): 0.044715 * sqrt(2 / pi)}
_HALF: Polynomial = {(1, 0): 0.5, (1, 1): 0.5}
_ONCE: Polynomial = {(1, 1): 1.0}

# What is made of x and of s, by the function that makes s, of what polynomial of x.
_GATES: tuple[tuple[kernels.Kernel, tuple[Any, ...], Polynomial, Polynomial], ...] = (
    (kernels.gelu, (kernels.erf,), {(1,): sqrt(0.5)}, _HALF),
    (kernels.gelu_tanh, (kernels.tanh, "tanh"), _CUBIC, _HALF),
    (kernels.silu, (kernels.sigmoid,), _LINE, _ONCE),
    (kernels.hard_swish, (kernels.hard_sigmoid,), _LINE, _ONCE),
    (kernels.hard_swish, (kernels.relu6, "clip"), {(0,): 3.0, (1,): 1.0}, {(1, 1): 1 / 6}),
)
_INNER = {function for _, functions, _, _ in _GATES for function in functions}


@pattern("multiply", "divide")
def _gated(step: Step, *arrays: Any) -> Any:
    """GELU, by the error function and by tanh, SiLU and hard swish."""
    steps = [s for x in arrays for s in _behind(x, 4) if _named(s) in _INNER]
    return next((result for s in steps if (result := _gated_by(s, step, arrays)) is not None), None)


def _gated_by(inner: Any, step: Step, arrays: tuple[Any, ...]) -> Any:
    """The kernel that makes the step's result of some x, and of this function of x."""
    function, outline = _named(inner), step.outputs[0]
    argument, *limits = _inputs_by(inner, function) or (None,)
    if function == "clip" and [*map(_number, limits)] != [0.0, 6.0]:
        return None
    for x in _behind(argument):
        if x.shape != outline.shape or x.dtype != outline.dtype:
            continue
        whole = _combined(step.function, arrays, (x, inner))
        for kernel, functions, of_x, of_both in _GATES:
            fits = function in functions and _is(_polynomial(argument, (x,)), of_x, x.dtype)
            if fits and _is(whole, of_both, x.dtype):
                return _noted(kernel, x)
    return None


def _named(x: Any) -> Any:
    """The function that made x."""
    step = _step(x)
    return None if step is None else step.function


def _noted(kernel: kernels.Kernel, *arrays: Any, **options: Any) -> Any:
    return ndarray.kernel(kernel, arrays, options)


# norms over the last axis


@pattern("divide", "multiply")
def _norm(step: Step, x: Any, by: Any) -> Any:
    """(x - mean) / sqrt(var + eps), and x / sqrt(mean(x²) + eps)"""
    for top, below in ((x, by), (by, x)) if step.function == "multiply" else ((x, by),):
        if step.function == "multiply":
            below = _inverse(below)
        (root,) = _inputs_by(below, "sqrt") or (None,)
        terms = _inputs_by(root, "add") or ()
        eps = [number for number in map(_number, terms) if number is not None]
        means = [term for term in terms if _number(term) is None]
        if len(eps) != 1 or len(means) != 1 or not isinstance(top, ndarray):
            continue
        if step.outputs[0].shape != top.shape:
            continue
        squared = _mean_of(means[0])
        if _is(_polynomial(squared, (top,)), {(2,): 1.0}, top.dtype):
            whole, mean = _inputs_by(top, "subtract") or (None, None)
            if whole is not None and _same(_mean_of(mean), whole):
                return _noted(kernels.layer_norm, whole, eps=eps[0])
            return _noted(kernels.rms_norm, top, eps=eps[0])
    return None


def _inverse(x: Any) -> Any:
    """What x is 1 over."""
    one, below = _inputs_by(x, "divide") or (None, None)
    (inverse,) = _inputs_by(x, "reciprocal") or (below if _number(one) == 1 else None,)
    return inverse


def _mean_of(x: Any) -> Any:
    """What x is the mean of, along the last axis, which is kept."""
    step = _step(x)
    if step is None or step.function != "mean" or not step.options.get("keepdims"):
        return None
    (whole,) = map(lifted, step.inputs)
    last = axes_of(step.options.get("axis"), whole.ndim) == (whole.ndim - 1,)
    return whole if last and "dtype" not in step.options else None


@pattern("multiply", "add")
def _gain_or_bias(step: Step, x: Any, y: Any) -> Any:
    """The gain and the bias of a norm that has none."""
    for norm, vector in ((x, y), (y, x)):
        norm_step = _step(norm)
        if norm_step is None or norm_step.function not in (kernels.layer_norm, kernels.rms_norm):
            continue
        if not is_constant(vector) or vector.shape != norm.shape[-1:] or vector.dtype != norm.dtype:
            continue
        inputs = tuple(map(lifted, norm_step.inputs))
        whole, gain, bias = (*inputs, None, None)[:3]
        if step.function == "multiply" and gain is None and bias is None:
            return _noted(norm_step.function, whole, vector, **norm_step.options)
        if step.function == "add" and bias is None and norm_step.function is kernels.layer_norm:
            return _noted(norm_step.function, whole, gain, vector, **norm_step.options)
    return None


# attention


@pattern("matmul", kernels.matmul)
def _attention(step: Step, weights: Any, v: Any) -> Any:
    """softmax(scale q kᵀ + mask) v, for q, k and v of as many heads

    Of a query that may look nowhere the softmax is NaN, and attention 0.
    """
    (scores,) = _inputs_by(weights, kernels.softmax) or (None,)
    if scores is None:
        return None
    mask = None
    if terms := _inputs_by(scores, "add"):
        scores, mask = terms if _scaled_product(terms[0]) else terms[::-1]
    scale, factors = _scaled_product(scores) or (0.0, None)
    if factors is None:
        return None
    q, k = factors[0], factors[1].swapaxes(-1, -2)
    shapes = {array.shape[:-2] for array in (q, k, v)}
    if q.ndim < 3 or len(shapes) > 1 or step.outputs[0].shape != (*q.shape[:-1], v.shape[-1]):
        return None
    if mask is not None and (not isinstance(mask, ndarray) or mask.dtype != q.dtype):
        return None
    inputs = (q, k, v) if mask is None else (q, k, v, mask)
    return _noted(kernels.attention, *inputs, scale=scale, **step.options)


def _scaled_product(x: Any) -> tuple[float, tuple[Any, ...]] | None:
    """The factors of a product of matrices, and a number that it is multiplied by."""
    for part in _behind(x, 3):
        factors = _inputs_by(part, "matmul", kernels.matmul)
        if factors is not None:
            number = (_polynomial(x, (part,)) or {}).get((1,))
            return None if number is None else (number, factors)
    return None
