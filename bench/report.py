"""The tables of bench/README.md and the plots, from results: python bench/report.py [JSON...]

Without names, all the races in bench/results/*.json. The tables go between <!-- bench --> and
<!-- /bench --> in bench/README.md, if that is there, else to stdout. The plots are drawn from the
first result without settings of its own, if matplotlib is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
FLOOR, TILED = "floor", "floor-tiled"
SHOWN = {
    FLOOR: "floor",
    TILED: "floor, tiled",
    "naive": "naive NumPy",
    "torch-onednn": "torch, oneDNN",
    "torch-compile": "torch.compile",
    "onnx": "onnx reference",
}
PALETTE = {
    "nnxp": "#d62728",
    FLOOR: "#000000",
    TILED: "#7f7f7f",
    "naive": "#1f77b4",
    "torch": "#ff7f0e",
    "torch-onednn": "#ffbb78",
    "torch-compile": "#8c564b",
    "onnxruntime": "#2ca02c",
    "jax": "#9467bd",
    "sklearn": "#17becf",
    "thinc": "#bcbd22",
    "onnx": "#aec7e8",
}

Values = dict[str, Any]


# tables


def markdown(found: Values) -> str:
    """Everything about one file of results."""
    parts = [heading(found)]
    for kind, table in {"throughput": shares, "latency": latencies, "memory": memories}.items():
        if found.get(kind):
            parts += ["\n".join(table(found[kind])), *troubles(found[kind])]
    return "\n\n".join(parts)


def heading(found: Values) -> str:
    """Where it ran, what ran, and what to know about it."""
    place, races = found["place"], [each for kind in _kinds(found) for each in kind]
    abouts = [result["about"] for race in races for result in race["results"]]
    blas = next((each["blas"][0] for each in abouts if each.get("blas")), None)
    versions = {k: v for each in abouts for k, v in each.get("versions", {}).items()}
    kernels = "{name} {version} with its {kernels} kernels".format(**blas) if blas else "no BLAS"
    pinned = "".join(f", {name}={value}" for name, value in place["settings"].items())
    lines = [
        f"{place['cpu']}, {place['cores']} cores; {kernels}{pinned}; Python {place['python']}, "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}; {place['date']}."
    ]
    if found["small"]:
        lines.append("**Tiny networks: this shows that the benchmark runs, and measures nothing.**")
    if "torch" in versions:
        lines.append(
            "torch's CPU wheel computes its products with MKL, which does not use AVX-512 on AMD; "
            "on Intel it is closer."
        )
    return "\n".join(lines)


def _kinds(found: Values) -> Iterator[list[Values]]:
    yield from (found.get(kind, []) for kind in ("throughput", "latency", "memory"))


def shares(races: list[Values]) -> Iterator[str]:
    """The floor's time in each contender's time, by networks."""
    names = [name for name in _names(races) if name != FLOOR]
    yield "Share of the floor, the bare matrix products of the same network: more is better."
    yield ""
    yield from _header(["network (rows)", "floor", *map(_shown, names)])
    for race in races:
        results = _by_name(race)
        floor = results.get(FLOOR, {}).get("median")
        cells = [
            f"{race['title']} ({race['rows']:,})",
            f"{_figures(floor * 1e3)} ms" if floor else "–",
        ]
        for name in names:
            share = results[name]["share"]
            cell = "–" if share is None else f"{share:.2f}"
            if name == "nnxp" and share is not None:
                low, high = results[name]["share_quartiles"]
                cell = f"**{cell}** [{low:.2f}, {high:.2f}]"
            cells.append(cell)
        yield _row(cells)


def latencies(races: list[Values]) -> Iterator[str]:
    """Microseconds for so many rows."""
    yield f"Time of one call of {races[0]['title']} in µs, by its number of rows: less is better."
    yield ""
    yield from _header(["", *(_rows(race) for race in races)])
    for name in _names(races):
        medians = [_by_name(race)[name]["median"] for race in races]
        yield _row([_shown(name), *("–" if m is None else _figures(m * 1e6) for m in medians)])


def memories(races: list[Values]) -> Iterator[str]:
    """MiB that computing adds to a process."""
    yield (
        f"Memory that {races[0]['title']} takes at its peak, in MiB, beyond what the process held "
        "before its first call (libraries, weights, rows): less is better."
    )
    yield ""
    yield from _header(["", *(_rows(race) for race in races)])
    for name in _names(races):
        results = [_by_name(race)[name] for race in races]
        yield _row([_shown(name), *map(_added, results)])


def _added(result: Values) -> str:
    if result["problem"] or result["peak_bytes"] is None:
        return "–"
    return f"{(result['peak_bytes'] - result['rest_bytes']) / 2**20:,.0f}"


def troubles(races: list[Values]) -> list[str]:
    """Who was not timed, and why."""
    said: dict[str, None] = {}
    for race in races:
        for result in race["results"]:
            if result["problem"]:
                absent = result["problem"].startswith("not installed")
                where = "" if absent else f" ({race['title']}, {race['rows']:,} rows)"
                said[f"{_shown(result['name'])}{where}: {result['problem']}"] = None
    return ["\n".join(f"- {each}" for each in said)] if said else []


def _figures(value: float) -> str:
    """Three of them, and never an exponent."""
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def _names(races: list[Values]) -> list[str]:
    return [result["name"] for result in races[0]["results"]]


def _by_name(race: Values) -> dict[str, Values]:
    return {result["name"]: result for result in race["results"]}


def _rows(race: Values) -> str:
    return f"{race['rows']:,} row{'s' if race['rows'] > 1 else ''}"


def _shown(name: str) -> str:
    return SHOWN.get(name, name)


def _header(cells: list[str]) -> Iterator[str]:
    yield _row(cells)
    yield _row(["---", *["---:"] * (len(cells) - 1)])


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


# plots


def draw_shares(races: list[Values], path: Path) -> None:
    """A line for each network, a dot for each contender."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(9, 0.7 * len(races) + 1.8))
    names = [name for name in _names(races) if name != FLOOR]
    for i, name in reversed(list(enumerate(names))):  # nnxp, the first, comes last, to lie on top
        own = name == "nnxp"
        aside = 0 if own else 0.05 * (i - len(names) / 2)  # so that nobody hides another
        axes.plot(
            [_by_name(race)[name]["share"] for race in races],
            [line + aside for line in range(len(races))],
            "D" if own else "o",
            color=PALETTE.get(name),
            markersize=9 if own else 7,
            label=_shown(name),
        )
    axes.axvline(1, color=PALETTE[FLOOR], linewidth=1)
    axes.set_yticks(range(len(races)), [f"{each['title']}\n{_rows(each)}" for each in races])
    axes.set_ylim(len(races) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("share of the floor (the line at 1): more is better")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def draw_latency(races: list[Values], path: Path) -> None:
    """Time and rows per second by rows in a call."""
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    rows = [race["rows"] for race in races]
    for name in _names(races):
        medians = [_by_name(race)[name]["median"] for race in races]
        if name == TILED or None in medians:
            continue
        style = {
            "color": PALETTE.get(name),
            "linestyle": "--" if name == FLOOR else "-",
            "linewidth": 2.5 if name == "nnxp" else 1.2,
            "marker": "o",
            "markersize": 4,
            "label": _shown(name),
        }
        left.plot(rows, [m * 1e6 for m in medians], **style)
        right.plot(rows, [n / m for n, m in zip(rows, medians, strict=True)], **style)
    for axes, what in ((left, "µs a call: less is better"), (right, "rows/s: more is better")):
        axes.set(xscale="log", yscale="log", xlabel="rows in a call", ylabel=what)
        axes.set_xticks(rows, [f"{n:,}" for n in rows])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(races[0]["title"])
    _save(figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "nnxp"})
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without a date, the same results make the same file.
    figure.savefig(path, bbox_inches="tight", facecolor="white", metadata={"Date": None})


