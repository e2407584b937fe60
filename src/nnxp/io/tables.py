"""Rows in tables: CSV and TSV, plain or gzipped, Parquet and Arrow, a batch of rows at a time.

A table is never read whole, so it may be larger than memory. Text is read by pyarrow where it is
installed and by NumPy where it is not, by the same rules:

- A field is a number as Python writes it, `nan` and `inf` included, in quotes or not. Underscores
  and thousands separators make no number. Lines without any field are passed over.
- Missing values (nothing, NA, N/A, #N/A, \\N, null, none, -, ?) are an error that names line and
  column, unless `missing` says what stands in their place.
- The first line holds names if every field of it is one: it has a letter or an underscore, and is
  no number, date, time, truth value, error of a spreadsheet or missing value. A line that is
  exactly 0, 1, ... n-1, which is how a table without names is exported, holds names as well, if
  rows follow, and so does one where columns are asked for by name. Any other line is a row. Where
  a line could be either, `say` hears what was decided.
"""

from __future__ import annotations

import csv
import io
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any, TypeAlias

import numpy as np

from nnxp._arrays import HostArray
from nnxp._errors import BackendUnavailable, NnxpError, OptionError, RowsError, ShapeError
from nnxp._exchange import host_rows, order_of

Name: TypeAlias = str | os.PathLike[str]

TEXTS = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
BINARIES = (".parquet", ".arrow", ".feather")

CHUNK = 8 << 20  # bytes of text that are converted together
BATCH = 1 << 16  # rows of a Parquet or Arrow file that are converted together
SAMPLE = 50  # lines that show what the columns are
LONGEST_LINE = 256 << 20  # bytes; a file with a longer line is no table

MISSING = ("", "-", "?", "na", "n/a", "#n/a", "#na", "<na>", "null", "none", "\\n")
_NUMBER = re.compile(
    r"[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|nan|inf|infinity)", re.IGNORECASE
)
_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"
_VALUE = re.compile(  # what has letters and is no name all the same
    rf"""true | false | \#[a-z/0]+[!?]
    | \d{{1,4}}[-/.]\d{{1,2}}[-/.]\d{{1,4}}.* | \d{{1,2}}:\d{{2}}.*
    | \d{{1,2}}[\s/-]*{_MONTH}[\s,/-]*\d{{2,4}}.* | {_MONTH}[\s]*\d{{1,2}},?\s+\d{{4}}.*""",
    re.IGNORECASE | re.VERBOSE,
)
_MEASURE = re.compile(r"[+-]?[\d.,]*\d\s*[^\W\d_]{1,3}")  # a number and a unit: 5 kg, or 10Y


@dataclass(frozen=True)
class Reading:
    """How a table is read.

    `header` says whether the first line of a text holds names, `delimiter` what stands between its
    fields; both are found out if None. `columns` are the names or numbers (from 0) of the columns
    to take, in this order; none are all. `missing` is the number for missing values, an error if
    None. `names` are those by which a model knows its columns: they are taken in that order, and
    other ones refused. `say` hears what was decided where a text leaves it in doubt.
    """

    header: bool | None = None
    delimiter: str | None = None
    columns: Sequence[str | int] = ()
    missing: float | None = None
    names: tuple[str, ...] | None = None
    say: Callable[[str], object] = lambda message: None

    def __post_init__(self) -> None:
        mark = self.delimiter
        if mark is not None and (len(mark) != 1 or not mark.isascii() or mark in '"\r\n'):
            raise OptionError(f'a delimiter is one ASCII character such as ";", not {mark!r}')


