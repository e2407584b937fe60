"""ONNX operators over sequences: recurrent networks and attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nnxp import kernels
from nnxp._arrays import Array
from nnxp._errors import OptionError
from nnxp.layers.attention import heads_of, side_by_side
from nnxp.layers.operators import beside, hard_sigmoid, operator, xp_of
from nnxp.program import traced

Step = Callable[[Array, list[Array], Array, Array, Any, Any], list[Array]]
"""step(x (n, inputs), states, weight, recurrent weight, bias, recurrent bias) -> new states"""

Run = Callable[..., tuple[Array, ...]]
"""run(direction's number, whether it goes back in time, x (n, time, inputs), weight, recurrent
weight, bias, recurrent bias, *states) -> y (n, time, hidden) and the last states"""


def recurrent(
    run: Run,
    order: Sequence[int],
    states: Sequence[Array | None],
    x: Array,
    w: Array,
    r: Array,
    b: Array | None,
    direction: str,
    layout: int,
) -> tuple[Array, ...]:
    """y (time, directions, n, hidden) and the last states, for x (time, n, inputs).

    `run` gets the gates of ONNX in this order; without one, as they are.
    """
    xp, n = xp_of(x), r.shape[-1]
    refuse_rows(x.shape[layout])
    x = x if layout else x.swapaxes(0, 1)
    ends = []

    def ordered(y: Array) -> Array:
        parts = [y[..., k * n : (k + 1) * n] for k in order]
        return xp.concatenate(parts, axis=-1) if parts else y

    for way in range(w.shape[0]):
        own = [None if s is None else (s[:, way] if layout else s[way]) for s in states]
        half = w.shape[1]
        biases = (None, None) if b is None else (ordered(b[way][:half]), ordered(b[way][half:]))
        weights = ordered(w[way].T), ordered(r[way].T)
        ends.append(run(way, direction == "reverse" or way == 1, x, *weights, *biases, *own))
    outputs, *last = (
        xp.stack(list(end), axis=at)
        for end, at in zip(zip(*ends, strict=True), (2, *[layout] * len(states)), strict=True)
    )
    return (outputs if layout else outputs.transpose(1, 2, 0, 3), *last)


def by_steps(step_of: Callable[[int], Step], lengths: Array | None) -> Run:
    """What goes through time by the step of each direction, rows of unequal length in `lengths`."""

    def run(
        way: int, back: bool, x: Array, w: Array, r: Array, b: Any, c: Any, *states: Array | None
    ) -> tuple[Array, ...]:
        xp, step, (n, time, _) = xp_of(x), step_of(way), x.shape
        zeros = xp.zeros((n, r.shape[0]), dtype=x.dtype)
        own = [zeros if state is None else state for state in states]
        seen: list[Any] = [None] * time
        for t in reversed(range(time)) if back else range(time):
            new = step(x[:, t], own, w, r, b, c)
            if lengths is None:
                own, seen[t] = new, new[0]
                continue
            on = lengths.reshape(n, 1) > t
            seen[t] = xp.where(on, new[0], xp.zeros_like(new[0]))
            own = [xp.where(on, a, old) for a, old in zip(new, own, strict=True)]
        return (xp.stack(seen, axis=1), *own)

    return run


def refuse_rows(steps: int) -> None:
    """Raise Untraceable where the steps of a loop are rows."""
    if traced.counts_rows(steps):
        raise traced.Untraceable("it goes along axis 0, which does not hold rows")


CHOSEN = "hidden_size activations activation_alpha activation_beta"
"""The attributes that all recurrent networks have, and say what their activations are."""

LSTM = ["Sigmoid", "Tanh", "Tanh"]
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "Tanh": kernels.tanh,
    "Sigmoid": kernels.sigmoid,
    "Relu": kernels.relu,
    "Softsign": kernels.softsign,
    "Softplus": kernels.softplus,
    "HardSigmoid": hard_sigmoid,
}


def _names(
    defaults: Sequence[str],
    ways: int,
    *,
    hidden_size: int | None = None,
    activations: Sequence[str] | None = None,
    activation_alpha: Any = None,
    activation_beta: Any = None,
) -> list[str]:
    """The names of the activations, those of one direction after the other's."""
    names = list(activations or [*defaults] * ways)
    by_numbers = activation_alpha is not None or activation_beta is not None
    if by_numbers or not set(names) <= ACTIVATIONS.keys():
        raise OptionError(f"recurrent activations {', '.join(names)} with alpha or beta: not known")
    return names


