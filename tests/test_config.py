"""Settings from a TOML file: the flags' names, types and messages; flags win."""
from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from gpucnn import cli
from gpucnn.config import Parser, take_data_of_run, to_toml


def parser():
    p = Parser(prog="it")
    p.add_argument("--learning-rate", type=cli.positive_float, default=0.1)
    p.add_argument("--epochs", type=cli.positive_int, default=1)
    p.add_argument("--model", choices=("small", "large"), default="small")
    p.add_argument("--flip", action=argparse.BooleanOptionalAction, default=False)
    p.add_argument("--out", type=Path)
    p.add_argument("--keep", action="append", default=[])
    return p


def parse(tmp_path, text, *flags):
    (tmp_path / "it.toml").write_text(text, encoding="utf-8")
    return parser().parse_args([str(tmp_path / "it.toml"), *flags])


def test_the_file_gives_defaults_and_flags_override_them(tmp_path):
    text = 'learning-rate = 1e-3 # a comment\nepochs = 5\nflip = true\nout = "a/ü \\"b\\""\n'
    got = parse(tmp_path, text, "--epochs", "7")
    assert (got.learning_rate, got.epochs, got.flip, got.out, got.model) == (
        1e-3, 7, True, Path('a/ü "b"'), "small")
    assert parse(tmp_path, "flip = true", "--no-flip").flip is False
    assert parse(tmp_path, "keep = ['a']", "--keep", "b").keep == ["a", "b"]
    assert parse(tmp_path, "learning_rate = 2").learning_rate == 2.0
    assert parser().parse_args(["--epochs", "3"]).epochs == 3


@pytest.mark.parametrize(("text", "message"), [
    ("epoch = 3", "it.toml: epoch is not a setting; did you mean epochs"),
    ("zzz = 3", "it.toml: zzz is not a setting; --help lists the settings"),
    ("config = 'x'", "it.toml: config is not a setting"),
    ("help = true", "it.toml: help is not a setting"),
    ("epochs = 0", "it.toml: epochs: must be >= 1, got 0"),
    ("epochs = 1.5", "it.toml: epochs: must be an int, got 1.5"),
    ("epochs = true", "it.toml: epochs must be a number or a string, got True"),
    ("epochs = [1]", "it.toml: epochs must be a number or a string, got [1]"),
    ("[epochs]\nx = 1", "it.toml: epochs must be a number or a string, got {'x': 1}"),
    (f"epochs = {'1' * 5000}", "it.toml: not a TOML file (Exceeds the limit"),
    (f"epochs = {'[' * 10**5}", "it.toml: not a TOML file ("),
    ("learning-rate = 1\nlearning_rate = 2", "it.toml: learning_rate is there twice"),
    ("keep = 'it'", "it.toml: keep must be a list of strings, got it"),
    ("keep = [3]", "it.toml: keep must be a list of strings, got [3]"),
    ("flip = 1", "it.toml: flip must be true or false, got 1"),
    ("model = 'huge'", "it.toml: model must be one of small, large, got huge"),
    ("epochs = ", "it.toml: not a TOML file (Invalid value"),
    ("learning-rate = nan", "it.toml: learning-rate: must be > 0 and finite, got nan"),
])
def test_wrong_files_are_usage_errors(text, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        parse(tmp_path, text)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gpucnn: error: ")
    assert message in line


@pytest.mark.parametrize(("name", "message"), [
    ("none.toml", "none.toml: No such file or directory"), ("", ": a folder; give the path"),
    ("latin.toml", "latin.toml: not a TOML file ('utf-8' codec can't decode"),
])
def test_files_that_cannot_be_read(name, message, tmp_path, capsys):
    (tmp_path / "latin.toml").write_bytes(b"a = '\xff'")
    with pytest.raises(SystemExit) as end:
        parser().parse_args([str(tmp_path / name)])
    assert end.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_settings_written_down_are_read_again(tmp_path):
    settings = {"learning_rate": 1e-05, "epochs": 10**6, "flip": True, "model": "large",
                "out": 'x"\\ü\n\x7f\U0001f600'}
    text = to_toml({**settings, "left_out": None})
    assert "left_out" not in text
    got = parse(tmp_path, text)
    assert {name: getattr(got, name) for name in settings} == {**settings,
                                                               "out": Path(settings["out"])}


def data_of_run(folder, text, *given):
    (folder / "config.toml").write_text(text)
    its = cli.Parser()
    cli.add_data_arguments(its, of_run=True)
    arguments = its.parse_args(given)
    take_data_of_run(arguments, folder)
    return arguments.data, arguments.image_size, arguments.channels


def test_data_is_that_of_the_run_unless_flags_say_otherwise(tmp_path):
    text = "data = 'photos'\nimage_size = '32x48'\nchannels = 1\nmodel = 'any'\n"
    assert data_of_run(tmp_path, text) == ("photos", "32x48", 1)
    assert data_of_run(tmp_path, text, "--channels", "3") == ("photos", "32x48", 3)
    assert data_of_run(tmp_path, text, "--data", "mnist") == ("mnist", None, None)
    assert data_of_run(tmp_path, "") == ("fashion-mnist-subset", None, None)


def test_a_run_with_wrong_data_settings_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        data_of_run(tmp_path, "image_size = 'a'")
    assert f"{tmp_path / 'config.toml'}: image_size: must be an int, got a" in (
        capsys.readouterr().err)
