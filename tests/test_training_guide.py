"""docs/training.md: its code runs, from the first block to the last."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[1] / "docs/training.md"
if not GUIDE.exists():
    pytest.skip("the guide is not part of a source distribution", allow_module_level=True)
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_guide_runs(tmp_path):
    (tmp_path / "guide.py").write_text("\n".join(BLOCKS))
    ran = subprocess.run(
        [sys.executable, "-W", "error", "guide.py"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "rows_per_second" in ran.stdout