def _gates(names: list[str], count: int, way: int) -> list[Callable[[Array], Array]]:
    """The activations of one direction."""
    return [ACTIVATIONS[name] for name in names[way * count : (way + 1) * count]]


def _clipped(x: Array, clip: float | None) -> Array:
    return x if clip is None else xp_of(x).minimum(xp_of(x).maximum(x, -clip), clip)


@operator("RNN", attributes=CHOSEN)
def rnn(
    x: Array,
    w: Array,
    r: Array,
    b: Array | None = None,
    lengths: Array | None = None,
    h: Array | None = None,
    *,
    direction: str = "forward",
    layout: int = 0,
    clip: float | None = None,
    **chosen: Any,
) -> tuple[Array, ...]:
    xp, names = xp_of(x), _names(["Tanh"], len(w), **chosen)
    if not clip and set(names) in ({"Tanh"}, {"Relu"}):
        activation = kernels.tanh if names[0] == "Tanh" else kernels.relu

        def run(_: int, back: bool, x: Array, w: Array, r: Array, b: Any, c: Any, h: Any) -> Any:
            projected = kernels.linear(x, w, None if b is None else b + c)
            return kernels.rnn(projected, r, h, lengths, activation=activation, reverse=back)

        return recurrent(run, [], [h], x, w, r, b, direction, layout)

    def step_of(way: int) -> Step:
        (act,) = _gates(names, 1, way)

        def step(x: Array, state: list[Array], w: Array, r: Array, b: Any, c: Any) -> list[Array]:
            z = xp.matmul(x, w) + xp.matmul(state[0], r)
            return [act(_clipped(z if b is None else z + (b + c), clip))]

        return step

    return recurrent(by_steps(step_of, lengths), [], [h], x, w, r, b, direction, layout)


@operator("GRU", attributes=CHOSEN)
def gru(
    x: Array,
    w: Array,
    r: Array,
    b: Array | None = None,
    lengths: Array | None = None,
    h: Array | None = None,
    *,
    direction: str = "forward",
    layout: int = 0,
    linear_before_reset: int = 0,
    clip: float | None = None,
    **chosen: Any,
) -> tuple[Array, ...]:
    usual = ["Sigmoid", "Tanh"]
    n, xp, names = r.shape[-1], xp_of(x), _names(usual, len(w), **chosen)
    if not clip and names == usual * len(w):

        def run(_: int, back: bool, x: Array, w: Array, r: Array, b: Any, c: Any, h: Any) -> Any:
            after = bool(linear_before_reset)
            projected = kernels.linear(x, w, b)
            return kernels.gru(projected, r, c, h, lengths, reset_after=after, reverse=back)

        return recurrent(run, [1, 0, 2], [h], x, w, r, b, direction, layout)

    def step_of(way: int) -> Step:
        f, g = _gates(names, 2, way)

        def step(x: Array, state: list[Array], w: Array, r: Array, b: Any, c: Any) -> list[Array]:
            (h,) = state
            a, q = xp.matmul(x, w), xp.matmul(h, r[:, : 2 * n])
            if b is not None:
                a, q = a + b, q + c[: 2 * n]
            update = f(_clipped(a[:, :n] + q[:, :n], clip))
            reset = f(_clipped(a[:, n : 2 * n] + q[:, n:], clip))
            inner = xp.matmul(h if linear_before_reset else reset * h, r[:, 2 * n :])
            inner = inner if c is None else inner + c[2 * n :]
            inner = reset * inner if linear_before_reset else inner
            new = g(_clipped(a[:, 2 * n :] + inner, clip))
            return [(1 - update) * new + update * h]

        return step

    return recurrent(by_steps(step_of, lengths), [], [h], x, w, r, b, direction, layout)


