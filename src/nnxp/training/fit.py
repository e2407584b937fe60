"""Fitting a model to rows: batches, steps, validation, and a checkpoint to go on from."""

from __future__ import annotations

import hashlib
import inspect
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from math import inf, isfinite, nan
from pathlib import Path
from typing import Any

import numpy as np

from nnxp._arrays import Array, HostArray, Owner, is_floating, owners, xp_of
from nnxp._errors import (
    CheckpointError,
    DtypeMismatch,
    NnxpError,
    OptionError,
    OutOfMemory,
    ShapeError,
    TrainingError,
)
from nnxp._printed import Printed
from nnxp._progress import Progress, reported
from nnxp.backend import asnumpy, home_of, to_backend
from nnxp.backend._blas import one_blas_thread
from nnxp.backend._threads import one_ahead, together
from nnxp.engine import parse_bytes
from nnxp.layers._layer import Layer, Rng, check_model, generator, is_number, whole
from nnxp.layers.norm import rounding
from nnxp.program.program import multiply_adds
from nnxp.training._chunks import chunks
from nnxp.training._step import StepNumbers
from nnxp.training.batches import Batches, Rows, entrance_of, of_batch
from nnxp.training.checkpoint import read_run, write_run
from nnxp.training.differentiate import (
    LossProgram,
    LossRunner,
    applied,
    arrays_in,
    warn_of_idle,
    with_arrays,
    write_out,
)
from nnxp.training.losses import LOSSES, Loss
from nnxp.training.optimizers import Adam, Optimizer
from nnxp.training.schedules import Plateau

BATCH = 128  # rows a step
RECORDED = 1 << 22  # parameters at most, for their change to be recorded: it takes memory
KEPT = 16  # programs of batches of so many sizes and kinds
UNREAD = 64  # losses of a device that are read together: reading one waits for it
HELD = 1 << 30  # bytes of batches from an iterable, at most, that are kept until theirs are read
SCALE = 2.0**15  # of the gradients of float16, at most and at first
GROWTH = 2000  # steps whose gradients float16 held, after which the scale is doubled
PIECES, PIECE_ROWS = 16, 64  # that workers cut a batch into: at most, and of so many rows at least
PIECE_USES = 1024  # of a weight by a piece of many: less, and writing its gradients is seen
ADDED = 1 << 20  # numbers that a thread is worth starting for, to add them up
ALIGNED = 16  # numbers: parameters lie in one vector, each on the border of a cache line


@dataclass(frozen=True)
class Fitted(Printed):
    """A trained model, and its history: for each epoch what it came to; print it.

        fitted = nnxp.fit(net, x, labels, loss="cross_entropy", epochs=2)
        fitted.model(x), fitted.history[-1]["loss"]
        print(fitted)

    Attributes:
        model: the trained model.
        history: an entry for each epoch: `epoch` (from 1), `loss` (the mean over the epoch's rows,
            while the parameters changed), `seconds`, `rows_per_second`, and `validation` where
            there are such rows.
    """

    model: Layer
    history: list[dict[str, float]]

    def __str__(self) -> str:
        if not self.history:
            return "epochs      0"
        first, last = self.history[0], self.history[-1]
        seconds = sum(epoch["seconds"] for epoch in self.history)
        lines = [
            f"epochs      {len(self.history):,} in {seconds:.3g} s; "
            f"{last['rows_per_second']:,.0f} rows/s in the last",
            f"loss        {first['loss']:.4g} in the first epoch, {last['loss']:.4g} in the last",
        ]
        if "validation" in last:
            least = min(self.history, key=lambda epoch: epoch["validation"])
            lines.append(
                f"validation  {last['validation']:.4g} after the last epoch; the least was "
                f"{least['validation']:.4g}, after epoch {least['epoch']:.0f}"
            )
        return "\n".join(lines)


