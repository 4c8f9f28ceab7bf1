"""Plant a bug in a kernel, to see that the tests notice."""
from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from gpucnn.backend.cuda_kernel import kernel_dir


@contextmanager
def mutated(file: str, old: str, new: str) -> Iterator[Path]:
    """In the block, GPUCNN_KERNEL_DIR is a copy of the kernels with one piece of text replaced.

    Raises AssertionError if `old` is not in the file: the bug would not be planted.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(kernel_dir(), Path(folder) / "kernels"))
        text = (copy / file).read_text()
        assert old in text, f"{file} does not contain {old!r}"
        (copy / file).write_text(text.replace(old, new, 1))
        with mock.patch.dict(os.environ, GPUCNN_KERNEL_DIR=str(copy)):
            yield copy
