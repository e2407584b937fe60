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
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from nnxp._arrays import Array, HostArray, is_array, is_floating, is_numeric, place_of
from nnxp._errors import DtypeMismatch, OptionError
from nnxp.backend import Backend, asnumpy, available_backends, get_backend
from nnxp.engine import Engine
from nnxp.layers._layer import Layer
from nnxp.layers._trace import Step, trace, walk
from nnxp.testing import bounded

LIMIT = 6.0
"""Correct results stay within this many units of the bound; measured ones within about 3."""

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
    backends: Iterable[str | Backend] | None = None,
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
    backends: Iterable[str | Backend] | None = None,
    rigorous: bool = False,
) -> ParityReport:
    """How far each backend is from float64 on these inputs, in units of the computed bound.

    `function` is a model and `inputs` its rows, as a host array of any numeric type; or any
    function of arrays written with `xp = nnxp.get_array_module(x)`, and `inputs` its arguments.
    `backends` are names; without them, NumPy, the simulated device, and CUDA if it is usable.
    `rigorous` asks for proven bounds in place of expected ones: much wider, beyond dispute.

    Compared are the values, shape, dtype, place, where NaN and infinity are, and that the inputs
    were left as they are. Raises BackendUnavailable for a backend that cannot be used.
    """
    if backends is None:
        backends = [name for name, found in available_backends().items() if found.ok]
    chosen = [get_backend(each) for each in backends]
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


def error_bound(
    function: Layer | Function, *inputs: Any, **options: Any
) -> tuple[HostArray, HostArray]:
    """(reference, bound): the result in float64, and the unit of doubt for each of its elements.

    The function is a model, a kernel of `nnxp.kernels`, or any other function of arrays, called
    with these options. The inputs' own type is the one whose rounding is accounted for.
    """
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
        function = function._replaced(lambda name, value: _lift(value))
    kinds = [x.dtype for x in arrays if is_floating(x.dtype)]
    coarsest = max(kinds, key=bounded.unit_roundoff, default=None)
    with np.errstate(all="ignore"), bounded.no_coarser_than(coarsest):
        result = function(*map(_lift, inputs))
    if isinstance(result, bounded.ndarray):
        stored = bounded.stored(result, coarsest)
        return Expected(stored.value, stored.error, stored.dtype)
    if isinstance(result, np.ndarray | np.generic):  # booleans and indices are exact
        value = np.asarray(result)
        return Expected(value.astype("float64"), np.zeros(value.shape), value.dtype)
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
    if dtype is not None:
        a.dtype = b.dtype = np.dtype(dtype)  # type: ignore[call-overload]
    with bounded.rigorous() if rigorous else nullcontext():
        error: HostArray = kernels.matmul(a, b).error
    return error


