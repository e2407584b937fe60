"""Do the backends agree? Every layer is judged against float64, within a computed bound.

Two correct backends never give the same bits, so the allowed difference is computed from the data
(`nnxp.testing.bounded`). A network is judged layer by layer: each layer gets the reference's
activations as its input on every backend, so that the first layer that diverges is the one that is
named, and no bound has to be carried through the whole depth. Then the engine's sweep is judged as
a whole, against the bound that was carried.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from nnxp._arrays import (
    Array,
    HostArray,
    float_dtype,
    is_array,
    is_floating,
    is_numeric,
    place_of,
    xp_of,
)
from nnxp._errors import DtypeMismatch, OptionError, OutOfMemory, ShapeError, UnsupportedFunction
from nnxp._exchange import source_of
from nnxp._printed import Printed, aligned
from nnxp.backend import Backend, asnumpy, available_backends, get_backend
from nnxp.engine import Engine, inputs_of
from nnxp.layers._layer import Layer, outline_of, way_to_model
from nnxp.program.program import Program, scaled
from nnxp.program.traced import Step, Untraceable, Value, perform
from nnxp.testing import bounded
from nnxp.testing.bounded import LIMIT as LIMIT

comparisons: Counter[str] = Counter()
"""How many comparisons this process has made, by the place where the result was computed."""

Function = Callable[..., Any]
Inputs = tuple[Any, ...]  # host arrays, and None for what is left out


def finite_or_none(value: Any) -> Any:
    """The value as JSON has it, which knows no infinity and no NaN."""
    return None if isinstance(value, float) and not np.isfinite(value) else value


@dataclass(frozen=True)
class Check:
    """One comparison: what was run where, how far off it is, and what is wrong if something is.

        check = nnxp.testing.parity_report(net, x).checks[0]
        print(check.name, check.backend, check.ratio, check.ok)

    Attributes:
        name: the layer's path, "output", or "engine" for the whole sweep.
        what: the layer.
        backend: where it ran.
        ratio: the largest error in units of the bound.
        ulps: that error in units in the last place.
        absolute: that error as it is.
        where: the index of the element that has it.
        problem: what is wrong; empty if nothing is.
    """

    name: str
    what: str
    backend: str
    ratio: float
    ulps: float
    absolute: float
    where: tuple[int, ...]
    problem: str = ""

    @property
    def ok(self) -> bool:
        return not self.problem

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; an infinite error is None."""
        plain = {name: finite_or_none(value) for name, value in asdict(self).items()}
        return plain | {"ok": self.ok}


