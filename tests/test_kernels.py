"""The CUDA sources themselves: they parse, compile for every architecture, use wide accesses and
64-bit offsets where they should, and bugs planted in them do not go unnoticed."""
from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpucnn.backend import cuda_kernel, make_backend
from gpucnn.backend.cuda_kernel import Variant, kernel_dir, read_signatures, read_source
from gpucnn.geometry import make_window
from tests import variants
from tests.conftest import needs_simulator
from tests.gpusim import nvrtc, resources
from tests.gpusim.mutation import caught

FILES = sorted(p.name for p in kernel_dir().glob("*.cu"))
# CUDA 12 has the first three alone.
ARCHITECTURES = ("sm_60", "sm_61", "sm_70", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100",
                 "sm_120")
NUMPY = make_backend("numpy")


@pytest.mark.parametrize("file", FILES)
def test_every_kernel_of_a_file_is_found(file):
    source = (kernel_dir() / file).read_text()
    signatures = read_signatures(kernel_dir(), file)
    assert len(signatures) == source.count("__global__")
    assert all(parameters[0].pointer and parameters[0].ctype in ("scalar_t", "accum_t", "double")
               for parameters in signatures.values())


@pytest.mark.parametrize("file", FILES)
def test_counts_are_computed_in_64_bits_where_the_index_is(file):
    """What an int product in one of them would do shows past 2^31 elements only: here by reading.
    """
    text = re.sub(r"//.*", "", (kernel_dir() / file).read_text())
    ends = re.findall(r"GRID_STRIDE_LOOP\(\w+, (.*)\) {", text)
    for end in ends:
        assert re.fullmatch(
            r"\(index_t\)(n( \* \w+)*|size|\(\(size \+ (3\) / 4|VEC - 1\) / VEC)\))", end), end
    products = re.findall(r"(\S*)\b((?:p\.images|n) \* (?:o?[hw]|c|\w+\.outputs)\b.*)", text)
    for before, product in products:
        assert before.endswith("(index_t)"), product
    sizes = re.findall(r"(\w+ \w+) (?:size|rows)[,)]", text)
    assert set(sizes) <= {"long long", "const index_t"}, sizes


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("file", variants.FILES)
def test_compiles_by_nvrtc(file, architecture):
    """For the newest each two choices meet; for each other the usual one, and one more in turn.

    `python -m tests.gpusim.resources` takes every variant, and shows what it needs. Kernels for
    tensor cores need sm_80 and tiles of their own: test_tensor_resources.py.
    """
    _require_nvrtc(architecture)
    few, usual = variants.few_variants(file), variants.usual_variants(file)
    if architecture != ARCHITECTURES[-1]:
        turn = ARCHITECTURES.index(architecture)
        few = [usual[turn % len(usual)], *([] if "TILE_M" in dict(few[0].constants) else
                                           [few[turn % len(few)]])]
    for variant in few:
        compiled = resources.compile_variant(file, variant, architecture)
        assert "warning" not in compiled.log, f"{variant}: {compiled.log}"
        assert not resources.spilling(variant, compiled), variant


@pytest.mark.parametrize("file", ["im2col.cu", "maxpool.cu", "avgpool.cu"])
def test_four_channels_are_one_access(file):
    _require_nvrtc()
    ptx = nvrtc.compile(read_source(kernel_dir(), file, _variant(vec=4)), file, "compute_90").code
    assert b"ld.global.nc.v4.f32" in ptx
    assert b"st.global.v4.f32" in ptx
    assert b"ld.global.nc.f32" not in ptx
    assert b".local" not in ptx, "no spills to local memory"


def _require_nvrtc(architecture="sm_90"):
    library, reason = nvrtc.find(architecture)
    if library is None:
        pytest.skip(reason)


def _variant(scalar=np.float32, mask=np.uint8, index=np.int32, vec=1):
    return Variant(np.dtype(scalar), np.dtype(mask), np.dtype(index), vec)


