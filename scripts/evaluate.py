"""Measure a trained model: accuracy, precision and recall of each class, the confusion matrix."""
from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for python scripts/evaluate.py

import numpy as np

from gpucnn import cli, metrics
from gpucnn.config import take_data_of_run
from gpucnn.data import Dataset, Loader
from gpucnn.errors import DataError
from gpucnn.files import one_line, write_atomically
from gpucnn.layers import Layer
from gpucnn.training import Evaluation, evaluate
from gpucnn.viz import plot_confusion, require_matplotlib


def parser() -> argparse.ArgumentParser:
    p = cli.Parser(prog="evaluate.py", description=__doc__)
    cli.add_run_argument(p)
    cli.add_data_arguments(p, of_run=True)
    p.add_argument("--part", choices=("train", "test"), default="test",
                   help="of the data (default: %(default)s)")
    p.add_argument("--batch-size", type=cli.positive_int, default=500,
                   help="(default: %(default)s)")
    p.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    p.add_argument("--csv", type=Path, metavar="FILE", help="write those of each class there")
    p.add_argument("--plot", type=Path, metavar="PNG", help="draw the confusion matrix there")
    return p


def main(arguments: argparse.Namespace) -> None:
    if arguments.plot:
        require_matplotlib()
    for option in ("json", "csv", "plot"):
        cli.require_folder_of(f"--{option}", getattr(arguments, option))
    cli.choose_backend()
    path = cli.find_model(arguments.run)
    model, classes = cli.load_run(path)
    take_data_of_run(arguments, path.parent)
    train_set, test_set = cli.load_data(arguments, model.input_shape)
    dataset = train_set if arguments.part == "train" else test_set
    check_fits(model, classes, dataset)
    result = evaluate(model, Loader(dataset, arguments.batch_size).epoch())
    if not np.isfinite(result.loss):
        raise ValueError(f"the loss is {result.loss}; the model may have diverged: train it again "
                         "with a lower learning rate")
    names = dataset.class_names
    matrix = metrics.confusion_matrix(result.labels, result.predictions, len(names))
    report = metrics.classification_report(matrix, names)
    top5 = f"top-5 accuracy {result.top5_accuracy:.4f}, " if len(names) > 5 else ""
    print(f"{dataset.name}: {len(dataset):,} images, accuracy {result.accuracy:.4f}, {top5}"
          f"loss {result.loss:.4f}\n")
    print(metrics.format_report(report))
    print("\nconfusion matrix, true classes on the rows, predicted ones in the same order:\n")
    print(metrics.format_confusion(matrix, names))
    if arguments.json:
        write_atomically(arguments.json, json_of(dataset, result, matrix, report))
    if arguments.csv:
        write_atomically(arguments.csv, csv_of(report))
    if arguments.plot:
        plot_confusion(matrix, names, arguments.plot)


def check_fits(model: Layer, classes: list[str], dataset: Dataset) -> None:
    """Raise DataError unless the images and the classes are those that the model knows."""
    shape, names = dataset.images.shape[1:], list(dataset.class_names)
    if shape != model.input_shape:
        raise DataError(f"{dataset.name}: images are {_size(shape)}, the model takes "
                        f"{_size(model.input_shape)}; give data like that which it was trained on")
    if len(names) != len(classes):
        raise DataError(f"{dataset.name}: has {_listed(names)}, the model {_listed(classes)}; give "
                        "data with the model's classes")
    unnamed = [str(i) for i in range(len(classes))]
    wrong = [i for i, pair in enumerate(zip(names, classes)) if pair[0] != pair[1]]
    if wrong and classes != unnamed:
        i = wrong[0]
        raise DataError(f"{dataset.name}: class {i} is {names[i]!r}, the model's is "
                        f"{classes[i]!r}; give data with the model's classes in their order")


def json_of(dataset: Dataset, result: Evaluation, matrix: np.ndarray,
            report: list[metrics.ClassScores]) -> bytes:
    """All figures; null for those that have no value."""
    classes = [{name: None if value != value else value for name, value in vars(scores).items()}
               for scores in report]
    top5 = {"top5_accuracy": result.top5_accuracy} if len(report) > 5 else {}
    return json.dumps({"data": dataset.name, "images": len(dataset), "accuracy": result.accuracy,
                       **top5, "loss": result.loss, "classes": classes,
                       "confusion_matrix": matrix.tolist()}, indent=1).encode()


def csv_of(report: list[metrics.ClassScores]) -> bytes:
    """A header, and a row for each class; nothing stands where a figure has no value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["class", "precision", "recall", "f1", "support"])
    for scores in report:
        writer.writerow(["" if value != value else value for value in vars(scores).values()])
    return text.getvalue().encode()


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _listed(names: list[str]) -> str:
    few = ", ".join(map(one_line, names[:5])) + (", ..." if len(names) > 5 else "")
    return f"{len(names)} classes ({few})"


if __name__ == "__main__":
    cli.run(main, parser())
