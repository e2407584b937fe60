"""Attention, recurrence, positions and ids against definitions spelt out one number at a time."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest

import nnxp
from conftest import SEQUENCES, draw
from nnxp import kernels
from nnxp.testing import LIMIT, error_bound
from nnxp.testing.parity import compare

try:
    import torch
except ImportError:
    torch = None


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# attention


def attend(q, k, v, mask=None, causal=False, scale=None):
    """Query by query, key by key, in float64; zeros where nothing may be looked at."""
    rows, heads, queries, c = q.shape
    groups, keys = k.shape[1], k.shape[2]
    y = np.zeros((rows, heads, queries, v.shape[-1]))
    if mask is not None:
        mask = np.broadcast_to(mask, (rows, heads, queries, keys))
    for n, h, i in np.ndindex(rows, heads, queries):
        group, weights = h // (heads // groups), {}
        for j in range(keys):
            seen = not (causal and j > i)
            score = sum(q[n, h, i] * k[n, group, j]) * (
                1 / math.sqrt(c) if scale is None else scale
            )
            if mask is not None and mask.dtype == bool:
                seen = seen and mask[n, h, i, j]
            elif mask is not None:
                score += mask[n, h, i, j]
            if seen and score > -np.inf:
                weights[j] = math.exp(score)
        for j, weight in weights.items():
            y[n, h, i] += weight / sum(weights.values()) * v[n, group, j]
    return y


def some(shape, seed):
    return np.random.default_rng(seed).random(shape) < 0.6


ATTENTION = {
    "plain": {},
    "scaled": {"scale": 0.3},
    "without a scale": {"scale": 0.0},
    "causal": {"causal": True},
    "keys": {"mask": some((2, 1, 1, 4), 0)},
    "each query": {"mask": some((5, 4), 1)},
    "each head": {"mask": some((2, 6, 5, 4), 2), "causal": True},
    "floats": {"mask": np.random.default_rng(3).normal(size=(6, 5, 4)) * 5},
    "minus infinity": {"mask": np.where(some((2, 1, 5, 4), 4), 0.0, -np.inf)},
    "nothing to look at": {"mask": np.zeros((2, 1, 5, 4), bool)},
}


@pytest.mark.parametrize("groups", [6, 3, 1])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_what_it_is_defined_to_be(name, groups):
    q, k, v = (
        draw((2, 6, 5, 3), "float64"),
        draw((2, groups, 4, 3), "float64", 1),
        draw((2, groups, 4, 7), "float64", 2),
    )
    options = dict(ATTENTION[name])
    mask = options.pop("mask", None)
    due = attend(q, k, v, mask, **options)
    np.testing.assert_allclose(kernels.attention(q, k, v, mask, **options), due, atol=1e-14)
    narrow = [x if x is None or x.dtype == bool else x.astype("float32") for x in (q, k, v, mask)]
    value, error = error_bound(kernels.attention, *narrow, **options)
    y = kernels.attention(*narrow, **options)
    if mask is None or mask.any():
        assert compare("", "", "cpu", y, value, error).ratio < LIMIT / 2
    else:
        assert not y.any()


@pytest.mark.skipif(torch is None, reason="torch is not installed")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ATTENTION)
def test_torch_says_the_same_of_attention(name, dtype):
    q, k, v = (draw((2, 6, n, 3), dtype, seed) for seed, n in enumerate((5, 4, 4)))
    options = dict(ATTENTION[name])
    mask = options.pop("mask", None)
    if mask is not None and options.pop("causal", False):
        mask = mask & np.tril(np.ones((5, 4), bool))
    if mask is not None and mask.dtype != bool:
        mask = mask.astype(dtype)
    value, error = error_bound(kernels.attention, q, k, v, mask, **options)
    y = torch.nn.functional.scaled_dot_product_attention(
        *map(torch.from_numpy, (q, k, v)),
        attn_mask=None if mask is None else torch.from_numpy(mask),
        is_causal=options.get("causal", False),
        scale=options.get("scale"),
    ).numpy()
    if mask is None or mask.any():
        assert compare("", "", "torch", y, value, error).ok
    else:
        assert not y.any()


def test_a_query_that_may_look_nowhere_gets_zeros_and_its_neighbours_do_not():
    q, k, v = draw((1, 2, 3, 4)), draw((1, 2, 5, 4)), np.ones((1, 2, 5, 2), "float32")
    mask = np.ones((3, 5), bool)
    mask[1] = False
    for each in (mask, np.where(mask, 0.0, -np.inf).astype("float32")):
        y = kernels.attention(q, k, v, each)
        np.testing.assert_allclose(y[:, :, [0, 2]], 1, rtol=1e-6)
        assert not y[:, :, 1].any()


def test_scores_too_large_for_exp_are_no_trouble():
    q = np.full((1, 1, 2, 1), 1e18, "float32")
    k = np.array([1e18, -1e18, 1e18], "float32").reshape(1, 1, 3, 1)
    v = np.array([2, 5, 4], "float32").reshape(1, 1, 3, 1)
    np.testing.assert_array_equal(kernels.attention(q, k, v), np.full((1, 1, 2, 1), 3))


def test_attention_refuses_what_does_not_fit():
    q, k = draw((1, 4, 3, 2)), draw((1, 3, 5, 2))
    with pytest.raises(nnxp.ShapeError, match="multiple of groups"):
        kernels.attention(q, k, k)
    with pytest.raises(nnxp.ShapeError, match="attention takes q"):
        kernels.attention(q, draw((1, 4, 5, 3)), draw((1, 4, 5, 3)))
    with pytest.raises(nnxp.DtypeMismatch, match=r"astype\(bool\)"):
        kernels.attention(q, q, q, np.ones((3, 3), "int64"))


# recurrence


def recur(
    kind, x, weight, bias=None, projection=None, states=(), length=None, reverse=False, after=True
):
    """One row, one step after the other; x (time, gates) already has the inputs' part."""
    time, n = len(x), weight.shape[1] // {"rnn": 1, "relu": 1, "gru": 3, "lstm": 4}[kind]
    m = weight.shape[0]
    h, c = (*states, np.zeros(m), np.zeros(n))[:2] if states else (np.zeros(m), np.zeros(n))
    y = np.zeros((time, m))
    steps = [t for t in range(time) if length is None or t < length]
    for t in steps[::-1] if reverse else steps:
        z = h @ weight
        if kind == "rnn":
            h = np.tanh(x[t] + z)
        elif kind == "relu":
            h = np.maximum(x[t] + z, 0)
        elif kind == "gru":
            b = np.zeros(3 * n) if bias is None else bias
            r, u = (
                sigmoid(x[t, :n] + z[:n] + b[:n]),
                sigmoid(x[t, n : 2 * n] + z[n : 2 * n] + b[n : 2 * n]),
            )
            inner = (
                r * (z[2 * n :] + b[2 * n :])
                if after
                else (r * h) @ weight[:, 2 * n :] + b[2 * n :]
            )
            h = (1 - u) * np.tanh(x[t, 2 * n :] + inner) + u * h
        else:
            i, f, o = (sigmoid((x[t] + z)[k * n : (k + 1) * n]) for k in range(3))
            c = f * c + i * np.tanh((x[t] + z)[3 * n :])
            h = o * np.tanh(c)
            h = h if projection is None else h @ projection
        y[t] = h
    return y, h, c


