"""Fitting a model to rows: batches, steps, validation, and a checkpoint to go on from."""

from __future__ import annotations

import hashlib
import inspect
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import inf, isfinite
from pathlib import Path
from typing import Any

import numpy as np

from nnxp._arrays import Array, HostArray
from nnxp._errors import CheckpointError, DtypeMismatch, OptionError, ShapeError, TrainingError
from nnxp._printed import Printed
from nnxp._progress import Progress, reported
from nnxp.backend import asnumpy, home_of, to_backend
from nnxp.backend._threads import one_ahead
from nnxp.layers._layer import Layer, Rng, check_model, generator, is_number, whole
from nnxp.training.batches import Batches, Rows, of_batch
from nnxp.training.checkpoint import read_run, write_run
from nnxp.training.differentiate import arrays_in
from nnxp.training.losses import LOSSES, Loss
from nnxp.training.optimizers import Adam, Optimizer
from nnxp.training.schedules import Plateau
from nnxp.training.trainer import Trainer

BATCH = 128  # rows a step
UNREAD = 64  # losses of a device that are read together: reading one waits for it
HELD = 1 << 30  # bytes of batches from an iterable, at most, that are kept until theirs are read


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
        run = {
            "model": f"{trainer.model!r} {shapes}",
            "initial parameters": start.hexdigest(),
            "optimizer": f"{trainer.optimizer!r}, clip={trainer.clip}",
            "loss": getattr(trainer.loss, "__qualname__", repr(trainer.loss)),
            "learned": ", ".join(trainer.learned),
            "batch": f"{self.batch}{trainer.cutting}",
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
