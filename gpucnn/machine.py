"""What this machine is, for the record."""
from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import gpucnn
from gpucnn.backend import Backend


def device_name(backend: Backend) -> str:
    """The GPU's name, or "cpu"."""
    if backend.name != "cupy":
        return "cpu"
    runtime: Any = backend.xp.cuda.runtime
    return runtime.getDeviceProperties(backend.xp.cuda.Device().id)["name"].decode()


def cpu_name() -> str:
    """The processor's model, which a BLAS chooses its kernels by."""
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return named[1] if named else platform.processor() or platform.machine()


def blas_name() -> str:
    """The library that NumPy's matrix products are computed by, and the instructions it chose."""
    from threadpoolctl import threadpool_info
    found = [f"{library['internal_api']} {library['version']} {library.get('architecture', '')}"
             for library in threadpool_info() if library["user_api"] == "blas"]
    return ", ".join(sorted(set(found))) or "unknown"


def git_commit() -> str | None:
    """Of the clone that gpucnn runs from, "-dirty" where files were changed; None elsewhere."""
    if not (Path(gpucnn.__file__).parents[1] / ".git").exists():
        return None  # git would look further up: a virtual environment may lie in another clone
    try:
        answer = subprocess.run(["git", "describe", "--always", "--dirty"],
                                cwd=Path(gpucnn.__file__).parent, capture_output=True, text=True,
                                check=True, env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"})
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None