KINDS = {
    "rnn": (1, {}), "relu": (1, {"activation": kernels.relu}), "gru": (3, {}),
    "gru with the reset before": (3, {"reset_after": False}), "lstm": (4, {}),
    "lstm with a projection": (4, {}),
}  # fmt: skip


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_recurrence_is_what_it_is_defined_to_be(name, started, ragged, reverse):
    gates, options = KINDS[name]
    kind = name.split()[0]
    rows, time, n = 4, 5, 3
    m = 2 if "projection" in name else n
    x, weight = draw((rows, time, gates * n), "float64"), draw((m, gates * n), "float64", 1)
    bias = draw(3 * n, "float64", 2) if kind == "gru" else None
    projection = draw((n, m), "float64", 3) if m != n else None
    h, c = (draw((rows, size), "float64", 4) if started else None for size in (m, n))
    lengths = np.array([5, 1, 0, 3]) if ragged else None
    middle = {"gru": (bias, h), "lstm": (projection, h, c)}.get(kind, (h,))
    made = kernels.KERNELS["rnn" if kind == "relu" else kind](
        x, weight, *middle, lengths, reverse=reverse, **options
    )
    for i in range(rows):
        states = (h[i], c[i]) if started else ()
        due = recur(
            kind, x[i], weight, bias, projection, states, None if lengths is None else lengths[i],
            reverse, options.get("reset_after", True),
        )  # fmt: skip
        for y, expected in zip(made, due, strict=False):
            np.testing.assert_allclose(y[i], expected, rtol=1e-12, atol=1e-14)
    arrays = [x, weight, *middle]
    narrow = [None if a is None else a.astype("float32") for a in arrays]
    kernel = kernels.KERNELS["rnn" if kind == "relu" else kind]
    answers = kernel(*narrow, lengths, reverse=reverse, **options)
    for i, y in enumerate(answers):
        value, error = error_bound(
            lambda *a, i=i: kernel(*a, lengths, reverse=reverse, **options)[i], *narrow
        )
        assert compare("", "", "cpu", y, value, error).ratio < LIMIT / 2


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", ["lstm", "gru", "gru with the reset before"])
def test_a_recurrence_with_its_inputs_product_is_what_it_is_defined_to_be(
    name, biased, started, reverse
):
    kind, (gates, options) = name.split()[0], KINDS[name]
    x, weight_x, weight = (
        draw(shape, "float64", seed)
        for seed, shape in enumerate([(4, 5, 2), (2, 3 * gates), (3, 3 * gates)])
    )
    bias_x, bias = (draw(3 * gates, "float64", seed) if biased else None for seed in (3, 4))
    own = [bias] if kind == "gru" else []
    states = [draw((4, 3), "float64", 5 + i) for i in range(2 - len(own))] if started else []
    arrays = x, weight_x, bias_x, weight, *own, *states
    kernel = partial(kernels.KERNELS[f"linear_{kind}"], reverse=reverse, **options)
    for i, row in enumerate(zip(*kernel(*arrays), strict=True)):
        due = recur(
            kind, x[i] @ weight_x + (bias_x if biased else 0), weight, *own or [None],
            states=[state[i] for state in states], reverse=reverse,
            after=options.get("reset_after", True),
        )  # fmt: skip
        for y, expected in zip(row, due, strict=False):
            np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-14)
    narrow = [None if a is None else a.astype("float32") for a in arrays]
    for i, y in enumerate(kernel(*narrow)):
        value, error = error_bound(lambda *a, i=i: kernel(*a)[i], *narrow)
        assert compare("", "", "cpu", y, value, error).ratio < LIMIT / 2


