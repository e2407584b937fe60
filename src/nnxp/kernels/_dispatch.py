"""A kernel: a named piece of math with one reference body, and fused bodies for some libraries.

The reference body is the definition. It is written with the names that NumPy and CuPy share, in
float32 or float64: arrays of 16-bit floats are widened on the way in, and the result is rounded
once on the way out, so that no backend accumulates in 16 bits. A fused body takes the arrays as
they are and owes the same result.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import update_wrapper
from typing import Any

import numpy as np

from nnxp._arrays import Array, is_floating, library_of
from nnxp._errors import DtypeMismatch

Body = Callable[..., Array]

# Where the fused bodies of a library stand; imported when the first array of that library comes.
_FUSED = {"cupy": "nnxp.kernels.cuda"}

KERNELS: dict[str, Kernel] = {}
"""Every kernel by name."""


class Kernel:
    """A named function of arrays. Arrays are positional arguments, options are keywords.

    Kernels leave their inputs as they are, except an elementwise one that is given `out=`.
    """

    __name__: str

    def __init__(self, reference: Body, temporaries: int = 2) -> None:
        update_wrapper(self, reference)
        self.temporaries = temporaries  # arrays like its output that it holds at once, besides it
        self.reference = reference
        self._fused: dict[str, Body] = {}
        self._body: dict[type, Body | None] = {}
        KERNELS[self.__name__] = self

    def on(self, library: str) -> Callable[[Body], Body]:
        """Decorator: this function is the fused body for arrays of `library`."""

        def register(body: Body) -> Body:
            self._fused[library] = body
            self._body.clear()
            return body

        return register

    def __call__(self, x: Array, *arrays: Array | None, **options: Any) -> Array:
        try:
            fused = self._body[type(x)]
        except KeyError:
            fused = self._find(x)
        if fused is not None:
            return fused(x, *arrays, **options)
        if x.dtype.itemsize == 2:
            return self._widened(x, *arrays, **options)
        return self.reference(x, *arrays, **options)

    def _find(self, x: Array) -> Body | None:
        """The fused body for the library of x, if there is one."""
        library = library_of(x)
        if library in _FUSED:
            importlib.import_module(_FUSED[library])
        body = self._body[type(x)] = self._fused.get(library)
        return body

    def _widened(self, x: Array, *arrays: Array | None, **options: Any) -> Array:
        if not is_floating(x.dtype):
            raise DtypeMismatch(f"{self.__name__} takes floats, not {x.dtype}")
        wide = [None if a is None else a.astype("float32") for a in (x, *arrays)]
        out = options.pop("out", None)
        with np.errstate(over="ignore"):  # a result too large for the type is infinite, as it says
            result = self.reference(*wide, **options).astype(x.dtype)
        if out is None:
            return result
        out[...] = result
        return out

    def __reduce__(self) -> str:
        return self.__name__

    def __repr__(self) -> str:
        return f"<kernel {self.__name__}>"


def kernel(reference: Body) -> Kernel:
    """Decorator: this function is the reference body of a kernel of its name."""
    return Kernel(reference)
