"""Optimisers against the formulas of their docstrings, one number at a time."""
from __future__ import annotations

from math import sqrt
from types import SimpleNamespace

import numpy as np
import pytest

from gpucnn import losses, optim, reference, training
from gpucnn.backend import use_backend
from gpucnn.layers import Dense
from tests.conftest import needs_cupy

RATE = 0.1


def descent(t, g, s, theta):
    return theta - RATE * g


def momentum(t, g, s, theta):
    s["v"] = 0.8 * s.get("v", 0) + g
    return theta - RATE * s["v"]


def nesterov(t, g, s, theta):
    s["v"] = 0.8 * s.get("v", 0) + g
    return theta - RATE * (g + 0.8 * s["v"])


def rms_prop(t, g, s, theta):
    s["s"] = 0.7 * s.get("s", 0) + 0.3 * g**2
    return theta - RATE * g / (sqrt(s["s"]) + 0.01)


def adam(t, g, s, theta):
    s["m"] = 0.8 * s.get("m", 0) + 0.2 * g
    s["s"] = 0.9 * s.get("s", 0) + 0.1 * g**2
    return theta - RATE * (s["m"] / (1 - 0.8**t)) / (sqrt(s["s"] / (1 - 0.9**t)) + 0.01)


def adam_w(t, g, s, theta):
    return adam(t, g, s, theta) - RATE * 0.5 * theta


# name: (the optimiser, its formula for a weight, its formula for a bias)
OPTIMIZERS = {
    "GradientDescent": (lambda m: optim.GradientDescent(m, RATE), descent, descent),
    "Momentum": (lambda m: optim.Momentum(m, RATE, 0.8), momentum, momentum),
    "Nesterov": (lambda m: optim.Momentum(m, RATE, 0.8, nesterov=True), nesterov, nesterov),
    "RMSProp": (lambda m: optim.RMSProp(m, RATE, 0.7, 0.01), rms_prop, rms_prop),
    "Adam": (lambda m: optim.Adam(m, RATE, 0.8, 0.9, 0.01), adam, adam),
    "AdamW": (lambda m: optim.AdamW(m, RATE, 0.8, 0.9, 0.01, 0.5), adam_w, adam),
}


def make_model(dtype=np.float64):
    model = Dense(2)
    model.build((3,), seed=4, dtype=dtype)
    return model


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_follow_the_formula(name, backend, rng):
    make, for_weights, for_biases = OPTIMIZERS[name]
    model = make_model()
    optimizer = make(model)
    theta = list(backend.to_numpy(model.flat_data))
    states = [{} for _ in theta]
    for t in range(1, 6):
        g = rng.standard_normal(len(theta))
        model.flat_grad[...] = backend.asarray(g)
        optimizer.step()
        for i, state in enumerate(states):
            formula = for_weights if i < model.decayed_size else for_biases
            theta[i] = formula(t, g[i], state, theta[i])
        # About 20 roundings a step, each of at most u = 1.1e-16 times the largest number in it.
        np.testing.assert_allclose(backend.to_numpy(model.flat_data), theta, rtol=0, atol=1e-13)
        np.testing.assert_array_equal(backend.to_numpy(model.flat_grad), g)
    assert optimizer.steps == 5


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_float32_stays_float32(name, backend):
    model = make_model(np.float32)
    optimizer = OPTIMIZERS[name][0](model)
    model.flat_grad[...] = 1
    before = model.flat_data.copy()
    optimizer.step()
    assert (model.w.data.ravel() != before[:6]).all()  # it is a view of what was updated
    for a in (model.flat_data, *optimizer.state.values()):
        assert a.dtype == np.float32
        assert a.shape == before.shape


def test_the_learning_rate_may_change_between_steps(backend):
    model = make_model()
    optimizer = optim.GradientDescent(model, 1.0)
    model.flat_grad[...] = 1
    before = model.flat_data.copy()
    optimizer.step()
    optimizer.learning_rate = 0.25
    optimizer.step()
    np.testing.assert_allclose(backend.to_numpy(before - model.flat_data), 1.25, rtol=1e-12)


def everything_of(optimizer):
    """All that a step may change, on the host."""
    backend = optimizer.model.backend
    return {"theta": np.array(backend.to_numpy(optimizer.model.flat_data)),
            **optimizer.state_dict()}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("wrong", [np.inf, -np.inf, np.nan])
