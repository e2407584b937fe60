"""Estimators for scikit-learn that nnxp trains: its parameters and attributes, its pipelines.

They start from scikit-learn's initial values and take the rows in its order, so that in float64
they come to the same losses epoch by epoch. scikit-learn itself does the rest: it checks the rows,
numbers the labels, splits and scores. It comes with the extra `sklearn`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf, isfinite
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np

from nnxp._arrays import Array, HostArray, xp_of
from nnxp._errors import OptionError, TrainingError
from nnxp.backend import Backend, asnumpy, get_backend, to_backend
from nnxp.engine import predict
from nnxp.io.sklearn import ACTIVATIONS, class_names_of, column_names_of
from nnxp.layers._layer import Layer
from nnxp.layers.containers import Sequential
from nnxp.layers.dense import Dense
from nnxp.layers.dropout import Dropout
from nnxp.training import losses
from nnxp.training.batches import batches_of
from nnxp.training.optimizers import Adam, Momentum, Nesterov, Optimizer
from nnxp.training.trainer import Trainer

try:
    from scipy.sparse import issparse
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.metrics import accuracy_score, r2_score
    from sklearn.model_selection import train_test_split
    from sklearn.neural_network import MLPClassifier as _Theirs
    from sklearn.preprocessing import LabelBinarizer
    from sklearn.utils import check_random_state, column_or_1d, shuffle
    from sklearn.utils._param_validation import Interval, StrOptions
    from sklearn.utils.class_weight import compute_sample_weight
    from sklearn.utils.metaestimators import available_if
    from sklearn.utils.multiclass import type_of_target, unique_labels
    from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        f'nnxp.sklearn needs scikit-learn from 1.6 on ({error}); pip install "nnxp[sklearn]" '
        "brings it"
    ) from error

__all__ = ["MLPClassifier", "MLPRegressor"]

_ACTIVATIONS = ACTIVATIONS | {"exp": "identity"}
"""scikit-learn's names and ours; of a network that ends in exp, `model_` answers the logarithm."""
_LOSSES = {"identity": "squared_error", "exp": "poisson", "softmax": "log_loss",
           "logistic": "binary_log_loss"}  # fmt: skip


@dataclass(frozen=True)
class _PenalisedLoss:
    """The mean loss of the rows, and alpha / 2 times the squares of all weights by their number.

    `kind` is "squared_error", half of it, summed over the outputs; "poisson", of outputs that are
    logarithms; "log_loss" of whole labels, or "binary_log_loss" summed over the outputs.
    """

    kind: str
    alpha: float
    weights: frozenset[str]

    def __call__(self, model: Layer, x: Array, target: Array, counts: Array | None = None) -> Array:
        y = model(x)
        rows = self._rows(y, target)
        total = rows.shape[0] if counts is None else counts.sum()
        loss = rows.sum() if counts is None else (rows * counts).sum()
        return loss / total + self.penalty(model.parameters()) / total

    def _rows(self, y: Array, target: Array) -> Array:
        if self.kind == "log_loss":
            return losses.cross_entropy.rows(y, target)
        if self.kind == "binary_log_loss":
            return losses.binary_cross_entropy.rows(y, target) * target.shape[1]
        if self.kind == "squared_error":
            return losses.mean_square.rows(y, target) * (target.shape[1] / 2)
        xp = xp_of(y)
        logs = target * xp.log(xp.maximum(target, float(np.finfo(target.dtype).tiny)))
        return (xp.exp(y) - target * y + logs - target).sum(axis=1)

    def penalty(self, parameters: Mapping[str, Array]) -> Any:
        """alpha / 2 times the sum of the squares of all weights"""
        squares: Any = 0.0
        for name in sorted(self.weights) if self.alpha else ():
            squares = squares + (parameters[name] * parameters[name]).sum()
        return squares * (self.alpha / 2)


