"""Arrays that have a shape and a type but no numbers: a formula run on them is written down.

A traced array stands for a `Value`: an input, or a result of a `Step`. What has numbers, such as a
parameter, is a constant, and functions of constants alone are computed at once (constant folding).
Writing into a traced array rebinds it to a new value; that is refused where a view shares its
memory.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.lib.stride_tricks import as_strided

from nnxp import _library
from nnxp._arrays import Array, HostArray, Shape, dtype_of, is_array, place_of, xp_of
from nnxp._errors import NnxpError
from nnxp._library import KINDS, VIEWS, compute
from nnxp.backend import home_of
from nnxp.kernels import Kernel
from nnxp.kernels.functions import einsum_terms, met_axes

ROWS = 1_000_003
"""A prime stands for the number of rows: a size that is a multiple of it counts rows."""


ONLY_IN_TRAINING = (
    "{} is in its training form, which nnxp.fit and nnxp.value_and_gradients run, written out; the "
    "model itself computes as is"
)


class Untraceable(NnxpError, TypeError):
    """A formula cannot be written down; the message says what in it."""


@dataclass(eq=False, slots=True)
class Value:
    """What a program computes with: a shape and a type.

    `numbers` is the array of a constant, `name` a parameter's or an input's. `maker` refers to the
    step that made it, weakly, so that a program ends with its last user. `memory` is the value that
    it may be a view of.
    """

    shape: Shape
    dtype: np.dtype[Any]
    numbers: Array | None = None
    name: str = ""
    maker: weakref.ref[Step] | None = None
    memory: Value | None = None

    def __repr__(self) -> str:
        return f"<{self.name or 'value'} {self.dtype}{list(self.shape)}>"

    @property
    def step(self) -> Step | None:
        """The step that made it; None for an input or a constant."""
        return None if self.maker is None else self.maker()

    @property
    def root(self) -> Value:
        """The value in whose memory this one lies: itself, mostly."""
        value = self
        while value.memory is not None:
            value = value.memory
        return value


@dataclass(eq=False, slots=True, weakref_slot=True)
class Step:
    """A function of values: of the dialect, by its name, a kernel, or a layer run as Python.

    `inputs` are values, or scalars and None; `options` are plain. `path` names the layer.
    """

    function: str | Kernel | Callable[..., Any]
    inputs: tuple[Any, ...]
    options: dict[str, Any]
    path: str
    outputs: tuple[Value, ...] = ()
    several: bool = False  # whether the function answers a sequence
    reason: str = ""  # why a layer is run as Python
    values: tuple[Value, ...] = field(init=False)  # the inputs that are values

    def __post_init__(self) -> None:
        self.values = tuple([x for x in self.inputs if isinstance(x, Value)])

    @property
    def name(self) -> str:
        if isinstance(self.function, str):
            return self.function
        return str(getattr(self.function, "__name__", type(self.function).__name__))


class Drawn(NamedTuple):
    """An input of random numbers: `draw(rng)` gives a host array of its shape and type."""

    value: Value
    draw: Callable[[np.random.Generator], HostArray]


@dataclass(slots=True)
class Tape:
    """A trace in progress: its steps, the path of the current layer, and the calls of layers.

    `layers` has a layer's path and the layer itself by the id of the copy that is run; `rows` is
    the number of rows that error messages name. `expands` says whether kernels are replaced by the
    steps of their reference bodies, or is a function of (kernel, arrays, options) that records one.
    `drawn` are inputs that are drawn at random before each run, `statistics` the auxiliary outputs
    of layers by name, `outlines` a cache of the shapes and types of results.
    """

    steps: list[Step] = field(default_factory=list)
    path: str = ""
    calls: list[tuple[str, tuple[Any, ...], Any]] = field(default_factory=list)
    layers: Mapping[int, tuple[str, Any]] = field(default_factory=dict)
    rows: int | None = None
    expands: bool | Callable[..., Any] = False
    drawn: list[Drawn] = field(default_factory=list)
    statistics: dict[str, Value] = field(default_factory=dict)
    outlines: dict[Any, tuple[Any, Any]] = field(default_factory=dict)


_tape: ContextVar[Tape | None] = ContextVar("nnxp_tape", default=None)


@contextmanager
def writing(tape: Tape) -> Iterator[Tape]:
    """Within the block steps are recorded on this tape."""
    outer = _tape.get()
    _tape.set(tape)
    try:
        yield tape
    finally:
        _tape.set(outer)


def current_tape() -> Tape:
    """The tape that records steps now; Untraceable outside of `trace`."""
    tape = _tape.get()
    if tape is None:
        raise Untraceable("an array without numbers is used after its formula has ended")
    return tape


class ndarray(_library.ndarray):
    """An array that stands for a value."""

    __slots__ = ("__weakref__", "_sharing", "value")
    library = "traced"
    device = "cpu"
    __hash__ = object.__hash__

    def __init__(self, value: Value, base: ndarray | None = None) -> None:
        self.value = value
        self._sharing: weakref.WeakSet[ndarray] | None = None  # that look at the same memory
        if base is not None:
            if base._sharing is None:
                base._sharing = weakref.WeakSet([base])
            self._sharing = base._sharing
            self._sharing.add(self)

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return self.value.shape

    @property
    def dtype(self) -> np.dtype[Any]:  # type: ignore[override]
        return self.value.dtype

    @property
    def strides(self) -> tuple[int, ...]:
        raise Untraceable("x.strides: the formula would depend on how x lies in memory")

    @classmethod
    def apply(cls, name: str, arrays: tuple[Any, ...], options: dict[str, Any], out: Any) -> Any:
        result = record(name, arrays, options)
        return result if out is None else _write_into(out, result)

    @classmethod
    def kernel(cls, kernel: Kernel, arrays: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """A kernel is one step, or expanded if the tape says so and NumPy has no fused body."""
        out = options.get("out")
        options = {name: value for name, value in options.items() if name != "out"}
        expands = current_tape().expands
        if callable(expands):
            result = expands(kernel, arrays, options)
        elif expands and kernel.on_library("numpy") is None:
            result = kernel.widened(*arrays, **options)
        else:
            result = record(kernel, arrays, options)
        return result if out is None else _write_into(out, result)

    def __setitem__(self, key: Any, value: Any) -> None:
        if key is Ellipsis and _shape(value) == self.shape:
            _write_into(self, lifted(value))
            return
        _write_into(self, record("assign", (self, value), {"key": key}))

    def _become(self, other: ndarray) -> None:
        """Rebind to another value, which is what writing in place comes to."""
        if self._sharing is not None and len(self._sharing) > 1:
            raise Untraceable("an array is written into while another one looks at its memory")
        root = self.value.root
        if root.name or (root.step is None and root.numbers is None):
            raise Untraceable(f"{root.name or 'an input'} is written into")
        self.value = other.value

    def _numbers(self, what: str) -> Any:
        if self.value.numbers is None:
            raise Untraceable(f"{what}(x): the formula looks at the numbers in x")
        return self.value.numbers

    def __array__(self, *args: object, **options: object) -> Any:
        return np.asarray(self._numbers("numpy.asarray"))

    def __repr__(self) -> str:
        return f"<traced {self.dtype}{list(self.shape)}>"


def _shape(value: Any) -> Shape | None:
    return getattr(value, "shape", None)


def _write_into(out: ndarray, new: ndarray) -> ndarray:
    if new.shape != out.shape:
        new = record("broadcast_to", (new,), {"shape": out.shape})
    if new.value is not out.value:
        out._become(new if new.dtype == out.dtype else new.astype(out.dtype))
    return out


def lifted(x: Any, name: str = "") -> Any:
    """x as a traced array: a value as it is, an array of numbers as a constant."""
    if isinstance(x, ndarray):
        return x
    if isinstance(x, Value):
        return ndarray(x)
    if isinstance(x, np.generic):
        x = np.asarray(x)
    return ndarray(Value(x.shape, x.dtype, x, name)) if is_array(x) else x


def _where(values: Sequence[Value]) -> AbstractContextManager[object]:
    """A block in which the device of constants is the current one."""
    place = place_of(values[0].numbers) if values else "cpu"
    return nullcontext() if place == "cpu" else home_of(place).current()


def is_constant(x: Any) -> bool:
    """Whether x is an array of numbers, or stands for one."""
    value = value_of(x)
    return isinstance(value, Value) and value.numbers is not None


def value_of(x: Any) -> Any:
    """The value that x stands for; scalars and None as they are."""
    array = lifted(x)
    return array.value if isinstance(array, ndarray) else array


def record(function: str | Kernel, arrays: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Record a step and return its result; a function of constants alone is computed instead."""
    if function == "reshape" and not _in_place(value_of(arrays[0]), options["shape"]):
        arrays = (record("copy", arrays, {}),)
    inputs = tuple([x.value if type(x) is ndarray else value_of(x) for x in arrays])
    options = {name: _plain(value) for name, value in options.items()}
    step = Step(function, inputs, options, "")
    values = step.values
    known = all([value.numbers is not None for value in values])  # noqa: C419 (half of the time)
    if known and not _counts_rows(options):
        xp = xp_of(values[0].numbers) if values else np
        with _where(values):
            return constants(perform(xp, step, [numbers(x) for x in inputs]))
    outlines, step.several = _outlined(step)
    views = isinstance(function, str) and function in VIEWS
    memory = inputs[0] if views and _is_view(step) else None
    step.outputs = tuple(
        [Value(*outline, maker=weakref.ref(step), memory=memory) for outline in outlines]
    )
    tape = current_tape()
    step.path = tape.path
    tape.steps.append(step)
    base = arrays[0] if views and isinstance(arrays[0], ndarray) else None
    results = [ndarray(value, base) for value in step.outputs]
    return results if step.several else results[0]


