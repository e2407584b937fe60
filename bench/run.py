"""The races: python bench/run.py -o bench/results/NAME.json

Every contender computes the same networks, each in a process of its own; what is wrong is not
timed. bench/README.md says how to read the result, bench/report.py makes tables and plots of it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import networks
import nnxp
from contenders import rivals
from contenders.ours import TILED
from networks import Network, Task
from nnxp._comparison import Comparison
from nnxp.floor import FLOOR, PAUSE, TURN
from race import ABSENT, Contender, race

PROCESS = Path(__file__).with_name("entrant.py")
CONTENDERS = list(rivals(on_cpu=True))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def entered(task: Task, names: Sequence[str]) -> list[Contender]:
    """The contenders, and what each should compute."""
    due, floor = task.expected(""), task.expected(FLOOR)
    return [
        Contender(
            name,
            (sys.executable, PROCESS, name, str(task)),
            floor if name in (FLOOR, TILED) else due,
        )
        for name in names
    ]


def raced(network: Network, args: argparse.Namespace) -> Comparison:
    """All contenders in turns."""
    task = Task(network, trial=0) if args.small else Task(network)
    contenders = entered(task, args.contenders)
    return args.race(contenders, title=str(network), rows=network.rows)  # type: ignore[no-any-return]


def alone(network: Network, args: argparse.Namespace) -> Comparison:
    """One contender after the other, at its first setting: what matters is its memory."""
    found = [
        args.race([each], title=str(network), rows=network.rows, rounds=1)
        for each in entered(Task(network, trial=0), args.contenders)
    ]
    results = tuple(result for each in found for result in each.results)
    return Comparison(str(network), network.rows, 1, found[0].place, results)


def rounded(value: Any) -> Any:
    """The same with five figures to each number: more are noise."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--networks",
        nargs="*",
        metavar="NAME",
        help='such as "784-128-64-10 relu"; the name alone runs none',
    )
    parser.add_argument(
        "--contenders", nargs="+", metavar="NAME", choices=CONTENDERS, default=CONTENDERS
    )
    parser.add_argument("--rounds", type=int, default=15, metavar="N")
    parser.add_argument("--latency", action="store_true", help="few rows at a time, too")
    parser.add_argument("--memory", action="store_true", help="memory against rows, too")
    parser.add_argument("--coretype", metavar="NAME", help="pin OpenBLAS to these kernels")
    parser.add_argument("--small", action="store_true", help="everything once, on tiny networks")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="JSON")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds is at least 1")
    known = networks.SMALL if args.small else networks.NETWORKS
    names = [str(each) for each in known]
    wrong = [name for name in args.networks or [] if name not in names]
    if wrong:
        parser.error(f"--networks {wrong[0]!r} is none of {', '.join(map(repr, names))}")
    args.networks = [each for each in known if args.networks is None or str(each) in args.networks]
    args.settings = {"OPENBLAS_CORETYPE": args.coretype} if args.coretype else {}
    quick = {"turn": 0.001, "pause": 0.0} if args.small else {"turn": TURN, "pause": PAUSE}
    args.race = partial(race, rounds=args.rounds, settings=args.settings, say=say, **quick)
    return args


def main() -> None:
    args = arguments()
    latency, memory = networks.LATENCY, networks.MEMORY
    if args.small:
        latency, memory = networks.SMALL_LATENCY, networks.SMALL_MEMORY
    plan = {
        "throughput": (raced, args.networks),
        "latency": (raced, latency if args.latency else []),
        "memory": (alone, memory if args.memory else []),
    }
    found: dict[str, Any] = {"what": "races", "nnxp": nnxp.__version__, "small": args.small}
    found |= {kind: [] for kind in plan}
    right = True
    for kind, (how, chosen) in plan.items():
        for network in chosen:
            result = how(network, args)
            say(str(result))
            problems = [each.problem for each in result.results if each.problem]
            right &= all(problem.startswith(ABSENT) for problem in problems)
            values = result.to_dict()
            found["place"] = values.pop("place")
            found[kind].append(values)
            # What there is so far is kept, whatever may come.
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(rounded(found), indent=1) + "\n")
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
