"""Folders of images that stay on the disk and are decoded ahead of the training. "rowN" is a row of
the table of faults."""
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import Future

import numpy as np
import pytest

from gpucnn import cli
from gpucnn.data import Augmentation, Loader, decoding, open_dataset
from gpucnn.data.image_files import ImageFiles
from gpucnn.errors import DataError
from scripts.train_run import split
from tests import forked
from tests.conftest import BACKENDS
from tests.test_folder import ROOT, photos  # noqa: F401  (a fixture)
from tests.test_gather import batches
from tests.test_sources import arguments

pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'gpucnn[plot]'")
pytest.importorskip("tqdm", reason="needs tqdm: pip install 'gpucnn[train]'")


@pytest.fixture
def both(photos, monkeypatch):  # noqa: F811
    """The training part of 12 images in memory, and on the disk, decoded two at a time."""
    monkeypatch.setattr(decoding, "CHUNK", 2)
    return [open_dataset(photos, image_size=(4, 5), workers=workers, decode_ahead=ahead)[0]
            for workers, ahead in ((1, False), (2, True))]


class Here:
    """An executor that decodes in this process, at once, and counts."""

    def __init__(self):
        self.chunks = 0

    def shutdown(self, **options):
        pass

    def submit(self, decode, chunk):
        self.chunks += 1
        future = Future()
        try:
            future.set_result(decode(chunk))
        except (DataError, OSError) as e:
            future.set_exception(e)
        return future


@pytest.fixture
def here(monkeypatch):
    pool = Here()
    monkeypatch.setattr(decoding, "_new_pool", lambda workers: pool)
    return pool


def assert_equal(got, want):
    for mine, wanted in zip(got, want, strict=True):
        for a, b in zip(mine, wanted, strict=True):
            np.testing.assert_array_equal(a, b)


# ---- what comes of it

@pytest.mark.parametrize("augmentation", [None, Augmentation(crop=1, flip=True, mixup=0.5)])
def test_batches_are_those_of_the_images_in_memory(backend, both, augmentation):
    memory, disk = (Loader(part, 5, seed=3, augmentation=augmentation) for part in both)
    assert disk.streamed
    for epoch in (0, 1):
        assert_equal(batches(disk, epoch), batches(memory, epoch))
    assert_equal(batches(disk, 1, 5), batches(memory, 1)[1:])  # as a run that goes on


def test_one_process_gives_the_same(both, photos):  # noqa: F811
    disk, _ = open_dataset(photos, image_size=(4, 5), workers=1, decode_ahead=True)
    assert_equal(batches(Loader(disk, 5, seed=3), 2), batches(Loader(both[0], 5, seed=3), 2))


def test_parts_of_it_stay_on_the_disk(both, here):
    memory, disk = both
    for mine, wanted in zip((disk.first(7), *split(disk, 0.3, 4)),
                            (memory.first(7), *split(memory, 0.3, 4)), strict=True):
        assert type(mine.images) is type(disk.images)
        assert (mine.images.shape, mine.name) == (wanted.images.shape, wanted.name)
        np.testing.assert_array_equal(mine.images[:], wanted.images)
        np.testing.assert_array_equal(mine.images[-1], wanted.images[-1])
        assert_equal(batches(Loader(mine, 3)), batches(Loader(wanted, 3)))
    assert here.chunks


def test_no_more_is_decoded_ahead_than_two_batches_or_what_keeps_workers_busy(both, here,
                                                                               monkeypatch):
    monkeypatch.setattr(decoding, "_AHEAD", 1)
    for size, counts in ((2, [2, 3, 4, 5, 6, 6]), (4, [5, 6, 6])):  # of chunks of two images
        here.chunks = 0
        epoch = Loader(both[1], size).epoch()
        seen = [here.chunks for _ in epoch]
        assert seen == counts


def test_who_leaves_an_epoch_takes_back_what_waits(both, monkeypatch):
    waiting = []

    class Busy(Here):
        def submit(self, decode, chunk):
            if self.chunks:
                waiting.append(Future())
                return waiting[-1]
            return super().submit(decode, chunk)

    pool = Busy()
    monkeypatch.setattr(decoding, "_new_pool", lambda workers: pool)
    epoch = Loader(both[1], 2).epoch()
    next(epoch)
    assert len(waiting) == 5
    epoch.close()
    del epoch
    assert all(future.cancelled() for future in waiting)


