"""Batch norm on both backends: random cases against gpucnn.reference and torch, the accuracy of its
statistics, what is fused against what is not, and bugs planted in the kernels."""
from __future__ import annotations

import itertools
import re

import ml_dtypes
import numpy as np
import pytest

from gpucnn import layers, ops, reference
from gpucnn.backend import cuda_kernel
from gpucnn.backend.cuda_kernel import Variant, kernel_dir, read_source
from gpucnn.layers import BatchNorm, Residual, Sequential
from tests import cases
from tests.cases import Arrays, Case, Expected
from tests.conftest import needs_simulator
from tests.gpusim import nvrtc
from tests.gpusim.mutation import caught

EPSILON, MOMENTUM = 1e-3, 0.25
COUNT = 200
pytestmark = pytest.mark.filterwarnings("ignore:invalid value")  # infinity less infinity
SHORT = np.float16, ml_dtypes.bfloat16


def make_case(seed: int, *, dtype=None, rows: int | None = None, c: int | None = None) -> Case:
    """x, dy, gamma, beta and half of the time a residual; gamma may have zeros, x a large mean.

    dy is 0 where rounding may decide on which side of the ReLU z falls.
    """
    rng = np.random.default_rng([seed, 6])
    dtype = np.dtype(dtype or rng.choice(["float32", "float32", "float64"]))
    values = str(rng.choice(["normal", "normal", "ties", "nan", "far"]))
    c = c or int(rng.choice([1, 2, 3, 4, 5, 8, 12, 16, 33]))
    shape = (rows or int(rng.choice([2, 3, 17, 300])), c)
    if rows is None and rng.random() < 0.5:
        shape = tuple(int(n) for n in (*rng.integers(2, 6, 3), c))
    x = rng.integers(-2, 3, shape) if values == "ties" else rng.standard_normal(shape)
    x = x * rng.uniform(0.5, 2, c) + (1e4 if values == "far" else rng.standard_normal(c))
    arrays = {"x": x.astype(dtype), "gamma": rng.standard_normal(c), "beta": rng.standard_normal(c),
              "dy": rng.standard_normal(shape).astype(dtype)}
    if rng.random() < 0.5:
        arrays["residual"] = rng.standard_normal(shape).astype(dtype)
    arrays["gamma"][rng.random(c) < 0.2] = 0
    for name in ("gamma", "beta"):
        arrays[name] = arrays[name].astype(cuda_kernel.accumulator(dtype))
    if values == "nan":
        name, value = [("x", np.nan), ("x", np.inf), ("dy", np.nan)][rng.integers(3)]
        arrays[name].flat[rng.integers(arrays[name].size)] = value
    case = Case("batch_norm", seed, dtype, values, arrays, {}, rng.choice([None, "relu"]))
    if case.activation:
        z, bound = unrectified(case)
        arrays["dy"][~(np.abs(z) > bound)] = 0
    return case


def unrectified(case: Case) -> tuple[np.ndarray, np.ndarray]:
    expected = expect(case._replace(activation=None), forward_only=True)
    return expected.values["y"], expected.bounds["y"]


