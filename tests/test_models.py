"""The networks: their shapes, their parameters, and that they learn."""
from __future__ import annotations

import numpy as np
import pytest

from gpucnn import layers, losses, optim
from gpucnn.backend import use_backend
from gpucnn.errors import DataError, TrainingError
from gpucnn.models import MODELS, airbench94, load_model, resnet50, save_model, stem_weights
from gpucnn.training import check_finite, evaluate, predict, train_step
from tests.conftest import needs_cupy

# The parameters, counted by hand from the papers' tables.
PARAMETERS = {"article": ((28, 28, 1), 876_618), "lenet5": ((28, 28, 1), 61_706),
              "airbench94": ((32, 32, 3), 1_971_352), "resnet18": ((32, 32, 3), 11_173_962),
              # torchvision's with 10 classes, and 4 * 4 * 16 weights a filter for 7 * 7 * 3
              "resnet50": ((64, 64, 3), 25_557_032 - 990 * 2049 + 64 * (256 - 147))}


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
                                            "good checkpoint: runs/a/m.safetensors; lower the "
                                            "learning rate or use --clip-norm"):
        check_finite(loss, epoch=3, step=118, learning_rate=0.1,
                     last_good="runs/a/m.safetensors")


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


# ---- resnet50 ------------------------------------------------------------------------------------

def test_the_parameters_of_resnet50_beside_torchvisions():
    model = resnet50()
    with use_backend("numpy"):
        model.declare_at((224, 224, 3), "")
    assert sum(p.size for p in model.parameters().values()) == 25_564_008
    assert model.parameters()["conv1/w"].shape == (4, 4, 16, 64)
    assert model.output_shape == (1000,)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_stem_is_torchs_7x7_convolution(channels, backend, rng):
    torch = pytest.importorskip("torch")
    x, w = rng.standard_normal((2, 14, 18, channels)), rng.standard_normal((7, 7, channels, 5))
    stem = layers.Sequential([layers.SpaceToDepth(2, 16),
                              layers.Conv2D(5, 4, padding=((2, 1), (2, 1)), bias=False)])
    stem.build((14, 18, channels), dtype=np.float64)
    stem.layers[1].w.data[...] = backend.asarray(stem_weights(w))
    want = torch.nn.functional.conv2d(*(torch.tensor(a) for a in (
        x.transpose(0, 3, 1, 2), w.transpose(3, 2, 0, 1))), stride=2, padding=3)
    got = backend.to_numpy(stem.forward(backend.asarray(x))).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-12, atol=1e-12)


def test_stem_weights_refuses_torchs_own_order():
    with pytest.raises(ValueError, match=r"got \(64, 3, 7, 7\); for torch's \(filters, c, 7, 7\) "
                                         r"use w.permute\(2, 3, 1, 0\)$"):
        stem_weights(np.zeros((64, 3, 7, 7)))
    with pytest.raises(ValueError, match="with c <= 4"):
        stem_weights(np.zeros((7, 7, 5, 64)))


