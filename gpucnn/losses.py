"""Losses. Each holds the 1 / n of its mean; layers never divide by the batch size.

loss_scale: what the gradient that a loss gives, and so all gradients, are multiplied with; the loss
itself is not. Give the optimiser the same one.
"""
from __future__ import annotations

import numpy as np

from gpucnn.backend import Array, backend_of
from gpucnn.numerics import log_softmax
from gpucnn.ops import as_array, cross_entropy_and_hits
from gpucnn.optim import LossScale, check_loss_scale


class SoftmaxCrossEntropy:
    """The mean of -log softmax(logits)[label]: logits (n, classes), integer labels (n,).

    Or, for labels that are floats (n, classes), such as mixup gives: the mean of
    -sum_k labels_k log softmax(logits)_k, for which each row should add up to 1. The largest of a
    row counts as its label.

    label_smoothing: as in gpucnn.ops.softmax_cross_entropy.
    """

    def __init__(self, label_smoothing: float = 0.0, loss_scale: LossScale | None = None):
        check_loss_scale(loss_scale)
        self.label_smoothing, self.loss_scale = label_smoothing, loss_scale

    def __call__(self, logits: Array, labels: Array) -> tuple[Array, Array]:
        """(loss, dlogits)."""
        loss, dlogits, _ = self.with_hits(logits, labels)
        return loss, dlogits

    def with_hits(self, logits: Array, labels: Array) -> tuple[Array, Array, Array]:
        """(loss, dlogits, how many of the n are classified right): the same pass counts them.

        Raises what ops.softmax_cross_entropy raises, ValueError for floats of another shape.
        """
        if is_soft(labels):
            return self._of_shares(logits, labels)
        return cross_entropy_and_hits(
            logits, labels, label_smoothing=self.label_smoothing,
            loss_scale=None if self.loss_scale is None else self.loss_scale.value)

    def _of_shares(self, logits: Array, shares: Array) -> tuple[Array, Array, Array]:
        dtype, z, q = _receive(type(self).__name__, logits, shares)
        xp, (n, classes) = backend_of(z).xp, z.shape
        best = z.argmax(axis=1)
        hits = ((best == q.argmax(axis=1)) & ~xp.isnan(z).any(axis=1)).sum()
        q = (1 - self.label_smoothing) * q + self.label_smoothing / classes
        log_p = log_softmax(xp, z)
        dz = (xp.exp(log_p) * q.sum(axis=1, keepdims=True) - q) / n
        loss = -(q * log_p).sum(axis=1).mean()  # a scalar / n would be a double in NumPy 1
        return loss, _scaled(dz, self.loss_scale).astype(dtype, copy=False), hits


def is_soft(labels: Array) -> bool:
    """Whether labels are shares of all classes, floats (n, classes), and not integers (n,)."""
    return getattr(labels, "ndim", 0) == 2 and labels.dtype.kind == "f"


class MeanSquaredError:
    """The mean of (y - t)^2 over all elements; y and t of one shape, both floats.

    float16 is computed in float32; dy is float16 then, and the loss, a square, float32.
    """

    def __init__(self, loss_scale: LossScale | None = None):
        check_loss_scale(loss_scale)
        self.loss_scale = loss_scale

    def __call__(self, y: Array, t: Array) -> tuple[Array, Array]:
        """(loss, dy). Raises ValueError for other shapes or an empty batch."""
        dtype, y, t = _receive(type(self).__name__, y, t)
        error = y - t
        dy = _scaled(error * (2 / error.size), self.loss_scale)
        return (error * error).mean(), dy.astype(dtype, copy=False)


class BinaryCrossEntropy:
    """The mean of -t log s(z) - (1 - t) log(1 - s(z)) over all elements, s the sigmoid.

    z are logits; t are floats in [0, 1] and have the same shape. float16 as in MeanSquaredError.
    While a CUDA graph is captured nothing can wait for a check: the loss becomes NaN for other t.
    """

    def __init__(self, loss_scale: LossScale | None = None):
        check_loss_scale(loss_scale)
        self.loss_scale = loss_scale

    def __call__(self, z: Array, t: Array) -> tuple[Array, Array]:
        """(loss, dz). Raises ValueError for other shapes, an empty batch or t outside [0, 1]."""
        dtype, z, t = _receive(type(self).__name__, z, t)
        backend = backend_of(z)
        xp, outside = backend.xp, (t < 0) | (t > 1)
        if not backend.capturing() and outside.any():
            raise ValueError(f"{type(self).__name__}: targets must lie in [0, 1], got "
                             f"{float(t[outside][0]):g}")
        # max(z, 0) - z t + log(1 + exp(-|z|)) is the same and cannot overflow.
        small = xp.exp(-xp.abs(z))
        loss = (xp.maximum(z, 0) - z * t + xp.log1p(small)).mean()
        if backend.capturing():
            loss = xp.where(outside.any(), xp.nan, loss).astype(loss.dtype)
        sigmoid = xp.where(z >= 0, 1, small) / (1 + small)
        dz = _scaled((sigmoid - t) / z.size, self.loss_scale)
        return loss, dz.astype(dtype, copy=False)


def _scaled(dy: Array, scale: LossScale | None) -> Array:
    return dy if scale is None else dy * scale.value[0].astype(dy.dtype)


def _receive(where: str, y: Array, t: Array) -> tuple[np.dtype, Array, Array]:
    """y's dtype, and y and t in the one to compute with, on y's backend."""
    y, t = as_array(where, "outputs", y), as_array(where, "targets", t)
    if t.shape != y.shape:
        raise ValueError(f"outputs have shape {y.shape}, targets {t.shape}; they must be equal")
    if y.size == 0:
        raise ValueError("loss of an empty batch is undefined (0 samples)")
    backend, dtype = backend_of(y), y.dtype.newbyteorder("=")
    computed = np.promote_types(dtype, np.float32)
    return dtype, backend.asarray(y, computed), backend.asarray(t, computed)
