"""What scripts/benchmark.py compares: each library in a process of its own, behind one interface.

NAME_contestant.py holds a class Contestant(workload). A workload is a JSON object:

    contestant  gpucnn, torch, torch-channels-last or jax
    what        step, infer, op, profile or memory
    model, net  the name, and the description of each layer (benchmark.describe)
    batch       images in x
    device      cpu or cuda
    threads     how many each library may use
    ops         for op: {"task", "pass", "layer"} of each; pass is forward, backward, or both
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

Task = Callable[[], Any]
LEARNING_RATE = 1e-3
GEMM = 2048  # rows and columns of the square matrices whose product gives the peak


class Contestant(Protocol):
    """A library with the workload's net or layers built, and the data where it computes."""

    versions: dict[str, str]
    tasks: dict[str, Task]      # by name; "step" and "infer" for a whole net

    def measure(self, task: Task, n: int) -> float:
        """Seconds that n runs take, until the device has done them."""

    def device_bytes(self) -> int | None:
        """The most memory that was taken from the GPU; None on the CPU."""


def images(batch: int, shape: list[int], seed: int = 0) -> np.ndarray:
    """Standard normal float32, (batch, *shape)."""
    return np.random.default_rng(seed).standard_normal((batch, *shape), dtype=np.float32)


def labels(batch: int, net: dict[str, Any]) -> np.ndarray:
    """All classes in turn: int64, (batch,)."""
    return np.arange(batch) % net["output_shape"][0]
