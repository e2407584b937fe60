"""How parameters follow their gradients: a rule for one parameter, in place.

    state = optimizer.init(parameters)
    optimizer.update(parameters, gradients, state)       # all in place

`parameters`, `gradients` and `state` are flat dicts of arrays, so a state can go into a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, sqrt
from typing import Any, ClassVar

import numpy as np

from nnxp._arrays import Array, is_array, is_floating, owners, xp_of
from nnxp._errors import DtypeMismatch, OptionError, ShapeError
from nnxp.layers._layer import is_real
from nnxp.training._chunks import chunks
from nnxp.training._step import of_step
from nnxp.training.schedules import Rate, rate_at


@dataclass(frozen=True)
class Optimizer:
    """A rule `step(p, g, *state, t)` that changes a parameter p, whose gradient is g, in place.

    `state` names the arrays like p that the rule keeps from step to step, zero at the start; t
    counts the steps from 1. `rate` is a number or a schedule, `decay` the weight decay: decay * p
    is added to the gradient (AdamW and Lion decay p itself). A rule is elementwise, and may not
    change g. Raises OptionError for numbers out of their range.

        class Signs(nnxp.Optimizer):
            def step(self, p, g, *, t):
                p -= self.rate_at(t) * nnxp.get_array_module(g).sign(g)
    """

    state: ClassVar[tuple[str, ...]] = ()
    decoupled: ClassVar[bool] = False
    """Whether the rule itself decays p, apart from its gradient."""

    rate: Rate = 1e-2
    decay: float = 0.0

    def __post_init__(self) -> None:
        self._check_numbers("decay")
        rate_at(self.rate, 0)
        if type(self).step is Optimizer.step:
            raise OptionError(f"{type(self).__name__} has no rule: define step")

    def _check_numbers(self, *names: str, below: float = inf) -> None:
        """Raise OptionError unless these fields are numbers of 0 or more, below a bound."""
        for name in names:
            value: Any = getattr(self, name)
            if not (is_real(value) and 0 <= value < below):
                most = "and finite" if below == inf else f"and below {below:g}"
                raise OptionError(f"{name} is a number, 0 or more, {most}, not {value!r:.60}")

    def step(self, p: Array, g: Array, *state: Array, t: int) -> None:
        """The rule: change p, and the arrays of the state, in place."""
        raise NotImplementedError

    @of_step
    def rate_at(self, t: int) -> float:
        """The learning rate of step t, which is 1 for the first."""
        return rate_at(self.rate, t - 1)

    @of_step
    def _kept(self, t: int) -> float:
        """What decay leaves of a parameter."""
        rate: float = self.rate_at(t)
        return 1 - rate * self.decay

    def init(self, parameters: Mapping[str, Array]) -> dict[str, Array]:
        """The state for the first step: `steps`, and "v.layers.0.weight" and the like."""
        state: dict[str, Array] = {"steps": np.zeros((), "int64")}
        for name, p in parameters.items():
            for own in self.state:
                state[f"{own}.{name}"] = xp_of(p).zeros(p.shape, p.dtype)
        return state

    def update(
        self,
        parameters: Mapping[str, Array],
        gradients: Mapping[str, Array],
        state: Mapping[str, Array],
    ) -> None:
        """One step: parameters and state are changed in place, the gradients are not. What shares
        the array of another parameter is changed once.

        Raises ShapeError for gradients that are not there, or not shaped like their parameters,
        DtypeMismatch for parameters that are no floats, OptionError for those that cannot be
        changed, and for a state that is not of these parameters.
        """
        missing = parameters.keys() - gradients.keys()
        if missing:
            raise ShapeError(f"there are no gradients for {', '.join(sorted(missing))}")
        for name, p in parameters.items():
            self._check_parameter(name, p, gradients[name], state)
        state["steps"][...] += 1
        self.apply(parameters, gradients, state, int(state["steps"]))

    def apply(
        self,
        parameters: Mapping[str, Array],
        gradients: Mapping[str, Array],
        state: Mapping[str, Array],
        t: Any,
    ) -> None:
        """Step t, of arrays that fit each other; `steps` is left as it is."""
        owner_of = owners(parameters)
        for name, p in parameters.items():
            if owner_of[name].name != name:
                continue
            kept = [state[f"{own}.{name}"] for own in self.state]
            for part, g, *own in chunks(p, gradients[name], *kept):
                decays = self.decay and not self.decoupled
                self.step(part, g + self.decay * part if decays else g, *own, t=t)

    def _check_parameter(self, name: str, p: Array, g: Array, state: Mapping[str, Array]) -> None:
        if not (is_array(p) and is_array(g) and is_floating(p.dtype)):
            kinds = [str(getattr(x, "dtype", type(x).__name__)) for x in (p, g)]
            raise DtypeMismatch(
                f"parameters and gradients are arrays of floats, but of {name} {kinds[0]} came "
                f"with {kinds[1]}"
            )
        if p.shape != g.shape:
            raise ShapeError(
                f"{name} is {list(p.shape)}, but its gradient {list(g.shape)}: they would be "
                "broadcast against each other"
            )
        if isinstance(p, np.ndarray) and not p.flags.writeable:
            raise OptionError(f"{name} is changed in place, but may not be written to: p.copy()")
        if not state.keys() >= {"steps", *(f"{own}.{name}" for own in self.state)}:
            raise OptionError(f"the state is not of {name}: optimizer.init(parameters) makes one")


@dataclass(frozen=True)
class SGD(Optimizer):
    """p -= rate * g   [Robbins & Monro 1951]"""

    def step(self, p: Array, g: Array, *state: Array, t: int) -> None:
        p -= self.rate_at(t) * g


@dataclass(frozen=True)
class Momentum(Optimizer):
    """v = momentum * v - rate * g; p += v   [Polyak 1964]"""

    state = ("v",)
    momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.momentum != 1:
            self._check_numbers("momentum", below=1)

    def step(self, p: Array, g: Array, *state: Array, t: int) -> None:
        (v,) = state
        v *= self.momentum
        v -= self.rate_at(t) * g
        p += v


@dataclass(frozen=True)
class Nesterov(Momentum):
    """v = momentum * v - rate * g; p += momentum * v - rate * g   [Nesterov 1983]"""

    def step(self, p: Array, g: Array, *state: Array, t: int) -> None:
        (v,) = state
        move = self.rate_at(t) * g
        v *= self.momentum
        v -= move
        p -= move
        p += self.momentum * v


@dataclass(frozen=True)
class Adagrad(Optimizer):
    """s += g^2; p -= rate * g / (sqrt(s) + eps)   [Duchi, Hazan, Singer 2011]"""

    state = ("s",)
    eps: float = 1e-10

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_numbers("eps")

    def step(self, p: Array, g: Array, *state: Array, t: int) -> None:
        (s,) = state
        s += g * g
        p -= self.rate_at(t) * g / (xp_of(p).sqrt(s) + self.eps)


@dataclass(frozen=True)
class RMSProp(Optimizer):
    """s = beta * s + (1 - beta) * g^2; p -= rate * g / (sqrt(s) + eps)   [Hinton 2012]"""

    state = ("s",)
    rate: Rate = 1e-3
    beta: float = 0.99
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_numbers("beta", below=1)
        self._check_numbers("eps")

    def step(self, p: Array, g: Array, *state: Array, t: int) -> None:
        (s,) = state
        s *= self.beta
        s += (1 - self.beta) * (g * g)
        p -= self.rate_at(t) * g / (xp_of(p).sqrt(s) + self.eps)


@dataclass(frozen=True)
class Adam(Optimizer):
    """m' = m / (1 - beta1^t), s' = s / (1 - beta2^t); p -= rate * m' / (sqrt(s') + eps)

    m = beta1 * m + (1 - beta1) * g, s = beta2 * s + (1 - beta2) * g^2   [Kingma & Ba 2015]. With
    `eps_hat` eps is added to sqrt(s) rather than to sqrt(s'), as in Keras and scikit-learn: the
    last lines of the paper's section 2. m and s are kept without their factors (1 - beta).
    """

    state = ("m", "s")
    rate: Rate = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    eps_hat: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_numbers("beta1", "beta2", below=1)
        self._check_numbers("eps")

    def step(self, p: Array, g: Array, *state: Array, t: int) -> None:
        m, s = state
        xp = xp_of(p)
        m *= self.beta1
        m += g
        move = g * g
        s *= self.beta2
        s += move
        xp.sqrt(s, out=move)
        move += self._added(t)
        xp.divide(m, move, out=move)
        move *= self._factor(t)
        p -= move

    @of_step
    def _added(self, t: int) -> float:
        """eps, for m and s without their factors."""
        corrected = 1.0 if self.eps_hat else sqrt(1 - self.beta2**t)
        return self.eps * corrected / sqrt(1 - self.beta2)

    @of_step
    def _factor(self, t: int) -> float:
        """The rate, for m and s without their factors."""
        corrected = self.rate_at(t) * sqrt(1 - self.beta2**t) / (1 - self.beta1**t)
        return float(corrected * (1 - self.beta1) / sqrt(1 - self.beta2))


@dataclass(frozen=True)
class AdamW(Adam):
    """p *= 1 - rate * decay, and then Adam's step   [Loshchilov & Hutter 2019, arXiv:1711.05101]"""

    decoupled = True
    decay: float = 1e-2

    def step(self, p: Array, g: Array, *state: Array, t: int) -> None:
        if self.decay:
            p *= self._kept(t)
        super().step(p, g, *state, t=t)


@dataclass(frozen=True)
class Lion(Optimizer):
    """p -= rate * (sign(beta1 * m + (1 - beta1) * g) + decay * p); m = beta2 * m + (1 - beta2) * g

    [Chen et al. 2023, arXiv:2302.06675]; its rate is some 3 to 10 times smaller than Adam's.
    """

    state = ("m",)
    decoupled = True
    rate: Rate = 1e-4
    beta1: float = 0.9
    beta2: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_numbers("beta1", "beta2", below=1)

    def step(self, p: Array, g: Array, *state: Array, t: int) -> None:
        (m,) = state
        if self.decay:
            p *= self._kept(t)
        p -= self.rate_at(t) * xp_of(p).sign(m * self.beta1 + g * (1 - self.beta1))
        m *= self.beta2
        m += g * (1 - self.beta2)


def clip_by_norm(gradients: Mapping[str, Array], most: float) -> dict[str, Array]:
    """g * min(1, most / norm), for all gradients g and their norm -> gradients by the same names.

    The norm is that of all of them together. [Pascanu, Mikolov, Bengio 2013]

        loss, gradients = nnxp.value_and_gradients(nnxp.losses.mean_square)(net, x, target)
        gradients = nnxp.clip_by_norm(gradients, 1.0)

    Args:
        gradients: arrays by name, as `value_and_gradients` answers them.
        most: the largest norm, above zero.

    Raises:
        OptionError: `most` is not above zero, or there are no gradients.
    """
    if not gradients:
        raise OptionError("there are no gradients to clip")
    if not (is_real(most) and most > 0):
        raise OptionError(f"gradients are clipped to a norm above zero, not {most!r}")
    xp = xp_of(next(iter(gradients.values())))
    norm = xp.sqrt(sum((g * g).sum() for g in gradients.values()))
    scale = xp.minimum(most / (norm + 1e-12), 1)
    return {name: g * scale for name, g in gradients.items()}
