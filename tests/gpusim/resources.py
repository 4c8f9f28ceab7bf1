"""python -m tests.gpusim.resources [FILE.cu ...] [--arch sm_90 ...] [--dtype float32 ...] [--long]

Print what each kernel of the project needs in every variant, by NVIDIA's compiler. The exit status
is 1 if a kernel uses local memory that must not: see spilling().
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from gpucnn import activations
from gpucnn.backend.cuda_kernel import BLOCK, Variant, kernel_dir, read_source
from tests import variants
from tests.gpusim import nvrtc

_HEADER = ("kernel", "variant", "registers", "shared", "local", "blocks")
_REGISTERS, _THREADS, _BLOCKS, _SHARED = 65536, 1024, 16, 64 << 10  # a multiprocessor's, at least


def compile_variant(file: str, variant: Variant, architecture: str) -> nvrtc.Compiled:
    return nvrtc.compile(read_source(kernel_dir(), file, variant), file, architecture,
                         "--ptxas-options=-v")


def is_launched(kernel: str, variant: Variant) -> bool:
    """Whether this kernel of the file is for these constants."""
    constants = dict(variant.constants)
    if kernel == "conv_depthwise_input_gradient" and not constants["DEPTHWISE"]:
        return False
    return not (constants.get("ACTIVATION") and kernel.endswith("_gradient"))


def spilling(variant: Variant, compiled: nvrtc.Compiled) -> dict[str, nvrtc.Resources]:
    """The kernels that use local memory where none may: in float32 with int offsets.

    The others are for precision, for tensors past 2^31 elements, or for 16 bits without tensor
    cores: a few bytes there cost less than blocks that do not fit beside each other.
    """
    if (variant.scalar_t.name, variant.index_t.name) != ("float32", "int32"):
        return {}
    return {name: needs for name, needs in nvrtc.resources(compiled).items()
            if _local(needs) and is_launched(name, variant)}


def blocks(needs: nvrtc.Resources, threads: int) -> int:
    """How many blocks of so many threads a multiprocessor has room for at a time."""
    registers = -(-needs.registers // 8) * 8 * -(-threads // 32) * 32
    return min(_REGISTERS // registers, _THREADS // threads, _BLOCKS,
               _SHARED // max(1, needs.shared))


def rows(file: str, architecture: str, dtypes: list[str], long: bool
         ) -> Iterator[tuple[tuple[str, ...], bool]]:
    """A line of the table for each kernel and variant, and whether it spills and must not.

    Of the activations none and the last: the others need no more.
    """
    ends = (variants.ACTIVATIONS[0], variants.ACTIVATIONS[-1])
    for variant in variants.every_variant(file):
        constants = dict(variant.constants)
        if (variant.scalar_t.name not in dtypes or (variant.index_t.itemsize == 8) != long
                or constants.get("ACTIVATION", 0) not in ends):
            continue
        compiled = compile_variant(file, variant, architecture)
        spilled = spilling(variant, compiled)
        for name, needs in sorted(nvrtc.resources(compiled).items()):
            if is_launched(name, variant):
                threads = threads_of(name, constants)
                yield (name, describe(variant), str(needs.registers), str(needs.shared),
                       str(_local(needs)), str(blocks(needs, threads))), name in spilled


def threads_of(kernel: str, constants: dict[str, int]) -> int:
    """In a block. finish_splits is in the file of the tiles, but has none."""
    if "TILE_M" not in constants or kernel == "finish_splits":
        return BLOCK
    return (constants["TILE_M"] * constants["TILE_N"]
            // (16 * constants["QUADS_M"] * constants["QUADS_N"]))


def describe(variant: Variant) -> str:
    """Such as "float32 64x64 vec 4, 1 tanh"."""
    constants = dict(variant.constants)
    words = [variant.scalar_t.name]
    if variant.index_t.itemsize == 8:
        words += ["long"]
    if "TILE_M" in constants:
        words += [f"{constants['TILE_M']}x{constants['TILE_N']}"]
    words += [f"vec {variant.vec}" + (f", {constants['VEC_N']}" if "VEC_N" in constants else "")]
    if variant.mask_t.itemsize == 4:
        words += ["int mask"]
    if constants.get("DEPTHWISE"):
        words += ["depthwise"]
    if constants.get("ACTIVATION"):
        words += [activations.NAMES[constants["ACTIVATION"] - 1]]
    return " ".join(words)


def _local(needs: nvrtc.Resources) -> int:
    return max(needs.stack, needs.spill_stores, needs.spill_loads)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpusim.resources",
                                     description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("file", nargs="*", default=variants.FILES, metavar="FILE.cu")
    parser.add_argument("--arch", nargs="+", default=["sm_90"], metavar="sm_NN")
    parser.add_argument("--dtype", nargs="+", default=["float32"],
                        choices=[d.name for d in variants.DTYPES])
    parser.add_argument("--long", action="store_true", help="with offsets of 64 bits")
    chosen = parser.parse_args(arguments)
    spilled = 0
    for architecture in chosen.arch:
        library, reason = nvrtc.find(architecture)
        if library is None:
            print(reason, file=sys.stderr)
            return 1
        print(f"{architecture}: registers a thread; bytes of shared memory a block; bytes a thread "
              "in local memory;\nblocks that a multiprocessor with 1,024 threads and 64 KiB of "
              "shared memory runs at a time")
        line = "{:30}{:36}{:>9}{:>8}{:>7}{:>8}".format
        print(line(*_HEADER))
        for file in chosen.file:
            for cells, wrong in rows(file, architecture, chosen.dtype, chosen.long):
                print(line(*cells) + ("  SPILLS" if wrong else ""), flush=True)
                spilled += wrong
    return int(spilled > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
