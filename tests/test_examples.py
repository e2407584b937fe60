"""The scripts in examples/ run as they stand, are short, and say what the pages say of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
if not EXAMPLES.exists():
    pytest.skip("the examples are not part of an installation", allow_module_level=True)
SCRIPTS = {
    "digits.py": "right: 9",
    "many_rows.py": "20,000 rows in",
    "from_elsewhere.py": "all backends here agree",
    "own_layer.py": "checks passed",
}
OPTIONS = {"many_rows.py": ["20000"]}


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_runs_and_prints_what_it_found(name, tmp_path):
    ran = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / name, tmp_path, *OPTIONS.get(name, [])],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert SCRIPTS[name] in ran.stdout


def test_there_are_four_of_a_screen_or_two():
    scripts = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert scripts.keys() == SCRIPTS.keys()
    assert all(30 <= lines <= 60 for lines in scripts.values()), scripts
