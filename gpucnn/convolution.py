"""Convolution as matrix products over the columns of im2col, for every backend.

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

import math
from typing import Any

from gpucnn.activations import activate, activation_backward
from gpucnn.backend import Array, Backend
from gpucnn.geometry import Window
from gpucnn.numerics import sum_rows


def conv2d(backend: Backend, x: Array, w: Array, b: Array | None, window: Window, groups: int,
           activation: str | None, residual: Array | None = None) -> Array:
    """x (n, h, w, c_in), w (kh, kw, c_in / groups, c_out), b (c_out,) -> A (n, oh, ow, c_out).

    residual: of A's shape, added before the activation.
    """
    xp = backend.xp
    a = backend.empty((len(x), *window.out_size(*x.shape[1:3]), w.shape[-1]), x.dtype)
    filters = _filter_matrices(w, groups)

    bias = repeated(xp, b, a.shape[2])

    def convolve(images: slice) -> None:
        cols = _columns(backend, x[images], window)
        z = a[images].reshape(len(cols), -1)
        if groups == 1:
            backend.matmul(cols, filters[0], out=z)
        else:
            z[...] = _join_groups(xp.matmul(_split_columns(cols, window, groups), filters))
        finish(xp, a[images], bias, activation, None if residual is None else residual[images])

    backend.for_each(convolve, image_blocks(backend, x, w, window))
    return a


def conv2d_backward(backend: Backend, da: Array, a: Array, x: Array, w: Array, window: Window,
                    groups: int, activation: str | None, input_gradient: bool
                    ) -> tuple[Array | None, Array, Array]:
    """da and a (n, oh, ow, c_out), x and w as in conv2d -> dx, dw of their shapes, db (c_out,).

    input_gradient: without it dx is None.
    """
    xp = backend.xp
    dx = backend.empty(x.shape, x.dtype) if input_gradient else None
    filters = _filter_matrices(w, groups)
    back = filters.transpose(0, 2, 1)

    def add(images: slice, dfilters: Array, db: Array) -> None:
        cols = _columns(backend, x[images], window)
        dz = activation_backward(xp, activation, da[images], a[images]).reshape(len(cols), -1)
        db += sum_rows(xp, dz)
        if groups == 1:
            dfilters[0] += backend.matmul(cols.T, dz)
            dcols = backend.matmul(dz, back[0]) if input_gradient else None
        else:
            dz_groups = _split_groups(dz, groups)
            dfilters += _split_columns(cols, window, groups).transpose(0, 2, 1) @ dz_groups
            dcols = _join_columns(dz_groups @ back, window) if input_gradient else None
        if dx is not None:
            dx[images] = _fold(backend, dcols, x[images].shape, window)

    dfilters, db = backend.sum_over(add, image_blocks(backend, x, w, window),
                                    [filters, xp.empty(w.shape[-1], w.dtype)])
    dw = dfilters.reshape(groups, *w.shape[:3], -1).transpose(1, 2, 3, 0, 4).reshape(w.shape)
    return dx, xp.ascontiguousarray(dw), db


def repeated(xp: Any, b: Array | None, width: int) -> Array | None:
    """b for each pixel of a row: NumPy adds long rows at several times the speed."""
    return None if b is None else xp.tile(b, width)


def finish(xp: Any, z: Array, bias: Array | None, activation: str | None,
           residual: Array | None) -> None:
    """Z + b + residual, then g, written over z (n, oh, ow, c_out).

    bias: repeated() for ow pixels. residual: of z's shape.
    """
    if bias is not None:
        rows = z.reshape(-1, len(bias))
        rows += bias
    if residual is not None:
        z += residual
    activate(xp, activation, z)


def image_blocks(backend: Backend, x: Array, w: Array, window: Window) -> list[slice]:
    """The batch in blocks whose columns take about block_bytes, or half of what the filters take.

    For the filters are read once a block.
    """
    return backend.blocks(len(x), _columns_bytes(x.shape, window, x.itemsize), w.nbytes // 2)


def workspace(backend: Backend, x_shape: tuple[int, ...], w_shape: tuple[int, ...], window: Window,
              itemsize: int) -> int:
    """Bytes of the columns of the largest block; a block of the input gradient has as many."""
    if is_pointwise(window):
        return 0
    image = _columns_bytes(x_shape, window, itemsize)
    blocks = backend.blocks(x_shape[0], image, math.prod(w_shape) * itemsize // 2)
    return max((b.stop - b.start for b in blocks), default=0) * image


def _columns_bytes(x_shape: tuple[int, ...], window: Window, itemsize: int) -> int:
    """Of one image."""
    return math.prod(window.out_size(*x_shape[1:3])) * window.places * x_shape[3] * itemsize


def is_pointwise(window: Window) -> bool:
    """Whether the columns are the image itself."""
    return window == Window(1, 1, 1, 1, 0, 0, 0, 0, window.dh, window.dw)


def _columns(backend: Backend, x: Array, window: Window) -> Array:
    """im2col, which for a 1x1 convolution is the image itself."""
    return x.reshape(-1, x.shape[-1]) if is_pointwise(window) else backend.im2col(x, window)


def _fold(backend: Backend, dcols: Array, x_shape: tuple[int, ...], window: Window) -> Array:
    if is_pointwise(window):
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
