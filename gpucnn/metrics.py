"""What evaluation reports: the confusion matrix, and precision and recall of each class."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gpucnn.data.dataset import check_labels


@dataclass(frozen=True)
class ClassScores:
    """The scores of one class, each from 0 to 1; nan where its denominator is 0.

    precision: of the images predicted as this class, the fraction that are.
    recall: of the images of this class, the fraction predicted as it.
    f1: the harmonic mean of the two, 2 tp / (2 tp + fp + fn).
    support: how many images are of this class.
    """

    name: str
    precision: float
    recall: float
    f1: float
    support: int


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, n_classes: int) -> np.ndarray:
    """int64 (n_classes, n_classes): at [i, j] the images of class i predicted as class j.

    labels, predictions: NumPy integers (n,) from 0 to n_classes - 1.
    Raises TypeError or ValueError for what is not.
    """
    check_labels(labels, n_classes)
    check_labels(predictions, n_classes)
    if len(labels) != len(predictions):
        raise ValueError(f"{len(labels)} labels but {len(predictions)} predictions")
    pairs = labels.astype(np.int64) * n_classes + predictions.astype(np.int64)
    return np.bincount(pairs, minlength=n_classes**2).reshape(n_classes, n_classes)


def accuracy(matrix: np.ndarray) -> float:
    """The fraction on the diagonal of a confusion matrix; nan for a matrix of zeros."""
    return _ratio(np.trace(matrix), matrix.sum())


def classification_report(matrix: np.ndarray, class_names: Sequence[str]) -> list[ClassScores]:
    """The scores of each class, from a confusion matrix with the true class on the rows."""
    n = len(class_names)
    if matrix.shape != (n, n):
        raise ValueError(f"classification_report: matrix is {matrix.shape}, but {n} class names "
                         f"need {(n, n)}")
    true, predicted, hits = matrix.sum(axis=1), matrix.sum(axis=0), matrix.diagonal()
    return [ClassScores(name, _ratio(hits[i], predicted[i]), _ratio(hits[i], true[i]),
                        _ratio(2 * hits[i], true[i] + predicted[i]), int(true[i]))
            for i, name in enumerate(class_names)]


def format_report(report: Sequence[ClassScores]) -> str:
    """The report as an aligned table; "-" stands for a score that has no value."""
    width = max([len("class"), *(len(scores.name) for scores in report)])
    lines = [f"{'class':<{width}}  precision  recall      f1  support"]
    for s in report:
        lines.append(f"{s.name:<{width}}  {_decimal(s.precision):>9}  {_decimal(s.recall):>6}  "
                     f"{_decimal(s.f1):>6}  {s.support:>7}")
    return "\n".join(lines)


def format_confusion(matrix: np.ndarray, class_names: Sequence[str]) -> str:
    """The confusion matrix as an aligned table, the true classes on the rows."""
    width = max(len(name) for name in class_names)
    cell = len(str(matrix.max())) + 2
    return "\n".join(f"{name:<{width}}" + "".join(f"{count:>{cell}}" for count in row)
                     for name, row in zip(class_names, matrix))


def _ratio(part: int, whole: int) -> float:
    return float(part / whole) if whole else float("nan")


def _decimal(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.4f}"
