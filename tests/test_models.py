"""The networks: their shapes, their parameters, and that they learn."""
from __future__ import annotations

import numpy as np
import pytest

from gpucnn import layers, losses, optim
from gpucnn.errors import DataError, TrainingError
from gpucnn.models import MODELS
from gpucnn.training import check_finite, evaluate, predict, train_step

# The parameters, counted by hand from the papers' tables.
PARAMETERS = {"article": ((28, 28, 1), 876_618), "lenet5": ((28, 28, 1), 61_706),
              "resnet18": ((32, 32, 3), 11_173_962)}


@pytest.mark.parametrize("name", MODELS)
def test_shapes_and_parameters(name):
    shape, count = PARAMETERS[name]
    model = MODELS[name](10)
    assert model.build(shape) == (10,)
    assert sum(p.size for p in model.parameters().values()) == count
    x = np.random.default_rng(0).random((2, *shape), np.float32)
    assert model.forward(x).shape == (2, 10)


@pytest.mark.parametrize("name", ["article", "lenet5"])
def test_networks_learn_in_float64(name, backend):
    model = MODELS[name](3)
    model.build((12, 12, 1), seed=1, dtype=np.float64)
    x = np.random.default_rng(0).random((3, 12, 12, 1))
    t = np.arange(3)
    loss, optimizer = losses.SoftmaxCrossEntropy(), optim.Adam(model, 0.01)
    before, _ = loss(model.forward(backend.asarray(x)), t)
    for _ in range(8):
        train_step(model, loss, optimizer, x, t)
    after, _ = loss(model.forward(backend.asarray(x)), t)
    assert after < 0.8 * before
    assert before.dtype == after.dtype == np.float64


def small():
    model = layers.Sequential([
        layers.Conv2D(4, 3, padding="same", bias=False), layers.BatchNorm(), layers.ReLU(),
        layers.MaxPool2D(2), layers.Flatten(), layers.Dropout(0.1), layers.Dense(3)])
    model.build((6, 6, 1), seed=2)
    return model


def stripes(n=24):
    """Images whose class is the pair of rows that is bright."""
    labels = np.arange(n) % 3
    x = np.random.default_rng(0).random((n, 6, 6, 1), np.float32)
    for image, label in zip(x, labels):
        image[2 * label:2 * label + 2] += 1
    return x, labels


@pytest.mark.parametrize("make_optimizer", [
    lambda m: optim.GradientDescent(m, 0.5), lambda m: optim.Momentum(m, 0.05),
    lambda m: optim.Momentum(m, 0.05, nesterov=True), lambda m: optim.RMSProp(m, 0.01),
    lambda m: optim.Adam(m, 0.02), lambda m: optim.AdamW(m, 0.02)],
    ids=["sgd", "momentum", "nesterov", "rmsprop", "adam", "adamw"])
def test_training_learns_and_repeats_to_the_bit(make_optimizer, backend):
    runs = []
    for _ in range(2):
        model = small()
        optimizer = make_optimizer(model)
        x, t = stripes()
        history = [train_step(model, losses.SoftmaxCrossEntropy(), optimizer, x, t)
                   for _ in range(30)]
        runs.append((history, backend.to_numpy(model.flat_data)))
    assert runs[0][0][-1][0] < 0.5 * runs[0][0][0][0]
    assert evaluate(model, [stripes()]).accuracy > 0.9
    assert runs[0][0] == runs[1][0]
    np.testing.assert_array_equal(runs[0][1], runs[1][1])


def test_clipping_bounds_the_joint_norm(backend):
    model = small()
    optimizer = optim.GradientDescent(model)
    model.flat_grad[...] = 3
    norm = 3 * model.flat_grad.size ** 0.5
    assert optimizer.clip_gradients(1.5) == pytest.approx(norm)
    assert float(model.flat_grad @ model.flat_grad) ** 0.5 == pytest.approx(1.5)
    assert optimizer.clip_gradients(2.0) == pytest.approx(1.5)
    assert float(model.flat_grad @ model.flat_grad) ** 0.5 == pytest.approx(1.5)


def test_weight_decay_spares_biases_and_norms():
    model = small()
    before = model.flat_data.copy()
    optim.AdamW(model, 0.1, weight_decay=0.5).step()  # the gradients are 0
    d = model.decayed_size
    np.testing.assert_allclose(model.flat_data[:d], before[:d] * 0.95, rtol=1e-6)
    np.testing.assert_array_equal(model.flat_data[d:], before[d:])


def test_a_loss_that_is_not_finite_changes_nothing():  # row 12
    model = small()
    before = model.flat_data.copy()
    x, t = stripes()
    x[0] = np.nan
    loss, _ = train_step(model, losses.SoftmaxCrossEntropy(), optim.Adam(model), x, t)
    np.testing.assert_array_equal(model.flat_data, before)
    with pytest.raises(TrainingError, match=r"loss is nan at epoch 3 step 118 \(lr 0.1\); last "
                                            "good model: runs/a/m.safetensors; lower the learning "
                                            "rate or use --clip-norm"):
        check_finite(loss, epoch=3, step=118, learning_rate=0.1, last_good="runs/a/m.safetensors")


def test_evaluating_nothing_is_an_error():  # row 14
    with pytest.raises(DataError, match="the data set has 0 samples"):
        evaluate(small(), [])
    with pytest.raises(DataError, match="the data set has 0 samples"):
        evaluate(small(), [(np.zeros((0, 6, 6, 1), np.float32), np.zeros(0, int))])


def test_prediction_gives_probabilities_and_refuses_nan(backend):  # row 11
    x, _ = stripes()
    p = predict(small(), x)
    assert isinstance(p, np.ndarray)
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-5)
    x[3, :2, :6] = np.nan
    with pytest.raises(ValueError, match=r"image 3 \(cat.png\) holds 12 NaN values"):
        predict(small(), x, ["a", "b", "c", "cat.png"] + ["d"] * 20)
