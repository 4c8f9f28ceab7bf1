"""One step of training in plain calls, which TrainStep captures."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpucnn.backend import Array
from gpucnn.layers import Layer
from gpucnn.losses import SoftmaxCrossEntropy
from gpucnn.ops import as_array
from gpucnn.optim import Optimizer

Loss = Callable[[Array, Array], tuple[Array, Array]]


def train_step(model: Layer, loss: Loss, optimizer: Optimizer, x: Any, t: Any
               ) -> tuple[float, int]:
    """Forward, backward and update on one batch; waits for the result. TrainStep does not.

    x: (n, h, w, c) images, moved to the model's backend if they come from the host.
    t: as the loss takes it: (n,) labels, or (n, outputs), the largest of which counts as the
        label. Those of gpucnn.losses take it from the host too.

    Returns (mean loss, how many of the n were classified right before the update). The update is
    left out where the loss is not finite: the caller decides what then (check_finite).

    Raises ValueError where the loss and the optimizer have not the same loss scale.
    """
    check_loss_scales(loss, optimizer)
    value, hits = run_step(model, loss, optimizer, x, t)
    return float(value), int(hits)


def run_step(model: Layer, loss: Loss, optimizer: Optimizer, x: Any, t: Any
             ) -> tuple[Array, Array]:
    """What train_step does, for which nothing waits: (loss, hits), scalars of the backend."""
    backend = model.backend
    with np.errstate(over="ignore", invalid="ignore"):  # the loss shows it
        logits = model.forward(receive(model, x), training=True)
        if type(loss) is SoftmaxCrossEntropy:  # a subclass may compute another loss
            value, dlogits, hits = loss.with_hits(logits, t)
        else:
            value, dlogits = loss(logits, t)
            labels = backend.asarray(t)
            if labels.ndim > 1:  # outputs to come to, as the other losses of gpucnn.losses take
                labels = labels.argmax(axis=1)
            hits = (logits.argmax(axis=1) == labels).sum()
        del logits
        if not isinstance(value, backend.xp.ndarray):
            value = backend.xp.asarray(value)
        if value.itemsize < 4:
            value = value.astype(np.float32)
        model.backward_parameters(dlogits)
        optimizer.step(value)
    return value, hits


def check_loss_scales(loss: Loss, optimizer: Optimizer) -> None:
    """Raise ValueError where the loss and the optimizer have different loss scales."""
    if hasattr(loss, "loss_scale") and loss.loss_scale is not optimizer.loss_scale:
        raise ValueError("the loss and the optimizer have different loss scales; give both the "
                         "same optim.LossScale, or neither")


def receive(model: Layer, x: Any) -> Array:
    """x on the model's backend, where it comes from the host and is what a layer takes.

    Its dtype stays: the first layer casts it or refuses it (strict_dtype).
    """
    x = as_array(model.where, "input", x)
    return model.backend.asarray(x) if isinstance(x, np.ndarray) else x
