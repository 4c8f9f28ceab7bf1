"""A batch in parts: the step of the whole batch, in the memory of a part."""
from __future__ import annotations

import numpy as np
import pytest

from gpucnn import losses, optim, use_backend
from gpucnn.layers import Dense, Dropout, Layer, Sequential
from gpucnn.training import TrainStep
from tests.conftest import needs_simulator
from tests.trainings import Training, assert_same


def clipped(model, rate, **options):
    return optim.Adam(model, rate, clip_norm=0.05, **options)


def smoothed(loss_scale=None):
    return losses.SoftmaxCrossEntropy(0.1, loss_scale=loss_scale)


def assert_close(one, other, rtol):
    assert one.keys() == other.keys()
    for name, a in one.items():
        np.testing.assert_allclose(a, other[name], rtol=rtol, atol=rtol, err_msg=name)


@pytest.mark.parametrize("options", [
    {}, {"capture": False}, {"streamed": True}, {"optimizer": clipped, "loss": smoothed},
    {"optimizer": optim.Momentum}], ids=("plain", "eager", "streamed", "clipped", "momentum"))
def test_the_step_is_that_of_the_whole_batch(backend, options):
    """Also where the last part is shorter, and where there are fewer images than parts."""
    options = {"precision": "float64", "batch": 7, **options}
    whole = Training(backend.name, "plain", **options)
    expected = whole.run(0, 1, 2)
    for count in (2, 3):
        parts = Training(backend.name, "plain", micro_batches=count, **options)
        results = parts.run(0, 1, 2)
        assert [r[1:] for r in results] == [r[1:] for r in expected]
        np.testing.assert_allclose([r.loss for r in results], [r.loss for r in expected], 1e-12)
        assert_close(parts.state(), whole.state(), 1e-9)


@pytest.mark.parametrize("precision", ["float32", "mixed_float16"])
def test_captured_plain_and_streamed_give_the_same_bits(cupy_backend, precision):
    """With batch norm and dropout, and a loss scale that grows on the way."""
    trainings = [Training("cupy", precision=precision, micro_batches=2, **options)
                 for options in ({}, {"capture": False}, {"streamed": True})]
    results = [training.run(0, 1) for training in trainings]
    assert results[0] == results[1] == results[2]
    for other in trainings[1:]:
        assert_same(trainings[0].state(), other.state())
    assert trainings[0].step.not_captured is None
    assert len(trainings[0].step._graphs) == 2


def test_in_16_bits_the_step_is_that_of_the_whole_batch(cupy_backend):
    whole, parts = (Training("cupy", "plain", precision="mixed_float16", micro_batches=count)
                    for count in (1, 2))
    np.testing.assert_allclose([r.loss for r in whole.run(0)], [r.loss for r in parts.run(0)],
                               rtol=1e-2)
    assert parts.optimizer.state_dict()["loss_scale"].tolist() == [2.0**9, 0]


def test_on_two_backends(cupy_backend):
    """With batch norm and dropout: the same numbers but for rounding."""
    ours, theirs = (Training(name, precision="float64", micro_batches=3)
                    for name in ("cupy", "numpy"))
    for one, other in zip(ours.run(0, 1), theirs.run(0, 1)):
        assert one.loss == pytest.approx(other.loss, rel=1e-8)
    assert_close(ours.state(), theirs.state(), 1e-5)


class Watched(Layer):
    """Notes how many images it is given."""

    def forward(self, x, training=False):
        self.__dict__.setdefault("sizes", []).append(len(x))
        return self.receive(x)

    def backward(self, dy):
        return dy


@pytest.mark.parametrize(("images", "count", "sizes"), [
    (10, 1, [10]), (10, 2, [5, 5]), (10, 3, [4, 4, 2]), (10, 4, [3, 3, 3, 1]), (10, 7, 5 * [2]),
    (2, 3, [1, 1]), (1, 4, [1]), (3, 10**12, [1, 1, 1])])
def test_how_a_batch_is_cut(backend, images, count, sizes):
    model = Sequential([Watched(), Dense(3)])
    model.build((4,))
    step = TrainStep(model, losses.SoftmaxCrossEntropy(), optim.Adam(model), micro_batches=count)
    step(np.ones((images, 4), np.float32), np.zeros(images, np.int64))
    assert model.layers[0].sizes == sizes
    assert [r.images for r in step.results()] == [images]


