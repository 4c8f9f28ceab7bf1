"""The convolution kernels, with each tile and each way to split, against gpucnn.reference.

Not the full product of what may be chosen: the variants are those of tests/variants.py, in which
each two choices meet, and each meets every geometry below.
"""
from __future__ import annotations

import numpy as np
import pytest

from gpucnn import activations
from gpucnn.backend import cuda_kernel
from tests import variants
from tests.conftest import needs_simulator
from tests.convolution_judge import (
    ALL_PASSES,
    Case,
    arrays,
    direct,
    gemm,
    judge,
    judge_activation_backward,
    judge_moments,
    launches,
)
from tests.gpusim import engine, fake_cupy

cuda = launches()
# x without channels, filter, options, groups.
GEOMETRIES = {
    "3x3": ((2, 5, 4), (3, 3), {"padding": 1}, 1),
    "grouped": ((1, 4, 5), (2, 3), {}, 3),
    "stride with a remainder": ((2, 6, 7), (3, 2), {"stride": (2, 3), "padding": ((1, 0), (0, 2))},
                                2),
    "stride over the filter": ((1, 8, 7), (2, 1), {"stride": 3}, 1),
    "dilation of the stride": ((1, 8, 7), (3, 3), {"stride": 2, "dilation": 2, "padding": 2}, 1),
    "a common divisor": ((1, 9, 9), (3, 2), {"stride": 6, "dilation": 4, "padding": 3}, 1),
    "coprime": ((1, 8, 9), (3, 2), {"stride": (2, 3), "dilation": (3, 2), "padding": (2, 1)}, 2),
    "smaller than the stride": ((2, 3, 2), (2, 3), {"stride": 5, "padding": ((1, 4), (2, 5))}, 1),
    "1x1": ((3, 4, 3), (1, 1), {}, 1),
    "one pixel": ((1, 1, 1), (3, 3), {"padding": 1}, 1),
    "no image": ((0, 4, 4), (3, 3), {"padding": 1}, 1),
}
TILED = variants.few_variants("conv_gemm.cu")
DIRECT = variants.few_variants("conv_direct.cu")


def small_cases(c, c_out, dtype, activation, depthwise=False):
    """Each geometry, with c and c_out channels a group; a bias and a residual with every second."""
    for number, (x, w, options, groups) in enumerate(GEOMETRIES.values()):
        groups = c if depthwise else groups
        channels = (c, c) if depthwise else (c * groups, c_out * groups)
        yield Case((*x, channels[0]), (*w, channels[1]), groups=groups, activation=activation,
                   bias=number % 2 == 0, residual=number % 4 < 2, dtype=dtype, **options)


