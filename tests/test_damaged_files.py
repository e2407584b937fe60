"""A small run of tests/damaged_files.py, and the recorded one of full size."""

from __future__ import annotations

import json

import pytest

damaged_files = pytest.importorskip("damaged_files", reason="onnx or pyarrow is not installed")


def test_a_damaged_file_is_refused_or_read():
    found = damaged_files.run(1600, seed=1, seconds=600)  # all of them on a slow machine, too
    assert found["failures"] == []
    assert found["files"] == 1600
    for name in (
        "sound.safetensors",
        "sound.onnx",
        "hostile.onnx",
        "sound.npy",
        "sound.csv",
        "sound.parquet",
    ):
        assert found["counts"][f"{name}, refused"] > 100
    assert found["slowest_seconds"][0] < 20
    assert found["mebibytes_more"] < 2048


def test_a_file_that_was_not_given_is_noticed(tmp_path):
    (tmp_path / "other").write_text("")
    with (
        pytest.raises(AssertionError, match="other"),
        damaged_files.touching_only({"x"}),
        open(tmp_path / "other"),
    ):
        pass


def test_another_error_would_be_counted(monkeypatch):
    monkeypatch.setattr(damaged_files, "REFUSED", (OSError,))
    found = damaged_files.run(80, seed=1, seconds=60)
    assert len(found["failures"]) > 40


def test_the_recorded_run_is_of_ten_thousand_without_one_failure():
    if not damaged_files.RESULT.exists():
        pytest.skip(f"{damaged_files.RESULT} is not part of a source distribution")
    found = json.loads(damaged_files.RESULT.read_text())
    assert found["files"] >= 10_000
    assert found["failures"] == []
    assert sum(n for name, n in found["counts"].items() if ".onnx" in name) >= 2000
    assert found["slowest_seconds"][0] < 20
    assert found["mebibytes_more"] < 2048
