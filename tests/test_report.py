"""The pages about runs: what they say, that it is true, and that no name can break them."""
import base64
import hashlib
import io
import json
import math
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from gpucnn import metrics, optim, report, training
from gpucnn.data import Dataset, Loader
from gpucnn.errors import DataError
from gpucnn.layers import Dense, Dropout, Flatten, Sequential
from gpucnn.losses import SoftmaxCrossEntropy
from gpucnn.report import charts, html, inspection, pictures, text
from gpucnn.report.charts import Curve, line_chart
from gpucnn.training import profiling
from gpucnn.training.profiling import PASSES, time_steps, wrapped_passes
from tests import report_pages as pages

Image = pytest.importorskip("PIL.Image", reason="needs Pillow: pip install 'gpucnn[images]'")
VOID = {"br", "img", "link", "meta"}


class Page(HTMLParser):
    """A page whose elements are nested as they should be: (name, attributes, text) of each."""

    def __init__(self, source):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(source)
        assert not self._open

    def handle_starttag(self, name, attributes):
        element = [name, dict(attributes), ""]
        self.elements.append(element)
        if name not in VOID:
            self._open.append(element)

    def handle_endtag(self, name):
        assert self._open.pop()[0] == name

    def handle_data(self, data):
        for element in self._open:
            element[2] += data

    def all(self, name, **attributes):
        return [(given, words) for element, given, words in self.elements if element == name
                and all(given.get(k.rstrip("_")) == v for k, v in attributes.items())]

    def rows(self, caption):
        """The text of the cells of a table's rows, head and foot included."""
        source = next(words for words in re.findall(r"<table.*?</table>", self.rawdata_, re.S)
                      if f">{caption}</caption>" in words)
        return [[re.sub("<[^>]*>", "", cell) for cell in re.findall(
            r"<t[hd].*?>(.*?)</t[hd]>", row)] for row in re.findall("<tr>(.*?)</tr>", source)]


def read(path):
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    page.rawdata_ = source
    return page


def pixels(attributes):
    data = base64.b64decode(attributes["src"].removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)))


def everything(model):
    """All that a forward or backward pass can change in it."""
    to_numpy = model.backend.to_numpy
    arrays = [to_numpy(model.flat_data), to_numpy(model.flat_grad)]
    arrays += [to_numpy(layer.own_buffers[name]) for layer, name in model.buffers().values()]
    return [a.copy() for a in arrays], [
        layer.step for layer in model.walk() if isinstance(layer, Dropout)], [
        sorted(vars(layer)) for layer in model.walk()]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_report_says_what_the_model_does_and_leaves_it_alone(backend, tmp_path, channels):
    data, model = pages.dataset(channels=channels), pages.model(channels=channels)
    before = everything(model)
    path = report.write_report(tmp_path, model, data, history=pages.history(),
                               metrics=pages.metrics())
    for a, b in zip(before, everything(model)):
        np.testing.assert_equal(a, b)
    assert path == tmp_path / "report.html"
    page = read(path)

    truth = training.evaluate(model, Loader(data, 32).epoch())
    figures = dict(zip((words for _, words in page.all("dt")),
                       (words for _, words in page.all("dd"))))
    assert figures["Test accuracy"] == f"{100 * truth.accuracy:.2f} %of 90 images"
    assert float(figures["Test loss"].removesuffix("nats")) == pytest.approx(truth.loss, abs=1e-4)
    assert figures["Training time"] == "1 min 15 s925 images/s"
    assert figures["Parameters"] == f"{sum(p.size for p in model.parameters().values()):,}"
    assert figures["Device"] == f"cpu{backend.name} backend"

    matrix = metrics.confusion_matrix(truth.labels, truth.predictions, 6)
    rows = page.rows("Confusion matrix")
    assert [[int(cell) for cell in row[1:]] for row in rows[1:]] == matrix.tolist()
    grounds = [a["class"] for a, _ in page.all("td") if " l" in a.get("class", "")]
    share = matrix / matrix.sum(axis=1, keepdims=True)
    assert grounds == [f"{'right' if i == j else 'wrong'} l{math.ceil(10 * math.sqrt(s))}"
                       for (i, j), s in np.ndenumerate(share)]
    pairs = page.rows("Most confused pairs of classes")[1:]
    off_diagonal = np.sort(matrix[~np.eye(6, dtype=bool)])[::-1]
    assert [int(row[2]) for row in pairs] == off_diagonal[off_diagonal > 0][:10].tolist()
    scores = metrics.classification_report(matrix, data.class_names)
    assert [row[3:] for row in page.rows("Scores of each class")[1:]] == [
        [text.percent(s.f1), "", str(s.support)] for s in scores]

    layers = [row[:4] for row in page.rows("Time and memory of each layer")]
    assert [row[0] for row in layers[1:-1]] == [
        layer.path for layer in model.walk() if not layer.children()]
    assert layers[-1][3] == figures["Parameters"]


