"""The processes of the contestants, and how they take turns."""
from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gpucnn.files import one_line

ROOT = Path(__file__).resolve().parents[2]
PAUSE = 0.1  # seconds before a window, in which idle threads of the others go to sleep
Row = dict[str, Any]


class Failed(Exception):
    """A contestant cannot go on; the message says why."""


class Child:
    """A contestant's process, told what to do over a pipe (scripts/contestants/__main__.py)."""

    def __init__(self, name: str, workload: dict[str, Any], env: dict[str, str]):
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - close() closes it
        self.process = subprocess.Popen(
            [sys.executable, "-m", "scripts.contestants", name, json.dumps(workload)], cwd=ROOT,
            env={**os.environ, **env}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.errors, bufsize=0)

    def receive(self) -> dict[str, Any]:
        """The next reply. Raises Failed."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.errors.seek(0)
            last = self.errors.read().decode(errors="replace").strip().splitlines()[-1:]
            raise Failed(f"ended with code {code}: {one_line(''.join(last)) or 'said nothing'}")
        reply = json.loads(line)
        if "error" in reply:
            raise Failed(reply["error"])
        return reply

    def ask(self, do: str, **options: Any) -> dict[str, Any]:
        """The reply to a request. Raises Failed."""
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # receive() finds out why
            self.process.stdin.write(json.dumps({"do": do, **options}).encode() + b"\n")
        return self.receive()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.errors):
            assert pipe
            pipe.close()


class Contest:
    """All contestants with one workload, each alive until it fails or all is done."""

    def __init__(self, names: Sequence[str], workload: dict[str, Any], report: dict[str, Any]):
        self.names, self.workload, self.report = names, workload, report
        self.running: dict[str, Child] = {}
        self.reasons: dict[str, str] = {}

    def __enter__(self) -> Contest:
        try:
            for name in self.names:
                self.running[name] = Child(name, self.workload, self.report["environment"])
                self._try(name, self._greet)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        for child in self.running.values():
            child.close()

    def ask(self, name: str, do: str, **options: Any) -> dict[str, Any] | None:
        """A contestant's reply; None where it has failed, now or before."""
        return self._try(name, lambda child: child.ask(do, **options))

    def measure(self, task: str, windows: int, seconds: float) -> list[Row]:
        """A row for each contestant: its time of the task in windows of about `seconds`.

        wall: the median of the windows on the host's clock; on a GPU the others are the device's.
        """
        steps: dict[str, int] = {}
        walls: dict[str, list[float]] = defaultdict(list)
        for name in self.names:
            reply = self.ask(name, "warm_up", task=task, seconds=seconds)
            if reply:
                steps[name] = reply["steps"]

        def window(name: str) -> float:
            time.sleep(min(PAUSE, seconds))
            reply = self.ask(name, "window", task=task, steps=steps.get(name))
            if reply is None:
                raise Failed(self.reasons[name])
            walls[name].append(reply["wall"] / steps[name])
            return reply["seconds"] / steps[name]

        rows = alternate({name: partial(window, name) for name in self.names}, windows)
        where = {"task": task, **{k: self.workload[k] for k in ("model", "batch", "precision")}}
        return [{**where, **row, **({} if "error" in row else {
            "wall": statistics.median(walls[row["contestant"]]),
            "steps_per_window": steps[row["contestant"]]})} for row in rows]

    def _try(self, name: str, call: Callable[[Child], Any]) -> Any:
        if name not in self.running:
            return None
        try:
            return call(self.running[name])
        except Failed as e:
            self.running.pop(name).close()
            self.reasons[name] = str(e)
            return None

    def _greet(self, child: Child) -> None:
        self.report["versions"] |= child.receive()["versions"]


def alternate(measures: dict[str, Callable[[], float]], windows: int) -> list[Row]:
    """Call all measures in turn, `windows` times: a b c, c b a, a b c, ...

    So what drifts, such as the GPU's clocks, falls on all alike. Returns a row for each: the
    samples and what they say, or the error of one that failed.
    """
    samples: dict[str, list[float]] = {name: [] for name in measures}
    errors: dict[str, str] = {}
    order = list(measures)
    for _ in range(windows):
        for name in order:
            if name in errors:
                continue
            try:
                samples[name].append(measures[name]())
            except Failed as e:
                errors[name] = str(e)
        order.reverse()
    rows: list[Row] = []
    for name, seconds in samples.items():
        if name in errors:
            rows.append({"contestant": name, "error": errors[name]})
            continue
        median = statistics.median(seconds)
        rows.append({"contestant": name, "median": median, "minimum": min(seconds),
                     "maximum": max(seconds), "spread": (max(seconds) - min(seconds)) / median,
                     "samples": seconds})
    ours = next((row.get("median") for row in rows if row["contestant"] == "gpucnn"), None)
    for row in rows:
        if ours and "median" in row:
            row["ratio"] = row["median"] / ours
    return rows
