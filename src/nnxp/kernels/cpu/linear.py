"""Products whose bias and activation follow while each block of their result is in cache."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from nnxp._arrays import HostArray
from nnxp.kernels._dispatch import InPlace, Kernel, Operand
from nnxp.kernels.activations import identity
from nnxp.kernels.cpu import onednn
from nnxp.kernels.cpu._finish import Finish
from nnxp.kernels.cpu._pieces import carved, plain, room
from nnxp.kernels.cpu._small import Weight
from nnxp.kernels.linear import linear, matmul

LINES = 512  # of a product at once, at least: fewer are slower
BLOCK = 512 << 10  # bytes of a result that are finished before the next


def product(x: HostArray, weight: Weight, out: HostArray, finish: Finish) -> None:
    """finish(x @ weight), for matrices, in blocks of lines."""
    if finish.idle:
        weight(x, out)
        return
    step = max(LINES, BLOCK // (out.shape[1] * out.itemsize))
    if weight.lines:
        step += -step % weight.lines
    for start in range(0, len(x), step):
        block = out[start : start + step]
        weight(x[start : start + step], block)
        finish(block)


@linear.in_place
def linear_in_place(
    x: Operand,
    weight: Operand,
    bias: Operand | None = None,
    *,
    activation: Kernel = identity,
    precision: str | None = None,
) -> InPlace | None:
    """For x of several axes, whose lines are many; one call for each does for others."""
    constant = weight.numbers is not None and (bias is None or bias.numbers is not None)
    if x.ndim < 3 or not constant or not plain(x, weight, bias) or 0 in weight.shape:
        return None
    shift = None if bias is None else np.ascontiguousarray(bias.numbers)
    by_onednn = x.dtype == np.float32 and onednn.why_not() is None  # which adds it on the way
    matrix = Weight(np.ascontiguousarray(weight.numbers), shift if by_onednn else None)
    finish = Finish(None if by_onednn else shift, activation, x.dtype)
    inputs, outputs = weight.shape

    def run(out: HostArray, scratch: HostArray, x: HostArray, *_: Any) -> None:
        y = out.reshape(-1, outputs)
        if x.flags.c_contiguous:
            product(x.reshape(-1, inputs), matrix, y, finish)
            return
        (own,) = carved(scratch, x.dtype, x.shape)
        np.copyto(own, x)
        product(own.reshape(-1, inputs), matrix, y, finish)

    elements = prod(x.shape[1:])

    def bytes_for(rows: int) -> int:
        result_bytes = rows * elements // inputs * outputs * x.dtype.itemsize
        return room(x.dtype, (rows * elements,)) + finish.room(result_bytes)

    return InPlace(run, bytes_for, lambda rows: rows * elements * outputs)


@matmul.in_place
def matmul_in_place(x: Operand, weight: Operand, *, precision: str | None = None) -> InPlace | None:
    return linear_in_place(x, weight)
