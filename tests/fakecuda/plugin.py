"""Starts the pretended device before anything else asks for CUDA, the conftest of the tests too."""

from __future__ import annotations

import gc
import os
import sys
import tempfile

os.environ["CUPY_ACCELERATORS"] = ""  # CUB brings a CUDA runtime of its own
os.environ["CUDA_PATH"] = tempfile.gettempdir()  # nothing is compiled

import cuda.pathfinder
import cupy
import pytest
from cupy.cuda import compiler, function

from fakecuda import kernels, runtime
from fakecuda.machine import machine


def _compiled(source, *args, name_expressions=None, **options):
    """A module whose binary is its source."""
    module = function.Module()
    module.load(source.encode() + b"\0")
    module._set_mapping({name: name for name in name_expressions or ()})
    return module


def multiplied(x, y, out=None):
    """cupy.matmul, for which CuPy would load cuBLAS."""
    if out is None:
        out = cupy.empty((*x.shape[:-1], y.shape[-1]), x.dtype)
    outlines = [(each.dtype, each.data.ptr, each.shape, each.strides) for each in (out, x, y)]

    def work():
        into, a, b = (kernels.view(*each) for each in outlines)
        into[...] = a.astype("f8") @ b.astype("f8")

    machine.give(cupy.cuda.get_current_stream().ptr, "cuBLAS", work)
    return out


cuda.pathfinder.find_nvidia_header_directory = lambda name: tempfile.gettempdir()
compiler._compile_module_with_cache = _compiled
cupy.matmul = multiplied
runtime.redirect()


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # every test collects what it leaves, and none is to look at all that is imported


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(exitstatus):
    _status.append(int(exitstatus))


@pytest.hookimpl(trylast=True)
def pytest_unconfigure():
    """At once: what CuPy gives back while Python ends, there is nobody left to take."""
    for each in (sys.stdout, sys.stderr):
        each.flush()
    os._exit(_status[-1] if _status else 4)


_status = []
