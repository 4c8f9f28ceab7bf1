"""Convolutions with a plan of the test's own, and what gpucnn.reference says about them.

Without CuPy and its stand-in, a test file that imports this is skipped.
"""
from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import pytest

from gpucnn import activations, reference
from gpucnn.backend.cuda_kernel import accumulator
from gpucnn.geometry import IntOrPair, Padding, Window, make_window
from tests import cases
from tests.cases import Arrays, Expected

cuda = pytest.importorskip("gpucnn.backend.cuda_convolution")


class Case(NamedTuple):
    """x: its shape; w: (kh, kw, c_out). Arrays are drawn anew for each case, always the same."""

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

    @property
    def options(self) -> dict[str, Any]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation,
                "groups": self.groups}

    @property
    def window(self) -> Window:
        return make_window("test", self.w[:2], self.stride, self.padding, self.dilation,
                           self.x[1:3])

    @property
    def problem(self) -> Any:
        return cuda.Problem.of(self.x, self.w[2], self.window, self.groups, self.dtype)


def gemm(tile: int, splits: int = 1) -> Any:
    return cuda.Plan("implicit_gemm", cuda.TILES[tile], splits)


def direct(splits: int = 1) -> Any:
    return cuda.Plan("direct", None, splits)


@functools.lru_cache(64)
def arrays(case: Case) -> Arrays:
    """Some of dz is 0 and -0. The bias, as the gradients of parameters, is of the sums' dtype."""
    rng = np.random.default_rng(0)
    p = case.problem
    y_shape = (p.n, p.oh, p.ow, p.c_out)
    made = {"x": rng.standard_normal(case.x),
            "w": rng.standard_normal((*case.w[:2], p.inputs, p.c_out)),
            "dz": rng.standard_normal(y_shape)}
    made["dz"][rng.random(y_shape) < 0.1] = 0.0
    made["dz"][rng.random(y_shape) < 0.1] = -0.0
    if case.odd_weight is not None:
        made["w"][case.w[0] // 2, 0, p.inputs // 2, 0] = case.odd_weight
    made = {name: a.astype(case.dtype) for name, a in made.items()}
    if case.bias:
        made["b"] = rng.standard_normal(p.c_out).astype(accumulator(case.dtype))
    if case.residual:
        made["residual"] = rng.standard_normal(y_shape).astype(case.dtype)
    return made


@functools.lru_cache(64)
def expected_forward(case: Case) -> Expected:
    a = {name: v.astype(np.float64) for name, v in arrays(case).items()}
    residual, none = a.get("residual", np.zeros(1)), np.zeros(0)
    z = reference.conv2d(a["x"], a["w"], a.get("b"), **case.options) + residual
    y = reference.ACTIVATIONS[case.activation][0](z) if case.activation else z
    size = reference.conv2d(abs(a["x"]), abs(a["w"]), abs(a.get("b", none)) if case.bias else None,
                            **case.options) + abs(residual)
    bound = cases.rounding_bound(math.prod(a["w"].shape[:3]) + 2, size, y, case.dtype)
    if case.activation in ("sigmoid", "tanh"):  # their slope is at most 1; 4 ulp of their own
        bound = bound + 8 * cases.unit_roundoff(accumulator(case.dtype))
    return Expected({"y": y}, {"y": bound})


@functools.lru_cache(64)
def expected_gradients(case: Case) -> Expected:
    """dx and dw."""
    a = {name: v.astype(np.float64) for name, v in arrays(case).items()}
    dx, dw, _ = reference.conv2d_backward(a["dz"], a["x"], a["w"], **case.options)
    size = reference.conv2d_backward(abs(a["dz"]), abs(a["x"]), abs(a["w"]), **case.options)
    p = case.problem
    return Expected({"dx": dx, "dw": dw}, {
        "dx": cases.rounding_bound(p.window.places * p.c_out // p.groups, size[0], dx, case.dtype),
        "dw": cases.rounding_bound(p.n * p.oh * p.ow, size[1], dw, accumulator(case.dtype))})


def check_forward(backend: Any, case: Case, plan: Any) -> Any:
    a = {name: backend.asarray(v) for name, v in arrays(case).items()}
    y = cuda.forward(case.problem, plan, a["x"], a["w"], a.get("b"), a.get("residual"),
                     case.activation)
    with cases.named(f"{case} {plan}"):
        cases.assert_within({"y": backend.to_numpy(y)}, expected_forward(case), case.dtype)
    return y


def moments_of(backend: Any, case: Case, tile: int) -> tuple[np.ndarray, np.ndarray]:
    """y as rows of channels, and the moments of its bands of a tile's rows, in float64."""
    a = {name: backend.asarray(v) for name, v in arrays(case).items()}
    rows = math.prod(arrays(case)["dz"].shape[:3])
    moments = backend.empty((-(-rows // cuda.TILES[tile].m), 2, case.w[2]), accumulator(case.dtype))
    y = cuda.forward(case.problem, gemm(tile), a["x"], a["w"], a.get("b"), a.get("residual"),
                     case.activation, moments)
    y, moments = (backend.to_numpy(r).astype(np.float64) for r in (y, moments))
    return y.reshape(rows, -1), moments


def check_input_gradient(backend: Any, case: Case, plan: Any) -> Any:
    a = {name: backend.asarray(v) for name, v in arrays(case).items()}
    dx = cuda.input_gradient(case.problem, plan, a["dz"], a["w"])
    _compare(backend, case, plan, "dx", dx, case.dtype)
    return dx


def check_weight_gradient(backend: Any, case: Case, plan: Any) -> Any:
    a = {name: backend.asarray(v) for name, v in arrays(case).items()}
    dw = backend.empty(arrays(case)["w"].shape, accumulator(case.dtype))
    cuda.weight_gradient(case.problem, plan, a["x"], a["dz"], dw)
    _compare(backend, case, plan, "dw", dw, accumulator(case.dtype))
    return dw


def _compare(backend: Any, case: Case, plan: Any, name: str, got: Any, dtype: np.dtype) -> None:
    expected = expected_gradients(case)
    with cases.named(f"{case} {plan}"):
        cases.assert_within({name: backend.to_numpy(got)},
                            Expected({name: expected.values[name]}, {name: expected.bounds[name]}),
                            dtype)


PASSES = {"forward": check_forward, "input_gradient": check_input_gradient,
          "weight_gradient": check_weight_gradient}


def check_activation_backward(backend: Any, shape: tuple[int, ...], activation: str | None,
                              dtype: np.dtype, bias: bool = True) -> Any:
    """dz, and db where there is a bias."""
    rng = np.random.default_rng(0)
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
