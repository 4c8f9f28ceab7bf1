"""CNNClassifier by scikit-learn's own checks, and by what they do not know: images."""
from __future__ import annotations

import os
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from gpucnn import optim, training
from gpucnn.backend import use_backend
from gpucnn.data import Dataset, Loader
from gpucnn.errors import CheckpointError, TrainingError
from gpucnn.layers import BatchNorm, Conv2D, Dense, Dropout, Flatten, Sequential, Whiten2D
from gpucnn.losses import SoftmaxCrossEntropy

checks = pytest.importorskip("sklearn.utils.estimator_checks", reason="needs scikit-learn: "
                             "pip install 'gpucnn[sklearn]'")
from gpucnn.sklearn import CNNClassifier  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


class RowNet:
    """A function that makes a network, and is called the same in all processes of pytest-xdist."""

    def __call__(self, classes):
        return Sequential([Conv2D(8, (1, 3), padding="same", activation="relu"), Flatten(),
                           Dense(classes)])

    def __repr__(self):
        return "row_net"


def image_net(classes):
    return Sequential([Conv2D(4, 3), BatchNorm(activation="relu"), Flatten(), Dropout(0.2),
                       Dense(classes)])


# None of the checks is expected to fail. float64, because two of them compare probabilities of
# images in batches and alone to within 1e-7, which in float32 is a matter of the BLAS.
@checks.parametrize_with_checks([CNNClassifier(RowNet(), epochs=8, batch_size=32,
                                               learning_rate=0.05, precision="float64")])
def test_scikit_learns_checks(estimator, check):
    check(estimator)