@operator("LSTM", attributes=CHOSEN)
def lstm(
    x: Array,
    w: Array,
    r: Array,
    b: Array | None = None,
    lengths: Array | None = None,
    h: Array | None = None,
    c: Array | None = None,
    p: Array | None = None,
    *,
    direction: str = "forward",
    layout: int = 0,
    clip: float | None = None,
    input_forget: int = 0,
    **chosen: Any,
) -> tuple[Array, ...]:
    names = _names(LSTM, len(w), **chosen)
    if p is None and not clip and not input_forget and names == LSTM * len(w):

        def run(
            _: int, back: bool, x: Array, w: Array, r: Array, b: Any, d: Any, h: Any, c: Any
        ) -> Any:
            projected = kernels.linear(x, w, None if b is None else b + d)
            return kernels.lstm(projected, r, None, h, c, lengths, reverse=back)

        return recurrent(run, [0, 2, 1, 3], [h, c], x, w, r, b, direction, layout)
    step_of = lstm_step(r.shape[-1], p, len(w), clip, input_forget, **chosen)
    return recurrent(by_steps(step_of, lengths), [], [h, c], x, w, r, b, direction, layout)


def lstm_step(
    n: int,
    p: Array | None,
    ways: int,
    clip: float | None,
    input_forget: int,
    seen: Callable[[Array], Array] = lambda h: h,
    **chosen: Any,
) -> Callable[[int], Step]:
    """The step of each direction of an LSTM, which multiplies what `seen` makes of its state."""
    names = _names(LSTM, ways, **chosen)

    def one(way: int) -> Step:
        f, g, out = _gates(names, 3, way)
        peep = None if p is None else p[way]

        def step(x: Array, state: list[Array], w: Array, r: Array, b: Any, d: Any) -> list[Array]:
            h, cell = state
            xp = xp_of(x)
            z = xp.matmul(x, w) + xp.matmul(seen(h), r)
            z = z if b is None else z + (b + d)
            i, o, forget, new = (z[:, k * n : (k + 1) * n] for k in range(4))
            if peep is not None:
                i, forget = i + peep[:n] * cell, forget + peep[2 * n :] * cell
            i = f(_clipped(i, clip))
            keep = 1 - i if input_forget else f(_clipped(forget, clip))
            cell = keep * cell + i * g(_clipped(new, clip))
            o = o if peep is None else o + peep[n : 2 * n] * cell
            return [f(_clipped(o, clip)) * out(cell), cell]

        return step

    return one


