"""Batch norm on the GPU: which blocks the kernels of kernels/batchnorm.cu run in.

A reduction has few blocks, each with many rows: what they leave to merge is then small. A pass over
the elements has more. Their number is a function of the shape, not of the GPU, and so the order of
every sum is.
"""
from __future__ import annotations

from typing import Any

import cupy

from gpucnn.backend import Moments
from gpucnn.backend.cuda_kernel import BLOCK, Kernel

_moments = Kernel("batchnorm.cu", "batch_norm_moments")
_merge_moments = Kernel("batchnorm.cu", "batch_norm_merge_moments")
_forward = Kernel("batchnorm.cu", "batch_norm")
_sums = Kernel("batchnorm.cu", "batch_norm_sums")
_merge_sums = Kernel("batchnorm.cu", "batch_norm_merge_sums")
_backward = Kernel("batchnorm.cu", "batch_norm_backward")

_MOST_COLUMNS = 32      # of a block: 512 bytes of each row
_MERGED_CHANNELS = 8    # of a block that merges: 32 bytes, the least that a GPU reads
_REDUCING = 512, 16     # blocks at most, rows of a thread at least
_ELEMENTWISE = 2048, 4


def statistics(x: Any, running_mean: Any, running_var: Any, momentum: float, vec: int,
               moments: Moments | None = None) -> tuple[Any, Any]:
    """As Backend.batch_norm_statistics. vec: channels a thread."""
    rows, c = x.size // x.shape[-1], x.shape[-1]
    if moments is None:
        (columns, bands), band, width = tiles(rows, c // vec, *_REDUCING)
        moments = Moments(cupy.empty((bands, 2, c), running_mean.dtype), band)
        _moments.launch((columns, bands), BLOCK, x, moments.partial, rows, c, band, width, vec=vec)
    mean, var = cupy.empty_like(running_mean), cupy.empty_like(running_var)
    columns, width = _merging(c, vec)
    _merge_moments.launch(columns, BLOCK, moments.partial, mean, var, running_mean, running_var,
                          rows, c, moments.band, len(moments.partial), width, momentum, vec=vec)
    return mean, var


def forward(x: Any, mean: Any, var: Any, gamma: Any, beta: Any, epsilon: float, residual: Any,
            relu: bool, vec: int) -> Any:
    """As Backend.batch_norm."""
    rows, c = x.size // x.shape[-1], x.shape[-1]
    y = cupy.empty(x.shape, x.dtype)
    grid, band, width = tiles(rows, c // vec, *_ELEMENTWISE)
    _forward.launch(grid, BLOCK, x, residual, mean, var, gamma, beta, y, rows, c, band, width,
                    epsilon, int(relu), vec=vec)
    return y


def backward(dy: Any, x: Any, y: Any, mean: Any, var: Any, gamma: Any, beta: Any, epsilon: float,
             relu: bool, dgamma: Any, dbeta: Any, dz: Any, vec: int) -> Any:
    """dx; writes dgamma, dbeta, and where it is given dz. y: None to compute it from x again."""
    rows, c = x.size // x.shape[-1], x.shape[-1]
    norm = mean, var, gamma, beta
    (columns, bands), band, width = tiles(rows, c // vec, *_REDUCING)
    partial = cupy.empty((bands, 2, c), gamma.dtype)
    _sums.launch((columns, bands), BLOCK, dy, x, y, *norm, partial, dz, rows, c, band, width,
                 epsilon, int(relu), vec=vec)
    columns, width = _merging(c, vec)
    _merge_sums.launch(columns, BLOCK, partial, dbeta, dgamma, c, bands, width, vec=vec)
    if dz is not None:
        dy, relu = dz, False
    dx = cupy.empty(x.shape, x.dtype)
    grid, band, width = tiles(rows, c // vec, *_ELEMENTWISE)
    _backward.launch(grid, BLOCK, dy, x, *norm, dgamma, dbeta, dx, rows, c, band, width, epsilon,
                     int(relu), vec=vec)
    return dx


def tiles(rows: int, columns: int, most_blocks: int, least_rows: int
          ) -> tuple[tuple[int, int], int, int]:
    """The grid (columns of blocks, bands), the rows of a band, and the columns of a block.

    columns: of VEC channels each.
    """
    width = _power_of_two(min(columns, _MOST_COLUMNS))
    across, lanes = -(-columns // width), BLOCK // width
    bands = max(1, min(rows // (lanes * least_rows), most_blocks // across))
    band = max(1, -(-rows // (bands * lanes))) * lanes
    return (across, -(-rows // band)), band, width


def _merging(c: int, vec: int) -> tuple[int, int]:
    """How many blocks merge what the bands hold of c channels, and the columns of each."""
    width = _power_of_two(min(c // vec, max(1, _MERGED_CHANNELS // vec)))
    return -(-c // (vec * width)), width


def _power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << (n - 1).bit_length()
