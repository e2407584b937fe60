"""Rows of other libraries, exactly as numbers of NumPy's: at the door, and at every block.

`source_of` is the door: what it answers has a shape and gives blocks of rows by slicing. What such
a block is (an array, a table, a tensor, a masked or sparse array) `host_rows` makes rows of
numbers, or refuses it and names the fix. Nothing is rounded, filled in or left out without a word:

    masked, or missing in a typed column   NaN; integers become float64
    boolean, object columns of numbers     those numbers
    text, dates, complex, None, ragged     DtypeMismatch or ShapeError
"""

from __future__ import annotations

import numbers
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from types import ModuleType
from typing import Any, TypeGuard

import numpy as np

from nnxp._arrays import HostArray, Shape, is_numeric
from nnxp._errors import DeviceMismatch, DtypeMismatch, NnxpError, ShapeError

_PLAIN = frozenset(np.dtype(code) for code in "?bBhHiIlLqQefdg")
"""The types of rows that need nothing done: real numbers in this machine's byte order."""

MOST_HELD, DEEPEST = 10_000, 4  # objects that are asked for the arrays in them, and levels of them

_FIXES = {
    **dict.fromkeys("US", "numpy.loadtxt or a column's own conversion makes numbers of text"),
    "c": "x.real, x.imag or numpy.abs(x) are real",
    "M": "(x - start) / numpy.timedelta64(1, 's') makes numbers of dates",
    "m": "x / numpy.timedelta64(1, 's') makes numbers of durations",
    "V": "numpy.lib.recfunctions.structured_to_unstructured(x) makes columns of its fields",
}


class Rows:
    """Rows of a source whose own slicing is not by position, or not by rows.

    `take(rows)` gives a block of them. `reads` is what the rows are read from, and `columns` are
    the names of the columns, if they have any.
    """

    def __init__(
        self,
        source: Any,
        take: Callable[[slice], Any],
        shape: Shape,
        columns: tuple[str | None, ...] | None = None,
    ) -> None:
        self.reads, self.shape, self._take = (source,), shape, take
        self.columns = columns or columns_of(source)
        self.dtype = self[:0].dtype if shape else None

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> HostArray:
        return host_rows(self._take(rows))


def source_of(x: Any) -> Any:
    """What an engine reads rows from: x itself, if it gives blocks of rows by slicing.

    Nothing of the rows of a table, a tensor or a file is converted here, only what has no shape.

    Raises ShapeError or DtypeMismatch for what cannot be rows, DeviceMismatch for a tensor that is
    not in host memory.
    """
    if type(x) is np.ndarray and x.dtype in _PLAIN and x.ndim:
        return x
    if isinstance(x, np.ndarray):
        pass
    elif isinstance(x, (list, tuple)):
        x = _of_list(x)
    elif _is_tensor(x):
        _check_tensor(x)
        plain = _known_to_numpy(x) and not (x.is_neg() or x.is_conj())
        x = x.detach().numpy() if plain else Rows(x, x.__getitem__, _shape(x))
    elif _is_frame(x):
        x = Rows(x, x.iloc.__getitem__, _shape(x))
    elif _is_table(x):
        x = Rows(x, x.__getitem__, (len(x), len(_names(x))))
    elif _is_sparse(x):
        x = x.tocsr()  # the form of it that gives rows
    elif not (hasattr(x, "shape") and hasattr(x, "__getitem__")):
        x = _without_shape(x)
    shape = _shape(x)
    dtype = getattr(x, "dtype", None)
    if isinstance(dtype, np.dtype) and dtype.kind != "O" and not is_numeric(dtype):
        raise DtypeMismatch(_not_numbers(dtype))
    if len(shape) == 0:
        raise ShapeError("x is (rows, ...) but has no axis at all; x[None] makes it one row")
    return host_rows(x) if isinstance(x, np.ndarray) and x.dtype.kind == "O" else x


def is_by_name(x: object) -> TypeGuard[Mapping[str, Any]]:
    """Whether x holds inputs by their names, which a sparse array that is a mapping does not."""
    return isinstance(x, Mapping) and not hasattr(x, "shape")


