"""Names of columns and of classes: kept with a model, compared with tables, written as labels."""

from __future__ import annotations

import json
import pickle
import struct
import tracemalloc

import numpy as np
import pytest

import nnxp
from conftest import draw
from nnxp._exchange import order_of
from nnxp.cli import app
from nnxp.io.labels import Labels

pandas = pytest.importorskip("pandas")
pyarrow = pytest.importorskip("pyarrow")
runner = pytest.importorskip("typer.testing").CliRunner()

NAMES = ("a", "b", "c")
X = draw((50, 3), "float64")
NET = nnxp.Sequential(
    nnxp.Dense(3, 4, "tanh", rng=0),
    nnxp.Dense(4, 2, "softmax", rng=1),
    columns=NAMES,
    classes=("no", "yes"),
)
Y = NET.astype("float64")(X)
DUE = np.array(NET.classes)[Y.argmax(axis=1)]


# with the model


@pytest.mark.parametrize(
    "changed",
    {
        "moved": lambda net: net.to("sim").to("numpy"),
        "converted": lambda net: net.astype("float64"),
        "with parameters": lambda net: net.with_parameters(net.parameters()),
        "mapped": lambda net: net.map_layers(lambda name, layer: layer),
        "pickled": lambda net: pickle.loads(pickle.dumps(net)),
        "in another": lambda net: nnxp.Sequential(net),
        "of fields": lambda net: nnxp.Sequential.of((nnxp.Sequential.of((net,)),)),
        "given by arrays": lambda net: nnxp.Sequential(
            *net.layers, columns=pandas.Index(NAMES), classes=np.array(["no", "yes"], object)
        ),
    }.items(),
    ids=lambda pair: pair[0],
)
def test_names_go_with_the_model(changed):
    _, change = changed
    made = change(NET)
    assert (made.columns, made.classes) == (NAMES, ("no", "yes"))
    assert {type(each) for each in (*made.columns, *made.classes)} == {str}


def test_names_of_the_first_layer_and_classes_of_the_last_are_those_of_the_whole():
    longer = nnxp.Sequential(nnxp.Dense(3, 3, rng=0), NET)
    assert (longer.columns, longer.classes) == (None, ("no", "yes"))
    longer = nnxp.Sequential(NET, nnxp.Dense(2, 5, rng=0))
    assert (longer.columns, longer.classes) == (NAMES, None)
    assert nnxp.Sequential(NET, classes=[1, 2]).classes == (1, 2)


@pytest.mark.parametrize("classes", [("x", "y"), (3, 5), (0.5, 2.0), (False, True), None])
def test_names_are_saved_as_they_are(classes, tmp_path):
    net = nnxp.Sequential(*NET.layers, columns=("ä", "", "c"), classes=classes)
    nnxp.save(net, tmp_path / "net")
    loaded = nnxp.load(tmp_path / "net")
    assert (loaded.columns, loaded.classes) == (net.columns, net.classes)
    assert list(map(type, loaded.classes or ())) == list(map(type, classes or ()))


WRONG = {
    "one text": ({"columns": "abc"}, "several names"),
    "a number": ({"columns": 3}, "several names"),
    "numbers": ({"columns": (1, 2, 3)}, "columns are names, but one is 1"),
    "no columns": ({"columns": ()}, "at least one name"),
    "too few columns": ({"columns": ("a", "b")}, "2 names of columns do not fit Dense"),
    "no classes": ({"classes": ()}, "at least one name"),
    "too few classes": ({"classes": ("a",)}, r"1 classes do not fit .* \(rows, 2\)"),
    "too many classes": ({"classes": ("a", "b", "c")}, r"3 classes do not fit"),
    "a mixture": ({"classes": ("a", 1)}, "all str, int, float or bool"),
    "lists": ({"classes": ([1], [2])}, "all str, int, float or bool"),
    "the same twice": ({"classes": ("a", "a")}, "differ from each other"),
}


@pytest.mark.parametrize("case", WRONG)
def test_names_that_mean_nothing_are_refused_when_a_model_is_made(case):
    names, said = WRONG[case]
    with pytest.raises(nnxp.NnxpError, match=said):
        nnxp.Sequential(*NET.layers, **names)


