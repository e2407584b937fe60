"""Layers of a user's own: what their classes may do in `__init__`, and what they are told."""

from __future__ import annotations

from dataclasses import field
from typing import NamedTuple

import numpy as np
import pytest

import nnxp
from nnxp import Dense, Layer, OptionError, ShapeError
from nnxp.testing import assert_parity

X = np.linspace(-1, 1, 12, dtype="float32").reshape(4, 3)


@pytest.fixture(autouse=True)
def _no_layer_stays_known():
    known = dict(Layer.known)
    yield
    Layer.known.clear()
    Layer.known.update(known)


class Mixin:
    def twice(self, x):
        return 2 * x


class Assigned(Layer):
    factor: np.ndarray

    def __init__(self, size=3):
        self.factor = np.full(size, 2, "float32")

    def __call__(self, x):
        return x * self.factor


class SuperFirst(Assigned):
    shift: np.ndarray

    def __init__(self):
        super().__init__(3)
        self.shift = np.zeros(3, "float32")

    def __call__(self, x):
        return super().__call__(x) + self.shift


class SuperLast(Assigned):
    shift: np.ndarray

    def __init__(self):
        self.shift = np.zeros(3, "float32")
        super().__init__(3)

    def __call__(self, x):
        return x * self.factor + self.shift


class InPlace(Layer):
    factor: np.ndarray

    def __init__(self):
        self.factor = np.zeros(3, "float32")
        self.factor += 1
        self.factor *= 2

    def __call__(self, x):
        return x * self.factor


class Property(Layer):
    half: np.ndarray

    def __init__(self):
        self.half = np.ones(3, "float32")

    @property
    def factor(self):
        return 2 * self.half

    def __call__(self, x):
        return x * self.factor


class Setter(Layer):
    held: np.ndarray

    def __init__(self):
        self.factor = np.full(3, 2, "float32")

    @property
    def factor(self):
        return self.held

    @factor.setter
    def factor(self, value):
        self.held = value

    def __call__(self, x):
        return x * self.factor


class Constant(Layer):
    FACTOR = 2.0

    def __call__(self, x):
        return x * self.FACTOR


class Defaults(Layer):
    power: int = 1
    names: tuple = field(default_factory=tuple)
    factor: np.ndarray = None

    def __init__(self):
        self.factor = np.full(3, 2, "float32")

    def __call__(self, x):
        return x * self.factor**self.power


class Before(Mixin, Layer):
    one: np.ndarray

    def __init__(self):
        self.one = np.ones(3, "float32")

    def __call__(self, x):
        return self.twice(x) * self.one


class After(Layer, Mixin):
    one: np.ndarray

    def __init__(self):
        self.one = np.ones(3, "float32")

    def __call__(self, x):
        return self.twice(x) * self.one


class Left(Layer):
    left: np.ndarray

    def __init__(self):
        super().__init__()
        self.left = np.ones(3, "float32")

    def __call__(self, x):
        return x * self.left


class Right(Layer):
    right: np.ndarray

    def __init__(self):
        super().__init__()
        self.right = np.ones(3, "float32")

    def __call__(self, x):
        return x * self.right


class Both(Left, Right):
    def __call__(self, x):
        return Left.__call__(self, x) + Right.__call__(self, x)


class AsksItsChild(Layer):
    inner: Layer
    factor: np.ndarray

    def __init__(self):
        self.inner = Dense(3, 3, rng=0)
        size = self.inner(np.ones((1, 3), "float32")).shape[1]
        self.factor = np.full(size, 2, "float32")

    def __call__(self, x):
        return x * self.factor


