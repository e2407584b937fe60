"""Products with constant matrices: by oneDNN, or in parts that OpenBLAS multiplies as they lie.

For AVX-512 it has kernels that need not pack a matrix, which take half the time for few rows, and
four fifths of it for many. It takes them for up to a million multiply-adds, so that half of the
columns may have them where all together have not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from math import prod
from typing import Any

import numpy as np

from nnxp._arrays import HostArray
from nnxp.kernels.cpu import onednn
from nnxp.kernels.cpu._pieces import ByContent, aligned, blas, blas_threads

SMALL = 100**3  # multiply-adds, as OpenBLAS has it: interface/gemm.c, sgemm_small_kernel_permit
MOST_ROWS = 20  # of more, the parts become so narrow that nothing is gained
LEAST_COLUMNS = 48
WIDTH = 64  # columns of a block: four vectors
FEWEST, STEP, MOST = 12, 6, 480  # lines of a block, at least, in steps of, and at most
IN_CACHE = 3 << 19  # bytes of a matrix that stays in a core's second cache, for many lines
FEW = 64  # lines, for which each part of the matrix is read once anyway
TINY, SHARED = 1 << 19, 1 << 24
"""Multiply-adds: of fewer, to look at them in blocks, or to ask oneDNN, takes longer than what it
saves; of more, they are worth all threads of BLAS, where it has several."""
WITH_SMALL_KERNELS = frozenset("SkylakeX Cooperlake SapphireRapids".split())


def columns_at_once(rows: int, inner: int, columns: int, dtype: np.dtype[Any]) -> list[slice]:
    """The columns of a product (rows, inner) @ (inner, columns) that are multiplied together."""
    whole = [slice(0, columns)]
    if dtype != np.float32 or not 1 < rows <= MOST_ROWS or rows * inner * columns <= SMALL:
        return whole
    width = SMALL // (rows * inner) // 16 * 16
    if width < LEAST_COLUMNS or not small_kernels():
        return whole
    parts = -(-columns // width)
    even = min(width, -(-columns // (16 * parts)) * 16)  # whole vectors, all alike but the last
    return [slice(start, min(start + even, columns)) for start in range(0, columns, even)]


@cache
def small_kernels() -> bool:
    """Whether NumPy's BLAS is OpenBLAS, with kernels for small matrices on this CPU."""
    libraries = [library for library in blas() if library.internal_api == "openblas"]
    kernels = [library.info().get("architecture") for library in libraries]
    return bool(kernels) and all(name in WITH_SMALL_KERNELS for name in kernels)


class _Blocks(list[tuple[slice, HostArray]]):
    """A matrix in blocks: the columns that are of one width, and their blocks (..., 1, blocks,
    inputs, width)."""

    def __init__(self, matrix: HostArray) -> None:
        super().__init__()
        self.numbers = matrix
        *stack, inputs, outputs = matrix.shape
        whole = outputs - outputs % WIDTH
        for start, stop, width in ((0, whole, WIDTH), (whole, outputs, outputs - whole)):
            if start < stop:
                part = matrix[..., start:stop].reshape(*stack, 1, inputs, -1, width)
                block = aligned(part.swapaxes(-2, -3).shape, matrix.dtype)
                np.copyto(block, part.swapaxes(-2, -3))
                self.append((slice(start, stop), block))


_blocks = ByContent(_Blocks)


