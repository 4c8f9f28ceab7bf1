"""Which backend is in use, what both have in common, and the checks before a kernel is launched."""
from __future__ import annotations

import inspect
import subprocess
import sys
import threading
import types

import numpy as np
import pytest

from gpucnn import backend as backends
from gpucnn.backend import Backend, get_backend, make_backend, use_backend
from gpucnn.backend.cuda_kernel import (
    BLOCK,
    MAX_GRID,
    MAX_INT_INDEX,
    Kernel,
    Parameter,
    check_arguments,
    launch_grid,
)
from gpucnn.backend.numpy_backend import NumpyBackend
from gpucnn.errors import BackendError, KernelError
from gpucnn.geometry import make_window
from gpucnn.layers import ReLU
from tests.gpusim.mutation import mutated

METHODS = [n for n, v in vars(Backend).items() if inspect.isfunction(v) and not n.startswith("_")]


@pytest.fixture
def fresh():
    """make_backend without its memory, here and for what comes after."""
    make_backend.cache_clear()
    yield
    make_backend.cache_clear()


# ------------------------------------------------------------------------------------ the choice


def test_the_variable_is_read_when_asked(monkeypatch):
    monkeypatch.setenv("GPUCNN_BACKEND", "numpy")
    assert get_backend().name == "numpy"
    for unknown in ("cuda", "", "NumPy"):  # faults row 43
        monkeypatch.setenv("GPUCNN_BACKEND", unknown)
        with pytest.raises(ValueError, match=f"^GPUCNN_BACKEND='{unknown}' is not known; use"):
            get_backend()


def test_use_backend_wins_and_is_undone(monkeypatch):
    monkeypatch.setenv("GPUCNN_BACKEND", "bad")
    with use_backend("numpy") as chosen:
        assert get_backend() is chosen
        layer = ReLU()
    assert layer.backend is chosen
    with pytest.raises(ValueError, match="bad"):
        get_backend()


def test_use_backend_is_undone_by_an_error_and_nests(cupy_backend):
    with pytest.raises(ZeroDivisionError), use_backend("numpy") as inner:
        assert get_backend() is inner
        raise ZeroDivisionError
    assert get_backend() is cupy_backend


def test_use_backend_holds_in_its_own_thread_only(monkeypatch):
    monkeypatch.setenv("GPUCNN_BACKEND", "bad")
    errors = []

    def other():
        try:
            get_backend()
        except ValueError as e:
            errors.append(e)

    with use_backend("numpy"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert errors


def no_gpu(monkeypatch, error):
    def device_count():
        if error is None:
            return 0
        raise FakeRuntimeError(error)

    class FakeRuntimeError(RuntimeError):
        pass

    fake = types.ModuleType("cupy")
    fake.__version__ = "14.2.0"
    fake.cuda = types.SimpleNamespace(runtime=types.SimpleNamespace(
        CUDARuntimeError=FakeRuntimeError, getDeviceCount=device_count))
    monkeypatch.setitem(sys.modules, "cupy", fake)


def test_cupy_missing_no_driver_no_gpu_are_three_remedies(monkeypatch, fresh):  # rows 44 and 45
    monkeypatch.setenv("GPUCNN_BACKEND", "cupy")
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(BackendError, match="^GPUCNN_BACKEND=cupy but CuPy is not installed"):
        get_backend()
    no_gpu(monkeypatch, "cudaErrorInsufficientDriver: CUDA driver version is insufficient")
    with pytest.raises(BackendError, match=r"CuPy 14.2.0 found no usable GPU \(cudaErrorInsuff.*"
                                           "driver until nvidia-smi works, or set GPUCNN_BACKEND"):
        get_backend()
    for error in (None, "cudaErrorNoDevice: no CUDA-capable device is detected"):
        no_gpu(monkeypatch, error)
        with pytest.raises(BackendError, match=r"\(cudaErrorNoDevice.*CUDA_VISIBLE_DEVICES"):
            get_backend()


@pytest.mark.parametrize("error", [
    ImportError("libnvrtc.so.12: cannot open shared object file"),
    ModuleNotFoundError("No module named 'fastrlock'", name="fastrlock")])
def test_a_cupy_that_cannot_be_imported_says_why(error, monkeypatch, fresh):
    """CuPy raises a page of advice from the error that says what is wrong."""
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "cupy":
                raise ImportError("\n=====\nFailed to import CuPy.\n=====\n") from error

    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(BackendError) as caught:
        make_backend("cupy")
    assert str(caught.value) == (f"GPUCNN_BACKEND=cupy but CuPy cannot be imported ({error}); "
                                 "reinstall it, or set GPUCNN_BACKEND=numpy")
    assert make_backend("auto").name == "numpy"


def test_a_missing_cupy_says_how_to_install_it(tmp_path):
    """In a process of its own, where nothing stands in CuPy's place."""
    script = ("import sys\n"
              "class Block:\n"
              "    def find_spec(self, name, path=None, target=None):\n"
              "        if name == 'cupy': raise ModuleNotFoundError('no cupy', name='cupy')\n"
              "sys.meta_path.insert(0, Block())\n"
              "from gpucnn.backend import make_backend\n"
              "try: make_backend('cupy')\n"
              "except Exception as e: print(type(e).__name__, e)\n"
              "print(make_backend('auto').name)\n")
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                            check=True)
    error, name = result.stdout.splitlines()
    assert error == ("BackendError GPUCNN_BACKEND=cupy but CuPy is not installed; pip install "
                     "'gpucnn[cuda12]' (or cuda13), or set GPUCNN_BACKEND=numpy")
    assert name == "numpy"
    assert result.stderr.count("gpucnn: backend numpy (CuPy is not installed") == 1


