"""Find, read, check, compile and launch the kernels in kernels/*.cu.

CuPy checks nothing that is passed to a RawKernel: a float64 array for a `float*`, a transposed
view, a Python float for a `float` all run and give wrong numbers. Here the .cu file's own
signature is the contract that each launch is checked against. Nothing is cast or copied.
"""
from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpucnn.errors import KernelError

BLOCK, MAX_GRID = 256, 65535
MAX_STATIC_SHARED = 48 << 10  # bytes a block may have without being asked for
# Past it, an int index could overflow in the last step of a grid-stride loop.
MAX_INT_INDEX = 2**31 - BLOCK * MAX_GRID

# By name, because bfloat16 is a NumPy dtype only where ml_dtypes has been imported.
_C_NAMES = {"float16": "float16", "bfloat16": "bfloat16", "float32": "float", "float64": "double",
            "uint8": "unsigned char", "int32": "int", "int64": "long long", "uint32": "unsigned"}
_DTYPES = {c: np.dtype(name) for name, c in _C_NAMES.items() if "float16" not in name}
_DTYPES["unsigned int"] = _DTYPES["unsigned"]
# What each name of the .cu files' own may stand for; a launch's arrays decide which. accum_t, in
# which sums are kept, follows scalar_t, in which tensors are stored.
_TYPEDEFS = {"scalar_t": ("float32", "float64", "float16", "bfloat16"),
             "accum_t": ("float32", "float64"),
             "mask_t": ("uint8", "int32"),
             "index_t": ("int32", "int64")}
_BOUNDS = r"(?:__launch_bounds__\s*\([^)]*\)\s*)?"
_SIGNATURE = re.compile(
    rf'extern\s+"C"\s+__global__\s+{_BOUNDS}void\s+{_BOUNDS}(\w+)\s*\(([^)]*)\)')
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_INCLUDE = re.compile(r'^#include "([^"]+)".*$', re.MULTILINE)
_NULLABLE = "_or_null"  # how the name of a pointer ends for which a launch may pass None


class Parameter(NamedTuple):
    """One parameter of a kernel, as the .cu file declares it."""

    name: str
    ctype: str
    pointer: bool


class Variant(NamedTuple):
    """What the names that the .cu files leave open stand for in one compilation.

    constants: the #defines of the kernel's own, such as the size of a tile.
    """

    scalar_t: np.dtype
    mask_t: np.dtype
    index_t: np.dtype
    vec: int
    constants: tuple[tuple[str, int], ...] = ()

    @property
    def accum_t(self) -> np.dtype:
        return accumulator(self.scalar_t)


def accumulator(stored: np.dtype) -> np.dtype:
    """The dtype in which sums of elements of this one are kept."""
    return np.dtype(np.float64 if stored == np.float64 else np.float32)


def kernel_dir() -> Path:
    """The folder of the .cu files: GPUCNN_KERNEL_DIR, else the installed or checked-out one."""
    chosen = os.environ.get("GPUCNN_KERNEL_DIR")
    return Path(chosen) if chosen else _own_kernel_dir()


@functools.cache
def _own_kernel_dir() -> Path:
    package = Path(__file__).resolve().parents[1]
    installed = package / "kernels"
    return installed if installed.is_dir() else package.parent / "kernels"


def read_source(directory: Path, file: str, variant: Variant) -> str:
    """The text that is compiled: the variant's types, then common.cuh, then the file.

    Where the file says #include "other.cuh", that file's text stands. Raises KernelError if a file
    cannot be read.
    """
    short = variant.scalar_t.itemsize == 2
    return "\n".join([
        *([_text_of(directory, "float16.cuh")] if short else []),
        *(f"typedef {_C_NAMES[getattr(variant, name).name]} {name};" for name in _TYPEDEFS),
        f"#define VEC {variant.vec}",
        *(f"#define {name} {value}" for name, value in variant.constants),
        _text_of(directory, "common.cuh"), _text_of(directory, file)])


def _text_of(directory: Path, file: str) -> str:
    """The file with the texts of what it includes, each with the name that messages give it."""
    def included(match: re.Match) -> str:
        line = text.count("\n", 0, match.start()) + 2
        return f'{_text_of(directory, match[1])}\n#line {line} "{file}"'

    text = _read(directory, file)
    return f'#line 1 "{file}"\n' + _INCLUDE.sub(included, text)


def _texts(directory: Path, file: str) -> tuple[str, ...]:
    """All texts that a compilation of the file may depend on."""
    text = _read(directory, file)
    return (text, *(part for name in _included(text) for part in _texts(directory, name)))


@functools.cache
def _included(text: str) -> list[str]:
    return _INCLUDE.findall(text)


