"""Sums that stay accurate in float32, and a choice that is exact and fast; for every backend."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpucnn.backend import Array, Backend


def blocks_of(n: int, items: int) -> list[slice]:
    """range(n) in runs of `items`, or of 1 where that is less."""
    items = max(1, items)
    return [slice(start, min(start + items, n)) for start in range(0, n, items)]


def for_blocks(backend: Backend, work: Callable[..., None], *arrays: Array) -> None:
    """work(*parts) for the same flat parts of C-contiguous arrays of one size, on all threads."""
    flat = [a.reshape(-1) for a in arrays]
    blocks = backend.blocks(flat[0].size, sum(a.itemsize for a in arrays))
    backend.for_each(lambda part: work(*(a[part] for a in flat)), blocks)


def sum_rows(xp: Any, matrix: Array) -> Array:
    """The sum over the rows of matrix (rows, columns) -> (columns,).

    As a matrix product: the BLAS adds in blocks, where `matrix.sum(axis=0)` adds one row after
    another and loses three digits over a few hundred thousand rows.
    """
    return xp.ones(len(matrix), matrix.dtype) @ matrix


def zero_where(drop: Array, values: Array, out: Array | None = None) -> Array:
    """0 where drop (bool, the same shape) is true, else values: xp.where(drop, 0, values).

    By a mask of bits: NumPy's conditional copies take ten times as long, and a product with 0 or 1
    would turn an infinity that is dropped into NaN.

    out: where to write the result, contiguous.
    """
    bits = np.dtype(f"i{values.itemsize}")
    ones = drop.view(np.int8) - np.int8(1)  # 0 becomes all ones, which wider ones inherit
    if out is None:
        mask = ones.astype(bits)
    else:
        mask = out.view(bits)
        mask[...] = ones
    mask &= values.view(bits)
    return mask.view(values.dtype)


def log_softmax(xp: Any, z: Array) -> Array:
    """log(exp(z) / sum(exp(z))) over the last axis; no overflow, and exact for large z."""
    shifted = z - z.max(axis=-1, keepdims=True)
    return shifted - xp.log(xp.exp(shifted).sum(axis=-1, keepdims=True))
