"""What TrainStep does: the same bits captured, in plain calls and streamed; on NumPy the same but
for rounding. Its results, and batches of one's own."""
from __future__ import annotations

import warnings
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from gpucnn import losses, optim
from gpucnn.layers import Concat, Conv2D, Dense, Flatten, Sequential
from gpucnn.training import StepResult, TrainStep, train_step
from tests.conftest import needs_simulator
from tests.trainings import NETS, Training, assert_same, images

# ------------------------------------------------------------------------- the same as elsewhere


@pytest.mark.parametrize("name", NETS)
def test_captured_and_plain_steps_give_the_same_bits_and_numpys_numbers(cupy_backend, name):
    """Two epochs of two whole batches and one short one, so that graphs of both are launched.

    In double precision, where what rounding makes of the first step stays small in the last.
    """
    captured, plain, numpy = (
        Training("cupy", name, precision="float64"),
        Training("cupy", name, precision="float64", capture=False),
        Training("numpy", name, precision="float64"))
    results = [training.run(0, 1) for training in (captured, plain, numpy)]
    assert len(captured.step._graphs) == 2
    assert captured.step.not_captured is None
    assert not plain.step._graphs
    assert results[0] == results[1]
    assert_same(captured.state(), plain.state())
    assert [(r.hits, r.images) for r in results[0]] == [(r.hits, r.images) for r in results[2]]
    np.testing.assert_allclose([r.loss for r in results[0]], [r.loss for r in results[2]],
                               rtol=1e-8)
    ours, theirs = captured.state(), numpy.state()
    assert ours.keys() == theirs.keys()
    for key, a in ours.items():
        np.testing.assert_allclose(a, theirs[key], rtol=1e-5, atol=1e-7, err_msg=key)


def test_a_data_set_that_streams_gives_the_same_bits(backend):
    streamed, resident = (Training(backend.name, streamed=streamed) for streamed in (True, False))
    assert streamed.run(0, 1, 2) == resident.run(0, 1, 2)
    assert_same(streamed.state(), resident.state())
    assert len(streamed.step._graphs) == (2 if backend.captures else 0)


@pytest.mark.parametrize("precision", ["float32", "tf32", "mixed_float16", "mixed_bfloat16"])
def test_each_precision_captured_and_plain(cupy_backend, precision):
    """A loss scale that grows on the way lies on the device."""
    captured, plain = (Training("cupy", precision=precision, capture=capture)
                       for capture in (True, False))
    assert captured.run(0, 1) == plain.run(0, 1)
    assert_same(captured.state(), plain.state())
    assert len(captured.step._graphs) == 2


@pytest.mark.parametrize("optimizer", [optim.GradientDescent, optim.Momentum, optim.RMSProp,
                                       optim.AdamW])
def test_each_optimizer_captured_and_plain(cupy_backend, optimizer):
    captured, plain = (Training("cupy", optimizer=optimizer, capture=capture)
                       for capture in (True, False))
    assert captured.run(0, 1) == plain.run(0, 1)
    assert_same(captured.state(), plain.state())


def test_an_epoch_is_the_steps_on_its_batches(backend):
    """By train_step, which waits after each."""
    one, other = Training(backend.name), Training(backend.name)
    results = one.run(0, 1)
    expected = [StepResult(*train_step(other.model, other.loss, other.optimizer, x, t), len(t))
                for number in (0, 1) for x, t in other.loader.epoch(number)]
    assert results == expected
    assert_same(one.state(), other.state())


def test_a_layer_of_many_branches_is_captured(cupy_backend):
    """CuPy's concatenate() would copy from the host for them."""
    results = []
    for capture in (True, False):
        model = Sequential([Concat([Conv2D(1, 3) for _ in range(9)]), Flatten(), Dense(10)])
        model.build((6, 6, 2), seed=3)
        loss, optimizer = losses.SoftmaxCrossEntropy(), optim.Adam(model)
        step, data = TrainStep(model, loss, optimizer, capture=capture), images((6, 6, 2))
        for _ in range(3):
            step(data.images[:4].astype(np.float32), data.labels[:4])
        assert step.not_captured is None
        results.append(step.results())
    assert results[0] == results[1]


def test_no_warning_where_everything_is_captured(cupy_backend):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(Training("cupy").run(0, 1)) == 6


