"""Bugs planted in the convolution kernels do not go unnoticed, by small convolutions."""
from __future__ import annotations

import numpy as np
import pytest

from tests.conftest import needs_simulator
from tests.convolution_judge import (
    Case,
    direct,
    gemm,
    judge,
    judge_activation_backward,
    judge_moments,
)
from tests.gpusim.mutation import caught

FORWARD = Case((2, 5, 5, 6), (3, 3, 10), stride=(1, 2), padding=1, groups=2, bias=True,
               activation="leaky_relu", residual=True)
GRADIENT = Case((2, 5, 6, 6), (3, 3, 10), stride=2, dilation=(1, 2), padding=1, groups=2)
ODD_WEIGHT = Case((1, 4, 4, 2), (3, 3, 3), padding=1, odd_weight=np.inf)
FEW = Case((2, 5, 4, 2), (2, 3, 5), stride=(2, 1), padding=1, dilation=(1, 2), bias=True)
DEPTHWISE = Case((2, 5, 6, 3), (3, 2, 3), stride=(2, 1), padding=1, dilation=(1, 2), groups=3)


CHECKS = {
    "forward": lambda b: judge(b, FORWARD, gemm(3), "y"),
    "forward, split": lambda b: judge(b, FORWARD, gemm(3, 3), "y"),
    "moments": lambda b: judge_moments(b, FORWARD, gemm(3), mean={"rtol": 1e-5, "atol": 1e-5},
                                       squares={"rtol": 1e-4, "atol": 1e-4}),
    "input gradient": lambda b: judge(b, GRADIENT, gemm(3), "dx"),
    "odd weight": lambda b: judge(b, ODD_WEIGHT, gemm(3), "dx"),
    "weight gradient": lambda b: judge(b, FORWARD, gemm(3, 2), "dw"),
    "direct": lambda b: judge(b, FEW, direct(), "y"),
    "direct weight gradient": lambda b: judge(b, FEW, direct(5), "dw"),
    "depthwise": lambda b: judge(b, DEPTHWISE, direct(), "dx"),
    "activation": lambda b: judge_activation_backward(b, (90, 7), "relu", np.dtype(np.float32)),
}
# The check that notices and the file: the text and what is put in its place.
BUGS = {
    ("forward", "gemm_tile.cuh"): {
        "rows and columns change places": (
            "row[i / 4].at[i % 4] * column[j / 4].at[j % 4]",
            "row[j / 4].at[j % 4] * column[i / 4].at[i % 4]"),
        "a quad is four rows too far": ("/ THREADS_N * 4", "/ THREADS_N * 8"),
    },
    ("forward", "conv_gemm.cu"): {
        "no barrier before the first product": (
            "bool odd = put(0);\n    if (GRADIENT) odd = __syncthreads_or(odd);\n"
            "    else __syncthreads();",
            "bool odd = put(0);"),
        "no barrier between stages": (
            "odd = put(buffer ^ 1);\n        if (GRADIENT) odd = __syncthreads_or(odd);\n"
            "        else __syncthreads();",
            "odd = put(buffer ^ 1);"),
        "both buffers are one": ("put(buffer ^ 1)", "put(buffer)"),
        "terms past the end are weighed": (
            "k < length && result < p.results", "result < p.results"),
        "rows past the end are written": ("if (row >= rows) continue;", ""),
        "columns past the end are written": (
            "if (result >= p.results) continue;\n            int channel", "int channel"),
        "the bias is the group's first": ("bias, channel + e,", "bias, own.group * p.results,"),
    },
    ("forward", "implicit_gemm.cuh"): {
        "a term is not carried over to the next row of taps": (
            "if (++tx == taps_x)", "if (++tx > taps_x)"),
        "a pixel above the image is read": ("y >= 0 &&", "y >= -1 &&"),
        "a pixel right of the image is read": ("x < horizontal.size;", "x <= horizontal.size;"),
        "each group reads the first one's pixels": (
            "x_channels + group * terms + t.c", "x_channels + t.c"),
        "each group has the first one's filters": (
            "filter_outputs + group * results + result", "filter_outputs + result"),
    },
    ("moments", "conv_gemm.cu"): {
        "moments count the rows past the end": ("if (tile_row(i) < rows) sum +=", "sum +="),
        "moments are those of the sums before the activation": (
            "if (MOMENTS) sums[i][j + e] = chunk.at[e];", ""),
    },
    ("forward", "activation.cuh"): {
        "the residual is subtracted": (
            "z += (accum_t)residual[place]", "z -= (accum_t)residual[place]"),
        "the slope is 1": ("(accum_t)0.01", "(accum_t)1"),
    },
    ("forward, split", "implicit_gemm.cuh"): {
        "the last stages are in no split": ("(stages + splits - 1) / splits", "stages / splits"),
    },
    ("forward, split", "conv_gemm.cu"): {
        "slabs overlap": ("p.y_width * p.y_channels);", "p.y_width * p.y_channels - 1);"),
    },
    ("forward, split", "finish_splits.cu"): {
        "a split is left out of the sum": ("int split = 0; split <", "int split = 1; split <"),
        "the bias of a split sum is the pixel's": ("(int)(i % c_out)", "(int)(i / c_out % c_out)"),
    },
    ("input gradient", "implicit_gemm.cuh"): {
        "each phase writes the first one's pixels": ("a.offset = phase", "a.offset = 0"),
        "a phase begins with another one's tap": (
            "(phase + pad - first * dilation) % stride != 0",
            "(phase - first * dilation) % stride != 0"),
        "a phase takes every tap": ("a.every = every", "a.every = 1"),
        "stride and dilation are taken to be coprime": (
            "every = stride / common", "every = stride"),
        "outputs are walked the wrong way": ("a.step = -(", "a.step = ("),
    },
    ("input gradient", "conv_gemm.cu"): {
        "taps past the last are weighed": ("term.ty < p.vertical.taps && ", ""),
        "weights are stored by row": (
            "tiles.b[buffer][column][row]", "tiles.b[buffer][row % TILE_K][column]"),
    },
    ("odd weight", "conv_gemm.cu"): {
        "an absent output counts as 0": ("absent[i] ? -zero", "absent[i] ? zero"),
        "an output of -0 counts as absent": ("-zero : value + zero;", "-zero : value;"),
        "nobody looks for odd weights": ("odd |= weight - weight != 0;", ""),
    },
    ("weight gradient", "implicit_gemm.cuh"): {
        "a row of pixels wraps once": ("while (x >= ow)", "if (x >= ow)"),
        "pixels are not carried over to the next image": ("if (++y == oh)", "if (++y > oh)"),
    },
    ("weight gradient", "conv_weight_gradient.cu"): {
        "pixels below the image are read": ("iy < h &&", "iy <= h &&"),
        "dz of the first group": (
            "m * c_out + own.group * outputs + output", "m * c_out + output"),
        "both splits write one slab": (
            "((index_t)own.split * terms + k)", "((index_t)0 * terms + k)"),
    },
    ("weight gradient", "sum_splits.cu"): {
        "the first slab alone is the sum": ("int first = 1", "int first = 2"),
        "the last slab is added again": ("if (first + k < splits) total", "total"),
    },
    ("direct", "conv_direct.cu"): {
        "no dilation": ("p.x * sw - left + kx * dw", "p.x * sw - left + kx"),
        "the first input for each": ("x[pixel * c + i]", "x[pixel * c]"),
        "the padding is the first pixel": ("inside ? read.at[v] : 0", "read.at[v]"),
    },
    ("direct weight gradient", "conv_direct.cu"): {
        "the last pixels are in no band": (
            "(pixels + gridDim.x - 1) / gridDim.x", "pixels / gridDim.x"),
        "a term too many is written": ("&& first_term + t < terms)", ")"),
    },
    ("direct weight gradient", "reduce.cuh"): {
        "the odd lane is left out": ("(left + 1) / 2", "left / 2"),
        "lanes are read before they are there": (
            "__syncthreads();\n        if (lane < left - kept)", "if (lane < left - kept)"),
        "lanes are overwritten": ("        __syncthreads();\n        left = kept;",
                                  "        left = kept;"),
    },
    ("depthwise", "common.cuh"): {
        "taps between those of the filter": ("if (kx % dw != 0) continue;", ""),
    },
    ("activation", "activation.cuh"): {
        "the slope at 0 is 1": ("return a <= 0 ? 0 : da", "return a < 0 ? 0 : da"),
    },
    ("activation", "activation.cu"): {
        "all lanes add the same rows": ("row = start + lane;", "row = start;"),
        "the sum of one row": ("sum.at[v] += dz", "sum.at[v] = dz"),
    },
    ("activation", "reduce.cuh"): {
        "lane 0 alone": ("int left = lanes; left > 1", "int left = lanes; left > 9999"),
    },
}
PLANTED = {name: (check, file, *change) for (check, file), bugs in BUGS.items()
           for name, change in bugs.items()}


@needs_simulator
@pytest.mark.filterwarnings("ignore:invalid value")  # infinity times zero, in the reference
@pytest.mark.parametrize("check", CHECKS)
def test_without_a_bug_the_checks_pass(cupy_backend, check):
    CHECKS[check](cupy_backend)


@needs_simulator
@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize(("check", "file", "old", "new"), PLANTED.values(), ids=PLANTED)
def test_a_planted_bug_is_caught(cupy_backend, check, file, old, new):
    with caught(file, old, new):
        CHECKS[check](cupy_backend)