class _MLP(BaseEstimator):  # type: ignore[misc]
    """What both estimators share: the parameters, the network, and its training."""

    _trainer: Trainer | None
    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **_Theirs._parameter_constraints,
        "loss": [StrOptions({"squared_error", "poisson"})],
        "dropout": [Interval(Real, 0, 1, closed="left")],
    }
    """What scikit-learn checks; `layers` and `device` look at their own."""

    # what the two differ in

    def _targets(
        self, X: Any, y: Any, reset: bool, classes: Any
    ) -> tuple[Any, HostArray, HostArray | None]:
        """(X, y, weights): checked, y numbers (rows,) or (rows, outputs), and by class_weight."""
        raise NotImplementedError

    def _activation_of_outputs(self) -> str:
        """What the network ends in, by scikit-learn's name."""
        raise NotImplementedError

    def _outputs_for(self, y: HostArray) -> int:
        """How many outputs the network has for these targets."""
        raise NotImplementedError

    def _score_of(self, X: Any, y: HostArray, weights: HostArray | None) -> float:
        """The score of a model that is being trained."""
        raise NotImplementedError

    # fitting

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        """Train on rows X (rows, columns) with targets y (rows,) or (rows, outputs) -> self.

        `sample_weight` (rows,) says how much each row counts. Raises OptionError for a parameter
        that means nothing, TrainingError for a loss that is no number, and scikit-learn's
        ValueError for rows or targets that are none.
        """
        return self._fit(X, y, sample_weight, None, incremental=False)

    def _fit(self, X: Any, y: Any, weights: Any, classes: Any, *, incremental: bool) -> Any:
        _check_parameters(self)
        if incremental and self.early_stopping:
            raise OptionError("partial_fit does not support early_stopping=True")
        fresh = not hasattr(self, "model_") or not (self.warm_start or incremental)
        X, y, counts = self._targets(X, y, fresh, classes)
        if weights is not None:
            own = _check_sample_weight(weights, X, dtype=X.dtype)
            counts = own if counts is None else own * counts
        counts = None if counts is None else counts.astype(X.dtype, copy=False)
        self._random_state = check_random_state(self.random_state)
        if fresh:
            self._begin(X.shape[1], self._outputs_for(y), X.dtype)
        trainer = self._trainer if incremental and not fresh else None
        home = get_backend(self.device)
        if trainer is None or trainer.place != home.device:
            trainer = self._trainer = self._new_trainer(home)
            if incremental and not fresh:
                self._restore_optimizer(trainer)
        with home.current():
            if self.solver == "lbfgs":
                self._fit_lbfgs(trainer, X, y, counts)
            else:
                self._fit_by_steps(trainer, X, y, counts, incremental)
        self._take_over(trainer)
        if not np.isfinite(asnumpy(trainer.vector)).all():
            raise TrainingError(
                "training led to parameters that are not finite: rows on a scale of about one "
                "(StandardScaler) or a lower learning_rate_init may help"
            )
        return self

    def _validated(self, X: Any, y: Any, reset: bool, **options: Any) -> tuple[Any, HostArray]:
        """X and y as scikit-learn checks them; sparse rows as CSR."""
        X, y = validate_data(self, X, y, accept_sparse=["csr", "csc"], multi_output=True,
                             dtype=(np.float64, np.float32), reset=reset, **options)  # fmt: skip
        if y.ndim == 2 and y.shape[1] == 1:
            y = column_or_1d(y, warn=True)
        if not reset:  # rows of the other type of float go on in the model's
            X = X.astype(self.model_.dtype, copy=False)
        return X.tocsr() if issparse(X) else X, y

    def _begin(self, columns: int, outputs: int, dtype: Any) -> None:
        """The network with its initial values, and all that a run notes."""
        self.n_iter_ = self.t_ = 0
        self.n_outputs_ = outputs
        self.out_activation_ = self._activation_of_outputs()
        self.model_: Layer = self._network(columns, outputs, np.dtype(dtype))
        self._trainer = None
        if self.solver == "lbfgs":
            return
        self.loss_curve_: list[float] = []
        self._waited = 0
        self.best_loss_ = None if self.early_stopping else inf
        self.validation_scores_: list[float] | None = [] if self.early_stopping else None
        self.best_validation_score_ = -inf if self.early_stopping else None

    def _network(self, columns: int, outputs: int, dtype: np.dtype[Any]) -> Sequential:
        """Layers as asked for, with scikit-learn's initial values."""
        last = _ACTIVATIONS[self.out_activation_]
        about = {"columns": column_names_of(self), "classes": class_names_of(self)}
        if self.layers is not None:
            own = self.layers if isinstance(self.layers, list | tuple) else (self.layers,)
            hidden = Sequential(*own).astype(dtype)
            shape = hidden.output_shape((1, columns))
            if len(shape) != 2:
                raise OptionError(
                    f"layers= answers {shape} for one row, but a Dense layer to {outputs} outputs "
                    "follows, which takes (rows, columns): end it with nnxp.Flatten()"
                )
            return Sequential(*hidden.layers, self._dense(shape[1], outputs, last, dtype), **about)
        sizes = [columns, *_sizes(self.hidden_layer_sizes), outputs]
        layers: list[Layer] = []
        for i, (inputs, units) in enumerate(pairwise(sizes)):
            end = i == len(sizes) - 2
            activation = last if end else _ACTIVATIONS[self.activation]
            layers.append(self._dense(inputs, units, activation, dtype))
            if self.dropout and not end:
                layers.append(Dropout(self.dropout))
        return Sequential(*layers, **about)

    def _dense(self, inputs: int, outputs: int, activation: str, dtype: Any) -> Dense:
        limit = np.sqrt((2.0 if self.activation == "logistic" else 6.0) / (inputs + outputs))
        draw = self._random_state.uniform
        weight = draw(-limit, limit, (inputs, outputs)).astype(dtype)
        return Dense.of(weight, draw(-limit, limit, outputs).astype(dtype), activation)

    def _new_trainer(self, home: Backend) -> Trainer:
        """What trains `model_` there."""
        model = self.model_.to(home)
        parameters = model.parameters()
        held = model._names_in("fixed")
        matrices = frozenset(n for n, p in parameters.items() if p.ndim > 1 and n not in held)
        loss = _PenalisedLoss(_LOSSES[self.out_activation_], float(self.alpha), matrices)
        return Trainer(model, loss, self._optimizer())

    def _restore_optimizer(self, trainer: Trainer) -> None:
        """Go on where a pickled estimator stood, or one whose device has changed."""
        trainer.current, state = self._optimizer_kept
        for name, value in state.items():
            target = trainer.state[name]
            target[...] = value if type(target) is np.ndarray else to_backend(value, self.device)

    def _optimizer(self) -> Optimizer:
        rate = float(self.learning_rate_init)
        if self.solver == "adam":
            return Adam(rate, beta1=float(self.beta_1), beta2=float(self.beta_2),
                        eps=float(self.epsilon), eps_hat=True)  # fmt: skip
        kind = Nesterov if self.nesterovs_momentum else Momentum
        return kind(rate, momentum=float(self.momentum))

    def _take_over(self, trainer: Trainer) -> None:
        """What was learned, in host memory: `model_`, and its arrays under scikit-learn's names."""
        self.model_ = trainer.model_now().map_arrays(lambda _, p: asnumpy(p))
        dense = [layer for _, layer in self.model_.walk() if isinstance(layer, Dense)]
        self.n_layers_ = len(dense) + 1
        self.coefs_ = [layer.weight for layer in dense]
        self.intercepts_ = [layer.bias for layer in dense]
        self._optimizer_kept = trainer.current, {n: asnumpy(a) for n, a in trainer.state.items()}

    # by steps

    def _fit_by_steps(
        self, trainer: Trainer, X: Any, y: HostArray, counts: HostArray | None, incremental: bool
    ) -> None:
        seen = None
        if self.early_stopping:
            X, y, counts, seen = self._split(X, y, counts)
        rows = X.shape[0]
        if self.batch_size != "auto" and self.batch_size > rows:
            message = f"batch_size={self.batch_size} is more than the {rows} rows: it is clipped"
            warnings.warn(message, UserWarning, stacklevel=4)
        batch = min(200 if self.batch_size == "auto" else self.batch_size, rows)
        noise = None
        if self.dropout or self.layers is not None:
            noise = np.random.default_rng(self._random_state.randint(2**31))
        order = np.arange(rows)
        best = None
        self.n_iter_ = 0
        while self.n_iter_ < self.max_iter:
            if self.shuffle:
                order = shuffle(order, random_state=self._random_state)
            self.n_iter_ += 1
            batches = batches_of(order, batch, joined=self.layers is not None)
            total = self._epoch(trainer, (_rows_at(X, y, counts, ids) for ids in batches), noise)
            self.loss_ = total / rows
            self.t_ += rows
            self.loss_curve_.append(self.loss_)
            if self.verbose:
                print(f"Iteration {self.n_iter_}, loss = {self.loss_:.8f}")
            if seen is not None:
                self._take_over(trainer)
                if self._note_score(self._score_of(*seen)):
                    best = trainer.snapshot()
            else:
                self._note_loss()
            if self.solver == "sgd" and self.learning_rate == "invscaling":
                slower = self.learning_rate_init / (self.t_ + 1) ** self.power_t
                trainer.current = replace(trainer.current, rate=slower)
            if self._waited > self.n_iter_no_change and self._stops(trainer):
                break
            if incremental:
                break
        else:
            warnings.warn(
                f"Stochastic Optimizer: Maximum iterations ({self.max_iter}) reached and the "
                "optimization hasn't converged yet.", ConvergenceWarning, stacklevel=4,
            )  # fmt: skip
        if best is not None:
            trainer.restore(best)

    def _epoch(
        self, trainer: Trainer, batches: Iterator[tuple[HostArray, ...]], noise: Any
    ) -> float:
        """The sum over rows of the loss, while the parameters change batch by batch."""
        losses: list[tuple[int, float, Any, Any]] = []
        loss: _PenalisedLoss = trainer.loss  # type: ignore[assignment]
        outputs = self.n_outputs_ if loss.kind == "squared_error" else 1
        for batch in batches:
            count = len(batch[0])
            total = count if len(batch) < 3 else float(batch[2].sum())
            penalty = loss.penalty(trainer.arrays) if outputs > 1 else 0.0
            moved = batch
            if trainer.place != "cpu":
                moved = tuple(to_backend(array, self.device) for array in batch)
            value = trainer.step(moved, noise if noise and trainer.draws(moved) else None)
            losses.append((count, total, value, penalty))
        sums = 0.0
        for count, total, value, penalty in losses:
            shown = float(asnumpy(value))
            if outputs > 1:  # scikit-learn shows the mean over outputs, but descends the sum
                fixed = float(asnumpy(penalty)) / total
                shown = (shown - fixed) / outputs + fixed
            if not total:
                raise TrainingError(
                    f"a batch of {count} rows in epoch {self.n_iter_} counts nothing, as all its "
                    "weights by sample_weight and class_weight are 0: a larger batch_size, "
                    "shuffle=True, or leaving such rows out goes"
                )
            if not isfinite(shown):
                raise TrainingError(
                    f"the loss is {shown} in epoch {self.n_iter_}: rows on a scale of about one "
                    "(StandardScaler) or a lower learning_rate_init may help"
                )
            sums += shown * count
        return sums

    def _split(self, X: Any, y: HostArray, counts: HostArray | None) -> tuple[Any, ...]:
        """Rows to train on, and (rows, targets, weights) to stop by."""
        if not self.validation_fraction:
            raise OptionError("early_stopping needs a validation_fraction above 0")
        stratify = y if hasattr(self, "classes_") and self.n_outputs_ == 1 else None
        parts = [X, y] if counts is None else [X, y, counts]
        parts = train_test_split(*parts, random_state=self._random_state,
                                 test_size=self.validation_fraction, stratify=stratify)  # fmt: skip
        if parts[1].shape[0] < 2:
            raise OptionError(
                f"validation_fraction={self.validation_fraction} of {X.shape[0]} rows are fewer "
                "than two rows: a larger one, or more rows, will do"
            )
        weights = parts[4:] if counts is not None else [None, None]
        return parts[0], parts[2], weights[0], (parts[1], parts[3], weights[1])

    def _note_score(self, score: float) -> bool:
        """Note the score on held-out rows; whether it is the best so far."""
        assert self.validation_scores_ is not None
        assert self.best_validation_score_ is not None
        self.validation_scores_.append(score)
        if self.verbose:
            print(f"Validation score: {score:f}")
        worse = score < self.best_validation_score_ + self.tol
        self._waited = self._waited + 1 if worse else 0
        if score > self.best_validation_score_:
            self.best_validation_score_ = score
            return True
        return False

    def _note_loss(self) -> None:
        assert self.best_loss_ is not None
        worse = self.loss_ > self.best_loss_ - self.tol
        self._waited = self._waited + 1 if worse else 0
        self.best_loss_ = min(self.best_loss_, self.loss_)

    def _stops(self, trainer: Trainer) -> bool:
        """Stop, or with learning_rate="adaptive" go on with a fifth of the rate."""
        what = "Validation score" if self.early_stopping else "Training loss"
        message = (f"{what} did not improve more than tol={self.tol:f} for {self.n_iter_no_change} "
                "consecutive epochs.")  # fmt: skip
        adaptive = self.solver == "sgd" and self.learning_rate == "adaptive"
        rate: Any = trainer.current.rate
        if adaptive and rate > 1e-6:
            trainer.current = replace(trainer.current, rate=rate / 5)
            self._waited = 0
            if self.verbose:
                print(f"{message} Setting learning rate to {rate / 5:f}")
            return False
        if self.verbose:
            print(f"{message}{' Learning rate too small.' if adaptive else ''} Stopping.")
        return True

    # by L-BFGS

    def _fit_lbfgs(self, trainer: Trainer, X: Any, y: HostArray, counts: HostArray | None) -> None:
        """All rows at once, by scipy's L-BFGS-B   [Byrd, Lu, Nocedal, Zhu 1995]"""
        from scipy.optimize import minimize

        arrays = _rows_at(X, y, counts, np.arange(X.shape[0]))
        if trainer.place != "cpu":
            arrays = tuple(to_backend(array, self.device) for array in arrays)
        noise = self._random_state.randint(2**31) if trainer.draws(arrays) else 0

        def loss_and_slopes(vector: HostArray) -> tuple[float, HostArray]:
            v: Any = vector.astype(trainer.vector.dtype)
            trainer.vector[...] = v if trainer.place == "cpu" else to_backend(v, self.device)
            loss = trainer.slope(arrays, np.random.default_rng(noise))
            return float(asnumpy(loss)), asnumpy(trainer.slopes).astype("float64")

        minimum = minimize(
            loss_and_slopes, asnumpy(trainer.vector).astype("float64"), method="L-BFGS-B",
            jac=True, options={"maxfun": self.max_fun, "maxiter": self.max_iter, "gtol": self.tol},
        )  # fmt: skip
        self.loss_, self.n_iter_ = float(minimum.fun), min(minimum.nit, self.max_iter)
        if minimum.status:
            warnings.warn(
                f"lbfgs failed to converge after {minimum.nit} iteration(s): {minimum.message}",
                ConvergenceWarning, stacklevel=4,
            )  # fmt: skip
        loss_and_slopes(minimum.x)

    # answering

    def _forward(self, X: Any) -> HostArray:
        """What the network answers for rows that were checked, (rows, outputs)."""
        y: HostArray = predict(self.model_, _DenseRows(X) if issparse(X) else X, self.device)
        return np.exp(y) if self.out_activation_ == "exp" else y

    def _checked(self, X: Any) -> Any:
        check_is_fitted(self)
        X = validate_data(self, X, accept_sparse=["csr", "csc"], reset=False,
                          dtype=(np.float64, np.float32))  # fmt: skip
        return X.tocsr() if issparse(X) else X

    # what scikit-learn asks

    def _check_solver(self) -> bool:
        if self.solver == "lbfgs":
            raise AttributeError("partial_fit goes by steps, which solver='lbfgs' does not")
        return True

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        state.pop("_trainer", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._trainer = None

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "coefs_")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags


