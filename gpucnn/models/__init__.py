"""Networks by name, and saving and loading any model."""
from __future__ import annotations

from collections.abc import Callable

from gpucnn.layers import Sequential
from gpucnn.models.airbench import airbench94
from gpucnn.models.article import article
from gpucnn.models.lenet import lenet5
from gpucnn.models.resnet import resnet18, resnet50, stem_weights
from gpucnn.models.saving import load_model, load_weights, save_model

MODELS: dict[str, Callable[[int], Sequential]] = {
    "article": article, "lenet5": lenet5, "airbench94": airbench94, "resnet18": resnet18,
    "resnet50": resnet50}

__all__ = ["MODELS", "airbench94", "article", "lenet5", "load_model", "load_weights", "resnet18",
           "resnet50", "save_model", "stem_weights"]
