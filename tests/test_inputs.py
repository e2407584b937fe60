"""Several inputs and outputs: through the model, the engine, the parity kit, on every backend."""

from __future__ import annotations

import numpy as np
import pytest

import nnxp
from conftest import PAIRS, draw, every_backend
from nnxp.layers.graph import Graph, node, packed
from nnxp.testing import assert_parity


class Branches(nnxp.Layer):
    """(a, b) = (dense(x) + y, dense(x) * 2), ids picking rows of a table besides."""

    takes = ("float", "float", "int")
    dense: nnxp.Dense
    table: nnxp.Embedding

    def __init__(self):
        self.dense = nnxp.Dense(4, 3, "tanh", rng=0)
        self.table = nnxp.Embedding(7, 3, rng=1)

    def __call__(self, x, y, ids=None):
        inner = self.dense(x)
        inner = inner if ids is None else inner + self.table(ids)
        return inner + y, inner * 2

    @classmethod
    def examples(cls):
        yield cls(), [(5, 4), (5, 3)]


NET = Branches()
X, Y, IDS = draw((5000, 4)), draw((5000, 3), seed=1), np.arange(5000) % 7


def both(made, expected):
    assert isinstance(made, tuple)
    for y, wanted in zip(made, expected, strict=True):
        np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)


@every_backend
@pytest.mark.parametrize("limit", [None, "100 KiB"])
def test_a_tuple_or_a_dict_of_inputs_gives_a_tuple_of_outputs(backend, limit):
    engine = nnxp.Engine(NET, backend, memory_limit=limit)
    for rows in (5000, 3, 3, 3, 1, 0):
        x, y, ids = X[:rows], Y[:rows], IDS[:rows]
        if rows:
            both(engine((x, y, ids)), NET(x, y, ids))
            both(engine({"y": y, "ids": ids, "x": x}), NET(x, y, ids))
            both(engine((x.astype("float64"), y)), NET(x, y))
        assert [len(each) for each in engine((x, y))] == [rows, rows]


@every_backend
def test_out_is_a_tuple_and_ids_stay_whole(backend):
    out = np.empty((5000, 3), "float32"), np.empty((5000, 3), "float64")
    assert nnxp.predict(NET, (X, Y, IDS.astype("uint8")), backend, out=out) == out
    both(out, NET(X, Y, IDS))
    with pytest.raises(nnxp.DtypeMismatch, match="whole numbers"):
        nnxp.predict(NET, (X, Y, IDS + 0.5), backend)


@every_backend
def test_inputs_on_the_device_stay_there(backend):
    where = nnxp.get_backend(backend)
    engine = nnxp.Engine(NET, backend)
    x, y = where.put(X[:9]), where.put(Y[:9])
    for _ in range(3):
        made = engine((x, y))
        assert all(type(each) is type(x) for each in made)
        both(tuple(map(nnxp.asnumpy, made)), NET(X[:9], Y[:9]))
    if where.device != "cpu":
        with pytest.raises(nnxp.DeviceMismatch, match="several places"):
            engine((x, Y[:9]))


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ((X, Y[:7]), nnxp.ShapeError, r"as many rows each.*whole\(\*inputs\)"),
        (X, nnxp.ShapeError, "x, y, ids"),
        ((X, Y, IDS, X), nnxp.ShapeError, "4 inputs"),
        ({"x": X}, nnxp.ShapeError, "without y"),
        ({"x": X, "z": Y}, nnxp.ShapeError, "takes x, y, ids"),
        ((X[:, :2], Y), nnxp.ShapeError, "takes"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(given, error, words):
    with pytest.raises(error, match=words):
        nnxp.predict(NET, given, "cpu")
    for out in (np.empty((5000, 3), "float32"), ()):
        with pytest.raises(nnxp.OptionError, match="tuple of 2 arrays"):
            nnxp.predict(NET, (X, Y), "cpu", out=out)


def test_parity_judges_all_outputs_of_all_inputs():
    report = assert_parity(NET, X[:20], Y[:20], IDS[:20], backends=["numpy", "sim"])
    assert {check.name for check in report.checks} == {"dense", "table", "output", "engine"}
    assert_parity(NET, (X[:20], Y[:20]), backends=["sim"])


SEVERAL = [(layer, shape) for layer, shape in PAIRS if isinstance(shape, list)]


def rows_of(layer, shapes):
    """Rows for these shapes; ids small, lengths within."""
    kinds = [*layer.takes, *["float"] * len(shapes)]
    return tuple(
        None if shape is None else np.ones(shape, "int64") if kind == "int" else draw(shape)
        for shape, kind in zip(shapes, kinds, strict=False)
    )


@every_backend
@pytest.mark.parametrize(
    ("layer", "shapes"), SEVERAL, ids=[f"{layer!r}"[:50] for layer, _ in SEVERAL]
)
def test_every_layer_of_several_inputs_goes_through_an_engine(layer, shapes, backend):
    given = rows_of(layer, shapes)
    expected = layer(*given)
    engine = nnxp.Engine(layer, backend)
    for _ in range(3):
        made = engine(given)
        pairs = zip(made, expected, strict=True) if isinstance(made, tuple) else [(made, expected)]
        for y, wanted in pairs:
            np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-5)