def fit(
    model: Layer,
    x: Any,
    y: Any = None,
    *,
    loss: str | Callable[..., Any] | None = None,
    optimizer: Optimizer | None = None,
    epochs: int = 10,
    batch: int | None = None,
    weights: Any = None,
    validation: tuple[Any, Any] | None = None,
    patience: int | None = None,
    clip: float | None = None,
    fixed: Sequence[str] = (),
    workers: int | None = None,
    memory_limit: int | str | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
    rng: Rng = None,
    progress: Progress = False,
    callback: Callable[[dict[str, float]], object] | None = None,
) -> Fitted:
    """A model like this one, trained on rows x (n, ...) with targets y (n, ...).

    It trains where the model is, in its type, and in its training form (`Layer.training`); the
    model given is left as it is.

        fitted = nnxp.fit(net, x, labels, loss="cross_entropy", epochs=10)
        fitted.model, fitted.history

        batches = [(x[i : i + 2], labels[i : i + 2]) for i in range(0, len(x), 2)]
        fitted = nnxp.fit(net, batches, loss="cross_entropy", epochs=10)

    Args:
        model: a layer with parameters.
        x: (n, ...), as rows for `nnxp.predict`; a tuple or a dict for a model of several inputs.
            Without y, batches (x, y) or (x, y, weights), of any number of rows each, in their own
            order: an iterable (a list, a torch DataLoader), which is gone through anew in each
            epoch, or a function of the epoch, from 1, that answers one. An iterator can be gone
            through once, so it takes epochs=1. Several inputs may be a list in a batch, too, as a
            DataLoader gives them, and batches may share arrays that are filled anew.
        y: (n, ...), as the loss takes them: labels (n,) for "cross_entropy", else like the output.
        loss: a name from `nnxp.losses.LOSSES`, or a function (model, x, target) -> number. It has
            to be given. In a checkpoint functions are known by their names only.
        optimizer: `Adam(1e-3)` without one.
        epochs: times through all rows, in all, those of a checkpoint counted.
        batch: rows a step, 128 without it; the order of an epoch's rows follows from rng and the
            epoch alone. Where rows are not in memory the next batch is read meanwhile, without a
            memory limit.
        weights: (n,), how much each row counts: 0 or more, and not 0 for all rows of a batch. A
            loss of your own gets those of the batch as its fourth argument.
        validation: (x, y), or (x, y, weights), whose loss is told after each epoch.
        patience: epochs without a lower validation loss before training ends; the model is then
            that of the lowest. With 0 it ends no sooner.
        clip: the largest global norm of the gradients.
        fixed: parameters, or layers, by dotted name that do not learn.
        workers: threads that share a batch, each with one thread of BLAS. It is cut into pieces,
            two from 128 rows on and up to 16 where each has 1,024 rows of a dense network, or 64 of
            one that uses its weights more often; whatever their number: any number gives the same
            bits. They pay where a batch has pieces for all of them.
            What a layer draws or learns of a batch (BatchNorm) is then that of each piece; a loss
            of your own has to be a mean over rows. Without it BLAS alone has threads.
        memory_limit: of the rows at work in one step, a number of bytes or a string such as
            "256 MiB". Parameters, gradients and the optimiser's state are aside, as is the order of
            an epoch's rows, 16 bytes each. A batch that does not fit is cut into equal parts that
            do, read and computed one after the other; its gradient is their mean, each counting as
            its rows do: the same limit gives the same bits, another one others by rounding, and
            other noise. A loss of your own has to be a mean over rows, and a model that learns
            statistics of a batch (BatchNorm) is refused where one has to be cut.
        checkpoint: a file that the run is written to every `checkpoint_seconds`, and after each
            epoch. If it is there, the run goes on from it, to the same bits. In the middle of an
            epoch of batches from an iterable, those already learned from are gone through again,
            and have to be the same.
        checkpoint_seconds: between two writes; with float("inf") the file is written after epochs
            only, from where a run goes on over batches that come in another order each time, too.
        rng: a seed or a Generator: the same one gives the same bits on the same machine.
        progress: True for a bar with the loss of the epoch so far, or a function of the rows done
            and the rows in all, which is None for batches from an iterable.
        callback: is called with each entry of the history.

    Returns:
        A Fitted: `model` and `history`.

    Raises:
        TrainingError: the loss is no number any more; with epoch, batch, and the reason if it is
            to be seen in its rows.
        NotDifferentiable: the model or loss has no gradient.
        CheckpointError: the checkpoint is of another run.
        OutOfMemory: the memory limit does not hold a step of one row.
        OptionError, ShapeError, DtypeMismatch: an argument does not fit.
    """
    check_model(model, "nnxp.fit")
    epochs = whole("epochs", epochs, 0)
    size = BATCH if batch is None else whole("batch", batch)
    chosen = _loss(loss, weights is not None)
    optimizer = Adam() if optimizer is None else optimizer
    if not isinstance(optimizer, Optimizer):
        raise OptionError(f"optimizer is one such as nnxp.Adam(1e-3), not {optimizer!r:.60}")
    if patience is not None:
        patience = whole("patience", patience, 0)
        if validation is None:
            raise OptionError("patience waits for a lower loss on validation=(x, y)")
    path = None if checkpoint is None else _checkpoint_path(checkpoint)
    if not is_number(checkpoint_seconds) or checkpoint_seconds < 0:
        raise OptionError(f"checkpoint_seconds is 0 or more, not {checkpoint_seconds!r:.60}")
    if callback is not None and not callable(callback):
        raise OptionError(f"callback is a function of an epoch's entry, not {callback!r:.60}")
    trainer = Trainer(model, chosen, optimizer, fixed, clip, workers, memory_limit)
    check = _check_of(model, chosen)
    rows: Rows | Batches
    if y is None:
        if batch is not None or weights is not None:
            raise OptionError(
                "without y, x gives batches of its own sizes, (x, y) or (x, y, weights): leave out "
                "batch= and weights=, or give y"
            )
        rows = Batches(model, x, check, trainer.memory_limit)
        if rows.once and epochs > 1:
            raise OptionError(
                f"an iterator gives its batches once, which is epochs=1 and not {epochs}; a list, "
                "a DataLoader, or a function of the epoch that answers an iterator gives them again"
            )
    else:
        rows = Rows(model, x, y, weights, memory_limit=trainer.memory_limit)
        check(rows)
    seen = None if validation is None else _validation(model, validation, trainer.memory_limit)
    if seen is not None:
        check(seen)
    run = _Run(trainer, rows, size, path)
    run.begin(rng)
    in_all = None if rows.count is None else rows.count * epochs
    with home_of(trainer.place).current(), reported(in_all, progress) as done:
        done(run.epoch * (rows.count or 0))
        while run.epoch < epochs and not run.waited(patience):
            run.set_rate()
            run.go_through(done, checkpoint_seconds)
            entry = run.end_epoch(seen)
            if callback is not None:
                callback(dict(entry))
            run.save()
        if patience is not None and run.best is not None:
            trainer.restore(run.best)
    return Fitted(trainer.model_now(), run.history)


