"""docs/parity.md: its project works as shown, and its mistake is caught as shown."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from test_pages import keep_pictures

GUIDE = Path(__file__).parents[1] / "docs/parity.md"
TEXT = GUIDE.read_text(encoding="utf-8")
MODEL, TESTS, MISTAKE, *SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
BLAMED = "first to diverge: layers.0 Clip() on sim:0: "


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.delenv("NNXP_REQUIRE_GPU", raising=False)
    (tmp_path / "ranker.py").write_text(MODEL)
    (tmp_path / "pyproject.toml").write_text(re.search(r"```toml\n(.*?)```", TEXT, re.DOTALL)[1])
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_ranker.py").write_text(TESTS)
    return tmp_path


def run(folder, *command):
    ran = subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=120
    )
    return ran.returncode, ran.stdout + ran.stderr


def test_the_project_passes(project):
    code, said = run(project, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert code == 0, said
    for line in ("nnxp: numpy: 1 test, 6 comparisons", "nnxp: sim: 1 test, 6 comparisons"):
        assert line in TEXT
        assert line in said


def test_the_mistake_is_caught_and_named(project):
    first = MISTAKE.splitlines(keepends=True)[0]
    assert first in MODEL
    (project / "ranker.py").write_text(MODEL.replace(first, MISTAKE))
    code, said = run(project, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert code == 1
    assert BLAMED in TEXT
    assert BLAMED in said


def test_the_snippets_run(project):
    pytest.importorskip("matplotlib", reason="one of them draws: it needs matplotlib")
    program = "import numpy as np, nnxp\n" + "\n".join(SNIPPETS)
    code, said = run(project, "-W", "error", "-c", program)
    assert code == 0, said
    keep_pictures(GUIDE, project)
