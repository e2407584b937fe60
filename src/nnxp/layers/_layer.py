"""What every layer is: a dataclass whose fields are its parameters, options and children.

A layer is a formula. Writing one takes the fields, an `__init__` that assigns them, `__call__` with
the formula, and `examples`. Shapes, costs and what is in a model are read off its program: the
formula, written out on arrays that have no numbers.
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
import os
import traceback
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import cache, cached_property, wraps
from math import isfinite
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar, dataclass_transform

import numpy as np

from nnxp._arrays import Array, Shape, float_dtype, is_array, is_floating, owners, place_of
from nnxp._errors import (
    DeviceMismatch,
    DtypeMismatch,
    FrozenLayer,
    NnxpError,
    OptionError,
    ShapeError,
    UnsupportedFunction,
    located,
)
from nnxp.backend import Backend, get_backend, home_of, to_backend
from nnxp.program import traced
from nnxp.program.program import Outline, Program, same_for_any_rows, sized, trace
from nnxp.program.traced import ROWS, Untraceable

if TYPE_CHECKING:
    from nnxp.program.summary import Summary

L = TypeVar("L", bound="Layer")
Rng: TypeAlias = "int | np.random.Generator | None"  # quoted: NumPy loads its random on demand
"""What `rng=` takes: a seed, a Generator, or None for fresh entropy (SPEC 7)."""

Example: TypeAlias = "tuple[Layer, Any]"
"""A layer and the shape of an x that it takes; several shapes in a list, for several inputs."""

MOST_KINDS = 1000  # shapes of rows that a layer remembers


class _LayerType(type):
    """Makes layers: what `__init__` has assigned is checked, and from then on it is fixed."""

    @property
    def __signature__(cls) -> inspect.Signature:
        """What a call of the class takes, for `help` and editors: what its `__init__` does."""
        own = inspect.signature(cls.__init__)  # type: ignore[misc]
        takes = list(own.parameters.values())[1:]
        return inspect.Signature(takes)

    def __call__(cls, *args: Any, **options: Any) -> Any:
        _check_derived(cls)
        layer = super().__call__(*args, **options)
        layer._complete()
        return layer


def _check_derived(cls: type) -> None:
    if cls is Layer:
        raise OptionError("Layer has no formula of its own: derive a class that defines __call__")


@dataclass_transform(eq_default=False)
class Layer(metaclass=_LayerType):
    """A formula with parameters, rows in and rows out.

    Axis 0 of x holds rows, each treated on its own. Layers know nothing of devices, buffers or
    threads: arrays bring their library along. Derive from this class to make a layer: a field is a
    parameter if it holds an array, a child if it holds a layer or a tuple of layers, else an
    option. Fields are assigned in `__init__`, or by the one that dataclasses make, and then fixed.

        class Scale(nnxp.Layer):
            factor: nnxp.Array

            def __init__(self, size):
                self.factor = np.ones(size, "float32")

            def __call__(self, x):
                return x * self.factor
    """

    takes: ClassVar[tuple[str, ...]] = ()
    """What each input is: "float" (without a word), "int" for ids that stay whole, "any", or the
    name of a type, which the layer itself asks for."""

    wide: ClassVar[tuple[str, ...]] = ()
    """The fields that stay in float64 whatever the model's type."""

    by_rows: ClassVar[bool] = True
    """Whether axis 0 of every input holds the rows; a layer that says no checks what it takes."""

    fixed: ClassVar[tuple[str, ...]] = ()
    """The fields that training leaves as they are, such as recorded statistics."""

    in_training: ClassVar[bool] = False
    """Whether this is what `training` answers in place of a layer, and predicts nothing."""

    known: ClassVar[dict[str, type[Layer]]] = {}
    """Layers by class name, so that a file can name them."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        formula = cls.__dict__.get("__call__")
        if formula is not None:
            cls.__call__ = _checked_formula(formula)  # type: ignore[method-assign]
        taken_names = {*dir(Layer), "output"} & cls.__annotations__.keys()
        if taken_names:
            names = ", ".join(sorted(taken_names))
            raise OptionError(
                f"a field of {cls.__name__} cannot be called {names}: every layer has it"
            )
        new = bool(cls.__annotations__)  # without fields of its own it is made as its base is
        new &= "__init__" not in vars(cls)
        try:
            dataclasses.dataclass(eq=False, repr=False, init=new)(cls)
        except (TypeError, ValueError) as error:  # a default that may change, or in a wrong place
            raise OptionError(f"the fields of {cls.__name__}: {error}") from None
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            if isinstance(getattr(cls, field.name, None), property):
                raise OptionError(f"{field.name} of {cls.__name__} is a field, and a property")
        if cls.__name__.startswith("_"):
            return
        taken = Layer.known.get(cls.__name__)
        if taken is None or not taken.__module__.startswith("nnxp."):
            Layer.known[cls.__name__] = cls

    # what a layer defines

    def __call__(self, *inputs: Any) -> Any:
        """The formula: x (rows, ...) to y (rows, ...), both where the parameters are.

        Raises ShapeError, DtypeMismatch or DeviceMismatch before any work is done.
        """
        raise NotImplementedError(f"{type(self).__name__} has no formula: define __call__")

    def validate(self) -> None:
        """Raise ShapeError or OptionError unless the fields fit each other.

        Asked when a layer is made, by `__init__`, `of`, or from a file, whose fields have only the
        kinds that the annotations ask for. Looks at shapes and options, never at numbers in arrays.
        """

    @classmethod
    def examples(cls) -> Iterator[Example]:
        """Small instances with shapes of x they take: what every test of all layers runs on."""
        raise NotImplementedError(f"{cls.__name__} has no examples: define examples()")

    def training(self: L) -> L:
        """Its form while it is trained; itself, unless it or a layer in it has another.

        Dropout drops and BatchNorm normalises by the batch. The parameters keep their names.
        """

        def form_of(name: str, layer: Any) -> Any:
            if not isinstance(layer, Layer):
                return layer
            form = layer.training()
            if not isinstance(form, Layer):
                raise OptionError(f"{name} {layer}: training() answers a layer, not {form!r:.60}")
            return form

        form = self._map_fields(form_of)
        pairs = zip(self.children(), form.children(), strict=True)
        return self if all(old is new for (_, old), (_, new) in pairs) else form

    # how it is made

    @classmethod
    def of(cls: type[L], *values: Any, **fields: Any) -> L:
        """The layer with these fields, in their order or by name, not by way of `__init__`.

        `nnxp.Dense.of(weight, bias, "relu")`. Fields that have a default may be left out.
        """
        _check_derived(cls)
        declared = dataclasses.fields(cls)  # type: ignore[arg-type]
        names = [field.name for field in declared]
        values_by_name = dict(zip(names, values, strict=False)) | fields
        twice = fields.keys() & set(names[: len(values)])
        if len(values) > len(names) or twice or not values_by_name.keys() <= set(names):
            raise OptionError(
                f"{cls.__name__}.of takes each of its fields once ({', '.join(names)}), not "
                f"{len(values)} values and {', '.join(fields) or 'no names'}"
            )
        layer = object.__new__(cls)
        defaults = {d.name: d.default for d in declared if d.default is not dataclasses.MISSING}
        layer.__dict__.update(defaults | values_by_name)
        layer._complete()
        return layer

    def __setattr__(self, name: str, value: Any) -> None:
        if "_fixed" in self.__dict__:
            raise FrozenLayer(
                f"{name} of {self} cannot be assigned: a layer is fixed once it is made; "
                "with_parameters({...}) makes another one"
            )
        if isinstance(getattr(type(self), name, None), property):
            try:
                object.__setattr__(self, name, value)
            except AttributeError as error:  # it has no setter
                raise OptionError(f"{type(self).__name__}.{name} is assigned: {error}") from None
            return
        if name not in self.__dataclass_fields__:  # type: ignore[attr-defined]
            raise OptionError(
                f"{type(self).__name__}.{name} is assigned, but no field of that name is declared; "
                f"write `{name}: {type(value).__name__}` in the class"
            )
        self.__dict__[name] = value

    def __delattr__(self, name: str) -> None:
        raise FrozenLayer(f"{name} of {self} cannot be deleted: a layer is fixed once it is made")

    def _complete(self) -> None:
        """Refuse what would not be seen as a parameter or child, ask `validate`, fix the fields."""
        if "_fixed" in self.__dict__:
            return
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            name = field.name
            if not hasattr(self, name) and field.default_factory is not dataclasses.MISSING:
                self.__dict__[name] = field.default_factory()
            if not hasattr(self, name):
                raise OptionError(f"{type(self).__name__} has no {name}, which __init__ assigns")
            value = self.__dict__.setdefault(name, getattr(self, name))
            if field.type in ("float", float) and is_real(value):
                value = self.__dict__[name] = float(value)
            if _hides(value):
                raise OptionError(
                    f"{name} of {type(self).__name__} holds arrays or layers where nobody "
                    "finds them: a field is an array, a layer, or a tuple of layers"
                )
            if type(value) is np.ndarray or isinstance(value, np.memmap):
                dtype = np.dtype("float64") if name in self.wide else value.dtype.newbyteorder("=")
                self.__dict__[name] = value.astype(dtype, copy=False)
        self.validate()
        self.__dict__["_fixed"] = True

    def _copy(self: L, fields: dict[str, Any]) -> L:
        """A layer of this class with fields that are known to fit."""
        copy = object.__new__(type(self))
        copy.__dict__.update(fields, _fixed=True)
        return copy

    # what is in it

    def _fields(self) -> Iterator[tuple[str, Any]]:
        for name in self.__dataclass_fields__:  # type: ignore[attr-defined]
            if name in self.__dict__:
                yield name, self.__dict__[name]

    def children(self) -> Iterator[tuple[str, Layer]]:
        """The layers in the fields, by name: `inner`, `layers.0`, `layers.1`."""
        for name, value in self._fields():
            if isinstance(value, Layer):
                yield name, value
            elif isinstance(value, tuple):
                for i, item in enumerate(value):
                    if isinstance(item, Layer):
                        yield f"{name}.{i}", item

    def walk(self, prefix: str = "") -> list[tuple[str, Layer]]:
        """Every layer below this one by its dotted name, children before their parents."""
        layers = []
        for name, child in self.children():
            layers += child.walk(f"{prefix}{name}.")
            layers.append((prefix + name, child))
        return layers

    def parameters(self) -> dict[str, Array]:
        """Every array in the model by its dotted name, such as `layers.0.weight`."""
        arrays = {name: value for name, value in self._fields() if is_array(value)}
        for name, child in self.children():
            arrays |= {f"{name}.{inner}": value for inner, value in child.parameters().items()}
        return arrays

    @property
    def parameter_count(self) -> int:
        """How many numbers the parameters hold."""
        return sum(value.size for value in self.parameters().values())

    def _map_fields(self: L, change: Callable[[str, Any], Any], prefix: str = "") -> L:
        """A layer like this one, with change(dotted name, value) for its fields and their items."""
        return self._copy({n: _changed(prefix + n, v, change) for n, v in self._fields()})

    def map_arrays(self: L, change: Callable[[str, Array], Any], prefix: str = "") -> L:
        """A model like this one, with change(dotted name, array) for every array."""
        if not callable(change):
            raise OptionError(f"map_arrays takes a function of name and array, not {change!r:.60}")

        def mapped(path: str, value: Any) -> Any:
            if isinstance(value, Layer):
                return value.map_arrays(change, f"{path}.")
            return change(path, value) if is_array(value) else value

        return self._map_fields(mapped, prefix)

    def map_layers(
        self, change: Callable[[str, Layer], Layer], prefix: str = "", name: str = ""
    ) -> Layer:
        """A model like this one, with change(name, layer) for every layer, children first."""
        if not callable(change):
            raise OptionError(f"map_layers takes a function of name and layer, not {change!r:.60}")

        def mapped(path: str, value: Any) -> Any:
            return value.map_layers(change, f"{path}.", path) if isinstance(value, Layer) else value

        changed = change(name, self._map_fields(mapped, prefix))
        if not isinstance(changed, Layer):
            raise OptionError(f"{name or 'the model'} becomes a layer, not {changed!r:.60}")
        return changed

    def with_parameters(self: L, parameters: Mapping[str, Array]) -> L:
        """A model like this one with other arrays: all of them, by name, in the same shapes.

        They may be of another type or in another place, but all of one type in one place. Raises
        ShapeError for missing, unknown or misshapen ones, DtypeMismatch for what is no array of
        NumPy or CuPy and for mixtures of types, DeviceMismatch for mixtures of places.
        """
        if not isinstance(parameters, Mapping):
            raise OptionError(
                f"with_parameters takes a dict of arrays by name, not {parameters!r:.60}; "
                "model.parameters() is one"
            )
        own = self.parameters()
        missing = own.keys() - parameters.keys()
        unknown = set(map(str, parameters)) - own.keys()
        if missing or unknown:
            raise ShapeError(
                f"{self} wants exactly its own parameters"
                + (f"; missing: {', '.join(sorted(missing))}" if missing else "")
                + (f"; unknown: {', '.join(sorted(unknown))}" if unknown else "")
            )
        for name, value in parameters.items():
            if not is_array(value):
                type_name = f"{type(value).__module__}.{type(value).__qualname__}"
                raise DtypeMismatch(
                    f"{name} of {self} is an array of NumPy or CuPy, not {type_name}; "
                    "numpy.asarray(value) may make it one"
                )
            if value.shape != own[name].shape:
                raise ShapeError(f"{name} of {self} is {own[name].shape}, not {value.shape}")

        wide = self._names_in("wide")

        def replacement(name: str, value: Array) -> Array:
            array = parameters[name]
            if type(array) is not np.ndarray:
                return array
            dtype = "float64" if name in wide else array.dtype.newbyteorder("=")
            return array.astype(dtype, copy=False)

        model = self.map_arrays(replacement)
        model._home  # raises if the arrays are a mixture  # noqa: B018
        return model

    # where it is, and in which type

    @cached_property
    def _home(self) -> tuple[str | None, np.dtype[Any] | None]:
        """(place, dtype) of the parameters; None for what they do not settle."""
        places: dict[str, str] = {}
        dtypes: dict[np.dtype[Any], str] = {}
        wide = self._names_in("wide")
        for name, value in self.parameters().items():
            if not is_floating(value.dtype):
                raise DtypeMismatch(f"{name} of {self} is {value.dtype}; parameters are floats")
            places.setdefault(place_of(value), name)
            if name not in wide:
                dtypes.setdefault(value.dtype, name)
        if len(places) > 1:
            mixture = " but ".join(f"{name} is on {place}" for place, name in places.items())
            raise DeviceMismatch(f"{self}: {mixture}; bring the parameters together with .to(...)")
        if len(dtypes) > 1:
            mixture = " but ".join(f"{name} is {dtype}" for dtype, name in dtypes.items())
            raise DtypeMismatch(
                f"{self}: {mixture}; bring the parameters together with .astype(...)"
            )
        return next(iter(places), None), next(iter(dtypes), None)

    def _names_in(self, declaration: str) -> set[str]:
        """The dotted names of the fields that layers declare, as `wide` or `fixed`."""
        return {
            f"{path}.{name}".lstrip(".")
            for path, layer in [*self.walk(), ("", self)]
            for name in getattr(layer, declaration)
        }

    @property
    def place(self) -> str | None:
        """Where the parameters live, such as "cpu" or "cuda:0"; None if there are none."""
        return self._home[0]

    @property
    def dtype(self) -> np.dtype[Any] | None:
        """The type of the parameters; None if there are none."""
        return self._home[1]

    def to(self: L, backend: str | Backend) -> L:
        """The same model with its parameters on this backend; itself if they are there already."""
        target = get_backend(backend)
        if {place_of(value) for value in self.parameters().values()} <= {target.device}:
            return self
        moved = self._converted(lambda _, value: to_backend(value, target))
        target.synchronize()  # whichever thread or stream uses the parameters, they have arrived
        return moved

    def _converted(self: L, change: Callable[[str, Array], Array]) -> L:
        """A model with change(name, array) for its arrays; those of one memory have one again."""
        parameters = self.parameters()
        owner_of = owners(parameters)
        names = dict.fromkeys(owner.name for owner in owner_of.values())
        results = {name: change(name, parameters[name]) for name in names}
        return self.map_arrays(lambda name, _: owner_of[name].of(results))

    def astype(self: L, dtype: object) -> L:
        """The same model with parameters of this type: "float16", "bfloat16", "float32", ..."""
        wanted = float_dtype(dtype)
        parameters, wide = self.parameters(), self._names_in("wide")
        owner_of = owners(parameters)
        exempt = {owner_of[name].name for name in parameters if name in wide}

        def converted(name: str, value: Array) -> Array:
            if value.dtype == wanted or name in exempt:
                return value
            with home_of(place_of(value)).current():
                return value.astype(wanted)

        dtypes = {v.dtype for n, v in parameters.items() if owner_of[n].name not in exempt}
        return self if dtypes <= {wanted} else self._converted(converted)

    # what it does

    def program(self, *outlines: Any, whole: bool = False) -> Program:
        """The formula written out, for inputs of these shapes, such as `net.program((1, 784))`.

        Axis 0 is any number of rows, unless the inputs are taken as a `whole`: then it is as long
        as the shapes say. An outline is a shape, in the model's own type, a pair
        (shape, dtype), or None for an input that is left out; that of a whole may be an array, and
        the program is then right for its numbers only. Layers that look at numbers are one step
        each, run as Python. Raises ShapeError, with the layer's path, for shapes that do not
        fit, and DtypeMismatch.

            >>> print(nnxp.Dense(784, 10, "relu", rng=0).program((1, 784)))
            x: float32(rows, 784)
            v0 = linear(x, weight, bias, activation=relu)               # (rows, 10)
            return v0
        """
        if not outlines:
            raise ShapeError(f"{self} takes (rows, ...) but got no shape, such as (1, 784)")
        if outlines[0] is None:
            raise ShapeError(f"{self} takes {self.input_names[0]}, which cannot be left out")
        if whole:
            known = tuple(outline if is_array(outline) else None for outline in outlines)
            parsed = tuple(self._outline(outline, None) for outline in outlines)
            return _traced_model(self, parsed, None, known)
        parsed = tuple(map(self._outline, outlines))
        return self._program(parsed, int(shape_and_dtype(outlines[0])[0][0]))

    def _program(self, outlines: tuple[Outline | None, ...], rows: int | None) -> Program:
        """The program for these kinds of inputs; `rows` is what errors say, None for short ones."""
        programs: dict[Any, Program | Untraceable] = self.__dict__.setdefault("_programs", {})
        program = programs.get(outlines)
        if program is None:
            if len(programs) >= MOST_KINDS:
                programs.clear()
            try:
                program = _traced_model(self, outlines, rows)
            except Untraceable as error:
                program = error
            programs[outlines] = program
        if isinstance(program, Untraceable):
            raise program
        return program

    def _outline(self, outline: Any, rows: int | None = ROWS) -> Outline | None:
        if outline is None:
            return None
        if rows is None and is_array(outline):
            return Outline(outline.shape, outline.dtype)
        shape, dtype = shape_and_dtype(outline)
        shape = _sizes(shape) if rows is None else self._shape(shape)
        try:
            dtype = np.dtype(dtype or self.dtype or "float32")
        except TypeError:
            message = f"the type of an input is one of NumPy's, not {dtype!r:.60}"
            raise DtypeMismatch(message) from None
        return Outline(shape if rows is None else (rows, *shape[1:]), dtype)

    def _shape(self, shape: Any) -> Shape:
        """The shape of an input as whole numbers; ShapeError for anything else."""
        sizes = _sizes(shape)
        if not sizes:
            raise ShapeError(f"{self} takes (rows, ...) but got a single number")
        return sizes

    def output_shape(self, *shapes: Any) -> Any:
        """The shape of y for an x of this shape; ShapeError if such an x does not fit.

        Read off the program. A layer whose formula looks at numbers may define it; without it, such
        a layer is taken to keep the shape.
        """
        shapes = tuple(None if shape is None else self._shape(shape) for shape in shapes)
        pairs = zip(shapes, self.input_dtypes(len(shapes)), strict=True)
        program = self.program(*(None if s is None else (s, dtype) for s, dtype in pairs))
        outputs = tuple(outline.shape for outline in program.outline(shapes[0][0]))
        return outputs if program.several else outputs[0]

    @property
    def input_names(self) -> tuple[str, ...]:
        """The names of the inputs, as the formula has them: `("x",)`."""
        return tuple(_inputs_of(type(self)))

    @property
    def required_inputs(self) -> int:
        """How many inputs there are at least: those after them may be left out."""
        return sum(p.default is p.empty for p in _inputs_of(type(self)).values())

    @property
    def most_inputs(self) -> int | None:
        """How many inputs there may be; None for a formula that takes any number of them."""
        inputs = _inputs_of(type(self)).values()
        return None if any(p.kind is p.VAR_POSITIONAL for p in inputs) else len(inputs)

    def input_dtypes(self, count: int) -> list[np.dtype[Any]]:
        """The types in which so many inputs are computed, where the rows do not tell."""
        takes = [*self.takes, *["float"] * count][:count]
        return [
            np.dtype("int64") if taken == "int" else self.dtype or np.dtype("float32")
            for taken in takes
        ]

    def activations(self, *inputs: Array) -> dict[str, Array]:
        """Every layer's output for these inputs by the layer's name, in the order of their making.

        The last one, "output", is the model's own.
        """
        _check(self, inputs)
        program = self.program(*map(outline_of, inputs))
        calls = [call for call in program.calls if call.path]
        inputs = tuple(x for x in inputs if x is not None)
        with _current(self, inputs):
            outputs = program.run(inputs, [v for call in calls for v in call.outputs[:1]])
            output = program(*inputs)
        return {call.path: y for call, y in zip(calls, outputs, strict=True)} | {"output": output}

    def row_shape(self) -> Shape:
        """The shape of a row that the model takes, if its parameters tell: `(784,)`.

        Raises OptionError if they do not, or if rows of any size would do.
        """
        sizes = sorted({size for value in self.parameters().values() for size in value.shape})
        fits = [(size,) for size in sizes if self._takes((1, size))]
        if len(fits) != 1 or self._takes((1, max(sizes) + 1)):
            raise OptionError(
                f"{self!r:.200} does not tell the shape of its rows: name it, as in (1, 784)"
            )
        return fits[0]

    def _takes(self, shape: Shape) -> bool:
        try:
            self._program((self._outline((shape, self.input_dtypes(1)[0])),), None)
        except Exception:  # a ShapeError, or whatever a formula says to a shape of other axes
            return False
        return True

    def summary(self, *shapes: Any) -> Summary:
        """What the model is made of and costs for an x of this shape; print it.

        Layers, shapes, parameters, multiply-adds, and bytes a row at the widest point. Without a
        shape, for one row, if the parameters tell its size.
        """
        from nnxp.program.summary import summarize

        return summarize(self, shapes or ((1, *self.row_shape()),))

    def __repr__(self) -> str:
        options = [
            repr(value)
            for name, value in self._fields()
            if not (is_array(value) or value is None or isinstance(value, Layer | tuple))
        ]
        return f"{type(self).__name__}({', '.join(options)})"

    def __getstate__(self) -> dict[str, Any]:
        return dict(self._fields())

    def __setstate__(self, fields: dict[str, Any]) -> None:
        self.__dict__.update(fields, _fixed=True)


def _changed(name: str, value: Any, change: Callable[[str, Any], Any]) -> Any:
    """What a field becomes; no closure, which by calling itself would keep alive what it holds."""
    if not isinstance(value, tuple):
        return change(name, value)
    items = tuple(_changed(f"{name}.{i}", item, change) for i, item in enumerate(value))
    return value if all(map(operator.is_, items, value)) else items  # it may be a named tuple


def _checked_formula(formula: Callable[..., Any]) -> Callable[..., Any]:
    """The formula, with its inputs checked before any work, and the layer named in errors."""
    signature = inspect.signature(formula)

    @wraps(formula)
    def call(self: Layer, *inputs: Any, **named: Any) -> Any:
        if named or len(inputs) != 1:
            inputs = _in_order(self, signature, inputs, named)
        x = inputs[0] if inputs else None
        try:
            if type(x) is traced.ndarray or any(type(value) is traced.ndarray for value in inputs):
                return _traced_call(self, formula, inputs)
            key = (x.dtype, x.shape[1:]) if type(x) is np.ndarray and x.ndim else None
            taken = self.__dict__.get("_taken")
            if taken is None:
                taken = self.__dict__["_taken"] = set()
            if key is None or key not in taken or len(inputs) > 1:
                _check(self, inputs)
                if len(taken) >= MOST_KINDS:
                    taken.clear()
                taken.add(key)
            if type(x) is np.ndarray:
                with np.errstate(under="ignore"):  # what is too small for its type is rightly zero
                    return formula(self, *inputs)
            with _current(self, inputs):
                return formula(self, *inputs)
        except Exception as error:
            _locate(error, self)
            raise

    return call


def _in_order(
    layer: Layer, signature: inspect.Signature, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[Any, ...]:
    """The inputs in the order of the formula's arguments."""
    try:
        bound = signature.bind(layer, *inputs, **named)
    except TypeError as error:
        names = ", ".join(list(signature.parameters)[1:])
        raise ShapeError(f"{layer} takes {names}: {error}") from None
    if bound.kwargs:
        bound.apply_defaults()
    arrays = list(bound.args[1:])
    while len(arrays) > 1 and arrays[-1] is None:  # left out
        arrays.pop()
    return tuple(arrays)


