"""LeNet-5."""
from __future__ import annotations

from gpucnn.layers import AvgPool2D, Conv2D, Dense, Flatten, Sequential


def lenet5(classes: int = 10) -> Sequential:
    """LeCun, Bottou, Bengio and Haffner 1998, as it is built today, for 28x28 or 32x32 images.

    All maps of the second convolution see all maps of the first, and the last layer is dense.
    """
    return Sequential([
        Conv2D(6, 5, padding="same", activation="tanh"), AvgPool2D(2),
        Conv2D(16, 5, activation="tanh"), AvgPool2D(2),
        Flatten(),
        Dense(120, activation="tanh"), Dense(84, activation="tanh"), Dense(classes),
    ])
