"""The lists of docs/reference.md, from the docstrings: python docs/lists.py [PAGE]."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import nnxp
from nnxp import _library, kernels
from nnxp.layers._layer import Layer
from nnxp.training import losses, optimizers, schedules


def line(thing: object) -> str:
    """The first paragraph of a docstring, fit for the cell of a table."""
    text = inspect.cleandoc(thing.__doc__ or "").split("\n\n")[0]
    text = re.sub(r"\s{2,}\[[^\]]*\]\.?$", "", text)  # where it comes from: help() tells
    return " ".join(text.split()).replace("|", "\\|")


def rows(things: Iterable[tuple[str, object]]) -> Iterator[str]:
    yield "| | |"
    yield "|---|---|"
    yield from (f"| `{name}` | {line(thing)} |" for name, thing in things)


def public(module: object, kind: type | tuple[type, ...]) -> list[tuple[str, object]]:
    """The classes of a kind that stand in a module under a public name, the kind itself aside."""
    found = [(name, getattr(module, name)) for name in dir(module) if not name.startswith("_")]
    return [
        (name, thing)
        for name, thing in found
        if isinstance(thing, type) and issubclass(thing, kind) and thing is not kind
    ]


def functions() -> Iterator[str]:
    """The dialect, by what a function does to shapes."""
    homes = {"norm": "linalg.", "sliding_window_view": "lib.stride_tricks."}
    inside = _library._NOT_IN_THE_MODULE - homes.keys()  # what operators and methods are called
    yield "| | |"
    yield "|---|---|"
    for kind in dict.fromkeys(_library.KINDS.values()):
        names = [n for n, k in _library.KINDS.items() if k == kind and n not in inside]
        yield f"| {kind} | {', '.join(f'`{homes.get(n, str())}{n}`' for n in sorted(names))} |"


LISTS = {
    "layers": lambda: rows(public(nnxp, Layer)),
    "kernels": lambda: rows(
        (name, k) for name, k in vars(kernels).items() if isinstance(k, kernels.Kernel)
    ),
    "losses": lambda: rows(public(losses, losses.Loss)),
    "optimizers": lambda: rows(public(optimizers, optimizers.Optimizer)),
    "schedules": lambda: rows(
        (name, thing)
        for name, thing in vars(schedules).items()
        if isinstance(thing, type) and thing.__module__ == schedules.__name__ and name[0] != "_"
    ),
    "errors": lambda: rows(public(nnxp, nnxp.NnxpError)),
    "functions": functions,
}


def main() -> None:
    page = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("reference.md"))
    text = page.read_text(encoding="utf-8")
    for name, make in LISTS.items():
        region = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not region.search(text):
            sys.exit(f"{page} has no region <!-- {name} -->")
        made = "\n".join(make()) + "\n"
        text = region.sub(lambda found, made=made: found[1] + made + found[2], text)
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
