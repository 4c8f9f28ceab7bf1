"""What scripts/benchmark.py compares: each library in a process of its own, behind one interface.

NAME_contestant.py holds a class Contestant(workload). A workload is a JSON object:

    contestant  gpucnn, gpucnn-eager, torch, torch-channels-last, torch-graph, torch-compile or jax
    what        step, infer, op, profile, memory, load, check or ceilings
    model, net  the name, and the description of each layer (benchmark.describe)
    batch       images in x
    device      cpu or cuda
    precision   float32, tf32, mixed_float16 or mixed_bfloat16, as in gpucnn/precision.py
    threads     how many each library may use
    ops         for op: {"task", "pass", "layer"} of each; pass is forward, backward, or both

All do the same work: the batch lies where it is computed on, a step is forward, loss, backward and
Adam, and with float16 a loss scale that is doubled and halved (LossScale, GradScaler).
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

Task = Callable[[], Any]
LEARNING_RATE = 1e-3
GEMM = 2048           # rows and columns of the square matrices whose product gives the CPU's peak
GPU_GEMM = 8192
COPIED = 1 << 28      # bytes, far past any cache
GPU_COPIED = 1 << 29


class Impossible(Exception):
    """What this contestant cannot do at all; the message is the whole story."""


class Contestant(Protocol):
    """A library with the workload's net or layers built, and the data where it computes.

    notes: how it computes, for the record: {"memory": what device_bytes counts} and more.
    """

    versions: dict[str, str]
    notes: dict[str, str]
    tasks: dict[str, Task]      # by name; "step" and "infer" for a whole net

    def measure(self, task: Task, n: int) -> float:
        """Seconds that n runs take, until the device has done them; by events on a GPU."""

    def device_bytes(self) -> int | None:
        """The most memory that was taken from the GPU; None on the CPU."""


def gemm_size(device: str) -> int:
    return GPU_GEMM if device == "cuda" else GEMM


def copied_bytes(device: str) -> int:
    return GPU_COPIED if device == "cuda" else COPIED


def images(batch: int, shape: list[int], seed: int = 0) -> np.ndarray:
    """Standard normal float32, (batch, *shape)."""
    return np.random.default_rng(seed).standard_normal((batch, *shape), dtype=np.float32)


def labels(batch: int, net: dict[str, Any]) -> np.ndarray:
    """All classes in turn: int64, (batch,)."""
    return np.arange(batch) % net["output_shape"][0]
