"""What one step of an optimiser is made of, and the step in array code.

gpucnn.optim says which formula it is; kernels/optimizer.cu computes it on the GPU.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from gpucnn.backend import Array, Backend

# What changes from step to step, in an array of doubles of the backend: on the GPU nothing waits
# for it. The gradients are to be multiplied with SCALE; the corrections are 1 / (1 - beta1^t) and
# 1 / sqrt(1 - beta2^t), and only the kernel reads them.
RATE, STEPS, SCALE, SKIP, CORRECTION1, CORRECTION2, NORM = range(7)

UPDATES, SHARE = range(2)  # of an average, in doubles of the backend for the same reason

LEAST_SCALE = 2.0**-126  # of a loss; float32 holds what it is and its inverse

DESCENT, MOMENTUM, RMS_PROP, ADAM = range(4)  # as in kernels/optimizer.cu


class Rule(NamedTuple):
    """A formula of kernels/optimizer.cu and its constants; those that it has not are 0."""

    number: int
    beta1: float = 0.0   # the share that the average of g keeps
    beta2: float = 0.0   # the share that the average of g^2 keeps
    epsilon: float = 0.0
    nesterov: bool = False


class Update(NamedTuple):
    """One step: arrays of one length and dtype, float32 or float64, and how to change them.

    formula: (g, *state), parts of the arrays -> what to subtract from that part of theta; it
        brings state up to date.
    rule: the same for the kernel, or None where there is none.
    loss_scale: what g was multiplied with, and the good steps since that changed, as doubles.
    copy: a 16-bit array for the new theta.
    loss: where it is not finite, nothing is changed.
    """

    theta: Array
    g: Array
    state: dict[str, Array]
    control: Array
    formula: Callable[..., Array]
    rule: Rule | None
    weight_decay: float
    decayed_size: int
    clip_norm: float | None
    loss_scale: Array | None
    growth_interval: int
    copy: Array | None
    loss: Array | None = None

    @property
    def needs_norm(self) -> bool:
        return self.clip_norm is not None or self.loss_scale is not None


class Averaging(NamedTuple):
    """average += share (theta - average), after a step of an optimiser that was not skipped.

    share = 1 - decay; with warm_up 1 - min(decay, (1 + t) / (10 + t)) after t updates.

    theta, average: arrays of one length and dtype, float32 or float64.
    averaging: doubles, UPDATES and SHARE. control: of the step.
    """

    theta: Array
    average: Array
    averaging: Array
    control: Array
    decay: float
    warm_up: bool


def prepare(u: Update, sum_of_squares: float) -> None:
    """Write u.control and u.loss_scale for this step, as the kernel prepare_step does."""
    scale = 1.0 if u.loss_scale is None else float(u.loss_scale[0])
    norm = sum_of_squares ** 0.5 / scale
    skip = u.loss is not None and not abs(float(u.loss)) < float("inf")
    if u.loss_scale is not None and not skip:
        skip = not sum_of_squares < float("inf")
        good = 0.0 if skip else float(u.loss_scale[1]) + 1
        if skip:
            u.loss_scale[0] = max(scale / 2, LEAST_SCALE)
        if good >= u.growth_interval:
            u.loss_scale[0], good = scale * 2, 0.0
        u.loss_scale[1] = good
    limit = float("inf") if u.clip_norm is None else u.clip_norm
    u.control[NORM], u.control[SKIP] = norm, skip
    u.control[SCALE] = (limit / norm if norm > limit else 1) / scale
    u.control[STEPS] += not skip


def apply(backend: Backend, u: Update) -> None:
    """Change the parameters as u.control says, in blocks shared out over the threads."""
    if float(u.control[SKIP]):
        return
    scale, kept = float(u.control[SCALE]), 1 - float(u.control[RATE]) * u.weight_decay
    arrays = u.theta, u.g, *u.state.values()

    def change(part: slice) -> None:
        theta, g, *state = (a[part] for a in arrays)
        if u.weight_decay:
            theta[:max(0, u.decayed_size - part.start)] *= kept
        theta -= u.formula(g if scale == 1 else g * scale, *state)
        if u.copy is not None:
            u.copy[part] = theta

    backend.for_each(change, backend.blocks(u.theta.size, 6 * u.theta.itemsize))


def prepare_average(a: Averaging) -> None:
    """Write a.averaging for this step, as the kernel prepare_average does."""
    skip, t = float(a.control[SKIP]) != 0, float(a.averaging[UPDATES])
    kept = min(a.decay, (1 + t) / (10 + t)) if a.warm_up else a.decay
    a.averaging[:] = (t, 0) if skip else (t + 1, 1 - kept)


def apply_average(backend: Backend, a: Averaging) -> None:
    """Move the average as a.averaging says, in blocks shared out over the threads."""
    share = float(a.averaging[SHARE])
    if not share:
        return

    def move(part: slice) -> None:
        average = a.average[part]
        average += share * (a.theta[part] - average)

    backend.for_each(move, backend.blocks(a.theta.size, 2 * a.theta.itemsize))
