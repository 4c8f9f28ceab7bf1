"""JAX: the same nets as pure functions, each step compiled whole and its state donated.

Dropout draws from JAX's default generator; Adam is written out, as JAX has none.
"""
from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from scripts.contestants import LEARNING_RATE, Task, images, labels

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
ACTIVATIONS = {None: lambda z: z, "relu": jax.nn.relu, "tanh": jnp.tanh}
DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def make_parameters(layer: dict[str, Any], rng: np.random.Generator) -> tuple[Any, Any]:
    """(what is learned, the running statistics): pytrees in the order of the layers."""
    if layer["children"]:
        made = [make_parameters(child, rng) for child in layer["children"]]
        return [p for p, _ in made], [s for _, s in made]
    a, c = layer["arguments"], layer["input_shape"][-1]
    if layer["class"] == "BatchNorm":
        return ({"gamma": jnp.ones(c), "beta": jnp.zeros(c)},
                {"mean": jnp.zeros(c), "var": jnp.ones(c)})
    if layer["class"] not in ("Conv2D", "Dense"):
        return {}, {}
    shape = ((*a["kernel_size"], c // a["groups"], a["filters"]) if layer["class"] == "Conv2D"
             else (c, a["units"]))
    scale = (2 / np.prod(shape[:-1])) ** 0.5
    w = jnp.asarray(rng.standard_normal(shape, dtype=np.float32) * np.float32(scale))
    return {"w": w, **({"b": jnp.zeros(shape[-1])} if a["bias"] else {})}, {}


def apply(layer: dict[str, Any], p: Any, stats: Any, x: Any, key: Any) -> tuple[Any, Any]:
    """(output, new running statistics). key: of the random numbers; None for inference."""
    kind, a, children = layer["class"], layer["arguments"], layer["children"]
    if children:
        keys = [None] * len(children) if key is None else jax.random.split(key, len(children))
        y, outputs, new = x, [], []
        for child, p_child, stats_child, key_child in zip(children, p, stats, keys):
            y, s = apply(child, p_child, stats_child, x if kind == "Residual" else y, key_child)
            outputs.append(y)
            new.append(s)
        if kind == "Residual":
            y = outputs[0] + (outputs[1] if len(outputs) == 2 else x)
            y = ACTIVATIONS[a["activation"]](y)
        return y, new
    if kind == "BatchNorm":
        return batch_norm(a, p, stats, x, key is not None)
    return LAYERS[kind](a, p, x, key), stats


def batch_norm(a: dict[str, Any], p: Any, stats: Any, x: Any, training: bool) -> tuple[Any, Any]:
    mean, var = stats["mean"], stats["var"]
    if training:
        axes, m = (0, 1, 2), a["momentum"]
        count = x.size / x.shape[-1]
        mean, var = x.mean(axes), x.var(axes)
        stats = {"mean": (1 - m) * stats["mean"] + m * mean,
                 "var": (1 - m) * stats["var"] + m * var * count / (count - 1)}
    z = (x - mean) * (lax.rsqrt(var + a["epsilon"]) * p["gamma"]) + p["beta"]
    return ACTIVATIONS[a["activation"]](z), stats


def conv(a: dict[str, Any], p: Any, x: Any, key: Any) -> Any:
    z = lax.conv_general_dilated(x, p["w"], a["stride"], pad(a["padding"], True),
                                 rhs_dilation=a["dilation"], dimension_numbers=DIMENSIONS,
                                 feature_group_count=a["groups"])
    return ACTIVATIONS[a["activation"]](z + p["b"] if a["bias"] else z)


def dense(a: dict[str, Any], p: Any, x: Any, key: Any) -> Any:
    z = x @ p["w"]
    return ACTIVATIONS[a["activation"]](z + p["b"] if a["bias"] else z)


def dropout(a: dict[str, Any], p: Any, x: Any, key: Any) -> Any:
    if key is None or not a["rate"]:
        return x
    kept = jax.random.bernoulli(key, 1 - a["rate"], x.shape)
    return jnp.where(kept, x / (1 - a["rate"]), 0)


def reduce_windows(a: dict[str, Any], x: Any, start: float, operation: Any) -> Any:
    return lax.reduce_window(x, start, operation, (1, *a["size"], 1), (1, *a["stride"], 1),
                             pad(a["padding"], False))


def pad(padding: Any, spatial: bool) -> Any:
    """gpucnn's "same", "valid" or pixels as lax takes it."""
    if isinstance(padding, str):
        return padding.upper()
    pixels = [(padding, padding)] * 2
    return pixels if spatial else [(0, 0), *pixels, (0, 0)]


LAYERS = {
    "AvgPool2D": lambda a, p, x, key: (reduce_windows(a, x, 0.0, lax.add)
                                       / reduce_windows(a, jnp.ones_like(x), 0.0, lax.add)),
    "Conv2D": conv,
    "Dense": dense,
    "Dropout": dropout,
    "Flatten": lambda a, p, x, key: x.reshape(len(x), -1),
    "GlobalAvgPool2D": lambda a, p, x, key: x.mean((1, 2)),
    "MaxPool2D": lambda a, p, x, key: reduce_windows(a, x, -jnp.inf, lax.max),
    "ReLU": lambda a, p, x, key: jax.nn.relu(x),
    "Tanh": lambda a, p, x, key: jnp.tanh(x),
}


def cross_entropy(logits: Any, t: Any) -> Any:
    log_p = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_p, t[:, None], axis=1).mean()


