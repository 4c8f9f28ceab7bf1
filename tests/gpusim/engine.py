"""Compile a CUDA source with the host's C++ compiler, and launch its kernels on the CPU."""
from __future__ import annotations

import ctypes as C
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.gpusim import inline_ptx

HERE = Path(__file__).resolve().parent
CACHE = Path(tempfile.gettempdir()) / f"gpusim-{os.getuid()}"
CXX = os.environ.get("CXX", "g++")
ORDERS = ("ascending", "descending", "shuffled")
_MAX_ACCESSES = 10**10

# DWARF 4: some versions of addr2line name the wrong file after #line in DWARF 5.
_BASE = ["-std=c++17", "-gdwarf-4", "-w", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing",
         "-fno-threadsafe-statics"]
# A kernel runs for a moment, so what counts is the time that it takes to compile.
_CHECKED = ["-O0", "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0",
            "--param=tsan-distinguish-volatile=1",
            "-fsanitize=signed-integer-overflow,shift,integer-divide-by-zero,bounds,alignment,"
            "float-cast-overflow,unreachable", "-fno-sanitize-recover=all"]
# By threading jumps, g++ copies a barrier into the paths that lead to it, which nvcc never does:
# threads seem to wait at different ones.
_UNCHECKED = ["-O2", "-fno-thread-jumps"]
# Fortified longjmp refuses to jump between the stacks of fibers.
_HEADERS = ("device.h", "ptx.h")
_RUNTIME_FILES = ("runtime.cpp", "runtime_ptx.h")
_RUNTIME = ["-std=c++17", "-O2", "-g", "-U_FORTIFY_SOURCE", "-fPIC", "-shared"]

_BOUNDS = r'(?:__launch_bounds__\s*\(([^),]+)[^)]*\)\s*)?'
_KERNEL = re.compile(r'(extern\s+"C"\s+)?__global__\s+' + _BOUNDS + r'void\s+' + _BOUNDS
                     + r'(\w+)\s*\(([^)]*)\)\s*\{')
_EXTERN_SHARED = re.compile(
    r"extern\s+__shared__\s+(?:(?:__align__|alignas)\s*\(\s*\d+\s*\)\s*)?"
    r"((?:unsigned\s+)?\w+)\s+(\w+)\s*\[\s*\]\s*;")
_SMALL_SHARED = re.compile(r"__shared__[^;]*\b(char|short|bool|u?int(8|16)_t)\b")
_ASM = re.compile(r"\b(?:asm|__asm__|__asm)\b")
_KERNEL_START = '# 1 "kernel.cu"'


class KernelFault(RuntimeError):
    """A kernel did something that a GPU would fault on, or that is undefined there."""


class CompileError(RuntimeError):
    """The compiler's messages."""


def available() -> tuple[bool, str]:
    """Whether kernels can run here; if not, why."""
    if shutil.which(CXX) is None:
        return False, f"there is no C++ compiler ({CXX}) to run CUDA sources on the CPU"
    if not Path("/proc/self/maps").exists():
        return False, "running CUDA sources on the CPU needs Linux"
    return True, ""


class Kernel(NamedTuple):
    """What the source says of a kernel."""

    extern_c: bool
    max_threads: int  # in a block
    parameters: list[str]


class Region(NamedTuple):
    """Memory that a launch may touch."""

    low: int
    high: int
    itemsize: int
    writable: bool
    name: str


class _Region(C.Structure):
    _fields_ = (("low", C.c_size_t), ("high", C.c_size_t), ("shift", C.c_uint32),
                ("writable", C.c_uint32), ("name", C.c_char_p), ("cells", C.c_void_p),
                ("kind", C.c_uint32))


class _Launch(C.Structure):
    _fields_ = (("grid", C.c_uint * 3), ("block", C.c_uint * 3), ("dynamic_shared", C.c_uint),
                ("order", C.c_uint), ("seed", C.c_uint), ("checked", C.c_uint),
                ("n_regions", C.c_uint), ("regions", C.POINTER(_Region)), ("entry", C.c_void_p),
                ("args", C.POINTER(C.c_void_p)), ("max_accesses", C.c_uint64),
                ("fault_address", C.c_size_t), ("fault", C.c_char * 400))


