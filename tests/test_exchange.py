"""Whatever gives rows: its numbers exactly, or an error of ours that names the fix."""

from __future__ import annotations

import array
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import nnxp
from conftest import draw
from nnxp._exchange import columns_of, host_rows, shares_memory, source_of

NET = nnxp.Dense(3, 2, rng=0)
X = draw((20, 3))


class Source:
    """Anything with a shape and blocks."""

    def __init__(self, take, shape=(20, 3)):
        self.take, self.shape = take, shape

    def __getitem__(self, rows):
        return self.take(rows)


def through_a_source(block):
    return host_rows(Source(lambda rows: block[rows])[0:20])


def through_columns(block):
    return nnxp.Columns(block)[0:20]


def at_the_door(block):
    return host_rows(source_of(block)[0:20])


every_way = pytest.mark.parametrize("way", [host_rows, at_the_door, through_a_source])


# masks


@every_way
@pytest.mark.parametrize(
    ("dtype", "becomes"), [("f4", "f4"), (">f8", "f8"), ("i4", "f8"), ("?", "f8"), ("O", "f8")]
)
def test_what_is_masked_is_nan_and_the_rest_is_as_it_was(way, dtype, becomes):
    numbers, mask = (X > 0).astype(dtype), np.abs(X) > 1
    rows = way(np.ma.masked_array(numbers, mask))
    assert rows.dtype == becomes
    assert type(rows) is np.ndarray
    np.testing.assert_array_equal(rows, np.where(mask, np.nan, numbers.astype("f8")))


@every_way
def test_a_mask_over_nothing_changes_nothing(way):
    rows = way(np.ma.masked_array(X > 0))
    assert rows.dtype == "?"
    np.testing.assert_array_equal(rows, X > 0)


@pytest.mark.parametrize("backend", ["cpu", "sim"])
def test_masked_rows_are_nan_in_every_source_and_the_others_are_right(backend):
    mask = np.zeros(X.shape, bool)
    mask[7, 2] = True
    rows = np.ma.masked_array(np.where(mask, -9999, X), mask)
    whole = NET(np.where(mask, np.nan, X).astype("f4"))
    sources = rows, list(rows), nnxp.Columns(rows[:, :2], rows[:, 2]), Source(rows.__getitem__)
    for x in sources:
        np.testing.assert_allclose(nnxp.predict(NET, x, backend), whole, rtol=1e-5, atol=1e-6)


# objects, lists, byte order


@every_way
def test_objects_that_are_real_numbers_are_those_numbers(way):
    kinds = [1, 2.5, True, np.float32(0.1), np.int8(-3), Fraction(1, 4), Decimal("0.1"), np.True_]
    objects = np.array([[kind] for kind in kinds], object)
    np.testing.assert_array_equal(way(objects), [[float(kind)] for kind in kinds])


@given(hnp.arrays(object, (4, 2), elements=st.integers(-(2**63), 2**63 - 1) | st.booleans()))
def test_whole_objects_stay_exact_to_the_last_digit(objects):
    assert host_rows(objects).tolist() == objects.astype("int64").tolist()


@every_way
@pytest.mark.parametrize("one", [None, "1", b"1", 1j, [1], np.datetime64("2020"), object()])
def test_objects_that_are_no_real_numbers_are_refused_by_name(way, one):
    objects = np.full((20, 1), 1.0, object)
    objects[13, 0] = one
    with pytest.raises(nnxp.DtypeMismatch, match=rf"real numbers.*{type(one).__name__}"):
        way(objects)


@given(hnp.arrays(hnp.floating_dtypes() | hnp.integer_dtypes() | hnp.unsigned_integer_dtypes(), 5))
def test_every_real_type_in_every_byte_order_becomes_native_and_keeps_its_value(rows):
    given_rows = host_rows(rows)
    assert given_rows.dtype == rows.dtype.newbyteorder("=")
    assert given_rows.dtype.isnative
    np.testing.assert_array_equal(given_rows, rows)


