"""Layers, losses and optimisers against torch's float64 autograd and torch.optim, same numbers.

TABLE has a row for each layer: how it is made, the shape of one sample, and the same function in
torch, given x and the layer's parameters by path. A sum of k terms is off by at most k u times the
sum of their absolute values (see tests/cases.py), so results are compared to within the dtype's u
times the number of values that take part times the largest of them.
"""
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from gpucnn import losses, optim
from gpucnn.layers import (
    GELU,
    AvgPool2D,
    BatchNorm,
    Concat,
    Conv2D,
    Dense,
    Dropout,
    Flatten,
    GlobalAvgPool2D,
    Layer,
    LeakyReLU,
    MaxPool2D,
    ReLU,
    Residual,
    Scale,
    Sequential,
    Sigmoid,
    Softmax,
    SpaceToDepth,
    Tanh,
    Whiten2D,
)
from tests.cases import unit_roundoff

torch = pytest.importorskip("torch")
torch.set_num_threads(1)  # for tensors this small, waking the threads takes longer than the work
F = torch.nn.functional
ACTIVATIONS = {None: lambda z: z, "relu": F.relu, "leaky_relu": F.leaky_relu,
               "sigmoid": torch.sigmoid, "tanh": torch.tanh}


def nchw(x):
    return x.permute(0, 3, 1, 2)


def nhwc(x):
    return x.permute(0, 2, 3, 1)


def conv(activation=None, pad=(0, 0, 0, 0), at="", **options):
    """torch's Conv2D of ours at a path; pad: left, right, top, bottom."""
    def forward(x, p):
        z = F.conv2d(F.pad(nchw(x), pad), p[at + "w"].permute(3, 2, 0, 1), p.get(at + "b"),
                     **options)
        return ACTIVATIONS[activation](nhwc(z))
    return forward


def dense(activation=None, at=""):
    def forward(x, p):
        z = x @ p[at + "w"]
        return ACTIVATIONS[activation](z + p[at + "b"] if at + "b" in p else z)
    return forward


def batch_norm(at="", epsilon=1e-5):
    def forward(x, p):
        return F.batch_norm(x.movedim(-1, 1), None, None, p.get(at + "gamma"), p[at + "beta"],
                            training=True, eps=epsilon).movedim(1, -1)
    return forward


def max_pool(*args, **options):
    return lambda x, p: nhwc(F.max_pool2d(nchw(x), *args, **options))


def avg_pool(*args, pad=(0, 0, 0, 0), **options):
    def forward(x, p):
        total, count = (nhwc(F.avg_pool2d(F.pad(nchw(t), pad), *args, divisor_override=1,
                                          **options)) for t in (x, torch.ones_like(x)))
        return total / count
    return forward


def squares(size, channels):
    """torch's own order of channels is that of the places in the square last, ours first."""
    def forward(x, p):
        y = nhwc(F.pixel_unshuffle(nchw(x), size)).unflatten(-1, (x.shape[-1], size**2))
        return F.pad(y.transpose(-1, -2).flatten(-2), (0, channels - size**2 * x.shape[-1]))
    return forward


def chain(*functions):
    def forward(x, p):
        for function in functions:
            x = function(x, p)
        return x
    return forward


class Row(NamedTuple):
    make: Callable[[], Layer]
    sample: tuple[int, ...]
    torch_forward: Callable[[Any, Any], Any]
    batches: tuple[int, ...] = (3, 1, 0)


def flat(x, p):
    return x.flatten(1)


