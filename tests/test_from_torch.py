"""Modules of torch become models that answer what torch answers in eval().

In float64 to 1e-12 of the largest answer, in float32 within the bound. Every case is also written
out as a program, saved and loaded.
"""

from __future__ import annotations

import math
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import nnxp
from conftest import results
from nnxp.layers.torch_functions import FUNCTIONS
from nnxp.program.rewrite import optimized
from nnxp.testing import bounded, error_bound
from nnxp.testing.parity import compare

torch = pytest.importorskip("torch", reason="torch is not installed")
nn = torch.nn
F = torch.nn.functional
pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor"),
    pytest.mark.filterwarnings("ignore:.*torch.jit"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings("ignore:dropout option adds dropout"),
]


def drawn(module, seed=0):
    """The module with parameters and running statistics drawn at random, in eval()."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if value.is_floating_point():
                fresh = torch.rand(value.shape, generator=generator, dtype=torch.float64)
                fresh = fresh + 0.5 if "var" in name else (fresh - 0.5) * 1.5
                value.copy_(fresh)
    return module.eval()


def flat_tensors(answer):
    if isinstance(answer, dict):
        answer = tuple(answer.values())
    if isinstance(answer, tuple | list):
        return [y for each in answer for y in flat_tensors(each)]
    return [] if answer is None else [answer]


def flat(answer):
    return [y.detach().numpy() for y in flat_tensors(answer)]


def tensors(inputs, dtype):
    return [torch.from_numpy(x.astype(dtype) if x.dtype.kind == "f" else x) for x in inputs]


def agrees(module, *inputs, tmp_path=None, turn=lambda ys: ys, **options):
    """Answers the model, once it is seen to answer what the module does.

    Where torch itself is off by more than the bound in float32, it is `rounded`.
    """
    for dtype, kind in (("float64", torch.float64), ("float32", torch.float32)):
        module = module.to(kind)
        given = tensors(inputs, dtype)
        with torch.no_grad():
            due = turn(flat(module(*given, **options.get("call", {}))))
        model = nnxp.from_torch(module, inputs=options.get("inputs"))
        host = [each.numpy() for each in given]
        answers = results(model(*host))
        assert len(answers) == len(due)
        for y, expected in zip(answers, due, strict=True):
            assert y.shape == expected.shape
            assert y.dtype == expected.dtype
            if dtype == "float64":
                scale = np.abs(expected[np.isfinite(expected)]).max(initial=0.0)
                np.testing.assert_allclose(y, expected, rtol=0, atol=1e-12 * max(scale, 1e-300))
        if dtype == "float32":
            lifted = model.map_arrays(lambda name, value: bounded.asarray(value))
            for i, expected in enumerate(due):
                value, error = error_bound(lambda *xs, i=i, net=lifted: results(net(*xs))[i], *host)
                theirs = [] if options.get("rounded") else [("torch", expected)]
                for who, y in [*theirs, ("nnxp", answers[i])]:
                    check = compare("", "", who, y, value, error)
                    assert check.ok, check.problem
            program = model.program(*((x.shape, x.dtype) for x in host))
            for y, again in zip(answers, results(program(*host)), strict=True):
                np.testing.assert_allclose(again, y, rtol=1e-5, atol=1e-6)
            if tmp_path is not None:
                nnxp.save(model, tmp_path / "model")
                loaded = nnxp.load(tmp_path / "model")
                for y, again in zip(answers, results(loaded(*host)), strict=True):
                    assert y.tobytes() == again.tobytes()
    return model


def x_of(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape)


def ids_of(count, *shape, seed=1):
    return np.random.default_rng(seed).integers(0, count, shape)


MODULES = {
    "Linear": (lambda: nn.Linear(3, 5), (4, 3)),
    "Linear without bias": (lambda: nn.Linear(3, 5, bias=False), (4, 2, 3)),
    "LayerNorm": (lambda: nn.LayerNorm(6, eps=0.1), (4, 3, 6)),
    "LayerNorm without weights": (lambda: nn.LayerNorm(6, elementwise_affine=False), (4, 6)),
    "LayerNorm without bias": (lambda: nn.LayerNorm(6, bias=False), (4, 6)),
    "LayerNorm over axes": (lambda: nn.LayerNorm((3, 4), elementwise_affine=False), (2, 3, 4)),
    "LayerNorm over axes with weights": (lambda: nn.LayerNorm((3, 4), eps=0.1), (2, 3, 4)),
    "LayerNorm over axes without bias": (lambda: nn.LayerNorm((3, 4), bias=False), (2, 5, 3, 4)),
    "RMSNorm over axes": (lambda: nn.RMSNorm((3, 4), eps=0.1), (2, 3, 4)),
    "RMSNorm without weights": (lambda: nn.RMSNorm(6, elementwise_affine=False), (4, 6)),
    "RMSNorm": (lambda: nn.RMSNorm(6, eps=0.1), (4, 6)),
    "RMSNorm with torch's own eps": (lambda: nn.RMSNorm(6), (4, 6)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(6, eps=0.1), (4, 6)),
    "BatchNorm1d of signals": (lambda: nn.BatchNorm1d(3), (4, 3, 5)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3, affine=False), (4, 3, 5, 2)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(2), (2, 2, 3, 1, 2)),
    "Flatten": (lambda: nn.Flatten(), (2, 3, 4)),
    "Flatten of some": (lambda: nn.Flatten(2, 3), (2, 3, 4, 5)),
    "Unflatten": (lambda: nn.Unflatten(1, (2, -1)), (3, 6)),
    "Identity": (lambda: nn.Identity(), (2, 3)),
    "Dropout": (lambda: nn.Dropout(0.3), (2, 3)),
    "Dropout of all": (lambda: nn.Dropout(1.0), (2, 3)),
    "LeakyReLU": (lambda: nn.LeakyReLU(0.3), (4, 6)),
    "ELU": (lambda: nn.ELU(0.7), (4, 6)),
    "GELU": (lambda: nn.GELU(), (4, 6)),
    "GELU by tanh": (lambda: nn.GELU("tanh"), (4, 6)),
    "Softplus": (lambda: nn.Softplus(beta=2.0), (4, 6)),
    "Softplus with a threshold": (lambda: nn.Softplus(threshold=0.5), (4, 6)),
    "Softmax": (lambda: nn.Softmax(-1), (4, 6)),
    "Softmax along 1": (lambda: nn.Softmax(1), (4, 6, 3)),
    "LogSoftmax along 1": (lambda: nn.LogSoftmax(1), (4, 6)),
    **{name: (getattr(nn, name), (4, 6))
       for name in "ReLU SELU Sigmoid Tanh SiLU Mish Softsign Hardsigmoid".split()},
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_modules_of_the_table(name, tmp_path):
    make, shape = MODULES[name]
    agrees(drawn(make()), x_of(*shape), tmp_path=tmp_path)


def test_embedding(tmp_path):
    model = agrees(drawn(nn.Embedding(7, 4, padding_idx=0)), ids_of(7, 3, 5), tmp_path=tmp_path)
    assert type(model) is nnxp.Embedding


def rows_first(ys):
    """torch's last states have the layers first."""
    return [ys[0], *(y.swapaxes(0, 1) for y in ys[1:])]


