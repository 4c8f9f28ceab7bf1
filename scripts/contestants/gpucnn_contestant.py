"""gpucnn, on the backend that GPUCNN_BACKEND names; on a GPU as a CUDA graph, or without one."""
from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import gpucnn
from gpucnn import losses, optim, training
from gpucnn.backend import Array, get_backend
from gpucnn.layers import Layer, from_config
from gpucnn.layers.summary import first_layer
from gpucnn.models import MODELS
from gpucnn.precision import make_precision
from gpucnn.training.profiling import time_steps
from scripts.contestants import LEARNING_RATE, Task, copied_bytes, gemm_size, images, labels
from scripts.contestants.layer_memory import Meter, beside_prediction
from scripts.contestants.workloads import SPLIT


class Contestant:
    """Layers with explicit passes. gpucnn-eager is without CUDA graphs."""

    def __init__(self, workload: dict[str, Any]):
        self.backend = get_backend()
        self.versions = {"gpucnn": gpucnn.__version__, "numpy": np.__version__,
                         self.backend.name: self.backend.xp.__version__}
        self.notes: dict[str, str] = {}
        if self.on_gpu:
            runtime: Any = self.backend.xp.cuda.runtime
            self.versions |= {"cuda": str(runtime.runtimeGetVersion()),
                              "driver": str(runtime.driverGetVersion())}
            self.notes["memory"] = "CuPy's memory pools"
        self.batch, self.precision = workload["batch"], workload["precision"]
        self.capture = workload["contestant"] == "gpucnn"
        self.training: training.TrainStep | None = None
        self.most_bytes = 0
        self.meter = Meter(self.backend) if workload["what"] == "memory" else None
        if workload["what"] == "op":
            self.tasks = {op["task"]: self._op(op) for op in workload["ops"]}
            return
        if workload["what"] == "ceilings":
            self.tasks = self._ceilings()
            return
        net = workload["net"]
        self.model = MODELS[workload["model"]](net["output_shape"][0])
        self.model.build(tuple(net["input_shape"]), precision=self.precision)
        self.x = self.backend.asarray(images(self.batch, net["input_shape"]), self.model.dtype)
        self.t = self.backend.asarray(labels(self.batch, net))
        if workload["what"] == "infer":
            self.tasks = {"infer": self._infer()}
            return
        scale = optim.LossScale(self.model) if self.precision == "mixed_float16" else None
        self.loss: Callable[[Any, Any], tuple[Any, Any]] = losses.SoftmaxCrossEntropy(
            loss_scale=scale)
        self.optimizer = optim.Adam(self.model, LEARNING_RATE, loss_scale=scale)
        if workload["what"] == "memory":
            self.tasks = {"step": self.parts}
            return
        if workload["what"] == "profile":
            n = gemm_size("cpu")
            a, b = (self.backend.asarray(images(n, [n], seed)) for seed in (0, 1))
            self.tasks = {"step": self.parts, "sgemm": lambda: a @ b}
            return
        self.training = training.TrainStep(self.model, self.loss, self.optimizer,
                                           capture=self.capture)
        self.x, self.t = self.training.inputs(self.x, self.t)
        self.tasks = {"step": self.step}

    @property
    def on_gpu(self) -> bool:
        return self.backend.name == "cupy"

    def step(self) -> None:
        """One step of training; nobody waits for it."""
        assert self.training
        self.training(self.x, self.t)

    def parts(self) -> None:
        """The same, part by part, for profile() to time."""
        _, dlogits = self.loss(self.model.forward(self.x, training=True), self.t)
        self.model.backward_parameters(dlogits)
        self.optimizer.step()

    def measure(self, task: Task, n: int) -> float:
        if not self.on_gpu:
            started = time.perf_counter()
            for _ in range(n):
                task()
            self._finish()
            return time.perf_counter() - started
        cuda: Any = self.backend.xp.cuda
        start, end = cuda.Event(), cuda.Event()
        start.record()
        for _ in range(n):
            task()
        self._finish()  # before the event, because a graph has a stream of its own
        end.record()
        end.synchronize()
        if n == 1:  # in the warm-up, where memory is taken
            self.device_bytes()
        return cuda.get_elapsed_time(start, end) / 1e3

    def device_bytes(self) -> int | None:
        """The most that CuPy's pools held together whenever this was asked.

        A graph has a pool of its own, and before it is captured the common one gives back what it
        does not use. The pools are found among all objects: nobody lists them.
        """
        if not self.on_gpu:
            return None
        cuda: Any = self.backend.xp.cuda
        now = sum(each.total_bytes() for each in gc.get_objects() if type(each) is cuda.MemoryPool)
        self.most_bytes = max(self.most_bytes, now)
        return self.most_bytes

    def synchronize(self) -> None:
        if self.on_gpu:
            cuda: Any = self.backend.xp.cuda
            cuda.Device().synchronize()

    def _finish(self) -> None:
        if self.training:
            self.training.results()  # waits
            if self.training.not_captured:
                self.notes["not captured"] = self.training.not_captured
        self.synchronize()

    def _infer(self) -> Task:
        result: Array = None

        def forward() -> None:
            nonlocal result
            result = self.model.forward(self.x)

        forward()  # compiles, which no graph can hold
        replay = self.backend.capture(forward) if self.capture else forward

        def infer() -> Array:
            replay()
            return result
        return infer

    def _ceilings(self) -> dict[str, Task]:
        """A large matrix product by our own kernel, on the CPU by the BLAS; and a copy."""
        backend, device = self.backend, "cuda" if self.on_gpu else "cpu"
        xp, n, size = backend.xp, gemm_size(device), copied_bytes(device) // 4
        precision = make_precision("the product", self.precision, backend.name)
        x, w = (backend.asarray(images(n, [n], seed), precision.activations) for seed in (0, 1))
        source, target = xp.ones(size, np.float32), xp.empty(size, np.float32)

        def copy() -> None:
            target[...] = source

        if not self.on_gpu:
            return {"product": lambda: x @ w, "copy": copy}
        return {"product": lambda: backend.dense(x, w, None, None, precision.tf32), "copy": copy}

    def _op(self, op: dict[str, Any]) -> Task:
        """One pass of a layer; a backward pass alone takes what one forward pass has saved."""
        layer, arguments = op["layer"], op["layer"]["arguments"]
        x = images(self.batch, layer["input_shape"])
        if layer["class"] == "SoftmaxCrossEntropy":
            logits, loss = self.backend.asarray(x), losses.SoftmaxCrossEntropy()
            t = self.backend.asarray(labels(self.batch, layer))
            return lambda: loss(logits, t)
        if layer["class"] in SPLIT and op["pass"] == "backward" and "activation" in arguments:
            arguments = {**arguments, "activation": None}
        built = from_config({"class": layer["class"], **arguments})
        built.build(tuple(layer["input_shape"]), precision=self.precision)
        x = self.backend.asarray(x, built.dtype)
        dy = self.backend.asarray(images(self.batch, layer["output_shape"], 1), built.dtype)
        if op["pass"] == "forward":
            return lambda: built.forward(x, training=True)
        if op["pass"] == "both":
            return lambda: (built.forward(x, training=True), built.backward(dy))
        built.forward(x, training=True)
        saved = built.take_saved()

        def backward() -> Array:
            built.save(True, *saved)
            return built.backward(dy)
        return backward


