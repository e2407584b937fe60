"""Rows in files: .npy, .npz and tables, read and written without pickle and never half-written.

A .npy file is mapped and a table is read a batch at a time, so either may be larger than memory; a
.npz file is read whole. Whatever is written grows on the disk and not in memory.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from numpy.lib.format import dtype_to_descr as descr_of
from numpy.lib.format import open_memmap
from numpy.lib.format import write_array_header_1_0 as write_header

from nnxp._arrays import HostArray, Shape, is_numeric
from nnxp._errors import NnxpError, OptionError, RowsError
from nnxp.io import tables
from nnxp.io._atomic import path_of, warn_of_leftover, written_beside
from nnxp.io.tables import Reading, Table

Name: TypeAlias = str | os.PathLike[str]

TABLES = tables.TEXTS + tables.BINARIES
ENDINGS = (".npy", ".npz", *TABLES)
APPENDED = 1 << 16  # rows that are written together
PIECE = 1 << 20  # bytes that are copied together
PASSED = 64 << 20  # bytes of pages to go through before they are let go


def ending(path: Name) -> str:
    """How the file's name ends, one of ENDINGS: ".npy", ".csv.gz"; OptionError for any other."""
    suffix = tables.ending(path_of(path))
    if suffix not in ENDINGS:
        raise OptionError(f"{path}: rows are in files ending in {', '.join(ENDINGS)}")
    return suffix


def read_rows(path: Name, key: str | None = None, reading: Reading | None = None) -> HostArray:
    """The rows (rows, ...) of real numbers in a file; those of a .npy file as a memory map.

    `key` names one array of a .npz file that holds several. `reading` says how a table is read: see
    `nnxp.io.tables.Reading`.

    Raises RowsError for a file that is empty, truncated, ragged or anything but rows of numbers,
    OptionError for an unknown ending or an option that means nothing for it, and OSError.
    """
    source = open_rows(path, key, reading)
    if not isinstance(source, Table):
        return source
    blocks = list(source)
    if not blocks:
        raise RowsError(f"{path} holds no rows")
    return np.concatenate(blocks)


def open_rows(
    path: Name, key: str | None = None, reading: Reading | None = None
) -> HostArray | Table:
    """The rows of a file as for `read_rows`; a table is not read yet, but gives them in batches."""
    suffix = ending(path)
    if key is not None and suffix != ".npz":
        raise OptionError(f"{path}: only a .npz file holds several arrays, so there is no {key!r}")
    if suffix in TABLES:
        return tables.open_table(path, reading or Reading())
    asked = reading or Reading()
    if (asked.header, asked.delimiter, asked.columns, asked.missing) != (None, None, (), None):
        raise OptionError(
            f"{path}: only a table ({', '.join(TABLES)}) has a header, a delimiter, columns with "
            "names, and missing values"
        )
    with _whole(path, suffix):
        rows = open_memmap(path, mode="r") if suffix == ".npy" else _read_npz(path, key)
    return _checked(rows, path)


def read_inputs(path: Name, names: Sequence[str]) -> dict[str, HostArray]:
    """The arrays of a .npz file by their names: the inputs of a model that takes these.

    Raises as `read_rows`, and OptionError for a file of another kind.
    """
    if ending(path) != ".npz":
        raise OptionError(
            f"{path}: the model takes {', '.join(names)}: give them in a .npz file, as arrays of "
            "these names"
        )
    with _whole(path, ".npz"), _opened_npz(path) as file:
        arrays = {name: _array_in(file, name, path) for name in file.files}
    return {name: _checked(rows, path) for name, rows in arrays.items()}


@contextmanager
def _whole(path: Name, suffix: str) -> Iterator[None]:
    """RowsError for whatever NumPy says of a damaged file."""
    try:
        yield
    except (OSError, MemoryError, NnxpError):
        raise
    except Exception as error:  # NumPy meets a hostile file with ten types of error
        raise RowsError(f"{path} is not a whole {suffix} file of numbers: {error}") from error


