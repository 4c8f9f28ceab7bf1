"""torch: the same nets of torch.nn modules.

    torch                eager, in the default layout
    torch-channels-last  eager, in channels_last
    torch-graph          the whole step as one CUDA graph
    torch-compile        forward and backward by torch.compile, max-autotune; on a GPU the whole
                         step, with the optimiser, as one CUDA graph of that

The last two take, on a GPU, the layout that a trial found faster; nets that are compiled for the
CPU, channels_last.
"""
from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from scripts.contestants import (
    LEARNING_RATE,
    Impossible,
    Task,
    copied_bytes,
    gemm_size,
    images,
    labels,
)
from scripts.contestants.workloads import as_published

DTYPES = {"mixed_float16": torch.float16, "mixed_bfloat16": torch.bfloat16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
WARM_UPS = 3   # eager steps before a capture; cuDNN looks for its fastest kernels in the first
TRIALS = 20    # steps by which a layout is chosen
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}


class Scale(nn.Module):
    """factor x."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


class SpaceToDepth(nn.Module):
    """As gpucnn's, between NCHW tensors."""

    def __init__(self, size: int, channels: int | None):
        super().__init__()
        self.size, self.channels = size, channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (n, c, h, w), size = x.shape, self.size
        y = x.reshape(n, c, h // size, size, w // size, size).permute(0, 3, 5, 1, 2, 4).reshape(
            n, size * size * c, h // size, w // size)
        return nn.functional.pad(y, (0, 0, 0, 0, 0, (self.channels or y.shape[1]) - y.shape[1]))


class Residual(nn.Module):
    """body(x) + shortcut(x)."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None):
        super().__init__()
        self.body = body
        self.shortcut = shortcut or nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) + self.shortcut(x)


def batch_norm(c: int, a: dict[str, Any]) -> nn.Module:
    module = nn.BatchNorm2d(c, a["epsilon"], a["momentum"])
    module.weight.requires_grad_(a.get("scale", True))
    return module


def conv(c: int, a: dict[str, Any]) -> nn.Module:
    padding, before = a["padding"], []
    if isinstance(padding, (list, tuple)) and isinstance(padding[0], (list, tuple)):
        (top, bottom), (left, right) = padding  # which may differ
        padding, before = 0, [nn.ZeroPad2d((left, right, top, bottom))]
    module = nn.Conv2d(c, a["filters"], a["kernel_size"], a["stride"], padding, a["dilation"],
                       a["groups"], a["bias"])
    return nn.Sequential(*before, module) if before else module


def whiten(c: int, a: dict[str, Any]) -> nn.Module:
    """A convolution that learns nothing but its bias."""
    module = nn.Conv2d(c, 2 * math.prod(a["kernel_size"]) * c, a["kernel_size"])
    module.weight.requires_grad_(False)
    return module


# class of gpucnn: (number of input channels or features, its arguments) -> module
MODULES: dict[str, Callable[[int, dict[str, Any]], nn.Module]] = {
    "AvgPool2D": lambda c, a: nn.AvgPool2d(a["size"], a["stride"], a["padding"],
                                           count_include_pad=False),
    "BatchNorm": batch_norm,
    "Conv2D": conv,
    "Dense": lambda c, a: nn.Linear(c, a["units"], a["bias"]),
    "Dropout": lambda c, a: nn.Dropout(a["rate"]),
    "Flatten": lambda c, a: nn.Flatten(),
    "GELU": lambda c, a: nn.GELU(),
    "GlobalAvgPool2D": lambda c, a: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "MaxPool2D": lambda c, a: nn.MaxPool2d(a["size"], a["stride"], a["padding"], a["dilation"]),
    "ReLU": lambda c, a: nn.ReLU(),
    "Scale": lambda c, a: Scale(a["factor"]),
    "SpaceToDepth": lambda c, a: SpaceToDepth(a["size"], a["channels"]),
    "Tanh": lambda c, a: nn.Tanh(),
    "Whiten2D": whiten,
}


def make_module(layer: dict[str, Any]) -> nn.Module:
    """The module that a description asks for."""
    children = [make_module(child) for child in layer["children"]]
    if layer["class"] == "Sequential":
        return nn.Sequential(*children)
    arguments = layer["arguments"]
    module = (Residual(*children) if layer["class"] == "Residual"
              else MODULES[layer["class"]](layer["input_shape"][-1], arguments))
    activation = arguments.get("activation")
    return nn.Sequential(module, ACTIVATIONS[activation]()) if activation else module


class Net:
    """A net in one layout, with its batch, loss and optimiser."""

    def __init__(self, workload: dict[str, Any], layout: str):
        self.device, self.layout = workload["device"], layout
        net, batch = as_published(workload["net"]), workload["batch"]
        self.low = DTYPES.get(workload["precision"])
        self.model = make_module(net).to(device=self.device, memory_format=LAYOUTS[layout])
        self.x = tensor(images(batch, net["input_shape"]), self.device, layout)
        self.t = tensor(labels(batch, net), self.device, layout)
        self.loss, self.run = nn.CrossEntropyLoss(), self.model
        if workload["what"] == "infer":
            self.model.eval()
            if self.low:  # once, where autocast would do it again in each pass
                self.model.to(self.low)
                self.x = self.x.to(self.low)
            return
        learned = [p for p in self.model.parameters() if p.requires_grad]
        fused = {"fused": True, "capturable": True} if self.device == "cuda" else {}
        self.optimizer = torch.optim.Adam(learned, LEARNING_RATE, **fused)
        self.scaler = torch.amp.GradScaler(self.device, enabled=self.low == torch.float16)

    def forward(self) -> torch.Tensor:
        """The loss. No casts are cached: a graph would keep those of its capture."""
        with torch.autocast(self.device, self.low, enabled=bool(self.low), cache_enabled=False):
            return self.loss(self.model(self.x), self.t)

    def step(self) -> torch.Tensor:
        """One step of training; returns the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.forward()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def infer(self) -> torch.Tensor:
        with torch.inference_mode():
            return self.run(self.x)

    def compile(self) -> None:
        """CUDA graphs come from captured(): one of the whole step, not one of each piece."""
        mode = "max-autotune-no-cudagraphs" if self.device == "cuda" else "max-autotune"
        vars(self)["forward"] = torch.compile(self.forward, mode=mode)
        self.run = torch.compile(self.model, mode=mode)


def captured(task: Task) -> Task:
    """The task as one CUDA graph, as torch's notes on CUDA graphs tell: warmed up on a stream
    aside, captured into a pool of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            task()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = task()

    def replay() -> Any:
        graph.replay()
        return result
    return replay


class Contestant:
    """torch.optim.Adam, CrossEntropyLoss and autograd."""

    def __init__(self, workload: dict[str, Any]):
        self.workload, self.device = workload, workload["device"]
        self.way = workload["contestant"].partition("-")[2]
        if self.way == "graph" and self.device != "cuda":
            raise Impossible("torch-graph needs a GPU")
        torch.set_num_threads(workload["threads"])
        tf32 = workload["precision"] == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = True
        self.versions = {"torch": torch.__version__}
        if self.device == "cuda":
            self.versions["cudnn"] = str(torch.backends.cudnn.version())
        self.notes = {"memory": "PyTorch's allocator, reserved"} if self.device == "cuda" else {}
        if workload["what"] == "ceilings":
            self.tasks = self._ceilings()
            return
        self.layout = self._layout()
        if workload["what"] == "op":
            self.tasks = {op["task"]: self._op(op) for op in workload["ops"]}
            return
        self.notes["layout"] = self.layout
        self.net = Net(workload, self.layout)
        self.model = self.net.model
        if self.way == "compile":
            self.net.compile()
        name = "infer" if workload["what"] == "infer" else "step"
        task = getattr(self.net, name)
        if self.device == "cuda" and self.way in ("graph", "compile"):
            task = captured(task)
        self.tasks = {name: task}

    def measure(self, task: Task, n: int) -> float:
        if self.device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(n):
                task()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3
        started = time.perf_counter()
        for _ in range(n):
            task()
        return time.perf_counter() - started

    def device_bytes(self) -> int | None:
        # What the allocator has taken from the GPU, as gpucnn's figure is.
        return torch.cuda.max_memory_reserved() if self.device == "cuda" else None

    def _layout(self) -> str:
        if self.way in ("", "channels-last"):
            return "channels_last" if self.way else "contiguous"
        whole = self.workload["what"] in ("step", "infer")
        if self.device != "cuda" or not whole:  # a trial is no part of loading
            return "channels_last"
        return self._faster_layout()

    def _faster_layout(self) -> str:
        """By a few replays of a graph in each; what they took of the memory is given back."""
        seconds = {}
        for layout in LAYOUTS:
            replay = captured(getattr(Net(self.workload, layout), self.workload["what"]))
            self.measure(replay, TRIALS)
            seconds[layout] = self.measure(replay, TRIALS)
            del replay
            gc.collect()
            torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return min(seconds, key=seconds.__getitem__)

    def _ceilings(self) -> dict[str, Task]:
        """A large matrix product by cuBLAS or MKL, and a copy."""
        low, n = DTYPES.get(self.workload["precision"], torch.float32), gemm_size(self.device)
        a, b = (torch.from_numpy(images(n, [n], seed)).to(self.device, low) for seed in (0, 1))
        source = torch.ones(copied_bytes(self.device) // 4, device=self.device)
        target = torch.empty_like(source)
        return {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}

    def _op(self, op: dict[str, Any]) -> Task:
        """One pass of a module; backward alone goes through a graph that is kept."""
        layer, batch = op["layer"], self.workload["batch"]
        low = DTYPES.get(self.workload["precision"], torch.float32)
        x = tensor(images(batch, layer["input_shape"]), self.device, self.layout)
        dy = tensor(images(batch, layer["output_shape"], 1), self.device, self.layout).to(low)
        if layer["class"] == "SoftmaxCrossEntropy":
            t, loss = torch.from_numpy(labels(batch, layer)).to(self.device), nn.CrossEntropyLoss()
            x.requires_grad_()
            return lambda: torch.autograd.grad(loss(x, t), x)
        x = x.to(low)
        if op["pass"] == "backward":  # of gpucnn's convolution: without the activation
            layer = {**layer, "arguments": {**layer["arguments"], "activation": None}}
        module = make_module(layer).to(device=self.device, dtype=low,
                                       memory_format=LAYOUTS[self.layout])
        if op["pass"] == "forward":
            return torch.no_grad()(lambda: module(x))
        inputs = [x.requires_grad_(), *(p for p in module.parameters() if p.requires_grad)]
        if op["pass"] == "both":
            return lambda: torch.autograd.grad(module(x), inputs, dy)
        y = module(x)
        return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)


def tensor(array: np.ndarray, device: str, layout: str) -> torch.Tensor:
    """NHWC images as NCHW in the layout; anything else as it is."""
    result = torch.from_numpy(array).to(device)
    if result.ndim == 4:
        result = result.permute(0, 3, 1, 2).contiguous(memory_format=LAYOUTS[layout])
    return result
