"""What follows a product, in place: a bias and an activation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from nnxp._arrays import HostArray
from nnxp.kernels._dispatch import Kernel
from nnxp.kernels.activations import gelu, identity, relu
from nnxp.kernels.cpu._gelu import gelu_in_place, takes
from nnxp.kernels.cpu._pieces import PIECE, zeros

PASSES = 3
"""Pieces that an activation may hold at once besides its own, as its reference body makes them."""

LONG = 8192  # elements: what NumPy's buffers hold


class Finish:
    """activation(y + bias) in place, for y (lines, outputs), by pieces.

    The bias is repeated to LONG elements: NumPy takes twice as long to add shorter lines.
    """

    def __init__(self, bias: HostArray | None, activation: Kernel, dtype: Any) -> None:
        self.activation = activation
        self.bias = None if bias is None else np.tile(bias, -(-LONG // max(1, bias.size)))

    def room(self, nbytes: int) -> int:
        """The bytes that an activation makes anew for y of so many, at most."""
        simple = self.activation is identity or self.activation is relu
        return 0 if simple else PASSES * min(PIECE, nbytes)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return self.bias is None and self.activation is identity

    def bound(self, y: HostArray) -> list[Callable[[], object]]:
        """The calls that finish y, as long as it is there."""
        least = zeros(y.shape, y.dtype)
        if self.bias is None and self.activation is relu and least is not None:
            return [partial(np.maximum, y, least, out=y)]
        return [] if self.idle else [partial(self, y)]

    def __call__(self, y: HostArray) -> None:
        if self.idle:
            return
        if self.bias is None and self.activation is gelu and takes(y):
            gelu_in_place(y)
            return
        if y.nbytes <= PIECE:
            self._piece(y)
            return
        lines, outputs = y.shape
        step = max(1, PIECE // (outputs * y.itemsize))
        for start in range(0, lines, step):
            self._piece(y[start : start + step])

    def _piece(self, y: HostArray) -> None:
        if self.bias is not None:
            rest, size = y.reshape(-1), self.bias.size
            if rest.size >= size:
                whole = rest.size - rest.size % size
                long, rest = rest[:whole].reshape(-1, size), rest[whole:]
                np.add(long, self.bias, long)
            np.add(rest, self.bias[: rest.size], rest)
        if self.activation is relu:
            least = zeros(y.shape, y.dtype)
            if least is None:
                np.clip(y, 0, np.inf, out=y)
            else:
                np.maximum(y, least, out=y)
        elif self.activation is not identity:
            self.activation.reference(y, out=y)
