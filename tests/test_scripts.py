"""The scripts as a user meets them: files, exit codes, and one line for each error."""
from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import warnings
from pathlib import Path

import numpy as np
import pytest

from gpucnn import cli, schedules
from gpucnn.data import fashion_mnist
from gpucnn.models import load_model, save_model
from scripts import train
from tests import forked, gpusim
from tests.conftest import CUPY_RUNS

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("--model", "lenet5", "--epochs", "1", "--train-images", "256", "--test-images", "100")
Image = pytest.importorskip("PIL.Image", reason="needs Pillow: pip install 'gpucnn[images]'")
pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'gpucnn[plot]'")
pytest.importorskip("tqdm", reason="needs tqdm: pip install 'gpucnn[train]'")


def run(*command, as_module=True, code=0, cwd=ROOT, **environment):
    """Run a script; its exit code must be `code`, and an error must be one line.

    As a module, and in no environment of its own, it does not import all that it needs anew.
    """
    name, *arguments = map(str, command)
    if as_module and not environment and name.removeprefix("scripts.") in forked.SCRIPTS:
        result = forked.run(name.removeprefix("scripts."), arguments, cwd)
    else:
        script = ["-m", name] if as_module else [ROOT / f"{name.replace('.', '/')}.py"]
        settings = {"PYTHONPATH": str(ROOT), "GPUCNN_BACKEND": "numpy", **environment}
        result = subprocess.run([sys.executable, *script, *arguments], cwd=cwd, text=True,
                                check=False, capture_output=True, env={**os.environ, **settings})
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result


def error_of(result):
    lines = [line for line in result.stderr.splitlines() if line.startswith("gpucnn: error: ")]
    assert len(lines) == 1, result.stderr
    assert result.stderr.splitlines()[-1] == lines[0]
    return lines[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "first"
    return out, run("scripts.train", *SMALL, "--out", out)


def test_training_leaves_what_it_promises(trained):
    out, result = trained
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoints", "config.toml", "confusion.png", "curves.png", "environment.json",
        "history.json", "log.csv", "log.jsonl", "metrics.json", "model.json", "model.safetensors",
        "report.html", "tensorboard"]
    assert result.stdout.splitlines()[-1] == str(out)
    assert result.stderr == "gpucnn: backend numpy (GPUCNN_BACKEND=numpy)\n"
    assert "epoch 1/1: loss " in result.stdout
    metrics = json.loads((out / "metrics.json").read_text())
    assert {"test_accuracy", "seconds", "images_per_second", "backend", "device", "seed",
            "versions"} <= set(metrics)
    assert metrics["backend"] == "numpy"
    assert metrics["images_per_second"] == pytest.approx(256 / metrics["seconds"])
    history = json.loads((out / "history.json").read_text())
    assert len(history["step_loss"]) == history["steps_per_epoch"] == 4
    for name in ("curves.png", "confusion.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 500


def test_the_same_seed_gives_the_same_bits(trained, tmp_path):
    out, _ = trained
    run("scripts/train", *SMALL, "--out", tmp_path / "again", as_module=False)
    run("scripts.train", *SMALL, "--out", tmp_path / "other", "--seed", 1)
    for name in ("model.safetensors", "history.json"):
        first, again, other = ((folder / name).read_bytes() for folder in (
            out, tmp_path / "again", tmp_path / "other"))
        assert first == again != other


def test_augmented_training_is_a_function_of_the_seed_too(trained, tmp_path):
    options = ("--crop", 2, "--flip", "--cutout", 6)
    for name in ("one", "two"):
        run("scripts.train", *SMALL, *options, "--out", tmp_path / name)
    plain, one, two = ((folder / "history.json").read_bytes() for folder in (
        trained[0], tmp_path / "one", tmp_path / "two"))
    assert plain != one == two
    metrics = json.loads((tmp_path / "one" / "metrics.json").read_text())
    assert (metrics["crop"], metrics["flip"], metrics["cutout"]) == (2, True, 6)
    result = run("scripts.train", *SMALL, "--crop", 28, "--out", tmp_path / "large", code=1)
    assert error_of(result) == ("gpucnn: error: Augmentation: crop must be less than the height "
                                "and the width of the images, 28x28; got 28")
    assert not (tmp_path / "large").exists()


@pytest.mark.parametrize(("optimizer", "rate", "decay"), [
    ("adam", 1e-3, 0.0), ("adamw", 1e-3, 0.01), ("nesterov", 0.01, 0.0)])
def test_the_optimizers_own_settings_are_written_down(optimizer, rate, decay):
    arguments = train.parser().parse_args(["--optimizer", optimizer])
    train.resolve(arguments)
    assert (arguments.learning_rate, arguments.weight_decay) == (rate, decay)
    arguments = train.parser().parse_args(
        ["--optimizer", optimizer, "--learning-rate", "3", "--weight-decay", "4"])
    train.resolve(arguments)
    assert (arguments.learning_rate, arguments.weight_decay) == (3, 4)


def test_the_learning_rate_follows_the_schedule(tmp_path):
    """Each third of 8 steps has a tenth of the rate before; the first half epoch is two steps."""
    out = tmp_path / "run"
    run("scripts.train", *SMALL, "--epochs", 2, "--optimizer", "sgd", "--schedule", "step",
        "--warm-up", 0.5, "--out", out)
    rates = json.loads((out / "history.json").read_text())["step_learning_rate"]
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.001, 0.001, 0.001, 0.0001, 0.0001])
    metrics = json.loads((out / "metrics.json").read_text())
    got = [metrics[name] for name in ("schedule", "warm_up", "learning_rate")]
    assert got == ["step", 0.5, 0.01]


