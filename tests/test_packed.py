"""Data sets that stay on the disk: Shards, packed folders, scripts/pack.py, and what Loader and
TrainStep make of them. "rowN" is a row of the table of faults."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpucnn import layers, losses, optim, training
from gpucnn.data import Augmentation, Dataset, Loader, Shards, loader, open_dataset, packed, shards
from gpucnn.errors import DataError
from scripts.train_run import split
from tests.test_gather import batches, data_set
from tests.test_images import save

ROOT = Path(__file__).resolve().parents[1]
SHAPE = (4, 3, 3)


@pytest.fixture
def whole():
    """Two parts in memory; the first pixel of an image is its number."""
    parts = []
    for n, name in ((23, "train"), (5, "test")):
        part = data_set((n, *SHAPE), n)
        part.images[:, 0, 0, 0] = np.arange(n)
        parts.append(Dataset(part.images, part.labels, part.class_names, f"small-{name}"))
    return parts


@pytest.fixture
def small(tmp_path, whole):
    """The folder of both parts, in shards of four images."""
    packed.pack(whole, tmp_path / "small", shard_bytes=4 * 36 + 35)
    return tmp_path / "small"


# ---- Shards

def test_shards_are_one_array():
    images = data_set((11, *SHAPE)).images
    together = Shards([images[:4], images[4:8], images[8:]])
    assert (together.shape, together.ndim, together.dtype, together.nbytes, len(together)) == (
        images.shape, 4, np.uint8, images.nbytes, 11)
    for index in (slice(None), slice(3, 9), slice(9, 2, -3), slice(5, 5), 7, -1,
                  np.array([10, 0, 4, 3, 4]), np.array([[1, 9], [8, 7]]), np.array([], int)):
        got = together[index]
        assert isinstance(got, np.ndarray)
        np.testing.assert_array_equal(got, images[index])
    with pytest.raises(IndexError):
        together[11]
    chosen, again = np.array([10, 3, 4, 0, 8]), np.array([4, 1, 1])
    some = together.select(chosen)
    assert (some.shape, some.block) == ((5, *SHAPE), together.block)
    np.testing.assert_array_equal(some[:], images[chosen])
    np.testing.assert_array_equal(some.select(again)[:], images[chosen[again]])


def test_a_data_set_takes_shards_and_says_so_of_others():
    data = data_set((6, *SHAPE))
    lazy = Dataset(Shards([data.images[:2], data.images[2:]]), data.labels, data.class_names, "s")
    for part in (data, lazy):
        out = np.empty((3, *SHAPE), np.uint8)
        part.take(np.array([5, 0, 2]), out)
        np.testing.assert_array_equal(out, data.images[[5, 0, 2]])
        first = part.first(3)
        assert type(first.images) is type(part.images)
        np.testing.assert_array_equal(first.images[:], data.images[:3])
        assert first.labels.tolist() == data.labels[:3].tolist()
        assert part.first(None) is part
        assert len(part.first(99)) == 6
    with pytest.raises(ValueError, match=r"^6 images but 2 labels$"):
        Dataset(lazy.images, data.labels[:2], data.class_names, "s")


# ---- packing

def test_what_is_packed_comes_back_and_stays_on_the_disk(small, whole):
    for part, want in zip(open_dataset(small), whole):
        assert isinstance(part.images, Shards)
        np.testing.assert_array_equal(part.images[:], want.images)
        np.testing.assert_array_equal(part.labels, want.labels)
        assert (part.class_names, part.name) == (want.class_names, want.name)
    assert len(list(small.glob("train-0000?.npy"))) == 6
    np.testing.assert_array_equal(np.load(small / "train-00001.npy"), whole[0].images[4:8])
    packed.verify(small)
    assert sorted(path.name for path in small.parent.iterdir()) == ["small"]


@pytest.mark.parametrize("per_shard", [1, 3, 5, 23, 99])
def test_chunks_are_cut_into_shards_whatever_their_sizes(per_shard):
    chunks = [np.arange(start, stop)[:, None] for start, stop in ((0, 7), (7, 8), (8, 8), (8, 23))]
    seen = []
    found = list(packed._in_shards(iter(chunks), per_shard, seen.append))
    assert [len(shard) for shard in found[:-1]] == [per_shard] * (len(found) - 1)
    np.testing.assert_array_equal(np.concatenate(found)[:, 0], np.arange(23))
    assert seen == [7, 1, 0, 15]


def test_a_folder_of_images_is_packed_as_it_is_loaded(tmp_path, rng):
    for name in "ab":
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(5):
            save(tmp_path / "in" / name / f"{i}.png", rng.integers(0, 256, (6, 6, 3), np.uint8))
    run("scripts/pack.py", tmp_path / "in", tmp_path / "out", "--image-size", "4x5", "--workers", 1)
    for got, want in zip(open_dataset(tmp_path / "out"),
                         open_dataset(tmp_path / "in", image_size=(4, 5))):
        np.testing.assert_array_equal(got.images[:], want.images)
        np.testing.assert_array_equal(got.labels, want.labels)


def test_an_error_or_an_existing_folder_leaves_nothing_behind(tmp_path, whole, rng):
    for name in "ab":
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(3):
            save(tmp_path / "in" / name / f"{i}.png", rng.integers(0, 256, (6, 6), np.uint8))
    (tmp_path / "in" / "b" / "1.png").write_bytes(b"text")
    result = run("scripts/pack.py", tmp_path / "in", tmp_path / "out", "--channels", 1, code=1)
    assert result.stderr == (f"gpucnn: error: {tmp_path / 'in' / 'b' / '1.png'}: not a readable "
                             "image (no known format)\n")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]

    (tmp_path / "full").mkdir()
    packed.pack(whole, tmp_path / "full")  # an empty folder is no harm
    with pytest.raises(FileExistsError, match=r"full is there already; choose another folder"):
        packed.pack(whole, tmp_path / "full")
    (tmp_path / "new.unfinished").mkdir()
    with pytest.raises(FileExistsError, match=r"new\.unfinished is being written, or was left by"):
        packed.pack(whole, tmp_path / "new")
    other = data_set((5, 4, 4, 3))
    with pytest.raises(DataError, match=r"^the training images are \(4, 3, 3\), the test images "
                                        r"\(4, 4, 3\); they must be equal$"):
        packed.pack([whole[0], other], tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_pack_leaves_nothing_behind(tmp_path, number):
    program = ("import sys, time\nfrom gpucnn.data import packed\npacked._save = lambda *a: ("
               "print('writing', flush=True), time.sleep(60))\nfrom scripts import pack\n"
               "from gpucnn import cli\ncli.run(pack.main, pack.parser())")
    process = subprocess.Popen(
        [sys.executable, "-c", program, "subset", tmp_path / "out"], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "writing\n"
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert list(tmp_path.iterdir()) == []


# ---- damage

def edit(path, **changes):
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, **changes}))


BAD = {
    "row30 index text": (lambda f: (f / "index.json").write_text("hello"),
                         r"index\.json: damaged or not the index of a packed data set \(JSONDec"),
    "index of another": (lambda f: (f / "index.json").write_text("{}"),
                         r"index\.json: damaged or not the index .* \(KeyError: 'format'\)"),
    "row34 newer": (lambda f: edit(f / "index.json", version=2),
                    r"index\.json: written in version 2 of the format; this gpucnn reads 1: pip"),
    "no parts": (lambda f: edit(f / "index.json", parts=3), r"index\.json: damaged or not the ind"),
    "no names": (lambda f: edit(f / "index.json", class_names=["a"]),
                 r"small: train: label \d at position \d is out of range for 1 classes"),
    "another shape": (lambda f: edit(f / "index.json", image_shape=[3, 4, 3]),
                      r"train-00000\.npy: holds uint8 \(4, 4, 3, 3\), the index says uint8 "
                      r"\(4, 3, 4, 3\); pack"),
    "shard cut": (lambda f: os.truncate(f / "train-00002.npy", 200),
                  r"train-00002\.npy: damaged \(mmap length is greater than .*\); pack"),
    "shard empty": (lambda f: os.truncate(f / "train-00002.npy", 0), r"train-00002\.npy: damaged"),
    "shard text": (lambda f: (f / "test-00000.npy").write_text("hello"), r"test-00000\.npy: damag"),
    "shard pickled": (lambda f: np.save(f / "test-00000.npy", np.array([None, 1])),
                      r"test-00000\.npy: damaged \("),
    "labels short": (lambda f: np.save(f / "test-labels.npy", np.zeros(4, np.int64)),
                     r"test-labels\.npy: holds int64 \(4,\), the index says int64 \(5,\)"),
    "labels float": (lambda f: np.save(f / "test-labels.npy", np.zeros(5)),
                     r"test-labels\.npy: holds float64 \(5,\), the index says int64 \(5,\)"),
    "row37 elsewhere": (lambda f: (f / "index.json").write_text(
        (f / "index.json").read_text().replace("train-00000.npy", "../train-00000.npy")),
        r"index\.json: damaged .*'\.\./train-00000\.npy' is no file of this folder"),
}


@pytest.mark.parametrize(("damage", "message"), BAD.values(), ids=BAD)
def test_a_damaged_folder_is_one_line(small, damage, message):
    damage(small)
    with pytest.raises(DataError, match=message) as e:
        open_dataset(small)
    assert "\n" not in str(e.value)


def test_a_shard_that_is_gone_or_changed_is_named(small):
    content = bytearray((small / "train-00003.npy").read_bytes())
    content[-1] ^= 1
    (small / "train-00003.npy").write_bytes(content)
    open_dataset(small)  # reads none of it
    with pytest.raises(DataError, match=r"train-00003\.npy: damaged \(its SHA-256 is not that of"):
        packed.verify(small)
    (small / "train-00003.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"train-00003\.npy"):
        open_dataset(small)


# ---- Loader and TrainStep

@pytest.fixture
def few(monkeypatch):
    """Blocks of two images, three of which are shuffled together."""
    monkeypatch.setattr(shards, "BLOCK_BYTES", 2 * 36)
    monkeypatch.setattr(loader, "GROUP", 3)


def test_shards_are_shuffled_by_blocks(small, few):
    train, _ = open_dataset(small)
    orders = [Loader(train, 4, seed=5).order(epoch) for epoch in range(40)]
    assert len({tuple(order) for order in orders}) == 40
    for order in orders:
        assert sorted(order) == list(range(23))
        for start in range(0, 24, 6):  # the last block has one image
            run_of = {i // 2 for i in order[start:start + 6]}
            assert len(run_of) <= 4
    assert any(a // 2 == c // 2 != b // 2 for a, b, c, *_ in orders)  # blocks are not one by one
    assert len({order[0] for order in orders}) > 10
    np.testing.assert_array_equal(Loader(train, 9, seed=5).order(7), orders[7])
    assert Loader(train, 4, seed=6).order(0).tolist() != orders[0].tolist()
    np.testing.assert_array_equal(Loader(train, 4).order(3), np.arange(23))


@pytest.mark.parametrize("augmentation", [None, Augmentation(crop=1, flip=True, mixup=0.5)])
def test_batches_of_shards_are_those_of_the_images_in_that_order(backend, small, whole, few,
                                                                 augmentation):
    train, _ = open_dataset(small)
    lazy = Loader(train, 4, seed=5, augmentation=augmentation)
    assert lazy.streamed
    resident = Loader(whole[0], 4, seed=5, augmentation=augmentation)
    resident.order = lazy.order
    for got, want in zip(batches(lazy, 2), batches(resident, 2), strict=True):
        for mine, wanted in zip(got, want):
            np.testing.assert_array_equal(mine, wanted)
    rest = batches(lazy, 2, 8)
    np.testing.assert_array_equal(rest[0][0], batches(lazy, 2)[2][0])
    with pytest.raises(ValueError, match=r"^Loader: images on the disk \(Shards\) always stream"):
        Loader(train, 4, streamed=False)


def test_validation_images_stay_on_the_disk(small, whole):
    lazy, resident = (split(part, 0.3, 4) for part in (open_dataset(small)[0], whole[0]))
    for mine, wanted in zip(lazy, resident):
        assert isinstance(mine.images, Shards)
        assert mine.name == wanted.name
        np.testing.assert_array_equal(mine.images[:], wanted.images)
        np.testing.assert_array_equal(mine.labels, wanted.labels)


def test_a_step_trains_on_shards(backend, small, few):
    train, test = open_dataset(small)
    weights = []
    for capture in (True, False):
        model = layers.Sequential([layers.Flatten(), layers.Dense(4)])
        model.build(SHAPE, seed=0)
        step = training.TrainStep(model, losses.SoftmaxCrossEntropy(), optim.Adam(model),
                                  capture=capture)
        for epoch in range(2):
            assert sum(r.images for r in step.epoch(Loader(train, 4, seed=1), epoch)) == 23
        weights.append(backend.to_numpy(model.flat_data).tobytes())
    assert weights[0] == weights[1]
    assert len(training.evaluate(model, Loader(test, 2).epoch()).labels) == 5


# ---- the scripts

def run(script, *given, code=0):
    result = subprocess.run(
        [sys.executable, ROOT / script, *map(str, given)], text=True, capture_output=True,
        env={**os.environ, "GPUCNN_BACKEND": "numpy"}, check=False)
    assert result.returncode == code, result.stderr
    return result


def test_pack_train_evaluate_and_check(tmp_path, rng):
    rows = rng.integers(0, 2, 60)
    np.savez(tmp_path / "a.npz", labels=rows,
             images=np.repeat(200 * rows, 144).reshape(60, 12, 12).astype(np.uint8))
    out, trained = tmp_path / "out", tmp_path / "run"
    assert run("scripts/pack.py", tmp_path / "a.npz", out).stdout == (
        f"{out}: 48 training and 12 test images\n")
    run("scripts/train.py", "--data", out, "--epochs", 1, "--out", trained, "--train-images", 40,
        "--validation", 0.25, "--mixup", 0.2, "--rotate", 5, "--colour", 0.1)
    assert "out-test: 12 images" in run("scripts/evaluate.py", "--run", trained, "--data", out
                                        ).stdout
    figures = json.loads((trained / "metrics.json").read_text())
    assert (figures["train_images"], figures["mixup"]) == (30, 0.2)
    assert run("scripts/pack.py", out, "--check").stdout == (
        f"{out}: all files are as they were packed\n")
    assert "give either OUT or --check" in run("scripts/pack.py", out, code=2).stderr
    result = run("scripts/train.py", "--data", out, "--channels", 1, code=2)
    assert "--channels (channels) does not go with a packed data set" in result.stderr
    shutil.rmtree(trained)
    result = run("scripts/train.py", "--data", out, "--rotate", 50, "--out", trained, code=2)
    assert re.search(r"error: Augmentation: rotate must be >= 0 and <= 45, got 50\.0$",
                     result.stderr)
    assert not trained.exists()
