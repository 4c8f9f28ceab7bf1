"""Fashion-MNIST: 70,000 grey images of 28 x 28 pixels, ten kinds of clothing.

Source: H. Xiao, K. Rasul, R. Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking
Machine Learning Algorithms", 2017, https://github.com/zalandoresearch/fashion-mnist, MIT licence.
"""
from __future__ import annotations

from pathlib import Path

from gpucnn.data import fashion_mnist_subset, official
from gpucnn.data.dataset import Dataset
from gpucnn.data.idx import read_part
from gpucnn.files import PathLike, one_line

CLASS_NAMES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker",
               "Bag", "Ankle boot")

BASE_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
# Of the official downloads. Debian's copies hold the same data but other gzip headers.
SHA256 = {
    "train-images-idx3-ubyte.gz":
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1-ubyte.gz":
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3-ubyte.gz":
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1-ubyte.gz":
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}
DEBIAN_DIR = Path("/usr/share/datasets/fashion-mnist")  # apt install dataset-fashion-mnist
_SUBSET_DIR = Path(fashion_mnist_subset.__file__).parent


def load(data_dir: PathLike | None = None, *, subset: bool = False) -> tuple[Dataset, Dataset]:
    """The training set and the test set.

    subset: the first 10,000 training and 2,000 test images, which ship inside the package.

    Otherwise all 60,000 and 10,000, from the first of: data_dir; the folder that the environment
    variable GPUCNN_DATA_DIR names; the Debian package dataset-fashion-mnist; the user's cache; a
    download into that cache, verified by its checksum. A folder holds the four official files,
    gzipped or not, or has a sub-folder fashion-mnist that does. A folder that was asked for by name
    is never passed over in silence.

    Raises DataError where the files are missing, damaged, or cannot be downloaded.
    """
    if subset:
        if data_dir is not None:
            raise ValueError("fashion_mnist.load: subset=True reads the packaged images; "
                             f"leave out data_dir, got {one_line(data_dir)}")
        return _load_folder(_SUBSET_DIR, "fashion-mnist-subset")
    return _load_folder(_find_folder(data_dir), "fashion-mnist")


def _find_folder(data_dir: PathLike | None) -> Path:
    asked = official.asked_folder(data_dir, ("fashion-mnist",), shared=True)
    if asked is not None:
        official.require_files(*asked, SHA256)
        return asked[0]
    if all(official.find_file(DEBIAN_DIR, name).exists() for name in SHA256):
        return DEBIAN_DIR
    return official.download("fashion-mnist", "the full Fashion-MNIST", BASE_URL, SHA256)


def _load_folder(folder: Path, name: str) -> tuple[Dataset, Dataset]:
    return (read_part(folder, "train", CLASS_NAMES, f"{name}-train"),
            read_part(folder, "t10k", CLASS_NAMES, f"{name}-test"))
