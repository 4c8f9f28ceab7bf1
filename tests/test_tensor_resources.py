"""The convolutions on tensor cores by NVIDIA's compiler: each variant compiles without a warning
for every architecture that has them, and fits its registers and its shared memory.

Architectures, tiles, types and indices meet in pairs, while activations, a last step, take turns;
the tile with the most registers meets all architectures. A full product is 1,440 compilations.
"""
from __future__ import annotations

import numpy as np
import pytest

from gpucnn.backend.cuda_kernel import Variant, kernel_dir, read_source
from tests.conftest import needs_cupy
from tests.convolution_judge import TENSOR_DTYPES, tensor_tile
from tests.gpusim import nvrtc
from tests.pairs import pairs

pytestmark = needs_cupy  # for the list of tiles
FILES = ("conv_tensor.cu", "conv_tensor_weight_gradient.cu")
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
# KiB that a block may have of it: CUDA C++ Programming Guide, "Compute Capabilities".
SHARED = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
FLOAT16, BFLOAT16, FLOAT32 = TENSOR_DTYPES
LARGEST = 0
VARIANTS = [(*variant, turn % 5) for turn, variant in enumerate(
    pairs(ARCHITECTURES, range(5), TENSOR_DTYPES, (np.int32, np.int64)))]
VARIANTS += [(architecture, LARGEST, dtype, np.int32, 0) for architecture in ARCHITECTURES
             for dtype in (FLOAT16, FLOAT32)]
SPILLED_AT_64_BITS = 32  # bytes a thread at most: they cost less than one block fewer


def compile_variant(file, architecture, number, dtype, index, activation):
    constants = tensor_tile(number).constants | (
        {"ACTIVATION": activation, "MOMENTS": 1} if file == FILES[0] else {})
    variant = Variant(dtype, np.dtype(np.uint8), np.dtype(index), 16 // dtype.itemsize,
                      tuple(constants.items()))
    return nvrtc.compile(read_source(kernel_dir(), file, variant), file, architecture,
                         "--ptxas-options=-v")


@pytest.mark.parametrize(("architecture", "number", "dtype", "index", "activation"), VARIANTS,
                         ids=lambda v: getattr(v, "__name__", str(v)))
def test_compiles_and_spills_nothing(architecture, number, dtype, index, activation):
    library, reason = nvrtc.find()
    if library is None:
        pytest.skip(reason)
    for file in FILES:
        compiled = compile_variant(file, architecture, number, dtype, index, activation)
        assert "warning" not in compiled.log, compiled.log
        for name, needs in nvrtc.resources(compiled).items():
            assert needs.shared == 0, (name, needs)  # all of it is dynamic
            allowed = 0 if index == np.int32 else SPILLED_AT_64_BITS
            assert max(needs.stack, needs.spill_stores, needs.spill_loads) <= allowed, (name, needs)
            assert needs.registers * tensor_tile(number).threads <= 65536 // 2, (name, needs)


def test_what_was_compiled_before_comes_with_its_remarks():
    """NVRTC's cache, which it has on machines with a driver, leaves them out."""
    library, reason = nvrtc.find()
    if library is None:
        pytest.skip(reason)
    first, again = (compile_variant(FILES[1], "sm_90", 4, FLOAT16, np.int32, 0) for _ in range(2))
    assert nvrtc.resources(first) == nvrtc.resources(again)
    with pytest.raises(AssertionError, match="^no kernel in the compiler's remarks: ''"):
        nvrtc.resources(nvrtc.Compiled(again.code, ""))


@pytest.mark.parametrize(("number", "dtype"), [(5, FLOAT16), (6, BFLOAT16), (7, FLOAT16)], ids=str)
def test_wgmma_spills_nothing_and_is_not_serialized(number, dtype):
    """The compiler waits after each product, and says so, where it has to move the sums."""
    library, reason = nvrtc.find()
    if library is None:
        pytest.skip(reason)
    tile = tensor_tile(number)
    assert tile.shared(dtype.itemsize) <= SHARED["sm_90"] << 10
    for file in FILES:
        compiled = compile_variant(file, "sm_90a", number, dtype, np.int32, 0)
        assert "warning" not in compiled.log, compiled.log
        assert "serialized" not in compiled.log, compiled.log
        for name, needs in nvrtc.resources(compiled).items():
            assert needs[1:] == (0, 0, 0, 0), (name, needs)
            assert needs.registers * tile.threads <= 65536, (name, needs)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_block_has_enough_shared_memory(architecture):
    for number in range(5):
        for dtype in TENSOR_DTYPES:
            for weight_gradient in (False, True):
                needed = tensor_tile(number).shared(dtype.itemsize, weight_gradient)
                assert needed <= SHARED[architecture] << 10, (number, dtype, weight_gradient)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("dtype", TENSOR_DTYPES, ids=str)
def test_the_instructions_are_those_of_tensor_cores(file, dtype):
    library, reason = nvrtc.find()
    if library is None:
        pytest.skip(reason)
    ptx = compile_variant(file, "compute_80", LARGEST, dtype, np.int32, 0).code.decode()
    types = {"float16": "f16.f16", "bfloat16": "bf16.bf16", "float32": "tf32.tf32"}[dtype.name]
    assert f".row.col.f32.{types}.f32" in ptx
    assert "cp.async.cg.shared.global" in ptx
    assert ("cvt.rna.tf32.f32" in ptx) == (dtype == FLOAT32)
