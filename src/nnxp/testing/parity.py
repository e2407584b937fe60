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
from typing import Any

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
from nnxp._errors import DtypeMismatch, OptionError, ShapeError, UnsupportedFunction
from nnxp._exchange import source_of
from nnxp.backend import Backend, asnumpy, available_backends, get_backend
from nnxp.engine import Engine
from nnxp.layers._layer import Layer
from nnxp.program.program import Program, scaled
from nnxp.program.traced import Step, Untraceable, Value, perform
from nnxp.testing import bounded
from nnxp.testing.bounded import LIMIT as LIMIT

comparisons: Counter[str] = Counter()
"""How many comparisons this process has made, by the place where the result was computed."""

Function = Callable[..., Any]


def finite_or_none(value: Any) -> Any:
    """The value as JSON has it, which knows no infinity and no NaN."""
    return None if isinstance(value, float) and not np.isfinite(value) else value


@dataclass(frozen=True)
class Check:
    """One comparison: what was run where, how far off it is, and what is wrong if something is.

    `ratio` is the largest error in units of the bound; `where` is the index of the element that
    has it, `ulps` that error in units in the last place, and `absolute` the error as it is.
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
class ParityReport:
    """Every check of a model or function on every backend; print it."""

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
        """Write a picture of the error by layer and backend: an SVG image, for any browser."""
        from nnxp.testing._plot import svg

        with open(path, "w", encoding="utf-8") as file:
            file.write(svg(self))

    def __str__(self) -> str:
        rows = [_HEADER, *self._table()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        failed = self.first_failure
        verdict = (
            f"{len(self.checks)} checks passed; largest error {self.largest:.2f} of "
            f"{self.limit:g} units"
            if failed is None
            else f"first to diverge: {failed.name} {failed.what} on {failed.backend}: "
            f"{failed.problem}"
        )
        return "\n".join([*(line.rstrip() for line in lines), verdict])


_HEADER = ("layer", "what", "backend", "error/bound", "ulps", "absolute", "verdict")


def assert_parity(
    function: Layer | Function,
    *inputs: Any,
    backends: str | Backend | Iterable[str | Backend] | None = None,
    rigorous: bool = False,
) -> ParityReport:
    """Raise AssertionError, with a table that names the first to diverge, unless all agree.

    Takes what `parity_report` takes, and answers with its report.
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

    `function` is a model and `inputs` its rows, as a host array of any numeric type; or any
    function of arrays written with `xp = nnxp.get_array_module(x)`, and `inputs` its arguments.
    `backends` are names, or one; without them, NumPy, the simulated device, and CUDA if it is
    usable.
    `rigorous` asks for proven bounds in place of expected ones: much wider, beyond dispute.

    Compared are the values, shape, dtype, place, where NaN and infinity are, and that the inputs
    were left as they are. Where nothing can be compared (no rows, NaN alone, rows of zeros that
    give zeros, infinite bounds) the check says so, and is not ok. Raises BackendUnavailable for a
    backend that cannot be used, NoBound or UnsupportedFunction for a function that is not in the
    dialect that NumPy and CuPy share.
    """
    _check_call(function, inputs)
    if backends is None:
        backends = [name for name, found in available_backends().items() if found.ok]
    chosen = [get_backend(each) for each in listed(backends)]
    if not chosen:
        raise OptionError("backends is empty: name at least one, such as 'numpy'")
    with bounded.rigorous() if rigorous else nullcontext():
        if isinstance(function, Layer):
            if len(inputs) != 1:
                raise OptionError(f"a model takes one array of rows, not {len(inputs)} inputs")
            checks = _judge_model(function, inputs[0], chosen)
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
    if not callable(function) or (isinstance(function, type) and issubclass(function, Layer)):
        swapped = "; it comes first, before its inputs" if any(map(callable, inputs)) else ""
        raise OptionError(f"a model or a function is judged, not {function!r:.60}{swapped}")
    for x in inputs:
        if is_array(x) and not is_numeric(x.dtype):
            raise DtypeMismatch(f"inputs are real numbers, but one of them is {x.dtype}")


def error_bound(
    function: Layer | Function, *inputs: Any, **options: Any
) -> tuple[HostArray, HostArray]:
    """(reference, bound): the result in float64, and the unit of doubt for each of its elements.

    The function is a model, a kernel of `nnxp.kernels`, or any other function of arrays, called
    with these options. The inputs' own type is the one whose rounding is accounted for.
    """
    _check_call(function, inputs)
    expected = _expected(partial(function, **options) if options else function, inputs)
    return expected.value, expected.error


@dataclass(frozen=True)
class Expected:
    """What a result should be, how far it may be off, and the dtype it should have."""

    value: HostArray
    error: HostArray
    dtype: np.dtype[Any]


def _expected(function: Layer | Function, inputs: Sequence[Any]) -> Expected:
    """The reference's answer. Rounding inside is that of the inputs' type, or of the result's.

    A function that computes in less than that, on whichever backend, owns the difference.
    """
    arrays = [x for x in inputs if is_array(x)]
    if isinstance(function, Layer):
        arrays += function.parameters().values()
        function = function.map_arrays(lambda name, value: _lift(value))
    kinds = [x.dtype for x in arrays if is_floating(x.dtype)]
    coarsest = max(kinds, key=bounded.unit_roundoff, default=None)
    with np.errstate(all="ignore"), bounded.no_coarser_than(coarsest):
        result = function(*map(_lift, inputs))
    if isinstance(result, bounded.ndarray):
        stored = bounded.stored(result, coarsest)
        return Expected(stored.value, stored.error, stored.dtype)
    if isinstance(result, np.ndarray | np.generic):  # what does not depend on the inputs is exact
        exact = bounded.asarray(result)
        return Expected(exact.value, exact.error, exact.dtype)
    raise OptionError(f"the function returns {type(result).__name__}, not an array")


def product_bound(
    x: Array, weight: Array, *, dtype: object = None, rigorous: bool = False
) -> HostArray:
    """The unit of doubt for each element of x @ weight, x (m, k), weight (k, n) -> (m, n).

    u sqrt(k) (|y| / sqrt(3) + sqrt((x∘x) @ (w∘w)) / sqrt(2)) + u |y|, or, if rigorous,
    k u |x| @ |w| + u |y|, with u the unit roundoff of dtype (the type of x if None); sums of
    16-bit types are in float32. Derived in `nnxp.testing.bounded`.
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

    expected and bound broadcast to the shape of actual; NaN and infinity must stand in the same
    places, and whole numbers are compared as such. Where nothing can be compared, for there are no
    elements, or NaN alone, or infinite bounds, that is an AssertionError, too. Raises OptionError
    for a bound below zero, DtypeMismatch for what are no real numbers.

        value, unit = error_bound(function, x)
        assert_close(y, value, bound=LIMIT * unit)
    """
    for each in (actual, expected, bound):
        if not is_numeric(np.asarray(asnumpy(each)).dtype):
            raise DtypeMismatch(f"assert_close takes real numbers, not {each!r:.60}")
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

    `limit` is how many units of error are accepted. The error of whole numbers and booleans is no
    unit but a limit: they are exact unless a decision was in doubt.
    """
    limit = bounded.limit() if limit is None else limit
    if actual.shape != value.shape:
        problem = f"shape {actual.shape}, not {value.shape}"
        return Check(name, what, backend, np.inf, np.inf, np.inf, (), problem)
    if is_floating(actual.dtype):
        given, stored = actual.astype("float64"), _as_stored(value, actual.dtype)
    else:
        given, stored, error = actual, value, error / limit
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        odd = ~np.isfinite(stored)
        same = (given == stored) | (np.isnan(given) & np.isnan(stored))
        off = np.abs(given.astype("float64") - np.where(odd, 0, value).astype("float64"))
        off = np.where(same, 0.0, np.where(off == 0, 1.0, off))  # beyond 2^53 floats look the same
        ratio = np.where(off == 0, 0.0, off / error)
        ulps = np.where(off == 0, 0.0, off / _spacing(stored, actual.dtype))
    wrong_kind = (odd & ~same | ~np.isfinite(given) & ~odd) & np.isfinite(error)
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
            f"{_said(given[where])} where {_said(value[where])} ± {limit * error[where]:.2g} was due"
        )
    return Check(name, what, backend, worst, float(ulps[where]), float(off[where]), where, problem)


