"""torch: the same nets of torch.nn modules, in the default layout or channels_last."""
from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from scripts.contestants import LEARNING_RATE, Task, images, labels

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}


class Residual(nn.Module):
    """body(x) + shortcut(x)."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None):
        super().__init__()
        self.body = body
        self.shortcut = shortcut or nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) + self.shortcut(x)


# class of gpucnn: (number of input channels or features, its arguments) -> module
MODULES: dict[str, Callable[[int, dict[str, Any]], nn.Module]] = {
    "AvgPool2D": lambda c, a: nn.AvgPool2d(a["size"], a["stride"], a["padding"],
                                           count_include_pad=False),
    "BatchNorm": lambda c, a: nn.BatchNorm2d(c, a["epsilon"], a["momentum"]),
    "Conv2D": lambda c, a: nn.Conv2d(c, a["filters"], a["kernel_size"], a["stride"], a["padding"],
                                     a["dilation"], a["groups"], a["bias"]),
    "Dense": lambda c, a: nn.Linear(c, a["units"], a["bias"]),
    "Dropout": lambda c, a: nn.Dropout(a["rate"]),
    "Flatten": lambda c, a: nn.Flatten(),
    "GlobalAvgPool2D": lambda c, a: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "MaxPool2D": lambda c, a: nn.MaxPool2d(a["size"], a["stride"], a["padding"], a["dilation"]),
    "ReLU": lambda c, a: nn.ReLU(),
    "Tanh": lambda c, a: nn.Tanh(),
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


class Contestant:
    """torch.optim.Adam, CrossEntropyLoss and autograd."""

    def __init__(self, workload: dict[str, Any]):
        torch.set_num_threads(workload["threads"])
        torch.backends.cudnn.allow_tf32 = False  # float32 on the GPU too, as gpucnn computes
        self.versions = {"torch": torch.__version__}
        self.device = workload["device"]
        self.layout = (torch.channels_last if workload["contestant"] == "torch-channels-last"
                       else torch.contiguous_format)
        self.batch = workload["batch"]
        if workload["what"] == "op":
            self.tasks = {op["task"]: self._op(op) for op in workload["ops"]}
            return
        net = workload["net"]
        self.model = make_module(net).to(device=self.device, memory_format=self.layout)
        self.loss = nn.CrossEntropyLoss()
        self.x = self.tensor(images(self.batch, net["input_shape"]))
        self.t = self.tensor(labels(self.batch, net))
        if workload["what"] == "infer":
            self.model.eval()
            self.tasks = {"infer": self.infer}
        else:
            self.optimizer = torch.optim.Adam(self.model.parameters(), LEARNING_RATE)
            self.tasks = {"step": self.step}

    def step(self) -> torch.Tensor:
        """One step of training; returns the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.model(self.x), self.t)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def infer(self) -> torch.Tensor:
        with torch.inference_mode():
            return self.model(self.x)

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

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        """NHWC images as NCHW in the layout; anything else as it is."""
        tensor = torch.from_numpy(array).to(self.device)
        if tensor.ndim == 4:
            tensor = tensor.permute(0, 3, 1, 2).contiguous(memory_format=self.layout)
        return tensor

    def _op(self, op: dict[str, Any]) -> Task:
        """One pass of a module; backward alone goes through a graph that is kept."""
        layer = op["layer"]
        x = self.tensor(images(self.batch, layer["input_shape"]))
        dy = self.tensor(images(self.batch, layer["output_shape"], 1))
        if layer["class"] == "SoftmaxCrossEntropy":
            t, loss = self.tensor(labels(self.batch, layer)), nn.CrossEntropyLoss()
            x.requires_grad_()
            return lambda: torch.autograd.grad(loss(x, t), x)
        if op["pass"] == "backward":  # of gpucnn's convolution: without the activation
            layer = {**layer, "arguments": {**layer["arguments"], "activation": None}}
        module = make_module(layer).to(device=self.device, memory_format=self.layout)
        if op["pass"] == "forward":
            return torch.no_grad()(lambda: module(x))
        inputs = [x.requires_grad_(), *module.parameters()]
        if op["pass"] == "both":
            return lambda: torch.autograd.grad(module(x), inputs, dy)
        y = module(x)
        return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)
