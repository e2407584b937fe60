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
    folder = ROOT / "containers"
    if not folder.exists():
        pytest.skip("no part of a source distribution")
    asked = re.findall(r"\[([^\]]+)\]\" &&", "".join(p.read_text() for p in folder.iterdir()))
    names = {name for each in asked for name in each.split(",")} - {"${CUDA}"}
    assert asked
    assert names | {"cuda12", "cuda13"} <= PROJECT["optional-dependencies"].keys()


def test_no_address_is_invented():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "CITATION.cff"]
    found = re.findall(r"https?://[^\s)>\"]+", "".join(p.read_text("utf-8") for p in pages))
    known = ("https://keepachangelog.com/", "https://semver.org/", "https://download.pytorch.org/")
    assert [each for each in found if not each.startswith(known)] == []
    assert "urls" not in PROJECT
