"""Goldens: what GPUs have recorded agrees with float64 and with this machine; tampering is seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import nnxp
from conftest import draw
from nnxp.testing import goldens

RECORDED = sorted(Path(__file__).with_name("goldens").glob("*.safetensors"))


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_what_was_recorded_agrees_with_float64_and_with_this_machine(path):
    report = goldens.check(path)
    assert report.ok, f"{goldens.about(path)}\n{report}"


@pytest.fixture
def golden(tmp_path):
    path = tmp_path / "golden.safetensors"
    goldens.record(path, "sim")
    return path


def test_a_golden_says_where_it_was_made_and_covers_every_layer(golden):
    about = goldens.about(golden)
    assert (about["backend"], about["device"]) == ("sim", "sim:0")
    assert about["sources"] == goldens.source_hash()
    assert {"date", "nnxp", "numpy", "python", "hardware", "precision"} <= about.keys()
    assert golden.stat().st_size < 3000 * len(goldens.layer_examples())  # each in two types
    report = goldens.check(golden, ["numpy", "sim"])
    assert report.ok, str(report)
    assert report.largest < 3
    assert len(report.checks) == 2 * len(goldens.layer_examples()) * 3
    assert {each.backend for each in report.checks} == {"recorded sim:0", "cpu", "sim:0"}


@pytest.mark.parametrize("name", ["a.py", "kernels/a.cu", "kernels/a.cuh"])
def test_the_hash_of_the_sources_is_another_when_one_of_them_is(monkeypatch, tmp_path, name):
    monkeypatch.setattr(goldens, "PACKAGE", tmp_path)
    (tmp_path / "kernels").mkdir()
    hashes = {goldens.source_hash()}
    for text in ("1", "2"):
        (tmp_path / name).write_text(text)
        hashes.add(goldens.source_hash())
    assert len(hashes) == 3


def changed(path, change):
    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name).copy() for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    change(tensors)
    save_file(tensors, path, metadata=metadata)


def test_a_golden_of_a_model_of_one_s_own(tmp_path):
    net = nnxp.Sequential(nnxp.Dense(6, 4, "relu", rng=0), nnxp.Dense(4, 2, rng=1))
    path = tmp_path / "mine.safetensors"
    assert goldens.record(path, "numpy", [(net, draw((9, 6)))]) == 1
    assert goldens.check(path).ok

    def scale(tensors):
        tensors["0.p.layers.1.weight"] *= np.float32(1.001)

    changed(path, scale)
    assert not goldens.check(path).ok


@pytest.mark.parametrize("part", ["x", "y"])
def test_a_tampered_golden_is_caught(golden, part):
    def tamper(tensors):
        tensors[f"3.{part}"] *= np.float32(1 + 1e-3)

    changed(golden, tamper)
    report = goldens.check(golden)
    assert report.first_failure.name == "case 3"
    assert report.first_failure.backend == "recorded sim:0"


def test_an_output_of_another_type_is_caught(golden):
    def widen(tensors):
        tensors["3.y"] = tensors["3.y"].astype("float64")

    changed(golden, widen)
    assert "is float64, not float32" in goldens.check(golden).first_failure.problem


def test_what_is_no_golden_is_refused(golden, tmp_path):
    changed(golden, lambda tensors: tensors.pop("3.y"))
    with pytest.raises(nnxp.CheckpointError, match=r"the tensor '3\.y' is missing"):
        goldens.check(golden)
    nnxp.save(nnxp.Dense(2, 2, rng=0), tmp_path / "net.safetensors")
    with pytest.raises(nnxp.CheckpointError, match="not a golden of version 1"):
        goldens.check(tmp_path / "net.safetensors")
    (tmp_path / "noise").write_bytes(b"noise")
    with pytest.raises(nnxp.CheckpointError, match="noise cannot be loaded: it is text"):
        goldens.about(tmp_path / "noise")
