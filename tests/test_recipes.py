"""The recipes of docs/cluster.md for Ray and Spark, run as they stand where those are installed."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import nnxp

GUIDE = Path(__file__).parents[1] / "docs/cluster.md"
pytestmark = pytest.mark.skipif(not GUIDE.exists(), reason="no guide in a source distribution")


@pytest.fixture
def net(tmp_path):
    """A model, in a folder that holds it and rows for it."""
    net = nnxp.Sequential(nnxp.Dense(20, 64, "relu", rng=0), nnxp.Dense(64, 3, "softmax", rng=1))
    nnxp.save(net, tmp_path / "net.safetensors")
    return net


def run(name, folder, after=""):
    """Run the guide's recipe of this name there."""
    code = re.search(rf"```python {name}\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL)[1]
    (folder / "recipe.py").write_text(code + after)
    ran = subprocess.run(
        [sys.executable, "recipe.py"], cwd=folder, capture_output=True, text=True, timeout=300,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYSPARK_PYTHON": sys.executable},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]


def drawn():
    return np.random.default_rng(0).normal(size=(10_000, 20)).astype("float32")


@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="Ray is not installed")
def test_ray_data(net, tmp_path):
    np.save(tmp_path / "rows.npy", drawn())
    run("ray", tmp_path, 'np.save("y.npy", y)\n')
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), net(drawn()), atol=1e-6)


@pytest.mark.skipif(
    not (importlib.util.find_spec("pyspark") and shutil.which("java")),
    reason="Spark or Java is not installed",
)
def test_spark(net, tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    x = drawn()
    parquet.write_table(
        arrow.table({f"x{i}": column for i, column in enumerate(x.T)}), tmp_path / "rows.parquet"
    )
    run("spark", tmp_path)
    table = parquet.read_table(tmp_path / "answers.parquet")
    found = np.stack([table.column(i).to_numpy() for i in range(3)], axis=1)
    expected = net(x)
    order = [np.lexsort(rows.round(5).T) for rows in (found, expected)]
    np.testing.assert_allclose(found[order[0]], expected[order[1]], atol=1e-5)
