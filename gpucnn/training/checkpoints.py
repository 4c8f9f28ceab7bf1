"""Checkpoints of a run: one file each, whole or not there, with a checksum; the last and the best.

A checkpoint is a .safetensors file. Beside the arrays its header holds one JSON text: the format's
version, a CRC-32, and what the run wrote down (its settings, its place, ...), as a text of its own.
"""
from __future__ import annotations

import json
import re
import shutil
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from gpucnn._version import __version__
from gpucnn.errors import CheckpointError
from gpucnn.files import one_line, write_atomically

FORMAT = 1
_NAME = re.compile(r"step-(\d+)\.safetensors")


class Checkpoint(NamedTuple):
    """One that was read: arrays by name, and what was written down beside them."""

    path: Path
    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]


class Checkpoints:
    """Those in a folder: step-<number of steps>.safetensors.

    keep: how many of the newest stay. The best one stays beside them.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep = folder, keep

    def paths(self) -> list[Path]:
        """Oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted((p for p in self.folder.iterdir() if _NAME.fullmatch(p.name)), key=_step)

    def path(self, step: int) -> Path:
        """Of the checkpoint after so many steps, whether it is there or not."""
        return self.folder / f"step-{step}.safetensors"

    def save(self, step: int, arrays: dict[str, np.ndarray], facts: dict[str, Any],
             best: int | None = None) -> Path:
        """Write one, then delete those that need not stay.

        best: the step of the best one so far.

        Raises CheckpointError where it cannot be written; those before are left alone.
        """
        path = self.path(step)
        # safetensors writes the memory as it lies, which for a transposed view is another array.
        arrays = {name: np.asarray(a, order="C") for name, a in arrays.items()}
        text = json.dumps(facts)
        header = {"format": FORMAT, "gpucnn": __version__, "crc32": _checksum(arrays, text),
                  "facts": text}
        data = safetensors.numpy.save(arrays, {"gpucnn": json.dumps(header)})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, data)
        except OSError as e:
            raise CheckpointError(f"cannot write {one_line(path)}: {self._cause(e, len(data))}; "
                                  f"{self._left()}") from e
        for old in self.paths()[:-self.keep]:
            if _step(old) != best:
                with suppress(OSError):  # one that stays too long does no harm
                    old.unlink()
        return path

    def newest(self) -> Checkpoint | None:
        """The last one, None where there is none.

        Raises CheckpointError where it is damaged, or of a newer version of gpucnn.
        """
        paths = self.paths()
        if not paths:
            return None
        path = paths[-1]
        before = f"the one before is {paths[-2].name}" if len(paths) > 1 else \
            "there is no other one"
        return read_checkpoint(path, f"{before}; delete {path.name} to go on without it")

    def sweep(self) -> None:
        """Delete what a killed process has half written. Nobody else may be writing."""
        for folder in (self.folder, self.folder.parent):
            for path in folder.glob(".*.????????.tmp"):
                with suppress(OSError):
                    path.unlink()

    def _cause(self, e: OSError, size: int) -> str:
        text = (e.strerror or str(e)).lower()
        with suppress(OSError):
            free = shutil.disk_usage(self.folder).free
            text += f" (needs {_megabytes(size)}, {_megabytes(free)} free)"
        return text

    def _left(self) -> str:
        paths = self.paths()
        return f"{paths[-1].name} is intact" if paths else "no checkpoint was written before"


def read_checkpoint(path: Path, advice: str = "") -> Checkpoint:
    """Raises FileNotFoundError, and CheckpointError for what is damaged or too new."""
    advice = advice and f"; {advice}"
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {})["gpucnn"])
            written, version = header["format"], header["gpucnn"]
            if written > FORMAT:
                raise CheckpointError(
                    f"{one_line(path)}: written by gpucnn {version} (format {written}); this is "
                    f"{__version__} (format {FORMAT}); pip install -U gpucnn")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            text = header["facts"]
            whole = header["crc32"] == _checksum(arrays, text)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError,
            AttributeError) as e:
        raise CheckpointError(f"{one_line(path)}: damaged ({one_line(e)}){advice}") from e
    if not whole:
        raise CheckpointError(f"{one_line(path)}: damaged (its checksum is not that of its "
                              f"content){advice}")
    return Checkpoint(path, arrays, json.loads(text))


def _checksum(arrays: dict[str, np.ndarray], text: str) -> int:
    """Of the text and all names, shapes, dtypes and bytes; in the order of the names, since files
    have another."""
    crc = zlib.crc32(text.encode())
    for name in sorted(arrays):
        a = arrays[name]
        crc = zlib.crc32(f"{name} {a.dtype.str} {a.shape}".encode(), crc)
        crc = zlib.crc32(a.tobytes(), crc)
    return crc


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def _megabytes(n: int) -> str:
    return f"{n / 1e6:.3g} MB"