def assert_close(actual: Array, expected: Any, *, bound: Any) -> Check:
    """Raise AssertionError unless |actual - expected| is within the limit of `bound` everywhere.

    expected and bound broadcast to the shape of actual; NaN and infinity must stand in the same
    places. Raises OptionError for a bound below zero, DtypeMismatch for what are no real numbers.
    """
    for each in (actual, expected, bound):
        if not is_numeric(np.asarray(asnumpy(each)).dtype):
            raise DtypeMismatch(f"assert_close takes real numbers, not {each!r:.60}")
    shape = np.shape(asnumpy(actual))
    value = np.asarray(asnumpy(expected), "float64")
    error = np.asarray(bound, "float64")
    if not (error >= 0).all():
        raise OptionError("a bound is zero or more")
    with suppress(ValueError):  # compare says what does not fit
        value, error = np.broadcast_to(value, shape), np.broadcast_to(error, shape)
    check = compare("result", "", place_of(actual), asnumpy(actual), value, error)
    comparisons[check.backend] += 1
    if not check.ok:
        raise AssertionError(f"{check.problem}; largest error {check.ratio:.3g} units")
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
    """Judge one host array against its reference value and error."""
    limit = limit if limit is not None else 1.0 if bounded._rigorous.get() else LIMIT
    if actual.shape != value.shape:
        problem = f"shape {actual.shape}, not {value.shape}"
        return Check(name, what, backend, np.inf, np.inf, np.inf, (), problem)
    given = actual.astype("float64")
    stored = _as_stored(value, actual.dtype)
    odd = ~np.isfinite(stored)
    same = (given == stored) | (np.isnan(given) & np.isnan(stored))
    off = np.where(same, 0.0, np.abs(given - np.where(odd, 0.0, value)))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = np.where(off == 0, 0.0, off / error)
        ulps = np.where(off == 0, 0.0, off / _spacing(stored, actual.dtype))
    wrong_kind = odd & ~same | ~np.isfinite(given) & ~odd
    ratio = np.where(wrong_kind, np.inf, np.where(np.isnan(ratio), np.inf, ratio))
    if ratio.size == 0:
        return Check(name, what, backend, 0.0, 0.0, 0.0, ())
    where = tuple(int(i) for i in np.unravel_index(int(ratio.argmax()), ratio.shape))
    worst = float(ratio[where])
    problem = ""
    if not worst <= limit:
        problem = (
            f"{int((ratio > limit).sum())} of {ratio.size} elements are off; at {list(where)} "
            f"{given[where]:.9g} where {value[where]:.9g} ± {limit * error[where]:.2g} was due"
        )
    return Check(name, what, backend, worst, float(ulps[where]), float(off[where]), where, problem)


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
    """HostArray arrays as bounded ones; whatever else as it is."""
    return bounded.asarray(asnumpy(x)) if is_array(x) else x


def _judge_function(
    function: Function, inputs: Sequence[Any], backends: Sequence[Backend]
) -> list[Check]:
    name = getattr(function, "__name__", type(function).__name__)
    expected = _expected(function, inputs)
    return [_run(name, "", function, inputs, backend, expected) for backend in backends]


def _judge_model(model: Layer, x: Any, backends: Sequence[Backend]) -> list[Check]:
    host = model.to("numpy")
    rows = np.asarray(asnumpy(x))
    if not is_numeric(rows.dtype):
        raise DtypeMismatch(f"rows are real numbers, not {rows.dtype}")
    if host.dtype is not None:
        rows = rows.astype(host.dtype)
    steps = _reference(host, rows)
    checks = [
        _run(step.name, repr(step.layer), step.layer, [step.input], backend, expected)
        for backend in backends
        for step, expected in steps
    ]
    whole = _expected(host, [rows])
    checks += [_sweep(host, rows, backend, whole) for backend in backends]
    return checks


def _reference(model: Layer, rows: HostArray) -> list[tuple[Step, Expected]]:
    """Each layer with its input, as the float64 reference makes it, and what it should answer.

    A layer with children gets children that answer what the reference's answered, so that only
    its own formula is judged.
    """
    kind = model.dtype or rows.dtype
    layers = {**dict(walk(model)), "output": model}
    with np.errstate(all="ignore"):
        seen = {step.name: step for step in trace(model.astype("float64"), rows.astype("float64"))}
    steps = []
    for name, step in seen.items():

        def said(path: str, child: Layer, name: str = name) -> Layer:
            whole = path if name == "output" else f"{name}.{path}"
            return _Said._made(answer=_as(seen[whole].output, kind), layer=child)

        layer, given = layers[name]._replaced(layer=said), _as(step.input, kind)
        steps.append((Step(name, layer, given, None), _expected(layer, [given])))
    return steps


def _as(x: HostArray, dtype: Any) -> HostArray:
    with np.errstate(all="ignore"):
        return x.astype(dtype)


class _Said(Layer):
    """A layer that answers what it is told, whatever it is asked."""

    answer: Array
    layer: Layer

    def __call__(self, x: Array) -> Array:
        return self.answer

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.layer.output_shape(shape)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)  # a parent may look at its child's fields

    def __repr__(self) -> str:
        return repr(self.layer)


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
    except Exception as problem:
        return failed(f"raises {type(problem).__name__}: {problem}")
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
    return compare("engine", "the whole sweep", backend.device, out, expected.value, expected.error)
