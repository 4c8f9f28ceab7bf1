"""Packed data sets: folders of .npy files and an index, for data larger than memory.

    index.json        format and version, image_shape, class_names, and of each part its files with
                      their numbers of images and their SHA-256
    train-00000.npy   uint8 (m, h, w, c), as many as SHARD_BYTES hold; and test-00000.npy
    train-labels.npy  int64 (n,)
"""
from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpucnn.data.dataset import Dataset
from gpucnn.data.folder import ImageFolder
from gpucnn.data.shards import Shards
from gpucnn.errors import DataError
from gpucnn.files import PathLike, one_line, open_file, write_atomically

INDEX, FORMAT, VERSION = "index.json", "gpucnn-packed", 1
PARTS = ("train", "test")
SHARD_BYTES = 1 << 26
_READ = 1 << 20
Part = Dataset | ImageFolder


def is_packed(folder: PathLike) -> bool:
    """Whether a folder has an index."""
    return (Path(folder) / INDEX).is_file()


def pack(parts: Sequence[Part], out: PathLike, *, shard_bytes: int = SHARD_BYTES,
         progress: Callable[[int], Any] = lambda images: None) -> None:
    """Write a training and a test part into a new folder.

    One shard is in memory at a time, and the images that are being decoded. The folder is called
    OUT.unfinished until it is whole. progress is called with the number of images of each chunk.

    Raises FileExistsError where one of the two folders is there and not empty, DataError for parts
    of several shapes, and what decoding raises; nothing is left behind then.
    """
    out = Path(out)
    unfinished = out.with_name(f"{out.name}.unfinished")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{one_line(out)} is there already; choose another folder")
    if unfinished.exists():
        raise FileExistsError(f"{one_line(unfinished)} is being written, or was left by a run that "
                              "was killed; delete it then")
    shapes = [_shape(part) for part in parts]
    if shapes[0] != shapes[1]:
        raise DataError(f"the training images are {shapes[0]}, the test images {shapes[1]}; they "
                        "must be equal")
    unfinished.mkdir(parents=True)
    try:
        index = {"format": FORMAT, "version": VERSION, "image_shape": shapes[0],
                 "class_names": parts[0].class_names,
                 "parts": {name: _write_part(unfinished, name, part, shard_bytes, progress)
                           for name, part in zip(PARTS, parts)}}
        write_atomically(unfinished / INDEX, json.dumps(index, indent=1).encode())
        os.replace(unfinished, out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _shape(part: Part) -> tuple[int, ...]:
    return part.shape if isinstance(part, ImageFolder) else part.images.shape[1:]


def _write_part(folder: Path, name: str, part: Part, shard_bytes: int,
                progress: Callable[[int], Any]) -> dict[str, Any]:
    """What the index says of it."""
    per_shard = max(1, shard_bytes // int(np.prod(_shape(part))))
    shards: list[dict[str, Any]] = []
    for images in _in_shards(_chunks(part), per_shard, progress):
        file = f"{name}-{len(shards):05}.npy"
        shards.append({"file": file, "images": len(images), "sha256": _save(folder / file, images)})
    labels = f"{name}-labels.npy"
    return {"labels": {"file": labels, "images": len(part.labels),
                       "sha256": _save(folder / labels, part.labels.astype(np.int64))},
            "shards": shards}


def _chunks(part: Part) -> Iterator[np.ndarray]:
    if isinstance(part, ImageFolder):
        return part.decode()
    return (part.images[i:i + 1024] for i in range(0, len(part), 1024))


def _in_shards(chunks: Iterator[np.ndarray], per_shard: int, progress: Callable[[int], Any]
               ) -> Iterator[np.ndarray]:
    """The images of all chunks, per_shard at a time but for the last."""
    waiting: list[np.ndarray] = []
    count = 0
    for chunk in chunks:
        progress(len(chunk))
        while len(chunk):
            waiting.append(chunk[:per_shard - count])
            chunk = chunk[len(waiting[-1]):]
            count += len(waiting[-1])
            if count == per_shard:
                yield np.concatenate(waiting)
                waiting, count = [], 0
    if waiting:
        yield np.concatenate(waiting)


def _save(path: Path, array: np.ndarray) -> str:
    """Write an .npy file; its SHA-256."""
    with open(path, "wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    return _sha256(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open_file(path) as file:
        while chunk := file.read(_READ):
            digest.update(chunk)
    return digest.hexdigest()


def open_packed(folder: PathLike) -> tuple[Dataset, Dataset]:
    """The training and the test set of a packed folder; their images stay on the disk (Shards).

    What the index says of sizes and types is checked, checksums are not: verify() does that.

    Raises DataError where a file is missing or is not what the index says.
    """
    folder = Path(folder)
    index = _index(folder)
    try:
        names, shape = tuple(index["class_names"]), tuple(index["image_shape"])
        train, test = (_open_part(folder, name, index["parts"][name], shape, names)
                       for name in PARTS)
    except (KeyError, TypeError) as e:
        raise _damaged(folder / INDEX, e) from e
    return train, test


def verify(folder: PathLike) -> None:
    """Read all files of a packed folder. Raises DataError for the first that was changed."""
    folder = Path(folder)
    open_packed(folder)
    for part in _index(folder)["parts"].values():
        for entry in (*part["shards"], part["labels"]):
            path = folder / entry["file"]
            if _sha256(path) != entry.get("sha256"):
                raise DataError(f"{one_line(path)}: damaged (its SHA-256 is not that of the "
                                "index); pack the data again")


def _index(folder: Path) -> Any:
    path = folder / INDEX
    with open_file(path) as file:
        try:
            index = json.loads(file.read())
            if index["format"] != FORMAT:
                raise ValueError(f"format {index['format']!r}")
            newer = index["version"] > VERSION
        except (ValueError, KeyError, TypeError) as e:  # UnicodeDecodeError is a ValueError
            raise _damaged(path, e) from e
    if newer:
        raise DataError(f"{one_line(path)}: written in version {index['version']} of the format; "
                        f"this gpucnn reads {VERSION}: pip install -U gpucnn")
    return index


def _damaged(path: Path, e: Exception) -> DataError:
    return DataError(f"{one_line(path)}: damaged or not the index of a packed data set "
                     f"({type(e).__name__}: {one_line(e)}); pack the data again")


def _open_part(folder: Path, name: str, part: Any, shape: tuple[int, ...],
               class_names: tuple[str, ...]) -> Dataset:
    shards = [_map(folder, entry, shape, np.uint8) for entry in part["shards"]]
    labels = np.array(_map(folder, part["labels"], (), np.int64))
    images = Shards(shards) if shards else np.empty((0, *shape), np.uint8)
    try:
        return Dataset(images, labels, class_names, f"{one_line(folder.resolve().name)}-{name}")
    except (TypeError, ValueError) as e:
        raise DataError(f"{one_line(folder)}: {name}: {e}; pack the data again") from e


def _map(folder: Path, entry: Any, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """The array of an .npy file, memory-mapped. Raises DataError where the index says otherwise."""
    path, want = folder / entry["file"], (entry["images"], *shape)
    if path.name != entry["file"]:
        raise TypeError(f"{entry['file']!r} is no file of this folder")
    open_file(path).close()
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as e:
        raise DataError(f"{one_line(path)}: damaged ({one_line(e)}); pack the data again") from e
    if not isinstance(array, np.ndarray) or array.shape != want or array.dtype != dtype:
        got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "no array"
        raise DataError(f"{one_line(path)}: holds {got}, the index says {np.dtype(dtype)} {want}; "
                        "pack the data again")
    return array