def expect(case: Case, forward_only: bool = False) -> Expected:
    """The reference's results. k roundings put a mean off by k u max|x|, which moves all x_hat by
    as much over std; var is off by k u of itself and the square of that; the rest is carried on.
    """
    wide = {k: v.astype(np.float64) for k, v in case.arrays.items()}
    x, gamma, dy = wide["x"], wide["gamma"], wide["dy"]
    y, mean, var = reference.batch_norm(x, gamma, wide["beta"], epsilon=EPSILON,
                                        residual=wide.get("residual"), activation=case.activation)
    n, over = x.size // x.shape[-1], tuple(range(x.ndim - 1))
    u = cases.unit_roundoff(cuda_kernel.accumulator(case.dtype)) * 2  # and the reference's own
    stored = 2.0**-11 if case.dtype == np.float16 else 2.0**-8 if case.dtype.itemsize == 2 else u
    least = 2.0**-25 if case.dtype == np.float16 else 0  # half of its smallest number
    k = n + 8
    mean_off = k * u * np.nan_to_num(np.abs(x).max(axis=over), posinf=0)
    var_off = k * u * var + 2 * mean_off * np.sqrt(var) + mean_off**2
    std = np.sqrt(var + EPSILON)
    std_off = var_off / std**2 + 4 * u  # of itself
    x_hat = np.abs(x - mean) / std
    x_hat_off = mean_off / std + x_hat * std_off + u * np.abs(x) / std
    size = np.abs(gamma) * x_hat + np.abs(wide["beta"]) + np.abs(wide.get("residual", 0))
    values = {"y": y, "mean": mean, "var": var}
    bounds = {"y": np.abs(gamma) * x_hat_off + 4 * u * size + stored * np.abs(y) + least,
              "mean": mean_off, "var": var_off}
    if not forward_only:
        dz = np.where(y <= 0, 0, dy) if case.activation else dy
        dx, dgamma, dbeta = reference.batch_norm_backward(dz, x, gamma, epsilon=EPSILON)
        size = np.abs(dz)
        dbeta_off = k * u * size.sum(axis=over)
        dgamma_off = k * u * (size * x_hat).sum(axis=over) + (size * x_hat_off).sum(axis=over)
        terms = size + np.abs(dbeta) / n + x_hat * np.abs(dgamma) / n
        off = (terms * (std_off + 8 * u) + dbeta_off / n + x_hat_off * np.abs(dgamma) / n
               + (x_hat + x_hat_off) * dgamma_off / n)
        values |= {"dx": dx, "dgamma": dgamma, "dbeta": dbeta}
        bounds |= {"dx": np.abs(gamma) / std * off + stored * np.abs(dx) + least,
                   "dgamma": dgamma_off, "dbeta": dbeta_off}
        if "residual" in case.arrays:
            values["dresidual"], bounds["dresidual"] = dz, np.zeros(dz.shape)
    return Expected(values, {name: np.nan_to_num(b, posinf=0) for name, b in bounds.items()})


def run(case: Case, backend) -> Arrays:
    """What the backend makes of the case, training and backward."""
    a = {name: backend.asarray(v) for name, v in case.arrays.items()}
    running = [backend.xp.zeros(a["gamma"].shape, a["gamma"].dtype) for _ in range(2)]
    mean, var = backend.batch_norm_statistics(a["x"], *running, MOMENTUM)
    y = backend.batch_norm(a["x"], mean, var, a["gamma"], a["beta"], EPSILON, a.get("residual"),
                           case.activation)
    dgamma, dbeta = (backend.empty(v.shape, v.dtype) for v in (a["gamma"], a["beta"]))
    dx, dresidual = backend.batch_norm_backward(
        a["dy"], a["x"], y if case.activation else None, mean, var, a["gamma"], a["beta"], EPSILON,
        case.activation, dgamma, dbeta, "residual" in a)
    results = {"y": y, "mean": mean, "var": var, "dx": dx, "dgamma": dgamma, "dbeta": dbeta,
               "running_mean": running[0], "running_var": running[1]}
    results |= {} if dresidual is None else {"dresidual": dresidual}
    for name, v in case.arrays.items():
        assert backend.to_numpy(a[name]).tobytes() == v.tobytes(), f"{name} was written"
    return {name: np.asarray(backend.to_numpy(r)) for name, r in results.items()}


