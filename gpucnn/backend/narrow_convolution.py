"""Convolution of few channels on the CPU, such as that of grey or colour images.

Where a pixel holds one to four numbers, im2col copies them one pixel at a time, which takes longer
than the products. Here the columns are stored transposed, a row for each tap and channel, so that
it copies whole rows of the image:

    taps[(ky, kx, c)][(n, oy, ox)] = A[n, oy - top + ky, ox - left + kx, c]
    Z = taps^T W,   dW = taps dZ
"""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.lib.stride_tricks import as_strided

from gpucnn.activations import activation_backward
from gpucnn.backend import Backend, parallel
from gpucnn.backend.row_convolution import IN_PLACE, Block, band, blocks, pad
from gpucnn.convolution import finish, repeated
from gpucnn.geometry import Window
from gpucnn.numerics import sum_rows


def pays(window: Window, groups: int, x_shape: tuple[int, ...]) -> bool:
    """Whether this is the faster way."""
    return groups == 1 and window.places > 1 and x_shape[-1] <= 4


def conv2d(backend: Backend, x: np.ndarray, w: np.ndarray, b: np.ndarray | None, window: Window,
           activation: str | None, residual: np.ndarray | None = None) -> np.ndarray:
    """As gpucnn.convolution.conv2d, without groups."""
    a = backend.empty((len(x), *window.out_size(*x.shape[1:3]), w.shape[-1]), x.dtype)
    filters = w.reshape(-1, w.shape[-1])
    bias = repeated(np, b, a.shape[2])

    def convolve(block: Block) -> None:
        images, rows, _ = block
        source, part = band(window, x.shape[1], rows)
        z = a[images, rows].reshape(-1, w.shape[-1])
        for taps, results in _in_place(_unfold(x[images, source], part), z):
            np.matmul(taps.transpose(1, 2, 0), filters, out=results)
        finish(np, a[images, rows], bias, activation,
               None if residual is None else residual[images, rows])

    backend.for_each(convolve, blocks(backend, x, a, window))
    return a


def weight_gradient(backend: Backend, da: np.ndarray, a: np.ndarray, x: np.ndarray, w: np.ndarray,
                    window: Window, activation: str | None) -> tuple[np.ndarray, np.ndarray]:
    """dw and db of gpucnn.convolution.conv2d_backward, without groups."""
    def add(block: Block, dw: np.ndarray, db: np.ndarray) -> None:
        images, rows, _ = block
        source, part = band(window, x.shape[1], rows)
        dz = activation_backward(np, activation, da[images, rows], a[images, rows])
        dz = dz.reshape(-1, len(db))
        db += sum_rows(np, dz)
        for taps, errors in _in_place(_unfold(x[images, source], part), dz):
            products = parallel.scratch("products", (len(errors), *dw.shape), x.dtype)
            np.matmul(taps.transpose(1, 0, 2), errors, out=products)
            dw += products.sum(axis=0)

    dw, db = backend.sum_over(add, blocks(backend, x, a, window),
                              [w.reshape(-1, w.shape[-1]), np.empty(w.shape[-1], w.dtype)])
    return dw.reshape(w.shape), db


def _unfold(x: np.ndarray, window: Window) -> np.ndarray:
    """x (n, h, w, c) -> taps (kh * kw * c, n * oh * ow), in scratch memory."""
    n, h, width, c = x.shape
    padded = pad(x, window)
    image, row, pixel, channel = padded.strides
    shape = (window.kh, window.kw, c, n, *window.out_size(h, width))
    taps = parallel.scratch("cols", shape, x.dtype)
    taps[...] = as_strided(padded, shape, (window.dh * row, window.dw * pixel, channel, image,
                                           window.sh * row, window.sw * pixel))
    return taps.reshape(window.places * c, -1)


def _in_place(taps: np.ndarray, z: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Views of taps as (taps, products, m) and of z as (products, m, c_out).

    m is the largest number of pixels for which the product is computed in place; what it leaves
    over comes in views of its own.
    """
    pixels, c_out = z.shape
    m = max(1, min(pixels, IN_PLACE // (len(taps) * c_out)))
    whole = pixels // m * m
    for part, size in ((slice(whole), m), (slice(whole, pixels), pixels - whole)):
        if size:
            yield taps[:, part].reshape(len(taps), -1, size), z[part].reshape(-1, size, c_out)
