"""The command line: `nnxp demo | train | predict | sweep | convert | summary | verify | ...`.

Results go to stdout, progress and errors to stderr. The exit code is 0 if all went well, 1 if
something that was asked for failed, 2 for wrong usage, 130 after Ctrl-C.
"""

from __future__ import annotations

import csv
import importlib
import json
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

import typer
from typer import Argument, Option
from typer.core import TyperGroup

from nnxp._errors import NnxpError, OptionError, ShapeError

if TYPE_CHECKING:
    from nnxp._arrays import HostArray, Shape
    from nnxp.engine import Engine
    from nnxp.io.rows import Passing
    from nnxp.io.tables import Reading, Table
    from nnxp.layers._layer import Layer
    from nnxp.program.program import Outline


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Every foreseeable error becomes one line on stderr and an exit code."""
    try:
        yield
    except BrokenPipeError:
        code = 141  # as of a process that SIGPIPE ends: whoever reads our output has enough
    except KeyboardInterrupt:
        code = _failed("interrupted", 128 + signal.SIGINT)
    except OptionError as error:
        code = _failed(error, 2)
    except OSError as error:
        reason = error.strerror or str(error)
        code = _failed(f"{error.filename}: {reason}" if error.filename else reason)
    except MemoryError as error:
        code = _failed(f"not enough memory. {error}".removesuffix(". "))
    except NnxpError as error:
        code = _failed(error)
    else:
        return
    raise SystemExit(code)


def _failed(what: object, code: int = 1) -> int:
    _say(f"nnxp: error: {' '.join(str(what).split())}", sys.stderr)
    return code


def _say(text: str, stream: TextIO | None = None) -> None:
    """Print; on a terminal, lines that are wider than it are broken between words."""
    stream = stream or sys.stdout
    if stream.isatty():
        width = shutil.get_terminal_size().columns
        text = "\n".join(
            line for paragraph in text.split("\n") for line in _folded(paragraph, width)
        )
    typer.echo(text, file=stream)


def _folded(line: str, width: int) -> list[str]:
    """A line in as many as it takes, the further ones indented below it."""
    import textwrap

    indent = " " * (len(line) - len(line.lstrip()) + 4)
    return textwrap.wrap(
        line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    ) or [line]


class _Commands(TyperGroup):
    """The commands, without a traceback for what any user may meet."""

    def main(self, *args: Any, **options: Any) -> Any:
        with _plain_errors():
            return super().main(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        with _plain_errors():  # here too, because typer's main has its own way with Ctrl-C
            return super().invoke(ctx)


app = typer.Typer(
    name="nnxp",
    cls=_Commands,
    help="One neural network, written once, on NumPy or on CuPy.",
    epilog="Exit codes: 0 all went well, 1 what was asked for failed, 2 wrong usage.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,  # rich would double the time that --help takes
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _known_backends(names: str) -> str:
    """The names as they are; OptionError if one of them means no backend anywhere."""
    from nnxp.backend import NAMES, parsed

    for name in _listed(names):
        if name.lower() != "auto" and parsed(name) is None:
            raise OptionError(f"there is no backend {name!r}; {NAMES}")
    return names


def _import(names: list[str] | None) -> list[str] | None:
    """Import modules, from the current folder as well; what they define, a model may have."""
    for name in names or []:
        if (here := os.getcwd()) not in sys.path:
            sys.path.append(here)
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a module of somebody's does
            reason = f"{type(error).__name__}: {error}"
            fix = f"; --import {name[:-3]} names the module" if name.endswith(".py") else ""
            raise OptionError(f"--import {name}: it cannot be imported: {reason}{fix}") from error
    return names


_WHERE = 'Where to compute: "auto", "numpy", "cupy", "cuda:1", "sim"'
_NAMED = "What is named but cannot be used is an error."
AsJson = Annotated[bool, Option("--json", help="Print one JSON object and nothing else.")]
OnBackend = Annotated[
    str, Option("--backend", metavar="NAME", callback=_known_backends, help=f"{_WHERE}. {_NAMED}")
]
OnBackends = Annotated[
    str,
    Option(
        "--backend",
        metavar="NAMES",
        callback=_known_backends,
        help=f'{_WHERE}, or several devices, "cuda:0,cuda:1". {_NAMED}',
    ),
]
MemoryLimit = Annotated[
    str | None, Option(metavar="SIZE", help='Bytes for the rows at work, such as "256 MiB".')
]
Workers = Annotated[int | None, Option(metavar="N", min=1, help="Threads on the CPU.")]
Precision = Annotated[
    str | None,
    Option(metavar="NAME", help='"tf32": a GPU may round factors to ten bits for speed.'),
]
Header = Annotated[
    bool | None,
    Option(
        "--header/--no-header",
        help="Whether the first line of a text is names. Default: if it looks like names, or is "
        "0, 1, ... n-1; where in doubt, stderr tells.",
    ),
]
Delimiter = Annotated[
    str | None,
    Option(metavar="MARK", help='What stands between the fields of a text, such as ";" or "tab".'),
]
Columns = Annotated[
    str | None,
    Option(metavar="NAMES", help="The columns of a table to take, names or numbers from 0."),
]
Missing = Annotated[
    str | None,
    Option(
        metavar="NUMBER", help='What missing values are: "nan", or a number. Default: an error.'
    ),
]
RowShapes = Annotated[
    list[str] | None,
    Option(
        metavar="SIZES", help='The shape of one row, such as "784" or "28,28"; once for each input.'
    ),
]
Key = Annotated[str | None, Option(metavar="NAME", help="Which array of a .npz file.")]
Imports = Annotated[
    list[str] | None,
    Option(
        "--import",
        metavar="MODULE",
        callback=_import,
        help="Import this first: the module with a model's own layers. May be repeated.",
    ),
]
ROWS = ".npy, .npz, .csv, .tsv (.gz), .parquet, .arrow or .feather"
Model = Annotated[
    Path, Argument(help="A model, as nnxp.save writes it, or in ONNX.", metavar="MODEL")
]


def main() -> NoReturn:
    """The entry point of the command `nnxp`."""
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup, for one, ignores SIGHUP
            signal.signal(number, _end)
    try:
        app(prog_name="nnxp")
    finally:
        _discard_unwritten_output()
    raise AssertionError("typer ends the process")


def _discard_unwritten_output() -> None:
    """Python tries once more to write what could not be written, and would end with a code of its
    own and a traceback: it has nowhere to write then."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _version(wanted: bool) -> None:
    if wanted:
        from nnxp import __version__

        typer.echo(f"nnxp {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        Option(
            "--version", "-V", help="Print the version and end.", is_eager=True, callback=_version
        ),
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    rows: Annotated[
        int, Option(metavar="N", min=1, max=1 << 40, help="How many rows to predict.")
    ] = 1_000_000,
    backend: OnBackend = "auto",
    as_json: AsJson = False,
) -> None:
    """See it work: a trained network on many rows, checked and timed."""
    from nnxp.demo import run

    report = run(rows, backend, progress=True)
    _print(report, as_json)
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def train(
    data: Annotated[
        Path,
        Argument(
            metavar="DATA",
            help="A table that fits into memory: .csv, .tsv (.gz), .parquet, .arrow or .feather.",
        ),
    ],
    target: Annotated[
        str, Option(metavar="COLUMN", help="The column to predict, a name or a number from 0.")
    ],
    output: Annotated[
        Path,
        Option("--output", "-o", metavar="MODEL", help="Where the network goes, .safetensors."),
    ],
    task: Annotated[
        str,
        Option(
            metavar="NAME",
            help='"classes" or "numbers". Default: text and whole numbers of at most 20 values are '
            "classes.",
        ),
    ] = "auto",
    hidden: Annotated[str, Option(metavar="SIZES", help="Units of the hidden layers.")] = "128,64",
    epochs: Annotated[
        int,
        Option(
            metavar="N", min=1, help="At most; training ends when held-back rows get no better."
        ),
    ] = 100,
    seed: Annotated[
        int, Option(metavar="N", min=0, help="The same one gives the same network.")
    ] = 0,
    plot: Annotated[
        Path | None, Option(metavar="FILE", help="Draw the learning curve: .svg, .png or .pdf.")
    ] = None,
    backend: OnBackend = "auto",
    header: Header = None,
    delimiter: Delimiter = None,
    columns: Columns = None,
    missing: Missing = None,
    as_json: AsJson = False,
) -> None:
    """Train a network that predicts a column of a table.

    It predicts from the other columns, standardises them, knows their names and those of its
    classes, and is judged on a fifth of the rows, which it was not trained on. "nnxp predict
    MODEL TABLE" uses it.
    """
    from nnxp.backend import get_backend
    from nnxp.io.checkpoint import save
    from nnxp.training.table import train_on_table

    if output.suffix != ".safetensors":
        raise OptionError(f"{output}: a network goes to a file ending in .safetensors")
    _check_place(output)
    sizes = _listed(hidden)
    if not all(re.fullmatch("[1-9][0-9]{0,5}", size) for size in sizes):
        raise OptionError(f'--hidden {hidden!r} is not a list of sizes; "128,64" is')
    _check_picture(plot)
    home = get_backend(backend)
    start = perf_counter()
    model, report = train_on_table(
        data, target, reading=_reading(header, delimiter, columns, missing), task=task,
        hidden=tuple(map(int, sizes)), epochs=epochs, backend=home, seed=seed, progress=True,
    )  # fmt: skip
    seconds = perf_counter() - start
    save(model, output)
    if plot is not None:
        from nnxp.plots import learning_curve

        learning_curve(report.history).savefig(plot)
    if as_json:
        ran = {"backend": home.name, "device": home.device, "why": home.why}
        _print_json({"output": str(output), **report.to_dict(), "seconds": seconds, **ran})
    else:
        _say(str(report))
        _say(f"{typer.format_filename(output)}: written, in {seconds:.3g} s")
        _say(f"ran on {home.device}: {home.why}")


