"""The large network on rows that are on the device."""

from __future__ import annotations

from gpu.here import Figures, Here
from gpu.races import resident
from nnxp.floor import FLOOR


def figures(here: Here) -> Figures:
    return resident(here, (FLOOR, "nnxp", "torch", "torch-compile", "jax", "naive"))
