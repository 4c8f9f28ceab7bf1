"""Bugs planted in the convolution kernels do not go unnoticed, by small convolutions."""
from __future__ import annotations

import numpy as np
import pytest

from tests.conftest import needs_simulator
from tests.convolution_judge import (
    Case,
    check_activation_backward,
    check_forward,
    check_input_gradient,
    check_weight_gradient,
    direct,
    gemm,
    moments_of,
)
from tests.gpusim.mutation import mutated

FORWARD = Case((2, 5, 5, 6), (3, 3, 10), stride=(1, 2), padding=1, groups=2, bias=True,
               activation="leaky_relu", residual=True)
GRADIENT = Case((2, 5, 6, 6), (3, 3, 10), stride=2, dilation=(1, 2), padding=1, groups=2)
ODD_WEIGHT = Case((1, 4, 4, 2), (3, 3, 3), padding=1, odd_weight=np.inf)
FEW = Case((2, 5, 4, 2), (2, 3, 5), stride=(2, 1), padding=1, dilation=(1, 2), bias=True)
DEPTHWISE = Case((2, 5, 6, 3), (3, 2, 3), stride=(2, 1), padding=1, dilation=(1, 2), groups=3)



def check_moments(backend):
    y, moments = moments_of(backend, FORWARD, 3)
    for number, (mean, squares) in enumerate(moments):
        rows = y[32 * number:32 * number + 32]
        np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(squares, rows.var(0) * len(rows), rtol=1e-4, atol=1e-4)


