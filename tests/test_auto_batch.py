"""auto_batch: a step that runs out of memory goes on in smaller parts, as if it had begun so."""
from __future__ import annotations

import warnings

import numpy as np
import pytest

from gpucnn import BackendError, losses, optim
from gpucnn.layers import Dense, Sequential
from gpucnn.training import TrainStep
from tests.conftest import needs_simulator
from tests.hungry import batch, make, state
from tests.trainings import Training, assert_same


def falling(images, micro_batch):
    return pytest.warns(RuntimeWarning, match=(
        rf"^out of (GPU )?memory in Hungry 'residual1/body/hungry1' \(.*\) at batch {images}; "
        rf"going on with micro-batches of {micro_batch}$"))


@pytest.mark.parametrize(("where", "capture"), [("forward", True), ("backward", False)])
def test_the_bits_are_those_of_the_micro_batches(backend, where, capture):
    """Nothing is left of the two attempts: no statistics of batch norm, no count of a dropout."""
    fell, layer = make(backend, average=True, capture=capture, auto_batch=True)
    layer.most, layer.where_it_fails = 2, where
    given, _ = make(backend, average=True, capture=capture, micro_batches=4)
    with falling(8, 2) as said:
        fell(*batch())
    given(*batch())
    assert len(said) == 1
    assert (fell.micro_batches, layer.failures) == (4, 2)
    for step in (fell, given):
        for n in (8, 8, 5, 8, 5, 5):
            step(*batch(n))
    assert fell.results() == given.results()
    assert_same(state(fell), state(given))
    assert layer.failures == 2
    assert len(fell._graphs) == len(given._graphs) == (2 if fell.capture else 0)


def test_from_that_step_on(backend):
    """A larger batch comes later; what was computed before it stays."""
    fell, layer = make(backend, auto_batch=True)
    given, _ = make(backend)
    layer.most = 8
    for step in (fell, given):
        for _ in range(3):
            step(*batch(8))
    given.micro_batches = 2
    with falling(16, 8):
        fell(*batch(16))
    given(*batch(16))
    for step in (fell, given):
        for n in (16, 16, 8, 8):
            step(*batch(n))
    assert fell.results() == given.results()
    assert_same(state(fell), state(given))


def test_a_loader_gives_the_batch_once(backend):
    """What is gathered is not gathered again: the place in the data has moved on."""
    for streamed in (False, True):
        fell, given = (Training(backend.name, "plain", streamed=streamed, **options)
                       for options in ({"auto_batch": True}, {"micro_batches": 2}))
        dense, forward = fell.model.layers[-1], fell.model.layers[-1].forward

        def eat(x, training=False, forward=forward):
            if len(x) > 2:
                raise MemoryError
            return forward(x, training)

        dense.forward = eat
        with pytest.warns(RuntimeWarning, match="memory at batch 4; going on|memory .* at batch 4"):
            results = fell.run(0)
        assert results == given.run(0)
        assert_same(fell.state(), given.state())


def test_one_image_that_is_too_large(backend):
    """It ends in an error, and with the state from before the step."""
    step, layer = make(backend, auto_batch=True)
    layer.most = 4
    step(*batch(4))
    before = state(step)
    layer.most = 0
    with pytest.raises(BackendError, match=(
            r"^out of (GPU )?memory in Hungry 'residual1/body/hungry1' \(.*\) at batch 6 in "
            "micro-batches of 1; try a smaller network or smaller images$")):
        step(*batch(6))
    assert step.micro_batches == 8
    assert_same(state(step), before)
    layer.most = 4
    step(*batch(6))
    assert len(step.results()) == 2


def test_where_a_shape_had_memory_enough_it_is_an_error(backend):
    """What the step changes is copied before the first one alone."""
    step, layer = make(backend, auto_batch=True, capture=False)
    step(*batch(8))
    layer.most = 4
    with pytest.raises(BackendError, match="at batch 8; try --batch-size 4$"):
        step(*batch(8))


