"""A stand-in for CuPy: its arrays are NumPy arrays, its kernels run on the CPU.

It is stricter than CuPy: each argument of a kernel is checked against the kernel's C signature, and
nothing is converted between NumPy and the device unasked. Functions that are not here are NumPy's.

What is called between begin_capture() and end_capture() is done by each launch of the graph, and
not before: end_capture() puts back all that was written. Until then what CuPy refuses is refused:
copies from and to the host, and cuBLAS. So is memory of the default pool, which would be given out
again.

A copy on another stream is done when somebody waits for it, and not before, so that what should
have waited gives wrong results.
"""
from __future__ import annotations

import mmap
import os
import re
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from tests.gpusim import engine, memory

__version__ = f"{np.__version__}+gpusim"
launches: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []  # (kernel, grid, block)
capturing: _Capture | None = None  # the graph that is captured now
options: dict[str, Any] = {"order": "ascending", "seed": 0}  # in which the threads of a block start

_ALIGNMENT = 256                  # bytes, of CUDA's allocations
_HUGE = 1 << 28                   # bytes; zeros of this size are mapped, and so cost nothing
_MAX_GRID, _MAX_BLOCK = (2**31 - 1, 65535, 65535), (1024, 1024, 64)
_MAX_DYNAMIC_SHARED = 48 << 10    # bytes, unless raised for the kernel
_CAPABILITY = "90"


