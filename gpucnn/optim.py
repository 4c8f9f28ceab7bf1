"""Optimisers, in order of increasing complexity. One update covers all parameters at once.

theta are the parameters, g their gradients, eta the learning rate: flat arrays of the model. Each
formula stands here, and for the GPU in kernels/optimizer.cu.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from gpucnn.backend import Array
from gpucnn.geometry import is_int
from gpucnn.layers import Layer
from gpucnn.update import (
    ADAM,
    DESCENT,
    LEAST_SCALE,
    MOMENTUM,
    NORM,
    RATE,
    RMS_PROP,
    STEPS,
    Rule,
    Update,
)


class LossScale:
    """By how much to multiply the loss, so that small gradients survive in 16 bits.

    An optimiser that has one divides the gradients by it again. A step whose gradients are not all
    finite is left out and halves the scale, down to 2^-126; `growth_interval` good steps in a row
    double it (Micikevicius et al., "Mixed precision training", 2018). With float64 a gradient over
    1e154, whose square is infinite, counts as not finite too.

    value: the scale and the number of good steps since it last changed, two doubles of the model's
    backend, which a training step neither waits for nor copies to the host.

    initial: from 2^-126 to below 2^128. Raises TypeError and ValueError.
    """

    def __init__(self, model: Layer, initial: float = 2.0**16, growth_interval: int = 2000):
        check_number("initial", initial, LEAST_SCALE, 2.0**128)
        if not is_int(growth_interval):
            raise TypeError(f"growth_interval must be an int, got {growth_interval!r}")
        if growth_interval < 1:
            raise ValueError(f"growth_interval must be >= 1, got {growth_interval}")
        self.growth_interval = int(growth_interval)
        self.value: Array = model.backend.asarray([float(initial), 0.0])

    def __float__(self) -> float:
        """The scale; waits for the GPU."""
        return float(self.value[0])


class Optimizer:
    """The base: step() changes the model's parameters by what its last backward pass left.

    learning_rate may be changed between steps. `state` holds the optimiser's own arrays, each as
    long as the parameters.

    weight_decay: theta -= eta weight_decay theta beside the update, sparing biases and the
        parameters of norms (Loshchilov and Hutter 2019, "Decoupled weight decay regularization").
    clip_norm: the largest norm that all gradients together may have, as in clip_gradients(); the
        GPU is not waited for, and the gradients are not written.
    loss_scale: what the loss was multiplied with.

    In mixed precision a step also writes the model's 16-bit copy of the parameters.

    Raises RuntimeError for a model that is not built, TypeError and ValueError for settings.

    An optimiser of one's own defines state_names and update(); on the GPU it runs as array code.
    """

    state_names: tuple[str, ...] = ()

    def __init__(self, model: Layer, learning_rate: float, *, weight_decay: float = 0.0,
                 clip_norm: float | None = None, loss_scale: LossScale | None = None):
        if not model.built:
            raise RuntimeError("the optimizer needs a built model; call model.build(input_shape)")
        if clip_norm is not None:
            check_number("clip_norm", clip_norm, 0, float("inf"))
        check_number("weight_decay", weight_decay, 0, float("inf"))
        check_loss_scale(loss_scale)
        self.model = model
        self.weight_decay = weight_decay
        self.clip_norm, self.loss_scale = clip_norm, loss_scale
        self.xp: Any = model.backend.xp
        self.state: dict[str, Array] = {n: self.xp.zeros_like(model.flat_data)
                                        for n in self.state_names}
        self.control: Array = self.xp.zeros(NORM + 1)  # gpucnn.update says what is where
        self.learning_rate = learning_rate

    @property
    def learning_rate(self) -> float:
        """eta, kept on the device too: setting it does not wait, and changes captured graphs."""
        return self._learning_rate

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        check_number("learning_rate", value, 0, float("inf"))
        self._learning_rate = value
        self.control[RATE] = float(value)

    @property
    def steps(self) -> int:
        """How many updates were made; those that a loss scale left out are not counted.

        Counted on the device: reading it waits for the GPU.
        """
        return int(self.control[STEPS])

    @steps.setter
    def steps(self, value: int) -> None:
        self.control[STEPS] = float(value)

    @property
    def gradient_norm(self) -> float:
        """Of the last step, before clipping and without the loss scale, where it had either.

        Reading it waits for the GPU.
        """
        return float(self.control[NORM])

    def step(self, loss: Array | None = None) -> None:
        """theta -= the update.

        loss: of the backend; where it is not finite nothing is changed, and nothing waits for it.
        """
        model, scale = self.model, self.loss_scale
        same = _definer(type(self), "rule") is _definer(type(self), "update")
        model.backend.apply_update(Update(
            model.flat_data, model.flat_grad, self.state, self.control,
            formula=self.update, rule=self.rule() if same else None,
            weight_decay=self.weight_decay, decayed_size=model.decayed_size,
            clip_norm=self.clip_norm, loss_scale=None if scale is None else scale.value,
            growth_interval=1 if scale is None else scale.growth_interval, copy=model.flat_cast,
            loss=loss))

    def update(self, g: Array, *state: Array) -> Array:
        """What to subtract from a part of theta, given that part of g, which is not written, and
        of the arrays in `state`, which are brought up to date."""
        raise NotImplementedError

    def rule(self) -> Rule | None:
        """What this class's update() is in kernels/optimizer.cu; None where it is not there."""
        return None

    def clip_gradients(self, limit: float) -> float:
        """Scale all gradients so that their joint Euclidean norm is at most `limit`.

        Returns the norm before, for which it waits for the GPU; clip_norm does not. Both are those
        without the loss scale, where there is one. Pascanu, Mikolov and Bengio 2013. The squares
        are added as doubles, in an order that depends on the number of parameters alone.

        Raises ValueError for a limit below 0, or NaN.
        """
        if not limit >= 0:
            raise ValueError(f"the norm's limit must be >= 0, got {limit}")
        backend, g = self.model.backend, self.model.flat_grad
        norm = float(backend.to_numpy(backend.sum_of_squares(g)).sum()) ** 0.5
        if self.loss_scale is not None:
            norm /= float(self.loss_scale)
        if norm > limit:
            g *= limit / norm
        return norm

    def state_dict(self) -> dict[str, np.ndarray]:
        """All that a resumed run needs beside the arguments, as arrays of the host: waits."""
        arrays = {**self.state, "steps": np.array(self.steps)}
        if self.loss_scale is not None:
            arrays["loss_scale"] = self.loss_scale.value
        return {name: np.array(self.model.backend.to_numpy(a)) if name != "steps" else a
                for name, a in arrays.items()}

    def load_state_dict(self, arrays: dict[str, np.ndarray]) -> None:
        """Go on from what state_dict() gave, on this backend or the other.

        Raises ValueError for names or shapes that are not this optimiser's.
        """
        own = {**{name: a.shape for name, a in self.state.items()}, "steps": (),
               **({} if self.loss_scale is None else {"loss_scale": (2,)})}
        given = {name: np.shape(a) for name, a in arrays.items()}
        if given != own:
            raise ValueError(f"the state of this {type(self).__name__} is {own}, got {given}")
        for name, a in self.state.items():
            a[...] = self.model.backend.asarray(arrays[name], a.dtype)
        self.steps = int(arrays["steps"])
        if self.loss_scale is not None:
            self.loss_scale.value[...] = self.model.backend.asarray(arrays["loss_scale"])


