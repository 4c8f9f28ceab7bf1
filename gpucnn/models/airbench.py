"""Keller Jordan's network for CIFAR-10."""
from __future__ import annotations

from gpucnn.layers import (
    GELU,
    BatchNorm,
    Conv2D,
    Dense,
    Flatten,
    Layer,
    MaxPool2D,
    Scale,
    Sequential,
    Whiten2D,
)


def airbench94(classes: int = 10) -> Sequential:
    """Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU"; images of 25x25 and more.

    After airbench94.py of github.com/KellerJordan/cifar10-airbench: a whitening layer that is not
    learned but for its bias, three groups of two convolutions, which begin as the identity, with
    GELUs and norms that shift but do not scale, and logits divided by 9. The dense layer's weights
    begin uniform by Glorot's rule, which makes them wider than there.

    Before training, fit the first layer to images as the network is given them, which for 94 %
    are normalised to mean 0 and standard deviation 1:

        model.build((32, 32, 3))
        model.layers[0].fit(images[:5000])
    """
    return Sequential([
        Whiten2D(2), GELU(), *_group(64), *_group(256), *_group(256),
        MaxPool2D(3), Flatten(), Dense(classes, bias=False), Scale(1 / 9)])


def _group(filters: int) -> list[Layer]:
    def conv() -> Conv2D:
        return Conv2D(filters, 3, padding="same", bias=False, initializer="dirac")

    def norm() -> BatchNorm:
        return BatchNorm(momentum=0.4, epsilon=1e-12, scale=False)

    return [conv(), MaxPool2D(2), norm(), GELU(), conv(), norm(), GELU()]
