"""The table on the terminal, 100 columns wide, and the JSON that is written row by row."""
from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gpucnn.files import one_line, write_atomically

Row = dict[str, Any]
WIDTH = 100
COLUMNS = (("", 29), ("us", 8), ("spread", 7), ("rate", 11), ("limit", 6), ("other us", 9),
           ("ratio", 7))


class OutOfTime(Exception):
    """A job did not end in its time, which says nothing about what it does."""


class Job(NamedTuple):
    """Something to measure, worth starting while `seconds` are left."""

    group: str      # what has run out of time is listed by group
    name: str
    run: Callable[[], Row]
    seconds: float = 2


class Section(NamedTuple):
    """Jobs of one kind. summary: what their rows say together, each part with a "text"."""

    title: str
    jobs: Callable[[Any], Iterator[Job]]
    summary: Callable[[list[Row]], Row] = lambda rows: {}


class Report:
    """What was measured so far; each addition is on the disk at once."""

    def __init__(self, path: Path, start: Row):
        self.path = path
        self.content: Row = {**start, "complete": False}
        path.parent.mkdir(parents=True, exist_ok=True)
        self.save()

    def save(self) -> None:
        write_atomically(self.path, json.dumps(self.content, indent=1, default=str).encode())

    def section(self, name: str) -> Row:
        return self.content.setdefault(name, {"rows": [], "skipped": {}})

    def skip(self, section: str, job: Job) -> None:
        self.section(section)["skipped"].setdefault(job.group, []).append(job.name)

    def add(self, section: str, row: Row) -> None:
        self.section(section)["rows"].append(row)
        self.save()

    @property
    def sections(self) -> list[Row]:
        return [part for part in self.content.values()
                if isinstance(part, dict) and "skipped" in part]

    @property
    def skipped(self) -> dict[str, list[str]]:
        """By group."""
        return {k: v for part in self.sections for k, v in part["skipped"].items()}

    @property
    def verdicts(self) -> list[bool]:
        """Of each row, whether it passed."""
        return [row["passed"] for part in self.sections for row in part["rows"]]


def header() -> str:
    return "".join(name.ljust(width) if i == 0 else name.rjust(width)
                   for i, (name, width) in enumerate(COLUMNS))


def line(row: Row) -> str:
    """A row of the table; what does not fit is cut, and stands in the JSON."""
    def text(key: str, form: Callable[[Any], str]) -> str:
        value = row.get(key)
        return "" if value is None else form(value)

    cells = [row["name"], text("microseconds", number), text("spread", "{:.1%}".format),
             text("rate", lambda r: rate(r, row["unit"])), text("of_limit", "{:.0%}".format),
             text("other_microseconds", number), text("ratio", number)]
    figures = "".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                      for i, (cell, (_, width)) in enumerate(zip(cells, COLUMNS)))
    if not any(cells[1:]):
        figures = cells[0].ljust(COLUMNS[0][1])
    note = row.get("note", "")
    if not row["passed"]:
        note = f"FAILED: {note}"
    return f"{figures}  {one_line(note)}"[:WIDTH].rstrip()


def number(value: float) -> str:
    """Three digits at least."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(max(value, 0.1))))}f}"


def rate(value: float, unit: str) -> str:
    """Per second: bytes as GB, operations as TFLOP."""
    return f"{value / 1e9:.0f} GB/s" if unit == "bytes" else f"{value / 1e12:.1f} TF/s"


def short(plan: object) -> str:
    """A plan as the table has room for it: 128x64t/2 for implicit_gemm 128x64 on tensor cores / 2.
    """
    text = str(plan)
    for words, sign in (("implicit_gemm ", ""), (" / ", "/"), (" on tensor cores", "t"),
                        (" by wgmma", "w")):
        text = text.replace(words, sign)
    return text
