"""The page about one run."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gpucnn
from gpucnn.data import Dataset
from gpucnn.files import PathLike, write_atomically
from gpucnn.layers import Layer
from gpucnn.report import sections
from gpucnn.report.html import Markup, page, tag
from gpucnn.report.inspection import ask
from gpucnn.report.pictures import require_pillow

REPORT_FILE = "report.html"


def write_report(run: PathLike, model: Layer, test_set: Dataset, *, history: Mapping[str, Any],
                 metrics: Mapping[str, Any]) -> Path:
    """Write the page about a run into its folder, and return its path.

    model: built; it is asked about all test images, and left as it is.
    history, metrics: as scripts/train.py writes them. What they miss, the page misses.

    Raises ImportError where Pillow is missing, ValueError where the data set has not as many
    classes as the model, DataError where it is empty, OSError where the file cannot be written.
    """
    require_pillow()
    folder = Path(run)
    answers = ask(model, test_set)
    parts = {
        "curves": ("Curves", sections.learning(history)),
        "confusion": ("Confusion", sections.confusion(answers, test_set.class_names)),
        "classes": ("Classes", sections.classes(answers, test_set.class_names)),
        "mistakes": ("Most wrong", sections.mistakes(answers, test_set)),
        "filters": ("Filters", sections.filters(model)),
        "maps": ("Feature maps", sections.maps(model, answers, test_set)),
        "layers": ("Time and memory", sections.layers(model, test_set, metrics.get("batch_size"))),
        "settings": ("Settings", sections.settings(metrics)),
    }
    parts = {name: part for name, part in parts.items() if part[1] is not None}
    name = metrics.get("model", "network")
    header = tag("header", tag("p", "Training report", class_="kind"), tag("h1", name),
                 tag("p", f"{folder.resolve().name}, tested on {test_set.name}", class_="subject"),
                 sections.summary(model, answers, history, metrics))
    path = folder / REPORT_FILE
    write_atomically(path, page(
        f"{name}: training report", header,
        tag("nav", tag("ul", (tag("li", tag("a", title, href=f"#{anchor}"))
                              for anchor, (title, _) in parts.items())), aria_label="Parts"),
        tag("main", (part for _, part in parts.values())), footer()))
    return path


def footer() -> Markup:
    """The last line of every page."""
    return tag("footer", tag("p", f"Written by gpucnn {gpucnn.__version__}. This page loads "
                                  "nothing and runs no script."))
