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
instead of averaging out. The error is a unit, not a limit: a comparison accepts a multiple of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import reduce as fold
from math import sqrt as root
from typing import Any, TypeVar

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from nnxp._arrays import HostArray, float_dtype, is_floating
from nnxp._errors import NnxpError
from nnxp.kernels import Kernel, identity, linear
from nnxp.kernels import matmul as matmul_kernel

_rigorous: ContextVar[bool] = ContextVar("nnxp_rigorous", default=False)
_coarsest: ContextVar[Any] = ContextVar("nnxp_coarsest", default=None)

bool_, float32, float64, newaxis, pi = np.bool_, np.float32, np.float64, np.newaxis, np.pi


class NoBound(NnxpError, AttributeError):
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


def _charged(dtype: Any) -> Any:
    """The type whose rounding is charged for a computation in dtype."""
    most = _coarsest.get()
    coarser = (
        most is not None
        and is_floating(np.dtype(dtype))
        and unit_roundoff(dtype) > unit_roundoff(most)
    )
    return most if coarser else dtype


def unit_roundoff(dtype: Any) -> float:
    """The largest relative error of rounding to nearest: 2^-24 for float32."""
    return float(_finfo(dtype).eps) / 2


def _finfo(dtype: Any) -> Any:
    kind = np.dtype(dtype)
    if kind.kind == "V":
        import ml_dtypes

        return ml_dtypes.finfo(kind)  # type: ignore[no-untyped-call]
    return np.finfo(kind)


def _rounding(value: HostArray, dtype: Any, times: float = 1.0) -> HostArray:
    """What storing `value` in dtype may add, `times` over; small results may be flushed to zero."""
    dtype = _charged(dtype)
    info = _finfo(dtype)
    floor = float(info.smallest_subnormal if np.dtype(dtype) == np.float16 else info.tiny)
    with np.errstate(invalid="ignore"):
        return times * unit_roundoff(dtype) * np.abs(value) + floor