def judge(case: Case, expected: Expected, backend) -> None:
    results = run(case, backend)
    n = case.arrays["x"].size // case.arrays["x"].shape[-1]
    for name, factor in (("mean", MOMENTUM), ("var", MOMENTUM * n / (n - 1))):
        np.testing.assert_allclose(results["running_" + name], results[name] * factor, rtol=1e-6)
    with np.errstate(invalid="ignore", over="ignore"):
        for name, want in expected.values.items():
            dtype = case.dtype if want.ndim > 1 else cuda_kernel.accumulator(case.dtype)
            if name in ("mean", "var"):  # of a channel that is not finite: neither
                finite = np.isfinite(want)
                assert not np.isfinite(results[name][~finite]).any(), name
                results[name] = np.where(finite, results[name], want.astype(dtype))
            assert results[name].dtype == dtype, name
            got = results[name].astype(np.float64)
            cases.assert_within({name: got}, Expected({name: want}, expected.bounds), got.dtype)


@pytest.fixture
def small_blocks(backend, monkeypatch):
    """Blocks of a few rows, so that small arrays have several."""
    monkeypatch.setattr(backend, "block_bytes", 1)
    if backend.name == "cupy":
        from gpucnn.backend import cuda_batch_norm
        monkeypatch.setattr(cuda_batch_norm, "_REDUCING", (512, 1))
        monkeypatch.setattr(cuda_batch_norm, "_ELEMENTWISE", (3, 1))


def expected_by_torch(case: Case) -> Arrays:
    import torch
    a = {k: torch.tensor(v.astype(np.float64), requires_grad=k != "dy")
         for k, v in case.arrays.items()}
    z = torch.nn.functional.batch_norm(a["x"].movedim(-1, 1), None, None, a["gamma"], a["beta"],
                                       training=True, eps=EPSILON).movedim(1, -1)
    z = z + a.get("residual", 0)
    y = torch.relu(z) if case.activation else z
    y.backward(a["dy"])
    return {"y": y.detach().numpy(), **{f"d{k}": v.grad.numpy() for k, v in a.items() if k != "dy"}}


@pytest.mark.parametrize("start", range(0, COUNT, cases.CHUNK))
def test_equals_the_reference(start, backend, small_blocks):
    for seed in range(start, start + cases.CHUNK):
        case = make_case(seed)
        with cases.named(case):
            judge(case, expect(case), backend)


@pytest.mark.parametrize("start", range(0, COUNT, cases.CHUNK))
def test_equals_torch(start, backend):
    pytest.importorskip("torch")
    for seed in range(start, start + cases.CHUNK):
        case = make_case(seed)
        with cases.named(case):
            judge(case, Expected(expected_by_torch(case), expect(case).bounds), backend)


def test_the_cases_are_as_varied_as_they_should_be():
    made = [make_case(seed) for seed in range(COUNT)]
    wanted = {
        "one channel": [c.arrays["x"].shape[-1] == 1 for c in made],
        "16 bytes of channels": [c.arrays["x"].shape[-1] % 4 == 0 for c in made],
        "images": [c.arrays["x"].ndim == 4 for c in made],
        "more rows than a block": [len(c.arrays["x"]) > 256 for c in made],
        "gamma of 0": [bool((c.arrays["gamma"] == 0).any()) for c in made],
        "NaN": [bool(np.isnan(c.arrays["x"]).any()) for c in made],
        "infinity": [bool(np.isinf(c.arrays["x"]).any()) for c in made],
        "dy of NaN": [bool(np.isnan(c.arrays["dy"]).any()) for c in made],
        **{f"{activation}, residual {there}": [
            c.activation == activation and ("residual" in c.arrays) == there for c in made]
            for activation in (None, "relu") for there in (False, True)},
        **{kind: [c.values == kind for c in made] for kind in ("far", "ties")},
        "float64": [c.dtype == np.float64 for c in made],
    }
    too_few = {name: sum(hits) for name, hits in wanted.items() if sum(hits) < 5}
    assert not too_few


@pytest.mark.parametrize("dtype", SHORT, ids=["float16", "bfloat16"])
def test_sixteen_bits_are_stored_and_float32_is_summed(dtype, cupy_backend):
    for seed, c in itertools.product(range(12), (3, 16)):
        case = make_case(seed, dtype=dtype, c=c)
        if case.values in ("normal", "ties"):
            with cases.named(case):
                judge(case, expect(case), cupy_backend)


