"""Launching what looks through windows: windows.cu says how."""

from __future__ import annotations

from math import prod
from typing import Any

import cupy
import numpy as np

from nnxp._arrays import Array
from nnxp.kernels._windows import Windows
from nnxp.kernels.cuda._compiled import launch, next_power, type_name

AXES = 3  # of space, at most
MOST = (1 << 31) - 1  # elements of a row, and lines of a launch: they are counted in 32 bits
THREADS = 256  # a block
ACROSS = 256, 128, 64, 32, 16  # of these side by side, the others down the lines
IN_FLIGHT = 4  # lines that a thread of `patches` asks for at once
STRUCT = np.dtype((np.void, 4 * (2 + 9 * AXES)))  # CuPy passes one such thing by value
MOST_BLOCKS = 65535  # down a grid: all CUDA allows


class Seen:
    """x (rows, *space, channels) with windows over space, as the kernels are told of them.

    x may lie in any way. `v` is how many channels move at once: 16 bytes, where x allows it.
    """

    def __init__(self, x: Array, over: Windows, counted: Any = None) -> None:
        self.x, self.over = x, over
        size = x.itemsize
        *steps, channel_step = (step // size for step in x.strides[1:])
        self.row_step = x.strides[0] // size
        self.positions = prod(over.positions)
        axes = [(1, 0, 1, 1, 1, 0, 1, 0, 1)] * (AXES - len(over.window))
        for i, (n, step) in enumerate(zip(x.shape[1:-1], steps, strict=True)):
            before, behind = counted[i] if counted else (0, 0)
            axes.append((
                n, step, over.window[i], over.stride[i], over.dilation[i], over.pads[i][0],
                over.positions[i], -before, n + behind,
            ))  # fmt: skip
        self.numbers = np.array([x.shape[-1], channel_step, *sum(axes, ())], "int32").view(STRUCT)
        v: int = 16 // size
        places = x.data.ptr
        for n, step in zip(x.shape[:-1], x.strides[:-1], strict=True):
            places |= step if n > 1 else 0
        wide = x.shape[-1] % v == 0 and channel_step == 1 and places % 16 == 0
        self.v = v if wide else 1

    @property
    def whole(self) -> bool:
        """Whether each window sees one element, the next the next, as they lie in memory."""
        x, over = self.x, self.over
        one = set(over.window + over.stride) == {1} and not any(map(any, over.pads))
        pairs = zip(x.strides[:-2], x.strides[1:-1], x.shape[1:-1], strict=True)
        lines = all(outer == inner * n for outer, inner, n in pairs)
        return bool(one and lines and x.strides[-1] == x.itemsize)


def fits(x: Array, over: Windows, outputs: int = 1) -> bool:
    """Whether the kernels can look through these windows over x, for so many outputs."""
    if type_name(x.dtype) is None or x.size == 0 or len(over.window) > AXES:
        return False
    if any(step % x.itemsize for step in x.strides) or any(a < 0 for a, _ in over.pads):
        return False
    rows, *space, channels = x.shape
    steps = zip(x.shape[1:], x.strides[1:], strict=True)
    counts = (
        sum((n - 1) * abs(step) // x.itemsize for n, step in steps),
        sum(n + a + b for n, (a, b) in zip(space, over.pads, strict=True)),
        prod(over.window) * channels,
        prod(over.positions) * max(outputs, channels),
        rows * prod(over.positions[:-1]),
    )
    return bool(max(counts) < MOST)


def laid_out(seen: Seen, first: int, lines: int, columns: int) -> Array:
    """What the windows see from the position `first` of the rows on: (lines, columns).

    The elements of a window come in the order of its axes, each with its channels; zeros fill
    what columns there are beyond them.
    """
    x = seen.x
    y = cupy.empty((lines, columns), x.dtype)
    row, within = divmod(first, seen.positions)
    across = _across(columns // seen.v)
    down = THREADS // across
    launch(
        ("windows.cu", "patches", _stored(x.dtype), seen.v),
        (-(-columns // (seen.v * across)), min(MOST_BLOCKS, -(-lines // (IN_FLIGHT * down)))),
        (across, down),
        (x[row:], y),
        *(seen.row_step, within, lines, columns, seen.numbers),
    )
    return y


def _across(count: int) -> int:
    """Threads of a block side by side for so many packs: few of them idle, and many together."""
    widths = (width for width in ACROSS if width <= next_power(count))
    return min(widths, key=lambda width: -(-count // width) * width, default=next_power(count))


def _stored(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """A type of the same size: what is only moved needs no kernel for each type."""
    return np.dtype("float16") if dtype.itemsize == 2 else dtype


def over_lines(
    template: tuple[str, ...],
    seen: Seen,
    channels: int,
    v: int,
    arrays: tuple[Array | None, ...],
    *numbers: int | np.float32,
) -> Array:
    """y (rows, *positions, channels) of a kernel that makes V channels at once."""
    x, over = seen.x, seen.over
    y = cupy.empty((x.shape[0], *over.positions, channels), x.dtype)
    width = over.positions[-1] * channels
    lines = y.size // width
    across = _across(width // v)
    down = THREADS // across
    name, *rest = template
    launch(
        ("windows.cu", name, x.dtype, *rest, v),
        (-(-width // (v * across)), min(MOST_BLOCKS, -(-lines // down))),
        (across, down),
        (x, *arrays, y),
        *(seen.row_step, lines, *numbers, seen.numbers),
    )
    return y
