"""JAX: the same nets as pure functions, each step compiled whole and its state donated.

Dropout draws from JAX's default generator; Adam is written out, as JAX has none. In mixed
precision, weights are cast where they are used, batch norm and the loss compute in float32.
"""
from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from scripts.contestants import LEARNING_RATE, Task, images, labels
from scripts.contestants.workloads import as_published

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
ACTIVATIONS = {None: lambda z: z, "relu": jax.nn.relu, "tanh": jnp.tanh}
DIMENSIONS = ("NHWC", "HWIO", "NHWC")
DTYPES = {"mixed_float16": jnp.float16, "mixed_bfloat16": jnp.bfloat16}
FIRST_SCALE, GROWTH_INTERVAL = 2.0**16, 2000  # of the loss, as LossScale and GradScaler have them


def make_parameters(layer: dict[str, Any], rng: np.random.Generator) -> tuple[Any, Any]:
    """(what is learned, the running statistics): pytrees in the order of the layers."""
    if layer["children"]:
        made = [make_parameters(child, rng) for child in layer["children"]]
        return [p for p, _ in made], [s for _, s in made]
    a, c = layer["arguments"], layer["input_shape"][-1]
    if layer["class"] == "BatchNorm":
        gamma = {"gamma": jnp.ones(c)} if a.get("scale", True) else {}
        return ({**gamma, "beta": jnp.zeros(c)}, {"mean": jnp.zeros(c), "var": jnp.ones(c)})
    if layer["class"] == "Whiten2D":
        filters = layer["output_shape"][-1]
        w = rng.standard_normal((*a["kernel_size"], c, filters), dtype=np.float32)
        return {"b": jnp.zeros(filters)}, {"w": jnp.asarray(w)}
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
    if kind == "Whiten2D":
        z = lax.conv_general_dilated(x, stats["w"].astype(x.dtype), (1, 1), "VALID",
                                     dimension_numbers=DIMENSIONS)
        return z + p["b"].astype(x.dtype), stats
    return LAYERS[kind](a, p, x, key), stats


def batch_norm(a: dict[str, Any], p: Any, stats: Any, x: Any, training: bool) -> tuple[Any, Any]:
    dtype, x = x.dtype, x.astype(jnp.float32)
    mean, var = stats["mean"], stats["var"]
    if training:
        axes, m, count = tuple(range(x.ndim - 1)), a["momentum"], x.size // x.shape[-1]
        mean, var = x.mean(axes), x.var(axes)
        stats = {"mean": (1 - m) * stats["mean"] + m * mean,
                 "var": (1 - m) * stats["var"] + m * var * count / (count - 1)}
    z = (x - mean) * (lax.rsqrt(var + a["epsilon"]) * p.get("gamma", 1)) + p["beta"]
    return ACTIVATIONS[a["activation"]](z).astype(dtype), stats


def conv(a: dict[str, Any], p: Any, x: Any, key: Any) -> Any:
    z = lax.conv_general_dilated(x, p["w"].astype(x.dtype), a["stride"], pad(a["padding"], True),
                                 rhs_dilation=a["dilation"], dimension_numbers=DIMENSIONS,
                                 feature_group_count=a["groups"])
    return ACTIVATIONS[a["activation"]](with_bias(a, p, z))


def dense(a: dict[str, Any], p: Any, x: Any, key: Any) -> Any:
    return ACTIVATIONS[a["activation"]](with_bias(a, p, x @ p["w"].astype(x.dtype)))


def with_bias(a: dict[str, Any], p: Any, z: Any) -> Any:
    return z + p["b"].astype(z.dtype) if a["bias"] else z


def space_to_depth(a: dict[str, Any], p: Any, x: Any, key: Any) -> Any:
    (n, h, w, c), size = x.shape, a["size"]
    y = x.reshape(n, h // size, size, w // size, size, c).transpose(0, 1, 3, 2, 4, 5).reshape(
        n, h // size, w // size, size * size * c)
    return jnp.pad(y, ((0, 0),) * 3 + ((0, (a["channels"] or y.shape[3]) - y.shape[3]),))


def dropout(a: dict[str, Any], p: Any, x: Any, key: Any) -> Any:
    if key is None or not a["rate"]:
        return x
    kept = jax.random.bernoulli(key, 1 - a["rate"], x.shape)
    return jnp.where(kept, x / (1 - a["rate"]), 0)


def reduce_windows(a: dict[str, Any], x: Any, start: float, operation: Any) -> Any:
    return lax.reduce_window(x, np.array(start, x.dtype), operation, (1, *a["size"], 1),
                             (1, *a["stride"], 1), pad(a["padding"], False))


def pad(padding: Any, spatial: bool) -> Any:
    """gpucnn's "same", "valid", pixels or pairs of them as lax takes it."""
    if isinstance(padding, str):
        return padding.upper()
    sides = [padding] * 2 if isinstance(padding, int) else padding
    pixels = [(side, side) if isinstance(side, int) else tuple(side) for side in sides]
    return pixels if spatial else [(0, 0), *pixels, (0, 0)]


LAYERS = {
    "AvgPool2D": lambda a, p, x, key: (reduce_windows(a, x, 0.0, lax.add)
                                       / reduce_windows(a, jnp.ones_like(x), 0.0, lax.add)),
    "Conv2D": conv,
    "Dense": dense,
    "Dropout": dropout,
    "Flatten": lambda a, p, x, key: x.reshape(len(x), -1),
    "GELU": lambda a, p, x, key: jax.nn.gelu(x, approximate=False),
    "GlobalAvgPool2D": lambda a, p, x, key: x.mean((1, 2)),
    "MaxPool2D": lambda a, p, x, key: ACTIVATIONS[a["activation"]](
        reduce_windows(a, x, -jnp.inf, lax.max)),
    "ReLU": lambda a, p, x, key: jax.nn.relu(x),
    "Scale": lambda a, p, x, key: x * a["factor"],
    "SpaceToDepth": space_to_depth,
    "Tanh": lambda a, p, x, key: jnp.tanh(x),
}


def cross_entropy(logits: Any, t: Any) -> Any:
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(log_p, t[:, None], axis=1).mean()


def adam(p: Any, m: Any, s: Any, steps: Any, g: Any) -> tuple[Any, ...]:
    """What p, m, s and steps are after the gradients g."""
    steps = steps + 1
    m = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, m, g)
    s = jax.tree.map(lambda s, g: BETA2 * s + (1 - BETA2) * g * g, s, g)
    correction1, correction2 = 1 - BETA1**steps, 1 - BETA2**steps
    p = jax.tree.map(lambda p, m, s: p - LEARNING_RATE * (m / correction1) / (
        jnp.sqrt(s / correction2) + EPSILON), p, m, s)
    return p, m, s, steps


