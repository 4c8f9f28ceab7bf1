"""All layers, and from_config(), which makes a layer again from its config()."""
from __future__ import annotations

from typing import Any

from gpucnn.errors import ModelFormatError
from gpucnn.layers.activation import GELU, LeakyReLU, ReLU, Scale, Sigmoid, Softmax, Tanh
from gpucnn.layers.base import Layer, Parameter
from gpucnn.layers.container import Concat, Residual, Sequential
from gpucnn.layers.conv import Conv2D
from gpucnn.layers.dense import Dense
from gpucnn.layers.dropout import Dropout
from gpucnn.layers.norm import BatchNorm
from gpucnn.layers.pool import AvgPool2D, GlobalAvgPool2D, MaxPool2D
from gpucnn.layers.shape import Flatten, SpaceToDepth
from gpucnn.layers.whiten import Whiten2D

__all__ = [
    "GELU",
    "AvgPool2D",
    "BatchNorm",
    "Concat",
    "Conv2D",
    "Dense",
    "Dropout",
    "Flatten",
    "GlobalAvgPool2D",
    "Layer",
    "LeakyReLU",
    "MaxPool2D",
    "Parameter",
    "ReLU",
    "Residual",
    "Scale",
    "Sequential",
    "Sigmoid",
    "Softmax",
    "SpaceToDepth",
    "Tanh",
    "Whiten2D",
    "from_config",
]

_CLASSES = {name: globals()[name] for name in __all__
            if name not in ("Layer", "Parameter", "from_config")}


def from_config(config: dict[str, Any]) -> Layer:
    """The layer that config() described, on the backend in use now, not yet built.

    Raises ModelFormatError for a class or an argument that this version does not know.
    """
    if not isinstance(config, dict):
        raise ModelFormatError(f"a layer must be an object with its class, got {config!r}")
    arguments = {k: _revive(v) for k, v in config.items() if k != "class"}
    if config.get("class") not in _CLASSES:
        raise ModelFormatError(f"layer class {config.get('class')!r} is not known; known: "
                               f"{', '.join(sorted(_CLASSES))}")
    try:
        return _CLASSES[config["class"]](**arguments)
    except (TypeError, ValueError) as e:
        raise ModelFormatError(f"layer {config['class']} cannot be made: {e}") from e


def _revive(value: Any) -> Any:
    if isinstance(value, dict) and "class" in value:
        return from_config(value)
    if isinstance(value, list):
        return [_revive(v) for v in value]
    return value