def _said(number: Any) -> str:
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
    if check.ok and zeros and is_floating(expected.dtype) and not expected.value.any():
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


def _judge_model(model: Layer, x: Any, backends: Sequence[Backend]) -> list[Check]:
    host = model.to("numpy")
    rows = np.asarray(asnumpy(x if is_array(x) else source_of(x)))
    if not is_numeric(rows.dtype):
        raise DtypeMismatch(f"rows are real numbers, not {rows.dtype}")
    if host.dtype is not None:
        rows = rows.astype(host.dtype)
    checks = _judge_steps(host, rows, backends)
    whole = _expected(host, [rows])
    checks += [_sweep(host, rows, backend, whole) for backend in backends]
    return checks


def _judge_steps(model: Layer, rows: HostArray, backends: Sequence[Backend]) -> list[Check]:
    """Every step of the model's program, given the float64 reference's arrays on every backend.

    So the first step that diverges is the one that is named, with its layer's path and its kernel,
    and no bound has to be carried through the whole depth. A model that cannot be written out is
    one step.
    """
    try:
        program = model.program((rows.shape, rows.dtype))
        exact = model.astype("float64").program((rows.shape, "float64"))
    except Untraceable:
        expected = _expected(model, [rows])
        return [_run("output", repr(model), model, [rows], each, expected) for each in backends]
    values = [value for step in exact.steps for value in step.outputs]
    with np.errstate(all="ignore"):
        made = exact.run([rows.astype("float64")], values)
    known: dict[Value, HostArray] = {program.inputs[0]: rows}
    for step, found in zip(program.steps, _in_steps(exact, made), strict=True):
        for value, array in zip(step.outputs, found, strict=True):
            known[value] = _as(np.asarray(array), value.dtype)
    checks = []
    for backend in backends:
        for step in program.steps:
            if step.values and any(v.numbers is None for v in step.values):
                checks.append(_judge_step(step, known, len(rows), backend))
    return checks


