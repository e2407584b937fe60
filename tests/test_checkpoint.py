"""A model that went through a file is the same model, and a bad file is refused."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import stat
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import nnxp
from conftest import draw, draw_inputs, every_dtype, every_layer, results
from nnxp import CheckpointError, Dense, Layer, Sequential
from nnxp._arrays import float_dtype
from nnxp.io._atomic import written_beside
from nnxp.io.checkpoint import DEEPEST, LONGEST, VERSION

# hands and eyes


def network():
    """One of everything that a file has to describe: nesting, options, dicts, None, tuples."""
    return Sequential(
        Dense(4, 6, "relu", rng=0),
        nnxp.Residual(nnxp.Activation("leaky_relu", negative_slope=0.1), nnxp.LayerNorm(6)),
        nnxp.Flatten(),
        nnxp.Dropout(0.5),
        nnxp.BatchNorm(6),
        nnxp.Standardize(draw(6), np.ones(6, "float32")),
        Dense(6, 2, "softmax", bias=False, rng=1),
    )


def bits(model):
    """Everything that makes two models the same, to the last bit."""
    values = model.parameters().items()
    return repr(model), [(k, v.dtype, v.shape, nnxp.asnumpy(v).tobytes()) for k, v in values]


def parts(file):
    """(header, description, bytes of the tensors) of a file that nnxp wrote."""
    whole = file.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    return header, json.loads(header["__metadata__"]["nnxp"]), whole[8 + length :]


def assemble(file, header, description, tensors):
    """Write a safetensors file by hand, sound or not; a str is taken as the description's text."""
    if description is not None and isinstance(header.get("__metadata__"), dict):
        text = description if isinstance(description, str) else json.dumps(description)
        header["__metadata__"]["nnxp"] = text
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + tensors)


@pytest.fixture
def file(tmp_path):
    """Where a sound file lies, alone in its folder."""
    file = tmp_path / "room" / "net.safetensors"
    file.parent.mkdir()
    nnxp.save(network(), file)
    return file


@pytest.fixture
def known(monkeypatch):
    """Layers that a test defines are forgotten after it."""
    monkeypatch.setattr(Layer, "known", dict(Layer.known))


# what goes in comes out


@every_layer
@every_dtype
def test_every_layer_comes_back_from_a_file_bit_for_bit(layer, shape, dtype, tmp_path):
    layer = layer.astype(dtype)
    nnxp.save(layer, tmp_path / "layer")
    loaded = nnxp.load(tmp_path / "layer")
    assert type(loaded) is type(layer)
    assert bits(loaded) == bits(layer)
    inputs = draw_inputs(layer, shape, dtype)
    for y, due in zip(results(loaded(*inputs)), results(layer(*inputs)), strict=True):
        assert y.tobytes() == due.tobytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_all_65536_numbers_of_a_16_bit_type_come_back_as_they_were(dtype, tmp_path):
    every = np.arange(2**16, dtype="uint16").view(float_dtype(dtype)).reshape(256, 256)
    nnxp.save(Dense.of(every), tmp_path / "net")
    assert nnxp.load(tmp_path / "net").weight.tobytes() == every.tobytes()


