"""nnxp bench: a model against its own bare matrix products, and against plain NumPy."""

from __future__ import annotations

import json
import os
import time

import numpy as np
import pytest
from typer.testing import CliRunner

import nnxp
from nnxp import _comparison, floor
from nnxp.cli import app
from nnxp.floor import FLOOR, PLAIN, Products, draw
from nnxp.testing.parity import LIMIT


class Twice(nnxp.Layer):
    """y = (x, x): x (rows, n) -> y (rows, 2 n)."""

    def __call__(self, x):
        return nnxp.get_array_module(x).concatenate([x, x], axis=1)

    def output_shape(self, shape):
        return (shape[0], 2 * shape[1])


MODELS = {
    "one layer": (lambda: nnxp.Dense(5, 3, rng=0), (5,), [(5, 3)]),
    "a chain": (
        lambda: nnxp.Sequential(nnxp.Dense(5, 8, "relu", rng=0), nnxp.Dense(8, 3, "gelu", rng=1)),
        (5,),
        [(5, 8), (8, 3)],
    ),
    "other layers between": (
        lambda: nnxp.Sequential(
            nnxp.LayerNorm(5), nnxp.Residual(nnxp.Dense(5, 5, rng=0)), nnxp.Dense(5, 2, rng=1)
        ),
        (5,),
        [(5, 5), (5, 2)],
    ),
    "rows of more axes": (
        lambda: nnxp.Sequential(
            nnxp.Dense(5, 4, rng=0), nnxp.Flatten(), nnxp.Dense(24, 2, rng=1, bias=False)
        ),
        (6, 5),
        [(5, 4), (24, 2)],
    ),
    "another size between": (
        lambda: nnxp.Sequential(nnxp.Dense(5, 4, rng=0), Twice(), nnxp.Dense(8, 2, rng=1)),
        (5,),
        [(5, 4), (8, 2)],
    ),
    "16 bits": (lambda: nnxp.Dense(5, 3, rng=0, dtype="float16"), (5,), [(5, 3)]),
    "64 bits": (lambda: nnxp.Dense(5, 3, rng=0, dtype="float64"), (5,), [(5, 3)]),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_floor_is_the_products_of_the_network_one_after_the_other(name):
    make, row, shapes = MODELS[name]
    model = make()
    products = Products(model, row, 700)
    assert [weight.shape for _, weight, _, _ in products.steps] == shapes
    assert products.dtype == ("float64" if name == "64 bits" else "float32")
    for rows in (700, 3):
        x = draw((rows, *row), products.dtype)
        exact = x.astype("float64")
        for own, weight, lines, _ in products.steps:
            exact = exact if own is None else own[:rows].astype("float64")
            exact = exact.reshape(rows * lines, len(weight)) @ weight.astype("float64")
        run = products.over(x)
        for _ in range(2):
            made = run()
            assert made.dtype == products.dtype
            np.testing.assert_allclose(made, exact, rtol=1e-4, atol=1e-4)
    elsewhere = np.zeros_like(made)
    assert products.over(x, elsewhere)() is elsewhere
    np.testing.assert_array_equal(elsewhere, made)


def test_numbers_of_its_own_stand_in_only_where_sizes_differ():
    owns = {
        name: [own is not None for own, *_ in Products(make(), row, 2).steps]
        for name, (make, row, _) in MODELS.items()
    }
    assert owns["a chain"] == [False, False]
    assert owns["rows of more axes"] == [False, False]
    assert owns["another size between"] == [False, True]


def test_each_turn_begins_with_a_call_that_does_not_count():
    calls = []
    seconds = floor.timed(lambda: (calls.append(1), time.sleep(0.01 * len(calls))), 2)
    assert len(calls) == 3
    assert 0.025 <= seconds < 0.1


# the command


@pytest.fixture(autouse=True)
def _turns_are_short(monkeypatch):
    monkeypatch.setattr(floor, "TURN", 0.01)
    monkeypatch.setattr(floor, "PAUSE", 0.0)


def nnxp_bench(*args):
    return CliRunner().invoke(app, ["bench", *map(str, args)])


def test_nnxp_bench_races_the_demos_network_against_its_floor():
    done = nnxp_bench("--rows", 2000, "--rounds", 2, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["rows"], found["rounds"], found["place"]["device"]) == (2000, 2, "cpu")
    assert [each["name"] for each in found["results"]] == ["nnxp", PLAIN, FLOOR]
    assert found["place"]["blas"][0]["kernels"]
    for each in found["results"]:
        low, high = each["quartiles"]
        assert 0 < each["least"] <= low <= each["median"] <= high
        assert len(each["seconds"]) == 2
        assert each["name"] == FLOOR or 0 <= each["error"] <= LIMIT
        assert each["share"] > 0


def test_nnxp_bench_takes_a_model_and_says_where_it_ran(tmp_path):
    path = tmp_path / "net.safetensors"
    nnxp.save(nnxp.Sequential(nnxp.Flatten(), nnxp.Dense(12, 3, rng=0)), path)
    done = nnxp_bench(path, "--rows", 50, "--rounds", 1, "--shape", "3,4")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("net.safetensors: 12-3 float32, 50 rows\nran on cpu: ")
    assert "100% [100%, 100%]" in done.stdout


@pytest.mark.parametrize(
    ("args", "code", "word"),
    [
        (["nowhere.safetensors"], 1, "nowhere.safetensors"),
        (["norm.safetensors"], 2, "no Dense layer"),
        (["norm.safetensors", "--shape", "many"], 2, "'many'"),
        (["dense.safetensors", "--shape", "7"], 2, "(1, 7)"),
    ],
)
def test_what_nnxp_bench_cannot_do_is_one_clear_line(tmp_path, monkeypatch, args, code, word):
    monkeypatch.chdir(tmp_path)
    nnxp.save(nnxp.LayerNorm(6), "norm.safetensors")
    nnxp.save(nnxp.Dense(6, 2, rng=0), "dense.safetensors")
    done = nnxp_bench(*args)
    assert (done.exit_code, done.stdout) == (code, "")
    assert done.stderr.startswith("nnxp: error: ")
    assert len(done.stderr.splitlines()) == 1
    assert word in done.stderr


def test_a_result_that_is_wrong_is_not_timed_and_fails_the_command(monkeypatch):
    def wrong(self, x, *args, **options):
        return np.zeros((len(x), 10), "float32")

    monkeypatch.setattr(nnxp.Engine, "__call__", wrong)
    done = nnxp_bench("--rows", 300, "--rounds", 1)
    assert done.exit_code == 1
    assert "nnxp: its result is wrong" in done.stdout
    assert [line for line in done.stdout.splitlines() if line.startswith("nnxp  ")] == []


def test_variables_that_pin_threads_or_kernels_are_told(monkeypatch):
    for name in [name for name in os.environ if name.startswith(_comparison.PINS)]:
        monkeypatch.delenv(name)
    assert _comparison.here()["settings"] == {}
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    done = nnxp_bench("--rows", 300, "--rounds", 1)
    assert "\nwith OMP_NUM_THREADS=1\n" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
