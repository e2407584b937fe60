"""What is launched: nnxp's kernels in their build for the host, CuPy's own by NumPy.

Nothing is compiled for the device: the "binary" of a module is its source, in which the
parameters of a kernel are read. CuPy names its kernels for what they compute, as in
cupy_add__float32_float32_float32, and tells shapes and strides with every array.
"""

from __future__ import annotations

import ctypes
import re
from typing import NamedTuple

import ml_dtypes
import numpy as np

from fakecuda.machine import machine

TYPES = {
    "float": "f4", "double": "f8", "float16": "f2", "bfloat16": ml_dtypes.bfloat16, "bool": "?",
    "char": "i1", "signed char": "i1", "unsigned char": "u1", "short": "i2", "unsigned short": "u2",
    "int": "i4", "unsigned int": "u4", "long": "i8", "unsigned long": "u8", "long long": "i8",
    "unsigned long long": "u8", "ptrdiff_t": "i8",
}  # fmt: skip
NAMES = {
    "true_divide": "divide",
    "sum": "add",
    "max": "maximum",
    "min": "minimum",
    "amax": "maximum",
}

STRUCTS = {"Windows": 29 * 4}  # bytes of what is passed by value

_modules, _functions = {}, {}
build = None
"""Compiles one instance of a source for the host; it is `kernel_0` of the answer."""
ours = {}
"""By source, the library with its instances for the host, and their names in the order there."""


class Kernel(NamedTuple):
    name: str
    source: str
    parameters: list[str]


def load(source):
    _modules[number := machine.new()] = source
    return number


def unload(module):
    del _modules[module]


def function(module, name):
    source = _modules[module]
    base = re.escape(name.partition("<")[0])
    told = re.search(rf"__global__ void[^;{{]*?\b{base}\(([^)]*)\)\s*{{", source)
    parameters = [each.strip() for each in re.split(r",(?![^<]*>)", told[1])]
    _functions[number := machine.new()] = Kernel(name, source, parameters)
    return number


def work(function, shape, parameters):
    """Whose kernel it is, and what its launch will do with the arguments that it has now."""
    kernel = _functions[function]
    places = (ctypes.c_size_t * len(kernel.parameters)).from_address(parameters)
    if "<" in kernel.name:
        return "kernel", _ours(kernel, shape, places)
    return "CuPy's kernel", _cupys(kernel, places)


# Ours


def _ours(kernel, shape, places):
    sizes = [STRUCTS.get(told.split()[0], 8) for told in kernel.parameters]
    values = [
        ctypes.create_string_buffer(ctypes.string_at(at, size), size)
        for at, size in zip(places, sizes, strict=True)
    ]
    addresses = [
        at
        for value, told in zip(values, kernel.parameters, strict=True)
        if "*" in told and (at := int.from_bytes(value[:8], "little"))
    ]
    for at in addresses:
        machine.alive(at)
    if kernel.source in ours:
        library, names = ours[kernel.source]
        run = library[f"kernel_{names.index(kernel.name)}"]
    else:  # a text that was written for a formula
        run = build(kernel.source, kernel.name).kernel_0
    run.restype = ctypes.c_char_p

    def launched():
        for at in addresses:
            machine.span(at, 1)
        given = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        error = run((ctypes.c_uint32 * 6)(*shape), given, 0)
        machine.rule(error is None, f"{kernel.name}: {error}")

    return launched


# CuPy's


class Operand(NamedTuple):
    """A parameter of a kernel of CuPy's: an array in memory of the device, or a number."""

    name: str
    dtype: np.dtype
    at: int = 0
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    value: object = None

    def array(self):
        return view(*self[1:5]) if self.value is None else self.value


def view(dtype, at, shape, strides):
    """NumPy's view of an array in memory of the device."""
    if 0 in shape:
        return np.empty(shape, dtype)
    spans = [(n - 1) * step for n, step in zip(shape, strides, strict=True)]
    low, high = sum(min(0, each) for each in spans), sum(max(0, each) for each in spans)
    size = high - low + dtype.itemsize
    machine.span(at + low, size)
    memory = (ctypes.c_char * size).from_address(at + low)
    return np.ndarray(shape, dtype, memory, -low, strides)


