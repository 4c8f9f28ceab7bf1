"""Folders of images: what is found in them, what it becomes, and what is refused.
"rowN" is a row of the table of faults."""
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gpucnn import cli
from gpucnn.data import decoding, folder, open_dataset, read_image, to_float
from gpucnn.data.images import read_bytes
from gpucnn.errors import DataError
from tests.test_images import png_header, save
from tests.test_sources import arguments

Image = pytest.importorskip("PIL.Image")
ROOT = Path(__file__).resolve().parents[1]


def image(rng, h=6, w=8, c=3):
    return rng.integers(0, 256, (h, w) if c == 1 else (h, w, c), np.uint8)


@pytest.fixture
def photos(tmp_path, rng):
    """Ten images of cats and five of dogs."""
    root = tmp_path / "photos"
    for name, count in (("dogs", 5), ("cats", 10)):
        (root / name).mkdir(parents=True)
        for i in range(count):
            save(root / name / f"{i}.png", image(rng))
    return root


def files_of(part, root):
    return [path.relative_to(root).as_posix() for path in part.paths]


# ---- what is found

def test_each_folder_is_a_class(photos):
    train, test = open_dataset(photos, image_size=(4, 5))
    listed = folder.list_folder(photos, image_size=(4, 5))
    assert train.class_names == test.class_names == ("cats", "dogs")
    assert (train.name, test.name) == ("photos-train", "photos-test")
    assert (np.bincount(train.labels).tolist(), np.bincount(test.labels).tolist()) == ([8, 4],
                                                                                       [2, 1])
    for part, files in zip((train, test), listed):
        assert part.images.shape == (len(part), 4, 5, 3)
        for x, label, path in zip(part.images, part.labels, files.paths):
            np.testing.assert_array_equal(to_float(x), read_image(path, (4, 5), 3))
            assert path.parent.name == part.class_names[label]


def test_the_images_held_out_do_not_depend_on_the_others(photos, tmp_path):
    test = files_of(folder.list_folder(photos)[1], photos)
    assert test == files_of(folder.list_folder(photos)[1], photos)
    assert len(folder.list_folder(photos, test_share=0.6)[1].paths) == 9
    shutil.copytree(photos, tmp_path / "elsewhere")
    assert test == files_of(folder.list_folder(tmp_path / "elsewhere")[1], tmp_path / "elsewhere")
    (photos / test[0]).unlink()
    assert set(test[1:]) <= set(files_of(folder.list_folder(photos)[1], photos))


@pytest.mark.parametrize("part", folder.TEST_PARTS)
def test_a_test_part_of_its_own(photos, part):
    for name in ("train", part):
        shutil.copytree(photos, photos.parent / "split" / name)
    split = photos.parent / "split"
    (split / part / "cats" / "0.png").unlink()
    shutil.rmtree(split / part / "dogs")
    train, test = folder.list_folder(split)
    assert (len(train.paths), len(test.paths)) == (15, 9)
    assert train.class_names == test.class_names == ("cats", "dogs")
    with pytest.raises(ValueError, match=r"split has a test part; leave out --test-share"):
        folder.list_folder(split, test_share=0.1)
    (split / part / "owls").mkdir()
    with pytest.raises(DataError, match=rf"{part}/owls: a class that train has not; both parts"):
        folder.list_folder(split)


def test_train_alone_is_split_and_a_class_may_be_called_train(photos, capsys):
    shutil.move(photos, photos.parent / "whole" / "train")
    whole = photos.parent / "whole"
    assert [len(part.paths) for part in folder.list_folder(whole)] == [12, 3]
    shutil.copytree(whole / "train", whole / "test")
    shutil.copytree(whole / "train", whole / "val")
    assert [len(part.paths) for part in folder.list_folder(whole)] == [15, 15]
    assert capsys.readouterr().err.endswith("no image that Pillow reads: 1 val/\n")
    shutil.move(whole / "train" / "cats", whole / "ships")
    shutil.rmtree(whole / "val")
    assert folder.list_folder(whole)[0].class_names == ("ships", "test", "train")