def read_signatures(directory: Path, file: str) -> dict[str, list[Parameter]]:
    """The parameters of each kernel in the file. Raises KernelError for a type unknown here."""
    return _signatures(file, _read(directory, file))


@functools.cache
def _signatures(file: str, text: str) -> dict[str, list[Parameter]]:
    return {kernel: [_parse(file, kernel, parameter) for parameter in declared.split(",")]
            for kernel, declared in _SIGNATURE.findall(_COMMENT.sub(" ", text))}


def check_arguments(kernel: str, parameters: list[Parameter], args: tuple, vec: int,
                    array_type: Any, device: int, constants: tuple[tuple[str, int], ...] = ()
                    ) -> tuple[list[Any], Variant]:
    """The arguments as the kernel declares them, and the variant that they ask for.

    Raises TypeError, naming the kernel and the argument, for a wrong count, dtype, device,
    contiguity, alignment or range.
    """
    if len(args) != len(parameters):
        raise TypeError(f"{kernel} takes {len(parameters)} arguments, got {len(args)}")
    checked: list[Any] = []
    largest = max((getattr(a, "size", 0) for p, a in zip(parameters, args) if p.pointer), default=0)
    types: dict[str, Any] = {"index_t": np.dtype(np.int64 if largest > MAX_INT_INDEX else np.int32)}
    for parameter, arg in zip(parameters, args):
        try:
            if not parameter.pointer:
                checked.append(_check_scalar(parameter, arg, types))
                continue
            if arg is not None or not parameter.name.endswith(_NULLABLE):
                _check_array(parameter, arg, types, vec, array_type, device)
            checked.append(arg)
        except TypeError as problem:
            raise TypeError(f"{kernel}, argument {parameter.name!r}: {problem}") from None
    scalar_t = types.get("scalar_t", types.get("accum_t", np.dtype(np.float32)))
    return checked, Variant(scalar_t, types.get("mask_t", np.dtype(np.uint8)), types["index_t"],
                            vec, constants)


class Kernel:
    """One __global__ function of one .cu file, compiled at its first launch for each variant."""

    def __init__(self, file: str, name: str):
        self.file, self.name = file, name
        self._compiled: dict[tuple[tuple[str, ...], int, Variant, str], Any] = {}

    def __call__(self, threads: int, *args: Any, vec: int = 1, **constants: Any) -> None:
        """Launch at least `threads` threads; each one handles `vec` channels. None for none."""
        self.launch(launch_grid(threads), BLOCK, *args, vec=vec, **constants)

    def launch(self, grid: int | tuple[int, ...], block: int, *args: Any, vec: int = 1,
               shared: int = 0, architecture: str = "", **constants: int) -> None:
        """Launch a grid of blocks of `block` threads; nothing where a side of the grid is 0.

        shared: bytes of dynamic shared memory a block.
        architecture: to compile for, such as sm_90a; the device's own where it is not given.
        constants: what the .cu file leaves to #define.
        """
        import cupy

        directory, device = kernel_dir(), cupy.cuda.Device().id
        texts = _texts(directory, self.file)
        signatures = _signatures(self.file, texts[0])
        if self.name not in signatures:
            raise KernelError(f"{directory / self.file} declares no kernel {self.name!r}; it has "
                              f"{', '.join(signatures) or 'none'}")
        checked, variant = check_arguments(self.name, signatures[self.name], args, vec,
                                           cupy.ndarray, device, tuple(constants.items()))
        grid = grid if isinstance(grid, tuple) else (grid,)
        if min(grid) < 1:
            return
        key = (*texts, _read(directory, "common.cuh")), device, variant, architecture
        function = self._compiled.get(key)
        if function is None:
            function = compile_kernel(directory, self.file, self.name, variant, architecture)
            if shared > MAX_STATIC_SHARED:
                function.max_dynamic_shared_size_bytes = shared
            self._compiled[key] = function
        function(grid, (block,), tuple(checked), shared_mem=shared)


