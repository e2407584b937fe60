"""The pages in docs/: their Python runs as it stands, and their lists leave nothing out.

docs/parity.md is a project with tests of its own: tests/test_guide.py runs that.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from test_readme import run_page

DOCS = Path(__file__).parents[1] / "docs"
if not DOCS.exists():
    pytest.skip("the pages are not part of an installation", allow_module_level=True)
PAGES = sorted(path for path in DOCS.glob("*.md") if path.name != "parity.md")
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_of_a_page_runs_as_written(page, tmp_path):
    run_page(page, tmp_path)


@pytest.mark.parametrize("page", [*DOCS.glob("*.md"), *DOCS.parent.glob("*.md")], ids=str)
def test_links_of_a_page_lead_somewhere(page):
    missing = [
        link
        for link in LINK.findall(page.read_text(encoding="utf-8"))
        if not (page.parent / link).exists()
    ]
    assert not missing


def test_the_lists_are_those_of_the_library(tmp_path):
    copy = tmp_path / "index.md"
    copy.write_text((DOCS / "index.md").read_text(encoding="utf-8"), encoding="utf-8")
    subprocess.run([sys.executable, DOCS / "lists.py", copy], check=True, timeout=120)
    assert copy.read_text(encoding="utf-8") == (DOCS / "index.md").read_text(encoding="utf-8"), (
        "python docs/lists.py writes them anew"
    )
