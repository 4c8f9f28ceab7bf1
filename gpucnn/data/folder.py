"""Folders of images, one folder a class."""
from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpucnn.data.dataset import Dataset
from gpucnn.data.decoding import Decoder, decoded
from gpucnn.data.image_files import ImageFiles
from gpucnn.data.images import image_extensions, is_grey
from gpucnn.data.splitting import checked_share, held_out
from gpucnn.errors import DataError
from gpucnn.files import PathLike, one_line

IMAGE_SIZE = (64, 64)
TEST_PARTS = ("test", "val", "valid", "validation")  # the first that is there
Files = tuple[list[Path], np.ndarray]


@dataclass(frozen=True)
class ImageFolder:
    """The files of one part of a data set, and what becomes of them.

    paths: n files. labels: int64 (n,). shape: (h, w, c) that they are decoded to.
    ahead: what decodes them batch by batch, where they are not to be in memory.
    """

    paths: list[Path]
    labels: np.ndarray
    class_names: tuple[str, ...]
    name: str
    shape: tuple[int, int, int]
    workers: int | None = None
    max_pixels: int | None = None
    ahead: Decoder | None = None

    def decode(self) -> Iterator[np.ndarray]:
        """All images in order, some at a time: uint8 (m, h, w, c). Raises as decoded() does."""
        return decoded(self.paths, self.shape[:2], self.shape[2], workers=self.workers,
                       max_pixels=self.max_pixels)

    def load(self) -> Dataset:
        """All of them in memory, or with `ahead` on the disk. Raises DataError where there is not
        enough memory."""
        if self.ahead:
            files = ImageFiles(self.paths, self.ahead)
            return Dataset(files, self.labels, self.class_names, self.name)
        n, nbytes = len(self.paths), len(self.paths) * int(np.prod(self.shape))
        if nbytes > _memory() / 2:
            raise DataError(f"{self.name}: {n} images of {self.shape} come to {nbytes / 1e9:.1f} "
                            "GB, more than half of this machine's memory; pack them with "
                            "scripts/pack.py, leave them on the disk with --decode-ahead, or make "
                            "them smaller with --image-size")
        images = np.empty((n, *self.shape), np.uint8)
        at = 0
        for chunk in self.decode():
            images[at:at + len(chunk)] = chunk
            at += len(chunk)
        return Dataset(images, self.labels, self.class_names, self.name)


def list_folder(folder: PathLike, *, image_size: tuple[int, int] | None = None,
                channels: int | None = None, test_share: float | None = None,
                workers: int | None = None, max_pixels: int | None = None,
                decode_ahead: bool = False) -> tuple[ImageFolder, ImageFolder]:
    """The training and the test part of folder/CLASS/*.jpg, or of folder/train/CLASS/*.jpg and
    folder/test/CLASS/*.jpg (or val, valid, validation).

    Classes are numbered in the order of their folders' names. Images may lie deeper; links to
    folders are followed for a class, but not in it. Hidden files are left out, other files than
    Pillow reads, judged by their extensions, and a second test part: how many of which is said on
    standard error.

    image_size: (h, w) that images are stretched to (default: 64 x 64).
    channels: 1 or 3; None for RGB unless all images are grey.
    test_share: without a test part, how many of each class are held out (default: 0.2): those
        whose paths have the smallest hashes, the same ones on every machine.
    workers, max_pixels: as decoded() and read_image() take them.
    decode_ahead: leave the images on the disk, and decode them while those before are trained on.

    Raises FileNotFoundError, PermissionError; DataError for fewer than two classes, a class without
    images, and a test part with classes of its own; ValueError for other arguments.
    """
    root, share = Path(folder), checked_share(test_share)
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1 (grey), 3 (RGB) or None, got {channels!r}")
    parts, names = _find(root)
    if len(parts) == 1:
        parts = _split(root, *parts[0], share)
    elif test_share is not None:
        raise ValueError(f"{one_line(root)} has a test part; leave out --test-share (test_share)")
    if channels is None:
        files = (path for paths, _ in parts for path in paths)
        channels = 1 if all(is_grey(path, max_pixels=max_pixels) for path in files) else 3
    shape = (*(IMAGE_SIZE if image_size is None else image_size), channels)
    ahead = Decoder(shape[:2], channels, workers=workers, max_pixels=max_pixels) \
        if decode_ahead else None
    train, test = (ImageFolder(paths, labels, names, f"{one_line(root.resolve().name)}-{word}",
                               shape, workers, max_pixels, ahead)
                   for (paths, labels), word in zip(parts, ("train", "test")))
    return train, test


