"""ResNet-18 for small images, and ResNet-50."""
from __future__ import annotations

import numpy as np

from gpucnn.layers import (
    BatchNorm,
    Conv2D,
    Dense,
    GlobalAvgPool2D,
    Layer,
    MaxPool2D,
    Residual,
    Sequential,
    SpaceToDepth,
)

STEM_CHANNELS = 16  # 12 and zeros: 16 bytes of 16-bit numbers, which tensor cores read at once


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


def resnet50(classes: int = 1000, width: int = 64) -> Sequential:
    """He, Zhang, Ren and Sun 2016, as it is built today (v1.5): strides in the 3x3 convolutions.

    width: filters of the first convolutions; the last have 32 times as many.

    For images of 1 to 4 channels whose height and width are even; 224x224x3 in the paper.

    The 7x7 convolution with stride 2 that it begins with is a 4x4 convolution over squares of 2x2
    pixels, of 12 channels and 4 of zeros. That contains it: stem_weights() gives the weights with
    which they are equal. It has 4 * 4 * 16 * 64 = 16,384 weights, and 7 * 7 * 3 * 64 = 9,408 of
    them would do: there are those of an 8x8 filter, all learned, and 4,096 that see nothing but
    zeros. With 1,000 classes that makes 25,564,008 parameters, 6,976 more than torchvision's.
    """
    layers: list[Layer] = [
        SpaceToDepth(2, STEM_CHANNELS), Conv2D(width, 4, padding=((2, 1), (2, 1)), bias=False),
        BatchNorm(activation="relu"), MaxPool2D(3, stride=2, padding=1)]
    for times, blocks, stride in ((1, 3, 1), (2, 4, 2), (4, 6, 2), (8, 3, 2)):
        filters = times * width
        layers.append(_bottleneck(filters, stride, project=True))
        layers += [_bottleneck(filters, 1, project=False) for _ in range(1, blocks)]
    return Sequential([*layers, GlobalAvgPool2D(), Dense(classes)])


def stem_weights(w7: np.ndarray) -> np.ndarray:
    """What resnet50's "conv1/w" must be for the stem to be a 7x7 convolution, stride 2, padding 3.

    w7 (7, 7, c, filters), NumPy's, with c <= 4 -> (4, 4, 16, filters). torch has its weights as
    (filters, c, 7, 7): pass w.permute(2, 3, 1, 0).numpy(). A window of four squares begins a pixel
    above and to the left of one of 7x7 pixels, so zeros stand there.

    Raises ValueError for another shape.
    """
    if w7.ndim != 4 or w7.shape[:2] != (7, 7) or 4 * w7.shape[2] > STEM_CHANNELS:
        raise ValueError(f"stem_weights: w7 must be (7, 7, c, filters) with c <= "
                         f"{STEM_CHANNELS // 4}, got {w7.shape}; for torch's "
                         "(filters, c, 7, 7) use w.permute(2, 3, 1, 0)")
    c, filters = w7.shape[2:]
    w8 = np.zeros((8, 8, c, filters), w7.dtype)
    w8[1:, 1:] = w7
    w = np.zeros((4, 4, STEM_CHANNELS, filters), w7.dtype)
    w[:, :, :4 * c] = w8.reshape(4, 2, 4, 2, c, filters).transpose(0, 2, 1, 3, 4, 5).reshape(
        4, 4, 4 * c, filters)
    return w


def _block(filters: int, stride: int, project: bool) -> Residual:
    body = Sequential([_conv(filters, 3, stride), BatchNorm(activation="relu"),
                       _conv(filters), BatchNorm()])
    return Residual(body, _projection(filters, stride) if project else None, activation="relu")


def _bottleneck(filters: int, stride: int, project: bool) -> Residual:
    body = Sequential([_conv(filters, 1), BatchNorm(activation="relu"),
                       _conv(filters, 3, stride), BatchNorm(activation="relu"),
                       _conv(4 * filters, 1), BatchNorm()])
    return Residual(body, _projection(4 * filters, stride) if project else None,
                    activation="relu")


def _projection(filters: int, stride: int) -> Sequential:
    return Sequential([_conv(filters, 1, stride), BatchNorm()])


def _conv(filters: int, kernel_size: int = 3, stride: int = 1) -> Conv2D:
    return Conv2D(filters, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)