IMAGE = 5, 6, 4
TABLE = {
    "Conv2D": Row(lambda: Conv2D(3), IMAGE, conv()),
    "Conv2D same": Row(lambda: Conv2D(4, 3, padding="same"), IMAGE, conv(pad=(1, 1, 1, 1))),
    "Conv2D same even stride": Row(lambda: Conv2D(2, (2, 4), stride=(2, 1), padding="same"), IMAGE,
                                   conv(pad=(1, 2, 0, 1), stride=(2, 1))),
    "Conv2D groups": Row(lambda: Conv2D(6, (2, 3), groups=2, dilation=(2, 1), bias=False), IMAGE,
                         conv(groups=2, dilation=(2, 1))),
    "Conv2D depthwise": Row(lambda: Conv2D(4, 3, groups=4, padding=((0, 1), (2, 0))), IMAGE,
                            conv(pad=(2, 0, 0, 1), groups=4)),
    "Conv2D 1x1": Row(lambda: Conv2D(3, 1, activation="relu"), IMAGE, conv("relu")),
    **{f"Conv2D {g}": Row(lambda g=g: Conv2D(3, 2, stride=2, activation=g), IMAGE,
                          conv(g, stride=2)) for g in ACTIVATIONS if g},
    "MaxPool2D": Row(lambda: MaxPool2D(), IMAGE, max_pool(2)),
    "MaxPool2D overlap": Row(lambda: MaxPool2D(3, stride=(2, 1), padding=1), IMAGE,
                             max_pool(3, (2, 1), 1)),
    "MaxPool2D dilation": Row(lambda: MaxPool2D(2, stride=1, dilation=(3, 2)), IMAGE,
                              max_pool(2, 1, 0, (3, 2))),
    "MaxPool2D relu": Row(lambda: MaxPool2D((2, 3), stride=2, activation="relu"), IMAGE,
                          chain(lambda x, p: F.relu(x), max_pool((2, 3), 2))),
    "AvgPool2D": Row(lambda: AvgPool2D((2, 3)), IMAGE, avg_pool((2, 3))),
    "AvgPool2D padding": Row(lambda: AvgPool2D(3, stride=2, padding=((1, 0), (0, 1))), IMAGE,
                             avg_pool(3, 2, pad=(0, 1, 1, 0))),
    "GlobalAvgPool2D": Row(GlobalAvgPool2D, IMAGE, lambda x, p: x.mean((1, 2))),
    "Flatten": Row(Flatten, IMAGE, flat),
    "Dense": Row(lambda: Dense(5), (7,), dense()),
    "Dense no bias": Row(lambda: Dense(5, bias=False), (7,), dense()),
    **{f"Dense {g}": Row(lambda g=g: Dense(3, activation=g), (4,), dense(g))
       for g in ACTIVATIONS if g},
    "BatchNorm": Row(BatchNorm, IMAGE, batch_norm(), (3, 1)),
    "BatchNorm of rows": Row(lambda: BatchNorm(epsilon=0.1), (7,), batch_norm(epsilon=0.1), (5, 2)),
    "BatchNorm without scale": Row(lambda: BatchNorm(scale=False), IMAGE, batch_norm(), (3, 1)),
    "BatchNorm relu": Row(lambda: BatchNorm(activation="relu"), IMAGE,
                          chain(batch_norm(), lambda x, p: F.relu(x)), (3, 1)),
    "ReLU": Row(ReLU, IMAGE, lambda x, p: F.relu(x)),
    "LeakyReLU": Row(LeakyReLU, IMAGE, lambda x, p: F.leaky_relu(x)),
    "LeakyReLU 0.2": Row(lambda: LeakyReLU(0.2), (5,), lambda x, p: F.leaky_relu(x, 0.2)),
    "Sigmoid": Row(Sigmoid, IMAGE, lambda x, p: torch.sigmoid(x)),
    "Tanh": Row(Tanh, IMAGE, lambda x, p: torch.tanh(x)),
    "GELU": Row(GELU, IMAGE, lambda x, p: F.gelu(x)),
    "Scale": Row(lambda: Scale(0.3), IMAGE, lambda x, p: x * 0.3),
    "SpaceToDepth": Row(lambda: SpaceToDepth(2, 9), (4, 6, 2), squares(2, 9),
                        (3, 1)),
    "SpaceToDepth 3": Row(lambda: SpaceToDepth(3), (3, 6, 1), squares(3, 9), (3, 1)),
    "Whiten2D": Row(lambda: Whiten2D(2), IMAGE, conv()),
    "Softmax": Row(Softmax, (5,), lambda x, p: x.softmax(-1)),
    "Softmax of images": Row(Softmax, IMAGE, lambda x, p: x.softmax(-1)),
    "Dropout 0": Row(lambda: Dropout(0.0), IMAGE, lambda x, p: x),
    "Sequential": Row(
        lambda: Sequential([Conv2D(4, 3, padding="same", bias=False), BatchNorm(), ReLU(),
                            MaxPool2D(2), Flatten(), Dense(3, activation="tanh")]), IMAGE,
        chain(conv(pad=(1, 1, 1, 1), at="conv1/"), batch_norm("norm1/"), lambda x, p: F.relu(x),
              max_pool(2), flat, dense("tanh", "dense1/")), (3, 1)),
    "Residual": Row(lambda: Residual(Conv2D(4, 3, padding="same", activation="tanh")), IMAGE,
                    lambda x, p: x + conv("tanh", (1, 1, 1, 1), "body/")(x, p)),
    "Residual shortcut": Row(
        lambda: Residual(Sequential([Conv2D(3, 3, stride=2, padding=1), Tanh()]),
                         Conv2D(3, 1, stride=2)), IMAGE,
        lambda x, p: (torch.tanh(conv(pad=(1, 1, 1, 1), at="body/conv1/", stride=2)(x, p))
                      + conv(at="shortcut/", stride=2)(x, p))),
    "Residual fused": Row(
        lambda: Residual(Sequential([Conv2D(4, 1), BatchNorm()]), activation="relu"), IMAGE,
        lambda x, p: F.relu(chain(conv(at="body/conv1/"), batch_norm("body/norm1/"))(x, p) + x),
        (3, 1)),
    "Residual of a convolution": Row(
        lambda: Residual(Sequential([Conv2D(3, 1, activation="tanh"), Conv2D(4, 3, padding=1)]),
                         activation="leaky_relu"), IMAGE,
        lambda x, p: F.leaky_relu(chain(conv("tanh", at="body/conv1/"), conv(
            pad=(1, 1, 1, 1), at="body/conv2/"))(x, p) + x)),
    "Concat": Row(
        lambda: Concat([Conv2D(3, 1), MaxPool2D(3, stride=1, padding=1),
                        Sequential([Conv2D(2, 3, padding="same", activation="relu", name="in"),
                                    Conv2D(1, 1, name="out")])]), IMAGE,
        lambda x, p: torch.cat([
            conv(at="conv1/")(x, p), max_pool(3, 1, 1)(x, p),
            chain(conv("relu", (1, 1, 1, 1), "sequential1/in/"), conv(at="sequential1/out/"))(x, p),
        ], -1)),
}


