"""The numbers of a step where its work is recorded, and the same work is done every time."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np

from nnxp._arrays import Array, xp_of


class StepNumbers:
    """What stands for t where the same work is to do every step: its numbers lie on a device.

    Each of them is computed for the step of now, and filled in, by `fill`.
    """

    MOST = 8

    def __init__(self, like: Array) -> None:
        self._array = xp_of(like).zeros((self.MOST,), like.dtype)
        self._values = np.zeros(self.MOST, like.dtype)
        self._functions: list[Callable[[Any, int], float]] = []
        self._optimizer: Any = None
        self._t = 0

    def fill(self, optimizer: Any, t: int) -> None:
        """The numbers of step t of an optimiser."""
        self._optimizer, self._t = optimizer, t
        for i, function in enumerate(self._functions):
            self._values[i] = function(optimizer, t)
        self._array.set(self._values)

    def of(self, function: Callable[[Any, int], float]) -> Array:
        """A number without axes: function(optimizer, t)."""
        if function not in self._functions:
            self._functions.append(function)
            self.fill(self._optimizer, self._t)
        return self._array[self._functions.index(function)]


def of_step(function: Callable[[Any, int], float]) -> Callable[[Any, Any], Any]:
    """A number that follows from t alone: a float, or on a device where t is `StepNumbers`."""

    @wraps(function)
    def number(self: Any, t: int | StepNumbers) -> Any:
        return t.of(function) if isinstance(t, StepNumbers) else function(self, t)

    return number
