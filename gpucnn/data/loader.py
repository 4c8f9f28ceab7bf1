"""Batches of a data set, in an order that depends on (seed, epoch) and on nothing else."""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gpucnn.data.dataset import Dataset


def to_float(images: np.ndarray) -> np.ndarray:
    """uint8 images of 0 to 255 as float32 of 0 to 1, x / 255: all the preprocessing there is.

    Training, evaluation and prediction share it, so that a model sees the same numbers in each.
    Raises TypeError for any other dtype, which may be on another scale.
    """
    if images.dtype != np.uint8:
        raise TypeError(f"to_float: images are {images.dtype}; expected uint8 (0..255)")
    x = images.astype(np.float32)
    x /= 255
    return x


class Loader:
    """Cuts a data set into batches of (x, y).

    x is float32 (m, h, w, c) from `to_float`, y int64 (m,), where m is batch_size but for a
    shorter last batch. Only the batch at hand is converted to floats.

    seed: None keeps the order of the data set; an int from 0 to 2**64 - 1 shuffles it anew
        in each epoch.
    """

    def __init__(self, dataset: Dataset, batch_size: int, *, seed: int | None = None) -> None:
        _check_int("batch_size", batch_size, 1)
        if seed is not None:
            _check_int("seed", seed, 0)
        self.dataset = dataset
        self.batch_size = int(batch_size)
        self.seed = seed

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        return -(-len(self.dataset) // self.batch_size)

    def epoch(self, number: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the batches of epoch `number`, the first being 0."""
        _check_int("epoch", number, 0)
        return self._batches(self._order(number))

    def _order(self, number: int) -> np.ndarray:
        n = len(self.dataset)
        if self.seed is None:
            return np.arange(n)
        # NumPy promises that a bit generator's raw stream never changes, but promises nothing
        # for Generator.permutation (NEP 19). So: sort by random keys.
        philox = np.random.Philox(key=np.array([self.seed, number], np.uint64))
        return np.argsort(philox.random_raw(n), kind="stable")

    def _batches(self, order: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(order), self.batch_size):
            chosen = order[start:start + self.batch_size]
            x, y = self.dataset.images[chosen], self.dataset.labels[chosen]
            yield to_float(x), y.astype(np.int64)


def _check_int(name: str, value: object, least: int) -> None:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise TypeError(f"Loader: {name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"Loader: {name} must be >= {least}, got {value}")
    if value >= 2**64:
        raise ValueError(f"Loader: {name} must be < 2**64, got {value}")
