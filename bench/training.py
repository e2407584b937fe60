"""Training steps against their bare products: python bench/training.py -o bench/results/NAME.json

A call is STEPS steps of plain gradient descent on one batch: forward, cross-entropy, backward, and
the parameters changed in place. Each contender has a process of its own and is timed in turns, as
in bench/run.py; whoever does not come to the same parameters is not timed. The floor are the bare
products of the same steps: two for the first layer, three for each other. Those of a convolution
are of patches that lie ready; scikit-learn has none, and takes no part.
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
         "64-64-64-64-64-64-10 4096", "cnn 128"]  # fmt: skip
SMALL = ["12-8-4 16", "tiny-cnn 16"]
CNNS = {"cnn": (28, (1, 32, 64), (128, 10)), "tiny-cnn": (4, (2, 3, 4), (8, 4))}
"""The side of a picture, channels, and dense layers: each convolution is 3 x 3 on padded pictures,
relu, and the largest of 2 x 2."""
STEPS, RATE = 8, 0.1
ERROR = 5e-4
"""Of a change, relative to its size: six of these are allowed. A relu whose input is within
rounding of zero moves it by less, a row of 128 that is forgotten by more."""

Array = np.ndarray[Any, Any]
Run = Callable[[], Any]


class Task:
    """Layers and rows of "784-512-10 128" or "cnn 128", with the same numbers for everybody.

    A weight is (inputs, outputs), or (3, 3, inputs, outputs) for a convolution; those come first.
    """

    def __init__(self, text: str) -> None:
        name, rows = text.split()
        self.rows, shapes = int(rows), list[tuple[int, ...]]()
        sizes: tuple[int, ...]
        # With 0, a relu of 128 rows is within 1e-7 of its corner, and with 1 one of the CNN's.
        rng = np.random.default_rng(2 if name in CNNS else 1)
        if name in CNNS:
            side, channels, last = CNNS[name]
            x = rng.normal(size=(self.rows, side, side, channels[0]))
            shapes += [(3, 3, *pair) for pair in pairwise(channels)]
            sizes = ((side >> len(shapes)) ** 2 * channels[-1], *last)
        else:
            sizes = tuple(map(int, name.split("-")))
            x = rng.normal(size=(self.rows, sizes[0]))
        shapes += pairwise(sizes)
        self.x = x.astype("float32")
        self.labels = rng.integers(0, sizes[-1], self.rows)
        self.weights = [
            (rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[:-1]))).astype("float32")
            for shape in shapes
        ]
        self.biases = [np.zeros(shape[-1], "float32") for shape in shapes]

    def trained(self) -> list[Array]:
        """All parameters after a call, in float64, by the formulas as they stand in textbooks."""
        weights, biases = (
            [p.astype("float64") for p in each] for each in (self.weights, self.biases)
        )
        one = np.eye(self.weights[-1].shape[-1])[self.labels]
        for _ in range(STEPS):
            y, backs = self.x.astype("float64"), list[Any]()
            for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
                y, back = conv(y, w, b) if w.ndim == 4 else dense(y, w, b, i < len(weights) - 1)
                backs.append(back)
            p = np.exp(y - y.max(axis=1, keepdims=True))
            d = (p / p.sum(axis=1, keepdims=True) - one) / self.rows
            for i in reversed(range(len(weights))):
                d, slope, worth = backs[i](d)
                weights[i] -= RATE * slope
                biases[i] -= RATE * worth
        return weights + biases


def dense(x: Array, w: Array, b: Array, active: bool) -> tuple[Array, Any]:
    """relu(x w + b), and what takes its worth to that of x, w and b."""
    flat = x.reshape(len(x), -1)
    z = flat @ w + b

    def back(d: Array) -> tuple[Array, Array, Array]:
        d = d * (z > 0) if active else d
        return (d @ w.T).reshape(x.shape), flat.T @ d, d.sum(axis=0)

    return np.maximum(z, 0) if active else z, back


def conv(x: Array, w: Array, b: Array) -> tuple[Array, Any]:
    """The largest of 2 x 2 of relu(x * w + b), and what takes its worth to that of x, w and b."""
    rows, side = x.shape[:2]
    places = [(slice(i, i + side), slice(j, j + side)) for i in range(3) for j in range(3)]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = np.concatenate([padded[:, *place] for place in places], axis=-1)
    matrix = w.reshape(-1, w.shape[-1])
    z = patches @ matrix + b
    split = (rows, side // 2, 2, side // 2, 2, -1)
    four = np.moveaxis(z.reshape(split), 2, 3).reshape(rows, side // 2, side // 2, 4, -1)
    first = four.argmax(axis=3)[:, :, :, None]
    y = np.take_along_axis(four, first, axis=3)[:, :, :, 0]

    def back(d: Array) -> tuple[Array, Array, Array]:
        d = d.reshape(y.shape) * (y > 0)
        spread = np.where(np.arange(4)[:, None] == first, d[:, :, :, None], 0)
        dz = np.moveaxis(spread.reshape(*split[:2], split[3], 2, 2, -1), 3, 2).reshape(z.shape)
        dx, dpatches = np.zeros_like(padded), np.split(dz @ matrix.T, len(places), axis=-1)
        for place, each in zip(places, dpatches, strict=True):
            dx[:, *place] += each
        slope = np.tensordot(patches, dz, axes=([0, 1, 2], [0, 1, 2]))
        return dx[:, 1:-1, 1:-1], slope.reshape(w.shape), dz.sum(axis=(0, 1, 2))

    return np.maximum(y, 0), back


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
    weights = [w.reshape(-1, w.shape[-1]) for w in task.weights]
    size, counts = task.x[0].size // task.x.shape[-1], []
    for w in task.weights:  # a convolution multiplies a patch at each place of a picture
        counts.append(task.rows * (size if w.ndim == 4 else 1))
        size //= 4
    xs = [np.full((n, len(w)), 1e-3, "float32") for n, w in zip(counts, weights, strict=True)]
    forward = [np.empty((len(x), w.shape[1]), "float32") for x, w in zip(xs, weights, strict=True)]
    ds = [np.full_like(y, 1e-3) for y in forward]
    slopes, back = [np.empty_like(w) for w in weights], [np.empty_like(x) for x in xs]

    def step() -> None:
        for x, w, y in zip(xs, weights, forward, strict=True):
            np.matmul(x, w, out=y)
        for i, w in reversed(list(enumerate(weights))):
            np.matmul(xs[i].T, ds[i], out=slopes[i])
            if i:
                np.matmul(ds[i], w.T, out=back[i])

    def run() -> Array:
        for _ in range(STEPS):
            step()
        due = xs[-1].astype("float64") @ weights[-1]
        return np.linalg.norm(forward[-1] - due, keepdims=True).ravel() / np.linalg.norm(due)

    return run


def ours(task: Task, workers: int | None = None, place: str = "cpu") -> Run:
    import nnxp
    from nnxp.training.trainer import Trainer

    layers, paths, ends = list[nnxp.Layer](), [], ["relu"] * len(task.weights)
    ends[-1] = "identity"
    for w, b, end in zip(task.weights, task.biases, ends, strict=True):
        if w.ndim == 2 and layers and isinstance(layers[-1], nnxp.MaxPool):
            layers.append(nnxp.Flatten())
        paths.append(f"layers.{len(layers)}")
        if w.ndim == 4:
            layers += [nnxp.Conv.of(w, b, end, padding=1), nnxp.MaxPool((2, 2))]
        else:
            layers.append(nnxp.Dense.of(w, b, end))
    model = nnxp.Sequential(*layers).to(place)
    trainer = Trainer(model, nnxp.losses.cross_entropy, nnxp.SGD(RATE), workers=workers)
    batch = tuple(nnxp.to_backend(x, place) for x in (task.x, task.labels))
    names = [f"{path}.{kind}" for kind in ("weight", "bias") for path in paths]
    return repeated(
        task,
        lambda: trainer.step(batch, None),
        lambda: [nnxp.asnumpy(trainer.arrays[n]) for n in names],
    )


def in_torch(task: Task, compiled: bool = False, device: str = "cpu") -> Run:
    import torch
    from torch import nn

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    convs, head, layers = nn.Sequential(), nn.Sequential(), list[Any]()
    for w, b in zip(task.weights, task.biases, strict=True):
        if w.ndim == 4:  # channels last in memory, as it is faster
            layer: Any = nn.Conv2d(w.shape[2], w.shape[3], 3, padding=1)
            layer = layer.to(memory_format=torch.channels_last)
            convs.extend([layer, nn.ReLU(), nn.MaxPool2d(2)])
        else:
            layer = nn.Linear(*w.shape)
            head.extend([nn.ReLU(), layer] if len(head) else [layer])
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(np.moveaxis(w, (-1, -2), (0, 1))))
            layer.bias.copy_(torch.from_numpy(b))
        layers.append(layer)
    convs.to(device), head.to(device)
    parameters = [*convs.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, RATE, fused=True)
    x, labels = (torch.from_numpy(each).to(device) for each in (task.x, task.labels))

    def loss() -> Any:
        flat = x
        if len(convs):  # in torch's order of axes, as views
            flat = convs(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1)
        return nn.functional.cross_entropy(head(flat), labels)

    formula = torch.compile(loss) if compiled else loss

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        formula().backward()
        optimizer.step()

    if compiled:  # it may not find a compiler
        formula()
    return repeated(
        task,
        step,
        lambda: (
            [np.moveaxis(each.weight.detach().cpu().numpy(), (0, 1), (-1, -2)) for each in layers]
            + [each.bias.detach().cpu().numpy() for each in layers]
        ),
    )


def in_jax(task: Task) -> Run:
    import jax
    from jax import lax
    from jax import numpy as jnp

    def layer(x: Any, w: Any, b: Any) -> Any:
        if w.ndim == 2:
            return jax.nn.relu(x.reshape(len(x), -1) @ w + b)
        order = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=order)
        two = (1, 2, 2, 1)
        return lax.reduce_window(jax.nn.relu(y + b), -jnp.inf, lax.max, two, two, "VALID")

    def loss(parameters: Any, x: Any, labels: Any) -> Any:
        weights, biases = parameters
        for w, b in zip(weights[:-1], biases[:-1], strict=True):
            x = layer(x, w, b)
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
    hidden = tuple(w.shape[1] for w in task.weights[:-1])
    net = MLPClassifier(hidden, solver="sgd", alpha=0.0, batch_size=task.rows,
                        learning_rate_init=RATE, momentum=0.0, shuffle=False)  # fmt: skip
    net.partial_fit(x, y, classes=range(task.weights[-1].shape[1]))
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
            if name != "sklearn" or task.x.ndim == 2
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
