"""scripts/benchmark.py with few and short windows: whole networks, beside PyTorch and JAX.

Each call is a process that starts others; what it measured stands in its row's "report", as
benchmark.py would have written it to a file of its own.
"""
from __future__ import annotations

import json
import shlex
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from scripts.gpu import children
from scripts.gpu.context import Context
from scripts.gpu.nets import NETS
from scripts.gpu.report import Job, Row

FAST_PEERS = ("torch-channels-last", "torch-graph", "jax")
WINDOWS, WINDOW_SECONDS = 7, 0.2


class Call(NamedTuple):
    """seconds: about what it takes; three times that is the end of it."""

    command: str
    model: str
    precision: str
    peers: tuple[str, ...] = ()
    seconds: float = 25

    @property
    def name(self) -> str:
        beside = " by torch-compile" if self.peers == ("torch-compile",) else ""
        return f"{self.model} {self.command}{beside}"

    def words(self, quick: bool, batch: int | None) -> list[str]:
        """Of the command line."""
        words = ["scripts/benchmark.py", self.command, "--model", self.model, "--precision",
                 self.precision]
        if batch or quick:
            words += ["--batch", str(2 if quick else batch)]
        if self.command in ("step", "infer"):
            words.append("--no-ceilings")  # the section limits has measured them
        if self.command != "check":
            windows, seconds = (1, 1e-3) if quick else (WINDOWS, WINDOW_SECONDS)
            words += ["--windows", str(2 if self.command == "load" and not quick else windows),
                      "--seconds", str(seconds)]
        return [*words, *(["--against", ",".join(self.peers)] if self.peers else [])]


def calls(nets: list[str], precisions: list[str]) -> Iterator[Call]:
    """The most important first: are the bits right, then how fast is a step; in one precision,
    then in the others. torch.compile, which takes minutes, comes after what is quick."""
    for i, precision in enumerate(precisions):
        for net in nets:
            yield Call("check", net, precision)
            yield Call("step", net, precision, FAST_PEERS)
        if i == 0:
            for net in nets:
                yield Call("infer", net, precision, FAST_PEERS)
            for net in nets:
                yield Call("step", net, precision, ("torch-compile",), 60)
            yield Call("load", nets[0], precision, ("torch", "jax"), 40)


def jobs(context: Context) -> Iterator[Job]:
    nets = list(context.nets)
    if set(nets) == NETS.keys():
        nets.append("lenet5")  # whose convolutions are none of those that are measured
    for call in calls(nets, [mode.precision for mode in context.modes]):
        yield Job(f"benchmark, {call.precision}", call.name, partial(run, context, call),
                  call.seconds)


def run(context: Context, call: Call) -> Row:
    """The row, with the best of the peers in it. Raises OutOfTime."""
    words = call.words(context.quick, context.batch)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        passed, output = children.run_child(
            [sys.executable, *words, "--json", str(out)],
            min(3 * call.seconds, context.budget.left), {"GPUCNN_BACKEND": "cupy"})
        report = json.loads(out.read_text()) if out.exists() else None
    row: Row = {"group": f"benchmark, {call.precision}", "name": call.name, "passed": passed}
    if report is None:
        last = output.strip().splitlines()[-1:]
        return row | {"passed": False, "note": "".join(last), "output": output[-4000:]}
    report["command"] = shlex.join(["python", *words])
    row["report"] = report
    return row | (checked(report) if call.command == "check" else timed(report))


def checked(report: dict[str, Any]) -> Row:
    (result,) = report["results"]
    if "error" in result:
        return {"note": result["error"]}
    differing = [*result["differs_from_eager"], *result["differs_between_runs"]]
    return {"note": f"other bits in {differing[0]}" if differing else
            "captured, eager and another run: the same bits"}


def timed(report: dict[str, Any]) -> Row:
    """gpucnn's time of the last task, beside the fastest of the peers."""
    task = report["results"][-1]["task"]
    rows = [row for row in report["results"] if row["task"] == task]
    batch = rows[-1].get("batch")
    rows = [row for row in rows if row.get("batch") == batch]
    ours = next(row for row in rows if row["contestant"] == "gpucnn")
    if "error" in ours:
        return {"note": ours["error"]}
    peers = [row for row in rows if row is not ours]
    measured = sorted((row for row in peers if "median" in row), key=lambda row: row["median"])
    failed = [row["contestant"] for row in peers if "error" in row]
    notes = [f"{ours['images_per_second']:.0f} images/s"] if "images_per_second" in ours else []
    result: Row = {"microseconds": 1e6 * ours["median"], "spread": ours["spread"]}
    if measured:
        result |= {"other_microseconds": 1e6 * measured[0]["median"],
                   "ratio": measured[0]["ratio"]}
        notes.append(measured[0]["contestant"])
    if failed:
        notes.append(f"not {', '.join(failed)}")
    return result | {"note": ", ".join(notes)}