def _current(layer: Layer, inputs: tuple[Any, ...]) -> Any:
    """A block in which the device of the inputs is the current one."""
    places = {place_of(x) for x in inputs if is_array(x)}
    place = next(iter(places), "cpu")
    return nullcontext() if place == "cpu" else home_of(place).current()


def _locate(error: Exception, layer: Layer) -> None:
    """Name the layer in which an error arose, by its path in `layer`.

    An error from deep inside a model passes here at every level, so it arrives with the path in the
    outermost model: `layers.3.inner.layers.0`.
    """
    with suppress(AttributeError):  # an error of someone's own that cannot take it goes on bare
        inner = error.__dict__.get("_layer")
        if inner is not None and inner is not layer:
            located(error, next((path for path, child in layer.walk() if child is inner), ""))
        error.__dict__["_layer"] = layer


# tracing


def _sizes(shape: Any) -> Shape:
    """A shape as whole numbers; ShapeError for anything else."""
    try:
        sizes = tuple(map(operator.index, shape))
    except TypeError:
        sizes = (-1,)
    if min(sizes, default=0) < 0:
        raise ShapeError(f"the shape of an input is whole numbers, (rows, ...), not {shape!r:.60}")
    return sizes


def shape_and_dtype(outline: Any) -> tuple[Any, Any]:
    """The two parts of an outline; of a mere shape, the type is None."""
    pair = isinstance(outline, tuple | list) and len(outline) == 2
    return tuple(outline) if pair and isinstance(outline[0], tuple | list) else (outline, None)