class Contestant:
    """jax.jit, and Adam over a pytree."""

    def __init__(self, workload: dict[str, Any]):
        self.versions = {"jax": jax.__version__}
        self.device = workload["device"]
        jax.config.update("jax_platforms", self.device)
        jax.config.update("jax_default_matmul_precision", "highest")  # float32, not TF32
        self.batch, self.rng = workload["batch"], np.random.default_rng(0)
        if workload["what"] == "op":
            self.tasks = {op["task"]: self._op(op) for op in workload["ops"]}
            return
        net = self.net = workload["net"]
        self.x = jnp.asarray(images(self.batch, net["input_shape"]))
        self.t = jnp.asarray(labels(self.batch, net))
        p, stats = self.parameters = make_parameters(net, self.rng)
        if workload["what"] == "infer":
            forward = jax.jit(lambda p, stats, x: apply(net, p, stats, x, None)[0])
            self.tasks = {"infer": lambda: forward(p, stats, self.x)}
            return
        m, s = (jax.tree.map(jnp.zeros_like, p) for _ in range(2))
        self.state = (p, stats, m, s, jnp.zeros((), jnp.int32), jax.random.key(0))
        self.compiled = jax.jit(self._update, donate_argnums=0)
        self.tasks = {"step": self.step}

    def step(self) -> Any:
        """One step of training; returns the loss."""
        self.state, loss = self.compiled(self.state, self.x, self.t)
        return loss

    def measure(self, task: Task, n: int) -> float:
        started = time.perf_counter()
        for _ in range(n):
            result = task()
            if self.device == "cpu":  # where calls would run side by side
                jax.block_until_ready(result)
        jax.block_until_ready(result)
        return time.perf_counter() - started

    def device_bytes(self) -> int | None:
        statistics = jax.devices()[0].memory_stats() if self.device == "cuda" else None
        return statistics and statistics["peak_bytes_in_use"]

    def loss(self, p: Any, stats: Any, x: Any, t: Any, key: Any) -> tuple[Any, Any]:
        """(loss, new running statistics) in training."""
        logits, stats = apply(self.net, p, stats, x, key)
        return cross_entropy(logits, t), stats

    def _update(self, state: tuple[Any, ...], x: Any, t: Any) -> tuple[tuple[Any, ...], Any]:
        p, stats, m, s, steps, key = state
        key, now = jax.random.split(key)
        (loss, stats), g = jax.value_and_grad(self.loss, has_aux=True)(p, stats, x, t, now)
        steps = steps + 1
        m = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, m, g)
        s = jax.tree.map(lambda s, g: BETA2 * s + (1 - BETA2) * g * g, s, g)
        correction1, correction2 = 1 - BETA1**steps, 1 - BETA2**steps
        p = jax.tree.map(lambda p, m, s: p - LEARNING_RATE * (m / correction1) / (
            jnp.sqrt(s / correction2) + EPSILON), p, m, s)
        return (p, stats, m, s, steps, key), loss

    def _op(self, op: dict[str, Any]) -> Task:
        """One pass of a layer, compiled; a backward pass computes what it needs of the forward."""
        layer, key = op["layer"], jax.random.key(0)
        x = jnp.asarray(images(self.batch, layer["input_shape"]))
        dy = jnp.asarray(images(self.batch, layer["output_shape"], 1))
        if layer["class"] == "SoftmaxCrossEntropy":
            t = jnp.asarray(labels(self.batch, layer))
            loss = jax.jit(jax.value_and_grad(cross_entropy))
            return lambda: loss(x, t)
        if op["pass"] == "backward":  # of gpucnn's convolution: without the activation
            layer = {**layer, "arguments": {**layer["arguments"], "activation": None}}
        p, stats = make_parameters(layer, self.rng)

        def forward(p: Any, x: Any) -> Any:
            return apply(layer, p, stats, x, key)[0]

        def both(p: Any, x: Any, dy: Any) -> Any:
            y, pull = jax.vjp(forward, p, x)
            return (y, pull(dy)) if op["pass"] == "both" else pull(dy)

        if op["pass"] == "forward":
            compiled = jax.jit(forward)
            return lambda: compiled(p, x)
        passes = jax.jit(both)
        return lambda: passes(p, x, dy)