RECURRENT = [
    (kind, options)
    for kind, more in [("RNN", [{}, {"nonlinearity": "relu"}]), ("GRU", [{}]),
                       ("LSTM", [{}, {"proj_size": 2}])]
    for extra in more
    for options in [
        extra,
        extra | {"num_layers": 2, "bias": False},
        extra | {"bidirectional": True},
        extra | {"num_layers": 2, "bidirectional": True, "dropout": 0.5},
    ]
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options"), RECURRENT, ids=str)
def test_recurrent_modules(kind, options, tmp_path):
    module = drawn(getattr(nn, kind)(4, 3, batch_first=True, **options))
    model = agrees(module, x_of(3, 4, 4), turn=rows_first, tmp_path=tmp_path)
    assert isinstance(model.layers[0], getattr(nnxp, kind))


@pytest.mark.parametrize(("kind", "options"), RECURRENT, ids=str)
def test_rows_of_unequal_length_are_torch_s_packed_sequences(kind, options):
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

    module = drawn(getattr(nn, kind)(4, 3, batch_first=True, **options)).double()
    layer = nnxp.from_torch(module).layers[0]
    x, lengths = x_of(5, 6, 4), np.array([6, 1, 4, 5, 2])
    layers = module.num_layers * (1 + module.bidirectional)
    sizes = [module.proj_size or 3, 3][: 1 + (kind == "LSTM")]
    states = [x_of(5, layers, size, seed=i) for i, size in enumerate(sizes)]
    theirs = tuple(torch.from_numpy(h.swapaxes(0, 1).copy()) for h in states)
    packed = pack_padded_sequence(torch.from_numpy(x), torch.from_numpy(lengths), True, False)
    with torch.no_grad():
        y, last = module(packed, theirs if kind == "LSTM" else theirs[0])
    due = [pad_packed_sequence(y, True)[0], *(last if kind == "LSTM" else [last])]
    due = rows_first([each.numpy() for each in due])
    for ours, expected in zip(layer(x, lengths, *states), due, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-14)


class OneStep(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.cell = getattr(nn, kind)(4, 3, **options)

    def forward(self, x, h, c):
        state = (h, c) if isinstance(self.cell, nn.LSTMCell) else h
        return self.cell(x, state)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["RNNCell", "GRUCell", "LSTMCell"])
def test_cells(kind, bias, tmp_path):
    module = drawn(OneStep(kind, bias=bias))
    agrees(module, x_of(5, 4), x_of(5, 3, seed=2), x_of(5, 3, seed=3), tmp_path=tmp_path)


class Attends(nn.Module):
    def __init__(self, *args, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(*args, batch_first=True, **options)

    def forward(self, x, keys, values, padding=None, mask=None):
        y, _ = self.attention(x, keys, values, key_padding_mask=padding, attn_mask=mask)
        return y


class AttendsByOne(Attends):
    """With one mask for all rows, which the module has."""

    def forward(self, x, keys, values, padding=None):
        return self.attention(x, keys, values, key_padding_mask=padding, attn_mask=self.fixed)[0]


PADDING = np.array(
    [[False, True, False, False, True], [False] * 5, [False, True, True, True, False]]
)
AHEAD = np.triu(np.ones((4, 5), bool), 2)
MASKS = {
    "none": (),
    "padding": (PADDING, None),
    "padding of floats": (np.where(PADDING, -3.5, 0.25), None),
    "ahead": (None, AHEAD),
    "floats": (None, x_of(4, 5, seed=9)),
    "for each head": (None, x_of(3 * 2, 4, 5, seed=9)),
    "both": (PADDING, AHEAD),
    "infinite": (None, np.where(AHEAD, -np.inf, 0.0)),
}


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 3, "vdim": 7}], ids=str)
@pytest.mark.parametrize("masks", MASKS)
def test_attention(masks, options, tmp_path):
    module = drawn(Attends(6, 2, **options))
    arrays = [x_of(3, 4, 6), x_of(3, 5, options.get("kdim", 6)), x_of(3, 5, options.get("vdim", 6))]
    names = ["x", "keys", "values"]
    for name, mask in zip(("padding", "mask"), MASKS[masks], strict=False):
        if mask is not None and name == "mask" and mask.ndim == 2:
            module.__class__ = AttendsByOne
            module.register_buffer("fixed", torch.from_numpy(mask))
        elif mask is not None:
            arrays.append(mask)
            names.append(name)
    if masks == "for each head":
        with torch.no_grad():
            due = module.double()(
                *tensors(arrays[:3], "float64"), None, *tensors(arrays[3:], "float64")
            )
        layer = nnxp.from_torch(module).layers[0]
        y = layer(*arrays[:3], arrays[3].reshape(3, 2, 4, 5))
        np.testing.assert_allclose(y, due.numpy(), rtol=1e-12, atol=1e-14)
        return
    agrees(module, *arrays, inputs=names, tmp_path=tmp_path)


ENCODERS = [
    {},
    {"norm_first": True, "activation": "gelu"},
    {"activation": nn.SiLU(), "bias": False},
    {"layer_norm_eps": 0.1, "activation": F.gelu},
]