class Weight:
    """A constant matrix (..., inputs, outputs), or a stack of them, to multiply lines by.

    `weight(x, out)` makes out (..., lines, outputs) = x (..., lines, inputs) @ weight + bias, by
    oneDNN where it is used. Else in blocks of lines and columns that are small enough, all in one
    call of NumPy: the columns of a block lie in memory of their own, whole vectors of them in a
    line of the cache.
    """

    def __init__(self, matrix: HostArray, bias: HostArray | None = None) -> None:
        self._matrix, self._bias = matrix, bias
        self._blocks: _Blocks | None = None
        inputs, outputs = matrix.shape[-2:]
        self._elements: int = inputs * outputs
        most = SMALL // max(1, inputs * min(WIDTH, outputs))
        self.lines = min(MOST, most // STEP * STEP)
        """Of a block; 0 where the matrix is multiplied as a whole."""
        if self.lines < FEWEST or matrix.dtype != np.float32 or not small_kernels():
            self.lines = 0
        self._plans: onednn.Planned[onednn.Plan] | None = None
        if matrix.dtype == np.float32 and onednn.why_not() is None:
            self._plans, self.lines = onednn.product(matrix, bias), 0

    def __call__(self, x: HostArray, out: HostArray) -> None:
        plan = self._plan(x, out)
        if plan is not None:
            plan(x, out)
            return
        if x.ndim == 2 and self._as_a_whole(len(x), 1):
            np.dot(x, self._matrix, out)  # which starts sooner
        else:
            for operands in self._operands(x, out):
                np.matmul(*operands)
        if self._bias is not None:
            np.add(out, self._bias, out)

    def bound(self, x: HostArray, out: HostArray) -> list[Callable[[], object]]:
        """What makes out = x @ weight of these arrays, to be called in order, again and again."""
        if self._plans is not None and self._plan(x, out) is not None:
            key = x.shape, x.strides, out.strides
            return [onednn.bound(self._plans, self._work(x), key, x, out)]
        calls: list[Callable[[], object]] = [
            partial(np.matmul, *operands) for operands in self._operands(x, out)
        ]
        if self._bias is not None:
            calls.append(partial(np.add, out, self._bias, out))
        return calls

    def into(self, out: HostArray) -> Callable[[HostArray], None]:
        """What makes out = x @ weight of this array and of one x after the other, all of one shape;
        for one caller at a time."""
        calls: dict[int, Callable[..., object]] = {}  # by the threads
        work = prod(out.shape[:-1]) * self._elements

        def run(x: HostArray) -> None:
            if not x.flags.c_contiguous:
                self(x, out)
                return
            threads = onednn.threads_for(work)
            if threads not in calls:
                plan = self._plan(x, out)
                calls[threads] = partial(self, out=out) if plan is None else plan.changing(x, out)
            calls[threads](x)

        return run

    def _plan(self, x: HostArray, out: HostArray) -> onednn.Plan | None:
        """What oneDNN does; None where NumPy is as fast."""
        if self._plans is None or x.shape[-2] == 1 or self._work(x) < TINY:
            return None
        return self._plans(onednn.threads_for(self._work(x)), x.shape, x.strides, out.strides)

    def _work(self, x: HostArray) -> int:
        return prod(x.shape[:-1]) * self._elements

    def _operands(self, x: HostArray, out: HostArray) -> Iterator[tuple[HostArray, ...]]:
        """What np.matmul is to be called with, in order; views of x and of `out`."""
        *stack, count, inputs = x.shape
        if self._as_a_whole(count, prod(stack)):
            yield x, self._matrix, out
            return
        if self._blocks is None:
            self._blocks = _blocks.of(self._matrix)
        whole = count - count % self.lines
        for start, stop in ((0, whole), (whole, count)):
            if start == stop:
                continue
            lines = min(self.lines, stop - start)
            some = x[..., start:stop, :].reshape(*stack, -1, 1, lines, inputs)
            for columns, block in self._blocks:
                *_, width = block.shape
                y = out[..., start:stop, columns].reshape(*stack, -1, lines, block.shape[-3], width)
                yield some, block, y.swapaxes(-2, -3)

    def _as_a_whole(self, count: int, stacked: int) -> bool:
        """Whether lines are few, or many for a matrix beyond the cache, or work for all cores."""
        work = stacked * count * self._elements
        if not self.lines or count == 1 or work < TINY:
            return True
        if count > FEW and self._elements * self._matrix.itemsize > IN_CACHE:
            return True
        return work > SHARED and blas_threads() > 1


class OfGroups(Weight):
    """Matrices (groups, inputs, outputs), each for its part of x (lines, groups * inputs); the
    parts of `out` (lines, groups * outputs) lie in the same order."""

    def __call__(self, x: HostArray, out: HostArray) -> None:
        groups = len(self._matrix)
        super().__call__(*(y.reshape(len(y), groups, -1).swapaxes(0, 1) for y in (x, out)))
