"""Layers that change the shape and nothing else."""
from __future__ import annotations

import math

from gpucnn.backend import Array
from gpucnn.layers.base import Layer, Shape


class Flatten(Layer):
    """(n, h, w, c) -> (n, h * w * c), in memory order."""

    kind = "flatten"

    def declare(self, input_shape: Shape) -> Shape:
        return (math.prod(input_shape),)

    def forward(self, x: Array, training: bool = False) -> Array:
        x = self.receive(x)
        self.save(training, x.shape)
        return x.reshape(len(x), math.prod(x.shape[1:]))

    def backward(self, dy: Array) -> Array:
        (shape,) = self.take_saved()
        return self.receive_gradient(dy, (shape[0], math.prod(shape[1:]))).reshape(shape)