def test_auto_says_once_what_it_took_and_why(monkeypatch, fresh, capsys):
    no_gpu(monkeypatch, "cudaErrorNoDevice: none")
    monkeypatch.delenv("GPUCNN_BACKEND", raising=False)
    assert get_backend().name == get_backend().name == "numpy"
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("gpucnn: backend numpy (CuPy 14.2.0 found no usable GPU (cudaErrorNoDev")


def test_importing_touches_nothing():
    script = ("import os, sys\n"
              "read = os._Environ.__getitem__\n"
              "def refuse(self, key):\n"
              "    assert not key.startswith('GPUCNN'), key\n"
              "    return read(self, key)\n"
              "os._Environ.__getitem__ = refuse\n"
              "import gpucnn\n"
              "heavy = {'cupy', 'torch', 'matplotlib', 'PIL', 'tqdm', 'pooch'} & set(sys.modules)\n"
              "assert not heavy, heavy\n")
    subprocess.run([sys.executable, "-c", script], check=True)


# ---------------------------------------------------------------------------- what is in common


@pytest.mark.parametrize("method", METHODS)
def test_backends_have_the_same_methods(method, cupy_backend):
    wanted = _parameters(getattr(Backend, method))
    for cls in (NumpyBackend, type(cupy_backend)):
        assert _parameters(getattr(cls, method)) == wanted
        public = {n for n in vars(cls) if not n.startswith("_")}
        assert public - {"name", "xp", "block_bytes", "captures", "norm_recomputes"} == set(METHODS)


def _parameters(function):
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def test_arrays_go_there_and_back(backend):
    x = np.arange(12.0).reshape(3, 4)
    there = backend.asarray(x.T, np.float32)
    assert isinstance(there, backend.xp.ndarray)
    assert there.flags.c_contiguous
    assert backends.backend_of(there) is backend
    np.testing.assert_array_equal(backend.to_numpy(there), x.T)


# ---------------------------------------------------------------------- before a kernel is launched

PARAMETERS = [Parameter("x", "scalar_t", True), Parameter("mask", "mask_t", True),
              Parameter("n", "int", False), Parameter("scale", "scalar_t", False)]


class OnDevice:
    """What the launcher looks at of an array."""

    def __init__(self, array, device=0, ptr=1024, size=None):
        self.dtype, self.flags, self.itemsize = array.dtype, array.flags, array.itemsize
        self.shape, self.strides, self.size = array.shape, array.strides, size or array.size
        self.device = types.SimpleNamespace(id=device)
        self.data = types.SimpleNamespace(ptr=ptr)


X = OnDevice(np.zeros((4, 4), np.float32))
MASK = OnDevice(np.zeros(4, np.uint8))


def check(*args, vec=1):
    return check_arguments("k", PARAMETERS, args, vec, OnDevice, 0)


def test_good_arguments_get_the_declared_types():
    checked, variant = check(X, MASK, 3, 0.5)
    assert checked[:2] == [X, MASK]
    assert (type(checked[2]), type(checked[3])) == (np.int32, np.float32)
    assert (variant.scalar_t, variant.mask_t, variant.index_t) == (np.float32, np.uint8, np.int32)


