"""NVIDIA's run-time compiler by ctypes: it needs neither a GPU nor CuPy."""
from __future__ import annotations

import ctypes as C
import ctypes.util
import functools
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

_OPTIONS = ("-std=c++17", "-ftz=true")  # what CuPy compiles a RawModule of this project with
_DEPRECATED = re.compile(r"^nvrtc: warning: Architectures prior to .* deprecated.*\n?", re.M)
_RESOURCE = re.compile(r"(\d+) bytes (smem|stack frame|spill stores|spill loads)")


class Compiled(NamedTuple):
    """code: PTX for a compute_ architecture, else a cubin. log: the compiler's remarks."""

    code: bytes
    log: str


class NvrtcError(RuntimeError):
    """The source does not compile; the message is the compiler's log."""


def find(architecture: str = "sm_90") -> tuple[C.CDLL | None, str]:
    """A library that compiles for the architecture; or None and why.

    From a package nvidia-cuda-nvrtc or a CUDA toolkit. CUDA 13 knows none before sm_75.
    """
    number = int(re.sub(r"\D", "", architecture))
    for library in _libraries():
        if number in _architectures(library):
            return library, ""
    package = "nvidia-cuda-nvrtc" if number >= 75 else "nvidia-cuda-nvrtc-cu12"
    return None, f"there is no NVRTC for {architecture}; pip install {package}"


@functools.cache
def _libraries() -> list[C.CDLL]:
    """All there are, the newest first."""
    folders = [p / "lib" for d in sys.path for pattern in ("nvidia/cu[1-9]*", "nvidia/cuda_nvrtc")
               for p in sorted(Path(d or ".").glob(pattern))]
    for root in (os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if root:
            folders += [Path(root) / "lib64", Path(root) / "lib"]
    found = [library for folder in folders for library in folder.glob("libnvrtc.so.*[0-9]")]
    version = re.compile(r"\d+")
    return [C.CDLL(str(p)) for p in sorted(
        found, key=lambda p: [int(n) for n in version.findall(p.name)], reverse=True)]


def _architectures(library: C.CDLL) -> list[int]:
    count = C.c_int()
    library.nvrtcGetNumSupportedArchs(C.byref(count))
    numbers = (C.c_int * count.value)()
    library.nvrtcGetSupportedArchs(numbers)
    return list(numbers)


def _uncached(library: C.CDLL) -> tuple[str, ...]:
    """From 12.9 on, where there is a driver, what was compiled before comes without remarks."""
    major, minor = C.c_int(), C.c_int()
    library.nvrtcVersion(C.byref(major), C.byref(minor))
    return ("--no-cache",) if (major.value, minor.value) >= (12, 9) else ()


class Resources(NamedTuple):
    """What one kernel needs, in registers a thread and bytes (of static shared memory)."""

    registers: int
    shared: int
    stack: int  # a thread, spilled registers included
    spill_stores: int
    spill_loads: int


def compile(source: str, file: str, architecture: str, *options: str) -> Compiled:
    """Compile for sm_NN (ptxas included) or compute_NN. Raises NvrtcError."""
    library, reason = find(architecture)
    if library is None:
        raise NvrtcError(reason)
    program = C.c_void_p()
    library.nvrtcCreateProgram(C.byref(program), source.encode(), file.encode(), 0, None, None)
    try:
        given = [o.encode() for o in (f"-arch={architecture}", *_OPTIONS, *_uncached(library),
                                      *options)]
        failed = library.nvrtcCompileProgram(program, len(given),
                                             (C.c_char_p * len(given))(*given))
        log = _get(library, program, "ProgramLog").decode(errors="replace").rstrip("\0\n")
        log = _DEPRECATED.sub("", log)
        if failed:
            raise NvrtcError(log)
        kind = "PTX" if architecture.startswith("compute") else "CUBIN"
        return Compiled(_get(library, program, kind), log)
    finally:
        library.nvrtcDestroyProgram(C.byref(program))


def resources(compiled: Compiled) -> dict[str, Resources]:
    """By kernel. Needs compile(..., "--ptxas-options=-v") for an sm_ architecture."""
    found = {}
    for part in compiled.log.split("Compiling entry function ")[1:]:
        name = part.split("'")[1]
        # What the log says of functions that are not inlined follows; the kernel's comes first.
        numbers = {what: int(n) for n, what in reversed(_RESOURCE.findall(part))}
        registers = re.search(r"Used (\d+) registers", part)
        assert registers, part
        found[name] = Resources(int(registers[1]), *(numbers.get(what, 0) for what in (
            "smem", "stack frame", "spill stores", "spill loads")))
    assert found, f"no kernel in the compiler's remarks: {compiled.log!r}"
    return found


def _get(library: C.CDLL, program: C.c_void_p, what: str) -> bytes:
    size = C.c_size_t()
    getattr(library, f"nvrtcGet{what}Size")(program, C.byref(size))
    buffer = C.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw
