"""What a run writes down while it goes on: log.csv, log.jsonl, and TensorBoard's events.

A run that goes on after a kill takes back what was written after its checkpoint.
"""
from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpucnn.files import write_atomically
from gpucnn.training.loop import EpochRecord, StepRecord

CSV_FIELDS = ("epoch", "step", "train_loss", "train_accuracy", "loss", "accuracy",
              "learning_rate", "seconds", "images_per_second")


class RunLog:
    """Files in the run's folder, written on after each epoch; as many of its lines as were not
    written yet, so that a kill costs one epoch of log at most.

    log.csv has a line for each epoch, log.jsonl one for each step and epoch; loss and accuracy
    without "train_" are those of the images that are looked at after each epoch.

    steps: how many steps of the log count, those of the checkpoint; later ones are dropped.
    """

    def __init__(self, folder: Path, steps: int = 0):
        self.csv, self.jsonl = folder / "log.csv", folder / "log.jsonl"
        self._lines: list[str] = []
        self._rate = 0.0
        self._events = tensorboard_writer(folder, steps)
        kept = [line for line in read_jsonl(self.jsonl) if line["step"] <= steps]
        write_atomically(self.jsonl, "".join(map(_json_line, kept)).encode())
        epochs = [line for line in kept if line["event"] == "epoch"]
        header = dict(zip(CSV_FIELDS, CSV_FIELDS))
        write_atomically(self.csv, _csv_lines([header, *epochs]).encode())

    def step(self, record: StepRecord) -> None:
        self._rate = record.learning_rate
        self._lines.append(_json_line({
            "event": "step", "step": record.step, "epoch": record.epoch, "loss": record.loss,
            "learning_rate": record.learning_rate, "images": record.images}))
        if self._events:
            self._events.add_scalar("step/loss", record.loss, record.step)
            self._events.add_scalar("step/learning_rate", record.learning_rate, record.step)

    def epoch(self, record: EpochRecord) -> None:
        found = record.validation
        line: dict[str, Any] = {
            "event": "epoch", "step": record.step, "epoch": record.epoch,
            "train_loss": record.train_loss, "train_accuracy": record.train_accuracy,
            "loss": found.loss if found else None, "accuracy": found.accuracy if found else None,
            "learning_rate": self._rate, "seconds": round(record.seconds, 3),
            "images_per_second": round(record.images / max(record.seconds, 1e-9), 1)}
        self._lines.append(_json_line(line))
        self.flush()
        with open(self.csv, "a", newline="") as file:
            file.write(_csv_lines([line]))
        if self._events:
            for name in ("train_loss", "train_accuracy", "loss", "accuracy"):
                if line[name] is not None:
                    self._events.add_scalar(f"epoch/{name}", line[name], record.step)

    def flush(self) -> None:
        """Write the steps that are not written yet."""
        lines, self._lines = "".join(self._lines), []
        with open(self.jsonl, "a") as file:
            file.write(lines)
        if self._events:
            self._events.flush()

    def close(self) -> None:
        """Write all that is not written yet."""
        self.flush()
        if self._events:
            self._events.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl; a last one that a kill has cut is not there."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    return [json.loads(line) for line in text[:text.rfind("\n") + 1].splitlines()]


def tensorboard_writer(folder: Path, steps: int) -> Any:
    """A SummaryWriter into tensorboard/; None without the extra `tensorboard`."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    # What was written after the checkpoint is hidden by TensorBoard, from this step on.
    return SummaryWriter(str(folder / "tensorboard"), purge_step=steps + 1)


def _json_line(value: dict[str, Any]) -> str:
    return json.dumps(value) + "\n"


def _csv_lines(rows: Iterable[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_FIELDS, extrasaction="ignore", lineterminator="\n")
    writer.writerows(rows)
    return text.getvalue()
