"""Attention of several heads, and the encoder that is made of it."""

from __future__ import annotations

from collections.abc import Iterator

from nnxp import kernels
from nnxp._arrays import Array
from nnxp._errors import OptionError, ShapeError
from nnxp.layers._layer import Example, Layer, Rng, generator, whole
from nnxp.layers.dense import Dense
from nnxp.layers.norm import LayerNorm
from nnxp.layers.positions import RotaryEmbedding


class MultiHeadAttention(Layer):
    """y = output(concatenated heads of softmax(q kᵀ / sqrt(c) + mask) v)   [Vaswani et al. 2017]

    q = query(x), k = key(keys), v = value(values), each cut into heads of c channels.

    x (rows, queries, channels), keys and values (rows, keys, their channels) -> y (rows, queries,
    channels). Without keys, x looks at itself; without values, keys are the values.

    `mask` is (rows, keys) for all heads and queries, or (rows, queries, keys), or (rows, heads,
    queries, keys). A boolean mask is True where a query may look, one of floats is added; a query
    that may look nowhere gets zeros from every head. `causal` lets no query look ahead.

    With fewer `groups` than heads, heads share keys and values [Ainslie et al. 2023,
    arXiv:2305.13245]. A `rotary` embedding turns queries and keys by their places.

        attention = nnxp.MultiHeadAttention(64, 8, causal=True)
        y = attention(x, mask=lengths[:, None] > np.arange(x.shape[1]))
    """

    takes = ("float", "float", "float", "any")

    query: Dense
    key: Dense
    value: Dense
    output_projection: Dense
    heads: int
    groups: int
    causal: bool = False
    rotary: RotaryEmbedding | None = None

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        groups: int | None = None,
        head_channels: int | None = None,
        key_channels: int | None = None,
        value_channels: int | None = None,
        bias: bool = True,
        causal: bool = False,
        rotary: RotaryEmbedding | None = None,
        rng: Rng = None,
        dtype: object = "float32",
    ) -> None:
        channels, heads = whole("channels", channels), whole("heads", heads)
        groups = whole("groups", heads if groups is None else groups)
        if head_channels is None and channels % heads:
            raise OptionError(f"{channels} channels cannot be shared by {heads} heads")
        size = whole("head_channels", channels // heads if head_channels is None else head_channels)
        rng = generator(rng)

        def dense(inputs: int | None, outputs: int) -> Dense:
            return Dense(inputs or channels, outputs, bias=bias, rng=rng, dtype=dtype)

        self.query = dense(channels, heads * size)
        self.key = dense(key_channels, groups * size)
        self.value = dense(value_channels or key_channels, groups * size)
        self.output_projection = dense(heads * size, channels)
        self.heads, self.groups, self.causal, self.rotary = heads, groups, causal, rotary

    def validate(self) -> None:
        for name in ("query", "key", "value", "output_projection"):
            if not isinstance(getattr(self, name), Dense):
                raise OptionError(f"{name} of MultiHeadAttention is a Dense layer")
        heads, groups = whole("heads", self.heads), whole("groups", self.groups)
        sizes = [layer.weight.shape[1] for layer in (self.query, self.key, self.value)]
        if heads % groups or sizes[0] % heads or sizes[1] % groups or sizes[2] % groups:
            raise ShapeError(
                f"heads ({heads}) are a multiple of groups ({groups}); the outputs of query "
                f"({sizes[0]}) are shared by the heads, of key ({sizes[1]}) and value ({sizes[2]}) "
                "by the groups"
            )
        if sizes[0] // heads != sizes[1] // groups:
            raise ShapeError("queries and keys have equally many channels in each head")

    def __call__(
        self,
        x: Array,
        keys: Array | None = None,
        values: Array | None = None,
        mask: Array | None = None,
    ) -> Array:
        keys = x if keys is None else keys
        values = keys if values is None else values
        q = heads_of(self.query(x), self.heads)
        k, v = heads_of(self.key(keys), self.groups), heads_of(self.value(values), self.groups)
        if self.rotary is not None:
            q, k = self.rotary(q), self.rotary(k)
        if mask is not None:
            mask = _for_every_head(mask, (x.shape[0], self.heads, x.shape[1], keys.shape[1]))
        y = kernels.attention(q, k, v, mask, causal=self.causal)
        return self.output_projection(side_by_side(y))

    def __repr__(self) -> str:
        grouped = "" if self.groups == self.heads else f", groups={self.groups}"
        causal = ", causal=True" if self.causal else ""
        return f"MultiHeadAttention({self.query.weight.shape[0]}, {self.heads}{grouped}{causal})"

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield cls(8, 2, rng=0), (3, 5, 8)
        yield cls(8, 4, groups=2, causal=True, rotary=RotaryEmbedding(2), rng=1), (3, 4, 8)
        other = cls(6, 3, key_channels=4, value_channels=5, bias=False, rng=2)
        yield other, [(3, 4, 6), (3, 5, 4), (3, 5, 5), (3, 5)]
        yield cls(4, 2, head_channels=3, rng=3), [(4, 5, 4), None, None, (4, 5, 5)]


def heads_of(x: Array, heads: int) -> Array:
    """x (rows, time, heads * c) as (rows, heads, time, c)"""
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads).swapaxes(1, 2)


