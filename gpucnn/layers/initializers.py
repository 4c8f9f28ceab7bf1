"""What parameters begin as: equal on every backend, because it is drawn on the host."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gpucnn import rng

Shape = tuple[int, ...]
Initializer = Callable[[Shape, int, int], np.ndarray]  # (shape, key, stream) -> float64 array


def he_normal(fan_in: int) -> Initializer:
    """Normal with variance 2 / fan_in (He et al. 2015), which keeps the scale through ReLUs."""
    return lambda shape, key, stream: (2 / fan_in) ** 0.5 * rng.normal(shape, key, stream)


def glorot_uniform(fan_in: int, fan_out: int) -> Initializer:
    """Uniform in ±sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio 2010)."""
    limit = (6 / (fan_in + fan_out)) ** 0.5
    return lambda shape, key, stream: limit * (2 * rng.uniform(shape, key, stream) - 1)


def dirac(fan_in: int, groups: int) -> Initializer:
    """Filters, (kh, kw, c / groups, filters), the first of which pass on one channel each.

    In each group filter i is 1 in the middle of channel i, and 0 elsewhere. Those that are left
    without a channel are uniform in ±1 / sqrt(fan_in), as convolutions of torch begin. With as
    many filters as channels the layer is the identity (Zagoruyko and Komodakis 2017).
    """
    def draw(shape: Shape, key: int, stream: int) -> np.ndarray:
        kh, kw, depth, filters = shape
        w = fan_in ** -0.5 * (2 * rng.uniform(shape, key, stream) - 1)
        for group in np.split(w, groups, axis=3):
            channels = np.arange(min(depth, filters // groups))
            group[..., channels] = 0
            group[(kh - 1) // 2, (kw - 1) // 2, channels, channels] = 1
        return w

    return draw


def constant(value: float) -> Initializer:
    """The same value everywhere."""
    return lambda shape, key, stream: np.full(shape, value)
