"""What a training step has in memory: freed as soon as it can be, measured, and predicted."""
from __future__ import annotations

import gc
import re
import weakref
from functools import partial

import numpy as np
import pytest

from gpucnn import losses, models, optim
from gpucnn.backend import make_backend, parallel
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
from gpucnn.layers.memory import step_memory
from scripts.contestants.layer_memory import Meter
from tests.conftest import needs_simulator


def conv(filters: int, **options) -> Conv2D:
    return Conv2D(filters, 3, padding="same", **options)


def inception() -> Layer:
    """Branches of one, two and no convolution, one of them pooled at the same size."""
    return Sequential([
        conv(16, activation="relu"),
        Concat([Conv2D(8, 1, activation="tanh"),
                Sequential([conv(8, activation="relu"), BatchNorm(activation="relu"), conv(8)]),
                Sequential([AvgPool2D(3, stride=1, padding=1), ReLU()]), Sequential([])]),
        MaxPool2D(2), Flatten(), Dense(10)])


def residuals() -> Layer:
    """Sums with and without a shortcut layer, in one pass and apart, with activations of both."""
    body = [conv(16, bias=False), BatchNorm(activation="relu"), conv(16, bias=False), BatchNorm()]
    return Sequential([
        conv(16, bias=False), BatchNorm(),
        Residual(Sequential(body), activation="relu"),
        Residual(Sequential([conv(16), ReLU()]), Conv2D(16, 1), activation="tanh"),
        Residual(conv(16), Sequential([Conv2D(16, 1), BatchNorm()]), activation="leaky_relu"),
        GlobalAvgPool2D(), Dense(10)])


def poolings() -> Layer:
    return Sequential([
        conv(8), LeakyReLU(), AvgPool2D(2), Dropout(0.2), conv(16), Sigmoid(), Dropout(0.0),
        MaxPool2D(2, activation="relu"), Flatten(), Dense(64), Tanh(), Dense(10), Softmax()])


def first_layers() -> Layer:
    """What has nothing to learn before it has no backward pass."""
    return Sequential([
        SpaceToDepth(2), Whiten2D(2), GELU(), conv(16, bias=False), BatchNorm(scale=False),
        GELU(), MaxPool2D(2), Flatten(), Dense(10), Scale(0.5)])


def frozen_norms() -> Layer:
    return Sequential([
        conv(16), BatchNorm(activation="relu", frozen=True), BatchNorm(frozen=True),
        Residual(Sequential([conv(16), BatchNorm(frozen=True)]), activation="relu"),
        GlobalAvgPool2D(), Dense(10)])


# The net, the shape of an image, and a batch: on NumPy and, where each element takes longer, in
# the simulator. Activations and what passes take beside make up most of what is compared.
NETS = {
    "article": (models.article, (28, 28, 1), 64, 4),
    "lenet5": (models.lenet5, (28, 28, 1), 256, 16),
    "resnet18": (partial(models.resnet18, width=16), (32, 32, 3), 8, 2),
    "concat": (inception, (16, 16, 3), 64, 8),
    "residual": (residuals, (16, 16, 3), 64, 8),
    "pooling": (poolings, (16, 16, 3), 128, 8),
    "first layers": (first_layers, (16, 16, 3), 512, 8),
    "frozen norms": (frozen_norms, (16, 16, 3), 64, 8),
}


def measure(backend, net: str, precision: str = "float32", shape=None, batch=None):
    """The measured rows and peak of a net's step, the prediction, and the optimiser."""
    make, usual, many, few = NETS[net]
    shape, batch = shape or usual, batch or (many if backend.name == "numpy" else few)
    gc.collect()
    meter = Meter(backend)
    model = make()
    model.build(shape, precision=precision)
    optimizer, loss = optim.Adam(model), losses.SoftmaxCrossEntropy()
    x = backend.asarray(np.random.default_rng(0).standard_normal((batch, *shape)), model.dtype)
    t = backend.asarray(np.arange(batch) % 10)

    def step():
        dlogits = loss(model.forward(x, training=True), t)[1]
        model.backward_parameters(dlogits)
        optimizer.step()

    return meter.measure(model, step), step_memory(model, shape, batch, optimizer)


