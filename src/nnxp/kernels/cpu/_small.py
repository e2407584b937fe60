"""Products in parts that OpenBLAS multiplies as they lie.

For AVX-512 it has kernels that need not pack a matrix, which take half the time for few rows, and
four fifths of it for many. It takes them for up to a million multiply-adds, so that half of the
columns may have them where all together have not.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from math import prod
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from nnxp._arrays import HostArray, Shape

SMALL = 100**3  # multiply-adds, as OpenBLAS has it: interface/gemm.c, sgemm_small_kernel_permit
MOST_ROWS = 20  # of more, the parts become so narrow that nothing is gained
LEAST_COLUMNS = 48
WIDTH = 64  # columns of a block: four vectors
FEWEST, STEP, MOST = 12, 6, 480  # lines of a block, at least, in steps of, and at most
IN_CACHE = 3 << 19  # bytes of a matrix that stays in a core's second cache, for many lines
FEW = 64  # lines, for which each part of the matrix is read once anyway
TINY, SHARED = 1 << 19, 1 << 24
"""Multiply-adds: of fewer, to look at them in blocks takes longer than what it saves; of more, they
are worth all threads of BLAS, where it has several."""
LINE = 64  # bytes that lie in cache together
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
def _openblas() -> list[Any]:
    """The OpenBLAS that is loaded: what threadpoolctl has of it."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(internal_api="openblas").lib_controllers  # type: ignore[no-any-return]


@cache
def small_kernels() -> bool:
    """Whether NumPy's BLAS is OpenBLAS, with kernels for small matrices on this CPU."""
    found = [library.info().get("architecture") for library in _openblas()]
    return bool(found) and all(each in WITH_SMALL_KERNELS for each in found)


def blas_threads() -> int:
    """The threads that a product of this thread takes."""
    return max((library.num_threads or 1 for library in _openblas()), default=1)


class _Blocks(list[tuple[slice, HostArray]]):
    """The blocks of a matrix, which may be referred to weakly."""


_laid_out: WeakValueDictionary[tuple[Shape, int], _Blocks] = WeakValueDictionary()
"""Blocks by what they hold: programs for other shapes of a row share those of the same weights."""


class Weight:
    """A constant matrix (..., inputs, outputs), or a stack of them, to multiply lines by.

    `weight(x, out)` makes out (..., lines, outputs) = x (..., lines, inputs) @ weight, in blocks of
    lines and columns that are small enough, all in one call of NumPy. The columns of a block lie in
    memory of their own, whole vectors of them in a line of the cache.
    """

    def __init__(self, matrix: HostArray) -> None:
        self._matrix = matrix
        self._blocks = _Blocks()
        inputs, outputs = matrix.shape[-2:]
        self._elements = inputs * outputs
        most = SMALL // max(1, inputs * min(WIDTH, outputs))
        self.lines = min(MOST, most // STEP * STEP)
        """Of a block; 0 where the matrix is multiplied as a whole."""
        if self.lines < FEWEST or matrix.dtype != np.float32 or not small_kernels():
            self.lines = 0

    def __call__(self, x: HostArray, out: HostArray) -> None:
        if x.ndim == 2 and self._as_a_whole(len(x), 1):
            np.dot(x, self._matrix, out)  # which starts sooner
            return
        for operands in self.calls(x, out):
            np.matmul(*operands)

    def calls(self, x: HostArray, out: HostArray) -> Iterator[tuple[HostArray, ...]]:
        """What np.matmul is to be called with, in order; views of x and of `out`."""
        *stack, count, inputs = x.shape
        if self._as_a_whole(count, prod(stack)):
            yield x, self._matrix, out
            return
        whole = count - count % self.lines
        for start, stop in ((0, whole), (whole, count)):
            if start == stop:
                continue
            lines = min(self.lines, stop - start)
            some = x[..., start:stop, :].reshape(*stack, -1, 1, lines, inputs)
            for columns, block in self._made():
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

    def _made(self) -> list[tuple[slice, HostArray]]:
        """The columns that are of one width, and their blocks (..., 1, blocks, inputs, width)."""
        if not self._blocks:
            *stack, inputs, outputs = self._matrix.shape
            whole = outputs - outputs % WIDTH
            parts = {
                (start, stop): self._matrix[..., start:stop]
                .reshape(*stack, 1, inputs, -1, width)
                .swapaxes(-2, -3)
                for start, stop, width in ((0, whole, WIDTH), (whole, outputs, outputs - whole))
                if start < stop
            }
            key = self._matrix.shape, hash(self._matrix.tobytes())
            blocks = _laid_out.get(key)
            if blocks is None or not all(
                np.array_equal(block, part)
                for (_, block), part in zip(blocks, parts.values(), strict=True)
            ):
                blocks = _Blocks()
                for ends, part in parts.items():
                    block = _aligned(part.shape, part.dtype)
                    np.copyto(block, part)
                    blocks.append((slice(*ends), block))
                _laid_out[key] = blocks
            self._blocks = blocks
        return self._blocks


class OfGroups(Weight):
    """Matrices (groups, inputs, outputs), each for its part of x (lines, groups * inputs); the
    parts of `out` (lines, groups * outputs) lie in the same order."""

    def __call__(self, x: HostArray, out: HostArray) -> None:
        groups = len(self._matrix)
        super().__call__(*(y.reshape(len(y), groups, -1).swapaxes(0, 1) for y in (x, out)))


def _aligned(shape: Shape, dtype: np.dtype[Any]) -> HostArray:
    """New memory that begins with a line of the cache: NumPy's own begins anywhere."""
    memory = np.empty(prod(shape) * dtype.itemsize + LINE, "uint8")
    return np.ndarray(shape, dtype, memory, -memory.ctypes.data % LINE)
