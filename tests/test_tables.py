"""Tables: every number is read as it is written, no row is taken for names, and none is lost."""

from __future__ import annotations

import csv
import gzip
import io
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nnxp
from conftest import draw
from nnxp._errors import BackendUnavailable, OptionError, RowsError
from nnxp._exchange import columns_of
from nnxp.io import rows as rows_module
from nnxp.io import tables
from nnxp.io.rows import appended_rows, open_rows, read_rows, written_rows
from nnxp.io.tables import Reading


@pytest.fixture(params=["pyarrow", "numpy"])
def reader(request, monkeypatch):
    """Both readers of text: they keep the same rules."""
    if request.param == "pyarrow":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    else:
        monkeypatch.setattr(tables, "_pyarrow", lambda module: None)
    return request.param


@pytest.fixture
def table(tmp_path):
    """What reads a text as a file with this ending, and what was said of it."""

    def read(text, ending=".csv", **options):
        data = text if isinstance(text, bytes) else text.encode()
        (tmp_path / f"x{ending}").write_bytes(gzip.compress(data) if "gz" in ending else data)
        said.clear()
        return read_rows(tmp_path / f"x{ending}", reading=Reading(**options, say=said.append))

    said = read.said = []
    return read


# numbers


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize(
    "text",
    [
        '"","a","b"\n"1",0.5,2\n"2",-1e-3,4\n',
        '"1","0.5","2"\r\n"2","-1e-3","4"\r\n',
        '1 , "0.5" ,2\n2, "-1e-3", 4\n',
        "\ufeff1,+.5,2.\n\n  \n2,-1E-3,4\n",
        "1,0.5,2\r2,-1e-3,4\r",
        '"x"\t"y"\t"z"\n1\t.5\t2\n2\t-0.001\t4',
        "x;y;z\n1;.5;2\n2;-0.001;4",
        "1|.5|2\n2|-0.001|4",
    ],
)
def test_numbers_in_any_dress_are_read(table, text):
    assert table(text).tolist() == [[1, 0.5, 2], [2, -0.001, 4]]


def written(rows, **dialect):
    text = io.StringIO()
    csv.writer(text, **dialect).writerows(rows)
    return text.getvalue()


floats = st.floats(width=64) | st.integers(-(10**20), 10**20).map(float)


@pytest.mark.parametrize("fast", [True, False])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_float_is_read_back_exactly_in_every_dialect_and_in_pieces(
    tmp_path_factory, fast, data
):
    path = tmp_path_factory.mktemp("table") / "x.csv"
    width = data.draw(st.integers(2, 4))
    rows = data.draw(st.lists(st.lists(floats, min_size=width, max_size=width), min_size=1))
    dialect = {
        "delimiter": data.draw(st.sampled_from(",;\t|")),
        "quoting": data.draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])),
        "lineterminator": data.draw(st.sampled_from(["\n", "\r\n"])),
    }
    names = data.draw(st.sampled_from([None, ["a", "b_1", "ö", "x(1)"][:width]]))
    path.write_text(written([*([names] if names else []), *rows], **dialect), newline="")
    reading = Reading(header=None if names else False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "CHUNK", data.draw(st.integers(1, 200)))
        if not fast:
            patch.setattr(tables, "_pyarrow", lambda module: None)
        source = open_rows(path, reading=reading)
        np.testing.assert_array_equal(np.concatenate(list(source)), rows)
        assert columns_of(source) == (tuple(names) if names else None)
        assert source.passed == source.size


def test_pyarrow_reads_the_same_bits_as_python(table):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    rng = np.random.default_rng(0)
    words = [f"{x:.{n}g}" for n in (3, 9, 15, 17, 25) for x in rng.normal(size=500) * 1e10]
    words += ["5e-324", "2.2250738585072011e-308", "1.7976931348623157e308", "9007199254740993"]
    assert table("\n".join(words), header=False)[:, 0].tolist() == [float(word) for word in words]