def drawn(shape: Shape, dtype: Any, draw: Callable[[np.random.Generator], HostArray]) -> ndarray:
    """Random numbers, drawn on the host anew for each run: an extra input of the program."""
    tape = current_tape()
    value = Value(shape, np.dtype(dtype), name=f"drawn{len(tape.drawn)}")
    tape.drawn.append(Drawn(value, draw))
    return ndarray(value)


def tell(name: str, x: ndarray) -> None:
    """Add an auxiliary output to the program, such as a running mean, named after the layer."""
    tape = current_tape()
    tape.statistics[f"{tape.path}.{name}" if tape.path else name] = x.value


def constants(results: Any) -> Any:
    """Numbers as constants."""
    if isinstance(results, tuple | list):
        return [lifted(y) for y in results]
    return lifted(results if is_array(results) else np.asarray(results))


def opaque(layer: Any, arrays: tuple[Any, ...], outlines: Any, reason: str) -> Any:
    """A layer that is run as Python for this reason, with results of these outlines: one step."""
    tape = current_tape()
    step = Step(layer, tuple(map(value_of, arrays)), {}, tape.path, reason=reason)
    step.outputs = tuple(
        Value(shape, np.dtype(dtype), maker=weakref.ref(step)) for shape, dtype in outlines
    )
    step.several = len(step.outputs) > 1
    tape.steps.append(step)
    results = tuple(map(ndarray, step.outputs))
    return results if step.several else results[0]


