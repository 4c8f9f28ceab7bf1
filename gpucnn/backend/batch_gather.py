"""One batch of a data set, augmented and normalised, on the CPU: what kernels/gather.cu and
augment.cu do."""
from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import as_strided

from gpucnn.augmentation import CHOICES, ONE, Augmentation
from gpucnn.backend import Backend
from gpucnn.rng import philox4x32, words_of

_SECOND_DRAW = 0x5851F42D << 32  # in the key's high word, as in kernels/augment.cu


def gather_batch(backend: Backend, images: np.ndarray, labels: np.ndarray, order: np.ndarray,
                 cursor: np.ndarray, n: int, table: np.ndarray, augmentation: Augmentation,
                 key: int, streamed: int, choices: np.ndarray | None, classes: int
                 ) -> tuple[np.ndarray, np.ndarray]:
    """As in Backend. The table is left to GPUs: arithmetic is faster here, and is the same."""
    _, h, w, c = images.shape
    total, epoch, mixup = streamed or len(images), int(cursor[1]), augmentation.mixup > 0
    x = backend.empty((n, h, w, c), table.dtype)
    places = cursor[0] + np.arange(n)
    chosen, lies, exists = _find(places, order, streamed, total)
    if mixup:
        after = places + 1 if streamed else np.where(places + 1 == total, 0, places + 1)
        others, others_lie, both = _find(after, order, streamed, total)
        exists &= both
        assert choices is not None
        low_bits = _draw(chosen, epoch, key ^ _SECOND_DRAW)[:, 0] & (CHOICES - 1)
        shares = choices[2][low_bits]

    def augmented(lies: np.ndarray, numbers: np.ndarray, words: np.ndarray) -> np.ndarray:
        pixels = _window(images[lies], words, augmentation)
        if choices is None:
            return pixels
        return _blend(pixels, _draw(numbers, epoch, key ^ _SECOND_DRAW), augmentation, choices)

    def gather(part: slice) -> None:
        if augmentation.draws:
            words = _draw(chosen[part], epoch, key)
            pixels = augmented(lies[part], chosen[part], words)
            if mixup:
                other = augmented(others_lie[part], others[part], _draw(others[part], epoch, key))
                share = shares[part, None, None, None]
                pixels = (pixels * share + other * (256 - share) + 128 >> 8).astype(np.uint8)
            augmentation.normalise(pixels, out=x[part])
            if augmentation.cutout:
                _cut(x[part], words, augmentation.cutout)
        else:
            augmentation.normalise(images[lies[part]], out=x[part])
        x[part][~exists[part]] = np.nan

    backend.for_each(gather, backend.blocks(
        n, h * w * c * ((40 if augmentation.blends else 2) + x.itemsize)))
    if mixup:
        y = np.zeros((n, classes), np.float32)
        for of_image, share in ((labels[lies], shares), (labels[others_lie], 256 - shares)):
            y[np.arange(n), of_image] += share / np.float32(256)
        y[~exists] = np.nan
    else:
        y = backend.empty((n,), np.int64)
        y[...] = np.where(exists, labels[lies], -1)
    return x, y


def _find(places: np.ndarray, order: np.ndarray, streamed: int, total: int
          ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the images at places of the order: their numbers, where they lie, and which exist."""
    chosen = np.where((places >= 0) & (places < len(order)), order.take(places, mode="clip"), -1)
    exists = (chosen >= 0) & (chosen < total)
    return chosen, np.where(exists, places if streamed else chosen, 0), exists


def _draw(chosen: np.ndarray, epoch: int, key: int) -> np.ndarray:
    """Four random words for each of the images: (m, 4) uint32."""
    counter = np.empty((len(chosen), 4), np.uint32)
    counter[:, 0], counter[:, 1] = chosen & 0xFFFFFFFF, chosen >> 32
    counter[:, 2:] = words_of(epoch % 2**64)
    return philox4x32(counter, words_of(key))


def _window(pixels: np.ndarray, words: np.ndarray, augmentation: Augmentation) -> np.ndarray:
    """The images (m, h, w, c) cropped and mirrored, as the words (m, 4) say."""
    m, crop = len(pixels), augmentation.crop
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
    return pixels


def _blend(pixels: np.ndarray, words: np.ndarray, augmentation: Augmentation, choices: np.ndarray
           ) -> np.ndarray:
    """The images (m, h, w, c) rotated and coloured, as the words (m, 4) of the second draw say."""
    if augmentation.rotate:
        angles = _below(CHOICES, words[:, 0])
        pixels = _rotate(pixels, choices[0, angles], choices[1, angles],
                         augmentation.padding == "reflect")
    steps = augmentation.colour_steps
    if steps:
        brightness, contrast, saturation = (
            (256 - steps + _below(2 * steps + 1, words[:, i])).astype(np.int32)[:, None, None, None]
            for i in (1, 2, 3))
        pixels = _away_from(128, _away_from(0, pixels.astype(np.int32), brightness), contrast)
        if pixels.shape[3] == 3:
            luma = (pixels @ np.array([77, 150, 29], np.int32) + 128 >> 8)[..., None]
            pixels = _away_from(luma, pixels, saturation)
        pixels = pixels.astype(np.uint8)
    return pixels


def _away_from(value: int | np.ndarray, pixels: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """value + (pixels - value) * factors / 256, within the bytes, in int32."""
    return np.clip(value + ((pixels - value) * factors + 128 >> 8), 0, 255)


def _rotate(pixels: np.ndarray, cosine: np.ndarray, sine: np.ndarray, reflect: bool) -> np.ndarray:
    """Images (m, h, w, c) turned around their middles: cosine, sine (m,) int32, times ONE."""
    m, h, w, _ = pixels.shape
    cosine, sine = cosine[:, None, None], sine[:, None, None]
    # Twice the way from the middle, so that it is whole; places are in halves of 1 / ONE then.
    dy = (2 * np.arange(h, dtype=np.int32) - (h - 1))[:, None]
    dx = 2 * np.arange(w, dtype=np.int32) - (w - 1)
    rows = cosine * dy - sine * dx + (h - 1) * ONE
    columns = sine * dy + cosine * dx + (w - 1) * ONE
    bits = ONE.bit_length() - 1
    top, left = rows >> bits + 1, columns >> bits + 1
    down, right = ((places >> bits - 7 & 255)[..., None] for places in (rows, columns))

    def line(y: np.ndarray) -> np.ndarray:
        """Pixels (m, h, w, c) of those rows, between two columns, times 256."""
        return at(y, left) * (256 - right) + at(y, left + 1) * right

    def at(y: np.ndarray, x: np.ndarray) -> np.ndarray:
        there = np.ones(y.shape, bool)
        if reflect:
            y, x = _reflected(y, h), _reflected(x, w)
        else:
            there = (y >= 0) & (y < h) & (x >= 0) & (x < w)
            y, x = np.where(there, y, 0), np.where(there, x, 0)
        return pixels[np.arange(m)[:, None, None], y, x] * there[..., None].astype(np.int32)

    return (line(top) * (256 - down) + line(top + 1) * down + (1 << 15) >> 16).astype(np.uint8)


def _reflected(places: np.ndarray, size: int) -> np.ndarray:
    """Which of `size` pixels stands at each place where the image is mirrored at its borders."""
    period = max(1, 2 * (size - 1))
    places = places % period
    return np.minimum(places, period - places) if size > 1 else np.zeros_like(places)


def _cut(x: np.ndarray, words: np.ndarray, cutout: int) -> None:
    """Set a square of each image of x (m, h, w, c) to 0."""
    _, h, w, _ = x.shape
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
