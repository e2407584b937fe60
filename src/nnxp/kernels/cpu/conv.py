"""Convolutions by blocks of a few pictures: what a block takes stays in cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import ceil, prod
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from nnxp._arrays import HostArray, Shape
from nnxp.kernels._dispatch import InPlace, Kernel, Operand
from nnxp.kernels._windows import Padding, PerAxis, Windows, windows
from nnxp.kernels.activations import identity, relu
from nnxp.kernels.conv import conv, conv_max_pool, conv_weight_gradient
from nnxp.kernels.cpu import onednn
from nnxp.kernels.cpu._finish import Finish
from nnxp.kernels.cpu._pieces import PIECE, carved, plain, room
from nnxp.kernels.cpu._small import OfGroups, Weight
from nnxp.kernels.cpu.linear import LINES, product
from nnxp.kernels.cpu.pool import largest
from nnxp.kernels.pool import max_pool

PATCHES = 1 << 20  # bytes of patches that are laid out for a product
TILES = 256  # of Winograd's at once, at least, for each of his products has one line for each
LEAST_TILES = 48  # with fewer the products are too small to gain
ALONE = 1 / 16  # of the squares that an output sees, squared: one element that outweighs all others
LEAST_CHANNELS = 96, 128
"""With fewer the transforms take longer than what they save; beside oneDNN with AVX-512, whose
products take half of the time, with fewer than the second number."""
TOGETHER = 2 << 20  # bytes of results that oneDNN makes before their pool and activation follow
SEEN = 512  # elements that a window sees: with fewer, pooling takes long beside convolving
SHORT = 12  # elements that lie together in a patch: fewer are copied the other way round


@conv.in_place
def conv_in_place(
    x: Operand,
    weight: Operand,
    bias: Operand | None = None,
    *,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
    activation: Kernel = identity,
    precision: str | None = None,
) -> InPlace | None:
    """With constant weights; by oneDNN also with others."""
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    over = _taken(x, weight, bias, groups, **options)
    if over is None or weight.shape[-1] % groups:
        return None  # the reference body says what is wrong
    space = x.shape[1:-1]
    if not _are_constant(weight, bias):
        return _with_changing_weights(space, weight, over, bias, activation, groups)
    numbers, shift = np.asarray(weight.numbers), None if bias is None else bias.numbers
    planned = None
    if not _transforms(weight.shape, over):
        planned = _by_onednn(space, numbers, over, shift, activation, groups)
    if planned is not None:
        return planned
    numbers = np.ascontiguousarray(numbers)
    return _by_ourselves(space, numbers, over, shift, activation, groups)


def _by_ourselves(
    space: Shape, numbers: HostArray, over: Windows, bias: HostArray | None, activation: Kernel,
    groups: int,
) -> InPlace | None:  # fmt: skip
    """Without oneDNN: for windows over one or two axes, in one group, with a group for each
    channel, or in any groups where a window is one element."""
    apart = groups > 1 and numbers.shape[-2] == 1 and groups == numbers.shape[-1]
    axes = len(over.window)
    if axes > 2 or (groups > 1 and not apart and not _alone(over)):
        return None
    finish = Finish(bias, activation, numbers.dtype)
    if axes == 1:
        numbers, space, over = numbers[None], (1, *space), _flat(over)
    if apart:
        body = _by_channel(space, numbers, over, bias, activation)
    elif _alone(over):
        body = _pointwise(space, numbers, over, finish, groups)
    else:
        body = _by_patches(space, numbers, over, finish)
        if _transforms(numbers.shape, over):
            body = _winograd(numbers, over, finish, body)

    if axes > 1:
        return InPlace(lambda out, scratch, x, *_: body.run(out, scratch, x), body.room)
    return InPlace(
        lambda out, scratch, x, *_: body.run(out[:, None], scratch, x[:, None]), body.room
    )


@conv_max_pool.in_place
def conv_max_pool_in_place(
    x: Operand,
    weight: Operand,
    bias: Operand | None = None,
    *,
    window: tuple[int, ...],
    groups: int = 1,
    activation: Kernel = identity,
    precision: str | None = None,
    **options: Any,
) -> InPlace | None:
    """Where the convolution is by patches: what the pool leaves is all that is written out.

    The bias and relu keep what is largest, so that they follow on what is left.
    """
    if len(window) != 2 or weight.ndim != 4 or activation not in (identity, relu):
        return None
    over = _taken(x, weight, bias, groups, **options)
    if over is None or any(n < size for n, size in zip(over.positions, window, strict=True)):
        return None  # the reference body says what is wrong
    if not _are_constant(weight, bias) or (groups == 1 and _transforms(weight.shape, over)):
        return None
    numbers, space = np.asarray(weight.numbers), x.shape[1:-1]
    shift = None if bias is None else bias.numbers
    planned = _by_phases(space, numbers, over, shift, activation, groups, window)
    planned = planned or _by_onednn(space, numbers, over, shift, activation, groups, window)
    if planned or groups != 1 or _alone(over):
        return planned
    numbers = np.ascontiguousarray(numbers)
    body = _by_patches(space, numbers, over, Finish(shift, activation, x.dtype), window)
    return InPlace(lambda out, scratch, x, *_: body.run(out, scratch, x), body.room)


@conv_weight_gradient.in_place
def conv_weight_gradient_in_place(
    x: Operand,
    dy: Operand,
    *,
    window: tuple[int, ...],
    groups: int = 1,
    precision: str | None = None,
    **options: Any,
) -> InPlace | None:
    """By oneDNN."""
    weight = Operand((*window, x.shape[-1] // groups, dy.shape[-1]), x.dtype, None)
    over = _taken(x, weight, None, groups, **options)
    if over is None or not plain(x, dy) or not onednn.has(x.dtype):
        return None
    planned = onednn.weight_gradient(onednn.Convolution(x.shape[1:-1], weight.shape, over, groups))
    shapes = x.shape[1:], dy.shape[1:]
    work = prod(over.positions) * prod(weight.shape)
    if planned is None:
        return None
    return _all_at_once(planned, work, lambda rows: [(rows, *shape) for shape in shapes])


def _with_changing_weights(
    space: Shape, weight: Operand, over: Windows, bias: Operand | None,
    activation: Kernel, groups: int,
) -> InPlace | None:  # fmt: skip
    """By oneDNN; None where it has no fast way."""
    if not onednn.has(weight.dtype):
        return None
    problem = onednn.Convolution(space, weight.shape, over, groups)
    planned = onednn.changing_convolution(problem, bias is not None, activation)
    if planned is None:
        return None
    seen, biases = (*space, weight.shape[-2] * groups), [] if bias is None else [bias.shape]
    work = prod(over.positions) * prod(weight.shape)
    body = _all_at_once(planned, work, lambda rows: [(rows, *seen), weight.shape, *biases])
    finish = Finish(None, identity if activation in onednn.FUSED else activation, weight.dtype)

    def run(out: HostArray, scratch: HostArray, *arrays: HostArray | None) -> None:
        body.run(out, scratch, *(array for array in arrays if array is not None))
        finish(out.reshape(-1, out.shape[-1]))

    def bytes_for(rows: int) -> int:
        nbytes = rows * prod(over.positions) * weight.shape[-1] * weight.dtype.itemsize
        return max(body.room(rows), finish.room(nbytes))

    return InPlace(run, bytes_for, body.work)


def _all_at_once(
    planned: onednn.Planned[onednn.Relaid], work: int, shapes: Callable[[int], list[Shape]]
) -> InPlace:
    """What oneDNN makes of arrays of these shapes, which are copied where they are not in one
    piece; `work` is multiply-adds for each row."""

    def run(out: HostArray, scratch: HostArray, *arrays: HostArray) -> None:
        rows = len(arrays[0])
        if not rows:
            out[...] = 0
            return
        spare = carved(scratch, np.float32, *shapes(rows))
        whole = [onednn.contiguous(*pair) for pair in zip(arrays, spare, strict=True)]
        plan = planned(onednn.threads_for(rows * work), rows)
        assert plan is not None, "oneDNN planned it for one row"
        plan(scratch[room(np.float32, *shapes(rows)) :], *whole, out)

    def bytes_for(rows: int) -> int:
        return room(np.float32, *shapes(rows)) + planned.scratch

    return InPlace(run, bytes_for, lambda rows: rows * work)


def _by_onednn(
    space: Shape,
    weight: HostArray,
    over: Windows,
    bias: HostArray | None,
    activation: Kernel,
    groups: int,
    pool: Shape = (),
) -> InPlace | None:
    """A few pictures at a time, whose pool and activation follow; None where oneDNN has no fast
    way."""
    if not onednn.has(weight.dtype):
        return None
    problem = onednn.Convolution(space, weight.shape, over, groups)
    planned = onednn.convolution(problem, weight, bias, activation)
    if planned is None:
        return None
    outputs, dtype = weight.shape[-1], weight.dtype
    seen, result = (*space, weight.shape[-2] * groups), (*over.positions, outputs)
    pooling = (
        max_pool.in_place_for(Operand((1, *result), dtype, None), window=pool) if pool else None
    )
    finish = Finish(None, identity if activation in onednn.FUSED else activation, dtype)
    pictures = max(1, TOGETHER // (prod(result) * dtype.itemsize))
    work = prod(over.positions) * weight.size

    def shapes(rows: int) -> tuple[Shape, Shape]:
        together = min(rows, pictures)
        return (together, *seen), (together if pool else 0, *result)

    def run(out: HostArray, scratch: HostArray, x: HostArray, *_: Any) -> None:
        own = products = rest = scratch
        if pool or not x.flags.c_contiguous:
            own, products = carved(scratch, dtype, *shapes(len(x)))
            rest = scratch[room(dtype, *shapes(len(x))) :]
        for start in range(0, len(x), pictures):
            part, y = x[start : start + pictures], out[start : start + pictures]
            part = onednn.contiguous(part, own[: len(part)])
            whole = y if pooling is None else products[: len(part)]
            plan = planned(onednn.threads_for(len(part) * work), len(part))
            assert plan is not None, "oneDNN planned it for one row"
            plan(part, whole)
            if pooling is not None:
                pooling.run(y, rest, whole)
            finish(y.reshape(-1, outputs))

    def bind(
        out: HostArray, scratch: HostArray, x: HostArray, *_: Any
    ) -> list[Callable[[], object]]:
        if pool or len(x) > pictures:
            return [partial(run, out, scratch, x)]
        before: list[Callable[[], object]] = []
        if not x.flags.c_contiguous:
            own = next(carved(scratch, dtype, *shapes(len(x))))
            before.append(partial(onednn.copy, x, own))
            x = own
        made = onednn.bound(planned, len(x) * work, (len(x),), x, out)
        return [*before, made, *finish.bound(out.reshape(-1, outputs))]

    def bytes_for(rows: int) -> int:
        together = min(rows, pictures)
        here = room(dtype, *shapes(rows)) + finish.room(together * prod(result) * 4)
        return here + (0 if pooling is None else pooling.room(together))

    return InPlace(run, bytes_for, lambda rows: min(rows, pictures) * work, bind)


def _by_phases(
    space: Shape,
    weight: HostArray,
    over: Windows,
    bias: HostArray | None,
    activation: Kernel,
    groups: int,
    pool: Shape,
) -> InPlace | None:
    """By oneDNN, a convolution for each place in the pool's windows, so that the largest of their
    results are found along whole stretches of memory.

    None where it has no fast way, and for windows that see much: the pool takes little beside them.
    """
    outputs, dtype = weight.shape[-1], weight.dtype
    if not onednn.has(dtype) or weight.size > SEEN * outputs:
        return None
    phases = [_phase(space, over, pool, place) for place in np.ndindex(*pool)]
    problems = [onednn.Convolution(space, weight.shape, phase, groups) for phase in phases if phase]
    planned = [onednn.convolution(problem, weight, bias, identity) for problem in problems]
    plans = [plan for plan in planned if plan is not None]
    if len(plans) < prod(pool):
        return None
    seen = (*space, weight.shape[-2] * groups)
    result = (*(n // size for n, size in zip(over.positions, pool, strict=True)), outputs)
    pictures = max(1, 2 * TOGETHER // (len(plans) * prod(result) * dtype.itemsize))
    work = prod(result[:-1]) * weight.size
    finish = Finish(None, activation, dtype)

    def shapes(rows: int) -> tuple[Shape, Shape]:
        together = min(rows, pictures)
        return (together, *seen), (len(plans), together, *result)

    def run(out: HostArray, scratch: HostArray, x: HostArray, *_: Any) -> None:
        own, results = carved(scratch, dtype, *shapes(len(x)))
        for start in range(0, len(x), pictures):
            part, y = x[start : start + pictures], out[start : start + pictures]
            part = onednn.contiguous(part, own[: len(part)])
            threads = onednn.threads_for(len(part) * work)
            for planned, phase in zip(plans, results, strict=True):
                plan = planned(threads, len(part))
                assert plan is not None, "oneDNN planned it for one row"
                plan(part, phase[: len(part)])
            largest(list(results[:, : len(part)]), y)
            finish(y.reshape(-1, outputs))

    def bytes_for(rows: int) -> int:
        nbytes = min(rows, pictures) * prod(result) * dtype.itemsize
        return room(dtype, *shapes(rows)) + finish.room(nbytes)

    return InPlace(run, bytes_for, lambda rows: min(rows, pictures) * work)


def _phase(space: Shape, over: Windows, pool: Shape, place: Shape) -> Windows | None:
    """The windows that lie at one place in those of a pool; None where they begin behind the first
    element of x, for which oneDNN has no padding."""
    starts = [i * step for i, step in zip(place, over.stride, strict=True)]
    before = [pad - start for (pad, _), start in zip(over.pads, starts, strict=True)]
    if min(before) < 0:
        return None
    stride = tuple(step * size for step, size in zip(over.stride, pool, strict=True))
    positions = tuple(n // size for n, size in zip(over.positions, pool, strict=True))
    pads = tuple(
        (pad, max(0, (count - 1) * step + reach - pad - n))
        for n, pad, count, step, reach in zip(
            space, before, positions, stride, over.reach, strict=True
        )
    )
    return Windows(over.window, stride, over.dilation, pads, positions, ((0, 0),) * len(pads))


def _taken(
    x: Operand, weight: Operand, bias: Operand | None, groups: int, **options: Any
) -> Windows | None:
    """The windows of a convolution that bodies here do; None for what is left to others."""
    if not plain(x, weight, bias) or 0 in (*x.shape[1:], *weight.shape):
        return None
    if x.ndim != weight.ndim or x.shape[-1] != weight.shape[-2] * groups:
        return None  # the reference body says what is wrong
    over = windows("conv", x, weight.shape[:-2], **options)
    return None if any(size < 0 for pair in over.pads for size in pair) else over


def _are_constant(weight: Operand, bias: Operand | None) -> bool:
    return weight.numbers is not None and (bias is None or bias.numbers is not None)


def _alone(over: Windows) -> bool:
    """Whether each window sees one element, and there is no padding."""
    return prod(over.window) == 1 and not any(map(any, over.pads))


def _transforms(weight: Shape, over: Windows) -> bool:
    """Whether Winograd's way is the faster one."""
    square = over.window == (3, 3) and over.stride == over.dilation == (1, 1)
    return square and min(weight[2:]) >= LEAST_CHANNELS[onednn.wide_vectors()]


