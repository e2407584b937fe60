"""A kernel: a named piece of math with one reference body, and fused bodies for some libraries.

The reference body is the definition. It is written with the names that NumPy and CuPy share, in
float32 or float64: arrays of 16-bit floats are widened on the way in, and the result is rounded
once on the way out, so that no backend accumulates in 16 bits. A fused body takes the arrays as
they are and owes the same result.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any, NamedTuple, TypeVar

import numpy as np

from nnxp._arrays import Array, Shape, is_floating, library_of
from nnxp._errors import DtypeMismatch, NnxpError, OptionError, ShapeError

Body = Callable[..., Array]
Rule = TypeVar("Rule", bound=Callable[..., Any])

# Where the fused bodies of a library stand; imported when the first array of that library comes.
_FUSED = {"cupy": "nnxp.kernels.cuda"}

_OF_SHAPES = re.compile(r"broadcast|dimension|reshape|aligned|axes|shape")
"""What NumPy and CuPy say where shapes do not fit."""

KERNELS: dict[str, Kernel] = {}
"""Every kernel by name."""


def check_precision(precision: Any) -> None:
    """OptionError for a precision of products that there is not."""
    if not (precision is None or (isinstance(precision, str) and precision == "tf32")):
        raise OptionError(f'precision={precision!r:.60} is not offered; "tf32" is, and None')


Outlines = tuple[Shape, np.dtype[Any]] | list[tuple[Shape, np.dtype[Any]]]
"""The shape and type of a result, or those of several."""


class Operand(NamedTuple):
    """What a body is made for: an array's shape and type, and its numbers if it is a constant."""

    shape: Shape
    dtype: np.dtype[Any]
    numbers: Array | None

    @property
    def ndim(self) -> int:
        return len(self.shape)


class InPlace(NamedTuple):
    """A body that writes where it is told and has its memory set aside: what a recording runs.

    `run(out, scratch, *arrays)` fills `out`, or one for each result, in order. `scratch` is memory
    to work in, uint8, of `room(rows)` bytes, which grow with the rows by no more than they do at
    first. `work(rows)` is the multiply-adds of its products that may be shared among threads.
    `bind(out, scratch, *arrays)`, where it can be said once what is to be done to these arrays, is
    the calls that do it, in order, again and again.
    """

    run: Callable[..., object]
    room: Callable[[int], int]
    work: Callable[[int], int] = lambda _: 0
    bind: Callable[..., list[Callable[[], object]]] | None = None

    def bound(self, *arrays: Array) -> list[Callable[[], object]]:
        """The calls that do what `run` does with these arrays, as long as they are there."""
        return [partial(self.run, *arrays)] if self.bind is None else self.bind(*arrays)