def leaf(a):
    return torch.tensor(np.ascontiguousarray(a, np.float64)).requires_grad_()


def assert_close(got, want, dtype, values, what):
    """values: all arrays that take part, so that their sizes and the largest bound the rounding."""
    got, want = np.asarray(got), np.asarray(want)
    terms = sum(np.size(v) for v in values)
    largest = max(float(np.max(np.abs(v), initial=1)) for v in [want, *values])
    np.testing.assert_allclose(got, want, rtol=0, atol=terms * unit_roundoff(dtype) * largest,
                               err_msg=what)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", TABLE)
def test_layer_equals_torch(name, dtype, backend, rng):
    row, dtype = TABLE[name], np.dtype(dtype)
    layer = row.make()
    sample_shape = layer.build(row.sample, seed=1, dtype=dtype)
    for batch in row.batches:
        # Eighths: exact zeros and ties are among them, where kinks are.
        x = (rng.integers(-12, 13, (batch, *row.sample)) / 8).astype(dtype)
        dy = rng.standard_normal((batch, *sample_shape)).astype(dtype)
        layer.flat_data[...] = backend.asarray(rng.standard_normal(layer.flat_data.shape), dtype)
        y = layer.forward(backend.asarray(x), training=True)
        dx = layer.backward(backend.asarray(dy))

        x64 = leaf(x)
        p64 = {k: leaf(backend.to_numpy(p.data)) for k, p in layer.parameters().items()}
        p64 |= {k: leaf(backend.to_numpy(part.own_buffers[name]))
                for k, (part, name) in layer.buffers().items()}
        y64 = row.torch_forward(x64, p64)
        y64.backward(torch.tensor(dy.astype(np.float64)))

        values = [x, dy, *(p.detach().numpy() for p in p64.values())]
        for what, got, want in [
                ("y", y, y64.detach()), ("dx", dx, x64.grad),
                *((k, p.grad, p64[k].grad) for k, p in layer.parameters().items())]:
            got = backend.to_numpy(got)
            assert got.dtype == dtype, what
            assert_close(got, want.numpy(), dtype, values, f"{name}, batch of {batch}: {what}")