def host_rows(block: Any) -> HostArray:
    """A block of rows as a host array of real numbers in native byte order, whatever holds it.

    What is masked or missing becomes NaN, in float64 for whole numbers. Objects that are all real
    numbers become int64 if they are whole, else float64.

    Raises DtypeMismatch or ShapeError, with the fix, for what holds no rows of numbers, and
    DeviceMismatch for what is on a device.
    """
    if type(block) is np.ndarray and block.dtype in _PLAIN:
        return block
    if isinstance(block, np.ndarray):
        return _of_masked(block) if isinstance(block, np.ma.MaskedArray) else _of_array(block)
    if isinstance(block, Rows):
        return block[:]
    if isinstance(block, (list, tuple)):
        return _of_list(block)
    _refuse_names(block)
    if _is_tensor(block):
        return host_rows(_tensor_numbers(block))
    if _is_table(block):
        return _of_table(block)
    if _is_sparse(block):
        return host_rows(block.toarray())
    if hasattr(block, "todense"):  # pydata's sparse
        return host_rows(block.todense())
    try:
        return _of_array(np.asarray(block))
    except NnxpError:
        raise
    except Exception as error:  # each library says in its own way that it does not give its numbers
        raise DtypeMismatch(
            f"{_named(block)} does not become a NumPy array ({type(error).__name__}: {error}); "
            "give its rows as one"
        ) from error


# names of columns


def columns_of(source: Any) -> tuple[str | None, ...] | None:
    """The names of a source's columns, None where one has none; None if no column has a name."""
    if source is None or isinstance(source, np.ndarray):
        return None
    names = _names(source) if _is_table(source) else getattr(source, "columns", None)
    if names is None or callable(names) or isinstance(names, str):
        return None
    try:
        names = tuple(name if isinstance(name, str) else None for name in names)
    except TypeError:
        return None
    return names if any(name is not None for name in names) else None


def in_order(source: Any, names: Any) -> Any:
    """The source with its columns in the order of these names, as a model was trained with them.

    A source whose columns have no names is taken as it is, and so is every source if there are no
    names to compare. Raises ShapeError for columns that are missing, more, or not to be told apart.
    """
    columns = columns_of(source)
    places = columns and order_of(columns, names, "x[list(model.columns)] leaves them out")
    if not places:
        return source

    def take(rows: slice) -> HostArray:
        return np.take(host_rows(source[rows]), places, axis=1)

    return Rows(source, take, _shape(source), names)


def order_of(columns: tuple[str | None, ...], names: Any, fix: str) -> list[int] | None:
    """The places of columns in the order of these names; None if they are in it, or have no names.

    Columns "0", "1", "2", ... have none. Where some have names and some not, all stay in their
    places, if the names are in theirs. `fix` says how columns that are too many can be left out.
    """
    named = isinstance(names, tuple) and all(isinstance(name, str) for name in names)
    if not named or columns in (names, tuple(map(str, range(len(columns))))):
        return None
    if None in columns and len(columns) == len(names):
        pairs = [(own, due) for own, due in zip(columns, names, strict=True) if own is not None]
        if all(own == due for own, due in pairs):
            return None
        own, due = next((own, due) for own, due in pairs if own != due)
        raise ShapeError(
            f"the column {own!r} is where the model was trained with {due!r}; with names for all "
            "columns they would be put in order"
        )
    missing, extra = Counter(names) - Counter(columns), Counter(columns) - Counter(names)
    if missing or extra:
        differences = [f"{_some(missing)} missing"] if missing else []
        differences += [f"{_some(extra)} too many"] if extra else []
        raise ShapeError(
            f"these are not the columns that the model was trained with: {', '.join(differences)}"
            + ("" if missing else f"; {fix}")
        )
    if len(set(names)) < len(names):
        twice, _ = Counter(names).most_common(1)[0]
        raise ShapeError(
            "the columns are in another order than the model was trained with, and as several are "
            f"called {twice!r}, they cannot be put in order"
        )
    return [columns.index(name) for name in names]


