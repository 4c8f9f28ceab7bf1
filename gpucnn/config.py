"""Settings of a script from a TOML file, which flags override; and written back as TOML."""
from __future__ import annotations

import argparse
import difflib
import json
import sys
from pathlib import Path
from typing import Any

from gpucnn import cli
from gpucnn.errors import DataError
from gpucnn.files import one_line, open_file
from gpucnn.training.run_folder import CONFIG_FILE

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Parser(cli.Parser):
    """An argument parser that takes the settings of a TOML file as defaults.

    The file is the positional argument `config`, added here; a key of it is the name of a flag,
    with - or _. Wrong keys and values are usage errors, as those of flags are.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.add_argument("config", nargs="?", type=Path, metavar="TOML",
                          help="a file of settings, named as the flags are, which override it")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        arguments = super().parse_args(args)
        path = self.config_of(arguments)
        if path is not None:
            self.set_defaults(**self.read(path))
            arguments = super().parse_args(args)
        return arguments

    def config_of(self, arguments: argparse.Namespace) -> Path | None:
        """Which file to read, by the flags alone."""
        return arguments.config

    def read(self, path: Path, only_known: bool = False) -> dict[str, Any]:
        """The settings of a file, as the flags would give them.

        only_known: leave out keys that name no flag here.
        """
        where = one_line(path)
        try:
            with open_file(path) as file:
                settings = tomllib.load(file)
        except OSError as e:
            self.error(f"{where}: {e.strerror}")
        except DataError as e:
            self.error(str(e))
        except (ValueError, RecursionError) as e:  # of Python too: numbers too long, lists too deep
            self.error(f"{where}: not a TOML file ({one_line(e)})")
        actions = {a.dest: a for a in self._actions if a.option_strings and a.dest != "help"}
        values = {}
        for key, value in settings.items():
            name = key.replace("-", "_")
            if name not in actions:
                if only_known:
                    continue
                near = difflib.get_close_matches(name, actions, 1)
                hint = f"did you mean {near[0]}" if near else "--help lists the settings"
                self.error(f"{where}: {one_line(key)} is not a setting; {hint}")
            if name in values:
                self.error(f"{where}: {one_line(key)} is there twice, with - and with _")
            values[name] = self._value(f"{where}: {key}", actions[name], value)
        return values

    def _value(self, where: str, action: argparse.Action, value: Any) -> Any:
        """The value as the flag would give it."""
        if action.nargs == 0:
            if not isinstance(value, bool):
                self.error(f"{where} must be true or false, got {one_line(value)}")
            return value
        if isinstance(action.default, list):  # of a flag that may be repeated
            if not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
                self.error(f"{where} must be a list of strings, got {one_line(value)}")
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            self.error(f"{where} must be a number or a string, got {one_line(value)}")
        convert: Any = action.type or str
        try:
            converted = convert(str(value))
        except (argparse.ArgumentTypeError, ValueError) as e:
            self.error(f"{where}: {one_line(e)}")
        if action.choices is not None and converted not in action.choices:
            self.error(f"{where} must be one of {', '.join(map(str, action.choices))}, got "
                       f"{one_line(value)}")
        return converted


def take_data_of_run(arguments: argparse.Namespace, run: Path) -> None:
    """Where there is no --data: that of the run, read as the run did where no flag says otherwise.

    run: its folder. One without a config.toml has the defaults; a wrong one is a usage error.
    """
    if arguments.data is not None:
        return
    parser = Parser(prog="train.py")
    cli.add_data_arguments(parser)
    settings = vars(parser.parse_args([]))
    path = run / CONFIG_FILE
    if path.exists():
        settings |= parser.read(path, only_known=True)
    for name, value in settings.items():
        if getattr(arguments, name, value) is None:
            setattr(arguments, name, value)


def to_toml(settings: dict[str, Any]) -> str:
    """Settings as a TOML file; those that are None are left out."""
    return "".join(f"{name} = {_toml(value)}\n" for name, value in settings.items()
                   if value is not None)


def _toml(value: Any) -> str:
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)  # true, 3 and 1e-05 are TOML too
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
