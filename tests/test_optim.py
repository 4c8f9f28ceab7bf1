"""Optimisers against the formulas of their docstrings, one number at a time."""
from __future__ import annotations

from math import sqrt

import numpy as np
import pytest

from gpucnn import optim
from gpucnn.layers import Dense

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


def test_the_learning_rate_may_change_between_steps():
    model = make_model()
    optimizer = optim.GradientDescent(model, 1.0)
    model.flat_grad[...] = 1
    before = model.flat_data.copy()
    optimizer.step()
    optimizer.learning_rate = 0.25
    optimizer.step()
    np.testing.assert_allclose(before - model.flat_data, 1.25, rtol=1e-12)


@pytest.mark.parametrize(("make", "message"), [
    (lambda m: optim.GradientDescent(m, -0.1), "learning_rate must be >= 0 and < inf, got -0.1"),
    (lambda m: optim.Adam(m, float("nan")), "learning_rate must be >= 0 and < inf, got nan"),
    (lambda m: optim.Momentum(m, momentum=1.0), "momentum must be >= 0 and < 1, got 1.0"),
    (lambda m: optim.RMSProp(m, rho=-0.5), "rho must be >= 0 and < 1, got -0.5"),
    (lambda m: optim.Adam(m, beta1=1), "beta1 must be >= 0 and < 1, got 1"),
    (lambda m: optim.Adam(m, beta2=2), "beta2 must be >= 0 and < 1, got 2"),
    (lambda m: optim.AdamW(m, weight_decay=-1), "weight_decay must be >= 0 and < inf, got -1"),
])
def test_settings_out_of_range(make, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        make(make_model())