def digests(contestant: Contestant, steps: int) -> dict[str, Any]:
    """SHA-256 of all that so many steps have computed: the losses, and what they changed.

    not_captured: why a step that was to become a graph did not.
    """
    step = contestant.training
    assert step
    for _ in range(steps):
        contestant.step()
    results = step.results()
    to_numpy = contestant.backend.to_numpy
    model, optimizer = contestant.model, contestant.optimizer
    arrays = {"losses": np.array([r.loss for r in results]),
              "hits": np.array([r.hits for r in results]),
              "gradients": to_numpy(model.flat_grad),
              **{path: to_numpy(p.data) for path, p in model.parameters().items()},
              **{path: to_numpy(layer.own_buffers[name])
                 for path, (layer, name) in model.buffers().items()},
              **{f"Adam's {name}": a for name, a in optimizer.state_dict().items()}}
    return {"not_captured": step.not_captured,
            "digests": {name: hashlib.sha256(np.ascontiguousarray(a).tobytes()).hexdigest()
                        for name, a in arrays.items()}}


def profile(contestant: Contestant, steps: int) -> dict[str, Any]:
    """Median seconds of `steps` steps and of their parts; with CuPy each part is waited for.

    Where the workload is memory, what is alive in one step instead.
    """
    if contestant.meter is not None:
        return beside_prediction(contestant.meter, contestant)
    times = time_steps(contestant.model, contestant.loss, contestant.optimizer, contestant.x,
                       contestant.t, steps)
    first = first_layer(contestant.model)
    rows = [{"layer": layer.path, "class": type(layer).__name__,
             "output_shape": layer.output_shape, "forward_flops": flops(layer, contestant.batch),
             # The input gradient of the first one is not computed.
             "backward_flops": (1 if layer is first else 2) * flops(layer, contestant.batch),
             **{name: times.passes[layer.path, name] for name in ("forward", "backward")}}
            for layer in contestant.model.walk() if not layer.children()]
    return {"rows": rows, "loss": times.loss, "optimiser": times.update, "step": times.step,
            "steps": steps}


def flops(layer: Layer, batch: int) -> int:
    """Of a forward pass, for layers that multiply matrices."""
    return 2 * batch * layer.multiply_adds() if "w" in layer.own_parameters else 0
