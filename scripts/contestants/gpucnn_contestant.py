"""gpucnn, on the backend that GPUCNN_BACKEND names."""
from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

import gpucnn
from gpucnn import losses, ops, optim
from gpucnn.backend import get_backend
from gpucnn.layers import Layer, from_config
from gpucnn.models import MODELS
from scripts.contestants import GEMM, LEARNING_RATE, Task, images, labels
from scripts.contestants.layer_memory import Meter, beside_prediction


class Contestant:
    """Layers with explicit passes."""

    def __init__(self, workload: dict[str, Any]):
        self.backend = get_backend()
        self.versions = {"gpucnn": gpucnn.__version__, "numpy": np.__version__,
                         self.backend.name: self.backend.xp.__version__}
        self.batch = workload["batch"]
        self.meter = Meter(self.backend) if workload["what"] == "memory" else None
        if workload["what"] == "op":
            self.tasks = {op["task"]: self._op(op) for op in workload["ops"]}
            return
        net = workload["net"]
        self.model = MODELS[workload["model"]](net["output_shape"][0])
        self.model.build(tuple(net["input_shape"]))
        self.loss: Callable[[Any, Any], tuple[Any, Any]] = losses.SoftmaxCrossEntropy()
        self.x = self.backend.asarray(images(self.batch, net["input_shape"]))
        self.t = self.backend.asarray(labels(self.batch, net))
        if workload["what"] == "infer":
            self.tasks = {"infer": lambda: self.model.forward(self.x)}
            return
        self.optimizer = optim.Adam(self.model, LEARNING_RATE)
        self.tasks = {"step": self.step}
        if workload["what"] == "profile":
            a, b = (self.backend.asarray(images(GEMM, [GEMM], seed)) for seed in (0, 1))
            self.tasks["sgemm"] = lambda: a @ b

    def step(self) -> Any:
        """One step of training; returns the loss."""
        value, dlogits = self.loss(self.model.forward(self.x, training=True), self.t)
        self.model.backward_parameters(dlogits)
        self.optimizer.step()
        return value

    def measure(self, task: Task, n: int) -> float:
        if self.backend.name == "cupy":
            cuda: Any = self.backend.xp.cuda
            start, end = cuda.Event(), cuda.Event()
            start.record()
            for _ in range(n):
                task()
            end.record()
            end.synchronize()
            return cuda.get_elapsed_time(start, end) / 1e3
        started = time.perf_counter()
        for _ in range(n):
            task()
        return time.perf_counter() - started

    def device_bytes(self) -> int | None:
        if self.backend.name != "cupy":
            return None
        xp: Any = self.backend.xp
        return xp.get_default_memory_pool().total_bytes()  # the pool keeps what it has taken

    def synchronize(self) -> None:
        if self.backend.name == "cupy":
            cuda: Any = self.backend.xp.cuda
            cuda.Device().synchronize()

    def _op(self, op: dict[str, Any]) -> Task:
        """One pass of a layer: a function of gpucnn.ops where there is one."""
        layer, forward = op["layer"], op["pass"] == "forward"
        kind = layer["class"]
        x = self.backend.asarray(images(self.batch, layer["input_shape"]))
        dy = self.backend.asarray(images(self.batch, layer["output_shape"], 1))
        if kind == "SoftmaxCrossEntropy":
            t = self.backend.asarray(labels(self.batch, layer))
            return lambda: ops.softmax_cross_entropy(x, t)
        options = {k: layer["arguments"][k] for k in ("stride", "padding", "dilation", "groups")
                   if k in layer["arguments"]}
        size = layer["arguments"].get("size")
        if kind == "MaxPool2D":
            if forward:
                return lambda: ops.max_pool2d(x, size, **options)
            _, mask = ops.max_pool2d(x, size, **options)
            return lambda: ops.max_pool2d_backward(dy, mask, x.shape, size, **options)
        if kind == "AvgPool2D":
            if forward:
                return lambda: ops.avg_pool2d(x, size, **options)
            return lambda: ops.avg_pool2d_backward(dy, x.shape, size, **options)
        built = from_config({"class": kind, **layer["arguments"]})
        built.build(tuple(layer["input_shape"]))
        if kind == "Conv2D":
            w, b = (built.own_parameters[k].data if k in built.own_parameters else None
                    for k in ("w", "b"))
            if forward:
                activation = layer["arguments"]["activation"]
                return lambda: ops.conv2d(x, w, b, activation=activation, **options)
            return lambda: ops.conv2d_backward(dy, x, w, **options)
        if forward:
            return lambda: built.forward(x, training=True)
        return lambda: (built.forward(x, training=True), built.backward(dy))


def profile(contestant: Contestant, steps: int) -> dict[str, Any]:
    """Median seconds of `steps` steps and of their parts; with CuPy each part is waited for.

    Where the workload is memory, what is alive in one step instead.
    """
    if contestant.meter is not None:
        return beside_prediction(contestant.meter, contestant)
    times: dict[str, list[float]] = defaultdict(list)

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            contestant.synchronize()
            started = time.perf_counter()
            result = call(*arguments, **options)
            contestant.synchronize()
            times[name].append(time.perf_counter() - started)
            return result
        return wrapper

    leaves = [layer for layer in contestant.model.walk() if not layer.children()]
    for layer in leaves:
        for name in ("forward", "backward"):
            setattr(layer, name, timed(f"{layer.path} {name}", getattr(layer, name)))
        if type(layer).backward_parameters is not Layer.backward_parameters:
            vars(layer)["backward_parameters"] = timed(f"{layer.path} backward",
                                                       layer.backward_parameters)
    contestant.loss = timed("loss", contestant.loss)
    vars(contestant.optimizer)["step"] = timed("optimiser", contestant.optimizer.step)
    step = timed("step", contestant.step)
    for _ in range(steps):
        step()
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    rows = [{"layer": layer.path, "class": type(layer).__name__,
             "output_shape": layer.output_shape, "forward_flops": flops(layer, contestant.batch),
             # The first layer's input gradient is not computed.
             "backward_flops": (1 if layer is leaves[0] else 2) * flops(layer, contestant.batch),
             "forward": median[f"{layer.path} forward"],
             "backward": median[f"{layer.path} backward"]} for layer in leaves]
    return {"rows": rows, **{name: median[name] for name in ("loss", "optimiser", "step")},
            "steps": steps}


def flops(layer: Layer, batch: int) -> int:
    """Of a forward pass, for layers that multiply matrices."""
    return 2 * batch * layer.multiply_adds() if "w" in layer.own_parameters else 0