def test_a_step_whose_gradients_are_not_finite_changes_nothing_but_the_scale(name, wrong, backend):
    model = make_model(np.float32)
    scale = optim.LossScale(model, 1024)
    optimizer = OPTIMIZERS[name][0](model)
    optimizer.loss_scale = scale
    model.flat_cast = backend.xp.zeros_like(model.flat_data)
    model.flat_grad[...] = 1
    optimizer.step()
    before, copy = everything_of(optimizer), backend.to_numpy(model.flat_cast).copy()
    model.flat_grad[-1] = wrong
    optimizer.step()
    after = everything_of(optimizer)
    assert (before.pop("loss_scale").tolist(), after.pop("loss_scale").tolist()) == (
        [1024, 1], [512, 0])
    for k, a in before.items():
        np.testing.assert_array_equal(after[k], a, err_msg=k)
    np.testing.assert_array_equal(backend.to_numpy(model.flat_cast), copy)
    np.testing.assert_array_equal(copy, after["theta"])


def test_the_loss_scale_follows_its_schedule(backend, rng):
    model = make_model(np.float32)
    scale = optim.LossScale(model, 8, growth_interval=3)
    optimizer = optim.Adam(model, loss_scale=scale)
    want, good, steps = 8, 0, 0
    for finite in rng.random(60) < 0.85:
        model.flat_grad[...] = 1 if finite else np.inf
        optimizer.step()
        want, good = reference.loss_scale(want, good, finite, 3)
        steps += finite
        assert backend.to_numpy(scale.value).tolist() == [want, good]
    assert optimizer.steps == steps
    assert float(scale) == want


def test_a_loss_scale_does_not_vanish(backend):
    model = make_model(np.float32)
    scale = optim.LossScale(model, 2.0**-125)
    optimizer = optim.Adam(model, loss_scale=scale)
    for value in (np.nan, np.nan, np.nan, 2.0**-126):
        model.flat_grad[...] = value
        optimizer.step()
    assert float(scale) == 2.0**-126
    assert optimizer.gradient_norm == pytest.approx(model.flat_grad.size**0.5)


def test_a_loss_scale_goes_in_and_out_again(backend, rng):
    """In powers of two it changes no bit."""
    x, t = rng.standard_normal((8, 3)), np.arange(8) % 2
    results = []
    for scaled in (False, True):
        model = make_model(np.float32)
        scale = optim.LossScale(model, 2.0**10) if scaled else None
        optimizer = optim.Adam(model, clip_norm=0.5, loss_scale=scale)
        loss = losses.SoftmaxCrossEntropy(loss_scale=scale)
        history = [training.train_step(model, loss, optimizer, x, t) for _ in range(3)]
        results.append((history, backend.to_numpy(model.flat_data).tolist()))
    assert results[0] == results[1]


def gradient_after_clipping(backend, g, limit):
    """The norm and what is left of g by clip_norm, which must do as clip_gradients() does."""
    model = SimpleNamespace(backend=backend, built=True, flat_cast=None, decayed_size=0,
                            flat_data=backend.xp.zeros(len(g), g.dtype),
                            flat_grad=backend.asarray(g.copy()))
    optimizer = optim.GradientDescent(model, 1.0, clip_norm=limit)
    optimizer.step()
    np.testing.assert_array_equal(backend.to_numpy(model.flat_grad), g)
    norm = optimizer.clip_gradients(limit)
    assert norm == pytest.approx(optimizer.gradient_norm, rel=1e-6, abs=0)
    left = backend.to_numpy(model.flat_grad)
    np.testing.assert_allclose(backend.to_numpy(model.flat_data), -left, rtol=3e-7, atol=0)
    return norm, left


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1, 3, 1025, 70001])
def test_clipping_equals_the_reference(size, dtype, backend, rng):
    g = rng.standard_normal(size).astype(dtype)
    for limit in (0, 0.1, 1e3):
        want, norm = reference.clip(g, limit)
        got_norm, got = gradient_after_clipping(backend, g, limit)
        assert got_norm == pytest.approx(norm, rel=1e-6)
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_clipping_forgets_the_loss_scale_and_leaves_it_in_the_gradients(backend):
    model = make_model(np.float32)
    model.flat_grad[...] = 0
    model.flat_grad[:2] = backend.asarray(np.array([3, 4]) * 8, np.float32)
    optimizer = optim.GradientDescent(model, loss_scale=optim.LossScale(model, 8))
    assert optimizer.clip_gradients(5) == 5
    assert backend.to_numpy(model.flat_grad)[:2].tolist() == [24, 32]
    assert optimizer.clip_gradients(2.5) == 5
    assert backend.to_numpy(model.flat_grad)[:2].tolist() == [12, 16]


def test_clipping_around_the_limit(backend):
    g = np.array([3, 4], np.float32)
    for limit, length in ((5 - 1e-6, 5 - 1e-6), (5, 5), (5 + 1e-6, 5)):
        norm, left = gradient_after_clipping(backend, g, limit)
        assert norm == 5
        if length == 5:
            np.testing.assert_array_equal(left, g)
        else:
            assert np.hypot(*left.astype(float)) == pytest.approx(length, rel=1e-7)
            assert left[0] < 3


