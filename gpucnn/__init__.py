"""gpucnn: convolutional networks on CuPy with our own CUDA kernels, or on NumPy."""
from gpucnn import data, layers, losses, models, ops, optim, training
from gpucnn._version import __version__
from gpucnn.backend import get_backend, use_backend
from gpucnn.errors import (
    BackendError,
    CheckpointError,
    DataError,
    GpucnnError,
    KernelError,
    ModelFormatError,
    TrainingError,
)
from gpucnn.training import fit

__all__ = [
    "BackendError",
    "CheckpointError",
    "DataError",
    "GpucnnError",
    "KernelError",
    "ModelFormatError",
    "TrainingError",
    "__version__",
    "data",
    "fit",
    "get_backend",
    "layers",
    "losses",
    "models",
    "ops",
    "optim",
    "training",
    "use_backend",
]
