"""Looking in on the passes of each layer, and the time that each takes in a training step."""
from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from gpucnn.backend import Array, Backend
from gpucnn.layers import Layer
from gpucnn.optim import Optimizer

PASSES = {"forward": "forward", "forward_added": "forward", "backward": "backward",
          "backward_parameters": "backward", "backward_added": "backward"}
Call = Callable[..., Any]


@contextlib.contextmanager
def wrapped_passes(layers: Iterable[Layer], wrap: Callable[[Layer, str, Call], Call]
                   ) -> Iterator[None]:
    """Inside the block each pass of each layer is what wrap(layer, name, method) makes of it.

    name: "forward" or "backward". A pass may run another of the same layer and name, as
    forward_added() runs forward() where it cannot do better.
    """
    with contextlib.ExitStack() as undo:
        for layer in layers:
            for method, name in PASSES.items():
                call = getattr(layer, method)
                undo.callback(vars(layer).pop, method, None)
                vars(layer)[method] = wrap(layer, name, call)
        yield


class StepTimes(NamedTuple):
    """Median seconds of a step and its parts.

    passes: by (path of a layer without children, "forward" or "backward"); 0 for a pass that does
        not happen, such as backward() before the first layer that learns.
    """

    passes: dict[tuple[str, str], float]
    loss: float
    update: float
    step: float
    steps: int


def time_steps(model: Layer, loss: Call, optimizer: Optimizer | None, x: Array, t: Array,
               steps: int, seconds: float = math.inf) -> StepTimes:
    """Run plain steps on one batch, and time them and their parts; on a GPU each is waited for.

    steps: how many at most. seconds: after which no other one begins; there is always one.
    optimizer: None for steps without an update.
    """
    watch = _Stopwatch(model.backend)
    update = optimizer.step if optimizer is not None else lambda: None
    leaves = [layer for layer in model.walk() if not layer.children()]

    def step() -> None:
        _, dlogits = watch.timed("loss", loss)(model.forward(x, training=True), t)
        model.backward_parameters(dlogits)
        watch.timed("update", update)()

    def wrap(layer: Layer, name: str, call: Call) -> Call:
        return watch.timed((layer.path, name), call)

    end = time.perf_counter() + seconds
    # As in a step of training, where the loss shows what is not finite.
    with wrapped_passes(leaves, wrap), np.errstate(over="ignore", invalid="ignore"):
        for number in range(steps):
            if number and time.perf_counter() > end:
                break
            watch.timed("step", step)()
    return StepTimes({(layer.path, name): watch.median((layer.path, name)) for layer in leaves
                      for name in ("forward", "backward")},
                     watch.median("loss"), watch.median("update"), watch.median("step"),
                     len(watch.times["step"]))


class _Stopwatch:
    def __init__(self, backend: Backend):
        self.times: dict[Any, list[float]] = defaultdict(list)
        self._running: set[Any] = set()
        self._backend = backend

    def timed(self, name: Any, call: Call) -> Call:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            if name in self._running:
                return call(*arguments, **options)
            self._running.add(name)
            self._wait()
            started = time.perf_counter()
            result = call(*arguments, **options)
            self._wait()
            self.times[name].append(time.perf_counter() - started)
            self._running.remove(name)
            return result
        return wrapper

    def median(self, name: Any) -> float:
        return statistics.median(self.times[name]) if self.times[name] else 0.0

    def _wait(self) -> None:
        if self._backend.name == "cupy":
            cuda: Any = self._backend.xp.cuda
            cuda.Device().synchronize()
