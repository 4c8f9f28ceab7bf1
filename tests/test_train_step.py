"""TrainStep: the same bits captured, in plain calls and streamed; on NumPy the same but for
rounding. What it does beside: results, other shapes, changed settings, what cannot be captured."""
from __future__ import annotations

import gc
import warnings
import weakref
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from gpucnn import losses, models, optim, use_backend
from gpucnn.data import Augmentation, Dataset, Loader
from gpucnn.layers import BatchNorm, Concat, Conv2D, Dense, Dropout, Flatten, Sequential
from gpucnn.training import StepResult, TrainStep, train_step
from tests.conftest import needs_simulator
from tests.gpusim.mutation import caught

# name: (the model, the shape of an image); small, for the simulator
NETS = {
    "article": (lambda: models.article(10), (8, 8, 1)),
    "lenet5": (lambda: models.lenet5(10), (20, 20, 1)),
    "resnet18": (lambda: models.resnet18(10, width=4), (8, 8, 3)),
    "small": (lambda: small(), (6, 6, 2)),
}


def small():
    return Sequential([Conv2D(4, activation="relu"), BatchNorm(), Dropout(0.3), Flatten(),
                       Dense(10)])


def images(shape, n=10):
    rng = np.random.default_rng(0)
    return Dataset(rng.integers(0, 256, (n, *shape), np.uint8), rng.integers(0, 10, n),
                   tuple("abcdefghij"), "random")


class Training:
    """A model with all that trains it, made anew from the same seeds."""

    def __init__(self, backend, name="small", *, precision="float32", optimizer=optim.Adam,
                 loss=losses.SoftmaxCrossEntropy, streamed=False, batch=4, rate=1e-3, **options):
        make, shape = NETS[name]
        self.data = images(shape)
        with use_backend(backend):
            self.model = make()
            self.loader = Loader(self.data, batch, seed=5, streamed=streamed,
                                 augmentation=Augmentation(crop=1, flip=True, cutout=2))
        self.model.build(shape, seed=3, precision=precision)
        scale = optim.LossScale(self.model, 2.0**8, growth_interval=3) \
            if precision == "mixed_float16" else None
        self.loss = loss(loss_scale=scale)
        self.optimizer = optimizer(self.model, rate, loss_scale=scale)
        self.step = TrainStep(self.model, self.loss, self.optimizer, **options)

    def run(self, *epochs):
        return [result for number in epochs for result in self.step.epoch(self.loader, number)]

    def state(self):
        """Everything that a step writes and the next one reads, in host memory."""
        to_numpy, model = self.model.backend.to_numpy, self.model
        arrays = {"data": model.flat_data, "grad": model.flat_grad, "cast": model.flat_cast}
        arrays |= {path: layer.own_buffers[name] for path, (layer, name) in model.buffers().items()}
        state = {name: np.array(to_numpy(a)) for name, a in arrays.items() if a is not None}
        steps = {layer.path: np.array(layer.step) for layer in model.walk()
                 if isinstance(layer, Dropout)}
        return state | steps | self.optimizer.state_dict()


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, a in one.items():
        np.testing.assert_array_equal(a, other[name], err_msg=name)


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


# ------------------------------------------------------------------------ what a graph may not miss


def test_the_learning_rate_is_read_from_the_device(cupy_backend):
    captured, plain = (Training("cupy", capture=capture) for capture in (True, False))
    for training in (captured, plain):
        training.run(0, 1)
        training.optimizer.learning_rate = 0.1
        training.run(2)
    assert_same(captured.state(), plain.state())
    assert len(captured.step._graphs) == 2, "no graph was captured anew"


def test_a_schedule_sets_the_rate_of_each_step(cupy_backend):
    """Also of the first ones of an epoch that goes on in its middle; no graph is captured anew."""
    rates = []

    def schedule(step):
        rates.append(step)
        return 0.1 / (step + 1)

    captured, plain = (Training("cupy", capture=capture) for capture in (True, False))
    for training in (captured, plain):
        for number, position in ((0, 0), (1, 0), (3, 4)):
            list(training.step.epoch(training.loader, number, position, schedule=schedule))
    assert rates == 2 * [0, 1, 2, 3, 4, 5, 10, 11]
    assert captured.optimizer.learning_rate == 0.1 / 12
    assert_same(captured.state(), plain.state())
    assert len(captured.step._graphs) == 2