def test_layers_and_directions_are_stacked_as_they_say():
    net = nnxp.GRU(2, 3, layers=2, bidirectional=True, returns="states", rng=0, dtype="float64")
    x, lengths = draw((4, 5, 2), "float64"), np.array([5, 2, 4, 1])
    y, h = net(x, lengths)
    forwards, backwards, *second = net.cells
    kept = (np.arange(5) < lengths[:, None])[..., None]

    def through(cell, x, backwards):
        given = x @ cell.weight_x + cell.bias
        pairs = [
            recur("gru", given[i], cell.weight_h, cell.bias_h, length=lengths[i], reverse=backwards)
            for i in range(4)
        ]
        return np.stack([p[0] for p in pairs]), np.stack([p[1] for p in pairs])

    parts = [through(forwards, x, False), through(backwards, x, True)]
    middle = np.concatenate([part[0] for part in parts], axis=-1)
    parts += [through(second[0], middle, False), through(second[1], middle, True)]
    np.testing.assert_allclose(
        y, np.concatenate([p[0] for p in parts[2:]], -1), rtol=1e-12, atol=1e-14
    )
    np.testing.assert_allclose(h, np.stack([p[1] for p in parts], axis=1), rtol=1e-12, atol=1e-14)
    assert not y[~np.broadcast_to(kept, y.shape)].any()
    last = nnxp.GRU.of(net.cells, True, "last")(x, lengths)
    np.testing.assert_array_equal(last, np.concatenate([h[:, 2], h[:, 3]], axis=-1))