# is the first line names?


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize(
    "names",
    [
        "a,b",
        '"",a',
        "0_0,0_1",
        "Größe (cm),体重",
        "x[0],x[1]",
        "100m time,Q1 2020",
        "name,NaN share",
        "_,__",
        "date,truth",
        "no,yes",
        "a;b,c d",
        "is true,jan",
    ],
)
def test_names_are_names(table, names):
    assert table(f"{names}\n1,2\n3,4\n").tolist() == [[1, 2], [3, 4]]
    assert table.said == []


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize(
    "line",
    [
        "#N/A,#N/A",
        "\\N,\\N",
        "5%,7%",
        "$5,€7",
        "2020-01-01,2020-01-02",
        "01/02/2020,x",
        "2020-01-01T10:00:00,b",
        "1 Jan 2020,2 Feb 2020",
        "Jan 5 2020,b",
        "12:30,b",
        "True,False",
        "#DIV/0!,#VALUE!",
        "?,?",
        ",",
        "1,x",
        "x,1",
        "nan,x",
        "-,null",
        '"1,000","2,000"',
        "5kg,7kg",
    ],
)
def test_a_line_that_may_be_a_row_is_never_passed_over(table, line):
    following = "5kg,7kg" if "kg" in line else "3,4"
    with pytest.raises(RowsError, match=r"line 1: .* in column [12] .*--header"):
        table(f"{line}\n{following}\n5,6\n")
    if "kg" not in line:
        assert table(f"{line}\n3,4\n", header=True).tolist() == [[3, 4]]


@pytest.mark.usefixtures("reader")
def test_where_a_line_could_be_either_it_is_said_what_was_decided(table):
    assert table("0,1,2\n1.5,2,3\n4,5,6.25\n").tolist() == [[1.5, 2, 3], [4, 5, 6.25]]
    assert "0 to 2 are taken as names" in table.said[0]
    assert table(",0,1\n0,1.5,2\n1,4,5\n").tolist() == [[0, 1.5, 2], [1, 4, 5]]
    assert "0 to 1 are taken as names" in table.said[0]
    assert table("1M,10Y\n1,2\n").tolist() == [[1, 2]]
    assert "'1M' is taken as the name" in table.said[0]
    assert table("0\n1\n").tolist() == [[0], [1]]
    assert "0 is taken as a row" in table.said[0]
    for text, rows in [("0,1,2\n", [[0, 1, 2]]), ("0,1,3\n4,5,6\n", [[0, 1, 3], [4, 5, 6]])]:
        assert table(text).tolist() == rows
        assert table.said == []


@pytest.mark.usefixtures("reader")
def test_what_is_asked_goes_before_what_is_found(table):
    assert table("0,1\n2,3\n", header=False).tolist() == [[0, 1], [2, 3]]
    assert table("5,1\n2,3\n", header=True).tolist() == [[2, 3]]
    assert table("0\n2\n", header=True).tolist() == [[2]]
    assert table.said == []
    with pytest.raises(RowsError, match="line 1: 'a'"):
        table("a,b\n1,2\n", header=False)
    with pytest.raises(RowsError, match="only names"):
        table("1,2\n", header=True)


# delimiters, columns, missing values


@pytest.mark.usefixtures("reader")
def test_the_delimiter_is_found_said_and_named(table):
    assert table("a;b\n1;2\n").tolist() == [[1, 2]]
    assert "delimiter is ';'" in table.said[0]
    assert table("a\tb\n1\t2\n", ".tsv").tolist() == [[1, 2]]
    assert table("a,b\n1,2\n", ".tsv.gz").tolist() == [[1, 2]]
    assert "delimiter is ','" in table.said[0]
    assert table("1:2\n3:4\n", delimiter=":").tolist() == [[1, 2], [3, 4]]
    assert table("1;2,3\n4;5,6\n", delimiter=";", columns=[0]).tolist() == [[1], [4]]
    for wrong in ("", ",,", '"', "\n", "§"):
        with pytest.raises(OptionError, match="delimiter"):
            Reading(delimiter=wrong)