class Table:
    """A table to read, batch by batch: `for rows in table`.

    `columns` are the names of the columns that are taken, None if they have none; `names` those of
    all columns, "" where they have none, and `chosen` the numbers of those that are taken. Of
    `size`, in bytes or rows, `passed` have been read.
    """

    path: Name
    reading: Reading
    names: list[str]
    chosen: list[int]
    columns: tuple[str, ...] | None
    size: int
    passed: int = 0

    def put_in_order(self) -> None:
        """Take the columns in the order of the names that are asked for; RowsError for others."""
        if self.columns is None:
            return
        names = self.reading.names
        try:
            asked = ",".join(names or ())
            plain = re.fullmatch(r"[\w,.-]{1,100}", asked)
            fix = f"--columns {asked}" if plain else "--columns names those to take"
            places = order_of(self.columns, names, fix)
        except ShapeError as error:
            raise RowsError(f"{self.path}: {error}") from None
        if places:
            self.chosen = [self.chosen[place] for place in places]
            self.columns = names
            self.reading.say(f"{self.path}: the columns are put in the order of the model's")

    def __iter__(self) -> Iterator[HostArray]:
        raise NotImplementedError

    def column(self, index: int) -> HostArray:
        """All values of one column, (rows,): float64 if they are numbers, else text.

        Raises RowsError for a value that is missing.
        """
        raise NotImplementedError


def open_table(path: Name, reading: Reading) -> Table:
    """The table in a file, by the ending of its name.

    Raises RowsError for a file that is no table of numbers, OptionError for what cannot be asked
    of it, and OSError.
    """
    table = (TextTable if ending(path) in TEXTS else ArrowTable)(path, reading)
    table.put_in_order()
    return table


def ending(path: Name) -> str:
    """How the name of a file ends, that of a gzipped one included: ".csv.gz"."""
    root, end = os.path.splitext(os.path.basename(path))
    return (os.path.splitext(root)[1] + end if end.lower() == ".gz" else end).lower()


def _chosen(path: Name, asked: Sequence[str | int], names: Sequence[str]) -> list[int]:
    """The numbers of the columns that are asked for; the names are "" where there are none."""
    if not asked:
        return list(range(len(names)))
    numbers = []
    for column in asked:
        if isinstance(column, str) and names.count(column) > 1:
            raise OptionError(
                f"{path} has {names.count(column)} columns {column!r}: take it by number"
            )
        if isinstance(column, str) and column in names:
            numbers.append(names.index(column))
        elif str(column).isdecimal() and int(column) < len(names):
            numbers.append(int(column))
        else:
            held = ", ".join(filter(None, names)) or f"{len(names)} columns without names"
            raise OptionError(f"{path} has no column {column!r}; it has {held:.500}")
    return numbers


# text


