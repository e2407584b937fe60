"""Elementwise functions: each takes `out=`, which may be its own input, to work in place.

None overflows on the way to a result that its type can hold, so that no such input raises a
floating-point warning, and NaN goes through every one of them as NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from nnxp._arrays import Array, xp_of
from nnxp.kernels._dispatch import Body, Kernel
from nnxp.kernels._erf import erf

ACTIVATIONS: dict[str, Kernel] = {}
"""The activations by name: what `Dense(..., activation=...)` and `Activation(...)` accept."""


def activation(temporaries: int) -> Callable[[Body], Kernel]:
    """Decorator: a kernel that is an activation, known by its name.

    `temporaries` is how many arrays like x it holds at once besides x and its result.
    """

    def register(reference: Body) -> Kernel:
        made = Kernel(reference, temporaries)
        ACTIVATIONS[made.__name__] = made
        return made

    return register


@activation(temporaries=0)
def identity(x: Array, *, out: Array | None = None) -> Array:
    """y = x"""
    if out is None:
        return x
    if out is not x:
        out[...] = x
    return out


@activation(temporaries=0)
def relu(x: Array, *, out: Array | None = None) -> Array:
    """y = max(x, 0)   [Nair & Hinton 2010]"""
    return xp_of(x).maximum(x, 0, out=out)


@activation(temporaries=1)
def leaky_relu(x: Array, *, negative_slope: float = 0.01, out: Array | None = None) -> Array:
    """y = x where x > 0, else negative_slope * x   [Maas, Hannun, Ng 2013]"""
    xp = xp_of(x)
    below = xp.minimum(x, 0)
    below *= negative_slope
    y = xp.maximum(x, 0, out=out)
    y += below
    return y


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


@activation(temporaries=1)
def elu(x: Array, *, alpha: float = 1.0, out: Array | None = None) -> Array:
    """y = x where x > 0, else alpha * (exp(x) - 1)   [Clevert, Unterthiner, Hochreiter 2015]"""
    return _exponential_below(x, alpha, 1.0, out)


SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805


@activation(temporaries=1)
def selu(x: Array, *, out: Array | None = None) -> Array:
    """y = scale * elu(x, alpha), with alpha and scale of [Klambauer et al. 2017]"""
    return _exponential_below(x, SELU_ALPHA, SELU_SCALE, out)


@activation(temporaries=1)
def softplus(x: Array, *, out: Array | None = None) -> Array:
    """y = log(1 + exp(x)), as max(x, 0) + log1p(exp(-|x|))   [Dugas et al. 2001]"""
    xp = xp_of(x)
    tail = xp.abs(x)
    xp.negative(tail, out=tail)
    xp.exp(tail, out=tail)
    xp.log1p(tail, out=tail)
    y = xp.maximum(x, 0, out=out)
    y += tail
    return y


@activation(temporaries=1)
def softsign(x: Array, *, out: Array | None = None) -> Array:
    """y = x / (1 + |x|)   [Turian, Bergstra, Bengio 2009]"""
    xp = xp_of(x)
    below = xp.abs(x)
    below += 1
    return xp.divide(x, below, out=out)


@activation(temporaries=0)
def sigmoid(x: Array, *, out: Array | None = None) -> Array:
    """y = 1 / (1 + exp(-x)); where exp overflows, 1 / infinity is the right 0"""
    xp = xp_of(x)
    y = xp.negative(x, out=out)
    with np.errstate(over="ignore"):
        xp.exp(y, out=y)
    y += 1
    return xp.divide(1, y, out=y)


@activation(temporaries=0)
def hard_sigmoid(x: Array, *, out: Array | None = None) -> Array:
    """y = min(max(x / 6 + 1/2, 0), 1), as in Keras 3 and PyTorch"""
    xp = xp_of(x)
    y = xp.divide(x, 6, out=out)
    y += 0.5
    xp.maximum(y, 0, out=y)
    return xp.minimum(y, 1, out=y)


@activation(temporaries=0)
def tanh(x: Array, *, out: Array | None = None) -> Array:
    """y = tanh(x)"""
    return xp_of(x).tanh(x, out=out)


@activation(temporaries=1)
def silu(x: Array, *, out: Array | None = None) -> Array:
    """y = x * sigmoid(x)   [Elfwing, Uchibe, Doya 2017; swish]"""
    return xp_of(x).multiply(x, sigmoid(x), out=out)


@activation(temporaries=5)
def gelu(x: Array, *, out: Array | None = None) -> Array:
    """y = x * Phi(x) = x/2 * (1 + erf(x / sqrt(2)))   [Hendrycks & Gimpel 2016], exact"""
    y = erf(x * 0.7071067811865476)
    y += 1
    y *= 0.5
    return xp_of(x).multiply(x, y, out=out)


@activation(temporaries=2)
def gelu_tanh(x: Array, *, out: Array | None = None) -> Array:
    """y = x/2 * (1 + tanh(u)) = x * sigmoid(2 u), u = sqrt(2/pi) * (x + 0.044715 x^3)

    The approximation of [Hendrycks & Gimpel 2016] and of GPT-2. Beyond |x| = 32 the sigmoid is 0
    or 1 in every type, so x is clipped there and its cube cannot overflow.
    """
    xp = xp_of(x)
    u = xp.minimum(x, 32)
    xp.maximum(u, -32, out=u)
    square = u * u
    square *= 0.044715
    square += 1
    u *= square
    u *= 2 * 0.7978845608028654
    return xp.multiply(x, sigmoid(u, out=u), out=out)


@activation(temporaries=2)
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
    below = (erf(x * 0.7071067811865476) + 1) * 0.5
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