class MLPClassifier(ClassifierMixin, _MLP):  # type: ignore[misc]
    """scikit-learn's MLPClassifier, trained by nnxp: on a GPU, and with layers of any kind.

        classifier = nnxp.sklearn.MLPClassifier((64,), max_iter=300, random_state=0)
        classifier.fit(X, labels).predict_proba(X)          # (rows, classes)
        nnxp.save(classifier.model_, "model.safetensors")

    It takes scikit-learn's parameters and has its fitted attributes (`coefs_`, `intercepts_`,
    `classes_`, `loss_curve_`, `n_iter_`, ...) [scikit-learn 1.9, sklearn.neural_network], and
    `model_`, the network as an nnxp layer, which knows the names of its columns and classes.
    `predict` (rows,) answers labels, `predict_proba` (rows, classes) probabilities. With the same
    `random_state` it starts from the same values and takes the rows in the same order; it trains
    in float64 for rows of float64. Beyond scikit-learn's parameters:

    device        where it trains and predicts, as for nnxp.get_backend; "auto" is a GPU if there is
                  one. The fitted attributes are in host memory
    class_weight  "balanced", or how much each class counts, as a dict
    dropout       the part of the hidden units that a step drops
    layers        nnxp layers, one or a list, in place of hidden_layer_sizes and activation; the
                  last product to the outputs is added. alpha then is for all their matrices

    Raises OptionError for a parameter that means nothing, TrainingError for a loss that is no
    number any more.
    """

    def __init__(
        self, hidden_layer_sizes: Any = (100,), activation: str = "relu", *,
        solver: str = "adam", alpha: float = 0.0001, batch_size: Any = "auto",
        learning_rate: str = "constant", learning_rate_init: float = 0.001, power_t: float = 0.5,
        max_iter: int = 200, shuffle: bool = True, random_state: Any = None, tol: float = 1e-4,
        verbose: bool = False, warm_start: bool = False, momentum: float = 0.9,
        nesterovs_momentum: bool = True, early_stopping: bool = False,
        validation_fraction: float = 0.1, beta_1: float = 0.9, beta_2: float = 0.999,
        epsilon: float = 1e-8, n_iter_no_change: float = 10, max_fun: int = 15000,
        device: str = "auto", class_weight: Any = None, dropout: float = 0.0, layers: Any = None,
    ) -> None:  # fmt: skip
        _set_parameters(self, locals())

    def _targets(
        self, X: Any, y: Any, reset: bool, classes: Any
    ) -> tuple[Any, HostArray, HostArray | None]:
        X, y = self._validated(X, y, reset)
        if reset:
            several = type_of_target(y).startswith("multilabel")
            self._label_binarizer = LabelBinarizer().fit(
                y if classes is None or several else np.asarray(classes)
            )
            self.classes_ = self._label_binarizer.classes_
        elif classes is not None and not np.array_equal(np.unique(classes), self.classes_):
            raise OptionError(
                f"classes={classes!r:.60} are not those of the first call, {self.classes_!r:.60}"
            )
        labels, known = set(unique_labels(y).tolist()), set(self.classes_.tolist())
        if self.warm_start and not reset and labels != known:
            raise OptionError(
                "warm_start can only be used where `y` has the same classes as in the previous "
                f"call to fit: {sorted(known)}, not {sorted(labels)}"
            )
        if not labels <= known:
            raise OptionError(f"y has classes that were not there before: {sorted(labels - known)}")
        weights = None
        if self.class_weight is not None:
            try:
                weights = compute_sample_weight(self.class_weight, y)
            except (ValueError, TypeError) as error:
                raise OptionError(
                    f'class_weight is "balanced", or a dict of classes and numbers: {error}'
                ) from error
            if not weights.min() >= 0:
                raise OptionError(f"class_weight has numbers of 0 or more, not {weights.min()}")
        if self._activation_of_outputs() == "softmax":
            return X, np.searchsorted(self.classes_, y), weights
        return X, self._label_binarizer.transform(y).astype(X.dtype), weights

    def _activation_of_outputs(self) -> str:
        return "softmax" if self._label_binarizer.y_type_ == "multiclass" else "logistic"

    def _outputs_for(self, y: HostArray) -> int:
        return len(self.classes_) if y.ndim == 1 else y.shape[1]

    def _score_of(self, X: Any, y: HostArray, weights: HostArray | None) -> float:
        truth = self.classes_[y] if y.ndim == 1 else self._label_binarizer.inverse_transform(y)
        score = accuracy_score(truth, self._labels_of(self._forward(X)), sample_weight=weights)
        return float(score)

    def _labels_of(self, y: HostArray) -> HostArray:
        labels: HostArray = self._label_binarizer.inverse_transform(
            y.ravel() if self.n_outputs_ == 1 else y
        )
        return labels

    def predict(self, X: Any) -> HostArray:
        """The label of each row, (rows,), or for several labels a row (rows, classes)."""
        return self._labels_of(self._forward(self._checked(X)))

    def predict_proba(self, X: Any) -> HostArray:
        """The probability of each class, (rows, classes), in the order of `classes_`."""
        y = self._forward(self._checked(X))
        return np.concatenate([1 - y, y], axis=1) if self.n_outputs_ == 1 else y

    def predict_log_proba(self, X: Any) -> HostArray:
        """The logarithms of `predict_proba`, (rows, classes)."""
        y = self.predict_proba(X)
        with np.errstate(divide="ignore"):
            return np.log(y, out=y)

    @available_if(lambda self: self._check_solver())  # type: ignore[untyped-decorator]
    def partial_fit(
        self, X: Any, y: Any, sample_weight: Any = None, classes: Any = None
    ) -> MLPClassifier:
        """One epoch over these rows, from where it stands -> self.

        Block by block, rows of any number go through it. `classes` are all that there will be; the
        first call needs them. Raises OptionError for a first call without, or for other classes.
        """
        if classes is None and not hasattr(self, "classes_"):
            raise OptionError(
                "the first call of partial_fit needs classes=, all that there will be"
            )
        self._fit(X, y, sample_weight, classes, incremental=True)
        return self

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