class Contestant:
    """jax.jit, and Adam over a pytree."""

    def __init__(self, workload: dict[str, Any]):
        self.versions = {"jax": jax.__version__}
        self.device, precision = workload["device"], workload["precision"]
        self.notes = {"memory": "XLA's allocator, peak"} if self.device == "cuda" else {}
        jax.config.update("jax_platforms", self.device)
        jax.config.update("jax_default_matmul_precision",
                          "tensorfloat32" if precision == "tf32" else "highest")
        self.dtype = DTYPES.get(precision, jnp.float32)
        self.batch, self.rng = workload["batch"], np.random.default_rng(0)
        if workload["what"] == "op":
            self.tasks = {op["task"]: self._op(op) for op in workload["ops"]}
            return
        net = self.net = as_published(workload["net"])
        self.x = jnp.asarray(images(self.batch, net["input_shape"]), self.dtype)
        self.t = jnp.asarray(labels(self.batch, net))
        p, stats = self.parameters = make_parameters(net, self.rng)
        if workload["what"] == "infer":
            p = jax.tree.map(lambda a: a.astype(self.dtype), p)  # once, and not in each pass
            forward = jax.jit(lambda p, stats, x: apply(net, p, stats, x, None)[0])
            self.tasks = {"infer": lambda: forward(p, stats, self.x)}
            return
        m, s = (jax.tree.map(jnp.zeros_like, p) for _ in range(2))
        scale = (jnp.float32(FIRST_SCALE), jnp.int32(0)) if self.dtype == jnp.float16 else None
        self.state = (p, stats, m, s, jnp.zeros((), jnp.int32), jax.random.key(0), scale)
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
        if self.device != "cuda":
            return None
        statistics = jax.devices()[0].memory_stats()
        return statistics.get("peak_pool_bytes") or statistics["peak_bytes_in_use"]

    def loss(self, p: Any, stats: Any, x: Any, t: Any, key: Any) -> tuple[Any, Any]:
        """(loss, new running statistics) in training."""
        logits, stats = apply(self.net, p, stats, x, key)
        return cross_entropy(logits, t), stats

    def _update(self, state: tuple[Any, ...], x: Any, t: Any) -> tuple[tuple[Any, ...], Any]:
        p, stats, m, s, steps, key, scale = state
        key, now = jax.random.split(key)
        factor = 1.0 if scale is None else scale[0]

        def scaled(p: Any) -> tuple[Any, Any]:
            loss, new = self.loss(p, stats, x, t, now)
            return loss * factor, new

        (loss, stats), g = jax.value_and_grad(scaled, has_aux=True)(p)
        g = jax.tree.map(lambda g: g / factor, g)
        after = adam(p, m, s, steps, g)
        if scale is not None:
            finite = jnp.stack([jnp.isfinite(g).all() for g in jax.tree.leaves(g)]).all()
            after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after,
                                 (p, m, s, steps))
            good = jnp.where(finite, scale[1] + 1, 0)
            grown = jnp.where(good == GROWTH_INTERVAL, 2 * factor, factor)
            scale = jnp.where(finite, grown, factor / 2), good % GROWTH_INTERVAL
        p, m, s, steps = after
        return (p, stats, m, s, steps, key, scale), loss / factor

    def _op(self, op: dict[str, Any]) -> Task:
        """One pass of a layer, compiled; a backward pass computes what it needs of the forward."""
        layer, key = op["layer"], jax.random.key(0)
        x = jnp.asarray(images(self.batch, layer["input_shape"]), self.dtype)
        dy = jnp.asarray(images(self.batch, layer["output_shape"], 1), self.dtype)
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
