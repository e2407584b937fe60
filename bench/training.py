"""Training steps against their bare products: python bench/training.py -o bench/results/NAME.json

A call is STEPS steps of plain gradient descent on one batch: forward, cross-entropy, backward, and
the parameters changed in place. Each contender has a process of its own and is timed in turns, as
in bench/run.py; whoever does not come to the same parameters is not timed. The floor are the bare
products of the same steps: two for the first layer, three for each other.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from nnxp.floor import FLOOR, PAUSE, TURN
from nnxp.testing.parity import Output
from race import Contender, race, serve

TASKS = ["784-512-256-10 128", "784-512-256-10 1024", "784-1024-1024-10 1024",
         "64-64-64-64-64-64-10 4096"]  # fmt: skip
SMALL = ["12-8-4 16"]
STEPS, RATE = 8, 0.1
ERROR = 5e-4
"""Of a change, relative to its size: six of these are allowed. A relu whose input is within
rounding of zero moves it by less, a row of 128 that is forgotten by more."""

Array = np.ndarray[Any, Any]
Run = Callable[[], Any]


class Task:
    """Sizes and rows of "784-512-10 128", with the same numbers for everybody."""

    def __init__(self, text: str) -> None:
        sizes, rows = text.split()
        self.sizes, self.rows = list(map(int, sizes.split("-"))), int(rows)
        rng = np.random.default_rng(1)  # with 0, a relu of 128 rows is within 1e-7 of its corner
        self.x = rng.normal(size=(self.rows, self.sizes[0])).astype("float32")
        self.labels = rng.integers(0, self.sizes[-1], self.rows)
        self.weights = [
            (rng.normal(size=(i, o)) * np.sqrt(2 / i)).astype("float32")
            for i, o in pairwise(self.sizes)
        ]
        self.biases = [np.zeros(o, "float32") for o in self.sizes[1:]]

    def trained(self) -> list[Array]:
        """All parameters after a call, in float64, by the formulas as they stand in textbooks."""
        weights, biases = (
            [p.astype("float64") for p in each] for each in (self.weights, self.biases)
        )
        one = np.eye(self.sizes[-1])[self.labels]
        for _ in range(STEPS):
            ys = [self.x.astype("float64")]
            for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
                z = ys[-1] @ w + b
                ys.append(np.maximum(z, 0) if i < len(weights) - 1 else z)
            p = np.exp(ys[-1] - ys[-1].max(axis=1, keepdims=True))
            d = (p / p.sum(axis=1, keepdims=True) - one) / self.rows
            for i in reversed(range(len(weights))):
                slope, worth = ys[i].T @ d, d.sum(axis=0)
                d = (d @ weights[i].T) * (ys[i] > 0)
                weights[i] -= RATE * slope
                biases[i] -= RATE * worth
        return weights + biases


class Distance:
    """How far each parameter is from where it should be, in units of its way; found when asked."""

    def __init__(self, task: Task, read: Callable[[], list[Any]]) -> None:
        self.task, self.read = task, read

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        start, norm = self.task.weights + self.task.biases, np.linalg.norm
        trios = zip(self.read(), self.task.trained(), start, strict=True)
        return np.array([norm(p - due) / norm(due - p0) for p, due, p0 in trios])


def repeated(task: Task, step: Run, read: Callable[[], list[Any]]) -> Run:
    def run() -> Distance:
        for _ in range(STEPS):
            step()
        return Distance(task, read)

    return run


# contenders


def bare_products(task: Task) -> Run:
    shapes = list(pairwise(task.sizes))
    ys = [np.full((task.rows, n), 1e-3, "float32") for n in task.sizes]
    forward = [np.empty((task.rows, o), "float32") for _, o in shapes]
    slopes = [np.empty(shape, "float32") for shape in shapes]
    back = [np.empty((task.rows, i), "float32") for i, _ in shapes]

    def step() -> None:
        for i, w in enumerate(task.weights):
            np.matmul(ys[i], w, out=forward[i])
        for i, w in reversed(list(enumerate(task.weights))):
            np.matmul(ys[i].T, ys[i + 1], out=slopes[i])
            if i:
                np.matmul(ys[i + 1], w.T, out=back[i])

    def run() -> Array:
        for _ in range(STEPS):
            step()
        due = ys[-2].astype("float64") @ task.weights[-1]
        return np.linalg.norm(forward[-1] - due, keepdims=True).ravel() / np.linalg.norm(due)

    return run


def ours(task: Task, workers: int | None = None) -> Run:
    import nnxp
    from nnxp.training.fit import Trainer

    ends = ["relu"] * (len(task.weights) - 1) + ["identity"]
    layers = map(nnxp.Dense.of, task.weights, task.biases, ends)
    trainer = Trainer(
        nnxp.Sequential(*layers), nnxp.losses.cross_entropy, nnxp.SGD(RATE), workers=workers
    )
    count = len(task.weights)
    names = [f"layers.{i}.{kind}" for kind in ("weight", "bias") for i in range(count)]
    return repeated(
        task,
        lambda: trainer.step((task.x, task.labels), None),
        lambda: [trainer.arrays[n] for n in names],
    )


def in_torch(task: Task, compiled: bool = False) -> Run:
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    modules: list[Any] = []
    for w, b in zip(task.weights, task.biases, strict=True):
        dense = torch.nn.Linear(*w.shape)
        dense.weight = torch.nn.Parameter(torch.from_numpy(np.ascontiguousarray(w.T)))
        dense.bias = torch.nn.Parameter(torch.from_numpy(b.copy()))
        modules += [dense, torch.nn.ReLU()]
    net = torch.nn.Sequential(*modules[:-1])
    optimizer = torch.optim.SGD(net.parameters(), RATE, fused=True)
    x, labels = torch.from_numpy(task.x), torch.from_numpy(task.labels)

    def loss() -> Any:
        return torch.nn.functional.cross_entropy(net(x), labels)

    formula = torch.compile(loss) if compiled else loss

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        formula().backward()
        optimizer.step()

    if compiled:  # it may not find a compiler
        formula()
    dense = modules[::2]
    return repeated(task, step, lambda: [d.weight.detach().numpy().T for d in dense]
                    + [d.bias.detach().numpy() for d in dense])  # fmt: skip


def in_jax(task: Task) -> Run:
    import jax
    from jax import numpy as jnp

    def loss(parameters: Any, x: Any, labels: Any) -> Any:
        weights, biases = parameters
        for w, b in zip(weights[:-1], biases[:-1], strict=True):
            x = jax.nn.relu(x @ w + b)
        logs = jax.nn.log_softmax(x @ weights[-1] + biases[-1])
        return -jnp.take_along_axis(logs, labels[:, None], axis=1).mean()

    def change(parameters: Any, x: Any, labels: Any) -> Any:
        slopes = jax.grad(loss)(parameters, x, labels)
        return jax.tree.map(lambda p, g: p - RATE * g, parameters, slopes)

    stepped = jax.jit(change, donate_argnums=0)
    now = jax.tree.map(jnp.array, (task.weights, task.biases))
    x, labels = jnp.array(task.x), jnp.array(task.labels)

    def step() -> None:
        nonlocal now
        now = jax.block_until_ready(stepped(now, x, labels))

    return repeated(task, step, lambda: [*now[0], *now[1]])


def in_sklearn(task: Task) -> Run:
    """One epoch of STEPS batches, so that what it checks at its door is shared by them."""
    from sklearn.neural_network import MLPClassifier

    warnings.simplefilter("ignore")
    x, y = np.tile(task.x, (STEPS, 1)), np.tile(task.labels, STEPS)
    net = MLPClassifier(tuple(task.sizes[1:-1]), solver="sgd", alpha=0.0, batch_size=task.rows,
                        learning_rate_init=RATE, momentum=0.0, shuffle=False)  # fmt: skip
    net.partial_fit(x, y, classes=range(task.sizes[-1]))
    for own, given in zip(net.coefs_ + net.intercepts_, task.weights + task.biases, strict=True):
        own[...] = given

    def run() -> Distance:
        net.partial_fit(x, y)
        return Distance(task, lambda: net.coefs_ + net.intercepts_)

    return run


CONTENDERS: dict[str, Callable[[Task], Run]] = {
    "nnxp": ours,
    "nnxp, 2 workers": lambda task: ours(task, 2),
    FLOOR: bare_products,
    "torch": in_torch,
    "torch.compile": lambda task: in_torch(task, compiled=True),
    "jax": in_jax,
    "sklearn": in_sklearn,
}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", metavar="NAME", default=TASKS)
    parser.add_argument(
        "--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS)
    )
    parser.add_argument("--rounds", type=int, default=15, metavar="N")
    parser.add_argument("--small", action="store_true", help="a tiny network, in seconds")
    parser.add_argument("-o", "--output", type=Path, metavar="JSON")
    args = parser.parse_args()
    quick = {"turn": 0.001, "pause": 0.0} if args.small else {"turn": TURN, "pause": PAUSE}
    found = []
    for text in SMALL if args.small else args.tasks:
        task = Task(text)
        due = np.zeros(2 * len(task.weights))
        contenders = [
            Contender(
                name,
                (sys.executable, __file__, "--enter", name, text),
                Output(due[:1] if name == FLOOR else due, np.array(ERROR), due.dtype),
            )
            for name in args.contenders
        ]
        title = f"{STEPS} steps of {text}"
        result = race(
            contenders, title=title, rows=task.rows * STEPS, rounds=args.rounds, say=say, **quick
        )
        print(result, flush=True)
        found.append(result.to_dict())
        if args.output:
            args.output.write_text(json.dumps(found, indent=1) + "\n")
    wrong = [e for each in found for e in each["results"] if "wrong" in (e["problem"] or "")]
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--enter"]:
        serve(lambda: (CONTENDERS[sys.argv[2]](Task(sys.argv[3])), {}))
    else:
        main()
