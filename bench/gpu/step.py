"""The process of a step:

    python -m gpu.step NAME FOLDER FIGURES.json BACKEND

A step yields figures under a title: {name: value}, or {row: {column: value}} for a table. They are
written down at once, so that a step that is ended leaves what it has found. A "problem" among them
is what makes a step fail; "out" is why another contender is not there, which is no fault of ours.
"""

from __future__ import annotations

import json
import signal
import sys
from importlib import import_module
from pathlib import Path

from gpu.here import Here, Values


def main() -> None:
    name, folder, path, backend = sys.argv[1:]
    # Ended by a signal, a step still ends what it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
    found: Values = {}
    for title, values in import_module(f"gpu.{name}").figures(Here(backend, Path(folder))):
        found[title] = values
        print(title, flush=True)
        beside = Path(f"{path}.new")
        beside.write_text(json.dumps(found, default=str))
        beside.replace(path)


if __name__ == "__main__":
    main()