def ragged_cases(tile, c, c_out, dtype, activation):
    """More rows, columns and terms than a tile has, and not a multiple of it; and one column less.

    c, c_out: what the numbers of channels are multiples of.
    """
    m, n = cuda.TILES[tile].m, cuda.TILES[tile].n
    common = {"activation": activation, "bias": True, "dtype": dtype}
    yield "y", Case((1, 3, m // 3 + 2, c), (3, 1, n + c_out), padding=(1, 0), **common)
    yield "y", Case((1, 2, 3, c), (2, 2, n - c_out), **common)
    yield "dx", Case((1, 3, m // 3 + 2, n + c), (1, 3, c_out), padding=1, **common)
    yield "dw", Case((1, 4, 5, m // 4 + c), (2, 2, n + c_out), **common)


def wants(variant, monkeypatch):
    """dtype, activation, and 64-bit offsets where the variant has them."""
    if variant.index_t == np.int64:
        monkeypatch.setattr(cuda_kernel, "MAX_INT_INDEX", -1)
    code = dict(variant.constants).get("ACTIVATION", 0)
    return variant.scalar_t, activations.NAMES[code - 1] if code else None


def assert_launched(kernel, variant):
    """That this variant of it was among those compiled. What has no name in it may be anything.

    MOMENTS too: they have a test of their own.
    """
    def same(other):
        constants = {n: v for n, v in other.constants if n != "MOMENTS"}
        wanted = {n: v for n, v in variant.constants if n in constants}
        return (other[:4], constants) == (variant[:4], wanted)

    assert any(same(key[2]) for key in kernel._compiled), variant


def named_by(variant):
    constants = dict(variant.constants)
    shape = f"{constants['TILE_M']}x{constants['TILE_N']}" if "TILE_M" in constants else \
        "depthwise" if constants["DEPTHWISE"] else "few-channels"
    return f"{shape}-{variant.vec}-{variant.scalar_t}-{variant.index_t}"


@pytest.mark.parametrize("variant", TILED, ids=named_by)
def test_matrix_products(cupy_backend, monkeypatch, variant):
    dtype, activation = wants(variant, monkeypatch)
    constants = dict(variant.constants)
    tile = [t["TILE_M"] * t["TILE_N"] for t in variants.TILES].index(
        constants["TILE_M"] * constants["TILE_N"])
    c, c_out = 4 if variant.vec == 4 else 3, 4 if constants["VEC_N"] == 4 else 5
    for number, case in enumerate(small_cases(c, c_out, dtype, activation)):
        for each, result in enumerate(ALL_PASSES):
            # Three splits have one stage too few in the smallest cases: some have nothing to add.
            judge(cupy_backend, case, gemm(tile, 3 if (number + each) % 2 else 1), result)
    for result, case in ragged_cases(tile, c, c_out if c_out == 4 else 1, dtype, activation):
        judge(cupy_backend, case, gemm(tile), result)
    assert_launched(cuda._forward, variant)
    assert_launched(cuda._weight_gradient, variant)
    back = variant._replace(vec=constants["VEC_N"],  # what lies side by side changes places
                            constants=tuple({**constants, "VEC_N": variant.vec,
                                             "ACTIVATION": 0}.items()))
    assert_launched(cuda._input_gradient, back)


@pytest.mark.parametrize("variant", DIRECT, ids=named_by)
def test_direct_kernels(cupy_backend, monkeypatch, variant):
    dtype, activation = wants(variant, monkeypatch)
    depthwise, number = dict(variant.constants)["DEPTHWISE"], DIRECT.index(variant)
    c_out = 2 * variant.vec if variant.vec > 1 else 5
    for case in small_cases(c_out if depthwise else 1, c_out, dtype, activation, depthwise):
        if not depthwise:  # one to four channels in one group
            channels = 1 + number % 4
            case = case._replace(x=(*case.x[:3], channels), groups=1,
                                 w=(*case.w[:2], case.w[2] // case.groups))
        judge(cupy_backend, case, direct(), *(("y", "dx") if depthwise else ("y",)))
        judge(cupy_backend, case, direct(1 + number % 3), "dw")
    for kernel in (cuda._direct, cuda._direct_weight_gradient)[:1 if activation else 2]:
        assert_launched(kernel, variant)


def test_direct_kernels_of_more_channels_and_terms_than_a_block_has(cupy_backend):
    wide = Case((1, 3, 2, 3), (2, 3, 259), padding=1)
    judge(cupy_backend, wide, direct(2), "dw")
    deep = Case((1, 3, 3, 260), (2, 2, 260), groups=260, padding=1)
    judge(cupy_backend, deep, direct(2))


@pytest.mark.parametrize("variant", variants.few_variants("activation.cu"),
                         ids=lambda v: f"{v.vec}-{v.scalar_t}-{v.index_t}")
def test_activation_backward(cupy_backend, monkeypatch, variant):
    dtype, activation = wants(variant, monkeypatch)
    vec = variant.vec
    few, many = 3 if vec == 1 else vec, 260 if vec == 1 else 264 * vec
    for shape in ((1, few), (2, 3, 5, few), (3, many), (2 * 16 * 256, few), (0, 4, 4, few)):
        judge_activation_backward(cupy_backend, shape, activation, dtype)
        judge_activation_backward(cupy_backend, shape, activation, dtype, bias=False)


@pytest.mark.parametrize("odd", ["z", "other"])
def test_what_is_added_may_lie_at_an_odd_address(cupy_backend, odd):
    values = dict(zip(("z", "other"), np.random.default_rng(0).integers(-9, 9, (2, 5, 8))))
    there = {name: cupy_backend.asarray(v, np.float32) for name, v in values.items()}
    there[odd] = cupy_backend.asarray(np.append(0, values[odd]), np.float32)[1:].reshape(5, 8)
    assert there[odd].data.ptr % 16
    a = cupy_backend.activate(there["z"], there["other"], "relu")
    np.testing.assert_array_equal(cupy_backend.to_numpy(a),
                                  np.maximum(values["z"] + values["other"], 0))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("tile", range(len(cuda.TILES)))
def test_the_moments_of_each_band_of_rows(cupy_backend, tile, dtype):
    """Of more rows and columns than a tile has; two groups, whose columns end inside one."""
    m, n = cuda.TILES[tile].m, cuda.TILES[tile].n
    case = Case((1, 3, m // 3 + 2, 4), (1, 1, 2 * n + 6), groups=2, bias=True, activation="relu",
                dtype=np.dtype(dtype))
    judge_moments(cupy_backend, case, gemm(tile), mean={"rtol": 1e-5, "atol": 1e-5},
                  squares={"rtol": 1e-4, "atol": 1e-4})


# ---- the same bits ----------------------------------------------------------------------------

SAME = Case((2, 7, 6, 6), (3, 3, 10), stride=(1, 2), padding=1, groups=2, bias=True)


def bits_of(results):
    return {name: a.tobytes() for name, a in results.items()}


@needs_simulator
@pytest.mark.parametrize("tile", range(len(cuda.TILES)))
def test_no_order_of_threads_changes_a_bit(cupy_backend, monkeypatch, tile):
    """Nor does any race show, which the simulator would report."""
    results = []
    for order in engine.ORDERS:
        monkeypatch.setitem(fake_cupy.options, "order", order)
        results.append(bits_of(judge(cupy_backend, SAME, gemm(tile, 2))))
    assert results[0] == results[1] == results[2]


def test_two_launches_give_the_same_bits(cupy_backend):
    few = SAME._replace(x=(2, 7, 6, 2), groups=1)
    for case, plan in ((SAME, gemm(0, 2)), (SAME, gemm(3, 3)), (few, direct(3))):
        passes = ("y", "dw") if plan.algorithm == "direct" else ALL_PASSES
        one, other = (bits_of(judge(cupy_backend, case, plan, *passes)) for _ in range(2))
        assert one == other
    bits = {tuple(cupy_backend.to_numpy(a).tobytes() for a in judge_activation_backward(
        cupy_backend, (2000, 8), "tanh", np.dtype(np.float32))) for _ in range(2)}
    assert len(bits) == 1


# ---- what is not finite, far away or not aligned ----------------------------------------------

@pytest.mark.filterwarnings("ignore:invalid value")  # infinity times zero, in the reference
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (2, 4), (1, 3)])
def test_a_weight_that_is_not_finite_stays_with_the_pixels_that_it_saw(cupy_backend, value, stride,
                                                                       dilation):
    """dz has zeros of both signs, whose products with it are NaN."""
    for channels, c_out, groups in ((4, 4, 1), (3, 6, 3)):
        case = Case((1, 6, 5, channels), (3, 3, c_out), stride, 3, dilation, groups,
                    odd_weight=value)
        judge(cupy_backend, case, gemm(3))
        judge(cupy_backend, case, gemm(3, 2), "dx")


def test_a_channel_of_nan_stays_in_its_group(cupy_backend):
    case = Case((1, 4, 4, 8), (3, 3, 12), padding=1, groups=4)
    a = {name: cupy_backend.asarray(v) for name, v in arrays(case).items()}
    a["x"][..., 2:4], a["dz"][..., 3:6] = np.nan, np.nan
    y = cuda.forward(case.problem, gemm(3), a["x"], a["w"], None, None, None)
    dx = cuda.input_gradient(case.problem, gemm(3), a["dz"], a["w"])
    dw = cupy_backend.empty(a["w"].shape, np.float32)
    cuda.weight_gradient(case.problem, gemm(3), a["x"], a["dz"], dw)
    for result, size in ((y, 3), (dx, 2), (dw, 3)):
        nan = np.isnan(cupy_backend.to_numpy(result)).reshape(-1, 4, size)
        assert nan[:, 1].all()
        assert not nan[:, [0, 2, 3]].any()


@pytest.mark.parametrize("plan", [gemm(3), direct()], ids=str)
def test_images_past_2_to_the_31_elements(cupy_backend, plan):
    """Zeros of which hardly any page is touched: few windows, far apart."""
    xp, case = cupy_backend.xp, Case((2, 65536, 32768, 1), (1, 1, 2), (65535, 32767))
    x, w = xp.zeros(case.x, np.float32), cupy_backend.asarray(np.float32([[[[2, -3]]]]))
    x[1, 65535, 32767, 0] = 5
    y = cupy_backend.to_numpy(cuda.forward(case.problem, plan, x, w, None, None, None))
    assert y[1, 1, 1].tolist() == [10, -15]
    assert not y.reshape(-1)[:-2].any()
    dz, dw = cupy_backend.asarray(np.ones_like(y)), cupy_backend.empty(w.shape, np.float32)
    cuda.weight_gradient(case.problem, plan, x, dz, dw)
    assert cupy_backend.to_numpy(dw).ravel().tolist() == [5, 5]


def test_outputs_past_2_to_the_31_elements_are_read(cupy_backend):
    """Nearly all of them saw nothing but padding, and only the others are read."""
    xp, case = cupy_backend.xp, Case((2, 1, 1, 1), (1, 1, 1), padding=((0, 65535), (0, 32767)))
    dz = xp.zeros((2, 65536, 32768, 1), np.float32)
    dz[1, 0, 0, 0] = 5
    w = cupy_backend.asarray(np.float32([[[[2]]]]))
    for plan in (gemm(3), direct()):
        dx = cuda.input_gradient(case.problem, plan, dz, w)
        assert cupy_backend.to_numpy(dx).ravel().tolist() == [0, 10]


@pytest.mark.parametrize("plan", [gemm(3), gemm(3, 2), direct()], ids=str)
@pytest.mark.parametrize("moved", ["x", "w", "dz"])
def test_a_misaligned_view_is_read_one_by_one(cupy_backend, plan, moved):
    case = Case((2, 4, 5, 4), (3, 3, 8), padding=1)
    a = {name: cupy_backend.asarray(v) for name, v in arrays(case).items()}
    straight = run_all(cupy_backend, case, plan, a)
    store = cupy_backend.xp.zeros(a[moved].size + 1, np.float32)
    store[1:] = a[moved].reshape(-1)
    a[moved] = store[1:].reshape(a[moved].shape)
    assert a[moved].data.ptr % 16
    for got, want in zip(run_all(cupy_backend, case, plan, a), straight):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def run_all(backend, case, plan, a):
    """y, dw, and dx unless a direct kernel were to compute it, which is for depthwise ones."""
    dw = backend.empty(a["w"].shape, np.float32)
    cuda.weight_gradient(case.problem, plan, a["x"], a["dz"], dw)
    results = [cuda.forward(case.problem, plan, a["x"], a["w"], None, None, None), dw]
    if plan.algorithm != "direct":
        results.append(cuda.input_gradient(case.problem, plan, a["dz"], a["w"]))
    return [backend.to_numpy(r) for r in results]
