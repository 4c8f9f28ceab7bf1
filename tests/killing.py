"""scripts/train.py in processes that are killed, forked from one that has imported everything.

They know one more model, "tiny", for the simulator.
"""
from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

from tests.conftest import REAL_GPU

# What CUDA has been used in cannot be forked.
CONTEXT: Any = multiprocessing.get_context("spawn" if REAL_GPU else "forkserver")
if not REAL_GPU:
    # tests.conftest puts the simulator in CuPy's place.
    CONTEXT.set_forkserver_preload(["tests.conftest", "scripts.train", "matplotlib.figure",
                                    "tensorboardX", "tqdm"])


def start(arguments, output: Path, backend: str) -> Any:
    process = CONTEXT.Process(target=_train, args=(list(map(str, arguments)), output, backend))
    process.start()
    return process


def _train(arguments: list[str], output: Path, backend: str) -> None:
    from gpucnn import cli, layers
    from scripts import train
    train.MODELS["tiny"] = lambda classes: layers.Sequential([
        layers.Conv2D(4, 3, stride=4), layers.BatchNorm(), layers.ReLU(), layers.Dropout(0.2),
        layers.Flatten(), layers.Dense(classes)])
    with open(output, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= {"GPUCNN_BACKEND": backend, "GPUSIM_CHECKS": "off"}
    sys.argv[1:] = arguments
    cli.run(train.main, train.parser())
