"""What a run writes down while it goes on: log.csv, log.jsonl, and TensorBoard's events.

A run that goes on after a kill takes back what was written after its checkpoint.
"""
from __future__ import annotations

import csv
import io
import json
import os
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpucnn.errors import DataError
from gpucnn.files import one_line, write_atomically
from gpucnn.training.loop import EpochRecord, StepRecord

CSV_FIELDS = ("epoch", "step", "train_loss", "train_accuracy", "loss", "accuracy",
              "learning_rate", "seconds", "images_per_second")


class RunLog:
    """Files in the run's folder, written on after each epoch; as many of its lines as were not
    written yet, so that a kill costs one epoch of log at most, and a full disk none.

    log.csv has a line for each epoch, log.jsonl one for each step and epoch; loss and accuracy
    without "train_" are those of the images that are looked at after each epoch.

    steps, epochs: how many of the log count, those of the checkpoint; later ones are dropped.

    Raises OSError, and DataError for a log.jsonl that is damaged.
    """

    def __init__(self, folder: Path, steps: int = 0, epochs: int = 0):
        self.csv, self.jsonl = folder / "log.csv", folder / "log.jsonl"
        self._rate = 0.0
        kept = [line for line in read_jsonl(self.jsonl)
                if line["step"] <= steps and (line["event"] == "step" or line["epoch"] <= epochs)]
        write_atomically(self.jsonl, "".join(map(_json_line, kept)).encode())
        self._lines = _Appended(self.jsonl)
        self._epochs = [line for line in kept if line["event"] == "epoch"]
        self._write_csv()
        self._events = tensorboard_file(folder, steps)

    def step(self, record: StepRecord) -> None:
        self._rate = record.learning_rate
        self._add({"event": "step", "step": record.step, "epoch": record.epoch,
                   "loss": record.loss, "learning_rate": record.learning_rate,
                   "images": record.images}, "loss", "learning_rate")

    def epoch(self, record: EpochRecord) -> None:
        found = record.validation
        line: dict[str, Any] = {
            "event": "epoch", "step": record.step, "epoch": record.epoch,
            "train_loss": record.train_loss, "train_accuracy": record.train_accuracy,
            "loss": found.loss if found else None, "accuracy": found.accuracy if found else None,
            "learning_rate": self._rate, "seconds": round(record.seconds, 3),
            "images_per_second": round(record.images / max(record.seconds, 1e-9), 1)}
        self._add(line, "train_loss", "train_accuracy", "loss", "accuracy")
        self._epochs.append(line)
        self.flush()

    def flush(self) -> None:
        """Write all that is not written yet."""
        self._lines.flush()
        if self._events:
            self._events.flush()
        if len(self._epochs) > self._in_csv:
            self._write_csv()

    def _add(self, line: dict[str, Any], *scalars: str) -> None:
        self._lines.add(_json_line(line).encode())
        if self._events:
            values = [{"tag": f"{line['event']}/{name}", "simple_value": line[name]}
                      for name in scalars if line[name] is not None]
            self._events.add(_event(step=line["step"], summary={"value": values}))

    def _write_csv(self) -> None:
        header = dict(zip(CSV_FIELDS, CSV_FIELDS))
        write_atomically(self.csv, _csv_lines([header, *self._epochs]).encode())
        self._in_csv = len(self._epochs)


class _Appended:
    """A file that is written on: never by half of what was added, which stays where there was no
    room for it."""

    def __init__(self, path: Path):
        self.path = path
        self.waiting: list[bytes] = []

    def add(self, data: bytes) -> None:
        self.waiting.append(data)

    def flush(self) -> None:
        size = self.path.stat().st_size
        try:
            with open(self.path, "ab") as file:
                file.write(b"".join(self.waiting))
        except OSError as e:
            with suppress(OSError):
                os.truncate(self.path, size)
            raise OSError(e.errno, e.strerror, str(self.path)) from e
        self.waiting = []


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl; a last one that a kill has cut is not there.

    Raises DataError for another line that is none of a log.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            lines.append(json.loads(line))
            _ = [lines[-1][name] for name in ("event", "step", "epoch")]
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise DataError(f"{one_line(path)}: line {number} is not one of a log, "
                            f"{one_line(line[:40])!r}; delete that line") from e
    return lines


def tensorboard_file(folder: Path, steps: int) -> _Appended | None:
    """A new file of events in tensorboard/; None without the extra `tensorboard`.

    Not by TensorBoard's own writer: its thread ends on a full disk, and then training waits for it
    for ever.
    """
    try:
        import tensorboard.compat.proto  # noqa: F401
    except ImportError:
        return None
    name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
    path = folder / "tensorboard" / name
    path.parent.mkdir(exist_ok=True)
    # What was written after the checkpoint is hidden by TensorBoard, from this step on.
    path.write_bytes(_event(file_version="brain.Event:2") +
                     _event(step=steps + 1, session_log={"status": "START"}))
    return _Appended(path)


def _event(**fields: Any) -> bytes:
    """An event as it stands in TensorBoard's files."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter
    record = io.BytesIO()
    RecordWriter(record).write(Event(wall_time=time.time(), **fields).SerializeToString())
    return record.getvalue()


def _json_line(value: dict[str, Any]) -> str:
    return json.dumps(value) + "\n"


def _csv_lines(rows: Iterable[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_FIELDS, extrasaction="ignore", lineterminator="\n")
    writer.writerows(rows)
    return text.getvalue()
