"""Batch norm on the CPU: the arithmetic of kernels/batchnorm.cu, in blocks of rows on all threads.

    x_hat = (x - mean) / sqrt(var + epsilon)
    y     = g(gamma x_hat + beta + residual)

A block of rows stays in the cache from one NumPy call to the next. NumPy works along rows of c
channels at several times the speed where they are long, so k of them are seen as one (wide()), and
what there is one of a channel is repeated k times (_each()).
"""
from __future__ import annotations

import functools

import numpy as np

from gpucnn.activations import activate, activation_backward
from gpucnn.backend import Backend, parallel
from gpucnn.numerics import sum_rows

LONG_ROW = 8192  # numbers; 2048 took half as long again, 32768 no less
FEW_ROWS = 256   # for which repeating takes longer than it saves


@functools.lru_cache(maxsize=1024)
def repeats(rows: int, c: int) -> int:
    """How many rows of c to see as one: what divides their number, for a row of up to LONG_ROW."""
    if rows <= FEW_ROWS:
        return 1
    return next((k for k in range(LONG_ROW // c, 1, -1) if rows % k == 0), 1)


def wide(x: np.ndarray) -> np.ndarray:
    """x (..., c) as (rows / k, k c)."""
    c = x.shape[-1]
    return x.reshape(-1, c * repeats(x.size // c, c))


def statistics(backend: Backend, x: np.ndarray, running_mean: np.ndarray, running_var: np.ndarray,
               momentum: float) -> tuple[np.ndarray, np.ndarray]:
    """As Backend.batch_norm_statistics.

    Of each block, sums over d = x - centre, where centre is the mean of its first eighth of rows:
    its distance from the mean of all is at most sqrt(8 var), by Cauchy and Schwarz, so that at most
    a digit is lost in sum d^2 - (sum d)^2 / rows. That is as exact as a second pass with the mean
    at hand. Blocks are put together as in Chan, Golub and LeVeque 1983.
    """
    c, values = x.shape[-1], wide(x)
    k = values.shape[1] // c
    blocks = _blocks(backend, values)
    means, m2s = np.empty((2, len(blocks), c))  # few, so in float64
    counts = np.array([[float(block.stop - block.start)] for block in blocks]) * k

    def measure(i: int) -> None:
        part = values[blocks[i]]
        first = part[:-(-len(part) // 8)]
        centre = _sum(first, c) / x.dtype.type(len(first) * k)
        d = np.subtract(part, _each(centre, k), out=_scratch(part))
        d_mean = _sum(d, c) / counts[i]
        d *= d
        means[i] = centre + d_mean
        m2s[i] = np.maximum(_sum(d, c) - counts[i] * d_mean**2, 0)

    backend.for_each(measure, range(len(blocks)))
    count = counts.sum()
    mean = (counts * means).sum(axis=0) / count
    m2 = (m2s + counts * (means - mean) ** 2).sum(axis=0)
    running_mean[...] = (1 - momentum) * running_mean + momentum * mean
    running_var[...] = (1 - momentum) * running_var + momentum * (m2 / (count - 1))
    return mean.astype(x.dtype), (m2 / count).astype(x.dtype)


def forward(backend: Backend, x: np.ndarray, mean: np.ndarray, var: np.ndarray, gamma: np.ndarray,
            beta: np.ndarray, epsilon: float, residual: np.ndarray | None, activation: str | None
            ) -> np.ndarray:
    """As Backend.batch_norm."""
    y = backend.empty(x.shape, x.dtype)
    values, out = wide(x), wide(y)
    others = None if residual is None else wide(residual)
    k = values.shape[1] // x.shape[-1]
    means, scales, betas = (_each(v, k) for v in (mean, gamma / _std(var, epsilon), beta))

    def normalise(block: slice) -> None:
        z = np.subtract(values[block], means, out=out[block])
        z *= scales
        z += betas
        if others is not None:
            z += others[block]
        activate(np, activation, z)

    backend.for_each(normalise, _blocks(backend, values))
    return y


def backward(backend: Backend, dy: np.ndarray, x: np.ndarray, y: np.ndarray | None,
             mean: np.ndarray, var: np.ndarray, gamma: np.ndarray, epsilon: float,
             activation: str | None, dgamma: np.ndarray, dbeta: np.ndarray, has_residual: bool
             ) -> tuple[np.ndarray, np.ndarray | None]:
    """As Backend.batch_norm_backward.

    mean and var depend on x as well, which takes the mean of dz and its part along x_hat out:

        dx = gamma / sqrt(var + epsilon) (dz - dbeta / rows - x_hat dgamma / rows)
    """
    c, values = x.shape[-1], wide(x)
    k, count = values.shape[1] // c, x.dtype.type(max(1, x.size // c))
    blocks = _blocks(backend, values)
    dx, dz = backend.empty(x.shape, x.dtype), dy
    if y is not None:
        # Nobody else wants dz without a residual: dx is written over it.
        dz = backend.empty(x.shape, x.dtype) if has_residual else dx
        derivatives, outputs = wide(dy), wide(y)
    dxs, dzs = wide(dx), wide(dz)
    inverse_std = 1 / _std(var, epsilon)
    means = _each(mean, k)

    def add(block: slice, dgamma: np.ndarray, dbeta: np.ndarray) -> None:
        if y is not None:
            activation_backward(np, activation, derivatives[block], outputs[block], out=dzs[block])
        products = np.subtract(values[block], means, out=_scratch(values[block]))
        products *= dzs[block]
        dgamma += _sum(products, c) * inverse_std
        dbeta += _sum(dzs[block], c)

    dgamma[...], dbeta[...] = backend.sum_over(add, blocks, [dgamma, dbeta])
    alongs, averages, scales = (_each(v, k) for v in (
        dgamma / count * inverse_std, dbeta / count, gamma * inverse_std))

    def spread(block: slice) -> None:
        result = np.subtract(means, values[block], out=_scratch(values[block]))
        result *= alongs
        result += dzs[block]
        result -= averages
        np.multiply(result, scales, out=dxs[block])

    backend.for_each(spread, blocks)
    return dx, dz if has_residual else None


def _blocks(backend: Backend, values: np.ndarray) -> list[slice]:
    return backend.blocks(len(values), values[:1].nbytes)


def _scratch(like: np.ndarray) -> np.ndarray:
    return parallel.scratch("batch_norm", like.shape, like.dtype)


def _each(vector: np.ndarray, k: int) -> np.ndarray:
    """(c,) -> (k c,)."""
    return vector if k == 1 else np.tile(vector, k)


def _sum(values: np.ndarray, c: int) -> np.ndarray:
    """The sum over rows (rows / k, k c) -> (c,)."""
    total = sum_rows(np, values)
    return total if len(total) == c else sum_rows(np, total.reshape(-1, c))


def _std(var: np.ndarray, epsilon: float) -> np.ndarray:
    return np.sqrt(var + var.dtype.type(epsilon))
