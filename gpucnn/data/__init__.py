"""Data sets, batches of them, and single image files, all as NumPy arrays on the host.

A model moves each batch to its own backend with `backend.asarray`; nothing here knows a backend.
"""
from gpucnn.data import fashion_mnist
from gpucnn.data.dataset import Dataset, check_labels
from gpucnn.data.idx import read_idx
from gpucnn.data.images import read_image
from gpucnn.data.loader import Loader, to_float

__all__ = ["Dataset", "Loader", "check_labels", "fashion_mnist", "read_idx", "read_image",
           "to_float"]
