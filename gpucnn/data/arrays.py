"""Batches of arrays that are no data set of pictures: numbers of any scale, targets of any kind."""
from __future__ import annotations

from typing import Any

import numpy as np

from gpucnn.backend import Array, get_backend
from gpucnn.data.feed import ResidentFeed
from gpucnn.data.loader import Loader, check_batches


class ArrayLoader(Loader):
    """Cuts arrays into batches as Loader does, in the same order, without touching the numbers.

    x: (n, h, w, c) numbers. Each batch is cast to `dtype`.
    t: (n,) integer labels, or (n, outputs) floating-point targets, cast likewise.

    Both are moved to the backend in use, once. Raises TypeError and ValueError.
    """

    def __init__(self, x: Any, t: Any, batch_size: int, *, seed: int | None = None,
                 dtype: Any = np.float32) -> None:
        self.batch_size, self.seed, self.dtype = check_batches(batch_size, seed, dtype)
        self.backend = get_backend()
        x, t = (a if isinstance(a, self.backend.xp.ndarray) else np.asarray(a) for a in (x, t))
        if x.ndim != 4 or x.dtype.kind not in "fiu":
            raise TypeError("ArrayLoader: x must be numbers of shape (n, h, w, c), got "
                            f"{x.dtype} {x.shape}")
        labels = t.ndim == 1 and t.dtype.kind in "iu"
        if not labels and (t.ndim != 2 or t.dtype.kind != "f"):
            raise TypeError("ArrayLoader: t must be (n,) integer labels or (n, outputs) "
                            f"floating-point targets, got {t.dtype} {t.shape}")
        if len(x) != len(t):
            raise ValueError(f"ArrayLoader: {len(x)} images but {len(t)} targets")
        self.images = self.backend.asarray(x, self.dtype)
        self.labels = self.backend.asarray(t, np.int64 if labels else self.dtype)
        self.streamed = False

    @property
    def n(self) -> int:
        return len(self.images)

    def feed(self) -> ResidentFeed:
        return ArrayFeed(self)


class ArrayFeed(ResidentFeed):
    """A ResidentFeed that takes the images as they are."""

    def gather(self, size: int) -> tuple[Array, Array]:
        loader, xp = self.loader, self.loader.backend.xp
        numbers = self.order.take(self.cursor[:1] + xp.arange(size))
        self.cursor[:1] += size
        return loader.images.take(numbers, axis=0), loader.labels.take(numbers, axis=0)
