"""What scikit-learn has trained predicts the same as an nnxp model."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler

import nnxp
from conftest import draw
from nnxp import ConversionError, from_sklearn
from nnxp.testing import LIMIT, assert_close, assert_parity, bounded

# Rows to fit and rows not seen, with columns of different size and place, one of them constant.
SIZE = np.array([1.0, 10.0, 0.01, 3.0, 0.0, 1.0])
PLACE = np.array([0.0, -20.0, 1.0, 50.0, 2.0, 0.0])
SEEN = draw((120, 6), "float64", seed=1) * SIZE + PLACE
UNSEEN = draw((75, 6), "float64", seed=2) * SIZE + PLACE
SCORE = (SEEN - PLACE)[:, :3] @ [1.0, 0.1, -50.0]

TASKS = {
    "two classes": (MLPClassifier, np.where(SCORE > 0, "yes", "no")),
    "four classes": (MLPClassifier, np.digitize(SCORE, [-1, 0, 1]) + 5),
    "three labels": (MLPClassifier, np.stack([SCORE > -1, SCORE > 0, SCORE > 1], 1).astype(int)),
    "one target": (MLPRegressor, SCORE),
    "three targets": (MLPRegressor, np.stack([SCORE, SCORE**2, np.sin(SCORE)], axis=1)),
}
SCALERS = {
    "unscaled": (),
    "scaled": (StandardScaler(),),
    "centred": (StandardScaler(with_std=False),),
    "spread": (StandardScaler(with_mean=False),),
    "untouched": (StandardScaler(with_mean=False, with_std=False),),
    "scaled twice": (StandardScaler(with_std=False), "passthrough", StandardScaler()),
}


def fitted(task="four classes", activation="relu", scaler="scaled", hidden=(9, 7)):
    """A network that has been trained a little; its tol ends the training without a warning."""
    kind, y = TASKS[task]
    options = {"learning_rate_init": 0.05, "tol": 1e9, "n_iter_no_change": 30, "random_state": 0}
    network = kind(hidden_layer_sizes=hidden, activation=activation, **options)
    steps = [clone(each) if each != "passthrough" else each for each in SCALERS[scaler]]
    return (make_pipeline(*steps, network) if steps else network).fit(SEEN, y)


def prediction(estimator, x):
    """What scikit-learn predicts, as (rows, outputs)."""
    y = estimator.predict_proba(x) if hasattr(estimator, "classes_") else estimator.predict(x)
    return y.reshape(len(x), -1)


def doubt(estimator, x, dtype):
    """How far off a correct result may be, whose parameters and rows are rounded to dtype first.

    The network runs on arrays that carry the error so far along: at the start the rounding to
    dtype, then what every product, function and sum passes on and adds (`nnxp.testing.bounded`).
    """

    def rounded(value):
        return bounded.asarray(value).astype(dtype)

    model = from_sklearn(estimator, "float64")._replaced(lambda name, value: rounded(value))
    return model(rounded(x)).error


def distance(estimator, x, dtype):
    """How far off scikit-learn's result a correct one may be: it computes in float64, and errs too.

    Of two classes it takes 1 - 1 / (1 + exp(-z)) for the first, which near 1 rounds three times.
    """
    lost = 3 * 2**-53 / LIMIT
    return doubt(estimator, x, dtype) + doubt(estimator, x, "float64") + lost


@pytest.mark.parametrize("scaler", SCALERS)
@pytest.mark.parametrize("activation", ["identity", "logistic", "tanh", "relu"])
@pytest.mark.parametrize("task", TASKS)
def test_the_model_predicts_what_scikit_learn_predicts(task, activation, scaler):
    estimator = fitted(task, activation, scaler)
    due = prediction(estimator, UNSEEN)
    for dtype in ("float64", "float32"):
        model = from_sklearn(estimator, dtype)
        assert model.dtype == dtype
        y = nnxp.predict(model, UNSEEN, "numpy")
        assert_close(y, due, bound=distance(estimator, UNSEEN, dtype))


@pytest.mark.parametrize("task", TASKS)
def test_the_bound_of_that_test_is_tight(task):
    """The weights of one layer off by a ten-thousandth do not pass."""
    estimator = fitted(task)
    model = from_sklearn(estimator)
    due = prediction(estimator, UNSEEN)
    rows = UNSEEN.astype("float32")
    bound = distance(estimator, UNSEEN, "float32")
    assert_close(model(rows), due, bound=bound)
    wrong = model.parameters()
    wrong["layers.1.weight"] = wrong["layers.1.weight"] * 1.0001
    with pytest.raises(AssertionError):
        assert_close(model.with_parameters(wrong)(rows), due, bound=bound)


@pytest.mark.parametrize("task", TASKS)
def test_a_converted_model_agrees_on_every_backend(task):
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        assert_parity(from_sklearn(fitted(task), dtype), UNSEEN)


@pytest.mark.parametrize("task", ["two classes", "four classes"])
def test_the_labels_are_had_as_the_documentation_says(task):
    estimator = fitted(task)
    y = nnxp.predict(from_sklearn(estimator, "float64"), UNSEEN, "numpy")
    labels = estimator.classes_[y.argmax(axis=1)]
    np.testing.assert_array_equal(labels, estimator.predict(UNSEEN))
    assert len(set(labels)) > 1


def test_the_labels_of_a_multilabel_classifier_are_had_as_the_documentation_says():
    estimator = fitted("three labels")
    y = nnxp.predict(from_sklearn(estimator, "float64"), UNSEEN, "numpy")
    np.testing.assert_array_equal(y > 0.5, estimator.predict(UNSEEN))


def test_a_regressor_with_one_target_gives_one_column():
    y = from_sklearn(fitted("one target"), "float64")(UNSEEN)
    assert y.shape == (75, 1)


def test_both_columns_of_a_binary_classifier_are_right_where_scikit_learn_s_first_is_lost():
    estimator = fitted("two classes", scaler="unscaled", hidden=())
    weight = np.array([[30.0], [0], [0], [0], [0], [0]])
    estimator.coefs_, estimator.intercepts_ = [weight], [np.zeros(1)]
    x = np.zeros((9, 6))
    x[:, 0] = [-20, -10, -2, -1, 0, 1, 2, 10, 20]
    z = x @ weight
    log_p = -np.concatenate([np.logaddexp(0, z), np.logaddexp(0, -z)], axis=1)
    y = from_sklearn(estimator, "float64")(x)
    np.testing.assert_allclose(y, np.exp(log_p), rtol=1e-13)  # |z| = 600 ulps of exp, to be safe
    assert (estimator.predict_proba(x)[-3:, 0] == 0).all()
    assert (y[-3:, 0] > 0).all()


def test_a_pipeline_of_pipelines_is_one_model():
    network = fitted("four classes").steps[-1][1]
    scaler = StandardScaler().fit(SEEN)
    nested = make_pipeline(make_pipeline(scaler), None, make_pipeline("passthrough", network))
    model = from_sklearn(nested)
    assert [type(each) for each in model.layers] == [nnxp.Standardize] + 3 * [nnxp.Dense]


def test_a_scaler_that_does_nothing_costs_nothing():
    model = from_sklearn(fitted(scaler="untouched"))
    assert all(type(each) is nnxp.Dense for each in model.layers)


def test_a_scaler_s_switches_count_and_not_what_it_has_learnt():
    """Without with_mean a scaler still knows the mean, but does not subtract it."""
    model = from_sklearn(fitted(scaler="spread"))
    np.testing.assert_array_equal(model.layers[0].mean, np.zeros(6))
    model = from_sklearn(fitted(scaler="centred"))
    np.testing.assert_array_equal(model.layers[0].scale, np.ones(6))


def test_a_converted_model_is_its_own(tmp_path):
    estimator = fitted(scaler="unscaled")
    model = from_sklearn(estimator, "float64")
    before = model(UNSEEN)
    for value in estimator.coefs_:
        value[...] = 0
    np.testing.assert_array_equal(model(UNSEEN), before)
    nnxp.save(model, tmp_path / "net")
    np.testing.assert_array_equal(nnxp.load(tmp_path / "net")(UNSEEN), before)


class Subclass(MLPClassifier):
    """May predict in any way."""


class Scaled(StandardScaler):
    """May scale in any way."""


def exponential():
    network = fitted("one target", scaler="unscaled")
    network.out_activation_ = "exp"  # as with loss="poisson" from scikit-learn 1.7 on
    return network


def unlisted():
    network = fitted(scaler="unscaled")
    network.activation = "softsign"
    return network


UNFITTED = MLPClassifier()
SCALER = StandardScaler().fit(SEEN)
REFUSED = {
    "unfitted": (lambda: UNFITTED, "MLPClassifier is not fitted; call its fit"),
    "an unfitted step": (
        lambda: Pipeline([("scale", SCALER), ("net", MLPRegressor())]),
        "step 'net', MLPRegressor is not fitted",
    ),
    "an unfitted scaler": (
        lambda: make_pipeline(StandardScaler(), fitted(scaler="unscaled")),
        "StandardScaler is not fitted",
    ),
    "another estimator": (LogisticRegression, "LogisticRegression has no counterpart; from_skl"),
    "another step": (
        lambda: Pipeline([("pca", PCA()), ("net", fitted(scaler="unscaled"))]),
        "step 'pca', PCA has no counterpart",
    ),
    "another scaler": (
        lambda: make_pipeline(MinMaxScaler(), fitted(scaler="unscaled")),
        "MinMaxScaler has no counterpart",
    ),
    "a scaler at the end": (lambda: make_pipeline(SCALER), "StandardScaler has no counterpart"),
    "a scaler alone": (lambda: SCALER, "StandardScaler has no counterpart"),
    "a network in the middle": (
        lambda: make_pipeline(fitted(scaler="unscaled"), fitted(scaler="unscaled")),
        "step 'mlpclassifier-1', MLPClassifier has no counterpart",
    ),
    "an empty pipeline": (lambda: make_pipeline("passthrough"), "holds no MLPClassifier"),
    "a subclass": (Subclass, "Subclass has no counterpart"),
    "a scaler's subclass": (
        lambda: make_pipeline(Scaled().fit(SEEN), fitted(scaler="unscaled")),
        "Scaled has no counterpart",
    ),
    "a search": (
        lambda: GridSearchCV(MLPRegressor(tol=1e9), {"alpha": [0.1]}, cv=2).fit(SEEN, SCORE),
        "best_estimator_ may be one",
    ),
    "an array": (lambda: np.ones(3), "ndarray has no counterpart"),
    "an exponential output": (exponential, "activation 'exp', which has no counterpart"),
    "an unknown activation": (unlisted, "activation 'softsign', which has no"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_counterpart_is_refused_by_name(case):
    make, said = REFUSED[case]
    with pytest.raises(ConversionError, match=said):
        from_sklearn(make())


def test_parameters_that_the_type_cannot_hold_are_refused():
    estimator = fitted(scaler="unscaled")
    estimator.coefs_[1][2, 3] = 1e5
    assert from_sklearn(estimator, "bfloat16").dtype == "bfloat16"
    with pytest.raises(ConversionError, match=r"coefs_\[1\] has values up to 1e\+05, too large"):
        from_sklearn(estimator, "float16")
    estimator = fitted()
    estimator.steps[0][1].scale_[0] = 1e-9
    with pytest.raises(ConversionError, match=r"step 'standardscaler', .*float16 cannot tell"):
        from_sklearn(estimator, "float16")
    with pytest.raises(nnxp.DtypeMismatch, match="not 'int8'"):
        from_sklearn(estimator, "int8")


def test_without_scikit_learn_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.neural_network", None)
    with pytest.raises(ConversionError, match=r"pip install scikit-learn"):
        from_sklearn(UNFITTED)


@pytest.mark.parametrize(("mean", "scale"), [(1.6e9, 3600.0), (-1e6, 10.0), (2000.0, 1e-3)])
def test_a_mean_that_rounding_to_float32_would_drown_is_refused(mean, scale):
    rows = SEEN[:, [0, 1, 3]].copy()
    rows[:, 1] = mean + scale * draw((len(rows),), "float64", seed=3)
    network = MLPRegressor(hidden_layer_sizes=(5,), max_iter=30, tol=1e9, random_state=0)
    fitted = make_pipeline(StandardScaler(), network).fit(rows, SCORE)
    with pytest.raises(ConversionError, match=r"column 1 .*float64"):
        from_sklearn(fitted)
    y = nnxp.predict(from_sklearn(fitted, "float64"), rows, "cpu")
    np.testing.assert_allclose(y[:, 0], fitted.predict(rows), rtol=1e-9)


def test_a_mean_that_float32_can_bear_is_taken():
    rows = SEEN[:, [0, 1, 3]].copy()
    rows[:, 1] = 2000 + 10 * draw((len(rows),), "float64", seed=3)  # years
    network = MLPRegressor(hidden_layer_sizes=(5,), max_iter=30, tol=1e9, random_state=0)
    fitted = make_pipeline(StandardScaler(), network).fit(rows, SCORE)
    y = nnxp.predict(from_sklearn(fitted), rows, "cpu")
    np.testing.assert_allclose(y[:, 0], fitted.predict(rows), atol=1e-3 * np.abs(y).max())
