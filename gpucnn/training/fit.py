"""Train a model on data, in one call."""
from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from gpucnn import schedules
from gpucnn.augmentation import Augmentation
from gpucnn.backend import Array
from gpucnn.data import Dataset, Loader
from gpucnn.data.arrays import ArrayLoader
from gpucnn.layers import Layer
from gpucnn.losses import SoftmaxCrossEntropy
from gpucnn.optim import BY_NAME, LossScale, Optimizer
from gpucnn.schedules import Schedule
from gpucnn.training.average import Average
from gpucnn.training.loop import EpochRecord, StepRecord, Training
from gpucnn.training.step import TrainStep

EVALUATION_BATCH = 500
StepCallback = Callable[[StepRecord], Any]
EpochCallback = Callable[[EpochRecord], Any]


def fit(model: Layer, data: Any, *, epochs: int = 10, batch_size: int = 64,
        optimizer: str | Callable[[Layer], Optimizer] = "adam",
        learning_rate: float | None = None, schedule: str | Schedule = "constant",
        loss: Callable | None = None, validation: Any = None, patience: int | None = None,
        average: float | None = None, augmentation: Augmentation | None = None,
        precision: str | None = None, seed: int = 0,
        on_step: StepCallback | Iterable[StepCallback] = (),
        on_epoch: EpochCallback | Iterable[EpochCallback] = (),
        capture: bool = True, auto_batch: bool = False) -> dict[str, list]:
    """Train `model`, which is built for the data where it is not built yet; returns its history.

        history = gpucnn.fit(model, train_set, epochs=3, validation=test_set, on_epoch=print)

    data: a data.Dataset; a Loader, which has a batch size and a seed of its own; or (x, t), arrays
        of (n, h, w, c) images and (n,) labels. uint8 images are divided by 255, others are taken
        as they are; then t may be (n, outputs) targets for another loss.
    epochs: passes over the data. batch_size: images in a step.
    optimizer: a name of optim.BY_NAME, or a function that makes one for the built model.
    learning_rate: of an optimizer by name; None for its own.
    schedule: of the learning rate: a name of schedules.BY_NAME, or step -> rate.
    loss: (outputs, t) -> (mean loss, gradient); None is the softmax cross-entropy. In mixed_float16
        another one, and an optimizer that you make, need an optim.LossScale of your own.
    validation: data that is looked at after each epoch, with labels, in the form of `data`.
    patience: stop when the validation loss has not got better in so many epochs; the model then
        has the parameters of the best one.
    average: the decay of an Average of the parameters, which the model then ends with.
    augmentation: of uint8 images.
    precision: to build the model in (None: float32); a built one has its own.
    seed: of the initial parameters, the order of the images, the augmentation and dropout.
    on_step, on_epoch: functions that get a StepRecord or an EpochRecord. An on_epoch that returns
        True ends the training.
    capture: make CUDA graphs of the steps, on a GPU.
    auto_batch: where memory is short, go on in smaller micro-batches (TrainStep).

    Returns lists, as Training.history. The same arguments give the same bits.

    Raises TypeError and ValueError for arguments, TrainingError for a loss that is not finite.
    """
    _check_name("optimizer", optimizer, BY_NAME)
    _check_name("schedule", schedule, schedules.BY_NAME)
    if not model.built:
        model.build(_image_shape(data), seed=seed, precision=precision or "float32")
    elif precision not in (None, model.precision.name):
        raise ValueError(f"fit: the model was built in {model.precision.name}; leave out "
                         f"precision={precision!r}")
    loader = _loader(data, batch_size, seed, model.dtype, augmentation)
    scale = None
    if isinstance(optimizer, str):
        # Small gradients vanish in float16; bfloat16 has the range of float32.
        scale = LossScale(model) if model.precision.name == "mixed_float16" and not loss else None
        rate = {} if learning_rate is None else {"learning_rate": learning_rate}
        chosen = BY_NAME[optimizer](model, loss_scale=scale, **rate)
    else:
        if learning_rate is not None:
            raise ValueError("fit: learning_rate goes with an optimizer by name; give it to yours")
        chosen = optimizer(model)
        scale = chosen.loss_scale
    if isinstance(schedule, str):
        schedule = schedules.BY_NAME[schedule](chosen.learning_rate, epochs * len(loader))
    step = TrainStep(model, loss or SoftmaxCrossEntropy(loss_scale=scale), chosen, capture=capture,
                     average=None if average is None else Average(model, average),
                     auto_batch=auto_batch)
    training = Training(
        step, loader, epochs, schedule=schedule, patience=patience,
        validation=None if validation is None else
        _loader(validation, EVALUATION_BATCH, None, model.dtype, None))
    final = _Kept(model)
    after_step, after_epoch = _functions("on_step", on_step), _functions("on_epoch", on_epoch)

    def end_epoch(record: EpochRecord) -> bool:
        if patience and record.best:
            with training.averaged():
                final.keep()
        answers = [f(record) for f in after_epoch]  # all are called
        return any(answer is True for answer in answers)

    training.run(on_step=lambda record: [f(record) for f in after_step], on_epoch=end_epoch)
    if average is not None and not patience:
        with training.averaged():
            final.keep()
    final.restore()
    return training.history


