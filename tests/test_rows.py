"""Rows in files: what is read is what was meant, what is written is whole, or is not there."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import nnxp
from conftest import draw
from nnxp._errors import OptionError
from nnxp.io import rows as module
from nnxp.io.rows import ENDINGS, Passing, RowsError, read_rows, written_rows

every_ending = pytest.mark.parametrize("ending", ENDINGS)


def write(path, rows):
    with written_rows(path, rows.shape, rows.dtype) as out:
        out[...] = rows


def npy(rows) -> bytes:
    file = io.BytesIO()
    np.save(file, rows)
    return file.getvalue()


def zipped(name, content) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr(name, content)
    return held.getvalue()


def npz(**arrays) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


ROWS = np.arange(12, dtype="float32").reshape(4, 3)
WHOLE = npy(ROWS)


# written and read again


@every_ending
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_what_is_written_is_read_again_to_the_last_bit(tmp_path, ending, dtype):
    rows = draw((50, 3), dtype)
    rows[0] = 0, np.inf, np.finfo(dtype).smallest_subnormal
    write(tmp_path / f"y{ending}", rows)
    assert np.array_equal(read_rows(tmp_path / f"y{ending}").astype(dtype), rows)


@every_ending
def test_bfloat16_is_written_as_float32_because_no_numpy_file_can_name_it(tmp_path, ending):
    pytest.importorskip("ml_dtypes", reason="there is no bfloat16 without ml_dtypes")
    rows = draw((50, 3), "bfloat16")
    write(tmp_path / f"y{ending}", rows)
    assert np.array_equal(read_rows(tmp_path / f"y{ending}").astype(rows.dtype), rows)


@every_ending
def test_an_ending_may_be_in_capitals(tmp_path, ending):
    write(tmp_path / f"Y{ending.upper()}", ROWS)
    assert [each.name for each in tmp_path.iterdir()] == [f"Y{ending.upper()}"]
    assert np.array_equal(read_rows(tmp_path / f"Y{ending.upper()}"), ROWS)


@pytest.mark.parametrize("ending", [".npy", ".npz"])
@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0,), (2, 3, 4), (5,)])
def test_no_rows_and_any_number_of_axes_are_written_and_read(tmp_path, ending, shape):
    write(tmp_path / f"y{ending}", np.ones(shape, "float32"))
    assert read_rows(tmp_path / f"y{ending}").shape == shape


def test_a_npy_file_is_mapped_and_not_read(tmp_path):
    np.save(tmp_path / "x.npy", ROWS)
    rows = read_rows(tmp_path / "x.npy")
    assert isinstance(rows, np.memmap)
    assert not rows.flags.writeable


@pytest.mark.parametrize("dtype", [">f4", "uint8", "bool", "int64", "float16"])
def test_real_numbers_of_any_type_and_order_are_read(tmp_path, dtype):
    np.save(tmp_path / "x.npy", np.asfortranarray(ROWS.astype(dtype)))
    assert np.array_equal(read_rows(tmp_path / "x.npy"), ROWS.astype(dtype))


def test_an_array_of_a_npz_file_is_taken_by_its_key(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", a=ROWS, b=ROWS + 1)
    assert np.array_equal(read_rows(tmp_path / "x.npz", "b"), ROWS + 1)


# .csv


@pytest.mark.parametrize(
    "text",
    [
        "1,2\n3,4\n",
        "1,2\r\n3,4",
        "a,b\n1,2\n3,4\n",
        '"a","b"\n1,2\n3,4\n',
        "\ufeffa,b\n1,2\n3,4\n",
        "\ufeff1,2\n3,4\n",
        "\n  \nname, other\n\n1,2\n \t\n 3 , 4.0e0 \n\n",
        "+1,2.\n3,4\n",
    ],
)
def test_a_csv_file_may_have_names_blank_lines_and_any_line_ends(tmp_path, text):
    (tmp_path / "x.csv").write_text(text, encoding="utf-8", newline="")
    assert read_rows(tmp_path / "x.csv").tolist() == [[1, 2], [3, 4]]


def test_one_column_and_one_row_are_still_rows_and_columns(tmp_path):
    (tmp_path / "x.csv").write_text("1\n2\n")
    assert read_rows(tmp_path / "x.csv").shape == (2, 1)
    (tmp_path / "x.csv").write_text("1,2\n")
    assert read_rows(tmp_path / "x.csv").shape == (1, 2)


def test_nan_and_infinity_are_numbers(tmp_path):
    (tmp_path / "x.csv").write_text("nan,inf\n-inf,1\n")
    assert np.array_equal(
        read_rows(tmp_path / "x.csv"), [[np.nan, np.inf], [-np.inf, 1]], equal_nan=True
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2\n3,4\n\n5,x\n6,7\n", r"line 4: .*'x'.*column 2"),
        ("1,2\n3,4\n\n5,6,7\n", "line 4: the number of columns changed from 2 to 3"),
        ("a,b\n1,2\n3\n", "line 3: the number of columns changed from 2 to 1"),
        ("1,2\n3,\n", "line 2: .*''"),
        ("1,x\n3,4\n", "line 1: .*'x'"),  # a bad row, not names: it has a number
        ("NA,NA\n3,4\n", "line 1: .*'NA'"),
        ("1,2\n#3,4\n", "line 2: .*'#3'"),
        ("1,2\n" * 60000 + "1,x\n", "line 60001: .*'x'"),  # NumPy reads 50000 rows at a time
        ("1,2\n3,4\0\n", "line 2"),
        ("", "no rows"),
        ("\n \n", "no rows"),
        ("a,b\n", "no rows"),
    ],
)
def test_a_bad_csv_file_is_refused_with_the_number_of_the_line(tmp_path, text, message):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(RowsError, match=message) as refused:
        read_rows(tmp_path / "x.csv")
    assert str(refused.value).startswith(str(tmp_path / "x.csv"))
    assert len(str(refused.value).splitlines()) == 1


def test_a_csv_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"\xff\xfe1\x00,\x002\x00")
    with pytest.raises(RowsError, match="not text"):
        read_rows(tmp_path / "x.csv")


# .npy and .npz that are not what they seem


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"hello, I am no array at all", id="junk"),
        pytest.param(WHOLE[:-1], id="truncated"),
        pytest.param(WHOLE[:60], id="header-truncated"),
        pytest.param(WHOLE.replace(b"(4, 3)", b"(4,-3)"), id="negative"),
        pytest.param(WHOLE.replace(b"(4, 3), }    ", b"(4, 1<<99), }"), id="arithmetic"),
        pytest.param(WHOLE.replace(b"(4, 3), }       ", b"(4, 3000000000)}"), id="huge"),
        pytest.param(WHOLE.replace(b"(4, 3), }", b"(4, 3,   "), id="unclosed"),
        pytest.param(WHOLE.replace(b"descr", b"descq"), id="no-dtype"),
        pytest.param(npz(a=ROWS), id="npz"),
        pytest.param(npy(np.float32(3)), id="a-number"),
        pytest.param(npy(np.array([[{}]])), id="objects"),
        pytest.param(npy(np.array([["a"]])), id="strings"),
        pytest.param(npy(np.array([[1j]])), id="complex"),
        pytest.param(npy(np.array([(1, 2)], "i4,i4")), id="records"),
        pytest.param(npy(np.array([["2020-01-01"]], "M8[D]")), id="dates"),
    ],
)
def test_what_is_not_a_whole_npy_file_of_rows_is_refused(tmp_path, content):
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(RowsError, match=r"x\.npy"):
        read_rows(tmp_path / "x.npy")


@pytest.mark.parametrize(
    ("content", "key", "message"),
    [
        (b"", None, "not a whole"),
        (b"hello, I am no archive", None, "not a whole"),
        (npz(a=ROWS)[:-30], None, "not a whole"),
        (WHOLE, None, ".npy file by its content"),
        (npz(), None, "holds no arrays"),
        (npz(a=np.array([[{}]])), None, "not a whole"),
        (npz(a=np.array([["a"]])), None, "real numbers"),
        (npz(a=np.float32(3)), None, "single number"),
        (zipped("a.txt", b"1, 2"), None, "a.txt is no array"),
    ],
)
def test_what_is_not_a_npz_file_with_that_array_is_refused(tmp_path, content, key, message):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(RowsError, match=message):
        read_rows(tmp_path / "x.npz", key)


@pytest.mark.parametrize(
    ("content", "key", "message"),
    [
        (npz(a=ROWS, b=ROWS), None, r"holds 2 arrays \(a, b\)"),
        (npz(a=ROWS), "c", "has no 'c'; it holds a"),
    ],
)
def test_an_array_of_a_npz_file_that_is_not_named_right_is_a_wrong_call(
    tmp_path, content, key, message
):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(nnxp.OptionError, match=message):
        read_rows(tmp_path / "x.npz", key)


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["NNXP_TEST_BOMB"],)


@pytest.mark.parametrize("ending", [".npy", ".npz"])
def test_a_pickle_in_a_file_is_never_run(tmp_path, monkeypatch, ending):
    monkeypatch.setenv("NNXP_TEST_BOMB", str(tmp_path / "exploded"))
    objects = np.array([[Bomb()]])
    (tmp_path / f"x{ending}").write_bytes(npy(objects) if ending == ".npy" else npz(a=objects))
    with pytest.raises(RowsError):
        read_rows(tmp_path / f"x{ending}")
    assert not (tmp_path / "exploded").exists()


def test_a_damaged_member_of_an_archive_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        file.writestr("a.npy", WHOLE[:-5])
    with pytest.raises(RowsError, match="not a whole"):
        read_rows(tmp_path / "x.npz")


@pytest.mark.parametrize("name", ["x", "x.txt", "x.npy.gz", ".npy"])
def test_an_unknown_ending_is_refused_for_reading_and_writing(tmp_path, name):
    with pytest.raises(OptionError, match=r"\.npy, \.npz, \.csv"):
        read_rows(tmp_path / name)
    with pytest.raises(OptionError), written_rows(tmp_path / name, (1, 1), ROWS.dtype):
        pass
    assert not any(tmp_path.iterdir())


def test_a_key_means_nothing_but_for_a_npz_file(tmp_path):
    with pytest.raises(OptionError, match="'a'"):
        read_rows(tmp_path / "x.npy", "a")


@every_ending
def test_a_file_that_is_not_there_is_an_oserror(tmp_path, ending):
    with pytest.raises(FileNotFoundError):
        read_rows(tmp_path / f"x{ending}")


# whole or not there


def fail_half_way(out, error):
    out[: len(out) // 2] = 1
    raise error


@every_ending
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path, ending, error):
    path = tmp_path / f"y{ending}"
    path.write_text("old")
    with pytest.raises(error), written_rows(path, (4, 3), ROWS.dtype) as out:
        fail_half_way(out, error)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "old"


@every_ending
def test_nothing_stands_in_the_place_before_all_is_written(tmp_path, ending):
    path = tmp_path / f"y{ending}"
    with written_rows(path, (4, 3), ROWS.dtype) as out:
        out[...] = 1
        assert not path.exists()
    assert read_rows(path).tolist() == [[1, 1, 1]] * 4


@pytest.mark.parametrize("shape", [(4, 3, 2), (4, 3, 2, 1)])
def test_a_csv_file_has_two_axes(tmp_path, shape):
    with (
        pytest.raises(OptionError, match="rows and columns"),
        written_rows(tmp_path / "y.csv", shape, ROWS.dtype),
    ):
        pass
    assert not any(tmp_path.iterdir())


@every_ending
def test_a_disk_without_room_is_found_before_any_work_is_done(tmp_path, ending):
    """A map of a full disk would end the process by a signal, with no message at all."""
    pytest.importorskip("resource", reason="limits on a file's size are POSIX")
    program = f"""
