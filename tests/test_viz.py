import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpucnn import viz
from gpucnn.viz import plots

matplotlib = pytest.importorskip("matplotlib")
image = pytest.importorskip("matplotlib.image")


def history(epochs=3, steps_per_epoch=20):
    steps = np.arange(1, epochs * steps_per_epoch + 1)
    ends = np.arange(1, epochs + 1)
    return {"step": steps.tolist(), "step_loss": (2.3 / np.sqrt(steps)).tolist(),
            "epoch": ends.tolist(), "train_loss": (0.5 / ends).tolist(),
            "train_accuracy": (1 - 0.2 / ends).tolist(), "test_loss": (0.6 / ends).tolist(),
            "test_accuracy": (0.95 - 0.2 / ends).tolist(), "steps_per_epoch": steps_per_epoch}


@pytest.fixture
def saved(monkeypatch):
    """The figures that were written, still open to questions."""
    figures = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda f, path: (figures.append(f), save(f, path)))
    return figures


def test_curves_show_what_the_history_holds(tmp_path, saved):
    h = history()
    viz.plot_curves(h, tmp_path / "curves.png")
    loss, accuracy = saved[0].axes
    lines = {line.get_label(): line.get_xydata() for line in loss.lines}
    steps = np.arange(1, 61) / 20
    np.testing.assert_allclose(lines["training, each step"], np.c_[steps, h["step_loss"]])
    np.testing.assert_allclose(lines["test"], np.c_[h["epoch"], h["test_loss"]])
    np.testing.assert_array_equal(lines["training, smoothed"][:, 0], steps)
    lines = {line.get_label(): line.get_ydata() for line in accuracy.lines}
    np.testing.assert_allclose(lines["training, 93.3 % at the end"],
                               100 * np.array(h["train_accuracy"]))
    np.testing.assert_allclose(lines["test, 88.3 % at the end"],
                               100 * np.array(h["test_accuracy"]))
    for axes, unit in ((loss, "nats"), (accuracy, "%")):
        assert axes.get_xlabel() == "epoch"
        assert unit in axes.get_ylabel()
        assert axes.get_legend() is not None


@pytest.mark.parametrize("epochs", [1, 3, 1000])
def test_the_legends_lie_on_nothing(tmp_path, saved, epochs):
    viz.plot_curves(history(epochs), tmp_path / "curves.png")
    saved[0].draw_without_rendering()  # places what saving has moved
    boxes = [box for axes in saved[0].axes for box in (
        axes.bbox, axes.xaxis.label.get_window_extent(), axes.get_legend().get_window_extent())]
    for first, second in itertools.combinations(boxes, 2):
        assert not first.overlaps(second)


def test_a_wild_step_does_not_squeeze_the_curves(tmp_path, saved):
    h = history(steps_per_epoch=400)
    h["step_loss"][700] = 1e4
    viz.plot_curves(h, tmp_path / "curves.png")
    loss = saved[0].axes[0]
    assert loss.get_ylim() == (0, pytest.approx(1.1 * 2.3))


@pytest.mark.parametrize(("epochs", "losses"), [
    (0, {}), (1, {}), (2, {0: np.nan}), (2, {0: np.nan, -1: np.inf})],
    ids=["no epoch finished", "one epoch", "a NaN", "NaN and infinity"])
def test_curves_of_odd_histories(tmp_path, epochs, losses):
    h = history(epochs)
    for i, value in losses.items():
        h["step_loss"][i] = value
    viz.plot_curves(h, tmp_path / "curves.png")
    assert image.imread(tmp_path / "curves.png").shape[1] > 1000


def testmoving_average_by_a_plain_loop(rng):
    for n, reach in ((1, 0), (1, 3), (5, 2), (30, 4), (4, 9)):
        v = rng.random(n)
        expected = [v[max(0, i - reach):i + reach + 1].mean() for i in range(n)]
        np.testing.assert_allclose(plots.moving_average(v, reach), expected)
    assert plots.moving_average(np.array([]), 0).size == 0


