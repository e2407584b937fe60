"""What scikit-learn has trained predicts the same as an nnxp model."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import feature_selection, linear_model, svm
from sklearn.base import clone
from sklearn.compose import TransformedTargetRegressor
from sklearn.decomposition import PCA, IncrementalPCA, TruncatedSVD
from sklearn.model_selection import GridSearchCV
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import (
    MaxAbsScaler,
    MinMaxScaler,
    Normalizer,
    PolynomialFeatures,
    RobustScaler,
    StandardScaler,
)

import nnxp
from conftest import draw
from nnxp import ConversionError, from_sklearn
from nnxp.io import sklearn as conversion
from nnxp.io.labels import Labels
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
    """What scikit-learn predicts, in the most telling way that it has."""
    if hasattr(estimator, "predict_proba"):
        return estimator.predict_proba(x)
    classifies = hasattr(estimator, "decision_function")
    return estimator.decision_function(x) if classifies else estimator.predict(x)


def doubt(estimator, x, dtype):
    """How far off a correct result may be, whose parameters and rows are rounded to dtype first.

    The network runs on arrays that carry the error so far along: at the start the rounding to
    dtype, then what every product, function and sum passes on and adds (`nnxp.testing.bounded`).
    """

    def rounded(value):
        return bounded.asarray(value).astype(dtype)

    model = from_sklearn(estimator, "float64").map_arrays(lambda name, value: rounded(value))
    return model(rounded(x)).error


def distance(estimator, x, dtype):
    """How far off scikit-learn's result a correct one may be: it computes in float64, and errs too.

    Of two classes it takes 1 - 1 / (1 + exp(-z)) for the first, which near 1 rounds three times.
    """
    lost = 3 * 2**-53 / LIMIT
    return LIMIT * (doubt(estimator, x, dtype) + doubt(estimator, x, "float64") + lost)


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


def test_a_regressor_answers_in_the_shape_that_scikit_learn_does():
    for task, shape in (("one target", (75,)), ("three targets", (75, 3))):
        estimator = fitted(task)
        y = from_sklearn(estimator, "float64")(UNSEEN)
        assert y.shape == estimator.predict(UNSEEN).shape == shape


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


def no_scale():
    scaler = StandardScaler().fit(SEEN)
    scaler.scale_[2] = 0
    return make_pipeline(scaler, fitted(scaler="unscaled"))


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
    "another estimator": (svm.SVC, "SVC has no counterpart; from_sklearn takes a fitted network"),
    "another step": (
        lambda: Pipeline([("a", SCALER), ("b", PolynomialFeatures()), ("c", fitted())]),
        r"step 'b', PolynomialFeatures has no .* pipeline\[:2\]\.transform\(x\), .*pipeline\[2:\]",
    ),
    "another step of a step": (
        lambda: make_pipeline(make_pipeline(PolynomialFeatures()), fitted(scaler="unscaled")),
        "PolynomialFeatures has no counterpart; transform the rows with it first",
    ),
    "another norm": (
        lambda: make_pipeline(Normalizer("l1").fit(SEEN), fitted(scaler="unscaled")),
        "Normalizer with norm='l1' has no counterpart",
    ),
    "a function of the target": (
        lambda: TransformedTargetRegressor(
            linear_model.Ridge(), func=np.arcsinh, inverse_func=np.sinh
        ).fit(SEEN, SCORE),
        "transformer_, FunctionTransformer has no counterpart; convert the regressor_",
    ),
    "other probabilities": (
        lambda: linear_model.SGDClassifier(loss="modified_huber").fit(SEEN, SCORE > 0),
        "loss='modified_huber' in a way that has no counterpart",
    ),
    "a scale of zero": (no_scale, "the scale has zeros"),
    "a scaler at the end": (lambda: make_pipeline(SCALER), "StandardScaler predicts nothing"),
    "a scaler alone": (lambda: SCALER, "StandardScaler predicts nothing"),
    "a network in the middle": (
        lambda: make_pipeline(fitted(scaler="unscaled"), fitted(scaler="unscaled")),
        "step 'mlpclassifier-1', MLPClassifier has no counterpart",
    ),
    "an empty pipeline": (lambda: make_pipeline("passthrough"), "is empty; from_sklearn takes"),
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
    with pytest.raises(ConversionError, match=r"coefs_\[1\]: weight has values up to 1e\+05, too"):
        from_sklearn(estimator, "float16")
    with pytest.raises(nnxp.DtypeMismatch, match="not 'int8'"):
        from_sklearn(estimator, "int8")


STEPS = {
    "min-max": MinMaxScaler((2, 5)),
    "bounds": MinMaxScaler(clip=True),
    "max-abs": MaxAbsScaler(),
    "robust": RobustScaler(),
    "robust, centred": RobustScaler(with_scaling=False),
    "robust, spread": RobustScaler(with_centering=False),
    "normalizer": Normalizer(),
    "pca": PCA(3),
    "pca, whitened": PCA(3, whiten=True),
    "pca by batches": IncrementalPCA(3, whiten=True),
    "svd": TruncatedSVD(3),
    "variance": feature_selection.VarianceThreshold(0.1),
    "k best": feature_selection.SelectKBest(feature_selection.f_regression, k=2),
    "from a model": feature_selection.SelectFromModel(linear_model.Lasso(0.1)),
}

# columns of Unix times and the like, which float32 would round before they are centred

TIMES = SEEN.copy(), UNSEEN.copy()
for each in TIMES:
    each[:, 1] = 1.6e9 + 3600 * each[:, 0]
    each[:, 2] += -1e6
FIRST = {
    "standard": (StandardScaler(),),
    "min-max": (MinMaxScaler((-1, 1)),),
    "robust": (RobustScaler(),),
    "pca": (PCA(4),),
    "whitened": (StandardScaler(), PCA(4, whiten=True)),
    "after a selection": (feature_selection.VarianceThreshold(), StandardScaler()),
    "in two steps": (StandardScaler(with_std=False), MaxAbsScaler(), StandardScaler()),
    "before a selection": (StandardScaler(), STEPS["from a model"], RobustScaler()),
}


@pytest.mark.parametrize("backend", ["numpy", "sim"])
@pytest.mark.parametrize("first", FIRST)
def test_large_means_are_subtracted_before_rows_are_rounded(first, backend):
    steps = [clone(step) for step in FIRST[first]]
    estimator = make_pipeline(*steps, linear_model.Ridge()).fit(TIMES[0], SCORE)
    due = estimator.predict(TIMES[1])
    engine = nnxp.Engine(from_sklearn(estimator), backend)
    for _ in range(3):  # the third of few rows is recorded
        np.testing.assert_allclose(engine(TIMES[1]), due, atol=3e-6 * np.abs(due).max())


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint32"])
@pytest.mark.parametrize("backend", ["numpy", "sim"])
def test_whole_numbers_meet_a_scaler_as_they_are(dtype, backend):
    times = [np.round(np.abs(rows)).astype(dtype) for rows in TIMES]
    estimator = make_pipeline(StandardScaler(), linear_model.Ridge()).fit(times[0], SCORE)
    due = estimator.predict(times[1])
    y = nnxp.predict(from_sklearn(estimator), times[1], backend)
    np.testing.assert_allclose(y, due, atol=3e-6 * np.abs(due).max())


class Unsaid:
    """Rows that do not say of what type they are."""

    def __init__(self, rows):
        self.rows, self.shape = rows, rows.shape

    def __getitem__(self, rows):
        return self.rows[rows]


def test_rows_of_a_type_that_is_not_said_meet_a_scaler_as_they_are():
    estimator = make_pipeline(StandardScaler(), linear_model.Ridge()).fit(TIMES[0], SCORE)
    due = estimator.predict(TIMES[1])
    y = nnxp.predict(from_sklearn(estimator), Unsaid(TIMES[1]), "cpu")
    np.testing.assert_allclose(y, due, atol=3e-6 * np.abs(due).max())


DROWNED = {
    "a scale alone": (StandardScaler(with_mean=False),),
    "behind bounds": (MinMaxScaler((1e6, 1e6 + 1), clip=True), StandardScaler()),
}


@pytest.mark.parametrize("case", DROWNED)
def test_a_mean_that_float32_would_drown_between_layers_is_refused(case):
    steps = [clone(step) for step in DROWNED[case]]
    estimator = make_pipeline(*steps, linear_model.Ridge()).fit(TIMES[0], SCORE)
    with pytest.raises(ConversionError, match=r"column \d has the mean .*float64"):
        from_sklearn(estimator)
    y = nnxp.predict(from_sklearn(estimator, "float64"), TIMES[1], "cpu")
    np.testing.assert_allclose(y, estimator.predict(TIMES[1]), atol=1e-6)


def test_a_target_with_a_mean_that_float32_would_drown_is_refused():
    target = TransformedTargetRegressor(linear_model.Ridge(), transformer=StandardScaler())
    estimator = target.fit(SEEN, 1.6e9 + 3600 * SCORE)
    with pytest.raises(ConversionError, match=r"transformer_, .*mean 1.6e\+09 .*float64"):
        from_sklearn(estimator)
    y = from_sklearn(estimator, "float64")(UNSEEN)
    np.testing.assert_allclose(y, estimator.predict(UNSEEN), rtol=1e-12)


# linear models, and what may come before them

LINEAR = [
    *[(name, SCORE) for name in conversion._REGRESSORS if not name.startswith("MultiTask")],
    *[(name, TASKS["three targets"][1]) for name in conversion._REGRESSORS if "Task" in name],
    ("LinearRegression", SCORE[:, None]),
    ("LinearRegression", TASKS["three targets"][1]),
    *[(name, SCORE > 0) for name in conversion._CLASSIFIERS],
    *[(name, TASKS["four classes"][1]) for name in conversion._CLASSIFIERS],
    ("RidgeClassifier", TASKS["three labels"][1]),
]


@pytest.mark.filterwarnings("ignore")  # of scikit-learn's, for training so little
@pytest.mark.parametrize(("name", "y"), LINEAR)
def test_a_linear_model_predicts_what_scikit_learn_predicts(name, y):
    kind = getattr(linear_model, name, None) or getattr(svm, name)
    quick = {"max_iter": 300} if kind().get_params().get("max_iter") else {}
    estimator = make_pipeline(StandardScaler(), kind(**quick)).fit(SEEN, y)
    due = prediction(estimator, UNSEEN)
    model = from_sklearn(estimator, "float64")
    answer = model(UNSEEN)
    assert answer.shape == due.shape
    np.testing.assert_allclose(answer, due, rtol=1e-12, atol=1e-12)
    if y.ndim == 1 and hasattr(estimator, "classes_"):
        assert model.classes == tuple(estimator.classes_.tolist())
        np.testing.assert_array_equal(
            Labels(model, UNSEEN.shape)(answer), estimator.predict(UNSEEN)
        )
    else:
        assert model.classes is None


def test_probabilities_of_a_linear_classifier():
    estimator = linear_model.SGDClassifier(loss="log_loss", tol=1e9, n_iter_no_change=9)
    estimator = make_pipeline(StandardScaler(), estimator).fit(SEEN, SCORE > 0)
    np.testing.assert_allclose(
        from_sklearn(estimator, "float64")(UNSEEN), estimator.predict_proba(UNSEEN), atol=1e-12
    )


@pytest.mark.filterwarnings("ignore:.*constant:UserWarning")
@pytest.mark.parametrize("after", [(), (StandardScaler(),)], ids=["", "scaled"])
@pytest.mark.parametrize("before", [(), (StandardScaler(),)], ids=["", "scaled"])
@pytest.mark.parametrize("step", STEPS)
def test_a_step_transforms_as_scikit_learn_does(step, before, after):
    steps = [clone(each) for each in (*before, STEPS[step], *after)]
    estimator = make_pipeline(*steps, linear_model.Ridge()).fit(SEEN, SCORE)
    x = UNSEEN.copy()
    x[3] *= 1000  # beyond what was seen
    due = estimator.predict(x)
    np.testing.assert_allclose(from_sklearn(estimator, "float64")(x), due, rtol=1e-9, atol=1e-9)


def test_rows_of_zeros_stay_zeros_in_a_normalizer():
    estimator = make_pipeline(Normalizer(), linear_model.Ridge()).fit(SEEN, SCORE)
    for dtype in ("float16", "float32", "float64"):
        y = from_sklearn(estimator, dtype)(np.zeros((2, 6), dtype))
        np.testing.assert_allclose(y, estimator.predict(np.zeros((2, 6))), rtol=2e-3)


@pytest.mark.parametrize("y", [SCORE, SCORE[:, None], TASKS["three targets"][1]], ids=np.shape)
@pytest.mark.parametrize("scaler", ["none", "standard", "min-max", "max-abs", "robust"])
def test_a_transformed_target_is_transformed_back(scaler, y):
    scaler = StandardScaler() if scaler == "standard" else STEPS.get(scaler)
    inner = make_pipeline(StandardScaler(), linear_model.Ridge())
    outer = TransformedTargetRegressor(inner, transformer=scaler)
    estimator = make_pipeline(StandardScaler(), outer).fit(SEEN, y)
    due = estimator.predict(UNSEEN)
    answer = from_sklearn(estimator, "float64")(UNSEEN)
    assert answer.shape == due.shape
    np.testing.assert_allclose(answer, due, rtol=1e-12, atol=1e-12)


# names


def test_a_model_keeps_the_names_of_columns_and_of_classes(tmp_path):
    pandas = pytest.importorskip("pandas")
    names = ["age", "dose", "mass", "size", "time", "rate"]
    frame = pandas.DataFrame(SEEN, columns=names)
    estimator = make_pipeline(StandardScaler(), MLPClassifier((5,), tol=1e9, random_state=0))
    estimator.fit(frame, TASKS["two classes"][1])
    model = from_sklearn(estimator, "float64")
    assert (model.columns, model.classes) == (tuple(names), ("no", "yes"))
    nnxp.save(model, tmp_path / "net")
    loaded = nnxp.load(tmp_path / "net")
    unseen = pandas.DataFrame(UNSEEN, columns=names)
    due = estimator.predict_proba(unseen)
    y = nnxp.predict(loaded, unseen[names[::-1]], "cpu")
    np.testing.assert_allclose(y, due, atol=1e-12)
    with pytest.raises(nnxp.ShapeError, match="'dose' is missing"):
        nnxp.predict(loaded, unseen.drop(columns="dose"), "cpu")


def test_labels_of_rows_that_may_have_several_are_not_kept():
    assert from_sklearn(fitted("three labels")).classes is None
    assert from_sklearn(fitted("four classes")).classes == (5, 6, 7, 8)
    assert from_sklearn(fitted("one target")).classes is None