def _some(names: Counter[Any]) -> str:
    words = ["one without a name" if name is None else repr(name) for name in names]
    more = f" and {len(words) - 5} more" if len(words) > 5 else ""
    return f"{', '.join(words[:5])}{more} {'is' if len(words) == 1 else 'are'}"


# arrays and lists


def _of_array(array: HostArray) -> HostArray:
    array = np.asarray(array)  # a memory map or a matrix as a plain array
    if array.dtype.kind == "O":
        return _of_objects(array)
    if not is_numeric(array.dtype):
        raise DtypeMismatch(_not_numbers(array.dtype))
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _of_list(items: list[Any] | tuple[Any, ...]) -> HostArray:
    """The rows of a list: numbers, lists of numbers, or arrays that are one row each."""
    if len(items) == 1 and len(getattr(items[0], "shape", ())) >= 2:
        shape = tuple(items[0].shape)
        raise ShapeError(
            f"x is a {type(items).__name__} of one array {shape}, which may be {shape[0]} rows or "
            "one; x[0] are its rows, x[0][None] is one row"
        )
    if any(_is_foreign(item) for item in items):
        items = [host_rows(item) if _is_foreign(item) else item for item in items]
    try:
        return host_rows(np.asarray(items))
    except NnxpError:
        raise
    except ValueError as error:
        raise ShapeError(f"x is no array of rows: {error}") from None


def _is_foreign(item: Any) -> bool:
    """Whether NumPy would take this item of a list for something else than its numbers."""
    if type(item) in (float, int, list, tuple, np.ndarray):
        return isinstance(item, (list, tuple)) and any(map(_is_foreign, item))
    return hasattr(item, "shape") and not isinstance(item, np.generic)


def _without_shape(x: Any) -> HostArray:
    """Rows of what NumPy makes an array of, such as array.array or what has __array__."""
    _refuse_names(x)
    if not hasattr(x, "__len__") and hasattr(x, "__iter__") and not hasattr(x, "__array__"):
        raise ShapeError(
            f"{_named(x)} has no shape; nnxp.predict_iter takes batches from an iterator, and "
            "numpy.array(list(x)) makes rows of a short one"
        )
    try:
        array = np.asarray(x)
    except ValueError as error:
        raise ShapeError(f"x is no array of rows: {error}") from None
    if array.ndim == 0 and array.dtype.kind == "O":
        raise ShapeError(f"{_named(x)} is no array of rows: it has neither a shape nor numbers")
    return array


def _refuse_names(x: object) -> None:
    """Raise DtypeMismatch for the name of a file, and for columns by name."""
    if isinstance(x, (str, bytes, os.PathLike)):
        raise DtypeMismatch(
            f"x is rows, not the name of a file: {x!r:.60}; numpy.load(path, mmap_mode='r') gives "
            "the rows of a .npy file"
        )
    if is_by_name(x):
        inside = ", ".join(f"x[{name!r}]" for name in list(x)[:3])
        more = ", ..." if len(x) > 3 else ""
        raise DtypeMismatch(
            f"rows are not a dict of columns; nnxp.Columns({inside}{more}) puts them side by side"
        )


# masks and objects


def _of_masked(block: Any) -> HostArray:
    if block.dtype.kind != "O" and not is_numeric(block.dtype):
        raise DtypeMismatch(_not_numbers(block.dtype))
    mask = np.ma.getmaskarray(block)
    if not mask.any():
        return host_rows(np.asarray(block.data))
    if block.dtype.kind == "O":
        block = np.ma.masked_array(np.where(mask, 0.0, block.data), mask)
    numbers_ = host_rows(np.asarray(block.data))
    if numbers_.dtype.kind in "biu":
        numbers_ = numbers_.astype("float64")
    return np.where(mask, numbers_.dtype.type(np.nan), numbers_)


