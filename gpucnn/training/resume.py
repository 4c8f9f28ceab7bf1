"""May a run go on from this checkpoint? Only with the settings, data and machine it was made with,
or else with those differences that the user names."""
from __future__ import annotations

import hashlib
import platform
from collections.abc import Collection
from typing import Any

import numpy as np

import gpucnn
from gpucnn import machine
from gpucnn.backend import Backend
from gpucnn.data import Dataset
from gpucnn.errors import CheckpointError
from gpucnn.training.checkpoints import Checkpoint

SAMPLED_IMAGES = 256


def environment(backend: Backend) -> dict[str, Any]:
    """What the bits of a run depend on beside its settings and its data."""
    return {"backend": backend.name, "device": machine.device_name(backend),
            "cpu": machine.cpu_name(), "gpucnn": gpucnn.__version__,
            "python": platform.python_version(), "numpy": np.__version__,
            **({"blas": machine.blas_name()} if backend.name == "numpy" else
               {backend.name: backend.xp.__version__})}


def fingerprint(dataset: Dataset) -> str:
    """A hash of the labels, the images' shape, and images from all over the data set."""
    n = len(dataset)
    digest = hashlib.sha256(f"{dataset.images.shape} {dataset.class_names}".encode())
    digest.update(np.ascontiguousarray(dataset.labels, dtype="<i8").tobytes())
    some = np.unique(np.linspace(0, n - 1, min(n, SAMPLED_IMAGES)).astype(np.int64))
    digest.update(np.ascontiguousarray(dataset.images[some]).tobytes())
    return digest.hexdigest()


def check_resumable(checkpoint: Checkpoint, facts: dict[str, Any], *, override: Collection[str],
                    deterministic: bool) -> None:
    """Raise CheckpointError that lists all settings, data and versions that are not the same.

    facts: settings, data and environment, each a dictionary, as they are now.
    override: the names of settings and data that may differ.
    deterministic: whether the environment may not.
    """
    problems: list[str] = []
    for part in ("settings", "data"):
        changed = _changed(checkpoint.facts[part], facts[part])
        refused = {name: text for name, text in changed.items() if name not in override}
        if refused:
            problems += [f"{'; '.join(refused.values())}; pass "
                         f"{' '.join(f'--override {name}' for name in refused)} to accept"]
    if deterministic:
        changed = _changed(checkpoint.facts["environment"], facts["environment"])
        if changed:
            problems.append(f"{'; '.join(changed.values())}, so the bits may differ; pass "
                            "--no-deterministic to accept")
    if problems:
        raise CheckpointError(f"--resume: {'; '.join(problems)}")


def _changed(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    return {name: f"{name} is {_short(now.get(name))}, the checkpoint was made with "
                  f"{_short(before.get(name))}"
            for name in (*before, *(n for n in now if n not in before))
            if before.get(name) != now.get(name)}


def _short(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
