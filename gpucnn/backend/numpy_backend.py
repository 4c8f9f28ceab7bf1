"""The CPU: the ops of the kernels, in NumPy.

A window of kh x kw places is taken apart into its places: one strided view of the padded image
for each, as large as the output. The loops over places are short; all pixels are NumPy's work.
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from gpucnn.geometry import Window
from gpucnn.numerics import zero_unless
from gpucnn.rng import drop_threshold, random_words


class NumpyBackend:
    name = "numpy"
    xp = np
    block_bytes = 2 << 20  # the columns of a block stay in the cache until their product is done

    def asarray(self, a: Any, dtype: Any = None) -> np.ndarray:
        return np.asarray(a, dtype, order="C")

    def to_numpy(self, a: np.ndarray) -> np.ndarray:
        return a

    def im2col(self, x: np.ndarray, window: Window) -> np.ndarray:
        n, oh, ow, c = _output_shape(x.shape, window)
        cols = np.empty((n, oh, ow, window.places, c), x.dtype)
        for place, pixels in _places(_pad(x, window), window, oh, ow):
            cols[:, :, :, place] = pixels
        return cols.reshape(n * oh * ow, window.places * c)

    def col2im(self, cols: np.ndarray, x_shape: tuple[int, ...], window: Window) -> np.ndarray:
        n, oh, ow, c = _output_shape(x_shape, window)
        cols = cols.reshape(n, oh, ow, window.places, c)
        padded = np.zeros(_padded_shape(x_shape, window), cols.dtype)
        for place, pixels in _places(padded, window, oh, ow):
            pixels += cols[:, :, :, place]
        return _unpad(padded, x_shape, window)

    def max_pool(self, x: np.ndarray, window: Window) -> tuple[np.ndarray, np.ndarray]:
        _, oh, ow, _ = shape = _output_shape(x.shape, window)
        y = np.full(shape, -np.inf, x.dtype)
        mask = np.zeros(shape, window.mask_dtype)
        # A window of nothing but minus infinities has its first *pixel* as its maximum, and that
        # is not place 0 where the window begins in the padding: there the mask starts with it.
        _mark_first_pixels(mask, x.shape, window)
        for place, pixels in _places(_pad(x, window, -np.inf), window, oh, ow):
            larger = pixels > y
            larger |= (pixels != pixels) > (y != y)  # the first NaN
            np.maximum(mask, larger * mask.dtype.type(place), out=mask)
            np.maximum(y, pixels, out=y)  # NaN if either is
        return y, mask

    def max_pool_backward(self, dy: np.ndarray, mask: np.ndarray, x_shape: tuple[int, ...],
                          window: Window) -> np.ndarray:
        _, oh, ow, _ = dy.shape
        padded = np.zeros(_padded_shape(x_shape, window), dy.dtype)
        for place, pixels in _places(padded, window, oh, ow):
            pixels += zero_unless(mask == place, dy)
        return _unpad(padded, x_shape, window)

    def avg_pool(self, x: np.ndarray, window: Window) -> np.ndarray:
        _, oh, ow, _ = shape = _output_shape(x.shape, window)
        y = np.zeros(shape, x.dtype)
        for _, pixels in _places(_pad(x, window), window, oh, ow):
            y += pixels
        y /= _pixels_seen(x.shape, window, x.dtype)
        return y

    def avg_pool_backward(self, dy: np.ndarray, x_shape: tuple[int, ...],
                          window: Window) -> np.ndarray:
        _, oh, ow, _ = dy.shape
        share = dy / _pixels_seen(x_shape, window, dy.dtype)
        padded = np.zeros(_padded_shape(x_shape, window), dy.dtype)
        for _, pixels in _places(padded, window, oh, ow):
            pixels += share
        return _unpad(padded, x_shape, window)

    def dropout(self, x: np.ndarray, rate: float, key: int, stream: int) -> np.ndarray:
        keep = random_words(x.size, key, stream).reshape(x.shape) >= drop_threshold(rate)
        return zero_unless(keep, x * x.dtype.type(1 / (1 - rate)))


def _output_shape(x_shape: tuple[int, ...], window: Window) -> tuple[int, int, int, int]:
    n, h, w, c = x_shape
    return (n, *window.out_size(h, w), c)


def _padded_shape(x_shape: tuple[int, ...], window: Window) -> tuple[int, int, int, int]:
    n, h, w, c = x_shape
    return n, window.top + h + window.bottom, window.left + w + window.right, c


def _pad(x: np.ndarray, window: Window, value: float = 0) -> np.ndarray:
    if not any((window.top, window.bottom, window.left, window.right)):
        return x
    padded = np.full(_padded_shape(x.shape, window), value, x.dtype)
    _, h, w, _ = x.shape
    padded[:, window.top:window.top + h, window.left:window.left + w] = x
    return padded


def _unpad(padded: np.ndarray, x_shape: tuple[int, ...], window: Window) -> np.ndarray:
    _, h, w, _ = x_shape
    return np.ascontiguousarray(
        padded[:, window.top:window.top + h, window.left:window.left + w])


def _places(padded: np.ndarray, window: Window, oh: int, ow: int
            ) -> Iterator[tuple[int, np.ndarray]]:
    """For each place ky * kw + kx of the window, the pixels it meets: a view (n, oh, ow, c)."""
    for ky, kx in np.ndindex(window.kh, window.kw):
        y, x = ky * window.dh, kx * window.dw
        yield ky * window.kw + kx, padded[:, y:y + (oh - 1) * window.sh + 1:window.sh,
                                          x:x + (ow - 1) * window.sw + 1:window.sw]


def _inside(n: int, before: int, taps: int, stride: int, dilation: int, out: int) -> np.ndarray:
    """Which taps of each output's window meet one of the n pixels of an axis: (out, taps) bool."""
    pixel = np.arange(out)[:, None] * stride - before + np.arange(taps) * dilation
    return (pixel >= 0) & (pixel < n)


def _inside_both(x_shape: tuple[int, ...], window: Window) -> tuple[np.ndarray, np.ndarray]:
    _, h, w, _ = x_shape
    oh, ow = window.out_size(h, w)
    return (_inside(h, window.top, window.kh, window.sh, window.dh, oh),
            _inside(w, window.left, window.kw, window.sw, window.dw, ow))


def _pixels_seen(x_shape: tuple[int, ...], window: Window, dtype: np.dtype) -> np.ndarray:
    """How many pixels each window sees, (oh, ow, 1)."""
    rows, columns = _inside_both(x_shape, window)
    return np.outer(rows.sum(1), columns.sum(1))[:, :, None].astype(dtype)


def _mark_first_pixels(mask: np.ndarray, x_shape: tuple[int, ...], window: Window) -> None:
    if window.top or window.left:
        rows, columns = _inside_both(x_shape, window)
        first = rows.argmax(1)[:, None] * window.kw + columns.argmax(1)
        mask[...] = first[:, :, None]
