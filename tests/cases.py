"""Random cases for gpucnn.ops, and what gpucnn.reference says about them.

A case is a function of its seed. Tests take CHUNK of them at a time; a failure names the seed
and the whole case, so `conv_case(17)` at a Python prompt is all it takes to look at it.

How far a result may be from the exact one is derived, not chosen: a sum of k products computed in
any order is off by at most gamma_k * (the same sum over absolute values), with
gamma_k = k u / (1 - k u) and u half the distance from 1 to the next number of the dtype (Higham,
"Accuracy and Stability of Numerical Algorithms", section 3.1). The sum over absolute values is
gpucnn.reference's own, called with |x| and |w|.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

from gpucnn import ops, reference

CHUNK = 25
STRIDES = [1, 1, 2, 3]
Arrays = dict[str, np.ndarray]


class Case(NamedTuple):
    """The arrays and keyword arguments of one call, forward and backward."""

    op: str
    seed: int
    dtype: np.dtype
    values: str
    arrays: Arrays
    options: dict[str, Any]
    activation: str | None = None

    def __str__(self) -> str:
        arrays = [f"{name}{list(a.shape)}" for name, a in self.arrays.items()]
        options = [f"{name}={value}" for name, value in self.options.items()]
        return (f"{self.op}_case({self.seed}) {self.dtype} {self.values}: "
                + " ".join([*arrays, *options, f"activation={self.activation}"]))


class Expected(NamedTuple):
    """The exact results, and for each element how far a correct one may be from it."""

    values: Arrays
    bounds: Arrays


def runs(share: int = 1, ops: tuple[str, ...] = ()) -> list[Any]:
    """Parameters (op, seeds) for all cases of all ops (or of `ops`), or 1 / share of them."""
    return [pytest.param(op, range(start, min(start + CHUNK, OPS[op].count // share)),
                         id=f"{op}-{start}")
            for op in ops or OPS for start in range(0, OPS[op].count // share, CHUNK)]


@contextmanager
def named(case: object) -> Iterator[None]:
    """Put the case in front of whatever goes wrong inside the block."""
    try:
        yield
    except Exception as e:
        raise AssertionError(f"{case}\n{type(e).__name__}: {e}") from e


def assert_within(results: Arrays, expected: Expected, dtype: np.dtype) -> None:
    """Shapes and NaN places equal, everything else within its bound; integers exactly equal."""
    for name, want in expected.values.items():
        got, bound = results[name], expected.bounds[name]
        assert got.shape == np.shape(want), f"{name}: shape {got.shape}, expected {np.shape(want)}"
        if want.dtype.kind == "i":
            np.testing.assert_array_equal(got, want, err_msg=name)
            continue
        assert got.dtype == dtype, f"{name} is {got.dtype}, expected {dtype}"
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want), err_msg=f"NaN in {name}")
        with np.errstate(invalid="ignore"):  # inf - inf, where both are infinite
            off = np.where((got == want) | np.isnan(want), 0, np.abs(got - want))
        wrong = off > bound
        if wrong.any():
            at = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise AssertionError(f"{name}{list(at)} is {got[at]}, expected {want[at]} to within "
                                 f"{bound[at]:.3g}; {wrong.sum()} of {wrong.size} are off")


def rounding_bound(terms: int, magnitude: Any, want: Any, dtype: np.dtype) -> np.ndarray:
    """How far a sum of `terms` products may be off `want`; magnitude: the sum of their |.|.

    16 bits are computed in float32 and rounded once. The reference itself rounds in float64.
    """
    computed = np.promote_types(dtype, np.float32)
    magnitude = np.nan_to_num(np.asarray(magnitude), nan=0, posinf=0)
    bound = (_gamma(terms, computed) + _gamma(terms, np.dtype(np.float64))) * magnitude
    if dtype.itemsize == 2:
        bound = (bound + unit_roundoff(dtype) * (np.abs(np.nan_to_num(want, posinf=0)) + bound)
                 + float(ml_dtypes.finfo(dtype).smallest_subnormal) / 2)
    return bound


def unit_roundoff(dtype: np.dtype) -> float:
    return float(ml_dtypes.finfo(dtype).eps) / 2


def _gamma(terms: int, dtype: np.dtype) -> float:
    u = unit_roundoff(dtype)
    return terms * u / (1 - terms * u)


# ---- convolution ---------------------------------------------------------------------------------

def conv_case(seed: int) -> Case:
    """x, w, b, dy of a conv2d with a random geometry; half of them grouped, some depthwise.

    Where values are NaN, so may be one weight and one bias.
    """
    rng = np.random.default_rng([seed, 1])
    dtype, values = _random_kind(rng)
    groups = int(rng.choice([1, 1, 1, 2, 3, 4]))
    depth, per_group = rng.choice([1, 1, 2, 3, 4], 2)
    wide = rng.random() < 0.15                           # 16 bytes a pixel, long rows of taps
    if wide:
        groups, (depth, per_group) = 1, rng.choice([4, 8], 2)
    n, h, width = _random_batch(rng)
    kernel, options = _random_window(rng, h, width, pool=False, strides=[1] if wide else STRIDES)
    oh, ow = output_size(h, width, kernel, **options)
    arrays = {
        "x": _random_array(rng, (n, h, width, depth * groups), dtype, values),
        "w": _random_array(rng, (*kernel, depth, per_group * groups), dtype, "normal"),
        "b": _random_array(rng, (per_group * groups,), dtype, "normal"),
        "dy": _random_array(rng, (n, oh, ow, per_group * groups), dtype, values),
    }
    for name in ("w", "b"):
        if values == "nan" and rng.random() < 0.5:
            arrays[name].flat[rng.integers(arrays[name].size)] = np.nan
    if rng.random() < 0.2:
        del arrays["b"]
    activation = rng.choice([None, None, "relu", "leaky_relu", "sigmoid", "tanh"])
    return Case("conv", seed, dtype, values, arrays, {**options, "groups": groups}, activation)


def run_conv(case: Case, a: Any) -> Any:
    """The case on the arrays a (of either backend): y, dx, dw, db."""
    y = ops.conv2d(a["x"], a["w"], a.get("b"), **case.options, activation=case.activation)
    dx, dw, db = ops.conv2d_backward(a["dy"], a["x"], a["w"], **case.options)
    return {"y": y, "dx": dx, "dw": dw, "db": db}


def expected_conv(case: Case) -> Expected:
    a, size = case.arrays, {k: np.abs(v) for k, v in case.arrays.items()}
    y = reference.conv2d(a["x"], a["w"], a.get("b"), **case.options, activation=case.activation)
    gradients = reference.conv2d_backward(a["dy"], a["x"], a["w"], **case.options)
    values = dict(zip(("y", "dx", "dw", "db"), (y, *gradients)))
    magnitudes = {"y": reference.conv2d(size["x"], size["w"], size.get("b"), **case.options),
                  **dict(zip(("dx", "dw", "db"), reference.conv2d_backward(
                      size["dy"], size["x"], size["w"], **case.options)))}
    kh, kw, depth, c_out = a["w"].shape
    outputs = math.prod(a["dy"].shape[:3])
    terms = {"y": kh * kw * depth + 1, "dx": kh * kw * c_out // case.options["groups"],
             "dw": outputs, "db": outputs}
    bounds = {k: rounding_bound(terms[k], magnitudes[k], values[k], case.dtype) for k in values}
    if case.activation in ("sigmoid", "tanh"):  # their slope is at most 1; 4 ulp of their own
        bounds["y"] = bounds["y"] + 8 * unit_roundoff(np.promote_types(case.dtype, np.float32))
    return Expected(values, bounds)


# ---- pooling -------------------------------------------------------------------------------------

def max_pool_case(seed: int) -> Case:
    """x, dy of a max_pool2d. Small integers tie; a few NaN, and in x infinities, come along."""
    rng = np.random.default_rng([seed, 2])
    dtype, values = _random_kind(rng, ("normal", "ties", "ties", "nan", "infinite"))
    return _pool_case("max_pool", rng, seed, dtype, values)


def avg_pool_case(seed: int) -> Case:
    """x, dy of an avg_pool2d."""
    rng = np.random.default_rng([seed, 3])
    dtype, values = _random_kind(rng)
    case = _pool_case("avg_pool", rng, seed, dtype, values, dilation=False)
    del case.options["dilation"]
    return case


def _pool_case(op: str, rng: np.random.Generator, seed: int, dtype: np.dtype, values: str,
               dilation: bool = True) -> Case:
    n, h, width = _random_batch(rng)
    c = int(rng.choice([1, 2, 3, 4, 8]))
    size, options = _random_window(rng, h, width, pool=True, dilation=dilation)
    oh, ow = output_size(h, width, size, **options)
    arrays = {"x": _random_array(rng, (n, h, width, c), dtype, values),
              "dy": _random_array(rng, (n, oh, ow, c), dtype,
                                  "nan" if values == "nan" else "normal")}
    if pair(options["stride"]) == size:
        options["stride"] = None                         # which means the same
    return Case(op, seed, dtype, values, arrays, {"size": size, **options})


def run_max_pool(case: Case, a: Any) -> Any:
    y, mask = ops.max_pool2d(a["x"], **case.options)
    dx = ops.max_pool2d_backward(a["dy"], mask, a["x"].shape, **case.options)
    return {"y": y, "mask": mask, "dx": dx}


def expected_max_pool(case: Case) -> Expected:
    a = case.arrays
    y, mask = reference.max_pool2d(a["x"], **case.options)
    back = {"mask": mask, "x_shape": a["x"].shape, **case.options}
    dx = reference.max_pool2d_backward(a["dy"], **back)
    magnitude = reference.max_pool2d_backward(np.abs(a["dy"]), **back)
    exact = np.zeros(y.shape)
    return Expected({"y": y, "mask": mask, "dx": dx}, {"y": exact, "mask": exact, "dx":
                    rounding_bound(math.prod(case.options["size"]), magnitude, dx, case.dtype)})


def run_avg_pool(case: Case, a: Any) -> Any:
    return {"y": ops.avg_pool2d(a["x"], **case.options),
            "dx": ops.avg_pool2d_backward(a["dy"], a["x"].shape, **case.options)}


def expected_avg_pool(case: Case) -> Expected:
    a, terms = case.arrays, math.prod(case.options["size"]) + 1  # the division rounds as well
    y, y_size = (reference.avg_pool2d(v, **case.options) for v in (a["x"], np.abs(a["x"])))
    dx, dx_size = (reference.avg_pool2d_backward(v, a["x"].shape, **case.options)
                   for v in (a["dy"], np.abs(a["dy"])))
    return Expected({"y": y, "dx": dx}, {"y": rounding_bound(terms, y_size, y, case.dtype),
                                         "dx": rounding_bound(terms, dx_size, dx, case.dtype)})


# ---- im2col and col2im ---------------------------------------------------------------------------

def columns_case(seed: int) -> Case:
    """x and cols of an im2col and a col2im."""
    rng = np.random.default_rng([seed, 4])
    dtype, values = _random_kind(rng)
    n, h, width = _random_batch(rng)
    c = int(rng.choice([1, 2, 3, 4, 8]))
    size, options = _random_window(rng, h, width, pool=False)
    rows = n * math.prod(output_size(h, width, size, **options))
    arrays = {"x": _random_array(rng, (n, h, width, c), dtype, values),
              "cols": _random_array(rng, (rows, math.prod(size) * c), dtype, values)}
    return Case("columns", seed, dtype, values, arrays, {"size": size, **options})


def run_columns(case: Case, a: Any) -> Any:
    return {"cols": ops.im2col(a["x"], **case.options),
            "x": ops.col2im(a["cols"], a["x"].shape, **case.options)}


def expected_columns(case: Case) -> Expected:
    a = case.arrays
    cols = reference.im2col(a["x"], **case.options)
    x, magnitude = (reference.col2im(v, a["x"].shape, **case.options)
                    for v in (a["cols"], np.abs(a["cols"])))
    return Expected({"cols": cols, "x": x}, {"cols": np.zeros(cols.shape), "x": rounding_bound(
        math.prod(case.options["size"]), magnitude, x, case.dtype)})


# ---- softmax cross-entropy -----------------------------------------------------------------------

def loss_case(seed: int) -> Case:
    """logits and labels of a softmax_cross_entropy, some of them far from 0."""
    rng = np.random.default_rng([seed, 5])
    dtype, values = _random_kind(rng)
    n, classes = int(rng.integers(1, 9)), int(rng.integers(1, 13))
    logits = _random_array(rng, (n, classes), dtype, values) * dtype.type(rng.choice([1, 5, 30]))
    logits += dtype.type(rng.choice([0, 0, 1000, -1000]))
    labels = rng.integers(0, classes, n).astype(rng.choice(["int64", "int32", "uint8"]))
    return Case("loss", seed, dtype, values, {"logits": logits, "labels": labels},
                {"label_smoothing": float(rng.choice([0, 0, 0.1, 0.5]))})


def run_loss(case: Case, a: Any) -> Any:
    loss, dlogits = ops.softmax_cross_entropy(a["logits"], a["labels"], **case.options)
    return {"loss": loss, "dlogits": dlogits}


def expected_loss(case: Case) -> Expected:
    """With t = z - max(z), C classes, n rows: exp(t) is off by (|t| + 4) u relative, so the
    logarithm of the sum of C of them by less than 8 C u, and log p by u (|t| + |log p| + 8 C).
    The loss adds n C terms of one sign to that; p - q turns what log p is off into p times as much.
    """
    z, dtype = case.arrays["logits"].astype(np.float64), case.dtype
    n, classes = z.shape
    loss, dlogits = reference.softmax_cross_entropy(z, case.arrays["labels"], **case.options)
    t = z - z.max(axis=1, keepdims=True)
    log_p = t - np.log(np.exp(t).sum(axis=1, keepdims=True))
    u = unit_roundoff(np.promote_types(dtype, np.float32))
    units = np.nan_to_num(np.abs(t) + np.abs(log_p) + 8 * classes)
    return Expected({"loss": np.asarray(loss), "dlogits": dlogits}, {
        "loss": rounding_bound(n * classes + 4, loss, loss, dtype) + u * units.max(),
        "dlogits": rounding_bound(1, 6 / n, dlogits, dtype)
        + u / n * units * np.nan_to_num(np.exp(log_p))})


# ---- GELU ----------------------------------------------------------------------------------------

def gelu_case(seed: int) -> Case:
    """x and dy of a gelu, of any number of axes, up to where one side of it is 0."""
    rng = np.random.default_rng([seed, 6])
    dtype, values = _random_kind(rng)
    n, *others = _random_batch(rng)
    shape = (n, *others, int(rng.integers(1, 9)))[:rng.integers(2, 5)]
    x = _random_array(rng, shape, dtype, values) * dtype.type(rng.choice([1, 3, 8]))
    return Case("gelu", seed, dtype, values, {
        "x": x, "dy": _random_array(rng, shape, dtype, values)}, {})


def run_gelu(case: Case, a: Any) -> Any:
    return {"y": ops.gelu(a["x"]), "dx": ops.gelu_backward(a["dy"], a["x"])}


def expected_gelu(case: Case) -> Expected:
    """P is off by 12 u of itself (CUDA promises 5 ulp), and so is the rest. In float64 the judges
    are off too: by 2 x^2 u, for erfc and exp multiply what their arguments are off. P and p below
    the smallest normal number are 0 on a GPU (docs/kernels.md), before they are multiplied.
    """
    x, dy = (case.arrays[name].astype(np.float64) for name in ("x", "dy"))
    y, dx = reference.gelu(x), reference.gelu_backward(dy, x)
    terms = np.abs(dx) + np.abs(dy * x) * np.exp(-x * x / 2)  # dx, and what may have cancelled
    times = 12 + np.nan_to_num(2 * x * x if case.dtype == np.float64 else 0)
    smallest = np.finfo(np.promote_types(case.dtype, np.float32)).smallest_normal
    lost = smallest * (1 + np.minimum(np.nan_to_num(np.abs(x)), 40))  # further out all is 0 or x
    return Expected({"y": y, "dx": dx}, {
        "y": times * rounding_bound(1, np.abs(y), y, case.dtype) + lost,
        "dx": times * rounding_bound(1, terms, dx, case.dtype)
              + lost * (1 + np.nan_to_num(np.abs(dy), posinf=0))})


class Judged(NamedTuple):
    """How to make a case of an op, run it on either backend's arrays, and what is right."""

    make: Callable[[int], Case]
    run: Callable[[Case, Any], Any]
    expect: Callable[[Case], Expected]
    count: int


