"""Learning curves, confusion matrices, and maps over images, as PNG files.

Everything is drawn on Figure objects rather than through pyplot, so that no display is needed and
no global state of matplotlib changes.
"""
from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gpucnn import metrics
from gpucnn.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# From Okabe and Ito's palette, which colour-blind readers can tell apart.
_TRAINING, _TEST = "#0072B2", "#D55E00"
_TEXT_SIZE, _TITLE_SIZE = 11, 13
_DPI = 200
_LEAST_SIDE = 300  # pixels of an image, so that there is room for a title
# Up to how many classes counts and names are written; beyond it there is no room for them.
_MAX_COUNTS, _MAX_NAMES = 30, 100


def require_matplotlib() -> None:
    """Raise ImportError with the remedy where matplotlib is missing: call it before a long run."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise ImportError("plots need matplotlib; pip install 'gpucnn[plot]'") from e


def plot_curves(history: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write the loss and the accuracy over the epochs as a PNG file.

    history: "steps_per_epoch", and lists: "step" (1 is the first of the run) with "step_loss";
        "epoch" (1 stands at the end of the first) with "train_accuracy", "test_loss" and
        "test_accuracy", or "validation_loss" and "validation_accuracy" in their place. Losses are
        in nats, accuracies fractions from 0 to 1.

    Raises ImportError where matplotlib is missing, OSError where the file cannot be written.
    """
    figure = _figure(10, 4)
    loss_axes, accuracy_axes = figure.subplots(1, 2, gridspec_kw={"wspace": 0.24})
    epoch = history["epoch"]
    looked_at = "test" if "test_loss" in history else "validation"
    looked_loss = history[f"{looked_at}_loss"]
    marked = {"linewidth": 1.8, "marker": "o", "markersize": 5}

    at_step = np.asarray(history["step"], float) / history["steps_per_epoch"]
    step_loss = np.asarray(history["step_loss"], float)
    smooth_loss = moving_average(step_loss, math.isqrt(len(step_loss)) // 2)
    loss_axes.plot(at_step, step_loss, color=_TRAINING, alpha=0.3, linewidth=0.6,
                   label="training, each step")
    loss_axes.plot(at_step, smooth_loss, color=_TRAINING, linewidth=1.8,
                   label="training, smoothed")
    loss_axes.plot(epoch, looked_loss, color=_TEST, **marked, label=looked_at)
    # The first loss and the usual ones set the scale: a few wild steps must not squeeze the rest.
    usual = np.sort(step_loss)[:math.ceil(0.99 * len(step_loss))]
    shown = np.concatenate([step_loss[:1], usual, looked_loss])
    loss_axes.set_ylim(0, 1.1 * max(shown[np.isfinite(shown)], default=1))
    _label(loss_axes, "Loss", "mean cross-entropy (nats)")

    for key, name, color in (("train_accuracy", "training", _TRAINING),
                             (f"{looked_at}_accuracy", looked_at, _TEST)):
        percent = 100 * np.asarray(history[key], float)
        last = f", {percent[-1]:.1f} % at the end" if percent.size else ""
        accuracy_axes.plot(epoch, percent, color=color, **marked, label=name + last)
    _label(accuracy_axes, "Accuracy", "images classified correctly (%)")
    _save(figure, path)


def plot_confusion(matrix: np.ndarray, class_names: Sequence[str],
                   path: str | os.PathLike[str]) -> None:
    """Write a confusion matrix as a PNG file: colours by row, counts in the cells.

    matrix: (n, n) counts, at [i, j] the images of class i predicted as class j, as made by
        `gpucnn.metrics.confusion_matrix`.

    Raises ValueError where the names do not fit the matrix, ImportError where matplotlib is
    missing, OSError where the file cannot be written.
    """
    n = len(class_names)
    if matrix.shape != (n, n):
        raise ValueError(f"plot_confusion: matrix is {matrix.shape}, but {n} class names need "
                         f"{(n, n)}")
    fraction = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    # Inches: at least 3, so that the bar's label fits beside two or three classes.
    side = max(3, 0.62 * n if n <= _MAX_COUNTS else 0.25 * min(n, _MAX_NAMES))
    figure = _figure(side, side)
    # The matrix fills the figure and all else stands outside, where _save makes room for it: so
    # the cells have one size however long the names are.
    axes = figure.add_axes((0, 0, 1, 1))
    image = axes.imshow(fraction, cmap="Blues", vmin=0, vmax=1)
    bar = figure.colorbar(image, cax=figure.add_axes((1 + 0.2 / side, 0, 0.22 / side, 1)))
    bar.set_label("fraction of the true class", fontsize=_TEXT_SIZE)
    bar.ax.tick_params(labelsize=_TEXT_SIZE - 1)
    bar.outline.set_visible(False)

    if n <= _MAX_NAMES:
        # parse_math=False: a "$" in a name is a dollar, not the start of a formula.
        axes.set_xticks(range(n), class_names, rotation=45, ha="right", rotation_mode="anchor",
                        fontsize=_TEXT_SIZE, parse_math=False)
        axes.set_yticks(range(n), class_names, fontsize=_TEXT_SIZE, parse_math=False)
    axes.set_xlabel("predicted class", fontsize=_TEXT_SIZE)
    axes.set_ylabel("true class", fontsize=_TEXT_SIZE)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(n - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(n - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    if n <= _MAX_COUNTS:
        for (i, j), count in np.ndenumerate(matrix):
            color = "white" if fraction[i, j] > 0.5 else "black" if count else "0.6"
            axes.text(j, i, f"{count}", ha="center", va="center", color=color,
                      fontsize=_TEXT_SIZE - 1)
    total = matrix.sum()
    if total:
        axes.set_title(f"Accuracy {100 * metrics.accuracy(matrix):.1f} % of {total:,} images",
                       fontsize=_TITLE_SIZE)
    _save(figure, path)


def plot_overlay(image: np.ndarray, heat: np.ndarray, title: str,
                 path: str | os.PathLike[str]) -> None:
    """Write an image with a map laid over it in colours as a PNG file.

    image: (h, w, 1 or 3) from 0 to 1. Each of its pixels becomes one, or in a small image a square
        of them.
    heat: (rows, columns) from 0 to 1, stretched over the whole image, as made by
        `gpucnn.explain.grad_cam`. From 0, where the image stays as it is, over yellow to red.

    Raises ImportError where matplotlib is missing, OSError where the file cannot be written.
    """
    h, w = image.shape[:2]
    zoom = max(1, _LEAST_SIDE // max(h, w))
    figure = _figure(zoom * w / _DPI, zoom * h / _DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(image.squeeze(), "gray", vmin=0, vmax=1, interpolation="nearest",
                extent=(0, w, h, 0))
    axes.imshow(heat, "autumn_r", vmin=0, vmax=1, interpolation="bilinear", extent=(0, w, h, 0),
                alpha=0.8 * heat)
    axes.set_axis_off()
    axes.set_title(title, fontsize=_TEXT_SIZE, parse_math=False)
    _save(figure, path)


def moving_average(values: np.ndarray, reach: int) -> np.ndarray:
    """The mean of each value and up to `reach` neighbours on either side."""
    if not values.size:
        return values
    window = np.ones(2 * reach + 1)
    return (np.convolve(values, window)[reach:reach + len(values)]
            / np.convolve(np.ones(len(values)), window)[reach:reach + len(values)])


def _figure(width: float, height: float) -> Figure:
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _label(axes: Axes, title: str, y_label: str) -> None:
    from matplotlib.ticker import MaxNLocator
    axes.set_title(title, fontsize=_TITLE_SIZE)
    axes.set_xlabel("epoch", fontsize=_TEXT_SIZE)
    axes.set_ylabel(y_label, fontsize=_TEXT_SIZE)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=_TEXT_SIZE - 1)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    # Below the axes, where no curve can pass through it.
    axes.legend(fontsize=_TEXT_SIZE - 1, frameon=False, loc="upper left",
                bbox_to_anchor=(0, -0.16), borderaxespad=0)


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write the whole file or none: a reader never meets half a picture."""
    png = io.BytesIO()
    # "tight" fits the picture to what was drawn, so that no label is cut off.
    figure.savefig(png, format="png", bbox_inches="tight", pad_inches=0.12)
    write_atomically(path, png.getvalue())
