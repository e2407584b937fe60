"""Networks and linear models that scikit-learn has trained, as nnxp models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnxp._arrays import HostArray, float_dtype
from nnxp._errors import ConversionError
from nnxp.layers._layer import Layer
from nnxp.layers.columns import Clip, Take
from nnxp.layers.containers import Sequential
from nnxp.layers.dense import Dense
from nnxp.layers.norm import RMSNorm, Standardize

LOST = 2**-12
"""The most of its scale that a column's values may lose by rounding before they are centred."""

ACTIVATIONS = {
    "identity": "identity",
    "logistic": "sigmoid",
    "relu": "relu",
    "softmax": "softmax",
    "tanh": "tanh",
}
"""scikit-learn's names and ours."""

# scikit-learn's classes by what they do. The very classes: a subclass may do it in another way.
_NETWORKS = "MLPClassifier MLPRegressor".split()
_REGRESSORS = """ARDRegression BayesianRidge ElasticNet ElasticNetCV HuberRegressor Lars
    LarsCV Lasso LassoCV LassoLars LassoLarsCV LassoLarsIC LinearRegression LinearSVR
    MultiTaskElasticNet MultiTaskElasticNetCV MultiTaskLasso MultiTaskLassoCV
    OrthogonalMatchingPursuit OrthogonalMatchingPursuitCV PassiveAggressiveRegressor
    QuantileRegressor Ridge RidgeCV SGDRegressor TheilSenRegressor""".split()
_CLASSIFIERS = """LinearSVC LogisticRegression LogisticRegressionCV PassiveAggressiveClassifier
    Perceptron RidgeClassifier RidgeClassifierCV SGDClassifier""".split()
_SCALERS = "MaxAbsScaler MinMaxScaler RobustScaler StandardScaler".split()
_PROJECTIONS = "IncrementalPCA PCA TruncatedSVD".split()
_SELECTORS = """GenericUnivariateSelect RFE RFECV SelectFdr SelectFpr SelectFromModel SelectFwe
    SelectKBest SelectPercentile SequentialFeatureSelector VarianceThreshold""".split()
_TRANSFORMERS = [*_SCALERS, "Normalizer", *_PROJECTIONS, *_SELECTORS]
_TARGET = "TransformedTargetRegressor"
_PREDICTORS = [*_NETWORKS, *_REGRESSORS, *_CLASSIFIERS, _TARGET]


def from_sklearn(estimator: Any, dtype: object = "float32") -> Sequential:
    """The model that computes what a fitted scikit-learn estimator predicts.

    It answers what `predict` does, in the same shape, and of a classifier what `predict_proba`
    does, or `decision_function` where there are no probabilities. It keeps `feature_names_in_` as
    `model.columns`, by which tables are put in order, and `classes_` as `model.classes`, unless a
    row may have several labels:

        labels = numpy.take(model.classes, nnxp.predict(model, x).argmax(axis=1))

    Args:
        estimator: a network (MLPClassifier, MLPRegressor), a linear model (LinearRegression, Ridge,
            Lasso and their like, LogisticRegression, LinearSVC, SGDClassifier, ...), a
            TransformedTargetRegressor over one of them, or a Pipeline that ends in one, after
            scalers (Standard, MinMax, MaxAbs, Robust), PCA, TruncatedSVD, a Normalizer, or
            selections of columns.
        dtype: of the parameters. scikit-learn computes in float64 unless it was given float32;
            "float64" comes closest. Scalers and PCA that come first see float64 rows as they are
            in any case: they are rounded to `dtype` when their mean has been subtracted.

    Raises:
        ConversionError: it is another estimator or step, with what to do instead; it is not fitted;
            `dtype` cannot hold its parameters; or a scaler between layers, or of the target, has a
            mean so far above the scale that `dtype` would lose more than 1/4096 of it.
    """
    steps = list(_steps(estimator))
    if not steps:
        raise ConversionError(f"{estimator!r:.100} is empty; {_WANTED}")
    *before, last = steps
    model = _Model(float_dtype(dtype))
    for step in before:
        _transform(model, step)
    _predict(model, last)
    columns = column_names_of(estimator, steps[0].estimator)
    return model.finished(columns, class_names_of(last.estimator))


