"""Inline PTX in the simulator: each instruction against NumPy."""
from __future__ import annotations

import numpy as np
import pytest

from tests.conftest import needs_compiler
from tests.gpusim import fake_cupy
from tests.ptx import (
    F32,
    I32,
    U16,
    U32,
    Result,
    assert_nvrtc_accepts,
    launch,
    on_each_device,
    random,
    words,
)

pytestmark = needs_compiler

MMA = r"""
extern "C" __global__ void NAME(const u32* a, const u32* b, const float* c, float* d) {
    int i = blockIdx.x * 32 + threadIdx.x;
    float e[4] = {c[4 * i], c[4 * i + 1], c[4 * i + 2], c[4 * i + 3]};
    asm volatile("OPCODE {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
                 : "+f"(e[0]), "+f"(e[1]), "+f"(e[2]), "+f"(e[3])
                 : "r"(a[4 * i]), "r"(a[4 * i + 1]), "r"(a[4 * i + 2]), "r"(a[4 * i + 3]),
                   "r"(b[2 * i]), "r"(b[2 * i + 1]));
    for (int r = 0; r < 4; r++) d[4 * i + r] = e[r];
}
"""
LDMATRIX = r"""
extern "C" __global__ void NAME(const u32* x, u32* y) {
    __shared__ __align__(16) u32 tile[N * 32];
    for (int i = threadIdx.x; i < N * 32; i += 32) tile[i] = x[i];
    __syncthreads();
    u32 r[4] = {}, lane = threadIdx.x;
    u32 row = (u32)__cvta_generic_to_shared(tile) + lane % (8 * N) * 16;
    LDMATRIX("OPCODE {REGISTERS}, [%4];", r, row);
    for (int i = 0; i < N; i++) y[i * 32 + lane] = r[i];
}
"""


def ldmatrix(n, opcode):
    name = f"ldmatrix_x{n}" + "_trans" * ("trans" in opcode)
    registers = ", ".join(f"%{i}" for i in range(n))
    return LDMATRIX.replace("NAME", name).replace("N *", f"{n} *").replace("* N", f"* {n}").replace(
        "i < N", f"i < {n}").replace("OPCODE", opcode).replace("REGISTERS", registers)


