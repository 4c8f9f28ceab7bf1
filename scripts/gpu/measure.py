"""How a call is timed and checked on a GPU.

A call is timed inside a CUDA graph, so that the host's own time is not in it; over several sets of
buffers in turn, outputs included, so that none is still in the L2 cache; in several windows, of
which the median and the spread count. The same for our kernels and for those of a peer.
"""
from __future__ import annotations

import contextlib
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np

from gpucnn.backend import Backend

Call = Callable[[], Any]
GRAPH_SECONDS = 1e-3  # about, of the calls in one graph
MOST_CALLS = 32       # in one graph
MOST_BUFFERS = 64
BLOCK = 1_000_003     # random numbers; a prime, so that no tile meets the same ones in its turn


class Timing(NamedTuple):
    """Seconds of one call, in each window."""

    samples: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """(slowest - fastest) / median."""
        return (max(self.samples) - min(self.samples)) / self.median

    def figures(self) -> dict[str, Any]:
        return {"microseconds": 1e6 * self.median, "spread": self.spread,
                "samples": [1e6 * s for s in self.samples]}


class Library(Protocol):
    """Whose calls are timed: where they run, and how they become a graph."""

    def scope(self) -> AbstractContextManager[Any]:
        """In it, calls go to the clock's stream."""

    def capture(self, work: Call) -> Call:
        """What `work` launches, as a graph: a function that launches it."""


