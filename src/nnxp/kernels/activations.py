"""Elementwise functions: those by name take `out=`, which may be their own input, to work in place.

None overflows on the way to a result that its type can hold, so that no such input raises a
floating-point warning; none cancels, so that a result is right to a few units in its own last
place, however small it is; and NaN goes through every one of them as NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Literal

from nnxp._arrays import Array, xp_of
from nnxp._errors import OptionError, ShapeError
from nnxp.kernels._dispatch import Body, Kernel, kernel
from nnxp.kernels._erf import normal_tail

ACTIVATIONS: dict[str, Kernel] = {}
"""The activations by name: what `Dense(..., activation=...)` and `Activation(...)` accept."""

ActivationName = Literal[
    "celu", "elu", "gelu", "gelu_tanh", "hard_shrink", "hard_sigmoid", "hard_swish",
    "hard_tanh", "identity", "leaky_relu", "log_sigmoid", "log_softmax", "mish", "relu",
    "relu6", "selu", "sigmoid", "silu", "soft_shrink", "softmax", "softmin", "softplus",
    "softsign", "tanh", "tanh_shrink", "threshold",
]  # fmt: skip
"""The same names, for editors and type checkers. At run time any spelling will do."""


def activation(reference: Body) -> Kernel:
    """Decorator: this function is the reference body of an activation, known by its name."""
    function = Kernel(reference)
    ACTIVATIONS[function.__name__] = function
    return function


@activation
def identity(x: Array, *, out: Array | None = None) -> Array:
    """y = x"""
    if out is None:
        return x
    if out is not x:
        out[...] = x
    return out


# Of straight lines


@activation
def relu(x: Array, *, out: Array | None = None) -> Array:
    """y = max(x, 0)   [Nair & Hinton 2010]"""
    return xp_of(x).maximum(x, 0, out=out)


@activation
def relu6(x: Array, *, out: Array | None = None) -> Array:
    """y = min(max(x, 0), 6)   [Krizhevsky 2010]"""
    return xp_of(x).clip(x, 0, 6, out=out)


@activation
def leaky_relu(x: Array, *, negative_slope: float = 0.01, out: Array | None = None) -> Array:
    """y = x where x > 0, else negative_slope * x   [Maas, Hannun, Ng 2013]"""
    xp = xp_of(x)
    if 0 < negative_slope <= 1:
        return xp.maximum(x, x * negative_slope, out=out)
    below = xp.minimum(x, 0)
    below *= negative_slope
    y = xp.maximum(x, 0, out=out)
    y += below
    return y


@activation
def threshold(
    x: Array, *, threshold: float = 0.0, value: float = 0.0, out: Array | None = None
) -> Array:
    """y = x where x > threshold, else value   [Konda, Memisevic, Krueger 2014]"""
    xp = xp_of(x)
    return _stored(xp.where(xp.less_equal(x, threshold), value, x), out)


@activation
def hard_tanh(
    x: Array, *, min_val: float = -1.0, max_val: float = 1.0, out: Array | None = None
) -> Array:
    """y = min(max(x, min_val), max_val)   [Collobert 2004]"""
    if not min_val <= max_val:
        raise OptionError(f"hard_tanh is from min_val to max_val, not {min_val} to {max_val}")
    return xp_of(x).clip(x, min_val, max_val, out=out)


@activation
def hard_sigmoid(x: Array, *, out: Array | None = None) -> Array:
    """y = min(max(x + 3, 0), 6) / 6, as in Keras 3 and PyTorch   [Howard et al. 2019]"""
    y = xp_of(x).add(x, 3, out=out)
    xp_of(x).clip(y, 0, 6, out=y)
    y *= 1 / 6
    return y


@activation
def hard_swish(x: Array, *, out: Array | None = None) -> Array:
    """y = x * hard_sigmoid(x)   [Howard et al. 2019, arXiv:1905.02244]"""
    return xp_of(x).multiply(x, hard_sigmoid.reference(x), out=out)


@activation
def hard_shrink(x: Array, *, lambd: float = 0.5, out: Array | None = None) -> Array:
    """y = x where |x| > lambd, else 0   [Donoho & Johnstone 1994]"""
    xp = xp_of(x)
    return _stored(xp.where(xp.less_equal(xp.abs(x), lambd), 0, x), out)


@activation
def soft_shrink(x: Array, *, lambd: float = 0.5, out: Array | None = None) -> Array:
    """y = x - lambd where x > lambd, x + lambd where x < -lambd, else 0   [Donoho 1995]"""
    if not lambd >= 0:
        raise OptionError(f"lambd of soft_shrink is a number of at least 0, not {lambd!r:.60}")
    xp = xp_of(x)
    return xp.subtract(x, xp.clip(x, -lambd, lambd), out=out)


def _stored(y: Array, out: Array | None) -> Array:
    """y, in `out` if there is one."""
    if out is None:
        return y
    out[...] = y
    return out


# Of one exponential


def _exponential_below(x: Array, alpha: float, scale: float, out: Array | None) -> Array:
    """scale * (x where x > 0, else alpha * (exp(x) - 1))"""
    xp = xp_of(x)
    below = xp.minimum(x, 0)
    xp.expm1(below, out=below)
    below *= alpha * scale
    y = xp.maximum(x, 0, out=out)
    if scale != 1:
        y *= scale
    y += below
    return y


@activation
def elu(x: Array, *, alpha: float = 1.0, out: Array | None = None) -> Array:
    """y = x where x > 0, else alpha * (exp(x) - 1)   [Clevert, Unterthiner, Hochreiter 2015]"""
    return _exponential_below(x, alpha, 1.0, out)


SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805


@activation
def selu(x: Array, *, out: Array | None = None) -> Array:
    """y = scale * elu(x, alpha), with alpha and scale of [Klambauer et al. 2017]"""
    return _exponential_below(x, SELU_ALPHA, SELU_SCALE, out)


@activation
def celu(x: Array, *, alpha: float = 1.0, out: Array | None = None) -> Array:
    """y = x where x > 0, else alpha * (exp(x / alpha) - 1)   [Barron 2017, arXiv:1704.07483]

    `alpha` is positive. Below -800 alpha the exponential is 0 in every type, so x is clipped there
    and x / alpha cannot overflow.
    """
    if not alpha > 0:
        raise OptionError(f"alpha of celu is a number above 0, not {alpha!r:.60}")
    xp = xp_of(x)
    below = xp.clip(x, -800 * alpha, 0)
    below /= alpha
    xp.expm1(below, out=below)
    below *= alpha
    y = xp.maximum(x, 0, out=out)
    y += below
    return y


def _log_sum_tail(x: Array) -> Array:
    """log(1 + exp(-|x|)): log(1 + exp(x)) is this and max(x, 0)"""
    xp = xp_of(x)
    tail = xp.abs(x)
    xp.negative(tail, out=tail)
    xp.exp(tail, out=tail)
    return xp.log1p(tail, out=tail)


@activation
def softplus(x: Array, *, out: Array | None = None) -> Array:
    """y = log(1 + exp(x)), as max(x, 0) + log1p(exp(-|x|))   [Dugas et al. 2001]"""
    tail = _log_sum_tail(x)
    y = xp_of(x).maximum(x, 0, out=out)
    y += tail
    return y


@activation
def log_sigmoid(x: Array, *, out: Array | None = None) -> Array:
    """y = log(sigmoid(x)) = -softplus(-x), as min(x, 0) - log1p(exp(-|x|))"""
    tail = _log_sum_tail(x)
    y = xp_of(x).minimum(x, 0, out=out)
    y -= tail
    return y


@activation
def softsign(x: Array, *, out: Array | None = None) -> Array:
    """y = x / (1 + |x|)   [Turian, Bergstra, Bengio 2009]"""
    xp = xp_of(x)
    below = xp.abs(x)
    below += 1
    return xp.divide(x, below, out=out)


def _odds(e: Array) -> Array:
    """e / (1 + e), in place of e: the sigmoid of log(e)"""
    below = e + 1
    e /= below
    return e


@activation
def sigmoid(x: Array, *, out: Array | None = None) -> Array:
    """y = 1 / (1 + exp(-x)) = e / (1 + e), e = exp(x)

    Beyond x = 40 it is 1 in every type, so x is clipped there and e cannot overflow.
    """
    xp = xp_of(x)
    e = xp.minimum(x, 40, out=out)
    xp.exp(e, out=e)
    return _odds(e)


@activation
def tanh(x: Array, *, out: Array | None = None) -> Array:
    """y = tanh(x)"""
    return xp_of(x).tanh(x, out=out)


@activation
def tanh_shrink(x: Array, *, out: Array | None = None) -> Array:
    """y = x - tanh(x)

    Where |x| < 2 that cancels. There, with Lambert's fraction tanh(x) = x / (1 + c),
    c = x^2 / (3 + x^2 / (5 + ...)), it is x c / (1 + c), of positive terms.
    """
    xp = xp_of(x)
    near = xp.clip(x, -2, 2)
    square = near * near
    c = square / 25
    for odd in range(23, 1, -2):
        c += odd
        xp.divide(square, c, out=c)
    near *= _odds(c)
    return _stored(xp.where(xp.less(xp.abs(x), 2), near, x - xp.tanh(x)), out)


# x times a factor between 0 and 1


@activation
def silu(x: Array, *, out: Array | None = None) -> Array:
    """y = x * sigmoid(x)   [Elfwing, Uchibe, Doya 2017; swish]"""
    return xp_of(x).multiply(x, sigmoid.reference(x), out=out)


@activation
def gelu(x: Array, *, out: Array | None = None) -> Array:
    """y = x * Phi(x) = x/2 * erfc(-x / sqrt(2))   [Hendrycks & Gimpel 2016], exact

    As max(x, 0) - |x| (1 - Phi(|x|)), which cancels on neither side. Beyond |x| = 39 the second
    term is 0 in every type, so |x| is clipped there.
    """
    xp = xp_of(x)
    size = xp.abs(x)
    xp.clip(size, 0, 39, out=size)
    size *= normal_tail(size)
    y = xp.clip(x, 0, inf, out=out)
    y -= size
    return y


ROOT = 0.7978845608028654  # of 2 / pi


@activation
def gelu_tanh(x: Array, *, out: Array | None = None) -> Array:
    """y = x/2 * (1 + tanh(u)) = x * sigmoid(2 u), u = sqrt(2/pi) * (x + 0.044715 x^3)

    The approximation of [Hendrycks & Gimpel 2016] and of GPT-2. Below x = -32 the sigmoid is 0 in
    every type and above 8 it is 1, so x is clipped there and exp(2 u) cannot overflow.
    """
    xp = xp_of(x)
    u = xp.clip(x, -32, 8)
    square = u * u
    square *= 2 * ROOT * 0.044715
    square += 2 * ROOT
    u *= square
    return xp.multiply(x, _odds(xp.exp(u, out=u)), out=out)


@activation
def mish(x: Array, *, out: Array | None = None) -> Array:
    """y = x * tanh(softplus(x)) = x * n / (n + 2), n = e^x (e^x + 2)   [Misra 2019]

    Beyond x = 40 the factor is 1 in every type, so x is clipped there and n cannot overflow.
    """
    xp = xp_of(x)
    e = xp.minimum(x, 40)
    xp.exp(e, out=e)
    n = e + 2
    n *= e
    xp.add(n, 2, out=e)
    n /= e
    return xp.multiply(x, n, out=out)


# Of more than x


@kernel
def prelu(x: Array, slope: Array) -> Array:
    """y = x where x > 0, else slope * x   [He et al. 2015, arXiv:1502.01852]

    x (..., c), slope (c,) or (1,) -> y like x.
    """
    xp = xp_of(x)
    below = xp.minimum(x, 0)
    below *= slope
    below += xp.maximum(x, 0)
    return below


@kernel
def glu(x: Array, *, axis: int = -1) -> Array:
    """y = a * sigmoid(b), a and b the halves of x   [Dauphin et al. 2017, arXiv:1612.08083]

    x (..., 2 c) -> y (..., c), or with `axis` halved instead of the last one.
    """
    size = x.shape[axis]
    if size % 2:
        raise ShapeError(f"glu halves an axis, but one of {size} has no halves")
    a, b = xp_of(x).split(x, 2, axis=axis)
    y = sigmoid.reference(b)
    y *= a
    return y


ELEMENTWISE = frozenset(ACTIVATIONS.values())
"""The activations that are of each element on its own."""


# Gradients. Each slope is 0 or the lower one at a kink, as torch has it, and none overflows.


def _slope(kernel: Kernel) -> Callable[[Body], Body]:
    """Decorator: slope(x, y, **options) is the derivative of the kernel."""

    def register(slope: Body) -> Body:
        kernel.vjp(lambda dy, y, x, **options: (dy * slope(x, y, **options),))
        return slope

    return register


identity.vjp(lambda dy, y, x: (dy,))


@_slope(relu)
def _relu(x: Array, y: Array) -> Array:
    return xp_of(y).not_equal(y, 0)  # true of NaN, which goes on


def _above(x: Array) -> Array:
    """1 where x > 0, else 0, in the type of x"""
    return xp_of(x).greater(x, 0).astype(x.dtype)


@_slope(leaky_relu)
def _leaky_relu(x: Array, y: Array, *, negative_slope: float = 0.01) -> Array:
    return _above(x) * (1 - negative_slope) + negative_slope


@_slope(elu)
def _elu(x: Array, y: Array, *, alpha: float = 1.0) -> Array:
    below = xp_of(y).minimum(y, 0) + alpha
    return below if alpha == 1 else below + _above(x) * (1 - alpha)


@_slope(selu)
def _selu(x: Array, y: Array) -> Array:
    below = xp_of(y).minimum(y, 0) + SELU_ALPHA * SELU_SCALE
    return below + _above(x) * (SELU_SCALE - SELU_ALPHA * SELU_SCALE)


@_slope(softplus)
def _softplus(x: Array, y: Array) -> Array:
    return -xp_of(y).expm1(-y)


@_slope(softsign)
def _softsign(x: Array, y: Array) -> Array:
    below = 1 / (xp_of(x).absolute(x) + 1)
    return below * below


@_slope(sigmoid)
def _sigmoid(x: Array, y: Array) -> Array:
    return y * (1 - y)


@_slope(hard_sigmoid)
def _hard_sigmoid(x: Array, y: Array) -> Array:
    xp = xp_of(x)
    return xp.less(xp.absolute(x), 3).astype(x.dtype) * (1 / 6)


@_slope(tanh)
def _tanh(x: Array, y: Array) -> Array:
    return 1 - y * y


@_slope(silu)
def _silu(x: Array, y: Array) -> Array:
    s = sigmoid(x)
    return s + y * (1 - s)


@_slope(gelu)
def _gelu(x: Array, y: Array) -> Array:
    """Phi(x) + x phi(x), where phi is 0 in every type beyond 40"""
    xp = xp_of(x)
    above = _above(x)
    below = above + normal_tail(xp.minimum(xp.absolute(x), 39)) * (1 - 2 * above)
    near = xp.maximum(xp.minimum(x, 40), -40)
    return below + near * (xp.exp(near * near * -0.5) * 0.3989422804014327)


@_slope(gelu_tanh)
def _gelu_tanh(x: Array, y: Array) -> Array:
    xp = xp_of(x)
    c = xp.maximum(xp.minimum(x, 32), -32)
    square = c * c * 0.044715
    s = sigmoid(c * (square + 1) * (2 * 0.7978845608028654))
    return s + c * s * (1 - s) * ((square * 3 + 1) * (2 * 0.7978845608028654))


@_slope(mish)
def _mish(x: Array, y: Array) -> Array:
    """t + x (1 - t^2) sigmoid(x), t = tanh(softplus(x))"""
    xp = xp_of(x)
    near = xp.minimum(x, 40)
    e = xp.exp(near)
    n = (e + 2) * e
    t = n / (n + 2)
    return t + near * (1 - t * t) * (e / (e + 1))
