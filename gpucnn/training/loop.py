"""The epochs of a training run, which can stop after any step and go on later to the same bits."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np

from gpucnn.backend import Array
from gpucnn.data import Loader
from gpucnn.errors import TrainingError
from gpucnn.geometry import is_int
from gpucnn.models.saving import arrays_of, set_arrays
from gpucnn.schedules import Schedule, constant
from gpucnn.training.evaluation import Evaluation, check_finite, evaluate
from gpucnn.training.results import StepResult
from gpucnn.training.step import TrainStep

STEP_NAMES = ("step", "step_loss", "step_learning_rate")
EPOCH_NAMES = ("epoch", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy")
INT_NAMES = ("step", "epoch")


class StepRecord(NamedTuple):
    """A step as the functions given to Training.run() get it; loss and accuracy are those so far
    in its epoch, weighted by images."""

    epoch: int            # from 1
    step: int             # from 1, of all steps
    learning_rate: float
    loss: float           # of this step's batch, before its update
    images: int           # in this step's batch
    mean_loss: float
    accuracy: float


class EpochRecord(NamedTuple):
    """An epoch, likewise. The validation is None where there is no validation set."""

    epoch: int            # from 1
    epochs: int           # how many there are to be
    step: int             # how many steps were made since the beginning
    train_loss: float     # mean over the images, each before the update of its step
    train_accuracy: float
    validation: Evaluation | None
    best: bool            # whether no epoch before was as good
    seconds: float        # that its steps took, without the validation
    images: int

    def __str__(self) -> str:
        found = "" if self.validation is None else (
            f"validation loss {self.validation.loss:.4f}, validation accuracy "
            f"{self.validation.accuracy:.4f}, ")
        return (f"epoch {self.epoch}/{self.epochs}: loss {self.train_loss:.4f}, accuracy "
                f"{self.train_accuracy:.4f}, {found}"
                f"{self.images / max(self.seconds, 1e-9):.0f} images/s")


class Stopped(Exception):
    """Training.stop() was called; the step that was under way is complete."""


class Training:
    """All epochs: steps, then a look at the validation set; knows where it is and what it saw.

    step: the training step, with its model, loss and optimizer; where it has an average of the
        parameters, that is what the validation looks at.
    loader: of the training set.
    epochs: how many passes over it.
    schedule: of the learning rate (gpucnn.schedules); None leaves the optimizer's as it is.
    validation: a loader of images that are looked at after each epoch, or None.
    patience: stop when the validation loss has not got better in so many epochs; None never stops.

    `history` holds lists: step, step_loss and step_learning_rate for each step, and epoch,
    train_loss, train_accuracy, validation_loss and validation_accuracy for each epoch. It is a
    function of the arguments alone: no times are in it.

    Raises TypeError and ValueError for arguments.
    """

    def __init__(self, step: TrainStep, loader: Loader, epochs: int, *,
                 schedule: Schedule | None = None, validation: Loader | None = None,
                 patience: int | None = None):
        for name, value in (("epochs", epochs), ("patience", patience)):
            if value is not None and (not is_int(value) or value < 1):
                raise ValueError(f"Training: {name} must be an int >= 1, got {value!r}")
        if patience is not None and validation is None:
            raise ValueError("Training: patience needs a validation set, whose loss it watches")
        if not len(loader):
            raise ValueError("Training: the training set has 0 images")
        self.step, self.loader, self.validation = step, loader, validation
        self.model, self.optimizer, self.average = step.model, step.optimizer, step.average
        self.epochs, self.patience = epochs, patience
        self.schedule = constant(step.optimizer.learning_rate) if schedule is None else schedule
        self.history: dict[str, list] = {n: [] for n in (*STEP_NAMES, *EPOCH_NAMES)}
        self.last_good: str | None = None  # what a message may name, if the loss diverges
        self.seconds = 0.0                 # of all steps, those of interrupted runs included
        self.best_step: int | None = None  # the last one of the best epoch
        self.position = 0                  # how many images of this epoch were trained on
        self._loss_sum, self._hits = 0.0, 0  # over them
        self._epoch_seconds = 0.0
        self._stop = False

    @property
    def epoch(self) -> int:
        """How many epochs are complete."""
        return len(self.history["epoch"])

    @property
    def steps(self) -> int:
        """How many steps were made."""
        return len(self.history["step"])

    @property
    def best_epoch(self) -> int | None:
        """The number, from 1, of the first epoch with the least validation loss."""
        losses = self.history["validation_loss"]
        return int(np.argmin(losses)) + 1 if losses else None

    @property
    def complete(self) -> bool:
        """Whether all epochs were made, or patience ended them."""
        best = self.best_epoch
        impatient = self.patience is not None and best is not None and (
            self.epoch - best >= self.patience)
        return self.epoch >= self.epochs or impatient

    def averaged(self) -> AbstractContextManager[None]:
        """A block in which the model has the average of its parameters, where there is one."""
        return self.average.applied() if self.average else nullcontext()

    def stop(self) -> None:
        """Let run() end after the step that is under way, or before the first one: for the handler
        of a signal."""
        self._stop = True

    def run(self, *, on_step: Callable[[StepRecord], Any] = lambda record: None,
            on_epoch: Callable[[EpochRecord], Any] = lambda record: None,
            save: Callable[[], Any] = lambda: None, save_seconds: float = float("inf")) -> None:
        """Make the epochs that are left.

        on_step, on_epoch: called after each; on a GPU on_step comes some steps late. Where
            on_epoch returns True (not merely what counts as true) no further epoch begins.
        save: called after each epoch, also within one when save_seconds have passed, and before
            run() stops; then state() is that of a complete step.

        Raises Stopped after stop(), TrainingError for a loss that is not finite.
        """
        try:
            while not self.complete:
                self._train(on_step, save, save_seconds)
                ended = on_epoch(self._end_epoch()) is True
                save()
                if ended:
                    return
        except Stopped:
            self._stop = False
            self._settle(on_step)
            save()
            raise

    def _train(self, on_step, save, save_seconds) -> None:
        """The steps that are left of this epoch."""
        started = saved = time.perf_counter()
        before = self._epoch_seconds, self.seconds
        results = self.step.epoch(self.loader, self.epoch, self.position, schedule=self._rate)
        for result in results:
            self._receive(result, on_step)
            now = time.perf_counter()
            self._epoch_seconds, self.seconds = (s + now - started for s in before)
            if now - saved >= save_seconds:
                self._settle(on_step)
                save()
                saved = time.perf_counter()

    def _rate(self, before: int) -> float:
        """The learning rate, which TrainStep asks for before each step: the place to stop."""
        self._check_stop()
        return self.schedule(before)

    def _check_stop(self) -> None:
        if self._stop:
            raise Stopped

    def _settle(self, on_step) -> None:
        """Receive the results that are still on their way: those of all steps made."""
        for result in self.step.results():
            self._receive(result, on_step)

    def _receive(self, result: StepResult, on_step) -> None:
        number, in_epoch = self.epoch + 1, self.position // self.loader.batch_size + 1
        rate = float(self.schedule(self.epoch * len(self.loader) + in_epoch - 1))
        check_finite(result.loss, epoch=number, step=in_epoch, learning_rate=rate,
                     last_good=self.last_good)
        self.position += result.images
        self._loss_sum += result.loss * result.images
        self._hits += result.hits
        self._append(STEP_NAMES, (self.steps + 1, result.loss, rate))
        on_step(StepRecord(number, self.steps, rate, result.loss, result.images,
                           self._loss_sum / self.position, self._hits / self.position))

    def _end_epoch(self) -> EpochRecord:
        number, n, seconds = self.epoch + 1, self.position, self._epoch_seconds
        loss, accuracy, found = self._loss_sum / n, self._hits / n, self._validate()
        if found is not None:
            if not np.isfinite(found.loss):
                raise TrainingError(f"the validation loss is {found.loss} after epoch {number}; "
                                    "lower the learning rate or use --clip-norm")
            self._append(EPOCH_NAMES[3:], (found.loss, found.accuracy))
        self._append(EPOCH_NAMES[:3], (number, loss, accuracy))
        self.position, self._loss_sum, self._hits, self._epoch_seconds = 0, 0.0, 0, 0.0
        best = self.best_epoch in (None, number)
        if best:
            self.best_step = self.steps
        return EpochRecord(number, self.epochs, self.steps, loss, accuracy, found, best, seconds, n)

    def _validate(self) -> Evaluation | None:
        if self.validation is None:
            return None
        with self.averaged():
            return evaluate(self.model, self._interruptible(self.validation.epoch()))

    def _interruptible(self, batches: Iterator[tuple[Array, Array]]
                       ) -> Iterator[tuple[Array, Array]]:
        for batch in batches:
            self._check_stop()
            yield batch

    def _append(self, names: tuple[str, ...], values: tuple) -> None:
        for name, value in zip(names, values):
            self.history[name].append(value)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """All that a run needs to go on, beside its arguments: arrays on the host, and numbers.

        Copies, for which it waits for the GPU. To be called where no step is under way: in on_epoch
        and save.
        """
        parts = {"model": {name: a.copy() for name, a in arrays_of(self.model).items()},
                 "training": self.model.training_state(), "optimizer": self.optimizer.state_dict(),
                 "history": {name: np.array(values, np.int64 if name in INT_NAMES else np.float64)
                             for name, values in self.history.items()}}
        if self.average is not None:
            parts["average"] = self.average.state_dict()
        arrays = {f"{part}/{name}": a for part, named in parts.items()
                  for name, a in named.items()}
        return arrays, {"position": self.position, "loss_sum": self._loss_sum, "hits": self._hits,
                        "best_step": self.best_step, "epoch_seconds": self._epoch_seconds,
                        "seconds": self.seconds, "micro_batches": self.step.micro_batches}

    def restore(self, arrays: dict[str, np.ndarray], numbers: dict[str, Any]) -> None:
        """Go on from what state() gave, on this backend or the other.

        Raises CheckpointError, KeyError and ValueError for what is not the state of such a run.
        """
        parts: dict[str, dict[str, np.ndarray]] = {}
        for name, a in arrays.items():
            part, _, rest = name.partition("/")
            parts.setdefault(part, {})[rest] = a
        if ("average" in parts) != (self.average is not None):
            raise ValueError("with an average of the weights, or without one")
        set_arrays(self.model, parts["model"], "the saved state")
        self.model.load_training_state(parts.get("training", {}))
        self.optimizer.load_state_dict(parts["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(parts["average"])
        self.history = {name: parts["history"][name].tolist() for name in self.history}
        self.position, self._hits = int(numbers["position"]), int(numbers["hits"])
        self._loss_sum, self.best_step = float(numbers["loss_sum"]), numbers["best_step"]
        self._epoch_seconds, self.seconds = numbers["epoch_seconds"], numbers["seconds"]
        if self.step.auto_batch:  # which may have raised it
            self.step.micro_batches = max(self.step.micro_batches, int(numbers["micro_batches"]))
