"""One batch of a data set, augmented and normalised, on the CPU: what kernels/gather.cu does."""
from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import as_strided

from gpucnn.augmentation import Augmentation
from gpucnn.backend import Backend
from gpucnn.rng import philox4x32, words_of


def gather_batch(backend: Backend, images: np.ndarray, labels: np.ndarray, order: np.ndarray,
                 cursor: np.ndarray, n: int, table: np.ndarray, augmentation: Augmentation,
                 key: int, streamed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """As in Backend. The table is left to GPUs: arithmetic is faster here, and is the same."""
    _, h, w, c = images.shape
    total = streamed or len(images)
    x, y = backend.empty((n, h, w, c), table.dtype), backend.empty((n,), np.int64)
    places = cursor[0] + np.arange(n)
    chosen = np.where((places >= 0) & (places < len(order)), order.take(places, mode="clip"), -1)
    exists = (chosen >= 0) & (chosen < total)
    lies = np.where(exists, places if streamed else chosen, 0)
    y[...] = np.where(exists, labels[lies], -1)

    def gather(part: slice) -> None:
        pixels = images[lies[part]]
        if augmentation.draws:
            words = _draw(chosen[part], int(cursor[1]), key)
            _augment(pixels, words, augmentation, x[part])
        else:
            augmentation.normalise(pixels, out=x[part])
        x[part][~exists[part]] = np.nan

    backend.for_each(gather, backend.blocks(n, h * w * c * (2 + x.itemsize)))
    return x, y


def _draw(chosen: np.ndarray, epoch: int, key: int) -> np.ndarray:
    """Four random words for each of the images: (m, 4) uint32."""
    counter = np.empty((len(chosen), 4), np.uint32)
    counter[:, 0], counter[:, 1] = chosen & 0xFFFFFFFF, chosen >> 32
    counter[:, 2:] = words_of(epoch % 2**64)
    return philox4x32(counter, words_of(key))


def _augment(pixels: np.ndarray, words: np.ndarray, augmentation: Augmentation, x: np.ndarray
             ) -> None:
    """Write the images (m, h, w, c) to x, of their shape, as the words (m, 4) say."""
    m, h, w, _ = x.shape
    crop, cutout = augmentation.crop, augmentation.cutout
    if crop:
        padded = np.pad(pixels, ((0, 0), (crop, crop), (crop, crop), (0, 0)),
                        mode="reflect" if augmentation.padding == "reflect" else "constant")
        places = 2 * crop + 1
        windows = as_strided(padded, (m, places, places, *pixels.shape[1:]),
                             (padded.strides[0], *padded.strides[1:3], *padded.strides[1:]))
        pixels = windows[np.arange(m), _below(places, words[:, 0]), _below(places, words[:, 1])]
    if augmentation.flip:
        mirrored = (words[:, 0] & 1).astype(bool)
        pixels[mirrored] = pixels[mirrored, :, ::-1]
    augmentation.normalise(pixels, out=x)
    if cutout:
        rows, columns = (_from(_below(side, words[:, i]) - cutout // 2, cutout, side)
                         for side, i in ((h, 2), (w, 3)))
        x[rows[:, :, None] & columns[:, None, :]] = 0


def _below(n: int, words: np.ndarray) -> np.ndarray:
    """A random number from 0 to n - 1 of each word: (m,) int64."""
    return (words.astype(np.uint64) * np.uint64(n) >> np.uint64(32)).astype(np.int64)


def _from(start: np.ndarray, count: int, size: int) -> np.ndarray:
    """Which of `size` pixels are one of the `count` from each start on: (m, size) bool."""
    ahead = np.arange(size) - start[:, None]
    return (ahead >= 0) & (ahead < count)
