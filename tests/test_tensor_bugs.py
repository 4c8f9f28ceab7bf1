"""Bugs planted in the convolutions on tensor cores: each is caught, and it says here as what.

A fault is what the simulator finds whatever the numbers are: a race, a read of what nothing wrote,
an access out of bounds. A wrong number is found by gpucnn.reference alone.
"""
from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from tests.conftest import needs_simulator
from tests.convolution_judge import TENSOR_DTYPES, Shape, arrays, judge, tensor_tile, tiled
from tests.gpusim import KernelFault
from tests.gpusim.mutation import caught

pytestmark = needs_simulator
FLOAT16, BFLOAT16, FLOAT32 = TENSOR_DTYPES
TENSOR, WEIGHTS, TILE, WGMMA, PTX, GEMM, SPLITS = (
    "conv_tensor.cu", "conv_tensor_weight_gradient.cu", "tensor_tile.cuh", "wgmma_tile.cuh",
    "ptx.cuh", "implicit_gemm.cuh", "finish_splits.cu")
# Ragged in rows, results and terms, and longer than STAGES tiles; and with phases in the gradient.
RAGGED = Shape((2, 4, 5), depth=3, filters=5, groups=2, padding=1)
STRIDED = Shape((1, 7, 6), (3, 2), filters=2, stride=(2, 3), dilation=(1, 2), padding=1)
WRONG, FAULT = AssertionError, KernelFault


class Bug(NamedTuple):
    """A text of a file and what it becomes; how that shows; where: a pass, in the smallest tile
    unless another is needed."""

    file: str
    old: str
    new: str
    kind: type[Exception]
    result: str
    dtype: np.dtype
    shape: Shape = RAGGED
    splits: int = 1
    tile: int = 4


