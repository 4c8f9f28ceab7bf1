"""What a report shows of a model: its answers, filters, feature maps, and the cost of its layers.

Nothing here changes the model.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from gpucnn import metrics
from gpucnn.backend import use_backend
from gpucnn.data import Dataset, Loader
from gpucnn.layers import AvgPool2D, Conv2D, Layer, MaxPool2D, Whiten2D, from_config
from gpucnn.layers.memory import StepMemory, step_memory
from gpucnn.losses import SoftmaxCrossEntropy
from gpucnn.training import log_probabilities
from gpucnn.training.profiling import StepTimes, time_steps, wrapped_passes

EVALUATION_BATCH = 500
_MOST_STEPS, _MOST_SECONDS = 10, 1.0  # of timing; there is always one step


class Answers(NamedTuple):
    """What a model says of the n images of a test set.

    labels, predictions: (n,). likelihood: (n, classes) probabilities. loss: mean cross-entropy in
    nats. matrix: as gpucnn.metrics.confusion_matrix makes it.
    """

    labels: np.ndarray
    predictions: np.ndarray
    likelihood: np.ndarray
    loss: float
    matrix: np.ndarray

    @property
    def accuracy(self) -> float:
        """The share classified right."""
        return metrics.accuracy(self.matrix)

    def most_wrong(self, most: int) -> np.ndarray:
        """The numbers of misclassified images, the surest mistake first."""
        wrong = np.flatnonzero(self.labels != self.predictions)
        sure = self.likelihood[wrong, self.predictions[wrong]]
        return wrong[np.argsort(-np.nan_to_num(sure), kind="stable")][:most]


def ask(model: Layer, test_set: Dataset) -> Answers:
    """The model's answers to all images. Raises ValueError where the classes do not fit."""
    if model.output_shape != (test_set.n_classes,):
        raise ValueError(f"report: the model gives {model.output_shape}, but {test_set.name} has "
                         f"{test_set.n_classes} classes; give the data that it was trained on")
    with use_backend(model.backend.name):
        loader = Loader(test_set, EVALUATION_BATCH, dtype=model.dtype)
        labels, logarithms = log_probabilities(model, loader.epoch())
    predictions = logarithms.argmax(axis=1)
    return Answers(labels, predictions, np.exp(logarithms),
                   float(-logarithms[np.arange(len(labels)), labels].mean(dtype=np.float64)),
                   metrics.confusion_matrix(labels, predictions, test_set.n_classes))


def first_filters(model: Layer) -> tuple[Layer, np.ndarray] | None:
    """The first layer that convolves, and its filters (kh, kw, c, count); None without one."""
    for layer in model.walk():
        if isinstance(layer, (Conv2D, Whiten2D)):
            w = layer.own_buffers["w"] if isinstance(layer, Whiten2D) else layer.w.data
            return layer, np.asarray(model.backend.to_numpy(w), np.float32)
    return None


def feature_maps(model: Layer, image: np.ndarray) -> dict[Layer, np.ndarray]:
    """What each convolution and pooling layer gives, (h, w, channels), for one uint8 image.

    Without what gives a single pixel, which has nothing to see.
    """
    found: dict[Layer, np.ndarray] = {}
    layers = [layer for layer in model.walk()
              if isinstance(layer, (Conv2D, Whiten2D, MaxPool2D, AvgPool2D))]

    def wrap(layer: Layer, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def kept(*arguments: Any, **options: Any) -> Any:
            y = call(*arguments, **options)
            if y.shape[1] * y.shape[2] > 1:
                found[layer] = np.asarray(model.backend.to_numpy(y[0]), np.float32)
            return y
        return kept

    with wrapped_passes(layers, wrap):
        model.forward(_batch(model, image[None]))
    return found


class Cost(NamedTuple):
    """Of a training step of `batch` images: seconds and bytes, by the paths of layers."""

    batch: int
    times: StepTimes
    memory: StepMemory


def cost(model: Layer, test_set: Dataset, batch: int) -> Cost:
    """Time and memory of a step without an update, on a copy of the model: steps leave traces.

    The batch is halved until it fits beside what a run still has in memory. Raises MemoryError
    where not even one image does.
    """
    batch = min(batch, len(test_set))
    while True:
        try:
            return Cost(batch, _step_times(model, test_set, batch),
                        step_memory(model, model.input_shape, batch))
        except MemoryError:
            if batch == 1:
                raise
            batch = -(-batch // 2)


def _step_times(model: Layer, test_set: Dataset, batch: int) -> StepTimes:
    with use_backend(model.backend.name) as backend:
        copy = from_config(model.config())
        copy.build(model.input_shape, precision=model.precision.name)
        x = _batch(copy, test_set.images[:batch])
        t = backend.asarray(test_set.labels[:batch], np.int64)
        loss = SoftmaxCrossEntropy()
        time_steps(copy, loss, None, x, t, steps=1)  # compiles, and takes memory
        return time_steps(copy, loss, None, x, t, _MOST_STEPS, _MOST_SECONDS)


def _batch(model: Layer, images: np.ndarray) -> Any:
    """uint8 images as the model takes them, as a Loader gives them."""
    with use_backend(model.backend.name):
        labels = np.zeros(len(images), np.int64)
        loader = Loader(Dataset(images, labels, ("",), ""), len(images), dtype=model.dtype)
        return next(iter(loader.epoch()))[0]
