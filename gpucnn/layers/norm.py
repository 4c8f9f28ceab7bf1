"""Batch normalisation."""
from __future__ import annotations

import math
from typing import Any

from gpucnn import activations
from gpucnn.backend import Array
from gpucnn.layers.base import Layer, LayerMemory, Parameter, Shape
from gpucnn.layers.initializers import constant
from gpucnn.ops import check_epsilon


class BatchNorm(Layer):
    """Z = gamma (x - mean) / sqrt(var + epsilon) + beta for each channel, the last axis; A = g(Z).

    Ioffe and Szegedy 2015. In training, mean and var are those of the batch, over all other axes;
    the running ones follow them and are used otherwise.

    activation: None or "relu", in the same pass; another one is a layer of its own.
    scale: whether gamma is learned; without it gamma is 1, and no parameter.
    momentum: the share of the newest batch in the running statistics. The running variance is
        unbiased (divided by count - 1), as in torch.
    frozen: whether training too uses the running statistics, and leaves them as they are; it may
        be changed between passes.

    Parameters: gamma (c,), 1, unless scale is False; beta (c,), 0. Buffers: running_mean,
    running_var (c,).
    """

    kind = "norm"
    gamma: Parameter
    beta: Parameter

    def __init__(self, *, activation: str | None = None, momentum: float = 0.1,
                 epsilon: float = 1e-5, scale: bool = True, frozen: bool = False, **options):
        super().__init__(**options)
        activations.check_name(self.where, activation, activations.FUSED_WITH_NORM)
        if not 0 < momentum <= 1:
            raise ValueError(f"{self.where}: momentum must be > 0 and <= 1, got {momentum}")
        check_epsilon(self.where, epsilon)
        self.activation = activation
        self.momentum = momentum
        self.epsilon = epsilon
        self.scale = scale
        self.frozen = frozen
        self.source: Layer | None = None  # whose output this layer is given

    def declare(self, input_shape: Shape) -> Shape:
        channels = input_shape[-1:]
        self.gamma = self.add_parameter("gamma", channels, constant(1), decay=False) \
            if self.scale else Parameter(channels, constant(1), decay=False)
        self.beta = self.add_parameter("beta", channels, constant(0), decay=False)
        self.source = None
        return input_shape

    def make_state(self, key: int) -> None:
        xp = self.backend.xp
        if not self.scale:  # the kernels read and write them
            self.gamma.data = self.gamma.cast = xp.ones(self.gamma.shape, self.precision.parameters)
            self.gamma.grad = xp.zeros_like(self.gamma.data)
        self.own_buffers = {"running_mean": xp.zeros(self.gamma.shape, self.precision.parameters),
                            "running_var": xp.ones(self.gamma.shape, self.precision.parameters)}

    def forward(self, x: Array, training: bool = False) -> Array:
        return self._forward(x, None, self.activation, training)

    def forward_added(self, x: Array, residual: Array, activation: str | None,
                      training: bool = False) -> Array:
        if not self.adds(activation):
            return super().forward_added(x, residual, activation, training)
        self.check_residual(x.shape, residual)
        return self._forward(x, residual, activation, training)

    def backward(self, dy: Array) -> Array:
        return self._backward(dy, self.activation, has_residual=False)[0]

    def backward_added(self, da: Array, activation: str | None) -> tuple[Array, Array]:
        if not self.adds(activation):
            return super().backward_added(da, activation)
        return self._backward(da, activation, has_residual=True)

    def adds(self, activation: str | None) -> bool:
        return self.activation is None and activation in (None, *activations.FUSED_WITH_NORM)

    def memory(self, batch: int, input_gradient: bool = True) -> LayerMemory:
        return self._memory(batch, self.activation, has_residual=False)

    def memory_added(self, batch: int, activation: str | None) -> LayerMemory:
        return self._memory(batch, activation, has_residual=True)

    def _memory(self, batch: int, activation: str | None, has_residual: bool) -> LayerMemory:
        x = self.nbytes(batch, self.input_shape)
        saves = "xy" if self._needs_output(activation, has_residual) else "x"
        both = 2 * self.gamma.size * self.precision.parameters.itemsize  # mean and var
        backward: tuple[tuple[str, int], ...] = ((saves, 0),)
        if self.frozen:  # the dx of statistics that depend on x comes first, and goes
            dz = x if activation and not has_residual else 0
            backward = ((saves, x + dz), ("", dz))
        return LayerMemory(saves, other=0 if self.frozen else both, backward=backward,
                           buffers=both if self.scale else 2 * both, scratch={
                               "batch_norm": self.backend.scratch_bytes(batch, x, x)})

    def multiply_adds(self) -> int:
        return math.prod(self.output_shape)

    def _forward(self, x: Array, residual: Array | None, activation: str | None,
                 training: bool) -> Array:
        x = self.receive(x, len(self.input_shape) + 1)
        if x.shape[-1:] != self.gamma.shape:
            raise ValueError(f"{self.where}: input has {x.shape[-1]} channels (last axis of "
                             f"{x.shape}), weights expect {self.gamma.size}")
        mean, var = self.own_buffers["running_mean"], self.own_buffers["running_var"]
        moments = self._moments_of(x)
        if training and len(x) and not self.frozen:  # an empty batch has no statistics
            if x.size < 2 * self.gamma.size:
                raise ValueError(f"{self.where}: needs more than 1 value per channel in training, "
                                 f"got input {x.shape}")
            mean, var = self.backend.batch_norm_statistics(x, mean, var, self.momentum, moments)
        a = self.backend.batch_norm(x, mean, var, self.gamma.data, self.beta.data, self.epsilon,
                                    residual, activation)
        needed = self._needs_output(activation, residual is not None)
        self.save(training, x, a if needed else None, mean, var)
        return a

    def _needs_output(self, activation: str | None, has_residual: bool) -> bool:
        """Whether the backward pass is to be given what the forward pass gave."""
        return activation is not None and (has_residual or self.frozen
                                           or not self.backend.norm_recomputes)

    def _moments_of(self, x: Array) -> Any:
        """What the layer before this one may have computed of x beside it."""
        if self.source is None:
            return None
        given, self.source.output_moments = self.source.output_moments, None
        return given[1] if given and given[0] is x else None

    def _backward(self, da: Array, activation: str | None, has_residual: bool
                  ) -> tuple[Array, Array]:
        x, a, mean, var = self.take_saved()
        dx, dz = self.backend.batch_norm_backward(
            self.receive_gradient(da, x.shape), x, a, mean, var, self.gamma.data, self.beta.data,
            self.epsilon, activation, self.gamma.grad, self.beta.grad, has_residual or self.frozen)
        if self.frozen:  # mean and var do not depend on x: dx = gamma dz / sqrt(var + epsilon)
            del x, a, dx  # before there is memory for it
            zero = self.backend.xp.zeros_like(mean)
            dx = self.backend.batch_norm(dz, zero, var, self.gamma.data, zero, self.epsilon, None,
                                         None)
        return dx, dz
