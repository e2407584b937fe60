"""Questions asked of every example of every layer: a new layer is asked them without more ado."""

from __future__ import annotations

import numpy as np
import pytest

import nnxp
from conftest import (
    LAYERS,
    draw,
    draw_inputs,
    every_backend,
    every_dtype,
    every_layer,
    every_swept_layer,
    results,
)
from nnxp import kernels
from nnxp._arrays import place_of
from nnxp.layers.activation import ALIASES, named
from nnxp.testing import assert_parity, bounded, error_bound
from nnxp.testing.parity import compare


def rows_for(layer, shape, dtype="float32"):
    return draw(shape, layer.dtype or dtype)


def on(backend, inputs):
    return tuple(None if x is None else backend.put(x) for x in inputs)


@every_layer
@every_backend
@every_dtype
def test_every_layer_and_all_its_results_are_as_float64_has_them(layer, shape, backend, dtype):
    layer = layer.astype(dtype)
    inputs = draw_inputs(layer, shape, dtype)
    with backend.current():
        answers = results(layer.to(backend)(*on(backend, inputs)))
    lifted = layer.map_arrays(lambda name, value: bounded.asarray(value))
    for i, answer in enumerate(answers):
        value, bound = error_bound(lambda *xs, i=i: results(lifted(*xs))[i], *inputs)
        y = backend.get(answer)
        check = compare("layer", "", backend.device, y, value, bound)
        assert check.ok, check.problem
        assert y.dtype == inputs[0].dtype or inputs[0].dtype.kind in "iu"


@every_swept_layer
@every_backend
@every_dtype
def test_every_layer_agrees_with_float64_on_every_backend(layer, shape, backend, dtype):
    layer = layer.astype(dtype)
    assert_parity(layer, rows_for(layer, shape, dtype), backends=[backend])


def with_value(x, value):
    x = x.copy()
    x.reshape(len(x), -1)[1, 0] = value
    return x


def frozen(x):
    x = x.copy()
    x.flags.writeable = False
    return x


ROWS = {  # how rows may lie and what may be in them: made on the host, looked at where they are
    "contiguous": (lambda x: x, lambda x: x),
    "every second row": (lambda x: np.repeat(x, 2, axis=0), lambda x: x[::2]),
    "every second column": (lambda x: np.repeat(x, 2, axis=-1), lambda x: x[..., ::2]),
    "columns first": (lambda x: x.swapaxes(0, -1).copy(), lambda x: x.swapaxes(0, -1)),
    "read-only": (frozen, lambda x: x),
    "none": (lambda x: x[:0], lambda x: x),
    "one": (lambda x: x[:1], lambda x: x),
    "with NaN": (lambda x: with_value(x, np.nan), lambda x: x),
    "with infinity": (lambda x: with_value(x, np.inf), lambda x: x),
    "with minus infinity": (lambda x: with_value(x, -np.inf), lambda x: x),
}


@every_swept_layer
@every_backend
@every_dtype
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # infinity minus infinity
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_every_layer_and_the_engine_take_rows_however_they_lie(layer, shape, backend, dtype):
    layer = layer.astype(dtype)
    engine = nnxp.Engine(layer, backend)
    drawn = rows_for(layer, (10, *shape[1:]), dtype)
    limit = engine.plan((3, *shape[1:])).working_set  # so that of 10 rows the last block is ragged
    if layer.dtype is None:  # it is planned for float32, and 16 bits, widened on the way, take more
        limit = max(limit, 9 * drawn[0].size * 4)
    ragged = nnxp.Engine(layer, backend, memory_limit=limit, workers=1)
    there = layer.to(backend)
    wrong = []
    for name, (made, seen) in ROWS.items():
        host = made(drawn)
        kept, device = host.copy(), backend.put(host)
        x = seen(host)
        value, bound = error_bound(layer, x)
        with backend.current():
            answers = {"layer": backend.get(there(seen(device)))}
        answers |= {"engine": engine(x), "blocks": ragged(x), "again": engine(x)}
        for way, y in answers.items():
            check = compare(name, way, backend.device, y, value, bound)
            if name == "none":
                assert y.shape == value.shape
            elif not check.ok:
                wrong.append((name, way, check.problem))
        for after in (host, backend.get(device)):
            assert after.tobytes() == kept.tobytes(), f"{name}: the rows were changed"
    assert wrong == []