# inputs taken as a whole


class Mixes(nnxp.Layer):
    def __call__(self, x):
        return x - x.mean(axis=0), x.sum()


class Looks(nnxp.Layer):
    def __call__(self, x):
        return x * 2 if float(x.max()) > 1 else x


WHOLE = {
    "mixes rows": (Mixes(), (5, 3)),
    "looks at numbers": (Looks(), (5, 3)),
    "a body in place": (nnxp.LSTM(3, 4, rng=0), (2, 5, 3)),
    "a network": (nnxp.Sequential(nnxp.Dense(3, 4, "relu", rng=0), nnxp.Dense(4, 2)), (5, 3)),
}


@pytest.mark.parametrize("backend", ["cpu", "sim"])
@pytest.mark.parametrize("name", WHOLE)
def test_inputs_taken_as_a_whole_need_no_rows(name, backend):
    model, shape = WHOLE[name]
    with nnxp.Engine(model, backend) as engine:
        for i in range(3):
            for rows in (shape[0], shape[0] + 1):
                x = draw((rows, *shape[1:]), seed=i)
                given, wanted = engine.whole(x), model(x)
                several = isinstance(wanted, tuple)
                assert isinstance(given, tuple) == several
                for y, z in zip(
                    *((given, wanted) if several else ([given], [wanted])), strict=True
                ):
                    assert type(y) is np.ndarray
                    np.testing.assert_allclose(y, z, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "sim"])
def test_what_is_taken_as_a_whole_may_be_named_and_left_out(backend):
    model, x, mask = (
        nnxp.MultiHeadAttention(6, 3, rng=0),
        draw((4, 5, 6)),
        np.ones((4, 1, 1, 5), bool),
    )
    mask[..., 3:] = False
    y = nnxp.Engine(model, backend).whole({"x": x, "mask": mask})
    np.testing.assert_allclose(y, model(x, mask=mask), rtol=1e-5, atol=1e-6)