@operator("Attention")
def attention(
    q: Array,
    key: Array,
    value: Array,
    mask: Array | None = None,
    past_key: Array | None = None,
    past_value: Array | None = None,
    nonpad: Array | None = None,
    *,
    q_num_heads: int = 0,
    kv_num_heads: int = 0,
    scale: float | None = None,
    is_causal: int = 0,
    softcap: float = 0.0,
    qk_matmul_output_mode: int = 0,
    softmax_precision: Any = None,
    left_window_size: int = -1,
    right_window_size: int = -1,
    count: int,
) -> Any:
    """softmax(q k' * scale + mask) v for each head   [Vaswani et al. 2017, arXiv:1706.03762]"""
    xp, flat = xp_of(q), q.ndim == 3
    if flat:
        q = heads_of(q, q_num_heads)
        key, value = heads_of(key, kv_num_heads), heads_of(value, kv_num_heads)
    if past_key is not None:
        key = xp.concatenate([past_key, key], axis=2)
        value = xp.concatenate([past_value, value], axis=2)
    present = key, value
    rows, columns = q.shape[-2], key.shape[-2]
    by_kernel = not softcap and count < 4
    plain = by_kernel and left_window_size < 0 and past_key is None and nonpad is None
    seen = None
    if not (plain and is_causal):
        seen = _in_sight(
            rows, columns, is_causal, left_window_size, right_window_size, past_key, nonpad, q
        )
    if nonpad is not None:
        within = beside(np.arange(columns).reshape(1, 1, 1, -1), q) < nonpad.reshape(-1, 1, 1, 1)
        seen = within if seen is None else seen & within
    missing = 0 if mask is None else columns - mask.shape[-1]
    if mask is not None and missing > 0:
        none = False if mask.dtype == np.bool_ else -np.inf
        widths = ((0, 0),) * (mask.ndim - 1) + ((0, missing),)
        mask = xp.pad(mask, widths, mode="constant", constant_values=none)
    if mask is None or (seen is not None and mask.dtype == np.bool_):
        mask = seen if mask is None else mask & seen
    elif seen is not None:
        mask = xp.where(seen, mask, xp.full_like(mask, -np.inf))
    if by_kernel:
        causal = bool(plain and is_causal)
        y = kernels.attention(q, key, value, mask, causal=causal, scale=scale)
        y = side_by_side(y) if flat else y
        return (y, *present) if count > 1 else y
    share = q.shape[1] // key.shape[1]
    if share > 1:
        key, value = xp.repeat(key, share, axis=1), xp.repeat(value, share, axis=1)
    root = (q.shape[-1] ** -0.5 if scale is None else scale) ** 0.5
    scores = raw = xp.matmul(q * root, key.swapaxes(-1, -2) * root)
    if softcap:
        scores = softcap * xp.tanh(scores / softcap)
    capped = scores
    if mask is not None and mask.dtype == np.bool_:
        scores = xp.where(mask, scores, xp.full_like(scores, -np.inf))
    elif mask is not None:
        scores = scores + mask
    biased = scores
    blind = xp.all(xp.isinf(scores) & (scores < 0), axis=-1, keepdims=True)
    safe = xp.where(blind, xp.zeros_like(scores), scores)
    weights = xp.where(blind, xp.zeros_like(scores), kernels.softmax(safe))
    y = xp.matmul(weights, value)
    y = side_by_side(y) if flat else y
    return (y, *present, (raw, capped, biased, weights)[qk_matmul_output_mode]) if count > 1 else y


def _in_sight(
    rows: int,
    columns: int,
    causal: int,
    left: int,
    right: int,
    past_key: Array | None,
    nonpad: Array | None,
    like: Array,
) -> Array | None:
    """Which keys a query may see, by their places alone; None for all of them."""
    right = 0 if causal else right
    if left < 0 and right < 0:
        return None
    own: Array = np.arange(rows).reshape(-1, 1)
    keys: Array = np.arange(columns)
    if past_key is not None:
        own = own + past_key.shape[2]
    elif nonpad is not None:
        own = nonpad.reshape(-1, 1, 1, 1) - rows + beside(own, nonpad)
        keys = beside(keys, nonpad)
    seen = keys <= own + right if right >= 0 else None
    if left >= 0:
        near = keys >= own - left
        seen = near if seen is None else seen & near
    return beside(seen, like)


@operator("RotaryEmbedding", loose="ids")
def rotary(
    x: Array,
    cos: Array,
    sin: Array,
    ids: Array | None = None,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Array:
    """[Su et al. 2021, arXiv:2104.09864]"""
    xp, shape = xp_of(x), x.shape
    if x.ndim == 4:
        x = x.transpose(0, 2, 1, 3)
    else:
        x = x.reshape(shape[0], shape[1], num_heads, shape[2] // num_heads)
    size = rotary_embedding_dim or x.shape[-1]
    if ids is not None:
        cos, sin = (xp.take(table, beside(ids, x), axis=0) for table in (cos, sin))
    cos, sin = (xp.expand_dims(table[..., : size // 2], 2) for table in (cos, sin))
    y = kernels.rotary(x, cos, sin, interleaved=bool(interleaved))
    return y.transpose(0, 2, 1, 3) if len(shape) == 4 else y.reshape(shape)
