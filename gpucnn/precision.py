"""Which tensors are stored in which type, and how exact products are: decided here alone.

    precision         activations, their gradients,    parameters and their     products of
                      weights as products read them    gradients, statistics    float32
    float32           float32                          float32                  exact
    tf32              float32                          float32                  may be rounded
    mixed_float16     float16                          float32                  -
    mixed_bfloat16    bfloat16                         float32                  -
    float64           float64                          float64                  -

Sums are kept in float32 or better everywhere. tf32 is a permission: tensor cores round the factors
of a product to 10 bits; GPUs before sm_80 and the CPU do not. Mixed precision (Micikevicius et al.
2018) needs the GPU's kernels; with float16 it also needs a loss scale.
"""
from __future__ import annotations

from typing import NamedTuple

import numpy as np

PRECISIONS = ("float32", "tf32", "mixed_float16", "mixed_bfloat16", "float64")


class Precision(NamedTuple):
    """activations, parameters: dtypes, as in the table above."""

    name: str
    activations: np.dtype
    parameters: np.dtype
    tf32: bool = False

    @property
    def mixed(self) -> bool:
        return self.activations != self.parameters


def make_precision(where: str, name: str, backend: str) -> Precision:
    """The named precision, for a model on the named backend.

    Raises ValueError for an unknown name and for mixed precision on NumPy, ImportError for bfloat16
    without the package ml_dtypes.
    """
    if name not in PRECISIONS:
        raise ValueError(f"{where}: precision {name!r} is not known; use "
                         f"{', '.join(map(repr, PRECISIONS))}")
    single = np.dtype(np.float32)
    if name in ("float32", "tf32"):
        return Precision(name, single, single, name == "tf32")
    if name == "float64":
        return Precision(name, np.dtype(np.float64), np.dtype(np.float64))
    if backend != "cupy":
        raise ValueError(f"{where}: precision {name!r} needs the cupy backend and a GPU; on "
                         f"{backend} use 'float32'")
    if name == "mixed_float16":
        return Precision(name, np.dtype(np.float16), single)
    try:
        import ml_dtypes
    except ImportError as e:
        raise ImportError(f"{where}: precision {name!r} needs the package ml_dtypes; "
                          "pip install ml_dtypes") from e
    return Precision(name, np.dtype(ml_dtypes.bfloat16), single)
