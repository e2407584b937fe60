"""The plan of a sweep: which model, which rows make which block, what is written. Never weights.

Blocks are fixed here and nowhere else, because how many rows meet in one product decides the last
bits: the same plan gives the same bits, whoever does which block, and when.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from nnxp._arrays import HostArray, Shape
from nnxp._errors import OptionError, RowsError
from nnxp.cluster.sources import Source
from nnxp.io._atomic import path_of, written_beside

VERSION = 1
BLOCK_BYTES = 32 << 20  # of rows, or of results: seconds of work, and little to lose
MULTIPLE = 1024  # rows; an engine's tiles come out even
FORMATS = ("npy", "parquet", "zarr")
NAME = "plan.json"


@dataclass(frozen=True)
class Plan:
    """What a sweep consists of, in a few hundred bytes.

    model: the model's file, and `model_sha256` its contents.
    sources: the files of rows, in order, all with rows of one shape and type.
    output, output_dtype: the shape of one row of the result, and its type in the files.
    block_rows: rows in a block, the last one aside. `len(plan)` is the number of blocks.
    precision: None or "tf32", as for an Engine. format: "npy", "parquet" or "zarr".
    folder: where the results go.
    """

    folder: str
    model: str
    model_sha256: str
    sources: tuple[Source, ...]
    output: Shape
    output_dtype: str
    block_rows: int
    precision: str | None = None
    format: str = "npy"

    @cached_property
    def rows(self) -> int:
        """The rows in all."""
        return sum(source.rows for source in self.sources)

    def __len__(self) -> int:
        return (self.rows + self.block_rows - 1) // self.block_rows

    def span(self, block: int) -> tuple[int, int]:
        """The first row of a block, and the one after its last."""
        if not 0 <= block < len(self):
            raise OptionError(f"there is no block {block}; this plan has {len(self):,}, from 0")
        return block * self.block_rows, min((block + 1) * self.block_rows, self.rows)

    def read(self, start: int, stop: int) -> HostArray:
        """The rows from start to stop, from whichever files they are in."""
        parts, first = [], 0
        for source in self.sources:
            begin, end = max(start - first, 0), min(stop - first, source.rows)
            if begin < end:
                parts.append(source.read(begin, end))
            first += source.rows
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def part(self, block: int) -> Path:
        """The file of a block's results; a chunk of Zarr's is called c, its block, and zeros."""
        chunk = ".".join(["c", str(block), *("0" for _ in self.output)])
        name = chunk if self.format == "zarr" else f"{block:08}.{self.format}"
        return Path(self.folder, "parts", name)

    def record(self, block: int) -> Path:
        """What says that a block is done: JSON, with the sha256 of its file."""
        return Path(self.folder, "records", f"{block:08}.json")

    @property
    def zarr(self) -> dict[str, Any]:
        """The results as an array of Zarr 3, whose chunks are the blocks: its zarr.json."""
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [self.rows, *self.output],
            "data_type": self.output_dtype,
            "chunk_grid": _named("regular", chunk_shape=[self.block_rows, *self.output]),
            "chunk_key_encoding": _named("default", separator="."),
            "codecs": [_named("bytes", endian="little")],
            "fill_value": 0,
            "attributes": {},
        }

    @property
    def identity(self) -> dict[str, Any]:
        """What results depend on: not where model, rows and folder lie."""
        plain = asdict(self) | {"sources": [source.identity for source in self.sources]}
        return {name: value for name, value in plain.items() if name not in ("folder", "model")}

    @cached_property
    def digest(self) -> str:
        """The sha256 of all that results depend on."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def differences(self, other: Plan) -> list[str]:
        """In words, what results depend on and is another here."""
        mine, others = json.loads(json.dumps([self.identity, other.identity]))
        words = {"model_sha256": "the model (sha256)", "block_rows": "the rows of a block"}
        return [
            f"{words.get(name, name)} was {_short(mine[name])} and is {_short(others[name])}"
            for name in mine if mine[name] != others[name]
        ]  # fmt: skip

    def save(self) -> None:
        """Write it to its folder."""
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        with written_beside(Path(self.folder, NAME), lambda message: None) as beside:
            plain = {name: value for name, value in asdict(self).items() if name != "folder"}
            beside.write_text(json.dumps({"version": VERSION, **plain}, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Plan:
        """The plan in a folder. OptionError if there is none, RowsError if it is not whole."""
        path = Path(path_of(folder), NAME)
        try:
            plain = json.loads(path.read_text())
        except FileNotFoundError:
            raise OptionError(f"{folder} is no folder of a sweep: it holds no {NAME}") from None
        except ValueError as error:
            raise RowsError(f"{path} is not whole: {error}") from None
        version = plain.pop("version", None) if isinstance(plain, dict) else None
        if version != VERSION:
            raise RowsError(f"{path} has version {version}; this nnxp reads {VERSION}")
        try:
            sources = tuple(
                Source(**{**source, "row": tuple(source["row"])}) for source in plain.pop("sources")
            )
            plan = cls(folder=os.path.abspath(folder), sources=sources, **plain)
            return replace(plan, output=tuple(plan.output))
        except (TypeError, KeyError) as error:
            raise RowsError(f"{path} is not the plan of a sweep: {error}") from None


def _named(name: str, **configuration: Any) -> dict[str, Any]:
    return {"name": name, "configuration": configuration}


def _short(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        named = [f"{source['path']} ({source['rows']:,} rows, {source['bytes']:,} bytes, "
                 f"changed {source['changed']})" for source in value]  # fmt: skip
        return ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")
    return str(value)


def rows_per_block(sources: tuple[Source, ...], output: Shape, itemsize: int) -> int:
    """How many rows to do together, if nobody says: whole chunks of the file, some 32 MiB."""
    width = max(
        prod(sources[0].row) * np.dtype(sources[0].dtype).itemsize, prod(output) * itemsize, 1
    )
    rows, chunk = max(1, BLOCK_BYTES // width), max(source.chunk for source in sources)
    multiple = chunk if 1 < chunk <= 8 * rows else MULTIPLE
    return max(1, rows // multiple) * multiple if rows >= MULTIPLE or multiple == chunk else rows


def read_anew(sources: tuple[Source, ...], block_rows: int) -> float:
    """How many rows are read for one, because blocks end within the chunks of a file."""
    rows, first = sum(source.rows for source in sources), 0
    starts, read = np.arange(0, rows, block_rows), 0
    for source in sources:
        begin = np.clip(starts - first, 0, source.rows)
        end = np.clip(starts + block_rows - first, 0, source.rows)
        begin, end = begin[end > begin], end[end > begin]
        whole = -(-end // source.chunk) * source.chunk
        read += int((np.minimum(whole, source.rows) - begin // source.chunk * source.chunk).sum())
        first += source.rows
    return read / rows


def sha256(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
