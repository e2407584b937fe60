"""The README's Python is run as it stands: what a reader copies, works.

All its ```python blocks are one program, run in order, in an empty directory, warnings as errors.
A block that cannot be run here is marked just above with its reason: <!-- not run: needs a GPU -->
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"

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


def run_page(page: Path, folder: Path) -> str:
    """What a page's Python prints; a function test_... is called as pytest would."""
    program = program_of(page.read_text(encoding="utf-8"))
    assert program.strip(), f"{page.name} shows no Python"
    program += "for name in [n for n in globals() if n.startswith('test_')]: globals()[name]()\n"
    (folder / "page.py").write_text(program, encoding="utf-8")  # its lines are the page's
    room = folder / "empty"
    room.mkdir()
    ran = subprocess.run(
        [sys.executable, "-W", "error", "../page.py"],
        cwd=room,
        capture_output=True,
        text=True,
        timeout=300,  # a page that takes minutes is no introduction
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_every_python_block_of_the_readme_runs_and_prints_what_it_shows(tmp_path):
    shown = re.search(r"```text\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert shown, "the README shows no output"
    printed = run_page(README, tmp_path)
    device = re.compile(r"(?<= on )\S+")  # with a GPU it says another
    numbers = re.compile(r"\d+\.\d+")  # a digit more or less is read right elsewhere
    for shows, prints in zip(shown[1].splitlines(), printed.splitlines(), strict=False):
        assert numbers.sub("", device.sub("", shows)) == numbers.sub("", device.sub("", prints))
        figures = (map(float, numbers.findall(line)) for line in (shows, prints))
        assert all(abs(one - other) <= 0.015 for one, other in zip(*figures, strict=True))
    assert len(printed.splitlines()) >= len(shown[1].splitlines())


def test_the_readme_fits_on_two_screens():
    assert len(README.read_text(encoding="utf-8").splitlines()) < 150


def test_what_ci_runs_is_a_command_that_the_readme_names():
    script = ROOT / ".ci/run"
    if not script.exists():
        pytest.skip("no part of a source distribution")
    command = script.read_text(encoding="utf-8").splitlines()[-1].split("/../")[1].replace('"', "")
    blocks = re.findall(r"```sh\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    named = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    assert command in named


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
