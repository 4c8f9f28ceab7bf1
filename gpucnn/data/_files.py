"""What every reader of files shares: safe opening, and messages that stay on one line."""
from __future__ import annotations

import os
import stat
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


def one_line(value: object) -> str:
    """str(value) with newlines and other unprintable characters escaped, for a message."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode()
                   for c in str(value))
