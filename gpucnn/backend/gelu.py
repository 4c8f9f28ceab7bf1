"""The Gaussian error linear unit on the CPU: NumPy has no erf.

Phi(-y), what the normal distribution has left of -y, is for y >= 0

    exp(-y^2 / 2) C(t) / (2 + 2 sqrt(2) y),    t = (x - k) / (x + k),    x = y / sqrt(2), k = 3.75

with the Chebyshev series C of (1 + 2 x) exp(x^2) erfc(x): Shepherd and Laframboise 1981, "Chebyshev
approximation of (1 + 2x) exp(x^2) erfc(x) in 0 <= x < infinity", Math. Comp. 36. One formula holds
from 0 to infinity, to the last digits of what is left.
"""
from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from numpy.polynomial import chebyshev

from gpucnn.backend import Backend, parallel
from gpucnn.numerics import blocks_of, for_blocks

_SERIES = (
    1.177578934567401754082, -0.004590054580646477328339, -0.08424913336651791558148,
    0.05920993999819189049935, -0.02665866843530575227703, 0.009074997670705265093282,
    -0.002413163540417608192417, 0.0004907758365258086301245, -6.916973302501206624116e-5,
    4.139027986073007518131e-6, 7.740383066198466769359e-7, -2.188640104923457829778e-7,
    1.076499946566987811635e-8, 4.521959811218176386314e-9, -7.754400208823150692464e-10,
    -6.318088340722684387579e-11, 2.868795011155152147074e-11, 1.94558688016003080909e-13,
    -9.654696723014333040937e-13, 3.252548368173876541573e-14, 3.347812106238522299146e-14,
    -1.864562118803086914978e-15, -1.25079519978485248658e-15, 7.418132468387199090243e-17)
_FAR = 40.0                 # past it exp(-y^2 / 2) is 0 in float64
_PART = 1 << 15             # elements
_HEAD = 16                  # y * _HEAD is cut to an int, whose square is exact
_DENSITY = 0.39894228040143267794  # 1 / sqrt(2 pi)


def forward(backend: Backend, x: np.ndarray) -> np.ndarray:
    """x Phi(x), written max(x, 0) - |x| Phi(-|x|): no digits are lost on the left."""
    y = backend.empty(x.shape, x.dtype)

    def work(y: np.ndarray, x: np.ndarray) -> None:
        distance, bell, left = _normal(x)
        left *= bell
        left *= distance
        np.maximum(x, 0, out=y)
        y -= left

    _for_parts(backend, work, y, x)
    return y


def backward(backend: Backend, dy: np.ndarray, x: np.ndarray) -> np.ndarray:
    """dy (Phi(x) + x phi(x)): the slope at -|x|, or 1 less that where x is positive."""
    dx = backend.empty(x.shape, x.dtype)

    def work(dx: np.ndarray, dy: np.ndarray, x: np.ndarray) -> None:
        distance, bell, slope = _normal(x)
        distance *= x.dtype.type(_DENSITY)
        slope -= distance
        slope *= bell
        positive = np.greater(x, 0, out=distance)
        bell[...] = slope
        bell *= -2
        bell += 1
        bell *= positive
        slope += bell
        np.multiply(dy, slope, out=dx)

    _for_parts(backend, work, dx, dy, x)
    return dx


def _for_parts(backend: Backend, work: Callable[..., None], *arrays: np.ndarray) -> None:
    """work(*parts) for the same parts of all arrays, so short that the scratch stays in the cache.
    """
    def in_parts(*blocks: np.ndarray) -> None:
        for part in blocks_of(blocks[0].size, _PART):
            work(*(block[part] for block in blocks))

    for_blocks(backend, in_parts, *arrays)


def _normal(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """|x|, exp(-x^2 / 2), and what that is to be multiplied with for Phi(-|x|), in scratch memory.

    |x| is 40 at most.
    """
    distance, bell, left, t = (parallel.scratch(f"gelu {k}", x.shape, x.dtype) for k in range(4))
    number = x.dtype.type
    np.minimum(np.abs(x, out=distance), number(_FAR), out=distance)
    # exp multiplies a rounding of its argument: of y^2 = head^2 + (y - head)(y + head) the first
    # is exact, the second small.
    np.multiply(distance, number(_HEAD), out=t)
    np.floor(t, out=t)
    t *= number(1 / _HEAD)
    np.subtract(distance, t, out=left)
    np.add(distance, t, out=bell)
    bell *= left
    bell *= number(-0.5)
    np.exp(bell, out=bell)
    t *= t
    t *= number(-0.5)
    bell *= np.exp(t, out=t)

    k = 3.75 * 2**0.5                     # t is a quotient, so that sqrt(2) may be left in it
    np.add(distance, number(k), out=left)
    np.subtract(distance, number(k), out=t)
    t /= left
    first, *others = _powers(x.dtype.name)
    left[...] = first
    for coefficient in others:
        left *= t
        left += number(coefficient)
    np.multiply(distance, number(2 * 2**0.5), out=t)
    t += 2
    left /= t
    return distance, bell, left


@functools.cache
def _powers(dtype: str) -> list[float]:
    """The series as a polynomial, its highest power first, as long as the dtype can tell."""
    enough = np.abs(_SERIES) > np.finfo(dtype).eps / 16
    return chebyshev.cheb2poly(np.asarray(_SERIES)[enough])[::-1].tolist()