def test_the_most_wrong_images_come_in_order(tmp_path):
    data, model = pages.dataset(), pages.model()
    page = read(report.write_report(tmp_path, model, data, history={}, metrics={}))
    likelihood = training.predict(model, data.images / np.float32(255))
    wrong = np.flatnonzero(likelihood.argmax(axis=1) != data.labels)
    order = sorted(wrong, key=lambda i: -likelihood[i].max())[:24]
    shown = [a for a, _ in page.all("img") if a["alt"].startswith("test image ")][:len(order)]
    assert len(order) == 24
    assert [int(a["alt"].split(":")[0].split()[-1]) for a in shown] == order
    for attributes, i in zip(shown, order):
        np.testing.assert_array_equal(pixels(attributes), data.images[i, ..., 0])
    said = [words for _, words in page.all("p", class_="wrong")]
    assert said[0].endswith(text.percent(likelihood[order[0]].max()))


def test_a_run_that_kept_its_best_epoch(tmp_path):
    early = {name.replace("test", "validation"): v for name, v in pages.history().items()}
    page = read(report.write_report(tmp_path, pages.model(), pages.dataset(), history=early,
                                    metrics=pages.metrics(patience=2, best_epoch=1)))
    figures = dict(zip((words for _, words in page.all("dt")),
                       (words for _, words in page.all("dd"))))
    assert figures["Epochs"] == "3kept: epoch 1"
    spoken = [a["aria-label"] for a, _ in page.all("svg")]
    assert "; validation from 0.6000 to 0.2000" in spoken[0]
    assert "; validation from 75.0 % to 88.3 %" in spoken[1]


def test_filters_and_feature_maps_are_those_of_the_model(tmp_path):
    data, model = pages.dataset(), pages.model()
    page = read(report.write_report(tmp_path, model, data, history={}, metrics={}))
    first = model.layers[0]
    shown = [pixels(a).astype(int) for a, _ in page.all("img") if a["alt"].startswith("filter ")]
    assert len(shown) == 20
    for i, picture in enumerate(shown):
        w = first.w.data[:, :, 0, i]
        place = np.unravel_index(np.abs(w).argmax(), w.shape)
        red, _, blue = picture[place]
        assert (red > blue) == (w[place] > 0)  # orange, or blue
    images = {a["alt"]: pixels(a) for a, _ in page.all("img") if ", channel " in a["alt"]}
    assert len(images) == 16 + 16 + 5  # conv1, pool1, conv2
    right = training.predict(model, data.images / np.float32(255)).argmax(axis=1) == data.labels
    i = int(right.argmax())
    y = first.forward(data.images[i:i + 1] / np.float32(255))
    np.testing.assert_array_equal(images["conv1, channel 3"], pictures.sequential(y[0, ..., 2]))
    colour = pages.model(channels=3)
    page = read(report.write_report(tmp_path, colour, pages.dataset(channels=3), history={},
                                    metrics={}))
    shown = [pixels(a) for a, _ in page.all("img") if a["alt"].startswith("filter ")]
    assert len(shown) == 24
    np.testing.assert_array_equal(shown[5], pictures.about_grey(
        colour.layers[0].own_buffers["w"][..., 5]))