def test_64_bit_offsets_give_the_same_bits(cupy_backend, monkeypatch):
    case = make_case(5, dtype=np.float32, rows=700, c=12)
    first = run(case, cupy_backend)
    monkeypatch.setattr(cuda_kernel, "MAX_INT_INDEX", -1)
    second = run(case, cupy_backend)
    assert {k: v.tobytes() for k, v in first.items()} == {k: v.tobytes() for k, v in second.items()}


@pytest.mark.parametrize("c", [1, 3, 4, 1030, 4100])
def test_many_channels_and_rows_give_the_same_bits_twice(c, backend):
    """More channels than a block has threads; rows that fill no block evenly."""
    case = make_case(1, dtype=np.float32, rows=4 if c > 99 else 4999, c=c)
    first, second = run(case, backend), run(case, backend)
    assert {k: v.tobytes() for k, v in first.items()} == {k: v.tobytes() for k, v in second.items()}
    expected = expect(case)
    judge(case, expected, backend)


def test_a_misaligned_view_is_read_channel_by_channel(cupy_backend):
    case = make_case(3, dtype=np.float32, rows=40, c=8)
    shifted = cupy_backend.asarray(np.array([0, *case.arrays["x"].flat], np.float32))[1:]
    running = [cupy_backend.xp.zeros(8, np.float32) for _ in range(2)]
    x = cupy_backend.asarray(case.arrays["x"])
    aligned = cupy_backend.batch_norm_statistics(x, *running, MOMENTUM)
    assert shifted.data.ptr % 16
    for a, b in zip(aligned, cupy_backend.batch_norm_statistics(shifted.reshape(40, 8), *running,
                                                                MOMENTUM)):
        np.testing.assert_allclose(cupy_backend.to_numpy(a), cupy_backend.to_numpy(b), rtol=1e-5)


@pytest.mark.parametrize("odd", ["x", "residual", "dy", "y"])
def test_no_misaligned_array_is_read_16_bytes_at_a_time(cupy_backend, rng, odd):
    values = {name: rng.standard_normal((40, 8)) for name in ("x", "residual", "dy", "y")}
    vectors = [cupy_backend.asarray(rng.random(8), np.float32) for _ in range(4)]

    def run(odd):
        a = {name: cupy_backend.asarray(v, np.float32) for name, v in values.items()}
        if odd:
            a[odd] = cupy_backend.asarray(np.append(0, values[odd]), np.float32)[1:].reshape(40, 8)
            assert a[odd].data.ptr % 16
        sums = [cupy_backend.empty((8,), np.float32) for _ in range(2)]
        y = cupy_backend.batch_norm(a["x"], *vectors, EPSILON, a["residual"], "relu")
        dx, dz = cupy_backend.batch_norm_backward(a["dy"], a["x"], a["y"], *vectors, EPSILON,
                                                  "relu", *sums, True)
        return [cupy_backend.to_numpy(r) for r in (y, dx, dz, *sums)]

    for got, want in zip(run(odd), run(None)):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_variance_far_from_0_keeps_its_digits(backend, rng):
    """By the mean of the squares less the square of the mean it would have none."""
    x = (1e4 + rng.standard_normal((3000, 5))).astype(np.float32)
    running = [backend.xp.zeros(5, np.float32) for _ in range(2)]
    mean, var = (backend.to_numpy(v) for v in backend.batch_norm_statistics(
        backend.asarray(x), *running, MOMENTUM))
    np.testing.assert_allclose(mean, x.astype(float).mean(0), rtol=4 * 2.0**-24)
    np.testing.assert_allclose(var, x.astype(float).var(0), rtol=1e-4)


