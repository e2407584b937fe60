"""Files of rows that are read by position: .npy, HDF5, Zarr and Parquet.

A source is opened for each block and let go of afterwards, so that a process holds one block of
rows, however long the file is, and nothing has to travel but names.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnxp._arrays import HostArray, Shape, is_numeric
from nnxp._errors import BackendUnavailable, NnxpError, OptionError, RowsError
from nnxp._exchange import host_rows
from nnxp.io._atomic import path_of


@dataclass(frozen=True)
class Source:
    """A file of rows: where it is, what is in it, and what shows that it is still the same.

    `key` names one of several arrays or columns in it. `chunk` is the number of rows that the file
    holds together, 1 if any can be read alone. `bytes` and `changed` (nanoseconds since 1970) are
    the file's size and time; those of a Zarr array, which is a folder, of its description.
    """

    path: str
    key: str | None
    rows: int
    row: Shape
    dtype: str
    chunk: int
    bytes: int
    changed: int

    def read(self, start: int, stop: int) -> HostArray:
        """The rows from start to stop, in memory.

        Raises RowsError if the file is not the one that was planned for any more, and OSError.
        """
        if _stamp(self.path) != (self.bytes, self.changed):
            raise RowsError(
                f"{self.path} was changed since this sweep was planned; begin anew with restart"
            )
        with _opened(self.path, self.key) as file:
            rows = file.read(start, stop)
        if rows.shape != (stop - start, *self.row):
            raise RowsError(f"{self.path} gave {rows.shape} for the rows {start} to {stop}")
        return rows

    @property
    def identity(self) -> dict[str, Any]:
        """What makes it this source, wherever the file is mounted."""
        return {**vars(self), "path": os.path.basename(self.path), "row": list(self.row)}


def source(path: str | os.PathLike[str], key: str | None = None) -> Source:
    """What is in a file of rows. RowsError if it holds none, OptionError for an unknown ending."""
    name = os.path.abspath(path_of(path))
    stamp = _stamp(name)
    with _opened(name, key) as file:
        shape, dtype = file.shape, np.dtype(file.dtype)
        if not shape:
            raise RowsError(f"{name} holds a single number, not rows")
        if not is_numeric(dtype):
            raise RowsError(f"{name} holds {dtype}, but rows are real numbers")
        return Source(name, key, shape[0], tuple(shape[1:]), dtype.name, file.chunk, *stamp)


def _stamp(path: str) -> tuple[int, int]:
    status = os.stat(path)
    if os.path.isdir(path):
        files = (f"{path}/{name}" for name in ("zarr.json", ".zarray", ".zgroup"))
        status = next((os.stat(file) for file in files if os.path.exists(file)), status)
    return status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class _File:
    shape: Shape
    dtype: Any
    chunk: int
    read: Callable[[int, int], HostArray]


@contextmanager
def _opened(path: str, key: str | None) -> Iterator[_File]:
    ending = Path(path).suffix.lower()
    opened = _OPENED.get(ending)
    if opened is None:
        raise OptionError(
            f"{path}: the rows of a sweep are in files ending in {', '.join(_OPENED)}; "
            "nnxp.predict reads any array, and `nnxp predict` text"
        )
    try:
        with opened(path, key) as file:
            yield file
    except (NnxpError, OSError, MemoryError) as error:
        if isinstance(error, NnxpError) or getattr(error, "errno", 1) is not None:
            raise
        raise RowsError(f"{path} is not a whole {ending} file: {error}") from error
    except Exception as error:  # each library meets a hostile file in its own way
        raise RowsError(f"{path} is not a whole {ending} file of numbers: {error}") from error


@contextmanager
def _npy(path: str, key: str | None) -> Iterator[_File]:
    from nnxp.io.rows import open_rows

    rows: Any = open_rows(path, key)
    yield _File(rows.shape, rows.dtype, 1, lambda start, stop: np.array(rows[start:stop]))


@contextmanager
def _hdf5(path: str, key: str | None) -> Iterator[_File]:
    with _module("h5py", path).File(path, "r") as file:
        rows = _chosen(path, key, file)
        yield _array_file(rows)


@contextmanager
def _zarr(path: str, key: str | None) -> Iterator[_File]:
    group = _module("zarr", path).open(path, mode="r")
    yield _array_file(
        group if key is None and hasattr(group, "shape") else _chosen(path, key, group)
    )


def _array_file(rows: Any) -> _File:
    chunk = (getattr(rows, "shards", None) or rows.chunks or (1,))[0]
    return _File(
        tuple(rows.shape), rows.dtype, chunk, lambda start, stop: np.asarray(rows[start:stop])
    )


def _chosen(path: str, key: str | None, group: Any) -> Any:
    """The array of this name in a group; without a name, the only one."""
    names = list(group.keys())
    if key is None and len(names) == 1:
        key = names[0]
    if key is None or key not in group:
        wanted = "holds several arrays" if key is None else f"has no {key!r}"
        raise OptionError(
            f"{path} {wanted}: name one of {', '.join(map(str, names[:20]))} by key (--key)"
        )
    return group[key]


@contextmanager
def _parquet(path: str, key: str | None) -> Iterator[_File]:
    parquet = _module("pyarrow.parquet", path)
    with parquet.ParquetFile(path) as file:
        schema, meta = file.schema_arrow, file.metadata
        names = list(schema.names) if key is None else [name.strip() for name in key.split(",")]
        if missing := [name for name in names if name not in schema.names]:
            raise OptionError(f"{path} has no column {missing[0]!r}; it has {schema.names}")
        sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        ends = np.cumsum([0, *sizes])

        def read(start: int, stop: int) -> HostArray:
            groups = [
                i for i in range(len(sizes)) if ends[i] < stop and ends[i + 1] > start
            ]  # fmt: skip
            table = file.read_row_groups(groups, columns=names).select(names)
            first = int(ends[groups[0]]) if groups else 0
            return _of_columns(path, table.slice(start - first, stop - start))

        none = _of_columns(path, schema.empty_table().select(names))
        yield _File((meta.num_rows, *none.shape[1:]), none.dtype, max(sizes, default=1), read)


def _of_columns(path: str, table: Any) -> HostArray:
    """The rows of a table: those of its one column of lists or bytes, or its columns of numbers."""
    import pyarrow

    kinds = [field.type for field in table.schema]
    if len(kinds) == 1 and pyarrow.types.is_fixed_size_list(kinds[0]):
        column = _one(table.column(0))
        numbers = column.flatten()
        if column.null_count or numbers.null_count:
            raise RowsError(f"{path}: values are missing in column {table.schema.names[0]}")
        return numbers.to_numpy(zero_copy_only=False).reshape(len(table), kinds[0].list_size)  # type: ignore[no-any-return]
    if len(kinds) == 1 and pyarrow.types.is_fixed_size_binary(kinds[0]):
        column, width = _one(table.column(0)), kinds[0].byte_width
        if column.null_count:
            raise RowsError(f"{path}: values are missing in column {table.schema.names[0]}")
        if len(table) == 0:
            return np.empty((0, width), "uint8")
        start = column.offset * width
        held = np.frombuffer(column.buffers()[1], "uint8")
        return held[start : start + len(table) * width].reshape(-1, width)
    return host_rows(table)


def _one(column: Any) -> Any:
    """A column in one piece: as it lies, if it is one."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _module(name: str, path: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise BackendUnavailable(
            f"{path}: such files need {package}", f"pip install {package} brings it"
        ) from None


_OPENED: dict[str, Callable[..., Any]] = {
    ".npy": _npy, ".h5": _hdf5, ".hdf5": _hdf5, ".zarr": _zarr, ".parquet": _parquet,
}  # fmt: skip