@every_layer
@every_dtype
def test_every_layer_answers_in_the_shape_it_promised_and_the_type_it_was_given(
    layer, shape, dtype
):
    layer = layer.astype(dtype)
    shapes = shape if isinstance(shape, list) else [shape]
    answers = results(layer(*draw_inputs(layer, shape, dtype)))
    promised = layer.output_shape(*shapes)
    assert [y.shape for y in answers] == (
        list(promised) if type(promised[0]) is tuple else [promised]
    )
    assert {y.dtype for y in answers} == {layer.dtype or nnxp._arrays.float_dtype(dtype)}


@every_layer
def test_every_layer_treats_rows_on_their_own(layer, shape):
    inputs = draw_inputs(layer, shape)
    together = results(layer(*inputs))
    for i in range(len(inputs[0])):
        alone = layer(*(None if x is None else x[i : i + 1] for x in inputs))
        for one, all_of_them in zip(results(alone), together, strict=True):
            np.testing.assert_allclose(one[0], all_of_them[i], rtol=1e-5, atol=1e-6)


@every_layer
@pytest.mark.parametrize("rows", [0, 1])
def test_every_layer_answers_for_no_rows_and_one_row(layer, shape, rows):
    inputs = draw_inputs(layer, shape, rows=rows)
    answers = results(layer(*inputs))
    full = results(layer(*draw_inputs(layer, shape)))
    assert [y.shape for y in answers] == [(rows, *y.shape[1:]) for y in full]


@every_swept_layer
@pytest.mark.parametrize("rows", [0, 1])
def test_every_layer_takes_no_rows_and_one_row(layer, shape, rows):
    x = rows_for(layer, (rows, *shape[1:]))
    assert layer(x).shape == layer.output_shape(x.shape)
    assert nnxp.predict(layer, x, "numpy").shape == layer.output_shape(x.shape)


@every_swept_layer
@every_backend
def test_the_engine_gives_what_the_layer_gives(layer, shape, backend):
    x = rows_for(layer, (300, *shape[1:]))
    target = nnxp.get_backend(backend)
    direct = target.get(layer.to(target)(target.put(x)))
    swept = nnxp.predict(layer, x, target)
    # The same products in blocks of another height may round differently in the last places.
    np.testing.assert_allclose(swept, direct, rtol=1e-5, atol=1e-6)
    assert swept.dtype == direct.dtype


@every_layer
def test_no_layer_changes_its_input_or_needs_it_writable_or_contiguous(layer, shape):
    inputs = draw_inputs(layer, shape)
    expected = results(layer(*inputs))
    strided = [None if x is None else np.repeat(x, 2, axis=0)[::2] for x in inputs]
    for x in strided:
        if x is not None:
            x.flags.writeable = False
    for y, due in zip(results(layer(*strided)), expected, strict=True):
        np.testing.assert_allclose(y, due, rtol=1e-6, atol=1e-6)
    for after, before in zip(strided, draw_inputs(layer, shape), strict=True):
        np.testing.assert_array_equal(after, before)


@every_layer
def test_mixing_host_and_device_says_how_to_mend_it(layer, shape, sim):
    inputs, other = draw_inputs(layer, shape), nnxp.get_backend("sim:1")
    if not layer.parameters():  # in no place: it takes x wherever it is
        assert layer(*on(nnxp.get_backend("sim"), inputs)).device is sim
        return
    with pytest.raises(nnxp.DeviceMismatch, match=r"sim:0.*cpu.*\.to\("):
        layer.to("sim")(*inputs)
    with pytest.raises(nnxp.DeviceMismatch, match=r"sim:0.*sim:1"):
        layer.to("sim:0")(*on(other, inputs))


