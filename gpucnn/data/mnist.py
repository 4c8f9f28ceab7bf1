"""MNIST and EMNIST: grey images of 28 x 28 pixels, handwritten digits and letters.

Sources: Y. LeCun, C. Cortes, C. Burges, http://yann.lecun.com/exdb/mnist/; G. Cohen, S. Afshar,
J. Tapson, A. van Schaik, "EMNIST: an extension of MNIST to handwritten letters", 2017,
https://www.nist.gov/itl/products-and-services/emnist-dataset.
"""
from __future__ import annotations

import string

from gpucnn.data import official
from gpucnn.data.dataset import Dataset
from gpucnn.data.idx import read_part
from gpucnn.errors import DataError
from gpucnn.files import PathLike

BASE_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
SHA256 = {
    "train-images-idx3-ubyte.gz":
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz":
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz":
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz":
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
_DIGITS, _CAPITALS = string.digits, string.ascii_uppercase
_MERGED = _DIGITS + _CAPITALS + "abdefghnqrt"  # small letters unlike their capitals
# The names of the classes of each of EMNIST's sets, one character each, in order of their labels.
EMNIST = {
    "balanced": _MERGED,
    "byclass": _DIGITS + _CAPITALS + string.ascii_lowercase,
    "bymerge": _MERGED,
    "digits": _DIGITS,
    "letters": _CAPITALS,  # small and capital ones together
    "mnist": _DIGITS,
}


def load(data_dir: PathLike | None = None) -> tuple[Dataset, Dataset]:
    """MNIST's 60,000 training and 10,000 test images.

    From data_dir or its sub-folder mnist, else the sub-folder mnist of the folder that the
    environment variable GPUCNN_DATA_DIR names, else the user's cache or a download into it.

    Raises DataError where the files are missing, damaged, or cannot be downloaded.
    """
    asked = official.asked_folder(data_dir, ("mnist", "MNIST/raw"))
    if asked is None:
        folder = official.download("mnist", "MNIST", BASE_URL, SHA256)
    else:
        folder = asked[0]
        official.require_files(*asked, SHA256)
    return (read_part(folder, "train", tuple(_DIGITS), "mnist-train"),
            read_part(folder, "t10k", tuple(_DIGITS), "mnist-test"))


def load_emnist(split: str, data_dir: PathLike | None = None) -> tuple[Dataset, Dataset]:
    """One of EMNIST's sets, a key of EMNIST, upright (the files hold images transposed).

    From data_dir or its sub-folder emnist, or the sub-folder emnist of GPUCNN_DATA_DIR: the files
    of the official gzip.zip, gzipped or not. It is not downloaded: half a gigabyte, in one archive.

    Raises ValueError for another split, DataError where the files are missing or damaged.
    """
    if split not in EMNIST:
        raise ValueError(f"load_emnist: split must be one of {', '.join(EMNIST)}; got {split!r}")
    asked = official.asked_folder(data_dir, ("emnist", "EMNIST/raw", "gzip"))
    where = "https://www.nist.gov/itl/products-and-services/emnist-dataset"
    if asked is None:
        raise DataError(f"EMNIST is not downloaded; unpack gzip.zip from {where} and give the "
                        f"folder with --data-dir or {official.VARIABLE}/emnist")
    folder, source = asked
    prefixes = [f"emnist-{split}-{part}" for part in ("train", "test")]
    official.require_files(folder, source, [
        f"{prefix}-{kind}-ubyte.gz" for prefix in prefixes for kind in ("images-idx3",
                                                                        "labels-idx1")],
        f"; {where} has them in gzip.zip")
    train, test = (read_part(folder, prefix, tuple(EMNIST[split]), prefix, transposed=True,
                             first_label=int(split == "letters")) for prefix in prefixes)
    return train, test