_WANTED = (
    "from_sklearn takes a fitted network (MLPClassifier, MLPRegressor), a linear model, or a "
    "Pipeline that ends in one, after scalers, PCA and selections of columns"
)


@dataclass
class _Step:
    """An estimator, where it is, and its place in the pipeline, if that is the outermost one."""

    path: str
    estimator: Any
    place: int | None

    @property
    def name(self) -> str:
        """The name of its class, "" if that is neither scikit-learn's own nor ours."""
        cls = type(self.estimator)
        own = cls.__module__.startswith("sklearn.") or cls.__module__ == "nnxp.sklearn"
        return cls.__name__ if own else ""

    def __str__(self) -> str:
        return f"{self.path}{type(self.estimator).__name__}"

    def array(self, name: str) -> HostArray:
        """A fitted attribute in float64."""
        value = getattr(self.estimator, name)
        return np.array(value.toarray() if hasattr(value, "toarray") else value, "float64")


def _steps(estimator: Any, path: str = "", place: int | None = None) -> Iterator[_Step]:
    """The steps of a pipeline, one that is no pipeline itself after the other."""
    step = _Step(path, estimator, place)
    if step.name == "Pipeline":
        for i, (name, inner) in enumerate(estimator.steps):
            yield from _steps(inner, f"{path}step {name!r}, ", None if path else i)
    elif not (estimator is None or (isinstance(estimator, str) and estimator == "passthrough")):
        yield step


class _Model:
    """A model that grows step by step, in float64 until it is finished.

    What is done to each column alone before anything else is one Standardize of all columns, which
    rows meet in their own type, and one Take.
    """

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype, self.layers = dtype, list[Layer]()
        self._names: dict[int, str] = {}
        self._first: tuple[HostArray, HostArray, HostArray] | None = None  # taken, mean, scale

    def standardize(self, step: _Step, mean: HostArray, scale: HostArray) -> None:
        """(x - mean) / scale"""
        if not np.all(np.abs(scale) > 0):
            raise ConversionError(f"{step}: the scale has zeros; a column that never changes has 1")
        if self.layers:
            _refuse_loss(step, mean, scale, self.dtype)
            self.layers.append(Standardize(mean, scale))
            return
        taken, first_mean, first_scale = self._columns(step)
        first_mean[taken] += first_scale[taken] * mean
        first_scale[taken] *= scale

    def take(self, step: _Step, indices: HostArray) -> None:
        """Some of the columns."""
        if self.layers:
            self.layers.append(Take(tuple(indices.tolist())))
            return
        taken, *others = self._columns(step)
        self._first = taken[indices], *others  # type: ignore[assignment]

    def dense(self, step: _Step, names: str, weight: HostArray, bias: Any, activation: str) -> None:
        """activation(x @ weight + bias), of parameters that are called so in the estimator"""
        self._begin()
        bias = np.broadcast_to(np.asarray(bias, "float64"), weight.shape[1:]).copy()
        layer = Dense.of(weight, bias, activation)
        self._names[len(self.layers)] = f"{step.path}{names}"
        self.layers.append(layer)

    def append(self, layer: Layer) -> None:
        self._begin()
        self.layers.append(layer)

    def _columns(self, step: _Step) -> tuple[HostArray, HostArray, HostArray]:
        if self._first is None:
            width = step.estimator.n_features_in_
            self._first = np.arange(width), np.zeros(width), np.ones(width)
        return self._first

    def _begin(self) -> None:
        """What is done to the columns first, as layers."""
        if self.layers or self._first is None:
            return
        taken, mean, scale = self._first
        if mean.any() or (scale != 1).any():
            self.layers.append(Standardize(mean, scale))
        if len(taken) < len(mean):
            self.layers.append(Take(tuple(taken.tolist())))

    def finished(self, columns: Any, classes: Any) -> Sequential:
        """All of it in the type that was asked for."""

        def stored(name: str, value: HostArray) -> HostArray:
            if name in ("mean", "scale"):
                return value  # a Standardize keeps them in float64
            return _stored(f"{who}: {name}", value, self.dtype)

        layers = []
        for i, layer in enumerate(self.layers):
            who = self._names.get(i, repr(layer))
            layers.append(layer.map_arrays(stored))
        return Sequential(*layers, columns=columns, classes=classes)


