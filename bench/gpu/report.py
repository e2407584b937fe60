"""What the steps have found: goals and tables, for people and programs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Values = dict[str, Any]

KINDS = ("fp32", "tf32", "fp16", "bf16")


@dataclass
class Step:
    """How a step went, and what it found: "ok", "failed", "cut" short by its time, "skipped"."""

    name: str
    state: str = "skipped"
    seconds: float = 0.0
    problem: str = ""
    figures: Values = field(default_factory=dict)
    output: str = ""


def plain(value: Any) -> Any:
    """The same with five figures to each number, and None for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def problems(figures: Values) -> Iterator[str]:
    """What a step says was wrong."""
    for title, values in figures.items():
        rows = {"": values} | {k: v for k, v in values.items() if isinstance(v, dict)}
        for row, found in rows.items():
            if "problem" in found:
                yield f"{' '.join(filter(None, [title, row]))}: {found['problem']}"


def without_lt(steps: Sequence[Step]) -> str:
    """What is to be read before any figure, where products do not go through cuBLASLt."""
    found = {step.name: step.figures for step in steps}
    why = found.get("where", {}).get("products", {}).get("not through cuBLASLt, because")
    return f"PRODUCTS DO NOT GO THROUGH cuBLASLt: {why}" if why else ""


def goals(steps: Sequence[Step]) -> Iterator[tuple[str, Any, Any, bool]]:
    """What the CUDA engine is to show: (what, at least or at most, found, whether it is met)."""
    found = {step.name: step.figures for step in steps}

    def at(*path: str) -> Any:
        value: Any = found
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def quotient(step: str, title: str, one: str, other: str) -> float | None:
        ours, theirs = at(step, title, one, "µs"), at(step, title, other, "µs")
        return theirs / ours if ours and theirs else None

    for kind in [kind for kind in KINDS if at("network", kind)]:
        share = at("network", kind, "nnxp", "of the floor")
        yield _least(f"{kind}, resident: share of the bare products", share, 0.9)
        for rival, least in (("torch-compile", 1.0), ("jax", 1.0), ("torch", 1.1)):
            if rival != "torch" or kind in ("fp16", "bf16"):
                times = quotient("network", kind, "nnxp", rival)
                yield _least(f"{kind}, resident: times as fast as {rival}", times, least)
    for kind in [kind for kind in KINDS if at("host", kind)]:
        share = at("host", kind, "nnxp-host", "of the larger of floor and copy")
        yield _least(
            f"{kind}, from host memory: share of the larger of copy and products", share, 0.9
        )
    for ours, least in (("nnxp-eager", 1.0), ("nnxp", 2.0)):
        times = quotient("graphs", "1 row", ours, "torch")
        yield _least(f"one row, resident, {ours}: times as fast as torch", times, least)
    for name in ("resnet50", "minilm"):
        for kind in [kind for kind in KINDS if at("compiled", f"{name} {kind}")]:
            times = quotient("compiled", f"{name} {kind}", "nnxp", "torch-compile")
            yield _least(f"{name}, {kind}: times as fast as torch-compile", times, 1.0)
    constant = at("memory", "stream", "constant")
    yield (
        "the memory of the card in use is constant, whatever passes",
        True,
        constant,
        bool(constant),
    )
    more = at("memory", "stream", "of the card's memory")
    yield _least("so many times the card's memory went through it", more, 1.0)


def _least(what: str, value: float | None, least: float) -> tuple[str, Any, Any, bool]:
    return what, f"{least:g} or more", value, value is not None and value >= least


def report(steps: Sequence[Step], about: Values) -> Values:
    """All there is so far, as plain values."""
    met = [
        {"what": what, "wanted": wanted, "found": plain(value), "met": ok}
        for what, wanted, value, ok in goals(steps)
    ]
    return {
        "what": "gpu",
        **about,
        "without cuBLASLt": without_lt(steps),
        "goals": met,
        "steps": [vars(each) for each in steps],
    }


def markdown(found: Values) -> str:
    """The report, to be read."""
    lines = ["# nnxp on a GPU", ""]
    if found["without cuBLASLt"]:
        lines = [f"**{found['without cuBLASLt']}**", "", *lines]
    if found["backend"] != "cupy":
        lines += [f"**A try on {found['backend']}, with tiny arrays: it measures nothing.**", ""]
    lines += ["| step | | seconds | |", "|---|---|---:|---|"]
    for step in found["steps"]:
        lines.append(_row([step["name"], step["state"], f"{step['seconds']:.0f}", step["problem"]]))
    lines += ["", "| goal | wanted | found | |", "|---|---|---:|---|"]
    for goal in found["goals"]:
        said = "" if goal["found"] is None else "met" if goal["met"] else "MISSED"
        lines.append(_row([goal["what"], goal["wanted"], goal["found"], said]))
    for step in found["steps"]:
        lines += ["", f"## {step['name']}"]
        for title, values in step["figures"].items():
            lines += table(title, values)
        if step["output"]:
            lines += ["", "```", step["output"].replace("```", "'''"), "```"]
    return "\n".join(lines) + "\n"


def table(title: str, values: Values) -> Iterator[str]:
    """Figures under their title; a list is for the JSON alone."""
    shown = {name: each for name, each in values.items() if not isinstance(each, list)}
    if not shown:
        return
    yield from ("", f"{title}:", "")
    if all(isinstance(each, dict) for each in shown.values()):
        columns = list(dict.fromkeys(column for each in shown.values() for column in each))
        yield _row(["", *columns])
        yield _row(["---"] * (1 + len(columns)))
        for name, each in shown.items():
            yield _row([name, *(each.get(column) for column in columns)])
        return
    for name, each in shown.items():
        yield f"- {name}: {_said(each)}"


def _row(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(map(_said, cells))} |"


def _said(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return " ".join(str(value).split()).replace("|", "/")


def written(steps: Sequence[Step], about: Values, out: Path) -> None:
    """Leave the report in the folder, whole at every moment."""
    found = report(steps, about)
    for name, text in {
        "report.json": json.dumps(found, indent=1) + "\n",
        "report.md": markdown(found),
    }.items():
        beside = out / f"{name}.new"
        beside.write_text(text, encoding="utf-8")
        beside.replace(out / name)
