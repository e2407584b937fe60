"""nnxp verify with the GPU required: every layer in every type; leaves a receipt."""

from __future__ import annotations

from gpu.here import Figures, Here
from nnxp.verify import verify, write_receipt


def figures(here: Here) -> Figures:
    result = verify(backends=[here.backend], required=[here.backend])
    write_receipt(result, here.out / "receipt.json")
    for report in result.reports:
        yield (
            report.name,
            {
                "device": report.device,
                "checks": report.checks,
                "failed": report.failed,
                "largest error in units of the bound": report.largest,
                "float32 product in units of the bound": report.product,
                "float32 is float32": not report.tf32,
                "seconds": report.seconds,
            },
        )
    if not result.ok:
        failures = [f"{check.name} {check.what}: {check.problem}" for check in result.failures]
        yield "failures", {"problem": f"{len(failures)} checks failed", "which": failures[:100]}
        for line in failures[:20]:
            print(line)