def _of_objects(block: HostArray) -> HostArray:
    """An array of Python objects that are real numbers, each exactly as far as a float64 goes."""
    from decimal import Decimal  # not for every import of nnxp

    kinds = set(map(type, block.ravel().tolist()))
    for kind in sorted(kinds, key=lambda kind: kind is type(None)):  # text is named before None
        if not issubclass(kind, (numbers.Real, Decimal, np.bool_)):
            raise DtypeMismatch(_not_real(kind, block))
    whole = all(issubclass(kind, (int, np.integer, np.bool_)) for kind in kinds)
    try:
        return block.astype("int64" if whole else "float64")
    except OverflowError:
        pass
    try:
        return block.astype("float64")
    except OverflowError:
        raise DtypeMismatch("rows hold an integer that is larger than any float64") from None


def _not_real(kind: type, block: HostArray) -> str:
    example = next(item for item in block.ravel().tolist() if type(item) is kind)
    fix = {
        **dict.fromkeys(("NoneType", "NAType"), "numpy.nan in its place is a missing number"),
        **dict.fromkeys(("str", "bytes"), "convert the column, or leave it out"),
    }.get(kind.__name__, "convert it, or leave it out")
    return f"rows are real numbers, but one of them holds {example!r:.40} ({kind.__name__}); {fix}"


def _not_numbers(dtype: np.dtype[Any]) -> str:
    fix = _FIXES.get(dtype.kind, "")
    return f"rows are real numbers, but x is {dtype}" + (f"; {fix}" if fix else "")


# torch


def _is_tensor(x: Any) -> bool:
    return hasattr(x, "detach") and hasattr(x, "resolve_conj") and hasattr(x, "data_ptr")


def _tensor_numbers(x: Any) -> HostArray:
    _check_tensor(x)
    x = x.detach().resolve_conj().resolve_neg()
    return x.numpy() if _known_to_numpy(x) else x.float().numpy()  # type: ignore[no-any-return]


def _known_to_numpy(x: Any) -> bool:
    """Whether NumPy has the tensor's type; the others, such as bfloat16, fit into float32."""
    return not (x.is_floating_point() and str(x.dtype) not in _TORCH_FLOATS)


_TORCH_FLOATS = ("torch.float16", "torch.float32", "torch.float64")


def _check_tensor(x: Any) -> None:
    """Refuse a tensor that does not lie in host memory as it is shown."""
    if x.device.type != "cpu":
        raise DeviceMismatch(f"a block of rows is on {x.device}; x.cpu() brings it to the host")
    if getattr(x, "is_quantized", False):
        raise DtypeMismatch("rows are real numbers, but x is quantized; x.dequantize() makes them")
    if "strided" not in str(x.layout) or getattr(x, "is_nested", False):
        raise DtypeMismatch(
            "rows are one beside the other, but x is a sparse or nested tensor; "
            "x.to_dense() or x.to_padded_tensor(...) is not"
        )
    if x.is_complex():
        raise DtypeMismatch(f"rows are real numbers, but x is {x.dtype}; x.real or x.abs() are")


# sparse


def _is_sparse(x: Any) -> bool:
    return hasattr(x, "tocsr") and hasattr(x, "toarray")


# tables: pandas, polars, pyarrow


def _is_frame(x: Any) -> bool:
    """Whether x is a data frame or a series like those of pandas, with rows by position in iloc."""
    return hasattr(x, "iloc") and hasattr(x, "dtypes")


def _is_table(x: Any) -> bool:
    frame = hasattr(x, "columns") and hasattr(x, "dtypes")  # pandas, polars
    return frame or _is_frame(x) or (hasattr(x, "column_names") and hasattr(x, "schema"))


def _names(x: Any) -> Any:
    names = getattr(x, "column_names", None)
    if names is None and hasattr(x, "schema"):
        names = getattr(x.schema, "names", None)
    return getattr(x, "columns", None) if names is None or callable(names) else names