@pytest.mark.parametrize("options", ENCODERS, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_encoder_layers(options, padded, tmp_path):
    module = drawn(nn.TransformerEncoderLayer(6, 2, 9, batch_first=True, **options))
    if not padded:
        model = agrees(module, x_of(3, 5, 6), tmp_path=tmp_path)
        assert type(model) is nnxp.TransformerEncoderLayer
        return
    names = ["src", "src_key_padding_mask"]
    model = nnxp.from_torch(module.double(), inputs=names)
    x = torch.from_numpy(x_of(3, 5, 6))
    with torch.no_grad():
        due = module(x, src_key_padding_mask=torch.from_numpy(PADDING)).numpy()
    shown = ~PADDING  # torch's fast path gives zeros where it is told to look at nothing
    np.testing.assert_allclose(model(x.numpy(), PADDING)[shown], due[shown], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("norm", [True, False])
def test_encoders(norm, tmp_path):
    layer = nn.TransformerEncoderLayer(6, 3, 8, batch_first=True, norm_first=True)
    module = nn.TransformerEncoder(layer, 3, nn.LayerNorm(6) if norm else None)
    model = agrees(drawn(module), x_of(3, 5, 6), tmp_path=tmp_path)
    assert type(model) is nnxp.TransformerEncoder


DECODERS = [{}, {"norm_first": True, "activation": "gelu"}, {"bias": False, "activation": F.silu}]


@pytest.mark.parametrize("options", DECODERS, ids=["", "norm first", "without a bias"])
def test_decoder_layers(options, tmp_path):
    module = nn.TransformerDecoderLayer(6, 2, 9, batch_first=True, **options)
    agrees(drawn(module), x_of(3, 5, 6), x_of(3, 4, 6, seed=2), tmp_path=tmp_path)


def test_a_decoder_looks_where_its_masks_let_it(tmp_path):
    layer = nn.TransformerDecoderLayer(6, 3, 8, batch_first=True)
    module = drawn(nn.TransformerDecoder(layer, 2, nn.LayerNorm(6))).double()
    names = ["tgt", "memory", "tgt_key_padding_mask", "memory_key_padding_mask"]
    x, memory = x_of(3, 5, 6), x_of(3, 4, 6, seed=2)
    hidden = tuple(
        np.arange(steps) >= np.array(lengths)[:, None]
        for steps, lengths in ((5, [5, 3, 4]), (4, [2, 4, 1]))
    )
    with torch.no_grad():
        masks = dict(zip(names[2:], map(torch.from_numpy, hidden), strict=True))
        due = module(torch.from_numpy(x), torch.from_numpy(memory), **masks)
    model = nnxp.from_torch(module, inputs=names)
    np.testing.assert_allclose(model(x, memory, *hidden), due, rtol=1e-11, atol=1e-13)


class Translator(nn.Module):
    """Time first inside; no word sees a later one; one weight is used in two forms."""

    def __init__(self):
        super().__init__()
        self.transformer = nn.Transformer(6, 2, 1, 2, 8, norm_first=True)
        self.words = nn.Linear(6, 6)

    def forward(self, src, tgt):
        later = nn.Transformer.generate_square_subsequent_mask(5, dtype=self.words.weight.dtype)
        src, tgt = src.transpose(0, 1), F.linear(tgt, self.words.weight.T).transpose(0, 1)
        y = self.transformer(src, tgt, tgt_mask=later, tgt_is_causal=True).transpose(0, 1)
        first = self.transformer.decoder.layers[0]
        return self.words(y) + first.linear2(first.linear1(y)) + first.norm1(y)


def test_transformers(tmp_path):
    sources = x_of(3, 4, 6), x_of(3, 5, 6, seed=2)
    agrees(drawn(nn.Transformer(6, 2, 1, 1, 8, batch_first=True)), *sources, tmp_path=tmp_path)
    agrees(drawn(Translator()), *sources, tmp_path=tmp_path)


class Twice(nn.Module):
    """A recurrence without and with states, attention to itself and to others."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 6, batch_first=True)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        y, states = self.lstm(x)
        z, _ = self.lstm(y, states)
        own, _ = self.attention(z, z, z)
        return own + self.attention(x, y, z, need_weights=False)[0]


def test_one_module_in_several_forms(tmp_path):
    agrees(drawn(Twice()), x_of(3, 5, 6), tmp_path=tmp_path)


# Modules of one's own


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 6)) for _ in range(3)
        )
        self.norms = nn.ModuleDict({"first": nn.LayerNorm(6), "last": nn.LayerNorm(6)})

    def forward(self, x):
        x = self.norms["first"](x)
        for block in self.blocks:
            x = x + block(x)
        return F.log_softmax(self.norms["last"](x), dim=-1)


class InPlace(nn.Module):
    """What writes into its argument changes what is read later."""

    def __init__(self):
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        y = x * 2
        z = self.act(y)
        z += 1
        w = x + 1
        self.act(w)
        y = y + w
        y = y + z
        y[:, 0] = 0.5
        y.mul_(3)
        n = m = x.size(1)
        n += 1
        return (y + z) * n - m


class VisionTransformer(nn.Module):
    """Patches by view and permute, a class token, positions, blocks with attention written out."""

    def __init__(self, size=8, patch=4, channels=12, heads=3):
        super().__init__()
        self.patch, self.heads = patch, heads
        self.embed = nn.Linear(3 * patch * patch, channels)
        self.token = nn.Parameter(torch.zeros(1, 1, channels))
        self.places = nn.Parameter(torch.zeros(1, (size // patch) ** 2 + 1, channels))
        self.norm, self.qkv = nn.LayerNorm(channels), nn.Linear(channels, 3 * channels)
        self.out, self.head = nn.Linear(channels, channels), nn.Linear(channels, 10)
        self.mlp = nn.Sequential(
            nn.Linear(channels, 24), nn.GELU(), nn.Dropout(0.1), nn.Linear(24, channels)
        )

    def attend(self, x):
        n, t, c = x.shape
        q, k, v = (
            self.qkv(x)
            .reshape(n, t, 3, self.heads, c // self.heads)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        weights = (q @ k.transpose(-2, -1) / math.sqrt(c // self.heads)).softmax(dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(n, t, c))

    def forward(self, x):
        n, c, h, w = x.shape
        p = self.patch
        x = x.view(n, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        x = torch.cat([self.token.expand(n, -1, -1), self.embed(x)], dim=1) + self.places
        x = x + self.attend(self.norm(x))
        x = x + self.mlp(x)
        return self.head(x[:, 0]), x.mean(dim=1)


class Tagger(nn.Module):
    """Ids, positions in a buffer of whole numbers, a causal mask, tied weights, a dict."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.register_buffer("position_ids", torch.arange(6))
        self.register_buffer("mask", torch.tril(torch.ones(6, 6, dtype=torch.bool)))
        self.lstm = nn.LSTM(8, 4, bidirectional=True)
        self.gru = nn.GRU(8, 8, batch_first=True)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.words.weight

    def forward(self, ids):
        t = ids.size(1)
        x = self.words(ids) + self.places(self.position_ids[:t])[None]
        y, (h, _) = self.lstm(x.transpose(0, 1))
        x = x + y.transpose(0, 1) + h[-1][:, None].repeat(1, 1, 2)
        heads = x.view(ids.shape[0], t, 2, 4).transpose(1, 2)
        scores = torch.matmul(heads, heads.transpose(-1, -2))
        scores = scores.masked_fill(~self.mask[:t, :t], float("-inf"))
        a = F.softmax(scores, -1) @ heads
        b = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        x = (a + b).transpose(1, 2).contiguous().view(x.shape)
        x, last = self.gru(x)
        return {"logits": self.out(x), "last": last[0]}


class Tied(nn.Module):
    """What is answered is as like as can be to each word."""

    def __init__(self):
        super().__init__()
        self.words, self.out = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.out.weight = self.words.weight

    def forward(self, ids):
        return self.out(self.words(ids))


@pytest.mark.parametrize("first", ["words", "out"])
def test_a_weight_that_is_another_s_transpose_is_trained_as_one(first):
    torch.manual_seed(0)
    module, ids, labels = Tied().double(), np.arange(9) % 4, np.arange(9) % 3
    if first == "out":
        module._modules = {"out": module.out, "words": module.words}
    net = nnxp.from_torch(module)
    words, out = (next(n for n, p in net.parameters().items() if p.shape == s)
                  for s in ((11, 8), (8, 11)))  # fmt: skip
    optimizer, ours = torch.optim.SGD(module.parameters(), 0.5), nnxp.SGD(0.5)
    function = nnxp.value_and_gradients(nnxp.losses.cross_entropy)
    by_hand, state = nnxp.from_torch(module), ours.init(net.parameters())
    for epochs in (1, 2):
        optimizer.zero_grad()
        F.cross_entropy(module(torch.tensor(ids)), torch.tensor(labels)).backward()
        due = module.words.weight.grad.numpy()
        for moved in (by_hand, by_hand.to("sim").to("cpu"), by_hand.astype("f4").astype("f8")):
            _, gradients = function(moved, ids, labels)
            np.testing.assert_allclose(gradients[words], due, 0, 1e-6)
            np.testing.assert_array_equal(gradients[out], gradients[words].T)
            assert np.shares_memory(moved.parameters()[words], moved.parameters()[out])
        _, gradients = function(by_hand, ids, labels)
        ours.update(by_hand.parameters(), gradients, state)
        optimizer.step()
        trained = nnxp.fit(
            net, ids, labels, loss="cross_entropy", optimizer=ours, epochs=epochs, batch=9
        ).model
        for model in (by_hand, trained):
            own = model.parameters()
            np.testing.assert_allclose(own[words], module.words.weight.detach().numpy(), 0, 1e-12)
            assert np.shares_memory(own[words], own[out])


def test_what_is_apart_is_not_taken_for_what_is_tied():
    """A program of one is not that of the other, and a name that is fixed fixes its array."""
    torch.manual_seed(0)
    tied = nnxp.from_torch(Tied().double())
    own = tied.parameters()
    words, out = (next(n for n, p in own.items() if p.shape == s) for s in ((11, 8), (8, 11)))
    apart = tied.with_parameters(own | {out: own[out] + 1})
    assert not np.shares_memory(apart.parameters()[words], apart.parameters()[out])
    ids, labels = np.arange(9) % 4, np.arange(9) % 3
    function = nnxp.value_and_gradients(nnxp.losses.cross_entropy)
    for model in (tied, apart, tied):
        value, gradients = function(model, ids, labels)
        alone, due = nnxp.value_and_gradients(nnxp.losses.cross_entropy)(model, ids, labels)
        assert value == alone
        for name, gradient in gradients.items():
            np.testing.assert_array_equal(gradient, due[name])
    options = {"loss": "cross_entropy", "epochs": 1}
    for name in (words, out):
        after = nnxp.fit(tied, ids, labels, fixed=[name], **options).model.parameters()
        np.testing.assert_array_equal(after[words], own[words])


OWN = {
    "residual": (Residual, x_of(4, 6)),
    "in place": (InPlace, x_of(4, 6)),
    "vision": (VisionTransformer, x_of(2, 3, 8, 8)),
    "tagger": (Tagger, ids_of(11, 3, 5)),
}


@pytest.mark.parametrize("name", OWN)
def test_modules_of_one_s_own(name, tmp_path):
    make, x = OWN[name]
    model = agrees(drawn(make()), x, tmp_path=tmp_path)
    assert type(model) is nnxp.TorchGraph


class Formula(nn.Module):
    def __init__(self, formula):
        super().__init__()
        self.formula = formula

    def forward(self, x):
        return self.formula(x)


FORMULAS = {
    "an option called value": lambda x: x.sin().masked_fill(x < 0, value=2),
    "padding with options": lambda x: F.pad(x, (1, 2), mode="constant", value=0.5),
    "padding that cuts": lambda x: F.pad(x, (-1, 2), value=0.5),
    "an option out": lambda x: F.normalize(x, dim=-1),
    "where by keywords": lambda x: torch.where(condition=x > 0, input=x, other=-x.sin()),
    "where by some keywords": lambda x: (torch.where(x > 0, input=x > 1, other=x < 1),
                                         torch.where(x > 0, x, other=x.sin())),
    "where as a method": lambda x: (x.sin().where(x > 0, x * 2), x.where(x > 0, other=-1)),
    "a copy that is written into": lambda x: x + x.clone().clamp_(0, 1),
    "functions of sizes": lambda x: (x * abs(x.shape[1] - 9), x / math.sqrt(x.size(-1)),
                                     x - math.floor(-x.size(1) / 4)),
    "norms over two axes": lambda x: (F.normalize(x[:, :, None], 1.0, dim=(1, 2)),
                                      F.normalize(x, p=3.0, dim=[0, 1]),
                                      F.normalize(x, float("inf"), dim=0)),
    "the largest is no number": lambda x: (
        torch.where(x > 0.5, float("nan"), x).sort(descending=True),
        torch.where(x > 0.5, float("nan"), x).topk(2).values,
        torch.where(x > 0.5, float("nan"), x).sort(1)),
    "bounds of floats": lambda x: x.argsort(1).clamp(x * 2, x * 3),
    "softmax of a type": lambda x: torch.softmax(x, 1, torch.float64),
    "sums over no axes": lambda x: (x.sum(dim=()), x.mean(())),
    "counted": lambda x: (torch.arange(0, end=x.shape[1]), torch.arange(x.shape[1]),
                          torch.arange(start=1, end=x.shape[1], step=2) + x[:, ::2],
                          torch.ones(size=(x.shape[1], 2)).sum(),
                          torch.full(size=(x.shape[1],), fill_value=2)),
    "axes by keywords": lambda x: torch.flip(x.repeat(repeats=(1, 2)), dims=[1]),
    "shapes by keywords": lambda x: torch.reshape(
        torch.permute(torch.transpose(x[:, None], dim0=1, dim1=2), dims=(0, 2, 1)), shape=(-1, 2, 3)
    ),
    "softplus with a threshold": lambda x: F.softplus(x, 2.0, threshold=1),
    "largest, and where": lambda x: x.max(1),
    "parts": lambda x: (x.sin(), x.split(2, dim=1)),
    "the largest of all": lambda x: torch.maximum(torch.max(x), x),
    "hard bounds": lambda x: (F.relu6(x * 5), F.hardtanh(x), F.hardtanh(x, -0.5, max_val=2.0)),
    "hardswish": lambda x: F.hardswish(x * 3),
    "celu": lambda x: (F.celu(x), torch.celu(x, alpha=0.5)),
    "shrinks": lambda x: (F.hardshrink(x), torch.hardshrink(x, 0.3), F.softshrink(x, 0.3),
                          F.softshrink(x), F.tanhshrink(x.exp() + 1)),
    "logsigmoid": F.logsigmoid,
    "threshold": lambda x: (F.threshold(x, 0.1, 20), torch.threshold(x, 0.1, 2.0)),
    "rrelu": lambda x: (F.rrelu(x), F.rrelu(x, 0.1, upper=0.5)),
    "softmin": lambda x: (F.softmin(x, 0), F.softmin(x, dim=-1)),
    "in place": lambda x: F.hardtanh(x.sin(), inplace=True) + F.relu6(x * 2, inplace=True),
    "cosine": lambda x: (F.cosine_similarity(x, x.sin() + 1),
                         F.cosine_similarity(x[:, None], x[None], dim=-1, eps=3.0)),
    "gather": lambda x: (torch.gather(x, 1, x.argsort(1)), torch.gather(x, 1, x[:2].argsort(1)),
                         x.gather(0, index=torch.argmax(x, 0, keepdim=True))),
    "index_select": lambda x: torch.index_select(x, 1, torch.tensor([2, 0])),
    "topk": lambda x: (torch.topk(x, 3), x.topk(2, dim=0, largest=False)),
    "topk, and its values": lambda x: torch.topk(x, 3).values.sin(),
    "sort": lambda x: (torch.sort(x), x.sort(dim=0, descending=True)),
    "sort of equals": lambda x: torch.sort(x.round(), stable=True, dim=1, descending=True),
    "argsort": lambda x: (torch.argsort(x), x.argsort(0, descending=True)),
    "powers of two, and others": lambda x: (torch.exp2(x), torch.sinh(x), x.atan(), torch.erf(x),
                                            x.sin().acos(), x.trunc(), x.abs().log10(),
                                            x.round(decimals=1)),
    "spread": lambda x: (torch.var(x), x.var(1, False), x.std(dim=1, keepdim=True), x.var(False),
                         torch.std(x, [0, 1], correction=0), torch.var(x, unbiased=False),
                         torch.var(x, 1, correction=2, keepdim=True)),
    "scans": lambda x: (torch.cumsum(x, 1), x.cumsum(dim=-1), torch.cumprod(x, 1)),
    "roll and flip": lambda x: (torch.roll(x, 1), torch.roll(x, shifts=(1, 2), dims=(0, 1)),
                                torch.flip(x, [0, 1]), x.flip(1)),
    "of two": lambda x: (torch.atan2(x, x + 1), torch.hypot(x, x.sin()), torch.fmod(x, 0.7),
                         torch.logaddexp(x, x * 2), torch.fmax(x, -x), x.fmin(x * 2)),
    "between two": lambda x: (torch.lerp(x, x * 2, 0.3), x.lerp(end=x.sin(), weight=x.abs())),
    "sums with factors": lambda x: (torch.add(x, x.sin(), alpha=2), x.sub(x.sin(), alpha=0.5),
                                    torch.rsub(x, 1, alpha=2), x.addcmul(x, x, value=0.5),
                                    torch.addcdiv(x, x, x.abs() + 1, value=0.5)),
    "bounds of one side": lambda x: (x.clamp_min(math.fmod(x.shape[1], 4)), x.frac(),
                                     torch.clamp_max(x, max=0.5)),
    "kinds of numbers": lambda x: (torch.nan_to_num(torch.where(x > 0.5, float("nan"), x)),
                                   torch.where(x > 0.5, float("inf"), x).nan_to_num(posinf=2.0),
                                   +x, torch.sgn(x),
                                   torch.signbit(x), torch.isclose(x, x.abs(), atol=1e-6),
                                   x.count_nonzero(1), torch.ge(x, 0) ^ torch.not_equal(x, 1)),
    "logit": lambda x: (torch.logit(x.sigmoid()), torch.special.logit(x, eps=0.1)),
    "logsumexp": lambda x: (torch.logsumexp(x, 1), x.logsumexp(dim=(0, 1), keepdim=True),
                            torch.special.logsumexp(x * 400, -1)),
    "spread, and means": lambda x: (torch.var_mean(x, 1), torch.std_mean(x, [0, 1], correction=0),
                                    torch.var_mean(x, False), x.aminmax(dim=1, keepdim=True)),
    "norms": lambda x: (x.norm(), x.norm(dim=1), x.norm(1, -1, keepdim=True), x.norm(3, (0, 1)),
                        torch.norm(x, p="fro", dim=(0, 1)), torch.norm(x, 2, 1),
                        torch.linalg.norm(x), torch.linalg.norm(x, float("inf"), dim=0),
                        torch.linalg.norm(x[None], "fro", dim=(1, 2), keepdim=True),
                        torch.linalg.vector_norm(x, 0, dim=1), torch.linalg.vector_norm(x),
                        torch.linalg.vector_norm(x, ord=-float("inf"), dim=(0, 1), keepdim=True),
                        torch.linalg.matrix_norm(x)),
    "distances": lambda x: (torch.dist(x, x.sin()), torch.cdist(x, x.sin()), torch.cdist(x, x, 1),
                            F.pairwise_distance(x, x.sin(), keepdim=True)),
    "products": lambda x: (torch.mm(x, x.T), x.mv(x[0]), torch.dot(x[0], x[1]), x[0].outer(x[1]),
                           torch.inner(x, x), torch.addmm(x.sum(1), x, x.T, beta=0.5, alpha=2),
                           torch.addmv(x[:, 0], x, x[0]), torch.tensordot(x, x, dims=([1], [1])),
                           torch.tensordot(x, x.T, 1)),
    "diagonals": lambda x: (torch.diagonal(x, 1), x[None].diagonal(dim1=1, dim2=2), x.trace()),
    "differences": lambda x: (torch.diff(x), x.diff(2, dim=1, prepend=x[:, :2], append=x)),
    "in the middle": lambda x: (torch.median(x, 1), x.median(dim=-1, keepdim=True).values,
                                torch.median(torch.where(x > 1, float("nan"), x), 1),
                                torch.kthvalue(x, 2), x.kthvalue(k=6, dim=1, keepdim=True)),
    "side by side": lambda x: (torch.hstack([x, x]), torch.hstack((x[0], x[1])),
                               torch.vstack([x[0], x[1]]),
                               torch.meshgrid(x[0], x[1], indexing="xy"),
                               torch.meshgrid([x[0], x[1], x[2]], indexing="ij"),
                               x.take_along_dim(x.argsort(1), 1), x.ravel(),
                               torch.take_along_dim(x, indices=x[0].argsort()),
                               torch.broadcast_to(x[:, None], size=(-1, 2, 6))),
    "whole numbers that meet floats": lambda x: (
        torch.dist(x, x.argsort(1)), F.pairwise_distance(x.argsort(1), x.argsort(0)) * x[:, 0],
        torch.outer(x[0], x[0].argsort()), torch.addcmul(x.argsort(1), x, x.argsort(1), value=2),
        torch.addcdiv(x.argsort(1), x, x.argsort(1) + 1), torch.max(x, x.argsort(1)),
        torch.min(x.argsort(1), x), F.cosine_similarity(x, x.argsort(1))),
    "windows": lambda x: (x.unfold(1, 3, 2), x[:, None].unfold(dimension=-1, size=2, step=1)),
    "like nothing": lambda x: (torch.empty_like(x).fill_(2), x.new_empty(2, 3).zero_()),
    "like another": lambda x: (x.new_zeros(2, 3), x.new_ones((3,)), x.new_full((2,), 1.5),
                               x.new_zeros(2, dtype=torch.int64) + x.argmax(1)[:2],
                               x.cos().fill_(2), x.sin().zero_(), (x * 0).copy_(x[0])),
    "one_hot": lambda x: (F.one_hot(x.argmax(1), 8), F.one_hot(x.argmax(1), num_classes=6) * x),
    "einsum": lambda x: (torch.einsum("ij,kj->ik", x, x), torch.einsum("ij,ij->i", [x, x]),
                         torch.einsum("...j,jk->...k", x, x.T)),
}  # fmt: skip


WRONG = {
    "an axis that is not there": (lambda x: F.softmax(x, dim=7), "no axis 7"),
    "an axis before the first": (lambda x: F.log_softmax(x, dim=-3), "no axis -3"),
    "an axis to flatten": (lambda x: torch.flatten(x, 7), "no axis 7"),
    "fewer than none": (lambda x: torch.topk(x, -1)[0], "topk takes k"),
    "more than there are": (lambda x: torch.topk(x, 9)[0], "up to the 6"),
    "a mode of other axes": (
        lambda x: F.interpolate(x[:, None], scale_factor=2, mode="bilinear"), "over 2 axes"),
    "corners of the nearest": (
        lambda x: F.interpolate(x[:, None], scale_factor=2, align_corners=True), "align_corners"),
    "norms of matrices": (lambda x: torch.linalg.norm(x, 1), "Frobenius"),
    "a place that is not there": (lambda x: torch.kthvalue(x, 7), "from 1 to 6"),
    "two sizes": (lambda x: F.interpolate(x[:, None], size=4, scale_factor=2), "one of them"),
    "a padding of half an axis": (lambda x: F.pad(x, (1, 1, 1)), "two numbers for each axis"),
    "a padding of more axes": (lambda x: F.pad(x, (1,) * 6), "two numbers for each axis"),
    "classes that are not told": (lambda x: F.one_hot(x.argmax(1)), "one_hot without num_classes"),
    "a class beyond the last": (lambda x: F.one_hot(x.argmax(1) + 4, 6), "ids are 0 to 5"),
    "a class before the first": (lambda x: F.one_hot(x.argmax(1) - 4, 6), "ids are 0 to 5"),
    "noise in eval": (lambda x: F.dropout(x), "training=self.training"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_torch_refuses_is_refused(name):
    formula, said = WRONG[name]
    with pytest.raises(nnxp.NnxpError, match=said):
        nnxp.from_torch(Formula(formula))(x_of(4, 6))


@pytest.mark.filterwarnings("ignore:torch.meshgrid")
def test_a_grid_is_by_rows_where_its_indexing_is_not_told():
    agrees(Formula(lambda x: torch.meshgrid(x[0], x[1])), x_of(4, 6))


@pytest.mark.parametrize("name", FORMULAS)
def test_options_and_answers_of_functions(name, tmp_path):
    agrees(Formula(FORMULAS[name]), x_of(4, 6), tmp_path=tmp_path)


SPACE = {
    "max pool": lambda x: (F.max_pool2d(x, 2), F.max_pool2d(x, (3, 2), 2, (1, 0))),
    "max pool with options": lambda x: F.max_pool2d(
        x, kernel_size=3, stride=2, padding=1, dilation=(1, 2), ceil_mode=True
    ),
    "max pool over one and three axes": lambda x: (
        F.max_pool1d(x.flatten(2), x.size(3), stride=(2,)),
        F.max_pool3d(x[:, None], 3, 2, ceil_mode=True),
    ),
    "average pool": lambda x: (F.avg_pool2d(x, 3, 2, 1), F.avg_pool2d(x, (2, 3))),
    "average pool with options": lambda x: F.avg_pool2d(
        x, 3, stride=2, padding=1, ceil_mode=True, count_include_pad=False
    ),
    "average pool over one and three axes": lambda x: (
        F.avg_pool1d(x.flatten(2), 5, 2, padding=2),
        F.avg_pool3d(x[:, None], (1, 2, 3), ceil_mode=True),
    ),
    "average of all of space": lambda x: F.avg_pool2d(x, x.shape[2:]),
    "lp pool": lambda x: (
        F.lp_pool2d(x, 2, 3, 2, ceil_mode=True),
        F.lp_pool1d(x.flatten(2).abs(), 3, 4),
        F.lp_pool3d(x[:, None], 2.0, kernel_size=(1, 3, 2), ceil_mode=True),
    ),
    "adaptive average": lambda x: (
        F.adaptive_avg_pool1d(x.flatten(2), 5),
        F.adaptive_avg_pool2d(x, (None, 2)),
        F.adaptive_avg_pool3d(x[:, None], (1, 2, 3)),
    ),
    "adaptive largest": lambda x: (
        F.adaptive_max_pool1d(x.flatten(2), 1),
        F.adaptive_max_pool2d(x, output_size=(3, 1)),
        F.adaptive_max_pool3d(x[:, None], 2),
    ),
    "nearest": lambda x: (F.interpolate(x, scale_factor=2), F.interpolate(x, (5, 11))),
    "nearest exact": lambda x: F.interpolate(x, size=(5, 11), mode="nearest-exact"),
    "linear": lambda x: (
        F.interpolate(x.flatten(2), 20, mode="linear"),
        F.interpolate(x, scale_factor=(1.75, 0.625), mode="bilinear"),
        F.interpolate(x[:, None], scale_factor=2, mode="trilinear", align_corners=False),
    ),
    "linear of a scale that is rounded": lambda x: F.interpolate(
        x, scale_factor=1.75, mode="bilinear", recompute_scale_factor=True
    ),
    "linear between corners": lambda x: (
        F.interpolate(x, scale_factor=1.75, mode="bilinear", align_corners=True),
        F.interpolate(x.flatten(2), 20, mode="linear", align_corners=True),
    ),
    "linear to the size of another": lambda x: (
        x + F.interpolate(F.max_pool2d(x, 2), x.shape[-2:], mode="bilinear")
    ),
    "cubic": lambda x: (
        F.interpolate(x, 9, mode="bicubic"),
        F.interpolate(x, 9, mode="bicubic", align_corners=True),
    ),
    "smaller, smoothed": lambda x: (
        F.interpolate(x, 4, mode="bicubic", antialias=True),
        F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True),
    ),
    "areas": lambda x: F.interpolate(x, scale_factor=0.5, mode="area"),
    "upsample": lambda x: F.upsample(x, scale_factor=2, mode="bilinear"),
    "sampled at a grid": lambda x: (
        F.grid_sample(x, torch.tanh(x[:, :2, :3].permute(0, 2, 3, 1)), align_corners=False),
        F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1), "bicubic", "border", True),
        F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1), "nearest", "reflection", False),
        F.grid_sample(x[:, :, None], x[:, None, :, :5, :3], align_corners=True),
        F.affine_grid(x[:, :2, :3, 0], (3, 1, 4, 5), align_corners=True),
    ),
    "shuffles": lambda x: (
        F.pixel_shuffle(x, 2),
        F.pixel_unshuffle(x[..., :6], downscale_factor=2),
        F.channel_shuffle(x, 2),
    ),
    "norms": lambda x: (F.group_norm(x, 2), F.instance_norm(x, eps=0.1)),
    "response norm": lambda x: (
        F.local_response_norm(x, 3),
        F.local_response_norm(x, 2, alpha=0.1, beta=0.5, k=2.0),
    ),
    "glu": lambda x: (F.glu(x, 1), F.glu(x[..., :6])),
}


