"""The logs of a run: each step and epoch once, also after a kill."""
from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from gpucnn.errors import DataError
from gpucnn.training import EpochRecord, Evaluation, StepRecord
from gpucnn.training.run_log import RunLog, read_jsonl
from tests.full_disk import files_of_at_most


def write(log, epochs, start=0):
    for epoch in range(start + 1, epochs + 1):
        for step in (2 * epoch - 1, 2 * epoch):
            log.step(StepRecord(epoch, step, 0.1 / epoch, 1 / step, 4, 1 / step, 0.5))
        found = Evaluation(0.5 / epoch, 0.75, np.zeros(1), np.zeros(1), 1.0)
        log.epoch(EpochRecord(epoch, 9, 2 * epoch, 1 / epoch, 0.5, found if epoch != 2 else None,
                              True, 2.0, 8))


def rows(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_each_step_and_epoch_is_a_line(tmp_path):
    write(RunLog(tmp_path), 2)
    lines = read_jsonl(tmp_path / "log.jsonl")
    assert [(line["event"], line["step"]) for line in lines] == [
        ("step", 1), ("step", 2), ("epoch", 2), ("step", 3), ("step", 4), ("epoch", 4)]
    assert lines[3] == {"event": "step", "step": 3, "epoch": 2, "loss": 1 / 3,
                        "learning_rate": 0.05, "images": 4}
    first, second = rows(tmp_path)
    assert first == {"epoch": "1", "step": "2", "train_loss": "1.0", "train_accuracy": "0.5",
                     "loss": "0.5", "accuracy": "0.75", "learning_rate": "0.1", "seconds": "2.0",
                     "images_per_second": "4.0"}
    assert (second["epoch"], second["loss"]) == ("2", "")


@pytest.mark.parametrize("cut", ["", '{"event": "st', '{"event": "step", "step": 7, "loss'])
def test_after_a_kill_what_came_after_the_checkpoint_is_taken_back(cut, tmp_path):  # row 57
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    write(RunLog(whole), 3)
    write(RunLog(killed), 3)
    with open(killed / "log.jsonl", "a") as file:
        file.write(cut)
    assert read_jsonl(killed / "log.jsonl") == read_jsonl(whole / "log.jsonl")
    write(RunLog(killed, steps=2, epochs=1), 3, start=1)
    for name in ("log.csv", "log.jsonl"):
        assert (killed / name).read_text() == (whole / name).read_text()


def test_an_epoch_that_was_logged_before_a_kill_is_logged_once(tmp_path):
    """The checkpoint of its last step was written, that of its end was not."""
    write(RunLog(tmp_path), 2)
    log = RunLog(tmp_path, steps=4, epochs=1)
    assert [line["step"] for line in read_jsonl(tmp_path / "log.jsonl")] == [1, 2, 2, 3, 4]
    log.epoch(EpochRecord(2, 9, 4, 0.5, 0.5, None, True, 2.0, 8))
    assert [row["epoch"] for row in rows(tmp_path)] == ["1", "2"]


def test_a_full_disk_costs_no_lines(tmp_path):  # row 51
    whole, full = tmp_path / "whole", tmp_path / "full"
    for folder in (whole, full):
        folder.mkdir()
    write(RunLog(whole), 3)
    log = RunLog(full)
    write(log, 1)
    before = (full / "log.jsonl").read_text()
    with files_of_at_most(len(before) + 100), pytest.raises(OSError, match=r"large: .+log\.jsonl"):
        write(log, 2, start=1)
    assert (full / "log.jsonl").read_text() == before
    write(log, 3, start=2)
    for name in ("log.csv", "log.jsonl"):
        assert (full / name).read_text() == (whole / name).read_text()


@pytest.mark.parametrize("line", ["\0\0", "{}", "3", '{"event": "step", "step": 1', "[" * 10**5])
def test_a_damaged_line_is_named(line, tmp_path):
    write(RunLog(tmp_path), 1)
    path = tmp_path / "log.jsonl"
    path.write_text(f"{path.read_text()}{line}\n" * 2)
    with pytest.raises(DataError, match=r"log\.jsonl: line 4 is not one of a log, '.*'; delete "
                       "that line"):
        RunLog(tmp_path, 2, 1)


def test_steps_are_on_the_disk_once_they_are_flushed(tmp_path):
    log = RunLog(tmp_path)
    log.step(StepRecord(1, 1, 0.1, 2.0, 4, 2.0, 0.5))
    assert read_jsonl(tmp_path / "log.jsonl") == []
    log.flush()
    log.flush()
    assert [line["step"] for line in read_jsonl(tmp_path / "log.jsonl")] == [1]
    assert read_jsonl(tmp_path / "none.jsonl") == []


def test_tensorboard_gets_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboard", reason="needs pip install 'gpucnn[tensorboard]'")
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
    log = RunLog(tmp_path)
    write(log, 1)
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, found, events = path.read_bytes(), {}, []
    while data:  # length, its checksum, the event, its checksum
        size = int.from_bytes(data[:8], "little")
        for part, checksum in ((data[:8], data[8:12]), (data[12:12 + size],
                                                        data[12 + size:16 + size])):
            assert masked_crc32c(part) == int.from_bytes(checksum, "little")
        events.append(Event.FromString(data[12:12 + size]))
        for value in events[-1].summary.value:
            found.setdefault(value.tag, []).append(value.simple_value)
        data = data[16 + size:]
    assert events[0].file_version == "brain.Event:2"
    assert (events[1].step, events[1].session_log.status) == (1, SessionLog.START)
    assert found["step/loss"] == [1.0, 0.5]
    assert found["epoch/accuracy"] == [0.75]
    assert found["step/learning_rate"] == pytest.approx([0.1, 0.1])
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])["loss"] == 1.0
