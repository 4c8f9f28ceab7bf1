"""The folder of a run: made, locked against other processes, and recognised."""
from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from io import FileIO
from pathlib import Path

from gpucnn.errors import CheckpointError
from gpucnn.files import one_line

CONFIG_FILE, LOCK_FILE, CHECKPOINTS = "config.toml", ".lock", "checkpoints"
# Any of these says that a folder holds a run.
_MARKS = (CONFIG_FILE, "model.safetensors", CHECKPOINTS)


def new_folder(name: str) -> Path:
    """runs/<name>-<time>, which is not there yet."""
    stem = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    numbered = (Path("runs") / (stem if n == 1 else f"{stem}-{n}") for n in range(1, 1000))
    return next(folder for folder in numbered if not folder.exists())


def holds_run(folder: Path) -> bool:
    return any((folder / mark).exists() for mark in _MARKS)


@contextmanager
def run_folder(folder: Path, resume: bool) -> Iterator[Path]:
    """Make the folder where it is not there, and keep it for this process alone until the end.

    It is gone again if nothing was written into it.

    resume: whether it may hold a run.

    Raises FileExistsError for one that does and may not, CheckpointError where another process
    has it, and OSError where it cannot be made.
    """
    new = [f for f in (folder, *folder.parents) if not f.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as e:
        raise NotADirectoryError(f"{one_line(folder)} is not a folder; choose another --out") from e
    try:
        with _locked(folder):
            if not resume and holds_run(folder):
                raise FileExistsError(f"{one_line(folder)} already holds a run; add --resume or "
                                      "choose another --out")
            yield folder
    finally:
        with suppress(OSError):  # it holds something
            for f in new:
                f.rmdir()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The system gives the lock up when the process ends, however it does."""
    import fcntl  # not on Windows
    path = folder / LOCK_FILE
    with open(path, "a+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{one_line(folder)} is in use{_holder(file)}; choose another "
                                  "--out") from None
        # Who had it may have deleted the file between our opening and locking it.
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise CheckpointError(f"{one_line(folder)} was in use a moment ago; try again")
        try:
            with suppress(OSError):  # no room to say who has it
                file.truncate(0)
                file.write(f"process {os.getpid()} on host {socket.gethostname()} since "
                           f"{datetime.now():%Y-%m-%d %H:%M}".encode())
            yield
        finally:
            with suppress(OSError):
                path.unlink()


def _holder(file: FileIO) -> str:
    file.seek(0)
    text = file.read(200).decode(errors="replace")
    return f" by {one_line(text)}" if text else ""