@pytest.mark.filterwarnings("ignore:.*upsample. is deprecated")
@pytest.mark.parametrize("name", SPACE)
def test_functions_over_space(name, tmp_path):
    rounded = name.startswith(("linear", "cubic"))  # places in x, to float32
    agrees(Formula(SPACE[name]), x_of(3, 4, 8, 7), tmp_path=tmp_path, rounded=rounded)


class Weighted(nn.Module):
    def __init__(self, formula, *shapes):
        super().__init__()
        self.formula = formula
        self.weights = nn.ParameterList(torch.empty(shape) for shape in shapes)

    def forward(self, x):
        return self.formula(x, *self.weights)


WEIGHTED = {
    "conv": (lambda x, w: F.conv2d(x, w), (6, 4, 3, 3)),
    "conv with options": (
        lambda x, w, b: F.conv2d(x, w, b, 2, (1, 2), dilation=(2, 1), groups=2),
        (6, 2, 3, 2),
        (6,),
    ),
    "conv by keywords": (
        lambda x, w, b: F.conv2d(x, weight=w, bias=b, padding=1, stride=(2,)),
        (6, 4, 3, 3),
        (6,),
    ),
    "conv of the same size": (lambda x, w: F.conv2d(x, w, padding="same"), (6, 4, 2, 3)),
    "conv, valid": (lambda x, w: F.conv2d(x, w, padding="valid"), (6, 4, 2, 3)),
    "conv by channel": (lambda x, w: F.conv2d(x, w, groups=4, padding=1), (4, 1, 3, 3)),
    "conv over one axis": (lambda x, w: F.conv1d(x.flatten(2), w, padding=2), (6, 4, 5)),
    "conv over three axes": (lambda x, w: F.conv3d(x[:, None], w), (2, 1, 3, 3, 3)),
    "transposed": (lambda x, w, b: F.conv_transpose2d(x, w, b, 2, 1, 1), (4, 6, 3, 3), (6,)),
    "transposed in groups": (
        lambda x, w: F.conv_transpose2d(x, w, stride=(1, 2), groups=2, dilation=2),
        (4, 3, 2, 3),
    ),
    "transposed over one axis": (
        lambda x, w: F.conv_transpose1d(x.flatten(2), w, stride=3, output_padding=2),
        (4, 3, 2),
    ),
    "transposed over three axes": (
        lambda x, w: F.conv_transpose3d(x[:, None], w),
        (1, 3, 2, 2, 2),
    ),
    "group norm": (lambda x, w, b: F.group_norm(x, 2, w, b, eps=0.1), (4,), (4,)),
    "instance norm": (lambda x, w, b: F.instance_norm(x, weight=w, bias=b), (4,), (4,)),
    "batch norm": (
        lambda x, m, v, w, b: F.batch_norm(x, m, v.square() + 0.5, w, b, False, 0.1, 0.2),
        *[(4,)] * 4,
    ),
    "batch norm of vectors": (
        lambda x, m, v: F.batch_norm(x[..., 0, 0], m, v.square() + 0.5),
        *[(4,)] * 2,
    ),
    "rms norm": (lambda x, w: F.rms_norm(x, (7,), w, eps=0.1), (7,)),
    "prelu": (lambda x, w: F.prelu(x, w), (4,)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", WEIGHTED)
def test_functions_over_space_with_weights(name, tmp_path):
    formula, *shapes = WEIGHTED[name]
    agrees(drawn(Weighted(formula, *shapes)), x_of(3, 4, 8, 7), tmp_path=tmp_path)


FUNCTIONAL = {
    "Upsample": lambda: nn.Upsample(scale_factor=2),
    "Upsample, bilinear": lambda: nn.Upsample(9, mode="bilinear", align_corners=True),
    "UpsamplingBilinear2d": lambda: nn.UpsamplingBilinear2d(scale_factor=2),
    "LPPool2d": lambda: nn.LPPool2d(2, 3, stride=2),
    "LocalResponseNorm": lambda: nn.LocalResponseNorm(3),
    "PixelUnshuffle": lambda: nn.Sequential(nn.ReflectionPad2d((0, 1, 0, 0)), nn.PixelUnshuffle(2)),
    "pads": lambda: nn.Sequential(
        nn.ReflectionPad2d(1), nn.ZeroPad2d((1, 2, 0, 1)), nn.ReplicationPad2d(1)
    ),
    "ConstantPad2d": lambda: nn.ConstantPad2d(1, 0.5),
    "ChannelShuffle": lambda: nn.ChannelShuffle(2),
    "Softmin": lambda: nn.Softmin(1),
    "RReLU": lambda: nn.RReLU(),
}


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_modules_that_are_one_function(name, tmp_path):
    agrees(nn.Sequential(FUNCTIONAL[name]()).eval(), x_of(3, 4, 8, 7), tmp_path=tmp_path)


class Digits(nn.Module):
    """The network of torch's tutorials."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 8, 3)
        self.fc1, self.fc2 = nn.Linear(8 * 5 * 5, 16), nn.Linear(16, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), (2, 2))
        x = F.relu(self.fc1(F.dropout(torch.flatten(x, 1), 0.5, self.training)))
        return F.log_softmax(self.fc2(x), dim=1)


def test_functions_and_modules_of_a_cnn_become_the_same_program(tmp_path):
    net = drawn(Digits())
    pool, act = nn.MaxPool2d(2), nn.ReLU()
    modules = nn.Sequential(
        net.conv1, act, pool, net.conv2, act, pool, nn.Flatten(), net.fc1, act, net.fc2,
        nn.LogSoftmax(1),
    )  # fmt: skip
    model = agrees(net, x_of(3, 1, 28, 28), tmp_path=tmp_path)
    row = (3, 1, 28, 28), "float32"
    programs = [
        [step.name for step in optimized(each.program(row)).steps]
        for each in (model, nnxp.from_torch(modules.eval()))
    ]
    assert programs[0] == programs[1]
    assert programs[0][:4] == ["moveaxis", "conv_max_pool", "conv_max_pool", "moveaxis"]


def test_a_cnn_of_functions_goes_through_onnx(tmp_path):
    pytest.importorskip("onnx", reason="onnx is not installed")
    model, x = nnxp.from_torch(drawn(Digits())), x_of(5, 1, 28, 28).astype("float32")
    nnxp.save_onnx(model, tmp_path / "digits.onnx", row=x.shape[1:])
    again = nnxp.load_onnx(tmp_path / "digits.onnx")
    np.testing.assert_allclose(again(x), nnxp.predict(model, x), rtol=1e-5, atol=1e-6)


def test_a_cnn_of_functions_has_torch_s_gradients():
    module = drawn(Digits()).double()
    x, labels = x_of(5, 1, 28, 28), ids_of(10, 5)
    F.nll_loss(module(torch.from_numpy(x)), torch.from_numpy(labels)).backward()
    model = nnxp.from_torch(module)
    _, gradients = nnxp.value_and_gradients(nnxp.losses.cross_entropy)(model, x, labels)
    names = {"conv1": "layers.0.inner", "conv2": "layers.1.inner", "fc1": "layers.2",
             "fc2": "layers.3"}  # fmt: skip
    for theirs, ours in names.items():
        weight, bias = (p.grad.numpy() for p in module.get_submodule(theirs).parameters())
        due = weight.T if weight.ndim == 2 else weight.transpose(2, 3, 1, 0)
        np.testing.assert_allclose(gradients[f"{ours}.weight"], due, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(gradients[f"{ours}.bias"], bias, rtol=1e-9, atol=1e-12)


SLOPES = {
    name: FORMULAS[name]
    for name in """of two,between two,sums with factors,bounds of one side,logit,logsumexp,products,
    diagonals,differences""".replace("\n    ", "").split(",")
} | {
    "spread, and means": lambda x: (torch.var_mean(x, 1), torch.std_mean(x, (0, 1))),
    "norms": lambda x: (x.norm(), x.norm(1, -1), torch.linalg.norm(x[None] * 0, dim=(1, 2))),
    "distances": lambda x: (torch.cdist(x, x), F.pairwise_distance(x, x.sin())),
    "in the middle": lambda x: (torch.median(x, 1)[0], torch.kthvalue(x, 2).values),
    "of shapes": lambda x: (torch.hstack([x, x]), torch.vstack([x, x]),
                            torch.meshgrid(x[0], x[1], indexing="xy")),
}  # fmt: skip


@pytest.mark.parametrize("name", SLOPES)
def test_functions_have_torch_s_gradients(name):
    module, x = Formula(SLOPES[name]), x_of(4, 6)
    tensor = torch.from_numpy(x).requires_grad_()
    answers = [y for y in flat_tensors(module(tensor)) if y.is_floating_point()]
    worth = [torch.cos(torch.arange(y.numel(), dtype=y.dtype)).reshape(y.shape) for y in answers]
    sum((y * dy).sum() for y, dy in zip(answers, worth, strict=True)).backward()
    _, back = nnxp.vjp(nnxp.from_torch(module), x)
    np.testing.assert_allclose(back(*(dy.numpy() for dy in worth)), tensor.grad, rtol=1e-9)


class Standardized(nn.Conv2d):
    """A convolution whose weight is standardized where it is used."""

    def forward(self, x):
        weight = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(weight, None, None, training=True, momentum=0.0, eps=0.1)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride)


SELDOM = {
    "reflected": (lambda: nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="reflect"), (4, 3, 5, 6)),
    "circular": (lambda: nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular"), (4, 3, 5)),
    "replicated": (lambda: nn.Sequential(nn.Conv2d(3, 4, 4, padding="same",
                                                   padding_mode="replicate")), (4, 3, 5, 6)),
    "InstanceNorm with running statistics": (
        lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True), (4, 3, 5, 6)),
    "Softmax2d": (lambda: nn.Softmax2d(), (4, 3, 5, 6)),
    "a standardized weight": (lambda: Standardized(3, 4, 3, 2), (4, 3, 5, 6)),
    "weight_norm": (lambda: nn.utils.weight_norm(nn.Conv1d(3, 4, 3)), (4, 3, 5)),
    "weight_norm of a recurrence": (lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4))),
                                    (4, 5, 3)),
    "Unfold": (lambda: nn.Unfold((2, 3), (2, 1), (1, 0), (1, 2)), (4, 3, 5, 6)),
    "zeros of sizes": (lambda: Formula(lambda x: x + torch.zeros(x.size(0), 3) + torch.ones(3)),
                       (4, 3)),
    "eye": (lambda: Formula(lambda x: x @ torch.eye(x.shape[-1]).to(x.dtype)), (4, 5, 3)),
    "chunks that are gone through": (
        lambda: Formula(lambda x: torch.cat([2 * part for part in x.chunk(3, -1)], 1)), (4, 2, 6)),
    "chunks in a list": (lambda: Formula(lambda x: torch.cat([*torch.chunk(x, 2, 1), x], 1)),
                         (4, 6)),
    "what a mask writes": (lambda: Formula(lambda x: masked(x.clone(), x.sum(-1) > 0)), (4, 5, 3)),
}  # fmt: skip


def masked(x, mask):
    x[mask] = 0.5
    return x


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", SELDOM)
def test_what_is_seldom_is_read_too(name, tmp_path):
    make, shape = SELDOM[name]
    agrees(drawn(make()), x_of(*shape), tmp_path=tmp_path)


def test_an_embedding_bag_and_a_bilinear_layer(tmp_path):
    ids = ids_of(5, 6, 3)
    for mode in ("mean", "sum", "max"):
        agrees(drawn(nn.EmbeddingBag(5, 4, mode=mode)), ids, tmp_path=tmp_path)
    agrees(drawn(nn.Bilinear(3, 4, 5)), x_of(6, 2, 3), x_of(6, 2, 4), tmp_path=tmp_path)
    with pytest.raises(nnxp.ConversionError, match="embedding_bag with padding_idx=1"):
        nnxp.from_torch(nn.EmbeddingBag(5, 4, padding_idx=1))


def test_what_a_mask_writes_is_of_the_type_that_it_is_written_to(tmp_path):
    agrees(Formula(lambda x: masked(x.clone(), x > 2)), ids_of(5, 6, 3), tmp_path=tmp_path)


def test_what_cannot_be_traced_is_named_by_its_line():
    def larger(x):
        return x if x.sum() > 0 else -x  # here

    with pytest.raises(nnxp.ConversionError, match=r"test_from_torch.py, line \d+, .*# here"):
        nnxp.from_torch(Formula(larger))


class Picks(nn.Module):
    """y = pick(x, ids, table), with a table that is a buffer."""

    def __init__(self, pick):
        super().__init__()
        self.pick = pick
        self.register_buffer("table", torch.zeros(5, 4, 3))

    def forward(self, x, ids):
        return self.pick(x, ids, self.table)


PICKS = {
    "of a table": lambda x, ids, table: table[ids],
    "of a table, along another axis": lambda x, ids, table: table[:, ids[..., 0] % 4].sum(0),
    "of a table, by two": lambda x, ids, table: table[ids, ids % 3],
    "of a table, by two apart": lambda x, ids, table: table[ids[..., 0], :, ids[..., 1] % 3],
    "by the rows": lambda x, ids, table: x[torch.arange(x.shape[0]), ids[:, 0]],
    "by the rows, several": lambda x, ids, table: x[torch.arange(ids.shape[0])[:, None], ids],
    "by the rows, of two axes": lambda x, ids, table: x[
        torch.arange(x.size(0)), ids[:, 0], ids[:, 1] % 3
    ],
    "by the rows, the same": lambda x, ids, table: x[
        torch.arange(x.size(0))[:, None], torch.tensor([3, 1])
    ],
    "by the rows, and nothing else": lambda x, ids, table: x[torch.arange(x.size(0))],
    "by a list": lambda x, ids, table: x + table[[4, 0, 2, 3, 1]].sum((0, 1)),
    "by a list, along another axis": lambda x, ids, table: x[:, [4, 0, -1]],
    "by a number and a list": lambda x, ids, table: x + table[2, :, [2, 0, 1]].sum(0),
}


@pytest.mark.parametrize("name", PICKS)
def test_what_arrays_of_whole_numbers_pick_goes_through_an_engine(name, tmp_path):
    x, ids = x_of(7, 5, 3), ids_of(5, 7, 2)
    model = agrees(drawn(Picks(PICKS[name])), x, ids, tmp_path=tmp_path)
    x = x.astype("float32")
    np.testing.assert_array_equal(
        nnxp.predict(model, (x, ids), memory_limit=2000), np.asarray(model(x, ids))
    )


BEYOND = {
    "of a table": lambda x, ids, table: table[ids % 5, ids],
    "of a table, the other way round": lambda x, ids, table: table[:, :, :2][ids, ids % 2],
    "of two axes of a row": lambda x, ids, table: x[
        torch.arange(x.size(0)), ids[:, 0], ids[:, 0] % 3
    ],
}


@pytest.mark.parametrize("wrong", [5, -6])
@pytest.mark.parametrize("name", BEYOND)
def test_an_id_beyond_its_axis_is_refused_though_what_it_would_pick_is_there(name, wrong):
    model = nnxp.from_torch(drawn(Picks(BEYOND[name])))
    x, ids = x_of(7, 5, 3).astype("float32"), ids_of(4, 7, 2)
    with nnxp.Engine(model, "cpu") as engine, nnxp.Engine(model, "sim") as other:
        for run in (model, engine.whole, lambda *xs: engine(xs), lambda *xs: other(xs)):
            run(x, ids)
        ids[3, 0] = wrong
        for run in (model, engine.whole, lambda *xs: engine(xs), lambda *xs: other(xs)):
            with pytest.raises(IndexError, match="out of bounds"):
                run(x, ids)


def test_chunks_that_were_counted_are_as_many():
    model = nnxp.from_torch(Formula(lambda x: (parts := x.chunk(3, 1))[0] * len(parts)))
    np.testing.assert_array_equal(model(np.ones((2, 6))), np.full((2, 2), 3))
    with pytest.raises(nnxp.ShapeError, match="chunk of 4 into 3 makes 2"):
        model(np.ones((2, 4)))


def test_several_threads_may_trace():
    """Each replaces functions of torch's meanwhile, and one put back what another had put there."""
    module = Formula(lambda x: (x + torch.zeros(1, 3), time.sleep(0.02))[0])
    zeros = torch.zeros
    with ThreadPoolExecutor(2) as pool:
        models = list(pool.map(nnxp.from_torch, [module] * 6))
    assert torch.zeros is zeros
    assert all((model(np.ones((2, 3))) == 1).all() for model in models)


def test_numbers_are_no_arrays():
    with pytest.raises(nnxp.DtypeMismatch, match="int is not an array"):
        FUNCTIONS["sign"](3)


def test_functions_of_all_rows():
    """As they are, not in a program: they compute with the number of rows."""
    module, x = Formula(lambda x: (x.median(), torch.median(x, dim=0), torch.vstack([x[0], x]),
                        torch.where(x < 1, -float("inf"), x).logsumexp(0))), x_of(5, 4)  # fmt: skip
    answers = nnxp.from_torch(module)(x)
    for y, due in zip(answers, flat(module(torch.from_numpy(x))), strict=True):
        np.testing.assert_allclose(y, due, rtol=1e-12)


class NormedByBuffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 3, 1))
        self.register_buffer("mean", torch.empty(4))
        self.register_buffer("var", torch.empty(4))

    def forward(self, x):
        return F.batch_norm(F.conv1d(x, self.weight), self.mean, self.var).flatten(1)


