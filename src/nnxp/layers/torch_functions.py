"""What torch's functions and methods do, by their names, in the dialect of NumPy and CuPy.

Each takes arrays where torch takes tensors, and torch's own arguments; sizes are Python's numbers.
Functions that make arrays take the library first.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import numpy as np

from nnxp import kernels
from nnxp._arrays import Array, get_array_module, is_array, is_floating, xp_of
from nnxp._errors import OptionError, ShapeError
from nnxp.kernels.softmax import log_sum_exp
from nnxp.layers.operators import axis_of, cut, padded, with_axis_last
from nnxp.program.index import indexed

FUNCTIONS: dict[str, Callable[..., Any]] = {}
"""Functions and methods by torch's name."""

MAKERS: dict[str, Callable[..., Any]] = {}
"""Functions that make arrays: they take the library first."""

VIEWS = frozenset(
    """bool byte char chunk clone diagonal double dropout expand expand_as flatten float getitem
    half int long meshgrid movedim narrow permute pos reshape reshape_as select short split squeeze
    t tensor_unfold to transpose type_as unbind unflatten unsqueeze view_as""".split()
)
"""What may answer the memory of its first argument."""


CHOICES: dict[str, dict[str, tuple[Any, ...]]] = {
    "div": {"rounding_mode": (None, "floor", "trunc")},
    "gelu": {"approximate": ("none", "tanh")},
    "meshgrid": {"indexing": (None, "ij", "xy")},
    "pad": {"mode": ("constant", "reflect", "replicate", "circular")},
}
"""Options that are one of a few values, by function; the first one is the default."""


def check_choices(name: str, options: Mapping[str, Any]) -> None:
    """OptionError for an option that is none of its values."""
    for option, values in CHOICES.get(name, {}).items():
        value = options.get(option, values[0])
        if value not in values:
            names = ", ".join(map(str, values))
            raise OptionError(f"{option} of {name} is one of {names}, not {value!r:.60}")