def _loss(loss: Any, weighted: bool) -> Callable[..., Any]:
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise OptionError(f"there is no loss {loss!r}; the names are {', '.join(LOSSES)}")
        return LOSSES[loss]
    if loss is None:
        raise OptionError(
            'nnxp.fit makes a loss smaller, but none is given: loss="cross_entropy" is for labels, '
            f'"mean_square" for numbers; the names are {", ".join(LOSSES)}'
        )
    if not callable(loss):
        raise OptionError(f"loss is a name or a function (model, x, target), not {loss!r:.60}")
    try:
        parameters = inspect.signature(loss)
    except ValueError:  # some functions do not tell what they take
        return loss  # type: ignore[no-any-return]
    arguments = ("model", "x", "target", *(["weights"] if weighted else []))
    try:
        parameters.bind(*arguments)
    except TypeError as error:
        fix = "; a class is to be called first" if isinstance(loss, type) else ""
        raise OptionError(
            f"a loss is called with ({', '.join(arguments)}), which {loss!r:.80} does not take: "
            f"{error}{fix}"
        ) from None
    return loss  # type: ignore[no-any-return]


def _validation(model: Layer, validation: Any, memory_limit: int | None) -> Rows:
    """The rows to validate by: (x, y) or (x, y, weights)."""
    if not (isinstance(validation, tuple | list) and len(validation) in (2, 3)):
        raise OptionError(
            f"validation is (x, y), or (x, y, weights), of other rows, not {validation!r:.60}"
        )
    return Rows(model, *validation, memory_limit=memory_limit)


def _checkpoint_path(checkpoint: Any) -> Path:
    """The path of a file that can be written when the time has come."""
    if not isinstance(checkpoint, str | os.PathLike):
        raise OptionError(f"checkpoint is the path of a file, not {checkpoint!r:.60}")
    path = Path(os.fspath(checkpoint))
    if path.is_dir():
        raise OptionError(f"checkpoint is the path of a file, but {str(path)!r} is a folder")
    if not path.parent.is_dir():
        raise OptionError(f"checkpoint: there is no folder {str(path.parent)!r} to write to")
    return path


def _check_of(model: Layer, loss: Callable[..., Any]) -> Callable[[Rows], None]:
    """What sees whether rows are for this loss, and has it look at all their targets."""
    outputs: list[int | None] = []

    def check(rows: Rows) -> None:
        _loss(loss, rows.weighted)
        if isinstance(loss, Loss) and type(loss).check is not Loss.check:
            if not outputs:
                outputs.append(_outputs(model, rows))
            rows.check_targets(partial(loss.check, outputs=outputs[0]))

    return check


def _outputs(model: Layer, rows: Rows) -> int | None:
    """The size of the last axis of what the model answers."""
    inputs = arrays_in(rows.at(np.zeros(1, "int64"))[:1])
    shape = model.output_shape(*(x.shape for x in inputs)) if inputs else ()
    return int(shape[-1]) if shape and isinstance(shape[-1], int) and len(shape) > 1 else None