def outline_of(x: Any) -> Any:
    """(shape, dtype) of an input, None for one that is left out."""
    return (x.shape, x.dtype) if is_array(x) else None


def _traced_model(
    model: Layer,
    outlines: tuple[Outline | None, ...],
    rows: int | None,
    whole: tuple[Array | None, ...] | None = None,
) -> Program:
    """The program of a model, for inputs of these outlines; None is passed on as it is.

    Of inputs taken as a `whole`, it has what is known of each, its numbers or nothing.
    """
    constants: dict[int, Any] = {}  # one for an array that several fields share

    def lift(name: str, value: Array) -> Any:
        if id(value) not in constants:
            constants[id(value)] = traced.lifted(value, name)
        return constants[id(value)]

    lifted = model.map_arrays(lift)
    layers = originals(lifted, model)
    formula = type(model).__call__
    names = [*model.input_names, *(f"x{i}" for i in range(len(outlines)))][: len(outlines)]

    def written(times: int) -> Program:
        values = [
            traced.Value(
                (times * outline.shape[0], *outline.shape[1:]) if whole is None else outline.shape,
                outline.dtype,
                name=name,
            )
            for outline, name in zip(outlines, names, strict=True)
            if outline is not None
        ]

        def named(*inputs: Any) -> Any:
            arrays = iter(inputs)
            arguments = [None if outline is None else next(arrays) for outline in outlines]
            for i, numbers in enumerate(whole or ()):
                arguments[i] = arguments[i] if numbers is None else traced.lifted(numbers)
            return formula(lifted, *arguments)

        return trace(named, *values, layers=layers, rows=rows)

    place = model.place  # what follows from parameters alone is computed where they are
    with nullcontext() if place in (None, "cpu") else home_of(place).current():
        program = written(1)
        if whole is None:
            same_for_any_rows(program, written(2))
    return program