def test_statistics_are_those_of_a_part_and_dropouts_count_parts(backend):
    training = Training(backend.name, micro_batches=2)
    other = Training(backend.name)
    x, t = training.data.images[:4].astype(np.float32), training.data.labels[:4]
    training.step(x, t)
    for part in (x[:2], x[2:]):
        other.model.forward(backend.asarray(part), training=True)
    for path, (layer, name) in training.model.buffers().items():
        theirs = other.model.buffers()[path][0].own_buffers[name]
        np.testing.assert_array_equal(backend.to_numpy(layer.own_buffers[name]),
                                      backend.to_numpy(theirs))
    assert training.model.training_state()["dropout1/step"].tolist() == [2]


def test_other_losses_and_targets(backend):
    x = np.random.default_rng(1).random((6, 6, 6, 2), np.float32)
    t = np.random.default_rng(2).random((6, 10), np.float32)
    for loss in (losses.MeanSquaredError, losses.BinaryCrossEntropy):
        whole, parts = (Training(backend.name, "plain", loss=loss, precision="float64",
                                 micro_batches=count) for count in (1, 4))
        for training in (whole, parts):
            for _ in range(3):
                training.step(x, t)
        assert_close(parts.state(), whole.state(), 1e-9)
        assert [r[1:] for r in parts.step.results()] == [r[1:] for r in whole.step.results()]


@needs_simulator
def test_memory_is_that_of_a_part(cupy_backend):
    """In plain calls, and of the graphs."""
    peaks = {}
    for count in (1, 4):
        model = Sequential([Dense(32, activation="relu") for _ in range(3)])
        model.build((32,))
        step = TrainStep(model, losses.SoftmaxCrossEntropy(), optim.GradientDescent(model),
                         micro_batches=count)
        x, t = step.inputs(np.ones((128, 32), np.float32), np.zeros(128, np.int64))
        pool = cupy_backend.xp.get_default_memory_pool()
        pool.free_all_blocks()
        before = pool.total_bytes()
        step(x, t)
        plain = pool.total_bytes() - before
        step(x, t)
        peaks[count] = plain, step._memory.pool.total_bytes()
    for whole, parts in zip(peaks[1], peaks[4]):
        assert parts < 0.5 * whole


def test_another_number_is_not_missed(cupy_backend):
    """Each has graphs of its own."""
    captured, plain = (Training("cupy", "plain", capture=capture) for capture in (True, False))
    for training in (captured, plain):
        training.run(0, 1)
        training.step.micro_batches = 2
    assert captured.run(2, 3) == plain.run(2, 3)
    assert_same(captured.state(), plain.state())
    assert len(captured.step._graphs) == 4


def test_what_is_wrong_is_refused_before_a_part_is_computed(backend):
    training = Training(backend.name, micro_batches=2)
    x, t = training.data.images[:4].astype(np.float32), np.array([0, 1, 2, 10])
    with pytest.raises(ValueError, match="^label 10 at position 3 is out of range for 10 classes"):
        training.step(x, t)
    with pytest.raises(ValueError, match="^4 images but 5 labels"):
        training.step(x, np.zeros(5, np.int64))
    with pytest.raises(ValueError, match="^loss of an empty batch is undefined"):
        training.step(x[:0], t[:0])
    other = Training(backend.name, loss=losses.MeanSquaredError, micro_batches=2)
    with pytest.raises(ValueError, match=r"^4 images but targets of shape \(5, 10\)$"):
        other.step(x, np.zeros((5, 10), np.float32))
    assert other.model.training_state()["dropout1/step"].tolist() == [0]
    for wrong in (0, 2.5, True):
        with pytest.raises(ValueError, match="^TrainStep: micro_batches must be an int >= 1, got "):
            Training(backend.name, micro_batches=wrong)


def test_dropout_alone():
    """Two parts have different masks: of ones, they drop different places."""
    with use_backend("numpy"):
        model = Sequential([Dropout(0.5), Dense(2)])
    model.build((100,))
    step = TrainStep(model, losses.MeanSquaredError(), optim.GradientDescent(model),
                     micro_batches=2)
    masks, dropout = [], model.layers[0].forward

    def forward(x, training=False):
        y = dropout(x, training)
        masks.append(y == 0)
        return y

    model.layers[0].forward = forward
    step(np.ones((2, 100), np.float32), np.zeros((2, 2), np.float32))
    assert len(masks) == 2
    assert (masks[0] != masks[1]).any()