class TextTable(Table):
    """A CSV or TSV file, plain or gzipped."""

    def __init__(self, path: Name, reading: Reading) -> None:
        self.path, self.reading = path, reading
        self.size = os.stat(path).st_size
        with self._opened() as (_, stream):
            sample = _decoded(_first_lines(_chunks(path, stream)), path)
        usual = "\t" if ending(path).startswith(".tsv") else ","
        self.delimiter = reading.delimiter or _delimiter(sample, usual)
        if not reading.delimiter and self.delimiter != usual:
            reading.say(f"{path}: the delimiter is {self.delimiter!r}, by what the lines look like")
        records = list(islice(_records(sample, self.delimiter, 1), SAMPLE))
        if not records:
            raise RowsError(f"{path} holds no rows")
        (line, first), following = records[0], [fields for _, fields in records[1:]]
        self.header, doubt = _is_header(first, following)
        if reading.header is not None:
            self.header, doubt = reading.header, ""
        elif not all(str(name).isdecimal() for name in reading.columns):
            self.header, doubt = True, ""  # who asks for names knows that there are some
        if doubt:
            reading.say(f"{path}, line {line}: {doubt}")
        if self.header and not following:
            raise RowsError(f"{path} holds no rows, only names")
        self.skipped = line if self.header else 0
        self.width = len(first)
        self.names = first if self.header else [""] * self.width
        self.chosen = _chosen(path, reading.columns, self.names)
        self.columns = tuple(self.names[index] for index in self.chosen) if self.header else None

    def __iter__(self) -> Iterator[HostArray]:
        line = 1
        with self._opened() as (file, stream):
            for chunk in _chunks(self.path, stream):
                lines = chunk.count(b"\n") or chunk.count(b"\r")
                skipped = min(max(0, self.skipped + 1 - line), lines)
                text = _without_lines(chunk, skipped) if skipped else chunk
                rows = self._rows(text, line + skipped)
                line += lines
                self.passed = file.tell()
                if len(rows):
                    yield rows

    def column(self, index: int) -> HostArray:
        values, line = [], 1
        with self._opened() as (_, stream):
            for chunk in _chunks(self.path, stream):
                for at, fields in _records(_decoded(chunk, self.path), self.delimiter, line):
                    if at <= self.skipped:
                        continue
                    if len(fields) != self.width or fields[index].lower() in MISSING:
                        raise RowsError(
                            f"{self.path}, line {at}: there is no value in column {index + 1}"
                        )
                    values.append(fields[index])
                line += chunk.count(b"\n") or chunk.count(b"\r")
        numbers = all(map(_NUMBER.fullmatch, values))
        return np.array(values, "float64") if numbers else np.array(values)

    @contextmanager
    def _opened(self) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
        """The file as it lies on the disk, and the text in it."""
        with open(self.path, "rb") as file:
            if not ending(self.path).endswith(".gz"):
                yield file, file
                return
            import gzip

            try:
                with gzip.GzipFile(fileobj=file) as stream:
                    yield file, stream  # type: ignore[misc]
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise RowsError(f"{self.path} is not a whole gzip file: {error}") from error

    def _rows(self, chunk: bytes, line: int) -> HostArray:
        """The rows in whole lines of text, of which the first is the line of that number.

        What the fast readers refuse is read by the plain one, which knows the line and the column.
        """
        fast = _pyarrow("csv")
        rows = self._rows_of_pyarrow(chunk, fast) if fast else self._rows_of_numpy(chunk)
        return self._rows_of_records(chunk, line) if rows is None else rows

    def _rows_of_pyarrow(self, chunk: bytes, reader: Any) -> HostArray | None:
        import pyarrow

        names = [str(index) for index in range(self.width)]
        missing = self.reading.missing
        marks = {form for mark in MISSING for form in (mark, mark.upper(), mark.title())}
        try:
            table = reader.read_csv(
                pyarrow.BufferReader(chunk),
                reader.ReadOptions(column_names=names),
                reader.ParseOptions(delimiter=self.delimiter),
                reader.ConvertOptions(
                    column_types=dict.fromkeys(names, pyarrow.float64()),
                    include_columns=[names[index] for index in dict.fromkeys(self.chosen)],
                    null_values=sorted(marks) if missing is not None else [],
                ),
            )
        except pyarrow.ArrowException:
            return None
        rows = np.empty((len(table), len(self.chosen)))
        for place, index in enumerate(self.chosen):
            start = 0
            for part in table.column(names[index]).chunks:
                filled = part.fill_null(float(missing)) if missing is not None else part
                rows[start : start + len(part), place] = filled.to_numpy(zero_copy_only=False)
                start += len(part)
        return rows

    def _rows_of_numpy(self, chunk: bytes) -> HostArray | None:
        lines = [line for _, line in _lines(_decoded(chunk, self.path), self.delimiter, 1)]
        if not lines:
            return np.empty((0, len(self.chosen)))
        if self.reading.columns:
            return None  # NumPy would not see that other columns are too many, or too few
        try:
            rows = np.loadtxt(
                lines, delimiter=self.delimiter, quotechar='"', comments=None, ndmin=2
            )
        except ValueError:
            return None
        return rows[:, self.chosen] if rows.shape[1] == self.width else None

    def _rows_of_records(self, chunk: bytes, line: int) -> HostArray:
        rows = []
        for at, fields in _records(_decoded(chunk, self.path), self.delimiter, line):
            if len(fields) != self.width:
                raise RowsError(
                    f"{self.path}, line {at}: the number of columns changed from {self.width} to "
                    f"{len(fields)}"
                )
            rows.append([self._number(fields[index], at, index) for index in self.chosen])
        return np.array(rows, "float64").reshape(len(rows), len(self.chosen))

    def _number(self, field: str, line: int, index: int) -> float:
        if _NUMBER.fullmatch(field):
            return float(field)
        missing = field.lower() in MISSING
        if missing and self.reading.missing is not None:
            return float(self.reading.missing)
        name = f" ({self.names[index]})" if self.names[index] else ""
        message = f"{self.path}, line {line}: {field!r:.60} in column {index + 1}{name} "
        if missing:
            message += "is a missing value; --missing 0 reads it as 0"
        else:
            message += "is not a number"
        if line == 1 and self.reading.header is None and not self.header:
            message += "; if the line holds names, --header says so"
        raise RowsError(message)


