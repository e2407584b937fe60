"""What every layer is: a frozen dataclass whose fields are its parameters, options and children.

A layer is a formula. Writing one takes the fields, `__call__` with the formula, `output_shape`
if the shape changes, and `examples`; the base class adds the dataclass, and puts a door in front
of the outermost call that checks shape, type and place before any work is done.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import cached_property, wraps
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar, dataclass_transform

import numpy as np

from nnxp._arrays import (
    Array,
    Shape,
    float_dtype,
    is_array,
    is_floating,
    place_of,
)
from nnxp._errors import DeviceMismatch, DtypeMismatch, OptionError, ShapeError
from nnxp.backend import Backend, get_backend, home_of, to_backend

if TYPE_CHECKING:
    from nnxp.layers._summary import Summary

L = TypeVar("L", bound="Layer")
Rng: TypeAlias = "int | np.random.Generator | None"  # quoted: NumPy loads its random on demand
"""What `rng=` takes: a seed, a Generator, or None for fresh entropy (SPEC 7)."""

_inside: ContextVar[bool] = ContextVar("nnxp_inside_a_layer", default=False)


@dataclass_transform(frozen_default=True, eq_default=False)
class Layer:
    """A formula with parameters, rows in and rows out.

    Axis 0 of x holds rows, each treated on its own. Layers know nothing of devices, buffers or
    threads: arrays bring their library along. Derive from this class to make a layer; the
    derived class becomes a frozen dataclass of its annotated fields, and a field is a parameter
    if it holds an array, a child if it holds a layer or a tuple of layers, else an option.
    """

    _bare: ClassVar[Callable[[Any, Array], Array]]
    """The formula without the door: for a container, which is inside already."""

    known: ClassVar[dict[str, type[Layer]]] = {}
    """Layers by class name, so that a file can name them."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        formula = cls.__dict__.get("__call__")
        if formula is not None:
            cls._bare = formula
            cls.__call__ = _behind_the_door(formula)  # type: ignore[assignment,method-assign]
        taken_names = {*dir(Layer), "output"} & cls.__annotations__.keys()
        if taken_names:
            names = ", ".join(sorted(taken_names))
            raise OptionError(
                f"a field of {cls.__name__} cannot be called {names}: every layer has it"
            )
        new = bool(cls.__annotations__)  # without fields of its own it is made as its base is
        dataclasses.dataclass(frozen=True, eq=False, repr=False, init=new)(cls)
        if cls.__name__.startswith("_"):
            return
        taken = Layer.known.get(cls.__name__)
        if taken is None or not taken.__module__.startswith("nnxp."):
            Layer.known[cls.__name__] = cls

    # what a layer defines

    def __call__(self, x: Array) -> Array:
        """The formula: x (rows, ...) to y (rows, ...), both where the parameters are.

        Raises ShapeError, DtypeMismatch or DeviceMismatch before any work is done.
        """
        raise NotImplementedError(f"{type(self).__name__} has no formula: define __call__")

    def output_shape(self, shape: Shape) -> Shape:
        """The shape of y for an x of this shape; ShapeError if such an x does not fit."""
        return shape

    def multiply_adds(self, shape: Shape) -> int:
        """How many multiply-adds the products take for an x of this shape."""
        return 0

    @property
    def temporaries(self) -> int:
        """Arrays as large as its output that the layer holds at once, the output aside."""
        return 2

    def __post_init__(self) -> None:
        self._settle()

    def _settle(self) -> None:
        """Refuse what would not be seen as a parameter or a child, then ask `_validate`.

        Arrays of another byte order than this machine's are taken in as its own.
        """
        for name, value in self._fields():
            if isinstance(value, np.ndarray) and not value.dtype.isnative:
                native = value.astype(value.dtype.newbyteorder("="))
                object.__setattr__(self, name, native)
            if isinstance(value, list | tuple):
                inner = [each for each in value if is_array(each) or _holds_layers(each)]
                hidden = isinstance(value, list) and any(isinstance(e, Layer) for e in value)
                if inner or hidden:
                    raise OptionError(
                        f"{name} of {type(self).__name__} holds arrays or layers where nobody "
                        "finds them: a field is an array, a layer, or a tuple of layers"
                    )
        self._validate()

    def _validate(self) -> None:
        """Raise ShapeError or OptionError unless the fields fit each other.

        Asked whenever fields are filled: by `__init__`, `.to()`, and from a file, whose fields have
        only the kinds that the annotations ask for. Looks at shapes and options, never
        at the values in arrays.
        """

    @classmethod
    def examples(cls) -> Iterator[tuple[Layer, Shape]]:
        """Small instances with shapes of x they take: what every test of all layers runs on."""
        raise NotImplementedError(f"{cls.__name__} has no examples: define examples()")

    # what every layer has

    def _fields(self) -> Iterator[tuple[str, Any]]:
        for each in dataclasses.fields(self):  # type: ignore[arg-type]
            yield each.name, getattr(self, each.name)

    def children(self) -> Iterator[tuple[str, Layer]]:
        """The layers in the fields, by name: `inner`, `layers.0`, `layers.1`."""
        for name, value in self._fields():
            if isinstance(value, Layer):
                yield name, value
            elif isinstance(value, tuple):
                for i, each in enumerate(value):
                    if isinstance(each, Layer):
                        yield f"{name}.{i}", each

    def parameters(self) -> dict[str, Array]:
        """Every array in the model by its dotted name, such as `layers.0.weight`."""
        found = {name: value for name, value in self._fields() if is_array(value)}
        for name, child in self.children():
            found |= {f"{name}.{inner}": value for inner, value in child.parameters().items()}
        return found

    def with_parameters(self: L, parameters: dict[str, Array]) -> L:
        """A model like this one with other arrays: all of them, by name, in the same shapes.

        They may be of another type or in another place, but all of one type in one place. Raises
        ShapeError for missing, unknown or misshapen ones, DtypeMismatch for what is no array of
        NumPy or CuPy, DtypeMismatch and DeviceMismatch for mixtures.
        """
        own = self.parameters()
        missing, unknown = own.keys() - parameters.keys(), parameters.keys() - own.keys()
        if missing or unknown:
            raise ShapeError(
                f"{self} wants exactly its own parameters"
                + (f"; missing: {', '.join(sorted(missing))}" if missing else "")
                + (f"; unknown: {', '.join(sorted(unknown))}" if unknown else "")
            )
        for name, value in parameters.items():
            if not is_array(value):
                kind = f"{type(value).__module__}.{type(value).__qualname__}"
                raise DtypeMismatch(
                    f"{name} of {self} is an array of NumPy or CuPy, not {kind}; "
                    "numpy.asarray(value) may make it one"
                )
            if value.shape != own[name].shape:
                raise ShapeError(f"{name} of {self} is {own[name].shape}, not {value.shape}")
        made = self._replaced(lambda name, value: parameters[name])
        made._kind  # raises if the arrays are a mixture  # noqa: B018
        return made

    def _replaced(
        self: L,
        array: Callable[[str, Array], Array] = lambda name, value: value,
        layer: Callable[[str, Layer], Layer] | None = None,
        prefix: str = "",
    ) -> L:
        """A copy: arrays replaced by array(path, value), then children by layer(path, child)."""

        def child(path: str, value: Layer) -> Layer:
            made = value._replaced(array, layer, path + ".")
            return made if layer is None else layer(path, made)

        fields = {}
        for name, value in self._fields():
            path = prefix + name
            if is_array(value):
                value = array(path, value)
            elif isinstance(value, Layer):
                value = child(path, value)
            elif isinstance(value, tuple):
                value = tuple(
                    child(f"{path}.{i}", each) if isinstance(each, Layer) else each
                    for i, each in enumerate(value)
                )
            fields[name] = value
        if layer is None:
            return self._made(**fields)
        made = object.__new__(type(self))  # children of another class: not for _validate to judge
        made.__dict__.update(fields)
        return made

    @classmethod
    def _made(cls: type[L], **fields: Any) -> L:
        """An instance with these fields, not by way of `__init__`."""
        made = object.__new__(cls)
        made._set(**fields)
        return made

    def _set(self, **fields: Any) -> None:
        """Fill the fields, once, and see that they fit each other: what an `__init__` ends with."""
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        self._settle()

    @property
    def parameter_count(self) -> int:
        """How many numbers the parameters hold."""
        return sum(value.size for value in self.parameters().values())

    @cached_property
    def _kind(self) -> tuple[str, np.dtype[Any]] | None:
        """(place, dtype) of all parameters, or None if there are none."""
        found: dict[tuple[str, np.dtype[Any]], str] = {}
        for name, value in self.parameters().items():
            if not is_floating(value.dtype):
                raise DtypeMismatch(f"{name} of {self} is {value.dtype}; parameters are floats")
            found.setdefault((place_of(value), value.dtype), name)
        if len({place for place, _ in found}) > 1:
            said = " but ".join(f"{name} is on {place}" for (place, _), name in found.items())
            raise DeviceMismatch(f"{self}: {said}; bring the parameters together with .to(...)")
        if len(found) > 1:
            said = " but ".join(f"{name} is {dtype}" for (_, dtype), name in found.items())
            raise DtypeMismatch(f"{self}: {said}; bring the parameters together with .astype(...)")
        return next(iter(found), None)

    @cached_property
    def _accepted(self) -> set[Any]:
        """The kinds of host arrays that were checked and found to fit: types and shapes of rows."""
        return set()

    @property
    def place(self) -> str | None:
        """Where the parameters live, such as "cpu" or "cuda:0"; None if there are none."""
        return self._kind[0] if self._kind else None

    @property
    def dtype(self) -> np.dtype[Any] | None:
        """The type of the parameters; None if there are none."""
        return self._kind[1] if self._kind else None

    def to(self: L, backend: str | Backend) -> L:
        """The same model with its parameters on this backend; itself if they are there already."""
        target = get_backend(backend)
        if {place_of(value) for value in self.parameters().values()} <= {target.device}:
            return self
        there = self._replaced(lambda name, value: to_backend(value, target))
        target.synchronize()  # whichever thread or stream uses the parameters, they have arrived
        return there

    def astype(self: L, dtype: object) -> L:
        """The same model with parameters of this type: "float16", "bfloat16", "float32", ..."""
        wanted = float_dtype(dtype)
        if {value.dtype for value in self.parameters().values()} <= {wanted}:
            return self

        def converted(name: str, value: Array) -> Array:
            with home_of(place_of(value)).current():
                return value.astype(wanted)

        return self._replaced(converted)

    def activations(self, x: Array) -> dict[str, Array]:
        """Every layer's output for x by the layer's name, in the order in which they are made.

        The last one, "output", is the model's own.
        """
        from nnxp.layers._trace import trace

        return {step.name: step.output for step in trace(self, x)}

    def summary(self, shape: Shape) -> Summary:
        """What the model is made of and costs for an x of this shape; print it.

        Layers, shapes, parameters, multiply-adds, and bytes a row at the widest point.
        """
        from nnxp.layers._summary import summarize

        return summarize(self, shape)

    def __repr__(self) -> str:
        options = [
            repr(value)
            for name, value in self._fields()
            if not (is_array(value) or value is None or isinstance(value, Layer | tuple))
        ]
        return f"{type(self).__name__}({', '.join(options)})"

    def __getstate__(self) -> dict[str, Any]:
        return dict(self._fields())


