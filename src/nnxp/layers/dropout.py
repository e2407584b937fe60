"""What only training sees."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from nnxp._arrays import Array, HostArray
from nnxp._errors import OptionError
from nnxp.layers._layer import Example, Layer, is_real
from nnxp.program import traced


class Dropout(Layer):
    """y = x; in training each element is dropped with probability `rate`, the others grow.

    In training y = x * kept / (1 - rate), where `kept` is drawn anew for each batch, so that the
    mean of y is that of x.   [Srivastava et al. 2014]
    """

    rate: float

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def validate(self) -> None:
        if not (is_real(self.rate) and 0 <= self.rate < 1):
            raise OptionError(f"a dropout rate is at least 0 and below 1, not {self.rate!r:.60}")

    def __call__(self, x: Array) -> Array:
        return x

    def training(self) -> Any:
        return _DropoutInTraining.of(self.rate) if self.rate else self

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield cls(0.5), (3, 4)


class _DropoutInTraining(Dropout):
    """Dropout that drops."""

    in_training = True

    def __call__(self, x: Array) -> Array:
        if not isinstance(x, traced.ndarray):
            raise OptionError(traced.ONLY_IN_TRAINING.format(self))
        shape, rate = x.shape, self.rate

        def draw(rng: np.random.Generator) -> HostArray:
            kept: Any = rng.random(shape, dtype="float32") >= rate
            return kept  # type: ignore[no-any-return]

        return x * traced.drawn(shape, "bool", draw) * (1 / (1 - rate))

    def training(self) -> _DropoutInTraining:
        return self
