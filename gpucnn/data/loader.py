"""Batches of a data set, in an order that depends on (seed, epoch) and on nothing else."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from gpucnn.augmentation import Augmentation
from gpucnn.backend import Array, get_backend
from gpucnn.data.dataset import Dataset
from gpucnn.data.feed import Feed, ResidentFeed, StreamedFeed
from gpucnn.data.shards import DiskImages
from gpucnn.geometry import is_int

GROUP = 64  # blocks of Shards that are shuffled together
# What a model of the same seed draws has other high bits: see gpucnn.layers.base.
_AUGMENTATION_KEYS = 0xA064_0000_0000_0000


def to_float(images: np.ndarray) -> np.ndarray:
    """uint8 images of 0 to 255 as float32 of 0 to 1, x / 255: all the preprocessing there is.

    Training, evaluation and prediction share it, so that a model sees the same numbers in each.
    A Loader without an Augmentation gives the same. Raises TypeError for any other dtype, which may
    be on another scale.
    """
    if images.dtype != np.uint8:
        raise TypeError(f"to_float: images are {images.dtype}; expected uint8 (0..255)")
    x = images.astype(np.float32)
    x /= 255
    return x


class Loader:
    """Cuts a data set into batches of (x, y) on the backend in use where the loader is made.

    The data set is moved there once, as bytes; a batch is one kernel. x is (m, h, w, c) of `dtype`,
    y int64 (m,), where m is batch_size but for a shorter last batch; with mixup y is float32
    (m, classes), the share of each class.

    streamed: whether the data set stays on the host, and each batch is copied to the GPU while it
        computes the one before. None: where it would take more than half of the GPU's free memory.
        The batches are the same; on the CPU there is nothing to choose. DiskImages always stream.

    seed: None keeps the order of the data set; an int from 0 to 2**64 - 1 shuffles it anew
        in each epoch. Shards are shuffled by blocks of a megabyte: GROUP of them, chosen at random,
        are shuffled together, then the next ones.
    augmentation: what is done to each image; without one x is pixel / 255. What is drawn depends on
        seed, epoch and the image's number alone: on neither the batch size nor the backend. What
        mixup takes an image together with is the next one in the order of the epoch.
    dtype: float32, float64, float16 or bfloat16 (which NumPy knows where ml_dtypes is imported).

    Raises TypeError and ValueError, also where the augmentation does not fit the images.
    """

    block = 0  # of Shards, for shuffled()

    def __init__(self, dataset: Dataset, batch_size: int, *, seed: int | None = None,
                 augmentation: Augmentation | None = None, dtype: Any = np.float32,
                 streamed: bool | None = None) -> None:
        self.batch_size, self.seed, self.dtype = check_batches(batch_size, seed, dtype)
        if not isinstance(augmentation, (Augmentation, type(None))):
            raise TypeError("Loader: augmentation must be an Augmentation or None, got "
                            f"{augmentation!r}")
        self.augmentation = Augmentation() if augmentation is None else augmentation
        if seed is None and self.augmentation.draws:
            raise ValueError("Loader: an augmentation that draws random numbers needs a seed")
        self.augmentation.check_fits(*dataset.images.shape[1:])
        if not isinstance(streamed, (bool, type(None))):
            raise TypeError(f"Loader: streamed must be True, False or None, got {streamed!r}")
        self.dataset = dataset
        self.backend = get_backend()
        self.key = _AUGMENTATION_KEYS ^ (self.seed or 0)
        self.table = self.backend.asarray(
            self.augmentation.table(dataset.images.shape[3], self.dtype))
        self.choices = self.backend.asarray(self.augmentation.choices()) \
            if self.augmentation.blends else None
        if isinstance(dataset.images, DiskImages):
            if streamed is False:
                raise ValueError("Loader: images on the disk "
                                 f"({type(dataset.images).__name__}) always stream; leave out "
                                 "streamed=False")
            self.block, streamed = dataset.images.block, True
        self.streamed = dataset.images.nbytes > self.backend.free_bytes() / 2 \
            if streamed is None else streamed
        if not self.streamed:
            self.images = self.backend.asarray(dataset.images)
            self.labels = self.backend.asarray(dataset.labels, np.int64)

    @property
    def n(self) -> int:
        """The number of images."""
        return len(self.dataset)

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        return -(-self.n // self.batch_size)

    def epoch(self, number: int = 0, position: int = 0) -> Iterator[tuple[Array, Array]]:
        """Yield the batches of epoch `number`, the first being 0.

        position: how many images to leave out at the start, to go on with an epoch that was
            interrupted: a multiple of batch_size gives the batches that it would have given.
        """
        feed = self.feed()
        return _batches(feed, feed.begin(number, position))

    def feed(self) -> Feed:
        """What gathers the batches, in arrays of its own: for TrainStep, which captures it."""
        return StreamedFeed(self) if self.streamed else ResidentFeed(self)

    def sizes(self, position: int = 0) -> list[int]:
        """Of the batches from an image on. Raises TypeError and ValueError for a wrong position."""
        _check_int("position", position, 0)
        n = self.n
        if position > n:
            raise ValueError(f"Loader: position must be <= {n}, the number of images, got "
                             f"{position}")
        return [min(self.batch_size, n - at) for at in range(position, n, self.batch_size)]

    def check_epoch(self, number: int) -> None:
        """Raise TypeError and ValueError for what is not the number of an epoch."""
        _check_int("epoch", number, 0)

    def order(self, number: int) -> np.ndarray:
        """The numbers of the images as epoch `number` visits them: (n,) int64."""
        self.check_epoch(number)
        n = self.n
        if self.seed is None:
            return np.arange(n, dtype=np.int64)
        return shuffled(n, self.seed, number, self.block)


def shuffled(n: int, seed: int, number: int, block: int = 0) -> np.ndarray:
    """The numbers 0 to n - 1 in the order of (seed, number): (n,) int64, on every machine.

    block: 0, or how many stay near each other: blocks are put in a new order, and GROUP of them at
    a time are shuffled together.
    """
    # NumPy promises that a bit generator's raw stream never changes, but promises nothing
    # for Generator.permutation (NEP 19). So: sort by random keys.
    philox = np.random.Philox(key=np.array([seed, number], np.uint64))
    if block:
        rank = np.argsort(np.argsort(philox.random_raw(-(-n // block)), kind="stable"))
        group = np.repeat(rank // GROUP, block)[:n]  # of each number
        order = np.lexsort((philox.random_raw(n), group))
    else:
        order = np.argsort(philox.random_raw(n), kind="stable")
    return order.astype(np.int64, copy=False)


def check_batches(batch_size: int, seed: int | None, dtype: Any
                  ) -> tuple[int, int | None, np.dtype]:
    """The three as a Loader keeps them. Raises TypeError and ValueError for what none takes."""
    _check_int("batch_size", batch_size, 1)
    if seed is not None:
        _check_int("seed", seed, 0)
    dtype = np.dtype(dtype)
    if dtype.name not in ("float32", "float64", "float16", "bfloat16"):
        raise TypeError("Loader: dtype must be float32, float64, float16 or bfloat16, got "
                        f"{dtype}")
    return int(batch_size), seed, dtype


def _batches(feed: Feed, sizes: list[int]) -> Iterator[tuple[Array, Array]]:
    for size in sizes:
        feed.advance(size)
        yield feed.gather(size)


def _check_int(name: str, value: int, least: int) -> None:
    if not is_int(value):
        raise TypeError(f"Loader: {name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"Loader: {name} must be >= {least}, got {value}")
    if value >= 2**64:
        raise ValueError(f"Loader: {name} must be < 2**64, got {value}")