@pytest.mark.parametrize(("args", "message"), [
    ((X, MASK, 3), "k takes 4 arguments, got 3"),
    ((OnDevice(np.zeros(4, np.int64)), MASK, 3, 0.5), "'x': int64 where the kernel reads scalar_t"),
    ((X, X, 3, 0.5), "'mask': float32 where the kernel reads mask_t, which is uint8 or int32"),
    ((np.zeros(4, np.float32), MASK, 3, 0.5), "'x': ndarray is not an array of this backend"),
    (([1.0], MASK, 3, 0.5), "'x': list is not an array"),
    ((OnDevice(np.zeros((4, 3), np.float32).T), MASK, 3, 0.5), "'x': not C-contiguous .*strides"),
    ((OnDevice(np.zeros(4, np.float32), device=1), MASK, 3, 0.5), "'x': on device 1, .* device 0"),
    ((X, MASK, 3.0, 0.5), "'n': 3.0 is not an int from -2147483648 to 2147483647"),
    ((X, MASK, 2**31, 0.5), "'n': 2147483648 is not an int"),
    ((X, MASK, True, 0.5), "'n': True is not an int"),
    ((X, MASK, np.int64(-2**31 - 1), 0.5), "'n': .*-2147483649"),
    ((X, MASK, 3, 1), "'scale': 1 is not a float"),
    ((X, MASK, 3, "1"), "'scale': '1' is not a float"),
    ((X, MASK, 3, 1e300), "'scale': 1e\\+300 is out of the range of float32"),
])
def test_a_wrong_argument_is_named(args, message):
    with pytest.raises(TypeError, match=message):
        check(*args)


def test_infinity_is_a_float():
    assert check(X, MASK, 3, float("inf"))[0][3] == np.inf


def test_a_kernel_without_scalar_t_is_checked_too():
    parameters = [Parameter("x", "float", True), Parameter("n", "index_t", False)]
    checked, variant = check_arguments("k", parameters, (X, 3), 1, OnDevice, 0)
    assert (type(checked[1]), variant.scalar_t, variant.index_t) == (np.int32, np.float32, np.int32)
    large = OnDevice(np.zeros(4, np.float32), size=MAX_INT_INDEX + 1)
    checked, variant = check_arguments("k", parameters, (large, 3), 1, OnDevice, 0)
    assert (type(checked[1]), variant.index_t) == (np.int64, np.int64)


def test_wide_accesses_need_alignment():
    check(X, MASK, 3, 0.5, vec=4)
    with pytest.raises(TypeError, match="'x': not aligned to the 16 bytes"):
        check(OnDevice(np.zeros(4, np.float32), ptr=1028), MASK, 3, 0.5, vec=4)


def test_large_tensors_get_64_bit_indices():  # row 24
    # A thread's index may pass the end by one stride of the grid before its loop stops.
    assert MAX_INT_INDEX - 1 + BLOCK * MAX_GRID < 2**31
    for size, index_t in ((MAX_INT_INDEX, np.int32), (MAX_INT_INDEX + 1, np.int64)):
        _, variant = check(OnDevice(np.zeros(4, np.float32), size=size), MASK, 3, 0.5)
        assert variant.index_t == index_t


@pytest.mark.parametrize("threads", [0, 1, 31, 32, 33, 255, 256, 257, 65535 * 256 + 1])  # row 49
def test_every_size_is_covered_by_a_legal_grid(threads):
    grid = launch_grid(threads)
    assert grid <= MAX_GRID
    assert grid * BLOCK >= threads or grid == MAX_GRID


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 255, 256, 257, 1025])
def test_every_size_is_computed(size, cupy_backend, rng):
    x = rng.standard_normal((size, 1, 1, 1)).astype(np.float32)
    window = make_window("test", 1, 1, 0, 1, (1, 1))
    y, _ = cupy_backend.max_pool(cupy_backend.asarray(x), window)
    np.testing.assert_array_equal(cupy_backend.to_numpy(y), x)


# ------------------------------------------------------------------------------- the .cu files


def pool(backend):
    window = make_window("test", 2, 2, 0, 1, (2, 2))
    y, _ = backend.max_pool(backend.asarray(np.arange(4, dtype=np.float32).reshape(1, 2, 2, 1)),
                            window)
    return float(y.sum())


def test_kernels_of_ones_own(cupy_backend):
    assert pool(cupy_backend) == 3
    with mutated("maxpool.cu", "value > best.at[v]", "s.at[v] < best.at[v]"):
        assert pool(cupy_backend) == 0
    assert pool(cupy_backend) == 3


OWN = """
/* extern "C" __global__ void not_this(size_t n) */
extern "C" __global__ void __launch_bounds__(256) fill(
    float* __restrict__ y,  // what is filled, (n,)
    unsigned int seed /* not used */, index_t n, scalar_t value)
{
    GRID_STRIDE_LOOP(i, n) y[i] = value;
}
extern "C"  __global__ __launch_bounds__(256, 2)
void twice(const float *x, float * y, int n) { GRID_STRIDE_LOOP(i, n) y[i] = 2 * x[i]; }
"""


