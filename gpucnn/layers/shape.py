"""Layers that change the shape and nothing else."""
from __future__ import annotations

import math
from collections.abc import Callable

from gpucnn.backend import Array
from gpucnn.geometry import integer
from gpucnn.layers.base import Layer, LayerMemory, Shape


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

    def memory(self, batch: int, input_gradient: bool = True) -> LayerMemory:
        return LayerMemory("", view=True)


class SpaceToDepth(Layer):
    """Each size x size square of pixels becomes one: (n, h, w, c) -> (n, h / size, w / size, k).

    Channel (dy size + dx) c + i of a pixel is channel i of the pixel (dy, dx) in its square. A
    convolution over squares with stride 1 contains that over pixels with stride `size`, and gives
    a GPU more channels to read at once.

    channels: k; None for size * size * c. Zeros stand in those that are more.

    Raises ValueError for images whose height or width is not a multiple of size.
    """

    kind = "squares"

    def __init__(self, size: int = 2, channels: int | None = None, **options):
        super().__init__(**options)
        self.size = integer(self.where, "size", size)
        self.channels = channels if channels is None else integer(self.where, "channels", channels)

    def declare(self, input_shape: Shape) -> Shape:
        self._check_shape((1, *input_shape), 4)
        return self._squares((1, *input_shape))[1:]

    def forward(self, x: Array, training: bool = False) -> Array:
        x = self.receive(x, 4)
        n, oh, ow, k = self._squares(x.shape)
        y = self.backend.empty((n, oh, ow, k), self.dtype)
        row = self.size * x.shape[3]
        pixels = x.reshape(n, oh, self.size, ow, row)

        def gather(images: slice) -> None:
            for dy in range(self.size):
                y[images, :, :, dy * row:(dy + 1) * row] = pixels[images, :, dy]
            y[images, :, :, self.size * row:] = 0

        self._for_images(gather, y)
        self.save(training, x.shape)
        return y

    def backward(self, dy: Array) -> Array:
        (x_shape,) = self.take_saved()
        n, oh, ow, _ = squares = self._squares(x_shape)
        dy = self.receive_gradient(dy, squares)
        dx = self.backend.empty(x_shape, self.dtype)
        row = self.size * x_shape[3]
        pixels = dx.reshape(n, oh, self.size, ow, row)

        def scatter(images: slice) -> None:
            for k in range(self.size):
                pixels[images, :, k] = dy[images, :, :, k * row:(k + 1) * row]

        self._for_images(scatter, dy)
        return dx

    def memory(self, batch: int, input_gradient: bool = True) -> LayerMemory:
        return LayerMemory("", backward=(("", 0),))

    def _for_images(self, work: Callable[[slice], None], y: Array) -> None:
        item = math.prod(y.shape[1:]) * y.itemsize
        self.backend.for_each(work, self.backend.blocks(len(y), 2 * item))

    def _squares(self, x_shape: Shape) -> tuple[int, int, int, int]:
        """The shape of the output."""
        n, h, w, c = x_shape
        if h % self.size or w % self.size:
            raise ValueError(f"{self.where}: images of {h} x {w} pixels have no whole number of "
                             f"squares of {self.size} x {self.size}; crop or pad them")
        filled = self.size**2 * c
        k = filled if self.channels is None else self.channels
        if k < filled:
            raise ValueError(f"{self.where}: channels must be >= {filled} for images with {c} "
                             f"channels, got {k}")
        return n, h // self.size, w // self.size, k