def test_images_may_lie_deeper_and_what_is_no_image_is_counted(photos, rng, capsys):
    (photos / "cats" / "2025" / "may").mkdir(parents=True)
    save(photos / "cats" / "2025" / "may" / "x.JPG", image(rng))
    for name in ("notes.txt", ".DS_Store", "a.heic", "b.heic", "._0.png"):
        (photos / "cats" / name).touch()
    (photos / "cats" / ".thumbnails").mkdir()
    save(photos / "cats" / ".thumbnails" / "0.png", image(rng))
    (photos / "README").touch()
    assert sum(len(part.paths) for part in folder.list_folder(photos)) == 16
    assert capsys.readouterr().err == (
        f"gpucnn: {photos}: left out what is hidden or no image that Pillow reads: 3 .*, 2 .heic, "
        "1 .txt, 1 without extension\n")
    (photos / "README").unlink()
    shutil.rmtree(photos / "cats")
    shutil.copytree(photos / "dogs", photos / "cats")
    folder.list_folder(photos)
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no newlines in names")
def test_row42_unicode_and_newline_names(photos):
    shutil.move(photos / "cats", photos / "кошки\nи ещё")
    shutil.move(photos / "dogs", photos / "犬")
    train, _ = open_dataset(photos, image_size=(2, 2))
    assert train.class_names == ("кошки\\nи ещё", "犬")
    (photos / "кошки\nи ещё" / "a\tb.png").write_bytes(b"text")
    with pytest.raises(DataError, match=r"кошки\\nи ещё/a\\tb\.png: not a readable image \("):
        open_dataset(photos, image_size=(2, 2), channels=3)


# ---- what the images become

def kinds(where, rng):
    """One file of each kind."""
    colour, grey = image(rng), image(rng, c=1)
    exif = Image.Exif()
    exif[0x0112] = 6
    alpha = np.dstack([colour, image(rng, c=1)])
    frames = [Image.fromarray(image(rng, c=1)) for _ in range(3)]
    return {
        "rgb": save(where / "rgb.png", colour), "grey": save(where / "grey.png", grey),
        "rgba": save(where / "rgba.png", alpha),
        "palette": save(where / "palette.png", Image.fromarray(colour).convert("P")),
        "cmyk": save(where / "cmyk.jpg", Image.fromarray(colour).convert("CMYK")),
        "exif": save(where / "exif.jpg", colour, exif=exif),
        "16": save(where / "16.png", rng.integers(0, 65536, (6, 8), np.uint16)),
        "bits": save(where / "bits.png", Image.fromarray(grey > 99)),
        "moving": save(where / "moving.gif", frames[0], save_all=True, append_images=frames[1:]),
        "float": save(where / "float.tif", rng.random((6, 8), np.float32)),
    }


@pytest.mark.parametrize("channels", [1, 3])
def test_row40_each_kind_gives_the_numbers_that_prediction_gives(tmp_path, rng, channels):
    for kind, path in kinds(tmp_path, rng).items():
        x, want = read_bytes(path, (3, 5), channels), read_image(path, (3, 5), channels)
        assert (x.shape, x.dtype) == ((3, 5, channels), np.uint8)
        if kind in ("16", "float"):
            np.testing.assert_array_equal(x, np.rint(255 * want))
        else:
            np.testing.assert_array_equal(to_float(x), want)


def test_row40_channels_are_one_where_all_images_are_grey(tmp_path, rng):
    files = kinds(tmp_path, rng)
    grey = {"grey", "16", "bits", "float"}
    save(tmp_path / "la.png", np.dstack([image(rng, c=1)] * 2))
    for name, which in (("a", grey), ("b", {"grey"})):
        (tmp_path / "in" / name).mkdir(parents=True)
        for kind in which:
            shutil.copy(files[kind], tmp_path / "in" / name)
        shutil.copy(tmp_path / "la.png", tmp_path / "in" / name)
    assert open_dataset(tmp_path / "in")[0].images.shape == (5, 64, 64, 1)
    assert open_dataset(tmp_path / "in", channels=3)[0].images.shape == (5, 64, 64, 3)
    for kind in ("rgb", "rgba", "palette", "cmyk"):
        path = Path(shutil.copy(files[kind], tmp_path / "in" / "b"))
        assert open_dataset(tmp_path / "in")[0].images.shape[1:] == (64, 64, 3)
        path.unlink()
    with pytest.raises(ValueError, match=r"^channels must be 1 \(grey\), 3 \(RGB\) or None, got 4"):
        open_dataset(tmp_path / "in", channels=4)


