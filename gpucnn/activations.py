"""The activations g of the article, A = g(Z), and their part of the backward pass, dZ = dA g'(Z).

Each derivative is written in terms of A, so that a layer keeps A and can forget Z. At Z = 0, where
the two ReLUs have none, it is that of the negative side, as in torch.
"""
from __future__ import annotations

from typing import Any

from gpucnn.backend import LEAKY_SLOPE, Array
from gpucnn.numerics import zero_where

NAMES = ("relu", "leaky_relu", "sigmoid", "tanh")
FUSED_WITH_NORM = ("relu",)


def check_name(where: str, name: str | None, known: tuple[str, ...] = NAMES) -> None:
    """Raise ValueError unless `name` is None or one of those known."""
    if name is not None and name not in known:
        raise ValueError(f"{where}: activation {name!r} is not known; use None, "
                         f"{', '.join(map(repr, known))}")


def activate(xp: Any, name: str | None, z: Array, slope: float = LEAKY_SLOPE) -> Array:
    """A = g(Z), written over z, which is returned. NaN stays NaN.

    slope: of the leaky ReLU where z <= 0; 0 < slope < 1.
    """
    if name == "relu":
        xp.maximum(z, 0, out=z)
    elif name == "leaky_relu":
        xp.maximum(z, z * z.dtype.type(slope), out=z)
    elif name == "tanh":
        xp.tanh(z, out=z)
    elif name == "sigmoid":
        # 1 / (1 + exp(-z)), for z < 0 as exp(z) / (1 + exp(z)): nothing overflows or cancels.
        small = xp.exp(-xp.abs(z))
        xp.divide(xp.where(z >= 0, z.dtype.type(1), small), 1 + small, out=z)
    return z


def activation_backward(xp: Any, name: str | None, da: Array, a: Array,
                        slope: float = LEAKY_SLOPE, out: Array | None = None) -> Array:
    """dZ = dA g'(Z), given A = g(Z). Shapes and dtypes as dA's; neither input is written.

    out: where to write dZ, contiguous.
    """
    if out is not None and name != "relu":
        out[...] = activation_backward(xp, name, da, a, slope)
        return out
    if name == "relu":
        return zero_where(a <= 0, da, out)  # which NaN is not
    if name == "leaky_relu":
        positive = a > 0
        return zero_where(~positive, da) + zero_where(positive, da * da.dtype.type(slope))
    if name in ("tanh", "sigmoid"):  # 1 - a^2, a - a^2
        slopes = a * a
        xp.subtract(1 if name == "tanh" else a, slopes, out=slopes)
        slopes *= da
        return slopes
    return da
