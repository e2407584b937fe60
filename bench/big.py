"""What a memory limit is worth: two jobs that take more than it. python bench/big.py [DIR]

rows    2,000,000 x 784 float32 rows (6.3 GB) from one memory map to another under
        memory_limit="256 MiB", through 784-512-256-10.
model   a network of 1,073,790,976 parameters (4.3 GB), saved, loaded and run.

Each job runs in a process of its own, which reads its peak from the kernel: RssAnon, sampled every
5 ms, is the memory that is not pages of files; VmHWM, the most there ever was, counts those too.
Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from pathlib import Path

MIB = 1 << 20


def status(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


class Peak:
    """The most anonymous memory that this process has while the block runs."""

    def __enter__(self) -> Peak:
        self.bytes, self._over = 0, threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(0.005):
            self.bytes = max(self.bytes, status("RssAnon"))

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._watch.join()


def rows(folder: Path, count: int = 2_000_000) -> dict[str, object]:
    """Many rows, little memory."""
    import numpy as np

    import nnxp

    rng = np.random.default_rng(0)
    source = np.lib.format.open_memmap(folder / "x.npy", "w+", "float32", (count, 784))
    for start in range(0, count, 50_000):
        source[start : start + 50_000] = rng.random((min(50_000, count - start), 784), "float32")
    source.flush()
    del source
    x = np.load(folder / "x.npy", mmap_mode="r")
    out = np.lib.format.open_memmap(folder / "y.npy", "w+", "float32", (count, 10))
    net = nnxp.Sequential(
        nnxp.Dense(784, 512, "relu", rng=rng),
        nnxp.Dense(512, 256, "relu", rng=rng),
        nnxp.Dense(256, 10, "softmax", rng=rng),
    )
    engine = nnxp.Engine(net, "cpu", memory_limit="256 MiB")
    with Peak() as peak:
        start = time.perf_counter()
        engine(x, out)
        seconds = time.perf_counter() - start
    some = slice(None, None, max(1, count // 1000))
    return {
        "rows": count,
        "bytes": x.nbytes,
        "memory_limit": 256 * MIB,
        "working_set": engine.plan(x.shape).working_set,
        "peak_anonymous": peak.bytes,
        "peak_with_file_pages": status("VmHWM"),
        "seconds": seconds,
        "right": bool(np.allclose(out[some], net(x[some]), rtol=1e-4, atol=1e-6)),
    }


def save_model(folder: Path, width: int = 32768) -> dict[str, object]:
    """A large network into a file."""
    import nnxp

    net = nnxp.Sequential(nnxp.Dense(16384, width, "relu", rng=0), nnxp.Dense(width, 16384, rng=1))
    with Peak() as peak:
        start = time.perf_counter()
        nnxp.save(net, folder / "net.safetensors")
        seconds = time.perf_counter() - start
    size = (folder / "net.safetensors").stat().st_size
    return {
        "parameters": net.parameter_count,
        "file": size,
        "peak_anonymous": peak.bytes,
        "peak_over_file": peak.bytes / size,
        "seconds": seconds,
    }


def load_model(folder: Path) -> dict[str, object]:
    """The same network out of the file, and some rows through it."""
    import numpy as np

    import nnxp

    size = (folder / "net.safetensors").stat().st_size
    with Peak() as peak:
        start = time.perf_counter()
        net = nnxp.load(folder / "net.safetensors")
        loaded = time.perf_counter() - start
        x = np.random.default_rng(0).random((1024, 16384), "float32")
        y = nnxp.predict(net, x, "cpu")
        seconds = time.perf_counter() - start - loaded
    return {
        "parameters": net.parameter_count,
        "peak_anonymous": peak.bytes,
        "peak_over_file": peak.bytes / size,
        "load_seconds": loaded,
        "rows": len(x),
        "run_seconds": seconds,
        "finite": bool(np.isfinite(y).all()),
    }


JOBS = {"rows": rows, "save": save_model, "load": load_model}


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] in JOBS:
        print(json.dumps(JOBS[sys.argv[1]](Path(sys.argv[2]))))
        return
    import subprocess

    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        report = {}
        for job in JOBS:
            command = [sys.executable, __file__, job, folder]
            report[job] = json.loads(subprocess.run(command, check=True, stdout=-1).stdout)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