def test_parameters_learn_and_buffers_do_not(tmp_path):
    x = x_of(8, 3, 2).astype("float32")
    model = agrees(drawn(NormedByBuffers()), x, tmp_path=tmp_path)
    trained = nnxp.fit(model, x, np.ones((8, 8), "float32"), loss="mean_square", epochs=1).model
    before, after = model.parameters(), trained.parameters()
    assert [before[n].shape for n in before if (before[n] != after[n]).any()] == [(4, 3, 1)]


WHOLE_NUMBERS = {
    "and": lambda n, x: torch.logical_and(n, n + 1),
    "or": lambda n, x: torch.logical_or(n, x),
    "xor": lambda n, x: torch.logical_xor(n, n - 1),
    "sigmoid": lambda n, x: torch.sigmoid(n),
    "tanh": lambda n, x: n.tanh(),
    "reciprocal": lambda n, x: torch.reciprocal(n + 10),
    "roots": lambda n, x: n.abs().sqrt() + torch.rsqrt(n + 10),
    "times a half": lambda n, x: (n * 0.5, 0.5 - n, n.abs() ** 0.5, (x > 0) * 0.5),
    "divided towards zero": lambda n, x: torch.div(n, 2, rounding_mode="trunc"),
    "divided": lambda n, x: (n / 2, n // 2, torch.div(n, 0.7, rounding_mode="floor")),
    "clamped": lambda n, x: n.clamp(min=-1.5),
    "angles": lambda n, x: (torch.atan2(n, n + 1), torch.logsumexp(n, 1), n.logit(0.1)),
    "in the middle": lambda n, x: (n.median(1), n.aminmax(dim=1), n.diff(), torch.fmod(n, 2)),
    "chosen": lambda n, x: (torch.where(x > 0, n, 0.5), torch.where(x > 0, 1.0, 0.0)),
    "larger": lambda n, x: torch.maximum(x, n),
    "beside floats": lambda n, x: (torch.cat([x, n], 1), torch.stack([n, x])),
}


@pytest.mark.parametrize("name", WHOLE_NUMBERS)
def test_whole_numbers_become_what_they_become_in_torch(name):
    module = Formula(lambda x: WHOLE_NUMBERS[name]((x * 3).long(), x))
    x = torch.from_numpy(x_of(4, 6).astype("float32"))
    model = nnxp.from_torch(module)
    program = model.program((x.shape, "float32"))
    for answers in (results(model(x.numpy())), results(program(x.numpy()))):
        for y, due in zip(answers, flat(module(x)), strict=True):
            assert y.dtype == due.dtype
            np.testing.assert_allclose(y, due, rtol=1e-6)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(6, 2)
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        self.seen.add_(1)
        return self.dense(x)


def test_what_is_written_and_never_read_is_no_part_of_the_model():
    assert isinstance(nnxp.from_torch(Counting()), nnxp.Dense)


def test_modules_in_a_row_are_a_sequential_of_plain_layers():
    module = nn.Sequential(
        nn.Linear(3, 4), nn.Sequential(nn.ReLU(), nn.Dropout(0.2)), nn.Linear(4, 2)
    )
    model = agrees(drawn(module), x_of(5, 3))
    kinds = [type(each) for each in model.layers]
    assert kinds == [nnxp.Dense, nnxp.Activation, nnxp.Dropout, nnxp.Dense]


def test_a_graph_is_one_model_on_the_device_too():
    model = nnxp.from_torch(drawn(VisionTransformer()))
    x = x_of(2, 3, 8, 8).astype("float32")
    there = model.to("sim")(nnxp.to_backend(x, "sim"))
    for y, due in zip(there, model(x), strict=True):
        np.testing.assert_allclose(nnxp.asnumpy(y), due, rtol=1e-5, atol=1e-6)
    assert model.parameter_count == sum(p.numel() for p in VisionTransformer().parameters())


def test_the_module_is_left_as_it_was_and_shares_nothing():
    module = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)).train()
    module[1].eval()
    model = nnxp.from_torch(module)
    assert (module.training, module[0].training, module[1].training) == (True, True, False)
    x = x_of(2, 3).astype("float32")
    before = model(x)
    with torch.no_grad():
        module[0].weight.zero_()
    np.testing.assert_array_equal(model(x), before)


