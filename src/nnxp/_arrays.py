"""What an array tells about itself: its library, its place, its type."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nnxp._errors import DeviceMismatch, DtypeMismatch

Array: TypeAlias = Any
"""An n-dimensional array of NumPy, CuPy or the simulated device."""

HostArray: TypeAlias = NDArray[Any]
"""A NumPy array."""

Shape: TypeAlias = tuple[int, ...]

FLOATS = ("float16", "bfloat16", "float32", "float64")
"""The types a model can have."""

_MODULES: dict[type, ModuleType] = {np.ndarray: np}
_DEVICE_NAMES = {"cupy": "cuda"}  # a place is called by its device: cuda:0, sim:1


def _module_of(kind: type) -> ModuleType | None:
    """The library whose `ndarray` this type is; libraries stay unimported.

    Subclasses are not arrays here, memory maps aside: np.matrix multiplies where others take
    products, and a masked array has a mask that would be lost.
    """
    if kind is np.memmap:
        return np
    package = kind.__module__
    for name in (package, package.partition(".")[0]):
        module = sys.modules.get(name)
        if module is not None and getattr(module, "ndarray", None) is kind:
            return module
    return None


def is_array(x: object) -> bool:
    """Whether x is an array of a library that nnxp knows."""
    return type(x) in _MODULES or _learn(type(x)) is not None


def _learn(kind: type) -> ModuleType | None:
    module = _module_of(kind)
    if module is not None:
        _MODULES[kind] = module
    return module


def xp_of(x: Array) -> Any:
    """The library of an array, as a module to compute with: numpy, cupy or nnxp.sim."""
    try:
        return _MODULES[type(x)]
    except KeyError:
        module = _learn(type(x))
        if module is None:
            kind = f"{type(x).__module__}.{type(x).__qualname__}".removeprefix("builtins.")
            fix = "numpy.load" if isinstance(x, str | bytes | os.PathLike) else "numpy.asarray"
            raise DtypeMismatch(
                f"{kind} is not an array that nnxp knows (numpy.ndarray or cupy.ndarray); "
                f"{fix}(x) may make it one"
            ) from None
        return module


def library_of(x: Array) -> str:
    """The name of an array's library: "numpy", "cupy" or "sim"."""
    name: str = xp_of(x).__name__
    return name.rpartition(".")[2]


def get_array_module(*arrays: object) -> Any:
    """The library that all the arrays among the arguments belong to, NumPy if there is none.

    Named as in CuPy:

        xp = nnxp.get_array_module(x)
        y = xp.exp(x)

    Args:
        arrays: scalars, None and lists among them do not count.

    Returns:
        numpy, cupy, or nnxp's own library as a module.

    Raises:
        DeviceMismatch: there are arrays of two libraries.
    """
    libraries = {id(xp_of(x)): xp_of(x) for x in arrays if is_array(x)}
    if len(libraries) > 1:
        names = " and ".join(sorted({place_of(x) for x in arrays if is_array(x)}))
        raise DeviceMismatch(
            f"arrays in different places: {names}; nnxp.asnumpy(x) or "
            "nnxp.to_backend(x, ...) brings them together"
        )
    return next(iter(libraries.values()), np)


def place_of(x: Array) -> str:
    """Where an array lives: "cpu", "cuda:0", "sim:1"."""
    library = library_of(x)  # refuses what is not an array
    device = x.device
    if isinstance(device, str):
        return device
    return f"{_DEVICE_NAMES.get(library, library)}:{device.id}"


class Owner(NamedTuple):
    """Which of several arrays by name holds the memory of one, and in which order of axes."""

    name: str
    axes: tuple[int, ...] | None = None

    def of(self, arrays: Mapping[str, Any]) -> Any:
        """The owner's entry among arrays by name, its axes in this one's order."""
        array = arrays[self.name]
        return array if self.axes is None else array.transpose(self.axes)


def owners(arrays: Mapping[str, Array]) -> dict[str, Owner]:
    """For every array the first that is the same one, or that it is another order of axes of."""
    first: dict[Any, str] = {}
    by_id: dict[int, Owner] = {}
    by_name = {}
    for name, x in arrays.items():
        if id(x) not in by_id:
            owner = first.setdefault(_memory(x), name)
            axes = () if owner == name else _axes_of(arrays[owner], x)
            by_id[id(x)] = Owner(name) if axes is None else Owner(owner, axes or None)
        by_name[name] = by_id[id(x)]
    return by_name


def _memory(x: Array) -> Any:
    """Where an array begins, and its size: the same for all orders of its axes."""
    library = library_of(x)
    if library not in ("numpy", "cupy", "sim") or not x.size:
        return id(x)
    host = x._host if library == "sim" else x
    address = x.data.ptr if library == "cupy" else host.__array_interface__["data"][0]
    return library, address, x.size, x.dtype


def _axes_of(x: Array, y: Array) -> tuple[int, ...] | None:
    """The axes of x in the order in which they are those of y, in the same memory; () if all are
    where they were, None if y is something else."""
    left, axes = list(range(x.ndim)), []
    for n, step in zip(y.shape, y.strides, strict=True):
        alike = (a for a in left if x.shape[a] == n and (n == 1 or x.strides[a] == step))
        axis = next(alike, None)
        if axis is None:
            return None
        left.remove(axis)
        axes.append(axis)
    return None if left else () if axes == sorted(axes) else tuple(axes)


def is_floating(dtype: np.dtype[Any]) -> bool:
    """Whether a model can compute in this type."""
    return dtype.name in FLOATS


def float_dtype(dtype: object) -> np.dtype[Any]:
    """The dtype for a name or dtype; DtypeMismatch for what no model computes in."""
    if dtype is None:
        raise DtypeMismatch(f"a model's dtype is one of {', '.join(FLOATS)}, not None")
    if str(dtype) == "bfloat16":
        try:
            import ml_dtypes
        except ImportError:
            raise DtypeMismatch(
                "bfloat16 needs the package ml_dtypes; pip install ml_dtypes brings it"
            ) from None
        brain: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return brain
    try:
        result: np.dtype[Any] | None = np.dtype(dtype)  # type: ignore[call-overload]
    except TypeError:
        result = None
    if result is None or not is_floating(result):
        raise DtypeMismatch(f"a model's dtype is one of {', '.join(FLOATS)}, not {dtype!r}")
    return result.newbyteorder("=")


def dtype_of(dtype: Any) -> np.dtype[Any]:
    """The dtype for any name or dtype that NumPy knows, and for bfloat16, which is ml_dtypes'."""
    return float_dtype(dtype) if str(dtype) == "bfloat16" else np.dtype(dtype)


def is_numeric(dtype: np.dtype[Any]) -> bool:
    """Whether rows of this type can be converted to a model's type without guessing."""
    return dtype.kind in "fiub" or is_floating(dtype)


def nonfinite_rows(rows: HostArray) -> int:
    """How many of the rows hold NaN or infinity."""
    if not (rows.dtype.kind == "f" or is_floating(rows.dtype)):
        return 0
    finite = np.isfinite(rows).all(axis=tuple(range(1, rows.ndim)))
    return len(rows) - int(np.count_nonzero(finite))
