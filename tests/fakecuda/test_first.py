"""CuPy starts on the pretended device, computes there, and finds its rules."""

from __future__ import annotations

import cupy
import numpy as np
import pytest

import nnxp
from conftest import draw
from fakecuda.test_engine import check, network, put


def test_arrays_go_there_and_back_and_are_added(gpu):
    x = draw((3, 4))
    there = cupy.empty((3, 4), "float32")
    there.set(x)
    np.testing.assert_array_equal((there + there).get(), 2 * x)


def test_the_probe_finds_a_device_that_computes(gpu):
    assert nnxp.available_backends()["cupy"].ok


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_engine_answers_few_rows_and_many_from_the_host_and_on_the_device(gpu, dtype):
    net, x = network(dtype), draw((220, 16), dtype)
    engine = nnxp.Engine(net, "cuda")
    for rows in (x, x[:5], x[:5], x[:5]):
        check(engine(rows), net, rows)
        check(engine(put(rows)), net, rows)
    assert any(kind.startswith("graph's") for kind, _ in gpu.done)


def test_a_stream_that_waits_for_nothing_is_late(gpu):
    """As late as possible: what one stream writes, another reads only if the two are ordered."""
    x, one = draw((3, 4)), cupy.cuda.Stream(non_blocking=True)
    there = cupy.zeros((3, 4), "float32")
    gpu.finish()
    with one:
        there.set(x)
    seen = there.get()
    np.testing.assert_array_equal(seen, 0 * x if gpu.lazy else x)
    cupy.cuda.get_current_stream().wait_event(one.record())
    np.testing.assert_array_equal(there.get(), x)


def test_memory_given_back_is_nan_and_a_pool_that_is_dropped_full_is_lost(gpu):
    pool = cupy.cuda.MemoryPool()
    with cupy.cuda.using_allocator(pool.malloc):
        x = cupy.zeros(128, "float32")
    alias = cupy.ndarray(128, "f4", cupy.cuda.MemoryPointer(
        cupy.cuda.UnownedMemory(x.data.ptr, 512, None, 0), 0
    ))  # fmt: skip
    del x
    assert np.isnan(alias.get()).all()
    held = len(gpu.memory[0])
    del pool
    assert len(gpu.memory[0]) == held  # CuPy never gives it back
    start = next(iter(gpu.memory[0]._blocks))
    gpu.give_back(start)


BROKEN = {
    "something was written behind an array": lambda x: cupy.cuda.runtime.memsetAsync(
        x.data.ptr, 0, 16, cupy.cuda.get_current_stream().ptr
    ),
    "are no memory of device 0": lambda x: cupy.cuda.runtime.memsetAsync(
        x.data.ptr, 0, 1 << 20, cupy.cuda.get_current_stream().ptr
    ),
    "belongs to no array any more": lambda x: (
        cupy.ndarray(
            3, "f4", cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(1 << 12, 12, None, 0), 0)
        )
        + x
    ),
}


@pytest.mark.parametrize("said", BROKEN)
def test_what_breaks_a_rule_is_seen(gpu, said):
    x = cupy.zeros(3, "float32")
    gpu.finish()
    BROKEN[said](x)
    del x
    gpu.finish()
    assert any(said in each for each in gpu.broken)
    gpu.broken.clear()