def test_a_file_of_ones_own_may_be_written_in_other_ways(cupy_backend):
    with mutated("dropout.cu", "// Dropout", OWN + "// Dropout"):
        x = cupy_backend.asarray(np.arange(4, dtype=np.float32))
        y = cupy_backend.xp.empty(4, np.float32)
        Kernel("dropout.cu", "twice")(4, x, y, 4)
        np.testing.assert_array_equal(cupy_backend.to_numpy(y), [0, 2, 4, 6])
    # scalar_t in a scalar alone: nothing says what it is.
    with (mutated("dropout.cu", "// Dropout", OWN + "// Dropout"),
          pytest.raises(TypeError, match="fill, argument 'value': no array before it says what")):
        Kernel("dropout.cu", "fill")(4, y, 7, 4, 0.5)
    with mutated("dropout.cu", "// Dropout", OWN.replace("scalar_t", "float") + "// Dropout"):
        Kernel("dropout.cu", "fill")(4, y, 7, 4, 0.5)
        np.testing.assert_array_equal(cupy_backend.to_numpy(y), [0.5] * 4)


@pytest.mark.parametrize("file", ["maxpool.cu", "common.cuh"])
def test_a_file_that_is_edited_is_compiled_anew(cupy_backend, file):
    with mutated("maxpool.cu", "// Max", "// My max") as folder:
        assert pool(cupy_backend) == 3
        text = (folder / file).read_text()
        edited = {"maxpool.cu": ("value > best.at[v]", "s.at[v] < best.at[v]"),
                  "common.cuh": ("[i] = s;", "[i] = s; p[i * VEC] += 40;")}[file]
        assert edited[0] in text
        (folder / file).write_text(text.replace(*edited))
        assert pool(cupy_backend) == {"maxpool.cu": 0, "common.cuh": 43}[file]


def test_a_broken_file_is_named_with_line_and_architecture(cupy_backend):  # row 48
    with (mutated("maxpool.cu", "bool none_yet = true;", "bool none_yet = true") as folder,
          pytest.raises(KernelError, match=r"^kernels/maxpool.cu failed to compile for sm_\d+: "
                                           r".*maxpool\.cu[:(]\d+.*error") as caught):
        lines = (folder / "maxpool.cu").read_text().splitlines()
        broken = 1 + next(i for i, line in enumerate(lines) if "bool none_yet = true" in line)
        pool(cupy_backend)
    assert "\n" not in str(caught.value)
    assert any(str(n) in str(caught.value) for n in (broken, broken + 1))


@pytest.mark.parametrize("error", [
    ImportError("libnvrtc.so.12: cannot open shared object file"),
    OSError("cannot load libnvrtc.so.12"),
    RuntimeError("CuPy failed to load libnvrtc.so.12:\nOSError: no such file")], ids=type)
def test_a_missing_compiler_says_what_to_install(error, cupy_backend, monkeypatch):  # row 48
    other, raised = type(error)("something else"), [error]

    def fail(**ignored):
        raise raised[0]

    monkeypatch.setattr(cupy_backend.xp, "RawModule", fail)
    with mutated("maxpool.cu", "// Max", "// Another max"):
        with pytest.raises(KernelError, match=r"^kernels/maxpool.cu: CuPy cannot load the CUDA "
                                              r"compiler NVRTC \(.*nvrtc.*\); pip install"):
            pool(cupy_backend)
        raised[0] = other
        with pytest.raises(type(other), match="^something else$"):
            pool(cupy_backend)


def test_a_folder_without_the_file_is_an_error(cupy_backend, tmp_path, monkeypatch):
    monkeypatch.setenv("GPUCNN_KERNEL_DIR", str(tmp_path))
    with pytest.raises(KernelError, match="maxpool.cu.*must hold a copy of the whole kernels"):
        pool(cupy_backend)


def test_an_unknown_kernel_or_type_is_an_error(cupy_backend):
    x = cupy_backend.xp.zeros(4, np.float32)
    with pytest.raises(KernelError, match="no kernel 'min_pool'; it has max_pool, max_pool_back"):
        Kernel("maxpool.cu", "min_pool")(4, x)
    with (mutated("dropout.cu", "long long size", "size_t size"),
          pytest.raises(KernelError, match=r"dropout.cu.*'size_t size' has a type")):
        cupy_backend.dropout(x, 0.5, 1, cupy_backend.asarray([1]))