@pytest.mark.usefixtures("reader")
def test_columns_are_taken_by_name_or_number_in_the_order_asked_for(table):
    text = "id,b,1,c\nx y,2,3,4\nz,6,7,8\n"
    assert table(text, columns=["c", "b"]).tolist() == [[4, 2], [8, 6]]
    assert table(text, columns=["1", 3, 3], header=True).tolist() == [[3, 4, 4], [7, 8, 8]]
    assert table("9,2\n6,5\n", columns=["1"]).tolist() == [[2], [5]]
    with pytest.raises(RowsError, match=r"line 2: 'x y' in column 1 \(id\)"):
        table(text, columns=["id"])
    with pytest.raises(OptionError, match=r"no column 'd'; it has id, b, 1, c"):
        table(text, columns=["d"])
    with pytest.raises(OptionError, match=r"no column '2'; it has 2 columns without names"):
        table("9,2\n6,5\n", columns=["2"])
    with pytest.raises(OptionError, match="2 columns 'a': take it by number"):
        table("a,a\n1,2\n", columns=["a"])
    with pytest.raises(RowsError, match="line 3: the number of columns changed from 2 to 3"):
        table("a,b\n1,2\n3,4,5\n", columns=["a"])


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("mark", ["", '""', "NA", "n/a", "#N/A", "\\N", "null", "None", "-", "?"])
def test_missing_values_are_an_error_or_what_is_asked_for(table, mark):
    text = f"a,b\n1,2\n3,{mark}\n5,nan\n"
    said = r"line 3: .* in column 2 \(b\) is a missing value; --missing 0"
    with pytest.raises(RowsError, match=said):
        table(text)
    nan = np.nan
    np.testing.assert_array_equal(table(text, missing=nan), [[1, 2], [3, nan], [5, nan]])
    np.testing.assert_array_equal(table(text, missing=-1), [[1, 2], [3, -1], [5, nan]])


# texts that are long, broken or no texts


@pytest.mark.usefixtures("reader")
def test_lines_are_counted_over_pieces(table, monkeypatch):
    monkeypatch.setattr(tables, "CHUNK", 64)
    body = "".join(f"{i},{i}.5\n" + "\n" * (i % 3) for i in range(200))
    text = f"\n\na,b\n{body}"
    assert table(text).tolist() == [[i, i + 0.5] for i in range(200)]
    line = text.splitlines().index("150,150.5") + 1
    with pytest.raises(RowsError, match=rf"line {line}: 'x' in column 2 \(b\)"):
        table(text.replace("\n150,150.5", "\n150,x"))


@pytest.mark.usefixtures("reader")
def test_a_whole_piece_with_more_columns_is_noticed(table, monkeypatch):
    monkeypatch.setattr(tables, "CHUNK", 40)
    with pytest.raises(RowsError, match="line 101: the number of columns changed from 2 to 3"):
        table("1,2\n" * 100 + "1,2,3\n" * 100)


@pytest.mark.usefixtures("reader")
def test_what_is_no_table_is_refused(table, tmp_path, monkeypatch):
    for data, words in [
        (b"", "no rows"),
        (b"\n \n", "no rows"),
        (b"a,b\n", "no rows"),
        ("1,ö\n".encode("latin-1"), "UTF-8"),
        (b"1,2\n" * 10**5 + "1,ö\n".encode("latin-1"), "UTF-8"),
        (b"1,2\n3,4\n5\n", "line 3: the number of columns changed from 2 to 1"),
        (b'1,"2\n3,4\n', "line 1"),
        (b"1,2\n3,1_0\n", "line 2: '1_0'"),
        (b"1,2\n3,0x10\n", "line 2: '0x10'"),
        ("1,2\n3,\uff14\n".encode(), "line 2: '\uff14'"),
    ]:
        with pytest.raises(RowsError, match=words):
            table(data)
    whole = gzip.compress(b"1,2\n" * 10000)
    for broken in (whole[:-20], b"no gzip", whole[:50] + b"junk" * 9 + whole[86:]):
        (tmp_path / "x.csv.gz").write_bytes(broken)
        with pytest.raises(RowsError, match=r"x\.csv\.gz is not a whole gzip file"):
            read_rows(tmp_path / "x.csv.gz")
    monkeypatch.setattr(tables, "CHUNK", 100)
    monkeypatch.setattr(tables, "LONGEST_LINE", 1000)
    with pytest.raises(RowsError, match="a line has more than"):
        table("1" * 5000)