@pytest.mark.parametrize(
    ("block", "fix"),
    [
        (np.array([["a"]]), "numbers of text"),
        (np.array([[b"a"]]), "numbers of text"),
        (np.ones((2, 2), complex), "x.real"),
        (np.zeros((2, 2), "M8[s]"), "timedelta64"),
        (np.zeros((2, 2), "m8[s]"), "timedelta64"),
        (np.zeros(2, "f4,f4"), "structured_to_unstructured"),
        ({"a": X[:, 0], "b": X[:, 1]}, r"nnxp.Columns\(x\['a'\], x\['b'\]\)"),
        ([[1, "b"]], "numbers of text"),
        ([[10**400]], "larger than any float64"),
    ],
)
def test_what_holds_no_numbers_is_refused_with_the_fix(block, fix):
    for ask in (host_rows, source_of, lambda x: nnxp.predict(NET, x, "cpu")):
        with pytest.raises(nnxp.DtypeMismatch, match=fix):
            ask(block)
    with pytest.raises(nnxp.DtypeMismatch, match=fix):
        nnxp.predict(NET, Source(lambda rows: block), "cpu")


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        ("x.npy", nnxp.DtypeMismatch, "numpy.load"),
        ((row for row in X), nnxp.ShapeError, "predict_iter"),
        (3.0, nnxp.ShapeError, "no axis"),
        (None, nnxp.OptionError, "x is None"),
        ([[1, 2, 3], [1, 2]], nnxp.ShapeError, "no array of rows"),
        (Source(X.__getitem__, (np.nan, 3)), nnxp.ShapeError, "compute_chunk_sizes"),
        (Source(X.__getitem__, (None, 3)), nnxp.ShapeError, "how many rows"),
        (Source(X.__getitem__, 20), nnxp.ShapeError, "has the shape 20"),
        (Source(lambda rows: 3.0), nnxp.ShapeError, "a single number"),
        (Source(lambda rows: X[:1]), nnxp.ShapeError, "x gave 1 rows"),
        (Source(lambda rows: None), nnxp.DtypeMismatch, "None"),
    ],
)
def test_what_is_no_source_of_rows_is_refused_with_the_fix(x, error, words):
    with pytest.raises(error, match=words):
        nnxp.predict(NET, x, "cpu")


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_of_rows_is_rows_and_a_list_of_one_array_of_rows_is_refused(kind):
    np.testing.assert_array_equal(nnxp.predict(NET, kind(X), "cpu"), nnxp.predict(NET, X, "cpu"))
    np.testing.assert_array_equal(source_of(kind([X[0]])), X[:1])
    np.testing.assert_array_equal(source_of(kind([X[0].tolist()])), X[:1])
    with pytest.raises(nnxp.ShapeError, match=r"one array \(20, 3\).*x\[0\]"):
        nnxp.predict(NET, kind([X]), "cpu")


@pytest.mark.parametrize("x", [X.tolist(), memoryview(X), [array.array("f", row) for row in X]])
def test_what_numpy_makes_rows_of_is_rows(x):
    np.testing.assert_array_equal(host_rows(source_of(x)), X)


def test_a_list_may_hold_rows_of_any_kind():
    rows = [np.ma.masked_array([1, 2, 3], [0, 1, 0]), [4.0, 5.0, 6.0], np.array([7, 8, 9], ">i4")]
    np.testing.assert_array_equal(source_of(rows), [[1, np.nan, 3], [4, 5, 6], [7, 8, 9]])


# other libraries


@pytest.mark.parametrize(
    "kind", "csr_matrix csr_array csc_array coo_array bsr_array dok_array".split(" ")
)
@every_way
def test_sparse_rows_are_dense_block_by_block(way, kind):
    sparse = pytest.importorskip("scipy.sparse", reason="scipy is not installed")
    dense = np.where(np.abs(X) > 1, X, 0)
    if way is through_a_source and kind not in ("csr_matrix", "csr_array", "csc_array"):
        pytest.skip("a matrix of this form gives no rows, so no source of its user's slices it")
    np.testing.assert_array_equal(way(getattr(sparse, kind)(dense)), dense)


def test_a_sparse_array_that_is_a_mapping_is_rows_and_no_inputs_by_name():
    sparse = pytest.importorskip("scipy.sparse", reason="scipy is not installed")
    x, net = np.eye(4, dtype="float32"), nnxp.Dense(4, 2, rng=0)
    rows = sparse.dok_array(x)
    np.testing.assert_array_equal(nnxp.predict(net, rows), net(x))
    options = {"loss": "mean_square", "epochs": 1, "rng": 0}
    losses = [nnxp.fit(net, own, net(x), **options).history[0]["loss"] for own in (x, rows)]
    assert losses[0] == losses[1]


