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
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpu.report import Step, plain, problems, without_lt, written
from process import end, start

ROOT = Path(__file__).parents[2]
PROCESS = ("-P", "-m", "gpu.step")

# In the order in which they run, what is right before what is fast, with the most seconds that each
# may take. Together that is more than there is: where an early one needs all of it, a late one does
# without.
STEPS = {
    "where": 40,
    "verify": 90,
    "parity": 170,
    "goldens": 30,
    "replays": 30,
    "nan": 70,
    "products": 60,
    "network": 300,
    "host": 120,
    "fused": 40,
    "graphs": 120,
    "models": 120,
    "training": 90,
    "memory": 45,
    "blocks": 60,
    "autotune": 150,
    "compiled": 590,
}
SPARE = ("autotune", "compiled")  # for what time is left: without it nothing is missing
LEAST = 10  # seconds that are worth starting a step for
PATIENCE = 5  # seconds from the signal to end to the one that ends
TAIL = 6000  # characters of the output of a step that failed

UNSET = ("NNXP_BACKEND", "NNXP_WORKERS", "CUPY_TF32", "NVIDIA_TF32_OVERRIDE")
"""Variables that would change what is measured; the steps start without them."""

ASK = (
    "import json, nnxp; found = nnxp.available_backends()['cupy']; "
    "print(json.dumps([found.ok, found.reason, found.hint]))"
)


def environment() -> dict[str, str]:
    """The variables of a step's process: the sources come first, and what was asked for after."""
    kept = {name: value for name, value in os.environ.items() if name not in UNSET}
    path = [str(ROOT / "src"), str(ROOT / "bench"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(path), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def no_gpu() -> str:
    """Why there is no GPU to run on, and what fixes it; empty if there is one.

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
    step, began, late = Step(name), time.monotonic(), False
    with tempfile.TemporaryDirectory(prefix="nnxp-gpu-") as folder:
        figures, output = Path(folder) / "figures.json", Path(folder) / "output"
        with open(output, "wb") as file:
            process = start(
                [sys.executable, *PROCESS, name, out, figures, backend],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment(),
                cwd=ROOT,
            )
            try:
                code = process.wait(seconds)
                step.problem = f"its process ended with code {code}" if code else ""
            except subprocess.TimeoutExpired:
                late = True
                step.problem = f"it took longer than the {seconds:.0f} s that it had"
            finally:
                end(process, PATIENCE)
        step.seconds = time.monotonic() - began
        if figures.exists():
            step.figures = plain(json.loads(figures.read_text()))
        said = list(problems(step.figures))
        step.problem = "; ".join(filter(None, [step.problem, *said]))[:2000]
        step.state = "failed" if said or (step.problem and not late) else "cut" if late else "ok"
        if step.problem:
            step.output = output.read_text(errors="replace")[-TAIL:]
    return step


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
        choices=("cupy", "sim"),
        default="cupy",
        help="sim: a try of the steps without a GPU, on tiny arrays; it measures nothing",
    )
    args = parser.parse_args()
    if not args.minutes > 0:
        parser.error("--minutes is above 0")
    return args


def main() -> int:
    args = arguments()
    until = time.monotonic() + 60 * args.minutes
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
        seconds = min(STEPS[name], until - time.monotonic() - PATIENCE)
        print(f"{name}: ", end="", flush=True)
        if seconds < LEAST:
            steps.append(Step(name, problem="no time was left"))
        else:
            steps.append(run(name, out, args.backend, seconds))
        print(f"{steps[-1].state}, {steps[-1].seconds:.0f} s {steps[-1].problem[:300]}", flush=True)
        written(steps, about, out)
        if said := without_lt(steps[-1:]):
            print(said, flush=True)
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