# steps that transform


def _transform(model: _Model, step: _Step) -> None:
    """What the step does to the rows, added to the model."""
    if step.name not in _TRANSFORMERS:
        raise ConversionError(f"{step} has no counterpart{_advice(step)}")
    _fitted(step)
    if step.name in _SCALERS:
        model.standardize(step, *_scaling(step, model.dtype))
        if getattr(step.estimator, "clip", False):
            low, high = step.estimator.feature_range
            model.append(Clip(float(low), float(high)))
    elif step.name in _SELECTORS:
        model.take(step, np.flatnonzero(step.estimator.get_support()))
    elif step.name in _PROJECTIONS:
        _project(model, step)
    else:
        _normalize(model, step)


def _scaling(step: _Step, dtype: np.dtype[Any]) -> tuple[HostArray, HostArray]:
    """(mean, scale) of a scaler that answers (x - mean) / scale."""
    scaler, size = step.estimator, step.estimator.n_features_in_
    zeros, ones = np.zeros(size), np.ones(size)
    match step.name:
        case "StandardScaler":
            if scaler.with_std and not scaler.with_mean and scaler.mean_ is not None:
                _refuse_loss(step, step.array("mean_"), step.array("scale_"), dtype)
            return (
                step.array("mean_") if scaler.with_mean else zeros,
                step.array("scale_") if scaler.with_std else ones,
            )
        case "RobustScaler":
            return (
                step.array("center_") if scaler.with_centering else zeros,
                step.array("scale_") if scaler.with_scaling else ones,
            )
        case "MaxAbsScaler":
            return zeros, step.array("scale_")
    scale = 1 / step.array("scale_")  # of a MinMaxScaler, which answers x * scale_ + min_
    return -step.array("min_") * scale, scale


def _project(model: _Model, step: _Step) -> None:
    """(x - mean) @ components, each in units of its spread if it is whitened"""
    weight = step.array("components_").T
    mean = step.array("mean_") if step.name != "TruncatedSVD" else np.zeros(len(weight))
    if getattr(step.estimator, "whiten", False):
        spread = np.sqrt(step.array("explained_variance_"))
        weight = weight / np.maximum(spread, np.finfo("float64").eps)
    bias: Any = 0.0
    if model.layers:
        bias = -(mean @ weight)
    else:
        model.standardize(step, mean, np.ones(len(mean)))
    model.dense(step, "components_", weight, bias, "identity")


def _normalize(model: _Model, step: _Step) -> None:
    """x / sqrt(sum(x²)) is a root mean square norm with another gain."""
    if step.estimator.norm != "l2":
        raise ConversionError(
            f"{step} with norm={step.estimator.norm!r} has no counterpart{_advice(step)}"
        )
    size = step.estimator.n_features_in_
    eps = 1e-300 if model.dtype == np.float64 else 1e-30  # so that rows of zeros stay zeros
    model.append(RMSNorm.of(np.full(size, size**-0.5), eps))


# steps that predict


