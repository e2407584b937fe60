"""An array library that computes in float64 and knows how far a correct result may be off.

Its arrays carry a value, in float64, and an error: what rounding in their `dtype` may have added to
it so far, element by element. Every function propagates the errors of its arguments to first order
and adds its own: a running error analysis, [Higham 2002, Accuracy and Stability, 3.3], with the
statistical model of rounding of [Higham & Mary 2019, doi:10.1137/18M1226312] for long sums. So any
function written with `xp` gets its bound by being run here:

    x = bounded.asarray(float32_array)
    y = function(x)                      # y.value is what it should be, y.error the unit of doubt

A sum or product of K terms, accumulated with unit roundoff u, is charged

    u * sqrt(K) * (|y| / sqrt(3) + sqrt(sum of squares of the terms) / sqrt(2)) + u * |y|

a random walk over the partial sums: a drift with |y| and a spread with the 2-norm of the terms.
A function may round to less than its arguments' type inside, on one backend only. So within
`no_coarser_than(dtype)` such rounding is not charged, and whoever does it is found to be off.
Under `rigorous()` it is charged the proven K * u * (sum of absolute terms), and errors add up
instead of averaging out. The error is a unit, not a limit: a comparison accepts LIMIT times it.

Whole numbers and booleans are computed with as what they are, and exact: their error is zero, or
where rounding may have turned a decision, how far off another right answer is: 1 for a comparison
within the error of its operands, the distance to the other candidates for an argmax or argsort at
a near tie. That is a limit, not a unit. What is chosen by such a decision, `where(y > 0, a, b)`,
carries an error that spans both branches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from functools import reduce as fold
from itertools import accumulate
from math import sqrt as root
from typing import Any, TypeVar

import numpy as np

from nnxp import _library
from nnxp._arrays import HostArray, Shape, dtype_of, is_floating
from nnxp._errors import UnsupportedFunction
from nnxp._library import compute
from nnxp.kernels import Kernel, identity, linear
from nnxp.kernels import matmul as matmul_kernel
from nnxp.kernels._windows import padded, seen_along
from nnxp.kernels.functions import einsum_terms, met_axes
from nnxp.kernels.pool import _pooled, average_pool, counted

LIMIT = 6.0
"""Correct results stay within this many units of the bound; measured ones within about 3."""

_rigorous: ContextVar[bool] = ContextVar("nnxp_rigorous", default=False)
_coarsest: ContextVar[Any] = ContextVar("nnxp_coarsest", default=None)


class NoBound(UnsupportedFunction):
    """No bound is known for a function; the message names it."""


@contextmanager
def rigorous() -> Iterator[None]:
    """Within the block errors are proven bounds, not expectations."""
    token = _rigorous.set(True)
    try:
        yield
    finally:
        _rigorous.reset(token)


@contextmanager
def no_coarser_than(dtype: Any) -> Iterator[None]:
    """Within the block rounding is charged as that of dtype at most; None for no such limit."""
    token = _coarsest.set(dtype)
    try:
        yield
    finally:
        _coarsest.reset(token)


def limit() -> float:
    """How many units of error a comparison accepts: LIMIT, or 1 under `rigorous()`."""
    return 1.0 if _rigorous.get() else LIMIT


def _charged(dtype: Any) -> Any:
    """The type whose rounding is charged for a computation in dtype."""
    most = _coarsest.get()
    coarser = most is not None and unit_roundoff(dtype) > unit_roundoff(most)
    return most if coarser else dtype


def unit_roundoff(dtype: Any) -> float:
    """The largest relative error of rounding to nearest: 2^-24 for float32."""
    return float(_finfo(dtype).eps) / 2


def _finfo(dtype: Any) -> Any:
    dtype = np.dtype(dtype)
    if dtype.kind == "V":
        import ml_dtypes

        return ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    return np.finfo(dtype)


def _rounding(value: HostArray, dtype: Any, times: float | HostArray = 1.0) -> HostArray:
    """What storing `value` in dtype may add, `times` over; small results may be flushed to zero."""
    if not is_floating(np.dtype(dtype)):
        return np.zeros(np.shape(value))
    dtype = _charged(dtype)
    info = _finfo(dtype)
    floor = float(info.smallest_subnormal if np.dtype(dtype) == np.float16 else info.tiny)
    error: HostArray = times * unit_roundoff(dtype) * np.abs(value) + floor * (value != 0)
    return error


class ndarray(_library.ndarray):
    """Values with the error that computing them in `dtype` may have.

    Values of floats are in float64, whole numbers and booleans are as they are.
    """

    __slots__ = ("dtype", "error", "value")
    library = "bounded"
    refusal = NoBound
    device = "cpu"

    def __init__(self, value: HostArray, error: HostArray, dtype: Any) -> None:
        self.value, self.error, self.dtype = value, error, np.dtype(dtype)

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return self.value.shape

    def __repr__(self) -> str:
        return f"<bounded.ndarray {self.dtype}{list(self.shape)}>"

    @classmethod
    def apply(cls, name: str, arrays: tuple[Any, ...], options: dict[str, Any], out: Any) -> Any:
        if name not in _RULES:
            raise NoBound(f"no bound is known for {name}; assert_close takes one of your own")
        with np.errstate(all="ignore"):
            result = _RULES[name](*arrays, **options)
        if out is None:
            return result
        out[...] = result
        return out

    def _like(self, value: HostArray, error: HostArray) -> ndarray:
        return ndarray(value, error, self.dtype)

    def __setitem__(self, key: Any, value: Any) -> None:
        new, key = _lifted(value, self.dtype).astype(self.dtype), _plain(key)
        self.value[key], self.error[key] = new.value, new.error

    def _numbers(self, what: str = "") -> HostArray:
        """The value of an array whose number decides what is computed: it must not be in doubt."""
        if not is_floating(self.dtype) and self.error.any():
            raise NoBound("a branch is taken on a number that rounding may change")
        return self.value

    def __float__(self) -> float:
        return float(self.value)

    def __array__(self, *args: object, **kwargs: object) -> Any:
        raise TypeError("a bounded array does not become a NumPy array: take its .value")


def asarray(x: Any, dtype: Any = None, error: Any = 0.0) -> ndarray:
    """x as it is, without error unless one is given; its dtype is the one to be analysed."""
    if isinstance(x, ndarray):
        return x if dtype is None else x.astype(dtype)
    host = np.asarray(x)
    value = host.astype("float64") if is_floating(host.dtype) else host.copy()
    errors = np.broadcast_to(np.asarray(error, "float64"), value.shape).copy()
    lifted = ndarray(value, errors, host.dtype)
    return lifted if dtype is None else lifted.astype(dtype)


array = asarray


def stored(x: ndarray, charged: Any) -> ndarray:
    """x with the rounding to its own type, if that is coarser than what has been charged."""
    own = charged is not None and is_floating(x.dtype)
    if own and unit_roundoff(x.dtype) > unit_roundoff(charged):
        return x._like(x.value, x.error + _rounding(x.value, x.dtype))
    return x


# Operands and results


def _plain(option: Any) -> Any:
    """An index or option as NumPy takes it; it must not be in doubt."""
    if isinstance(option, tuple | list):
        return type(option)(map(_plain, option))
    return option._numbers() if isinstance(option, ndarray) else option


def _lifted(x: Any, dtype: Any) -> ndarray:
    """An operand: Python scalars take the type of the arrays, and are rounded to it."""
    if isinstance(x, ndarray):
        return x
    if isinstance(x, np.ndarray | np.generic):
        return asarray(x)
    if not is_floating(np.dtype(dtype)):
        return asarray(x if isinstance(x, float) else np.asarray(x, dtype))
    exact = np.float64(x)
    with np.errstate(over="ignore", under="ignore"):
        rounded = np.float64(np.asarray(x).astype(_charged(dtype)))
    off = np.abs(rounded - exact) if np.isfinite(rounded) else np.zeros(())
    return ndarray(np.asarray(exact), np.asarray(off), dtype)


def _stand_in(x: Any) -> Any:
    return np.ones((), x.dtype) if hasattr(x, "dtype") else x


def _operands(name: str, *args: Any) -> tuple[list[ndarray], np.dtype[Any]]:
    """Arguments as bounded arrays, and the dtype that NumPy's function of this name answers in.

    Where that is a float, so are they all.
    """
    with np.errstate(all="ignore"):
        dtype = compute(np, name, tuple(map(_stand_in, args)), {}).dtype
    return _all_lifted(args, dtype), dtype


def _floats(x: ndarray, dtype: Any) -> ndarray:
    return x if is_floating(x.dtype) else x.astype(dtype)


def _all_lifted(args: Sequence[Any], dtype: Any) -> list[ndarray]:
    """Operands of a function that answers in this type: all floats where it is one."""
    lifted = [_lifted(x, dtype) for x in args]
    return [_floats(x, dtype) for x in lifted] if is_floating(dtype) else lifted


def _common(arrays: Sequence[Any]) -> np.dtype[Any]:
    dtypes = [x.dtype for x in arrays if hasattr(x, "dtype")]
    dtype = fold(np.promote_types, dtypes) if dtypes else np.dtype("float64")
    real = any(isinstance(x, float) for x in arrays) and not is_floating(dtype)
    return np.dtype("float64") if real else dtype


def _result(value: Any, error: Any, dtype: Any) -> ndarray:
    """A result. Infinity is exact: no rounding changes it, and what follows from it is as sure."""
    value = np.asarray(value, "float64" if is_floating(np.dtype(dtype)) else dtype)
    return ndarray(value, np.where(np.isinf(value), 0.0, error), dtype)


def _extent(x: ndarray) -> HostArray:
    """How far from its value a right one may be."""
    return limit() * x.error if is_floating(x.dtype) else x.error


def _gap(a: ndarray, b: ndarray) -> HostArray:
    return np.abs(np.subtract(a.value, b.value, dtype="float64"))


def _close(a: ndarray, b: ndarray) -> HostArray:
    """Where rounding may change which of the two is larger."""
    reach = _extent(a) + _extent(b)
    return np.asarray((_gap(a, b) <= reach) & (reach > 0))


def _decision(value: Any, doubt: Any) -> ndarray:
    """A boolean result, with 1 for an error where it is in doubt."""
    return ndarray(np.asarray(value, bool), np.asarray(doubt, "float64"), bool)


def _truth(x: Any) -> tuple[HostArray, HostArray]:
    """Whether x holds, and where that is in doubt."""
    if not isinstance(x, ndarray):
        truth = np.asarray(x).astype(bool)
        return truth, np.zeros(truth.shape, bool)
    if x.dtype == bool:
        return x.value, x.error > 0
    return x.value != 0, _close(x, asarray(0))


Rule = TypeVar("Rule", bound=Callable[..., Any])

_RULES: dict[str, Callable[..., Any]] = {}


def _rule(fn: Rule) -> Rule:
    _RULES[fn.__name__.lstrip("_")] = fn
    return fn


def _rules(names: str) -> Callable[[Rule], Rule]:
    """One rule for several functions; it is told the name."""

    def register(fn: Rule) -> Rule:
        for name in names.split():
            _RULES[name] = partial(fn, name)
        return fn

    return register


# Arithmetic


@_rules("add subtract")
def _sum_of_two(name: str, x: Any, y: Any) -> ndarray:
    (a, b), dtype = _operands(name, x, y)
    value = getattr(np, name)(a.value, b.value)
    return _result(value, a.error + b.error + _rounding(value, dtype), dtype)


@_rule
def _multiply(x: Any, y: Any) -> ndarray:
    (a, b), dtype = _operands("multiply", x, y)
    value = a.value * b.value
    error = np.abs(a.value) * b.error + np.abs(b.value) * a.error + a.error * b.error
    return _result(value, error + _rounding(value, dtype), dtype)


def _least(x: ndarray) -> HostArray:
    """The smallest size that x may have: never zero, so that one can divide by it."""
    least: HostArray = np.maximum(np.abs(x.value) - x.error, np.abs(x.value) * 1e-3)
    return least


@_rule
def _divide(x: Any, y: Any) -> ndarray:
    (a, b), dtype = _operands("divide", x, y)
    value = a.value / b.value
    error = (a.error + np.abs(value) * b.error) / _least(b)
    return _result(value, error + _rounding(value, dtype), dtype)


@_rules("floor_divide remainder fmod")
def _whole_quotient(name: str, x: Any, y: Any) -> ndarray:
    """The quotient is rounded before it is cut, or not, as libraries please."""
    (a, b), dtype = _operands(name, x, y)
    value = getattr(np, name)(a.value, b.value)
    if not (is_floating(dtype) or a.error.any() or b.error.any()):
        return _result(value, 0.0, dtype)
    quotient = _divide(*((a.astype(dtype), b.astype(dtype)) if is_floating(dtype) else (a, b)))
    sure = (a.error == 0) & (b.error == 0) & (np.fmod(a.value, b.value) == 0)
    quotient.error = np.where(sure, 0.0, quotient.error)
    cut = _step("trunc" if name == "fmod" else "floor", quotient)
    if name == "floor_divide":
        return _result(value, cut.error + _rounding(value, dtype), dtype)
    carried = a.error + np.abs(cut.value) * b.error + cut.error * np.abs(b.value)
    return _result(value, carried + _rounding(value, dtype), dtype)


@_rule
def _reciprocal(x: Any) -> Any:
    return _divide(1, x)


@_rule
def _square(x: Any) -> ndarray:
    return _multiply(x, x)


@_rule
def _power(x: Any, exponent: Any) -> ndarray:
    """x^w, by exp and log or by products: four units of its own."""
    (a, w), dtype = _operands("power", x, exponent)
    value = np.power(a.value, w.value)
    if not (is_floating(dtype) or a.error.any() or w.error.any()):
        return _result(value, 0.0, dtype)
    size, most = np.abs(a.value), np.abs(a.value) + a.error
    below_one = np.where(w.value >= 0, np.maximum(size, a.error), _least(a))
    base = np.where(w.value >= 1, most, below_one)
    slope = np.where(w.value == 0, 0.0, np.abs(w.value) * base ** (w.value - 1.0))
    error = np.where(a.error == 0, 0.0, slope * a.error)
    error = error + np.where(w.error == 0, 0.0, np.abs(value * np.log(size)) * w.error)
    exact = (w.error == 0) & ((w.value == 1) | (w.value == 0))
    return _result(value, error + np.where(exact, 0.0, _rounding(value, dtype, 4)), dtype)


@_rules("maximum minimum fmax fmin")
def _chosen(name: str, x: Any, y: Any) -> ndarray:
    """The error is that of the operand that was chosen, or the larger where it was a close call."""
    (a, b), dtype = _operands(name, x, y)
    value = getattr(np, name)(a.value, b.value)
    error = np.where(value == a.value, a.error, b.error)
    return _result(value, np.where(_close(a, b), np.maximum(a.error, b.error), error), dtype)


@_rule
def _clip(x: Any, low: Any, high: Any) -> ndarray:
    if low is None and high is None:
        raise ValueError("clip takes a lower bound, an upper one, or both")
    raised = x if low is None else _chosen("maximum", x, low)
    return raised if high is None else _chosen("minimum", raised, high)


@_rules("negative positive absolute")
def _of_the_same_size(name: str, x: Any) -> ndarray:
    (a,), dtype = _operands(name, x)
    return ndarray(np.asarray(getattr(np, name)(a.value)), a.error.copy(), dtype)


@_rule
def _hypot(x: Any, y: Any) -> ndarray:
    (a, b), dtype = _operands("hypot", x, y)
    value = np.hypot(a.value, b.value)
    carried = (np.abs(a.value) * a.error + np.abs(b.value) * b.error) / np.where(value, value, 1)
    carried = np.where(value <= a.error + b.error, a.error + b.error, carried)
    return _result(value, carried + _rounding(value, dtype, 2), dtype)


@_rule
def _arctan2(y: Any, x: Any) -> ndarray:
    """At the cut, the negative axis, rounding may change the sign of the whole angle."""
    (a, b), dtype = _operands("arctan2", y, x)
    value = np.arctan2(a.value, b.value)
    across = np.abs(b.value) * a.error + np.abs(a.value) * b.error
    carried = np.where(across == 0, 0.0, across / (a.value**2 + b.value**2))
    cut = _close(a, asarray(0)) & (b.value <= _extent(b))
    carried = np.where(cut, 2 * math.pi, np.minimum(carried, 2 * math.pi))
    return _result(value, carried + _rounding(value, dtype, 2), dtype)


@_rule
def _logaddexp(x: Any, y: Any) -> ndarray:
    (a, b), dtype = _operands("logaddexp", x, y)
    value = np.logaddexp(a.value, b.value)
    carried = np.exp(a.value - value) * a.error + np.exp(b.value - value) * b.error
    carried = np.where(np.isnan(carried), np.maximum(a.error, b.error), carried)
    larger = np.maximum(a.value, b.value)  # a sum of it and of a logarithm
    own = _rounding(np.where(np.isfinite(larger), larger, 0), dtype)
    return _result(value, carried + own + _rounding(value, dtype, 2), dtype)


# Functions of one number


def _function(
    value: HostArray, slope: Any, x: ndarray, dtype: Any, times: float | HostArray = 2.0
) -> ndarray:
    """f(x) with |f'| = slope: the incoming error times the slope, and a few units of its own.

    Libraries differ by an ulp or two in such functions: NumPy's vectorised ones reach 4 ulp.
    """
    error = np.where(x.error == 0, 0.0, np.abs(slope) * x.error)
    tiny = float(_finfo(_charged(dtype)).tiny) * ((value == 0) & (x.value != 0))
    return _result(value, error + tiny + _rounding(value, dtype, times), dtype)


_SLOPES: dict[str, Callable[[ndarray, HostArray], Any]] = {
    "exp": lambda x, y: y,
    "exp2": lambda x, y: y * np.log(2),
    "expm1": lambda x, y: y + 1,
    "log": lambda x, y: 1 / _least(x),
    "log2": lambda x, y: 1 / _least(x) / np.log(2),
    "log10": lambda x, y: 1 / _least(x) / np.log(10),
    "log1p": lambda x, y: 1 / _least(ndarray(1 + x.value, x.error, x.dtype)),
    "sin": lambda x, y: np.cos(x.value),
    "cos": lambda x, y: np.sin(x.value),
    "tan": lambda x, y: 1 + y**2,
    "sinh": lambda x, y: np.cosh(x.value),
    "cosh": lambda x, y: np.sinh(x.value),
    "tanh": lambda x, y: 1 - y**2,
    "arcsin": lambda x, y: 1 / np.sqrt(np.maximum(1 - x.value**2, x.error / 2)),
    "arccos": lambda x, y: 1 / np.sqrt(np.maximum(1 - x.value**2, x.error / 2)),
    "arctan": lambda x, y: 1 / (1 + x.value**2),
    "arcsinh": lambda x, y: 1 / np.sqrt(1 + x.value**2),
    "arccosh": lambda x, y: 1 / np.sqrt(np.maximum(x.value**2 - 1, x.error / 2)),
    "arctanh": lambda x, y: 1 / np.maximum(1 - x.value**2, x.error),
    "sqrt": lambda x, y: 1 / (np.sqrt(np.maximum(x.value + x.error, 0)) + y),
}


@_rules(" ".join(_SLOPES))
def _smooth(name: str, x: Any) -> ndarray:
    (a,), dtype = _operands(name, x)
    value = getattr(np, name)(a.value)
    times = 1.0 if name == "sqrt" else 2.0
    return _function(value, _SLOPES[name](a, value), a, dtype, times)


def erf(x: ndarray) -> ndarray:
    """The error function, through the reference body that kernels use, in float64."""
    from nnxp.kernels._erf import erf as on_host

    with np.errstate(all="ignore"):
        slope = 2 / root(math.pi) * np.exp(-(x.value**2))
        return _function(on_host(x.value), slope, x, x.dtype)


def normal_tail(x: ndarray) -> ndarray:
    """1 - Phi(x) for x >= 0, through the reference body that kernels use, in float64.

    The exponential in it is off by x^2 / 2 units, for its argument is rounded.
    """
    from nnxp.kernels._erf import normal_tail as on_host

    with np.errstate(all="ignore"):
        half_square = x.value**2 / 2
        slope = np.exp(-half_square) / root(2 * math.pi)
        return _function(on_host(x.value), slope, x, x.dtype, 2 + half_square)


@_rules("floor ceil rint trunc sign")
def _step(name: str, x: Any) -> ndarray:
    """A function with jumps: both sides of one within the error are right."""
    (a,), dtype = _operands(name, x)
    f = getattr(np, name)
    value, reach = f(a.value), _extent(a)
    if not reach.any():
        return _result(value, np.zeros(a.shape), dtype)
    error = np.maximum(np.abs(f(a.value + reach) - value), np.abs(value - f(a.value - reach)))
    return _result(value, error, dtype)


@_rule
def _round(x: Any, decimals: int = 0) -> ndarray:
    """To decimals, as a library may do it: multiplied by a power of ten, rounded and divided."""
    (a,), dtype = _operands("round", x)
    if not is_floating(dtype):
        return _result(np.round(a.value, decimals), a.error, dtype)
    if decimals == 0:
        return _step("rint", a)
    scale = 10.0 ** abs(decimals)
    first, second = (_multiply, _divide) if decimals > 0 else (_divide, _multiply)
    rounded: ndarray = second(_step("rint", first(a, scale)), scale)
    return rounded


# Decisions


@_rules("equal not_equal greater greater_equal less less_equal")
def _comparison(name: str, x: Any, y: Any) -> ndarray:
    a, b = (_lifted(operand, _common((x, y))) for operand in (x, y))
    return _decision(getattr(np, name)(a.value, b.value), _close(a, b))


@_rules("isfinite isinf isnan")
def _kind_of_number(name: str, x: Any) -> ndarray:
    value = getattr(np, name)(_lifted(x, "float64").value)
    return _decision(value, np.zeros(value.shape))


@_rule
def _signbit(x: Any) -> ndarray:
    a = _lifted(x, "float64")
    return _decision(np.signbit(a.value), _close(a, asarray(0)))


@_rules("logical_and logical_or logical_xor logical_not")
def _logical(name: str, *args: Any) -> ndarray:
    """In doubt if another answer for an operand that is in doubt changes the result."""
    fn, operands = getattr(np, name), [_truth(x) for x in args]
    value, doubt = fn(*(truth for truth, _ in operands)), False
    for flipped in np.ndindex((2,) * len(operands)):
        turned = [
            truth ^ (unsure & bool(f)) for (truth, unsure), f in zip(operands, flipped, strict=True)
        ]
        doubt = doubt | (fn(*turned) != value)
    return _decision(value, doubt)


@_rules("bitwise_and bitwise_or bitwise_xor invert")
def _bitwise(name: str, *args: Any) -> ndarray:
    operands, dtype = _operands(name, *args)
    if dtype == np.dtype(bool):
        logical: ndarray = _logical(
            {"invert": "logical_not"}.get(name, name.replace("bitwise", "logical")), *operands
        )
        return logical
    if any(x.error.any() for x in operands):
        raise NoBound(f"{name} of whole numbers that rounding may change has no bound")
    value = getattr(np, name)(*(x.value for x in operands))
    return _result(value, np.zeros(np.shape(value)), dtype)


@_rule
def _isclose(
    x: Any, y: Any, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False
) -> ndarray:
    a, b = (_floats(_lifted(operand, _common((x, y))), "float64") for operand in (x, y))
    value = np.isclose(a.value, b.value, rtol, atol, equal_nan)
    allowed = atol + rtol * np.abs(b.value)
    reach = _extent(a) + _extent(b) * (1 + rtol) + _rounding(allowed, a.dtype, 2)
    return _decision(value, np.abs(_gap(a, b) - allowed) <= reach)


@_rule
def _where(condition: Any, x: Any, y: Any) -> ndarray:
    """x where the condition holds, else y; where it is in doubt the error spans both."""
    dtype = _operands("where", True, x, y)[1]
    a, b = _all_lifted((x, y), dtype)
    test, doubt = _truth(condition)
    value, error = np.where(test, a.value, b.value), np.where(test, a.error, b.error)
    if doubt.any():
        span = _gap(a, b) + np.maximum(a.error, b.error)
        error = np.where(doubt, np.where(np.isnan(span), np.inf, span), error)
    return ndarray(np.asarray(value, "float64" if is_floating(dtype) else dtype), error, dtype)


@_rule
def _nan_to_num(
    x: Any, copy: bool = True, nan: float = 0.0, posinf: Any = None, neginf: Any = None
) -> ndarray:
    (a,), dtype = _operands("nan_to_num", x)
    if not is_floating(dtype):
        return a.copy()  # type: ignore[no-any-return]
    largest = float(_finfo(dtype).max)
    odd = ~np.isfinite(a.value)
    value = np.nan_to_num(
        a.value, nan=nan, posinf=largest if posinf is None else posinf,
        neginf=-largest if neginf is None else neginf,
    )  # fmt: skip
    return ndarray(value, np.where(odd, _rounding(value, dtype), a.error), dtype)


@_rule
def _astype(x: ndarray, dtype: Any) -> ndarray:
    dtype = dtype_of(dtype)
    if dtype == np.dtype(bool):
        return _decision(*_truth(x))
    if not is_floating(dtype):
        cut = _step("trunc", x) if is_floating(x.dtype) else x
        return ndarray(cut.value.astype(dtype), cut.error.copy(), dtype)
    value = x.value.astype("float64")
    if not is_floating(x.dtype):  # a whole number, rounded once: what that does is known
        off = np.abs(value.astype(dtype).astype("float64") - value)
        return ndarray(value, x.error + off, dtype)
    error = x.error
    if unit_roundoff(dtype) > unit_roundoff(x.dtype):
        error = error + _rounding(x.value, dtype)
    return ndarray(value.copy(), error.copy(), dtype)


# What moves elements and computes nothing


def _moved(x: ndarray, move: Callable[[HostArray], Any]) -> Any:
    value, error = move(x.value), move(x.error)
    if isinstance(value, list):
        return [x._like(*part) for part in zip(value, error, strict=True)]
    return x._like(np.asarray(value), np.asarray(error))


@_rules(
    """broadcast_to copy diagonal expand_dims flip moveaxis repeat reshape roll sliding_window_view
    split squeeze swapaxes tile transpose tril triu"""
)
def _movement(name: str, x: Any, **options: Any) -> Any:
    plain = {key: _plain(value) for key, value in options.items()}
    return _moved(_lifted(x, "float64"), lambda values: compute(np, name, (values,), plain))


@_rules("concatenate stack")
def _together(name: str, *parts: Any, axis: Any = 0) -> ndarray:
    dtype = _common(parts)
    arrays = _all_lifted(parts, dtype)
    join = getattr(np, name)
    value = join([x.value for x in arrays], axis=axis)
    return ndarray(value, join([x.error for x in arrays], axis=axis), dtype)


@_rule
def _pad(x: ndarray, pad_width: Any, mode: str = "constant", constant_values: Any = 0) -> ndarray:
    if mode not in ("constant", "edge", "reflect", "symmetric", "wrap"):
        raise NoBound(f"no bound is known for pad in mode {mode!r}")
    fill = {"constant_values": constant_values} if mode == "constant" else {}
    value = np.pad(x.value, pad_width, mode, **fill)  # type: ignore[call-overload]
    return x._like(value, np.pad(x.error, pad_width, mode))  # type: ignore[call-overload]


@_rule
def _getitem(x: ndarray, key: Any) -> ndarray:
    keys = key if isinstance(key, tuple) else (key,)
    unsure = [k for k in keys if isinstance(k, ndarray) and k.error.any()]
    if any(k.dtype == bool for k in unsure):
        raise NoBound("x[mask] of a mask that rounding may change: its shape is in doubt")
    at = tuple(k.value if isinstance(k, ndarray) else _plain(k) for k in keys)
    if isinstance(key, list):
        at = (_plain(key),)
    if not unsure:
        return _moved(x, lambda values: values[at])  # type: ignore[no-any-return]
    places = np.arange(x.size).reshape(x.shape)  # what is elsewhere if an index is, is in doubt
    other = tuple(
        np.where(k.error > 0, np.where(k.value > 0, k.value - 1, k.value + 1), k.value)
        if isinstance(k, ndarray) else plain for k, plain in zip(keys, at, strict=True)
    )  # fmt: skip
    return _anywhere(x, x.value[at], x.error[at], places[at] != places[other], None)


def _anywhere(x: ndarray, value: Any, error: Any, doubt: Any, axis: int | None) -> ndarray:
    """What was looked up by an index in doubt may be any element along the axis."""
    kept: Any = axis is not None
    low, high = (f(x.value, axis=axis, keepdims=kept) for f in (np.min, np.max))
    most = np.max(x.error, axis=axis, keepdims=kept)
    span = np.maximum(
        np.subtract(high, value, dtype="float64"), np.subtract(value, low, dtype="float64")
    )
    return x._like(np.asarray(value), np.where(doubt, span + most, error))


@_rule
def _take(x: ndarray, indices: Any, axis: int | None = None) -> ndarray:
    at = indices if isinstance(indices, ndarray) else asarray(np.asarray(indices))
    value, error = (np.take(of_x, at.value, axis=axis) for of_x in (x.value, x.error))
    if not at.error.any():
        return x._like(np.asarray(value), np.asarray(error))
    doubt, rest = at.error > 0, 0 if axis is None else x.ndim - 1 - axis % x.ndim
    doubt = doubt.reshape(doubt.shape + (1,) * rest)
    return _anywhere(x, value, error, doubt, None)


@_rule
def _take_along_axis(x: ndarray, indices: ndarray, axis: int) -> ndarray:
    value, error = (np.take_along_axis(of_x, indices.value, axis) for of_x in (x.value, x.error))
    if not indices.error.any():
        return x._like(value, error)
    return _anywhere(x, value, error, indices.error > 0, axis)


@_rule
def _diff(x: ndarray, n: int = 1, axis: int = -1) -> ndarray:
    apart = _RULES["not_equal" if x.dtype == bool else "subtract"]
    x = x.swapaxes(axis, 0)
    for _ in range(n):
        x = apart(x[1:], x[:-1])
    moved: ndarray = x.swapaxes(axis, 0)
    return moved


@_rule
def _scatter(*values: ndarray, shape: Shape, keys: tuple[Any, ...]) -> ndarray:
    parts = [_lifted(value, values[0].dtype) for value in values]

    def add(*arrays: HostArray) -> HostArray:
        return compute(np, "scatter", arrays, {"shape": shape, "keys": _plain(keys)})  # type: ignore[no-any-return]

    return _added_up(add, parts)


@_rule
def _segment_sum(values: ndarray, ids: Any, size: int) -> ndarray:
    at = ids if isinstance(ids, ndarray) else asarray(ids)
    if at.error.any():
        raise NoBound("segment_sum by ids that rounding may change")

    def add(array: HostArray) -> HostArray:
        return compute(np, "segment_sum", (array, at.value), {"size": size})  # type: ignore[no-any-return]

    return _added_up(add, [values])


def _added_up(add: Callable[..., HostArray], arrays: Sequence[ndarray]) -> ndarray:
    """Sums of the elements that come to lie in the same place, which may be one."""
    dtype = arrays[0].dtype
    value, terms = add(*(x.value for x in arrays)), add(*(np.ones(x.shape) for x in arrays))
    own, carried = _error_of_sums(add, arrays, value, terms)
    own = np.where(terms > 1, own + _rounding(value, dtype), 0.0)
    return _result(value, own + carried, dtype)


def _error_of_sums(
    add: Callable[..., HostArray], arrays: Sequence[ndarray], value: HostArray, terms: Any
) -> tuple[HostArray, HostArray]:
    """What sums of `terms` terms, `value`, are off by their own roundings and by their operands'.

    `add` makes the sums, of an array for each of `arrays`.
    """
    own = _own_error(add, [x.value for x in arrays], value, terms, arrays[0].dtype)
    if _rigorous.get():
        return own, add(*(x.error for x in arrays))
    return own, np.sqrt(add(*(x.error**2 for x in arrays)))


def _own_error(
    add: Callable[..., Any], parts: Sequence[HostArray], value: HostArray, terms: Any, dtype: Any
) -> HostArray:
    """The rounding over the partial sums of `terms` terms, which `add` makes of these parts."""
    u = unit_roundoff(_charged(dtype))
    if _rigorous.get():
        return terms * u * add(*map(np.abs, parts))  # type: ignore[no-any-return]
    spread = np.sqrt(add(*(part**2 for part in parts)))
    return u * np.sqrt(terms) * (np.abs(value) / root(3) + spread / root(2))  # type: ignore[no-any-return]


# Products


def _product(
    name: str, arrays: Sequence[ndarray], options: dict[str, Any], terms: int, dtype: Any
) -> ndarray:
    """A product that is linear in each of its arrays, with sums of so many terms."""

    def times(*factors: HostArray) -> Any:
        return np.asarray(compute(np, name, factors, options))

    values = [x.value for x in arrays]
    sizes = [np.abs(value).astype("float64") for value in values]
    value = times(*values)
    whole = not is_floating(dtype)
    own = 0.0 if whole else _own_error(times, sizes, value, terms, dtype)
    stages = max(1, len(arrays) - 1)
    carried = _carried([x.error for x in arrays], sizes, times, whole)
    return _result(value, stages * (own + _rounding(value, dtype)) + carried, dtype)


def _carried(
    errors: list[HostArray], sizes: list[HostArray], times: Callable[..., Any], whole: bool
) -> Any:
    """What the operands' errors add to a product: in quadrature, for they are independent."""
    total = 0.0
    proven = whole or _rigorous.get()
    for i, error in enumerate(errors):
        if error.any():
            factors = [*sizes[:i], error, *sizes[i + 1 :]]
            if proven:  # the others may be larger by what they are off
                factors = [
                    size + e if j > i else size
                    for j, (size, e) in enumerate(zip(factors, errors, strict=True))
                ]
            total = total + (times(*factors) if proven else times(*(f**2 for f in factors)))
    return total if proven else np.sqrt(total)


