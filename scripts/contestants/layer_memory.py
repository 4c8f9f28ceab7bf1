"""What is alive at its most in each layer's passes of a training step of gpucnn, as measured.

On the GPU every allocation and every release of CuPy's memory pool is counted. On NumPy tracemalloc
counts, to which NumPy reports its arrays; what gpucnn keeps of them to use again
(gpucnn/backend/recycling.py) is let go for the time, because it would count as alive.
"""
from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from gpucnn.backend import Backend
from gpucnn.layers import Layer, Sequential
from gpucnn.layers.memory import step_memory
from gpucnn.training.profiling import wrapped_passes

Place = tuple[str, str]  # a layer's path, and forward or backward


class Meter:
    """Bytes that are alive, of what was made since this object was; make it before the model."""

    def __init__(self, backend: Backend):
        self.most: dict[Place, int] = {}
        self._backend = backend
        self._places: list[Place] = [("", "step")]
        self._live = 0
        self._pool: Any = None
        if backend.name == "cupy":
            xp: Any = backend.xp
            self._pool = xp.get_default_memory_pool()
            self._base = self._pool.used_bytes()
        else:
            tracemalloc.start()
            self._base = 0

    def measure(self, model: Layer, step: Callable[[], Any]) -> dict[str, Any]:
        """The rows of all layers but Sequentials, which make no array, and the peak of a step.

        A first step, which is not measured, compiles and makes what stays. Use a Meter once.
        """
        with self._nothing_kept():
            step()
            with self._counted(), wrapped_passes(model.walk(), self._within):
                if self._pool is None:
                    self._base = tracemalloc.get_traced_memory()[0] - _array_bytes()
                self._note()  # the first step's peak
                self.most.clear()
                step()
                self._note()
        layers = [layer for layer in model.walk() if not isinstance(layer, Sequential)]
        return {"rows": [{"layer": layer.path, "class": type(layer).__name__,
                          "output_shape": layer.output_shape,
                          **{name: self.most.get((layer.path, name), 0)
                             for name in ("forward", "backward")}} for layer in layers],
                "peak": max(self.most.values())}

    def _within(self, layer: Layer, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            self._note()
            self._places.append((layer.path, name))
            try:
                return call(*arguments, **options)
            finally:
                self._note()
                self._places.pop()
                self._note()
        return wrapper

    def _note(self) -> None:
        """What was alive at most since the last note counts for the place that is reached now."""
        live = self._live
        if self._pool is None:
            live = tracemalloc.get_traced_memory()[1] - self._base
            tracemalloc.reset_peak()
        place = self._places[-1]
        self.most[place] = max(self.most.get(place, 0), live)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        if self._pool is None:
            try:
                yield
            finally:
                tracemalloc.stop()
            return
        cuda: Any = self._backend.xp.cuda
        meter = self

        class Hook(cuda.MemoryHook):
            name = "gpucnn layer memory"

            def malloc_postprocess(self, **event: int) -> None:
                if event["mem_ptr"]:  # else there was no memory
                    meter._live += event["mem_size"]
                    meter._note()

            def free_postprocess(self, **event: int) -> None:
                meter._live -= event["mem_size"]

        self._live = self._pool.used_bytes() - self._base
        with Hook():
            yield

    @contextlib.contextmanager
    def _nothing_kept(self) -> Iterator[None]:
        if self._pool is not None:
            yield
            return
        vars(self._backend)["empty"] = np.empty
        try:
            yield
        finally:
            del vars(self._backend)["empty"]


def beside_prediction(meter: Meter, contestant: Any) -> dict[str, Any]:
    """What Meter.measure() says of the contestant's step, and what its model's summary() says.

    The latter's names begin with predicted_ where both have one.
    """
    model, batch, optimizer = contestant.model, contestant.batch, contestant.optimizer
    measured = meter.measure(model, contestant.parts)
    m = step_memory(model, model.input_shape, batch, optimizer)
    for row, predicted in zip(measured["rows"], m.rows):
        row |= {"keeps": predicted.saved, "predicted_forward": predicted.forward,
                "predicted_backward": predicted.backward}
    return {**measured, "predicted_peak": m.peak, "where": m.where, "parameters": m.parameters,
            "gradients": m.gradients, "state": m.state, "activations": m.activations,
            "workspace": m.workspace}


def _array_bytes() -> int:
    """Of all arrays of NumPy since tracemalloc was started, without the other objects of Python."""
    arrays = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
    return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([arrays]).traces)
