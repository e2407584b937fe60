"""Rows in files: .npy, .npz and .csv, read and written without pickle and never half-written.

A .npy file is mapped, not read, so it may be larger than memory, and whatever is written grows on
the disk and not in memory. A .npz or .csv file is read whole.
"""

from __future__ import annotations

import mmap
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from numpy.lib.format import open_memmap

from nnxp._arrays import HostArray, Shape, is_numeric
from nnxp._errors import NnxpError, OptionError, RowsError
from nnxp.io._atomic import written_beside

Name: TypeAlias = str | os.PathLike[str]

ENDINGS = (".npy", ".npz", ".csv")
MISSING = {"", "-", "?", "na", "n/a", "null", "none"}  # a row of these is a row, not names
PASSED = 64 << 20  # bytes of pages to go through before they are let go


def ending(path: Name) -> str:
    """How the file's name ends: ".npy", ".npz" or ".csv"; OptionError for any other."""
    found = Path(path).suffix.lower()
    if found not in ENDINGS:
        raise OptionError(f"{path}: rows are in files ending in {', '.join(ENDINGS)}")
    return found


def read_rows(path: Name, key: str | None = None) -> HostArray:
    """The rows (rows, ...) of real numbers in a file; those of a .npy file as a memory map.

    `key` names one array of a .npz file that holds several. A .csv file has a row on each line,
    numbers with commas between, and may begin with a line of column names.

    Raises RowsError for a file that is empty, truncated, ragged or anything but rows of numbers,
    OptionError for an unknown ending or a key where there can be none, and OSError.
    """
    kind = ending(path)
    if key is not None and kind != ".npz":
        raise OptionError(f"{path}: only a .npz file holds several arrays, so there is no {key!r}")
    if kind == ".csv":
        return _read_csv(path)
    try:
        rows = open_memmap(path, mode="r") if kind == ".npy" else _read_npz(path, key)
    except (OSError, MemoryError, NnxpError):
        raise
    except Exception as error:  # NumPy meets a hostile file with ten types of error
        raise RowsError(f"{path} is not a whole {kind} file of numbers: {error}") from error
    if not is_numeric(rows.dtype):
        raise RowsError(f"{path} holds {rows.dtype}, but rows are real numbers")
    if rows.ndim == 0:
        raise RowsError(f"{path} holds a single number, not rows")
    return rows


def _read_npz(path: Name, key: str | None) -> HostArray:
    with open(path, "rb") as stream:  # NumPy leaves a file open that it opened and refused
        file = np.load(stream, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise RowsError(f"{path} is a .npy file by its content; name it so")
        names = ", ".join(file.files)
        if key is None and len(file.files) != 1:
            raise RowsError(f"{path} holds {len(file.files)} arrays ({names}): name one by its key")
        if key is not None and key not in file.files:
            raise RowsError(f"{path} has no {key!r}; it holds {names}")
        rows: HostArray = file[file.files[0] if key is None else key]
        return rows


def _read_csv(path: Name) -> HostArray:
    at = 0  # the number of the line that was read last

    def lines(file: IO[str]) -> Iterator[str]:
        nonlocal at
        for at, line in enumerate(file, start=1):  # noqa: B007  used where an error is caught
            if not line.isspace():
                yield line

    with open(path, encoding="utf-8-sig") as file:
        try:
            rest = lines(file)
            first = next(rest, None)
            if first is not None and _is_header(first):
                first = next(rest, None)
            if first is None:
                raise RowsError(f"{path} holds no rows")
            return np.loadtxt(chain([first], rest), delimiter=",", ndmin=2, comments=None)
        except UnicodeDecodeError as error:
            raise RowsError(f"{path} is not text: {error}") from error
        except ValueError as error:
            if isinstance(error, NnxpError):
                raise
            said = (
                re.sub(r" at row \d+", "", str(error)).partition("; use `usecols`")[0].rstrip(".")
            )
            raise RowsError(f"{path}, line {at}: {said}") from error


def _is_header(line: str) -> bool:
    """Whether the line holds names: no number, so that a row with a bad one is not passed over."""
    fields = [field.strip().strip('"') for field in line.split(",")]
    return not any(map(_is_number, fields)) and not all(each.lower() in MISSING for each in fields)


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


@contextmanager
def written_rows(path: Name, shape: Shape, dtype: np.dtype[Any]) -> Iterator[HostArray]:
    """An array of this shape on the disk, to fill; it becomes the file when the block ends well.

    If the block is left by an error, nothing is left of it, and what stood at the path still does.
    bfloat16, which no NumPy file can name, is written as float32.

    Raises OptionError for an ending or a shape that cannot be written, OSError if the disk has no
    room or the place may not be written to, before the block is entered. The block itself lets go
    of the array, for there are systems that rename no file while it is mapped.
    """
    kind = ending(path)
    if kind == ".csv" and len(shape) != 2:
        raise OptionError(f"{path}: a .csv file has rows and columns, but the output is {shape}")
    if dtype.name == "bfloat16":
        dtype = np.dtype("float32")
    with written_beside(path) as beside:
        if kind == ".npy":
            with _room(path), open(beside, "r+b") as file:
                mapped = open_memmap(beside, mode="w+", dtype=dtype, shape=shape)
                _reserve(file)
            yield mapped
            mapped.flush()
            del mapped  # not every system renames a file that is mapped
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
            _store(out, beside, kind)


def _store(rows: HostArray, path: Path, kind: str) -> None:
    with open(path, "wb") as file:
        if kind == ".npz":
            np.savez(file, output=rows)
        else:
            digits = "%.17g" if rows.itemsize > 4 else "%.9g"  # as many as a float has
            np.savetxt(file, rows, fmt=digits, delimiter=",")


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
        self.shape, self.dtype = x.shape, x.dtype
        self._x = x
        mapped = [(each, _map_of(each)) for each in (x, *others)]
        self._maps = [found for _, found in mapped if found is not None]
        self._row = sum(each.nbytes for each, found in mapped if found) // max(1, len(x))
        self._passed = 0

    def __getitem__(self, rows: slice) -> HostArray:
        block: HostArray = self._x[rows]
        self._passed += self._row * len(block)  # threads may lose a count: pages then go later
        if self._passed > PASSED:
            self._passed = 0
            for each in self._maps:
                each.madvise(mmap.MADV_DONTNEED)  # a page that is still in use comes back
        return block


def _map_of(x: HostArray) -> mmap.mmap | None:
    """The map of a file that an array looks into, where the system can let go of its pages."""
    base: Any = x
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED") else None
