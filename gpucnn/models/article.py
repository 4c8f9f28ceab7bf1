"""The network of the article."""
from __future__ import annotations

from gpucnn.layers import Conv2D, Dense, Dropout, Flatten, MaxPool2D, Sequential


def article(classes: int = 10) -> Sequential:
    """Two blocks of two 3x3 convolutions, each pooled and thinned out, and three dense layers."""
    def conv(filters: int) -> Conv2D:
        return Conv2D(filters, 3, padding="same", activation="relu")

    return Sequential([
        conv(32), conv(32), MaxPool2D(2), Dropout(0.25),
        conv(64), conv(64), MaxPool2D(2), Dropout(0.25),
        Flatten(),
        Dense(256, activation="relu"), Dense(32, activation="relu"), Dense(classes),
    ])
