"""Everything that needs a GPU, in ten minutes: ci/gpu --out DIR

Each step runs in a process of its own, which may fail, hang or run out of memory and leaves the
others alone; the most important ones come first. DIR/report.json and DIR/report.md are written anew
after each. bench/README.md says what the steps are and how to read them.

It ends with 0 if all steps were right, 1 if one was not, 2 for a wrong call, and 3 without a GPU
that can be used.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PROCESS = Path(__file__).with_name("gpu_steps.py")

Values = dict[str, Any]

# In the order in which they run, with the most seconds that each may take. Together that is more
# than there is: where an early one needs all of it, a late one does without.
STEPS = {
    "where": 40,
    "verify": 90,
    "parity": 170,
    "goldens": 30,
    "products": 60,
    "network": 300,
    "host": 120,
    "nan": 70,
    "fused": 40,
    "graphs": 150,
    "memory": 45,
    "blocks": 60,
    "autotune": 150,
}
SPARE = ("autotune",)  # for what time is left: without it nothing is missing
KINDS = ("fp32", "tf32", "fp16", "bf16")
LEAST = 10  # seconds that are worth starting a step for
PATIENCE = 5  # seconds from the signal to end to the one that ends
TAIL = 6000  # characters of the output of a step that failed

UNSET = ("NNXP_BACKEND", "NNXP_WORKERS", "CUPY_TF32", "NVIDIA_TF32_OVERRIDE")
"""Variables that would change what is measured; the steps start without them."""

ASK = (
    "import json, nnxp; found = nnxp.available_backends()['cupy']; "
    "print(json.dumps([found.ok, found.reason, found.hint]))"
)


@dataclass
class Step:
    """How a step went, and what it found: "ok", "failed", "cut" short by its time, "skipped"."""

    name: str
    state: str = "skipped"
    seconds: float = 0.0
    problem: str = ""
    figures: Values = field(default_factory=dict)
    output: str = ""


def environment() -> dict[str, str]:
    """The variables of a step's process: the sources come first, and what was asked for after."""
    kept = {name: value for name, value in os.environ.items() if name not in UNSET}
    path = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(path), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def no_gpu() -> str:
    """Why there is no GPU to run on, and what mends it; empty if there is one.

    Asked in a process of its own, so that this one takes no memory of the GPU.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", ASK],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=120,
        )
        ok, reason, hint = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = done.stderr.strip().splitlines()[-1:]
        return f"nnxp does not start here: {''.join(last)}"
    except subprocess.TimeoutExpired:
        return "CUDA did not answer within 120 s: look at nvidia-smi"
    return "" if ok else f"{reason}. {hint}"


def run(name: str, out: Path, backend: str, seconds: float) -> Step:
    """One step, ended when its time is up."""
    step, start, late = Step(name), time.monotonic(), False
    with tempfile.TemporaryDirectory(prefix="nnxp-gpu-") as folder:
        figures, output = Path(folder) / "figures.json", Path(folder) / "output"
        with open(output, "wb") as file:
            process = subprocess.Popen(
                [sys.executable, PROCESS, name, out, figures, backend],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment(),
                cwd=ROOT,
                start_new_session=True,  # so that what it starts can be ended with it
            )
            try:
                code = process.wait(seconds)
                step.problem = f"its process ended with code {code}" if code else ""
            except subprocess.TimeoutExpired:
                late = True
                step.problem = f"it took longer than the {seconds:.0f} s that it had"
            finally:
                _end(process)
        step.seconds = time.monotonic() - start
        if figures.exists():
            step.figures = plain(json.loads(figures.read_text()))
        said = list(problems(step.figures))
        step.problem = "; ".join(filter(None, [step.problem, *said]))[:2000]
        step.state = "failed" if said or (step.problem and not late) else "cut" if late else "ok"
        if step.problem:
            step.output = output.read_text(errors="replace")[-TAIL:]
    return step


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it and its group. First it may end by itself what stands outside the group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)


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


# the report


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
    return {"what": "gpu", **about, "goals": met, "steps": [vars(each) for each in steps]}


def markdown(found: Values) -> str:
    """The report, to be read."""
    lines = ["# nnxp on a GPU", ""]
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


# the command


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ci/gpu",
        description="Run everything that needs a GPU; without one, say why and end with 3.",
        epilog="ends with 0: all right, 1: some step was not, 2: wrong call, 3: no usable GPU",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="for the report; default: a new one under .check/"
    )
    parser.add_argument(
        "--minutes", type=float, default=9.5, metavar="N", help="for all steps together (9.5)"
    )
    parser.add_argument("--steps", nargs="+", metavar="NAME", choices=STEPS, default=list(STEPS))
    parser.add_argument(
        "--backend",
        choices=("cupy", "sim", "numpy"),
        default="cupy",
        help="sim or numpy: a try of the steps without a GPU, on tiny arrays; it measures nothing",
    )
    args = parser.parse_args()
    if not args.minutes > 0:
        parser.error("--minutes is above 0")
    return args


def main() -> int:
    args = arguments()
    end = time.monotonic() + 60 * args.minutes
    why = no_gpu() if args.backend == "cupy" else ""
    if why:
        print(f"ci/gpu: no usable GPU: {why}", file=sys.stderr)
        return 3
    date = time.strftime("%Y-%m-%d %H:%M:%S")
    out = (
        args.out or ROOT / ".check" / f"gpu-{date.translate(str.maketrans(' :', '--'))}"
    ).resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"ci/gpu: {out} cannot be written: {error}", file=sys.stderr)
        return 2
    about = {"backend": args.backend, "date": date, "minutes": args.minutes}
    about["unset"] = {name: os.environ[name] for name in UNSET if name in os.environ}
    steps: list[Step] = []
    for name in (each for each in STEPS if each in args.steps):
        seconds = min(STEPS[name], end - time.monotonic() - PATIENCE)
        print(f"{name}: ", end="", flush=True)
        if seconds < LEAST:
            steps.append(Step(name, problem="no time was left"))
        else:
            steps.append(run(name, out, args.backend, seconds))
        print(f"{steps[-1].state}, {steps[-1].seconds:.0f} s {steps[-1].problem[:300]}", flush=True)
        written(steps, about, out)
    print(f"\n{out / 'report.md'}\n{out / 'report.json'}")
    if args.backend == "cupy":
        print(HOW_TO_KEEP.format(out=out))
    return int(any(each.state != "ok" for each in steps if each.name not in SPARE))


HOW_TO_KEEP = """
What shows that it ran, for machines without a GPU (NAME: the card, such as h100):
  cp {out}/report.json bench/results/gpu-NAME.json
  mkdir -p bench/results/receipts tests/goldens
  cp {out}/receipt.json bench/results/receipts/NAME.json
  cp {out}/goldens/*.safetensors tests/goldens/"""


if __name__ == "__main__":
    sys.exit(main())
