"""Data sets and single image files as NumPy arrays on the host, and batches on a backend."""
from gpucnn.augmentation import Augmentation
from gpucnn.data import fashion_mnist
from gpucnn.data.arrays import ArrayLoader
from gpucnn.data.dataset import Dataset, check_labels
from gpucnn.data.idx import read_idx
from gpucnn.data.images import find_images, read_image
from gpucnn.data.loader import Loader, to_float
from gpucnn.data.shards import Shards
from gpucnn.data.sources import open_dataset

__all__ = ["ArrayLoader", "Augmentation", "Dataset", "Loader", "Shards", "check_labels",
           "fashion_mnist", "find_images", "open_dataset", "read_idx", "read_image", "to_float"]