@pytest.mark.parametrize("name", schedules.BY_NAME)
def test_each_schedule_begins_and_ends(name):
    schedule = schedules.BY_NAME[name](0.5, 90)
    assert schedule(30) == {"constant": 0.5, "step": pytest.approx(0.05),
                            "cosine": pytest.approx(0.375)}.get(name, schedule(30))
    assert 0 <= schedule(89) <= schedule(30) <= 0.5


def test_a_run_is_not_overwritten(trained):
    out, _ = trained
    result = run("scripts.train", *SMALL, "--out", out, code=1)
    assert error_of(result).endswith("already holds a run; add --resume or choose another --out")


def test_default_run_folders_do_not_collide(tmp_path):
    for _ in range(2):
        folder = run("scripts.train", *SMALL, cwd=tmp_path).stdout.splitlines()[-1]
        assert (tmp_path / folder / "model.safetensors").exists()
    assert len(list((tmp_path / "runs").iterdir())) == 2
    assert "model runs/" in run("scripts.evaluate", cwd=tmp_path).stderr


def test_the_progress_bar_fits_80_columns(tmp_path):
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.train", "--epochs", "1", "--train-images", "512",
         "--test-images", "1", "--out", str(tmp_path / "run")], cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=end, env={**os.environ, "GPUCNN_BACKEND": "numpy"})
    os.close(end)
    output = b""
    with contextlib.suppress(OSError):  # the other end was closed
        while data := os.read(terminal, 4096):
            output += data
    os.close(terminal)
    assert process.wait() == 0, output
    bars = [bar for bar in output.decode().split("\r") if "loss" in bar]
    assert len(bars) > 1
    for bar in bars:
        assert len(bar) <= 80
        assert re.fullmatch(r"epoch 1/1 \|.+\| \d\d:\d\d left, +[\d.]+ images/s, loss \d\.\d{4}, "
                            r"accuracy 0\.\d{4}", bar), bar


def test_evaluate(trained, tmp_path):
    out, _ = trained
    result = run("scripts.evaluate", "--run", out, "--plot", tmp_path / "c.png")
    assert "fashion-mnist-subset-test: 2,000 images, accuracy 0." in result.stdout
    assert "Ankle boot" in result.stdout
    matrix = [[int(n) for n in line.split()[-10:]] for line in result.stdout.splitlines()[-10:]]
    assert np.sum(matrix) == 2000
    assert (tmp_path / "c.png").exists()


def test_evaluate_looks_for_the_folder_of_the_picture_first(trained, tmp_path):
    result = run("scripts.evaluate", "--run", trained[0], "--plot", tmp_path / "none" / "c.png",
                 code=2)
    assert error_of(result) == f"gpucnn: error: --plot: {tmp_path / 'none'} is not a folder"
    assert not result.stdout


