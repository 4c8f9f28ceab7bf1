"""Runs that are stopped or killed, and go on to the same bits."""
from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy

from gpucnn.training.checkpoints import Checkpoints, read_checkpoint
from gpucnn.training.run_log import read_jsonl
from tests import forked
from tests.conftest import BACKENDS, needs_cupy

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'gpucnn[plot]'")
pytest.importorskip("tqdm", reason="needs tqdm: pip install 'gpucnn[train]'")
LEAST_KILLS = 10
PATIENCE = 300  # seconds, for a machine that has much else to do
SETTINGS = ("--model", "tiny", "--train-images", 40, "--test-images", 8, "--batch-size", 4,
            "--epochs", 8, "--schedule", "one-cycle", "--warm-up", 0.5, "--crop", 2, "--flip",
            "--ema", 0.9, "--accumulate", 2, "--save-every", 0)


def result(folder):
    return [(folder / name).read_bytes() for name in ("model.safetensors", "history.json")]


def newest(folder):
    paths = Checkpoints(folder / "checkpoints").paths()
    return paths[-1] if paths else None


def until(condition, process):
    """How long it took, in seconds; also over once the process has ended."""
    started = time.perf_counter()
    while process.exitcode is None and not condition():
        assert time.perf_counter() - started < PATIENCE
        process.join(0.005)
    return time.perf_counter() - started


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_killed_ten_times_ends_with_the_same_bits(backend, tmp_path):
    whole, killed, output = tmp_path / "whole", tmp_path / "killed", tmp_path / "output"
    # Results come late from a GPU, so that the checkpoints there are those at the ends of epochs.
    epochs = 8 if backend == "numpy" else 16
    settings, last = (*SETTINGS, "--epochs", epochs), f"step-{5 * epochs}.safetensors"
    process = forked.start((*settings, "--out", whole), output, backend)
    until(output.exists, process)  # not to count what the first of all processes imports
    startup = until(lambda: newest(whole), process)
    training = until(lambda: newest(whole).name == last, process)
    end(process)

    rng, kills = random.Random(0), 0
    for attempt in range(3 * LEAST_KILLS):
        before = newest(killed)
        process = forked.start((*settings, "--out", killed, "--resume"), output, backend)
        # At some moment: before the training or after it, or soon after the next checkpoint.
        if attempt % 5 == 0 or (before and before.name == last):
            process.join(startup * rng.random())
        else:
            until(lambda before=before: newest(killed) != before, process)
            process.join(0.1 * training * rng.random())
        process.kill()
        end(process, 0, -signal.SIGKILL)
        kills += process.exitcode == -signal.SIGKILL
        if kills == LEAST_KILLS:
            break
    assert kills == LEAST_KILLS
    end(forked.start((*settings, "--out", killed, "--resume"), output, backend))
    assert output.read_text().count("going on from") >= LEAST_KILLS / 3, output.read_text()
    assert result(killed) == result(whole)
    assert not list(killed.rglob("*.tmp"))
    assert not (killed / ".lock").exists()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A complete run, on NumPy."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    changed = ("--epochs", 2, "--save-every", 600, "--out", folder)
    end(forked.start((*SETTINGS, *changed), folder.parent / "output", "numpy"))
    return folder


def end(process, *codes):
    process.join(PATIENCE)
    assert process.exitcode in (codes or (0,))


def resume(run, tmp_path, *arguments, code=1, backend="numpy"):
    """The last line of what a copy of the run says when it is to go on with these arguments."""
    folder = tmp_path / run.name
    if not folder.exists():
        shutil.copytree(run, folder)
    output = tmp_path / "output"
    output.unlink(missing_ok=True)
    end(forked.start(("--out", folder, "--resume", *arguments), output, backend), code)
    return output.read_text().splitlines()[-1]


def test_a_complete_run_has_nothing_left_to_do(run, tmp_path):
    resume(run, tmp_path, code=0)
    assert result(tmp_path / "a") == result(run)
    assert len(json.loads((tmp_path / "a" / "environment.json").read_text())) == 2


def test_the_model_is_that_of_the_checkpoint_again(run, tmp_path):
    """One that could not be written, for example, must not leave an older one."""
    shutil.copytree(run, tmp_path / "a")
    model = tmp_path / "a" / "model.safetensors"
    arrays = safetensors.numpy.load_file(model)
    safetensors.numpy.save_file({name: a + 1 for name, a in arrays.items()}, model)
    resume(run, tmp_path, code=0)
    assert result(tmp_path / "a") == result(run)


def test_a_damaged_list_of_starts_is_named(run, tmp_path):
    shutil.copytree(run, tmp_path / "a")
    (tmp_path / "a" / "environment.json").write_text("x")
    message = resume(run, tmp_path)
    assert message.endswith("a/environment.json: not JSON; delete it to go on without it")


