"""The pages in docs/: their Python runs as it stands, and their lists leave nothing out.

docs/parity.md is a project with tests of its own: tests/test_guide.py runs that.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import nnxp
from test_readme import run_page

DOCS = Path(__file__).parents[1] / "docs"
NO_PYTHON = {"api.md", "compatibility.md", "index.md", "limits.md"}
PAGES = sorted(p for p in DOCS.glob("*.md") if p.name not in {"parity.md", *NO_PYTHON})
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)")
PICTURE = re.compile(r"\]\(pictures/([^)]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_of_a_page_runs_as_written_and_writes_its_pictures(page, tmp_path):
    if "nnxp.plots" in page.read_text(encoding="utf-8"):
        pytest.importorskip("matplotlib", reason="the page draws: it needs matplotlib")
    run_page(page, tmp_path)
    keep_pictures(page, tmp_path / "empty")


def keep_pictures(page, room):
    """The page's code wrote all its pictures; one that docs/ does not have is put there."""
    for name in PICTURE.findall(page.read_text(encoding="utf-8")):
        assert (room / name).exists(), f"{page.name} shows {name}, which its code does not write"
        kept = DOCS / "pictures" / name
        if not kept.exists():
            kept.parent.mkdir(exist_ok=True)
            shutil.copy(room / name, kept)
            pytest.fail(f"docs/pictures/{name} was not there; now it is: look at it, and commit it")


@pytest.mark.parametrize("page", [*DOCS.glob("*.md"), *DOCS.parent.glob("*.md")], ids=str)
def test_links_of_a_page_lead_somewhere(page):
    for link, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        target = page.parent / link if link else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), f"{link}#{anchor}"


def anchors(page):
    """What GitHub and the site call the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_what_newcomers_ask_is_two_clicks_away():
    assert "](docs/index.md)" in (DOCS.parent / "README.md").read_text(encoding="utf-8")
    _, _, questions = (DOCS / "index.md").read_text(encoding="utf-8").partition("## Questions")
    answers = [row.split("|")[2] for row in questions.splitlines() if "?" in row]
    assert len(answers) >= 10
    assert [each for each in answers if not (LINK.search(each) or "`nnxp " in each)] == []


def test_the_lists_are_those_of_the_library(tmp_path):
    page, copy = DOCS / "reference.md", tmp_path / "reference.md"
    shutil.copy(page, copy)
    subprocess.run([sys.executable, DOCS / "lists.py", copy], check=True, timeout=120)
    assert copy.read_text(encoding="utf-8") == page.read_text(encoding="utf-8"), (
        "python docs/lists.py writes them anew"
    )


def test_every_error_has_its_place_among_the_troubles():
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    told = set(re.findall(r"\w+", "".join(re.findall(r"^## .*$", text, re.MULTILINE))))
    assert {*nnxp._errors.__all__} - {"NnxpError"} <= told
    assert {*nnxp._errors.__all__} <= {*re.findall(r"\w+", nnxp._errors.__doc__)}