def function(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: this is what torch means by these names."""

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        FUNCTIONS.update(dict.fromkeys(names, fn))
        return fn

    return register


def _of_one(name: str, ours: str = "") -> Callable[..., Any]:
    """A function of one array, that NumPy has by the same name or by another, or of a size."""
    of_size = abs if name == "abs" else getattr(math, name, None)

    def formula(x: Any) -> Any:
        if is_array(x) or of_size is None:
            return getattr(xp_of(x), ours or name)(x)
        return of_size(x)

    return formula


def _in_floats(x: Any) -> Any:
    """Whole numbers in torch's default type of floats; anything else as it is."""
    return x.astype("float32") if is_array(x) and not is_floating(x.dtype) else x


def _of_floats(name: str, ours: str = "") -> Callable[..., Any]:
    """The same, for one that answers floats for whole numbers, too."""
    formula = _of_one(name, ours)
    return lambda x: formula(_in_floats(x))


def _operator(name: str) -> Callable[..., Any]:
    """An operator of Python's, of arrays or of sizes."""
    return lambda x, y: getattr(operator, name)(*_met(x, y))


def _of_two(name: str) -> Callable[..., Any]:
    """A function of two arrays, that NumPy has by the same name, or of two sizes."""
    return lambda x, y: getattr(xp_of(x) if is_array(x) else math, name)(*_met(x, y))


def _activation(kernel: kernels.Kernel) -> Callable[..., Any]:
    return lambda x: kernel(x)


for _name in "abs floor ceil trunc square sign signbit isnan isinf isfinite logical_not".split():
    FUNCTIONS[_name] = _of_one(_name)
for _name in "exp exp2 expm1 log log1p log2 log10 sqrt sin cos tan sinh cosh reciprocal".split():
    FUNCTIONS[_name] = _of_floats(_name)
for _name in "asin acos atan asinh acosh atanh".split():
    FUNCTIONS[_name] = _of_floats(_name, f"arc{_name[1:]}")
for _name in "mul floordiv mod lt le gt ge eq ne".split():
    FUNCTIONS[_name] = _operator(_name)
for _name in "fmax fmin fmod hypot logaddexp maximum minimum".split():
    FUNCTIONS[_name] = _of_two(_name)
for _name in "neg pos invert and_ or_ xor".split():
    FUNCTIONS[_name] = getattr(operator, _name)
for _name, _kernel in {
    "relu": kernels.relu, "silu": kernels.silu, "mish": kernels.mish, "selu": kernels.selu,
    "softsign": kernels.softsign, "hardsigmoid": kernels.hard_sigmoid, "relu6": kernels.relu6,
    "hardswish": kernels.hard_swish, "tanhshrink": kernels.tanh_shrink,
    "log_sigmoid": kernels.log_sigmoid,
}.items():  # fmt: skip
    FUNCTIONS[_name] = _activation(_kernel)

SAME = {
    "subtract": "sub", "multiply": "mul", "remainder": "mod", "negative": "neg", "view": "reshape",
    "bmm": "matmul", "concat": "cat", "concatenate": "cat", "clip": "clamp", "absolute": "abs",
    "floor_divide": "floordiv", "divide": "div", "truediv": "div", "true_divide": "div",
    "swapaxes": "transpose", "moveaxis": "movedim", "bitwise_and": "and_", "bitwise_or": "or_",
    "bitwise_not": "invert", "type": "to", "greater": "gt", "less": "lt", "iadd": "add",
    "isub": "sub", "imul": "mul", "itruediv": "div", "contiguous": "clone", "detach": "clone",
    "cpu": "clone", "dropout1d": "dropout", "dropout2d": "dropout", "dropout3d": "dropout",
    "feature_dropout": "dropout",
    "_threshold": "threshold", "special_expit": "sigmoid",
    "arccos": "acos", "arcsin": "asin", "arctan": "atan", "fix": "trunc", "atan2": "arctan2",
    "greater_equal": "ge", "less_equal": "le", "not_equal": "ne", "bitwise_xor": "xor",
    "positive": "pos", "sgn": "sign", "mm": "matmul", "mv": "matmul", "dot": "matmul",
    "ger": "outer", "addmv": "addmm", "ravel": "flatten", "swapdims": "transpose",
    "broadcast_to": "expand", "split_with_sizes": "split", "nelement": "numel",
    "row_stack": "vstack", "empty": "zeros", "empty_like": "zeros_like",
    "new_empty": "new_zeros",
}  # fmt: skip
"""Other names for the same thing."""


def _met(x: Any, y: Any) -> tuple[Any, Any]:
    """Whole numbers that meet floats take their type, as torch has it; NumPy would take float64."""
    if isinstance(x, float) or isinstance(y, float):
        return _in_floats(x), _in_floats(y)
    if is_array(x) and is_array(y):
        return tuple(_alike([x, y]))
    return x, y


def _alike(arrays: Any) -> list[Any]:
    """Arrays, those of whole numbers in the type of the floats among them, if there are any."""
    floats = [x.dtype for x in arrays if is_floating(x.dtype)]
    if not 0 < len(floats) < len(arrays):
        return list(arrays)
    widest = max(floats, key=lambda dtype: dtype.itemsize)
    return [x if is_floating(x.dtype) else x.astype(widest) for x in arrays]


def _dtype(name: Any) -> Any:
    return None if name is None else np.dtype(str(name).removeprefix("torch."))


@function("div")
def div(x: Any, y: Any, *, rounding_mode: str | None = None) -> Any:
    x, y = _met(x, y)
    if rounding_mode == "floor":
        return x // y
    whole = is_array(x) and not is_floating(x.dtype)  # and so is y, now
    if rounding_mode == "trunc" and whole:
        down = x // y
        return down + ((down < 0) & (down * y != x))
    if rounding_mode == "trunc":
        return xp_of(x).trunc(x / y)
    return _in_floats(x) / _in_floats(y)


@function("pow")
def power(x: Any, y: Any) -> Any:
    if is_array(x) or is_array(y):
        return operator.pow(*_met(x, y))
    result = math.pow(x, y)  # not x**y, which can be made to take for ever
    return int(result) if isinstance(x, int) and isinstance(y, int) and y >= 0 else result


@function("addmm", "baddbmm")
def addmm(x: Array, a: Array, b: Array, *, beta: float = 1, alpha: float = 1) -> Array:
    product = xp_of(a).matmul(a, b)
    return (x if beta == 1 else x * beta) + (product if alpha == 1 else product * alpha)


@function("einsum")
def einsum(subscripts: str, *operands: Any) -> Array:
    arrays = operands[0] if isinstance(operands[0], tuple | list) else operands
    return xp_of(arrays[0]).einsum(subscripts, *arrays)


@function("tensordot")
def tensordot(x: Array, y: Array, dims: Any = 2) -> Array:
    return xp_of(x).tensordot(x, y, axes=dims)


FUNCTIONS |= {
    "outer": lambda x, y: xp_of(x).outer(*_met(x, y)),
    "inner": lambda x, y: tensordot(x, y, ((-1,), (-1,))),
    "diagonal": lambda x, offset=0, dim1=0, dim2=1: xp_of(x).diagonal(x, offset, dim1, dim2),
    "trace": lambda x: xp_of(x).diagonal(x).sum(),
}


@function("layer_norm")
def layer_norm(
    x: Array, shape: Any, weight: Array | None = None, bias: Array | None = None, eps: float = 1e-5
) -> Array:
    axes = len(shape) if isinstance(shape, tuple | list) else 1
    flat = x.reshape(*x.shape[: x.ndim - axes], prod(x.shape[x.ndim - axes :]))
    flat_weight, flat_bias = (None if p is None else p.reshape(-1) for p in (weight, bias))
    return kernels.layer_norm(flat, flat_weight, flat_bias, eps=eps).reshape(x.shape)


@function("rms_norm")
def rms_norm(x: Array, shape: Any, weight: Array | None = None, eps: float | None = None) -> Array:
    axes = len(shape) if isinstance(shape, tuple | list) else 1
    flat = x.reshape(*x.shape[: x.ndim - axes], prod(x.shape[x.ndim - axes :]))
    eps = float(np.finfo(x.dtype).eps) if eps is None else eps
    gain = None if weight is None else weight.reshape(-1)
    return kernels.rms_norm(flat, gain, eps=eps).reshape(x.shape)


@function("embedding")
def embedding(ids: Array, weight: Array, *rest: Any, **options: Any) -> Array:
    return kernels.embedding(ids.astype("int64", copy=False), weight)


@function("embedding_bag")
def embedding_bag(
    ids: Array, weight: Array, offsets: Any = None, max_norm: Any = None, norm_type: float = 2.0,
    scale_grad_by_freq: bool = False, mode: str = "mean", sparse: bool = False,
    per_sample_weights: Array | None = None, include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Array:  # fmt: skip
    """Of ids (rows, n): the mean, sum or largest of what the ids of a row stand for."""
    y = embedding(ids, weight)
    if per_sample_weights is not None:
        y = y * per_sample_weights[..., None]
    return {"mean": y.mean, "sum": y.sum, "max": y.max}[mode](axis=-2)


@function("bilinear")
def bilinear(x1: Array, x2: Array, weight: Array, bias: Array | None = None) -> Array:
    """y[o] = x1 @ weight[o] @ x2 + bias[o]"""
    y = xp_of(x1).einsum("...i,oij,...j->...o", x1, weight, x2)
    return y if bias is None else y + bias


@function("scaled_dot_product_attention")
def attention(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Array:
    arrays = [x[None] if x.ndim < 3 else x for x in (query, key, value)]
    y = kernels.attention(*arrays, attn_mask, causal=is_causal, scale=scale)
    return y[0] if query.ndim < 3 else y


@function("mask_of_attention")
def mask_of_attention(
    padding: Array | None, attn: Array | None, rows: int, heads: int, dtype: Any
) -> Array:
    """torch's masks, True where nobody looks, as ours: (rows, heads or 1, queries or 1, keys)."""
    parts = []
    if padding is not None:
        parts.append(padding[:, None, None, :])
    if attn is not None and attn.ndim == 3:
        parts.append(attn.reshape(rows, heads, *attn.shape[1:]))
    elif attn is not None:
        parts.append(attn[None, None])
    xp = xp_of(parts[0])
    if all(part.dtype.kind == "b" for part in parts):
        mask = ~parts[0]
        for part in parts[1:]:
            mask = mask & ~part
    else:
        added = [
            xp.where(part, xp.full((), -np.inf, dtype), 0) if part.dtype.kind == "b" else part
            for part in parts
        ]
        mask = added[0] if len(added) == 1 else added[0] + added[1]
    return xp.broadcast_to(mask, (rows, *mask.shape[1:]))


@function("gelu")
def gelu(x: Array, approximate: str = "none") -> Array:
    check_choices("gelu", {"approximate": approximate})
    return kernels.gelu_tanh(x) if approximate == "tanh" else kernels.gelu(x)


@function("leaky_relu")
def leaky_relu(x: Array, negative_slope: float = 0.01) -> Array:
    return kernels.leaky_relu(x, negative_slope=negative_slope)


@function("softplus")
def softplus(x: Array, beta: float = 1, threshold: float = 20) -> Array:
    """x itself where beta x > threshold: from 20 on it is that anyway, to ten digits."""
    y = kernels.softplus(x) if beta == 1 else kernels.softplus(x * beta) / beta
    return y if threshold >= 20 else xp_of(x).where(x * beta > threshold, x, y)


def _along(kernel: kernels.Kernel) -> Callable[..., Array]:
    """A kernel over the last axis, over another one."""

    def along(x: Array, dim: int | None = None, _stacklevel: Any = 3, dtype: Any = None) -> Array:
        if not isinstance(_stacklevel, int):  # torch.softmax has the type here
            dtype = _stacklevel
        x = x if dtype is None else x.astype(_dtype(dtype))
        if dim is None:
            dim = 0 if x.ndim in (0, 1, 3) else 1
        return with_axis_last(kernel, x, dim)

    return along


FUNCTIONS["softmax"] = _along(kernels.softmax)
FUNCTIONS["log_softmax"] = _along(kernels.log_softmax)
FUNCTIONS["softmin"] = _along(kernels.softmin)


@function("glu")
def glu(x: Array, dim: int = -1) -> Array:
    return kernels.glu(x, axis=dim)


@function("hardtanh")
def hardtanh(x: Array, min_val: float = -1.0, max_val: float = 1.0) -> Array:
    return kernels.hard_tanh(x, min_val=min_val, max_val=max_val)


@function("threshold")
def threshold(x: Array, threshold: float, value: float) -> Array:
    return kernels.threshold(x, threshold=threshold, value=value)


@function("rrelu")
def rrelu(x: Array, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False) -> Array:
    """As it is in eval(): the slope is the middle of those that are drawn in training."""
    return kernels.leaky_relu(x, negative_slope=(lower + upper) / 2)


FUNCTIONS |= {
    "sigmoid": lambda x: kernels.sigmoid(_in_floats(x)),
    "tanh": lambda x: kernels.tanh(_in_floats(x)),
    "rsqrt": lambda x: 1 / xp_of(x).sqrt(_in_floats(x)),
    "rsub": lambda x, y, *, alpha=1: sub(y, x, alpha=alpha),
    "logical_and": lambda x, y: xp_of(x).logical_and(x, y),
    "logical_or": lambda x, y: xp_of(x).logical_or(x, y),
    "logical_xor": lambda x, y: xp_of(x).logical_xor(x, y),
    "matmul": lambda x, y: xp_of(x).matmul(x, y),
    "linear": lambda x, weight, bias=None: kernels.linear(x, weight.swapaxes(0, 1), bias),
    "dropout": lambda x, p=0.5, training=True, inplace=False: x,
    "alpha_dropout": lambda x, p=0.5, training=False, inplace=False: x,
    "clone": lambda x, *args, **options: x,
    "elu": lambda x, alpha=1.0: kernels.elu(x, alpha=alpha),
    "celu": lambda x, alpha=1.0: kernels.celu(x, alpha=alpha),
    "hardshrink": lambda x, lambd=0.5: kernels.hard_shrink(x, lambd=lambd),
    "softshrink": lambda x, lambd=0.5: kernels.soft_shrink(x, lambd=lambd),
    "erf": lambda x: kernels.erf(_in_floats(x)),
    "round": lambda x, *, decimals=0: xp_of(x).round(x, decimals),
    "masked_fill": lambda x, mask, value: xp_of(x).where(mask, value, x),
    "arctan2": lambda y, x: xp_of(y).arctan2(*map(_in_floats, _met(y, x))),
    "frac": lambda x: x - xp_of(x).trunc(x),
    "lerp": lambda x, end, weight: x + weight * (end - x),
    "addcmul": lambda x, a, b, *, value=1: add(x, FUNCTIONS["mul"](a, b), alpha=value),
    "addcdiv": lambda x, a, b, *, value=1: add(x, div(a, b), alpha=value),
    "clamp_min": lambda x, min: clamp(x, min=min),
    "clamp_max": lambda x, max: clamp(x, max=max),
}


@function("add")
def add(x: Any, y: Any, *, alpha: float = 1) -> Any:
    x, y = _met(x, y)
    return x + (y if alpha == 1 else y * alpha)


@function("sub")
def sub(x: Any, y: Any, *, alpha: float = 1) -> Any:
    x, y = _met(x, y)
    return x - (y if alpha == 1 else y * alpha)


@function("logit")
def logit(x: Array, eps: float | None = None) -> Array:
    """log(x / (1 - x)), for x that are eps at least, and 1 - eps at most"""
    x = _in_floats(x) if eps is None else clamp(_in_floats(x), eps, 1 - eps)
    return xp_of(x).log(x / (1 - x))


@function("nan_to_num")
def nan_to_num(
    x: Array, nan: float | None = None, posinf: float | None = None, neginf: float | None = None
) -> Array:
    return xp_of(x).nan_to_num(x, nan=nan or 0.0, posinf=posinf, neginf=neginf)


@function("isclose")
def isclose(
    x: Array, y: Array, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False
) -> Array:
    return xp_of(x).isclose(x, y, rtol=rtol, atol=atol, equal_nan=equal_nan)


@function("clamp")
def clamp(x: Array, min: Any = None, max: Any = None) -> Array:
    for bound in (min, max):
        x = _met(x, bound)[0]
    low, high = (_met(x, bound)[1] for bound in (min, max))
    return xp_of(x).clip(x, low, high)


@function("where")
def where(condition: Array, input: Any, other: Any) -> Array:
    x, y = _met(input, other)
    chosen = xp_of(condition).where(condition, x, y)
    numbers = isinstance(x, float) or isinstance(y, float)
    return chosen if is_array(x) or is_array(y) or not numbers else chosen.astype("float32")


FUNCTIONS["tensor_where"] = lambda x, condition, other: where(condition, x, other)


# sums and what else looks along axes


def _axes(dim: Any) -> Any:
    return (tuple(dim) or None) if isinstance(dim, tuple | list) else dim


def _reduction(name: str) -> Callable[..., Any]:
    def reduce(x: Array, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Array:
        x = x if dtype is None else x.astype(_dtype(dtype))
        return getattr(xp_of(x), name)(x, axis=_axes(dim), keepdims=keepdim)

    return reduce


for _name, _theirs in [("mean", "mean"), ("sum", "sum"), ("amax", "max"), ("amin", "min"),
                       ("any", "any"), ("all", "all"), ("argmax", "argmax"),
                       ("argmin", "argmin"), ("prod", "prod")]:  # fmt: skip
    FUNCTIONS[_name] = _reduction(_theirs)


def _extreme(name: str) -> Callable[..., Any]:
    def extreme(x: Array, dim: Any = None, keepdim: bool = False) -> Any:
        xp = xp_of(x)
        if dim is None:
            return getattr(xp, name)(x)
        if is_array(dim):
            return getattr(xp, f"{name}imum")(*_met(x, dim))
        best = getattr(xp, name)(x, axis=dim, keepdims=keepdim)
        return best, getattr(xp, f"arg{name}")(x, axis=dim, keepdims=keepdim)

    return extreme


FUNCTIONS["max"], FUNCTIONS["min"] = _extreme("max"), _extreme("min")


def _spread(name: str) -> Callable[..., Any]:
    def spread(
        x: Array, dim: Any = None, unbiased: bool = True, keepdim: bool = False,
        *, correction: int | None = None,
    ) -> Array:  # fmt: skip
        if isinstance(dim, bool):  # x.var(False)
            dim, unbiased = None, dim
        ddof = int(unbiased) if correction is None else correction
        return getattr(xp_of(x), name)(x, axis=_axes(dim), ddof=ddof, keepdims=keepdim)

    return spread


FUNCTIONS["var"], FUNCTIONS["std"] = _spread("var"), _spread("std")


def _spread_and_mean(name: str) -> Callable[..., Any]:
    def both(
        x: Array, dim: Any = None, unbiased: bool = True, keepdim: bool = False,
        *, correction: int | None = None,
    ) -> tuple[Array, Array]:  # fmt: skip
        spread = FUNCTIONS[name](x, dim, unbiased, keepdim, correction=correction)
        over = None if isinstance(dim, bool) else _axes(dim)
        return spread, x.mean(axis=over, keepdims=keepdim)

    return both


FUNCTIONS["var_mean"], FUNCTIONS["std_mean"] = _spread_and_mean("var"), _spread_and_mean("std")


@function("logsumexp")
def logsumexp(x: Array, dim: Any, keepdim: bool = False) -> Array:
    return log_sum_exp(_in_floats(x), axis=_axes(dim), keepdims=keepdim)


@function("count_nonzero")
def count_nonzero(x: Array, dim: Any = None) -> Array:
    return (x != 0).sum(axis=_axes(dim))


@function("aminmax")
def aminmax(x: Array, *, dim: int | None = None, keepdim: bool = False) -> tuple[Array, Array]:
    return x.min(axis=dim, keepdims=keepdim), x.max(axis=dim, keepdims=keepdim)


# norms


@function("linalg_vector_norm")
def vector_norm(x: Array, ord: float = 2, dim: Any = None, keepdim: bool = False) -> Array:
    """(sum |x|^ord)^(1/ord) over one axis, over several, or over all"""
    xp, axes = xp_of(x), range(x.ndim) if dim is None else (dim,) if isinstance(dim, int) else dim
    axes = tuple(axis_of(axis, x.ndim) for axis in axes) or tuple(range(x.ndim))
    lines = xp.moveaxis(x, axes, range(-len(axes), 0))
    flat = lines.reshape(*lines.shape[: -len(axes)], prod(lines.shape[-len(axes) :]))
    length = xp.linalg.norm(flat, ord=None if ord == 2 else ord, axis=-1)
    return xp.expand_dims(length, axes) if keepdim else length


@function("norm")
def norm(
    x: Array, p: Any = "fro", dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Array:
    x = x if dtype is None else x.astype(_dtype(dtype))
    return vector_norm(x, 2 if p in ("fro", None) else p, dim, keepdim)


@function("linalg_norm")
def linalg_norm(x: Array, ord: Any = None, dim: Any = None, keepdim: bool = False) -> Array:
    """The norm of vectors, or Frobenius' of matrices; others of matrices are not known."""
    axes = x.ndim if dim is None else 1 if isinstance(dim, int) else len(dim)
    if not (ord is None or axes == 1 or (ord == "fro" and axes == 2)):
        raise OptionError(f"linalg.norm of matrices is Frobenius' here, not ord={ord!r:.60}")
    return norm(x, ord, dim, keepdim)


@function("linalg_matrix_norm")
def matrix_norm(x: Array, ord: Any = "fro", dim: Any = (-2, -1), keepdim: bool = False) -> Array:
    return linalg_norm(x, ord, dim, keepdim)


@function("normalize")
def normalize(x: Array, p: float = 2.0, dim: Any = 1, eps: float = 1e-12) -> Array:
    return x / xp_of(x).maximum(vector_norm(x, p, dim, True), eps)


@function("dist")
def dist(x: Array, y: Array, p: float = 2) -> Array:
    return vector_norm(sub(x, y), p)


@function("pairwise_distance")
def pairwise_distance(
    x1: Array, x2: Array, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False
) -> Array:
    return vector_norm(add(sub(x1, x2), eps), p, -1, keepdim)


@function("cdist")
def cdist(x1: Array, x2: Array, p: float = 2.0, compute_mode: str = "") -> Array:
    """How far each line of x1 is from each of x2: (..., n, c), (..., m, c) -> (..., n, m)."""
    return vector_norm(x1[..., :, None, :] - x2[..., None, :, :], p, -1)


@function("cosine_similarity")
def cosine_similarity(x1: Array, x2: Array, dim: int = 1, eps: float = 1e-8) -> Array:
    x1, x2 = _met(x1, x2)
    shape = np.broadcast_shapes(x1.shape, x2.shape)
    a, b = (normalize(xp_of(x).broadcast_to(x, shape), dim=dim, eps=eps) for x in (x1, x2))
    return (a * b).sum(axis=dim)


def _scan(name: str) -> Callable[..., Array]:
    def scan(x: Array, dim: int, *, dtype: Any = None) -> Array:
        return getattr(xp_of(x), name)(x, axis=dim, dtype=_dtype(dtype))

    return scan


FUNCTIONS["cumsum"], FUNCTIONS["cumprod"] = _scan("cumsum"), _scan("cumprod")


@function("diff")
def diff(
    x: Array, n: int = 1, dim: int = -1, prepend: Array | None = None, append: Array | None = None
) -> Array:
    parts = [part for part in (prepend, x, append) if part is not None]
    return xp_of(x).diff(cat(parts, dim) if len(parts) > 1 else x, n, dim)


# by order, and by places


@function("argsort")
def argsort(x: Array, dim: int = -1, descending: bool = False, stable: bool = False) -> Array:
    """Of equals the first comes first, whatever `stable` says. NaN comes last; descending, it is as
    large as infinity."""
    xp = xp_of(x)
    down = ~x if x.dtype.kind in "iub" else xp.where(xp.isnan(x), -math.inf, -x)
    return xp.argsort(down if descending else x, axis=dim, kind="stable")


@function("sort")
def sort(
    x: Array, dim: int = -1, descending: bool = False, *, stable: bool = False
) -> tuple[Array, Array]:
    order = argsort(x, dim, descending)
    return xp_of(x).take_along_axis(x, order, axis=dim), order


@function("topk")
def topk(
    x: Array, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[Array, Array]:
    if not 0 <= k <= x.shape[dim]:
        raise OptionError(f"topk takes k up to the {x.shape[dim]} elements of axis {dim}, not {k}")
    order = cut(argsort(x, dim, largest), dim % x.ndim, 0, k)
    return xp_of(x).take_along_axis(x, order, axis=dim), order


def _of_order(x: Array, place: Any, dim: int, keepdim: bool) -> tuple[Array, Array]:
    """The element at a place of the order of x along an axis, and where it is in x."""
    xp, order = xp_of(x), argsort(x, dim)
    index = xp.take_along_axis(order, place, axis=dim)
    pair = xp.take_along_axis(x, index, axis=dim), index
    return pair if keepdim else tuple(y.squeeze(axis=dim) for y in pair)


@function("kthvalue")
def kthvalue(x: Array, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Array, Array]:
    if not 1 <= k <= x.shape[dim]:
        raise OptionError(f"kthvalue takes k from 1 to {x.shape[dim]}, not {k!r:.60}")
    place = xp_of(x).full((1,) * x.ndim, k - 1, dtype="int64")
    return _of_order(x, place, dim, keepdim)


@function("median")
def median(x: Array, dim: int | None = None, keepdim: bool = False) -> Any:
    """The lower of two in the middle; NaN where there is one. Of equals, where the first is."""
    if dim is None:
        return median(x.reshape(-1), 0)[0]
    xp, n = xp_of(x), x.shape[dim]
    unknown = xp.isnan(x).sum(axis=dim, keepdims=True)  # which come last
    return _of_order(x, xp.where(unknown > 0, n - unknown, (n - 1) // 2), dim, keepdim)


@function("tensor_unfold")
def unfold(x: Array, dimension: int, size: int, step: int) -> Array:
    """Windows along an axis, each `step` behind the other, whose elements are a new last axis."""
    windows = xp_of(x).lib.stride_tricks.sliding_window_view(x, size, axis=dimension)
    return windows[(slice(None),) * (dimension % x.ndim) + (slice(None, None, step),)]


@function("take_along_dim")
def take_along_dim(x: Array, indices: Array, dim: int | None = None) -> Array:
    if dim is None:
        return take_along_dim(x.reshape(-1), indices.reshape(-1), 0)
    return xp_of(x).take_along_axis(x, indices, axis=dim)


@function("gather")
def gather(x: Array, dim: int, index: Array, *, sparse_grad: bool = False) -> Array:
    """The index may be smaller than x along other axes."""
    for axis, (n, m) in enumerate(zip(x.shape, index.shape, strict=True)):
        if axis != dim % x.ndim and m != n:
            x = cut(x, axis, 0, m)
    return xp_of(x).take_along_axis(x, index, axis=dim)


@function("one_hot")
def one_hot(x: Array, num_classes: int = -1) -> Array:
    """What is none of the classes raises IdError on the CPU, and is zeros on a device, where
    looking would be a wait."""
    if num_classes < 1:
        raise OptionError(
            "one_hot takes num_classes: without it the shape would depend on the numbers in x"
        )
    classes = xp_of(x).arange(num_classes, dtype="float64")
    return (embedding(x, classes[:, None]) == classes).astype("int64")


# shapes


def _sizes(sizes: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes


@function("flatten")
def flatten(x: Array, start_dim: int = 0, end_dim: int = -1) -> Array:
    start, end = (axis_of(dim, x.ndim) if x.ndim else 0 for dim in (start_dim, end_dim))
    return x.reshape(*x.shape[:start], prod(x.shape[start : end + 1]), *x.shape[end + 1 :])


@function("unflatten")
def unflatten(x: Array, dim: int, sizes: Any) -> Array:
    dim = dim % x.ndim
    known = prod(size for size in sizes if size != -1)
    sizes = [x.shape[dim] // known if size == -1 else size for size in sizes]
    return x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


@function("squeeze")
def squeeze(x: Array, dim: Any = None) -> Array:
    dims = [dim] if isinstance(dim, int) else range(x.ndim) if dim is None else dim
    ones = tuple(d % x.ndim for d in dims if x.shape[d] == 1)
    return xp_of(x).squeeze(x, ones) if ones else x


@function("expand")
def expand(x: Array, *sizes: Any) -> Array:
    sizes = _sizes(sizes)
    own = (1,) * (len(sizes) - x.ndim) + x.shape
    shape = tuple(a if b == -1 else b for a, b in zip(own, sizes, strict=True))
    return xp_of(x).broadcast_to(x, shape)


@function("cat")
def cat(arrays: Any, dim: int = 0, *, axis: int | None = None) -> Array:
    return xp_of(arrays[0]).concatenate(_alike(arrays), axis=dim if axis is None else axis)


@function("split")
def split(x: Array, sizes: Any, dim: int = 0) -> Any:
    total = x.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, total - start) for start in range(0, total, sizes)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(cut(x, dim % x.ndim, a, a + n) for a, n in zip(starts, sizes, strict=True))


@function("select")
def select(x: Array, dim: int, index: int) -> Array:
    return x[(slice(None),) * (dim % x.ndim) + (index,)]


@function("chunk")
def chunk(x: Array, chunks: int, dim: int = 0, *, counted: bool = False) -> Any:
    """As many parts at most; just as many where they have been counted before."""
    parts = split(x, -(-x.shape[dim] // chunks), dim)
    if counted and len(parts) != chunks:
        raise ShapeError(f"chunk of {x.shape[dim]} into {chunks} makes {len(parts)}")
    return parts


@function("unbind")
def unbind(x: Array, dim: int = 0) -> Any:
    return tuple(select(x, dim, i) for i in range(x.shape[dim]))


@function("getitem")
def getitem(x: Any, key: Any) -> Any:
    return indexed(x, key) if is_array(x) else x[key]


@function("setitem")
def setitem(x: Array, key: Any, value: Any) -> Array:
    if is_array(key) and key.dtype == np.bool_ and not np.ndim(value):
        mask = key.reshape(*key.shape, *(1,) * (x.ndim - key.ndim))
        return xp_of(x).where(mask, value, x).astype(x.dtype, copy=False)
    y = x.copy()
    y[tuple(key) if isinstance(key, tuple | list) else key] = value
    return y


@function("pad")
def pad(x: Array, pads: Any, mode: str = "constant", value: float | None = None) -> Array:
    check_choices("pad", {"mode": mode})
    if len(pads) % 2 or len(pads) > 2 * x.ndim:
        raise OptionError(f"pad takes two numbers for each axis of {x.shape}, not {pads!r:.60}")
    widths = [(0, 0)] * (x.ndim - len(pads) // 2)
    widths += [(pads[i], pads[i + 1]) for i in range(len(pads) - 2, -1, -2)]
    mode = {"replicate": "edge", "circular": "wrap"}.get(mode, mode)
    return padded(x, widths, mode, value or 0)


@function("meshgrid")
def meshgrid(*arrays: Any, indexing: str | None = None) -> tuple[Array, ...]:
    lines = arrays[0] if isinstance(arrays[0], tuple | list) else arrays
    xp, n = xp_of(lines[0]), len(lines)
    shape = tuple(line.size for line in lines)
    grids = [
        xp.broadcast_to(line.reshape((1,) * i + (-1,) + (1,) * (n - 1 - i)), shape)
        for i, line in enumerate(lines)
    ]
    return tuple(grid.swapaxes(0, 1) if indexing == "xy" and n > 1 else grid for grid in grids)


FUNCTIONS |= {
    "reshape": lambda x, *shape: x.reshape(_sizes(shape)),
    "view_as": lambda x, other: x.reshape(other.shape),
    "permute": lambda x, *dims: x.transpose(_sizes(dims)),
    "transpose": lambda x, dim0, dim1: x.swapaxes(dim0, dim1),
    "t": lambda x: x.swapaxes(0, 1) if x.ndim == 2 else x,
    "movedim": lambda x, source, destination: xp_of(x).moveaxis(x, source, destination),
    "reshape_as": lambda x, other: x.reshape(other.shape),
    "unsqueeze": lambda x, dim: xp_of(x).expand_dims(x, dim),
    "expand_as": lambda x, other: xp_of(x).broadcast_to(x, other.shape),
    "repeat": lambda x, *times: xp_of(x).tile(x, _sizes(times)),
    "tile": lambda x, *times: xp_of(x).tile(x, _sizes(times)),
    "repeat_interleave": lambda x, repeats, dim=None: xp_of(x).repeat(x, repeats, axis=dim),
    "stack": lambda arrays, dim=0: xp_of(arrays[0]).stack(_alike(arrays), axis=dim),
    "narrow": lambda x, dim, start, length: cut(x, dim % x.ndim, start, start + length),
    "hstack": lambda arrays: cat(arrays, min(1, arrays[0].ndim - 1)),
    "vstack": lambda arrays: cat([x[None] if x.ndim == 1 else x for x in arrays]),
    "index_select": lambda x, dim, index: xp_of(x).take(x, index, axis=dim),
    "flip": lambda x, *dims: xp_of(x).flip(x, _sizes(dims)),
    "roll": lambda x, shifts, dims=None: xp_of(x).roll(x, shifts, axis=dims),
    "tril": lambda x, diagonal=0: xp_of(x).tril(x, diagonal),
    "triu": lambda x, diagonal=0: xp_of(x).triu(x, diagonal),
}


# what an array tells of itself, and its type


ATTRIBUTES: dict[str, Callable[[Any], Any]] = {
    "shape": lambda x: tuple(x.shape),
    "ndim": lambda x: int(x.ndim),
    "dtype": lambda x: x.dtype,
    "device": lambda x: None,  # where an array is, the model says
    "T": lambda x: x.swapaxes(-1, -2),
    "mT": lambda x: x.swapaxes(-1, -2),
    "values": lambda x: x[0],
    "indices": lambda x: x[1],
}
"""Attributes of a tensor, and of what `max` along an axis answers."""


@function("to")
def to(x: Array, *args: Any, **options: Any) -> Array:
    """Only the type counts: where an array is, the model says."""
    for value in (*args, options.get("dtype")):
        if is_array(value):
            return x.astype(value.dtype, copy=False)
        if isinstance(value, np.dtype) or (isinstance(value, str) and value.startswith("torch.")):
            return x.astype(_dtype(value), copy=False)
    return x


def _to(kind: str) -> Callable[..., Any]:
    return lambda x: x.astype(kind, copy=False)


for _name, _kind in {
    "float": "float32", "double": "float64", "half": "float16", "long": "int64", "int": "int32",
    "bool": "bool", "byte": "uint8", "char": "int8", "short": "int16",
}.items():  # fmt: skip
    FUNCTIONS[_name] = _to(_kind)


FUNCTIONS |= {
    "size": lambda x, dim=None: tuple(x.shape) if dim is None else x.shape[dim],
    "getattr": lambda x, name: ATTRIBUTES[name](x),
    "dim": lambda x: int(x.ndim),
    "ndimension": lambda x: int(x.ndim),
    "numel": lambda x: int(x.size),
    "type_as": lambda x, other: x.astype(other.dtype, copy=False),
}


# arrays from nothing


def maker(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        MAKERS.update(dict.fromkeys(names, fn))
        return fn

    return register


@maker("arange")
def arange(
    xp: Any, *bounds: Any, start: Any = None, end: Any = None, step: Any = 1, dtype: Any = None,
    device: Any = None, layout: Any = None, requires_grad: bool = False, pin_memory: bool = False,
) -> Array:  # fmt: skip
    if start is not None:
        bounds = (start, *bounds)
    if end is not None:
        bounds = (*(bounds or (0,)), end)
    first, stop, step = (0, *bounds, step) if len(bounds) == 1 else (*bounds, step)[:3]
    whole = all(isinstance(bound, int) for bound in (first, stop, step))
    return xp.arange(first, stop, step, dtype=_dtype(dtype) or ("int64" if whole else "float32"))


def _filled(value: float) -> Callable[..., Any]:
    def make(
        xp: Any, *shape: Any, size: Any = None, dtype: Any = None, device: Any = None,
        layout: Any = None, requires_grad: bool = False, pin_memory: bool = False,
    ) -> Array:  # fmt: skip
        sizes = _sizes(shape) if size is None else tuple(size)
        return xp.full(sizes, value, dtype=_dtype(dtype) or "float32")

    return make


MAKERS["zeros"], MAKERS["ones"] = _filled(0), _filled(1)


@maker("full")
def full(
    xp: Any, size: Any, fill_value: Any, *, dtype: Any = None, device: Any = None,
    layout: Any = None, requires_grad: bool = False, pin_memory: bool = False,
) -> Array:  # fmt: skip
    default = {bool: "bool", int: "int64"}.get(type(fill_value), "float32")
    return xp.full(tuple(size), fill_value, dtype=_dtype(dtype) or default)


@maker("eye")
def eye(
    xp: Any, n: int, m: int | None = None, *, dtype: Any = None, device: Any = None,
    layout: Any = None, requires_grad: bool = False, pin_memory: bool = False,
) -> Array:  # fmt: skip
    return xp.eye(n, m, dtype=_dtype(dtype) or "float32")


@function("full_like")
def full_like(x: Array, fill_value: Any, *, dtype: Any = None, **other: Any) -> Array:
    return xp_of(x).full_like(x, fill_value, dtype=_dtype(dtype))


def _new(name: str) -> Callable[..., Any]:
    def make(x: Array, *shape: Any, dtype: Any = None, **options: Any) -> Array:
        return MAKERS[name](xp_of(x), *shape, dtype=x.dtype if dtype is None else dtype, **options)

    return make


for _name in ("zeros", "ones", "full"):
    FUNCTIONS[f"new_{_name}"] = _new(_name)


FUNCTIONS |= {
    "fill": lambda x, value: xp_of(x).full_like(x, value),
    "zero": lambda x: xp_of(x).zeros_like(x),
    "copy": lambda x, other: xp_of(x).broadcast_to(other.astype(x.dtype), x.shape),
    "zeros_like": lambda x, *, dtype=None, **other: xp_of(x).zeros_like(x, dtype=_dtype(dtype)),
    "ones_like": lambda x, *, dtype=None, **other: xp_of(x).ones_like(x, dtype=_dtype(dtype)),
}


def known(name: str) -> str:
    """The name in the tables for a name of torch's; "" if it is not there."""
    name = SAME.get(name, name.removeprefix("special_"))
    return name if name in FUNCTIONS or name in MAKERS else ""


def library_of(arrays: Any) -> Any:
    """The library of the first array among values of a graph."""
    return get_array_module(next((array for array in arrays if is_array(array)), None))
