"""Where the batches of an epoch come from: a data set on the device, or one that streams to it.

A feed has arrays of its own, which stay where they are: what gather() launches can be captured in
a CUDA graph, which then goes through the data set as it is replayed.
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import numpy as np

from gpucnn.backend import Array
from gpucnn.data.shards import Take

if TYPE_CHECKING:
    from gpucnn.data.loader import Loader


class Feed(Protocol):
    """begin() once an epoch; then advance() and gather() for each batch."""

    def begin(self, number: int, position: int) -> list[int]:
        """Go to a place in an epoch; the sizes of the batches from there on.

        Raises TypeError and ValueError where there is none.
        """

    def advance(self, size: int) -> None:
        """Do what the host has to do for the next batch; waits for nothing that is computed."""

    def gather(self, size: int) -> tuple[Array, Array]:
        """The next batch. Nothing waits for the device, and no launch depends on its memory."""


class ResidentFeed:
    """The data set lies on the device; the place in it is read and moved on there."""

    def __init__(self, loader: Loader):
        self.loader, asarray = loader, loader.backend.asarray
        self.order = asarray(np.zeros(loader.n, np.int64))
        self.cursor = asarray(np.zeros(2, np.int64))  # the place in the order, and the epoch

    def begin(self, number: int, position: int) -> list[int]:
        asarray, sizes = self.loader.backend.asarray, self.loader.sizes(position)
        self.order[...] = asarray(self.loader.order(number))
        self.cursor[...] = asarray(cursor_at(position, number))
        return sizes

    def advance(self, size: int) -> None:
        pass

    def gather(self, size: int) -> tuple[Array, Array]:
        loader = self.loader
        batch = loader.backend.gather_batch(
            loader.images, loader.labels, self.order, self.cursor, size, loader.table,
            loader.augmentation, loader.key, choices=loader.choices,
            classes=loader.dataset.n_classes)
        self.cursor[:1] += size
        return batch


class StreamedFeed:
    """The data set stays on the host; each batch is copied while the one before is computed."""

    def __init__(self, loader: Loader):
        self.after = int(loader.augmentation.mixup > 0)  # images that follow, to be mixed with
        self.loader, m = loader, min(loader.batch_size, len(loader.dataset)) + self.after
        dataset, asarray = loader.dataset, loader.backend.asarray
        self.arrays = [asarray(np.zeros(shape, dtype)) for shape, dtype in (
            ((m, *dataset.images.shape[1:]), np.uint8), ((m,), np.int64), ((m,), np.int64),
            ((2,), np.int64))]  # images, labels, their numbers, and the cursor of a ResidentFeed
        self.upload = loader.backend.upload(self.arrays)
        self.batches: Iterator[np.ndarray] = iter(())
        self.take: Take = dataset.take
        self.epoch = 0

    def begin(self, number: int, position: int) -> list[int]:
        sizes, order = self.loader.sizes(position), self.loader.order(number)
        starts = range(position, self.loader.n, self.loader.batch_size)
        batches = [order.take(np.arange(start, start + size + self.after), mode="wrap")
                   for start, size in zip(starts, sizes)]
        self.batches, self.epoch = iter(batches), number
        self.take = self.loader.dataset.take_ahead(batches)
        return sizes

    def advance(self, size: int) -> None:
        dataset, chosen = self.loader.dataset, next(self.batches)
        images, labels, numbers, cursor = self.upload.arrays()
        self.take(chosen, images[:len(chosen)])
        labels[:len(chosen)], numbers[:len(chosen)] = dataset.labels[chosen], chosen
        cursor[...] = cursor_at(0, self.epoch)
        self.upload.send()

    def gather(self, size: int) -> tuple[Array, Array]:
        loader = self.loader
        images, labels, numbers, cursor = self.arrays
        return loader.backend.gather_batch(
            images, labels, numbers, cursor, size, loader.table, loader.augmentation, loader.key,
            streamed=len(loader.dataset), choices=loader.choices,
            classes=loader.dataset.n_classes)


def cursor_at(position: int, epoch: int) -> np.ndarray:
    """(2,) int64, as gather_batch reads it; an epoch of 2^63 and more keeps its bits."""
    return np.array([position, epoch], np.uint64).view(np.int64)