class Trainer:
    """A model in training: its parameters in one vector, their gradients in another.

    `step` changes the parameters by one batch, `evaluate` gives the loss of a batch as it is.
    """

    def __init__(
        self,
        model: Layer,
        loss: Callable[..., Any],
        optimizer: Optimizer,
        fixed: Sequence[str] = (),
        clip: float | None = None,
        workers: int | None = None,
        memory_limit: int | str | None = None,
    ) -> None:
        if clip is not None and not (is_number(clip) and clip > 0):
            raise OptionError(f"gradients are clipped to a norm above zero, not {clip!r}")
        self.model = model
        self.seen, self.form = _rounding(model), _rounding(_training_form(model))
        self.loss, self.optimizer, self.clip = loss, optimizer, clip
        self.current = optimizer
        """The optimiser with the rate of now."""
        self.place = model.place or "cpu"
        self.workers = None if workers is None else whole("workers", workers)
        if workers is not None and self.place != "cpu":
            raise OptionError(f"workers are threads of the CPU, but the model is on {self.place}")
        self.memory_limit = None if memory_limit is None else parse_bytes(memory_limit)
        parameters = model.parameters()
        self.owners = owners(parameters)
        held = _held(self.owners, model._names_in("fixed"), fixed)
        own = {owner.name: parameters[owner.name] for owner in self.owners.values()}
        self.learned = tuple(n for n in own if n not in held)
        if not self.learned:
            raise OptionError(f"{model!r:.200} has no parameters that learn")
        with home_of(self.place).current():
            learning = {n: own[n] for n in self.learned}
            self.vector, self.arrays = _vector(learning)
            self.slopes, self.gradients = _vector(learning, fill=False)
            self.arrays |= {n: p.copy() for n, p in own.items() if n in held}
            self.narrow = self.vector.dtype.itemsize == 2
            self.master = self.vector.astype("float32") if self.narrow else self.vector
            self.state = optimizer.init({"parameters": self.master})
            self._numbers = self._step_numbers()
            if self.narrow:
                first_scale = SCALE if self.vector.dtype == np.float16 else 1.0
                self.state |= {"scale": np.array(first_scale), "unscathed": np.zeros((), "int64")}
        self._drawn: bool | None = None
        self._warned = False
        self._of_pieces = [(self.slopes, self.gradients)]  # the first is where all are added up
        self._parts: dict[Any, int] = {}  # of such a batch
        self._piece_rows: dict[Any, int] = {}  # that workers like best
        self._room = 0  # bytes that the limit leaves to programs
        self._written: dict[Any, LossProgram] = {}
        self._runners: dict[Any, LossRunner] = {}  # the last used is the last

    @np.errstate(all="ignore")  # a loss that is no number any more is seen to where it is read
    def step(self, batch: Sequence[Any], rng: np.random.Generator | None) -> Array:
        """One step by the gradients of this batch; its loss before it."""
        if self._numbers is None:
            return self._moved(*self._slope(batch, rng))
        self.state["steps"][...] += 1
        self._numbers.fill(self.current, int(self.state["steps"]))
        runner = self._runner(batch, True)
        y, statistics = self._run(runner, batch, rng, self.gradients, self._apply)
        self._record(statistics)
        return y

    def _step_numbers(self) -> StepNumbers | None:
        """What a step on a device is recorded with, where it can be, and is worth it."""
        ours = type(self.optimizer).__module__ == Optimizer.__module__
        if self.place == "cpu" or self.narrow or self.vector.size > RECORDED or not ours:
            return None
        return StepNumbers(self.vector)

    def _apply(self) -> None:
        """The step of the optimiser on a device, of the number that is filled in."""
        self._clip(self.slopes)
        p, g = {"parameters": self.master}, {"parameters": self.slopes}
        self.current.apply(p, g, self.state, self._numbers)

    @np.errstate(all="ignore")
    def step_on(self, rows: Rows, ids: HostArray, rng: np.random.Generator | None) -> Array:
        """One step by the gradients of these rows, in parts that the memory limit holds."""
        parts = self._cut(rows, ids, True)
        if len(parts) == 1:
            return self.step(rows.at(ids), rng)
        total = xp_of(self.master).zeros(self.master.shape, self.master.dtype)
        loss: Any = np.float64(0)
        worth = np.float64(0)

        def add(part: HostArray) -> None:
            nonlocal loss, worth
            batch = rows.at(part)
            own = self._worth(batch)
            if own:
                y, _ = self._slope(batch, rng)
                slopes = self.slopes.astype(total.dtype, copy=False)
                slopes *= own
                total[...] += slopes
                loss, worth = loss + y * own, worth + own

        for part in parts:
            add(part)
        total /= worth
        self.slopes[...] = total
        return self._moved(loss / worth, {})

    def _moved(self, y: Array, statistics: Mapping[str, Array]) -> Array:
        """The parameters changed by `slopes`; the loss y."""
        slopes = self._unscaled() if self.narrow else self.slopes
        if slopes is None:
            return y
        self._clip(slopes)
        self.current.update({"parameters": self.master}, {"parameters": slopes}, self.state)
        if self.narrow:
            self.vector[...] = self.master
        self._record(statistics)
        return y

    def _clip(self, slopes: Array) -> None:
        if self.clip is not None:
            norm = xp_of(slopes).sqrt((slopes * slopes).sum())
            slopes *= xp_of(slopes).minimum(self.clip / (norm + 1e-12), 1)

    def _unscaled(self) -> Array | None:
        """The gradients in float32; None if 16 bits did not hold them, and the step is left out.

        The scale then is halved, and doubled after GROWTH steps without.   [Micikevicius et al.
        2018, arXiv:1710.03740]
        """
        scale, unscathed = self.state["scale"], self.state["unscathed"]
        slopes = self.slopes.astype("float32") / float(scale)
        if not bool(xp_of(slopes).isfinite(slopes).all()):
            scale[...] = max(float(scale) / 2, 1.0)
            unscathed[...] = 0
            self._forget()
            return None
        unscathed[...] += 1
        if self.vector.dtype == np.float16 and not int(unscathed) % GROWTH and scale < SCALE:
            scale[...] *= 2
            self._forget()
        return slopes

    def _forget(self) -> None:
        """Programs are of another scale of the gradients."""
        self._written.clear()
        self._runners.clear()

    @np.errstate(all="ignore")
    def slope(self, batch: Sequence[Any], rng: np.random.Generator | None) -> Array:
        """The loss of this batch, and its gradients in `slopes`; no parameter learns by it."""
        y, statistics = self._slope(batch, rng)
        self._record(statistics)
        return y

    def _slope(
        self, batch: Sequence[Any], rng: np.random.Generator | None
    ) -> tuple[Array, dict[str, Array]]:
        if self.workers is not None:
            return self._slope_in_pieces(batch, rng)
        return self._run(self._runner(batch, True), batch, rng, self.gradients)

    def _run(
        self,
        runner: LossRunner,
        batch: Sequence[Any],
        rng: np.random.Generator | None = None,
        gradients: Mapping[str, Array] | None = None,
        then: Callable[[], None] | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        """The loss of a batch, and the statistics of layers; the gradients are filled."""
        parameters = [self.arrays[n] for n in runner.written.inputs]
        into = None if gradients is None else [gradients[n] for n in runner.written.learned]
        return runner(parameters, arrays_in(batch), rng, into, then)[:2]

    def _slope_in_pieces(
        self, batch: Sequence[Any], rng: np.random.Generator | None
    ) -> tuple[Array, dict[str, Array]]:
        """The same by workers: loss, statistics and gradients are means over pieces of the batch.

        Each piece counts as its rows do, and all are added up in one order.
        """
        pieces = [_part(batch, slice(*ends)) for ends in pairwise(self._cuts(batch))]
        count = len(pieces)
        worths = [self._worth(piece) for piece in pieces]
        total = sum(worths)
        shares = [worth / total if total else np.nan for worth in worths]
        runners = [self._runner(piece, True, i) for i, piece in enumerate(pieces)]
        drawn = rng is not None and bool(runners[0].written.drawn)
        draws = rng.spawn(count) if rng is not None and drawn else [None] * count
        while len(self._of_pieces) < count:
            self._of_pieces.append(_vector({n: self.arrays[n] for n in self.learned}, fill=False))
        results: dict[int, tuple[Array, dict[str, Array]]] = {}
        stopped: list[bool] = []

        def work(own: range) -> None:
            for i in own:
                if stopped:
                    continue
                vector, gradients = self._of_pieces[i]
                if not shares[i]:
                    vector[...] = 0
                    continue
                results[i] = self._run(runners[i], pieces[i], draws[i], gradients)

        def add(part: slice) -> None:
            vectors = [vector[part] for vector, _ in self._of_pieces[:count]]
            for total, *others in chunks(*vectors):
                total *= shares[0]
                for share, other in zip(shares[1:], others, strict=True):
                    other *= share
                    total += other

        workers = self.workers or 1
        turns = [range(w, count, workers) for w in range(min(workers, count))]
        together(
            [partial(work, own) for own in turns], lambda: stopped.append(True), one_blas_thread
        )
        adders = max(1, min(workers, self.slopes.size // ADDED))
        ends = np.linspace(0, self.slopes.size, adders + 1).astype(int)
        together([partial(add, slice(a, b)) for a, b in pairwise(ends)], lambda: None)
        loss, statistics = 0, dict[str, Any]()
        for i in sorted(results):
            y, values = results[i]
            loss += y * shares[i]
            for name, value in values.items():
                statistics[name] = statistics.get(name, 0) + value * shares[i]
        return loss, statistics

    def _cuts(self, batch: Sequence[Any]) -> HostArray:
        """Where the pieces begin that workers cut such a batch into, and where the last ends."""
        size = len(arrays_in(batch)[0])
        if size < 2 * PIECE_ROWS:
            return np.array([0, size])
        few = _part(batch, slice(PIECE_ROWS))
        key = _outlines(few)
        if key not in self._piece_rows:  # a dense layer uses each weight once a row
            work = sum(map(multiply_adds, self._program(few, True).program.steps))
            uses = work / (3 * PIECE_ROWS * self.slopes.size)
            self._piece_rows[key] = int(PIECE_USES / min(max(uses, 1), PIECE_USES / PIECE_ROWS))
        count = max(2, min(PIECES, size // self._piece_rows[key]))
        return np.linspace(0, size, count + 1).astype(int)

    def _worth(self, piece: Sequence[Any]) -> float:
        """How much a piece of a batch counts: its rows, or the sum of their weights."""
        _, target, *weights = piece
        counts = weights[0] if weights else xp_of(target).ones(len(target), self.vector.dtype)
        own = self.loss.row_weights(target, counts) if isinstance(self.loss, Loss) else None
        return float((counts if own is None else counts * own).sum(dtype="float64"))

    def _record(self, statistics: Mapping[str, Array]) -> None:
        """Keep the running statistics of layers."""
        for name, value in statistics.items():
            self.owners[name].of(self.arrays)[...] = value

    def evaluate(self, batch: Sequence[Any]) -> Array:
        """The loss of a batch of the model as it is."""
        return self._run(self._runner(batch, False), batch)[0]

    def evaluate_on(self, rows: Rows, batches: Sequence[HostArray]) -> float:
        """The loss of all these rows of the model as it is, each counting as its weight does."""
        worth = total = 0.0
        for ids in batches:
            for part in self._cut(rows, ids, False):
                batch = rows.at(part)
                own = self._worth(batch)
                if own:
                    worth += own
                    total += own * float(asnumpy(self.evaluate(batch)))
        return total / worth if worth else nan

    @np.errstate(all="ignore")
    def reason(self, batch: Sequence[Any]) -> str:
        """Why the loss of this batch is no number, as far as that is to be seen in it."""
        x, target, *weights = batch
        if not self._worth(batch) > 0:
            kind = "sample" if weights and not float(weights[0].sum()) > 0 else "class"
            return (
                f"its rows count nothing, their {kind} weights are all 0: leave such rows out, or "
                "take a larger batch"
            )
        for name, arrays in (("rows", arrays_in(x)), ("targets", [target])):
            for array in arrays:
                if is_floating(array.dtype) and not bool(xp_of(array).isfinite(array).all()):
                    return (
                        f"its {name} hold NaN, or what is infinite in {array.dtype}: they are to "
                        "be left out, filled in, or scaled"
                    )
        if self.place == "cpu":
            try:  # a layer may say what it does not take, such as an id
                applied(self.model, x)
            except NnxpError as error:
                return str(error)
        return "a lower rate, clip=1.0, or rows and targets on a scale of about one may help"

    def draws(self, batch: Sequence[Any]) -> bool:
        """Whether a step draws at random."""
        if self._drawn is None:
            self._drawn = bool(self._program(batch, True).drawn)
        return self._drawn

    def _program(self, batch: Sequence[Any], learns: bool) -> LossProgram:
        """The loss of such a batch written out, with its gradients if the model `learns`."""
        key = learns, _outlines(batch)
        written = self._written.pop(key, None)
        if written is None:
            if len(self._written) >= KEPT:  # batches of ever new sizes
                oldest = next(iter(self._written))
                del self._written[oldest]
                self._runners = {k: r for k, r in self._runners.items() if k[:2] != oldest}
            scale = float(self.state["scale"]) if self.narrow else 1.0
            learned = (lambda n: n in self.learned) if learns else None
            model = self.form if learns else self.seen
            written = write_out(self.loss, model, batch, learned, scale)
            if learns and not self._warned:
                self._warned = True
                warn_of_idle(written, model)
        self._written[key] = written
        return written

    def _runner(self, batch: Sequence[Any], learns: bool, piece: int = 0) -> LossRunner:
        """What runs the program of such a batch, with memory of its own for each piece."""
        written = self._program(batch, learns)
        key = learns, _outlines(batch), piece
        runner = self._runners.pop(key, None)
        if runner is None:
            if self.memory_limit is not None:
                self._make_room(written.working_set)
            runner = LossRunner(written, self.place, records=self.memory_limit is None)
        self._runners[key] = runner
        return runner

    # a memory limit

    def _cut(self, rows: Rows, ids: HostArray, learns: bool) -> list[HostArray]:
        """The rows of a batch in parts of one size, as few as the memory limit holds."""
        if self.memory_limit is None:
            return [ids]
        key = learns, _outlines(rows.like(len(ids)))
        if key not in self._parts:
            self._parts[key] = self._count_parts(rows, len(ids), learns)
        parts = np.array_split(ids, self._parts[key])
        self._room = self.memory_limit - rows.kept_bytes - len(parts[0]) * rows.row_bytes
        return parts

    def _count_parts(self, rows: Rows, size: int, learns: bool) -> int:
        """How many parts a batch of so many rows is cut into."""
        limit, count, written = self.memory_limit or 0, 1, {*self._written}
        while self._bytes(rows, {size // count, -(-size // count)}, learns) > limit:
            most = -(-size // count)
            needs = self._bytes(rows, {most}, learns)
            if most == 1:
                raise OutOfMemory(
                    f"memory_limit={limit:,} bytes does not hold a step of one row, which needs "
                    f"{needs:,}, parameters and gradients aside; raise the limit"
                )
            count = min(size, max(count + 1, count * needs // limit))
        statistics = (
            self._program(rows.like(size), learns).statistics if count > 1 and learns else ()
        )
        if statistics:
            raise OptionError(
                f"memory_limit={limit:,} bytes holds no step of {size:,} rows, and they cannot be "
                f"cut: {', '.join(statistics):.200} are learned from a whole batch. A smaller "
                "batch, a larger limit, or a norm of each row, such as LayerNorm, goes"
            )
        for key in self._written.keys() - written:  # of sizes that were tried
            del self._written[key]
        return count

    def _bytes(self, rows: Rows, sizes: set[int], learns: bool) -> int:
        """What parts of these sizes take: their rows, one part at a time, and memory for each."""
        pieces = self.workers is not None and learns
        computed = [
            self._program(rows.like(int(count)), learns).working_set
            for size in sizes
            for count in (np.diff(self._cuts(rows.like(size))) if pieces else (size,))
        ]
        return rows.kept_bytes + max(sizes) * rows.row_bytes + sum(computed)

    def _make_room(self, size: int) -> None:
        """Let go of the memory used longest ago, until the limit holds so much more."""
        held = sum(runner.written.working_set for runner in self._runners.values())
        while self._runners and held + size > self._room:
            oldest = self._runners.pop(next(iter(self._runners)))
            held -= oldest.written.working_set

    def model_now(self) -> Layer:
        """A model with the parameters as they are now, in arrays of its own."""
        copies = {n: p.copy() for n, p in self.arrays.items()}
        return self.model.with_parameters({n: o.of(copies) for n, o in self.owners.items()})

    def snapshot(self) -> dict[str, Array]:
        """All that changes, by name: to be written, or to come back to."""
        held = {n: p.copy() for n, p in self.arrays.items() if n not in self.learned}
        return {"parameters": self.master.copy()} | {f"held.{n}": p for n, p in held.items()}

    def restore(self, snapshot: Mapping[str, Array]) -> None:
        """Come back to what a snapshot holds."""
        self.master[...] = snapshot["parameters"]
        if self.narrow:
            self.vector[...] = self.master
        for name, p in self.arrays.items():
            if name not in self.learned:
                p[...] = snapshot[f"held.{name}"]


def _outlines(batch: Sequence[Any]) -> Any:
    """The shapes and types of a batch, which are of inputs and a target, or of weights, too."""
    return len(batch), *((array.shape, array.dtype) for array in arrays_in(batch))


def _part(batch: Sequence[Any], rows: slice) -> Any:
    """These rows of a batch."""
    return with_arrays(tuple(batch), iter([array[rows] for array in arrays_in(batch)]))


def _training_form(model: Layer) -> Layer:
    """What the model is while it is trained, with the same parameters."""
    inside = next((name for name, layer in [*model.walk(), ("", model)] if layer.in_training), None)
    if inside is not None:
        raise OptionError(
            f"{inside or 'the model'} is in its training form already, which predicts nothing: "
            "give the model as it is; training() is called here"
        )
    form = model.training()
    more = form.parameters().keys() - model.parameters().keys()
    if more:
        raise OptionError(
            f"in training the model has parameters of other names: {', '.join(sorted(more)):.200}; "
            "training() keeps those of the layer"
        )
    return form


def _rounding(model: Layer) -> Layer:
    """The model as it takes rows that are wider than it, if it standardises them first."""
    entrance, dtype = entrance_of(model), model.dtype
    if entrance is None or dtype is None:
        return model
    return model.map_layers(
        lambda name, layer: rounding(layer, dtype) if name == entrance else layer  # type: ignore[arg-type]
    )


def _held(owner_of: Mapping[str, Owner], own: set[str], fixed: Sequence[str]) -> set[str]:
    """The parameters that do not learn: an array that is one of them by any name is."""
    if not isinstance(fixed, str | Iterable):
        raise OptionError(f"fixed are names of parameters or layers, not {fixed!r:.60}")
    asked = (fixed,) if isinstance(fixed, str) else tuple(fixed)
    for name in asked:
        if not any(n == name or n.startswith(f"{name}.") for n in owner_of):
            raise OptionError(f"fixed: there is no {name!r} among {', '.join(owner_of):.300}")
    held = {n for n in owner_of if n in own or f"{n}.".startswith(tuple(f"{a}." for a in asked))}
    names = {owner_of[n].name for n in held}
    return {n for n in owner_of if owner_of[n].name in names}


def _vector(arrays: Mapping[str, Array], fill: bool = True) -> tuple[Array, dict[str, Array]]:
    """One vector with room for all the arrays, and views of it by name."""
    some = next(iter(arrays.values()))
    if len({p.dtype for p in arrays.values()}) > 1:
        raise OptionError("the parameters that learn are of several types: model.astype(...)")
    sizes = {n: -(-p.size // ALIGNED) * ALIGNED for n, p in arrays.items()}
    vector = xp_of(some).zeros(sum(sizes.values()), some.dtype)
    views, at = {}, 0
    for name, p in arrays.items():
        views[name] = vector[at : at + p.size].reshape(p.shape)
        if fill:
            views[name][...] = p
        at += sizes[name]
    return vector, views


@dataclass(frozen=True)
class _Step:
    """A step of an epoch: its number from 1, and the rows of its batch, which may be read."""

    number: int
    rows: Rows
    ids: HostArray
    batch: tuple[Any, ...] | None
    digest: str  # of all batches so far


class _Run:
    """Where a run stands: epoch and batch, the losses of the epoch, the best so far."""

    def __init__(
        self, trainer: Trainer, rows: Rows | Batches, batch: int, path: Path | None
    ) -> None:
        self.trainer, self.rows, self.batch, self.path = trainer, rows, batch, path
        self.seed = self.epoch = self.at = 0
        self.total, self.seconds = 0.0, 0.0
        self.count = 0  # rows of the epoch so far,
        self.digest = ""  # and a hash of its batches, where an iterable gives them
        self.history: list[dict[str, float]] = []
        self.lowest, self.lowest_epoch = inf, 0
        self.best: dict[str, Array] | None = None
        self._unread: list[tuple[_Step, Array]] = []  # with their losses
        self._saved = time.monotonic()

    def waited(self, patience: int | None) -> bool:
        """Whether the validation loss has not been lower for so many epochs."""
        return patience is not None and self.epoch - self.lowest_epoch >= patience > 0

    def set_rate(self) -> None:
        """The rate of an optimiser that follows the losses."""
        optimizer = self.trainer.optimizer
        if isinstance(optimizer.rate, Plateau):
            losses = [entry.get("validation", entry["loss"]) for entry in self.history]
            self.trainer.current = replace(optimizer, rate=optimizer.rate.after(losses))

    def go_through(self, done: Callable[..., None], every: float) -> None:
        """The batches of an epoch that are left."""
        trainer, start = self.trainer, time.monotonic()
        # a device computes while the next batch is read in any case
        aside = trainer.place == "cpu" and not (self.rows.in_memory or trainer.memory_limit)
        steps = self._steps(done)
        for step, y in one_ahead(self._make, steps) if aside else map(self._make, steps):
            self._unread.append((step, y))
            self.at, self.digest = step.number, step.digest
            self.count += len(step.ids)
            if trainer.place == "cpu" or len(self._unread) >= UNREAD or self._held() > HELD:
                self._read_losses()
            if self.path is not None and time.monotonic() - self._saved >= every:
                self.seconds += time.monotonic() - start
                start = time.monotonic()
                self.save()
            read = self.count - sum(len(step.ids) for step, _ in self._unread)
            done(len(step.ids), **({"loss": self.total / read} if read else {}))
            del step, y  # while the next one is computed
        self._read_losses()
        self.seconds += time.monotonic() - start
        if not self.count:
            raise ShapeError(
                f"epoch {self.epoch + 1} has no batches; an iterator can be gone through once: a "
                "function of the epoch answers another one each time"
            )

    def _steps(self, done: Callable[..., None]) -> Iterator[_Step]:
        """The steps of the epoch that are left, each with its batch, read if it is not cut."""
        trainer, number, digest, self.count = self.trainer, 0, "", 0
        for rows, ids in self.rows.batches(self.batch, self.seed, self.epoch):
            number += 1
            if self.path is not None and isinstance(self.rows, Batches):
                digest = hashlib.sha256(f"{digest}{rows.digest(4)}".encode()).hexdigest()
            if number > self.at:
                batch = rows.at(ids) if trainer.memory_limit is None else None
                yield _Step(number, rows, ids, batch, digest)
                continue
            self.count += len(ids)
            done(len(ids))
            if number == self.at and digest != self.digest:
                raise CheckpointError(
                    f"{self.path} has gone on to batch {number} of epoch {self.epoch + 1} by other "
                    "batches than come now; it goes on where the same come again. With "
                    'checkpoint_seconds=float("inf") it is written after epochs only, for any'
                )
        if number < self.at:
            raise CheckpointError(
                f"{self.path} stands at batch {self.at} of epoch {self.epoch + 1}, which has "
                f"{number}"
            )

    def _make(self, step: _Step) -> tuple[_Step, Array]:
        """The step taken; its loss before it."""
        rng = np.random.default_rng([self.seed, self.epoch, step.number])
        try:
            if step.batch is None:
                return step, self.trainer.step_on(step.rows, step.ids, rng)
            y = self.trainer.step(step.batch, rng)
        except (ShapeError, DtypeMismatch) as error:
            if isinstance(self.rows, Rows):  # which are all alike
                raise
            raise of_batch(error, self.epoch, step.number) from error
        # on the CPU the loss is read next, and its batch tells what is wrong with it
        return (step if self.trainer.place == "cpu" else replace(step, batch=None)), y

    def _held(self) -> int:
        """The bytes of batches from an iterable that are kept to tell what is wrong with a loss."""
        if isinstance(self.rows, Rows):
            return 0
        return sum(len(step.ids) * step.rows.row_bytes for step, _ in self._unread)

    def _read_losses(self) -> None:
        for step, y in self._unread:
            value = float(asnumpy(y))
            if not isfinite(value):
                batch = step.rows.at(step.ids) if step.batch is None else step.batch
                raise TrainingError(
                    f"the loss is {value} in epoch {self.epoch + 1}, batch {step.number}: "
                    f"{self.trainer.reason(batch)}"
                )
            self.total += value * len(step.ids)
        self._unread.clear()

    def end_epoch(self, seen: Rows | None) -> dict[str, float]:
        """Note what the epoch came to."""
        entry: dict[str, float] = {
            "epoch": self.epoch + 1,
            "loss": self.total / self.count,
            "seconds": self.seconds,
            "rows_per_second": self.count / max(self.seconds, 1e-9),
        }
        if seen is not None:
            entry["validation"] = value = self._validate(seen)
            if value < self.lowest:
                self.lowest, self.lowest_epoch = value, self.epoch + 1
                self.best = self.trainer.snapshot()
        self.history.append(entry)
        self.epoch, self.at, self.total, self.seconds = self.epoch + 1, 0, 0.0, 0.0
        self.digest = ""
        return entry

    def _validate(self, seen: Rows) -> float:
        marks = range(self.batch, seen.count, self.batch)
        value = self.trainer.evaluate_on(seen, np.split(np.arange(seen.count), marks))
        seen.let_go()
        return value

    # to go on from

    def begin(self, rng: Rng) -> None:
        """Begin anew, or where the checkpoint stands."""
        seed = None if rng is None else _seed(rng)
        if self.path is None or not self.path.exists():
            self.seed = _seed(None) if seed is None else seed
            return
        arrays, about = read_run(self.path)
        for what, value in self._fingerprint.items():
            if about["of"].get(what) != value:
                raise CheckpointError(
                    f"{self.path} is of a run with another {what}: {about['of'].get(what)!s:.200}, "
                    f"not {value!s:.200}; another file, or the same {what}, goes on"
                )
        if seed is not None and seed != about["seed"]:
            raise CheckpointError(f"{self.path} is of a run with another rng, {about['seed']}")
        self.seed, self.epoch, self.at = about["seed"], about["epoch"], about["batch"]
        self.total, self.seconds, self.history = about["total"], about["seconds"], about["history"]
        self.lowest = inf if about["lowest"] is None else about["lowest"]
        self.lowest_epoch = about["lowest_epoch"]
        self.digest = about.get("batches", "")
        self._take(arrays)

    def _take(self, arrays: Mapping[str, Any]) -> None:
        """Go on from these arrays; CheckpointError unless they are all that there should be."""
        trainer, home = self.trainer, home_of(self.trainer.place)
        now = trainer.snapshot()
        due = {f"now.{n}": a for n, a in now.items()}
        due |= {f"state.{n}": a for n, a in trainer.state.items()}
        if self.lowest_epoch:
            due |= {f"best.{n}": a for n, a in now.items()}
        for name in sorted(due.keys() | arrays.keys()):
            wanted, came = (
                f"{x[name].dtype}{list(x[name].shape)}" if name in x else "nothing"
                for x in (due, arrays)
            )
            if came != wanted:
                raise CheckpointError(
                    f"{self.path} does not hold this run: {name} is {came}, not {wanted}"
                )

        def part(prefix: str) -> dict[str, Array]:
            own = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
            return {n: to_backend(a, home) for n, a in own.items()}

        with home.current():
            trainer.restore(part("now."))
            self.best = part("best.") or None
            for name, value in part("state.").items():
                if type(trainer.state[name]) is np.ndarray:
                    trainer.state[name][...] = np.asarray(arrays[f"state.{name}"])
                else:
                    trainer.state[name][...] = value

    def save(self) -> None:
        """Write the checkpoint, if there is to be one."""
        if self.path is None:
            return
        self._read_losses()
        arrays = {f"now.{n}": a for n, a in self.trainer.snapshot().items()}
        arrays |= {f"state.{n}": a for n, a in self.trainer.state.items()}
        arrays |= {f"best.{n}": a for n, a in (self.best or {}).items()}
        about = {
            "of": self._fingerprint, "seed": self.seed, "epoch": self.epoch, "batch": self.at,
            "batches": self.digest, "total": self.total, "seconds": self.seconds,
            "history": self.history,
            "lowest": None if self.lowest == inf else self.lowest,
            "lowest_epoch": self.lowest_epoch,
        }  # fmt: skip
        write_run(self.path, {n: asnumpy(a) for n, a in arrays.items()}, about)
        self._saved = time.monotonic()

    @cached_property
    def _fingerprint(self) -> dict[str, str]:
        """What a run is of: one with the same is the same run."""
        trainer = self.trainer
        shapes = {n: [str(p.dtype), *p.shape] for n, p in trainer.arrays.items()}
        start = hashlib.sha256()
        for p in trainer.model.parameters().values():
            start.update(np.ascontiguousarray(asnumpy(p)).view("uint8").tobytes())
        data, rows = "batches", self.rows
        if isinstance(rows, Rows):
            blocks = "" if rows.in_memory else f" in blocks of {rows.block}, {rows.mixed} mixed"
            data = f"{rows.count} rows{blocks}, {rows.digest()}"
        batch = f"{self.batch}"
        if trainer.workers is not None:  # which bits follow from
            batch += f" in up to {PIECES} pieces of {PIECE_ROWS} rows and {PIECE_USES} uses"
        if trainer.memory_limit is not None:
            batch += f" within {trainer.memory_limit} bytes"
        run = {
            "model": f"{trainer.model!r} {shapes}",
            "initial parameters": start.hexdigest(),
            "optimizer": f"{trainer.optimizer!r}, clip={trainer.clip}",
            "loss": getattr(trainer.loss, "__qualname__", repr(trainer.loss)),
            "learned": ", ".join(trainer.learned),
            "batch": batch,
            "data": data,
        }
        # where a function lies in memory is another matter in each process
        return {what: re.sub(r" at 0x[0-9a-fA-F]+", "", value) for what, value in run.items()}


def _seed(rng: Rng) -> int:
    """A seed that can be written down."""
    if isinstance(rng, int | np.integer) and not isinstance(rng, bool):
        generator(rng)  # refuses what is no seed
        return int(rng)
    return int(generator(rng).integers(2**63))