# ---- errors

def test_a_damaged_file_is_named_when_its_batch_comes(both, backend):
    loader = Loader(both[1], 4, seed=1)
    path = both[1].images._paths[loader.order(0)[6]]
    path.write_bytes(b"text")
    epoch = loader.epoch()
    next(epoch)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}: not a readable image"):
        next(epoch)


def test_row42_a_file_that_vanishes_in_an_epoch_is_named(both, monkeypatch):
    monkeypatch.setattr(decoding, "_AHEAD", 1)
    loader = Loader(both[1], 2, seed=1)
    epoch = loader.epoch()
    next(epoch)
    path = both[1].images._paths[loader.order(0)[-1]]
    path.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
        list(epoch)


def test_a_worker_that_is_killed_ends_the_epoch_and_not_the_next(both):
    memory, disk = (Loader(part, 2) for part in both)
    epoch = disk.epoch()
    next(epoch)
    for process in both[1].images._decoder._pool._processes.values():
        process.kill()
        process.join()
    both[1].images._decoder._pool._executor_manager_thread.join()
    with pytest.raises(DataError, match=r"^a process that decodes images ended, at .*; workers=1"):
        list(disk.epoch())
    assert_equal(batches(disk), batches(memory))


def test_it_goes_with_folders_of_images_alone():
    with pytest.raises(ValueError, match=r"^--decode-ahead \(decode_ahead\) does not go with fashio"
                                         r"n-mnist-subset; leave it out$"):
        open_dataset("subset", decode_ahead=True)


# ---- worker processes

_EPOCH = """
import sys, time
from gpucnn.data import Loader, decoding, open_dataset
if __name__ == "__main__":
    decoding.CHUNK = 1
    train, _ = open_dataset(sys.argv[1], workers=2, decode_ahead=True)
    epoch = Loader(train, 2, seed=0).epoch()
    next(epoch)
    print("training", flush=True)
    if sys.argv[2] == "raise":
        raise RuntimeError("from the training")
    time.sleep(60)
"""


@pytest.mark.parametrize("end", ["raise", signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_program(photos, tmp_path, end):  # noqa: F811
    (tmp_path / "epoch.py").write_text(_EPOCH)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "epoch.py", photos, str(end)], cwd=ROOT, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True)
    assert process.stdout.readline() == "training\n"
    if end == signal.SIGINT:  # as a terminal sends it: to all
        os.killpg(process.pid, end)
    elif end != "raise":
        process.send_signal(end)
    _, errors = process.communicate(timeout=30)  # ends once no worker holds the pipe
    assert process.returncode == (1 if end == "raise" else -end)
    assert errors.count("Traceback") == (end in ("raise", signal.SIGINT)), errors


# ---- the scripts

@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_has_the_bits_of_one_in_memory_and_names_a_damaged_file(photos,  # noqa: F811
                                                                      tmp_path, backend):
    def train(folder, *given, code=0):
        process = forked.start(
            ("--data", photos, "--model", "tiny", "--image-size", 28, "--channels", 1, "--workers",
             2, "--batch-size", 4, "--validation", 0.2, "--out", folder, *given),
            tmp_path / "output", backend)
        process.join(60)
        lines = (tmp_path / "output").read_text().splitlines()
        assert process.exitcode == code, lines
        return lines[-1]

    a, b, c = (tmp_path / name for name in "abc")
    train(a, "--epochs", 3)
    for epochs, how in ((1, "--decode-ahead"), (2, "--no-decode-ahead"), (3, "--decode-ahead")):
        train(b, "--epochs", epochs, how, "--resume", "--override", "epochs")
    for name in ("model.safetensors", "history.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    path = photos / "cats" / "3.png"
    path.write_bytes(path.read_bytes()[:60])
    assert train(c, "--decode-ahead", code=1).startswith(f"gpucnn: error: {path}: not a readable")


def test_evaluation_takes_the_flag(photos):  # noqa: F811
    given = arguments("--data", str(photos), "--decode-ahead", "--workers", "1")
    assert isinstance(cli.load_data(given, (5, 7, 1))[1].images, ImageFiles)