def test_a_cell_is_one_step_of_its_layer():
    for kind in ("RNN", "GRU", "LSTM"):
        net = getattr(nnxp, kind)(3, 4, returns="states", rng=0)
        x = draw((5, 3, 3))
        states = [None, None][: 1 + (kind == "LSTM")]
        for t in range(3):
            made = net.cells[0](x[:, t], *states)
            states = list(made) if isinstance(made, tuple) else [made]
        for mine, its in zip(states, net(x)[1:], strict=True):
            np.testing.assert_allclose(mine, its[:, 0], rtol=1e-6)


def test_what_lies_beyond_a_length_does_not_matter():
    net = nnxp.LSTM(2, 3, bidirectional=True, rng=0)
    x = draw((3, 6, 2))
    lengths = np.array([6, 2, 0])
    other = x.copy()
    other[1, 2:], other[2] = 7, np.nan
    np.testing.assert_array_equal(net(x, lengths), net(other, lengths))


def test_recurrent_layers_refuse_what_does_not_fit():
    net = nnxp.LSTM(3, 4, rng=0)
    for shape in ((5, 3), (5, 0, 3), (5, 2, 4)):
        with pytest.raises(nnxp.ShapeError):
            net(draw(shape))
    with pytest.raises(nnxp.OptionError, match="sequence, last, states"):
        nnxp.LSTM(3, 4, returns="all")
    with pytest.raises(nnxp.ShapeError, match="weight_h"):
        nnxp.LSTMCell.of(draw((3, 16)), draw((3, 16)))
    with pytest.raises(nnxp.ShapeError, match="projection"):
        nnxp.LSTMCell.of(draw((3, 16)), draw((2, 16)), None, draw((2, 4)))
    with pytest.raises(nnxp.DtypeMismatch, match="whole numbers"):
        net(draw((5, 2, 3)), draw(5))


# ids and positions


def test_embedding_looks_up_and_refuses_ids_that_are_not_there(sim):
    table = nnxp.Embedding(4, 3, rng=0)
    for kind in ("int8", "uint8", "int16", "int64", "uint64"):
        np.testing.assert_array_equal(table(np.array([[3, 0]], kind)), table.weight[[[3, 0]]])
    big = nnxp.Embedding(1000, 2, rng=0)
    np.testing.assert_array_equal(big(np.array([5], "uint8")), big.weight[[5]])
    for wrong in (-1, 4, 2**40):
        ids = np.array([[0, wrong], [1, 2]])
        with pytest.raises(
            nnxp.IdError, match=f"ids are 0 to 3, but 1 of 4 are not, such as {wrong}"
        ):
            table(ids)
        y = nnxp.asnumpy(table.to("sim")(nnxp.to_backend(ids, "sim")))
        assert np.isnan(y[0, 1]).all()
        np.testing.assert_array_equal(y[[0, 1, 1], [0, 0, 1]], table.weight[:3])
    with pytest.raises(nnxp.DtypeMismatch, match="whole numbers"):
        table(draw((2, 3)))
    with pytest.raises(nnxp.IdError, match=r"layers\.0"):
        nnxp.Sequential(table, nnxp.Dense(3, 2, rng=0))(np.array([[9]]))


def test_a_recording_looks_at_its_ids_as_the_layer_does():
    from nnxp.program.recording import Recording

    net = nnxp.Sequential(nnxp.Embedding(4, 3, rng=0), nnxp.Dense(3, 2, rng=1))
    ids = np.array([[0, 1], [2, 3]])
    recording = Recording(net.program((ids.shape, "int64")), 2, [ids.dtype])
    y = np.empty((2, 2, 2), "float32")
    recording((ids,), (y,))
    np.testing.assert_allclose(y, net(ids), rtol=1e-6)
    with pytest.raises(nnxp.IdError):
        recording((ids + 1,), (y,))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_pairs_are_complex_numbers_turned(interleaved):
    net = nnxp.RotaryEmbedding(6, base=50.0, interleaved=interleaved)
    x = draw((2, 3, 4, 8), "float64")
    y = net(x)
    for n, h, t, i in np.ndindex(2, 3, 4, 3):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + 3)
        turned = complex(x[n, h, t, a], x[n, h, t, b]) * np.exp(1j * t * 50 ** (-2 * i / 6))
        np.testing.assert_allclose(
            [y[n, h, t, a], y[n, h, t, b]], [turned.real, turned.imag], rtol=1e-12
        )
    np.testing.assert_array_equal(y[..., 6:], x[..., 6:])


