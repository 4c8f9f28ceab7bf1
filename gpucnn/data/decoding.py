"""Image files decoded in worker processes, ahead of what takes them."""
from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from gpucnn.data.images import read_bytes
from gpucnn.errors import DataError
from gpucnn.files import one_line

CHUNK = 32  # images that a worker decodes at a time
_AHEAD = 4  # chunks for each worker that may be decoded and not taken yet


def decoded(paths: Sequence[Path], size: tuple[int, int], channels: int, *,
            workers: int | None = None, max_pixels: int | None = None) -> Iterator[np.ndarray]:
    """The images of the files in order, CHUNK or fewer at a time: uint8 (m, h, w, channels).

    size: (h, w). workers: how many processes; None for one a core that this process may use, 1
    for none but this one. They are new processes and import the program's main file, which must do
    its work under `if __name__ == "__main__":`. What is not taken holds them up.

    Raises DataError and OSError that name the file, ValueError for workers < 1.
    """
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else \
            os.cpu_count() or 1
    if workers < 1:
        raise ValueError(f"workers must be >= 1, got {workers}")
    chunks = [paths[i:i + CHUNK] for i in range(0, len(paths), CHUNK)]
    decode = partial(_decode, size=size, channels=channels, max_pixels=max_pixels)
    workers = min(workers, len(chunks))
    return map(decode, chunks) if workers < 2 else _in_workers(decode, chunks, workers)


def _decode(paths: Sequence[Path], size: tuple[int, int], channels: int, max_pixels: int | None
            ) -> np.ndarray:
    return np.stack([read_bytes(path, size, channels, max_pixels=max_pixels) for path in paths])


def _in_workers(decode: Callable[[Sequence[Path]], np.ndarray], chunks: list[Sequence[Path]],
                workers: int) -> Iterator[np.ndarray]:
    # Not forked: threads of BLAS and CUDA do not outlive a fork.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _end_with_parent)
    waiting: deque[tuple[Sequence[Path], Future]] = deque()
    try:
        rest = iter(chunks)
        while True:
            for chunk in itertools.islice(rest, _AHEAD * workers - len(waiting)):
                with _interrupts_held():  # for submit() begins the workers
                    waiting.append((chunk, pool.submit(decode, chunk)))
            if not waiting:
                return
            chunk, future = waiting.popleft()
            yield future.result()
    except BrokenProcessPool as e:
        raise DataError(f"a process that decodes images ended, at {one_line(chunk[0])} or the "
                        f"{len(chunk) - 1} after it or before; it may have been killed for want of "
                        "memory, or the program does not begin under if __name__ == '__main__'; "
                        "workers=1 (--workers 1) decodes without processes") from e
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C, which goes to all processes of a terminal, comes when this ends, and never to the
    processes that begin in it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """Let this worker end when the process that began it is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
