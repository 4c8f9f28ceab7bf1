"""Batch normalisation."""
from __future__ import annotations

import math

from gpucnn.backend import Array
from gpucnn.layers.base import Layer, Parameter, Shape, constant


class BatchNorm(Layer):
    """gamma (x - mean) / sqrt(var + epsilon) + beta for each channel, the last axis.

    Ioffe and Szegedy 2015. In training, mean and var are those of the batch, over all other axes;
    the running ones follow them and are used otherwise.

    momentum: the share of the newest batch in the running statistics. The running variance is
        unbiased (divided by count - 1), as in torch.

    Parameters: gamma (c,), 1; beta (c,), 0. Buffers: running_mean, running_var (c,).
    """

    kind = "norm"
    gamma: Parameter
    beta: Parameter

    def __init__(self, *, momentum: float = 0.1, epsilon: float = 1e-5, **options):
        super().__init__(**options)
        if not 0 < momentum <= 1:
            raise ValueError(f"{self.where}: momentum must be > 0 and <= 1, got {momentum}")
        if not 0 < epsilon < math.inf:
            raise ValueError(f"{self.where}: epsilon must be > 0 and finite, got {epsilon}")
        self.momentum = momentum
        self.epsilon = epsilon

    def declare(self, input_shape: Shape) -> Shape:
        channels = input_shape[-1:]
        self.gamma = self.add_parameter("gamma", channels, constant(1), decay=False)
        self.beta = self.add_parameter("beta", channels, constant(0), decay=False)
        return input_shape

    def make_state(self, key: int) -> None:
        xp = self.backend.xp
        self.own_buffers = {"running_mean": xp.zeros(self.gamma.shape, self.precision.parameters),
                            "running_var": xp.ones(self.gamma.shape, self.precision.parameters)}

    def forward(self, x: Array, training: bool = False) -> Array:
        x = self.receive(x, len(self.input_shape) + 1)
        if x.shape[-1:] != self.gamma.shape:
            raise ValueError(f"{self.where}: input has {x.shape[-1]} channels (last axis of "
                             f"{x.shape}), weights expect {self.gamma.size}")
        xp = self.backend.xp
        rows = x.reshape(-1, x.shape[-1])
        if training and len(rows):  # an empty batch has no statistics
            # A float: with NumPy 1.26 float32 / an int beyond 65535 is float64.
            count = float(len(rows))
            if count < 2:
                raise ValueError(f"{self.where}: needs more than 1 value per channel in training, "
                                 f"got input {x.shape}")
            mean = self.backend.sum_rows(rows) / count
            centred = rows - mean
            var = self.backend.sum_rows(centred * centred) / count
            self._follow("running_mean", mean)
            self._follow("running_var", var * (count / (count - 1)))
        else:
            centred = rows - self.own_buffers["running_mean"]
            var = self.own_buffers["running_var"]
        inverse_std = 1 / xp.sqrt(var + self.epsilon)
        x_hat = centred * inverse_std
        self.save(training, x_hat, inverse_std, x.shape)
        return (x_hat * self.gamma.data + self.beta.data).reshape(x.shape)

    def backward(self, dy: Array) -> Array:
        x_hat, inverse_std, shape = self.take_saved()
        dy = self.receive_gradient(dy, shape).reshape(x_hat.shape)
        count = float(max(1, len(dy)))
        dbeta, dgamma = self.backend.sum_rows(dy), self.backend.sum_rows(dy * x_hat)
        self.beta.grad[...] = dbeta
        self.gamma.grad[...] = dgamma
        # mean and var depend on x as well, which takes the mean of dy and its part along x_hat out.
        dx = (dy - dbeta / count - x_hat * (dgamma / count)) * (self.gamma.data * inverse_std)
        return dx.reshape(shape)

    def multiply_adds(self) -> int:
        return math.prod(self.output_shape)

    def _follow(self, name: str, newest: Array) -> None:
        running = self.own_buffers[name]
        running *= 1 - self.momentum
        running += self.momentum * newest