CHECKS = {
    "forward": lambda b: check_forward(b, FORWARD, gemm(3)),
    "forward, split": lambda b: check_forward(b, FORWARD, gemm(3, 3)),
    "moments": check_moments,
    "input gradient": lambda b: check_input_gradient(b, GRADIENT, gemm(3)),
    "odd weight": lambda b: check_input_gradient(b, ODD_WEIGHT, gemm(3)),
    "weight gradient": lambda b: check_weight_gradient(b, FORWARD, gemm(3, 2)),
    "direct": lambda b: check_forward(b, FEW, direct()),
    "direct weight gradient": lambda b: check_weight_gradient(b, FEW, direct(5)),
    "depthwise": lambda b: check_input_gradient(b, DEPTHWISE, direct()),
    "activation": lambda b: check_activation_backward(b, (90, 7), "relu", np.dtype(np.float32)),
}
# name: the check that notices, the file, the text and what is put in its place.
BUGS = {
    "rows and columns change places": (
        "forward", "gemm_tile.cuh", "row[i / 4].at[i % 4] * column[j / 4].at[j % 4]",
        "row[j / 4].at[j % 4] * column[i / 4].at[i % 4]"),
    "a quad is four rows too far": (
        "forward", "gemm_tile.cuh", "/ THREADS_N * 4", "/ THREADS_N * 8"),
    "no barrier before the first product": (
        "forward", "conv_gemm.cu", "bool odd = put(0);\n    if (GRADIENT) odd = "
        "__syncthreads_or(odd);\n    else __syncthreads();", "bool odd = put(0);"),
    "no barrier between stages": (
        "forward", "conv_gemm.cu", "odd = put(buffer ^ 1);\n        if (GRADIENT) odd = "
        "__syncthreads_or(odd);\n        else __syncthreads();", "odd = put(buffer ^ 1);"),
    "both buffers are one": ("forward", "conv_gemm.cu", "put(buffer ^ 1)", "put(buffer)"),
    "terms past the end are weighed": (
        "forward", "conv_gemm.cu", "k < length && result < p.results", "result < p.results"),
    "a term is not carried over to the next row of taps": (
        "forward", "implicit_gemm.cuh", "if (++tx == taps_x)", "if (++tx > taps_x)"),
    "rows past the end are written": (
        "forward", "conv_gemm.cu", "if (row >= rows) continue;", ""),
    "columns past the end are written": (
        "forward", "conv_gemm.cu",
        "if (result >= p.results) continue;\n            int channel", "int channel"),
    "moments count the rows past the end": (
        "moments", "conv_gemm.cu", "if (tile_row(i) < rows) sum +=", "sum +="),
    "moments are those of the sums before the activation": (
        "moments", "conv_gemm.cu", "if (MOMENTS) sums[i][j + e] = chunk.at[e];", ""),
    "a pixel above the image is read": ("forward", "conv_gemm.cu", "y >= 0 &&", "y >= -1 &&"),
    "a pixel right of the image is read": (
        "forward", "conv_gemm.cu", "x < h.size;", "x <= h.size;"),
    "each group reads the first one's pixels": (
        "forward", "conv_gemm.cu", "pixel * p.x_channels + own.group * p.terms + term.c",
        "pixel * p.x_channels + term.c"),
    "each group has the first one's filters": (
        "forward", "conv_gemm.cu", "p.filter_outputs + own.group * p.results + result",
        "p.filter_outputs + result"),
    "the bias is the group's first": (
        "forward", "conv_gemm.cu", "bias, channel + e,", "bias, own.group * p.results,"),
    "the residual is subtracted": ("forward", "activation.cuh", "z += (accum_t)residual[place]",
                                   "z -= (accum_t)residual[place]"),
    "the slope is 1": ("forward", "activation.cuh", "(accum_t)0.01", "(accum_t)1"),
    "the last stages are in no split": (
        "forward, split", "conv_gemm.cu", "(stages + splits - 1) / splits", "stages / splits"),
    "slabs overlap": ("forward, split", "conv_gemm.cu", "p.y_width * p.y_channels);",
                      "p.y_width * p.y_channels - 1);"),
    "a split is left out of the sum": (
        "forward, split", "finish_splits.cu", "int split = 0; split <", "int split = 1; split <"),
    "the bias of a split sum is the pixel's": (
        "forward, split", "finish_splits.cu", "(int)(i % c_out)", "(int)(i / c_out % c_out)"),
    "each phase writes the first one's pixels": (
        "input gradient", "implicit_gemm.cuh", "a.offset = phase", "a.offset = 0"),
    "a phase begins with another one's tap": (
        "input gradient", "implicit_gemm.cuh", "(phase + pad - first * dilation) % stride != 0",
        "(phase - first * dilation) % stride != 0"),
    "a phase takes every tap": (
        "input gradient", "implicit_gemm.cuh", "a.every = every", "a.every = 1"),
    "stride and dilation are taken to be coprime": (
        "input gradient", "implicit_gemm.cuh", "every = stride / common", "every = stride"),
    "outputs are walked the wrong way": (
        "input gradient", "implicit_gemm.cuh", "a.step = -(", "a.step = ("),
    "taps past the last are weighed": (
        "input gradient", "conv_gemm.cu", "bool inside = term.ty < v.taps", "bool inside = true"),
    "weights are stored by row": ("input gradient", "conv_gemm.cu", "tiles.b[buffer][column][row]",
                                  "tiles.b[buffer][row % TILE_K][column]"),
    "an absent output counts as 0": ("odd weight", "conv_gemm.cu", "absent[i] ? -zero",
                                     "absent[i] ? zero"),
    "an output of -0 counts as absent": ("odd weight", "conv_gemm.cu", "a_chunk[i].at[e] + zero)",
                                         "(accum_t)a_chunk[i].at[e])"),
    "nobody looks for odd weights": ("odd weight", "conv_gemm.cu", "odd |= weight - weight != 0;",
                                     ""),
    "a row of pixels wraps once": (
        "weight gradient", "implicit_gemm.cuh", "while (x >= ow)", "if (x >= ow)"),
    "pixels are not carried over to the next image": (
        "weight gradient", "implicit_gemm.cuh", "if (++y == oh)", "if (++y > oh)"),
    "pixels below the image are read": (
        "weight gradient", "conv_weight_gradient.cu", "iy < h &&", "iy <= h &&"),
    "dz of the first group": ("weight gradient", "conv_weight_gradient.cu",
                              "m * c_out + group * outputs + output", "m * c_out + output"),
    "both splits write one slab": ("weight gradient", "conv_weight_gradient.cu",
                                   "((index_t)split * terms + k)", "((index_t)0 * terms + k)"),
    "the first slab alone is the sum": (
        "weight gradient", "sum_splits.cu", "int s = 1", "int s = 2"),
    "no dilation": (
        "direct", "conv_direct.cu", "p.x * sw - left + kx * dw", "p.x * sw - left + kx"),
    "the first input for each": ("direct", "conv_direct.cu", "x[pixel * c + i]", "x[pixel * c]"),
    "the last pixels are in no band": (
        "direct weight gradient", "conv_direct.cu", "(pixels + gridDim.x - 1) / gridDim.x",
        "pixels / gridDim.x"),
    "the first lane is left out": (
        "direct weight gradient", "conv_direct.cu", "int l = 0; l < lanes", "int l = 1; l < lanes"),
    "lanes are overwritten": ("direct weight gradient", "conv_direct.cu",
                              "        __syncthreads();\n    }\n}", "    }\n}"),
    "a term too many is written": ("direct weight gradient", "conv_direct.cu",
                                   "&& first_term + t < terms)", ")"),
    "taps between those of the filter": ("depthwise", "conv_direct.cu",
                                         "if (kx % dw != 0) continue;", ""),
    "the slope at 0 is 1": ("activation", "activation.cuh", "return a <= 0 ? 0 : da",
                            "return a < 0 ? 0 : da"),
    "sums are added before they are there": ("activation", "activation.cu",
                                             "__syncthreads();\n        if (lane == 0",
                                             "if (lane == 0"),
    "lane 0 alone": ("activation", "activation.cu", "l < lanes; ++l", "l < 1; ++l"),
}


@needs_simulator
@pytest.mark.filterwarnings("ignore:invalid value")  # infinity times zero, in the reference
@pytest.mark.parametrize("check", CHECKS)
def test_without_a_bug_the_checks_pass(cupy_backend, check):
    CHECKS[check](cupy_backend)


@needs_simulator
@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(cupy_backend, bug):
    check, *change = BUGS[bug]
    with mutated(*change), pytest.raises((RuntimeError, AssertionError)):
        CHECKS[check](cupy_backend)
