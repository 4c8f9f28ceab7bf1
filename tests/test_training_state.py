"""What training needs to go on beside parameters and buffers: the counters of dropouts."""
from __future__ import annotations

import numpy as np
import pytest

from gpucnn import use_backend
from gpucnn.layers import Dense, Dropout, Residual, Sequential
from gpucnn.models import load_weights, save_model
from tests.conftest import needs_cupy
from tests.trainings import Training, assert_same


def nested():
    model = Sequential([Dropout(0.2), Residual(Sequential([Dense(4), Dropout(0.5)])), Dense(3)])
    model.build((4,), seed=1)
    return model


def test_training_goes_on_with_the_same_bits(backend, tmp_path):
    """From the model, the optimizer's state, and this; without it other masks would be drawn."""
    expected = Training(backend.name)
    expected.run(0)
    save_model(expected.model, tmp_path / "m.safetensors")
    kept = expected.optimizer.state_dict(), expected.model.training_state()
    results = expected.run(1, 2)

    resumed, without = Training(backend.name), Training(backend.name)
    for training in (resumed, without):
        load_weights(training.model, tmp_path / "m.safetensors")
        training.optimizer.load_state_dict(kept[0])
    resumed.model.load_training_state(kept[1])
    assert kept[1].keys() == {"dropout1/step"}
    assert kept[1]["dropout1/step"].tolist() == [3], "a copy of what was then"
    assert resumed.run(1, 2) == results
    assert_same(resumed.state(), expected.state())
    assert without.run(1, 2) != results


def test_a_captured_step_does_not_miss_it(cupy_backend):
    captured, plain = (Training("cupy", capture=capture) for capture in (True, False))
    for training in (captured, plain):
        training.run(0, 1)
        training.model.load_training_state({"dropout1/step": np.array([1])})
    assert captured.run(2) == plain.run(2)


@needs_cupy
@pytest.mark.parametrize("order", [("numpy", "cupy"), ("cupy", "numpy")], ids="to".join)
def test_from_one_backend_to_the_other(order):
    states = []
    for name in order:
        with use_backend(name) as backend:
            model = nested()
            if states:
                model.load_training_state(states[0])
            else:
                model.forward(backend.asarray(np.ones((2, 4), np.float32)), training=True)
                model.layers[0].step = 2**40
            states.append(model.training_state())
    assert_same(*states)
    assert states[0].keys() == {"dropout1/step", "residual1/body/dropout1/step"}
    assert [a.tolist() for a in states[1].values()] == [[2**40], [1]]
    assert {a.dtype for a in states[1].values()} == {np.dtype(np.int64)}


def test_what_does_not_fit_is_refused_and_changes_nothing(backend):
    model = nested()
    first, second = "dropout1/step", "residual1/body/dropout1/step"
    good = {first: np.array([5]), second: np.array([6])}
    with pytest.raises(ValueError, match=r"^Sequential: the training state has \['dropout1/step', "
                                         r"'residual1/body/dropout1/step'\], got "
                                         r"\['dropout1/step'\]; give that of a model of the same"):
        model.load_training_state({first: good[first]})
    for wrong, shown in ((np.array([1.5]), r"float64 \[1.5\]"), (np.array([-1]), r"int64 \[-1\]"),
                         (np.array(3), "int64 3"), (np.array([1, 2]), r"int64 \[1, 2\]")):
        with pytest.raises(ValueError, match="^Sequential: residual1/body/dropout1/step must be an "
                                             r"int64 >= 0 of shape \(1,\), got " + shown):
            model.load_training_state({**good, second: wrong})
    assert [a.tolist() for a in model.training_state().values()] == [[0], [0]]


def test_a_model_without_counters_has_none(backend):
    model = Sequential([Dense(2)])
    model.build((3,))
    assert model.training_state() == {}
    model.load_training_state({})