def bars(n=60, side=6):
    """Images (n, side, side, 1) with a bright row, or a bright column; and which."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 60, (n, side, side, 1)).astype(np.uint8)
    names = np.array(["row", "column"])[np.arange(n) % 2]
    for image, name in zip(images, names):
        at = rng.integers(1, side - 1)
        image[at if name == "row" else slice(None), at if name == "column" else slice(None)] = 255
    return images, names


def classifier(**options):
    return CNNClassifier(**{"model": image_net, "epochs": 8, "batch_size": 16,
                            "learning_rate": 0.01, "random_state": 3, **options})


def parameters(fitted):
    return fitted.model_.backend.to_numpy(fitted.model_.flat_data)


def test_images_are_learned(backend):
    x, y = bars()
    fitted = classifier().fit(x[:40], y[:40])
    assert fitted.score(x[40:], y[40:]) >= 0.9
    assert fitted.classes_.tolist() == ["column", "row"]
    assert (fitted.n_features_in_, fitted.image_shape_) == (36, (6, 6, 1))
    p = fitted.predict_proba(x)
    assert p.shape == (60, 2)
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-6)
    losses = fitted.loss_curve_
    assert len(losses) == 8
    assert losses[-1] < losses[0] / 3


def test_images_come_in_several_forms():
    """uint8 is divided by 255; other numbers are taken as they are."""
    x, y = bars()
    p = classifier().fit(x, y).predict_proba(x)
    floats = x / np.float32(255)
    for other, options in ((floats, {}), (floats[..., 0], {}), (floats.astype(np.float64), {}),
                           (x.reshape(60, 36), {"image_shape": (6, 6, 1)}),
                           (floats, {"image_shape": [6, 6, 1]}),
                           (x, {"model": image_net(2).config()})):
        fitted = classifier(**options).fit(other, y)
        np.testing.assert_array_equal(fitted.predict_proba(other), p)
    np.testing.assert_array_equal(fitted.predict_proba(x.reshape(60, 36)), p)  # fit() had images
    black_and_white = [classifier().fit(z, y).predict_proba(z) for z in (x > 100, 1.0 * (x > 100))]
    np.testing.assert_array_equal(*black_and_white)
    assert (classifier().fit(x.astype(int), y).predict_proba(x.astype(int)) != p).any()


def test_training_is_that_of_a_loader(backend):
    """The same order, steps and updates, to the bit; the mean loss counts a short batch less."""
    x, y = bars(20)
    fitted = classifier(epochs=2).fit(x, y)
    seed = int(np.random.RandomState(3).randint(np.iinfo(np.int32).max))
    model = image_net(2)
    model.build((6, 6, 1), seed=seed)
    step = training.TrainStep(model, SoftmaxCrossEntropy(), optim.Adam(model, 0.01))
    loader = Loader(Dataset(x, np.arange(20) % 2 ^ 1, ("column", "row"), "bars"), 16, seed=seed)
    for epoch in range(2):
        results = list(step.epoch(loader, epoch))
        assert fitted.loss_curve_[epoch] == (
            16 * results[0].loss + 4 * results[1].loss) / 20
    np.testing.assert_array_equal(parameters(fitted), backend.to_numpy(model.flat_data))


def test_the_random_state_decides():
    x, y = bars(20)
    a, b, other = (parameters(classifier(epochs=1, random_state=state).fit(x, y))
                   for state in (5, np.random.RandomState(5), 6))
    np.testing.assert_array_equal(a, b)
    assert (a != other).any()
    generator = np.random.RandomState(5)
    one, two = (parameters(classifier(epochs=1, random_state=generator).fit(x, y))
                for _ in range(2))
    np.testing.assert_array_equal(one, a)
    assert (two != a).any()


def test_options_reach_the_training():
    x, y = bars(20)
    options = ({}, {"optimizer": "adamw"}, {"learning_rate": 0.1}, {"schedule": "cosine"},
               {"batch_size": 5}, {"epochs": 1}, {"precision": "float64"})
    found = {parameters(classifier(**{"epochs": 2, **o}).fit(x, y)).tobytes() for o in options}
    assert len(found) == len(options)
    by_function = classifier(epochs=2, learning_rate=None, optimizer=partial(
        optim.Adam, learning_rate=0.01)).fit(x, y)
    assert parameters(by_function).tobytes() in found


def test_a_pickle_is_read_on_either_backend(backend):
    x, y = bars(20)
    fitted = classifier(epochs=1).fit(x, y)
    bytes_of = pickle.dumps(fitted)
    fitted.predict(x)  # pickling has left it as it was
    with use_backend("numpy"):
        again = pickle.loads(bytes_of)
        assert again.model_.backend.name == "numpy"
        np.testing.assert_array_equal(parameters(again), parameters(fitted))
        np.testing.assert_allclose(again.predict_proba(x), fitted.predict_proba(x), rtol=1e-5)
    assert pickle.loads(pickle.dumps(classifier())).get_params() == classifier().get_params()
    state = fitted.__getstate__()
    state["model_"][1].pop("conv1/b")
    with pytest.raises(CheckpointError, match="the pickled network does not fit this model: miss"):
        classifier().__setstate__(state)


def test_grid_search_and_pipelines():
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    x, y = bars()
    pipeline = make_pipeline(StandardScaler(), classifier(epochs=4, image_shape=(6, 6, 1)))
    search = GridSearchCV(pipeline, {"cnnclassifier__learning_rate": [1e-7, 0.02]}, cv=2)
    search.fit(x.reshape(60, 36), y)
    assert search.best_params_ == {"cnnclassifier__learning_rate": 0.02}
    assert search.best_score_ > 0.8


def test_a_whitening_layer_is_fitted_to_the_images():
    x, y = bars()
    fitted = classifier(epochs=1, model=lambda classes: Sequential(
        [Whiten2D(2), Flatten(), Dense(classes)])).fit(x, y)
    layer = fitted.model_.layers[0]
    moments = (layer.forward(x / np.float32(255)) - layer.b.data)[..., :4].reshape(-1, 4)
    np.testing.assert_allclose(np.cov(moments.T, bias=True) + np.outer(*[moments.mean(0)] * 2),
                               np.diag((moments**2).mean(0)), atol=1e-3)


REFUSED = {
    "model": ({"model": "alexnet"}, "model 'alexnet' is not known; use 'article', 'lenet5'"),
    "no name": ({"model": ["lenet5"]}, "model ['lenet5'] is not known"),
    "outputs": ({"model": image_net(3).config()}, "model gives (3,), y has 2 classes; it must"),
    "small": ({"model": "lenet5"}, "images of (6, 6, 1): "),
    "image_shape": ({"image_shape": (6, 5, 1)}, "image_shape (6, 5, 1) does not fit X of shape "
                    "(20, 6, 6, 1); it must be (h, w, c) with as many numbers"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_arguments_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match="^CNNClassifier: ") as caught:
        classifier(**options).fit(*bars(20))
    assert message in str(caught.value)


def test_data_that_does_not_fit_is_refused():
    x, y = bars(20)
    fitted = classifier(epochs=1).fit(x, y)
    with pytest.raises(ValueError, match=r"X has images of \(4, 9\), fit\(\) was given \(6, 6, 1"):
        fitted.predict(x.reshape(20, 4, 9))
    with pytest.raises(ValueError, match=r"X must be \(n, h, w, c\), \(n, h, w\) or \(n, features"):
        fitted.fit(x[..., None], y)
    with pytest.raises(ValueError, match=r"images of \(1, 36, 1\): .*; image_shape says what a"):
        fitted.fit(x.reshape(20, 36), y)
    with pytest.raises(TrainingError, match="loss is nan at epoch 1 step"):
        classifier(learning_rate=1e30, optimizer="sgd").fit(x, y)


def test_scikit_learn_is_imported_by_nothing_else(tmp_path):
    (tmp_path / "sklearn.py").write_text("raise ModuleNotFoundError('no', name='sklearn')")
    code = "import gpucnn, sys; assert 'sklearn' not in sys.modules; import gpucnn.sklearn"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                            check=False, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert result.stderr.splitlines()[-1] == (
        "ImportError: gpucnn.sklearn needs scikit-learn 1.6 or newer; pip install "
        "'gpucnn[sklearn]'")
