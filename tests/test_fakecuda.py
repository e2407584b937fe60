"""The tests in fakecuda/, where CuPy runs over a pretended CUDA, in a process of their own."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("cupy", reason="NOT CHECKED: CuPy is not installed, which runs over it")
from test_cuda_sources import instances, libraries  # noqa: F401

HERE = Path(__file__).parent


@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="NOT CHECKED: the jumps into the pretended CUDA are those of Linux on x86-64",
)
@pytest.mark.skipif(shutil.which("nm") is None, reason="NOT CHECKED: nm, of binutils, is missing")
def test_cupy_over_a_pretended_cuda(libraries, request):  # noqa: F811
    """With the kernels as they were compiled for the host by the tests of their sources."""
    built = {file: (library._name, instances()[file]) for file, library in libraries.items()}
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {
        "NNXP_HOST_KERNELS": json.dumps(built),
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "fakecuda.plugin"]
    run = subprocess.run(
        [*command, "-p", "nnxp_pytest", str(HERE / "fakecuda")],
        cwd=request.config.rootpath,
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-6000:]