def _checked(rows: HostArray, path: Name) -> HostArray:
    if not is_numeric(rows.dtype):
        raise RowsError(f"{path} holds {rows.dtype}, but rows are real numbers")
    if rows.ndim == 0:
        raise RowsError(f"{path} holds a single number, not rows")
    return rows


@contextmanager
def _opened_npz(path: Name) -> Iterator[Any]:
    with open(path, "rb") as stream:  # NumPy leaves a file open that it opened and refused
        file = np.load(stream, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise RowsError(f"{path} is a .npy file by its content; name it so")
        if not file.files:
            raise RowsError(f"{path} holds no arrays")
        yield file


def _read_npz(path: Name, key: str | None) -> HostArray:
    with _opened_npz(path) as file:
        names = ", ".join(file.files)
        if key is None and len(file.files) > 1:
            raise OptionError(
                f"{path} holds {len(file.files)} arrays ({names}): name one by key (--key)"
            )
        if key is not None and key not in file.files:
            raise OptionError(f"{path} has no {key!r}; it holds {names}")
        return _array_in(file, file.files[0] if key is None else key, path)


def _array_in(file: Any, name: str, path: Name) -> HostArray:
    rows = file[name]
    if not isinstance(rows, np.ndarray):  # the bytes of a member of the archive
        raise RowsError(f"{path}: {name} is no array")
    return rows


def write_arrays(
    path: Name, arrays: Mapping[str, HostArray], say: Callable[[str], object] = warn_of_leftover
) -> None:
    """Write arrays to a .npz file by their names; it is whole, or it is not there."""
    with written_beside(path, say) as beside, _room(path), zipfile.ZipFile(beside, "w") as archive:
        for name, array in arrays.items():  # np.savez has names of its own
            wide = array.astype("float32") if array.dtype.name == "bfloat16" else array
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, wide, allow_pickle=False)


@contextmanager
def written_rows(
    path: Name,
    shape: Shape,
    dtype: np.dtype[Any],
    names: Sequence[str] | None = None,
    say: Callable[[str], object] = warn_of_leftover,
) -> Iterator[HostArray]:
    """An array of this shape on the disk, to fill; it becomes the file when the block ends well.

    If the block is left by an error, nothing is left of it, and what stood at the path still does.
    bfloat16, which no NumPy file can name, is written as float32. `names` are those of a table's
    columns; without them they are y0, y1, ... `say` hears of what a killed run left behind.

    On Windows a file that is mapped cannot be renamed: `del` the array at the end of the block.

    Raises OptionError for an ending or a shape that cannot be written, OSError if the disk has no
    room or the place may not be written to, before the block is entered. The block itself lets go
    of the array, for there are systems that rename no file while it is mapped.
    """
    dtype, names = _writable(path, shape, dtype, names)
    with written_beside(path, say) as beside:
        if ending(path) == ".npy":
            with _room(path), open(beside, "r+b") as file:
                mapped = [open_memmap(beside, mode="w+", dtype=dtype, shape=shape)]
                _reserve(file)
            yield mapped.pop()  # nobody but the block holds it, so that it can be let go of
            return
        with tempfile.TemporaryFile(dir=beside.parent, buffering=0) as scratch:
            out: HostArray = np.empty(0, dtype)
            if 0 in shape:
                out = out.reshape(shape)  # nothing cannot be mapped
            else:
                with _room(path):
                    out = np.memmap(scratch, dtype, "w+", shape=shape)
                    _reserve(scratch)
            yield out
            if ending(path) == ".npz":
                with open(beside, "wb") as file:
                    np.savez(file, output=out)
                return
            with appending(path, beside, shape[1:], dtype, names) as append:
                for start in range(0, len(out), APPENDED):
                    append(out[start : start + APPENDED])


@contextmanager
def appended_rows(
    path: Name,
    row: Shape,
    dtype: np.dtype[Any],
    names: Sequence[str] | None = None,
    say: Callable[[str], object] = warn_of_leftover,
) -> Iterator[Callable[[HostArray], None]]:
    """As `written_rows`, for any number of rows of this shape: a function that appends a block."""
    dtype, names = _writable(path, ("rows", *row), dtype, names)
    with written_beside(path, say) as beside, appending(path, beside, row, dtype, names) as append:
        yield append


