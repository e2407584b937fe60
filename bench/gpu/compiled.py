"""The same networks against torch.compile, which takes its time: ci/gpu --steps compiled"""

from __future__ import annotations

from gpu.here import Figures, Here
from gpu.models import networks


def figures(here: Here) -> Figures:
    return networks(here, {"torch-compile": True})
