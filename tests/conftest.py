"""The backends that the one body of tests runs on.

"cupy" is the real CuPy where there is a GPU. Elsewhere it is CuPy's place taken by tests.gpusim,
which runs the project's own CUDA sources on the CPU, built by the host's C++ compiler. The first
lines of pytest's output say which.
"""
from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from gpucnn.backend import cupy_obstacle, make_backend, use_backend
from tests import gpusim

# Shells start background jobs with SIGINT ignored, and so would the processes be that tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_NO_GPU = cupy_obstacle()
SIMULATOR_WORKS, _WHY_NOT = gpusim.available()
SIMULATED = bool(_NO_GPU) and SIMULATOR_WORKS
if SIMULATED:
    gpusim.install()
    make_backend.cache_clear()
REAL_GPU = not _NO_GPU
CUPY_RUNS = REAL_GPU or SIMULATED


def pytest_report_header() -> str:
    if not _NO_GPU:
        return "gpucnn: the cupy backend runs on this machine's GPU"
    if SIMULATED:
        return ("gpucnn: the cupy backend's kernels run on the CPU through tests/gpusim, "
                f"because {_NO_GPU}")
    return f"gpucnn: the cupy backend is not tested: {_NO_GPU}; and {_WHY_NOT}"


needs_simulator = pytest.mark.skipif(not SIMULATED, reason=_WHY_NOT or "there is a GPU to spare")
needs_compiler = pytest.mark.skipif(not SIMULATOR_WORKS, reason=_WHY_NOT)
needs_cupy = pytest.mark.skipif(not CUPY_RUNS, reason=f"{_NO_GPU}; {_WHY_NOT}")
BACKENDS = ["numpy", pytest.param("cupy", marks=needs_cupy)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and _NO_GPU:
            item.add_marker(pytest.mark.skip(reason=_NO_GPU))


@pytest.fixture(autouse=True)
def _no_gpu_unless_asked(monkeypatch):
    """A test that names no backend runs on NumPy, also where there is a GPU."""
    monkeypatch.setenv("GPUCNN_BACKEND", "numpy")


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use_backend(request.param) as chosen:
        yield chosen


_ON_A_GPU = """
from tests import gpusim
gpusim.install()
import cupy
import scripts.contestants as contestants
cupy.cuda.MemoryPool.total_bytes = lambda pool: 1 << 20
contestants.GPU_GEMM, contestants.GPU_COPIED = 32, 1 << 12
"""


@pytest.fixture
def gpu(tmp_path):
    """The environment of processes that find the simulator in CuPy's place, and their children.

    The peers find no GPU in it, whether or not there is one.
    """
    works, why_not = gpusim.available()
    if not works:
        pytest.skip(why_not)
    (tmp_path / "sitecustomize.py").write_text(_ON_A_GPU)
    root = Path(__file__).resolve().parents[1]
    return {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}", "GPUCNN_BACKEND": "cupy",
            "GPUSIM_CHECKS": "off", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def cupy_backend():
    if not CUPY_RUNS:
        pytest.skip(f"{_NO_GPU}; {_WHY_NOT}")
    with use_backend("cupy") as chosen:
        yield chosen


@pytest.fixture(params=gpusim.engine.ORDERS)
def order(request, monkeypatch):
    """In which the simulator lets the threads of a block run."""
    from tests.gpusim import fake_cupy
    monkeypatch.setitem(fake_cupy.options, "order", request.param)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