def check_all_kernels(backend, channels=4, dtype=np.float32):
    """Every windowed kernel once or twice, against the NumPy backend."""
    rng = np.random.default_rng(1)
    for size, stride, padding, dilation in ((3, 1, 1, 1), ((2, 3), (2, 1), ((0, 1), (1, 0)), 1),
                                            (2, (2, 3), 0, (1, 2))):
        x = rng.integers(-3, 4, (2, 7, 6, channels)).astype(dtype)
        window = make_window("test", size, stride, padding, dilation, x.shape[1:3])
        x_there = backend.asarray(x)
        cols = NUMPY.im2col(x, window)
        same(backend, backend.im2col(x_there, window), cols)
        dcols = rng.integers(-8, 9, cols.shape).astype(dtype)
        same(backend, backend.col2im(backend.asarray(dcols), x.shape, window),
             NUMPY.col2im(dcols, x.shape, window))
        y, mask = NUMPY.max_pool(x, window)
        y_there, mask_there = backend.max_pool(x_there, window)
        same(backend, y_there, y)
        same(backend, mask_there, mask)
        dy = rng.integers(-8, 9, y.shape).astype(dtype)
        dy_there = backend.asarray(dy)
        same(backend, backend.max_pool_backward(dy_there, backend.asarray(mask), x.shape, window),
             NUMPY.max_pool_backward(dy, mask, x.shape, window))
        if dilation == 1:
            close(backend, backend.avg_pool(x_there, window), NUMPY.avg_pool(x, window))
            close(backend, backend.avg_pool_backward(dy_there, x.shape, window),
                  NUMPY.avg_pool_backward(dy, x.shape, window))
    x = rng.standard_normal(2301).astype(dtype)
    stream = np.array([2**35 + 7])
    same(backend, backend.dropout(backend.asarray(x), 0.3, 2**40 + 5, backend.asarray(stream)),
         NUMPY.dropout(x, 0.3, 2**40 + 5, stream))


def same(backend, there, here):
    np.testing.assert_array_equal(backend.to_numpy(there), here)


def close(backend, there, here):
    np.testing.assert_allclose(backend.to_numpy(there), here, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 8])
def test_every_width_of_channels(cupy_backend, channels, dtype):
    check_all_kernels(cupy_backend, channels, dtype)


def test_64_bit_offsets_give_the_same(cupy_backend, monkeypatch):
    monkeypatch.setattr(cuda_kernel, "MAX_INT_INDEX", -1)
    check_all_kernels(cupy_backend)


@pytest.mark.parametrize("grid", [1, 2])
def test_each_thread_does_more_than_one_step(cupy_backend, monkeypatch, grid):  # row 49
    """With 13 channels, the first window has each kernel do the work of more than 2 * 256 threads.
    """
    monkeypatch.setattr(cuda_kernel, "MAX_GRID", grid)
    check_all_kernels(cupy_backend, channels=13)


def test_windows_of_more_than_255_places(cupy_backend, rng):
    x = rng.standard_normal((1, 17, 16, 2)).astype(np.float32)
    x[0, 16, 15, 1] = 9
    window = make_window("test", (17, 16), 1, 0, 1, (17, 16))
    y, mask = NUMPY.max_pool(x, window)
    y_there, mask_there = cupy_backend.max_pool(cupy_backend.asarray(x), window)
    assert mask_there.dtype == mask.dtype == np.int32
    assert mask.max() == 17 * 16 - 1
    same(cupy_backend, y_there, y)
    same(cupy_backend, mask_there, mask)


def test_a_tensor_past_2_to_the_31_elements(cupy_backend):
    """Few windows, far apart, in a tensor of 4.3e9 zeros of which hardly any page is touched."""
    xp = cupy_backend.xp
    x = xp.zeros((2, 65536, 32768, 1), np.float32)
    x[1, 65535, 32767, 0] = 3
    window = make_window("test", 1, (65535, 32767), 0, 1, x.shape[1:3])
    y, _ = cupy_backend.max_pool(x, window)
    expected = np.zeros((2, 2, 2, 1), np.float32)
    expected[1, 1, 1] = 3
    same(cupy_backend, y, expected)
    same(cupy_backend, cupy_backend.im2col(x, window), expected.reshape(8, 1))


def test_strides_near_the_largest_int(cupy_backend, rng):
    x = rng.integers(-3, 4, (1, 4, 5, 2)).astype(np.float32)
    window = make_window("test", 2, 2, 0, 1, (4, 5))._replace(sh=2**31 - 1, sw=2**31 - 1)
    cols = NUMPY.im2col(x, window)
    same(cupy_backend, cupy_backend.im2col(cupy_backend.asarray(x), window), cols)
    same(cupy_backend, cupy_backend.col2im(cupy_backend.asarray(cols), x.shape, window),
         NUMPY.col2im(cols, x.shape, window))


def test_a_misaligned_view_is_read_channel_by_channel(cupy_backend, rng):
    x = rng.standard_normal(1 + 2 * 4 * 4 * 4).astype(np.float32)
    window = make_window("test", 2, 2, 0, 1, (4, 4))
    there = cupy_backend.asarray(x)[1:].reshape(2, 4, 4, 4)
    assert there.data.ptr % 16
    y, _ = cupy_backend.max_pool(there, window)
    same(cupy_backend, y, NUMPY.max_pool(x[1:].reshape(2, 4, 4, 4), window)[0])