def again(step: Step, arrays: tuple[Any, ...]) -> Any:
    """Record the step again, for these arrays; a kernel is expanded if the current tape says so."""
    current_tape().path = step.path
    if isinstance(step.function, str):
        return record(step.function, arrays, step.options)
    if isinstance(step.function, Kernel):
        _reuse_outlines(step)
        return ndarray.kernel(step.function, arrays, step.options)
    outlines = [(value.shape, value.dtype) for value in step.outputs]
    return opaque(step.function, arrays, outlines, step.reason)


def numbers(x: Any) -> Any:
    """The numbers of a constant."""
    return x.numbers if isinstance(x, Value) else x


def perform(xp: Any, step: Step, arrays: Sequence[Any]) -> Any:
    """A step on arrays of one library."""
    if isinstance(step.function, str):
        return compute(xp, step.function, tuple(arrays), step.options)
    return step.function(*arrays, **step.options)


def _plain(option: Any) -> Any:
    if isinstance(option, ndarray):
        if option.value.numbers is None:
            raise Untraceable("an array of numbers that are not yet known is an index or an option")
        return option.value.numbers
    if isinstance(option, tuple | list):
        return type(option)(map(_plain, option))
    if isinstance(option, slice):
        return slice(_plain(option.start), _plain(option.stop), _plain(option.step))
    return option


