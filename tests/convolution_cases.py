"""Convolutions for a kernel under test to compute in tiles and splits of the test's choice, and
what gpucnn.reference says of them, in float64 on the factors as the kernel sees them.

The bound is derived. A product of two factors of at most 11 bits is exact in float32. Adding k of
them in any order is off by at most gamma_k = k u / (1 - k u) times the sum of their absolute values
(tests/cases.py), here with u = 2^-23: where a CPU rounds a sum, a tensor core cuts it off. The
result is then rounded once to the type that it is stored in.
"""
from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from gpucnn import reference
from gpucnn.geometry import Window, make_window
from tests.cases import Arrays, Expected, assert_within, named

TENSOR_DTYPES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32))
CUT_OFF = 2.0**-23  # how much of itself a sum in float32 may lose


class Shape(NamedTuple):
    """The sizes of a convolution. depth, filters: channels a group reads and makes, in pieces of
    16 bytes."""

    image: tuple[int, int, int]  # n, h, w
    kernel: tuple[int, int] = (3, 3)
    depth: int = 1
    filters: int = 1
    groups: int = 1
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: Any = 0

    @property
    def options(self) -> dict[str, Any]:
        return {"stride": self.stride, "dilation": self.dilation, "padding": self.padding,
                "groups": self.groups}

    @property
    def window(self) -> Window:
        return make_window("test", self.kernel, self.stride, self.padding, self.dilation,
                           self.image[1:])


def random_arrays(shape: Shape, dtype: np.dtype, seed: int = 0) -> Arrays:
    """x, w, b, residual and dz of such a convolution, no two of a magnitude.

    float32 ones have all their 24 bits: a kernel that rounds factors must do so itself.
    """
    rng, piece = np.random.default_rng(seed), 16 // dtype.itemsize
    depth, c_out = shape.depth * piece, shape.filters * piece * shape.groups
    outputs = (shape.image[0], *shape.window.out_size(*shape.image[1:]), c_out)
    sizes = {"x": (*shape.image, depth * shape.groups), "w": (*shape.kernel, depth, c_out),
             "b": (c_out,), "residual": outputs, "dz": outputs}
    return {name: rng.standard_normal(size).astype(np.float32 if name == "b" else dtype)
            for name, size in sizes.items()}


