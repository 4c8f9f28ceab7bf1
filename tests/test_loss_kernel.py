"""The loss kernel against gpucnn.reference, on both backends; and bugs planted in it."""
from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest

from gpucnn import reference
from gpucnn.backend import cuda_kernel
from gpucnn.losses import SoftmaxCrossEntropy
from tests.cases import unit_roundoff
from tests.conftest import needs_simulator
from tests.gpusim.mutation import caught

LOGITS = ((1, 1), (3, 10), (300, 3), (7, 33), (2, 129), (3, 1000))


def check_loss(backend, shapes=LOGITS, dtype=np.float32):
    """Small integers tie; some rows hold a NaN; one label is out of range, where it may be."""
    for (n, classes), smoothing, scale in itertools.product(shapes, (0, 0.1), (None, 1024.0)):
        rng = np.random.default_rng([n, classes])
        z = rng.integers(-3, 4, (n, classes)).astype(dtype)
        labels = rng.integers(0, classes, n)
        labels[::2] = z[::2].argmax(1)
        there = None if scale is None else backend.asarray([scale, 7.0])
        loss, dlogits, hits = backend.softmax_cross_entropy(
            backend.asarray(z), backend.asarray(labels), smoothing, there)
        want, dwant = reference.softmax_cross_entropy(z, labels, label_smoothing=smoothing)
        assert loss.dtype == dtype
        assert dlogits.dtype == dtype
        off = unit_roundoff(np.dtype(dtype)) * (10 * classes + n + 20)
        assert float(loss) == pytest.approx(want, rel=off, abs=off)
        np.testing.assert_allclose(backend.to_numpy(dlogits), dwant * (scale or 1), rtol=0,
                                   atol=off / n * (scale or 1))
        assert int(hits) == reference.hits(z, labels)
        z[0, -1] = np.nan
        loss, dlogits, hits = backend.softmax_cross_entropy(
            backend.asarray(z), backend.asarray(labels), smoothing, there)
        assert np.isnan(float(loss))
        assert int(hits) == reference.hits(z, labels)
        np.testing.assert_array_equal(np.isnan(backend.to_numpy(dlogits)).all(1),
                                      np.arange(n) == 0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_loss_gradient_and_hits(backend, dtype):
    check_loss(backend, dtype=dtype)


def test_loss_of_many_classes(backend):
    check_loss(backend, ((2, 50000),))


@pytest.mark.parametrize("values", [(np.inf, 0, 0), (-np.inf, -np.inf, -np.inf)])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_infinite_logits_give_nan_and_the_first_maximum_is_right(backend, values):
    z = backend.asarray([values], np.float32)
    loss, dlogits, hits = backend.softmax_cross_entropy(z, backend.asarray([0]), 0)
    assert np.isnan(float(loss))
    assert np.isnan(backend.to_numpy(dlogits)).any()
    assert int(hits) == 1
    assert int(backend.softmax_cross_entropy(z, backend.asarray([1]), 0)[2]) == 0


def test_a_class_of_probability_0_is_no_matter(backend):
    loss, dlogits, _ = backend.softmax_cross_entropy(
        backend.asarray([[-np.inf, 3]], np.float32), backend.asarray([1]), 0)
    assert float(loss) == 0
    np.testing.assert_array_equal(backend.to_numpy(dlogits), [[0, 0]])


def test_a_label_out_of_range_is_nan_on_the_gpu(cupy_backend):
    """Where nobody checked it, as in a captured graph, it must be seen, and nothing else read."""
    z = cupy_backend.xp.zeros((2, 3), np.float32)
    for label in (-1, 3, 2**40):
        loss, _, hits = cupy_backend.softmax_cross_entropy(
            z, cupy_backend.asarray([label, 0]), 0.1)
        assert np.isnan(float(loss))
        assert int(hits) == 1


def test_a_captured_loss_does_not_wait_for_its_labels(cupy_backend):
    """The kernel makes the loss NaN where the check would have raised."""
    asarray, captured = cupy_backend.asarray, cupy_backend.empty((), np.float32)
    z, t, loss = asarray(np.eye(3, dtype=np.float32)), asarray([0, 1, 2]), SoftmaxCrossEntropy()
    expected = float(loss(z, t)[0])

    def work():
        captured[...] = loss(z, t)[0]

    replay = cupy_backend.capture(work)
    replay()
    assert float(captured) == expected
    t[1] = 3
    replay()
    assert np.isnan(float(captured))
    with pytest.raises(ValueError, match="label 3 at position 1 is out of range"):
        loss(z, t)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_logits_in_16_bits(backend, dtype):
    """Computed in float32, and rounded when it is stored."""
    rng, dtype = np.random.default_rng(0), np.dtype(dtype)
    z = (3 * rng.standard_normal((20, 10))).astype(dtype)
    labels = rng.integers(0, 10, 20)
    loss, dlogits, hits = backend.softmax_cross_entropy(
        backend.asarray(z), backend.asarray(labels), 0.1, backend.asarray([512.0, 0]))
    want, dwant = reference.softmax_cross_entropy(z, labels, label_smoothing=0.1)
    assert loss.dtype == np.float32
    assert float(loss) == pytest.approx(want, rel=1e-5)
    assert dlogits.dtype == dtype
    np.testing.assert_allclose(backend.to_numpy(dlogits).astype(float), 512 * dwant,
                               rtol=float(ml_dtypes.finfo(dtype).eps), atol=1e-4)
    assert int(hits) == reference.hits(z, labels)


def test_64_bit_offsets_give_the_same(cupy_backend, monkeypatch):
    monkeypatch.setattr(cuda_kernel, "MAX_INT_INDEX", -1)
    check_loss(cupy_backend)


@pytest.mark.parametrize("grid", [1, 2])
def test_a_block_takes_more_than_one_row(cupy_backend, monkeypatch, grid):
    monkeypatch.setattr(cuda_kernel, "MAX_GRID", grid)
    check_loss(cupy_backend)


def test_two_runs_give_the_same_bits(backend, rng):
    z = backend.asarray(rng.standard_normal((900, 10)), np.float32)
    t = backend.asarray(rng.integers(0, 10, 900))
    bits = [[backend.to_numpy(a).tobytes() for a in backend.softmax_cross_entropy(z, t, 0.1)]
            for _ in range(2)]
    assert bits[0] == bits[1]


BUGS = {
    "logits are not shifted": ("softmax_cross_entropy.cu",
                               "accum_t t = (accum_t)z[k] - largest", "accum_t t = z[k]"),
    "a row too far": ("softmax_cross_entropy.cu", "row < n; row", "row <= n; row"),
    "a class too far": ("softmax_cross_entropy.cu", "k < classes; k", "k <= classes; k"),
    "the last maximum wins": ("softmax_cross_entropy.cu", "!(picked > value)",
                              "!(picked >= value)"),
    "a NaN loses": ("softmax_cross_entropy.cu", "!(picked >= value)", "picked < value"),
    "the gradient of a sum": ("softmax_cross_entropy.cu", "d / n * scale", "d * scale"),
    "no loss scale": ("softmax_cross_entropy.cu", "d / n * scale", "d / n"),
    "smoothing spares the label": ("softmax_cross_entropy.cu", "d -= 1 - smoothing", "d -= 1"),
    "the sum of the first warp": ("reduce.cuh", "warp < (int)blockDim.x / 32", "warp < 1"),
    "a barrier is missing": ("reduce.cuh", "    __syncthreads();\n    value", "    value"),
    "half a warp": ("reduce.cuh", "int by = 16", "int by = 8"),
}
SMALL_LOGITS = ((3, 10), (300, 3), (3, 130))


@needs_simulator
@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_a_planted_bug_is_caught(cupy_backend, bug):
    with caught(*bug):
        check_loss(cupy_backend, SMALL_LOGITS)


def test_they_pass_where_no_bug_is_planted(cupy_backend):
    check_loss(cupy_backend, SMALL_LOGITS)
