"""Training of the article's network: an epoch; and steps for compute-sanitizer to look at.

python -m scripts.gpu.step runs small steps, eager, captured and replayed, without tensor cores and
with them. scripts/benchmark.py times steps, and compares their bits.
"""
from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import numpy as np

from gpucnn import losses, models, optim, training, use_backend
from gpucnn.data import Dataset, Loader, fashion_mnist
from scripts.gpu.context import Context
from scripts.gpu.report import Job, Row


def train(context: Context) -> Row:
    """An epoch of the article's network on the packaged images, twice: the same bits?"""
    train_set, test_set = (Dataset(d.images[:context.images], d.labels[:context.images],
                                   d.class_names, d.name) for d in fashion_mnist.load(subset=True))
    backend, n, runs = context.backend, len(train_set), []
    for _ in range(2):
        with use_backend("cupy"):
            model = models.article()
            loader, test_loader = Loader(train_set, 64, seed=0), Loader(test_set, 500)
        model.build((28, 28, 1), seed=0)
        step = training.TrainStep(model, losses.SoftmaxCrossEntropy(), optim.Adam(model))
        started = time.perf_counter()
        for _ in step.epoch(loader):
            pass
        seconds = time.perf_counter() - started
        runs.append((backend.to_numpy(model.flat_data), seconds))
    test = training.evaluate(model, test_loader.epoch())
    equal = bool((runs[0][0] == runs[1][0]).all())
    seconds = runs[1][1]  # the first one compiles
    return {"name": f"epoch of {n} images", "passed": equal and bool(np.isfinite(test.loss)),
            "microseconds": 1e6 * seconds, "first_seconds": runs[0][1],
            "images_per_second": n / seconds, "test_accuracy": test.accuracy,
            "bitwise_equal": equal,
            "note": f"{n / seconds:.0f} images/s, test accuracy {test.accuracy:.4f}, two runs "
                    f"{'equal' if equal else 'DIFFER'}"}


def training_jobs(context: Context) -> Iterator[Job]:
    yield Job("training", "epoch", partial(train, context), 20)


def small_steps(precision: str, count: int = 3, batch: int = 2, size: int = 8) -> list[float]:
    """The losses of a few steps on random images."""
    with use_backend("cupy"):
        model = models.article()
    model.build((size, size, 1), seed=0, precision=precision)
    scale = optim.LossScale(model) if precision == "mixed_float16" else None
    step = training.TrainStep(model, losses.SoftmaxCrossEntropy(loss_scale=scale),
                              optim.Adam(model, loss_scale=scale))
    x, t = step.inputs(np.random.default_rng(0).random((batch, size, size, 1), np.float32),
                       np.arange(batch) % 10)
    for _ in range(count):
        step(x, t)
    return [result.loss for result in step.results()]


if __name__ == "__main__":
    for chosen in ("float32", "mixed_float16"):
        small_steps(chosen)