def _chunks(path: Name, stream: IO[bytes]) -> Iterator[bytes]:
    """The text of a file in pieces that end where a line ends."""
    rest = stream.read(3).removeprefix(b"\xef\xbb\xbf")
    while piece := stream.read(CHUNK):
        piece = rest + piece
        end = piece.rfind(b"\n") + 1 or piece.rfind(b"\r", 0, -1) + 1
        if end:
            yield piece[:end]
        rest = piece[end:]
        if len(rest) > LONGEST_LINE:
            raise RowsError(f"{path} is no table: a line has more than {LONGEST_LINE:,} bytes")
    if rest:
        yield rest


def _first_lines(chunks: Iterator[bytes]) -> bytes:
    """As many lines as show what the columns are, and what is blank before them."""
    text = b""
    for chunk in chunks:
        text += chunk
        start = len(text) - len(text.lstrip())
        ends = islice(re.finditer(rb"\r\n|\n|\r", text[start:]), SAMPLE)
        places = [match.end() for match in ends]
        if len(places) == SAMPLE:
            return text[: start + places[-1]]
    return text


def _without_lines(chunk: bytes, count: int) -> bytes:
    ends = islice(re.finditer(rb"\r\n|\n|\r", chunk), count - 1, None)
    return chunk[next(ends).end() :]


def _decoded(chunk: bytes, path: Name) -> str:
    try:
        return chunk.decode()
    except UnicodeDecodeError as error:
        raise RowsError(f"{path} is not text in UTF-8: {error}") from error


def _lines(text: str, delimiter: str, first: int) -> Iterator[tuple[int, str]]:
    """The lines that hold fields, with their numbers."""
    for at, line in enumerate(io.StringIO(text, newline=None), first):
        if line.strip() or delimiter in line:
            yield at, line


def _records(text: str, delimiter: str, first: int) -> Iterator[tuple[int, list[str]]]:
    """The fields of each line, without quotes and the spaces around them, and its number."""
    for at, line in _lines(text, delimiter, first):
        fields = line.split(delimiter)
        if line.count('"') % 2 == 0:  # a quote that is not closed is no quote
            with suppress(csv.Error):
                fields = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))
        yield at, [field.strip() for field in fields]


def _delimiter(text: str, usual: str) -> str:
    """The mark between the fields, by how many of them are numbers if it is taken for one."""

    def share(mark: str) -> float:
        records = [fields for _, fields in islice(_records(text, mark, 1), SAMPLE)]
        if not records or len(records[0]) < 2:
            return -1.0
        fields = [field for record in records[1:] or records for field in record]
        return sum(map(_is_number_or_missing, fields)) / len(fields)

    return max(dict.fromkeys((usual, ",", ";", "\t", "|")), key=share)


def _is_number_or_missing(field: str) -> bool:
    return bool(_NUMBER.fullmatch(field)) or field.lower() in MISSING


