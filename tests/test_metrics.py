import math

import numpy as np
import pytest

from gpucnn.metrics import (
    ClassScores,
    accuracy,
    classification_report,
    confusion_matrix,
    format_report,
)


def test_confusion_matrix_counts_true_rows_and_predicted_columns():
    labels = np.array([0, 0, 0, 1, 2, 2], np.uint8)
    predictions = np.array([0, 2, 2, 1, 1, 2], np.int64)
    matrix = confusion_matrix(labels, predictions, 4)
    assert matrix.dtype == np.int64
    assert matrix.tolist() == [[1, 0, 2, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert accuracy(matrix) == 0.5


def test_confusion_matrix_by_a_plain_loop(rng):
    labels, predictions = rng.integers(0, 200, (2, 5000)).astype(np.uint8)
    expected = np.zeros((200, 200), int)
    for i, j in zip(labels, predictions):
        expected[i, j] += 1
    np.testing.assert_array_equal(confusion_matrix(labels, predictions, 200), expected)


def test_confusion_matrix_of_nothing():
    none = np.zeros(0, np.int64)
    matrix = confusion_matrix(none, none, 3)
    assert matrix.tolist() == [[0] * 3] * 3
    assert math.isnan(accuracy(matrix))


def test_confusion_matrix_refuses():
    good = np.array([0, 1])
    with pytest.raises(ValueError, match=r"label 2 at position 1 is out of range for 2 classes"):
        confusion_matrix(np.array([0, 2]), good, 2)
    with pytest.raises(ValueError, match=r"label -1 at position 0 is out of range"):
        confusion_matrix(good, np.array([-1, 0]), 2)
    with pytest.raises(TypeError, match="labels must be integers of shape"):
        confusion_matrix(good, np.array([0.0, 1.0]), 2)
    with pytest.raises(ValueError, match=r"^2 labels but 1 predictions$"):
        confusion_matrix(good, good[:1], 2)


MATRIX = np.array([[8, 2, 0, 0], [1, 9, 0, 0], [3, 1, 0, 0], [0, 0, 0, 0]])


def test_classification_report():
    cat, dog, owl, emu = classification_report(MATRIX, ["cat", "dog", "owl", "emu"])
    assert (cat.name, cat.support, dog.support, owl.support, emu.support) == ("cat", 10, 10, 4, 0)
    assert (cat.precision, cat.recall) == (8 / 12, 8 / 10)
    assert cat.f1 == pytest.approx(2 / (1 / cat.precision + 1 / cat.recall))
    assert math.isnan(owl.precision)  # never predicted
    assert (owl.recall, owl.f1) == (0, 0)
    assert all(math.isnan(v) for v in (emu.precision, emu.recall, emu.f1))
    with pytest.raises(ValueError, match=r"matrix is \(4, 4\), but 1 class names need \(1, 1\)"):
        classification_report(MATRIX, ["cat"])


def test_format_report():
    report = classification_report(MATRIX, ["cat", "a dog", "owl", "emu"])
    assert format_report(report).splitlines() == [
        "class  precision  recall      f1  support",
        "cat       0.6667  0.8000  0.7273       10",
        "a dog     0.7500  0.9000  0.8182       10",
        "owl            -  0.0000  0.0000        4",
        "emu            -       -       -        0",
    ]
    long = format_report([ClassScores("a long name", 1, 1, 1, 123456789)]).splitlines()
    assert long[1].startswith("a long name     1.0000")
    assert long[0].startswith("class        precision")
