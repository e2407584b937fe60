"""nnxp verify with the GPU required: every layer in every type; leaves a receipt."""

from __future__ import annotations

from gpu.here import Figures, Here
from nnxp.verify import verify, write_receipt


def figures(here: Here) -> Figures:
    found = verify(backends=[here.backend], required=[here.backend])
    write_receipt(found, here.out / "receipt.json")
    for each in found.found:
        yield (
            each.name,
            {
                "device": each.device,
                "checks": each.checks,
                "failed": each.failed,
                "largest error in units of the bound": each.largest,
                "float32 product in units of the bound": each.product,
                "float32 is float32": not each.tf32,
                "seconds": each.seconds,
            },
        )
    if not found.ok:
        failures = [f"{each.name} {each.what}: {each.problem}" for each in found.failures]
        yield "failures", {"problem": f"{len(failures)} checks failed", "which": failures[:100]}
        for line in failures[:20]:
            print(line)