def tensors():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x = torch.from_numpy(X.copy())
    pair = torch.view_as_complex(torch.stack([x, -x], -1))
    return {
        "as it is": (x, X),
        "requires grad": (x.clone().requires_grad_(), X),
        "parameter": (torch.nn.Parameter(x.clone()), X),
        "bfloat16": (x.bfloat16(), x.bfloat16().float().numpy()),
        "float8": (x.to(torch.float8_e4m3fn), x.to(torch.float8_e4m3fn).float().numpy()),
        "negative bit": (pair.conj().imag, X),
        "integers": (x.int(), X.astype("i4")),
        "booleans": (x > 0, X > 0),
        "by columns": (x.T.contiguous().T, X),
    }


@every_way
def test_tensors_of_torch_are_their_numbers(way):
    for name, (x, same) in tensors().items():
        rows = way(x)
        assert type(rows) is np.ndarray, name
        np.testing.assert_array_equal(rows, same, err_msg=name)
    np.testing.assert_array_equal(source_of(list(tensors()["bfloat16"][0])).shape, X.shape)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # of torch's own
def test_tensors_that_are_no_rows_of_numbers_are_refused():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x = torch.from_numpy(X.copy())
    quantized = torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)
    for tensor in (x.to_sparse(), x.to_sparse_csr(), quantized, x + 0j):
        with pytest.raises(nnxp.DtypeMismatch, match=r"x\.(to_dense|dequantize|real)"):
            nnxp.predict(NET, tensor, "cpu")
    with pytest.raises(nnxp.DeviceMismatch, match="meta"):
        host_rows(x.to("meta"))


@every_way
def test_a_table_of_pyarrow_is_its_columns_and_nulls_are_nan(way):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    columns = {
        "real": pyarrow.array([0.5, None, 2.0]),
        "whole": pyarrow.array([1, 2, None]),
        "flag": pyarrow.array([True, None, False]),
        "decimal": pyarrow.array([Decimal("0.25"), Decimal(1), Decimal(2)]),
        "coded": pyarrow.array([5, 6, 5]).dictionary_encode(),
        "half": pyarrow.array(np.array([1, 2, 3], "f2")),
    }
    right = [[0.5, 1, 1, 0.25, 5, 1], [np.nan, 2, np.nan, 1, 6, 2], [2, np.nan, 0, 2, 5, 3]]
    table = pyarrow.table(columns)
    for x in (table, table.to_batches()[0], pyarrow.concat_tables([table[:1], table[1:]])):
        np.testing.assert_array_equal(way(x), right)
        assert columns_of(x) == columns_of(source_of(x)) == tuple(columns)
    with pytest.raises(nnxp.DtypeMismatch, match=r"column 'text': .*\(str\)"):
        way(table.append_column("text", pyarrow.array([None, "a", "b"])))


@every_way
def test_a_data_frame_is_its_columns_by_position(way):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = pandas.DataFrame(X, columns=["a", "b", "c"], index=np.arange(20.0)[::-1])
    np.testing.assert_array_equal(at_the_door(frame), X)  # although frame[0:5] goes by labels
    flags = frame.assign(b=frame["b"] > 0, c=pandas.array([1, None] * 10, "Int64"))
    right = np.column_stack([X[:, 0], X[:, 1] > 0, [1, np.nan] * 10])
    np.testing.assert_array_equal(at_the_door(flags), right)
    np.testing.assert_array_equal(way(flags.reset_index(drop=True)), right)
    assert columns_of(flags) == columns_of(source_of(flags)) == ("a", "b", "c")
    assert columns_of(frame.set_axis([0, 1, 2], axis=1)) is None
    for other in (["x"] * 20, pandas.date_range("2020", periods=20)):
        with pytest.raises(nnxp.DtypeMismatch, match="column 'b'"):
            nnxp.predict(NET, frame.assign(b=other), "cpu")


class Frame:
    """As a data frame that is no library's: columns by name, and object blocks."""

    columns, dtypes, shape = ("a", "b"), (bool, float), (20, 2)

    def __getitem__(self, asked):
        block = np.column_stack([(X[:, 0] > 0).astype(object), X[:, 1].astype(object)])
        return (
            block[:, self.columns.index(asked)] if isinstance(asked, str) else Slice(block[asked])
        )

    def __len__(self):
        return 20


class Slice(Frame):
    def __init__(self, block):
        self.block = block

    def __getitem__(self, name):
        return self.block[:, self.columns.index(name)]

    def __len__(self):
        return len(self.block)


def test_a_table_of_any_library_is_its_columns():
    np.testing.assert_array_equal(at_the_door(Frame()), np.column_stack([X[:, 0] > 0, X[:, 1]]))
    assert columns_of(Frame()) == ("a", "b")


