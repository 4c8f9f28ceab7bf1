"""The fully connected layer."""
from __future__ import annotations

from gpucnn import activations
from gpucnn.backend import Array
from gpucnn.geometry import integer
from gpucnn.layers.base import Layer, Parameter, Shape, constant, glorot_uniform, he_normal


class Dense(Layer):
    """Z = A W + b, then A = g(Z): (n, inputs) -> (n, units).

    activation: None, "relu", "leaky_relu", "sigmoid" or "tanh".

    Parameters: w (inputs, units), by He's rule before a ReLU and by Glorot's otherwise;
    b (units,), 0.
    """

    kind = "dense"
    w: Parameter
    b: Parameter | None

    def __init__(self, units: int, *, activation: str | None = None, bias: bool = True, **options):
        super().__init__(**options)
        self.units = integer(self.where, "units", units)
        self.activation = activation
        self.bias = bias
        activations.check_name(self.where, activation)

    def declare(self, input_shape: Shape) -> Shape:
        self._check_shape((1, *input_shape), 2)
        inputs = input_shape[0]
        rule = he_normal(inputs) if self.activation in ("relu", "leaky_relu") \
            else glorot_uniform(inputs, self.units)
        self.w = self.add_parameter("w", (inputs, self.units), rule, decay=True)
        self.b = self.add_parameter("b", (self.units,), constant(0), decay=False) \
            if self.bias else None
        return (self.units,)

    def forward(self, x: Array, training: bool = False) -> Array:
        x = self.receive(x, 2)
        if x.shape[1] != self.w.shape[0]:
            raise ValueError(f"{self.where}: input has {x.shape[1]} features, weights expect "
                             f"{self.w.shape[0]}")
        z = self.backend.matmul(x, self.w.data)
        if self.b:
            z += self.b.data
        a = activations.activate(self.backend.xp, self.activation, z)
        self.save(training, x, a)
        return a

    def backward(self, dy: Array) -> Array:
        x, a = self.take_saved()
        da = self.receive_gradient(dy, a.shape)
        dz = activations.activation_backward(self.backend.xp, self.activation, da, a)
        self.backend.matmul(x.T, dz, out=self.w.grad)
        if self.b:
            self.b.grad[...] = self.backend.sum_rows(dz)
        return self.backend.matmul(dz, self.w.data.T)

    def multiply_adds(self) -> int:
        return self.w.size
