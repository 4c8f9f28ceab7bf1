"""GELU to a few units in the last place, on both backends; and bugs planted in its kernels."""
from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from gpucnn import reference
from gpucnn.backend import cuda_kernel, gelu
from tests.cases import unit_roundoff
from tests.conftest import needs_simulator
from tests.gpusim.mutation import caught

ROUNDINGS = 12  # that a result may be off by: CUDA promises P to 5 units
DTYPES = [np.dtype(d) for d in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)]


def points(dtype, largest, n=2052):
    """Near 0, on both sides, and to the left as far as what is left of it can be stored."""
    near = np.random.default_rng(0).standard_normal(n) * np.geomspace(0.01, 1, n)
    return np.concatenate([near, [0, -0.0, largest, 30], -np.linspace(0, largest, 500)]
                          ).astype(dtype)


def check_gelu(backend, dtype=DTYPES[0], roundings=ROUNDINGS):
    """float64 to within what the reference itself is off: see tests/cases.py."""
    largest = 3 if dtype == np.float16 else 11.9
    x = points(dtype, largest)
    dy = np.random.default_rng(1).standard_normal(x.shape).astype(dtype)
    there = backend.asarray(x), backend.asarray(dy)
    y, dx = (backend.to_numpy(a) for a in (backend.gelu(there[0]),
                                           backend.gelu_backward(there[1], there[0])))
    assert y.dtype == dx.dtype == dtype
    wide, dwide = x.astype(np.float64), dy.astype(np.float64)
    off = unit_roundoff(dtype) * (roundings + (2 * wide**2 if dtype == np.float64 else 0))
    tiny = float(ml_dtypes.finfo(dtype).smallest_normal) * unit_roundoff(dtype)
    want = reference.gelu(wide)
    assert (np.abs(y.astype(np.float64) - want) <= off * np.abs(want) + tiny).all()
    want = reference.gelu_backward(dwide, wide)
    size = np.abs(want) + 0.4 * np.abs(dwide * wide) * np.exp(-wide**2 / 2)
    assert (np.abs(dx.astype(np.float64) - want) <= off * size + tiny).all()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_within_a_few_units_of_the_last_place(backend, dtype):
    check_gelu(backend, dtype)


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_16_bits_are_rounded_once(cupy_backend, dtype):
    check_gelu(cupy_backend, dtype, roundings=1.01)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_torch_agrees(backend, dtype):
    """torch adds erf to 1: on the left it is off by a rounding of 1."""
    torch = pytest.importorskip("torch")
    x = points(dtype, 11.9)
    leaf = torch.tensor(x.astype(np.float64)).requires_grad_()
    y64 = torch.nn.functional.gelu(leaf)
    y64.sum().backward()
    y = backend.to_numpy(backend.gelu(backend.asarray(x)))
    dx = backend.to_numpy(backend.gelu_backward(backend.asarray(np.ones_like(x)),
                                                backend.asarray(x)))
    for got, want in ((y, y64.detach()), (dx, leaf.grad)):
        np.testing.assert_allclose(got, want.numpy(), rtol=8 * unit_roundoff(dtype), atol=4e-16
                                   if dtype == np.float64 else 1e-7 * dtype.itemsize)


def test_nan_stays_and_infinities_give_the_limits(backend):
    """Past 40, and where x^2 overflows, without a warning."""
    x = backend.asarray([-np.inf, -1e30, -41, 41, 1e30, np.inf, np.nan], np.float32)
    y = backend.to_numpy(backend.gelu(x))
    np.testing.assert_array_equal(y, np.float32([0, 0, 0, 41, 1e30, np.inf, np.nan]))
    dx = backend.to_numpy(backend.gelu_backward(backend.xp.full_like(x, 3), x))
    np.testing.assert_array_equal(dx, np.float32([0, 0, 0, 3, 3, 3, np.nan]))


def test_the_parts_of_a_block_join(monkeypatch):
    from gpucnn.backend import make_backend
    backend, x = make_backend("numpy"), points(DTYPES[0], 11.9)
    whole = backend.gelu(x), backend.gelu_backward(x, x)
    monkeypatch.setattr(gelu, "_PART", 100)
    for before, now in zip(whole, (backend.gelu(x), backend.gelu_backward(x, x))):
        np.testing.assert_array_equal(now, before)


def test_64_bit_offsets_give_the_same(cupy_backend, monkeypatch):
    monkeypatch.setattr(cuda_kernel, "MAX_INT_INDEX", -1)
    check_gelu(cupy_backend)


def test_a_thread_takes_more_than_one_step(cupy_backend, monkeypatch):
    monkeypatch.setattr(cuda_kernel, "MAX_GRID", 1)
    check_gelu(cupy_backend)


def test_a_misaligned_view_is_read_number_by_number(cupy_backend):
    x = points(DTYPES[0], 11.9, 2000)
    there = cupy_backend.asarray(x)[1:1 + 2000]
    assert there.data.ptr % 16
    np.testing.assert_allclose(cupy_backend.to_numpy(cupy_backend.gelu(there)),
                               reference.gelu(x[1:2001]), rtol=1e-6)


BUGS = {
    "a step too far": ("gelu.cu", "(index_t)((size + VEC - 1) / VEC)) {\n        Scalars s",
                       "(index_t)((size + VEC - 1) / VEC + 1)) {\n        Scalars s"),
    "the backward pass too": ("gelu.cu", "(index_t)((size + VEC - 1) / VEC)) {\n        Scalars g",
                              "(index_t)((size + VEC - 1) / VEC + 1)) {\n        Scalars g"),
    "only the first of a vector": ("gelu.cu", "v < VEC", "v < 1"),
    "the distribution alone": ("gelu.cu", "(z * normcdf(z))", "(normcdf(z))"),
    "the digits on the left": ("gelu.cu", "z * normcdf(z))",
                               "z * (accum_t)0.5 * (1 + erf(z * (accum_t)0.70710678118654752)))"),
    "the slope of the distribution": ("gelu.cu", "z * density(z)", "density(z)"),
    "no slope": ("gelu.cu", " + z * density(z)", ""),
    "the wrong bell": ("gelu.cu", "exp(-square / 2)", "exp(-square)"),
    "a bell without its height": ("gelu.cu", "(accum_t)0.39894228040143267794 * ", ""),
    "what rounding took": ("gelu.cu", " * (1 - lost / 2)", ""),
    "dy is left out": ("gelu.cu", "(accum_t)g.at[v] * (normcdf", "(normcdf"),
}


@needs_simulator
@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_a_planted_bug_is_caught(cupy_backend, bug):
    with caught(*bug):
        check_gelu(cupy_backend)


@needs_simulator
@pytest.mark.parametrize("bug", {
    "minus infinity": ("gelu.cu", "z = z < -(accum_t)FAR ? -(accum_t)FAR : z;", ""),
    "NaN is far away": ("gelu.cu", "z < -(accum_t)FAR ? -(accum_t)FAR : z;",
                        "z >= -(accum_t)FAR ? z : -(accum_t)FAR;"),
    "infinity": ("gelu.cu", ": z > (accum_t)FAR ? (accum_t)FAR : z", ": z"),
}.values())
def test_a_bug_far_away_is_caught(cupy_backend, bug):
    with caught(*bug):
        test_nan_stays_and_infinities_give_the_limits(cupy_backend)