def counts_rows(size: object) -> bool:
    """Whether a number counts rows."""
    whole = isinstance(size, int | np.integer) and not isinstance(size, bool)
    return whole and size != 0 and size % ROWS == 0  # type: ignore[operator]


def _counts_rows(option: Any) -> bool:
    if isinstance(option, dict):
        return any(map(_counts_rows, option.values()))
    if isinstance(option, tuple | list):
        return any(map(_counts_rows, option))
    return counts_rows(option)


def shape_text(shape: Shape) -> str:
    """A shape as programs print it."""

    def size(n: int) -> str:
        if not counts_rows(n):
            return str(n)
        return "rows" if n == ROWS else f"{n // ROWS}*rows"

    return f"({', '.join(map(size, shape))}{',' if len(shape) == 1 else ''})"


def _checked_shape(shape: Iterable[Any], step: Step) -> Shape:
    sizes = tuple(map(int, shape))
    for size in sizes:
        if size > ROWS // 2 and size % ROWS and not any(size in v.shape for v in step.values):
            raise Untraceable(
                f"{step.name} makes an axis of a size that is no multiple of the rows: rows are "
                "not treated each on its own"
            )
    return sizes


def _is_view(step: Step) -> bool:
    if step.name == "getitem":
        key = step.options["key"]
        keys = key if isinstance(key, tuple) else (key,)
        return not any(is_array(k) or isinstance(k, list) for k in keys)
    return True


def _in_place(x: Value, shape: Any) -> bool:
    """Whether x can be reshaped as a view; otherwise it is to be copied first."""
    if x.memory is None or x.numbers is not None:
        return True
    try:
        _laid_out(x).reshape(_plain(shape), copy=False)
    except ValueError:  # a copy, or a shape that does not fit: then whoever makes it says so
        return False
    return True


def _laid_out(x: Value) -> Any:
    """A dummy array with the strides of x, whose memory is taken to be contiguous; not one number
    of it may be read, as x[0] of one axis does."""
    if x.memory is None or x.step is None or not x.shape:
        strides = (x.dtype.itemsize * math.prod(x.shape[i + 1 :]) for i in range(len(x.shape)))
        return as_strided(np.zeros((), x.dtype), x.shape, tuple(strides))
    views = compute(np, x.step.name, (_laid_out(x.memory),), x.step.options)
    return views[x.step.outputs.index(x)] if x.step.several else views


# The shapes and types of results


Outlines: TypeAlias = "tuple[list[tuple[Shape, np.dtype[Any]]], bool]"
"""The shapes and types of what a step makes, and whether it answers a sequence."""


def _outlined(step: Step) -> Outlines:
    """The outlines of a step, cached on the tape for equal steps."""
    known, key = current_tape().outlines, _outline_key(step)
    if key is None:
        return _computed(step)
    if key not in known:  # constants live on with the tape: an id is not used again
        known[key] = _computed(step), step.values
    outlines: Outlines = known[key][0]
    return outlines


