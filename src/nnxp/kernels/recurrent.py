"""Recurrence: what comes out at one step goes into the next.

The inputs' part of every step has been computed before, in one large product for all of them:
`x` is x @ weight_x + bias, (rows, time, gates). Each function answers all outputs (rows, time,
size) and the states after the last step. `reverse` goes through time from its end; the outputs are
in the order of the inputs all the same.

`lengths` (rows,) says how many steps of each row there are: what lies beyond has outputs of zero
and no part in the states. A length above the number of steps counts as that number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nnxp._arrays import Array, library_of, xp_of
from nnxp._errors import ShapeError
from nnxp.kernels._dispatch import Kernel, Outlines, kernel
from nnxp.kernels.activations import sigmoid, tanh
from nnxp.kernels.linear import linear


@kernel
def rnn(
    x: Array,
    weight: Array,
    h: Array | None = None,
    lengths: Array | None = None,
    *,
    activation: Kernel = tanh,
    reverse: bool = False,
) -> Any:
    """h' = activation(x + h @ weight)   [Elman 1990]

    x (rows, time, n), weight (n, n), h (rows, n) -> y (rows, time, n), h (rows, n).
    """
    _fitting("rnn", x, weight, 1)

    def step(x_t: Array, h: Array) -> tuple[Array, ...]:
        z = x_t + xp_of(x).matmul(h, weight)
        return (activation(z, out=z),)

    return _through_time(step, x, (h,), (weight.shape[0],), lengths, reverse)


@kernel
def gru(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    h: Array | None = None,
    lengths: Array | None = None,
    *,
    reset_after: bool = True,
    reverse: bool = False,
) -> Any:
    """h' = z h + (1 - z) n   [Cho et al. 2014, arXiv:1406.1078]

    r = sigmoid(x_r + h W_r + b_r), z = sigmoid(x_z + h W_z + b_z) and
    n = tanh(x_n + r (h W_n + b_n)), as cuDNN and torch have it, or, unless `reset_after`,
    n = tanh(x_n + (r h) W_n + b_n), as in the paper.

    x (rows, time, 3n), weight (n, 3n), bias (3n,), each in the order r, z, n; h (rows, n)
    -> y (rows, time, n), h (rows, n).
    """
    _fitting("gru", x, weight, 3)
    xp, n = xp_of(x), weight.shape[0]
    shift = None if bias is None or reset_after else bias[2 * n :]

    def step(x_t: Array, h: Array) -> tuple[Array, ...]:
        hidden = xp.matmul(h, weight if reset_after else weight[:, : 2 * n])
        if bias is not None:
            hidden += bias if reset_after else bias[: 2 * n]
        gates = x_t[:, : 2 * n] + hidden[:, : 2 * n]
        sigmoid(gates, out=gates)
        r, z = gates[:, :n], gates[:, n:]
        new = r * hidden[:, 2 * n :] if reset_after else xp.matmul(r * h, weight[:, 2 * n :])
        new += x_t[:, 2 * n :]
        if shift is not None:
            new += shift
        xp.tanh(new, out=new)
        kept = h - new
        kept *= z
        kept += new
        return (kept,)

    return _through_time(step, x, (h,), (n,), lengths, reverse)


@kernel
def lstm(
    x: Array,
    weight: Array,
    projection: Array | None = None,
    h: Array | None = None,
    c: Array | None = None,
    lengths: Array | None = None,
    *,
    reverse: bool = False,
) -> Any:
    """c' = f c + i g, h' = o tanh(c')   [Hochreiter & Schmidhuber 1997; Gers et al. 2000]

    i, f, o = sigmoid(x + h W) and g = tanh(x + h W), each of its columns. With a projection,
    h' = (o tanh(c')) @ projection   [Sak et al. 2014, arXiv:1402.1128].

    x (rows, time, 4n), weight (m, 4n), each in the order i, f, o, g; projection (n, m), without it
    m = n; h (rows, m), c (rows, n) -> y (rows, time, m), h (rows, m), c (rows, n).
    """
    _fitting("lstm", x, weight, 4, projected=projection is not None)
    xp, m, n = xp_of(x), weight.shape[0], weight.shape[1] // 4

    def step(x_t: Array, h: Array, c: Array) -> tuple[Array, ...]:
        z = x_t + xp.matmul(h, weight)
        gates = sigmoid(z[:, : 3 * n])
        new = xp.tanh(z[:, 3 * n :])
        new *= gates[:, :n]
        new += gates[:, n : 2 * n] * c
        out = xp.tanh(new)
        out *= gates[:, 2 * n :]
        return (out if projection is None else xp.matmul(out, projection)), new

    return _through_time(step, x, (h, c), (m, n), lengths, reverse)


@kernel
def linear_gru(
    x: Array,
    weight_x: Array,
    bias_x: Array | None,
    weight: Array,
    bias: Array | None = None,
    h: Array | None = None,
    *,
    reset_after: bool = True,
    reverse: bool = False,
) -> Any:
    """y, h = gru(linear(x, weight_x, bias_x), weight, bias, h)

    x (rows, time, inputs), weight_x (inputs, 3n), bias_x (3n,) or None, weight (n, 3n), bias (3n,),
    each in the order r, z, n; h (rows, n) -> y (rows, time, n), h (rows, n). See `linear_lstm`.
    """
    part = linear(x, weight_x, bias_x)
    return gru(part, weight, bias, h, reset_after=reset_after, reverse=reverse)


@kernel
def linear_lstm(
    x: Array,
    weight_x: Array,
    bias: Array | None,
    weight: Array,
    h: Array | None = None,
    c: Array | None = None,
    *,
    reverse: bool = False,
) -> Any:
    """y, h, c = lstm(linear(x, weight_x, bias), weight, h=h, c=c)

    x (rows, time, inputs), weight_x (inputs, 4n), bias (4n,) or None, weight (n, 4n), each in the
    order i, f, o, g; h, c (rows, n) -> y (rows, time, n), h (rows, n), c (rows, n): what an engine
    makes of a recurrence and of its inputs' product, for bodies that go through time in one call.
    """
    return lstm(linear(x, weight_x, bias), weight, None, h, c, reverse=reverse)


def _fitting(who: str, x: Array, weight: Array, gates: int, *, projected: bool = False) -> None:
    """ShapeError unless x (rows, time, gates n) and weight (n, gates n) are of these shapes; with a
    projection the weight has another number of lines."""
    lines, columns = weight.shape if weight.ndim == 2 else (0, 1)
    fits = columns % gates == 0 and (projected or columns == gates * lines)
    if not fits or x.ndim != 3 or x.shape[-1] != weight.shape[-1]:
        n, m = f"{gates}n" if gates > 1 else "n", "m" if projected else "n"
        shape = f"(rows, *{x.shape[1:]})" if library_of(x) == "traced" else str(x.shape)
        raise ShapeError(
            f"{who} got x {shape}, weight {weight.shape}, which do not fit each other: it takes x "
            f"(rows, time, {n}) and weight ({m}, {n})"
        )


@rnn.row_wise
def _rnn_outlines(
    x: Array, weight: Array, h: Array | None = None, lengths: Array | None = None, **_: Any
) -> Outlines | None:
    _fitting("rnn", x, weight, 1)
    return _outlines(x, weight, (h,), (len(weight),), lengths)


@gru.row_wise
def _gru_outlines(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    h: Array | None = None,
    lengths: Array | None = None,
    **_: Any,
) -> Outlines | None:
    _fitting("gru", x, weight, 3)
    size = len(weight)
    if bias is not None and (bias.shape != (3 * size,) or bias.dtype != x.dtype):
        return None
    return _outlines(x, weight, (h,), (size,), lengths)


@lstm.row_wise
def _lstm_outlines(
    x: Array,
    weight: Array,
    projection: Array | None = None,
    h: Array | None = None,
    c: Array | None = None,
    lengths: Array | None = None,
    **_: Any,
) -> Outlines | None:
    _fitting("lstm", x, weight, 4, projected=projection is not None)
    m, n = len(weight), weight.shape[1] // 4
    if projection is not None and (projection.shape, projection.dtype) != ((n, m), x.dtype):
        return None
    return _outlines(x, weight, (h, c), (m, n), lengths)


def _outlines(
    x: Array,
    weight: Array,
    states: tuple[Array | None, ...],
    sizes: tuple[int, ...],
    lengths: Array | None,
) -> Outlines | None:
    """The outlines of all outputs and of the last states; None if something does not fit."""
    rows, time = x.shape[:2]
    outlines = [((rows, size), x.dtype) for size in sizes]
    for state, outline in zip(states, outlines, strict=True):
        if state is not None and (state.shape, state.dtype) != outline:
            return None
    if not time or weight.dtype != x.dtype or (lengths is not None and lengths.shape != (rows,)):
        return None
    return [((rows, time, sizes[0]), x.dtype), *outlines]


def _through_time(
    step: Callable[..., tuple[Array, ...]],
    x: Array,
    initial: tuple[Array | None, ...],
    sizes: tuple[int, ...],
    lengths: Array | None,
    reverse: bool,
) -> tuple[Array, ...]:
    """All outputs and the last states; the first state is also the output."""
    xp, (rows, time) = xp_of(x), x.shape[:2]
    if not time:
        raise ShapeError(
            f"a recurrence takes at least one step of time; x is (rows, *{x.shape[1:]})"
        )
    states = [
        xp.zeros((rows, size), x.dtype) if state is None else state
        for state, size in zip(initial, sizes, strict=True)
    ]
    outputs: list[Any] = [None] * time
    for t in reversed(range(time)) if reverse else range(time):
        after = step(x[:, t], *states)
        outputs[t] = after[0]
        if lengths is not None:
            runs = (lengths > t)[:, None]
            outputs[t] = xp.where(runs, after[0], 0)
            after = tuple(xp.where(runs, *pair) for pair in zip(after, states, strict=True))
        states = list(after)
    return xp.stack(outputs, axis=1), *states
