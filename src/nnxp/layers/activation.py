"""Activations as layers of their own."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from nnxp import kernels
from nnxp._arrays import Array, Shape
from nnxp._errors import OptionError, ShapeError
from nnxp.layers._layer import Layer


def named(activation: str) -> kernels.Kernel:
    """The activation of this name; OptionError with all the names if there is none."""
    try:
        return kernels.ACTIVATIONS[activation]
    except (KeyError, TypeError):
        names = ", ".join(sorted(kernels.ACTIVATIONS))
        raise OptionError(f"there is no activation {activation!r}; the names are {names}") from None


class Activation(Layer):
    """y = activation(x), elementwise, or along the last axis for the softmaxes.

    x (rows, ...) -> y like x. Options of the activation follow its name:
    `Activation("leaky_relu", negative_slope=0.2)`.
    """

    activation: str
    options: dict[str, float]

    def __init__(self, activation: str, **options: float) -> None:
        self._set(
            activation=named(activation).__name__,
            options={name: float(v) for name, v in options.items()},
        )

    def _validate(self) -> None:
        kernel = named(self.activation)
        known = set(inspect.signature(kernel.reference).parameters) - {"x", "out"}
        if not self.options.keys() <= known:
            raise OptionError(
                f"{self.activation} has "
                f"{'the options ' + ', '.join(known) if known else 'no options'}, "
                f"not {', '.join(sorted(self.options.keys() - known))}"
            )

    def __call__(self, x: Array) -> Array:
        return kernels.ACTIVATIONS[self.activation](x, **self.options)

    @property
    def temporaries(self) -> int:
        return kernels.ACTIVATIONS[self.activation].temporaries

    def output_shape(self, shape: Shape) -> Shape:
        if self.activation in ("softmax", "log_softmax") and (len(shape) < 2 or 0 in shape[1:]):
            raise ShapeError(f"{self} takes (rows, ..., classes) but got {shape}")
        return shape

    def __repr__(self) -> str:
        options = "".join(f", {name}={value}" for name, value in self.options.items())
        return f"Activation({self.activation}{options})"

    @classmethod
    def examples(cls) -> Iterator[tuple[Layer, Shape]]:
        for name in kernels.ACTIVATIONS:
            yield cls(name), (5, 7)
        yield cls("leaky_relu", negative_slope=0.2), (2, 3, 4)
        yield cls("elu", alpha=0.5), (3, 1)