def _reuse_outlines(step: Step) -> None:
    """Cache the outlines of another tape's step for equal steps on the current tape."""
    outlines = [(value.shape, value.dtype) for value in step.outputs]
    if (key := _outline_key(step)) is not None:
        current_tape().outlines.setdefault(key, ((outlines, step.several), step.values))


def _outline_key(step: Step) -> Any:
    """The cache key of a step's outlines; None if it has an array, or anything without a hash."""
    looks = not isinstance(step.function, str)  # a kernel may, at a constant's numbers
    key = (
        step.function,
        *((x.shape, x.dtype, looks and id(x.numbers)) if isinstance(x, Value)
          else (type(x), x) for x in step.inputs),
        *((name, _key(option)) for name, option in step.options.items()),
    )  # fmt: skip
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _computed(step: Step) -> Outlines:
    result = outline(step)
    several = isinstance(result, list)
    outlines = result if several else [result]
    return [(_checked_shape(shape, step), np.dtype(dtype)) for shape, dtype in outlines], several


def _key(option: Any) -> Any:
    """An option as part of a cache key, in which 1, 1.0 and True differ."""
    if isinstance(option, tuple | list):
        return (type(option), *map(_key, option))
    if isinstance(option, slice):
        return slice, option.start, option.stop, option.step
    return type(option), option


def outline(step: Step) -> Any:
    """(shape, dtype) of what a step makes, or a list of them."""
    if isinstance(step.function, Kernel):
        return _kernel(step.function, step)
    rule = _OUTLINES.get(step.name) or _OUTLINES[KINDS[step.name]]
    return rule(step)


def _kernel(kernel: Kernel, step: Step) -> Any:
    """A kernel's results are as its reference body makes them, or as it says itself."""
    if kernel.outlines is not None:
        try:
            signature(kernel.reference).bind(*step.inputs, **step.options)
        except TypeError as error:
            raise TypeError(f"{kernel.__name__}() {error}") from None
        arrays = [lifted(x) for x in step.inputs]
        outlines = kernel.outlines(*arrays, **step.options)
        if outlines is not None:
            return outlines
    with writing(Tape(expands=True)):
        return _outlines_of(kernel.widened(*map(lifted, step.inputs), **step.options))


def _outlines_of(results: Any) -> Any:
    """(shape, dtype) of an array, or a list of them."""
    if isinstance(results, tuple | list):
        return [(y.shape, y.dtype) for y in results]
    return results.shape, results.dtype


def _stand_in(x: Any, shape: Shape | None = None) -> Any:
    """An array of this shape that takes no memory."""
    if not isinstance(x, Value):
        return x
    return np.broadcast_to(np.zeros((), x.dtype), x.shape if shape is None else shape)


def _elementwise(step: Step) -> Any:
    shape = np.broadcast_shapes(*(value.shape for value in step.values))
    one = [_stand_in(x, (1,) * len(x.shape)) if isinstance(x, Value) else x
           for x in step.inputs]  # fmt: skip
    with np.errstate(all="ignore"):
        return shape, compute(np, step.name, tuple(one), step.options).dtype


def axes_of(axis: Any, ndim: int) -> tuple[int, ...]:
    """The axes of an `axis=` option, from the first to the last."""
    if axis is None:
        return tuple(range(ndim))
    axes = axis if isinstance(axis, tuple | list) else (axis,)
    if any(not -ndim <= int(axis) < ndim for axis in axes):
        raise np.exceptions.AxisError(int(axes[0]), ndim)
    return tuple(sorted(int(axis) % ndim for axis in axes))