@every_layer
def test_nothing_leaves_the_device_inside_a_layer(layer, shape, sim):
    there = layer.to("sim")
    inputs = on(nnxp.get_backend("sim"), draw_inputs(layer, shape))
    sim.reset()
    there(*inputs)
    assert sim.count == nnxp.sim.Count()


@every_layer
def test_every_layer_works_on_a_device_that_is_not_the_current_one(layer, shape):
    inputs = draw_inputs(layer, shape)
    answers = results(layer.to("sim:1")(*on(nnxp.get_backend("sim:1"), inputs)))
    assert nnxp.sim.Device.current().id == 0
    for y, due in zip(answers, results(layer(*inputs)), strict=True):
        assert place_of(y) == "sim:1"
        np.testing.assert_allclose(nnxp.asnumpy(y), due, rtol=1e-6, atol=1e-6)


@every_layer
def test_parameters_go_out_and_come_back(layer, shape):
    again = layer.with_parameters(layer.parameters())
    inputs = draw_inputs(layer, shape)
    for y, due in zip(results(again(*inputs)), results(layer(*inputs)), strict=True):
        np.testing.assert_array_equal(y, due)
    assert repr(again) == repr(layer)
    assert layer.parameter_count == sum(v.size for v in layer.parameters().values())


@every_layer
def test_a_moved_model_is_moved_whole_and_comes_back_the_same(layer, shape):
    there = layer.to("sim:1")
    assert {nnxp._arrays.place_of(v) for v in there.parameters().values()} <= {"sim:1"}
    back = there.to("cpu")
    for name, value in layer.parameters().items():
        np.testing.assert_array_equal(back.parameters()[name], value)


@every_layer
def test_the_summary_of_every_layer_counts_its_parameters(layer, shape):
    shapes = shape if isinstance(shape, list) else [shape]
    summary = layer.summary(*shapes)
    assert summary.parameters == layer.parameter_count
    assert sum(each.parameters for each in summary.layers) == layer.parameter_count
    assert summary.output_shape == layer.output_shape(*shapes)
    assert str(summary)


@every_layer
def test_the_last_activation_is_the_output(layer, shape):
    inputs = draw_inputs(layer, shape)
    name, last = list(layer.activations(*inputs).items())[-1]
    assert name == "output"
    for y, due in zip(results(last), results(layer(*inputs)), strict=True):
        np.testing.assert_array_equal(y, due)


@every_layer
def test_layers_are_frozen(layer, shape):
    with pytest.raises(AttributeError):
        layer.anything = 1
    for name in vars(layer):
        with pytest.raises(AttributeError):
            setattr(layer, name, None)


def test_every_layer_has_examples():
    assert len(LAYERS) >= 10
    for kind in LAYERS:
        assert list(kind.examples()), kind


def test_a_layer_that_hides_arrays_or_layers_is_refused_when_it_is_made():
    class Hides(nnxp.Layer):
        """y = x"""

        parts: tuple

        def __call__(self, x):
            return x

    for parts in ((np.ones(2), 1), ((nnxp.Flatten(),),), [nnxp.Flatten()]):
        with pytest.raises(nnxp.OptionError, match="where nobody finds them"):
            Hides(parts)
    assert Hides((nnxp.Flatten(), nnxp.Flatten())).parts
    with pytest.raises(nnxp.OptionError, match="cannot be called dtype, output"):

        class Shadows(nnxp.Layer):
            """Has fields that every layer has."""

            dtype: str
            output: nnxp.Dense


def test_a_class_without_fields_of_its_own_is_made_as_its_base_is():
    class Mine(nnxp.Dense):
        """A Dense by another name."""

    class Picky(nnxp.Layer):
        """Takes sizes above zero."""

        size: int

        def __call__(self, x):
            return x

        def validate(self):
            if self.size < 1:
                raise nnxp.OptionError("size")

    assert Mine(3, 2, "relu", rng=0)(np.ones((4, 3), "float32")).shape == (4, 2)
    with pytest.raises(nnxp.OptionError):
        Picky(0)


