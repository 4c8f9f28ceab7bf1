"""The GPU: CuPy arrays, and our kernels for what CuPy has no function for."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import cupy
import numpy as np

from gpucnn import convolution
from gpucnn.backend.cuda_kernel import Kernel
from gpucnn.geometry import Window
from gpucnn.numerics import blocks_of, sum_rows
from gpucnn.rng import drop_threshold, words_of

_im2col = Kernel("im2col.cu", "im2col")
_col2im = Kernel("im2col.cu", "col2im")
_max_pool = Kernel("maxpool.cu", "max_pool")
_max_pool_backward = Kernel("maxpool.cu", "max_pool_backward")
_avg_pool = Kernel("avgpool.cu", "avg_pool")
_avg_pool_backward = Kernel("avgpool.cu", "avg_pool_backward")
_dropout = Kernel("dropout.cu", "dropout")


class CupyBackend:
    name = "cupy"
    xp = cupy
    block_bytes = 256 << 20  # large enough to fill a GPU, small beside its memory

    def asarray(self, a: Any, dtype: Any = None) -> Any:
        return cupy.ascontiguousarray(cupy.asarray(a, dtype))

    def to_numpy(self, a: Any) -> np.ndarray:
        return cupy.asnumpy(a)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return cupy.empty(shape, dtype)  # CuPy's memory pool reuses what is free

    def blocks(self, n: int, item_bytes: int, least_bytes: int = 0) -> list[slice]:
        return blocks_of(n, max(self.block_bytes, least_bytes) // max(1, item_bytes))

    def for_each(self, work: Callable[[Any], None], items: Sequence[Any]) -> None:
        for item in items:
            work(item)

    def sum_over(self, work: Callable[..., None], items: Sequence[Any], like: Sequence[Any]
                 ) -> list[Any]:
        totals = [cupy.zeros(a.shape, a.dtype) for a in like]
        for item in items:
            work(item, *totals)
        return totals

    def matmul(self, a: Any, b: Any, out: Any = None) -> Any:
        return cupy.matmul(a, b, out=out)

    def sum_rows(self, matrix: Any) -> Any:
        return sum_rows(cupy, matrix)

    def conv2d(self, x: Any, w: Any, b: Any, window: Window, groups: int,
               activation: str | None) -> Any:
        return convolution.conv2d(self, x, w, b, window, groups, activation)

    def conv2d_backward(self, da: Any, a: Any, x: Any, w: Any, window: Window, groups: int,
                        activation: str | None, input_gradient: bool = True
                        ) -> tuple[Any, Any, Any]:
        return convolution.conv2d_backward(self, da, a, x, w, window, groups, activation,
                                           input_gradient)

    def im2col(self, x: Any, window: Window) -> Any:
        n, oh, ow, c = _output_shape(x.shape, window)
        cols = cupy.empty((n * oh * ow, window.places * c), x.dtype)
        _launch(_im2col, cols.size, (x, cols), x.shape, window)
        return cols

    def col2im(self, cols: Any, x_shape: tuple[int, ...], window: Window) -> Any:
        x = cupy.empty(x_shape, cols.dtype)
        _launch(_col2im, x.size, (cols, x), x_shape, window)
        return x

    def max_pool(self, x: Any, window: Window) -> tuple[Any, Any]:
        y = cupy.empty(_output_shape(x.shape, window), x.dtype)
        mask = cupy.empty(y.shape, window.mask_dtype)
        _launch(_max_pool, y.size, (x, y, mask), x.shape, window)
        return y, mask

    def max_pool_backward(self, dy: Any, mask: Any, x_shape: tuple[int, ...],
                          window: Window) -> Any:
        dx = cupy.empty(x_shape, dy.dtype)
        _launch(_max_pool_backward, dx.size, (dy, mask, dx), x_shape, window)
        return dx

    def avg_pool(self, x: Any, window: Window) -> Any:
        y = cupy.empty(_output_shape(x.shape, window), x.dtype)
        _launch(_avg_pool, y.size, (x, y), x.shape, window, dilation=())
        return y

    def avg_pool_backward(self, dy: Any, x_shape: tuple[int, ...], window: Window) -> Any:
        dx = cupy.empty(x_shape, dy.dtype)
        _launch(_avg_pool_backward, dx.size, (dy, dx), x_shape, window, dilation=())
        return dx

    def dropout(self, x: Any, rate: float, key: int, stream: int) -> Any:
        y = cupy.empty(x.shape, x.dtype)
        _dropout(-(-x.size // 4), x, y, x.size, drop_threshold(rate), 1 / (1 - rate),
                 *words_of(key), *words_of(stream))
        return y


def _output_shape(x_shape: tuple[int, ...], window: Window) -> tuple[int, ...]:
    n, h, w, c = x_shape
    return (n, *window.out_size(h, w), c)


def _launch(kernel: Kernel, elements: int, arrays: tuple, x_shape: tuple[int, ...],
            window: Window, dilation: tuple[int, ...] | None = None) -> None:
    """Launch a kernel that slides `window` over x: one thread for each 16 bytes of its result."""
    n, h, w, c = x_shape
    vec = _channels_at_once(c, arrays)
    kernel(elements // vec, *arrays, n, h, w, c, *window.out_size(h, w), window.kh, window.kw,
           window.sh, window.sw, window.top, window.left,
           *((window.dh, window.dw) if dilation is None else dilation), vec=vec)


def _channels_at_once(channels: int, arrays: tuple) -> int:
    """16 bytes' worth where every pixel starts at a multiple of 16 bytes, else 1."""
    vec = 16 // arrays[0].itemsize
    aligned = all(a.data.ptr % (vec * a.itemsize) == 0 for a in arrays)
    return vec if channels % vec == 0 and aligned else 1