def test_the_table_has_every_layer():
    from gpucnn import layers
    final = {v.__name__ for v in vars(layers).values() if isinstance(v, type)
             and issubclass(v, Layer) and v is not Layer}
    assert final == {type(row.make()).__name__ for row in TABLE.values()}


def test_batch_norm_follows_and_uses_its_running_statistics(backend, rng):
    layer = BatchNorm(momentum=0.3)
    layer.build(IMAGE, dtype=np.float64)
    layer.flat_data[...] = backend.asarray(rng.standard_normal(layer.flat_data.shape))
    p = {k: leaf(backend.to_numpy(v.data)) for k, v in layer.parameters().items()}
    mean, var = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    for _ in range(3):
        x = 3 + 2 * rng.standard_normal((2, *IMAGE))
        layer.forward(backend.asarray(x), training=True)
        F.batch_norm(nchw(torch.tensor(x)), mean, var, training=True, momentum=0.3)
    for buffer, want in (("running_mean", mean), ("running_var", var)):
        got = backend.to_numpy(layer.own_buffers[buffer])
        assert_close(got, want.numpy(), got.dtype, [x], buffer)
    got = backend.to_numpy(layer.forward(backend.asarray(x)))
    want = nhwc(F.batch_norm(nchw(torch.tensor(x)), mean, var, p["gamma"], p["beta"]))
    assert_close(got, want.detach().numpy(), got.dtype, [x], "inference")