class MLPRegressor(RegressorMixin, _MLP):  # type: ignore[misc]
    """scikit-learn's MLPRegressor, trained by nnxp: on a GPU, and with layers of any kind.

        regressor = nnxp.sklearn.MLPRegressor((64,), max_iter=300, random_state=0)
        regressor.fit(X, y).predict(X)                      # (rows,), or (rows, outputs)

    It takes scikit-learn's parameters and has its fitted attributes [scikit-learn 1.9,
    sklearn.neural_network]; `model_`, `device`, `dropout` and `layers` are as in MLPClassifier.
    With loss="poisson" it predicts exp of what `model_` answers.

    Raises OptionError for a parameter that means nothing, TrainingError for a loss that is no
    number any more.
    """

    def __init__(
        self, loss: str = "squared_error", hidden_layer_sizes: Any = (100,),
        activation: str = "relu", *,
        solver: str = "adam", alpha: float = 0.0001, batch_size: Any = "auto",
        learning_rate: str = "constant", learning_rate_init: float = 0.001, power_t: float = 0.5,
        max_iter: int = 200, shuffle: bool = True, random_state: Any = None, tol: float = 1e-4,
        verbose: bool = False, warm_start: bool = False, momentum: float = 0.9,
        nesterovs_momentum: bool = True, early_stopping: bool = False,
        validation_fraction: float = 0.1, beta_1: float = 0.9, beta_2: float = 0.999,
        epsilon: float = 1e-8, n_iter_no_change: float = 10, max_fun: int = 15000,
        device: str = "auto", dropout: float = 0.0, layers: Any = None,
    ) -> None:  # fmt: skip
        _set_parameters(self, locals())

    def _targets(
        self, X: Any, y: Any, reset: bool, classes: Any
    ) -> tuple[Any, HostArray, HostArray | None]:
        X, y = self._validated(X, y, reset, y_numeric=True)
        if self.loss == "poisson" and (y < 0).any():
            raise OptionError(f'loss="poisson" is for targets from 0 on, not {y.min()}')
        y = y.reshape(len(y), -1).astype(X.dtype, copy=False)
        if not reset and y.shape[1] != self.n_outputs_:
            raise OptionError(f"y has {y.shape[1]} columns, but {self.n_outputs_} before")
        return X, y, None

    def _activation_of_outputs(self) -> str:
        return "exp" if self.loss == "poisson" else "identity"

    def _outputs_for(self, y: HostArray) -> int:
        return int(y.shape[1])

    def _score_of(self, X: Any, y: HostArray, weights: HostArray | None) -> float:
        return float(r2_score(y, self._forward(X), sample_weight=weights))

    def predict(self, X: Any) -> HostArray:
        """What the network answers for each row, (rows,), or (rows, outputs) for several."""
        y = self._forward(self._checked(X))
        return y.ravel() if y.shape[1] == 1 else y

    @available_if(lambda self: self._check_solver())  # type: ignore[untyped-decorator]
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> MLPRegressor:
        """One epoch over these rows, from where it stands -> self.

        Block by block, rows of any number go through it.
        """
        self._fit(X, y, sample_weight, None, incremental=True)
        return self


