"""Curves and bars as inline SVG. Colours are those of the classes in style.css."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from gpucnn.report.html import Markup, tag

# The units of the drawing; its width on the page is about as many pixels.
_WIDTH, _HEIGHT = 380, 236
_RIGHT, _TOP, _BOTTOM = 12, 10, 30
_DIGIT, _GAP = 7.6, 8  # the width of a character of the labels, and the room beside them
_MOST_SPANS = 150  # of a curve, in each of which the least and the largest value are drawn
_MOST_MARKS = 60   # of all curves; beyond, each has its last point marked only
Text = Callable[[float], str]


class Curve(NamedTuple):
    """y over x. style: its class, such as "training" or "training faint", which has no legend."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: str
    marked: bool = False


def line_chart(title: str, unit: str, curves: Sequence[Curve], text: Text, *,
               tick: Text = "{:.3g}".format, high: float | None = None, from_zero: bool = True
               ) -> Markup:
    """A figure with the curves over epochs from 0 on, and a legend with their last values.

    text: of a value. tick: of one beside the axis. high: the top of the axis; None for the largest
    value. Points that are not finite are left out, and what lies above the top is cut off.
    """
    drawn = [_finite(curve) for curve in curves]
    drawn = [curve for curve in drawn if len(curve.x)]
    if not drawn:
        return tag("figure", _heading(title, unit), tag("p", "No values.", class_="empty"),
                   class_="chart")
    last = max(1.0, *(max(curve.x) for curve in drawn))
    values = [y for curve in drawn for y in curve.y]
    top = max(values) if high is None else high
    ticks = nice_ticks(0 if from_zero else min(*values, top), top)
    left = _GAP + _DIGIT * max(len(tick(value)) for value in ticks)
    scale = _Scale(left, last, ticks[0], max(ticks[-1], top))
    spoken = "; ".join(f"{curve.name} from {text(curve.y[0])} to {text(curve.y[-1])}"
                       for curve in drawn if "faint" not in curve.style)
    few = sum(len(curve.x) for curve in drawn if curve.marked) <= _MOST_MARKS
    picture = tag(
        "svg", _grid(scale, ticks, tick), (_line(curve, scale, text, few) for curve in drawn),
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=f"{title} over epochs: {spoken}")
    legend = tag("ul", (
        tag("li", tag("span", class_=f"key {curve.style}"), tag("span", curve.name),
            tag("b", text(curve.y[-1])))
        for curve in drawn if "faint" not in curve.style), class_="legend")
    return tag("figure", _heading(title, unit), picture, legend, class_="chart")


def bar(parts: Sequence[tuple[float, str]], spoken: str) -> Markup:
    """A bar of parts, each with its share of the whole width, from 0 to 1, and its class."""
    start, boxes = 0.0, []
    for share, style in parts:
        boxes.append(tag("rect", x=f"{start:.2f}", y=0, width=f"{100 * share:.2f}", height=8,
                         class_=style))
        start += 100 * share
    return tag("svg", tag("rect", x=0, y=0, width=100, height=8, class_="track"), boxes,
               class_="bar", viewBox="0 0 100 8", preserveAspectRatio="none", role="img",
               aria_label=spoken)


def nice_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """About so many multiples of 1, 2 or 5 times a power of ten, from <= low to >= high."""
    if not high > low:
        low, high = min(low, 0.0), max(high, 0.0) or 1.0
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    return [n * step for n in range(math.floor(low / step + 1e-9),
                                    math.ceil(high / step - 1e-9) + 1)]


class _Scale(NamedTuple):
    left: float
    last: float
    low: float
    high: float

    def x(self, value: float) -> float:
        return self.left + (_WIDTH - self.left - _RIGHT) * value / self.last

    def y(self, value: float) -> float:
        share = (min(value, self.high) - self.low) / (self.high - self.low)
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * share


def _heading(title: str, unit: str) -> Markup:
    return tag("figcaption", tag("h3", title), tag("span", unit))


def _grid(scale: _Scale, ticks: list[float], tick: Text) -> list[Markup]:
    parts = []
    for value in ticks:
        y = f"{scale.y(value):.1f}"
        parts += [tag("line", x1=f"{scale.left:.1f}", x2=_WIDTH - _RIGHT, y1=y, y2=y,
                      class_="grid"),
                  tag("text", tick(value), x=f"{scale.left - _GAP:.1f}", y=y, dy="0.35em",
                      text_anchor="end")]
    step = max(1, round(nice_ticks(0, scale.last)[1]))
    for epoch in range(0, math.floor(scale.last) + 1, step):
        parts.append(tag("text", epoch, x=f"{scale.x(epoch):.1f}", y=_HEIGHT - _BOTTOM + 18,
                         text_anchor="middle"))
    return parts


def _line(curve: Curve, scale: _Scale, text: Text, all_marks: bool) -> Markup:
    x, y = _thinned(np.asarray(curve.x, float), np.asarray(curve.y, float))
    points = " ".join(f"{scale.x(a):.1f},{scale.y(b):.1f}" for a, b in zip(x, y))
    marked = list(zip(curve.x, curve.y)) if curve.marked or len(curve.x) == 1 else []
    marks = [tag("circle", tag("title", f"{curve.name}, epoch {a:g}: {text(b)}"),
                 cx=f"{scale.x(a):.1f}", cy=f"{scale.y(b):.1f}", r=3.5)
             for a, b in (marked if all_marks else marked[-1:])]
    return tag("g", tag("polyline", tag("title", curve.name), points=points), marks,
               class_=curve.style)


def _finite(curve: Curve) -> Curve:
    pairs = [(x, y) for x, y in zip(curve.x, curve.y) if math.isfinite(y)]
    return curve._replace(x=[x for x, _ in pairs], y=[y for _, y in pairs])


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The points with the least and the largest y of each span, which look as all of them would."""
    if len(x) <= 2 * _MOST_SPANS:
        return x, y
    kept = {0, len(x) - 1}
    for span in np.array_split(np.arange(len(x)), _MOST_SPANS):
        kept |= {int(span[y[span].argmin()]), int(span[y[span].argmax()])}
    order = sorted(kept)
    return x[order], y[order]
