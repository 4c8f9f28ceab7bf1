"""A labelled set of images."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gpucnn.data.shards import DiskImages, Take


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and the class of each.

    images: uint8 (n, h, w, c), 0 to 255: a NumPy array, or DiskImages.
    labels: integers (n,), each an index into class_names.
    name: what logs and saved metrics call it.

    Raises TypeError for a wrong dtype, ValueError for a wrong shape, count or label.
    """

    images: np.ndarray | DiskImages
    labels: np.ndarray
    class_names: tuple[str, ...]
    name: str

    def __post_init__(self) -> None:
        images = self.images
        if not isinstance(images, (np.ndarray, DiskImages)) or images.dtype != np.uint8:
            raise TypeError("images must be a NumPy array of uint8, got "
                            f"{getattr(images, 'dtype', type(images).__name__)}")
        if images.ndim != 4:
            raise ValueError(f"images must be NHWC with 4 dimensions, got {images.ndim}: "
                             f"{images.shape}; add a channel axis with images[..., None]")
        check_labels(self.labels, len(self.class_names))
        if len(images) != len(self.labels):
            raise ValueError(f"{len(images)} images but {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def n_classes(self) -> int:
        """The number of classes, used or not."""
        return len(self.class_names)

    def take(self, numbers: np.ndarray, out: np.ndarray) -> None:
        """Write the images of those numbers (m,) to out (m, h, w, c)."""
        if isinstance(self.images, DiskImages):
            self.images.take(numbers, out)
        else:
            np.take(self.images, numbers, axis=0, out=out, mode="clip")

    def take_ahead(self, batches: Sequence[np.ndarray]) -> Take:
        """A take() to be called with each of the batches of numbers (m,), in their order: images on
        the disk may be read while the caller computes."""
        return self.images.take_ahead(batches) if isinstance(self.images, DiskImages) else self.take

    def first(self, n: int | None) -> Dataset:
        """The first n images, or all for None or if there are fewer."""
        return self if n is None or n >= len(self) else self.select(slice(n))

    def select(self, numbers: np.ndarray | slice) -> Dataset:
        """The images of those numbers (m,), in that order, or at a slice; DiskImages stay on the
        disk."""
        images = self.images
        images = images.select(numbers) if isinstance(images, DiskImages) else images[numbers]
        return Dataset(images, self.labels[numbers], self.class_names, self.name)


def check_labels(labels: np.ndarray, n_classes: int) -> None:
    """Refuse labels that are not integers of shape (n,) from 0 to n_classes - 1.

    Raises TypeError for the dtype or the shape, ValueError for a label out of range.
    """
    if not isinstance(labels, np.ndarray):
        raise TypeError(f"labels must be a NumPy array, got {type(labels).__name__}")
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        hint = "; for one-hot use labels.argmax(1)" if labels.ndim == 2 else ""
        raise TypeError("labels must be integers of shape (N,), "
                        f"got {labels.dtype} {labels.shape}{hint}")
    wrong = (labels < 0) | (labels >= n_classes)
    if wrong.any():
        i = int(wrong.argmax())
        raise ValueError(f"label {labels[i]} at position {i} is out of range for {n_classes} "
                         f"classes (0..{n_classes - 1})")
