"""Learning rates that change from step to step.

A schedule is a function: how many steps were made before this one -> the learning rate of this one.
Any such function will do; each of these is that of torch.optim.lr_scheduler with the same name.
"""
from __future__ import annotations

import math
from collections.abc import Callable

from gpucnn.geometry import is_int

Schedule = Callable[[int], float]


def constant(rate: float) -> Schedule:
    """Always the same."""
    _check_rate("rate", rate)
    return lambda step: rate


def step_decay(rate: float, every: int, factor: float = 0.1) -> Schedule:
    """rate, multiplied with factor after each `every` steps (StepLR)."""
    _check_rate("rate", rate)
    _check_steps("every", every)
    _check_rate("factor", factor)
    return lambda step: rate * factor ** (step // every)


def cosine(rate: float, steps: int, final: float = 0.0) -> Schedule:
    """From rate down to `final` in so many steps, along half a cosine, and `final` from then on.

    Loshchilov and Hutter 2017, "SGDR", without restarts (CosineAnnealingLR).
    """
    _check_rate("rate", rate)
    _check_steps("steps", steps)
    _check_rate("final", final)
    return lambda step: _between(rate, final, step / steps)


def one_cycle(rate: float, steps: int, rise: float = 0.3, start: float = 1 / 25,
              end: float = 1e-4) -> Schedule:
    """Up to rate in the share `rise` of the steps, then down; the last step has the last rate.

    From rate * start, and to rate * start * end, both along half a cosine. Smith and Topin 2018,
    "Super-convergence" (OneCycleLR).
    """
    _check_rate("rate", rate)
    _check_steps("steps", steps)
    if not 0 < rise < 1:
        raise ValueError(f"schedule: rise must be > 0 and < 1, got {rise!r}")
    _check_rate("start", start)
    _check_rate("end", end)
    top, last = rise * steps - 1, steps - 1

    def schedule(step: int) -> float:
        if step <= top:
            return _between(rate * start, rate, step / top if top else 1.0)
        return _between(rate, rate * start * end, (step - top) / (last - top))

    return schedule


def warm_up(schedule: Schedule, steps: int) -> Schedule:
    """The schedule, but in the first `steps` steps 1 / steps of it, 2 / steps, and so on.

    Goyal et al. 2017, "Accurate, large minibatch SGD".
    """
    _check_steps("steps", steps)
    return lambda step: schedule(step) * min(1.0, (step + 1) / steps)


# What a user calls them: of the highest rate and the number of all steps.
BY_NAME: dict[str, Callable[[float, int], Schedule]] = {
    "constant": lambda rate, steps: constant(rate),
    "step": lambda rate, steps: step_decay(rate, -(-steps // 3)),
    "cosine": cosine,
    "one-cycle": one_cycle,
}


def _between(first: float, last: float, share: float) -> float:
    """From first, where share is 0, along half a cosine to last, where it is 1 and more."""
    return last + (first - last) * (1 + math.cos(math.pi * min(share, 1.0))) / 2


def _check_rate(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"schedule: {name} must be a number, got {value!r}")
    if not 0 <= value < math.inf:
        raise ValueError(f"schedule: {name} must be >= 0 and finite, got {value!r}")


def _check_steps(name: str, value: int) -> None:
    if not is_int(value):
        raise TypeError(f"schedule: {name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"schedule: {name} must be >= 1, got {value}")
