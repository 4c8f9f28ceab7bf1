"""CUDA graphs: calls that are captured once and then launched as a whole."""
from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import cupy

_NO_MEMORY = 2  # cudaErrorMemoryAllocation


class GraphMemory:
    """Where graphs keep what they compute: theirs alone, and shared as they never run at once.

    CuPy's own pool would give an array's memory out again as soon as Python has forgotten the
    array, while each launch of the graph still writes to it.
    """

    def __init__(self) -> None:
        self.stream = cupy.cuda.Stream(non_blocking=True)  # a pool keeps memory by the stream
        self.renew()

    def renew(self) -> None:
        """Begin a new pool; graphs that were captured keep theirs."""
        self.pool = cupy.cuda.MemoryPool(_allocate)
        self.graphs = 0


def capture(work: Callable[[], Any], memory: GraphMemory) -> Callable[[], None]:
    """What work() launches, as a graph that has not run yet: a function that launches it.

    Nothing that work() calls may wait, copy from or to the host, or compile: it has run before.
    Raises what CuPy and CUDA raise against it; nothing is changed on the device then.
    """
    cupy.get_default_memory_pool().free_all_blocks()  # what a first run has left there
    while True:
        pool, alone = memory.pool, memory.graphs == 0
        with cupy.cuda.using_allocator(pool.malloc), memory.stream:
            graph = capture_on(memory.stream, work)
        memory.graphs += 1
        outlives = pool.used_bytes() > 0
        # What is still referred to after the capture, such as a result, is written by this graph
        # alone: neither by one before it, which calls for a second attempt, nor by one after it.
        if outlives:
            memory.renew()
        if alone or not outlives:
            break

    def launch(kept: tuple = (pool, work)) -> None:  # what the graph reads and writes
        graph.launch()

    return launch


def capture_on(stream: Any, work: Callable[[], Any]) -> Any:
    """What work() launches on the stream, which must be the current one, as a CuPy Graph."""
    stream.begin_capture()
    try:
        work()
    except BaseException:
        with contextlib.suppress(Exception):  # the first error says more
            stream.end_capture()
        raise
    return stream.end_capture()


def _allocate(size: int) -> Any:
    """As CuPy allocates; but a pool that finds no memory frees what lies unused in it, and that is
    what the graph which is being captured has used before."""
    try:
        return cupy.cuda.MemoryPointer(cupy.cuda.Memory(size), 0)
    except cupy.cuda.runtime.CUDARuntimeError as e:
        if e.status != _NO_MEMORY:  # such as what went wrong in a kernel before
            raise
        raise cupy.cuda.memory.OutOfMemoryError(size, -1) from e