def _is_header(first: list[str], following: list[list[str]]) -> tuple[bool, str]:
    """Whether a text begins with a line of names, and what is to be said of it if in doubt."""
    count = [str(index) for index in range(len(first))]
    if following and first == count and len(first) > 1:
        return True, f"0 to {len(first) - 1} are taken as names of columns, --no-header as a row"
    if following and first == count:
        return False, "0 is taken as a row, --header as the name of the column"
    index = [fields[0] for fields in following]
    counted = index == [str(i) for i in range(len(index))]
    if len(first) > 1 and first == ["", *count[:-1]] and counted:
        return True, f"0 to {len(first) - 2} are taken as names of columns, --no-header as a row"
    if not any(first) or not all(field == "" or _is_name(field) for field in first):
        return False, ""
    measures = [field for field in first if _MEASURE.fullmatch(field)]
    if measures and not (following and all(map(_NUMBER.fullmatch, following[0]))):
        return False, ""
    if measures:
        return True, f"{measures[0]!r} is taken as the name of a column, --no-header as a value"
    return True, ""


def _is_name(field: str) -> bool:
    if _is_number_or_missing(field) or _VALUE.fullmatch(field):
        return False
    return "_" in field or any(map(str.isalpha, field))


# Parquet and Arrow


class ArrowTable(Table):
    """A Parquet file, or an Arrow (Feather) file or stream."""

    def __init__(self, path: Name, reading: Reading) -> None:
        if reading.header is not None or reading.delimiter is not None:
            raise OptionError(f"{path}: only text has a header and a delimiter")
        self.path, self.reading = path, reading
        self.size = os.stat(path).st_size
        self._pyarrow = required_pyarrow(path)
        with self._opened() as (names, size, _):
            self.size = size
            self.names = names
        self.chosen = _chosen(path, reading.columns, self.names)
        self.columns = tuple(self.names[index] for index in self.chosen)
        # A part of a Parquet file's columns is asked for by name, unless two have the same.
        self._by_number = ending(path) != ".parquet" or len(set(self.names)) < len(self.names)

    def __iter__(self) -> Iterator[HostArray]:
        with self._opened() as (_, _, batches):
            for batch in batches:
                for start in range(0, len(batch), BATCH):
                    rows = self._rows(batch[start : start + BATCH])
                    self.passed += len(rows)
                    yield rows

    def column(self, index: int) -> HostArray:
        name, values = self.names[index], []
        with self._opened() as (_, _, batches):
            for batch in batches:
                where = name if ending(self.path) == ".parquet" else index
                values += batch.column(where).to_pylist()
        if None in values:
            row = values.index(None)
            raise RowsError(f"{self.path}, row {row} (from 0): there is no value in {name!r}")
        numbers = all(isinstance(value, int | float) for value in values)  # True and False, too
        return (
            np.array(values, "float64") if numbers else np.array([str(value) for value in values])
        )

    @contextmanager
    def _opened(self) -> Iterator[tuple[list[str], int, Iterator[Any]]]:
        """The names of the columns, the number of rows, and the batches of them."""
        arrow = self._pyarrow
        with open(self.path, "rb") as file:
            try:
                if ending(self.path) == ".parquet":
                    parquet = arrow.parquet.ParquetFile(file)
                    batches = self._of_parquet(parquet)
                    yield list(parquet.schema_arrow.names), parquet.metadata.num_rows, batches
                else:
                    with arrow.memory_map(os.fspath(self.path)) as mapped:
                        yield self._of_arrow(mapped)
            except (arrow.ArrowException, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                suffix = ending(self.path)
                raise RowsError(f"{self.path} is not a whole {suffix} file: {error}") from error

    def _of_parquet(self, file: Any) -> Iterator[Any]:
        names = list(dict.fromkeys(self.names[index] for index in self.chosen))
        yield from file.iter_batches(BATCH, columns=None if self._by_number else names)

    def _of_arrow(self, mapped: Any) -> tuple[list[str], int, Iterator[Any]]:
        arrow = self._pyarrow
        try:
            file = arrow.ipc.open_file(mapped)
        except arrow.ArrowInvalid:
            mapped.seek(0)
            stream = arrow.ipc.open_stream(mapped)
            return list(stream.schema.names), 0, iter(stream)
        batches = (file.get_batch(index) for index in range(file.num_record_batches))
        rows = sum(file.get_batch(index).num_rows for index in range(file.num_record_batches))
        return list(file.schema.names), rows, batches

    def _rows(self, batch: Any) -> HostArray:
        columns = []
        for index in self.chosen:
            name = self.names[index]
            column = batch.column(index if self._by_number else name)
            if column.null_count and self.reading.missing is None:
                row = self.passed + column.is_null().index(True).as_py()
                raise RowsError(
                    f"{self.path}, row {row} (from 0): a value is missing in column {index + 1} "
                    f"({name}); --missing 0 reads it as 0"
                )
            try:
                rows = host_rows(self._pyarrow.table({name: column}))[:, 0]
            except NnxpError as error:
                raise RowsError(f"{self.path}: {error}") from error
            if column.null_count:
                absent = column.is_null().to_numpy(zero_copy_only=False)
                rows = np.where(absent, float(self.reading.missing or 0), rows)
            columns.append(rows)
        return np.column_stack(columns) if columns else np.empty((len(batch), 0), "float32")


def _pyarrow(module: str) -> Any:
    """A module of pyarrow, None where it is not installed."""
    import importlib

    try:
        return importlib.import_module(f"pyarrow.{module}")
    except ImportError:
        return None


def required_pyarrow(path: Name) -> Any:
    """pyarrow, with what reads and writes Parquet and Arrow; BackendUnavailable without it."""
    if _pyarrow("parquet") is None or _pyarrow("ipc") is None:
        raise BackendUnavailable(
            f"{path}: {ending(path)} files need pyarrow", "pip install 'nnxp[tables]' brings it"
        )
    import pyarrow

    return pyarrow


# writing


@contextmanager
def text_writer(path: Name, file: IO[bytes], names: Sequence[str]) -> Iterator[Callable[..., None]]:
    """What appends blocks of rows to a text file, below the names of their columns.

    Numbers are written with as many digits as it takes to read the same ones again.
    """
    delimiter = "\t" if ending(path).startswith(".tsv") else ","
    fast = _pyarrow("csv")

    def write_records(records: Sequence[Sequence[Any]]) -> None:
        text = io.StringIO()
        csv.writer(text, delimiter=delimiter, lineterminator="\n").writerows(records)
        stream.write(text.getvalue().encode())

    def write(rows: HostArray) -> None:
        if rows.dtype.kind in "Ub":  # labels
            write_records(rows.tolist())
            return
        rows = rows if rows.itemsize > 2 else rows.astype("float32")
        if fast and rows.size:
            import pyarrow

            table = pyarrow.table([np.ascontiguousarray(column) for column in rows.T], list(names))
            options = fast.WriteOptions(include_header=False, delimiter=delimiter)
            fast.write_csv(table, stream, options)
        else:
            digits = "%.17g" if rows.itemsize > 4 else "%.9g"  # as many as a float has
            digits = "%d" if rows.dtype.kind in "iu" else digits
            np.savetxt(stream, rows, fmt=digits, delimiter=delimiter)

    with _compressed(file) if ending(path).endswith(".gz") else nullcontext(file) as stream:
        write_records([names])
        yield write


def _compressed(file: IO[bytes]) -> Any:
    import gzip

    return gzip.GzipFile(fileobj=file, mode="wb", compresslevel=4)


@contextmanager
def arrow_writer(
    path: Name, file: IO[bytes], names: Sequence[str], dtype: np.dtype[Any]
) -> Iterator[Callable[..., None]]:
    """What appends blocks of rows to a Parquet or an Arrow file."""
    arrow = required_pyarrow(path)
    schema = arrow.schema([(name, arrow.from_numpy_dtype(dtype)) for name in names])
    if ending(path) == ".parquet":
        writer = arrow.parquet.ParquetWriter(file, schema)
    else:
        writer = arrow.ipc.new_file(file, schema)
    with writer:

        def write(rows: HostArray) -> None:
            columns = [np.ascontiguousarray(column) for column in rows.T]
            writer.write_table(arrow.table(columns, schema=schema))

        yield write
