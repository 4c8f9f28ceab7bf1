"""Inline PTX in the simulator: each instruction against NumPy, and bugs planted in the PTX text.

Where there is a GPU, what needs no simulator runs on it too: it has the last word on each layout.
"""
from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import pytest

from tests import conftest, gpusim
from tests.gpusim import KernelFault, fake_cupy, inline_ptx, nvrtc
from tests.gpusim.fake_cupy import CompileException, RawModule

WORKS, _REASON = gpusim.available()
pytestmark = pytest.mark.skipif(not WORKS, reason=_REASON)

DEVICES = {"simulator": fake_cupy}
if not conftest._NO_GPU:
    import cupy

    DEVICES["gpu"] = cupy

U16, I32, U32, F32 = np.uint16, np.int32, np.uint32, np.float32

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

# c = a @ b for (32, k) and (k, 16), k a multiple of 8: two stages of 32 k each, zeros past the end.
GEMM = r"""
typedef unsigned short u16;
typedef unsigned u32;

static __device__ void copy16(u32 to, const u16* from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
}
template <int N> static __device__ void wait_for_all_but() {
    asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
}

extern "C" __global__ void __launch_bounds__(64)
gemm(const u16* __restrict__ a, const u16* __restrict__ b, float* __restrict__ c, int k)
{
    __shared__ __align__(128) unsigned char stages[2][2048 + 1024];
    int t = threadIdx.x, warp = t / 32, lane = t % 32;
    u32 base = (u32)__cvta_generic_to_shared(stages);

    // Rows of 64 bytes for a, of 32 for b, their 16-byte chunks swizzled.
    auto place_a = [&](int s, int row, int chunk) -> u32 {
        return base + s * 3072 + row * 64 + (chunk ^ (row >> 1 & 3)) * 16;
    };
    auto place_b = [&](int s, int row, int chunk) -> u32 {
        return base + s * 3072 + 2048 + row * 32 + (chunk ^ (row >> 2 & 1)) * 16;
    };
    auto load = [&](int s, int k0) {
        for (int i = t; i < 128; i += 64) {
            int row = i / 4, at = k0 + i % 4 * 8;
            copy16(place_a(s, row, i % 4), a + row * k + at, at < k);
        }
        int row = k0 + t / 2;
        copy16(place_b(s, t / 2, t % 2), b + row * 16 + t % 2 * 8, row < k);
        asm volatile("cp.async.commit_group;" ::: "memory");
    };

    float d[2][4] = {};
    load(0, 0);
    for (int k0 = 0, s = 0; k0 < k; k0 += 32, s ^= 1) {
        load(s ^ 1, k0 + 32);
        wait_for_all_but<1>();
        __syncthreads();  // others' copies have landed
        for (int kk = 0; kk < 2; kk++) {
            u32 x[4], y[4];
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                : "r"(place_a(s, warp * 16 + lane % 16, kk * 2 + lane / 16)));
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                : "=r"(y[0]), "=r"(y[1]), "=r"(y[2]), "=r"(y[3])
                : "r"(place_b(s, kk * 16 + lane % 16, lane / 16)));
            for (int j = 0; j < 2; j++)
                asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                    "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                    : "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
                    : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[2 * j]), "r"(y[2 * j + 1]));
        }
        __syncthreads();  // the stage may be overwritten
    }
    for (int j = 0; j < 2; j++)
        for (int i = 0; i < 4; i++)
            c[(warp * 16 + lane / 4 + i / 2 * 8) * 16 + j * 8 + lane % 4 * 2 + i % 2] = d[j][i];
}
"""

