"""A loss and its gradients: one program, written out once for each structure and batch.

The program takes the parameters, the arrays, and what is drawn at random, and answers the loss,
what the layers tell besides, and the gradients. On the CPU it is bound to memory as a recording,
elsewhere it is run step by step where the parameters are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from operator import is_
from threading import local
from typing import Any

import numpy as np

from nnxp._arrays import Array, HostArray, Owner, is_array, owners, place_of, xp_of
from nnxp._errors import (
    DeviceMismatch,
    IdError,
    NotDifferentiable,
    OptionError,
    UnsupportedFunction,
)
from nnxp.backend import home_of, to_backend
from nnxp.backend._device import DeviceBackend
from nnxp.backend._recording import StepRecording, recorded
from nnxp.layers._layer import Layer, Rng, check_model, generator, originals, reason_of
from nnxp.program import traced
from nnxp.program.fused import fused
from nnxp.program.gradient import gradient, pullback
from nnxp.program.program import Program, trace
from nnxp.program.recording import Bodied, Layout, Recording, bodied
from nnxp.program.rewrite import merged, placed, with_products, written_out
from nnxp.program.traced import Drawn, Untraceable, Value

Loss = Callable[..., Any]
"""loss(model, x, target, ...) -> a single number, written with the library of its arrays."""

NOISE_BYTES = 5  # of an element that is dropped or not: a float32 is drawn, a bool is made of it
FEW_ROWS = 512  # of a batch at most, to be recorded: with more, to start the work is little of it
MOST_PROGRAMS = 32  # structures and batches that a function of gradients remembers


@dataclass(frozen=True)
class LossProgram:
    """A loss written out, and its gradients by the parameters that learn.

    The program's inputs are the parameters `inputs`, the arrays, and what is `drawn`; its outputs
    the loss, the running `statistics` of layers, and the gradients of `learned`. `owners` has for
    every parameter of the model the one whose array it is: the first in the same memory.
    """

    program: Program
    inputs: tuple[str, ...]
    owners: Mapping[str, Owner]
    learned: tuple[str, ...]
    statistics: tuple[str, ...]
    drawn: tuple[Drawn, ...]

    @cached_property
    def bodied(self) -> Bodied:
        """The program as the CPU runs it."""
        return bodied(merged(bodied(self.program)))

    @cached_property
    def working_set(self) -> int:
        """Bytes that a run takes besides its inputs, its results, and Python's own objects."""
        layout = Layout(self.bodied, 1)
        inputs = {value for step in self.bodied.steps for value in step.values}
        constants = [value.numbers.nbytes for value in inputs if value.numbers is not None]
        noise = [prod(drawn.value.shape) * NOISE_BYTES for drawn in self.drawn]
        return layout.anew + layout.scratch + sum([*layout.sizes, *constants, *noise])


def write_out(
    loss: Loss,
    model: Layer,
    arrays: Sequence[Any],
    learned: Callable[[str], bool] | None = None,
    scale: float = 1.0,
) -> LossProgram:
    """The program of loss(model, *arrays) and of its gradients, for arrays of these shapes.

    `arrays` may be tuples and dicts of arrays, and None. `learned` says which parameters get
    gradients, `scale` times as large as they are; without it none do. Raises NotDifferentiable for
    a loss that looks at numbers.
    """
    parameters = model.parameters()
    owner_of = owners(parameters)
    inputs = tuple(dict.fromkeys(owner.name for owner in owner_of.values()))
    flat = arrays_in(arrays)
    values = [Value(parameters[n].shape, parameters[n].dtype, name=n) for n in inputs]
    values += [Value(x.shape, x.dtype, name=f"x{i}") for i, x in enumerate(flat)]
    layers: dict[int, tuple[str, Any]] = {}
    tapes: list[traced.Tape] = []

    def written(*traced_inputs: Any) -> tuple[Any, ...]:
        own = dict(zip(inputs, traced_inputs, strict=False))
        lifted = model.map_arrays(lambda name, _: owner_of[name].of(own))
        layers.update(originals(lifted, model))
        tapes.append(traced.current_tape())
        rest = iter(traced_inputs[len(inputs) :])
        y = loss(lifted, *with_arrays(tuple(arrays), rest))
        if not isinstance(y, traced.ndarray):
            raise NotDifferentiable(
                f"the loss is {y!r:.60}, which does not come from the model and its arrays"
            )
        return y, *map(traced.lifted, tapes[0].statistics.values())

    rows = next((len(x) for x in flat if x.ndim), None)
    try:
        program = trace(written, *values, layers=layers, rows=rows)
    except (Untraceable, UnsupportedFunction) as error:
        raise NotDifferentiable(f"the loss cannot be written out: {reason_of(error)}") from error
    tape = tapes[0]
    program = replace(program, inputs=(*program.inputs, *(d.value for d in tape.drawn)))
    chosen = tuple(n for n in inputs if learned is not None and learned(n))
    if learned is not None:
        by_name = dict(zip(inputs, program.inputs, strict=False))
        whole = gradient(program, program.outputs[0], [by_name[n] for n in chosen], scale)
        learning = {n for n, owner in owner_of.items() if owner.name in chosen}
        _refuse_constants(program, learning - model._names_in("fixed"))
        program = whole
    return LossProgram(program, inputs, owner_of, chosen, tuple(tape.statistics), tuple(tape.drawn))