@pytest.mark.parametrize("names", [["one"], 5, None, list(range(10))], ids=str)
def test_class_names_that_do_not_fit_are_refused(trained, tmp_path, names):
    for file in ("model.safetensors", "model.json"):
        shutil.copy(trained[0] / file, tmp_path)
    description = json.loads((tmp_path / "model.json").read_text())
    description["metadata"]["class_names"] = names
    (tmp_path / "model.json").write_text(json.dumps(description))
    result = run("scripts.predict", "x.png", "--run", tmp_path, code=1)
    assert error_of(result) == (f"gpucnn: error: {tmp_path / 'model.json'}: class_names must be 10 "
                                f"strings, got {names}")


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
def test_a_model_that_has_diverged_says_so(trained, tmp_path, value):
    model, metadata = load_model(trained[0] / "model.safetensors")
    model.parameters()["conv1/w"].data[...] = value
    save_model(model, tmp_path / "model.safetensors", **metadata)
    good = tmp_path / "good.png"
    Image.fromarray(np.full((28, 28), 100, np.uint8)).save(good)
    for script, found in ((("scripts.predict", good), f"probabilities of image 0 ({good}) are not "
                           "finite"), (("scripts.evaluate",), "loss is nan")):
        result = run(*script, "--run", tmp_path, code=1)
        assert error_of(result).startswith(f"gpucnn: error: the {found}; the model may have diver")
        assert len(result.stderr.splitlines()) == 3  # the backend, the run, and the error
        assert not result.stdout


USAGE = {
    "a value": (("--epochs", "0"), "argument --epochs: must be >= 1, got 0"),
    "a word": (("--optimizer", "best"), "invalid choice: 'best'"),
    "a rate": (("--learning-rate", "nan"), "--learning-rate: must be > 0 and finite, got nan"),
    "no int": (("--epochs", "x"), "argument --epochs: must be an int, got x"),
    "no number": (("--clip-norm", "x"), "argument --clip-norm: must be a number, got x"),
    "a seed": (("--seed", "-1"), "argument --seed: must be from 0 to 2**32 - 1, got -1"),
    "a large seed": (("--seed", 2**32), "--seed: must be from 0 to 2**32 - 1, got 4294967296"),
    "a share": (("--label-smoothing", "5"), "--label-smoothing: must be >= 0 and < 1, got 5"),
    "a precision": (("--precision", "mixed_float16"),
                    "error: --precision: precision 'mixed_float16' needs the cupy backend"),
    "no share": (("--label-smoothing", "nan"), "--label-smoothing: must be >= 0 and < 1, got nan"),
}


def test_a_whitening_layer_is_fitted_to_the_training_images(tmp_path):
    run("scripts.train", *SMALL, "--model", "airbench94", "--train-images", "64", "--out", tmp_path)
    model, _ = load_model(tmp_path / "model.safetensors")
    images = fashion_mnist.load(subset=True)[0].images[:64] / np.float32(255)
    y = model.layers[0].forward(images.astype(np.float32)) - model.layers[0].b.data
    moments = np.einsum("nhwi,nhwj->ij", y[..., :4], y[..., :4]) / y[..., 0].size
    np.testing.assert_allclose(moments, np.diag(moments.diagonal()), atol=1e-3)


@pytest.mark.parametrize(("arguments", "message"), USAGE.values(), ids=USAGE)
def test_wrong_usage_exits_2(arguments, message):
    result = run("scripts.train", *arguments, code=2)
    assert message in error_of(result)
    assert result.stderr.count("\n") == 1 or "backend" in result.stderr.splitlines()[0]