def rewritten(path, change):
    """The same file with another description."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    entry = json.loads(header["__metadata__"]["nnxp"])
    change(entry["model"]["fields"])
    header["__metadata__"]["nnxp"] = json.dumps(entry)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


def test_a_file_without_names_is_loaded(tmp_path):
    nnxp.save(NET, tmp_path / "net")
    rewritten(
        tmp_path / "net", lambda fields: [fields.pop(name) for name in ("columns", "classes")]
    )
    loaded = nnxp.load(tmp_path / "net")
    assert loaded.columns is loaded.classes is None


HOSTILE = [
    *[
        ("columns", value)
        for value in ("abc", 3, [1, 2, 3], [["a"], "b", "c"], {"dict": {}}, ["a"])
    ],
    *[("columns", value) for value in ({"tensor": "columns"}, [None, "b", "c"], [], True)],
    *[("classes", value) for value in ("ab", [1, "a"], ["a", "a"], [[], []], [None, None], 1e999)],
    *[("classes", value) for value in ([float("nan"), 1.0], ["a"], [{"dict": {}}, "b"])],
]


@pytest.mark.parametrize(("name", "value"), HOSTILE)
def test_a_file_with_names_that_mean_nothing_is_refused(name, value, tmp_path):
    nnxp.save(NET, tmp_path / "net")
    rewritten(tmp_path / "net", lambda fields: fields.update({name: value}))
    with pytest.raises(nnxp.CheckpointError, match="cannot be loaded"):
        nnxp.load(tmp_path / "net")


# with tables

TURNED = [2, 0, 1]
FRAME = pandas.DataFrame(X[:, TURNED], columns=[NAMES[i] for i in TURNED])


class Table:
    """Names and rows, of no library."""

    def __init__(self, columns, values):
        self.columns, self.values, self.shape = columns, values, values.shape

    def __getitem__(self, rows):
        return Table(self.columns, self.values[rows])

    def __len__(self):
        return len(self.values)

    def __array__(self, dtype=None, copy=None):
        return self.values if dtype is None else self.values.astype(dtype)


TABLES = {
    "pandas": lambda frame: frame,
    "pandas, mixed": lambda frame: frame.astype({"a": "float32"}).astype({"a": "float64"}),
    "pandas, nullable": lambda frame: frame.convert_dtypes(),
    "pyarrow": lambda frame: pyarrow.table(frame),
    "columns": lambda frame: nnxp.Columns(frame[["c"]], pyarrow.table(frame[["a", "b"]])),
    "any": lambda frame: Table(list(frame.columns), frame.to_numpy()),
}


@pytest.mark.parametrize("backend", ["numpy", "sim"])
@pytest.mark.parametrize("table", TABLES)
def test_columns_in_another_order_are_put_in_order(table, backend):
    x = TABLES[table](FRAME)
    engine = nnxp.Engine(NET.astype("float64"), backend, memory_limit="64 KiB")
    np.testing.assert_allclose(engine(x), Y, atol=1e-12)
    ordered = TABLES[table](FRAME[list(NAMES)]) if table != "columns" else x
    np.testing.assert_allclose(engine(ordered), Y, atol=1e-12)
    batches = nnxp.predict_iter(NET.astype("float64"), [x], backend)
    np.testing.assert_allclose(next(batches), Y, atol=1e-12)


def test_the_table_itself_is_left_as_it_is_and_out_is_filled():
    frame, out = FRAME.copy(), np.empty((50, 2), "float32")
    nnxp.predict(NET, frame, "cpu", out=out)
    np.testing.assert_allclose(out, Y, atol=1e-6)
    pandas.testing.assert_frame_equal(frame, FRAME)


@pytest.mark.parametrize("table", [name for name in TABLES if name != "columns"])
def test_other_columns_are_refused_by_name(table):
    make = TABLES[table]
    with pytest.raises(nnxp.ShapeError, match=r"'b' is missing$"):
        nnxp.predict(NET, make(FRAME.drop(columns="b")), "cpu")
    with pytest.raises(nnxp.ShapeError, match=r"'d' is too many; x\[list\(model.columns\)\]"):
        nnxp.predict(NET, make(FRAME.assign(d=1.0)), "cpu")
    with pytest.raises(nnxp.ShapeError, match=r"'b' is missing, 'd' is too many$"):
        nnxp.predict(NET, make(FRAME.rename(columns={"b": "d"})), "cpu")
    taken = make(FRAME.assign(d=1.0)[list(NET.columns)])
    np.testing.assert_allclose(nnxp.predict(NET, taken, "cpu"), Y, atol=1e-6)


def test_the_orders_of_columns():
    assert order_of(("c", "a", "b"), NAMES, "") == [1, 2, 0]
    for same in (NAMES, ("0", "1", "2"), ("a", None, "c")):
        assert order_of(same, NAMES, "") is None
    for nothing in (None, 3, "abc", (1, 2, 3)):  # of layers that mean something else by the word
        assert order_of(NAMES, nothing, "") is None
    with pytest.raises(nnxp.ShapeError, match="'b' is where the model was trained with 'c'"):
        order_of(("a", None, "b"), NAMES, "")
    with pytest.raises(nnxp.ShapeError, match="'a' is too many"):
        order_of(("a", "b", "c", "a"), NAMES, "")
    assert order_of(("a", "a", "b"), ("a", "a", "b"), "") is None
    with pytest.raises(nnxp.ShapeError, match="several are called 'a'"):
        order_of(("a", "b", "a"), ("a", "a", "b"), "")
    with pytest.raises(nnxp.ShapeError, match=r"'c0', .* and 95 more are missing"):
        order_of(("x",), tuple(f"c{i}" for i in range(100)), "")


def test_rows_without_names_are_taken_as_they_are():
    for x in (X, X.tolist(), pandas.DataFrame(X), nnxp.Columns(X[:, :1], X[:, 1:])):
        np.testing.assert_allclose(nnxp.predict(NET, x, "cpu"), Y, atol=1e-6)
    plain = nnxp.Sequential(*NET.layers)
    y = nnxp.predict(plain, FRAME, "cpu")
    np.testing.assert_allclose(y, plain.astype("float64")(X[:, TURNED]), atol=1e-6)


# on the command line


@pytest.fixture
def files(tmp_path):
    """A model and rows in files, their columns in another order."""
    nnxp.save(NET, tmp_path / "net")
    np.save(tmp_path / "x.npy", X)
    FRAME.to_csv(tmp_path / "x.csv", index=False)
    FRAME.to_parquet(tmp_path / "x.parquet")
    return tmp_path


def run(*words):
    result = runner.invoke(app, [*map(str, words), "--backend", "numpy"])
    return result.exit_code, " ".join(result.output.split())


def read(path):
    match path.suffix:
        case ".npy":
            return np.load(path)
        case ".npz":
            return np.load(path)["output"]
        case ".csv":
            return pandas.read_csv(path).to_numpy()
    return pandas.read_parquet(path).to_numpy()


@pytest.mark.parametrize("source", ["x.csv", "x.parquet"])
@pytest.mark.parametrize("reader", ["pyarrow", "numpy"])
def test_a_header_in_another_order_puts_the_columns_in_order(source, reader, files, monkeypatch):
    if reader == "numpy" and source == "x.csv":
        monkeypatch.setattr("nnxp.io.tables._pyarrow", lambda module: None)
    code, said = run("predict", files / "net", files / source, "-o", files / "y.npy")
    assert (code, "put in the order of the model's" in said) == (0, True), said
    np.testing.assert_allclose(np.load(files / "y.npy"), Y, atol=1e-6)
    code, said = run("verify", files / "net", files / source)
    assert (code, "put in the order of the model's" in said) == (0, True), said


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_header_with_other_names_is_refused(ending, files):
    def predict(frame, *options):
        path = files / f"z.{ending}"
        frame.to_csv(path, index=False) if ending == "csv" else frame.to_parquet(path)
        return run("predict", files / "net", path, "-o", files / "y.npy", *options)

    code, said = predict(FRAME.rename(columns={"b": "d"}))
    assert (code, "'b' is missing, 'd' is too many" in said) == (1, True), said
    assert not (files / "y.npy").exists()
    code, said = predict(FRAME.assign(d=1.0))
    assert (code, "'d' is too many; --columns a,b,c" in said) == (1, True), said
    code, said = predict(FRAME.assign(d=1.0), "--columns", "b,c,a")
    assert code == 0, said
    np.testing.assert_allclose(np.load(files / "y.npy"), Y, atol=1e-6)


def test_a_header_of_numbers_names_no_columns(files):
    pandas.DataFrame(X).to_csv(files / "x.csv", index=False)
    code, said = run("predict", files / "net", files / "x.csv", "-o", files / "y.npy")
    assert code == 0, said
    np.testing.assert_allclose(np.load(files / "y.npy"), Y, atol=1e-6)


@pytest.mark.parametrize("ending", [".npy", ".npz", ".csv", ".parquet"])
@pytest.mark.parametrize("source", ["x.npy", "x.csv", "x.parquet"])
def test_labels_are_written(source, ending, files):
    path = files / f"y{ending}"
    code, said = run("predict", files / "net", files / source, "-o", path, "--labels")
    assert code == 0, said
    np.testing.assert_array_equal(read(path).ravel(), DUE)
    if ending == ".csv":
        assert path.read_text().split()[:2] == ["label", DUE[0]]


@pytest.mark.parametrize("classes", [(3, 5), (0.5, 2.0), (False, True), ('with, "both"', "é")])
@pytest.mark.parametrize("ending", [".npy", ".csv", ".parquet"])
@pytest.mark.parametrize("reader", ["pyarrow", "numpy"])
def test_labels_of_any_type_are_written(classes, ending, reader, files, monkeypatch):
    nnxp.save(nnxp.Sequential(NET, classes=classes), files / "net")
    if reader == "numpy" and ending != ".parquet":
        monkeypatch.setattr("nnxp.io.tables._pyarrow", lambda module: None)
    code, said = run(
        "predict", files / "net", files / "x.npy", "-o", files / f"y{ending}", "--labels"
    )
    assert code == 0, said
    due = np.array(classes)[Y.argmax(axis=1)]
    np.testing.assert_array_equal(read(files / f"y{ending}").ravel(), due)


def test_labels_of_a_model_that_knows_no_classes_are_refused(files):
    nnxp.save(nnxp.Sequential(*NET.layers), files / "net")
    for source in ("x.npy", "x.csv"):
        code, said = run(
            "predict", files / "net", files / source, "-o", files / "y.npy", "--labels"
        )
        assert (code, "knows no classes: nnxp.Sequential(model, classes=" in said) == (2, True), (
            said
        )
        assert not (files / "y.npy").exists()


def test_a_row_of_nan_has_no_label(files):
    rows = X.copy()
    rows[7, 1] = np.nan
    np.save(files / "x.npy", rows)
    code, said = run("predict", files / "net", files / "x.npy", "-o", files / "y.npy", "--labels")
    assert (code, "row 7 (from 0) has no label" in said) == (1, True), said
    assert not (files / "y.npy").exists()


SINGLE = {
    "sigmoid": (nnxp.Dense(3, 1, "sigmoid", rng=0), 0.5),
    "sigmoid, as rows": (
        nnxp.Sequential(nnxp.Dense(3, 1, "sigmoid", rng=0), nnxp.Take(0)),
        0.5,
    ),
    "sigmoid, on its own": (
        nnxp.Sequential(nnxp.Dense(3, 1, rng=0), nnxp.Activation("sigmoid")),
        0.5,
    ),
    "a decision": (nnxp.Sequential(nnxp.Dense(3, 1, rng=0), nnxp.Take(0)), 0.0),
}


@pytest.mark.parametrize("case", SINGLE)
def test_the_label_of_a_single_output(case):
    layer, above = SINGLE[case]
    net = nnxp.Sequential(layer, classes=("below", "above"))
    y = net(X.astype("float32"))
    labels = Labels(net, X.shape)(y)
    np.testing.assert_array_equal(labels == "above", y.ravel() > above)
    assert set(labels) == {"below", "above"}


def test_a_single_output_that_does_not_tell_is_refused():
    net = nnxp.Sequential(nnxp.Dense(3, 1, "relu", rng=0), classes=("below", "above"))
    with pytest.raises(nnxp.OptionError, match="that relu makes nobody can tell"):
        Labels(net, X.shape)


@pytest.mark.parametrize(
    "key",
    [
        (..., [0, 2, 1]),
        (slice(None), [2, 0]),
        (slice(None), slice(1, None, 2), [0, 1]),
        (slice(None), [0, 1], None, [1, 2]),
        (slice(None), 1, [0, 2]),
        (slice(None), np.array([[0, 1], [2, 0]])),
    ],
)
def test_a_choice_of_columns_is_written_out_without_a_copy_of_all_rows(key):
    x = np.arange(5 * 4 * 3, dtype="float32").reshape(5, 4, 3)

    class Chosen(nnxp.Layer):
        def __call__(self, x):
            return x[key]

    layer = Chosen()
    tracemalloc.start()
    try:
        program = layer.program(x.shape)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20  # all rows would be 24 MB
    finally:
        tracemalloc.stop()
    (outline,) = program.outline(5)
    assert outline.shape == x[key].shape
    np.testing.assert_array_equal(program(x), x[key])