def _reduction(step: Step) -> Any:
    (x,) = step.inputs
    axes = axes_of(step.options.get("axis"), len(x.shape))
    if any(x.shape[axis] == 0 for axis in axes):  # NumPy refuses some of these
        compute(np, step.name, (np.empty(x.shape, x.dtype),), step.options)
    keep = step.options.get("keepdims", False)
    shape = tuple(1 if i in axes else n for i, n in enumerate(x.shape) if keep or i not in axes)
    plain = {k: v for k, v in step.options.items() if k not in ("axis", "keepdims", "ord", "ddof")}
    one = np.ones(1, x.dtype)
    return shape, (one if step.name == "norm" else compute(np, step.name, (one,), plain)).dtype


def _scan(step: Step) -> Any:
    (x,) = step.inputs
    plain = {name: value for name, value in step.options.items() if name != "axis"}
    dtype = compute(np, step.name, (np.ones(1, x.dtype),), plain).dtype
    flat = "axis" in step.options and step.options["axis"] is None
    flat = flat or (step.name.startswith("cum") and "axis" not in step.options)
    if not flat:
        axes_of(step.options.get("axis", -1), len(x.shape))
    return ((math.prod(x.shape),) if flat else x.shape), dtype


def _index(step: Step) -> Any:
    """The outline of x[key], without the copy that an index with arrays would make.

    The key is tried on an array without memory, in which each sliced axis has another prime as its
    length: so it is known where in the result that axis is.
    """
    (x,) = step.values
    key = step.options["key"]
    keys = list(key) if isinstance(key, tuple) else [key]
    arrays = [np.asarray(k) for k in keys if isinstance(k, list) or is_array(k)]
    if not arrays or any(indices.dtype == np.dtype(bool) for indices in arrays):
        return _movement(step)
    taken = {size for indices in arrays for size in indices.shape}
    primes = iter(n for n in (101, 103, 107, 109, 113, 127, 131, 137, 139) if n not in taken)
    shape: list[int] = []
    asked: list[Any] = []
    lengths: dict[int, int] = {}
    sizes = iter(x.shape)
    for k in full_index(key, len(x.shape)):
        size = None if k is None else next(sizes)
        if isinstance(k, slice) and size is not None:
            prime = next(primes)
            lengths[prime] = len(range(*k.indices(size)))
            shape, asked = [*shape, prime], [*asked, slice(None)]
        else:
            shape, asked = shape if size is None else [*shape, size], [*asked, k]
    picked = np.broadcast_to(np.zeros((), bool), shape)[tuple(asked)].shape
    return tuple(lengths.get(size, size) for size in picked), x.dtype


def full_index(key: Any, ndim: int) -> list[Any]:
    """An index with an entry for every axis: `slice(None)` for those that it leaves out."""
    keys = list(key) if isinstance(key, tuple) else [key]
    if not any(k is Ellipsis for k in keys):
        keys.append(Ellipsis)
    used = sum(k is not None and k is not Ellipsis for k in keys)
    at = next(i for i, k in enumerate(keys) if k is Ellipsis)
    keys[at : at + 1] = [slice(None)] * (ndim - used)
    return keys


def _movement(step: Step) -> Any:
    return _outlines_of(compute(np, step.name, tuple(map(_stand_in, step.inputs)), step.options))


def _reshape(step: Step) -> Any:
    (x,) = step.inputs
    sizes = [int(size) for size in np.atleast_1d(np.asarray(step.options["shape"], "int64"))]
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and known:
        sizes[sizes.index(-1)] = math.prod(x.shape) // known
    if math.prod(sizes) != math.prod(x.shape) or -1 in sizes:
        raise ValueError(f"cannot reshape {x.shape} into {step.options['shape']}")
    step.options["shape"] = tuple(sizes)
    return tuple(sizes), x.dtype


def _same(step: Step) -> Any:
    return step.inputs[0].shape, step.inputs[0].dtype


def _astype(step: Step) -> Any:
    return step.inputs[0].shape, dtype_of(step.options["dtype"])