class Kernel:
    """A named function of arrays. Arrays are positional arguments, options are keywords.

    Kernels leave their inputs as they are, except an elementwise one that is given `out=`.

        y = nnxp.kernels.leaky_relu(x, negative_slope=0.1)
    """

    __name__: str

    def __init__(self, reference: Body) -> None:
        update_wrapper(self, reference)
        self.reference = reference
        defaults = getattr(reference, "__kwdefaults__", None) or {}
        self.takes_precision = "precision" in defaults
        self._activates = isinstance(defaults.get("activation"), Kernel)
        self.rule: Callable[..., Any] | None = None
        self.activates_last = False  # whether its gradient is that of two steps
        self.outlines: Callable[..., Outlines | None] | None = None
        self._in_place: Callable[..., InPlace | None] | None = None
        self._fused: dict[str, Body] = {}
        self._body: dict[type, Body] = {}
        KERNELS[self.__name__] = self

    def on(self, library: str) -> Callable[[Body], Body]:
        """Decorator: this function is the fused body for arrays of `library`."""

        def register(body: Body) -> Body:
            self._fused[library] = body
            self._body.clear()
            return body

        return register

    def row_wise(self, rule: Rule) -> Rule:
        """Decorator: each row, along axis 0 of whatever has rows, is treated on its own, and this
        function answers the shape and type of the result, or a list of them.

        `rule(*arrays, **options)` is given what has `shape`, `ndim` and `dtype`; it answers None
        for arrays of which the reference body is to say what is wrong. Nobody then needs to look
        into the reference body, which may be long.
        """
        self.outlines = rule
        return rule

    def in_place(self, rule: Callable[..., InPlace | None]) -> Callable[..., InPlace | None]:
        """Decorator: this function makes the body for NumPy that a recording runs.

        `rule(*arrays, **options)` answers None for what the reference body does as well.
        """
        self._in_place = rule
        return rule

    def in_place_for(self, *arrays: Operand | None, **options: Any) -> InPlace | None:
        """The body for NumPy that a recording runs; None if the reference body is as good."""
        importlib.import_module("nnxp.kernels.cpu")
        return None if self._in_place is None else self._in_place(*arrays, **options)

    def vjp(self, rule: Rule) -> Rule:
        """Decorator: this function is the gradient rule of the kernel.

        `rule(dy, y, *arrays, **options)` answers the gradient of sum(dy * y) by each of the arrays,
        None where there is none, in float32 or float64. An array that was repeated may get its
        gradient unsummed. Without a rule the reference body is differentiated. A rule that names no
        `activation` is that of the kernel without one, which is applied to its result.
        """
        self.rule = rule
        takes = inspect.signature(self.reference).parameters
        names = inspect.signature(rule).parameters
        self.activates_last = "activation" in takes and "activation" not in names
        return rule

    def __call__(self, x: Array, *arrays: Array | None, **options: Any) -> Any:
        if self.takes_precision and options.get("precision") is not None:
            check_precision(options["precision"])
        if self._activates and not isinstance(options.get("activation", self), Kernel):
            raise OptionError(
                f"activation of {self.__name__} is a kernel, such as nnxp.kernels.relu, not "
                f"{options['activation']!r:.60}"
            )
        try:
            body = self._body[type(x)]
        except KeyError:
            body = self._find(x)
        try:
            return body(x, *arrays, **options)
        except ValueError as error:
            ours = isinstance(error, NnxpError) or library_of(x) == "traced"  # a layer says more
            if ours or not _OF_SHAPES.search(str(error)):
                raise
            raise self._misfit((x, *arrays), error) from error

    def _misfit(self, arrays: tuple[Array | None, ...], error: ValueError) -> ShapeError:
        """What is said where an array library found, on its way, that shapes do not fit."""
        names = inspect.signature(self.reference).parameters
        shapes = ", ".join(
            f"{name} {array.shape}"
            for name, array in zip(names, arrays, strict=False)
            if array is not None
        )
        return ShapeError(
            f"{self.__name__} got {shapes}, which do not fit each other: {error!s:.200}; its "
            "docstring says which do"
        )

    def _find(self, x: Array) -> Body:
        """The body for the library of x: a fused one, or the reference.

        A library may take a kernel whole, as one step, by a `kernel` of its array type.
        """
        body, whole = (
            self.on_library(library_of(x)) or self.widened,
            getattr(type(x), "kernel", None),
        )
        if whole is not None:

            def body(*arrays: Any, **options: Any) -> Any:
                return whole(self, arrays, options)

        self._body[type(x)] = body
        return body

    def on_library(self, library: str) -> Body | None:
        """The fused body for a library, if there is one."""
        if library in _FUSED:
            importlib.import_module(_FUSED[library])
        return self._fused.get(library)

    def widened(self, x: Array, *arrays: Array | None, **options: Any) -> Any:
        """The reference body; 16-bit floats go in as float32, and the result is rounded once."""
        if x.dtype.itemsize != 2:
            return self.reference(x, *arrays, **options)
        if not is_floating(x.dtype):
            raise DtypeMismatch(f"{self.__name__} takes floats, not {x.dtype}")
        wide = [
            a.astype("float32") if a is not None and a.dtype.itemsize == 2 else a
            for a in (x, *arrays)
        ]
        out = options.pop("out", None)
        with np.errstate(over="ignore"):  # a result too large for the type is infinite, as it says
            y = self.reference(*wide, **options)
            several = isinstance(y, tuple)
            result = tuple(part.astype(x.dtype) for part in y) if several else y.astype(x.dtype)
        if out is None:
            return result
        out[...] = result
        return out

    def __reduce__(self) -> str:
        return self.__name__

    def __repr__(self) -> str:
        return f"<kernel {self.__name__}>"


def kernel(reference: Body) -> Kernel:
    """Decorator: this function is the reference body of a kernel of its name.

    Written with the functions that NumPy and CuPy share; arrays are positional, options keywords.
    An option `precision` is that of products, None or "tf32", and is set by an engine that has one.

        @nnxp.kernels.kernel
        def cubed(x):
            return x * x * x
    """
    return Kernel(reference)
