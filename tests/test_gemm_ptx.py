"""A matrix product in inline PTX, with cp.async, ldmatrix and mma.sync; and bugs planted in it."""
from __future__ import annotations

import numpy as np
import pytest

from tests.conftest import needs_compiler
from tests.gpusim import KernelFault, fake_cupy, nvrtc
from tests.gpusim.fake_cupy import CompileException
from tests.gpusim.mutation import plant
from tests.ptx import (
    F32,
    I32,
    U16,
    WRONG,
    Result,
    assert_nvrtc_accepts,
    launch,
    on_each_device,
    random,
    require_nvrtc,
    words,
)

pytestmark = needs_compiler

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


def run_gemm(source=GEMM, k=72, device=fake_cupy):
    a, b = random(32, k), random(k, 16, seed=1)
    c = launch(source, "gemm", 1, 64, words(a, "f16").view(U16), words(b, "f16").view(U16),
               Result((32, 16), F32), I32(k), device=device)
    np.testing.assert_array_equal(c, a @ b)


@pytest.mark.parametrize("k", [8, 32, 72])
@on_each_device
def test_gemm(order, device, k):
    run_gemm(k=k, device=device)


def test_without_checks_the_results_are_the_same(monkeypatch):
    monkeypatch.setenv("GPUSIM_CHECKS", "off")
    run_gemm()


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
    source = plant(GEMM, old, new)
    with pytest.raises((KernelFault, CompileException, AssertionError), match=message):
        run_gemm(source)


def test_a_fault_names_the_first_line_of_its_statement():
    source = GEMM.replace("kk * 2 + lane / 16)));", "kk * 2 + lane / 16) + 4));")
    line = source[:source.index('asm volatile("ldmatrix')].count("\n") + 1
    with pytest.raises(KernelFault, match=rf"kernel\.cu:{line}: gemm: misaligned"):
        run_gemm(source)


def test_nvrtc_accepts_the_same_text():
    assert_nvrtc_accepts(GEMM, "sm_80")


def test_resources_of_a_kernel():
    require_nvrtc()
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