class GradientDescent(Optimizer):
    """theta -= eta g."""

    def __init__(self, model: Layer, learning_rate: float = 0.01, **options: Any):
        super().__init__(model, learning_rate, **options)

    def update(self, g: Array, *state: Array) -> Array:
        return self.learning_rate * g

    def rule(self) -> Rule:
        return Rule(DESCENT)


class Momentum(Optimizer):
    """v = mu v + g; theta -= eta v, or with Nesterov's look-ahead eta (g + mu v). As in torch."""

    state_names = ("v",)

    def __init__(self, model: Layer, learning_rate: float = 0.01, momentum: float = 0.9,
                 nesterov: bool = False, **options: Any):
        super().__init__(model, learning_rate, **options)
        check_number("momentum", momentum, 0, 1)
        self.momentum = momentum
        self.nesterov = nesterov

    def update(self, g: Array, *state: Array) -> Array:
        (v,) = state
        v *= self.momentum
        v += g
        return self.learning_rate * (g + self.momentum * v if self.nesterov else v)

    def rule(self) -> Rule:
        return Rule(MOMENTUM, beta1=self.momentum, nesterov=self.nesterov)


class RMSProp(Optimizer):
    """s = rho s + (1 - rho) g^2; theta -= eta g / (sqrt(s) + epsilon). Tieleman, Hinton 2012."""

    state_names = ("s",)

    def __init__(self, model: Layer, learning_rate: float = 0.001, rho: float = 0.9,
                 epsilon: float = 1e-8, **options: Any):
        super().__init__(model, learning_rate, **options)
        check_number("rho", rho, 0, 1)
        self.rho = rho
        self.epsilon = epsilon

    def update(self, g: Array, *state: Array) -> Array:
        (s,) = state
        _average(s, g * g, self.rho)
        change = self.xp.sqrt(s)
        change += self.epsilon
        self.xp.divide(g, change, out=change)
        change *= self.learning_rate
        return change

    def rule(self) -> Rule:
        return Rule(RMS_PROP, beta2=self.rho, epsilon=self.epsilon)


