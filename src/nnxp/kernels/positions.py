"""What tells places in a sequence apart, and what looks vectors up by their ids."""

from __future__ import annotations

import numpy as np

from nnxp._arrays import Array, xp_of
from nnxp._errors import IdError, ShapeError
from nnxp.kernels._dispatch import kernel


@kernel
def embedding(ids: Array, weight: Array) -> Array:
    """y = weight[ids]: the vector of each id.

    ids (...), whole numbers of 32 or 64 bits, weight (count, c) -> y (..., c), dtype of weight. An
    id outside of 0 to count - 1 never becomes the vector of another: on the CPU it raises IdError;
    on a device, where looking would be a wait, its vector is NaN.
    """
    xp, count = xp_of(ids), _count(weight)
    y = xp.take(weight, xp.clip(ids, 0, count - 1), axis=0)
    y = xp.where(((ids >= 0) & (ids < count))[..., None], y, np.nan)
    return y.astype(weight.dtype, copy=False)  # bfloat16 and a number of Python's are float64


@embedding.on("numpy")
def embedding_on_the_cpu(ids: Array, weight: Array) -> Array:
    """The rows of weight; the ids are looked at first."""
    count = _count(weight)
    if ids.size and not (ids.min() >= 0 and ids.max() < count):
        wrong = ids[(ids < 0) | (ids >= count)]
        raise IdError(
            f"ids are 0 to {count - 1}, but {wrong.size} of {ids.size} are not, such as {wrong[0]}"
        )
    return weight.take(ids, axis=0)


def _count(weight: Array) -> int:
    if weight.ndim != 2:
        raise ShapeError(f"embedding takes a weight (count, channels), but got {weight.shape}")
    return int(weight.shape[0])


@kernel
def add_positions(x: Array, weight: Array) -> Array:
    """y_t = x_t + weight_t   [Gehring et al. 2017, arXiv:1705.03122]

    x (..., time, c), weight (places, c), of which there are at least as many -> y like x
    """
    return x + weight[: x.shape[-2]]


@kernel
def rotary(x: Array, cos: Array, sin: Array, *, interleaved: bool = False) -> Array:
    """Pairs of channels, turned by the angle of their place   [Su et al. 2021, arXiv:2104.09864]

    (a, b) becomes (a cos - b sin, a sin + b cos). x (..., time, c), cos and sin (time, c / 2) -> y
    like x. Pairs are channels i and i + c / 2, as in GPT-NeoX and Llama; 2 i and 2 i + 1 if
    `interleaved`, as in the paper. Channels beyond those that cos and sin are for stay as they are.
    """
    xp, half = xp_of(x), cos.shape[-1]
    if sin.shape != cos.shape or 2 * half > x.shape[-1]:
        raise ShapeError(
            f"rotary takes cos and sin for at most half of the {x.shape[-1]} channels of x, but "
            f"got {cos.shape} and {sin.shape}"
        )
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
    else:
        a, b = turned[..., :half], turned[..., half:]
    parts = [a * cos - b * sin, a * sin + b * cos]
    if interleaved:
        parts = [xp.stack(parts, axis=-1).reshape(turned.shape)]
    return xp.concatenate([*parts, rest] if rest.shape[-1] else parts, axis=-1)
