"""Compare a layer's backward pass with finite differences, in float64, along random directions."""
from __future__ import annotations

import numpy as np


def gradcheck(layer, x, rng, step=1e-6, tolerance=1e-6):
    """<v, dL/dx> must be the derivative of L along v, for x and for each parameter.

    L = sum(dy * y) for a random dy: ones would hide outputs that are mixed up. The layer is built
    in float64. Dropout layers draw the same mask for each evaluation.
    """
    backend = layer.backend
    x = backend.asarray(x, np.float64)
    start = _dropout_steps(layer)
    y = layer.forward(x, training=True)
    dy = backend.asarray(rng.standard_normal(y.shape), np.float64)
    dx = layer.backward(dy)
    leaves = {"x": (x, dx)} | {n: (p.data, p.grad.copy()) for n, p in layer.parameters().items()}
    for name, (value, gradient) in leaves.items():
        assert gradient.shape == value.shape, name
        assert gradient.dtype == np.float64, name
        v = backend.asarray(rng.standard_normal(value.shape), np.float64)
        before = value.copy()
        losses = []
        for t in (step, -step):
            value[...] = before + t * v
            for dropout, count in start.items():
                dropout.step = count
            losses.append(float((layer.forward(x, training=True) * dy).sum()))
        value[...] = before
        numeric = (losses[0] - losses[1]) / (2 * step)
        exact = float((gradient * v).sum())
        assert abs(numeric - exact) <= tolerance * max(1, abs(numeric)), (name, numeric, exact)


def _dropout_steps(layer):
    return {part: part.step for part in layer.walk() if hasattr(part, "step")}
