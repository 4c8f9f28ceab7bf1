"""Learning rate schedules: torch's, and their ends."""
from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest

from gpucnn.schedules import constant, cosine, one_cycle, step_decay, warm_up

RATE, STEPS = 0.3, 40


def torchs(make):
    """The rates of so many steps by a scheduler of torch."""
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], RATE)
    scheduler = make(torch.optim.lr_scheduler, optimizer)
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that optimizer.step() was not called
        for _ in range(STEPS):
            rates.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
    return rates


# name: (ours, torch's)
SCHEDULES = {
    "constant": (constant(RATE), lambda s, o: s.LambdaLR(o, lambda step: 1.0)),
    "step": (step_decay(RATE, 7, 0.5), lambda s, o: s.StepLR(o, 7, 0.5)),
    "cosine": (cosine(RATE, STEPS), lambda s, o: s.CosineAnnealingLR(o, STEPS)),
    "cosine to a rate": (cosine(RATE, STEPS, 0.1), lambda s, o: s.CosineAnnealingLR(o, STEPS, 0.1)),
    "one cycle": (one_cycle(RATE, STEPS), lambda s, o: s.OneCycleLR(o, RATE, STEPS)),
    "one cycle, other": (one_cycle(RATE, STEPS, 0.45, 0.1, 0.01), lambda s, o: s.OneCycleLR(
        o, RATE, STEPS, pct_start=0.45, div_factor=10, final_div_factor=100)),
    "warm-up": (warm_up(constant(RATE), 5),
                lambda s, o: s.LinearLR(o, start_factor=1 / 5, total_iters=4)),
}


@pytest.mark.parametrize(("ours", "theirs"), SCHEDULES.values(), ids=SCHEDULES)
def test_a_schedule_is_torchs(ours, theirs):
    np.testing.assert_allclose([ours(step) for step in range(STEPS)], torchs(theirs), rtol=1e-9)


def test_the_last_rate_stays():
    for schedule in (cosine(RATE, STEPS, 0.1), one_cycle(RATE, STEPS)):
        assert schedule(STEPS) == schedule(10 * STEPS)
        assert schedule(STEPS) == pytest.approx(schedule(STEPS - 1), abs=1e-3)


def test_a_warm_up_of_another_schedule():
    schedule = warm_up(cosine(RATE, STEPS), 4)
    assert [schedule(i) for i in range(3)] == [
        pytest.approx(cosine(RATE, STEPS)(i) * (i + 1) / 4) for i in range(3)]
    assert schedule(4) == cosine(RATE, STEPS)(4)


def test_cycles_of_a_few_steps():
    """Where the rise has hardly a step: no rate is negative, or over the highest."""
    for steps, rise in itertools.product(range(1, 12), (0.01, 0.3, 0.5, 0.99)):
        rates = [one_cycle(RATE, steps, rise)(step) for step in range(steps)]
        assert all(0 < rate <= RATE * (1 + 1e-12) for rate in rates), (steps, rise)


@pytest.mark.parametrize(("make", "kind", "message"), [
    (lambda: constant(-1.0), ValueError, "rate must be >= 0 and finite, got -1.0"),
    (lambda: constant("fast"), TypeError, "rate must be a number, got 'fast'"),
    (lambda: constant(float("nan")), ValueError, "rate must be >= 0 and finite, got nan"),
    (lambda: step_decay(RATE, 0), ValueError, "every must be >= 1, got 0"),
    (lambda: step_decay(RATE, 2, -1), ValueError, "factor must be >= 0 and finite, got -1"),
    (lambda: cosine(RATE, 2.5), TypeError, "steps must be an int, got 2.5"),
    (lambda: one_cycle(RATE, 9, 1.0), ValueError, "rise must be > 0 and < 1, got 1.0"),
    (lambda: warm_up(constant(RATE), True), TypeError, "steps must be an int, got True"),
])
def test_what_is_no_schedule_is_refused(make, kind, message):
    with pytest.raises(kind, match=f"^schedule: {message}$"):
        make()