# ---- refusals

def test_row38_row39_training_names_the_file(photos):
    path = photos / "dogs" / "3.png"
    whole = path.read_bytes()
    for content, message in ((whole[:60], "not a readable image (image file is truncated"),
                             (b"", "not a readable image (empty file)"),
                             (png_header(12000, 9000), "12000x9000 pixels exceeds the limit of 89 "
                                                       "Mpx; make the image smaller first, or "
                                                       "raise --max-pixels")):
        path.write_bytes(content)
        for workers in (1, 2):
            with pytest.raises(DataError, match=f"^{re.escape(f'{path}: {message}')}"):
                open_dataset(photos, workers=workers)


def test_row39_the_limit_on_pixels_goes_both_ways(photos, monkeypatch):
    with pytest.raises(DataError, match=r"0\.png: 8x6 pixels exceeds the limit of 4\.7e-05 Mpx; "):
        open_dataset(photos, max_pixels=47)
    with pytest.raises(DataError, match=r"more than 4\.6e-05 Mpx exceeds the limit of 2\.3e-05 "):
        open_dataset(photos, max_pixels=23)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(DataError, match=r"exceeds the limit of 1e-05 Mpx"):
        open_dataset(photos)
    assert len(open_dataset(photos, max_pixels=48, workers=1)[0]) == 12
    assert Image.MAX_IMAGE_PIXELS == 10


def test_row11_nan_pixels_are_refused_for_training(tmp_path):
    path = save(tmp_path / "nan.tif", np.array([[0, np.nan]], np.float32))
    with pytest.raises(DataError, match=r"nan\.tif: holds 1 NaN pixels at 1x2; repair it or take"):
        read_bytes(path, (1, 2), 1)


def test_row42_classes_that_are_none(photos, tmp_path):
    (photos / "owls").mkdir()
    (photos / "owls" / "notes.txt").touch()
    with pytest.raises(DataError, match=r"owls: a class folder without images; put some into it"):
        folder.list_folder(photos)
    shutil.rmtree(photos / "owls")
    shutil.rmtree(photos / "dogs")
    with pytest.raises(DataError, match=r"photos: 1 class folder with images; expected at least 2"):
        folder.list_folder(photos)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: 0 class folders with images; expected at least 2"):
        folder.list_folder(tmp_path / "empty")


def test_each_class_of_one_image_cannot_be_tested(tmp_path, rng):
    for name in "ab":
        (tmp_path / "one" / name).mkdir(parents=True)
        save(tmp_path / "one" / name / "0.png", image(rng))
    with pytest.raises(DataError, match=r"one: no class has two images, so that one could be held"):
        folder.list_folder(tmp_path / "one")


@pytest.mark.skipif(not hasattr(os, "symlink") or os.name == "nt", reason="no links here")
def test_row42_links(photos, tmp_path):
    """A class may be a link; a loop is not followed; a link to nothing is named."""
    (photos / "self").symlink_to(photos / "self")
    (photos / "cats" / "up").symlink_to(photos)
    shutil.move(photos / "dogs", tmp_path / "kennel")
    (photos / "dogs").symlink_to(tmp_path / "kennel")
    assert sum(len(part.paths) for part in folder.list_folder(photos)) == 15
    (photos / "dogs" / "gone.png").symlink_to(tmp_path / "nothing.png")
    with pytest.raises(FileNotFoundError, match=r"dogs/gone\.png"):
        open_dataset(photos)


def test_row42_no_permission(photos, monkeypatch):
    """By what the system says: who runs the tests may read everything."""
    def refuse(path, *args):
        if str(path).endswith(blocked):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args)

    opened, blocked = open, "dogs/2.png"
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(PermissionError, match=r"dogs/2\.png"):
        open_dataset(photos, workers=1)
    monkeypatch.undo()
    opened, blocked = os.scandir, "dogs"
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match=r"photos/dogs"):
        folder.list_folder(photos)


def test_row42_a_file_that_vanishes_is_named(photos):
    train, _ = folder.list_folder(photos)
    train.paths[3].unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(str(train.paths[3]))):
        train.load()