def torch_resnet50(torch, width):
    """torchvision's Bottleneck net (v1.5), its parameters in the same order as ours."""
    nn = torch.nn

    class Bottleneck(nn.Module):
        def __init__(self, channels, filters, stride, project):
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(channels, filters, 1, bias=False), nn.BatchNorm2d(filters), nn.ReLU(),
                nn.Conv2d(filters, filters, 3, stride, 1, bias=False), nn.BatchNorm2d(filters),
                nn.ReLU(), nn.Conv2d(filters, 4 * filters, 1, bias=False),
                nn.BatchNorm2d(4 * filters))
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, 4 * filters, 1, stride, bias=False),
                nn.BatchNorm2d(4 * filters)) if project else nn.Sequential()

        def forward(self, x):
            return torch.relu(self.body(x) + self.shortcut(x))

    blocks, channels = [], width
    for times, count, stride in ((1, 3, 1), (2, 4, 2), (4, 6, 2), (8, 3, 2)):
        filters = times * width
        for block in range(count):
            blocks.append(Bottleneck(channels, filters, stride if block == 0 else 1, block == 0))
            channels = 4 * filters
    return nn.Sequential(nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                         nn.MaxPool2d(3, 2, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(channels, 10)).double()


def test_resnet50_is_torchs_with_the_same_weights(rng):
    """In training, and then by the running statistics; and the gradient of its first block."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    theirs, model = torch_resnet50(torch, 16), resnet50(10, width=16)
    model.build((64, 64, 3), dtype=np.float64)
    own, other = (list(parameters) for parameters in (
        model.parameters().values(), theirs.parameters()))
    assert len(own) == len(other)
    for number, (p, q) in enumerate(zip(own, other)):
        a = q.detach().numpy()
        a = a.transpose(2, 3, 1, 0) if a.ndim == 4 else a.T
        p.data[...] = a if number else stem_weights(a)
    x, dy = rng.standard_normal((2, 64, 64, 3)), rng.standard_normal((2, 10))
    images = torch.tensor(x.transpose(0, 3, 1, 2))
    want, got = theirs(images), model.forward(x, training=True)
    np.testing.assert_allclose(got, want.detach().numpy(), rtol=1e-8, atol=1e-8)
    want.backward(torch.tensor(dy))
    model.backward_parameters(dy)
    for number in (1, 2, 3, 5, len(own) - 2):  # norms, and convolutions deep inside
        grad = other[number].grad.numpy()
        grad = grad.transpose(2, 3, 1, 0) if grad.ndim == 4 else grad.T
        np.testing.assert_allclose(own[number].grad, grad, rtol=1e-6, atol=1e-8)
    # Of the stem's, those that a 7x7 filter has.
    rearranged = stem_weights(np.ones((7, 7, 3, 16))) == 1
    np.testing.assert_allclose(own[0].grad[rearranged], stem_weights(
        other[0].grad.numpy().transpose(2, 3, 1, 0))[rearranged], rtol=1e-6, atol=1e-8)
    np.testing.assert_array_equal(own[0].grad[:, :, 12:], 0)
    theirs.eval()
    np.testing.assert_allclose(model.forward(x), theirs(images).detach().numpy(), rtol=1e-8,
                               atol=1e-8)


# ---- airbench94 ----------------------------------------------------------------------------------

def test_airbench94_is_torchs_with_the_same_weights(rng):
    """The source's modules, in torch."""
    torch = pytest.importorskip("torch")
    nn = torch.nn
    model = airbench94(10)
    model.build((32, 32, 3), dtype=np.float64)
    x = rng.random((4, 32, 32, 3))
    model.layers[0].fit(x)

    def conv(channels, filters):
        return nn.Conv2d(channels, filters, 3, padding="same", bias=False)

    def norm(filters):
        return nn.BatchNorm2d(filters, eps=1e-12, momentum=1 - 0.6)

    def group(channels, filters):
        return [conv(channels, filters), nn.MaxPool2d(2), norm(filters), nn.GELU(),
                conv(filters, filters), norm(filters), nn.GELU()]

    theirs = nn.Sequential(nn.Conv2d(3, 24, 2), nn.GELU(), *group(24, 64), *group(64, 256),
                           *group(256, 256), nn.MaxPool2d(3), nn.Flatten(),
                           nn.Linear(256, 10, bias=False)).double()
    weights = {name: p.data for name, p in model.parameters().items()}
    weights |= {"whiten1/w": model.layers[0].own_buffers["w"]}
    for a in weights.values():
        a[...] += 0.1 * rng.standard_normal(a.shape)
    own = iter([weights["whiten1/w"], *weights.values()][:-1])
    with torch.no_grad():
        for name, q in theirs.named_parameters():
            if name.endswith("weight") and q.ndim == 1:
                continue  # gamma: 1
            a = next(own)
            q[...] = torch.tensor(a.transpose(3, 2, 0, 1) if a.ndim == 4 else a.T)
    images = torch.tensor(x.transpose(0, 3, 1, 2))
    for training in (True, False):
        theirs.train(training)
        np.testing.assert_allclose(model.forward(x, training), theirs(images).detach() / 9,
                                   rtol=1e-9, atol=1e-9)


def test_airbench94_begins_as_the_identity_and_is_fitted(rng):
    model = airbench94(10)
    model.build((32, 32, 3))
    for conv in (layer for layer in model.layers if isinstance(layer, layers.Conv2D)):
        depth = conv.w.shape[2]
        passed = conv.w.data[1, 1, :, :depth]
        np.testing.assert_array_equal(passed, np.eye(depth))
        assert conv.w.data[..., :depth].sum() == depth
    assert not any(name.endswith("gamma") for name in model.parameters())


# ---- both ----------------------------------------------------------------------------------------

@pytest.fixture
def quick_simulator(monkeypatch):
    """Convolutions by NumPy's products, and no checks, which the tests of the kernels make."""
    monkeypatch.setenv("GPUCNN_CONV", "im2col")
    monkeypatch.setenv("GPUSIM_CHECKS", "off")


def narrow_resnet50(classes):
    return resnet50(classes, width=16)


@needs_cupy
@pytest.mark.parametrize(("make", "shape"), [(airbench94, (2, 26, 25, 3)),
                                             (narrow_resnet50, (4, 32, 32, 3))])
def test_a_step_is_the_same_on_both_backends(make, shape, quick_simulator, rng):
    """In float64: norms over few images multiply what rounding does, from layer to layer."""
    x, t, results = rng.random(shape), np.arange(shape[0]) % 3, []
    for name in ("numpy", "cupy"):
        with use_backend(name) as backend:
            model = make(10)
            model.build(shape[1:], seed=1, dtype=np.float64)
            y = model.forward(backend.asarray(x), training=True)
            loss, dy = losses.SoftmaxCrossEntropy()(y, backend.asarray(t))
            model.backward_parameters(dy)
            results.append([backend.to_numpy(a) + 0 for a in (y, loss, model.flat_grad)])
    for here, there in zip(*results):
        assert np.abs(here - there).max() <= 1e-8 * np.abs(here).max()


def test_airbench94_is_saved_with_its_filters(backend, quick_simulator, rng, tmp_path):
    model = airbench94(4)
    model.build((26, 26, 1), seed=3)
    x = rng.random((3, 26, 26, 1), np.float32)
    model.layers[0].fit(x)
    there = backend.asarray(x)
    model.forward(there, training=True)
    save_model(model, tmp_path / "m.safetensors")
    again, _ = load_model(tmp_path / "m.safetensors")
    np.testing.assert_array_equal(backend.to_numpy(again.forward(there)),
                                  backend.to_numpy(model.forward(there)))
