"""A small model with all that trains it, for the tests of TrainStep."""
from __future__ import annotations

import numpy as np

from gpucnn import losses, models, optim, use_backend
from gpucnn.data import Augmentation, Dataset, Loader
from gpucnn.layers import BatchNorm, Conv2D, Dense, Dropout, Flatten, MaxPool2D, Sequential
from gpucnn.training import TrainStep

# name: (the model, the shape of an image); small, for the simulator
NETS = {
    "article": (lambda: models.article(10), (8, 8, 1)),
    "lenet5": (lambda: models.lenet5(10), (20, 20, 1)),
    "resnet18": (lambda: models.resnet18(10, width=4), (8, 8, 3)),
    "small": (lambda: small(), (6, 6, 2)),
}
# Without batch norm and dropout, in which a step depends on how the batch is cut into parts.
PLAIN = {"plain": (lambda: Sequential([Conv2D(3, activation="tanh"), MaxPool2D(2), Flatten(),
                                       Dense(10)]), (6, 6, 2))}


def small():
    return Sequential([Conv2D(4, activation="relu"), BatchNorm(), Dropout(0.3), Flatten(),
                       Dense(10)])


def images(shape, n=10):
    rng = np.random.default_rng(0)
    return Dataset(rng.integers(0, 256, (n, *shape), np.uint8), rng.integers(0, 10, n),
                   tuple("abcdefghij"), "random")


class Training:
    """A model with all that trains it, made anew from the same seeds."""

    def __init__(self, backend, name="small", *, precision="float32", optimizer=optim.Adam,
                 loss=losses.SoftmaxCrossEntropy, streamed=False, batch=4, rate=1e-3, **options):
        make, shape = (NETS | PLAIN)[name]
        self.data = images(shape)
        with use_backend(backend):
            self.model = make()
            self.loader = Loader(self.data, batch, seed=5, streamed=streamed,
                                 augmentation=Augmentation(crop=1, flip=True, cutout=2))
        self.model.build(shape, seed=3, precision=precision)
        scale = optim.LossScale(self.model, 2.0**8, growth_interval=3) \
            if precision == "mixed_float16" else None
        self.loss = loss(loss_scale=scale)
        self.optimizer = optimizer(self.model, rate, loss_scale=scale)
        self.step = TrainStep(self.model, self.loss, self.optimizer, **options)

    def run(self, *epochs):
        return [result for number in epochs for result in self.step.epoch(self.loader, number)]

    def state(self):
        """Everything that a step writes and the next one reads, in host memory."""
        to_numpy, model = self.model.backend.to_numpy, self.model
        arrays = {"data": model.flat_data, "grad": model.flat_grad, "cast": model.flat_cast}
        arrays |= {path: layer.own_buffers[name] for path, (layer, name) in model.buffers().items()}
        state = {name: np.array(to_numpy(a)) for name, a in arrays.items() if a is not None}
        steps = {layer.path: np.array(layer.step) for layer in model.walk()
                 if isinstance(layer, Dropout)}
        return state | steps | self.optimizer.state_dict()


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, a in one.items():
        np.testing.assert_array_equal(a, other[name], err_msg=name)
