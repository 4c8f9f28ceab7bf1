"""Convolutions with a plan of the test's own, and what gpucnn.reference says about them.

How far a result may be off is derived. Ordinary kernels: tests/cases.py. Tensor cores: the
reference is given the factors as they see them, of at most 11 bits, whose products are exact in
float32. Adding k of those in any order is off by at most gamma_k = k u / (1 - k u) times the sum of
their absolute values, here with u = 2^-23: where a CPU rounds a sum, a tensor core cuts it off. The
result is then rounded once to the type that it is stored in.
"""
from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

from gpucnn import activations, reference
from gpucnn.backend.cuda_kernel import accumulator
from gpucnn.geometry import IntOrPair, Padding, Window, make_window
from tests import cases
from tests.cases import Arrays, Expected

ALL_PASSES = ("y", "dx", "dw")
TENSOR_DTYPES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32))
CUT_OFF = 2.0**-23  # how much of itself a sum in float32 may lose on tensor cores


def launches() -> Any:
    """gpucnn.backend.cuda_convolution; without CuPy and its stand-in, the test is skipped."""
    return pytest.importorskip("gpucnn.backend.cuda_convolution")


class Case(NamedTuple):
    """x: its shape; w: (kh, kw, c_out). tensor: on tensor cores."""

    x: tuple[int, int, int, int]
    w: tuple[int, int, int]
    stride: IntOrPair = 1
    padding: Padding = 0
    dilation: IntOrPair = 1
    groups: int = 1
    activation: str | None = None
    bias: bool = False
    residual: bool = False
    dtype: np.dtype = np.dtype(np.float32)
    odd_weight: float | None = None
    tensor: bool = False

    @property
    def options(self) -> dict[str, Any]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation,
                "groups": self.groups}

    @property
    def window(self) -> Window:
        return make_window("test", self.w[:2], self.stride, self.padding, self.dilation,
                           self.x[1:3])

    @property
    def y(self) -> tuple[int, ...]:
        return (self.x[0], *self.window.out_size(*self.x[1:3]), self.w[2])

    @property
    def problem(self) -> Any:
        return launches().Problem.of(self.x, self.w[2], self.window, self.groups, self.dtype,
                                     self.tensor)


class Shape(NamedTuple):
    """A convolution for tensor cores, whatever its dtype. depth, filters: channels a group reads
    and makes, in pieces of 16 bytes."""

    image: tuple[int, int, int]  # n, h, w
    kernel: tuple[int, int] = (3, 3)
    depth: int = 1
    filters: int = 1
    groups: int = 1
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: Padding = 0

    def case(self, dtype: np.dtype, activation: str | None = None,
             added: tuple[str, ...] = ("b", "residual")) -> Case:
        piece = 16 // dtype.itemsize * self.groups
        return Case((*self.image, self.depth * piece), (*self.kernel, self.filters * piece),
                    self.stride, self.padding, self.dilation, self.groups, activation,
                    "b" in added, "residual" in added, dtype, tensor=True)


def tensor_tile(number: int) -> Any:
    """From TENSOR_TILES, then WGMMA_TILES."""
    return (launches().TENSOR_TILES + launches().WGMMA_TILES)[number]


def tiled(tile: Any, *splits: int) -> list[Any]:
    """The plans of this tile with so many splits each."""
    return [launches().Plan("implicit_gemm", tile, count) for count in splits or (1,)]


def gemm(number: int, splits: int = 1) -> Any:
    return tiled(launches().TILES[number], splits)[0]


def direct(splits: int = 1) -> Any:
    return launches().Plan("direct", None, splits)