def _writable(
    path: Name, shape: tuple[Any, ...], dtype: np.dtype[Any], names: Sequence[str] | None
) -> tuple[np.dtype[Any], Sequence[str]]:
    """The type that is written, and the names of a table's columns."""
    suffix, row = ending(path), shape[1:]
    if suffix in TABLES and len(row) > 1:
        raise OptionError(
            f"{path}: a {suffix} file has rows and columns, but the output is "
            f"({', '.join(map(str, shape))})"
        )
    if suffix in tables.BINARIES:
        tables.required_pyarrow(path)
    width = prod(row)
    if suffix in TABLES and names is not None and len(names) != width:
        raise OptionError(f"{path}: {len(names)} names for {width} columns")
    wanted = np.dtype("float32") if dtype.name == "bfloat16" else dtype
    return wanted, names or [f"y{index}" for index in range(width if suffix in TABLES else 0)]


@contextmanager
def appending(
    path: Name, beside: Path, row: Shape, dtype: np.dtype[Any], names: Sequence[str]
) -> Iterator[Callable[[HostArray], None]]:
    """What appends blocks of rows to the file beside its place, in the way that the path ends."""
    suffix = ending(path)
    with open(beside, "wb") as file:
        if suffix in TABLES:
            text = suffix in tables.TEXTS
            with (
                tables.text_writer(path, file, names)
                if text
                else tables.arrow_writer(path, file, names, dtype)
            ) as append:
                yield lambda rows: append(
                    rows.astype(dtype, copy=False).reshape(len(rows), len(names))
                )
        elif suffix == ".npy":
            with _appending_npy(file, row, dtype) as append:
                yield append
        else:
            with tempfile.TemporaryFile(dir=beside.parent) as scratch:
                with _appending_npy(scratch, row, dtype) as append:
                    yield append
                scratch.seek(0)
                with (
                    zipfile.ZipFile(file, "w") as archive,
                    archive.open("output.npy", "w", force_zip64=True) as member,
                ):
                    shutil.copyfileobj(scratch, member, PIECE)


@contextmanager
def _appending_npy(
    file: IO[bytes], row: Shape, dtype: np.dtype[Any]
) -> Iterator[Callable[[HostArray], None]]:
    """Append blocks to a .npy file, whose number of rows is written at the end."""
    count = 0

    def append(rows: HostArray) -> None:
        nonlocal count
        count += len(rows)
        file.write(np.ascontiguousarray(rows, dtype).reshape(-1).view("uint8").data)

    def head() -> None:  # NumPy leaves room in it for any number of rows
        file.seek(0)
        about = {"descr": descr_of(dtype), "fortran_order": False, "shape": (count, *row)}
        write_header(file, about)

    head()
    yield append
    head()


def _reserve(file: IO[bytes]) -> None:
    """Take the whole file's room on the disk now: a map of a full disk dies by a signal later."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)


@contextmanager
def _room(path: Name) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


class Passing:
    """The rows of x for one pass through them, first to last.

    Pages of mapped files stay in a process's memory until somebody else needs it. Of x, and of
    whatever else of as many rows is given, they are let go on the way, so that memory in use does
    not grow with the rows.
    """

    def __init__(self, x: HostArray, *others: HostArray) -> None:
        self.shape, self.dtype, self.reads = x.shape, x.dtype, (x,)
        self._x = x
        mapped = [(array, _map_of(array)) for array in (x, *others)]
        self._maps = [pages for _, pages in mapped if pages is not None]
        self._row = sum(array.nbytes for array, pages in mapped if pages) // max(1, len(x))
        self._passed = 0

    def __getitem__(self, rows: slice) -> HostArray:
        block: HostArray = self._x[rows]
        self._passed += self._row * len(block)  # threads may lose a count: pages then go later
        if self._passed > PASSED:
            self._passed = 0
            for pages in self._maps:
                pages.madvise(mmap.MADV_DONTNEED)  # a page that is still in use comes back
        return block


def _map_of(x: HostArray) -> mmap.mmap | None:
    """The map of a file that an array looks into, where the system can let go of its pages."""
    base: Any = x
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED") else None