# rows


class _DenseRows:
    """The rows of a sparse matrix, which are dense where they are read."""

    def __init__(self, matrix: Any) -> None:
        self.shape, self.dtype, self._matrix = matrix.shape, matrix.dtype, matrix

    def __getitem__(self, rows: slice) -> HostArray:
        dense: HostArray = self._matrix[rows].toarray()
        return dense


def _rows_at(
    X: Any, y: HostArray, counts: HostArray | None, ids: HostArray
) -> tuple[HostArray, ...]:
    """(rows, targets) or (rows, targets, counts), dense."""
    x = X[ids].toarray() if issparse(X) else X[ids]
    return (x, y[ids]) if counts is None else (x, y[ids], counts[ids])


# parameters


def _sizes(hidden: Any) -> list[int]:
    """hidden_layer_sizes as a list of numbers above zero."""
    sizes: list[Any] = list(hidden) if hasattr(hidden, "__iter__") else [hidden]
    whole = all(isinstance(n, Integral) and int(n) > 0 for n in sizes)
    if not whole or any(isinstance(n, bool) for n in sizes):
        raise OptionError(f"hidden_layer_sizes must be > 0, whole numbers, got {hidden!r:.60}")
    return [int(n) for n in sizes]


def _set_parameters(estimator: _MLP, arguments: dict[str, Any]) -> None:
    """Every argument of `__init__` as an attribute of its name, which is all it may do."""
    estimator.__dict__.update({k: v for k, v in arguments.items() if k != "self"})


def _check_parameters(estimator: _MLP) -> None:
    """Raise OptionError for a parameter that means nothing, as scikit-learn does."""
    try:
        estimator._validate_params()
    except ValueError as error:
        raise OptionError(str(error)) from None
    _sizes(estimator.hidden_layer_sizes)
