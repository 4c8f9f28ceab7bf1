"""One way to all data sets: by a name or by a path."""
from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gpucnn.data import fashion_mnist
from gpucnn.data.cifar import load_cifar10, load_cifar100
from gpucnn.data.dataset import Dataset
from gpucnn.data.folder import ImageFolder, list_folder
from gpucnn.data.mnist import EMNIST, load_emnist
from gpucnn.data.mnist import load as load_mnist
from gpucnn.data.npz import load_npz
from gpucnn.data.packed import is_packed, open_packed
from gpucnn.errors import DataError
from gpucnn.files import PathLike, one_line

Load = Callable[..., Sequence[Dataset | ImageFolder]]
NAMED: dict[str, Load] = {
    "fashion-mnist-subset": partial(fashion_mnist.load, subset=True),
    "fashion-mnist": fashion_mnist.load,
    "mnist": load_mnist,
    **{f"emnist-{split}": partial(load_emnist, split) for split in EMNIST},
    "cifar10": load_cifar10,
    "cifar100": load_cifar100,
}
SHORT = {"subset": "fashion-mnist-subset", "full": "fashion-mnist"}
_FOLDER_OPTIONS = {"image_size", "channels", "test_share", "workers", "max_pixels",
                   "decode_ahead"}
_NPZ_OPTIONS = {"test_share", "max_unpacked"}


def open_dataset(spec: PathLike, *, data_dir: PathLike | None = None,
                 image_size: tuple[int, int] | None = None, channels: int | None = None,
                 test_share: float | None = None, workers: int | None = None,
                 max_pixels: int | None = None, max_unpacked: int | None = None,
                 decode_ahead: bool = False) -> tuple[Dataset, Dataset]:
    """The training and the test set that spec names.

    spec: one of the names in NAMED or SHORT; or else the path of
        an .npz file (gpucnn.data.npz.load_npz), for which test_share and max_unpacked are; or
        a folder of images, one folder a class (gpucnn.data.folder.list_folder), for which
        image_size, channels, test_share, workers, max_pixels and decode_ahead are; or
        a folder that scripts/pack.py has made (gpucnn.data.packed), whose images stay on the disk.
        A folder that is called like a data set is ./mnist or an absolute path.
    data_dir: the folder that holds a named data set; the environment variable GPUCNN_DATA_DIR
        names one of which each has its sub-folder. The subset ships with gpucnn.

    Raises ValueError for an option that does not go with spec, DataError for what is missing,
    damaged or empty, OSError.
    """
    parts = list_parts(spec, data_dir=data_dir, image_size=image_size, channels=channels,
                       test_share=test_share, workers=workers, max_pixels=max_pixels,
                       max_unpacked=max_unpacked, decode_ahead=decode_ahead or None)
    train, test = (part.load() if isinstance(part, ImageFolder) else part for part in parts)
    return train, test


def list_parts(spec: PathLike, **options: Any) -> Sequence[Dataset | ImageFolder]:
    """What open_dataset gives, which takes the options, but for images that are to be decoded."""
    given = {name: value for name, value in options.items() if value is not None}
    load, kind, accepted = _find(spec)
    if wrong := sorted(given.keys() - accepted):
        raise ValueError(f"--{wrong[0].replace('_', '-')} ({wrong[0]}) does not go with {kind}; "
                         "leave it out")
    parts = load(**given)
    for part in parts:
        if not len(part.labels):
            raise DataError(f"{one_line(spec)}: {part.name} has 0 images")
    return parts


def _find(spec: PathLike) -> tuple[Load, str, set[str]]:
    """What loads it, what it is, and the options that go with it."""
    text = os.fspath(spec)
    name = SHORT.get(text, text)
    if name in NAMED:
        return NAMED[name], name, set() if name.endswith("subset") else {"data_dir"}
    path = Path(text)
    if is_packed(path):
        return partial(open_packed, path), "a packed data set", set()
    if path.is_dir():
        return partial(list_folder, path), "a folder of images", _FOLDER_OPTIONS
    if path.suffix == ".npz":
        return partial(load_npz, path), "an .npz file", _NPZ_OPTIONS
    what = "neither a folder nor an .npz file" if path.exists() else "no such file or data set"
    raise DataError(f"{one_line(text)}: {what}; give a folder of images, an .npz file, or one of "
                    f"{', '.join(NAMED)}")
