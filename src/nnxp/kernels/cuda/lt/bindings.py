"""NVIDIA's bindings of cuBLASLt, its numbers, and its errors."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

# As in NVIDIA's headers
DATA_TYPES = {"float32": 0, "float16": 2, "bfloat16": 14}
COMPUTE_FLOAT32, COMPUTE_TF32 = 68, 77
TRANSPOSE_A, TRANSPOSE_B, EPILOGUE, BIAS_POINTER = 3, 4, 7, 8  # attributes of a product
BATCH_COUNT, BATCH_STEP = 5, 6  # of the layout of a stack of matrices
MAX_WORKSPACE, REDUCTION_SCHEMES, MIN_ALIGNMENTS = 1, 3, (5, 6, 7, 8)  # and of a preference
REDUCE_IN_COMPUTE_TYPE = 2
DEFAULT, BIAS, RELU_BIAS = 1, 4, 6  # epilogues
STATUS = {
    1: "NOT_INITIALIZED",
    3: "ALLOC_FAILED",
    7: "INVALID_VALUE",
    8: "ARCH_MISMATCH",
    11: "MAPPING_ERROR",
    13: "EXECUTION_FAILED",
    14: "INTERNAL_ERROR",
    15: "NOT_SUPPORTED",
    16: "LICENSE_ERROR",
}

handles: dict[int, int] = {}


class LtError(RuntimeError):
    """cuBLASLt refused a product: the message has the status and the shapes."""


def why_not() -> str | None:
    """Why products do not go through cuBLASLt; None if they do."""
    return library()[1]


@cache
def library() -> tuple[Any, str | None]:
    """NVIDIA's bindings, or why there are none."""

    def load() -> Any:
        from nvmath.bindings import cublasLt

        cublasLt.get_version()  # loads the library itself
        return cublasLt

    return loaded("cuBLASLt", "nvmath", "nvmath-python", load)


def loaded(
    who: str, package: str, distribution: str, load: Callable[[], Any]
) -> tuple[Any, str | None]:
    """What `load` imports of a package of others', or why there is nothing."""
    if importlib.util.find_spec(package) is None:
        return None, f"{distribution} is not installed"
    try:
        with warnings.catch_warnings():  # of others' code, which may be errors here
            warnings.simplefilter("ignore")
            return load(), None
    except Exception as error:  # whatever it is, there is another way
        message = " ".join(str(error).split())[:300]
        return None, f"{who} cannot be loaded ({type(error).__name__}: {message})"


def handle(lt: Any, device: int) -> int:
    """cuBLASLt on the current device, which this is; called by one thread at a time."""
    if device not in handles:
        handles[device] = lt.create()
    return handles[device]
