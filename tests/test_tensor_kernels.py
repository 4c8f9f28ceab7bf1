"""The convolutions on tensor cores, each variant that can be chosen, against gpucnn.reference.

A variant is a tile, a type of elements, a type of indices, an activation and a pass; each is a
compilation of its own. Every tile meets every type, in every pass, on a shape that is ragged in
every direction. What does not depend on the tile is covered in pairs, not as a full product:
geometries with types, activations with types, splits with all of them.
"""
from __future__ import annotations

import itertools

import numpy as np
import pytest

from gpucnn.backend import cuda_kernel
from tests import gpusim
from tests.conftest import SIMULATED, needs_cupy, needs_simulator
from tests.convolution_judge import (
    TENSOR_DTYPES,
    Shape,
    arrays,
    as_factor,
    judge,
    judge_moments,
    launches,
    run,
    tensor_tile,
    tiled,
)
from tests.gpusim import fake_cupy
from tests.pairs import pairs

pytestmark = needs_cupy
FLOAT16, BFLOAT16, FLOAT32 = TENSOR_DTYPES
ACTIVATIONS = ("relu", "leaky_relu", "sigmoid", "tanh")


TILES, WGMMA = range(5), range(5, 8)  # by number: the lists themselves need CuPy
SMALL = 3
TILES_AND_TYPES = [
    *itertools.product(TILES, TENSOR_DTYPES), *((number, FLOAT16) for number in WGMMA),
    *((number, BFLOAT16) for number in (WGMMA[0], WGMMA[2]))]  # both widths of the instruction
HEIGHTS = {256: 1, 128: 3, 64: 5, 32: 3}  # divide a tile's rows and one


def tile_of(number):
    """As tensor_tile(); skips the test where the GPU has no such instruction."""
    import cupy

    if number in WGMMA and cupy.cuda.Device().compute_capability != "90":
        pytest.skip("wgmma needs sm_90")
    return tensor_tile(number)


def test_all_tiles_have_a_number():
    cuda = launches()
    assert (len(cuda.TENSOR_TILES), len(cuda.WGMMA_TILES)) == (len(TILES), len(WGMMA))