def round_to_tf32(a: np.ndarray) -> np.ndarray:
    """float32 with 10 bits after the leading one, ties away from zero, as cvt.rna.tf32.f32."""
    rounded = ((a.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isnan(a), a, rounded)


def as_factor(a: np.ndarray) -> np.ndarray:
    """What tensor cores see of the elements of a."""
    with np.errstate(invalid="ignore"):  # signalling NaN
        return (round_to_tf32(a) if a.dtype == np.float32 else a).astype(np.float64)


def expected(shape: Shape, a: Arrays, passes: str = "y dx dw", *, activation: str | None = None
             ) -> Expected:
    """y (with bias and residual where they are among the arrays), dx and dw, each in float64."""
    factors = {k: as_factor(v) for k, v in a.items()}
    sizes = {k: np.abs(v) for k, v in factors.items()}
    values, magnitudes = {}, {}
    with np.errstate(invalid="ignore"):  # where factors are not finite
        if "y" in passes:
            values["y"], magnitudes["y"] = (_forward(shape, f, a) for f in (factors, sizes))
        for name, gradient in (("dx", _input_gradient), ("dw", _filter_gradient)):
            if name in passes:
                values[name], magnitudes[name] = (gradient(shape, f) for f in (factors, sizes))
    taps = math.prod(shape.kernel)
    terms = {"y": taps * a["w"].shape[2] + 2, "dx": taps * a["w"].shape[3] // shape.groups,
             "dw": math.prod(a["dz"].shape[:3])}
    bounds = {name: sum_bound(terms[name], magnitudes[name]) for name in values}
    if activation is not None:  # none is steeper than 1; 8 units for its own arithmetic
        values["y"] = reference.ACTIVATIONS[activation][0](values["y"])
        bounds["y"] = bounds["y"] + 8 * CUT_OFF
    return Expected(values, {name: stored_bound(bounds[name], values[name],
                                                stored_dtype(name, a["x"].dtype))
                             for name in values})


# The two halves of reference.conv2d_backward: most tests want one, and its loops take their time.

def _input_gradient(shape: Shape, a: Arrays) -> np.ndarray:
    return reference._input_gradient(a["dz"], a["x"].shape, a["w"], shape.window, shape.groups)


def _filter_gradient(shape: Shape, a: Arrays) -> np.ndarray:
    return reference._filter_gradient(a["dz"], a["x"], a["w"].shape, shape.window, shape.groups)


def _forward(shape: Shape, factors: Arrays, a: Arrays) -> np.ndarray:
    """Bias and residual are added as they are; with absolute factors, their absolute values."""
    z = reference.conv2d(factors["x"], factors["w"], **shape.options)
    for name in ("b", "residual"):
        if name in a:
            exact = a[name].astype(np.float64)
            z = z + (np.abs(exact) if (factors["w"] >= 0).all() else exact)
    return z


def stored_dtype(name: str, dtype: np.dtype) -> np.dtype:
    return np.dtype(np.float32) if name == "dw" else dtype


def sum_bound(terms: int, magnitude: np.ndarray) -> np.ndarray:
    """How far a sum of so many products may be off in float32."""
    return (terms * CUT_OFF / (1 - terms * CUT_OFF)
            * np.nan_to_num(magnitude, nan=0, posinf=0))


def stored_bound(off: np.ndarray, want: np.ndarray, stored: np.dtype) -> np.ndarray:
    """The same once it is rounded to the dtype in which it is stored."""
    info = ml_dtypes.finfo(stored)
    size = np.abs(np.nan_to_num(want, nan=0, posinf=0, neginf=0)) + off
    return off + float(info.eps) / 2 * size + float(info.smallest_subnormal)


class Kernels(NamedTuple):
    """How to compute it: by cuda_convolution's launches, in this tile and so many splits."""

    backend: Any
    tile: Any
    splits: int = 1

    def run(self, shape: Shape, a: Arrays, passes: str = "y dx dw", *,
            activation: str | None = None, tensor: bool = True, moments: bool = False) -> Arrays:
        """The results on the host; b and residual are used where they are among the arrays.

        moments: those of y as well, (bands of tile.m rows, 2, c_out): means and sums of squares.
        """
        from gpucnn.backend import cuda_convolution as launches

        there = {name: self.backend.asarray(v) for name, v in a.items()}
        x, w, dz = there["x"], there["w"], there["dz"]
        problem = launches.Problem.of(x.shape, w.shape[3], shape.window, shape.groups, x.dtype,
                                      tensor)
        assert problem.tensor == tensor
        plan = launches.Plan("implicit_gemm", self.tile, self.splits)
        results = {}
        if "y" in passes:
            if moments:
                bands = -(-math.prod(a["dz"].shape[:3]) // self.tile.m)
                results["moments"] = self.backend.empty((bands, 2, w.shape[3]), np.float32)
            results["y"] = launches.forward(problem, plan, x, w, there.get("b"),
                                            there.get("residual"), activation,
                                            results.get("moments"))
        if "dx" in passes:
            results["dx"] = launches.input_gradient(problem, plan, dz, w)
        if "dw" in passes:
            results["dw"] = self.backend.empty(w.shape, np.float32)
            launches.weight_gradient(problem, plan, x, dz, results["dw"])
        return {name: self.backend.to_numpy(r) for name, r in results.items()}


def judge(backend: Any, tile: Any, shape: Shape, a: Arrays, passes: str = "y dx dw", *,
          splits: tuple[int, ...] = (1,), activation: str | None = None) -> None:
    """Run the passes; each must give what the reference does, to within its bound."""
    want = expected(shape, a, passes, activation=activation)
    for count in splits:
        with named(f"{shape}, {a['x'].dtype}, {tile}, {count} splits"):
            got = Kernels(backend, tile, count).run(shape, a, passes, activation=activation)
            for name, result in got.items():
                assert result.dtype == stored_dtype(name, a["x"].dtype), name
            assert_within({name: r.astype(np.float64) for name, r in got.items()}, want,
                          np.dtype(np.float64))


def pairs(*choices: Any) -> list[tuple]:
    """Rows in which each pair of values of any two of the choices stands together at least once.

    Greedy: as many as the two longest choices have pairs, or a few more.
    """
    def pairs_of(row: tuple) -> set:
        return set(itertools.combinations(enumerate(row), 2))

    rows = list(itertools.product(*map(range, map(len, choices))))
    missing: set = set().union(*map(pairs_of, rows))
    chosen = []
    while missing:
        best = max(rows, key=lambda row: len(pairs_of(row) & missing))
        missing -= pairs_of(best)
        chosen.append(tuple(choice[i] for choice, i in zip(choices, best)))
    return chosen
