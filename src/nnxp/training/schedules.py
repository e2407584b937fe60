"""Learning rates that change: functions of the step, from 0 on, as small frozen dataclasses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import cos, inf, pi
from numbers import Real
from typing import Any, TypeAlias

from nnxp._errors import OptionError

Rate: TypeAlias = "float | Callable[[int], float]"
"""A learning rate: a number, or a function of the number of steps that were made before."""


@dataclass(frozen=True)
class Warmup:
    """From 0 up to the rate in `steps` steps, in a straight line, then as `then` has it.

    `then` is a rate; if it is a schedule, its steps begin where the warm-up ends.

        rate = nnxp.schedules.Warmup(20, nnxp.schedules.Cosine(1e-3, steps=200))
    """

    steps: int
    then: Rate

    def __post_init__(self) -> None:
        _check(self, "steps", least=0)
        rate_at(self.then, 0)

    def __call__(self, step: int) -> float:
        if step < self.steps:
            return rate_at(self.then, 0) * (step + 1) / self.steps
        return rate_at(self.then, step - self.steps)


@dataclass(frozen=True)
class _Ramp:
    """From one rate to another in so many steps."""

    rate: float
    steps: int
    last: float = 0.0

    def __post_init__(self) -> None:
        _check(self, "rate", "last", least=0)
        _check(self, "steps")


class Cosine(_Ramp):
    """From `rate` down to `last` in `steps` steps, along half a cosine, and `last` from then on.

    At step t it is last + (rate - last) (1 + cos(pi t / steps)) / 2.

        rate = nnxp.schedules.Cosine(1e-3, steps=200)

    [Loshchilov & Hutter 2017, arXiv:1608.03983, without restarts]
    """

    def __call__(self, step: int) -> float:
        done = min(1.0, step / self.steps)
        return self.last + (self.rate - self.last) * (1 + cos(pi * done)) / 2


class Linear(_Ramp):
    """From `rate` to `last` in `steps` steps, in a straight line, and `last` from then on.

    At step t it is rate + (last - rate) t / steps.

        nnxp.schedules.Linear(1e-2, 100)(50) == 5e-3
    """

    def __call__(self, step: int) -> float:
        return self.rate + (self.last - self.rate) * min(1.0, step / self.steps)


@dataclass(frozen=True)
class Exponential:
    """`rate`, made smaller by the factor `decay` every `steps` steps, smoothly.

    At step t it is rate * decay^(t / steps).

        nnxp.schedules.Exponential(1e-2, 0.5, steps=10)(20) == 2.5e-3
    """

    rate: float
    decay: float
    steps: int = 1

    def __post_init__(self) -> None:
        _check(self, "rate", least=0)
        _check(self, "decay", "steps")

    def __call__(self, step: int) -> float:
        return float(self.rate * self.decay ** (step / self.steps))


@dataclass(frozen=True)
class Steps:
    """`rate`, made smaller by the factor `decay` at once after each of `at` steps.

    At step t it is rate * decay^k, k the number of marks that are not above t.

        rate = nnxp.schedules.Steps(1e-2, at=(100, 150))         # 1e-2, 1e-3, 1e-4
    """

    rate: float
    at: tuple[int, ...]
    decay: float = 0.1

    def __post_init__(self) -> None:
        _check(self, "rate", "decay", least=0)
        if not (isinstance(self.at, tuple | list) and all(isinstance(t, Real) for t in self.at)):
            raise OptionError(f"Steps takes the numbers of steps in at=(...), not {self.at!r:.60}")
        object.__setattr__(self, "at", tuple(self.at))

    def __call__(self, step: int) -> float:
        return float(self.rate * self.decay ** sum(step >= mark for mark in self.at))


@dataclass(frozen=True)
class Plateau:
    """`rate`, made smaller by the factor `decay` when the loss has not fallen for some epochs.

    After more than `patience` epochs in a row whose loss is not below (1 - tolerance) times the
    lowest, down to `least`. The loss is that of the rows to validate by, if `nnxp.fit` has some. It
    is an optimiser's own rate: inside another schedule it is the constant `rate`.

        optimizer = nnxp.SGD(nnxp.schedules.Plateau(0.1, patience=3))
        nnxp.schedules.Plateau(0.1, 1, decay=0.5).after([9.0, 8.0, 8.0, 8.0]) == 0.05

    [as torch.optim.lr_scheduler.ReduceLROnPlateau]
    """

    rate: float
    patience: int = 10
    decay: float = 0.1
    tolerance: float = 1e-4
    least: float = 0.0

    def __post_init__(self) -> None:
        _check(self, "rate", "patience", "decay", "tolerance", "least", least=0)

    def __call__(self, step: int) -> float:
        return self.rate

    def after(self, losses: Sequence[float]) -> float:
        """The rate after epochs with these losses."""
        rate, lowest, waited = self.rate, inf, 0
        for loss in losses:
            if loss < lowest * (1 - self.tolerance):
                lowest, waited = loss, 0
            else:
                waited += 1
            if waited > self.patience:
                rate, waited = max(rate * self.decay, self.least), 0
        return rate


def _check(schedule: Any, *names: str, least: float | None = None) -> None:
    """Raise OptionError unless these are finite numbers, at least so much or else above zero."""
    for name in names:
        value = getattr(schedule, name)
        finite = isinstance(value, Real) and value < inf
        if not (finite and (value > 0 if least is None else value >= least)):
            range_ = "above zero" if least is None else f"{least:g} or more"
            raise OptionError(
                f"{name} of {type(schedule).__name__} is a number, {range_}, not {value!r:.60}"
            )


def rate_at(rate: Rate, step: int) -> float:
    """The rate after so many steps; OptionError unless it is 0 or more, and finite."""
    value: Any = rate(step) if callable(rate) else rate
    finite = isinstance(value, Real)
    if not (finite and 0 <= value < inf):
        raise OptionError(f"a learning rate is 0 or more, not {value!r} at step {step}")
    return float(value)