def test_the_memory_of_graphs_is_given_up_first(cupy_backend):
    """Which may be enough: the parts stay as large as they are, and the graph is made anew."""
    step, layer = make(cupy_backend, auto_batch=True)
    plain, _ = make(cupy_backend, capture=False)
    for each in (step, plain):
        for _ in range(3):
            each(*batch(8))
    assert len(step._graphs) == 1

    def once(x, where, eat=layer.eat):
        layer.most = 99 if layer.failures else 8
        eat(x, where)

    layer.eat = once
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n, graphs in ((16, 0), (8, 1), (16, 2), (8, 2)):
            step(*batch(n))
            plain(*batch(n))
            assert len(step._graphs) == graphs
    assert layer.failures == 1
    assert step.micro_batches == 1
    assert step.results() == plain.results()
    assert_same(state(step), state(plain))


def net(**options):
    model = Sequential([Dense(32, activation="relu"), Dense(32, activation="relu"), Dense(10)])
    model.build((32,))
    return TrainStep(model, losses.SoftmaxCrossEntropy(), optim.GradientDescent(model), **options)


@needs_simulator
def test_the_limit_of_a_pool(cupy_backend):
    """CuPy's own error, and with so much memory as four parts take."""
    x, t = np.ones((128, 32), np.float32), np.arange(128) % 10
    pool = cupy_backend.xp.get_default_memory_pool()
    given, fell = net(micro_batches=4), net(auto_batch=True)
    inputs = [step.inputs(x, t) for step in (given, fell)]
    pool.free_all_blocks()
    before = pool.used_bytes()
    given(*inputs[0])
    pool.set_limit(size=pool.total_bytes() + 1024)  # for the copy of nothing, and the results
    try:
        with pytest.warns(RuntimeWarning, match=r"^out of GPU memory in Dense 'dense3' \(asked .* "
                                                r"in use\) at batch 128; going on with "
                                                "micro-batches of 32$"):
            fell(*inputs[1])
    finally:
        pool.set_limit(size=0)
    assert pool.used_bytes() <= before + 1024
    assert fell.micro_batches == 4
    for step, batch_ in zip((given, fell), inputs):
        for _ in range(2):
            step(*batch_)
    assert given.results() == fell.results()
    np.testing.assert_array_equal(*(cupy_backend.to_numpy(step.model.flat_data)
                                    for step in (given, fell)))


def test_the_largest_array_of_the_cpu(monkeypatch):
    """NumPy's own error, where no array may be larger than those of parts of 32 images."""
    empty, least = np.empty, 32 * 1024 * 4

    def limited(shape, dtype=float, **options):
        if np.prod(shape, dtype=np.int64) * np.dtype(dtype).itemsize > least:
            return empty(1 << 60, np.float32)  # nobody has so much
        return empty(shape, dtype, **options)

    x, t = np.ones((128, 8), np.float32), np.arange(128) % 10
    steps = []
    for options in ({"micro_batches": 4}, {"auto_batch": True}):
        model = Sequential([Dense(1024, activation="relu"), Dense(10)])
        model.build((8,))
        steps.append(TrainStep(model, losses.SoftmaxCrossEntropy(), optim.Adam(model), **options))
    given, fell = steps
    monkeypatch.setattr(np, "empty", limited)
    with pytest.warns(RuntimeWarning, match=r"^out of memory in Dense 'dense1' \(asked [0-9.]+ GB\)"
                                            " at batch 128; going on with micro-batches of 32$"):
        fell(x, t)
    for step in (given, given, fell):
        step(x, t)
    assert fell.micro_batches == 4
    assert given.results() == fell.results()


def test_what_is_wrong_is_refused(backend):
    with pytest.raises(TypeError, match="^TrainStep: auto_batch must be True or False, got 2$"):
        make(backend, auto_batch=2)
