"""Convolution on the CPU, taking the filters apart into their rows.

im2col copies each pixel kh * kw times, and a BLAS that is given a large product of few columns
copies all of it once more. Here the taps are unfolded along x only, and the rows of the filters
are worked off one after the other over the same copy:

    cols[y, ox]  = A[y, ox - left], ..., A[y, ox - left + kw - 1]     kw * c_in numbers
    Z[oy, ox]    = sum over ky of cols[oy - top + ky, ox] W[ky]       the article's Z = W * A
    dW[ky]       = sum over oy, ox of cols[oy - top + ky, ox]^T dZ[oy, ox]

The input gradient is the article's full convolution of dZ with the filters rotated by 180 degrees,
computed as Z is. Strides and dilations are left out of the formulas above.

Each product is one of a few image rows with a row of taps, small enough for the BLAS to multiply
the matrices as they lie.
"""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.lib.stride_tricks import as_strided

from gpucnn.activations import activation_backward
from gpucnn.backend import Backend, parallel
from gpucnn.convolution import finish, repeated
from gpucnn.geometry import Window
from gpucnn.numerics import sum_rows

# The multiply-adds that OpenBLAS still computes without first copying both matrices into an order
# of its own (its small matrix kernels for AVX-512; 90 against 112 GFLOP/s a core for the sizes at
# hand). Other BLAS libraries lose nothing by it.
IN_PLACE = 10**6
LEAST_PIXELS = 64  # of a product of the weight gradient
LEAST_ROW = 16  # numbers in a row of taps: with fewer, im2col is as fast

Block = tuple[slice, slice, slice]  # images, rows of the output, rows of the input


def pays(window: Window, groups: int, x_shape: tuple[int, ...], c_out: int) -> bool:
    """Whether conv2d() here is the faster way: rows of taps wide enough, products small enough."""
    row = window.kw * x_shape[-1]
    _, ow = window.out_size(*x_shape[1:3])
    return groups == 1 and window.kh > 1 and row >= LEAST_ROW and ow * row * c_out <= IN_PLACE


def backward_pays(window: Window, groups: int, x_shape: tuple[int, ...], c_out: int,
                  input_gradient: bool) -> bool:
    """The same for conv2d_backward(); dA as a convolution needs stride 1, and little padding."""
    if not input_gradient:
        return pays(window, groups, x_shape, c_out)
    back = _backward_window(window)
    dz_shape = (1, *window.out_size(*x_shape[1:3]), c_out)
    return (window.sh == window.sw == 1 and min(back) >= 0
            and pays(window, groups, x_shape, c_out) and pays(back, groups, dz_shape, x_shape[-1]))


def conv2d(backend: Backend, x: np.ndarray, w: np.ndarray, b: np.ndarray | None, window: Window,
           activation: str | None, residual: np.ndarray | None = None) -> np.ndarray:
    """As gpucnn.convolution.conv2d, without groups."""
    a = backend.empty((len(x), *window.out_size(*x.shape[1:3]), w.shape[-1]), x.dtype)
    bias = repeated(np, b, a.shape[2])

    def convolve(block: Block) -> None:
        images, rows, _ = block
        source, part = band(window, x.shape[1], rows)
        _multiply(_unfold(x[images, source], part), w, part, a[images, rows])
        finish(np, a[images, rows], bias, activation,
               None if residual is None else residual[images, rows])

    backend.for_each(convolve, blocks(backend, x, a, window))
    return a


def conv2d_backward(backend: Backend, da: np.ndarray, a: np.ndarray, x: np.ndarray, w: np.ndarray,
                    window: Window, activation: str | None, input_gradient: bool
                    ) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
    """As gpucnn.convolution.conv2d_backward, without groups."""
    back = _backward_window(window)
    rotated = np.ascontiguousarray(w[::-1, ::-1].transpose(0, 1, 3, 2))
    dx = backend.empty(x.shape, x.dtype) if input_gradient else None

    def add(block: Block, dw: np.ndarray, db: np.ndarray) -> None:
        images, rows, x_rows = block
        dz = activation_backward(np, activation, da[images, rows], a[images, rows])
        db += sum_rows(np, dz.reshape(-1, dz.shape[-1]))
        source, part = band(window, x.shape[1], rows)
        cols = _unfold(x[images, source], part)
        for dw_row, cols_row in zip(dw, _rows_under(cols, part, dz.shape[1])):
            for taps, errors in _in_place(cols_row, dz, LEAST_PIXELS):
                products = parallel.scratch("products", (*taps.shape[:2], *dw_row.shape), x.dtype)
                np.matmul(taps.transpose(0, 1, 3, 2), errors, out=products)
                dw_row += products.sum(axis=(0, 1))
        if dx is not None:
            source, part = band(back, a.shape[1], x_rows)
            if source != rows:
                dz = activation_backward(np, activation, da[images, source], a[images, source])
            cols = _unfold(dz, part._replace(top=0, bottom=0))  # zeros times finite numbers
            _multiply(cols, rotated, part, dx[images, x_rows], above=part.top)

    kh, kw, c_in, c_out = w.shape
    dw, db = backend.sum_over(add, blocks(backend, x, a, window),
                              [w.reshape(kh, kw * c_in, c_out), np.empty(c_out, w.dtype)])
    return dx, dw.reshape(w.shape), db