def plots(found: Values, folder: Path) -> dict[str, Path]:
    """Draw what there are results for; the plots by what they show."""
    drawn = {}
    if any(map(_has_share, found.get("throughput", []))):
        drawn["share of the floor by network"] = folder / "share.svg"
        draw_shares(found["throughput"], folder / "share.svg")
    if found.get("latency"):
        drawn["latency and throughput by the number of rows"] = folder / "latency.svg"
        draw_latency(found["latency"], folder / "latency.svg")
    return drawn


def _has_share(race: Values) -> bool:
    return any(result["share"] is not None for result in race["results"])


# the command


def into(readme: Path, text: str) -> bool:
    """Put the text into the marked region; False if there is none."""
    old = readme.read_text(encoding="utf-8") if readme.exists() else ""
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        return False
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="*", type=Path, metavar="JSON")
    parser.add_argument("--readme", type=Path, default=ROOT / "bench/README.md")
    parser.add_argument("--plots", type=Path, default=ROOT / "bench/results", metavar="FOLDER")
    args = parser.parse_args()
    # Other results lie there, too; those of bench/training.py are a list.
    paths = args.results or sorted((ROOT / "bench/results").glob("*.json"))
    files = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    files = [each for each in files if isinstance(each, dict) and each.get("what") == "races"]
    if not files:
        parser.error("there are no results of races; bench/run.py makes some")
    files.sort(key=lambda found: len(found["place"]["settings"]))  # those as they are come first
    text = "\n\n".join(markdown(found) for found in files)
    try:
        drawn = plots(files[0], args.plots)
    except ModuleNotFoundError as error:
        print(f"no plots are drawn: {error}", file=sys.stderr)
    else:
        for what, path in drawn.items():
            text += f"\n\n![{what}]({os.path.relpath(path, args.readme.parent)})"
    if not into(args.readme, text):
        print(text)
        print(f"{args.readme} has no {BEGIN} ... {END}: nothing was written there", file=sys.stderr)


if __name__ == "__main__":
    main()