def _flat(over: Windows) -> Windows:
    """The same windows over one axis more, before the others, of which there is one."""
    one: Shape = (1,)
    none = ((0, 0),)
    return Windows(
        one + over.window, one + over.stride, one + over.dilation, none + over.pads,
        one + over.positions, none + over.beyond,
    )  # fmt: skip


def _pointwise(
    space: Shape, weight: HostArray, over: Windows, finish: Finish, groups: int
) -> InPlace:
    """Windows of one element: a product, of every so many elements."""
    inner, outputs = weight.shape[-2:]
    inputs = inner * groups
    matrix = Weight(weight.reshape(inner, outputs))
    if groups > 1:
        matrix = OfGroups(weight.reshape(inner, groups, -1).swapaxes(0, 1))
    lines = prod(over.positions)
    pictures = ceil(LINES / lines)

    def run(out: HostArray, scratch: HostArray, x: HostArray) -> None:
        seen = x[:, :: over.stride[0], :: over.stride[1]]
        if seen.flags.c_contiguous:
            product(seen.reshape(-1, inputs), matrix, out.reshape(-1, outputs), finish)
            return
        for start in range(0, len(x), pictures):
            part = seen[start : start + pictures]
            (own,) = carved(scratch, x.dtype, part.shape)
            np.copyto(own, part)
            y = out[start : start + pictures].reshape(-1, outputs)
            product(own.reshape(-1, inputs), matrix, y, finish)

    def bytes_for(rows: int) -> int:
        copied = min(rows, pictures) * lines, inputs
        return room(weight.dtype, copied) + finish.room(rows * lines * outputs * weight.itemsize)

    return InPlace(run, bytes_for)


