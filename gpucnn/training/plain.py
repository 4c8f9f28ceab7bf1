"""One step of training in plain calls, which TrainStep captures."""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from gpucnn.backend import Array, backend_of
from gpucnn.layers import Layer
from gpucnn.losses import SoftmaxCrossEntropy, is_soft
from gpucnn.numerics import blocks_of, for_blocks
from gpucnn.ops import as_array, check_labels
from gpucnn.optim import Optimizer
from gpucnn.training import memory
from gpucnn.training.average import Average

Loss = Callable[[Array, Array], tuple[Array, Array]]


def train_step(model: Layer, loss: Loss, optimizer: Optimizer, x: Any, t: Any
               ) -> tuple[float, int]:
    """Forward, backward and update on one batch; waits for the result. TrainStep does not.

    x: (n, h, w, c) images, moved to the model's backend if they come from the host.
    t: as the loss takes it: (n,) labels, or (n, outputs), the largest of which counts as the
        label. Those of gpucnn.losses take it from the host too.

    Returns (mean loss, how many of the n were classified right before the update). The update is
    left out where the loss is not finite: the caller decides what then (check_finite).

    Raises ValueError where the loss and the optimizer have not the same loss scale, BackendError
    where memory runs out.
    """
    check_loss_scales(loss, optimizer)
    x = receive(model, x)
    try:
        value, hits = gradients(model, loss, x, t)
        update(optimizer, None, value)
    except MemoryError as e:
        raise memory.explain(e, model, (loss, optimizer), len(x)) from e
    return float(value), int(hits)


def gradients(model: Layer, loss: Loss, x: Any, t: Any, micro_batches: int = 1
              ) -> tuple[Array, Array]:
    """Forward and backward: (mean loss, hits), scalars of the backend, for which nothing waits.

    The gradients of that loss are then in model.flat_grad.

    micro_batches: how many parts the batch is cut into, which go through the model one after the
        other: of ceil(n / micro_batches) images, the last one of what is left.
    """
    x = receive(model, x)
    n = len(x)
    parts = blocks_of(n, -(-n // micro_batches))
    if len(parts) <= 1:
        return _of_part(model, loss, x, t)
    t = receive_targets(model, loss, t, n)
    if t.shape[:1] != (n,):
        raise ValueError(f"{n} images but targets of shape {t.shape}")
    backend, g = model.backend, model.flat_grad
    total = backend.empty(g.shape, g.dtype)
    total[...] = 0
    value: Any = 0
    hits: Any = 0
    for part in parts:
        part_value, part_hits = _of_part(model, loss, x[part], t[part])  # writes all of g
        weight = (part.stop - part.start) / n
        with np.errstate(over="ignore", invalid="ignore"):  # the loss shows it
            for_blocks(backend, partial(_add_share, weight), total, g)
            value, hits = value + weight * part_value, hits + part_hits
    g[...] = total
    return backend.xp.asarray(value), hits


def update(optimizer: Optimizer, average: Average | None, value: Array) -> None:
    """The step of the optimizer, after gradients() has given that loss."""
    with np.errstate(over="ignore", invalid="ignore"):
        optimizer.step(value)
        if average is not None:
            average.update(optimizer)


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


def receive_targets(model: Layer, loss: Loss, t: Any, n: int) -> Array:
    """t on the model's backend; labels from the host are checked here, before they are parts of a
    batch or of a graph."""
    backend = model.backend
    if (type(loss) is SoftmaxCrossEntropy and not is_soft(t)
            and backend_of(t).name == "numpy"):
        return check_labels(backend, t, n, model.output_shape[-1])
    return backend.asarray(t)


def _of_part(model: Layer, loss: Loss, x: Array, t: Any) -> tuple[Array, Array]:
    backend = model.backend
    with np.errstate(over="ignore", invalid="ignore"):  # the loss shows it
        logits = model.forward(x, training=True)
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
    return value, hits


def _add_share(weight: float, total: Array, g: Array) -> None:
    g *= weight
    total += g
