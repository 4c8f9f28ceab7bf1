"""The scripts in processes that are forked from one which has imported everything: they begin at
once, and can be killed.

train.py knows one more model in them, "tiny", for the simulator.
"""
from __future__ import annotations

import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.conftest import REAL_GPU

SCRIPTS = ("train", "evaluate", "predict", "report", "pack")
# What CUDA has been used in cannot be forked.
CONTEXT: Any = multiprocessing.get_context("spawn" if REAL_GPU else "forkserver")
if not REAL_GPU:
    # tests.conftest puts the simulator in CuPy's place.
    CONTEXT.set_forkserver_preload([
        "tests.conftest", *(f"scripts.{name}" for name in SCRIPTS), "matplotlib.figure",
        "matplotlib.backends.backend_agg", "tqdm",
        "tensorboard.summary.writer.event_file_writer"])


def start(arguments, output: Path, backend: str, script: str = "train", *,
          errors: Path | None = None, cwd: Path | None = None) -> Any:
    """The process. output, errors: the files that its output is appended to; errors go into the
    first one where there is no second."""
    process = CONTEXT.Process(target=_main, args=(
        script, list(map(str, arguments)), output, errors or output, cwd, backend))
    process.start()
    return process


def run(script: str, arguments, cwd: Path) -> subprocess.CompletedProcess:
    """Wait for the end of a script, on NumPy."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder) / "output", Path(folder) / "errors"
        process = start(arguments, output, "numpy", script, errors=errors, cwd=cwd)
        process.join()
        return subprocess.CompletedProcess([script, *arguments], process.exitcode,
                                           output.read_text(), errors.read_text())


def _main(script: str, arguments: list[str], output: Path, errors: Path, cwd: Path | None,
          backend: str) -> None:
    from gpucnn import cli, layers
    from gpucnn.models import MODELS
    MODELS["tiny"] = lambda classes: layers.Sequential([
        layers.Conv2D(4, 3, stride=4), layers.BatchNorm(), layers.ReLU(), layers.Dropout(0.2),
        layers.Flatten(), layers.Dense(classes)])
    for number, path in ((1, output), (2, errors)):
        with open(path, "ab") as file:
            os.dup2(file.fileno(), number)
    if cwd is not None:
        os.chdir(cwd)
    os.environ |= {"GPUCNN_BACKEND": backend, "GPUSIM_CHECKS": "off"}
    sys.argv[1:] = arguments
    module = importlib.import_module(f"scripts.{script}")
    cli.run(module.main, module.parser())