def _padded(x: HostArray, own: HostArray, over: Windows, fill: float = 0.0) -> HostArray:
    """x with its padding, in `own`; x itself if it has none."""
    if own.shape == x.shape:
        return x
    (top, _), (left, _) = over.pads
    _, height, width, _ = x.shape
    _, tall, wide, _ = own.shape
    if top:
        own[:, :top] = fill
    if tall > top + height:
        own[:, top + height :] = fill
    inner = own[:, top : top + height] if tall > height else own
    if left:
        inner[:, :, :left] = fill
    if wide > left + width:
        inner[:, :, left + width :] = fill
    inner[:, :, left : left + width] = x
    return own


def _with_pads(space: Shape, over: Windows) -> Shape:
    return tuple(n + before + behind for n, (before, behind) in zip(space, over.pads, strict=True))


def _by_patches(
    space: Shape, weight: HostArray, over: Windows, finish: Finish, pool: Shape = (1, 1)
) -> InPlace:
    """What the windows see is laid out in lines, some hundreds of them, for one product.

    Where the elements of a line are few that lie together, as with one channel, each is laid out
    for all positions instead: as columns. With a pool, the first positions of all its windows come
    first, then the second ones: of their outputs the largest are found along whole lines.
    """
    outputs, dtype = weight.shape[-1], weight.dtype
    matrix = Weight(weight.reshape(-1, outputs))
    long, phases = weight.size // outputs, prod(pool)
    height, width = (n // size for n, size in zip(over.positions, pool, strict=True))
    most = PATCHES // (max(long, 2 * outputs) * dtype.itemsize)  # so that the results stay, too
    together = ceil(max(LINES // 2, most) / phases)
    pictures = max(1, together // (height * width))
    high = height if pictures > 1 else max(1, min(height, ceil(together / width)))
    high = ceil(height / ceil(height / high))
    columns = over.window[1] * weight.shape[2] < SHORT
    window = (*over.window, weight.shape[2])
    around = (*_with_pads(space, over), weight.shape[2])

    def shapes(rows: int) -> tuple[Shape, ...]:
        """Of x with its padding, what is laid out of it, and its products before a pool."""
        together = min(rows, pictures)
        lines = phases * together * high * width
        return (together, *around), (lines, long), (lines if phases > 1 else 0, outputs)

    def run(out: HostArray, scratch: HostArray, x: HostArray) -> None:
        own, laid, products = carved(scratch, dtype, *shapes(len(x)))
        laid = laid.reshape(-1)
        apart, beside = over.dilation
        for start in range(0, len(x), pictures):
            part = x[start : start + pictures]
            some = _padded(part, own[: len(part)], over)
            n, h, w, c = some.strides
            down, right = h * over.stride[0], w * over.stride[1]
            strides = down, right, n, down * pool[0], right * pool[1], h * apart, w * beside, c
            seen = _strided(some, (*pool, len(part), height, width, *window), strides)
            for top in range(0, height, high):
                block = seen[:, :, :, top : top + high]
                y = out[start : start + pictures, top : top + high].reshape(-1, outputs)
                flat = laid[: block.size]
                if columns:
                    block = block.transpose(5, 6, 7, 0, 1, 2, 3, 4)
                    lines = flat.reshape(long, -1).T
                else:
                    lines = flat.reshape(-1, long)
                np.copyto(flat.reshape(block.shape), block)
                results = y if phases == 1 else products[: len(lines)]
                matrix(lines, results)
                if phases > 1:
                    largest(list(results.reshape(phases, len(y), outputs)), y)
                finish(y)

    def bytes_for(rows: int) -> int:
        nbytes = min(rows, pictures) * high * width * outputs * dtype.itemsize
        return room(dtype, *shapes(rows)) + finish.room(nbytes)

    return InPlace(run, bytes_for)


def _strided(x: HostArray, shape: Shape, strides: Shape) -> HostArray:
    """A view of x with these strides; as_strided takes 15 us for what this does in one."""
    if x.flags.c_contiguous:
        return np.ndarray(shape, x.dtype, x, 0, strides)
    return as_strided(x, shape, strides)


_LEFT = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])


def _winograd(weight: HostArray, over: Windows, finish: Finish, patches: InPlace) -> InPlace:
    """F(2x2, 3x3), four outputs of 16 products, not 36   [Lavin & Gray 2015, arXiv:1509.09308]

    The rounding of an element goes by all weights that it meets in the window, also where the one
    that counts is small. Where one outweighs all others that an output sees, or is not finite, that
    output is computed again from what it sees.
    """
    inputs, outputs = weight.shape[2:]
    dtype, (height, width) = weight.dtype, over.positions
    down, across = ceil(height / 2), ceil(width / 2)
    tiles = max(TILES, PATCHES // (16 * (inputs + outputs) * dtype.itemsize))
    pictures = max(1, tiles // (down * across))
    high = down if pictures > 1 else max(1, min(down, ceil(tiles / across)))
    high = ceil(down / ceil(down / high))
    wide = 2 * across + 2

    def shapes(rows: int) -> tuple[Shape, ...]:
        """Of x with its padding, its lines and then its tiles transformed, products, half of y."""
        together = min(rows, pictures)
        count = together * high * across
        lines = (4 * together * high * wide * inputs,)
        tiles = (16 * count * inputs,), (16 * count * outputs,), (8 * count * outputs,)
        return (together, 2 * down + 2, wide, inputs), lines, *tiles

    cache: list[Weight] = []
    matrix = weight.reshape(-1, outputs)
    again = max(1, PIECE // (len(matrix) * dtype.itemsize))

    def transformed() -> Weight:
        if not cache:
            lines = _LEFT @ weight.reshape(3, 3, -1).astype("float64")
            both = (_LEFT @ lines.reshape(3, -1)).astype(dtype)
            cache.append(Weight(both.reshape(16, inputs, outputs)))
        return cache[0]

    def run(out: HostArray, scratch: HostArray, x: HostArray) -> None:
        if len(x) * down * across < LEAST_TILES:
            patches.run(out, scratch, x)
            return
        kernels = transformed()
        own, *others = carved(scratch, dtype, *shapes(len(x)))
        (top, _), (left, _) = over.pads
        for start in range(0, len(x), pictures):
            part = x[start : start + pictures]
            n, tall, broad, _ = part.shape
            some = own[:n]
            some[:, :top] = 0
            some[:, top + tall :] = 0
            some[:, top : top + tall, :left] = 0
            some[:, top : top + tall, left + broad :] = 0
            np.copyto(some[:, top : top + tall, left : left + broad], part)
            for first in range(0, down, high):
                last = min(down, first + high)
                block = some[:, 2 * first : 2 * last + 2]
                y = out[start : start + n, 2 * first : min(height, 2 * last)]
                squares = others[1][: block.size].reshape(block.shape)
                drowned = np.nonzero(_drowned(block, squares)[:, : y.shape[1], :width])
                _tiles(block, kernels, y, others)
                for i in range(0, len(drowned[0]), again):
                    at = tuple(axis[i : i + again] for axis in drowned)
                    y[at] = _windows(block)[at].reshape(-1, len(matrix)) @ matrix
                finish(y.reshape(-1, outputs))

    def bytes_for(rows: int) -> int:
        around, *others = shapes(rows)
        energies = 8 * room(dtype, around[:3]) + 40 * prod(around[:3])
        mending = room(dtype, (again, len(matrix)), (2 * again, outputs))
        finishing = finish.room(4 * min(rows, pictures) * high * across * outputs * dtype.itemsize)
        here = room(dtype, around, *others) + energies + mending + finishing
        return max(here, patches.room(rows))

    return InPlace(run, bytes_for)


def _windows(x: HostArray) -> HostArray:
    """What windows of 3x3 see of x (n, h, w, c) -> (n, h - 2, w - 2, 3, 3, c)"""
    n, h, w, c = x.shape
    a, b, d, e = x.strides
    return as_strided(x, (n, h - 2, w - 2, 3, 3, c), (a, b, d, b, d, e))


def _drowned(x: HostArray, squares: HostArray) -> HostArray:
    """Where one element outweighs all others that a window of 3x3 sees of x (n, h, w, c), so that
    an output for which it has a small weight may be lost in its rounding -> (n, h - 2, w - 2)

    `squares` is memory like x.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        np.multiply(x, x, out=squares)
        energy = np.matmul(squares, np.ones(x.shape[-1], x.dtype))
        fourth = np.einsum("nhwc,nhwc->nhw", squares, squares)
        seen, most = _in_windows(energy, np.add), _in_windows(fourth, np.maximum)
        power = seen * seen
        heard = (power > 0) | (seen == 0)  # what is too faint for its fourth power tells nothing
        drowned: HostArray = ~((most <= ALONE * power) & (most < np.inf) & heard)
    return drowned


def _in_windows(x: HostArray, combine: np.ufunc) -> HostArray:
    """What is in windows of 3x3 of x (n, h, w), combined -> (n, h - 2, w - 2)"""
    lines = combine(combine(x[:, :-2], x[:, 1:-1]), x[:, 2:])
    result: HostArray = combine(combine(lines[:, :, :-2], lines[:, :, 1:-1]), lines[:, :, 2:])
    return result


def _tiles(x: HostArray, kernels: Weight, y: HostArray, memory: list[HostArray]) -> None:
    """The outputs of one block of x (n, 2 q + 2, 2 t + 2, c), padded -> y (n, <= 2 q, <= 2 t, o)"""
    n, tall, wide, c = x.shape
    q, t, o = tall // 2 - 1, wide // 2 - 1, y.shape[-1]
    rows, seen, products, halves = memory
    r = rows[: 4 * n * q * wide * c].reshape(4, n, q, wide, c)
    v = seen[: 16 * n * q * t * c].reshape(4, 4, n, q, t, c)
    m = products[: 16 * n * q * t * o].reshape(4, 4, n, q, t, o)
    s = halves[: 8 * n * q * t * o].reshape(2, 4, n, q, t, o)
    _inputs([x[:, i : i + 2 * q - 1 : 2] for i in range(4)], r)
    _inputs([r[..., j : j + 2 * t - 1 : 2, :] for j in range(4)], v.swapaxes(0, 1))
    kernels(v.reshape(16, -1, c), m.reshape(16, -1, o))
    _outputs(m, s)
    both = m[:2].reshape(-1)[: 4 * n * q * t * o].reshape(2, 2, n, q, t, o)  # m is free now
    _outputs(s.swapaxes(0, 1), both)
    for j in range(2):
        for i in range(2):
            into = y[:, i::2, j::2]
            np.copyto(into, both[j, i, :, : into.shape[1], : into.shape[2]])


def _inputs(d: list[HostArray], out: HostArray) -> None:
    np.subtract(d[0], d[2], out=out[0])
    np.add(d[1], d[2], out=out[1])
    np.subtract(d[2], d[1], out=out[2])
    np.subtract(d[1], d[3], out=out[3])


def _outputs(m: HostArray, out: HostArray) -> None:
    np.add(m[1], m[2], out=out[0])
    np.add(out[0], m[0], out=out[0])
    np.subtract(m[1], m[2], out=out[1])
    np.subtract(out[1], m[3], out=out[1])


def _by_channel(
    space: Shape, weight: HostArray, over: Windows, bias: HostArray | None, activation: Kernel
) -> InPlace:
    """Each channel by itself: one einsum over what the windows see, all of a line at once.

    Columns lie by the phases of the stride, so that what an element of the window meets along a
    line is one stretch of memory, channels and all; the weight is repeated along it.
    """
    channels, dtype = weight.shape[-1], weight.dtype
    (height, width), (down, right), (apart, beside) = over.positions, over.stride, over.dilation
    tall, broad = _with_pads(space, over)
    columns = max(ceil(broad / right), (over.window[1] - 1) * beside // right + width)
    line = width * channels
    high = max(1, PIECE // (2 * line * dtype.itemsize))
    high = ceil(height / ceil(height / min(height, high)))
    (top, _), (left, _) = over.pads
    phases: dict[int, list[int]] = {}
    for j in range(over.window[1]):
        phases.setdefault(j * beside % right, []).append(j)
    parts = []
    for phase, taps in phases.items():
        repeated = np.tile(weight[:, taps, 0, :], (1, 1, width))
        step = (taps[1] - taps[0]) * beside // right if len(taps) > 1 else 0
        parts.append((phase, taps[0] * beside // right, step, np.ascontiguousarray(repeated)))
    own_shape, block = (tall, right, columns, channels), (high, line)
    wide = None if bias is None else np.tile(bias, width)
    finish = Finish(wide, activation, dtype)

    def run(out: HostArray, scratch: HostArray, x: HostArray) -> None:
        own, more = carved(scratch, dtype, own_shape, block)
        own[:] = 0
        n, _, w, c = own.strides
        views = [
            (
                as_strided(
                    own[:, phase, first:],
                    (height, over.window[0], numbers.shape[1], line),
                    (n * down, n * apart, step * w, c),
                ),
                numbers,
            )
            for phase, first, step, numbers in parts
        ]
        for picture, y in zip(x, out.reshape(len(x), height, line), strict=True):
            for phase in range(right):
                first = (phase - left) % right
                lines = picture[:, first::right]
                at = (first + left) // right
                own[top : top + len(picture), phase, at : at + lines.shape[1]] = lines
            for start in range(0, height, high):
                y_block = y[start : start + high]
                into = y_block
                for seen, numbers in views:
                    np.einsum("hijx,ijx->hx", seen[start : start + high], numbers, out=into)
                    if into is not y_block:
                        np.add(y_block, into, out=y_block)
                    into = more[: len(y_block)]
                finish(y_block)

    needed = room(dtype, own_shape, block) + finish.room(prod(block) * dtype.itemsize)
    return InPlace(run, lambda rows: needed)
