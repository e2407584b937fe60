"""Activations as layers of their own."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from nnxp import kernels
from nnxp._arrays import Array
from nnxp._errors import OptionError, ShapeError
from nnxp.layers._layer import Example, Layer, is_real


def named(activation: str) -> kernels.Kernel:
    """The activation of this name; OptionError with all the names if there is none."""
    try:
        return kernels.ACTIVATIONS[activation]
    except (KeyError, TypeError):
        from difflib import get_close_matches

        near = _ELSEWHERE.get(str(activation).lower(), str(activation).lower())
        (meant, *_) = [*get_close_matches(near, kernels.ACTIVATIONS), ""]
        raise OptionError(
            f"there is no activation {activation!r:.60}; "
            + (f"{meant!r} may be meant; " if meant else "")
            + f"the names are {', '.join(sorted(kernels.ACTIVATIONS))}"
        ) from None


_ELSEWHERE = {"swish": "silu", "linear": "identity", "logistic": "sigmoid", "none": "identity"}
"""What other libraries call activations, and what they are called here."""


class Activation(Layer):
    """y = activation(x), elementwise, or along the last axis for the softmaxes.

    x (rows, ...) -> y like x. Options of the activation follow its name:
    `Activation("leaky_relu", negative_slope=0.2)`.
    """

    activation: str
    options: dict[str, float]

    def __init__(self, activation: str, **options: float) -> None:
        self.activation = named(activation).__name__
        self.options = options

    def validate(self) -> None:
        kernel = named(self.activation)
        known = set(inspect.signature(kernel.reference).parameters) - {"x", "out"}
        if not self.options.keys() <= known:
            raise OptionError(
                f"{self.activation} has "
                f"{'the options ' + ', '.join(known) if known else 'no options'}, "
                f"not {', '.join(sorted(self.options.keys() - known))}"
            )
        for name, value in self.options.items():
            if not is_real(value):
                raise OptionError(f"{name} of {self.activation} is a number, not {value!r:.60}")

    def __call__(self, x: Array) -> Array:
        if self.activation in ("softmax", "log_softmax") and (x.ndim < 2 or not x.shape[-1]):
            got = f"{x.ndim} axis" if x.ndim < 2 else "no classes"
            raise ShapeError(f"{self} takes (rows, ..., classes) but got {got}")
        return kernels.ACTIVATIONS[self.activation](x, **self.options)

    def __repr__(self) -> str:
        options = "".join(f", {name}={value}" for name, value in self.options.items())
        return f"Activation({self.activation}{options})"

    @classmethod
    def examples(cls) -> Iterator[Example]:
        for name in kernels.ACTIVATIONS:
            yield cls(name), (5, 7)
        yield cls("leaky_relu", negative_slope=0.2), (2, 3, 4)
        yield cls("elu", alpha=0.5), (3, 1)