def _concatenate(step: Step) -> Any:
    parts = step.values
    ndim = len(parts[0].shape)
    axis = int(step.options.get("axis", 0))
    (axis,) = axes_of(axis, ndim)
    shape = list(parts[0].shape)
    rest = {part.shape[:axis] + part.shape[axis + 1 :] for part in parts}
    if len(rest) > 1:
        raise ValueError(f"concatenate along {axis}: {', '.join(str(p.shape) for p in parts)}")
    shape[axis] = sum(part.shape[axis] for part in parts)
    return tuple(shape), np.result_type(*(part.dtype for part in parts))


def _stack(step: Step) -> Any:
    parts = step.values
    if len({part.shape for part in parts}) > 1:
        raise ValueError(f"stack takes equal shapes: {', '.join(str(p.shape) for p in parts)}")
    shape = list(parts[0].shape)
    (axis,) = axes_of(step.options.get("axis", 0), len(shape) + 1)
    shape.insert(axis, len(parts))
    return tuple(shape), np.result_type(*(part.dtype for part in parts))


def _pad(step: Step) -> Any:
    (x,) = step.inputs
    pads = np.broadcast_to(np.asarray(step.options["pad_width"]), (len(x.shape), 2))
    sizes = (n + before + after for n, (before, after) in zip(x.shape, pads, strict=True))
    return tuple(map(int, sizes)), x.dtype


def _repeat(step: Step) -> Any:
    x, repeats, axis = step.inputs[0], step.options["repeats"], step.options.get("axis")
    times = np.asarray(repeats)
    shape = (math.prod(x.shape),) if axis is None else x.shape
    (axis,) = axes_of(0 if axis is None else axis, len(shape))
    total = shape[axis] * int(times) if times.size == 1 else int(times.sum())
    return (*shape[:axis], total, *shape[axis + 1 :]), x.dtype


def _tile(step: Step) -> Any:
    (x,) = step.inputs
    reps = tuple(np.atleast_1d(step.options["reps"]))
    ndim = max(len(reps), len(x.shape))
    shape = (1,) * (ndim - len(x.shape)) + x.shape
    reps = (1,) * (ndim - len(reps)) + reps
    return tuple(int(n * r) for n, r in zip(shape, reps, strict=True)), x.dtype


def _take(step: Step) -> Any:
    x, ids = step.inputs
    axis = step.options.get("axis")
    if axis is None:
        return np.shape(ids), x.dtype
    (axis,) = axes_of(axis, len(x.shape))
    return x.shape[:axis] + np.shape(ids) + x.shape[axis + 1 :], x.dtype


def _take_along_axis(step: Step) -> Any:
    x, ids = step.inputs
    (axis,) = axes_of(step.options["axis"], len(x.shape))
    shape = list(np.broadcast_shapes((*x.shape[:axis], 1, *x.shape[axis + 1:]),
                                     (*ids.shape[:axis], 1, *ids.shape[axis + 1:])))  # fmt: skip
    shape[axis] = ids.shape[axis]
    return tuple(shape), x.dtype


def _matmul(step: Step) -> Any:
    a, b = step.inputs
    if not (len(a.shape) and len(b.shape)):
        raise ValueError("matmul takes arrays with axes")
    left, right = a.shape, b.shape
    if len(left) == 1:
        left = (1, *left)
    if len(right) == 1:
        right = (*right, 1)
    if left[-1] != right[-2]:
        came = f"{shape_text(a.shape)}, {shape_text(b.shape)}"
        raise ValueError(f"matmul takes (..., n, k) and (..., k, m) but got {came}")
    shape = np.broadcast_shapes(left[:-2], right[:-2])
    shape += left[-2:-1] if len(a.shape) > 1 else ()
    shape += right[-1:] if len(b.shape) > 1 else ()
    return shape, np.result_type(a.dtype, b.dtype)


def _dot(step: Step) -> Any:
    a, b = step.inputs
    if len(a.shape) > 2 or len(b.shape) > 2 or not (a.shape and b.shape):
        raise Untraceable("dot of arrays with other than one or two axes: matmul says which meet")
    return _matmul(step)