@app.command()
def predict(
    model: Model,
    rows: Annotated[
        Path,
        Argument(metavar="INPUT", help=f"The rows: {ROWS}. Only a .npz file must fit into memory."),
    ],
    output: Annotated[
        Path, Option("--output", "-o", help="Where the model's outputs go: as for INPUT.")
    ],
    backend: OnBackends = "auto",
    memory_limit: MemoryLimit = None,
    workers: Workers = None,
    precision: Precision = None,
    key: Key = None,
    header: Header = None,
    delimiter: Delimiter = None,
    columns: Columns = None,
    missing: Missing = None,
    imports: Imports = None,
    labels: Annotated[
        bool, Option("--labels", help="Write the class of each row's largest output instead.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """A model's output for every row of a file.

    OUTPUT is written beside its place and renamed at the end: it is whole, or it is not there. A
    table is read a batch of rows at a time, its columns in the order of the names that the model
    was trained with; what is written as a table has the names y0, y1, ..., or those of the model's
    classes. A model of several inputs takes them by their names from a .npz file; several outputs
    go to one.
    """
    from nnxp.engine import Engine
    from nnxp.io.onnx import load_model as load
    from nnxp.io.rows import ending, open_rows, read_inputs
    from nnxp.io.tables import Table

    ending(rows), ending(output)
    reading = _reading(header, delimiter, columns, missing)
    _check_not_read(output, model, rows)
    net = load(model)
    reading = _of_model(reading, net)
    engine = Engine(
        net, _listed(backend), memory_limit=memory_limit, workers=workers, precision=precision
    )
    start = perf_counter()
    several = net.required_inputs > 1
    x: Any = read_inputs(rows, net.input_names) if several else open_rows(rows, key, reading)
    if isinstance(x, dict) or (not isinstance(x, Table) and len(_answers(net, x)) > 1):
        if labels:
            raise OptionError("--labels are those of a model of one input and one output")
        shape, dtype = _arrays_through(engine, x, output)
    elif isinstance(x, Table):
        shape, dtype = _table_through(engine, x, output, labels)
    elif labels:
        shape, dtype = _labels_through(engine, x, output)
    else:
        shape, dtype = _array_through(engine, x, output)
    seconds = perf_counter() - start  # reading and writing included
    where = engine.backend
    if as_json:
        written = {"output": str(output), "rows": shape[0], "shape": shape, "dtype": dtype}
        ran = {"backend": where.name, "device": _names(engine), "why": where.why}
        _print_json({**written, "seconds": seconds, **ran})
    else:
        name = typer.format_filename(output)
        _say(f"{name}: {shape[0]:,} rows, {dtype} {shape}, in {seconds:.3g} s")
        _say(f"ran on {_names(engine)}: {where.why}")


def _answers(model: Layer, x: Any) -> tuple[Outline, ...]:
    """The shape and type of each output for these rows: an array, or a dict by name."""
    from nnxp.engine import float_type, inputs_of

    inputs = inputs_of(model, x)
    outlines: list[Any] = []
    for rows, dtype in zip(inputs, model.input_dtypes(len(inputs)), strict=True):
        if rows is not None and model.dtype is None and dtype.kind == "f":
            dtype = float_type(rows)
        outlines.append(None if rows is None else (rows.shape, dtype))
    return model.program(*outlines).outline(len(inputs[0]))


def _array_through(engine: Engine, x: HostArray, output: Path) -> tuple[Shape, str]:
    """All rows of an array through the model, into a file; the shape and type of what is there."""
    from nnxp.io.rows import Passing, written_rows

    ((shape, dtype),) = _answers(engine.model, x)
    with written_rows(output, shape, dtype, _output_names(engine.model, shape), _note) as out:
        dtype = out.dtype
        counting = _Counting(Passing(x, out))
        engine(counting, out, progress=True)
        nonfinite = counting.nonfinite
        del out, counting  # or Windows would not rename the file
    _note_nonfinite(nonfinite, shape[0])
    return shape, str(dtype)


def _arrays_through(engine: Engine, x: Any, output: Path) -> tuple[Shape, str]:
    """Rows of several inputs, or with several outputs, into a file; the first output's outline."""
    from nnxp._arrays import nonfinite_rows
    from nnxp.io.rows import ending, write_arrays, written_rows

    model, outlines = engine.model, _answers(engine.model, x)
    shape, dtype = outlines[0]
    names = getattr(model, "outputs", [f"y{i}" for i in range(len(outlines))])
    if len(outlines) > 1 and ending(output) != ".npz":
        raise OptionError(
            f"{output}: the model has {len(outlines)} outputs ({', '.join(names)}): they go to a "
            ".npz file, by their names"
        )
    results = engine(x, progress=True)
    if len(outlines) > 1:
        write_arrays(output, dict(zip(names, results, strict=True)), _note)
    else:
        with written_rows(output, shape, dtype, _output_names(model, shape), _note) as out:
            out[...] = results
            del out
    inputs = x.values() if isinstance(x, dict) else [x]
    _note_nonfinite(max(map(nonfinite_rows, inputs)), shape[0])
    return shape, str(dtype)


def _labels_through(engine: Engine, x: HostArray, output: Path) -> tuple[Shape, str]:
    """The labels of all rows of an array, into a file."""
    from nnxp.io.labels import Labels
    from nnxp.io.rows import APPENDED, Passing, appended_rows

    labels, passing = Labels(engine.model, x.shape), Passing(x)
    with appended_rows(output, (), labels.dtype, ["label"], _note) as append:
        for start in range(0, len(x), APPENDED):
            append(labels(engine(passing[start : start + APPENDED])))
    return (len(x),), str(labels.dtype)


def _table_through(engine: Engine, table: Table, output: Path, labelled: bool) -> tuple[Shape, str]:
    """All rows of a table through the model, batch by batch, into a file."""
    from nnxp._arrays import nonfinite_rows
    from nnxp._errors import RowsError
    from nnxp.io.labels import Labels
    from nnxp.io.rows import appended_rows

    batches = iter(table)
    first = next(batches, None)
    if first is None:
        raise RowsError("there are no rows to predict")
    (shape, dtype), *others = _answers(engine.model, first)
    if others:
        raise OptionError(
            f"the model has {1 + len(others)} outputs, and a table's rows go to one: give them as "
            "a .npy or .npz file, and a .npz file to write to"
        )
    names = _output_names(engine.model, shape)
    labels = Labels(engine.model, first.shape) if labelled else None
    if labels is not None:
        shape, dtype, names = shape[:1], labels.dtype, ["label"]
    count = nonfinite = 0
    with appended_rows(output, shape[1:], dtype, names, _note) as append, _progress(table) as tell:
        for batch in chain([first], batches):
            results = engine(batch)
            append(results if labels is None else labels(results))
            count += len(batch)
            nonfinite += nonfinite_rows(batch)
            tell()
    _note_nonfinite(nonfinite, count)
    return (count, *shape[1:]), "float32" if dtype.name == "bfloat16" else str(dtype)


@app.command()
def sweep(
    model: Model,
    rows: Annotated[
        list[Path], Argument(metavar="ROWS", help="The rows: .npy, .h5, .zarr or .parquet files.")
    ],
    output: Annotated[
        Path | None, Option("--output", "-o", metavar="FOLDER", help="The folder of the results.")
    ] = None,
    processes: Annotated[
        int | None, Option(metavar="N", min=1, help="Start so many worker processes here.")
    ] = None,
    dask: Annotated[
        str | None, Option(metavar="ADDRESS", help="Let the workers of this Dask scheduler do it.")
    ] = None,
    devices: Annotated[
        str,
        Option(
            metavar="NAMES",
            callback=_known_backends,
            help='Devices such as "cuda:0,cuda:1", one for each process.',
        ),
    ] = "",
    per_device: Annotated[int, Option(metavar="N", min=1, help="Processes on each device.")] = 1,
    threads: Annotated[
        int | None, Option(metavar="N", min=1, help="CPU threads of a process.")
    ] = None,
    block_rows: Annotated[int | None, Option(metavar="N", min=1, help="Rows of a block.")] = None,
    format: Annotated[str, Option(metavar="NAME", help='"npy", "parquet" or "zarr".')] = "npy",
    precision: Precision = None,
    key: Annotated[
        str | None, Option(metavar="NAME", help="Which array or columns of a file.")
    ] = None,
    restart: Annotated[
        bool, Option("--restart", help="Throw away another sweep's results in FOLDER.")
    ] = False,
    imports: Imports = None,
    as_json: AsJson = False,
) -> None:
    """Any number of rows into a folder; can be killed and goes on.

    The rows go block by block. Run again, it does what is missing or damaged. "nnxp sweep status
    FOLDER" shows how far it is, "nnxp sweep verify FOLDER" checks sums and counts, and judges rows
    of every block in float64.
    """
    from nnxp.cluster.command import run

    result = run(
        model, rows, output, dask, processes=processes, devices=_listed(devices),
        per_device=per_device, threads=threads, block_rows=block_rows, format=format,
        precision=precision, key=key, restart=restart, imports=imports or (),
    )  # fmt: skip
    _print(result, as_json)
    if not getattr(result, "ok", True):
        raise typer.Exit(1)


class _Counting:
    """Rows for an engine, that counts which of them hold NaN or infinity as they are read."""

    def __init__(self, x: Passing) -> None:
        self.shape, self.dtype, self.reads, self._x = x.shape, x.dtype, x.reads, x
        self.nonfinite, self._lock = 0, threading.Lock()
        self._last: dict[int, tuple[int, int]] = {}

    def __getitem__(self, rows: slice) -> HostArray:
        from nnxp._arrays import nonfinite_rows

        block = self._x[rows]
        count, thread = nonfinite_rows(block), threading.get_ident()
        with self._lock:
            start, before = self._last.get(thread, (-1, 0))
            again = start == rows.start  # and shorter: a device had no memory for the whole block
            self.nonfinite += count - (before if again else 0)
            self._last[thread] = rows.start, count
        return block


def _note_nonfinite(count: int, rows: int) -> None:
    if count:
        _note(f"{count:,} of {rows:,} rows hold NaN or infinity")


def _output_names(model: Layer, shape: Shape) -> list[str] | None:
    """The names of the model's classes, if it knows one for each column of its output."""
    classes = getattr(model, "classes", None)
    fits = classes is not None and len(shape) == 2 and len(classes) == shape[1]
    return [str(name) for name in classes] if classes is not None and fits else None


def _reading(
    header: bool | None, delimiter: str | None, columns: str | None, missing: str | None
) -> Reading:
    """The options for tables, as one."""
    from nnxp.io.tables import Reading

    try:
        number = None if missing is None else float(missing)
    except ValueError:
        raise OptionError(f'--missing is "nan" or a number, not {missing!r}') from None
    mark = {"tab": "\t", "\\t": "\t"}.get(delimiter or "", delimiter)
    names = next(csv.reader([columns], skipinitialspace=True)) if columns else ()
    return Reading(header, mark, tuple(names), number, say=_note)


def _of_model(reading: Reading, model: Layer | None) -> Reading:
    """The same, with the names by which the model knows its columns."""
    return replace(reading, names=getattr(model, "columns", None))


def _note(message: str) -> None:
    _say(f"nnxp: note: {message}", sys.stderr)


@contextmanager
def _progress(table: Table) -> Iterator[Callable[[], None]]:
    """What shows on a terminal how much of a table has been read."""
    if not (table.size and sys.stderr.isatty()):
        yield lambda: None
        return
    with typer.progressbar(length=table.size, file=sys.stderr, width=0) as bar:
        yield lambda: bar.update(table.passed - bar.pos)


@app.command()
def convert(
    model: Model,
    output: Annotated[
        Path, Argument(metavar="OUTPUT", help="The file to write, .safetensors or .onnx.")
    ],
    shape: RowShapes = None,
    imports: Imports = None,
    as_json: AsJson = False,
) -> None:
    """A model from ONNX to nnxp's own file, or the other way.

    A .safetensors file is read without the package onnx. An .onnx file needs the shape of a row,
    which is found out where the model takes only one.
    """
    from nnxp.io.checkpoint import save
    from nnxp.io.onnx import load_model as load
    from nnxp.io.onnx_export import save_onnx

    suffix = output.suffix.lower()
    if suffix not in (".safetensors", ".onnx"):
        raise OptionError(f"{output}: a model is written to a .safetensors or an .onnx file")
    _check_place(output)
    _check_not_read(output, model)
    if shape and suffix != ".onnx":
        raise OptionError(f"--shape is for an .onnx file; {output} holds a model for any rows")
    net = load(model)
    if suffix == ".onnx":
        save_onnx(net, output, _rows_of(net, shape))
    else:
        save(net, output)
    parameters, size = sum(value.size for value in net.parameters().values()), output.stat().st_size
    if as_json:
        _print_json({"output": str(output), "parameters": parameters, "bytes": size})
    else:
        name = typer.format_filename(output)
        _say(f"{name}: {net!r:.200}, {parameters:,} parameters, {size:,} bytes")


@app.command()
def summary(
    model: Model,
    rows: Annotated[int, Option(metavar="N", min=1, help="How many rows.")] = 1,
    shape: RowShapes = None,
    plot: Annotated[
        Path | None, Option(metavar="FILE", help="Draw the model's steps: .svg, .png or .pdf.")
    ] = None,
    backend: OnBackends = "auto",
    memory_limit: MemoryLimit = None,
    workers: Workers = None,
    imports: Imports = None,
    as_json: AsJson = False,
) -> None:
    """A model's layers, shapes, parameters and costs.

    Says too how so many rows would be cut. The shape of a row is found out where the model takes
    only one.
    """
    from nnxp.engine import Engine
    from nnxp.io.onnx import load_model as load

    _check_picture(plot)
    engine = Engine(load(model), _listed(backend), memory_limit=memory_limit, workers=workers)
    whole = [(rows, *row) for row in _rows_of(engine.model, shape)]
    totals, plan = engine.model.summary(*whole), engine.plan(*whole)
    if plot is not None:
        from nnxp.plots import program

        program(engine.model.program(*whole)).savefig(plot)
    if as_json:
        device = {"device": _names(engine), "working_set": plan.working_set}
        _print_json({**totals.to_dict(), "plan": {**asdict(plan), **device}})
    else:
        _say(str(totals))
        cut = f"{plan.rows:,} at a time on {plan.workers} workers"
        _say(f"{rows:,} rows on {_names(engine)}: {cut}")
        _say(f"{plan.working_set:,} bytes of rows at work")


def _check_picture(path: Path | None) -> None:
    """OptionError, before any work, where no picture can be drawn, or its name ends otherwise."""
    if path is None:
        return
    from nnxp.plots import endings

    if path.suffix not in endings():
        raise OptionError(f"--plot {path}: a picture ends in {', '.join(endings())}")
    _check_place(path)


def _check_not_read(output: Path, *sources: Path) -> None:
    for source in sources:
        if source.exists() and output.exists() and output.samefile(source):
            raise OptionError(f"{output}: the output would replace {source}, which is read")


def _check_place(path: Path) -> None:
    """OSError, before any work, where no file can be written."""
    from nnxp.io._atomic import mode_of

    mode_of(Path(os.path.realpath(path)))  # `resolve` raises no OSError for a circle of links


@app.command()
def doctor(backend: OnBackend = "auto", as_json: AsJson = False) -> None:
    """What decides where and how fast nnxp runs, and what is wrong.

    The exit code is 1 only if something that was asked for, by --backend, NNXP_BACKEND or
    NNXP_WORKERS, cannot be had.
    """
    from nnxp.doctor import diagnose

    report = diagnose(backend)
    _print(report, as_json)
    if report.broken:
        raise typer.Exit(1)


@app.command()
def verify(
    model: Annotated[
        Path | None,
        Argument(metavar="MODEL", help="A model to judge, as nnxp.save writes it, or in ONNX."),
    ] = None,
    rows: Annotated[Path | None, Argument(metavar="INPUT", help=f"Rows for it: {ROWS}.")] = None,
    backend: Annotated[
        str,
        Option(
            metavar="NAMES",
            callback=_known_backends,
            help="Where, such as numpy,cupy; default: wherever usable.",
        ),
    ] = "auto",
    require: Annotated[
        str,
        Option(
            metavar="NAMES",
            callback=_known_backends,
            help="Fail unless these can be used, such as cupy.",
        ),
    ] = "",
    receipt: Annotated[
        Path | None, Option(metavar="FILE", help="Write what ran where, with what result, as JSON.")
    ] = None,
    record_goldens: Annotated[
        Path | None,
        Option(metavar="FOLDER", help="Record what each backend answers, for other machines."),
    ] = None,
    key: Key = None,
    header: Header = None,
    delimiter: Delimiter = None,
    columns: Columns = None,
    missing: Missing = None,
    imports: Imports = None,
    as_json: AsJson = False,
) -> None:
    """Does every backend here agree with float64?

    Without MODEL and INPUT, every layer of the library is judged, in every type. Says too whether
    products of float32 numbers are in float32, or rounded to TF32.
    """
    from nnxp import verify as verifying
    from nnxp.io.onnx import load_model as load
    from nnxp.io.rows import read_inputs, read_rows

    net = load(model) if model else None
    reading = _of_model(_reading(header, delimiter, columns, missing), net)
    x: Any = None
    if rows and net and net.required_inputs > 1:
        x = read_inputs(rows, net.input_names)
    elif rows:
        x = read_rows(rows, key, reading)
    backends = [] if backend == "auto" else _listed(backend)
    report = verifying.verify(net, x, backends, _listed(require))
    if receipt:
        verifying.write_receipt(report, receipt)
    if record_goldens:
        verifying.record_goldens(report, record_goldens)
    _print(report, as_json)
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def bench(
    model: Annotated[
        Path | None,
        Argument(
            metavar="MODEL",
            help="A model, as nnxp.save writes it, or in ONNX; without it, the demo's.",
        ),
    ] = None,
    rows: Annotated[
        int | None, Option(metavar="N", min=1, help="How many rows go through it at once.")
    ] = None,
    rounds: Annotated[int, Option(metavar="N", min=1, help="How many turns everybody has.")] = 15,
    shape: RowShapes = None,
    imports: Imports = None,
    as_json: AsJson = False,
) -> None:
    """A model against its bare matrix products, on this CPU.

    Plain NumPy takes part, too. The bare products, without bias and activation, are the floor: what
    no way to compute the same network can do without. All are checked against float64, and then
    timed in turns.
    """
    from nnxp.demo import _HERE
    from nnxp.floor import against_floor
    from nnxp.io.onnx import load_model as load

    path = _HERE / "digits.safetensors" if model is None else model
    net = load(path)
    row, *others = _rows_of(net, shape)
    if others:
        raise OptionError(
            f"bench is for models of one input, but {path.name} takes {1 + len(others)}"
        )
    with _status() as say:
        report = against_floor(net, row, title=path.name, rows=rows, rounds=rounds, say=say)
    _print(report, as_json)
    if any(result.problem for result in report.results):
        raise typer.Exit(1)


@contextmanager
def _status() -> Iterator[Callable[[str], None]]:
    """What shows on a terminal how far it is, one line over the other."""
    if not sys.stderr.isatty():
        yield lambda line: None
        return

    def say(line: str) -> None:
        typer.echo(f"\r\x1b[K{line}", nl=False, err=True)

    try:
        yield say
    finally:
        say("")


def _listed(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _names(engine: Engine) -> str:
    return " and ".join(backend.device for backend in engine.backends)


def _parse_shape(text: str) -> Shape:
    sizes = [size.strip() for size in re.split("[,x]", text)]
    if not all(re.fullmatch(r"[1-9][0-9]{0,17}", size) for size in sizes):
        raise OptionError(f'--shape {text!r} is not the shape of a row; "784" and "28,28" are')
    return tuple(map(int, sizes))


def _rows_of(model: Layer, shapes: list[str] | None) -> list[Shape]:
    """The shape of a row of each input: those given, or that of the only one, if it is known."""
    if not shapes:
        try:
            return [model.row_shape()]
        except OptionError:
            names, several = model.input_names, model.required_inputs > 1
            of_inputs = f" of each of {', '.join(names)}, in this order" if several else ""
            raise OptionError(
                f"the model does not tell the shape of its rows{of_inputs}: give it with --shape"
            ) from None
    rows = [_parse_shape(shape) for shape in shapes]
    try:
        model.output_shape(*((1, *row) for row in rows))
    except ShapeError as error:
        raise OptionError(f"--shape {' --shape '.join(shapes)}: {error}") from None
    return rows


def _print(result: Any, as_json: bool) -> None:
    if as_json:
        _print_json(result.to_dict())
    else:
        _say(str(result))


def _print_json(values: dict[str, Any]) -> None:
    typer.echo(json.dumps(values, indent=2))


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """A polite request to end, so that what was being written is cleared away."""
    raise SystemExit(128 + number)
