"""Losses: how wrong a model's outputs are, as one number to make smaller.

A loss is the mean over rows of a formula of what the model answers and what it should. Those for
classes are computed from the logits, the numbers before the last softmax or sigmoid: a model that
ends in one is met before it, so that no logarithm of a rounded probability is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nnxp import kernels
from nnxp._arrays import Array, is_array, xp_of
from nnxp._errors import OptionError, ShapeError
from nnxp.kernels import Kernel
from nnxp.layers._layer import Layer, is_number, is_real
from nnxp.program import traced
from nnxp.training.differentiate import applied, arrays_in, evaluated


@dataclass(frozen=True)
class Loss:
    """loss(model, x, target, weights=None): the mean over rows of `rows(model(x), target)`.

    x is an array of rows, or a tuple or dict of them for a model with several inputs. With
    `weights`, one for each row, it is the mean weighted by them. The result is an array without
    axes, where the model is. Derive from this class, as a frozen dataclass, and define `rows`; a
    plain function of (model, x, target) will do for all that trains, too.

        class FourthPower(nnxp.losses.Loss):
            def rows(self, y, target):
                return ((y - target) ** 4).mean(axis=1)
    """

    def __call__(self, model: Layer, x: Any, target: Array, weights: Array | None = None) -> Array:
        arrays = (x, target) if weights is None else (x, target, weights)
        for array in arrays[1:]:
            if not is_array(array):
                raise OptionError(
                    f"a loss takes arrays of targets and weights, not {array!r:.60}; "
                    "numpy.asarray makes one of a list"
                )
        flat = [*arrays_in(arrays), *model.parameters().values()]
        if not any(isinstance(array, traced.ndarray) for array in flat):
            return evaluated(self, model, *arrays)
        if not target.shape[0]:
            raise ShapeError("there are no rows: a mean over none is no number")
        y = applied(model, x)
        if not is_array(y):
            raise OptionError(
                f"the model answers {len(y)} results, but {type(self).__name__} is of one: a loss "
                "of your own, (model, x, target) -> number, takes them apart"
            )
        losses = self.rows(y, target)
        if weights is not None and weights.shape != losses.shape:
            raise ShapeError(
                f"weights are one number for each row, {list(losses.shape)}, not "
                f"{list(weights.shape)}"
            )
        own = self.row_weights(target, losses)
        weights = own if weights is None else weights if own is None else weights * own
        if weights is None:
            return losses.mean()
        return (losses * weights).sum() / weights.sum()

    def rows(self, y: Array, target: Array) -> Array:
        """The loss of each row: y (rows, ...), what it should be -> (rows,)."""
        raise NotImplementedError(f"{type(self).__name__} has no formula: define rows")

    def row_weights(self, target: Array, losses: Array) -> Array | None:
        """How much each row counts, (rows,), by what it should be; None for all the same."""
        return None

    def check(self, target: Array, outputs: int | None) -> None:
        """Raise OptionError for targets (rows, ...) that mean nothing to this loss.

        `outputs` is the size of the last axis of what the model answers, None if it is not known.
        `nnxp.fit` has all targets looked at, `nnxp.value_and_gradients` those on the CPU.
        """


ROUNDED_ONE = 1.01
"""What probabilities that are rounded to 16 bits sum to at most."""
_ONE_OUTPUT = (
    "cross_entropy compares the outputs of several classes; with one output it is 0, whatever the "
    "model answers: binary_cross_entropy is for one, or the model needs an output for each class"
)


def _of_rows(x: Array) -> Array:
    """The mean over all axes but the rows'."""
    return x.mean(axis=tuple(range(1, x.ndim))) if x.ndim > 1 else x


def _fitting(target: Array, y: Array) -> Array:
    """The target in the shape and type of y; (rows, 1) is taken for (rows,)."""
    if y.shape != target.shape:
        if y.shape != (*target.shape, 1) and (*y.shape, 1) != target.shape:
            raise ShapeError(
                f"the model answers {list(y.shape)}, but the target is {list(target.shape)}: they "
                "would be broadcast against each other"
            )
        target = target.reshape(y.shape)
    return target.astype(y.dtype) if target.dtype != y.dtype else target