def _outer(step: Step) -> Any:
    a, b = step.inputs
    return (math.prod(a.shape), math.prod(b.shape)), np.result_type(a.dtype, b.dtype)


def _tensordot(step: Step) -> Any:
    a, b = step.inputs
    axes = step.options.get("axes", 2)
    left, right = met_axes(axes, len(a.shape), len(b.shape))
    if [a.shape[i] for i in left] != [b.shape[i] for i in right]:
        raise ValueError(f"tensordot of {a.shape} and {b.shape} along {axes}")
    shape = [n for i, n in enumerate(a.shape) if i not in left]
    shape += [n for i, n in enumerate(b.shape) if i not in right]
    return tuple(shape), np.result_type(a.dtype, b.dtype)


def _einsum(step: Step) -> Any:
    parts = step.values
    terms, result = einsum_terms(step.options["subscripts"], [len(p.shape) for p in parts])
    sizes: dict[str, int] = {}
    for letters, part in zip(terms, parts, strict=True):
        if len(letters) != len(part.shape):
            raise ValueError(f"einsum {step.options['subscripts']!r} of {part.shape}")
        for letter, size in zip(letters, part.shape, strict=True):
            if sizes.setdefault(letter, size) not in (size, 1) and size != 1:
                raise ValueError(f"einsum: {letter} is {sizes[letter]} and {size}")
            sizes[letter] = max(sizes[letter], size) if size != 1 else sizes[letter]
    return tuple(sizes[c] for c in result), np.result_type(*(part.dtype for part in parts))


def _creation(step: Step) -> Any:
    options = dict(step.options)
    if step.name == "arange":
        return _outlines_of(compute(np, "arange", (), options))
    if step.name.endswith("_like"):
        return step.inputs[0].shape, options.get("dtype") or step.inputs[0].dtype
    if step.name in ("eye", "linspace"):
        raise Untraceable(f"{step.name} of the number of rows: rows are not each on its own")
    shape = options["shape"]
    shape = tuple(shape) if isinstance(shape, tuple | list) else (shape,)
    default = np.asarray(options.get("fill_value", 0.0)).dtype
    return shape, options.get("dtype") or default


def _diff(step: Step) -> Any:
    (x,) = step.inputs
    (axis,) = axes_of(step.options.get("axis", -1), len(x.shape))
    size = max(0, x.shape[axis] - int(step.options.get("n", 1)))
    return (*x.shape[:axis], size, *x.shape[axis + 1 :]), x.dtype


def _scatter(step: Step) -> Any:
    return tuple(step.options["shape"]), step.values[0].dtype


def _segment_sum(step: Step) -> Any:
    values, ids = step.inputs
    return (int(step.options["size"]), *values.shape[len(ids.shape) :]), values.dtype


_OUTLINES: dict[str, Callable[[Step], Any]] = {
    "elementwise": _elementwise, "comparison": _elementwise, "reduction": _reduction,
    "scan": _scan, "movement": _movement, "creation": _creation, "contraction": _matmul,
    "reshape": _reshape, "copy": _same, "tril": _same, "triu": _same, "assign": _same,
    "astype": _astype, "concatenate": _concatenate, "stack": _stack, "pad": _pad,
    "repeat": _repeat, "tile": _tile, "take": _take, "take_along_axis": _take_along_axis,
    "dot": _dot, "outer": _outer, "tensordot": _tensordot, "einsum": _einsum, "diff": _diff,
    "getitem": _index, "roll": _same, "flip": _same, "scatter": _scatter,
    "segment_sum": _segment_sum,
}  # fmt: skip


def asarray(x: Any, dtype: Any = None) -> Any:
    """x as a traced array: arrays of numbers become constants."""
    y = lifted(x if isinstance(x, ndarray) or is_array(x) else np.asarray(x))
    return y if dtype is None else y.astype(dtype, copy=False)


array = asarray


def __getattr__(name: str) -> Any:
    return _library.module_attribute(ndarray, name)
