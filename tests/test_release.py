"""What is told about a release is so: one version, one address or none, extras that exist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import nnxp

ROOT = Path(__file__).parents[1]
if not (ROOT / "pyproject.toml").exists():
    pytest.skip("an installation has no such files", allow_module_level=True)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_citation_is_of_the_last_release_that_the_changelog_names():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version, date = re.findall(r"^## \[([\d.]+)\] - ([\d-]+)$", changes, re.MULTILINE)[0]
    assert f"\nversion: {version}\ndate-released: {date}\n" in citation
    assert nnxp.__version__.startswith(version)


def test_containers_install_extras_that_there_are():
    files = (ROOT / "containers").iterdir()
    asked = re.findall(r"\[([^\]]+)\]\" &&", "".join(each.read_text() for each in files))
    names = {name for each in asked for name in each.split(",")} - {"${CUDA}"}
    assert asked
    assert names | {"cuda12", "cuda13"} <= PROJECT["optional-dependencies"].keys()


def test_the_page_of_versions_asks_for_what_the_extras_ask_for():
    page = (ROOT / "docs/compatibility.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| ([\w-]+) \(extra `(\w+)`\) \| ([\d.]+) \|", page, re.MULTILINE)
    assert len(told) == 5
    for package, extra, version in told:
        assert f"{package}>={version}" in PROJECT["optional-dependencies"][extra]


def test_the_actions_of_the_workflow_are_those_that_were_read():
    workflow = ROOT / ".github/workflows/check.yml"
    if not workflow.exists():
        pytest.skip("no part of a source distribution")
    used = re.findall(r"uses: (.*)", workflow.read_text(encoding="utf-8"))
    assert used
    assert [each for each in used if not re.search(r"@[0-9a-f]{40} # v[\d.]+$", each)] == []


def test_no_address_is_invented():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "CITATION.cff"]
    found = re.findall(r"https?://[^\s)>\"]+", "".join(p.read_text("utf-8") for p in pages))
    known = ("https://keepachangelog.com/", "https://semver.org/", "https://download.pytorch.org/")
    assert [each for each in found if not each.startswith(known)] == []
    assert "urls" not in PROJECT
