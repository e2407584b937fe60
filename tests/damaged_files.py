"""Damaged files, by the thousand: each is refused by an error that is documented, or read.

    python tests/damaged_files.py [--files 10000] [--seed 0] [--seconds 600]

makes one sound file of each kind that nnxp reads (models, ONNX models, rows), cuts it short, flips
its bits, overwrites, doubles and removes parts of it, and reads and uses what is left; and ONNX
models that are whole, but made to do harm (hostile_onnx.py). Prints and records in
bench/results/damaged_files.json how many were refused and how many read, how long the slowest took,
and how much memory was taken. Exit code 1 if any ended in another error, or made nnxp open a file
that it was not given; a file that takes a minute ends the run with a traceback.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet

import hostile_onnx
import nnxp
from nnxp.io.rows import read_rows
from nnxp.program.recording import costs
from nnxp.testing.goldens import source_hash

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

RESULT = Path(__file__).parents[1] / "bench/results/damaged_files.json"
ROWS = np.random.default_rng(0).normal(size=(40, 3)).astype("float32")
ROWS_IN = (
    "sound.npy",
    "sound.npz",
    "deflated.npz",
    "sound.csv",
    "sound.parquet",
    "sound.feather",
)
REFUSED = nnxp.NnxpError, OSError, MemoryError  # what the functions that read promise


def used(model: nnxp.Layer) -> None:
    """Call a model that may be any, with rows of the first shape that it says it takes."""
    with np.errstate(all="ignore"):
        model(ROWS)


def used_if_small(model: nnxp.Layer) -> None:
    """Write a model out for such rows, and call it unless that takes much memory, as it says."""
    cost = costs(model.program(ROWS[:1].shape))
    if len(ROWS) * cost.row_bytes + cost.fixed_bytes < 1 << 26:
        used(model)


@contextmanager
def touching_only(allowed: set[str]) -> Iterator[None]:
    """AssertionError if anything else is opened within, but for modules of Python's, and for what
    lists the libraries that this process has loaded."""
    global _opened
    _opened = found = []
    try:
        yield
    finally:
        _opened = None
    loaded = ".py", ".pyc", ".so", "/proc/self/maps"
    others = {str(each) for each in found if not str(each).endswith(loaded)}
    assert others <= allowed, f"opened {others - allowed}"


_opened: list[object] | None = None


def _watch(event: str, args: tuple[object, ...]) -> None:
    if event == "open" and _opened is not None:
        _opened.append(args[0])


sys.addaudithook(_watch)


def peak() -> int:
    """MiB of memory that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10 if resource else 0


def kinds(folder: Path) -> dict[str, Callable[[Path], object]]:
    """One sound file of each kind in a folder, named by its ending, and what reads it."""
    net = nnxp.Sequential(
        nnxp.Dense(3, 4, "relu", rng=0), nnxp.BatchNorm(4), nnxp.Dense(4, 2, "softmax", rng=1)
    )
    nnxp.save(net, folder / "sound.safetensors")
    nnxp.save_onnx(net, folder / "sound.onnx")
    (folder / "hostile.onnx").write_bytes(hostile_onnx.sound().SerializeToString())
    (folder / "beside.bin").write_bytes(bytes(64))
    (folder / "link.bin").symlink_to("/etc/hostname")
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe")
    np.save(folder / "sound.npy", ROWS)
    np.savez(folder / "sound.npz", ROWS)
    with open(folder / "deflated.npz", "wb") as file:
        np.savez_compressed(file, ROWS)
    lines = "a,b,c\n" + "\n".join(",".join(f"{each:.6g}" for each in row) for row in ROWS) + "\n"
    (folder / "sound.csv").write_text(lines)
    table = pa.table({name: ROWS[:, i] for i, name in enumerate("abc")})
    pa.parquet.write_table(table, folder / "sound.parquet")
    pa.feather.write_feather(table, folder / "sound.feather")
    may_read = {str(folder / "damaged-hostile.onnx"), str(folder / "beside.bin")}

    def read_hostile(path: Path) -> None:
        with touching_only(may_read | {str(path)}):
            used_if_small(nnxp.load_onnx(path))

    return {
        "sound.safetensors": lambda path: used(nnxp.load(path)),
        "hostile.onnx": read_hostile,
        "sound.onnx": lambda path: used(nnxp.load_onnx(path)),
        **dict.fromkeys(ROWS_IN, read_rows),
    }


def damaged(rng: np.random.Generator, whole: bytes) -> bytes:
    """The bytes of a file with one to three faults."""
    data = bytearray(whole)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(data) or 1))
        many = int(rng.integers(1, 17))
        match rng.integers(6):
            case 0:
                del data[at:]
            case 1 if data:
                data[at] ^= 1 << int(rng.integers(8))
            case 2:
                data[at : at + many] = rng.bytes(many)
            case 3:
                data[at:at] = data[at : at + many]
            case 4:
                del data[at : at + many]
            case 5:  # a number where a number may stand: sizes, places, counts
                data[at : at + 8] = int(rng.choice([0, 1, 2**31, 2**63 - 1])).to_bytes(8, "little")
    return bytes(data)


def run(files: int, seed: int, seconds: float) -> dict[str, object]:
    """Counts by kind of file, and what failed: the file's number, its error and where it arose."""
    rng, counts, failures = np.random.default_rng(seed), Counter[str](), []
    start, slowest, before = time.monotonic(), (0.0, ""), 0
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries warn of what they read; errors are what counts
        folder = Path(name)
        readers = kinds(folder)
        sound = {each: (folder / each).read_bytes() for each in readers}
        for path, read in readers.items():
            read(folder / path)
        before = peak()
        for i in range(files):
            if time.monotonic() - start > seconds:
                break
            name = list(readers)[i % len(readers)]
            path = folder / f"damaged-{name}"
            harm = hostile_onnx.hostile if name.startswith("hostile") else damaged
            path.write_bytes(harm(rng, sound[name]))
            faulthandler.dump_traceback_later(60, exit=True, file=sys.__stderr__)
            began = time.process_time()
            try:
                readers[name](path)
                counts[f"{name}, read"] += 1
            except REFUSED:
                counts[f"{name}, refused"] += 1
            except Exception as error:
                counts[f"{name}, failed"] += 1
                where = traceback.extract_tb(error.__traceback__)[-1]
                failures.append(f"{i}: {name}: {error!r} at {where.filename}:{where.lineno}")
            slowest = max(slowest, (round(time.process_time() - began, 2), f"{i}: {name}"))
        faulthandler.cancel_dump_traceback_later()
    return {
        "files": sum(counts.values()), "failures": failures, "counts": dict(counts),
        "slowest_seconds": slowest, "mebibytes_more": peak() - before,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=600)
    options = parser.parse_args()
    found = run(**vars(options))
    for name, count in sorted(found["counts"].items()):
        print(f"{count:6,} {name}")
    seconds, which = found["slowest_seconds"]
    print(f"{seconds:6.2f} s of CPU time for the slowest, {which}")
    print(f"{found['mebibytes_more']:6,} MiB more than for the sound ones")
    print(*found["failures"], sep="\n")
    result = {"date": datetime.now(UTC).date().isoformat(), "sources": source_hash()}
    RESULT.write_text(json.dumps(result | vars(options) | found, indent=1) + "\n")
    return bool(found["failures"])


if __name__ == "__main__":
    sys.exit(main())