def test_mixtures_are_mended_by_what_the_error_says():
    mixed = nnxp.Sequential(nnxp.Dense(3, 3, rng=0), nnxp.Dense(3, 3, rng=1, dtype="float64"))
    with pytest.raises(nnxp.DtypeMismatch, match=r"astype"):
        mixed(np.ones((2, 3), "float32"))
    assert mixed.astype("float32").dtype == np.float32
    apart = nnxp.Sequential(nnxp.Dense(3, 3, rng=0), nnxp.Dense(3, 3, rng=1).to("sim"))
    with pytest.raises(nnxp.DeviceMismatch, match=r"\.to\("):
        apart(np.ones((2, 3), "float32"))
    assert apart.to("sim:1").place == "sim:1"


def test_children_that_output_shape_does_not_ask_are_counted_all_the_same():
    class Twice(nnxp.Layer):
        """y = down(up(x))"""

        up: nnxp.Dense
        down: nnxp.Dense

        def __call__(self, x):
            return self.down(self.up(x))

    net = Twice(nnxp.Dense(4, 4000, rng=0), nnxp.Dense(4000, 4, rng=1))
    summary = net.summary((1, 4))
    assert summary.row_bytes >= 4000 * 4
    assert summary.parameters == 4 * 4000 + 4000 + 4 * 4000 + 4


def test_softmax_needs_an_axis_of_classes():
    for shape in ((5,), (5, 0)):
        with pytest.raises(nnxp.ShapeError, match="classes"):
            nnxp.Activation("softmax")(np.ones(shape, "float32"))


@pytest.mark.parametrize(
    "x", [np.ones((1, 1)).view(np.matrix), np.ma.masked_array([[1.0]], mask=[[True]])]
)
def test_subclasses_that_compute_otherwise_are_no_arrays(x):
    with pytest.raises(nnxp.DtypeMismatch, match="not an array that nnxp knows"):
        nnxp.Activation("relu")(x)


@every_layer
def test_parameters_of_another_byte_order_become_the_machine_s_own(layer, shape):
    turned = {
        name: value.astype(value.dtype.newbyteorder()) for name, value in layer.parameters().items()
    }
    other = layer.with_parameters(turned)
    assert all(value.dtype.isnative for value in other.parameters().values())
    inputs = draw_inputs(layer, shape)
    for y, due in zip(results(other(*inputs)), results(layer(*inputs)), strict=True):
        np.testing.assert_array_equal(y, due)
    if len(inputs) == 1 and inputs[0].dtype.kind == "f":  # the engine takes one array of floats
        x = inputs[0]
        np.testing.assert_array_equal(nnxp.predict(other, x, "cpu"), nnxp.predict(layer, x, "cpu"))


def test_parameters_that_are_no_arrays_are_refused_by_what_they_are():
    net = nnxp.Dense(2, 3, rng=0)
    for given in ([[1.0] * 3] * 2, np.ma.ones((2, 3), "float32"), None):
        kind = type(given).__qualname__
        with pytest.raises(nnxp.DtypeMismatch, match=f"not .*{kind}"):
            net.with_parameters(net.parameters() | {"weight": given})


@every_swept_layer
@pytest.mark.parametrize("size", [1.0, 100.0])
def test_results_too_small_for_their_type_raise_nothing(layer, shape, size):
    x = rows_for(layer, shape) * np.float32(size)
    expected = layer(x)
    engine = nnxp.Engine(layer, "cpu")
    with np.errstate(under="raise"):
        plain, first, second = layer(x), engine(x), engine(x)  # the second takes the short way
    np.testing.assert_array_equal(plain, expected)
    np.testing.assert_array_equal(first, second)
    check = compare("", "", "cpu", first, *error_bound(layer, x))  # in another order of sums
    assert check.ok, check.problem


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("ReLU", "relu"),
        ("swish", "silu"),
        ("linear", "identity"),
        ("Tanh", "tanh"),
        ("logsigmoid", "log_sigmoid"),
        ("hardtanh", "hard_tanh"),
        ("LeakyReLU", "leaky_relu"),
        ("hard-swish", "hard_swish"),
        ("GELU tanh", "gelu_tanh"),
        ("logistic", "sigmoid"),
    ],
)
def test_an_activation_is_found_in_any_spelling_and_kept_by_its_own_name(name, canonical):
    assert nnxp.Activation(name).activation == canonical
    assert nnxp.Dense(2, 3, name, rng=0).activation == canonical
    assert nnxp.Activation.of(name, {}).activation == canonical


