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
from multiprocessing.util import Finalize
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
    chunks = _chunks(paths)
    decode = partial(_decode, size=size, channels=channels, max_pixels=max_pixels)
    workers = min(_number_of(workers), len(chunks))
    return map(decode, chunks) if workers < 2 else _in_workers(decode, chunks, workers)


class Decoder:
    """decoded() for one batch of files after the other, by workers that stay for the next batches.

    They begin when they are first needed, and end with this object. Raises as decoded() does.
    """

    def __init__(self, size: tuple[int, int], channels: int, *, workers: int | None = None,
                 max_pixels: int | None = None):
        self.size, self.channels, self.workers = size, channels, _number_of(workers)
        self._decode = partial(_decode, size=size, channels=channels, max_pixels=max_pixels)
        self._pool: ProcessPoolExecutor | None = None

    def decoded(self, batches: Sequence[Sequence[Path]]) -> Iterator[np.ndarray]:
        """The images of all batches in order, some of one batch at a time: uint8 (m, h, w, c).

        Those that follow are decoded meanwhile: two batches, or what keeps the workers busy.
        """
        chunks = [chunk for batch in batches for chunk in _chunks(batch)]
        if self.workers == 1 or len(chunks) < 2:
            return map(self._decode, chunks)
        return self._by_workers(chunks, max(_AHEAD * self.workers, 2 * len(_chunks(batches[0]))))

    def _by_workers(self, chunks: list[Sequence[Path]], most: int) -> Iterator[np.ndarray]:
        if self._pool is None:
            self._pool = _new_pool(self.workers)
            # A process that multiprocessing began closes its queues when it ends, with priority
            # 10, and then waits for its children, which must have been told to end before that.
            Finalize(self, _shut_down, (self._pool,), exitpriority=100)
        pool = self._pool
        try:
            yield from _ahead(pool, self._decode, chunks, most)
        except DataError:  # the workers may have ended
            _shut_down(pool)
            self._pool = None
            raise


def _number_of(workers: int | None) -> int:
    if workers is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else \
            os.cpu_count() or 1
    if workers < 1:
        raise ValueError(f"workers must be >= 1, got {workers}")
    return workers


def _chunks(paths: Sequence[Path]) -> list[Sequence[Path]]:
    return [paths[i:i + CHUNK] for i in range(0, len(paths), CHUNK)]


def _decode(paths: Sequence[Path], size: tuple[int, int], channels: int, max_pixels: int | None
            ) -> np.ndarray:
    return np.stack([read_bytes(path, size, channels, max_pixels=max_pixels) for path in paths])


def _in_workers(decode: Callable[[Sequence[Path]], np.ndarray], chunks: list[Sequence[Path]],
                workers: int) -> Iterator[np.ndarray]:
    pool = _new_pool(workers)
    try:
        yield from _ahead(pool, decode, chunks, _AHEAD * workers)
    finally:
        pool.shutdown(cancel_futures=True)


def _new_pool(workers: int) -> ProcessPoolExecutor:
    # Not forked: threads of BLAS and CUDA do not outlive a fork.
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _end_with_parent)


def _shut_down(pool: ProcessPoolExecutor) -> None:
    # Garbage may be collected in the pool's own thread, which cannot wait for itself.
    pool.shutdown(wait=threading.current_thread() is threading.main_thread(), cancel_futures=True)


def _ahead(pool: ProcessPoolExecutor, decode: Callable[[Sequence[Path]], np.ndarray],
           chunks: list[Sequence[Path]], most: int) -> Iterator[np.ndarray]:
    """The chunks as the pool decodes them, at most so many before they are taken."""
    waiting: deque[tuple[Sequence[Path], Future]] = deque()
    try:
        rest = iter(chunks)
        while True:
            for chunk in itertools.islice(rest, most - len(waiting)):
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
        for _, future in waiting:
            future.cancel()


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
