"""The parts of a run's page, in their order."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gpucnn import metrics
from gpucnn.data import Dataset
from gpucnn.layers import Layer, Whiten2D
from gpucnn.layers.memory import LayerRow
from gpucnn.report import charts, curves, pictures, text
from gpucnn.report.html import Markup, scroll, section, table, tag
from gpucnn.report.inspection import Answers, cost, feature_maps, first_filters
from gpucnn.training.profiling import StepTimes

_MOST_MISTAKES = 24
_MOST_PAIRS = 10, 20  # beside a table, and beside a picture
_MOST_FILTERS, _MOST_MAPS, _MOST_MAPPED_LAYERS = 64, 16, 24
_MOST_COUNTED_CLASSES = 20       # beyond, the confusion matrix is a picture
_MATRIX_COLOURS = (30, 125, 190), (230, 110, 20)  # right and wrong, on light and on dark
_USUAL_BATCH = 64


def summary(model: Layer, answers: Answers, history: Mapping[str, Any],
            record: Mapping[str, Any]) -> Markup:
    """The headline figures."""
    epochs = history.get("epoch") or [record.get("epochs", "-")]
    kept = f"kept: epoch {record.get('best_epoch')}" if record.get("patience") else None
    seconds, rate = record.get("seconds"), record.get("images_per_second")
    figures = [
        ("Test accuracy", text.percent(answers.accuracy, 2), f"of {len(answers.labels):,} images"),
        ("Test loss", f"{answers.loss:.4f}", "nats"),
        ("Epochs", epochs[-1], kept),
        ("Training time", text.duration(seconds) if seconds is not None else "-",
         f"{rate:,.0f} images/s" if rate else None),
        ("Parameters", f"{_parameters(model):,}", None),
        ("Device", record.get("device", model.backend.name), f"{model.backend.name} backend"),
        ("Precision", record.get("precision", model.precision.name), None)]
    return tag("dl", (tag("div", tag("dt", name), tag("dd", tag("b", value),
                                                     tag("span", note) if note else None))
                      for name, value, note in figures), class_="figures")


def learning(history: Mapping[str, Any]) -> Markup:
    return section(
        "curves", "Learning curves", "Over the epochs. The pale line is the loss of each step.",
        tag("div", curves.loss_chart("Loss", curves.loss_curves(history)),
            curves.accuracy_chart("Accuracy", curves.accuracy_curves(history)),
            curves.rate_chart(curves.rate_curves(history)), class_="charts"))


def confusion(answers: Answers, names: tuple[str, ...]) -> Markup:
    matrix = answers.matrix
    few = len(names) <= _MOST_COUNTED_CLASSES
    pairs = [(int(i), int(j)) for i, j in zip(*np.nonzero(matrix)) if i != j]
    pairs.sort(key=lambda pair: -matrix[pair])
    most = matrix[pairs[0]] if pairs else 0
    rows = [(names[i], names[j], f"{matrix[i, j]:,}",
             charts.bar([(matrix[i, j] / most, "wrong")], f"{matrix[i, j] / most:.0%} of the most"))
            for i, j in pairs[:_MOST_PAIRS[not few]]]
    listed = tag("div", tag("h3", "Most confused"), table(
        "Most confused pairs of classes", ("true class", "predicted as", "images", ""), rows,
        names=2, class_="pairs")) if rows else tag("p", "Nothing is confused.", class_="empty")
    return section(
        "confusion", "Confusion matrix",
        "True classes on the rows, predicted ones on the columns: blue where the prediction is "
        "right, orange where it is not, stronger for a larger share of the true class.",
        tag("div", _counts(matrix, names) if few else _heat(matrix), listed, class_="beside"))


def classes(answers: Answers, names: tuple[str, ...]) -> Markup:
    scores = metrics.classification_report(answers.matrix, names)
    rows = [(s.name, *map(text.percent, (s.precision, s.recall, s.f1)),
             charts.bar([(0 if np.isnan(s.f1) else s.f1, "training")], f"F1 {text.percent(s.f1)}"),
             f"{s.support:,}") for s in scores]
    return section(
        "classes", "Classes", "Precision: how many of the images predicted as a class are of it. "
        "Recall: how many of its images are found. F1: the harmonic mean of the two. Support: how "
        "many of the test images are of the class.",
        table("Scores of each class", ("class", "precision", "recall", "F1", "", "support"), rows,
              class_="wide"))


def mistakes(answers: Answers, test_set: Dataset) -> Markup:
    wrong, names = answers.most_wrong(_MOST_MISTAKES), test_set.class_names
    cards = []
    for i in wrong:
        true, predicted = answers.labels[i], answers.predictions[i]
        sure, missed = answers.likelihood[i, predicted], answers.likelihood[i, true]
        cards.append(tag(
            "li", _photograph(test_set.images[i], f"test image {i}: {names[true]}"),
            tag("p", tag("b", names[predicted]), tag("span", text.percent(sure)), class_="wrong"),
            tag("p", tag("b", tag("i", "is "), names[true]), tag("span", text.percent(missed)))))
    explanation = ("Test images that the network misjudges, the surest mistakes first: what it "
                   "predicts, and what they are, each with the probability that it gives.")
    return section(
        "mistakes", "Most wrong", explanation if len(wrong) else None,
        tag("ul", cards, class_="photographs") if cards else
        tag("p", "No test image is misclassified.", class_="empty"))


def filters(model: Layer) -> Markup | None:
    """Of the first layer that convolves; None where there is none."""
    found = first_filters(model)
    if found is None:
        return None
    layer, w = found
    kh, kw, channels, count = w.shape
    what = f"{count} filters of {kh} × {kw} pixels in {layer.path}"
    if isinstance(layer, Whiten2D):
        what += ", which whitens: computed from the training images, and not learned"
    if channels not in (1, 3):
        return section("filters", "First filters",
                       f"{what}. They read {channels} channels, which have no colours to show.")
    how = ("Orange is positive, blue negative" if channels == 1 else
           "Grey is 0, and colours are those of the channels")
    shown = [_filter(w[..., i], f"filter {i + 1}") for i in range(min(count, _MOST_FILTERS))]
    more = "" if count <= _MOST_FILTERS else f" The first {_MOST_FILTERS} are shown."
    return section("filters", "First filters", f"{what}. {how}; each is scaled by itself.{more}",
                   tag("div", shown, class_="tiles"))


def maps(model: Layer, answers: Answers, test_set: Dataset) -> Markup | None:
    """Of the first image that is classified right, or else of the first one."""
    i = int((answers.labels == answers.predictions).argmax())
    image = test_set.images[i]
    found = list(feature_maps(model, image).items())
    if not found:
        return None
    shown = [found[n] for n in sorted(set(np.linspace(
        0, len(found) - 1, min(len(found), _MOST_MAPPED_LAYERS)).round().astype(int)))]
    rows = []
    for layer, values in shown:
        channels = values.shape[2]
        few = min(channels, _MOST_MAPS)
        rows.append(tag(
            "li", tag("p", tag("b", layer.path), tag("span", type(layer).__name__),
                      tag("span", text.shape(values.shape)),
                      tag("span", f"{few} of {channels}") if few < channels else None),
            tag("div", (pictures.picture(pictures.sequential(values[..., c]),
                                         f"{layer.path}, channel {c + 1}") for c in range(few)),
                class_="tiles")))
    left_out = len(found) - len(shown)
    return section(
        "maps", "Feature maps", f"What each convolution and pooling layer makes of test image {i}: "
        f"up to {_MOST_MAPS} channels, each scaled by itself from dark to light."
        + (f" {left_out} layers between them are left out." if left_out else ""),
        tag("figure", _photograph(image, f"test image {i}"),
            tag("figcaption", test_set.class_names[answers.labels[i]]), class_="photograph"),
        tag("ol", rows, class_="maps"))


def layers(model: Layer, test_set: Dataset, batch: Any) -> Markup:
    """Time and memory. batch: of the run, where it is known."""
    wanted = min(batch if isinstance(batch, int) else _USUAL_BATCH, len(test_set))
    spent = cost(model, test_set, wanted)
    less = "" if spent.batch == wanted else f" ({wanted} did not fit in what memory was left)"
    times, memory = spent.times, spent.memory
    kept = {row.layer.path: row for row in memory.rows}
    leaves = [layer for layer in model.walk() if not layer.children()]
    slowest = max(sum(_seconds(layer, times)) for layer in leaves)
    rows = [_layer_row(layer, times, kept[layer.path], slowest) for layer in leaves]
    passes = [sum(column) for column in zip(*(_seconds(layer, times) for layer in leaves))]
    footer = ("all layers", "", "", f"{_parameters(model):,}", *map(text.milliseconds, passes), "",
              text.percent(sum(passes) / times.step), text.size(memory.activations),
              text.size(memory.peak))
    how = "measured once" if times.steps == 1 else f"the medians of {times.steps} steps"
    return section(
        "layers", "Time and memory", f"A training step of {spent.batch} images{less} takes "
        f"{1e3 * times.step:,.1f} ms, the loss {1e3 * times.loss:.1f} of them, without the update: "
        f"{how}, with a wait after each pass. Memory as computed: what a layer keeps for its "
        "backward pass, the input in the sum, and all that is alive at most during its passes. "
        f"The peak is in {memory.where}.",
        table("Time and memory of each layer",
              ("layer", "type", "output", "parameters", "forward ms", "backward ms", "", "share",
               "keeps", "alive"), rows, names=3, footer=[footer], class_="wide"),
        tag("ul", (tag("li", tag("span", class_=f"key {style}"), name)
                   for style, name in (("training", "forward"), ("test", "backward"))),
            class_="legend"))


def settings(record: Mapping[str, Any]) -> Markup:
    rows = [(key, text.setting(value)) for key, value in text.flat(dict(record)).items()]
    return tag("section", tag(
        "details", tag("summary", "All settings, figures and versions"),
        table("All settings, figures and versions", ("name", "value"), rows, names=2)),
        id="settings", aria_label="Settings")


def _counts(matrix: np.ndarray, names: tuple[str, ...]) -> Markup:
    """A table with the counts, on a ground as strong as the root of their share of the row."""
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    levels = np.ceil(10 * np.sqrt(share)).astype(int)
    head = tag("tr", tag("td", "true \\ predicted", class_="corner"), (
        tag("th", tag("span", name), scope="col") for name in names))
    rows = [tag("tr", tag("th", name, scope="row"), (
        tag("td", f"{count:,}", class_=f"{'right' if i == j else 'wrong'} l{levels[i, j]}")
        for j, count in enumerate(matrix[i]))) for i, name in enumerate(names)]
    return scroll("Confusion matrix", tag(
        "table", tag("caption", "Confusion matrix", class_="unseen"), tag("thead", head),
        tag("tbody", rows), class_="confusion"))


def _heat(matrix: np.ndarray) -> Markup:
    share = np.sqrt(matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1))
    right, wrong = (pictures.tinted(share, colour) for colour in _MATRIX_COLOURS)
    on_diagonal = np.eye(len(matrix), dtype=bool)[..., None]
    order = "in the order of the table below"
    return tag("figure", pictures.picture(
        np.where(on_diagonal, right, wrong), f"confusion matrix of {len(matrix)} classes; its "
        "largest entries beside the diagonal are listed", most=len(matrix)),
        tag("figcaption", f"True classes from top to bottom, predicted ones from left to right, "
            f"{order}."), class_="heat")


def _photograph(image: np.ndarray, alt: str) -> Markup:
    """A test image, (h, w, c) of any number of channels, of which then the first is shown."""
    return pictures.picture(image if image.shape[2] in (1, 3) else image[..., :1], alt, most=128)


def _filter(w: np.ndarray, name: str) -> Markup:
    """(kh, kw, 1 or 3)."""
    pixels = pictures.diverging(w[..., 0]) if w.shape[2] == 1 else pictures.about_grey(w)
    return pictures.picture(pixels, name, title=f"{name}: from {w.min():.3g} to {w.max():.3g}")


def _layer_row(layer: Layer, times: StepTimes, memory: LayerRow, slowest: float
               ) -> tuple[Any, ...]:
    forward, backward = _seconds(layer, times)
    parameters, share = _parameters(layer), (forward + backward) / times.step
    bar = charts.bar([(forward / slowest, "training"), (backward / slowest, "test")],
                     f"{share:.0%} of the step")
    return (layer.path, type(layer).__name__, text.shape(layer.output_shape),
            f"{parameters:,}" if parameters else "-", text.milliseconds(forward),
            text.milliseconds(backward), bar, text.percent(share), text.size(memory.saved),
            text.size(max(memory.forward, memory.backward)))


def _seconds(layer: Layer, times: StepTimes) -> tuple[float, float]:
    """Of its passes, forward and backward."""
    return times.passes[layer.path, "forward"], times.passes[layer.path, "backward"]


def _parameters(layer: Layer) -> int:
    """How many numbers it learns, with those inside it."""
    return sum(p.size for p in layer.parameters().values())