def test_a_constant_channel_has_no_variance(backend, rng):
    """Nor one below 0, of which a small epsilon would leave no square root."""
    x = np.full((3000, 104), [0, 0.1, 1e4 + 0.3, -1e15, *rng.standard_normal(100)], np.float32)
    running = [backend.xp.zeros(104, np.float32) for _ in range(2)]
    mean, var = (backend.to_numpy(v) for v in backend.batch_norm_statistics(
        backend.asarray(x), *running, MOMENTUM))
    assert (var >= 0).all()
    assert (np.sqrt(var) <= 1e-6 * np.abs(x[0])).all()
    np.testing.assert_allclose(mean, x[0], rtol=1e-6)


def test_what_is_not_finite_stays_in_its_channel(backend, rng):
    x = rng.standard_normal((50, 8)).astype(np.float32)
    x[3, 1], x[4, 6] = np.nan, np.inf
    layer = BatchNorm(activation="relu")
    layer.build((8,))
    with np.errstate(invalid="ignore"):
        y = backend.to_numpy(layer.forward(backend.asarray(x), training=True))
        dx = backend.to_numpy(layer.backward(backend.asarray(y)))
    for result in (y, dx, *(backend.to_numpy(b) for b in layer.own_buffers.values())):
        bad = ~np.isfinite(result.reshape(-1, 8)).all(axis=0)
        np.testing.assert_array_equal(np.flatnonzero(bad), [1, 6])


def run_ops(case: Case, backend, view=lambda a: a) -> Arrays:
    """The case by gpucnn.ops, on views of its arrays."""
    a = {k: view(backend.asarray(np.ascontiguousarray(view(v)))) for k, v in case.arrays.items()}
    mean, var = ops.batch_norm_statistics(a["x"])
    y = ops.batch_norm(a["x"], mean, var, a["gamma"], a["beta"], epsilon=EPSILON,
                       residual=a.get("residual"), activation=case.activation)
    dz = a["dy"]
    if case.activation:
        dz = backend.xp.where(y > 0, dz, backend.xp.zeros_like(dz))
    dx, dgamma, dbeta = ops.batch_norm_backward(dz, a["x"], mean, var, a["gamma"], epsilon=EPSILON)
    results = {"y": y, "mean": mean, "var": var, "dx": dx, "dgamma": dgamma, "dbeta": dbeta}
    return {name: np.asarray(backend.to_numpy(r)) for name, r in results.items()}


@pytest.mark.parametrize("view", [lambda a: a, lambda a: a[::-1], lambda a: a.T],
                         ids=["contiguous", "backwards", "transposed"])
def test_ops_on_views_give_the_bits_of_the_backend(view, backend):
    for seed in range(20):
        case = make_case(seed)
        if case.values == "nan":
            continue
        with cases.named(case):
            want = run(case, backend)
            for name, got in run_ops(case, backend, view).items():
                assert got.tobytes() == want[name].tobytes(), name


def test_ops_compute_float16_in_float32(backend):
    case = make_case(2, dtype=np.float32, rows=40, c=6)
    half = case._replace(arrays={k: v.astype(np.float16) for k, v in case.arrays.items()})
    results = run_ops(half, backend)
    expected = run_ops(case._replace(arrays={k: v.astype(np.float32) for k, v
                                             in half.arrays.items()}), backend)
    for name, got in results.items():
        assert got.dtype == np.float16
        np.testing.assert_allclose(got, expected[name], rtol=0.01, atol=0.01)