def test_backends_that_cannot_work_exit_2(tmp_path):  # rows 43 to 45
    for unknown in ("cuda", "", "CuPy"):
        result = run("scripts.train", *SMALL, code=2, GPUCNN_BACKEND=unknown)
        assert error_of(result).startswith(f"gpucnn: error: GPUCNN_BACKEND='{unknown}' is not")
    package = tmp_path / "cupy"
    package.mkdir()
    for error, remedy in ((None, "pip install 'gpucnn[cuda12]'"),
                          ("cudaErrorInsufficientDriver: too old", "update the NVIDIA driver"),
                          ("cudaErrorNoDevice: none", "check nvidia-smi and CUDA_VISIBLE_DEVICES")):
        raises = ("raise ModuleNotFoundError('no', name='cupy')" if error is None else
                  "import types\n__version__ = '14.0'\n"
                  "class E(RuntimeError): pass\n"
                  f"def count(): raise E({error!r})\n"
                  "cuda = types.SimpleNamespace(runtime=types.SimpleNamespace(\n"
                  "    CUDARuntimeError=E, getDeviceCount=count))\n")
        (package / "__init__.py").write_text(raises)
        settings = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
        result = run("scripts.train", *SMALL, code=2, GPUCNN_BACKEND="cupy", **settings)
        assert error_of(result).startswith("gpucnn: error: GPUCNN_BACKEND=cupy but ")
        assert remedy in result.stderr
        result = run("scripts.evaluate", "--run", "nowhere", code=1, GPUCNN_BACKEND="auto",
                     **settings)
        assert result.stderr.startswith("gpucnn: backend numpy (CuPy ")
        assert remedy in result.stderr
        assert "nowhere" in error_of(result)


def test_a_loss_that_is_not_finite_stops_with_advice(tmp_path):  # row 12
    result = run("scripts.train", *SMALL, "--model", "article", "--optimizer", "sgd",
                 "--learning-rate", "1e30", "--out", tmp_path / "run", code=1)
    assert len(result.stderr.splitlines()) == 2  # the backend, and the error
    message = error_of(result)
    assert "at epoch 1 step " in message
    assert "(lr 1e+30); no checkpoint was written yet; lower the learning rate or use" in message
    # The log tells what happened; there is no model, and the folder can be used again.
    assert '"loss"' in (tmp_path / "run" / "log.jsonl").read_text()
    assert not list((tmp_path / "run").rglob("*.safetensors"))
    run("scripts.train", *SMALL, "--resume", "--out", tmp_path / "run")


def test_data_that_is_missing_is_named(tmp_path):  # row 29
    result = run("scripts.train", "--data", "full", "--data-dir", tmp_path, code=1)
    assert "train-images-idx3-ubyte.gz" in error_of(result)
    result = run("scripts.train", "--data-dir", tmp_path, code=2)
    assert "--data-dir (data_dir) does not go with fashion-mnist-subset" in error_of(result)


def test_training_without_tqdm_says_so(tmp_path):
    (tmp_path / "tqdm.py").write_text("raise ModuleNotFoundError('no', name='tqdm')")
    settings = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    result = run("scripts.train", *SMALL, code=1, **settings)
    assert error_of(result) == "gpucnn: error: training needs tqdm; pip install 'gpucnn[train]'"
    run("scripts.train", "--help", **settings)


def test_a_reader_that_goes_away_is_no_error(trained):
    out, _ = trained
    process = subprocess.Popen([sys.executable, "-m", "scripts.evaluate", "--run", str(out)],
                               cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "GPUCNN_BACKEND": "numpy"})
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 0, errors
    assert "Error" not in errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_python_ends_leaves_no_traceback(number):
    program = ("import argparse, atexit, signal; from gpucnn import cli; "
               f"atexit.register(signal.raise_signal, {number:d}); "
               "cli.run(lambda arguments: 0, argparse.ArgumentParser())")
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True,
                            check=False)
    assert (result.returncode, result.stderr) == (-number, b"")


def test_errors_of_the_system_are_said_without_their_number():
    program = "from gpucnn import cli; cli.run(lambda arguments: open('none/it'), cli.Parser())"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True,
                            text=True, check=False)
    assert (result.returncode, result.stderr) == (
        1, "gpucnn: error: none/it: No such file or directory\n")


def test_closed_outputs_are_no_error(monkeypatch):  # as by >&- 2>&-
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(sys, "argv", ["it.py"])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # restores it
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    with pytest.raises(SystemExit) as end:
        cli.run(lambda arguments: print("out", file=sys.stderr), argparse.ArgumentParser())
    assert end.value.code == 0
    sys.stdout.close()
    sys.stderr.close()