def _refuse_constants(program: Program, learned: set[str]) -> None:
    """Raise NotDifferentiable where a layer with one of these parameters is run as Python.

    Its parameters are what they were when the program was written, whatever is learned.
    """
    for step in program.steps:
        if step.reason and isinstance(step.function, Layer):
            own = {f"{step.path}.{n}".lstrip(".") for n in step.function.parameters()}
            if own & learned:
                raise NotDifferentiable(
                    f"{', '.join(sorted(own & learned))} cannot learn: {step.path or 'the model'} "
                    f"is run as Python: {step.reason}"
                )


@contextmanager
def _ids_told() -> Iterator[None]:
    """IdError for a label or an id that names nothing, which is NumPy's IndexError."""
    try:
        yield
    except IdError:
        raise
    except IndexError as error:
        raise IdError(f"a label, or an id, names nothing: {error}") from error


class LossRunner:
    """A LossProgram where the model is, to be run many times; one caller at a time.

    On a device a small batch `records`: what comes a second time with the same parameters, and
    gradients to fill, is recorded, and only replayed then.
    """

    def __init__(self, written: LossProgram, place: str, records: bool = False) -> None:
        self.written, self.place, self.records = written, place, records
        self._fixed: list[Array] = []  # parameters and gradients of the calls so far
        self._step: StepRecording | None = None
        self._home = home_of(place)
        self._recording: Recording | None = None
        if place == "cpu":
            kinds = [value.dtype for value in written.program.inputs]
            self._recording = Recording(written.bodied, 1, kinds)
        else:
            program = written.program
            if self._home.name == "cupy":
                program = fused(with_products(written_out(merged(program), "cupy")))
            with self._home.current():
                self._program = placed(program, lambda x: to_backend(x, self._home))

    def draw(self, rng: np.random.Generator | None) -> list[HostArray]:
        """What this run draws at random."""
        if self.written.drawn and rng is None:
            raise OptionError(
                "the model drops at random in its training form: rng= takes a seed or a Generator"
            )
        return [drawn.draw(rng) for drawn in self.written.drawn if rng is not None]

    @np.errstate(all="ignore")  # what is no number any more goes on to the loss, where it is seen
    def __call__(
        self,
        parameters: Sequence[Array],
        arrays: Sequence[Array],
        rng: np.random.Generator | None,
        gradients: Sequence[Array] | None = None,
        then: Callable[[], None] | None = None,
    ) -> tuple[Array, dict[str, Array], list[Array]]:
        """The loss, the statistics of layers, and the gradients; in `gradients`, if given.

        With those, `then` is what is done next on a device, the same every time.
        """
        outputs = self.written.program.outputs
        mark = 1 + len(self.written.statistics)
        drawn = self.draw(rng)
        with self._home.current(), _ids_told():
            batch = [*arrays, *(to_backend(noise, self._home) for noise in drawn)]
            if self._recording is not None:
                due = outputs if gradients is None else outputs[:mark]
                results = [*(np.empty(v.shape, v.dtype) for v in due), *(gradients or ())]
                self._recording([*parameters, *batch], results)
            elif gradients is not None:
                results = [*self._filled(parameters, batch, gradients, then), *gradients]
            else:
                results = self._program.run([*parameters, *batch])
                results = [_owned(y, v) for y, v in zip(results, outputs, strict=True)]
        statistics = dict(zip(self.written.statistics, results[1:mark], strict=True))
        return results[0], statistics, results[mark:]

    def over(
        self, model: Layer, arrays: Sequence[Any], rng: np.random.Generator | None = None
    ) -> tuple[Array, dict[str, Array], list[Array]]:
        """The same, of the parameters of a model and of all arrays in what the loss takes."""
        parameters = model.parameters()
        own = [parameters[name] for name in self.written.inputs]
        return self(own, arrays_in(arrays), rng)

    def _filled(
        self,
        parameters: Sequence[Array],
        batch: Sequence[Array],
        gradients: Sequence[Array],
        then: Callable[[], None] | None,
    ) -> tuple[Array, ...]:
        """The loss and the statistics of layers, on a device; the gradients are filled."""

        def fill(arrays: Sequence[Array]) -> tuple[Array, ...]:
            results = self._program.run([*parameters, *arrays])
            mark = 1 + len(self.written.statistics)
            for into, g in zip(gradients, results[mark:], strict=True):
                into[...] = g
            return tuple(results[:mark])

        def run(arrays: Sequence[Array]) -> tuple[Array, ...]:
            results = fill(arrays)
            if then is not None:
                then()
            return results

        fixed = [*parameters, *gradients]
        again = len(fixed) == len(self._fixed) and all(map(is_, fixed, self._fixed))
        self._fixed = fixed
        if not again:
            self._step = None
            return run(batch)
        if self.records:
            self.records = False  # it is tried once
            few = all(max(x.shape[:1], default=0) <= FEW_ROWS for x in batch)
            if few and isinstance(self._home, DeviceBackend):
                self._step = recorded(StepRecording, self._home, run, fill, batch)
        return run(batch) if self._step is None else self._step(batch)


