"""What the array libraries of our own share: the dialect, and arrays that know no other.

The dialect is what NumPy and CuPy have in common, call forms included. `sim`, `bounded` and
`traced` are libraries in it: whatever is asked of one of their arrays, by operator, method, or
function of the module, arrives at one hook, `apply(name, arrays, options, out)`.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from functools import cache
from math import prod
from typing import Any, ClassVar

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from nnxp._arrays import Array, Shape, dtype_of
from nnxp._errors import UnsupportedFunction

_REDUCE = "axis=None, dtype=None, *, keepdims=False"
_PICK = "axis=None, *, keepdims=False"

# Functions by what they do to shapes, with the call form that NumPy and CuPy share: what stands
# before "/" has another name in each and is given by its place, what stands behind "*" by its name.
# Those that take `out=` as well are in WITH_OUT. Arrays stand before the ";", options behind it.
_TABLE = {
    "elementwise": {
        "x, /;": """absolute arccos arccosh arcsin arcsinh arctan arctanh ceil cos cosh exp
            exp2 expm1 floor invert log log10 log1p log2 negative positive reciprocal rint sign sin
            sinh sqrt square tan tanh trunc""",
        "x, y, /;": """add arctan2 bitwise_and bitwise_or bitwise_xor divide floor_divide fmax fmin
            fmod hypot logaddexp maximum minimum multiply power remainder subtract""",
        "condition, x, y, /;": "where",
        "a, a_min, a_max;": "clip",
        "a; decimals=0": "round",
        "x; copy=True, nan=0.0, posinf=None, neginf=None": "nan_to_num",
        "m; k=0": "tril triu",
        "a;": "copy",
        "a; dtype": "astype",
        "x, value; key": "assign",
    },
    "comparison": {
        "x, /;": "isfinite isinf isnan logical_not signbit",
        "x, y, /;": """equal greater greater_equal less less_equal logical_and logical_or
            logical_xor not_equal""",
        "a, b; rtol=1e-05, atol=1e-08, equal_nan=False": "isclose",
    },
    "reduction": {
        f"a; {_REDUCE}": "mean prod sum",
        f"a; {_REDUCE.replace('keep', 'ddof=0, keep')}": "std var",
        f"a; {_PICK}": "all any argmax argmin max min ptp",
        "a; axis=None, *, overwrite_input=False, keepdims=False": "median",
        "a; axis=None": "count_nonzero",
        "x; ord=None, axis=None, keepdims=False": "norm",
    },
    "scan": {
        "a; axis=None, dtype=None": "cumprod cumsum",
        "a; axis=-1": "sort",
        "a; axis=-1, kind=None": "argsort",
    },
    "movement": {
        "array; shape": "broadcast_to",
        "*arrays, /; axis=0": "concatenate stack",
        "a; offset=0, axis1=0, axis2=1": "diagonal",
        "a; axis": "expand_dims",
        "a, /; axis=None": "flip squeeze",
        "a; source, destination": "moveaxis",
        "array; pad_width, mode='constant', constant_values=0": "pad",
        "a; repeats, axis=None": "repeat",
        "a; shape, /": "reshape",
        "a; shift, axis=None": "roll",
        "x; window_shape, axis=None": "sliding_window_view",
        "ary; indices_or_sections, axis=0": "split",
        "a; axis1, axis2": "swapaxes",
        "A; reps": "tile",
        "a; axes=None": "transpose",
        "x; key": "getitem",
        "a, indices; axis=None": "take",
        "a, indices, /; axis": "take_along_axis",
        "a; n=1, axis=-1": "diff",
        "*values, /; shape, keys": "scatter",
        "values, ids; size": "segment_sum",
    },
    "contraction": {
        "a, b, /;": "dot matmul outer",
        "a, b; axes=2": "tensordot",
        "*operands, /; subscripts": "einsum",
    },
    "creation": {
        "; start, /, stop=None, step=1, *, dtype=None": "arange",
        "; shape, dtype=float": "empty ones zeros",
        "; shape, fill_value, dtype=None": "full",
        "; N, M=None, k=0, dtype=float": "eye",
        "; start, stop, num=50, *, dtype=None": "linspace",
        "a, /; dtype=None": "empty_like ones_like zeros_like",
        "a; fill_value, dtype=None": "full_like",
    },
}
KINDS = {
    name: kind for kind, rows in _TABLE.items() for names in rows.values() for name in names.split()
}
"""Every function of the dialect, and what it does to shapes."""

WITH_OUT = frozenset(
    [name for name, kind in KINDS.items() if kind in ("elementwise", "comparison")]
    + """all any argmax argmin concatenate cumprod cumsum dot matmul max mean median min outer prod
        ptp stack std sum take var""".split()
) - set("assign astype copy isclose nan_to_num tril triu where".split())
"""The functions that take `out=`, in both libraries."""

OTHER_NAMES = {"abs": "absolute", "amax": "max", "amin": "min", "mod": "remainder"} | {
    "true_divide": "divide", "around": "round", "concat": "concatenate", "permute_dims": "transpose"
}  # fmt: skip
VIEWS = frozenset(
    """broadcast_to diagonal expand_dims flip getitem moveaxis reshape sliding_window_view split
    squeeze swapaxes transpose""".split()
)
"""What may look at the memory of its array."""

METHODS = """all any argmax argmin argsort cumprod cumsum diagonal dot max mean min prod repeat
    round squeeze std sum swapaxes take var""".split()

CONSTANTS = frozenset(
    """bool_ e finfo float16 float32 float64 iinfo inf int8 int16 int32 int64 nan newaxis pi uint8
    uint16 uint32 uint64""".split()
)
_NOT_IN_THE_MODULE = frozenset(
    "assign astype getitem norm scatter segment_sum sliding_window_view".split()
)


@cache
def form(name: str) -> tuple[int | None, inspect.Signature]:
    """How a function is called: the number of its arrays, None for a sequence; its signature."""
    text = next(
        text for rows in _TABLE.values() for text, names in rows.items() if name in names.split()
    )
    arrays, options = (part.strip() for part in text.split(";"))
    parameters = ", ".join(filter(None, [arrays.removeprefix("*"), options]))
    signature = inspect.signature(eval(f"lambda {parameters}: 0"))
    count = len([name for name in arrays.split(",") if name.strip(" /")])
    return None if arrays.startswith("*") else count, signature


def compute(xp: Any, name: str, arrays: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """A function of the dialect, on arrays of a real library: NumPy, CuPy or the simulated one."""
    special = _SPECIAL.get(name)
    if special is not None:
        return special(xp, *arrays, **options)
    return getattr(xp, name)(*arrays, **options)


def _assign(xp: Any, x: Array, value: Any, key: Any) -> Array:
    y = x.copy()
    y[key] = value
    return y


def _scatter(xp: Any, *values: Array, shape: Shape, keys: tuple[Any, ...]) -> Array:
    """Zeros, with each value added at its key."""
    if issubclass(type(values[0]), ndarray):
        options = {"shape": shape, "keys": keys}
        return type(values[0]).apply("scatter", values, options, None)
    y = xp.zeros(shape, values[0].dtype)
    for value, key in zip(values, keys, strict=True):
        indices = key if isinstance(key, tuple) else (key,)
        if any(isinstance(index, list) or hasattr(index, "shape") for index in indices):
            xp.add.at(y, key, value)  # an index may come twice
        else:
            y[key] += value
    return y


def _segment_sum(xp: Any, values: Array, ids: Array, size: int) -> Array:
    """y[i] is the sum of the values whose id is i: values ids.shape + (...) -> y (size, ...)."""
    if issubclass(type(values), ndarray):
        return type(values).apply("segment_sum", (values, ids), {"size": size}, None)
    y = xp.zeros((size, *values.shape[ids.ndim :]), values.dtype)
    xp.add.at(y, ids, values)
    return y


def _windows(xp: Any, x: Array, window_shape: Any, axis: Any = None) -> Array:
    return xp.lib.stride_tricks.sliding_window_view(x, window_shape, axis)


_SPECIAL: dict[str, Callable[..., Any]] = {
    "getitem": lambda xp, x, key: x[key],
    "assign": _assign,
    "astype": lambda xp, x, dtype: x.astype(dtype),
    "copy": lambda xp, x: x.copy(),
    "reshape": lambda xp, x, shape: x.reshape(shape),
    "concatenate": lambda xp, *arrays, **options: xp.concatenate(arrays, **options),
    "stack": lambda xp, *arrays, **options: xp.stack(arrays, **options),
    "arange": lambda xp, start, stop=None, step=1, dtype=None: xp.arange(
        start, stop, step, dtype=dtype
    ),
    "einsum": lambda xp, *arrays, subscripts: xp.einsum(subscripts, *arrays),
    "norm": lambda xp, x, **options: xp.linalg.norm(x, **options),
    "scatter": _scatter,
    "segment_sum": _segment_sum,
    "sliding_window_view": _windows,
}


class ndarray(NDArrayOperatorsMixin):
    """An array in the dialect; a library of ours gives it a shape, a dtype and `apply`."""

    __slots__ = ()
    library: ClassVar[str]
    refusal: ClassVar[type[UnsupportedFunction]] = UnsupportedFunction
    shape: Shape
    dtype: np.dtype[Any]

    @classmethod
    def apply(cls, name: str, arrays: tuple[Any, ...], options: dict[str, Any], out: Any) -> Any:
        """The function of this name, of these arrays; into `out` unless that is None."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def itemsize(self) -> int:
        return int(self.dtype.itemsize)

    @property
    def nbytes(self) -> int:
        return self.size * self.itemsize

    @property
    def T(self) -> Any:
        return self.transpose()

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of an array without axes")
        return self.shape[0]

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, key: Any) -> Any:
        return self.apply("getitem", (self,), {"key": key}, None)

    def __array__(self, *args: object, **options: object) -> Any:
        raise TypeError(f"{self!r} does not become a NumPy array implicitly")

    def _numbers(self, what: str) -> Any:
        """The array of its numbers, at which `what`, such as float, is about to look."""
        raise NotImplementedError

    def item(self) -> Any:
        return self._numbers("item").item()

    def tolist(self) -> Any:
        return self._numbers("tolist").tolist()

    def __bool__(self) -> bool:
        return bool(self._numbers("bool"))

    def __float__(self) -> float:
        return float(self._numbers("float"))

    def __int__(self) -> int:
        return int(self._numbers("int"))

    def __index__(self) -> int:
        return operator.index(self._numbers("int"))

    def __array_ufunc__(self, ufunc: Any, method: str, *args: Any, **options: Any) -> Any:
        if method != "__call__":
            raise self.refusal(f"{self.library} has no {ufunc.__name__}.{method}: {_SHARED}")
        if any(_foreign(x, type(self)) for x in args):
            return NotImplemented
        out = options.pop("out", None)
        (out,) = out if isinstance(out, tuple) else (out,)
        return function(type(self), ufunc.__name__)(*args, out=out, **options)

    def __array_function__(self, fn: Any, types: Any, args: Any, options: dict[str, Any]) -> Any:
        return function(type(self), fn.__name__)(*args, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise self.refusal(f"arrays of {self.library} have no {name}: {_SHARED}")

    def reshape(self, *shape: Any) -> Any:
        return self.apply("reshape", (self,), {"shape": _unpacked(shape)}, None)

    def transpose(self, *axes: Any) -> Any:
        axes = _unpacked(axes)
        return self.apply("transpose", (self,), {"axes": axes} if axes else {}, None)

    def astype(self, dtype: Any, copy: bool = True) -> Any:
        dtype = dtype_of(dtype)
        if not copy and dtype == self.dtype:
            return self
        return self.apply("astype", (self,), {"dtype": dtype}, None)

    def clip(self, min: Any = None, max: Any = None, out: Any = None) -> Any:
        return function(type(self), "clip")(self, min, max, out=out)

    def copy(self) -> Any:
        return self.apply("copy", (self,), {}, None)

    def ravel(self) -> Any:
        return self.reshape(-1)

    def flatten(self) -> Any:
        return self.reshape(-1).copy()

    def sort(self, axis: int = -1) -> None:
        self[...] = self.apply("sort", (self,), {"axis": axis}, None)

    def fill(self, value: Any) -> None:
        self[...] = value


def _foreign(x: Any, own: type[ndarray]) -> bool:
    """Whether x is an array of a library that may know ours, and ours does not know it."""
    return hasattr(type(x), "__array_ufunc__") and not isinstance(x, own | np.ndarray | np.generic)


def _method(name: str) -> Callable[..., Any]:
    def method(self: ndarray, *args: Any, **options: Any) -> Any:
        return function(type(self), name)(self, *args, **options)

    method.__name__ = name
    return method


for _name in METHODS:
    setattr(ndarray, _name, _method(_name))


def _unpacked(sizes: tuple[Any, ...]) -> tuple[Any, ...]:
    """reshape(2, 3) and reshape((2, 3)) are the same."""
    if len(sizes) == 1 and (sizes[0] is None or isinstance(sizes[0], tuple | list)):
        return tuple(sizes[0] or ())
    return sizes


_SHARED = "it is not among the functions that NumPy, CuPy and nnxp's own libraries share"


@cache
def function(array: type[ndarray], name: str) -> Callable[..., Any]:
    """The function of this name for arrays of one of our libraries, in the dialect's call form.

    Raises UnsupportedFunction for a name that is not in the dialect; the function raises TypeError
    for a call that NumPy or CuPy would not take.
    """
    name = OTHER_NAMES.get(name, name)
    if name not in KINDS:
        raise array.refusal(f"{array.library} has no {name}: {_SHARED}")
    count, signature = form(name)
    with_out = name in WITH_OUT

    def call(*args: Any, **options: Any) -> Any:
        out = options.pop("out", None)
        if out is not None and not with_out:
            raise TypeError(f"{name} has no out= that NumPy and CuPy share")
        if name == "einsum":
            args = (args[1:], *args[:1])
        try:
            arguments = signature.bind(*args, **options).arguments
        except TypeError as error:
            raise TypeError(f"{name}{signature}, as NumPy and CuPy share it: {error}") from None
        values = list(arguments.values())
        names = list(arguments)
        if count is None:
            arrays, names = tuple(values[0]), names[1:]
        else:
            arrays, names = tuple(values[:count]), names[count:]
        return array.apply(name, arrays, {name: arguments[name] for name in names}, out)

    call.__name__ = name
    return call


def module_attribute(array: type[ndarray], name: str) -> Any:
    """What the module of such arrays answers for a name: a function of the dialect, or a type."""
    if name in CONSTANTS:
        return getattr(np, name)
    if name == "copyto":
        return copyto
    if name == "linalg":
        return _Namespace(array, ("norm",))
    if name == "lib":
        return _Stride(array)
    if name.startswith("_"):
        raise AttributeError(name)
    if name in _NOT_IN_THE_MODULE:
        raise array.refusal(f"{array.library} has no {name}: {_SHARED}")
    return function(array, name)


def copyto(dst: Any, src: Any, casting: str = "same_kind") -> None:
    """dst[...] = src, converted as the casting allows."""
    if not np.can_cast(getattr(src, "dtype", type(src)), dst.dtype, casting):  # type: ignore[arg-type]
        raise TypeError(f"{src.dtype} does not become {dst.dtype} by the rule {casting!r}")
    dst[...] = src


class _Namespace:
    """A module within the module: `xp.linalg`."""

    def __init__(self, array: type[ndarray], names: tuple[str, ...]) -> None:
        self._array, self._names = array, names

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in self._names:
            raise self._array.refusal(f"{self._array.library} has no {name}: {_SHARED}")
        return function(self._array, name)


class _Stride:
    """`xp.lib.stride_tricks.sliding_window_view`, as both libraries have it."""

    def __init__(self, array: type[ndarray]) -> None:
        self.stride_tricks = _Namespace(array, ("sliding_window_view",))
