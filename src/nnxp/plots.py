"""Pictures of networks, of training and of agreement. They need matplotlib (the extra `plots`).

Every function answers a `matplotlib.figure.Figure`: `figure.savefig("picture.svg")` writes it. In a
notebook, `%matplotlib inline` shows what the last line of a cell answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from math import ceil, isfinite, prod, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np

from nnxp._arrays import Array, HostArray, Shape
from nnxp._errors import BackendUnavailable, OptionError, ShapeError
from nnxp.backend import asnumpy
from nnxp.layers._layer import Layer
from nnxp.program import program as programs
from nnxp.program import traced

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["activations", "confusion", "learning_curve", "parity", "program", "weights"]

BAR, FAILED = "#4878a8", "#c0392b"
LEAST = 0.01  # units of the bound: where the bars of a parity report begin
MOST = 64  # pictures of weights that are drawn together


def learning_curve(history: Sequence[Mapping[str, float]]) -> Figure:
    """The loss by epoch, and the validation loss where there is one.

        fitted = nnxp.fit(net, x, labels, loss="cross_entropy", epochs=3, rng=0)
        nnxp.plots.learning_curve(fitted.history).savefig("learning.svg")

    Args:
        history: `Fitted.history`: a mapping for each epoch, with `epoch` and `loss`.

    Raises:
        OptionError: the history is empty.
        BackendUnavailable: matplotlib is not installed.
    """
    if not history:
        raise OptionError("the history is empty: there is no epoch to draw")
    figure, axes = _figure(6, 3.5)
    epochs = [entry["epoch"] for entry in history]
    for name in ("loss", "validation"):
        if name in history[0]:
            axes.plot(epochs, [entry[name] for entry in history], marker="o", label=name)
    axes.set(xlabel="epoch", ylabel="loss")
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    return figure


def weights(weight: Array, shape: Shape | None = None) -> Figure:
    """What each neuron of a layer looks for: its weights as a picture, blue below 0, red above.

        nnxp.plots.weights(net.layers[0].weight, (8, 8)).savefig("weights.svg")

    Args:
        weight: (inputs, outputs), as of `Dense`, on any backend. The first 64 outputs are drawn.
        shape: of one picture, (height, width); without it inputs are a square.

    Raises:
        ShapeError: the inputs do not fill pictures of this shape.
        BackendUnavailable: matplotlib is not installed.
    """
    host = asnumpy(weight)
    side = round(sqrt(host.shape[0])) if host.ndim == 2 else 0
    size = (side, side) if shape is None else tuple(shape)
    if host.ndim != 2 or len(size) != 2 or prod(size) != host.shape[0]:
        raise ShapeError(
            f"weights (inputs, outputs) with inputs that are a picture of {size}, "
            f"but they are {host.shape}; shape=(height, width) says another"
        )
    pictures = host.T[:MOST].reshape(-1, *size).astype("float32")
    columns = ceil(sqrt(len(pictures)))
    lines = ceil(len(pictures) / columns)
    figure: Figure = _matplotlib("figure").Figure(figsize=(0.75 * columns, 0.75 * lines))
    most = float(np.abs(pictures).max()) or 1.0
    for i, picture in enumerate(pictures, start=1):
        axes = figure.add_subplot(lines, columns, i)
        axes.imshow(picture, cmap="RdBu_r", vmin=-most, vmax=most)
        axes.set_axis_off()
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.99, 0.08, 0.08)
    return figure


def activations(model: Layer, *inputs: Array) -> Figure:
    """How the numbers that each layer answers are spread: a box from quartile to quartile.

    Values of all rows and elements together: a layer whose box lies at 0 answers next to nothing,
    one whose whiskers reach far makes float16 overflow.

        nnxp.plots.activations(net, x).savefig("activations.svg")

    Args:
        model: a model, and
        inputs: rows for it, as `model.activations` takes them.

    Raises:
        ShapeError, DtypeMismatch, DeviceMismatch: as of `model.activations`.
        BackendUnavailable: matplotlib is not installed.
    """
    arrays = _arrays(model.activations(*inputs))
    outputs = {name: asnumpy(y).astype("float64") for name, y in arrays}
    figure, axes = _figure(7, 0.35 * len(outputs) + 1)
    names = list(outputs)[::-1]  # matplotlib draws upwards
    boxes = [outputs[name].ravel() for name in names]
    axes.boxplot(boxes, orientation="horizontal", whis=(0, 100), tick_labels=names)
    axes.set_xlabel("least, quartiles, largest")
    return figure


def parity(report: Any) -> Figure:
    """The error of each layer on each backend, in units of its bound; red is too large.

        report = nnxp.testing.parity_report(net, x)
        nnxp.plots.parity(report).savefig("parity.svg")

    Args:
        report: the ParityReport of `nnxp.testing.parity_report`.

    Raises:
        BackendUnavailable: matplotlib is not installed.
    """
    checks = report.checks[::-1]
    figure, axes = _figure(8, 0.25 * len(checks) + 1.2)
    finite = [check.ratio for check in checks if isfinite(check.ratio)]
    most = max(10 * report.limit, *finite, 0)
    axes.barh(
        range(len(checks)),
        [max(min(check.ratio, most), LEAST) for check in checks],
        color=[BAR if check.ok else FAILED for check in checks],
    )
    axes.set_yticks(range(len(checks)), [f"{c.name} {c.what:.40} · {c.backend}" for c in checks])
    axes.axvline(report.limit, color=FAILED, linestyle="--", linewidth=1)
    axes.set(xscale="log", xlim=(LEAST, most))
    verdict = "all agree" if report.ok else "NOT all agree"
    axes.set_xlabel(f"error in units of the bound; {report.limit:g} are allowed: {verdict}")
    return figure


def program(program: programs.Program) -> Figure:
    """The steps of a program from top to bottom, and what goes from which to which.

        nnxp.plots.program(net.program((1, 64))).savefig("program.svg")

    Args:
        program: as of `net.program((1, 784))`.

    Raises:
        BackendUnavailable: matplotlib is not installed.
    """
    places = {value: i for i, value in enumerate(program.inputs)}
    texts = [
        f"{v.name or f'x{i}'}  {traced.shape_text(v.shape)}" for i, v in enumerate(program.inputs)
    ]
    for step in program.steps:
        places.update(dict.fromkeys(step.outputs, len(texts)))
        shapes = ", ".join(traced.shape_text(value.shape) for value in step.outputs)
        texts.append(f"{step.name}  {shapes}" + (f"\n{step.path}" if step.path else ""))
    figure, axes = _figure(4, 0.6 * len(texts) + 0.2)
    axes.set(xlim=(-1, 1.4), ylim=(-len(texts) + 0.5, 0.5))
    axes.set_axis_off()
    for i, text in enumerate(texts):
        axes.text(0, -i, text, ha="center", va="center", fontsize=7)
        fill = "#e8f0e4" if i < len(program.inputs) else "#e3ebf3"
        axes.add_patch(_matplotlib("patches").Rectangle((-0.9, -i - 0.33), 1.8, 0.66, color=fill))
    for to, step in enumerate(program.steps, start=len(program.inputs)):
        for source in {places[value] for value in step.values if value in places}:
            near = to == source + 1
            x, edge = (0, 0.33) if near else (0.9, 0)  # from below one to the next, or past others
            bend = f"arc3,rad={0 if near else -0.25}"
            arrow = {"arrowstyle": "->", "color": BAR, "connectionstyle": bend, "shrinkA": 0}
            axes.annotate(
                "", (x, edge - to), (x, -edge - source), arrowprops=arrow | {"shrinkB": 0}
            )
    return figure


def confusion(labels: Any, guesses: Any, names: Sequence[object] | None = None) -> Figure:
    """How often each class was taken for which: rows are true classes, columns guesses.

        nnxp.plots.confusion(labels, net(x).argmax(axis=1)).savefig("confusion.svg")

    Args:
        labels: (n,), the true classes, whole numbers from 0.
        guesses: (n,), the guessed ones, such as `nnxp.predict(net, x).argmax(axis=1)`.
        names: of the classes, such as `net.classes`; without them their numbers.

    Raises:
        ShapeError: labels and guesses are not as many.
        OptionError: they are no whole numbers from 0, or beyond the names; or matplotlib is not
            installed.
    """
    counts = _counted(asnumpy(labels), asnumpy(guesses), None if names is None else len(names))
    size = len(counts)
    figure, axes = _figure(0.5 * size + 1.5, 0.5 * size + 1)
    axes.imshow(counts, cmap="Blues")
    for (i, j), count in np.ndenumerate(counts):
        if count:
            dark = count > counts.max() / 2
            axes.text(
                j, i, int(count), ha="center", va="center", color="white" if dark else "black"
            )
    shown = [str(name) for name in (range(size) if names is None else names)]
    axes.set_xticks(range(size), shown)
    axes.set_yticks(range(size), shown)
    axes.set(xlabel="guess", ylabel="true class")
    return figure


def _counted(labels: HostArray, guesses: HostArray, size: int | None) -> HostArray:
    """How many rows have each pair of true class and guess."""
    if labels.ndim != 1 or labels.shape != guesses.shape:
        raise ShapeError(
            f"labels (n,) and guesses (n,) are as many, not {labels.shape} and {guesses.shape}"
        )
    both = np.concatenate([labels, guesses])
    if not len(both) or both.dtype.kind not in "iub" or both.min() < 0:
        raise OptionError("labels and guesses are classes, whole numbers from 0, at least one")
    classes = int(both.max()) + 1 if size is None else size
    if both.max() >= classes:
        raise OptionError(f"there are {classes} names, but class {both.max()} was met")
    counts = np.zeros((classes, classes), "int64")
    np.add.at(counts, (labels.astype("int64"), guesses.astype("int64")), 1)
    return counts


def _arrays(outputs: Mapping[str, Any]) -> list[tuple[str, Array]]:
    """The arrays by name; of a layer that answers several, by name and number."""
    return [
        (f"{name}[{i}]" if isinstance(y, tuple) else name, array)
        for name, y in outputs.items()
        for i, array in enumerate(y if isinstance(y, tuple) else (y,))
    ]


def endings() -> list[str]:
    """How the name of a picture may end.

        assert ".svg" in nnxp.plots.endings()

    Raises:
        BackendUnavailable: matplotlib is not installed.
    """
    return sorted(f".{name}" for name in _matplotlib("backend_bases").FigureCanvasBase.filetypes)


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    """A figure with one pair of axes; no window, and no figure that somebody must close."""
    figure = _matplotlib("figure").Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _matplotlib(part: str) -> Any:
    try:
        return import_module(f"matplotlib.{part}")
    except ImportError as error:
        raise BackendUnavailable(
            f"pictures need matplotlib ({error})", 'pip install "nnxp[plots]" brings it'
        ) from None