@pytest.mark.parametrize(("arguments", "message"), [
    (("--batch-size", 2), "batch_size is 2, the checkpoint was made with 4; pass --override "
     "batch_size to accept"),
    (("--seed", 1, "--epochs", 4, "--no-flip"), "epochs is 4, the checkpoint was made with 2; seed "
     "is 1, the checkpoint was made with 0; flip is False, the checkpoint was made with True; pass "
     "--override epochs --override seed --override flip to accept"),
    (("--seed", 1, "--epochs", 4, "--override", "epochs"), "seed is 1, the checkpoint was made "
     "with 0; pass --override seed to accept"),
    (("--train-images", 32, "--override", "train-images"), "train_set is "),
])
def test_changed_settings_and_data_are_refused(arguments, message, run, tmp_path):  # row 56
    assert resume(run, tmp_path, *arguments).startswith(f"gpucnn: error: --resume: {message}")


def test_changed_settings_are_taken_where_they_are_named(run, tmp_path):
    said = resume(run, tmp_path, "--epochs", 3, "--batch-size", 2, "--override", "epochs",
                  "--override", "batch-size", "--save-every", 5, code=0)
    assert said == str(tmp_path / "a")
    history = json.loads((tmp_path / "a" / "history.json").read_text())
    assert history["epoch"] == [1, 2, 3]
    assert len(history["step_loss"]) == 5 + 5 + 10
    assert len(read_jsonl(tmp_path / "a" / "log.jsonl")) == 20 + 3


@needs_cupy
def test_another_backend_is_taken_where_the_bits_need_not_be_the_same(run, tmp_path):
    message = resume(run, tmp_path, backend="cupy")
    assert re.match(r"gpucnn: error: --resume: backend is cupy, the checkpoint was made with numpy;"
                    r".* so the bits may differ; pass --no-deterministic to accept$", message)
    resume(run, tmp_path, "--no-deterministic", "--epochs", 3, "--override", "epochs", code=0,
           backend="cupy")


def test_a_damaged_checkpoint_is_named(run, tmp_path):  # row 32
    folder = tmp_path / "a"
    shutil.copytree(run, folder)
    last = max((folder / "checkpoints").iterdir(), key=lambda p: int(p.stem[5:]))
    last.write_bytes(last.read_bytes()[:-1])
    message = resume(run, tmp_path)
    assert "step-10.safetensors: damaged (" in message
    assert message.endswith("the one before is step-5.safetensors; delete step-10.safetensors to "
                            "go on without it")
    last.unlink()
    resume(run, tmp_path, code=0)
    assert result(folder) == result(run)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_stops(number, code, tmp_path):  # row 53
    output, folder = tmp_path / "output", tmp_path / "a"
    many = (*SETTINGS, "--epochs", 2000, "--save-every", 600, "--out", folder)
    process = forked.start(many, output, "numpy")
    until(lambda: output.exists() and "epoch 2/" in output.read_text(), process)
    os.kill(process.pid, number)
    end(process, code)
    said = output.read_text()
    assert "gpucnn: stopping; again stops at once, without saving\n" in said
    steps = int(re.search(r"^stopped at step (\d+); --resume goes on from there$", said, re.M)[1])
    assert (folder / "checkpoints" / f"step-{steps}.safetensors").exists()
    assert not (folder / ".lock").exists()
    assert read_jsonl(folder / "log.jsonl")[-1]["step"] == steps


def test_a_reader_that_goes_away_ends_the_run_after_a_save(tmp_path):  # row 58
    pipe, folder = tmp_path / "pipe", tmp_path / "a"
    os.mkfifo(pipe)
    process = forked.start((*SETTINGS, "--epochs", 2000, "--save-every", 600, "--out", folder),
                            pipe, "numpy")
    with open(pipe) as reader:
        assert any(line.startswith("epoch 1/") for line in reader)
    end(process, 141)
    last = read_jsonl(folder / "log.jsonl")[-1]
    assert last["event"] == "epoch"
    assert newest(folder).name == f"step-{last['step']}.safetensors"


def test_a_signal_counts_also_where_nobody_reads_what_is_said(monkeypatch):
    from scripts.train_run import stopping
    reader, writer = os.pipe()
    os.close(reader)
    stops = []
    with open(writer, "w", buffering=1) as gone, \
            stopping(SimpleNamespace(stop=lambda: stops.append(1))) as came:
        monkeypatch.setattr("sys.stderr", gone)
        signal.raise_signal(signal.SIGTERM)
        monkeypatch.undo()
    assert (came, stops) == ([signal.SIGTERM], [1])


