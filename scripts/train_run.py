"""A run of scripts/train.py in its folder: the training, and what it leaves behind."""
from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from gpucnn import cli, losses, metrics, optim, schedules
from gpucnn.backend import Backend
from gpucnn.config import to_toml
from gpucnn.data import Dataset, Loader
from gpucnn.data.loader import shuffled, to_float
from gpucnn.errors import CheckpointError, DataError
from gpucnn.files import one_line, write_atomically
from gpucnn.layers import Whiten2D
from gpucnn.layers.memory import step_memory
from gpucnn.machine import git_commit
from gpucnn.models import MODELS, load_model, save_model
from gpucnn.report import write_report
from gpucnn.training import Average, TrainStep, evaluate
from gpucnn.training.checkpoints import Checkpoint, Checkpoints, read_checkpoint
from gpucnn.training.loop import EpochRecord, StepRecord, Stopped, Training
from gpucnn.training.resume import check_resumable, environment, fingerprint
from gpucnn.training.run_folder import CHECKPOINTS, CONFIG_FILE
from gpucnn.training.run_log import RunLog
from gpucnn.viz import plot_confusion, plot_curves

EVALUATION_BATCH = 500
WHITENED_IMAGES = 5000
# No settings: what says where a run is, and how to begin it.
NOT_SETTINGS = ("config", "out", "resume", "override", "deterministic", "debug")
# Settings that do not touch the result: they may differ when a run goes on.
FREE = ("data_dir", "decode_ahead", "eager", "keep", "max_pixels", "max_unpacked", "save_every",
        "workers")


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those that a run writes down, as TOML can hold them."""
    def plain(value: Any) -> Any:
        if isinstance(value, tuple):  # the size of images
            return "x".join(map(str, value))
        return str(value) if isinstance(value, Path) else value

    return {name: plain(value) for name, value in vars(arguments).items()
            if name not in NOT_SETTINGS}


class Run:
    """A run in its folder: the training, and what it leaves behind."""

    def __init__(self, arguments: argparse.Namespace, backend: Backend, train_set: Dataset,
                 test_set: Dataset, folder: Path):
        self.arguments, self.backend, self.folder = arguments, backend, folder
        self.checkpoints = Checkpoints(folder / CHECKPOINTS, arguments.keep)
        self.checkpoints.sweep()
        settings = settings_of(arguments)
        self.facts = {
            "settings": {k: v for k, v in settings.items() if k not in FREE},
            "data": {"train_set": fingerprint(train_set), "test_set": fingerprint(test_set)},
            "environment": environment(backend)}
        self.train_set, self.test_set = train_set, test_set
        self.looked_at = "validation" if arguments.validation else "test"  # after each epoch
        checkpoint = self.checkpoints.newest()
        if checkpoint:
            check_resumable(checkpoint, self.facts, deterministic=arguments.deterministic,
                            override={name.replace("-", "_") for name in arguments.override})
        self.training = self._make_training(new=checkpoint is None)
        if checkpoint:
            self._restore(checkpoint)
        self._write_down(settings)
        self.log = RunLog(folder, self.training.steps, self.training.epoch)
        self.bar: Any = None
        self.failed: dict[str, str] = {}  # what could not be written, and why

    def _write_down(self, settings: dict[str, Any]) -> None:
        """The resolved settings, and each start of the run with what it ran on."""
        write_atomically(self.folder / CONFIG_FILE, to_toml(settings).encode())
        path = self.folder / "environment.json"
        try:
            starts = json.loads(path.read_bytes()) if path.exists() else []
        except ValueError as e:
            raise DataError(f"{one_line(path)}: not JSON; delete it to go on without it") from e
        starts.append({"started": datetime.now().isoformat(timespec="seconds"),
                       "command": shlex.join(["train.py", *sys.argv[1:]]),
                       "git_commit": git_commit(), **self.facts["environment"]})
        write_json(path, starts)

    def _make_training(self, new: bool) -> Training:
        arguments = self.arguments
        train_set, validation_set = split(self.train_set, arguments.validation, arguments.seed)
        self.train_images = len(train_set)
        self.steps = self._make_step(train_set, new)
        model = self.steps.model
        loader = Loader(train_set, arguments.batch_size * arguments.accumulate,
                        seed=arguments.seed, dtype=model.dtype,
                        augmentation=cli.augmentation_of(arguments))
        schedule = schedules.BY_NAME[arguments.schedule](arguments.learning_rate,
                                                         arguments.epochs * len(loader))
        if arguments.warm_up:
            schedule = schedules.warm_up(schedule, max(1, round(arguments.warm_up * len(loader))))
        kept_back = f", {len(validation_set):,} for validation" if validation_set else ""
        print(f"{arguments.model}: {sum(p.size for p in model.parameters().values()):,} "
              f"parameters; {len(train_set):,} training and {len(self.test_set):,} test images"
              f"{kept_back}; {arguments.optimizer}, learning rate {arguments.learning_rate:g}, "
              f"batches of {arguments.batch_size}", flush=True)
        looked_at = Loader(validation_set or self.test_set, EVALUATION_BATCH, dtype=model.dtype)
        return Training(self.steps, loader, arguments.epochs, schedule=schedule,
                        validation=looked_at, patience=arguments.patience)

    def _make_step(self, train_set: Dataset, new: bool) -> TrainStep:
        """The model, its loss and its optimizer. new: without a checkpoint to go on from."""
        arguments = self.arguments
        model = MODELS[arguments.model](train_set.n_classes)
        model.build(train_set.images.shape[1:], seed=arguments.seed, precision=arguments.precision)
        if new and isinstance(model.layers[0], Whiten2D):  # its filters come from the images
            model.layers[0].fit(to_float(train_set.images[:WHITENED_IMAGES]))
        # Small gradients vanish in float16; bfloat16 has the range of float32.
        scale = optim.LossScale(model) if arguments.precision == "mixed_float16" else None
        optimizer = optim.BY_NAME[arguments.optimizer](
            model, learning_rate=arguments.learning_rate, weight_decay=arguments.weight_decay,
            clip_norm=arguments.clip_norm, loss_scale=scale)
        return TrainStep(
            model, losses.SoftmaxCrossEntropy(arguments.label_smoothing, loss_scale=scale),
            optimizer, capture=not arguments.eager, micro_batches=arguments.accumulate,
            auto_batch=arguments.auto_batch,
            average=None if arguments.ema is None else Average(model, arguments.ema))

    def _restore(self, checkpoint: Checkpoint) -> None:
        training = self.training
        self._load(checkpoint)
        # The model in the folder may be of an epoch that is to be made again, or of one before.
        best = training.best_step and self.checkpoints.path(training.best_step)
        if self.arguments.patience and best and best.exists():  # there may have been no room for it
            self._load(read_checkpoint(best))
            self._save_model()
            self._load(checkpoint)
        elif training.epoch and not training.position and not self.arguments.patience:
            self._save_model()
        training.last_good = str(checkpoint.path)
        rest = "all is done" if training.complete else (
            f"epoch {training.epoch + 1}, step {training.steps + 1}")
        print(f"going on from {one_line(checkpoint.path)}: {rest}")

    def _load(self, checkpoint: Checkpoint) -> None:
        try:
            self.training.restore(checkpoint.arrays, checkpoint.facts["training"])
        except (CheckpointError, KeyError, TypeError, ValueError) as e:
            raise CheckpointError(f"{one_line(checkpoint.path)} does not fit this run: "
                                  f"{one_line(e)}") from e

    def go(self) -> int:
        """Train, and leave all that comes of it in the folder. Returns the exit code."""
        training = self.training
        with stopping(training) as signals:
            try:
                training.run(on_step=self._on_step, on_epoch=self._on_epoch, save=self._save,
                             save_seconds=self.arguments.save_every)
            except Stopped:
                if not self.failed:
                    print(f"stopped at step {training.steps}; --resume goes on from there")
            finally:
                self._close_bar()
                self._try("log", self.log.flush)
        if self.failed:
            raise CheckpointError("; ".join(self.failed.values()))
        if signals:
            return 128 + signals[0]
        self._finish()
        return 0

    def _on_step(self, record: StepRecord) -> None:
        from tqdm import tqdm
        self.log.step(record)
        if self.bar is None:
            # tqdm's own format has no room for loss and accuracy in a terminal of 80 columns.
            self.bar = tqdm(
                total=self.train_images, initial=self.training.position - record.images,
                desc=f"epoch {record.epoch}/{self.arguments.epochs}", unit=" images", leave=False,
                bar_format="{desc} |{bar}| {remaining} left, {rate_fmt}{postfix}", disable=None)
        self.bar.set_postfix_str(f"loss {record.mean_loss:.4f}, accuracy {record.accuracy:.4f}",
                                 refresh=False)
        self.bar.update(record.images)

    def _on_epoch(self, record: EpochRecord) -> None:
        self._close_bar()
        self._try("log", lambda: self.log.epoch(record))
        if record.best or not self.arguments.patience:
            self._try("model", self._save_model)
        try:
            print(str(record).replace("validation", self.looked_at), flush=True)
        except BrokenPipeError as e:  # the reader of our output has gone, which ends the run
            self._save()
            raise cli.Unfinished from e

    def _save_model(self) -> None:
        with self.training.averaged():
            save_model(self.training.model, self.folder / cli.MODEL_FILE,
                       class_names=self.train_set.class_names, trained_on=self.train_set.name)

    def _save(self) -> None:
        """A checkpoint. Training goes on without it, where there is no room for example."""
        arrays, numbers = self.training.state()
        self._try("log", self.log.flush)
        path = self._try("checkpoint", lambda: self.checkpoints.save(
            self.training.steps, arrays, self.facts | {"training": numbers},
            self.training.best_step))
        if path:
            self.training.last_good = str(path)

    def _try(self, what: str, write: Callable[[], Any]) -> Any:
        """Of an error, a warning; it is the run's end too, unless a later try goes well."""
        try:
            written = write()
        except (CheckpointError, OSError) as e:
            self.failed[what] = one_line(e)
            print(f"warning: {self.failed[what]}; training goes on", file=sys.stderr)
            return None
        self.failed.pop(what, None)
        return written

    def _close_bar(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _finish(self) -> None:
        """The figures and pictures, of the model as it was saved."""
        arguments, training, test_set = self.arguments, self.training, self.test_set
        model, _ = load_model(self.folder / cli.MODEL_FILE)
        test = evaluate(model, Loader(test_set, EVALUATION_BATCH, dtype=model.dtype).epoch())
        history: dict[str, Any] = {name.replace("validation", self.looked_at): values
                                   for name, values in training.history.items()}
        history["steps_per_epoch"] = len(training.loader)
        matrix = metrics.confusion_matrix(test.labels, test.predictions, test_set.n_classes)
        plot_curves(history, self.folder / "curves.png")
        plot_confusion(matrix, test_set.class_names, self.folder / "confusion.png")
        write_json(self.folder / "history.json", history)
        versions = {**self.facts["environment"]}
        figures = {
            **settings_of(arguments),
            "test_accuracy": test.accuracy, "test_loss": test.loss, "seconds": training.seconds,
            "images_per_second": self.train_images * training.epoch / training.seconds,
            "step_memory_bytes": step_memory(model, model.input_shape, arguments.batch_size,
                                             training.optimizer).peak,
            "epochs_made": training.epoch, "best_epoch": training.best_epoch,
            "train_set": self.train_set.name, "train_images": self.train_images,
            "test_images": len(test_set),
            "micro_batches": self.steps.micro_batches,
            "cuda_graphs": self.steps.capture and self.steps.not_captured is None,
            "backend": versions.pop("backend"), "device": versions.pop("device"),
            "cpu": versions.pop("cpu"), "versions": versions}
        write_json(self.folder / "metrics.json", figures)
        write_report(self.folder, model, test_set, history=history, metrics=figures)
        if arguments.validation:
            print(f"test loss {test.loss:.4f}, test accuracy {test.accuracy:.4f}, after epoch "
                  f"{training.best_epoch if arguments.patience else training.epoch}")


@contextmanager
def stopping(training: Training) -> Iterator[list[int]]:
    """SIGINT and SIGTERM let the step that is under way end, and the second one does not wait.

    Yields a list, in which the signal that came is found.
    """
    came: list[int] = []

    def stop(number: int, frame: Any) -> None:
        came.append(number)
        training.stop()
        for each, handler in before.items():
            signal.signal(each, handler)
        # print() may be under way, on the same stream; and its reader may be gone.
        with suppress(OSError):
            os.write(sys.stderr.fileno(),
                     b"gpucnn: stopping; again stops at once, without saving\n")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def split(dataset: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset | None]:
    """The training images, and those kept back for validation: a random share of them.

    Raises UsageError for a share that leaves no image on either side.
    """
    if not share:
        return dataset, None
    n = len(dataset)
    count = round(n * share)
    if not 0 < count < n:
        raise cli.UsageError(f"--validation: {share:g} of {n:,} training images is {count:,}; it "
                             "must leave at least one image for each of validation and training")
    order = shuffled(n, seed, 2**32)  # no epoch has that number

    def part(numbers: np.ndarray, name: str) -> Dataset:
        return replace(dataset.select(np.sort(numbers)), name=name)

    return part(order[count:], dataset.name), part(order[:count], f"{dataset.name} (validation)")


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=1).encode())
