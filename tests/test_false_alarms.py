"""A small run of tests/false_alarms.py, which takes minutes at its full size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import false_alarms
from nnxp.testing import LIMIT


def test_no_correct_comparison_is_called_wrong():
    found = false_alarms.run("numpy", 500, seed=1)
    assert found["failures"] == []
    assert found["comparisons"] >= 500
    assert 0.5 < found["largest"] < LIMIT / 2


@pytest.mark.parametrize("core", ["Prescott", "Haswell"])
def test_nor_with_other_blas_kernels(core):
    command = [sys.executable, false_alarms.__file__, "--way=numpy", "--comparisons=200"]
    ran = subprocess.run(
        command, env={"OPENBLAS_CORETYPE": core}, capture_output=True, text=True, check=True
    )
    found = json.loads(ran.stdout)
    assert found["failures"] == []
    assert found["largest"] < LIMIT / 2


def test_a_fault_would_be_counted(monkeypatch):
    right = false_alarms.compare

    def off_by_a_little(name, what, backend, actual, value, error):
        return right(name, what, backend, actual * (1 + 1e-3), value, error)

    monkeypatch.setattr(false_alarms, "compare", off_by_a_little)
    found = false_alarms.run("numpy", 50, seed=1)
    assert len(found["failures"]) > 5
    assert found["largest"] > LIMIT


def test_the_recorded_run_is_of_ten_thousand_without_one_failure():
    path = Path(false_alarms.RESULT)
    if not path.exists():
        pytest.skip(f"{path} is not part of a source distribution")
    found = json.loads(path.read_text())
    assert found["comparisons"] >= 10_000
    assert found["failed"] == 0
    assert found["largest"] < LIMIT