def launch_grid(threads: int) -> int:
    """How many blocks to launch; past the most, each thread of a grid-stride loop does more."""
    return min(-(-threads // BLOCK), MAX_GRID)


def compile_kernel(directory: Path, file: str, name: str, variant: Variant,
                   architecture: str = "") -> Any:
    """The compiled function. Raises KernelError with the file, the line and the architecture."""
    import cupy

    try:
        source = read_source(directory, file, variant)
        return _module(source, architecture).get_function(name)
    except cupy.cuda.compiler.CompileException as e:
        lines = str(e).splitlines()
        cause = next((line.strip() for line in lines if "error" in line), lines[0])
        raise KernelError(f"kernels/{file} failed to compile for "
                          f"sm_{cupy.cuda.Device().compute_capability}: {cause}") from e
    except (ImportError, OSError, RuntimeError) as e:
        reason = " ".join(str(e).split())
        if "nvrtc" not in reason.lower():
            raise
        raise KernelError(f"kernels/{file}: CuPy cannot load the CUDA compiler NVRTC ({reason}); "
                          "pip install 'gpucnn[cuda12]' or 'gpucnn[cuda13]'") from e


@functools.cache
def _module(source: str, architecture: str) -> Any:
    """What CuPy compiles, at the first get_function(), for all kernels of the file."""
    import cupy

    own = (f"-arch={architecture}",) if architecture else ()
    return cupy.RawModule(code=source, options=("-std=c++17", *own))


def _read(directory: Path, file: str) -> str:
    """The file's text: the same str until the file is written again, so that caches may go by it.
    """
    try:
        path = os.path.join(directory, file)
        return _text(path, os.stat(path).st_mtime_ns)
    except OSError as e:
        remedy = ("GPUCNN_KERNEL_DIR must hold a copy of the whole kernels folder"
                  if os.environ.get("GPUCNN_KERNEL_DIR") else "reinstall gpucnn")
        raise KernelError(f"cannot read the kernel file {directory / file} ({e.strerror}); "
                          f"{remedy}") from e


@functools.cache
def _text(path: str, written: int) -> str:
    return Path(path).read_text(encoding="utf-8")


def _parse(file: str, kernel: str, text: str) -> Parameter:
    words = [w for w in text.replace("*", " * ").split() if w not in ("const", "__restrict__")]
    pointer = "*" in words
    *ctype, name = (w for w in words if w != "*")
    parameter = Parameter(name, " ".join(ctype), pointer)
    if parameter.ctype not in _TYPEDEFS and parameter.ctype not in _DTYPES:
        raise KernelError(f"{file}, kernel {kernel}: {text.strip()!r} has a type that the launcher "
                          f"does not know; use {', '.join([*_TYPEDEFS, *_DTYPES])}")
    return parameter


def _bind(parameter: Parameter, dtype: np.dtype, types: dict[str, Any]) -> np.dtype:
    """The dtype that the parameter has in this launch; the first array binds a typedef's name."""
    if parameter.ctype in _DTYPES:
        return _DTYPES[parameter.ctype]
    allowed = _TYPEDEFS[parameter.ctype]
    if parameter.ctype not in types:
        if dtype.name not in allowed:
            raise TypeError(f"{dtype} where the kernel reads {parameter.ctype}, which is "
                            f"{' or '.join(allowed)}")
        if parameter.ctype == "scalar_t":
            wanted = types.setdefault("accum_t", accumulator(dtype))
            if wanted != accumulator(dtype):
                raise TypeError(f"{dtype} beside sums in {wanted}")
        types[parameter.ctype] = dtype
    return types[parameter.ctype]


def _check_array(parameter: Parameter, arg: Any, types: dict[str, Any], vec: int,
                 array_type: Any, device: int) -> None:
    if not isinstance(arg, array_type):
        raise TypeError(f"{type(arg).__name__} is not an array of this backend")
    wanted = _bind(parameter, arg.dtype, types)
    if arg.dtype != wanted:
        raise TypeError(f"{arg.dtype} where the kernel reads {wanted}")
    if not arg.flags.c_contiguous:
        raise TypeError(f"not C-contiguous (shape {arg.shape}, strides {arg.strides})")
    if arg.device.id != device:
        raise TypeError(f"on device {arg.device.id}, the launch is on device {device}")
    if parameter.ctype in ("scalar_t", "mask_t") and arg.data.ptr % (vec * arg.itemsize):
        raise TypeError(f"not aligned to the {vec * arg.itemsize} bytes that a thread reads")


def _check_scalar(parameter: Parameter, arg: Any, types: dict[str, Any]) -> Any:
    if parameter.ctype in _TYPEDEFS and parameter.ctype not in types:
        raise TypeError(f"no array before it says what {parameter.ctype} is")
    wanted = types.get(parameter.ctype) or _DTYPES[parameter.ctype]
    if wanted.kind == "f":
        if not isinstance(arg, (float, np.floating)):
            raise TypeError(f"{arg!r} is not a float")
        with np.errstate(over="ignore"):
            value = wanted.type(arg)
        if np.isinf(value) and not np.isinf(arg):
            raise TypeError(f"{arg!r} is out of the range of {wanted}")
        return value
    limits = np.iinfo(wanted)
    if (isinstance(arg, (int, np.integer)) and not isinstance(arg, bool)
            and limits.min <= arg <= limits.max):
        return wanted.type(arg)
    raise TypeError(f"{arg!r} is not an int from {limits.min} to {limits.max}")
