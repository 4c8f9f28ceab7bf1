"""What the tests of reports show: a small net, images that can be told apart, and a history."""
from __future__ import annotations

import numpy as np

from gpucnn.data import Dataset
from gpucnn.layers import (
    BatchNorm,
    Conv2D,
    Dense,
    Dropout,
    Flatten,
    MaxPool2D,
    Sequential,
    Whiten2D,
)

HOSTILE = ("<script>alert(1)</script>", 'a"b\'&c', "two\nlines", "日本語 ☃", "\udcff\u202e",
           "x" * 80)


def dataset(classes=6, channels=1, n=90, names=HOSTILE):
    rng = np.random.default_rng(1)
    labels = np.arange(n) % classes
    patterns = rng.integers(0, 256, (classes, 8, 8, channels))
    images = np.clip(patterns[labels] + rng.normal(0, 60, (n, 8, 8, channels)), 0, 255)
    names = (*names, *(f"class {i}" for i in range(classes)))[:classes]
    return Dataset(images.astype(np.uint8), labels, names, "patterns-test")


def model(classes=6, channels=1):
    """With all that a step changes: running statistics, and the count that dropout draws from."""
    first = Conv2D(20, 3, padding="same", activation="relu") if channels == 1 else Whiten2D(2)
    net = Sequential([first, Dropout(0.2), MaxPool2D(2), Conv2D(5, 3), BatchNorm(), Flatten(),
                      Dense(classes)])
    net.build((8, 8, channels), seed=3)
    return net


def history(epochs=3, steps=20, shift=0.0):
    ends, every = np.arange(1, epochs + 1), np.arange(1, epochs * steps + 1)
    return {"step": every.tolist(), "step_loss": (2.3 / np.sqrt(every) + shift).tolist(),
            "step_learning_rate": (0.001 * np.cos(every / every[-1])).tolist(),
            "epoch": ends.tolist(), "train_loss": (0.5 / ends).tolist(),
            "train_accuracy": (1 - 0.2 / ends).tolist(), "test_loss": (0.6 / ends + shift).tolist(),
            "test_accuracy": (0.95 - 0.2 / ends - shift).tolist(), "steps_per_epoch": steps}


def metrics(**changed):
    return {"test_accuracy": 0.88, "test_loss": 0.2, "seconds": 75.0, "images_per_second": 925.4,
            "step_memory_bytes": 54 << 20, "device": "cpu", "model": "tiny", "epochs": 3,
            "batch_size": 16, "optimizer": "adam", "precision": "float32", "seed": 0,
            "clip_norm": None, "flip": True, "versions": {"numpy": "2.1"}} | changed
