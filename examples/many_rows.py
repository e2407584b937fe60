"""More rows than fit into memory: from a file, through a network, into a file, within a limit.

    python examples/many_rows.py [FOLDER] [ROWS]

Takes as much memory for ten million rows as for ten thousand.
"""

import sys
import time
from pathlib import Path

import numpy as np

import nnxp


def made_up(path: Path, rows: int) -> None:
    """A file of so many rows, written a piece at a time."""
    out = np.lib.format.open_memmap(path, "w+", "uint8", (rows, 256))
    rng = np.random.default_rng(0)
    for start in range(0, rows, 10_000):
        part = out[start : start + 10_000]
        part[:] = rng.integers(0, 256, part.shape, dtype="uint8")


def main(folder: Path, rows: int) -> None:
    net = nnxp.Sequential(
        nnxp.Dense(256, 512, "relu", rng=0),
        nnxp.Dense(512, 8, rng=1),
    )
    made_up(folder / "rows.npy", rows)
    x = np.load(folder / "rows.npy", mmap_mode="r")  # nothing is read yet
    y = np.lib.format.open_memmap(folder / "answers.npy", "w+", "float32", (rows, 8))

    engine = nnxp.Engine(net, memory_limit="32 MiB")  # a GPU that works, else the CPU
    plan = engine.plan(x.shape)
    print("runs on", engine.backend)
    print(f"{plan.rows:,} rows together, {plan.working_set / 2**20:.1f} MiB at work")

    start = time.perf_counter()
    engine(x, out=y, progress=True)  # a bar, on a terminal
    seconds = time.perf_counter() - start
    print(f"{rows:,} rows in {seconds:.2f} s, {rows / seconds:,.0f} rows/s")

    some = slice(0, rows, max(1, rows // 100))
    assert np.allclose(y[some], net(x[some].astype("float32")), rtol=1e-3, atol=1e-2)


if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else Path.cwd()
    main(where, int(sys.argv[2]) if len(sys.argv) > 2 else 200_000)