BUGS = {
    "A: pieces are read where they were not put": Bug(
        TILE, "load_matrices(a, tile + term_offset(row + lane % 16, step * 2 + lane / 16));",
        "load_matrices(a, tile + (row + lane % 16) * TERM_PITCH + (step * 2 + lane / 16) * 16);",
        WRONG, "y", FLOAT16),
    "A: pieces are put where they are not read": Bug(
        TENSOR, "stage + term_offset(a_row + i * ROWS, piece)",
        "stage + (a_row + i * ROWS) * TERM_PITCH + piece * 16", WRONG, "y", FLOAT32),
    "B: columns are put where they are not read": Bug(
        TENSOR, "b + column_offset<TILE_N>(row, b_piece)",
        "b + row * column_pitch<TILE_N> + b_piece * 16", WRONG, "y", FLOAT16),
    "dw: a stage ends where a row does": Bug(
        "implicit_gemm.cuh", "x += step.x;", "", WRONG, "dw", FLOAT16, shape=Shape((2, 8, 5))),
    "dw: a stage stays within its image": Bug(
        "implicit_gemm.cuh", "image += step.image + next;", "image += step.image;", WRONG, "dw",
        FLOAT16, shape=Shape((3, 8, 5))),
    "dw: columns are put where they are not read": Bug(
        WEIGHTS, "column_offset<TILE_N>(b_row + i * B_ROWS, b_piece)",
        "column_offset<TILE_N>(b_row + i * B_ROWS, b_piece ^ 1)", WRONG, "dw", BFLOAT16),
    "tf32: a row of columns is read without the gap": Bug(
        TILE, "b[e] = load_word(tile + (step * 8 + lane % 4 + e % 2 * 4) * column_pitch<WIDTH>",
        "b[e] = load_word(tile + (step * 8 + lane % 4 + e % 2 * 4) * WIDTH * 4",
        FAULT, "y", FLOAT32),
    "y: weights past the end of k are read": Bug(
        TENSOR, "bool seen = k < length && result < p.results;", "bool seen = result < p.results;",
        FAULT, "y", FLOAT16),
    "dx: taps past the last are read": Bug(
        TENSOR, "term.ty < p.vertical.taps && ", "",
        FAULT, "dx", FLOAT16, shape=STRIDED),
    "dw: pixels past the last are read": Bug(
        WEIGHTS, "bool seen = m < pixels && output < outputs;", "bool seen = output < outputs;",
        FAULT, "dw", FLOAT16),
    "the tail of k is left out": Bug(
        GEMM, "const T stages = (length + TILE_K - 1) / TILE_K",
        "const T stages = length / TILE_K", WRONG, "y", FLOAT16),
    "a wait for one group too few": Bug(
        TILE, "wait_for_copies<STAGES - 2>();", "wait_for_copies<STAGES - 1>();",
        FAULT, "y", FLOAT16),
    "no barrier after the wait": Bug(
        TILE, "__syncthreads();  // this tile has arrived", "// this tile has arrived",
        FAULT, "y", FLOAT32),
    "no barrier before the corners": Bug(
        TILE, "__syncthreads();  // the memory is free", "", FAULT, "y", FLOAT16),
    "the stage to read is not wrapped": Bug(
        TILE, "reading = reading + 1 == STAGES ? 0 : reading + 1;", "reading = reading + 1;",
        FAULT, "y", FLOAT16),
    "the stage to write is not wrapped": Bug(
        TILE, "writing = writing + 1 == STAGES ? 0 : writing + 1;", "writing = writing + 1;",
        FAULT, "dw", FLOAT32, shape=Shape((2, 8, 5), padding=1)),
    "copies are not put into groups": Bug(
        TILE, "        end_group_of_copies();\n        multiply(", "        multiply(",
        FAULT, "dx", BFLOAT16),
    ".trans is left out": Bug(
        PTX, "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16", WRONG, "y", FLOAT16),
    ".trans is put in": Bug(
        PTX, "ldmatrix.sync.aligned.m8n8.x4.shared.b16",
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", WRONG, "dx", BFLOAT16),
    "A and B change places": Bug(
        TILE, "multiply_fragments(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1],",
        "multiply_fragments(sums[i][j], b[j / 2], a[i][j % 2 * 2], a[i][j % 2 * 2 + 1],",
        WRONG, "dw", FLOAT16),
    "the halves of B change places": Bug(
        TILE, "b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]",
        "b[j / 2][j % 2 * 2 + 1], b[j / 2][j % 2 * 2]", WRONG, "y", FLOAT32),
    "fragments of the wrong type": Bug(
        PTX, "m16n8k16.row.col.f32.bf16.bf16.f32", "m16n8k16.row.col.f32.f16.f16.f32",
        WRONG, "y", BFLOAT16),
    "padding is not zero": Bug(
        PTX, "int bytes = present ? 16 : 0;", "int bytes = 16;", WRONG, "y", FLOAT16),
    "y: the padding begins a column late": Bug(
        GEMM, "x < horizontal.size;", "x <= horizontal.size;",
        FAULT, "y", FLOAT16),
    "dw: the padding ends a row early": Bug(
        WEIGHTS, "iy >= 0 && iy < h", "iy > 0 && iy < h", WRONG, "dw", FLOAT32),
    "the gradient's phases are counted down the columns": Bug(
        GEMM, "gradient_axis(phase / across, h,", "gradient_axis(phase % across, h,",
        FAULT, "dx", FLOAT16, shape=STRIDED),
    "the gradient reads the outputs of another phase": Bug(
        GEMM, "a.start = (phase + pad - first * dilation) / stride;",
        "a.start = (pad - first * dilation) / stride;", WRONG, "dx", FLOAT16, shape=STRIDED),
    "the gradient takes the taps of another phase": Bug(
        GEMM, "int ky = vertical.first + k.ty", "int ky = k.ty",
        WRONG, "dx", FLOAT32, shape=STRIDED),
    "tf32 is cut off instead of rounded": Bug(
        TILE, "b[e / 4][e % 4] = round_to_tf32(b[e / 4][e % 4]);", ";", WRONG, "y", FLOAT32),
    "a corner is read before it is written": Bug(
        TENSOR, "        __syncwarp();\n        for (int u", "        for (int u",
        FAULT, "y", FLOAT16),
    "a corner is written before it is read": Bug(
        TENSOR, "        __syncwarp();\n        if (MOMENTS && !GRADIENT) {",
        "        if (MOMENTS && !GRADIENT) {", FAULT, "y", FLOAT16, tile=2),
    "y: results past the last are written": Bug(
        TENSOR, "if (row >= rows || result >= p.results) continue;", "if (row >= rows) continue;",
        FAULT, "y", FLOAT16),
    "dw: outputs past the last are written": Bug(
        WEIGHTS, "if (k < terms && o < outputs)", "if (k < terms)", FAULT, "dw", FLOAT16),
    "y: splits write the same slab": Bug(
        TENSOR, "partial += own.split * (", "partial += 0 * (", FAULT, "y", FLOAT16, splits=2),
    "dw: the slabs overlap": Bug(
        WEIGHTS, "slabs[((index_t)own.split * terms + k)",
        "slabs[((index_t)own.split * (terms - 1) + k)",
        FAULT, "dw", FLOAT32, splits=2),
    "y: a split ends where the next but one begins": Bug(
        GEMM, "min(start + share, stages)", "min(start + share + 1, stages)",
        WRONG, "y", FLOAT16, splits=2),
    "x is read from the first group": Bug(
        GEMM, "x_channels + group * terms + t.c", "x_channels + t.c",
        WRONG, "y", FLOAT16),
    "dw: x is read from the first group": Bug(
        WEIGHTS, "channel = own.group * inputs + term % inputs", "channel = term % inputs",
        WRONG, "dw", BFLOAT16),
    "the bias of the first channel of a piece": Bug(
        TENSOR, "finish(sum[e], bias, channel + e,", "finish(sum[e], bias, channel,",
        WRONG, "y", FLOAT32),
    "the bias of the first group": Bug(
        TENSOR, "finish(sum[e], bias, channel + e,", "finish(sum[e], bias, result + e,",
        WRONG, "y", FLOAT16),
    "wgmma: pieces do not change places": Bug(
        WGMMA, "(piece ^ (row & 7)) << 4", "piece << 4", WRONG, "y", FLOAT16, tile=5),
    "wgmma: atoms as far apart as blocks": Bug(
        WGMMA, "(ATOM_BYTES >> 4) << 32", "(BLOCK_BYTES >> 4) << 32", FAULT, "y", FLOAT16, tile=5),
    "wgmma: A is transposed instead of B": Bug(
        WGMMA, 'SUMS_32(0), SUMS_32(8) : "l"(a), "l"(b), "n"(A_COLUMNS), "n"(B_COLUMNS)',
        'SUMS_32(0), SUMS_32(8) : "l"(a), "l"(b), "n"(B_COLUMNS), "n"(A_COLUMNS)',
        FAULT, "y", FLOAT16, tile=5),
    "wgmma: both warpgroups take the same rows": Bug(
        WGMMA, "first = threadIdx.x / 128 * FRAGMENTS_M;", "first = 0;", WRONG, "dw", FLOAT16,
        shape=Shape((1, 5, 5), depth=4), tile=6),
    "wgmma: no fence before the products": Bug(
        WGMMA, 'asm volatile("wgmma.fence.sync.aligned;" ::: "memory");', "", FAULT, "y", FLOAT16,
        tile=5),
    "wgmma: copies are not shown to it": Bug(
        WGMMA, 'asm volatile("fence.proxy.async.shared::cta;" ::: "memory");', "", FAULT, "dx",
        FLOAT16, tile=5),
    "wgmma: a stage is written while it is multiplied": Bug(
        WGMMA, "wgmma.wait_group.sync.aligned 1;", "wgmma.wait_group.sync.aligned 2;", FAULT, "dw",
        FLOAT16, shape=Shape((2, 16, 16), (1, 1)), tile=5),
    "wgmma: sums are read before they are there": Bug(
        WGMMA, "wgmma.wait_group.sync.aligned 0;", "", WRONG, "y", FLOAT16, tile=5),
    "split sums get no bias": Bug(
        SPLITS, "finish(z, bias_or_null,", "finish(z, nullptr,", WRONG, "y", FLOAT16, splits=2),
}


def check(backend, result, dtype, shape, splits, tile):
    judge(backend, shape.case(dtype), tiled(tensor_tile(tile), splits), result)


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_a_planted_bug_is_caught(cupy_backend, bug):
    with caught(bug.file, bug.old, bug.new, bug.kind):
        check(cupy_backend, *bug[4:])


@pytest.mark.parametrize("case", {bug[4:]: None for bug in BUGS.values()}, ids=str)
def test_without_a_bug_the_same_cases_pass(cupy_backend, case):
    check(cupy_backend, *case)


def test_nan_that_is_lost_in_rounding_is_caught(cupy_backend):
    """A sum of integers, which is what cvt.rna does with other numbers, wraps around."""
    case = Shape((1, 1, 1), (1, 1)).case(FLOAT32)
    a, plan = arrays(case), tiled(tensor_tile(3))
    a["x"].view(np.uint32)[0, 0, 0, 1] = 0xFFFFFFFF
    judge(cupy_backend, case, plan, "y", a=a)
    with caught(PTX, "    return rounded;", "    return bits + 0x1000u;", WRONG) as error:
        judge(cupy_backend, case, plan, "y", a=a)
    assert "NaN in y" in str(error.value)