class ndarray(NDArrayOperatorsMixin):
    """Values in float64 with the error that computing them in `dtype` may have."""

    device = "cpu"

    def __init__(self, value: HostArray, error: HostArray, dtype: Any) -> None:
        self.value, self.error, self.dtype = value, error, np.dtype(dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def ndim(self) -> int:
        return self.value.ndim

    @property
    def size(self) -> int:
        return self.value.size

    @property
    def itemsize(self) -> int:
        return int(self.dtype.itemsize)

    @property
    def nbytes(self) -> int:
        return self.size * self.itemsize

    @property
    def T(self) -> ndarray:
        return self._like(self.value.T, self.error.T)

    def __len__(self) -> int:
        return len(self.value)

    def __repr__(self) -> str:
        return f"<bounded.ndarray {self.dtype}{list(self.shape)}>"

    def _like(self, value: HostArray, error: HostArray) -> ndarray:
        return ndarray(value, error, self.dtype)

    def __getitem__(self, key: Any) -> ndarray:
        key = _plain(key)
        return self._like(np.asarray(self.value[key]), np.asarray(self.error[key]))

    def __setitem__(self, key: Any, value: Any) -> None:
        given, key = _bounded(value, self.dtype).astype(self.dtype), _plain(key)
        self.value[key], self.error[key] = given.value, given.error

    def __bool__(self) -> bool:
        return bool(self.value)

    def __float__(self) -> float:
        return float(self.value)

    def astype(self, dtype: Any, copy: bool = True) -> ndarray:
        kind = np.dtype(dtype) if str(dtype) != "bfloat16" else float_dtype(dtype)
        error = self.error
        if is_floating(kind) and unit_roundoff(kind) > unit_roundoff(self.dtype):
            error = error + _rounding(self.value, kind)
        return ndarray(self.value.copy(), error.copy(), kind)

    def copy(self) -> ndarray:
        return self._like(self.value.copy(), self.error.copy())

    def reshape(self, *shape: Any) -> ndarray:
        return self._like(self.value.reshape(*shape), self.error.reshape(*shape))

    def swapaxes(self, a: int, b: int) -> ndarray:
        return self._like(self.value.swapaxes(a, b), self.error.swapaxes(a, b))

    def transpose(self, *axes: Any) -> ndarray:
        return self._like(self.value.transpose(*axes), self.error.transpose(*axes))

    def sum(self, axis: Any = None, keepdims: bool = False) -> ndarray:
        return _sum(self, axis, keepdims)

    def mean(self, axis: Any = None, keepdims: bool = False) -> ndarray:
        total = _sum(self, axis, keepdims)
        return _divide(total, max(1, self.size // max(1, total.size)))

    def max(self, axis: Any = None, keepdims: bool = False) -> ndarray:
        return self._extreme(np.max, axis, keepdims)

    def min(self, axis: Any = None, keepdims: bool = False) -> ndarray:
        return self._extreme(np.min, axis, keepdims)

    def _extreme(self, choose: Callable[..., Any], axis: Any, keepdims: bool) -> ndarray:
        value = np.asarray(choose(self.value, axis=axis, keepdims=keepdims))
        error = np.asarray(np.max(self.error, axis=axis, keepdims=keepdims))
        return self._like(value, error)

    def argmax(self, axis: Any = None) -> Any:
        return self.value.argmax(axis)

    def __array__(self, *args: object, **kwargs: object) -> Any:
        raise TypeError("a bounded array does not become a NumPy array: take its .value")

    def __array_ufunc__(self, ufunc: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        rule = _RULES.get(ufunc.__name__)
        if rule is None or method != "__call__":
            raise NoBound(f"no bound is known for {ufunc.__name__}.{method}")
        out = kwargs.pop("out", None)
        return _into(out[0] if isinstance(out, tuple) else out, rule(*args, **kwargs))

    def __array_function__(self, fn: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return __getattr__(fn.__name__)(*args, **kwargs)


def asarray(x: Any, dtype: Any = None, error: Any = 0.0) -> ndarray:
    """x as it is, without error unless one is given; its dtype is the one to be analysed."""
    if isinstance(x, ndarray):
        return x if dtype is None else x.astype(dtype)
    host = np.asarray(x)
    value = host.astype("float64")
    errors = np.broadcast_to(np.asarray(error, "float64"), value.shape).copy()
    made = ndarray(value, errors, host.dtype)
    return made if dtype is None else made.astype(dtype)


def stored(x: ndarray, charged: Any) -> ndarray:
    """x with the rounding to its own type, if that is coarser than what has been charged."""
    own = charged is not None and is_floating(x.dtype)
    if own and unit_roundoff(x.dtype) > unit_roundoff(charged):
        return x._like(x.value, x.error + _rounding(x.value, x.dtype))
    return x


def _plain(key: Any) -> Any:
    if isinstance(key, tuple):
        return tuple(map(_plain, key))
    return key.value.astype(key.dtype) if isinstance(key, ndarray) else key


def _bounded(x: Any, dtype: Any) -> ndarray:
    """An operand: Python scalars take the type of the arrays, and are rounded to it."""
    if isinstance(x, ndarray):
        return x
    if isinstance(x, np.ndarray | np.generic):
        return asarray(x)
    exact = np.float64(x)
    if not is_floating(np.dtype(dtype)):
        return ndarray(np.asarray(exact), np.zeros(()), dtype)
    with np.errstate(over="ignore", under="ignore"):
        stored = np.float64(np.asarray(x).astype(_charged(dtype)))
    off = np.abs(stored - exact) if np.isfinite(stored) else np.zeros(())
    return ndarray(np.asarray(exact), np.asarray(off), dtype)


def _operands(*args: Any) -> tuple[list[ndarray], np.dtype[Any]]:
    kinds = [a.dtype for a in args if isinstance(a, ndarray | np.ndarray | np.generic)]
    dtype = fold(np.promote_types, kinds)
    return [_bounded(a, dtype) for a in args], dtype


def _into(out: ndarray | None, result: Any) -> Any:
    if out is None:
        return result
    out[...] = result
    return out


def _made(value: HostArray, error: HostArray, dtype: Any) -> ndarray:
    """A result. Infinity is exact: no rounding changes it, and what follows from it is as sure."""
    return ndarray(value, np.where(np.isinf(value), 0.0, error), dtype)


Rule = TypeVar("Rule", bound=Callable[..., Any])

_RULES: dict[str, Callable[..., Any]] = {}


def _rule(fn: Rule) -> Rule:
    _RULES[fn.__name__.lstrip("_")] = fn
    return fn


@_rule
def _add(x: Any, y: Any) -> ndarray:
    (a, b), dtype = _operands(x, y)
    value = a.value + b.value
    return _made(value, a.error + b.error + _rounding(value, dtype), dtype)


@_rule
def _subtract(x: Any, y: Any) -> ndarray:
    (a, b), dtype = _operands(x, y)
    value = a.value - b.value
    return _made(value, a.error + b.error + _rounding(value, dtype), dtype)


@_rule
def _multiply(x: Any, y: Any) -> ndarray:
    (a, b), dtype = _operands(x, y)
    value = a.value * b.value
    error = np.abs(a.value) * b.error + np.abs(b.value) * a.error + a.error * b.error
    return _made(value, error + _rounding(value, dtype), dtype)


@_rule
def _divide(x: Any, y: Any) -> ndarray:
    (a, b), dtype = _operands(x, y)
    value = a.value / b.value
    smallest = np.maximum(np.abs(b.value) - b.error, np.abs(b.value) * 1e-3)
    with np.errstate(divide="ignore", invalid="ignore"):
        error = (a.error + np.abs(value) * b.error) / smallest
    return _made(value, error + _rounding(value, dtype), dtype)


@_rule
def _reciprocal(x: Any) -> Any:
    return _divide(1, x)


@_rule
def _maximum(x: Any, y: Any) -> ndarray:
    return _chosen(np.maximum, x, y)


@_rule
def _minimum(x: Any, y: Any) -> ndarray:
    return _chosen(np.minimum, x, y)


def _chosen(choose: Callable[..., Any], x: Any, y: Any) -> ndarray:
    """The error is that of the operand that was chosen, or the larger where it was a close call."""
    (a, b), dtype = _operands(x, y)
    value = np.asarray(choose(a.value, b.value))
    error = np.where(value == a.value, a.error, b.error)
    with np.errstate(invalid="ignore"):
        close = np.abs(a.value - b.value) <= 10 * (a.error + b.error)
    return ndarray(value, np.where(close, np.maximum(a.error, b.error), error), dtype)


@_rule
def _negative(x: ndarray) -> ndarray:
    return x._like(-x.value, x.error.copy())


@_rule
def _absolute(x: ndarray) -> ndarray:
    return x._like(np.abs(x.value), x.error.copy())


@_rule
def _square(x: ndarray) -> ndarray:
    return _multiply(x, x)


@_rule
def _power(x: ndarray, exponent: Any) -> ndarray:
    if isinstance(exponent, int) and exponent > 0:
        return fold(_multiply, [x] * exponent)
    raise NoBound(f"no bound is known for powers other than positive whole ones: {exponent!r}")


def _function(
    value: HostArray, slope: Any, x: ndarray, times: float = 2.0, dtype: Any = None
) -> ndarray:
    """f(x) with |f'| = slope: the incoming error times the slope, and a few units of its own.

    Libraries differ by an ulp or two in such functions: NumPy's vectorised ones reach 4 ulp.
    """
    with np.errstate(invalid="ignore"):
        error = np.where(x.error == 0, 0.0, np.abs(slope) * x.error)
    return _made(value, error + _rounding(value, x.dtype, times), x.dtype)


@_rule
def _exp(x: ndarray) -> ndarray:
    with np.errstate(over="ignore"):
        value = np.exp(x.value)
    return _function(value, value, x)


@_rule
def _expm1(x: ndarray) -> ndarray:
    return _function(np.expm1(x.value), np.exp(x.value), x)


@_rule
def _log(x: ndarray) -> ndarray:
    return _function(np.log(x.value), 1 / x.value, x)


@_rule
def _log1p(x: ndarray) -> ndarray:
    return _function(np.log1p(x.value), 1 / (1 + x.value), x)


@_rule
def _tanh(x: ndarray) -> ndarray:
    value = np.tanh(x.value)
    return _function(value, 1 - value**2, x)


@_rule
def _sin(x: ndarray) -> ndarray:
    return _function(np.sin(x.value), np.cos(x.value), x)


@_rule
def _cos(x: ndarray) -> ndarray:
    return _function(np.cos(x.value), np.sin(x.value), x)


@_rule
def _sqrt(x: ndarray) -> ndarray:
    value = np.sqrt(x.value)
    error = np.sqrt(x.value + x.error) - value
    return _made(value, error + _rounding(value, x.dtype), x.dtype)


@_rule
def erf(x: ndarray) -> ndarray:
    """The error function, through the reference body that kernels use, in float64."""
    from nnxp.kernels._erf import erf as on_host

    slope = 2 / root(pi) * np.exp(-(x.value**2))
    return _function(on_host(x.value), slope, x)


def _comparison(name: str) -> Callable[..., Any]:
    """A function whose answers are booleans: asked of the values, and exact."""
    fn = getattr(np, name)

    def compare(*args: Any) -> Any:
        return fn(*(a.value if isinstance(a, ndarray) else a for a in args))

    return compare


for _name in """equal greater greater_equal isfinite isinf isnan less less_equal logical_and
    logical_not logical_or not_equal""".split():
    _RULES[_name] = _comparison(_name)


@_rule
def _matmul(x: Any, y: Any) -> ndarray:
    (a, b), dtype = _operands(x, y)
    value = np.matmul(a.value, b.value)
    carried = _carried(a, b, np.matmul)
    terms = a.shape[-1]
    if _rigorous.get():
        size = np.matmul(np.abs(a.value), np.abs(b.value))
        own = terms * unit_roundoff(_charged(dtype)) * size
    else:
        size = np.sqrt(np.matmul(a.value**2, b.value**2))
        own = _walk(value, size, terms, dtype)
    return _made(value, own + carried + _rounding(value, dtype), dtype)


@linear.on("bounded")
def _linear(
    x: ndarray, weight: ndarray, bias: ndarray | None = None, *, activation: Kernel = identity
) -> Any:
    """x @ weight + bias, with the bias as one more term of the sum: weight 1 for it in x.

    A library may start the accumulation from the bias, as MKL does for torch. Then every partial
    sum has its size, so that it is rounded K times: where the products are small beside the bias,
    that is up to sqrt(K) times as much as adding it at the end. 16-bit types are summed in float32.
    """
    kind = x.dtype
    if kind.itemsize == 2:
        x, weight = x.astype("float32"), weight.astype("float32")
        bias = None if bias is None else bias.astype("float32")
    if bias is not None:
        one = np.ones((*x.shape[:-1], 1))
        x = _concatenate([x, ndarray(one, np.zeros(one.shape), x.dtype)], axis=-1)
        weight = _concatenate([weight, bias.reshape(1, -1)], axis=0)
    return activation(matmul_kernel(x, weight)).astype(kind)


def _carried(a: ndarray, b: ndarray, product: Callable[..., Any]) -> Any:
    """What the operands' errors add to a product: in quadrature, for they are independent."""
    if not (a.error.any() or b.error.any()):
        return 0.0
    if _rigorous.get():
        return product(a.error, np.abs(b.value)) + product(np.abs(a.value) + a.error, b.error)
    return np.sqrt(product(a.error**2, b.value**2) + product(a.value**2, b.error**2))


def _walk(value: HostArray, spread: HostArray, terms: int, dtype: Any) -> HostArray:
    """The random walk of rounding over the partial sums of `terms` terms."""
    u = unit_roundoff(_charged(dtype))
    return u * root(terms) * (np.abs(value) / root(3) + spread / root(2))


def _sum(x: ndarray, axis: Any, keepdims: bool) -> ndarray:
    def add(values: HostArray) -> HostArray:
        return np.asarray(np.sum(values, axis=axis, keepdims=keepdims))

    value = add(x.value)
    terms = max(1, x.size // max(1, value.size))
    if _rigorous.get():
        u = unit_roundoff(_charged(x.dtype))
        own, carried = terms * u * add(np.abs(x.value)), add(x.error)
    else:
        own = _walk(value, np.sqrt(add(x.value**2)), terms, x.dtype)
        carried = np.sqrt(add(x.error**2))
    return _made(value, own + carried + _rounding(value, x.dtype), x.dtype)


def where(condition: Any, x: Any, y: Any) -> ndarray:
    """x where the condition holds, else y."""
    (a, b), dtype = _operands(x, y)
    test = condition.value if isinstance(condition, ndarray) else condition
    value = np.where(test, a.value, b.value)
    return ndarray(value, np.where(test, a.error, b.error), dtype)


def clip(x: ndarray, low: Any, high: Any, out: ndarray | None = None) -> Any:
    """x within [low, high]."""
    return _into(out, _minimum(_maximum(x, low), high))


def _structural(name: str) -> Callable[..., ndarray]:
    """A function that moves elements and computes nothing: applied to values and to errors."""
    fn = getattr(np, name)

    def move(x: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(x, tuple | list):
            parts, dtype = _operands(*x)
            return ndarray(
                fn([each.value for each in parts], *args, **kwargs),
                fn([each.error for each in parts], *args, **kwargs),
                dtype,
            )
        return x._like(fn(x.value, *args, **kwargs), fn(x.error, *args, **kwargs))

    return move


_concatenate = _structural("concatenate")
_STRUCTURAL = frozenset(
    """broadcast_to concatenate expand_dims moveaxis reshape squeeze stack swapaxes take transpose
    tril triu""".split()
)
_METHODS = frozenset("argmax max mean min sum".split())
_OTHER_NAMES = {"abs": "absolute", "amax": "max", "amin": "min"}


def __getattr__(name: str) -> Any:
    name = _OTHER_NAMES.get(name, name)
    if name in _RULES:
        rule = _RULES[name]

        def call(*args: Any, out: ndarray | None = None) -> Any:
            return _into(out, rule(*args))

        return call
    if name in _STRUCTURAL:
        return _structural(name)
    if name in _METHODS:

        def method(x: ndarray, axis: Any = None, **kwargs: Any) -> Any:
            return getattr(x, name)(axis, **kwargs)

        return method
    if name.startswith("_"):
        raise AttributeError(name)
    raise NoBound(f"no bound is known for {name}; assert_close takes one of your own")