OPS = {
    "conv": Judged(conv_case, run_conv, expected_conv, 600),
    "max_pool": Judged(max_pool_case, run_max_pool, expected_max_pool, 600),
    "avg_pool": Judged(avg_pool_case, run_avg_pool, expected_avg_pool, 400),
    "columns": Judged(columns_case, run_columns, expected_columns, 250),
    "gelu": Judged(gelu_case, run_gelu, expected_gelu, 250),
    "loss": Judged(loss_case, run_loss, expected_loss, 250),
}


def judge(case: Case, expected: Expected, backend: Any) -> None:
    """Run the case on the backend; it must give what is expected and write none of its inputs."""
    arrays = {name: _laid_out(backend, a, case.seed) for name, a in case.arrays.items()}
    results = OPS[case.op].run(case, arrays)
    for name, result in results.items():
        assert type(result).__module__.split(".")[0] == backend.name, f"{name}: {type(result)}"
    assert_within({name: np.asarray(backend.to_numpy(r)) for name, r in results.items()},
                  expected, case.dtype)
    for name, a in case.arrays.items():
        assert backend.to_numpy(arrays[name]).tobytes() == a.tobytes(), f"{name} was written"


def _laid_out(backend: Any, a: np.ndarray, seed: int) -> Any:
    """a on the backend: as it is, or a view of memory that runs backwards or is transposed."""
    turn = (lambda v: v, lambda v: v[::-1], lambda v: v.T)[seed % 3]  # each undoes itself
    return turn(backend.asarray(np.ascontiguousarray(turn(a))))