def test_every_alias_leads_to_an_activation_and_hides_none():
    for alias, name in ALIASES.items():
        assert named(alias).__name__ == name
    for name in kernels.ACTIVATIONS:
        for spelling in (name, name.upper(), name.replace("_", "-"), name.replace("_", "")):
            assert named(spelling).__name__ == name


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (
            lambda: nnxp.Dense(2, 3, "rellu"),
            r"no activation 'rellu'; did you mean relu .*names are",
        ),
        (lambda: nnxp.Activation("hardsigmod"), "did you mean hard_sigmoid"),
        (lambda: nnxp.Activation("xyzzy"), r"no activation 'xyzzy'\. The names are celu"),
        (lambda: nnxp.Activation(None), "no activation None"),
        (lambda: nnxp.Activation("PReLU"), r"a layer of its own: nnxp\.PReLU"),
        (lambda: nnxp.Activation("elu", alpha="a"), "alpha of elu is a number, not 'a'"),
        (lambda: nnxp.Activation("elu", slope=1.0), "elu has the options alpha, not slope"),
        (lambda: nnxp.Activation("celu", alpha=0), "alpha of celu is a number above 0, not 0"),
        (lambda: nnxp.Activation("soft_shrink", lambd=-1), "lambd of soft_shrink .* at least 0"),
        (lambda: nnxp.Activation("hard_tanh", min_val=2), "from min_val to max_val, not 2 to 1"),
        (lambda: nnxp.PReLU(slope="a"), "PReLU's slope is a number, not 'a'"),
    ],
)
def test_a_wrong_activation_is_answered_with_what_would_be_right(wrong, words):
    with pytest.raises(nnxp.OptionError, match=words):
        wrong()


def test_prelu_has_a_slope_for_each_channel_or_one_for_all():
    x = np.array([[-2.0, 4.0], [3.0, -8.0]], "float32")
    np.testing.assert_array_equal(nnxp.PReLU()(x), [[-0.5, 4], [3, -2]])
    layer = nnxp.PReLU.of(np.array([0.5, -1.0], "float32"))
    np.testing.assert_array_equal(layer(x), [[-1, 4], [3, 8]])
    for odd in (np.ones((2, 1), "float32"), np.ones(2, "float32")):
        with pytest.raises(nnxp.ShapeError, match=r"takes \(rows, \.\.\., 2\) but got \(rows"):
            layer(odd)


def test_glu_halves_its_last_axis():
    x = np.array([[-1.0, 0.0, 1.0, 1.0]])
    np.testing.assert_allclose(nnxp.GLU()(x), [[-0.73105858, 0]], rtol=1e-8)
    assert nnxp.GLU().output_shape((9, 6)) == (9, 3)
    assert kernels.glu(np.ones((2, 4, 3)), axis=1).shape == (2, 2, 3)
    with pytest.raises(nnxp.ShapeError, match="one of 3 has no halves"):
        nnxp.GLU()(np.ones((2, 3)))


def test_with_parameters_keeps_wide_fields_in_float64_in_every_layer_of_a_model():
    net = nnxp.Sequential(nnxp.Standardize.of(np.zeros(3), np.ones(3)), nnxp.Dense(3, 2, rng=0))
    narrow = {name: value.astype("float32") for name, value in net.parameters().items()}
    dtypes = {name: str(v.dtype) for name, v in net.with_parameters(narrow).parameters().items()}
    assert dtypes["layers.0.mean"] == dtypes["layers.0.scale"] == "float64"
    assert dtypes["layers.1.weight"] == "float32"
