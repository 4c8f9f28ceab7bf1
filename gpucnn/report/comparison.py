"""The page that compares runs, from their records alone."""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpucnn.files import PathLike, write_atomically
from gpucnn.report import curves, text
from gpucnn.report.charts import Curve
from gpucnn.report.html import Markup, page, section, table, tag
from gpucnn.report.records import RunRecord
from gpucnn.report.run_page import footer

STYLES = 8  # how many series style.css can tell apart
# What came of a run; all else in its metrics is a setting.
OUTCOMES = ("test_accuracy", "test_loss", "seconds", "images_per_second", "step_memory_bytes",
            "epochs_made", "best_epoch")


def write_comparison(records: Sequence[RunRecord], path: PathLike) -> Path:
    """Write a page with the curves, outcomes and differing settings of runs; return its path.

    What a record misses is missing on the page. Raises OSError where the file cannot be written.
    """
    path = Path(path)
    names = _names(records)
    header = tag("header", tag("p", "Comparison", class_="kind"),
                 tag("h1", f"{len(records)} training runs"))
    write_atomically(path, page(
        f"{len(records)} training runs compared", header,
        tag("main", _outcomes(records, names), _curves(records, names),
            _settings(records, names)), footer()))
    return path


def _outcomes(records: Sequence[RunRecord], names: Sequence[str]) -> Markup:
    rows = []
    for n, (record, name) in enumerate(zip(records, names)):
        m = record.metrics
        rows.append([
            _named(n, name),
            _value(_final(record, "test_accuracy"), lambda v: text.percent(v, 2)),
            _best(record, "accuracy", max, lambda v: text.percent(v, 2)),
            _value(_final(record, "test_loss"), lambda v: f"{v:.4f}"),
            _best(record, "loss", min, lambda v: f"{v:.4f}"),
            _value(m.get("seconds"), text.duration),
            _value(m.get("images_per_second"), lambda v: f"{v:,.0f}"),
            _value(m.get("step_memory_bytes"), lambda v: text.size(int(v)))])
    return section(
        "outcomes", "Outcomes", "Of the model at the end, and the best after any epoch, which is "
        "of the validation images where a run has some. Time is that of training, memory that of a "
        "training step, as computed.",
        table("Outcomes of each run",
              ("run", "test accuracy", "highest", "test loss", "lowest", "time", "images/s",
               "memory"), rows, class_="wide"))


def _curves(records: Sequence[RunRecord], names: Sequence[str]) -> Markup:
    def each(make: Callable[[dict[str, Any]], list[Curve]], style: str) -> list[Curve]:
        """The curve of each run that a page about it would give that style."""
        return [curve._replace(name=names[n], style=_style(n))
                for n, record in enumerate(records)
                for curve in make(record.history) if curve.style == style]

    return section(
        "curves", "Learning curves", "Over the epochs, of the test images, or else of those for "
        "validation; the training loss is smoothed.",
        tag("div", curves.accuracy_chart("Accuracy", each(curves.accuracy_curves, "test")),
            curves.loss_chart("Loss", each(curves.loss_curves, "test")),
            curves.loss_chart("Training loss", each(curves.loss_curves, "training")),
            curves.rate_chart(each(curves.rate_curves, "training")), class_="charts two"))


def _settings(records: Sequence[RunRecord], names: Sequence[str]) -> Markup:
    """Those in which the runs differ."""
    flat = [text.flat({k: v for k, v in record.metrics.items() if k not in OUTCOMES})
            for record in records]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    rows = []
    for key in keys:
        values = [text.setting(settings[key]) if key in settings else "not recorded"
                  for settings in flat]
        if len(set(values)) > 1:
            rows.append((key, *values))
    header = ("setting", *(_named(n, name) for n, name in enumerate(names)))
    content = table("Settings that differ", header, rows, class_="wide") if rows else tag(
        "p", "All settings on record are equal.", class_="empty")
    return section("settings", "Settings that differ", None, content)


def _names(records: Sequence[RunRecord]) -> list[str]:
    """Of the folders; their whole paths where two are called alike."""
    names = [record.folder.resolve().name for record in records]
    count = Counter(names)
    return [name if count[name] == 1 else str(record.folder)
            for record, name in zip(records, names)]


def _style(n: int) -> str:
    """The class of a run's colour; after all colours, they come dashed."""
    return f"run{n % STYLES}" + (" dashed" if n // STYLES % 2 else "")


def _named(n: int, name: str) -> Markup:
    return tag("span", tag("span", class_=f"key {_style(n)}"), name, class_="named")


def _final(record: RunRecord, key: str) -> Any:
    """As the metrics have it, or else at the end of the last epoch."""
    _, values = curves.epochs_of(record.history, key)
    return record.metrics.get(key, values[-1] if values else None)


def _best(record: RunRecord, what: str, choose: Callable[..., Any],
          show: Callable[[float], str]) -> Any:
    """Of all epochs, on the images that were looked at after each."""
    key = f"{curves.looked_at_in(record.history)}_{what}"
    pairs = [(v, e) for e, v in zip(*curves.epochs_of(record.history, key)) if math.isfinite(v)]
    if not pairs:
        return "-"
    value, epoch = choose(pairs, key=lambda pair: pair[0])
    return [tag("small", f"epoch {epoch:g} "), show(value)]


def _value(value: Any, show: Callable[[float], str]) -> str:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return show(value) if number and math.isfinite(value) else "-"