# c = a @ b for (64, k) and (k, 128), k a multiple of 64: two stages of 64 k each. With TRANS 0, a
# is stored (64, k) and b (128, k): K-major. With TRANS 1, (k, 64) and (k, 128): MN-major.
WGMMA = r"""
#define TRANS 0
typedef unsigned short u16;
typedef unsigned u32;
typedef unsigned long long u64;

static __device__ u64 descriptor(u32 address) {  // 128-byte swizzling, atoms of 1024 bytes
    u64 start = address >> 4 & 0x3FFF, leading = 8192 >> 4, stride = 1024 >> 4;
    return start | leading << 16 | stride << 32 | 1ull << 62;
}

extern "C" __global__ void __launch_bounds__(128)
gemm(const u16* __restrict__ a, const u16* __restrict__ b, float* __restrict__ c, int k)
{
    extern __shared__ __align__(1024) unsigned char stages[];
    const u32 base = (u32)__cvta_generic_to_shared(stages), STAGE = 3 * 8192;
    int t = threadIdx.x, warp = t / 32, lane = t % 32;

    auto load_tile = [&](u32 to, const u16* from, int columns) {
        for (int i = t; i < 512; i += 128) {
            int row = i / 8, chunk = i % 8;
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                         :: "r"(to + row * 128 + (chunk ^ row % 8) * 16),
                            "l"(from + row * columns + chunk * 8) : "memory");
        }
    };
    auto load = [&](int s, int k0) {
        if (k0 < k) {
            u32 to = base + s * STAGE;
            load_tile(to, TRANS ? a + k0 * 64 : a + k0, TRANS ? 64 : k);
            for (int j = 0; j < 2; j++)
                load_tile(to + (1 + j) * 8192, TRANS ? b + k0 * 128 + j * 64 : b + j * 64 * k + k0,
                          TRANS ? 128 : k);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };

    float d[64];
    load(0, 0);
    for (int k0 = 0, s = 0; k0 < k; k0 += 64, s ^= 1) {
        load(s ^ 1, k0 + 64);
        asm volatile("cp.async.wait_group 1;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncthreads();  // copied
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        for (int i = 0; i < 4; i++) {
            u32 step = i * (TRANS ? 2048 : 32), to = base + s * STAGE;
            asm volatile("{ .reg .pred p; setp.ne.b32 p, %66, 0;\n"
                "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {REGISTERS}, "
                "%64, %65, p, 1, 1, %67, %68; }"
                : OPERANDS
                : "l"(descriptor(to + step)), "l"(descriptor(to + 8192 + step)),
                  "r"(k0 + i), "n"(TRANS), "n"(TRANS));
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        for (int i = 0; i < 64; i++) asm volatile("" : "+f"(d[i]) :: "memory");
        __syncthreads();  // multiplied
    }
    for (int i = 0; i < 64; i++)
        c[(warp * 16 + lane / 4 + i / 2 % 2 * 8) * 128 + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i];
}
""".replace("REGISTERS", ", ".join(f"%{i}" for i in range(64))).replace(
    "OPERANDS", ", ".join(f'"+f"(d[{i}])' for i in range(64)))


class Result(NamedTuple):
    """Stands among the arguments for the array that the kernel fills."""

    shape: tuple[int, ...]
    dtype: type


def launch(source, name, grid, block, *args, shared_mem=0, device=fake_cupy, options=()):
    """What the kernel writes to its Result."""
    there = [device.asarray(a) if isinstance(a, np.ndarray) else
             device.empty(*a) if isinstance(a, Result) else a for a in args]
    kernel = device.RawModule(code=source, options=("-std=c++17", *options)).get_function(name)
    kernel.max_dynamic_shared_size_bytes = shared_mem
    kernel((grid,), (block,), tuple(there), shared_mem=shared_mem)
    return next(there[i] for i, a in enumerate(args) if isinstance(a, Result)).get()


@pytest.fixture(params=DEVICES)
def device(request):
    return DEVICES[request.param]


def random(*shape, seed=0):
    """Multiples of 1/4 in [-4, 4): exact in every format, and so are short sums of products."""
    return np.random.default_rng(seed).integers(-16, 16, shape).astype(F32) / 4


# ------------------------------------------------------------------------- one instruction each


