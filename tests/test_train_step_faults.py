"""What TrainStep does not miss, refuses and survives: changed settings, losses that are not finite,
what cannot be captured, wrong arguments."""
from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from gpucnn import losses, optim, use_backend
from gpucnn.training import TrainStep
from tests.conftest import needs_simulator
from tests.gpusim.mutation import caught
from tests.trainings import Training, assert_same, small

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
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_loss_that_is_not_finite_changes_no_parameter(backend, micro_batches, capture):
    """Nor the optimiser's state, on the device, so that a replay does as a plain step does."""
    training = Training(backend.name, micro_batches=micro_batches, capture=capture)
    x, t = training.data.images[:4].astype(np.float32), training.data.labels[:4]
    for _ in range(3):
        training.step(x, t)
    before = training.state()
    x[3, 2, 2, 0] = np.inf  # in the last part
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
    test_a_loss_that_is_not_finite_changes_no_parameter(cupy_backend, micro_batches=1, capture=True)


@needs_simulator
@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_a_planted_bug_is_caught(cupy_backend, bug):
    with caught(*bug):
        check_steps_and_a_lost_one(cupy_backend)


def test_they_pass_where_no_bug_is_planted(cupy_backend):
    check_steps_and_a_lost_one(cupy_backend)