class Training(nn.Module):
    def forward(self, x):
        return x * 0 if self.training else F.dropout(x, 0.5, self.training) + 1


def test_a_module_in_training_is_read_as_it_is_in_eval():
    module = Training().train()
    x = x_of(2, 3)
    np.testing.assert_array_equal(nnxp.from_torch(module)(x), x + 1)
    assert module.training


def test_tensors_that_come_and_go_are_not_taken_for_each_other():
    from nnxp.io.torch import _Reader

    reading = _Reader(nn.Identity(), None)
    for size in (3, 64, 4096):  # of some, memory is given out again at once
        taken = [reading.take(torch.arange(size).float() * 0 + i) for i in range(60)]
        assert [float(each[0]) for each in taken] == list(range(60))
    tied = torch.ones(3)
    assert reading.take(tied) is reading.take(tied)


def test_inputs_are_called_as_forward_calls_them():
    model = nnxp.from_torch(drawn(OneStep("LSTMCell")))
    assert (model.input_names, model.takes) == (("x", "h", "c"), ("float",) * 3)
    assert nnxp.from_torch(drawn(Tagger())).takes == ("int",)


def test_another_type_and_bfloat16():
    module = drawn(nn.Linear(3, 4))
    assert nnxp.from_torch(module, dtype="float64").dtype == np.float64
    half = nnxp.from_torch(module.bfloat16())
    assert half.dtype.name == "bfloat16"
    np.testing.assert_array_equal(
        half.weight.astype("float32"), module.weight.float().detach().numpy().T
    )


