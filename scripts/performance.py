"""Write docs/performance.md from docs/performance.template and the figures in benchmarks/*.json.

The template holds the text. A line {{table ...}} in it becomes a table, {{word ...}} in a sentence
one figure: see TABLES and FIGURES. Run it after adding a file to benchmarks/, or changing the text.
"""
from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for python scripts/performance.py

from gpucnn import cli
from gpucnn.errors import GpucnnError
from gpucnn.files import write_atomically
from scripts.benchmark import NETS, PEERS, PRECISIONS

ROOT = Path(__file__).resolve().parents[1]
NONE = "not measured yet"
CONTESTANTS = {"cpu": ["gpucnn", "torch", "torch-channels-last", "jax"], "gpu": ["gpucnn", *PEERS]}
Row = dict[str, Any]


def parser() -> argparse.ArgumentParser:
    p = cli.Parser(prog="performance.py", description=__doc__,
                   formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--benchmarks", type=Path, default=ROOT / "benchmarks", metavar="DIR",
                   help="where the JSON files are (default: benchmarks/ of the repository)")
    p.add_argument("--template", type=Path, default=ROOT / "docs" / "performance.template",
                   metavar="FILE", help="the text (default: docs/performance.template)")
    p.add_argument("--out", type=Path, default=ROOT / "docs" / "performance.md", metavar="FILE",
                   help="the page (default: docs/performance.md)")
    return p


def main(arguments: argparse.Namespace) -> None:
    text = Page(arguments.benchmarks).fill(arguments.template.read_text(encoding="utf-8"))
    write_atomically(arguments.out, text.encode())
    print(arguments.out)