def test_no_name_becomes_markup_and_nothing_comes_from_elsewhere(tmp_path):
    page = read(report.write_report(
        tmp_path, pages.model(), pages.dataset(), history=pages.history(),
        metrics=pages.metrics(model="</title><script>", device='"><img src=http://x>')))
    names = {name for name, _, _ in page.elements}
    assert not names & {"script", "iframe", "object", "embed", "form"}
    assert all(a["src"].startswith("data:image/png;base64,") for a, _ in page.all("img"))
    assert all(a["href"].startswith(("#", "data:,")) for name in ("a", "link")
               for a, _ in page.all(name))
    assert not [key for _, a, _ in page.elements for key in a if key.startswith("on")
                or key == "style"]
    assert page.all("title")[0][1] == "</title><script>: training report"
    head = [words for _, words in page.all("th", scope="row")]
    for name in ("<script>alert(1)</script>", 'a"b\'&c', "two\\nlines", "日本語 ☃",
                 "\\udcff\\u202e"):
        assert name in head
    (style,) = [words for _, words in page.all("style")]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = next(a["content"] for a, _ in page.all("meta") if "http-equiv" in a)
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:;")
    assert "url(" not in style
    assert "@import" not in style


def test_all_parts_are_named_and_all_pictures_described(tmp_path):
    page = read(report.write_report(tmp_path, pages.model(), pages.dataset(),
                                    history=pages.history(), metrics=pages.metrics()))
    ids = [a["id"] for _, a, _ in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"] for a, _ in page.all("a")} <= {f"#{name}" for name in ids}
    assert all(a.get("aria-labelledby", ids[0]) in ids for a, _ in page.all("section"))
    assert all(a["alt"] for a, _ in page.all("img"))
    assert all(a.get("aria-label") for a, _ in page.all("svg"))
    assert [len(page.all(name)) for name in ("h1", "header", "nav", "main", "footer")] == [1] * 5
    assert all(a.get("scope") for a, _ in page.all("th"))


def test_many_classes_have_a_map_and_a_longer_list(tmp_path):
    data, model = pages.dataset(classes=30), pages.model(classes=30)
    page = read(report.write_report(tmp_path, model, data, history={}, metrics={}))
    (attributes,) = [a for a, _ in page.all("img") if a["alt"].startswith("confusion matrix of 30")]
    matrix = inspection.ask(model, data).matrix
    np.testing.assert_array_equal(pixels(attributes)[..., 3] > 0, matrix > 0)
    assert len(page.rows("Most confused pairs of classes")) == 1 + 20
    assert (tmp_path / "report.html").stat().st_size < 300_000


def test_odd_models_and_sets(tmp_path):
    """No convolution, and an image of many channels; a perfect model; one that has diverged."""
    data = pages.dataset(classes=2, channels=5, n=4)
    plain = Sequential([Flatten(), Dense(2)])
    plain.build((8, 8, 5))
    page = read(report.write_report(tmp_path, plain, data, history={}, metrics={}))
    assert not [a for a, _ in page.all("section") if a["id"] in ("filters", "maps")]

    right = training.predict(plain, data.images / np.float32(255)).argmax(axis=1)
    perfect = Dataset(data.images, right, data.class_names, data.name)
    page = read(report.write_report(tmp_path, plain, perfect, history={}, metrics={}))
    said = [words for _, words in page.all("p", class_="empty")]
    assert "No test image is misclassified." in said
    assert "Nothing is confused." in said

    model = pages.model()
    model.parameters()["dense1/w"].data[...] = np.nan
    page = read(report.write_report(tmp_path, model, pages.dataset(), history=pages.history(),
                                    metrics={}))
    assert page.all("dd")[1][1] == "nannats"


def test_little_memory_means_a_smaller_step(tmp_path, monkeypatch):
    def steps(model, loss, optimizer, x, *others, **options):
        if len(x) > limit:
            raise MemoryError
        return time_steps(model, loss, optimizer, x, *others, **options)

    monkeypatch.setattr(inspection, "time_steps", steps)
    limit = 5
    page = read(report.write_report(tmp_path, pages.model(), pages.dataset(), history={},
                                    metrics=pages.metrics()))
    assert any("step of 4 images (16 did not fit in what memory was left) takes" in words
               for _, words in page.all("p"))
    limit = 0
    with pytest.raises(MemoryError):
        inspection.cost(pages.model(), pages.dataset(), 16)


def test_what_cannot_be_reported(tmp_path, monkeypatch):
    model = pages.model()
    for data, error, message in (
            (pages.dataset(classes=4), ValueError, r"^report: the model gives \(6,\), but pattern"),
            (pages.dataset(n=0), DataError, "^the data set has 0 samples")):
        with pytest.raises(error, match=message):
            report.write_report(tmp_path, model, data, history={}, metrics={})
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(ImportError, match=r"^reports need Pillow; pip install 'gpucnn\[images\]'"):
        report.write_report(tmp_path, model, pages.dataset(), history={}, metrics={})
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_page(tmp_path, monkeypatch):
    (tmp_path / "report.html").write_text("the old one")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        report.write_report(tmp_path, pages.model(), pages.dataset(), history={}, metrics={})
    assert [p.read_text() for p in tmp_path.iterdir()] == ["the old one"]


# Comparisons.


def record(tmp_path, name, history, metrics_):
    folder = tmp_path / name
    folder.mkdir(parents=True)
    if history is not None:
        (folder / "history.json").write_text(json.dumps(history))
    if metrics_ is not None:
        (folder / "metrics.json").write_text(json.dumps(metrics_))
    return report.read_record(folder)


def test_runs_side_by_side(tmp_path):
    h = pages.history()
    h["test_accuracy"][1] = 0.99  # the best is not the last
    records = [record(tmp_path, "a", h, pages.metrics()),
               record(tmp_path, "b/a", pages.history(epochs=5, shift=0.1),
                      pages.metrics(optimizer="sgd", clip_norm=1.5, versions={"numpy": "1.26"})),
               record(tmp_path, "half", None, {"test_accuracy": 0.5}),
               record(tmp_path, "<i>", {"epoch": [1], "test_loss": [math.nan], "step": "?"}, None)]
    path = report.write_comparison(records, tmp_path / "out.html")
    page = read(path)
    assert [a["id"] for a, _ in page.all("section")] == ["outcomes", "curves", "settings"]
    assert not page.all("i")
    assert "<i>" in [words for _, words in page.all("th")]
    outcomes = page.rows("Outcomes of each run")[1:]
    assert outcomes[0] == [str(tmp_path / "a"), "88.00 %", "epoch 2 99.00 %", "0.2000",
                           "epoch 3 0.2000", "1 min 15 s", "925", "54.0 MiB"]
    assert outcomes[2] == ["half", "50.00 %", *["-"] * 6]
    assert outcomes[3][1:] == ["-"] * 7
    settings = {row[0]: row[1:] for row in page.rows("Settings that differ")[1:]}
    assert settings["optimizer"] == ["adam", "sgd", "not recorded", "not recorded"]
    assert settings["clip_norm"][:2] == ["-", "1.5"]
    assert settings["versions.numpy"][:2] == ["2.1", "1.26"]
    assert not {"test_accuracy", "seconds"} & set(settings)
    spoken = [a["aria-label"] for a, _ in page.all("svg")]
    assert spoken[0].startswith("Accuracy over epochs: ")
    assert f"{tmp_path / 'b/a'} from 65.0 % to 81.0 %" in spoken[0]

    early = {name.replace("test", "validation"): values for name, values in h.items()}
    three = [record(tmp_path, "early", early, pages.metrics(epochs_made=3, best_epoch=2)), *records]
    page = read(report.write_comparison(three, path))
    assert page.rows("Outcomes of each run")[1][1:5] == [
        "88.00 %", "epoch 2 99.00 %", "0.2000", "epoch 3 0.2000"]
    for chart in page.all("svg")[:2]:
        assert "early from" in chart[0]["aria-label"]
    two = [record(tmp_path, f"same/{i}", h, pages.metrics()) for i in range(2)]
    page = read(report.write_comparison(two, path))
    assert [words for _, words in page.all("p", class_="empty")] == [
        "All settings on record are equal."]


def test_folders_that_hold_no_run(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no run, which has a metrics\.json or a hist"):
        report.read_record(tmp_path / "nowhere")
    for content, message in (("{", r"metrics\.json: damaged, no JSON \("),
                             ("[1]", r"metrics\.json: holds a list, not an object")):
        (tmp_path / "metrics.json").write_text(content)
        with pytest.raises(DataError, match=message):
            report.read_record(tmp_path)


# Parts.


def test_markup():
    assert html.tag("p", "a<b", 3, None, [html.tag("br"), "&"], class_="x", title=None) == (
        '<p class="x">a&lt;b3<br>&amp;</p>')
    assert html.tag("a", href='"><', aria_label="it's") == (
        '<a href="&quot;&gt;&lt;" aria-label="it&#x27;s"></a>')


@pytest.mark.parametrize(("low", "high", "ticks"), [
    (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 2.71, [0, 1, 2, 3]), (0.62, 1, [0.6, 0.7, 0.8, 0.9, 1]),
    (0, 0.001, [0, 0.0002, 0.0004, 0.0006, 0.0008, 0.001]), (1, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
    (0, 0, [0, 0.2, 0.4, 0.6, 0.8, 1])])
def test_ticks(low, high, ticks):
    assert charts.nice_ticks(low, high) == pytest.approx(ticks)


def test_a_curve_runs_from_corner_to_corner():
    chart = str(line_chart("T", "u", [Curve("c", [0, 1, 2], [0, math.nan, 10], "test", True)], str))
    (points,) = re.findall('points="(.*?)"', chart)
    (x0, y0), (x1, y1) = (map(float, pair.split(",")) for pair in points.split())
    grid = [float(y) for y in re.findall(r'y1="(.*?)"', chart)]
    assert (y0, y1) == (max(grid), min(grid))
    assert x1 == pytest.approx(charts._WIDTH - charts._RIGHT)
    assert x0 == pytest.approx(float(re.findall(r'x1="(.*?)"', chart)[0]))
    assert chart.count("<circle") == 2
    assert "No values." in line_chart("T", "u", [Curve("c", [1], [math.inf], "test")], str)


def test_thinning_keeps_the_extremes(rng):
    x, y = np.arange(10_000.0), rng.standard_normal(10_000)
    thin_x, thin_y = charts._thinned(x, y)
    assert len(thin_x) <= 302
    assert (thin_y.min(), thin_y.max()) == (y.min(), y.max())
    assert (thin_x[0], thin_x[-1]) == (0, 9999)
    assert (np.diff(thin_x) > 0).all()


def test_a_wild_loss_does_not_squeeze_the_curves(tmp_path):
    h = pages.history(steps=400)
    h["step_loss"][700] = 1e6
    page = read(report.write_report(tmp_path, pages.model(), pages.dataset(), history=h,
                                    metrics={}))
    labels = [words for _, words in page.all("text")]
    assert labels[:6] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]


def test_colours():
    values = np.array([[-2, 0], [1, np.nan]])
    (blue, middle), (orange, nothing) = pictures.diverging(values).astype(int)
    assert blue[2] > blue[0] + 100
    assert orange[0] > orange[2] + 50
    assert middle.tolist() == nothing.tolist() == [247, 246, 243]
    assert pictures.about_grey(np.array([[[-1.0, 0, 1]]])).tolist() == [[[0, 128, 255]]]
    dark, bright = pictures.sequential(np.array([[3.0, 7.0]])).sum(axis=2)[0]
    assert dark < bright
    assert (pictures.sequential(np.full((2, 2), 5.0)) == pictures.sequential(values * 0)).all()
    assert pictures.tinted(np.array([[0.0, 1.0]]), (1, 2, 3)).tolist() == [[[1, 2, 3, 0],
                                                                        [1, 2, 3, 255]]]


@pytest.mark.parametrize(("said", "value"), [
    (text.percent(0.12345, 2), "12.35 %"), (text.percent(math.nan), "-"),
    (text.duration(0.31), "0.3 s"), (text.duration(59.4), "59 s"),
    (text.duration(59.7), "1 min 00 s"),
    (text.duration(3661), "1 h 01 min"), (text.milliseconds(0.0123), "12.30"),
    (text.milliseconds(0), "-"), (text.size(0), "-"), (text.size(8), "8 B"),
    (text.size(1536), "1.5 KiB"), (text.size(3 << 40), "3072.0 GiB"), (text.shape((2, 3)), "2 × 3"),
    (text.setting(None), "-"), (text.setting(False), "no"), (text.setting(1e-5), "1e-05"),
    (text.flat({"a": {"b": 1}, "c": 2}), {"a.b": 1, "c": 2})])
def test_figures_as_text(said, value):
    assert said == value


# What reports take from training.


def test_log_probabilities_are_those_of_predict(backend):
    data, model = pages.dataset(), pages.model()
    labels, logarithms = training.log_probabilities(model, Loader(data, 40).epoch())
    np.testing.assert_array_equal(labels, data.labels)
    np.testing.assert_allclose(np.exp(logarithms),
                               training.predict(model, data.images / np.float32(255)), rtol=1e-5)


def test_steps_are_timed_and_the_layers_are_as_before(backend):
    data, model = pages.dataset(), pages.model()
    before = [sorted(vars(layer)) for layer in model.walk()]
    x, t = next(iter(Loader(data, 8).epoch()))
    times = time_steps(model, SoftmaxCrossEntropy(), optim.Adam(model), x, t, steps=3)
    assert times.steps == 3
    assert set(times.passes) == {(layer.path, name) for layer in model.layers
                                 for name in ("forward", "backward")}
    assert all(seconds > 0 for seconds in times.passes.values())
    assert times.loss > 0 < times.update
    assert sum(times.passes.values()) + times.loss + times.update < 1.5 * times.step
    assert time_steps(model, SoftmaxCrossEntropy(), None, x, t, steps=9, seconds=0).steps == 1
    assert [sorted(vars(layer)) for layer in model.walk()] == before


def test_a_pass_inside_another_of_the_same_name_counts_once(backend):
    watch = profiling._Stopwatch(backend)
    inner = watch.timed("forward", lambda x: x + 1)
    assert watch.timed("forward", lambda x: inner(inner(x)))(1) == 3
    assert len(watch.times["forward"]) == 1
    assert watch.median("backward") == 0


def test_wrapped_passes_end_with_the_block():
    model, seen = pages.model(), []

    def wrap(layer, name, call):
        def wrapper(*arguments, **options):
            seen.append((layer.path, name))
            return call(*arguments, **options)
        return wrapper

    with pytest.raises(RuntimeError, match="gone"), wrapped_passes(model.layers, wrap):
        model.forward(np.zeros((1, 8, 8, 1), np.float32))
        raise RuntimeError("gone")
    assert seen == [(layer.path, "forward") for layer in model.layers]
    assert not [name for layer in model.walk() for name in PASSES if name in vars(layer)]
