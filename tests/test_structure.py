"""The house: imports look down only, and CuPy stays where it belongs."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import nnxp

ROOT = Path(nnxp.__file__).parent
FLOORS = [  # from the ground up; a module may import its own floor and those below
    {"_errors", "_arrays", "_exchange", "_library", "_printed", "_progress", "sim"},
    {"backend"},
    {"kernels"},
    {"program"},
    {"layers"},
    {"engine", "io"},
    {"testing", "training", "plots"},
    {"cluster", "demo", "doctor", "sklearn", "verify"},
    {"_comparison", "floor"},
    {"cli", "__main__"},
]
MAY_IMPORT_CUPY = {"backend/cuda.py", "backend/_probe.py", "kernels/cuda"}


def floor(module: str) -> int:
    room = module.split(".")[1]
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


def modules() -> list[Path]:
    return [path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"]


def imports(path: Path) -> list[str]:
    """Every module that the file names in an import, at its top or inside a function."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found += (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module == "nnxp"
                else [str(node.module)]
            )
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_look_down_only(path):
    me = floor(".".join(("nnxp", *path.relative_to(ROOT).with_suffix("").parts)))
    for name in imports(path):
        if name.startswith("nnxp.") and name != "nnxp.__version__":
            assert floor(name) <= me, f"{path.relative_to(ROOT)} imports {name}, a floor above it"
        if me <= floor("nnxp.testing"):
            assert name != "nnxp", f"{path.relative_to(ROOT)} imports the front door"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_cupy_is_imported_only_where_cuda_is(path):
    where = str(path.relative_to(ROOT))
    if not any(where.startswith(each) for each in MAY_IMPORT_CUPY):
        assert not any(name.split(".")[0] in ("cupy", "cupyx") for name in imports(path))


def test_importing_nnxp_loads_no_optional_library():
    heavy = (
        "cupy typer rich safetensors sklearn scipy ml_dtypes asyncio pyarrow decimal tqdm".split()
    )
    code = (
        'import sys, nnxp; nnxp.predict(nnxp.Dense(2, 3), [[1, 2]], "cpu"); '
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_there_are_no_rooms_for_everything():
    assert not {path.stem for path in modules()} & {"utils", "helpers", "common", "core", "misc"}


def test_a_type_checker_sees_the_names_that_are_loaded_when_they_are_used():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    (block,) = (each for each in tree.body if isinstance(each, ast.If))
    seen = {
        (alias.asname, f"{each.module}.{alias.name}") for each in block.body for alias in each.names
    }
    told = {(name, f"nnxp.{home}.{name}") for name, home in nnxp._MODULES.items()}
    inside = {(name, f"nnxp.{home}") for name, home in nnxp._PACKAGES.items()}
    assert told <= seen <= told | inside


def test_no_imports_go_in_circles():
    names = {
        ".".join(("nnxp", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(
            ".__init__"
        ): path
        for path in modules()
    }
    graph = {
        name: {each for each in imports(path) if each in names} for name, path in names.items()
    }
    for name in graph:  # a package comes with its modules
        graph[name] |= {each.rpartition(".")[0] for each in graph[name]} & set(names)
        graph[name] -= {name, *(name.rsplit(".", n)[0] for n in range(1, name.count(".")))}
    list(TopologicalSorter(graph).static_order())