def test_confusion_has_true_rows_predicted_columns_and_counts(tmp_path, saved):
    matrix = np.array([[6, 2, 0], [0, 0, 0], [1, 0, 3]])
    viz.plot_confusion(matrix, ["cat", "a dog", "$owl_$"], tmp_path / "confusion.png")
    axes = saved[0].axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(),
                               [[0.75, 0.25, 0], [0, 0, 0], [0.25, 0, 0.75]])
    counts = {t.get_position(): t.get_text() for t in axes.texts}
    assert counts == {(j, i): str(matrix[i, j]) for i in range(3) for j in range(3)}
    assert [t.get_text() for t in axes.get_yticklabels()] == ["cat", "a dog", "$owl_$"]
    assert axes.get_ylabel() == "true class"
    assert axes.get_xlabel() == "predicted class"
    assert axes.get_title() == "Accuracy 75.0 % of 12 images"


@pytest.mark.parametrize("names", [["one"], ["a" * 60, "b" * 60], [str(i) for i in range(31)]],
                         ids=["one class", "long names", "no counts"])
def test_no_label_of_the_confusion_matrix_is_cut_off(tmp_path, names):
    viz.plot_confusion(np.eye(len(names), dtype=int), names, tmp_path / "confusion.png")
    pixels = image.imread(tmp_path / "confusion.png")[..., :3]
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert (edge == 1).all()


def test_confusion_of_nothing_and_names_that_do_not_fit(tmp_path):
    viz.plot_confusion(np.zeros((2, 2), int), ["a", "b"], tmp_path / "c.png")
    with pytest.raises(ValueError, match=r"matrix is \(2, 2\), but 3 class names need \(3, 3\)"):
        viz.plot_confusion(np.zeros((2, 2), int), ["a", "b", "c"], tmp_path / "d.png")
    assert [p.name for p in tmp_path.iterdir()] == ["c.png"]


def test_a_failed_write_leaves_the_old_picture_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    path.write_bytes(b"the old one")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        viz.plot_curves(history(), path)
    monkeypatch.undo()
    assert path.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [path]


def test_a_picture_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none/c\.png'$"):
        viz.plot_curves(history(), tmp_path / "none" / "c.png")


def test_neither_pyplot_nor_the_settings_are_touched(tmp_path):
    script = (
        "import sys, matplotlib, numpy as np\n"
        "before = matplotlib.rcParams.copy()\n"
        "from gpucnn import viz\n"
        f"viz.plot_confusion(np.eye(2, dtype=int), ['a', 'b'], {str(tmp_path / 'c.png')!r})\n"
        "print('matplotlib.pyplot' in sys.modules, before == matplotlib.rcParams.copy())")
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                            check=True, cwd=Path(__file__).parent.parent)
    assert result.stdout.split() == ["False", "True"]


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (lambda: viz.plot_curves(history(), tmp_path / "c.png"), viz.require_matplotlib,
                 lambda: viz.plot_confusion(np.eye(2), ["a", "b"], tmp_path / "c.png")):
        with pytest.raises(ImportError, match=r"^plots need matplotlib; pip install 'gpucnn\[pl"):
            draw()


@pytest.mark.parametrize(("size", "zoom"), [((40, 600), 1), ((30, 20), 10)])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_overlay_colours_an_image_where_the_map_is_large(tmp_path, size, zoom, channels):
    h, w = size
    image = np.zeros((h, w, channels), np.float32)
    image[:, :w // 2] = 1
    viz.plot_overlay(image, np.array([[1, 0], [0, 0]], np.float32), "cost: $5$", tmp_path / "o.png")
    pixels = np.round(255 * matplotlib.image.imread(tmp_path / "o.png")[..., :3]).astype(int)
    rows, columns = (np.nonzero((pixels != 255).any(axis=(1 - axis, 2)))[0] for axis in (0, 1))
    right, bottom = columns.max() + 1, rows.max() + 1  # of the image: it ends in black
    assert tuple(pixels[bottom - zoom * h, right - zoom * w]) == (255, 51, 51)  # 0.8 red, 0.2 white
    assert tuple(pixels[bottom - 1, right - zoom * w]) == (255, 255, 255)
    assert tuple(pixels[bottom - 1, right - 1]) == (0, 0, 0)
    assert tuple(pixels[bottom - zoom * h, right - zoom * w - 1]) == (255, 255, 255)
    assert tuple(pixels[bottom - zoom * h - 1, right - zoom * w]) == (255, 255, 255)
