"""CIFAR-10 and CIFAR-100: colour photographs of 32 x 32 pixels, 50,000 + 10,000 each.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009,
https://www.cs.toronto.edu/~kriz/cifar.html, whose binary versions are read here.
"""
from __future__ import annotations

from pathlib import Path

import numpy as np

from gpucnn.data import official
from gpucnn.data.dataset import Dataset
from gpucnn.errors import DataError
from gpucnn.files import PathLike, one_line, open_file

SIDE = 32
_PIXELS = 3 * SIDE * SIDE
CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
                 "truck")
_CIFAR100_NAMES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
    camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile
    cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp
    lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
    oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
    possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake
    spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
    train trout tulip turtle wardrobe whale willow_tree wolf woman worm"""
CIFAR100_NAMES = tuple(_CIFAR100_NAMES.split())


def load_cifar10(data_dir: PathLike | None = None) -> tuple[Dataset, Dataset]:
    """The training and the test set, uint8 (n, 32, 32, 3), from data_batch_1.bin to _5.bin and
    test_batch.bin.

    They lie in data_dir, or in its sub-folder cifar10 or cifar-10-batches-bin, or in one of these
    of the folder that the environment variable GPUCNN_DATA_DIR names.

    Raises DataError where they are missing or damaged.
    """
    return _load("cifar10", ("cifar10", "cifar-10-batches-bin"), "cifar-10-binary.tar.gz",
                 [f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch.bin", CIFAR10_NAMES,
                 data_dir)


def load_cifar100(data_dir: PathLike | None = None) -> tuple[Dataset, Dataset]:
    """As load_cifar10, with the 100 fine classes, from train.bin and test.bin in data_dir or its
    sub-folder cifar100 or cifar-100-binary."""
    return _load("cifar100", ("cifar100", "cifar-100-binary"), "cifar-100-binary.tar.gz",
                 ["train.bin"], "test.bin", CIFAR100_NAMES, data_dir)


def _load(name: str, folders: tuple[str, ...], archive: str, train: list[str], test: str,
          class_names: tuple[str, ...], data_dir: PathLike | None) -> tuple[Dataset, Dataset]:
    asked = official.asked_folder(data_dir, folders)
    where = f"https://www.cs.toronto.edu/~kriz/{archive}"
    if asked is None:
        raise DataError(f"{name} is not downloaded; unpack {where} and give the folder with "
                        f"--data-dir or {official.VARIABLE}/{name}")
    folder, source = asked
    official.require_files(folder, source, [*train, test], f"; {where} has them")
    labels = 2 if name == "cifar100" else 1  # in CIFAR-100 the coarse one comes first
    return (_read([folder / file for file in train], labels, class_names, f"{name}-train"),
            _read([folder / test], labels, class_names, f"{name}-test"))


def _read(files: list[Path], labels: int, class_names: tuple[str, ...], name: str) -> Dataset:
    """Records of `labels` bytes, the last of which counts, and the planes of red, green and blue.
    """
    parts = []
    for path in files:
        with open_file(path) as file:
            data = np.frombuffer(file.read(), np.uint8)
        records, rest = divmod(len(data), labels + _PIXELS)
        if rest or not records:
            raise DataError(f"{one_line(path)}: damaged or not CIFAR's binary version: "
                            f"{len(data)} bytes are no whole records of {labels + _PIXELS}; "
                            "fetch it again")
        part = data.reshape(records, labels + _PIXELS)
        largest = part[:, labels - 1].max()
        if largest >= len(class_names):
            raise DataError(f"{one_line(path)}: damaged or not {name.split('-')[0]}: label "
                            f"{largest} of {len(class_names)} classes; fetch it again")
        parts.append(part)
    whole = np.concatenate(parts)
    planes = whole[:, labels:].reshape(-1, 3, SIDE, SIDE)
    return Dataset(np.ascontiguousarray(planes.transpose(0, 2, 3, 1)),
                   whole[:, labels - 1].astype(np.int64), class_names, name)
