"""Which way is the fastest: cuBLASLt's algorithms are timed, and its epilogues against our pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import cupy
import numpy as np

from nnxp._arrays import Array
from nnxp.kernels._dispatch import Kernel
from nnxp.kernels.activations import identity, relu
from nnxp.kernels.cuda._compiled import launch
from nnxp.kernels.cuda.lt.bindings import BIAS, DEFAULT, RELU_BIAS, LtError
from nnxp.kernels.cuda.lt.descriptors import PASS, Algorithm, Form, Product
from nnxp.kernels.cuda.lt.passes import rest

# GELU_BIAS is left out: it is the tanh form, and NVIDIA does not say how exact its tanh is.
EPILOGUES = {identity: BIAS, relu: RELU_BIAS}
WAYS = {  # by what is wished for, the ways that are tried
    DEFAULT: (DEFAULT,),
    PASS: (PASS,),
    BIAS: (PASS, BIAS),
    RELU_BIAS: (PASS, BIAS, RELU_BIAS),
}


SPIN = 600_000
"""Cycles: a third of a millisecond, in which Python launches some thirty kernels."""


class Choice(NamedTuple):
    """What was found best for a form and a wish: one of its ways."""

    way: int
    algorithm: Algorithm


def chosen(
    lt: Any,
    form: Form,
    rows: int,
    wish: int,
    x: Array,
    weight: Array,
    bias: Array | None,
    activation: Kernel,
) -> Choice | None:
    """The fastest way for the first rows of x; None if nothing ran, and so nothing is known."""
    best, shortest = None, float("inf")
    for way in WAYS[wish]:
        product = Product(lt, form, rows, way)
        # As large as the result will be: the pool then has a place for it.
        y = cupy.empty((x.shape[0], form.cols), product.dtype)[:rows]
        bias_at = bias.data.ptr if way > DEFAULT and bias is not None else 0
        pointers = x.data.ptr, weight.data.ptr, bias_at, y.data.ptr
        algorithm = fastest(product, *pointers)
        if algorithm is None:
            continue
        if way == RELU_BIAS and not keeps_nan(partial(_relu_of, product, algorithm, y), x, weight):
            continue

        steps = (
            partial(product.launch, algorithm, *pointers),
            partial(rest, way, y, bias, activation, form.dtype),
        )
        took = milliseconds(*steps) if len(WAYS[wish]) > 1 else 0.0
        if took < shortest:
            best, shortest = Choice(way, algorithm), took
    return best


def fastest(product: Product, x: int, weight: int, bias: int, y: int) -> Algorithm | None:
    """The fastest of the algorithms that cuBLASLt proposes; of equals the one it likes better."""
    best, shortest = None, float("inf")
    for algorithm in product.proposals():
        try:
            took = milliseconds(partial(product.launch, algorithm, x, weight, bias, y))
        except (LtError, MemoryError):  # not this one, then: the next may need no workspace
            continue
        if took < 0.97 * shortest:
            best, shortest = algorithm, took
    return best


def spin() -> None:
    """Have the device wait while the host launches what is timed.

    Steps of few rows are done sooner than they are launched: their time would be that of Python.
    """
    launch(("spin.cu", "spin", "long long"), (1,), (1,), (), SPIN)


def milliseconds(*steps: Callable[[], object]) -> float:
    """What the steps take on the device: the mean of 5 after 3, or of 1 after 1 if it is long."""
    _timed(steps, 1)
    once = _timed(steps, 1)
    if once > 1:
        return once
    _timed(steps, 1)
    return _timed(steps, 5, before=spin)


def _timed(
    steps: Sequence[Callable[[], object]], times: int, before: Callable[[], object] | None = None
) -> float:
    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    if before is not None:
        before()
    start.record()
    for _ in range(times):
        for step in steps:
            step()
    stop.record()
    stop.synchronize()
    return float(cupy.cuda.get_elapsed_time(start, stop)) / times


def _relu_of(
    product: Product, algorithm: Algorithm, y: Array, x: Array, weight: Array, bias: Array
) -> Array:
    product.launch(algorithm, x.data.ptr, weight.data.ptr, bias.data.ptr, y.data.ptr)
    return y


def keeps_nan(relu_of: Callable[..., Array], x: Array, weight: Array) -> bool:
    """Whether relu leaves NaN what is NaN: asked of the very kernel, with NaN for a bias.

    `relu_of(x, weight, bias)` answers lines (..., outputs). NVIDIA writes max(x, 0), which on the
    device may drop NaN. All bits set are NaN in every type.
    """
    nan = cupy.full(weight.shape[-1] * x.itemsize, 0xFF, "uint8").view(x.dtype)
    y = relu_of(x, weight, nan)
    ends = [cupy.asnumpy(y[row]).astype("float32") for row in (0, -1)]
    return all(bool(np.isnan(end).all()) for end in ends)
