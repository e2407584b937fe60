"""The tests that run on a GPU, with the GPU required."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from gpu.here import ROOT, Figures, Here, Values, why_no_lt


def figures(here: Here) -> Figures:
    command = [sys.executable, "-m", "pytest", "-p", "nnxp_pytest", "-p", "no:cacheprovider"]
    command += [f"--nnxp-require={here.backend}", "-k", f"{here.backend} or nnxp_gpu"]
    command += ["-v", "-rfE", "--tb=short", "--durations=10", "--no-header", "--color=no"]
    command += ["--continue-on-collection-errors"]
    # No other plugins: this machine's may warn of things, and warnings are errors here.
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    failed, ran, last = [], {}, ""
    with subprocess.Popen(
        [*command, str(ROOT / "tests")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip("= \n") or last
            if line.startswith(("FAILED ", "ERROR ")):
                failed.append(line.strip())
            if match := re.match(r"nnxp: (\w+): (.*)", line):
                ran[match[1]] = match[2]
    code = process.returncode
    figures: Values = {"summary": last, **ran, "cuBLASLt": _lt_in_use(here)}
    if code != 0:
        figures["problem"] = f"pytest ended with {code}"
    yield "pytest", figures
    yield "failed", {"which": failed}


def _lt_in_use(here: Here) -> str:
    if not here.on_gpu:
        return "only on CUDA"
    return why_no_lt() or "in use"