def _factors(*arrays: Any) -> tuple[list[ndarray], np.dtype[Any]]:
    dtype = _common(arrays)
    return _all_lifted(arrays, dtype), dtype


@_rules("matmul dot")
def _matmul(name: str, x: Any, y: Any) -> ndarray:
    arrays, dtype = _factors(x, y)
    if name == "dot" and not all(x.ndim for x in arrays):
        return _multiply(x, y)
    return _product(name, arrays, {}, arrays[0].shape[-1], dtype)


@_rule
def _outer(x: Any, y: Any) -> ndarray:
    return _multiply(x.reshape(-1, 1), y.reshape(1, -1))


@_rule
def _tensordot(x: Any, y: Any, axes: Any = 2) -> ndarray:
    arrays, dtype = _factors(x, y)
    met, _ = met_axes(axes, *(x.ndim for x in arrays))
    terms = math.prod(arrays[0].shape[i] for i in met)
    return _product("tensordot", arrays, {"axes": axes}, terms, dtype)


@_rule
def _einsum(*operands: Any, subscripts: str) -> ndarray:
    arrays, dtype = _factors(*operands)
    letters, kept = einsum_terms(subscripts, [x.ndim for x in arrays])
    sizes = {c: n for of_x, x in zip(letters, arrays, strict=True)
             for c, n in zip(of_x, x.shape, strict=True)}  # fmt: skip
    terms = math.prod(n for c, n in sizes.items() if c not in kept)
    return _product("einsum", arrays, {"subscripts": subscripts}, max(1, terms), dtype)