X, V = np.ones((4, 3)), np.ones(3)
REFUSED = {
    "one value": (lambda: ops.batch_norm_statistics(X[:1]),
                  "batch_norm_statistics: needs more than 1 value per channel (last axis), got"),
    "no values": (lambda: ops.batch_norm_statistics(X[:0]), "got (0, 3)"),
    "no channels": (lambda: ops.batch_norm(X[:, :0], *[V[:0]] * 4), "at least 1 channel, got (4,"),
    "gamma": (lambda: ops.batch_norm(X, V, V, V[:2], V), "gamma has shape (2,), expected (3,)"),
    "residual": (lambda: ops.batch_norm(X, V, V, V, V, residual=X[:1]),
                 "residual has shape (1, 3), expected (4, 3)"),
    "dy": (lambda: ops.batch_norm_backward(X[:3], X, V, V, V), "dy has shape (3, 3), expected (4,"),
    "epsilon": (lambda: ops.batch_norm(X, V, V, V, V, epsilon=-1),
                "batch_norm: epsilon must be > 0 and finite, got -1"),
    "epsilon backward": (lambda: ops.batch_norm_backward(X, X, V, V, V, epsilon=0), "got 0"),
    "activation": (lambda: ops.batch_norm(X, V, V, V, V, activation="tanh"),
                   "batch_norm: activation 'tanh' is not known; use None, 'relu'"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_ops_refuse_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize("view", [lambda a: a[::-1], lambda a: a.swapaxes(0, 1),
                                  lambda a: a[:, ::2]], ids=["backwards", "transposed", "sliced"])
def test_views_give_the_bits_of_their_contiguous_copies(view, backend, rng):
    results = []
    a = view(backend.asarray(rng.standard_normal((6, 6, 5, 8)), np.float32))
    for x in (a, backend.asarray(np.ascontiguousarray(backend.to_numpy(a)))):
        layer = Residual(BatchNorm(), activation="relu")
        layer.build(x.shape[1:])
        y = layer.forward(x, training=True)
        results.append([backend.to_numpy(r).tobytes() for r in (y, layer.backward(x),
                                                                layer.flat_grad)])
    assert results[0] == results[1]


@pytest.mark.parametrize("activation", [None, "relu", "tanh", "leaky_relu"])
@pytest.mark.parametrize("last", [lambda: BatchNorm(), lambda: BatchNorm(activation="relu"),
                                  lambda: layers.Conv2D(4, 1), lambda: Sequential([])],
                         ids=["norm", "norm with ReLU", "conv", "nothing"])
def test_a_residual_equals_its_parts_one_after_another(last, activation, backend, rng):
    x, dy = (backend.asarray(rng.standard_normal((3, 5, 4, 4))) for _ in range(2))
    one = Residual(Sequential([layers.Tanh(), last()]), layers.Conv2D(4, 1), activation=activation)
    one.build((5, 4, 4), seed=1, dtype=np.float64)
    body, shortcut = Sequential([layers.Tanh(), last()]), layers.Conv2D(4, 1)
    for name, part in (("body/", body), ("shortcut/", shortcut)):
        part.build((5, 4, 4), dtype=np.float64)
        for path, p in part.parameters().items():
            p.data[...] = one.parameters()[name + path].data
    a = {None: Sequential([]), "relu": layers.ReLU(), "tanh": layers.Tanh(),
         "leaky_relu": layers.LeakyReLU()}[activation]
    a.build((5, 4, 4), dtype=np.float64)
    y = a.forward(body.forward(x, training=True) + shortcut.forward(x, training=True),
                  training=True)
    dz = a.backward(dy)
    dx = body.backward(dz) + shortcut.backward(dz)

    def close(got, want):
        np.testing.assert_allclose(backend.to_numpy(got), backend.to_numpy(want), rtol=1e-12,
                                   atol=1e-13)

    close(one.forward(x, training=True), y)
    close(one.backward(dy), dx)
    for name, part in (("body/", body), ("shortcut/", shortcut)):
        for path, p in part.parameters().items():
            close(one.parameters()[name + path].grad, p.grad)


@needs_simulator  # which notes the launches
def test_the_sum_and_the_activation_take_no_pass_of_their_own(cupy_backend, rng):
    from tests.gpusim import fake_cupy
    layer = Residual(Sequential([BatchNorm()]), activation="relu")
    layer.build((4, 4, 8))
    x = cupy_backend.asarray(rng.standard_normal((2, 4, 4, 8)), np.float32)
    del fake_cupy.launches[:]
    layer.backward(layer.forward(x, training=True))
    assert [name for name, _, _ in fake_cupy.launches] == [
        "batch_norm_moments", "batch_norm_merge_moments", "batch_norm", "batch_norm_sums",
        "batch_norm_merge_sums", "batch_norm_backward",
        "activate_sum"]  # of the gradients of both ways


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match=re.escape(
            "BatchNorm 'b': activation 'tanh' is not known; use None, 'relu'")):
        BatchNorm(activation="tanh", name="b")
    with pytest.raises(ValueError, match="^Residual: activation 'rule' is not known; use None, "):
        Residual(BatchNorm(), activation="rule")


# ---- the kernels -------------------------------------------------------------------------------

def test_blocks_cover_every_row_and_channel_and_are_not_too_many(cupy_backend, rng):
    from gpucnn.backend.cuda_batch_norm import tiles
    for _ in range(300):
        rows, columns = (int(10 ** rng.uniform(0, top)) for top in (8, 5))
        (across, bands), band, width = tiles(rows, columns, 512, 16)
        lanes = 256 // width
        assert (across - 1) * width < columns <= across * width
        assert (bands - 1) * band < rows <= bands * band
        assert band % lanes == 0
        assert width & (width - 1) == 0
        assert width <= 32
        assert bands == 1 or (across * bands <= 512 and band >= 16 * lanes)
    assert tiles(0, 4, 512, 16)[0] == (1, 0)


def test_rows_are_read_and_written_16_bytes_at_a_time():
    library, reason = nvrtc.find()
    if library is None:
        pytest.skip(reason)
    variant = Variant(np.dtype(np.float32), np.dtype(np.uint8), np.dtype(np.int32), 4)
    source = read_source(kernel_dir(), "batchnorm.cu", variant)
    ptx = nvrtc.compile(source, "batchnorm.cu", "compute_90").code.decode()
    assert ".local" not in ptx, "no spills to local memory"
    for entry in ptx.split(".entry ")[1:]:
        name = entry[:entry.index("(")]
        assert ("ld.global.nc.v4.f32" in entry) == ("merge" not in name), name
        writes = name in ("batch_norm", "batch_norm_sums", "batch_norm_backward")
        assert ("st.global.v4.f32" in entry) == writes, name


def check_kernels(backend):
    """Several blocks, and several rows a thread, with and without what is optional."""
    for seed in (0, 1):
        case = make_case(seed, dtype=np.float32, rows=1300, c=8)
        residual = {"residual": case.arrays["dy"][::-1].copy()}
        for activation, more in itertools.product((None, "relu"), ({}, residual)):
            arrays = {k: v for k, v in case.arrays.items() if k != "residual"} | more
            one = case._replace(arrays=arrays, activation=activation)
            if activation:
                z, bound = unrectified(one)
                one.arrays["dy"] = np.where(np.abs(z) > bound, one.arrays["dy"], 0)
            judge(one, expect(one), backend)


BUGS = {  # in batchnorm.cu, unless a file comes first
    "a block drops its last row": ("rows - start < band ? rows : start + band",
                                   "rows - start < band ? rows : start + band - 1"),
    "the last block reads past the end": ("rows - start < band ? rows : start + band",
                                          "start + band"),
    "threads miss a barrier": ("        __syncthreads();\n", ""),
    "half of the threads are not merged": ("half >= width", "half > width"),
    "moments are merged as if they had one mean": (
        "moments.cuh", " + d * (count * share) * d", ""),
    "means are merged by the wrong share": ("share = other.count / (", "share = count / ("),
    "the variance is that about the old mean": ("m2.at[v] += d * (value - mean.at[v])",
                                                "m2.at[v] += d * d"),
    "the last band counts as a whole one": ("rows - start < band ? rows - start : band;", "band;"),
    "var is unbiased": ("var[channel] = all.m2.at[v] / rows;",
                        "var[channel] = all.m2.at[v] / (rows - 1);"),
    "the running variance is biased": ("(all.m2.at[v] / (rows - 1))", "(all.m2.at[v] / rows)"),
    "dbeta and dgamma lie on each other": (
        "in_partial(blockIdx.y, 1, cv, t.column), shared[threadIdx.x].dgamma",
        "in_partial(blockIdx.y, 0, cv, t.column), shared[threadIdx.x].dgamma"),
    "no ReLU": ("if (relu && z.at[v] <= 0) z.at[v] = 0;", ""),
    "the residual is left out": (" + (accum_t)other.at[v];", ";"),
    "dz ignores the ReLU": ("relu && z <= 0 ? 0 :", ""),
    "the mask forgets the residual": ("accum_t z = y_or_null ? (accum_t)y.at[v] :", "accum_t z ="),
    "dx forgets that mean depends on x": ("dz.at[v] - means.dbeta.at[v]", "dz.at[v]"),
    "dx forgets that var depends on x": ("- norm.x_hat(v, s.at[v]) * means.dgamma.at[v]", ""),
    "the residual's gradient is not written": ("if (dz_or_null) store(dz_or_null, i, dz);", ""),
    "epsilon is left out": (".at[v] + epsilon)", ".at[v])"),
}


@pytest.fixture
def several_bands(cupy_backend, monkeypatch):
    from gpucnn.backend import cuda_batch_norm
    monkeypatch.setattr(cuda_batch_norm, "_REDUCING", (512, 2))
    assert cuda_batch_norm.tiles(1300, 2, 512, 2)[0] == (1, 4)


def test_the_kernels_without_a_bug(cupy_backend, several_bands):
    check_kernels(cupy_backend)


@needs_simulator
@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_a_planted_bug_is_caught(cupy_backend, several_bands, bug):
    with caught(*("batchnorm.cu", *bug)[-3:]):
        check_kernels(cupy_backend)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("residual", [False, True])
def test_a_frozen_norm_computes_in_training_what_it_does_in_inference(backend, rng, activation,
                                                                       residual):
    torch = pytest.importorskip("torch")
    norm = BatchNorm(frozen=True, epsilon=EPSILON, activation=None if residual else activation)
    layer = Residual(norm, activation=activation) if residual else norm
    layer.build((3, 2, 5), dtype="float64")
    values = {name: rng.uniform(0.5, 2, 5) for name in ("gamma", "beta", "mean", "var")}
    for array, name in ((norm.gamma.data, "gamma"), (norm.beta.data, "beta"),
                        (norm.own_buffers["running_mean"], "mean"),
                        (norm.own_buffers["running_var"], "var")):
        array[...] = backend.asarray(values[name])
    x, dy = (rng.standard_normal((4, 3, 2, 5)) for _ in range(2))
    y = layer.forward(backend.asarray(x), training=True)
    np.testing.assert_array_equal(*map(backend.to_numpy, (y, layer.forward(backend.asarray(x)))))
    layer.forward(backend.asarray(x), training=True)
    dx = layer.backward(backend.asarray(dy))

    t = {name: torch.tensor(v, requires_grad=True) for name, v in {**values, "x": x}.items()}
    z = (t["x"] - t["mean"].detach()) / (t["var"].detach() + EPSILON).sqrt()
    z = t["gamma"] * z + t["beta"] + (t["x"] if residual else 0)
    (torch.relu(z) if activation else z).backward(torch.tensor(dy))
    for got, name in ((dx, "x"), (norm.gamma.grad, "gamma"), (norm.beta.grad, "beta")):
        np.testing.assert_allclose(backend.to_numpy(got), t[name].grad.numpy(), rtol=1e-12,
                                   atol=1e-12)
    for name in ("mean", "var"):
        np.testing.assert_array_equal(backend.to_numpy(norm.own_buffers[f"running_{name}"]),
                                      values[name])
