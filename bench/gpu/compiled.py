"""The same networks against compilers, which take their time: ci/gpu --steps compiled"""

from __future__ import annotations

from functools import partial

from gpu.here import Figures, Here
from gpu.models import in_jax, in_torch, networks


def figures(here: Here) -> Figures:
    rivals = {"torch-compile": partial(in_torch, compiled=True), "jax": in_jax}
    return networks(here, rivals)
