"""The moving average of a model's parameters, often better than what the last step left."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from gpucnn.backend import Array
from gpucnn.layers import Layer
from gpucnn.optim import Optimizer, check_number
from gpucnn.update import UPDATES, Averaging


class Average:
    """a = d a + (1 - d) theta after each update, for all parameters; a begins as they are now.

        average = Average(model)
        step = TrainStep(model, loss, optimizer, average=average)
        ...
        with average.applied():
            evaluate(model, batches)

    d is decay, but at the beginning less: min(decay, (1 + t) / (10 + t)) after t updates, so that
    the first parameters are forgotten soon. That is TensorFlow's ExponentialMovingAverage with
    num_updates; averages of a descent are Polyak and Juditsky's (1992).

    The averages have the dtype of the parameters. An update that was left out, for a loss or
    gradients that are not finite, leaves them as they are. What is saved but not learned, such as
    the running statistics of a batch norm, is not averaged: applied() takes the model's own, as
    torch's AveragedModel does by default.

    decay: >= 0 and < 1. warm_up: False for d = decay from the beginning.

    Raises RuntimeError for a model that is not built, TypeError and ValueError for a decay.
    """

    def __init__(self, model: Layer, decay: float = 0.999, *, warm_up: bool = True):
        if not model.built:
            raise RuntimeError("Average needs a built model; call model.build(input_shape)")
        check_number("decay", decay, 0, 1)
        if not isinstance(warm_up, bool):
            raise TypeError(f"warm_up must be True or False, got {warm_up!r}")
        self.model, self.decay, self.warm_up = model, decay, warm_up
        self.array: Array = model.flat_data.copy()
        self.is_applied = False
        self._averaging = model.backend.xp.zeros(2)

    @property
    def updates(self) -> int:
        """How many there were. Counted on the device: reading it waits for the GPU."""
        return int(self._averaging[UPDATES])

    def update(self, optimizer: Optimizer) -> None:
        """Take in the parameters that the optimizer's step() has just made. TrainStep calls it."""
        self.model.backend.apply_average(Averaging(
            self.model.flat_data, self.array, self._averaging, optimizer.control, self.decay,
            self.warm_up))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """In the block the model has the averages; after it the same bits as before.

        Raises RuntimeError inside another such block.
        """
        if self.is_applied:
            raise RuntimeError("Average: applied() stands inside another applied() block")
        model = self.model
        kept = [(a, a.copy()) for a in (model.flat_data, model.flat_cast) if a is not None]
        self.is_applied = True
        try:
            model.flat_data[...] = self.array
            model.cast_parameters()
            yield
        finally:
            for array, before in kept:
                array[...] = before
            self.is_applied = False

    def state_dict(self) -> dict[str, np.ndarray]:
        """All that a resumed run needs beside the arguments, as arrays of the host: waits."""
        return {"average": np.array(self.model.backend.to_numpy(self.array)),
                "updates": np.array(self.updates)}

    def load_state_dict(self, arrays: dict[str, np.ndarray]) -> None:
        """Go on from what state_dict() gave, on this backend or the other.

        Raises ValueError for names or shapes that are not this average's.
        """
        own = {"average": self.array.shape, "updates": ()}
        given = {name: np.shape(a) for name, a in arrays.items()}
        if given != own:
            raise ValueError(f"the state of this Average is {own}, got {given}")
        self.array[...] = self.model.backend.asarray(arrays["average"], self.array.dtype)
        self._averaging[UPDATES] = float(arrays["updates"])
