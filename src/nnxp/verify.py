"""Do the backends of this machine agree with float64? The library's own checks, or a model's.

Also asked: is float32 float32? A GPU may round the inputs of a product to TF32 unseen, which a
product of zero-mean numbers shows, because there the sum is small and the rounding is not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, TypeAlias

import numpy as np

from nnxp import kernels
from nnxp._arrays import FLOATS, HostArray, float_dtype, nonfinite_rows
from nnxp._errors import BackendUnavailable, DtypeMismatch, OptionError
from nnxp._exchange import host_rows, source_of
from nnxp._printed import Printed
from nnxp.backend import Backend, available_backends, get_backend
from nnxp.engine import inputs_of
from nnxp.io._atomic import written_beside
from nnxp.layers._layer import Layer, check_model
from nnxp.testing.goldens import layer_examples, provenance, record
from nnxp.testing.parity import (
    LIMIT,
    Check,
    compare,
    finite_or_none,
    listed,
    parity_report,
    product_bound,
)

TF32 = 20.0
"""Units of the bound: a float32 product of zero-mean numbers stays below 3, TF32 is above 200."""
MOST_ROWS = 1000

Rows: TypeAlias = tuple[HostArray | None, ...]
"""Those of each input; None for one that is left out."""


@dataclass(frozen=True)
class BackendReport:
    """What was found on one backend: how many checks ran and failed there, and how far off.

    `largest` is the largest error in units of the bound, `product` that of a float32 product of
    zero-mean numbers. Of a backend that cannot be used, `reason` and `hint` say why.
    """

    name: str
    device: str
    usable: bool
    reason: str
    hint: str = ""
    checks: int = 0
    failed: int = 0
    largest: float = 0.0
    product: float = 0.0
    seconds: float = 0.0
    about: dict[str, Any] | None = None

    @property
    def tf32(self) -> bool:
        """Whether products of float32 numbers are rounded to TF32."""
        return self.product > TF32

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; an infinite error is None."""
        plain = {name: finite_or_none(value) for name, value in asdict(self).items()}
        return plain | {"tf32": self.tf32}


