"""`nnxp train`: a table becomes a network that predict reads, and a report that can be trusted."""

from __future__ import annotations

import json

import numpy as np
import pytest

import nnxp
from conftest import draw
from nnxp._errors import OptionError, RowsError
from nnxp.io.tables import Reading
from nnxp.training.table import _split, train_on_table
from test_cli import fails, nnxp_

NAMES = ["a", "b", "c"]


def write(path, x, target, header=True):
    lines = [",".join([*NAMES, "kind"])] if header else []
    lines += [
        ",".join([*map(repr, row.tolist()), str(t)]) for row, t in zip(x, target, strict=True)
    ]
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A folder with a table of 300 rows whose last column is a word, and one with a number."""
    monkeypatch.chdir(tmp_path)
    x = draw((300, 3), "float64") * [1, 20, 1e-3] + [1.6e9, 0, 5]  # far from zero, of any scale
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    words = np.array(["low", "high"])[(z @ [1, -1, 0.5] > 0).astype(int)]
    write(tmp_path / "words.csv", x, words)
    write(tmp_path / "numbers.csv", x, 1000 + 50 * z @ [1, -1, 0.5])
    return tmp_path


def test_a_table_becomes_a_network_that_predict_reads(room):
    done = nnxp_("train", "words.csv", "--target", "kind", "-o", "m.safetensors", "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["columns"], report["classes"]) == (NAMES, ["high", "low"])
    assert (report["rows"], report["held_out"], report["task"]) == (210, 60, "classes")
    assert report["score"] > 0.9 > 0.7 > report["baseline"]
    done = nnxp_("predict", "m.safetensors", "words.csv", "-o", "p.csv", "--labels",
                 "--columns", "c,b,a")  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "order of the model's" in done.stderr
    found = np.loadtxt("p.csv", dtype=str, skiprows=1)
    truth = [line.rsplit(",", 1)[1] for line in (room / "words.csv").read_text().split()[1:]]
    assert (found == truth).mean() > 0.9


def test_the_learning_curve_is_drawn(room):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib, the extra plots")
    wanted = "train", "words.csv", "--target", "kind", "-o", "m.safetensors", "--epochs", "2"
    assert nnxp_(*wanted, "--plot", "curve.svg").exit_code == 0
    assert "<svg" in (room / "curve.svg").read_text()
    (room / "m.safetensors").unlink()
    for path, said in {"curve.txt": "a picture ends in", "no/curve.svg": "no such folder"}.items():
        done = nnxp_(*wanted, "--plot", path)
        assert done.exit_code == (1 if said == "no such folder" else 2)
        assert said in done.stderr
    assert not (room / "m.safetensors").exists()


def test_a_target_of_numbers_is_predicted_in_its_own_units(room):
    done = nnxp_("train", "numbers.csv", "--target", "3", "-o", "m.safetensors", "--json")
    report = json.loads(done.stdout)
    assert report["measure"] == "R²"
    assert report["score"] > 0.9 > 0.1 > report["baseline"]
    assert 0 < report["error"] < 30
    nnxp_("predict", "m.safetensors", "numbers.csv", "-o", "p.npy", "--columns", "a,b,c")
    assert abs(np.load("p.npy").mean() - 1000) < 20


def test_the_score_is_of_rows_that_were_not_trained_on(room):
    """A target of noise cannot be predicted, however well it is remembered."""
    write(
        room / "noise.csv", draw((300, 3), "float64"), np.random.default_rng(5).integers(0, 2, 300)
    )
    model, report = train_on_table("noise.csv", "kind", epochs=60)
    assert report.task == "classes"
    assert report.classes == [0, 1]
    assert abs(report.score - 0.5) < 0.2
    table = np.loadtxt("noise.csv", delimiter=",", skiprows=1)
    right = nnxp.predict(model, table[:, :3]).argmax(axis=1) == table[:, 3]
    unseen, valid, seen = _split(table[:, 3], 0)
    assert sorted([*unseen, *valid, *seen]) == list(range(300))
    assert report.score == right[unseen].mean() != right[seen].mean()
    table[unseen, :3] += 1  # the network knows nothing of these
    write(room / "noise.csv", table[:, :3], table[:, 3].astype(int))
    again, _ = train_on_table("noise.csv", "kind", epochs=60)
    for name, p in model.parameters().items():
        np.testing.assert_array_equal(p, again.parameters()[name])


def test_tables_of_every_kind_give_the_same_network(room):
    csv, parquet = (pytest.importorskip(f"pyarrow.{name}") for name in ("csv", "parquet"))
    parquet.write_table(csv.read_csv("words.csv"), "words.parquet")
    lines = (room / "words.csv").read_text().split()
    (room / "bare.tsv").write_text("\n".join(line.replace(",", "\t") for line in lines[1:]) + "\n")
    found = [
        train_on_table(path, target, reading=Reading(header=header), epochs=2, hidden=(4,))[0]
        for path, target, header in (
            ("words.csv", "kind", None), ("words.parquet", "kind", None), ("bare.tsv", "3", False)
        )
    ]  # fmt: skip
    assert [each.columns for each in found] == [tuple(NAMES), tuple(NAMES), None]
    for name, p in found[0].parameters().items():
        for other in found[1:]:
            np.testing.assert_array_equal(p, other.parameters()[name])


def test_columns_are_chosen_and_trained_on_a_device(room, sim):
    model, report = train_on_table(
        "words.csv", "kind", reading=Reading(columns=("b", "a")), backend="sim", epochs=2
    )
    assert report.columns == ["b", "a"]
    assert model.columns == ("b", "a")
    assert model.place == "cpu"


OF_THE_FILES = (
    "not a number (--columns names the columns",
    "no such folder",
    "there is no value in column 4",
    "row 0 (from 0) has nan in column 'b'",
    "is 'high' in every row",
    "too many",
    "too large for their variance",
    "goes beyond 3.4e+38",
)
HUGE = ("", "")  # the first column is made so large


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (None, ["--target", "kinds"], "no column 'kinds'; it has a, b, c, kind"),
        (("low", ""), ["--target", "kind"], "there is no value in column 4"),
        ((",", ",x"), ["--target", "kind"], "not a number (--columns names the columns"),
        (
            (",", ",nan,"),
            ["--target", "kind", "--missing", "0"],
            "row 0 (from 0) has nan in column 'b'",
        ),
        (("low", "high"), ["--target", "kind"], "is 'high' in every row"),
        (None, ["--target", "kind", "--task", "numbers"], "which is no number: --task classes"),
        (None, ["--target", "kind", "--task", "guess"], 'task is "auto", "classes" or "numbers"'),
        (None, ["--target", "a", "--task", "classes", "--columns", "b,c"], "too many"),
        (None, ["--target", "kind", "--columns", "kind"], "no column beside the target"),
        (None, ["--target", "kind", "--hidden", "8,x"], "is not a list of sizes"),
        (HUGE, ["--target", "kind"], "too large for their variance"),
        (HUGE, ["--target", "a", "--columns", "b,c"], "goes beyond 3.4e+38"),
        (None, ["--target", "kind", "-o", "m.csv"], "ending in .safetensors"),
        (None, ["--target", "kind", "-o", "none/m.safetensors"], "no such folder"),
    ],
)
def test_what_cannot_be_trained_ends_in_one_sentence(room, change, options, said):
    if change is not None:
        head, *rows = (room / "words.csv").read_text().splitlines()
        rows = [row.replace(*change, 1) for row in rows]
        if change is HUGE:
            rows = [f"{i}e300{row[row.index(',') :]}" for i, row in enumerate(rows)]
        if "nan" in change[1]:
            head = "a,b,x,c,kind"
        (room / "words.csv").write_text("\n".join([head, *rows]))
    done = nnxp_("train", "words.csv", "-o", "m.safetensors", *options)
    fails(done, 1 if said in OF_THE_FILES else 2, said)
    assert not (room / "m.safetensors").exists()


def test_few_rows_and_other_files_are_refused(room):
    (room / "few.csv").write_text("\n".join((room / "words.csv").read_text().split()[:9]))
    with pytest.raises(RowsError, match=r"8 rows: training.* takes 20"):
        train_on_table("few.csv", "kind")
    with pytest.raises(OptionError, match="a table to train on ends in"):
        train_on_table("x.npy", "kind")
    assert isinstance(train_on_table("words.csv", "kind", epochs=1)[0], nnxp.Layer)


def test_a_place_that_cannot_be_written_to_is_refused_before_the_table_is_read(room):
    (room / "m.safetensors").mkdir()
    done = nnxp_("train", "none.csv", "--target", "kind", "-o", "m.safetensors")
    fails(done, 1, "a folder stands where to write")
    (room / "ring.safetensors").symlink_to("ring.safetensors")
    done = nnxp_("train", "none.csv", "--target", "kind", "-o", "ring.safetensors")
    fails(done, 1, "ring.safetensors")
