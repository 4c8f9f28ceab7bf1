"""Philox4x32-10: random numbers that are a pure function of a counter and a key.

From Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The
same numbers come out on every machine, backend and version, in any order and without a state,
so that a mask need not be stored and a resumed run equals one that never stopped.
`kernels/philox.cuh` computes the same function on the GPU.
"""
from __future__ import annotations

import numpy as np

_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
_KEY_STEPS = np.array([[0x9E3779B9], [0xBB67AE85]], np.uint64)
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)
_CHUNK = 1 << 15  # counters at a time: their words stay in the cache


def philox4x32(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Ten rounds of Philox4x32: counter (n, 4) uint32, key two 32-bit words -> (n, 4) uint32."""
    words = counter.T.reshape(2, 2, -1).astype(np.uint64, order="C")
    even, odd = words[:, 0], words[:, 1]  # of the words 0 to 3: (2, n) each
    products = np.empty_like(even)
    k = np.array(key, np.uint64)[:, None]
    for _ in range(10):
        np.multiply(even, _MULTIPLIERS, out=products)
        other = products[::-1]
        np.right_shift(other, _SHIFT, out=even)
        even ^= odd
        even ^= k
        np.bitwise_and(other, _LOW, out=odd)
        k = (k + _KEY_STEPS) & _LOW
    return words.reshape(4, -1).T.astype(np.uint32, order="C")


def random_words(size: int, key: int, stream: int = 0, *, start: int = 0) -> np.ndarray:
    """`size` uniformly distributed uint32 words (size,). key, stream: 0 to 2^64 - 1.

    Words 4 j to 4 j + 3 are Philox of the counter (j, stream) in 64 bits each.
    start: a multiple of 4, the number of the first word.
    """
    blocks = -(-size // 4)
    words = np.empty((blocks, 4), np.uint32)
    for first in range(0, blocks, _CHUNK):
        j = np.arange(first, min(first + _CHUNK, blocks), dtype=np.uint64) + np.uint64(start // 4)
        counter = np.empty((len(j), 4), np.uint32)
        counter[:, 0] = j & _LOW
        counter[:, 1] = j >> _SHIFT
        counter[:, 2:] = words_of(stream)
        words[first:first + len(j)] = philox4x32(counter, words_of(key))
    return words.reshape(-1)[:size]


def uniform(shape: tuple[int, ...], key: int, stream: int = 0) -> np.ndarray:
    """float64 in the open interval (0, 1), 2^32 values evenly spaced."""
    size = int(np.prod(shape))
    return ((random_words(size, key, stream) + 0.5) / 2.0**32).reshape(shape)


def normal(shape: tuple[int, ...], key: int, stream: int = 0) -> np.ndarray:
    """float64 of mean 0 and standard deviation 1, by the transform of Box and Muller (1958)."""
    u, v = uniform((2, int(np.prod(shape))), key, stream)
    return (np.sqrt(-2 * np.log(u)) * np.cos(2 * np.pi * v)).reshape(shape)


def drop_threshold(rate: float) -> int:
    """A random word below it means "drop": a share `rate` of all words, to within 2^-32."""
    return min(round(rate * 2**32), 2**32 - 1)


def words_of(number: int) -> tuple[int, int]:
    """The low and the high 32 bits of an int from 0 to 2^64 - 1."""
    return number & 0xFFFFFFFF, number >> 32