def originals(copy: Layer, model: Layer) -> dict[int, tuple[str, Layer]]:
    """Of each layer of a copy, by its id, the path, and the layer that it is a copy of."""
    pairs = zip([*model.walk(), ("", model)], [*copy.walk(), ("", copy)], strict=True)
    return {id(own): (path, layer) for (path, layer), (_, own) in pairs}


@cache
def _inputs_of(cls: type[Layer]) -> dict[str, inspect.Parameter]:
    """The inputs of a formula by name, without `self`."""
    own = list(inspect.signature(cls.__call__).parameters.items())[1:]
    return {name: p for name, p in own if p.kind is not p.KEYWORD_ONLY}


def _traced_call(layer: Layer, formula: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
    """The formula on traced arrays, recorded under the layer's path; or else one opaque step."""
    tape = traced.current_tape()
    path, original = tape.layers.get(id(layer), (tape.path, None))
    outer, mark, called = tape.path, len(tape.steps), len(tape.calls)
    tape.path = path
    values = tuple(map(traced.value_of, inputs))
    try:
        if original is not None:
            _check_types(original, inputs)
        result = formula(layer, *inputs)
        if not path and original is not None and traced.is_constant(result):
            raise Untraceable("it answers an array of its own, whatever it is given")
    except (Untraceable, UnsupportedFunction) as error:
        if original is None:
            raise
        del tape.steps[mark:], tape.calls[called:]
        alone = original._copy(dict(original._fields()))  # without its programs, which have it
        result = traced.opaque(alone, inputs, _opaque_outline(original, inputs), reason_of(error))
    except NnxpError:
        raise
    except (ValueError, IndexError, TypeError) as error:
        raise ShapeError(_misfit(original or layer, inputs, tape.rows, error)) from error
    finally:
        tape.path = outer
    tape.calls.append((path, values, result))
    return result


def reason_of(error: Exception) -> str:
    """What an error says, and the line of the formula in which it arose."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if os.path.dirname(_HERE) not in f.filename]
    if not own:
        return str(error)
    return f"{error}, in {os.path.basename(own[-1].filename)} line {own[-1].lineno}: {own[-1].line}"


_HERE = os.path.dirname(__file__)


def _misfit(layer: Layer, inputs: tuple[Any, ...], rows: int | None, error: Exception) -> str:
    """What a layer takes and what came instead, in words."""
    shapes = [tuple(rows if n == ROWS else n for n in getattr(x, "shape", ())) for x in inputs]
    came = ", ".join(str(shape).replace("None", "rows") for shape in shapes)
    row: Shape = ()
    with suppress(OptionError):
        row = layer.row_shape() if len(inputs) == 1 and rows is not None else ()
    if not row:
        return f"{layer} does not take {came}: {error}"
    fix, (size,), (shape,) = "", row, shapes
    if shape == row:
        fix = f"; x[None] makes it {(1, size)}"
    elif len(shape) == 2 and shape[0] == size:
        fix = f"; x.T makes it {shape[::-1]}"
    return f"{layer} takes (rows, {size}) but got {came}{fix}"


def _opaque_outline(layer: Layer, inputs: tuple[Any, ...]) -> list[Outline]:
    """What a layer answers that is run as Python: as its own `output_shape` says, or like x."""
    x = inputs[0]
    shape = x.shape
    if type(layer).output_shape is not Layer.output_shape:
        shape = layer.output_shape(*(x.shape for x in inputs))
    return [Outline(tuple(shape), layer.dtype or x.dtype)]


# what fits


def _check(layer: Layer, inputs: tuple[Any, ...]) -> None:
    """Raise ShapeError, DtypeMismatch or DeviceMismatch unless the layer can take the inputs."""
    place = layer.place
    for x in inputs:
        if x is None or isinstance(x, bool | int | float):
            continue
        at = place_of(x)
        if x.ndim == 0 and layer.by_rows:
            raise ShapeError(f"{layer} takes (rows, ...) but got a single number")
        if place is not None and at != place:
            raise DeviceMismatch(
                f"{layer} has its parameters on {place} but x is on {at}; "
                f"x = nnxp.to_backend(x, {place!r}) or model.to({at!r}) brings them together, "
                "and nnxp.predict(model, x) takes host rows wherever the model is"
            )
    _check_types(layer, inputs)
    if not layer.by_rows:
        return
    arrays = [x for x in inputs if is_array(x)]
    if not arrays:
        came = ", ".join(f"{x!r:.60}" for x in inputs) or "nothing"
        raise ShapeError(f"{layer} takes (rows, ...) but got {came}")
    row_count(layer, arrays)
    with suppress(Untraceable):  # then the formula itself says what fits
        program = layer.program(*map(outline_of, inputs))
        if len(arrays) == 1 and type(arrays[0]) is np.ndarray:
            layers = dict(layer.walk())
            for call in program.calls:  # what was asked of the children just now
                if len(call.inputs) == 1 and call.path in layers:
                    (value,) = call.inputs
                    if value.shape and value.shape[0] == ROWS:
                        seen = layers[call.path].__dict__.setdefault("_taken", set())
                        seen.add((value.dtype, sized(value.shape, 1)[1:]))


def _check_types(layer: Layer, inputs: tuple[Any, ...]) -> None:
    """Raise DtypeMismatch unless the inputs are of the types that the layer takes."""
    own = layer.dtype
    for i, x in enumerate(inputs):
        takes = layer.takes[i] if i < len(layer.takes) else "float"
        dtype = getattr(x, "dtype", None)
        if dtype is None or takes not in ("float", "int"):
            continue
        if takes == "int":
            if dtype.kind not in "iu":
                raise DtypeMismatch(f"{layer} takes whole numbers, but x is {dtype}")
        elif own is not None and dtype != own:
            raise DtypeMismatch(
                f"{layer} computes in {own} but x is {dtype}; x.astype({str(own)!r}) "
                "converts it, and nnxp.predict(model, x) takes rows of any numeric type"
            )
        elif not is_floating(dtype):
            raise DtypeMismatch(f"{layer} takes floats but x is {dtype}; x.astype('float32')")


def _hides(value: Any) -> bool:
    """Whether a list, tuple or dict hides arrays or layers: in it, or deeper than one level."""
    if isinstance(value, tuple):
        return any(_holds(item) for item in value if not isinstance(item, Layer))
    items = value.values() if isinstance(value, dict) else value
    return isinstance(value, dict | list) and any(map(_holds, items))


def _holds(item: Any) -> bool:
    """Whether it is an array or a layer, or a list or tuple with one."""
    if isinstance(item, list | tuple):
        return any(map(_holds, item))
    return isinstance(item, Layer) or is_array(item)


def array_shape(layer: Layer, name: str) -> Shape:
    """The shape of the array in this field; ShapeError if no array is there."""
    value = getattr(layer, name)
    who = f"{name} of {type(layer).__name__}"
    if not is_array(value):
        raise ShapeError(f"{who} is an array, not {value!r:.60}")
    if not is_floating(value.dtype):
        raise DtypeMismatch(
            f"{who} is {value.dtype}, but parameters are floats; {name}.astype('float32')"
        )
    shape: Shape = value.shape
    return shape


def check_weight(layer: Any, form: str, axes: Container[int]) -> None:
    """Raise ShapeError unless `weight` has so many axes, and `bias` the size of the last one."""
    weight = array_shape(layer, "weight")
    bias = None if layer.bias is None else array_shape(layer, "bias")
    if len(weight) not in axes or 0 in weight or bias not in (None, weight[-1:]):
        raise ShapeError(
            f"{type(layer).__name__} takes weight {form}, bias (outputs,); got {weight} and {bias}"
        )


def row_count(model: Layer, inputs: Sequence[Any]) -> int:
    """The rows of all inputs; ShapeError unless they are as many in each."""
    counts = [int(x.shape[0]) for x in inputs]
    if len(set(counts)) > 1:
        raise ShapeError(
            f"{model!r:.200} takes inputs of as many rows each, not {counts}; numpy.broadcast_to "
            "repeats what is one for all rows, such as a mask of (1, 1, time, time), and "
            "nnxp.Engine(model).whole(*inputs) takes inputs as they are"
        )
    return counts[0]


def check_model(model: Any, who: str) -> None:
    """Raise OptionError for what is no model of nnxp's, and say how it may become one."""
    if not isinstance(model, Layer):
        raise OptionError(
            f"{who} takes a model made of nnxp layers, not {model!r:.60}{way_to_model(model)}"
        )


def way_to_model(x: Any) -> str:
    """How what is no model becomes one, as the end of a message."""
    if isinstance(x, str | os.PathLike):
        return "; nnxp.load, or nnxp.load_onnx, reads one from a file"
    makes = {
        "model": "its .model is one",
        "state_dict": "nnxp.from_torch makes one of a torch module",
        "get_params": "nnxp.from_sklearn makes one of a fitted estimator",
    }
    return next((f"; {way}" for name, way in makes.items() if hasattr(x, name)), "")


def whole(what: str, value: Any, least: int = 1) -> int:
    """A whole number of at least so much, as an int; OptionError for anything else."""
    with suppress(TypeError):
        if not isinstance(value, bool) and operator.index(value) >= least:
            return operator.index(value)
    raise OptionError(f"{what} is a whole number, at least {least}, not {value!r:.60}")


def is_number(value: Any) -> bool:
    """Whether an option is a number, which may be infinite; NaN and truth values are none."""
    numbers = int | float | np.integer | np.floating
    return isinstance(value, numbers) and not isinstance(value, bool) and value == value


def is_real(value: Any) -> bool:
    """Whether an option is a finite number; truth values are none."""
    return is_number(value) and isfinite(value)


def generator(rng: Rng) -> np.random.Generator:
    """The Generator for a seed, a Generator or None; OptionError for what is none of them."""
    try:
        return np.random.default_rng(rng)
    except (TypeError, ValueError):
        raise OptionError(
            f"rng is a seed (a whole number, 0 or more), a numpy.random.Generator or None, "
            f"not {rng!r:.60}"
        ) from None


def zero_bias(who: str, bias: Any, outputs: int, dtype: np.dtype[Any]) -> Array | None:
    """Zeros, None for bias=False; OptionError for what is neither True nor False."""
    if not isinstance(bias, bool | np.bool_):
        raise OptionError(
            f"bias of {who} is True or False, not {bias!r:.60}; {who}.of(weight, bias) takes arrays"
        )
    return np.zeros(outputs, dtype) if bias else None


def uniform(shape: Shape, limit: float, rng: Rng, dtype: np.dtype[Any]) -> Array:
    """Numbers drawn uniformly from ±limit."""
    drawn = np.float64 if dtype == np.float64 else np.float32
    values = generator(rng).random(shape, dtype=drawn)
    values *= 2 * limit
    values -= limit
    return values.astype(dtype, copy=False)