def test_a_model_that_could_not_be_written_is_an_error_at_the_end(tmp_path, monkeypatch):
    from gpucnn.errors import CheckpointError
    from scripts import train, train_run

    def full(*arguments, **metadata):
        raise CheckpointError("no room for the model")

    monkeypatch.setattr(train_run, "save_model", full)
    small = train.parser().parse_args(["--model", "lenet5", "--train-images", "8", "--test-images",
                                       "8", "--epochs", "1", "--out", str(tmp_path / "a")])
    with pytest.raises(CheckpointError, match="^no room for the model$"):
        train.main(small)
    assert newest(tmp_path / "a").name == "step-1.safetensors"


def test_no_room_for_checkpoints_ends_in_an_error_but_trains_on(tmp_path, monkeypatch, capsys):
    from gpucnn import cli
    from gpucnn.errors import CheckpointError
    from gpucnn.training import checkpoints
    from scripts import train
    real, full = checkpoints.write_atomically, []

    def write(path, data):
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, data)

    monkeypatch.setattr(checkpoints, "write_atomically", write)
    small = train.parser().parse_args([
        "--model", "lenet5", "--train-images", "64", "--test-images", "8", "--epochs", "3",
        "--out", str(tmp_path / "a")])
    epochs, on_epoch = [], train.Run._on_epoch

    def after(run, record):
        epochs.append(record.epoch)
        full[:] = epochs[1:]  # from the second on
        on_epoch(run, record)

    monkeypatch.setattr(train.Run, "_on_epoch", after)
    with pytest.raises(CheckpointError, match=r"cannot write .+step-3\.safetensors: no space left"):
        train.main(small)
    assert epochs == [1, 2, 3]
    warnings = capsys.readouterr().err.splitlines()[1:]
    assert [re.sub(r".*(step-\d).*: (no space).*; (.*); (.*)", r"\1 \2 \3 \4", w)
            for w in warnings] == [
        f"step-{n} no space step-1.safetensors is intact training goes on" for n in (2, 3)]
    assert [p.name for p in Path(tmp_path / "a" / "checkpoints").iterdir()] == [
        "step-1.safetensors"]
    assert (tmp_path / "a" / cli.MODEL_FILE).exists()


@pytest.mark.parametrize(("arguments", "message"), [
    (("--resume",), "--resume needs --out"),
    (("--patience", 3), "--patience needs --validation"),
    (("--warm-up", 99), "--warm-up: 99 epochs are more than the "),
    (("--validation", 0.01), "--validation: 0.01 of 40 training images is 0; it must leave"),
    (("--validation", 0.99), "--validation: 0.99 of 40 training images is 40; it must leave"),
    (("--override", "batchsize"), "--override: batchsize is not a setting; it takes one of data, "),
])
def test_flags_that_do_not_go_together_are_usage_errors(arguments, message, tmp_path):
    output = tmp_path / "output"
    end(forked.start((*SETTINGS, *arguments), output, "numpy"), 2)
    assert output.read_text().splitlines()[-1].startswith(f"gpucnn: error: {message}")


def test_patience_keeps_the_model_of_the_best_epoch(tmp_path):
    changed = ("--epochs", 60, "--learning-rate", 0.05, "--schedule", "constant", "--validation",
               0.25, "--patience", 3, "--save-every", 600, "--out", tmp_path / "a")
    end(forked.start((*SETTINGS, *changed), tmp_path / "output", "numpy"))
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    history = json.loads((tmp_path / "a" / "history.json").read_text())
    losses, best = history["validation_loss"], metrics["best_epoch"]
    assert losses[best - 1] == min(losses)
    assert metrics["epochs_made"] == best + 3 == len(losses) < 60
    assert (metrics["train_images"], metrics["validation"]) == (30, 0.25)
    # The model that stays is that of the best checkpoint, which stays too.
    kept = {p.name for p in (tmp_path / "a" / "checkpoints").iterdir()}
    steps = history["steps_per_epoch"]
    assert kept == {f"step-{steps * n}.safetensors" for n in (best, best + 2, best + 3)}
    best_one = read_checkpoint(tmp_path / "a" / "checkpoints" / f"step-{steps * best}.safetensors")
    saved = safetensors.numpy.load_file(tmp_path / "a" / "model.safetensors")
    running = [name for name in saved if "running" in name]  # the rest is averaged
    assert len(running) == 2
    for name in running:
        np.testing.assert_array_equal(saved[name], best_one.arrays[f"model/{name}"])
    before = result(tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").unlink()
    resume(tmp_path / "a", tmp_path, code=0)
    assert result(tmp_path / "a") == before
