"""What only training sees."""

from __future__ import annotations

from collections.abc import Iterator

from nnxp._arrays import Array, Shape
from nnxp._errors import OptionError
from nnxp.layers._layer import Layer


class Dropout(Layer):
    """y = x in a forward pass; in training each element would be dropped with probability `rate`.

    It is here so that a trained network can be written down as it was trained.
    [Srivastava et al. 2014]
    """

    rate: float

    def __init__(self, rate: float) -> None:
        self._set(rate=float(rate))

    def _validate(self) -> None:
        if not 0 <= self.rate < 1:
            raise OptionError(f"a dropout rate is at least 0 and below 1, not {self.rate}")

    def __call__(self, x: Array) -> Array:
        return x

    @classmethod
    def examples(cls) -> Iterator[tuple[Layer, Shape]]:
        yield cls(0.5), (3, 4)
