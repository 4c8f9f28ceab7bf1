"""How the CPU computes a convolution: the rule, by which numpy_backend.py goes."""
from __future__ import annotations

from gpucnn import convolution
from gpucnn.backend import narrow_convolution, row_convolution
from gpucnn.geometry import Window

# row_convolution.py, narrow_convolution.py, convolution.py, and the last without columns.
ROWS, FEW_CHANNELS, IM2COL, PRODUCT = "rows of taps", "few channels", "im2col", "matrix product"


def forward_way(window: Window, groups: int, x_shape: tuple[int, ...], c_out: int) -> str:
    """How conv2d is computed."""
    if row_convolution.pays(window, groups, x_shape, c_out):
        return ROWS
    return FEW_CHANNELS if narrow_convolution.pays(window, groups, x_shape) else _columns(window)


def backward_way(window: Window, groups: int, x_shape: tuple[int, ...], c_out: int,
                  input_gradient: bool) -> str:
    """How conv2d_backward is computed, with weights that are finite."""
    if row_convolution.backward_pays(window, groups, x_shape, c_out, input_gradient):
        return ROWS
    few = not input_gradient and narrow_convolution.pays(window, groups, x_shape)
    return FEW_CHANNELS if few else _columns(window)


def _columns(window: Window) -> str:
    return PRODUCT if convolution.is_pointwise(window) else IM2COL
