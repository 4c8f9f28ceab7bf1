"""What all measurements of a run share."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from gpucnn.backend import Backend
from scripts.gpu.cudnn import Cudnn
from scripts.gpu.measure import Budget, Clock


class Mode(NamedTuple):
    """In what convolutions are stored and multiplied."""

    name: str
    dtype: Any
    tf32: bool          # whether cuDNN may round float32 operands to TF32
    tolerance: float    # |difference| / |expected| of two ways to add the same products


# float32 alone has kernels so far. A mode with tensor cores is one more line here, and what it
# wants of Problem, in convolutions.problem_of.
MODES = {mode.name: mode for mode in (Mode("float32", np.float32, False, 1e-4),)}


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