class ndarray(NDArrayOperatorsMixin):
    """An array "on the device": one that plain NumPy code cannot reach by accident."""

    __module__ = "cupy"
    __slots__ = ("__weakref__", "_host")
    __array_priority__ = 100

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        if any(isinstance(i, np.ndarray) for i in inputs):
            raise TypeError("Unsupported type <class 'numpy.ndarray'>")
        if ufunc is np.matmul and capturing is not None:
            raise NotImplementedError("calling cuBLAS API during stream capture is currently "
                                      "unsupported")
        return _do(getattr(ufunc, method), inputs, kwargs)

    def __array_function__(self, function, kinds, args, kwargs):
        return _do(function, args, kwargs)

    def __array__(self, *args, **kwargs):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()` "
                        "to construct a NumPy array explicitly.")

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(self._host, name)
        if not callable(value):
            return _wrap(value)
        return lambda *args, **kwargs: _do(value, args, kwargs)

    def __getitem__(self, index):
        return _do(self._host.__getitem__, (index,), {})

    def __setitem__(self, index, value):
        if isinstance(value, np.ndarray) and value.ndim:
            raise TypeError("Unsupported type <class 'numpy.ndarray'>")
        _do(self._host.__setitem__, (index, value), {})

    def __iter__(self):
        return (_wrap(item) for item in self._host)

    def __len__(self):
        return len(self._host)

    def __float__(self):
        _refuse_in_a_graph()
        return float(self._host)

    def __int__(self):
        _refuse_in_a_graph()
        return int(self._host)

    def __index__(self):
        _refuse_in_a_graph()
        return self._host.__index__()

    def __bool__(self):
        _refuse_in_a_graph()
        return bool(self._host)

    def __repr__(self):
        return repr(self._host)

    def __dlpack__(self, **options):
        return self._host.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._host.__dlpack_device__()

    def get(self, stream=None, *, out=None, blocking=True):
        _refuse_in_a_graph()
        out = np.empty(self.shape, self.dtype) if out is None else out
        _copy_on(stream, lambda: np.copyto(out, self._host))
        if blocking and stream is not None:
            stream.synchronize()
        return out

    def set(self, array, stream=None):
        _refuse_in_a_graph()
        if array.dtype != self.dtype or array.shape != self.shape:
            raise TypeError(f"{array.dtype} {array.shape} array set to {self.dtype} {self.shape}")
        _copy_on(stream, lambda: np.copyto(self._host, array))

    @property
    def data(self):
        return types.SimpleNamespace(ptr=self._host.ctypes.data)

    @property
    def device(self):
        return _Device(0)


def _wrap(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = np.asarray(value)  # CuPy's reductions give arrays without dimensions, no scalars
    if isinstance(value, np.ndarray):
        array = object.__new__(ndarray)
        array._host = _align(value)
        memory.track(array)
        return array
    return type(value)(map(_wrap, value)) if type(value) in (tuple, list) else value


def _unwrap(value: Any) -> Any:
    if isinstance(value, ndarray):
        return value._host
    if type(value) in (tuple, list):
        return type(value)(map(_unwrap, value))
    return {k: _unwrap(v) for k, v in value.items()} if type(value) is dict else value


def _do(function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """What the function of NumPy makes of the arrays; a graph that is captured does it again."""
    args, kwargs = _unwrap(tuple(args)), _unwrap(kwargs)
    given = list(_arrays_in((getattr(function, "__self__", None), args, kwargs)))
    if capturing is not None:
        capturing.keep(given)
    result = _wrap(function(*args, **kwargs))
    for array in _arrays_in(_unwrap(result)):
        if not any(np.may_share_memory(array, a) for a in given):
            _note_allocation(array)
    if capturing is not None:
        written = _unwrap(result)
        capturing.steps.append(lambda: _copy(function(*args, **kwargs), written))
    return result


def _arrays_in(value: Any) -> Iterator[np.ndarray]:
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _arrays_in(item)
    elif isinstance(value, dict):
        yield from _arrays_in(list(value.values()))


def _copy(new: Any, old: Any) -> None:
    """Write arrays to where the first call left its results, unless they are views of the same."""
    if isinstance(new, (tuple, list)):
        for pair in zip(new, old):
            _copy(*pair)
    elif isinstance(old, np.ndarray) and not np.may_share_memory(new, old):
        old[...] = new


def _refuse_in_a_graph() -> None:
    if capturing is not None:
        raise RuntimeError("the current stream is capturing, so synchronous API calls are "
                           "disallowed")


def _align(array: np.ndarray) -> np.ndarray:
    """The same, at an address as CUDA gives out; views keep their offset."""
    if not array.flags.owndata or array.ctypes.data % _ALIGNMENT == 0:
        return array
    aligned = _allocate(array.nbytes).view(array.dtype)
    if array.flags.f_contiguous and not array.flags.c_contiguous:
        aligned = aligned.reshape(array.shape[::-1]).T
    else:
        aligned = aligned.reshape(array.shape)
    aligned[...] = array
    return aligned


def _allocate(nbytes: int) -> np.ndarray:
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    return memory[-memory.ctypes.data % _ALIGNMENT:][:nbytes]


def empty(shape, dtype=float, order="C"):
    """Holds NaN and -1: a value that no kernel wrote shows."""
    array = np.empty(shape, dtype, order)
    array = _align(array)
    _poison(array)
    _note_allocation(array)
    return _wrap(array)


def _poison(array: np.ndarray) -> None:
    if array.size and array.flags.c_contiguous:
        array.reshape(-1).view(np.uint8)[...] = 0xFF


def _note_allocation(array: np.ndarray) -> None:
    """array: new, and not a view. Its memory belongs to the pool in use."""
    if capturing is not None:
        if memory.default_in_use():
            raise RuntimeError("memory of the default pool in a graph: it is given out again once "
                               "the graph is captured; use using_allocator(MemoryPool().malloc)")
        capturing.made.append(array)


def empty_like(array, dtype=None):
    return empty(array.shape, dtype or array.dtype)


def zeros(shape, dtype=float):
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if nbytes < _HUGE:
        return _do(np.zeros, (shape, dtype), {})
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # NORESERVE
    return _wrap(np.frombuffer(pages, dtype).reshape(shape))


def array(value, dtype=None, copy=True):
    if not isinstance(value, ndarray):
        _refuse_in_a_graph()
    return _do(np.array, (value,), {"dtype": dtype, "order": "C"})


def _has_dtype(value, dtype):
    """Whether it is an array on the device of that dtype. (np.dtype(float) == None is true.)"""
    return isinstance(value, ndarray) and (dtype is None or value.dtype == dtype)


def asarray(value, dtype=None):
    if _has_dtype(value, dtype):
        return value
    return array(value, dtype)


def ascontiguousarray(value, dtype=None):
    if _has_dtype(value, dtype) and value.ndim and value.flags.c_contiguous:
        return value  # the very array, as in CuPy
    return _do(np.ascontiguousarray, (value, dtype), {})


def concatenate(arrays, axis=0, **options):
    if len(arrays) > 8:  # their addresses are copied from the host
        _refuse_in_a_graph()
    return _do(np.concatenate, (list(arrays), axis), options)


def asnumpy(value):
    return value.get() if isinstance(value, ndarray) else np.asarray(value)


def __getattr__(name: str) -> Any:
    value = getattr(np, name)
    if isinstance(value, type) or not callable(value):
        return value
    return lambda *args, **kwargs: _do(value, args, kwargs)


# ------------------------------------------------------------------------------------- kernels


class RawModule:
    def __init__(self, *, code, options=(), **ignored):
        if not isinstance(options, tuple):
            raise TypeError("options must be a tuple")
        self._code = code
        self._module: engine.Module | None = None

    def get_function(self, name):
        if self._module is None:  # CuPy too compiles at the first get_function
            try:
                self._module = engine.Module(
                    self._code, checked=os.environ.get("GPUSIM_CHECKS", "on") != "off")
            except engine.CompileError as e:
                raise CompileException(str(e)) from None
        kernel = self._module.kernels.get(name)
        if kernel is None or not kernel.extern_c:
            raise RuntimeError(f"CUDA_ERROR_NOT_FOUND: named symbol not found: {name} is not "
                               'declared extern "C" __global__')
        return RawKernel(self._module, name)


class RawKernel:
    def __init__(self, module: engine.Module, name: str):
        self.name = name
        self.max_dynamic_shared_size_bytes = _MAX_DYNAMIC_SHARED
        self._module = module
        self._signature = module.signature(name)
        self._kernel = module.kernels[name]

    def __call__(self, grid, block, args, *, shared_mem=0):
        if not (isinstance(grid, tuple) and isinstance(block, tuple)):
            raise TypeError("grid and block must be tuples")
        # As in CuPy, missing sizes and zeros become 1.
        grid = tuple(max(1, int(g)) for g in (*grid, 1, 1)[:3])
        block = tuple(max(1, int(b)) for b in (*block, 1, 1)[:3])
        over = any(g > m for g, m in zip(grid + block, _MAX_GRID + _MAX_BLOCK))
        if over or np.prod(block) > min(1024, self._kernel.max_threads):
            raise ValueError(f"{self.name}: grid {grid} or block {block} is over the limits of the "
                             "device or the __launch_bounds__ of the kernel")
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise ValueError(f"{self.name}: {shared_mem} bytes of dynamic shared memory; set "
                             "max_dynamic_shared_size_bytes first")
        if len(args) != len(self._signature):
            raise TypeError(f"{self.name} takes {len(self._signature)} arguments, got {len(args)}")
        regions: list[tuple[engine.Region, bool]] = []
        values = [self._value(i, arg, code, regions)
                  for i, (arg, code) in enumerate(zip(args, self._signature))]
        merged = _merge(self.name, regions)
        hosts = [a._host for a in args if isinstance(a, ndarray)]

        def launch():
            assert hosts is not None  # keeps them alive
            launches.append((self.name, grid, block))
            self._module.launch(self.name, grid, block, [v.ctypes.data for v in values], merged,
                                shared_mem, **options)

        if capturing is not None:
            capturing.keep(hosts)
        launch()
        if capturing is not None:
            capturing.steps.append(launch)

    def _value(self, number: int, arg: Any, code: str, regions: list) -> np.ndarray:
        """The bytes that the kernel receives; for an array, its address. Notes its memory."""
        declared = self._kernel.parameters[number]
        who = f"{self.name}: argument {number} ({declared})"
        if code[0] == "P":
            if arg is None:
                return np.zeros(1, np.uint64)
            if not isinstance(arg, ndarray):
                raise TypeError(f"{who} is a pointer; got {type(arg).__name__}")
            if not arg.flags.c_contiguous:
                raise ValueError(f"{who}: the array has strides {arg.strides}; a kernel gets only "
                                 "its address")
            if not _fits(code[2:], arg.dtype):
                raise TypeError(f"{who}: the array is {arg.dtype}")
            low = arg.data.ptr
            name = f"argument {number} ({re.findall(r'[a-zA-Z_]+[0-9]*', declared)[-1]})"
            regions.append((engine.Region(low, low + arg.nbytes, arg.dtype.itemsize,
                                          code[1] == "m", name), "__restrict__" in declared))
            return np.array([low], np.uint64)
        if not isinstance(arg, np.generic):
            raise TypeError(f"{who}: got a {type(arg).__name__}; CuPy passes Python numbers as 64 "
                            "bits, so give a NumPy scalar of the parameter's type")
        if not _fits(code, arg.dtype):
            raise TypeError(f"{who}: got numpy.{arg.dtype}")
        return np.array([arg])


def _fits(code: str, dtype: np.dtype) -> bool:
    """Has a C type such as i4 or f8 the layout of the dtype? s2 is one of our 16-bit floats."""
    if code == "s2":
        return dtype.name in ("float16", "bfloat16")
    return (dtype.kind, dtype.itemsize) == (code[0], int(code[1:]))


def _merge(kernel: str, regions: list[tuple[engine.Region, bool]]) -> list[engine.Region]:
    """One region for each piece of memory. Raises ValueError where __restrict__ is broken."""
    merged: list[tuple[engine.Region, bool]] = []
    for region, restrict in sorted(regions, key=lambda r: r[0][:2]):
        if merged and region.low < merged[-1][0].high:
            other, other_restrict = merged[-1]
            if ((other.writable and restrict and not region.writable)
                    or (region.writable and other_restrict and not other.writable)):
                raise ValueError(f"{kernel}: {other.name} and {region.name} overlap; one is const "
                                 "__restrict__ and the other is written")
            merged[-1] = engine.Region(
                other.low, max(other.high, region.high), min(other.itemsize, region.itemsize),
                other.writable or region.writable, f"{other.name} = {region.name}"), restrict
        elif region.high > region.low:
            merged.append((region, restrict))
    return [region for region, _ in merged]


# ------------------------------------------------------------------------------ the rest of CuPy


class CompileException(Exception):
    """cupy.cuda.compiler.CompileException."""


class CUDARuntimeError(RuntimeError):
    """cupy.cuda.runtime.CUDARuntimeError."""

    def __init__(self, status):
        self.status = status
        super().__init__(f"CUDA error {status}")


class _Device:
    compute_capability = _CAPABILITY

    def __init__(self, number: int = 0):
        self.id = number

    def synchronize(self):
        _refuse_in_a_graph()


class _Event:
    """The host's clock: a launch has ended when it returns. A copy on another stream has not."""

    def __init__(self, *args, **kwargs):
        self.seconds = 0.0
        self._stream, self._copies = None, 0  # how many of the stream's copies come before it

    def record(self, stream=None):
        self.seconds = time.perf_counter()
        self._stream = stream
        self._copies = 0 if stream is None else stream.copied + len(stream.copies)

    @property
    def done(self):
        return self._stream is None or self._stream.copied >= self._copies

    def synchronize(self):
        if self._stream is not None:
            self._stream.copy_until(self._copies)


class _Stream:
    ptr = 0

    def __init__(self, *, non_blocking=False):
        self.non_blocking = non_blocking
        self.copies: list[Callable[[], Any]] = []  # that nobody has waited for
        self.copied = 0

    def __enter__(self):
        _streams.append(self)
        return self

    def __exit__(self, *error):
        _streams.pop()

    def copy_until(self, count):
        while self.copied < count:
            self.copied += 1
            self.copies.pop(0)()

    def synchronize(self):
        _refuse_in_a_graph()
        self.copy_until(self.copied + len(self.copies))

    def record(self, event=None):
        event = _Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event):
        """A stream that waits for copies finds them done."""
        event.synchronize()

    def is_capturing(self):
        return capturing is not None

    def begin_capture(self):
        global capturing
        if not self.non_blocking:
            raise RuntimeError("cannot capture on the default (legacy) stream")
        capturing = _Capture()

    def end_capture(self):
        global capturing
        assert capturing is not None
        captured, capturing = capturing, None
        captured.undo()
        return _Graph(captured.steps)


_streams = [_Stream()]  # the last one is in use


def _copy_on(stream: _Stream | None, copy: Callable[[], Any]) -> None:
    if stream is None:
        copy()
    else:
        stream.copies.append(copy)


class _Capture:
    """What a graph does, and what its steps have written so far: they were done to know shapes."""

    def __init__(self):
        self.steps: list[Callable[[], Any]] = []
        self.made: list[np.ndarray] = []
        self.before: list[tuple[np.ndarray, np.ndarray]] = []

    def keep(self, arrays: list[np.ndarray]) -> None:
        """Note what is in arrays that the next step may write."""
        self.before += [(a, a.copy()) for a in arrays if a.flags.writeable]

    def undo(self) -> None:
        for array, content in reversed(self.before):
            array[...] = content
        for array in self.made:
            _poison(array)


class _Graph:
    def __init__(self, steps: list[Callable[[], Any]]):
        self._steps = steps

    def launch(self, stream=None):
        for step in self._steps:
            step()


def _no_memory(size: int) -> Any:
    """cupy.cuda.Memory, where arrays do not come from: as on a GPU that is full."""
    raise CUDARuntimeError(2)


def _device_properties(number: int) -> dict[str, Any]:
    return {"name": b"gpusim (CPU)", "l2CacheSize": 1 << 20, "totalGlobalMem": 1 << 34,
            "multiProcessorCount": 1}


cuda = types.ModuleType("cupy.cuda")
cuda.Device, cuda.Event, cuda.Stream = _Device, _Event, _Stream  # type: ignore[attr-defined]
cuda.is_available = lambda: True  # type: ignore[attr-defined]
cuda.get_elapsed_time = (  # type: ignore[attr-defined]
    lambda start, end: 1e3 * (end.seconds - start.seconds))
cuda.get_current_stream = lambda: _streams[-1]  # type: ignore[attr-defined]
cuda.MemoryPool = memory.MemoryPool  # type: ignore[attr-defined]
cuda.MemoryHook = memory.MemoryHook  # type: ignore[attr-defined]
cuda.using_allocator = memory.using_allocator  # type: ignore[attr-defined]
cuda.Memory, cuda.MemoryPointer = _no_memory, object  # type: ignore[attr-defined]
cuda.compiler = types.SimpleNamespace(  # type: ignore[attr-defined]
    CompileException=CompileException)
cuda.memory = types.SimpleNamespace(  # type: ignore[attr-defined]
    OutOfMemoryError=memory.OutOfMemoryError)


def get_default_memory_pool():
    return memory.default_pool


_compute_types = {"f": 1}  # CuPy's numbers for how cuBLAS computes; NumPy computes alike in all
_core = types.SimpleNamespace(
    get_compute_type=_compute_types.__getitem__, set_compute_type=_compute_types.__setitem__,
    _routines_linalg=types.SimpleNamespace(COMPUTE_TYPE_TF32=7))
cuda.runtime = types.SimpleNamespace(  # type: ignore[attr-defined]
    CUDARuntimeError=CUDARuntimeError, getDeviceCount=lambda: 1, driverGetVersion=lambda: 13000,
    runtimeGetVersion=lambda: 13000, getDeviceProperties=_device_properties,
    memGetInfo=lambda: (1 << 34, 1 << 34))

cupyx = types.ModuleType("cupyx")
cupyx.empty_pinned = lambda shape, dtype: np.empty(shape, dtype)  # type: ignore[attr-defined]
