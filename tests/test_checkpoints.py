"""Checkpoints: whole or not there, found again, and refused where they are damaged."""
from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import safetensors.numpy

from gpucnn.errors import CheckpointError
from gpucnn.files import write_atomically
from gpucnn.training import checkpoints as module
from gpucnn.training.checkpoints import Checkpoints, read_checkpoint

FACTS = {"settings": {"epochs": 3, "learning_rate": 0.1}, "names": ["a", "ü\n"]}


def arrays():
    a = np.arange(24, dtype=np.float32).reshape(4, 6)
    return {"plain": a, "transposed": a.T, "sliced": a[1:, ::2], "mirrored": a[::-1],
            "broadcast": np.broadcast_to(a[0], (3, 6)), "scalar": np.array(5),
            "empty": a[:0], "nan": np.array([np.nan, -0.0, np.inf])}


def test_what_was_saved_is_read_again(tmp_path):  # row 35
    path = Checkpoints(tmp_path / "new" / "folder").save(7, arrays(), FACTS)
    found = Checkpoints(tmp_path / "new" / "folder").newest()
    assert path == found.path == tmp_path / "new" / "folder" / "step-7.safetensors"
    assert found.facts == FACTS
    assert found.arrays.keys() == arrays().keys()
    for name, a in arrays().items():
        assert (found.arrays[name].shape, found.arrays[name].dtype) == (a.shape, a.dtype)
        assert found.arrays[name].tobytes() == a.tobytes()


def test_the_last_ones_and_the_best_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.newest() is None
    for step in (2, 9, 10, 100):  # whose names sort otherwise
        checkpoints.save(step, arrays(), FACTS, best=9)
    assert [p.name for p in checkpoints.paths()] == [
        "step-9.safetensors", "step-10.safetensors", "step-100.safetensors"]
    assert checkpoints.newest().path.name == "step-100.safetensors"
    checkpoints.save(101, arrays(), FACTS, best=101)
    assert [p.name for p in checkpoints.paths()] == ["step-100.safetensors", "step-101.safetensors"]


def flipped(data, place):
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1:]


@pytest.mark.parametrize("damage", [
    lambda data: b"", lambda data: data[:5], lambda data: data[:-1], lambda data: data + b"x",
    lambda data: flipped(data, 0), lambda data: flipped(data, 7), lambda data: flipped(data, -1),
    lambda data: flipped(data, len(data) - 300), lambda data: b"PK\3\4" + data,
    lambda data: safetensors.numpy.save({"a": np.zeros(3)}),
    lambda data: safetensors.numpy.save({"a": np.zeros(3)}, {"gpucnn": "[]"}),
    lambda data: data.replace(b"crc32", b"crc33"),
    lambda data: data.replace(b"0.1", b"0.2"),  # of the facts
], ids=range(13))
def test_a_damaged_one_is_named_and_so_is_the_one_before(damage, tmp_path):  # row 32
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(20, arrays(), FACTS)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"step-20\.safetensors: damaged \(.+\); there is no "
                       r"other one; delete step-20\.safetensors to go on without it$") as error:
        checkpoints.newest()
    assert "\n" not in str(error.value)
    checkpoints.save(8, arrays(), FACTS)
    with pytest.raises(CheckpointError, match=r"; the one before is step-8\.safetensors; delete"):
        checkpoints.newest()
    path.unlink()
    assert checkpoints.newest().path.name == "step-8.safetensors"


def test_one_of_a_newer_version_is_refused(tmp_path, monkeypatch):  # row 34
    monkeypatch.setattr(module, "FORMAT", 3)
    monkeypatch.setattr(module, "__version__", "2.1")
    path = Checkpoints(tmp_path).save(1, arrays(), FACTS)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"written by gpucnn 2\.1 \(format 3\); this is "
                       r".+ \(format 1\); pip install -U gpucnn"):
        read_checkpoint(path)


def test_a_full_disk_leaves_the_one_before(tmp_path, monkeypatch):  # row 51
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, arrays(), FACTS)

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"cannot write .+step-2\.safetensors: no space left "
                       r"on device \(needs [\d.]+ MB, [\de+.]+ MB free\); step-1\.safetensors is "
                       "intact"):
        checkpoints.save(2, arrays(), FACTS)
    with pytest.raises(OSError, match=r"No space left on device: '.+notes\.txt'"):
        write_atomically(tmp_path / "notes.txt", b"")
    assert [p.name for p in tmp_path.iterdir()] == ["step-1.safetensors"]
    assert checkpoints.newest().facts == FACTS
    with pytest.raises(CheckpointError, match="no checkpoint was written before"):
        Checkpoints(tmp_path / "other").save(2, arrays(), FACTS)


def test_what_a_killed_process_left_is_swept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    path = checkpoints.save(1, arrays(), FACTS)
    for folder in (tmp_path, path.parent):
        (folder / ".step-2.safetensors.x_1y2z3w.tmp").write_bytes(b"half")
    others = {"notes.tmp", ".notes.tmp", ".notes.txt.tmp"}
    for name in others:
        (tmp_path / name).write_text("the user's")
    checkpoints.sweep()
    assert {p.name for p in tmp_path.rglob("*")} == {"checkpoints", path.name, *others}
