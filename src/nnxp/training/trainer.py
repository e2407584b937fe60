"""Training steps: a model's gradients by batch, in the pieces of workers and of a memory limit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from math import nan
from typing import Any

import numpy as np

from nnxp._arrays import Array, HostArray, Owner, is_floating, owners, xp_of
from nnxp._errors import NnxpError, OptionError, OutOfMemory
from nnxp.backend import asnumpy, home_of
from nnxp.backend._blas import one_blas_thread
from nnxp.backend._threads import together
from nnxp.engine import parse_bytes
from nnxp.layers._layer import Layer, is_number, whole
from nnxp.layers.norm import rounding
from nnxp.program.program import multiply_adds
from nnxp.training._chunks import chunks
from nnxp.training._step import StepNumbers
from nnxp.training.batches import Rows, entrance_of
from nnxp.training.differentiate import (
    LossProgram,
    LossRunner,
    applied,
    arrays_in,
    warn_of_idle,
    with_arrays,
    write_out,
)
from nnxp.training.losses import Loss
from nnxp.training.optimizers import Optimizer

RECORDED = 1 << 22  # parameters at most, for their change to be recorded: it takes memory
KEPT = 16  # programs of batches of so many sizes and kinds
SCALE = 2.0**15  # of the gradients of float16, at most and at first
GROWTH = 2000  # steps whose gradients float16 held, after which the scale is doubled
PIECES, PIECE_ROWS = 16, 64  # that workers cut a batch into: at most, and of so many rows at least
PIECE_USES = 1024  # of a weight by a piece of many: less, and writing its gradients is seen
ADDED = 1 << 20  # numbers that a thread is worth starting for, to add them up
ALIGNED = 16  # numbers: parameters lie in one vector, each on the border of a cache line


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

    @property
    def cutting(self) -> str:
        """How batches are cut, in words: bits follow from it."""
        words = ""
        if self.workers is not None:
            words += f" in up to {PIECES} pieces of {PIECE_ROWS} rows and {PIECE_USES} uses"
        if self.memory_limit is not None:
            words += f" within {self.memory_limit} bytes"
        return words

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
