"""Files: opened with care, written whole or not at all, named in messages of one line."""
from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path
from typing import BinaryIO

from gpucnn.errors import DataError

PathLike = str | os.PathLike[str]


def open_file(path: PathLike) -> BinaryIO:
    """Open a regular file for reading bytes.

    Raises DataError for a folder, a pipe or a device (opening a pipe would wait for ever), and
    lets the system's own errors through: FileNotFoundError, PermissionError.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise DataError(f"{one_line(path)}: {kind}; give the path of a file")
    return open(path, "rb")


def write_atomically(path: PathLike, data: bytes) -> None:
    """Replace the file by `data`: a kill or a full disk leaves the old file, never half a new one.

    Raises OSError.
    """
    try:
        _replace(Path(path), data)
    except OSError as e:  # which names the temporary file, or none
        raise OSError(e.errno, e.strerror, str(path)) from e


def _replace(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if hasattr(os, "O_DIRECTORY"):  # the new name is on the disk once its folder is
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def one_line(value: object) -> str:
    """str(value) with newlines and other unprintable characters escaped, for a message."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode()
                   for c in str(value))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