# One kernel for each instruction, or kind of them. Lane l works on registers [l].
INSTRUCTIONS = r"""
typedef unsigned short u16;
typedef unsigned u32;

#define LDMATRIX(TEMPLATE, TO, ROW)  /* a statement in a macro, as kernels may have it */ \
    asm volatile(TEMPLATE                                                                 \
                 : "=r"(TO[0]), "+r"(TO[1]), "+r"(TO[2]), "+r"(TO[3]) : "r"(ROW))

extern "C" __global__ void mma_f16_k8(const u32* a, const u32* b, const float* c, float* d) {
    int i = blockIdx.x * 32 + threadIdx.x;
    float e[4];
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "  // two literals, "=f" beside "f"
        "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"
        : "=f"(e[0]), "=f"(e[1]), "=f"(e[2]), "=f"(e[3])
        : "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(b[i]), "f"(c[4 * i]), "f"(c[4 * i + 1]),
          "f"(c[4 * i + 2]), "f"(c[4 * i + 3]));
    for (int r = 0; r < 4; r++) d[4 * i + r] = e[r];
}

// Through registers and back by each width.
extern "C" __global__ void copy(const float* x, float* y) {
    __shared__ __align__(16) float tile[128];
    u32 at = (u32)__cvta_generic_to_shared(tile), t = threadIdx.x, p, q, r, s;
    asm("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
        : "=r"(p), "=r"(q), "=r"(r), "=r"(s) : "l"(x + 4 * t));
    asm volatile("st.shared.v2.b32 [%0], {%2, %3};\n\tst.shared.b32 [%0 + 8], %4; "
                 "st.shared.u32 [%0+%1], %5;"
                 :: "r"(at + 16 * t), "n"(12), "r"(p), "r"(q), "r"(r), "r"(s) : "memory");
    __syncthreads();
    float f[4];
    t ^= 1;
    asm volatile("{ .reg .b16 low, high; ld.shared.v2.f32 {%0, %1}, [%4]; "
                 "ld.shared.f32 %2, [%4+8]; ld.shared.u16 low, [%4+12]; "
                 "ld.shared.b16 high, [%4+14]; mov.b32 %3, {low, high}; }"
                 : "=f"(f[0]), "=f"(f[1]), "=f"(f[2]), "=f"(f[3]) : "r"(at + 16 * t));
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" :: "l"(y + 4 * t), "f"(f[0]),
                 "f"(f[1]), "f"(f[2]), "f"(f[3]) : "memory");
}

extern "C" __global__ void convert(const float* x, u32* y, int n) {
    int i = threadIdx.x;
    float f = x[i], g = x[n - 1 - i], from_half, larger;
    u16 half, bfloat;
    u32 halves, bfloats, tf32, laneid;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(f));
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bfloat) : "f"(f));
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(halves) : "f"(f), "f"(g));
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bfloats) : "f"(f), "f"(g));
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(tf32) : "f"(f));
    asm("cvt.f32.f16 %0, %1;" : "=f"(from_half) : "h"(half));
    asm("max.NaN.f32 %0, %1, 0f3F800000;" : "=f"(larger) : "f"(f));
    asm("{ .reg .pred p; .reg .b32 t;\n"
        "  mov.u32 t, %%laneid;  // a comment\n"
        "  setp.ne.b32 p, t, 3;\n"
        "  @!p mov.b32 t, 0x40;\n"
        "  @p mov.b32 t, 7;\n"
        "  mov.b32 %0, t; }" : "=r"(laneid));
    asm volatile("" : "+f"(f) :: "memory");
    y[i] = half; y[n + i] = bfloat; y[2 * n + i] = halves; y[3 * n + i] = bfloats;
    y[4 * n + i] = tf32; y[5 * n + i] = __float_as_uint(from_half);
    y[6 * n + i] = __float_as_uint(larger); y[7 * n + i] = laneid;
    y[8 * n + i] = __float_as_uint(f);
}

extern "C" __global__ void copy_async(const unsigned char* x, unsigned char* y, int keep) {
    extern __shared__ __align__(16) unsigned char bytes[];
    u32 at;
    asm("{ .reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t; }"
        : "=r"(at) : "l"(bytes + 48 * threadIdx.x));
    const unsigned char* from = x + 48 * threadIdx.x;
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n"
                 "cp.async.ca.shared.global [%0+16], [%1+16], %3;\n"
                 "cp.async.ca.shared::cta.global [%0+32], [%1+32], 8, %2;"
                 :: "r"(at), "l"(from), "r"(keep), "n"(16) : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory");
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4; cp.async.ca.shared.global [%0+4], "
                 "[%1+4], 4, 0;" :: "r"(at + 40), "l"(from + 40) : "memory");
    asm volatile("cp.async.wait_all;" ::: "memory");
    for (int i = 0; i < 48; i++) y[48 * threadIdx.x + i] = bytes[48 * threadIdx.x + i];
}
""" + "".join([
    *(MMA.replace("NAME", name).replace("OPCODE", f"mma.sync.aligned.{shape}") for name, shape in {
        "mma_f16": "m16n8k16.row.col.f32.f16.f16.f32",
        "mma_bf16": "m16n8k16.row.col.f32.bf16.bf16.f32",
        "mma_tf32": "m16n8k8.row.col.f32.tf32.tf32.f32"}.items()),
    *(ldmatrix(n, f"ldmatrix.sync.aligned.m8n8.x{n}{trans}.{space}.b16")
      for n, space in ((1, "shared"), (2, "shared"), (4, "shared::cta"))
      for trans in ("", ".trans"))])


