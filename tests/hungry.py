"""A net that runs out of memory where a test wants it to."""
from __future__ import annotations

import numpy as np

from gpucnn import losses, optim, use_backend
from gpucnn.layers import BatchNorm, Dense, Dropout, Flatten, Layer, Residual, Sequential
from gpucnn.training import Average, TrainStep


def run_out(backend):
    """As where 1.2 GB are not to be had."""
    if backend.name == "cupy":
        raise backend.xp.cuda.memory.OutOfMemoryError(1_200_000_000, 0)
    error = MemoryError()
    error.shape, error.dtype = (300_000_000,), np.dtype(np.float32)  # as NumPy's has them
    raise error


class Hungry(Layer):
    """Needs too much memory for more than `most` images, in one of its passes."""

    kind = "hungry"
    most, where_it_fails, failures = 10**9, "forward", 0

    def eat(self, x, where):
        if len(x) > self.most and where == self.where_it_fails:
            self.failures += 1
            run_out(self.backend)

    def forward(self, x, training=False):
        x = self.receive(x)
        self.eat(x, "forward")
        self.save(training, x.shape)
        return x + 0

    def backward(self, dy):
        (shape,) = self.take_saved()
        dy = self.receive_gradient(dy, shape)
        self.eat(dy, "backward")
        return dy


def make(backend, *, average=False, optimizer=optim.Adam, loss=losses.SoftmaxCrossEntropy,
         **options):
    """A step of a net with batch norm and dropout before the layer that may run out of memory."""
    with use_backend(backend.name):
        model = Sequential([BatchNorm(), Dropout(0.3), Residual(Sequential([Hungry()])),
                            Flatten(), Dense(3)])
    model.build((2, 2, 3), seed=2)
    kept = Average(model) if average else None
    return TrainStep(model, loss(), optimizer(model), average=kept, **options), hungry(model)


def hungry(model):
    return next(layer for layer in model.walk() if isinstance(layer, Hungry))


def batch(n=8):
    rng = np.random.default_rng(n)
    return rng.standard_normal((n, 2, 2, 3)).astype(np.float32), rng.integers(0, 3, n)


def state(step):
    """Everything that the next step reads."""
    model, to_numpy = step.model, step.backend.to_numpy
    arrays = {"data": np.array(to_numpy(model.flat_data)), **model.training_state()}
    arrays |= {path: np.array(to_numpy(layer.own_buffers[name]))
               for path, (layer, name) in model.buffers().items()}
    average = {} if step.average is None else step.average.state_dict()
    return arrays | step.optimizer.state_dict() | average