def check(measured, predicted, rows: float) -> None:
    """The peak, without what is there all the time, within 10 %; each row within a share."""
    fixed = predicted.parameters + predicted.gradients + predicted.state
    assert measured["peak"] - fixed == pytest.approx(predicted.peak - fixed, rel=0.1)
    assert len(measured["rows"]) == len(predicted.rows)
    for row, own in zip(measured["rows"], predicted.rows):
        assert row["layer"] == own.layer.path
        for name in ("forward", "backward"):
            assert row[name] == pytest.approx(getattr(own, name), rel=rows), (row["layer"], name)


@pytest.fixture
def one_thread(monkeypatch):
    """Of two, chance would decide which of them keeps what memory; and new memory, that is seen."""
    monkeypatch.setenv("GPUCNN_THREADS", "1")
    monkeypatch.setattr(parallel, "_thread", parallel._Thread())


@pytest.mark.parametrize("net", NETS)
def test_the_peak_is_as_predicted_on_the_cpu(net, one_thread):
    check(*measure(make_backend("numpy"), net), rows=0.15)


@needs_simulator
@pytest.mark.parametrize(("net", "precision"), [
    *((net, "float32") for net in NETS), ("lenet5", "mixed_float16"),
    ("residual", "mixed_float16"), ("first layers", "mixed_float16")])
def test_the_peak_is_as_predicted_on_the_gpu(net, precision, cupy_backend):
    smaller = {"article": (16, 16, 1), "resnet18": (16, 16, 3)}
    check(*measure(cupy_backend, net, precision, smaller.get(net)), rows=0.05)


@pytest.mark.parametrize("precision", ["float64", "mixed_bfloat16"])
def test_bytes_follow_the_precision(precision, backend):
    if precision == "mixed_bfloat16" and backend.name == "numpy":
        pytest.skip("NumPy has no mixed precision")
    single, other = Sequential([conv(8), Flatten(), Dense(4)]), Sequential([
        conv(8), Flatten(), Dense(4)])
    single.build((16, 16, 8))
    other.build((16, 16, 8), precision=precision)
    a, b = (step_memory(model, (16, 16, 8), 16, optim.Adam) for model in (single, other))
    wide = precision == "float64"
    assert b.activations == a.activations * (2 if wide else 0.5)
    assert b.gradients == a.gradients * (2 if wide else 1)
    assert b.state == 2 * b.gradients
    assert b.parameters == a.parameters * (2 if wide else 1.5)


def reference(array):
    """To an array, or to its memory where that is the simulator's."""
    owner = getattr(array, "_host", array)
    while owner is not array and isinstance(owner.base, np.ndarray):
        owner = owner.base
    return weakref.ref(owner)


@pytest.mark.parametrize("net", ["concat", "residual", "pooling", "first layers"])
def test_a_layer_keeps_nothing_after_its_backward_pass(net, backend, monkeypatch):
    """Not even while the layers before it are still at work."""
    make, shape, _, few = NETS[net]
    model = make()
    model.build(shape)
    kept: list[tuple[str, weakref.ref]] = []
    kind = type(model.flat_data)

    def noted(path, call):
        def wrapper(*values):
            kept.extend((path, reference(v)) for v in values if isinstance(v, kind))
            return call(*values)
        return wrapper

    for layer in model.walk():
        for name in ("save", "save_added"):
            monkeypatch.setattr(layer, name, noted(layer.path, getattr(layer, name)))
    x = backend.asarray(np.random.default_rng(0).random((few, *shape)), np.float32)
    dy = backend.asarray(np.ones((few, 10)), np.float32)
    model.forward(x, training=True)
    assert len(kept) > 5
    done = set()
    for layer in reversed(model.layers):
        dy = layer.backward(dy)
        done |= {part.path for part in layer.walk()}
        others = {id(array()) for path, array in kept if path not in done}
        others |= {id(reference(a)()) for a in (x, dy)}
        assert [path for path, array in kept
                if path in done and array() is not None and id(array()) not in others] == []


def test_idle_threads_keep_no_arrays(monkeypatch):
    """A thread of the pool waits for work without what it worked on last."""
    monkeypatch.setenv("GPUCNN_THREADS", "3")
    array = np.zeros(3)
    gone = weakref.ref(array)
    parallel.for_each(partial(lambda a, i: a.sum(), array), range(64))
    del array
    assert gone() is None


