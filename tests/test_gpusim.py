"""The simulator itself: kernels that are right run without a fault, planted bugs do not."""
from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from gpucnn.geometry import make_window
from tests.cases import named
from tests.conftest import needs_compiler, needs_simulator
from tests.gpusim import KernelFault, fake_cupy
from tests.gpusim.fake_cupy import RawModule
from tests.gpusim.mutation import caught, plant

pytestmark = needs_compiler

SOURCE = r"""
extern "C" __global__ void scale(const float* __restrict__ x, float* __restrict__ y, float by,
                                 int n) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += blockDim.x * gridDim.x)
        y[i] = by * x[i];
}
extern "C" __global__ void scale4(const float4* x, float4* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float4 v = x[i];
    y[i] = make_float4(2 * v.x, 2 * v.y, 2 * v.z, 2 * v.w);
}
extern "C" __global__ void scale_vectors(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float4 v = reinterpret_cast<const float4*>(x)[i];
    reinterpret_cast<float4*>(y)[i] = make_float4(2 * v.x, 2 * v.y, 2 * v.z, 2 * v.w);
}
extern "C" __global__ void block_sum(const float* x, float* sums, int n) {
    __shared__ float part[64];
    int t = threadIdx.x, i = blockIdx.x * 64 + t;
    part[t] = i < n ? x[i] : 0.0f;
    __syncthreads();  // first
    for (int half = 32; half > 0; half /= 2) {
        if (t < half) part[t] += part[t + half];
        __syncthreads();  // second
    }
    if (t == 0) sums[blockIdx.x] = part[0];
}
extern "C" __global__ void transpose(const float* x, float* y, int h, int w) {
    __shared__ float tile[8][9];
    int ix = blockIdx.x * 8 + threadIdx.x, iy = blockIdx.y * 8 + threadIdx.y;
    if (ix < w && iy < h) tile[threadIdx.y][threadIdx.x] = x[iy * w + ix];
    __syncthreads();
    int ox = blockIdx.y * 8 + threadIdx.x, oy = blockIdx.x * 8 + threadIdx.y;
    if (ox < h && oy < w) y[oy * h + ox] = tile[threadIdx.x][threadIdx.y];
}
extern "C" __global__ void warp_scan(const int* x, int* y) {
    int v = x[threadIdx.x];
    for (int by = 1; by < 32; by *= 2) {
        int other = __shfl_up_sync(0xffffffffu, v, by);
        if ((threadIdx.x & 31) >= by) v += other;
    }
    y[threadIdx.x] = v;
}
extern "C" __global__ void reverse(const float* x, float* y, int n) {
    extern __shared__ float all[];
    all[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = all[n - 1 - threadIdx.x];
}
extern "C" __global__ void histogram(const int* x, int* bins, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) atomicAdd(&bins[x[i]], 1);
}
"""