@dataclass(frozen=True)
class ParityReport(Printed):
    """Every check of a model or function on every backend; print it.

        report = nnxp.testing.parity_report(net, x)
        print(report.to_markdown())
        assert report.ok, report.first_failure

    Attributes:
        checks: a Check for each layer on each backend, and for the whole sweep.
        limit: how many units of the bound are allowed.
    """

    checks: tuple[Check, ...]
    limit: float = LIMIT

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.ok for check in self.checks)

    @property
    def largest(self) -> float:
        """The largest error of all checks, in units of the bound."""
        return max((check.ratio for check in self.checks), default=0.0)

    @property
    def first_failure(self) -> Check | None:
        """The first check that failed: of a network, the first layer that diverges."""
        return next((check for check in self.checks if not check.ok), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "ok": self.ok,
            "largest": finite_or_none(self.largest),
            "limit": self.limit,
            "checks": [check.to_dict() for check in self.checks],
        }

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(self.to_dict())

    def _table(self) -> list[tuple[str, ...]]:
        return [
            (
                check.name,
                check.what if len(check.what) <= 48 else check.what[:47] + "…",
                check.backend,
                f"{check.ratio:.2f}",
                f"{check.ulps:.1f}",
                f"{check.absolute:.2e}",
                check.problem or "ok",
            )
            for check in self.checks
        ]

    def to_markdown(self) -> str:
        """The report as a table in Markdown."""
        rows = [_HEADER, tuple("---" for _ in _HEADER), *self._table()]
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write a picture of the error by layer and backend, as `nnxp.plots.parity` draws it.

        The format is that of the path's ending: .svg, .png or .pdf. OptionError without matplotlib.
        """
        from nnxp.plots import parity

        parity(self).savefig(path)

    def __str__(self) -> str:
        verdict = (
            f"{len(self.checks)} checks passed; largest error {self.largest:.2f} of "
            f"{self.limit:g} units"
        )
        if first := self.first_failure:
            verdict = (
                f"first to diverge: {first.name} {first.what} on {first.backend}: {first.problem}"
            )
        return "\n".join([*aligned([_HEADER, *self._table()]), verdict])


_HEADER = ("layer", "what", "backend", "error/bound", "ulps", "absolute", "verdict")


def assert_parity(
    function: Layer | Function,
    *inputs: Any,
    backends: str | Backend | Iterable[str | Backend] | None = None,
    rigorous: bool = False,
) -> ParityReport:
    """Raise AssertionError, with a table that names the first to diverge, unless all agree.

        nnxp.testing.assert_parity(net, x)

    Args:
        function: as `parity_report` takes it.
        inputs: its rows or arguments.
        backends: names, or one.
        rigorous: proven bounds in place of expected ones.

    Returns:
        The report of `parity_report`.

    Raises:
        AssertionError: the backends disagree; the last line names the first layer to diverge.
        NnxpError: as `parity_report`.
    """
    report = parity_report(function, *inputs, backends=backends, rigorous=rigorous)
    if not report.ok:
        raise AssertionError(f"backends disagree\n{report}")
    return report


def parity_report(
    function: Layer | Function,
    *inputs: Any,
    backends: str | Backend | Iterable[str | Backend] | None = None,
    rigorous: bool = False,
) -> ParityReport:
    """How far each backend is from float64 on these inputs, in units of the computed bound.

    Compared are the values, shape, dtype, place, where NaN and infinity are, and that the inputs
    were left as they are. Where nothing can be compared (no rows, NaN alone, rows of zeros that
    give zeros, infinite bounds) the check says so, and is not ok.

        report = nnxp.testing.parity_report(net, x, backends=["numpy", "sim"])
        print(report)
        report.ok == True

    Args:
        function: a model, or any function of arrays written with
            `xp = nnxp.get_array_module(x)`.
        inputs: its rows, as a host array of any numeric type, one for each input (or a tuple or
            dict of them); of a function its arguments.
        backends: names, or one; without them NumPy, the simulated device, and CUDA if it is usable.
        rigorous: proven bounds in place of expected ones: much wider, beyond dispute.

    Returns:
        A ParityReport: print it. An error of 1 is what rounding may be expected to do at most; 6
        are allowed (1, if rigorous).

    Raises:
        BackendUnavailable: a backend that was named cannot be used.
        NoBound, UnsupportedFunction: the function is not in the dialect that NumPy and CuPy share.
    """
    _check_call(function, inputs)
    if backends is None:
        backends = [name for name, status in available_backends().items() if status.ok]
    chosen = [get_backend(backend) for backend in listed(backends)]
    if not chosen:
        raise OptionError("backends is empty: name at least one, such as 'numpy'")
    with bounded.rigorous() if rigorous else nullcontext():
        if isinstance(function, Layer):
            checks = _judge_model(
                function, inputs_of(function, inputs if len(inputs) != 1 else inputs[0]), chosen
            )
        else:
            checks = _judge_function(function, inputs, chosen)
    comparisons.update(check.backend for check in checks)
    return ParityReport(tuple(checks), 1.0 if rigorous else LIMIT)


def listed(backends: Any) -> list[str | Backend]:
    """The backends of a list, or the one that was named; OptionError for what is neither."""
    if isinstance(backends, str | Backend):
        return [backends]
    if isinstance(backends, Iterable) and not is_array(backends):
        return list(backends)
    raise OptionError(f"backends are names, such as ['numpy', 'sim'], not {backends!r:.60}")


def _check_call(function: Any, inputs: Sequence[Any]) -> None:
    """Raise OptionError or DtypeMismatch unless a function comes first, and then numbers."""
    of_layers = isinstance(function, type) and issubclass(function, Layer)
    if not callable(function) or isinstance(function, Engine) or of_layers:
        swapped = "; it comes first, before its inputs" if any(map(callable, inputs)) else ""
        way = swapped or way_to_model(function)
        raise OptionError(f"a model or a function of arrays is judged, not {function!r:.60}{way}")
    for x in inputs:
        if is_array(x) and not is_numeric(x.dtype):
            raise DtypeMismatch(f"inputs are real numbers, but one of them is {x.dtype}")


def error_bound(
    function: Layer | Function, *inputs: Any, **options: Any
) -> tuple[HostArray, HostArray]:
    """(reference, bound): the result in float64, and the unit of doubt for each of its elements.

    The inputs' own type is the one whose rounding is accounted for.

        value, unit = nnxp.testing.error_bound(nnxp.kernels.gelu, x)
        bool((abs(nnxp.kernels.gelu(x) - value) <= nnxp.testing.LIMIT * unit).all()) == True

    Args:
        function: a model, a kernel of `nnxp.kernels`, or any other function of arrays, which
            answers one of them.
        inputs: its arrays, on the host.
        options: what the function is called with besides.

    Raises:
        OptionError: the function answers several results, or no array.
        NoBound, UnsupportedFunction: it is not in the dialect that NumPy and CuPy share.
    """
    _check_call(function, inputs)
    expected = _expected(partial(function, **options) if options else function, inputs)
    if len(expected) > 1:
        raise OptionError("error_bound is for functions of one result")
    value, error, _ = expected[0]
    return value, error


class Output(NamedTuple):
    """What a result should be, how far it may be off, and the dtype it should have."""

    value: HostArray
    error: HostArray
    dtype: np.dtype[Any]


Expected: TypeAlias = tuple[Output, ...]
"""What a function should answer: one array, mostly."""


def _expected(function: Layer | Function, inputs: Sequence[Any]) -> Expected:
    """The reference's answer. Rounding inside is that of the inputs' type, or of the result's.

    A function that computes in less than that, on whichever backend, owns the difference.
    """
    arrays = [x for x in inputs if is_array(x)]
    if isinstance(function, Layer):
        arrays += function.parameters().values()
        function = function.map_arrays(lambda name, value: _lift(value))
    dtypes = [x.dtype for x in arrays if is_floating(x.dtype)]
    coarsest = max(dtypes, key=bounded.unit_roundoff, default=None)
    with np.errstate(all="ignore"), bounded.no_coarser_than(coarsest):
        answer = function(*map(_lift, inputs))
    results = answer if isinstance(answer, tuple | list) else (answer,)
    return tuple(_output(result, coarsest) for result in results)


def _output(result: Any, coarsest: np.dtype[Any] | None) -> Output:
    if isinstance(result, bounded.ndarray):
        stored = bounded.stored(result, coarsest)
        return Output(stored.value, stored.error, stored.dtype)
    if isinstance(result, np.ndarray | np.generic):  # what does not depend on the inputs is exact
        exact = bounded.asarray(result)
        return Output(exact.value, exact.error, exact.dtype)
    raise OptionError(f"the function returns {type(result).__name__}, not an array")


def product_bound(
    x: Array, weight: Array, *, dtype: object = None, rigorous: bool = False
) -> HostArray:
    """The unit of doubt for each element of x @ weight, x (m, k), weight (k, n) -> (m, n).

    u sqrt(k) (|y| / sqrt(3) + sqrt((x∘x) @ (w∘w)) / sqrt(2)) + u |y|, or, if rigorous,
    k u |x| @ |w| + u |y|, with u the unit roundoff of dtype; sums of 16-bit types are in float32.
    Derived in `nnxp.testing.bounded`.

        unit = nnxp.testing.product_bound(x, net.layers[0].weight)
        unit.shape == (4, 16)

    Args:
        x: (m, k).
        weight: (k, n).
        dtype: what is computed in; without it the type of x.
        rigorous: the proven bound in place of the expected one.

    Raises:
        ShapeError: they do not fit.
    """
    from nnxp import kernels

    a, b = bounded.asarray(asnumpy(x)), bounded.asarray(asnumpy(weight))
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b.shape[0]:
        raise ShapeError(f"x (m, k) and weight (k, n) do not fit: {a.shape} and {b.shape}")
    if dtype is not None:
        a.dtype = b.dtype = float_dtype(dtype)
    with bounded.rigorous() if rigorous else nullcontext():
        error: HostArray = kernels.matmul(a, b).error
    return error


def assert_close(actual: Array, expected: Any, *, bound: Any) -> Check:
    """Raise AssertionError unless |actual - expected| <= bound everywhere.

    NaN and infinity must stand in the same places, and whole numbers are compared as such.

        value, unit = nnxp.testing.error_bound(net, x)
        nnxp.testing.assert_close(net(x), value, bound=nnxp.testing.LIMIT * unit)

    Args:
        actual: what was computed, an array of any library here.
        expected: what was due; broadcasts to the shape of `actual`.
        bound: how far off each element may be, not below zero; broadcasts, too.

    Returns:
        A Check, with the largest error in units of the bound.

    Raises:
        AssertionError: it is not so, or nothing can be compared: there are no elements, or NaN
            alone, or infinite bounds.
        OptionError: a bound is below zero.
        DtypeMismatch: they are no real numbers.
    """
    for x in (actual, expected, bound):
        if not is_numeric(np.asarray(asnumpy(x)).dtype):
            raise DtypeMismatch(f"assert_close takes real numbers, not {x!r:.60}")
    host = np.asarray(asnumpy(actual))
    value, error = np.asarray(asnumpy(expected)), np.asarray(asnumpy(bound), "float64")
    if is_floating(value.dtype):
        value = value.astype("float64")
    if not (error >= 0).all():
        raise OptionError(f"a bound is zero or more, not {bound!r:.60}")
    with suppress(ValueError):  # compare says what does not fit
        value = np.broadcast_to(value, host.shape)
    try:
        error = np.broadcast_to(error, value.shape)
    except ValueError:
        raise ShapeError(f"a bound of shape {error.shape} does not fit {value.shape}") from None
    place = place_of(actual) if is_array(actual) else "cpu"
    check = compare("result", "", place, host, value, error, limit=1.0)
    comparisons[check.backend] += 1
    if not check.ok:
        raise AssertionError(f"{check.problem}; largest error {check.ratio:.3g} times the bound")
    return check


def compare(
    name: str,
    what: str,
    backend: str,
    actual: HostArray,
    value: HostArray,
    error: HostArray,
    limit: float | None = None,
) -> Check:
    """Judge one host array against its reference value and error.

    The error broadcasts to the value; `limit` is how many units of it are accepted. That of whole
    numbers and booleans is no unit but a limit: they are exact unless a decision was in doubt.
    """
    limit = bounded.limit() if limit is None else limit
    if actual.shape != value.shape:
        problem = f"shape {actual.shape}, not {value.shape}"
        return failed(name, what, backend, problem)
    error = np.broadcast_to(error, value.shape)
    if is_floating(actual.dtype):
        computed, stored = actual.astype("float64"), _as_stored(value, actual.dtype)
    else:
        computed, stored, error = actual, value, error / limit
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        odd = ~np.isfinite(stored)
        same = (computed == stored) | (np.isnan(computed) & np.isnan(stored))
        off = np.abs(computed.astype("float64") - np.where(odd, 0, value).astype("float64"))
        off = np.where(same, 0.0, np.where(off == 0, 1.0, off))  # beyond 2^53 floats look the same
        ratio = np.where(off == 0, 0.0, off / error)
        ulps = np.where(off == 0, 0.0, off / _spacing(stored, actual.dtype))
    wrong_kind = (odd & ~same | ~np.isfinite(computed) & ~odd) & np.isfinite(error)
    ratio = np.where(wrong_kind | np.isnan(off), np.inf, np.where(np.isnan(ratio), np.inf, ratio))
    ratio = np.where(np.isinf(error) & ~np.isnan(error), 0.0, ratio)
    nothing = _nothing_compared(stored, error)
    if nothing and not ratio.any():
        return Check(name, what, backend, 0.0, 0.0, 0.0, (), f"nothing was compared: {nothing}")
    where = tuple(int(i) for i in np.unravel_index(int(ratio.argmax()), ratio.shape))
    worst = float(ratio[where])
    problem = ""
    if not worst <= limit:
        problem = (
            f"{int((ratio > limit).sum())} of {ratio.size} elements are off; at {list(where)} "
            f"{_number_text(computed[where])} where {_number_text(value[where])} "
            f"± {limit * error[where]:.2g} was due"
        )
    return Check(name, what, backend, worst, float(ulps[where]), float(off[where]), where, problem)


def failed(name: str, what: str, backend: str, problem: str) -> Check:
    """A check of what cannot be compared with what is due: not ok."""
    return Check(name, what, backend, np.inf, np.inf, np.inf, (), problem)


def _number_text(number: Any) -> str:
    return f"{number:.9g}" if isinstance(number, np.floating) else str(number)


def _nothing_compared(stored: HostArray, error: HostArray) -> str:
    """Why no element of a result says anything about what made it; "" if one does."""
    if not stored.size:
        return "there are no elements"
    if np.isnan(stored).all():
        return "all that is due is NaN"
    if (np.isinf(error) | np.isnan(stored)).all():
        return "every bound is infinite"
    return ""


def _only_zeros(inputs: Sequence[Any], expected: Expected, check: Check) -> Check:
    """The check; not ok if rows of zeros gave zeros, as any factor would have done."""
    zeros = any(is_array(x) and x.size and not x.any() for x in inputs)
    if check.ok and zeros and not any(output.value.any() for output in expected):
        return replace(check, problem="nothing was compared: rows of zeros give zeros")
    return check


def _as_stored(value: HostArray, dtype: np.dtype[Any]) -> HostArray:
    """float64 values after a trip through dtype: too large ones become infinite."""
    if not is_floating(dtype):
        return value
    with np.errstate(all="ignore"):
        return value.astype(dtype).astype("float64")


def _spacing(value: HostArray, dtype: np.dtype[Any]) -> HostArray:
    """One unit in the last place of each value, in dtype; 1 for whole numbers."""
    if not is_floating(dtype):
        return np.ones(value.shape)
    u = bounded.unit_roundoff(dtype)
    exponent = np.floor(np.log2(np.maximum(np.abs(value), float(bounded._finfo(dtype).tiny))))
    return np.asarray(2 * u * 2.0**exponent)


def _lift(x: Any) -> Any:
    """Arrays as bounded ones; whatever else as it is."""
    return bounded.asarray(asnumpy(x)) if is_array(x) else x


def _judge_function(
    function: Function, inputs: Sequence[Any], backends: Sequence[Backend]
) -> list[Check]:
    name = getattr(function, "__name__", type(function).__name__)
    expected = _expected(function, inputs)
    checks = [_run(name, "", function, inputs, backend, expected) for backend in backends]
    return [_only_zeros(inputs, expected, check) for check in checks]


def _judge_model(model: Layer, inputs: Sequence[Any], backends: Sequence[Backend]) -> list[Check]:
    """Every part of a model, and then what the engine makes of it as a whole, on every backend."""
    host = model.to("numpy")
    host_rows = tuple(None if x is None else _numeric(x) for x in inputs)
    takes = (*host.takes, *("float" for _ in host_rows))
    dtypes = host.input_dtypes(len(host_rows))
    rows = tuple(
        x if x is None or wanted == "any" or (host.dtype is None and is_floating(x.dtype))
        else x.astype(dtype)
        for x, wanted, dtype in zip(host_rows, takes, dtypes, strict=False)
    )  # fmt: skip
    checks = _judge_parts(host, rows, backends)
    exactly = tuple(map(_in_own_type, host_rows, rows))
    expected = _expected(host, rows)
    for backend in backends:
        check = _judge_whole(host, rows, exactly, backend, expected)
        checks.append(_only_zeros(rows, expected, check))
    return checks


def _in_own_type(x: HostArray | None, converted: HostArray | None) -> HostArray | None:
    """x, if the model sees the same numbers as in x converted; else that."""
    if x is None or converted is None:
        return x
    same = np.array_equal(converted.astype(x.dtype), x, equal_nan=x.dtype.kind == "f")
    return x if same else converted


def _present(inputs: Inputs) -> tuple[HostArray, ...]:
    return tuple(x for x in inputs if x is not None)


def _numeric(x: Any) -> HostArray:
    rows = np.asarray(asnumpy(x if is_array(x) else source_of(x)))
    if not is_numeric(rows.dtype):
        raise DtypeMismatch(f"rows are real numbers, not {rows.dtype}")
    return rows


def _judge_parts(model: Layer, rows: Inputs, backends: Sequence[Backend]) -> list[Check]:
    """Each layer, and each step of a layer that is made of others, given the reference's arrays.

    So the first to diverge is the one that is named, by its path, and no bound has to be carried
    through the whole depth. Layers are called as they are, on the backend's arrays. A model that
    cannot be written out is one part.
    """
    try:
        program = model.program(*map(outline_of, rows))
        wide = tuple(
            x if x is None or not is_floating(x.dtype) else x.astype("float64") for x in rows
        )
        exact = model.astype("float64").program(*map(outline_of, wide))
    except Untraceable:
        expected = _expected(model, rows)
        return [_run("output", repr(model), model, rows, backend, expected) for backend in backends]
    alike = [step.name for step in exact.steps] == [step.name for step in program.steps]
    ran, inputs = (exact, wide) if alike else (program, rows)  # types make other steps of some
    known: dict[Value, HostArray] = dict(zip(program.inputs, _present(rows), strict=True))
    values = [value for step in program.steps for value in step.outputs]
    with np.errstate(all="ignore"):
        arrays = ran.run(_present(inputs), [value for step in ran.steps for value in step.outputs])
        for value, array in zip(values, arrays, strict=True):
            known[value] = np.asarray(array).astype(value.dtype)

    def judged(part: Part, at: Sequence[Backend]) -> list[Check]:
        inputs = [known.get(v, v.numbers) if isinstance(v, Value) else v for v in part.inputs]
        expected = _expected(part.function, inputs)
        return [
            _run(part.name, part.what, part.function, inputs, backend, expected) for backend in at
        ]

    def narrowed(check: Check, part: Part, backend: Backend) -> Check:
        """The check of a layer that diverges, as that of the first of its steps that does."""
        for step in part.steps:
            (inner,) = judged(_step_alone(step, len(_present(rows)[0])), [backend])
            if not inner.ok:
                return replace(inner, what=part.what, problem=f"{step.name}: {inner.problem}")
        return check

    checks = []
    for part in _parts(model, program, len(_present(rows)[0])):
        judgements = zip(judged(part, backends), backends, strict=True)
        checks.append(
            [check if check.ok else narrowed(check, part, backend) for check, backend in judgements]
        )
    return [check for one_backend in zip(*checks, strict=True) for check in one_backend]


class Part(NamedTuple):
    """What is judged alone: a layer, with the steps it makes, or a step."""

    name: str
    what: str
    function: Layer | Function
    inputs: tuple[Any, ...]
    steps: tuple[Step, ...] = ()


def _parts(model: Layer, program: Program, rows: int) -> list[Part]:
    """Whatever is judged alone, in order of the work."""
    layers = {**dict(model.walk()), "": model}
    at = {value: i for i, step in enumerate(program.steps) for value in step.outputs}
    steps: dict[str, list[Step]] = {}
    for step in program.steps:
        if any(v.numbers is None for v in step.values):
            steps.setdefault(step.path, []).append(step)
    parts = []
    for path, inputs, outputs in program.leaves:
        inner = [step for step in steps.get(path, ()) if not isinstance(step.function, Layer)]
        layer = layers[path]
        part = Part(path or "output", repr(layer), layer, inputs, tuple(inner))
        parts.append((at.get(outputs[0], -1), part))
    inside = {call.path for call in program.leaves}
    parts += [
        (at[step.outputs[0]], _step_alone(step, rows))
        for path, own in steps.items() if path not in inside for step in own
    ]  # fmt: skip
    return [part for _, part in sorted(parts, key=lambda pair: pair[0])]


def _step_alone(step: Step, rows: int) -> Part:
    """A step of a program as a function of arrays of any library."""
    name = step.path or "output"
    if isinstance(step.function, Layer):
        return Part(name, repr(step.function), step.function, step.inputs)
    now = scaled(step, rows)

    def function(*arrays: Any) -> Any:
        first = next(x for x in arrays if is_array(x))
        return perform(xp_of(first), now, arrays)

    return Part(name, step.name, function, step.inputs)


def _judge_whole(
    model: Layer, rows: Inputs, host_rows: Inputs, backend: Backend, expected: Expected
) -> Check:
    """What users may run: the model called, and the engine in all its ways; the worst of them."""
    worst: Check | None = None
    try:
        with np.errstate(all="ignore"):
            for way, part, results in _ways(model, rows, host_rows, backend, expected):
                check = _compared("engine", way, backend.device, results, expected, part)
                if worst is None or check.ratio > worst.ratio or not check.ok:
                    worst = check
                if not check.ok:
                    return check
    except Exception as problem:
        message = f"raises {type(problem).__name__}: {problem}"
        return failed("engine", repr(model), backend.device, message)
    assert worst is not None
    return replace(worst, what="the whole, in every way that there is")


def _ways(
    model: Layer, rows: Inputs, host_rows: Inputs, backend: Backend, expected: Expected
) -> Iterator[tuple[str, slice, Any]]:
    """(way, which rows, what came of them)."""
    count, every, one = len(_present(rows)[0]), slice(None), slice(0, 1)

    def handed(arrays: tuple[Any, ...]) -> Any:
        return arrays if len(arrays) > 1 else arrays[0]

    def mapped(change: Function, arrays: Inputs) -> Inputs:
        return tuple(None if x is None else change(x) for x in arrays)

    placed = model.to(backend)
    with backend.current():
        answer = placed(*mapped(backend.put, rows))
    yield "the model called", every, _on_host(answer, backend)
    with Engine(model, backend) as engine:
        outs = tuple(np.full(v.shape, np.nan, d) for v, _, d in expected)
        engine(handed(host_rows), outs if len(outs) > 1 else outs[0])
        yield "the engine, into memory of the caller", every, outs
        for call in ("first", "second", "third"):
            yield f"the engine, {call} call", every, engine(handed(host_rows))
        columns_first = handed(mapped(np.asfortranarray, host_rows))
        yield "rows that lie the other way", every, engine(columns_first)
        first = mapped(lambda x: x[one], host_rows)
        for call in ("first", "second", "third"):
            yield f"one row alone, {call} call", one, engine(handed(first))
        if backend.device != "cpu":
            for call in ("first", "second", "third"):
                resident = engine(handed(mapped(backend.put, rows)))
                yield f"rows on the device, {call} call", every, _on_host(resident, backend)
        plan = engine.plan(*(None if x is None else x.shape for x in rows))
    share = max(1, 2 * count // 5)  # so that there are three blocks, the last one a smaller one
    limit = plan.working_set * share // max(1, plan.rows * plan.workers)
    if count > 2:
        with suppress(OutOfMemory), Engine(model, backend, memory_limit=max(1, limit)) as engine:
            yield "the engine, block by block", every, engine(handed(host_rows))


def _on_host(answer: Any, backend: Backend) -> Any:
    return (
        tuple(map(backend.get, answer)) if isinstance(answer, tuple | list) else backend.get(answer)
    )


def _run(
    name: str,
    what: str,
    function: Layer | Function,
    inputs: Sequence[Any],
    backend: Backend,
    expected: Expected,
) -> Check:
    """One function on one backend: its value, dtype, place, and that its inputs are unchanged."""
    fails = partial(failed, name, what, backend.device)
    placed = function.to(backend) if isinstance(function, Layer) else function
    arguments = [backend.put(x.copy()) if is_array(x) else x for x in inputs]
    try:
        with backend.current(), np.errstate(all="ignore"):
            answer = placed(*arguments)
    except UnsupportedFunction:
        raise  # a library of ours lacks it: that says nothing of the backend
    except Exception as problem:
        return fails(f"raises {type(problem).__name__}: {problem}")
    results = list(answer) if isinstance(answer, tuple | list) else [answer]
    for i, (result, output) in enumerate(zip(results, expected, strict=True)):
        if isinstance(result, np.generic):  # NumPy's sums of all elements
            result = np.asarray(result)
        if not is_array(result):
            return fails(f"returns {type(result).__name__}, not an array")
        if place_of(result) != backend.device:
            return fails(f"the result is on {place_of(result)}")
        if result.dtype != output.dtype:
            return fails(f"the result is {result.dtype}, not {output.dtype}")
        results[i] = backend.get(result)
    for before, after in zip(inputs, arguments, strict=True):
        if is_array(before) and backend.get(after).tobytes() != before.tobytes():
            return fails("changed its input")
    return _compared(name, what, backend.device, tuple(results), expected)


def _compared(
    name: str, what: str, backend: str, results: Any, expected: Expected, part: slice | None = None
) -> Check:
    """The worst of all outputs; of these rows of them."""
    results = results if isinstance(results, tuple) else (results,)
    checks = []
    for result, (value, error, _) in zip(results, expected, strict=True):
        if part is not None:
            value, error = value[part], error[part]
        checks.append(compare(name, what, backend, result, value, error))
    return max(checks, key=lambda check: (not check.ok, check.ratio))
