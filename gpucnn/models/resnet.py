"""ResNet-18 for small images."""
from __future__ import annotations

from gpucnn.layers import BatchNorm, Conv2D, Dense, GlobalAvgPool2D, Layer, Residual, Sequential


def resnet18(classes: int = 10, width: int = 64) -> Sequential:
    """He, Zhang, Ren and Sun 2016, in the usual form for 32x32 images: a 3x3 stem, no pooling.

    width: filters of the first convolutions; the last have eight times as many.
    """
    layers: list[Layer] = [_conv(width), BatchNorm(activation="relu")]
    channels = width
    for times, stride in ((1, 1), (1, 1), (2, 2), (2, 1), (4, 2), (4, 1), (8, 2), (8, 1)):
        filters = times * width
        layers.append(_block(filters, stride, project=filters != channels))
        channels = filters
    return Sequential([*layers, GlobalAvgPool2D(), Dense(classes)])


def _block(filters: int, stride: int, project: bool) -> Residual:
    body = Sequential([_conv(filters, 3, stride), BatchNorm(activation="relu"),
                       _conv(filters), BatchNorm()])
    shortcut = Sequential([_conv(filters, 1, stride), BatchNorm()]) if project else None
    return Residual(body, shortcut, activation="relu")


def _conv(filters: int, kernel_size: int = 3, stride: int = 1) -> Conv2D:
    return Conv2D(filters, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)
