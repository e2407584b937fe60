"""Activations as layers of their own."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, get_args

import numpy as np

from nnxp import kernels
from nnxp._arrays import Array, float_dtype
from nnxp._errors import OptionError, ShapeError
from nnxp.layers._layer import Example, Layer, array_shape, is_real, whole

ALIASES = {
    "geluapproximate": "gelu_tanh",
    "gelunew": "gelu_tanh",
    "gelupytorchtanh": "gelu_tanh",
    "hardsilu": "hard_swish",
    "hsigmoid": "hard_sigmoid",
    "hswish": "hard_swish",
    "linear": "identity",
    "logistic": "sigmoid",
    "lrelu": "leaky_relu",
    "swish": "silu",
}
"""Other names of the field, without capitals, hyphens and underscores."""

_LAYERS = {
    "glu": "GLU",
    "prelu": "PReLU",
}  # no activations by name, though others have them as such


def named(activation: str) -> kernels.Kernel:
    """The activation of this name, in any spelling: "leaky_relu", "LeakyReLU", "leaky-relu".

    Raises OptionError with the nearest names if there is none.
    """
    names = {_plain(name): name for name in kernels.ACTIVATIONS} | ALIASES
    plain = _plain(activation) if isinstance(activation, str) else ""
    if plain in names:
        return kernels.ACTIVATIONS[names[plain]]
    if plain in _LAYERS:
        raise OptionError(
            f"{activation!r} is no activation by name but a layer of its own: nnxp.{_LAYERS[plain]}"
        )
    from difflib import get_close_matches

    near = dict.fromkeys(names[match] for match in get_close_matches(plain, names))
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    known = ", ".join(sorted(kernels.ACTIVATIONS))
    raise OptionError(f"there is no activation {activation!r:.60}{hint} The names are {known}")


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "").replace(" ", "")


def _number(what: str, value: Any) -> float:
    """A number as a float; OptionError for anything else."""
    if not is_real(value):
        raise OptionError(f"{what} is a number, not {value!r:.60}")
    return float(value)


class Activation(Layer):
    """y = activation(x), elementwise, or along the last axis for the softmaxes.

    x (rows, ...) -> y like x. Options of the activation follow its name:
    `Activation("leaky_relu", negative_slope=0.2)`. The name is one of `nnxp.kernels.ACTIVATIONS`,
    in any spelling; what is kept is the name there. Raises OptionError for another name or option.
    """

    activation: str
    options: dict[str, float]

    def __init__(self, activation: kernels.ActivationName, **options: float) -> None:
        self.activation = activation
        self.options = options

    def validate(self) -> None:
        kernel = named(self.activation)
        self.activation = kernel.__name__
        known = set(inspect.signature(kernel.reference).parameters) - {"x", "out"}
        if not self.options.keys() <= known:
            raise OptionError(
                f"{self.activation} has "
                f"{'the options ' + ', '.join(sorted(known)) if known else 'no options'}, "
                f"not {', '.join(sorted(self.options.keys() - known))}"
            )
        for name, value in self.options.items():
            _number(f"{name} of {self.activation}", value)
        with np.errstate(all="ignore"):
            kernel.reference(np.zeros((1, 1), "float32"), **self.options)  # refuses what it must

    def __call__(self, x: Array) -> Array:
        softmax = self.activation in ("softmax", "softmin", "log_softmax")
        if softmax and (x.ndim < 2 or not x.shape[-1]):
            got = f"{x.ndim} axis" if x.ndim < 2 else "no classes"
            raise ShapeError(f"{self} takes (rows, ..., classes) but got {got}")
        return kernels.ACTIVATIONS[self.activation](x, **self.options)

    def __repr__(self) -> str:
        options = "".join(f", {name}={value}" for name, value in self.options.items())
        return f"Activation({self.activation}{options})"

    @classmethod
    def examples(cls) -> Iterator[Example]:
        for name in get_args(kernels.ActivationName):
            yield cls(name), (5, 7)
        yield cls("leaky_relu", negative_slope=0.2), (2, 3, 4)
        yield cls("elu", alpha=0.5), (3, 1)
        yield cls("hard_tanh", min_val=-0.5, max_val=2.0), (4, 6)


class PReLU(Layer):
    """y = x where x > 0, else slope * x, with a slope that is learned   [He et al. 2015]

    x (rows, ..., channels) -> y like x; slope (channels,), or (1,) for all channels of any x.
    Slopes start at `slope`.

        nnxp.PReLU(64)          # one slope for each of 64 channels
        nnxp.PReLU()            # one for all
    """

    slope: Array

    def __init__(
        self, channels: int = 1, *, slope: float = 0.25, dtype: object = "float32"
    ) -> None:
        start = _number("PReLU's slope", slope)
        self.slope = np.full(whole("PReLU's channels", channels), start, float_dtype(dtype))

    def validate(self) -> None:
        shape = array_shape(self, "slope")
        if len(shape) != 1 or 0 in shape:
            raise ShapeError(f"PReLU takes slope (channels,) or (1,); got {shape}")

    def __call__(self, x: Array) -> Array:
        (channels,) = self.slope.shape
        if channels > 1 and (x.ndim < 2 or x.shape[-1] != channels):
            got = ", ".join(["rows", *map(str, x.shape[1:])])
            raise ShapeError(f"{self} takes (rows, ..., {channels}) but got ({got})")
        return kernels.prelu(x, self.slope)

    def __repr__(self) -> str:
        return f"PReLU({self.slope.shape[0]})"

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield cls(), (4, 5)
        yield cls(7, slope=-0.5), (3, 2, 7)


class GLU(Layer):
    """y = a * sigmoid(b), a and b the halves of the last axis of x   [Dauphin et al. 2017]

    x (rows, ..., 2 channels) -> y (rows, ..., channels). Raises ShapeError for an odd size.
    """

    def __call__(self, x: Array) -> Array:
        if x.ndim < 2:
            raise ShapeError(f"{self} takes (rows, ..., 2 channels) but got {x.ndim} axis")
        return kernels.glu(x)

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield cls(), (4, 6)
        yield cls(), (2, 3, 8)