# Parquet and Arrow


@pytest.fixture
def arrow():
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    return pyarrow


def save(arrow, path, table, **options):
    if path.suffix == ".parquet":
        arrow.parquet.write_table(table, path, **options)
    else:
        with arrow.ipc.new_file(path, table.schema) as file:
            file.write_table(table, **options)


every_binary = pytest.mark.parametrize("ending", tables.BINARIES)


@every_binary
def test_columns_of_a_binary_table_are_read_in_batches(arrow, tmp_path, monkeypatch, ending):
    monkeypatch.setattr(tables, "BATCH", 7)
    columns = {
        "a": np.arange(50.0),
        "b": np.arange(50, dtype="i4"),
        "text": ["x"] * 50,
        "c": np.arange(50) % 2 == 0,
    }
    save(arrow, tmp_path / f"x{ending}", arrow.table(columns))
    reading = Reading(columns=["c", "a", "1"])
    source = open_rows(tmp_path / f"x{ending}", reading=reading)
    assert (columns_of(source), source.size) == (("c", "a", "b"), 50)
    batches = list(source)
    assert max(map(len, batches)) == 7
    assert source.passed == 50
    right = np.column_stack([columns["c"], columns["a"], columns["b"]])
    np.testing.assert_array_equal(np.concatenate(batches), right)
    with pytest.raises(RowsError, match=r"column 'text'.*\(str\)"):
        read_rows(tmp_path / f"x{ending}")


@every_binary
def test_columns_of_one_name_are_each_read(arrow, tmp_path, ending):
    path = tmp_path / f"x{ending}"
    save(arrow, path, arrow.Table.from_arrays([[1, 2], [3, 4], [5, 6]], names=["a", "b", "a"]))
    assert read_rows(path).tolist() == [[1, 3, 5], [2, 4, 6]]
    assert read_rows(path, reading=Reading(columns=["2", "b"])).tolist() == [[5, 3], [6, 4]]
    with pytest.raises(OptionError, match="2 columns 'a'"):
        read_rows(path, reading=Reading(columns=["a"]))


@every_binary
def test_missing_values_of_a_binary_table(arrow, tmp_path, ending):
    path = tmp_path / f"x{ending}"
    save(arrow, path, arrow.table({"a": [1, 2, 3], "b": arrow.array([1.5, None, float("nan")])}))
    with pytest.raises(RowsError, match=r"row 1 \(from 0\): a value is missing in column 2 \(b\)"):
        read_rows(path)
    np.testing.assert_array_equal(
        read_rows(path, reading=Reading(missing=-1.0)), [[1, 1.5], [2, -1], [3, np.nan]]
    )
    assert np.isnan(read_rows(path, reading=Reading(missing=np.nan))[1, 1])


def test_a_stream_of_arrow_is_read(arrow, tmp_path):
    with arrow.ipc.new_stream(tmp_path / "x.arrow", arrow.schema({"a": arrow.int8()})) as file:
        file.write_table(arrow.table({"a": np.arange(5, dtype="i1")}))
    rows = read_rows(tmp_path / "x.arrow")
    assert (rows.tolist(), rows.dtype) == ([[0], [1], [2], [3], [4]], "int8")


