"""ResNet-18 for small images."""
from __future__ import annotations

from gpucnn.layers import BatchNorm, Conv2D, Dense, GlobalAvgPool2D, Layer, Residual, Sequential


def resnet18(classes: int = 10) -> Sequential:
    """He, Zhang, Ren and Sun 2016, in the usual form for 32x32 images: a 3x3 stem, no pooling."""
    layers: list[Layer] = [_conv(64), BatchNorm(activation="relu")]
    channels = 64
    for filters, stride in ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2),
                            (512, 1)):
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
