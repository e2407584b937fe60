"""A product through cuBLASLt as it is remembered: the way, the algorithm, the padding."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Hashable
from typing import Any, Generic, TypeVar

import cupy
import numpy as np
from cupy.cuda import get_current_stream
from cupy.cuda.device import get_device_id

from nnxp._arrays import Array, Shape
from nnxp.kernels._dispatch import Kernel
from nnxp.kernels.cuda.lt.bindings import COMPUTE_FLOAT32, COMPUTE_TF32, DEFAULT
from nnxp.kernels.cuda.lt.descriptors import PASS, Algorithm, Form, Product, leading
from nnxp.kernels.cuda.lt.passes import Run, by_cupy, rest
from nnxp.kernels.cuda.lt.tuning import Choice, chosen

T = TypeVar("T")

TIMED_ROWS = 8192  # more make no difference to which algorithm is best, and take longer to time
PAD_FROM_ROWS = 1024
MOST_CHOICES = 1024


# One plan at a time, so that none disturbs the timing of another. The activation that is timed may
# be a user's own, with products of its own.
making = threading.RLock()


class Lately(Generic[T]):
    """What was asked for lately, at most so much: what is asked for again and again stays.

    In two halves. What is asked for comes into the young one; when that is full it becomes the old
    one, whose things come back if they are asked for, and else are forgotten with it. They go when
    their last user is done.
    """

    def __init__(self, most: int) -> None:
        self.young: dict[Hashable, T] = {}
        self._old: dict[Hashable, T] = {}
        self._half = most // 2

    def get(self, key: Hashable) -> T | None:
        value = self.young.get(key)
        if value is None:
            value = self._old.get(key)
            if value is not None:
                self.keep(key, value)
        return value

    def keep(self, key: Hashable, value: T) -> None:
        if len(self.young) >= self._half:
            self._old, self.young = self.young, {}
        self.young[key] = value

    def planned(self, key: Hashable, plan: Callable[[], T]) -> T:
        """What is kept, else what `plan()` answers, which is kept: one plan at a time."""
        with making:
            value = self.get(key)
            if value is None:
                value = plan()
                self.keep(key, value)
            return value

    def values(self) -> Collection[T]:
        return (self._old | self.young).values()

    def __len__(self) -> int:
        return len(self.young.keys() | self._old.keys())


choices = Lately[Choice](MOST_CHOICES)


class Plan:
    """A product through cuBLASLt: one launch, and one pass over what that leaves to do."""

    def __init__(self, product: Product, algorithm: Algorithm, way: int, cols: int) -> None:
        self.product, self.algorithm, self.way, self.cols = product, algorithm, way, cols
        self.shape: Shape = product.rows, product.form.cols
        self.dtype = product.dtype

    def __call__(
        self,
        x: Array,
        weight: Array,
        bias: Array | None,
        activation: Kernel,
        out: Array | None = None,
    ) -> Array:
        """The product: in `out` if it lies as the plan's own result would, else in a new array."""
        cols = self.shape[1]
        if cols != self.cols:
            weight = widened(weight, cols)
        if out is None or out.dtype != self.dtype or cols != self.cols or out.data.ptr % 256:
            y = cupy.empty(self.shape, self.dtype)
        else:
            y = out
        fused_bias = bias.data.ptr if self.way > DEFAULT and bias is not None else 0
        self.product.launch(self.algorithm, x.data.ptr, weight.data.ptr, fused_bias, y.data.ptr)
        if cols != self.cols:
            y = y[:, : self.cols]
        return rest(self.way, y, bias, activation, x.dtype)


def widened(weight: Array, cols: int) -> Array:
    """The weight with more columns, of which no one looks at the results: they are not even set.

    Made anew each time, because the weight may have been changed in place.
    """
    wide = cupy.empty((weight.shape[0], cols), weight.dtype)
    cupy.copyto(wide[:, : weight.shape[1]], weight)
    return wide


def planned(
    lt: Any,
    wish: int,
    x: Array,
    weight: Array,
    bias: Array | None,
    activation: Kernel,
    precision: str | None,
) -> Run:
    """The plan for such a product: by what was chosen for its form, or is chosen now."""
    x_turned = leading(x) is None
    ldx, ldw = leading(x.T if x_turned else x) or 0, leading(weight)
    (rows, inner), cols, size = x.shape, weight.shape[1], x.itemsize
    wide = cols
    if (
        rows >= PAD_FROM_ROWS
        and cols * size % 16
        and not any(number % 16 for number in (inner * size, ldx * size, x.data.ptr))
    ):  # tensor cores and wide accesses want rows of 16 bytes: of x, of the weight and of y
        wide = -(-cols // 16) * 16
        wish = wish if wish == DEFAULT else PASS  # rather than a bias that is padded, too
    pointers = 256 | x.data.ptr
    if wide == cols:
        pointers |= weight.data.ptr
    if wish > DEFAULT and bias is not None:
        pointers |= bias.data.ptr
    tf32 = precision == "tf32" and x.dtype == np.float32
    form = Form(
        device=get_device_id(),
        dtype=x.dtype,
        compute=COMPUTE_TF32 if tf32 else COMPUTE_FLOAT32,
        inner=inner,
        cols=wide,
        ldx=ldx,
        ldw=wide if wide != cols else ldw or leading(weight.T) or 0,
        turned=wide == cols and ldw is None,
        alignment=pointers & -pointers,
        x_turned=x_turned,
    )
    timed = min(rows, TIMED_ROWS)
    key = form, (timed - 1).bit_length(), wish
    choice = choices.get(key)
    if choice is None and not get_current_stream().is_capturing():
        weight = weight if wide == cols else widened(weight, wide)
        choice = chosen(lt, form, timed, wish, x, weight, bias, activation)
        if choice is not None:
            choices.keep(key, choice)
    way = choice.way if choice is not None else DEFAULT if wish == DEFAULT else PASS
    product = Product(lt, form, rows, way)
    algorithm = product.working(None if choice is None else choice.algorithm)
    return by_cupy if algorithm is None else Plan(product, algorithm, way, cols)
