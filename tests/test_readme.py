"""The README's Python is run as it stands: what a reader copies, works.

All its ```python blocks are one program, run in order, in an empty directory, warnings as errors.
A block that cannot be run here is marked just above with its reason: <!-- not run: needs a GPU -->
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"

FENCE = re.compile(r"(?P<indent> *)(?P<fence>`{3,}|~{3,}) *(?P<language>\w*)")
NOT_RUN = re.compile(r"<!--\s*not run\b:?(?P<reason>.*?)-->")


def program_of(text: str) -> str:
    """The Python in a Markdown text; all else is left empty, so line numbers are the text's."""
    program = []
    above = ""  # the last line that says something before a block opens
    block = None
    for number, line in enumerate(text.splitlines(), start=1):
        kept = ""
        fence = FENCE.match(line)
        if block is None and fence:
            mark = NOT_RUN.search(above)
            if mark and not mark["reason"].strip():
                raise ValueError(f"line {number}: a block that is not run needs a reason")
            block = fence
            run = fence["language"].lower() in {"python", "python3", "py"} and not mark
        elif block is not None and line.strip() == block["fence"]:
            block = None
            above = ""
        elif block is not None and run:
            kept = line.removeprefix(block["indent"])
        elif line.strip():
            above = line
        program.append(kept)
    if block is not None:
        raise ValueError(f"a block opened with {block.group()!r} is never closed")
    return "\n".join(program) + "\n"


def test_every_python_block_of_the_readme_runs_as_written(tmp_path):
    program = program_of(README.read_text(encoding="utf-8"))
    assert program.strip(), "the README shows no Python"
    (tmp_path / "README.py").write_text(program, encoding="utf-8")  # its lines are README.md's
    room = tmp_path / "empty"
    room.mkdir()
    ran = subprocess.run(
        [sys.executable, "-W", "error", "../README.py"],
        cwd=room,
        capture_output=True,
        text=True,
        timeout=300,  # a README that takes minutes is no introduction
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_blocks_are_one_program_with_the_line_numbers_of_the_text():
    text = "# Title\n\n```python\na = 1\n```\n```sh\nls\n```\n1. So\n"
    text += "   ```py\n   if a:\n       b = 2\n   ```\n"
    lines = program_of(text).splitlines()
    assert {n: line for n, line in enumerate(lines, start=1) if line} == {
        4: "a = 1",
        11: "if a:",
        12: "    b = 2",
    }


@pytest.mark.parametrize("between", ["", "\n"])
def test_a_block_marked_not_run_is_left_out_and_the_next_one_is_not(between):
    text = f"<!-- not run: needs a GPU -->\n{between}```python\na = 1\n```\n```python\nb = 2\n```\n"
    assert program_of(text).split() == ["b", "=", "2"]


@pytest.mark.parametrize("mark", ["<!-- not run: -->", "<!-- not run -->", "<!--not run:-->"])
def test_a_block_is_not_left_out_without_a_reason(mark):
    with pytest.raises(ValueError, match=r"line 2: .* needs a reason"):
        program_of(f"{mark}\n```python\na = 1\n```\n")


def test_a_block_that_is_never_closed_is_an_error():
    with pytest.raises(ValueError, match="never closed"):
        program_of("```python\na = 1\n")