class Clock:
    """Times calls on a stream of its own."""

    def __init__(self, backend: Backend, windows: int = 7, window_seconds: float = 0.03,
                 most_buffers: int = MOST_BUFFERS):
        self.xp: Any = backend.xp
        self.cuda: Any = backend.xp.cuda
        self.windows, self.window_seconds = windows, window_seconds
        self.most_buffers = most_buffers
        self.stream = self.cuda.Stream(non_blocking=True)
        properties = self.cuda.runtime.getDeviceProperties(self.cuda.Device().id)
        self.l2_bytes = properties["l2CacheSize"]

    def buffers(self, nbytes: int) -> int:
        """How many sets of so many bytes to take in turn: the others fill the cache twice."""
        if nbytes >= 4 * self.l2_bytes:
            return 1
        return min(self.most_buffers, 1 + math.ceil(2 * self.l2_bytes / nbytes))

    def wait(self) -> None:
        self.cuda.Device().synchronize()

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """CuPy's memory comes from a pool that nobody else is given as long as a graph uses it."""
        self.wait()
        pool = self.cuda.MemoryPool()
        try:
            with self.cuda.using_allocator(pool.malloc), self.stream:
                yield
        finally:
            self.wait()
            pool.free_all_blocks()

    def capture(self, work: Call) -> Call:
        """Must be called in scope(), after the calls have run once: compiling is not captured."""
        from gpucnn.backend.cuda_graph import capture_on  # which imports CuPy

        stream = self.stream
        try:
            graph = capture_on(stream, work)
        except BaseException:
            self.stream = self.cuda.Stream(non_blocking=True)
            raise
        return lambda: graph.launch(stream)

    def time(self, calls: Sequence[Call], library: Library | None = None, *,
             roughly: bool = False) -> Timing:
        """One call's seconds, where the calls are the same work on different buffers.

        roughly: in few and short windows, to choose among many candidates.
        """
        library = library or self
        results: list[Any] = [None] * len(calls)

        def launch(count: int) -> None:
            for i in range(count):
                results[i % len(calls)] = None  # its memory is that of the next result
                results[i % len(calls)] = calls[i % len(calls)]()

        with library.scope():
            launch(len(calls))
            self.wait()
            rough = self.elapsed(lambda: launch(len(calls)))
            rounds = min(MOST_CALLS // len(calls), math.ceil(GRAPH_SECONDS / rough))
            count = len(calls) * (max(1, rounds) if self.window_seconds else 1)
            replay = library.capture(lambda: launch(count))
            replay()
            samples = self.sampled(replay, roughly)
            results.clear()  # before the pool that they lie in is given up
        return Timing([s / count for s in samples])

    def time_eagerly(self, call: Call) -> Timing:
        """Seconds with the host's own time in them."""
        with self.stream:
            call()
            self.wait()
            return Timing(self.sampled(call))

    def sampled(self, call: Call, roughly: bool = False) -> list[float]:
        """Seconds of a call, in each window."""
        windows = min(3, self.windows) if roughly else self.windows
        seconds = self.window_seconds / (6 if roughly else 1)
        repeats = max(1, math.ceil(seconds / self.elapsed(call)))

        def window() -> None:
            for _ in range(repeats):
                call()

        return [self.elapsed(window) / repeats for _ in range(windows)]

    def warm_up(self, call: Call, seconds: float) -> None:
        """Call again and again until the GPU has left the clocks at which it idles."""
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            call()
            self.wait()

    def elapsed(self, work: Call) -> float:
        """Seconds from the first to the last thing that `work` puts on the stream."""
        start, end = self.cuda.Event(), self.cuda.Event()
        start.record(self.stream)
        work()
        end.record(self.stream)
        end.synchronize()
        return max(1e-9, self.cuda.get_elapsed_time(start, end) / 1e3)

    @contextlib.contextmanager
    def poisoned(self) -> Iterator[None]:
        """New arrays hold NaN, or -1 where they hold ints: what no kernel writes shows."""
        pool = self.cuda.MemoryPool()

        def malloc(size: int) -> Any:
            memory = pool.malloc(size)
            memory.memset_async(0xFF, size)
            return memory

        self.wait()
        try:
            with self.cuda.using_allocator(malloc):
                yield
        finally:
            self.wait()
            pool.free_all_blocks()


class Budget:
    """The time that is left."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.started = time.monotonic()

    @property
    def used(self) -> float:
        return time.monotonic() - self.started

    @property
    def left(self) -> float:
        return max(0.0, self.seconds - self.used)


def outputs_of(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def relative_error(xp: Any, result: Any, expected: Any) -> float:
    """|result - expected| / |expected| in the Euclidean norm; ints must be equal, else infinity."""
    if result.shape != expected.shape:
        return math.inf
    if expected.dtype.kind in "iub":
        return 0.0 if bool((result == expected).all()) else math.inf
    result, expected = (a.astype(np.float64 if a.dtype == np.float64 else np.float32, copy=False)
                        for a in (result, expected))
    difference = result - expected
    norms = [float((a * a).sum(dtype=np.float64)) for a in (difference, expected)]
    return math.sqrt(norms[0] / norms[1]) if norms[1] else (0.0 if norms[0] == 0 else math.inf)


def same_bits(one: Any, other: Any) -> bool:
    """Whether arrays are equal to the bit, NaN included."""
    return one.shape == other.shape and bool(
        (one.ravel().view(np.uint8) == other.ravel().view(np.uint8)).all())


def run_twice(clock: Clock, call: Call) -> tuple[tuple[Any, ...], str]:
    """The outputs of a call into poisoned memory, and what is wrong with them: "" for nothing."""
    with clock.poisoned():
        first, second = outputs_of(call()), outputs_of(call())
        if not all(map(same_bits, first, second)):
            return first, "two runs differ"
        if not all(bool(clock.xp.isfinite(a.astype(np.float32)).all()) for a in first
                   if a.dtype.kind not in "iub"):
            return first, "not all is written, or finite"
    return first, ""


def verdict(error: float, tolerance: float, against: str) -> str:
    """What is wrong, where an error is too large or NaN."""
    return "" if error <= tolerance else f"differs from {against} by {error:.1e}"


def random_array(xp: Any, shape: tuple[int, ...], dtype: Any, seed: int, scale: float = 1) -> Any:
    """Normal numbers on the device: a block of them again and again, from a place that `seed` says.
    """
    size = math.prod(shape)
    block = np.roll(_normal_numbers(), seed * 7919)[:max(1, size)] * np.float32(scale)
    bits = xp.asarray(block.astype(dtype).view(f"u{np.dtype(dtype).itemsize}"))  # as CuPy knows
    return xp.tile(bits, -(-size // len(block)))[:size].reshape(shape).copy().view(dtype)


@functools.cache
def _normal_numbers() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(BLOCK, np.float32)