def _find(root: Path) -> tuple[list[Files], tuple[str, ...]]:
    """The files of the one part or of both, and the names of the classes."""
    skipped: Counter[str] = Counter()
    folders = _folders(root, skipped)
    if "train" in folders and set(folders) <= {"train", *TEST_PARTS}:
        tests = [name for name in TEST_PARTS if name in folders]
        if len(tests) > 1:
            skipped.update(f"{name}/" for name in tests[1:])
        parts = [_folders(folders[name], skipped) for name in ("train", *tests[:1])]
    else:
        parts = [folders]
    classes = sorted(parts[0])
    if len(classes) < 2:
        raise DataError(f"{one_line(root)}: {len(classes)} class folder"
                        f"{'' if classes else 's'} with images; expected at least 2: put the "
                        "images of each class in a folder of its own")
    if strange := sorted(set(parts[-1]) - set(classes)):
        raise DataError(f"{one_line(parts[-1][strange[0]])}: a class that train has not; both "
                        "parts must have the same classes")
    found = [_files(part, classes, skipped) for part in parts]
    if skipped:
        kinds = ", ".join(f"{count} {one_line(kind)}" for kind, count in sorted(skipped.items()))
        print(f"gpucnn: {one_line(root)}: left out what is hidden or no image that Pillow reads: "
              f"{kinds}", file=sys.stderr)
    return found, tuple(one_line(name) for name in classes)


def _folders(parent: Path, skipped: Counter[str]) -> dict[str, Path]:
    """The folders in a folder by their names."""
    found = {}
    for path in parent.iterdir():
        if path.name.startswith(".") or not path.is_dir():
            skipped[_kind(path)] += 1
        else:
            found[path.name] = path
    return found


def _files(folders: dict[str, Path], classes: list[str], skipped: Counter[str]) -> Files:
    """The images in the folders, and their labels: the places of the folders among the classes."""
    extensions = image_extensions()
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        if name not in folders:
            continue
        before = len(paths)
        for folder, inner, files in os.walk(folders[name], onerror=_refuse):
            skipped.update(".*" for n in inner if n.startswith("."))
            inner[:] = sorted(n for n in inner if not n.startswith("."))
            for path in (Path(folder, n) for n in sorted(files)):
                if path.name.startswith(".") or path.suffix.lower() not in extensions:
                    skipped[_kind(path)] += 1
                else:
                    paths.append(path)
        labels += [label] * (len(paths) - before)
        if len(paths) == before:
            raise DataError(f"{one_line(folders[name])}: a class folder without images; put some "
                            "into it or delete it")
    return paths, np.array(labels, np.int64)


def _refuse(e: OSError) -> None:
    raise e


def _kind(path: Path) -> str:
    return ".*" if path.name.startswith(".") else path.suffix or "without extension"


def _split(root: Path, paths: list[Path], labels: np.ndarray, share: float) -> list[Files]:
    """What is left for training, and what is held out."""
    keys = [hashlib.sha256(os.fsencode(path.relative_to(root).as_posix())).digest()[:8]
            for path in paths]
    try:
        test = held_out(labels, np.array([int.from_bytes(key, "big") for key in keys], np.uint64),
                        share)
    except DataError as e:
        raise DataError(f"{one_line(root)}: {e}") from e
    return [([paths[i] for i in np.flatnonzero(part)], labels[part]) for part in (~test, test)]


def _memory() -> float:
    """This machine's memory in bytes; infinite where that is not known."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return float("inf")