# loss: (ours, torch's, targets for outputs of a shape)
LOSSES = {
    "SoftmaxCrossEntropy": (losses.SoftmaxCrossEntropy(), F.cross_entropy,
                            lambda rng, shape: rng.integers(0, shape[1], shape[0])),
    "label smoothing": (losses.SoftmaxCrossEntropy(label_smoothing=0.1),
                        lambda z, t: F.cross_entropy(z, t, label_smoothing=0.1),
                        lambda rng, shape: rng.integers(0, shape[1], shape[0])),
    "MeanSquaredError": (losses.MeanSquaredError(), F.mse_loss,
                         lambda rng, shape: rng.standard_normal(shape)),
    "BinaryCrossEntropy": (losses.BinaryCrossEntropy(), F.binary_cross_entropy_with_logits,
                           lambda rng, shape: rng.integers(0, 5, shape) / 4),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_equals_torch(name, dtype, backend, rng):
    ours, torchs, targets = LOSSES[name]
    for shape in ((4, 3), (1, 7), (9, 1)):
        for scale in (1, 100):  # 100: where exp(z) overflows in float32
            z = (scale * rng.standard_normal(shape)).astype(dtype)
            t = targets(rng, shape)
            t = t.astype(dtype) if t.dtype.kind == "f" else t
            loss, dz = ours(backend.asarray(z), backend.asarray(t))
            z64 = leaf(z)
            loss64 = torchs(z64, torch.tensor(t.astype(np.float64) if t.dtype.kind == "f" else t))
            loss64.backward()
            what = f"{name} {shape} x {scale}"
            terms = [z, z, z, z]
            assert_close(float(loss), float(loss64.detach()), z.dtype, terms, what)
            dz = backend.to_numpy(dz)
            assert dz.dtype == z.dtype
            assert_close(dz, z64.grad.numpy(), z.dtype, terms, f"gradient, {what}")


def decay_groups(model, tensors, decay):
    """AdamW spares biases and norms: torch wants that said in groups."""
    return [{"params": [tensors[k] for k, p in model.parameters().items() if p.decay is decayed],
             "weight_decay": decay * decayed} for decayed in (True, False)]


OPTIMIZERS = {
    "GradientDescent": (lambda m: optim.GradientDescent(m, 0.1),
                        lambda m, p: torch.optim.SGD(p.values(), 0.1)),
    "Momentum": (lambda m: optim.Momentum(m, 0.1, 0.8),
                 lambda m, p: torch.optim.SGD(p.values(), 0.1, momentum=0.8)),
    "Nesterov": (lambda m: optim.Momentum(m, 0.1, 0.8, nesterov=True),
                 lambda m, p: torch.optim.SGD(p.values(), 0.1, momentum=0.8, nesterov=True)),
    "RMSProp": (lambda m: optim.RMSProp(m, 0.01, 0.95, 1e-6),
                lambda m, p: torch.optim.RMSprop(p.values(), 0.01, 0.95, 1e-6)),
    "Adam": (lambda m: optim.Adam(m, 0.01, 0.8, 0.95, 1e-6),
             lambda m, p: torch.optim.Adam(p.values(), 0.01, (0.8, 0.95), 1e-6)),
    "AdamW": (lambda m: optim.AdamW(m, 0.01, weight_decay=0.3),
              lambda m, p: torch.optim.AdamW(decay_groups(m, p, 0.3), 0.01)),
}


def net():
    """A small net of ours, and the same in torch."""
    model = Sequential([Conv2D(3, 3, activation="tanh"), BatchNorm(), Flatten(), Dense(2)])
    model.build(IMAGE, seed=3, dtype=np.float64)
    p = {k: leaf(model.backend.to_numpy(v.data)) for k, v in model.parameters().items()}
    forward = chain(conv("tanh", at="conv1/"), batch_norm("norm1/"), flat, dense(at="dense1/"))
    return model, p, lambda x: forward(x, p)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_equals_torch(name, backend, rng):
    """Ten steps on random gradients, the learning rate changed on the way.

    No formula rounds more than 16 times a step, each time by less than u times max(|theta|, 1).
    """
    make, make_torch = OPTIMIZERS[name]
    model, p, _ = net()
    ours, torchs = make(model), make_torch(model, p)
    for step in range(10):
        if step == 4:
            ours.learning_rate /= 2
            for group in torchs.param_groups:
                group["lr"] /= 2
        for k, v in model.parameters().items():
            g = rng.standard_normal(v.shape)
            v.grad[...] = backend.asarray(g)
            p[k].grad = torch.tensor(g)
        ours.step()
        torchs.step()
        for k, v in model.parameters().items():
            want = p[k].detach().numpy()
            largest = max(1, float(np.abs(want).max()))
            np.testing.assert_allclose(
                backend.to_numpy(v.data), want, rtol=0, err_msg=f"{k} after step {step + 1}",
                atol=(step + 1) * 16 * unit_roundoff(want.dtype) * largest)
    assert ours.steps == 10


def test_training_equals_torch(backend, rng):
    """Ten steps of Nesterov's momentum: the same loss each time, and the same net at the end."""
    model, p, torch_net = net()
    ours = optim.Momentum(model, 0.1, 0.9, nesterov=True)
    torchs = torch.optim.SGD(p.values(), 0.1, momentum=0.9, nesterov=True)
    for step in range(10):
        x, t = rng.standard_normal((4, *IMAGE)), rng.integers(0, 2, 4)
        y = model.forward(backend.asarray(x), training=True)
        loss, dy = losses.SoftmaxCrossEntropy()(y, backend.asarray(t))
        model.backward(dy)
        ours.step()
        torchs.zero_grad()
        loss64 = F.cross_entropy(torch_net(torch.tensor(x)), torch.tensor(t))
        loss64.backward()
        torchs.step()
        assert_close(float(loss), float(loss64.detach()), x.dtype, [x], f"loss of step {step + 1}")
    for k, v in model.parameters().items():
        assert_close(backend.to_numpy(v.data), p[k].detach().numpy(), x.dtype, [x], k)