@pytest.mark.parametrize(("number", "dtype"), TILES_AND_TYPES, ids=str)
def test_each_tile_and_type_with_edges_in_every_direction(cupy_backend, number, dtype):
    """One row and one piece of columns more than a tile, and a sum that ends inside one.

    The sum takes fewer tiles of k than STAGES in y and dx, and more in most of dw; splits are some
    that do not divide it.
    """
    tile, piece = tile_of(number), 16 // dtype.itemsize
    height = HEIGHTS[tile.m]
    image, wide = (1, height, (tile.m + 1) // height), tile.n // piece + 1
    many, one = Shape(image, filters=wide, padding=1), Shape(image, depth=wide, padding=1)
    terms = Shape((1, 3, 3), (1, 1), depth=tile.m // piece + 1, filters=wide)
    for shape, passes in ((many, "y"), (one, "dx"), (terms, "dw")):
        judge(cupy_backend, shape.case(dtype), tiled(tile, 1, 2), passes)


@pytest.mark.parametrize(("number", "dtype"), TILES_AND_TYPES[:-2], ids=str)
def test_long_sums(cupy_backend, number, dtype):
    """12 tiles of k in y and dx, shared out among splits of which the last has less or nothing to
    do; in dw 5 tiles of 16-bit numbers, or 9."""
    shape = Shape((1, 9, 16), depth=5, filters=5, padding=1)
    judge(cupy_backend, shape.case(dtype), tiled(tile_of(number), 1, 5))


GEOMETRIES = {
    "1x1": Shape((2, 3, 5), (1, 1)),
    "one pixel": Shape((1, 1, 1), (1, 1), depth=2),
    "one pixel in much padding": Shape((1, 1, 1), (3, 3), padding=1),
    "more padding on one side": Shape((2, 4, 3), (2, 3), padding=((2, 0), (0, 1))),
    "stride with remainder": Shape((2, 8, 7), (3, 2), stride=(2, 3)),
    "stride past the kernel": Shape((1, 7, 8), (1, 2), stride=(3, 3)),
    "stride past the image": Shape((2, 2, 3), (1, 1), stride=(5, 4)),
    "dilation": Shape((1, 7, 6), (3, 2), dilation=(2, 3), padding=1),
    "dilation coprime to the stride": Shape((1, 9, 8), (3, 2), stride=(2, 3), dilation=(3, 2),
                                            padding=2),
    "dilation that is the stride": Shape((1, 9, 8), stride=(2, 3), dilation=(2, 3), padding=3),
    "dilation and stride with a common divisor": Shape((1, 15, 13), (3, 2), stride=(4, 6),
                                                       dilation=(6, 4), padding=2),
    "groups": Shape((2, 4, 3), depth=2, filters=3, groups=3, padding=1),
    "groups, stride and ragged images": Shape((3, 5, 5), (2, 2), depth=3, filters=2, groups=2,
                                              stride=(2, 2), padding=1),
    "a tile ends in each image": Shape((9, 2, 2), (2, 2), filters=5, padding=1),
    "many images within a stage": Shape((40, 1, 1), (1, 1)),
    "a stage ends in the midst of each image": Shape((9, 3, 3), padding=1),
    "a wide kernel": Shape((1, 6, 9), (5, 7), padding=3),
    "empty batch": Shape((0, 4, 4), padding=1),
}


@pytest.mark.parametrize("dtype", TENSOR_DTYPES, ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries(cupy_backend, name, dtype):
    case, number = GEOMETRIES[name].case(dtype), list(GEOMETRIES).index(name)
    judge(cupy_backend, case, tiled(tile_of((SMALL, 2)[number % 2]), 1, 3), a=arrays(case, number))


EPILOGUES = pairs(ACTIVATIONS, TENSOR_DTYPES, (1, 3), (("b", "residual"), ("b",), ("residual",)))


@pytest.mark.parametrize(("activation", "dtype", "splits", "added"), EPILOGUES,
                         ids=lambda v: "+".join(v) if isinstance(v, tuple) else str(v))
def test_bias_residual_and_activation(cupy_backend, activation, dtype, splits, added):
    case = Shape((2, 4, 5), (2, 2), filters=3, groups=2).case(dtype, activation, added)
    judge(cupy_backend, case, tiled(tile_of(SMALL), splits), "y")


@pytest.mark.parametrize(("number", "dtype"), TILES_AND_TYPES, ids=str)
def test_the_moments_that_y_leaves_are_those_of_its_stored_numbers(cupy_backend, number, dtype):
    """Of each band of rows, the last of which is ragged, and of channels in ragged columns."""
    case = Shape((2, 11, 13), (1, 1), filters=5, groups=2).case(dtype)
    a = arrays(case)
    a["b"] += 100  # the squares of what is far from 0 lose all digits unless its mean is taken off
    judge_moments(cupy_backend, case, *tiled(tile_of(number)), a, mean={"rtol": 1e-6},
                  squares={"rtol": 1e-4})


@pytest.mark.parametrize("dtype", [FLOAT16, FLOAT32], ids=str)
def test_64_bit_indices(cupy_backend, monkeypatch, dtype):
    monkeypatch.setattr(cuda_kernel, "MAX_INT_INDEX", -1)
    shape = Shape((2, 5, 4), (3, 2), depth=2, filters=5, groups=2, stride=(2, 1), padding=1)
    judge(cupy_backend, shape.case(dtype), tiled(tile_of(SMALL), 1, 2))


@needs_simulator
@pytest.mark.parametrize(("number", "dtype"), [
    *itertools.product((SMALL, 1), TENSOR_DTYPES), (WGMMA[0], FLOAT16)], ids=str)
def test_the_order_of_threads_changes_no_bit(cupy_backend, monkeypatch, number, dtype):
    case, results = Shape((2, 5, 7), depth=3, filters=5, padding=1).case(dtype), []
    for order in gpusim.engine.ORDERS:
        monkeypatch.setitem(fake_cupy.options, "order", order)
        results.append(run(cupy_backend, case, *tiled(tile_of(number), 2)))
    for other in results[1:]:
        for name, value in results[0].items():
            assert value.tobytes() == other[name].tobytes(), name


# ---- numbers that are not ordinary ---------------------------------------------------------------

# Ties of tf32, which go away from zero, into the next binade too and past the largest number;
# denormals; infinities; and each sign of a CPU's NaN, a GPU's, and some that others may make.
# (Signalling NaN with its payload in the 13 bits that tf32 drops may become infinite on a GPU.)
BITS = [0x3F800FFF, 0x3F801000, 0xBF801000, 0x3FFFF000, 0xBFFFFFFF, 0x40490FDB, 0x7F7FFFFF,
        0xFF7FFFFF, 0x7F7FE000, 0x00000FFF, 0x00001000, 0x807FFFFF, 0x00800FFF, 0x80000000,
        0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC01234,
        0xFF802000]


@pytest.mark.parametrize("dtype", TENSOR_DTYPES, ids=str)
@pytest.mark.parametrize(("result", "factor", "other", "longer"), [
    ("y", "x", "w", "image"), ("y", "w", "x", "filters"), ("dx", "dz", "w", "image"),
    ("dw", "x", "dz", "depth"), ("dw", "dz", "x", "filters")])
def test_numbers_that_are_not_ordinary(cupy_backend, result, factor, other, longer, dtype):
    """Each is a factor in one product with 1, in a sum of zeros else, on each side of each pass.

    What is done to y's sums on a GPU makes denormal numbers 0, for CuPy compiles with -ftz=true.
    """
    values = np.array(BITS, np.uint32).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        values = values if dtype == FLOAT32 else values.astype(dtype)
    piece = 16 // dtype.itemsize
    values = np.append(values, np.zeros(-len(values) % piece, dtype))
    n, places = len(values), (np.arange(len(values)), np.arange(len(values)) % piece)
    alone = np.zeros((n, piece), dtype)
    alone[places] = values
    shape = (Shape((1, 1, n), (1, 1)) if longer == "image" else
             Shape((1, 1, piece), (1, 1))._replace(**{longer: n // piece}))
    case = shape.case(dtype)
    a = {name: np.zeros_like(v) for name, v in arrays(case).items()}
    a[factor] = (alone if longer == "image" else alone.T).reshape(a[factor].shape)
    a[other] = np.eye(piece, dtype=dtype).reshape(a[other].shape)
    got = run(cupy_backend, case, *tiled(tile_of(SMALL)), a, (result,))[result]
    got = got.reshape(n, piece) if got.shape[-1] == piece else got.reshape(piece, n).T
    got, want = got[places].astype(np.float64), as_factor(values)
    if result == "y" and not SIMULATED:
        flushed = (got == 0) & (np.abs(want) < np.finfo(np.float32).smallest_normal)
        want = np.where(flushed, 0, want)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", TENSOR_DTYPES, ids=str)
def test_nan_and_infinity_reach_what_they_should_and_nothing_else(cupy_backend, dtype):
    shape = Shape((2, 7, 6), filters=2, depth=2, stride=(2, 1), padding=1)
    case, plans = shape.case(dtype), tiled(tile_of(SMALL), 1, 2)
    a = arrays(case)
    nan = np.float32(np.nan) if dtype != FLOAT32 else np.uint32(0xFFFFFFFF).view(np.float32)
    a["x"][0, 3, 2, 1], a["x"][1, 0, 5, 7], a["x"][1, 6, 0, 0] = nan, np.inf, -np.inf
    a["dz"][0, 1, 2, 1], a["dz"][1, 0, 5, 7] = nan, -np.inf
    a["residual"][1, 2, 2, 3] = -nan
    judge(cupy_backend, case, plans, a=a)
    a = arrays(case)
    a["w"][1, 2, 3, 4], a["w"][0, 0, 1, 2] = nan, np.inf
    a["b"][1] = np.nan
    judge(cupy_backend, shape.case(dtype, "relu"), plans[0], "y", a=a)


def test_sums_of_float16_may_pass_its_largest_number_on_the_way(cupy_backend):
    case = Shape((1, 1, 40), (1, 1), depth=8).case(FLOAT16, added=())
    a = arrays(case)
    a["x"][...], a["w"][...] = 250, 250
    for x, want in ((np.float16(250), np.inf), (np.float16(-250), 0)):
        a["x"][..., 32:] = x
        y = run(cupy_backend, case, *tiled(tile_of(SMALL)), a, ("y",))["y"]
        np.testing.assert_array_equal(y, np.full_like(y, want))


def test_bfloat16_has_the_range_of_float32(cupy_backend):
    case = Shape((1, 3, 8)).case(BFLOAT16)
    a = arrays(case)
    a["x"], a["dz"] = a["x"] * BFLOAT16.type(1e18), a["dz"] * BFLOAT16.type(1e-18)
    a["w"] = a["w"] * BFLOAT16.type(1e18)
    judge(cupy_backend, case, tiled(tile_of(SMALL)), a=a)
