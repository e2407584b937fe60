"""MNIST-1D by its own networks: python bench/mnist_1d.py --torch -o bench/results/mnist_1d.json

MNIST-1D has 4,000 rows to learn from and 1,000 to be tested by, of 40 numbers and ten classes. A
linear network, dense layers, a convolutional and a recurrent network do with it what its authors
publish: 32, 68, 94 and 91 per cent (their notebook's MLP: 65).   [Greydanus & Kobak 2024,
arXiv:2011.14439] Networks, optimiser, batch and steps are those of the authors' notebook; the rows
are made by the package's own generator with its own seed. Needs `pip install mnist1d`.

--torch trains the same networks by PyTorch, as the notebook does, for as many seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import nnxp

Data = tuple[np.ndarray[Any, Any], ...]

PUBLISHED = {"linear": 32, "mlp": 68, "cnn": 94, "gru": 91}
"""Per cent of the test rows, by the table in the README of github.com/greydanus/mnist1d."""
RATE, BATCH, STEPS = 1e-2, 100, 6000


def data() -> Data:
    """(x (4000, 40), labels (4000,), and 1,000 of each to test by)"""
    from mnist1d.data import get_dataset_args, make_dataset

    made = make_dataset(get_dataset_args())
    x, x_test = (made[name].astype("float32") for name in ("x", "x_test"))
    return x, made["y"], x_test, made["y_test"]


def network(name: str, seed: int) -> nnxp.Layer:
    """The authors' network, with initial values of nnxp's."""
    rng = np.random.default_rng(seed)
    if name == "linear":
        return nnxp.Dense(40, 10, rng=rng)
    if name == "mlp":
        hidden = nnxp.Residual(nnxp.Dense(100, 100, "relu", rng=rng))
        return nnxp.Sequential(
            nnxp.Dense(40, 100, "relu", rng=rng), hidden, nnxp.Dense(100, 10, rng=rng)
        )
    if name == "cnn":
        windows = [(1, 5), (25, 3), (25, 3)]
        convs = [
            nnxp.Conv(inputs, 25, (window,), "relu", stride=2, padding=1, rng=rng)
            for inputs, window in windows
        ]
        return nnxp.Sequential(
            nnxp.Reshape((40, 1)), *convs, nnxp.Flatten(), nnxp.Dense(125, 10, rng=rng)
        )
    gru = nnxp.GRU(1, 6, bidirectional=True, rng=rng)
    return nnxp.Sequential(nnxp.Reshape((40, 1)), gru, nnxp.Flatten(), nnxp.Dense(480, 10, rng=rng))


def ours(name: str, seed: int, given: Data, steps: int = STEPS) -> float:
    """The accuracy in per cent on the test rows after so many steps."""
    x, y, x_test, y_test = given
    fitted = nnxp.fit(
        network(name, seed), x, y, loss="cross_entropy", optimizer=nnxp.Adam(RATE), batch=BATCH,
        epochs=steps * BATCH // len(x), rng=seed,
    )  # fmt: skip
    return 100 * float((nnxp.predict(fitted.model, x_test, "numpy").argmax(1) == y_test).mean())


def in_torch(name: str, seed: int, given: Data, steps: int = STEPS) -> float:
    """The same by PyTorch, with its initial values and, as in the notebook, rows in their order."""
    import torch
    from torch import nn

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = {
                "linear": lambda: nn.Identity(),
                "mlp": lambda: nn.Sequential(nn.Linear(40, 100), nn.ReLU()),
                "cnn": lambda: nn.Sequential(
                    *[
                        layer
                        for inputs, window in ((1, 5), (25, 3), (25, 3))
                        for layer in (nn.Conv1d(inputs, 25, window, 2, 1), nn.ReLU())
                    ]
                ),
                "gru": lambda: nn.GRU(1, 6, batch_first=True, bidirectional=True),
            }[name]()
            self.inner = nn.Linear(100, 100) if name == "mlp" else None
            sizes = {"linear": 40, "mlp": 100, "cnn": 125, "gru": 480}
            self.last = nn.Linear(sizes[name], 10)

        def forward(self, x: Any) -> Any:
            x = x[:, None] if name == "cnn" else x[:, :, None] if name == "gru" else x
            h = self.first(x)
            h = h[0] if name == "gru" else h
            h = h if self.inner is None else h + self.inner(h).relu()
            return self.last(h.flatten(1))

    torch.manual_seed(seed)
    net = Network()
    x, y, x_test, y_test = map(torch.as_tensor, given)
    optimizer = torch.optim.Adam(net.parameters(), RATE)
    for step in range(steps):
        at = step * BATCH % len(x)
        nn.functional.cross_entropy(net(x[at : at + BATCH]), y[at : at + BATCH]).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return 100 * float((net(x_test).argmax(1) == y_test).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=list(PUBLISHED), default=list(PUBLISHED))
    parser.add_argument("--seeds", type=int, default=5, metavar="N")
    parser.add_argument("--torch", action="store_true", help="PyTorch's, too")
    parser.add_argument("-o", "--output", type=Path, metavar="JSON")
    args = parser.parse_args()
    given = data()
    trainers: dict[str, Callable[[str, int, Data], float]] = {"nnxp": ours}
    if args.torch:
        trainers["torch"] = in_torch
    found = []
    for name in args.networks:
        for who, trainer in trainers.items():
            start, scores = time.process_time(), []
            for seed in range(args.seeds):
                scores.append(round(trainer(name, seed, given), 1))
                print(f"{name} {who} seed {seed}: {scores[-1]} %", file=sys.stderr, flush=True)
            seconds = (time.process_time() - start) / args.seeds
            entry = {"network": name, "by": who, "published": PUBLISHED[name],
                     "mean": round(float(np.mean(scores)), 2), "scores": scores,
                     "steps": STEPS, "cpu_seconds": round(seconds, 1)}  # fmt: skip
            found.append(entry)
            print(entry, flush=True)
        if args.output:
            text = json.dumps({"what": "mnist_1d", "networks": found}, indent=1)
            args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
