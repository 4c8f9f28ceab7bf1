"""scripts/predict.py: which images it finds, what it says of them, and what it leaves out."""
from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import pty
import select
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest

from gpucnn import cli
from gpucnn.backend import use_backend
from gpucnn.data import find_images
from gpucnn.layers import Conv2D, Dense, Flatten, GlobalAvgPool2D, Sequential
from gpucnn.models import save_model
from scripts import predict

Image = pytest.importorskip("PIL.Image", reason="needs Pillow: pip install 'gpucnn[images]'")
ROOT = Path(__file__).resolve().parents[1]
CLASSES = ["dark", "half\nway", "light, or so"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model of 2x2 images that knows how light they are."""
    path = tmp_path_factory.mktemp("run") / "model.safetensors"
    with use_backend("numpy"):
        model = Sequential([Flatten(), Dense(3)])
        model.build((2, 2, 1))
        model.parameters()["dense1/w"].data[...] = np.array([-1, 0, 1], np.float32)
        model.parameters()["dense1/b"].data[...] = np.array([2, 1, -2], np.float32)
        save_model(model, path, class_names=CLASSES)
    return path


@pytest.fixture
def images(tmp_path):
    """A folder of images at several depths, and a link that leads round in a circle."""
    folder = tmp_path / "images"
    (folder / "b" / "deep").mkdir(parents=True)
    for name, grey in (("white.PNG", 255), ("b/black.png", 0), ("b/deep/grey.jpg", 85)):
        save(folder / name, grey)
    (folder / "notes.txt").write_text("no image")
    save(folder / "b" / ".hidden.png", 0)
    (folder / "b" / "deep" / "up").symlink_to(folder, target_is_directory=True)
    return folder


def save(path, grey):
    Image.fromarray(np.full((3, 3), grey, np.uint8)).save(path)


def call(run, *arguments):
    """The exit code of the script's main()."""
    return predict.main(predict.parser().parse_args(["--run", str(run), *map(str, arguments)]))


def logits(grey):
    z = np.array([2, 1, -2]) + 4 * grey / 255 * np.array([-1, 0, 1])
    return np.exp(z) / np.exp(z).sum()


def test_json_has_each_image_of_a_folder_with_its_probabilities(run, images, capsys):
    assert call(run, images, "--format", "json", "--top", 9, "--batch-size", 2) == 0
    found = json.loads(capsys.readouterr().out)
    assert [p["path"] for p in found] == [
        str(images / name) for name in ("b/black.png", "b/deep/grey.jpg", "white.PNG")]
    for prediction, grey in zip(found, (0, 85, 255)):
        expected = logits(grey)
        order = np.argsort(-expected)
        assert [t["class"] for t in prediction["top"]] == [CLASSES[k] for k in order]
        np.testing.assert_allclose([t["probability"] for t in prediction["top"]],
                                   expected[order], atol=0.005)  # JPEG
        assert {k: prediction[k] for k in ("class", "probability")} == prediction["top"][0]


def test_csv_quotes_what_needs_it(run, images, capsys):
    os.rename(images / "white.PNG", images / 'a,"b"\nc.png')
    assert call(run, images / 'a,"b"\nc.png', "--format", "csv", "--top", 2) == 0
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert rows[0] == ["path", "class", "probability", "class_2", "probability_2"]
    assert rows[1][0] == str(images / 'a,"b"\nc.png')
    assert rows[1][1::2] == ["light, or so", "half\nway"]
    np.testing.assert_allclose([float(p) for p in rows[1][2::2]], np.sort(logits(255))[:0:-1],
                               atol=1e-5)


def test_lines_of_the_table_stay_lines(run, images, capsys):  # row 42
    os.rename(images / "white.PNG", images / "a\nb.png")
    assert call(run, images, "--top", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    path = str(images / "a\nb.png").replace("\n", "\\n")
    assert f"{path}         light, or so  72.1%  half\\nway     26.5%" in lines
    assert len({line.index("%") for line in lines}) == 1


def test_jsonl_and_names_that_are_no_utf8(run, images, capsys):
    name = os.fsdecode(b"caf\xe9.png")
    os.rename(images / "white.PNG", images / name)
    assert call(run, images, "--format", "jsonl") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert records[-1]["path"] == str(images / name)
    out = images / "out.csv"
    assert call(run, images / name, "--format", "csv", "--out", out) == 0
    assert b"caf\xe9.png,\"light, or so\"," in out.read_bytes()
    assert not capsys.readouterr().out
    result = script(images / name, "--run", run, "--format", "csv", capture_output=True)
    assert b"caf\xe9.png,\"light, or so\"," in result.stdout


def test_unreadable_images_are_named_and_skipped(run, images, capsys):  # rows 11, 38, 42
    good = images / "white.PNG"
    (images / "cut.png").write_bytes(good.read_bytes()[:50])
    (images / "empty.png").touch()
    Image.fromarray(np.full((2, 2), np.nan, np.float32)).save(images / "holes.tiff")
    (images / "none.png").symlink_to("nowhere")
    assert call(run, images, images / "gone.png", "--invert", "--batch-size", 2) == 1
    result = capsys.readouterr()
    assert len(result.out.splitlines()) == 3
    warnings = [line for line in result.err.splitlines() if line.startswith("warning: ")]
    assert [w.split(": ", 2)[1] for w in warnings] == [
        str(images / name) for name in ("cut.png", "empty.png", "holes.tiff", "none.png",
                                        "gone.png")]
    for text, line in zip(("not a readable image (", "(empty file)", "(it holds 4 NaN values)",
                           "No such file or directory", "No such file or directory"), warnings):
        assert text in line
    assert call(run, images / "gone.png", "--format", "json") == 1
    assert json.loads(capsys.readouterr().out) == []


def test_inverting_exchanges_black_and_white(run, images, capsys):
    assert call(run, images / "white.PNG", "--invert", "--format", "json") == 0
    assert json.loads(capsys.readouterr().out)[0]["class"] == "dark"


def test_an_empty_folder_is_an_error(run, tmp_path):  # row 42
    with pytest.raises(predict.DataError, match="no images in this folder or below it; give one"):
        call(run, tmp_path)


def test_a_result_file_is_written_whole_or_not_at_all(run, images, monkeypatch):
    out = images / "out.json"
    out.write_text("before")

    def fail(*_):
        raise ValueError("diverged")

    monkeypatch.setattr(predict, "predict", fail)
    with pytest.raises(ValueError, match="diverged"):
        call(run, images, "--format", "json", "--out", out)
    assert out.read_text() == "before"
    with pytest.raises(cli.UsageError, match=r"--out: .*none is not a folder"):
        call(run, images, "--out", images / "none" / "x.csv")


def test_a_batch_at_a_time_is_in_memory(run, images, monkeypatch, capsys):
    for i in range(5):
        save(images / f"{i}.png", 0)
    sizes = []
    whole = predict.predict
    monkeypatch.setattr(predict, "predict", lambda model, x, names: (
        sizes.append(len(x)), whole(model, x, names))[1])
    assert call(run, images, "--batch-size", 3) == 0
    assert sizes == [3, 3, 2]


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    errors = []
    assert find_images(tmp_path / "none", errors.append) == []
    assert [type(e) for e in errors] == [FileNotFoundError]
    with pytest.raises(FileNotFoundError):
        find_images(tmp_path / "none")


def test_explain_lays_the_places_that_speak_for_the_class_over_each_image(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    with use_backend("numpy"):  # light places speak for class 1, dark ones for nothing
        model = Sequential([Conv2D(1, 1, bias=False), GlobalAvgPool2D(), Dense(2)])
        model.build((4, 4, 1))
        for name, value in (("conv1/w", 1), ("dense1/w", [[0, 9]]), ("dense1/b", [0, 0])):
            model.parameters()[name].data[...] = np.array(value, np.float32)
        save_model(model, tmp_path / "model.safetensors", class_names=["dark", "light"])
    pixels = np.zeros((40, 600, 3), np.uint8)
    pixels[:, :300] = 255
    inputs = tmp_path / "in"
    (inputs / "b").mkdir(parents=True)
    for name in ("cat.png", "CAT.bmp", "b/cat.png"):
        Image.fromarray(pixels).save(inputs / name)
    before = {path: path.read_bytes() for path in inputs.rglob("*.*")}
    assert call(tmp_path, inputs, "--explain", inputs, "--format", "json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [p["class"] for p in found] == ["light"] * 3
    names = [str(inputs / f"{stem}.gradcam.png") for stem in ("CAT", "cat-2", "cat-3")]
    assert [p["overlay"] for p in found] == names
    assert {path: path.read_bytes() for path in before} == before
    for name in names:
        with Image.open(name) as picture:
            colours = np.asarray(picture.convert("RGB"))[picture.height // 2 + 20]
        assert tuple(colours[50]) == (255, 51, 51)
        assert tuple(colours[-50]) == (0, 0, 0)


def script(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "scripts.predict", *map(str, arguments)], cwd=ROOT, check=False,
        env={**os.environ, "GPUCNN_BACKEND": "numpy"}, **options)


def test_standard_input_is_an_image(run, images):
    options = {"capture_output": True}
    result = script("-", "--run", run, "--format", "jsonl", **options,
                    input=(images / "white.PNG").read_bytes())
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["path"], found["class"]) == ("-", "light, or so")
    result = script("-", "--run", run, input=str(images / "white.PNG").encode(), **options)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        b"warning: standard input: not a readable image (no known format); - reads one image, not "
        b"the names of files: for those use xargs -d '\\n' predict.py")


def test_standard_input_is_given_once_and_is_no_terminal(run, monkeypatch):
    with pytest.raises(cli.UsageError, match="can be given once"):
        call(run, "-", "-")
    _, end = pty.openpty()
    with open(end) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        with pytest.raises(cli.UsageError, match="standard input, which is a terminal"):
            call(run, "-")


def test_a_reader_that_goes_away_is_no_error(run, images):  # row 58
    reader, writer = os.pipe()
    os.close(reader)
    result = script(images, "--run", run, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert result.returncode == 0, result.stderr
    assert b"Error" not in result.stderr


def test_the_bar_shows_on_a_terminal_where_the_results_are_not(run, images, monkeypatch, capsys):
    pytest.importorskip("tqdm")
    (images / "empty.png").touch()
    main, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    for shown, arguments in ((False, ()), (True, ("--out", images / "out.csv"))):
        with open(os.dup(end), "w") as terminal:
            monkeypatch.setattr(sys, "stderr", terminal)
            monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
            assert call(run, images, *arguments) == 1
        said = ""
        while select.select([main], [], [], 0.2)[0]:
            said += os.read(main, 1 << 16).decode()
        assert ("%|" in said) == shown
        assert any(line.strip("\r").endswith("(empty file)") for line in said.split("\n"))
    os.close(main)
    os.close(end)