def words(values, kind):
    """Values, last axis along a register's halves, as registers."""
    if kind == "tf32":
        return values.astype(F32).view(U32)
    if kind == "f16":
        return np.ascontiguousarray(values.astype(np.float16)).view(U32)
    bfloat = (np.ascontiguousarray(values, F32).view(U32) >> 16).astype(U16)
    return np.ascontiguousarray(bfloat).view(U32)


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
def test_mma(device, name, k):
    a, b, c = random(5, 16, k), random(5, k, 8, seed=1), random(5, 16, 8, seed=2)
    np.testing.assert_array_equal(multiply(name, a, b, c, device), a @ b + c)


@pytest.mark.parametrize(("name", "k"), MMAS.items())
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
def test_ldmatrix(device, n, trans):
    matrices = np.arange(n * 64, dtype=U16).reshape(n, 8, 8)
    y = launch(INSTRUCTIONS, f"ldmatrix_x{n}{trans}", 1, 32, matrices.view(U32).ravel(),
               Result((n * 32,), U32), device=device)
    expected = matrices.swapaxes(1, 2) if trans else matrices
    np.testing.assert_array_equal(y.view(U16).reshape(n, 8, 8), expected)


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
def test_cp_async(device, keep):
    x = np.arange(32 * 48).astype(np.uint8)
    y = launch(INSTRUCTIONS, "copy_async", 1, 32, x, Result((32, 48), np.uint8), I32(keep),
               shared_mem=32 * 48, device=device)
    expected = x.reshape(32, 48).copy()
    expected[:, keep:16] = 0
    expected[:, 32 + keep:40] = 0
    expected[:, 44:] = 0
    np.testing.assert_array_equal(y, expected)


# ------------------------------------------------------------------------------ a whole kernel


@pytest.fixture(params=["ascending", "descending", "shuffled"])
def order(request, monkeypatch):
    monkeypatch.setitem(fake_cupy.options, "order", request.param)


def run_gemm(source=GEMM, k=72, device=fake_cupy):
    a, b = random(32, k), random(k, 16, seed=1)
    c = launch(source, "gemm", 1, 64, words(a, "f16").view(U16), words(b, "f16").view(U16),
               Result((32, 16), F32), I32(k), device=device)
    np.testing.assert_array_equal(c, a @ b)


@pytest.mark.parametrize("k", [8, 32, 72])
def test_gemm(device, order, k):
    run_gemm(k=k, device=device)