@linear.on("bounded")
def _linear(
    x: ndarray,
    weight: ndarray,
    bias: ndarray | None = None,
    *,
    activation: Kernel = identity,
    precision: str | None = None,
) -> Any:
    """x @ weight + bias, with the bias as one more term of the sum: weight 1 for it in x.

    A library may start the accumulation from the bias, as MKL does for torch. Then every partial
    sum has its size, so that it is rounded K times: where the products are small beside the bias,
    that is up to sqrt(K) times as much as adding it at the end. 16-bit types are summed in float32.
    """
    own = x.dtype
    if own.itemsize == 2:
        x, weight = x.astype("float32"), weight.astype("float32")
        bias = None if bias is None else bias.astype("float32")
    if bias is not None:
        one = np.ones((*x.shape[:-1], 1))
        x = _together("concatenate", x, ndarray(one, np.zeros(one.shape), x.dtype), axis=-1)
        weight = _together("concatenate", weight, bias.reshape(1, -1), axis=0)
    return activation(matmul_kernel(x, weight)).astype(own)


# Sums and what else looks along axes


@average_pool.on("bounded")
def _average_pool(
    x: ndarray, *, window: tuple[int, ...], count_include_pad: bool = False, **options: Any
) -> Any:
    """The sum along each axis as one of so many terms, which a library may add in any order: that a
    partial sum happens to be small says nothing. 16-bit types are summed in float32."""
    own, over = x.dtype, _pooled("average_pool", x, window, options)
    x = x.astype("float32") if own.itemsize == 2 else x
    y = padded(x, over.pads)
    for axis in range(1, len(over.window) + 1):
        y = _sum(_together("stack", *seen_along(y, over, axis)), axis=0)
    return (y / counted(x, over, count_include_pad)).astype(own)


