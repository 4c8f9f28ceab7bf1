"""Grad-CAM against torch's float64 autograd, and what it leaves of the model: all."""
import numpy as np
import pytest

from gpucnn import explain, training
from gpucnn.layers import (
    BatchNorm,
    Concat,
    Conv2D,
    Dense,
    Dropout,
    Flatten,
    GlobalAvgPool2D,
    MaxPool2D,
    Residual,
    Sequential,
)
from gpucnn.losses import SoftmaxCrossEntropy
from gpucnn.models import article, resnet18
from gpucnn.optim import GradientDescent


def branches(classes):
    """Two convolutions beside one another, nested, with all that behaves otherwise in training."""
    body = Sequential([Conv2D(4, 3, padding="same"), BatchNorm()])
    return Sequential([
        Sequential([Conv2D(4, 3, padding="same", activation="relu"),
                    Residual(body, activation="tanh")]),
        Concat([Conv2D(3, 1), Sequential([Conv2D(2, 3, padding="same"), BatchNorm()])]),
        Dropout(0.5), MaxPool2D(2), Flatten(), Dense(classes)])


# name: the network, the shape of an image, and layers: None for the default, and which that is.
NETS = {
    "article": (article, (8, 8, 1), {None: "conv4", "pool1": "pool1"}),
    "resnet18": (lambda classes: resnet18(classes, width=4), (8, 8, 3),
                 {None: "residual8", "residual1/body/norm1": "residual1/body/norm1"}),
    "branches": (branches, (6, 5, 2),
                 {None: "concat1", "concat1/sequential1": "concat1/sequential1",
                  "sequential1/residual1": "sequential1/residual1"}),
}


def built(name, dtype="float64", seed=3):
    """The network after a step of training, so that running statistics are no 0 and 1."""
    make, shape, _ = NETS[name]
    model = make(5)
    model.build(shape, seed=seed, dtype=dtype)
    x = np.random.default_rng(seed).random((3, *shape))
    optimizer = GradientDescent(model, 0.01)
    training.train_step(model, SoftmaxCrossEntropy(), optimizer, x, np.arange(len(x)))
    return model, x


def judged(model, x, path, labels, monkeypatch):
    """The maps and the logits by torch, which drops nothing. The layer's output is met on the way,
    and keeps its gradient."""
    torch = pytest.importorskip("torch")
    from tests import torch_judge
    whole, seen = torch_judge.layer, []

    def watched(part, x, p, at=""):
        y = x if isinstance(part, Dropout) else whole(part, x, p, at)
        if at == path + "/":
            y.retain_grad()
            seen.append(y)
        return y

    monkeypatch.setattr(torch_judge, "layer", watched)
    to_numpy = model.backend.to_numpy
    p = {name: torch.tensor(to_numpy(q.data), requires_grad=True)
         for name, q in model.parameters().items()}
    p |= {name: torch.tensor(to_numpy(layer.own_buffers[key]))
          for name, (layer, key) in model.buffers().items()}
    logits = torch_judge.layer(model, torch.tensor(x), p)
    logits[range(len(x)), labels].sum().backward()
    (a,) = seen
    maps = torch.relu((a * a.grad.mean((1, 2), keepdim=True)).sum(-1)).detach().numpy()
    largest = maps.max(axis=(1, 2), keepdims=True)
    return maps / np.where(largest > 0, largest, 1), logits.detach().numpy()


@pytest.mark.parametrize("name", NETS)
def test_maps_are_those_of_torch(backend, name, monkeypatch):
    model, x = built(name)
    for asked, path in NETS[name][2].items():
        got = explain.grad_cam(model, x, [0, 4, 2], layer=asked)
        expected, _ = judged(model, x, path, [0, 4, 2], monkeypatch)
        assert got.dtype == np.float32
        assert got.min() >= 0
        np.testing.assert_allclose(got, expected, atol=1e-6)  # float32
        assert expected.max() == 1  # maps of zeros prove nothing


def test_the_class_is_by_default_the_most_probable(backend, monkeypatch):
    model, x = built("branches")
    x *= np.array([1, -9, 9]).reshape(3, 1, 1, 1)
    best = backend.to_numpy(model.forward(backend.asarray(x))).argmax(1)
    _, logits = judged(model, x, "concat1", best, monkeypatch)
    np.testing.assert_array_equal(logits.argmax(1), best)
    assert len(set(best)) > 1
    default = explain.grad_cam(model, x)
    np.testing.assert_array_equal(default, explain.grad_cam(model, backend.asarray(x), best))
    np.testing.assert_array_equal(explain.grad_cam(model, x, 2),
                                  explain.grad_cam(model, x, np.full(3, 2)))


def test_an_image_does_not_depend_on_those_beside_it(backend):
    model, x = built("branches")
    together = explain.grad_cam(model, x, 1)
    np.testing.assert_allclose(np.concatenate([explain.grad_cam(model, x[i:i + 1], 1)
                                               for i in range(3)]), together, atol=1e-6)


def test_the_model_stays_as_it_was(backend):
    def state():
        arrays = [model.flat_data, model.flat_grad,
                  *(layer.own_buffers[key] for layer, key in model.buffers().values())]
        layers = [(sorted(vars(layer)), layer.config(), layer._saved, layer._added,
                   layer.output_moments, getattr(layer, "frozen", None),
                   getattr(layer, "step", None)) for layer in model.walk()]
        return [backend.to_numpy(a).tobytes() for a in arrays], layers

    model, x = built("branches", "float32")
    before = state()
    explain.grad_cam(model, x)
    assert state() == before
    with pytest.raises(ValueError, match="label 5 at position 0 is out of range"):
        explain.grad_cam(model, x, 5)
    assert state() == before


def test_a_map_may_be_zero(backend):
    model = Sequential([Conv2D(1, 1, bias=False), GlobalAvgPool2D(), Dense(2)])
    model.build((3, 3, 1))
    model.parameters()["dense1/w"].data[...] = 0
    np.testing.assert_array_equal(explain.grad_cam(model, np.ones((2, 3, 3, 1), np.float32)), 0)


def test_what_does_not_fit_is_refused():
    model, x = built("resnet18", "float32")
    for arguments, message in (
            (((1, 2),), "class_index has 2 classes for 3 images"),
            ((None, "dense1"), "layer 'dense1' is none that gives images; they are conv1, norm1"),
            ((None, "residual1/body/norm2"), r"what BatchNorm 'residual1/body/norm2' gives is "
             "added to another output in the same pass; take the layer around both")):
        with pytest.raises(ValueError, match=message):
            explain.grad_cam(model, x, *arguments)
    flat = Sequential([Flatten(), Dense(2)])
    with pytest.raises(RuntimeError, match="grad_cam needs a built model"):
        explain.grad_cam(flat, x)
    flat.build((8, 8, 3))
    with pytest.raises(ValueError, match="no layer of Sequential gives images; it needs a conv"):
        explain.grad_cam(flat, x)
    model.parameters()["conv1/w"].data[...] = np.inf
    with pytest.raises(ValueError, match="the map of image 0 is not finite; the model may have"):
        explain.grad_cam(model, x, 0)
    with pytest.raises(ValueError, match=r"must give logits \(n, classes\), got \(3, 8, 8, 2\)"):
        convolution = Sequential([Conv2D(2, 1)])
        convolution.build((8, 8, 3))
        explain.grad_cam(convolution, x)