WRONG = "Mismatched elements|nan location mismatch"
BUGS = {
    "no wait": ("wait_for_all_but<1>();", "", "in flight"),
    "a wait for one group too few": ("wait_for_all_but<1>()", "wait_for_all_but<2>()",
                                     "in flight"),
    "a wait after the barrier": (
        "wait_for_all_but<1>();\n        __syncthreads();  // others' copies have landed",
        "__syncthreads(); wait_for_all_but<1>();", "data race|in flight"),
    "no commit": ('asm volatile("cp.async.commit_group;" ::: "memory");', "", "in flight"),
    "no barrier after the wait": ("__syncthreads();  // others' copies have landed", "",
                                  "data race|in flight|uninitialised"),
    "no barrier before the next copy": ("__syncthreads();  // the stage may be overwritten", "",
                                        "data race"),
    "src-size always 16": ("inside ? 16 : 0", "16", "out-of-bounds read.*16 bytes"),
    "src-size left out": ("16, %2;", "16;", "out-of-bounds read"),
    "src-size 8": ("inside ? 16 : 0", "inside ? 8 : 0", WRONG),
    "src-size larger than cp-size": ("inside ? 16 : 0", "inside ? 32 : 0", "src-size 32 is larger"),
    "source and destination swapped": ("[%0], [%1], 16", "[%1], [%0], 16", "no matching function"),
    "one swizzle only": ("place_a(s, warp * 16 + lane % 16, kk * 2 + lane / 16)",
                         "base + s * 3072 + (warp * 16 + lane % 16) * 64 "
                         "+ (kk * 2 + lane / 16) * 16", WRONG),
    "a misaligned row": ("place_a(s, warp * 16 + lane % 16, kk * 2 + lane / 16)",
                         "place_a(s, warp * 16 + lane % 16, kk * 2 + lane / 16) + 8",
                         "misaligned read of 16 bytes"),
    "a row past the end": ("place_b(s, kk * 16 + lane % 16, lane / 16)",
                           "place_b(s, kk * 16 + lane % 16, lane / 16) + 3072 * 9",
                           "out-of-bounds read of 16 bytes: .* past the end of static shared"),
    "no .trans": ("x4.trans.shared", "x4.shared", WRONG),
    ".trans where none is": ("m8n8.x4.shared", "m8n8.x4.trans.shared", WRONG),
    "registers of a swapped": ('"r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y',
                               '"r"(x[2]), "r"(x[1]), "r"(x[3]), "r"(y', WRONG),
    "registers of b swapped": ('"r"(y[2 * j]), "r"(y[2 * j + 1])',
                               '"r"(y[2 * j + 1]), "r"(y[2 * j])', WRONG),
    "operands swapped in the template": ("{%8, %9}", "{%9, %8}", WRONG),
    "a and b swapped": ("{%4, %5, %6, %7}, {%8, %9}", "{%8, %9}, {%4, %5, %6, %7}",
                        "could not convert"),
    "no accumulation": ("{%8, %9}, {%0, %1, %2, %3};", "{%8, %9}, {%8, %8, %9, %9};",
                        "could not convert"),
    "another type": ("f32.f16.f16.f32", "f32.bf16.bf16.f32", WRONG),
    "an unknown modifier": ("m16n8k16.row.col", "m16n8k16.row.row",
                            "ptx_mma_sync_aligned_m16n8k16_row_row_f32_f16_f16_f32"),
    "a generic address": ("u32 base = (u32)__cvta_generic_to_shared(stages)",
                          "u32 base = (u32)(size_t)stages", "not an address of shared memory"),
    "a pointer that is not to shared memory": ("__cvta_generic_to_shared(stages)",
                                               "__cvta_generic_to_shared(a)",
                                               "__cvta_generic_to_shared of a pointer that is not"),
    "a read too early": ("wait_for_all_but<1>();", "d[0][0] += stages[s][16 * t]; "
                         "wait_for_all_but<1>();", "read of static __shared__.*in flight"),
    "one lane less": ("            u32 x[4], y[4];", "if (lane == 31) continue; u32 x[4], y[4];",
                      "deadlock|divergence"),
}


@pytest.mark.parametrize(("old", "new", "message"), BUGS.values(), ids=BUGS)
def test_a_bug_in_the_ptx_is_caught(old, new, message):
    assert old in GEMM
    with pytest.raises((KernelFault, CompileException, AssertionError), match=message):
        run_gemm(GEMM.replace(old, new, 1))


def test_a_fault_names_the_first_line_of_its_statement():
    source = GEMM.replace("kk * 2 + lane / 16)));", "kk * 2 + lane / 16) + 4));")
    line = source[:source.index('asm volatile("ldmatrix')].count("\n") + 1
    with pytest.raises(KernelFault, match=rf"kernel\.cu:{line}: gemm: misaligned"):
        run_gemm(source)


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


def run_wgmma(source=WGMMA, k=192, kind="f16", device=fake_cupy):
    a, b = random(64, k), random(k, 128, seed=1)
    stored = (a.T, b) if "#define TRANS 1" in source else (a, b.T)
    c = launch(source, "gemm", 1, 128, *(words(np.ascontiguousarray(x), kind).view(U16)
                                         for x in stored), Result((64, 128), F32), I32(k),
               shared_mem=6 * 8192, device=device, options=("-arch=sm_90a",))
    np.testing.assert_array_equal(c, a @ b)


@pytest.mark.parametrize("trans", [0, 1])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_wgmma(device, order, trans, kind):
    if device.cuda.Device().compute_capability != "90":
        pytest.skip("wgmma is Hopper's alone")
    source = WGMMA.replace("TRANS 0", f"TRANS {trans}").replace("f16.f16", f"{kind}.{kind}")
    run_wgmma(source, kind=kind, device=device)


