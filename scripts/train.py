"""Train a network on Fashion-MNIST and leave the model, its curves and its metrics in a folder."""
from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for python scripts/train.py

import numpy as np

import gpucnn
from gpucnn import cli, losses, metrics, optim, schedules
from gpucnn.backend import Backend
from gpucnn.data import Augmentation, Dataset, Loader
from gpucnn.data.loader import to_float
from gpucnn.files import write_atomically
from gpucnn.layers import Whiten2D
from gpucnn.models import MODELS, save_model
from gpucnn.precision import PRECISIONS
from gpucnn.training import TrainStep, check_finite, evaluate
from gpucnn.viz import plot_confusion, plot_curves, require_matplotlib

OPTIMIZERS = {
    "sgd": (optim.GradientDescent, {}),
    "momentum": (optim.Momentum, {}),
    "nesterov": (optim.Momentum, {"nesterov": True}),
    "rmsprop": (optim.RMSProp, {}),
    "adam": (optim.Adam, {}),
    "adamw": (optim.AdamW, {}),
}
SCHEDULES = {
    "constant": lambda rate, steps: schedules.constant(rate),
    "step": lambda rate, steps: schedules.step_decay(rate, -(-steps // 3)),
    "cosine": schedules.cosine,
    "one-cycle": schedules.one_cycle,
}
EVALUATION_BATCH = 500
WHITENED_IMAGES = 5000


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="train.py", description=__doc__)
    cli.add_data_arguments(p)
    p.add_argument("--model", choices=MODELS, default="article",
                   help="the network (default: %(default)s)")
    p.add_argument("--epochs", type=cli.positive_int, default=3, help="(default: %(default)s)")
    p.add_argument("--batch-size", type=cli.positive_int, default=64, help="(default: %(default)s)")
    p.add_argument("--optimizer", choices=OPTIMIZERS, default="adam", help="(default: %(default)s)")
    p.add_argument("--learning-rate", type=cli.positive_float, metavar="ETA",
                   help="(default: the optimizer's own)")
    p.add_argument("--schedule", choices=SCHEDULES, default="constant",
                   help="of the learning rate, step by step: as it is, a tenth of it after each "
                        "third of the epochs, down to 0 along a cosine, or up and down in one "
                        "cycle (default: %(default)s)")
    p.add_argument("--warm-up", type=cli.positive_float, metavar="EPOCHS",
                   help="begin with small learning rates for so long; 0.5 is half an epoch "
                        "(default: do not)")
    p.add_argument("--precision", choices=PRECISIONS, default="float32",
                   help="of activations and products; the mixed ones need a GPU, and tf32 is "
                        "float32 where there are no tensor cores (default: %(default)s)")
    p.add_argument("--eager", action="store_true",
                   help="launch each kernel of a step by itself; by default a step is one CUDA "
                        "graph on a GPU")
    p.add_argument("--label-smoothing", type=cli.share, default=0.0, metavar="S",
                   help="share of each label given to all classes (default: %(default)s)")
    p.add_argument("--clip-norm", type=cli.positive_float, metavar="NORM",
                   help="scale gradients down to this joint norm (default: do not)")
    p.add_argument("--crop", type=cli.positive_int, metavar="P", default=0,
                   help="shift each training image by up to P pixels, at random (default: do not)")
    p.add_argument("--flip", action="store_true",
                   help="mirror half of the training images, chosen at random")
    p.add_argument("--cutout", type=cli.positive_int, metavar="K", default=0,
                   help="blacken a square of K x K pixels in each training image (default: do not)")
    p.add_argument("--seed", type=cli.seed, default=0, help="of initial weights, shuffling, "
                   "augmentation and dropout (default: %(default)s)")
    p.add_argument("--train-images", type=cli.positive_int, metavar="N",
                   help="train on the first N images only")
    p.add_argument("--test-images", type=cli.positive_int, metavar="N",
                   help="test on the first N images only")
    p.add_argument("--out", type=Path, metavar="DIR",
                   help="the run folder (default: a new one under runs/)")
    return p


def main(arguments: argparse.Namespace) -> None:
    backend = cli.choose_backend()
    cli.require_precision(arguments.precision, backend)
    require_tqdm()
    require_matplotlib()
    train_set, test_set = cli.load_data(arguments)
    train_set = first(train_set, arguments.train_images)
    test_set = first(test_set, arguments.test_images)
    with run_folder(arguments) as run:
        train(arguments, backend, train_set, test_set, run)
    print(run)


def train(arguments: argparse.Namespace, backend: Backend, train_set: Dataset, test_set: Dataset,
          run: Path) -> None:
    """Train as the arguments say, and leave all that comes of it in the folder `run`."""
    model = MODELS[arguments.model](train_set.n_classes)
    model.build(train_set.images.shape[1:], seed=arguments.seed, precision=arguments.precision)
    if isinstance(model.layers[0], Whiten2D):  # its filters come from the images
        model.layers[0].fit(to_float(train_set.images[:WHITENED_IMAGES]))
    # Small gradients vanish in float16; bfloat16 has the range of float32.
    scale = optim.LossScale(model) if arguments.precision == "mixed_float16" else None
    loss = losses.SoftmaxCrossEntropy(arguments.label_smoothing, loss_scale=scale)
    make_optimizer, options = OPTIMIZERS[arguments.optimizer]
    if arguments.learning_rate:
        options = options | {"learning_rate": arguments.learning_rate}
    optimizer = make_optimizer(model, clip_norm=arguments.clip_norm, loss_scale=scale, **options)
    steps = TrainStep(model, loss, optimizer, capture=not arguments.eager)
    loader = Loader(train_set, arguments.batch_size, seed=arguments.seed, dtype=model.dtype,
                    augmentation=Augmentation(crop=arguments.crop, flip=arguments.flip,
                                              cutout=arguments.cutout))
    test_loader = Loader(test_set, EVALUATION_BATCH, dtype=model.dtype)
    rate = optimizer.learning_rate
    schedule = SCHEDULES[arguments.schedule](rate, arguments.epochs * len(loader))
    if arguments.warm_up:
        schedule = schedules.warm_up(schedule, max(1, round(arguments.warm_up * len(loader))))
    print(f"{arguments.model}: {sum(p.size for p in model.parameters().values()):,} parameters; "
          f"{len(train_set):,} training and {len(test_set):,} test images; "
          f"{arguments.optimizer}, learning rate {rate:g}, batches of "
          f"{arguments.batch_size}")

    history: dict[str, Any] = {name: [] for name in (
        "step", "step_loss", "step_learning_rate", "epoch", "train_loss", "train_accuracy",
        "test_loss", "test_accuracy")}
    history["steps_per_epoch"] = len(loader)
    training_seconds, last_good = 0.0, None
    for epoch in range(1, arguments.epochs + 1):
        started = time.perf_counter()
        train_loss, train_accuracy = train_epoch(
            steps, schedule, loader, epoch, arguments, history, last_good)
        training_seconds += time.perf_counter() - started
        test = evaluate(model, test_loader.epoch())
        for name, value in (("epoch", epoch), ("train_loss", train_loss),
                            ("train_accuracy", train_accuracy), ("test_loss", test.loss),
                            ("test_accuracy", test.accuracy)):
            history[name].append(value)
        save_model(model, run / cli.MODEL_FILE, class_names=train_set.class_names,
                   trained_on=train_set.name)
        last_good = str(run / cli.MODEL_FILE)
        print(f"epoch {epoch}/{arguments.epochs}: loss {train_loss:.4f}, accuracy "
              f"{train_accuracy:.4f}, test loss {test.loss:.4f}, test accuracy "
              f"{test.accuracy:.4f}, {len(train_set) * epoch / training_seconds:.0f} images/s",
              flush=True)

    matrix = metrics.confusion_matrix(test.labels, test.predictions, test_set.n_classes)
    plot_curves(history, run / "curves.png")
    plot_confusion(matrix, test_set.class_names, run / "confusion.png")
    write_json(run / "history.json", history)
    write_json(run / "metrics.json", {
        "test_accuracy": test.accuracy, "test_loss": test.loss, "seconds": training_seconds,
        "images_per_second": len(train_set) * arguments.epochs / training_seconds,
        "backend": backend.name, "device": cli.device_name(backend), "model": arguments.model,
        "epochs": arguments.epochs, "batch_size": arguments.batch_size,
        "optimizer": arguments.optimizer, "learning_rate": rate,
        "schedule": arguments.schedule, "warm_up": arguments.warm_up,
        "label_smoothing": arguments.label_smoothing, "clip_norm": arguments.clip_norm,
        "precision": arguments.precision,
        "cuda_graphs": steps.capture and steps.not_captured is None,
        "crop": arguments.crop, "flip": arguments.flip, "cutout": arguments.cutout,
        "seed": arguments.seed, "train_set": train_set.name, "train_images": len(train_set),
        "test_images": len(test_set), "versions": {
            "gpucnn": gpucnn.__version__, "python": platform.python_version(),
            "numpy": np.__version__, backend.name: backend.xp.__version__}})


def train_epoch(steps, schedule, loader, epoch, arguments, history, last_good):
    """One pass over the training set: its mean loss and accuracy."""
    from tqdm import tqdm
    seen = hits = 0
    total = 0.0
    # tqdm's own format has no room for loss and accuracy in a terminal of 80 columns.
    with tqdm(total=len(loader.dataset), desc=f"epoch {epoch}/{arguments.epochs}", unit=" images",
              bar_format="{desc} |{bar}| {remaining} left, {rate_fmt}{postfix}", disable=None,
              leave=False) as bar:
        before = (epoch - 1) * len(loader)
        results = steps.epoch(loader, epoch - 1, schedule=schedule)
        for step, result in enumerate(results, 1):
            rate = schedule(before + step - 1)
            check_finite(result.loss, epoch=epoch, step=step, last_good=last_good,
                         learning_rate=rate)
            for name, value in (("step", before + step), ("step_loss", result.loss),
                                ("step_learning_rate", rate)):
                history[name].append(value)
            seen, hits = seen + result.images, hits + result.hits
            total += result.loss * result.images
            bar.set_postfix_str(f"loss {total / seen:.4f}, accuracy {hits / seen:.4f}",
                                refresh=False)
            bar.update(result.images)
    return total / seen, hits / seen


def require_tqdm() -> None:
    """Raise ImportError with the remedy where tqdm is missing."""
    try:
        import tqdm  # noqa: F401
    except ImportError as e:
        raise ImportError("training needs tqdm; pip install 'gpucnn[train]'") from e


def first(dataset: Dataset, n: int | None) -> Dataset:
    return Dataset(dataset.images[:n], dataset.labels[:n], dataset.class_names, dataset.name)


@contextmanager
def run_folder(arguments: argparse.Namespace) -> Iterator[Path]:
    """--out, or a new folder named by the time; gone again if nothing is written into it.

    Raises FileExistsError where a run is there.
    """
    if arguments.out is None:
        runs = Path("runs")
        name = f"{arguments.model}-{datetime.now():%Y%m%d-%H%M%S}"
        numbered = (runs / (name if n == 1 else f"{name}-{n}") for n in range(1, 1000))
        run = next(r for r in numbered if not r.exists())
    else:
        run = arguments.out
        if (run / cli.MODEL_FILE).exists():
            raise FileExistsError(f"{run} already holds a run; choose another --out")
    new = [folder for folder in (run, *run.parents) if not folder.exists()]
    run.mkdir(parents=True, exist_ok=True)
    try:
        yield run
    finally:
        with suppress(OSError):  # it holds something
            for folder in new:
                folder.rmdir()


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=1).encode())


if __name__ == "__main__":
    cli.run(main, parser())