KINDS = [
    Assigned, SuperFirst, SuperLast, InPlace, Property, Setter, Constant, Defaults, Before, After,
    Both, AsksItsChild,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_fields_that_init_assigns_are_parameters_everywhere(kind, tmp_path, monkeypatch):
    monkeypatch.setitem(Layer.known, kind.__name__, kind)
    layer = kind()
    assert np.array_equal(layer(X), 2 * X)
    assert_parity(layer, X)
    there = layer.to("sim")(nnxp.to_backend(X, "sim"))
    assert np.array_equal(nnxp.asnumpy(there), 2 * X)
    nnxp.save(layer, tmp_path / "net")
    loaded = nnxp.load(tmp_path / "net")
    assert loaded.parameters().keys() == layer.parameters().keys()
    assert np.array_equal(nnxp.predict(loaded, X, "numpy"), 2 * X)


def test_inherited_fields_are_parameters_and_properties_and_constants_are_not():
    assert set(SuperLast().parameters()) == {"factor", "shift"}
    assert set(Both().parameters()) == {"left", "right"}
    assert set(Property().parameters()) == {"half"}
    assert not Constant().parameters()
    assert (Defaults().power, Defaults().names) == (1, ())


def refused(words, error=OptionError):
    return pytest.raises(error, match=words)


def test_a_field_that_nobody_declared_is_refused_by_name():
    class Mine(Layer):
        def __init__(self):
            self.weight = np.ones(3)

        def __call__(self, x):
            return x * self.weight

    with refused(r"Mine.weight is assigned.*write `weight: ndarray` in the class"):
        Mine()


def test_a_field_that_nobody_assigned_is_refused_by_name():
    class Forgetful(Assigned):
        shift: np.ndarray

        def __init__(self):  # without super().__init__()
            self.shift = np.ones(3, "float32")

    with refused("Forgetful has no factor, which __init__ assigns"):
        Forgetful()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_assigned_once_a_layer_is_made(kind):
    for name in ("factor", "FACTOR", "another"):
        with refused(f"{name} of .* cannot be assigned: a layer is fixed once it is made"):
            setattr(kind(), name, 3)


def test_a_formula_that_assigns_is_refused():
    class Counting(Layer):
        count: int = 0

        def __call__(self, x):
            self.count += 1
            return x

    with refused("count of .* cannot be assigned"):
        Counting()(X)


def test_a_property_without_a_setter_is_not_assigned():
    class Mine(Property):
        def __init__(self):
            super().__init__()
            self.factor = 3

    with refused("Mine.factor is assigned: property 'factor'.* has no setter"):
        Mine()


def test_a_field_is_no_property():
    with refused("factor of Mine is a field, and a property"):

        class Mine(Layer):
            factor: np.ndarray

            @property
            def factor(self):
                return 3


def test_a_default_that_may_change_is_refused_with_what_to_do():
    with refused("fields of Mine: mutable default .*ndarray.* use default_factory"):

        class Mine(Layer):
            factor: np.ndarray = np.ones(3)


def test_a_list_of_layers_is_refused():
    class Mine(Layer):
        layers: tuple

        def __init__(self):
            self.layers = [Dense(3, 3)]

        def __call__(self, x):
            return x

    with refused("a field is an array, a layer, or a tuple of layers"):
        Mine()


class Seen(Layer):
    """Notes whether numbers have come to it."""

    numbers = 0

    def __call__(self, x):
        Seen.numbers += type(x) is np.ndarray
        return x


class Mismatched(Layer):
    seen: Layer
    first: Layer
    second: Layer

    def __init__(self):
        self.seen = Seen()
        self.first, self.second = Dense(3, 4, rng=0), Dense(5, 6, rng=0)

    def __call__(self, x):
        return self.second(self.first(self.seen(x)))


@pytest.mark.parametrize(
    ("path", "call"),
    [
        ("second", lambda: Mismatched()(X)),
        ("second", lambda: nnxp.predict(Mismatched(), X, "numpy")),
        ("second", lambda: Mismatched().summary((4, 3))),
        ("layers.1.second", lambda: nnxp.Sequential(Dense(2, 3), Mismatched())(X[:, :2])),
        ("inner.second", lambda: nnxp.Residual(Mismatched())(X)),
    ],
)
def test_a_container_of_layers_that_do_not_fit_fails_before_any_work_and_names_the_layer(
    path, call
):
    Seen.numbers = 0
    with pytest.raises(ShapeError) as raised:
        call()
    assert str(raised.value).startswith(f"{path} Dense(5, 6, identity) takes (rows, 5) but got")
    assert Seen.numbers == 0


def test_a_formula_that_answers_nothing_is_refused():
    class Nothing(nnxp.Layer):
        def __call__(self, x):
            return ()

    engine = nnxp.Engine(Nothing(), "numpy")
    for call in (engine, engine.whole):
        with pytest.raises(nnxp.ShapeError, match="answers arrays, not"):
            call(np.ones((3, 4), "float32"))


class Window(NamedTuple):
    low: float
    high: float


class Clips(Layer):
    shift: np.ndarray
    window: Window

    def __init__(self):
        self.shift, self.window = np.zeros(3, "float32"), Window(-0.5, 0.5)

    def __call__(self, x):
        return (x + self.shift).clip(self.window.low, self.window.high)


def test_a_named_tuple_stays_one_wherever_the_model_goes():
    layer = Clips()
    for other in (layer.astype("float64"), layer.with_parameters(layer.parameters())):
        assert other.window is layer.window
    np.testing.assert_array_equal(layer.astype("float64")(X.astype("float64")), X.clip(-0.5, 0.5))
    assert layer.training() is layer


class Misspelt(nnxp.Layer):
    def __call__(self, x):
        return nnxp.kernels.conv(x, np.ones((3, 4, 1), x.dtype), strides=2)


def test_a_misspelt_option_of_a_kernel_is_named_with_the_kernel():
    x = np.ones((6, 9, 4), "float32")
    for run in (Misspelt(), nnxp.Engine(Misspelt(), "cpu")):
        with pytest.raises(
            (TypeError, nnxp.ShapeError), match=r"conv\(\) got an unexpected.*strides"
        ):
            run(x)