def test_a_report_is_written_again_from_the_folder(trained, tmp_path):
    out, _ = trained
    again = tmp_path / "again"
    shutil.copytree(out, again)
    (again / "report.html").unlink()
    result = run("scripts/report", again, as_module=False)
    assert result.stdout == f"{again / 'report.html'}\n"
    accuracy = json.loads((out / "metrics.json").read_text())["test_accuracy"]
    for folder in (out, again):
        assert f"<b>{100 * accuracy:.2f} %</b><span>of 100 images" in (
            folder / "report.html").read_text(encoding="utf-8")
    record = json.loads((again / "metrics.json").read_text())
    (again / "metrics.json").write_text(json.dumps(record | {"train_set": "other"}))
    result = run("scripts.report", again, code=2)
    assert "trained on other, but the data are fashion-mnist-subset" in error_of(result)
    (again / "model.safetensors").unlink()
    assert "no such model" in error_of(run("scripts.report", again, code=1))


def test_runs_are_compared(trained, tmp_path):
    out, _ = trained
    run("scripts.train", *SMALL, "--optimizer", "sgd", "--out", tmp_path / "other")
    result = run("scripts.report", out, tmp_path / "other", cwd=tmp_path)
    assert result.stdout == "compare.html\n"
    page = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert '>optimizer</th><td>adam</td><td>sgd</td>' in page
    run("scripts.report", out, out, "--out", tmp_path / "named.html")
    assert (tmp_path / "named.html").exists()
    for arguments, code, message in (
            ((out, "--out", "x.html"), 2, "--out is for the comparison of several runs"),
            ((out, out, "--out", tmp_path / "none" / "x.html"), 2, "is not a folder"),
            ((out, tmp_path), 1, f"{tmp_path}: no run, which has a metrics.json or a history.json"),
            ((tmp_path,), 1, "give a folder that scripts/train.py has written")):
        assert message in error_of(run("scripts.report", *arguments, code=code))


@pytest.mark.parametrize("script", ["train", "evaluate", "predict", "report", "benchmark",
                                    "gpu_check"])
def test_help(script):
    text = run(f"scripts.{script}", "--help").stdout
    assert text.startswith(f"usage: {script}.py ")
    assert "--debug" in text


def test_a_warning_is_one_line(tmp_path):
    script = tmp_path / "warn.py"
    script.write_text("import argparse, warnings\nfrom gpucnn import cli\n"
                      "cli.run(lambda a: warnings.warn('so\\nit is'), argparse.ArgumentParser())")
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True,
                            env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert result.stderr == "warning: so\\nit is\n"
    result = subprocess.run([sys.executable, script, "--debug"], capture_output=True, text=True,
                            check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert "warn.py:3: UserWarning: so" in result.stderr


def test_debug_shows_the_traceback(tmp_path):
    result = subprocess.run([sys.executable, "-m", "scripts.evaluate", "--run", str(tmp_path),
                             "--debug"], cwd=ROOT, capture_output=True, text=True, check=False,
                            env={**os.environ, "GPUCNN_BACKEND": "numpy"})
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "DataError" in result.stderr


@pytest.mark.skipif(not CUPY_RUNS or not gpusim.available()[0], reason="needs a C++ compiler")
def test_the_cupy_code_gives_the_same_loss_curve(tmp_path):
    """A small run through the CUDA sources: as a CUDA graph and in plain calls; once on NumPy."""
    small = ("--model", "lenet5", "--epochs", "1", "--train-images", "48", "--test-images", "20",
             "--batch-size", "16", "--out")
    for name, options in (("a", ()), ("b", ["--eager"])):
        run("tests.gpusim", "scripts.train", *small, tmp_path / name, *options,
            GPUCNN_BACKEND="cupy", GPUSIM_CHECKS="off")
    run("scripts.train", *small, tmp_path / "numpy")
    curves = {name: json.loads((tmp_path / name / "history.json").read_text())["step_loss"]
              for name in ("a", "b", "numpy")}
    assert len(curves["a"]) == 3
    assert curves["a"] == curves["b"]
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (
        tmp_path / "b" / "model.safetensors").read_bytes()
    # Sums in another order differ by about 1e-7; three steps of Adam, whose first steps have the
    # size of the learning rate whatever the gradient, let that grow.
    np.testing.assert_allclose(curves["a"], curves["numpy"], rtol=1e-4)
    metrics = {name: json.loads((tmp_path / name / "metrics.json").read_text()) for name in curves}
    assert metrics["a"]["backend"] == "cupy"
    assert {name: m["cuda_graphs"] for name, m in metrics.items()} == {
        "a": True, "b": False, "numpy": False}
    run("scripts.evaluate", "--run", tmp_path / "a")  # saved on one backend, read on the other