def arrays(case: Case, seed: int = 0) -> Arrays:
    """Drawn anew, always the same; no two of a magnitude. The bias is of the sums' dtype.

    float32 ones have all their 24 bits. Some of dz is 0 and -0 where kernels look for those.
    """
    rng = np.random.default_rng(seed)
    shapes = {"x": case.x, "w": (*case.w[:2], case.x[3] // case.groups, case.w[2]), "dz": case.y}
    made = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    if not case.tensor:
        made["dz"][rng.random(case.y) < 0.1] = 0.0
        made["dz"][rng.random(case.y) < 0.1] = -0.0
    if case.odd_weight is not None:
        made["w"][case.w[0] // 2, 0, shapes["w"][2] // 2, 0] = case.odd_weight
    made = {name: a.astype(case.dtype) for name, a in made.items()}
    if case.bias:
        made["b"] = rng.standard_normal(case.w[2]).astype(accumulator(case.dtype))
    if case.residual:
        made["residual"] = rng.standard_normal(case.y).astype(case.dtype)
    return made


def round_to_tf32(a: np.ndarray) -> np.ndarray:
    """float32 with 10 bits after the leading one, ties away from zero, as cvt.rna.tf32.f32."""
    rounded = ((a.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isnan(a), a, rounded)


def as_factor(a: np.ndarray) -> np.ndarray:
    """What tensor cores see of the elements of a."""
    with np.errstate(invalid="ignore"):  # signalling NaN
        return (round_to_tf32(a) if a.dtype == np.float32 else a).astype(np.float64)


def expected(case: Case, a: Arrays, passes: tuple[str, ...] = ALL_PASSES) -> Expected:
    """y (with bias and residual where they are among the arrays), dx and dw, each in float64."""
    exact = {name: as_factor(v) if case.tensor and name in ("x", "w", "dz") else
             v.astype(np.float64) for name, v in a.items()}
    sizes = {name: np.abs(v) for name, v in exact.items()}
    taps, (_, _, inputs, c_out) = math.prod(case.w[:2]), a["w"].shape
    terms = {"y": taps * inputs + 2, "dx": taps * c_out // case.groups,
             "dw": math.prod(case.y[:3])}
    values, bounds = {}, {}
    with np.errstate(invalid="ignore"):  # where factors are not finite
        for name in passes:
            want, size = (_PASSES[name](case, given) for given in (exact, sizes))
            if name == "y" and case.activation:
                want = reference.ACTIVATIONS[case.activation][0](want)
            values[name] = want
            bounds[name] = _bound(case, terms[name], size, want, stored_dtype(case, name),
                                  case.activation if name == "y" else None)
    return Expected(values, bounds)


# The halves of reference.conv2d_backward: most tests want one, and its loops take their time.

def _forward(case: Case, a: Arrays) -> np.ndarray:
    return reference.conv2d(a["x"], a["w"], a.get("b"), **case.options) + a.get("residual", 0)


def _input_gradient(case: Case, a: Arrays) -> np.ndarray:
    return reference._input_gradient(a["dz"], case.x, a["w"], case.window, case.groups)


def _filter_gradient(case: Case, a: Arrays) -> np.ndarray:
    return reference._filter_gradient(a["dz"], a["x"], a["w"].shape, case.window, case.groups)


_PASSES = {"y": _forward, "dx": _input_gradient, "dw": _filter_gradient}


def stored_dtype(case: Case, result: str) -> np.dtype:
    return accumulator(case.dtype) if result == "dw" else case.dtype


def _bound(case: Case, terms: int, size: np.ndarray, want: np.ndarray, stored: np.dtype,
           activation: str | None) -> np.ndarray:
    """size: of the sum of absolute values. No activation is steeper than 1; 8 units are its own."""
    if not case.tensor:
        bound = cases.rounding_bound(terms, size, want, stored)
        own = 8 * cases.unit_roundoff(accumulator(stored))
        return bound + (own if activation in ("sigmoid", "tanh") else 0)
    off = terms * CUT_OFF / (1 - terms * CUT_OFF) * np.nan_to_num(size, nan=0, posinf=0)
    off = off + (8 * CUT_OFF if activation else 0)
    info = ml_dtypes.finfo(stored)
    largest = np.abs(np.nan_to_num(want, nan=0, posinf=0, neginf=0)) + off
    return off + float(info.eps) / 2 * largest + float(info.smallest_subnormal)


def run(backend: Any, case: Case, plan: Any, a: Arrays | None = None,
        passes: tuple[str, ...] = ALL_PASSES, moments: bool = False) -> Arrays:
    """The results on the host. moments: those of y as well, (bands of tile.m rows, 2, c_out)."""
    cuda, p = launches(), case.problem
    assert p.tensor == case.tensor
    there = {name: backend.asarray(v) for name, v in (arrays(case) if a is None else a).items()}
    x, w, dz = there["x"], there["w"], there["dz"]
    results = {}
    if moments:
        bands = -(-math.prod(case.y[:3]) // plan.tile.m)
        results["moments"] = backend.empty((bands, 2, case.w[2]), accumulator(case.dtype))
    if "y" in passes:
        results["y"] = cuda.forward(p, plan, x, w, there.get("b"), there.get("residual"),
                                    case.activation, results.get("moments"))
    if "dx" in passes:
        results["dx"] = cuda.input_gradient(p, plan, dz, w)
    if "dw" in passes:
        results["dw"] = backend.empty(w.shape, stored_dtype(case, "dw"))
        cuda.weight_gradient(p, plan, x, dz, results["dw"])
    return {name: backend.to_numpy(r) for name, r in results.items()}


def judge(backend: Any, case: Case, plans: Any, *passes: str, a: Arrays | None = None) -> Arrays:
    """The results by a plan, or by the last of several; each is what the reference says, to within
    its bound. a: other arrays than the case's own."""
    passes = passes or ALL_PASSES
    want = _expected_of(case, passes) if a is None else expected(case, a, passes)
    for plan in plans if isinstance(plans, list) else [plans]:
        with cases.named(f"{case} {plan}"):
            got = run(backend, case, plan, a, passes)
            for name, result in got.items():
                assert result.dtype == stored_dtype(case, name), name
            cases.assert_within({name: r.astype(np.float64) for name, r in got.items()}, want,
                                np.dtype(np.float64))
    return got


@functools.lru_cache(64)
def _expected_of(case: Case, passes: tuple[str, ...]) -> Expected:
    return expected(case, arrays(case), passes)


def judge_moments(backend: Any, case: Case, plan: Any, a: Arrays | None = None, *,
                  mean: dict[str, float], squares: dict[str, float]) -> None:
    """Those of each band of rows of y as it is stored; mean, squares: how close they must be."""
    got = run(backend, case, plan, a, ("y",), moments=True)
    rows = got["y"].astype(np.float64).reshape(-1, case.w[2])
    assert len(got["moments"]) == -(-len(rows) // plan.tile.m)
    for band, moments in enumerate(got["moments"]):
        part = rows[band * plan.tile.m:(band + 1) * plan.tile.m]
        np.testing.assert_allclose(moments[0], part.mean(axis=0), **mean)
        np.testing.assert_allclose(moments[1], part.var(axis=0) * len(part), **squares)


def judge_activation_backward(backend: Any, shape: tuple[int, ...], activation: str | None,
                              dtype: np.dtype, bias: bool = True) -> Any:
    """dz, and db where there is a bias."""
    cuda, rng = launches(), np.random.default_rng(0)
    da = rng.standard_normal(shape).astype(dtype)
    a = rng.standard_normal(shape)
    if activation:
        a = reference.ACTIVATIONS[activation][0](a)
    a = a.astype(dtype)
    dz = da.astype(np.float64) * _SLOPES[activation](a.astype(np.float64))
    db = backend.empty(shape[-1:], accumulator(dtype)) if bias else None
    there = cuda.activation_backward(backend.asarray(da), backend.asarray(a), activation, db)
    size = abs(da.astype(np.float64)).reshape(-1, shape[-1])
    with cases.named(f"activation_backward {shape} {activation} {dtype}"):
        cases.assert_within({"dz": backend.to_numpy(there)}, Expected({"dz": dz}, {
            "dz": cases.rounding_bound(4, size.reshape(shape), dz, dtype)}), dtype)
        if bias:
            want = dz.reshape(size.shape).sum(axis=0)
            cases.assert_within({"db": backend.to_numpy(db)}, Expected({"db": want}, {
                "db": cases.rounding_bound(len(size) + 4, size.sum(axis=0), want,
                                           accumulator(dtype))}), accumulator(dtype))
    return there, db


# g' as a function of a = g(z).
_SLOPES = {None: lambda a: 1, "relu": lambda a: a > 0,
           "leaky_relu": lambda a: np.where(a > 0, 1, 0.01),
           "sigmoid": lambda a: a * (1 - a), "tanh": lambda a: 1 - a * a}
assert set(_SLOPES) == {None, *activations.NAMES}