def _owned(y: Array, value: Value) -> Array:
    """y, which nobody else has: a copy of what is a constant or an input."""
    return y.copy() if value.root.step is None else y


def value_and_gradients(loss: Loss) -> Callable[..., tuple[Array, dict[str, Array]]]:
    """A loss `(model, x, target, ...)` as a function that answers `loss, gradients`.

    It is written out once for each structure of the model and shape of the arrays, by each thread
    that calls it: what else it looks at, such as a weight in a closure, is what it was then. A
    model in its training form that draws at random takes `rng=`, a seed or a Generator.

        step = nnxp.value_and_gradients(nnxp.losses.mean_square)
        loss, gradients = step(net, x, target)

    Args:
        loss: any function of a model and arrays that is written with the library of its arrays, and
            answers one number.

    Returns:
        A function. Its loss is the number as an array without axes, where the model is; its
        gradients are arrays like the parameters, by the names of `model.parameters()`. Parameters
        that share an array get each the gradient of the one array. One that the loss does not
        depend on has a gradient of zeros; that is said once, in a warning.

    Raises:
        NotDifferentiable: arithmetic has no gradient; the message has the layer or the line.
        DeviceMismatch: arrays are not where the model is.
        OptionError, IdError: on the CPU, targets that mean nothing to the loss, ids to the model.
    """
    if not callable(loss):
        raise OptionError(f"a loss is a function (model, x, target) -> number, not {loss!r:.60}")
    of_thread = local()  # for each has its buffers

    def both(model: Layer, *arrays: Any, rng: Rng = None) -> tuple[Array, dict[str, Array]]:
        runners = of_thread.__dict__.setdefault("runners", {})
        runner = _runner(runners, loss, model, arrays, lambda name: True)
        random = generator(rng) if runner.written.drawn and rng is not None else None
        y, _, gradients = runner.over(model, arrays, random)
        by_name = dict(zip(runner.written.learned, gradients, strict=True))
        return y, {name: owner.of(by_name) for name, owner in runner.written.owners.items()}

    return both


def evaluated(loss: Loss, model: Layer, *arrays: Any) -> Array:
    """loss(model, *arrays), run as its program is: without gradients, and in no training form."""
    return _runner({}, loss, model, arrays, None).over(model, arrays)[0]


def _runner(
    known: dict[Any, tuple[Layer, LossRunner]],
    loss: Loss,
    model: Layer,
    arrays: Sequence[Any],
    learned: Callable[[str], bool] | None,
) -> LossRunner:
    """What runs this loss for such a model and such arrays."""
    check_model(model, "a loss")
    places = {place_of(x) for x in (*model.parameters().values(), *arrays_in(arrays))}
    if len(places) > 1:
        raise DeviceMismatch(
            f"the model and its arrays are in different places: {', '.join(sorted(places))}; "
            "nnxp.to_backend(x, ...) and model.to(...) bring them together"
        )
    place = next(iter(places), "cpu")
    key = structure(model), structure(tuple(arrays)), place
    if key not in known:
        if len(known) >= MOST_PROGRAMS:
            known.clear()
        written = write_out(loss, model, arrays, learned)
        if learned is not None:
            warn_of_idle(written, model)
        known[key] = model, LossRunner(written, place)  # the model lives on: ids in the key are its
    check = getattr(loss, "check", None)
    if check is not None and place == "cpu":
        check(arrays[1], None)
    return known[key][1]