@dataclass(frozen=True)
class MeanSquare(Loss):
    """loss = (y - target)^2, the mean over a row's elements; y and target (rows, ...)."""

    def rows(self, y: Array, target: Array) -> Array:
        return _of_rows(xp_of(y).square(y - _fitting(target, y)))


@dataclass(frozen=True)
class MeanAbsolute(Loss):
    """loss = |y - target|, the mean over a row's elements; y and target (rows, ...)."""

    def rows(self, y: Array, target: Array) -> Array:
        return _of_rows(xp_of(y).absolute(y - _fitting(target, y)))


@dataclass(frozen=True)
class Huber(Loss):
    """d^2 / 2 where |d| <= delta, else delta (|d| - delta / 2), d = y - target   [Huber 1964]"""

    delta: float = 1.0

    def __post_init__(self) -> None:
        if not (is_number(self.delta) and self.delta > 0):
            raise OptionError(f"Huber's delta is above zero, not {self.delta!r}")

    def rows(self, y: Array, target: Array) -> Array:
        size = xp_of(y).absolute(y - _fitting(target, y))
        near = xp_of(y).minimum(size, self.delta)
        return _of_rows(near * (size - near * 0.5))


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """loss = -log(p[label]), p = softmax(logits): of the probability of the right class.

    y (rows, ..., classes); the target are labels (rows, ...), whole numbers from 0, or
    probabilities (rows, ..., classes). A model that ends in softmax or log_softmax is met before
    it. With `smoothing` s the target is (1 - s) of itself and s spread evenly over the classes
    [Szegedy et al. 2016]. With `class_weights`, one for each class, a row counts as much as its
    label's; for labels only. Raises ShapeError for labels that do not fit the logits, OptionError
    for those that no class has, and for what are no probabilities.

        loss = nnxp.losses.CrossEntropy(smoothing=0.1)
    """

    smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not (is_real(self.smoothing) and 0 <= self.smoothing < 1):
            raise OptionError(f"smoothing is at least 0 and below 1, not {self.smoothing!r}")
        weights = self.class_weights
        if weights is None:
            return
        named = isinstance(weights, Mapping | str) or not hasattr(weights, "__iter__")
        weights = () if named else tuple(weights)
        if not (all(is_real(w) and w >= 0 for w in weights) and any(weights)):
            raise OptionError(
                "class_weights are a number of 0 or more for each class, in their order, and not "
                f"all 0, not {self.class_weights!r:.80}"
            )
        object.__setattr__(self, "class_weights", weights)

    def check(self, target: Array, outputs: int | None) -> None:
        if outputs == 1:
            raise OptionError(_ONE_OUTPUT)
        low, high = float(target.min()), float(target.max())
        if target.dtype.kind in "iu":
            if low < 0 or (outputs is not None and high >= outputs):
                most = "" if outputs is None else f", but the model has {outputs} outputs"
                last = "the number of outputs - 1" if outputs is None else f"{outputs - 1}"
                raise OptionError(
                    f"the labels go from {low:.0f} to {high:.0f}{most}: labels are 0 to {last}; "
                    "numpy.unique(y, return_inverse=True)[1] numbers any"
                )
        elif target.dtype.kind != "b" and target.shape[1:] and outputs in (None, target.shape[-1]):
            most_in_all = float(target.sum(axis=-1, dtype="float32").max())
            if not (low >= 0 and high <= 1 and most_in_all <= ROUNDED_ONE):
                raise OptionError(
                    f"the probabilities of the classes go from {low:g} to {high:g} and sum to up "
                    f"to {most_in_all:g}, not to 1; several classes at once are for "
                    "binary_cross_entropy"
                )

    def rows(self, y: Array, target: Array) -> Array:
        if y.shape[-1] == 1:
            raise OptionError(_ONE_OUTPUT)
        if self.class_weights is not None and len(self.class_weights) != y.shape[-1]:
            raise ShapeError(
                f"there are {len(self.class_weights)} class_weights for {y.shape[-1]} classes"
            )
        logits = before(y, (kernels.softmax, kernels.log_softmax), "cross_entropy")
        xp = xp_of(logits)
        logp = kernels.log_softmax(logits)
        if target.dtype.kind in "iu":
            if target.shape != y.shape[:-1]:
                raise ShapeError(
                    f"the labels are {list(target.shape)} for logits {list(y.shape)}; one label "
                    f"for each of {list(y.shape[:-1])} is due, or probabilities, as floats: "
                    "y.argmax(axis=-1) makes labels of ones among zeros, y.ravel() of a column"
                )
            labels = xp.expand_dims(target, -1)
            right = xp.take_along_axis(logp, labels, axis=-1).reshape(target.shape)
        else:
            if target.shape != y.shape:
                raise ShapeError(
                    f"the target is {list(target.shape)} for logits {list(y.shape)}, and no whole "
                    "numbers: labels are those, y.astype('int64'), and probabilities have the "
                    "shape of the logits"
                )
            right = (logp * target.astype(logp.dtype, copy=False)).sum(axis=-1)
        if self.smoothing:
            right = right * (1 - self.smoothing) + logp.mean(axis=-1) * self.smoothing
        return _of_rows(-right)

    def row_weights(self, target: Array, losses: Array) -> Array | None:
        if self.class_weights is None:
            return None
        if target.dtype.kind not in "iu" or target.ndim != 1:
            raise OptionError("class_weights are for one label, a whole number, for each row")
        xp = xp_of(target)
        weights = xp.asarray([float(w) for w in self.class_weights], dtype=losses.dtype)
        return xp.take(weights, target)