@pytest.mark.parametrize(("value", "dtype"), [(1e30, np.float32), (1e-30, np.float32),
                                              (3e38, np.float32), (1e150, np.float64)])
def test_the_norm_of_huge_and_tiny_gradients(value, dtype, backend):
    """Squared in float32 they would be infinite or 0."""
    g = np.array([3, 0, 4, 0], dtype) * dtype(value / 5)
    norm, left = gradient_after_clipping(backend, g, value / 2)
    assert norm == pytest.approx(value, rel=1e-6)
    np.testing.assert_allclose(left, g / 2, rtol=1e-6)


def test_a_huge_gradient_is_not_taken_for_an_infinite_one(backend):
    model = make_model(np.float32)
    model.flat_grad[...] = 3e38
    optimizer = optim.Momentum(model, loss_scale=optim.LossScale(model))
    optimizer.step()
    assert optimizer.steps == 1


@pytest.mark.parametrize("name", optim.BY_NAME)
def test_each_optimizer_can_shrink_weights_and_spares_biases(name, backend, rng):
    models = [make_model() for _ in range(2)]
    d, before = models[0].decayed_size, backend.to_numpy(models[0].flat_data).copy()
    g = rng.standard_normal(before.size)
    for model, decay in zip(models, (0.0, 0.5)):
        model.flat_grad[...] = backend.asarray(g)
        optim.BY_NAME[name](model, learning_rate=RATE, weight_decay=decay).step()
    plain, shrunk = (backend.to_numpy(model.flat_data) for model in models)
    np.testing.assert_allclose(shrunk[:d], plain[:d] - RATE * 0.5 * before[:d], rtol=0, atol=1e-15)
    np.testing.assert_array_equal(shrunk[d:], plain[d:])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clipping_and_the_update_equal_torch(name, backend, rng):
    torch = pytest.importorskip("torch")
    make, _, _ = OPTIMIZERS[name]
    model = make_model()
    d = model.decayed_size
    optimizer = make(model)
    optimizer.clip_norm = 0.7
    parts = [torch.tensor(backend.to_numpy(a).copy()).requires_grad_()
             for a in (model.flat_data[:d], model.flat_data[d:])]
    torchs = {
        "GradientDescent": lambda p: torch.optim.SGD(p, RATE),
        "Momentum": lambda p: torch.optim.SGD(p, RATE, 0.8),
        "Nesterov": lambda p: torch.optim.SGD(p, RATE, 0.8, nesterov=True),
        "RMSProp": lambda p: torch.optim.RMSprop(p, RATE, 0.7, 0.01),
        "Adam": lambda p: torch.optim.Adam(p, RATE, (0.8, 0.9), 0.01),
        "AdamW": lambda p: torch.optim.AdamW([{"params": p[:1], "weight_decay": 0.5},
                                              {"params": p[1:], "weight_decay": 0}],
                                             RATE, (0.8, 0.9), 0.01)}[name](parts)
    for step in range(6):
        g = rng.standard_normal(model.flat_grad.size) * 0.25
        model.flat_grad[...] = backend.asarray(g)
        for part, grad in zip(parts, (g[:d], g[d:])):
            part.grad = torch.tensor(grad)
        norm = torch.nn.utils.clip_grad_norm_(parts, 0.7)
        torchs.step()
        optimizer.step()
        assert optimizer.gradient_norm == pytest.approx(float(norm), rel=1e-12)
        # torch divides by norm + 1e-6, and each step after the first inherits that.
        np.testing.assert_allclose(
            backend.to_numpy(model.flat_data), np.concatenate([p.detach() for p in parts]),
            rtol=0, atol=(step + 1) * 1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_equals_an_uninterrupted_one(name, backend, rng):
    gradients = rng.standard_normal((6, make_model().flat_grad.size))
    results = []
    for interrupted in (False, True):
        model = make_model()
        optimizer = OPTIMIZERS[name][0](model)
        optimizer.loss_scale = optim.LossScale(model, 4, growth_interval=4)
        for i, g in enumerate(gradients):
            if interrupted and i == 3:
                saved, theta = optimizer.state_dict(), model.flat_data
                model = make_model()
                model.flat_data[...] = theta
                optimizer = OPTIMIZERS[name][0](model)
                optimizer.loss_scale = optim.LossScale(model, 4, growth_interval=4)
                optimizer.load_state_dict(saved)
            model.flat_grad[...] = backend.asarray(g)
            optimizer.step()
        results.append({k: a.tolist() for k, a in everything_of(optimizer).items()})
    assert results[0] == results[1]
    assert results[0]["steps"] == 6
    assert results[0]["loss_scale"] == [8, 2]


@needs_cupy
def test_state_moves_between_backends():
    states = []
    for name in ("numpy", "cupy"):
        with use_backend(name):
            optimizer = optim.Adam(make_model())
        if states:
            optimizer.load_state_dict(states[0])
        else:
            optimizer.model.flat_grad[...] = 1
            optimizer.step()
        states.append(optimizer.state_dict())
    assert all(isinstance(a, np.ndarray) for a in states[1].values())
    assert ({k: a.tolist() for k, a in states[0].items()}
            == {k: a.tolist() for k, a in states[1].items()})
    with pytest.raises(ValueError, match="the state of this Momentum is {'v': .16,., 'steps': ..}, "
                                         "got {'m'"):
        optim.Momentum(make_model()).load_state_dict(states[0])


@pytest.mark.parametrize("base", [optim.Optimizer, optim.Adam])
def test_an_optimizer_of_ones_own_is_array_code_on_both_backends(base, backend):
    class Signs(base):
        state_names = ("m", "s")

        def update(self, g, *state):
            state[0][...] += 1
            return self.learning_rate * self.xp.sign(g)

    model = make_model()
    optimizer = Signs(model, 0.5, clip_norm=1.0, loss_scale=optim.LossScale(model))
    before = backend.to_numpy(model.flat_data).copy()
    for value in (2, np.nan, -3):
        model.flat_grad[...] = value
        optimizer.step()
        if value == 2:
            np.testing.assert_array_equal(backend.to_numpy(model.flat_data), before - 0.5)
    np.testing.assert_array_equal(backend.to_numpy(model.flat_data), before - 0.5 + 0.5)
    assert optimizer.steps == 2
    assert (backend.to_numpy(optimizer.state["m"]) == 2).all()


@pytest.mark.parametrize(("make", "message"), [
    (lambda m: optim.Adam(m, clip_norm=-1), "clip_norm must be >= 0 and < inf, got -1"),
    (lambda m: setattr(optim.Adam(m), "learning_rate", -2), "learning_rate must be >= 0 .* got -2"),
    (lambda m: optim.LossScale(m, 0), "initial must be >= .* got 0"),
    (lambda m: optim.LossScale(m, growth_interval=0), "growth_interval must be >= 1, got 0"),
    (lambda m: optim.GradientDescent(m, -0.1), "learning_rate must be >= 0 and < inf, got -0.1"),
    (lambda m: optim.Adam(m, float("nan")), "learning_rate must be >= 0 and < inf, got nan"),
    (lambda m: optim.Momentum(m, momentum=1.0), "momentum must be >= 0 and < 1, got 1.0"),
    (lambda m: optim.RMSProp(m, rho=-0.5), "rho must be >= 0 and < 1, got -0.5"),
    (lambda m: optim.Adam(m, beta1=1), "beta1 must be >= 0 and < 1, got 1"),
    (lambda m: optim.Adam(m, beta2=2), "beta2 must be >= 0 and < 1, got 2"),
    (lambda m: optim.AdamW(m, weight_decay=-1), "weight_decay must be >= 0 and < inf, got -1"),
    (lambda m: optim.Adam(m).clip_gradients(-1), "the norm's limit must be >= 0, got -1"),
    (lambda m: optim.Adam(m).clip_gradients(np.nan), "the norm's limit must be >= 0, got nan"),
    (lambda m: training.train_step(m, losses.SoftmaxCrossEntropy(
        loss_scale=optim.LossScale(m)), optim.Adam(m), np.ones((2, 3)), [0, 1]),
     "the loss and the optimizer have different loss scales; give both the same optim.LossScale, "
     "or neither"),
])
def test_settings_out_of_range(make, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        make(make_model())


@pytest.mark.parametrize(("make", "message"), [
    (lambda m: optim.Adam(m, clip_norm="1"), "clip_norm must be a number, got '1'"),
    (lambda m: optim.Adam(m, None), "learning_rate must be a number, got None"),
    (lambda m: optim.LossScale(m, "8"), "initial must be a number, got '8'"),
    (lambda m: optim.LossScale(m, growth_interval=1.5), "growth_interval must be an int, got 1.5"),
    (lambda m: optim.Adam(m, loss_scale=8.0), "loss_scale must be an optim.LossScale .* got 8.0"),
    (lambda m: losses.MeanSquaredError(loss_scale=8.0),
     "loss_scale must be an optim.LossScale or None, got 8.0"),
    (lambda m: losses.SoftmaxCrossEntropy(loss_scale=8.0),
     "loss_scale must be an optim.LossScale or None, got 8.0"),
])
def test_settings_of_a_wrong_type(make, message):
    with pytest.raises(TypeError, match=f"^{message}$"):
        make(make_model())