# Planted where one block does all the work: the rest are seen in any grid.
LOOP_BUGS = {
    "a thread does one step": ("common.cuh", "i += (index_t)blockDim.x * gridDim.x)", "i = (n))"),
    "steps overlap": ("common.cuh", "i += (index_t)blockDim.x * gridDim.x)",
                      "i += (index_t)blockDim.x)"),
    "steps leave a gap": ("common.cuh", "i += (index_t)blockDim.x * gridDim.x)",
                          "i += (index_t)blockDim.x * gridDim.x + 1)"),
}
BUGS = {
    "im2col reads a row too far": ("im2col.cu", "iy < h &&", "iy <= h &&"),
    "im2col reads a column before": ("im2col.cu", "ix >= 0 &&", "ix >= -1 &&"),
    "im2col forgets the dilation": ("im2col.cu", "int ix = ox * sw - left + kx * dw",
                                  "int ix = ox * sw - left + kx"),
    "im2col launches past the end": ("im2col.cu", "(index_t)n * oh * ow * kh * kw * cv)",
                                     "(index_t)n * oh * ow * kh * kw * cv + 1)"),
    "col2im drops the last row of outputs": ("common.cuh", "oy <= rows.last", "oy < rows.last"),
    "col2im ignores the dilation": ("common.cuh", "if (kx % dw != 0) continue;", ""),
    "windows start one early": ("common.cuh", "(start - 1) / stride + 1", "start / stride"),
    "windows end one late": ("common.cuh", "< out ? padded / stride : out - 1",
                             "<= out ? padded / stride : out - 1"),
    "max pooling pads with zero": ("maxpool.cu", "none_yet || ", ""),
    "max pooling lets the last of equals win": ("maxpool.cu", "value > best.at[v]",
                                                "value >= best.at[v]"),
    "max pooling reads past the right edge": ("maxpool.cu", "ix >= w) continue",
                                              "ix > w) continue"),
    "the mask has rows for columns": ("maxpool.cu", "(mask_t)(ky * kw + kx)",
                                      "(mask_t)(ky * kh + kx)"),
    "max pooling backward takes every place": ("maxpool.cu",
                                               "if (place.at[v] == ky * kw + kx) ", ""),
    "average pooling counts the padding": ("avgpool.cu", "start > 0 ? start : 0", "start"),
    "average pooling reads a row too far": ("avgpool.cu", "iy < y0 + kh && iy < h", "iy < y0 + kh"),
    "dropout writes past the end": ("dropout.cu", "&& 4 * j + v < size", ""),
    "Philox has nine rounds": ("philox.cuh", "round < 10", "round < 9"),
    "an int overflows": ("common.cuh", "p.c = i % c;  i /= c;",
                         "p.c = i % c;  i = (i + 2147483647) / c - 2147483647 / c;"),
}


@needs_simulator
@pytest.mark.parametrize("bug", LOOP_BUGS.values(), ids=LOOP_BUGS)
def test_a_bug_in_the_grid_stride_loop_is_caught(cupy_backend, monkeypatch, bug):
    monkeypatch.setattr(cuda_kernel, "MAX_GRID", 2)
    with caught(*bug):
        check_all_kernels(cupy_backend, channels=13)


@needs_simulator
@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_a_planted_bug_is_caught(cupy_backend, bug):
    with caught(*bug):
        check_all_kernels(cupy_backend)


def test_no_bug_is_planted_on_a_real_gpu(tmp_path):
    """An access out of bounds breaks the CUDA context, and every test after it."""
    (tmp_path / "cupy.py").write_text(
        "import types\n"
        "runtime = types.SimpleNamespace(getDeviceCount=lambda: 1, CUDARuntimeError=OSError)\n"
        "cuda = types.SimpleNamespace(runtime=runtime)\n")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
         f"{__file__}::test_a_planted_bug_is_caught",
         f"{__file__}::test_a_bug_in_the_grid_stride_loop_is_caught",
         str(Path(__file__).with_name("test_convolution_bugs.py"))],
        cwd=kernel_dir().parent, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)})
    skipped = re.fullmatch(r"(\d+) skipped in .*", result.stdout.splitlines()[-1])
    assert skipped, result.stdout
    assert int(skipped[1]) > 2 * len(BUGS | LOOP_BUGS), result.stdout