class _Kept:
    """What a model is to end with, where that is not what its last step left."""

    def __init__(self, model: Layer):
        self.model = model
        self.arrays = [model.flat_data,
                       *(layer.own_buffers[key] for layer, key in model.buffers().values())]
        self.copies: list[Array] = []

    def keep(self) -> None:
        self.copies = [a.copy() for a in self.arrays]

    def restore(self) -> None:
        if self.copies:
            for a, copy in zip(self.arrays, self.copies):
                a[...] = copy
            self.model.cast_parameters()


def _loader(data: Any, batch_size: int, seed: int | None, dtype: Any,
            augmentation: Augmentation | None) -> Loader:
    if isinstance(data, Loader):
        if augmentation is not None:
            raise ValueError("fit: a Loader has an augmentation of its own; leave out this one")
        return data
    if isinstance(data, Dataset):
        return Loader(data, batch_size, seed=seed, dtype=dtype, augmentation=augmentation)
    x, t = _pair(data)
    if getattr(x, "dtype", None) == np.uint8:
        labels = np.asarray(t)
        names = tuple(map(str, range(int(labels.max(initial=0)) + 1))) \
            if labels.dtype.kind in "iu" else ()
        return Loader(Dataset(x, labels, names, "arrays"), batch_size, seed=seed, dtype=dtype,
                      augmentation=augmentation)
    if augmentation is not None:
        raise TypeError("fit: an augmentation needs uint8 images (0..255), got "
                        f"{getattr(x, 'dtype', type(x).__name__)}")
    return ArrayLoader(x, t, batch_size, seed=seed, dtype=dtype)


def _image_shape(data: Any) -> tuple[int, ...]:
    images = data.images if isinstance(data, (Loader, Dataset)) else _pair(data)[0]
    return tuple(np.shape(images)[1:])  # np.shape() asks a GPU's array for its own


def _pair(data: Any) -> tuple[Any, Any]:
    if not (isinstance(data, (tuple, list)) and len(data) == 2):
        raise TypeError("fit: data must be a data.Dataset, a Loader or (images, labels), got "
                        f"{type(data).__name__}")
    return data[0], data[1]


def _check_name(what: str, value: Any, names: dict[str, Any]) -> None:
    if isinstance(value, str) and value not in names:
        raise ValueError(f"fit: {what} must be a function or one of {', '.join(names)}, got "
                         f"{value!r}")
    if not isinstance(value, str) and not callable(value):
        raise TypeError(f"fit: {what} must be a name or a function, got {value!r}")


def _functions(what: str, given: Any) -> list[Callable]:
    functions = [given] if callable(given) or not isinstance(given, Iterable) else list(given)
    if not all(map(callable, functions)):
        raise TypeError(f"fit: {what} must be a function or several, got {given!r}")
    return functions