def floats(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def launch(name, grid, block, *args, source=SOURCE, shared_mem=0):
    """Launch; NumPy arrays are copied to the "device" first, and the last array comes back."""
    there = [fake_cupy.asarray(a) if isinstance(a, np.ndarray) else a for a in args]
    RawModule(code=source).get_function(name)(grid, block, tuple(there), shared_mem=shared_mem)
    return [a for a in there if isinstance(a, fake_cupy.ndarray)][-1].get()


I32, F32 = np.int32, np.float32


def run_scale(source=SOURCE, grid=2, n=300):
    x = floats(300)
    y = fake_cupy.empty(300, F32)
    np.testing.assert_array_equal(
        launch("scale", (grid,), (128,), x, y, F32(2), I32(n), source=source), 2 * x)


def run_block_sum(source=SOURCE):
    x = floats(150)
    sums = launch("block_sum", (3,), (64,), x, fake_cupy.empty(3, F32), I32(150), source=source)
    np.testing.assert_allclose(
        sums, np.pad(x, (0, 42)).reshape(3, 64).sum(1), rtol=1e-4, atol=1e-5)


def run_transpose(source=SOURCE):
    x = floats(10, 13)
    y = launch("transpose", (2, 2), (8, 8), x, fake_cupy.empty((13, 10), F32), I32(10), I32(13),
               source=source)
    np.testing.assert_array_equal(y, x.T)


def run_reverse(source=SOURCE, shared_mem=256):
    x = floats(64)
    y = launch("reverse", (1,), (64,), x, fake_cupy.empty(64, F32), I32(64), source=source,
               shared_mem=shared_mem)
    np.testing.assert_array_equal(y, x[::-1])


def run_histogram(source=SOURCE):
    x = np.random.default_rng(0).integers(0, 4, 100).astype(I32)
    bins = launch("histogram", (2,), (64,), x, fake_cupy.zeros(4, I32), I32(100), source=source)
    np.testing.assert_array_equal(bins, np.bincount(x))


def test_right_kernels_run(order):
    run_scale()
    run_block_sum()
    run_transpose()
    run_reverse()
    run_histogram()
    x = np.arange(64, dtype=I32)
    y = launch("warp_scan", (1,), (64,), x, fake_cupy.empty(64, I32))
    np.testing.assert_array_equal(y, np.cumsum(x.reshape(2, 32), axis=1).ravel())
    v = floats(100)
    np.testing.assert_array_equal(
        launch("scale_vectors", (1,), (32,), v, fake_cupy.empty(100, F32), I32(25)), 2 * v)


IN_SOURCE = {
    "a read past the end": (run_scale, "i < n;", "i <= n;", "out-of-bounds read.*past the end.*x"),
    "a read before the start": (run_scale, "by * x[i]", "by * x[i - 1]",
                                "out-of-bounds read.*before the start"),
    "a write past the end": (run_scale, "y[i] = by * x[i]", "y[i + 1] = by * x[i]",
                             "out-of-bounds write.*y"),
    "a write to const": (run_scale, "y[i] = by * x[i]", "((float*)x)[i] = by",
                         "write to .*x.*const"),
    "an int that overflows": (run_scale, "by * x[i]", "by * x[i] + 0.0f * (2147483000 + 8 * i)",
                              "signed integer overflow"),
    "a division by zero": (run_scale, "by * x[i]", "by * x[i] + i / (n - 300)",
                           "division by zero"),
    "the first barrier missing": (run_block_sum, "__syncthreads();  // first", "",
                                  "data race|uninitialised"),
    "the second barrier missing": (run_block_sum, "__syncthreads();  // second", "", "data race"),
    "a barrier in divergent code": (run_block_sum, "if (t < half) part[t] += part[t + half];",
                                    "if (t < half) { part[t] += part[t + half]; __syncthreads(); }",
                                    "barrier divergence|deadlock"),
    "a barrier after a return": (run_block_sum, "part[t] = i < n",
                                 "if (i >= n) return; part[t] = i < n", "barrier divergence"),
    "shared memory never written": (run_block_sum, "part[t] = i < n ? x[i] : 0.0f;",
                                    "if (i < n) part[t] = x[i];", "uninitialised"),
    "a shared array too small": (run_block_sum, "part[64]", "part[48]",
                                 "bounds|past the end|misaligned"),
    "a transposed tile": (run_transpose, "tile[threadIdx.x][threadIdx.y]",
                          "tile[threadIdx.y][threadIdx.x]", "uninitialised"),
    "a histogram without atomics": (run_histogram, "atomicAdd(&bins[x[i]], 1)", "bins[x[i]] += 1",
                                    "data race"),
    "a lane that the mask leaves out": (run_block_sum, "__syncthreads();  // first",
                                        "__syncthreads(); __shfl_sync(1u, t, 0);", "mask"),
}


@pytest.mark.parametrize(("run", "old", "new", "message"), IN_SOURCE.values(), ids=IN_SOURCE)
def test_a_bug_in_the_source_is_caught(order, run, old, new, message):
    source = plant(SOURCE, old, new)
    with pytest.raises(KernelFault, match=message):
        run(source)


@needs_simulator
@pytest.mark.parametrize(("old", "new", "end"), [
    ("none_yet = true;", "none_yet = true", "CompileException"),  # as what is in the way
    ("none_yet = true;", "none_yet = 1;", "DID NOT RAISE"),
    ("none of its text", "", "the bug would not be planted")])
def test_what_does_not_compile_or_is_no_bug_is_not_caught(cupy_backend, old, new, end):
    x, window = cupy_backend.asarray(floats(1, 4, 4, 1)), make_window("test", 2, 2, 0, 1, (4, 4))
    with pytest.raises((AssertionError, pytest.fail.Exception), match=end), \
            caught("maxpool.cu", old, new), named("a case"):
        cupy_backend.max_pool(x, window)


def test_a_fault_names_file_line_block_and_thread():
    source = '#line 1 "mine.cu"\n' + SOURCE.replace("i < n;", "i <= n;")
    with pytest.raises(KernelFault, match=r"mine\.cu:5: scale: .*\[block \(0,0,0\) thread \(44,"):
        run_scale(source, grid=1)


X, Y = floats(300), floats(300)
AT_LAUNCH = {
    "int64 for int": ((X, Y, F32(2), np.int64(300)), "argument 3 .int n.: got numpy.int64"),
    "a Python int": ((X, Y, F32(2), 300), "got a int; CuPy passes Python numbers as 64"),
    "a Python float": ((X, Y, 2.0, I32(300)), "got a float"),
    "float64 for float*": ((X.astype(float), Y, F32(2), I32(300)), "the array is float64"),
    "swapped arguments": ((F32(2), X, Y, I32(300)), "is a pointer; got float32"),
    "a missing argument": ((X, Y, F32(2)), "takes 4 arguments, got 3"),
}


@pytest.mark.parametrize(("args", "message"), AT_LAUNCH.values(), ids=AT_LAUNCH)
def test_a_wrong_argument_is_caught(args, message):
    with pytest.raises(TypeError, match=message):
        launch("scale", (1,), (128,), *args)


def test_views_and_overlaps_are_caught():
    x = fake_cupy.asarray(floats(20, 15))
    with pytest.raises(ValueError, match="strides"):
        launch("scale", (1,), (128,), x.T, fake_cupy.empty(300, F32), F32(2), I32(300))
    with pytest.raises(ValueError, match="overlap"):
        launch("scale", (1,), (128,), x, x, F32(2), I32(300))
    with pytest.raises(KernelFault, match="scale_vectors: misaligned"):
        launch("scale_vectors", (1,), (32,), fake_cupy.asarray(floats(101))[1:],
               fake_cupy.empty(100, F32), I32(25))
    with pytest.raises(TypeError, match="got ndarray"):
        RawModule(code=SOURCE).get_function("scale")((1,), (128,), (X, Y, F32(2), I32(300)))


def test_wrong_launches_are_caught():
    with pytest.raises(AssertionError):  # what no thread wrote is NaN
        run_scale(n=299)
    with pytest.raises(KernelFault, match="past the end of dynamic shared"):
        run_reverse(shared_mem=128)
    with pytest.raises(ValueError, match="over the limits"):
        launch("scale", (1,), (2048,), X, Y, F32(2), I32(300))
    with pytest.raises(RuntimeError, match='not declared extern "C"'):
        RawModule(code=SOURCE.replace('extern "C" __global__ void scale(', "__global__ void scale(")
                  ).get_function("scale")
    with pytest.raises(fake_cupy.CompileException, match=r"mine\.cu:1"):
        RawModule(code='#line 1 "mine.cu"\nint f() { return x; }').get_function("f")


def test_the_stand_in_is_as_strict_as_cupy():
    a = fake_cupy.asarray(X)
    assert type(a).__module__ == "cupy"
    with pytest.raises(TypeError, match="Implicit conversion"):
        np.asarray(a)
    with pytest.raises(TypeError, match="Unsupported type"):
        a + X
    with pytest.raises(TypeError, match="Unsupported type"):
        a[...] = X
    assert isinstance(a.sum(), fake_cupy.ndarray)
    assert a.data.ptr % 256 == 0
    assert np.isnan(fake_cupy.empty(3, F32).get()).all()


def test_without_checks_the_results_are_the_same(monkeypatch):
    monkeypatch.setenv("GPUSIM_CHECKS", "off")
    run_block_sum()
    run_transpose()


def test_nothing_of_the_real_cupy_stays_beside_the_stand_in():
    script = """
import sys, types
for name in ("cupy", "cupy.linalg", "cupyx", "cupyx.scipy", "cupy_backends.cuda", "cupyish"):
    sys.modules[name] = types.ModuleType(name)
from tests import gpusim
gpusim.install()
print(*sorted(name for name in sys.modules if name.startswith("cupy")))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                            check=True, cwd=os.path.dirname(os.path.dirname(__file__)))
    assert result.stdout.split() == ["cupy", "cupy.cuda", "cupyish", "cupyx"]


def test_every_cupy_name_that_the_backend_uses_exists():
    """In the real CuPy, which only another process can import: the stand-in may be in its place."""
    script = """
import ast, operator, pathlib, sys
try:
    import cupy
except ImportError:
    sys.exit(77)
missing = []
for file in map(pathlib.Path, sys.argv[1:]):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute):
            # What a call returns, and then what is of the function itself.
            name = ast.unparse(node)
            for call, kind in (("cuda.get_current_stream()", "cuda.Stream"),
                               ("get_default_memory_pool()", "cuda.MemoryPool")):
                name = name.replace(call, kind)
            name = name.replace("()", "")
            if name.startswith("cupy."):
                try:
                    operator.attrgetter(name.removeprefix("cupy."))(cupy)
                except AttributeError:
                    missing.append(name)
