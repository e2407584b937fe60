"""A table and the name of one of its columns: a network that tells it from the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from typing import Any

import numpy as np

from nnxp._arrays import HostArray
from nnxp._errors import OptionError, RowsError
from nnxp._printed import Printed
from nnxp._progress import Progress
from nnxp.backend import Backend
from nnxp.engine import predict
from nnxp.io.rows import TABLES
from nnxp.io.tables import Reading, ending, open_table
from nnxp.layers._layer import Layer
from nnxp.layers.columns import Take
from nnxp.layers.containers import Sequential
from nnxp.layers.dense import Dense
from nnxp.layers.dropout import Dropout
from nnxp.layers.norm import Standardize
from nnxp.training.fit import fit
from nnxp.training.optimizers import AdamW

FEWEST = 20
"""Rows, at least: of them some are held out."""
MOST_CLASSES = 20
"""Whole numbers of so many different values, at most, are taken for classes."""
HELD_OUT, VALIDATION = (0, 5), (2,)
"""Of ten rows those that only the score sees, and those that tell when training ends."""
DROPOUT, PATIENCE, BATCH, RATE = 0.1, 10, 128, 2e-3


@dataclass(frozen=True)
class TableReport(Printed):
    """What a network that was trained on a table is, and how well it does on rows held out.

    `score` is the accuracy for classes and R² for numbers, on `held_out` rows that were not trained
    on; `baseline` is that of a constant: the most frequent class, or the mean of the others.
    `history` has the losses of each epoch, as `Fitted.history` has them.
    """

    target: str
    task: str
    columns: list[str]
    classes: list[Any] | None
    rows: int
    held_out: int
    measure: str
    score: float
    baseline: float
    error: float | None
    history: list[dict[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        what = f"one of {len(self.classes)} classes" if self.classes else "a number"
        error = "" if self.error is None else f", root mean square error {self.error:.4g}"
        return "\n".join(
            [
                f"target    {self.target}, {what}, from {len(self.columns)} columns",
                f"trained   on {self.rows:,} rows for {len(self.history)} epochs",
                f"held out  {self.held_out:,} rows: {self.measure} {self.score:.4f}{error}",
                f"baseline  {self.measure} {self.baseline:.4f}, of a constant",
            ]
        )


def train_on_table(
    path: str | PathLike[str],
    target: str,
    *,
    reading: Reading | None = None,
    task: str = "auto",
    hidden: Sequence[int] = (128, 64),
    epochs: int = 100,
    backend: str | Backend = "numpy",
    seed: int = 0,
    progress: Progress = False,
) -> tuple[Layer, TableReport]:
    """A network that predicts the column `target` of a table from the others, and a report.

    `target` is a name, or a number from 0. Text, true and false, and whole numbers of at most 20
    values are classes, others numbers; `task` says so instead, "classes" or "numbers". The network
    standardises its columns, has relu layers of these sizes, and answers probabilities (rows,
    classes) or the number (rows,). It trains by AdamW on seven rows of ten until the loss on a
    tenth of the rows has not been lower for ten epochs; the last two are held out for the score.
    It knows the names of its columns, and of its classes. The whole table is held in memory.

        model, report = train_on_table("iris.csv", "species")

    Raises OptionError for a column that is not there, RowsError for rows that cannot be learned
    from, or a target that cannot be predicted.
    """
    if task not in ("auto", "classes", "numbers"):
        raise OptionError(f'task is "auto", "classes" or "numbers", not {task!r:.60}')
    if any(size < 1 for size in hidden):
        raise OptionError(f"hidden layers have at least one unit, not {list(hidden)}")
    x, values, names, title = _read(path, target, reading or Reading())
    if len(x) < FEWEST:
        rows = "1 row" if len(x) == 1 else f"{len(x)} rows"
        raise RowsError(f"{path} has {rows}: training, and holding some out, takes {FEWEST}")
    classes = _classes(values, task, title)
    unseen, valid, seen = _split(values, seed)
    with np.errstate(over="ignore"):
        mean, scale = x[seen].mean(axis=0), x[seen].std(axis=0)
    if not np.isfinite(scale).all():
        name = (names or range(x.shape[1]))[int(np.argmin(np.isfinite(scale)))]
        raise RowsError(
            f"{path}: the numbers in column {name!r} are too large for their variance; scale them"
        )
    first = Standardize(mean, np.where(scale > 0, scale, 1))
    z = (x - first.mean) / first.scale  # in float64, once
    center, spread = 0.0, 1.0
    if classes is None:
        y = np.asarray(values, "float64")
        if abs(y).max() > np.finfo("float32").max:
            raise RowsError(
                f"the target {title!r} goes beyond {np.finfo('float32').max:.3g}, the largest "
                "number that the network answers; scale it"
            )
        center, spread = float(y[seen].mean()), float(y[seen].std()) or 1.0
        y = (y - center) / spread
    else:
        y = np.searchsorted(classes, values)
    net = _network(
        x.shape[1], hidden, 1 if classes is None else len(classes), classes is None, seed
    )
    fitted = fit(
        net.to(backend),
        z[seen],
        y[seen],
        loss="mean_square" if classes is None else "cross_entropy",
        optimizer=AdamW(RATE),
        epochs=epochs,
        batch=BATCH,
        validation=(z[valid], y[valid]),
        patience=PATIENCE,
        rng=seed,
        progress=progress,
    )
    *layers, last = fitted.model.to("numpy").layers  # type: ignore[attr-defined]
    if classes is None:
        last = Dense.of(last.weight * np.float32(spread), last.bias * np.float32(spread)
                        + np.float32(center))  # fmt: skip
        layers += [last, Take(0)]
    else:
        layers.append(last)
    model = Sequential(
        first, *layers, columns=names, classes=None if classes is None else classes.tolist()
    )
    scores = _score(model, x[unseen], values[unseen], values[seen], classes)
    report = TableReport(
        title, "numbers" if classes is None else "classes",
        list(names) if names else [str(i) for i in range(x.shape[1])],
        None if classes is None else classes.tolist(),
        len(seen), len(unseen), *scores, fitted.history,
    )  # fmt: skip
    return model, report


def _read(
    path: str | PathLike[str], target: str, reading: Reading
) -> tuple[HostArray, HostArray, tuple[str, ...] | None, str]:
    """(inputs (rows, columns), target (rows,), names of the inputs, name of the target)"""
    if ending(path) not in TABLES:
        raise OptionError(f"{path}: a table to train on ends in {', '.join(TABLES)}")
    whole = open_table(path, replace(reading, columns=(target,)))
    (index,) = whole.chosen
    asked = open_table(path, reading).chosen if reading.columns else range(len(whole.names))
    inputs = [i for i in asked if i != index]
    if not inputs:
        raise OptionError(f"{path} has no column beside the target {target!r} to learn from")
    header = getattr(whole, "header", reading.header)  # as was found out, of a text
    try:
        table = open_table(path, replace(reading, columns=inputs, header=header))
        blocks = list(table)
    except RowsError as error:
        raise RowsError(f"{error} (--columns names the columns to learn from)") from error
    x = np.concatenate(blocks) if blocks else np.empty((0, len(inputs)))
    if not np.isfinite(x).all():
        row, column = np.argwhere(~np.isfinite(x))[0]
        name = whole.names[inputs[column]] or inputs[column]
        raise RowsError(
            f"{path}: row {row} (from 0) has {x[row, column]} in column {name!r}, which "
            "nothing can be learned from: --missing 0 reads what is missing as a number"
        )
    names = tuple(whole.names[i] for i in inputs) if any(whole.names) else None
    try:
        values = whole.column(index)
    except RowsError as error:
        raise RowsError(f"{error}, the target's") from error
    return x, values, names, whole.names[index] or str(index)


def _classes(values: HostArray, task: str, title: str) -> HostArray | None:
    """The classes in order, None for a target that is a number."""
    numbers = values.dtype.kind == "f"
    if numbers and not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values))[0])
        raise RowsError(f"the target {title!r} has no number in row {row} (from 0)")
    if task == "numbers" and not numbers:
        raise OptionError(
            f"the target {title!r} holds {str(values[0])!r:.40}, which is no number: --task classes"
        )
    classes: HostArray = np.unique(values)
    whole = numbers and bool((classes == np.rint(classes)).all())
    few = whole and len(classes) <= MOST_CLASSES
    if task == "numbers" or (task == "auto" and numbers and not few):
        return None
    if whole:
        classes = classes.astype("int64")
    if len(classes) < 2:
        raise RowsError(f"the target {title!r} is {str(classes[0])!r:.60} in every row")
    if len(classes) * 2 > len(values):
        raise RowsError(
            f"the target {title!r} has {len(classes)} classes in {len(values)} rows: too many"
        )
    return classes


def _split(values: HostArray, seed: int) -> tuple[HostArray, HostArray, HostArray]:
    """Rows held out, to validate by, and to train on, with much the same targets in each."""
    order = np.random.default_rng(seed).permutation(len(values))
    ranked = order[np.argsort(values[order], kind="stable")]
    place = np.arange(len(values)) % 10
    out, valid = np.isin(place, HELD_OUT), np.isin(place, VALIDATION)
    return ranked[out], ranked[valid], ranked[~(out | valid)]


def _network(
    width: int, hidden: Sequence[int], outputs: int, numbers: bool, seed: int
) -> Sequential:
    rng, layers = np.random.default_rng([seed, 1]), list[Layer]()
    for size in hidden:
        layers += [Dense(width, size, "relu", rng=rng), Dropout(DROPOUT)]
        width = size
    return Sequential(*layers, Dense(width, outputs, "identity" if numbers else "softmax", rng=rng))


def _score(
    model: Layer, x: HostArray, truth: HostArray, seen: HostArray, classes: HostArray | None
) -> tuple[str, float, float, float | None]:
    """(measure, score, that of a constant, root mean square error)"""
    y = predict(model, x, "numpy")
    if classes is not None:
        kinds, counts = np.unique(seen, return_counts=True)
        right = classes[y.argmax(axis=1)] == truth
        return (
            "accuracy",
            float(right.mean()),
            float((truth == kinds[counts.argmax()]).mean()),
            None,
        )
    squares, around = np.square(y - truth).mean(), np.square(truth - truth.mean()).mean() or 1.0
    constant = np.square(truth - seen.mean()).mean()
    return "R²", float(1 - squares / around), float(1 - constant / around), float(squares**0.5)
