"""Run the project's CUDA sources and its CuPy backend on a CPU. README.md says how and how far."""
from __future__ import annotations

import sys

from tests.gpusim.engine import KernelFault, available

__all__ = ["KernelFault", "available", "install"]


def install() -> None:
    """Let `import cupy` give tests.gpusim.fake_cupy from now on, in the place of a real CuPy."""
    from tests.gpusim import fake_cupy

    # cupyx loads itself at the first look at it, which torch takes, and would meet the stand-in.
    for name in [n for n in sys.modules
                 if n.partition(".")[0] in ("cupy", "cupyx", "cupy_backends")]:
        del sys.modules[name]
    sys.modules["cupy"] = fake_cupy
    sys.modules["cupy.cuda"] = fake_cupy.cuda
    sys.modules["cupyx"] = fake_cupy.cupyx
