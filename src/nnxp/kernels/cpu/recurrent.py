"""Recurrences whose steps write into memory that is set aside."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from nnxp._arrays import HostArray, Shape
from nnxp.kernels._dispatch import InPlace, Kernel, Operand
from nnxp.kernels.activations import relu, tanh
from nnxp.kernels.cpu import onednn
from nnxp.kernels.cpu._pieces import aligned, carved, plain, room
from nnxp.kernels.cpu._small import Weight
from nnxp.kernels.recurrent import gru, linear_gru, linear_lstm, lstm, rnn


def _order(time: int, reverse: bool) -> range:
    return range(time)[::-1] if reverse else range(time)


def _begin(state: HostArray, first: HostArray | None) -> None:
    np.copyto(state, 0 if first is None else first)


def _exp_and_one(z: HostArray) -> None:
    """z becomes 1 + exp(z), by which what sigmoid(-z) is a factor of is divided."""
    np.exp(z, out=z)
    np.add(z, 1, out=z)


@rnn.in_place
def rnn_in_place(
    x: Operand,
    weight: Operand,
    h: Operand | None = None,
    lengths: Operand | None = None,
    *,
    activation: Kernel = tanh,
    reverse: bool = False,
) -> InPlace | None:
    """Without lengths, for the activations that need no memory."""
    if lengths is not None or weight.numbers is None or activation not in (tanh, relu):
        return None
    if not plain(x, weight, h) or x.ndim != 3 or not x.shape[1]:
        return None
    product, order = Weight(weight.numbers), _order(x.shape[1], reverse)
    size, dtype = len(weight.numbers), x.dtype

    def run(
        y: HostArray, h: HostArray, scratch: HostArray, x: HostArray,
        weight: Any, first: Any = None, *_: Any,
    ) -> None:  # fmt: skip
        (z,) = carved(scratch, dtype, (len(x), size))
        _begin(h, first)
        products = product.bound(h, z)
        for t in order:
            for multiply in products:
                multiply()
            z += x[:, t]
            activation.reference(z, out=h)
            y[:, t] = h

    return InPlace(run, lambda rows: room(dtype, (rows, size)))


@gru.in_place
def gru_in_place(
    x: Operand,
    weight: Operand,
    bias: Operand | None = None,
    h: Operand | None = None,
    lengths: Operand | None = None,
    *,
    reset_after: bool = True,
    reverse: bool = False,
) -> InPlace | None:
    """Without lengths: the gates of a step are made apart from the new values."""
    if lengths is not None or weight.numbers is None or (bias and bias.numbers is None):
        return None
    if not plain(x, weight, bias, h) or x.ndim != 3 or not x.shape[1]:
        return None
    numbers, order, dtype = weight.numbers, _order(x.shape[1], reverse), x.dtype
    size = len(numbers)
    gating, making = Weight(-numbers[:, : 2 * size]), Weight(numbers[:, 2 * size :])
    shifts = None if bias is None else (bias.numbers[: 2 * size], bias.numbers[2 * size :])  # type: ignore[index]

    def run(
        y: HostArray, h: HostArray, scratch: HostArray, x: HostArray,
        weight: Any, bias: Any = None, first: Any = None, *_: Any,
    ) -> None:  # fmt: skip
        rows = len(x)
        gates, new, reset = carved(scratch, dtype, (rows, 2 * size), (rows, size), (rows, size))
        r, z = gates[:, :size], gates[:, size:]
        _begin(h, first)
        gated = gating.bound(h, gates)
        candidate = making.bound(h if reset_after else reset, new)
        with np.errstate(over="ignore", under="ignore"):  # exp is infinite, or 0, rightly
            for t in order:
                for multiply in gated:
                    multiply()
                if shifts is not None:
                    gates -= shifts[0]
                gates -= x[:, t, : 2 * size]
                _exp_and_one(gates)
                if not reset_after:
                    np.divide(h, r, out=reset)
                for multiply in candidate:
                    multiply()
                if shifts is not None:
                    new += shifts[1]
                if reset_after:
                    new /= r
                new += x[:, t, 2 * size :]
                np.tanh(new, out=new)
                h -= new
                h /= z
                h += new
                y[:, t] = h

    return InPlace(run, lambda rows: room(dtype, (rows, 2 * size), (rows, size), (rows, size)))


@lstm.in_place
def lstm_in_place(
    x: Operand,
    weight: Operand,
    projection: Operand | None = None,
    h: Operand | None = None,
    c: Operand | None = None,
    lengths: Operand | None = None,
    *,
    reverse: bool = False,
) -> InPlace | None:
    """Without a projection or lengths: the gates of a step are made apart from the new values, so
    that each lie in one piece."""
    if projection is not None or lengths is not None or weight.numbers is None:
        return None
    if not plain(x, weight, h, c) or x.ndim != 3 or not x.shape[1]:
        return None
    numbers = weight.numbers
    size = numbers.shape[0]
    gating, making = Weight(-numbers[:, : 3 * size]), Weight(numbers[:, 3 * size :])
    dtype, order = x.dtype, _order(x.shape[1], reverse)

    def run(
        y: HostArray, h: HostArray, c: HostArray, scratch: HostArray, x: HostArray,
        weight: Any, projection: Any = None, first: Any = None, cell: Any = None, *_: Any,
    ) -> None:  # fmt: skip
        rows = len(x)
        gates, new = carved(scratch, dtype, (rows, 3 * size), (rows, size))
        i, f, o = (gates[:, k * size : (k + 1) * size] for k in range(3))
        _begin(h, first)
        _begin(c, cell)
        products = gating.bound(h, gates) + making.bound(h, new)
        with np.errstate(over="ignore", under="ignore"):  # exp is infinite, or 0, rightly
            for t in order:
                for multiply in products:
                    multiply()
                gates -= x[:, t, : 3 * size]
                new += x[:, t, 3 * size :]
                _exp_and_one(gates)
                np.tanh(new, out=new)
                new /= i
                c /= f
                c += new
                np.tanh(c, out=h)
                h /= o
                y[:, t] = h

    return InPlace(run, lambda rows: room(dtype, (rows, 3 * size), (rows, size)))


@linear_lstm.in_place
def linear_lstm_in_place(
    x: Operand,
    weight_x: Operand,
    bias: Operand | None,
    weight: Operand,
    h: Operand | None = None,
    c: Operand | None = None,
    *,
    reverse: bool = False,
) -> InPlace | None:
    return _by_onednn("lstm", x, (weight_x, weight, bias, None), (h, c), reverse)


@linear_gru.in_place
def linear_gru_in_place(
    x: Operand,
    weight_x: Operand,
    bias_x: Operand | None,
    weight: Operand,
    bias: Operand | None = None,
    h: Operand | None = None,
    *,
    reset_after: bool = True,
    reverse: bool = False,
) -> InPlace | None:
    kind = "lbr_gru" if reset_after else "gru"
    return _by_onednn(kind, x, (weight_x, weight, bias_x, bias), (h,), reverse)


GATES = {"lstm": (0, 1, 3, 2), "gru": (1, 0, 2), "lbr_gru": (1, 0, 2)}
"""Those of our kernels, i, f, o, g and r, z, n, in oneDNN's order."""