# --------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("read_every", [1, 2, 3, 5, 6, 7, 100])
def test_results_come_in_order_whatever_the_length_of_the_ring(backend, read_every):
    expected = Training(backend.name).run(0, 1)
    training = Training(backend.name, read_every=read_every)
    assert training.run(0, 1) == expected
    assert [r.images for r in expected] == 2 * [4, 4, 2]
    steps = Training(backend.name, read_every=read_every)
    for x, t in [b for number in (0, 1) for b in steps.loader.epoch(number)]:
        steps.step(x, t)
    assert steps.step.results() == expected
    assert steps.step.results() == []


def test_results_can_be_asked_for_in_the_middle(backend):
    expected = Training(backend.name).run(0, 1)
    training = Training(backend.name, read_every=4)
    batches = [b for number in (0, 1) for b in training.loader.epoch(number)]
    got = []
    for i, (x, t) in enumerate(batches):
        training.step(x, t)
        if i in (0, 3, 4):
            got += training.step.results()
    assert got + training.step.results() == expected


def test_an_epoch_that_was_left_leaves_no_results_to_the_next(backend):
    training = Training(backend.name, read_every=2)
    for _ in training.step.epoch(training.loader, 0):
        break
    assert len(training.run(1)) == 3


@pytest.mark.parametrize("taken", [1, 2, 4, 5])
def test_results_that_an_epoch_has_not_given_yet_can_be_asked_for(backend, taken):
    """Also where those that came with the last one had been read in one copy."""
    expected = Training(backend.name, read_every=3, batch=2).run(0)
    training = Training(backend.name, read_every=3, batch=2)
    epoch = training.step.epoch(training.loader)
    got = [next(epoch) for _ in range(taken)]
    launched = training.optimizer.steps
    assert got + training.step.results() == expected[:launched]
    assert list(epoch) == expected[launched:]


class Interrupted:
    """A copy, and somebody who presses Ctrl-C the first time that it is waited for."""

    done = False

    def __init__(self, fetch):
        self.fetch, self.times = fetch, 0

    def result(self):
        self.times += 1
        if self.times == 1:
            raise KeyboardInterrupt
        return self.fetch.result()


@pytest.mark.parametrize("read_every", [1, 2, 100])
def test_who_interrupts_the_waiting_loses_no_results(backend, read_every):
    """After which steps go on, and so do their results."""
    expected = Training(backend.name).run(0, 1)
    training, interrupted = Training(backend.name, read_every=read_every), 0
    log = training.step._log
    log.backend = SimpleNamespace(fetch=lambda array: Interrupted(backend.fetch(array)),
                                  record_step=backend.record_step, asarray=backend.asarray,
                                  captures=True)
    for number in (0, 1):
        for x, t in training.loader.epoch(number):
            try:
                training.step(x, t)
            except KeyboardInterrupt:
                interrupted += 1
    while True:
        try:
            results = training.step.results()
            break
        except KeyboardInterrupt:
            interrupted += 1
    assert interrupted > 0
    assert results == expected


def test_results_are_read_while_steps_go_on(cupy_backend):
    """Five steps, two at a time: the first two are known before the last one is launched."""
    training = Training("cupy", read_every=2, batch=2)
    launched, wrote = [], training.step._log.wrote

    def count(images):
        launched.append(images)
        wrote(images)

    training.step._log.wrote = count
    seen = [len(launched) for _ in training.step.epoch(training.loader)]
    assert seen == [4, 4, 5, 5, 5]


def test_one_epoch_at_a_time(backend):
    training = Training(backend.name, batch=2, read_every=1)
    first = training.step.epoch(training.loader, 0)
    next(first)
    next(training.step.epoch(training.loader, 1))
    with pytest.raises(RuntimeError, match="^TrainStep: another epoch has begun; only that one can "
                                           "go on$"):
        list(first)


@pytest.mark.parametrize("streamed", [False, True])
def test_epochs_that_are_asked_for_together_run_one_after_the_other(backend, streamed):
    """Each goes to its own place in the data when its turn comes."""
    expected = Training(backend.name).run(0, 1)
    training = Training(backend.name, streamed=streamed)
    epochs = [training.step.epoch(training.loader, number) for number in (0, 1)]
    assert [result for epoch in epochs for result in epoch] == expected


def test_a_wrong_epoch_is_refused_where_it_is_asked_for(backend):
    training = Training(backend.name)
    with pytest.raises(TypeError, match="^Loader: epoch must be an int, got 1.5$"):
        training.step.epoch(training.loader, 1.5)


def test_an_epoch_can_begin_in_the_middle(backend):
    expected = Training(backend.name).run(0)
    training = Training(backend.name)
    first = next(iter(training.step.epoch(training.loader)))
    assert first == expected[0]
    batches = list(training.step.epoch(training.loader, 0, position=8))
    assert [r.images for r in batches] == [2]