def warn_of_idle(written: LossProgram, model: Layer) -> None:
    """Warn of parameters that got no gradient, which is mostly a mistake."""
    values = written.program.outputs[1 + len(written.statistics) :]
    fixed = model._names_in("fixed")
    idle = [name for name, value in zip(written.learned, values, strict=True)
            if not (name in fixed or value.numbers is None or value.numbers.any())]  # fmt: skip
    if idle:
        warnings.warn(
            f"no gradient: the loss does not depend on {', '.join(idle)}", UserWarning, stacklevel=4
        )


def vjp(function: Callable[..., Any], *arrays: Array) -> tuple[Any, Callable[..., Any]]:
    """function(*arrays), and what passes the worth of a change of it back to the arrays.

    A layer is a function of its inputs; `value_and_gradients` is for its parameters.

        y, back = nnxp.vjp(layer, x)
        dx = back(dy)                    # the gradient of sum(dy * y), shaped like x

    Args:
        function: a layer, or a function of arrays that is written with their library.
        arrays: its inputs.

    Returns:
        The result, and a function of an array like it, or of as many as there are results, that
        answers the gradient by the array, or a tuple for several.

    Raises:
        NotDifferentiable: arithmetic has no gradient; the message has the layer or the line.
        OptionError: what is no function, or no array.
    """
    if not callable(function):
        raise OptionError(
            f"vjp differentiates a layer or a function of arrays, not {function!r:.60}"
        )
    for x in arrays:
        if not is_array(x):
            raise OptionError(
                f"vjp takes arrays of NumPy or CuPy behind the function, not {x!r:.60}"
            )
    if not arrays:
        raise OptionError("vjp takes the arrays that the function is called with, but none came")
    layers = originals(function, function) if isinstance(function, Layer) else {}
    names = [f"x{i}" for i in range(len(arrays))]
    values = [Value(x.shape, x.dtype, name=n) for x, n in zip(arrays, names, strict=True)]
    try:
        program = trace(function, *values, layers=layers)
    except (Untraceable, UnsupportedFunction) as error:
        raise NotDifferentiable(f"{function!r:.60}: {reason_of(error)}") from error
    backward = pullback(program, program.inputs)
    home = home_of(place_of(arrays[0]))
    if xp_of(arrays[0]) is not np and home.device != "cpu":
        backward = placed(backward, lambda x: to_backend(x, home))
    count = len(program.outputs)

    def back(*worth: Array) -> Any:
        if len(worth) != count or not all(map(is_array, worth)):
            raise OptionError(
                f"what a change is worth is {count} arrays, one for each result, not {worth!r:.60}"
            )
        for dy, value in zip(worth, program.outputs, strict=True):
            if dy.shape != value.shape:
                raise OptionError(f"a change of {list(value.shape)} has no worth {list(dy.shape)}")
        with home.current():
            gradients = backward.run([*arrays, *worth])[count:]
        pairs = zip(gradients, backward.outputs[count:], strict=True)
        owned = tuple(_owned(g, v) for g, v in pairs)
        return owned if len(owned) > 1 else owned[0]

    return function(*arrays), back


# structures


def structure(x: Any) -> Any:
    """What a program depends on in a model or in arrays: all but the numbers."""
    arrays: dict[str, Array] = {}

    def key(x: Any) -> Any:
        if is_array(x):
            arrays[str(len(arrays))] = x
            return x.shape, str(x.dtype)
        if isinstance(x, Layer):
            return type(x), tuple((name, key(value)) for name, value in x._fields())
        if isinstance(x, tuple | list):
            return type(x), tuple(map(key, x))
        if isinstance(x, dict):
            return dict, tuple((name, key(value)) for name, value in x.items())
        try:
            hash(x)
        except TypeError:
            return type(x), id(x)
        return type(x), x

    return key(x), tuple(owners(arrays).values())


def arrays_in(x: Any) -> list[Array]:
    """The arrays in tuples, lists and dicts, in order."""
    if isinstance(x, Mapping):
        x = tuple(x.values())
    if isinstance(x, tuple | list):
        return [array for item in x for array in arrays_in(item)]
    return [x] if is_array(x) else []


def with_arrays(x: Any, arrays: Iterator[Array]) -> Any:
    """The same tuples and dicts with these arrays in place of their own."""
    if isinstance(x, Mapping):
        return {key: with_arrays(value, arrays) for key, value in x.items()}
    if isinstance(x, tuple | list):
        return type(x)(with_arrays(item, arrays) for item in x)
    return next(arrays) if is_array(x) else x


def applied(model: Layer, x: Any) -> Any:
    """What a model answers for its input, or for several in a tuple or a dict by name."""
    if isinstance(x, Mapping):
        return model(**x)
    return model(*x) if isinstance(x, tuple) else model(x)