def side_by_side(x: Array) -> Array:
    """x (rows, heads, time, c) as (rows, time, heads * c)"""
    y = x.swapaxes(1, 2)
    return y.reshape(*y.shape[:2], y.shape[2] * y.shape[3])


def _for_every_head(mask: Array, shape: tuple[int, ...]) -> Array:
    """A mask as (rows, heads or 1, queries or 1, keys)."""
    rows, _, queries, keys = shape
    if mask.shape == (rows, keys):
        return mask[:, None, None]
    if mask.shape == (rows, queries, keys):
        return mask[:, None]
    fits = mask.ndim == 4 and all(n in (1, m) for n, m in zip(mask.shape, shape, strict=True))
    if not fits:
        raise ShapeError(
            f"a mask is (rows, keys), (rows, queries, keys) or (rows, heads, queries, keys), here "
            f"of {shape}; got {mask.shape}"
        )
    return mask


class TransformerEncoderLayer(Layer):
    """x = norm(x + attention(x)), y = norm(x + outer(inner(x)))   [Vaswani et al. 2017]

    With `norm_first`, x = x + attention(norm(x)), y = x + outer(inner(norm(x)))   [Xiong et al.
    2020, arXiv:2002.04745].

    x (rows, time, channels) -> y like x; inner has `hidden` outputs and an activation. `mask` is as
    for MultiHeadAttention: (rows, time), True where there is something to look at.
    """

    takes = ("float", "any")

    attention: MultiHeadAttention
    attention_norm: LayerNorm
    inner: Dense
    outer: Dense
    norm: LayerNorm
    norm_first: bool = False

    def __init__(
        self,
        channels: int,
        heads: int,
        hidden: int,
        activation: kernels.ActivationName = "relu",
        *,
        norm_first: bool = False,
        causal: bool = False,
        bias: bool = True,
        eps: float = 1e-5,
        rng: Rng = None,
        dtype: object = "float32",
    ) -> None:
        rng = generator(rng)
        self.attention = MultiHeadAttention(
            channels, heads, bias=bias, causal=causal, rng=rng, dtype=dtype
        )
        self.attention_norm = LayerNorm(channels, eps=eps, dtype=dtype)
        self.inner = Dense(channels, hidden, activation, bias=bias, rng=rng, dtype=dtype)
        self.outer = Dense(hidden, channels, bias=bias, rng=rng, dtype=dtype)
        self.norm = LayerNorm(channels, eps=eps, dtype=dtype)
        self.norm_first = norm_first

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        if self.norm_first:
            x = x + self.attention(self.attention_norm(x), mask=mask)
            return x + self.outer(self.inner(self.norm(x)))
        x = self.attention_norm(x + self.attention(x, mask=mask))
        return self.norm(x + self.outer(self.inner(x)))

    def __repr__(self) -> str:
        channels, hidden = self.inner.weight.shape
        first = ", norm_first=True" if self.norm_first else ""
        return (
            f"TransformerEncoderLayer({channels}, {self.attention.heads}, {hidden}, "
            f"{self.inner.activation}{first})"
        )

    @classmethod
    def examples(cls) -> Iterator[Example]:
        yield cls(6, 2, 9, rng=0), (3, 4, 6)
        yield cls(6, 3, 5, "gelu", norm_first=True, rng=1), [(3, 4, 6), (3, 4)]


class TransformerEncoder(Layer):
    """y = norm(last(... first(x))): encoder layers with one mask, and a last norm, or none.

    x (rows, time, channels) -> y like x; `mask` is as for MultiHeadAttention.

        layers = [nnxp.TransformerEncoderLayer(384, 12, 1536, "gelu") for _ in range(6)]
        encoder = nnxp.TransformerEncoder(*layers)
    """

    takes = ("float", "any")

    layers: tuple[Layer, ...]
    norm: Layer | None = None

    def __init__(self, *layers: Layer, norm: Layer | None = None) -> None:
        self.layers, self.norm = layers, norm

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        for layer in self.layers:
            x = layer(x) if mask is None else layer(x, mask)
        return x if self.norm is None else self.norm(x)

    def __repr__(self) -> str:
        return f"TransformerEncoder({', '.join(map(repr, self.layers))})"

    @classmethod
    def examples(cls) -> Iterator[Example]:
        layer = TransformerEncoderLayer
        stack = layer(4, 2, 6, rng=0), layer(4, 1, 3, "silu", norm_first=True, rng=1)
        yield cls(*stack, norm=LayerNorm(4)), (3, 5, 4)
        yield cls(*stack), [(3, 2, 4), (3, 2)]