def _by_onednn(
    kind: str,
    x: Operand,
    constants: tuple[Operand | None, ...],
    initial: tuple[Operand | None, ...],
    reverse: bool,
) -> InPlace | None:
    """All steps in one call, of constant weights and biases, of x and of the states: elsewhere a
    product, and a recurrence step by step."""
    states = [state for state in initial if state is not None]
    numbers = [None if operand is None else operand.numbers for operand in constants]
    weight_x, weight = numbers[:2]
    if weight_x is None or weight is None or not onednn.has(x.dtype):
        return None
    if 0 in (*x.shape[1:], *weight.shape) or not plain(x, *constants, *states):
        return None
    (rows, time, inputs), (size, outputs), order = x.shape, weight.shape, list(GATES[kind])
    biases = [operand for operand in constants[2:] if operand is not None]
    if any(bias.numbers is None or bias.shape != (outputs,) for bias in biases):
        return None
    count = len(initial)
    if len(states) not in (0, count) or any(state.shape != (rows, size) for state in states):
        return None
    inner, outer, of_x, of_h = (
        np.zeros((1, len(order), size), x.dtype) if array is None
        else array.reshape(-1, len(order), size).take(order, axis=1)
        for array in numbers
    )  # fmt: skip
    bias = of_x + of_h
    if kind == "lbr_gru":  # which resets what its states add to new values, their bias included
        bias = np.concatenate([bias[:, :2], of_x[:, 2:], of_h[:, 2:]], axis=1)
    planned = onednn.recurrence(
        kind, inner, outer, bias[0], time, begun=bool(states), reverse=reverse
    )
    if planned is None:
        return None
    work = time * inner.size  # of the inputs' product: of so much, the steps are worth threads, too

    def shapes(rows: int) -> list[Shape]:
        return [(rows, time, inputs), *[(rows, size)] * len(states)]

    def prepared(
        arrays: tuple[Any, ...], threads: int
    ) -> tuple[onednn.Plan, list[tuple[HostArray, HostArray]], list[HostArray]]:
        """The plan, the copies to make before, and what it is to be called with."""
        *results, scratch, x = arrays[: 3 + count]
        operands = [x, *(arrays[-count:] if states else ())]
        copies = []
        for i, own in enumerate(carved(scratch, x.dtype, *shapes(len(x)))):
            if not operands[i].flags.c_contiguous:
                copies.append((operands[i], own))
                operands[i] = own
        plan = planned(threads, len(x))
        assert plan is not None, "oneDNN planned it for one row"
        rest = scratch[room(x.dtype, *shapes(len(x))) :]
        if rest.nbytes < plan.scratch_size:  # threads have a little of their own
            rest = aligned((plan.scratch_size,), "uint8")
        return plan, copies, [*operands, *results, rest]

    def run(*arrays: Any) -> None:
        rows = len(arrays[2 + count])
        if rows:
            threads = onednn.threads_for(rows * work)
            plan, copies, operands = prepared(arrays, threads)
            for pair in copies:
                onednn.copy(*pair)
            onednn.limited_to(threads, plan, *operands)

    def bind(*arrays: Any) -> list[Callable[[], object]]:
        rows = len(arrays[2 + count])
        if not rows or rows * work > onednn.ALSO_SHARED:
            return [partial(run, *arrays)]
        plan, copies, operands = prepared(arrays, 1)
        call = partial(onednn.limited_to, 1, plan.bound(*operands))
        return [*(partial(onednn.copy, *pair) for pair in copies), call]

    def bytes_for(rows: int) -> int:
        rest = planned.scratch + max(0, rows - 1) * planned.further
        return room(x.dtype, *shapes(rows)) + rest

    return InPlace(run, bytes_for, lambda rows: rows * work, bind)
