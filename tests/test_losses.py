"""Losses against their formulas, finite differences, and numbers where exp() overflows."""
from __future__ import annotations

from math import log
from types import SimpleNamespace

import numpy as np
import pytest

from gpucnn.losses import BinaryCrossEntropy, MeanSquaredError, SoftmaxCrossEntropy
from gpucnn.optim import LossScale


def soft_targets(labels, classes, smoothing):
    return np.eye(classes)[labels] * (1 - smoothing) + smoothing / classes


def cross_entropy(z, t, smoothing=0.0):
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    return -(soft_targets(t, z.shape[1], smoothing) * np.log(p)).sum(1).mean()


def shared_cross_entropy(z, shares):
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    return -(shares * np.log(p)).sum(1).mean()


def binary_cross_entropy(z, t):
    p = 1 / (1 + np.exp(-z))
    return -(t * np.log(p) + (1 - t) * np.log(1 - p)).mean()


# name: (the loss, its formula, targets for outputs of a shape)
LOSSES = {
    "SoftmaxCrossEntropy": (SoftmaxCrossEntropy(), cross_entropy,
                            lambda rng, shape: rng.integers(0, shape[1], shape[0])),
    "label smoothing": (SoftmaxCrossEntropy(0.2), lambda z, t: cross_entropy(z, t, 0.2),
                        lambda rng, shape: rng.integers(0, shape[1], shape[0])),
    "shares of labels": (SoftmaxCrossEntropy(), shared_cross_entropy,
                         lambda rng, shape: rng.dirichlet(np.ones(shape[1]), shape[0])),
    "smoothed shares": (SoftmaxCrossEntropy(0.2),
                        lambda z, t: shared_cross_entropy(z, 0.8 * t + 0.2 / t.shape[1]),
                        lambda rng, shape: rng.dirichlet(np.ones(shape[1]), shape[0])),
    "MeanSquaredError": (MeanSquaredError(), lambda y, t: ((y - t) ** 2).mean(),
                         lambda rng, shape: rng.standard_normal(shape)),
    "BinaryCrossEntropy": (BinaryCrossEntropy(), binary_cross_entropy,
                           lambda rng, shape: rng.random(shape)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient(name, backend, rng):
    loss, formula, targets = LOSSES[name]
    y, v = rng.standard_normal((2, 5, 4))
    t = targets(rng, y.shape)
    there = backend.asarray(t)
    value, gradient = loss(backend.asarray(y), there)
    assert float(value) == pytest.approx(formula(y, t), rel=1e-12)
    assert gradient.shape == y.shape
    step = 1e-6
    up, down = (float(loss(backend.asarray(y + s * v), there)[0]) for s in (step, -step))
    exact = float((backend.to_numpy(gradient) * v).sum())
    assert (up - down) / (2 * step) == pytest.approx(exact, rel=1e-7, abs=1e-8)


@pytest.mark.parametrize("name", LOSSES)
def test_float32_stays_float32_and_inputs_are_not_written(name, backend, rng):
    loss, _, targets = LOSSES[name]
    y = backend.asarray(rng.standard_normal((3, 4)), np.float32)
    t = backend.asarray(targets(rng, y.shape))
    copies = y.copy(), t.copy()
    value, gradient = loss(y, t)
    assert value.dtype == gradient.dtype == np.float32
    assert isinstance(gradient, backend.xp.ndarray)
    assert (y == copies[0]).all()
    assert (t == copies[1]).all()


def test_known_values(backend):
    zeros = backend.xp.zeros((1, 4))
    assert float(SoftmaxCrossEntropy()(zeros, [2])[0]) == pytest.approx(log(4))
    assert float(BinaryCrossEntropy()(zeros, zeros + 0.3)[0]) == pytest.approx(log(2))
    assert float(MeanSquaredError()(zeros, zeros + 3)[0]) == 9


@pytest.mark.parametrize("smoothing", [0, 0.3])
def test_shares_that_are_labels_give_what_labels_give(smoothing, backend, rng):
    z = backend.asarray(rng.standard_normal((6, 4)))
    labels = rng.integers(0, 4, 6)
    one_hot = backend.asarray(np.eye(4)[labels])
    loss = SoftmaxCrossEntropy(smoothing)
    for got, want in zip(loss.with_hits(z, one_hot), loss.with_hits(z, labels)):
        np.testing.assert_allclose(backend.to_numpy(got), backend.to_numpy(want), rtol=1e-12,
                                   atol=1e-15)


def test_the_largest_share_is_the_label(backend):
    z = backend.asarray([[0, 2, 1], [3, 1, 2], [5, 5, 1], [np.nan, 0, 0]], np.float32)
    shares = backend.asarray([[0.2, 0.5, 0.3], [0.4, 0, 0.6], [0.5, 0.5, 0], [1, 0, 0]], np.float32)
    assert int(SoftmaxCrossEntropy().with_hits(z, shares)[2]) == 2
    with pytest.raises(ValueError, match=r"^outputs have shape \(4, 3\), targets \(2, 3\)"):
        SoftmaxCrossEntropy()(z, shares[:2])
    with pytest.raises(TypeError, match=r"labels must be integers of shape \(N,\), got int64"):
        SoftmaxCrossEntropy()(z, np.eye(3, dtype=np.int64)[[0, 1, 2, 0]])


def test_large_logits_do_not_overflow(backend):
    z = backend.asarray([[1e4, -1e4]], np.float32)
    value, gradient = SoftmaxCrossEntropy()(z, [1])
    assert float(value) == 2e4
    np.testing.assert_array_equal(backend.to_numpy(gradient), [[1, -1]])
    value, gradient = BinaryCrossEntropy()(z, backend.asarray([[0, 1]], np.float32))
    assert float(value) == 1e4
    np.testing.assert_array_equal(backend.to_numpy(gradient), [[0.5, -0.5]])


def test_float16_is_computed_in_float32(backend):
    y = backend.xp.full((2, 2), 300, np.float16)
    value, gradient = MeanSquaredError()(y, backend.xp.zeros((2, 2), np.float16))
    assert (float(value), gradient.dtype) == (90000, np.float16)
    np.testing.assert_array_equal(backend.to_numpy(gradient), np.full((2, 2), 150))
    value, gradient = BinaryCrossEntropy()(y, backend.xp.ones((2, 2), np.float16))
    assert (float(value), value.dtype, gradient.dtype) == (0, np.float32, np.float16)


@pytest.mark.parametrize("loss", [MeanSquaredError(), BinaryCrossEntropy()])
@pytest.mark.parametrize(("targets", "message"), [
    (np.ma.masked_array([[0.5, 1]], [[False, True]]), "MaskedArray; fill the mask first"),
    (np.array([[0.5, 1j]]), "dtype complex128 of targets is not supported; use float16"),
    (np.array([[0, 1]]), "int64; cast it with")], ids=["masked", "complex", "int"])
def test_targets_are_checked_as_outputs_are(loss, targets, message):
    with pytest.raises(TypeError, match=f"^{type(loss).__name__}: .*{message}"):
        loss(np.zeros((1, 2)), targets)


@pytest.mark.parametrize("wrong", [-0.25, 1.5])
def test_probabilities_lie_between_0_and_1(wrong, backend):
    with pytest.raises(ValueError, match=r"targets must lie in \[0, 1\], got " + f"{wrong}$"):
        BinaryCrossEntropy()(backend.xp.zeros((1, 2)), backend.asarray([[0.5, wrong]]))


@pytest.mark.parametrize("loss", [MeanSquaredError(), BinaryCrossEntropy()])
def test_integer_outputs_are_refused(loss):
    """They would be subtracted as integers, and the targets cut to integers."""
    with pytest.raises(TypeError, match=f"{type(loss).__name__}: outputs is int64; cast it with"):
        loss(np.array([[1, 2]]), np.array([[1.5, 2.5]]))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(("kind", "targets"), [
    (SoftmaxCrossEntropy, lambda y: np.arange(len(y)) % 3),
    (SoftmaxCrossEntropy, lambda y: np.full_like(y, 0.5)),
    (MeanSquaredError, lambda y: np.zeros_like(y)),
    (BinaryCrossEntropy, lambda y: np.full_like(y, 0.5))])
def test_a_loss_scale_multiplies_the_gradient_alone(kind, targets, dtype, backend, rng):
    y = rng.standard_normal((4, 3)).astype(dtype)
    y, t = backend.asarray(y), backend.asarray(targets(y))
    scale = LossScale(SimpleNamespace(backend=backend), 8)
    (loss, dy), (scaled_loss, scaled_dy) = kind()(y, t), kind(loss_scale=scale)(y, t)
    assert float(scaled_loss) == float(loss)
    assert scaled_dy.dtype == dy.dtype == dtype
    np.testing.assert_array_equal(backend.to_numpy(scaled_dy), 8 * backend.to_numpy(dy))