Layer._bare = Layer.__call__


def _behind_the_door(formula: Callable[[Any, Array], Array]) -> Callable[[Any, Array], Array]:
    """The formula, guarded where a caller enters a model and bare between the layers of one."""

    @wraps(formula)
    def call(self: Layer, x: Array) -> Array:
        if _inside.get():
            return formula(self, x)
        on_host = type(x) is np.ndarray
        kind = (x.dtype, x.shape[1:], x.ndim) if on_host else None  # all that decides on the host
        if kind is None or kind not in self._accepted:
            check(self, x)
            if len(self._accepted) > 1000:  # rows of ever new shapes
                self._accepted.clear()
            self._accepted.add(kind)
        token = _inside.set(True)
        try:
            if on_host or place_of(x) == "cpu":
                with np.errstate(under="ignore"):  # what is too small for its type is rightly zero
                    return formula(self, x)
            with home_of(place_of(x)).current():
                return formula(self, x)
        except Exception as error:
            path = getattr(error, "layer_path", "")
            if path and not hasattr(type(error), "layer_path"):
                error.add_note(f"raised in layer {path} of {self}")
            raise
        finally:
            _inside.reset(token)

    return call


def _holds_layers(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(
        isinstance(each, Layer) or is_array(each) or _holds_layers(each) for each in value
    )


def check(layer: Layer, x: Array) -> None:
    """Raise ShapeError, DtypeMismatch or DeviceMismatch unless the layer can take x."""
    kind, place = layer._kind, place_of(x)
    if x.ndim == 0:
        raise ShapeError(f"{layer} takes (rows, ...) but got a single number")
    if kind is not None and place != kind[0]:
        mend = f"x = nnxp.to_backend(x, {kind[0]!r}) or model.to({place!r})"
        raise DeviceMismatch(
            f"{layer} has its parameters on {kind[0]} but x is on {place}; {mend} brings them "
            "together, and nnxp.predict(model, x) takes host rows wherever the model is"
        )
    if kind is not None and x.dtype != kind[1]:
        raise DtypeMismatch(
            f"{layer} computes in {kind[1]} but x is {x.dtype}; x.astype({str(kind[1])!r}) "
            "converts it, and nnxp.predict(model, x) takes rows of any numeric type"
        )
    if kind is None and not is_floating(x.dtype):
        raise DtypeMismatch(f"{layer} takes floats but x is {x.dtype}; x.astype('float32')")
    layer.output_shape(x.shape)


def last_axis(layer: Layer, shape: Shape, size: int) -> None:
    """Raise ShapeError unless the shape is (rows, ..., size)."""
    if len(shape) >= 2 and shape[-1] == size:
        return
    mend = ""
    if shape == (size,):
        mend = f"; x[None] makes it {(1, size)}"
    elif len(shape) >= 2 and shape[0] == size:
        mend = f"; x.T makes it {shape[::-1]}" if len(shape) == 2 else ""
    raise ShapeError(f"{layer} takes (rows, {size}) but got {shape}{mend}")


def array_shape(layer: Layer, name: str) -> Shape:
    """The shape of the array in this field; ShapeError if no array is there."""
    value = getattr(layer, name)
    if not is_array(value):
        raise ShapeError(f"{name} of {type(layer).__name__} is an array, not {value!r:.60}")
    shape: Shape = value.shape
    return shape


def generator(rng: Rng) -> np.random.Generator:
    """The Generator for a seed, a Generator or None."""
    return np.random.default_rng(rng)