def _predict(model: _Model, step: _Step) -> None:
    """What the last step predicts of the rows, added to the model."""
    if step.name in _TRANSFORMERS:
        raise ConversionError(f"{step} predicts nothing; {_WANTED}")
    if step.name not in _PREDICTORS:
        search = hasattr(step.estimator, "best_estimator_")
        more = "; its best_estimator_ may be one" if search else ""
        raise ConversionError(f"{step} has no counterpart; {_WANTED}{more}")
    if step.name == _TARGET:
        _predict_transformed(model, step)
        return
    _fitted(step)
    if step.name in _NETWORKS:
        _network(model, step)
    elif step.name in _REGRESSORS:
        _linear(model, step)
    else:
        _classifier(model, step)


def _network(model: _Model, step: _Step) -> None:
    """activation(x @ coefs[i] + intercepts[i]), one after the other"""
    network = step.estimator
    *hidden, last = zip(network.coefs_, network.intercepts_, strict=True)
    if getattr(network, "layers", None) is not None:  # one of ours, with layers of any kind
        hidden = []
        for layer in network.model_.layers[:-1]:
            model.append(layer)
    output = network.out_activation_
    if output == "logistic" and network.n_outputs_ == 1:
        last, output = _two_columns(*last), "softmax"
    names = [network.activation] * len(hidden) + [output]
    for i, ((weight, bias), name) in enumerate(zip([*hidden, last], names, strict=True)):
        if name not in ACTIVATIONS:
            raise ConversionError(
                f"{step} has the activation {name!r}, which has no "
                f"counterpart; these have: {', '.join(ACTIVATIONS)}"
            )
        wide = np.array(weight, "float64")
        model.dense(step, f"coefs_[{i}]", wide, bias, ACTIVATIONS[name])
    if step.name == "MLPRegressor" and network.n_outputs_ == 1:
        model.append(Take(0))


def _linear(model: _Model, step: _Step) -> None:
    """x @ coef + intercept, (rows,) where coef is a vector"""
    coef = step.array("coef_")
    model.dense(step, "coef_", np.atleast_2d(coef).T, step.estimator.intercept_, "identity")
    if coef.ndim == 1:
        model.append(Take(0))


def _classifier(model: _Model, step: _Step) -> None:
    """Probabilities where the classifier gives some, else its decision, (rows,) for two classes."""
    classifier, coef = step.estimator, np.atleast_2d(step.array("coef_"))
    weight, bias = coef.T, step.array("intercept_")
    if step.name.startswith("LogisticRegression"):
        old = getattr(classifier, "multi_class", "auto") not in ("auto", "deprecated")
        if old or (classifier.solver == "liblinear" and len(coef) > 1):
            raise ConversionError(
                f"{step} fits one class against the rest, or was told how by multi_class=, which "
                "has no counterpart; fit it anew without"
            )
        probable = True
    else:
        probable = step.name == "SGDClassifier" and classifier.loss == "log_loss"
        if step.name == "SGDClassifier" and (
            classifier.loss == "modified_huber" or (probable and len(coef) > 1)
        ):
            raise ConversionError(
                f"{step} makes probabilities with loss={classifier.loss!r} in a way that has no "
                "counterpart; LogisticRegression has one"
            )
    if probable and len(coef) == 1:
        weight, bias = _two_columns(weight, bias)
    model.dense(step, "coef_", weight, bias, "softmax" if probable else "identity")
    if weight.shape[1] == 1:
        model.append(Take(0))


def _predict_transformed(model: _Model, step: _Step) -> None:
    """Of a regressor y * scale + mean, in the weights of its last product"""
    target = step.estimator
    _fitted(step, "regressor_")
    *before, last = _steps(target.regressor_, f"{step.path}regressor_, ")
    for inner in before:
        _transform(model, inner)
    _predict(model, last)
    scaler = _Step(f"{step.path}transformer_, ", target.transformer_, None)
    mean, scale = _target_scaling(scaler, model)
    if isinstance(model.layers[-1], Take):
        model.layers.pop()
    product = model.layers[-1]
    weight, bias = np.asarray(product.weight), np.asarray(product.bias)  # type: ignore[attr-defined]
    model.layers[-1] = Dense.of(weight * scale, bias * scale + mean)
    if target._training_dim == 1:
        model.append(Take(0))


