"""Dropout."""
from __future__ import annotations

import numpy as np

from gpucnn.backend import Array
from gpucnn.layers.base import Layer, LayerMemory


class Dropout(Layer):
    """In training, zeroes each element with probability `rate` and divides the rest by 1 - rate.

    Srivastava et al. 2014. The mask is a function of the model's seed, the layer and the number of
    the training step (gpucnn.rng): the backward pass draws it again, and it is the same on every
    backend. At other times the layer does nothing. What is dropped is 0 whatever it was, NaN too.
    """

    kind = "dropout"

    def __init__(self, rate: float = 0.5, **options):
        super().__init__(**options)
        if not 0 <= rate < 1:
            raise ValueError(f"{self.where}: rate must be >= 0 and < 1, got {rate}")
        self.rate = rate

    def make_state(self, key: int) -> None:
        self.key = key
        self.own_counters = {"step": self.backend.xp.zeros(1, np.int64)}

    @property
    def step(self) -> int:
        """The number of the next training step, which its mask is drawn from; waits for the GPU."""
        return int(self.own_counters["step"][0])

    @step.setter
    def step(self, number: int) -> None:
        self.own_counters["step"][...] = number

    def forward(self, x: Array, training: bool = False) -> Array:
        x = self.receive(x)
        step = self.own_counters["step"].copy() if training else None
        self.save(training, x.shape, step)
        if not training or self.rate == 0:
            return x
        self.own_counters["step"] += 1
        return self.backend.dropout(x, self.rate, self.key, step)

    def backward(self, dy: Array) -> Array:
        shape, step = self.take_saved()
        dy = self.receive_gradient(dy, shape)
        return self.backend.dropout(dy, self.rate, self.key, step) if self.rate else dy

    def memory(self, batch: int, input_gradient: bool = True) -> LayerMemory:
        n = self.nbytes(batch, self.output_shape) // self.dtype.itemsize
        # On the CPU the random words are drawn in blocks, in as many bytes for each.
        words = self.backend.scratch_bytes(n, 28 * n, 24 * n)
        if self.rate == 0:
            return LayerMemory("", other=8, view=True)
        return LayerMemory("", other=8, forward=words, backward=(("", words),))
