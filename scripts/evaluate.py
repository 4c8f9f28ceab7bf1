"""Measure a trained model: accuracy, precision and recall of each class, the confusion matrix."""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for python scripts/evaluate.py

import numpy as np

from gpucnn import cli, metrics
from gpucnn.data import Loader
from gpucnn.files import one_line
from gpucnn.training import evaluate
from gpucnn.viz import plot_confusion, require_matplotlib


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="evaluate.py", description=__doc__)
    cli.add_run_argument(p)
    cli.add_data_arguments(p)
    p.add_argument("--batch-size", type=cli.positive_int, default=500,
                   help="(default: %(default)s)")
    p.add_argument("--plot", type=Path, metavar="PNG", help="draw the confusion matrix there")
    return p


def main(arguments: argparse.Namespace) -> None:
    if arguments.plot:
        require_matplotlib()
        if not arguments.plot.parent.is_dir():
            raise cli.UsageError(f"--plot: {one_line(arguments.plot.parent)} is not a folder")
    cli.choose_backend()
    model, _ = cli.load_run(arguments.run)
    _, test_set = cli.load_data(arguments)
    result = evaluate(model, Loader(test_set, arguments.batch_size).epoch())
    if not np.isfinite(result.loss):
        raise ValueError(f"the loss is {result.loss}; the model may have diverged: train it again "
                         "with a lower learning rate")
    names = test_set.class_names
    matrix = metrics.confusion_matrix(result.labels, result.predictions, len(names))
    print(f"{test_set.name}: {len(test_set):,} images, accuracy {result.accuracy:.4f}, "
          f"loss {result.loss:.4f}\n")
    print(metrics.format_report(metrics.classification_report(matrix, names)))
    print("\nconfusion matrix, true classes on the rows, predicted ones in the same order:\n")
    print(metrics.format_confusion(matrix, names))
    if arguments.plot:
        plot_confusion(matrix, names, arguments.plot)


if __name__ == "__main__":
    cli.run(main, parser())
