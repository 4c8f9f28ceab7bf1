"""gpucnn's networks as a scikit-learn classifier: in pipelines, grid searches, cross-validation."""
from __future__ import annotations

import math
from typing import Any

import numpy as np

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_array, check_is_fitted, check_X_y, validate_data
except ImportError as e:
    raise ImportError("gpucnn.sklearn needs scikit-learn 1.6 or newer; "
                      "pip install 'gpucnn[sklearn]'") from e

from gpucnn import training
from gpucnn.data.loader import to_float
from gpucnn.layers import Layer, Whiten2D, from_config
from gpucnn.models import MODELS
from gpucnn.models.saving import arrays_of, build_described, describe, set_arrays

_WHITENED_IMAGES = 5000


class CNNClassifier(ClassifierMixin, BaseEstimator):
    """A convolutional network that is trained with softmax cross-entropy.

        CNNClassifier("article", epochs=5, image_shape=(8, 8, 1), random_state=0).fit(X, y)

    X: images (n, h, w, c) or (n, h, w), or rows of a table (n, features). uint8 is divided by 255;
        other numbers are taken as they are, so scale them to about 0 to 1, or to mean 0 and
        standard deviation 1.
    y: (n,), names or numbers of the classes.

    model: one of gpucnn.models.MODELS by name, a function that makes a network with so many
        outputs, or the config() of a network that has them.
    epochs, batch_size, optimizer, learning_rate, schedule: as in gpucnn.fit().
    image_shape: what a row of X is as an image, (h, w, c), in memory order; None for
        (1, features, 1), a line of pixels.
    precision: as in Layer.build().
    random_state: of the first weights, the order of the images and dropout; with an int the same
        machine gives the same network.

    The backend is that of gpucnn.get_backend() in fit(). A pickle holds the arrays and how to
    build the network, and takes the backend in use where it is read; as always, read only pickles
    that you trust. There are no sample weights.

    Attributes: classes_ (classes,), sorted; n_features_in_, numbers in an image; image_shape_;
    model_, the network; loss_curve_, the mean loss of each epoch in nats.
    """

    def __init__(self, model: Any = "article", *, epochs: int = 3, batch_size: int = 64,
                 optimizer: Any = "adam", learning_rate: float | None = None,
                 schedule: Any = "constant", image_shape: tuple[int, int, int] | None = None,
                 precision: str = "float32", random_state: Any = None):
        self.model = model
        self.epochs = epochs
        self.batch_size = batch_size
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.schedule = schedule
        self.image_shape = image_shape
        self.precision = precision
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> CNNClassifier:
        """Train a new network. Raises ValueError and TypeError for data and arguments that do not
        fit, TrainingError where the loss is not finite."""
        array, y = check_X_y(X, y, allow_nd=True, estimator=self)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        self.image_shape_ = self._shape_of(array)
        images = self._images(X, array, reset=True)
        seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        model = self._build(seed, images)
        history = training.fit(
            model, (images, labels), epochs=self.epochs, batch_size=self.batch_size,
            optimizer=self.optimizer, learning_rate=self.learning_rate, schedule=self.schedule,
            seed=seed)
        self.model_, self.loss_curve_ = model, history["train_loss"]
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probability of each of classes_: (n, classes) of float32, or else of float64."""
        check_is_fitted(self)
        array = check_array(X, allow_nd=True, estimator=self, input_name="X")
        images = self._images(X, array, reset=False)
        return np.concatenate([
            training.predict(self.model_, _floats(images[start:start + self.batch_size]))
            for start in range(0, len(images), self.batch_size)])

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class of each image: (n,), of those in y."""
        probabilities = self.predict_proba(X)  # says first where fit() was not called
        return self.classes_[probabilities.argmax(axis=1)]

    def _build(self, seed: int, images: np.ndarray) -> Layer:
        n = len(self.classes_)
        if isinstance(self.model, dict):
            model = from_config(self.model)
        elif callable(self.model):
            model = self.model(n)
        elif isinstance(self.model, str) and self.model in MODELS:
            model = MODELS[self.model](n)
        else:
            raise ValueError(f"CNNClassifier: model {self.model!r} is not known; use "
                             f"{', '.join(map(repr, MODELS))}, a function, or a config()")
        try:
            model.build(self.image_shape_, seed=seed, precision=self.precision)
        except ValueError as e:
            raise ValueError(f"CNNClassifier: images of {self.image_shape_}: {e}; image_shape says "
                             "what a row of X is, model which network takes it") from e
        if model.output_shape != (n,):
            raise ValueError(f"CNNClassifier: model gives {model.output_shape}, y has {n} classes; "
                             f"it must give ({n},)")
        first = next(iter(model.children().values()), None)
        if isinstance(first, Whiten2D):  # its filters come from the images
            first.fit(_floats(images[:_WHITENED_IMAGES]))
        return model

    def _shape_of(self, array: np.ndarray) -> tuple[int, ...]:
        """Of the images that X holds."""
        if array.ndim not in (2, 3, 4):
            raise ValueError("CNNClassifier: X must be (n, h, w, c), (n, h, w) or (n, features), "
                             f"got {array.shape}")
        if array.ndim == 2 and self.image_shape is None:
            return 1, array.shape[1], 1
        shape = (*array.shape[1:], 1)[:3] if array.ndim > 2 else tuple(self.image_shape or ())
        if len(shape) != 3 or math.prod(shape) != math.prod(array.shape[1:]) or (
                self.image_shape is not None and shape != tuple(self.image_shape)):
            raise ValueError(f"CNNClassifier: image_shape {self.image_shape} does not fit X of "
                             f"shape {array.shape}; it must be (h, w, c) with as many numbers")
        return shape

    def _images(self, X: Any, array: np.ndarray, reset: bool) -> np.ndarray:
        """array, which is X once it is checked, as images: of uint8, or of floats as they are."""
        rows = X if array.ndim == 2 else array.reshape(len(array), -1)
        validate_data(self, rows, reset=reset, skip_check_array=True)  # number of features, names
        if array.ndim > 2 and (*array.shape[1:], 1)[:3] != self.image_shape_:
            raise ValueError(f"CNNClassifier: X has images of {array.shape[1:]}, fit() was given "
                             f"{self.image_shape_}")
        if array.dtype != np.uint8:
            wide = np.float64 if self.precision == "float64" else np.float32
            array = array.astype(wide, copy=False)
        return array.reshape(-1, *self.image_shape_)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        if "model_" in state:  # arrays of a GPU, and functions, cannot be pickled
            state["model_"] = describe(self.model_), arrays_of(self.model_)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "model_" in state:
            description, arrays = state["model_"]
            self.model_ = build_described(description)
            set_arrays(self.model_, arrays, "the pickled network")


def _floats(images: np.ndarray) -> np.ndarray:
    return to_float(images) if images.dtype == np.uint8 else images
