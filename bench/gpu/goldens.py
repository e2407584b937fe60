"""A golden of what this GPU answers, and whether it holds against float64."""

from __future__ import annotations

from gpu.here import Figures, Here, Values
from nnxp.testing import goldens
from nnxp.testing.goldens import provenance
from nnxp.verify import BackendReport, Verification, record_goldens


def figures(here: Here) -> Figures:
    folder, backend = here.out / "goldens", here.device
    about = provenance(backend)
    usable = BackendReport(backend.name, backend.device, True, backend.why, about=about)
    record_goldens(Verification("goldens", (usable,), ()), folder)
    for path in sorted(folder.glob("*.safetensors")):
        report = goldens.check(path)
        values: Values = {"cases": len(report.checks), "bytes": path.stat().st_size}
        values["largest error in units of the bound"] = report.largest
        if not report.ok:
            values["problem"] = str(report.first_failure)
        yield path.name, values