def _operand(told, at, types):
    """The argument of a parameter, at this address; None if it only says how many there are."""
    told = told.replace("const ", "").strip()
    if array := re.match(r"CArray<([\w ]+), (\d+), .*> (\w+)", told):
        ndim = int(array[2])
        data, _, *rest = (ctypes.c_longlong * (2 + 2 * ndim)).from_address(at)
        dtype = np.dtype(TYPES[types.get(array[1], array[1])])
        if all(rest[:ndim]):
            machine.alive(data)
        return Operand(array[3], dtype, data, tuple(rest[:ndim]), tuple(rest[ndim:]))
    kind, name = told.rsplit(" ", 1)
    kind = types.get(kind, kind)
    if kind.startswith("CIndexer"):
        return None
    dtype = np.dtype(TYPES[kind])
    value = np.frombuffer(ctypes.string_at(at, dtype.itemsize), dtype)[0]
    return Operand(name, dtype, value=value)


def _cupys(kernel, places):
    types = {new: old for old, new in re.findall(r"typedef ([\w ]+?) (\w+);", kernel.source)}
    operands = [
        _operand(told, at, types) for told, at in zip(kernel.parameters, places, strict=True)
    ]
    reduces = operands[-1] is not None and operands[-1].name == "_block_stride"
    operands = [each for each in operands[: len(operands) - reduces] if each is not None]
    (output,) = (each for each in operands if re.fullmatch(r"_raw_(out\d*|y)", each.name))
    inputs = [each for each in operands if each is not output]
    name = re.match(r"cupy_(\w+?)(__|$)", kernel.name)[1]
    ufunc = getattr(np, NAMES.get(name, name), None)
    if name not in OTHERS and ufunc is None:
        machine.rule(False, f"nothing here computes {kernel.name}")
        return lambda: None

    def launched():
        given = [_wide(each.array()) for each in inputs]
        into = output.array()
        with np.errstate(all="ignore"):
            if name in OTHERS:
                result = OTHERS[name](into, *given)
            elif reduces:  # CuPy has put the axes that it reduces in front
                folded = given[0].reshape(-1, into.size)
                result = getattr(ufunc, "reduce", ufunc)(folded, axis=0).reshape(into.shape)
            else:
                result = ufunc(*given)
            np.copyto(into, np.asarray(result).astype(into.dtype), casting="unsafe")

    return launched


def _take(into, x, indices, outer, middle, inner, length):
    i = np.arange(into.size).reshape(into.shape)
    at = indices % length
    if outer != 1:
        at = at + i // (middle * inner) * length
    return x.reshape(-1)[at if inner == 1 else at * inner + i % inner]


def _concatenate(into, addresses, size):
    """Arrays of one size, of which each gives so many neighbours in turn."""
    shape = into.size // len(addresses) // size, size
    steps = size * into.itemsize, into.itemsize
    parts = [view(into.dtype, int(at), shape, steps) for at in addresses]
    return np.stack(parts, 1).reshape(into.shape)


def _concatenate_others(into, addresses, axis, begins, strides):
    """Arrays that lie in any way, of which each begins somewhere on the axis."""
    parts = []
    for at, begin, end, steps in zip(
        addresses, begins, [*begins[1:], into.shape[axis]], strides, strict=True
    ):
        shape = (*into.shape[:axis], int(end - begin), *into.shape[axis + 1 :])
        parts.append(view(into.dtype, int(at), shape, tuple(map(int, steps))))
    return np.concatenate(parts, axis)


OTHERS = {
    "concatenate": _concatenate_others,
    "copy": lambda into, x: x,
    "fill": lambda into, x: x,
    "arange": lambda into, start, step: start + step * np.arange(into.size),
    "take": _take,
    "take_scalar": _take,
    "concatenate_same_size": _concatenate,
    "prepare_array_indexing": lambda into, at, length, step: into + step * (at % length),
}
"""What is computed by the kernels that are no ufuncs of NumPy's and no sums."""


def _wide(x):
    """16-bit floats as float32, in which CuPy computes with them."""
    x = np.asarray(x)
    return x.astype("f4") if x.dtype in (np.float16, ml_dtypes.bfloat16) else x