class Page:
    """The tables and figures that the files of a folder give."""

    def __init__(self, folder: Path):
        files = [json.loads(path.read_text(encoding="utf-8"))
                 for path in sorted(folder.glob("*.json"))]
        self.reports = newest_first(filter(lambda f: "results" in f, map_reports(files)))
        self.gpu_checks = newest_first(f for f in files if "results" not in f)
        self.runs: list[Row] = []

    def fill(self, template: str) -> str:
        """The template with everything in its place. Raises GpucnnError for what is not known."""
        def replaced(match: re.Match[str]) -> str:
            name, *arguments = match[1].split()
            make = TABLES.get(name) or FIGURES.get(name)
            if make is None:
                raise GpucnnError(f"{match[0]} is neither a table nor a figure; there are "
                                  f"{', '.join((*TABLES, *FIGURES))}")
            return make(self, *arguments)

        # The list of runs comes last, when it is known which are told of.
        text = re.sub(r"\{\{((?!runs\b)[^}]+)\}\}", replaced, template)
        return text.replace("{{runs}}", self.list_of_runs())

    def run(self, report: Row) -> str:
        """The number under which the list tells machine, date and command."""
        if report not in self.runs:
            self.runs.append(report)
        return f"[{self.runs.index(report) + 1}](#runs)"

    def rows(self, device: str, task: str) -> Iterator[tuple[Row, list[Row]]]:
        """(report, the rows of all contestants) of each workload: by net, then newest first."""
        found: list[tuple[Row, list[Row]]] = []
        for report in self.reports:
            if device != device_of(report):
                continue
            groups: dict[tuple[Any, ...], list[Row]] = {}
            for row in report["results"]:
                if row["task"] == task:
                    key = (row.get("model"), row.get("batch"), precision_of(row))
                    groups.setdefault(key, []).append(row)
            found += [(report, rows) for rows in groups.values()]
        nets, kinds = list(NETS), list(PRECISIONS)
        yield from sorted(found, key=lambda pair: (
            nets.index(pair[1][0]["model"]) if pair[1][0].get("model") in nets else -1,
            kinds.index(precision_of(pair[1][0])), pair[1][0].get("batch") or 0))

    def workloads(self, device: str, task: str, cell: Callable[[Row, Row | None], str],
                  contestants: list[str]) -> str:
        """A table of one line a workload, one column a contestant.

        On a GPU each net is there, with the precisions in which it is not measured in one line.
        """
        lines, missing = [], {name: list(PRECISIONS) for name in NETS}
        for report, rows in self.rows(device, task):
            ours = next((row for row in rows if row["contestant"] == "gpucnn"), None)
            by_name = {row["contestant"]: row for row in rows}
            model, precision = rows[0]["model"], precision_of(rows[0])
            if precision in missing.get(model, []):
                missing[model].remove(precision)
            lines.append([model, str(rows[0]["batch"]), precision,
                          *(cell(by_name[name], ours) if name in by_name else ""
                            for name in contestants), self.run(report)])
        if device == "gpu":
            lines += [[name, str(NETS[name].gpu_batch), ", ".join(kinds), NONE,
                       *[""] * len(contestants)] for name, kinds in missing.items() if kinds]
        return table(["network", "batch", "precision", *contestants, "run"], lines)

    def times(self, device: str, task: str) -> str:
        return self.workloads(device, task, time_cell, CONTESTANTS[device])

    def memory(self, device: str, task: str) -> str:
        """Peak MB: of the process on a CPU, of the GPU's memory on a GPU."""
        key = "device_bytes" if device == "gpu" else "peak_bytes"

        def cell(row: Row, ours: Row | None) -> str:
            value = row.get(key)
            return "" if value is None else f"{value / 1e6:.0f}"

        return self.workloads(device, task, cell, CONTESTANTS[device])

    def load(self, device: str) -> str:
        """Seconds of the imports and of first steps."""
        lines, tasks = [], ["import", "first step"]
        if device == "gpu":
            tasks = ["import", "first step, cold caches", "first step, warm caches"]
        for task in tasks:
            found = list(self.rows(device, task))
            for report, rows in found:
                of = f" of {rows[0]['model']}, batch {rows[0]['batch']}, " \
                     f"{precision_of(rows[0])}" if "model" in rows[0] else ""
                cells = "; ".join(f"{row['contestant']} " + (
                    "failed" if "error" in row else f"{row['median']:.2f}") for row in rows)
                lines.append([task + of, cells, self.run(report)])
            if not found:
                lines.append([task, NONE, ""])
        return table(["what", "seconds", "run"], lines)

    def ceilings(self, device: str) -> str:
        lines = []
        for report in self.reports:
            if device == device_of(report):
                for row in report.get("ceilings", []):
                    if "per_second" in row:
                        unit = "GFLOP/s" if row["task"] == "product" else "GB/s"
                        lines.append([row["task"], precision_of(row), row["contestant"],
                                      f"{row['per_second'] / 1e9:.0f} {unit}", self.run(report)])
        return table(["what", "precision", "by", "per second", "run"],
                     lines or [[what, "", "", NONE, ""] for what in ("product", "copy")])

    def check(self, device: str) -> str:
        """Whether captured steps, eager ones and another run give the same bits."""
        def cell(row: Row, ours: Row | None) -> str:
            return row.get("error") or ("the same bits" if row["passed"] else "OTHER BITS")

        return self.workloads(device, "check", cell, ["gpucnn"])

    def limits(self) -> str:
        return self._checked("limits", ["what", "per second"], lambda row: [
            row["name"], f"{row['rate'] / 1e12:.2f} T{'B' if row['unit'] == 'bytes' else 'FLOP'}/s"]
            if "rate" in row else None)

    def kernels(self) -> str:
        return self._checked("memory", ["kernel", "type", "microseconds", "share of the copy"],
                             lambda row: [row["name"], row["dtype"], f"{row['microseconds']:.1f}",
                                          f"{row['of_limit']:.0%}"]
                             if row.get("of_limit") else None)

    def convolutions(self) -> str:
        """What gpu_check sums up of its convolutions."""
        lines = [[key, text, self.run(content)] for content in self.gpu_checks
                 for key, value in content.get("conv", {}).get("summary", {}).items()
                 for text in value["text"]]
        return table(["network and mode", "", "run"], lines or [["", NONE, ""]])

    def _checked(self, section: str, header: list[str], cells: Callable[[Row], list[str] | None]
                 ) -> str:
        """A table of the rows of a section of gpu_check that hold figures."""
        lines = [[*found, self.run(content)] for content in self.gpu_checks
                 for row in content.get(section, {}).get("rows", []) if (found := cells(row))]
        return table([*header, "run"], lines or [[NONE, *[""] * len(header)]])

    def profile(self, model: str) -> str:
        """Where a step's time goes, from the newest profile."""
        report, profile = self.find_profile(model)
        whole = profile["step"]
        lines = []
        for row in profile["rows"]:
            seconds = row["forward"] + row["backward"]
            if not row["forward_flops"] and seconds < whole / 1000:
                continue
            shares = [f"{row[f'{name}_flops_per_second'] / profile['peak_flops_per_second']:.0%}"
                      if row["forward_flops"] else "" for name in ("forward", "backward")]
            lines.append([row["layer"], f"{1e3 * row['forward']:.2f}",
                          f"{1e3 * row['backward']:.2f}", f"{seconds / whole:.1%}", *shares])
        lines += [[name, f"{1e3 * profile[key]:.2f}", "", f"{profile[key] / whole:.1%}", "", ""]
                  for name, key in (("loss", "loss"), ("optimiser", "optimiser"), ("all", "step"))]
        return table(["layer", "forward ms", "backward ms", "of the step", "forward of peak",
                      "backward of peak"], lines) + f"\n\nRun {self.run(report)}."

    def find_profile(self, model: str) -> tuple[Row, Row]:
        for report in self.reports:
            for profile in report.get("profiles", []):
                if profile["model"] == model:
                    return report, profile
        raise GpucnnError(f"no file of benchmarks/ holds a profile of {model}; measure it with "
                          "benchmark.py step --profile --json")

    def share(self, model: str, kind: str) -> str:
        """Of a step's time, what layers of a class take."""
        _, profile = self.find_profile(model)
        seconds = sum(row["forward"] + row["backward"] for row in profile["rows"]
                      if row["class"] == kind)
        return f"{seconds / profile['step']:.0%}"

    def peak(self, model: str) -> str:
        """GFLOP/s of the product beside that profile."""
        return f"{self.find_profile(model)[1]['peak_flops_per_second'] / 1e9:.0f}"

    def milliseconds(self, *which: str) -> str:
        return number(1e3 * self.find_row(*which)["median"])

    def ratio(self, *which: str) -> str:
        return f"{self.find_row(*which)['ratio']:.2f}"

    def find_row(self, task: str, model: str, batch: str, contestant: str) -> Row:
        """The newest of the CPU in which this contestant was beside others."""
        for _, rows in self.rows("cpu", task):
            for row in rows:
                if len(rows) > 1 and "median" in row and (
                        row["model"], str(row["batch"]), row["contestant"]) == (
                        model, batch, contestant):
                    return row
        raise GpucnnError(f"no file of benchmarks/ holds {contestant}'s {task} of {model} at batch "
                          f"{batch}")

    def list_of_runs(self) -> str:
        """Machine, date, commit, versions and command of each run that a table names."""
        lines = []
        for i, report in enumerate(self.runs):
            machine = report["machine"]
            name = machine.get("gpu") or machine["cpu"]
            cores = f", {report['threads']} threads" if "threads" in report else ""
            load = machine.get("load_average")
            versions = report.get("versions") or report.get("peer")
            told = ", ".join(f"{k} {v}" for k, v in versions.items()) \
                if isinstance(versions, dict) else ""
            lines.append(f"{i + 1}. {name}{cores}, {date_of(report)}, commit "
                         f"{machine.get('commit')}"
                         + (f", load average before it {load[0]:.1f}" if load else "")
                         + f"; {told}\n   `{report['command']}`")
        return "\n".join(lines)