def rated():
    """x * 2 at a rate of 16,000, x + 2 at any other."""
    branches = {
        f"{name}_branch": {"nodes": (node(op, ["x", "two"], [name]),), "outputs": (name,)}
        for name, op in (("then", "Mul"), ("else", "Add"))
    }
    return Graph.of(
        nodes=(node("Equal", ["rate", "usual"], ["is"]), node("If", ["is"], ["y"], **branches)),
        inputs=({"name": "x", "dtype": "float32", "shape": None},
                {"name": "rate", "dtype": "int64", "shape": ()}),
        outputs=("y",), names=(), weights=(), kind="float32",
        constants={"usual": packed(np.array(16_000)), "two": packed(np.float32(2))},
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["cpu", "sim"])
def test_a_rate_that_decides_is_written_out_when_it_comes_again(backend):
    model, written = rated(), []
    with nnxp.Engine(model, backend) as engine:
        for i in range(3):
            for rate in (16_000, 8_000):
                x = draw((3, 8), seed=i)
                y = engine.whole(x, np.array(rate))
                np.testing.assert_array_equal(y, model(x, np.array(rate)))
            written.append(sum(each.written for each in engine._replicas[0]._wholes.values()))
        assert written == [0, 2, 2]
        for rate in range(100):  # one that never comes again is not written out, nor kept
            engine.whole(draw((3, 8)), np.array(rate))
        assert len(engine._replicas[0]._wholes) == 3
        assert len(engine._replicas[0]._asked) <= 32


@pytest.mark.parametrize("limit", [None, "1 MiB"])
def test_what_is_kept_of_a_whole_is_little(limit):
    engine = nnxp.Engine(WHOLE["a network"][0], "cpu", memory_limit=limit)
    for rows in (3, 1_000_000, 2_000_000, 5_000_000):
        engine.whole(np.zeros((rows, 3), "float32"))
    kept = [each.idle for each in engine._replicas[0]._wholes.values()]
    assert [size > 0 for size in kept] == [limit is None] * 3 + [False]  # the last is too large
    assert sum(kept) < 64 << 20
    engine.whole(np.zeros((3_000_000, 3), "float32"))
    engine.whole(np.zeros((4, 3), "float32"))  # these are more in all: what was kept is let go
    assert len(engine._replicas[0]._wholes) == (1 if limit is None else 6)


def test_what_inputs_are_as_a_whole_is_asked_once_for_a_type_and_shape(monkeypatch):
    asked, ask = [], nnxp.engine._input_types

    def noted(model, inputs, arrays):
        asked.append(inputs[0].dtype)
        return ask(model, inputs, arrays)

    monkeypatch.setattr(nnxp.engine, "_input_types", noted)
    model, x = nnxp.Dense(3, 2, rng=0), draw((5, 3))
    hidden = np.ma.masked_array(x, x > 1)
    with nnxp.Engine(model, "cpu") as engine:
        for given in (x, x.astype("float64"), x.astype(object), hidden, x.astype(">f4"), x[:4]):
            expected = model(np.ma.filled(given, np.nan).astype("float32"))
            for _ in range(3):
                y = engine.whole(given)
                assert type(y) is np.ndarray
                np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    kinds = [dtype.str for dtype in asked]
    assert kinds == ["<f4", "<f8", *["|O"] * 3, *["<f4"] * 3, *[">f4"] * 3, "<f4"]


def test_what_does_not_fit_as_a_whole_is_refused():
    engine = nnxp.Engine(nnxp.Dense(3, 2, rng=0), "cpu")
    for _ in range(2):
        with pytest.raises(nnxp.ShapeError, match=r"takes \(rows, 3\) but got \(5, 4\)"):
            engine.whole(draw((5, 4)))
    with pytest.raises(nnxp.ShapeError, match="takes one input, not 2"):
        engine.whole(draw((5, 3)), draw((5, 3)))
    with pytest.raises(nnxp.OptionError, match="got no input"):
        engine.whole()


class Folded(nnxp.Layer):
    """Pools over pictures of which each row has five."""

    def __call__(self, x):
        y = nnxp.kernels.max_pool(x.reshape(-1, 6, 7, 3), window=(3, 3), stride=1, padding=1)
        return y.reshape(x.shape)


def test_rows_of_several_pictures_have_room_for_all_of_them():
    x = draw((11, 5, 6, 7, 3))
    np.testing.assert_array_equal(nnxp.Engine(Folded(), "cpu")(x), Folded()(x))