def test_the_same_model_makes_the_same_file(file, tmp_path):
    nnxp.save(nnxp.load(file), tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == file.read_bytes()


def test_any_reader_of_safetensors_finds_the_parameters_by_their_dotted_names(file):
    tensors = load_file(file)
    parameters = network().parameters()
    assert tensors.keys() == parameters.keys()
    for name, value in parameters.items():
        np.testing.assert_array_equal(tensors[name], value)


def test_loaded_parameters_are_ordinary_arrays(file):
    for value in nnxp.load(file).parameters().values():
        assert type(value) is np.ndarray
        assert value.flags.aligned
        assert value.flags.c_contiguous
        assert value.flags.writeable
        assert value.dtype.isnative


def test_arrays_are_saved_as_they_read_however_they_lie_in_memory(tmp_path):
    plain = draw((6, 4))
    strided = np.repeat(np.repeat(plain, 2, axis=0), 3, axis=1)[::2, ::3]
    fixed = plain.copy()
    fixed.flags.writeable = False
    for i, value in enumerate([plain.T.copy().T, strided, fixed, plain.astype(">f4")]):
        np.testing.assert_array_equal(value, plain)
        nnxp.save(Dense.of(value), tmp_path / str(i))
        np.testing.assert_array_equal(nnxp.load(tmp_path / str(i)).weight, plain)


def test_a_model_on_a_device_is_saved_as_the_same_file_as_on_the_host(file, tmp_path, sim):
    nnxp.save(network().to("sim"), tmp_path / "moved")
    assert (tmp_path / "moved").read_bytes() == file.read_bytes()
    assert nnxp.load(tmp_path / "moved").place == "cpu"


def test_a_model_as_deep_as_a_file_holds_can_be_saved_loaded_and_called(tmp_path):
    model = Dense(3, 3, rng=0)
    for _ in range(DEEPEST):
        model = nnxp.Residual(model)
    nnxp.save(model, tmp_path / "deep")
    x = draw((2, 3))
    assert nnxp.load(tmp_path / "deep")(x).tobytes() == model(x).tobytes()


MEASURED = """
import sys, nnxp, numpy, safetensors.numpy

def peak():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))

before = peak()
if sys.argv[1] == "save":
    layers = [nnxp.Dense.of(numpy.ones((2500, 2500), "float32")) for _ in range(8)]
    nnxp.save(nnxp.Sequential(*layers), sys.argv[2])
else:
    model = nnxp.load(sys.argv[2])
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the peak on Linux only")
def test_saving_and_loading_take_no_more_memory_than_the_model_itself(tmp_path):
    for what in ("save", "load"):
        command = [sys.executable, "-c", MEASURED, what, str(tmp_path / "net")]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        size = (tmp_path / "net").stat().st_size  # 200 MB
        assert int(ran.stdout) < 1.15 * size, what


# layers of one's own


def test_a_layer_of_one_s_own_is_saved_by_its_fields_alone(known, tmp_path):
    class Scaled(Layer):
        scale: np.ndarray
        inner: Layer
        more: tuple[Layer, ...]
        size: tuple[int, int]
        kinds: dict[str, float | None]
        mode: Literal["fast", "right"]
        offset: np.ndarray | None = None
        seed: int = 7

        def __call__(self, x):
            return self.inner(x) * self.scale

    layer = Scaled(
        draw(3),
        Dense(3, 3, rng=0),
        (nnxp.Flatten(), Dense(2, 2, rng=1)),
        (1, 2),
        {"a": 1.5, "b": None},
        "right",
    )
    nnxp.save(Sequential(layer), tmp_path / "net")
    (loaded,) = nnxp.load(tmp_path / "net").layers
    assert bits(loaded) == bits(layer)
    assert loaded.size == (1, 2)
    assert loaded.kinds == {"a": 1.5, "b": None}
    assert (loaded.mode, loaded.offset, loaded.seed) == ("right", None, 7)
    assert [type(each) for each in loaded.more] == [nnxp.Flatten, Dense]


def test_a_layer_whose_class_is_not_known_is_named_and_the_mend_with_it(known, tmp_path):
    class Mine(Layer):
        def __call__(self, x):
            return x

    nnxp.save(Sequential(Mine()), tmp_path / "net")
    del Layer.known["Mine"]
    with pytest.raises(CheckpointError, match=r"layers\.0 .*'Mine'.* import the module"):
        nnxp.load(tmp_path / "net")


def test_a_field_that_is_younger_than_the_file_has_its_default(known, tmp_path):
    def define(**younger):
        Layer.known.pop("Mine", None)
        members = {"__annotations__": {"size": int} | dict.fromkeys(younger, int), **younger}
        return type("Mine", (Layer,), {"__call__": lambda self, x: x, **members})

    nnxp.save(define()(3), tmp_path / "net")
    define(pace=4)
    loaded = nnxp.load(tmp_path / "net")
    assert (loaded.size, loaded.pace) == (3, 4)


def test_a_class_that_hides_behind_another_s_name_is_not_saved(known, tmp_path):
    class Dense(Layer):
        def __call__(self, x):
            return x

    with pytest.raises(CheckpointError, match="another layer class of that name"):
        nnxp.save(Sequential(Dense()), tmp_path / "net")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        float("inf"),
        object(),
        b"bytes",
        [1, 2],
        {1: 2},
        {3},
        1j,
        np.float32(1),
        {"a": np.float32(2)},
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_field_that_a_file_cannot_hold_is_refused_by_name(value, known, tmp_path):
    class Mine(Layer):
        thing: Any

        def __call__(self, x):
            return x

    with pytest.raises(CheckpointError, match=r"inner\.thing.*cannot be saved"):
        nnxp.save(nnxp.Residual(Mine(value)), tmp_path / "net")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [np.float64(0.5), np.float32(0.5), np.int64(2), 2])
def test_a_number_of_numpy_s_is_a_number_where_the_field_is_a_float(number, known, tmp_path):
    class Mine(Layer):
        size: float

        def __call__(self, x):
            return x

    nnxp.save(Mine(number), tmp_path / "net")
    size = nnxp.load(tmp_path / "net").size
    assert (type(size), size) == (float, number)


def test_a_number_of_numpy_s_elsewhere_is_refused_with_the_fix(known, tmp_path):
    class Mine(Layer):
        size: int

        def __call__(self, x):
            return x

    with pytest.raises(CheckpointError, match=r"\.item\(\) is a plain number"):
        nnxp.save(Mine(np.int64(2)), tmp_path / "net")


class Sized(Protocol):
    def size(self): ...


def test_annotations_that_tell_nothing_do_not_stand_in_the_way(known, tmp_path):
    class Mine(Layer):
        odd: NoSuchName  # noqa: F821

        def __call__(self, x):
            return x

    class Other(Layer):
        sized: Sized
        thing: TypeVar("T")
        call: Callable[[int], int] | None
        maybe: np.typing.NDArray[np.float32]

        def __call__(self, x):
            return x

    nnxp.save(Sequential(Mine(3), Other("s", 1, None, draw(3))), tmp_path / "net")
    mine, other = nnxp.load(tmp_path / "net").layers
    assert (mine.odd, other.sized, other.thing, other.call) == (3, "s", 1, None)
    np.testing.assert_array_equal(other.maybe, draw(3))


def test_what_could_not_be_loaded_is_refused_when_it_is_saved(known, tmp_path):
    class Mine(Layer):
        size: int

        def __call__(self, x):
            return x

    with pytest.raises(CheckpointError, match="size is 'three', but Mine wants int"):
        nnxp.save(Mine("three"), tmp_path / "net")
    deep = nnxp.Flatten()
    for _ in range(DEEPEST + 1):
        deep = nnxp.Residual(deep)
    with pytest.raises(CheckpointError, match=f"more than {DEEPEST} layers deep"):
        nnxp.save(deep, tmp_path / "net")
    with pytest.raises(nnxp.DtypeMismatch):
        nnxp.save(Sequential(Dense(2, 2), Dense(2, 2, dtype="float64")), tmp_path / "net")
    with pytest.raises(nnxp.OptionError, match="not 3"):
        nnxp.save(3, tmp_path / "net")
    assert not list(tmp_path.iterdir())


# bad files


def without(tree, *path):
    """A copy of the tree without the thing at this path."""
    tree = copy.deepcopy(tree)
    place = tree
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return tree


def with_(tree, value, *path):
    """A copy of the tree with this value at this path."""
    tree = copy.deepcopy(tree)
    place = tree
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return tree


FIRST = ("model", "fields", "layers", 0)  # the Dense(4, 6, relu)
INNER = ("model", "fields", "layers", 1, "fields", "inner", "fields", "layers")
SLOPE = (*INNER, 0, "fields", "options", "dict", "negative_slope")
EPS = (*INNER, 1, "fields", "eps")
WEIGHT = "layers.0.weight"
FLAT = {"layer": "Flatten", "fields": {}}
EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
NOT_WHOLE = "no whole safetensors file"


def described(value, *path):
    return lambda header, description, tensors: (header, with_(description, value, *path), tensors)


def undescribed(*path):
    return lambda header, description, tensors: (header, without(description, *path), tensors)


def headed(value, *path):
    return lambda header, description, tensors: (with_(header, value, *path), description, tensors)


def nested(depth):
    inner = FLAT
    for _ in range(depth):
        inner = {"layer": "Residual", "fields": {"inner": inner}}
    return inner


class NoFormula(Layer):
    """A class to derive from, which no model is made of."""


HOSTILE = {
    "no metadata": (
        lambda h, d, t: (without(h, "__metadata__"), None, t),
        "not one that nnxp.save",
    ),
    "another's metadata": (
        lambda h, d, t: (h | {"__metadata__": {"format": "pt"}}, None, t),
        "not one that nnxp.save wrote; it says .*'pt'",
    ),
    "metadata that is no JSON": (lambda h, d, t: (h, "{", t), "is no JSON"),
    "metadata that is a list": (lambda h, d, t: (h, [1], t), "version None"),
    "metadata nested too deep to parse": (lambda h, d, t: (h, "[" * 200_000, t), "is no JSON"),
    "metadata too long to parse": (lambda h, d, t: (h, "1" * (LONGEST + 1), t), "too many"),
    "a number with more digits than Python converts": (
        described(0, "version"),
        "no JSON that can be read",
    ),
    "a version to come": (described(VERSION + 1, "version"), "version 2 .*; a newer nnxp reads it"),
    "a version that is a word": (described("1", "version"), "version '1' of"),
    "a version that is nearly a number": (described(True, "version"), "version True of"),
    "no version": (undescribed("version"), "version None of"),
    "no model": (undescribed("model"), "the model is not described as a layer"),
    "a model that is a number": (described(3, "model"), "the model is not described as a layer"),
    "an unknown layer": (described("Evil", *FIRST, "layer"), "'Evil' that is not known"),
    "a layer that is a function": (described("os.system", *FIRST, "layer"), "that is not known"),
    "a layer without a name": (described(None, *FIRST, "layer"), "None that is not known"),
    "a layer of an unhashable name": (described([], *FIRST, "layer"), "that is not known"),
    "a layer without a formula": (
        described({"layer": "NoFormula", "fields": {}}, "model"),
        "which has no formula",
    ),
    "a layer for internal use": (
        described({"layer": "_Tap", "fields": {"layer": FLAT, "name": "x", "note": "y"}}, "model"),
        "not known here",
    ),
    "a layer with more than name and fields": (described(1, *FIRST, "more"), "not described"),
    "fields that are a list": (described([], *FIRST, "fields"), r"layers\.0 has no fields"),
    "a missing field": (undescribed(*FIRST, "fields", "weight"), "missing: weight"),
    "a field too many": (described(1, *FIRST, "fields", "more"), "unknown: more"),
    "a field that is a method": (described(1, *FIRST, "fields", "__call__"), "unknown: __call__"),
    "an unknown activation": (
        described("evil", *FIRST, "fields", "activation"),
        "there is no activation 'evil'",
    ),
    "an activation that is a list": (
        described([1], *FIRST, "fields", "activation"),
        r"activation is \(1,\), but Dense wants str",
    ),
    "an unknown option of an activation": (described(1.0, *SLOPE[:-1], "out"), "not out"),
    "an option of an activation that is a word": (described("x", *SLOPE), "options is .* wants"),
    "a NaN": (described(float("nan"), *SLOPE), "negative_slope is nan"),
    "an infinity": (described(float("-inf"), *SLOPE), "negative_slope is -inf"),
    "a number that overflows": (described("OVERFLOW", *SLOPE), "negative_slope is inf"),
    "a negative eps": (described(-1.0, *EPS), "eps is zero or a little more, not -1.0"),
    "an eps that is true": (described(True, *EPS), "eps is True, but LayerNorm wants float"),
    "an eps that is a word": (described("small", *EPS), "eps is 'small', but LayerNorm wants"),
    "a dropout rate above one": (
        described(1.5, "model", "fields", "layers", 3, "fields", "rate"),
        "dropout rate",
    ),
    "a weight that is a number": (described(1.0, *FIRST, "fields", "weight"), "is an array, not 1"),
    "a bias that is a word": (described("none", *FIRST, "fields", "bias"), "is an array, not 'n"),
    "a gain that is missing": (described(None, *EPS[:-1], "gain"), "is an array, not None"),
    "a weight that is a layer": (
        described(FLAT, *FIRST, "fields", "weight"),
        r"is an array, not Flatten\(\)",
    ),
    "a layer that is a weight": (
        described({"tensor": "layers.2"}, *FIRST[:3], 2),
        r"the tensor layers\.2 is missing",
    ),
    "a layer that is a number": (described(1, *FIRST), "layers is .*, but Sequential wants tuple"),
    "layers that are one layer": (
        described(FLAT, "model", "fields", "layers"),
        r"layers is Flatten\(\), but",
    ),
    "layers in layers' places": (
        described([[FLAT]], "model", "fields", "layers"),
        r"layers is \(\(Flatten\(\),\),\), but",
    ),
    "a tensor by another's name": (
        described({"tensor": "layers.0.bias"}, *FIRST, "fields", "weight"),
        r"layers\.0\.weight is not the tensor 'layers\.0\.bias'",
    ),
    "a tensor that is not there": (
        described({"tensor": "layers.6.bias"}, *FIRST[:3], 6, "fields", "bias"),
        r"the tensor layers\.6\.bias is missing",
    ),
    "a tensor that nobody asks for": (
        described(None, *FIRST, "fields", "bias"),
        r"no layer's parameters: layers\.0\.bias",
    ),
    "layers nested too deep": (described(nested(DEEPEST + 1), "model"), "layers deep"),
    "layers nested absurdly deep": (described("NESTED", "model"), "is no JSON"),
    "tuples nested absurdly deep": (
        described("TUPLES", *FIRST, "fields", "activation"),
        "but Dense wants str|RecursionError",  # as deep as the stack allows
    ),
    "one more tensor": (headed(EMPTY, "more"), "no layer's parameters: more"),
    "a tensor less": (lambda h, d, t: (without(h, "layers.4.var"), d, t), NOT_WHOLE),
    "a transposed weight": (headed([6, 4], WEIGHT, "shape"), r"got \(6, 4\) and \(6,\)"),
    "a flat weight": (headed([24], WEIGHT, "shape"), r"got \(24,\) and"),
    "a weight with more axes": (headed([4, 6, 1], WEIGHT, "shape"), r"got \(4, 6, 1\) and"),
    "a weight with half the shape": (headed([4, 3], WEIGHT, "shape"), NOT_WHOLE),
    "a weight with a negative shape": (headed([-4, -6], WEIGHT, "shape"), NOT_WHOLE),
    "a shape that overflows": (headed([2**32, 2**32], WEIGHT, "shape"), NOT_WHOLE),
    "a shape beyond all memory": (headed([2**40, 2**10], WEIGHT, "shape"), NOT_WHOLE),
    "an empty tensor with an absurd shape": (
        headed({"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}, "more"),
        "no layer's parameters|no whole",
    ),
    "offsets beyond the file": (headed([2**40, 2**40 + 96], WEIGHT, "data_offsets"), NOT_WHOLE),
    "offsets in reverse": (headed([96, 0], WEIGHT, "data_offsets"), NOT_WHOLE),
    "offsets that overlap": (headed([4, 100], WEIGHT, "data_offsets"), NOT_WHOLE),
    "integers": (
        headed("I32", WEIGHT, "dtype"),
        "are F32 and F64 and I32; they are all of one floating",
    ),
    "another float of half the size": (headed("F16", WEIGHT, "dtype"), NOT_WHOLE),
    "an unknown type": (headed("F128", WEIGHT, "dtype"), NOT_WHOLE),
    "8-bit floats": (headed("F8_E4M3", WEIGHT, "dtype"), NOT_WHOLE),
    "bytes missing": (lambda h, d, t: (h, d, t[:-1]), NOT_WHOLE),
    "bytes too many": (lambda h, d, t: (h, d, t + b"\0"), NOT_WHOLE),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_file_is_refused_that_has(fault, file):
    """Refused for that very reason, at the cost of little memory."""
    edit, reason = HOSTILE[fault]
    assemble(file, *edit(*parts(file)))
    odd = {
        b'\\"OVERFLOW\\"': b"1e999",
        b'\\"NESTED\\"': json.dumps('{"layer":"Residual","fields":{"inner":' * 50_000)[
            1:-1
        ].encode(),
        b'\\"TUPLES\\"': b"[" * 600 + b"]" * 600,
        b'\\"version\\": 0': b'\\"version\\": 1' + b"0" * 5000,
    }
    whole = file.read_bytes()
    for placeholder, bytes_ in odd.items():
        whole = whole.replace(placeholder, bytes_)
    (length,) = struct.unpack("<Q", whole[:8])
    longer = len(whole) - len(file.read_bytes())
    file.write_bytes(struct.pack("<Q", length + longer) + whole[8:])
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=rf"^{file} cannot be loaded: .*({reason})"):
            nnxp.load(file)
        assert tracemalloc.get_traced_memory()[1] < 3 * LONGEST
    finally:
        tracemalloc.stop()


def test_the_hand_that_writes_hostile_files_can_write_sound_ones(file):
    assemble(file, *parts(file))
    assert bits(nnxp.load(file)) == bits(network())


def test_types_are_not_mixed_in_a_file(file):
    _, description, _ = parts(file)
    tensors = load_file(file)
    tensors["layers.0.bias"] = tensors["layers.0.bias"].astype("float64")
    save_file(tensors, file, metadata={"nnxp": json.dumps(description)})
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.weight is float32 but layers\.0\.bias is float64"
    ):
        nnxp.load(file)


def test_a_file_of_integers_is_refused_though_all_its_tensors_agree(file):
    _, description, _ = parts(file)
    tensors = {name: value.astype("int32") for name, value in load_file(file).items()}
    save_file(tensors, file, metadata={"nnxp": json.dumps(description)})
    with pytest.raises(CheckpointError, match="I32; they are all of one"):
        nnxp.load(file)


UNFIT = [
    (Dense(4, 6), {"weight": (4, 6), "bias": (4,)}),
    (Dense(4, 6), {"weight": (4, 6), "bias": (1, 6)}),
    (Dense(4, 6), {"weight": (4, 6), "bias": ()}),
    (Dense(4, 6), {"weight": (4, 0), "bias": (0,)}),
    (Dense(4, 6, bias=False), {"weight": (24,)}),
    (Dense(4, 6, bias=False), {"weight": (1, 4, 6)}),
    (nnxp.LayerNorm(6), {"gain": (6,), "bias": (5,)}),
    (nnxp.LayerNorm(6), {"gain": (2, 3), "bias": (3, 2)}),
    (nnxp.RMSNorm(6), {"gain": ()}),
    (nnxp.RMSNorm(6), {"gain": (0,)}),
]


@pytest.mark.parametrize(("layer", "shapes"), UNFIT, ids=str)
def test_no_layer_is_made_of_arrays_that_do_not_fit_it(layer, shapes, file):
    nnxp.save(layer, file)
    _, description, _ = parts(file)
    tensors = {name: np.zeros(shape, "float32") for name, shape in shapes.items()}
    save_file(tensors, file, metadata={"nnxp": json.dumps(description)})
    with pytest.raises(CheckpointError, match=rf"the model: {type(layer).__name__} takes .*; got"):
        nnxp.load(file)


class Bomb:
    """Unpickled, it makes a file: the mark of code that ran."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (self.mark, "w")


def contents(mark):
    archive = io.BytesIO()
    np.savez(archive, weight=np.ones(3))
    objects = io.BytesIO()
    np.save(objects, np.array([Bomb(mark)], dtype=object), allow_pickle=True)
    return {
        "nothing": b"",
        "a few bytes": b"\x01\x02\x03",
        "zeros": bytes(1000),
        "ones": b"\xff" * 1000,
        "a text": b"weights = 3\n" * 100,
        "JSON": b'{"layer": "Dense"}',
        "a pickle": pickle.dumps(Bomb(mark)),
        "an npz": archive.getvalue(),
        "an npy of objects": objects.getvalue(),
        "a header longer than the file": struct.pack("<Q", 1000) + b"{}",
        "a header of absurd length": struct.pack("<Q", 2**63) + b"{}",
        "a header that is not UTF-8": struct.pack("<Q", 4) + b'{"\xff"',
        "a header nested absurdly deep": struct.pack("<Q", 10**6) + b'{"a":' * 200_000,
    }


@pytest.mark.parametrize("kind", contents(""))
def test_a_file_of_another_kind_is_refused_and_nothing_in_it_runs(kind, tmp_path):
    mark = tmp_path / "it ran"
    (tmp_path / "net").write_bytes(contents(str(mark))[kind])
    known = {
        "a pickle": "a pickle",
        "an npz": ".npz file",
        "an npy of objects": ".npy file",
        "a text": "it is text, not a model",
        "JSON": "it is text, not a model",
    }
    with pytest.raises(CheckpointError, match=known.get(kind, "no whole safetensors file")):
        nnxp.load(tmp_path / "net")
    assert not mark.exists()


def test_a_file_cut_short_anywhere_is_refused(file):
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            nnxp.load(file)


OWN_GRU = """
import nnxp

class GRU(nnxp.Layer):  # before the library's own is first named, and loaded
    def __call__(self, x):
        return x

assert type(nnxp.load("gru.safetensors")) is not GRU
try:
    nnxp.save(GRU(), "own.safetensors")
except nnxp.CheckpointError as error:
    print(error)
"""


def test_a_layer_that_is_not_loaded_yet_keeps_its_name(tmp_path):
    nnxp.save(nnxp.GRU(2, 3, rng=0), tmp_path / "gru.safetensors")
    ran = subprocess.run(
        [sys.executable, "-c", OWN_GRU], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert "another layer class of that name" in ran.stdout


def test_bfloat16_without_its_package_says_which_package(tmp_path, monkeypatch):
    nnxp.save(Dense(2, 2, dtype="bfloat16"), tmp_path / "net")
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(CheckpointError, match="pip install ml_dtypes"):
        nnxp.load(tmp_path / "net")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A sound file that many examples start from; each writes its own beside it."""
    file = tmp_path_factory.mktemp("fuzz") / "sound"
    nnxp.save(network(), file)
    return file


def is_refused_or_sound(file):
    """Load, and if that succeeds, use the model in every way."""
    try:
        model = nnxp.load(file)
    except CheckpointError:
        return
    assert isinstance(model, Layer)
    assert model.parameter_count == sum(each.size for each in model.parameters().values())
    repr(model)
    nnxp.save(model, file)
    assert bits(nnxp.load(file)) == bits(model)
    try:
        with np.errstate(all="ignore"):  # the numbers may be any
            model(np.ones((3, 4), model.dtype or "float32"))
    except nnxp.ShapeError:
        pass


@settings(max_examples=500, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4
    )
)
def test_a_file_with_any_bytes_changed_is_refused_or_sound(sound, changes):
    whole = bytearray(sound.read_bytes())
    for place, byte in changes:
        whole[int(place * len(whole))] = byte
    fuzzed = sound.with_name("fuzzed")
    fuzzed.write_bytes(whole)
    is_refused_or_sound(fuzzed)


def places(tree):
    """Every (container, key) in a tree of JSON."""
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else []
    for key in keys:
        yield tree, key
        yield from places(tree[key])


words = st.sampled_from(
    "Dense Residual Sequential _Tap _Norm layers.0.weight weight relu layer fields tensor dict "
    "F32 F16 BF16 I8 shape __class__ ".split(" ")
)
numbers = st.sampled_from([0, 1, -1, 4, 6, 24, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e-320])
trees = st.recursive(
    words | numbers | st.none() | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_a_file_with_any_part_of_its_header_changed_is_refused_or_sound(sound, data):
    header, description, tensors = parts(sound)
    for _ in range(data.draw(st.integers(1, 3))):
        tree = data.draw(st.sampled_from([description, header]))
        container, key = data.draw(st.sampled_from([*places(tree), (tree, "more")]))
        if data.draw(st.booleans()):
            container[key] = data.draw(trees)
        elif key in container or isinstance(container, list):
            del container[key]
    fuzzed = sound.with_name("fuzzed")
    assemble(fuzzed, header, description, tensors)
    is_refused_or_sound(fuzzed)


# files and folders


def test_a_file_that_cannot_be_read_is_an_error_of_the_operating_system(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        nnxp.load(tmp_path / "missing")
    with pytest.raises(IsADirectoryError, match="a folder, not a model"):
        nnxp.load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        nnxp.load(tmp_path / "pipe")


def test_a_file_that_cannot_be_written_is_an_error_of_the_operating_system(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no such folder.*missing"):
        nnxp.save(network(), tmp_path / "missing" / "net")
    with pytest.raises(IsADirectoryError, match="a folder stands"):
        nnxp.save(network(), tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        nnxp.save(network(), tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    (tmp_path / "fixed").write_bytes(b"old")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write to everything
    with pytest.raises(PermissionError, match=r"may not be written to.*fixed"):
        nnxp.save(network(), tmp_path / "fixed")
    assert {each.name for each in tmp_path.iterdir()} == {"fixed", "pipe"}
    assert (tmp_path / "fixed").read_bytes() == b"old"


def test_a_folder_that_may_not_be_written_to_is_named(tmp_path, monkeypatch):
    def refuse(*args):
        raise PermissionError(13, "Permission denied", args[0])

    monkeypatch.setattr(os, "open", refuse)  # root may write to everything
    with pytest.raises(PermissionError, match=rf"this folder may not .*{tmp_path.name}'$"):
        nnxp.save(network(), tmp_path / "net")


def test_a_path_may_be_a_string_with_any_name(tmp_path):
    for name in ("plain", "ö 漢.safetensors", "x" * 250):
        nnxp.save(network(), str(tmp_path / name))
        assert bits(nnxp.load(str(tmp_path / name))) == bits(network())


def fail_half_way(path, error):
    with written_beside(path) as beside:
        beside.write_bytes(b"half")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(file, error):
    old = file.read_bytes()
    with pytest.raises(error):
        fail_half_way(file, error)
    assert file.read_bytes() == old
    assert list(file.parent.iterdir()) == [file]


def test_a_write_that_fails_makes_no_new_file(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fail_half_way(tmp_path / "new", KeyboardInterrupt)
    assert not list(tmp_path.iterdir())


def test_nothing_stands_at_the_target_before_the_write_is_done(tmp_path):
    with written_beside(tmp_path / "rows.npy") as beside:
        assert beside == tmp_path / "rows.npy.part"
        with open(beside, "wb") as file:  # numpy.save would append .npy to another name
            np.save(file, np.ones(3))
        assert not (tmp_path / "rows.npy").exists()
    np.testing.assert_array_equal(np.load(tmp_path / "rows.npy"), np.ones(3))
    assert [each.name for each in tmp_path.iterdir()] == ["rows.npy"]


def test_a_symlink_stays_one_and_what_it_points_to_is_replaced(tmp_path):
    (tmp_path / "store").mkdir()
    nnxp.save(nnxp.Flatten(), tmp_path / "store" / "v1")
    (tmp_path / "latest").symlink_to(Path("store") / "v1")
    nnxp.save(network(), tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    assert bits(nnxp.load(tmp_path / "store" / "v1")) == bits(network())
    (tmp_path / "next").symlink_to(Path("store") / "v2")  # one that points to nothing yet
    nnxp.save(network(), tmp_path / "next")
    assert bits(nnxp.load(tmp_path / "store" / "v2")) == bits(network())


def test_a_new_file_has_the_permissions_of_the_umask_and_an_old_one_keeps_its_own(tmp_path):
    def mode():
        return stat.S_IMODE((tmp_path / "net").stat().st_mode)

    before = os.umask(0o027)
    try:
        nnxp.save(network(), tmp_path / "net")
        assert mode() == 0o640
        (tmp_path / "net").chmod(0o604)
        nnxp.save(network(), tmp_path / "net")
        assert mode() == 0o604
    finally:
        os.umask(before)
