"""Convolutions and their transposes, over any number of axes."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod, sqrt
from typing import Any

from nnxp import kernels
from nnxp._arrays import Array, float_dtype
from nnxp._errors import OptionError
from nnxp.kernels._windows import Padding, PerAxis, padding_option, per_axis, window_option
from nnxp.layers._layer import Example, Layer, Rng, check_weight, uniform, whole, zero_bias
from nnxp.layers.activation import named


class _Convolution(Layer):
    """What a convolution and its transpose share: parameters and options."""

    weight: Array
    bias: Array | None = None
    activation: str = "identity"
    stride: PerAxis = 1
    padding: Padding = 0
    dilation: PerAxis = 1
    groups: int = 1

    def __init__(
        self,
        inputs: int,
        outputs: int,
        window: tuple[int, ...],
        activation: kernels.ActivationName = "identity",
        *,
        stride: PerAxis = 1,
        padding: Padding = 0,
        dilation: PerAxis = 1,
        groups: int = 1,
        bias: bool = True,
        rng: Rng = None,
        dtype: object = "float32",
    ) -> None:
        name = type(self).__name__
        inputs, outputs = whole(f"{name}'s inputs", inputs), whole(f"{name}'s outputs", outputs)
        groups, window = whole(f"{name}'s groups", groups), window_option(name, window)
        if inputs % groups or outputs % groups:
            raise OptionError(
                f"groups of {name} divides its inputs and outputs, {inputs} and {outputs}, not "
                f"{groups}"
            )
        kind = float_dtype(dtype)
        limit = sqrt(6 * groups / (prod(window) * (inputs + outputs)))
        self.weight = uniform((*window, inputs // groups, outputs), limit, rng, kind)
        self.bias = zero_bias(name, bias, outputs, kind)
        self.activation = activation
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.groups = groups

    def validate(self) -> None:
        check_weight(self, "(*window, channels / groups, outputs)", range(3, 65))  # of 64 at most
        name, weight = type(self).__name__, self.weight.shape
        if weight[-1] % whole(f"{name}'s groups", self.groups):
            raise OptionError(
                f"groups of {name} divides its outputs, {weight[-1]}, not {self.groups}"
            )
        axes = len(weight) - 2
        self.activation = named(self.activation).__name__
        self.stride = per_axis(f"stride of {name}", self.stride, axes)
        self.padding = padding_option(f"padding of {name}", self.padding, axes)
        self.dilation = per_axis(f"dilation of {name}", self.dilation, axes)

    def _options(self) -> dict[str, Any]:
        names = ("stride", "padding", "dilation", "groups")
        return {name: getattr(self, name) for name in names} | {
            "activation": kernels.ACTIVATIONS[self.activation]
        }

    def __repr__(self) -> str:
        *window, inner, outputs = self.weight.shape
        plain = {"stride": (1,) * len(window), "padding": ((0, 0),) * len(window),
                 "dilation": (1,) * len(window), "groups": 1}  # fmt: skip
        options = "".join(
            f", {name}={getattr(self, name)}"
            for name, default in plain.items()
            if getattr(self, name) != default
        )
        return (
            f"{type(self).__name__}({inner * self.groups}, {outputs}, {tuple(window)}, "
            f"{self.activation}{options})"
        )


def window_of_conv(weight: Array) -> Array:
    """The weight of a convolution, which torch and ONNX have as (outputs, channels / groups,
    *window), with its channels last."""
    return weight.transpose((*range(2, weight.ndim), 1, 0))


def window_of_conv_transpose(weight: Array, groups: int) -> Array:
    """The weight of a transposed convolution, which torch and ONNX have as (channels, outputs /
    groups, *window), as (*window, channels / groups, outputs)."""
    channels, outputs, *window = weight.shape
    apart = weight.reshape((groups, channels // groups, outputs, *window))
    apart = apart.transpose((*range(3, len(window) + 3), 1, 0, 2))
    return apart.reshape((*window, channels // groups, groups * outputs))


class Conv(_Convolution):
    """y = activation(x * weight + bias): each output sees a window of x, the same at all places.

    x (rows, *space, inputs) -> y (rows, *positions, outputs): channels are the last axis. weight
    (*window, inputs / groups, outputs), bias (outputs,). `window` says how many axes space has.
    `padding` is of zeros: a number, for each axis a number or a pair (before, behind), or "same",
    which makes ceil(space / stride) positions. With as many groups as inputs it is depthwise.
    Weights start uniform in ±sqrt(6 groups / (window * (inputs + outputs))) [Glorot & Bengio 2010],
    biases at zero. [Dumoulin & Visin 2016, arXiv:1603.07285]

        nnxp.Conv(3, 32, (3, 3), "relu", stride=2, padding="same")
    """

    def __call__(self, x: Array) -> Array:
        return kernels.conv(x, self.weight, self.bias, **self._options())

    @classmethod
    def examples(cls) -> Iterator[Example]:
        make: Any = cls
        yield make(3, 4, (3, 3), "relu", padding=1, rng=0), (2, 5, 6, 3)
        yield make(2, 3, (1,), rng=1, stride=2, bias=False), (3, 7, 2)
        yield (
            make(4, 6, (3, 2), "tanh", groups=2, stride=(1, 2), padding="same", rng=2),
            (2, 4, 5, 4),
        )
        yield make(3, 3, (3, 3), groups=3, stride=2, padding=((0, 1), (1, 2)), rng=3), (2, 5, 6, 3)
        yield make(2, 4, (2, 1, 3), groups=2, dilation=(1, 1, 2), rng=4), (2, 3, 2, 6, 2)


class ConvTranspose(_Convolution):
    """y = activation(x *' weight + bias), the transpose of a convolution: each element of x adds a
    window's worth to y, at places that are a stride apart.

    x (rows, *space, inputs) -> y (rows, *made, outputs), where along an axis of n
    (n - 1) stride - padding + dilation (window - 1) + 1 + output_padding are made, and n stride
    with padding "same". weight (*window, inputs / groups, outputs), bias (outputs,); the rest as in
    Conv.
    """

    output_padding: PerAxis = 0

    def __init__(
        self,
        inputs: int,
        outputs: int,
        window: tuple[int, ...],
        activation: kernels.ActivationName = "identity",
        *,
        output_padding: PerAxis = 0,
        **options: Any,
    ) -> None:
        super().__init__(inputs, outputs, window, activation, **options)
        self.output_padding = output_padding

    def validate(self) -> None:
        super().validate()
        axes = len(self.weight.shape) - 2
        who = f"output_padding of {type(self).__name__}"
        self.output_padding = per_axis(who, self.output_padding, axes, 0)

    def __call__(self, x: Array) -> Array:
        more = {"output_padding": self.output_padding}
        return kernels.conv_transpose(x, self.weight, self.bias, **self._options(), **more)

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield cls(3, 4, (2, 2), "relu", stride=2, rng=0), (2, 3, 4, 3)
        yield cls(2, 3, (4,), stride=2, padding=1, output_padding=1, rng=1), (3, 5, 2)
        yield (
            cls(4, 6, (3, 3), "tanh", groups=2, stride=(1, 2), padding="same", rng=2),
            (2, 3, 4, 4),
        )
        yield cls(3, 3, (1, 2), groups=3, stride=3, bias=False, rng=3), (2, 2, 3, 3)
