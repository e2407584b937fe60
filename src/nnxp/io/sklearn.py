"""Networks that scikit-learn has trained, as nnxp models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from nnxp._arrays import float_dtype
from nnxp._errors import ConversionError
from nnxp.layers._layer import Layer
from nnxp.layers.containers import Sequential
from nnxp.layers.dense import Dense
from nnxp.layers.norm import Standardize

LOST = 2**-12
"""The most of its scale that a column's values may lose by rounding before they are centred."""

_ACTIVATIONS = {
    "identity": "identity",
    "logistic": "sigmoid",
    "relu": "relu",
    "softmax": "softmax",
    "tanh": "tanh",
}
"""scikit-learn's names and ours."""


def from_sklearn(estimator: Any, dtype: object = "float32") -> Sequential:
    """The model that computes what a fitted scikit-learn network predicts.

    `estimator` is an MLPClassifier or MLPRegressor, or a Pipeline that ends in one and has
    nothing but StandardScalers before it. Of a classifier the model gives what `predict_proba`
    gives, for two classes also two columns; the labels are

        estimator.classes_[y.argmax(axis=1)]

    and for a multilabel classifier (y > 0.5). Of a regressor it gives what `predict` gives, but
    always as (rows, outputs): with one output (rows, 1), where scikit-learn gives (rows,).

    scikit-learn computes in float64 unless it was given float32; `dtype="float64"` comes closest.

    Raises ConversionError for any other estimator or step, for one that is not fitted, for
    parameters that `dtype` cannot hold, for a scaler with a mean so far above its scale that rows
    of `dtype` would lose more than 1/4096 of it, and if scikit-learn is not installed.
    """
    try:
        from sklearn.neural_network import MLPClassifier, MLPRegressor
        from sklearn.pipeline import Pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ConversionError(
            f"from_sklearn needs scikit-learn ({error}); pip install scikit-learn brings it"
        ) from error

    def steps(path: str, step: Any) -> Iterator[tuple[str, Any]]:
        if type(step) is Pipeline:
            for name, inner in step.steps:
                yield from steps(f"{path}step {name!r}, ", inner)
        elif not (step is None or (isinstance(step, str) and step == "passthrough")):
            yield path, step

    kind = float_dtype(dtype)
    layers: list[Layer] = []
    found = list(steps("", estimator))
    for i, (path, step) in enumerate(found):
        # The very types: a subclass may predict in another way.
        if type(step) is StandardScaler and i < len(found) - 1:
            layers += _scaler(path, step, kind)
        elif type(step) in (MLPClassifier, MLPRegressor) and i == len(found) - 1:
            layers += _network(path, step, kind)
        else:
            search = hasattr(step, "best_estimator_")
            raise ConversionError(
                f"{path}{type(step).__name__} has no counterpart; from_sklearn takes a fitted "
                "MLPClassifier or MLPRegressor, or a Pipeline of StandardScaler and one of them"
                + ("; its best_estimator_ may be one" if search else "")
            )
    if not layers:
        raise ConversionError(f"{estimator!r:.100} holds no MLPClassifier and no MLPRegressor")
    return Sequential(*layers)


def _scaler(path: str, scaler: Any, kind: np.dtype[Any]) -> Iterator[Layer]:
    """(x - mean) / scale, or nothing if the scaler does neither."""
    _fitted(path, scaler, "n_samples_seen_")
    if scaler.with_mean or scaler.with_std:
        features = scaler.n_features_in_
        mean = scaler.mean_ if scaler.with_mean else np.zeros(features)
        scale = scaler.scale_ if scaler.with_std else np.ones(features)
        stored = _stored(f"{path}the scale", scale, kind)
        if np.any(stored == 0):
            raise ConversionError(
                f"{path}the scale has values as small as {np.min(scale):.3g}, which {kind} "
                "cannot tell from zero; a wider dtype can"
            )
        # Of 16-bit types nobody expects more than a few digits, wherever the mean lies.
        lost = np.abs(mean / scale) * (np.finfo(kind).eps / 2 if kind.itemsize > 2 else 0.0)
        if np.any(lost > LOST):
            column = int(np.argmax(lost))
            raise ConversionError(
                f"{path}column {column} has the mean {mean[column]:.3g} and the scale "
                f"{scale[column]:.3g}: in {kind} its rows would be rounded by up to "
                f'{lost[column]:.2g} of that scale before the mean is subtracted; dtype="float64" '
                "keeps them, and so do rows that are scaled before they come"
            )
        yield Standardize(_stored(f"{path}the mean", mean, kind), stored)


def _network(path: str, network: Any, kind: np.dtype[Any]) -> Iterator[Layer]:
    """activation(x @ coefs[i] + intercepts[i]), one after the other."""
    _fitted(path, network, "coefs_")
    *hidden, last = zip(network.coefs_, network.intercepts_, strict=True)
    output = network.out_activation_
    if output == "logistic" and network.n_outputs_ == 1:
        last, output = _two_columns(*last), "softmax"
    names = [network.activation] * len(hidden) + [output]
    for i, ((weight, bias), name) in enumerate(zip([*hidden, last], names, strict=True)):
        if name not in _ACTIVATIONS:
            raise ConversionError(
                f"{path}{type(network).__name__} has the activation {name!r}, which has no "
                f"counterpart; these have: {', '.join(_ACTIVATIONS)}"
            )
        yield Dense.of(
            _stored(f"{path}coefs_[{i}]", weight, kind),
            _stored(f"{path}intercepts_[{i}]", bias, kind),
            _ACTIVATIONS[name],
        )


def _two_columns(weight: Any, bias: Any) -> tuple[Any, Any]:
    """What turns the one output z of a binary classifier into (0, z), for a softmax.

    softmax(0, z) is (1 - sigmoid(z), sigmoid(z)), with both small values right: where sigmoid(z)
    rounds to 1 the first column is still exp(-z), which 1 - sigmoid(z) has lost.
    """
    return np.pad(weight, [(0, 0), (1, 0)]), np.pad(bias, (1, 0))


def _fitted(path: str, estimator: Any, attribute: str) -> None:
    if not hasattr(estimator, attribute):
        name = type(estimator).__name__
        raise ConversionError(f"{path}{name} is not fitted; call its fit(X, y) first")


def _stored(what: str, values: Any, kind: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """The values in this type, as long as it can hold them."""
    wide = np.asarray(values, "float64")
    with np.errstate(all="ignore"):
        stored = wide.astype(kind, order="C")
    if np.any(np.isfinite(wide) & ~np.isfinite(stored)):
        raise ConversionError(
            f"{what} has values up to {np.max(np.abs(wide)):.3g}, too large for {kind}; "
            "a wider dtype holds them"
        )
    return stored
