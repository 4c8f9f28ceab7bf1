"""Image files that stay on the disk, and are decoded ahead of what takes them."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gpucnn.data.decoding import Decoder
from gpucnn.data.shards import DiskImages, Take


class ImageFiles(DiskImages):
    """Image files as one array (n, h, w, c) of uint8.

    paths: n files. decoder: says h, w and c. Taking raises what its decoded() raises.
    """

    def __init__(self, paths: Sequence[Path], decoder: Decoder):
        self._paths, self._decoder = paths, decoder
        self.shape = (len(paths), *decoder.size, decoder.channels)

    def take(self, numbers: np.ndarray, out: np.ndarray) -> None:
        self.take_ahead([numbers])(numbers, out)

    def take_ahead(self, batches: Sequence[np.ndarray]) -> Take:
        decoded = self._decoder.decoded([[self._paths[i] for i in batch] for batch in batches])

        def take(numbers: np.ndarray, out: np.ndarray) -> None:
            at = 0
            while at < len(numbers):
                chunk = next(decoded)
                out[at:at + len(chunk)] = chunk
                at += len(chunk)

        return take

    def select(self, numbers: np.ndarray | slice) -> ImageFiles:
        return ImageFiles([self._paths[i] for i in np.arange(len(self))[numbers]], self._decoder)
