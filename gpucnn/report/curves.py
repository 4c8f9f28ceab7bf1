"""The curves of a run's history, each as a chart; histories that miss some of it give less."""
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gpucnn.report.charts import Curve, line_chart
from gpucnn.report.html import Markup
from gpucnn.report.text import percent
from gpucnn.viz.plots import moving_average

Curves = dict[str, list[Curve]]  # by the keys of CHARTS


def looked_at_in(history: Mapping[str, Any]) -> str:
    """The images that were looked at after each epoch: "test", or "validation"."""
    return "validation" if "validation_loss" in history else "test"


def loss_curves(history: Mapping[str, Any]) -> list[Curve]:
    """The training loss of each step, faint and smoothed, and of the images that are looked at
    after each epoch."""
    x, y = _by_step(history, "step_loss")
    curves = []
    if y:
        smooth = moving_average(np.asarray(y, float), math.isqrt(len(y)) // 2)
        curves = [Curve("each training step", x, y, "training faint"),
                  Curve("training", x, smooth.tolist(), "training")]
    looked_at = looked_at_in(history)
    return [*curves, *_by_epoch(history, f"{looked_at}_loss", looked_at, "test")]


def accuracy_curves(history: Mapping[str, Any]) -> list[Curve]:
    """Of both, at the end of each epoch."""
    looked_at = looked_at_in(history)
    return [*_by_epoch(history, "train_accuracy", "training", "training"),
            *_by_epoch(history, f"{looked_at}_accuracy", looked_at, "test")]


def rate_curves(history: Mapping[str, Any]) -> list[Curve]:
    """The learning rate of each step."""
    x, y = _by_step(history, "step_learning_rate")
    return [Curve("learning rate", x, y, "training")] if y else []


def loss_chart(title: str, curves: list[Curve]) -> Markup:
    """Its top is that of the usual values: a few wild steps must not squeeze the rest."""
    plain = [curve for curve in curves if curve.marked or "faint" in curve.style] or curves
    values = np.array([y for curve in plain for y in curve.y], float)
    usual = np.sort(values[np.isfinite(values)])
    top = usual[math.ceil(0.995 * len(usual)) - 1] if len(usual) else None
    return line_chart(title, "mean cross-entropy, nats", curves, "{:.4f}".format, high=top)


def accuracy_chart(title: str, curves: list[Curve]) -> Markup:
    return line_chart(title, "classified correctly", curves, percent, high=1, from_zero=False,
                      tick=lambda share: f"{100 * share:g} %")


def rate_chart(curves: list[Curve]) -> Markup:
    return line_chart("Learning rate", "of each step", curves, "{:.3g}".format)


def epochs_of(history: Mapping[str, Any], key: str) -> tuple[list[float], list[float]]:
    """The epochs that have a value, and the values."""
    values = _numbers(history, key)
    epochs = _numbers(history, "epoch") or [float(n) for n in range(1, len(values) + 1)]
    n = min(len(epochs), len(values))
    return epochs[:n], values[:n]


def _by_epoch(history: Mapping[str, Any], key: str, name: str, style: str) -> list[Curve]:
    x, y = epochs_of(history, key)
    return [Curve(name, x, y, style, marked=True)] if y else []


def _by_step(history: Mapping[str, Any], key: str) -> tuple[list[float], list[float]]:
    """At the ends of the steps, counted in epochs."""
    per_epoch = history.get("steps_per_epoch")
    steps, values = _numbers(history, "step"), _numbers(history, key)
    if not isinstance(per_epoch, (int, float)) or per_epoch <= 0:
        return [], []
    n = min(len(steps), len(values))
    return [step / per_epoch for step in steps[:n]], values[:n]


def _numbers(history: Mapping[str, Any], key: str) -> list[float]:
    """What has no value counts as not finite."""
    values = history.get(key)
    if not isinstance(values, list):
        return []
    return [float(v) if isinstance(v, (int, float)) else math.nan for v in values]
