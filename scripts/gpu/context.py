"""What all measurements of a run share."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from gpucnn.backend import Backend
from scripts.gpu.cudnn import Cudnn
from scripts.gpu.measure import Budget, Clock

try:
    import ml_dtypes  # noqa: F401  makes "bfloat16" the name of a dtype
    HAS_BFLOAT16 = True
except ImportError:
    HAS_BFLOAT16 = False


class Mode(NamedTuple):
    """In what convolutions are stored and multiplied.

    precision: of a model that computes so, as Layer.build takes it.
    tensor: whether on tensor cores, where the GPU has them and channels fill 16 bytes.
    tolerance: |result - expected| / |expected| that rounding explains, against exact products.
    """

    name: str
    precision: str
    dtype: Any
    tensor: bool
    tolerance: float

    @property
    def tf32(self) -> bool:
        return self.tensor and self.dtype == np.float32


# Most important first. Sums are float32 everywhere, of random numbers of both signs, whose errors
# add up like the products themselves. So relative to the result, an error is that of one product,
# or of one result: TF32 rounds each of two factors by up to 2^-11 of it; float16 and bfloat16 are
# exact products, rounded once by up to 2^-11 and 2^-8 when they are stored; float32 loses 2^-24 at
# each addition, in a random walk of some 10^5 of them: 2e-5.
MODES = {mode.name: mode for mode in (
    Mode("float16", "mixed_float16", np.dtype(np.float16), True, 2**-10),
    Mode("tf32", "tf32", np.dtype(np.float32), True, 2**-10),
    Mode("float32", "float32", np.dtype(np.float32), False, 1e-4),
    *([Mode("bfloat16", "mixed_bfloat16", np.dtype("bfloat16"), True, 2**-7)]
      if HAS_BFLOAT16 else []))}


@dataclass
class Context:
    """limits: bytes per second of a copy, and for each mode the FLOP per second of a product."""

    backend: Backend
    clock: Clock
    budget: Budget
    peer: Cudnn | None
    nets: Sequence[str]
    modes: Sequence[Mode]
    batch: int | None       # None for each net's own
    quick: bool
    images: int | None      # to train on; None for all
    limits: dict[str, float] = field(default_factory=dict)

    @property
    def processors(self) -> int:
        cuda = self.clock.cuda
        return cuda.runtime.getDeviceProperties(cuda.Device().id)["multiProcessorCount"]

    def share_of_copy(self, bytes_per_second: float) -> float | None:
        return self._share("copy", bytes_per_second)

    def share_of_matrix_peak(self, mode: Mode, flops_per_second: float) -> float | None:
        return self._share(f"matrix {mode.name}", flops_per_second)

    def _share(self, limit: str, rate: float) -> float | None:
        """None where there was no time to measure the limit."""
        return rate / self.limits[limit] if limit in self.limits else None

    def free(self) -> None:
        """Give back what allocators keep, so that the next one can have it."""
        self.backend.xp.get_default_memory_pool().free_all_blocks()
        if self.peer:
            self.peer.free()
