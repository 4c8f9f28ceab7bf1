"""A training step of the article's network as a CUDA graph; and an epoch of training.

python -m scripts.gpu.step runs one small step, for compute-sanitizer to look at.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from gpucnn import losses, models, optim, training, use_backend
from gpucnn.data import Dataset, Loader, fashion_mnist
from scripts.gpu.context import Context
from scripts.gpu.measure import same_bits
from scripts.gpu.report import Job, Row

BATCH = 256
PARTS = ("forward", "loss", "backward", "optimiser")


class Step:
    """Forward, loss, backward and Adam on one batch that stays where it is."""

    def __init__(self, batch: int, size: int = 28):
        with use_backend("cupy"):
            self.model = models.article()
        self.model.build((size, size, 1), seed=0)
        self.optimizer = optim.Adam(self.model)
        self.loss_function = losses.SoftmaxCrossEntropy()
        rng, asarray = np.random.default_rng(0), self.model.backend.asarray
        self.x = asarray(rng.random((batch, size, size, 1), np.float32))
        self.t = asarray(np.arange(batch) % 10)

    def forward(self) -> None:
        self.logits = self.model.forward(self.x, training=True)

    def loss(self) -> None:
        self.value, self.dlogits = self.loss_function(self.logits, self.t)

    def backward(self) -> None:
        self.model.backward_parameters(self.dlogits)

    def optimiser(self) -> None:
        self.optimizer.step()

    def __call__(self) -> Any:
        for part in PARTS:
            getattr(self, part)()
        return self.value

    def state(self) -> list[Any]:
        """What a step changes on the device."""
        return [self.model.flat_data, *self.optimizer.state.values()]


def jobs(context: Context) -> Iterator[Job]:
    for part in PARTS:
        yield Job("step", part, partial(capture_part, context, part))
    yield Job("step", "all", partial(capture_step, context), 4)
    yield Job("step", "without a graph", partial(eager_step, context), 4)


def make_step(context: Context) -> Step:
    return Step(2, 8) if context.quick else Step(context.batch or BATCH)


def capture_part(context: Context, part: str) -> Row:
    """Whether a CUDA graph takes one part of the step, the others being run as usual."""
    step = make_step(context)
    step()  # what is compiled now is not compiled while a graph is captured
    for name in PARTS[:PARTS.index(part)]:
        getattr(step, name)()
    return refusal(context, f"step, {part}", getattr(step, part), lambda replay: replay())


def capture_step(context: Context) -> Row:
    """The whole step as one graph: the same bits as a step without one, and its time."""
    plain, captured = make_step(context), make_step(context)
    before = [a.copy() for a in captured.state()]
    plain()
    row: Row = {}

    def check(replay: Callable[[], Any]) -> None:
        for array, old in zip(captured.state(), before):
            array[...] = old
        replay()
        context.clock.wait()
        same = all(map(same_bits, captured.state(), plain.state()))
        row.update(passed=same, note="captured" if same else "a replayed step has other bits")

    result = refusal(context, "step, all", captured, check) | row
    if row.get("passed"):
        timing = context.clock.time([captured])
        result |= timing.figures() | {"images_per_second": len(captured.x) / timing.median}
    return result


def eager_step(context: Context) -> Row:
    """Without a graph: the host's own time is in it."""
    step = make_step(context)
    timing = context.clock.time_eagerly(step)
    images = len(step.x) / timing.median
    return timing.figures() | {"name": "step, without a graph", "images_per_second": images,
                               "note": f"{images:.0f} images/s", "passed": True}


def refusal(context: Context, name: str, work: Callable[[], Any],
            check: Callable[[Callable[[], Any]], None]) -> Row:
    """What CuPy or CUDA says against capturing `work`. That is shown, and is no failure."""
    row: Row = {"name": name, "captured": True, "note": "captured", "passed": True}
    with context.clock.scope():
        try:
            replay = context.clock.capture(work)
        except Exception as e:
            return row | {"captured": False, "note": f"refused: {type(e).__name__}: {e}"}
        check(replay)
    return row


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
        optimizer, loss = optim.Adam(model), losses.SoftmaxCrossEntropy()
        started = time.perf_counter()
        for x, t in loader.epoch():
            training.train_step(model, loss, optimizer, x, t)
        context.clock.wait()
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


if __name__ == "__main__":
    Step(4, 12)()