@dataclass(frozen=True)
class BinaryCrossEntropy(Loss):
    """-(t log p + (1 - t) log(1 - p)), p = sigmoid(y), t the target: 0, 1, or between.

    As softplus(y) - t y, which overflows nowhere. y and target have one shape; a model that ends in
    sigmoid is met before it. `positive_weight` is how much ones count beside zeros. Raises
    OptionError for other targets.
    """

    positive_weight: float = 1.0

    def __post_init__(self) -> None:
        if not (is_real(self.positive_weight) and self.positive_weight > 0):
            raise OptionError(
                f"positive_weight is a number above zero, not {self.positive_weight!r:.60}"
            )

    def check(self, target: Array, outputs: int | None) -> None:
        low, high = float(target.min()), float(target.max())
        if not (low >= 0 and high <= 1):
            raise OptionError(
                f"targets of binary_cross_entropy are 0, 1, or between, but they go from {low:g} "
                f"to {high:g}"
            )

    def rows(self, y: Array, target: Array) -> Array:
        logits = before(y, (kernels.sigmoid,), "binary_cross_entropy")
        target = _fitting(target, logits)
        if self.positive_weight == 1:
            return _of_rows(kernels.softplus(logits) - target * logits)
        ones = target * kernels.softplus(-logits) * self.positive_weight
        return _of_rows(ones + (1 - target) * kernels.softplus(logits))


def before(y: Array, activations: tuple[Kernel, ...], name: str) -> Array:
    """What the model computed before one of these activations, if it ends in one.

    Arrays that were not written out are taken for logits. Raises OptionError for a model that ends
    in another activation that makes probabilities.
    """
    if not isinstance(y, traced.ndarray) or y.value.step is None:
        return y
    step = y.value.step
    last = step.options.get("activation", step.function)
    if last in activations:
        inputs = [traced.lifted(x) for x in step.inputs]
        if step.function is last:
            return inputs[0]
        return step.function(*inputs, **step.options | {"activation": kernels.identity})  # type: ignore[operator]
    if last in (kernels.softmax, kernels.log_softmax, kernels.sigmoid):
        other = {kernels.sigmoid: "binary_cross_entropy"}.get(last, "cross_entropy")
        raise OptionError(
            f"{name} is not for a model that ends in {last.__name__}: that is {other}'s, or leave "
            "the activation away"
        )
    return y


mean_square = MeanSquare()
mean_absolute = MeanAbsolute()
huber = Huber()
cross_entropy = CrossEntropy()
binary_cross_entropy = BinaryCrossEntropy()

LOSSES: dict[str, Loss] = {
    "mean_square": mean_square,
    "mean_absolute": mean_absolute,
    "huber": huber,
    "cross_entropy": cross_entropy,
    "binary_cross_entropy": binary_cross_entropy,
}
"""The losses by the names that `nnxp.fit` takes."""
