"""Images that stay on the disk: what all of them are like, and memory-mapped files."""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

BLOCK_BYTES = 1 << 20  # of images that lie together, and are read together when shuffled
Take = Callable[[np.ndarray, np.ndarray], None]


class DiskImages(ABC):
    """Images as one array (n, h, w, c) of uint8 that is never whole in memory: what is indexed is
    read.

    block: how many images are shuffled together, so that the disk is read in pieces; 0 for all.
    """

    dtype = np.dtype(np.uint8)
    ndim = 4
    shape: tuple[int, ...]
    block = 0

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape))

    def __getitem__(self, index: Any) -> np.ndarray:
        """The images at a slice, an array of numbers or one number, in memory."""
        numbers = np.arange(len(self))[index]
        out = np.empty((numbers.size, *self.shape[1:]), np.uint8)
        self.take(numbers.reshape(-1), out)
        return out.reshape(*numbers.shape, *self.shape[1:])

    @abstractmethod
    def take(self, numbers: np.ndarray, out: np.ndarray) -> None:
        """Write the images of those numbers (m,), from 0 to n - 1, to out (m, h, w, c)."""

    def take_ahead(self, batches: Sequence[np.ndarray]) -> Take:
        """A take() to be called with each of the batches of numbers (m,), in their order: it may
        read the next ones while the caller computes."""
        return self.take

    @abstractmethod
    def select(self, numbers: np.ndarray | slice) -> DiskImages:
        """The images of those numbers (m,) or at a slice, on the disk still."""


class Shards(DiskImages):
    """Arrays (m, h, w, c) of uint8, memory-mapped, as one array (n, h, w, c).

    shards: one or more arrays, alike but for m.
    numbers: (n,) which of all their images these are, and in which order; None for all.
    """

    def __init__(self, shards: Sequence[np.ndarray], numbers: np.ndarray | None = None):
        self._shards, self._numbers = list(shards), numbers
        self._ends = np.cumsum([len(shard) for shard in shards])
        n = int(self._ends[-1]) if numbers is None else len(numbers)
        self.shape = (n, *shards[0].shape[1:])
        self.block = max(1, BLOCK_BYTES // int(np.prod(self.shape[1:])))

    def take(self, numbers: np.ndarray, out: np.ndarray) -> None:
        if self._numbers is not None:
            numbers = self._numbers[numbers]
        shard_of = np.searchsorted(self._ends, numbers, side="right")
        for i in np.unique(shard_of):
            mine, shard = shard_of == i, self._shards[i]
            out[mine] = shard[numbers[mine] - (self._ends[i] - len(shard))]

    def select(self, numbers: np.ndarray | slice) -> Shards:
        of_these = np.arange(len(self)) if self._numbers is None else self._numbers
        return Shards(self._shards, of_these[numbers])