print(missing)
sys.exit(bool(missing))
"""
    folder = os.path.join(os.path.dirname(os.path.dirname(__file__)), "gpucnn", "backend")
    files = [os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".py")]
    result = subprocess.run([sys.executable, "-c", script, *files], capture_output=True, text=True,
                            check=False)
    if result.returncode == 77:
        pytest.skip("CuPy is not installed")
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_graph_does_again_what_was_captured():
    """And nothing before its launch."""
    x = fake_cupy.asarray(np.arange(8, dtype=np.float32))
    y, total = fake_cupy.zeros(8, np.float32), fake_cupy.zeros(8, np.float32)
    kernel, pool = RawModule(code=SOURCE).get_function("scale"), fake_cupy.cuda.MemoryPool()
    stream = fake_cupy.cuda.Stream(non_blocking=True)
    with stream, fake_cupy.cuda.using_allocator(pool.malloc):
        stream.begin_capture()
        kernel((1,), (8,), (x, y, np.float32(2), np.int32(8)))
        total += y + 1
        doubles = fake_cupy.ascontiguousarray(fake_cupy.asarray(x, np.float64))
        zeros = fake_cupy.zeros(8)
        zeros += 1
        graph = stream.end_capture()
    assert not y.get().any()
    assert not total.get().any()
    assert np.isnan(doubles.get()).all()
    assert pool.used_bytes() == 2 * 512
    x += 1
    graph.launch(stream)
    graph.launch()
    np.testing.assert_array_equal(total.get(), 2 * (2 * np.arange(1, 9) + 1))
    np.testing.assert_array_equal(doubles.get(), np.arange(1, 9))
    np.testing.assert_array_equal(zeros.get(), np.ones(8))
    del doubles, zeros
    assert pool.used_bytes() == 0, "the graph keeps the memory, but no array"


def test_a_graph_in_the_default_pool_is_refused():
    """CuPy takes it, and gives its memory out again."""
    x, stream = fake_cupy.zeros(8), fake_cupy.cuda.Stream(non_blocking=True)
    stream.begin_capture()
    try:
        with pytest.raises(RuntimeError, match="^memory of the default pool in a graph"):
            x + 1
    finally:
        stream.end_capture()


def test_a_copy_on_another_stream_is_done_when_somebody_waits():
    x, host = fake_cupy.zeros(2), np.ones(2)
    copies, current = fake_cupy.cuda.Stream(non_blocking=True), fake_cupy.cuda.get_current_stream()
    x.set(host, stream=copies)
    event = copies.record()
    host[1] = 5  # too early
    assert not event.done
    assert x.get().tolist() == [0, 0]
    current.wait_event(event)
    assert event.done
    assert x.get().tolist() == [1, 5]
    back = x.get(stream=copies, out=np.zeros(2), blocking=False)
    assert back.tolist() == [0, 0]
    copies.synchronize()
    assert back.tolist() == [1, 5]


@pytest.mark.parametrize("refused", [
    lambda x: x.get(), lambda x: float(x.sum()), lambda x: bool((x > 0).any()),
    lambda x: x.set(np.ones((2, 2))), lambda x: fake_cupy.asarray(np.ones(2)), lambda x: x @ x,
    lambda x: fake_cupy.cuda.Device().synchronize()])
def test_what_cupy_refuses_while_a_graph_is_captured(refused):
    x, stream = fake_cupy.asarray(np.ones((2, 2))), fake_cupy.cuda.Stream(non_blocking=True)
    stream.begin_capture()
    try:
        with pytest.raises((RuntimeError, NotImplementedError), match="captur"):
            refused(x)
    finally:
        stream.end_capture()
    refused(x)


def test_torch_reads_an_array_where_it_lies():
    torch = pytest.importorskip("torch")
    x = fake_cupy.zeros((2, 3), np.float32)
    tensor = torch.from_dlpack(x)
    x[0, 1] = 5
    assert tensor[0, 1] == 5
    assert fake_cupy.from_dlpack(tensor)[0, 1].get() == 5


def test_the_pool_counts_what_is_alive_in_units_of_512_bytes(cupy_backend):
    import gc
    xp = cupy_backend.xp
    pool = xp.get_default_memory_pool()
    events = []

    class Hook(xp.cuda.MemoryHook):
        def malloc_postprocess(self, **event):
            events.append(("malloc", event["size"], event["mem_size"], event["mem_ptr"]))

        def free_postprocess(self, **event):
            events.append(("free", event["mem_size"], event["mem_ptr"]))

    gc.collect()
    before = pool.used_bytes()
    with Hook() as hook:
        with pytest.raises(KeyError, match="already exists"), hook:
            pass
        x = xp.zeros((3, 43), np.float32)  # 516 bytes
        view = x[1:].reshape(-1)
        assert pool.used_bytes() - before == 1024
        del x
        assert pool.used_bytes() - before == 1024  # the view is of the same memory
        del view
    assert pool.used_bytes() == before
    (_, _, _, pointer), _ = events
    assert events == [("malloc", 516, 1024, pointer), ("free", 1024, pointer)]
    assert pool.total_bytes() >= before + 1024
    pool.free_all_blocks()
    assert pool.total_bytes() == pool.used_bytes() == before
    other = xp.cuda.MemoryPool()
    with xp.cuda.using_allocator(other.malloc):
        y = xp.zeros(4)
    assert (other.used_bytes(), pool.used_bytes()) == (512, before)
    del y
    assert other.used_bytes() == 0