class Adam(Optimizer):
    """Kingma and Ba 2015, with the correction of both averages for their start at 0.

    m = beta1 m + (1 - beta1) g;  s = beta2 s + (1 - beta2) g^2
    theta -= eta (m / (1 - beta1^t)) / (sqrt(s / (1 - beta2^t)) + epsilon)
    """

    state_names = ("m", "s")

    def __init__(self, model: Layer, learning_rate: float = 0.001, beta1: float = 0.9,
                 beta2: float = 0.999, epsilon: float = 1e-8, **options: Any):
        super().__init__(model, learning_rate, **options)
        check_number("beta1", beta1, 0, 1)
        check_number("beta2", beta2, 0, 1)
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

    def rule(self) -> Rule:
        return Rule(ADAM, self.beta1, self.beta2, self.epsilon)


class AdamW(Adam):
    """Adam with a weight decay by default (Loshchilov and Hutter 2019)."""

    def __init__(self, model: Layer, learning_rate: float = 0.001, beta1: float = 0.9,
                 beta2: float = 0.999, epsilon: float = 1e-8, weight_decay: float = 0.01,
                 **options: Any):
        super().__init__(model, learning_rate, beta1, beta2, epsilon, weight_decay=weight_decay,
                         **options)


# What a user calls them.
BY_NAME: dict[str, Callable[..., Optimizer]] = {
    "sgd": GradientDescent, "momentum": Momentum, "nesterov": partial(Momentum, nesterov=True),
    "rmsprop": RMSProp, "adam": Adam, "adamw": AdamW,
}


def _definer(cls: type, method: str) -> type:
    """The class whose method it is: a subclass may change update() and leave rule() behind."""
    return next(c for c in cls.__mro__ if method in vars(c))


def _average(average: Array, newest: Array, share: float) -> None:
    average *= share
    average += (1 - share) * newest


def check_loss_scale(scale: object) -> None:
    """Raise TypeError unless it is a LossScale or None."""
    if scale is not None and not isinstance(scale, LossScale):
        raise TypeError(f"loss_scale must be an optim.LossScale or None, got {scale!r}")


def check_number(name: str, value: float, least: float, below: float) -> None:
    """Raise TypeError unless it is a number, ValueError unless it is in the range."""
    try:
        fits = least <= value < below
    except TypeError:
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    if not fits:
        raise ValueError(f"{name} must be >= {least} and < {below}, got {value}")