# ---- random pieces -------------------------------------------------------------------------------

def output_size(h: int, w: int, size: tuple[int, int], *, stride: Any, padding: Any,
                dilation: Any = 1, groups: int = 1) -> tuple[int, int]:
    """The article's formula once more, so that the cases do not lean on gpucnn.geometry."""
    pads = pad_pixels(h, w, size, stride=stride, padding=padding, dilation=dilation)
    return tuple((n + sum(p) - (f - 1) * d - 1) // s + 1 for n, p, f, s, d in zip(
        (h, w), pads, size, pair(stride), pair(dilation)))


def pad_pixels(h: int, w: int, size: tuple[int, int], *, stride: Any, padding: Any,
               dilation: Any = 1) -> tuple[tuple[int, int], tuple[int, int]]:
    """((top, bottom), (left, right)) of any padding that gpucnn accepts."""
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding == "same":
        missing = [max(0, (math.ceil(n / s) - 1) * s + (f - 1) * d + 1 - n) for n, f, s, d in zip(
            (h, w), size, pair(stride), pair(dilation))]
        return tuple((m // 2, m - m // 2) for m in missing)
    return tuple(pair(p) for p in pair(padding))


def pair(value: Any) -> tuple[Any, Any]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _random_kind(rng: np.random.Generator, values: tuple[str, ...] = ("normal", "ties", "nan")
                 ) -> tuple[np.dtype, str]:
    dtype = rng.choice(["float32"] * 4 + ["float64"] * 4 + ["float16"])
    return np.dtype(str(dtype)), str(rng.choice(values))


def _random_batch(rng: np.random.Generator) -> tuple[int, int, int]:
    n = rng.choice([0, 1, 1, 2, 3], p=[0.05, 0.25, 0.2, 0.3, 0.2])
    h, w = rng.integers(1, 8, 2)
    return int(n), int(h), int(w)


def _random_array(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype, values: str
                  ) -> np.ndarray:
    a = rng.integers(-2, 3, shape) if values == "ties" else rng.standard_normal(shape)
    a = np.asarray(a, dtype)
    if values == "nan" and rng.random() < 0.6:           # else the NaN is in another array
        a[rng.random(shape) < 0.05] = np.nan
    if values == "infinite":
        a[rng.random(shape) < 0.3] = -np.inf
        a[rng.random(shape) < 0.1] = np.inf
        a[rng.random(shape) < 0.1] = np.nan
    return a


def _random_window(rng: np.random.Generator, h: int, w: int, *, pool: bool, dilation: bool = True,
                   strides: list[int] = STRIDES) -> tuple[tuple[int, int], dict[str, Any]]:
    """A size, and a stride, padding and dilation with which it fits an image of h x w."""
    while True:
        size = tuple(int(k) for k in rng.integers(1, 5, 2))
        if rng.random() < 0.3:
            size = size[0], size[0]
        options = {"stride": _int_or_pair(rng, strides),
                   "padding": _random_padding(rng),
                   "dilation": _int_or_pair(rng, [1, 1, 1, 2, 3]) if dilation else 1}
        pads = pad_pixels(h, w, size, **options)
        if all(_fits(*axis, pool) for axis in zip((h, w), size, pair(options["stride"]),
                                                  pair(options["dilation"]), pads)):
            return size, options


def _fits(n: int, f: int, s: int, d: int, pads: tuple[int, int], pool: bool) -> bool:
    """Whether a window fits an axis, and for pooling whether none is mostly or wholly padding."""
    covered = (f - 1) * d + 1
    starts = range(-pads[0], n + pads[1] - covered + 1, s)
    if not pool:
        return len(starts) > 0
    return len(starts) > 0 and 2 * max(pads) <= covered and all(
        any(0 <= start + tap * d < n for tap in range(f)) for start in starts)


def _random_padding(rng: np.random.Generator) -> Any:
    sides = tuple(tuple(int(p) for p in pads) for pads in rng.integers(0, 4, (2, 2)))
    return [sides, sides, "same", "valid", sides[0][0], sides[0]][rng.integers(6)]


def _int_or_pair(rng: np.random.Generator, choices: list[int]) -> Any:
    vertical, horizontal = (int(v) for v in rng.choice(choices, 2))
    return (vertical, horizontal) if rng.random() < 0.5 else vertical
