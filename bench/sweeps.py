"""What Dask costs a sweep: 400,000 rows through 784-1024-1024-10, in turns with one process.

    python bench/sweeps.py [--rows 400000] [--rounds 3] [--workers 2]

Both read the same file and write the same bits. One process has all cores; of Dask's worker
processes each has its share. Wall time is what a person waits, CPU time what other work on the
machine does not stretch.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

import dask
import distributed
import numpy as np

import nnxp
from nnxp import cluster


def cpu_seconds(pids: list[int]) -> float:
    """What these processes have used of the CPU so far."""
    ticks = 0
    for pid in pids:
        ticks += sum(
            map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])
        )
    return ticks / os.sysconf("SC_CLK_TCK")


def timed(name: str, pids: list[int], **options) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), cpu_seconds(pids)
    report = cluster.sweep("net.safetensors", "rows.npy", name, restart=True, **options)
    times = time.perf_counter() - wall, cpu_seconds(pids) - cpu
    print(f"{name}: {times[0]:.2f} s, CPU {times[1]:.2f} s, overhead {report.overhead:.2f}")
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        sizes = (784, 1024, 1024, 10)
        layers = [
            nnxp.Dense(inputs, outputs, "softmax" if outputs == 10 else "relu", rng=inputs)
            for inputs, outputs in pairwise(sizes)
        ]
        nnxp.save(nnxp.Sequential(*layers), "net.safetensors")
        rng = np.random.default_rng(0)
        rows = np.lib.format.open_memmap("rows.npy", "w+", "float32", (options.rows, 784))
        for start in range(0, len(rows), 10_000):
            rows[start : start + 10_000] = rng.random((len(rows[start : start + 10_000]), 784))
        del rows
        with (
            dask.config.set({"distributed.worker.multiprocessing-method": "spawn"}),
            distributed.LocalCluster(
                n_workers=options.workers, threads_per_worker=1, dashboard_address=None
            ) as workers,
            workers.get_client() as client,
        ):
            pids = [os.getpid(), *client.run(os.getpid).values()]
            found = {"one process": [], "dask": []}
            for _ in range(options.rounds):
                found["one process"].append(timed("one", pids))
                found["dask"].append(timed("dask", pids, executor=client.get_executor(), threads=1))
        same = np.array_equal(np.asarray(cluster.open("one")), np.asarray(cluster.open("dask")))
        for what, place in (("wall time", 0), ("CPU time", 1)):
            one, many = (median(each[place] for each in times) for times in found.values())
            print(f"{what}: one process {one:.2f} s, Dask {many:.2f} s: {many / one:.3f} times")
        print("the same bits" if same else "DIFFERENT BITS")
        os.chdir("/")


if __name__ == "__main__":
    main()