def test_without_checks_the_results_are_the_same(monkeypatch):
    monkeypatch.setenv("GPUSIM_CHECKS", "off")
    run_gemm()
    run_wgmma()


WAIT = 'asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");'
WGMMA_BUGS = {
    "no proxy fence": ('asm volatile("fence.proxy.async.shared::cta;" ::: "memory");', "",
                       "no fence.proxy.async since"),
    "the proxy fence too early": (
        'asm volatile("cp.async.wait_group 1;" ::: "memory");\n'
        '        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");',
        'asm volatile("fence.proxy.async.shared::cta; cp.async.wait_group 1;" ::: "memory");',
        "no fence.proxy.async since"),
    "no barrier after the copies": ("__syncthreads();  // copied", "",
                                    "data race|in flight|uninitialised"),
    "no barrier after the products": ("__syncthreads();  // multiplied", "", "data race"),
    "no wgmma.fence": ('asm volatile("wgmma.fence.sync.aligned;" ::: "memory");', "",
                       "no wgmma.fence"),
    "no commit": ('asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");', "", WRONG),
    "no wait": (WAIT, "", f"{WRONG}|in flight|data race"),
    "a wait for all but one": (WAIT, WAIT.replace("0;", "1;"), f"{WRONG}|in flight|data race"),
    "an accumulator written too early": (WAIT, f"d[0] = 0; {WAIT}", "accumulator.*in flight"),
    "another swizzle": ("1ull << 62", "2ull << 62", "128-byte swizzling"),
    "another stride": ("stride = 1024", "stride = 512", WRONG),
    "a stride into the next stage": ("stride = 1024", "stride = 2048", "in flight|past the end"),
    "no swizzle in the copies": ("(chunk ^ row % 8)", "chunk", WRONG),
    "one transposed": ('"n"(TRANS), "n"(TRANS)', '"n"(TRANS), "n"(1 - TRANS)', WRONG),
    "a and b swapped": ("%64, %65,", "%65, %64,", f"{WRONG}|past the end|uninitialised"),
    "never accumulated": ('"r"(k0 + i)', '"r"(0)', WRONG),
    "always accumulated": ('"r"(k0 + i)', '"r"(1)', WRONG),
    "another shape": ("m64n128k16", "m64n64k16", "no matching function"),
}


@pytest.mark.parametrize(("old", "new", "message"), WGMMA_BUGS.values(), ids=WGMMA_BUGS)
def test_a_bug_in_the_use_of_wgmma_is_caught(old, new, message):
    assert old in WGMMA
    with pytest.raises((KernelFault, CompileException, AssertionError), match=message):
        run_wgmma(WGMMA.replace(old, new, 1))


# ------------------------------------------------------------------------------- the translator

MALFORMED = {
    "an output without =": ('asm("mov.b32 %0, 1;" : "r"(x));', 'constraint "r" of output %0'),
    "an input with =": ('asm("mov.b32 %0, %1;" : "=r"(x) : "=r"(y));', 'constraint "=r" of input'),
    "an unknown constraint": ('asm("mov.b32 %0, %1;" : "=r"(x) : "q"(y));', 'constraint "q"'),
    "a float for r": ('asm("mov.b32 %0, %1;" : "=r"(x) : "r"(1.0f));',
                      "constraint r: takes 32-bit integers"),
    "64 bits for r": ('asm("mov.b32 %0, %1;" : "=r"(x) : "r"(1ll));', "constraint r: takes 32-bit"),
    "an operand too few": ('asm("mov.b32 %0, %1;" : "=r"(x));', "%1 in the template"),
    "a register that is not declared": ('asm("mov.b32 %0, t;" : "=r"(x));', "nor declared by .reg"),
    "no semicolon": ('asm("mov.b32 %0, 1" : "=r"(x));', "no ; after"),
    "a write to an input": ('asm("mov.b32 %1, %0;" : "=r"(x) : "r"(y));', "const"),
    "an unknown opcode": ('asm("bar.sync 0;");', "ptx_bar_sync"),
    "a float for an integer operand": (
        'asm("cvt.rn.f16x2.f32 %0, %1, %1;" : "=r"(x) : "r"(y));', "deleted function"),
    "a load that may move": ('asm("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(y));',
                             "needs asm volatile"),
    "a cp-size that cp.async does not have": (
        'asm volatile("cp.async.cg.shared.global [%0], [%1], 8;" :: "r"(x), "l"(p));', "cp-size"),
    "a size that is no immediate": (
        'asm volatile("cp.async.wait_group %0;" :: "r"(x));', "no matching function"),
    "a 32-bit address of global memory": (
        'asm volatile("st.global.b32 [%0], %0;" :: "r"(x));', "PtxGlobal"),
}


