"""A first layer that whitens the windows of its images, and does not learn how."""
from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpucnn import rng
from gpucnn.backend import Array, PassPlan
from gpucnn.geometry import IntOrPair, Window, make_window, pair
from gpucnn.layers.base import Layer, LayerMemory, Parameter, Shape
from gpucnn.layers.initializers import constant
from gpucnn.numerics import blocks_of
from gpucnn.ops import as_array, check_channels

_BLOCK_BYTES = 32 << 20  # of windows that fit() looks at together


class Whiten2D(Layer):
    """Z = W * A + b with filters that are not learned: (n, h, w, c) -> (n, oh, ow, 2 kh kw c).

    oh = h - kh + 1, ow = w - kw + 1. The filters are the eigenvectors of the second moments of all
    windows, the largest eigenvalue first, each divided by sqrt(eigenvalue + epsilon), and then
    the same with the other sign. So the first half of what they give has no correlations, and
    moments of 1 (Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", section 3.2).

    fit(images) computes them. Until then they are random, at right angles and of length 1.

    kernel_size: as in Conv2D. epsilon: > 0, for directions in which there is next to nothing.

    Parameters: b (2 kh kw c,), 0. Buffers: w (kh, kw, c, 2 kh kw c).
    """

    kind = "whiten"
    b: Parameter

    def __init__(self, kernel_size: IntOrPair = 2, *, epsilon: float = 5e-4, **options):
        super().__init__(**options)
        if not 0 < epsilon < math.inf:
            raise ValueError(f"{self.where}: epsilon must be > 0 and finite, got {epsilon}")
        self.kernel_size = pair(self.where, "kernel_size", kernel_size)
        self.epsilon = epsilon

    def declare(self, input_shape: Shape) -> Shape:
        self._check_shape((1, *input_shape), 4)
        self.terms = math.prod(self.kernel_size) * input_shape[2]
        self.b = self.add_parameter("b", (2 * self.terms,), constant(0), decay=False)
        return (*self.window.out_size(*input_shape[:2]), 2 * self.terms)

    def make_state(self, key: int) -> None:
        directions, _ = np.linalg.qr(rng.normal((self.terms, self.terms), key))
        self.own_buffers = {"w": self.backend.asarray(self._both_signs(directions),
                                                      self.precision.parameters)}

    def fit(self, images: Any) -> None:
        """Compute the filters from images as the layer is given them, on the host, in float64.

        images: (n, h, w, c) floats of NumPy or of the layer's backend, of any size; a few thousand
            are enough.

        Raises RuntimeError before build(), TypeError for integers and the like, ValueError for a
        shape without windows of this layer's channels and for values that are not finite.
        """
        if not self.built:
            raise RuntimeError(f"{self.where}: not built; call build(input_shape) on the model "
                               "first")
        images = as_array(self.where, "images", images)
        self._check_shape(images.shape, 4)
        check_channels(self.where, images.shape, self.input_shape[2])
        images = images if isinstance(images, np.ndarray) else self.backend.to_numpy(images)
        oh, ow = self._window(images.shape).out_size(*images.shape[1:3])
        if not len(images) or not np.isfinite(images).all():
            raise ValueError(f"{self.where}: fit() needs images with finite values, got "
                             f"{'none' if not len(images) else 'NaN or infinity among them'}")
        moments = np.zeros((self.terms, self.terms))
        for block in blocks_of(len(images), _BLOCK_BYTES // (oh * ow * self.terms * 8)):
            windows = np.lib.stride_tricks.sliding_window_view(
                images[block].astype(np.float64), self.kernel_size, (1, 2))
            rows = windows.transpose(0, 1, 2, 4, 5, 3).reshape(-1, self.terms)
            moments += rows.T @ rows
        values, directions = np.linalg.eigh(moments / (len(images) * oh * ow))
        # Either sign is an eigenvector: take that with which the first large component is positive.
        large = np.abs(directions) >= np.abs(directions).max(axis=0) / 2
        directions *= np.sign(directions[large.argmax(axis=0), np.arange(self.terms)])
        scaled = (directions / np.sqrt(np.maximum(values, 0) + self.epsilon))[:, ::-1]
        self.own_buffers["w"][...] = self.backend.asarray(self._both_signs(scaled),
                                                          self.precision.parameters)

    def forward(self, x: Array, training: bool = False) -> Array:
        x = self.receive(x, 4)
        check_channels(self.where, x.shape, self.input_shape[2])
        window = self._window(x.shape)
        self.save(training, x, window)
        return self.backend.conv2d(x, self._filters(), self.b.data, window, 1, None,
                                   tf32=self.precision.tf32)

    def backward(self, dy: Array) -> Array:
        return self._backward(dy, input_gradient=True)

    def backward_parameters(self, dy: Array) -> None:
        self._backward(dy, input_gradient=False)

    def _backward(self, dy: Array, input_gradient: bool) -> Array:
        x, window = self.take_saved()
        dy = self.receive_gradient(dy, (len(x), *window.out_size(*x.shape[1:3]), 2 * self.terms))
        return self.backend.conv2d_backward(dy, dy, x, self._filters(), window, 1, None, None,
                                            self.b.grad, input_gradient, tf32=self.precision.tf32)

    def plan(self, batch: int, input_gradient: bool = True) -> dict[str, PassPlan]:
        """As Layer.plan: without a weight gradient."""
        plans = self.backend.conv2d_plan(
            (batch, *self.input_shape), self._filter_shape(), self.window, 1, self.dtype,
            input_gradient=input_gradient, tf32=self.precision.tf32)
        return {name: plan for name, plan in plans.items() if name != "weight gradient"}

    def memory(self, batch: int, input_gradient: bool = True) -> LayerMemory:
        plans = self.plan(batch, input_gradient)
        scratch = plans["forward"].kept
        forward, backward = (plan.workspace - sum(plan.kept.values()) for plan in (
            plans["forward"], plans.get("input gradient", PassPlan(""))))
        filters = math.prod(self._filter_shape()) * self.precision.parameters.itemsize
        return LayerMemory("x", forward=forward, backward=(("x", backward),), buffers=filters,
                           scratch=scratch)

    @property
    def window(self) -> Window:
        """Over images of the shape that the layer was built for."""
        return self._window((1, *self.input_shape))

    def multiply_adds(self) -> int:
        return math.prod(self.output_shape) * self.terms

    def _filters(self) -> Array:
        return self.own_buffers["w"].astype(self.dtype, copy=False)

    def _filter_shape(self) -> Shape:
        return (*self.kernel_size, self.input_shape[2], 2 * self.terms)

    def _both_signs(self, directions: np.ndarray) -> np.ndarray:
        """Columns of a matrix, (kh kw c, any number), as filters, and then their negatives."""
        return np.concatenate([directions, -directions], axis=1).reshape(self._filter_shape())

    def _window(self, x_shape: Shape) -> Window:
        return make_window(self.where, self.kernel_size, 1, 0, 1, (x_shape[1], x_shape[2]),
                           size_name="kernel_size")
