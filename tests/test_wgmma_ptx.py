"""A matrix product by Hopper's wgmma, in inline PTX; and bugs planted in it."""
from __future__ import annotations

import numpy as np
import pytest

from tests.conftest import needs_compiler
from tests.gpusim import KernelFault, fake_cupy
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
    words,
)

pytestmark = needs_compiler

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


def run_wgmma(source=WGMMA, k=192, kind="f16", device=fake_cupy):
    a, b = random(64, k), random(k, 128, seed=1)
    stored = (a.T, b) if "#define TRANS 1" in source else (a, b.T)
    c = launch(source, "gemm", 1, 128, *(words(np.ascontiguousarray(x), kind).view(U16)
                                         for x in stored), Result((64, 128), F32), I32(k),
               shared_mem=6 * 8192, device=device, options=("-arch=sm_90a",))
    np.testing.assert_array_equal(c, a @ b)


@pytest.mark.parametrize("trans", [0, 1])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
@on_each_device
def test_wgmma(order, device, trans, kind):
    if device.cuda.Device().compute_capability != "90":
        pytest.skip("wgmma is Hopper's alone")
    source = WGMMA.replace("TRANS 0", f"TRANS {trans}").replace("f16.f16", f"{kind}.{kind}")
    run_wgmma(source, kind=kind, device=device)


def test_without_checks_the_results_are_the_same(monkeypatch):
    monkeypatch.setenv("GPUSIM_CHECKS", "off")
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
    source = plant(WGMMA, old, new)
    with pytest.raises((KernelFault, CompileException, AssertionError), match=message):
        run_wgmma(source)


@pytest.mark.parametrize("source", [
    WGMMA, WGMMA.replace("TRANS 0", "TRANS 1").replace("f16.f16", "bf16.bf16")],
    ids=["wgmma", "wgmma_trans"])
def test_nvrtc_accepts_the_same_text(source):
    assert_nvrtc_accepts(source, "sm_90a")