def test_what_has_no_names_has_no_columns():
    for x in (X, X.tolist(), None, nnxp.Columns(X), Source(X.__getitem__)):
        assert columns_of(x) is None


# memory that is shared


def overlapping():
    """Sources, outs, and whether writing one would spoil the other."""
    a, big, row = draw((20, 3)), draw((40, 6)), draw((30,))
    windows = np.lib.stride_tricks.sliding_window_view(row, 3, writeable=True)
    there = np.empty_like(a)

    class Copies:
        shape = (20, 3)

        def __init__(self, held):
            self.held = held

        def __getitem__(self, rows):
            return np.concatenate(self.held)[rows] if isinstance(self.held, list) else 1 * self.held

    yield "itself", a, a, False
    yield "reversed", a, a[::-1], True
    yield "columns beside", big[:, :3], big[:, 3:], False
    yield "a row further", big[:-1], big[1:], True
    yield "columns, reversed", nnxp.Columns(a), a[::-1], True
    yield "columns of columns", nnxp.Columns(nnxp.Columns(a[:, :1]), a[:, 1:]), a[::-1], True
    yield "columns, itself", nnxp.Columns(a), a, False
    yield "columns, elsewhere", nnxp.Columns(a), there, False
    yield "windows", windows, windows, True
    yield "what windows look at", windows, row[:28, None], True
    yield "views", Source(a.__getitem__), a[::-1], True
    yield "views, itself", Source(a.__getitem__), a, False
    yield "views of a part", Source(big[:20].__getitem__), big[20:], False
    yield "held", Copies(a), a[::-1], True
    yield "held in a list", Copies([a[:10], a[10:]]), a[::-1], True
    yield "held, itself", Copies(a), a, False
    yield "held, elsewhere", Copies(a), there, False
    yield "a list, which is copied", list(a), a[::-1], False
    yield "masked", np.ma.masked_array(a), a[::-1], True


@pytest.mark.parametrize(
    ("x", "out", "shared"), [pytest.param(*case, id=name) for name, *case in overlapping()]
)
def test_out_that_would_spoil_rows_is_noticed_whatever_reads_them(x, out, shared):
    assert shares_memory(source_of(x), out) is shared


def test_out_in_the_memory_of_a_tensor_or_a_table_is_noticed():
    for name, (x, _) in tensors().items():
        memory = x.detach().view(-1) if x.is_contiguous() and not x.is_neg() else None
        if name in ("as it is", "requires grad"):
            out = memory.numpy().reshape(20, 3)[::-1]
            assert shares_memory(source_of(x), out), name
        assert not shares_memory(source_of(x), np.empty_like(X)), name
    torch = pytest.importorskip("torch", reason="torch is not installed")
    bits = np.zeros((20, 3), "i2")
    assert shares_memory(source_of(torch.from_numpy(bits).view(torch.bfloat16)), bits)


def test_out_in_the_memory_of_a_table_is_noticed():
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    column = draw((20,))
    table = pyarrow.table({"a": pyarrow.array(column)})
    assert shares_memory(source_of(table), column[::-1, None])
    assert not shares_memory(source_of(table), np.empty((20, 1), "f4"))


def test_two_maps_of_one_file_are_one_memory(tmp_path):
    np.save(tmp_path / "x.npy", X)
    (tmp_path / "link.npy").hardlink_to(tmp_path / "x.npy")
    np.save(tmp_path / "other.npy", X)
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    for name, shared in [("x.npy", True), ("link.npy", True), ("other.npy", False)]:
        out = np.load(tmp_path / name, mmap_mode="r+")
        assert shares_memory(x, out) is shared
        assert shares_memory(np.asarray(x)[3:], out) is shared
        assert shares_memory(nnxp.Columns(x), out) is shared
        assert not shares_memory(x[:10], out[10:])


def test_an_engine_refuses_an_out_that_would_spoil_its_rows(tmp_path):
    net = nnxp.Dense(3, 3, rng=0)
    a = X.copy()
    for x in (a, nnxp.Columns(a), Source(a.__getitem__)):
        with pytest.raises(nnxp.OptionError, match="overlaps"):
            nnxp.predict(net, x, "cpu", out=a[::-1])
    expected = net(X)
    np.testing.assert_allclose(
        nnxp.predict(net, nnxp.Columns(a), "cpu", out=a), expected, rtol=1e-5
    )