@needs_simulator
def test_the_hosts_memory_does_not_go_before_it_is_copied(cupy_backend):
    """CuPy gives pinned memory out again as soon as Python has forgotten it."""
    from gpucnn.backend import cuda_copies
    stream = cuda_copies._stream("to the host")
    fetch = cupy_backend.fetch(cupy_backend.asarray(np.arange(3.0)))
    assert len(stream.copies) == 1
    del fetch
    assert not stream.copies

    waited = []
    upload = cupy_backend.upload([cupy_backend.asarray(np.zeros(3))])
    for name in ("first", "second"):
        upload.arrays()[0][...] = 1
        upload.send()
        upload._slots[-1].copied = SimpleNamespace(synchronize=partial(waited.append, name))
    del upload
    assert sorted(waited) == ["first", "second"]


@needs_simulator
def test_a_copy_waits_for_those_who_had_its_memory_before(cupy_backend, monkeypatch):
    """The pool gives out memory that kernels still use: on their own stream it is free by then."""
    from gpucnn.backend import cuda_copies
    waits = []
    stream = cuda_copies._stream("to the GPU")
    monkeypatch.setattr(type(stream), "wait_event", lambda self, event: (
        waits.append((self is stream, event._stream, len(stream.copies))), event.synchronize()))
    upload = cupy_backend.upload([cupy_backend.asarray(np.zeros(3))])
    current = cupy_backend.xp.cuda.get_current_stream()
    for _ in range(2):
        upload.arrays()[0][...] = 1
        upload.send()
        assert waits == [(True, current, 0), (False, stream, 1)], "first, before anything is copied"
        waits.clear()


# ---------------------------------------------------------------------------- batches of one's own


def test_batches_of_ones_own_are_copied_into_the_graphs_inputs(backend):
    """The caller's arrays may change or go."""
    training, plain = Training(backend.name), Training(backend.name)
    rng, results = np.random.default_rng(1), []
    for size in (3, 3, 2, 3, 2, 2):
        x, t = rng.random((size, 6, 6, 2), np.float32), rng.integers(0, 10, size)
        there = backend.asarray(x.copy()), backend.asarray(t)
        training.step(*there)
        there[0][...] = 0
        results.append(StepResult(*train_step(plain.model, plain.loss, plain.optimizer, x, t),
                                  size))
    assert training.step.results() == results
    assert_same(training.state(), plain.state())


def test_what_inputs_gives_is_not_copied(cupy_backend):
    training = Training("cupy")
    x, t = training.data.images[:4].astype(np.float32), training.data.labels[:4]
    there = training.step.inputs(x, t)
    assert training.step.inputs(x + 1, t)[0] is there[0]
    np.testing.assert_array_equal(cupy_backend.to_numpy(there[0]), x + 1)
    for _ in range(3):
        training.step(*there)
    assert training.step._inputs[x.shape, x.dtype, t.shape, t.dtype] is not None
    before = training.step.results()[-1]
    there[0][...] = 0
    training.step(*there)
    plain = Training("cupy", capture=False)
    for given in (x + 1, x + 1, x + 1, 0 * x):
        plain.step(given, t)
    *_, third, last = plain.step.results()
    assert before == third
    assert training.step.results() == [last]


@pytest.mark.parametrize("loss", [losses.MeanSquaredError, losses.BinaryCrossEntropy])
def test_a_loss_that_takes_outputs_to_come_to(backend, loss):
    """Right is an image whose largest output is where the largest of those is."""
    training = Training(backend.name, loss=loss)
    plain = Training(backend.name, loss=loss, capture=False)
    x, labels = training.data.images.astype(np.float32) / 255, training.data.labels
    t, expected = np.eye(10, dtype=np.float32)[labels], []
    for n in (10, 10, 10, 4, 4, 4):  # 10: as many images as outputs
        there = backend.asarray(x[:n]), backend.asarray(t[:n])
        y = plain.model.forward(there[0], training=True)
        right = (backend.to_numpy(y).argmax(axis=1) == labels[:n]).sum()
        plain.model.layers[2].step -= 1  # the dropout of the step that comes
        training.step(*there)
        expected.append(StepResult(
            *train_step(plain.model, plain.loss, plain.optimizer, *there), n))
        assert expected[-1].hits == right
    got = training.step.results()
    assert [r[1:] for r in got] == [r[1:] for r in expected]
    assert [r.loss for r in got] == [r.loss for r in expected]
    assert training.step.not_captured is None