CHANGES = {
    "dropout": lambda t: setattr(t.model.layers[2], "rate", 0.0),
    "momentum of the norm": lambda t: setattr(t.model.layers[1], "momentum", 0.9),
    "clipping": lambda t: setattr(t.optimizer, "clip_norm", 0.01),
    "beta": lambda t: setattr(t.optimizer, "beta1", 0.0),
    "label smoothing": lambda t: setattr(t.loss, "label_smoothing", 0.5),
    "parameters": lambda t: t.model.flat_data.fill(0.01),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_setting_is_not_missed(cupy_backend, change):
    captured, plain = (Training("cupy", capture=capture) for capture in (True, False))
    for training in (captured, plain):
        training.run(0, 1)
        change(training)
    assert captured.run(2, 3) == plain.run(2, 3)
    assert_same(captured.state(), plain.state())


def test_a_model_that_is_built_anew_is_not_missed(cupy_backend):
    captured, plain = (Training("cupy", capture=capture) for capture in (True, False))
    for training in (captured, plain):
        training.run(0, 1)
        training.model.build((6, 6, 2), seed=9)
    assert captured.run(2, 3) == plain.run(2, 3)
    assert_same(captured.state(), plain.state())


class OwnStep(optim.Optimizer):
    """Not as an optimiser of one's own should be: nothing reads the learning rate on the device."""

    def step(self, loss=None):
        theta, change = self.model.flat_data, self.learning_rate * self.model.flat_grad
        theta -= change


def test_the_learning_rate_of_a_step_of_ones_own_is_not_missed(cupy_backend):
    captured, plain = (Training("cupy", optimizer=OwnStep, capture=capture)
                       for capture in (True, False))
    for training in (captured, plain):
        training.run(0, 1)
        training.optimizer.learning_rate = 0.1
    assert captured.run(2, 3) == plain.run(2, 3)
    assert len(captured.step._graphs) == 4


class Weighted(losses.SoftmaxCrossEntropy):
    """With a setting that is None at first."""

    def __init__(self, **options):
        super().__init__(**options)
        self.weights = None

    def with_hits(self, logits, labels):
        loss, dlogits, hits = super().with_hits(logits, labels)
        return loss, dlogits if self.weights is None else dlogits * self.weights, hits

    def __call__(self, logits, labels):
        return self.with_hits(logits, labels)[:2]


def test_a_setting_that_becomes_an_array_is_not_missed(cupy_backend):
    captured, plain = (Training("cupy", loss=Weighted, capture=capture)
                       for capture in (True, False))
    weights = cupy_backend.asarray(np.linspace(0, 2, 10, dtype=np.float32))
    for training in (captured, plain):
        training.run(0, 1)
        training.loss.weights = weights
    assert captured.run(2, 3) == plain.run(2, 3)
    assert_same(captured.state(), plain.state())
    assert len(captured.step._graphs) == 4


def test_a_loss_scale_that_only_one_was_given_is_refused(cupy_backend):
    training = Training("cupy", precision="mixed_float16")
    training.run(0, 1)
    training.loss.loss_scale = optim.LossScale(training.model, 4.0)
    with pytest.raises(ValueError, match="^the loss and the optimizer have different loss scales"):
        training.run(2)


def test_a_step_that_an_error_has_ended_is_not_captured(cupy_backend):
    """The next one raises it too, instead of a warning and plain calls for all that follow."""
    training = Training("cupy")
    x, t = training.data.images[:4].astype(np.float32), training.data.labels[:4]
    for _ in range(3):
        with pytest.raises(ValueError, match="^loss of an empty batch is undefined"):
            training.step(x[:0], t[:0])
    for _ in range(2):
        training.step(x, t)
    assert training.step.not_captured is None
    assert len(training.step._graphs) == 1


@pytest.mark.parametrize("capture", [True, False])
def test_a_loss_that_is_not_finite_changes_no_parameter(backend, capture):
    """Nor the optimiser's state, on the device, so that a replay does as a plain step does."""
    training = Training(backend.name, capture=capture)
    x, t = training.data.images[:4].astype(np.float32), training.data.labels[:4]
    for _ in range(3):
        training.step(x, t)
    before = training.state()
    x[1, 2, 2, 0] = np.inf
    training.step(x, t)
    after = training.state()
    for name in ("data", "m", "s", "steps"):
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)
    *_, result = training.step.results()
    assert np.isnan(result.loss)
    assert training.optimizer.steps == 3


def test_a_loss_that_is_not_finite_leaves_the_loss_scale(cupy_backend):
    training = Training("cupy", precision="mixed_float16")
    x, t = training.data.images[:4].astype(np.float32), training.data.labels[:4]
    training.step(x, t)
    scale = training.optimizer.loss_scale
    before = cupy_backend.to_numpy(scale.value).tolist()
    training.step(np.full_like(x, np.nan), t)
    assert cupy_backend.to_numpy(scale.value).tolist() == before == [2.0**8, 1.0]


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


