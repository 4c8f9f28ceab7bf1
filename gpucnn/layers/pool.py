"""Pooling layers: the largest or the mean value of each window, channel by channel."""
from __future__ import annotations

import math

import numpy as np

from gpucnn.activations import check_name
from gpucnn.backend import Array
from gpucnn.geometry import IntOrPair, Padding, Window, check_pool_window, make_window, pair
from gpucnn.layers.base import Layer, LayerMemory, Shape


class MaxPool2D(Layer):
    """The maximum of each window: (n, h, w, c) -> (n, oh, ow, c). Arguments as ops.max_pool2d's.

    activation: None, or "relu" for max(0, maximum). That is the same as a ReLU before the pooling,
        forward and backward, and takes less: one gather is the backward pass of both.

    The backward pass sends each gradient to the place that the mask holds, and 0 elsewhere.
    """

    kind = "pool"

    def __init__(self, size: IntOrPair = 2, *, stride: IntOrPair | None = None,
                 padding: Padding = 0, dilation: IntOrPair = 1, activation: str | None = None,
                 **options):
        super().__init__(**options)
        self.size = pair(self.where, "size", size)
        self.stride = self.size if stride is None else pair(self.where, "stride", stride)
        self.padding = padding
        self.dilation = pair(self.where, "dilation", dilation)
        self.activation = activation
        check_name(self.where, activation, ("relu",))

    def declare(self, input_shape: Shape) -> Shape:
        self._check_shape((1, *input_shape), 4)
        return (*self._window((1, *input_shape)).out_size(*input_shape[:2]), input_shape[2])

    def forward(self, x: Array, training: bool = False) -> Array:
        x = self.receive(x, 4)
        window = self._window(x.shape)
        y, mask = self.backend.max_pool(x, window, self.activation == "relu", want_mask=training)
        self.save(training, mask, x.shape, window)
        return y

    def backward(self, dy: Array) -> Array:
        mask, x_shape, window = self.take_saved()
        dy = self.receive_gradient(dy, mask.shape)
        return self.backend.max_pool_backward(dy, mask, x_shape, window)

    def memory(self, batch: int, input_gradient: bool = True) -> LayerMemory:
        window = self._window((1, *self.input_shape))
        mask = batch * math.prod(self.output_shape) * np.dtype(window.mask_dtype).itemsize
        padded = _padded_shape(self, window)
        return LayerMemory("", other=mask, backward=(("", 0),), scratch={
            "padded": _scratch(self, batch, padded) if padded != self.input_shape else 0})

    def _window(self, x_shape: Shape) -> Window:
        return _pool_window(self, x_shape, self.dilation)


class AvgPool2D(Layer):
    """The mean of each window: (n, h, w, c) -> (n, oh, ow, c). Padding is not counted.

    The backward pass shares each gradient out evenly over the pixels of its window.
    """

    kind = "pool"

    def __init__(self, size: IntOrPair = 2, *, stride: IntOrPair | None = None,
                 padding: Padding = 0, **options):
        super().__init__(**options)
        self.size = pair(self.where, "size", size)
        self.stride = self.size if stride is None else pair(self.where, "stride", stride)
        self.padding = padding

    def declare(self, input_shape: Shape) -> Shape:
        self._check_shape((1, *input_shape), 4)
        window = _pool_window(self, (1, *input_shape), 1)
        return (*window.out_size(*input_shape[:2]), input_shape[2])

    def forward(self, x: Array, training: bool = False) -> Array:
        x = self.receive(x, 4)
        window = _pool_window(self, x.shape, 1)
        y = self.backend.avg_pool(x, window)
        self.save(training, y.shape, x.shape, window)
        return y

    def backward(self, dy: Array) -> Array:
        y_shape, x_shape, window = self.take_saved()
        dy = self.receive_gradient(dy, y_shape)
        return self.backend.avg_pool_backward(dy, x_shape, window)

    def memory(self, batch: int, input_gradient: bool = True) -> LayerMemory:
        padded = _padded_shape(self, _pool_window(self, (1, *self.input_shape), 1))
        return LayerMemory("", backward=(("", 0),), scratch={
            "rows": _scratch(self, batch, (self.output_shape[0], *padded[1:])),
            "padded": _scratch(self, batch, padded) if padded != self.input_shape else 0})


class GlobalAvgPool2D(Layer):
    """The mean of each channel over the whole image: (n, h, w, c) -> (n, c)."""

    kind = "pool"

    def declare(self, input_shape: Shape) -> Shape:
        self._check_shape((1, *input_shape), 4)
        return (input_shape[2],)

    def forward(self, x: Array, training: bool = False) -> Array:
        x = self.receive(x, 4)
        self.save(training, x.shape)
        return self.backend.global_avg_pool(x)

    def backward(self, dy: Array) -> Array:
        (x_shape,) = self.take_saved()
        dy = self.receive_gradient(dy, (x_shape[0], x_shape[3]))
        return self.backend.global_avg_pool_backward(dy, x_shape)

    def memory(self, batch: int, input_gradient: bool = True) -> LayerMemory:
        return LayerMemory("", backward=(("", 0),))


def _pool_window(layer: MaxPool2D | AvgPool2D, x_shape: Shape, dilation: IntOrPair) -> Window:
    h, w = x_shape[1], x_shape[2]
    window = make_window(layer.where, layer.size, layer.stride, layer.padding, dilation, (h, w))
    check_pool_window(layer.where, window, h, w)
    return window


def _padded_shape(layer: Layer, window: Window) -> Shape:
    h, w, c = layer.input_shape
    return h + window.top + window.bottom, w + window.left + window.right, c


def _scratch(layer: Layer, batch: int, shape: Shape) -> int:
    """Bytes of arrays of that shape that pooling makes on the CPU, block by block."""
    x = layer.nbytes(batch, layer.input_shape)
    return layer.backend.scratch_bytes(batch, layer.nbytes(batch, shape), 2 * x)