def fragments(a, b, c, kind):
    """The registers that each lane holds, by the tables of the PTX ISA, for (..., rows, columns).

    m16n8k16 (.f16, .bf16): a_i in row g where i < 2 or 4 <= i < 6, else g + 8; in column
    2 t + (i & 1), + 8 where i >= 4. b_i in row 2 t + (i & 1), + 8 where i >= 2; in column g.
    m16n8k8 (.f16): a_i in row g where i < 2, else g + 8, in column 2 t + (i & 1).
    m16n8k8 (.tf32): a_i in row g for a0 and a2, else g + 8; in column t for a0 and a1, else t + 4.
    b_i in row t, + 4 for b1. c_i in row g where i < 2, else g + 8, in column 2 t + (i & 1).
    """
    lane = np.arange(32)[:, None]
    g, t = lane // 4, lane % 4
    i = np.arange(a.shape[-1] * 16 // 32)
    j = np.arange(a.shape[-1] * 8 // 32)
    if kind == "tf32":
        a_row, a_column = g + 8 * np.isin(i, (1, 3)), t + 4 * (i >= 2)
        b_row = t + 4 * (j == 1)
    else:
        second = np.isin(i, (2, 3, 6, 7)) if len(i) == 8 else i >= 2
        a_row, a_column = g + 8 * second, 2 * t + (i & 1) + 8 * (i >= 4)
        b_row = 2 * t + (j & 1) + 8 * (j >= 2)
    k = np.arange(4)
    return (words(a[..., a_row, a_column], kind), words(b[..., b_row, g + 0 * j], kind),
            np.ascontiguousarray(c[..., g + 8 * (k >= 2), 2 * t + (k & 1)]))


def from_fragments(d):
    """(..., 32, 4) accumulators as (..., 16, 8) matrices."""
    d = d.reshape(-1, 8, 4, 2, 2)  # g, t, upper or lower half, column
    return d.transpose(0, 3, 1, 2, 4).reshape(-1, 16, 8)


def multiply(name, a, b, c, device=fake_cupy):
    kind = name.split("_")[1]
    d = launch(INSTRUCTIONS, name, len(a), 32, *fragments(a, b, c, kind),
               Result((len(a), 32, 4), F32), device=device)
    return from_fragments(d)


MMAS = {"mma_f16": 16, "mma_bf16": 16, "mma_tf32": 8, "mma_f16_k8": 8}


@pytest.mark.parametrize(("name", "k"), MMAS.items())
@on_each_device
def test_mma(device, name, k):
    a, b, c = random(5, 16, k), random(5, k, 8, seed=1), random(5, 16, 8, seed=2)
    np.testing.assert_array_equal(multiply(name, a, b, c, device), a @ b + c)


@pytest.mark.parametrize(("name", "k"), MMAS.items())
@on_each_device
def test_each_element_of_a_and_b_has_its_place(device, name, k):
    """One-hot: a with a 1 at (i, k) brings row k of b to row i; the same for b."""
    one_a = np.eye(16 * k, dtype=F32).reshape(-1, 16, k)
    one_b = np.eye(8 * k, dtype=F32).reshape(-1, k, 8)
    for a, b in ((one_a, np.broadcast_to(random(k, 8), (16 * k, k, 8))),
                 (np.broadcast_to(random(16, k), (8 * k, 16, k)), one_b)):
        np.testing.assert_array_equal(
            multiply(name, a, b, np.zeros((len(a), 16, 8), F32), device), a @ b)


def test_tf32_operands_lose_their_low_bits():
    a, b = np.full((1, 16, 8), 1 + 2**-10 + 2**-11, F32), np.ones((1, 8, 8), F32)
    d = multiply("mma_tf32", a, b, np.zeros((1, 16, 8), F32))
    np.testing.assert_array_equal(d, 8 * (1 + 2**-10))


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", "_trans"])
@on_each_device
def test_ldmatrix(device, n, trans):
    matrices = np.arange(n * 64, dtype=U16).reshape(n, 8, 8)
    y = launch(INSTRUCTIONS, f"ldmatrix_x{n}{trans}", 1, 32, matrices.view(U32).ravel(),
               Result((n * 32,), U32), device=device)
    expected = matrices.swapaxes(1, 2) if trans else matrices
    np.testing.assert_array_equal(y.view(U16).reshape(n, 8, 8), expected)


@on_each_device
def test_loads_and_stores(device):
    x = random(128)
    np.testing.assert_array_equal(
        launch(INSTRUCTIONS, "copy", 1, 32, x, Result((128,), F32), device=device), x)


def bfloat16(x):
    """Rounded to 8 significant bits, to nearest even, as the upper half of a float32."""
    mantissa, exponent = np.frexp(x.astype(np.float64))
    rounded = np.ldexp(np.rint(mantissa * 2**8), exponent - 8).astype(F32)
    bits = (rounded.view(U32) >> 16).astype(U16)
    return np.where(np.isnan(x), 0x7FFF, bits).astype(U16)


@pytest.mark.filterwarnings("ignore:overflow")
@on_each_device
def test_conversions(device):
    rng = np.random.default_rng(0)
    x = np.concatenate([
        np.array([0, -0.0, 1, -2, np.inf, -np.inf, np.nan, 65504, 65519, 65520, -1e30, 1 + 2**-11,
                  1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8, 2**-14, 2**-24, 2**-25, 3 * 2**-25,
                  -(2**-15) - 2**-25, 1 + 2**-11 + 2**-23, 3.0e38], F32),
        rng.standard_normal(500).astype(F32) * 10.0**rng.integers(-8, 6, 500).astype(F32)])
    n = len(x)
    half, bfloat, halves, bfloats, tf32, back, larger, lane, same = launch(
        INSTRUCTIONS, "convert", 1, n, x, Result((9, n), U32), I32(n), device=device)
    as_half = np.where(np.isnan(x), U16(0x7FFF), x.astype(np.float16).view(U16)).astype(U32)
    np.testing.assert_array_equal(half, as_half)
    np.testing.assert_array_equal(bfloat, bfloat16(x))
    np.testing.assert_array_equal(halves, as_half << 16 | as_half[::-1])
    np.testing.assert_array_equal(
        bfloats, bfloat16(x).astype(U32) << 16 | bfloat16(x)[::-1].astype(U32))
    np.testing.assert_array_equal(back.view(F32), x.astype(np.float16).astype(F32))
    np.testing.assert_array_equal(larger.view(F32), np.maximum(x, 1))
    np.testing.assert_array_equal(same, x.view(U32))
    np.testing.assert_array_equal(lane, np.where(np.arange(n) % 32 == 3, 64, 7))
    mantissa, exponent = np.frexp(x.astype(np.float64))
    away = np.copysign(np.floor(abs(mantissa) * 2**11 + 0.5), x)
    expected = np.ldexp(away, exponent - 11).astype(F32)
    np.testing.assert_array_equal(tf32.view(F32), expected)


@pytest.mark.parametrize("keep", [0, 3, 8])
@on_each_device
def test_cp_async(device, keep):
    x = np.arange(32 * 48).astype(np.uint8)
    y = launch(INSTRUCTIONS, "copy_async", 1, 32, x, Result((32, 48), np.uint8), I32(keep),
               shared_mem=32 * 48, device=device)
    expected = x.reshape(32, 48).copy()
    expected[:, keep:16] = 0
    expected[:, 32 + keep:40] = 0
    expected[:, 44:] = 0
    np.testing.assert_array_equal(y, expected)


TF32 = r"""
typedef unsigned u32;
extern "C" __global__ void mma_tf32(const float* a, const float* b, float* d) {
    int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    u32 x[4], y[2];
    float e[4] = {};
    for (int r = 0; r < 4; r++)
        asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(x[r]) : "f"(a[(g + r % 2 * 8) * 8 + t + r / 2 * 4]));
    for (int r = 0; r < 2; r++)
        asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y[r]) : "f"(b[(t + r * 4) * 8 + g]));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};" : "+f"(e[0]), "+f"(e[1]), "+f"(e[2]), "+f"(e[3])
        : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
    for (int r = 0; r < 4; r++) d[(g + r / 2 * 8) * 8 + 2 * t + r % 2] = e[r];
}
"""


def test_tf32_without_rounding_is_less_exact():
    rng = np.random.default_rng(0)
    a, b = rng.random((16, 8), F32), rng.random((8, 8), F32)
    exact = a.astype(float) @ b

    def bias(source):
        d = launch(source, "mma_tf32", 1, 32, a, b, Result((16, 8), F32))
        return np.mean(d / exact - 1)

    assert abs(bias(TF32)) < 1e-4
    unrounded = TF32.replace("cvt.rna.tf32.f32", "mov.b32")
    assert bias(unrounded) < -4e-4  # truncation pulls towards zero


@pytest.mark.parametrize("source", [INSTRUCTIONS, TF32], ids=["each", "tf32"])
def test_nvrtc_accepts_the_same_text(source):
    assert_nvrtc_accepts(source, "sm_80")
