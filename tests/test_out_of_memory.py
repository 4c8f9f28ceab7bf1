"""Where memory runs out, one line says in which layer, and what failed can be used again."""
from __future__ import annotations

import gc
import re
from functools import partial

import numpy as np
import pytest

from gpucnn import BackendError, losses, optim
from gpucnn.backend import recycling
from gpucnn.training import evaluate, predict, train_step
from tests.conftest import needs_simulator
from tests.hungry import batch, make, run_out, state
from tests.trainings import assert_same

ASKED = {"numpy": "asked 1.2 GB", "cupy": r"asked 1.2 GB; [0-9.]+ of [0-9.]+ GB in use"}


def message(backend, place, end):
    kind = "GPU memory" if backend.name == "cupy" else "memory"
    return rf"^out of {kind} in {re.escape(place)} \({ASKED[backend.name]}\) {end}$"


HUNGRY = "Hungry 'residual1/body/hungry1'"


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_innermost_layer_is_named(backend, where):
    """And what was asked for, the batch and a remedy; a smaller batch then works as ever."""
    step, layer = make(backend)
    layer.where_it_fails, layer.most = where, 4
    with pytest.raises(BackendError, match=message(
            backend, HUNGRY, "at batch 8; try --batch-size 4 or --auto-batch")) as told:
        step(*batch())
    assert isinstance(told.value.__cause__, MemoryError)
    other, _ = make(backend)
    for (layer_, name), (theirs, _) in zip(step.model.buffers().values(),
                                           other.model.buffers().values()):
        theirs.own_buffers[name][...] = layer_.own_buffers[name]
    other.model.load_training_state(step.model.training_state())
    for each in (step, other):
        for _ in range(3):
            each(*batch(4))
    assert step.results() == other.results()
    assert_same(state(step), state(other))


def test_the_loss_and_the_optimizer_are_named(backend):
    class Loss(losses.SoftmaxCrossEntropy):
        def __call__(self, logits, labels):
            run_out(self.backend)

    class Descent(optim.GradientDescent):
        def step(self, loss=None):
            run_out(self.model.backend)

    Loss.backend = backend
    end = "at batch 8; try --batch-size 4 or --auto-batch"
    with pytest.raises(BackendError, match=message(backend, "Loss", end)):
        make(backend, loss=Loss)[0](*batch())
    for auto_batch, remedy in ((False, end), (True, "at batch 8; try --batch-size 4")):
        step, _ = make(backend, optimizer=Descent, auto_batch=auto_batch)
        with pytest.raises(BackendError, match=message(backend, "Descent", remedy)):
            step(*batch())
        assert step.micro_batches == 1, "smaller parts would not help it"


def test_evaluation_and_prediction_and_plain_steps(backend):
    step, layer = make(backend)
    x, t = batch()
    layer.most = 4
    here = message(backend, HUNGRY, "at batch 8; try batches of 4")
    with pytest.raises(BackendError, match=here):
        evaluate(step.model, [(x, t)])
    with pytest.raises(BackendError, match=here):
        predict(step.model, x)
    with pytest.raises(BackendError, match=here):
        train_step(step.model, step._loss, step.optimizer, x, t)
    layer.most = 0
    with pytest.raises(BackendError, match=message(
            backend, HUNGRY, "at batch 1; try a smaller network or smaller images")):
        predict(step.model, x[:1])


def test_parts_of_a_batch(backend):
    step, layer = make(backend, micro_batches=2)
    layer.most = 3
    with pytest.raises(BackendError, match=message(
            backend, HUNGRY, "at batch 8 in micro-batches of 4; try --batch-size 4 or "
            "--auto-batch")):
        step(*batch())


def test_what_is_not_known_is_left_out(monkeypatch, backend):
    step, layer = make(backend)
    layer.most = 4
    monkeypatch.setattr(type(backend), "memory_in_use", lambda self: None)
    monkeypatch.setattr("tests.hungry.run_out", partial(_raise, MemoryError("none")))
    with pytest.raises(BackendError, match=f"memory in {HUNGRY} at batch 8; try --batch-size"):
        step(*batch())


def _raise(error, *ignored):
    raise error


@needs_simulator
def test_nothing_of_the_failed_step_stays_in_memory(cupy_backend):
    """Also while somebody has the error, and without a search for cycles."""
    step, layer = make(cupy_backend)
    inputs = step.inputs(*batch())
    layer.where_it_fails, layer.most = "backward", 4
    pool = cupy_backend.xp.get_default_memory_pool()
    gc.collect()
    gc.disable()
    try:
        before = pool.used_bytes()
        with pytest.raises(BackendError) as told:
            step(*inputs)
        assert told.value.__cause__ is not None
        assert pool.used_bytes() == before
        assert pool.total_bytes() == before, "and it was given back"
    finally:
        gc.enable()


def test_the_cpu_frees_what_it_keeps_before_there_is_too_little(monkeypatch):
    keeper, empty = recycling.Recycler(), np.empty

    def limited(shape, dtype=float):
        if shape == 3 << 20 and sum(buffer.nbytes for buffer in keeper.buffers) > 2 << 20:
            raise MemoryError
        return empty(shape, dtype)

    monkeypatch.setattr(np, "empty", limited)
    held, gone = (keeper.empty((2 << 20,), np.uint8) for _ in range(2))
    held[...] = 7
    with pytest.raises(MemoryError):
        keeper.empty((3 << 20,), np.uint8)
    del gone
    assert keeper.empty((3 << 20,), np.uint8).size == 3 << 20
    keeper.free_unused()
    assert sum(buffer.nbytes for buffer in keeper.buffers) == 2 << 20
    assert (held == 7).all()


@needs_simulator
def test_the_limit_of_a_pool(cupy_backend):
    """Of CuPy's own: the error and the numbers are its."""
    step, _ = make(cupy_backend)
    inputs, pool = step.inputs(*batch()), cupy_backend.xp.get_default_memory_pool()
    gc.collect()
    used = pool.used_bytes()
    pool.set_limit(size=used + 500)
    try:
        in_use = f"{used / 1e3:.1f} of {(used + 500) / 1e3:.1f} kB in use"
        with pytest.raises(BackendError, match=r"^out of GPU memory in BatchNorm 'norm1' \(asked "
                                               rf"0.5 kB; {in_use}\) at batch 8; "):
            step(*inputs)
    finally:
        pool.set_limit(size=0)
    step(*inputs)
    assert np.isfinite(step.results()[0].loss)
