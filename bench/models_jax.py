"""The networks of models.py in JAX, with the weights of the torch modules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = Any
Forward = Callable[[Array], Array]


def forward(module: Any, dtype: str = "float32") -> Forward:
    """What the module computes, for `jax.jit`; pictures come in torch's order and go channels last.

    Its arrays are of the type `dtype`, and constants of what is compiled.
    """
    run = _converted(module, partial(_array, dtype=dtype))
    return lambda x: run(jnp.moveaxis(x, 1, -1) if x.ndim == 4 else x)


def _array(weight: Any, dtype: str) -> Array:
    return jnp.asarray(weight.detach().numpy()).astype(dtype)


def _converted(module: Any, array: Callable[[Any], Array]) -> Forward:
    return CONVERTERS[type(module).__name__](module, array)


def _sequential(module: Any, array: Callable[[Any], Array]) -> Forward:
    parts = [_converted(part, array) for part in module]

    def run(x: Array) -> Array:
        for part in parts:
            x = part(x)
        return x

    return run


def _dense(module: Any, array: Callable[[Any], Array]) -> Forward:
    weight, bias = array(module.weight).T, array(module.bias)
    return lambda x: x @ weight + bias


def _conv(module: Any, array: Callable[[Any], Array]) -> Forward:
    weight = jnp.transpose(array(module.weight), (2, 3, 1, 0))
    bias = 0 if module.bias is None else array(module.bias)
    options = {
        "window_strides": module.stride,
        "padding": [(p, p) for p in module.padding],
        "feature_group_count": module.groups,
        "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
    }
    return lambda x: lax.conv_general_dilated(x, weight, **options) + bias


def _batch_norm(module: Any, array: Callable[[Any], Array]) -> Forward:
    factor = module.weight / (module.running_var + module.eps).sqrt()
    scale, shift = array(factor), array(module.bias - module.running_mean * factor)
    return lambda x: x * scale + shift


def _max_pool(module: Any, array: Callable[[Any], Array]) -> Forward:
    def twice(n: Any) -> tuple[int, int]:
        return n if isinstance(n, tuple) else (n, n)

    window, stride = (1, *twice(module.kernel_size), 1), (1, *twice(module.stride), 1)
    padding = [(p, p) for p in (0, *twice(module.padding), 0)]
    return lambda x: lax.reduce_window(x, -jnp.inf, lax.max, window, stride, padding)


def _flatten(module: Any, array: Callable[[Any], Array]) -> Forward:
    """In torch's order, channels first."""
    return lambda x: jnp.moveaxis(x, -1, 1).reshape(len(x), -1)


def _residual(module: Any, array: Callable[[Any], Array]) -> Forward:
    way, shortcut = _converted(module.way, array), _converted(module.shortcut, array)
    return lambda x: jax.nn.relu(way(x) + shortcut(x))


def _layer_norm(module: Any, array: Callable[[Any], Array]) -> Forward:
    weight, bias = array(module.weight), array(module.bias)

    def run(x: Array) -> Array:
        wide = x.astype(jnp.float32)
        scale = lax.rsqrt(wide.var(-1, keepdims=True) + module.eps)
        return ((wide - wide.mean(-1, keepdims=True)) * scale).astype(x.dtype) * weight + bias

    return run


def _encoder_layer(module: Any, array: Callable[[Any], Array]) -> Forward:
    names = "q k v o inner outer norm1 norm2".split()
    q, k, v, o, inner, outer, norm1, norm2 = (
        _converted(getattr(module, name), array) for name in names
    )

    def run(x: Array) -> Array:
        heads = (*x.shape[:2], module.heads, -1)
        y = jax.nn.dot_product_attention(*(part(x).reshape(heads) for part in (q, k, v)))
        x = norm1(x + o(y.reshape(x.shape)))
        return norm2(x + outer(jax.nn.gelu(inner(x), approximate=False)))

    return run


def _lstm(module: Any, array: Callable[[Any], Array]) -> Forward:
    lstm = module.lstm
    of_input, of_state = array(lstm.weight_ih_l0).T, array(lstm.weight_hh_l0).T
    bias = array(lstm.bias_ih_l0) + array(lstm.bias_hh_l0)

    def step(carry: tuple[Array, Array], gates: Array) -> tuple[tuple[Array, Array], Array]:
        h, c = carry
        i, f, g, o = jnp.split(gates + h @ of_state, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    def run(x: Array) -> Array:
        gates = jnp.moveaxis(x @ of_input + bias, 1, 0)
        zero = jnp.zeros((len(x), lstm.hidden_size), x.dtype)
        return jnp.moveaxis(lax.scan(step, (zero, zero), gates)[1], 0, 1)

    return run


CONVERTERS: dict[str, Callable[[Any, Callable[[Any], Array]], Forward]] = {
    "Sequential": _sequential,
    "Linear": _dense,
    "Conv2d": _conv,
    "BatchNorm2d": _batch_norm,
    "MaxPool2d": _max_pool,
    "AdaptiveAvgPool2d": lambda module, array: lambda x: x.mean((1, 2), keepdims=True),
    "Flatten": _flatten,
    "Identity": lambda module, array: lambda x: x,
    "ReLU": lambda module, array: jax.nn.relu,
    "Hardswish": lambda module, array: jax.nn.hard_swish,
    "LayerNorm": _layer_norm,
    "Residual": _residual,
    "Layer": _encoder_layer,
    "Last": _lstm,
}
"""By the name of a module's class, what makes a function of it."""
