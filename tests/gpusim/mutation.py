"""Plant a bug in a kernel, to see that the tests notice."""
from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

from gpucnn.backend.cuda_kernel import kernel_dir
from tests.gpusim.engine import KernelFault


def plant(text: str, old: str, new: str) -> str:
    """text with the first `old` replaced. Raises AssertionError where there is none."""
    assert old in text, f"there is no {old!r}: the bug would not be planted"
    return text.replace(old, new, 1)


@contextmanager
def mutated(file: str, old: str, new: str) -> Iterator[Path]:
    """In the block, GPUCNN_KERNEL_DIR is a copy of the kernels with a bug in one file."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(kernel_dir(), Path(folder) / "kernels"))
        (copy / file).write_text(plant((copy / file).read_text(), old, new))
        with mock.patch.dict(os.environ, GPUCNN_KERNEL_DIR=str(copy)):
            yield copy


@contextmanager
def caught(file: str, old: str, new: str,
           *kinds: type[Exception]) -> Iterator[pytest.ExceptionInfo[Exception]]:
    """The block must notice the bug, by one of the kinds: a fault or an assertion unless given.

    What does not compile any more, or cannot be launched, is not a bug that was noticed.
    """
    with mutated(file, old, new), pytest.raises((RuntimeError, AssertionError)) as info:
        yield info
    cause: BaseException = info.value
    while cause.__cause__ is not None:  # cases.named() puts the case in front
        cause = cause.__cause__
    assert isinstance(cause, kinds or (KernelFault, AssertionError)), repr(cause)
