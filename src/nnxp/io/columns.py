"""Rows that stand in several arrays, side by side."""

from __future__ import annotations

from typing import Any

import numpy as np

from nnxp._arrays import HostArray, Shape
from nnxp._errors import OptionError, ShapeError
from nnxp._exchange import columns_of, host_rows, source_of


class Columns:
    """Several inputs that share axis 0, as the one x of an engine: row i is row i of each.

    They are joined a block of rows at a time, never whole:

        y = engine(nnxp.Columns(table, embeddings, age))

    Args:
        inputs: each (rows, columns) or (rows,), an array, a memory map, a table, or anything with
            `shape` and slicing; they may be of different types.

    Raises:
        ShapeError: they do not share axis 0.
    """

    def __init__(self, *inputs: Any) -> None:
        shapes = [tuple(getattr(array, "shape", ())) for array in inputs]
        if not inputs or not all(len(shape) in (1, 2) for shape in shapes):
            raise ShapeError(f"Columns takes inputs (rows, columns) or (rows,); got {shapes}")
        if len({shape[0] for shape in shapes}) > 1:
            raise ShapeError(f"the inputs of Columns share axis 0; got {shapes}")
        self.reads = tuple(map(source_of, inputs))
        dtypes = [getattr(source, "dtype", None) for source in self.reads]
        known = [dtype if isinstance(dtype, np.dtype) else "float64" for dtype in dtypes]
        self.dtype = np.result_type(*known)
        widths = [shape[1] if shape[1:] else 1 for shape in shapes]
        self.shape: Shape = (shapes[0][0], sum(widths))
        self.columns = [
            name
            for source, width in zip(self.reads, widths, strict=True)
            for name in _names(source, width)
        ]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> HostArray:
        if not isinstance(rows, slice):
            raise OptionError(f"Columns gives slices of rows, not [{rows!r}]")
        parts = [host_rows(source[rows]) for source in self.reads]
        return np.concatenate([part[:, None] if part.ndim == 1 else part for part in parts], axis=1)


def _names(source: Any, width: int) -> tuple[str | None, ...]:
    names = columns_of(source)
    return names if names is not None and len(names) == width else (None,) * width