class Module:
    """A source, compiled. checked: with every memory access checked, else fast."""

    def __init__(self, source: str, *, checked: bool = True):
        self.source, self.checked = source, checked
        found = _KERNEL.findall(_strip_comments(source))
        body = _EXTERN_SHARED.sub(r"\1* \2 = (\1*)gpusim_dynamic_shared();", source)
        text = "\n".join([
            '#include "device.h"', '#line 1 "kernel.cu"', body, '#line 1 "entries"',
            *(f"GPUSIM_ENTRY({name}, {before or after or 1024})"
              for _, before, after, name, _ in found),
            'extern "C" __attribute__((weak, visibility("hidden")))'
            " char __start_gpusim_shared[], __stop_gpusim_shared[];",
            'extern "C" char* gpusim_shared_low() { return __start_gpusim_shared; }',
            'extern "C" char* gpusim_shared_high() { return __stop_gpusim_shared; }', ""])
        flags = _BASE + (_CHECKED if checked else _UNCHECKED)
        runtime = _build_runtime()
        key = _hash(text, *flags, runtime.name, *_read_all(*_HEADERS, "inline_ptx.py"))
        self.path = _build(CACHE / f"kernel-{key}.so",
                           lambda out: _compile(text, flags, runtime, out))
        self._runtime = C.CDLL(str(runtime), mode=C.RTLD_GLOBAL)
        self._library = C.CDLL(str(self.path))
        for bound in ("gpusim_shared_low", "gpusim_shared_high"):
            getattr(self._library, bound).restype = C.c_void_p
        self.kernels = {
            name: Kernel(bool(extern), C.c_int.in_dll(self._library, f"gpusim_bound_{name}").value,
                         [" ".join(p.split()) for p in parameters.split(",")])
            for extern, _, _, name, parameters in found}
        mapped = [line.split()[0].split("-") for line in _read_lines("/proc/self/maps")
                  if line.rstrip().endswith(str(self.path))]
        self._low = min(int(low, 16) for low, _ in mapped)
        self._high = max(int(high, 16) for _, high in mapped)

    def signature(self, name: str) -> list[str]:
        """The types of the kernel's parameters, such as Pcf4 for const float*; see device.h."""
        function = getattr(self._library, f"gpusim_signature_{name}")
        function.restype = C.c_char_p
        return function().decode().split(",")[:-1]

    def launch(self, name: str, grid: tuple[int, ...], block: tuple[int, ...], values: list[int],
               regions: list[Region], dynamic_shared: int, order: str, seed: int) -> None:
        """Run the kernel. values: the address of each argument's value. Raises KernelFault."""
        c_regions = (_Region * max(1, len(regions)))(*(
            _Region(r.low, r.high, {1: 0, 2: 1}.get(r.itemsize, 2), r.writable, r.name.encode())
            for r in regions))
        launch = _Launch(
            grid=(C.c_uint * 3)(*grid), block=(C.c_uint * 3)(*block), dynamic_shared=dynamic_shared,
            order=ORDERS.index(order), seed=seed, checked=self.checked, n_regions=len(regions),
            regions=c_regions, args=(C.c_void_p * max(1, len(values)))(*values),
            entry=C.cast(getattr(self._library, f"gpusim_call_{name}"), C.c_void_p).value,
            max_accesses=_MAX_ACCESSES)
        run = self._runtime.gpusim_launch
        run.argtypes = [C.POINTER(_Launch), C.c_void_p, C.c_void_p, C.c_size_t, C.c_size_t,
                        C.c_uint32]
        # Shared memory is watched word by word, unless the source keeps something smaller there:
        # PTX may store 16 bits whatever the array's type.
        shared_shift = (0 if _SMALL_SHARED.search(self.source) else
                        1 if _ASM.search(self.source) else 2)
        if run(C.byref(launch), self._library.gpusim_shared_low(),
               self._library.gpusim_shared_high(), self._low, self._high, shared_shift):
            fault = launch.fault.decode(errors="replace")
            raise KernelFault(f"{self._line_of(launch.fault_address)}: {name}: {fault}")

    def _line_of(self, address: int) -> str:
        """file:line of an address, in the innermost frame that is not in our own headers."""
        found = subprocess.run(["addr2line", "-i", "-e", self.path, hex(address - self._low - 1)],
                               capture_output=True, text=True, check=False).stdout
        lines = [Path(line.split(" (")[0]).name for line in found.splitlines()]
        return next((line for line in lines if not line.startswith(("device.h", "ptx.h"))), "?")


def _compile(text: str, flags: list[str], runtime: Path, out: Path) -> None:
    headers = _precompile_headers(*flags)
    with tempfile.TemporaryDirectory() as folder:
        source, preprocessed, compiled = (Path(folder) / f"kernel.{kind}"
                                          for kind in ("cpp", "ii", "o"))
        source.write_text(text)
        # In two steps, so that macros may hold asm statements.
        _run(CXX, *flags, f"-I{headers.parent}", f"-I{HERE}", "-E", "-fpch-preprocess",
             "-o", preprocessed, source)
        before, start, kernels = preprocessed.read_text().partition(_KERNEL_START)
        assert start, "the preprocessor has lost the marker"
        try:
            preprocessed.write_text(before + inline_ptx.translate(start + kernels))
        except inline_ptx.PtxError as e:
            raise CompileError(str(e)) from None
        _run(CXX, *flags, "-c", "-o", compiled, preprocessed)
        # Linked in a step of its own: with -fsanitize=thread the linker would bring in libtsan.
        _run(CXX, "-shared", "-Wl,-Bsymbolic", "-o", out, compiled, runtime,
             f"-Wl,-rpath,{runtime.parent}")


@functools.cache
def _precompile_headers(*flags: str) -> Path:
    """device.h, parsed once for all kernels: most of the time that a small one takes."""
    folder = CACHE / f"headers-{_hash(*_read_all(*_HEADERS), *flags)}"
    return _build(folder / "device.h.gch", lambda out: _run(
        CXX, *flags, "-x", "c++-header", "-o", out, HERE / "device.h"))


@functools.cache
def _build_runtime() -> Path:
    key = _hash(*_read_all(*_RUNTIME_FILES), *_RUNTIME)
    return _build(CACHE / f"runtime-{key}.so",
                  lambda out: _run(CXX, *_RUNTIME, "-o", out, HERE / _RUNTIME_FILES[0]))


def _build(path: Path, make: Callable[[Path], None]) -> Path:
    """path, made under a name of this process's own if it is not there: others may do the same."""
    if not path.exists():
        CACHE.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        make(temporary)
        os.replace(temporary, path)
    return path


def _run(*command: object) -> None:
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if result.returncode:
        raise CompileError(result.stderr[:4000])


def _read_all(*names: str) -> list[str]:
    return [(HERE / name).read_text() for name in names]


def _read_lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _strip_comments(source: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", " ", source, flags=re.S)
