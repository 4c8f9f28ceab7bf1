"""Activations as layers of their own. Conv2D and Dense can hold them inside instead."""
from __future__ import annotations

import math

from gpucnn.backend import LEAKY_SLOPE, Array
from gpucnn.layers.base import Layer, LayerMemory
from gpucnn.numerics import log_softmax

# Arrays that activations.py makes beside its result, forward and backward.
_TEMPORARIES = {"relu": (0, 1), "leaky_relu": (1, 4), "sigmoid": (4, 1), "tanh": (0, 1)}


def temporaries(layer: Layer, activation: str, batch: int) -> tuple[int, int]:
    """Bytes that Backend.activate and activation_backward take beside, of the layer's output."""
    y = layer.nbytes(batch, layer.output_shape)
    n, (forward, backward) = y // layer.dtype.itemsize, _TEMPORARIES[activation]
    return (layer.backend.scratch_bytes(n, forward * y, 2 * y),
            layer.backend.scratch_bytes(n, backward * y, 3 * y))


class _Pointwise(Layer):
    """A = g(Z), element by element; a subclass names g."""

    slope = LEAKY_SLOPE

    def forward(self, x: Array, training: bool = False) -> Array:
        a = self.backend.activate(self.receive(x), None, self.kind, self.slope)
        self.save(training, a)
        return a

    def backward(self, dy: Array) -> Array:
        (a,) = self.take_saved()
        return self.backend.activation_backward(self.receive_gradient(dy, a.shape), a, self.kind,
                                                self.slope)

    def memory(self, batch: int, input_gradient: bool = True) -> LayerMemory:
        forward, backward = temporaries(self, self.kind, batch)
        return LayerMemory("y", forward=forward, backward=(("y", backward),))


class ReLU(_Pointwise):
    """max(0, z)."""

    kind = "relu"


class LeakyReLU(_Pointwise):
    """z where z >= 0, else slope * z, with 0 < slope < 1."""

    kind = "leaky_relu"

    def __init__(self, slope: float = LEAKY_SLOPE, **options):
        super().__init__(**options)
        if not 0 < slope < 1:
            raise ValueError(f"{self.where}: slope must be between 0 and 1, got {slope}")
        self.slope = slope


class Sigmoid(_Pointwise):
    """1 / (1 + exp(-z))."""

    kind = "sigmoid"


class Tanh(_Pointwise):
    """tanh(z)."""

    kind = "tanh"


class GELU(Layer):
    """x P(x), P being the normal distribution: (1 + erf(x / sqrt(2))) / 2, and not its tanh.

    Hendrycks and Gimpel 2016. It falls and rises, so that no layer can tell x from the output: it
    keeps x, and stands on its own. At the infinities it has its limits, where torch gives NaN.
    """

    kind = "gelu"

    def forward(self, x: Array, training: bool = False) -> Array:
        x = self.receive(x)
        self.save(training, x)
        return self.backend.gelu(x)

    def backward(self, dy: Array) -> Array:
        (x,) = self.take_saved()
        return self.backend.gelu_backward(self.receive_gradient(dy, x.shape), x)

    def memory(self, batch: int, input_gradient: bool = True) -> LayerMemory:
        return LayerMemory("x", backward=(("x", 0),))


class Scale(Layer):
    """factor x, with a factor that is not learned."""

    kind = "scale"

    def __init__(self, factor: float, **options):
        super().__init__(**options)
        if not math.isfinite(factor):
            raise ValueError(f"{self.where}: factor must be finite, got {factor}")
        self.factor = factor

    def forward(self, x: Array, training: bool = False) -> Array:
        x = self.receive(x)
        self.save(training, x.shape)
        return self._scaled(x)

    def backward(self, dy: Array) -> Array:
        (shape,) = self.take_saved()
        return self._scaled(self.receive_gradient(dy, shape))

    def memory(self, batch: int, input_gradient: bool = True) -> LayerMemory:
        return LayerMemory("", backward=(("", 0),))

    def _scaled(self, x: Array) -> Array:
        return (x * self.factor).astype(x.dtype, copy=False)


class Softmax(Layer):
    """exp(z) / sum exp(z) over the last axis, for probabilities out of a trained net.

    Train on the logits with SoftmaxCrossEntropy, which is more accurate than its logarithm.
    """

    kind = "softmax"

    def forward(self, x: Array, training: bool = False) -> Array:
        x = self.receive(x)
        xp, exact = self.backend.xp, self.precision.parameters  # 16 bits would not hold the sum
        y = xp.exp(log_softmax(xp, x.astype(exact, copy=False))).astype(self.dtype, copy=False)
        self.save(training, y)
        return y

    def backward(self, dy: Array) -> Array:
        (y,) = self.take_saved()
        dy = self.receive_gradient(dy, y.shape)
        return y * (dy - (dy * y).sum(axis=-1, keepdims=True))

    def memory(self, batch: int, input_gradient: bool = True) -> LayerMemory:
        y = self.nbytes(batch, self.output_shape)
        exact = y // self.dtype.itemsize * self.precision.parameters.itemsize
        return LayerMemory("y", forward=exact, backward=(("y", y),))
