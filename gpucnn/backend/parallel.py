"""The CPU's threads: work in blocks, shared out over them, with a BLAS of one thread inside each.

A BLAS that splits every product over all cores hands the cores back between products; whole blocks
of work keep a core busy, and the block in its cache. Which thread takes which block is left to
chance. What is computed is not: blocks depend on shapes alone, and sums over blocks are added in
one order, so results are the same bits for any number of threads.
"""
from __future__ import annotations

import itertools
import math
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

import numpy as np

_MOST_SHARES = 32            # of a sum: more would not keep more cores busy, but need more memory
_SHARES_BYTES = 64 << 20     # that all shares of a sum may take


def thread_count() -> int:
    """How many threads share out the work: GPUCNN_THREADS, or the cores this process may use.

    Raises ValueError for a GPUCNN_THREADS that is not an int >= 1.
    """
    text = os.environ.get("GPUCNN_THREADS")
    if text is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") \
            else os.cpu_count() or 1
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise ValueError(f"GPUCNN_THREADS={text!r} must be an int >= 1, or not set for one thread "
                         "a core")
    return int(text)


def for_each(work: Callable[[Any], None], items: Sequence[Any]) -> None:
    """work(item) for each item, in any order, on all threads; an error in one is raised here.

    Where several threads work already, another for_each stays on the one that calls it.
    """
    threads = 1 if _thread.working else min(thread_count(), len(items))
    with _blas:
        if threads <= 1:
            for item in items:
                work(item)
            return
        numbers, errors = itertools.count(), np.geterr()  # next() of a count is atomic

        def drain() -> None:
            _thread.working = True
            try:
                with np.errstate(**errors):
                    for number in numbers:
                        if number >= len(items):
                            break
                        work(items[number])
            finally:
                _thread.working = False

        others = [_pool.start(drain) for _ in range(threads - 1)]
        try:
            drain()
        finally:
            failures = [other.exception() for other in others]  # waits for each
        for failure in failures:
            if failure:
                raise failure


def sum_over(work: Callable[..., None], items: Sequence[Any], like: Sequence[np.ndarray]
             ) -> list[np.ndarray]:
    """The sums of what work(item, *totals) adds to arrays of zeros with the shapes of `like`."""
    count = shares(len(items), sum(a.nbytes for a in like))
    totals = [np.zeros((count, *a.shape), a.dtype) for a in like]

    def add_share(share: int) -> None:
        for item in items[share * len(items) // count:(share + 1) * len(items) // count]:
            work(item, *(total[share] for total in totals))

    for_each(add_share, range(count))
    return [total.sum(axis=0) if count > 1 else total[0] for total in totals]


def shares(items: int, nbytes: int) -> int:
    """In how many parts sum_over() adds so many items, each with sums of so many bytes."""
    return max(1, min(items, _MOST_SHARES, _SHARES_BYTES // max(1, nbytes)))


def scratch(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised array of this thread, which the next scratch() of that name gives again.

    Fresh memory costs a page fault for each 4 KiB, which for a block of work is as long as the
    work takes.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = _thread.buffers.get(name)
    if buffer is None or buffer.nbytes < size:
        buffer = _thread.buffers[name] = np.empty(size, np.uint8)
    return buffer[:size].view(dtype).reshape(shape)


class _Thread(threading.local):
    def __init__(self) -> None:
        self.working = False
        self.buffers: dict[str, np.ndarray] = {}


class _Pool:
    """Threads that wait for work. They are daemons: an interrupted program does not wait for them.

    concurrent.futures has no such pool, and an interrupt at the moment when it starts a thread
    lets Python hang at its exit.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.idle = 0
        self.tasks: SimpleQueue = SimpleQueue()

    def start(self, work: Callable[[], Any]) -> Future:
        """Run work() on a thread of the pool."""
        future: Future = Future()
        with self.lock:
            if self.idle:
                self.idle -= 1
            else:
                threading.Thread(target=self._serve, daemon=True, name="gpucnn").start()
        self.tasks.put((work, future))
        return future

    def _serve(self) -> None:
        while True:
            work, future = self.tasks.get()
            result = failure = None
            try:
                result = work()
            except BaseException as e:
                failure = e
            del work  # and with it arrays, which would wait here for the next work
            with self.lock:
                self.idle += 1
            if failure is None:
                future.set_result(result)
            else:
                future.set_exception(failure)
            del future, result, failure


class _Blas:
    """The BLAS libraries of this process, held to one thread while anyone is inside."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.libraries: list[Any] | None = None
        self.threads_before: list[int] = []

    def __enter__(self) -> None:
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                if self.libraries is None:
                    self.libraries = self._find()
                self.threads_before = [library.get_num_threads() for library in self.libraries]
                self._set([1] * len(self.libraries))

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self._set(self.threads_before)

    def _find(self) -> list[Any]:
        from threadpoolctl import ThreadpoolController
        # It is called back by the dynamic loader, where Python would drop a KeyboardInterrupt; on
        # another thread there is none.
        controller = _pool.start(ThreadpoolController).result()
        return controller.select(user_api="blas").lib_controllers

    def _set(self, threads: list[int]) -> None:
        for library, before, number in zip(self.libraries or [], self.threads_before, threads):
            if before != 1:
                library.set_num_threads(number)


_thread, _pool, _blas = _Thread(), _Pool(), _Blas()


def _after_fork() -> None:
    """A forked process has none of the threads, and locks as they were at that moment."""
    global _thread, _pool, _blas
    _thread, _pool, _blas = _Thread(), _Pool(), _Blas()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