def _of_table(x: Any) -> HostArray:
    """The columns of a table side by side, each converted on its own."""
    if _is_frame(x):
        dtypes = list(np.atleast_1d(x.dtypes))
        numeric = all(isinstance(dtype, np.dtype) and is_numeric(dtype) for dtype in dtypes)
        if numeric and len(set(map(str, dtypes))) == 1:
            return host_rows(x.to_numpy())
        if len(x.shape) == 1:
            return _of_column(x)
        columns = [x.iloc[:, index] for index in range(x.shape[1])]
    elif hasattr(x, "itercolumns"):
        columns = list(x.itercolumns())
    elif hasattr(x, "get_columns"):
        columns = list(x.get_columns())
    else:
        columns = [x[name] for name in _names(x)]
    if not columns:
        return np.empty((len(x), 0), "float32")
    arrays = []
    for index, column in enumerate(columns):
        try:
            arrays.append(_of_column(column))
        except DtypeMismatch as error:
            raise DtypeMismatch(f"column {list(_names(x))[index]!r}: {error}") from None
    return np.column_stack(arrays)


def _of_column(column: Any) -> HostArray:
    """One column of a table, NaN where a value is missing in a typed one."""
    if hasattr(column, "null_count") and hasattr(column, "cast"):  # pyarrow, polars
        return _of_nullable(column)
    dtype = getattr(column, "dtype", None)
    if not isinstance(dtype, np.dtype) and hasattr(column, "isna"):  # pandas' own types
        kind = getattr(dtype, "kind", "O")
        missing = column.isna()
        if kind in "biuf" and missing.any():
            return host_rows(column.to_numpy(dtype="float64", na_value=np.nan))
        if kind in "biuf":
            return host_rows(column.to_numpy(dtype=getattr(dtype, "numpy_dtype", None)))
    return host_rows(np.asarray(column))


def _of_nullable(column: Any) -> HostArray:
    if callable(column.null_count):  # polars
        numeric = column.dtype.is_numeric() or str(column.dtype) == "Boolean"
        if column.null_count() and numeric:
            return host_rows(column.cast(float).to_numpy())
        return host_rows(column.to_numpy())
    if str(column.type) == "bool":
        column = column.cast("uint8")
    if hasattr(column, "combine_chunks") and hasattr(column, "chunks"):
        column = column.combine_chunks()
    return host_rows(column.to_numpy(zero_copy_only=False))


# shapes and names


def _shape(x: Any) -> Shape:
    try:
        shape = tuple(x.shape)
    except TypeError:
        raise ShapeError(
            f"{_named(x)} has the shape {x.shape!r:.60}; rows are (rows, ...)"
        ) from None
    if not all(hasattr(size, "__index__") for size in shape):
        raise ShapeError(
            f"{_named(x)} is {shape}: it does not know how many rows it has; "
            "x.compute_chunk_sizes() of dask, or nnxp.predict_iter over its blocks, helps"
        )
    return shape


def _named(x: Any) -> str:
    return f"{type(x).__module__}.{type(x).__qualname__}".removeprefix("builtins.")


# memory that is shared


def shares_memory(source: Any, out: HostArray) -> bool:
    """Whether rows of the source would be overwritten by writing `out` before they are read.

    Everything that the source reads is asked: the array, the tensor, the columns of a table, the
    inputs of nnxp.Columns, the arrays that an object of the user's holds or gives views of, and two
    memory maps of one file. `out` may be what is read, in place: each block is read before the same
    rows are written, so the same start, steps and type are allowed.
    """
    return any(_overlap(memory, out) for memory in _memory_of(source))


def _overlap(memory: HostArray, out: HostArray) -> bool:
    if memory.size == 0 or out.size == 0:
        return False
    try:
        most: Any = 100_000  # which NumPy's annotations came to know in 2.5
        shared = np.shares_memory(memory, out, max_work=most)
    except RuntimeError:  # np.exceptions.TooHardError: not known
        shared = True
    if not shared:
        return _overlap_in_file(memory, out)
    one, two = ((x.ctypes.data, x.strides, x.dtype, x.shape) for x in (memory, out))
    return not (one == two and _disjoint(out))


def _disjoint(x: HostArray) -> bool:
    """Whether no two elements of an array lie in the same place."""
    extent = x.itemsize
    for step, size in sorted(zip(map(abs, x.strides), x.shape, strict=True)):
        if size > 1:
            if step < extent:
                return False
            extent += step * (size - 1)
    return True


