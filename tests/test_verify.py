"""`nnxp verify`: it checks what it says, fails when it must, and leaves a receipt."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import nnxp
from conftest import draw
from nnxp import kernels
from nnxp.cli import app
from nnxp.layers import MODULES
from nnxp.testing.goldens import layer_examples, source_hash
from nnxp.verify import newest_receipt, verify

ROOT = Path(__file__).parents[1]
NO_GPU = pytest.mark.skipif(nnxp.available_backends()["cupy"].ok, reason="a GPU is usable here")


def nnxp_verify(*args):
    return CliRunner().invoke(app, ["verify", *map(str, args)])


@pytest.fixture
def tf32():
    """Products on the simulated device round their inputs to TF32, as a GPU may."""

    def rounded(x):
        bits = x.get().view("uint32") + np.uint32(0x1000) & np.uint32(0xFFFFE000)
        return nnxp.sim.asarray(bits.view("float32"))

    @kernels.matmul.on("sim")
    def matmul(x, weight):
        return nnxp.sim.matmul(rounded(x), rounded(weight))

    yield
    del kernels.matmul._fused["sim"]
    kernels.matmul._body.clear()


def test_the_library_s_own_checks_pass_here_and_cover_every_layer_in_every_type():
    verification = verify(backends=["numpy", "sim"])
    assert verification.ok, str(verification)
    for report in verification.reports:
        assert report.checks > 4 * len(layer_examples())
        assert report.largest < 3
        assert not report.tf32
    assert "float32 is float32" in str(verification)
    assert {layer for layer, _ in layer_examples() if type(layer) is nnxp.Dense}
    assert {type(layer) for layer, _ in layer_examples()} == {
        getattr(nnxp, name) for name in MODULES
    } - {nnxp.Add, nnxp.Bilinear, nnxp.Concatenate, nnxp.Embedding, nnxp.LSTMCell}  # ids, several


def test_tf32_is_seen_and_said(tf32):
    verification = verify(backends=["sim"])
    assert verification.reports[0].tf32
    assert verification.reports[0].product > 100
    assert "TF32 IS ON" in str(verification)
    assert not verification.ok


def test_a_model_is_judged_on_given_rows(tmp_path):
    nnxp.save(nnxp.Dense(5, 3, "relu", rng=0), tmp_path / "net.safetensors")
    np.save(tmp_path / "x.npy", draw((2500, 5)))
    done = nnxp_verify(tmp_path / "net.safetensors", tmp_path / "x.npy", "--backend", "numpy,sim")
    assert done.exit_code == 0, done.output
    assert "Dense(5, 3, relu) on 834 of 2,500 rows" in done.stdout
    assert nnxp_verify(tmp_path / "net.safetensors").exit_code == 2


def test_a_disagreement_is_named_and_ends_with_1(monkeypatch, tmp_path):
    nnxp.save(nnxp.Sequential(nnxp.Dense(5, 3, rng=0), nnxp.LayerNorm(3)), tmp_path / "net.st")
    np.save(tmp_path / "x.npy", draw((20, 5)))
    right = nnxp.sim.sqrt
    monkeypatch.setattr(nnxp.sim, "sqrt", lambda x, out=None: right(x * 1.01), raising=False)
    done = nnxp_verify(tmp_path / "net.st", tmp_path / "x.npy", "--backend", "numpy,sim", "--json")
    assert done.exit_code == 1
    said = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert said["ok"] is False
    assert [each["failed"] > 0 for each in said["backends"]] == [False, True]
    assert said["failures"][0]["name"] == "layers.1"


@NO_GPU
def test_a_required_backend_that_is_missing_ends_with_1():
    done = nnxp_verify("--backend", "numpy", "--require", "cupy")
    assert done.exit_code == 1
    assert "it is required" in done.stdout
    assert "NOT VERIFIED" in done.stdout
    assert nnxp_verify("--backend", "cupy").exit_code == 1


def test_a_receipt_says_what_ran_where_with_what_result(tmp_path):
    path = tmp_path / "here.json"
    assert newest_receipt(tmp_path, "numpy") is None
    done = nnxp_verify("--backend", "numpy", "--receipt", path, "--record-goldens", tmp_path)
    assert done.exit_code == 0, done.output
    receipt = newest_receipt(tmp_path, "numpy")
    assert (receipt["failed"], receipt["device"]) == (0, "cpu")
    about = receipt["about"]
    assert about["sources"] == source_hash()
    assert about["numpy"] == np.__version__
    assert datetime.now(UTC) - datetime.fromisoformat(about["date"]) < timedelta(minutes=5)
    old = json.loads(path.read_text())
    old["backends"][0]["about"]["date"] = "2020-01-01T00:00:00+00:00"
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert newest_receipt(tmp_path, "numpy") == receipt
    assert newest_receipt(tmp_path, "cupy") is None
    (golden,) = tmp_path.glob("*.safetensors")
    assert nnxp.testing.goldens.check(golden).ok


def test_ci_says_how_old_the_newest_receipt_is_and_never_fails():
    ran = subprocess.run([sys.executable, ROOT / "ci/receipt"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "the newest receipt from a GPU:" in ran.stdout
