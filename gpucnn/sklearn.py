"""gpucnn's networks as a scikit-learn classifier: in pipelines, grid searches, cross-validation."""
from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
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

from gpucnn import optim, training
from gpucnn.data.loader import to_float
from gpucnn.layers import Layer, Whiten2D, from_config
from gpucnn.losses import SoftmaxCrossEntropy
from gpucnn.models import MODELS
from gpucnn.models.saving import arrays_of, build_described, describe, set_arrays

OPTIMIZERS: dict[str, Callable[..., optim.Optimizer]] = {
    "sgd": optim.GradientDescent, "momentum": optim.Momentum,
    "nesterov": partial(optim.Momentum, nesterov=True), "rmsprop": optim.RMSProp,
    "adam": optim.Adam, "adamw": optim.AdamW}
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
    epochs, batch_size: how often the network sees each image, and how many at a time.
    optimizer: "adam", "adamw", "momentum", "nesterov", "rmsprop" or "sgd", or a function that
        takes the model and makes an optimizer, such as a class of gpucnn.optim.
    learning_rate: None for the optimizer's own.
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
                 image_shape: tuple[int, int, int] | None = None, precision: str = "float32",
                 random_state: Any = None):
        self.model = model
        self.epochs = epochs
        self.batch_size = batch_size
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.image_shape = image_shape
        self.precision = precision
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> CNNClassifier:
        """Train a new network. Raises ValueError and TypeError for data and arguments that do not
        fit, TrainingError where the loss is not finite."""
        for name in ("epochs", "batch_size"):
            _check_count(name, getattr(self, name))
        array, y = check_X_y(X, y, allow_nd=True, estimator=self)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        self.image_shape_ = self._shape_of(array)
        images = self._images(X, array, reset=True)
        seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        self.model_ = self._build(seed, images)
        self.loss_curve_ = self._train(seed, images, labels)
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probability of each of classes_: float32 (n, classes)."""
        check_is_fitted(self)
        array = check_array(X, allow_nd=True, estimator=self, input_name="X")
        images = self._images(X, array, reset=False)
        return np.concatenate([training.predict(self.model_, images[i:i + self.batch_size])
                               for i in range(0, len(images), self.batch_size)])

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
            first.fit(images[:_WHITENED_IMAGES])
        return model

    def _train(self, seed: int, images: np.ndarray, labels: np.ndarray) -> list[float]:
        """The mean loss of each epoch."""
        model = self.model_
        scale = optim.LossScale(model) if self.precision == "mixed_float16" else None
        rate = {} if self.learning_rate is None else {"learning_rate": self.learning_rate}
        optimizer = self._optimizer()(model, loss_scale=scale, **rate)
        step = training.TrainStep(model, SoftmaxCrossEntropy(loss_scale=scale), optimizer)
        losses = []
        for epoch in range(self.epochs):
            # As Loader.order(): raw numbers of a bit generator stay the same in all of NumPy.
            keys = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(len(images))
            order = np.argsort(keys, kind="stable")
            for start in range(0, len(order), self.batch_size):
                batch = order[start:start + self.batch_size]
                step(images[batch], labels[batch])
            results = step.results()
            for number, result in enumerate(results, 1):
                training.check_finite(result.loss, epoch=epoch + 1, step=number, last_good=None,
                                      learning_rate=optimizer.learning_rate)
            losses.append(sum(r.loss * r.images for r in results) / len(images))
        return losses

    def _optimizer(self) -> Callable[..., optim.Optimizer]:
        if callable(self.optimizer):
            return self.optimizer
        if isinstance(self.optimizer, str) and self.optimizer in OPTIMIZERS:
            return OPTIMIZERS[self.optimizer]
        raise ValueError(f"CNNClassifier: optimizer {self.optimizer!r} is not known; use "
                         f"{', '.join(map(repr, OPTIMIZERS))}, or a function")

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
        """array, which is X once it is checked, as images of floats."""
        rows = X if array.ndim == 2 else array.reshape(len(array), -1)
        validate_data(self, rows, reset=reset, skip_check_array=True)  # number of features, names
        if array.ndim > 2 and (*array.shape[1:], 1)[:3] != self.image_shape_:
            raise ValueError(f"CNNClassifier: X has images of {array.shape[1:]}, fit() was given "
                             f"{self.image_shape_}")
        wide = np.float64 if self.precision == "float64" else np.float32
        images = to_float(array) if array.dtype == np.uint8 else array.astype(wide, copy=False)
        return images.reshape(-1, *self.image_shape_)

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


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"CNNClassifier: {name} must be an int >= 1, got {value!r}")
