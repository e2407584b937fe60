"""Products of few rows, in parts that OpenBLAS multiplies as they lie.

For AVX-512 it has kernels that need not pack a matrix, which take half the time for few rows. It
takes them for up to a million multiply-adds, so that half of the columns may have them where all
together have not.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

SMALL = 100**3  # multiply-adds, as OpenBLAS has it: interface/gemm.c, sgemm_small_kernel_permit
MOST_ROWS = 20  # of more, the parts become so narrow that nothing is gained
LEAST_COLUMNS = 48
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
    from threadpoolctl import ThreadpoolController

    found = ThreadpoolController().select(internal_api="openblas").info()
    return bool(found) and all(each.get("architecture") in WITH_SMALL_KERNELS for each in found)
