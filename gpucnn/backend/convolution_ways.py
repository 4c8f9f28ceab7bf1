"""How the CPU computes a convolution: the rule, by which numpy_backend.py goes, and its memory."""
from __future__ import annotations

import numpy as np

from gpucnn import convolution
from gpucnn.backend import Backend, narrow_convolution, parallel, row_convolution
from gpucnn.geometry import Window

# row_convolution.py, narrow_convolution.py, convolution.py, and the last without columns.
ROWS, FEW_CHANNELS, IM2COL, PRODUCT = "rows of taps", "few channels", "im2col", "matrix product"


def forward_way(window: Window, groups: int, x_shape: tuple[int, ...], c_out: int) -> str:
    """How conv2d is computed."""
    if row_convolution.pays(window, groups, x_shape, c_out):
        return ROWS
    return FEW_CHANNELS if narrow_convolution.pays(window, groups, x_shape) else _columns(window)


def backward_way(window: Window, groups: int, x_shape: tuple[int, ...], c_out: int,
                  input_gradient: bool) -> str:
    """How conv2d_backward is computed, with weights that are finite."""
    if row_convolution.backward_pays(window, groups, x_shape, c_out, input_gradient):
        return ROWS
    few = not input_gradient and narrow_convolution.pays(window, groups, x_shape)
    return FEW_CHANNELS if few else _columns(window)


def _columns(window: Window) -> str:
    return PRODUCT if convolution.is_pointwise(window) else IM2COL


Kept = dict[str, int]  # bytes that all threads together keep, by the name of parallel.scratch()


def forward_workspace(way: str, backend: Backend, x_shape: tuple[int, ...],
                      w_shape: tuple[int, ...], window: Window, dtype: np.dtype
                      ) -> tuple[Kept, int]:
    """What the threads keep, and the bytes that they free again, of a forward pass in this way."""
    x, w, a = _like(x_shape, w_shape, window, dtype)
    if way in (IM2COL, PRODUCT):
        images, threads = _image_blocks(backend, x, w, window)
        columns = convolution.workspace(backend, x_shape, w_shape, window, x.itemsize)
        padded = images * _padded(x_shape, window) * x.itemsize
        return {"padded": threads * padded}, threads * columns
    images, rows, _, threads, _ = _row_blocks(backend, x, a, window)
    return _bytes(_unfolded(way, x_shape, a.shape, rows, window), threads * images * x.itemsize), 0


def backward_workspace(way: str, backend: Backend, x_shape: tuple[int, ...],
                       w_shape: tuple[int, ...], window: Window, dtype: np.dtype,
                       input_gradient: bool) -> tuple[Kept, int]:
    """The same of a backward pass, the shares of the sums over blocks included, without dz."""
    x, w, a = _like(x_shape, w_shape, window, dtype)
    (_, _, ow, c_out), (n, _, _, c) = a.shape, x_shape
    if way in (IM2COL, PRODUCT):
        images, threads = _image_blocks(backend, x, w, window)
        shares = parallel.shares(-(-n // images), w.nbytes)
        threads = min(threads, shares)
        columns = convolution.workspace(backend, x_shape, w_shape, window, x.itemsize)
        pixels = images * x[:1].nbytes
        dcols = 0 if not input_gradient else columns + pixels if columns else pixels
        block = columns + w.nbytes + dcols
        padded = images * _padded(x_shape, window) * x.itemsize
        return {"padded": threads * padded}, threads * block + _sums(shares, w.nbytes)
    images, rows, x_rows, threads, blocks = _row_blocks(backend, x, a, window)
    kept = _unfolded(way, x_shape, a.shape, rows, window)
    if way == ROWS and input_gradient:
        top, left = (size - 1 - before for size, before in zip(
            window.effective, (window.top, window.left)))
        back = window._replace(top=top, bottom=top, left=left,
                               right=window.effective[1] - 1 - window.right)
        for name, numbers in _unfolded(way, a.shape, x_shape, x_rows, back, inside=True).items():
            kept[name] = max(kept[name], numbers)
    if way == ROWS:
        row = window.kw * c
        m = max(1, min(rows, row_convolution.IN_PLACE // (ow * row * c_out)))
        if m * ow < row_convolution.LEAST_PIXELS:
            m = rows
        products = rows // m
    else:
        row = window.places * c
        products = rows * ow * row * c_out // row_convolution.IN_PLACE
    kept["products"] = products * row * c_out
    shares = parallel.shares(blocks, w.nbytes)
    threads = min(threads, shares)
    rotated = w.nbytes if way == ROWS else 0
    return _bytes(kept, threads * images * x.itemsize), _sums(shares, w.nbytes) + rotated


def _like(x_shape: tuple[int, ...], w_shape: tuple[int, ...], window: Window, dtype: np.dtype
          ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, w and a with all their bytes but no memory."""
    a_shape = (x_shape[0], *window.out_size(*x_shape[1:3]), w_shape[-1])
    x, w, a = (np.broadcast_to(np.zeros((), dtype), shape) for shape in (x_shape, w_shape, a_shape))
    return x, w, a


def _image_blocks(backend: Backend, x: np.ndarray, w: np.ndarray, window: Window
                  ) -> tuple[int, int]:
    """Images of a block, and how many threads have one."""
    blocks = convolution.image_blocks(backend, x, w, window)
    return blocks[0].stop, min(parallel.thread_count(), len(blocks))


def _row_blocks(backend: Backend, x: np.ndarray, a: np.ndarray, window: Window
                ) -> tuple[int, int, int, int, int]:
    """Images, rows of the output and of the input of a block, how many threads have one, blocks."""
    blocks = row_convolution.blocks(backend, x, a, window)
    images, rows, x_rows = (max(part.stop - part.start for part in parts) for parts in zip(*blocks))
    return images, rows, x_rows, min(parallel.thread_count(), len(blocks)), len(blocks)


def _padded(x_shape: tuple[int, ...], window: Window) -> int:
    """Numbers of a padded image; none where there is nothing to pad."""
    _, h, w, c = x_shape
    padding = window.top, window.bottom, window.left, window.right
    return (h + sum(padding[:2])) * (w + sum(padding[2:])) * c if any(padding) else 0


def _unfolded(way: str, x_shape: tuple[int, ...], a_shape: tuple[int, ...], rows: int,
              window: Window, inside: bool = False) -> Kept:
    """Numbers of an image that is padded and unfolded for some rows of the output.

    inside: without the padding above and below it.
    """
    (_, h, w, c), (_, _, ow, c_out) = x_shape, a_shape
    height = min((rows - 1) * window.sh + window.effective[0], h + window.top + window.bottom)
    if inside:
        height = min(height, h)
        window = window._replace(top=0, bottom=0)
    padded = _padded((1, height - window.top - window.bottom, w, c), window)
    if way == FEW_CHANNELS:
        return {"padded": padded, "cols": rows * ow * window.places * c}
    return {"padded": padded, "cols": height * ow * window.kw * c, "term": rows * ow * c_out}


def _bytes(numbers: Kept, each: int) -> Kept:
    return {name: count * each for name, count in numbers.items()}


def _sums(shares: int, nbytes: int) -> int:
    """Of sums in so many shares, and of their sum."""
    return nbytes * (shares + (shares > 1))
