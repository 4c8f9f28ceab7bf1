"""Which variants of a kernel file there are, and few of them in which each two choices meet."""
from __future__ import annotations

import itertools
import re
from typing import Any

import ml_dtypes
import numpy as np

from gpucnn import activations
from gpucnn.backend.cuda_kernel import Variant, kernel_dir, read_source
from tests.pairs import pairs

# Those without tensor cores, which are test_tensor_resources.py's.
FILES = sorted(p.name for p in kernel_dir().glob("*.cu") if "tensor" not in p.name)
# From gpucnn/backend/cuda_convolution.py, which imports CuPy; test_convolution_plans.py compares.
TILES = tuple(dict(zip(("TILE_M", "TILE_N", "QUADS_M", "QUADS_N"), tile)) for tile in (
    (128, 128, 2, 2), (128, 64, 2, 2), (64, 64, 2, 2), (64, 32, 2, 1), (32, 32, 1, 1)))
ACTIVATIONS = tuple(range(1 + len(activations.NAMES)))
# What a file leaves to #define, if it has a word of this name: the values that a launch may give.
CONSTANTS: dict[str, tuple[Any, ...]] = {
    "TILE_M": TILES,
    "VEC_N": (1, 4),
    "DEPTHWISE": (0, 1),
    "TERMS": (9,),
    "ACTIVATION": ACTIVATIONS,
    "MOMENTS": (0, 1),
}
# "bfloat16" becomes the name of a dtype where ml_dtypes is imported.
DTYPES = tuple(map(np.dtype, ("float32", "float64", "float16", ml_dtypes.bfloat16)))


def choices_of(file: str) -> dict[str, tuple[Any, ...]]:
    """What may be chosen for the file, and from what."""
    plain = Variant(DTYPES[0], np.dtype(np.uint8), np.dtype(np.int32), 1)
    words = set(re.findall(r"\w+", read_source(kernel_dir(), file, plain).partition(file)[2]))
    return {"scalar_t": DTYPES, "index_t": (np.dtype(np.int32), np.dtype(np.int64)),
            "wide": (True, False), "mask_t": tuple(map(np.dtype, (
                ("uint8", "int32") if "mask_t" in words else ("uint8",)))),
            **{name: values for name, values in CONSTANTS.items() if name in words}}


def variant_of(scalar_t: np.dtype, index_t: np.dtype, wide: bool, mask_t: np.dtype,
               **constants: Any) -> Variant:
    """The variant of one choice of each. Matrix products read 4 elements at once, others 16 bytes.
    """
    vec = 1 if not wide else 4 if "TILE_M" in constants else 16 // scalar_t.itemsize
    flat = {k: v for name, value in constants.items()
            for k, v in (value if name == "TILE_M" else {name: value}).items()}
    return Variant(scalar_t, mask_t, index_t, vec, tuple(flat.items()))


def every_variant(file: str) -> list[Variant]:
    choices = choices_of(file)
    return [variant_of(**dict(zip(choices, values)))
            for values in itertools.product(*choices.values())]


def few_variants(file: str) -> list[Variant]:
    """Some in which each two choices meet. Those that have nothing to do with others take turns:
    the activation, and the types of a matrix product, of which each tile takes long to compile.
    """
    choices = choices_of(file)
    alone = [("ACTIVATION",)] if "ACTIVATION" in choices else []
    alone += [("index_t", "scalar_t")] if "TILE_M" in choices else []
    turns = [itertools.cycle([dict(zip(names, values)) for values in itertools.product(
        *(choices[name] for name in names))]) for names in alone]
    rest = {name: v for name, v in choices.items() if name not in itertools.chain(*alone)}
    combined = [dict(zip(rest, values)) for values in pairs(*rest.values())]
    return [variant_of(**dict(itertools.chain(*(c.items() for c in (choice, *others)))))
            for choice, *others in zip(combined, *turns)]


def usual_variants(file: str) -> list[Variant]:
    """In float32, wide and without an activation, each tile."""
    return [v for v in every_variant(file)
            if (v.scalar_t, v.index_t, v.mask_t, v.vec) == (np.float32, np.int32, np.uint8, 4)
            and dict(v.constants).get("VEC_N", 4) == 4 and not dict(v.constants).get("ACTIVATION")]
