"""Losses. Each holds the 1 / n of its mean; layers never divide by the batch size."""
from __future__ import annotations

from gpucnn.backend import Array, backend_of
from gpucnn.ops import as_array, softmax_cross_entropy


class SoftmaxCrossEntropy:
    """The mean of -log softmax(logits)[label]: logits (n, classes), integer labels (n,).

    label_smoothing: as in gpucnn.ops.softmax_cross_entropy.
    """

    def __init__(self, label_smoothing: float = 0.0):
        self.label_smoothing = label_smoothing

    def __call__(self, logits: Array, labels: Array) -> tuple[Array, Array]:
        """(loss, dlogits)."""
        return softmax_cross_entropy(logits, labels, label_smoothing=self.label_smoothing)


class MeanSquaredError:
    """The mean of (y - t)^2 over all elements; y and t of one shape."""

    def __call__(self, y: Array, t: Array) -> tuple[Array, Array]:
        """(loss, dy). Raises ValueError for other shapes or an empty batch."""
        y, t = _receive(type(self).__name__, y, t)
        error = y - t
        return (error * error).mean(), error * (2 / error.size)


class BinaryCrossEntropy:
    """The mean of -t log s(z) - (1 - t) log(1 - s(z)) over all elements, s the sigmoid.

    z are logits; t lie in [0, 1] and have the same shape.
    """

    def __call__(self, z: Array, t: Array) -> tuple[Array, Array]:
        """(loss, dz). Raises ValueError for other shapes or an empty batch."""
        z, t = _receive(type(self).__name__, z, t)
        xp = backend_of(z).xp
        # max(z, 0) - z t + log(1 + exp(-|z|)) is the same and cannot overflow.
        small = xp.exp(-xp.abs(z))
        loss = (xp.maximum(z, 0) - z * t + xp.log1p(small)).mean()
        sigmoid = xp.where(z >= 0, 1, small) / (1 + small)
        return loss, (sigmoid - t) / z.size


def _receive(where: str, y: Array, t: Array) -> tuple[Array, Array]:
    y = as_array(where, "outputs", y)
    backend = backend_of(y)
    t = backend.asarray(t, y.dtype)
    if t.shape != y.shape:
        raise ValueError(f"outputs have shape {y.shape}, targets {t.shape}; they must be equal")
    if y.size == 0:
        raise ValueError("loss of an empty batch is undefined (0 samples)")
    return y, t