import resource, sys
import numpy as np
from nnxp.io.rows import written_rows
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    with written_rows("y{ending}", (1 << 20, 3), np.dtype("float32")):
        print("work")
except OSError as error:
    print(type(error).__name__, error.filename)
"""
    run = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == (f"OSError y{ending}\n", "")
    assert not any(tmp_path.iterdir())


def test_the_room_is_taken_and_not_only_named(tmp_path):
    if not hasattr(os, "posix_fallocate"):
        pytest.skip("this system cannot take room on a disk beforehand")
    with written_rows(tmp_path / "y.npy", (1 << 18, 4), ROWS.dtype):
        (beside,) = tmp_path.iterdir()
        assert beside.stat().st_blocks * 512 >= 1 << 22


# memory


def mapped_pages() -> int:
    """The bytes of files that lie in this process's memory."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssFile:")[2].split()[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_rows_that_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PASSED", 1 << 20)
    size = 32 << 20
    write(tmp_path / "x.npy", np.ones((size // 4096, 1024), "float32"))
    x = read_rows(tmp_path / "x.npy")
    before, most = mapped_pages(), 0
    with written_rows(tmp_path / "y.npy", x.shape, x.dtype) as out:
        passing = Passing(x, out)
        for start in range(0, len(x), 64):
            rows = slice(start, start + 64)
            out[rows] = passing[rows] * 2
            most = max(most, mapped_pages() - before)
    assert most < size // 4
    assert (read_rows(tmp_path / "y.npy") == 2).all()  # no page was lost on the way


def test_rows_that_pass_are_the_rows_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PASSED", 1)
    rows = draw((500, 3))
    np.save(tmp_path / "x.npy", rows)
    passing = Passing(read_rows(tmp_path / "x.npy"))
    assert (passing.shape, passing.dtype) == (rows.shape, rows.dtype)
    for start in (400, 0, 499, 100, 400):
        assert np.array_equal(passing[start : start + 50], rows[start : start + 50])
    assert np.array_equal(Passing(rows)[3:5], rows[3:5])  # an array that no file stands behind
    assert Passing(rows[:0])[0:5].shape == (0, 3)