@needs_simulator
def test_an_output_is_given_up_before_there_is_memory_for_dx(cupy_backend):
    """With a, x and dz at hand at the end, the peak would be a fifth higher."""
    layer = Conv2D(16, 3, padding="same", activation="relu")
    layer.build((8, 8, 16))
    x = cupy_backend.asarray(np.ones((4, 8, 8, 16)), np.float32)
    layer.backward(layer.forward(x, training=True))
    a, dy = layer.forward(x, training=True), x.copy()
    seen = []
    gradient = type(cupy_backend)._start_backward

    def spy(*arguments):
        finish = gradient(*arguments)
        seen.append(reference(arguments[2]))

        def later():
            seen.append(seen[0]() is None)
            return finish()
        return later

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(cupy_backend), "_start_backward", spy)
        del a
        assert layer.backward(dy).shape == x.shape
    assert seen[1] is True


def test_an_own_layer_needs_no_memory_method():
    class Double(Layer):
        def forward(self, x, training=False):
            x = self.receive(x)
            self.save(training, x)
            return x + x

        def backward(self, dy):
            (x,) = self.take_saved()
            return self.receive_gradient(dy, x.shape) * 2

    model, each = Sequential([Flatten(), Dense(512), Double()]), 16 * 512 * 4
    model.declare_at((4, 4, 32), "")
    m = step_memory(model, (4, 4, 32), 16)
    row, fixed = m.rows[2], m.parameters + m.gradients
    assert row.saved == 2 * each  # Dense keeps the input alone
    assert row.forward == fixed + 3 * each
    assert row.backward == fixed + 5 * each


def test_summary_prints_the_table(capsys, monkeypatch):
    monkeypatch.setenv("GPUCNN_THREADS", "2")
    models.article().summary((28, 28, 1), memory=True, batch=256, optimizer=optim.Adam)
    title, header, _, *lines = capsys.readouterr().out.splitlines()
    assert title == "batches of 256, float32, on numpy"
    assert re.split("  +", header) == ["layer", "type", "output shape", "keeps", "in forward",
                                       "in backward"]
    rows = [re.split("  +", line) for line in lines]
    assert rows[1][:4] == ["conv2", "Conv2D", "28x28x32", "24.5 MiB"]
    assert rows[2][3] == "1.5 MiB"  # a byte for each of 14x14x32
    assert [row for row in rows if row[0].startswith(("param", "grad", "state", "act"))] == [
        ["parameters", "3.3 MiB"], ["gradients", "3.3 MiB"],
        ["state of the optimizer (m, s)", "6.7 MiB"], ["activations, with the input", "86.0 MiB"]]
    assert rows[-1][0] == "peak of the step, in conv4 backward"
    models.lenet5().summary((28, 28, 1), memory=True)
    printed = capsys.readouterr().out
    assert "each array of an optimizer's state, not counted" in printed
    model = models.lenet5()
    model.build((28, 28, 1))
    model.summary((28, 28, 1), memory=True, optimizer=optim.GradientDescent(model))
    assert re.search(r"state of the optimizer \(none\) +-\n", capsys.readouterr().out)


def test_summary_refuses_what_it_cannot_tell():
    model = models.lenet5()
    with pytest.raises(ValueError, match="^Sequential: plan and memory are two tables; ask"):
        model.summary((28, 28, 1), plan=True, memory=True)
    with pytest.raises(TypeError, match="^Sequential: optimizer must be an Optimizer or a class of "
                                        "them, such as optim.Adam, got 'adam'$"):
        model.summary((28, 28, 1), memory=True, optimizer="adam")
    for batch in (0, 2.5, True):
        with pytest.raises(ValueError, match="^Sequential: batch must be an int >= 1, got"):
            model.summary((28, 28, 1), memory=True, batch=batch)
    with pytest.raises(ValueError, match="input_shape must be ints >= 1 without"):
        model.summary((28, 0, 1), memory=True)
    model.build((28, 28, 1))
    with pytest.raises(ValueError, match="built for input"):
        model.summary((32, 32, 1), memory=True)