TABLES: dict[str, Callable[..., str]] = {
    "times": Page.times, "memory": Page.memory, "load": Page.load, "ceilings": Page.ceilings,
    "check": Page.check, "limits": Page.limits, "kernels": Page.kernels,
    "convolutions": Page.convolutions, "profile": Page.profile}
FIGURES: dict[str, Callable[..., str]] = {
    "ms": Page.milliseconds, "ratio": Page.ratio, "share": Page.share, "peak": Page.peak}


def map_reports(files: Iterable[Row]) -> Iterator[Row]:
    """What benchmark.py wrote: as files of their own, and inside those of gpu_check.py."""
    for content in files:
        yield content
        for row in content.get("benchmark", {}).get("rows", []):
            if "report" in row:
                yield row["report"]


def newest_first(reports: Iterable[Row]) -> list[Row]:
    return sorted(reports, key=date_of, reverse=True)


def date_of(report: Row) -> str:
    return report.get("date") or report["machine"]["date"]


def device_of(report: Row) -> str:
    return "gpu" if report["machine"]["gpu"] else "cpu"


def precision_of(row: Row) -> str:
    return row.get("precision", "float32")  # files from before there was another


def time_cell(row: Row, ours: Row | None) -> str:
    """gpucnn's milliseconds and their range, of a peer the ratio first."""
    if "error" in row:
        return "failed"
    median, low, high = (number(1e3 * row[k]) for k in ("median", "minimum", "maximum"))
    if row is ours:
        eager = ", without a graph" if "not captured" in row.get("notes", {}) else ""
        return f"{median} ms ({low} to {high}), {row['images_per_second']:.0f} images/s{eager}"
    return f"{row['ratio']:.2f} ({median} ms)" if ours and "ratio" in row else f"{median} ms"


def number(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{float(f'{value:.3g}'):.12g}"


def table(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


if __name__ == "__main__":
    cli.run(main, parser())
