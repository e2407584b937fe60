"""The large network once more, against torch.compile when it may try for longer."""

from __future__ import annotations

from gpu.here import Figures, Here
from gpu.races import resident
from nnxp.floor import FLOOR


def figures(here: Here) -> Figures:
    return resident(here, (FLOOR, "nnxp", "torch-max-autotune"))