@every_binary
def test_what_is_no_binary_table_is_refused(arrow, tmp_path, ending):
    path = tmp_path / f"x{ending}"
    save(arrow, path, arrow.table({"a": np.arange(5000.0)}))
    whole = path.read_bytes()
    for broken in (b"", b"1,2\n3,4\n", whole[:-30], whole[: len(whole) // 2]):
        path.write_bytes(broken)
        with pytest.raises(RowsError, match=rf"x\{ending}"):
            read_rows(path)
    save(arrow, path, arrow.table({"a": [[1.0], [2.0]]}))
    with pytest.raises(RowsError, match="column 'a'"):
        read_rows(path)
    for option in ({"header": True}, {"delimiter": ";"}):
        with pytest.raises(OptionError, match="only text"):
            read_rows(path, reading=Reading(**option))


@every_binary
def test_without_pyarrow_a_binary_table_is_refused_with_the_fix(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(tables, "_pyarrow", lambda module: None)
    (tmp_path / f"x{ending}").write_bytes(b"")
    with pytest.raises(BackendUnavailable, match=r"nnxp\[tables\]"):
        read_rows(tmp_path / f"x{ending}")
    with (
        pytest.raises(BackendUnavailable, match=r"nnxp\[tables\]"),
        written_rows(tmp_path / f"y{ending}", (1, 1), np.dtype("f4")),
    ):
        pass


@pytest.mark.parametrize("option", [{"header": True}, {"columns": ["a"]}, {"missing": 0.0}])
def test_options_of_tables_mean_nothing_for_arrays(tmp_path, option):
    np.save(tmp_path / "x.npy", draw((3, 2)))
    with pytest.raises(OptionError, match="only a table"):
        read_rows(tmp_path / "x.npy", reading=Reading(**option))


# writing


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("ending", [".npy", ".npz", *tables.TEXTS, *tables.BINARIES])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_what_is_appended_is_read_again_to_the_last_bit(tmp_path, ending, dtype, request):
    if ending in tables.BINARIES and request.node.callspec.params["reader"] == "numpy":
        pytest.skip("only pyarrow writes Parquet and Arrow")
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="there is no bfloat16 without ml_dtypes")
    rows = draw((50, 3), dtype)
    rows[0] = [0, np.inf, -np.inf]
    with appended_rows(tmp_path / f"y{ending}", (3,), rows.dtype, ["a", "b,", 'c"']) as append:
        for start in (0, 20, 20, 40):
            append(rows[start : {0: 20, 20: 20, 40: 50}[start]])
        append(rows[20:40])
    order = np.r_[0:20, 40:50, 20:40]
    source = open_rows(tmp_path / f"y{ending}")
    again = read_rows(tmp_path / f"y{ending}")
    np.testing.assert_array_equal(again.astype(rows.dtype), rows[order])
    if ending not in (".npy", ".npz"):
        assert columns_of(source) == ("a", "b,", 'c"')


@pytest.mark.parametrize("ending", [".npy", ".npz", ".csv"])
@pytest.mark.parametrize("row", [(3,), (), (2, 2)])
def test_no_rows_and_other_axes_are_appended(tmp_path, ending, row):
    if ending == ".csv" and len(row) > 1:
        pytest.skip("a text has two axes")
    path = tmp_path / f"y{ending}"
    for count in (0, 5):
        with appended_rows(path, row, np.dtype("f4")) as append:
            append(np.ones((count, *row), "f4"))
        if ending != ".csv":
            assert read_rows(path).shape == (count, *row)
    if ending == ".csv":
        assert read_rows(path).shape == (5, 3 if row else 1)


def test_a_failure_while_appending_leaves_nothing(tmp_path):
    def fail():
        with appended_rows(tmp_path / "y.csv", (2,), np.dtype("f4")) as append:
            append(np.ones((3, 2), "f4"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_a_map_is_let_go_of_before_its_file_is_renamed(tmp_path, monkeypatch):
    """Windows renames no file that is mapped."""
    renamed, replace = [], os.replace

    def strict(source, target):
        assert str(source) not in Path("/proc/self/maps").read_text()
        renamed.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", strict)
    with written_rows(tmp_path / "y.npy", (4, 3), np.dtype("f4")) as out:
        out[...] = 2
        del out
    assert renamed == ["y.npy"]
    assert (read_rows(tmp_path / "y.npy") == 2).all()


def test_the_names_of_columns_must_be_as_many(tmp_path):
    with (
        pytest.raises(OptionError, match="2 names for 3 columns"),
        written_rows(tmp_path / "y.csv", (1, 3), np.dtype("f4"), ["a", "b"]),
    ):
        pass


def test_rows_that_pass_share_their_memory():
    x = draw((5, 3))
    assert nnxp._exchange.shares_memory(rows_module.Passing(x), x[::-1])
