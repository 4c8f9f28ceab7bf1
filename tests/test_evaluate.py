"""scripts/evaluate.py: what it measures and writes, and data that the model does not know."""
from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from gpucnn import cli
from gpucnn.backend import use_backend
from gpucnn.data import Dataset
from gpucnn.errors import DataError
from gpucnn.layers import Dense, Flatten, Sequential
from gpucnn.models import load_model, save_model
from gpucnn.training import evaluate
from scripts import evaluate as script

NAMES = [*"abcdefg"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model of images of one pixel: the brighter, the higher the class; 255 makes it g."""
    path = tmp_path_factory.mktemp("run") / "model.safetensors"
    with use_backend("numpy"):
        model = Sequential([Flatten(), Dense(7)])
        model.build((1, 1, 1))
        classes = np.arange(7, dtype=np.float32)
        model.parameters()["dense1/w"].data[...] = 12 * classes
        model.parameters()["dense1/b"].data[...] = -(classes**2)
        save_model(model, path, class_names=NAMES)
    return path


def dataset(labels, shown, names=NAMES, shape=(1, 1, 1)):
    """Images that the model takes for `shown`."""
    images = np.round(255 / 6 * np.array(shown)).astype(np.uint8).reshape(-1, 1, 1, 1)
    return Dataset(np.broadcast_to(images, (len(labels), *shape)).copy(), np.array(labels),
                   tuple(names), "pixels")


def call(run, monkeypatch, test_set, *arguments, train_set=None):
    monkeypatch.setattr(cli, "load_data", lambda *_: (train_set, test_set))
    script.main(script.parser().parse_args(["--run", str(run), *map(str, arguments)]))


def test_the_figures_are_written_as_json_and_csv(run, monkeypatch, tmp_path, capsys):
    # Of a g shown as a and an a shown as g, the right class is the last of seven.
    data = dataset([0, 0, 3, 3, 6, 6], [0, 6, 3, 1, 0, 6])
    call(run, monkeypatch, data, "--json", tmp_path / "e.json", "--csv", tmp_path / "e.csv",
         "--batch-size", 4)
    said = capsys.readouterr().out
    assert said.startswith("pixels: 6 images, accuracy 0.5000, top-5 accuracy 0.6667, loss ")
    found = json.loads((tmp_path / "e.json").read_text())
    assert (found["data"], found["images"], found["accuracy"]) == ("pixels", 6, 0.5)
    assert found["top5_accuracy"] == pytest.approx(4 / 6)
    assert f"loss {found['loss']:.4f}\n" in said
    matrix = np.zeros((7, 7), int)
    matrix[[0, 0, 3, 3, 6, 6], [0, 6, 3, 1, 0, 6]] = 1
    assert found["confusion_matrix"] == matrix.tolist()
    assert found["classes"][3] == {"name": "d", "precision": 1.0, "recall": 0.5,
                                   "f1": pytest.approx(2 / 3), "support": 2}
    assert found["classes"][2] == {"name": "c", "precision": None, "recall": None, "f1": None,
                                   "support": 0}
    with open(tmp_path / "e.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [{k: float(v) if v else None for k, v in row.items() if k != "class"}
            for row in rows] == [{k: v for k, v in c.items() if k != "name"}
                                 for c in found["classes"]]
    assert [row["class"] for row in rows] == NAMES


def test_the_part_is_chosen(run, monkeypatch, capsys):
    for part, accuracy in (("test", 0), ("train", 1)):
        call(run, monkeypatch, dataset([0, 1], [1, 0]), "--part", part,
             train_set=dataset([0], [0]))
        assert f"images, accuracy {accuracy}.0000" in capsys.readouterr().out


def test_the_five_most_probable(backend):
    """Of equal logits the first counts, as in argmax; five classes are all among the five."""
    model = Sequential([Flatten(), Dense(7, bias=False)])
    model.build((1, 1, 7))
    model.parameters()["dense1/w"].data[...] = backend.asarray(np.eye(7), np.float32)
    logits = np.array([[7, 6, 5, 4, 3, 2, 1], [7, 6, 5, 4, 3, 2, 1], [0] * 7, [0] * 7],
                      np.float32).reshape(4, 1, 1, 7)
    batches = [(logits, np.array([4, 5, 4, 5])), (logits[:0], np.array([], int)),
               (logits[:1], np.array([0]))]
    assert evaluate(model, batches).top5_accuracy == pytest.approx(3 / 5)


def test_data_that_does_not_fit_the_model_is_refused_by_name(run, monkeypatch, tmp_path):
    for data, message in (
            (dataset([0], [0], shape=(2, 3, 1)), "pixels: images are 2x3x1, the model takes 1x1x1; "
             "give data like that which it was trained on"),
            (dataset([0], [0], ["cat", "d\nog"]), r"pixels: has 2 classes (cat, d\nog), the model "
             "7 classes (a, b, c, d, e, ...); give data with the model's classes"),
            (dataset([0], [0], [*"abdcefg"]), "pixels: class 2 is 'd', the model's is 'c'; give "
             "data with the model's classes in their order")):
        with pytest.raises(DataError) as caught:
            call(run, monkeypatch, data)
        assert str(caught.value) == message
    with pytest.raises(cli.UsageError, match="--json: .*none is not a folder"):
        call(run, monkeypatch, data, "--json", tmp_path / "none" / "e.json")


def test_a_model_without_names_takes_those_of_the_data(run, monkeypatch, tmp_path, capsys):
    save_model(load_model(run)[0], tmp_path / "model.safetensors")
    call(tmp_path, monkeypatch, dataset([0], [0]))
    assert "\ng        " in capsys.readouterr().out
