"""A module of PyTorch as a layer: the steps of its `forward`, layers and functions of torch's.

The steps are plain values, so that a file holds them: (what, arguments, options), where what is
"layers.3" or the name of a function in `torch_functions`, and {"value": 5} among the arguments
stands for value 5: the inputs come first, then what each step answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from nnxp._arrays import Array, is_array, xp_of
from nnxp._errors import OptionError
from nnxp.layers import torch_space  # noqa: F401  (whose functions are in the table, too)
from nnxp.layers._layer import Example, Layer, array_shape
from nnxp.layers.dense import Dense
from nnxp.layers.norm import BatchNorm
from nnxp.layers.shape import channels_last
from nnxp.layers.torch_functions import FUNCTIONS, MAKERS, library_of


class ChannelsFirst(Layer):
    """y = inner(x), for x that has its channels on axis 1, as torch and ONNX do.

    x (rows, channels, ...) -> y (rows, channels', ...). `inner` gets and answers them last. Both
    ways are views: nothing is copied.
    """

    inner: Layer

    def __call__(self, x: Array) -> Array:
        return channels_last(self.inner, x)

    def __repr__(self) -> str:
        return f"ChannelsFirst({self.inner!r})"

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield cls(Dense(3, 5, rng=0)), (2, 3, 4)
        yield cls(BatchNorm(3)), (4, 3)


class Constant(Layer):
    """y = value, for every row.

    x (rows, ...) -> y (rows, *value.shape). With a `kind`, "int64" or "bool", the values are that,
    and stay so whatever the model's type: they are kept in float64, exact for numbers to 2^53.
    Training leaves it as it is unless it `learns`.
    """

    value: Array
    kind: str = ""
    learns: bool = True

    def __init__(self, value: Array, *, learns: bool = True) -> None:
        value = np.asarray(value)
        self.kind = (
            "" if value.dtype.kind in "fV" else "bool" if value.dtype.kind == "b" else "int64"
        )
        self.value = value if self.kind == "" else value.astype("float64")
        self.learns = learns

    @property
    def fixed(self) -> tuple[str, ...]:  # type: ignore[override]
        return () if self.learns else ("value",)

    @property
    def wide(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("value",) if self.kind else ()

    def validate(self) -> None:
        array_shape(self, "value")
        if self.kind not in ("", "int64", "bool"):
            raise OptionError(f'kind of a Constant is "int64", "bool" or "", not {self.kind!r:.60}')

    def values(self) -> Array:
        """What it holds, in the type that it is of."""
        return self.value.astype(self.kind) if self.kind else self.value

    def __call__(self, x: Array) -> Array:
        return xp_of(x).broadcast_to(self.values(), (x.shape[0], *self.value.shape))

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield cls(np.arange(6, dtype="float32").reshape(2, 3)), (4, 5)


class TorchGraph(Layer):
    """What `nnxp.from_torch` makes of a module whose `forward` is more than layers in a row.

    Takes what `forward` takes, in torch's layout, and answers an array or a tuple. `kinds` says
    what each input is, as `takes` does, `names` what it is called; `answers` are values by number.

        net = nnxp.from_torch(module)
        y = net(x)                              # or a tuple, where `forward` answers several
    """

    layers: tuple[Layer, ...]
    steps: tuple[Any, ...]
    answers: tuple[Any, ...]
    kinds: tuple[str, ...]
    names: tuple[str, ...]

    def __init__(self, *_: Any, **__: Any) -> None:
        raise OptionError(
            "a TorchGraph is made by nnxp.from_torch(module), and comes back by nnxp.load(...)"
        )

    @property
    def takes(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.kinds

    @property
    def input_names(self) -> tuple[str, ...]:
        """The names of the inputs, as `forward` has them."""
        return self.names

    @property
    def required_inputs(self) -> int:
        """How many inputs there are at least: all of them."""
        return len(self.names)

    def validate(self) -> None:
        count = len(self.kinds)
        if len(self.names) != count:
            raise OptionError(
                f"a TorchGraph has a name and a kind for each input: {self.names!r:.100}"
            )
        for step in self.steps:
            fits = type(step) is tuple and len(step) == 3 and isinstance(step[0], str)
            fits = fits and type(step[2]) is dict and all(isinstance(name, str) for name in step[2])
            arguments = (step[1], *step[2].values()) if fits else ()
            if not fits or not _is_known(step[0], self.layers) or not _is_sound(arguments, count):
                raise OptionError(f"a step of a TorchGraph has no meaning: {step!r:.100}")
            count += 1
        if not self.answers or not _is_sound(self.answers, count):
            raise OptionError(
                f"the answers of a TorchGraph are values of it: {self.answers!r:.100}"
            )

    def __call__(self, *inputs: Array) -> Any:
        values: list[Any] = list(inputs)
        xp = library_of(inputs)
        for what, arguments, options in self.steps:
            arrays = [_argument(x, values) for x in arguments]
            named = {name: _argument(x, values) for name, x in options.items()}
            kind, _, number = what.partition(".")
            if kind == "layers":
                values.append(self.layers[int(number)](*arrays, **named))
            elif kind == "constant":
                constant: Any = self.layers[int(number)]
                values.append(constant.values())
            elif kind in MAKERS:
                values.append(MAKERS[kind](xp, *arrays, **named))
            else:
                value = FUNCTIONS[kind](*arrays, **named)
                values.append(np.asarray(value) if isinstance(value, np.generic) else value)
        answers: list[Any] = []
        for x in self.answers:
            answer = _argument(x, values)  # of a step such as `split`, several
            answers.extend(answer if isinstance(answer, tuple) else [answer])
        answers = [xp.asarray(y) if not is_array(y) else y for y in answers]
        return tuple(answers) if len(answers) > 1 else answers[0]

    def __repr__(self) -> str:
        return f"TorchGraph({len(self.steps)} steps, {len(self.layers)} layers)"

    @classmethod
    def examples(cls) -> Iterator[Example]:
        x, h = {"value": 0}, {"value": 1}
        steps: tuple[Any, ...] = (
            ("layers.0", (x,), {}),
            ("relu", (h,), {}),
            (
                "getitem",
                ({"value": 2}, ({"slice": (None, None, None)}, {"slice": (0, 2, None)})),
                {},
            ),
            ("cat", (({"value": 3}, x), 1), {}),
        )
        yield cls.of((Dense(3, 4, rng=0),), steps, ({"value": 4},), ("float",), ("x",)), (5, 3)


def encoded(x: Any) -> Any:
    """A plain argument as a file holds it."""
    if isinstance(x, slice):
        return {"slice": tuple(encoded(bound) for bound in (x.start, x.stop, x.step))}
    if x is Ellipsis:
        return {"ellipsis": True}
    if isinstance(x, float) and not np.isfinite(x):
        return {"float": str(x)}
    if isinstance(x, tuple | list):
        return tuple(map(encoded, x))
    return x


def _argument(x: Any, values: list[Any]) -> Any:
    """What an argument stands for."""
    if type(x) is tuple:
        return tuple(_argument(item, values) for item in x)
    if type(x) is dict:
        ((kind, what),) = x.items()
        if kind == "value":
            return values[what]
        if kind == "slice":
            return slice(*(_argument(bound, values) for bound in what))
        return Ellipsis if kind == "ellipsis" else float(what)
    return x


def _is_known(what: str, layers: tuple[Layer, ...]) -> bool:
    kind, _, number = what.partition(".")
    if kind in ("layers", "constant"):
        known = number.isdecimal() and int(number) < len(layers)
        return known and (kind == "layers" or isinstance(layers[int(number)], Constant))
    return what in FUNCTIONS or what in MAKERS


def _is_sound(x: Any, count: int) -> bool:
    """Whether the arguments look at nothing but the first `count` values."""
    if type(x) is tuple:
        return all(_is_sound(item, count) for item in x)
    if type(x) is not dict:
        return True
    if "value" in x:
        return len(x) == 1 and type(x["value"]) is int and 0 <= x["value"] < count
    if len(x) == 1 and {"slice", "ellipsis", "float"} & x.keys():
        return _is_sound(x.get("slice", ()), count)
    return all(isinstance(name, str) and _is_sound(item, count) for name, item in x.items())