def _overlap_in_file(memory: HostArray, out: HostArray) -> bool:
    """Whether two arrays are parts of two maps of one file, and of the same bytes of it."""
    first, second = _place_in_file(memory), _place_in_file(out)
    if first is None or second is None or first[0] != second[0]:
        return False
    return first[1] < second[2] and second[1] < first[2]


def _place_in_file(x: HostArray) -> tuple[tuple[int, int], int, int] | None:
    """The file that an array is mapped from, and where in it its first and last bytes lie."""
    mapped: Any = x
    while isinstance(mapped.base, np.ndarray):
        mapped = mapped.base
    if not isinstance(mapped, np.memmap) or not mapped.filename:
        return None
    try:
        status = os.stat(mapped.filename)
    except OSError:
        return None  # the file has gone from there since
    low, high = np.lib.array_utils.byte_bounds(x)
    start = mapped.offset - mapped.ctypes.data
    return (status.st_dev, status.st_ino), low + start, high + start


def _memory_of(source: Any) -> Iterator[HostArray]:
    """The arrays over the memory that a source reads."""
    if isinstance(source, np.ndarray):
        yield np.asarray(source)
    elif hasattr(source, "reads"):
        for inner in source.reads:
            yield from _memory_of(inner)
    elif _is_tensor(source):
        yield _bytes_at(source.untyped_storage().data_ptr(), source.untyped_storage().nbytes())
    elif _is_frame(source):
        for index in range(source.shape[1] if len(source.shape) > 1 else 1):
            column = source.iloc[:, index] if len(source.shape) > 1 else source
            if isinstance(column.dtype, np.dtype):
                yield column.to_numpy()
    elif hasattr(source, "column_names") and hasattr(source, "schema"):
        for column in source.columns:
            for chunk in getattr(column, "chunks", [column]):
                yield from (np.frombuffer(buffer, "uint8") for buffer in chunk.buffers() if buffer)
    elif _is_sparse(source):
        yield from (part for part in vars(source).values() if isinstance(part, np.ndarray))
    else:
        yield from _arrays_held_by(source)
        yield from _memory_of_views(source)


def _arrays_held_by(source: Any) -> Iterator[HostArray]:
    """The arrays in the attributes of an object of the user's, and in what those hold."""
    waiting, seen = deque([(source, 0)]), set[int]()
    while waiting and len(seen) < MOST_HELD:
        holder, depth = waiting.popleft()
        if id(holder) in seen:
            continue
        seen.add(id(holder))
        if isinstance(holder, np.ndarray) or _is_tensor(holder):
            yield from _memory_of(holder)
        elif depth < DEEPEST and not isinstance(holder, (type, str, bytes, ModuleType)):
            inside: Any = getattr(holder, "__dict__", ())
            inside = holder if isinstance(holder, (list, tuple, dict)) else inside
            inside = inside.values() if isinstance(inside, dict) else inside
            waiting.extend((item, depth + 1) for item in islice(inside, MOST_HELD))


def _memory_of_views(source: Any) -> Iterator[HostArray]:
    """All rows of a source whose blocks are views of some memory, told from its first row."""
    block = source[0:1] if hasattr(source, "shape") and source.shape and source.shape[0] else None
    if not isinstance(block, np.ndarray) and block is not None and hasattr(block, "__array__"):
        block = np.asarray(block)
    if not isinstance(block, np.ndarray) or block.base is None or block.ndim == 0:
        return
    memory = np.asarray(block)
    while isinstance(memory.base, np.ndarray):
        memory = memory.base
    rows = np.lib.stride_tricks.as_strided(
        np.asarray(block), (source.shape[0], *block.shape[1:]), block.strides, writeable=False
    )
    (low, high), (start, stop) = (np.lib.array_utils.byte_bounds(x) for x in (rows, memory))
    yield rows if start <= low and high <= stop else np.asarray(memory)


def _bytes_at(address: int, size: int) -> HostArray:
    import ctypes

    return np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(address))