def test_rotary_products_depend_on_how_far_apart_they_are():
    q, k = draw((1, 1, 1, 4), "float64"), draw((1, 1, 1, 4), "float64", 1)
    net = nnxp.RotaryEmbedding(4)
    a, b = (net(np.broadcast_to(x, (1, 1, 9, 4)))[0, 0] for x in (q, k))
    np.testing.assert_allclose(a[2] @ b[5], a[4] @ b[7], rtol=1e-12)
    assert abs(a[2] @ b[5] - a[2] @ b[6]) > 1e-3


@pytest.mark.parametrize("channels", [6, 5])
def test_sinusoidal_encoding_by_hand(channels):
    y = nnxp.SinusoidalEncoding(base=100.0)(np.zeros((1, 7, channels)))
    for t, c in np.ndindex(7, channels):
        angle = t * 100 ** (-(c - c % 2) / channels)
        due = math.cos(angle) if c % 2 else math.sin(angle)
        assert y[0, t, c] == pytest.approx(due, abs=1e-14)


def test_position_embedding_has_so_many_places():
    net = nnxp.PositionEmbedding(4, 3, rng=0)
    x = draw((2, 3, 3))
    np.testing.assert_array_equal(net(x), x + net.weight[:3])
    with pytest.raises(nnxp.ShapeError, match="at most 4"):
        net(draw((2, 5, 3)))


# encoders and branches


def test_attention_of_several_heads_is_its_parts():
    net = nnxp.MultiHeadAttention(6, 3, rng=0, dtype="float64")
    x, keys, mask = draw((2, 4, 6), "float64"), draw((2, 5, 6), "float64", 1), some((2, 5), 1)
    q, k, v = net.query(x), net.key(keys), net.value(keys)
    heads = [each.reshape(2, -1, 3, 2).transpose(0, 2, 1, 3) for each in (q, k, v)]
    y = attend(*heads, mask[:, None, None]).transpose(0, 2, 1, 3).reshape(2, 4, 6)
    due = net.output_projection(y)
    np.testing.assert_allclose(net(x, keys, mask=mask), due, rtol=1e-12)
    np.testing.assert_array_equal(net(x), net(x, x, x))
    np.testing.assert_array_equal(
        net(x, keys, mask=mask), net(x, keys, keys, mask[:, None].repeat(4, 1))
    )
    with pytest.raises(nnxp.ShapeError, match=r"a mask is \(rows, keys\)"):
        net(x, keys, mask=mask[:, :4])
    with pytest.raises(nnxp.OptionError, match="shared by 4 heads"):
        nnxp.MultiHeadAttention(6, 4)


def test_rotary_attention_turns_queries_and_keys_and_no_values():
    turn = nnxp.RotaryEmbedding(2, base=7.0)
    net = nnxp.MultiHeadAttention(6, 3, rotary=turn, causal=True, rng=0, dtype="float64")
    x = draw((2, 4, 6), "float64")
    q, k, v = (
        each(x).reshape(2, 4, 3, 2).transpose(0, 2, 1, 3)
        for each in (net.query, net.key, net.value)
    )
    y = attend(turn(q), turn(k), v, causal=True).transpose(0, 2, 1, 3).reshape(2, 4, 6)
    np.testing.assert_allclose(net(x), net.output_projection(y), rtol=1e-12)


@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_layer_is_its_formula(norm_first):
    net = nnxp.TransformerEncoderLayer(6, 2, 8, norm_first=norm_first, rng=0, dtype="float64")
    x, mask = draw((2, 4, 6), "float64"), some((2, 4), 1)
    a, b = net.attention_norm, net.norm
    if norm_first:
        z = x + net.attention(a(x), a(x), a(x), mask)
        due = z + net.outer(net.inner(b(z)))
    else:
        z = a(x + net.attention(x, x, x, mask))
        due = b(z + net.outer(net.inner(z)))
    np.testing.assert_allclose(net(x, mask), due, rtol=1e-12)


class TwoTowers(nnxp.Layer):
    """y = head([words, numbers]): two branches, of ids and of numbers, in plain Python."""

    takes = ("int", "float", "int")

    words: nnxp.Sequential
    reader: nnxp.LSTM
    numbers: nnxp.Dense
    head: nnxp.Dense
    join: nnxp.Concatenate

    def __call__(self, ids, numbers, lengths=None):
        read = self.reader(self.words(ids), lengths)
        return self.head(self.join(read, self.numbers(numbers)))