def _as_asked(x: ndarray, dtype: Any) -> ndarray:
    return x if dtype is None else x.astype(dtype)


@_rule
def _sum(x: ndarray, axis: Any = None, dtype: Any = None, keepdims: Any = False) -> ndarray:
    x = _as_asked(x, dtype)

    def add(values: HostArray) -> HostArray:
        return np.asarray(np.sum(values, axis=axis, keepdims=keepdims))

    if not is_floating(x.dtype):  # exact, unless some are in doubt: all of them may be off at once
        value = np.asarray(np.sum(x.value, axis=axis, keepdims=keepdims, dtype=dtype))
        return ndarray(value, add(x.error), value.dtype)
    value = add(x.value)
    terms = max(1, x.size // max(1, value.size))
    own, carried = _error_of_sums(add, [x], value, terms)
    return _result(value, own + carried + _rounding(value, x.dtype), x.dtype)


@_rule
def _mean(x: ndarray, axis: Any = None, dtype: Any = None, keepdims: bool = False) -> ndarray:
    x = _floats(_as_asked(x, dtype), "float64")
    total = _sum(x, axis=axis, keepdims=keepdims)
    return _divide(total, float(x.size // max(1, total.size)))


@_rule
def _var(
    x: ndarray, axis: Any = None, dtype: Any = None, ddof: int = 0, keepdims: bool = False
) -> ndarray:
    """The mean square distance from the mean, in two passes."""
    x = _floats(_as_asked(x, dtype), "float64")
    far = _square(_sum_of_two("subtract", x, _mean(x, axis=axis, keepdims=True)))
    total = _sum(far, axis=axis, keepdims=keepdims)
    return _divide(total, float(max(0, x.size // max(1, total.size) - ddof)))


@_rule
def _std(x: ndarray, **options: Any) -> ndarray:
    return _smooth("sqrt", _var(x, **options))


@_rule
def _norm(x: ndarray, ord: Any = None, axis: Any = None, keepdims: bool = False) -> ndarray:
    """The length of vectors along an axis; of a matrix the Frobenius norm."""
    many = x.ndim if axis is None else np.size(axis)
    if not (ord is None or many == 1 or (ord == "fro" and many == 2)):
        raise NoBound(f"no bound is known for the matrix norm {ord!r}; axis= makes it one of rows")
    x = _floats(x, "float64")
    size, along = _of_the_same_size("absolute", x), {"axis": axis, "keepdims": keepdims}
    if ord in (None, 2, "fro"):
        return _smooth("sqrt", _sum(_square(x), **along))
    if ord in (np.inf, -np.inf):
        return _extreme("max" if ord > 0 else "min", size, **along)
    if ord == 0:
        return _sum(_comparison("not_equal", x, 0).astype(x.dtype), **along)
    return _power(_sum(_power(size, ord), **along), 1 / ord)


@_rules("max min")
def _extreme(name: str, x: ndarray, axis: Any = None, keepdims: Any = False) -> ndarray:
    """No further off than any that may be the extreme: what is masked by -1e38 is not."""
    value = np.asarray(getattr(np, name)(x.value, axis=axis, keepdims=keepdims))
    up, reach = x.value * (1.0 if name == "max" else -1.0), limit() * x.error
    with np.errstate(invalid="ignore"):
        beaten = up + reach < np.max(up - reach, axis=axis, keepdims=True)
    error = np.where(beaten, 0.0, x.error)
    return x._like(value, np.asarray(np.max(error, axis=axis, keepdims=keepdims)))


@_rule
def _ptp(x: ndarray, axis: Any = None, keepdims: bool = False) -> ndarray:
    high, low = (_extreme(name, x, axis=axis, keepdims=keepdims) for name in ("max", "min"))
    return _sum_of_two("subtract", high, low)


@_rule
def _median(
    x: ndarray, axis: Any = None, overwrite_input: bool = False, keepdims: Any = False
) -> ndarray:
    """No further off than the element that is off furthest."""
    x = _floats(x, "float64")
    value = np.asarray(np.median(x.value, axis=axis, keepdims=keepdims))
    most = np.max(x.error, axis=axis, keepdims=keepdims)
    return _result(value, most + _rounding(value, x.dtype), x.dtype)


@_rules("argmax argmin")
def _place(name: str, x: ndarray, axis: int | None = None, keepdims: bool = False) -> ndarray:
    """Where the extreme is; in doubt, with the distance to the furthest that may be it."""
    value = np.asarray(getattr(np, name)(x.value, axis=axis, keepdims=True))
    flat = x.reshape(-1) if axis is None else x
    along = axis or 0
    at = value.reshape(-1) if axis is None else value
    best = _moved(flat, lambda values: np.take_along_axis(values, at, along))
    shape = [-1 if i == along % flat.ndim else 1 for i in range(flat.ndim)]
    place = np.arange(flat.shape[along]).reshape(shape)
    far = np.where(_close(flat, best), np.abs(place - at), 0)
    error = far.max(axis=along, keepdims=True).astype("float64").reshape(value.shape)
    if not keepdims:
        value, error = (of_place.squeeze(axis) for of_place in (value, error))
    return ndarray(np.asarray(value), np.asarray(error), value.dtype)


@_rules("all any")
def _all(name: str, x: Any, axis: Any = None, keepdims: bool = False) -> ndarray:
    truth, doubt = _truth(x)
    decide = partial(getattr(np, name), axis=axis, keepdims=keepdims)
    low, high = decide(truth & ~doubt), decide(truth | doubt)
    return _decision(decide(truth), low != high)


@_rule
def _count_nonzero(x: Any, axis: Any = None) -> ndarray:
    return _sum(_decision(*_truth(x)), axis=axis)


@_rule
def _prod(x: ndarray, axis: Any = None, dtype: Any = None, keepdims: Any = False) -> ndarray:
    """Halves multiplied with halves, until one is left."""
    x = _as_asked(x, dtype)
    axes = range(x.ndim) if axis is None else np.atleast_1d(axis) % max(1, x.ndim)
    kept = np.prod(x.value, axis=axis, keepdims=keepdims, dtype=dtype)
    if not is_floating(x.dtype):
        x = x.astype(kept.dtype)
    for along in axes:
        x = x.swapaxes(along, 0)
        while len(x) > 1:
            half = len(x) // 2
            rest = [x[2 * half :]] if len(x) % 2 else []
            x = _together("concatenate", _multiply(x[:half], x[half : 2 * half]), *rest)
        x = x if len(x) else asarray(np.ones((1, *x.shape[1:]), x.dtype))
        x = x.swapaxes(along, 0)
    result: ndarray = x.reshape(np.shape(kept))
    return result


@_rule
def _cumsum(x: ndarray, axis: int | None = None, dtype: Any = None) -> ndarray:
    x = _as_asked(x, dtype)
    x, along = (x.reshape(-1), 0) if axis is None else (x, axis)
    add: Callable[..., HostArray] = partial(np.cumsum, axis=along)
    value = np.cumsum(x.value, axis=along, dtype=None if is_floating(x.dtype) else dtype)
    if not is_floating(x.dtype):
        return ndarray(value, add(x.error), value.dtype)
    own, carried = _error_of_sums(add, [x], value, add(np.ones(x.shape)))
    return _result(value, own + carried + _rounding(value, x.dtype), x.dtype)


@_rule
def _cumprod(x: ndarray, axis: int | None = None, dtype: Any = None) -> ndarray:
    x = _as_asked(x, dtype)
    x, along = (x.reshape(-1), 0) if axis is None else (x, axis)
    if not is_floating(x.dtype):
        x = x.astype(np.cumprod(np.ones(1, x.dtype), dtype=dtype).dtype)
    products = list(accumulate(x.swapaxes(along, 0), _multiply))
    moved: ndarray = _together("stack", *products).swapaxes(along, 0) if products else x
    return moved


@_rule
def _sort(x: ndarray, axis: int = -1) -> ndarray:
    """No element is further off than the one that is off furthest."""
    most = np.max(x.error, axis=axis, keepdims=True, initial=0)
    return x._like(np.sort(x.value, axis=axis), np.broadcast_to(most, x.shape).copy())


@_rule
def _argsort(x: ndarray, axis: int = -1, kind: Any = None) -> ndarray:
    """The order; within a run of near or exact ties any order is right."""
    values, reach = (np.moveaxis(of_x, axis, -1) for of_x in (x.value, _extent(x)))
    order = np.argsort(values, axis=-1, kind="stable")
    error = np.zeros(order.shape)
    if order.shape[-1] > 1:
        most = reach.max(axis=-1, keepdims=True)
        apart = np.diff(np.take_along_axis(values, order, -1).astype("float64"), axis=-1) > 2 * most
        starts = np.concatenate([np.ones((*order.shape[:-1], 1), bool), apart], axis=-1).ravel()
        run = np.cumsum(starts) - 1  # the number of each element's run of ties
        first, flat = np.flatnonzero(starts), order.ravel()
        low, high = (f.reduceat(flat, first)[run] for f in (np.minimum, np.maximum))
        error = np.maximum(flat - low, high - flat).reshape(order.shape).astype("float64")
    return ndarray(np.moveaxis(order, -1, axis), np.moveaxis(error, -1, axis), order.dtype)


# Arrays from nothing


@_rules("arange eye full linspace ones zeros empty full_like ones_like zeros_like empty_like")
def _created(name: str, *like: Any, **options: Any) -> ndarray:
    plain = {key: _plain(value) for key, value in options.items()}
    if isinstance(fill := options.get("fill_value"), ndarray):
        plain["fill_value"] = fill.value.astype(fill.dtype)
    created = compute(np, name, tuple(np.empty(x.shape, x.dtype) for x in like), plain)
    if name.startswith("empty"):
        created.fill(np.nan if is_floating(created.dtype) else 0)
    steps = name in ("arange", "linspace") and is_floating(created.dtype)
    y = asarray(created)
    if steps:  # a start and so many steps, each of them rounded
        most = np.broadcast_to(np.abs(y.value).max(initial=0), y.shape)
        y.error = _rounding(most, y.dtype, 3)
    return y


def __getattr__(name: str) -> Any:
    return _library.module_attribute(ndarray, name)