def test_a_folder_that_memory_does_not_hold_is_to_be_packed(photos, monkeypatch):
    monkeypatch.setattr(folder, "_memory", lambda: 2 * 12 * 64 * 64 * 3 - 1)
    with pytest.raises(DataError, match=r"^photos-train: 12 images of \(64, 64, 3\) come to 0\.0 "
                                        r"GB, more than half of this machine's memory; pack them"):
        open_dataset(photos)
    monkeypatch.setattr(folder, "_memory", lambda: 2 * 12 * 64 * 64 * 3)
    open_dataset(photos)


# ---- worker processes

def test_workers_give_the_same_images_in_order(photos, monkeypatch):
    want = open_dataset(photos, workers=1)
    monkeypatch.setattr(decoding, "CHUNK", 2)
    for part, wanted in zip(open_dataset(photos, workers=2), want):
        np.testing.assert_array_equal(part.images, wanted.images)
    with pytest.raises(ValueError, match=r"^workers must be >= 1, got 0$"):
        open_dataset(photos, workers=0)


def test_a_worker_that_is_killed_is_no_endless_wait(photos, monkeypatch):
    train, _ = folder.list_folder(photos)
    chunks = [train.paths[:1], train.paths[1:2]]
    with pytest.raises(DataError, match=r"^a process that decodes images ended, at .*; workers=1"):
        list(decoding._in_workers(_die, chunks, 2))


def _die(paths):
    os.kill(os.getpid(), 9)


def test_who_stops_early_leaves_no_process(photos, monkeypatch):
    import multiprocessing
    monkeypatch.setattr(decoding, "CHUNK", 1)
    images = decoding.decoded(folder.list_folder(photos)[0].paths, (4, 4), 3, workers=2)
    next(images)
    images.close()
    assert not multiprocessing.active_children()


_DECODE = """
import sys, time
from pathlib import Path
from gpucnn.data import decoding
if __name__ == "__main__":
    decoding.CHUNK = 1
    images = decoding.decoded([Path(p) for p in sys.argv[1:]], (4, 4), 3, workers=2)
    print("begun", flush=True)
    next(images)
    print("decoding", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc here")
@pytest.mark.parametrize(("number", "after"), [
    (signal.SIGINT, "begun"), (signal.SIGINT, "decoding"), (signal.SIGKILL, "decoding")])
def test_workers_end_with_the_program_and_say_nothing(photos, tmp_path, number, after):
    (tmp_path / "decode.py").write_text(_DECODE)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "decode.py", *folder.list_folder(photos)[0].paths],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True)
    while process.stdout.readline().strip() != after:
        assert process.poll() is None
    time.sleep(0.2 * (after == "begun"))  # while the workers import, which is when they would tell
    if number == signal.SIGINT:  # as a terminal sends it: to all
        os.killpg(process.pid, number)
    else:
        process.kill()
    _, errors = process.communicate(timeout=30)  # ends once no worker holds the pipe
    assert errors.count("Traceback") == (number == signal.SIGINT), errors


# ---- the scripts

def test_photographs_train_and_predict_with_two_commands(photos, tmp_path):
    def run(script, *given):
        return subprocess.run(
            [sys.executable, ROOT / "scripts" / script, *map(str, given)], cwd=tmp_path, text=True,
            capture_output=True, env={**os.environ, "GPUCNN_BACKEND": "numpy"}, check=True).stdout

    assert "12 training and 3 test images" in run(
        "train.py", "--data", photos, "--model", "lenet5", "--epochs", 1, "--image-size", 32,
        "--workers", 1)
    [trained] = (tmp_path / "runs").iterdir()
    assert "going on from" in run("train.py", "--out", trained, "--resume", "--workers", 2)
    assert re.search(r"0\.png +(cats|dogs) +\d+\.\d%", run("predict.py", photos / "cats" / "0.png"))
    assert "photos-test: 3 images, accuracy" in run("evaluate.py")  # the data of the run
    assert "report.html" in run("report.py", trained)


def test_evaluation_reads_a_folder_as_the_model_was_trained(photos):
    given = arguments("--data", str(photos), "--workers", "1")
    assert cli.load_data(given, (5, 7, 1))[0].images.shape[1:] == (5, 7, 1)
    given = arguments("--data", str(photos), "--workers", "1", "--channels", "3")
    assert cli.load_data(given, (5, 7, 1))[0].images.shape[1:] == (5, 7, 3)
    assert cli.load_data(arguments(), (5, 7, 1))[0].images.shape[1:] == (28, 28, 1)
