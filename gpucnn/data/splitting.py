"""Which images are held out as the test set of a data set that comes without one."""
from __future__ import annotations

import numpy as np

from gpucnn.errors import DataError

TEST_SHARE = 0.2


def checked_share(test_share: float | None) -> float:
    """The share to hold out, TEST_SHARE for None. Raises ValueError for what is none."""
    share = TEST_SHARE if test_share is None else test_share
    if not 0 < share < 1:
        raise ValueError(f"test_share must be more than 0 and less than 1, got {share}")
    return share


def held_out(labels: np.ndarray, keys: np.ndarray, share: float) -> np.ndarray:
    """Which of the images are for testing: (n,) bool.

    labels: (n,) integers. keys: (n,) random numbers that belong to the images. In each class those
    with the smallest keys are held out, a share of them, but at least one and not all.

    Raises DataError where each class has but one image.
    """
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)
        count = min(max(1, round(share * len(of_class))), len(of_class) - 1)
        chosen[of_class[np.argsort(keys[of_class], kind="stable")[:count]]] = True
    if not chosen.any():
        raise DataError("no class has two images, so that one could be held out for testing; add "
                        "images, or a test part")
    return chosen