def test_probabilities_out_of_range_make_a_captured_loss_nan(cupy_backend):
    """As labels do: a graph cannot stop for them."""
    training = Training("cupy", loss=losses.BinaryCrossEntropy)
    x, t = training.data.images[:4].astype(np.float32) / 255, np.zeros((4, 10), np.float32)
    for _ in range(3):
        training.step(x, t)
    t[2, 3] = 1.5
    training.step(x, t)
    *before, last = training.step.results()
    assert np.isfinite([r.loss for r in before]).all()
    assert np.isnan(last.loss)
    assert training.optimizer.steps == 3


def test_wrong_labels_of_the_host_are_refused_before_a_graph_has_them(backend):
    training = Training(backend.name)
    x, t = training.data.images[:4].astype(np.float32), np.array([0, 1, 10, 3])
    for _ in range(3):
        with pytest.raises(ValueError, match="^label 10 at position 2 is out of range for 10 "):
            training.step(x, t)
    assert training.step.results() == []
    for labels in (t % 10, t % 10):
        training.step(x, labels)
    with pytest.raises(ValueError, match="^label 10 at position 2 is out of range for 10 "):
        training.step(x, t)


# ------------------------------------------------------------------ what cannot be captured, errors


class PlainDescent(optim.Optimizer):
    """Without a kernel: what to skip is looked up on the host."""

    def update(self, g, *state):
        return self.learning_rate * g


class Careful(losses.MeanSquaredError):
    """A loss that looks at the outputs."""

    def __call__(self, y, t):
        if (y > 1e9).any():
            raise ValueError("too large")
        return super().__call__(y, (t[:, None] == y.argmax(1)[:, None]) + 0 * y)


@pytest.mark.parametrize("options", [{"optimizer": PlainDescent}, {"loss": Careful}], ids=str)
def test_what_cannot_be_captured_runs_in_plain_calls_and_says_so(cupy_backend, options):
    training, plain = Training("cupy", **options), Training("cupy", capture=False, **options)
    with pytest.warns(RuntimeWarning, match="^this training step cannot be captured into a CUDA "
                                            "graph and runs in plain calls: RuntimeError: the "
                                            "current stream is capturing.*capture=False") as said:
        results = training.run(0, 1, 2)
    assert len(said) == 1
    assert "captur" in training.step.not_captured
    assert results == plain.run(0, 1, 2)
    assert_same(training.state(), plain.state())


def test_a_user_of_cublas_is_told(cupy_backend, monkeypatch):
    monkeypatch.setenv("GPUCNN_CONV", "im2col")
    training = Training("cupy")
    with pytest.warns(RuntimeWarning, match="calling cuBLAS API during stream capture"):
        training.run(0, 1)


@needs_simulator
def test_a_result_that_outlives_its_capture_keeps_its_memory(cupy_backend):
    """The next graph is given none of it, nor it any of the last one's."""
    memory, x = cupy_backend.graph_memory(), cupy_backend.asarray(np.arange(3.0))
    kept, total = [], cupy_backend.asarray(np.zeros(3))

    def accumulate():
        total[...] = total + x

    def keep():
        kept.append(x + 1)

    replays = [cupy_backend.capture(accumulate, memory)]
    first = memory.pool
    replays.append(cupy_backend.capture(keep, memory))
    assert len(kept) == 2, "captured again, in memory of its own"
    assert memory.pool is not first
    second = memory.pool
    replays.append(cupy_backend.capture(accumulate, memory))
    assert memory.pool is second
    for replay in replays:
        replay()
    assert kept[1].get().tolist() == [1, 2, 3]
    assert total.get().tolist() == [0, 2, 4]


@needs_simulator
def test_the_memory_of_graphs_goes_with_their_step(cupy_backend):
    """At once, not when Python next looks for cycles: a GPU's memory is what it waits for."""
    training = Training("cupy")
    training.run(0, 1)
    pool = weakref.ref(training.step._memory.pool)
    gc.collect()
    gc.disable()
    try:
        del training
        assert pool() is None
    finally:
        gc.enable()