def test_a_model_of_several_branches_is_a_formula(tmp_path):
    words = nnxp.Sequential(nnxp.Embedding(9, 4, rng=0), nnxp.SinusoidalEncoding())
    net = TwoTowers(
        words, nnxp.LSTM(4, 5, returns="last", rng=1), nnxp.Dense(3, 2, "relu", rng=2),
        nnxp.Dense(7, 3, "softmax", rng=3), nnxp.Concatenate(),
    )  # fmt: skip
    ids, numbers, lengths = np.array([[1, 2, 3], [8, 0, 0]]), draw((2, 3)), np.array([3, 1])
    y = net(ids, numbers, lengths)
    side = np.concatenate([net.reader(words(ids), lengths), net.numbers(numbers)], axis=-1)
    np.testing.assert_array_equal(y, net.head(side))
    assert net(ids=ids, numbers=numbers).shape == (2, 3)
    assert net.output_shape((5, 3), (5, 3), (5,)) == (5, 3)
    nnxp.save(net, tmp_path / "net")
    np.testing.assert_array_equal(nnxp.load(tmp_path / "net")(ids, numbers, lengths), y)
    there = [nnxp.to_backend(each, "sim") for each in (ids, numbers, lengths)]
    np.testing.assert_allclose(nnxp.asnumpy(net.to("sim")(*there)), y, rtol=1e-5)
    with pytest.raises(nnxp.ShapeError, match="rows"):
        net(ids, numbers[:1])
    with pytest.raises(nnxp.DtypeMismatch, match="whole numbers"):
        net(numbers, numbers)


def test_every_kernel_of_sequences_is_asked_here():
    asked = "attention rnn gru lstm linear_gru linear_lstm embedding rotary add_positions"
    assert set(asked.split()) == SEQUENCES
    assert set(kernels.KERNELS) >= SEQUENCES


class AcrossRows(nnxp.Layer):
    """A recurrence that goes through the rows, not through their time."""

    def __call__(self, x):
        weight = nnxp.get_array_module(x).ones((4, 4), x.dtype)
        return kernels.rnn(x.swapaxes(0, 1), weight)[0].swapaxes(0, 1)


def test_a_recurrence_that_goes_through_the_rows_mixes_them():
    x = draw((5, 3, 4))
    engine = nnxp.Engine(AcrossRows(), "numpy")
    with pytest.raises(nnxp.ShapeError, match="mixes rows"):
        engine(x)
    np.testing.assert_allclose(engine.whole(x), AcrossRows()(x), rtol=1e-6)


STATES = [("rnn", (4, 4), ()), ("gru", (4, 12), ((12,),)), ("lstm", (4, 16), (None,)),
          ("lstm", (3, 16), ((4, 3),))]  # fmt: skip


@pytest.mark.parametrize(("name", "weight", "others"), STATES)
@pytest.mark.parametrize("given", [False, True])
def test_a_recurrence_says_itself_what_it_makes(name, weight, others, given):
    kernel, m = kernels.KERNELS[name], weight[0]
    arrays = [draw((2, 5, weight[1])), draw(weight)]
    arrays += [None if shape is None else draw(shape) for shape in others]
    if given:
        arrays += [draw((2, m)), *([draw((2, 4))] if name == "lstm" else [])]
        arrays.append(np.array([5, 2]))
    said = kernel.outlines(*arrays)
    assert said == [(y.shape, y.dtype) for y in kernel(*arrays)]
    for call in (kernel, kernel.outlines):
        for wrong in (draw((m, weight[1] - 1)), draw((weight[1],)), np.float32([1]).reshape(())):
            with pytest.raises(nnxp.ShapeError, match=r"it takes x \(rows, time, "):
                call(arrays[0], wrong, *arrays[2:])
        with pytest.raises(nnxp.ShapeError, match=r"it takes x \(rows, time, "):
            call(arrays[0][0], *arrays[1:])
    assert kernel.outlines(arrays[0].astype("float64"), *arrays[1:]) is None
    if given:
        assert kernel.outlines(*arrays[:-1], np.array([5])) is None
