"""What the tests of inline PTX share. Kernels are launched on the simulator; where there is a GPU,
on that too: it has the last word on each layout.
"""
from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from tests import conftest
from tests.gpusim import fake_cupy, nvrtc

DEVICES = {"simulator": fake_cupy}
if not conftest._NO_GPU:
    import cupy

    DEVICES["gpu"] = cupy
on_each_device = pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)

U16, I32, U32, F32 = np.uint16, np.int32, np.uint32, np.float32
WRONG = "Mismatched elements|nan location mismatch"  # how NumPy says it


class Result(NamedTuple):
    """Stands among the arguments for the array that the kernel fills."""

    shape: tuple[int, ...]
    dtype: type


def launch(source, name, grid, block, *args, shared_mem=0, device=fake_cupy, options=()):
    """What the kernel writes to its Result."""
    there = [device.asarray(a) if isinstance(a, np.ndarray) else
             device.empty(*a) if isinstance(a, Result) else a for a in args]
    kernel = device.RawModule(code=source, options=("-std=c++17", *options)).get_function(name)
    kernel.max_dynamic_shared_size_bytes = shared_mem
    kernel((grid,), (block,), tuple(there), shared_mem=shared_mem)
    return next(there[i] for i, a in enumerate(args) if isinstance(a, Result)).get()


def random(*shape, seed=0):
    """Multiples of 1/4 in [-4, 4): exact in every format, and so are short sums of products."""
    return np.random.default_rng(seed).integers(-16, 16, shape).astype(F32) / 4


def words(values, kind):
    """Values, last axis along a register's halves, as registers."""
    if kind == "tf32":
        return values.astype(F32).view(U32)
    if kind == "f16":
        return np.ascontiguousarray(values.astype(np.float16)).view(U32)
    bfloat = (np.ascontiguousarray(values, F32).view(U32) >> 16).astype(U16)
    return np.ascontiguousarray(bfloat).view(U32)


def assert_nvrtc_accepts(source, architecture):
    """Without a warning; skips the test where there is no NVRTC."""
    require_nvrtc()
    log = nvrtc.compile(source, "kernel.cu", architecture).log
    assert "warning" not in log, log


def require_nvrtc():
    library, reason = nvrtc.find()
    if library is None:
        pytest.skip(reason)
