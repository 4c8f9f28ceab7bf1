"""Data sets in NumPy's .npz files, which are never unpickled."""
from __future__ import annotations

import math
import os
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np

from gpucnn.data.dataset import Dataset
from gpucnn.data.splitting import checked_share, held_out
from gpucnn.errors import DataError
from gpucnn.files import PathLike, one_line, open_file

# The names of training images, training labels, test images and test labels: Keras', MedMNIST's.
# And those of images that are yet to be split.
LAYOUTS: tuple[tuple[str, ...], ...] = (
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("images", "labels"))
_LEAST_LIMIT, _USUAL_RATIO = 100 * 10**6, 100
_CHUNK = 1 << 20


def load_npz(path: PathLike, *, test_share: float | None = None, max_unpacked: int | None = None
             ) -> tuple[Dataset, Dataset]:
    """The training and the test set of a file with x_train, y_train, x_test and y_test (or
    train_images, train_labels, test_images and test_labels), or with images and labels alone.

    Images are uint8 (n, h, w) or (n, h, w, c), labels integers (n,) or (n, 1) from 0;
    class_names, if it is there, a string for each class.

    test_share: of images without a test part, how many of each class are held out (default: 0.2),
        always the same ones.
    max_unpacked: how many bytes the arrays may come to; by default 100 times the size of the file,
        and at least 100 MB.

    Raises FileNotFoundError; DataError for what is damaged, is no .npz file, unpacks to more, or
    holds anything else; ValueError for a test_share that is none or not needed.
    """
    name, stem, share = one_line(path), Path(path).stem, checked_share(test_share)
    arrays = _read(path, name, max_unpacked)
    names = arrays.pop("class_names", None)
    keys = list(arrays)
    if len(keys) == 4 and test_share is not None:
        raise ValueError(f"{name} has a test part, {keys[2]}; leave out --test-share (test_share)")
    try:
        images = [_images(key, arrays[key]) for key in keys[::2]]
        labels = [_labels(key, arrays[key]) for key in keys[1::2]]
        if images[0].shape[1:] != images[-1].shape[1:]:
            raise ValueError(f"{keys[0]} holds images of {images[0].shape[1:]}, {keys[2]} of "
                             f"{images[1].shape[1:]}; they must be equal")
        class_names = _class_names(names, max(int(y.max(initial=-1)) for y in labels) + 1)
        whole = [Dataset(x, y, class_names, stem) for x, y in zip(images, labels)]
        if len(whole) == 1:
            # NumPy promises that a bit generator's raw stream never changes (NEP 19).
            test = held_out(labels[0], np.random.Philox(key=0).random_raw(len(labels[0])), share)
            whole = [Dataset(images[0][part], labels[0][part], class_names, stem)
                     for part in (~test, test)]
    except (DataError, TypeError, ValueError) as e:
        raise DataError(f"{name}: {e}") from e
    train, test_set = (replace(part, name=f"{stem}-{word}")
                       for part, word in zip(whole, ("train", "test")))
    return train, test_set


def _images(key: str, images: np.ndarray) -> np.ndarray:
    """(n, h, w, c). Raises DataError for what is not uint8 of 3 or 4 dimensions."""
    if images.dtype != np.uint8:
        hint = ""
        if images.dtype.kind == "f":
            hint = "; if they are 0 to 1, save (255 * x).round().astype('uint8')"
        raise DataError(f"{key} holds {images.dtype}; images must be uint8 (0..255){hint}")
    if images.ndim not in (3, 4):
        raise DataError(f"{key} has shape {images.shape}; images must be (n, h, w) or "
                        "(n, h, w, channels)")
    return images[..., None] if images.ndim == 3 else images


def _labels(key: str, labels: np.ndarray) -> np.ndarray:
    """(n,) int64. Raises DataError for what are no integers."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(f"{key} holds {labels.dtype} {labels.shape}; labels must be integers (n,)")
    return labels.astype(np.int64)


def _class_names(names: np.ndarray | None, used: int) -> tuple[str, ...]:
    if names is None:
        return tuple(str(i) for i in range(used))
    if names.ndim != 1 or names.dtype.kind != "U":
        raise DataError(f"class_names holds {names.dtype} {names.shape}; it must be strings, one "
                        "for each class")
    return tuple(names.tolist())


def _read(path: PathLike, name: str, max_unpacked: int | None) -> dict[str, np.ndarray]:
    """The arrays of the layout that is there, in its order, and class_names."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        left = max(_LEAST_LIMIT, _USUAL_RATIO * size) if max_unpacked is None else max_unpacked
        arrays: dict[str, np.ndarray] = {}
        try:
            with zipfile.ZipFile(file) as archive:
                for key in _wanted(archive.namelist(), name):
                    arrays[key] = _read_member(archive, f"{key}.npy", name, left, size)
                    left -= arrays[key].nbytes
        except DataError:
            raise
        # zipfile, zlib and NumPy raise almost anything on damaged bytes: BadZipFile, EOFError,
        # zlib.error, ValueError, NotImplementedError, struct.error, ...
        except Exception as e:
            raise DataError(f"{name}: damaged or not an npz file "
                            f"({one_line(e) or type(e).__name__}); fetch it again") from e
        return arrays


def _wanted(members: list[str], name: str) -> list[str]:
    """The names of the arrays to read. Raises DataError where no layout is there whole."""
    there = [member.removesuffix(".npy") for member in members if member.endswith(".npy")]
    for keys in LAYOUTS:
        if set(keys) <= set(there):
            return [*keys, *{"class_names"} & set(there)]
    *others, last = (", ".join(keys) for keys in LAYOUTS)
    raise DataError(f"{name}: holds {one_line(', '.join(there)) or 'no arrays'}; expected "
                    f"{'; or '.join(others)}; or {last}")


def _read_member(archive: zipfile.ZipFile, member: str, name: str, most: int, size: int
                 ) -> np.ndarray:
    """One array. Memory grows with the bytes that are there, and to no more than `most`."""
    with archive.open(member) as stream:
        shape, fortran, dtype = _header(stream)
        if dtype.hasobject:
            raise DataError(f"{name}: {member} holds Python objects, which gpucnn never loads")
        count = math.prod(shape) * dtype.itemsize
        if count > most:
            raise DataError(f"{name}: member {member} unpacks to {count / 1e6:.0f} MB from "
                            f"{size / 1e6:.2g} MB, and {max(most, 0) / 1e6:.0f} MB are left of "
                            "the limit; raise --max-unpacked to allow it")
        data = bytearray()
        while len(data) < count and (chunk := stream.read(min(_CHUNK, count - len(data)))):
            data += chunk
        if len(data) < count or stream.read(1):  # at the end the checksum is compared
            raise ValueError(f"{member} does not hold the {count} bytes of its header's {shape}")
    array = np.frombuffer(data, dtype)
    return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(stream)
    raise ValueError(f"version {version} of the npy format")