@needs_simulator
def test_where_a_capture_fails_no_graph_keeps_its_memory(cupy_backend, monkeypatch):
    """As where the graph of the short batch finds no memory beside that of the whole one."""
    from gpucnn.backend import cuda_graph

    def no_memory(*args):
        return cuda_graph._allocate(1 << 50)

    sizes = 4, 4, 4, 3, 3, 3, 4
    training, plain = Training("cupy"), Training("cupy", capture=False)
    batches = [(training.data.images[:n].astype(np.float32), training.data.labels[:n])
               for n in sizes]
    for batch in batches[:4]:
        training.step(*batch)
    pool = weakref.ref(training.step._memory.pool)
    monkeypatch.setattr(cuda_graph, "capture_on", no_memory)
    with pytest.warns(RuntimeWarning, match="OutOfMemoryError: Out of memory allocating"):
        training.step(*batches[4])
    assert pool() is None
    for batch in batches[5:]:
        training.step(*batch)
    for batch in batches:
        plain.step(*batch)
    assert training.step.results() == plain.step.results()
    assert_same(training.state(), plain.state())


@needs_simulator
def test_only_a_lack_of_memory_is_called_so(cupy_backend, monkeypatch):
    from gpucnn.backend import cuda_graph

    def broken(size):
        raise cuda_graph.cupy.cuda.runtime.CUDARuntimeError(700)

    monkeypatch.setattr(cuda_graph.cupy.cuda, "Memory", broken)
    with pytest.raises(cuda_graph.cupy.cuda.runtime.CUDARuntimeError):
        cuda_graph._allocate(1)


def test_what_is_wrong_is_refused_in_one_line(backend):
    training, other = Training(backend.name), Training(backend.name)
    model, loss, optimizer = training.model, training.loss, training.optimizer
    with pytest.raises(ValueError, match="^TrainStep: the optimizer is that of another model$"):
        TrainStep(model, loss, other.optimizer)
    with pytest.raises(TypeError, match="^TrainStep: capture must be True or False, got 'no'$"):
        TrainStep(model, loss, optimizer, capture="no")
    for wrong in (0, 2.5, "many"):
        with pytest.raises(ValueError, match="^TrainStep: read_every must be an int >= 1, got "):
            TrainStep(model, loss, optimizer, read_every=wrong)
    with use_backend(backend.name):
        unbuilt = small()
    with pytest.raises(RuntimeError, match="^TrainStep needs a built model"):
        TrainStep(unbuilt, loss, optimizer)
    scaled = losses.SoftmaxCrossEntropy(loss_scale=optim.LossScale(model))
    with pytest.raises(ValueError, match="^the loss and the optimizer have different loss scales"):
        TrainStep(model, scaled, optimizer)
    with pytest.raises(TypeError, match="^TrainStep: model must be a layers.Layer, got None$"):
        TrainStep(None, loss, optimizer)
    with pytest.raises(TypeError, match="^TrainStep: loss must be one of .*, got 'mse'$"):
        TrainStep(model, "mse", optimizer)
    with pytest.raises(TypeError, match="^TrainStep: optimizer must be an .*, got None$"):
        TrainStep(model, loss, None)
    with pytest.raises(TypeError, match="^TrainStep: epoch.. takes a data.Loader, got <generator"):
        training.step.epoch(training.loader.epoch())
    with pytest.raises(ValueError, match="^Loader: position must be <= 10"):
        training.step.epoch(training.loader, 0, 11)


def test_a_loader_on_another_backend_is_refused(cupy_backend):
    with pytest.raises(ValueError, match="^TrainStep: the loader is on numpy, the model on cupy; "):
        Training("cupy").step.epoch(Training("numpy").loader)


BUGS = {
    "the ring does not wrap": ("record_step.cu", "step % rows", "step"),
    "steps are not counted": ("record_step.cu", "*count = step + 1", "*count = step"),
    "hits stand before the loss": ("record_step.cu", "ring[2 * row] =", "ring[2 * row + 1] ="),
    "a lost step is made": (
        "optimizer.cu", "loss_or_null && *loss_or_null - *loss_or_null != 0", "false"),
    "a lost step halves the loss scale": (
        "optimizer.cu", "loss_scale_or_null && !skip", "loss_scale_or_null"),
}


def check_steps_and_a_lost_one(cupy_backend):
    """With the numbers that NumPy has, in a ring that is filled more than once."""
    training, numpy = Training("cupy", read_every=2), Training("numpy")
    for ours, theirs in zip(training.run(0, 1), numpy.run(0, 1)):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-3)
        assert ours[1:] == theirs[1:]
    test_a_loss_that_is_not_finite_leaves_the_loss_scale(cupy_backend)
    test_a_loss_that_is_not_finite_changes_no_parameter(cupy_backend, capture=True)


@needs_simulator
@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_a_planted_bug_is_caught(cupy_backend, bug):
    with caught(*bug):
        check_steps_and_a_lost_one(cupy_backend)


def test_they_pass_where_no_bug_is_planted(cupy_backend):
    check_steps_and_a_lost_one(cupy_backend)


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