@pytest.mark.parametrize(("statement", "message"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_statement_does_not_compile(statement, message):
    source = f"""#line 1 "mine.cu"
extern "C" __global__ void f(unsigned* p) {{
    unsigned x = 1, y = 2;
    {statement}
    *p = x + y;
}}"""
    with pytest.raises(CompileException, match=r"mine\.cu:3") as caught:
        RawModule(code=source).get_function("f")
    assert re.search(message, str(caught.value)), caught.value


def test_translation_keeps_the_lines():
    text = ('# 7 "a.cu"\nint x;\nasm volatile("nop;"\n  "nop;"\n  :: "n"(N)\n# 30 "a.cu"\n'
            '  : "memory");\nchar c = \'"\'; // 32\nasm("what?");')
    with pytest.raises(inline_ptx.PtxError, match=r"a\.cu:32: error"):
        inline_ptx.translate(text)
    done = inline_ptx.translate(text.rpartition("asm")[0])
    assert done.splitlines()[2:] == [
        "do { const PtxImmediate<(N)> gpusim_0{}; ptx_nop(); ptx_nop(); } while (0)",
        '# 30 "a.cu"', ";", 'char c = \'"\'; // 32']


# ------------------------------------------------------------------------------------ real PTX


@pytest.mark.parametrize(("source", "architecture"), [
    (INSTRUCTIONS, "sm_80"), (GEMM, "sm_80"), (TF32, "sm_80"), (WGMMA, "sm_90a"),
    (WGMMA.replace("TRANS 0", "TRANS 1").replace("f16.f16", "bf16.bf16"), "sm_90a")],
    ids=["each", "gemm", "tf32", "wgmma", "wgmma_trans"])
def test_nvrtc_accepts_the_same_text(source, architecture):
    _require_nvrtc()
    log = nvrtc.compile(source, "kernel.cu", architecture).log
    assert "warning" not in log, log


def test_resources_of_a_kernel():
    _require_nvrtc()
    compiled = nvrtc.compile(GEMM, "kernel.cu", "sm_80", "--ptxas-options=-v")
    gemm = nvrtc.resources(compiled)["gemm"]
    assert gemm.shared == 2 * 3072
    assert 16 < gemm.registers <= 255
    assert gemm.stack == gemm.spill_stores == gemm.spill_loads == 0
    spilling = GEMM.replace("__launch_bounds__(64)", "__launch_bounds__(1024, 2)").replace(
        "float d[2][4] = {};", "float d[2][4] = {}, many[64];\n#pragma unroll\n"
        "for (int i = 0; i < 64; i++) many[i] = c[i * k];").replace(
        "= d[j][i];", "= d[j][i] + many[i];\n#pragma unroll\n"
        "for (int i = 0; i < 64; i++) c[i * k + 1] = many[i] * many[63 - i];")
    log = nvrtc.compile(spilling, "kernel.cu", "sm_80", "--ptxas-options=-v")
    assert nvrtc.resources(log)["gemm"].spill_stores > 0


def _require_nvrtc():
    library, reason = nvrtc.find()
    if library is None:
        pytest.skip(reason)
