"""A run's folder: one process at a time, and never one that holds a run already."""
from __future__ import annotations

import multiprocessing
import os

import pytest

from gpucnn.errors import CheckpointError
from gpucnn.training.run_folder import new_folder, run_folder
from tests.full_disk import files_of_at_most


def hold(folder, ready, done):
    with run_folder(folder, resume=True):
        ready.set()
        done.wait(60)


def test_another_process_is_kept_out(tmp_path):  # row 54
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path / "a", ready, done))
    other.start()
    assert ready.wait(60)
    for resume in (False, True):
        with pytest.raises(CheckpointError, match=rf"a is in use by process {other.pid} on host "
                           r".+ since \d{4}-\d\d-\d\d \d\d:\d\d; choose another --out"), \
                run_folder(tmp_path / "a", resume):
            pass
    done.set()
    other.join()
    assert not (tmp_path / "a").exists()  # nothing was written into it


def test_a_killed_process_keeps_nobody_out(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path / "a", ready, done))
    other.start()
    assert ready.wait(60)
    other.kill()
    other.join()
    with run_folder(tmp_path / "a", resume=False) as folder:
        (folder / "config.toml").touch()
        assert f"process {os.getpid()} " in (folder / ".lock").read_text()
    assert [p.name for p in folder.iterdir()] == ["config.toml"]


def test_no_room_for_the_lock_leaves_nothing(tmp_path):  # row 51
    with files_of_at_most(0), run_folder(tmp_path / "a", resume=False) as folder:
        assert (folder / ".lock").exists()
    assert not folder.exists()


@pytest.mark.parametrize("mark", ["config.toml", "model.safetensors", "checkpoints"])
def test_a_run_is_not_overwritten(mark, tmp_path):  # row 55
    (tmp_path / mark).touch()
    with pytest.raises(FileExistsError, match="already holds a run; add --resume or choose "
                       "another --out"), run_folder(tmp_path, resume=False):
        pass
    with run_folder(tmp_path, resume=True):
        pass
    assert [p.name for p in tmp_path.iterdir()] == [mark]


def test_folders_that_cannot_be(tmp_path):  # row 55
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file is not a folder; choose another --out"), \
            run_folder(tmp_path / "file", resume=True):
        pass
    for wrong in (tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(OSError, match="file|x"), run_folder(wrong, resume=False):
            pass
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_new_folder_is_none_that_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = new_folder("net")
    first.mkdir(parents=True)
    second = new_folder("net")
    assert first != second
    assert first.parent.name == second.parent.name == "runs"