@dataclass(frozen=True)
class Verification(Printed):
    """What was checked, what was found on each backend, and the checks that failed."""

    what: str
    reports: tuple[BackendReport, ...]
    failures: tuple[Check, ...]
    required: tuple[str, ...] = ()

    @property
    def missing(self) -> list[str]:
        """The required backends that cannot be used here."""
        usable = {report.name for report in self.reports if report.usable}
        return [name for name in self.required if name not in usable]

    @property
    def ok(self) -> bool:
        """Whether every check passed, and every required backend was there."""
        return not self.failures and not self.missing

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; this is what a receipt holds."""
        return {
            "ok": self.ok,
            "what": self.what,
            "limit": LIMIT,
            "missing": self.missing,
            "backends": [report.to_dict() for report in self.reports],
            "failures": [check.to_dict() for check in self.failures],
        }

    def __str__(self) -> str:
        lines = [self.what]
        for report in self.reports:
            outcome = _outcome(report) if report.usable else report.reason
            lines.append(f"  {report.name:6}  {outcome}")
            if not report.usable and report.name in self.required:
                lines.append(f"          it is required. {report.hint}")
        lines += [
            f"FAILED on {check.backend}: {check.name} {check.what}: {check.problem}"
            for check in self.failures[:20]
        ]
        if len(self.failures) > 20:
            lines.append(f"and {len(self.failures) - 20} more failed")
        return "\n".join([*lines, "all agree with float64" if self.ok else "NOT VERIFIED"])


def _outcome(report: BackendReport) -> str:
    kind = "TF32 IS ON: float32 products are rounded" if report.tf32 else "float32 is float32"
    return (
        f"{report.device}: {report.checks:,} checks, {report.failed:,} failed; largest error "
        f"{report.largest:.2f} of {LIMIT:g} units; {kind} ({report.product:.2f}); "
        f"{report.seconds:.1f} s"
    )


def verify(
    model: Layer | None = None,
    rows: Any = None,
    backends: str | Sequence[str] = (),
    required: str | Sequence[str] = (),
) -> Verification:
    """Judge a model on rows (rows, ...), or the library's layers and the demo's network.

    A model of several inputs takes a tuple of rows, or a dict by their names.

    On these backends, or on all that are usable; `required` ones are always among them. Of many
    rows a thousand are judged. Raises BackendUnavailable for one of `backends` that cannot be used.
    """
    asked, needed = listed(backends), [str(name) for name in listed(required)]
    if model is not None:
        check_model(model, "verify")
    if (model is None) != (rows is None):
        raise OptionError("a model is verified on rows, and rows with a model: give both")
    if model is None or rows is None:
        cases, what = list(_own_cases()), "every layer, in every type, and the demo's network"
    else:
        inputs = inputs_of(model, rows)
        sources = [None if x is None else source_of(x) for x in inputs]
        count = len(source_of(inputs[0]))
        if count == 0:
            raise OptionError("there are no rows: nothing would be verified")
        every = slice(None, None, max(1, -(-count // MOST_ROWS)))
        some: Rows = tuple(None if x is None else host_rows(x[every]) for x in sources)
        cases = [(model, some)]
        what = f"{model!r} on {len(range(count)[every]):,} of {count:,} rows"
        if odd := max(nonfinite_rows(x) for x in some if x is not None):
            what += f", {odd:,} of which hold NaN or infinity"
    reports, failures = [], []
    names = [get_backend(name).device for name in asked] or list(available_backends())
    for name in dict.fromkeys([*names, *needed]):
        try:
            backend = get_backend(name)
        except BackendUnavailable as error:
            reason = error.reason.removeprefix(f"backend={name!r}: ")
            reports.append(BackendReport(name, "", False, reason, error.hint))
            continue
        if any(report.device == backend.device for report in reports):
            continue
        report, failed = _judge(backend, cases)
        reports.append(report)
        failures += failed
    wanted = tuple({"cpu": "numpy", "cuda": "cupy"}.get(name, name) for name in needed)
    return Verification(what, tuple(reports), tuple(failures), wanted)


def _own_cases() -> Iterator[tuple[Layer, Rows]]:
    from nnxp.demo import load_digits

    rng = np.random.default_rng(0)
    for dtype in FLOATS:
        try:
            float_dtype(dtype)
        except DtypeMismatch:  # bfloat16 without ml_dtypes
            continue
        for layer, shape in layer_examples():
            model = layer.astype(dtype)
            yield model, (rng.normal(size=shape).astype(model.dtype or float_dtype(dtype)),)
    digits, pixels, *_ = load_digits()
    yield digits, (pixels[::7],)


def _judge(
    backend: Backend, cases: Sequence[tuple[Layer, Rows]]
) -> tuple[BackendReport, list[Check]]:
    start = perf_counter()
    products = product_checks(backend)
    checks = list(products)
    for layer, rows in cases:
        types = ", ".join(str(x.dtype) for x in rows if x is not None)
        judged = parity_report(layer, *rows, backends=[backend]).checks
        named = f"{layer!r:.60} {types}: " if len(cases) > 1 else ""
        checks += [replace(check, name=named + check.name) for check in judged]
    failed = [check for check in checks if not check.ok]
    return BackendReport(
        backend.name,
        backend.device,
        usable=True,
        reason=backend.why,
        checks=len(checks),
        failed=len(failed),
        largest=max(check.ratio for check in checks),
        product=max(check.ratio for check in products),
        seconds=perf_counter() - start,
        about=provenance(backend),
    ), failed


def product_checks(backend: Backend) -> list[Check]:
    """float32 products of zero-mean numbers on this backend against their bound, by each kernel.

    The error stays below 3 units for float32. Rounding the inputs to TF32 makes it 200 and more:
    2^-11 in place of 2^-24 for each term, and no large sum to hide behind.
    """
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((2, 256, 256), dtype="float32")
    value, bound = x.astype("float64") @ weight, product_bound(x, weight)
    checks = []
    with backend.current():
        operands = backend.put(x), backend.put(weight)
        for kernel in (kernels.matmul, kernels.linear):
            name, what, y = f"product by {kernel.__name__}", "zero-mean", kernel(*operands)
            checks.append(compare(name, what, backend.device, backend.get(y), value, bound))
    return checks


def newest_receipt(folder: str | Path, backend: str) -> dict[str, Any] | None:
    """What the latest of the receipts in a folder says of this backend; None if none does."""
    entries = [
        entry
        for path in Path(folder).glob("*.json")
        for entry in json.loads(path.read_text())["backends"]
        if entry["name"] == backend and entry["usable"]
    ]
    return max(entries, key=lambda entry: str(entry["about"]["date"]), default=None)


def write_receipt(verification: Verification, path: str | Path) -> None:
    """Write what was verified, where, and with what result: JSON."""
    with written_beside(path) as beside:
        beside.write_text(json.dumps(verification.to_dict(), indent=1) + "\n")


def record_goldens(verification: Verification, folder: str | Path) -> None:
    """Record a golden on each backend that was verified: <hardware>.safetensors in the folder."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for report in verification.reports:
        if report.usable and not report.failed:  # what is wrong is no golden
            hardware = f"{report.name} {(report.about or {})['hardware']}"
            name = "-".join(re.findall(r"[a-z0-9]+", hardware.lower()))
            record(Path(folder) / f"{name}.safetensors", report.device)
