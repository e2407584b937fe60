"""The estimators of nnxp.sklearn: scikit-learn's own numbers, its checks, and what they add."""

from __future__ import annotations

import pickle
import tracemalloc
import warnings

import numpy as np
import pytest
from scipy.sparse import csc_matrix
from sklearn import neural_network
from sklearn.datasets import load_diabetes, load_digits, load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import nnxp
from conftest import draw
from nnxp._errors import ConversionError, OptionError, TrainingError
from nnxp.sklearn import MLPClassifier, MLPRegressor

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def scaled(load):
    x, y = load(return_X_y=True)
    return MinMaxScaler().fit_transform(x), y


DIGITS, IRIS, DIABETES = scaled(load_digits), scaled(load_iris), load_diabetes(return_X_y=True)


# scikit-learn's own numbers


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@parametrize_with_checks(
    [
        MLPClassifier((16,), max_iter=10, learning_rate_init=0.1),
        MLPRegressor(hidden_layer_sizes=(16,), max_iter=10, learning_rate_init=0.1),
    ]
)
def test_scikit_learns_own_checks(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(estimator)


SGD = {"solver": "sgd", "learning_rate_init": 0.2}
GALLERY = [  # scikit-learn 1.9, "Compare Stochastic learning strategies for MLPClassifier"
    (IRIS, 400, SGD | {"momentum": 0}, "0.980000 0.096950"),
    (IRIS, 400, SGD | {"nesterovs_momentum": False}, "0.980000 0.049530"),
    (IRIS, 400, SGD, "0.980000 0.049540"),
    (IRIS, 400, {"learning_rate_init": 0.01}, "0.980000 0.045311"),
    (DIGITS, 15, SGD | {"momentum": 0}, "0.956038 0.243802"),
    (DIGITS, 15, SGD | {"nesterovs_momentum": False}, "0.992766 0.041297"),
    (DIGITS, 15, SGD, "0.993879 0.042898"),
    (DIGITS, 15, {"learning_rate_init": 0.01}, "0.991653 0.045934"),
]


@pytest.mark.parametrize(("data", "epochs", "options", "published"), GALLERY)
def test_scores_and_losses_are_those_of_scikit_learns_gallery(data, epochs, options, published):
    x, y = data
    found = MLPClassifier(random_state=0, max_iter=epochs, **options).fit(x, y)
    assert f"{found.score(x, y):.6f} {found.loss_:.6f}" == published


several = np.c_[DIABETES[1], np.sqrt(DIABETES[1])]
counts = np.arange(len(DIABETES[1])) % 3 + 1.0
some = np.arange(0, 1797, 4)
FEW = DIGITS[0][some], DIGITS[1][some]
RUNS = [
    (MLPClassifier, *FEW, {"max_iter": 20}),
    (MLPClassifier, *FEW, SGD | {"learning_rate": "adaptive", "activation": "logistic",
                                 "n_iter_no_change": 2, "tol": 0.2}),
    (MLPClassifier, *FEW, SGD | {"learning_rate": "invscaling", "activation": "tanh"}),
    (MLPClassifier, *FEW, {"early_stopping": True, "batch_size": 37, "shuffle": False}),
    (MLPClassifier, FEW[0], FEW[1] > 4, {"early_stopping": True}),
    (MLPClassifier, FEW[0], FEW[1] > 4, {"solver": "lbfgs"}),
    (MLPClassifier, csc_matrix(FEW[0]), FEW[1][:, None] > [2, 5, 7], {"alpha": 0.1}),
    (MLPRegressor, *DIABETES, {"hidden_layer_sizes": (9, 5), "early_stopping": True}),
    (MLPRegressor, DIABETES[0], several, {"alpha": 0.5}),
    (MLPRegressor, *DIABETES, {"loss": "poisson"}),
    (MLPRegressor, *DIABETES, {"solver": "lbfgs", "activation": "identity"}),
]  # fmt: skip


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("kind", "x", "y", "options"), RUNS)
def test_losses_are_scikit_learns_epoch_by_epoch(kind, x, y, options, weighted):
    ours = kind(random_state=0, **{"max_iter": 8} | options)
    theirs = getattr(neural_network, kind.__name__)(**{
        name: value for name, value in ours.get_params().items()
        if name not in ("device", "class_weight", "dropout", "layers")
    })  # fmt: skip
    given = {"sample_weight": np.arange(x.shape[0]) % 3 + 1.0} if weighted else {}
    ours.fit(x, y, **given), theirs.fit(x, y, **given)
    names = "loss_ n_iter_ t_ n_layers_ n_outputs_ n_features_in_".split()
    if ours.solver != "lbfgs":
        names += "loss_curve_ best_loss_ validation_scores_ best_validation_score_".split()
    for name in names:
        wanted = getattr(theirs, name)
        if wanted is None:
            assert getattr(ours, name) is None
        else:
            np.testing.assert_allclose(getattr(ours, name), wanted, rtol=1e-10, err_msg=name)
    assert ours.out_activation_ == theirs.out_activation_
    for a, b in zip(
        ours.coefs_ + ours.intercepts_, theirs.coefs_ + theirs.intercepts_, strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(ours.predict(x), theirs.predict(x), rtol=1e-8)


def test_further_epochs_and_blocks_go_on_as_scikit_learns():
    (x, y), blocks = FEW, np.array_split(np.arange(len(FEW[1])), 3)
    ours, theirs = MLPClassifier(random_state=0), neural_network.MLPClassifier(random_state=0)
    for _ in range(2):
        for ids in blocks:
            ours = pickle.loads(pickle.dumps(ours))  # with the optimiser's state
            ours.partial_fit(x[ids], y[ids], classes=np.arange(10))
            theirs.partial_fit(x[ids], y[ids], classes=np.arange(10))
    np.testing.assert_allclose(ours.loss_curve_, theirs.loss_curve_, rtol=1e-12)
    np.testing.assert_allclose(ours.coefs_[0], theirs.coefs_[0], rtol=1e-9)
    ours.set_params(warm_start=True, max_iter=3).fit(x, y)
    theirs.set_params(warm_start=True, max_iter=3).fit(x, y)
    np.testing.assert_allclose(ours.loss_curve_, theirs.loss_curve_, rtol=1e-12)
    with pytest.raises(OptionError, match="same classes"):
        ours.fit(x[y < 9], y[y < 9])
    with pytest.raises(OptionError, match="needs classes"):
        MLPClassifier().partial_fit(x, y)
    with pytest.raises(OptionError, match="not there before: \\[10\\]"):
        MLPClassifier().partial_fit(x, y, classes=range(10)).partial_fit(x, y + 1)


# what they add


def test_trained_on_a_device_it_predicts_without(sim):
    x, y = FEW
    here = MLPClassifier((16,), max_iter=3, random_state=0, device="cpu").fit(x, y)
    there = MLPClassifier((16,), max_iter=3, random_state=0, device="sim").fit(x, y)
    np.testing.assert_allclose(there.loss_curve_, here.loss_curve_, rtol=1e-12)
    assert there._trainer.place == "sim:0"
    brought = pickle.loads(pickle.dumps(there)).set_params(device="cpu")
    assert type(brought.coefs_[0]) is np.ndarray
    np.testing.assert_allclose(brought.predict_proba(x), here.predict_proba(x), rtol=1e-10)
    brought.partial_fit(x, y)
    np.testing.assert_allclose(brought.loss_, there.partial_fit(x, y).loss_, rtol=1e-12)
    with pytest.raises(nnxp.BackendUnavailable):
        brought.set_params(device="tpu").predict(x)


def test_classes_can_count_alike_however_rare():
    x, y = FEW
    rare = (y != 0) | (np.arange(len(y)) % 20 == 0)
    x, y = x[rare], y[rare]
    by_weight = MLPClassifier((8,), max_iter=4, random_state=0, class_weight="balanced").fit(x, y)
    own = len(y) / 10 / np.bincount(y)
    given = MLPClassifier((8,), max_iter=4, random_state=0).fit(x, y, sample_weight=own[y])
    np.testing.assert_allclose(by_weight.loss_curve_, given.loss_curve_, rtol=1e-12)
    both = MLPClassifier((8,), max_iter=4, random_state=0, class_weight={3: 2.0})
    both.fit(x, y, sample_weight=own[y])
    given.fit(x, y, sample_weight=own[y] * np.where(y == 3, 2.0, 1.0))
    np.testing.assert_allclose(both.loss_curve_, given.loss_curve_, rtol=1e-12)


def test_dropout_drops_in_training_only():
    x, y = FEW
    found = [
        MLPClassifier((32,), max_iter=3, random_state=0, dropout=rate).fit(x, y)
        for rate in (0.0, 0.5, 0.5)
    ]
    assert found[1].loss_curve_ == found[2].loss_curve_ != found[0].loss_curve_
    np.testing.assert_array_equal(found[1].predict_proba(x), found[1].predict_proba(x))


def test_layers_of_any_kind_are_trained_in_a_pipeline_and_a_grid():
    x, y = FEW
    layers = [nnxp.Reshape((8, 8, 1)), nnxp.Conv(1, 4, (3, 3), "relu", rng=0), nnxp.MaxPool((2, 2)),
              nnxp.Flatten(), nnxp.BatchNorm(36)]  # fmt: skip
    net = MLPClassifier(layers=layers, max_iter=25, random_state=0, learning_rate_init=0.01)
    grid = GridSearchCV(make_pipeline(StandardScaler(), net), {"mlpclassifier__alpha": [0.1, 1]},
                        cv=2)  # fmt: skip
    best = grid.fit(x, y).best_estimator_
    assert best.score(x, y) > 0.97
    assert best[-1].model_.layers[4].mean.any()  # statistics were recorded
    net = nnxp.from_sklearn(best, "float64")
    np.testing.assert_allclose(nnxp.predict(net, x), best.predict_proba(x), atol=1e-12)
    with pytest.raises(OptionError, match=r"nnxp\.Flatten"):
        MLPClassifier(layers=layers[:2]).fit(x, y)
    rows = np.arange(401) % len(y)  # a last batch of one row has no variance: it joins another
    MLPClassifier(layers=layers, max_iter=1, random_state=0).fit(x[rows], y[rows])


def test_what_was_trained_is_an_nnxp_model(tmp_path):
    pandas = pytest.importorskip("pandas")
    x = pandas.DataFrame(draw((60, 2), "float64"), columns=["a", "b"])
    words = np.array(["no", "yes"])[(x.a > x.b).astype(int)]
    found = MLPClassifier((8,), max_iter=50, learning_rate_init=0.1, random_state=0).fit(x, words)
    nnxp.save(found.model_, tmp_path / "m.safetensors")
    back = nnxp.load(tmp_path / "m.safetensors")
    assert (back.columns, back.classes) == (("a", "b"), ("no", "yes"))
    np.testing.assert_allclose(
        nnxp.predict(back, x[["b", "a"]])[:, 0], found.predict_proba(x)[:, 1], rtol=1e-12
    )
    np.testing.assert_allclose(
        nnxp.predict(nnxp.from_sklearn(found, "float64"), x), found.predict_proba(x), atol=1e-12
    )
    one = MLPRegressor(max_iter=2, random_state=0).fit(x, x.a)
    np.testing.assert_allclose(nnxp.predict(nnxp.from_sklearn(one, "float64"), x), one.predict(x))
    with pytest.raises(ConversionError, match="exp"):
        nnxp.from_sklearn(one.set_params(loss="poisson").fit(x, x.a**2))


def test_rows_on_a_disk_are_read_batch_by_batch(tmp_path):
    rows = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", "float32", (40_000, 100))
    rows[:] = draw((100,))
    rows[:, 0] = np.arange(40_000) % 2
    tracemalloc.start()
    try:
        found = MLPClassifier((4,), max_iter=1, batch_size=1000).fit(rows, np.arange(40_000) % 2)
        found.predict(rows)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.model_.dtype == np.float32
    assert peak < rows.nbytes / 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"solver": "rmsprop"},
            "'solver' parameter of MLPClassifier must be a str .* Got 'rmsprop'",
        ),
        ({"max_iter": 0}, "'max_iter' .* an int in the range .* Got 0"),
        ({"dropout": 1.0}, r"'dropout' .* a float in the range \[0.0, 1.0\). Got 1.0"),
        ({"dropout": None}, "'dropout' .* Got None"),
        ({"dropout": 2, "hidden_layer_sizes": ()}, "'dropout' .* Got 2"),
        ({"learning_rate_init": 0}, "'learning_rate_init' .* a float in the range .* Got 0"),
        ({"hidden_layer_sizes": (3, 0)}, "hidden_layer_sizes must be > 0"),
        ({"batch_size": "all"}, "'batch_size' .* an int in the range"),
        ({"early_stopping": True, "validation_fraction": 0.001}, "fewer than two rows"),
        ({"early_stopping": True, "validation_fraction": 0}, "above 0"),
        ({"early_stopping": "yes"}, "'early_stopping' .* Got 'yes'"),
        ({"shuffle": None}, "'shuffle' .* Got None"),
        ({"alpha": np.inf}, "'alpha' .* a float in the range .* Got inf"),
        ({"hidden_layer_sizes": True}, "hidden_layer_sizes must be > 0"),
        ({"class_weight": "equal"}, 'class_weight is "balanced", or a dict'),
        ({"class_weight": {0: -1, 1: 1}}, "class_weight has numbers of 0 or more"),
    ],
)
def test_parameters_that_mean_nothing_are_refused(options, said):
    with pytest.raises(OptionError, match=said):
        MLPClassifier(**options).fit(*FEW)


