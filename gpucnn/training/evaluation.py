"""What is measured between the steps of training: loss, predictions, probabilities."""
from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from gpucnn.backend import Array, backend_of
from gpucnn.errors import DataError, TrainingError
from gpucnn.layers import Layer
from gpucnn.losses import SoftmaxCrossEntropy, is_soft
from gpucnn.numerics import log_softmax
from gpucnn.ops import as_array
from gpucnn.training import memory
from gpucnn.training.plain import receive

Batches = Iterable[tuple[Array, Array]]


def check_finite(loss: float, *, epoch: int, step: int, learning_rate: float,
                 last_good: str | None) -> None:
    """Raise TrainingError if the loss is nan or infinite.

    epoch and step count from 1; last_good: the last checkpoint, None where none was written.
    """
    if np.isfinite(loss):
        return
    saved = f"last good checkpoint: {last_good}" if last_good else "no checkpoint was written yet"
    raise TrainingError(f"loss is {loss} at epoch {epoch} step {step} (lr {learning_rate:g}); "
                        f"{saved}; lower the learning rate or use --clip-norm")


class Evaluation(NamedTuple):
    """What a model makes of a labelled data set of n images."""

    loss: float               # mean cross-entropy in nats
    accuracy: float           # the share classified right
    labels: np.ndarray        # (n,)
    predictions: np.ndarray   # (n,)
    top5_accuracy: float      # the share whose class is among the five most probable


def evaluate(model: Layer, batches: Batches) -> Evaluation:
    """The model's loss and predictions over all batches of (images, labels).

    Raises DataError for a data set without samples, BackendError where memory runs out, TypeError
    for labels that mixup has made.
    """
    loss, total, among_five = SoftmaxCrossEntropy(), 0.0, 0
    labels: list[np.ndarray] = []
    predictions: list[np.ndarray] = []
    for x, t in batches:
        if not len(t):
            continue
        if is_soft(t):
            raise TypeError(f"evaluate: labels must be integers of shape (N,), got {t.dtype} "
                            f"{t.shape}; evaluate with a Loader that has no mixup")
        x = receive(model, x)
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # the loss shows it
                logits = _logits(model, x)
                value, _ = loss(logits, t)
        except MemoryError as e:
            raise memory.explain(e, model, (loss,), len(x)) from e
        total += float(value) * len(t)
        among_five += int((_ranks(model, logits, t) < 5).sum())
        labels.append(np.asarray(backend_of(t).to_numpy(t)))
        predictions.append(model.backend.to_numpy(logits.argmax(axis=1)))
    if not labels:
        raise DataError("the data set has 0 samples; nothing to evaluate")
    t, p = np.concatenate(labels), np.concatenate(predictions)
    return Evaluation(total / len(t), float((t == p).mean()), t, p, among_five / len(t))


def log_probabilities(model: Layer, batches: Batches) -> tuple[np.ndarray, np.ndarray]:
    """The labels (n,) of all batches of (images, labels), and the logarithms of the probabilities
    that the model gives each class: float32 (n, classes), not finite where the model has diverged.

    Raises DataError for a data set without samples, BackendError where memory runs out.
    """
    labels: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    for x, t in batches:
        labels.append(np.asarray(backend_of(t).to_numpy(t)))
        rows.append(_log_probabilities(model, x))
    if not sum(map(len, labels)):
        raise DataError("the data set has 0 samples; nothing to evaluate")
    return np.concatenate(labels), np.concatenate(rows)


def predict(model: Layer, x: np.ndarray, names: list[str] | None = None) -> np.ndarray:
    """The probability of each class for images x (n, h, w, c) on the host: float32 (n, classes).

    names: how to call the images in a message. Raises ValueError for an image that holds NaN, or
    whose probabilities are not finite; BackendError where memory runs out.
    """
    def called(i: int) -> str:
        return f"image {i} ({names[i]})" if names else f"image {i}"

    x = as_array(model.where, "input", x)
    for i, image in enumerate(x):
        wrong = int(np.isnan(image).sum())
        if wrong:
            raise ValueError(f"{called(i)} holds {wrong} NaN values")
    probabilities = np.exp(_log_probabilities(model, x))
    for i, row in enumerate(probabilities):
        if not np.isfinite(row).all():
            raise ValueError(f"the probabilities of {called(i)} are not finite; the model may have "
                             "diverged: train it again with a lower learning rate")
    return probabilities


def _ranks(model: Layer, logits: Array, t: Array) -> Array:
    """How many classes come before the right one: (n,). Of equal ones the first counts, as in
    argmax; NaN comes before all."""
    xp, labels = model.backend.xp, model.backend.asarray(t)
    right = logits[xp.arange(len(labels)), labels][:, None]
    earlier = xp.arange(logits.shape[1]) < labels[:, None]
    return (~(logits <= right) | ((logits == right) & earlier)).sum(axis=1)


def _log_probabilities(model: Layer, x: Array) -> np.ndarray:
    """On the host."""
    xp = model.backend.xp
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # they show it
            return model.backend.to_numpy(log_softmax(xp, _logits(model, receive(model, x))))
    except MemoryError as e:
        raise memory.explain(e, model, (), len(x)) from e


def _logits(model: Layer, x: Array) -> Array:
    """What the model gives for x; of 16-bit logits, in float32 as losses and probabilities are."""
    logits = model.forward(x)
    return logits.astype(np.float32) if logits.itemsize == 2 else logits
