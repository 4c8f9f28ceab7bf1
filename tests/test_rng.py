"""Philox4x32-10 gives the numbers of its authors."""
from __future__ import annotations

import numpy as np
import pytest

from gpucnn import rng as random

# The known answers of Random123 (kat_vectors), by D. E. Shaw Research: counter, key, result.
KNOWN = {
    "zeros": ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2,
             (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
           (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
}


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN.values(), ids=KNOWN)
def test_known_answers(counter, key, words):
    assert tuple(random.philox4x32(np.array([counter], np.uint32), key)[0]) == words


def test_words_are_the_blocks_of_a_counter():
    key, stream = 0x1234_5678_9ABC_DEF0, 0xFEDC_BA98_7654_3210
    words = random.random_words(40_003, key, stream)  # more than one chunk, and half a block
    block = np.array([[9000, 0, 0x7654_3210, 0xFEDC_BA98]], np.uint32)
    np.testing.assert_array_equal(words[36_000:36_004],
                                  random.philox4x32(block, (0x9ABC_DEF0, 0x1234_5678))[0])
    np.testing.assert_array_equal(words[:7], random.random_words(7, key, stream))
    assert (random.random_words(100, key, stream + 1) != words[:100]).any()
    assert (random.random_words(100, key + 1, stream) != words[:100]).any()
    assert random.random_words(0, key).shape == (0,)


def test_the_first_numbers_stay_as_they_are():
    """A saved seed must mean the same run in every version."""
    np.testing.assert_array_equal(random.random_words(4, 0), KNOWN["zeros"][2])
    np.testing.assert_array_equal(random.uniform((1, 2), 0),
                                  (np.array([KNOWN["zeros"][2][:2]]) + 0.5) / 2.0**32)
    u, v = (np.array(KNOWN["zeros"][2]) + 0.5).reshape(2, 2) / 2.0**32
    np.testing.assert_allclose(random.normal((2,), 0),
                               np.sqrt(-2 * np.log(u)) * np.cos(2 * np.pi * v), rtol=1e-14)


def test_distributions():
    """Each within five standard errors of its moments, n = 100,000."""
    n = 100_000
    u = random.uniform((n // 2, 2), 1)
    assert u.shape == (n // 2, 2)
    assert 0 < u.min() < u.max() < 1
    assert abs(u.mean() - 0.5) < 5 * (1 / 12 / n) ** 0.5
    z = random.normal((n,), 1)
    assert abs(z.mean()) < 5 / n**0.5
    assert abs(z.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((z**3).mean()) < 5 * (15 / n) ** 0.5


def test_thresholds():
    assert random.drop_threshold(0) == 0
    assert random.drop_threshold(0.25) == 2**30
    assert random.drop_threshold(1 - 2**-60) == 2**32 - 1