def _in_steps(program: Program, made: list[Any]) -> Iterator[list[Any]]:
    """What was made, by the step that made it."""
    results = iter(made)
    for step in program.steps:
        yield [next(results) for _ in step.outputs]


def _judge_step(step: Step, known: dict[Value, HostArray], rows: int, backend: Backend) -> Check:
    """One step of a program on one backend."""
    inputs = [known.get(v, v.numbers) if isinstance(v, Value) else v for v in step.inputs]
    now = scaled(step, rows)

    def function(*arrays: Any) -> Any:
        layer = step.function
        if isinstance(layer, Layer) and is_array(arrays[0]):
            at = place_of(arrays[0])
            if type(arrays[0]) is bounded.ndarray:
                layer = layer.map_arrays(lambda name, value: _lift(value))
            elif at != "cpu":
                layer = layer.to(at)
            now.function = layer
        found = [x for x in arrays if is_array(x)]
        made = perform(xp_of(found[0]) if found else np, now, arrays)
        return made[0] if step.several else made

    name = step.path or "output"
    return _run(name, step.name, function, inputs, backend, _expected(function, inputs))


def _as(x: HostArray, dtype: Any) -> HostArray:
    with np.errstate(all="ignore"):
        return x.astype(dtype)


def _run(
    name: str,
    what: str,
    function: Layer | Function,
    inputs: Sequence[Any],
    backend: Backend,
    expected: Expected,
) -> Check:
    """One function on one backend: its value, dtype, place, and that its inputs are unchanged."""

    def failed(problem: str) -> Check:
        return Check(name, what, backend.device, np.inf, np.inf, np.inf, (), problem)

    there = function.to(backend) if isinstance(function, Layer) else function
    given = [backend.put(x.copy()) if is_array(x) else x for x in inputs]
    try:
        with backend.current(), np.errstate(all="ignore"):
            made = there(*given)
    except UnsupportedFunction:
        raise  # a library of ours lacks it: that says nothing of the backend
    except Exception as problem:
        return failed(f"raises {type(problem).__name__}: {problem}")
    if isinstance(made, np.generic):  # NumPy's sums of all elements
        made = np.asarray(made)
    if not is_array(made):
        return failed(f"returns {type(made).__name__}, not an array")
    if place_of(made) != backend.device:
        return failed(f"the result is on {place_of(made)}")
    if made.dtype != expected.dtype:
        return failed(f"the result is {made.dtype}, not {expected.dtype}")
    result = backend.get(made)
    for before, after in zip(inputs, given, strict=True):
        if is_array(before) and backend.get(after).tobytes() != before.tobytes():
            return failed("changed its input")
    return compare(name, what, backend.device, result, expected.value, expected.error)


def _sweep(model: Layer, rows: HostArray, backend: Backend, expected: Expected) -> Check:
    """The engine's sweep over the same rows, into memory that held NaN before."""
    out = np.full(expected.value.shape, np.nan, expected.dtype)
    try:
        with np.errstate(all="ignore"):
            Engine(model, backend)(rows, out)
    except Exception as problem:
        said = f"raises {type(problem).__name__}: {problem}"
        return Check("engine", repr(model), backend.device, np.inf, np.inf, np.inf, (), said)
    check = compare(
        "engine", "the whole sweep", backend.device, out, expected.value, expected.error
    )
    return _only_zeros([rows], expected, check)