@pytest.mark.parametrize("kind", ["float64", "float16", "bfloat16"])
def test_norms_without_weights_are_of_the_type_of_the_others(kind):
    norms = nn.InstanceNorm1d(4), nn.GroupNorm(2, 4, affine=False), nn.LayerNorm(5, bias=False)
    module = nn.Sequential(nn.Conv1d(3, 4, 1), *norms).to(getattr(torch, kind))
    assert str(nnxp.from_torch(module).dtype) == kind
    assert str(nnxp.from_torch(module, dtype="float32").dtype) == "float32"


def test_parametrized_weights_are_read_as_they_are():
    module = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    agrees(drawn(module), x_of(5, 3))


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(4, 4), nn.Fold(4, 2))
        self.norm = nn.BatchNorm1d(4, track_running_stats=False)
        self.head = nn.FractionalMaxPool2d(2, 3)

    def forward(self, x):
        return self.head(torch.fft.rfft(self.norm(self.stem[1](self.stem[0](x), x))).lgamma())


def test_all_that_cannot_be_read_is_named_at_once():
    with pytest.raises(nnxp.ConversionError) as error:
        nnxp.from_torch(Broken())
    said = str(error.value)
    for each in ("stem.1: torch has Fold", "norm: BatchNorm1d without running statistics",
                 "head: torch has FractionalMaxPool2d", "fft_rfft", "lgamma",
                 "torch.onnx.export"):  # fmt: skip
        assert each in said, each


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class StatesAsOne(nn.Module):
    """What asks whether it got a tuple is told no: it is asked by torch.fx."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x):
        states = self.lstm(x)[1]
        last = states[0] if isinstance(states, tuple) else states
        return last.transpose(0, 1)


class Aliased(nn.Module):
    def __init__(self, view):
        super().__init__()
        self.view = view

    def forward(self, x):
        y = x * 2
        view = self.view(y, x)
        y.add_(1)
        return view


REFUSED = {
    "no module": (lambda: 3, "takes a torch.nn.Module"),
    "control flow": (Branches, "cannot be traced"),
    "noise": (lambda: Formula(lambda x: x + torch.randn(6)), "Formula draws at random"),
    "a write seen through a view": (
        lambda: Aliased(lambda y, x: y.view(-1)),
        "writes into an array that view looks at",
    ),
    "a write seen through a matrix turned": (
        lambda: Aliased(lambda y, x: y.T[0]),
        "writes into an array that getitem looks at",
    ),
    "a write seen through a shape": (
        lambda: Aliased(lambda y, x: y.reshape_as(x)),
        "writes into an array that reshape_as looks at",
    ),
    "a write seen through the same type": (
        lambda: Aliased(lambda y, x: y.to(torch.float32)),
        "writes into an array that to looks at",
    ),
    "a method of several arrays": (StatesAsOne, "method transpose of several arrays"),
    "time first": (lambda: nn.LSTM(3, 4), "batch_first=True"),
    "max_norm": (lambda: nn.Embedding(3, 4, max_norm=1.0), "max_norm"),
    "bias_kv": (
        lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True, batch_first=True),
        "add_bias_kv",
    ),
    "a decoder of strangers": (
        lambda: nn.TransformerDecoder(nn.TransformerEncoderLayer(4, 2, 4), 1),
        "TransformerDecoder of TransformerEncoderLayer",
    ),
    "an encoder of one's own": (
        lambda: nn.Transformer(4, 2, custom_encoder=nn.Identity(), batch_first=True),
        "Transformer with the encoder Identity",
    ),
    "a transformer with time first": (
        lambda: nn.Transformer(4, 2, 1, 1, 4),
        "Transformer has batch_first=False",
    ),
    "where the largest are": (
        lambda: Formula(lambda x: F.max_pool2d(x, 2, return_indices=True)[0]),
        "max_pool2d with return_indices=True",
    ),
    "another divisor": (
        lambda: Formula(lambda x: F.avg_pool2d(x, 2, divisor_override=3)),
        "avg_pool2d with divisor_override=3",
    ),
    "statistics of the batch": (
        lambda: Formula(lambda x: F.batch_norm(x, None, None, training=True)),
        "batch_norm with training=True",
    ),
    "a mode that is none": (
        lambda: Formula(lambda x: F.interpolate(x[:, None], 4, mode="bilnear")),
        "mode of interpolate is one of nearest, .*area, not 'bilnear'",
    ),
    "a padding that is none": (
        lambda: Formula(lambda x: F.pad(x, (1, 1), mode="bogus")),
        "mode of pad is one of constant, reflect, replicate, circular, not 'bogus'",
    ),
    "a gelu that is none": (
        lambda: Formula(lambda x: F.gelu(x, approximate="tan")),
        "approximate of gelu is one of none, tanh, not 'tan'",
    ),
    "a layer of a gelu that is none": (lambda: nn.GELU("tan"), "one of none, tanh, not 'tan'"),
    "a rounding that is none": (
        lambda: Formula(lambda x: torch.div(x, 2, rounding_mode="up")),
        "rounding_mode of div is one of None, floor, trunc, not 'up'",
    ),
    "classes that nobody counted": (lambda: Formula(F.one_hot), "num_classes"),
    "activation": (
        lambda: nn.TransformerEncoderLayer(4, 2, 4, activation=F.rrelu, batch_first=True),
        "activation",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused(name):
    make, said = REFUSED[name]
    with pytest.raises(nnxp.ConversionError, match=said):
        nnxp.from_torch(make())


def test_hooks_are_refused_and_inputs_are_known():
    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    module[0].register_forward_hook(lambda *args: None)
    with pytest.raises(nnxp.ConversionError, match="0: Linear has hooks"):
        nnxp.from_torch(module)
    with pytest.raises(nnxp.OptionError, match=r"forward\(x\), not y"):
        nnxp.from_torch(Residual(), inputs=["y"])


def test_nnxp_never_imports_torch():
    code = "import sys, nnxp; nnxp.from_torch; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


IMAGES = {
    "conv": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "grouped": lambda: nn.Conv2d(4, 6, (3, 2), groups=2, dilation=(1, 2), bias=False),
    "depthwise same": lambda: nn.Conv2d(4, 4, 3, groups=4, padding="same"),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
    "transposed in groups": lambda: nn.ConvTranspose2d(4, 6, (2, 3), groups=2, stride=(1, 2)),
    "max pool": lambda: nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True),
    "average pool": lambda: nn.AvgPool2d((2, 3), padding=1, count_include_pad=False),
    "adaptive": lambda: nn.AdaptiveAvgPool2d((3, None)),
    "adaptive max": lambda: nn.AdaptiveMaxPool2d(2),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "instance norm": lambda: nn.InstanceNorm2d(4, affine=True),
    "batch norm": lambda: nn.BatchNorm2d(4),
    "prelu": lambda: nn.PReLU(4),
    "glu": lambda: nn.GLU(1),
    "shuffle": lambda: nn.PixelShuffle(2),
    "hard": lambda: nn.Sequential(nn.ReLU6(), nn.Hardswish(), nn.Hardtanh(-0.5, 2.0)),
}


@pytest.mark.parametrize("name", IMAGES)
def test_modules_of_images_answer_as_torch_does(name):
    torch.manual_seed(0)
    module = IMAGES[name]().double().eval()
    for value in module.parameters():
        value.data.normal_()
    x = torch.randn(3, 4, 8, 7, dtype=torch.float64)
    with torch.no_grad():
        due = module(x).numpy()
    net = nnxp.from_torch(module)
    np.testing.assert_allclose(net(x.numpy()), due, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(nnxp.predict(net, x.numpy()), due, rtol=1e-11, atol=1e-11)


class Block(nn.Module):
    """Two convolutions with a way around them, as in ResNet."""

    def __init__(self, channels):
        super().__init__()
        self.one = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.two = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return torch.relu(self.two(torch.relu(self.norm(self.one(x)))) + x)


def test_a_residual_network_of_images_is_read_and_swept():
    torch.manual_seed(1)
    parts = nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), Block(8), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    module = nn.Sequential(*parts, nn.Linear(8, 5)).eval()
    x = torch.randn(9, 3, 12, 12)
    with torch.no_grad():
        due = module(x).numpy()
    net = nnxp.from_torch(module)
    for backend in ("cpu", "sim"):
        y = nnxp.predict(net, x.numpy(), backend, memory_limit="200 KiB")
        np.testing.assert_allclose(y, due, rtol=1e-4, atol=1e-5)


def test_all_parts_of_a_transformer_that_cannot_be_read_are_named_at_once():
    module = nn.Transformer(4, 2, 1, 1, 8, batch_first=True).eval()
    encoder, decoder = module.encoder.layers[0], module.decoder.layers[0]
    encoder.norm1, encoder.activation = Strange(), F.rrelu
    decoder.norm2, decoder.linear2, decoder.activation = Strange(), Strange(), F.rrelu
    decoder.self_attn = nn.MultiheadAttention(4, 2, add_bias_kv=True, batch_first=True)
    with pytest.raises(nnxp.ConversionError) as caught:
        nnxp.from_torch(module)
    said = str(caught.value)
    parts = ("norm2", "linear2", "activation", "self_attn")
    for part in ("encoder: an encoder with the norm Strange", "rrelu", *parts):
        assert (f"decoder.layers.0.{part}: " if part in parts else part) in said


class Strange(nn.Module):
    def forward(self, x):
        return x
