"""Optimisers, in order of increasing complexity. One update covers all parameters at once.

theta are the parameters, g their gradients, eta the learning rate: flat arrays of the model.
"""
from __future__ import annotations

from typing import Any

from gpucnn.backend import Array
from gpucnn.layers import Layer


class Optimizer:
    """The base: step() changes the model's parameters by what its last backward pass left.

    learning_rate may be changed between steps. `state` holds the optimiser's own arrays, each as
    long as the parameters; `steps` counts the updates.
    """

    state_names: tuple[str, ...] = ()

    def __init__(self, model: Layer, learning_rate: float):
        if not model.built:
            raise RuntimeError("the optimizer needs a built model; call model.build(input_shape)")
        _check("learning_rate", learning_rate, 0, float("inf"))
        self.model = model
        self.learning_rate = learning_rate
        self.xp: Any = model.backend.xp
        self.state: dict[str, Array] = {n: self.xp.zeros_like(model.flat_data)
                                        for n in self.state_names}
        self.steps = 0

    def step(self) -> None:
        """theta -= the update."""
        self.steps += 1
        theta, g, backend = self.model.flat_data, self.model.flat_grad, self.model.backend

        def change(part: slice) -> None:
            theta[part] -= self.update(g[part], *(a[part] for a in self.state.values()))

        backend.for_each(change, backend.blocks(theta.size, 6 * theta.itemsize))

    def update(self, g: Array, *state: Array) -> Array:
        """What to subtract from a part of theta, given that part of g, which is not written, and
        of the arrays in `state`, which are brought up to date."""
        raise NotImplementedError

    def clip_gradients(self, limit: float) -> float:
        """Scale all gradients so that their joint Euclidean norm is at most `limit`.

        Returns the norm before. Pascanu, Mikolov and Bengio 2013.
        """
        g = self.model.flat_grad
        norm = float(self.xp.sqrt(g @ g))
        if norm > limit:
            g *= limit / norm
        return norm


class GradientDescent(Optimizer):
    """theta -= eta g."""

    def __init__(self, model: Layer, learning_rate: float = 0.01):
        super().__init__(model, learning_rate)

    def update(self, g: Array, *state: Array) -> Array:
        return self.learning_rate * g


class Momentum(Optimizer):
    """v = mu v + g; theta -= eta v, or with Nesterov's look-ahead eta (g + mu v). As in torch."""

    state_names = ("v",)

    def __init__(self, model: Layer, learning_rate: float = 0.01, momentum: float = 0.9,
                 nesterov: bool = False):
        super().__init__(model, learning_rate)
        _check("momentum", momentum, 0, 1)
        self.momentum = momentum
        self.nesterov = nesterov

    def update(self, g: Array, *state: Array) -> Array:
        (v,) = state
        v *= self.momentum
        v += g
        return self.learning_rate * (g + self.momentum * v if self.nesterov else v)


class RMSProp(Optimizer):
    """s = rho s + (1 - rho) g^2; theta -= eta g / (sqrt(s) + epsilon). Tieleman, Hinton 2012."""

    state_names = ("s",)

    def __init__(self, model: Layer, learning_rate: float = 0.001, rho: float = 0.9,
                 epsilon: float = 1e-8):
        super().__init__(model, learning_rate)
        _check("rho", rho, 0, 1)
        self.rho = rho
        self.epsilon = epsilon

    def update(self, g: Array, *state: Array) -> Array:
        (s,) = state
        _average(s, g * g, self.rho)
        return self.learning_rate * g / (self.xp.sqrt(s) + self.epsilon)


class Adam(Optimizer):
    """Kingma and Ba 2015, with the correction of both averages for their start at 0.

    m = beta1 m + (1 - beta1) g;  s = beta2 s + (1 - beta2) g^2
    theta -= eta (m / (1 - beta1^t)) / (sqrt(s / (1 - beta2^t)) + epsilon)
    """

    state_names = ("m", "s")

    def __init__(self, model: Layer, learning_rate: float = 0.001, beta1: float = 0.9,
                 beta2: float = 0.999, epsilon: float = 1e-8):
        super().__init__(model, learning_rate)
        _check("beta1", beta1, 0, 1)
        _check("beta2", beta2, 0, 1)
        self.beta1, self.beta2, self.epsilon = beta1, beta2, epsilon

    def update(self, g: Array, *state: Array) -> Array:
        m, s = state
        _average(m, g, self.beta1)
        _average(s, g * g, self.beta2)
        correction1, correction2 = 1 - self.beta1**self.steps, 1 - self.beta2**self.steps
        change = self.xp.sqrt(s)
        change *= correction2**-0.5
        change += self.epsilon
        self.xp.divide(m, change, out=change)
        change *= self.learning_rate / correction1
        return change


class AdamW(Adam):
    """Adam, with theta -= eta weight_decay theta beside it (Loshchilov and Hutter 2019).

    Weight decay spares biases and the parameters of norms.
    """

    def __init__(self, model: Layer, learning_rate: float = 0.001, beta1: float = 0.9,
                 beta2: float = 0.999, epsilon: float = 1e-8, weight_decay: float = 0.01):
        super().__init__(model, learning_rate, beta1, beta2, epsilon)
        _check("weight_decay", weight_decay, 0, float("inf"))
        self.weight_decay = weight_decay

    def step(self) -> None:
        weights = self.model.flat_data[:self.model.decayed_size]
        weights *= 1 - self.learning_rate * self.weight_decay
        super().step()


def _average(average: Array, newest: Array, share: float) -> None:
    average *= share
    average += (1 - share) * newest


def _check(name: str, value: float, least: float, below: float) -> None:
    if not least <= value < below:
        raise ValueError(f"{name} must be >= {least} and < {below}, got {value}")