def blocks(backend: Backend, x: np.ndarray, a: np.ndarray, window: Window) -> list[Block]:
    """Runs of images whose unfolded rows and outputs take about block_bytes, or bands of one."""
    image_bytes = x[:1].nbytes * window.kw + a[:1].nbytes
    bands = min(-(-image_bytes // backend.block_bytes), a.shape[1])
    if bands <= 1:
        return [(images, slice(0, a.shape[1]), slice(0, x.shape[1]))
                for images in backend.blocks(len(x), image_bytes)]
    return [(slice(n, n + 1), _share(a.shape[1], k, bands), _share(x.shape[1], k, bands))
            for n in range(len(x)) for k in range(bands)]


def _share(size: int, k: int, count: int) -> slice:
    """The k-th of `count` about equal runs of range(size)."""
    return slice(size * k // count, size * (k + 1) // count)


def band(window: Window, h: int, rows: slice) -> tuple[slice, Window]:
    """The rows of an image of height h that the windows of some output rows meet.

    Returned with the window as it stands over an image of those rows alone.
    """
    first = rows.start * window.sh - window.top
    last = (rows.stop - 1) * window.sh - window.top + window.effective[0]
    start, stop = (min(max(row, 0), h) for row in (first, last))
    padding = last - first - (stop - start)
    top = min(max(start - first, 0), padding)
    return slice(start, stop), window._replace(top=top, bottom=padding - top)


def _backward_window(window: Window) -> Window:
    """The window of the full convolution over dZ that is the input gradient (for stride 1)."""
    eh, ew = window.effective
    return window._replace(top=eh - 1 - window.top, bottom=eh - 1 - window.bottom,
                           left=ew - 1 - window.left, right=ew - 1 - window.right)


def pad(x: np.ndarray, window: Window, value: float = 0) -> np.ndarray:
    """x with `value` around it, in scratch memory; x itself where the window needs no padding."""
    top, bottom, left, right = window.top, window.bottom, window.left, window.right
    if not any((top, bottom, left, right)):
        return x
    n, h, width, c = x.shape
    padded = parallel.scratch("padded", (n, top + h + bottom, left + width + right, c), x.dtype)
    padded[:, :top] = value
    padded[:, top + h:] = value
    padded[:, :, :left] = value
    padded[:, :, left + width:] = value
    padded[:, top:top + h, left:left + width] = x
    return padded


def _unfold(x: np.ndarray, window: Window) -> np.ndarray:
    """x (n, h, w, c) -> cols (n, top + h + bottom, ow, kw * c), in scratch memory."""
    padded = pad(x, window)
    _, ow = window.out_size(*x.shape[1:3])
    cols = parallel.scratch("cols", (*padded.shape[:2], ow, window.kw, x.shape[-1]), x.dtype)
    image, row, pixel, channel = padded.strides
    cols[...] = as_strided(padded, cols.shape,
                           (image, row, window.sw * pixel, window.dw * pixel, channel))
    return cols.reshape(*cols.shape[:3], -1)


def _rows_under(cols: np.ndarray, window: Window, oh: int) -> Iterator[np.ndarray]:
    """For each ky the rows of cols that it meets: views (n, oh, ow, kw * c)."""
    for ky in range(window.kh):
        first = ky * window.dh
        yield cols[:, first:first + (oh - 1) * window.sh + 1:window.sh]


def _multiply(cols: np.ndarray, w: np.ndarray, window: Window, z: np.ndarray, above: int = 0
              ) -> None:
    """Z = sum over ky of cols' rows W[ky], written to z (n, oh, ow, c_out).

    above: how many rows of padding above the first one are not in cols, and those below neither.
    """
    filters = w.reshape(window.kh, -1, w.shape[-1])
    h, oh = cols.shape[1], z.shape[1]
    met = []  # by each ky: the outputs whose row is in cols
    for ky in range(window.kh):
        offset = ky * window.dh - above
        met.append((max(0, -(offset // window.sh)), min(oh, (h - 1 - offset) // window.sh + 1)))
    whole = met.index((0, oh)) if (0, oh) in met else None
    if whole is None:
        z[...] = 0
    term = parallel.scratch("term", z.shape, z.dtype)
    for ky in sorted(range(window.kh), key=lambda ky: ky != whole):
        first, end = met[ky]
        if first >= end:
            continue
        start = first * window.sh + ky * window.dh - above
        rows = cols[:, start:start + (end - first - 1) * window.sh + 1:window.sh]
        out = z if ky == whole else term[:, :end - first]
        for taps, results in _in_place(rows, out):
            np.matmul(taps, filters[ky], out=results)
        if ky != whole:
            z[:, first:end] += out


def _in_place(a: np.ndarray, b: np.ndarray, least_pixels: int = 1
              ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Views of a and b (n, h, w, c) as (n, h / m, m * w, c): m rows of an image to a product.

    m is the largest for which the product is computed in place; where that makes less than
    `least_pixels` a product, it is h. What m leaves over comes in views of its own.
    """
    n, h, width, c = a.shape
    m = max(1, min(h, IN_PLACE // (width * c * b.shape[-1])))
    if m * width < least_pixels:
        m = h
    whole = h // m * m
    for rows, size in ((slice(whole), m), (slice(whole, h), h - whole)):
        if size:
            yield (a[:, rows].reshape(n, -1, size * width, c),
                   b[:, rows].reshape(n, -1, size * width, b.shape[-1]))
