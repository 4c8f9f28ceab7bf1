"""Convolution as matrix products over the columns of im2col, on every backend.

    forward           Z  = cols(A) W + b
    weight gradient   dW = cols(A)^T dZ,  db = sum dZ
    input gradient    dA = col2im(dZ W^T)

The last is the article's full convolution of dZ with the filters rotated by 180 degrees: col2im
adds what each output sends back through each tap (gpucnn/reference.py writes it as in the
article). The batch is worked through in blocks of images, because the columns are kh * kw times
as large as the images; they are made anew in the backward pass for the same reason.

With groups, the channels are dealt out in order: group k maps the k-th share of c_in to the k-th
share of c_out, as one matrix product a group.
"""
from __future__ import annotations

from collections.abc import Iterator

from gpucnn.activations import activate
from gpucnn.backend import Array, Backend
from gpucnn.geometry import Window
from gpucnn.numerics import sum_rows


def conv2d(backend: Backend, x: Array, w: Array, b: Array | None, window: Window, groups: int,
           activation: str | None) -> Array:
    """x (n, h, w, c_in), w (kh, kw, c_in / groups, c_out), b (c_out,) -> (n, oh, ow, c_out)."""
    xp = backend.xp
    y = xp.empty((len(x), *window.out_size(*x.shape[1:3]), w.shape[-1]), x.dtype)
    filters = _filter_matrices(w, groups)
    for images in _blocks(backend, x, window):
        cols = _columns(backend, x[images], window)
        z = y[images].reshape(len(cols), -1)
        if groups == 1:
            xp.matmul(cols, filters[0], out=z)
        else:
            z[...] = _join_groups(xp.matmul(_split_columns(cols, window, groups), filters))
        if b is not None:
            z += b
        activate(xp, activation, z)
    return y


def conv2d_backward(backend: Backend, dz: Array, x: Array, w: Array, window: Window, groups: int
                    ) -> tuple[Array, Array, Array]:
    """dz (n, oh, ow, c_out), x and w as in conv2d -> dx, dw of their shapes, db (c_out,)."""
    xp = backend.xp
    dx = xp.empty_like(x)
    filters = _filter_matrices(w, groups)
    dfilters = xp.zeros_like(filters)
    db = xp.zeros(w.shape[-1], dz.dtype)
    for images in _blocks(backend, x, window):
        cols = _columns(backend, x[images], window)
        dz_rows = dz[images].reshape(len(cols), -1)
        dz_groups = _split_groups(dz_rows, groups)
        db += sum_rows(xp, dz_rows)
        dfilters += _split_columns(cols, window, groups).transpose(0, 2, 1) @ dz_groups
        dcols = _join_columns(dz_groups @ filters.transpose(0, 2, 1), window)
        dx[images] = _fold(backend, dcols, x[images].shape, window)
    dw = dfilters.reshape(groups, *w.shape[:3], -1).transpose(1, 2, 3, 0, 4).reshape(w.shape)
    return dx, xp.ascontiguousarray(dw), db


def _blocks(backend: Backend, x: Array, window: Window) -> Iterator[slice]:
    """The batch in runs of images whose columns take about block_bytes.

    Their length depends on the shapes alone, so that the sums over blocks are always the same.
    """
    n, h, w, c = x.shape
    oh, ow = window.out_size(h, w)
    image_bytes = oh * ow * window.places * c * x.itemsize
    images = max(1, backend.block_bytes // image_bytes)
    for start in range(0, n, images):
        yield slice(start, start + images)


def _is_pointwise(window: Window) -> bool:
    return window == Window(1, 1, 1, 1, 0, 0, 0, 0, window.dh, window.dw)


def _columns(backend: Backend, x: Array, window: Window) -> Array:
    """im2col, which for a 1x1 convolution is the image itself."""
    return x.reshape(-1, x.shape[-1]) if _is_pointwise(window) else backend.im2col(x, window)


def _fold(backend: Backend, dcols: Array, x_shape: tuple[int, ...], window: Window) -> Array:
    if _is_pointwise(window):
        return dcols.reshape(x_shape)
    return backend.col2im(backend.asarray(dcols), x_shape, window)


def _filter_matrices(w: Array, groups: int) -> Array:
    """w (kh, kw, c_in / groups, c_out) -> (groups, kh * kw * c_in / groups, c_out / groups)."""
    return _split_groups(w.reshape(-1, w.shape[-1]), groups)


def _split_groups(rows: Array, groups: int) -> Array:
    """(rows, c) -> (groups, rows, c / groups)."""
    return rows.reshape(len(rows), groups, -1).transpose(1, 0, 2)


def _join_groups(grouped: Array) -> Array:
    """The inverse of _split_groups."""
    groups, rows, channels = grouped.shape
    return grouped.transpose(1, 0, 2).reshape(rows, groups * channels)


def _split_columns(cols: Array, window: Window, groups: int) -> Array:
    """(rows, places * c_in) -> (groups, rows, places * c_in / groups)."""
    split = cols.reshape(len(cols), window.places, groups, cols.shape[1] // window.places // groups)
    return split.transpose(2, 0, 1, 3).reshape(groups, len(cols), cols.shape[1] // groups)


def _join_columns(grouped: Array, window: Window) -> Array:
    """The inverse of _split_columns."""
    groups, rows, width = grouped.shape
    split = grouped.reshape(groups, rows, window.places, width // window.places)
    return split.transpose(1, 2, 0, 3).reshape(rows, groups * width)
