"""A training step of the article's network as a CUDA graph, in each mode; and an epoch.

python -m scripts.gpu.step runs two small steps, for compute-sanitizer to look at: without tensor
cores and with them.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from gpucnn import losses, models, optim, training, use_backend
from gpucnn.data import Dataset, Loader, fashion_mnist
from gpucnn.layers import Dropout
from scripts.gpu.context import Context
from scripts.gpu.measure import same_bits
from scripts.gpu.report import Job, Row

BATCH = 256
PARTS = ("forward", "loss", "backward", "optimiser")
LOSS_SCALE = 2.0**10
ON_THE_HOST = ("the update is made even where the loss is not finite: train_step() looks at it on "
               "the host")


class Step:
    """Forward, loss, backward and Adam on one batch that stays where it is."""

    def __init__(self, batch: int, size: int = 28, precision: str = "float32"):
        with use_backend("cupy"):
            self.model = models.article()
        self.model.build((size, size, 1), seed=0, precision=precision)
        scale = optim.LossScale(self.model, LOSS_SCALE) if precision == "mixed_float16" else None
        self.optimizer = optim.Adam(self.model, loss_scale=scale)
        self.loss_function = losses.SoftmaxCrossEntropy(loss_scale=scale)
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

    def state(self) -> dict[str, np.ndarray]:
        """All that a step changes on the device, copied to the host."""
        arrays = {"parameters": self.model.flat_data, "gradients": self.model.flat_grad,
                  "cast": self.model.flat_cast, "loss": getattr(self, "value", None),
                  **{path: layer.own_buffers[name]
                     for path, (layer, name) in self.model.buffers().items()}}
        return self.optimizer.state_dict() | {
            name: self.model.backend.to_numpy(a) for name, a in arrays.items() if a is not None}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """As it was when state() was taken; where arrays lie does not change."""
        asarray = self.model.backend.asarray
        self.model.flat_data[...] = asarray(state["parameters"])
        self.model.cast_parameters()
        for path, (layer, name) in self.model.buffers().items():
            layer.own_buffers[name][...] = asarray(state[path])
        self.optimizer.load_state_dict({name: state[name] for name in self.optimizer.state_dict()})
        for layer in self.model.walk():
            if isinstance(layer, Dropout):
                layer.step = 0


def jobs(context: Context) -> Iterator[Job]:
    for precision in (mode.precision for mode in context.modes):
        yield Job("step", f"all, {precision}", partial(capture_step, context, precision), 4)
        yield Job("step", f"no graph, {precision}", partial(eager_step, context, precision), 4)
    for part in PARTS:
        yield Job("step", part, partial(capture_part, context, part))


def make_step(context: Context, precision: str = "float32") -> Step:
    return Step(2, 8, precision) if context.quick else Step(context.batch or BATCH, 28, precision)


def capture_part(context: Context, part: str) -> Row:
    """Whether a CUDA graph takes one part of the step, the others being run as usual."""
    step = make_step(context)
    step()  # what is compiled now is not compiled while a graph is captured
    for name in PARTS[:PARTS.index(part)]:
        getattr(step, name)()
    return refusal(context, f"step, {part}", getattr(step, part), lambda replay: replay())


def capture_step(context: Context, precision: str) -> Row:
    """The whole step as one graph: two replays must give the bits of two plain steps; its time."""
    plain, captured = make_step(context, precision), make_step(context, precision)
    before = captured.state()
    row: Row = {"precision": precision}

    def same_twice(replay: Callable[[], Any]) -> bool:
        plain.restore(before)
        captured.restore(before)
        for _ in range(2):
            plain()
            expected = plain.state()  # before a replay writes where the pool put plain's arrays
            replay()
            context.clock.wait()
            if not same_state(captured.state(), expected):
                return False
        return True

    def check(replay: Callable[[], Any]) -> None:
        same = same_twice(replay)
        row.update(passed=same, note="" if same else "a replayed step has other bits")

    plain()  # what is compiled now is not compiled while a graph is captured
    result = refusal(context, f"step, all, {precision}", captured, check) | row
    if result["captured"] and result["passed"]:
        timing = context.clock.time([captured])
        images = len(captured.x) / timing.median
        result |= timing.figures() | {"images_per_second": images, "note": f"{images:.0f} images/s"}
    return result


def summary(rows: list[Row]) -> Row:
    """What a captured step does otherwise than training.train_step."""
    whole = [row for row in rows if "precision" in row and row.get("captured") and row["passed"]]
    return {"captured": {"text": [ON_THE_HOST]}} if whole else {}


def same_state(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(same_bits(one[name], other[name]) for name in one)


def eager_step(context: Context, precision: str) -> Row:
    """Without a graph: the host's own time is in it."""
    step = make_step(context, precision)
    timing = context.clock.time_eagerly(step)
    images = len(step.x) / timing.median
    return timing.figures() | {"name": f"no graph, {precision}", "images_per_second": images,
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
    for chosen in ("float32", "mixed_float16"):
        Step(4, 12, chosen)()