def test_a_loss_that_is_no_number_is_refused():
    with pytest.raises(TrainingError, match="epoch 1"):
        MLPRegressor(max_iter=2).fit(draw((20, 3), "float64") * 1e200, np.ones(20))
    with pytest.raises(AttributeError, match="partial_fit"):
        _ = MLPRegressor(solver="lbfgs").partial_fit
    with pytest.raises(OptionError, match="from 0 on"):
        MLPRegressor(loss="poisson").fit(draw((20, 3)), -np.ones(20))
    with pytest.raises(OptionError, match=r"'loss' .* Got 'absolute'"):
        MLPRegressor(loss="absolute").fit(draw((20, 3)), np.ones(20))
    with pytest.warns(ConvergenceWarning):
        MLPRegressor(max_iter=1).fit(draw((20, 3)), np.ones(20))


def test_rows_of_another_float_type_go_on_in_the_models():
    x, y = IRIS
    narrow = x.astype("float32")
    for kind, target in ((MLPClassifier, y), (MLPRegressor, x[:, 0])):
        options = {"hidden_layer_sizes": (4,), "random_state": 0}
        more = {"classes": [0, 1, 2]} if kind is MLPClassifier else {}
        for first, then in ((x, narrow), (narrow, x)):
            one = kind(**options).partial_fit(first, target, **more).partial_fit(then, target)
            two = kind(**options).partial_fit(first, target, **more)
            two.partial_fit(then.astype(first.dtype), target)
            assert one.coefs_[0].dtype == first.dtype
            np.testing.assert_array_equal(one.coefs_[0], two.coefs_[0])


def test_a_batch_that_counts_nothing_is_told_by_its_weights():
    x, y = IRIS
    weights = np.arange(150) < 100
    with pytest.raises(TrainingError, match="weights by sample_weight and class_weight are 0"):
        MLPClassifier(batch_size=25, shuffle=False).fit(x, y, sample_weight=weights)