def _target_scaling(step: _Step, model: _Model) -> tuple[Any, Any]:
    """(mean, scale) of what was done to a target: (y - mean) / scale"""
    if step.name == "FunctionTransformer" and step.estimator.inverse_func is None:
        return 0.0, 1.0
    if step.name not in _SCALERS:
        raise ConversionError(
            f"{step} has no counterpart; convert the regressor_, and give what the model predicts "
            "to transformer_.inverse_transform"
        )
    mean, scale = _scaling(step, model.dtype)
    _refuse_loss(step, mean, scale, model.dtype)
    return mean, scale


def _two_columns(weight: Any, bias: Any) -> tuple[Any, Any]:
    """What turns the one output z of a binary classifier into (0, z), for a softmax.

    softmax(0, z) is (1 - sigmoid(z), sigmoid(z)), with both small values right: where sigmoid(z)
    rounds to 1 the first column is still exp(-z), which 1 - sigmoid(z) has lost.
    """
    return np.pad(weight, [(0, 0), (1, 0)]), np.pad(np.atleast_1d(bias), (1, 0))


# what is asked of all


def _fitted(step: _Step, attribute: str = "n_features_in_") -> None:
    if not hasattr(step.estimator, attribute):
        raise ConversionError(f"{step} is not fitted; call its fit(X, y) first")


def _advice(step: _Step) -> str:
    """How rows still come to a model that begins behind the step."""
    if step.place is None:
        return "; transform the rows with it first, and convert what follows it"
    after = step.place + 1
    return (
        f"; transform the rows with it first, pipeline[:{after}].transform(x), and convert "
        f"what follows, from_sklearn(pipeline[{after}:])"
    )


def _refuse_loss(step: _Step, mean: HostArray, scale: HostArray, dtype: np.dtype[Any]) -> None:
    """Refuse a mean so large that numbers of this type around it have lost what they differ by."""
    # Of 16-bit types nobody expects more than a few digits, wherever the mean lies.
    lost = np.abs(mean / scale) * (np.finfo(dtype).eps / 2 if dtype.itemsize > 2 else 0.0)
    if np.any(lost > LOST):
        column = int(np.argmax(lost))
        raise ConversionError(
            f"{step}: column {column} has the mean {mean[column]:.3g} and the scale "
            f"{scale[column]:.3g}: numbers around it would be rounded to {dtype} by up to "
            f'{lost[column]:.2g} of that scale; dtype="float64" keeps them'
        )


def _stored(what: str, values: Any, dtype: np.dtype[Any]) -> HostArray:
    """The values in this type, as long as it can hold them."""
    wide = np.asarray(values, "float64")
    with np.errstate(all="ignore"):
        stored = wide.astype(dtype, order="C")
    if np.any(np.isfinite(wide) & ~np.isfinite(stored)):
        raise ConversionError(
            f"{what} has values up to {np.max(np.abs(wide)):.3g}, too large for {dtype}; "
            "a wider dtype holds them"
        )
    return stored


def column_names_of(*estimators: Any) -> tuple[str, ...] | None:
    """The names of the columns that the first of these was fitted with, if any."""
    for estimator in estimators:
        names = getattr(estimator, "feature_names_in_", None)
        if names is not None:
            return tuple(map(str, names))
    return None


def class_names_of(predictor: Any) -> Any:
    """The classes of which each row has one; None if it may have several, or something else."""
    classes = getattr(predictor, "classes_", None)
    several = getattr(getattr(predictor, "_label_binarizer", None), "y_type_", "")
    if classes is None or several.startswith("multilabel"):
        return None
    names = np.asarray(classes).tolist()
    return names if all(type(name) in (str, int, float, bool) for name in names) else None
