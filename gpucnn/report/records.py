"""What is written in the folder of a run about it."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from gpucnn.errors import DataError
from gpucnn.files import PathLike, one_line, open_file

HISTORY_FILE, METRICS_FILE = "history.json", "metrics.json"


class RunRecord(NamedTuple):
    """history: lists by step and by epoch. metrics: what came of it, its settings and versions.

    Either is empty where its file is missing.
    """

    folder: Path
    history: dict[str, Any]
    metrics: dict[str, Any]


def read_record(folder: PathLike) -> RunRecord:
    """Raises DataError where the folder holds neither file, or one that is no JSON object."""
    folder = Path(folder)
    found = {name: _read_object(folder / name) for name in (HISTORY_FILE, METRICS_FILE)
             if (folder / name).exists()}
    if not found:
        raise DataError(f"{one_line(folder)}: no run, which has a {METRICS_FILE} or a "
                        f"{HISTORY_FILE}; give a folder that scripts/train.py has written")
    return RunRecord(folder, found.get(HISTORY_FILE, {}), found.get(METRICS_FILE, {}))


def _read_object(path: Path) -> dict[str, Any]:
    with open_file(path) as file:
        try:
            value = json.load(file)
        except (ValueError, RecursionError) as e:
            raise DataError(f"{one_line(path)}: damaged, no JSON ({one_line(e)}); train again") \
                from e
    if not isinstance(value, dict):
        raise DataError(f"{one_line(path)}: holds a {type(value).__name__}, not an object; "
                        "give a folder that scripts/train.py has written")
    return value
