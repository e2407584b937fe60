"""The pretended device as a fixture; and no tests at all where it was not started."""

from __future__ import annotations

import copy
import ctypes
import gc
import json
import os
import sys
import threading
from functools import cache
from pathlib import Path

import pytest

if "fakecuda.plugin" not in sys.modules:
    collect_ignore_glob = ["test_*.py"]
else:
    import cupy

    from fakecuda import kernels
    from fakecuda.machine import machine
    from nnxp.backend import _device
    from nnxp.kernels.cuda import _compiled, cudnn
    from nnxp.kernels.cuda.lt import bindings, call, plans, stacks
    from test_cuda_sources import built_alone
    from test_lt import STREAM, Lt

    class LaterLt(Lt):
        """cuBLASLt, which is told now, and computes when its turn comes.

        `told` is called with the stream and the workspace of each product.
        """

        told = None

        def matmul(self, *told):
            stream = told[-1]
            machine.rule(stream == cupy.cuda.get_current_stream().ptr, "a product elsewhere")
            for at in (told[3], told[5], told[8], *([told[13]] if told[14] else [])):
                machine.alive(at)
            if self.told is not None:
                self.told(stream, told[13])
            then, algorithm = copy.copy(self), (ctypes.c_uint64 * 8)()
            ctypes.memmove(algorithm, told[12], 64)
            then.things = {i: self._as_it_is(i) for i in told if i in self.things}

            def work():
                Lt.matmul(then, *told[:12], ctypes.addressof(algorithm), *told[13:15], STREAM)

            with machine.lock:
                machine.give(stream, "product", work)

        def _as_it_is(self, number):
            thing = copy.copy(self.things[number])
            if thing.kind == "product":
                thing.settings = dict(thing.settings)
            return thing

    class Watch(cupy.cuda.memory_hook.MemoryHook):
        """What CuPy's pools hand out and take back is NaN, in the order of its stream.

        They round sizes up to 512 bytes; what is beyond an array is to stay as it was.
        """

        name = "watch"

        def malloc_postprocess(self, *, device_id, size, mem_size, mem_ptr, pmem_id):
            if mem_ptr:
                stream = cupy.cuda.get_current_stream().ptr
                with machine.lock:
                    machine.handed_out(mem_ptr, size, stream)
                    self._give(stream, lambda: ctypes.memset(mem_ptr, 0xFF, mem_size), mem_ptr)

        def free_preprocess(self, *, device_id, mem_size, mem_ptr, pmem_id):
            def ended():
                beyond = ctypes.string_at(mem_ptr + size, mem_size - size)
                machine.rule(not beyond.strip(b"\xff"), "something was written behind an array")
                ctypes.memset(mem_ptr, 0xFF, mem_size)

            with machine.lock:
                size, stream = machine.lives.pop(mem_ptr, (mem_size, None))
                if stream == 0 or stream in machine.streams:
                    self._give(stream, ended, mem_ptr)

        def _give(self, stream, work, at):
            before, machine.device = machine.device, machine.device_of(at)
            machine.give(stream, "poison", work)
            machine.device = before

    @pytest.fixture(scope="session")
    def host_build():
        """nnxp's kernels, compiled for the host: tests/test_fakecuda.py says where they lie."""
        built = json.loads(os.environ["NNXP_HOST_KERNELS"])
        for file, (library, names) in built.items():
            kernels.ours[_compiled.source(file)] = ctypes.CDLL(library), names
        folder = Path(built["rows.cu"][0]).parent
        kernels.build = cache(lambda *instance: built_alone(*instance, folder))

    @pytest.fixture(params=[False, True], ids=["at once", "as late as possible"])
    def gpu(request, host_build, monkeypatch):
        """The device that nnxp finds as cuda:0, with cuBLASLt, small blocks, and nothing known."""
        pool = cupy.get_default_memory_pool()
        machine.finish()
        pool.free_all_blocks()  # what the probe left
        machine.restart(lazy=request.param)
        machine.lt = lt = LaterLt(machine)
        monkeypatch.setattr(bindings, "handles", {})
        monkeypatch.setattr(call, "plans", plans.Lately(call.MOST_PLANS))
        monkeypatch.setattr(stacks, "plans", plans.Lately(call.MOST_PLANS))
        choices = plans.Lately(plans.MOST_CHOICES)
        for module in (plans, stacks):
            monkeypatch.setattr(module, "choices", choices)
        monkeypatch.setattr(bindings, "library", lambda: (lt, None))
        monkeypatch.setattr(cudnn, "library", lambda: (None, "it is not there"))
        monkeypatch.setattr(_device, "BLOCK_ROWS", (64, 64))
        monkeypatch.setattr(plans, "PAD_FROM_ROWS", 64)
        monkeypatch.setattr(cupy, "matmul", lambda *_, **__: machine.rule(False, "cuBLAS"))
        before = [len(each) for each in machine.memory]  # of a test that failed
        machine.watched = threading.get_ident()
        with Watch():
            yield machine
            machine.finish()
            gc.collect()
            pool.free_all_blocks()
        machine.watched = None
        assert machine.broken == []
        assert [len(each) for each in machine.memory] <= before, "memory that nobody gives back"
