"""The fully connected layer."""
from __future__ import annotations

from gpucnn import activations
from gpucnn.backend import Array, PassPlan
from gpucnn.geometry import integer
from gpucnn.layers.base import Layer, LayerMemory, Parameter, Shape
from gpucnn.layers.initializers import constant, glorot_uniform, he_normal


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
        a = self.backend.dense(x, self.w.cast, self.b.data if self.b else None, self.activation,
                               self.precision.tf32)
        self.save(training, x, a if self.activation else None, a.shape)
        return a

    def backward(self, dy: Array) -> Array:
        return self._backward(dy, input_gradient=True)

    def backward_parameters(self, dy: Array) -> None:
        self._backward(dy, input_gradient=False)

    def _backward(self, dy: Array, input_gradient: bool) -> Array:
        x, a, shape = self.take_saved()
        da = self.receive_gradient(dy, shape)
        return self.backend.dense_backward(
            da, da if a is None else a, x, self.w.cast, self.activation, self.w.grad,
            self.b.grad if self.b else None, input_gradient, self.precision.tf32)

    def plan(self, batch: int, input_gradient: bool = True) -> dict[str, PassPlan]:
        return self.backend.dense_plan(batch, self.w.shape[0], self.units, self.dtype,
                                       input_gradient, self.precision.tf32)

    def memory(self, batch: int, input_gradient: bool = True) -> LayerMemory:
        plans = self.plan(batch, input_gradient)
        forward = plans.pop("forward").workspace
        saves = "xy" if self.activation else "x"
        dz = self.nbytes(batch, self.output_shape) if self.activation else 0
        most = max(plan.workspace for plan in plans.values())
        return LayerMemory(saves, forward=forward, backward=((saves, dz + most),))

    def multiply_adds(self) -> int:
        return self.w.size
